"""`attestor doctor`: why would an attested call fail here?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from attestor import KMS_OPTIONS, MODULE_OPTIONS, VSOCK_OPTIONS, options
from attestor_commands.inputs import JSON_OPTION, ROOT_OPTION, evidence_errors, trusted_roots
from attestor_commands.report import print_report, wrapped
from attestor_io.ciphertext import ALGORITHMS, check_algorithm
from attestor_io.text_options import complete_from

if TYPE_CHECKING:
    from collections.abc import Mapping

    from attestor_commands.doctor_checks import Result

_COLUMN: Final = 24  # where a reason begins


@click.command()
@click.argument("ciphertext", required=False)
@options(KMS_OPTIONS, without={"any_key"})
@click.option(
    "--algorithm",
    metavar="NAME",
    shell_complete=complete_from(ALGORITHMS),
    help="of CIPHERTEXT, as for decrypt",
)
@click.option("--base64", "base64_text", is_flag=True, help="CIPHERTEXT is base64 text")
@click.option("--context-contains", is_flag=True, help="a message's context may hold more names")
@options(VSOCK_OPTIONS)
@ROOT_OPTION
@JSON_OPTION
@options(MODULE_OPTIONS)
def doctor(
    as_json: bool,
    root: str | None,
    key_id: str | None,
    encryption_context: dict[str, str],
    grant_tokens: tuple[str, ...],
    context_contains: bool,
    ciphertext: str | None,
    base64_text: bool,
    algorithm: str | None,
    **connection: Any,
) -> int:
    """Find out why an attested call fails here.

    \b
    Examples:
      attestor doctor --key-id arn:aws:kms:eu-west-1:111122223333:key/...
      attestor doctor --context node=3 secret.enc

    Goes the way of decrypt with the same options, up to KMS's decision: region, module,
    credentials, attestation document, the way to KMS, and a Decrypt as a dry run, of CIPHERTEXT or
    else of any ciphertext under --key-id. Goes on after a failure where it can. Exit status: that
    of decrypt.
    """
    from attestor import Binding
    from attestor_commands.doctor_checks import Case, examine, status_of

    check_algorithm(algorithm, "--algorithm", key_id, has_context=bool(encryption_context))
    with evidence_errors():
        (trusted,) = trusted_roots(root)
    results = examine(
        Case(
            bound=Binding(key_id, encryption_context, grant_tokens, context_contains),
            connection=connection,
            ciphertext=ciphertext,
            base64_text=base64_text,
            algorithm=algorithm,
            root=trusted,
        )
    )
    status = status_of(results)
    print_report(results_object(results, status), results_text, as_json=as_json)
    return status


def results_object(results: list[Result], status: int) -> dict[str, Any]:
    """The results as `--json` prints them."""
    checks = [
        {
            "check": result.check,
            "outcome": result.outcome,
            "reason": result.reason,
            "fix": result.fix,
        }
        for result in results
    ]
    return {"checks": checks, "status": status}


def results_text(results: Mapping[str, Any]) -> str:
    """The results as a report of at most WIDTH columns."""
    lines = []
    for result in results["checks"]:
        label = f"{result['outcome']:8} {result['check']:{_COLUMN - 9}}"
        lines += wrapped(result["reason"], label, hanging=" " * _COLUMN)
        lines += wrapped(f"fix: {result['fix']}", " " * _COLUMN) if result["fix"] else []
    return "\n".join(lines)
