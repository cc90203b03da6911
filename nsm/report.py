"""What a document, a module or a decision says, for people and for programs.

Each `..._object` gives what `--json` prints; each `..._text` makes a report from it, at most WIDTH
columns wide. Values that came from outside are shown without anything that could steer a terminal.
"""

from __future__ import annotations

import base64
import textwrap
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from nsm.document import CHECKS
from nsm.policy import NOT_EVALUATED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from nsm.document import VerifiedDocument
    from nsm.module import Description, Pcr
    from nsm.policy import Evaluation, Finding, Request, StatementFinding

WIDTH: Final = 100
_LABEL: Final = 16  # columns before a value
_MEANINGS: Final = {
    0: "image",
    1: "kernel and boot",
    2: "application",
    3: "role of the parent instance",
    4: "id of the parent instance",
    8: "signing certificate",
}
_APPLICATIONS: Final = 16  # the first PCR that is the application's to extend and to lock
Object = dict[str, Any]


def meaning(index: int) -> str:
    """What a PCR measures ("Cryptographic attestation" of the Nitro Enclaves User Guide)."""
    return _MEANINGS.get(index, "the application's own" if index >= _APPLICATIONS else "unused")


# ---- documents and modules


def document_object(
    verified: VerifiedDocument,
    *,
    now: datetime,
    expected: Iterable[int] = (),
    in_base64: bool = False,
) -> Object:
    """A verified document: its fields, chain and checks; fields in hexadecimal, PCRs in that or in
    base64.

    `expected` are the PCRs that were compared: what the others say was only shown.
    """
    document = verified.document
    return {
        "verified": True,
        "module_id": document.module_id,
        "digest": document.digest,
        "signed_at": _utc(document.signed_at),
        "age_seconds": round((now - document.signed_at).total_seconds()),
        "verified_at": _utc(verified.at),
        "at_own_timestamp": verified.at == document.signed_at,
        "debug_mode": document.debug_mode,
        "pcr_encoding": "base64" if in_base64 else "hex",
        "pcrs": {
            str(index): _encode(document.pcrs[index], in_base64) for index in sorted(document.pcrs)
        },
        "expected_pcrs": sorted(expected),
        "public_key": _hex(document.public_key),
        "user_data": _hex(document.user_data),
        "nonce": _hex(document.nonce),
        "root_sha256": verified.root_sha256.hex(),
        "chain": [
            {
                "subject": link.subject,
                "not_before": _utc(link.not_before),
                "not_after": _utc(link.not_after),
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
    lines = [
        *_field("module", report["module_id"]),
        *_field("signed", f"{report['signed_at']}, {age(report['age_seconds'])}"),
        *_field("verified at", report["verified_at"] + own),
        *_field("debug mode", _debug(report["debug_mode"])),
        *_field("root, SHA-256", report["root_sha256"]),
    ]
    for name in ("public_key", "user_data", "nonce"):
        lines += _field(name.replace("_", " "), _length(report[name]))
    lines += [
        "",
        f"PCRs ({report['digest']})",
        *_pcr_lines(report["pcrs"]),
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
    description: Description, pcrs: Mapping[int, Pcr], transport: str, *, in_base64: bool = False
) -> Object:
    """A module and its PCRs."""
    return {
        "module_id": description.module_id,
        "version": ".".join(map(str, description.version)),
        "digest": description.digest,
        "max_pcrs": description.max_pcrs,
        "transport": transport,
        "debug_mode": not any(pcrs[0].value) if 0 in pcrs else True,
        "pcr_encoding": "base64" if in_base64 else "hex",
        "pcrs": {
            str(index): {"value": _encode(pcr.value, in_base64), "locked": pcr.locked}
            for index, pcr in sorted(pcrs.items())
        },
    }


def description_text(report: Object) -> str:
    """The report on a module."""
    locked = [index for index, pcr in report["pcrs"].items() if pcr["locked"]]
    values = {index: pcr["value"] for index, pcr in report["pcrs"].items()}
    lines = [
        *_field("module", report["module_id"]),
        *_field("version", report["version"]),
        *_field("transport", report["transport"]),
        *_field("debug mode", _debug(report["debug_mode"])),
        *_field("locked PCRs", ", ".join(locked) or "none"),
        "",
        f"PCRs ({report['digest']})",
        *_pcr_lines(values),
    ]
    return "\n".join(lines)


def _debug(debug_mode: bool) -> str:
    return "YES: PCR0 is all zeros, as in every enclave in debug mode" if debug_mode else "no"


def _pcr_lines(pcrs: Mapping[str, str]) -> Iterable[str]:
    """Each PCR with its meaning; those that are zero and mean nothing are left out."""
    hidden = []
    for index, value in pcrs.items():
        zero = not value.strip("0") or not value.strip("A")
        what = meaning(int(index))
        if zero and what not in _MEANINGS.values():
            hidden.append(index)
            continue
        yield f"  PCR{index:3} {what}"
        yield from wrapped(
            "all zeros" if zero else value,
            " " * 9,
            WIDTH if len(value) <= 64 else 9 + len(value) // 2,
        )
    if hidden:
        yield from wrapped(f"all zeros: {', '.join(hidden)}", "  ")


# ---- policies


def findings_object(findings: Sequence[Finding]) -> Object:
    """What `policy check` found."""
    return {
        "findings": [
            {
                "statement": found.statement,
                "code": found.code,
                "problem": found.problem,
                "fix": found.fix,
            }
            for found in findings
        ]
    }


def findings_text(report: Object) -> str:
    """Two lines or more for each finding."""
    lines = []
    for found in report["findings"]:
        lines += wrapped(
            f"{found['statement']}: {found['problem']} [{found['code']}]", "", hanging="    "
        )
        lines += wrapped(f"fix: {found['fix']}", "    ")
    return "\n".join(lines)


def evaluation_object(
    found: Evaluation, request: Request, verified: VerifiedDocument | None, *, now: datetime
) -> Object:
    """A decision, and every statement's and condition's part in it; null is what cannot be told."""
    return {
        "decision": found.decision.value,
        "reason": found.reason,
        "principal": request.principal,
        "action": request.action,
        "resource": request.resource,
        "context": dict(request.context),
        "document": _brief(verified, now) if verified else None,
        "statements": [_statement_object(part) for part in found.statements],
        "undetermined": list(found.undetermined),
        "not_evaluated": list(NOT_EVALUATED),
    }


def _brief(verified: VerifiedDocument, now: datetime) -> Object:
    document = verified.document
    return {
        "module_id": document.module_id,
        "signed_at": _utc(document.signed_at),
        "age_seconds": round((now - document.signed_at).total_seconds()),
        "debug_mode": document.debug_mode,
    }


def _statement_object(found: StatementFinding) -> Object:
    return {
        "statement": found.statement.number,
        "sid": found.statement.sid,
        "effect": found.statement.effect,
        "applies": found.applies,
        "delegates": found.delegates,
        "reasons": list(found.reasons),
        "conditions": [
            {
                "operator": part.condition.operator,
                "key": part.condition.key,
                "held": part.held,
                "request": list(part.actual),
                "policy": list(part.condition.values),
                "note": part.note,
            }
            for part in found.conditions
        ],
    }


def evaluation_text(report: Object) -> str:
    """The decision, then statement by statement which condition held, with both values."""
    document = report["document"]
    said = "none: a call without attestation"
    if document:
        said = (
            f"{document['module_id']}, signed {document['signed_at']}, "
            f"{age(document['age_seconds'])}"
        )
    lines = [
        *_field("decision", f"{report['decision']}: {report['reason']}"),
        *(line for question in report["undetermined"][1:] for line in _field("", question)),
        *_field("principal", report["principal"]),
        *_field("action", report["action"]),
        *_field("key", report["resource"]),
        *_field("document", said),
    ]
    if document:
        lines += _field("debug mode", _debug(document["debug_mode"]))
    for statement in report["statements"]:
        lines += ["", *_statement_lines(statement)]
    return "\n".join([*lines, "", *_field("not evaluated", ", ".join(report["not_evaluated"]))])


_APPLIES: Final = {True: "applies", False: "does not apply", None: "cannot be told"}
_HELD: Final = {True: "holds", False: "does not hold", None: "cannot be told"}


def _statement_lines(statement: Object) -> Iterable[str]:
    sid = f" ({statement['sid']})" if statement["sid"] else ""
    left = (
        ", which leaves it to identity policies"
        if statement["applies"] and statement["delegates"]
        else ""
    )
    head = (
        f"statement {statement['statement']}{sid}, {statement['effect']}: "
        f"{_APPLIES[statement['applies']]}{left}"
    )
    yield from wrapped(head, "", hanging="    ")
    for reason in statement["reasons"]:
        if not any(
            part["key"] in reason for part in statement["conditions"]
        ):  # those follow in full
            yield from wrapped(reason, "  ", hanging="      ")
    for part in statement["conditions"]:
        note = f": {part['note']}" if part["note"] else ""
        yield from wrapped(
            f"{part['operator']} {part['key']} {_HELD[part['held']]}{note}", "  ", hanging="      "
        )
        for label in ("request", "policy"):
            for value in part[label] or ["absent"]:
                yield from wrapped(value, f"    {label:9} ", hanging=" " * 14)


# ---- texts


def age(seconds: int) -> str:
    """A distance in time, as "12 s ago"."""
    past = abs(seconds)
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if past >= 2 * size:
            return f"{past // size} {unit} {'ago' if seconds >= 0 else 'ahead of this clock'}"
    return f"{past} s {'ago' if seconds >= 0 else 'ahead of this clock'}"


def _field(label: str, value: str) -> list[str]:
    return wrapped(value, f"{label:{_LABEL}}", hanging=" " * _LABEL)


def wrapped(text: str, indent: str, width: int = WIDTH, *, hanging: str | None = None) -> list[str]:
    """Lines of at most WIDTH columns; a value without spaces is cut where it must be."""
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return textwrap.wrap(
        shown,
        width,
        initial_indent=indent,
        subsequent_indent=indent if hanging is None else hanging,
        break_on_hyphens=False,
    ) or [indent.rstrip()]


def _length(value: str | None) -> str:
    if value is None:
        return "absent"
    return f"{len(value) // 2} bytes: {value}" if value else "empty"


def _utc(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _hex(value: bytes | None) -> str | None:
    return None if value is None else value.hex()


def _encode(value: bytes, in_base64: bool) -> str:
    return base64.b64encode(value).decode() if in_base64 else value.hex()
