"""`make eif-test`: enclave images boot in QEMU's nitro-enclave machine, from the file on.

The parent is this machine: nitrosim's services stand behind the vsock ports that the enclave knows,
which vhost-device-vsock leads to Unix sockets here. The module is QEMU's, over virtio and the
kernel's own driver. It measures the file as the hypervisor does, and signs nothing, so that nobody
takes a document of it: attestor itself does not, nor does KMS. What KMS allows is rehearsed in the
same enclave with nitrosim's module, which has the PCRs that `attestor eif describe` finds.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import pytest
from botocore.exceptions import ClientError

from nitrosim.device import build_shim
from nitrosim.kms import role_of
from nitrosim.module import DEFAULT_MODULE_ID, ZERO_PCR, SoftwareNsm, extended, instance_of
from nitrosim.parent import Parent, collect, forward_to
from nitrosim.world import World
from tests.conftest import ROOT, Enclave
from tests.vm.test_enclave import Console

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nitrosim.parent import Own, Service

pytestmark = pytest.mark.eif

CACHE: Final = ROOT / ".cache/image"
PROJECTS: Final = CACHE / "attestor-enclave.eif"
HERE: Final = ROOT / "tests/eif_vm"
BINARIES: Final = Path(os.environ.get("ATTESTOR_EIF_MACHINE", "/nonexistent"))
HEARTBEAT: Final = b"\xb7"
HEARTBEAT_PORT: Final = 9000
MODULE_PORT: Final = 8004
MEMORY: Final = 512  # MiB
PATIENCE: Final = 600  # seconds for one machine, software emulation
SECRET: Final = b"a key of twenty bytes"
STEPS: Final = ("network", "module", "region", "node", "inject", "program")
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
"""


def attestor(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "attestor", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done


def measured(eif: Path) -> dict[int, bytes]:
    """What `attestor eif describe` finds, by the number of the PCR."""
    found = json.loads(attestor("eif", "describe", "--json", str(eif)).stdout)["Measurements"]
    return {
        int(name.removeprefix("PCR")): bytes.fromhex(value)
        for name, value in found.items()
        if name.startswith("PCR")
    }


class Host:
    """The parent instance: nitrosim's services, and machines that reach them over vsock."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.folder = folder
        self.role = role_of(world.kms.principal)
        self.instance = instance_of(DEFAULT_MODULE_ID)
        self.heartbeats: list[bytes] = []
        self.alive = 0.0
        self.status_lines: list[dict[str, Any]] = []
        self.module = world.module

    def expected(self, eif: Path) -> dict[int, bytes]:
        """PCR0 to PCR15 of this image on this instance."""
        own = {
            3: extended(ZERO_PCR, self.role.encode()),
            4: extended(ZERO_PCR, self.instance.encode()),
        }
        return dict.fromkeys(range(16), ZERO_PCR) | own | measured(eif)

    def boot(self, eif: Path) -> Console:
        """Boot it to its end; the console stays in .cache/image."""
        self.heartbeats.clear()
        self.status_lines.clear()
        console = Console()
        # what a Unix socket may be called is short
        with tempfile.TemporaryDirectory(prefix="eif-") as name:
            sockets = Path(name)
            with Parent(self._services(sockets / "parent")), self._vsock(sockets) as wire:
                start = time.monotonic()
                self.alive = -start
                log = (CACHE / f"console-{eif.stem}-eif.log").open("w", encoding="utf-8")
                with log, self._machine(eif, wire) as process:
                    assert process.stdout is not None
                    for line in process.stdout:
                        print(line.rstrip("\r\n"), file=log, flush=True)
                        console.lines.append((time.monotonic() - start, line.rstrip("\r\n")))
                console.status = process.returncode
        return console

    def _services(self, path: Path) -> Iterator[tuple[socket.socket, Service]]:
        """Each vsock port of context id 3, as vhost-device-vsock names it."""
        url = self.world.metadata_url
        assert url is not None
        metadata = urlsplit(url).port
        assert metadata is not None
        services: dict[int, Service] = {
            8000: forward_to(self.world.port),
            8001: forward_to(self.world.port),
            8002: forward_to(metadata),
            8003: collect(lambda line: self.status_lines.append(json.loads(line))),
            MODULE_PORT: self._answer,
            HEARTBEAT_PORT: self._beat,
        }
        for port, service in services.items():
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"{path}_{port}")
            listener.listen()
            yield listener, service

    def _beat(self, connection: socket.socket, _own: Own) -> None:
        self.alive += time.monotonic()
        self.heartbeats.append(connection.recv(16))
        connection.sendall(HEARTBEAT)

    def _answer(self, connection: socket.socket, _own: Own) -> None:
        with connection.makefile("rb") as source:
            answer = self.module.answer(source.read(int.from_bytes(source.read(4))))
        connection.sendall(len(answer).to_bytes(4) + answer)

    @contextlib.contextmanager
    def _vsock(self, sockets: Path) -> Iterator[Path]:
        """The device that QEMU's machine wants on the other end of a socket."""
        wire = sockets / "wire"
        of_machine = f"guest-cid=4,socket={wire},uds-path={sockets}/parent"
        log = (self.folder / "vsock.log").open("wb")
        with (
            log,
            subprocess.Popen(
                [*binary("vhost-device-vsock"), "--vm", of_machine], stdout=log, stderr=log
            ) as device,
        ):
            end = time.monotonic() + 20
            while not wire.exists():
                assert device.poll() is None, (self.folder / "vsock.log").read_text()
                assert time.monotonic() < end
            try:
                yield wire
            finally:
                device.terminate()

    def _machine(self, eif: Path, wire: Path) -> subprocess.Popen[str]:
        options = (
            f"vsock=wire,id={DEFAULT_MODULE_ID},parent-role={self.role},parent-id={self.instance}"
        )
        command = ["timeout", "--foreground", str(PATIENCE), *binary("qemu-system-x86_64")]
        command += ["-L", str(BINARIES / "data"), "-accel", "tcg,thread=multi", "-cpu", "max"]
        command += ["-M", f"nitro-enclave,{options}", "-m", str(MEMORY), "-kernel", str(eif)]
        command += ["-chardev", f"socket,id=wire,path={wire}", "-no-reboot", "-nographic"]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )


def binary(name: str) -> list[str]:
    """The command of what was built in a Debian of its own, with the libraries of that."""
    loader = BINARIES / "lib/ld-linux-x86-64.so.2"
    return [str(loader), "--library-path", str(BINARIES / "lib"), str(BINARIES / name)]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with World(tags={"mpa-node": "3"}) as world:
        yield Host(world, tmp_path_factory.mktemp("host"))


@pytest.fixture
def operator(host: Host, tmp_path: Path) -> Enclave:
    return Enclave(host.world, tmp_path)


def test_the_projects_image_boots_and_attests_what_was_measured(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `make eif` makes, as it is: no manifest is in it, so that the entrypoint ends there."""
    console = host.boot(PROJECTS)
    assert host.heartbeats == [HEARTBEAT]
    told = [(line["step"], line["status"]) for line in host.status_lines]
    assert told == [*((step, 0) for step in STEPS[:4]), ("inject", 2)], console.text
    (module,) = (line for line in host.status_lines if line["step"] == "module")
    assert module["module_id"] == DEFAULT_MODULE_ID
    assert module["pcrs"] == {
        str(index): value.hex() for index, value in host.expected(PROJECTS).items() if any(value)
    }
    assert console.said("init: /usr/local/bin/entrypoint ended with status ") == ["2"]
    report(host, console, "the project's image", "entrypoint: module: ok", capsys)


def test_from_a_file_to_an_allowed_and_a_refused_decrypt(
    host: Host, operator: Enclave, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signed image of a user's, the policy that its file gives, and the decisions of KMS."""
    key_id = operator.kms.create_key()["KeyMetadata"]["Arn"]
    sealed = operator.kms.encrypt(KeyId=key_id, Plaintext=SECRET, EncryptionContext={"node": "3"})[
        "CiphertextBlob"
    ]
    host.world.store.objects["bucket/node-3/key.enc"] = sealed
    eif = image_of_a_user(tmp_path, key_id, Path(operator.environment["AWS_CA_BUNDLE"]))
    admin = host.role.replace("nitrosim-enclave", "admin")
    principals = ("--principal", host.role, "--admin", admin)
    policy = attestor("policy", "render", *principals, "--eif", str(eif), "--take", "8").stdout
    operator.kms.put_key_policy(KeyId=key_id, PolicyName="default", Policy=policy)
    expected = host.expected(eif)
    host.module = SoftwareNsm(host.world.module._pki, pcrs=expected)
    console = host.boot(eif)
    described(console, expected)
    refused_by_kms(operator, sealed, refused_document(console, tmp_path))
    inject = [line for line in host.status_lines if line["step"] == "inject"]
    assert [line["status"] for line in inject] == [6, 0], console.text
    assert inject[1]["request_id"]
    assert console.said("scenario: status ") == ["6 with the module of QEMU"]
    secret = hashlib.sha256(SECRET).hexdigest()
    assert console.said("program: ") == [f"user 1000, node 3, secret {secret}"]
    assert console.said("init: /usr/local/bin/scenario ended with status ") == ["42"]
    report(host, console, "a user's image", "program: ", capsys)


def image_of_a_user(folder: Path, key_id: str, roots: Path) -> Path:
    """The project's image with what a user's adds, as a signed file."""
    root, eif = folder / "root.tar", folder / "user.eif"
    shutil.copyfile(CACHE / "attestor-enclave.tar", root)
    manifest = MANIFEST.format(key_id=key_id).encode()
    with tarfile.open(root, "a") as archive:
        add(archive, "etc/attestor/manifest.toml", manifest)
        add(archive, "etc/attestor/aws-roots.pem", roots.read_bytes())
        for name in ("scenario", "program"):
            add(archive, f"usr/local/bin/{name}", (HERE / name).read_bytes(), 0o755)
        add(archive, "usr/local/lib/nitrosim/relay", (HERE / "relay.py").read_bytes(), 0o755)
        add(archive, "usr/local/lib/nitrosim/shim.so", build_shim().read_bytes())
    variables = (CACHE / "eif-environment").read_text().split("\n")
    environment = [word for line in variables if line for word in ("--env", line)]
    command = ["--root", str(root), "--command", '["/usr/local/bin/scenario"]', *environment]
    signing = folder / "signing"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for script, *arguments in (
        ("enclave/build-eif", *command, str(eif)),
        ("enclave/parent/make-signing-key", str(signing)),
    ):
        subprocess.run(
            [ROOT / script, *arguments],
            env={**os.environ, "PATH": path},
            check=True,
            stdout=subprocess.DEVNULL,
        )
    keys = ("--key", str(signing / "key.pem"), "--certificate", str(signing / "cert.pem"))
    attestor("eif", "sign", *keys, str(eif))
    return eif


def add(archive: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), mode
    archive.addfile(member, io.BytesIO(data))


def described(console: Console, expected: dict[int, bytes]) -> None:
    (text,) = console.said("scenario: described ")
    found = json.loads(text)
    assert found["module_id"] == DEFAULT_MODULE_ID
    assert found["debug_mode"] is False
    assert [int(index) for index, pcr in found["pcrs"].items() if pcr["locked"]] == [*range(16)]
    assert {int(index): pcr["value"] for index, pcr in found["pcrs"].items()} == {
        index: expected.get(index, ZERO_PCR).hex() for index in range(32)
    }


def refused_document(console: Console, folder: Path) -> bytes:
    """A document of QEMU's module, which holds the right PCRs, is none for anybody."""
    (text,) = console.said("scenario: document ")
    document = folder / "document"
    document.write_bytes(base64.b64decode(text))
    refused = attestor("verify", "--nonce", "00ff", "--any-image", str(document), status=6)
    assert "signature has 64 bytes, expected 96" in refused.stderr
    return document.read_bytes()


def refused_by_kms(operator: Enclave, sealed: bytes, document: bytes) -> None:
    algorithm = "RSAES_OAEP_SHA_256"
    asked: dict[str, Any] = {
        "CiphertextBlob": sealed,
        "EncryptionContext": {"node": "3"},
        "Recipient": {"KeyEncryptionAlgorithm": algorithm, "AttestationDocument": document},
    }
    with pytest.raises(ClientError, match="ValidationException"):
        operator.kms.decrypt(**asked)


def report(
    host: Host, console: Console, what: str, last: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print(
            f"\neif-test: {what}: {host.alive:.1f} s to the heartbeat, {console.when(last):.1f} s "
            f"to '{last.strip()}', {console.lines[-1][0]:.1f} s to the end; {MEMORY} MiB"
        )
