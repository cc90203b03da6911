"""`attestor encrypt`: the operator's side, which needs no Nitro Secure Module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from attestor import KMS_OPTIONS, MODULE_OPTIONS, PLAINTEXT_MAX, Kms, drop_unset, options
from attestor_commands.inputs import FORCE_OPTION
from attestor_io.errors import InputError
from attestor_io.reading import Message, read_head
from attestor_io.secret_file import open_target

if TYPE_CHECKING:
    from collections.abc import Mapping


@click.command()
@click.argument("plaintext")
@click.argument("output")
@options(KMS_OPTIONS, without={"any_key"})
@click.option(
    "--format",
    "form",
    type=click.Choice(("auto", "kms", "esdk")),
    default="auto",
    help="[default: auto]",
)
@FORCE_OPTION
@options(MODULE_OPTIONS, without={"nsm_library"})
def encrypt(
    plaintext: str,
    output: str,
    form: str,
    force: bool,
    key_id: str | None,
    encryption_context: Mapping[str, str],
    grant_tokens: tuple[str, ...],
    **connection: Any,
) -> None:
    """Make a ciphertext that `decrypt` and `inject` open: the operator's side, outside any enclave.

    \b
    Example:
      attestor encrypt --key-id arn:aws:kms:...:key/... --context node=3 secret secret.enc

    PLAINTEXT is a file or "-". Up to 4096 bytes become a CiphertextBlob of KMS Encrypt, more of
    them (or all, with --format esdk) a signed message of the AWS Encryption SDK with key
    commitment, for which the package aws-encryption-sdk must be there. OUTPUT may be "-".
    """
    if key_id is None:
        raise InputError("no key", "--key-id names it")
    kms = Kms.connect(key_id, **connection)
    head, rest = read_head(plaintext, PLAINTEXT_MAX + 1, f"plaintext {plaintext}", kms.deadline)
    too_long = len(head) > PLAINTEXT_MAX
    if not head:
        raise InputError(f"plaintext {plaintext} is empty")
    if form == "kms" and too_long:
        raise InputError(
            f"plaintext {plaintext} is longer than the {PLAINTEXT_MAX} bytes that KMS takes"
        )

    def ask(parameters: dict[str, Any]) -> Mapping[str, Any]:
        tokens = drop_unset(GrantTokens=list(grant_tokens))
        return kms.call_unattested("encrypt", **parameters, **tokens)

    with open_target(output, force=force) as target:
        if form == "esdk" or too_long:
            from attestor_commands import esdk

            source = Message(head, rest)
            esdk.encrypt(source, target.append, ask, key_id=key_id, context=encryption_context)
        else:
            answer = ask(
                {"KeyId": key_id, "Plaintext": head, "EncryptionContext": encryption_context}
            )
            target.append(answer["CiphertextBlob"])
        target.place()
