"""To whom a statement opens an action, with which documents, after every Deny is weighed.

The evaluation is that of `evaluate`, over requests of which only the document, the action and the
principal are known: whoever attacks chooses the rest. So an Allow opens what it may allow, and a
Deny closes what it denies for sure.
"""

from __future__ import annotations

import contextlib
import functools
import re
from typing import TYPE_CHECKING, Final, NamedTuple

from keypolicy.callers import CALLER_KEYS, Caller, Principals
from keypolicy.documents import documents, kinds_of_document
from keypolicy.evaluate import KnownValues, judge_condition
from keypolicy.keys import is_about_document, is_about_enclave
from keypolicy.model import KEY_POLICY_MAX, Condition, Policy, PolicyError, Statement
from keypolicy.operators import Operator, compare, conjunction, covers_action, covers_resource

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from keypolicy.documents import Document

# Keys, beside aws:PrincipalArn, that say who of an account calls.
_IDENTITY: Final = re.compile(r"aws:(?:userid|username|principaltag/.+)")


class _Judged(NamedTuple):
    """The conditions of a statement under a document.

    `held` leaves out those that depend on who calls, which are in `of_caller`.
    """

    held: bool | None
    of_caller: tuple[Condition, ...]


_NEVER: Final = _Judged(False, ())


class Openings:
    """Finds what a policy opens; it remembers what it has judged, so that many questions are cheap.

    Where `is_weighed`, which is so of a policy that KMS can keep, Denys that depend on who calls
    are weighed; in a larger one they count as not certain: their product with all callers has no
    other bound.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.documents = documents(policy)
        self.is_weighed = policy.size <= KEY_POLICY_MAX
        self._partition = _partition(policy)
        self._resource = _only_resource(policy)
        self._arns = {part.number: named_arns(part) for part in policy.statements}
        self._principals = {part.number: Principals(part) for part in policy.statements}
        self._callers: dict[int, tuple[Caller, ...]] = {}
        self._judged: dict[tuple[int, str], _Judged] = {}
        self._denies: dict[tuple[str, str], dict[tuple[str, str], list[Statement]]] = {}
        self._of_caller: dict[tuple[int, Caller], bool | None] = {}
        self._denied: dict[tuple[str, str, Caller], bool] = {}

    def rests_on_document(self, statement: Statement, other: Document | None = None) -> bool:
        """Tell whether a statement never applies without an attestation document, or with `other`.

        Its other conditions do not matter: they may fail for reasons of their own.
        """
        values = (other or self.documents.none).values
        return any(
            is_about_document(condition.key) and judge_condition(condition, values).held is False
            for condition in statement.conditions
        )

    def callers(self, statement: Statement) -> tuple[Caller, ...]:
        """Return whom an Allow lets call: each one that it names, in Principal or, where that is
        everyone or an account, by aws:PrincipalArn; else anybody.
        """
        known = self._callers.get(statement.number)
        if known is None:
            known = self._callers[statement.number] = tuple(self._find_callers(statement))
        return known

    def _find_callers(self, statement: Statement) -> Iterator[Caller]:
        if statement.not_principal:
            yield Caller()
            return
        arns = self._arns[statement.number]
        exact = bool(arns) and not self.names_pattern(statement)
        for kind, name in statement.principals:
            caller = Caller.of_principal(kind, name, self._partition)
            if caller is not None and (caller.known or caller.service or not exact):
                yield caller
            elif caller is not None:
                yield from (one for one in _of_arns(arns) if caller.account in ("", one.account))

    def named(self, statement: Statement) -> Iterator[Caller]:
        """Yield the callers that an Allow names; one by a pattern has that in its ARN's place."""
        yield from (caller for caller in self.callers(statement) if caller.known)
        yield from _of_arns(arn for arn in self._arns[statement.number] if _is_pattern(arn))

    def names_pattern(self, statement: Statement) -> bool:
        """Tell whether a statement names callers by a pattern of aws:PrincipalArn."""
        return any(map(_is_pattern, self._arns[statement.number]))

    def opened_to(self, statement: Statement, action: str, *brought: Document) -> Iterator[Caller]:
        """Yield to whom a statement opens an action with any of these documents."""
        if statement.effect == "Allow" and covers_action(statement, action):
            for caller in self.callers(statement):
                if any(self._opens(statement, action, document, caller) for document in brought):
                    yield caller

    def opens(self, statement: Statement, action: str, *brought: Document) -> bool:
        """Tell whether a statement opens an action to anybody with any of these documents."""
        return any(True for _ in self.opened_to(statement, action, *brought))

    def may_call(
        self, statement: Statement, action: str, document: Document, caller: Caller
    ) -> bool:
        """Tell whether a statement itself opens an action that it covers to a known caller.

        One that leaves it to an account does so if it names the caller by aws:PrincipalArn.
        """
        about, delegates = self._principals[statement.number].judge(caller)
        return (
            about is not False
            and (not delegates or bool(self._arns[statement.number]))
            and self._opens(statement, action, document, caller)
        )

    def opens_without(self, statement: Statement, action: str, caller: Caller) -> bool:
        """Tell whether a statement opens an action to one of its callers without a document."""
        return self._opens(statement, action, self.documents.none, caller)

    def may_ever_open(self, statement: Statement, action: str) -> bool:
        """Tell whether any call at all may pass an Allow that covers an action, and every Deny.

        Where it is for several callers, Denys of some of them do not count.
        """
        callers = self.callers(statement)
        caller = callers[0] if len(callers) == 1 else Caller()
        return any(
            all(
                any(self._opens(statement, action, document, caller) for document in alternatives)
                for alternatives in kind
            )
            for kind in self._kinds
        )

    @functools.cached_property
    def _kinds(self) -> tuple[tuple[tuple[Document, ...], ...], ...]:
        return kinds_of_document(self.policy)

    @functools.cached_property
    def is_for_nitrotpm(self) -> bool:
        """Whether conditions are about NitroTPMs, be they misspelt, and none about an enclave."""
        conditions = [found for part in self.policy.statements for found in part.conditions]
        keys = [condition.key.lower() for condition in conditions]
        return any("nitrotpm" in key for key in keys) and not any(map(is_about_enclave, keys))

    def names(self, statement: Statement) -> Iterator[tuple[str, str]]:
        """Yield the keys of an index by which Caller.names finds whom a statement may be about."""
        return self._principals[statement.number].names()

    def denies_everyone(
        self, deny: Statement, action: str, document: Document | None = None
    ) -> bool:
        """Tell whether a Deny surely keeps everyone, or an account, from an action with a document,
        or without one.
        """
        judged = self._judge(deny, document or self.documents.none)
        return (
            covers_action(deny, action)
            and judged.held is True
            and not judged.of_caller
            and any(
                not caller.known and not caller.service and self._about(deny, caller)
                for caller in self.callers(deny)
            )
        )

    def _opens(self, allow: Statement, action: str, document: Document, caller: Caller) -> bool:
        """Tell whether an Allow that covers an action may apply, and no Deny surely does."""
        judged = self._judge(allow, document)
        if judged.held is False or self._held_by(allow, judged, caller) is False:
            return False
        question = (action, document.name, caller)
        if question not in self._denied:
            self._denied[question] = any(
                self._about(deny, caller)
                and self._held_by(deny, self._judge(deny, document), caller)
                for deny in self._denies_about(action, document, caller)
            )
        return not self._denied[question]

    def _about(self, statement: Statement, caller: Caller) -> bool:
        """Tell whether a statement's principals surely include a caller."""
        return self._principals[statement.number].judge(caller)[0] is True

    def _denies_about(self, action: str, document: Document, caller: Caller) -> Iterator[Statement]:
        """Yield the Denys of an action that may be about a caller, from an index of principals."""
        index = self._denies.get((action, document.name))
        if index is None:
            index = self._denies[action, document.name] = {}
            for deny in self.policy.statements:
                if self._may_close(deny, action, document):
                    for name in self._principals[deny.number].names():
                        index.setdefault(name, []).append(deny)
        for name in caller.names():
            yield from index.get(name, ())

    def _may_close(self, deny: Statement, action: str, document: Document) -> bool:
        """Tell whether a Deny surely applies to an action, for some caller."""
        if deny.effect != "Deny" or not covers_action(deny, action) or not self._of_key(deny):
            return False
        judged = self._judge(deny, document)
        depends = bool(judged.of_caller) or deny.not_principal
        return judged.held is True and (self.is_weighed or not depends)

    def _of_key(self, deny: Statement) -> bool:
        """Tell whether a Deny is surely about the key; in a key policy, "*" is the key itself."""
        if self._resource and not _is_pattern(self._resource):
            return covers_resource(deny, self._resource)
        return not deny.not_resource and (
            self._resource in deny.resources
            or all(covers_resource(deny, key) for key in _any_keys(self._partition))
        )

    def _judge(self, statement: Statement, document: Document) -> _Judged:
        """Judge the conditions of a statement, for all callers at once."""
        known = self._judged.get((statement.number, document.name))
        if known is None:
            known = self._judged[statement.number, document.name] = _judge(statement, document)
        return known

    def _held_by(self, statement: Statement, judged: _Judged, caller: Caller) -> bool | None:
        """Judge the conditions that depend on who calls; no document changes how they hold."""
        if not judged.of_caller:
            return judged.held
        question = (statement.number, caller)
        if question not in self._of_caller:
            own = KnownValues(caller.condition_values(), lambda _: False, caller.session)
            held = (judge_condition(condition, own).held for condition in judged.of_caller)
            self._of_caller[question] = conjunction(held)
        return conjunction((judged.held, self._of_caller[question]))


def _judge(statement: Statement, document: Document) -> _Judged:
    """Judge the conditions of a statement, but for those that depend on who calls."""
    held, of_caller = [], []
    for condition in statement.conditions:
        if condition.key.lower() in CALLER_KEYS:
            of_caller.append(condition)
        else:
            held.append(judge_condition(condition, document.values).held)
            if held[-1] is False:
                return _NEVER
    return _Judged(conjunction(held), tuple(of_caller))


def _partition(policy: Policy) -> str:
    """Return the partition of the first ARN among the principals."""
    arns = (name for part in policy.statements for _, name in part.principals)
    return next((arn.split(":")[1] for arn in arns if arn.startswith("arn:")), "aws")


def _only_resource(policy: Policy) -> str | None:
    """Return the Resource, an ARN or a pattern, that every Allow is about, if there is one alone.

    A Deny of another key denies nothing, but then nor does such an Allow allow anything.
    """
    allows = [part for part in policy.statements if part.effect == "Allow"]
    named = {name for part in allows for name in part.resources}
    return (
        named.pop() if len(named) == 1 and not any(part.not_resource for part in allows) else None
    )


def _any_keys(partition: str) -> Iterator[str]:
    """Yield what only a pattern that fits the ARN of every key of a partition fits.

    A policy does not name these letters. Of an ARN, the lengths of the account and of the key's id
    are fixed, that of the region is not.
    """
    account, key_id = "\0" * 12, "\0" * 36
    for region in ("\0" * 9, "\0" * 14):
        yield f"arn:{partition}:kms:{region}:{account}:key/{key_id}"


# ---- conditions on who calls


def limits(condition: Condition) -> bool:
    """Tell whether a condition keeps out whoever has no value, or another one, of its key."""
    return compare(condition, ())[0] is False and not Operator.parse(condition.operator).negated


def names_somebody(statement: Statement) -> bool:
    """Tell whether the conditions of a statement say who of an account may call."""
    return bool(named_arns(statement) or named_otherwise(statement))


def named_otherwise(statement: Statement) -> frozenset[tuple[str, str]]:
    """Return the tags, ids and names of users, as pairs of condition key and value, that a
    statement is about; of a session's id that of the role. Whose they are is not known.
    """
    named = [
        (condition.key.lower(), condition.values)
        for condition in statement.conditions
        if _IDENTITY.fullmatch(condition.key.lower()) and limits(condition)
    ]
    return frozenset(
        (key, value.partition(":")[0] if key == "aws:userid" else value)
        for key, values in named
        if not any(_is_pattern(value[:1]) for value in values)
        for value in values
    )


def named_arns(statement: Statement) -> tuple[str, ...]:
    """Return the ARNs and patterns of aws:PrincipalArn that a statement is about; none if one of
    them is of all roles or users of an account, or of several accounts.
    """
    for condition in statement.conditions:
        if condition.key.lower() == "aws:principalarn" and limits(condition):
            arn = r"arn:[^:*?]+:(?:iam|sts)::\d{12}:(?:root|[a-z-]+/[^*?].*)"
            if all(re.fullmatch(arn, value) and "${" not in value for value in condition.values):
                return condition.values
    return ()


def _of_arns(arns: Iterable[str]) -> Iterator[Caller]:
    """Yield those of these ARNs, or patterns, that are a caller's."""
    for arn in arns:
        with contextlib.suppress(PolicyError):
            yield Caller.from_arn(arn)


def _is_pattern(arn: str) -> bool:
    return bool(re.search(r"[*?]", arn))
