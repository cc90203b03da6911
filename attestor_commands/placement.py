"""Several targets that are there together, or not at all."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from attestor_io.errors import OutputError
from attestor_io.secret_file import SecretFile, signals

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


class Placement:
    """Files that get their names after all of them are complete; a context manager.

    Each target is absent or complete at any moment. Leaving with an error, or a signal while the
    names are given, takes back what was placed, and puts back what was replaced.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._targets: list[SecretFile] = []
        self._lock = threading.Lock()
        self._left = False

    def add(
        self, path: str, *, force: bool, mode: int = 0o600, owner: tuple[int, int] = (-1, -1)
    ) -> SecretFile:
        """One more target; raises OutputError if it cannot be written."""
        target = self._stack.enter_context(SecretFile(path, force=force, mode=mode, owner=owner))
        self._targets.append(target)
        return target

    def append(self, target: SecretFile, data: bytes) -> None:
        """Write more of a target; any thread may, for its descriptor is not closed meanwhile."""
        with self._lock:
            if self._left:
                raise OutputError("the placement was given up")
            target.append(data)

    def place(self) -> None:
        """Give every target its name; each must be sealed."""
        for target in self._targets:
            target.place(keep=True)
        signals.point_of_no_return()
        for target in self._targets:
            target.settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signals.point_of_no_return()  # a second signal must not stop the taking back
        with self._lock:
            self._left = True
        self._stack.__exit__(kind, error, trace)
