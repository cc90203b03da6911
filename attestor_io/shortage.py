"""What a process raises that has too little memory, too few descriptors or threads."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_MEMORY: Final = "too little memory"
_ERRNOS: Final = {
    errno.ENOMEM: _MEMORY,
    errno.EMFILE: "too few descriptors: this process may open no further file",
    errno.ENFILE: "too few descriptors: the system may open no further file",
}
_X509_OUT_OF_MEMORY: Final = 17  # X509_V_ERR_OUT_OF_MEM: a certificate that was not even looked at
# What has no number: threads (_thread), shared objects (dlopen(3)), and OpenSSL's and Python's own
_TEXTS: Final = {
    "can't start new thread": "too little memory, or too few threads allowed, to start one",
    "can't allocate lock": _MEMORY,
    "failed to map segment": _MEMORY,
    "annot allocate memory": _MEMORY,
    "malloc failure": _MEMORY,
}


def shortage(error: BaseException) -> str | None:
    """Say what there was too little of, if that caused an exception: "too little memory".

    A shortage comes out wherever it happens: of an import, a thread, a file or a library, and often
    as the cause of an error that would mean something else.
    """
    return next(filter(None, map(_named, causes(error))), None)


def _named(error: BaseException) -> str | None:
    if isinstance(error, MemoryError):
        return _MEMORY
    if getattr(error, "verify_code", None) == _X509_OUT_OF_MEMORY:
        return _MEMORY
    number = getattr(error, "errno", None)  # of an OSError, and of an NsmError
    if isinstance(number, int) and number in _ERRNOS:
        return _ERRNOS[number]
    if not isinstance(error, ImportError | OSError | RuntimeError):
        return None
    said = str(error)
    return next((what for text, what in _TEXTS.items() if text in said), None)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it was raised from, also where libraries hand it on as an argument."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        inner = getattr(error, "kwargs", {}).get("error") or next(
            (argument for argument in error.args if isinstance(argument, BaseException)), None
        )
        error = inner or error.__cause__ or error.__context__
