"""AF_VSOCK: addresses as options name them, and connections to them (vsock(7)).

`attestor_io.connections` puts them under clients of the SDK.
"""

from __future__ import annotations

import re
import socket
from typing import TYPE_CHECKING, Final

from attestor_io.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Dial = Callable[[float | None], socket.socket]
    """Gives a connected stream socket within so many seconds, or raises OSError."""

Address = tuple[int, int]
"""Context id and port, both 32 bits (vsock(7))."""

_ADDRESS: Final = re.compile(r"([0-9]{1,10}):([0-9]{1,10})")
_HOST: Final = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:]{2,39}")
_METADATA_HOSTS: Final = frozenset({"169.254.169.254", "fd00:ec2::254"})


def parse_address(text: str) -> Address:
    """The CID and port in CID:PORT; raises InputError. The parent is CID 3."""
    found = _ADDRESS.fullmatch(text)
    cid, port = (int(found[1]), int(found[2])) if found else (0, 0)
    if not (0 < cid < 2**32 - 1 and 0 < port < 2**32 - 1):  # the highest ones mean "any"
        raise InputError(f"{text} is no vsock address CID:PORT, such as 3:8000")
    return cid, port


def parse_hosts(pairs: Sequence[str], what: str) -> dict[str, Address]:
    """The addresses in NAME=CID:PORT by names of hosts, in lower case; `what` is for messages.

    An IPv6 address may stand in brackets. Raises InputError.
    """
    hosts: dict[str, Address] = {}
    for pair in pairs:
        given, equals, address = pair.rpartition("=")
        host = given.removeprefix("[").removesuffix("]").lower()
        if not (equals and _HOST.fullmatch(host)):
            example = "sts.eu-west-1.amazonaws.com=3:8003"
            raise InputError(f"{what} wants NAME=CID:PORT, such as {example}, got {pair}")
        if host in _METADATA_HOSTS:
            raise InputError(f"{what} {host} is the metadata service", "use --imds-vsock")
        if host in hosts:
            raise InputError(f"{what} names {host} twice")
        hosts[host] = parse_address(address)
    return hosts


def name(address: Address) -> str:
    """An address as messages name it."""
    return f"vsock {address[0]}:{address[1]}"


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
