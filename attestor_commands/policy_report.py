"""What findings about a key policy, or its decision about a call, say, for people and programs.

Each `..._object` gives what `--json` prints; each `..._text` makes a report from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attestor_commands.evidence_report import debug_mode_of, debug_text
from attestor_commands.report import Object, age, field, utc, wrapped
from keypolicy import NOT_EVALUATED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from keypolicy import Evaluation, Finding, Request, StatementFinding
    from nsm.document import VerifiedDocument


def findings_object(findings: Sequence[Finding], file: str | None = None) -> Object:
    """What `policy check` found, with the name of the file where there are several."""
    return ({"file": file} if file is not None else {}) | {
        "findings": [
            {
                "statement": found.statement,
                "code": found.code,
                "severity": "warning" if found.warning else "error",
                "problem": found.problem,
                "fix": found.fix,
            }
            for found in findings
        ]
    }


def findings_text(report: Object) -> str:
    """Two lines or more for each finding."""
    lines = []
    where = f"{report['file']}: " if "file" in report else ""
    for found in report["findings"]:
        warning = "warning: " if found["severity"] == "warning" else ""
        text = f"{where}{found['statement']}: {warning}{found['problem']} [{found['code']}]"
        lines += wrapped(text, "", hanging="    ")
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
        "pcrs": _in_hex(request.pcrs),
        "nitrotpm_pcrs": _in_hex(request.nitrotpm_pcrs),
        "statements": [_statement_object(part) for part in found.statements],
        "undetermined": list(found.undetermined),
        "not_evaluated": list(NOT_EVALUATED),
    }


def _in_hex(pcrs: Mapping[int, bytes] | None) -> Object:
    return {str(index): value.hex() for index, value in sorted((pcrs or {}).items())}


def _brief(verified: VerifiedDocument, now: datetime) -> Object:
    document = verified.document
    return {
        "module_id": document.module_id,
        "signed_at": utc(document.signed_at),
        "age_seconds": round((now - document.signed_at).total_seconds()),
        "source": document.source,
        "debug_mode": debug_mode_of(document),
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
    names = [f"PCR{index}" for index in report["pcrs"]]
    names += [f"NitroTPM PCR{index}" for index in report["nitrotpm_pcrs"]]
    if names:
        given = ", ".join(names)
        said = f"one with {given} as given, whose other PCRs are not known"
    if document:
        said = (
            f"{document['module_id']}, signed {document['signed_at']}, "
            f"{age(document['age_seconds'])}"
        )
    lines = [
        *field("decision", f"{report['decision']}: {report['reason']}"),
        *(line for question in report["undetermined"][1:] for line in field("", question)),
        *field("principal", report["principal"]),
        *field("action", report["action"]),
        *field("key", report["resource"]),
        *field("document", said),
    ]
    if document and document["debug_mode"] is not None:
        lines += field("debug mode", debug_text(document["debug_mode"]))
    for statement in report["statements"]:
        lines += ["", *_statement_lines(statement)]
    return "\n".join([*lines, "", *field("not evaluated", ", ".join(report["not_evaluated"]))])


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
