"""Answers without end, slow ones and deep ones, whoever gives them: one error of ours, no
credential in it, and little memory.
"""

from __future__ import annotations

import http.client
import json
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest
from botocore.awsrequest import AWSRequest, AWSResponse
from botocore.exceptions import HTTPClientError
from botocore.httpsession import URLLib3Session

from attestor_io import connections, credentials
from attestor_io.deadline import Deadline
from attestor_io.errors import AttestorError, RefusedError, UnreachableError
from attestor_io.shortage import causes
from tests.hostile import NAMES, Server, attestor, dripping, peak, whole, without_end

if TYPE_CHECKING:
    import socket

    from tests.conftest import Enclave, Run
    from tests.hostile import Answer

PEAK: Final = 80  # MiB
OK: Final = b"HTTP/1.1 200 OK\r\n"
CHUNKED: Final = OK + b"Transfer-Encoding: chunked\r\n\r\n"
FAILED: Final = b"HTTP/1.1 400 Bad Request\r\n"
ONCE: Final = {"AWS_MAX_ATTEMPTS": "1"}
BARE: Final[dict[str, str | None]] = {
    "AWS_ACCESS_KEY_ID": None,
    "AWS_SECRET_ACCESS_KEY": None,
    "AWS_SESSION_TOKEN": None,
    "AWS_EC2_METADATA_DISABLED": None,
}

ENDLESS: Final[dict[str, Answer]] = {
    "a body to the end of the connection": without_end(OK + b"\r\n", b"x"),
    "a body of an absurd length": without_end(OK + b"Content-Length: 99999999999\r\n\r\n", b"x"),
    "chunks": without_end(CHUNKED, b"4\r\nxxxx\r\n"),
    "one chunk": without_end(CHUNKED + b"7fffffff\r\n", b"x"),
    "a chunk's length": without_end(CHUNKED, b"0"),
    "trailers": without_end(CHUNKED + b"0\r\n", b"X: y\r\n"),
    "headers": without_end(OK, b"X: y\r\n"),
    "a header": without_end(OK + b"X: ", b"x"),
    "a status line": without_end(b"HTTP/1.1 200 ", b"x"),
    "1xx": without_end(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "1xx with headers": without_end(b"", b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n"),
    "an error's body": without_end(FAILED + b"\r\n", b"x"),
}
JSON: Final[dict[str, Answer]] = {
    "deep": whole(b"[" * 60_000),
    "deep objects": whole(b'{"a":' * 12_000),
    "deep error": whole(b"[" * 60_000, "400 Bad Request"),
    "wide": whole(b"[" + b"[]," * 21_000 + b"[]]"),
    "wide objects": whole(b"[" + b'{"":{}},' * 8_000 + b"{}]"),
    "a number": whole(b'{"KeyId":' + b"9" * 60_000 + b"}"),
    "not JSON": whole(b"\xff\xfe"),
    "a list": whole(b"[]"),
    "another type": whole(b'{"Plaintext": 1, "CiphertextForRecipient": [1]}'),
}
XML: Final[dict[str, Answer]] = {
    "too long": whole(b"<a>" * 100_000, "400 Bad Request"),
    "deep": whole(b"<a>" * 21_000, "400 Bad Request"),
    "deep and closed": whole(b"<a>" * 9_000 + b"</a>" * 9_000, "400 Bad Request"),
    "attributes": whole(b"<a>" + b'<b c="d"/>' * 6_000 + b"</a>", "400 Bad Request"),
    "entities": whole(
        b'<!DOCTYPE a [<!ENTITY a "%s">' % (b"x" * 60_000)
        + b"".join(b'<!ENTITY %c "%s">' % (97 + n, b"&%c;" % (96 + n) * 10) for n in range(1, 9))
        + b"]><Error><Code>x</Code><Message>&i;</Message></Error>",
        "400 Bad Request",
    ),
    "not XML": whole(b"\xff\xfe", "400 Bad Request"),
}


def decrypt(enclave: Enclave, answer: Answer, *options: str) -> Run:
    """Decrypt with a hostile KMS."""
    enclave.place(enclave.encrypt())
    with Server(answer, NAMES) as server:
        inside = {"AWS_ENDPOINT_URL_KMS": server.url, "AWS_CA_BUNDLE": str(server.ca), **ONCE}
        return attestor(
            enclave, "decrypt", "--any-key", *options, "blob", "out", environment=inside
        )


def check(enclave: Enclave, run: Run, *statuses: int) -> None:
    """One error of ours, no bug, little memory, nothing written."""
    assert run.status in statuses, run.err
    assert run.error
    assert len(run.err) < 10_000
    assert peak(enclave) < PEAK
    assert not (enclave.folder / "out").exists()


# -- what is under every client


def get(url: str, bound: connections.Bound) -> AWSResponse:
    """An answer as botocore receives it, in pieces where there are objects."""
    http_session = URLLib3Session(timeout=60)
    connections.govern(http_session, lambda _: None, bound)
    request: Any = AWSRequest("GET", url)
    request.stream_output = bound.objects
    return http_session.send(request.prepare())


@pytest.mark.parametrize("name", ENDLESS)
def test_every_answer_without_end(name: str) -> None:
    with Server(ENDLESS[name]) as server, pytest.raises(HTTPClientError) as caught:
        get(server.url, connections.USUAL_BOUND)
    # one that is no HTTP, or has too many headers, ends before
    known = connections.AnswerTooLongError | http.client.HTTPException
    assert any(isinstance(cause, known) for cause in causes(caught.value))


def test_a_long_object_is_read_in_pieces() -> None:
    with Server(whole(b"x" * 3_000_000)) as server:
        assert len(get(server.url, connections.OBJECTS_BOUND).content) == 3_000_000
        with pytest.raises(HTTPClientError, match="longer than 65536 bytes"):
            get(server.url, connections.USUAL_BOUND)


def test_the_longest_answer() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 65000\r\n\r\n"
    with Server(whole(b"x" * 65000)) as server:
        assert len(get(server.url, connections.Bound(len(head) + 65000)).content) == 65000
        with pytest.raises(HTTPClientError, match="longer than"):
            get(server.url, connections.Bound(len(head) + 64999))


# -- KMS


@pytest.mark.parametrize("name", ["chunks", "headers", "an error's body"])
def test_kms_without_end(enclave: Enclave, name: str) -> None:
    check(enclave, decrypt(enclave, ENDLESS[name]), 5, 6)


@pytest.mark.parametrize("name", ["deep", "deep error", "wide", "a number", "another type"])
def test_kms_deep_and_wide(enclave: Enclave, name: str) -> None:
    run = decrypt(enclave, JSON[name])
    check(enclave, run, 6)


def test_a_slow_kms(enclave: Enclave) -> None:
    run = decrypt(enclave, dripping(CHUNKED + b"9"), "--timeout", "2")
    check(enclave, run, 5)
    assert run.error.endswith("within 2 seconds")


def test_a_text_of_kms_is_shown_in_part(enclave: Enclave) -> None:
    body = json.dumps({"__type": "X" * 9_000, "message": "y" * 50_000}).encode()
    run = decrypt(enclave, whole(body, "400 Bad Request"))
    check(enclave, run, 4)
    assert "(50000 characters)" in run.error


LIBRARY: Final = """
import attestor, boto3
kms = boto3.client("kms", endpoint_url=%r)
try:
    attestor.attested(kms).generate_random(NumberOfBytes=1)
except Exception as error:
    print(error)
"""


def test_a_client_of_somebody_else_is_bounded_too(enclave: Enclave) -> None:
    with Server(ENDLESS["chunks"], NAMES) as server:
        program = LIBRARY % server.url
        inside = {"AWS_CA_BUNDLE": str(server.ca), **ONCE}
        run = enclave.run(sys.executable, "-c", program, environment=inside)
    assert run.out.endswith(b"answer is longer than 524288 bytes\n"), run.err


# -- S3 and https


def inject(enclave: Enclave, answer: Answer, source: str = "s3://bucket/key") -> Run:
    """Fetch a source from a hostile server, which KMS never hears of."""
    with Server(answer, NAMES) as server:
        text = (
            'region = "eu-west-1"\nany_key = true\ntimeout = 20\n'
            f'[[file]]\nsource = "{source.replace("SERVER", server.url)}"\nmax_bytes = 100000\n'
            f'target = "{enclave.folder}/out"\nunauthenticated = true\n'
        )
        enclave.place(text.encode(), "m.toml")
        inside: dict[str, str | None] = {
            "AWS_ENDPOINT_URL_S3": server.url.replace("localhost", "127.0.0.1"),
            "AWS_CA_BUNDLE": str(server.ca),
            "SSL_CERT_FILE": str(server.ca),
            **ONCE,
        }
        return attestor(enclave, "inject", "m.toml", environment=inside)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("chunks", "s3://bucket/key"),
        ("a chunk's length", "s3://bucket/key"),
        ("an error's body", "s3://bucket/key"),
        ("headers", "SERVER/key"),
        ("trailers", "SERVER/key"),
    ],
)
def test_a_source_without_end(enclave: Enclave, name: str, source: str) -> None:
    run = inject(enclave, ENDLESS[name], source)
    check(enclave, run, 2 if "longer than 100000 bytes" in run.err or "400" in run.err else 5)


@pytest.mark.parametrize("name", ["too long", "deep and closed", "entities"])
def test_an_error_of_s3_deep_and_wide(enclave: Enclave, name: str) -> None:
    check(enclave, inject(enclave, XML[name]), 2, 5)


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (whole(b"x", headers="Last-Modified: never\r\n"), "ValueError"),
        (whole(b"x", headers="Content-Length: x\r\n"), ""),
        (whole(b"", "301 Moved Permanently", "x-amz-bucket-region: eu-central-1\r\n"), "301"),
        (whole(b"", "301 Moved Permanently"), "redirects without end"),
        (whole(b"", "301 Moved", "x-amz-bucket-region: no region/\r\n"), ""),
        (
            whole(
                b"<Error><Code>PermanentRedirect</Code><Bucket>bucket</Bucket>"
                b"<Endpoint>bucket.s3.eu-central-1.amazonaws.com</Endpoint></Error>",
                "301 Moved Permanently",
            ),
            "",
        ),
        (
            whole(
                b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>us-east-1</Region>"
                b"</Error>",
                "400 Bad Request",
            ),
            "AuthorizationHeaderMalformed",
        ),
    ],
)
def test_what_s3_would_not_say(enclave: Enclave, answer: Answer, part: str) -> None:
    run = inject(enclave, answer)
    check(enclave, run, 2, 5)
    assert part in run.error


def test_credentials_in_an_error_of_s3(enclave: Enclave) -> None:
    ours = enclave.world.kms.credentials
    said = f"you signed with {ours.secret_key} and {ours.token}"
    body = f"<Error><Code>SignatureDoesNotMatch</Code><Message>{said}</Message></Error>"
    run = inject(enclave, whole(body.encode(), "403 Forbidden"))
    check(enclave, run, 4)
    assert run.error.endswith("you signed with [redacted] and [redacted]")


# -- sources of credentials


def fetch(enclave: Enclave, answer: Answer, variables: dict[str, str | None], tls: bool) -> Run:
    """Decrypt with a hostile source of credentials at the URL that {} stands for."""
    enclave.place(enclave.encrypt())
    enclave.place(b"the.jwt", "token")
    with Server(answer, NAMES if tls else None) as server:
        named = {name: value and value.format(server.url) for name, value in variables.items()}
        if tls:
            named["AWS_CA_BUNDLE"] = str(server.ca)
        inside = {**BARE, **named, **ONCE}
        return attestor(
            enclave, "decrypt", "--any-key", "--timeout", "5", "blob", "out", environment=inside
        )


def after_token(answer: Answer) -> Answer:
    """The metadata service: a token, a role, and then this for its credentials."""

    def choose(connection: socket.socket, head: bytes) -> None:
        if head.startswith(b"PUT"):
            whole(b"the-token")(connection, head)
        elif head.startswith(b"GET /latest/meta-data/iam/security-credentials/ "):
            whole(b"the-role")(connection, head)
        else:
            answer(connection, head)

    return choose


INSTANCE: Final[dict[str, str | None]] = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "{}"}
CONTAINER: Final[dict[str, str | None]] = {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "{}/it?x=1"}
WEB: Final[dict[str, str | None]] = {
    "AWS_ENDPOINT_URL_STS": "{}",
    "AWS_WEB_IDENTITY_TOKEN_FILE": "token",
    "AWS_ROLE_ARN": "arn:aws:iam::111122223333:role/r",
}


@pytest.mark.parametrize("name", ["chunks", "deep"])
def test_the_metadata_service(enclave: Enclave, name: str) -> None:
    """Of which all else is in test_metadata."""
    run = fetch(enclave, after_token({**ENDLESS, **JSON}[name]), INSTANCE, tls=False)
    check(enclave, run, 5)
    assert "metadata service" in run.error


@pytest.mark.parametrize("name", ["chunks", "deep"])
def test_an_endpoint_of_a_container(enclave: Enclave, name: str) -> None:
    run = fetch(enclave, {**ENDLESS, **JSON}[name], CONTAINER, tls=False)
    check(enclave, run, 5)
    assert "container credentials http://127.0.0.1:" in run.error


@pytest.mark.parametrize("name", [*ENDLESS, *JSON])
def test_every_answer_of_a_container(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "_PAUSES", ())
    fetcher = credentials._ContainerFetcher({}, Deadline(60))
    with Server({**ENDLESS, **JSON}[name]) as server, pytest.raises(AttestorError) as caught:
        fetcher.retrieve_full_uri(server.url)
    final = name in {"deep error", "another type"}
    assert type(caught.value) is (RefusedError if final else UnreachableError)
    assert server.url in str(caught.value)


@pytest.mark.parametrize("name", ["chunks", "deep and closed", "entities"])
def test_sts(enclave: Enclave, name: str) -> None:
    run = fetch(enclave, {**ENDLESS, **XML}[name], WEB, tls=True)
    check(enclave, run, 4, 5)


@pytest.mark.parametrize("source", [INSTANCE, CONTAINER, WEB])
def test_a_slow_source_of_credentials(enclave: Enclave, source: dict[str, str | None]) -> None:
    run = fetch(enclave, dripping(OK), source, tls=source is WEB)
    check(enclave, run, 5)
    assert "credentials" in run.error
