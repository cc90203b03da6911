"""A whole set of files that is replaced in one step: a new folder, and a link that leads to it.

The link is what readers know. Who opens the folder that it leads to, and then the files in that
folder, has one set, however often the link is renamed meanwhile. A folder is complete before the
link leads to it, and the one before it stays for a while, for whoever is reading it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from typing import TYPE_CHECKING, Final

from attestor_io.errors import OutputError
from attestor_io.folder import Folder, identity_of
from attestor_io.secret_file import SecretFile

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

_ATTEMPTS: Final = 3


class FolderLink(SecretFile):
    """A symbolic link to a folder beside it, which is placed as files are.

    Unless `keeps`, the folder that it led to before goes with the link that is replaced.
    """

    def __init__(self, path: str, target: str, *, force: bool, keeps: bool) -> None:
        self._target, self._keeps = target, keeps
        super().__init__(path, force=force)

    def _create(self) -> tuple[int, str]:
        name = self._folder.create_link(self._target)
        found = self._folder.status_of(name)
        self._identity = identity_of(found) if found else self._identity
        return -1, name

    def _check_type(self, target: os.stat_result | None) -> None:
        if target and not stat.S_ISLNK(target.st_mode):
            raise OutputError(f"{self._path} is no symbolic link that could be replaced")

    def _release(self) -> None:
        """Keep nothing open: a link is not."""

    def drop_replaced(self) -> None:
        """Remove the link that was replaced, and the folder that it led to."""
        super().drop_replaced()
        self._drop_folders()

    def close(self) -> None:
        """Remove what has a hidden name."""
        if self.replaced:
            self._drop_folders()
        super().close()

    def _drop_folders(self) -> None:
        """Remove earlier folders; what stays is for the next command."""
        if not self._keeps:
            with contextlib.suppress(OSError):
                _remove_generations(self._folder, self._name)


class Generation:
    """A new folder for files, and the link that will lead to it; a context manager.

    Leaving it without the link in its place leaves nothing. Folders of earlier generations, but for
    that of the link, are removed first. Raises OutputError.
    """

    def __init__(self, path: str, *, force: bool, keeps: bool) -> None:
        parent, name = os.path.split(path)
        self._name = name
        with contextlib.ExitStack() as unfinished, _translated(path):
            self._parent = Folder(parent)
            unfinished.callback(self._parent.close)
            _remove_generations(self._parent, name)
            self._hidden = self._make()
            unfinished.callback(self._parent.remove, self._hidden)
            unfinished.callback(self.folder.close)
            self.link = FolderLink(path, self._hidden, force=force, keeps=keeps)
            unfinished.pop_all()

    def _make(self) -> str:
        """Make the folder, and claim it before another command takes it for one of the dead."""
        for _ in range(_ATTEMPTS):
            name = self._parent.create_folder(_prefix(self._name))
            with contextlib.ExitStack() as unfinished:
                unfinished.callback(self._parent.remove, name)
                with contextlib.suppress(FileNotFoundError):
                    self.folder = Folder(name, self._parent)
                    unfinished.callback(self.folder.close)
                    self.folder.claim()
                    found = self._parent.status_of(name)
                    if found is not None and identity_of(found) == self.folder.identity():
                        self.folder.set_mode(0o755)  # the umask may have taken bits away
                        unfinished.pop_all()
                        return name
        raise FileNotFoundError(errno.ENOENT, "other commands remove what is made there")

    @property
    def parent(self) -> Folder:
        """The folder that it is in, open until it is closed."""
        return self._parent

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder, unless the link leads to it, and give the descriptors back."""
        self.link.close()
        if self._is_in_place():
            self._parent.disown(self._hidden)
        else:
            self._parent.remove(self._hidden)
        self.folder.close()
        self._parent.close()

    def _is_in_place(self) -> bool:
        """Tell whether the link leads to it, or may do so: then it must stay."""
        for _ in range(2):  # one failure may pass
            with contextlib.suppress(OSError):
                return self._parent.link_target(self._name) == self._hidden
        return True


def remove_earlier(path: str) -> None:
    """Remove the folders of all generations but that of the link at this path; raises nothing."""
    parent, name = os.path.split(path)
    with contextlib.suppress(OSError):
        folder = Folder(parent)
        try:
            _remove_generations(folder, name)
        finally:
            folder.close()


def _prefix(link: str) -> str:
    return f".attestor-{link}-"


def _remove_generations(parent: Folder, link: str) -> None:
    """Remove every generation of a link but for that it leads to, and those that are being made."""
    ours = re.compile(re.escape(_prefix(link)) + "[0-9a-f]{16}")
    for name in filter(ours.fullmatch, parent.names()):
        with contextlib.suppress(OSError):
            folder = Folder(name, parent)
            try:
                # in this order: who makes one gives it up only when the link leads to it
                if not folder.is_in_use() and parent.link_target(link) != name:
                    parent.remove(name)
            finally:
                folder.close()


@contextlib.contextmanager
def _translated(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise OutputError(f"{path} cannot be written: {reason or error}") from error
