"""The simulated S3, as SDKs and `aws s3` meet it: uploads in chunks with checksums behind them,
large objects in parts, listings, ranges, copies.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import ssl
import zlib
from typing import TYPE_CHECKING, Any, Final

import boto3
import pytest
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError

from nitrosim.kms import REGION

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nitrosim.world import World
    from tests.conftest import Enclave

KEY: Final = "a folder/b+c%20d&é"
PART: Final = 5 << 20  # the smallest of a multipart upload


@pytest.fixture(scope="module")
def client(_world: World) -> Iterator[Any]:
    environment, credentials = _world.environment({}), _world.kms.credentials
    client = boto3.session.Session().client(
        "s3",
        region_name=REGION,
        endpoint_url=environment["AWS_ENDPOINT_URL_S3"],
        verify=environment["AWS_CA_BUNDLE"],
        aws_access_key_id=credentials.access_key,
        aws_secret_access_key=credentials.secret_key,
    )
    with contextlib.closing(client):
        yield client


@pytest.fixture
def s3(client: Any, _world: World) -> Iterator[Any]:
    """A client of a store without objects."""
    yield client
    _world.store.objects.clear()


@pytest.mark.parametrize("algorithm", [None, "CRC32", "SHA1", "SHA256"])
@pytest.mark.parametrize("form", [bytes, io.BytesIO])
def test_objects_are_put_and_got(s3: Any, algorithm: str | None, form: type) -> None:
    """Over TLS botocore sends them aws-chunked, with a trailing checksum."""
    data = bytes(range(256)) * 300
    options = {"ChecksumAlgorithm": algorithm} if algorithm else {}
    s3.put_object(Bucket="bucket", Key=KEY, Body=form(data), **options)
    assert s3.get_object(Bucket="bucket", Key=KEY)["Body"].read() == data
    head = s3.head_object(Bucket="bucket", Key=KEY)
    assert (head["ContentLength"], head["LastModified"].year > 2000) == (len(data), True)


def test_an_object_in_parts(s3: Any, tmp_path: Path) -> None:
    """What `aws s3 cp` does with a large file, up and down."""
    data = bytes(range(256)) * 4096 * 6
    (tmp_path / "up").write_bytes(data)
    config = TransferConfig(multipart_threshold=PART, multipart_chunksize=PART)
    s3.upload_file(str(tmp_path / "up"), "bucket", "large", Config=config)
    s3.download_file("bucket", "large", str(tmp_path / "down"), Config=config)
    assert (tmp_path / "down").read_bytes() == data


def test_an_upload_that_is_given_up(s3: Any) -> None:
    upload = s3.create_multipart_upload(Bucket="bucket", Key="large")["UploadId"]
    way = {"Bucket": "bucket", "Key": "large", "UploadId": upload}
    s3.upload_part(**way, PartNumber=1, Body=b"x")
    s3.abort_multipart_upload(**way)
    with pytest.raises(ClientError, match="NoSuchUpload"):
        s3.upload_part(**way, PartNumber=2, Body=b"x")
    with pytest.raises(ClientError, match="NoSuchKey"):
        s3.get_object(Bucket="bucket", Key="large")


def test_listings(s3: Any) -> None:
    for key in ("z", KEY, "a folder/<&>", "a folder/deep/er"):
        s3.put_object(Bucket="bucket", Key=key, Body=b"12")
    s3.put_object(Bucket="bucket-2", Key="other", Body=b"")
    whole = s3.list_objects_v2(Bucket="bucket")
    assert [(item["Key"], item["Size"]) for item in whole["Contents"]] == [
        ("a folder/<&>", 2), (KEY, 2), ("a folder/deep/er", 2), ("z", 2),
    ]  # fmt: skip
    folder = s3.list_objects(Bucket="bucket", Prefix="a folder/", Delimiter="/", EncodingType="url")
    assert [item["Key"] for item in folder["Contents"]] == [
        "a%20folder/%3C%26%3E",
        "a%20folder/b%2Bc%2520d%26%C3%A9",
    ]
    assert [item["Prefix"] for item in folder["CommonPrefixes"]] == ["a%20folder/deep/"]
    assert "Contents" not in s3.list_objects_v2(Bucket="empty")


def test_objects_are_copied_and_removed(s3: Any) -> None:
    s3.create_bucket(Bucket="other")
    s3.head_bucket(Bucket="other")
    s3.put_object(Bucket="bucket", Key=KEY, Body=b"data")
    s3.copy_object(Bucket="other", Key="copy", CopySource={"Bucket": "bucket", "Key": KEY})
    s3.delete_object(Bucket="bucket", Key=KEY)
    assert s3.get_object(Bucket="other", Key="copy")["Body"].read() == b"data"
    with pytest.raises(ClientError, match="NoSuchKey"):
        s3.get_object(Bucket="bucket", Key=KEY)


def test_ranges(s3: Any) -> None:
    s3.put_object(Bucket="bucket", Key=KEY, Body=b"0123456789")
    part = s3.get_object(Bucket="bucket", Key=KEY, Range="bytes=2-4")
    assert (part["Body"].read(), part["ContentRange"]) == (b"234", "bytes 2-4/10")
    with pytest.raises(ClientError, match="InvalidRange"):
        s3.get_object(Bucket="bucket", Key=KEY, Range="bytes=20-")


def test_what_is_forbidden_or_not_there(s3: Any) -> None:
    with pytest.raises(ClientError, match="AccessDenied"):
        s3.put_object(Bucket="forbidden", Key=KEY, Body=b"")
    with pytest.raises(ClientError, match="404"):
        s3.head_object(Bucket="bucket", Key=KEY)


# -- by hand


def put(enclave: Enclave, body: bytes, headers: dict[str, str]) -> int:
    context = ssl.create_default_context(cafile=enclave.environment["AWS_CA_BUNDLE"])
    connection = http.client.HTTPSConnection("localhost", enclave.world.port, context=context)
    with contextlib.closing(connection):
        connection.putrequest("PUT", "/bucket/by-hand")
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        return connection.getresponse().status


CHECKSUM: Final = base64.b64encode(zlib.crc32(b"12345").to_bytes(4, "big"))
SIGNED: Final = (
    b"3;chunk-signature=0a\r\n123\r\n2;chunk-signature=0b\r\n45\r\n0;chunk-signature=0c\r\n"
)
TRAILER: Final = b"x-amz-checksum-crc32:" + CHECKSUM + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (SIGNED + TRAILER, 200),
        (SIGNED + b"\r\n", 200),
        (SIGNED, 200),
        (SIGNED + TRAILER.replace(CHECKSUM, b"AAAAAA=="), 400),
        (SIGNED.replace(b"3;", b"2;"), 400),
        (SIGNED.replace(b"3;", b"-3;"), 400),
        (SIGNED.replace(b"3;", b";"), 400),
        (b"5\r\n12345\r\n", 400),
        (b"4\r\n1234\r\n0\r\n\r\n", 400),
        (b"", 400),
    ],
)  # fmt: skip
def test_aws_chunked_bodies(enclave: Enclave, body: bytes, status: int) -> None:
    encoding = {"Content-Encoding": "gzip, aws-chunked", "x-amz-decoded-content-length": "5"}
    enclave.world.store.objects.pop("bucket/by-hand", None)
    assert put(enclave, body, encoding | {"Content-Length": str(len(body))}) == status
    assert enclave.world.store.objects.get("bucket/by-hand") == (
        b"12345" if status == 200 else None
    )


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"3\r\n123\r\n2;x=y\r\n45\r\n0\r\nTrailer: x\r\n\r\n", 200),
        (b"3\r\n1234\r\n0\r\n\r\n", 400),
        (b"zz\r\n", 400),
        (b"-1\r\n", 400),
        (b"\r\n", 400),
        (b"fffffff\r\n", 413),
    ],
)
def test_bodies_without_a_length(enclave: Enclave, body: bytes, status: int) -> None:
    assert put(enclave, body, {"Transfer-Encoding": "chunked"}) == status
    if status == 200:
        assert enclave.world.store.objects["bucket/by-hand"] == b"12345"
