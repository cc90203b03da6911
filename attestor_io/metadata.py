"""The instance metadata service, version 2 only: one value for one path, over vsock or TCP, without
the SDK.

Region, tags, the command and `attestor_io.credentials` ask it by one rule: through the vsock
address that an option or a manifest names; else at $AWS_EC2_METADATA_SERVICE_ENDPOINT, or the usual
address of the family that $AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE names; and never through a proxy.

A token is fetched by PUT and shown in each GET (IMDSv2, "Use the Instance Metadata Service" of the
EC2 User Guide). Whatever answers is the parent, and hostile: an answer is bounded in time and
bytes, and a value is one printable line.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import os
import re
import socket
import time
from functools import partial
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING, Any, Final

from attestor_io import vsock
from attestor_io.deadline import Deadline
from attestor_io.errors import AttestorError, InputError, RefusedError, UnreachableError
from attestor_io.urls import without_query

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from attestor_io.vsock import Address, Dial

VALUE_MAX: Final = 16 << 10
TIMEOUT: Final = 10.0  # seconds for everything, retries included
_CONNECT_TIMEOUT: Final = 3
_ATTEMPTS: Final = 3
_ANSWER_MAX: Final = 2 * VALUE_MAX  # with status line, headers and the frames of chunks
_PAUSE: Final = 0.1  # seconds before the second attempt, and twice that before all others

ENDPOINT_VARIABLE: Final = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
MODE_VARIABLE: Final = "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE"
_HOSTS: Final = {"ipv4": "169.254.169.254", "ipv6": "[fd00:ec2::254]"}
_URL: Final = re.compile(
    r"http://((?:\[([0-9A-Fa-f:.]{2,45})\]|([A-Za-z0-9.-]{1,253}))(?::([0-9]{1,5}))?)/?"
)
_HEADER: Final = "x-aws-ec2-metadata-token"
_TOKEN: Final = re.compile(r"[!-~]{1,1024}")
_SEGMENT: Final = (
    r"[A-Za-z0-9+=.,_:@-]{1,128}"  # of which a tag's key consists too, once the service shows it
)
_PATH: Final = re.compile(rf"{_SEGMENT}(/{_SEGMENT})*")
_CREDENTIALS: Final = frozenset({"iam", "identity-credentials", "security-credentials"})
_ROLES: Final = "iam/security-credentials/"
_ROLE: Final = re.compile(r"[A-Za-z0-9_+=,.@-]{1,128}")
_TAGS: Final = "tags/instance/"
_ENABLE: Final = (
    "aws ec2 modify-instance-metadata-options --instance-id ID "
    "--instance-metadata-tags enabled lets it show them"
)
_A_TOKEN: Final = "a token"  # noqa: S105 - its name in messages
_HOP_LIMIT_HINT: Final = (
    "it takes connections but gives no token: a hop limit of 1 does that to containers; aws ec2 "
    "modify-instance-metadata-options --instance-id ID --http-put-response-hop-limit 2 mends it"
)


def fetch(path: str, address: Address | None = None, deadline: Deadline | None = None) -> str:
    """The value at a path below latest/meta-data/, at most 16 KiB of text in one line.

    `address` is where vsock leads to the service. `deadline` is for everything, the name of an
    endpoint included. Raises InputError for a path or endpoint that cannot be, or a path that leads
    to credentials; UnreachableError; RefusedError when trying again is useless.
    """
    _check_path(path)
    service = Service.at(address, os.environ, deadline or Deadline(TIMEOUT))
    return _one_line(service.get(path, service.token()), path)


def region(address: Address | None = None, deadline: Deadline | None = None) -> str:
    """The region that the metadata service names; the parent's claim, as all of it."""
    return fetch("placement/region", address, deadline and deadline.within(TIMEOUT))


def tag(name: str, address: Address | None = None, deadline: Deadline | None = None) -> str:
    """An instance tag; the metadata service has them only if the instance's options allow it."""
    return fetch(_TAGS + name, address, deadline and deadline.within(TIMEOUT))


def _check_path(path: str) -> None:
    segments = path.split("/")
    if len(path) > 1024 or not _PATH.fullmatch(path) or {".", ".."} & set(segments):
        raise InputError(f"{path} is no path of instance metadata, such as placement/region")
    if _CREDENTIALS & {segment.lower() for segment in segments} and not path.startswith(_TAGS):
        raise InputError(f"{path} leads to credentials, which are not shown")


def endpoint(environment: Mapping[str, str]) -> str:
    """The URL of the service in an environment; raises InputError for a mode that there is not."""
    if given := environment.get(ENDPOINT_VARIABLE):
        return given
    mode = (environment.get(MODE_VARIABLE) or "ipv4").lower()
    if mode not in _HOSTS:
        raise InputError(f"{MODE_VARIABLE} {mode} is neither IPv4 nor IPv6")
    return f"http://{_HOSTS[mode]}"


class Service:
    """The service behind one way to it; `where` is for messages."""

    def __init__(self, host: str, where: str, dial: Dial, deadline: Deadline) -> None:
        self._host, self.where, self._dial, self._deadline = host, where, dial, deadline
        self._attempts, self._patience = _ATTEMPTS, int(TIMEOUT)

    @classmethod
    def at(
        cls, address: Address | None, environment: Mapping[str, str], deadline: Deadline
    ) -> Service:
        """The service at a vsock address, or where the environment says."""
        if address:
            dial = partial(_dial_vsock, address)
            service = cls(_HOSTS["ipv4"], vsock.name(address), dial, deadline)
        else:
            url = endpoint(environment)
            found = _URL.fullmatch(url)
            host, port = (found[2] or found[3], int(found[4] or 80)) if found else ("", 0)
            if found is None or not 0 < port < 2**16:
                said = f"{ENDPOINT_VARIABLE} {without_query(url)} is no endpoint"
                raise InputError(f"{said}, such as http://{_HOSTS['ipv4']}")
            service = cls(found[1], url, partial(_dial, host, port, deadline), deadline)
        service._attempts = _number(environment, "AWS_METADATA_SERVICE_NUM_ATTEMPTS", _ATTEMPTS)
        service._patience = _number(environment, "AWS_METADATA_SERVICE_TIMEOUT", int(TIMEOUT))
        return service

    def token(self) -> str:
        """The token that every question needs; raises UnreachableError and RefusedError."""
        header = f"{_HEADER}-ttl-seconds: 60\r\nContent-Length: 0"
        body = self._ask("PUT", "/latest/api/token", header, _A_TOKEN)
        token = body.decode("ascii", "replace")
        if not _TOKEN.fullmatch(token):
            raise UnreachableError("metadata service gives a token that is none")
        return token

    def get(self, path: str, token: str) -> bytes:
        """What is at a path below latest/meta-data/, at most 16 KiB; raises as `token` does."""
        return self._ask("GET", f"/latest/meta-data/{path}", f"{_HEADER}: {token}", path)

    def role(self) -> tuple[str, bytes]:
        """The instance's role, and the JSON of its credentials; raises as `token` does."""
        token = self.token()
        role = self.get(_ROLES, token).decode("ascii", "replace")
        if not _ROLE.fullmatch(role):
            raise UnreachableError("metadata service names a role that is none")
        return role, self.get(_ROLES + role, token)

    def _ask(self, method: str, path: str, header: str, what: str) -> bytes:
        """The body of an answer with status 200, tried again while that may help; `what` is for
        messages.
        """
        pauses = [_PAUSE, *[2 * _PAUSE] * self._attempts][: self._attempts - 1]
        while True:
            try:
                return self._ask_once(method, path, header, what)
            except UnreachableError:
                if not pauses or pauses[0] >= self._deadline.left:
                    raise
                time.sleep(pauses.pop(0))

    def _ask_once(self, method: str, path: str, header: str, what: str) -> bytes:
        request = (
            f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\n{header}\r\nConnection: "
            "close\r\n\r\n"
        )
        deadline = self._deadline.within(self._patience)
        with self._translated(what):
            connection = self._dial(min(_CONNECT_TIMEOUT, _left(deadline)))
        hints = [_HOP_LIMIT_HINT] if what == _A_TOKEN else []  # once it has taken the connection
        with connection, self._translated(what, *hints):
            connection.settimeout(_left(deadline))
            connection.sendall(request.encode())
            bounded = _Bounded(connection, deadline)
            with contextlib.closing(HTTPResponse(bounded, method=method)) as answer:  # type: ignore[arg-type]  # all it calls is makefile
                return _body(answer, what)

    @contextlib.contextmanager
    def _translated(self, what: str, *hints_to_silence: str) -> Iterator[None]:
        """Let only errors of ours out; those of OpenSSL's kind do not occur."""
        try:
            yield
        except TimeoutError as error:
            reason = f"no answer of the metadata service at {self.where} in time"
            raise UnreachableError(reason, *hints_to_silence) from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise UnreachableError(
                f"metadata service at {self.where} cannot be reached: {reason}"
            ) from error
        except (HTTPException, ValueError) as error:
            kind = type(error).__name__
            raise UnreachableError(
                f"answer of the metadata service to {what} is not HTTP ({kind})"
            ) from error


def _body(answer: HTTPResponse, what: str) -> bytes:
    """What an answer with status 200 says, at most 16 KiB."""
    answer.begin()
    if answer.status != 200:
        raise _refusal(answer.status, what)
    body = answer.read(VALUE_MAX + 1)
    if len(body) > VALUE_MAX:
        reason = f"answer of the metadata service to {what} is longer than {VALUE_MAX} bytes"
        raise UnreachableError(reason)
    # read(n) says nothing of a body that ends too early, nor of headers that do
    if answer.length or (answer.length is None and not body):
        raise UnreachableError(f"answer of the metadata service to {what} is cut short")
    return body


class _Bounded(io.RawIOBase):
    """What HTTPResponse reads of a connection: with one deadline for all of it, and a bound on the
    bytes.
    """

    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        self._connection, self._deadline, self._count = connection, deadline, 0

    def makefile(self, _mode: str) -> io.BufferedReader:
        """As of a socket."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """As BufferedReader wants it."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Whatever has come, at least a byte unless the connection has ended."""
        self._connection.settimeout(_left(self._deadline))
        count = self._connection.recv_into(buffer)
        self._count += count
        if self._count > _ANSWER_MAX:
            reason = f"answer of the metadata service is longer than {_ANSWER_MAX} bytes"
            raise UnreachableError(reason)
        return count


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    """A variable of the SDK's that counts attempts or seconds; raises InputError."""
    text = environment.get(name) or str(default)
    if not re.fullmatch("[1-9][0-9]{0,3}", text):
        raise InputError(f"{name} {text} is no number from 1 to 9999")
    return int(text)


def _left(deadline: Deadline) -> float:
    """Seconds until a deadline that has not passed; raises TimeoutError."""
    if not (left := deadline.left):
        raise TimeoutError
    return left


def _dial_vsock(address: Address, timeout: float | None) -> socket.socket:
    return vsock.dial(address, timeout)  # looked up now: it is a function of another module


def _dial(host: str, port: int, deadline: Deadline, timeout: float | None) -> socket.socket:
    """A TCP connection within so many seconds, and the address of a name by the deadline.

    socket.create_connection bounds neither: it resolves for as long as the C library likes, and
    has the timeout for each address that a name has.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        work = partial(socket.create_connection, (host, port), timeout)
        return deadline.call(work, f"no connection to the metadata service at {host}")
    return socket.create_connection((host, port), timeout)


def _refusal(status: int, what: str) -> AttestorError:
    if status == 404 and what.startswith(_TAGS):
        name = what.removeprefix(_TAGS)
        return RefusedError(
            f"the instance has no tag {name}, or tags are not enabled in instance metadata", _ENABLE
        )
    if status == 404 and what == _ROLES:
        return RefusedError("the instance has no role")
    kind = UnreachableError if status == 429 or status >= 500 else RefusedError
    return kind(f"metadata service answers {status} for {what}")


def _one_line(body: bytes, what: str) -> str:
    """The text of an answer, which must be one printable line; raises RefusedError."""
    with contextlib.suppress(UnicodeDecodeError):
        text = body.decode()
        if text and text.isprintable():
            return text
    raise RefusedError(f"answer of the metadata service to {what} is not one line of text")
