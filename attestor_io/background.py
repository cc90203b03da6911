"""Work in threads that nobody has to wait for, and that are safe to fork beside."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")


def run_in_background(work: Callable[[], _T]) -> Future[_T]:
    """Run `work` in a daemon thread of its own: a deadline or a signal need not wait for it."""
    future: Future[_T] = Future()
    threading.Thread(target=_run, args=(future, work), daemon=True).start()
    return future


class IdleWorker:
    """A daemon thread that does one piece of work after the other, and idles instead of ending.

    A thread that has used OpenSSL and ends runs OpenSSL's exit handlers, which hold its locks while
    Python already calls the thread finished. Whoever forks in that moment gets a child in which
    these locks are held for ever, and key generation hangs there. A thread that waits for work
    holds none of them.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        """Have `work` done after all that was submitted before it."""
        future: Future[_T] = Future()
        self._work.put((future, work))
        return future

    def _serve(self) -> None:
        while True:
            _run(*self._work.get())


def _run(future: Future[_T], work: Callable[[], _T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - raised where the result is awaited
        future.set_exception(error)
