"""What a key policy decides about a call to KMS, and which statement and condition decided it.

"Policy evaluation logic" and "AWS JSON policy elements: Principal" of the IAM User Guide are the
sources, and "Key policies" of the KMS Developer Guide for what an account as principal means.
Every answer is in three-valued logic: None is what cannot be told from the policy and the request.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from keypolicy.model import (
    ATTESTATION,
    ENCRYPTION_CONTEXT,
    EVERYONE,
    KMS_CONDITION_KEYS,
    Condition,
    Policy,
    PolicyError,
    Statement,
    abbreviated,
    pcr_condition_key,
    split_arn,
)
from keypolicy.operators import compare, conjunction, covers_action, covers_resource

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

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
    the key. `pcrs` are those of the attestation document, None where the call brings none;
    `context` is the encryption context; `keys` are further condition keys and their values, as
    {"kms:KeySpec": "SYMMETRIC_DEFAULT"}.
    """

    principal: str
    action: str
    resource: str
    pcrs: Mapping[int, bytes] | None = None
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

    Raises PolicyError when the request's principal or resource is no ARN.
    """
    caller = _Caller.from_arn(request.principal)
    values = _request_values(request, caller)
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
    statement: Statement, request: Request, caller: _Caller, values: Mapping[str, tuple[str, ...]]
) -> StatementFinding:
    """Find whether a statement applies: its principal, action, resource and every condition."""
    principal, delegates = _judge_principal(statement, caller)
    action = covers_action(statement, request.action)
    resource = covers_resource(statement, request.resource)
    conditions = tuple(_judge_condition(condition, values) for condition in statement.conditions)
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


def _judge_condition(
    condition: Condition, values: Mapping[str, tuple[str, ...]]
) -> ConditionFinding:
    """Find whether a condition holds for the values of a request."""
    actual = _values_of_key(values, condition.key)
    if actual is None:
        return ConditionFinding(condition, (), None, "the request does not tell this key")
    held, note = compare(condition, actual)
    return ConditionFinding(condition, actual, held, note if held is None else "")


def _condition_reason(found: ConditionFinding) -> str:
    """Say why a condition does not hold, or why that cannot be told."""
    operator_and_key = f"{found.condition.operator} {found.condition.key}"
    if found.held is None:
        return f"{operator_and_key} cannot be told: {found.note}"
    actual = " or ".join(found.actual) or "absent"
    values = " or ".join(found.condition.values)
    return f"{operator_and_key} does not hold: {actual}, policy: {values}"


# ---- principals


class _Caller(NamedTuple):
    """Who asks, by all the names that a statement may use.

    `principal_arn` is aws:PrincipalArn: for a session it is the ARN of its role, here without the
    role's path, which a session does not tell.
    """

    account: str
    root: str
    arn: str
    principal_arn: str
    role: str  # the name of the role of a session or a role, else ""
    session: bool

    @classmethod
    def from_arn(cls, arn: str) -> Self:
        """Read the ARN of a user, role, assumed-role session or root, or raise PolicyError."""
        _, partition, service, _, account, resource = split_arn(arn)
        kind, _, rest = resource.partition("/")
        session = (service, kind) == ("sts", "assumed-role")
        role = ""
        if session:
            role = rest.partition("/")[0]  # role name/session name
        elif (service, kind) == ("iam", "role"):
            role = rest.rpartition("/")[2]  # path/role name
        if not re.fullmatch(r"\d{12}", account) or service not in ("iam", "sts"):
            raise PolicyError(
                f"principal {abbreviated(arn)} is not the ARN of a user, role or session"
            )
        root = f"arn:{partition}:iam::{account}:root"
        principal_arn = f"arn:{partition}:iam::{account}:role/{role}" if session else arn
        return cls(account, root, arn, principal_arn, role, session)


def _judge_principal(statement: Statement, caller: _Caller) -> tuple[bool | None, bool]:
    """Find whether a statement is about the caller, and whether it only delegates to the account.

    "Key policies" of KMS: an Allow for an account lets that account's identity policies allow.
    """
    named = [_names_caller(kind, name, caller) for kind, name in statement.principals]
    if statement.not_principal:
        return _judge_not_principal(named, statement, caller), False
    # before the account: who is named beside it needs no identity policy
    if True in named:
        return True, False
    if _names_account(statement, caller):
        # a Deny for it reaches everyone in it; an Allow only lets its identity policies allow
        return True, statement.effect == "Allow"
    return (None if None in named else False), False


def _judge_not_principal(
    named: list[bool | None], statement: Statement, caller: _Caller
) -> bool | None:
    """Find whether a statement with NotPrincipal reaches the caller.

    NotPrincipal compares every name of the caller: account, role and session must all be listed to
    be exempt. Where some are listed this cannot be told, since a request has only one of them.
    """
    if EVERYONE in statement.principals:
        return False
    if _names_account(statement, caller) or any(held is not False for held in named):
        return None
    return True


def _names_account(statement: Statement, caller: _Caller) -> bool:
    """Tell whether a statement lists the caller's account, by its number or as its root."""
    return any(
        kind == "AWS" and name in (caller.account, caller.root)
        for kind, name in statement.principals
    )


def _names_caller(kind: str, name: str, caller: _Caller) -> bool | None:
    """Tell whether one principal of a statement is the caller itself, not the caller's account."""
    if kind == "*" or (kind == "AWS" and name == caller.arn):
        return True
    if kind == "AWS" and name == caller.account:
        return caller.arn == caller.root  # the root user is its account
    return _names_role(name, caller) if kind == "AWS" and caller.role else False


def _names_role(name: str, caller: _Caller) -> bool | None:
    """Tell whether a principal is the role of the calling session.

    None where the caller is a role and the principal one session of it: it may be that session.
    """
    try:
        other = _Caller.from_arn(name)
    except PolicyError:
        return False
    if (other.root, other.role) != (caller.root, caller.role):
        return False
    if caller.session:
        # a session's ARN lacks the role's path, but a role's name is unique in its account
        return not other.session
    return None if other.session else False


# ---- condition keys of the request

# What a direct call may have, whatever its value: neither the policy nor the request tells it.
# Not so kms:ViaService, which only a service's call has, nor the context, which the request tells.
_NOT_TOLD: Final = frozenset(key.lower() for key in KMS_CONDITION_KEYS) - {
    "kms:viaservice",
    "kms:encryptioncontextkeys",
}
# Global keys that only a call made by a service has.
_OF_SERVICES: Final = frozenset(
    f"aws:{name}"
    for name in "calledvia calledviafirst calledvialast sourceaccount sourcearn sourceorgid".split()
)


def _request_values(request: Request, caller: _Caller) -> dict[str, tuple[str, ...]]:
    """Return the values of a request's condition keys; keys in lower case, as they have no case."""
    values: dict[str, tuple[str, ...]] = {
        "aws:principalaccount": (caller.account,),
        "kms:calleraccount": (caller.account,),
        "aws:requestedregion": (split_arn(request.resource)[3],),
        "aws:securetransport": ("true",),
        "aws:viaawsservice": ("false",),
        "aws:principalisawsservice": ("false",),
        "aws:principalarn": (caller.principal_arn,),
    }
    for index, digest in (request.pcrs or {}).items():
        values[pcr_condition_key(index).lower()] = (digest.hex(),)
    if request.pcrs and 0 in request.pcrs:
        values[f"{ATTESTATION}ImageSha384".lower()] = (request.pcrs[0].hex(),)
    for name, value in request.context.items():
        # names of a context differ in case, their condition keys do not: such a key has both values
        key = f"{ENCRYPTION_CONTEXT}{name}".lower()
        values[key] = (*values.get(key, ()), value)
    if request.context:
        values["kms:encryptioncontextkeys"] = tuple(request.context)
    # last, since what the caller of `evaluate` states is meant to win
    values.update({key.lower(): (value,) for key, value in request.keys.items()})
    return values


def _values_of_key(values: Mapping[str, tuple[str, ...]], key: str) -> tuple[str, ...] | None:
    """Return the request's values of a key: () where it is absent, None where that is unknown."""
    key = key.lower()
    if key in values:
        return values[key]
    not_told = key in _NOT_TOLD or (key.startswith("aws:") and key not in _OF_SERVICES)
    return None if not_told else ()
