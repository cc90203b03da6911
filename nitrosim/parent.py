"""What runs on the parent instance: services that an enclave reaches through vsock, forwarded byte
by byte.

    with Parent(listeners(Ports(), kms=port, metadata=other, tell=print)):
        ...

The ports are those of the units in enclave/parent: KMS, S3, the metadata service, and status lines,
of which each connection brings one JSON object.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import selectors
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from nitrosim.device import SimulatorError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Self

    Own = Callable[[socket.socket], object]
    Service = Callable[[socket.socket, Own], object]
    """What serves one connection, in a thread of its own; further sockets that it waits on it gives
    to the second.
    """

LINE_MAX: Final = 4096  # bytes of a status line
_CHUNK: Final = 1 << 16
_BACKLOG: Final = 128
_PATIENCE: Final = 10.0  # seconds: for a service to be reached, and for a status line to come
_LOOP_PATIENCE: Final = 1.0
_PAUSE: Final = 0.05
_CID_LOCAL: Final = 1  # VMADDR_CID_LOCAL, vsock(7)
_VIRTUAL_MACHINES: Final = Path("/dev/vhost-vsock")


class Ports(NamedTuple):
    """The vsock ports of the parent."""

    kms: int = 8000
    s3: int = 8001
    metadata: int = 8002
    status: int = 8003


def listeners(
    ports: Ports, *, kms: int, metadata: int, tell: Callable[[str], object]
) -> list[tuple[socket.socket, Service]]:
    """The services of the parent behind vsock, for any context id.

    `kms` is the TCP port on 127.0.0.1 of KMS, S3 is there, too, and `metadata` that of the metadata
    service; `tell` gets each status line. Raises SimulatorError where vsock is not to be had or a
    port is taken.
    """
    services: list[tuple[int, Service]] = [
        (ports.kms, forward_to(kms)),
        (ports.s3, forward_to(kms)),
        (ports.metadata, forward_to(metadata)),
        (ports.status, collect(tell)),
    ]
    with contextlib.ExitStack() as opened:
        made = [(opened.enter_context(_listen(port)), service) for port, service in services]
        opened.pop_all()
        return made


def _listen(port: int) -> socket.socket:
    listener = None
    try:
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        listener.bind((socket.VMADDR_CID_ANY, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise SimulatorError(
            f"cannot listen on vsock port {port}: {error.strerror}; modprobe vsock_loopback "
            "makes vsock on one machine"
        ) from error
    return listener


def unreachable() -> list[str]:
    """Whom vsock ports of this machine are out of reach for, and what would bring them there; empty
    where its own programs reach them.
    """
    if _loops_back():
        return []
    told = (
        "no program on this machine reaches the vsock ports: context id 1 does not answer; "
        "modprobe vsock_loopback"
    )
    if _VIRTUAL_MACHINES.exists():
        return [f"{told}; a virtual machine reaches them at context id 2"]
    return [told, f"no virtual machine reaches them: no {_VIRTUAL_MACHINES}; modprobe vhost_vsock"]


def _loops_back() -> bool:
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener,
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as caller,
    ):
        listener.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        listener.listen()
        caller.settimeout(_LOOP_PATIENCE)  # another transport would take the call, and be silent
        caller.connect((_CID_LOCAL, listener.getsockname()[1]))
        return True
    return False


def forward_to(port: int) -> Service:
    """A service that is on a TCP port of 127.0.0.1."""

    def forward(connection: socket.socket, own: Own) -> None:
        with socket.create_connection(("127.0.0.1", port), _PATIENCE) as server:
            server.settimeout(None)
            own(server)
            join(connection, server)

    return forward


def join(one: socket.socket, other: socket.socket) -> None:
    """Carry bytes both ways until both have said all; the end of one direction is passed on, the
    other goes on.
    """
    back = threading.Thread(
        target=_carry, args=(other, one), name="nitrosim-parent-back", daemon=True
    )
    back.start()
    _carry(one, other)
    back.join()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    """One direction, with its end; when it breaks both connections are over."""
    try:
        while data := source.recv(_CHUNK):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        _hang_up(source)
        _hang_up(sink)


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def collect(tell: Callable[[str], object]) -> Service:
    """A service that takes one status line of each connection.

    What it tells is JSON in ASCII on one line: the object that came, or {"unreadable": text} for
    anything else.
    """

    def take(connection: socket.socket, _own: Own) -> None:
        connection.settimeout(_PATIENCE)
        line = b""
        with contextlib.suppress(OSError):
            while b"\n" not in line and len(line) <= LINE_MAX and (data := connection.recv(_CHUNK)):
                line += data
        if line:
            tell(json.dumps(_status(line)))

    return take


def _status(line: bytes) -> Mapping[str, Any]:
    """The object on the line, if nothing follows it."""
    with contextlib.suppress(ValueError, RecursionError):  # no UTF-8, and no JSON, are ValueErrors
        fields = json.loads(line) if len(line) <= LINE_MAX else None
        if isinstance(fields, dict) and b"\n" not in line[:-1]:
            return fields
    return {"unreadable": line[:LINE_MAX].decode("utf-8", "backslashreplace")}


class Parent:
    """Listeners, each with its service; a context manager that owns them, and ends every connection
    when it is left.
    """

    def __init__(self, services: Iterable[tuple[socket.socket, Service]]) -> None:
        self._services = list(services)
        self._lock = threading.Lock()
        self._closing = False
        self._open: dict[threading.Thread, list[socket.socket]] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as parts:
            parts.callback(self._end_connections)
            stop, stopped = (parts.enter_context(end) for end in socket.socketpair())
            for listener, _ in self._services:
                parts.enter_context(listener)
                listener.setblocking(False)
            thread = threading.Thread(
                target=self._accept_all, args=(stopped,), name="nitrosim-parent", daemon=True
            )
            thread.start()
            parts.callback(thread.join)
            parts.callback(stop.shutdown, socket.SHUT_RDWR)
            self._parts = parts.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.close()

    def _accept_all(self, stopped: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(stopped, selectors.EVENT_READ)
            for listener, service in self._services:
                selector.register(listener, selectors.EVENT_READ, service)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is stopped:
                        return
                    self._accept(key.fileobj, key.data)

    def _accept(self, listener: Any, service: Service) -> None:
        try:
            connection, _ = listener.accept()
        except (
            OSError
        ):  # the client is gone again, or no descriptor is left: give others time to return one
            threading.Event().wait(_PAUSE)
            return
        connection.setblocking(True)
        thread = threading.Thread(
            target=self._serve,
            args=(connection, service),
            name="nitrosim-parent-connection",
            daemon=True,
        )
        with self._lock:
            self._open[thread] = [connection]
        thread.start()

    def _serve(self, connection: socket.socket, service: Service) -> None:
        with connection:
            with contextlib.suppress(OSError):
                service(connection, self._own)
            with (
                self._lock
            ):  # before it is closed: nobody may hang up a number that is somebody else's
                del self._open[threading.current_thread()]

    def _own(self, further: socket.socket) -> None:
        """Another socket that the connection of this thread waits on."""
        with self._lock:
            self._open[threading.current_thread()].append(further)
            if self._closing:
                _hang_up(further)

    def _end_connections(self) -> None:
        """Wake every thread and wait for it; accepting has ended."""
        with self._lock:
            self._closing = True
            threads = list(self._open)
            for further in itertools.chain(*self._open.values()):
                _hang_up(further)
        for thread in threads:
            thread.join()
