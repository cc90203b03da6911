"""Run attestor with a signal, or an error, in the middle of writing.

    interrupt.py POINT WHAT ARGUMENT...

POINT is the function of `os` that is about to be called, "fsync-folder" the second fsync; WHAT is a
signal's name, the name of an errno, or SIGINT+SIGTERM for a second signal while the first cleans
up. With NO_TMPFILE set, files get a temporary name; with NO_EXCHANGE set, they cannot be exchanged.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Any

import attestor
from attestor_io import folder, secret_file


def without_exchange(*_: object) -> None:
    """Be a file system that has no renameat2."""
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def main() -> None:
    """Arm the point once the secret is at hand, then run the command line."""
    point, what, *arguments = sys.argv[1:]
    point, _, second = point.partition("-")
    if "NO_TMPFILE" in os.environ:
        isdir = os.path.isdir  # as where /proc is not mounted
        os.path.isdir = lambda path: path != "/proc/self/fd" and isdir(path)  # type: ignore[assignment]  # on purpose
    if "NO_EXCHANGE" in os.environ:
        folder._exchange = without_exchange  # type: ignore[assignment]  # it takes anything
    original = getattr(os, point)
    calls = iter([False, True] if second else [True])

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if not next(calls):
            return original(*args, **kwargs)
        setattr(os, point, original)
        if what.startswith("E"):
            number = getattr(errno, what)
            raise OSError(number, os.strerror(number))
        first, _, later = what.partition("+")
        if later:
            unlink = os.unlink

            def unlink_interrupted(*args: Any, **kwargs: Any) -> None:
                os.kill(os.getpid(), signal.Signals[later])
                unlink(*args, **kwargs)

            os.unlink = unlink_interrupted
        os.kill(os.getpid(), signal.Signals[first])
        return original(*args, **kwargs)

    append = secret_file.SecretFile.append

    def armed(self: secret_file.SecretFile, data: bytes) -> None:
        setattr(os, point, interrupted)
        append(self, data)

    secret_file.SecretFile.append = armed  # type: ignore[method-assign]  # the point of this program
    sys.argv[1:] = arguments
    attestor.main()


if __name__ == "__main__":
    main()
