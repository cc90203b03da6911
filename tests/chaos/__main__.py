"""The command line of the chaos test."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from tests.chaos import driver, faults, signals
from tests.chaos.places import PLACES
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.worker import Job

if TYPE_CHECKING:
    from collections.abc import Sequence

# runs of one scenario in one place
_FULL: Final = Job("", "", limit=130, random_runs=20, whole=3)
_SHORT: Final = Job("", "", limit=6, random_runs=1, whole=0)


def main(arguments: Sequence[str]) -> int:
    """Run the test, and return the exit status."""
    options = _parser().parse_args(arguments)
    for number in faults.SIGNALS:  # whoever started this may ignore them, and commands then would
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    if options.what == "signals":
        return signals.run(options.runs, options.seed)
    started = time.monotonic()
    try:
        driver.namespace()
    except driver.NoNamespacesError as error:
        driver.show(f"chaos: no mount namespaces are to be had: {error}")
        driver.show("chaos: root has them, and whoever may make user namespaces")
        return 2
    jobs = _jobs(options)
    with driver.surroundings() as (folder, library, _):
        driver.show(driver.HEAD)
        results = driver.run(jobs, folder, library)
    return driver.report(results, started)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument(
        "what",
        nargs="?",
        choices=("faults", "signals"),
        default="faults",
        help="what comes to the commands [default: faults]; signals: whole processes alone",
    )
    parser.add_argument("--short", action="store_true", help="few runs of every kind")
    parser.add_argument("--only", metavar="RUN", help="SCENARIO[/PLACE[/FAULT[/whole]]]")
    parser.add_argument("--limit", type=int, help="enumerated runs of each kind, -1 for all")
    parser.add_argument("--random", type=int, dest="random_runs", help="random runs of each kind")
    parser.add_argument("--whole", type=int, help="whole processes of each kind")
    parser.add_argument("--seed", type=int, default=0, help="for the times of random runs")
    parser.add_argument("--runs", type=int, default=2000, help="processes of `signals`")
    return parser


def _jobs(options: argparse.Namespace) -> list[Job]:
    names = ("limit", "random_runs", "whole")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    usual = replace(_SHORT if options.short else _FULL, seed=options.seed, **given)
    scenario, _, rest = (options.only or "").partition("/")
    place, _, fault = rest.partition("/")
    if fault:
        whole = fault.endswith("/whole")
        fault = fault.removesuffix("/whole")
        faults.parse(fault)
        return [replace(usual, scenario=scenario, place=place, only=fault, as_whole=whole)]
    return [
        replace(usual, scenario=one, place=other)
        for other in PLACES
        if place in {"", other}
        for one in SCENARIOS
        if scenario in {"", one}
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
