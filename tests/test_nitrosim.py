"""The command `nitrosim`: a clean world around one command, and its exit status."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from nitrosim import parent
from nitrosim.kms import default_policy
from nitrosim.module import DEFAULT_PCRS
from nitrosim.world import FAULTS
from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping

BIN: Final = Path(sys.executable).parent
ENCRYPT: Final = (
    "import boto3; open('blob', 'wb').write(boto3.client('kms')"
    ".encrypt(KeyId='alias/nitrosim', Plaintext=b'the secret')['CiphertextBlob'])"
)


def nitrosim(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    path = f"{BIN}:{os.environ['PATH']}"
    return subprocess.run(
        [BIN / "nitrosim", *arguments],
        cwd=folder, env={**os.environ, "PATH": path, **(environment or {})},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def scene(*options: str) -> list[str]:
    """Encrypt under alias/nitrosim, then decrypt in an enclave with these options."""
    script = (
        f'umask 000; python3 -c "{ENCRYPT}" && '
        "attestor decrypt --any-key --region eu-west-1 blob out"
    )
    return ["run", *options, "--", "sh", "-c", script]


def test_the_main_job(tmp_path: Path) -> None:
    done = nitrosim(tmp_path, *scene())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out").read_bytes() == b"the secret"
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o600


def other_policy(folder: Path) -> str:
    text = default_policy(
        "arn:aws:sts::111122223333:assumed-role/nitrosim-enclave/nitrosim", bytes(47) + b"\1"
    )
    (folder / "policy.json").write_text(text, encoding="utf-8")
    return "policy.json"


@pytest.mark.parametrize(
    "options", ["--debug-mode", f"--pcr 0={'00' * 47}01", "--key-policy policy.json"]
)
def test_the_wrong_enclave_is_refused(tmp_path: Path, options: str) -> None:
    other_policy(tmp_path)
    done = nitrosim(tmp_path, *scene(*options.split()))
    assert (done.returncode, done.stdout) == (4, "")
    assert re.search(r"AccessDeniedException: .* \(request id [0-9a-f-]{36}\)", done.stderr)
    assert not (tmp_path / "out").exists()


def test_a_policy_and_an_enclave_that_fit(tmp_path: Path) -> None:
    done = nitrosim(
        tmp_path, *scene("--key-policy", other_policy(tmp_path), "--pcr", f"0={'00' * 47}01")
    )
    assert (done.returncode, done.stderr) == (0, "")


ATTESTED_PCRS: Final = """
import nsm
from nsm.document import AttestationDocument
with nsm.Nsm() as module:
    found = AttestationDocument.parse(module.attest())
print(*sorted(index for index, value in (found.pcrs or found.nitrotpm_pcrs).items() if any(value)))
"""


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ("", "0 1 2 3 4 8"),
        ("--pcr 3=0 --pcr 8=0", "0 1 2 4"),
        ("--pcr 3=0 --pcr 4=" + "0" * 96, "0 1 2 8"),
        ("--nitrotpm", "0 1 2 3 4 5 6 7 11 17 18 19 20 21 22"),
        ("--nitrotpm --tpm-pcr 7=0 --tpm-pcr 11=0", "0 1 2 3 4 5 6 17 18 19 20 21 22"),
    ],
)
def test_zeros_have_a_short_form(tmp_path: Path, options: str, left: str) -> None:
    command = (sys.executable, "-c", ATTESTED_PCRS)
    done = nitrosim(tmp_path, "run", *options.split(), "--", *command)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{left}\n", "")


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 42", 42), ("kill -TERM $$", 143)]
)
def test_the_status_is_the_commands_own(tmp_path: Path, script: str, status: int) -> None:
    assert nitrosim(tmp_path, "run", "--", "sh", "-c", script).returncode == status


def test_a_command_that_is_not_there_or_no_program(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    assert nitrosim(tmp_path, "run", "--", "./absent").returncode == 127
    assert nitrosim(tmp_path, "run", "--", "./text").returncode == 126


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--pcr", "0"], "N=HEX"),
        (["--pcr", "0=zz"], "hex"),
        (["--pcr", "0=000"], "hex"),
        (["--pcr", "32=0"], "the last is 31"),
        (["--pcr", "0=00"], ""),
        (["--pcr", f"99={'00' * 48}"], ""),
        (["--fault", "frobnicate"], "frobnicate"),
        (["--fault", "hang", "--fault", "reset"], "one layer"),
        (["--envelope", "frobnicate"], "frobnicate"),
        (["--principal", "me"], "'me' is not the ARN"),
        (["--key-policy", "absent"], "cannot be read"),
        (["--key-policy", "/dev/null"], ""),
        ([], "missing argument"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: list[str], part: str) -> None:
    command = ["--", "true"] if options else []
    done = nitrosim(tmp_path, "run", *options, *command)
    assert done.returncode == 2
    assert part in done.stderr.lower() or part in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_the_world_is_clean(tmp_path: Path) -> None:
    """No profile, configuration, proxy or CA of the host reaches the command."""
    host = {
        "AWS_PROFILE": "production", "AWS_ROLE_ARN": "arn:aws:iam::1:role/x",
        "HTTPS_PROXY": "http://proxy:1", "https_proxy": "http://proxy:1", "no_proxy": "*",
        "REQUESTS_CA_BUNDLE": "/host.pem", "HARMLESS": "kept",
    }  # fmt: skip
    program = "import json, os; print(json.dumps(dict(os.environ)))"
    done = nitrosim(tmp_path, "run", "--", sys.executable, "-c", program, environment=host)
    seen = json.loads(done.stdout)
    assert seen["HARMLESS"] == "kept"
    assert not {"AWS_PROFILE", "AWS_ROLE_ARN", "HTTPS_PROXY", "https_proxy", "no_proxy"} & set(seen)
    assert seen["REQUESTS_CA_BUNDLE"] == seen["AWS_CA_BUNDLE"]
    assert seen["AWS_REGION"] == "eu-west-1"
    assert seen["AWS_ENDPOINT_URL_KMS"].startswith("https://")


def test_keys_are_new_in_each_run(tmp_path: Path) -> None:
    assert nitrosim(tmp_path, *scene()).returncode == 0
    (tmp_path / "out").unlink()
    done = nitrosim(tmp_path, "run", "--", "attestor", "decrypt", "--any-key", "blob", "out")
    assert done.returncode == 4


def test_a_principal_of_ones_own(tmp_path: Path) -> None:
    done = nitrosim(
        tmp_path, "run", "--principal", "arn:aws:iam::444455556666:role/mine", "--",
        "attestor", "decrypt", "--any-key", "/dev/zero", "out",
    )  # fmt: skip
    assert done.returncode == 2
    assert (
        nitrosim(tmp_path, *scene("--principal", "arn:aws:iam::444455556666:role/mine")).returncode
        == 0
    )


def in_served_world(folder: Path) -> subprocess.CompletedProcess[str]:
    """The main job in a shell that reads simulator.env."""
    script = (
        f'. ./simulator.env; "{sys.executable}" -c "{ENCRYPT}" && '
        f'"{BIN}/attestor" decrypt --any-key blob out'
    )
    return subprocess.run(
        ["sh", "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )


def test_serve_prints_the_environment_and_stays(tmp_path: Path) -> None:
    with subprocess.Popen(
        [BIN / "nitrosim", "serve"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        lines: list[str] = []
        while not any("NITROSIM_NSM_SOCKET=" in line for line in lines):
            line = server.stdout.readline()
            assert line
            lines.append(line)
        (tmp_path / "simulator.env").write_text("".join(lines))
        done = in_served_world(tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0


def test_serve_in_the_background_as_the_documents_say(tmp_path: Path) -> None:
    """The ready file is whole when it is there, whatever an earlier server left, and goes with the
    server.
    """
    text = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh\n(nitrosim serve --ready-file.*?)```", text, re.DOTALL)
    rest = f"""
        stat -c %a simulator.env
        "{sys.executable}" -c "{ENCRYPT}" && "{BIN}/attestor" decrypt --any-key blob out
        kill $! && LD_PRELOAD= wait $!
        echo $?
    """
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-ec", block + rest],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "600\n0\n", "")
    assert {path.name for path in tmp_path.iterdir()} == {"blob", "out"}


@pytest.mark.parametrize(
    ("path", "reason"), [("absent/file", "No such file or directory"), (".", "Is a directory")]
)
def test_a_ready_file_that_cannot_be(tmp_path: Path, path: str, reason: str) -> None:
    done = nitrosim(tmp_path, "serve", "--ready-file", path)
    assert done.returncode == 2
    assert done.stderr == f"nitrosim: error: --ready-file {path}: {reason}\n"


def test_a_server_that_cannot_start_leaves_no_ready_file(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("of a server that was killed")
    done = nitrosim(tmp_path, "serve", "--ready-file", "old", "--fault", "frobnicate")
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])


@pytest.mark.parametrize(
    ("loops", "machines", "told"),
    [
        (True, False, []),
        (True, True, []),
        (False, True, [r"no program .* modprobe vsock_loopback; a virtual machine reaches them"]),
        (
            False,
            False,
            ["no program .* modprobe vsock_loopback", "no virtual machine .*vhost_vsock"],
        ),
    ],
)
def test_whom_vsock_is_out_of_reach_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loops: bool, machines: bool, told: list[str]
) -> None:
    monkeypatch.setattr(parent, "_loops_back", lambda: loops)
    monkeypatch.setattr(parent, "_VIRTUAL_MACHINES", tmp_path if machines else tmp_path / "absent")
    found = parent.unreachable()
    assert len(found) == len(told)
    for line, pattern in zip(found, told, strict=True):
        assert re.search(pattern, line)


def test_vsock_without_a_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, where a call to context id 1 goes to the hypervisor, or nowhere at all."""

    class NoLoopback(socket.socket):
        def __init__(self, *_: object) -> None:
            super().__init__(socket.AF_INET, socket.SOCK_STREAM)

        def bind(self, _address: object) -> None:
            super().bind(("127.0.0.1", 0))

        def connect(self, _address: object) -> None:
            raise TimeoutError

    monkeypatch.setattr(socket, "socket", NoLoopback)
    assert not parent._loops_back()


@pytest.mark.vsock
def test_vsock_with_a_loopback() -> None:
    assert parent.unreachable() == []


def test_the_commands_in_the_documents(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh\n(echo 'the secret'.*?)```", text, re.DOTALL)
    preparation, commands = block.split("nitrosim run", 1)
    statuses = []
    for command in ("nitrosim run" + commands).splitlines():
        script = preparation + command
        environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "AWS_MAX_ATTEMPTS": "2"}
        done = subprocess.run(
            ["sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        statuses.append(done.returncode)
    assert statuses == [0, 4, 5, 4]
    assert (tmp_path / "out").read_text() == "the secret\n"


def test_another_user_finds_the_module_and_the_roots(tmp_path: Path) -> None:
    """After setpriv, say: what lies in root's home is not there for anybody else."""
    script = """
        for path in "$LD_PRELOAD" "$NITROSIM_NSM_SOCKET" "$AWS_CA_BUNDLE" "$NITROSIM_NSM_ROOT"; do
            stat -Lc '%A %n' "$path"
            while path=$(dirname "$path") && test "$path" != /; do stat -Lc '%A %n' "$path"; done
        done
    """
    done = nitrosim(
        tmp_path, "run", "--", "sh", "-ec", f"umask 077; {script}",
        environment={"XDG_CACHE_HOME": str(tmp_path / "private"), "LD_PRELOAD": ""},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    for line in done.stdout.splitlines():
        mode, path = line.split(" ", 1)
        assert mode[9] in "xt" if mode[0] == "d" else mode[7] == "r", path
        assert mode[8] == "-" or mode[0] == "s" or mode[9] == "t", f"planted at {path}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
def test_a_program_that_becomes_another_user(tmp_path: Path) -> None:
    script = ': < /dev/nsm && test -c /dev/nsm && cat "$AWS_CA_BUNDLE" > /dev/null'
    other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    done = nitrosim(tmp_path, "run", "--", *other, "sh", "-c", script)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_version_of_moto(tmp_path: Path) -> None:
    (tmp_path / "moto" / "utilities").mkdir(parents=True)
    for module in ("", "utilities/", "utilities/utils/"):
        (tmp_path / "moto" / module).mkdir(exist_ok=True)
        (tmp_path / "moto" / module / "__init__.py").touch()
    done = nitrosim(tmp_path, "faults", environment={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert re.search("needs (another version of )?moto: install .* the extra sim", done.stderr)


def test_faults_are_listed(tmp_path: Path) -> None:
    done = nitrosim(tmp_path, "faults")
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(FAULTS)


def test_the_default_policy_asks_for_the_default_image() -> None:
    principal = "arn:aws:sts::111122223333:assumed-role/nitrosim-enclave/nitrosim"
    assert DEFAULT_PCRS[0].hex() in default_policy(principal, DEFAULT_PCRS[0])


def test_the_demo_shows_both_ends() -> None:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        [ROOT / "nitrosim" / "demo.sh"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for part in (
        "600 20 bytes secret",
        "the secret of node 3",
        "AccessDeniedException",
        "exit status 4",
    ):
        assert part in done.stdout
