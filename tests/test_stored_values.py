"""Ciphertexts in Secrets Manager and Parameter Store: `inject` fetches and opens them, and what is
no ciphertext, or no answer, is refused. The services are moto's, met by real boto3 over TLS.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any, Final

import pytest
from werkzeug.wrappers import Request, Response

from attestor import InputError
from attestor_commands.inject.manifest import parse
from nitrosim.kms import REGION
from nitrosim.server import HttpsServer
from tests.conftest import OPERATOR, Enclave, Run
from tests.forked import ForkServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from nitrosim.world import World

DONE: Final = Run(0, b"", "")
ARN: Final = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
CONTEXT: Final = 'context = { node = "3" }'
NAMES: Final = {"secretsmanager": "SECRETS_MANAGER", "ssm": "SSM"}
SOURCES: Final = {"secretsmanager": "secretsmanager://value", "ssm": "ssm:///value"}


class Shelf:
    """The operator's clients of both services, and a manifest with one secret."""

    def __init__(self, enclave: Enclave) -> None:
        self.enclave = enclave
        self.attestor: Callable[..., Run] = enclave.attestor
        self.secrets, self.parameters = (self._client(service) for service in NAMES)

    def _client(self, service: str) -> Any:
        credentials = self.enclave.world.kms.credentials
        return OPERATOR.create_client(
            service,
            region_name=REGION,
            endpoint_url=self.enclave.environment[f"AWS_ENDPOINT_URL_{NAMES[service]}"],
            verify=self.enclave.environment["AWS_CA_BUNDLE"],
            aws_access_key_id=credentials.access_key,
            aws_secret_access_key=credentials.secret_key,
            aws_session_token=credentials.token,
        )

    def text(self, plaintext: bytes = b"the secret") -> str:
        """A ciphertext as these services keep it."""
        return base64.b64encode(self.enclave.encrypt(plaintext, node="3")).decode()

    def inject(
        self,
        source: str,
        *options: str,
        kind: str = "secret",
        environment: Mapping[str, str | None] | None = None,
        lines: str = "",
    ) -> Run:
        """Inject a source into "out", which is empty if there is nothing."""
        lines = lines or {"secret": CONTEXT, "file": "unauthenticated = true"}[kind]
        text = (
            f'region = "{REGION}"\nkey_id = "{self.enclave.world.kms.key_arn}"\n'
            f'[variables]\nNODE = "[a-z0-9-]*"\n[[{kind}]]\nsource = {json.dumps(source)}\n'
            f'target = "{self.enclave.folder}/out"\n'
            f"{lines}\n"
        )
        self.enclave.place(text.encode(), "m.toml")
        (self.enclave.folder / "out").unlink(missing_ok=True)
        return self.attestor("inject", "-f", *options, "m.toml", environment=environment)

    @property
    def out(self) -> bytes:
        """What the last run placed."""
        path = self.enclave.folder / "out"
        return path.read_bytes() if path.exists() else b""


@pytest.fixture(scope="module")
def shelf(_world: World, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    enclave = Enclave(_world, tmp_path_factory.mktemp("shelf"))
    return Shelf(enclave)


# -- what works


def test_secrets_manager(shelf: Shelf) -> None:
    made = shelf.secrets.create_secret(Name="app/node-3/key", SecretString=shelf.text(b"first"))
    shelf.secrets.put_secret_value(SecretId=made["ARN"], SecretString=shelf.text(b"second"))
    for source, plaintext in (
        ("secretsmanager://app/node-3/key", b"second"),
        ("secretsmanager://app/node-${NODE}/key", b"second"),
        (f"secretsmanager://{made['ARN']}", b"second"),
        ("secretsmanager://app/node-3/key#AWSPREVIOUS", b"first"),
        (f"secretsmanager://app/node-3/key#{made['VersionId']}", b"first"),
    ):
        assert shelf.inject(source, "--set", "NODE=3") == DONE
        assert shelf.out == plaintext


def test_parameter_store(shelf: Shelf) -> None:
    for version, plaintext in enumerate((b"first", b"second"), 1):
        shelf.parameters.put_parameter(
            Name="/app/node-3/key", Value=shelf.text(plaintext), Type="String", Overwrite=True
        )
        shelf.parameters.label_parameter_version(
            Name="/app/node-3/key", ParameterVersion=version, Labels=[f"label-{version}"]
        )
    shelf.parameters.put_parameter(Name="plain", Value=shelf.text(b"third"), Type="String")
    for source, plaintext in (
        ("ssm:///app/node-3/key", b"second"),
        ("ssm:///app/node-${NODE}/key", b"second"),
        ("ssm:///app/node-3/key#1", b"first"),
        ("ssm:///app/node-3/key#label-1", b"first"),
        ("ssm://plain", b"third"),
    ):
        assert shelf.inject(source, "--set", "NODE=3") == DONE
        assert shelf.out == plaintext


def test_bytes_and_messages(shelf: Shelf) -> None:
    """SecretBinary is the ciphertext itself; what AWS takes at most of it fits."""
    blob = shelf.enclave.encrypt(b"of bytes", node="3")
    shelf.secrets.create_secret(Name="binary", SecretBinary=blob)
    assert shelf.inject("secretsmanager://binary") == DONE
    assert shelf.out == b"of bytes"
    shelf.enclave.place(plaintext := bytes(range(256)) * 250, "plain")
    key = ["--key-id", shelf.enclave.world.kms.key_arn, "--context", "node=3"]
    assert shelf.attestor("encrypt", *key, "plain", "large") == DONE
    message = (shelf.enclave.folder / "large").read_bytes()
    shelf.secrets.create_secret(Name="large", SecretBinary=message)
    assert shelf.inject("secretsmanager://large") == DONE
    assert shelf.out == plaintext
    shelf.secrets.create_secret(Name="wrapped", SecretString=base64.encodebytes(blob).decode())
    assert shelf.inject("secretsmanager://wrapped") == DONE
    both = f'{CONTEXT}\nencoding = "base64"'
    assert shelf.inject("secretsmanager://wrapped", lines=both) == DONE


def test_files_are_what_is_there(shelf: Shelf) -> None:
    shelf.parameters.put_parameter(Name="/config", Value="x = \u00e9\n", Type="String")
    assert shelf.inject("ssm:///config", kind="file") == DONE
    assert shelf.out == "x = \u00e9\n".encode()


@pytest.fixture(scope="module")
def dialling(shelf: Shelf) -> Iterator[Shelf]:
    """The same, with TCP in the place of vsock."""
    enclave = shelf.enclave
    with ForkServer(enclave.environment, enclave.folder, vsock_to_tcp=True) as server:
        made = Shelf(enclave)
        made.attestor = server.attestor
        yield made


@pytest.mark.parametrize("service", NAMES)
def test_through_vsock(dialling: Shelf, service: str) -> None:
    """By the host's own name, which TLS checks."""
    host = f"{service}.{REGION}.amazonaws.com"
    if service == "ssm":
        dialling.parameters.put_parameter(Name="/value", Value=dialling.text(), Type="String")
    else:
        dialling.secrets.create_secret(Name="value", SecretString=dialling.text())
    variable = f"AWS_ENDPOINT_URL_{NAMES[service]}"
    way = f"{host}=3:{dialling.enclave.world.port}"
    source = SOURCES[service]
    assert dialling.inject(source, "--host-vsock", way, environment={variable: None}) == DONE
    assert dialling.out == b"the secret"
    run = dialling.inject(source, "--host-vsock", f"{host}=3:1", environment={variable: None})
    assert run.status == 5, run.err
    assert "vsock 3:1" in run.error


# -- what is refused


@pytest.mark.parametrize(
    ("source", "status", "part"),
    [
        ("secretsmanager://absent", 2, "ResourceNotFoundException"),
        ("secretsmanager://plaintext#absent-label", 2, "ResourceNotFoundException"),
        ("secretsmanager://forbidden", 4, "AccessDeniedException"),
        ("secretsmanager://plaintext", 2, "ciphertext source is not base64 text"),
        ("ssm:///absent", 2, "ParameterNotFound"),
        ("ssm:///plaintext#9", 2, "ParameterVersionNotFound"),
        ("ssm:///forbidden", 4, "AccessDeniedException"),
        ("ssm:///plaintext", 2, "ciphertext source is not base64 text"),
    ],
)
def test_what_is_not_there_and_what_is_no_ciphertext(
    shelf: Shelf, source: str, status: int, part: str
) -> None:
    password = "correct horse battery staple"
    if "plaintext" in source:
        shelf.parameters.put_parameter(
            Name="/plaintext", Value=password, Type="String", Overwrite=True
        )
        if not shelf.secrets.list_secrets(Filters=[{"Key": "name", "Values": ["plaintext"]}])[
            "SecretList"
        ]:
            shelf.secrets.create_secret(Name="plaintext", SecretString=password)
    run = shelf.inject(source)
    assert run.status == status, run.err
    assert part in run.error
    assert "horse" not in run.err
    assert ("the parent's to read" in run.err) == ("plaintext" in source and "#" not in source)
    assert shelf.out == b""


def test_credentials_that_are_wrong(shelf: Shelf) -> None:
    """KMS is not asked any more: the source comes first."""
    run = shelf.inject("ssm:///value", environment={"AWS_SESSION_TOKEN": "wrong"})
    assert run.status == 4, run.err
    assert "source ssm:///value cannot be read: UnrecognizedClientException" in run.error


@pytest.mark.parametrize("service", NAMES)
def test_an_endpoint_without_tls(shelf: Shelf, service: str) -> None:
    environment = {f"AWS_ENDPOINT_URL_{NAMES[service]}": "http://localhost:1"}
    run = shelf.inject(SOURCES[service], environment=environment)
    assert run.status == 2, run.err
    assert "endpoint http://localhost:1 is not https" in run.error


# -- hostile answers


def answers(service: str, value: str) -> bytes:
    """An answer with this JSON where the value is."""
    if service == "ssm":
        return b'{"Parameter": {"Value": %s}}' % value.encode()
    return b'{"SecretString": %s}' % value.encode()


@pytest.mark.parametrize("service", NAMES)
@pytest.mark.parametrize(
    ("value", "status"),
    [
        ("null", 5),
        ("3", 5),
        ("[]", 5),
        ('{"a": 1}', 5),
        ('"\\ud800"', 5),
        ('""', None),
        ('"%s"' % ("A" * 400_000), 5),
        ("[" * 50_000, 5),
        ('"', 5),
        ("\xff", 5),
    ],
    ids=range(10),
)
def test_answers_that_are_none(shelf: Shelf, service: str, value: str, status: int | None) -> None:
    shape(shelf, service, Response(answers(service, value)), status)


@pytest.mark.parametrize("service", NAMES)
@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"", 5),
        (b"null", 5),
        (b"[]", 5),
        (b'{"Parameter": null, "SecretBinary": 3}', 5),
        (b'{"Parameter": 3, "SecretBinary": "!"}', None),
        (b'{"Parameter": [], "SecretBinary": []}', 5),
        (b"{}", 5),
    ],
)
def test_bodies_that_are_none(
    shelf: Shelf, service: str, answer: bytes, status: int | None
) -> None:
    shape(shelf, service, Response(answer), status)


@pytest.mark.parametrize("service", NAMES)
@pytest.mark.parametrize(
    ("code", "http", "status"),
    [
        ("ThrottlingException", 400, 5),
        ("InternalServiceError", 500, 5),
        ("AccessDeniedException", 400, 4),
        ("ExpiredTokenException", 400, 4),
        ("DecryptionFailure", 400, 4),
        ("InvalidSignatureException", 400, 4),
        ("InvalidRequestException", 400, 2),
    ],
)
def test_errors_by_their_codes(
    shelf: Shelf, service: str, code: str, http: int, status: int
) -> None:
    """Whatever the status of HTTP: these services have 400 for nearly all of them."""
    body = json.dumps({"__type": code, "message": "m" * 5000})
    run = shape(shelf, service, Response(body, http), status)
    assert code in run.error
    assert len(run.err) < 3000


def shape(shelf: Shelf, service: str, response: Response, status: int | None) -> Run:
    """Inject while a service answers so; without a status, only that it is one of ours."""
    response.headers["Content-Type"] = "application/x-amz-json-1.1"
    with HttpsServer(Request.application(lambda _request: response)) as server:
        ca = shelf.enclave.folder / "answers.pem"
        own = (shelf.enclave.folder / shelf.enclave.environment["AWS_CA_BUNDLE"]).read_bytes()
        ca.write_bytes(server.ca_pem + own)
        run = shelf.inject(
            SOURCES[service],
            environment={
                f"AWS_ENDPOINT_URL_{NAMES[service]}": server.url,
                "AWS_CA_BUNDLE": str(ca),
                "AWS_MAX_ATTEMPTS": "1",
            },
        )
    assert run.status == status if status else run.status in {2, 5}, run.err
    assert run.error
    assert shelf.out == b""
    return run


# -- names


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("secretsmanager://", "names no secret"),
        ("secretsmanager://#AWSCURRENT", "names no secret"),
        ("secretsmanager://a b", "names no secret"),
        ("secretsmanager://a?b", "names no secret"),
        ("secretsmanager://a#", "names no secret"),
        ("secretsmanager://a#b#c", "names no secret"),
        ("secretsmanager://\u00e4", "names no secret"),
        ("secretsmanager://a\n", "names no secret"),
        (f"secretsmanager://{'a' * 520}", "names no secret"),
        ("secretsmanager://arn:aws:s3:::x", "a variable may stand only in the path"),
        ("secretsmanager://arn:aws:kms:eu-west-1:111122223333:secret:x", "names no secret"),
        ("secretsmanager://arn:aws:secretsmanager:${V}:111122223333:secret:x", "only in the path"),
        ("secretsmanager://${ARN}", "names no secret"),
        ("ssm://", "names no parameter"),
        ("ssm:///", "names no parameter"),
        ("ssm:////a", "names no parameter"),
        ("ssm://a/b", "names no parameter"),
        ("ssm:///a/", "names no parameter"),
        ("ssm:///a:1", "names no parameter"),
        ("ssm:///a#", "names no parameter"),
        (f"ssm:///{'a' * 1011}", "names no parameter"),
        ("${V}:///a", "only in the path"),
        ("ssm:/a", "no absolute path"),
        ("secretsmanager:/a", "no absolute path"),
    ],
)
def test_sources_that_name_nothing(source: str, part: str) -> None:
    text = (
        f'key_id = "{ARN}"\n[variables]\nV = ".*"\nARN = ".*"\n[[secret]]\nunbound = true\n'
        f'source = {json.dumps(source)}\ntarget = "/out"\n'
    )
    given = {"V": "ssm", "ARN": "arn:aws:secretsmanager:eu-west-1:111122223333:secret:x"}
    with pytest.raises(InputError) as caught:
        parse(text.encode(), given, {})
    assert part in " ".join([str(caught.value), *caught.value.hints])


def test_a_long_name_takes_no_time() -> None:
    text = f'key_id = "{ARN}"\n[[secret]]\nunbound = true\nsource = "ssm://{"/a" * 100_000}!"\n'
    with pytest.raises(InputError):
        parse(f'{text}target = "/out"\n'.encode(), {}, {})


# -- the simulators


def test_two_worlds_share_nothing(shelf: Shelf) -> None:
    """And the credentials are looked at, as everywhere but at S3."""
    with pytest.raises(shelf.parameters.exceptions.ParameterNotFound):
        shelf.parameters.get_parameter(Name="/nobody/put/this")
    with pytest.raises(shelf.secrets.exceptions.ClientError, match="UnknownOperationException"):
        shelf.secrets.get_random_password()
    with pytest.raises(shelf.secrets.exceptions.ClientError, match="AccessDeniedException"):
        shelf.secrets.create_secret(Name="forbidden", SecretString="x")
