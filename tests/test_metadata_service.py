"""The simulated instance metadata service: IMDSv2 byte by byte, and against botocore's client."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import pytest
from botocore.credentials import InstanceMetadataProvider
from botocore.utils import IMDSFetcher, InstanceMetadataFetcher, InstanceMetadataRegionFetcher
from click.testing import CliRunner

from nitrosim.cli import cli
from nitrosim.kms_wire import Credentials
from nitrosim.metadata import MetadataService
from nitrosim.server import HttpServer
from nitrosim.world import World
from tests.conftest import ROOT, no_thread_stays

if TYPE_CHECKING:
    from collections.abc import Iterator

CREDENTIALS: Final = Credentials.generate()
TTL: Final = "X-aws-ec2-metadata-token-ttl-seconds"
TOKEN: Final = "X-aws-ec2-metadata-token"
TAGS: Final = {"mpa-node": "3", "Name": "a node, with blanks/slashes \u00e9", "empty": ""}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Client:
    """Plain HTTP, so that nothing is done for us."""

    def __init__(self, port: int) -> None:
        self.port = port

    def request(
        self, method: str, path: str, headers: dict[str, str] | None = None
    ) -> tuple[int, str, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, headers=headers or {})
            response = connection.getresponse()
            return (
                response.status,
                response.read().decode(),
                {name.lower(): v for name, v in response.getheaders()},
            )
        finally:
            connection.close()

    def token(self, ttl: str = "21600") -> str:
        status, token, _ = self.request("PUT", "/latest/api/token", {TTL: ttl})
        assert status == 200
        return token

    def get(self, path: str, token: str | None = None) -> tuple[int, str]:
        headers = {TOKEN: self.token() if token is None else token}
        return self.request("GET", f"/latest/meta-data/{path}", headers)[:2]


def service(tags: dict[str, str] | None, clock: Clock | None = None) -> HttpServer:
    options: dict[str, Any] = {"clock": clock} if clock else {}
    return HttpServer(
        MetadataService(
            instance_id="i-0123",
            region="eu-west-1",
            role="the-role",
            credentials=CREDENTIALS,
            tags=tags,
            **options,
        )
    )


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with service(TAGS) as running:
        yield running


@pytest.fixture
def client(server: HttpServer) -> Client:
    return Client(server.port)


@pytest.mark.parametrize("headers", [{}, {TOKEN: ""}, {TOKEN: "made up"}])
def test_nothing_without_a_token(client: Client, headers: dict[str, str]) -> None:
    for path in ("/latest/meta-data/instance-id", "/latest/meta-data/", "/absent", "/"):
        assert client.request("GET", path, headers)[0] == 401


@pytest.mark.parametrize("ttl", ["1", "60", "21600"])
def test_a_token(client: Client, ttl: str) -> None:
    status, token, headers = client.request("PUT", "/latest/api/token", {TTL: ttl})
    assert (status, headers[TTL.lower()]) == (200, ttl)
    assert len(token) == 56
    assert token.isascii()
    assert client.token() != token


@pytest.mark.parametrize(
    "ttl", [None, "", "0", "21601", "-1", "1.5", "x", "1e3", "9" * 4000, "\u00b2"]
)
def test_a_ttl_that_cannot_be(client: Client, ttl: str | None) -> None:
    headers = {} if ttl is None else {TTL: ttl}
    assert client.request("PUT", "/latest/api/token", headers)[0] == 400


def test_no_token_through_a_proxy(client: Client) -> None:
    assert (
        client.request("PUT", "/latest/api/token", {TTL: "60", "X-Forwarded-For": "10.0.0.1"})[0]
        == 403
    )


def test_tokens_expire() -> None:
    clock = Clock()
    with service(None, clock) as running:
        client = Client(running.port)
        short, long = client.token("10"), client.token("20")
        assert [client.get("instance-id", token) for token in (short, long)] == [
            (200, "i-0123")
        ] * 2
        clock.now = 9.9
        assert client.get("instance-id", short)[0] == 200
        clock.now = 10.0
        assert [client.get("instance-id", token)[0] for token in (short, long)] == [401, 200]
        client.token()
        assert client.get("instance-id", long)[0] == 200


def test_tokens_of_many_clients_at_once(client: Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        tokens = list(pool.map(lambda _: client.token(), range(64)))
        assert {
            status for status, _ in pool.map(lambda token: client.get("instance-id", token), tokens)
        } == {200}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("instance-id", "i-0123"),
        ("placement/region", "eu-west-1"),
        ("placement/availability-zone", "eu-west-1a"),
        ("placement/availability-zone/", "eu-west-1a"),  # as botocore asks
        ("tags/instance/mpa-node", "3"),
        ("tags/instance/Name", TAGS["Name"]),
        ("tags/instance/empty", ""),
        ("", "iam/\ninstance-id\nplacement/\ntags/"),
        ("placement", "availability-zone\nregion"),
        ("placement/", "availability-zone\nregion"),
        ("iam/", "security-credentials/"),
        ("iam/security-credentials/", "the-role"),
        ("tags/", "instance/"),
        ("tags/instance", "Name\nempty\nmpa-node"),
        ("tags/instance/", "Name\nempty\nmpa-node"),
    ],
)
def test_values_and_lists(client: Client, path: str, text: str) -> None:
    assert client.get(path) == (200, text)


@pytest.mark.parametrize(
    "path",
    ["absent", "place", "instance-id/x", "tags/instance/absent", "tags/instance/mpa", "iam/info",
     "../meta-data/instance-id", "iam/security-credentials/other", "%00"],
)  # fmt: skip
def test_what_is_not_there(client: Client, path: str) -> None:
    assert client.get(path)[0] == 404


@pytest.mark.parametrize(
    "path", ["/", "/latest", "/latest/user-data", "/latest/meta-datax", "/2021-03-23/meta-data/"]
)
def test_other_trees(client: Client, path: str) -> None:
    assert client.request("GET", path, {TOKEN: client.token()})[0] == 404


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/latest/api/token"), ("PUT", "/latest/meta-data/instance-id")]
)
def test_other_methods(client: Client, method: str, path: str) -> None:
    assert client.request(method, path, {TTL: "60", TOKEN: client.token()})[0] == 405


def test_tags_are_disabled_by_default() -> None:
    with service(None) as running:
        client = Client(running.port)
        assert [
            client.get(path)[0] for path in ("tags/", "tags/instance", "tags/instance/mpa-node")
        ] == [404] * 3
        assert client.get("") == (200, "iam/\ninstance-id\nplacement/")


@pytest.mark.parametrize(
    "key", ["", ".", "..", "_index", "a b", "a/b", "\u00e9", "a\n", "x" * 129, "a*"]
)
def test_keys_that_the_metadata_cannot_have(key: str) -> None:
    with pytest.raises(ValueError, match="cannot be the key of a tag"):
        service({key: "value"})


def test_keys_at_their_limits() -> None:
    for key in ("x" * 128, "a+-=.,_:@9", "...", "_index_"):
        with service({key: "v" * 256}) as running:
            assert Client(running.port).get(f"tags/instance/{key}") == (200, "v" * 256)
    with pytest.raises(ValueError, match="at most 256 characters, key has 257"):
        service({"key": "v" * 257})


def test_credentials(client: Client) -> None:
    status, text = client.get("iam/security-credentials/the-role")
    fields = json.loads(text)
    assert status == 200
    assert (fields["AccessKeyId"], fields["SecretAccessKey"], fields["Token"]) == (
        CREDENTIALS.access_key, CREDENTIALS.secret_key, CREDENTIALS.token,
    )  # fmt: skip
    assert (fields["Code"], fields["Type"]) == ("Success", "AWS-HMAC")
    left = datetime.strptime(fields["Expiration"], "%Y-%m-%dT%H:%M:%S%z") - datetime.now(UTC)
    assert timedelta(hours=5, minutes=50) < left <= timedelta(hours=6)


def test_the_end_waits_for_no_client() -> None:
    with no_thread_stays(), service(None) as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
        connection.connect()
    connection.close()


# botocore


def test_the_credentials_of_botocore(server: HttpServer) -> None:
    fetcher = InstanceMetadataFetcher(
        timeout=10, num_attempts=1, base_url=server.url, config={"ec2_metadata_v1_disabled": True}
    )
    credentials = InstanceMetadataProvider(iam_role_fetcher=fetcher).load()
    assert credentials is not None
    frozen = credentials.get_frozen_credentials()
    assert (frozen.access_key, frozen.secret_key, frozen.token) == (
        CREDENTIALS.access_key, CREDENTIALS.secret_key, CREDENTIALS.token,
    )  # fmt: skip
    assert credentials.method == "iam-role"


def region(server: HttpServer) -> str | None:
    return InstanceMetadataRegionFetcher(
        timeout=10, num_attempts=1, base_url=server.url
    ).retrieve_region()


def test_the_region_of_botocore(server: HttpServer) -> None:
    assert region(server) == "eu-west-1"


def test_botocore_without_a_token_is_refused(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 1 of the service is not there."""
    monkeypatch.setattr(IMDSFetcher, "_fetch_metadata_token", lambda _: None)
    fetcher = InstanceMetadataFetcher(timeout=10, num_attempts=1, base_url=server.url)
    assert fetcher.retrieve_iam_role_credentials() == {}
    assert region(server) is None


# In a world


def test_a_world_with_tags() -> None:
    with World(
        tags={"mpa-node": "3"}, principal="arn:aws:sts::111122223333:assumed-role/mine/session"
    ) as world:
        environment = world.environment({"AWS_EC2_METADATA_DISABLED": "true"})
        assert "AWS_EC2_METADATA_DISABLED" not in environment
        assert environment["AWS_EC2_METADATA_SERVICE_ENDPOINT"] == world.metadata_url
        client = Client(int(environment["AWS_EC2_METADATA_SERVICE_ENDPOINT"].rpartition(":")[2]))
        assert client.get("iam/security-credentials/") == (200, "mine")
        assert client.get("instance-id") == (200, "i-0123456789abcdef0")  # whose hash PCR4 is
        fields = json.loads(client.get("iam/security-credentials/mine")[1])
        assert fields["AccessKeyId"] == world.kms.credentials.access_key


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--tag", "x"], "--tag wants NAME=VALUE, got x"),
        (["--tag", "a/b=c"], "'a/b' cannot be the key of a tag"),
    ],
)
def test_options_that_cannot_be(options: list[str], part: str) -> None:
    done = CliRunner().invoke(cli, ["run", *options, "--", "true"])
    assert done.exit_code == 2
    assert part in done.output


SHOW: Final = """
import botocore.session, botocore.utils, os
session = botocore.session.Session()
for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
    del os.environ[name]
fetcher = botocore.utils.IMDSFetcher(base_url=os.environ["AWS_EC2_METADATA_SERVICE_ENDPOINT"])
token = fetcher._fetch_metadata_token()
tag = fetcher._get_request("latest/meta-data/tags/instance/a", None, token).text
print(session.get_credentials().method, tag)
"""


def test_run_with_a_tag() -> None:
    command = [sys.executable, "-m", "nitrosim.cli", "run", "--tag", "node=3", "--tag", "a=b=c"]
    done = subprocess.run(
        [*command, "--", sys.executable, "-c", SHOW],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "iam-role b=c\n", "")


def test_a_world_without() -> None:
    with World() as world:
        assert world.metadata_url is None
        environment = world.environment(
            {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://169.254.169.254"}
        )
        # the host's would be asked where no endpoint is named
        assert environment["AWS_EC2_METADATA_SERVICE_ENDPOINT"].endswith(".invalid")
        assert environment["AWS_EC2_METADATA_DISABLED"] == "true"
