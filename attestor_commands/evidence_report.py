"""What an attestation document, or the module of this enclave, says: for people and programs.

Each `..._object` gives what `--json` prints; each `..._text` makes a report from it.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Final

from attestor_commands.report import WIDTH, Object, age, field, utc, wrapped
from nsm.document import CHECKS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from nsm import Nsm
    from nsm.document import AttestationDocument, Expectations, Source, VerifiedDocument
    from nsm.module import Description, Pcr


_MEANINGS: Final = {
    0: "image",
    1: "kernel and boot",
    2: "application",
    3: "role of the parent instance",
    4: "id of the parent instance",
    8: "signing certificate",
}
_APPLICATIONS: Final = 16  # the first PCR that is the application's to extend and to lock
# TCG PC Client Platform Firmware Profile, 3.3.4; from 8 on what boot loaders and Linux do with them
_NITROTPM_MEANINGS: Final = {
    0: "firmware",
    1: "configuration of the firmware",
    2: "drivers from devices",
    3: "configuration of these drivers",
    4: "boot manager",
    5: "configuration of the boot manager",
    6: "of the platform's manufacturer",
    7: "Secure Boot state and keys",
    8: "commands of the boot loader",
    9: "files of the boot loader",
    10: "files that the kernel measured (IMA)",
    11: "parts of the unified kernel image",
    12: "kernel command line",
    13: "system extensions",
    14: "machine owner keys",
    15: "identity of the system",
    16: "for debugging",
    23: "the application's own",
}


def meaning(index: int, source: Source = "enclave") -> str:
    """What a PCR measures ("Cryptographic attestation" of the Nitro Enclaves User Guide, and the
    firmware profile of the TCG for a NitroTPM).
    """
    if source == "nitrotpm":
        return _NITROTPM_MEANINGS.get(index, "of a measured launch")  # 17 to 22
    return _MEANINGS.get(index, "the application's own" if index >= _APPLICATIONS else "unused")


# ---- documents and modules


def document_object(
    verified: VerifiedDocument, expect: Expectations, *, now: datetime, in_base64: bool = False
) -> Object:
    """A verified document: its fields, chain and checks; fields in hexadecimal, PCRs in that or in
    base64.

    The PCRs of `expect` were compared: what the others say was only shown.
    """
    document = verified.document
    return {
        "verified": True,
        "source": document.source,
        "module_id": document.module_id,
        "digest": document.digest,
        "signed_at": utc(document.signed_at),
        "age_seconds": round((now - document.signed_at).total_seconds()),
        "verified_at": utc(verified.at),
        "at_own_timestamp": verified.at == document.signed_at,
        "debug_mode": debug_mode_of(document),
        "pcr_encoding": "base64" if in_base64 else "hex",
        "pcrs": _encoded(document.pcrs, in_base64),
        "nitrotpm_pcrs": _encoded(document.nitrotpm_pcrs, in_base64),
        "expected_pcrs": sorted(expect.pcrs or expect.nitrotpm_pcrs),
        "public_key": _hex(document.public_key),
        "user_data": _hex(document.user_data),
        "nonce": _hex(document.nonce),
        "root_sha256": verified.root_sha256.hex(),
        "chain": [
            {
                "subject": link.subject,
                "not_before": utc(link.not_before),
                "not_after": utc(link.not_after),
            }
            for link in verified.chain
        ],
        "checks": {
            check: "passed" if check in verified.checks else "not asked" for check in CHECKS
        },
    }


def document_text(report: Object) -> str:
    """The report on a verified document."""
    own = " (its own timestamp)" if report["at_own_timestamp"] else ""
    debug_mode = report["debug_mode"]
    lines = [
        *field("module", report["module_id"]),
        *field("source", SOURCES[report["source"]]),
        *field("signed", f"{report['signed_at']}, {age(report['age_seconds'])}"),
        *field("verified at", report["verified_at"] + own),
        *(field("debug mode", debug_text(debug_mode)) if debug_mode is not None else ()),
        *field("root, SHA-256", report["root_sha256"]),
    ]
    for name in ("public_key", "user_data", "nonce"):
        lines += field(name.replace("_", " "), _length(report[name]))
    lines += [
        "",
        f"PCRs ({report['digest']})",
        *pcr_lines(report["pcrs"] or report["nitrotpm_pcrs"], report["source"]),
        "",
        "chain, root first",
    ]
    for link in report["chain"]:
        lines += wrapped(link["subject"], "  ")
        lines.append(f"    {link['not_before']} to {link['not_after']}")
    checks = dict(report["checks"])
    if report["expected_pcrs"]:
        checks["pcrs"] += f": {', '.join(map(str, report['expected_pcrs']))}"
    lines += ["", "checks"]
    for check, verdict in checks.items():
        lines += wrapped(verdict, f"  {check:18}", hanging=" " * 20)
    return "\n".join(lines)


def description_object(
    description: Description, pcrs: Mapping[int, Pcr], module: Nsm, *, in_base64: bool = False
) -> Object:
    """A module and its PCRs."""
    is_enclave = module.source == "enclave"
    shown = {
        str(index): {"value": _encode(pcr.value, in_base64), "locked": pcr.locked}
        for index, pcr in sorted(pcrs.items())
    }
    return {
        "source": module.source,
        "module_id": description.module_id,
        "version": ".".join(map(str, description.version)),
        "digest": description.digest,
        "max_pcrs": description.max_pcrs,
        "transport": module.transport_name,
        "debug_mode": (0 not in pcrs or not any(pcrs[0].value)) if is_enclave else None,
        "pcr_encoding": "base64" if in_base64 else "hex",
        "pcrs": shown if is_enclave else {},
        "nitrotpm_pcrs": {} if is_enclave else shown,
    }


def description_text(report: Object) -> str:
    """The report on a module."""
    pcrs = report["pcrs"] or report["nitrotpm_pcrs"]
    locked = [index for index, pcr in pcrs.items() if pcr["locked"]]
    values = {index: pcr["value"] for index, pcr in pcrs.items()}
    of_enclave = [
        *field("debug mode", debug_text(report["debug_mode"])),
        *field("locked PCRs", ", ".join(locked) or "none"),
    ]
    lines = [
        *field("module", report["module_id"]),
        *field("source", SOURCES[report["source"]]),
        *field("version", report["version"]),
        *field("transport", report["transport"]),
        *(of_enclave if report["source"] == "enclave" else ()),
        "",
        f"PCRs ({report['digest']})",
        *pcr_lines(values, report["source"]),
    ]
    return "\n".join(lines)


SOURCES: Final[Mapping[str, str]] = {
    "enclave": "an enclave",
    "nitrotpm": "the NitroTPM of an EC2 instance, which is no enclave",
}
"""Whose a document is, in words."""


def debug_mode_of(document: AttestationDocument) -> bool | None:
    """Whether an enclave runs in debug mode; None of a NitroTPM, which has no such mode."""
    return document.debug_mode if document.source == "enclave" else None


def debug_text(debug_mode: bool) -> str:
    """Say whether an enclave runs in debug mode, and what that means."""
    return "YES: PCR0 is all zeros, as in every enclave in debug mode" if debug_mode else "no"


def pcr_lines(pcrs: Mapping[str, str], source: Source = "enclave") -> Iterable[str]:
    """Each PCR with its meaning; those that are zero and mean nothing are left out.

    So are those of a NitroTPM that are all ones: no measured launch took place.
    """
    hidden: dict[str, list[str]] = {"all zeros": [], "all ones": []}
    for index, value in pcrs.items():
        constant = _constant(value)
        what = meaning(int(index), source)
        if constant and (constant == "all ones" or not _shown_as_zero(int(index), source)):
            hidden[constant].append(index)
            continue
        yield f"  PCR{index:3} {what}"
        yield from wrapped(
            constant or value, " " * 9, WIDTH if len(value) <= 64 else 9 + len(value) // 2
        )
    for constant, indexes in hidden.items():
        if indexes:
            yield from wrapped(f"{constant}: {', '.join(indexes)}", "  ")


def _constant(value: str) -> str:
    """What a value is whose bytes are all the same, in hexadecimal or base64; else nothing."""
    for name, characters in (("all zeros", "0A"), ("all ones", "f/")):
        if any(not value.strip(character) for character in characters):
            return name
    return ""


def _shown_as_zero(index: int, source: Source) -> bool:
    """Whether zero is worth a line: of what tells images apart, or always is measured to."""
    return index in (_MEANINGS if source == "enclave" else (4, 7, 12))


def _encoded(pcrs: Mapping[int, bytes], in_base64: bool) -> dict[str, str]:
    return {str(index): _encode(pcrs[index], in_base64) for index in sorted(pcrs)}


def _length(value: str | None) -> str:
    if value is None:
        return "absent"
    return f"{len(value) // 2} bytes: {value}" if value else "empty"


def _hex(value: bytes | None) -> str | None:
    return None if value is None else value.hex()


def _encode(value: bytes, in_base64: bool) -> str:
    return base64.b64encode(value).decode() if in_base64 else value.hex()
