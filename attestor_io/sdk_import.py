"""The SDK's names that sessions are made of, imported without what no command reads.

botocore imports the writers of its documentation, an HTML parser among them, for docstrings of each
method; urllib3 imports the metadata of installed packages, zip files included, to ask for h2's
version. Without them `decrypt` starts in 5 % fewer instructions and 2 MiB less. Only the process of
a command imports the SDK here: `attested()` takes the client that a program made as it is.
"""

from __future__ import annotations

import importlib
import os.path
import sys
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Self

import botocore

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class _NoText(str):
    """In place of a docstring that the SDK would write when somebody asks for help."""

    __slots__ = ()

    def __new__(cls, *_: object, **__: object) -> Self:
        """Take what it would be written from."""
        return super().__new__(cls)


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


class _Placeholder(ModuleType):
    """A module with the names that are asked of it in passing; any other is the real one's."""

    def __init__(self, name: str, names: Mapping[str, object]) -> None:
        super().__init__(name)
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # what the import system looks for
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


_PLACEHOLDERS: Final[Mapping[str, Mapping[str, object]]] = {
    "importlib.metadata": {"version": _version},
    # its other modules are found, should one be wanted
    "botocore.docs": {"__path__": [os.path.join(folder, "docs") for folder in botocore.__path__]},
    "botocore.docs.docstring": dict.fromkeys(
        ("ClientMethodDocstring", "PaginatorDocstring", "WaiterDocstring"), _NoText
    ),
}


@contextmanager
def _placeholders() -> Iterator[None]:
    """Modules in place of those that are not loaded yet; gone at the end."""
    placed = {
        name: _Placeholder(name, names)
        for name, names in _PLACEHOLDERS.items()
        if name not in sys.modules
    }
    modules: dict[str, Any] = sys.modules
    modules.update(placed)
    try:
        yield
    finally:
        for name, module in placed.items():
            if modules.get(name) is module:
                del modules[name]


with _placeholders():
    from botocore import handlers
    from botocore.hooks import HierarchicalEmitter
    from botocore.loaders import JSONFileLoader, Loader
    from botocore.session import Session

__all__ = ["HierarchicalEmitter", "JSONFileLoader", "Loader", "Session", "handlers"]
