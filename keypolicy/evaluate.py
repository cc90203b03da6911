"""What a key policy decides about a call to KMS, and which statement and condition decided it.

"Policy evaluation logic" and "AWS JSON policy elements: Principal" of the IAM User Guide are the
sources, and "Key policies" of the KMS Developer Guide for what an account as principal means.
Every answer is in three-valued logic: None is what cannot be told from the policy and the request.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from keypolicy.callers import Caller, Principals
from keypolicy.keys import is_about_context, is_about_enclave, is_about_nitrotpm, is_known
from keypolicy.model import (
    ATTESTATION,
    ENCRYPTION_CONTEXT,
    Condition,
    Policy,
    PolicyError,
    Statement,
    abbreviated,
    nitrotpm_condition_key,
    pcr_condition_key,
    split_arn,
)
from keypolicy.operators import Operator, compare, conjunction, covers_action, covers_resource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

NOT_EVALUATED: Final = (
    "identity policies",
    "grants",
    "service and resource control policies",
    "permissions boundaries",
    "session policies",
    "VPC endpoint policies",
)


class Decision(enum.Enum):
    """What the key policy says about a request."""

    ALLOWED = "allowed"
    DENIED = "denied"
    UNDETERMINED = "undetermined"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A call to KMS, as far as a key policy can see it.

    `principal` is the ARN of a user, role, assumed-role session or account root; `resource` that of
    the key. `pcrs` are those of an enclave's attestation document, `nitrotpm_pcrs` those of a
    NitroTPM's, None where the call brings none; no call brings both. `more_pcrs` says that the
    document has others, whose values are not known. `context` is the encryption
    context; `keys` are further condition keys and their values, as {"kms:KeySpec":
    "SYMMETRIC_DEFAULT"}.
    """

    principal: str
    action: str
    resource: str
    pcrs: Mapping[int, bytes] | None = None
    nitrotpm_pcrs: Mapping[int, bytes] | None = None
    more_pcrs: bool = False
    context: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)


# ---- findings


@dataclass(frozen=True, slots=True)
class ConditionFinding:
    """How one condition fared.

    `actual` are the request's values, empty where it lacks the key; `held` is None when unknown,
    and `note` says why.
    """

    condition: Condition
    actual: tuple[str, ...]
    held: bool | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class StatementFinding:
    """How one statement fared.

    `applies` is None when that cannot be told; `reasons` say why it does not apply. `delegates`
    marks a statement for the caller's account, which leaves the decision to identity policies.
    """

    statement: Statement
    applies: bool | None
    reasons: tuple[str, ...]
    conditions: tuple[ConditionFinding, ...]
    delegates: bool = False


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The decision, every statement's part in it, and why it cannot be told when it cannot.

    `delegated` marks a decision that is left to identity policies alone: whoever knows those can
    complete it.
    """

    decision: Decision
    reason: str
    statements: tuple[StatementFinding, ...]
    undetermined: tuple[str, ...] = ()
    delegated: bool = False


# ---- the decision


def evaluate(policy: Policy, request: Request) -> Evaluation:
    """Decide a request by the key policy: an explicit deny first, then any allow, else denied.

    Raises PolicyError when the request's principal or resource is no ARN, or names several callers.
    """
    caller = Caller.from_arn(request.principal)
    if re.search(r"[*?]", request.principal):
        raise PolicyError(f"principal {abbreviated(request.principal)} is a pattern: name one")
    values = _known_values(request, caller)
    findings = tuple(_judge(found, request, caller, values) for found in policy.statements)
    denials = [found for found in findings if found.statement.effect == "Deny"]
    allows = [found for found in findings if found.statement.effect == "Allow"]
    # Denials first, wherever they stand: an explicit deny overrides any allow.
    denial = next((found for found in denials if found.applies), None)
    if denial:
        reason = f"{denial.statement.label} denies explicitly"
        return Evaluation(Decision.DENIED, reason, findings)
    allow = next((found for found in allows if found.applies and not found.delegates), None)
    foreign = split_arn(request.resource)[4] != caller.account
    if allow and not foreign and all(found.applies is False for found in denials):
        return Evaluation(Decision.ALLOWED, f"{allow.statement.label} allows", findings)
    # Before the open questions: where nothing can allow, what may deny no longer matters.
    if all(found.applies is False for found in allows):
        return Evaluation(Decision.DENIED, "no statement allows", findings)
    questions = tuple(_open_questions(denials, allows))
    if allow and foreign:
        # across accounts both have to allow, the key policy and the caller's identity policies
        condition = f"if an identity policy of account {caller.account} does too"
        questions += (f"{allow.statement.label} allows, {condition}",)
    delegated = all(found.applies is not None for found in findings)
    return Evaluation(Decision.UNDETERMINED, questions[0], findings, questions, delegated)


def _open_questions(
    denials: Iterable[StatementFinding], allows: Iterable[StatementFinding]
) -> Iterator[str]:
    """Say which statements keep a decision from being told, and why; denials weigh more."""
    for found in (*denials, *allows):
        label, effect = found.statement.label, found.statement.effect.lower()
        if found.applies is None:
            yield f"{label} may {effect}: {'; '.join(found.reasons)}"
        elif found.applies and found.delegates:
            yield f"{label} leaves the decision to the identity policies of the account"


def _judge(
    statement: Statement, request: Request, caller: Caller, values: KnownValues
) -> StatementFinding:
    """Find whether a statement applies: its principal, action, resource and every condition."""
    principal, delegates = Principals(statement).judge(caller)
    action = covers_action(statement, request.action)
    resource = covers_resource(statement, request.resource)
    conditions = tuple(judge_condition(condition, values) for condition in statement.conditions)
    reasons = [
        reason
        for held, reason in (
            (principal, "principal " + ("cannot be told" if principal is None else "differs")),
            (action, f"action {request.action} is not named"),
            (resource, f"resource {request.resource} is not named"),
        )
        if not held
    ]
    reasons += [_condition_reason(found) for found in conditions if not found.held]
    applies = conjunction((principal, action, resource, *(found.held for found in conditions)))
    return StatementFinding(statement, applies, tuple(reasons), conditions, delegates)


def judge_condition(condition: Condition, values: KnownValues) -> ConditionFinding:
    """Find whether a condition holds for the values of a request."""
    actual = values.of(condition.key)
    if actual is None:
        if is_known(condition.key):
            return ConditionFinding(condition, (), None, "the request does not tell this key")
        return ConditionFinding(condition, (), None, "this key is not known here")
    # "role/team/Enclave" and "role/team/*" may be the role of the session "Enclave"
    vague = values.pathless and condition.key.lower() == "aws:principalarn"
    if vague and any(re.search(r":role/.*/", value) for value in condition.values):
        note = "a session does not tell the path of its role"
        return ConditionFinding(condition, actual, None, note)
    held, note = compare(condition, actual)
    if condition.key.lower() in values.partial and held is not _decided_by_one(condition):
        return ConditionFinding(condition, actual, None, "the key may have further values")
    return ConditionFinding(condition, actual, held, note if held is None else "")


def _decided_by_one(condition: Condition) -> bool | None:
    """Return what one value of several decides for all of them; None where it decides nothing."""
    quantifier = Operator.parse(condition.operator).quantifier
    return {"forallvalues": False, "foranyvalue": True}.get(quantifier or "")


def _condition_reason(found: ConditionFinding) -> str:
    """Say why a condition does not hold, or why that cannot be told."""
    operator_and_key = f"{found.condition.operator} {found.condition.key}"
    if found.held is None:
        return f"{operator_and_key} cannot be told: {found.note}"
    actual = " or ".join(found.actual) or "absent"
    values = " or ".join(found.condition.values)
    return f"{operator_and_key} does not hold: {actual}, policy: {values}"


# ---- condition keys of the request

# Global keys that only a call made by a service has.
_OF_SERVICES: Final = frozenset(
    f"aws:{name}"
    for name in "calledvia calledviafirst calledvialast sourceaccount sourcearn sourceorgid".split()
)


class KnownValues(NamedTuple):
    """The condition keys of a request, as far as they are known.

    `values` are by key in lower case, as condition keys have no case; `lacks` tells of any other
    key, in lower case, whether the request surely lacks it. `pathless` says that aws:PrincipalArn
    is of a session, which does not tell the path of its role. Of the keys in `partial` there may be
    further values.
    """

    values: Mapping[str, tuple[str, ...]]
    lacks: Callable[[str], bool]
    pathless: bool = False
    partial: frozenset[str] = frozenset()

    def of(self, key: str) -> tuple[str, ...] | None:
        """Return the values of a key: () where it is absent, None where that is unknown."""
        key = key.lower()
        found = self.values.get(key)
        if found is None and self.lacks(key):
            return ()
        return found


def values_of_pcrs(pcrs: Mapping[int, bytes]) -> dict[str, tuple[str, ...]]:
    """Return the condition keys, in lower case, that the PCRs of an enclave's document give."""
    values: dict[str, tuple[str, ...]] = {
        pcr_condition_key(index).lower(): (value.hex(),) for index, value in pcrs.items()
    }
    if 0 in pcrs:
        values[f"{ATTESTATION}ImageSha384".lower()] = (pcrs[0].hex(),)
    return values


def values_of_nitrotpm(pcrs: Mapping[int, bytes]) -> dict[str, tuple[str, ...]]:
    """Return the condition keys, in lower case, that the PCRs of a NitroTPM's document give."""
    return {nitrotpm_condition_key(index).lower(): (pcrs[index].hex(),) for index in pcrs}


def _known_values(request: Request, caller: Caller) -> KnownValues:
    """Return what a request tells of its condition keys."""
    values: dict[str, tuple[str, ...]] = caller.condition_values() | {
        "aws:requestedregion": (split_arn(request.resource)[3],),
        "aws:securetransport": ("true",),
        "aws:viaawsservice": ("false",),
    }
    values.update(values_of_pcrs(request.pcrs or {}))
    values.update(values_of_nitrotpm(request.nitrotpm_pcrs or {}))
    for name, value in request.context.items():
        # names of a context differ in case, their condition keys do not: such a key has both values
        key = f"{ENCRYPTION_CONTEXT}{name}".lower()
        values[key] = (*values.get(key, ()), value)
    if request.context:
        values["kms:encryptioncontextkeys"] = tuple(request.context)
    # last, since what the caller of `evaluate` states is meant to win
    values.update({key.lower(): (value,) for key, value in request.keys.items()})
    told = any(key.lower() == "aws:principalarn" for key in request.keys)
    return KnownValues(values, lambda key: _is_absent(key, request), caller.session and not told)


def _is_absent(key: str, request: Request) -> bool:
    """Tell whether a direct call surely lacks a key that it does not tell.

    That is so of the context and of the document, which the request tells, and of what only a
    service's call has. Other keys may have any value, and one that is not known here may exist.
    """
    if is_about_enclave(key):
        return request.pcrs is None or not request.more_pcrs
    if is_about_nitrotpm(key):
        return request.nitrotpm_pcrs is None or not request.more_pcrs
    return is_about_context(key) or key == "kms:viaservice" or key in _OF_SERVICES
