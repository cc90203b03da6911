"""How far a command is, for whoever sits at a terminal."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

_MANY: Final = 10  # entries, from which on it is shown at once
_LARGE: Final = 8 << 20  # bytes, the same
_PATIENCE: Final = 1.0  # seconds, after which it is shown in any case
_PAUSE: Final = 0.1  # seconds between two lines
_CLEAR: Final = "\r\x1b[K"


class Progress:
    """A line on the terminal while something takes long, and none when it has ended; silence where
    standard error is no terminal.

    `total` is how many entries there are, if there are entries; `done` says what is done to bytes.
    Without `shows` there is none on a terminal either, where it would be amid another program's
    output. Leaving the context clears the line.
    """

    def __init__(self, done: str, total: int = 0, *, shows: bool = True) -> None:
        self._terminal = (
            shows
            and sys.stderr is not None
            and sys.stderr.isatty()
            and os.environ.get("TERM") != "dumb"
        )
        self._done, self._total = done, total
        self._entries = self._bytes = 0
        self._began, self._shown = time.monotonic(), 0.0

    def count(self) -> None:
        """One more entry is complete."""
        self._entries += 1
        self._show()

    def add(self, count: int) -> None:
        """So many more bytes are done."""
        self._bytes += count
        self._show()

    def counting(self, append: Callable[[bytes], object]) -> Callable[[bytes], None]:
        """What appends a piece, and counts its bytes."""

        def append_and_count(piece: bytes) -> None:
            append(piece)
            self.add(len(piece))

        return append_and_count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._write(_CLEAR)

    def _show(self) -> None:
        now = time.monotonic()
        long = self._total >= _MANY or self._bytes >= _LARGE or now - self._began >= _PATIENCE
        if self._terminal and long and now - self._shown >= _PAUSE:
            self._shown = now
            self._write(f"\rattestor: {self._text()}\x1b[K")

    def _text(self) -> str:
        entries = [f"{self._entries} of {self._total}"] if self._total else []
        return ", ".join([*entries, f"{_size(self._bytes)} {self._done}"])

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def _size(count: int) -> str:
    """A number of bytes in the unit that fits it."""
    for shift, unit in ((20, "MiB"), (10, "KiB")):
        if count >> shift:
            return f"{count >> shift} {unit}"
    return f"{count} bytes"
