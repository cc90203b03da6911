"""The shim that makes calls fail, and the memory in which it is told what to do."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tests.chaos.faults import Fault

_SOURCE: Final = Path(__file__).with_name("shim.c")
FAIL, SIGNAL_BEFORE, SIGNAL_AFTER, FILL = range(1, 5)
"""What the shim does at the chosen call; the numbers of `enum action` in shim.c."""


class _Entry(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_int32),
        ("result", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("first", ctypes.c_char * 64),
        ("second", ctypes.c_char * 64),
    )


class _Chaos(ctypes.Structure):
    """`struct chaos` of shim.c."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                "armed function occurrence action value sticky pause_ms then_signal then_after "
                "refuse_tmpfile refuse_renameat2 hit hit_entry hit_process executing readable "
                "calls allowed_mode"
            ).split()
        ),
        ("counts", ctypes.c_int32 * 32),
        ("root", ctypes.c_char * 256),
        ("filler", ctypes.c_char * 256),
        ("log", _Entry * 1024),
    )


@dataclass(frozen=True, slots=True)
class Call:
    """One call that the shim has logged: last parts of its paths, and the errno if it failed."""

    function: str
    first: str
    second: str
    error: int
    flags: int

    def __str__(self) -> str:
        paths = " ".join(path for path in (self.first, self.second) if path)
        failed = f" = {os.strerror(self.error)}" if self.error else ""
        return f"{self.function}({paths}){failed}"


def build(folder: Path) -> Path:
    """Compile the shim into a folder; raises CalledProcessError where that fails."""
    library = folder / "chaos.so"
    compiler = os.environ.get("CC", "cc").split()
    flags = ["-O1", "-Wall", "-Wextra", "-Wno-nonnull-compare", "-shared", "-fPIC"]
    subprocess.run([*compiler, *flags, "-o", library, _SOURCE, "-ldl"], check=True)
    return library


class State:
    """The shared memory of one worker, mapped from a file so that other processes can find it."""

    def __init__(self, library: Path, file: Path) -> None:
        self._shim = ctypes.CDLL(str(library))
        self._shim.chaos_function_name.restype = ctypes.c_char_p
        self._shim.chaos_size.restype = ctypes.c_size_t
        size = ctypes.sizeof(_Chaos)
        if size != self._shim.chaos_size():
            raise AssertionError("state.py and shim.c disagree about struct chaos")
        count = self._shim.chaos_function_count()
        self.functions = [self._shim.chaos_function_name(one).decode() for one in range(count)]
        self.path = file
        file.write_bytes(bytes(size))
        with file.open("r+b") as stream:
            self._memory = mmap.mmap(stream.fileno(), size)
        self.raw: Any = _Chaos.from_buffer(self._memory)

    def attach(self) -> None:
        """Let the shim in this process, and in its forked children, look at this memory."""
        self._shim.chaos_attach(ctypes.c_void_p(ctypes.addressof(self.raw)))

    def reset(self, root: Path) -> None:
        """Forget the last run; nothing is armed."""
        ctypes.memset(ctypes.addressof(self.raw), 0, ctypes.sizeof(_Chaos))
        self.raw.root = os.fsencode(root)
        self.raw.filler = os.fsencode(root / "filler")

    def choose(self, fault: Fault) -> None:
        """Say what is to go wrong in the next run."""
        if fault.function is None:
            return
        self.raw.function = self.functions.index(fault.function)
        self.raw.occurrence = fault.occurrence
        self.raw.action, self.raw.value = fault.action, fault.value
        self.raw.sticky = fault.sticky
        self.raw.pause_ms = fault.pause_ms
        self.raw.then_signal = fault.then_signal
        self.raw.then_after = fault.then_after

    def calls(self) -> list[Call]:
        """Return what was logged."""
        return [
            Call(
                self.functions[entry.function],
                entry.first.decode(errors="replace"),
                entry.second.decode(errors="replace"),
                entry.error,
                entry.flags,
            )
            for entry in self.raw.log[: min(self.raw.calls, 1024)]
        ]
