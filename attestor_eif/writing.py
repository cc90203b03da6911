"""Writing an enclave image file: of its parts, or of another file with a new signature.

The header has the CRC of all that follows, so that everything is read twice: for the CRC, and to be
written. A file that changes in between gives one whose CRC is wrong, which reading it again finds.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol

from attestor_eif.errors import EifError
from attestor_eif.layout import (
    CRC_SIZE,
    SECTIONS_MAX,
    SIGNED_VERSION_MIN,
    SIZE_MAX,
    Header,
    Kind,
    section_header,
)
from attestor_io.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from attestor_eif.reading import Image

_BLOCK: Final = 1 << 18  # bytes


class Content(Protocol):
    """The contents of a section, which can be read more than once."""

    @property
    def size(self) -> int:
        """Return how many bytes it has."""
        ...

    def blocks(self) -> Iterator[bytes]:
        """Yield all of them; raises OSError, EifError."""
        ...


@dataclass(frozen=True, slots=True)
class InMemory:
    """Contents that are held in memory."""

    data: bytes = field(repr=False)

    @property
    def size(self) -> int:
        """Return how many bytes it has."""
        return len(self.data)

    def blocks(self) -> Iterator[bytes]:
        """Yield all of them."""
        yield self.data


@dataclass(frozen=True, slots=True)
class FileRange:
    """Contents that are a part of an open file."""

    descriptor: int
    offset: int
    size: int

    def blocks(self) -> Iterator[bytes]:
        """Yield all of them; raises OSError, and EifError if the file has become shorter."""
        position, end = self.offset, self.offset + self.size
        while position < end:
            block = os.pread(self.descriptor, min(_BLOCK, end - position), position)
            if not block:
                raise EifError("a file has become shorter while it was read")
            yield block
            position += len(block)


@dataclass(frozen=True, slots=True)
class Plan:
    """An enclave image file that is to be written: a header, whose sizes and CRC do not count, and
    the sections.
    """

    header: Header
    sections: Sequence[tuple[Kind, Content]]

    @classmethod
    def of_parts(
        cls,
        header: Header,
        kernel: Content,
        command_line: bytes,
        ramdisks: Sequence[Content],
        metadata: bytes,
    ) -> Plan:
        """Put the parts in the order of AWS's builder."""
        return cls(
            header,
            (
                (Kind.KERNEL, kernel),
                (Kind.COMMAND_LINE, InMemory(command_line)),
                (Kind.METADATA, InMemory(metadata)),
                *((Kind.RAMDISK, ramdisk) for ramdisk in ramdisks),
            ),
        )

    def blocks(self) -> Iterator[bytes]:
        """Yield the bytes of the file; raises OSError, EifError and InputError."""
        if len(self.sections) > SECTIONS_MAX:
            count = len(self.sections)
            raise InputError(f"an EIF has at most {SECTIONS_MAX} sections, and not {count}")
        for kind, content in self.sections:
            if content.size > SIZE_MAX[kind]:
                most = SIZE_MAX[kind]
                raise InputError(f"{kind} has {content.size} bytes, expected at most {most}")
        sizes = tuple(content.size for _, content in self.sections)
        header = replace(self.header, sizes=sizes, crc=0)
        crc = zlib.crc32(header.to_bytes()[:-CRC_SIZE])
        for block in self._contents():
            crc = zlib.crc32(block, crc)
        yield replace(header, crc=crc).to_bytes()
        yield from self._contents()

    def _contents(self) -> Iterator[bytes]:
        for kind, content in self.sections:
            yield section_header(kind, content.size)
            yield from content.blocks()


def signed_plan(image: Image, descriptor: int, signature: bytes) -> Plan:
    """Plan the file that an image, open for reading, becomes with this signature section.

    It takes the place of an older one, or comes last.
    """
    sections: list[tuple[Kind, Content]] = [
        (section.kind, FileRange(descriptor, section.contents, section.size))
        for section in image.sections
    ]
    kinds = [section.kind for section in image.sections]
    index = kinds.index(Kind.SIGNATURE) if Kind.SIGNATURE in kinds else len(kinds)
    sections[index : index + 1] = [(Kind.SIGNATURE, InMemory(signature))]
    version = max(image.header.version, SIGNED_VERSION_MIN)
    return Plan(replace(image.header, version=version), sections)
