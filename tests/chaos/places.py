"""The kinds of file system that targets lie in, each in a mount namespace of its own."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tests.chaos.state import State

_CLONE_NEWNS: Final = 0x00020000  # linux/sched.h
_MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x4000, 0x40000, 2  # linux/mount.h, sys/mount.h
_FOLDERS: Final = ("t", "u", "e")  # of the targets, and for what lies elsewhere


class PlaceError(Exception):
    """This machine does not let us have such a file system."""


@dataclass(frozen=True, slots=True)
class Place:
    """One kind: a small or overlaid tmpfs, and what is refused or missing in it."""

    name: str
    small: bool = False
    full: bool = False
    fills: bool = False
    overlay: bool = False
    proc: bool = True
    tmpfile: bool = True
    renameat2: int = 0
    """The errno of a renameat2 with flags, 0 where they work."""

    def refuse(self, state: State) -> None:
        """Tell the shim what does not exist here."""
        state.raw.refuse_tmpfile = not self.tmpfile
        state.raw.refuse_renameat2 = self.renameat2


PLACES: Final = {
    place.name: place
    for place in (
        Place("tmpfs"),
        Place("full", small=True, full=True),
        Place("filling", small=True, fills=True),
        Place("overlay", overlay=True),
        Place("no-proc", proc=False),
        Place("no-tmpfile", tmpfile=False),
        Place("no-exchange", renameat2=errno.EINVAL),
        Place("bare", tmpfile=False, renameat2=errno.ENOSYS, proc=False),
    )
}

_libc: Final = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise PlaceError(f"{name}{arguments!r}: {os.strerror(number)}")


def _mount(kind: str, where: Path, options: str = "") -> None:
    _call("mount", b"none", os.fsencode(where), kind.encode(), 0, options.encode())


def enter_namespace() -> None:
    """Give this process mounts of its own; raises PlaceError where that is not allowed."""
    _call("unshare", _CLONE_NEWNS)
    _call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)


class Mounted:
    """A place below a root, in the mount namespace of this process."""

    def __init__(self, place: Place, root: Path) -> None:
        self.place, self.root = place, root
        root.mkdir(exist_ok=True)
        self._layers = root.with_name("layers")
        if place.overlay:
            self._layers.mkdir(exist_ok=True)
            _mount("tmpfs", self._layers, "size=8m,mode=0700")
        else:
            size = "size=256k,nr_inodes=64" if place.small else "size=8m"
            _mount("tmpfs", root, f"{size},mode=0700")
        if not place.proc:
            _mount("tmpfs", Path("/proc"))

    def empty(self) -> Path:
        """Remove what a run has left, and return where the old files are to be made."""
        if not self.place.overlay:
            for path in self.root.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._make_folders(self.root)
            return self.root
        if os.path.ismount(self.root):
            _call("umount2", os.fsencode(self.root), _MNT_DETACH)
        for name in ("lower", "upper", "work"):
            shutil.rmtree(self._layers / name, ignore_errors=True)
            (self._layers / name).mkdir()
        self._make_folders(self._layers / "lower")
        return self._layers / "lower"

    def mount_overlay(self) -> None:
        """Put the overlay over the old files, where the place is one."""
        if self.place.overlay:
            layers = ",".join(
                f"{name}dir={self._layers / name}" for name in ("lower", "upper", "work")
            )
            _mount("overlay", self.root, layers)

    def fill(self) -> None:
        """Take all blocks and inodes; `relieve` gives them back."""
        block = bytes(4096)
        descriptor = os.open(self.root / "filler", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            while os.write(descriptor, block):
                pass
        except OSError:
            pass
        finally:
            os.close(descriptor)
        try:
            for number in range(4096):
                os.mknod(self.root / f"filler-{number}", 0o600)
        except OSError:
            pass

    def relieve(self) -> None:
        """Remove what `fill`, or the shim, has put there."""
        for path in self.root.glob("filler*"):
            path.unlink()

    @staticmethod
    def _make_folders(folder: Path) -> None:
        for name in _FOLDERS:
            (folder / name).mkdir(mode=0o755)
