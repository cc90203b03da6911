"""AF_VSOCK under botocore's own sessions: the TLS connection to the real endpoint, carried by the
parent's vsock-proxy.

Only the way of the bytes is another one: server name, certificate check and signature stay those of
the endpoint, and nothing but the one client or session that is handed in changes.
"""

from __future__ import annotations

import re
import socket
from typing import TYPE_CHECKING, Any, Final

from attestor_io.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Dial = Callable[[float | None], socket.socket]
    """Gives a connected stream socket within so many seconds, or raises OSError."""

Address = tuple[int, int]
"""Context id and port, both 32 bits (vsock(7))."""

_ADDRESS: Final = re.compile(r"([0-9]{1,10}):([0-9]{1,10})")
_METADATA_TIMEOUT: Final = 5  # seconds for one answer of the metadata service, a local one
_METADATA_ATTEMPTS: Final = 2


def parse_address(text: str) -> Address:
    """The CID and port in CID:PORT; raises InputError. The parent is CID 3."""
    found = _ADDRESS.fullmatch(text)
    cid, port = (int(found[1]), int(found[2])) if found else (0, 0)
    if not (0 < cid < 2**32 - 1 and 0 < port < 2**32 - 1):  # the highest ones mean "any"
        raise InputError(f"{text} is no vsock address CID:PORT, such as 3:8000")
    return cid, port


def dial(address: Address, timeout: float | None) -> socket.socket:
    """A connected AF_VSOCK stream; raises OSError."""
    connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection


def carry(client: Any, address: Address) -> None:
    """Let every connection of this botocore client go through vsock; a proxy of the environment is
    not asked.
    """
    carry_by(
        client._endpoint.http_session,
        f"vsock {address[0]}:{address[1]}",
        lambda timeout: dial(address, timeout),
    )


def carry_by(http_session: Any, where: str, dial: Dial) -> None:
    """Let a botocore URLLib3Session, and no other, open its connections by `dial`; `where` is for
    messages.
    """
    http_session._proxy_config._proxies = {}
    http_session._manager.pool_classes_by_scheme = _pools(where, dial)


def _pools(where: str, dial: Dial) -> Mapping[str, type[Any]]:
    """Connection pools as botocore's, whose connections begin with `dial`."""
    from botocore import awsrequest
    from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

    def connect(connection: Any) -> socket.socket:
        try:
            return dial(connection.timeout if isinstance(connection.timeout, int | float) else None)
        except TimeoutError as error:
            raise ConnectTimeoutError(connection, f"no connection to {where} in time") from error
        except OSError as error:
            raise NewConnectionError(
                connection, f"no connection to {where}: {error.strerror or error}"
            ) from error

    plain = type("VsockConnection", (awsrequest.AWSHTTPConnection,), {"_new_conn": connect})
    secure = type("VsockTlsConnection", (awsrequest.AWSHTTPSConnection,), {"_new_conn": connect})
    return {
        "http": type("VsockPool", (awsrequest.AWSHTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type(
            "VsockTlsPool", (awsrequest.AWSHTTPSConnectionPool,), {"ConnectionCls": secure}
        ),
    }


def carry_metadata(session: Any, address: Address) -> None:
    """Let a botocore session get the role's credentials from the metadata service (IMDSv2) through
    vsock.

    They are refreshed before they expire, as always. What the rest of the chain finds, environment
    first, still comes before them.
    """
    from botocore.credentials import InstanceMetadataProvider

    fetcher = _metadata_fetcher(address)
    resolver = session.get_component("credential_provider")
    resolver.remove(InstanceMetadataProvider.METHOD)
    resolver.providers.append(InstanceMetadataProvider(iam_role_fetcher=fetcher))


def _metadata_fetcher(address: Address) -> Any:
    """botocore's fetcher of role credentials, with our connections; version 1 is never asked."""
    from botocore.utils import InstanceMetadataFetcher

    fetcher: Any = InstanceMetadataFetcher(
        timeout=_METADATA_TIMEOUT,
        num_attempts=_METADATA_ATTEMPTS,
        config={"ec2_metadata_v1_disabled": True},
    )
    carry_by(
        fetcher._session, f"vsock {address[0]}:{address[1]}", lambda timeout: dial(address, timeout)
    )
    return fetcher
