"""Reports on standard output: JSON for programs, and text of at most WIDTH columns for people.

Values that came from outside are shown without anything that could steer a terminal.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import click

from attestor_io.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

WIDTH: Final = 100
LABEL: Final = 16  # columns before a value
Object = dict[str, Any]


def print_report(report: Object, text: Callable[[Object], str], *, as_json: bool) -> None:
    """Print a report as JSON or as its text; raises OutputError."""
    import json

    shown = json.dumps(report, indent=2) if as_json else text(report)
    if sys.stdout is None:
        raise OutputError("standard output is closed")
    try:
        click.echo(shown.encode() + b"\n" if shown else b"", nl=False)
    except OSError as error:
        raise OutputError(f"standard output cannot be written: {error.strerror}") from error


def age(seconds: int) -> str:
    """A distance in time, as "12 s ago"."""
    past = abs(seconds)
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if past >= 2 * size:
            return f"{past // size} {unit} {'ago' if seconds >= 0 else 'ahead of this clock'}"
    return f"{past} s {'ago' if seconds >= 0 else 'ahead of this clock'}"


def field(label: str, value: str) -> list[str]:
    """Lines that begin with a label."""
    return wrapped(value, f"{label:{LABEL}}", hanging=" " * LABEL)


def wrapped(text: str, indent: str, width: int = WIDTH, *, hanging: str | None = None) -> list[str]:
    """Lines of at most WIDTH columns; a value without spaces is cut where it must be."""
    import textwrap

    shown = "".join(character if character.isprintable() else "?" for character in text)
    return textwrap.wrap(
        shown,
        width,
        initial_indent=indent,
        subsequent_indent=indent if hanging is None else hanging,
        break_on_hyphens=False,
    ) or [indent.rstrip()]


def utc(time: datetime) -> str:
    """A time in UTC, to the second (ISO 8601)."""
    from datetime import UTC

    return time.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
