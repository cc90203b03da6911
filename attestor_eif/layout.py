"""The header of an enclave image file, and those of its sections, as data and as bytes.

All integers are big-endian. The header has 548 bytes: magic, version, flags, the default memory and
CPUs of the enclave, the number of sections, a table of 32 offsets and 32 sizes, and a CRC. A
section has a header of 12 bytes (type, flags, size) and then its contents. An offset of the table
is that of the section's header, a size counts the contents alone. (defs/mod.rs of the crate
aws-nitro-enclaves-image-format)
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Final, Self

from attestor_eif.errors import EifError, NotAnEifError

if TYPE_CHECKING:
    from collections.abc import Sequence

MAGIC: Final = b".eif"
HEADER_SIZE: Final = 548
CRC_SIZE: Final = 4  # the last field of the header, and the only bytes that the CRC leaves out
SECTION_HEADER_SIZE: Final = 12
SECTIONS_MAX: Final = 32
VERSION: Final = 4  # that is written; 2 brought the CRC, 3 the signature, 4 the metadata
VERSION_MIN: Final = 2
SIGNED_VERSION_MIN: Final = 3
ARM64: Final = 1  # the one flag of the header
DEFAULT_MEMORY: Final = 1 << 30  # bytes, and like the CPUs what AWS's builder writes
DEFAULT_CPUS: Final = 2
_SIZE_MAX: Final = (1 << 63) - 1  # of a file

_HEADER: Final = struct.Struct(f">4sHHQQHH{SECTIONS_MAX}Q{SECTIONS_MAX}QII")
_SECTION_HEADER: Final = struct.Struct(">HHQ")


class Kind(enum.IntEnum):
    """The types of sections."""

    KERNEL = 1
    COMMAND_LINE = 2
    RAMDISK = 3
    SIGNATURE = 4
    METADATA = 5

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")


# Bytes of contents. Kernels cut a command line at 2048, AWS's tools metadata of the user at 4096
# (beside what Docker says of the image); a certificate of 4 KiB in a signature makes 8 KiB.
SIZE_MAX: Final = {
    Kind.KERNEL: _SIZE_MAX,
    Kind.COMMAND_LINE: 64 << 10,
    Kind.RAMDISK: _SIZE_MAX,
    Kind.SIGNATURE: 128 << 10,
    Kind.METADATA: 128 << 10,
}


def is_eif(data: bytes) -> bool:
    """Tell whether bytes begin as an enclave image file does."""
    return data.startswith(MAGIC)


@dataclass(frozen=True, slots=True)
class Section:
    """Where a section is: the offset of its header, and the size of its contents."""

    kind: Kind
    offset: int
    size: int

    @property
    def contents(self) -> int:
        """Return the offset of the contents."""
        return self.offset + SECTION_HEADER_SIZE

    @property
    def end(self) -> int:
        """Return the offset behind the contents."""
        return self.contents + self.size


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a file. The table of its sections is `sizes`, since one follows the other."""

    sizes: tuple[int, ...]
    version: int = VERSION
    arm64: bool = False
    memory: int = DEFAULT_MEMORY
    cpus: int = DEFAULT_CPUS
    crc: int = 0

    @property
    def offsets(self) -> list[int]:
        """Return the offsets of the sections, and last that behind all of them."""
        steps = (SECTION_HEADER_SIZE + size for size in self.sizes)
        return list(accumulate(steps, initial=HEADER_SIZE))

    @property
    def architecture(self) -> str:
        """Return the architecture's name, as `eif_build` and this command take it."""
        return "aarch64" if self.arm64 else "x86_64"

    def to_bytes(self) -> bytes:
        """Return the 548 bytes of the header, which has at most 32 sections."""
        unused = (0,) * (SECTIONS_MAX - len(self.sizes))
        flags = ARM64 if self.arm64 else 0
        offsets, sizes = (*self.offsets[:-1], *unused), (*self.sizes, *unused)
        fields = (self.version, flags, self.memory, self.cpus, 0, len(self.sizes))
        return _HEADER.pack(MAGIC, *fields, *offsets, *sizes, 0, self.crc)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a header strictly: what is not used must be zero, and the table without gaps.

        A table that disagrees with the sections as they follow each other would show one image to
        whoever goes by offsets, and another to whoever reads on. Raises NotAnEifError, EifError.
        """
        if data[: len(MAGIC)] != MAGIC:
            raise NotAnEifError(f"does not begin with {MAGIC.decode()!r}, as an EIF does")
        if len(data) < HEADER_SIZE:
            raise EifError(f"it ends after {len(data)} of the {HEADER_SIZE} bytes of its header")
        _, version, flags, memory, cpus, reserved, count, *table, unused, crc = _HEADER.unpack(data)
        if not VERSION_MIN <= version <= VERSION:
            known = f"{VERSION_MIN} to {VERSION}"
            raise NotAnEifError(f"is an EIF of version {version}, and {known} are known here")
        if flags & ~ARM64:
            raise EifError(f"header has the flags {flags:#06x}, expected 0, or {ARM64} for aarch64")
        if reserved or unused:
            raise EifError("header has values where it has no fields")
        if not 1 <= count <= SECTIONS_MAX:
            raise EifError(f"header tells of {count} sections, expected 1 to {SECTIONS_MAX}")
        offsets, sizes = table[:SECTIONS_MAX], table[SECTIONS_MAX:]
        if any(offsets[count:]) or any(sizes[count:]):
            raise EifError(f"header has entries behind those of its {count} sections")
        header = cls(tuple(sizes[:count]), version, bool(flags & ARM64), memory, cpus, crc)
        _check_offsets(offsets, header)
        return header


def _check_offsets(offsets: Sequence[int], header: Header) -> None:
    """Raise EifError unless each section begins where the one before it ends."""
    expected = header.offsets
    if expected[-1] > _SIZE_MAX:
        raise EifError(f"header tells of {expected[-1]} bytes, more than a file can have")
    for index, (is_at, should) in enumerate(zip(offsets, expected[:-1], strict=False), start=1):
        if is_at != should:
            how = "overlaps with" if is_at < should else "leaves a gap to"
            raise EifError(
                f"section {index} begins at byte {is_at}, expected {should}: it {how} what is "
                "before it"
            )


def section_header(kind: Kind, size: int) -> bytes:
    """Return the 12 bytes before the contents of a section."""
    return _SECTION_HEADER.pack(kind, 0, size)


def parse_section_header(data: bytes, index: int, sizes: Sequence[int]) -> tuple[Kind, int]:
    """Read the header of section `index`, from 1: its type, and how many bytes its contents have.

    `sizes` are those of the header of the file, which must say the same. But for a signature that
    comes last: AWS's `sign-eif` leaves the table as it was where it replaces one by another of
    another size (eif_signer.rs of the crate, 0.8.1). Raises EifError.
    """
    number, flags, own_size = _SECTION_HEADER.unpack(data)
    try:
        kind = Kind(number)
    except ValueError:
        known = ", ".join(f"{known:d} ({known})" for known in Kind)
        raise EifError(f"section {index} is of type {number}, expected {known}") from None
    if flags:
        raise EifError(f"section {index}, the {kind}, has the flags {flags:#06x}, expected 0")
    size = sizes[index - 1]
    if own_size != size and not (kind is Kind.SIGNATURE and index == len(sizes)):
        raise EifError(
            f"section {index}, the {kind}, has {own_size} bytes by its own header, and {size} by "
            "the header of the file"
        )
    if own_size > SIZE_MAX[kind]:
        raise EifError(f"{kind} has {own_size} bytes, expected at most {SIZE_MAX[kind]}")
    return kind, own_size
