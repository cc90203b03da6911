"""The enclave's entrypoint, run as it is by busybox and dash, and what it tells the parent."""

from __future__ import annotations

import grp
import importlib.machinery
import importlib.util
import json
import os
import pwd
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.wrappers import Response

from attestor_commands.inject.program import CREDENTIALS
from nitrosim.metadata import MetadataService
from nitrosim.server import HttpServer
from tests.conftest import ROOT, Run, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from tests.conftest import Enclave

ENTRYPOINT: Final = ROOT / "enclave" / "entrypoint.sh"
TELL_PARENT: Final = ROOT / "enclave" / "tell-parent"
(_APPLETS,) = re.findall(
    r'^applets="([^"]*)"$',
    (ROOT / "enclave" / "assemble").read_text(encoding="utf-8"),
    re.MULTILINE,
)
APPLETS: Final = _APPLETS.split()
SHELLS: Final = [shell for shell in ("busybox", "dash") if shutil.which(shell)] or ["sh"]
AS_ROOT: Final = os.getuid() == 0
USER: Final = pwd.getpwnam("nobody") if AS_ROOT else pwd.getpwuid(os.getuid())
STEPS: Final = ("network", "module", "region", "node", "inject")
SETPRIV: Final = shutil.which("setpriv") or "/usr/bin/setpriv"
Environment = dict[str, str | None]


class Image:
    """What the enclave image holds, in folders of this host; steps and statuses are recorded."""

    def __init__(
        self, enclave: Enclave, shell: str, folder: Path, blob: bytes | None = None
    ) -> None:
        self.enclave = enclave
        self.shell = shell
        self.secrets = folder / "secrets"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.configuration = enclave.folder / "enclave.conf"
        self._log, self._calls = enclave.folder / "told", enclave.folder / "calls"
        self._install()
        self._manifest(blob or enclave.encrypt(node="3"))

    def _install(self) -> None:
        if self.shell == "busybox":  # the image's applets, and nothing of this host but setpriv
            for applet in APPLETS:
                (self.bin / applet).symlink_to(shutil.which("busybox") or "")
        (self.bin / "setpriv").symlink_to(SETPRIV)
        self.program(
            "attestor",
            f'#!/bin/sh\necho "$@" >>{self._calls}\nexec {sys.executable} -m attestor "$@"\n',
        )
        telling = (
            f"#!{sys.executable}\nimport importlib.machinery, sys\nsys.dont_write_bytecode = True\n"
            f"loader = importlib.machinery.SourceFileLoader('tell', {str(TELL_PARENT)!r})\n"
            "module = loader.load_module()\n"
            f"told = open({str(self._log)!r}, 'ab')\n"
            "module.send = lambda address, text: told.write(address.encode() + b' ' + text)\n"
            "module.main(sys.argv[1:])\n"
        )
        self.program("tell-parent", telling)

    def _manifest(self, ciphertext: bytes) -> None:
        blob = self.enclave.folder / self.enclave.place(ciphertext)
        owner = f'owner = "{USER.pw_uid}"\n' if AS_ROOT else ""
        self.enclave.place(
            f'key_id = "{self.enclave.world.kms.key_arn}"\n[variables]\nNODE = "[0-9]{{1,4}}"\n'
            f'[[secret]]\nsource = "{blob}"\ntarget = "{self.secrets}/key"\n{owner}'
            'context = { node = "${NODE}" }\n'.encode(),
            "manifest.toml",
        )

    def program(self, name: str, text: str) -> None:
        """Put a program into the image."""
        (self.bin / name).write_text(text, encoding="utf-8")
        (self.bin / name).chmod(0o755)

    def run(
        self,
        *program: str,
        environment: Mapping[str, str | None] | None = None,
        prefix: Iterable[str] = (),
    ) -> Run:
        """Run the entrypoint; a variable of None is not there."""
        path = str(self.bin) if self.shell == "busybox" else f"{self.bin}:{os.environ['PATH']}"
        shell = [
            shutil.which(self.shell) or self.shell,
            *(["sh"] if self.shell == "busybox" else []),
        ]
        inside: Environment = {
            "PATH": path,
            "AWS_REGION": None,
            "AWS_DEFAULT_REGION": None,
            "AWS_MAX_ATTEMPTS": "1",
            "ATTESTOR_NETWORK": "none",
            "ATTESTOR_CONFIG": str(self.configuration),
            "ATTESTOR_MANIFEST": str(self.enclave.folder / "manifest.toml"),
            "ATTESTOR_SECRETS": str(self.secrets),
            "ATTESTOR_USER": USER.pw_name,
            "ATTESTOR_DEADLINE": "0",
        }
        return self.enclave.run(
            *prefix, *shell, str(ENTRYPOINT), *program, environment=inside | dict(environment or {})
        )

    @property
    def told(self) -> list[dict[str, Any]]:
        """The status lines."""
        lines = self._log.read_text(encoding="utf-8").splitlines() if self._log.exists() else []
        assert all(line.startswith("3:8003 ") for line in lines)
        return [json.loads(line.removeprefix("3:8003 ")) for line in lines]

    @property
    def calls(self) -> str:
        """What attestor was called with, a line each."""
        return self._calls.read_text(encoding="utf-8")

    def placed(self) -> set[str]:
        """Names in the folder of the secrets, hidden ones too."""
        return {path.name for path in self.secrets.iterdir()} if self.secrets.exists() else set()


@pytest.fixture(params=SHELLS)
def images(
    request: pytest.FixtureRequest, enclaves: Callable[..., Enclave]
) -> Iterator[Callable[..., Image]]:
    """Makes images under each shell, with these options of World; the node's tag is 3."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)  # unlike pytest's folders: the program is another user
        yield lambda **options: Image(
            enclaves(**{"tags": {"mpa-node": "3"}, **options}), request.param, Path(folder)
        )


@pytest.fixture(params=SHELLS)
def image(request: pytest.FixtureRequest, enclave: Enclave) -> Iterator[Image]:
    """One under each shell that never comes to KMS, in the world that all tests share."""
    with tempfile.TemporaryDirectory() as folder:
        yield Image(enclave, request.param, Path(folder), b"no ciphertext")


def lines(run: Run) -> list[str]:
    """What the entrypoint itself said."""
    return [
        line.removeprefix("entrypoint: ")
        for line in run.err.splitlines()
        if line.startswith("entrypoint: ")
    ]


def ended(image: Image, run: Run, step: str, status: int) -> None:
    """It ended at this step; nothing is placed, no program ran, and the parent was told."""
    before = STEPS[: STEPS.index(step)]
    assert (run.status, run.out) == (status, b""), run.err
    assert [line for line in lines(run) if "error" not in line] == [
        *(f"{name}: ok" for name in before), f"{step}: status {status}, attempt 1"
    ]  # fmt: skip
    assert [(line["step"], line["status"]) for line in image.told] == [
        *((name, 0) for name in before),
        (step, status),
    ]
    assert image.placed() == set()


# -- what works


def test_all_steps_and_the_program(images: Callable[..., Image]) -> None:
    image = images()
    run = image.run(
        "sh",
        "-c",
        'cat "$ATTESTOR_SECRETS/key"; echo "$NODE $AWS_REGION $1"; exit 42',
        "sh",
        "a  b",
    )
    assert (run.status, run.out) == (42, b"the secret3 eu-west-1 a  b\n"), run.err
    assert lines(run) == [f"{step}: ok" for step in (*STEPS, "program")]
    assert [line["step"] for line in image.told] == [*STEPS, "program"]
    assert {(line["version"], line["status"], line["attempt"]) for line in image.told} == {
        (1, 0, 1)
    }
    network, module, *_, inject, program = image.told
    assert network.keys() == {"version", "step", "status", "attempt"}
    world = image.enclave.world.module
    pcrs = {str(index): value.hex() for index, value in enumerate(world.pcrs) if any(value)}
    assert module["pcrs"] == inject["pcrs"] == pcrs
    assert module["module_id"] == inject["module_id"]
    assert str(uuid.UUID(inject["request_id"])) == inject["request_id"]
    assert inject == program | {"step": "inject"}
    assert image.placed() == {"key"}


def test_without_a_program_the_secrets_are_in_place(images: Callable[..., Image]) -> None:
    image = images()
    run = image.run()
    assert (run.status, run.out, lines(run)) == (0, b"", [f"{step}: ok" for step in STEPS])
    assert image.placed() == {"key"}
    status = (image.secrets / "key").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, USER.pw_uid)
    assert stat.S_IMODE(image.secrets.stat().st_mode) == 0o711


def test_the_program_has_no_privileges(images: Callable[..., Image]) -> None:
    shown = images().run("cat", "/proc/self/status").out.decode()
    status = dict(line.split(":\t", 1) for line in shown.splitlines())
    assert status["NoNewPrivs"] == "1"
    assert set(status["Uid"].split()) == {str(USER.pw_uid)}
    assert set(status["Gid"].split()) == {str(USER.pw_gid)}
    if AS_ROOT:
        groups = {group.gr_gid for group in grp.getgrall() if USER.pw_name in group.gr_mem} | {
            USER.pw_gid
        }
        assert set(status["Groups"].split()) == {str(group) for group in groups}
        assert {
            int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
        } == {0}


def test_the_environment_of_the_program(images: Callable[..., Image]) -> None:
    image = images()
    secret: Environment = {
        "AWS_BEARER_TOKEN_X": "x",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN": "x",
        "KEPT": "a\nb",
    }
    run = image.run("sh", "-c", "env; ulimit -c; ls /proc/self/fd | wc -l", environment=secret)
    *_, core, descriptors = run.out.decode().split()
    assert (core, descriptors) == ("0", "4")  # 0, 1, 2 and the folder that ls reads
    credentials = image.enclave.world.kms.credentials
    for value in (credentials.access_key, credentials.secret_key, credentials.token):
        assert value not in run.out.decode()
        assert value not in image.calls
        assert value not in run.err
    names = set(re.findall(r"^([A-Za-z0-9_]+)=", run.out.decode(), re.MULTILINE))
    assert not {name for name in names if "TOKEN" in name or "SECRET_" in name}
    assert {"NODE", "AWS_REGION", "KEPT", "HOME", "PATH"} <= names
    path = str(image.bin) if image.shell == "busybox" else f"{image.bin}:{os.environ['PATH']}"
    assert f"PATH={path}\n" in run.out.decode()


def test_the_configuration_file(images: Callable[..., Image]) -> None:
    image = images(tags={"other": "7"})
    image.configuration.write_text(
        "# comment\n\nATTESTOR_NODE_TAG=other\n"
        "ATTESTOR_NODE_VARIABLE=NUMBER\nAWS_REGION=eu-west-1\n"
        "ATTESTOR_STATUS_PORT=\nATTESTOR_DEADLINE=nonsense, but the environment comes first",
        encoding="utf-8",
    )
    run = image.run("sh", "-c", 'echo "$NUMBER"', environment={"NODE": "3"})
    assert (run.status, run.out) == (0, b"7\n"), run.err
    assert image.told == []
    assert "placement/region" not in image.calls


def test_without_a_tag_no_node(images: Callable[..., Image]) -> None:
    image = images()
    no_node: Environment = {"ATTESTOR_NODE_TAG": "", "NODE": "3", "AWS_REGION": "eu-west-1"}
    assert image.run("true", environment=no_node).status == 0
    assert "metadata" not in image.calls


def test_an_instance_without_tags_serves_a_manifest_without_a_node(
    images: Callable[..., Image],
) -> None:
    image = images(tags={})
    manifest = image.enclave.folder / "manifest.toml"
    text = manifest.read_text(encoding="utf-8").replace('[variables]\nNODE = "[0-9]{1,4}"\n', "")
    manifest.write_text(text.replace("${NODE}", "3"), encoding="utf-8")
    assert image.run("true").status == 0
    assert "tags/instance" not in image.calls
    assert image.run("true", environment={"ATTESTOR_NODE_TAG": "mpa-node"}).status == 4


# -- what does not


def test_a_missing_tag(images: Callable[..., Image]) -> None:
    image = images(tags={})
    run = image.run("true")
    ended(image, run, "node", 4)
    assert (
        "the instance has no tag mpa-node, or tags are not enabled in instance metadata" in run.err
    )
    assert "modify-instance-metadata-options" in run.err


def test_another_image(images: Callable[..., Image]) -> None:
    image = images(pcrs={0: b"\x01" * 48})
    run = image.run("true")
    ended(image, run, "inject", 4)
    told = image.told[-1]
    assert told["pcrs"]["0"] == "01" * 48
    assert f"(request id {told['request_id']})" in run.err


def test_no_module(images: Callable[..., Image]) -> None:
    image = images()
    ended(
        image,
        image.run("true", environment={"LD_PRELOAD": None, "NITROSIM_NSM_SOCKET": None}),
        "module",
        3,
    )


def test_kms_that_is_not_there(images: Callable[..., Image]) -> None:
    image = images()
    astray: Environment = {"AWS_ENDPOINT_URL_KMS": "https://127.0.0.1:1"}
    ended(image, image.run("true", environment=astray), "inject", 5)
    run = image.run("true", environment=astray | {"ATTESTOR_DEADLINE": "1"})
    assert run.status == 5
    attempts = [line["attempt"] for line in image.told if line["status"] == 5]
    assert attempts[0] == 1
    assert image.placed() == set()


def test_a_service_that_comes_later(images: Callable[..., Image]) -> None:
    image = images()
    remaining = 3  # as often as one call of attestor tries

    def flaky(environ: Any, start_response: Any) -> Any:
        nonlocal remaining
        remaining -= 1
        if remaining >= 0:
            return Response("not yet", 503)(environ, start_response)
        return service(environ, start_response)

    service = MetadataService(
        instance_id="i-0123456789abcdef0", region="eu-west-1", role="role",
        credentials=image.enclave.world.kms.credentials, tags={"mpa-node": "3"},
    )  # fmt: skip
    with HttpServer(flaky) as started:
        later: Environment = {
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": started.url,
            "ATTESTOR_DEADLINE": "60",
        }
        run = image.run("true", environment=later)
    assert run.status == 0, run.err
    assert lines(run)[2:4] == ["region: status 5, attempt 1", "region: ok"]
    assert [
        (line["status"], line["attempt"]) for line in image.told if line["step"] == "region"
    ] == [(5, 1), (0, 2)]


@pytest.mark.parametrize("name", ["absent", "region", "inject"])
def test_a_program_that_is_not_there(images: Callable[..., Image], name: str) -> None:
    """Names of the entrypoint's own functions are no programs."""
    image = images()
    assert image.run(name).status == 127
    assert [(line["step"], line["status"]) for line in image.told] == [("program", 127)]
    assert image.placed() == set()


def test_a_program_that_cannot_be_executed(images: Callable[..., Image]) -> None:
    image = images()
    program = image.enclave.folder / image.enclave.place(b"#!/bin/sh\n", "program")
    program.chmod(0o644)
    assert image.run(str(program)).status == 126
    assert [(line["step"], line["status"]) for line in image.told] == [("program", 126)]
    assert image.placed() == set()


def test_attestor_stays_beside_the_program(images: Callable[..., Image]) -> None:
    """It fetches again, restarts the program without credentials, and ends as that does."""
    image = images()
    environment: Environment = {"ATTESTOR_WATCH": "1", "AWS_BEARER_TOKEN_X": "x"}
    new = image.enclave.folder / image.enclave.place(image.enclave.encrypt(b"new", node="3"), "n")
    second = f"""
        cat "$ATTESTOR_SECRETS/key"; echo " $NODE $1"
        env | grep -E "^AWS_(SECRET|SESSION|BEARER)" && exit 99
        grep -qx new "$ATTESTOR_SECRETS/key" && exit 42
        : >"{image.bin}/started"
        while :; do sleep 0.1; done
    """
    image.bin.chmod(0o777)

    def rotate() -> None:
        wait_until((image.bin / "started").exists)
        new.rename(image.enclave.folder / "blob")

    operator = threading.Thread(target=rotate)
    operator.start()
    run = image.run("sh", "-c", second, "sh", "a  b", environment=environment)
    operator.join()
    assert (run.status, run.out) == (42, b"the secret 3 a  b\nnew 3 a  b\n"), run.err
    assert lines(run) == [f"{step}: ok" for step in (*STEPS, "program")]
    assert image.placed() == {"key"}


@pytest.mark.parametrize(
    ("value", "program", "said"),
    [
        ("0", ["true"], "error: ATTESTOR_WATCH is not what it must be: ([1-9][0-9]{0,4})?"),
        ("86401", ["true"], "error: ATTESTOR_WATCH is more than a day, 86400"),
        ("60", [], "error: ATTESTOR_WATCH is beside a program, and none is named"),
    ],
)
def test_watching_that_cannot_be(image: Image, value: str, program: list[str], said: str) -> None:
    run = image.run(*program, environment={"ATTESTOR_WATCH": value})
    assert (run.status, lines(run)) == (2, [said])
    assert image.told == []


def test_what_is_taken_from_the_program_is_what_inject_takes() -> None:
    unset = re.search(
        r"^    unset (AWS_[A-Z0-9_ \\\n]+)$", ENTRYPOINT.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert unset
    assert set(unset[1].replace("\\", " ").split()) == CREDENTIALS


@pytest.mark.parametrize(
    "text",
    [
        "ATTESTOR_NETWORK",
        "FOO=1",
        "ATTESTOR_NETWORK=none\nrm -rf x",
        "export AWS_REGION=x",
        "=x",
        "PATH=/x",
        " AWS_REGION=x",
        "ATTESTOR_NETWORK ATTESTOR_KMS_PORT=1",
        "LD_PRELOAD=x",
        "AWS_ENDPOINT_URL_KMS=https://x",
        "$(touch pwned)",
        "ATTESTOR_STATUS_PORT=$(touch pwned)",
        "ATTESTOR_PARENT_CID=3\r\n",
        "ATTESTOR_PARENT_CID='3'",
        "ATTESTOR_KMS_PORT=",
        "ATTESTOR_HOSTS=a",
        "ATTESTOR_HOSTS=a=1b=2",
        "ATTESTOR_HOSTS=a=1\tb=2",
        "ATTESTOR_NODE_VARIABLE=LD_PRELOAD",
        "ATTESTOR_NODE_VARIABLE=PATH",
        "ATTESTOR_NODE_VARIABLE=work",
        "ATTESTOR_NODE_VARIABLE=_SETTINGS",
        "ATTESTOR_NODE_VARIABLE=HTTPS_PROXY",
        "ATTESTOR_NODE_VARIABLE=A=B",
        "ATTESTOR_NODE_TAG=../../iam",
        "ATTESTOR_DNS_SUFFIX=a b",
    ],
)
def test_a_configuration_that_is_none(image: Image, text: str) -> None:
    image.configuration.write_bytes(text.encode())
    run = image.run("true")
    assert (run.status, run.out) == (2, b""), run.err
    assert lines(run)[0].startswith("error: ")
    assert len(lines(run)) == 1
    assert image.placed() == set()
    assert not (image.enclave.folder / "pwned").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ATTESTOR_NETWORK", "vsocks"),
        ("ATTESTOR_PARENT_CID", "3;id"),
        ("ATTESTOR_USER", "root"),
        ("ATTESTOR_USER", "absent"),
        ("ATTESTOR_DEADLINE", "-1"),
        ("ATTESTOR_MANIFEST", "m.toml"),
        ("ATTESTOR_STATUS_PORT", "8003\n8004"),
    ],
)
def test_a_setting_of_the_environment_that_cannot_be(image: Image, name: str, value: str) -> None:
    run = image.run("true", environment={name: value})
    assert (run.status, run.out) == (2, b"")
    assert lines(run)[0].startswith(f"error: {name} ")


@pytest.mark.parametrize("value", ["$(touch pwned)", "-n"])
def test_a_hostile_tag(images: Callable[..., Image], value: str) -> None:
    image = images(tags={"mpa-node": value})
    run = image.run("sh", "-c", 'echo "$NODE"')
    assert run.status == 2, run.err
    assert image.told[-1]["step"] == ("inject" if value == "-n" else "node")
    assert value not in json.dumps(image.told)
    assert not (image.enclave.folder / "pwned").exists()
    assert image.placed() == set()


@pytest.mark.parametrize("value", ["eu-west-1\nkms.example", "$(touch pwned)"])
def test_a_hostile_region(images: Callable[..., Image], value: str) -> None:
    image = images()
    service = MetadataService(
        instance_id="i-0123456789abcdef0", region=value, role="role",
        credentials=image.enclave.world.kms.credentials, tags={"mpa-node": "3"},
    )  # fmt: skip
    with HttpServer(service) as started:
        run = image.run("true", environment={"AWS_EC2_METADATA_SERVICE_ENDPOINT": started.url})
    ended(image, run, "region", 4 if "\n" in value else 2)
    assert image.run("true", environment={"AWS_REGION": value}).status == 2
    assert not (image.enclave.folder / "pwned").exists()


def answer(image: Image, region: str, tag: str) -> None:
    """Let the metadata be this; attestor itself, which takes its time, is not asked."""
    for name, value in (("region", region), ("tag", tag)):
        image.enclave.place(value.encode(), name)
    folder = image.enclave.folder
    image.program(
        "attestor",
        f"#!/bin/sh\ncase $1,$2 in metadata,placement/region) cat {folder}/region;; "
        f"metadata,tags/instance/mpa-node) cat {folder}/tag;; describe,*) ;; *) exit 9;; esac\n",
    )


@pytest.mark.parametrize(
    "value",
    [
        "$(touch pwned)",
        "`touch pwned`",
        "3; touch pwned",
        "../../etc/passwd",
        "a b",
        "3\n4",
        "*",
        "x" * 65,
        "'",
        "\u00e9",
        "",
    ],
)
def test_tags_that_the_entrypoint_refuses(image: Image, value: str) -> None:
    answer(image, "eu-west-1", value)
    ended(image, image.run("sh", "-c", 'echo "$NODE"'), "node", 2)
    assert not value or value not in json.dumps(image.told)
    assert not (image.enclave.folder / "pwned").exists()


@pytest.mark.parametrize(
    "value",
    ["eu-west-1\nkms.example", "127.0.0.1 evil", "$(touch pwned)", "eu-west-1/../x", "x", ""],
)
def test_regions_that_the_entrypoint_refuses(image: Image, value: str) -> None:
    answer(image, value, "3")
    ended(image, image.run("true"), "region", 2)
    assert image.run("true", environment={"AWS_REGION": value}).status == 2
    assert not (image.enclave.folder / "pwned").exists()


def test_a_region_and_a_tag_that_the_entrypoint_takes(image: Image) -> None:
    """What the tests above refuse is refused for its own sake."""
    answer(image, "eu-west-1", "3")
    assert [line["step"] for line in image.told] == []
    run = image.run("true")
    assert (run.status, lines(run)[-1]) == (9, "inject: status 9, attempt 1")


# -- networks, by programs in the place of ip, socat and attestor


def test_native_vsock(images: Callable[..., Image]) -> None:
    image = images()
    calls = image.enclave.folder / "calls"
    for name, answer in (("attestor", "eu-west-1"), ("ip", "")):
        (image.bin / name).unlink(missing_ok=True)
        image.program(
            name, f'#!/bin/sh\necho "{name} $*" >>{calls}\n[ "$1" = inject ] || echo {answer}\n'
        )
    run = image.run(
        "true", environment={"ATTESTOR_NETWORK": "vsock", "ATTESTOR_S3_PORT": "9", "NODE": "3"}
    )
    assert run.status == 0, run.err
    work = image.secrets / ".entrypoint"
    ways = "--vsock 3:8000 --imds-vsock 3:8002 --s3-vsock 3:9"
    assert image.calls.splitlines() == [
        "ip link set dev lo up",
        "attestor describe --json",
        "attestor metadata --imds-vsock 3:8002 placement/region",
        "attestor metadata --imds-vsock 3:8002 tags/instance/mpa-node",
        (
            f"attestor inject {ways} "
            f"--receipt {work}/receipt.json {image.enclave.folder}/manifest.toml"
        ),
    ]


def namespaces() -> bool:
    """Whether this process may have a network and mounts of its own."""
    return (
        bool(AS_ROOT and shutil.which("socat") and shutil.which("unshare"))
        and not subprocess.run(
            ["unshare", "-nm", "true"], check=False, capture_output=True
        ).returncode
    )


if namespaces():  # the virtual machine's test runs it everywhere, and to its end

    def test_socat(images: Callable[..., Image]) -> None:
        image = images()
        hosts = image.enclave.folder / image.enclave.place(b"127.0.0.1 localhost\n", "hosts")
        if image.shell == "busybox":
            (image.bin / "socat").symlink_to(shutil.which("socat") or "")
        show = f"cp /proc/net/tcp {image.enclave.folder}/listening; exit 4"
        image.program(
            "attestor", f'#!/bin/sh\n[ "$1" != inject ] || {{ {show}; }}\necho cn-north-1\n'
        )
        network: Environment = {
            "ATTESTOR_NETWORK": "socat",
            "ATTESTOR_HOSTS": "a.example=8010 b.example=8011",
        }
        command = f'mount --bind {hosts} /etc/hosts && exec "$@"'
        prefix = [
            shutil.which("unshare") or "unshare",
            "-nmpf",
            "--kill-child",
            "/bin/sh",
            "-c",
            command,
            "sh",
        ]
        assert image.run("true", environment=network, prefix=prefix).status == 4
        assert hosts.read_text(encoding="utf-8").splitlines() == [
            "127.0.0.1 localhost",
            "127.0.0.3 a.example",
            "127.0.0.4 b.example",
            "127.0.0.1 kms.cn-north-1.amazonaws.com.cn",
            "127.0.0.2 s3.cn-north-1.amazonaws.com.cn",
        ]
        listening = (image.enclave.folder / "listening").read_text(encoding="utf-8")
        found = {line.split()[1] for line in listening.splitlines()[1:] if line.split()[3] == "0A"}
        assert found == {"FEA9FEA9:0050", *(f"{number:02X}00007F:01BB" for number in range(1, 5))}


# -- the status line


def _load() -> Any:
    loader = importlib.machinery.SourceFileLoader("tell_parent", str(TELL_PARENT))
    spec = importlib.util.spec_from_loader("tell_parent", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)  # none beside what goes into the image
        loader.exec_module(module)
    return module


tell: Final = _load()
ID: Final = "5d3c0f8e-0000-4000-8000-00000000000{}"
PCR: Final = "0a" * 48


def told(tmp_path: Path, evidence: object = None, messages: str = "", *arguments: str) -> Any:
    """The line for this evidence and these messages."""
    (tmp_path / "evidence").write_text(json.dumps(evidence), encoding="utf-8")
    (tmp_path / "messages").write_text(messages, encoding="utf-8")
    files = ("--evidence", str(tmp_path / "evidence"), "--messages", str(tmp_path / "messages"))
    text = tell.line(["step=inject", "status=0", *files, *arguments])
    assert text.count(b"\n") == 1
    assert text.endswith(b"\n")
    assert len(text) <= tell.LINE_MAX
    return json.loads(text)


def test_the_line_of_a_receipt_and_of_a_description(tmp_path: Path) -> None:
    base = {"version": 1, "step": "inject", "status": 0}
    assert told(tmp_path) == base
    entries = [
        {"request_id": ID.format(1), "target": "/secret"},
        {"kind": "file"},
        {"request_id": ID.format(2)},
    ]
    receipt = {"module_id": "i-0-enc0", "pcrs": {"0": PCR, "1": "0" * 96}, "entries": entries}
    ids = f"{ID.format(1)} {ID.format(2)}"
    assert told(tmp_path, receipt) == base | {
        "request_id": ids,
        "module_id": "i-0-enc0",
        "pcrs": {"0": PCR},
    }
    description = {
        "module_id": "i-0-enc0",
        "pcrs": {"0": {"value": PCR, "locked": True}, "31": {"value": "00" * 48}},
    }
    assert told(tmp_path, description) == base | {"module_id": "i-0-enc0", "pcrs": {"0": PCR}}


def test_the_request_id_of_a_refusal(tmp_path: Path) -> None:
    message = (
        f"attestor: error: KMS refused: (request id {ID.format(1)}) x\n"
        f"attestor: note: (request id {ID.format(2)})\n"
    )
    assert told(tmp_path, None, message)["request_id"] == ID.format(2)
    for other in (
        "(request id none)",
        "(request id ../x)",
        ID.format(1),
        f"(request id {ID.format(1).upper()})",
    ):
        assert "request_id" not in told(tmp_path, None, other)


@pytest.mark.parametrize(
    "evidence",
    [
        [],
        3,
        "x",
        {"pcrs": []},
        {
            "pcrs": {
                "0": "zz" * 48,
                "99": PCR,
                "-1": PCR,
                "1": PCR.upper(),
                "2": [PCR],
                "3": PCR + "0a",
            }
        },
        {"module_id": "a b"},
        {"module_id": 3},
        {"module_id": "x" * 129},
        {"entries": {}},
        {"entries": [3, {"request_id": 3}]},
        {"secret": "x", "credentials": {"Token": "x"}},
    ],
)
def test_what_is_no_evidence_is_left_out(tmp_path: Path, evidence: object) -> None:
    assert told(tmp_path, evidence) == {"version": 1, "step": "inject", "status": 0}


def test_more_than_a_line_holds(tmp_path: Path) -> None:
    entries = [{"request_id": ID.format(number % 10)} for number in range(300)]
    line = told(tmp_path, {"pcrs": {str(index): PCR for index in range(32)}, "entries": entries})
    assert len(line["pcrs"]) == 32
    assert 5 < len(line["request_id"].split()) < 30


@pytest.mark.parametrize(
    "argument",
    [
        "secret=x",
        "step=other",
        "step",
        "status=-1",
        "status=1x",
        "status=1\n",
        "attempt=01",
        "request_id=x",
        "version=2",
        "pcrs=x",
        "module_id=a b",
        "--other",
        "",
    ],
)
def test_a_field_that_is_none(argument: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any will do: nothing is sent
        tell.line([argument])


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe{")
    (tmp_path / "deep").write_text("[" * 100000, encoding="utf-8")
    for path in ("absent", ".", "binary", "deep"):
        line = tell.line(
            ["step=node", "--evidence", str(tmp_path / path), "--messages", str(tmp_path / path)]
        )
        assert line == b'{"version":1,"step":"node"}\n'


@given(st.lists(st.text(max_size=30), max_size=5))
def test_nothing_escapes(arguments: list[str]) -> None:
    tell.main(arguments)


@pytest.mark.parametrize("address", ["3", "", "3:", "a:b", "3:8003:1"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(ValueError, match=f"^{address}$"):
        tell.send(address, b"x")


def test_the_line_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = socket.socketpair()
    asked: list[object] = []

    class Connection:
        settimeout, sendall = near.settimeout, near.sendall

        def __init__(self, *arguments: object) -> None:
            asked.append(arguments)

        def __enter__(self) -> Connection:  # noqa: PYI034 - as socket does
            return self

        def __exit__(self, *_: object) -> None:
            near.close()

        def connect(self, address: object) -> None:
            asked.append(address)

    monkeypatch.setattr(tell.socket, "socket", Connection)
    tell.main(["3:8003", "step=network", "status=0"])
    with far:
        assert far.recv(1000) == b'{"version":1,"step":"network","status":0}\n'
        assert far.recv(1000) == b""
    assert asked == [(socket.AF_VSOCK, socket.SOCK_STREAM), (3, 8003)]


def test_it_is_silent_and_content_when_nobody_listens() -> None:
    done = subprocess.run(
        [TELL_PARENT, "4242:1", "step=network"], capture_output=True, check=False, timeout=30
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
