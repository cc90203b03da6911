"""What goes between a client's SDK and `attestor serve`: requests, answers and refusals of KMS's
protocol, JSON 1.1 over POST /, with the operation in X-Amz-Target.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from attestor_io.errors import AttestorError

    Respond = Callable[["Request"], "Answer"]
    """Gives the answer to a request, whatever it is; raises nothing."""

CONTENT_TYPE: Final = "application/x-amz-json-1.1"
TARGET: Final = "TrentService."


@dataclass(frozen=True, slots=True)
class Request:
    """One request; header names are in lower case, and what is repeated is joined by commas."""

    method: str
    path: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; one without the id of a request is ours, and KMS has never seen it."""

    status: int
    body: bytes = field(repr=False)
    request_id: str = ""


class Refusal(Exception):  # noqa: N818 - as KMS names its own
    """A request that is answered here: KMS's name for what is wrong, and an HTTP status.

    `said` is for the client, and for the line on standard error: nothing of the request is in it.
    """

    def __init__(self, code: str, said: str, status: int = 400) -> None:
        super().__init__(said)
        self.code, self.said, self.status = code, said, status


# By exit status. SDKs try 500 and 503 again, and nothing else of these.
_OURS: Final[Mapping[int, tuple[str, int]]] = {
    2: ("ValidationException", 400),
    3: ("AttestorModuleException", 503),  # it was there when we started
    4: ("AttestorRefusedException", 400),
    5: ("AttestorUnreachableException", 503),
    6: ("AttestorNotAuthenticException", 400),
}


def refusal_of(error: AttestorError) -> Refusal:
    """What a client is told of an error of ours."""
    code, status = _OURS.get(error.status, ("InternalFailure", 500))
    return Refusal(code, str(error), status)


def error_answer(code: str, message: str, status: int, request_id: str = "") -> Answer:
    """An error as KMS writes it."""
    body = json.dumps({"__type": code, "message": message}).encode()
    return Answer(status, body, request_id)


def parse_members(body: bytes) -> dict[str, Any]:
    """The JSON object in a body; raises Refusal."""
    try:
        members = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        raise Refusal("SerializationException", "request is not JSON") from error
    if not isinstance(members, dict):
        raise Refusal("SerializationException", "request is no JSON object")
    return members
