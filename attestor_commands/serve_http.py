"""One client's connection to `attestor serve`: HTTP/1.1 through h11, every byte and wait bounded.

h11 parses and writes; it does no I/O. What is here is the socket, the clock and the sizes.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from attestor_commands.serve_wire import CONTENT_TYPE, Answer, Request, error_answer
from attestor_io.errors import InputError

if TYPE_CHECKING:
    from attestor_commands.serve_wire import Respond

try:
    import h11
except ImportError as missing:
    raise InputError(
        "attestor serve needs the package h11",
        "pip install '.[serve]' in a checkout of nitro-attestor brings it",
    ) from missing

HEAD_MAX: Final = 16 << 10  # bytes of a request's first line and headers
BODY_MAX: Final = 64 << 10  # KMS's longest parameters, some 22 KiB in base64, and room
RAW_MAX: Final = HEAD_MAX + 2 * BODY_MAX  # with the frames of chunks
IDLE_SECONDS: Final = 120.0  # without a request: longer than the pools of SDKs keep a connection
REQUEST_SECONDS: Final = 10.0  # from the first byte of a request to its last
WRITE_SECONDS: Final = 10.0  # for an answer to be taken
_LINGER_SECONDS: Final = 1.0  # in which the rest of a refused request is thrown away
_CHUNK: Final = 16 << 10

_TOO_LONG: Final = error_answer("RequestTooLongException", "request is too long", 413)
_TOO_SLOW: Final = error_answer("RequestTimeoutException", "request does not end in time", 408)
_HEAD: Final = error_answer("RequestTooLongException", "headers of the request are too long", 431)
FULL: Final = error_answer("ServiceUnavailableException", "too many connections", 503)


class _Refused(Exception):  # noqa: N818 - no error of ours
    """A request that cannot be read to its end: this is answered, and the connection ends."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer


class Conversation:
    """One connection: a request and its answer, one after the other, until either side ends it."""

    def __init__(self, connection: socket.socket, respond: Respond) -> None:
        self._socket, self._respond = connection, respond
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_MAX)
        self._lock = threading.Lock()
        self._busy = self._last = False
        self.idle_since = time.monotonic()

    def end_if_idle(self) -> bool:
        """End it now if no request has begun; else, and then False, behind the next answer."""
        with self._lock:
            if self._busy:
                self._last = True
                return False
            with contextlib.suppress(OSError):  # the client may have gone
                self._socket.shutdown(socket.SHUT_RDWR)
            return True

    @property
    def is_idle(self) -> bool:
        """Whether no request has begun."""
        return not self._busy

    def hold(self) -> None:
        """Serve the connection to its end, and close it; raises nothing."""
        with contextlib.closing(self._socket), contextlib.suppress(OSError):
            try:
                while self._exchange():
                    self._http.start_next_cycle()
            except _Refused as refused:
                self._refuse(refused.answer)
            except h11.RemoteProtocolError as error:
                self._refuse(_HEAD if error.error_status_hint == 431 else _malformed(error))

    def _exchange(self) -> bool:
        """Take one request and answer it; whether another one may follow."""
        request = self._read()
        if request is None:
            return False
        self._write(self._respond(request), head=request.method == "HEAD")
        with self._lock:
            self._busy = False
            self.idle_since = time.monotonic()
            done = self._http.states == {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}
            return done and not self._last  # which may have come behind the head of the answer

    def _read(self) -> Request | None:
        """The next request; None where the client ends the connection, or sends none in time."""
        self._received, self._end = 0, time.monotonic() + IDLE_SECONDS
        if self._http.trailing_data[0]:  # of a client that did not wait for the answer
            self._begin()
        head = self._next_event()
        if not isinstance(head, h11.Request):
            return None
        if sum(len(name) + len(value) + 4 for name, value in head.headers) > HEAD_MAX:
            raise _Refused(_HEAD)
        headers: dict[str, str] = {}
        for name, value in head.headers:
            key, text = name.decode("ascii"), value.decode("latin-1")
            headers[key] = f"{headers[key]},{text}" if key in headers else text
        if int(headers.get("content-length", "0")) > BODY_MAX:  # h11 has seen to the digits
            raise _Refused(_TOO_LONG)
        method, path = head.method.decode("ascii"), head.target.decode("latin-1")
        return Request(method, path, headers, self._read_body())

    def _read_body(self) -> bytes:
        body = bytearray()
        while isinstance(event := self._next_event(), h11.Data):
            body += event.data
            if len(body) > BODY_MAX:
                raise _Refused(_TOO_LONG)
        return bytes(body)

    def _next_event(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            if self._http.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                self._send(self._http.send(go_on) or b"")
            self._http.receive_data(self._receive())
        return event

    def _receive(self) -> bytes:
        """What has come; none at the end of the connection, or of the time for a request."""
        try:
            # a time that has passed is not zero: that would be a socket that never waits
            self._socket.settimeout(max(self._end - time.monotonic(), 1e-6))
            data = self._socket.recv(_CHUNK)
        except TimeoutError:
            if self._busy:
                raise _Refused(_TOO_SLOW) from None
            return b""
        if data and not self._busy:
            self._begin()
        self._received += len(data)
        if self._received > RAW_MAX:
            raise _Refused(_TOO_LONG)
        return data

    def _begin(self) -> None:
        with self._lock:
            self._busy = True
        self._end = time.monotonic() + REQUEST_SECONDS

    def _write(self, answer: Answer, *, last: bool = False, head: bool = False) -> None:
        headers = [
            ("Content-Type", CONTENT_TYPE),
            ("Content-Length", str(len(answer.body))),
            ("Cache-Control", "no-store"),
        ]
        if answer.request_id:
            headers.append(("x-amzn-RequestId", answer.request_id))
        if last or self._last:
            headers.append(("Connection", "close"))
        events = [h11.Response(status_code=answer.status, headers=headers), h11.EndOfMessage()]
        if not head:
            events.insert(1, h11.Data(data=answer.body))
        self._send(b"".join(self._http.send(event) or b"" for event in events))

    def _send(self, data: bytes) -> None:
        self._socket.settimeout(WRITE_SECONDS)
        self._socket.sendall(data)

    def _refuse(self, answer: Answer) -> None:
        """Answer what cannot be read, and let the client read that: closing would reset it."""
        if self._http.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            return
        self._write(answer, last=True)
        self._socket.shutdown(socket.SHUT_WR)
        end = time.monotonic() + _LINGER_SECONDS
        while (left := end - time.monotonic()) > 0:
            self._socket.settimeout(left)
            if not self._socket.recv(_CHUNK):
                break


def _malformed(error: h11.RemoteProtocolError) -> Answer:
    said = "request is not HTTP/1.1"
    return error_answer("MalformedHttpRequestException", said, error.error_status_hint)


def turn_away(connection: socket.socket, answer: Answer) -> None:
    """Answer whoever may not ask, before it has asked, and close the connection."""
    http = h11.Connection(h11.SERVER)
    headers = [
        ("Content-Type", CONTENT_TYPE),
        ("Content-Length", str(len(answer.body))),
        ("Connection", "close"),
    ]
    response = h11.Response(status_code=answer.status, headers=headers)
    events = [response, h11.Data(data=answer.body), h11.EndOfMessage()]
    with contextlib.closing(connection), contextlib.suppress(OSError):
        connection.setblocking(False)
        connection.send(b"".join(http.send(event) or b"" for event in events))
        connection.shutdown(socket.SHUT_WR)
