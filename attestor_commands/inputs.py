"""Options and files that the commands about documents and policies have in common."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import click

from attestor_io.errors import InputError, NotAuthenticError
from attestor_io.reading import read_bounded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nsm.document import AttestationDocument, DocumentError

FILE_MAX: Final = 256 << 10  # bytes of documents, policies, measurements and certificates

_DOCUMENT_HINTS: Final = {
    "root": "--root FILE trusts another root; nitrosim's is in $NITROSIM_NSM_ROOT",
    "validity": (
        "a document is valid for three hours: --at document verifies it at its own "
        "timestamp, --at TIME then"
    ),
    "debug_mode": "--allow-debug accepts it, for tests",
    "pcrs": "another image, kernel or instance: compare with what nitro-cli build-enclave printed",
}
FIELD_OPTIONS: Final = {
    name: click.option(f"--{name.replace('_', '-')}", metavar="VALUE", help="hexadecimal, or @FILE")
    for name in ("nonce", "user_data", "public_key")
}
ROOT_OPTION: Final = click.option(
    "--root",
    metavar="FILE",
    help="certificate to trust, PEM or DER  [default: AWS Nitro Enclaves root G1]",
)
JSON_OPTION: Final = click.option(
    "--json", "as_json", is_flag=True, help="print JSON, as docs/formats.md describes it"
)
BASE64_OPTION: Final = click.option(
    "--base64", "in_base64", is_flag=True, help="show PCRs in base64, as CloudTrail does"
)
FORCE_OPTION: Final = click.option("-f", "--force", is_flag=True, help="replace what exists")
PCR_OPTION: Final = click.option(
    "--pcr",
    "pcrs",
    metavar="N=HEX",
    multiple=True,
    help="value of a PCR (base64 is taken too), repeatable",
)


@contextlib.contextmanager
def evidence_errors() -> Iterator[None]:
    """Errors about documents, policies and their options as ours."""
    from attestor_commands.arguments import ArgumentError
    from keypolicy import PolicyError
    from nsm.document import DocumentError

    try:
        yield
    except (ArgumentError, PolicyError) as error:
        raise InputError(str(error)) from error
    except DocumentError as error:
        hints = [_DOCUMENT_HINTS[error.check]] if error.check in _DOCUMENT_HINTS else []
        raise _document_refused(error, *hints) from error


def read_file(path: str, what: str, limit: int = FILE_MAX) -> bytes:
    """Read a whole file of at most `limit` bytes; raises InputError, which says `what` it is."""
    data = read_bounded(path, limit + 1, what)
    if len(data) > limit:
        raise InputError(f"{what} is longer than {limit} bytes")
    return data


def read_document(path: str) -> AttestationDocument:
    """Read and parse an attestation document, which proves nothing yet; NotAuthenticError."""
    from nsm.document import AttestationDocument, DocumentError

    data = read_file(path, f"document {path}")
    try:
        return AttestationDocument.parse(data)
    except DocumentError as error:
        hint = "a document is binary, as attestor attest writes it: decode base64 text first"
        raise _document_refused(error, *([hint] if _is_text(data) else [])) from error


def _is_text(data: bytes) -> bool:
    return data.isascii() and data.translate(None, b"\r\n\t").decode().isprintable() and data != b""


def _document_refused(error: DocumentError, *hints: str) -> NotAuthenticError:
    return NotAuthenticError(f"document refused, {error.check.replace('_', ' ')}: {error}", *hints)


def field_values(**texts: str | None) -> dict[str, bytes]:
    """The fields of a document that were given, as bytes; raises InputError.

    A module signs fields that are larger, but no verifier takes them: each is of at most 1024
    bytes (docs/attestation_process.md of aws-nitro-enclaves-nsm-api, section 3.2.2).
    """
    from attestor_commands.arguments import parse_bytes
    from nsm.document import FIELD_MAX

    values = {}
    for name, text in texts.items():
        if text is not None:
            values[name] = parse_bytes(text, lambda path: read_file(path, path, FIELD_MAX))
            if len(values[name]) > FIELD_MAX:
                size = f"{len(values[name])} bytes, expected at most {FIELD_MAX}"
                raise InputError(f"--{name.replace('_', '-')} has {size}")
    return values


def trusted_roots(path: str | None) -> list[bytes]:
    """The SHA-256 of the root certificate in a file, or of AWS's own where there is no path."""
    from attestor_commands.arguments import parse_root
    from nsm.document import AWS_ROOT_G1_SHA256

    return (
        [parse_root(read_file(path, f"root {path}"))] if path is not None else [AWS_ROOT_G1_SHA256]
    )
