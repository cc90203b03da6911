"""`attestor encrypt`: the operator's side, which needs no Nitro Secure Module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from attestor import (
    KMS_OPTIONS,
    MODULE_OPTIONS,
    PLAINTEXT_MAX,
    VSOCK_OPTIONS,
    Kms,
    drop_unset,
    options,
)
from attestor_commands import public_keys
from attestor_commands.inputs import FORCE_OPTION
from attestor_commands.versions import VERSION, VERSION_MAX, fault_of
from attestor_io.ciphertext import ALGORITHMS, check_algorithm, is_symmetric
from attestor_io.errors import InputError
from attestor_io.module_options import SOURCE_OPTIONS
from attestor_io.progress import Progress
from attestor_io.reading import Message, read_head
from attestor_io.secret_file import open_target
from attestor_io.text_options import complete_from

if TYPE_CHECKING:
    from collections.abc import Mapping

    from attestor_io.deadline import Deadline
    from attestor_io.reading import Readable


def _parse_version(
    _context: click.Context, option: click.Parameter, text: str | None
) -> str | None:
    """A version as an option's value; raises InputError."""
    if text is not None and fault_of(text, 1):
        raise InputError(f"{option.opts[0]} wants a number from 1 to {VERSION_MAX}")
    return text


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
@click.option(
    "--algorithm",
    metavar="NAME",
    shell_complete=complete_from(ALGORITHMS),
    help="of an RSA key: RSAES_OAEP_SHA_256 or RSAES_OAEP_SHA_1",
)
@click.option(
    "--public-key", metavar="FILE", help="that RSA key, in PEM or DER, in the place of --key-id"
)
@click.option(
    "--version",
    metavar="N",
    callback=_parse_version,
    help="put this number into the context, as its version",
)
@FORCE_OPTION
@options(VSOCK_OPTIONS)
@options(MODULE_OPTIONS, without=SOURCE_OPTIONS)
def encrypt(
    plaintext: str,
    output: str,
    form: str,
    algorithm: str | None,
    public_key: str | None,
    version: str | None,
    encryption_context: Mapping[str, str],
    force: bool,
    **call: Any,
) -> None:
    """Make a ciphertext that `decrypt` and `inject` open: the operator's side, mostly.

    \b
    Examples:
      attestor encrypt --key-id arn:aws:kms:...:key/... --context node=3 secret secret.enc
      attestor encrypt --algorithm RSAES_OAEP_SHA_256 --public-key rsa.pub secret secret.enc

    PLAINTEXT is a file or "-". Up to 4096 bytes become a CiphertextBlob of KMS Encrypt, more of
    them (or all, with --format esdk) a signed message of the AWS Encryption SDK with key
    commitment, for which the package aws-encryption-sdk must be there. With --algorithm up to 470
    bytes are encrypted here, to the key that KMS GetPublicKey tells or --public-key holds: the
    first takes no kms:Encrypt, the second neither credentials nor network. OUTPUT may be "-".
    """
    call["encryption_context"] = _with_version(encryption_context, version)
    if not is_symmetric(algorithm) or public_key is not None:
        _encrypt_to_public_key(plaintext, output, form, algorithm, public_key, force=force, **call)
    else:
        _encrypt_symmetric(plaintext, output, form, force=force, **call)


def _with_version(context: Mapping[str, str], version: str | None) -> Mapping[str, str]:
    """The encryption context with the version in it, if there is one; raises InputError."""
    if version is None:
        return context
    if VERSION in context:
        raise InputError(f"--version contradicts --context {VERSION}=...", "leave one of them out")
    return {**context, VERSION: version}


def _encrypt_symmetric(
    plaintext: str,
    output: str,
    form: str,
    *,
    force: bool,
    key_id: str | None,
    encryption_context: Mapping[str, str],
    grant_tokens: tuple[str, ...],
    **connection: Any,
) -> None:
    if key_id is None:
        raise InputError("no key", "--key-id names it")
    kms = Kms.connect(key_id, **connection)
    head, rest = _read_plaintext(plaintext, kms.deadline)
    too_long = len(head) > PLAINTEXT_MAX
    if form == "kms" and too_long:
        most = f"longer than the {PLAINTEXT_MAX} bytes that KMS takes"
        raise InputError(f"plaintext {plaintext} is {most}")

    def ask(parameters: dict[str, Any]) -> Mapping[str, Any]:
        tokens = drop_unset(GrantTokens=list(grant_tokens))
        return kms.call_unattested("encrypt", **parameters, **tokens)

    with open_target(output, force=force) as target:
        if form == "esdk" or too_long:
            from attestor_commands import esdk

            source = Message(head, rest)
            with Progress("encrypted") as progress:
                append = progress.counting(target.append)
                esdk.encrypt(source, append, ask, key_id=key_id, context=encryption_context)
        else:
            answer = ask(
                {"KeyId": key_id, "Plaintext": head, "EncryptionContext": encryption_context}
            )
            target.append(answer["CiphertextBlob"])
        target.place()


def _encrypt_to_public_key(
    plaintext: str,
    output: str,
    form: str,
    algorithm: str | None,
    public_key: str | None,
    *,
    force: bool,
    key_id: str | None,
    encryption_context: Mapping[str, str],
    grant_tokens: tuple[str, ...],
    **connection: Any,
) -> None:
    """Encrypt here, to an RSA key that is read from a file or that KMS tells."""
    if algorithm is None or is_symmetric(algorithm):
        raise InputError("--public-key needs --algorithm", "RSAES_OAEP_SHA_256 is the usual one")
    check_algorithm(
        algorithm, "--algorithm", key_id or public_key, has_context=bool(encryption_context)
    )
    public_keys.check_can_encrypt(algorithm)
    if key_id is not None and public_key is not None:
        raise InputError("--public-key contradicts --key-id", "leave one of them out")
    if form == "esdk":
        raise InputError(f"--format esdk contradicts --algorithm {algorithm}")
    deadline: Deadline = connection["deadline"]
    der = b"" if public_key is None else public_keys.read_public_key(public_key, deadline)
    kms = Kms.connect(key_id, **connection) if public_key is None else None
    head, _ = _read_plaintext(plaintext, deadline)
    with open_target(output, force=force) as target:
        if kms is not None and key_id is not None:
            tokens = drop_unset(GrantTokens=list(grant_tokens))
            answer = kms.call_unattested("get_public_key", KeyId=key_id, **tokens)
            der = public_keys.public_key_of(answer, key_id, algorithm)
        what = f"public key {public_key or f'of {key_id}'}"
        target.append(public_keys.encrypt_to(der, algorithm, head, what))
        target.place()


def _read_plaintext(path: str, deadline: Deadline) -> tuple[bytes, Readable]:
    """The first bytes of a plaintext, one more than KMS takes, and the stream behind them."""
    head, rest = read_head(path, PLAINTEXT_MAX + 1, f"plaintext {path}", deadline)
    if not head:
        raise InputError(f"plaintext {path} is empty")
    return head, rest
