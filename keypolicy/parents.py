"""Who may call with a document: the parent instance's role, which is trusted with nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from keypolicy.findings import RECIPIENT_ACTIONS, REWRITING, Problem
from keypolicy.openings import named_otherwise
from keypolicy.operators import covers_action

if TYPE_CHECKING:
    from collections.abc import Iterator

    from keypolicy.callers import Caller
    from keypolicy.model import Statement
    from keypolicy.openings import Openings

# What lets an untrusted caller write ciphertexts that the enclave then takes for ours.
_WRITING: Final = (
    "kms:Encrypt",
    "kms:ReEncryptTo",
    "kms:GenerateDataKey",
    "kms:GenerateDataKeyPair",
)


class Parents:
    """Who may call with a document, which is an enclave's parent instance, or an instance with a
    NitroTPM: it is not trusted with more.

    They are whom the Allows name that rest on a document, and those that a Deny makes rest on one,
    in Principal or by aws:PrincipalArn; by a pattern of that, also whom another Allow names and it
    fits. Of those that a Deny makes, one that may also rewrite the policy is an administrator's,
    unless it is all that there is.
    """

    def __init__(self, openings: Openings) -> None:
        self._openings = openings
        known = openings.documents
        self._of_enclaves: set[Caller] = set()
        self._named_otherwise: set[tuple[str, str]] = set()
        resting: set[Caller] = set()
        guarded: set[Caller] = set()
        wide: set[Caller] = set()
        allows = [part for part in openings.policy.statements if part.effect == "Allow"]
        everybody = {caller for allow in allows for caller in openings.named(allow)}
        for statement in allows:
            # in a larger policy than KMS can keep, their product would have no bound
            fitting = everybody if openings.is_weighed and openings.names_pattern(statement) else ()
            callers = {*openings.named(statement), *fitting}
            covered = [action for action in RECIPIENT_ACTIONS if covers_action(statement, action)]
            with_enclave, with_nitrotpm = (
                {
                    caller
                    for action in covered
                    for caller in callers
                    if openings.may_call(statement, action, document, caller)
                    and not openings.may_call(statement, action, known.none, caller)
                }
                for document in (known.any_enclave, known.any_nitrotpm)
            )
            self._of_enclaves |= with_enclave
            found = with_enclave | with_nitrotpm
            if openings.rests_on_document(statement):
                resting |= found
                self._named_otherwise |= named_otherwise(statement)
            elif covers_action(statement, REWRITING):
                wide |= found
            else:
                guarded |= found
        self._callers = resting | guarded or wide
        self._by_name: dict[tuple[str, str], list[Caller]] = {}
        for caller in self._callers:
            for name in caller.names():
                self._by_name.setdefault(name, []).append(caller)

    def check(self, statement: Statement, *, warn: bool) -> Iterator[Problem]:
        """Find what an Allow lets a parent do that only trusted roles should do."""
        rewriter = self._who_may(statement, (REWRITING,))
        whom = f"{rewriter.arn}, {self._whose(rewriter)}" if rewriter else ""
        shared = min(self._named_otherwise & named_otherwise(statement), default=None)
        if shared and self._openings.opens(statement, REWRITING, self._openings.documents.none):
            whom = whom or f"{' '.join(shared)}, an attested instance's"
        if whom:
            problem = (
                f"allows {REWRITING} to {whom}, which is not trusted: it can rewrite this policy"
            )
            yield Problem("parent_administers", problem, "allow it to another role")
        writer = self._who_may(statement, _WRITING) if warn else None
        if writer:
            actions = ", ".join(
                action
                for action in _WRITING
                if covers_action(statement, action) and self._opens_to(statement, action, writer)
            )
            problem = (
                f"allows {actions} to {writer.arn}, {self._whose(writer)}, which is not trusted: "
                "it can put another secret in the place of one"
            )
            yield Problem("parent_encrypts", problem, "allow it to another role", warning=True)

    def _whose(self, caller: Caller) -> str:
        return f"the {'parent' if caller in self._of_enclaves else 'attested'} instance's"

    def _opens_to(self, statement: Statement, action: str, caller: Caller) -> bool:
        """Tell whether an Allow opens an action that it covers without a document."""
        return self._openings.may_call(statement, action, self._openings.documents.none, caller)

    def _who_may(self, statement: Statement, actions: tuple[str, ...]) -> Caller | None:
        """Return a parent to whom an Allow opens one of these actions without a document."""
        covered = [action for action in actions if covers_action(statement, action)]
        return next(
            (
                caller
                for action in covered
                for name in self._openings.names(statement)
                for caller in self._by_name.get(name, ())
                if self._opens_to(statement, action, caller)
            ),
            None,
        )
