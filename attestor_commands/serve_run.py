"""`attestor serve` at work: where it listens, who is served, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import selectors
import signal
import socket
import stat
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from attestor import Kms, process_recipient
from attestor_commands.failures import Failures, unexpected
from attestor_commands.serve_callers import KeyPair, uid_of
from attestor_commands.serve_calls import Bounds, CallDeadline, Calls, Upstream
from attestor_commands.serve_http import FULL, Conversation, turn_away
from attestor_commands.serve_wire import error_answer
from attestor_io import names, signals
from attestor_io.errors import InputError, OutputError
from attestor_io.secret_file import SecretFile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from attestor_commands.serve_wire import Answer, Request

_LOOPBACK: Final = "127.0.0.1"
_BACKLOG: Final = 128
_PAUSE: Final = 0.1  # seconds after a failure to accept, such as of too few descriptors
_STRANGER: Final = error_answer("AccessDeniedException", "this user is none of --allow-uid", 403)


class Places(NamedTuple):
    """Where to listen: a unix socket with who may use it, a port with the file of its key pair."""

    socket_path: str | None
    uids: frozenset[int]
    port: int | None
    credentials_file: str | None


class Listener(NamedTuple):
    """A socket that listens: `admits` tells whose connections are taken, `authenticate` raises
    Refusal for a request that is not to be answered, `url` is for whoever waits for us.
    """

    socket: socket.socket
    url: str
    admits: Callable[[socket.socket], bool]
    authenticate: Callable[[Request], None]


class Files:
    """The names on disk that go when the process ends: credentials, ready file, socket."""

    def __init__(self) -> None:
        self._names: dict[str, tuple[int, int]] = {}

    def write(self, path: str, data: bytes, *, force: bool) -> None:
        """Write a file that is absent or complete; raises OutputError."""
        with SecretFile(path, force=force) as file:
            file.append(data)
            try:
                file.place()
                self.note(path)
            finally:
                signals.owner.leave()

    def note(self, path: str) -> None:
        """Remove what has this name now when the process ends."""
        path = os.path.abspath(path)
        found = os.lstat(path)
        self._names[path] = (found.st_dev, found.st_ino)

    def remove(self) -> None:
        """Remove what is still ours; raises nothing."""
        for path, identity in list(self._names.items()):
            with contextlib.suppress(OSError):
                found = os.lstat(path)
                if (found.st_dev, found.st_ino) == identity:
                    os.unlink(path)


class Server:
    """Takes connections and serves each in a thread of its own, so many at most."""

    def __init__(self, calls: Calls, most: int, tell: Callable[[str, str], None]) -> None:
        self._calls, self._most, self._tell = calls, most, tell
        self._lock = threading.Condition()
        self._open: set[Conversation] = set()
        self._draining = False

    def run(self, listeners: list[Listener]) -> NoReturn:
        """Serve until a signal ends the process."""
        gc.freeze()  # what is loaded stays
        gc.enable()  # unlike a short command: calls that fail leave cycles
        with selectors.DefaultSelector() as selector:
            for listener in listeners:
                listener.socket.setblocking(False)
                selector.register(listener.socket, selectors.EVENT_READ, listener)
            while True:
                for key, _ in selector.select():
                    self._accept(key.data)

    def _accept(self, listener: Listener) -> None:
        if self._draining:  # whoever comes now is refused by the kernel once we have ended
            threading.Event().wait()
        try:
            connection, _ = listener.socket.accept()
            admitted = listener.admits(connection)
        except BlockingIOError:
            return
        except OSError as error:
            self._tell("connections", f"one cannot be taken: {error.strerror}")
            threading.Event().wait(_PAUSE)
            return
        if not admitted:
            self._tell("AccessDeniedException", "a user that is none of --allow-uid")
            turn_away(connection, _STRANGER)
            return
        if connection.family == socket.AF_INET:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def respond(request: Request) -> Answer:
            return self._calls.respond(request, listener.authenticate)

        self._hold(Conversation(connection, respond), connection)

    def _hold(self, conversation: Conversation, connection: socket.socket) -> None:
        """Serve a connection in a thread; for one too many the longest idle one goes."""
        with self._lock:
            if self._draining:
                connection.close()
                return
            if len(self._open) >= self._most and not self._make_room():
                self._tell("connections", f"more than {self._most} are in use at once")
                turn_away(connection, FULL)
                return
            self._open.add(conversation)
        thread = threading.Thread(target=self._serve, args=(conversation,), daemon=True)
        try:
            thread.start()
        except RuntimeError:
            self._forget(conversation)
            self._tell("connections", "no thread can be started for one")
            turn_away(connection, FULL)

    def _make_room(self) -> bool:
        idle = [one for one in self._open if one.is_idle]
        for one in sorted(idle, key=lambda conversation: conversation.idle_since):
            if one.end_if_idle():
                self._open.discard(one)
                return True
        return False

    def _serve(self, conversation: Conversation) -> None:
        try:
            conversation.hold()
        except Exception as error:  # noqa: BLE001 - a bug costs this connection, and no other
            self._tell("InternalFailure", str(unexpected(error)))
        finally:
            self._forget(conversation)

    def _forget(self, conversation: Conversation) -> None:
        with self._lock:
            self._open.discard(conversation)
            self._lock.notify_all()

    def drain(self, seconds: float) -> None:
        """Take no more connections, and wait so long for the answers that are under way."""
        self._draining = True
        end = time.monotonic() + seconds
        with self._lock:
            for conversation in list(self._open):
                if conversation.end_if_idle():
                    self._open.discard(conversation)
            self._lock.wait_for(lambda: not self._open, max(0.0, end - time.monotonic()))


def run(
    places: Places,
    *,
    key_ids: tuple[str, ...],
    required: Mapping[str, str | None],
    passed: frozenset[str],
    ready_file: str | None,
    ready_fd: int | None,
    force: bool,
    seconds: float,
    connections: int,
    concurrency: int,
    **connection: Any,
) -> NoReturn:
    """Listen, and answer until a signal comes; raises an AttestorError before that."""
    # before anything is opened here that could have this number
    ready = None if ready_fd is None else _open_ready(ready_fd)
    if os.getpid() == 1:
        _leave_orphans_to_the_kernel()
    process_recipient()  # its key is made meanwhile
    deadline = CallDeadline(seconds)
    kms = Kms.connect(key_ids[0] if key_ids else None, deadline=deadline, **connection)
    for key_id in key_ids[1:]:
        names.resolve_region(kms.region, key_id, os.environ)
    failures, files = Failures(), Files()
    signals.owner.clean_up_first(files.remove)
    with _files_removed(files):
        upstream = Upstream(kms, deadline, concurrency)
        bounds = Bounds(key_ids, required, passed)
        server = Server(
            Calls(upstream, bounds, deadline, failures.tell), connections, failures.tell
        )
        listeners = _listen(places, files, kms.region, force=force)
        signals.owner.clean_up_first(lambda: server.drain(seconds))
        said = "".join(f"{listener.url}\n" for listener in listeners).encode()
        if ready_file is not None:
            files.write(ready_file, said, force=force)
        if ready is not None:
            with ready, contextlib.suppress(OSError):  # whoever waited may have gone
                ready.write(said)
        server.run(listeners)


def _leave_orphans_to_the_kernel() -> None:
    """Have the kernel reap what nobody waits for, and reap what has ended before (wait(2), notes).

    The SDK then sees that a credential_process of a profile has succeeded, whatever it did, and
    judges by the output.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


@contextlib.contextmanager
def _files_removed(files: Files) -> Any:
    try:
        yield
    finally:
        files.remove()


def _open_ready(descriptor: int) -> Any:
    try:
        os.set_inheritable(descriptor, False)
        return os.fdopen(descriptor, "wb", buffering=0)
    except OSError as error:
        raise InputError(f"--ready-fd {descriptor} is no open file: {error.strerror}") from error


def _listen(places: Places, files: Files, region: str, *, force: bool) -> list[Listener]:
    """The listeners, and the file of the key pair; raises OutputError."""
    listeners = []
    if places.socket_path is not None:
        listeners.append(_listen_on_socket(places.socket_path, places.uids, files))
    if places.port is not None and places.credentials_file is not None:
        pair = KeyPair.generate()
        listener = _bind(socket.AF_INET, (_LOOPBACK, places.port), f"port {places.port}")
        url = f"http://{_LOOPBACK}:{listener.getsockname()[1]}"
        files.write(places.credentials_file, pair.as_file(), force=force)
        listeners.append(
            Listener(
                listener, url, lambda _: True, lambda request: pair.authenticate(request, region)
            )
        )
    return listeners


def _listen_on_socket(path: str, uids: frozenset[int], files: Files) -> Listener:
    """Listen on a unix socket; whoever may connect by its mode is still asked for the user."""
    allowed = uids or {os.geteuid()}
    _remove_stale(path)
    before = os.umask(0o177)
    try:
        listener = _bind(socket.AF_UNIX, path, f"socket {path}")
    finally:
        os.umask(before)
    files.note(path)
    if allowed != {os.geteuid()}:
        os.chmod(path, 0o666)  # noqa: S103 - SO_PEERCRED tells who is let in
    return Listener(
        listener,
        f"unix:{os.path.abspath(path)}",
        lambda connection: uid_of(connection) in allowed,
        lambda _: None,
    )


def _bind(family: socket.AddressFamily, address: Any, what: str) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except (OSError, ValueError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else None
        raise OutputError(f"cannot listen on {what}: {reason or error}") from error
    return listener


def _remove_stale(path: str) -> None:
    """Remove the socket of a process that was killed; nobody listens on it."""
    with contextlib.suppress(OSError, ValueError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            if probe.connect_ex(path) == errno.ECONNREFUSED:
                os.unlink(path)
