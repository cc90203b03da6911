"""The part of `make bench` about `attestor serve`: calls through it, against those of a program
that is attested itself, and against plain ones; and whether its memory grows.

`tests.bench` calls it inside its simulator, whose KMS is where most of the time goes: it checks
each attestation document anew.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

THREADS: Final = 16
CALLS: Final = 2000  # of each kind
MEMORY_CALLS: Final = 10_000
WARM: Final = 1000  # calls after which memory has what it needs
CALLER: Final = """
import json, sys, threading, time
import attestor, boto3
from botocore.config import Config
kind, threads, calls = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
blob = open("blob", "rb").read()
kms = boto3.client("kms", config=Config(max_pool_connections=threads))
if kind == "attested":
    attestor.attested(kms)
kms.decrypt(CiphertextBlob=blob)
times = []
def call():
    for _ in range(calls // threads):
        start = time.perf_counter()
        if kms.decrypt(CiphertextBlob=blob)["Plaintext"] != b"the secret":
            raise SystemExit("another secret")
        times.append(1e3 * (time.perf_counter() - start))
started = [threading.Thread(target=call) for _ in range(threads)]
start = time.perf_counter()
for thread in started: thread.start()
for thread in started: thread.join()
taken = time.perf_counter() - start
times.sort()
found = [len(times) / taken, times[len(times) // 2], times[len(times) * 99 // 100]]
print(json.dumps([len(times), *found]))
"""
ENCRYPT: Final = """
import boto3
answer = boto3.client("kms").encrypt(KeyId="alias/nitrosim", Plaintext=b"the secret")
open("blob", "wb").write(answer["CiphertextBlob"])
"""
ATTESTOR: Final = str(Path(sys.executable).parent / "attestor")


def main() -> None:
    """Print the figures; in an empty folder."""
    subprocess.run([sys.executable, "-c", ENCRYPT], check=True)
    reader, writer = os.pipe()
    places = ["--port", "0", "--credentials-file", "pair", "--any-key", "--ready-fd", str(writer)]
    with subprocess.Popen([ATTESTOR, "serve", *places], pass_fds=[writer]) as serving:
        os.close(writer)
        with open(reader, "rb") as ready:
            url = ready.read().decode().strip()
        served = {name: value for name, value in os.environ.items() if "NITROSIM" not in name}
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            del served[name]
        served |= {"AWS_ENDPOINT_URL_KMS": url, "AWS_SHARED_CREDENTIALS_FILE": "pair"}
        try:
            compare(served)
            measure_memory(served, serving.pid)
        finally:
            serving.terminate()


def compare(served: Mapping[str, str]) -> None:
    """Print throughput and latencies."""
    print("Decrypt: served / attested() / plain boto3")  # noqa: T201
    for threads in (1, THREADS):
        calls = CALLS if threads > 1 else CALLS // 10
        found = [
            called("plain", threads, calls, served),
            called("attested", threads, calls),
            called("plain", threads, calls),
        ]
        rates, medians, worst = ([one[index] for one in found] for index in (1, 2, 3))
        ratio = rates[0] / rates[1]
        print(f"  {threads:2} threads   {shown(rates)} a second   ratio {ratio:.2f}")  # noqa: T201
        print(f"    p50        {shown(medians)} ms")  # noqa: T201
        print(f"    p99        {shown(worst)} ms")  # noqa: T201


def shown(figures: list[float]) -> str:
    """Three figures."""
    return " / ".join(f"{figure:7.1f}" for figure in figures)


def measure_memory(served: Mapping[str, str], pid: int) -> None:
    """Print resident memory of serve after some calls, and after many more."""
    called("plain", THREADS, WARM, served)
    before = resident(pid)
    called("plain", THREADS, MEMORY_CALLS - WARM, served)
    after = resident(pid)
    print(  # noqa: T201
        f"  memory of serve after {WARM} more calls and after {MEMORY_CALLS}: "
        f"{before:.1f} / {after:.1f} MiB   ratio {after / before:.3f}"
    )


def called(
    kind: str, threads: int, calls: int, environment: Mapping[str, str] | None = None
) -> list[float]:
    """Calls that were answered, how many a second, and p50 and p99 in milliseconds."""
    command = [sys.executable, "-c", CALLER, kind, str(threads), str(calls)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True)
    found: Any = json.loads(done.stdout)
    if found[0] != calls // threads * threads:
        raise SystemExit(f"{found[0]} of {calls} calls were answered")
    return [float(figure) for figure in found]


def resident(pid: int) -> float:
    """Resident memory in MiB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(r"VmRSS:\s+(\d+)", status)
    return int(found[1]) / 1024 if found else 0.0
