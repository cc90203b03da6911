"""Connections of the SDK and of urllib3: what comes back is bounded, and a host may be reached
through vsock.

Only the way of the bytes is another one: server name, certificate check and signature stay those of
the endpoint, and nothing but the one client or session that is handed in changes. Imports the SDK;
to be imported late.
"""

from __future__ import annotations

import io
import ssl
from functools import partial
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import urlsplit

from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from attestor_io.errors import UnreachableError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

    from attestor_io.deadline import Deadline
    from attestor_io.vsock import Address, Dial

    FindWay = Callable[[str], "Way | None"]
    """Gives the way to a host of this name, or None for the usual one, proxies included."""

_LINE_MAX: Final = 64 << 10  # bytes of a line of headers, or before a chunk


class Bound(NamedTuple):
    """How many bytes an answer may have, its head included; with `objects` this bounds only the
    head of one with status 200, whose body is read in pieces by somebody who counts. Once a
    `deadline` has passed nothing more of it is read: one that drips would never be silent.
    """

    limit: int
    objects: bool = False
    deadline: Deadline | None = None


USUAL_BOUND: Final = Bound(64 << 10)
FOREIGN_BOUND: Final = Bound(512 << 10)  # KMS's longest, a thousand names of keys: some 150 KiB
OBJECTS_BOUND: Final = Bound(64 << 10, objects=True)
SECRETS_BOUND: Final = Bound(160 << 10)  # 64 KiB of a SecretBinary in base64, and what is around it

_BOUNDS: Final = {"s3": OBJECTS_BOUND, "secretsmanager": SECRETS_BOUND}  # by the name of a service


class AnswerTooLongError(UnreachableError):
    """An answer goes on where no answer would."""


class Way(NamedTuple):
    """How a host is reached: `where` is for messages."""

    where: str
    dial: Dial


class NoWayError(NewConnectionError):
    """A way cannot be gone; `where` and `reason` are for messages."""

    def __init__(self, connection: Any, where: str, reason: str) -> None:
        super().__init__(connection, f"no connection to {where}: {reason}")
        self.where, self.reason = where, reason


class NoWayInTimeError(ConnectTimeoutError):
    """A way that nobody answers on."""

    def __init__(self, connection: Any, where: str) -> None:
        super().__init__(connection, f"no connection to {where} in time")
        self.where, self.reason = where, "no answer in time"


class ClosedEarlyError(OSError):
    """Whoever was connected to hung up amid the handshake of TLS; `where` is for messages."""

    def __init__(self, where: str) -> None:
        super().__init__(f"{where} closed the connection before TLS was established")
        self.where = where


def to_vsock(address: Address) -> Way:
    """The way through a vsock address."""
    from attestor_io import vsock

    return Way(vsock.name(address), lambda timeout: vsock.dial(address, timeout))


def carry(client: Any, address: Address) -> None:
    """Let every connection of a botocore client go through vsock; a proxy of the environment is
    not asked.
    """
    carry_by(client._endpoint.http_session, to_vsock(address))


def carry_by(http_session: Any, way: Way) -> None:
    """Let a botocore URLLib3Session, and no other, open all its connections this way."""
    govern(http_session, lambda _: way)


def govern_session(session: Any, hosts: Mapping[str, Address], deadline: Deadline) -> None:
    """Govern every client that a botocore session makes, those for its credentials too.

    Hosts of these names are reached through their vsock addresses. Answers end by the deadline.
    """

    class Governed:
        """First base of the session's clients."""

        def __init__(self, serializer: object, endpoint: Any, *args: Any, **rest: Any) -> None:
            bound = _BOUNDS.get(endpoint._endpoint_prefix, USUAL_BOUND)
            bound = bound._replace(deadline=deadline)
            govern(endpoint.http_session, by_name(hosts), bound)
            super().__init__(serializer, endpoint, *args, **rest)  # type: ignore[call-arg]  # botocore's BaseClient

    def add(base_classes: list[type], **_: object) -> None:
        base_classes.insert(0, Governed)

    session.register("creating-client-class", add, unique_id="attestor-connections")


def by_name(hosts: Mapping[str, Address]) -> FindWay:
    """The ways to hosts of these names, in lower case."""
    return lambda host: to_vsock(hosts[host.lower()]) if host.lower() in hosts else None


def govern(http_session: Any, find_way: FindWay, bound: Bound = USUAL_BOUND) -> None:
    """Bound what a botocore URLLib3Session receives, and let it take these ways, proxies or not.

    May be called again: the first bound holds, and the last ways come first. Connections that are
    open already are given up.
    """
    managers = [http_session._manager, *http_session._proxy_managers.values()]
    pools = governed_pools(http_session._manager.pool_classes_by_scheme, find_way, bound)
    http_session._pool_classes_by_scheme = pools  # of the proxies that are still to come
    for manager in managers:
        manager.pool_classes_by_scheme = pools
        manager.clear()
    proxies = http_session._proxy_config
    usual = proxies.proxy_url_for
    proxies.proxy_url_for = lambda url: (
        None if find_way(urlsplit(url).hostname or "") else usual(url)
    )


def bound_answers(http_session: Any) -> None:
    """Bound what the URLLib3Session of somebody's KMS client receives, unless that is done."""
    pools = http_session._manager.pool_classes_by_scheme
    if not all(issubclass(pool.ConnectionCls, _Governed) for pool in pools.values()):
        govern(http_session, _no_way, FOREIGN_BOUND)


def bound_object(response: Any, limit: int) -> None:
    """Bound the bytes of an object's body in a response of urllib3's: with the frames around its
    chunks they may be twice as many as it has itself.
    """
    if isinstance(response._fp, _Answer):
        response._fp.allow(2 * limit + USUAL_BOUND.limit)


def governed_pools(
    pools: Mapping[str, type[Any]], find_way: FindWay, bound: Bound
) -> dict[str, type[Any]]:
    """Classes of connection pools by scheme, derived from those of botocore or urllib3."""
    return {
        scheme: type(
            "GovernedPool",
            (pool,),
            {"ConnectionCls": _governed_connection(scheme, pool.ConnectionCls, find_way, bound)},
        )
        for scheme, pool in pools.items()
    }


def _governed_connection(
    scheme: str, usual: type[Any], find_way: FindWay, bound: Bound
) -> type[Any]:
    if issubclass(usual, _Governed):
        before = usual.find_way
        both = staticmethod(lambda host: find_way(host) or before(host))
        return type("GovernedConnection", (usual,), {"find_way": both})
    members: dict[str, Any] = {
        "find_way": staticmethod(find_way),
        "response_class": staticmethod(partial(_Answer, bound=bound)),
    }
    mixin = _Secure if scheme == "https" else _Governed
    return type("GovernedConnection", (mixin, usual), members)


def _no_way(_host: str) -> Way | None:
    return None


class _Governed:
    """Goes before a connection class of urllib3's."""

    find_way: FindWay
    host: str
    timeout: Any

    def _new_conn(self) -> socket.socket:
        way = self.find_way(self.host)
        if way is None:
            usual: socket.socket = super()._new_conn()  # type: ignore[misc]  # urllib3's
            return usual
        try:
            return way.dial(self.timeout if isinstance(self.timeout, int | float) else None)
        except TimeoutError as error:
            raise NoWayInTimeError(self, way.where) from error
        except OSError as error:
            raise NoWayError(self, way.where, error.strerror or str(error)) from error


class _Secure(_Governed):
    """The same for one with TLS."""

    port: int | None
    _tunnel_host: str | None

    def connect(self) -> None:
        """Connect and shake hands; says who hung up, where OpenSSL would only see an end."""
        try:
            super().connect()  # type: ignore[misc]  # urllib3's
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionError) as error:
            if isinstance(error, ConnectionRefusedError):
                raise
            raise ClosedEarlyError(self._other_end()) from error
        except AnswerTooLongError as error:  # to CONNECT
            raise UnreachableError(f"proxy {self.host}: {error}") from error
        except HTTPException as error:  # the same: from Python 3.12 on also of too many headers
            reason = f"answers with what is no HTTP ({type(error).__name__})"
            raise UnreachableError(f"proxy {self.host} {reason}") from error

    def _other_end(self) -> str:
        way = self.find_way(self.host)
        if way is not None:
            return way.where
        return f"proxy {self.host}" if self._tunnel_host else f"{self.host} port {self.port}"


class _Answer(HTTPResponse):
    """An answer whose bytes are counted from its first line on."""

    def __init__(self, sock: socket.socket, *args: Any, bound: Bound, **rest: Any) -> None:
        super().__init__(sock, *args, **rest)
        self._bound = bound
        self._counted = _Counted(self.fp.detach(), bound.limit, bound.deadline)
        self.fp = _Lines(self._counted)

    def begin(self) -> None:
        """Read the head."""
        super().begin()
        if self._bound.objects and self.status == 200:
            self.allow(None)

    def allow(self, limit: int | None) -> None:
        """Let so many bytes more come, or as many as are asked for."""
        self._counted.bound(limit)


class _Lines(io.BufferedReader):
    """Lines of any length would be memory of any size."""

    def readline(self, size: int | None = -1) -> bytes:
        """As of any stream, but for a line that is too long."""
        unbounded = size is None or size < 0
        line = super().readline(_LINE_MAX + 1 if unbounded else size)
        if unbounded and len(line) > _LINE_MAX:
            raise AnswerTooLongError(f"answer has a line of more than {_LINE_MAX} bytes")
        return line


class _Counted(io.RawIOBase):
    """A raw stream of which not more than so many bytes may come; None is no bound."""

    def __init__(self, raw: io.RawIOBase, limit: int, deadline: Deadline | None) -> None:
        self._raw, self._deadline = raw, deadline
        self.bound(limit)

    def bound(self, limit: int | None) -> None:
        """Begin to count anew."""
        self._limit = self._left = limit

    def readable(self) -> bool:
        """As BufferedReader wants it."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Whatever has come; raises AnswerTooLongError for a byte too much, TimeoutError."""
        if self._deadline and not self._deadline.left:
            raise TimeoutError("the answer does not end in time")
        count: int | None = self._raw.readinto(buffer)
        if self._left is not None:
            self._left -= count or 0
            if self._left < 0:
                raise AnswerTooLongError(f"answer is longer than {self._limit} bytes")
        return count

    def fileno(self) -> int:
        """That of the socket."""
        return self._raw.fileno()

    def close(self) -> None:
        """Close the socket's stream as well."""
        self._raw.close()
        super().close()
