"""Where a secret goes: a file that is absent or complete at any moment, or standard output."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Final, Protocol

from attestor_io.errors import InputError, Interrupted, OutputError

if TYPE_CHECKING:
    from types import FrameType, TracebackType
    from typing import Self


class Signals:
    """SIGINT, SIGTERM and SIGHUP as an exception, up to the point of no return: behind it they come
    too late.
    """

    late = False

    def install(self) -> None:
        """Take over these signals, unless whoever started us has them ignored."""
        import signal

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._interrupt)
        self.late = False

    def point_of_no_return(self) -> None:
        """From here on the process ends with its result; handlers run in this thread, so there is
        no window.
        """
        self.late = True

    def _interrupt(self, number: int, _frame: FrameType | None) -> None:
        if not self.late:
            self.late = True  # while this one is unwound, another must not stop the cleaning up
            raise Interrupted(number)


signals = Signals()


class Target(Protocol):
    """Where a secret goes.

    Entering checks what can be checked; leaving without `write` leaves nothing.
    """

    def write(self, secret: bytes) -> None:
        """Put the secret in its place, whole or not at all; raises OutputError."""
        ...

    def append(self, data: bytes) -> None:
        """Write more of it, without the name yet; raises OutputError."""
        ...

    def seal(self) -> None:
        """Make what was appended durable; raises OutputError."""
        ...

    def place(self) -> None:
        """Put what was appended in its place; raises OutputError."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def open_target(path: str, *, force: bool) -> Target:
    """The target for a path; "-" is standard output."""
    return StandardOutput() if path == "-" else SecretFile(path, force=force)


class StandardOutput:
    """A pipe or a file that a shell opened; a terminal is refused, since it keeps what it shows."""

    def __init__(self) -> None:
        if sys.stdout is None:
            raise OutputError("standard output is closed")
        if os.isatty(1):
            raise InputError(
                "refusing to write a secret to a terminal", "name a file, or pipe it into a program"
            )
        self._held: list[bytes] = []

    def write(self, secret: bytes) -> None:
        """Write all of it; a reader that went away is an error."""
        view = memoryview(secret)
        try:
            while view:
                view = view[os.write(1, view) :]
        except OSError as error:
            raise OutputError(f"standard output cannot be written: {error.strerror}") from error

    def append(self, data: bytes) -> None:
        """Hold it in memory: nothing may come out before all of it is known to be authentic."""
        self._held.append(data)

    def seal(self) -> None:
        """A stream is not synced."""

    def place(self) -> None:
        """Write what was held."""
        for data in self._held:
            self.write(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


class SecretFile:
    """A file that is absent or complete at any moment, durable when it is there; mode 0600 until it
    is complete.

    An unnamed file (O_TMPFILE) gets its name by linkat when it is written and synced: until then
    even SIGKILL leaves nothing. A file system without them, or a missing /proc, gets a temporary
    name in the same folder instead. The folder is held open, so that nobody can swap it in between;
    a symbolic link as the target is never followed. Leaving with an error takes back what was
    placed; what it replaced comes back too if it was kept. SIGKILL amid a replacement may leave a
    second name of the old file, never a part of the new one.
    """

    def __init__(
        self, path: str, *, force: bool, mode: int = 0o600, owner: tuple[int, int] = (-1, -1)
    ) -> None:
        self._path = path
        self._force = force
        self._mode, self._owner = mode, owner
        folder, self._name = os.path.split(path)
        self._temporary: str | None = None
        self._kept: str | None = None
        self._file = self._old = -1
        try:
            self._folder = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise self._failed(error) from error
        try:
            self._check()
        except BaseException:
            os.close(self._folder)
            raise

    def _check(self) -> None:
        """Everything that can be known before KMS is asked."""
        try:
            self._check_name()
            if not os.access(".", os.W_OK | os.X_OK, dir_fd=self._folder, effective_ids=True):
                raise OutputError(f"{self._path} cannot be written: its folder is not writable")
            if os.path.isdir("/proc/self/fd"):  # linkat needs it to find the unnamed file
                self._file = self._open(".", os.O_TMPFILE)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise self._failed(error) from error

    def _check_name(self) -> None:
        import stat

        if self._name in {"", ".", ".."}:
            raise OutputError(f"{self._path} cannot be written: it names a folder")
        try:
            mode = os.stat(self._name, dir_fd=self._folder, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return
        if not self._force:
            raise OutputError(f"{self._path} exists", "--force replaces it")
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise OutputError(f"{self._path} is no file that could be replaced")

    def write(self, secret: bytes) -> None:
        """Write, sync, and give it its name."""
        self.append(secret)
        self.seal()
        signals.point_of_no_return()
        self.place(keep=True)
        self.settle()

    def append(self, data: bytes) -> None:
        """Write more of it; it has no name yet."""
        try:
            if self._file < 0:
                self._file = self._open(self._new_name(), os.O_CREAT | os.O_EXCL)
            view = memoryview(data)
            while view:
                view = view[os.write(self._file, view) :]
        except OSError as error:
            raise self._failed(error) from error

    def seal(self) -> None:
        """Give the complete file its owner and mode, and make its contents durable."""
        try:
            if self._owner != (-1, -1):
                os.fchown(self._file, *self._owner)
            os.fchmod(self._file, self._mode)  # the umask may have taken bits away
            os.fsync(self._file)
        except OSError as error:
            raise self._failed(error) from error

    def place(self, *, keep: bool = False) -> None:
        """Give the file its name, durably; `keep` what it replaces, for `take_back`, until
        `settle`.
        """
        try:
            if keep and self._force:
                self._keep()
            self._place()
            os.fsync(self._folder)
        except OSError as error:
            self.take_back()
            raise self._failed(error) from error

    def _place(self) -> None:
        unnamed = self._temporary is None
        if unnamed and self._force:  # linkat cannot replace: first any name, then rename
            self._link(self._new_name())
        if self._temporary is None:
            self._link(self._name)
        elif self._force:
            os.rename(self._temporary, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            self._temporary = None
        else:
            os.link(self._temporary, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def _keep(self) -> None:
        """Give what will be replaced a second name."""
        self._kept = _random_name()
        try:
            os.link(
                self._name,
                self._kept,
                src_dir_fd=self._folder,
                dst_dir_fd=self._folder,
                follow_symlinks=False,
            )
        except FileNotFoundError:  # there is nothing to replace
            self._kept = None

    def settle(self) -> None:
        """Let go of what was replaced; until exec or the end its contents stay at hand for
        `take_back`.
        """
        if self._kept is not None:
            with contextlib.suppress(OSError):  # ELOOP: a symbolic link
                self._old = os.open(
                    self._kept, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._folder
                )
            with contextlib.suppress(OSError):
                os.unlink(self._kept, dir_fd=self._folder)
            self._kept = None

    def take_back(self) -> None:
        """Remove the placed file, or put back what it replaced; what somebody else put there
        meanwhile stays.
        """
        with contextlib.suppress(OSError):
            if self._is_placed() and self._old >= 0:
                self._kept = self._copy_of_old()
            if self._is_placed() and self._kept is not None:
                os.rename(self._kept, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
                self._kept = None
            elif self._is_placed():
                os.unlink(self._name, dir_fd=self._folder)
        self.settle()

    def _copy_of_old(self) -> str:
        """The name of a file that is what was replaced: contents, mode and owner."""
        status, name = os.fstat(self._old), _random_name()
        copy = self._open(name, os.O_CREAT | os.O_EXCL)
        try:
            while os.sendfile(copy, self._old, None, 1 << 30):
                pass
            os.fchown(copy, status.st_uid, status.st_gid)
            os.fchmod(copy, status.st_mode & 0o7777)
            os.fsync(copy)
        finally:
            os.close(copy)
        return name

    def _is_placed(self) -> bool:
        if self._file < 0:
            return False
        placed = os.stat(self._name, dir_fd=self._folder, follow_symlinks=False)
        return os.path.samestat(placed, os.fstat(self._file))

    def _link(self, name: str) -> None:
        # dst_dir_fd makes Python call linkat with AT_SYMLINK_FOLLOW, which is what open(2)
        # prescribes for O_TMPFILE
        os.link(f"/proc/self/fd/{self._file}", name, dst_dir_fd=self._folder, follow_symlinks=True)

    def _open(self, name: str, flags: int) -> int:
        return os.open(
            name, flags | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._folder
        )

    def _new_name(self) -> str:
        self._temporary = _random_name()
        return self._temporary

    def _failed(self, error: Exception) -> OutputError:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        return OutputError(f"{self._path} cannot be written: {reason}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.take_back()
        if self._temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary, dir_fd=self._folder)
        for descriptor in (self._file, self._old, self._folder):
            if descriptor >= 0:
                os.close(descriptor)


def _random_name() -> str:
    return f".attestor-{os.urandom(8).hex()}"


def _no_tmpfile_errors() -> frozenset[int]:
    import errno

    # open(2): EOPNOTSUPP by a file system without it, EISDIR and ENOENT by kernels and overlays
    # without it
    return frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL})


_NO_TMPFILE: Final = _no_tmpfile_errors()
