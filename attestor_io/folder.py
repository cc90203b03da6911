"""A folder that files come into: held open, so that nobody can swap it, and locked against others.

Until a file gets its name it has none (O_TMPFILE), or a hidden one in this folder where the file
system or a missing /proc demands that. SIGKILL may leave hidden names, of complete files or of
files that never got a name; the next command that writes into the folder removes them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from typing import Final

from attestor_io import signals

HIDDEN: Final = re.compile(r"\.attestor-[0-9a-f]{16}")
"""The names that are ours in any folder, and the next command's to remove."""

NO_EXCHANGE: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
"""What a file system, a kernel or a C library says that cannot exchange names (rename(2))."""

# open(2): EOPNOTSUPP by a file system without O_TMPFILE, the others by kernels and overlays
_NO_TMPFILE: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL})
_LOCK_TIMEOUT: Final = 5.0  # seconds
_RENAME_EXCHANGE: Final = 2  # linux/fs.h
_MOUNT: Final = re.compile(rb"^mnt_id:\s*(\d+)", re.MULTILINE)  # proc_pid_fdinfo(5)


def identity_of(status: os.stat_result) -> tuple[int, int]:
    """Device and inode, by which a file is told from others."""
    return status.st_dev, status.st_ino


class Folder:
    """A folder that is held open, and the names in it; every method may raise OSError."""

    def __init__(self, path: str, inside: Folder | None = None) -> None:
        """Open it; "" is the working folder. One that is `inside` another must be no link."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        if inside is None:
            self._descriptor = os.open(path or ".", flags)
        else:
            self._descriptor = os.open(path, flags | os.O_NOFOLLOW, dir_fd=inside._descriptor)

    def close(self) -> None:
        """Give the folder back, and its lock with it."""
        os.close(self._descriptor)

    def sync(self) -> None:
        """Make the names in it durable."""
        os.fsync(self._descriptor)

    def is_writable(self) -> bool:
        """Tell whether names can be made in it."""
        return os.access(".", os.W_OK | os.X_OK, dir_fd=self._descriptor, effective_ids=True)

    def status_of(self, name: str) -> os.stat_result | None:
        """Look at what has a name, links not followed; None where nothing has it."""
        try:
            return os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def check_renameable(self, name: str, status: os.stat_result) -> None:
        """Raise OSError where the kernel would not let this file give its name away."""
        folder = os.fstat(self._descriptor)
        # inode(7): with the sticky bit, only who owns the file or the folder may
        if folder.st_mode & stat.S_ISVTX and os.geteuid() not in {0, folder.st_uid, status.st_uid}:
            raise OSError(errno.EPERM, "its folder has the sticky bit, and it is another user's")
        file = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._descriptor)
        try:
            if _mount_of(file) != _mount_of(self._descriptor):
                raise OSError(errno.EBUSY, "something is mounted on it")
        finally:
            os.close(file)

    def claim(self) -> None:
        """Remove what dead commands have left in it, and keep what this one makes from others.

        Living ones hold a shared lock on the folder as long as they may have names in it. A folder
        that cannot be locked (NFS) or listed keeps leftovers; one that somebody else keeps locked
        is unusable, since without the lock our own names would be taken for those of the dead:
        BlockingIOError.
        """
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in filter(HIDDEN.fullmatch, os.listdir(self._descriptor)):
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self._descriptor)
        deadline = time.monotonic() + _LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # whoever else removes some now is done in no time
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            except OSError:
                return
            else:
                return

    def create(self) -> tuple[int, str]:
        """Create an empty file of mode 0600; its descriptor, and its hidden name or none."""
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        if os.path.isdir("/proc/self/fd"):  # linkat needs it to find the unnamed file
            try:
                return os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=self._descriptor), ""
            except OSError as error:
                if error.errno not in _NO_TMPFILE:
                    raise
        signals.owner.enter()  # a signal finds the name in the list, or not on the disk
        name = self.hidden_name()
        try:
            flags |= os.O_CREAT | os.O_EXCL
            return os.open(name, flags, 0o600, dir_fd=self._descriptor), name
        except BaseException:
            self.remove(name)
            raise
        finally:
            signals.owner.leave()

    def create_link(self, target: str) -> str:
        """Create a symbolic link; its hidden name."""
        signals.owner.enter()
        name = self.hidden_name()
        try:
            os.symlink(target, name, dir_fd=self._descriptor)
        except BaseException:
            self.disown(name)
            raise
        finally:
            signals.owner.leave()
        return name

    def open_again(self, file: int, name: str) -> int:
        """Open for reading what `create` has made and given; a new descriptor."""
        if name:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(name, flags, dir_fd=self._descriptor)
        return os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)

    # -- folders in it

    def names(self) -> list[str]:
        """List what is in it."""
        return os.listdir(self._descriptor)

    def create_folder(self, prefix: str) -> str:
        """Create a folder that everybody may list; its name, which is in the list of the hidden."""
        signals.owner.enter()
        name = self.hidden_name(prefix)
        try:
            os.mkdir(name, 0o755, dir_fd=self._descriptor)
        except BaseException:
            self.disown(name)
            raise
        finally:
            signals.owner.leave()
        return name

    def set_mode(self, mode: int) -> None:
        """Change its mode."""
        os.fchmod(self._descriptor, mode)

    def identity(self) -> tuple[int, int]:
        """Device and inode of it."""
        return identity_of(os.fstat(self._descriptor))

    def link_target(self, name: str) -> str:
        """Read a symbolic link; "" where there is none of this name."""
        try:
            return os.readlink(name, dir_fd=self._descriptor)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.EINVAL}:  # readlink(2): not there, no link
                raise
            return ""

    def is_in_use(self) -> bool:
        """Tell whether a living command has claimed it; one that cannot be locked may be."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False

    # -- names: those that are hidden are in the list of what a signal removes

    def hidden_name(self, prefix: str = ".attestor-") -> str:
        """Make up a name for a file that shall not stay; it is in the list from now on."""
        name = f"{prefix}{os.urandom(8).hex()}"
        _hidden_names[name] = self._descriptor
        return name

    def link(self, file: str | int, name: str) -> None:
        """Give a file, by another name or by its descriptor, this name, which nothing may have."""
        folder = self._descriptor
        if isinstance(file, str):
            os.link(file, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        else:
            # dst_dir_fd makes Python call linkat with AT_SYMLINK_FOLLOW, which open(2) prescribes
            # for the files of O_TMPFILE
            os.link(f"/proc/self/fd/{file}", name, dst_dir_fd=folder, follow_symlinks=True)

    def rename(self, name: str, new: str) -> None:
        """Give a file another name, in the place of what has that."""
        os.rename(name, new, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        self.disown(name)

    def exchange(self, name: str, other: str) -> None:
        """Exchange two names in one step; an errno of NO_EXCHANGE where that cannot be."""
        _exchange(self._descriptor, name, other)

    def unlink(self, name: str) -> None:
        """Remove a name."""
        os.unlink(name, dir_fd=self._descriptor)
        self.disown(name)

    def remove(self, name: str) -> None:
        """Remove a hidden name, whatever the first attempt says; raises nothing."""
        _hidden_names.setdefault(name, self._descriptor)
        _remove(name)

    def disown(self, name: str) -> None:
        """Take a name off the list of what a signal removes."""
        _hidden_names.pop(name, None)


_hidden_names: Final[dict[str, int]] = {}
"""The hidden names that this process made, and the folders that they are in."""


def _remove(name: str) -> None:
    folder = _hidden_names.get(name, -1)
    for _ in range(2):
        with contextlib.suppress(OSError):
            try:
                os.unlink(name, dir_fd=folder)
            except IsADirectoryError:
                _remove_folder(folder, name)
            break
    _hidden_names.pop(name, None)


def _remove_folder(parent: int, name: str) -> None:
    """Remove a folder and the files in it; raises OSError. Folders in it, which none of ours has,
    keep it.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    folder = os.open(name, flags, dir_fd=parent)
    try:
        for file in os.listdir(folder):
            with contextlib.suppress(OSError):
                os.unlink(file, dir_fd=folder)
    finally:
        os.close(folder)
    os.rmdir(name, dir_fd=parent)


def _remove_all() -> None:
    for name in list(_hidden_names):
        _remove(name)


signals.owner.clean_up = _remove_all


def _mount_of(descriptor: int) -> bytes | None:
    """Return the number of the mount that something open is on; None where /proc does not tell."""
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{descriptor}", "rb") as about:
        found = _MOUNT.search(about.read())
        return found and found[1]
    return None


def _exchange(folder: int, name: str, other: str) -> None:
    """Exchange two names in one folder (renameat2(2)); raises OSError (ENOSYS: not in libc)."""
    import ctypes

    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    if rename(folder, os.fsencode(name), folder, os.fsencode(other), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
