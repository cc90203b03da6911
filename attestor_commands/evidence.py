"""`attestor attest`, `describe` and `verify`: attestation documents and the module behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from attestor import DEFAULT_TIMEOUT, MODULE_OPTIONS, ask_module, options
from attestor_commands.inputs import (
    BASE64_OPTION,
    FIELD_OPTIONS,
    JSON_OPTION,
    NITROTPM_PCR_OPTION,
    PCR_OPTION,
    ROOT_OPTION,
    evidence_errors,
    field_values,
    parse_file,
    trusted_roots,
)
from attestor_commands.report import print_report
from attestor_io.deadline import Deadline
from attestor_io.errors import InputError
from attestor_io.secret_file import open_target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@click.command()
@click.argument("output")
@options(FIELD_OPTIONS)
@click.option("-f", "--force", is_flag=True, help="replace OUTPUT if it exists")
@options(MODULE_OPTIONS)
def attest(
    output: str, nonce: str | None, user_data: str | None, public_key: str | None, force: bool
) -> None:
    """Write an attestation document of this enclave, or of this instance.

    \b
    Examples:
      attestor attest --nonce 00112233445566778899aabbccddeeff document
      attestor attest --public-key @key.der - | ship-it

    OUTPUT is created as decrypt does; "-" writes to standard output. Each of the three fields has
    at most 1024 bytes, which is what the specification of a document allows.
    """
    with evidence_errors():
        fields = field_values(nonce=nonce, user_data=user_data, public_key=public_key)
    with open_target(output, force=force) as target:
        deadline = Deadline(DEFAULT_TIMEOUT)
        target.append(ask_module(lambda module: module.attest(**fields), deadline))
        target.place()


@click.command()
@BASE64_OPTION
@JSON_OPTION
@options(MODULE_OPTIONS)
def describe(in_base64: bool, as_json: bool) -> None:
    """Show the Nitro Secure Module of this enclave, or the NitroTPM, and its PCRs."""
    from attestor_commands import evidence_report
    from nsm.document import PCRS_MAX

    def look(module: Any) -> dict[str, Any]:
        description = module.describe()
        pcrs = {
            index: module.describe_pcr(index)
            for index in range(min(description.max_pcrs, PCRS_MAX))
        }
        return evidence_report.description_object(description, pcrs, module, in_base64=in_base64)

    seen = ask_module(look, Deadline(DEFAULT_TIMEOUT))
    print_report(seen, evidence_report.description_text, as_json=as_json)


@click.command()
@click.argument("document")
@PCR_OPTION
@NITROTPM_PCR_OPTION
@click.option(
    "--measurements",
    metavar="FILE",
    help="expect the PCRs that nitro-cli build-enclave or nitro-tpm-pcr-compute printed",
)
@click.option("--eif", metavar="FILE", help="expect the PCRs of this image, measured here")
@click.option("--any-image", is_flag=True, help="expect no PCR, and say that this is meant")
@options(FIELD_OPTIONS)
@click.option("--module-id", metavar="ID", help="expect this module")
@click.option(
    "--at", metavar="TIME", help='of verification; "document": when it was signed  [default: now]'
)
@click.option("--max-age", metavar="SECONDS", help="between the document's timestamp and now")
@click.option("--allow-debug", is_flag=True, help="accept an enclave in debug mode")
@ROOT_OPTION
@BASE64_OPTION
@JSON_OPTION
def verify(
    document: str,
    any_image: bool,
    at: str | None,
    max_age: str | None,
    root: str | None,
    in_base64: bool,
    as_json: bool,
    **expected: Any,
) -> None:
    """Verify an attestation document of an enclave or a NitroTPM, offline, and show what it says.

    \b
    Examples:
      attestor verify --measurements build.json --nonce 00112233445566778899aabbccddeeff document
      attestor verify --eif app.eif --max-age 60 document
      attestor verify --any-image --at document old-document

    A nonce that you chose, or --max-age, tells a fresh document from a replayed one. Revocation is
    not checked, as the specification of the format says. A document that is refused prints nothing
    but the error.
    """
    from datetime import UTC, datetime

    from attestor_commands import evidence_report
    from attestor_commands.arguments import parse_time
    from nsm.document import AttestationDocument
    from nsm.document import verify as verify_document

    if max_age is not None and at == "document":
        raise InputError(
            "--max-age contradicts --at document, at which every document is new",
            "leave one of them out",
        )
    asked = {name: expected.pop(name) for name in ("pcrs", "nitrotpm_pcrs", "measurements", "eif")}
    if not (any(asked.values()) or any_image):
        hint = "give --pcr, --measurements or --eif, or --any-image if that is meant"
        raise InputError("no PCR is expected: every genuine enclave's document would pass", hint)
    with evidence_errors():
        expect = _expectations(asked, max_age, expected)
        now, roots = datetime.now(UTC), trusted_roots(root)
        time = now if at in {None, "document"} else parse_time(str(at))
        parsed = parse_file(document, AttestationDocument.parse, f"document {document}")
        if at == "document":
            time = parsed.signed_at
        verified = verify_document(parsed, roots=roots, at=time, expect=expect, now=now)
    shown = evidence_report.document_object(verified, expect, now=now, in_base64=in_base64)
    print_report(shown, evidence_report.document_text, as_json=as_json)


def _expectations(
    asked: Mapping[str, Any], max_age: str | None, expected: Mapping[str, Any]
) -> Any:
    from attestor_commands.arguments import parse_age
    from nsm.document import Expectations

    pcrs, nitrotpm_pcrs = _expected_pcrs(**asked)
    return Expectations(
        source="nitrotpm" if nitrotpm_pcrs else "enclave" if pcrs else None,
        pcrs=pcrs,
        nitrotpm_pcrs=nitrotpm_pcrs,
        max_age=parse_age(max_age) if max_age is not None else None,
        module_id=expected["module_id"],
        allow_debug=expected["allow_debug"],
        **field_values(**{name: expected[name] for name in ("nonce", "user_data", "public_key")}),
    )


def _expected_pcrs(
    pcrs: Sequence[str],
    nitrotpm_pcrs: Sequence[str],
    measurements: str | None,
    eif: str | None,
) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """The PCRs of an enclave or those of a NitroTPM; a document has one kind alone."""
    from attestor_commands.arguments import merge, parse_nitrotpm_pcr, parse_pcr
    from attestor_commands.images import measured_image
    from keypolicy import Measured, measured

    read = parse_file(measurements, measured) if measurements else Measured("enclave", {})
    listed = {read.source: read.pcrs.items()}
    image = measured_image(eif).pcrs.items() if eif else ()
    enclave = merge(map(parse_pcr, pcrs), listed.get("enclave", ()), image)
    nitrotpm = merge(map(parse_nitrotpm_pcr, nitrotpm_pcrs), listed.get("nitrotpm", ()))
    if enclave and nitrotpm:
        raise InputError(
            "PCRs of an enclave and of a NitroTPM are expected, but a document has one kind",
            "leave one of them out",
        )
    return enclave, nitrotpm
