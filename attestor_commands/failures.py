"""Failures of a command that goes on: said on standard error, and not more often than helps."""

from __future__ import annotations

import os
import threading
import time
from typing import Final

from attestor import say
from attestor_io.errors import AttestorError, UnreachableError
from attestor_io.shortage import shortage

_TELL_SECONDS: Final = 60.0  # between two lines of one class
_CLASSES_MAX: Final = 64


class Failures:
    """Says on standard error that calls fail: of each class one line at once, and then at most one
    a minute, with how many there were.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._said: dict[str, float] = {}

    def tell(self, kind: str, said: str) -> None:
        """Count a failure of this class, and say it if it is time."""
        now = time.monotonic()
        with self._lock:
            if kind not in self._said and len(self._said) >= _CLASSES_MAX:
                kind = "other errors"
            count = self._counts.get(kind, 0) + 1
            self._counts[kind] = count
            if now - self._said.get(kind, -_TELL_SECONDS) < _TELL_SECONDS:
                return
            self._said[kind], self._counts[kind] = now, 0
        times = f" ({count} times since the last such line)" if count > 1 else ""
        say("warning", f"{kind}: {said}{times}")


def unexpected(error: Exception) -> AttestorError:
    """A bug as an error of ours, with nothing of its message; or a lack of memory or the like."""
    if short := shortage(error):
        return UnreachableError(short)
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    file = os.path.basename(trace.tb_frame.f_code.co_filename) if trace else "nowhere"
    line = trace.tb_lineno if trace else 0
    return AttestorError(f"unexpected {type(error).__name__} at {file}:{line}")
