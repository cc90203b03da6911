"""The variables of a manifest: the parent's claims, which must match what the manifest declares.

They are filled in after parsing, and cannot become a path separator.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from attestor_commands.inject.fields import VARIABLE_FIELDS, check_table, nearest
from attestor_io.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from attestor_io.deadline import Deadline
    from attestor_io.vsock import Address

VALUE_MAX: Final = 1024
DEFAULT_PATTERN: Final = "[A-Za-z0-9._-]{1,64}"

_REFERENCE: Final = re.compile(r"\$\{([^}]*)\}|\$\{")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_SEPARATORS: Final = frozenset("/\\?#%")


class Variables:
    """The declared variables and their values; one without a value is an error only where it is
    used.
    """

    def __init__(
        self,
        declared: Mapping[str, Any],
        given: Mapping[str, str],
        environment: Mapping[str, str],
        imds_vsock: Address | None,
        deadline: Deadline,
    ) -> None:
        for name in given:
            if name not in declared:
                raise InputError(
                    f"--set {name}: the manifest declares no such variable",
                    *nearest(name, declared),
                )
        from attestor_io.metadata import tag as instance_tag

        self._values: dict[str, str | None] = {}
        for name, declaration in declared.items():
            if not _NAME.fullmatch(name):
                raise InputError(f"variables: {name} is not a name of letters, digits and _")
            pattern, tag = _declaration(name, declaration)
            value = given.get(name, environment.get(name))
            if value is None and tag is not None:
                value = instance_tag(tag, imds_vsock, deadline)
            self._values[name] = value
            if value is not None and not _matches(pattern, value, name):
                raise InputError(f"value of variable {name} does not match {pattern}")

    @property
    def values(self) -> dict[str, str]:
        """The variables that have a value."""
        return {name: value for name, value in self._values.items() if value is not None}

    def fill(self, text: str, where: str, *, in_path: bool = False) -> str:
        """The text with its references replaced; in a path no value may bring a separator."""

        def value_of(reference: re.Match[str]) -> str:
            name = reference[1]
            if name not in self._values:
                what = f"undeclared variable {name}" if name else "${ without a name"
                raise InputError(f"{where}: {what}", *nearest(name or "", self._values))
            value = self._values[name]
            if value is None:
                raise InputError(
                    f"{where}: variable {name} has no value", f"--set {name}=VALUE gives one"
                )
            if in_path and (_SEPARATORS.intersection(value) or value in {"", ".", ".."}):
                raise InputError(f"{where}: value of variable {name} is no part of a path")
            return value

        return _REFERENCE.sub(value_of, text)


def _declaration(name: str, declaration: Any) -> tuple[str, str | None]:
    """Pattern and instance tag of a variable, which is declared as a pattern or as a table."""
    if isinstance(declaration, str):
        return declaration or DEFAULT_PATTERN, None
    if not isinstance(declaration, dict):
        raise InputError(f"variables: {name} must be a pattern, or a table with pattern and tag")
    check_table(declaration, VARIABLE_FIELDS, f"variables: {name}")
    return declaration.get("pattern", DEFAULT_PATTERN), declaration.get("tag")


def _matches(pattern: str, value: str, name: str) -> bool:
    try:
        found = re.compile(pattern).fullmatch(value[: VALUE_MAX + 1])
    except re.error as error:
        raise InputError(
            f"variables: pattern of {name} is no regular expression: {error}"
        ) from error
    return found is not None and len(value) <= VALUE_MAX and value.isprintable()
