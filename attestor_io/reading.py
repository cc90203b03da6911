"""Bounded reading: of files and standard input, and of messages of the AWS Encryption SDK."""

from __future__ import annotations

import base64
import io
import os
from typing import IO, Any, Final, Protocol

from attestor_io.deadline import Deadline
from attestor_io.errors import InputError

_PIECE: Final = 1 << 16  # characters of base64 text at a time


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


class Base64Text:
    """The bytes that a stream of base64 text stands for, decoded as they are read.

    White space may stand anywhere in it (RFC 4648 section 3.1 allows to ignore it).
    """

    def __init__(self, source: Readable, what: str, *hints: str) -> None:
        """Decode `source`; `what` it is, and `hints`, are for the error."""
        self._source, self._what, self._hints = source, what, hints
        self._text = b""  # characters that no four others complete yet
        self._bytes = b""
        self._padded = self._ended = False

    def read(self, size: int = -1) -> bytes:
        """Return exactly so many bytes, fewer at the end; raises InputError."""
        parts, count = [self._bytes], len(self._bytes)
        while not self._ended and (size < 0 or count < size):
            parts.append(self._decode_more())
            count += len(parts[-1])
        data = b"".join(parts)
        end = len(data) if size < 0 else size
        self._bytes = data[end:]
        return data[:end]

    def _decode_more(self) -> bytes:
        piece = self._source.read(_PIECE)
        self._ended = not piece
        text = self._text + b"".join(piece.split())
        whole = len(text) if self._ended else len(text) // 4 * 4
        self._text = text[whole:]
        try:
            decoded = base64.b64decode(text[:whole], validate=True)
        except ValueError as error:
            raise self._error() from error
        if self._padded and decoded:
            raise self._error()
        self._padded = self._padded or text[:whole].endswith(b"=")
        return decoded

    def _error(self) -> InputError:
        return InputError(f"{self._what} is not base64 text", *self._hints)


def is_message(head: bytes) -> bool:
    """Whether these are the first bytes of a message of the AWS Encryption SDK, formats 1 and 2.

    Version 1 has a type (0x80) and then the algorithm, version 2 the algorithm (AWS Encryption SDK
    message format reference); a symmetric CiphertextBlob starts with 01 02.
    """
    return head[:2] == b"\x01\x80" or head[:3] in {b"\x02\x04\x78", b"\x02\x05\x78"}


def read_bounded(path: str, limit: int, what: str, deadline: Deadline | None = None) -> bytes:
    """At most so many bytes of a file or ("-") of standard input.

    Raises InputError, which says `what` it is, and UnreachableError if they are not there by the
    deadline.
    """
    head, source = read_head(path, limit, what, deadline)
    source.close()
    return head


def read_head(
    path: str, limit: int, what: str, deadline: Deadline | None = None
) -> tuple[bytes, IO[bytes]]:
    """The first bytes, and the stream behind them, which stays open while somebody holds it.

    The first bytes must be there by the deadline. Behind them each silence may last as long, since
    a message of the AWS Encryption SDK has any length. Raises as `read_bounded` does.
    """
    try:
        raw = open_patiently(path, f"{what} cannot be read: nothing came", deadline)
        source = io.BufferedReader(raw)
        head: bytes | None = source.read(limit)
        raw.start_over()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise InputError(f"{what} cannot be read: {reason}") from error
    if head is None:
        raise InputError(f"{what} cannot be read: it would block")
    return head, source


def open_patiently(path: str, late: str, deadline: Deadline | None) -> Patient:
    """A file, or ("-") standard input; raises OSError, and ValueError for what is no name."""
    # O_NONBLOCK: a FIFO without a writer would block here already; Patient waits instead
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_NONBLOCK if deadline else 0)
    return Patient(0 if path == "-" else os.open(path, flags), path != "-", late, deadline)


class Patient(io.FileIO):
    """A file, FIFO or terminal, each read of which waits until there is something, or a deadline,
    past which it raises UnreachableError, which says `late`.

    Without a deadline a read waits as it would anyway.
    """

    def __init__(self, descriptor: int, closes: bool, late: str, deadline: Deadline | None) -> None:
        super().__init__(descriptor, "rb", closefd=closes)
        self._late, self._deadline, self._patience = late, deadline, 0.0

    def start_over(self) -> None:
        """Give each further read as many seconds as all before had together."""
        self._patience = self._deadline.seconds if self._deadline else 0.0
        self._deadline = None

    def readinto(self, buffer: Any) -> int | None:
        """Read what is there, at least a byte unless it has ended."""
        deadline = self._deadline or (Deadline(self._patience) if self._patience else None)
        while True:
            if deadline is not None:
                self._wait(deadline)
            count: int | None = super().readinto(buffer)
            if count is not None or deadline is None:
                return count  # None: somebody else took it, or it would block

    def readall(self) -> bytes:
        """Read to the end."""
        parts = []
        part = bytearray(1 << 16)
        while count := self.readinto(part):
            parts.append(bytes(part[:count]))
        return b"".join(parts)

    def _wait(self, deadline: Deadline) -> None:
        """Return once a read would not block, which also the end is; raises UnreachableError.

        poll(2) waits for the first writer of a FIFO: it tells a hang-up only after there was one.
        """
        import select

        waiting = select.poll()
        waiting.register(self.fileno(), select.POLLIN)
        if not waiting.poll(max(1, round(deadline.left * 1000))):
            raise deadline.passed(self._late)
