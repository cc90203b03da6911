"""What a run did, and what of that is a violation.

partial   a target is neither what was there before nor all of what should be there
readable  a file of the command was open to others at some moment
lost      what was there before is gone, or came back as something else
placed    a run that failed, or that a signal ended, has placed something
left      a name that is nobody's target lies beside the targets
hung      the command, or a process that it has started, had to be killed
wrong     the exit status, the signal or the words on stderr are not what the contract says
"""

from __future__ import annotations

import os
import re
import signal
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from tests.chaos.scenarios import OLD, PROGRAM_STATUS, Inputs, Scenario, Target, is_complete

if TYPE_CHECKING:
    from tests.chaos.faults import Fault
    from tests.chaos.places import Place
    from tests.chaos.state import Call

KINDS: Final = ("partial", "readable", "lost", "placed", "left", "hung", "wrong")
OUTPUT_STATUS: Final = 7
_NAMING: Final = frozenset("link rename exchange noreplace".split())
_NO_PROGRAM: Final = frozenset({126, 127})
_OURS: Final = re.compile(r"\.attestor-[0-9a-f]{16}")
_NOISE: Final = ("Traceback", "bug", "Exception ignored", "unexpected", "Error:")


class Seen(NamedTuple):
    """What lies under a name: enough to tell whether it is the same thing later."""

    inode: int
    mode: int
    links: int
    modified: int
    content: bytes


def look(path: Path) -> Seen | None:
    """Look at what lies under a name, links not followed."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(status.st_mode):
        content = os.fsencode(path.readlink())
    else:
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
    return Seen(status.st_ino, status.st_mode, status.st_nlink, status.st_mtime_ns, content)


class Before:
    """The old files of a scenario, as they are made and as they look."""

    def __init__(self, scenario: Scenario, root: Path) -> None:
        self._scenario, self._root = scenario, root
        self.targets: dict[str, Seen | None] = {}
        self.elsewhere: dict[str, Seen | None] = {}

    def make(self, layer: Path, *, hard_links: bool) -> None:
        """Put the old files into a folder tree: those with a second hard link, or the others."""
        for number, target in enumerate(self._scenario.targets):
            if (target.before == "hardlink") != hard_links:
                continue
            path = layer / target.path
            partner = layer / "e" / str(number)
            if target.before in {"symlink", "hardlink"}:
                partner.write_bytes(OLD)
                partner.chmod(0o400)
            if target.before == "file":
                path.write_bytes(OLD)
                path.chmod(0o400)
            elif target.before == "symlink":
                path.symlink_to(f"../e/{number}")
            elif target.before == "hardlink":
                path.hardlink_to(partner)

    def remember(self) -> None:
        """Note how they look now, through the file system that the command will see."""
        self.targets = {
            target.path: look(self._root / target.path) for target in self._scenario.targets
        }
        self.elsewhere = self._elsewhere()

    def _elsewhere(self) -> dict[str, Seen | None]:
        return {path.name: look(path) for path in (self._root / "e").iterdir()}

    def is_elsewhere_whole(self, *, unlinked: bool) -> bool:
        """Tell whether what links lead to is as it was, but for second names if `unlinked`."""
        now = self._elsewhere()
        for name, was in self.elsewhere.items():
            found = now.pop(name, None)
            if found is None or was is None or found.content != was.content:
                return False
            if not unlinked and found != was:
                return False
        return not now


@dataclass(slots=True)
class Ending:
    """How a run ended: what waitpid said, whether it had to be killed, what it wrote to stderr."""

    status: int | None = None
    signal: int = 0
    hung: bool = False
    said: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        how = signal.Signals(self.signal).name if self.signal else f"status {self.status}"
        return f"{'hung, ' if self.hung else ''}{how}{', said: ' if self.said else ''}{self.said}"


@dataclass(slots=True)
class Trace:
    """What the shim saw of a run."""

    calls: list[Call]
    hit: bool
    hit_entry: int
    hit_in_helper: bool
    executing: bool
    readable: bool


@dataclass(slots=True)
class Verdict:
    """The violations of one run, each with what was seen."""

    found: list[tuple[str, str]] = field(default_factory=list)

    def add(self, kind: str, what: str) -> None:
        """Note one violation."""
        self.found.append((kind, what))


class Judge:
    """Holds one run against the contract."""

    def __init__(
        self, scenario: Scenario, place: Place, fault: Fault, inputs: Inputs, before: Before
    ) -> None:
        self._scenario, self._place, self._fault = scenario, place, fault
        self._inputs, self._before = inputs, before
        self._root = Path(inputs.root)

    def judge(self, ending: Ending, trace: Trace) -> Verdict:
        """Say what is wrong with a run, before anything is cleaned up."""
        verdict = Verdict()
        killed = ending.signal == signal.SIGKILL and not ending.hung
        if ending.hung:
            verdict.add("hung", str(ending))
        if trace.readable:
            verdict.add("readable", "a file had bits for group or others")
        states = {target.path: self._state(target) for target in self._scenario.targets}
        self._check_states(verdict, states, killed=killed or self._helper_was_killed(trace))
        if not (killed or ending.hung):
            self._check_ending(verdict, ending, trace, set(states.values()))
        return verdict

    def _helper_was_killed(self, trace: Trace) -> bool:
        return trace.hit_in_helper and self._fault.value == signal.SIGKILL

    def _state(self, target: Target) -> str:
        """Tell old from new, and both from violations."""
        was, found = self._before.targets[target.path], look(self._root / target.path)
        if found == was:
            return "old"
        if found is None or (was is not None and found.content == was.content):
            return "lost"
        wanted = stat.S_IFREG | target.mode
        complete = is_complete(target.kind, found.content, self._inputs)
        return "new" if complete and found.mode == wanted else "partial"

    def _check_states(self, verdict: Verdict, states: dict[str, str], *, killed: bool) -> None:
        hidden = self.hidden()
        for name, state in states.items():
            was, found = self._before.targets[name], look(self._root / name)
            kept = killed and was is not None and self._is_kept(was, hidden)
            if state in {"partial", "lost"} and not (state == "lost" and kept):
                verdict.add(state, f"{name} was {_brief(was)}, is {_brief(found)}")
            if state == "new" and found is not None and found.links != 1 and not killed:
                verdict.add("left", f"{name} has {found.links} links")
        unlinked = killed or "new" in states.values()
        if not self._before.is_elsewhere_whole(unlinked=unlinked):
            verdict.add("lost", "what a link pointed to is not as it was")
        for path in hidden:
            if not killed or not self._is_admitted(path):
                verdict.add("left", str(path.relative_to(self._root)))

    def hidden(self) -> list[Path]:
        """List the names beside the targets that are not targets."""
        targets = {self._root / target.path for target in self._scenario.targets}
        return [
            path for name in "tu" for path in (self._root / name).iterdir() if path not in targets
        ]

    def _is_admitted(self, path: Path) -> bool:
        """Tell whether a killed run may leave this: a name of ours that nobody else can read."""
        found = look(path)
        return (
            found is not None
            and _OURS.fullmatch(path.name) is not None
            and (stat.S_ISLNK(found.mode) or not stat.S_IMODE(found.mode) & 0o077)
        )

    @staticmethod
    def _is_kept(was: Seen, hidden: list[Path]) -> bool:
        return any(
            found is not None and (found.inode, found.content) == (was.inode, was.content)
            for found in map(look, hidden)
        )

    def _check_ending(
        self, verdict: Verdict, ending: Ending, trace: Trace, states: set[str]
    ) -> None:
        expected = self._expected(trace)
        number = ending.signal or (ending.status or 0) - 128
        signalled = not trace.hit_in_helper and number in self._fault.signals
        if signalled and "signal" in expected:
            became = self._scenario.program and trace.executing
            if "new" in states and not (became and states <= {"new", "old"}):
                verdict.add("placed", f"{ending}, with {sorted(states)}")
        elif not ending.signal and ending.status in expected:
            wanted = "new" if ending.status == self._success else "old"
            if states - {"partial", "lost"} - {wanted}:
                kind = "placed" if wanted == "old" else "wrong"
                verdict.add(kind, f"{ending}, with {sorted(states)}")
        else:
            verdict.add("wrong", f"{ending}, expected one of {sorted(map(str, expected))}")
        self._check_words(verdict, ending, signalled=signalled)

    @property
    def _success(self) -> int:
        return PROGRAM_STATUS if self._scenario.program else 0

    def _expected(self, trace: Trace) -> set[int | str]:
        """Return the exit statuses that may be, and "signal" where the one sent may end it."""
        fault, scenario = self._fault, self._scenario
        usual: set[int | str] = {scenario.status}
        if scenario.status in _NO_PROGRAM:
            usual |= _NO_PROGRAM
        if self._place.full:
            # a program that cannot be run may be found before the disk is known to be full
            usual = {OUTPUT_STATUS, *(usual & _NO_PROGRAM)}
        if fault.function is None:
            return usual | ({"signal"} if fault.signals else set())
        if not trace.hit:
            return usual
        expected = set(usual)
        if fault.fails:
            expected.add(OUTPUT_STATUS)
            if fault.function == "execve" or scenario.status in _NO_PROGRAM:
                expected |= _NO_PROGRAM
        if fault.signals and not trace.hit_in_helper:
            expected.add("signal")
            if self._must_end_it(trace):
                expected -= usual
        return expected

    def _must_end_it(self, trace: Trace) -> bool:
        """Tell whether the signal came so early that nothing but its end is right.

        That is: before the last target was made durable, and so before any had its name; with a
        program, at any time before it took over.
        """
        if self._fault.fails:
            return False
        if self._scenario.program and self._scenario.status == PROGRAM_STATUS:
            return not self._place.full
        names = {Path(target.path).name for target in self._scenario.targets}
        for number, call in enumerate(trace.calls):
            if call.function in _NAMING and call.second in names:
                syncs = [one for one in range(number) if trace.calls[one].function == "fsync"]
                return bool(syncs) and trace.hit_entry <= syncs[-1]
        return False

    def _check_words(self, verdict: Verdict, ending: Ending, *, signalled: bool) -> None:
        may_fail = self._fault.fails or self._place.full or self._scenario.status in _NO_PROGRAM
        quiet = (signalled and not may_fail) or ending.status == self._success
        if any(word in ending.said for word in _NOISE) or (quiet and ending.said):
            verdict.add("wrong", f"stderr of {ending}")
        elif not quiet and not signalled and "attestor: error: " not in ending.said:
            verdict.add("wrong", f"no error message: {ending}")

    def judge_after_another(self, ending: Ending) -> Verdict:
        """Say what is wrong after one more run that nothing happened to."""
        verdict = Verdict()
        if ending.hung or ending.signal or ending.status != self._success or ending.said:
            verdict.add("wrong", f"the next run: {ending}")
        for path in self.hidden():
            verdict.add("left", f"{path.relative_to(self._root)}, after the next run too")
        for target in self._scenario.targets:
            if self._state(target) != "new":
                verdict.add("partial", f"{target.path} after the next run")
        return verdict


def _brief(seen: Seen | None) -> str:
    if seen is None:
        return "absent"
    kind = "a link" if stat.S_ISLNK(seen.mode) else "a file"
    old = " of old bytes" if seen.content == OLD else ""
    return (
        f"{kind}{old}, inode {seen.inode}, mode {stat.S_IMODE(seen.mode):04o}, "
        f"{seen.links} links, {len(seen.content)} bytes"
    )
