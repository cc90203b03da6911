"""Condition operators and wildcards of IAM, in three-valued logic: None is what cannot be told.

"IAM JSON policy elements: Condition operators", "Conditions with multiple context keys or values"
and "Set operators for multivalued context keys" of the IAM User Guide are the sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple, Self

if TYPE_CHECKING:
    from keypolicy.model import Condition, Statement

Comparison = Callable[[str, str], bool | None]
"""Takes a value of the policy and one of the request; None where the policy's is malformed."""


# ---- three-valued logic (Kleene's)


def conjunction(parts: Iterable[bool | None]) -> bool | None:
    """Tell whether all parts hold: one that does not decides, else one that is unknown."""
    seen = tuple(parts)
    if False in seen:
        return False
    return None if None in seen else True


def disjunction(parts: Iterable[bool | None]) -> bool | None:
    """Tell whether any part holds: one that does decides, else one that is unknown."""
    seen = tuple(parts)
    if True in seen:
        return True
    return None if None in seen else False


# ---- wildcards


def matches_wildcards(pattern: str, text: str) -> bool:
    """Match a whole text with a pattern of IAM's wildcards, * and ?.

    It takes time proportional to the product of the lengths, since a policy may be hostile: after a
    mismatch only the last * takes one character more, which leaves nothing out that an earlier *
    could have found.
    """
    star, retry, at, index = -1, 0, 0, 0
    while index < len(text):
        # before the literal: a * of the pattern is a wildcard where the text has a *, too
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


def covers_action(statement: Statement, action: str) -> bool:
    """Tell whether a statement is about an action, by Action or NotAction; actions have no case."""
    wanted = action.lower()
    listed = any(matches_wildcards(pattern.lower(), wanted) for pattern in statement.actions)
    return listed != statement.not_action


def covers_resource(statement: Statement, resource: str) -> bool:
    """Tell whether a statement is about a resource, by Resource or NotResource."""
    listed = any(matches_wildcards(pattern, resource) for pattern in statement.resources)
    return listed != statement.not_resource


def _matches_arn(pattern: str, arn: str) -> bool | None:
    """Match an ARN with a pattern; None where the pattern is no ARN.

    Each of the six parts is matched on its own, so that a wildcard spans no colon but in the last.
    """
    patterns, parts = pattern.split(":", 5), arn.split(":", 5)
    if len(patterns) != 6:
        return None
    return len(parts) == 6 and all(map(matches_wildcards, patterns, parts))


# ---- operators

_COMPARISONS: Final[Mapping[str, Comparison]] = {
    "stringequals": lambda pattern, value: pattern == value,
    "stringequalsignorecase": lambda pattern, value: pattern.lower() == value.lower(),
    "stringlike": matches_wildcards,
    "arnequals": _matches_arn,  # the documentation has both behave alike
    "arnlike": _matches_arn,
    "bool": lambda pattern, value: pattern.lower() == value.lower(),
}
_NEGATED: Final = {
    "stringnotequals": "stringequals",
    "stringnotequalsignorecase": "stringequalsignorecase",
    "stringnotlike": "stringlike",
    "arnnotequals": "arnequals",
    "arnnotlike": "arnlike",
}
_NUMBER_TESTS: Final = (
    "equals notequals lessthan lessthanequals greaterthan greaterthanequals".split()
)
_NOT_COMPARED: Final = frozenset(
    f"{kind}{test}" for kind in ("numeric", "date") for test in _NUMBER_TESTS
) | {"binaryequals", "ipaddress", "notipaddress", "null"}


class Operator(NamedTuple):
    """A condition operator taken apart, all of it in lower case since operators have no case.

    ForAnyValue:StringNotLikeIfExists is ("foranyvalue", "stringnotlike", True).
    """

    quantifier: str | None
    name: str
    if_exists: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        """Take an operator apart; with an unknown quantifier, the whole text is the name."""
        quantifier, colon, name = text.lower().rpartition(":")
        if colon and quantifier not in ("forallvalues", "foranyvalue"):
            return cls(None, text.lower(), if_exists=False)
        if_exists = name.endswith("ifexists")
        return cls(quantifier or None, name.removesuffix("ifexists"), if_exists)

    @property
    def negated(self) -> bool:
        """Whether the operator holds for values that differ, as StringNotEquals does."""
        return self.name in _NEGATED

    @property
    def comparison(self) -> Comparison | None:
        """How a pattern is compared with a value, before negation; None where it is not here."""
        return _COMPARISONS.get(_NEGATED.get(self.name, self.name))

    @property
    def known(self) -> bool:
        """Whether IAM has this operator, be it evaluated here or not."""
        return self.comparison is not None or self.name in _NOT_COMPARED


def compare(condition: Condition, actual: tuple[str, ...]) -> tuple[bool | None, str]:
    """Compare a condition with the request's values of its key, none where the key is absent.

    Returns whether it holds, None where that cannot be told, and the reason in that case.
    """
    operator = Operator.parse(condition.operator)
    # Null and then the absent key come first: no value is compared for either.
    if operator.name == "null":
        return _holds_null(condition, actual), "Null takes true or false"
    comparison = operator.comparison
    if comparison is None:
        return None, "this operator is not evaluated here"
    if not actual:
        return _holds_for_absent_key(operator), "the key is absent"
    if operator.quantifier is None and len(actual) > 1:
        note = "the key has several values, but the operator neither ForAllValues nor ForAnyValue"
        return None, note
    each = [_holds_for_value(condition, operator, comparison, value) for value in actual]
    held = disjunction(each) if operator.quantifier == "foranyvalue" else conjunction(each)
    return held, "a value is a policy variable, or no pattern for this operator"


def _holds_null(condition: Condition, actual: tuple[str, ...]) -> bool | None:
    """Tell whether Null holds: "true" wants the key absent, "false" wants it there."""
    wanted = {value.lower() for value in condition.values}
    if not wanted <= {"true", "false"} or ":" in condition.operator:
        return None
    return str(not actual).lower() in wanted


def _holds_for_absent_key(operator: Operator) -> bool | None:
    """Tell whether an operator holds for a key that the request lacks, whatever its values."""
    # before negation: ForAnyValue needs a value that differs, StringNotEquals alone does not
    if operator.quantifier == "foranyvalue":
        return None if operator.if_exists else False  # no documentation says how the two combine
    return operator.negated or operator.if_exists or operator.quantifier == "forallvalues"


def _holds_for_value(
    condition: Condition, operator: Operator, comparison: Comparison, value: str
) -> bool | None:
    """Tell whether a value matches one of the patterns, or none where the operator is negated."""
    found = disjunction(
        None if "${" in pattern else comparison(pattern, value) for pattern in condition.values
    )
    return found if found is None else found != operator.negated
