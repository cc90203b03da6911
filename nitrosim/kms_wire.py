"""The wire of AWS KMS below its operations: errors, members of a request, and signatures.

KMS speaks JSON 1.1 over POST /, with the operation in X-Amz-Target (TrentService.Decrypt), signed
with Signature Version 4 for the service "kms".
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import secrets
import string
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from werkzeug.wrappers import Request

_T = TypeVar("_T")

CONTENT_TYPE: Final = "application/x-amz-json-1.1"
TARGET: Final = "TrentService."
CLOCK_SKEW: Final = timedelta(
    minutes=5
)  # what Signature Version 4 allows between the clocks of both sides

_ALGORITHM: Final = "AWS4-HMAC-SHA256"
_AUTHORIZATION: Final = re.compile(
    rf"{_ALGORITHM} Credential=(?P<key>[^/,\s]+)/(?P<scope>[^,\s]+),\s*"
    r"SignedHeaders=(?P<headers>[a-z0-9;-]+),\s*Signature=(?P<signature>[0-9a-f]{64})"
)
_MUST_BE_SIGNED: Final = frozenset(("host", "x-amz-date"))


class KmsError(Exception):
    """A refusal as KMS sends it: its type, its message or none, an HTTP status.

    KMS writes the member's name "message", but "Message" for AccessDeniedException.
    """

    def __init__(self, code: str, message: str | None = None, status: int = 400) -> None:
        super().__init__(code)
        self.code = code
        self.message = message
        self.status = status

    def body(self) -> bytes:
        """The JSON body."""
        members = {"__type": self.code}
        if self.message is not None:
            members["Message" if self.code == "AccessDeniedException" else "message"] = self.message
        return json.dumps(members).encode()


def invalid(name: str, constraint: str, value: str = "") -> KmsError:
    """ValidationException in the words of AWS's request validation; `name` is the member's."""
    member = name[0].lower() + name[1:]
    return KmsError(
        "ValidationException",
        f"1 validation error detected: Value {value}{' ' if value else ''}at '{member}' failed "
        "to satisfy constraint: "
        f"Member must {constraint}",
    )


class Parameters:
    """The members of one request's JSON, each read as the type it must have, or KmsError."""

    def __init__(self, members: Mapping[str, object]) -> None:
        self.members = members

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read the JSON object of a request."""
        try:
            members = json.loads(body or b"{}")
        except (ValueError, RecursionError) as error:
            raise KmsError("SerializationException") from error
        if not isinstance(members, dict):
            raise KmsError("SerializationException")
        return cls(members)

    def __contains__(self, name: str) -> bool:
        return self.members.get(name) is not None

    def text(self, name: str, default: str | None = None) -> str:
        """A string; required if there is no default."""
        value = self._get(name, str, default)
        if not value:
            raise invalid(name, "have length greater than or equal to 1")
        return value

    def choice(self, name: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        """One of an enumeration; required if there is no default."""
        value = self.text(name, default)
        if value not in allowed:
            raise invalid(name, f"satisfy enum value set: [{', '.join(allowed)}]", repr(value))
        return value

    def number(self, name: str, low: int, high: int) -> int:
        """A required integer within bounds, both inclusive."""
        value = self._get(name, int)
        if not low <= value <= high:
            raise invalid(name, f"have value between {low} and {high}", repr(value))
        return value

    def flag(self, name: str) -> bool:
        """A boolean, false if absent."""
        return self._get(name, bool, default=False)

    def names(self, name: str) -> list[object]:
        """A list, empty if absent."""
        return self._get(name, list, [])

    def blob(self, name: str, most: int) -> bytes:
        """Required bytes, base64 on the wire."""
        try:
            value = base64.b64decode(self._get(name, str), validate=True)
        except (binascii.Error, ValueError) as error:
            raise KmsError("SerializationException") from error
        if not value:
            raise invalid(name, "have length greater than or equal to 1")
        if len(value) > most:
            raise invalid(name, f"have length less than or equal to {most}")
        return value

    def context(self, name: str = "EncryptionContext") -> dict[str, str]:
        """An encryption context, empty if absent."""
        pairs = self._get(name, dict, {})
        if not all(isinstance(text, str) for text in (*pairs, *pairs.values())):
            raise KmsError("SerializationException")
        return pairs

    def inner(self, name: str) -> Parameters:
        """A structure."""
        return Parameters(self._get(name, dict))

    def _get(self, name: str, kind: type[_T], default: _T | None = None) -> _T:
        value = self.members.get(name)
        if value is None:
            value = default
        if value is None:
            raise invalid(name, "not be null", "null")
        if type(value) is not kind:
            raise KmsError("SerializationException")
        return value


@dataclass(frozen=True, slots=True)
class Credentials:
    """Temporary credentials of an assumed role; only the access key id may be shown."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str = field(repr=False)

    @classmethod
    def generate(cls) -> Self:
        """New ones, of the shape that AWS STS gives out."""
        unique = "".join(secrets.choice(string.ascii_uppercase + "234567") for _ in range(16))
        return cls(
            "ASIA" + unique,
            base64.b64encode(secrets.token_bytes(30)).decode(),
            secrets.token_urlsafe(256),
        )


@dataclass(frozen=True, slots=True)
class Signed:
    """One Signature Version 4: what the Authorization header says of it."""

    access_key: str
    scope: str
    headers: tuple[str, ...]
    signature: str

    @classmethod
    def parse(cls, header: str | None) -> Self:
        """Read the header; KmsError if it is missing or no signature."""
        if not header:
            raise KmsError("MissingAuthenticationTokenException", "Missing Authentication Token")
        match = _AUTHORIZATION.fullmatch(header.strip())
        if match is None or not set(match["headers"].split(";")) >= _MUST_BE_SIGNED:
            raise KmsError(
                "IncompleteSignatureException", "Authorization header is not a Signature Version 4"
            )
        return cls(
            match["key"], match["scope"], tuple(match["headers"].split(";")), match["signature"]
        )

    def canonical_request(self, request: Request, body: bytes) -> str:
        """Task 1 of Signature Version 4, from the request as it arrived."""
        query = "&".join(sorted(request.query_string.decode("latin-1").split("&")))
        headers = [
            f"{name}:{' '.join(request.headers.get(name, '').split())}\n" for name in self.headers
        ]
        digest = hashlib.sha256(body).hexdigest()
        return "\n".join(
            (request.method, request.path, query, "".join(headers), ";".join(self.headers), digest)
        )

    def expected(self, secret_key: str, date: str, canonical_request: str) -> str:
        """Tasks 2 to 4: the signature that the secret key gives."""
        key = ("AWS4" + secret_key).encode()
        for part in self.scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        digest = hashlib.sha256(canonical_request.encode()).hexdigest()
        to_sign = "\n".join((_ALGORITHM, date, self.scope, digest))
        return hmac.new(key, to_sign.encode(), "sha256").hexdigest()


def authenticate(
    request: Request,
    body: bytes,
    credentials: Credentials,
    region: str,
    now: datetime,
    service: str = "kms",
) -> None:
    """Check that the request was signed with these credentials, for a service in this region,
    within the last minutes.

    Raises KmsError as AWS does.
    """
    signed = Signed.parse(request.headers.get("Authorization"))
    token = request.headers.get("X-Amz-Security-Token", "")
    if signed.access_key != credentials.access_key or not _same(token, credentials.token):
        raise KmsError(
            "UnrecognizedClientException", "The security token included in the request is invalid."
        )
    date = request.headers.get("X-Amz-Date", "")
    _check_scope(signed.scope, date, region, service)
    _check_date(date, now)
    canonical_request = signed.canonical_request(request, body)
    if not _same(
        signed.expected(credentials.secret_key, date, canonical_request), signed.signature
    ):
        raise signature_mismatch()


def signature_mismatch(canonical_request: str = "") -> KmsError:
    """InvalidSignatureException; AWS appends the canonical request, with the token in it, to help
    or to harm.
    """
    message = (
        "The request signature we calculated does not match the signature you provided. Check "
        "your AWS Secret Access "
        "Key and signing method. Consult the service documentation for details."
    )
    if canonical_request:
        message += (
            f"\n\nThe Canonical String for this request should have been\n'{canonical_request}'\n"
        )
    return KmsError("InvalidSignatureException", message)


def _same(left: str, right: str) -> bool:
    return hmac.compare_digest(left.encode(), right.encode())


def _check_scope(scope: str, date: str, region: str, service: str) -> None:
    expected = f"{date[:8]}/{region}/{service}/aws4_request"
    if scope != expected:
        raise KmsError(
            "InvalidSignatureException",
            f"Credential should be scoped to {expected}, but is scoped to {scope}.",
        )


def _check_date(date: str, now: datetime) -> None:
    form = "%Y%m%dT%H%M%SZ"
    try:
        signed_at = datetime.strptime(date, form).replace(tzinfo=UTC)
    except ValueError as error:
        raise KmsError(
            "IncompleteSignatureException", "X-Amz-Date is missing or not of ISO 8601's basic form"
        ) from error
    if signed_at < now - CLOCK_SKEW:
        bound = (now - CLOCK_SKEW).strftime(form)
        raise KmsError(
            "InvalidSignatureException", f"Signature expired: {date} is now earlier than {bound}"
        )
    if signed_at > now + CLOCK_SKEW:
        bound = (now + CLOCK_SKEW).strftime(form)
        raise KmsError(
            "InvalidSignatureException",
            f"Signature not yet current: {date} is still later than {bound}",
        )
