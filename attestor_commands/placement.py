"""Several files that are there together or not at all, and the program that they are for."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Protocol, TypeVar

from attestor_io import signals
from attestor_io.errors import OutputError
from attestor_io.secret_file import SecretFile, placed

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence
    from types import TracebackType
    from typing import NoReturn, Self

    from attestor_io.folder import Folder
    from attestor_io.generation import Generation

_T = TypeVar("_T")


class Appendable(Protocol):
    """What takes bytes."""

    def append(self, data: bytes) -> None:
        """Take more of them; raises OutputError."""
        ...


class Closable(Protocol):
    """What has a descriptor to give back."""

    def close(self) -> None:
        """Give it back."""
        ...


class Placement:
    """Files that get their names after all of them are complete; a context manager.

    Leaving it without `place` leaves nothing.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._files: list[SecretFile] = []
        self._folders: list[tuple[str, Folder]] = []
        self._generation: Generation | None = None
        self._lock = threading.Lock()
        self._left = False

    def begin_generation(self, path: str, *, force: bool, keeps: bool) -> None:
        """Have the files that are added with `in_generation` come into a new folder.

        A link at this path leads to it once all are placed. With `keeps`, the folder that it led to
        before stays for whoever is reading it. Raises OutputError.
        """
        from attestor_io.generation import Generation

        generation = Generation(path, force=force, keeps=keeps)
        self._generation = self._stack.enter_context(generation)
        self._folders += [(path, generation.parent), (path, generation.link.folder)]

    def add(
        self,
        path: str,
        *,
        force: bool,
        mode: int = 0o600,
        owner: tuple[int, int] = (-1, -1),
        in_generation: bool = False,
    ) -> SecretFile:
        """One more file; raises OutputError if it cannot be written."""
        inside = self._generation.folder if self._generation and in_generation else None
        file = SecretFile(path, force=force, mode=mode, owner=owner, inside=inside)
        self._files.append(self._stack.enter_context(file))
        if inside is None:
            self._folders.append((path, file.folder))
        return file

    @property
    def folders(self) -> Sequence[tuple[str, Folder]]:
        """Every path that was given, and the folder that it led to; open as long as the context."""
        return self._folders

    def close_later(self, resource: Closable) -> None:
        """Close this as well when the context is left."""
        self._stack.callback(resource.close)

    def append(self, file: Appendable, data: bytes) -> None:
        """Write more of a file; any thread may, for its descriptor is not closed meanwhile."""
        with self._lock:
            if self._left:
                raise OutputError("the placement was given up")
            file.append(data)

    def place(self, only: Container[SecretFile] | None = None) -> None:
        """Give every file its name, or each of `only` these, or none; each must be sealed.

        A generation is placed whole.
        """
        with placed(self._in_order(only)):
            pass

    def place_and_start(self, start: Callable[[], _T]) -> _T:
        """Give every file its name, and call `start`; if that raises, all files are taken back.

        What they replaced goes with the placement: nothing may fail once something was started.
        """
        with placed(self._in_order(), drops=False):
            return start()

    def _in_order(self, only: Container[SecretFile] | None = None) -> list[SecretFile]:
        """The files in the order in which they get their names: the link comes last."""
        if self._generation is not None:
            return [*self._files, self._generation.link]
        return [file for file in self._files if only is None or file in only]

    def place_and_become(self, execute: Callable[[], NoReturn]) -> NoReturn:
        """Give every file its name, and call `execute`, which ends in execve or raises.

        Nothing temporary is left behind execve. If it fails, or a signal has come before, all files
        are taken back.
        """
        files = self._in_order()
        with placed(files):
            replaced = [file for file in files if file.replaced]
            with _dropped_by_execve(replaced), signals.owner.handed_over():
                execute()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._left = True
        self._stack.__exit__(kind, error, trace)


@contextlib.contextmanager
def _dropped_by_execve(files: Sequence[SecretFile]) -> Iterator[None]:
    """Have what these files replaced removed once execve has succeeded within the block.

    Before execve it must stay, since only execve tells whether all is taken back, and behind it
    this process has no code of its own left. A helper waits at a pipe, whose other end execve
    closes.
    """
    if os.getpid() == 1:  # a helper would be its child, and be killed with it; if execve fails, all
        for file in files:  # that it could keep what was replaced for ends with process 1
            file.drop_replaced()
    if not files or os.getpid() == 1:
        yield
        return
    try:
        reader, writer = os.pipe()  # both are closed by execve
        helper = os.fork()
    except OSError as error:
        raise OutputError(f"what is replaced cannot be removed: {error.strerror}") from error
    if helper == 0:
        _help(files, reader, writer)
    os.close(reader)
    if os.waitpid(helper, 0)[1]:
        os.close(writer)
        raise OutputError("what is replaced cannot be removed: no process for it can be started")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.write(writer, b"x")  # execve failed
        os.close(writer)


def _help(files: Sequence[SecretFile], reader: int, writer: int) -> NoReturn:
    """Wait until execve has closed the pipe, and remove what was replaced."""
    status = 1
    with contextlib.suppress(BaseException):  # whatever happens: this copy has nothing else to do
        if os.fork() == 0:  # the program shall have no child that it does not know
            os.close(writer)
            if not os.read(reader, 1):
                for file in files:  # nothing can be taken back any more: whatever can go, goes
                    file.close()
        status = 0
    os._exit(status)
