"""SIGINT, SIGTERM and SIGHUP: each ends the command as any process, or reaches the program."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.conftest import ROOT, Run

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Enclave

SIGNALS: Final = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]
SLOW: Final = 60.0  # seconds that end a test on the busiest machine


def start(enclave: Enclave, *command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, cwd=enclave.folder, env=enclave.environment, stdout=-1, stderr=-1
    )


def blocks_sigint(pid: int) -> bool:
    """Whether the first line of the command has been run, or the process has ended."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    (blocked,) = [line for line in status.splitlines() if line.startswith("SigBlk:")]
    return bool(int(blocked.split()[1], 16) & 1 << signal.SIGINT - 1) or "\nState:\tZ" in status


def test_at_any_time(enclave: Enclave) -> None:
    """From Python's first line to the end: killed with nothing written, or done, and no word."""
    enclave.place(enclave.encrypt())
    seed = random.randrange(1 << 32)  # noqa: S311 - nothing is secret here
    moments = random.Random(seed)  # noqa: S311
    seen: Counter[int] = Counter()
    for number in SIGNALS * 8:
        (enclave.folder / "out").unlink(missing_ok=True)
        command = (str(Path(sys.executable).with_name("attestor")), "decrypt", "--any-key")
        with start(enclave, *command, "blob", "out") as child:
            while not blocks_sigint(child.pid):  # Python's own start is not ours
                pass
            time.sleep(moments.uniform(0, 0.4))
            child.send_signal(number)
            out, err = child.communicate(timeout=SLOW)
        assert (out, err) == (b"", b""), f"seed {seed}"
        expected = {-number: {"blob"}, 0: {"blob", "out"}}
        assert enclave.files() == expected[child.returncode], f"seed {seed}"
        seen[child.returncode] += 1


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("how", [("-m", "attestor"), (str(ROOT / "attestor.py"),)])
def test_amid_the_imports(enclave: Enclave, number: int, how: tuple[str, ...]) -> None:
    """One that comes while click is imported waits, and leaves no traceback."""
    enclave.place(f"import os\nos.kill(os.getpid(), {number})\n".encode(), "click.py")
    environment: dict[str, str | None] = {"PYTHONPATH": f"{enclave.folder}:{ROOT}"}
    run = enclave.run(sys.executable, *how, "--version", environment=environment)
    assert run.status != 0
    assert "KeyboardInterrupt" not in run.err


@pytest.mark.parametrize("number", SIGNALS)
def test_one_that_is_ignored_stays_ignored(enclaves: Callable[..., Enclave], number: int) -> None:
    """As nohup has it; the program that inject becomes finds it ignored, too."""
    enclave = enclaves()
    enclave.place(enclave.encrypt())
    script = (
        f"trap '' {number}; {sys.executable} -m attestor decrypt -v --any-key blob out 2>log & "
        "until grep -q document log 2>/dev/null; do :; done; "
        f"kill -{number} $!; wait $!"
    )
    assert enclave.run("sh", "-c", script) == Run(0, b"", "")
    assert (enclave.folder / "out").read_bytes() == b"the secret"


def test_process_1_ends_by_its_status(enclaves: Callable[..., Enclave], namespaces: None) -> None:
    """The kernel lets no signal end the first process of a namespace: an enclave's entrypoint."""
    enclave = enclaves(faults=["hang"])
    enclave.place(enclave.encrypt())
    command = [sys.executable, "-m", "attestor", "decrypt", "-v", "--any-key", "blob", "out"]
    unshare = ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child=SIGTERM"]
    with subprocess.Popen(
        [*unshare, *command], cwd=enclave.folder, env=enclave.environment, stderr=-1, text=True
    ) as child:
        assert child.stderr is not None
        while "attestation document" not in (line := child.stderr.readline()):
            assert line
        (first,) = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        os.kill(int(first), signal.SIGTERM)
        assert child.wait(timeout=SLOW) == 128 + signal.SIGTERM
    assert enclave.files() == {"blob"}


def test_the_program_finds_the_signals_as_they_were(enclave: Enclave) -> None:
    """Neither blocked nor ignored: what execve keeps was put back before it."""
    (enclave.folder / "m.toml").write_text(
        'region = "eu-west-1"\n[[file]]\nsource = "-"\nunauthenticated = true\n'
        f'target = "{enclave.folder}/placed"\n',
        encoding="utf-8",
    )
    shown = ("grep", "-E", "^Sig(Blk|Ign|Cgt)", "/proc/self/status")
    run = enclave.attestor("inject", "m.toml", "--", *shown, stdin=b"text")
    assert run.status == 0, run.err
    plain = enclave.run(*shown)
    assert run.out == plain.out


@pytest.mark.parametrize("number", SIGNALS)
def test_one_that_comes_before_exec_is_not_lost(enclave: Enclave, number: int) -> None:
    """While the names are given it waits; then all is taken back, and it ends the command."""
    (enclave.folder / "m.toml").write_text(
        'region = "eu-west-1"\n[[file]]\nsource = "-"\nunauthenticated = true\n'
        f'target = "{enclave.folder}/placed"\n',
        encoding="utf-8",
    )
    program = (
        "import attestor, os\n"
        "from attestor_io import secret_file\n"
        "take_name = secret_file.SecretFile.take_name\n"
        "def interrupted(self):\n"
        "    take_name(self)\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "secret_file.SecretFile.take_name = interrupted\n"
        "attestor.main()"
    )
    command = ("inject", "m.toml", "--", "/bin/sleep", "600")
    run = enclave.run(sys.executable, "-c", program, *command, stdin=b"text")
    assert run == Run(128 + number, b"", "")
    assert enclave.files() == {"m.toml"}


def test_a_program_that_uses_attested_keeps_its_handlers(enclave: Enclave) -> None:
    program = """
import signal
before = {number: signal.getsignal(number) for number in (1, 2, 15)}
import attestor, boto3
kms = attestor.attested(boto3.client("kms"))
kms.generate_random(NumberOfBytes=8)
blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
print(before == {number: signal.getsignal(number) for number in (1, 2, 15)}, blocked)
"""
    assert enclave.run(sys.executable, "-c", program) == Run(0, b"True set()\n", "")


def test_one_that_was_blocked_stays_blocked(enclave: Enclave) -> None:
    """For the program that inject becomes, too: the mask is put back, not cleared."""
    (enclave.folder / "m.toml").write_text(
        'region = "eu-west-1"\n[[file]]\nsource = "-"\nunauthenticated = true\n'
        f'target = "{enclave.folder}/placed"\n',
        encoding="utf-8",
    )
    program = (
        "import os, signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})\n"
        "os.execvp(sys.argv[1], sys.argv[1:])"
    )
    shown = ("grep", "^SigBlk", "/proc/self/status")
    command = (sys.executable, "-m", "attestor", "inject", "m.toml", "--", *shown)
    through = enclave.run(sys.executable, "-c", program, *command, stdin=b"text")
    assert through.status == 0, through.err
    assert through.out == enclave.run(sys.executable, "-c", program, *shown).out


def test_another_program_s_wake_is_none(enclaves: Callable[..., Enclave]) -> None:
    """A SIGUSR1 that was pending and blocked must not end the thread that takes the signals."""
    enclave = enclaves(faults=["hang"])
    enclave.place(enclave.encrypt())
    program = (
        "import os, signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'attestor', *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", program, "decrypt", "-v", "--any-key", "blob", "out"]
    with subprocess.Popen(
        command, cwd=enclave.folder, env=enclave.environment, stderr=-1, text=True
    ) as child:
        assert child.stderr is not None
        while "attestation document" not in (line := child.stderr.readline()):
            assert line
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=SLOW) == -signal.SIGTERM
