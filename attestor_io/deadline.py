"""The one moment by which a command is done: it starts with the command, and is handed on."""

from __future__ import annotations

import time
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, TypeVar

from attestor_io.background import run_in_background
from attestor_io.errors import UnreachableError

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")


class Deadline:
    """So many seconds from now on, for everything that is waited for; `seconds` is for messages."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def __repr__(self) -> str:
        return f"Deadline({self.seconds:g})"

    @property
    def left(self) -> float:
        """The seconds that are left; 0 once it has passed."""
        return max(0.0, self._end - time.monotonic())

    def within(self, seconds: float) -> Deadline:
        """The earlier one of this deadline and of another one that starts now."""
        return self if self.left <= seconds else Deadline(seconds)

    def call(
        self, work: Callable[[], _T], what: str | Callable[[], str] = "no answer of KMS"
    ) -> _T:
        """Return what `work` gives in time, else raise UnreachableError, which says `what`: a
        function is asked once it is too late.

        The work then goes on in its thread, with nobody to hear of it: nothing else ends a call of
        the C library, such as one that resolves a name.
        """
        try:
            return run_in_background(work).result(self.left)
        except FutureTimeoutError:
            raise self.passed(what if isinstance(what, str) else what()) from None

    def passed(self, what: str) -> UnreachableError:
        """The error of whoever found it passed."""
        return UnreachableError(f"{what} within {self.seconds:g} seconds")
