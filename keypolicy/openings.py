"""To whom a statement opens an action, with which documents, after every Deny is weighed.

The evaluation is that of `evaluate`, over requests of which only the document, the action and the
principal are known: whoever attacks chooses the rest. So an Allow opens what it may allow, and a
Deny closes what it denies for sure.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Final, NamedTuple

from keypolicy.callers import CALLER_KEYS, Caller, Principals
from keypolicy.evaluate import KnownValues, judge_condition, values_of_nitrotpm, values_of_pcrs
from keypolicy.keys import is_about_document, is_about_enclave, is_about_nitrotpm
from keypolicy.measure import PCR_BYTES
from keypolicy.model import KEY_POLICY_MAX, Condition, Policy, Statement
from keypolicy.nitrotpm import SECURE_BOOT_OFF
from keypolicy.operators import conjunction, covers_action, covers_resource

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


_ANY_CALL: Final = {"aws:securetransport": ("true",)}  # KMS answers over TLS alone


class Document(NamedTuple):
    """An attestation document, or none, that a caller may bring; PCRs that it lacks are absent,
    those that `values` does not tell are the attacker's to choose.
    """

    name: str
    values: KnownValues


class Documents(NamedTuple):
    """The documents by which openings are found."""

    none: Document
    foreign: tuple[Document, ...]
    debug: Document
    foreign_machines: tuple[Document, ...]
    any_enclave: Document
    any_nitrotpm: Document


def documents(policy: Policy) -> Documents:
    """Make the documents that tell a policy which pins an image from others.

    A foreign image has another PCR0 and PCR8 than any that the policy names, but may keep PCR1
    (the genuine kernel around another application) or PCR2 (another kernel around the genuine
    application), so there are two. PCR3 and PCR4 are the parent's, which is no other one; the
    further PCRs are the program's to extend. Debug mode zeroes PCR0, 1, 2 and 8.

    Of a NitroTPM, a foreign machine image has another PCR4, or keeps that and has another PCR12, a
    command line; PCR7 is another one, as of other keys, or that of no Secure Boot. The further PCRs
    are what its firmware, boot loader and programs make of them.
    """
    text = repr([statement.conditions for statement in policy.statements])
    # no value of a policy is the digest of all its values
    other = hashlib.sha384(text.encode(errors="replace")).digest()

    def enclave(name: str, value: bytes, *indexes: int) -> Document:
        values = values_of_pcrs(dict.fromkeys(indexes, value))
        return Document(name, KnownValues(_ANY_CALL | values, is_about_nitrotpm))

    def machine(name: str, pcrs: Mapping[int, bytes]) -> Document:
        return Document(name, KnownValues(_ANY_CALL | values_of_nitrotpm(pcrs), is_about_enclave))

    return Documents(
        none=Document("none", KnownValues(_ANY_CALL, is_about_document)),
        foreign=(enclave("application", other, 0, 2, 8), enclave("kernel", other, 0, 1, 8)),
        debug=enclave("debug", bytes(PCR_BYTES), 0, 1, 2, 8),
        foreign_machines=(
            machine("machine image", {4: other, 7: other}),
            machine("command line", {7: other, 12: other}),
            machine("no Secure Boot", {4: other, 7: bytes.fromhex(SECURE_BOOT_OFF)}),
        ),
        any_enclave=Document("enclave", KnownValues(_ANY_CALL, is_about_nitrotpm)),
        any_nitrotpm=Document("NitroTPM", KnownValues(_ANY_CALL, is_about_enclave)),
    )


class _Judged(NamedTuple):
    """The conditions of a statement under a document.

    `held` leaves out those that depend on who calls, which are in `of_caller`.
    """

    held: bool | None
    of_caller: tuple[Condition, ...]


_NEVER: Final = _Judged(False, ())


class Openings:
    """Finds what a policy opens; it remembers what it has judged, so that many questions are cheap.

    Denies that depend on who calls are weighed in a policy that KMS can keep, and count as not
    certain in a larger one: their product with all callers has no other bound.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.documents = documents(policy)
        self._weigh_callers = policy.size <= KEY_POLICY_MAX
        self._partition = _partition(policy)
        self._key = _only_key(policy)
        self._principals = {part.number: Principals(part) for part in policy.statements}
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

    def callers(self, statement: Statement) -> Iterator[Caller]:
        """Yield whom an Allow lets call: each one that it names, or anybody."""
        if statement.not_principal:
            yield Caller()
            return
        for kind, name in statement.principals:
            caller = Caller.of_principal(kind, name, self._partition)
            if caller is not None:
                yield caller

    def opened_to(self, statement: Statement, action: str, *brought: Document) -> Iterator[Caller]:
        """Yield to whom a statement opens an action with any of these documents."""
        if statement.effect == "Allow" and covers_action(statement, action):
            for caller in self.callers(statement):
                if any(self._opens(statement, action, document, caller) for document in brought):
                    yield caller

    def opens(self, statement: Statement, action: str, *brought: Document) -> bool:
        """Tell whether a statement opens an action to anybody with any of these documents."""
        return any(True for _ in self.opened_to(statement, action, *brought))

    def opens_to(self, statement: Statement, action: str, caller: Caller) -> bool:
        """Tell whether a statement itself opens an action, without a document, to a caller."""
        about, delegates = self._principals[statement.number].judge(caller)
        return (
            about is not False
            and not delegates
            and covers_action(statement, action)
            and self._opens(statement, action, self.documents.none, caller)
        )

    def opens_without(self, statement: Statement, action: str, caller: Caller) -> bool:
        """Tell whether a statement opens an action to one of its callers without a document."""
        return self._opens(statement, action, self.documents.none, caller)

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
        return judged.held is True and (self._weigh_callers or not depends)

    def _of_key(self, deny: Statement) -> bool:
        """Tell whether a Deny is surely about the key; in a key policy, "*" is the key itself."""
        if not deny.not_resource and "*" in deny.resources:
            return True
        return self._key is not None and covers_resource(deny, self._key)

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


def _only_key(policy: Policy) -> str | None:
    """Return the ARN of the key where every Allow is about that ARN alone.

    A Deny of another key's ARN denies nothing, but then nor does such an Allow allow anything.
    """
    allows = [part for part in policy.statements if part.effect == "Allow"]
    named = {name for part in allows for name in part.resources}
    key = named.pop() if len(named) == 1 and not any(part.not_resource for part in allows) else "*"
    return None if re.search(r"[*?]", key) else key
