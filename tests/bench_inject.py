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
    from collections.abc import Callable, Iterator, Sequence

    Measure = Callable[[Sequence[str]], tuple[float, float, float]]
    """Wall and CPU milliseconds and peak MiB of one command."""
    Start = Callable[[Sequence[str]], Sequence[str]]
    """The command line of attestor with these arguments."""

MEMORY: Final = "/dev/shm" if os.path.isdir("/dev/shm") else None  # as all files of an enclave are
MANY: Final = 300  # as many as a manifest may hold
FEW: Final = 20
ROUNDS: Final = 11  # a key takes its time by chance
SINGLES: Final = 50
SIZES: Final = (64, 512)  # MiB
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
# What no attested client can spare: a Recipient in each call, and one RSA operation.
BARE: Final = """
import boto3, sys
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from nsm import Nsm
key = rsa.generate_private_key(65537, 2048)
oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
wrapped = key.public_key().encrypt(bytes(32), oaep)
der, spki = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
with Nsm() as module:
    document = module.attest(public_key=key.public_key().public_bytes(der, spki))
recipient = {"AttestationDocument": document, "KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_256"}
kms = boto3.client("kms")
for number in range(int(sys.argv[1])):
    blob = open(f"{number}.enc", "rb").read()
    context = {"n": str(number)}
    kms.decrypt(CiphertextBlob=blob, EncryptionContext=context, Recipient=recipient)
    open(f"{number}.plain", "wb").write(key.decrypt(wrapped, oaep))
"""
ATTESTOR: Final = str(Path(sys.executable).parent / "attestor")
MESSAGE: Final = ("decrypt", "--any-key", "--force", "long.enc", "long")


def main(measure: Measure) -> None:
    """Print the figures."""
    with ciphertexts() as arn:
        compare_with_a_loop(measure)
        compare_with_single_runs(measure)
        measure_messages(measure, arn)


def compare_with_revision(measure: Measure, now: Start, before: Start) -> None:
    """Print those that two trees give, in turn."""
    with ciphertexts() as arn:
        pairs = [
            [additional_secret(measure, start) for start in (now, before)] for _ in range(ROUNDS)
        ]
        print_pair("CPU time of an additional secret of inject, now / before", pairs, "ms")
        encrypt_message(arn, SIZES[0])
        pairs = [[measure(start(MESSAGE))[1] for start in (now, before)] for _ in range(ROUNDS)]
        print_pair(f"CPU time of a message of {SIZES[0]} MiB, now / before", pairs, "ms")
        pairs = [[measure(start(MESSAGE))[0] for start in (now, before)] for _ in range(ROUNDS)]
        print_pair(f"wall time of a message of {SIZES[0]} MiB, now / before", pairs, "ms")


def print_pair(title: str, pairs: Sequence[Sequence[float]], unit: str) -> None:
    """Print two medians and their ratio."""
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(f"{title}, medians of {len(pairs)} pairs")  # noqa: T201
    print(f"  {ours:19.2f} / {theirs:7.2f} {unit:4} ratio {ours / theirs:.3f}")  # noqa: T201


def attestor(arguments: Sequence[str]) -> list[str]:
    """The command as it is installed."""
    return [ATTESTOR, *arguments]


@contextlib.contextmanager
def ciphertexts() -> Iterator[str]:
    """In a folder with as many ciphertexts as a manifest may name, and manifests; their key."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, contextlib.chdir(folder):
        encrypt = [sys.executable, "-c", ENCRYPT, str(MANY)]
        arn = subprocess.run(encrypt, check=True, capture_output=True, text=True).stdout.strip()
        for count in (FEW, MANY):
            Path(f"{count}.toml").write_text(manifest(arn, folder, count), encoding="utf-8")
        yield arn


def manifest(arn: str, folder: str, count: int) -> str:
    """A manifest of so many secrets."""
    entries = (
        f'[[secret]]\nsource = "{folder}/{number}.enc"\ntarget = "{folder}/{number}.out"\n'
        f'context = {{n = "{number}"}}\n'
        for number in range(count)
    )
    return f'region = "eu-west-1"\nkey_id = "{arn}"\n' + "".join(entries)


def inject(measure: Measure, count: int, start: Start = attestor) -> tuple[float, float, float]:
    """One run of inject with so many secrets."""
    for path in Path().glob("*.out"):
        path.unlink()
    return measure(start(["inject", f"{count}.toml"]))


def compare_with_a_loop(measure: Measure) -> None:
    """CPU time of each additional secret, against boto3 loops; in turn, for machines drift."""
    for name, text in (("plain.py", PLAIN), ("bare.py", BARE)):
        Path(name).write_text(text, encoding="utf-8")

    def loop(name: str) -> float:
        return additional(lambda count: measure([sys.executable, name, str(count)])[1])

    rounds = [
        (additional_secret(measure), loop("plain.py"), loop("bare.py")) for _ in range(ROUNDS)
    ]
    ours, plain, bare = (statistics.median(costs) for costs in zip(*rounds, strict=True))
    alone = rsa()
    print(  # noqa: T201
        "CPU time of an additional secret: inject / boto3 loop / one with Recipient and RSA, "
        f"medians of {ROUNDS}"
    )
    print(f"  CPU time     {ours:7.2f} / {plain:7.2f} / {bare:7.2f} ms, RSA alone {alone:.2f} ms")  # noqa: T201
    ratios = f"{ours / (plain + alone):.3f} over loop and RSA, {ours / bare:.3f} over the other"
    print(f"  ratio        {ratios}")  # noqa: T201


def additional_secret(measure: Measure, start: Start = attestor) -> float:
    """CPU milliseconds of a secret more in one run of inject."""
    return additional(lambda count: inject(measure, count, start)[1])


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
        encrypt_message(arn, size)
        wall, _, peak = measure(attestor(MESSAGE))
        print(f"  {size:5} MiB    {size / wall * 1e3:7.1f} MiB/s, peak memory {peak:.1f} MiB")  # noqa: T201


def encrypt_message(arn: str, size: int) -> None:
    """Write long.enc, of so many MiB of plaintext."""
    piece = os.urandom(1 << 20)
    with open("long", "wb") as plaintext:
        plaintext.writelines(piece for _ in range(size))
    subprocess.run(
        attestor(["encrypt", "--force", "--key-id", arn, "long", "long.enc"]), check=True
    )
