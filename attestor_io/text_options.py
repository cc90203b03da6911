"""Options whose values are text: what is not UTF-8 is refused before anybody makes use of it."""

from __future__ import annotations

from typing import Any

import click

from attestor_io.errors import InputError


class Text(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.4 on
    """The value of an option that KMS, a policy or a manifest takes: text, and so UTF-8.

    Of other bytes Python makes characters that exist nowhere else (PEP 383), and each library an
    error of its own, or something that was not asked for.
    """

    name = "text"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:  # noqa: ARG002 - as click calls it
        """Return the value as it is; raises InputError, which does not repeat it."""
        if isinstance(value, str) and any("\ud800" <= one <= "\udfff" for one in value):
            raise InputError(f"{param.opts[0]} is not UTF-8 text")
        return value


def demand_text(command: click.Command) -> click.Command:
    """Have every option of a command be text, unless it names a file: Linux takes any bytes."""
    for option in command.params:
        is_file = option.metavar == "FILE"
        if isinstance(option, click.Option) and option.type is click.STRING and not is_file:
            option.type = Text()
    for inner in getattr(command, "commands", {}).values():
        demand_text(inner)
    return command
