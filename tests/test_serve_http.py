"""`attestor serve` and those who do not speak HTTP as SDKs do, or sign what they should not."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from nitrosim.world import World
from tests.conftest import Enclave
from tests.serving import HEADERS, Served

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BODY: Final = b'{"NumberOfBytes": 7}'
HEAD: Final = (
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-amz-json-1.1\r\n"
    b"X-Amz-Target: TrentService.GenerateRandom\r\n"
)
GOOD: Final = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
QUICK: Final = (  # who is slow is found out at once
    "from attestor_commands import serve_http\n"
    "serve_http.REQUEST_SECONDS, serve_http.IDLE_SECONDS = 0.5, 1\n"
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with World() as world:
        enclave = Enclave(world, tmp_path_factory.mktemp("inside"))
        with Served(enclave, "--any-key", "--pass=Encrypt") as served:
            yield served


def connected(served: Served) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(60)
    connection.connect(str(served.socket))
    return connection


def said(connection: socket.socket) -> bytes:
    """All that comes until the connection ends."""
    data = bytearray()
    while piece := connection.recv(1 << 16):
        data += piece
    return bytes(data)


def answers(served: Served, *pieces: bytes) -> list[int]:
    """The statuses of the answers to these bytes, behind which the client has no more to say."""
    with connected(served) as connection:
        for piece in pieces:
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        return statuses(said(connection))


def statuses(data: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", data)]


def test_it_goes_on_after_all_of_this(served: Served) -> None:
    assert answers(served, GOOD) == [200]


def test_requests_that_do_not_wait(served: Served) -> None:
    assert answers(served, GOOD * 5) == [200] * 5
    assert answers(served, GOOD + HEAD) == [200, 400]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_requests_in_pieces(served: Served, size: int) -> None:
    pieces = [GOOD[start : start + size] for start in range(0, len(GOOD), size)]
    assert answers(served, *pieces) == [200]


def test_chunks(served: Served) -> None:
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"1;x=y\r\n%c\r\n" % byte for byte in BODY)
    assert answers(served, head + chunks + b"0\r\n\r\n" + GOOD) == [200, 200]
    assert answers(served, head + b"zz\r\n") == [400]
    assert answers(served, head + b"FFFFFFFFFFFFFFFFFFFFFFFFF\r\n") == [400]
    for extension in (b"x" * 20_000, b"x" * 8000):  # one line too long; many of them too many
        assert answers(served, head + b"1;%b\r\n \r\n" % extension * 40)[0] in {400, 413, 431}


def test_old_versions_of_http(served: Served) -> None:
    assert answers(served, GOOD.replace(b"/1.1\r\n", b"/1.0\r\n", 1)) == [200]
    assert answers(served, GOOD.replace(b"/1.1\r\n", b"/1.0\r\n", 1) * 2) == [200]
    assert answers(served, GOOD.replace(b" HTTP/1.1\r\n", b"\r\n", 1)) == [400]
    assert answers(served, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")[0] == 400


def test_a_client_that_waits_for_leave(served: Served) -> None:
    with connected(served) as connection:
        wait_for_leave(connection)
        connection.sendall(BODY)
        assert connection.recv(10_000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (GOOD.replace(b"POST", b"GET"), 400),
        (GOOD.replace(b"POST", b"HEAD"), 400),
        (GOOD.replace(b"POST", b"CONNECT"), 400),
        (GOOD.replace(b"POST", b"OPTIONS"), 400),
        (GOOD.replace(b"POST / ", b"POST /?Action=Decrypt "), 400),
        (GOOD.replace(b"POST / ", b"POST * "), 400),
        (GOOD.replace(b"POST / ", b"POST http://[/ "), 400),
        (GOOD.replace(b"amz-json-1.1", b"amz-json-1.0"), 400),
        (GOOD.replace(b"application/x-amz-json-1.1", b"application/cbor"), 400),
        (GOOD.replace(b"TrentService", b"trentservice"), 400),
        (GOOD.replace(b"GenerateRandom", b"GenerateRandom, TrentService.Decrypt"), 400),
        (GOOD.replace(b"Host: x\r\n", b""), 400),
        (GOOD.replace(b"Host: x\r\n", b"Host: x\r\nHost: y\r\n"), 400),
        (GOOD.replace(b"Host: x\r\n", b"Host: x\r\n folded: y\r\n"), 200),
        (GOOD.replace(b"Host: x\r\n", b"Host: x\r\nnot a header\r\n"), 400),
        (GOOD.replace(b"Host: x\r\n", b"Host: x\r\nA: \0\r\n"), 400),
        (GOOD.replace(b"Length: 20", b"Length: -1"), 400),
        (GOOD.replace(b"Length: 20", b"Length: 20, 21"), 400),
        (GOOD.replace(b"Length: 20", b"Length: 0x14"), 400),
        (GOOD.replace(b"Length: 20", b"Length: 65537"), 413),
        (GOOD.replace(b"Length: 20", b"Length: 99999999999999999999"), 413),
        (GOOD.replace(b"Length: 20", b"Length: 20\r\nTransfer-Encoding: identity"), 501),
        (GOOD.replace(b"Host: x\r\n", b"Host: x\r\nUpgrade: h2c\r\nConnection: upgrade\r\n"), 200),
        (HEAD + b"A: %b\r\n" % (b"x" * 20_000), 431),
        (HEAD + b"A: b\r\n" * 4000, 431),
        (b"POST /" + b"x" * 20_000, 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # a ClientHello of TLS
        (b"\r\n" * 10_000, 400),
        (b"\0" * 100, 400),
        (HEAD + b"Content-Length: 3\r\n\r\n[3]", 400),
        (HEAD + b"Content-Length: 3\r\n\r\n\xff\xfe\xfd", 400),
        (HEAD + b"Content-Length: 60000\r\n\r\n" + b"[" * 60_000, 400),
        (HEAD + b"Content-Length: 60000\r\n\r\n" + b"9" * 60_000, 400),
    ],
)
def test_hostile_requests(served: Served, request_: bytes, status: int) -> None:
    """Each has one answer, and the next client gets its own."""
    found = answers(served, request_)
    assert found[:1] == [status] or (status == 400 and found == [])  # an end is no request
    assert served.process.poll() is None


def test_the_longest_request(served: Served) -> None:
    """64 KiB of it, of which KMS takes what it takes."""
    body = json.dumps({"Plaintext": "A" * 65_000, "KeyId": "alias/nitrosim"}).encode()
    body += b" " * ((64 << 10) - len(body))
    head = HEAD.replace(b"GenerateRandom", b"Encrypt")
    sized = head + b"Content-Length: %d\r\n\r\n"
    assert answers(served, sized % len(body) + body) == [400]
    assert answers(served, sized % (len(body) + 1) + body + b" ") == [413]
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    assert answers(served, chunked, *[chunk] * 17) == [413]


def test_who_goes_away_is_forgotten(served: Served) -> None:
    for piece in (b"", GOOD[:10], GOOD[:-1], GOOD):
        with connected(served) as connection:
            connection.sendall(piece)
    assert answers(served, GOOD) == [200]


def test_who_is_slow(served: Served, tmp_path: Path) -> None:
    enclave = Enclave(served.enclave.world, tmp_path)
    with Served(enclave, "--any-key", seam=QUICK) as quick:
        with connected(quick) as idle, connected(quick) as slow, connected(quick) as dripping:
            slow.sendall(GOOD[:-1])
            threading.Thread(target=drip, args=(dripping,), daemon=True).start()
            assert statuses(said(slow)) == [408]
            assert statuses(said(dripping)) == [408]
            assert said(idle) == b""
        assert answers(quick, GOOD) == [200]


def drip(connection: socket.socket) -> None:
    """Send a header that does not end for minutes: a byte in a hundredth of a second."""
    wait = threading.Event()
    with contextlib.suppress(OSError):
        for byte in HEAD + b"A" * 10_000:
            connection.sendall(bytes([byte]))
            wait.wait(0.01)


def test_one_connection_too_many(served: Served, tmp_path: Path) -> None:
    """The one that is idle for longest goes; where none is, the new one has to come again."""
    enclave = Enclave(served.enclave.world, tmp_path)
    with Served(enclave, "--any-key", "--connections", "2") as full:
        with connected(full) as first, connected(full) as second, connected(full) as third:
            wait_for_leave(third)
            assert said(first) == b""
            with connected(full) as fourth:
                wait_for_leave(fourth)
                assert said(second) == b""
                with connected(full) as fifth:
                    assert statuses(said(fifth)) == [503]
                third.sendall(BODY)
                assert third.recv(10_000).startswith(b"HTTP/1.1 200 ")
        run = full.end()
    assert run.err == "attestor: warning: connections: more than 2 are in use at once\n"


def wait_for_leave(connection: socket.socket) -> None:
    """Begin a request, and wait until that has been seen."""
    connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY))
    assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")


# ---- signatures


def signed(
    served: Served,
    *,
    at: datetime | None = None,
    headers: dict[str, str] | None = None,
    body: bytes = BODY,
    region: str = "eu-west-1",
    service: str = "kms",
) -> dict[str, str]:
    """The headers of a request that is signed as botocore signs."""
    text = served.credentials_file.read_text()
    pair = [found[1] for found in re.finditer(r"^aws_\w+ = (.*)$", text, re.MULTILINE)]
    default = {**HEADERS, "X-Amz-Target": "TrentService.GenerateRandom"}
    request = AWSRequest("POST", served.url, headers or default, body)
    signer: Any = SigV4Auth(Credentials(*pair), service, region)
    request.context["timestamp"] = (at or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
    signer._modify_request_before_signing(request)
    canonical = signer.canonical_request(request)
    signature = signer.signature(signer.string_to_sign(request, canonical), request)
    signer._inject_signature_to_request(request, signature)
    return dict(request.headers.items())


def sent(served: Served, headers: dict[str, str], body: bytes = BODY) -> tuple[int, str]:
    """Status, and the code of an error, of what is sent to the port with these headers."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST / HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n{lines}"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port), 60) as connection:
        connection.sendall(head.encode("latin-1") + body)
        answer = said(connection)
    return statuses(answer)[0], json.loads(answer.partition(b"\r\n\r\n")[2]).get("__type", "")


def test_a_signature_holds(served: Served) -> None:
    headers = signed(served)
    assert sent(served, headers) == (200, "")
    assert sent(served, headers | {"User-Agent": "other", "X-Amzn-Trace-Id": "1"}) == (200, "")
    hashed = {**HEADERS, "X-Amz-Target": "TrentService.GenerateRandom"}
    hashed["X-Amz-Content-SHA256"] = "UNSIGNED-PAYLOAD"
    assert sent(served, signed(served, headers=hashed)) == (400, "InvalidSignatureException")


@pytest.mark.parametrize("seconds", [-290, 290])
def test_a_clock_that_is_a_little_off(served: Served, seconds: int) -> None:
    at = datetime.now(UTC) + timedelta(seconds=seconds)
    assert sent(served, signed(served, at=at)) == (200, "")


@pytest.mark.parametrize("seconds", [-310, 310, -86400])
def test_a_request_of_another_time(served: Served, seconds: int) -> None:
    at = datetime.now(UTC) + timedelta(seconds=seconds)
    assert sent(served, signed(served, at=at)) == (400, "InvalidSignatureException")


def altered(headers: dict[str, str], **changed: str | None) -> dict[str, str]:
    by_name = headers | {name.replace("_", "-"): value for name, value in changed.items() if value}
    return {name: value for name, value in by_name.items() if changed.get(name, "") is not None}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"X_Amz_Target": "TrentService.Decrypt"}, "InvalidSignatureException"),
        ({"Content_Type": "application/x-amz-json-1.1; x"}, "InvalidSignatureException"),
        ({"X_Amz_Date": "20260101T000000Z"}, "InvalidSignatureException"),
        ({"X_Amz_Date": "20261301T000000Z"}, "IncompleteSignatureException"),
        ({"X_Amz_Date": "yesterday"}, "IncompleteSignatureException"),
        ({"Authorization": None}, "MissingAuthenticationTokenException"),
        ({"Authorization": "Basic dTpw"}, "IncompleteSignatureException"),
        ({"Authorization": "AWS4-HMAC-SHA256 é"}, "IncompleteSignatureException"),
    ],
)
def test_what_was_changed_on_the_way(
    served: Served, change: dict[str, str | None], code: str
) -> None:
    assert sent(served, altered(signed(served), **change)) == (400, code)


def test_another_body_or_host(served: Served) -> None:
    headers = signed(served)
    assert sent(served, headers, BODY.replace(b"7", b"8")) == (400, "InvalidSignatureException")
    other = {**HEADERS, "X-Amz-Target": "TrentService.GenerateRandom", "Host": "127.0.0.2:80"}
    made = signed(served, headers=other)
    del made["Host"]
    assert sent(served, made) == (400, "InvalidSignatureException")


def test_a_signature_for_something_else(served: Served) -> None:
    for made in (signed(served, region="eu-central-1"), signed(served, service="s3")):
        assert sent(served, made) == (400, "InvalidSignatureException")


@pytest.mark.parametrize("name", ["host", "x-amz-date", "x-amz-target"])
def test_what_must_be_signed(served: Served, name: str) -> None:
    headers = signed(served)
    found = re.search("SignedHeaders=([^,]*)", headers["Authorization"])
    assert found
    fewer = ";".join(one for one in found[1].split(";") if one != name)
    headers["Authorization"] = headers["Authorization"].replace(found[1], fewer)
    assert sent(served, headers) == (400, "IncompleteSignatureException")


def test_every_bit_of_a_signature_counts(served: Served) -> None:
    headers = signed(served)
    start, _, signature = headers["Authorization"].rpartition("=")
    for position in range(0, 64, 7):
        digits = list(signature)
        digits[position] = f"{int(digits[position], 16) ^ 1:x}"
        headers["Authorization"] = f"{start}={''.join(digits)}"
        assert sent(served, headers) == (400, "InvalidSignatureException")


def test_who_is_no_browser(served: Served) -> None:
    """A page can make a browser post to the loopback, but not sign."""
    headers = {"Content-Type": "text/plain", "Origin": "http://page.example"}
    assert sent(served, headers) == (400, "UnknownOperationException")
