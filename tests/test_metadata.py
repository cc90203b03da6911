"""The instance metadata client and `attestor metadata`: a hostile answer is one error of ours."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attestor import AttestorError, InputError, RefusedError, UnreachableError
from attestor_io import metadata, vsock
from attestor_io.deadline import Deadline
from nitrosim.metadata import MetadataService
from nitrosim.server import HttpServer
from tests.conftest import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

    from tests.conftest import Enclave

TOKEN: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nthe-token"
Answer = bytes | None
"""What a hostile server sends; None drips a byte at a time without an end."""


def ok(body: bytes, headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n%s" % (headers, len(body), body)


class Hostile:
    """A server that gives each connection its next answer, whatever is asked; the last stays."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.requests: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, contextlib.suppress(OSError):
                    self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        self.requests.append(connection.recv(1 << 16))
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if answer is not None:
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass
        connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        while not self._done.wait(0.02):
            connection.sendall(b"x")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "_PAUSE", 0.0)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Hostile]]:
    """Starts a hostile server, which is the metadata service from then on."""
    with contextlib.ExitStack() as stack:

        def start(*given: Answer) -> Hostile:
            server = stack.enter_context(Hostile(*given))
            monkeypatch.setenv(metadata.ENDPOINT_VARIABLE, server.url)
            return server

        yield start


@pytest.fixture
def service(enclave: Enclave, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpServer]:
    """The simulated metadata service, with one tag."""
    instance = MetadataService(
        instance_id="i-0123456789abcdef0",
        region="eu-west-1",
        role="the-role",
        credentials=enclave.world.kms.credentials,
        tags={"mpa-node": "3"},
    )
    with HttpServer(instance) as started:
        monkeypatch.setenv(metadata.ENDPOINT_VARIABLE, started.url)
        yield started


# -- what works


def test_region_and_tags(service: HttpServer) -> None:
    assert metadata.region() == "eu-west-1"
    assert metadata.tag("mpa-node") == "3"
    assert metadata.fetch("instance-id", deadline=Deadline(5)) == "i-0123456789abcdef0"


def test_the_requests(answers: Callable[..., Hostile]) -> None:
    server = answers(TOKEN, ok(b"eu-west-1"))
    assert metadata.region() == "eu-west-1"
    put, get = server.requests
    host = server.url.removeprefix("http://").encode()
    assert put == (
        b"PUT /latest/api/token HTTP/1.1\r\nHost: %s\r\n"
        b"x-aws-ec2-metadata-token-ttl-seconds: 60\r\n"
        b"Content-Length: 0\r\nConnection: close\r\n\r\n" % host
    )
    assert get == (
        b"GET /latest/meta-data/placement/region HTTP/1.1\r\nHost: %s\r\n"
        b"x-aws-ec2-metadata-token: the-token\r\n"
        b"Connection: close\r\n\r\n" % host
    )


def test_through_vsock(service: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[vsock.Address] = []

    def dial(address: vsock.Address, timeout: float | None) -> socket.socket:
        asked.append(address)
        return socket.create_connection(("127.0.0.1", service.port), timeout)

    monkeypatch.setattr(vsock, "dial", dial)
    monkeypatch.setenv(metadata.ENDPOINT_VARIABLE, "http://127.0.0.1:1")
    assert metadata.tag("mpa-node", (3, 8002)) == "3"
    assert asked == [(3, 8002)] * 2


def test_an_ipv6_endpoint(enclave: Enclave, monkeypatch: pytest.MonkeyPatch) -> None:
    dialled: list[object] = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        dialled.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setenv(metadata.ENDPOINT_VARIABLE, "http://[fd00:ec2::254]/")
    with pytest.raises(UnreachableError, match="fd00:ec2::254"):
        metadata.region()
    assert dialled[0] == ("fd00:ec2::254", 80)


def test_chunks_and_other_forms(answers: Callable[..., Hostile]) -> None:
    chunked = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\neu-\r\n6\r\nwest-1\r\n0\r\n\r\n"
    )
    for answer in (
        chunked,
        b"HTTP/1.0 200 OK\r\n\r\neu-west-1",
        b"HTTP/1.1 100 Continue\r\n\r\n" + ok(b"eu-west-1"),
    ):
        answers(TOKEN, answer)
        assert metadata.region() == "eu-west-1"


def test_the_longest_value(answers: Callable[..., Hostile]) -> None:
    answers(TOKEN, ok(b"x" * metadata.VALUE_MAX))
    assert len(metadata.region()) == metadata.VALUE_MAX


def test_failures_that_pass(answers: Callable[..., Hostile]) -> None:
    failing = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"
    server = answers(failing, b"", TOKEN, failing, b"nonsense", ok(b"eu-west-1"))
    assert metadata.region() == "eu-west-1"
    assert len(server.requests) == 6


# -- what a hostile service answers

UNREACHABLE: Final[dict[str, Answer]] = {
    "nothing": b"",
    "no status line": b"eu-west-1",
    "http 0.9": b"\r\n\r\neu-west-1",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "http 2": b"HTTP/2 200\r\n\r\nx",
    "no status": b"HTTP/1.1 \r\n\r\n",
    "a status that is no number": b"HTTP/1.1 OK 200\r\n\r\n",
    "a status out of range": b"HTTP/1.1 99999 OK\r\n\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\nx",
    "cut in the headers": b"HTTP/1.1 200 OK\r\nContent-",
    "cut in the body": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\neu-",
    "no body after all": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n",
    "a chunk that is none": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a chunk that is cut": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
    "a chunk of less than nothing": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nab"
    ),
    "status 500": b"HTTP/1.1 500 Oops\r\n\r\n",
    "status 429": b"HTTP/1.1 429 Slow\r\n\r\n",
    "a long status line": b"HTTP/1.1 200 " + b"x" * 70000,
    "long header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 60000 + b"\r\n\r\n",
    "endless continues": b"HTTP/1.1 100 Continue\r\n\r\n" * 5000,
    "endless trailers": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"
    + b"X: y\r\n" * 10000,
    "too long": ok(b"x" * (metadata.VALUE_MAX + 1)),
    "too long, and a lie": b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 100000,
    "too long, in chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"1\r\nx\r\n" * 20000,
    "drip": None,
}
REFUSED: Final[dict[str, Answer]] = {
    "empty": ok(b""),
    "a line feed": ok(b"eu-west-1\n"),
    "two lines": ok(b"a\nb"),
    "a zero": ok(b"a\0b"),
    "an escape": ok(b"\x1b[2J"),
    "a line separator": ok("a\u2028b".encode()),
    "right to left": ok("a\u202eb".encode()),
    "not utf-8": ok(b"\xff\xfe"),
    "a surrogate": ok(b"\xed\xa0\x80"),
    "a redirect": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n",
    "status 401": b"HTTP/1.1 401 Unauthorized\r\n\r\n",
    "status 204": b"HTTP/1.1 204 No Content\r\n\r\n",
}


@pytest.mark.parametrize("name", [*UNREACHABLE, *REFUSED])
@pytest.mark.parametrize("which", ["token", "value"])
def test_a_hostile_answer(answers: Callable[..., Hostile], name: str, which: str) -> None:
    answer = {**UNREACHABLE, **REFUSED}[name]
    answers(*([answer] if which == "token" else [TOKEN, answer]))
    start = time.monotonic()
    with pytest.raises(AttestorError) as caught:
        metadata.fetch("placement/region", deadline=Deadline(0.5 if answer is None else 10))
    # of a value that is none only another one helps, a token that is none may be another's answer
    again = name in UNREACHABLE or (which == "token" and b" 200 " in (answer or b"")[:20])
    assert type(caught.value) is (UnreachableError if again else RefusedError), caught.value
    assert time.monotonic() - start < 5
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("token", [b"a b", b"a\r\nX: y", "\u00e9".encode(), b"x" * 1025])
def test_a_token_that_would_be_more_than_a_header(
    answers: Callable[..., Hostile], token: bytes
) -> None:
    server = answers(ok(token))
    with pytest.raises(UnreachableError, match="gives a token that is none"):
        metadata.region()
    assert len(server.requests) == 1


def test_every_truncation(answers: Callable[..., Hostile]) -> None:
    whole = ok(b"eu-west-1", b"Content-Type: text/plain\r\n")
    for end in range(len(whole)):
        answers(TOKEN, whole[:end])
        with pytest.raises(UnreachableError):
            metadata.region()


@given(st.binary(max_size=200), st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n", ok(b"")[:-2]]))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_bytes(answers: Callable[..., Hostile], data: bytes, head: bytes) -> None:
    answers(TOKEN, head + data)
    with contextlib.suppress(UnreachableError, RefusedError):
        assert metadata.region().isprintable()


def test_a_service_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv(
            metadata.ENDPOINT_VARIABLE, f"http://127.0.0.1:{listener.getsockname()[1]}"
        )
        with pytest.raises(UnreachableError, match="in time"):
            metadata.fetch("placement/region", deadline=Deadline(0.2))


def test_a_tag_that_is_not_there(service: HttpServer) -> None:
    with pytest.raises(
        RefusedError, match="the instance has no tag other, or tags are not enabled"
    ) as caught:
        metadata.tag("other")
    assert "modify-instance-metadata-options" in caught.value.hints[0]
    with pytest.raises(RefusedError, match="answers 404 for placement/absent"):
        metadata.fetch("placement/absent")


# -- paths and endpoints


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "a/",
        "/a",
        "a//b",
        "..",
        "a/..",
        "./a",
        "a?b",
        "a#b",
        "a%2e",
        "a b",
        "a\n",
        "a\\b",
        "\u00e9",
        "a/" * 600,
    ],
)
def test_a_path_that_is_none(path: str) -> None:
    with pytest.raises(InputError, match="no path of instance metadata"):
        metadata.fetch(path)


@pytest.mark.parametrize(
    "path",
    [
        "iam",
        "iam/info",
        "iam/security-credentials/role",
        "IAM/x",
        "identity-credentials/ec2/info",
        "x/security-credentials",
    ],
)
def test_credentials_are_not_shown(path: str) -> None:
    with pytest.raises(InputError, match="leads to credentials"):
        metadata.fetch(path)


@pytest.mark.parametrize(
    "url",
    ["https://x", "http://", "http://a:b@c", "http://x:0", "http://x:99999", "http://x/y",
     "ftp://x", "http://[::1", "http://x\r\ny", "http://x:80:80"],
)  # fmt: skip
def test_an_endpoint_that_is_none(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv(metadata.ENDPOINT_VARIABLE, url)
    with pytest.raises(InputError, match="is no endpoint"):
        metadata.region()


# -- the command


def test_the_command(enclave: Enclave, service: HttpServer) -> None:
    inside: dict[str, str | None] = {
        metadata.ENDPOINT_VARIABLE: service.url,
        "HTTP_PROXY": "http://127.0.0.1:1",
    }
    run = enclave.attestor("metadata", "placement/region", environment=inside)
    assert run == Run(0, b"eu-west-1\n", "")
    run = enclave.attestor("metadata", "tags/instance/other", environment=inside)
    assert (run.status, run.out) == (4, b"")
    assert (
        run.error == "the instance has no tag other, or tags are not enabled in instance metadata"
    )
    assert "aws ec2 modify-instance-metadata-options --instance-id" in run.err
    run = enclave.attestor("metadata", "iam/security-credentials/the-role", environment=inside)
    assert (run.status, run.out, run.error) == (
        2, b"", "iam/security-credentials/the-role leads to credentials, which are not shown"
    )  # fmt: skip


@pytest.mark.parametrize("way", [["--imds-vsock", "4242:1"], []])
def test_nobody_answers(enclave: Enclave, way: list[str]) -> None:
    run = enclave.attestor(
        "metadata",
        *way,
        "--timeout",
        "2",
        "placement/region",
        environment={metadata.ENDPOINT_VARIABLE: "http://127.0.0.1:1"},
    )
    assert (run.status, run.out) == (5, b"")
    assert "metadata service" in run.error


def test_the_sdk_is_not_loaded(enclave: Enclave, service: HttpServer) -> None:
    program = (
        "import sys; from attestor_io import metadata; "
        "print(metadata.region(), 'botocore' in sys.modules)"
    )
    environment = os.environ | enclave.environment | {metadata.ENDPOINT_VARIABLE: service.url}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        check=True,
        text=True,
        cwd=enclave.folder,
    )
    assert done.stdout == "eu-west-1 False\n"
