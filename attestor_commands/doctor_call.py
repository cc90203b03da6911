"""The last check of `attestor doctor`: what decrypt does with a ciphertext, as a dry run.

KMS answers a dry run that would succeed with DryRunOperationException, and any other as it would
answer the call itself (KMS API reference, Decrypt, DryRun).
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import attestor
from attestor_io.errors import AttestorError, InputError, NotAuthenticError, RefusedError
from attestor_io.reading import Message
from nsm.source import place

if TYPE_CHECKING:
    from typing import Self

_WOULD_DECRYPT = "KMS would decrypt for this {} (a dry run)"


class NoVerdict(Exception):  # noqa: N818 - no error: nothing is known about decrypt
    """KMS has not said whether it would decrypt; says what tells."""


class _SuccessError(AttestorError):
    """KMS would decrypt. An error of ours, so that whoever reads a message hands it on."""


class _DryRun(attestor.Kms):
    """KMS as decrypt meets it, but for its answer."""

    def call(self, operation: str, **parameters: object) -> dict[str, Any]:
        """Call as a dry run; raises _SuccessError if KMS would do it, and decrypt's errors.

        A KMS that knows no dry run answers as ever.
        """
        try:
            # not super(): a dataclass with slots is another class than its methods were written in
            return attestor.Kms.call(self, operation, DryRun=True, **parameters)
        except RefusedError as error:
            if _code(error) == "DryRunOperationException":
                raise _SuccessError(_WOULD_DECRYPT.format(place())) from error
            raise


class _Nowhere:
    """A target that keeps nothing."""

    def append(self, data: bytes) -> None:
        """Forget it."""

    def place(self) -> None:
        """There is nothing to place."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def dry_run(
    kms: attestor.Kms,
    blob: bytes | Message | None,
    bound: attestor.Binding,
    algorithm: str | None,
    *,
    document_holds: bool = True,
) -> tuple[str, str]:
    """Let decrypt's own code ask KMS whether it would decrypt.

    Without a ciphertext KMS is asked about the key that `bound` names. `document_holds` tells
    whether our attestation document is one that KMS takes, as far as we can judge. Returns what KMS
    said and, where that is a warning, what to do; raises decrypt's errors, and NoVerdict.
    """
    rehearsal = _DryRun(*(getattr(kms, one.name) for one in fields(kms)))
    try:
        if isinstance(blob, Message):
            what = "a message of the AWS Encryption SDK"
            decrypt_into = attestor.load(attestor.DECRYPT_MESSAGE, what)
            decrypt_into(_Nowhere(), rehearsal, blob, bound, signed=False)
        elif blob:
            attestor.decrypt_into(_Nowhere(), rehearsal, blob, bound, algorithm)
        else:
            _ask_about_key(rehearsal, bound, algorithm, document_holds=document_holds)
    except _SuccessError:
        return _WOULD_DECRYPT.format(place()), ""
    reason = "KMS decrypted instead of a dry run; the plaintext is forgotten"
    return reason, "is this endpoint AWS KMS?"


def _ask_about_key(
    kms: _DryRun, bound: attestor.Binding, algorithm: str | None, *, document_holds: bool
) -> None:
    """Decrypt without a ciphertext, which AWS KMS knows since 2025, and others may not."""
    parameters = {**bound.parameters(), **attestor.drop_unset(EncryptionAlgorithm=algorithm)}
    try:
        kms.call("decrypt", DryRunModifiers=["IGNORE_CIPHERTEXT"], **parameters)
    except RefusedError as error:
        # what does not know the modifier misses a ciphertext; a document is refused alike
        lacking = {"InvalidCiphertextException", *(["ValidationException"] * document_holds)}
        if _code(error) not in lacking:
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
