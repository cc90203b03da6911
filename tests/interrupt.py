"""Run attestor with a signal, or an error, in the middle of writing: interrupt.py POINT WHAT ARGUMENT...

POINT is the function of `os` that is about to be called; WHAT is a signal's name or the name of an errno.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Any

import attestor


def main() -> None:
    """Arm the point once the secret is at hand, then run the command line."""
    point, what, *arguments = sys.argv[1:]
    original = getattr(os, point)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        setattr(os, point, original)
        if what.startswith("E"):
            number = getattr(errno, what)
            raise OSError(number, os.strerror(number))
        os.kill(os.getpid(), signal.Signals[what])
        return original(*args, **kwargs)

    write = attestor.SecretFile.write

    def armed(self: attestor.SecretFile, secret: bytes) -> None:
        setattr(os, point, interrupted)
        write(self, secret)

    attestor.SecretFile.write = armed  # type: ignore[method-assign]  # the point of this program
    sys.argv[1:] = arguments
    attestor.main()


if __name__ == "__main__":
    main()
