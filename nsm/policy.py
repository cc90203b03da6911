"""KMS key policies that ask for an attested enclave: evaluate, check and write them.

A key policy is an IAM policy document attached to a key. KMS compares the PCRs of the attestation
document in a request's `Recipient` with the condition keys kms:RecipientAttestation:PCR<n> and
:ImageSha384, and only if a policy names them. What is evaluated here is the key policy alone;
`NOT_EVALUATED` names what else decides in AWS. Sources: "IAM JSON policy elements reference" and
"Policy evaluation logic" of the IAM User Guide, "Condition keys for AWS KMS" of the KMS Developer
Guide.
"""

from __future__ import annotations

import difflib
import enum
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Self

POLICY_MAX: Final = 131_072  # characters that PutKeyPolicy takes
NOT_EVALUATED: Final = (
    "identity policies",
    "grants",
    "service and resource control policies",
    "permissions boundaries",
    "session policies",
    "VPC endpoint policies",
)

ATTESTATION: Final = "kms:RecipientAttestation:"
_CONTEXT: Final = "kms:EncryptionContext:"


class PolicyError(Exception):
    """The text is no key policy, or a request names something that is no principal."""


class Decision(enum.Enum):
    """What the key policy says about a request."""

    ALLOWED = "allowed"
    DENIED = "denied"
    UNDETERMINED = "undetermined"


# ---- the document


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition key under one operator: `values` are alternatives, all conditions of a
    statement must hold.
    """

    operator: str
    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement; `number` counts from 1.

    `principals` are pairs of type and identifier, as ("AWS", "arn:...") or ("*", "*").
    """

    number: int
    sid: str | None
    effect: str
    principals: tuple[tuple[str, str], ...]
    actions: tuple[str, ...]
    resources: tuple[str, ...]
    conditions: tuple[Condition, ...]
    not_principal: bool = False
    not_action: bool = False
    not_resource: bool = False

    @property
    def label(self) -> str:
        """How messages name the statement."""
        return f"statement {self.number}" + (f" ({self.sid})" if self.sid else "")


@dataclass(frozen=True, slots=True)
class Policy:
    """A key policy, in the order of its statements."""

    statements: tuple[Statement, ...]
    version: str = "2008-10-17"  # what IAM assumes where a policy names none

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """Read the JSON of a key policy; raises PolicyError."""
        document = _members("policy", _json(text), {"Version", "Id", "Statement"})
        version = document.get("Version", "2008-10-17")
        if version not in ("2012-10-17", "2008-10-17"):
            raise PolicyError(f"policy has the Version {_brief(version)}, expected 2012-10-17")
        statements = document.get("Statement")
        if isinstance(statements, dict):
            statements = [statements]
        if not isinstance(statements, list) or not statements:
            raise PolicyError("policy has no Statement")
        return cls(
            tuple(_statement(number, item) for number, item in enumerate(statements, start=1)),
            version,
        )


def _json(text: str | bytes) -> object:
    if len(text) > POLICY_MAX:
        raise PolicyError(f"policy has {len(text)} characters, expected at most {POLICY_MAX}")
    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"not a JSON document: {error}") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object without repeated names, of which readers could pick either."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("an object repeats a name")
    return members


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


def _members(what: str, item: object, allowed: set[str]) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise PolicyError(f"{what} is not a JSON object")
    for name in item:
        if name not in allowed:
            raise PolicyError(
                f"{what} has the element {_brief(name)}, expected {', '.join(sorted(allowed))}"
            )
    return item


_ELEMENTS: Final = {
    "Sid",
    "Effect",
    "Principal",
    "NotPrincipal",
    "Action",
    "NotAction",
    "Resource",
    "NotResource",
    "Condition",
}


def _statement(number: int, item: object) -> Statement:
    what = f"statement {number}"
    members = _members(what, item, _ELEMENTS)
    sid, effect = members.get("Sid"), members.get("Effect")
    if sid is not None and not isinstance(sid, str):
        raise PolicyError(f"{what} has a Sid that is not a string")
    if effect not in ("Allow", "Deny"):
        raise PolicyError(f"{what} has the Effect {_brief(effect)}, expected Allow or Deny")
    principals, not_principal = _either(what, members, "Principal")
    actions, not_action = _either(what, members, "Action")
    resources, not_resource = _either(what, members, "Resource")
    return Statement(
        number=number,
        sid=sid or None,
        effect=effect,
        principals=_principals(what, principals),
        actions=_strings(f"{what}: Action", actions),
        resources=_strings(f"{what}: Resource", resources),
        conditions=tuple(_conditions(what, members.get("Condition", {}))),
        not_principal=not_principal,
        not_action=not_action,
        not_resource=not_resource,
    )


def _either(what: str, members: Mapping[str, object], name: str) -> tuple[object, bool]:
    """The element or its negation, and which of them it is: exactly one must be there."""
    if (name in members) == (f"Not{name}" in members):
        raise PolicyError(
            f"{what} has {'both' if name in members else 'neither'} {name} and Not{name}"
        )
    negated = name not in members
    return members[f"Not{name}" if negated else name], negated


def _strings(what: str, item: object) -> tuple[str, ...]:
    """A string or a list of them; booleans and numbers are read as IAM does, as their text."""
    items = item if isinstance(item, list) else [item]
    if not items:
        raise PolicyError(f"{what} is empty")
    return tuple(_string(what, value) for value in items)


def _string(what: str, value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    if not isinstance(value, str):
        raise PolicyError(f"{what} holds something that is not a string")
    return value


def _principals(what: str, item: object) -> tuple[tuple[str, str], ...]:
    if item == "*":
        return (("*", "*"),)
    kinds = _members(f"{what}: Principal", item, {"AWS", "Service", "Federated", "CanonicalUser"})
    found = [
        (kind, name)
        for kind, names in kinds.items()
        for name in _strings(f"{what}: Principal", names)
    ]
    if not found:
        raise PolicyError(f"{what}: Principal is empty")
    return tuple(("*", "*") if pair == ("AWS", "*") else pair for pair in found)


def _conditions(what: str, item: object) -> Iterable[Condition]:
    if not isinstance(item, dict):
        raise PolicyError(f"{what}: Condition is not a JSON object")
    for operator, keys in item.items():
        if not isinstance(keys, dict):
            raise PolicyError(f"{what}: {_brief(operator)} is not a JSON object")
        for key, values in keys.items():
            yield Condition(operator, key, _strings(f"{what}: {_brief(operator)}", values))


def _brief(value: object) -> str:
    return repr(value)[:80]


# ---- evaluation


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
    """How one statement fared: `applies` is None when that cannot be told; `reasons` say why it
    does not apply.

    `delegates` marks a statement for the caller's account, which leaves the decision to identity
    policies.
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


def evaluate(policy: Policy, request: Request) -> Evaluation:
    """Decide a request by the key policy: an explicit deny first, then any allow, else denied.

    Raises PolicyError when the request's principal or resource is no ARN.
    """
    caller = _Caller.of(request.principal)
    values = _request_values(request, caller)
    findings = tuple(_judge(statement, request, caller, values) for statement in policy.statements)
    denials = [found for found in findings if found.statement.effect == "Deny"]
    allows = [found for found in findings if found.statement.effect == "Allow"]
    denial = next((found for found in denials if found.applies), None)
    if denial:
        return Evaluation(Decision.DENIED, f"{denial.statement.label} denies explicitly", findings)
    allow = next((found for found in allows if found.applies and not found.delegates), None)
    foreign = _arn(request.resource)[4] != caller.account
    if allow and not foreign and all(found.applies is False for found in denials):
        return Evaluation(Decision.ALLOWED, f"{allow.statement.label} allows", findings)
    if not any(found.applies is not False for found in allows):
        return Evaluation(Decision.DENIED, "no statement allows", findings)
    questions = tuple(_questions(denials, allows))
    if allow and foreign:
        questions += (
            (
                f"{allow.statement.label} allows, if an identity policy "
                f"of account {caller.account} does too"
            ),
        )
    delegated = all(found.applies is not None for found in findings)
    return Evaluation(Decision.UNDETERMINED, questions[0], findings, questions, delegated)


def _questions(
    denials: Iterable[StatementFinding], allows: Iterable[StatementFinding]
) -> Iterable[str]:
    for found in (*denials, *allows):
        if found.applies is None:
            yield (
                f"{found.statement.label} may {found.statement.effect.lower()}: "
                f"{'; '.join(found.reasons)}"
            )
        elif found.applies and found.delegates:
            yield (
                f"{found.statement.label} leaves the decision to the identity policies of the "
                "account"
            )


def _judge(
    statement: Statement, request: Request, caller: _Caller, values: Mapping[str, tuple[str, ...]]
) -> StatementFinding:
    """Whether a statement applies: principal, action, resource and every condition, in three-valued
    logic.
    """
    principal, delegates = _principal_applies(statement, caller)
    action = _any_like(statement.actions, request.action, fold=True) != statement.not_action
    resource = _any_like(statement.resources, request.resource) != statement.not_resource
    conditions = tuple(_hold(condition, values) for condition in statement.conditions)
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
    applies = _all((principal, action, resource, *(found.held for found in conditions)))
    return StatementFinding(statement, applies, tuple(reasons), conditions, delegates)


def _all(parts: Iterable[bool | None]) -> bool | None:
    """Kleene's conjunction: None is unknown."""
    seen = tuple(parts)
    if False in seen:
        return False
    return None if None in seen else True


def _condition_reason(found: ConditionFinding) -> str:
    condition = found.condition
    if found.held is None:
        return f"{condition.operator} {condition.key} cannot be told: {found.note}"
    actual = " or ".join(found.actual) or "absent"
    return (
        f"{condition.operator} {condition.key} does not hold: {actual}, policy: "
        f"{' or '.join(condition.values)}"
    )


# ---- principals


class _Caller(NamedTuple):
    """Who asks.

    `iam_arn` is aws:PrincipalArn: a session has its role's, without the path, which it does not
    tell.
    """

    account: str
    root: str
    arn: str
    iam_arn: str
    role: str  # the name of the role of a session or a role, else ""
    session: bool

    @classmethod
    def of(cls, arn: str) -> Self:
        _, partition, service, _, account, resource = _arn(arn)
        kind, _, rest = resource.partition("/")
        session = (service, kind) == ("sts", "assumed-role")
        if session:
            role = rest.partition("/")[0]
        else:
            role = rest.rpartition("/")[2] if (service, kind) == ("iam", "role") else ""
        if not re.fullmatch(r"\d{12}", account) or service not in ("iam", "sts"):
            raise PolicyError(f"principal {_brief(arn)} is not the ARN of a user, role or session")
        iam_arn = f"arn:{partition}:iam::{account}:role/{role}" if session else arn
        return cls(account, f"arn:{partition}:iam::{account}:root", arn, iam_arn, role, session)


def _arn(arn: str) -> list[str]:
    parts = arn.split(":", 5)
    if len(parts) != 6 or parts[0] != "arn":
        raise PolicyError(f"{_brief(arn)} is not an ARN")
    return parts


def _principal_applies(statement: Statement, caller: _Caller) -> tuple[bool | None, bool]:
    """Whether the statement is about the caller, and whether by the caller's account alone."""
    named = [_named(kind, name, caller) for kind, name in statement.principals]
    if statement.not_principal:
        return _not_principal(named, statement, caller), False
    if True in named:
        return True, False
    by_account = any(
        kind == "AWS" and name in (caller.account, caller.root)
        for kind, name in statement.principals
    )
    if by_account:
        # a Deny for an account reaches everyone in it; an Allow only lets its identity policies
        # allow
        return True, statement.effect == "Allow"
    return (None if None in named else False), False


def _named(kind: str, name: str, caller: _Caller) -> bool | None:
    """Whether one principal of a statement is the caller itself, not the caller's account."""
    if kind == "*" or (kind == "AWS" and name == caller.arn):
        return True
    if kind == "AWS" and name == caller.account:
        return caller.arn == caller.root
    return _same_role(name, caller) if kind == "AWS" and caller.role else False


def _same_role(name: str, caller: _Caller) -> bool | None:
    """Whether the principal is the role of the calling session; unknown where it is one session of
    the calling role.
    """
    try:
        other = _Caller.of(name)
    except PolicyError:
        return False
    if (other.root, other.role) != (caller.root, caller.role):
        return False
    if caller.session:
        return (
            not other.session
        )  # a session's ARN lacks the role's path, but a role's name is unique in its account
    return None if other.session else False


def _not_principal(named: list[bool | None], statement: Statement, caller: _Caller) -> bool | None:
    """NotPrincipal compares every name of the caller: account, role and session must all be listed
    to be exempt.
    """
    account = any(
        kind == "AWS" and name in (caller.account, caller.root)
        for kind, name in statement.principals
    )
    if ("*", "*") in statement.principals:
        return False
    return True if not account and not any(held is not False for held in named) else None


# ---- conditions


def _request_values(request: Request, caller: _Caller) -> dict[str, tuple[str, ...]]:
    """The condition keys of a request, in lower case since their names have no case."""
    values: dict[str, tuple[str, ...]] = {
        "aws:principalaccount": (caller.account,),
        "kms:calleraccount": (caller.account,),
        "aws:requestedregion": (_arn(request.resource)[3],),
        "aws:securetransport": ("true",),
        "aws:viaawsservice": ("false",),
        "aws:principalisawsservice": ("false",),
        "aws:principalarn": (caller.iam_arn,),
    }
    for index, digest in (request.pcrs or {}).items():
        values[f"{ATTESTATION}PCR{index}".lower()] = (digest.hex(),)
    if request.pcrs and 0 in request.pcrs:
        values[f"{ATTESTATION}ImageSha384".lower()] = (request.pcrs[0].hex(),)
    for name, value in request.context.items():
        key = f"{_CONTEXT}{name}".lower()
        values[key] = (*values.get(key, ()), value)
    if request.context:
        values["kms:encryptioncontextkeys"] = tuple(request.context)
    values.update({key.lower(): (value,) for key, value in request.keys.items()})
    return values


# "Condition keys for AWS KMS" and the service authorization reference, without those of attestation
# and context
_KMS_KEYS: Final = (
    "BypassPolicyLockoutSafetyCheck",
    "CallerAccount",
    "CustomerMasterKeySpec",
    "CustomerMasterKeyUsage",
    "DataKeyPairSpec",
    "EncryptionAlgorithm",
    "EncryptionContextKeys",
    "ExpirationModel",
    "GrantConstraintType",
    "GrantIsForAWSResource",
    "GrantOperations",
    "GranteePrincipal",
    "KeyAgreementAlgorithm",
    "KeyOrigin",
    "KeySpec",
    "KeyUsage",
    "MacAlgorithm",
    "MessageType",
    "MultiRegion",
    "MultiRegionKeyType",
    "PrimaryRegion",
    "ReEncryptOnSameKey",
    "ReplicaRegion",
    "RequestAlias",
    "ResourceAliases",
    "RetiringPrincipal",
    "RotationPeriodInDays",
    "ScheduleKeyDeletionPendingWindowInDays",
    "SigningAlgorithm",
    "ValidTo",
    "ViaService",
    "WrappingAlgorithm",
    "WrappingKeySpec",
)
# Keys that a direct call may have, whatever their value: neither the policy nor the request tells
# it.
_UNTOLD: Final = frozenset(f"kms:{name}".lower() for name in _KMS_KEYS) - {
    "kms:viaservice",
    "kms:encryptioncontextkeys",
}
# Global keys that only a call made by a service has.
_BY_SERVICE: Final = frozenset(
    f"aws:{name}"
    for name in (
        "calledvia",
        "calledviafirst",
        "calledvialast",
        "sourceaccount",
        "sourcearn",
        "sourceorgid",
    )
)


def _lookup(values: Mapping[str, tuple[str, ...]], key: str) -> tuple[str, ...] | None:
    """The request's values of a key, none where it is absent, None where that is unknown."""
    key = key.lower()
    if key in values:
        return values[key]
    untold = key in _UNTOLD or (key.startswith("aws:") and key not in _BY_SERVICE)
    return None if untold else ()


_Match = Callable[[str, str], bool | None]


def _hold(condition: Condition, values: Mapping[str, tuple[str, ...]]) -> ConditionFinding:
    """Evaluate one condition in three-valued logic."""
    actual = _lookup(values, condition.key)
    if actual is None:
        return ConditionFinding(condition, (), None, "the request does not tell this key")
    held, note = _compare(condition, actual)
    return ConditionFinding(condition, actual, held, note if held is None else "")


def _compare(condition: Condition, actual: tuple[str, ...]) -> tuple[bool | None, str]:
    """Whether the values of a key satisfy a condition, and why that would be unknown."""
    quantifier, operator, if_exists = _split_operator(condition.operator)
    if operator == "null":
        return _null(condition, actual), "Null takes true or false"
    match, negated = _matcher(operator)
    if match is None:
        return None, "this operator is not evaluated here"
    if not actual:
        return _absent(quantifier, negated=negated, if_exists=if_exists), "the key is absent"
    if quantifier is None and len(actual) > 1:
        return (
            None,
            "the key has several values, but the operator neither ForAllValues nor ForAnyValue",
        )
    each = [_any_pattern(match, condition.values, value, negated=negated) for value in actual]
    held = _any(each) if quantifier == "foranyvalue" else _all(each)
    return held, "a value is a policy variable, or no pattern for this operator"


def _split_operator(operator: str) -> tuple[str | None, str, bool]:
    """Quantifier, bare name and IfExists of an operator, in lower case."""
    quantifier, colon, name = operator.lower().rpartition(":")
    if colon and quantifier not in ("forallvalues", "foranyvalue"):
        return None, operator.lower(), False
    if_exists = name.endswith("ifexists")
    return quantifier or None, name.removesuffix("ifexists"), if_exists


def _null(condition: Condition, actual: tuple[str, ...]) -> bool | None:
    wanted = {value.lower() for value in condition.values}
    if not wanted <= {"true", "false"} or ":" in condition.operator:
        return None
    return str(not actual).lower() in wanted


def _absent(quantifier: str | None, *, negated: bool, if_exists: bool) -> bool | None:
    """What a condition says about a key that the request lacks."""
    if quantifier == "foranyvalue":
        return None if if_exists else False  # no documentation says how the two combine
    return negated or if_exists or quantifier == "forallvalues"


def _any_pattern(
    match: _Match, patterns: Iterable[str], value: str, *, negated: bool
) -> bool | None:
    """Whether a value matches one of the patterns, or none where the operator is negated."""
    found = _any(None if "${" in pattern else match(pattern, value) for pattern in patterns)
    return found if found is None else found != negated


def _any(parts: Iterable[bool | None]) -> bool | None:
    """Kleene's disjunction."""
    seen = tuple(parts)
    if True in seen:
        return True
    return None if None in seen else False


def _like(pattern: str, text: str) -> bool:
    """IAM's wildcards, * and ?, in time proportional to the product of the lengths: the policy may
    be hostile.
    """
    star, retry, at, index = -1, 0, 0, 0
    while index < len(text):
        if at < len(pattern) and pattern[at] == "*":
            star, retry, at = at, index, at + 1
        elif at < len(pattern) and pattern[at] in ("?", text[index]):
            at, index = at + 1, index + 1
        elif star >= 0:
            retry += 1
            at, index = star + 1, retry
        else:
            return False
    return not pattern[at:].strip("*")


def _any_like(patterns: Iterable[str], text: str, *, fold: bool = False) -> bool:
    if fold:
        return any(_like(pattern.lower(), text.lower()) for pattern in patterns)
    return any(_like(pattern, text) for pattern in patterns)


def _arn_like(pattern: str, arn: str) -> bool | None:
    """Each of the six parts of an ARN is matched on its own, so that a wildcard spans no colon but
    in the last.
    """
    patterns, parts = pattern.split(":", 5), arn.split(":", 5)
    if len(patterns) != 6:
        return None
    return len(parts) == 6 and all(map(_like, patterns, parts))


_OPERATORS: Final[Mapping[str, _Match]] = {
    "stringequals": lambda pattern, value: pattern == value,
    "stringequalsignorecase": lambda pattern, value: pattern.lower() == value.lower(),
    "stringlike": _like,
    "arnequals": _arn_like,
    "arnlike": _arn_like,
    "bool": lambda pattern, value: pattern.lower() == value.lower(),
}
_NEGATED: Final = {
    "stringnotequals": "stringequals",
    "stringnotequalsignorecase": "stringequalsignorecase",
    "stringnotlike": "stringlike",
    "arnnotequals": "arnequals",
    "arnnotlike": "arnlike",
}


def _matcher(operator: str) -> tuple[_Match | None, bool]:
    """How an operator, in lower case, compares a pattern with a value, and whether it is a negated
    one.
    """
    return _OPERATORS.get(_NEGATED.get(operator, operator)), operator in _NEGATED


# ---- checking


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a statement, or with the policy as a whole, and how to mend it; `code`
    names the rule.
    """

    statement: str
    code: str
    problem: str
    fix: str


_Problem = tuple[str, str, str]  # code, problem and fix of a Finding

RECIPIENT_ACTIONS: Final = (
    "kms:Decrypt",
    "kms:DeriveSharedSecret",
    "kms:GenerateDataKey",
    "kms:GenerateDataKeyPair",
)
# What gives a plaintext of the key away, and what makes another way to it: grants carry no
# attestation conditions, replicas have policies of their own, imported key material is known to
# whoever imports it.
_REVEALING: Final = ("kms:Decrypt", "kms:DeriveSharedSecret", "kms:ReEncryptFrom")
_DETOURS: Final = ("kms:CreateGrant", "kms:ReplicateKey", "kms:ImportKeyMaterial")
_OTHER_OPERATORS: Final = frozenset(
    f"{kind}{test}"
    for kind in ("numeric", "date")
    for test in (
        "equals",
        "notequals",
        "lessthan",
        "lessthanequals",
        "greaterthan",
        "greaterthanequals",
    )
) | {"binaryequals", "ipaddress", "notipaddress", "null"}
_PCR_HEX: Final = 96  # characters of a SHA-384 value
_ZERO_HEX: Final = "0" * _PCR_HEX


def check(policy: Policy) -> tuple[Finding, ...]:
    """Find what makes a key policy for enclaves open, or useless; nothing found is the empty tuple.

    It looks at the policy alone, as if its key were meant for attested enclaves only.
    """
    findings = [
        finding
        for statement in policy.statements
        for finding in _check_statement(statement, policy)
    ]
    if not any(
        found.effect == "Allow" and _covers(found, "kms:PutKeyPolicy")
        for found in policy.statements
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


def _check_statement(statement: Statement, policy: Policy) -> Iterable[Finding]:
    for problems in (
        _check_negations(statement),
        _check_principals(statement),
        _check_operators(statement),
        _check_keys(statement),
        _check_values(statement),
        _check_deny(statement) if statement.effect == "Deny" else _check_allow(statement, policy),
    ):
        for code, problem, fix in problems:
            yield Finding(statement.label, code, problem, fix)


def _covers(statement: Statement, action: str) -> bool:
    return _any_like(statement.actions, action, fold=True) != statement.not_action


def _check_negations(statement: Statement) -> Iterable[_Problem]:
    if statement.not_principal:
        yield (
            "not_principal",
            "NotPrincipal reaches everyone that it does not list",
            "name the principals in Principal",
        )
    if statement.effect == "Allow":
        for negated, element in (
            (statement.not_action, "Action"),
            (statement.not_resource, "Resource"),
        ):
            if negated:
                yield (
                    f"not_{element.lower()}",
                    f"Not{element} allows all that it does not list",
                    f"list it in {element}",
                )


def _check_principals(statement: Statement) -> Iterable[_Problem]:
    for kind, name in statement.principals:
        if kind == "*" and statement.effect == "Allow" and not statement.not_principal:
            yield (
                "wildcard_principal",
                "Principal * allows everyone, in every account",
                "name the role that the enclave's parent instance runs with",
            )
        elif kind == "AWS" and re.search(r"[*?]", name):
            yield (
                "principal",
                f"principal {_brief(name)}: wildcards match nothing here",
                "name each principal in full",
            )
        elif kind == "AWS" and re.fullmatch(r"A[A-Z0-9]{15,}", name):
            yield (
                "principal",
                f"principal {name} is the id of a deleted user or role",
                "name its successor's ARN",
            )


def _check_operators(statement: Statement) -> Iterable[_Problem]:
    for condition in statement.conditions:
        _, operator, _ = _split_operator(condition.operator)
        if _matcher(operator)[0] is None and operator not in _OTHER_OPERATORS:
            yield (
                "operator",
                f"{_brief(condition.operator)} is no condition operator",
                "use StringEqualsIgnoreCase",
            )
        elif _attests(condition) and not operator.startswith("string") and operator != "null":
            problem = f"{condition.operator} does not compare strings, as {condition.key} is one"
            yield "operator", problem, "use StringEqualsIgnoreCase"


_ATTESTATION_KEY: Final = re.compile(
    r"kms:recipientattestation:(imagesha384|pcr([0-9]|[12][0-9]|3[01])|nitrotpmpcr([0-9]|1[0-9]|2[0-3]))"
)


def _check_keys(statement: Statement) -> Iterable[_Problem]:
    for condition in statement.conditions:
        if not _exists(condition.key):
            guess = _closest(condition.key)
            yield (
                "key",
                f"condition key {_brief(condition.key)} does not exist: it never has a value",
                f"did you mean {guess}?"
                if guess
                else "use a condition key of AWS KMS, or a global one",
            )


def _exists(key: str) -> bool:
    """Whether a request to KMS can have this key; global ones are too many, and too often new, to
    be listed.
    """
    key = key.lower()
    return (
        bool(_ATTESTATION_KEY.fullmatch(key))
        or (key.startswith(_CONTEXT.lower()) and len(key) > len(_CONTEXT))
        or key in {f"kms:{name}".lower() for name in _KMS_KEYS}
        or (key.startswith("aws:") and not re.search(r"attestation|pcr\d|sha384", key))
    )


def _closest(key: str) -> str | None:
    """The condition key that a misspelt one was probably meant to be."""
    pcr = re.search(r"pcr[^0-9]*0*([0-9]|[12][0-9]|3[01])$", key.lower())
    if pcr:
        return _pcr_key(int(pcr[1]))
    names = {f"kms:{name}".lower(): f"kms:{name}" for name in _KMS_KEYS}
    names |= {name.lower(): name for name in (f"{ATTESTATION}ImageSha384", _pcr_key(0))}
    found = difflib.get_close_matches(key.lower(), names, 1)
    return names[found[0]] if found else None


def _attests(condition: Condition) -> bool:
    """Whether the condition is about an enclave's attestation document."""
    key = condition.key.lower()
    return bool(_ATTESTATION_KEY.fullmatch(key)) and "nitrotpm" not in key


def _demands(condition: Condition) -> bool:
    """Whether the condition fails without an attestation document, which is what an Allow must rest
    on.
    """
    quantifier, operator, if_exists = _split_operator(condition.operator)
    if operator == "null":
        return _attests(condition) and all(value.lower() == "false" for value in condition.values)
    match, negated = _matcher(operator)
    return (
        _attests(condition)
        and match is not None
        and not (negated or if_exists or quantifier == "forallvalues")
    )


def _denies_without(condition: Condition) -> bool:
    """Whether a Deny under the condition applies where no attestation document is sent."""
    quantifier, operator, _ = _split_operator(condition.operator)
    if operator == "null":
        return _attests(condition) and "true" in [value.lower() for value in condition.values]
    return _attests(condition) and operator in _NEGATED and quantifier != "foranyvalue"


def _check_values(statement: Statement) -> Iterable[_Problem]:
    for condition in statement.conditions:
        _, operator, _ = _split_operator(condition.operator)
        if not _attests(condition) or not operator.startswith("string"):
            continue
        lets_in = (operator in _NEGATED) == (statement.effect == "Deny")
        for value in condition.values:
            problem = _value_problem(value, operator, lets_in=lets_in)
            if problem:
                code, text, fix = problem
                yield code, f"{condition.key}: {text}", fix


def _value_problem(value: str, operator: str, *, lets_in: bool) -> _Problem | None:
    """What is wrong with a PCR's value under an operator that lets enclaves of this value in, or
    keeps them out.
    """
    like = operator.endswith("like")
    zero = value == _ZERO_HEX or (like and _like(value, _ZERO_HEX))
    as_printed = "use the value that nitro-cli build-enclave prints"
    whole = (
        "write it in hexadecimal, not in base64"
        if len(value) == 64
        else "use the whole SHA-384 value"
    )
    rules = (
        (
            lets_in and zero,
            "zero_pcr",
            "all zeros let every enclave in debug mode in, whatever its image",
            as_printed,
        ),
        (
            like and re.search(r"[*?]", value),
            "pcr_pattern",
            "a pattern can fit more than one image",
            whole,
        ),
        (
            value.lower().startswith("0x"),
            "pcr_prefix",
            "the value starts with 0x, unlike KMS's",
            "drop the 0x",
        ),
        (
            len(value) != _PCR_HEX,
            "pcr_length",
            f"the value has {len(value)} characters, expected {_PCR_HEX}",
            whole,
        ),
        (
            not re.fullmatch(r"[0-9a-fA-F]*", value),
            "pcr_hex",
            "the value is not hexadecimal",
            as_printed,
        ),
        (
            value != value.lower() and "ignorecase" not in operator,
            "pcr_case",
            "the value has upper case letters, unlike KMS's",
            "write it in lower case",
        ),
    )
    return next(((code, problem, fix) for broken, code, problem, fix in rules if broken), None)


def _check_deny(statement: Statement) -> Iterable[_Problem]:
    """A Deny that is meant to keep out who brings no fitting document."""
    attesting = [condition for condition in statement.conditions if _attests(condition)]
    negated = [
        condition for condition in attesting if _split_operator(condition.operator)[1] in _NEGATED
    ]
    if len({condition.key.lower() for condition in negated}) > 1:
        keys = ", ".join(condition.key for condition in negated)
        problem = f"denies only where all of {keys} differ: one right value is enough to pass"
        yield "deny_and", problem, "write one Deny statement per condition key"
    for condition in negated:
        if not _denies_without(condition):
            problem = (
                f"{condition.operator} {condition.key} denies nothing without an "
                "attestation document"
            )
            yield "deny_hollow", problem, f"use {condition.operator.partition(':')[2]}"
    if any(_denies_without(condition) for condition in attesting):
        for action in ("kms:Encrypt", "kms:PutKeyPolicy"):
            if _covers(statement, action):
                problem = f"denies {action}, which carries no attestation document, to everyone"
                yield "deny_everything", problem, f"deny {', '.join(_REVEALING)} only"


def _check_allow(statement: Statement, policy: Policy) -> Iterable[_Problem]:
    if any(_demands(condition) for condition in statement.conditions):
        yield from _check_attested(statement)
    elif _is_for_account(statement) and {"*", "kms:*"} & {
        action.lower() for action in statement.actions
    }:
        yield (
            "root_everything",
            (
                "the account's root may do everything, so any identity policy of the account can "
                "allow kms:Decrypt"
            ),
            "name an administrator instead, with the administrative actions only",
        )
    else:
        yield from _check_unattested(statement, policy)


def _is_for_account(statement: Statement) -> bool:
    return any(
        kind == "AWS" and re.fullmatch(r"\d{12}|arn:.*:root", name)
        for kind, name in statement.principals
    )


def _check_attested(statement: Statement) -> Iterable[_Problem]:
    """An Allow that does rest on an attestation document."""
    if any(condition.key.lower() == "kms:viaservice" for condition in statement.conditions):
        problem = (
            "asks for kms:ViaService and attestation, but AWS services send no attestation document"
        )
        yield "via_service", problem, "drop one of the two"
    for action in dict.fromkeys(
        ("kms:Encrypt", *(() if statement.not_action else statement.actions))
    ):
        takes = any(
            _like(action.lower(), known.lower())
            for known in (*RECIPIENT_ACTIONS, "kms:GenerateRandom")
        )
        if _covers(statement, action) and not takes:
            problem = f"{action} takes no attestation document, so it is never allowed here"
            yield "never_attested", problem, "allow it in a statement of its own, or drop it"
    demanding = [condition for condition in statement.conditions if _demands(condition)]
    problem = _identity_problem(
        _pcr_index(found.key) for found in demanding if found.operator.lower() != "null"
    )
    if problem:
        yield "any_image", problem, "add PCR0, PCR8, or PCR1 together with PCR2"


def _identity_problem(pinned: Iterable[int]) -> str:
    """Why these PCRs do not tell one image from another; empty when they do."""
    found = set(pinned)
    if found & {0, 8} or found >= {1, 2}:
        return ""
    if 2 in found:
        return "PCR2 without PCR1 admits a foreign kernel and init around the genuine application"
    if 1 in found:
        return "PCR1 without PCR2 admits any application on this kernel"
    return f"{_names(found)} alone admits any image, in debug mode too"


def _names(pcrs: Iterable[int]) -> str:
    return ", ".join(f"PCR{index}" for index in sorted(pcrs)) or "no PCR"


def _pcr_index(key: str) -> int:
    digits = key.lower().removeprefix(_pcr_key(0)[:-1].lower())
    return int(digits) if digits.isdecimal() else 0  # ImageSha384 is PCR0


def _pcr_key(index: int) -> str:
    return f"{ATTESTATION}PCR{index}"


def _check_unattested(statement: Statement, policy: Policy) -> Iterable[_Problem]:
    """An Allow that holds without an attestation document: what it opens, unless a Deny closes it
    again.
    """
    opened = [
        action
        for action in dict.fromkeys((*_REVEALING, *_DETOURS, *RECIPIENT_ACTIONS))
        if _covers(statement, action)
        and not any(_guards(deny, action) for deny in policy.statements)
    ]
    revealing = [action for action in opened if action in _REVEALING]
    detours = [action for action in opened if action in _DETOURS]
    vacuous = [condition for condition in statement.conditions if _attests(condition)]
    if opened and vacuous:
        problem = (
            f"{vacuous[0].operator} {vacuous[0].key} holds without an attestation document, too"
        )
        yield "vacuous", problem, "use StringEqualsIgnoreCase"
    elif revealing:
        problem = f"allows {', '.join(revealing)} without an attestation document"
        yield "unattested", problem, f"add StringEqualsIgnoreCase {_pcr_key(0)}, or drop the action"
    if detours:
        problem = f"allows {', '.join(detours)}, a way around attestation conditions"
        yield "detour", problem, "list the administrative actions that are needed, without these"


def _guards(deny: Statement, action: str) -> bool:
    """Whether a Deny keeps everybody without an attestation document from an action."""
    return (
        deny.effect == "Deny"
        and not (deny.not_principal or deny.not_resource)
        and ("*", "*") in deny.principals
        and "*" in deny.resources
        and _covers(deny, action)
        and len(deny.conditions) == 1
        and _denies_without(deny.conditions[0])
    )


# ---- measuring


def pcr_of_role(arn: str) -> bytes:
    """PCR3: the IAM role of the parent instance, by its ARN with path and partition."""
    if _kind_of(arn) != "role" or not arn.isascii():
        raise PolicyError(f"{_brief(arn)} is not the ARN of a role")
    return _extend(arn.encode("ascii"))


def pcr_of_instance(instance_id: str) -> bytes:
    """PCR4: the parent instance, by its id, as i-0123456789abcdef0."""
    if not re.fullmatch(r"i-([0-9a-f]{8}|[0-9a-f]{17})", instance_id):
        raise PolicyError(f"{_brief(instance_id)} is not the id of an instance")
    return _extend(instance_id.encode("ascii"))


def pcr_of_certificate(der: bytes) -> bytes:
    """PCR8: the certificate that signed the image, in DER; a renewed one over the same key gives
    another value.
    """
    return _extend(hashlib.sha384(der).digest())


def _extend(data: bytes) -> bytes:
    """A PCR that was extended once from its initial zeros."""
    return hashlib.sha384(bytes(48) + data).digest()


def measurements(text: str | bytes) -> dict[int, bytes]:
    """The PCRs in the JSON that `nitro-cli build-enclave` or `describe-enclaves` prints, for one
    enclave.

    Raises PolicyError; also for an enclave in debug mode, whose listed PCRs are not those that it
    attests.
    """
    document = _json(text)
    if isinstance(document, list):
        if len(document) != 1:
            raise PolicyError(f"measurements list {len(document)} enclaves, expected 1")
        document = document[0]
    if not isinstance(document, dict):
        raise PolicyError("measurements are not a JSON object")
    if "DEBUG_MODE" in str(document.get("Flags")).upper():
        raise PolicyError(
            "measurements are of an enclave in debug mode, which attests zeros instead of them"
        )
    listed = document.get("Measurements", document)
    if not isinstance(listed, dict):
        raise PolicyError("Measurements is not a JSON object")
    algorithm = listed.get("HashAlgorithm", "Sha384")
    if "sha384" not in str(algorithm).lower():
        raise PolicyError(f"measurements are of HashAlgorithm {_brief(algorithm)}, expected Sha384")
    pcrs = {
        name: value
        for name, value in listed.items()
        if re.fullmatch(r"PCR([0-9]|[12][0-9]|3[01])", name)
    }
    if not pcrs:
        raise PolicyError("measurements list no PCR")
    return {int(name[3:]): _measurement(name, value) for name, value in pcrs.items()}


def _measurement(name: str, value: object) -> bytes:
    if not isinstance(value, str) or not re.fullmatch(rf"[0-9a-fA-F]{{{_PCR_HEX}}}", value):
        raise PolicyError(f"{name} is {_brief(value)}, expected {_PCR_HEX} hexadecimal characters")
    if value == _ZERO_HEX:
        raise PolicyError(f"{name} is all zeros, which is what an enclave in debug mode attests")
    return bytes.fromhex(value)


# ---- writing


class Bind(NamedTuple):
    """An encryption context value that only enclaves with this value of PCR3 or PCR4 may use."""

    name: str
    value: str
    pcr: int
    digest: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read NAME=VALUE:ROLE_ARN or NAME=VALUE:INSTANCE_ID."""
        found = re.fullmatch(r"([^=]+)=(.+):(arn:[^:]+:iam::\d{12}:role/.+|i-[0-9a-f]+)", text)
        if not found:
            raise PolicyError(
                f"{_brief(text)} is not NAME=VALUE:ROLE_ARN or NAME=VALUE:INSTANCE_ID"
            )
        name, value, who = found.groups()
        if who.startswith("arn:"):
            return cls(name, value, 3, pcr_of_role(who))
        return cls(name, value, 4, pcr_of_instance(who))


class Rendered(NamedTuple):
    """A key policy as a JSON-able object, and what its author should know about it."""

    policy: dict[str, Any]
    warnings: tuple[str, ...]


_ADMINISTRATION: Final = tuple(
    f"kms:{name}"
    for name in (
        "CancelKeyDeletion",
        "CreateAlias",
        "DeleteAlias",
        "DescribeKey",
        "DisableKey",
        "DisableKeyRotation",
        "EnableKey",
        "EnableKeyRotation",
        "GetKeyPolicy",
        "GetKeyRotationStatus",
        "ListGrants",
        "ListKeyPolicies",
        "ListKeyRotations",
        "ListResourceTags",
        "PutKeyPolicy",
        "RevokeGrant",
        "RotateKeyOnDemand",
        "ScheduleKeyDeletion",
        "TagResource",
        "UntagResource",
        "UpdateAlias",
        "UpdateKeyDescription",
    )
)


def render(
    *,
    principals: Sequence[str],
    admins: Sequence[str],
    images: Sequence[Mapping[int, bytes]],
    encryptors: Sequence[str] = (),
    binds: Sequence[Bind] = (),
    actions: Sequence[str] = ("kms:Decrypt",),
) -> Rendered:
    """Write a key policy that gives plaintexts to attested enclaves only; `check` finds nothing in
    it.

    `principals` are the roles (or users) that the enclaves' parents run with, `admins` manage the
    key without using it, `encryptors` may only encrypt. Each image is {PCR index: 48 bytes};
    several are for a roll-over and name the same PCRs. `actions` are of RECIPIENT_ACTIONS. Raises
    PolicyError for what would be open or useless.
    """
    _check_people(principals, admins, encryptors)
    _check_images(images)
    _check_binds(binds, actions)
    if not actions or not set(actions) <= set(RECIPIENT_ACTIONS):
        raise PolicyError(
            f"actions are {', '.join(actions) or 'none'}, expected some of "
            f"{', '.join(RECIPIENT_ACTIONS)}"
        )
    statements = [_allow("Administration", admins, _ADMINISTRATION)]
    if encryptors:
        statements.append(_allow("Encryption", encryptors, ["kms:Encrypt"]))
    for number, image in enumerate(images, start=1):
        allow = _allow(f"Enclave{number}", principals, actions)
        statements.append(allow | {"Condition": _enclave_condition(image, binds)})
    for index in sorted(images[0]):
        differs = _differs(index, [image[index] for image in images])
        statements.append(_deny(f"DenyOtherPCR{index}", differs))
    statements += _bind_guards(binds)
    return Rendered({"Version": "2012-10-17", "Statement": statements}, tuple(_warnings(images[0])))


def _check_people(
    principals: Sequence[str], admins: Sequence[str], encryptors: Sequence[str]
) -> None:
    if not principals or not admins:
        raise PolicyError(f"the policy names no {'administrator' if principals else 'principal'}")
    for what, arns, kinds in (
        ("principal", principals, ("role", "user")),
        ("administrator", admins, ("role", "user", "root")),
        ("encryptor", encryptors, ("role", "user")),
    ):
        for arn in arns:
            if _kind_of(arn) not in kinds:
                raise PolicyError(f"{what} {_brief(arn)} is not the ARN of a {' or '.join(kinds)}")
            if what != "principal" and arn in principals:
                raise PolicyError(
                    f"{arn} is the parent instance's, which is not trusted: it cannot be {what} too"
                )


def _kind_of(arn: str) -> str:
    """What an ARN of IAM names: "role", "user", "root", or "" for anything else and anything with
    wildcards.
    """
    found = re.fullmatch(r"arn:[a-z-]+:iam::\d{12}:(?:(role|user)/[^*?\s]+|(root))", arn)
    return (found[1] or found[2]) if found else ""


def _check_images(images: Sequence[Mapping[int, bytes]]) -> None:
    if not images:
        raise PolicyError("the policy names no image")
    for image in images:
        if set(image) != set(images[0]):
            raise PolicyError(
                f"images name {_names(images[0])} and {_names(image)}, expected the same PCRs in "
                "each"
            )
        for index, value in image.items():
            if not 0 <= index <= 31 or len(value) != 48:
                raise PolicyError(
                    f"PCR{index} has {len(value)} bytes, expected PCR0 to PCR31 with 48"
                )
            if not any(value):
                raise PolicyError(
                    f"PCR{index} is all zeros, which is what an enclave in debug mode attests"
                )
    problem = _identity_problem(images[0])
    if problem:
        raise PolicyError(f"{problem}: add PCR0, PCR8, or PCR1 together with PCR2")


def _check_binds(binds: Sequence[Bind], actions: Sequence[str]) -> None:
    if binds and "kms:DeriveSharedSecret" in actions:
        raise PolicyError("kms:DeriveSharedSecret has no encryption context to bind")
    if len({bind.name.lower() for bind in binds}) != len({bind.name for bind in binds}):
        raise PolicyError(
            "bound context names differ in case only, which condition keys do not tell apart"
        )
    for bind in binds:
        if "${" in bind.value:
            raise PolicyError(
                f"bound value {_brief(bind.value)} would be read as a policy variable"
            )
        if (
            len(
                {
                    other.pcr
                    for other in binds
                    if (other.name, other.value) == (bind.name, bind.value)
                }
            )
            > 1
        ):
            raise PolicyError(
                f"{bind.name}={bind.value} is bound to a role and to an instance, expected one "
                "of them"
            )


def _allow(sid: str, principals: Sequence[str], actions: Sequence[str]) -> dict[str, Any]:
    return {
        "Sid": sid,
        "Effect": "Allow",
        "Principal": {"AWS": _one_or_list(principals)},
        "Action": _one_or_list(actions),
        "Resource": "*",
    }


def _deny(sid: str, condition: dict[str, Any]) -> dict[str, Any]:
    return {
        "Sid": sid,
        "Effect": "Deny",
        "Principal": "*",
        "Action": list(_REVEALING),
        "Resource": "*",
        "Condition": condition,
    }


def _one_or_list(values: Iterable[str]) -> str | list[str]:
    unique = list(dict.fromkeys(values))
    return unique[0] if len(unique) == 1 else unique


def _enclave_condition(image: Mapping[int, bytes], binds: Sequence[Bind]) -> dict[str, Any]:
    """The PCRs of an image and, where context names are bound, one of the bound values of each."""
    condition: dict[str, Any] = {
        "StringEqualsIgnoreCase": {_pcr_key(index): image[index].hex() for index in sorted(image)}
    }
    names = dict.fromkeys(bind.name for bind in binds)
    if names:
        condition["StringEquals"] = {
            f"{_CONTEXT}{name}": _one_or_list(bind.value for bind in binds if bind.name == name)
            for name in names
        }
    return condition


def _differs(index: int, values: Iterable[bytes]) -> dict[str, Any]:
    """Holds where no document, or one with another value of this PCR, is sent: one key each, since
    keys are ANDed.
    """
    return {
        "StringNotEqualsIgnoreCase": {
            _pcr_key(index): _one_or_list(value.hex() for value in values)
        }
    }


def _bind_guards(binds: Sequence[Bind]) -> Iterable[dict[str, Any]]:
    bound = dict.fromkeys((bind.name, bind.value, bind.pcr) for bind in binds)
    for number, (name, value, pcr) in enumerate(bound, start=1):
        digests = [bind.digest for bind in binds if (bind.name, bind.value) == (name, value)]
        condition = {"StringEquals": {f"{_CONTEXT}{name}": value}} | _differs(pcr, digests)
        yield _deny(f"DenyOtherPCR{pcr}ForBind{number}", condition)


def _warnings(pinned: Iterable[int]) -> Iterable[str]:
    yield (
        "whoever may call kms:PutKeyPolicy can remove these conditions: CloudTrail shows that, "
        "nothing prevents it"
    )
    if 8 in pinned:
        yield (
            "PCR8 admits every image signed with this certificate, older ones too: "
            "use one certificate per application and environment"
        )
    if {0, 1, 2} & set(pinned):
        yield (
            "PCR0, PCR1 and PCR2 change with every build: render this policy anew for each, or "
            "use PCR8 alone"
        )
