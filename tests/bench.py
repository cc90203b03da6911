"""`make bench`: whole processes against the same simulator, in pairs; ratios of medians.

`attestor decrypt` against the plain script that a user would write: import boto3, make a client,
decrypt without a Recipient, write the file. The key policy allows both. Machines are noisy: the
pairs alternate, only ratios count. Files are in memory, as an enclave's are.

`attestor eif describe` of a large image against sha384sum, see bench_eif.

`--before REVISION` compares with that commit: `decrypt`, `--version`, the further secrets of
`inject`, messages and verification; and nothing else.

`nsm.document.verify` of one document against a loop that does no more than check the same five
signatures, with keys that are set up already: of a chain that was not met before, and of one that
was, as in whoever verifies many documents.

Run under `nitrosim run`, and light itself: the kernel counts a parent's memory as the least peak of
its children.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from tests import bench_eif, bench_inject, bench_serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from nsm.document import AttestationDocument

    Signature = tuple[Any, bytes, bytes]

PAIRS: Final = 25
ROUNDS: Final = 300  # of what takes milliseconds
OPEN_POLICY: Final = """{"Version": "2012-10-17", "Statement": [
    {"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "kms:*", "Resource": "*"}]}"""
ENCRYPT: Final = """
import boto3
answer = boto3.client("kms").encrypt(KeyId="alias/nitrosim", Plaintext=b"the secret")
open("blob", "wb").write(answer["CiphertextBlob"])
"""
PLAIN: Final = """
import boto3
blob = open("blob", "rb").read()
plaintext = boto3.client("kms").decrypt(CiphertextBlob=blob)["Plaintext"]
open("plain", "wb").write(plaintext)
"""
VERIFY: Final = """
import hashlib, statistics, time
from nsm import Nsm
from nsm.document import AttestationDocument, verify
with Nsm() as module:
    data = module.attest()
root = hashlib.sha256(AttestationDocument.parse(data).cabundle[0]).digest()
def timed():
    start = time.perf_counter()
    verify(data, roots=[root])
    return 1e3 * (time.perf_counter() - start)
print(statistics.median(timed() for _ in range(300)))
"""
ROOT: Final = Path(__file__).parent.parent
BIN: Final = Path(sys.executable).parent
ATTESTOR: Final = (str(BIN / "attestor"), "decrypt", "--any-key", "-f", "blob", "out")
LIBRARY: Final = ROOT / "nsm" / "libnsm.so"


def main() -> None:
    """Print the figures."""
    if "NITROSIM_NSM_SOCKET" not in os.environ:
        run_inside()
    with tempfile.TemporaryDirectory(dir=bench_inject.MEMORY) as folder, contextlib.chdir(folder):
        Path("plain.py").write_text(PLAIN, encoding="utf-8")
        subprocess.run([sys.executable, "-c", ENCRYPT], check=True)
        if sys.argv[1:2] == ["--before"]:
            compare_with_revision(sys.argv[2])
            return
        compare("attestor decrypt / plain boto3 script", ATTESTOR, [sys.executable, "plain.py"])
        if LIBRARY.exists():
            direct = dict(os.environ, PYTHONPATH=folder)
            Path("sitecustomize.py").write_text(
                "import nsm.library\nnsm.library.find_library = lambda: None\n", encoding="utf-8"
            )
            compare(
                "attestor decrypt, libnsm.so / device alone", ATTESTOR, ATTESTOR, theirs_in=direct
            )
        bench_eif.main(measure)
        bench_inject.main(measure)
        bench_serve.main()
    compare_verification()  # last: what it imports is not light


def compare_with_revision(revision: str) -> None:
    """The commands of this tree against those of a commit."""
    git = ["git", "-C", str(ROOT), "worktree"]
    tree = Path("before").absolute()
    subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
    try:
        if LIBRARY.exists():
            shutil.copy(LIBRARY, tree / "nsm")
        now, then = partial(started, ROOT), partial(started, tree)
        for arguments in (ATTESTOR[1:], ["--version"]):
            title = f"attestor {arguments[0]}, now / at {revision}"
            compare(title, now(arguments), then(arguments))
        bench_inject.compare_with_revision(measure, now, then)
        pairs = [[verification_in(folder) for folder in (ROOT, tree)] for _ in range(ROUNDS // 30)]
        bench_inject.print_pair("verify one document again, now / before", pairs, "ms")
    finally:
        subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def started(tree: Path, arguments: Sequence[str]) -> list[str]:
    """A command of the sources in that folder."""
    script = tree / "bin" / "attestor"
    run = [str(script)] if script.exists() else ["-c", "import attestor; attestor.main()"]
    return ["/usr/bin/env", f"PYTHONPATH={tree}", sys.executable, *run, *arguments]


def verification_in(tree: Path) -> float:
    """Milliseconds of one verification by the sources in that folder, the median of many."""
    environment = dict(os.environ, PYTHONPATH=str(tree))
    return float(subprocess.check_output([sys.executable, "-c", VERIFY], env=environment))


def compare_verification() -> None:
    """Verify a document of this enclave, parsing included, and check its signatures alone."""
    from nsm import Nsm
    from nsm.certificates import read_certificate
    from nsm.document import AttestationDocument, verify

    def first() -> None:
        read_certificate.cache_clear()
        verify(data, roots=[root])

    with Nsm() as module:
        data = module.attest()
    root = hashlib.sha256(AttestationDocument.parse(data).cabundle[0]).digest()
    signatures = signatures_of(AttestationDocument.parse(data))
    triples = [
        (
            timed(first),
            timed(lambda: verify(data, roots=[root])),
            timed(lambda: check_all(signatures)),
        )
        for _ in range(ROUNDS + 1)
    ][1:]
    new, known, bare = (statistics.median(times) for times in zip(*triples, strict=True))
    print(f"verify a document / check its five signatures, medians of {ROUNDS}")  # noqa: T201
    for name, our in (("new certificates", new), ("known ones", known)):
        print(f"  {name:16} {our:7.2f} / {bare:7.2f} ms   ratio {our / bare:.3f}")  # noqa: T201


def signatures_of(document: AttestationDocument) -> list[Signature]:
    """Key, signature and what is signed: of the document, and each certificate below the root."""
    import cbor2
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    chain = [
        x509.load_der_x509_certificate(der) for der in (*document.cabundle, document.certificate)
    ]
    keys: list[Any] = [certificate.public_key() for certificate in chain]
    found = [
        (key, certificate.signature, certificate.tbs_certificate_bytes)
        for key, certificate in zip(keys, chain[1:], strict=False)
    ]
    r, s = (int.from_bytes(half) for half in (document.signature[:48], document.signature[48:]))
    signed = cbor2.dumps(["Signature1", document.protected, b"", document.payload])
    return [*found, (keys[-1], encode_dss_signature(r, s), signed)]


def check_all(signatures: Iterable[Signature]) -> None:
    """The bare loop."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    for key, signature, signed in signatures:
        key.verify(signature, signed, ec.ECDSA(hashes.SHA384()))


def timed(work: Callable[[], object]) -> float:
    """Milliseconds that it takes."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def run_inside() -> NoReturn:
    """Start again, in a simulated enclave whose KMS lets everybody in."""
    reader, writer = os.pipe()
    os.write(writer, OPEN_POLICY.encode())
    os.close(writer)
    os.dup2(reader, 0)
    nitrosim = [
        "nitrosim",
        "run",
        "--key-policy",
        "-",
        "--",
        sys.executable,
        __file__,
        *sys.argv[1:],
    ]
    os.execv(BIN / "nitrosim", nitrosim)  # noqa: S606 - no shell is the point


def compare(
    title: str,
    ours: Sequence[str],
    theirs: Sequence[str],
    theirs_in: Mapping[str, str] | None = None,
) -> None:
    """Run both in turn and print medians and their ratio."""
    pairs = [(measure(ours), measure(theirs, theirs_in)) for _ in range(PAIRS + 1)]
    pairs = pairs[1:]  # the first one warms up
    print(f"{title}, medians of {PAIRS} pairs")  # noqa: T201
    units = (("wall time", "ms"), ("CPU time", "ms"), ("peak memory", "MiB"))
    for index, (name, unit) in enumerate(units):
        our, their = (statistics.median(pair[side][index] for pair in pairs) for side in (0, 1))
        print(f"  {name:12} {our:7.1f} / {their:7.1f} {unit:4} ratio {our / their:.3f}")  # noqa: T201


def measure(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> tuple[float, float, float]:
    """Wall and CPU milliseconds and peak MiB of one process, as the kernel accounts for it."""
    unseen = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    start = time.perf_counter()
    child = os.posix_spawn(
        command[0], list(command), environment or os.environ, file_actions=unseen
    )
    _, status, usage = os.wait4(child, 0)
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(f"{command[0]} ended with {os.waitstatus_to_exitcode(status)}")
    return 1e3 * wall, 1e3 * (usage.ru_utime + usage.ru_stime), usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
