"""One worker: a process that has imported everything once and forks for each run.

Reads jobs from standard input, one JSON object a line, and answers each with one line. It makes a
run cheaper in two ways: a run is forked from a process in which all modules are imported already,
and it finds its RSA key made. Whole processes, which get neither, are run for a sample, and their
calls are compared.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import random
import re
import select
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from tests.chaos import faults, places
from tests.chaos.judge import KINDS, OUTPUT_STATUS, Before, Ending, Judge, Trace, Verdict
from tests.chaos.scenarios import SCENARIOS, Inputs
from tests.chaos.state import State

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.chaos.faults import Fault

DEADLINE: Final = 60.0  # seconds, after which a run hangs: generous, for a busy machine
_HELPER_STARTS: Final = 0.3
_HELPERS_DEADLINE: Final = 20.0
_PR_SET_CHILD_SUBREAPER: Final = 36  # linux/prctl.h
_SAID_MAX: Final = 2000
_PATIENT_MS: Final = 250
_RANDOM: Final = re.compile(r"[0-9a-f]{16}|(?<=/fd/)\d+")


@dataclass(slots=True)
class Job:
    """What to do with one scenario in one place.

    `limit` is the number of enumerated runs, -1 for all; `random_runs` and `whole` those of random
    and of whole processes. `only` names one fault, and `as_whole` runs it as a whole process.
    """

    scenario: str
    place: str
    limit: int = -1
    random_runs: int = 0
    whole: int = 0
    seed: int = 0
    only: str | None = None
    as_whole: bool = False


@dataclass(slots=True)
class Result:
    """What came of a job; `violations` has the name of a run, the kind, and what was seen."""

    scenario: str
    place: str
    possible: int = 0
    enumerated: int = 0
    random_runs: int = 0
    whole: int = 0
    missed: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    endings: dict[str, int] = field(default_factory=dict)
    violations: list[tuple[str, str, str]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Runner:
    """Runs of one job, in the process that has the place mounted."""

    def __init__(self, job: Job, inputs: Inputs, state: State, said: int) -> None:
        self._job, self._inputs, self._state, self._said = job, inputs, state, said
        self.scenario = SCENARIOS[job.scenario]
        self.place = places.PLACES[job.place]
        self._root = Path(inputs.root)
        self._mounted = places.Mounted(self.place, self._root)
        self.result = Result(job.scenario, job.place, counts=dict.fromkeys(KINDS, 0))

    def one(self, fault: Fault, *, whole: bool = False) -> tuple[Ending, Trace]:
        """Do one run and count what is wrong with it."""
        self._beside = 0
        before = self._prepare()
        self._state.choose(fault)
        arguments = self.scenario.arguments(self._inputs)
        ending = self._start(arguments, fault, whole=whole)
        trace = self._trace()
        judge = Judge(self.scenario, self.place, fault, self._inputs, before)
        verdict = judge.judge(ending, trace)
        if signal.SIGKILL in {ending.signal, *fault.signals} and not ending.hung:
            verdict.found += self._again(judge).found
        allowed = {0, OUTPUT_STATUS} if self.place.small else {0}
        if self._beside not in allowed:
            verdict.add("wrong", f"the other command ended with {self._beside}")
        kinds = {kind for kind, _ in verdict.found}
        if kinds == {"wrong"} and fault.function and fault.signals and fault.pause_ms < _PATIENT_MS:
            # on a busy machine a thread may not have had the time to take the signal: once more
            return self.one(replace(fault, pause_ms=_PATIENT_MS), whole=whole)
        self._count(fault, verdict, ending, whole=whole)
        if fault.function is not None and not trace.hit:
            self.result.missed += 1
        return ending, trace

    def _prepare(self) -> Before:
        """Make the place as the scenario wants it before each run."""
        before = Before(self.scenario, self._root)
        layer = self._mounted.empty()
        before.make(layer, hard_links=False)
        self._mounted.mount_overlay()
        before.make(self._root, hard_links=True)
        before.remember()
        if self.place.full:
            self._mounted.fill()
        self._state.reset(self._root)
        self.place.refuse(self._state)
        return before

    def _again(self, judge: Judge) -> Verdict:
        """Do one more run, to which nothing happens: it removes what the killed one has left."""
        self._mounted.relieve()
        self._state.reset(self._root)
        self.place.refuse(self._state)
        arguments = self.scenario.arguments(self._inputs, again=True)
        return judge.judge_after_another(self._start(arguments, faults.NOTHING))

    def _start(self, arguments: Sequence[str], fault: Fault, *, whole: bool = False) -> Ending:
        os.ftruncate(self._said, 0)
        self._state.raw.armed = 1
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _become(arguments, self._said, self._state.path if whole else None)
        if fault.stops:
            self._write_beside(child)
        ending = _watch(child, fault, started)
        ending.hung |= not self._reap_helpers(fault)
        self._state.raw.armed = 0
        ending.seconds = time.monotonic() - started
        self._child = child
        said = os.pread(self._said, _SAID_MAX, 0).decode(errors="replace")
        ending.said = " | ".join(said.splitlines())
        return ending

    def _write_beside(self, child: int) -> None:
        """Let another write into the folder of a command that stands still, and let that go on."""
        deadline = time.monotonic() + DEADLINE
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while not self._state.raw.hit_process:
            if time.monotonic() > deadline:
                return
            if os.waitid(os.P_PID, child, ended):  # it may be a helper that will stand still
                deadline = min(deadline, time.monotonic() + _HELPER_STARTS)
            time.sleep(0.001)
        time.sleep(0.005)  # the signal comes just behind the mark
        other = self._root / "t" / "other"
        beside = os.fork()
        if beside == 0:
            command = ["decrypt", "--any-key", f"{self._inputs.folder}/blob", str(other)]
            _become(command, os.open(os.devnull, os.O_WRONLY), None, watched=False)
        _, waited = os.waitpid(beside, 0)
        self._beside = os.waitstatus_to_exitcode(waited)
        other.unlink(missing_ok=True)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._state.raw.hit_process, signal.SIGCONT)

    def _reap_helpers(self, fault: Fault) -> bool:
        """Wait until nothing that a command has started is left; False if that took too long."""
        deadline = time.monotonic() + _HELPERS_DEADLINE
        while True:
            try:
                found, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            stopped = self._state.raw.hit_process if fault.stops else 0
            if stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(stopped, signal.SIGCONT)
            if found == 0:
                if time.monotonic() > deadline:
                    _kill_children()
                    return False
                time.sleep(0.002)

    def _trace(self) -> Trace:
        raw = self._state.raw
        return Trace(
            self._state.calls(),
            hit=bool(raw.hit),
            hit_entry=raw.hit_entry,
            hit_in_helper=bool(raw.hit) and raw.hit_process != self._child,
            executing=bool(raw.executing),
            readable=bool(raw.readable),
        )

    def _count(self, fault: Fault, verdict: Verdict, ending: Ending, *, whole: bool) -> None:
        name = f"{self.scenario.name}/{self.place.name}/{fault.text}" + ("/whole" if whole else "")
        for kind in {kind for kind, _ in verdict.found}:
            self.result.counts[kind] += 1
        self.result.violations += [(name, kind, what) for kind, what in verdict.found]
        how = signal.Signals(ending.signal).name if ending.signal else str(ending.status)
        self.result.endings[how] = self.result.endings.get(how, 0) + 1

    # -- the parts of a job

    def do(self) -> Result:
        """Do all of the job."""
        started = time.monotonic()
        if self._job.only is not None:
            self._do_only(faults.parse(self._job.only))
            return self.result
        ending, trace = self.one(faults.NOTHING)
        functions = [call.function for call in trace.calls]
        chosen = faults.enumerate_faults(functions, fills=self.place.fills)
        self.result.possible = len(chosen)
        if self._job.limit >= 0:
            chosen = chosen[: self._job.limit]
        for fault in chosen:
            self.one(fault)
        self.result.enumerated = 1 + len(chosen)
        self._do_random(ending.seconds)
        self._do_whole(trace, chosen)
        self.result.seconds = time.monotonic() - started
        return self.result

    def _do_only(self, fault: Fault) -> None:
        ending, trace = self.one(fault, whole=self._job.as_whole)
        self.result.enumerated = 1
        marks = {trace.hit_entry: "  <- here"} if trace.hit else {}
        self.result.log = [
            f"{number:3} {call}{marks.get(number, '')}" for number, call in enumerate(trace.calls)
        ]
        self.result.log.append(f"{ending} after {ending.seconds:.3f} s")

    def _do_random(self, seconds: float) -> None:
        """Send signals at random times of a run, or a little later; half of them kill."""
        key = f"{self._job.seed}/{self.scenario.name}/{self.place.name}"
        chance = random.Random(key)  # noqa: S311 - the same times again for the same seed
        for _ in range(self._job.random_runs):
            others = chance.choice(faults.SIGNALS)
            number = signal.SIGKILL if chance.random() < 0.5 else others
            at = chance.uniform(0, 1.1 * seconds)
            self.one(faults.parse(f"at:{at:.4f}:{number.name}"))
            self.result.random_runs += 1

    def _do_whole(self, forked: Trace, chosen: Sequence[Fault]) -> None:
        """Do some as whole processes, for which nothing is imported, and no key made, before."""
        if not self._job.whole:
            return
        _, trace = self.one(faults.NOTHING, whole=True)
        if _shape(trace) != _shape(forked):
            what = f"{_shape(trace)} as a whole process, {_shape(forked)} forked"
            name = f"{self.scenario.name}/{self.place.name}/none/whole"
            self.result.violations.append((name, "wrong", f"calls differ: {what}"))
            self.result.counts["wrong"] += 1
        for fault in chosen[: self._job.whole - 1]:
            self.one(fault, whole=True)
        self.result.whole = 1 + len(chosen[: self._job.whole - 1])


def _shape(trace: Trace) -> list[str]:
    """Return the calls with random names made alike, for a comparison."""
    return [_RANDOM.sub("*", str(call)) for call in trace.calls]


def _watch(child: int, fault: Fault, started: float) -> Ending:
    """Wait for a child, and for what it may have started; send it the signal of a random run."""
    ending = Ending()
    watched = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(watched, select.POLLIN)
        if fault.function is None and fault.signals:
            left = started + fault.seconds - time.monotonic()
            if left > 0:
                time.sleep(left)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(watched, fault.value)
        ending.hung = not poll.poll(DEADLINE * 1000)
    finally:
        os.close(watched)
    if ending.hung:
        os.kill(child, signal.SIGKILL)
    _, waited = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(waited)
    ending.status, ending.signal = (code, 0) if code >= 0 else (None, -code)
    return ending


def _kill_children() -> None:
    """End what is left below this process, so that the next run starts alone."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                os.kill(int(path.parent.name), signal.SIGKILL)


def _become(
    arguments: Sequence[str], said: int, whole: Path | None, *, watched: bool = True
) -> NoReturn:
    """Become the command, with streams of its own; `whole` execs the installed one."""
    try:
        os.lseek(said, 0, os.SEEK_SET)
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor, source in ((0, nothing), (1, nothing), (2, said)):
            os.dup2(source, descriptor)
        os.umask(0)  # so that a mode that is not asked for shows
        if whole is not None:
            command = str(Path(sys.executable).with_name("attestor"))
            environment = {**os.environ, "CHAOS_STATE": str(whole)}
            os.execve(command, [command, *arguments], environment)  # noqa: S606 - no shell
        if watched:
            _state.attach()
        sys.argv[:] = ["attestor", *arguments]
        import attestor

        attestor.main()
    finally:
        os._exit(99)


def _prepare_imports(inputs: Inputs) -> None:
    """Import what the commands import, fill the caches of these modules, and make the RSA key."""
    import aws_encryption_sdk  # noqa: F401
    import botocore.session
    import cbor2  # noqa: F401
    import click
    from cryptography.hazmat.primitives.asymmetric import rsa

    import attestor
    import attestor_commands.inject.run
    import attestor_commands.inject.sources  # noqa: F401
    import nsm.device
    import nsm.document
    import nsm.entropy
    import nsm.library  # noqa: F401

    context = click.Context(attestor.cli)
    for name in attestor.cli.list_commands(context):
        attestor.cli.get_command(context, name)
    botocore.session.Session().create_client("kms")
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    made: Callable[..., Any] = lambda **_: key  # noqa: E731
    rsa.generate_private_key = made


_state: State


def _do(job: Job, inputs: Inputs, state: State) -> None:
    """Do one job, in a process of its own; its answer goes to standard output."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    places.enter_namespace()
    said = os.memfd_create("said")
    result = Runner(job, inputs, state, said).do()
    print(json.dumps(asdict(result)), flush=True)  # noqa: T201 - the answer


def main() -> None:
    """Serve jobs until standard input ends."""
    global _state  # noqa: PLW0603 - inherited by every fork
    folder, library, file = map(Path, sys.argv[1:])
    inputs = Inputs.load(folder)
    _state = State(library, file)
    _prepare_imports(inputs)
    # a signal may come before the command has looked at it: then it ends that process too; and
    # whoever started this one (nohup, a shell's &) may have it ignored or blocked
    for number in faults.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                _do(Job(**json.loads(line)), inputs, _state)
                os._exit(0)
            finally:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"a job failed: {line}")


if __name__ == "__main__":
    main()
