"""Where a secret goes: a file that is absent or complete at any moment, or standard output.

One path for every file that a command writes: `append` fills it, `seal` gives it owner and mode and
makes its contents durable, `placed` gives one or several of them their names. Until then a file has
no name, or a hidden one (`attestor_io.folder`).

A file that is replaced keeps a hidden name until all is done: it comes back by a rename, which
needs no space, no descriptor and no name, and it comes back as the same file.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
from typing import TYPE_CHECKING, Protocol

from attestor_io import signals
from attestor_io.errors import InputError, OutputError
from attestor_io.folder import HIDDEN, NO_EXCHANGE, Folder, identity_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType
    from typing import Self


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
                write_all(1, data)
        except OSError as error:
            raise OutputError(f"standard output cannot be written: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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

    A symbolic link as the target is never followed, but replaced. With `inside`, the file comes
    into that folder, and `path` says its name and what messages call it. Raises OutputError for
    what cannot be prepared.
    """

    def __init__(
        self,
        path: str,
        *,
        force: bool,
        mode: int = 0o600,
        owner: tuple[int, int] = (-1, -1),
        inside: Folder | None = None,
    ) -> None:
        self._path, self._force, self._mode, self._owner = path, force, mode, owner
        self._old = ""  # the hidden name of what it replaces
        self._placed = False
        self._identity = (0, 0)
        folder, self._name = os.path.split(path)
        with self._errors_translated():
            self._folder = Folder(".", inside) if inside else self._open_folder(folder)
            try:
                self._check()
                self._folder.claim()
                self._file, self._new = self._create()
            except BaseException:
                self._folder.close()
                raise

    def _open_folder(self, path: str) -> Folder:
        try:
            return Folder(path)
        except FileNotFoundError as error:
            import shlex

            hint = f"mkdir -p {shlex.quote(path)} makes it"
            raise self._unwritable(f"there is no folder {path}", hint) from error

    def _create(self) -> tuple[int, str]:
        """The descriptor of what is to be placed, and its hidden name, if it has one."""
        return self._folder.create()

    def _check(self) -> None:
        """Find out what can be known before KMS is asked."""
        if self._name in {"", ".", ".."}:
            raise self._unwritable("it names a folder")
        if HIDDEN.fullmatch(self._name):
            raise self._unwritable("such names are attestor's own, and removed by its next run")
        target = self._folder.status_of(self._name)
        if target is not None and not self._force:
            raise OutputError(f"{self._path} exists", "--force replaces it")
        self._check_type(target)
        if not self._folder.is_writable():
            raise self._unwritable("its folder is not writable")
        if target is not None:
            self._folder.check_renameable(self._name, target)

    def _check_type(self, target: os.stat_result | None) -> None:
        if target and not (stat.S_ISREG(target.st_mode) or stat.S_ISLNK(target.st_mode)):
            raise OutputError(f"{self._path} is no file that could be replaced")

    def append(self, data: bytes) -> None:
        """Write more of it; raises OutputError."""
        with self._errors_translated():
            write_all(self._file, data)

    def read_again(self) -> io.FileIO:
        """Open what was appended for reading, while nobody else can see it; raises OutputError."""
        with self._errors_translated():
            return io.FileIO(self._folder.open_again(self._file, self._new))

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

    @property
    def folder(self) -> Folder:
        """The folder that it comes into, open until the file is closed."""
        return self._folder

    def take_name(self) -> None:
        """Give the file its name, durably; what had it before keeps a hidden one."""
        with self._errors_translated():
            if self._force and self._folder.status_of(self._name):
                self._replace()
            else:
                self._folder.link(self._new or self._file, self._name)
                self._placed = True
            if self._new:  # where a file system has no unnamed files
                self._folder.unlink(self._new)
                self._new = ""
            self._folder.sync()
            self._release()

    def _release(self) -> None:
        """Close the file: a program that is open for writing cannot be executed."""
        self._identity = identity_of(os.fstat(self._file))
        os.close(self._file)
        self._file = -1

    def _replace(self) -> None:
        """Swap names with the target, in one step where the file system can."""
        if not self._new:  # linkat replaces nothing, so that the unnamed file needs a name first
            name = self._folder.hidden_name()
            self._folder.link(self._file, name)
            self._new = name
        try:
            self._folder.exchange(self._new, self._name)
            try:  # what has come into its place since it was looked at may be a folder
                self._check_type(self._folder.status_of(self._new))
            except BaseException:
                self._folder.exchange(self._new, self._name)
                raise
            self._new, self._old = "", self._new
        except OSError as error:
            if error.errno not in NO_EXCHANGE:
                raise
            self._old = self._folder.hidden_name()
            self._folder.link(self._name, self._old)
            self._folder.rename(self._new, self._name)
            self._new = ""
        self._placed = True

    def take_back(self) -> None:
        """Put back what was replaced, or remove what is new; what others put there stays."""
        for _ in range(2):  # one failure may pass, and there is nothing better to do
            with contextlib.suppress(OSError):
                if self._placed and self._has_its_name():
                    if self._old:
                        self._folder.rename(self._old, self._name)
                        self._old = ""
                    else:
                        self._folder.unlink(self._name)
                self._placed = False
                return
        self._folder.disown(self._old)  # what was replaced is not lost: it stays under this name
        self._old = ""

    def _has_its_name(self) -> bool:
        ours = self._identity if self._file < 0 else identity_of(os.fstat(self._file))
        found = self._folder.status_of(self._name)
        return found is not None and identity_of(found) == ours

    def drop_replaced(self) -> None:
        """Remove what was replaced, for good; raises OutputError."""
        with self._errors_translated():
            self._folder.unlink(self._old)
            self._old = ""

    @contextlib.contextmanager
    def _errors_translated(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a file name"
            raise self._unwritable(reason or str(error)) from error

    def _unwritable(self, reason: str, *hints: str) -> OutputError:
        return OutputError(f"{self._path} cannot be written: {reason}", *hints)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove what has a hidden name, and give the descriptors back."""
        for name in filter(None, (self._new, self._old)):
            self._folder.remove(name)
        if self._file >= 0:
            os.close(self._file)
        self._folder.close()


@contextlib.contextmanager
def placed(files: Sequence[SecretFile], *, drops: bool = True) -> Iterator[None]:
    """Give all files their names, or none: any error, within the block too, takes them back.

    Within the block what they replaced is still there; unless it `drops` that, until the files are
    closed. Behind it the process ends with its result: a signal comes too late.
    """
    signals.owner.enter()
    try:
        for file in files:
            file.take_name()
        yield
        if drops:
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


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of it, however little the kernel takes at once; raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
