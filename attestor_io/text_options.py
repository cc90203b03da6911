"""Values of options and arguments that can be none: refused before anybody makes use of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import click

from attestor_io.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from click.shell_completion import CompletionItem

# `a=b,c=d` is two pairs to the AWS CLI, and one to us
_SHORTHAND: Final = r",\s*([^,=\s]+)="


class Text(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.4 on
    """The value of an option that KMS, a policy or a manifest takes: text, and so UTF-8.

    Of other bytes Python makes characters that exist nowhere else (PEP 383), and each library an
    error of its own, or something that was not asked for.
    """

    name = "text"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:  # noqa: ARG002 - as click calls it
        """Return the value as it is; raises InputError, which does not repeat it."""
        if isinstance(value, str) and not _is_text(value):
            raise InputError(f"{param.opts[0]} is not UTF-8 text")
        return value


def _is_text(value: str) -> bool:
    return not any("\ud800" <= one <= "\udfff" for one in value)


class FileName(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # as above
    """The name of a file: any bytes, but not none, as of a shell's variable that is not set."""

    name = "file"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:  # noqa: ARG002 - as click calls it
        """Return the value as it is; raises InputError."""
        if value == "":
            what = param.human_readable_name if isinstance(param, click.Argument) else param.opts[0]
            raise InputError(f"{what} is empty", "perhaps a variable of the shell is not set")
        return value

    def shell_complete(
        self,
        ctx: Any,  # noqa: ARG002 - as click calls it
        param: Any,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem]:
        """Let the shell complete the names of files."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


def complete_from(values: Iterable[str]) -> Callable[[Any, Any, str], list[str]]:
    """Let the shell complete an option's value from these, as click's `shell_complete`."""
    return lambda _context, _option, incomplete: [
        value for value in values if value.startswith(incomplete)
    ]


def demand_text(command: click.Command) -> click.Command:
    """Have every option of a command be text, unless it names a file: Linux takes any bytes.

    A single argument, and an option that names a file, is not empty.
    """
    for parameter in command.params:
        if parameter.type is not click.STRING or parameter.nargs != 1:
            continue
        is_file = isinstance(parameter, click.Argument) or parameter.metavar == "FILE"
        parameter.type = FileName() if is_file else Text()
    for inner in getattr(command, "commands", {}).values():
        demand_text(inner)
    return command


def parse_pairs(
    _context: click.Context, option: click.Parameter, texts: Sequence[str]
) -> dict[str, str]:
    """NAME=VALUE pairs as an option's values, which no message repeats; raises InputError."""
    what = option.opts[0]
    return _unique((_pair(text, what) for text in texts), what)


def parse_context(
    _context: click.Context, option: click.Parameter, texts: Sequence[str]
) -> dict[str, str]:
    """An encryption context: NAME=VALUE pairs, or JSON objects of strings; raises InputError.

    These are notations of the AWS CLI. Its shorthand of several pairs in one text is refused, since
    that may as well be one value with a comma in it: both can be said in another way.
    """
    what = option.opts[0]
    pairs: list[tuple[str, str]] = []
    for text in texts:
        if text.startswith("{"):
            pairs += _json_pairs(text, what)
        else:
            pairs.append(_pair(text, what))
            _refuse_shorthand(*pairs[-1], what)
    return _unique(pairs, what)


def _pair(text: str, what: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InputError(f"{what} wants NAME=VALUE")
    return name, value


def _unique(pairs: Iterable[tuple[str, str]], what: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for name, value in pairs:
        if name in values:
            raise InputError(f"{what} names {name} twice")
        values[name] = value
    return values


def _refuse_shorthand(name: str, value: str, what: str) -> None:
    second = re.search(_SHORTHAND, value)
    if second:
        raise InputError(
            f"{what} {name}=...,{second[1]}=... is two pairs, or one value with a comma in it?",
            f"two pairs: {what} {name}=... {what} {second[1]}=...",
            f'one value: {what} \'{{"{name}": "..."}}\'',
        )


def _json_pairs(text: str, what: str) -> list[tuple[str, str]]:
    """The members of a JSON object of strings; raises InputError."""
    import json

    wanted = f"{what} that begins with {{ wants a JSON object of strings, or NAME=VALUE"
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise InputError(wanted) from error
    if not all(name and type(value) is str for name, value in pairs):
        raise InputError(wanted)
    if not all(_is_text(part) for pair in pairs for part in pair):
        raise InputError(f"{what} is not UTF-8 text")
    return list(pairs)


class _Pairs(list[tuple[str, Any]]):
    """The members of a JSON object in their order, repeated names among them."""
