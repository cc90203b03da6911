"""The secret on disk: absent or complete at any moment, whatever happens to the write."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from tests.conftest import Run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Enclave

PLAINTEXT: Final = b"the secret" * 400


@pytest.fixture
def ready(enclave: Enclave) -> Enclave:
    """An enclave with a ciphertext in its folder."""
    enclave.place(enclave.encrypt(PLAINTEXT))
    return enclave


def unshared(enclave: Enclave, script: str) -> Run:
    """Run a shell script in mount and user namespaces of its own, with attestor as `attestor`."""
    alias = f'attestor() {{ {sys.executable} -m attestor decrypt --any-key "$@"; }}\n'
    return enclave.run("unshare", "--map-root-user", "--mount", "sh", "-c", alias + script)


def refused(enclave: Enclave, run: Run, part: str, left: set[str]) -> None:
    assert run.status == 7, run.err
    assert part in run.error
    assert enclave.files() == left


# -- the target


def test_an_existing_target_needs_force(ready: Enclave) -> None:
    ready.place(b"the old one", "out")
    refused(ready, ready.decrypt(), "out exists", {"blob", "out"})
    assert (ready.folder / "out").read_bytes() == b"the old one"
    assert ready.decrypt("--force") == Run(0, b"", "")
    assert (ready.folder / "out").read_bytes() == PLAINTEXT
    assert stat.S_IMODE((ready.folder / "out").stat().st_mode) == 0o600
    assert ready.files() == {"blob", "out"}


def test_a_symbolic_link_is_never_followed(ready: Enclave) -> None:
    ready.place(b"elsewhere", "elsewhere")
    (ready.folder / "out").symlink_to("elsewhere")
    refused(ready, ready.decrypt(), "out exists", {"blob", "out", "elsewhere"})
    assert ready.decrypt("--force").status == 0
    assert not (ready.folder / "out").is_symlink()
    assert (ready.folder / "elsewhere").read_bytes() == b"elsewhere"


def test_a_dangling_link_is_a_target_that_exists(ready: Enclave) -> None:
    (ready.folder / "out").symlink_to("nowhere")
    refused(ready, ready.decrypt(), "out exists", {"blob", "out"})


def test_only_a_file_is_replaced(ready: Enclave) -> None:
    (ready.folder / "out").mkdir()
    refused(ready, ready.decrypt("--force"), "no file that could be replaced", {"blob", "out"})
    (ready.folder / "out").rmdir()
    os.mkfifo(ready.folder / "out")
    refused(ready, ready.decrypt("--force"), "no file that could be replaced", {"blob", "out"})


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("absent/out", "there is no folder absent"),
        ("blob/out", "Not a directory"),
        ("folder/", "names a folder"),
        (".", "names a folder"),
        ("folder/..", "names a folder"),
        ("x" * 256, "File name too long"),
    ],
)
def test_a_target_that_cannot_be(ready: Enclave, target: str, part: str) -> None:
    (ready.folder / "folder").mkdir()
    run = ready.attestor("decrypt", "--any-key", "blob", target)
    refused(ready, run, part, {"blob", "folder"})


def test_the_folder_is_checked_before_kms_is_called(ready: Enclave) -> None:
    run = ready.attestor(
        "decrypt", "--any-key", "blob", "absent/out", environment={"AWS_ACCESS_KEY_ID": None}
    )
    assert run.status == 7


def test_the_target_may_appear_in_between(ready: Enclave) -> None:
    """Another process wins the race between the check and the link: its file stays."""
    program = (
        "import attestor, os\n"
        "link = os.link\n"
        "def late(*a, **k): open('out', 'wb').write(b'theirs'); return link(*a, **k)\n"
        "os.link = late\n"
        "attestor.main()"
    )
    run = ready.run(sys.executable, "-c", program, "decrypt", "--any-key", "blob", "out")
    refused(ready, run, "File exists", {"blob", "out"})
    assert (ready.folder / "out").read_bytes() == b"theirs"


# -- the file system


def test_a_full_disk(ready: Enclave, namespaces: None) -> None:
    run = unshared(
        ready,
        "mkdir full && mount -t tmpfs -o size=8k none full && "
        "{ cat /dev/zero > full/filler 2>/dev/null; attestor blob full/out; status=$?; "
        "ls -A full; exit $status; }",
    )
    assert (run.status, run.out) == (7, b"filler\n")
    assert "No space left on device" in run.error


def test_a_read_only_folder(ready: Enclave, namespaces: None) -> None:
    run = unshared(ready, "mkdir ro && mount -t tmpfs -o ro none ro && attestor blob ro/out")
    assert run.status == 7
    assert "cannot be written" in run.error


NOT_ASKED: Final = ("--endpoint-url", "https://127.0.0.1:1")  # status 5 if KMS were asked


def test_a_target_that_something_is_mounted_on(ready: Enclave, namespaces: None) -> None:
    ready.place(b"the old one", "out")
    run = unshared(
        ready, f"mount --bind blob out && attestor --force {' '.join(NOT_ASKED)} blob out"
    )
    refused(ready, run, "out cannot be written: something is mounted on it", {"blob", "out"})


def test_a_sticky_folder_with_the_file_of_another_user(ready: Enclave) -> None:
    ready.place(b"the old one", "out")
    ready.folder.chmod(0o1777)
    program = "import os; os.geteuid = lambda: 65533; import attestor; attestor.main()"
    command = ("decrypt", "--any-key", "--force", *NOT_ASKED, "blob", "out")
    run = ready.run(sys.executable, "-c", program, *command)
    refused(ready, run, "the sticky bit", {"blob", "out"})
    assert (ready.folder / "out").read_bytes() == b"the old one"


@pytest.mark.parametrize("options", ["", "--force"])
def test_without_proc_a_temporary_name_serves(
    ready: Enclave, namespaces: None, options: str
) -> None:
    run = unshared(ready, f"umask 0; mount -t tmpfs none /proc && attestor {options} blob out")
    assert run == Run(0, b"", "")
    assert (ready.folder / "out").read_bytes() == PLAINTEXT
    assert stat.S_IMODE((ready.folder / "out").stat().st_mode) == 0o600
    assert ready.files() == {"blob", "out"}


# -- in the middle of a write


@pytest.mark.parametrize("options", [(), ("--force",)])
@pytest.mark.parametrize("point", ["fchmod", "write", "fsync"])
@pytest.mark.parametrize("named", [{}, {"NO_TMPFILE": "1"}], ids=["unnamed", "named"])
@pytest.mark.parametrize(
    ("what", "status"),
    [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT+SIGTERM", 130), ("ENOSPC", 7)],
)
def test_an_interrupted_write_leaves_nothing(
    ready: Enclave,
    options: tuple[str, ...],
    point: str,
    named: dict[str, str | None],
    what: str,
    status: int,
) -> None:
    command = ("decrypt", "--any-key", *options, "blob", "out")
    run = ready.run(
        sys.executable, "-m", "tests.interrupt", point, what, *command, environment=named
    )
    # a signal that is raised this late may find the placement begun, which then goes on to its end
    assert (run.status, ready.files()) in [(status, {"blob"}), (0, {"blob", "out"})], run.err
    assert run.status == status or what != "ENOSPC"
    assert "Traceback" not in run.err
    assert not run.err or what == "ENOSPC"


@pytest.mark.parametrize("options", [(), ("--force",)])
@pytest.mark.parametrize(("point", "what"), [("fsync", "SIGKILL"), ("write", "SIGKILL")])
def test_even_sigkill_leaves_nothing(
    ready: Enclave, options: tuple[str, ...], point: str, what: str
) -> None:
    command = ("decrypt", "--any-key", *options, "blob", "out")
    run = ready.run(sys.executable, "-m", "tests.interrupt", point, what, *command)
    assert run.status == 128 + signal.SIGKILL
    assert ready.files() == {"blob"}


@pytest.mark.parametrize("point", ["write", "fsync", "rename"])
def test_what_sigkill_leaves_is_gone_after_the_next_run(ready: Enclave, point: str) -> None:
    """With a temporary name SIGKILL leaves one; only that of a living process may stay."""
    ready.place(b"the old one", "out")
    if point == "rename":  # between the link and the exchange
        point, named = "link", {}
        program = "tests.interrupt"
    else:
        named, program = {"NO_TMPFILE": "1"}, "tests.interrupt"
    command = ("decrypt", "--any-key", "--force", "blob", "out")
    ready.run(sys.executable, "-m", program, point, "SIGKILL", *command, environment=named)
    assert (ready.folder / "out").read_bytes() == b"the old one"
    ready.place(b"", ".attestor-0123456789abcdef")  # as if left by another
    ready.place(b"", ".attestor-not-ours")
    assert ready.decrypt("--force") == Run(0, b"", "")
    assert ready.files() == {"blob", "out", ".attestor-not-ours"}


def test_a_hidden_name_of_a_living_process_stays(ready: Enclave) -> None:
    name = ".attestor-0123456789abcdef"
    ready.place(b"", name)
    folder = os.open(ready.folder, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_SH)
    assert ready.decrypt().status == 0
    assert name in ready.files()
    os.close(folder)
    assert ready.decrypt("--force").status == 0
    assert name not in ready.files()


@pytest.mark.parametrize("what", ["SIGINT", "SIGTERM"])
def test_a_signal_behind_the_point_of_no_return_comes_too_late(ready: Enclave, what: str) -> None:
    run = ready.run(
        sys.executable, "-m", "tests.interrupt", "link", what, "decrypt", "--any-key", "blob", "out"
    )
    assert run == Run(0, b"", "")
    assert (ready.folder / "out").read_bytes() == PLAINTEXT


@pytest.mark.parametrize("point", ["link", "fsync-folder", "unlink"])
@pytest.mark.parametrize("exchange", [{}, {"NO_EXCHANGE": "1"}], ids=["exchange", "links"])
@pytest.mark.parametrize("kind", ["blob", "message", "encrypt"])
def test_a_failing_replacement_leaves_the_old_one(
    ready: Enclave, point: str, exchange: dict[str, str | None], kind: str
) -> None:
    """Whatever writes the file, and however late it fails: the same file is there again."""
    ready.place(b"the old one", "out")
    (ready.folder / "other name").hardlink_to(ready.folder / "out")
    before = (ready.folder / "out").stat()
    arn = ready.world.kms.key_arn
    if kind == "message":
        ready.place(PLAINTEXT, "plain")
        encrypt = ("encrypt", "--key-id", arn, "--format", "esdk", "-f", "plain", "blob")
        assert ready.attestor(*encrypt).status == 0
    command: tuple[str, ...] = ("decrypt", "--any-key", "--force", "blob", "out")
    if kind == "encrypt":
        command = ("encrypt", "--key-id", arn, "--force", "blob", "out")
    run = ready.run(
        sys.executable, "-m", "tests.interrupt", point, "EIO", *command, environment=exchange
    )
    assert run.status == 7, run.err
    after = (ready.folder / "out").stat()
    same = ("st_ino", "st_nlink", "st_mode", "st_mtime_ns", "st_size")
    assert [getattr(after, name) for name in same] == [getattr(before, name) for name in same]
    assert {name for name in ready.files() if name.startswith(".")} == set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_kms_is_silent(
    enclaves: Callable[..., Enclave], number: signal.Signals
) -> None:
    enclave = enclaves(faults=["hang"])
    enclave.place(enclave.encrypt())
    child = subprocess.Popen(
        [sys.executable, "-m", "attestor", "decrypt", "-v", "--any-key", "blob", "out"],
        cwd=enclave.folder, env=enclave.environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with child:
        assert child.stderr is not None
        while "attestation document" not in (line := child.stderr.readline()):
            assert line
        child.send_signal(number)
        assert child.wait(timeout=60) == -number
    assert enclave.files() == {"blob"}


@pytest.mark.parametrize("exchange", [{}, {"NO_EXCHANGE": "1"}], ids=["exchange", "links"])
@pytest.mark.parametrize("kind", ["mkdir", "mkfifo"])
def test_what_comes_into_the_place_of_the_target_is_not_swallowed(
    ready: Enclave, kind: str, exchange: dict[str, str | None]
) -> None:
    """An exchange takes whatever has the name: a folder, too, which nobody could remove again."""
    ready.place(b"the old one", "out")
    program = (
        "import os\n"
        "from attestor_io import folder, secret_file\n"
        "from tests import interrupt\n"
        f"if {bool(exchange)}: folder._exchange = interrupt.without_exchange\n"
        "replace = secret_file.SecretFile._replace\n"
        "def late(self):\n"
        f"    os.unlink('out'); os.{kind}('out')\n"
        "    replace(self)\n"
        "secret_file.SecretFile._replace = late\n"
        "import attestor; attestor.main()"
    )
    command = ("decrypt", "--any-key", "--force", "blob", "out")
    run = ready.run(sys.executable, "-c", program, *command)
    if kind == "mkfifo" and exchange:  # a FIFO has links and renames as a file has
        return
    assert run.status == 7, run.err
    assert ready.files() == {"blob", "out"}
    assert not (ready.folder / "out").is_file()


def test_a_name_that_the_next_run_would_remove(ready: Enclave) -> None:
    run = ready.attestor("decrypt", "--any-key", "blob", ".attestor-0123456789abcdef")
    refused(ready, run, "such names are attestor's own", {"blob"})


def test_a_folder_that_somebody_keeps_locked(ready: Enclave) -> None:
    """Without the lock a living process's names would be taken for those of a dead one."""
    folder = os.open(ready.folder, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    refused(ready, ready.decrypt(), "Resource temporarily unavailable", {"blob"})
    os.close(folder)


# -- standard output


def test_a_reader_that_went_away(ready: Enclave) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "attestor", "decrypt", "--any-key", "blob", "-"],
        cwd=ready.folder, env=ready.environment, stdout=writer, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (7, b"")


def test_standard_output_that_is_closed_or_full(ready: Enclave) -> None:
    command = f"exec {sys.executable} -m attestor decrypt --any-key blob -"
    closed = ready.run("sh", "-c", f"{command} >&-")
    assert closed.status == 7
    assert closed.error == "standard output is closed"
    full = ready.run("sh", "-c", f"{command} >/dev/full")
    assert full.status == 7
    assert "No space left on device" in full.error


def test_the_core_limit_is_zero(ready: Enclave, tmp_path: Path) -> None:
    program = (
        "import attestor, resource, sys\n"
        "attestor.cli.main = lambda: "
        "print(resource.getrlimit(resource.RLIMIT_CORE)) or sys.exit(0)\n"
        "attestor.main()"
    )
    run = ready.run(
        "sh", "-c", f'ulimit -c unlimited; exec {sys.executable} -c "$1"', "sh", program
    )
    assert run.out == b"(0, 0)\n"
