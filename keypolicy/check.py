"""What makes a key policy for attested enclaves open, or useless, and how to mend it.

The rules follow from how KMS and IAM evaluate ("Condition keys for AWS KMS" and "Key policies" of
the KMS Developer Guide, "IAM JSON policy elements reference" of the IAM User Guide); each has a
code, by which programs tell findings apart.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from keypolicy.actions import fits_an_action
from keypolicy.callers import Caller
from keypolicy.findings import (
    PLAINTEXT_ACTIONS,
    RECIPIENT_ACTIONS,
    REWRITING,
    Finding,
    Problem,
)
from keypolicy.keys import (
    closest_key,
    is_about_document,
    is_about_enclave,
    is_about_nitrotpm,
    is_known,
    pcr_index,
)
from keypolicy.measure import image_identity_problem
from keypolicy.model import (
    KEY_POLICY_MAX,
    Condition,
    Policy,
    Statement,
    abbreviated,
    mixed_partitions,
    nitrotpm_condition_key,
    pcr_condition_key,
)
from keypolicy.never import check_guards, check_names, check_never
from keypolicy.nitrotpm import IDENTITY_FIX, indistinct, machine_identity_problem
from keypolicy.openings import Openings, limits, names_somebody
from keypolicy.operators import Operator, compare, covers_action, matches_wildcards
from keypolicy.parents import Parents
from keypolicy.pcr_values import check_pcr_values

if TYPE_CHECKING:
    from collections.abc import Iterator

    from keypolicy.documents import Document

# What makes another way to a plaintext: grants carry no attestation conditions, replicas have
# policies of their own, imported key material is known to whoever imports it.
_DETOURS: Final = ("kms:CreateGrant", "kms:ReplicateKey", "kms:ImportKeyMaterial")

_LOCKED: Final = "deny_everything"
# What says already that a statement never applies.
_NEVER_CODES: Final = frozenset({"both_kinds", "principal", "resource"})

# Keys of which a request of another account has another value, or none.
_OF_ACCOUNT: Final = frozenset(
    """
    aws:principalaccount aws:principalarn aws:principalorgid aws:principalorgpaths aws:sourceaccount
    aws:sourceorgid aws:userid ec2:sourceinstancearn kms:calleraccount lambda:sourcefunctionarn
    ssm:sourceinstancearn
    """.split()
)


def check(policy: Policy) -> tuple[Finding, ...]:
    """Find what makes a key policy for enclaves open, or useless; nothing found is the empty tuple.

    It looks at the policy alone, as if its key were meant for attested enclaves only.
    """
    openings = Openings(policy)
    parents = Parents(openings)
    mixed = tuple(check_guards(openings))
    findings = [Finding("policy", *problem) for problem in _check_size(policy)]
    for statement in policy.statements:
        problems = list(_check_statement(statement, openings, parents))
        if not mixed and not _NEVER_CODES & {problem.code for problem in problems}:
            problems += check_never(statement, openings)
        findings += [Finding(statement.label, *problem) for problem in problems]
    findings += [Finding("policy", *problem) for problem in _check_partitions(policy)]
    findings += [Finding("policy", *problem) for problem in mixed]
    locked = any("kms:PutKeyPolicy" in found.problem for found in findings if found.code == _LOCKED)
    if not locked and not any(
        openings.opens(statement, "kms:PutKeyPolicy", openings.documents.none)
        for statement in policy.statements
    ):
        findings.append(
            Finding(
                "policy",
                "no_administrator",
                "no statement allows kms:PutKeyPolicy: nobody can change this policy again",
                "add an Allow of the administrative actions for a role that does not run enclaves",
            )
        )
    return tuple(findings)


def _check_size(policy: Policy) -> Iterator[Problem]:
    """Find a policy that KMS does not keep."""
    if policy.size > KEY_POLICY_MAX:
        problem = f"it has {policy.size:,} bytes, but KMS takes {KEY_POLICY_MAX:,}"
        yield Problem("size", problem, "write it without white space, or use several keys")


def _check_partitions(policy: Policy) -> Iterator[Problem]:
    """Note principals and resources of several partitions."""
    names = [
        name
        for part in policy.statements
        for name in (*part.resources, *(name for _, name in part.principals))
    ]
    found = mixed_partitions(names)
    if found:
        fix = "name principals of the key's own partition alone"
        yield Problem("partition", found, fix, warning=True)


def _check_statement(
    statement: Statement, openings: Openings, parents: Parents
) -> Iterator[Problem]:
    """Find the problems of one statement, in the order of the elements that they are about."""
    yield from _check_negations(statement)
    yield from _check_principals(statement)
    yield from check_names(statement)
    yield from _check_operators(statement)
    yield from _check_condition_keys(statement)
    attesting = any(is_about_enclave(condition.key) for condition in statement.conditions)
    debug = attesting and any(
        openings.opens(statement, action, openings.documents.debug) for action in RECIPIENT_ACTIONS
    )
    values = tuple(check_pcr_values(statement, debug=debug))
    yield from values
    if statement.effect == "Deny":
        yield from _check_deny(statement, openings)
        return
    zeros = any(problem.code in ("zero_pcr", "pcr_pattern", "indistinct_pcr") for problem in values)
    found = tuple(_check_allow(statement, openings, zeros=zeros))
    yield from found
    yield from parents.check(statement, warn=not found)
    if all(problem.code != "root_everything" for problem in found):
        yield from _check_administration(statement, openings)


# ---- principals, actions, resources


def _check_negations(statement: Statement) -> Iterator[Problem]:
    """Find NotPrincipal, and an Allow of everything but something."""
    if statement.not_principal:
        problem = "NotPrincipal reaches everyone that it does not list"
        yield Problem("not_principal", problem, "name the principals in Principal")
    if statement.effect == "Allow":
        negations = {"Action": statement.not_action, "Resource": statement.not_resource}
        for element, negated in negations.items():
            if negated:
                problem = f"Not{element} allows all that it does not list"
                yield Problem(f"not_{element.lower()}", problem, f"list it in {element}")


def _check_principals(statement: Statement) -> Iterator[Problem]:
    """Find principals that are everyone, or nobody."""
    for kind, name in statement.principals:
        if kind == "*" and statement.effect == "Allow" and not _limits_everyone(statement):
            problem = "Principal * allows everyone, in every account"
            fix = "name the role that the enclave's parent instance runs with"
            yield Problem("wildcard_principal", problem, fix)
        elif kind == "AWS" and re.search(r"[*?]", name):
            problem = f"principal {abbreviated(name)}: wildcards match nothing here"
            yield Problem("principal", problem, "name each principal in full")
        elif kind == "AWS" and re.fullmatch(r"A[A-Z0-9]{15,}", name):
            # IAM puts the unique id of a user or role in place of its ARN once that is deleted
            problem = f"principal {name} is the id of a deleted user or role"
            yield Problem("principal", problem, "name its successor's ARN")
        elif not name or (kind == "AWS" and Caller.of_principal(kind, name, "aws") is None):
            problem = f"principal {abbreviated(name)} is no account, user, role or session"
            yield Problem("principal", problem, "name the role of the parent instance by its ARN")


def _limits_everyone(statement: Statement) -> bool:
    """Tell whether everyone is not every account: by NotPrincipal, or by a condition."""
    return statement.not_principal or any(
        condition.key.lower() in _OF_ACCOUNT
        and limits(condition)
        and not any(_spans_accounts(value) for value in condition.values)
        for condition in statement.conditions
    )


def _spans_accounts(value: str) -> bool:
    """Tell whether a value is a pattern that others fit than an account, or organization."""
    named = r"arn:[^:]*:[^:]*:[^:]*:\d{12}:|o-[a-z0-9]+/|A[A-Z0-9]{15,}:"
    return bool(re.search(r"[*?]", value)) and not re.match(named, value)


# ---- condition operators and keys


def _check_operators(statement: Statement) -> Iterator[Problem]:
    """Find operators that IAM does not have, or that do not fit an attestation key."""
    fix = "use StringEqualsIgnoreCase"
    for condition in statement.conditions:
        operator = Operator.parse(condition.operator)
        fits = operator.name.startswith("string") or operator.name == "null"
        if not operator.known:
            problem = f"{abbreviated(condition.operator)} is no condition operator"
            yield Problem("operator", problem, fix)
        elif is_about_document(condition.key) and not fits:
            problem = f"{condition.operator} does not compare strings, as {condition.key} is one"
            yield Problem("operator", problem, fix)


def _check_condition_keys(statement: Statement) -> Iterator[Problem]:
    """Find condition keys that are misspelt, of which IAM accepts any and never has a value."""
    for condition in statement.conditions:
        if not is_known(condition.key):
            key, guess = abbreviated(condition.key), closest_key(condition.key)
            problem = f"condition key {key} is not known here: if misspelt, it never has a value"
            fix = "compare it with the condition keys of AWS KMS and the global ones"
            yield Problem("key", problem, f"did you mean {guess}?" if guess else fix)


# ---- attestation conditions


def _without_document(condition: Condition) -> bool | None:
    """Tell whether a condition on a document holds where a call brings none."""
    return compare(condition, ())[0]


# ---- Deny


def _check_deny(statement: Statement, openings: Openings) -> Iterator[Problem]:
    """Find what is wrong with a Deny that is meant to keep out who brings no fitting document."""
    attesting = [part for part in statement.conditions if is_about_document(part.key)]
    negated = [found for found in attesting if Operator.parse(found.operator).negated]
    # "Conditions with multiple context keys or values": several keys of a statement are ANDed
    # of each kind by itself: a document of one kind lacks the keys of the other
    if any(
        len({pcr_index(condition.key) for condition in negated if is_of_kind(condition.key)}) > 1
        for is_of_kind in (is_about_enclave, is_about_nitrotpm)
    ):
        keys = ", ".join(condition.key for condition in negated)
        problem = f"denies only where all of {keys} differ: one right value is enough to pass"
        yield Problem("deny_and", problem, "write one Deny statement per condition key")
    for condition in negated:
        if _without_document(condition) is not True:
            denies = f"{condition.operator} {condition.key} denies nothing"
            problem = f"{denies} without an attestation document"
            yield Problem("deny_hollow", problem, f"use {condition.operator.partition(':')[2]}")
    if any(_without_document(condition) for condition in attesting):
        for action in ("kms:Encrypt", "kms:PutKeyPolicy"):
            if openings.denies_everyone(statement, action):
                problem = f"denies {action}, which carries no attestation document, to everyone"
                fix = f"deny {', '.join(PLAINTEXT_ACTIONS)} only"
                yield Problem(_LOCKED, problem, fix)


# ---- Allow


def _check_allow(statement: Statement, openings: Openings, *, zeros: bool) -> Iterator[Problem]:
    """Find what is wrong with an Allow, by whether it rests on an attestation document.

    `zeros` says that its own values were found to admit debug mode or several images.
    """
    if openings.rests_on_document(statement):
        yield from _check_attested_allow(statement)
        yield from _check_kinds(statement, openings)
        if not zeros:
            yield from _check_image(statement, openings)
        return
    everything = not statement.not_action and not names_somebody(statement)
    everything = everything and all(
        covers_action(statement, action) for action in (*PLAINTEXT_ACTIONS, *_DETOURS, REWRITING)
    )
    found: list[Problem] = []
    if everything:
        # KMS's default key policy: one finding, rather than a list of all that it opens
        found += _check_account(statement, openings)
    found += _check_unattested_allow(statement, openings, account=not everything)
    yield from found
    if not found:
        yield from _check_image(statement, openings)


def _check_account(statement: Statement, openings: Openings) -> Iterator[Problem]:
    """Find what an Allow of everything for the account leaves to identity policies."""
    known = openings.documents
    foreign = (*known.foreign, *known.foreign_machines)
    for actions, documents in ((PLAINTEXT_ACTIONS, foreign), ((REWRITING, *_DETOURS), ())):
        left = []
        for action in actions:
            brought = (*known.unattested(action), *documents)
            if any(map(_is_account, openings.opened_to(statement, action, *brought))):
                left.append(action)
        if left:
            problem = (
                "the account's root may do everything, "
                f"so any identity policy of the account can allow {', '.join(left)}"
            )
            fix = "name an administrator instead, with the administrative actions only"
            yield Problem("root_everything", problem, fix)
            return


def _is_account(caller: Caller) -> bool:
    """Tell whether a caller is anybody of one account."""
    return bool(caller.account) and not caller.known


def _check_attested_allow(statement: Statement) -> Iterator[Problem]:
    """Find what is wrong with an Allow that does rest on an attestation document."""
    if any(condition.key.lower() == "kms:viaservice" for condition in statement.conditions):
        problem = (
            "asks for kms:ViaService and attestation, but AWS services send no attestation document"
        )
        yield Problem("via_service", problem, "drop one of the two")
    for kind, name in statement.principals:
        if kind not in ("*", "AWS") and not statement.not_principal:
            problem = f"{kind} {abbreviated(name)} sends no attestation document: never allowed"
            yield Problem("service_principal", problem, "name the parent instance's role")
    listed = () if statement.not_action else filter(fits_an_action, statement.actions)
    for action in dict.fromkeys(("kms:Encrypt", *listed)):
        if covers_action(statement, action) and not _takes_document(action):
            problem = f"{action} takes no attestation document, so it is never allowed here"
            fix = "allow it in a statement of its own, or drop it"
            yield Problem("never_attested", problem, fix)


def _takes_document(action: str) -> bool:
    """Tell whether an action, or one that a pattern fits, takes an attestation document."""
    return any(
        matches_wildcards(action.lower(), known.lower())
        for known in (*RECIPIENT_ACTIONS, "kms:GenerateRandom")
    )


def _check_image(statement: Statement, openings: Openings) -> Iterator[Problem]:
    """Find that an Allow admits other images than one, by its conditions or by weak Denys."""
    known = openings.documents
    opened = _opened_by(statement, openings, *known.foreign, known.debug)
    if opened:
        pinned = [
            pcr_index(condition.key)
            for condition in statement.conditions
            if is_about_enclave(condition.key) and Operator.parse(condition.operator).name != "null"
        ]
        why = image_identity_problem(pinned) or "its conditions fit more than one image"
        problem = f"allows {', '.join(opened)} to images that it does not name: {why}"
        yield Problem("any_image", problem, "add PCR0, PCR8, or PCR1 together with PCR2")
        return
    opened = _opened_by(statement, openings, *known.foreign_machines)
    if opened:
        why = machine_identity_problem(_pinned_of_nitrotpm(statement))
        why = why or "its conditions fit more than one machine image"
        problem = f"allows {', '.join(opened)} to machine images that it does not name: {why}"
        yield Problem("any_machine_image", problem, IDENTITY_FIX)


def _pinned_of_nitrotpm(statement: Statement) -> Iterator[int]:
    """Yield the PCRs of a NitroTPM that a statement asks for with values that say something."""
    for condition in statement.conditions:
        index = pcr_index(condition.key)
        asked = is_about_nitrotpm(condition.key) and (
            Operator.parse(condition.operator).name != "null"
        )
        if asked and not any(indistinct(index, value) for value in condition.values):
            yield index


def _check_kinds(statement: Statement, openings: Openings) -> Iterator[Problem]:
    """Find an Allow that no document can meet, because it asks for PCRs of both kinds."""
    known = openings.documents
    if all(
        openings.rests_on_document(statement, lacking)
        for lacking in (known.any_enclave, known.any_nitrotpm)
    ):
        problem = "asks for PCRs of an enclave and of a NitroTPM, but no document has both"
        yield Problem("both_kinds", problem, "write a statement for each kind")


def _opened_by(statement: Statement, openings: Openings, *brought: Document) -> list[str]:
    """List the actions that these documents open, and a call without one does not."""
    return [
        action
        for action in RECIPIENT_ACTIONS
        if any(
            not openings.opens_without(statement, action, caller)
            for caller in openings.opened_to(statement, action, *brought)
        )
    ]


def _check_unattested_allow(
    statement: Statement, openings: Openings, *, account: bool
) -> Iterator[Problem]:
    """Find what an Allow opens to calls without a document, unless a Deny closes it again.

    Without `account`, what it leaves to the account's identity policies is not looked at.
    """
    opened = []
    for action in dict.fromkeys((*PLAINTEXT_ACTIONS, *_DETOURS, *RECIPIENT_ACTIONS)):
        callers = openings.opened_to(statement, action, *openings.documents.unattested(action))
        if any(account or not _is_account(who) for who in callers):
            opened.append(action)
    revealing = [action for action in opened if action in PLAINTEXT_ACTIONS]
    detours = [action for action in opened if action in _DETOURS]
    vacuous = [part for part in statement.conditions if is_about_document(part.key)]
    # first, since whoever wrote such a condition believes that the action is guarded
    if opened and vacuous:
        condition = f"{vacuous[0].operator} {vacuous[0].key}"
        problem = f"{condition} holds without an attestation document, too"
        yield Problem("vacuous", problem, "use StringEqualsIgnoreCase")
    elif revealing:
        problem = f"allows {', '.join(revealing)} without an attestation document"
        keys = pcr_condition_key(0)
        if openings.is_for_nitrotpm:
            keys = f"{nitrotpm_condition_key(4)} and {nitrotpm_condition_key(12)}"
        fix = f"add StringEqualsIgnoreCase {keys}, or drop the action"
        yield Problem("unattested", problem, fix)
    if detours:
        problem = f"allows {', '.join(detours)}, a way around attestation conditions"
        fix = "list the administrative actions that are needed, without these"
        yield Problem("detour", problem, fix)


def _check_administration(statement: Statement, openings: Openings) -> Iterator[Problem]:
    """Find that an Allow leaves kms:PutKeyPolicy to an account, or to everyone of some."""
    if statement.not_principal or names_somebody(statement):
        return
    for who in openings.opened_to(statement, REWRITING, openings.documents.none):
        if _is_account(who):
            problem = (
                f"leaves {REWRITING} to the account, any identity policy of which can allow it"
            )
        elif who == Caller() and _limits_everyone(statement):
            problem = f"allows {REWRITING} to everyone whom its conditions fit"
        else:
            continue
        fix = "name an administrator instead: a role that does not run enclaves"
        yield Problem("anyone_administers", problem, fix)
        return
