"""`make bench`: whole processes against the same simulator, in pairs; ratios of medians.

`attestor decrypt` against the plain script that a user would write: import boto3, make a client, decrypt without a
Recipient, write the file. The key policy allows both. Machines are noisy: the pairs alternate, only ratios count.

Run under `nitrosim run`, and light itself: the kernel counts a parent's memory as the least peak of its children.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PAIRS: Final = 25
OPEN_POLICY: Final = """{"Version": "2012-10-17", "Statement": [
    {"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "kms:*", "Resource": "*"}]}"""
ENCRYPT: Final = """
import boto3
blob = boto3.client("kms").encrypt(KeyId="alias/nitrosim", Plaintext=b"the secret")["CiphertextBlob"]
open("blob", "wb").write(blob)
"""
PLAIN: Final = """
import boto3
blob = open("blob", "rb").read()
plaintext = boto3.client("kms").decrypt(CiphertextBlob=blob)["Plaintext"]
open("plain", "wb").write(plaintext)
"""
BIN: Final = Path(sys.executable).parent
ATTESTOR: Final = (str(BIN / "attestor"), "decrypt", "--any-key", "-f", "blob", "out")
LIBRARY: Final = Path(__file__).parent.parent / "nsm" / "libnsm.so"


def main() -> None:
    """Print the figures."""
    if "NITROSIM_NSM_SOCKET" not in os.environ:
        run_inside()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("plain.py").write_text(PLAIN, encoding="utf-8")
        subprocess.run([sys.executable, "-c", ENCRYPT], check=True)
        compare("attestor decrypt / plain boto3 script", ATTESTOR, [sys.executable, "plain.py"])
        if LIBRARY.exists():
            direct = dict(os.environ, PYTHONPATH=folder)
            Path("sitecustomize.py").write_text(
                "import nsm.library\nnsm.library.find_library = lambda: None\n", encoding="utf-8"
            )
            compare("attestor decrypt, libnsm.so / device alone", ATTESTOR, ATTESTOR, theirs_in=direct)


def run_inside() -> NoReturn:
    """Start again, in a simulated enclave whose KMS lets everybody in."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as policy:
        policy.write(OPEN_POLICY)
    os.execv(BIN / "nitrosim", ["nitrosim", "run", "--key-policy", policy.name, "--", sys.executable, __file__])  # noqa: S606 - no shell is the point


def compare(title: str, ours: Sequence[str], theirs: Sequence[str], theirs_in: Mapping[str, str] | None = None) -> None:
    """Run both in turn and print medians and their ratio."""
    pairs = [(measure(ours), measure(theirs, theirs_in)) for _ in range(PAIRS + 1)][1:]  # the first one warms up
    print(f"{title}, medians of {PAIRS} pairs")  # noqa: T201
    for index, (name, unit) in enumerate((("wall time", "ms"), ("CPU time", "ms"), ("peak memory", "MiB"))):
        our, their = (statistics.median(pair[side][index] for pair in pairs) for side in (0, 1))
        print(f"  {name:12} {our:7.1f} / {their:7.1f} {unit:4} ratio {our / their:.3f}")  # noqa: T201


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[float, float, float]:
    """Wall and CPU milliseconds and peak MiB of one process, as the kernel accounts for it."""
    start = time.perf_counter()
    child = os.posix_spawn(command[0], list(command), environment or os.environ)
    _, status, usage = os.wait4(child, 0)
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(f"{command[0]} ended with {os.waitstatus_to_exitcode(status)}")
    return 1e3 * wall, 1e3 * (usage.ru_utime + usage.ru_stime), usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
