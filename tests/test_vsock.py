"""vsock as the way to KMS, S3 and metadata: on the host over TCP or a socket pair instead."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import sys
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import botocore.exceptions
import botocore.session
import pytest

from attestor import InputError
from attestor_io import connections, vsock
from attestor_io import credentials as credentials_source
from attestor_io.deadline import Deadline
from tests.conftest import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Enclave

DONE: Final = Run(0, b"", "")
KMS: Final = "https://kms.eu-west-1.amazonaws.com"
ONCE: Final[dict[str, str | None]] = {"AWS_MAX_ATTEMPTS": "1", "AWS_ENDPOINT_URL_KMS": None}
PROXY: Final[dict[str, str | None]] = {
    "HTTPS_PROXY": "http://127.0.0.1:1",
    "HTTP_PROXY": "http://127.0.0.1:1",
}


@pytest.mark.parametrize(
    "text",
    ["", "3", "3:", ":8000", "3:8000:1", "-1:8000", "0:8000", "3:0", "x:1", "4294967295:1",
     "3:4294967295", "3:99999999999", "3 :8", "\u0663:8000"],
)  # fmt: skip
def test_no_address(text: str) -> None:
    with pytest.raises(InputError, match="no vsock address"):
        vsock.parse_address(text)


def test_an_address() -> None:
    assert vsock.parse_address("3:8000") == (3, 8000)


# -- the connection class, over a socket pair


def bridge(port: int, cut_after: int | None = None) -> Callable[[float | None], socket.socket]:
    """A dial whose far end is a local port; it hangs up after so many bytes of the server's."""

    def dial(timeout: float | None) -> socket.socket:
        near, far = socket.socketpair()
        near.settimeout(timeout)
        server = socket.create_connection(("127.0.0.1", port))
        threading.Thread(target=pump, args=(far, server, None), daemon=True).start()
        threading.Thread(target=pump, args=(server, far, cut_after), daemon=True).start()
        return near

    return dial


def pump(source: socket.socket, sink: socket.socket, limit: int | None) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            if limit is not None and limit < len(data):
                break
            limit = None if limit is None else limit - len(data)
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


def client(enclave: Enclave, endpoint_url: str = KMS, ca: str | None = None) -> Any:
    credentials = enclave.world.kms.credentials
    return botocore.session.Session().create_client(
        "kms",
        region_name="eu-west-1",
        endpoint_url=endpoint_url,
        verify=ca or enclave.environment["AWS_CA_BUNDLE"],
        aws_access_key_id=credentials.access_key,
        aws_secret_access_key=credentials.secret_key,
        aws_session_token=credentials.token,
        config=botocore.config.Config(
            retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=5
        ),
    )


def carried(made: Any, dial: Callable[[float | None], socket.socket]) -> Any:
    connections.carry_by(made._endpoint.http_session, connections.Way("a socket pair", dial))
    return made


@pytest.mark.parametrize(
    "host", ["kms.eu-west-1.amazonaws.com", "kms-fips.eu-west-1.amazonaws.com"]
)
def test_the_connection_to_the_real_endpoint(enclave: Enclave, host: str) -> None:
    kms = carried(client(enclave, f"https://{host}"), bridge(enclave.world.port))
    for _ in range(3):
        assert (
            kms.describe_key(KeyId="alias/nitrosim")["KeyMetadata"]["Arn"]
            == enclave.world.kms.key_arn
        )


def test_connections_are_kept_alive(enclave: Enclave) -> None:
    kms = carried(client(enclave), bridge(enclave.world.port))
    before = enclave.world.connections
    for _ in range(5):
        kms.describe_key(KeyId="alias/nitrosim")
    assert enclave.world.connections - before == 1


def test_the_certificate_must_be_of_the_endpoints_name(enclave: Enclave) -> None:
    kms = carried(
        client(enclave, "https://kms.us-east-1.amazonaws.com"), bridge(enclave.world.port)
    )
    with pytest.raises(botocore.exceptions.SSLError, match=r"doesn't match|not valid for"):
        kms.list_keys()


def test_the_certificate_must_be_of_our_ca(
    enclave: Enclave, enclaves: Callable[..., Enclave]
) -> None:
    kms = carried(
        client(enclave, ca=enclaves().environment["AWS_CA_BUNDLE"]), bridge(enclave.world.port)
    )
    with pytest.raises(botocore.exceptions.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        kms.list_keys()


def test_only_this_client_changes(enclave: Enclave) -> None:
    carried(client(enclave), bridge(1))
    other = client(enclave, enclave.world.url)
    assert other.describe_key(KeyId="alias/nitrosim")["KeyMetadata"]["Enabled"]


@pytest.mark.parametrize("cut_after", [0, 100, 1500])
def test_closed_in_the_middle(enclave: Enclave, cut_after: int) -> None:
    kms = carried(client(enclave), bridge(enclave.world.port, cut_after))
    errors = (botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError)
    with pytest.raises(errors):
        kms.list_keys()


def test_refused_and_unreachable(enclave: Enclave) -> None:
    def refusing(_timeout: float | None) -> socket.socket:
        raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(botocore.exceptions.EndpointConnectionError):
        carried(client(enclave), refusing).list_keys()

    def silent(_timeout: float | None) -> socket.socket:
        raise TimeoutError

    with pytest.raises(botocore.exceptions.ConnectTimeoutError):
        carried(client(enclave), silent).list_keys()


# -- the command line; CID 3 stands for the ports of this host

HOST: Final = """
import socket, attestor
from attestor_io import vsock
vsock.dial = lambda address, timeout: socket.create_connection(("127.0.0.1", address[1]), timeout)
attestor.main()
"""


def attestor(
    enclave: Enclave, *arguments: str, environment: dict[str, str | None] | None = None
) -> Run:
    merged = {**ONCE, **PROXY, **(environment or {})}
    return enclave.run(sys.executable, "-c", HOST, *arguments, environment=merged)


def test_decrypt_and_the_others(enclave: Enclave) -> None:
    enclave.place(enclave.encrypt())
    way = ["--vsock", f"3:{enclave.world.port}"]
    assert attestor(enclave, "decrypt", "--any-key", *way, "blob", "out") == DONE
    assert (enclave.folder / "out").read_bytes() == b"the secret"
    assert attestor(enclave, "generate-random", *way, "16", "random") == DONE
    key = ["--key-id", enclave.world.kms.key_arn]
    assert attestor(enclave, "encrypt", *key, *way, "out", "again") == DONE
    assert attestor(enclave, "decrypt", *key, *way, "--force", "again", "out") == DONE
    assert (enclave.folder / "out").read_bytes() == b"the secret"


def test_inject_through_vsock_with_s3(enclave: Enclave) -> None:
    enclave.world.store.objects["bucket/key"] = enclave.encrypt(node="3")
    (enclave.folder / "m.toml").write_text(
        f'region = "eu-west-1"\nkey_id = "{enclave.world.kms.key_arn}"\n'
        f'vsock = "3:{enclave.world.port}"\ns3_vsock = "3:{enclave.world.port}"\n'
        f'[[secret]]\nsource = "s3://bucket/key"\ntarget = "{enclave.folder}/out"\n'
        'context = {node = "3"}\n',
        encoding="utf-8",
    )
    elsewhere: dict[str, str | None] = {"AWS_ENDPOINT_URL_S3": "https://127.0.0.1:1"}
    assert attestor(enclave, "inject", "m.toml", environment=elsewhere) == Run(0, b"", "")
    assert (enclave.folder / "out").read_bytes() == b"the secret"


def test_addresses_of_the_command_line_win(enclave: Enclave) -> None:
    enclave.world.store.objects["bucket/key"] = enclave.encrypt(node="3")
    (enclave.folder / "m.toml").write_text(
        f'region = "eu-west-1"\nkey_id = "{enclave.world.kms.key_arn}"\nvsock = "3:1"\n'
        f'[[secret]]\nsource = "s3://bucket/key"\ntarget = "{enclave.folder}/out"\n'
        'context = {node = "3"}\n',
        encoding="utf-8",
    )
    ways = [f"--{name}=3:{enclave.world.port}" for name in ("vsock", "s3-vsock")]
    elsewhere: dict[str, str | None] = {"AWS_ENDPOINT_URL_S3": "https://127.0.0.1:1"}
    assert attestor(enclave, "inject", *ways, "m.toml", environment=elsewhere) == Run(0, b"", "")
    assert (enclave.folder / "out").read_bytes() == b"the secret"


@pytest.mark.parametrize(
    "command", [["decrypt", "--any-key", "blob", "out"], ["generate-random", "1", "out"]]
)
def test_nobody_listens(enclave: Enclave, command: list[str]) -> None:
    enclave.place(enclave.encrypt())
    run = attestor(enclave, *command, "--vsock", "3:1")
    assert run.status == 5, run.err
    assert "KMS cannot be reached" in run.error
    assert enclave.files() == {"blob"}


@pytest.mark.parametrize("address", ["4242:1", "1:1"])
def test_a_context_id_that_cannot_be_reached(enclave: Enclave, address: str) -> None:
    """With the real AF_VSOCK, whatever of it this host has."""
    enclave.place(enclave.encrypt())
    command = ["decrypt", "--any-key", "--timeout", "5", "--vsock", address, "blob", "out"]
    run = enclave.attestor(*command, environment=ONCE)
    assert run.status == 5, run.err
    assert enclave.files() == {"blob"}


def test_an_address_that_is_none(enclave: Enclave) -> None:
    enclave.place(enclave.encrypt())
    run = enclave.decrypt("--vsock", "3")
    assert (run.status, run.error) == (2, "3 is no vsock address CID:PORT, such as 3:8000")


def test_a_certificate_of_somebody_else(enclave: Enclave, enclaves: Callable[..., Enclave]) -> None:
    enclave.place(enclave.encrypt())
    other = enclaves().environment["AWS_CA_BUNDLE"]
    way = ["--vsock", f"3:{enclave.world.port}"]
    run = attestor(
        enclave, "decrypt", "--any-key", *way, "blob", "out", environment={"AWS_CA_BUNDLE": other}
    )
    assert run.status == 6, run.err
    assert enclave.files() == {"blob"}


# -- the metadata service


class Metadata(http.server.BaseHTTPRequestHandler):
    """IMDSv2 with one role; tags, a region, and no answer without a token."""

    server: Service

    def do_PUT(self) -> None:
        assert self.headers["x-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(b"the-token" if self.path == "/latest/api/token" else None)

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.headers["x-aws-ec2-metadata-token"] != "the-token":
            self.answer(None, 401)
        else:
            self.answer(self.server.content.get(self.path.removeprefix("/latest/meta-data/")))

    def answer(self, body: bytes | None, status: int = 404) -> None:
        self.send_response(status if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_: object) -> None:
        pass


class Service(http.server.ThreadingHTTPServer):
    """The server, what it serves, and what it was asked."""

    daemon_threads = True

    def __init__(self, enclave: Enclave) -> None:
        super().__init__(("127.0.0.1", 0), Metadata)
        credentials = enclave.world.kms.credentials
        role = {
            "Code": "Success",
            "AccessKeyId": credentials.access_key,
            "SecretAccessKey": credentials.secret_key,
            "Token": credentials.token,
            "Expiration": (datetime.now(UTC) + timedelta(hours=6)).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        self.asked: list[str] = []
        self.content = {
            "iam/security-credentials/": b"the-role",
            "iam/security-credentials/the-role": json.dumps(role).encode(),
            "placement/region": b"eu-west-1",
            "tags/instance/node": b"3",
        }


@pytest.fixture
def metadata(enclave: Enclave) -> Iterator[Service]:
    """A metadata service with the credentials of the enclave's world."""
    with Service(enclave) as service:
        thread = threading.Thread(target=service.serve_forever, args=(0.05,))
        thread.start()
        yield service
        service.shutdown()
        thread.join()


BARE: Final[dict[str, str | None]] = {
    "AWS_ACCESS_KEY_ID": None,
    "AWS_SECRET_ACCESS_KEY": None,
    "AWS_SESSION_TOKEN": None,
    "AWS_REGION": None,
    "AWS_DEFAULT_REGION": None,
    "AWS_EC2_METADATA_DISABLED": None,
}


def test_credentials_and_region_of_the_instance(enclave: Enclave, metadata: Service) -> None:
    enclave.place(enclave.encrypt())
    way = ["--vsock", f"3:{enclave.world.port}", "--imds-vsock", f"3:{metadata.server_port}"]
    assert attestor(enclave, "decrypt", "--any-key", *way, "blob", "out", environment=BARE) == DONE
    assert "/latest/meta-data/placement/region" in metadata.asked


def test_a_tag_of_the_instance_as_a_variable(enclave: Enclave, metadata: Service) -> None:
    enclave.place(enclave.encrypt(node="3"))
    text = (
        f'key_id = "{enclave.world.kms.key_arn}"\n'
        f'vsock = "3:{enclave.world.port}"\nimds_vsock = "3:{metadata.server_port}"\n'
        '[variables]\nNODE = { pattern = "[0-9]{1,4}", tag = "node" }\n'
        f'[[secret]]\nsource = "{enclave.folder}/blob"\ntarget = "{enclave.folder}/out"\n'
        'context = {node = "${NODE}"}\n'
    )
    (enclave.folder / "m.toml").write_text(text, encoding="utf-8")
    assert attestor(enclave, "inject", "m.toml", environment=BARE) == DONE
    metadata.content["tags/instance/node"] = b"3/../4"
    assert attestor(enclave, "inject", "-f", "m.toml", environment=BARE).status == 2
    del metadata.content["tags/instance/node"]
    run = attestor(enclave, "inject", "-f", "m.toml", environment=BARE)
    assert (run.status, run.error) == (
        4,
        "the instance has no tag node, or tags are not enabled in instance metadata",
    )
    assert (enclave.folder / "out").read_bytes() == b"the secret"


def test_expired_credentials_are_renewed_before_they_are_used(
    enclave: Enclave, metadata: Service
) -> None:
    """botocore's own refreshing, through our connections."""
    session = botocore.session.Session()
    port = metadata.server_port
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vsock, "dial", lambda _address, timeout: bridge(port)(timeout))
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_CONFIG_FILE", "/absent")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/absent")
        credentials_source.equip(session, Deadline(60), (3, port), {})
        credentials: Any = session.get_credentials()
        first = credentials.get_frozen_credentials()
        renewed = json.loads(metadata.content["iam/security-credentials/the-role"]) | {
            "AccessKeyId": "AKIDRENEWED"
        }
        metadata.content["iam/security-credentials/the-role"] = json.dumps(renewed).encode()
        assert credentials.get_frozen_credentials() == first
        credentials._expiry_time = datetime.now(UTC) + timedelta(minutes=5)
        assert credentials.get_frozen_credentials().access_key == "AKIDRENEWED"


def test_a_metadata_service_that_is_not_there(enclave: Enclave) -> None:
    enclave.place(enclave.encrypt())
    way = ["--vsock", f"3:{enclave.world.port}", "--imds-vsock", "3:1"]
    run = attestor(enclave, "decrypt", "--any-key", *way, "blob", "out", environment=BARE)
    assert (run.status, run.error) == (
        5,
        "metadata service at vsock 3:1 cannot be reached: Connection refused",
    )
    run = attestor(
        enclave,
        "decrypt",
        "--any-key",
        "--region",
        "eu-west-1",
        *way,
        "blob",
        "out",
        environment=BARE,
    )
    assert run.status == 5
    assert run.error == (
        "AWS credentials cannot be fetched: "
        "metadata service at vsock 3:1 cannot be reached: Connection refused"
    )
    assert enclave.files() == {"blob"}


# -- the real thing


@pytest.mark.vsock
def test_af_vsock_on_the_loopback(enclave: Enclave) -> None:
    """Where the kernel has vsock_loopback: VMADDR_CID_LOCAL is 1."""
    enclave.place(enclave.encrypt())
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        listener.bind((1, socket.VMADDR_PORT_ANY))
        listener.listen()
        threading.Thread(target=serve, args=(listener, enclave.world.port), daemon=True).start()
        way = ["--vsock", f"1:{listener.getsockname()[1]}"]
        run = enclave.attestor("decrypt", "--any-key", *way, "blob", "out", environment=ONCE)
    assert run == DONE
    assert (enclave.folder / "out").read_bytes() == b"the secret"


def serve(listener: socket.socket, port: int) -> None:
    """What vsock-proxy does."""
    with contextlib.suppress(OSError):
        while True:
            near, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", port))
            threading.Thread(target=pump, args=(near, server, None), daemon=True).start()
            threading.Thread(target=pump, args=(server, near, None), daemon=True).start()
