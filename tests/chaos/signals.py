"""Whole processes of `attestor decrypt`, each with one signal at a random time after its start.

Each must end as that signal ends a process, with the target as it was before, or with 0 and the
complete target; in both cases promptly, and without a word on stderr. One case is counted by
itself: SIGINT while Python starts, some milliseconds before it runs a line of ours, is a
KeyboardInterrupt in its `site` module, or before it has found ours, with Python's own words and
status.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Final, NamedTuple

from tests.chaos import driver, faults
from tests.chaos.scenarios import OLD, PLAINTEXT, Inputs

PROMPT: Final = 1.0  # seconds, on a machine that has nothing else to do
LATE: Final = 10.0  # seconds, on one that has
HUNG: Final = 60.0
_PYTHON_STARTS: Final = "Fatal Python error: init_import_site"
_NO_FRAME: Final = "KeyboardInterrupt\n"  # without a traceback: no line of Python ran yet
LATEST: Final = 0.7  # seconds after the start of a process


class Outcome(NamedTuple):
    """What one process did: the words for the table, the seconds from the signal to its end."""

    signal: str
    at: float
    ended: str
    violation: str
    seconds: float


def run(count: int, seed: int) -> int:
    """Run so many processes, two at a time; print a table, and return the exit status."""
    started = time.monotonic()
    for number in faults.SIGNALS:  # the processes must not inherit an ignored one (nohup)
        signal.signal(number, signal.default_int_handler)
    chance = random.Random(seed)  # noqa: S311 - the same times again for the same seed
    plan = [
        (number, chance.choice(faults.SIGNALS), chance.uniform(0, LATEST))
        for number in range(count)
    ]
    outcomes: list[Outcome] = []
    with driver.surroundings() as (folder, _, inputs):

        def work(first: int) -> None:
            for number, which, at in plan[first :: driver.WORKERS]:
                outcomes.append(_one(folder / f"run-{number}", inputs, which, at))

        threads = [threading.Thread(target=work, args=(one,)) for one in range(driver.WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if len(outcomes) < count:
        raise RuntimeError("a thread of this test has failed")
    return _report(outcomes, started)


def _one(folder: Path, inputs: Inputs, which: signal.Signals, at: float) -> Outcome:
    """Start a process, send it the signal, and judge how it ended."""
    folder.mkdir()
    out = folder / "out"
    force = at * 1000 % 2 < 1  # half of them replace an old file
    if force:
        out.write_bytes(OLD)
    command = [str(Path(sys.executable).with_name("attestor")), "decrypt", "--any-key"]
    child = subprocess.Popen(
        [*command, *(["--force"] if force else []), f"{inputs.folder}/blob", str(out)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    time.sleep(at)
    sent = time.monotonic()
    child.send_signal(which)
    try:
        _, said = child.communicate(timeout=HUNG)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return Outcome(which.name, at, "hung", "hung", HUNG)
    took = time.monotonic() - sent
    ended, violation = _judge(child.returncode, which, out, said, force=force)
    if not violation and took > LATE:
        violation = f"ended after {took:.1f} s"
    return Outcome(which.name, at, ended, violation, took)


def _judge(
    status: int, which: signal.Signals, out: Path, said: bytes, *, force: bool
) -> tuple[str, str]:
    """Return the words for the table, and the violation if there is one."""
    found = out.read_bytes() if out.exists() else None
    old = OLD if force else None
    names = set(os.listdir(out.parent)) - {"out"}
    ended = f"status {status}" if status >= 0 else signal.Signals(-status).name
    words = said.decode(errors="replace")
    starting = words.startswith(_PYTHON_STARTS) or words == _NO_FRAME
    if which == signal.SIGINT and status == 1 and starting:
        changed = found != old or names
        return "Python's start", "Python's start, and the folder changed" if changed else ""
    if status not in {0, -which}:
        return ended, f"ended with {ended}, and stderr has {words[-300:]!r}"
    if found != (PLAINTEXT if status == 0 else old):
        return ended, f"{ended}, and the target is {'absent' if found is None else found[:40]!r}"
    if names:
        return ended, f"{ended}, and there is {names}"
    if said:
        return ended, f"{ended}, and stderr has {words[-300:]!r}"
    return ended, ""


def _report(outcomes: list[Outcome], started: float) -> int:
    """Print counts by signal and end, the slowest, and every violation."""
    counts = Counter((one.signal, one.ended) for one in outcomes)
    for (which, ended), number in sorted(counts.items()):
        driver.show(f"{which:<8} ended with {ended:<14} {number:>6}")
    wrong = [one for one in outcomes if one.violation]
    for one in wrong:
        driver.show(f"{one.signal} at {one.at:.4f} s: {one.violation}")
    slowest = max(one.seconds for one in outcomes)
    slow = sum(one.seconds > PROMPT for one in outcomes)
    driver.show(
        f"{len(outcomes)} processes in {time.monotonic() - started:.0f} s: {len(wrong)} wrong; "
        f"the slowest ended {slowest:.3f} s after its signal, {slow} later than {PROMPT:g} s"
    )
    return int(bool(wrong))
