"""Starts the simulated KMS and the workers, hands out jobs, and says what came of them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nitrosim.world import World
from tests.chaos import state
from tests.chaos.judge import KINDS
from tests.chaos.scenarios import Inputs, write_inputs
from tests.chaos.worker import Job, Result

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT: Final = Path(__file__).parent.parent.parent
WORKERS: Final = 2
SHOWN: Final = 20  # violations of one job
# who may do what is not tested here
_POLICY: Final = """{"Version": "2012-10-17", "Statement": [
    {"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "kms:*", "Resource": "*"}]}"""


class NoNamespacesError(Exception):
    """Nobody may mount here."""


@contextlib.contextmanager
def surroundings() -> Iterator[tuple[Path, Path, Inputs]]:
    """Make a folder with the shim and the inputs, and lead os.environ into a simulated world."""
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-"))
        world = stack.enter_context(World(key_policy=_POLICY))
        folder = Path(name).resolve()
        environment = world.environment(os.environ) | {"PYTHONPATH": str(ROOT)}
        os.environ.clear()
        os.environ.update(environment)
        library = state.build(folder)
        # the kind of path that targets have must not depend on the machine
        inputs = write_inputs(folder, folder / "place", world)
        yield folder, library, inputs


def namespace() -> list[str]:
    """Return the command that gives another one mounts of its own; raises NoNamespacesError."""
    root = [] if os.geteuid() == 0 else ["--map-root-user"]
    command = ["unshare", *root, "--mount"]
    try:
        tried = [*command, "mount", "-t", "tmpfs", "none", "/mnt"]
        done = subprocess.run(tried, capture_output=True, check=False, text=True)
    except FileNotFoundError:
        raise NoNamespacesError("unshare (util-linux) is not installed") from None
    if done.returncode:
        raise NoNamespacesError(f"{' '.join(tried)}: {done.stderr.strip()}")
    return command


def run(jobs: Sequence[Job], folder: Path, library: Path) -> list[Result]:
    """Do all jobs, in two workers, and print a line for each as it is done."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    results: list[Result] = []
    errors: list[BaseException] = []

    def serve(number: int) -> None:
        try:
            _serve(waiting, results, _command(folder, library, number), library)
        except BaseException as error:  # noqa: BLE001 - raised in the main thread
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def _command(folder: Path, library: Path, number: int) -> list[str]:
    module = [sys.executable, "-m", "tests.chaos.worker"]
    return [*namespace(), *module, str(folder), str(library), str(folder / f"state-{number}")]


def _serve(
    waiting: queue.SimpleQueue[Job], results: list[Result], command: list[str], library: Path
) -> None:
    preloaded = f"{library} {os.environ.get('LD_PRELOAD', '')}".strip()
    worker = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": preloaded},
    )
    with worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                worker.stdin.close()
                return
            print(json.dumps(asdict(job)), file=worker.stdin, flush=True)
            line = worker.stdout.readline()
            if not line:
                raise RuntimeError(f"a worker ended amid {job}")
            fields: dict[str, Any] = json.loads(line)
            result = Result(**fields)
            results.append(result)
            show_result(result)


def show(line: str) -> None:
    """Print one line of the report."""
    print(line, flush=True)  # noqa: T201 - the report of a command line


def show_result(result: Result) -> None:
    """Print the line of one job, and its violations with the commands that repeat them."""
    found = result.violations
    lines = [
        f"    {kind}: {what}\n        python -m tests.chaos --only {name}"
        for name, kind, what in found
    ]
    more = [f"    and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    show("\n".join([row(result), *result.log, *lines[:SHOWN], *more]))


HEAD: Final = (
    f"{'scenario':<20} {'place':<12} {'runs':>5} {'random':>6} {'whole':>5}  "
    + " ".join(f"{kind:>8}" for kind in KINDS)
    + f" {'seconds':>8}"
)


def row(result: Result) -> str:
    """Format one line of the table."""
    counts = " ".join(f"{result.counts[kind]:>8}" for kind in KINDS)
    return (
        f"{result.scenario:<20} {result.place:<12} {result.enumerated:>5} "
        f"{result.random_runs:>6} {result.whole:>5}  {counts} {result.seconds:>8.1f}"
    )


def report(results: Sequence[Result], started: float) -> int:
    """Print totals, and return the exit status."""
    endings: Counter[str] = Counter()
    for result in results:
        endings.update(result.endings)
    show("ended with " + ", ".join(f"{how}: {number}" for how, number in endings.most_common()))
    totals = {kind: sum(result.counts[kind] for result in results) for kind in KINDS}
    enumerated = sum(result.enumerated for result in results)
    chance = sum(result.random_runs for result in results)
    whole = sum(result.whole for result in results)
    missed = sum(result.missed for result in results)
    possible = sum(result.possible for result in results)
    show(
        f"{enumerated} enumerated runs of {possible}, {chance} random, {whole} whole processes "
        f"({missed} met no such call) in {time.monotonic() - started:.0f} s: "
        + ", ".join(f"{number} {kind}" for kind, number in totals.items())
    )
    return int(any(totals.values()))
