"""SIGINT, SIGTERM and SIGHUP in the process of the command: one thread owns them.

No handler raises an exception: it would come out of any bytecode, such as one amid an import whose
lock it then leaves held. The three signals are blocked in every thread. One thread waits for them;
it lets a placement of files finish, removes what has a temporary name, and ends the process as the
signal would have. A program that imports this package keeps its own handlers, since nothing here
happens before `hold.hold` and `SignalOwner.start` are called.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NoReturn

from attestor_io.hold import taken_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_WAKE: Final = signal.SIGUSR1
"""Ends the thread: sent to it alone, and blocked in it alone."""


def end_by(number: int) -> NoReturn:
    """End the process as this signal does; as process 1, which signals do not end, by 128 + N."""
    if os.getpid() != 1:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    os._exit(128 + number)


class Interrupted(BaseException):
    """A signal that came before the point of no return; no `except Exception` must swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class SignalOwner:
    """The thread that takes the signals, and the names on disk that it must know of.

    Names change only between `enter` and `leave`: meanwhile a signal waits. Whoever has placed a
    secret does not leave any more, so that the process ends with its result.
    """

    def __init__(self) -> None:
        self.clean_up: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self._entered = self._ended = self._handing_over = False
        self._signals: set[int] = set()
        self._taken = 0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread; `hold` must have been called before any other was started."""
        self._signals = taken_signals()
        if not self._signals:
            return
        self._thread = threading.Thread(target=self._serve, name="signals", daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {_WAKE})  # which the thread inherits
        self._thread.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def enter(self) -> None:
        """Begin to change names on disk; from here on a signal waits."""
        with self._changed:
            # one that has come already ends the process: nothing may change any more
            while self._ended or signal.sigpending() & self._signals:
                self._changed.wait()
            self._entered = True

    def leave(self) -> None:
        """End the change of names, with no secret placed: a signal that waits ends the process."""
        with self._changed:
            self._entered = False
            self._changed.notify_all()

    @contextmanager
    def handed_over(self) -> Iterator[None]:
        """Let the signals act by themselves again, so that execve leaves none blocked or lost.

        Raises Interrupted if one has come already. Whatever comes within the block ends this
        process or reaches the program: it is the same process, which the signal finds either way.
        Leaving the block, since execve failed, blocks them again.
        """
        self._stop()
        number = self._taken or min(signal.sigpending() & self._signals, default=0)
        if number:
            raise Interrupted(number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)

    def _stop(self) -> None:
        """End the thread; the signal that it may have taken meanwhile is in `_taken`."""
        if self._thread is None:
            return
        with self._changed:
            self._handing_over = True
            self._changed.notify_all()
        # it ends for nothing else, so that it is still there to be woken
        signal.pthread_kill(self._thread.ident or 0, _WAKE)
        self._thread.join()
        self._thread = None

    def _serve(self) -> None:
        while True:
            number = signal.sigwait({*self._signals, _WAKE})
            if number == _WAKE:
                if self._handing_over:  # another's may have been pending
                    return
                continue
            with self._changed:
                self._changed.wait_for(lambda: not self._entered or self._handing_over)
                if self._handing_over:
                    self._taken = number
                    continue
                self._ended = True
            self.clean_up()
            end_by(number)


owner: Final = SignalOwner()
