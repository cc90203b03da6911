"""What the secrets of a manifest become while they come in: files, values, sealed memory.

Everything is prepared before KMS is asked, and nobody can see any of it before all is complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from typing import TYPE_CHECKING, Final, Protocol

from attestor_commands.inject.program import Inheritance
from attestor_io.errors import OutputError
from attestor_io.secret_file import write_all

if TYPE_CHECKING:
    from collections.abc import Iterable

    from attestor_commands.inject.manifest import Manifest
    from attestor_commands.inject.places import Place
    from attestor_commands.placement import Placement
    from attestor_io.secret_file import SecretFile

ENVIRONMENT_MAX: Final = 131_071  # bytes of NAME=VALUE: MAX_ARG_STRLEN, linux/binfmts.h, less NUL
MEMBER_MAX: Final = 1 << 20  # bytes of a secret in a document, which is held in memory

_MFD_NOEXEC_SEAL: Final = 0x8  # linux/memfd.h, from Linux 6.3 on
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_FIRST: Final = 3  # descriptors below are standard input, output and error
# in single quotes shells and the dotenv libraries differ about these
_NOT_IN_DOTENV: Final = re.compile(r"['\\\r\0]|\$\{")


class Delivery(Protocol):
    """What one secret becomes: a SecretFile, or one of those below."""

    def append(self, data: bytes) -> None:
        """Take more of it; raises OutputError."""
        ...

    def seal(self) -> None:
        """Take notice that it is complete; raises OutputError for what cannot be delivered."""
        ...


class Value:
    """A secret that is held in memory, `most` bytes of it."""

    def __init__(self, place: Place, most: int) -> None:
        self.place, self._most = place, most
        self.data = b""

    def append(self, data: bytes) -> None:
        """Hold more of it."""
        if len(self.data) + len(data) > self._most:
            raise _impossible(self.place, f"it is longer than {self._most} bytes")
        self.data += data

    def seal(self) -> None:
        """Refuse what the kernel would take for an early end."""
        if self.place.kind == "environment" and b"\0" in self.data:
            raise _impossible(self.place, "it has a byte of zeros, which ends a variable")


class MemoryFile:
    """An unlinked file in memory, which nobody can change once it is sealed: memfd_create(2)."""

    def __init__(self, place: Place) -> None:
        self.place = place
        try:
            created = _create(place.name)
        except OSError as error:
            raise _impossible(place, error.strerror) from error
        try:  # with standard input closed it would become that of the program
            self.descriptor = fcntl.fcntl(created, fcntl.F_DUPFD_CLOEXEC, _FIRST)
        except OSError as error:
            raise _impossible(place, error.strerror) from error
        finally:
            os.close(created)

    def append(self, data: bytes) -> None:
        """Write more of it."""
        try:
            write_all(self.descriptor, data)
        except OSError as error:
            raise _impossible(self.place, error.strerror) from error

    def seal(self) -> None:
        """Give it its owner and mode, let it be read from its start, and never again be changed."""
        try:
            if self.place.owner != (-1, -1):
                os.fchown(self.descriptor, *self.place.owner)
            os.fchmod(self.descriptor, self.place.mode)
            os.lseek(self.descriptor, 0, os.SEEK_SET)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            raise _impossible(self.place, error.strerror) from error

    def close(self) -> None:
        """Give the memory back; a thread that still writes finds nothing."""
        descriptor, self.descriptor = self.descriptor, -1
        os.close(descriptor)


def _create(name: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError:  # an older kernel does not know the flag; whatever else it is comes again
        return os.memfd_create(name, flags)


class Deliveries:
    """What each entry of a manifest becomes, in the manifest's order; files are the placement's."""

    def __init__(self, manifest: Manifest, placement: Placement, *, force: bool) -> None:
        self._passed = manifest.passed_variables
        self._files: dict[str, SecretFile] = {
            place.name: placement.add(
                place.name, force=force, mode=place.mode, owner=place.owner, in_generation=True
            )
            for place in manifest.files
        }
        self._documents = manifest.documents
        self._values: list[Value] = []
        self._memory: list[MemoryFile] = []
        self.all = [self._prepare(entry.place, placement) for entry in manifest.entries]

    def _prepare(self, place: Place, placement: Placement) -> Delivery:
        if place.kind == "target":
            return self._files[place.name]
        if place.kind == "fd":
            self._memory.append(MemoryFile(place))
            placement.close_later(self._memory[-1])
            return self._memory[-1]
        most = MEMBER_MAX if place.member else ENVIRONMENT_MAX - len(place.name) - 1
        self._values.append(Value(place, most))
        return self._values[-1]

    def complete(self) -> None:
        """Write the documents, once every secret is there; raises OutputError."""
        for document in self._documents:
            file = self._files[document.place.name]
            members = [one for one in self._values if one.place.name == document.place.name]
            file.append((_json if document.form == "json" else _dotenv)(members))
            file.seal()

    def files_of(self, places: Iterable[Place]) -> list[SecretFile]:
        """The files that hold what goes to these places."""
        names = {place.name for place in places if not place.needs_program}
        return [self._files[name] for name in names]

    def inheritance(self) -> Inheritance:
        """What the program gets of the secrets, and of the manifest's variables."""
        environment = [one for one in self._values if one.place.kind == "environment"]
        return Inheritance(
            {
                **self._passed,
                **{value.place.name: value.data for value in environment},
                **{file.place.name: str(file.descriptor) for file in self._memory},
            },
            tuple(file.descriptor for file in self._memory),
        )


def _json(members: list[Value]) -> bytes:
    """One object of strings."""
    table = {value.place.member: _text(value, "JSON") for value in members}
    return json.dumps(table, ensure_ascii=False, indent=2).encode() + b"\n"


def _dotenv(members: list[Value]) -> bytes:
    """Lines NAME='VALUE', and nothing in them that readers of such files read differently."""
    lines = []
    for value in members:
        text = _text(value, "dotenv")
        if _NOT_IN_DOTENV.search(text):
            reason = (
                "it has a single quote, a backslash, ${, a carriage return or a byte of zeros, "
                "which readers of such files take differently"
            )
            raise _impossible(value.place, reason, 'format = "json" can hold it')
        lines.append(f"{value.place.member}='{text}'\n")
    return "".join(lines).encode()


def _text(value: Value, form: str) -> str:
    try:
        return value.data.decode()
    except UnicodeDecodeError:
        raise _impossible(value.place, f"it is no UTF-8 text, as {form} wants it") from None


def _impossible(place: Place, reason: str | None, *hints: str) -> OutputError:
    return OutputError(f"{place} cannot be written: {reason}", *hints)
