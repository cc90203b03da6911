"""What can go wrong at a call: plausible errnos of each function, signals, a disk that fills."""

from __future__ import annotations

import errno
import hashlib
import re
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.chaos import state

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ERRNOS: Final = {
    "open": "EACCES EMFILE ENOSPC EIO EOPNOTSUPP ENOMEM EINTR",
    "write": "ENOSPC EIO EDQUOT EINTR",
    "fsync": "EIO ENOSPC EDQUOT",
    "fchmod": "EPERM EIO EROFS",
    "fchown": "EPERM EIO",
    "link": "EEXIST EMLINK ENOSPC EIO EPERM EDQUOT",
    "rename": "EIO ENOSPC EPERM EBUSY EXDEV",
    "exchange": "EIO ENOSPC EPERM EINVAL ENOSYS",
    "noreplace": "EIO ENOSPC EPERM EINVAL ENOSYS EEXIST",
    "unlink": "EIO EPERM EBUSY",
    "symlink": "ENOSPC EIO",
    "stat": "EIO EACCES ENOMEM",
    "fstat": "EIO ENOMEM",
    "access": "EIO EACCES EROFS",
    "readlink": "EIO EACCES",
    "lock": "EWOULDBLOCK EINTR ENOLCK EBADF EIO",
    "truncate": "EIO ENOSPC",
    "close": "",
    "opendir": "EACCES EMFILE ENOMEM",
    "readdir": "EIO",
    "mkdir": "ENOSPC EIO",
    "execve": "ENOENT EACCES ENOEXEC E2BIG ENOMEM EIO ETXTBSY",
}
"""What each function of the shim may fail with; a close never fails, it only meets signals."""

SCARCE: Final = {
    "open": "EMFILE ENOSPC",
    "write": "ENOSPC",
    "link": "ENOSPC EMLINK",
    "symlink": "ENOSPC",
    "mkdir": "ENOSPC",
    "opendir": "EMFILE",
}
"""What runs out: from that call on, every further one of the function fails as well."""

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PASSIVE: Final = frozenset("stat fstat access readlink lock close opendir readdir".split())
# between these calls a folder is locked, and another command waits for that a few seconds
_LISTING: Final = frozenset("lock opendir readdir".split())
_PASSIVE_SHARE: Final = 3  # of these calls a selection has so many times fewer
PROMPT_MS: Final = 15  # between raising a signal and the call: time in which a thread can take it
_TEXT: Final = re.compile(r"([a-z]+):(\d+):([a-z-]*)([A-Z0-9]*)(\+(SIG[A-Z]+)@(\d+))?")
_RANDOM: Final = re.compile(r"at:(\d+\.\d+):(SIG[A-Z]+)")


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong; `text` names it on the command line.

    `function` None with a signal in `value` means that the signal comes `seconds` after the start;
    without one nothing happens at all.
    """

    text: str
    function: str | None = None
    occurrence: int = 0
    action: int = 0
    value: int = 0
    sticky: bool = False
    pause_ms: int = PROMPT_MS
    then_signal: int = 0
    then_after: int = 0
    seconds: float = 0.0

    @property
    def signals(self) -> frozenset[int]:
        """Return the signals that come and may end a process."""
        raised = self.function is None or self.action in {state.SIGNAL_BEFORE, state.SIGNAL_AFTER}
        return frozenset({self.value * raised, self.then_signal}) - {0, signal.SIGSTOP}

    @property
    def stops(self) -> bool:
        """Tell whether the process stands still until another has written into its folder."""
        return self.action == state.SIGNAL_BEFORE and self.value == signal.SIGSTOP

    @property
    def fails(self) -> bool:
        """Tell whether a call fails."""
        return self.action in {state.FAIL, state.FILL}


NOTHING: Final = Fault("none")


def parse(text: str) -> Fault:
    """Return the fault of a name; raises ValueError."""
    if text == NOTHING.text:
        return NOTHING
    if found := _RANDOM.fullmatch(text):
        return Fault(text, value=signal.Signals[found[2]], seconds=float(found[1]))
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ValueError(f"no fault is called {text}")
    function, occurrence, manner, what, _, then, after = found.groups()
    actions = {"before-": state.SIGNAL_BEFORE, "after-": state.SIGNAL_AFTER, "fill": state.FILL}
    action = actions.get(manner, state.FAIL)
    value = 0
    if action != state.FILL:
        value = getattr(errno, what) if action == state.FAIL else signal.Signals[what]
    return Fault(
        text,
        function,
        int(occurrence),
        action,
        value,
        sticky=manner == "always-",
        then_signal=signal.Signals[then] if then else 0,
        then_after=int(after or 0),
    )


def enumerate_faults(functions: Sequence[str], *, fills: bool) -> list[Fault]:
    """List every fault at every call of an undisturbed run, always in the same order.

    `functions` names the calls in their order. The order is that of a hash, so that any number of
    them from the front is a fair selection, with fewer of the calls that change nothing. With
    `fills` the disk becomes full before each call.
    """
    texts: list[str] = []
    counts: dict[str, int] = {}
    for function in functions:
        counts[function] = counts.get(function, 0) + 1
        place = f"{function}:{counts[function]}"
        texts += [f"{place}:{one}" for one in _at_call(function, fills=fills)]
    texts.sort(key=_turn)
    return [parse(text) for text in texts]


def _turn(text: str) -> int:
    turn = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return turn * _PASSIVE_SHARE if text.partition(":")[0] in _PASSIVE else turn


def _at_call(function: str, *, fills: bool) -> Iterator[str]:
    if fills:
        yield "fill"
    errnos = ERRNOS[function].split()
    yield from errnos
    yield from (f"always-{one}" for one in SCARCE.get(function, "").split())
    for number in (*SIGNALS, signal.SIGKILL):
        yield f"before-{number.name}"
        yield f"after-{number.name}"
    yield "before-SIGTERM+SIGHUP@1"  # a second one while the first is being dealt with
    if function not in _LISTING:
        yield "before-SIGSTOP"
    # while the failure is being undone, at the first three calls of that
    yield from (f"{one}+SIGTERM@{after}" for one in errnos[:1] for after in (1, 2, 3))
