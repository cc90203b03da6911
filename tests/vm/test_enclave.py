"""`make vm-test`: the image's root and entrypoint under a real character device and real vsock.

The guest's root is the image (tests/vm/init); these tests run in the parent's root beside it. An
enclave is that root behind an overlay, in namespaces of its own: no network but the loopback, which
is down, and vsock to the parent, here CID 1. The program is the one that the user's image of
tests/vm/Dockerfile names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from nitrosim.kms import default_policy
from nitrosim.module import DEFAULT_MODULE_ID
from nitrosim.world import World
from tests.conftest import ROOT, Enclave

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

pytestmark = pytest.mark.vm

IMAGE: Final = Path("/enclave")
CGROUPS: Final = Path("/sys/fs/cgroup")
KEY: Final = b"a key of twenty bytes"
# above KMS's 4096 bytes: a message of the AWS Encryption SDK
LARGE: Final = bytes(range(256)) * 400
CONFIG: Final = b"[server]\nport = 80\n"
SOCAT: Final = (IMAGE / "usr/bin/socat").exists()
NETWORK: Final = "socat" if SOCAT else "vsock"
S3: Final = "bucket.s3.eu-west-1.amazonaws.com"
MANIFEST: Final = """
key_id = "{key_id}"
[variables]
NODE = "[0-9]{{1,4}}"
[[secret]]
source = "s3://bucket/node-${{NODE}}/key.enc"
target = "/run/secrets/key"
context = {{ node = "${{NODE}}" }}
owner = "app:app"
mode = "0400"
[[secret]]
source = "s3://bucket/large.esdk"
target = "/run/secrets/large"
unbound = true
owner = "app:app"
mode = "0400"
[[secret]]
source = "s3://bucket/node-${{NODE}}/key.enc"
target = "/run/secrets/other"
context = {{ node = "${{NODE}}" }}
[[file]]
source = "s3://bucket/app.toml"
target = "/run/secrets/config"
sha256 = "{sha256}"
mode = "0444"
world_readable = true
"""


@dataclass
class Console:
    """What an enclave said, by seconds since its start; its exit status; its peak of memory."""

    lines: list[tuple[float, str]] = field(default_factory=list)
    status: int = -1
    peak: int = 0

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def said(self, prefix: str) -> list[str]:
        """The rest of each line that begins so."""
        return [line.removeprefix(prefix) for _, line in self.lines if line.startswith(prefix)]

    def when(self, prefix: str) -> float:
        """Seconds from the start to the first such line."""
        return next(moment for moment, line in self.lines if line.startswith(prefix))


class Machine:
    """The parent: nitrosim with device, metadata service and vsock; and enclaves of the image."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.operator = Enclave(world, folder)
        self._count = 0

    def manifest(self, key_id: str | None = None) -> str:
        return MANIFEST.format(
            key_id=key_id or self.world.kms.key_arn, sha256=hashlib.sha256(CONFIG).hexdigest()
        )

    def status_lines(self, since: int) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.world.status_lines[since:]]

    def enclave(
        self, *command: str, manifest: str | None = None, library: bool = True, **settings: str
    ) -> Console:
        """Run the image's command, or the one given, in a new enclave with these settings."""
        with self._root() as root:
            (root / "etc/attestor/manifest.toml").write_text(manifest or self.manifest())
            (root / "etc/attestor/aws-roots.pem").write_bytes(
                Path(self.operator.environment["AWS_CA_BUNDLE"]).read_bytes()
            )
            names = {
                "ATTESTOR_PARENT_CID": "1",
                "ATTESTOR_NETWORK": NETWORK,
                "ATTESTOR_HOSTS": f"{S3}=8001",
                **settings,
            }
            (root / "etc/attestor/enclave.conf").write_text(
                "".join(f"{name}={value}\n" for name, value in names.items())
            )
            if not library:
                next(root.glob("usr/local/lib/python3*/dist-packages/nsm/libnsm.so")).unlink()
            return self._run(root, command or tuple((ROOT / "vm-command").read_text().split()))

    @contextlib.contextmanager
    def _root(self) -> Iterator[Path]:
        self._count += 1
        home = Path(f"/mnt/{self._count}")
        for name in ("upper", "work", "root"):
            (home / name).mkdir(parents=True)
        root = home / "root"
        options = f"lowerdir={IMAGE},upperdir={home}/upper,workdir={home}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(root)], check=True)
        try:
            yield root
        finally:
            subprocess.run(["umount", "--recursive", "--lazy", str(root)], check=True)

    def _run(self, root: Path, command: tuple[str, ...]) -> Console:
        group = CGROUPS / f"enclave-{self._count}"
        group.mkdir()
        variables = (ROOT / "vm-environment").read_text().split("\n")
        inside = (
            f"echo 0 >{group}/cgroup.procs && mount -t proc proc {root}/proc && "
            f"mount --rbind /dev {root}/dev && "
            f'exec chroot {root} /usr/bin/env -i "$@"'
        )
        names = [
            "unshare",
            "--net",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount",
            "--ipc",
            "--uts",
            "sh",
            "-c",
            inside,
            "sh",
        ]
        console = Console()
        start = time.monotonic()
        with subprocess.Popen(
            [*names, *filter(None, variables), *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            for line in process.stdout:
                console.lines.append((time.monotonic() - start, line.rstrip("\n")))
        console.status = process.returncode
        console.peak = int((group / "memory.peak").read_text())
        print(console.text)
        return console


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    (CGROUPS / "cgroup.subtree_control").write_text("+memory")
    with World(device=Path("/dev/nsm"), tags={"mpa-node": "3"}, vsock=True) as world:
        made = Machine(world, tmp_path_factory.mktemp("operator"))
        made.operator.place(LARGE, "plain")
        sealing = made.operator.attestor("encrypt", "--key-id", world.kms.key_arn, "plain", "large")
        assert sealing.status == 0, sealing.err
        world.store.objects |= {
            "bucket/node-3/key.enc": made.operator.encrypt(KEY, node="3"),
            "bucket/large.esdk": (made.operator.folder / "large").read_bytes(),
            "bucket/app.toml": CONFIG,
        }
        yield made


def file_line(name: str, mode: str, owner: str, data: bytes) -> str:
    return f"{name} {mode} {owner} {hashlib.sha256(data).hexdigest()}"


@pytest.mark.parametrize("library", [True, False], ids=["library", "device"])
def test_secrets_reach_the_program(
    machine: Machine, library: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(machine.world.status_lines)
    console = machine.enclave(library=library)
    assert console.status == 42, "the program's own status"
    assert console.said("program: user ") == ["1000 1000 1000"]
    assert console.said("program: file ") == [
        file_line("key", "400", "1000:1000", KEY),
        file_line("large", "400", "1000:1000", LARGE),
        file_line("config", "444", "0:0", CONFIG),
    ]
    assert (
        console.said("program: read ")
        == console.said("program: listed ")
        == console.said("program: secret ")
        == []
    )
    assert console.said("program: node ") == ["3"]
    privileges = dict(line.split(":\t") for line in console.said("program: ") if ":\t" in line)
    assert privileges.pop("NoNewPrivs") == "1"
    assert set(privileges.values()) == {"0" * 16}
    assert not {
        name for name in console.said("program: variable ") if "KEY" in name or "TOKEN" in name
    }
    told(machine, before, console)
    with capsys.disabled():
        report(console, f"{NETWORK}, {'patched library' if library else 'bare device'}")


def told(machine: Machine, before: int, console: Console) -> None:
    """The parent knows what happened, and no more."""
    lines = machine.status_lines(before)
    assert [(line["step"], line["status"]) for line in lines] == [
        (step, 0) for step in ("network", "module", "region", "node", "inject", "program")
    ], console.text
    fields = {"version", "step", "status", "attempt", "request_id", "module_id", "pcrs"}
    assert set().union(*lines) <= fields
    inject = next(line for line in lines if line["step"] == "inject")
    assert inject["request_id"]
    assert inject["pcrs"]["0"] == machine.world.module.pcrs[0].hex()
    text = "\n".join(machine.world.status_lines)
    credentials = machine.world.kms.credentials
    assert not {
        word for word in (KEY.decode(), credentials.secret_key, credentials.token) if word in text
    }


def report(console: Console, what: str) -> None:
    booted = float((IMAGE / ".booted").read_text())
    secrets = console.when("entrypoint: inject: ok")
    root = int(
        subprocess.run(
            ["du", "-smx", str(IMAGE)], capture_output=True, text=True, check=True
        ).stdout.split()[0]
    )
    print(
        f"\nvm-test: {what}: kernel start to first process {booted:.1f} s, "
        f"from there to secrets in place {secrets:.1f} s, together {booted + secrets:.1f} s; "
        f"peak memory {console.peak / 2**20:.0f} MiB beside a root of {root} MiB"
    )


@pytest.mark.parametrize("library", [True, False], ids=["library", "device"])
def test_describe_and_doctor(machine: Machine, library: bool) -> None:
    described = machine.enclave("/usr/local/bin/attestor", "describe", "-v", library=library)
    assert described.status == 0
    assert ("libnsm.so (ABI 1)" in described.text) is library
    assert library or "/dev/nsm" in described.text
    assert DEFAULT_MODULE_ID in described.text
    if SOCAT:
        return  # without the entrypoint nothing carries the doctor's connections
    way = ["--vsock", "1:8000", "--imds-vsock", "1:8002", "--key-id", machine.world.kms.key_arn]
    doctor = machine.enclave("/usr/local/bin/attestor", "doctor", *way, library=library)
    assert doctor.status == 0, doctor.text


def test_a_wrong_pcr_stops_the_enclave(machine: Machine) -> None:
    """A key whose policy wants another image: status 4, at once, and no program."""
    policy = default_policy(machine.world.kms.principal, bytes.fromhex("ab" * 48))
    key_id = machine.operator.kms.create_key(Policy=policy)["KeyMetadata"]["Arn"]
    blob = machine.operator.kms.encrypt(
        KeyId=key_id, Plaintext=KEY, EncryptionContext={"node": "3"}
    )["CiphertextBlob"]
    objects: Mapping[str, bytes] = dict(machine.world.store.objects)
    machine.world.store.objects["bucket/node-3/key.enc"] = blob
    before = len(machine.world.status_lines)
    try:
        console = machine.enclave(manifest=machine.manifest(key_id))
    finally:
        machine.world.store.objects |= objects
    assert console.status == 4, console.text
    assert console.said("program: ") == []
    last = machine.status_lines(before)[-1]
    assert (last["step"], last["status"], last["attempt"]) == ("inject", 4, 1)
    assert last["request_id"]


def test_an_unreachable_parent_is_tried_until_the_deadline(machine: Machine) -> None:
    console = machine.enclave(
        AWS_REGION="eu-west-1", ATTESTOR_NODE_TAG="", ATTESTOR_METADATA_PORT="9002",
        ATTESTOR_KMS_PORT="9000", ATTESTOR_S3_PORT="9001", ATTESTOR_DEADLINE="60",
        ATTESTOR_HOSTS=f"{S3}=9001", manifest=machine.manifest().replace("${NODE}", "3"),
    )  # fmt: skip
    assert console.status == 5, console.text
    assert console.said("program: ") == []
    assert len(console.said("entrypoint: inject: status 5")) >= 2
    assert console.lines[-1][0] >= 60


def test_a_missing_tag_stops_the_enclave(machine: Machine) -> None:
    before = len(machine.world.status_lines)
    console = machine.enclave(ATTESTOR_NODE_TAG="no-such-tag")
    assert console.status == 4, console.text
    assert "--instance-metadata-tags enabled" in console.text
    assert [line["step"] for line in machine.status_lines(before)] == [
        "network",
        "module",
        "region",
        "node",
    ]


def test_what_the_image_holds() -> None:
    """No setuid file, history, compiler, installer or network tool; no sources but our own."""
    found = [Path(folder, name) for folder, _, names in _image() for name in names]
    assert len(found) > 1000
    assert [path for path in found if not path.is_symlink() and path.stat().st_mode & 0o6000] == []
    names = {path.name for path in found}
    assert not names & {
        "pip",
        "pip3",
        "gcc",
        "cc",
        "as",
        "ld",
        "cargo",
        "rustc",
        "apt",
        "dpkg",
        "su",
        "sudo",
        "wget",
        "nc",
        "telnet",
        "httpd",
        "insmod",
        "chroot",
        ".bash_history",
    }
    assert [path for path in found if {"pip", "setuptools"} & set(path.parts)] == []
    ours = {"attestor.py", "attestor_commands", "attestor_eif", "attestor_io", "keypolicy", "nsm"}
    sources = [path for path in found if path.suffix == ".py"]
    assert IMAGE / "usr/local/lib" in {parent for path in sources for parent in path.parents}
    assert [path for path in sources if not ours & set(path.parts)] == []
    roots = (IMAGE / "etc/attestor/aws-roots.pem").read_text()
    assert roots.count("BEGIN CERTIFICATE") == 5


def _image() -> Iterator[tuple[str, list[str], list[str]]]:
    device = IMAGE.stat().st_dev
    for folder, folders, names in os.walk(IMAGE):
        folders[:] = [
            one
            for one in folders
            if Path(folder, one).lstat().st_dev == device and one != ".modules"
        ]
        yield folder, folders, names
