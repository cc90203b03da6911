"""Bounded reading: of files and standard input, and of messages of the AWS Encryption SDK."""

from __future__ import annotations

import os
from typing import IO, Protocol

from attestor_io.errors import InputError


class Readable(Protocol):
    """What can be read from: at most so many bytes, fewer only at the end."""

    def read(self, size: int = -1, /) -> bytes:
        """As of any binary stream."""
        ...


class Message:
    """A stream that starts as a message of the AWS Encryption SDK does: its head, which was read,
    and the rest.
    """

    def __init__(self, head: bytes, rest: Readable) -> None:
        self._head, self._rest = head, rest

    def read(self, size: int = -1) -> bytes:
        """As of any stream: exactly so many bytes, fewer at the end; raises InputError."""
        head = self._head if size < 0 else self._head[:size]
        self._head = self._head[len(head) :]
        try:
            return head + self._rest.read(size if size < 0 else size - len(head))
        except OSError as error:
            raise InputError(f"message cannot be read: {error.strerror}") from error


def is_message(head: bytes) -> bool:
    """Whether these are the first bytes of a message of the AWS Encryption SDK, formats 1 and 2.

    Version 1 has a type (0x80) and then the algorithm, version 2 the algorithm (AWS Encryption SDK
    message format reference); a symmetric CiphertextBlob starts with 01 02.
    """
    return head[:2] == b"\x01\x80" or head[:3] in {b"\x02\x04\x78", b"\x02\x05\x78"}


def read_bounded(path: str, limit: int, what: str) -> bytes:
    """At most so many bytes of a file or ("-") of standard input; raises InputError, which says
    `what` it is.
    """
    head, source = read_head(path, limit, what)
    source.close()
    return head


def read_head(path: str, limit: int, what: str) -> tuple[bytes, IO[bytes]]:
    """The first bytes, and the stream behind them, which stays open while somebody holds it."""
    try:
        descriptor = 0 if path == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        source = open(descriptor, "rb", closefd=path != "-")  # noqa: SIM115 - the caller reads on
        head: bytes | None = source.read(limit)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise InputError(f"{what} cannot be read: {reason}") from error
    if head is None:
        raise InputError(f"{what} cannot be read: it would block")
    return head, source
