"""Where credentials come from: each source that is not reached, refuses or has nothing says so, by
its name and with the status that tells whether to try again.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import pytest

from attestor_io import metadata, vsock
from attestor_io.errors import InputError
from tests.hostile import NAMES, Server, dripping, says, whole
from tests.hostile import forked as attestor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.conftest import Enclave, Run
    from tests.hostile import Answer

    Variables = Mapping[str, str | None]

BARE: Final[dict[str, str | None]] = {
    "AWS_ACCESS_KEY_ID": None,
    "AWS_SECRET_ACCESS_KEY": None,
    "AWS_SESSION_TOKEN": None,
    "AWS_EC2_METADATA_DISABLED": None,
    "AWS_MAX_ATTEMPTS": "1",
}
METADATA: Final = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
FULL: Final = "AWS_CONTAINER_CREDENTIALS_FULL_URI"
RELATIVE: Final = "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"
ROLE: Final = "arn:aws:iam::111122223333:role/r"
CLOSED: Final = "closed the connection before TLS was established"
UNFETCHED: Final = "AWS credentials cannot be fetched"
NOWHERE: Final = "http://127.0.0.1:1"
PROXY: Final[dict[str, str | None]] = {
    "HTTP_PROXY": NOWHERE,
    "http_proxy": NOWHERE,
    "HTTPS_PROXY": NOWHERE,
    "NO_PROXY": "localhost",  # where KMS is
}


def decrypt(enclave: Enclave, environment: Variables, *options: str) -> Run:
    enclave.place(enclave.encrypt())
    inside = {**BARE, **environment}
    arguments = ["--any-key", "--timeout", "20", *options]
    return attestor(enclave, "decrypt", *arguments, "-f", "blob", "out", environment=inside)


def given(enclave: Enclave, **changed: object) -> bytes:
    """The credentials of the enclave's world, as the metadata service and containers give them."""
    ours = enclave.world.kms.credentials
    fields = {
        "Code": "Success",
        "AccessKeyId": ours.access_key,
        "SecretAccessKey": ours.secret_key,
        "Token": ours.token,
        "Expiration": (datetime.now(UTC) + timedelta(hours=6)).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return json.dumps({**fields, **changed}).encode()


def instance(body: bytes, token: Answer | None = None, roles: Answer | None = None) -> Answer:
    """A metadata service with one role, and these credentials of it."""

    def answer(connection: socket.socket, head: bytes) -> None:
        if head.startswith(b"PUT"):
            (token or whole(b"the-token"))(connection, head)
        elif b"/security-credentials/ " in head:
            (roles or whole(b"the-role"))(connection, head)
        elif b"placement/region" in head:
            whole(b"eu-west-1")(connection, head)
        else:
            whole(body)(connection, head)

    return answer


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


# -- the metadata service


def test_the_role_of_the_instance(enclave: Enclave) -> None:
    with Server(instance(given(enclave))) as server:
        run = decrypt(enclave, {METADATA: server.url, **PROXY})
    assert (run.status, run.err) == (0, ""), "through a proxy?"
    assert [one.split(b" ", 2)[:2] for one in server.requests] == [
        [b"PUT", b"/latest/api/token"],
        [b"GET", b"/latest/meta-data/iam/security-credentials/"],
        [b"GET", b"/latest/meta-data/iam/security-credentials/the-role"],
    ]


def test_credentials_that_expired_by_our_clock(enclave: Enclave) -> None:
    """They may hold all the same: KMS says."""
    with Server(instance(given(enclave, Expiration="2020-01-01T00:00:00Z"))) as server:
        assert decrypt(enclave, {METADATA: server.url}).status == 0
    with Server(whole(given(enclave, Expiration="2020-01-01T00:00:00Z"))) as server:
        assert decrypt(enclave, {FULL: server.url}).status == 0


@pytest.mark.parametrize(
    "expiration", ["never", "", "2099-01-01", "2099-01-01T00:00:00", "2099-01-01T00:00:00+99:99"]
)
def test_an_expiration_that_is_none(enclave: Enclave, expiration: str) -> None:
    body = given(enclave, Expiration=expiration)
    for name, answer in ((METADATA, instance(body)), (FULL, whole(body))):
        with Server(answer) as server:
            run = decrypt(enclave, {name: server.url})
        assert run.status == 5, run.err
        assert server.url in run.error
        assert run.error.endswith("has an Expiration that is none")


@pytest.mark.parametrize(
    ("variable", "method"),
    [
        ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "container-role"),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "assume-role-with-web-identity"),
    ],
)
def test_a_source_that_is_waited_for_is_named(enclave: Enclave, variable: str, method: str) -> None:
    os.mkfifo(enclave.folder / "fifo")
    inside = {variable: "fifo", FULL: NOWHERE, "AWS_ROLE_ARN": ROLE}
    run = decrypt(enclave, inside, "--timeout", "1")
    assert (run.status, run.error) == (5, f"no AWS credentials from {method} within 1 seconds")
    doctor = attestor(enclave, "doctor", "--timeout", "1", environment={**BARE, **inside})
    assert doctor.status == 5
    assert f"no AWS credentials from {method} within".encode() in b" ".join(doctor.out.split())


def test_a_metadata_service_that_is_not_there(enclave: Enclave) -> None:
    run = decrypt(enclave, {METADATA: NOWHERE})
    assert (run.status, run.error) == (
        5,
        f"{UNFETCHED}: metadata service at {NOWHERE} cannot be reached: Connection refused",
    )


def test_a_token_that_never_comes(enclave: Enclave, silent: int) -> None:
    url = f"http://127.0.0.1:{silent}"
    patience = {"AWS_METADATA_SERVICE_TIMEOUT": "1", "AWS_METADATA_SERVICE_NUM_ATTEMPTS": "1"}
    for command in (["decrypt", "--any-key", "blob", "out"], ["metadata", "placement/region"]):
        enclave.place(enclave.encrypt())
        run = attestor(enclave, *command, environment={**BARE, METADATA: url, **patience})
        assert run.status == 5, run.err
        assert f"no answer of the metadata service at {url} in time" in run.error
        assert "hint: it takes connections but gives no token: a hop limit of 1" in run.err
        assert "--http-put-response-hop-limit 2" in run.err


@pytest.mark.parametrize(
    ("answer", "status", "part"),
    [
        (instance(b"", whole(b"", "403 Forbidden")), 4, "metadata service answers 403 for a token"),
        (instance(b"", whole(b"", "500 Oops")), 5, "metadata service answers 500 for a token"),
        (instance(b"", whole(b"<p>log in</p>\n")), 5, "gives a token that is none"),
        (instance(b"", whole(b"\xff")), 5, "gives a token that is none"),
        (instance(b"", roles=whole(b"")), 5, "names a role that is none"),
        (instance(b"", roles=whole(b"two\nlines")), 5, "names a role that is none"),
        (instance(b"", roles=whole(b"", "404 Not Found")), 4, "the instance has no role"),
        (instance(b"", roles=whole(b"", "503 Busy")), 5, "answers 503 for iam/"),
        (instance(b"", roles=whole(b"a role")), 5, "names a role that is none"),
        (instance(b"", roles=whole(b"../..")), 5, "names a role that is none"),
        (instance(b"{"), 5, "is not JSON"),
        (instance(b"3"), 5, "is JSON, but no object"),
        (
            instance(b'{"Code": "AssumeRoleUnauthorizedAccess", "Message": "no"}'),
            4,
            "Token, Expiration, it says AssumeRoleUnauthorizedAccess",
        ),
        (dripping(b""), 5, "metadata service"),
    ],
)
def test_what_a_metadata_service_answers(
    enclave: Enclave, answer: Answer, status: int, part: str
) -> None:
    once = {"AWS_METADATA_SERVICE_TIMEOUT": "1", "AWS_METADATA_SERVICE_NUM_ATTEMPTS": "1"}
    with Server(answer) as server:
        run = decrypt(enclave, {METADATA: server.url, **once})
    assert run.status == status, run.err
    assert part in run.error
    kinds = {4: "no valid AWS credentials: ", 5: "AWS credentials cannot be fetched: "}
    assert run.error.startswith(kinds[status])


def test_a_metadata_service_that_is_disabled(enclave: Enclave) -> None:
    run = decrypt(enclave, {METADATA: NOWHERE, "AWS_EC2_METADATA_DISABLED": "True"})
    assert (run.status, run.error) == (4, "no valid AWS credentials: there are none")


def test_a_role_of_a_profile_with_the_instance_as_its_source(enclave: Enclave) -> None:
    """botocore keeps a second reference to the provider for these."""
    profile = b"[profile p]\nrole_arn = arn:aws:iam::111122223333:role/r\n"
    enclave.place(profile + b"credential_source = Ec2InstanceMetadata\n", "config")
    run = decrypt(
        enclave, {METADATA: NOWHERE, "AWS_CONFIG_FILE": "config", "AWS_PROFILE": "p", **PROXY}
    )
    assert run.status == 5, run.err
    assert "metadata service at http://127.0.0.1:1 cannot be reached" in run.error


# -- one rule for the endpoint


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({}, "http://169.254.169.254"),
        ({metadata.MODE_VARIABLE: ""}, "http://169.254.169.254"),
        ({metadata.MODE_VARIABLE: "IPv4"}, "http://169.254.169.254"),
        ({metadata.MODE_VARIABLE: "IPv6"}, "http://[fd00:ec2::254]"),
        ({metadata.MODE_VARIABLE: "IPv6", METADATA: "http://x"}, "http://x"),
        ({METADATA: "http://x"}, "http://x"),
    ],
)
def test_where_the_service_is(variables: dict[str, str], url: str) -> None:
    assert metadata.endpoint(variables) == url


def test_a_mode_that_is_none() -> None:
    with pytest.raises(InputError, match="MODE ipv5 is neither IPv4 nor IPv6"):
        metadata.endpoint({metadata.MODE_VARIABLE: "IPv5"})


@pytest.mark.parametrize("name", ["AWS_METADATA_SERVICE_TIMEOUT", metadata.MODE_VARIABLE])
def test_a_variable_that_cannot_be(enclave: Enclave, name: str) -> None:
    environment = {METADATA: None, name: "x"}
    run = attestor(enclave, "metadata", "placement/region", environment=environment)
    assert run.status == 2, run.err
    assert name in run.error
    assert decrypt(enclave, environment).status == 2


@pytest.mark.parametrize(
    "command", [["metadata", "placement/region"], ["decrypt", "--any-key", "blob", "out"]]
)
def test_ipv6_everywhere(enclave: Enclave, command: list[str]) -> None:
    enclave.place(enclave.encrypt())
    inside = {**BARE, METADATA: None, metadata.MODE_VARIABLE: "IPv6", "AWS_REGION": None, **PROXY}
    once = {"AWS_METADATA_SERVICE_NUM_ATTEMPTS": "1", "AWS_REGION": "eu-west-1"}
    run = attestor(enclave, *command, environment={**inside, **once})
    assert run.status == 5, run.err
    assert "metadata service at http://[fd00:ec2::254]" in run.error


# -- containers


def test_an_endpoint_of_a_container(enclave: Enclave) -> None:
    enclave.place(b"the token", "token")
    with Server(whole(given(enclave))) as server:
        file = {"AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "token"}
        run = decrypt(enclave, {FULL: f"{server.url}/x?y=z", **file, **PROXY})
    assert (run.status, run.err) == (0, "")
    (request,) = server.requests
    assert request.startswith(b"GET /x?y=z HTTP/1.1\r\n")
    assert b"Authorization: the token\r\n" in request


@pytest.mark.parametrize(
    ("answer", "status", "part"),
    [
        (whole(b"", "404 Not Found"), 4, "/x?... answers 404"),
        (whole(b"secret-token", "401 Unauthorized"), 4, "/x?... answers 401"),
        (whole(b"", "500 Oops"), 5, "/x?... answers 500"),
        (whole(b"", "429 Slow"), 5, "/x?... answers 429"),
        (whole(b"", "302 Found", "Location: http://127.0.0.1:1/\r\n"), 4, "answers 302"),
        (says(b""), 5, "cannot be reached"),
        (whole(b'{"code": "NoRole"}'), 4, "has no AccessKeyId"),
    ],
)
def test_what_an_endpoint_of_a_container_answers(
    enclave: Enclave, answer: Answer, status: int, part: str
) -> None:
    with Server(answer) as server:
        run = decrypt(enclave, {FULL: f"{server.url}/x?token=secret-token"})
    assert run.status == status, run.err
    assert f"container credentials {server.url}" in run.error
    assert part in run.error
    assert "secret-token" not in run.err


def test_an_endpoint_that_is_not_there(enclave: Enclave) -> None:
    run = decrypt(enclave, {FULL: f"{NOWHERE}/x"})
    assert run.status == 5, run.err
    assert "container credentials http://127.0.0.1:1/x cannot be reached" in run.error


def test_an_endpoint_that_is_silent(enclave: Enclave, silent: int) -> None:
    run = decrypt(enclave, {FULL: f"http://127.0.0.1:{silent}"}, "--timeout", "4")
    assert run.status == 5, run.err
    assert f"container credentials http://127.0.0.1:{silent}" in run.error


def test_an_endpoint_that_may_not_be(enclave: Enclave) -> None:
    run = decrypt(enclave, {FULL: "http://192.0.2.1/x?y"})
    assert run.status == 4, run.err
    assert "container credentials http://192.0.2.1/x?... is not asked: http is" in run.error


@pytest.mark.parametrize(
    "variables",
    [
        {FULL: NOWHERE, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "absent"},
        {
            "AWS_WEB_IDENTITY_TOKEN_FILE": "absent",
            "AWS_ROLE_ARN": ROLE,
        },
    ],
)
def test_a_token_file_that_is_missing(enclave: Enclave, variables: Variables) -> None:
    run = decrypt(enclave, variables)
    assert (run.status, run.error) == (
        4,
        "no valid AWS credentials: token file absent cannot be read: No such file or directory",
    )


# -- STS

WEB: Final[dict[str, str | None]] = {
    "AWS_WEB_IDENTITY_TOKEN_FILE": "blob",
    "AWS_ROLE_ARN": ROLE,
}


def assumed(enclave: Enclave) -> bytes:
    ours = json.loads(given(enclave))
    members = {"SessionToken": ours["Token"], **ours}
    inner = "".join(
        f"<{name}>{members[name]}</{name}>"
        for name in ("AccessKeyId", "SecretAccessKey", "SessionToken", "Expiration")
    )
    result = f"<Credentials>{inner}</Credentials>"
    kind = "AssumeRoleWithWebIdentity"
    return f"<{kind}Response><{kind}Result>{result}</{kind}Result></{kind}Response>".encode()


def web(enclave: Enclave, answer: Answer, *options: str, **changed: str | None) -> Run:
    """Decrypt with a web identity, which this STS is shown."""
    enclave.place(b"the.jwt", "jwt")
    with Server(answer, NAMES) as server:
        bundle = enclave.folder / "roots.pem"
        kms = enclave.environment["AWS_CA_BUNDLE"]
        with open(kms, "rb") as source:
            bundle.write_bytes(server.ca.read_bytes() + source.read())
        inside = {
            **WEB,
            "AWS_WEB_IDENTITY_TOKEN_FILE": "jwt",
            "AWS_ENDPOINT_URL_STS": server.url,
            "AWS_CA_BUNDLE": str(bundle),
            **changed,
        }
        options = tuple(one.replace("PORT", str(server.port)) for one in options)
        return decrypt(enclave, inside, *options)


def test_a_web_identity(enclave: Enclave) -> None:
    assert web(enclave, whole(assumed(enclave))).status == 0


def error_of_sts(code: str) -> bytes:
    return f"<ErrorResponse><Error><Code>{code}</Code></Error></ErrorResponse>".encode()


@pytest.mark.parametrize(
    ("answer", "status", "part"),
    [
        (whole(error_of_sts("AccessDenied"), "403 Forbidden"), 4, "AccessDenied"),
        (whole(error_of_sts("IDPCommunicationError"), "400 Bad"), 5, "IDPCommunicationError"),
        (whole(error_of_sts("Throttling"), "400 Bad"), 5, "Throttling"),
        (whole(b"", "503 Busy"), 5, "503"),
        (whole(b"nonsense"), 5, "cannot be read"),
        (says(b""), 5, "Connection was closed"),
    ],
)
def test_what_sts_answers(enclave: Enclave, answer: Answer, status: int, part: str) -> None:
    run = web(enclave, answer)
    assert run.status == status, run.err
    assert part in run.error
    assert "AWS credentials" in run.error


def test_an_sts_that_is_not_there(enclave: Enclave) -> None:
    run = web(enclave, says(b""), AWS_ENDPOINT_URL_STS="https://localhost:1")
    assert run.status == 5, run.err
    assert "https://localhost:1" in run.error


def test_an_sts_that_somebody_else_is(enclave: Enclave) -> None:
    run = web(enclave, says(b""), AWS_CA_BUNDLE=enclave.environment["AWS_CA_BUNDLE"])
    assert run.status == 6, run.err
    assert f"{UNFETCHED}: certificate of their source is not valid" in run.error


# -- through vsock


def test_sts_through_vsock(enclave: Enclave) -> None:
    """The real name, which the certificate must have; only the region of the option is known."""
    way = ["--host-vsock", "STS.eu-west-1.amazonaws.com=3:PORT", "--region", "eu-west-1"]
    none = {"AWS_ENDPOINT_URL_STS": None, "AWS_REGION": None, "AWS_DEFAULT_REGION": None, **PROXY}
    assert web(enclave, whole(assumed(enclave)), *way, **none).err == ""
    assert (enclave.folder / "out").read_bytes() == b"the secret"


def test_tls_with_sts_ends_in_here(enclave: Enclave) -> None:
    way = ["--host-vsock", "sts.eu-west-1.amazonaws.com=3:PORT"]
    ours = enclave.environment["AWS_CA_BUNDLE"]
    run = web(enclave, says(b""), *way, AWS_ENDPOINT_URL_STS=None, AWS_CA_BUNDLE=ours)
    assert run.status == 6, run.err


@pytest.mark.parametrize(
    ("variable", "value", "host"),
    [
        (RELATIVE, "/v2/it", "169.254.170.2"),
        (FULL, "http://169.254.170.23/v1/it", "169.254.170.23"),
        (FULL, "http://[fd00:ec2::23]/v1/it", "[fd00:ec2::23]"),
        (FULL, "http://localhost:99/it", "localhost"),
    ],
)
def test_a_container_through_vsock(enclave: Enclave, variable: str, value: str, host: str) -> None:
    with Server(whole(given(enclave))) as server:
        way = ["--host-vsock", f"{host}=3:{server.port}"]
        kms = enclave.world.url.replace("localhost", "127.0.0.1")
        plain = {**PROXY, "HTTPS_PROXY": None, "AWS_ENDPOINT_URL_KMS": kms}
        run = decrypt(enclave, {variable: value, **plain}, *way)
    assert (run.status, run.err) == (0, "")
    asked = value.split("/")[2] if variable == FULL else host
    assert f"Host: {asked}".encode() in server.requests[0]


def test_a_way_that_leads_nowhere(enclave: Enclave) -> None:
    run = decrypt(enclave, {RELATIVE: "/x"}, "--host-vsock", "169.254.170.2=4:1")
    assert run.status == 5, run.err
    assert "no connection to vsock 4:1: No such device" in run.error
    assert "is vsock-proxy running on the parent" in run.err


def test_hosts_of_a_manifest(enclave: Enclave) -> None:
    """With those of the command line before them, and for https sources as well."""
    enclave.place(enclave.encrypt(node="3"))
    blob = (enclave.folder / "blob").read_bytes()

    with Server(whole(blob), NAMES) as files, Server(whole(given(enclave))) as source:
        text = (
            f'key_id = "{enclave.world.kms.key_arn}"\n'
            f'https_ca_bundle = "{files.ca}"\n'
            f'host_vsock = {{ localhost = "4:1", "169.254.170.2" = "3:{source.port}" }}\n'
            f'[[secret]]\nsource = "https://localhost/x"\ntarget = "{enclave.folder}/out"\n'
            'context = {node = "3"}\n'
        )
        enclave.place(text.encode(), "m.toml")
        inside = {
            **BARE,
            RELATIVE: "/creds",
            "AWS_ENDPOINT_URL_KMS": enclave.world.url.replace("localhost", "127.0.0.1"),
        }
        run = attestor(
            enclave,
            "inject",
            "--host-vsock",
            f"localhost=3:{files.port}",
            "m.toml",
            environment=inside,
        )
    assert (run.status, run.err) == (0, "")
    assert (enclave.folder / "out").read_bytes() == b"the secret"


@pytest.mark.parametrize(
    ("pairs", "part"),
    [
        (["x"], "wants NAME=CID:PORT"),
        (["=3:1"], "wants NAME=CID:PORT"),
        (["a b=3:1"], "wants NAME=CID:PORT"),
        (["a=3"], "no vsock address"),
        (["a=3:1", "A=3:2"], "names a twice"),
        (["169.254.169.254=3:1"], "is the metadata service"),
        (["[fd00:ec2::254]=3:1"], "is the metadata service"),
    ],
)
def test_hosts_that_are_none(pairs: list[str], part: str) -> None:
    with pytest.raises(InputError, match=part):
        vsock.parse_hosts(pairs, "--host-vsock")


# -- vsock and proxies that fail


def test_a_vsock_proxy_that_closes(enclave: Enclave) -> None:
    """As it does with a host that it may not connect to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def close_all() -> None:
            with contextlib.suppress(OSError):
                while True:
                    listener.accept()[0].close()

        threading.Thread(target=close_all, daemon=True).start()
        enclave.place(enclave.encrypt())
        run = attestor(
            enclave,
            "decrypt",
            "--any-key",
            "--vsock",
            f"3:{port}",
            "blob",
            "out",
            environment={"AWS_MAX_ATTEMPTS": "1"},
        )
        assert (run.status, run.error) == (
            5,
            f"KMS cannot be reached: vsock 3:{port} {CLOSED}",
        )
        assert "hint: vsock-proxy does that if its allow list lacks the host" in run.err
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_proxy_that_closes(enclave: Enclave, answer: bytes) -> None:
    def say(connection: socket.socket, _: bytes) -> None:
        connection.sendall(answer)

    enclave.place(enclave.encrypt())
    with Server(say) as server:
        inside: dict[str, Any] = {"HTTPS_PROXY": server.url, "AWS_MAX_ATTEMPTS": "1"}
        run = attestor(enclave, "decrypt", "--any-key", "blob", "out", environment=inside)
    assert (run.status, run.error) == (
        5,
        f"KMS cannot be reached: proxy 127.0.0.1 {CLOSED}",
    )


def test_a_proxy_without_end(enclave: Enclave) -> None:
    def say(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            connection.sendall(b"X: y\r\n" * 1000)

    enclave.place(enclave.encrypt())
    with Server(say) as server:
        inside: dict[str, Any] = {"HTTPS_PROXY": server.url, "AWS_MAX_ATTEMPTS": "1"}
        run = attestor(enclave, "decrypt", "--any-key", "blob", "out", environment=inside)
    assert run.status == 5, run.err
    # from Python 3.12 on there are too many headers before that
    ends = ("proxy 127.0.0.1: answer is longer than", "proxy 127.0.0.1 answers with")
    assert any(end in run.error for end in ends), run.error
