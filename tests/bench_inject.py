"""The part of `make bench` about many secrets and long messages.

`tests.bench` calls it inside its simulator. Figures are of whole processes, as the kernel accounts
for them. What each additional secret costs is the difference between runs with many and with few of
them, so that starting up cancels out.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Measure = Callable[[Sequence[str]], tuple[float, float, float]]
    """Wall and CPU milliseconds and peak MiB of one command."""

MANY: Final = 300  # as many as a manifest may hold
FEW: Final = 20
PAIRS: Final = 11  # a key takes its time by chance
SINGLES: Final = 50
SIZES: Final = (64, 1024)  # MiB
ENCRYPT: Final = """
import boto3, sys
kms = boto3.client("kms")
for number in range(int(sys.argv[1])):
    context = {"n": str(number)}
    answer = kms.encrypt(
        KeyId="alias/nitrosim", Plaintext=b"the secret", EncryptionContext=context
    )
    open(f"{number}.enc", "wb").write(answer["CiphertextBlob"])
print(answer["KeyId"])
"""
PLAIN: Final = """
import boto3, sys
kms = boto3.client("kms")
for number in range(int(sys.argv[1])):
    blob = open(f"{number}.enc", "rb").read()
    plaintext = kms.decrypt(CiphertextBlob=blob, EncryptionContext={"n": str(number)})["Plaintext"]
    open(f"{number}.plain", "wb").write(plaintext)
"""
ATTESTOR: Final = str(Path(sys.executable).parent / "attestor")


def main(measure: Measure) -> None:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        encrypt = [sys.executable, "-c", ENCRYPT, str(MANY)]
        arn = subprocess.run(encrypt, check=True, capture_output=True, text=True).stdout.strip()
        for count in (FEW, MANY):
            Path(f"{count}.toml").write_text(manifest(arn, folder, count), encoding="utf-8")
        compare_with_a_loop(measure)
        compare_with_single_runs(measure)
        measure_messages(measure, arn)


def manifest(arn: str, folder: str, count: int) -> str:
    """A manifest of so many secrets."""
    entries = (
        f'[[secret]]\nsource = "{folder}/{number}.enc"\ntarget = "{folder}/{number}.out"\n'
        f'context = {{n = "{number}"}}\n'
        for number in range(count)
    )
    return f'region = "eu-west-1"\nkey_id = "{arn}"\n' + "".join(entries)


def inject(measure: Measure, count: int) -> tuple[float, float, float]:
    """One run of inject with so many secrets."""
    for path in Path().glob("*.out"):
        path.unlink()
    return measure([ATTESTOR, "inject", f"{count}.toml"])


def compare_with_a_loop(measure: Measure) -> None:
    """CPU time of each additional secret, against a boto3 loop; in turn, for machines drift."""
    Path("plain.py").write_text(PLAIN, encoding="utf-8")
    pairs = [
        (
            additional(lambda count: inject(measure, count)[1]),
            additional(lambda count: measure([sys.executable, "plain.py", str(count)])[1]),
        )
        for _ in range(PAIRS)
    ]
    ours, theirs = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
    ratio = statistics.median(our / their for our, their in pairs)
    print(f"CPU time of an additional secret, inject / boto3 loop, medians of {PAIRS} pairs")  # noqa: T201
    times = f"{ours:7.2f} / {theirs:7.2f} ms"
    print(f"  CPU time     {times}   ratio {ratio:.3f}, RSA alone {rsa():.2f} ms")  # noqa: T201


def additional(cost: Callable[[int], float]) -> float:
    """What one secret more costs: start-up, and the luck of making a key, cancel out."""
    few = cost(FEW)
    return (cost(MANY) - few) / (MANY - FEW)


def rsa() -> float:
    """CPU milliseconds of what no attested client can spare: one RSA-2048 decryption."""
    program = """
import time
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
key = rsa.generate_private_key(65537, 2048)
oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
wrapped = key.public_key().encrypt(bytes(32), oaep)
start = time.process_time()
for _ in range(300): key.decrypt(wrapped, oaep)
print((time.process_time() - start) / 300 * 1e3)
"""
    return float(
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout
    )


def compare_with_single_runs(measure: Measure) -> None:
    """Wall time of 200 secrets, together and one by one."""
    together = statistics.median(inject(measure, MANY)[0] for _ in range(3)) * 200 / MANY
    command = [ATTESTOR, "decrypt", "--any-key", "--force", "--context", "n=0", "0.enc", "0.out"]
    singly = sum(measure(command)[0] for _ in range(SINGLES)) * 200 / SINGLES
    print(f"200 secrets, single runs (from {SINGLES}) / inject")  # noqa: T201
    print(f"  wall time    {singly:7.0f} / {together:7.0f} ms   ratio {singly / together:.1f}")  # noqa: T201


def measure_messages(measure: Measure, arn: str) -> None:
    """Throughput and peak memory of messages of the AWS Encryption SDK."""
    print("message of the AWS Encryption SDK, decrypt")  # noqa: T201
    for size in SIZES:
        piece = os.urandom(1 << 20)
        with open("long", "wb") as plaintext:
            plaintext.writelines(piece for _ in range(size))
        subprocess.run(
            [ATTESTOR, "encrypt", "--force", "--key-id", arn, "long", "long.enc"], check=True
        )
        wall, _, peak = measure(
            [ATTESTOR, "decrypt", "--force", "--key-id", arn, "long.enc", "long"]
        )
        print(f"  {size:5} MiB    {size / wall * 1e3:7.1f} MiB/s, peak memory {peak:.1f} MiB")  # noqa: T201
