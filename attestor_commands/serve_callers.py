"""Who may ask `attestor serve`: users at the unix socket, and at the port whoever signs with the
key pair that this process made.
"""

from __future__ import annotations

import base64
import hmac
import os
import re
import socket
import struct
import time
from calendar import timegm
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.compat import HTTPHeaders
from botocore.credentials import Credentials

from attestor_commands.serve_wire import Refusal, Request

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

SKEW_MAX: Final = 300  # seconds between a signature's date and now, as for AWS

_AUTHORIZATION: Final = re.compile(
    r"AWS4-HMAC-SHA256\s+Credential=(?P<key>[A-Za-z0-9]{1,128})/(?P<scope>[^,\s]{1,128}),\s*"
    r"SignedHeaders=(?P<names>[a-z0-9;-]{1,4096}),\s*Signature=(?P<signature>[0-9a-f]{64})"
)
_DATE: Final = re.compile(r"[0-9]{8}T[0-9]{6}Z")
_MUST_BE_SIGNED: Final = frozenset({"host", "x-amz-date", "x-amz-target"})


def uid_of(connection: socket.socket) -> int:
    """The user at the other end of a unix socket, as it was when it connected (unix(7))."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", credentials)[1]) & 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class KeyPair:
    """An access key of ours alone: AWS does not know it."""

    access_key: str
    secret_key: str = field(repr=False)

    @classmethod
    def generate(cls) -> Self:
        """A new one, in the shape of AWS's: 20 and 40 characters."""
        name = base64.b32encode(os.urandom(10)).decode()
        return cls(f"ASRV{name}", base64.b64encode(os.urandom(30)).decode())

    def as_file(self) -> bytes:
        """The pair as a shared credentials file, which every SDK reads."""
        lines = (
            "# made by attestor serve; it signs requests to its port, and AWS does not know it",
            "[default]",
            f"aws_access_key_id = {self.access_key}",
            f"aws_secret_access_key = {self.secret_key}",
        )
        return "\n".join((*lines, "")).encode()

    def authenticate(self, request: Request, region: str) -> None:
        """Check that a request was signed with this pair, within the last minutes, for this
        region's KMS; raises Refusal, as AWS does.
        """
        headers = request.headers
        header = headers.get("authorization")
        if not header:
            code = "MissingAuthenticationTokenException"
            raise Refusal(code, "request is not signed")
        found = _AUTHORIZATION.fullmatch(header)
        names = found["names"].split(";") if found else []
        if not found or not _MUST_BE_SIGNED <= set(names) <= headers.keys():
            code = "IncompleteSignatureException"
            raise Refusal(code, "request has no Signature Version 4 of host, date and target")
        if not _same(found["key"], self.access_key):
            said = "request is signed with a key that is not in --credentials-file"
            raise Refusal("UnrecognizedClientException", said)
        date = headers["x-amz-date"]
        _check_date(date)
        if found["scope"] != f"{date[:8]}/{region}/kms/aws4_request":
            said = f"signature is not for KMS in {region}"
            raise Refusal("InvalidSignatureException", said)
        digest = sha256(request.body).hexdigest()
        hashed = _same(headers.get("x-amz-content-sha256", digest), digest)
        signature = self._signature(request, region, names, digest)
        if not (_same(signature, found["signature"]) and hashed):
            raise Refusal("InvalidSignatureException", "signature of the request does not hold")

    def _signature(self, request: Request, region: str, names: Sequence[str], digest: str) -> str:
        """The signature that botocore would make for this request."""
        signer = _Signer(Credentials(self.access_key, self.secret_key), "kms", region)
        asked = AWSRequest(request.method, f"http://localhost{request.path}")
        asked.context["timestamp"] = request.headers["x-amz-date"]
        signer.chosen = HTTPHeaders()
        for name in sorted(set(names)):
            signer.chosen[name] = request.headers[name]
        asked.headers["X-Amz-Content-SHA256"] = digest
        canonical = signer.canonical_request(asked)
        return str(signer.signature(signer.string_to_sign(asked, canonical), asked))


class _Signer(SigV4Auth):
    """Signs the headers that the client has signed: each SDK chooses for itself."""

    chosen: Any

    def headers_to_sign(self, request: Any) -> Any:  # noqa: ARG002 - as botocore calls it
        """These."""
        return self.chosen


def _check_date(date: str) -> None:
    code, seconds = "InvalidSignatureException", None
    if _DATE.fullmatch(date):
        try:
            seconds = timegm(time.strptime(date, "%Y%m%dT%H%M%SZ"))
        except ValueError:
            seconds = None
    if seconds is None:
        raise Refusal("IncompleteSignatureException", "X-Amz-Date is no date")
    if abs(time.time() - seconds) > SKEW_MAX:
        side = "expired" if seconds < time.time() else "not yet current"
        raise Refusal(code, f"signature is {side}: more than {SKEW_MAX} s from now")


def _same(left: str, right: str) -> bool:
    return hmac.compare_digest(left.encode(), right.encode())
