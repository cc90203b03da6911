"""Objects over https: as much of S3 as SDKs and `aws s3` need to put, get, list, copy and remove
them, for any request that is no KMS call.

Paths are /BUCKET/KEY, or /KEY where the bucket is in the host's name, BUCKET.s3.REGION.SUFFIX.
Every bucket is there. Requests are not authenticated: what attestor fetches is either encrypted or
has a known digest, and a hostile parent could serve anything anyway. One bucket is special:
"forbidden" answers 403. moto's own S3 is not used: it keeps buckets in one place for the whole
process, and asks for signatures.
"""

from __future__ import annotations

import base64
import hashlib
import io
import uuid
import zlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote
from xml.sax.saxutils import escape

from werkzeug.exceptions import RequestedRangeNotSatisfiable
from werkzeug.http import http_date
from werkzeug.wrappers import Request, Response

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

FORBIDDEN: Final = "forbidden"

# the checksums of S3 that Python has; what is sent of the others is not compared
_CHECKSUMS: Final[Mapping[str, Callable[[bytes], bytes]]] = {
    "x-amz-checksum-crc32": lambda data: zlib.crc32(data).to_bytes(4, "big"),
    "x-amz-checksum-sha1": lambda data: hashlib.sha1(data).digest(),  # noqa: S324 - not for security
    "x-amz-checksum-sha256": lambda data: hashlib.sha256(data).digest(),
}


class _Refusal(Exception):  # noqa: N818 - an answer
    """What S3 answers to a request that cannot be."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    def response(self) -> Response:
        return _xml(
            f"<Error><Code>{self.code}</Code><Message>{escape(str(self))}</Message></Error>",
            self.status,
        )


class ObjectStore:
    """A WSGI application in front of another: it keeps objects, and hands on the requests to KMS
    and to all others that have a target.

    `objects` holds them by BUCKET/KEY.
    """

    def __init__(self, kms: WSGIApplication) -> None:
        self.objects: dict[str, bytes] = {}
        self._kms = kms
        self._uploads: dict[str, dict[int, bytes]] = {}
        self._changed: dict[str, datetime] = {}
        self._began = datetime.now(UTC)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request; those to KMS are POST and have a target."""
        posted = environ["REQUEST_METHOD"] == "POST"
        if "HTTP_X_AMZ_TARGET" in environ or (posted and "upload" not in environ["QUERY_STRING"]):
            return self._kms(environ, start_response)
        request = Request(environ)
        try:
            response = self._respond(request)
        except _Refusal as refusal:
            response = refusal.response()
        return response(environ, start_response)

    def _respond(self, request: Request) -> Response:
        in_host, is_virtual, _ = request.host.partition(".s3.")
        path = request.path.lstrip("/")
        bucket, _, key = f"{in_host}/{path}".partition("/") if is_virtual else path.partition("/")
        if bucket == FORBIDDEN:
            raise _Refusal(403, "AccessDenied", "Access Denied")
        if not key:
            return self._of_bucket(request, bucket)
        if "uploads" in request.args or "uploadId" in request.args:
            return self._of_upload(request, f"{bucket}/{key}")
        return self._of_object(request, f"{bucket}/{key}")

    def _of_bucket(self, request: Request, bucket: str) -> Response:
        """Create a bucket, look for it, or list it: without a query there is nothing to get."""
        if request.method in {"PUT", "HEAD"}:
            return Response(b"", 200)
        if not request.args:
            raise _Refusal(404, "NoSuchKey", "The specified key does not exist.")
        return self._listing(bucket, request.args)

    def _listing(self, bucket: str, asked: Mapping[str, str]) -> Response:
        """All objects below a prefix, in the order of their names, never cut short."""
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter", "")
        contents, common = "", dict[str, None]()
        for name in sorted(self.objects):
            key = name.removeprefix(f"{bucket}/")
            if key == name or not key.startswith(prefix):
                continue
            rest = key.removeprefix(prefix)
            if delimiter and delimiter in rest:
                common[prefix + rest.partition(delimiter)[0] + delimiter] = None
                continue
            contents += (
                f"<Contents><Key>{_name(key, asked)}</Key><Size>{len(self.objects[name])}</Size>"
                f"<LastModified>{self._time(name).isoformat()}</LastModified>"
                f"<ETag>{escape(_etag(self.objects[name]))}</ETag></Contents>"
            )
        folders = "".join(
            f"<CommonPrefixes><Prefix>{_name(folder, asked)}</Prefix></CommonPrefixes>"
            for folder in common
        )
        encoded = asked.get("encoding-type") == "url"
        return _xml(
            f"<ListBucketResult><Name>{escape(bucket)}</Name><IsTruncated>false</IsTruncated>"
            f"{'<EncodingType>url</EncodingType>' if encoded else ''}{contents}{folders}"
            "</ListBucketResult>"
        )

    def _of_object(self, request: Request, name: str) -> Response:
        if request.method == "DELETE":
            self.objects.pop(name, None)
            return Response(b"", 204)
        if request.method != "PUT":
            return self._get(request, name)
        source = request.headers.get("x-amz-copy-source")
        data = _body(request) if source is None else self._read(unquote(source).lstrip("/"))
        self._put(name, data)
        if source is None:
            return Response(b"", 200, headers={"ETag": _etag(data)})
        return _xml(
            f"<CopyObjectResult><ETag>{escape(_etag(data))}</ETag>"
            f"<LastModified>{self._time(name).isoformat()}</LastModified></CopyObjectResult>"
        )

    def _of_upload(self, request: Request, name: str) -> Response:
        """An object in parts: begin, a part, all of them, or give up."""
        if "uploads" in request.args:
            upload = uuid.uuid4().hex
            self._uploads[upload] = {}
            return _xml(
                "<InitiateMultipartUploadResult>"
                f"<UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            )
        parts = self._uploads.get(request.args["uploadId"])
        if parts is None:
            raise _Refusal(404, "NoSuchUpload", "The specified multipart upload does not exist.")
        if request.method == "PUT":
            data = parts[request.args.get("partNumber", 1, int)] = _body(request)
            return Response(b"", 200, headers={"ETag": _etag(data)})
        del self._uploads[request.args["uploadId"]]
        if request.method == "DELETE":
            return Response(b"", 204)
        self._put(name, b"".join(parts[number] for number in sorted(parts)))
        return _xml(
            "<CompleteMultipartUploadResult>"
            f"<ETag>{escape(_etag(self.objects[name]))}</ETag></CompleteMultipartUploadResult>"
        )

    def _get(self, request: Request, name: str) -> Response:
        """The object, or the range of it that was asked for."""
        data = self._read(name)
        headers = {"ETag": _etag(data), "Last-Modified": http_date(self._time(name))}
        response = Response(data, 200, content_type="binary/octet-stream", headers=headers)
        try:
            return response.make_conditional(request, accept_ranges=True, complete_length=len(data))
        except RequestedRangeNotSatisfiable as error:
            raise _Refusal(416, "InvalidRange", "The requested range is not satisfiable") from error

    def _read(self, name: str) -> bytes:
        if name not in self.objects:
            raise _Refusal(404, "NoSuchKey", "The specified key does not exist.")
        return self.objects[name]

    def _put(self, name: str, data: bytes) -> None:
        self.objects[name] = data
        self._changed[name] = datetime.now(UTC)

    def _time(self, name: str) -> datetime:
        """When the object came over the network; those that were put in place were always there."""
        return self._changed.get(name, self._began)


def _body(request: Request) -> bytes:
    """The object in a PUT, compared with the checksums that came with it, before or behind it."""
    data = request.get_data()
    told = {name.lower(): value for name, value in request.headers.items()}
    if "aws-chunked" in told.get("content-encoding", ""):
        try:
            data, trailers = _unchunked(io.BytesIO(data))
        except ValueError as error:
            raise _Refusal(400, "IncompleteBody", "The body is not aws-chunked") from error
        told |= trailers
        if str(len(data)) != told.get("x-amz-decoded-content-length"):
            raise _Refusal(400, "IncompleteBody", "The body has another length than its header")
    for name, checksum in _CHECKSUMS.items():
        if told.get(name, (right := base64.b64encode(checksum(data)).decode())) != right:
            raise _Refusal(400, "BadDigest", f"The {name} you specified did not match ours.")
    return data


def _unchunked(stream: io.BytesIO) -> tuple[bytes, dict[str, str]]:
    """What is in aws-chunked encoding: hexadecimal lengths before each chunk, and headers behind
    the last. Raises ValueError.
    """
    data = b""
    while size := int(stream.readline().partition(b";")[0], 16):
        chunk = stream.read(size)
        if size < 0 or len(chunk) != size or stream.readline() != b"\r\n":
            raise ValueError("a chunk that is cut")
        data += chunk
    lines = (line.decode("latin-1").partition(":") for line in stream)
    return data, {name.strip().lower(): value.strip() for name, _, value in lines}


def _name(key: str, asked: Mapping[str, str]) -> str:
    """A key as a listing writes it."""
    return quote(key) if asked.get("encoding-type") == "url" else escape(key)


def _etag(data: bytes) -> str:
    return f'"{hashlib.sha256(data).hexdigest()[:32]}"'


def _xml(text: str, status: int = 200) -> Response:
    return Response(
        f'<?xml version="1.0" encoding="UTF-8"?>{text}', status, content_type="application/xml"
    )
