"""`attestor inject --watch`: beside its program, for as long as that runs.

One loop in the main thread does all that changes anything: it starts and ends the program, gives
files their names, and passes signals on. What takes long, which is fetching, is done in a thread,
and what waits for signals is a thread, too (`attestor_io.signals`): both hand the loop work to do.
Since one thread alone reaps and sends signals, a process id is never that of a stranger.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hmac
import os
import queue
import signal
import time
from concurrent.futures import wait
from functools import partial
from typing import TYPE_CHECKING, Final

from attestor import log, say
from attestor_commands.failures import Failures, unexpected
from attestor_commands.inject.fetch import Staying, fetch
from attestor_commands.versions import VERSION, fault_of, number_of
from attestor_io import signals
from attestor_io.background import IdleWorker, run_in_background
from attestor_io.errors import AttestorError, InputError, OutputError, RefusedError
from attestor_io.folder import Folder
from attestor_io.generation import remove_earlier

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from attestor_commands.inject.fetch import Fetched
    from attestor_commands.inject.manifest import Entry, Manifest
    from attestor_commands.inject.order import Order
    from attestor_commands.inject.places import Place
    from attestor_commands.inject.program import Program
    from attestor_commands.placement import Placement

_KERNEL: Final = 0x80  # SI_KERNEL, asm-generic/siginfo.h: a terminal's, not a process's
# what a terminal sends to every process of its foreground, so to the program as well (termios(3))
_OF_TERMINAL: Final = frozenset({signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGWINCH})
_ENDING: Final = frozenset({signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})
_DIGEST_KEY: Final = 32  # bytes
_UNSAID_MAX: Final = 16  # lines
_MOMENT: Final = 1.0  # seconds


@dataclasses.dataclass(slots=True)
class _InPlace:
    """What is known of what is in place, by the entries' order; no plaintext.

    A digest is keyed with random bytes of this process. It is compared in constant time; who can
    read this memory could read the program's, too.
    """

    places: tuple[Place, ...]
    generation_folder: str | None
    digests: list[bytes]
    versions: list[int | None]
    passed: dict[str, str]

    @classmethod
    def of(cls, fetched: Fetched) -> _InPlace:
        """What a fetch has brought."""
        manifest = fetched.manifest
        return cls(
            places=manifest.places,
            generation_folder=manifest.generation_folder,
            digests=[outcome.digest for outcome in fetched.outcomes],
            versions=[
                outcome.version if _declares_version(entry) else None
                for entry, outcome in zip(manifest.entries, fetched.outcomes, strict=True)
            ],
            passed=dict(manifest.passed_variables),
        )

    def narrow(self, manifest: Manifest) -> Manifest:
        """The manifest of a refresh: for the same places, and nothing older than what is there.

        Raises InputError and RefusedError.
        """
        if (manifest.places, manifest.generation_folder) != (self.places, self.generation_folder):
            raise InputError("variables now lead to other places than when the program started")
        entries = zip(manifest.entries, self.versions, strict=True)
        narrowed = tuple(_not_older(entry, version) for entry, version in entries)
        return dataclasses.replace(manifest, entries=narrowed)

    def changed(self, fetched: Fetched) -> list[Place]:
        """The places for which a fetch has brought something else."""
        return [
            entry.place
            for entry, outcome, digest in zip(
                fetched.manifest.entries, fetched.outcomes, self.digests, strict=True
            )
            if not hmac.compare_digest(outcome.digest, digest)
        ]


def _declares_version(entry: Entry) -> bool:
    return entry.minimum_version is not None or VERSION in entry.bound.context


def _warn_of_versions(manifest: Manifest) -> None:
    """Say which entries' contexts have a version that cannot be compared with a later one."""
    for entry in manifest.entries:
        version = entry.bound.context.get(VERSION)
        if version is not None and number_of(version) is None:
            line = f"{entry.place}: version in its context is no number, so that a refresh may "
            say("warning", f"{line}bring an older one")


def _not_older(entry: Entry, version: int | None) -> Entry:
    """The entry, which takes nothing that is older than this version: RefusedError."""
    if version is None:
        return entry
    minimum = max(entry.minimum_version or 0, version)
    if VERSION in entry.bound.context:
        fault = fault_of(entry.bound.context[VERSION], minimum)
        if fault:
            raise RefusedError(f"{entry.place} {fault}, since that is in place")
    return dataclasses.replace(entry, minimum_version=minimum)


class _Folders:
    """The folders that everything comes into, held open since there was no program yet.

    One that may write above them could lead a refresh, which may be root's, into any other: so none
    goes there.
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, int]] = {}
        self._held: dict[tuple[int, int], Folder] = {}  # so that no other gets their numbers

    def check(self, placement: Placement) -> None:
        """Refuse folders that are others than those of the first call; raises OutputError."""
        for path, folder in placement.folders:
            try:
                identity = folder.identity()
                if identity != self._found.setdefault(path, identity):
                    raise OutputError(f"{path} is in another folder than when the program started")
                if identity not in self._held:
                    self._held[identity] = Folder(".", folder)
            except OSError as error:
                raise OutputError(f"folder of {path} cannot be held: {error.strerror}") from error


class _Voice:
    """Says what is to be said in a thread: a standard error that nobody reads, such as a full pipe,
    must hold up neither signals nor the program's end.
    """

    def __init__(self) -> None:
        self._worker = IdleWorker()
        self._unsaid: list[Future[None]] = []

    def do(self, say_it: Callable[[], None]) -> None:
        """Say this after all that came before; nothing where too much waits already."""
        self._unsaid = [one for one in self._unsaid if not one.done()]
        if len(self._unsaid) < _UNSAID_MAX:
            self._unsaid.append(self._worker.submit(say_it))

    def has_finished(self) -> bool:
        """Whether all has been said, which is waited for no longer than a moment."""
        return not wait(self._unsaid, _MOMENT).not_done


class Watch:
    """A program, and the secrets that it is given anew for as long as it runs."""

    def __init__(self, order: Order, program: Program, seconds: int) -> None:
        self._order, self._program, self._seconds = order, program, seconds
        self._staying = Staying(os.urandom(_DIGEST_KEY), _Folders().check)
        self._failures, self._voice = Failures(), _Voice()
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._pid = 0  # of the program; 0 while there is none
        self._status: int | None = None  # of the program that ends all, negative for a signal
        self._stop_timeout = 0.0
        self._refreshes = 0
        # moments on the monotonic clock
        self._ending_until = 0.0
        self._kill_at: float | None = None
        self._refresh_at: float | None = None
        self._in_place: _InPlace
        self._successor: Fetched | None = None  # what the program is given once it starts again

    def run(self, manifest: Manifest, *, force: bool) -> int:
        """Place everything, start the program, and watch; the program's exit status.

        If a signal has ended the program, it ends this process as well. Raises an AttestorError
        before the program has started, and ProgramError if it cannot start again.
        """
        gc.enable()  # which a short command does without
        _warn_of_versions(manifest)
        self._stop_timeout = float(manifest.stop_timeout)
        try:
            with fetch(manifest, self._order.receipt, force=force, staying=self._staying) as first:
                first.placement.place_and_start(lambda: self._start_first(first))
                signals.owner.leave()
            self._in_place = _InPlace.of(first)
            self._refresh_at = time.monotonic() + self._seconds
            while self._status is None:
                self._do_next()
        finally:
            if self._pid:  # a bug of ours: nobody would be left to pass signals on
                self._send(signal.SIGTERM)
            self._finish(manifest)
        said = self._voice.has_finished()
        if self._status < 0:
            signals.end_by(-self._status)
        if not said:  # whoever flushed standard error would wait as well
            os._exit(self._status)
        return self._status

    def _start_first(self, fetched: Fetched) -> None:
        # in this order: its end must not be missed, and whatever comes from here on is for it
        signals.owner.hand_to(lambda *found: self._work.put(partial(self._take_signal, *found)))
        self._start(fetched)

    def _start(self, fetched: Fetched) -> None:
        self._pid = self._program.start(fetched.deliveries.inheritance())
        self._voice.do(partial(log.info, "program has process id %d", self._pid))

    def _finish(self, manifest: Manifest) -> None:
        """Leave what is in place, and nothing else."""
        signals.owner.finish()
        if manifest.generation_folder is not None:
            remove_earlier(manifest.generation_folder)

    # -- the loop

    def _do_next(self) -> None:
        """Do what the threads have for us, or else what it is time for."""
        moments = [moment for moment in (self._kill_at, self._refresh_at) if moment is not None]
        pause = min(moments) - time.monotonic() if moments else None
        if pause is not None and pause <= 0:
            self._do_in_time(time.monotonic())
            return
        with contextlib.suppress(queue.Empty):
            self._work.get(timeout=pause)()

    def _do_in_time(self, now: float) -> None:
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            line = f"the program does not end within {self._stop_timeout:g} seconds"
            self._voice.do(partial(say, "warning", line))
            self._send(signal.SIGKILL)
        elif self._refresh_at is not None and now >= self._refresh_at:
            self._refresh_at = None
            self._refreshes += 1
            done = partial(self._finish_refresh, now + self._seconds)
            run_in_background(self._fetch).add_done_callback(
                lambda future: self._work.put(partial(done, future))
            )

    # -- signals, and the program's end

    def _take_signal(self, number: int, code: int) -> None:
        if number == signal.SIGCHLD:
            self._reap()
            return
        if number in _ENDING:
            self._ending_until = time.monotonic() + self._stop_timeout
        if not (code == _KERNEL and number in _OF_TERMINAL):
            self._send(number)
        if number == signal.SIGTSTP:  # whoever stops the program means both
            signals.stop()

    @property
    def _is_ending(self) -> bool:
        """Whether the program was asked to end by somebody else, and may be about to."""
        return time.monotonic() < self._ending_until

    def _send(self, number: int) -> None:
        if self._pid:
            try:
                os.kill(self._pid, number)
            except OSError as error:  # it may have become another user's
                self._tell("signal", f"none reaches the program: {error.strerror}")

    def _reap(self) -> None:
        """Take notice of children that have ended; as process 1 also of those that are orphans.

        As process 1 this may be faster than the SDK is with a credential_process of a profile: it
        then sees a success, and judges by the output.
        """
        while self._pid:
            try:
                pid, status = os.waitpid(-1 if os.getpid() == 1 else self._pid, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == self._pid:
                self._take_end(os.waitstatus_to_exitcode(status))
            elif pid == 0:
                return

    def _take_end(self, status: int) -> None:
        """Start the program again if it was to be, or else end as it did."""
        self._pid, self._kill_at = 0, None
        successor, self._successor = self._successor, None
        if successor is None:
            self._status = status
            return
        with successor:
            if self._is_ending:
                self._status = status
            else:
                self._start(successor)
                self._refresh_at = time.monotonic() + self._seconds

    # -- refreshing

    def _fetch(self) -> Fetched:
        """Fetch everything again, in a thread; with new credentials, and the same key pair."""
        manifest = self._in_place.narrow(self._order.manifest())
        return fetch(
            manifest,
            self._order.receipt,
            force=True,
            staying=self._staying,
            shows_progress=False,
        )

    def _finish_refresh(self, next_at: float, future: Future[Fetched]) -> None:
        self._refresh_at = max(next_at, time.monotonic())
        try:
            self._apply(future.result())
        except AttestorError as error:
            self._tell_failure(error)
        except Exception as error:  # noqa: BLE001 - a refresh must not end the program
            self._tell_failure(unexpected(error))
        finally:
            gc.collect()  # a session of the SDK is full of circles, which may hold plaintexts

    def _tell_failure(self, error: AttestorError) -> None:
        kind = f"refresh failed with status {error.status}, and nothing was changed"
        self._tell(kind, str(error))

    def _tell(self, kind: str, said: str) -> None:
        self._voice.do(partial(self._failures.tell, kind, said))

    def _apply(self, fetched: Fetched) -> None:
        """Put what has changed in its place, all of it or nothing, and tell the program."""
        with contextlib.ExitStack() as held:
            held.enter_context(fetched)
            self._reap()  # one that has ended by itself is not started again
            if self._status is not None or self._is_ending:
                return
            changed = self._in_place.changed(fetched)
            found = _InPlace.of(fetched)
            restarts = fetched.manifest.on_change == "restart"
            if changed or (restarts and found.passed != self._in_place.passed):
                try:
                    fetched.placement.place(fetched.files_of(changed))
                finally:
                    signals.owner.leave()
                counts = (self._refreshes, len(changed), len(found.digests))
                self._voice.do(partial(log.info, "refresh %d: %d of %d have changed", *counts))
                if restarts:  # its variables and descriptors are for the one that starts next
                    self._successor = fetched
                    held.pop_all()
                self._tell_program(fetched.manifest.on_change)
            self._in_place = found  # versions may be newer in any case

    def _tell_program(self, on_change: str) -> None:
        if on_change == "restart":
            self._refresh_at, self._kill_at = None, time.monotonic() + self._stop_timeout
            self._send(signal.SIGTERM)
        elif on_change != "none":
            self._send(signal.Signals[on_change])
