"""Where a secret goes: a file that is absent or complete at any moment, or standard output.

One path for every file that a command writes: `append` fills it, `seal` gives it owner and mode and
makes its contents durable, `placed` gives one or several of them their names. Until then a file has
no name (O_TMPFILE), or a hidden one in its target's folder where the file system or a missing /proc
demands that.

A file that is replaced keeps a hidden name until all is done: it comes back by a rename, which
needs no space, no descriptor and no name, and it comes back as the same file. SIGKILL may leave
hidden names, of complete files or of files that never got a name; the next command that writes into
the folder removes them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import sys
import time
from typing import TYPE_CHECKING, Final, Protocol

from attestor_io import signals
from attestor_io.errors import InputError, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType
    from typing import Self

_HIDDEN: Final = re.compile(r"\.attestor-[0-9a-f]{16}")
_LOCK_TIMEOUT: Final = 5.0  # seconds
_RENAME_EXCHANGE: Final = 2  # linux/fs.h
# open(2): EOPNOTSUPP by a file system without O_TMPFILE, the others by kernels and overlays
_NO_TMPFILE: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL})
# rename(2): what a file system, a kernel or a C library says that cannot exchange names
_NO_EXCHANGE: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


class Target(Protocol):
    """Where a secret goes.

    Making one checks what can be checked; leaving its context without `place` leaves nothing.
    """

    def append(self, data: bytes) -> None:
        """Write more of the secret, which nobody can see yet; raises OutputError."""
        ...

    def place(self) -> None:
        """Put what was appended in its place, whole or not at all; raises OutputError."""
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

    def append(self, data: bytes) -> None:
        """Hold it in memory: nothing may come out before all of it is known to be authentic."""
        self._held.append(data)

    def place(self) -> None:
        """Write what was held; a reader that went away is an error."""
        try:
            for data in self._held:
                _write_all(1, data)
        except OSError as error:
            raise OutputError(f"standard output cannot be written: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


def real_path(path: str) -> str:
    """The path without symbolic links, to tell targets from each other; raises OutputError."""
    try:
        return os.path.realpath(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise OutputError(f"{path} cannot be written: {reason}") from error


class SecretFile:
    """A file that is absent or complete at any moment; mode 0600 until it is sealed.

    The target's folder is held open, so that nobody can swap it in between; a symbolic link as the
    target is never followed, but replaced. Raises OutputError for what cannot be prepared.
    """

    def __init__(
        self, path: str, *, force: bool, mode: int = 0o600, owner: tuple[int, int] = (-1, -1)
    ) -> None:
        self._path, self._force, self._mode, self._owner = path, force, mode, owner
        folder, self._name = os.path.split(path)
        self._new = self._old = ""  # hidden names: of this file, and of what it replaces
        self._placed = False
        self._identity = (0, 0)
        self._file = self._folder = -1
        try:
            with self._errors_translated():
                self._folder = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                self._check()
                _remove_leftovers(self._folder)
                self._file = self._create()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        """Find out what can be known before KMS is asked."""
        if self._name in {"", ".", ".."}:
            raise self._unwritable("it names a folder")
        if _HIDDEN.fullmatch(self._name):
            raise self._unwritable("such names are attestor's own, and removed by its next run")
        mode = self._mode_of(self._name)
        if mode and not self._force:
            raise OutputError(f"{self._path} exists", "--force replaces it")
        self._check_type(mode)
        if not os.access(".", os.W_OK | os.X_OK, dir_fd=self._folder, effective_ids=True):
            raise self._unwritable("its folder is not writable")

    def _check_type(self, mode: int) -> None:
        if mode and not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise OutputError(f"{self._path} is no file that could be replaced")

    def _mode_of(self, name: str) -> int:
        """Type and mode of what has the name now; 0 where nothing has it."""
        try:
            return os.stat(name, dir_fd=self._folder, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return 0

    def _create(self) -> int:
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        if os.path.isdir("/proc/self/fd"):  # linkat needs it to find the unnamed file
            try:
                return os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=self._folder)
            except OSError as error:
                if error.errno not in _NO_TMPFILE:
                    raise
        signals.owner.enter()  # a signal finds the name in the list, or not on the disk
        try:
            self._new = self._hidden_name()
            flags |= os.O_CREAT | os.O_EXCL
            return os.open(self._new, flags, 0o600, dir_fd=self._folder)
        finally:
            signals.owner.leave()

    def append(self, data: bytes) -> None:
        """Write more of it; raises OutputError."""
        with self._errors_translated():
            _write_all(self._file, data)

    def seal(self) -> None:
        """Give the complete file its owner and mode, and make its contents durable."""
        with self._errors_translated():
            if self._owner != (-1, -1):
                os.fchown(self._file, *self._owner)
            os.fchmod(self._file, self._mode)  # the umask may have taken bits away
            os.fsync(self._file)

    def place(self) -> None:
        """Seal it and give it its name, durably."""
        self.seal()
        with placed([self]):
            pass

    @property
    def replaced(self) -> bool:
        """Whether what had the name before is still there, under a hidden one."""
        return self._old != ""

    def take_name(self) -> None:
        """Give the file its name, durably; what had it before keeps a hidden one."""
        with self._errors_translated():
            if self._force and self._mode_of(self._name):
                self._replace()
            else:
                self._link(self._name)
                self._placed = True
            if self._new:  # where a file system has no unnamed files
                os.unlink(self._new, dir_fd=self._folder)
                self._new = _forget(self._new)
            os.fsync(self._folder)
            self._identity = _identity(os.fstat(self._file))
            os.close(self._file)  # a program that is open for writing cannot be executed
            self._file = -1

    def _replace(self) -> None:
        """Swap names with the target, in one step where the file system can."""
        if not self._new:  # linkat replaces nothing, so that the unnamed file needs a name first
            name = self._hidden_name()
            self._link(name)
            self._new = name
        try:
            _exchange(self._folder, self._new, self._name)
            try:  # what has come into its place since it was looked at may be a folder
                self._check_type(self._mode_of(self._new))
            except BaseException:
                _exchange(self._folder, self._new, self._name)
                raise
            self._new, self._old = "", self._new
        except OSError as error:
            if error.errno not in _NO_EXCHANGE:
                raise
            self._old = self._hidden_name()
            self._in_folder(os.link, self._name, self._old, follow_symlinks=False)
            self._in_folder(os.rename, self._new, self._name)
            self._new = _forget(self._new)
        self._placed = True

    def take_back(self) -> None:
        """Put back what was replaced, or remove what is new; what others put there stays."""
        for _ in range(2):  # one failure may pass, and there is nothing better to do
            with contextlib.suppress(OSError):
                if self._placed and self._has_its_name():
                    if self._old:
                        self._in_folder(os.rename, self._old, self._name)
                        self._old = _forget(self._old)
                    else:
                        os.unlink(self._name, dir_fd=self._folder)
                self._placed = False
                return
        self._old = _forget(self._old)  # what was replaced is not lost: it stays under this name

    def _has_its_name(self) -> bool:
        ours = self._identity if self._file < 0 else _identity(os.fstat(self._file))
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(self._name, dir_fd=self._folder, follow_symlinks=False)
            return _identity(found) == ours
        return False

    def drop_replaced(self) -> None:
        """Remove what was replaced, for good; raises OutputError."""
        with self._errors_translated():
            os.unlink(self._old, dir_fd=self._folder)
            self._old = _forget(self._old)

    def _link(self, name: str) -> None:
        """Give our file this name, which nothing may have."""
        if self._new:
            self._in_folder(os.link, self._new, name, follow_symlinks=False)
        else:
            # dst_dir_fd makes Python call linkat with AT_SYMLINK_FOLLOW, which open(2) prescribes
            # for the files of O_TMPFILE
            source = f"/proc/self/fd/{self._file}"
            os.link(source, name, dst_dir_fd=self._folder, follow_symlinks=True)

    def _in_folder(self, change: Callable[..., None], old: str, new: str, **flags: bool) -> None:
        change(old, new, src_dir_fd=self._folder, dst_dir_fd=self._folder, **flags)

    def _hidden_name(self) -> str:
        name = f".attestor-{os.urandom(8).hex()}"
        _hidden_names[name] = self._folder
        return name

    @contextlib.contextmanager
    def _errors_translated(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a file name"
            raise self._unwritable(reason or str(error)) from error

    def _unwritable(self, reason: str) -> OutputError:
        return OutputError(f"{self._path} cannot be written: {reason}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove what has a hidden name, and give the descriptors back."""
        for name in filter(None, (self._new, self._old)):
            _remove(name)
        for descriptor in (self._file, self._folder):
            if descriptor >= 0:
                os.close(descriptor)


@contextlib.contextmanager
def placed(files: Sequence[SecretFile]) -> Iterator[None]:
    """Give all files their names, or none: any error, within the block too, takes them back.

    Within the block what they replaced is still there. Behind it the process ends with its result:
    a signal comes too late.
    """
    signals.owner.enter()
    try:
        for file in files:
            file.take_name()
        yield
        _drop_replaced([file for file in files if file.replaced])
    except BaseException:
        for file in reversed(files):
            file.take_back()
        signals.owner.leave()
        raise


def _drop_replaced(files: Sequence[SecretFile]) -> None:
    """Remove what these files replaced; raises OutputError while nothing of it is gone."""
    for index, file in enumerate(files):
        try:
            file.drop_replaced()
        except OutputError:
            if index == 0:
                raise
            with contextlib.suppress(OutputError):  # if it stays, the next command removes it
                file.drop_replaced()


_hidden_names: Final[dict[str, int]] = {}
"""The hidden names that this process made, and the folders that they are in."""


def _identity(status: os.stat_result) -> tuple[int, int]:
    """Device and inode, by which a file is told from others."""
    return status.st_dev, status.st_ino


def _forget(name: str) -> str:
    """Take a name that is gone off the list; returns none, to be kept in its place."""
    _hidden_names.pop(name, None)
    return ""


def _remove(name: str) -> None:
    """Remove a hidden name of ours, whatever the first attempt says."""
    for _ in range(2):
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=_hidden_names.get(name, -1))
            break
    _forget(name)


def _remove_all() -> None:
    for name in list(_hidden_names):
        _remove(name)


signals.owner.clean_up = _remove_all


def _remove_leftovers(folder: int) -> None:
    """Remove the hidden names of dead processes from a folder that is held open.

    Living ones hold a shared lock on the folder as long as they may have names in it. A folder that
    cannot be locked (NFS) or listed keeps them; one that somebody else keeps locked is unusable,
    since without the lock our own names would be taken for those of the dead: BlockingIOError.
    """
    with contextlib.suppress(OSError):
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in filter(_HIDDEN.fullmatch, os.listdir(folder)):
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=folder)
    deadline = time.monotonic() + _LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # whoever else removes some now is done in no time
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        except OSError:
            return
        else:
            return


def _exchange(folder: int, name: str, other: str) -> None:
    """Exchange two names in one folder (renameat2(2)); raises OSError (ENOSYS: not in libc)."""
    import ctypes

    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    if rename(folder, os.fsencode(name), folder, os.fsencode(other), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
