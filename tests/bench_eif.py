"""Throughput of `attestor eif describe`, which hashes the application's ramdisk twice.

The figure to beat is the time in which sha384sum reads the same file twice.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SIZE: Final = 512  # MiB of the application's ramdisk, which is nearly all of the image
ROUNDS: Final = 5
# attestor_eif is used in a process of its own, so that this one stays as light as what it measures
WRITE: Final = f"""
from attestor_eif import Header, InMemory, Kind, Metadata, Plan
import os
class Repeated:
    size = {SIZE} << 20
    block = os.urandom(1 << 20)
    def blocks(self):
        yield from (self.block for _ in range({SIZE}))
small = InMemory(os.urandom(1 << 20))
metadata = Metadata("a", "1").to_bytes()
plan = Plan.of_parts(Header(()), small, b"reboot=k", [small, Repeated()], metadata)
with open("bench.eif", "wb") as file:
    file.writelines(plan.blocks())
"""


def main(measure: Callable[[Sequence[str]], tuple[float, float, float]]) -> None:
    """Print the figures; `measure` gives wall and CPU milliseconds and peak MiB of a command."""
    measure([sys.executable, "-c", WRITE])
    describe = [str(Path(sys.executable).parent / "attestor"), "eif", "describe", "bench.eif"]
    rounds = [[measure(one) for one in (describe, *_others())] for _ in range(ROUNDS + 1)][1:]
    ours, *others = (
        [statistics.median(column) for column in zip(*runs, strict=True)]
        for runs in zip(*rounds, strict=True)
    )
    print(f"attestor eif describe of {SIZE + 2} MiB, medians of {ROUNDS}")  # noqa: T201
    print(f"  throughput {1000 * SIZE / ours[1]:.0f} MiB a second of CPU, peak {ours[2]:.1f} MiB")  # noqa: T201
    for command, theirs in zip(_others(), others, strict=True):
        print(f"  {command[0]} twice / ours, CPU time: {2 * theirs[1] / ours[1]:.2f}")  # noqa: T201


def _others() -> Iterator[list[str]]:
    """Yield the commands that hash the file once, of those that are here."""
    for name, options in (("sha384sum", []), ("openssl", ["dgst", "-sha384"])):
        path = shutil.which(name)
        if path:
            yield [path, *options, "bench.eif"]
