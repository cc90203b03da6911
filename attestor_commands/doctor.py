"""`attestor doctor`: why would an attested call fail here?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from attestor import KMS_OPTIONS, MODULE_OPTIONS, VSOCK_OPTIONS, options
from attestor_commands.inputs import JSON_OPTION, ROOT_OPTION, evidence_errors, trusted_roots
from attestor_commands.report import print_report, wrapped

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from attestor_commands.doctor_checks import Result

_COLUMN: Final = 24  # where a reason begins


@click.command()
@options(KMS_OPTIONS, without={"any_key"})
@options(VSOCK_OPTIONS)
@ROOT_OPTION
@JSON_OPTION
@options(MODULE_OPTIONS)
def doctor(
    as_json: bool, root: str | None, encryption_context: dict[str, str], **connection: Any
) -> int:
    """Find out why an attested call fails here.

    \b
    Example:
      attestor doctor --key-id arn:aws:kms:eu-west-1:111122223333:key/...

    Checks the module, its document, credentials, and the way to KMS; with --key-id also a Decrypt
    as a dry run, which needs no ciphertext. Exit status: that of the first check that failed, as
    decrypt would end.
    """
    from attestor_commands.doctor_checks import Case, examine

    with evidence_errors():
        (trusted,) = trusted_roots(root)
    results = examine(Case(root=trusted, context=encryption_context, **connection))
    print_report(results_object(results), results_text, as_json=as_json)
    return status_of(results)


def status_of(results: Iterable[Result]) -> int:
    """The exit status: that of the first failure."""
    return next((result.status for result in results if result.outcome == "failed"), 0)


def results_object(results: Iterable[Result]) -> dict[str, Any]:
    """The results as `--json` prints them."""
    results = list(results)
    checks = [
        {
            "check": result.check,
            "outcome": result.outcome,
            "reason": result.reason,
            "fix": result.fix,
        }
        for result in results
    ]
    return {"checks": checks, "status": status_of(results)}


def results_text(results: Mapping[str, Any]) -> str:
    """The results as a report of at most WIDTH columns."""
    lines = []
    for result in results["checks"]:
        label = f"{result['outcome']:8} {result['check']:{_COLUMN - 9}}"
        lines += wrapped(result["reason"], label, hanging=" " * _COLUMN)
        lines += wrapped(f"fix: {result['fix']}", " " * _COLUMN) if result["fix"] else []
    return "\n".join(lines)
