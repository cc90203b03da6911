"""SIGINT, SIGTERM and SIGHUP in the process of the command: one thread owns them.

No handler raises an exception: it would come out of any bytecode, such as one amid an import whose
lock it then leaves held. The three signals are blocked in every thread. One thread waits for them;
it lets a placement of files finish, removes what has a temporary name, and ends the process as the
signal would have. A program that imports this package keeps its own handlers, since nothing here
happens before `hold.hold` and `SignalOwner.start` are called.

A command that stays beside a program of its own takes more of them (`SignalOwner.take_more`), and
once that program runs gets all of them itself (`SignalOwner.hand_to`).
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

    Receive = Callable[[int, int], None]
    """Given a signal's number and its si_code (sigaction(2)), which tells who sent it."""

PASSED_ON: Final = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
    signal.SIGTSTP,
    signal.SIGCONT,
)
"""What whoever starts a program may send it by way of the process that stays beside it."""

_WAKE: Final = signal.SIGUSR1
"""Ends the thread: sent to it alone, and blocked in it alone unless USR1 is taken as well."""

# signal(7): by default these end no process
_HARMLESS: Final = frozenset({signal.SIGCHLD, signal.SIGCONT, signal.SIGWINCH, signal.SIGTSTP})


def end_by(number: int) -> NoReturn:
    """End the process as this signal does; as process 1, which signals do not end, by 128 + N."""
    if os.getpid() != 1:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    os._exit(128 + number)


def stop() -> None:
    """Stop the process as SIGTSTP does, so that whoever started it can go on with it by SIGCONT.

    In a process group that nobody could go on with, such as that of a terminal's first process, the
    kernel does not stop anybody by SIGTSTP (setpgid(2)): SIGSTOP would, and for ever.
    """
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTSTP})
    signal.pthread_kill(threading.get_ident(), signal.SIGTSTP)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
        self._receive: Receive | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread; `hold` must have been called before any other was started."""
        self._signals = taken_signals()
        if self._signals:
            self._start()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._serve, name="signals", daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {_WAKE})  # which the thread inherits
        self._thread.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def take_more(self) -> None:
        """Take those of PASSED_ON as well, and SIGCHLD, for a program that is still to start.

        To be called before there is any other thread, since all that start later inherit the mask.
        Until `hand_to` is called the signals that end a process still end this one.
        """
        self._stop()
        if self._taken:
            end_by(self._taken)
        # an ignored one, which whoever started us may have left so, would reap children for us
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._signals = {signal.SIGCHLD, *taken_signals(PASSED_ON)}
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        self._handing_over = False
        self._start()

    def hand_to(self, receive: Receive) -> None:
        """Have `receive` called with every signal from here on, in the thread that takes them.

        Raises Interrupted if one that ends a process has come already.
        """
        with self._changed:
            number = self._taken or min(self._pending_ends(), default=0)
            if number:
                raise Interrupted(number)
            self._receive = receive
            self._changed.notify_all()

    def enter(self) -> None:
        """Begin to change names on disk; from here on a signal waits."""
        with self._changed:
            # one that has come already ends the process: nothing may change any more
            while self._ended or (self._receive is None and self._pending_ends()):
                self._changed.wait()
            self._entered = True

    def leave(self) -> None:
        """End the change of names, with no secret placed: a signal that waits ends the process."""
        with self._changed:
            self._entered = False
            self._changed.notify_all()

    def finish(self) -> None:
        """Let a change of names finish, let none begin any more, and clean up: the end is near."""
        with self._changed:
            self._changed.wait_for(lambda: not self._entered)
            self._ended = True
        self.clean_up()

    def clean_up_first(self, work: Callable[[], None]) -> None:
        """Have whoever ends the process do this before all that was to be done so far."""
        then = self.clean_up

        def clean_up() -> None:
            work()
            then()

        self.clean_up = clean_up

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

    def _pending_ends(self) -> set[int]:
        """The signals that wait, and that end a process."""
        return set(signal.sigpending()) & self._signals - _HARMLESS

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
            found = signal.sigwaitinfo({*self._signals, _WAKE})
            number = found.si_signo
            if number == _WAKE and self._handing_over:
                return
            if number not in self._signals:  # another's USR1, which may have been pending
                continue
            if self._receive is None and self._ends(number):
                self.clean_up()
                end_by(number)
            if self._receive is not None:
                self._receive(number, found.si_code)

    def _ends(self, number: int) -> bool:
        """Whether a signal ends the process now, once no names are being changed."""
        if number in _HARMLESS:
            if number == signal.SIGTSTP:
                stop()
            return False
        with self._changed:
            self._taken = number
            self._changed.wait_for(
                lambda: not self._entered or self._handing_over or self._receive is not None
            )
            self._ended = not (self._handing_over or self._receive is not None)
            return self._ended


owner: Final = SignalOwner()
