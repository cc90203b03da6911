"""Block the signals that end a command, before anything slow is imported.

They wait until `attestor_io.signals` takes them, and no traceback of an interrupted import is to
be seen. Only Python's own start, some three milliseconds, is out of reach: it installs the handler
that raises KeyboardInterrupt before it runs a line of anybody's.
"""

from __future__ import annotations

# what `signal` stands on: that one imports enum first, which takes as long as Python's own start
import _signal  # type: ignore[import-not-found]

TYPE_CHECKING = False  # of typing, which takes as long
if TYPE_CHECKING:
    from collections.abc import Iterable

_ENDING = (_signal.SIGHUP, _signal.SIGINT, _signal.SIGTERM)


_inherited: set[int] | None = None


def taken_signals(among: Iterable[int] = _ENDING) -> set[int]:
    """SIGHUP, SIGINT and SIGTERM, but for those that whoever started us ignores or blocks.

    A blocked signal is queued even if it is ignored (nohup), so that an ignored one must not be
    waited for; and one that was blocked stays so, for the program that `inject` becomes, too.
    """
    ours = set(among) - inherited_mask()
    return {number for number in ours if _signal.getsignal(number) != _signal.SIG_IGN}


def inherited_mask() -> set[int]:
    """The signals that whoever started us blocks, which a program of ours shall find blocked."""
    return _inherited or set()


def hold() -> None:
    """Block these signals in this thread, and so in all threads that it starts.

    Python's handler of SIGINT gives way to the default, by which the process is to end.
    """
    global _inherited  # noqa: PLW0603 - the mask of this process, before it was ours
    if _inherited is None:
        _inherited = set(_signal.pthread_sigmask(_signal.SIG_BLOCK, ()))
    _signal.pthread_sigmask(_signal.SIG_BLOCK, taken_signals())
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
