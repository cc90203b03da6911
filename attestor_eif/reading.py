"""Reading an enclave image file: once from front to end, measured on the way.

Every byte is accounted for: a file is its header and the sections that the header tells of, one
behind the other, and nothing else. What is measured comes in one order (kernel, command line,
ramdisks), so that there is one answer to what the image is.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

from attestor_eif.errors import EifError
from attestor_eif.layout import (
    CRC_SIZE,
    HEADER_SIZE,
    SECTION_HEADER_SIZE,
    Header,
    Kind,
    Section,
    parse_section_header,
)
from attestor_eif.metadata import Metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime

    from attestor_eif.signature import Signature

_BLOCK: Final = 1 << 18  # bytes that are read, and hashed, at once


class Stream(Protocol):
    """What can be read into a buffer: no bytes only at the end."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """As of any binary stream."""
        ...


@dataclass(frozen=True, slots=True)
class Image:
    """What an enclave image file holds, and what it measures to.

    `pcrs` are 0, 1 and 2, and 8 once the signature is verified; until then `signature` is None,
    although `signature_section` may have one.
    """

    header: Header
    sections: tuple[Section, ...]
    pcrs: Mapping[int, bytes]
    command_line: bytes
    metadata: Metadata | None = None
    signature_section: bytes | None = None
    signature: Signature | None = None

    @property
    def size(self) -> int:
        """Return how many bytes the file has."""
        return self.sections[-1].end


def read(stream: Stream) -> Image:
    """Read a file to its end, and measure it; the signature is not looked at.

    Raises NotAnEifError, EifError, and OSError as the stream does.
    """
    source = _Source(stream)
    header = Header.parse(source.header())
    measured, contents = Measurement(), {}
    sections: list[Section] = []
    for index, offset in enumerate(header.offsets[:-1], 1):
        head = source.exactly(SECTION_HEADER_SIZE, f"the header of section {index}")
        kind, size = parse_section_header(head, index, header.sizes)
        sections.append(Section(kind, offset, size))
        _check_order([section.kind for section in sections])
        if kind in {Kind.KERNEL, Kind.RAMDISK}:
            measured.begin(kind)
            source.each_block(size, f"the {kind}", measured.update)
        else:
            contents[kind] = source.exactly(size, f"the {kind}")
        if kind is Kind.COMMAND_LINE:
            measured.begin(kind)
            measured.update(memoryview(contents[kind]))
    source.end()
    _check_complete([section.kind for section in sections])
    metadata = contents.get(Kind.METADATA)
    image = Image(
        header=header,
        sections=tuple(sections),
        pcrs=measured.pcrs(),
        command_line=contents[Kind.COMMAND_LINE],
        signature_section=contents.get(Kind.SIGNATURE),
    )
    _check_crc(image, source.crc)
    return replace(image, metadata=Metadata.parse(metadata) if metadata is not None else None)


def verified(image: Image, at: datetime) -> Image:
    """Return the image with its signature verified and PCR8 beside the others, if it is signed.

    Raises EifError unless the signature covers PCR0 and the certificate is valid at that time.
    """
    if image.signature_section is None:
        return image
    from attestor_eif import signature  # it imports cryptography, which most images do not need

    found = signature.parse(image.signature_section)
    signature.verify(found, image.pcrs[0])
    signature.check_validity(found.certificate, at)
    return replace(image, signature=found, pcrs={**image.pcrs, 8: found.pcr8})


class Measurement:
    """PCR0, 1 and 2 of what is given to it in the order of the file.

    Each is SHA384(48 zeros || SHA384(contents)): of kernel, command line and all ramdisks; of
    kernel, command line and the first ramdisk; of the other ramdisks. The headers of the sections
    are not in it. The first two begin alike, so that what they share is hashed once.
    """

    def __init__(self) -> None:
        self._image = hashlib.sha384()
        self._boot = self._image
        self._application = hashlib.sha384()
        self._ramdisks = 0

    def begin(self, kind: Kind) -> None:
        """Say what the next bytes are of."""
        if kind is Kind.RAMDISK:
            self._ramdisks += 1
            if self._ramdisks == 2:
                self._boot = self._image.copy()

    def update(self, block: memoryview) -> None:
        """Measure the next bytes."""
        self._image.update(block)
        if self._ramdisks > 1:
            self._application.update(block)

    def pcrs(self) -> dict[int, bytes]:
        """Return PCR0, 1 and 2."""
        from keypolicy.measure import extended_once

        hashes = (self._image, self._boot, self._application)
        return {index: extended_once(found.digest()) for index, found in enumerate(hashes)}


class _Source:
    """A stream that is read by what must be there, with the CRC-32 of all but the CRC itself."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._buffer = memoryview(bytearray(_BLOCK))
        self._read = 0
        self.crc = 0

    def header(self) -> bytes:
        """Return the header, or what there is of it."""
        data = b"".join(map(bytes, self._blocks(HEADER_SIZE)))  # the next overwrites a block
        self.crc = zlib.crc32(data[: HEADER_SIZE - CRC_SIZE])
        return data

    def exactly(self, size: int, what: str) -> bytes:
        """Return so many bytes, which are of `what`; raises EifError."""
        parts: list[bytes] = []
        self.each_block(size, what, lambda block: parts.append(bytes(block)))
        return b"".join(parts)

    def each_block(self, size: int, what: str, use: Callable[[memoryview], object]) -> None:
        """Use so many bytes, block by block; raises EifError if they are not there."""
        left = size
        for block in self._blocks(size):
            self.crc = zlib.crc32(block, self.crc)
            use(block)
            left -= len(block)
        if left:
            expected = f"{what} should reach to byte {self._read + left}"
            raise EifError(f"it ends after {self._read} bytes, but {expected}")

    def end(self) -> None:
        """Raise EifError unless nothing follows."""
        if any(True for _ in self._blocks(1)):
            raise EifError(f"it goes on behind its last section, which ends at {self._read - 1}")

    def _blocks(self, size: int) -> Iterator[memoryview]:
        """Yield up to so many bytes, in blocks that are overwritten by the next."""
        while size:
            count = self._stream.readinto(self._buffer[: min(size, _BLOCK)])
            if count is None:
                raise BlockingIOError("it would block")
            if not count:
                return
            self._read += count
            size -= count
            yield self._buffer[:count]


def _check_order(kinds: Sequence[Kind]) -> None:
    """Raise EifError if the last section may not follow the others."""
    last, before = kinds[-1], kinds[:-1]
    if last is not Kind.RAMDISK and last in before:
        raise EifError(f"section {len(kinds)} is a second {last}")
    later = {Kind.KERNEL: {Kind.COMMAND_LINE, Kind.RAMDISK}, Kind.COMMAND_LINE: {Kind.RAMDISK}}
    if later.get(last, set()) & set(before):
        expected = "kernel, command line, ramdisks is the order in which they are measured"
        raise EifError(f"section {len(kinds)}, the {last}, comes too late: {expected}")


def _check_complete(kinds: Sequence[Kind]) -> None:
    """Raise EifError if a section is missing without which nothing boots."""
    for kind in (Kind.KERNEL, Kind.COMMAND_LINE, Kind.RAMDISK):
        if kind not in kinds:
            raise EifError(f"it has no {kind}")


def _check_crc(image: Image, crc: int) -> None:
    """Raise EifError if the CRC is wrong: with a good signature, what it covers is not damaged."""
    if image.header.crc == crc:
        return
    error = EifError(f"CRC is {crc:08x}, expected {image.header.crc:08x} by the header")
    if image.signature_section is not None:
        from attestor_eif import signature

        try:
            signature.verify(signature.parse(image.signature_section), image.pcrs[0])
        except EifError:
            error.notes = ("the signature does not cover what was measured, either",)
        else:
            error.notes = ("the signature covers what was measured: something else was changed",)
    raise error
