"""The last check of `attestor doctor`: decrypt's own call of KMS, as a dry run.

KMS answers a dry run that would succeed with DryRunOperationException, and any other as it would
answer the call itself (KMS API reference, Decrypt, DryRun).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attestor
from attestor_io.errors import AttestorError, InputError, NotAuthenticError, RefusedError
from attestor_io.reading import Message

if TYPE_CHECKING:
    from collections.abc import Mapping

_WOULD_DECRYPT = "KMS would decrypt for this enclave (a dry run)"


class NoVerdict(Exception):  # noqa: N818 - no error: nothing is known about decrypt
    """KMS has not said whether it would decrypt; says what tells."""


class _SuccessError(AttestorError):
    """KMS would decrypt. An error of ours, so that whoever reads a message hands it on."""


def dry_run(
    kms: attestor.Kms,
    blob: bytes | Message | None,
    bound: attestor.Binding,
    algorithm: str | None,
    *,
    document_holds: bool = True,
) -> tuple[str, str]:
    """Ask KMS whether it would decrypt, as `attestor decrypt` asks it to.

    Without a ciphertext KMS is asked about the key that `bound` names. `document_holds` tells
    whether our attestation document is one that KMS takes, as far as we can judge. Returns what KMS
    said and, where that is a warning, what to do; raises decrypt's errors, and NoVerdict.
    """
    parameters = {**bound.parameters(), **attestor.drop_unset(EncryptionAlgorithm=algorithm)}
    try:
        if isinstance(blob, Message):
            what = "a message of the AWS Encryption SDK"
            decrypt = attestor.load("attestor_commands.esdk:decrypt", what)
            decrypt(blob, lambda _: None, lambda asked: _ask(kms, asked), bound)
        elif blob:
            _ask(kms, {"CiphertextBlob": blob, **parameters})
        else:
            _ask_about_key(kms, parameters, document_holds=document_holds)
    except _SuccessError:
        return _WOULD_DECRYPT, ""
    reason = "KMS decrypted instead of a dry run; the plaintext is forgotten"
    return reason, "is this endpoint AWS KMS?"


def _ask(kms: attestor.Kms, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Decrypt as a dry run; raises _SuccessError if KMS would. What knows no dry run answers."""
    try:
        return kms.call("decrypt", DryRun=True, **parameters)
    except RefusedError as error:
        if _code(error) == "DryRunOperationException":
            raise _SuccessError(_WOULD_DECRYPT) from error
        raise


def _ask_about_key(
    kms: attestor.Kms, parameters: Mapping[str, Any], *, document_holds: bool
) -> None:
    """Decrypt without a ciphertext, which AWS KMS knows since 2025, and others may not."""
    try:
        _ask(kms, {"DryRunModifiers": ["IGNORE_CIPHERTEXT"], **parameters})
    except RefusedError as error:
        # what does not know the modifier misses a ciphertext; a document is refused alike
        lacks = {"InvalidCiphertextException"} | (
            {"ValidationException"} if document_holds else set()
        )
        if _code(error) not in lacks:
            raise
        raise NoVerdict(_without_modifier(f"this KMS ({_code(error)})")) from error
    except InputError as error:
        raise NoVerdict(_without_modifier("this botocore")) from error
    hint = "is this endpoint AWS KMS?"
    raise NotAuthenticError("KMS answered with a plaintext, without a ciphertext", hint)


def _without_modifier(who: str) -> str:
    return f"{who} seems to know no dry run without a ciphertext: name one as CIPHERTEXT"


def _code(error: RefusedError) -> str:
    """The code of KMS's answer; empty if it gave none."""
    answer = getattr(error.__cause__, "response", {}).get("Error", {})
    return str(answer.get("Code") or "")
