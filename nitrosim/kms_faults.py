"""What may go wrong between an attested client and KMS, on demand: one name, one fault.

A fault meets only requests that carry a Recipient, so that the secret can be encrypted in the same
run. It is a refusal in the place of an answer, another answer, or another response on the wire; the
last ones need `nitrosim.server` underneath.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from itertools import chain, repeat
from typing import TYPE_CHECKING, Final, NamedTuple

from werkzeug.wrappers import Request, Response

from nitrosim.envelope import MALFORMED, malform
from nitrosim.kms_operations import SECRETS, Answer
from nitrosim.kms_wire import KmsError, Signed, signature_mismatch
from nitrosim.server import HangUp, Silence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

ENDLESS: Final = 64 << 20  # where the endless body ends, if the client still reads
_SLOW: Final = 1.0  # seconds between two bytes
_CHUNK: Final = 64 << 10


@dataclass(frozen=True, slots=True, repr=False)
class Sealed:
    """An answer on its way out: the honest one, the one before sealing, and the key it was sealed
    for.
    """

    answer: Answer
    plain: Answer
    operation: str
    spki: bytes

    @property
    def secret(self) -> bytes:
        """The plaintext."""
        secret: bytes = self.plain[SECRETS[self.operation]]
        return secret


class Fault(NamedTuple):
    """One fault, in exactly one of the three places; `once` leaves the retries alone."""

    description: str
    refuse: Callable[[Request, bytes], KmsError] | None = None
    alter: Callable[[Sealed], Answer] | None = None
    respond: Callable[[Response], Response] | None = None
    once: bool = False


def _refusal(
    code: str,
    message: str | None,
    status: int = 400,
    description: str | None = None,
    *,
    once: bool = False,
) -> Fault:
    return Fault(
        description or f"{code}, HTTP status {status}",
        refuse=lambda *_: KmsError(code, message, status),
        once=once,
    )


def _echo(request: Request, body: bytes) -> KmsError:
    """As AWS explains a signature that does not match: the client's own headers, session token
    included.
    """
    signed = Signed.parse(request.headers.get("Authorization"))
    canonical_request = signed.canonical_request(request, body)
    return signature_mismatch(f"{canonical_request}\n{request.headers.get('Authorization')}")


def _other_key_id(sealed: Sealed) -> Answer:
    if "KeyId" not in sealed.answer:
        return sealed.answer
    start, _, _ = str(sealed.answer["KeyId"]).rpartition("/")
    return sealed.answer | {"KeyId": f"{start}/{uuid.uuid4()}"}


def _without(sealed: Sealed, name: str) -> Answer:
    return {member: value for member, value in sealed.answer.items() if member != name}


def _malformed(name: str) -> Callable[[Sealed], Answer]:
    return lambda sealed: (
        sealed.answer | {"CiphertextForRecipient": malform(name, sealed.secret, sealed.spki)}
    )


def _html(status: int) -> Callable[[Response], Response]:
    page = "<html><head><title>nitrosim</title></head><body><h1>an error page</h1></body></html>"
    return lambda _: Response(page, status, content_type="text/html")


def _cut(response: Response) -> Response:
    body = response.get_data()
    response.set_data(body[: len(body) // 2])
    response.headers["Content-Length"] = str(len(body))
    return response


def _drip(body: bytes) -> Iterator[bytes]:
    for byte in chain(body[:-1], repeat(ord(" "))):
        yield bytes((byte,))
        time.sleep(_SLOW)


def _stream(chunks: Callable[[bytes], Iterator[bytes]]) -> Callable[[Response], Response]:
    """A body without Content-Length, ended by the end of the connection."""

    return lambda response: Response(
        chunks(response.get_data()), response.status_code, content_type=response.content_type
    )


def _flood(body: bytes) -> Iterator[bytes]:
    yield body[:-1]
    yield from repeat(b" " * _CHUNK, ENDLESS // _CHUNK)


def _hang_up(_: Response) -> Response:
    raise HangUp


def _stay_silent(_: Response) -> Response:
    raise Silence


_DENIED: Final = "User is not authorized to perform this operation."
_REFUSALS: Final[Mapping[str, Fault]] = {
    "throttling": _refusal("ThrottlingException", "Rate exceeded"),
    "internal": _refusal("KMSInternalException", "An internal error occurred.", 500),
    "unavailable": _refusal(
        "ServiceUnavailable", "Service is unavailable. Please try again later.", 503
    ),
    "key-unavailable": _refusal("KeyUnavailableException", "The key is not available.", 500),
    "dependency-timeout": _refusal("DependencyTimeoutException", "The system timed out.", 503),
    "access-denied": _refusal("AccessDeniedException", _DENIED),
    "invalid-ciphertext": _refusal("InvalidCiphertextException", None),
    "not-found": _refusal("NotFoundException", "The key does not exist."),
    "disabled": _refusal("DisabledException", "The key is disabled."),
    "invalid-state": _refusal("KMSInvalidStateException", "The key is pending deletion."),
    "invalid-key-usage": _refusal("InvalidKeyUsageException", "The key's usage is SIGN_VERIFY."),
    "incorrect-key": _refusal(
        "IncorrectKeyException", "The key ID does not identify the key of the ciphertext."
    ),
    "invalid-grant-token": _refusal("InvalidGrantTokenException", "The grant token is not valid."),
    "expired-token": _refusal(
        "ExpiredTokenException", "The security token included in the request is expired"
    ),
    "unrecognized-client": _refusal(
        "UnrecognizedClientException", "The security token included in the request is invalid."
    ),
    "invalid-signature": Fault(
        "InvalidSignatureException, HTTP status 400", refuse=lambda *_: signature_mismatch()
    ),
    "validation": _refusal("ValidationException", "1 validation error detected"),
    "no-message": _refusal(
        "AccessDeniedException", None, description="AccessDeniedException without a message"
    ),
    "throttle-once": _refusal(
        "ThrottlingException",
        "Rate exceeded",
        description="ThrottlingException, but not on the retry",
        once=True,
    ),
    "internal-once": _refusal(
        "KMSInternalException", None, 500, "KMSInternalException, but not on the retry", once=True
    ),
    "echo-credentials": Fault(
        "InvalidSignatureException that repeats the request's credentials", refuse=_echo
    ),
    "escape-message": _refusal(
        "AccessDeniedException",
        "line one\r\nattestor: error: line two\x1b[2J\x1b[31m\x1b]0;title\x07\x9b1m \u202edetreveR",
        description="a message with line ends and terminal escapes",
    ),
}
_ANSWERS: Final[Mapping[str, Fault]] = {
    "no-envelope": Fault(
        "a plaintext in the place of the envelope", alter=lambda sealed: sealed.plain
    ),
    "plaintext-beside": Fault(
        "a plaintext beside the envelope", alter=lambda sealed: sealed.plain | sealed.answer
    ),
    "nothing-sealed": Fault(
        "neither envelope nor plaintext",
        alter=lambda sealed: _without(sealed, "CiphertextForRecipient"),
    ),
    "empty-envelope": Fault(
        "an envelope of no bytes",
        alter=lambda sealed: sealed.answer | {"CiphertextForRecipient": b""},
    ),
    "wrong-key-id": Fault("the KeyId of another key", alter=_other_key_id),
    "no-key-id": Fault("an answer without KeyId", alter=lambda sealed: _without(sealed, "KeyId")),
    **{name: Fault(description, alter=_malformed(name)) for name, description in MALFORMED.items()},
}
_RESPONSES: Final[Mapping[str, Fault]] = {
    "not-json": Fault("HTTP status 200 with an HTML page", respond=_html(200)),
    "html-error": Fault("HTTP status 502 with an HTML page", respond=_html(502)),
    "empty-body": Fault("HTTP status 200 with no body", respond=lambda _: Response(b"", 200)),
    "cut-body": Fault(
        "half the body that Content-Length announces, then the end of the connection", respond=_cut
    ),
    "reset": Fault("a reset of the connection in the place of a response", respond=_hang_up),
    "slow-body": Fault("a byte of body a second, without an end", respond=_stream(_drip)),
    "hang": Fault("no response until the client goes away", respond=_stay_silent),
    "endless-body": Fault(f"a body of {ENDLESS >> 20} MiB of white space", respond=_stream(_flood)),
}
BY_NAME: Final[Mapping[str, Fault]] = {**_REFUSALS, **_ANSWERS, **_RESPONSES}
