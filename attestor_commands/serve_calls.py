"""From a request of a client's SDK to KMS's answer: what may be asked, the call, and what becomes
of an error.
"""

from __future__ import annotations

import base64
import binascii
import json
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from botocore import xform_name
from botocore.config import Config
from botocore.exceptions import ClientError

from attestor import (
    SECRET_MEMBER,
    attested,
    check_credentials,
    clock_fault,
    errors_translated,
    process_recipient,
)
from attestor_commands.failures import unexpected
from attestor_commands.serve_wire import (
    CONTENT_TYPE,
    TARGET,
    Answer,
    Refusal,
    error_answer,
    parse_members,
    refusal_of,
)
from attestor_io.background import IdleWorker
from attestor_io.deadline import Deadline
from attestor_io.errors import AttestorError, NotAuthenticError, RefusedError
from attestor_io.kms_errors import UNSIGNED, cut, redacted
from attestor_io.names import is_pinned, is_same_key
from attestor_io.sdk_data import new_session

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from attestor import Kms
    from attestor_commands.serve_wire import Request

    Tell = Callable[[str, str], None]
    """Told of every call that fails: its class, and what to say of it."""

# KMS's answers to credentials that are not, or no longer, valid: there may be new ones
_STALE: Final = frozenset({"ExpiredTokenException", "UnrecognizedClientException"})
_RENEWAL_PAUSE: Final = 10.0  # seconds between two searches for other credentials
_KEYS: Final = ("KeyId", "SourceKeyId", "DestinationKeyId")
_CONTEXTS: Final = ("EncryptionContext", "SourceEncryptionContext", "DestinationEncryptionContext")


class CallDeadline(Deadline):
    """So many seconds for each call: every thread has an end of its own, which `begin` sets."""

    def __init__(self, seconds: float) -> None:
        self._of_thread = threading.local()
        super().__init__(seconds)

    def begin(self) -> None:
        """Begin anew, in this thread."""
        self._end = time.monotonic() + self.seconds

    @property
    def _end(self) -> float:
        try:
            return float(self._of_thread.end)
        except AttributeError:  # a thread that has never begun
            self.begin()
            return float(self._of_thread.end)

    @_end.setter
    def _end(self, end: float) -> None:
        self._of_thread.end = end


class Bounds(NamedTuple):
    """What may be asked: by the image's word, whoever asks."""

    key_ids: tuple[str, ...]
    required: Mapping[str, str | None]
    passed: frozenset[str]

    def operation(self, target: str) -> str:
        """The operation that a target names, if it may be called; raises Refusal."""
        operation = target.removeprefix(TARGET)
        if not target.startswith(TARGET) or operation not in {*SECRET_MEMBER, *self.passed}:
            said = "operation is neither one with a Recipient nor named by --pass"
            raise Refusal("UnknownOperationException", said)
        return operation

    def narrow(self, known: Mapping[str, Any], parameters: dict[str, Any]) -> None:
        """Hold the parameters of an operation, whose members these are, to the bounds.

        Where one key alone may be used, a call without one is for that key. Raises Refusal.
        """
        if "Recipient" in parameters:
            raise Refusal("ValidationException", "request brings a Recipient of its own")
        for name in _KEYS if self.key_ids else ():
            if name in parameters:
                parameters[name] = self._key(name, parameters[name])
            elif name in known and len(self.key_ids) == 1:
                parameters[name] = self.key_ids[0]
        for name in _CONTEXTS:
            if name in known:
                self._check_context(name, parameters.get(name))

    def _key(self, name: str, asked: Any) -> str:
        """What names this key on the command line; raises Refusal."""
        for key_id in self.key_ids:
            both = isinstance(asked, str) and is_pinned(asked) and is_pinned(key_id)
            same = both and (is_same_key(asked, key_id) or is_same_key(key_id, asked))
            if same or asked == key_id:
                return key_id
        raise Refusal("AccessDeniedException", f"{name} is none of --key-id")

    def _check_context(self, name: str, context: Any) -> None:
        for entry, value in self.required.items():
            found = context.get(entry) if isinstance(context, dict) else None
            if not isinstance(found, str) or value not in {None, found}:
                said = f"{name} lacks what --require-context asks for"
                raise Refusal("AccessDeniedException", said)

    def check_answer(self, members: Mapping[str, Any]) -> None:
        """Refuse the answer to a call that named no key, if KMS found another than may be used."""
        for name in _KEYS:
            answered = members.get(name)
            if answered and self.key_ids and not self._is_ours(str(answered)):
                raise NotAuthenticError(f"answer of KMS is from key {answered}, none of --key-id")

    def _is_ours(self, answered: str) -> bool:
        return any(is_same_key(key_id, answered) for key_id in self.key_ids)


class KmsRefusalError(AttestorError):
    """An error that KMS answered with: for the client, as it is."""

    def __init__(self, code: str, message: str, status: int, request_id: str) -> None:
        super().__init__(message or "it does not say why")
        self.code, self.message = code, message
        self.http_status, self.request_id = status, request_id


class _Connected(NamedTuple):
    """A session of the SDK that has credentials, and its client of KMS."""

    session: Any
    client: Any


class Upstream:
    """KMS, as all threads call it: one client whose connections are kept, attested.

    It tries nothing again: the SDK that asks does, as it would with KMS itself.
    """

    def __init__(self, kms: Kms, deadline: CallDeadline, concurrency: int) -> None:
        self._kms, self._deadline, self._concurrency = kms, deadline, concurrency
        self._free = threading.BoundedSemaphore(concurrency)
        self._worker = IdleWorker()
        self._document: Future[bytes] | None = None
        self._lock, self._renewal = threading.Lock(), threading.Lock()
        self._raw = threading.local()
        process_recipient().wait_for_module(deadline)
        self._wait_for_document()
        self._connected = self._connect()
        self._renewed = -_RENEWAL_PAUSE  # on the monotonic clock

    def _connect(self) -> _Connected:
        """A session that has credentials, and a client of it; raises an AttestorError."""
        session = new_session()
        self._kms.prepare(session)
        check_credentials(session)
        session.set_default_client_config(Config(retries={"total_max_attempts": 1}))
        client = attested(self._kms.client(session, self._concurrency))
        session.set_default_client_config(None)  # STS is tried again as ever
        client.meta.events.register("after-call.kms", self._keep_raw)
        return _Connected(session, client)

    def _keep_raw(self, http_response: Any, **_: object) -> None:
        """Keep KMS's own words for the thread that asked; no plaintext is among them."""
        self._raw.content = http_response.content

    def members_of(self, operation: str) -> Mapping[str, Any]:
        """The parameters that an operation has, by name."""
        model = self._connected.client.meta.service_model.operation_model(operation)
        members: Mapping[str, Any] = model.input_shape.members
        return members

    def call(self, operation: str, parameters: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """The members of KMS's answer, the secret in its place and in base64, and the request's id.

        Raises KmsRefusalError for what KMS refuses, and every other AttestorError.
        """
        if not self._free.acquire(timeout=self._deadline.left):
            raise self._deadline.passed("no connection to KMS is free")
        try:
            connected = self._connected
            try:
                return self._ask(connected, operation, parameters)
            except KmsRefusalError as refusal:
                if refusal.code not in _STALE or not self._renew(connected):
                    raise
            return self._ask(self._connected, operation, parameters)
        finally:
            self._free.release()

    def _ask(
        self, connected: _Connected, operation: str, parameters: Mapping[str, Any]
    ) -> tuple[dict[str, Any], str]:
        secret = SECRET_MEMBER.get(operation)
        if secret:
            self._wait_for_document()
        method = getattr(connected.client, xform_name(operation))
        with errors_translated(connected.session, operation, {}):
            try:
                answer = method(**parameters)
            except ClientError as error:
                raise _refusal(error, connected.session) from error
            members: dict[str, Any] = json.loads(self._raw.content)
        if secret:
            del members["CiphertextForRecipient"]
            members[secret] = base64.b64encode(answer[secret]).decode()
        return members, str(answer["ResponseMetadata"].get("RequestId", ""))

    def _wait_for_document(self) -> None:
        """Have a document that is fresh, in time: nothing interrupts a module that hangs."""
        with self._lock:
            if self._document is None or self._document.done():
                self._document = self._worker.submit(lambda: process_recipient().document())
            document = self._document
        try:
            document.result(self._deadline.left)
        except TimeoutError:
            raise self._deadline.passed("no attestation document") from None

    def _renew(self, stale: _Connected) -> bool:
        """Whether there is another client than this one, whose credentials KMS did not take."""
        with self._renewal:
            now = time.monotonic()
            if self._connected is stale and now - self._renewed >= _RENEWAL_PAUSE:
                self._renewed = now
                self._connected = self._connect()
            return self._connected is not stale


def _refusal(error: ClientError, session: Any) -> AttestorError:
    """An error that KMS answered with, without credentials: it may repeat what was signed."""
    if fault := clock_fault(error):
        return redacted(fault, session)
    response: Mapping[str, Any] = error.response
    said, metadata = response.get("Error", {}), response.get("ResponseMetadata", {})
    code, message = str(said.get("Code") or "unknown error"), str(said.get("Message") or "")
    if code in UNSIGNED:  # what follows is the request, with a token that may be another by now
        message = message.partition("\n")[0]
    message = cut(str(redacted(RefusedError(message), session)))
    status = int(metadata.get("HTTPStatusCode", 0))
    request_id = cut(str(metadata.get("RequestId") or ""))
    return KmsRefusalError(cut(code), message, status if 400 <= status < 600 else 502, request_id)


class Calls:
    """Answers the requests of clients; `tell` hears of those that fail."""

    def __init__(
        self, upstream: Upstream, bounds: Bounds, deadline: CallDeadline, tell: Tell
    ) -> None:
        self._upstream, self._bounds = upstream, bounds
        self._deadline, self._tell = deadline, tell

    def respond(self, request: Request, authenticate: Callable[[Request], None]) -> Answer:
        """The answer to a request of whoever `authenticate` lets in; raises nothing."""
        self._deadline.begin()
        try:
            return self._respond(request, authenticate)
        except Refusal as refusal:
            found = refusal
        except KmsRefusalError as error:
            self._tell(error.code, f"KMS says: {error} (request id {error.request_id or 'none'})")
            return error_answer(error.code, error.message, error.http_status, error.request_id)
        except AttestorError as error:
            found = refusal_of(error)
        except Exception as error:  # noqa: BLE001 - a client must get an answer
            found = refusal_of(unexpected(error))
        self._tell(found.code, found.said)
        return error_answer(found.code, found.said, found.status)

    def _respond(self, request: Request, authenticate: Callable[[Request], None]) -> Answer:
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if (request.method, request.path, kind) != ("POST", "/", CONTENT_TYPE):
            said = f"request is no POST / of {CONTENT_TYPE}"
            raise Refusal("UnknownOperationException", said)
        authenticate(request)
        operation = self._bounds.operation(request.headers.get("x-amz-target", ""))
        known = self._upstream.members_of(operation)
        parameters = _parameters(parse_members(request.body), known)
        self._bounds.narrow(known, parameters)
        members, request_id = self._upstream.call(operation, parameters)
        self._bounds.check_answer(members)
        return Answer(200, json.dumps(members).encode(), request_id)


def _parameters(members: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The members of a request as botocore takes them, bytes decoded; raises Refusal."""
    parameters: dict[str, Any] = {}
    for name, value in members.items():
        if name not in known:
            raise Refusal("ValidationException", "request has a member that is not known here")
        if value is not None:
            is_blob = known[name].type_name == "blob"
            parameters[name] = _decoded(value) if is_blob else value
    return parameters


def _decoded(value: Any) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise Refusal("SerializationException", "request has bytes that are not base64") from error
