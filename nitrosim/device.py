"""The software NSM behind /dev/nsm, or a TPM behind /dev/tpmrm0: a Unix socket that answers, and
the C shim that leads a process to it.

    with SimulatedDevice(SoftwareNsm(pki)) as device:
        subprocess.run(command, env=device.environment(os.environ))

One SEQPACKET message is one request, one message back its answer; shim.c says what a process sees
of it. A connection to the NSM carries one request, one to a TPM as many as its process makes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import selectors
import shlex
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

from nsm.module import REQUEST_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Self

SOCKET_VARIABLE: Final = "NITROSIM_NSM_SOCKET"
TPM_SOCKET_VARIABLE: Final = "NITROSIM_TPM_SOCKET"
_SOURCE: Final = Path(__file__).with_name("shim.c")
_FLAGS: Final = ("-std=c11", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra")
_LIBRARIES: Final = ("-ldl",)
_PATH_MAX: Final = 107  # sun_path of unix(7), without its NUL
_BACKLOG: Final = 128
_PAUSE: Final = 0.05  # seconds
_SEPARATORS: Final = frozenset(" :\t\n")  # of the names in LD_PRELOAD
_WRITABLE: Final = stat.S_IWGRP | stat.S_IWOTH


class SimulatorError(Exception):
    """The simulator cannot be started on this machine."""


class Module(Protocol):
    """What answers a request: `nitrosim.module.SoftwareNsm`, or a test's own."""

    def answer(self, request: bytes) -> bytes:
        """The answer's bytes; none of them hangs up, which the process sees as EIO.

        Raises SilenceError to leave the caller waiting.
        """
        ...


class SilenceError(Exception):
    """A request is never answered."""


def build_shim(folder: Path | None = None) -> Path:
    """Compile the shim, unless the folder has it already, and return its path.

    The folder is a cache that this user alone writes to, by default one that every user can read;
    the compiler is cc, or what CC names. Raises SimulatorError without a compiler, and for a folder
    that cannot be used.
    """
    compiler = _compiler()
    folder = folder or _cache()
    library = folder.absolute() / f"shim-{_fingerprint(compiler)}.so"
    if _SEPARATORS & set(str(library)):
        raise SimulatorError(f"a path with a blank or a colon cannot be preloaded: {library}")
    try:
        if not library.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _compile(compiler, library)
    except OSError as error:
        raise SimulatorError(f"cannot build the shim in {folder}: {error}") from error
    return library


def _cache() -> Path:
    """nitrosim-UID in the system's temporary folder: a program that is started as root and becomes
    another user still needs the shim, and what lies below root's home it cannot read. Where that
    folder will not do, it is ~/.cache/nitrosim.
    """
    shared = Path(tempfile.gettempdir()).absolute() / f"nitrosim-{os.geteuid()}"
    if not _SEPARATORS & set(str(shared)) and _is_ours_alone(shared):
        return shared
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "nitrosim"


def _is_ours_alone(folder: Path) -> bool:
    """Whether a folder of a name that anybody can foresee is this user's, is nobody else's to write
    to or to replace, and holds code that may run; it is made where it is missing.
    """
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        own, parent = folder.lstat(), folder.parent.stat()
        if not stat.S_ISDIR(own.st_mode) or own.st_uid != os.geteuid():
            return False  # somebody was here before
        if parent.st_uid not in {0, os.geteuid()}:
            return False
        if parent.st_mode & _WRITABLE and not parent.st_mode & stat.S_ISVTX:
            return False  # anybody may rename it
        if own.st_mode & _WRITABLE:
            return False  # anybody may have put something into it
        folder.chmod(0o755)
        return not os.statvfs(folder).f_flag & os.ST_NOEXEC
    except OSError:
        return False


def _compiler() -> list[str]:
    command = shlex.split(os.environ.get("CC", "cc")) or ["cc"]
    found = shutil.which(command[0])
    if found is None:
        raise SimulatorError(
            f"no C compiler: {command[0]} is not on the PATH, and CC may name another"
        )
    return [found, *command[1:]]


def _fingerprint(compiler: list[str]) -> str:
    """Changes with the source, the command line and the compiler's own file."""
    status = Path(compiler[0]).stat()
    key = [*compiler, *_FLAGS, *_LIBRARIES, status.st_size, status.st_mtime_ns]
    return hashlib.sha256(_SOURCE.read_bytes() + repr(key).encode()).hexdigest()[:16]


def _compile(compiler: list[str], library: Path) -> None:
    """Compile beside the target and rename: another process sees all of it or nothing."""
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        output = Path(work) / library.name
        command = [*compiler, *_FLAGS, str(_SOURCE), "-o", str(output), *_LIBRARIES]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode != 0:
            raise SimulatorError(
                f"{compiler[0]} cannot compile {_SOURCE.name}: {done.stderr.strip()}"
            )
        output.chmod(0o755)
        output.replace(library)


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A new folder of a name that nobody foresees, which every user may enter and only this one
    write to; it is removed in the end.
    """
    with tempfile.TemporaryDirectory(prefix="nitrosim-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


class SimulatedDevice:
    """Serves one module to every process that runs in its `environment`, until it is closed.

    The socket lives in a new folder, or in `folder`. Every user may use it: a process that becomes
    another user still has the device. Raises SimulatorError when it cannot be started.
    """

    _variable: ClassVar = SOCKET_VARIABLE
    _file: ClassVar = "nsm.sock"
    _lasting: ClassVar = False

    def __init__(self, module: Module, *, folder: Path | None = None) -> None:
        self._module = module
        self._unanswered: list[socket.socket] = []
        self._shim = build_shim()
        with contextlib.ExitStack() as cleanup:
            home = folder or cleanup.enter_context(open_folder())
            self.socket = home.absolute() / self._file
            listener = cleanup.enter_context(_listen(self.socket))
            cleanup.callback(self.socket.unlink, missing_ok=True)
            self._selector = cleanup.enter_context(selectors.DefaultSelector())
            stop, stopped = (cleanup.enter_context(end) for end in socket.socketpair())
            self._selector.register(stopped, selectors.EVENT_READ)
            self._selector.register(listener, selectors.EVENT_READ)
            thread = threading.Thread(
                target=self._serve, args=(listener,), name="nitrosim-nsm", daemon=True
            )
            thread.start()
            cleanup.callback(thread.join)
            cleanup.callback(stop.shutdown, socket.SHUT_RDWR)
            self._cleanup = cleanup.pop_all()

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """The variables of a process that is to find this module at /dev/nsm, on top of what it
        has.
        """
        preloaded = [str(self._shim), base.get("LD_PRELOAD", "")]
        return {
            **base,
            "LD_PRELOAD": " ".join(filter(None, preloaded)),
            self._variable: str(self.socket),
        }

    def close(self) -> None:
        """Stop answering and remove the socket; a second call does nothing."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, listener: socket.socket) -> None:
        """One thread for all: the kernel's driver handles one request at a time as well."""
        clients: set[socket.socket] = set()
        try:
            while all(
                self._handle(key.fileobj, listener, clients) for key, _ in self._selector.select()
            ):
                pass
        finally:  # whoever waits for an answer sees EIO, also when the module itself broke
            for connection in (listener, *clients, *self._unanswered):
                connection.close()

    def _handle(self, ready: object, listener: socket.socket, clients: set[socket.socket]) -> bool:
        """Handle one socket that has something to read; False when it is the one that says stop."""
        if ready is listener:
            client = _accept(listener)
            if client is not None:
                clients.add(client)
                self._selector.register(client, selectors.EVENT_READ)
        elif ready in clients and isinstance(ready, socket.socket):
            if not (self._reply(ready) and self._lasting):
                self._selector.unregister(ready)
                clients.discard(ready)
                ready.close()
        else:
            return False
        return True

    def _reply(self, client: socket.socket) -> bool:
        """One request, one answer; none, and False, for a client that only opened the device, or
        vanished.
        """
        try:
            with contextlib.suppress(OSError):
                request = client.recv(REQUEST_MAX + 1)
                if request:
                    client.send(self._module.answer(request))
                    return True
        except SilenceError:
            self._unanswered.append(client.dup())  # keeps the caller waiting
        return False


class SimulatedTpm(SimulatedDevice):
    """The same for a TPM, whose commands of one process are on one connection."""

    _variable: ClassVar = TPM_SOCKET_VARIABLE
    _file: ClassVar = "tpm.sock"
    _lasting: ClassVar = True


def _accept(listener: socket.socket) -> socket.socket | None:
    try:
        client, _ = listener.accept()
    except (
        OSError
    ):  # the client is gone again, or no descriptor is left: give others time to return one
        threading.Event().wait(_PAUSE)
        return None
    client.setblocking(False)
    return client


def _listen(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > _PATH_MAX:
        raise SimulatorError(f"path of the NSM's socket has at most {_PATH_MAX} bytes: {path}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(str(path))
        path.chmod(0o666)  # as the node's own; the folder says who reaches it
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise SimulatorError(f"cannot listen on {path}: {error}") from error
    return listener
