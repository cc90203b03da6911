"""Options and files that the commands about documents and policies have in common."""

from __future__ import annotations

import contextlib
import itertools
import re
from typing import TYPE_CHECKING, Final, TypeVar

import click

from attestor_io.errors import InputError, NotAuthenticError
from attestor_io.reading import read_bounded
from attestor_io.text_options import FileName

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Parsed = TypeVar("Parsed")
FILE_MAX: Final = 256 << 10  # bytes of documents, policies, measurements and certificates

_TEXT_HINT: Final = "a document is binary, as attestor attest writes it: decode base64 text first"
# By the check that refused: the first hint applies whose options the command has.
_DOCUMENT_HINTS: Final = {
    "root": ("--root FILE trusts another root; nitrosim's is in $NITROSIM_NSM_ROOT",),
    "validity": (
        (
            "a document is valid for three hours: --at document verifies it at its own "
            "timestamp, --at TIME then"
        ),
    ),
    "source": ("--pcr is of enclaves, --nitrotpm-pcr of EC2 instances: they measure other things",),
    "debug_mode": (
        "--allow-debug accepts it, for tests",
        (
            "it attests zeros, not its image: --measurements takes what nitro-cli printed of the "
            "image, and --eif the image itself"
        ),
    ),
    "pcrs": (
        (
            "another image, kernel or instance: compare with what nitro-cli build-enclave printed, "
            "or nitro-tpm-pcr-compute"
        ),
    ),
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
FILES_ARGUMENT: Final = click.argument("file", nargs=-1, required=True, type=FileName())
FORCE_OPTION: Final = click.option("-f", "--force", is_flag=True, help="replace what exists")
PCR_OPTION: Final = click.option(
    "--pcr",
    "pcrs",
    metavar="N=HEX",
    multiple=True,
    help="value of a PCR (base64 is taken too), repeatable",
)


NITROTPM_PCR_OPTION: Final = click.option(
    "--nitrotpm-pcr",
    "nitrotpm_pcrs",
    metavar="N=HEX",
    multiple=True,
    help="the same of an EC2 instance's NitroTPM, repeatable",
)
EIFS_OPTION: Final = click.option(
    "--eif", "eifs", metavar="FILE", multiple=True, help="an image, measured here, repeatable"
)


@contextlib.contextmanager
def evidence_errors() -> Iterator[None]:
    """Errors about documents, policies and their options as ours."""
    from attestor_commands.arguments import ArgumentError
    from keypolicy import PolicyError
    from nsm.document import DocumentError

    try:
        yield
    except ArgumentError as error:
        raise InputError(str(error)) from error
    except PolicyError as error:
        raise InputError(str(error), *error.hints) from error
    except DocumentError as error:
        hints = _DOCUMENT_HINTS.get(error.check, getattr(error, "hints", ()))
        reason = f"document refused, {error.check.replace('_', ' ')}: {error}"
        refused = NotAuthenticError(reason, *_applicable(hints))
        refused.notes = tuple(getattr(error, "__notes__", ()))
        raise refused from error


def _applicable(hints: Sequence[str]) -> list[str]:
    """Return the first hint that names no option which the running command lacks, if any."""
    context = click.get_current_context(silent=True)
    parameters = context.command.params if context else ()
    options = {name for parameter in parameters for name in parameter.opts}
    fitting = (hint for hint in hints if options.issuperset(re.findall(r"--[a-z-]+", hint)))
    return list(itertools.islice(fitting, 1))


def parse_file(path: str, parse: Callable[[bytes], Parsed], what: str = "") -> Parsed:
    """Read a file or ("-") standard input and parse it; whatever is wrong with it names it.

    `what` is its name in errors where that is not the path.
    """
    from attestor_commands.arguments import ArgumentError
    from keypolicy import PolicyError
    from nsm.document import DocumentError

    name = what or ("standard input" if path == "-" else path)
    data = read_file(path, name)
    try:
        return parse(data)
    except ArgumentError as error:
        raise ArgumentError(f"{name}: {error}") from error
    except PolicyError as error:
        raise PolicyError(f"{name}: {error}", *error.hints) from error
    except DocumentError as error:
        error.add_note(f"this is {name}")
        if error.check == "format" and _is_text(data):
            error.hints = (_TEXT_HINT,)  # type: ignore[attr-defined]  # for `evidence_errors` alone
        raise


def _is_text(data: bytes) -> bool:
    return data != b"" and data.isascii() and data.translate(None, b"\r\n\t").decode().isprintable()


def read_file(path: str, what: str, limit: int = FILE_MAX) -> bytes:
    """Read a whole file of at most `limit` bytes; raises InputError, which says `what` it is."""
    data = read_bounded(path, limit + 1, what)
    if len(data) > limit:
        from attestor_eif import is_eif

        hints = _applicable(["--eif FILE takes an enclave image"]) if is_eif(data) else ()
        raise InputError(f"{what} is longer than {limit} bytes", *hints)
    return data


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
        [parse_file(path, parse_root, f"root {path}")] if path is not None else [AWS_ROOT_G1_SHA256]
    )
