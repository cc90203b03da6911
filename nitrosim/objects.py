"""Objects over https: as much of S3 as a client needs to put and get them, for any request that is
no KMS call.

Paths are /BUCKET/KEY, or /KEY where the bucket is in the host's name, BUCKET.s3.REGION.SUFFIX.
Requests are not authenticated: what attestor fetches is either encrypted or has a known digest, and
a hostile parent could serve anything anyway. One bucket is special: "forbidden" answers 403.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

from werkzeug.wrappers import Request, Response

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

FORBIDDEN: Final = "forbidden"


class ObjectStore:
    """A WSGI application in front of another: it keeps objects, and hands KMS's requests on."""

    def __init__(self, kms: WSGIApplication) -> None:
        self.objects: dict[str, bytes] = {}
        self._kms = kms

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request; those to KMS are POST and have a target."""
        if environ["REQUEST_METHOD"] == "POST" or "HTTP_X_AMZ_TARGET" in environ:
            return self._kms(environ, start_response)
        return self._respond(Request(environ))(environ, start_response)

    def _respond(self, request: Request) -> Response:
        bucket, in_host, _ = request.host.partition(".s3.")
        name = (f"{bucket}/" if in_host else "") + request.path.lstrip("/")
        if name.startswith(f"{FORBIDDEN}/"):
            return _error(403, "AccessDenied", "Access Denied")
        if request.method == "PUT":
            self.objects[name] = _unchunked(request)
            return Response(b"", 200, headers={"ETag": _etag(self.objects[name])})
        if name not in self.objects:
            return _error(404, "NoSuchKey", "The specified key does not exist.")
        data = self.objects[name]
        return Response(
            data, 200, content_type="binary/octet-stream", headers={"ETag": _etag(data)}
        )


def _unchunked(request: Request) -> bytes:
    """The object in a PUT; SDKs may wrap it in aws-chunked encoding, hexadecimal lengths before
    each chunk.
    """
    data = request.get_data()
    if "aws-chunked" not in request.headers.get("Content-Encoding", ""):
        return data
    body = b""
    while data:
        length, _, data = data.partition(b"\r\n")
        count = int(length.partition(b";")[0], 16)
        if count == 0:
            break
        body, data = body + data[:count], data[count + 2 :]
    return body


def _etag(data: bytes) -> str:
    return f'"{hashlib.sha256(data).hexdigest()[:32]}"'


def _error(status: int, code: str, message: str) -> Response:
    text = (
        '<?xml version="1.0" '
        f'encoding="UTF-8"?><Error><Code>{code}</Code><Message>{escape(message)}</Message></Error>'
    )
    return Response(text, status, content_type="application/xml")
