"""Enclave image files as the commands take them: opened, read to the end, and named in errors."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING

from attestor_commands.inputs import FILE_MAX
from attestor_eif import Image, NotAnEifError, is_eif, read, verified
from attestor_io.errors import AttestorError, InputError, NotAuthenticError
from attestor_io.reading import read_head

if TYPE_CHECKING:
    from collections.abc import Iterator

    from keypolicy import Measured


class _Rejoined:
    """A stream whose first bytes were read already."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head, self._rest = head, rest

    def readinto(self, buffer: memoryview) -> int | None:
        """Read the head, and behind it the rest."""
        if not self._head:
            count: int | None = self._rest.readinto(buffer)  # type: ignore[attr-defined]
            return count
        part, self._head = self._head[: len(buffer)], self._head[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


@contextlib.contextmanager
def eif_errors(name: str) -> Iterator[None]:
    """Have errors about an enclave image file name the file."""
    try:
        yield
    except NotAnEifError as error:
        raise InputError(f"{name} {error}", *error.hints) from error
    except NotAuthenticError as error:
        raise _renamed(error, f"{name} refused: {error}") from error
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from error


def _renamed(error: AttestorError, message: str) -> AttestorError:
    """Return the error with another message, and the same notes and hints."""
    renamed = type(error)(message, *error.hints)
    renamed.notes = error.notes
    return renamed


def read_image(path: str, *, now: datetime | None = None) -> Image:
    """Read a file, or ("-") standard input, and verify its signature if it has one.

    Raises InputError, which says that it is no enclave image file, and NotAuthenticError.
    """
    name = "standard input" if path == "-" else path
    head, rest = read_head(path, 4, name)
    with rest, eif_errors(name):
        return verified(read(_Rejoined(head, rest)), now or datetime.now(UTC))


def measured_image(path: str) -> Measured:
    """Measure an enclave image file: PCR0, 1, 2, and 8 if it is signed."""
    from keypolicy import Measured

    return Measured("enclave", dict(read_image(path).pcrs))


def read_certificate(path: str) -> bytes:
    """Read the certificate that signs images, in DER: from PEM, DER, or a signed image."""
    from attestor_commands.arguments import ArgumentError, parse_certificate

    name = "standard input" if path == "-" else path
    head, rest = read_head(path, FILE_MAX + 1, name)
    with rest, eif_errors(name):
        if not is_eif(head):
            if len(head) > FILE_MAX:
                raise InputError(f"{name} is longer than {FILE_MAX} bytes")
            try:
                return parse_certificate(head)
            except ArgumentError as error:
                raise ArgumentError(f"{name}: {error}") from error
        image = verified(read(_Rejoined(head, rest)), datetime.now(UTC))
    if image.signature is None:
        raise InputError(f"{name} is not signed: it has no certificate")
    return image.signature.certificate.der
