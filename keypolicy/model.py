"""The key policy as data: its statements and conditions, read strictly from JSON.

The elements are those of "IAM JSON policy elements reference" of the IAM User Guide, the condition
keys those of "Condition keys for AWS KMS" of the KMS Developer Guide.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

POLICY_MAX: Final = 131_072
"""The characters that the API of PutKeyPolicy takes, and the most that is read here."""

KEY_POLICY_MAX: Final = 32_768
"""The bytes of a key policy that KMS keeps ("Resource quotas"; the quota cannot be raised)."""

EVERYONE: Final = ("*", "*")
"""The principal of a statement that is about every caller, whether written "*" or {"AWS": "*"}."""

_DEFAULT_VERSION: Final = "2008-10-17"  # what IAM assumes where a policy names none
_VERSIONS: Final = ("2012-10-17", "2008-10-17")
_POLICY_ELEMENTS: Final = frozenset("Version Id Statement".split())
_STATEMENT_ELEMENTS: Final = frozenset(
    "Sid Effect Principal NotPrincipal Action NotAction Resource NotResource Condition".split()
)
_PRINCIPAL_TYPES: Final = frozenset("AWS Service Federated CanonicalUser".split())


class PolicyError(Exception):
    """The text is no key policy, or a request names something that is no principal.

    `hints` say what to do about it, where that is known.
    """

    def __init__(self, message: str, *hints: str) -> None:
        super().__init__(message)
        self.hints = hints


Source = Literal["enclave", "nitrotpm"]
"""Whose attestation document: an enclave's, or that of the NitroTPM of an EC2 instance."""

# ---- condition keys

ATTESTATION: Final = "kms:RecipientAttestation:"
"""What the condition keys for an enclave's attestation document start with."""

NITROTPM_PCRS: Final = range(24)

ENCRYPTION_CONTEXT: Final = "kms:EncryptionContext:"
"""What the condition key for one member of the encryption context starts with, before its name."""


def pcr_condition_key(index: int) -> str:
    """Name the condition key that holds one PCR of the attestation document."""
    return f"{ATTESTATION}PCR{index}"


def nitrotpm_condition_key(index: int) -> str:
    """Name the condition key that holds one PCR of the document of an instance's NitroTPM."""
    return f"{ATTESTATION}NitroTPMPCR{index}"


# ---- the document


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition key under one operator, and the values it is compared with.

    The values are alternatives; all conditions of a statement must hold.
    """

    operator: str
    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement; `number` counts from 1.

    `principals` are pairs of type and identifier, as ("AWS", "arn:...") or EVERYONE. The flags say
    which elements are negated: with `not_action`, `actions` are those of the element NotAction.
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
        """Name the statement in messages, by its number and its Sid."""
        return f"statement {self.number}" + (f" ({self.sid})" if self.sid else "")


@dataclass(frozen=True, slots=True)
class Policy:
    """A key policy, in the order of its statements; `size` is in bytes, 0 where not read."""

    statements: tuple[Statement, ...]
    version: str = _DEFAULT_VERSION
    size: int = 0

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """Read the JSON of a key policy; raises PolicyError."""
        decoded = read_json(text)
        _refuse_answer(decoded)
        document = _members("policy", decoded, _POLICY_ELEMENTS)
        version = document.get("Version", _DEFAULT_VERSION)
        if version not in _VERSIONS:
            raise PolicyError(f"policy has the Version {abbreviated(version)}, expected 2012-10-17")
        items = document.get("Statement")
        if isinstance(items, dict):
            items = [items]
        if not isinstance(items, list) or not items:
            raise PolicyError("policy has no Statement")
        statements = tuple(_statement(number, item) for number, item in enumerate(items, start=1))
        size = len(text if isinstance(text, bytes) else text.encode(errors="replace"))
        return cls(statements, version, size)


def _refuse_answer(decoded: object) -> None:
    """Refuse what the AWS CLI prints around a policy, and say how it prints the policy alone.

    GetKeyPolicy answers {"Policy": TEXT, "PolicyName": NAME}; --query Policy alone prints TEXT as a
    JSON string.
    """
    whole = isinstance(decoded, dict) and isinstance(decoded.get("Policy"), str)
    if whole or isinstance(decoded, str):
        what = "the answer of aws kms get-key-policy" if whole else "a JSON string"
        hint = "aws kms get-key-policy --key-id KEY --query Policy --output text prints the policy"
        raise PolicyError(f"{what} is not the policy, but holds it", hint)


def _statement(number: int, item: object) -> Statement:
    """Read one statement from its JSON object."""
    what = f"statement {number}"
    members = _members(what, item, _STATEMENT_ELEMENTS)
    sid, effect = members.get("Sid"), members.get("Effect")
    if sid is not None and not isinstance(sid, str):
        raise PolicyError(f"{what} has a Sid that is not a string")
    if effect not in ("Allow", "Deny"):
        raise PolicyError(f"{what} has the Effect {abbreviated(effect)}, expected Allow or Deny")
    principals, not_principal = _element_or_negation(what, members, "Principal")
    actions, not_action = _element_or_negation(what, members, "Action")
    resources, not_resource = _element_or_negation(what, members, "Resource")
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


def _element_or_negation(
    what: str, members: Mapping[str, object], name: str
) -> tuple[object, bool]:
    """Return the element or its negation, and whether it is the negation; exactly one is there."""
    if (name in members) == (f"Not{name}" in members):
        count = "both" if name in members else "neither"
        raise PolicyError(f"{what} has {count} {name} and Not{name}")
    negated = name not in members
    return members[f"Not{name}" if negated else name], negated


def _principals(what: str, item: object) -> tuple[tuple[str, str], ...]:
    """Read a Principal element into pairs of type and identifier."""
    if item == "*":
        return (EVERYONE,)
    identifiers = _members(f"{what}: Principal", item, _PRINCIPAL_TYPES)
    found = [
        (kind, name)
        for kind, names in identifiers.items()
        for name in _strings(f"{what}: Principal", names)
    ]
    if not found:
        raise PolicyError(f"{what}: Principal is empty")
    return tuple(EVERYONE if pair == ("AWS", "*") else pair for pair in found)


def _conditions(what: str, item: object) -> Iterator[Condition]:
    """Read a Condition element, in which each operator holds an object of keys and their values."""
    if not isinstance(item, dict):
        raise PolicyError(f"{what}: Condition is not a JSON object")
    for operator, keys in item.items():
        if not isinstance(keys, dict):
            raise PolicyError(f"{what}: {abbreviated(operator)} is not a JSON object")
        for key, values in keys.items():
            yield Condition(operator, key, _strings(f"{what}: {abbreviated(operator)}", values))


# ---- JSON


def read_json(text: str | bytes) -> object:
    """Decode one JSON document of at most POLICY_MAX characters, or raise PolicyError."""
    if len(text) > POLICY_MAX:
        raise PolicyError(f"JSON has {len(text)} characters, expected at most {POLICY_MAX}")
    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        return json.loads(
            decoded, object_pairs_hook=_object_of_unique_names, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"not a JSON document: {error}") from error


def _object_of_unique_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make an object of its members, or refuse a repeated name, of which readers could pick any."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("an object repeats a name")
    return members


def _refuse_constant(name: str) -> object:
    """Refuse NaN and Infinity, which Python's reader takes and JSON does not have."""
    raise ValueError(f"{name} is no JSON")


def _members(what: str, item: object, allowed: frozenset[str]) -> dict[str, Any]:
    """Return the members of a JSON object after making sure that it has no unknown ones."""
    if not isinstance(item, dict):
        raise PolicyError(f"{what} is not a JSON object")
    for name in item:
        if name not in allowed:
            expected = ", ".join(sorted(allowed))
            raise PolicyError(f"{what} has the element {abbreviated(name)}, expected {expected}")
    return item


def _strings(what: str, item: object) -> tuple[str, ...]:
    """Read a string, or a list of them that is not empty."""
    items = item if isinstance(item, list) else [item]
    if not items:
        raise PolicyError(f"{what} is empty")
    return tuple(_string(what, value) for value in items)


def _string(what: str, value: object) -> str:
    """Read a string; booleans and numbers become their text, as IAM reads them."""
    # before the numbers: a bool of Python is an int, and its text would be "True"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    if not isinstance(value, str):
        raise PolicyError(f"{what} holds something that is not a string")
    return value


# ---- names


def split_arn(arn: str) -> list[str]:
    """Split an ARN into "arn", partition, service, region, account and resource."""
    parts = arn.split(":", 5)
    if len(parts) != 6 or parts[0] != "arn":
        raise PolicyError(f"{abbreviated(arn)} is not an ARN")
    return parts


def mixed_partitions(names: Iterable[str]) -> str:
    """Say of which partitions these ARNs are, where they are of several; else empty."""
    found = sorted({name.split(":")[1] for name in names if name.startswith("arn:")} - {"*"})
    if len(found) < 2:
        return ""
    return (
        f"ARNs are of the partitions {', '.join(found)}: KMS knows the principals of its own alone"
    )


def iam_entity_type(arn: str) -> str:
    """Tell what an IAM ARN names: "role", "user" or "root"; "" for others and for wildcards."""
    found = re.fullmatch(r"arn:[a-z-]+:iam::\d{12}:(?:(role|user)/[^*?\s]+|(root))", arn)
    return (found[1] or found[2]) if found else ""


def is_key_arn(text: str) -> bool:
    """Tell whether this is the ARN of one key of KMS: not of an alias, and no pattern."""
    arn = r"arn:aws[a-z-]*:kms:[a-z0-9-]+:\d{12}:key/[A-Za-z0-9-]+"
    return bool(re.fullmatch(arn, text))


def abbreviated(value: object) -> str:
    """Quote a value that came from outside for a message, cut to a bearable length."""
    return repr(value)[:80]
