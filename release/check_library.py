"""Whether a libnsm.so may go into the wheel of a platform: what it gives, what it needs, and whom.

    python -m release.check_library LIBRARY PLATFORM

PLATFORM is the tag of a wheel, such as manylinux_2_17_x86_64 (PEP 600) or musllinux_1_2_aarch64
(PEP 656). Ends with 1, and one line on standard error for each thing that is wrong.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final, NamedTuple

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSection, DynamicTag
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection
from elftools.elf.sections import SymbolTableSection

OURS: Final = "nsmpy_"
_MACHINES: Final = {"x86_64": "EM_X86_64", "aarch64": "EM_AARCH64"}
# What the C library calls itself: glibc was several files until 2.34, musl is one.
_GLIBC: Final = re.compile(
    r"(libc\.so\.6|libpthread\.so\.0|libdl\.so\.2|ld-linux-[\w-]+\.so\.[12])"
)
_MUSL: Final = re.compile(r"libc\.(so|musl-\w+\.so\.1)")
_PLATFORM: Final = re.compile(r"(manylinux|musllinux)_(\d+)_(\d+)_(\w+)")
_DF_BIND_NOW: Final = 8  # elf(5), DT_FLAGS
_PF_X: Final = 1  # elf(5), p_flags


class Platform(NamedTuple):
    """The parts of a platform tag; `version` is the oldest C library that it names."""

    libc: str
    version: tuple[int, int]
    machine: str

    @classmethod
    def parse(cls, tag: str) -> Platform:
        """Read a tag of PEP 600 or 656; raises ValueError for any other."""
        found = _PLATFORM.fullmatch(tag)
        if found is None or found[4] not in _MACHINES:
            raise ValueError(f"{tag} is no platform tag of manylinux or musllinux")
        return cls(found[1], (int(found[2]), int(found[3])), found[4])


def problems(path: Path, tag: str) -> list[str]:
    """Everything that keeps the library out of a wheel with that tag; none is how it should be."""
    platform = Platform.parse(tag)
    with path.open("rb") as file:
        try:
            elf = ELFFile(file)
            return [
                *_wrong_machine(elf, platform),
                *_wrong_exports(elf),
                *_wrong_needs(elf, platform),
                *_wrong_versions(elf, platform),
                *_wrong_protection(elf),
            ]
        except ELFError as error:
            return [f"it cannot be read: {error}"]


def _wrong_machine(elf: ELFFile, platform: Platform) -> list[str]:
    said = (elf.elfclass, elf.little_endian, elf["e_type"], elf["e_machine"])
    wanted = (64, True, "ET_DYN", _MACHINES[platform.machine])
    return [] if said == wanted else [f"it is {said}, and the tag says {wanted}"]


def _wrong_exports(elf: ELFFile) -> list[str]:
    """Ours alone: a foreign name would link silently into whatever loads the library."""
    defined = {
        symbol.name
        for section in elf.iter_sections()
        if isinstance(section, SymbolTableSection) and section.name == ".dynsym"
        for symbol in section.iter_symbols()
        if symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["bind"] != "STB_LOCAL"
    }
    foreign = sorted(name for name in defined if not name.startswith(OURS))
    lines = [f"it exports what is not ours: {', '.join(foreign)}"] if foreign else []
    if f"{OURS}abi_version" not in defined:
        lines.append(f"it exports no {OURS}abi_version")
    return lines


def _wrong_needs(elf: ELFFile, platform: Platform) -> list[str]:
    allowed = _GLIBC if platform.libc == "manylinux" else _MUSL
    needed = [str(tag.needed) for tag in _dynamic(elf, "DT_NEEDED")]  # type: ignore[attr-defined]  # of this kind
    lines = [f"it needs {name}" for name in needed if not allowed.fullmatch(name)]
    if not any(name.startswith("libc.") for name in needed):
        lines.append("it needs no C library")
    paths = [*_dynamic(elf, "DT_RPATH"), *_dynamic(elf, "DT_RUNPATH")]
    return lines + ["it names a folder to search for libraries" for _ in paths]


def _wrong_versions(elf: ELFFile, platform: Platform) -> list[str]:
    """Symbol versions newer than the tag's glibc, and those that are none of glibc's."""
    lines = []
    for section in elf.iter_sections():
        if not isinstance(section, GNUVerNeedSection):
            continue
        for library, versions in section.iter_versions():
            for version in versions:
                found = re.fullmatch(r"GLIBC_(\d+)\.(\d+)(?:\.\d+)?", version.name)
                if platform.libc != "manylinux" or found is None:
                    lines.append(f"it needs {version.name} of {library.name}")
                elif (int(found[1]), int(found[2])) > platform.version:
                    oldest = ".".join(map(str, platform.version))
                    lines.append(f"it needs {version.name}, and the tag says {oldest}")
    return lines


def _wrong_protection(elf: ELFFile) -> list[str]:
    """No executable stack, nothing that is written where code is, all addresses bound at once."""
    segments = {segment["p_type"]: segment for segment in elf.iter_segments()}
    stack = segments.get("PT_GNU_STACK")
    flags = [tag["d_val"] for tag in _dynamic(elf, "DT_FLAGS")]
    checks = {
        "its stack is executable": stack is not None and not stack["p_flags"] & _PF_X,
        "its relocations stay writable": "PT_GNU_RELRO" in segments,
        "its addresses are bound late": any(flag & _DF_BIND_NOW for flag in flags),
        "its code is relocated": not _dynamic(elf, "DT_TEXTREL"),
    }
    return [line for line, holds in checks.items() if not holds]


def _dynamic(elf: ELFFile, kind: str) -> list[DynamicTag]:
    """The entries of that kind of the dynamic section."""
    return [
        tag
        for section in elf.iter_sections()
        if isinstance(section, DynamicSection)
        for tag in section.iter_tags(kind)
    ]


def main() -> None:
    """Check what the command line names."""
    library, tag = sys.argv[1:]
    try:
        wrong = problems(Path(library), tag)
    except (OSError, ValueError) as error:
        sys.exit(f"check_library: error: {error}")
    if wrong:
        lines = "\n".join(f"check_library: error: {library}: {line}" for line in wrong)
        sys.exit(f"{lines}\n{library} is not for {tag}")


if __name__ == "__main__":
    main()
