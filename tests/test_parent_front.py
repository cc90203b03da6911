"""The parent's side: bytes forwarded, status lines collected; here over TCP, in a VM over vsock."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import pytest

from nitrosim import parent
from nitrosim.device import SimulatorError
from nitrosim.parent import LINE_MAX, Parent, Ports, collect, forward_to, listeners
from nitrosim.world import World
from tests.conftest import Enclave, Run, no_thread_stays

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PATIENCE: Final = 60.0
HOSTS_OWN: Final = [  # what an enclave is not told by its environment
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "AWS_REGION", "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL_KMS", "AWS_ENDPOINT_URL_S3", "AWS_EC2_METADATA_SERVICE_ENDPOINT",
]  # fmt: skip


def listening() -> tuple[socket.socket, int]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    return listener, listener.getsockname()[1]


def dial(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), PATIENCE)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while data := connection.recv(1 << 16):
        parts.append(data)
    return b"".join(parts)


@contextlib.contextmanager
def server(serve: Callable[[socket.socket], object]) -> Iterator[int]:
    """A TCP server for each connection of which `serve` is called in a thread."""

    def one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            serve(connection)

    listener, port = listening()
    with Parent([(listener, lambda connection, _: one(connection))]):
        yield port


@contextlib.contextmanager
def front(service: Any) -> Iterator[int]:
    """A parent with one service, on TCP in the place of vsock."""
    listener, port = listening()
    with Parent([(listener, service)]):
        yield port


def echo(connection: socket.socket) -> None:
    while data := connection.recv(1 << 16):
        connection.sendall(data)


def backwards(connection: socket.socket) -> None:
    connection.sendall(read_all(connection)[::-1])


def test_bytes_go_both_ways() -> None:
    with server(echo) as port, front(forward_to(port)) as entrance, dial(entrance) as client:
        for data in (b"x", b"hello", bytes(range(256)) * 10):
            client.sendall(data)
            assert client.recv(len(data), socket.MSG_WAITALL) == data
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""


def test_the_end_of_the_clients_half_is_passed_on() -> None:
    """The server answers only once it has read all."""
    with server(backwards) as port, front(forward_to(port)) as entrance, dial(entrance) as client:
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"noitseuq"


def test_the_end_of_the_servers_half_is_passed_on() -> None:
    """The client goes on sending after the server has said all."""
    got: queue.Queue[bytes] = queue.Queue()

    def serve(connection: socket.socket) -> None:
        connection.sendall(b"first")
        connection.shutdown(socket.SHUT_WR)
        got.put(read_all(connection))

    with server(serve) as port, front(forward_to(port)) as entrance, dial(entrance) as client:
        assert read_all(client) == b"first"
        client.sendall(b"afterwards")
        client.shutdown(socket.SHUT_WR)
        assert got.get(timeout=PATIENCE) == b"afterwards"


def say(client: socket.socket, data: bytes) -> None:
    client.sendall(data)
    client.shutdown(socket.SHUT_WR)


def test_many_large_connections_at_once() -> None:
    """More than any socket's buffer, both ways at the same time."""

    def talk(number: int) -> bool:
        data = bytes([number]) * 1_000_003
        with dial(entrance) as client:
            sender = threading.Thread(target=say, args=(client, data))
            sender.start()
            received = read_all(client)
            sender.join()
        return received == data

    with server(echo) as port, front(forward_to(port)) as entrance, ThreadPoolExecutor(32) as pool:
        assert all(pool.map(talk, range(32)))


def test_a_service_that_is_not_there() -> None:
    listener, port = listening()
    listener.close()
    with front(forward_to(port)) as entrance, dial(entrance) as client:
        assert client.recv(1) == b""


def test_a_server_that_resets() -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with server(serve) as port, front(forward_to(port)) as entrance, dial(entrance) as client:
        client.sendall(b"x")
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""


def test_the_end_waits_for_nobody() -> None:
    """Neither for a silent client, nor a server that never closes, nor a half-sent status line."""
    stubborn, port = listening()
    lines: list[str] = []
    with stubborn, contextlib.ExitStack() as clients:
        with (
            no_thread_stays(),
            front(forward_to(port)) as entrance,
            front(collect(lines.append)) as status,
        ):
            for target in (entrance, entrance, status):
                clients.enter_context(dial(target))
            far = [clients.enter_context(stubborn.accept()[0]) for _ in range(2)]
            clients.enter_context(dial(status)).sendall(b'{"half": ')
        assert [end.recv(1) for end in far] == [b"", b""]


def test_an_accept_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor is left for a while; the client is served afterwards."""
    failures = [OSError(errno.EMFILE, "Too many open files")] * 2

    class Listener(socket.socket):
        def accept(self) -> Any:
            if failures:
                raise failures.pop()
            return super().accept()

    monkeypatch.setattr(parent, "_PAUSE", 0.0)
    with Listener() as listener, server(echo) as port:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with Parent([(listener, forward_to(port))]), dial(listener.getsockname()[1]) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
    assert not failures


# Status lines


def told(*sent: bytes) -> list[Any]:
    """What is told of connections that bring these bytes, one after the other."""
    lines: queue.Queue[str] = queue.Queue()
    with front(collect(lines.put)) as port:
        found = []
        for data in sent:
            with dial(port) as client:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                line = lines.get(timeout=PATIENCE)
            assert line.isascii()
            assert line.isprintable()
            found.append(json.loads(line))
    return found


def test_status_lines() -> None:
    fields = {
        "version": 1,
        "step": "inject",
        "status": 0,
        "pcrs": {"0": "ab"},
        "text": "\u00e9\x1b[2J",
    }
    line = json.dumps(fields, ensure_ascii=False).encode()
    assert told(line + b"\n", line, b"{}\n") == [fields, fields, {}]


@pytest.mark.parametrize(
    "line",
    [b"\n", b"text\n", b"[1]\n", b"1", b"{", b"\xff\xfe\n", b'{"a": 1}\n{"b": 2}\n',
     b'{"a": 1}\n\n', b"[" * 4000, b"\x1b]0;title\x07"],
)  # fmt: skip
def test_lines_that_are_none(line: bytes) -> None:
    assert told(line) == [{"unreadable": line.decode("utf-8", "backslashreplace")}]


def test_the_longest_line() -> None:
    longest = b'{"x": "' + b"y" * (LINE_MAX - 9) + b'"}'
    assert len(longest) == LINE_MAX
    found = told(longest, longest + b" ")
    assert found[0] == json.loads(longest)
    assert found[1] == {"unreadable": longest.decode()}


def test_connections_that_bring_nothing() -> None:
    lines: queue.Queue[str] = queue.Queue()
    with front(collect(lines.put)) as port:
        dial(port).close()
        with dial(port) as client:
            client.sendall(b"{}\n")  # and stays: the line counts at once
            assert lines.get(timeout=PATIENCE) == "{}"
    assert lines.empty()


# S3 by its real names, as it is asked for through vsock


@pytest.mark.parametrize(
    "host", ["s3.eu-west-1.amazonaws.com", "a-bucket.s3.eu-west-1.amazonaws.com"]
)
def test_the_names_of_s3(enclave: Enclave, host: str) -> None:
    enclave.world.store.objects["a-bucket/folder/a key"] = b"content"
    context = ssl.create_default_context(cafile=enclave.environment["AWS_CA_BUNDLE"])
    with context.wrap_socket(dial(enclave.world.port), server_hostname=host) as connection:
        path = "/folder/a%20key" if host.startswith("a-bucket") else "/a-bucket/folder/a%20key"
        connection.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
        )
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n\r\ncontent")


# vsock


def services(ports: Ports) -> list[Any]:
    return listeners(ports, kms=1, metadata=1, tell=lambda _: None)


def test_without_vsock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(
        SimulatorError, match=r"vsock port 8000: Address family not supported.*modprobe"
    ):
        services(Ports())


@pytest.mark.vm
def test_a_port_that_is_taken() -> None:
    """Those that were opened before it are closed again."""
    before = len(os.listdir("/proc/self/fd"))
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as other:
        other.bind((socket.VMADDR_CID_ANY, 18003))
        other.listen()
        with pytest.raises(SimulatorError, match="vsock port 18003: Address already in use"):
            services(Ports(18000, 18001, 18002, 18003))
    assert len(os.listdir("/proc/self/fd")) <= before  # an earlier thread may close its own


def dial_vsock(port: int) -> socket.socket:
    connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    connection.settimeout(PATIENCE)
    connection.connect((1, port))
    return connection


@pytest.mark.vm
def test_forwarding_over_vsock() -> None:
    """Half-closing and much data, over the real address family."""
    data = os.urandom(3_000_003)
    with server(backwards) as port:
        made = listeners(
            Ports(18000, 18001, 18002, 18003), kms=port, metadata=port, tell=lambda _: None
        )
        with no_thread_stays(), Parent(made):
            for entrance in (18000, 18001, 18002):
                with dial_vsock(entrance) as client:
                    sender = threading.Thread(target=say, args=(client, data))
                    sender.start()
                    assert read_all(client) == data[::-1]
                    sender.join()
            with dial_vsock(18000) as idle:
                idle.sendall(b"x")


MANIFEST: Final = """
key_id = "{key}"
vsock = "1:8000"
s3_vsock = "1:8001"
imds_vsock = "1:8002"
[variables]
NODE = {{ pattern = "[0-9]{{1,4}}", tag = "mpa-node" }}
[[secret]]
source = "s3://a-bucket/node-${{NODE}}"
target = "{folder}/out"
context = {{ node = "${{NODE}}" }}
"""


@pytest.mark.vm
def test_a_world_behind_vsock(tmp_path: Path) -> None:
    """What an enclave does through the parent: credentials, a tag, a blob from S3, and KMS."""
    with World(vsock=True, tags={"mpa-node": "3"}) as world:
        with dial_vsock(8003) as client:
            client.sendall(b'{"version": 1, "step": "network", "status": 0}\n')
            assert client.recv(1) == b""
        assert [json.loads(line)["step"] for line in world.status_lines] == ["network"]
        enclave = Enclave(world, tmp_path)
        world.store.objects["a-bucket/node-3"] = enclave.encrypt(node="3")
        (tmp_path / "m.toml").write_text(
            MANIFEST.format(key=world.kms.key_arn, folder=tmp_path), encoding="utf-8"
        )
        run = enclave.attestor("inject", "m.toml", environment=dict.fromkeys(HOSTS_OWN))
    assert run == Run(0, b"", "")
    assert (tmp_path / "out").read_bytes() == b"the secret"
