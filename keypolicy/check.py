"""What makes a key policy for attested enclaves open, or useless, and how to mend it.

The rules follow from how KMS and IAM evaluate ("Condition keys for AWS KMS" and "Key policies" of
the KMS Developer Guide, "IAM JSON policy elements reference" of the IAM User Guide); each has a
code, by which programs tell findings apart.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from keypolicy.measure import PCR_HEX_LENGTH, ZERO_PCR_HEX, image_identity_problem
from keypolicy.model import (
    ATTESTATION,
    ENCRYPTION_CONTEXT,
    EVERYONE,
    KMS_CONDITION_KEYS,
    Condition,
    Policy,
    Statement,
    abbreviated,
    pcr_condition_key,
)
from keypolicy.operators import Operator, covers_action, matches_wildcards

if TYPE_CHECKING:
    from collections.abc import Iterator

RECIPIENT_ACTIONS: Final = (
    "kms:Decrypt",
    "kms:DeriveSharedSecret",
    "kms:GenerateDataKey",
    "kms:GenerateDataKeyPair",
)
"""The actions on a key that take an attestation document."""

PLAINTEXT_ACTIONS: Final = ("kms:Decrypt", "kms:DeriveSharedSecret", "kms:ReEncryptFrom")
"""The actions that give away what the key protects."""

# What makes another way to a plaintext: grants carry no attestation conditions, replicas have
# policies of their own, imported key material is known to whoever imports it.
_DETOURS: Final = ("kms:CreateGrant", "kms:ReplicateKey", "kms:ImportKeyMaterial")

_ATTESTATION_KEY: Final = re.compile(
    r"kms:recipientattestation:"
    r"(imagesha384|pcr([0-9]|[12][0-9]|3[01])|nitrotpmpcr([0-9]|1[0-9]|2[0-3]))"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a statement, or with the policy as a whole, and how to mend it.

    `code` names the rule.
    """

    statement: str
    code: str
    problem: str
    fix: str


class _Problem(NamedTuple):
    """A Finding before it is known of which statement."""

    code: str
    problem: str
    fix: str


def check(policy: Policy) -> tuple[Finding, ...]:
    """Find what makes a key policy for enclaves open, or useless; nothing found is the empty tuple.

    It looks at the policy alone, as if its key were meant for attested enclaves only.
    """
    findings = [
        Finding(statement.label, *problem)
        for statement in policy.statements
        for problem in _check_statement(statement, policy)
    ]
    administered = any(
        statement.effect == "Allow" and covers_action(statement, "kms:PutKeyPolicy")
        for statement in policy.statements
    )
    if not administered:
        findings.append(
            Finding(
                "policy",
                "no_administrator",
                "no statement allows kms:PutKeyPolicy: nobody can change this policy again",
                "add an Allow of the administrative actions for a role that does not run enclaves",
            )
        )
    return tuple(findings)


def _check_statement(statement: Statement, policy: Policy) -> Iterator[_Problem]:
    """Find the problems of one statement, in the order of the elements that they are about."""
    yield from _check_negations(statement)
    yield from _check_principals(statement)
    yield from _check_operators(statement)
    yield from _check_condition_keys(statement)
    yield from _check_pcr_values(statement)
    if statement.effect == "Deny":
        yield from _check_deny(statement)
    else:
        yield from _check_allow(statement, policy)


# ---- principals, actions, resources


def _check_negations(statement: Statement) -> Iterator[_Problem]:
    """Find NotPrincipal, and an Allow of everything but something."""
    if statement.not_principal:
        problem = "NotPrincipal reaches everyone that it does not list"
        yield _Problem("not_principal", problem, "name the principals in Principal")
    if statement.effect == "Allow":
        negations = {"Action": statement.not_action, "Resource": statement.not_resource}
        for element, negated in negations.items():
            if negated:
                problem = f"Not{element} allows all that it does not list"
                yield _Problem(f"not_{element.lower()}", problem, f"list it in {element}")


def _check_principals(statement: Statement) -> Iterator[_Problem]:
    """Find principals that are everyone, or nobody."""
    for kind, name in statement.principals:
        if kind == "*" and statement.effect == "Allow" and not statement.not_principal:
            problem = "Principal * allows everyone, in every account"
            fix = "name the role that the enclave's parent instance runs with"
            yield _Problem("wildcard_principal", problem, fix)
        elif kind == "AWS" and re.search(r"[*?]", name):
            problem = f"principal {abbreviated(name)}: wildcards match nothing here"
            yield _Problem("principal", problem, "name each principal in full")
        elif kind == "AWS" and re.fullmatch(r"A[A-Z0-9]{15,}", name):
            # IAM puts the unique id of a user or role in place of its ARN once that is deleted
            problem = f"principal {name} is the id of a deleted user or role"
            yield _Problem("principal", problem, "name its successor's ARN")


# ---- condition operators and keys


def _check_operators(statement: Statement) -> Iterator[_Problem]:
    """Find operators that IAM does not have, or that do not fit an attestation key."""
    fix = "use StringEqualsIgnoreCase"
    for condition in statement.conditions:
        operator = Operator.parse(condition.operator)
        fits = operator.name.startswith("string") or operator.name == "null"
        if not operator.known:
            problem = f"{abbreviated(condition.operator)} is no condition operator"
            yield _Problem("operator", problem, fix)
        elif _is_about_enclave(condition) and not fits:
            problem = f"{condition.operator} does not compare strings, as {condition.key} is one"
            yield _Problem("operator", problem, fix)


def _check_condition_keys(statement: Statement) -> Iterator[_Problem]:
    """Find condition keys that do not exist, of which IAM accepts any and never has a value."""
    for condition in statement.conditions:
        if not _key_exists(condition.key):
            key, guess = abbreviated(condition.key), _closest_key(condition.key)
            problem = f"condition key {key} does not exist: it never has a value"
            fix = "use a condition key of AWS KMS, or a global one"
            yield _Problem("key", problem, f"did you mean {guess}?" if guess else fix)


def _key_exists(key: str) -> bool:
    """Tell whether a request to KMS can have a key.

    Any global key counts that is not a misplaced one of KMS: they are too many, and too often new,
    to be listed.
    """
    key = key.lower()
    return (
        bool(_ATTESTATION_KEY.fullmatch(key))
        or (key.startswith(ENCRYPTION_CONTEXT.lower()) and len(key) > len(ENCRYPTION_CONTEXT))
        or key in {name.lower() for name in KMS_CONDITION_KEYS}
        or (key.startswith("aws:") and not re.search(r"attestation|pcr\d|sha384", key))
    )


def _closest_key(key: str) -> str | None:
    """Guess the condition key that a misspelt one was meant to be; None where nothing is close."""
    # Before likeness, which does not know that the number has to stay.
    pcr = re.search(r"pcr[^0-9]*0*([0-9]|[12][0-9]|3[01])$", key.lower())
    if pcr:
        return pcr_condition_key(int(pcr[1]))
    known = (*KMS_CONDITION_KEYS, f"{ATTESTATION}ImageSha384", pcr_condition_key(0))
    names = {name.lower(): name for name in known}
    found = difflib.get_close_matches(key.lower(), names, 1)
    return names[found[0]] if found else None


# ---- attestation conditions


def _is_about_enclave(condition: Condition) -> bool:
    """Tell whether a condition's key is of an enclave's attestation document, not of a NitroTPM."""
    key = condition.key.lower()
    return bool(_ATTESTATION_KEY.fullmatch(key)) and "nitrotpm" not in key


def _pcr_index(key: str) -> int:
    """Return which PCR an attestation condition key is about."""
    digits = key.lower().removeprefix(f"{ATTESTATION}PCR".lower())
    return int(digits) if digits.isdecimal() else 0  # ImageSha384 is PCR0


def _demands_document(condition: Condition) -> bool:
    """Tell whether a condition fails without an attestation document: an Allow must rest on one.

    Negated operators, IfExists and ForAllValues hold for an absent key ("Condition operators").
    """
    operator = Operator.parse(condition.operator)
    if not _is_about_enclave(condition):
        return False
    if operator.name == "null":
        return all(value.lower() == "false" for value in condition.values)
    holds_for_absent_key = (
        operator.negated or operator.if_exists or operator.quantifier == "forallvalues"
    )
    return operator.comparison is not None and not holds_for_absent_key


def _holds_without_document(condition: Condition) -> bool:
    """Tell whether a condition holds without an attestation document, so that its Deny applies."""
    operator = Operator.parse(condition.operator)
    if operator.name == "null":
        holds = "true" in [value.lower() for value in condition.values]
    else:
        holds = operator.negated and operator.quantifier != "foranyvalue"
    return holds and _is_about_enclave(condition)


def _check_pcr_values(statement: Statement) -> Iterator[_Problem]:
    """Find values of attestation conditions that no document has, or too many have."""
    for condition in statement.conditions:
        operator = Operator.parse(condition.operator)
        if not _is_about_enclave(condition) or not operator.name.startswith("string"):
            continue
        lets_in = operator.negated == (statement.effect == "Deny")
        for value in condition.values:
            found = next(_pcr_value_problems(value, operator.name, lets_in=lets_in), None)
            if found:
                yield found._replace(problem=f"{condition.key}: {found.problem}")


def _pcr_value_problems(value: str, operator: str, *, lets_in: bool) -> Iterator[_Problem]:
    """Find what is wrong with a PCR's value under an operator, given by its bare name; worst first.

    `lets_in` says that enclaves of this value are let in, rather than kept out. Only the first
    problem is worth reporting: all zeros let an enclave in where other wrong values match none, and
    a pattern or 0x also makes the length and the letters wrong.
    """
    like = operator.endswith("like")
    as_printed = "use the value that nitro-cli build-enclave prints"
    whole = "use the whole SHA-384 value"
    if len(value) == 64:  # 48 bytes in base64
        whole = "write it in hexadecimal, not in base64"
    if lets_in and (value == ZERO_PCR_HEX or (like and matches_wildcards(value, ZERO_PCR_HEX))):
        problem = "all zeros let every enclave in debug mode in, whatever its image"
        yield _Problem("zero_pcr", problem, as_printed)
    if like and re.search(r"[*?]", value):
        yield _Problem("pcr_pattern", "a pattern can fit more than one image", whole)
    if value.lower().startswith("0x"):
        yield _Problem("pcr_prefix", "the value starts with 0x, unlike KMS's", "drop the 0x")
    if len(value) != PCR_HEX_LENGTH:
        problem = f"the value has {len(value)} characters, expected {PCR_HEX_LENGTH}"
        yield _Problem("pcr_length", problem, whole)
    if not re.fullmatch(r"[0-9a-fA-F]*", value):
        yield _Problem("pcr_hex", "the value is not hexadecimal", as_printed)
    if value != value.lower() and "ignorecase" not in operator:
        problem = "the value has upper case letters, unlike KMS's"
        yield _Problem("pcr_case", problem, "write it in lower case")


# ---- Deny


def _check_deny(statement: Statement) -> Iterator[_Problem]:
    """Find what is wrong with a Deny that is meant to keep out who brings no fitting document."""
    attesting = [condition for condition in statement.conditions if _is_about_enclave(condition)]
    negated = [found for found in attesting if Operator.parse(found.operator).negated]
    # "Conditions with multiple context keys or values": several keys of a statement are ANDed
    if len({condition.key.lower() for condition in negated}) > 1:
        keys = ", ".join(condition.key for condition in negated)
        problem = f"denies only where all of {keys} differ: one right value is enough to pass"
        yield _Problem("deny_and", problem, "write one Deny statement per condition key")
    for condition in negated:
        if not _holds_without_document(condition):
            denies = f"{condition.operator} {condition.key} denies nothing"
            problem = f"{denies} without an attestation document"
            yield _Problem("deny_hollow", problem, f"use {condition.operator.partition(':')[2]}")
    if any(_holds_without_document(condition) for condition in attesting):
        for action in ("kms:Encrypt", "kms:PutKeyPolicy"):
            if covers_action(statement, action):
                problem = f"denies {action}, which carries no attestation document, to everyone"
                fix = f"deny {', '.join(PLAINTEXT_ACTIONS)} only"
                yield _Problem("deny_everything", problem, fix)


def _denies_everyone_without_document(deny: Statement, action: str) -> bool:
    """Tell whether a Deny keeps everybody without an attestation document from an action."""
    return (
        deny.effect == "Deny"
        and not (deny.not_principal or deny.not_resource)
        and EVERYONE in deny.principals
        and "*" in deny.resources
        and covers_action(deny, action)
        # a second condition would have to hold, too, and spares who sees to it that it does not
        and len(deny.conditions) == 1
        and _holds_without_document(deny.conditions[0])
    )


# ---- Allow


def _check_allow(statement: Statement, policy: Policy) -> Iterator[_Problem]:
    """Find what is wrong with an Allow, by whether it rests on an attestation document."""
    actions = {action.lower() for action in statement.actions}
    if any(_demands_document(condition) for condition in statement.conditions):
        yield from _check_attested_allow(statement)
    elif _is_for_account(statement) and {"*", "kms:*"} & actions:
        # KMS's default key policy: one finding, rather than a list of all that it opens
        problem = (
            "the account's root may do everything, "
            "so any identity policy of the account can allow kms:Decrypt"
        )
        fix = "name an administrator instead, with the administrative actions only"
        yield _Problem("root_everything", problem, fix)
    else:
        yield from _check_unattested_allow(statement, policy)


def _is_for_account(statement: Statement) -> bool:
    """Tell whether a statement names an account, by its number or as its root."""
    return any(
        kind == "AWS" and re.fullmatch(r"\d{12}|arn:.*:root", name)
        for kind, name in statement.principals
    )


def _check_attested_allow(statement: Statement) -> Iterator[_Problem]:
    """Find what is wrong with an Allow that does rest on an attestation document."""
    if any(condition.key.lower() == "kms:viaservice" for condition in statement.conditions):
        problem = (
            "asks for kms:ViaService and attestation, but AWS services send no attestation document"
        )
        yield _Problem("via_service", problem, "drop one of the two")
    listed = () if statement.not_action else statement.actions
    for action in dict.fromkeys(("kms:Encrypt", *listed)):
        if covers_action(statement, action) and not _takes_document(action):
            problem = f"{action} takes no attestation document, so it is never allowed here"
            fix = "allow it in a statement of its own, or drop it"
            yield _Problem("never_attested", problem, fix)
    pinned = [
        _pcr_index(condition.key)
        for condition in statement.conditions
        if _demands_document(condition) and condition.operator.lower() != "null"
    ]
    problem = image_identity_problem(pinned)
    if problem:
        yield _Problem("any_image", problem, "add PCR0, PCR8, or PCR1 together with PCR2")


def _takes_document(action: str) -> bool:
    """Tell whether an action, or one that a pattern fits, takes an attestation document."""
    return any(
        matches_wildcards(action.lower(), known.lower())
        for known in (*RECIPIENT_ACTIONS, "kms:GenerateRandom")
    )


def _check_unattested_allow(statement: Statement, policy: Policy) -> Iterator[_Problem]:
    """Find what an Allow opens to calls without a document, unless a Deny closes it again."""
    opened = [
        action
        for action in dict.fromkeys((*PLAINTEXT_ACTIONS, *_DETOURS, *RECIPIENT_ACTIONS))
        if covers_action(statement, action)
        and not any(_denies_everyone_without_document(deny, action) for deny in policy.statements)
    ]
    revealing = [action for action in opened if action in PLAINTEXT_ACTIONS]
    detours = [action for action in opened if action in _DETOURS]
    vacuous = [condition for condition in statement.conditions if _is_about_enclave(condition)]
    # first, since whoever wrote such a condition believes that the action is guarded
    if opened and vacuous:
        condition = f"{vacuous[0].operator} {vacuous[0].key}"
        problem = f"{condition} holds without an attestation document, too"
        yield _Problem("vacuous", problem, "use StringEqualsIgnoreCase")
    elif revealing:
        problem = f"allows {', '.join(revealing)} without an attestation document"
        fix = f"add StringEqualsIgnoreCase {pcr_condition_key(0)}, or drop the action"
        yield _Problem("unattested", problem, fix)
    if detours:
        problem = f"allows {', '.join(detours)}, a way around attestation conditions"
        fix = "list the administrative actions that are needed, without these"
        yield _Problem("detour", problem, fix)
