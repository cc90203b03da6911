"""Servers that say whatever a test wants, over TCP or TLS; and attestor beside them, with the peak
of its memory.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nitrosim.pki import TlsPki

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

    from tests.conftest import Enclave, Run

    Answer = Callable[[socket.socket, bytes], None]
    """Answers a request, whose head is given; may go on until the other end has enough."""

NAMES: Final = ["localhost", "sts.eu-west-1.amazonaws.com", "kms.eu-west-1.amazonaws.com"]

_PROGRAM: Final = """
import re, socket, attestor
from attestor_io import vsock
def dial(address, timeout):
    if address[0] != 3:
        raise OSError(19, "No such device")
    return socket.create_connection(("127.0.0.1", address[1]), timeout)
vsock.dial = dial
end = attestor._exit_now
def note_peak(status):
    with open("/proc/self/status") as source, open("peak", "w") as target:
        target.write(re.search("VmHWM:[^0-9]*([0-9]+)", source.read())[1])
    end(status)
attestor._exit_now = note_peak
attestor.main()
"""


def attestor(
    enclave: Enclave, *arguments: str, environment: Mapping[str, str | None] | None = None
) -> Run:
    """Run attestor where vsock's CID 3 is this host; see `peak`."""
    return enclave.run(sys.executable, "-c", _PROGRAM, *arguments, environment=environment)


def forked(
    enclave: Enclave, *arguments: str, environment: Mapping[str, str | None] | None = None
) -> Run:
    """The same where nobody measures: in a fork, which is cheaper."""
    done = enclave.forked(*arguments, environment=environment, vsock_to_tcp=True)
    return done or attestor(enclave, *arguments, environment=environment)


def peak(enclave: Enclave) -> float:
    """The most memory that the last run had, in MiB."""
    path = enclave.folder / "peak"
    return int(path.read_text()) / 1024


class Server:
    """A server on the loopback that answers each connection's first request by a function.

    With `names` it speaks TLS, under a CA of its own in `ca`.
    """

    def __init__(self, answer: Answer, names: list[str] | None = None) -> None:
        self.requests: list[bytes] = []
        self._answer = answer
        self._folder = tempfile.TemporaryDirectory()
        self.ca = Path(self._folder.name, "ca.pem")
        self._context = self._tls(names) if names else None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"https://localhost:{self.port}" if names else f"http://127.0.0.1:{self.port}"

    def _tls(self, names: list[str]) -> ssl.SSLContext:
        pki = TlsPki.generate(now=datetime.now(UTC), names=names, ips=["127.0.0.1"])
        self.ca.write_bytes(pki.ca_pem)
        chain, key = self.ca.with_name("chain.pem"), self.ca.with_name("key.pem")
        chain.write_bytes(pki.chain_pem)
        key.write_bytes(pki.key_pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain, key)
        return context

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            inner = connection
            if self._context:
                inner = self._context.wrap_socket(connection, server_side=True)
            with inner:
                head = _head(inner)
                self.requests.append(head)
                self._answer(inner, head)
                inner.shutdown(socket.SHUT_WR)
                while inner.recv(1 << 16):
                    pass

    def __enter__(self) -> Self:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._folder.cleanup()


def _head(connection: socket.socket) -> bytes:
    """A request's head and its body, as far as Content-Length says that there is one."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (piece := connection.recv(1 << 16)):
            return data
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    wanted = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            wanted = int(line.partition(b":")[2])
    while len(body) < wanted and (piece := connection.recv(1 << 16)):
        body += piece
    return data


def says(data: bytes) -> Answer:
    """Answers with these bytes."""
    return lambda connection, _: connection.sendall(data)


def whole(body: bytes, status: str = "200 OK", headers: str = "") -> Answer:
    """Answers with a body of known length."""
    head = f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return says(head.encode() + body)


def without_end(head: bytes, piece: bytes) -> Answer:
    """Answers with a head, and then says the same again and again."""
    many = piece * (1 + (1 << 15) // len(piece))

    def answer(connection: socket.socket, _: bytes) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(many)

    return answer


def dripping(head: bytes) -> Answer:
    """Answers with a head, and then a byte now and then."""

    def answer(connection: socket.socket, _: bytes) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(b"x")
            threading.Event().wait(0.05)

    return answer
