"""The deployment guide and the parent's side.

Every block of the guide that can run without AWS runs, in order, as it stands. Where AWS's tools
stand on a parent instance or build host, these tests put stand-ins on the PATH: small shell
programs called `nitro-cli`, `aws` and `vsock-proxy` that write down their arguments and print what
the test gave them. So what is tested here is how our scripts call those tools and what they do with
the answers; that the tools themselves behave so is from their documentation. Hardware and KMS are
nitrosim's. The services run under no systemd here: their files are verified, and the command of the
status service runs over a Unix socket in the place of vsock.
"""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import yaml  # type: ignore[import-untyped]  # moto brings it, without types
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from attestor_commands.inject.manifest import parse
from keypolicy import measurements, pcr_of_certificate
from tests.conftest import ROOT, Run
from tests.test_enclave_build import image as oci_archive

if TYPE_CHECKING:
    from collections.abc import Iterator

ENCLAVE: Final = ROOT / "enclave"
PARENT: Final = ENCLAVE / "parent"
GUIDE: Final = (ENCLAVE / "README.md").read_text(encoding="utf-8")
SCRIPTS: Final = ("build-eif", "configure", "make-signing-key", "run-enclave", "tag-node")
UNITS: Final = ("attestor-vsock@.service", "attestor-socat@.service", "attestor-status.service")
INSTANCE: Final = "i-0123456789abcdef0"
PCR: Final = {f"PCR{index}": digit * 96 for index, digit in ((0, "a"), (1, "b"), (2, "c"))}
HOSTILE: Final = (
    "",
    "-x",
    "a b",
    "a;id",
    "$(id)",
    "a'b",
    'a"b',
    "a\nb",
    "../a",
    "*",
    "a,b",
    "x" * 300,
    "ü",
)


def blocks(info: str) -> list[str]:
    """The blocks of the guide with this info string."""
    return re.findall(rf"^```{re.escape(info)}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


class Host:
    """A folder with stand-ins for AWS's tools on the PATH, to run the parent's scripts in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tools = folder / "tools"
        self.tools.mkdir()
        path = f"{self.tools}:{Path(sys.executable).parent}:/usr/bin:/bin"
        self.environment = {
            "PATH": path,
            "HOME": str(folder),
            "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
        }
        (folder / "enclave").symlink_to(ENCLAVE)

    def stand_in(self, tool: str, body: str = "") -> None:
        """Put a program there that writes its arguments down, a JSON array a line; then `body`."""
        program = self.tools / tool
        record = (
            f"import json, sys; calls = open({str(self.folder / tool)!r} + '.calls', 'a'); "
            "print(json.dumps(sys.argv[1:]), file=calls)"
        )
        program.write_text(
            f'#!/bin/sh\n{shlex.quote(sys.executable)} -c {shlex.quote(record)} "$@"\n{body}\n'
        )
        program.chmod(0o755)

    def calls(self, tool: str) -> list[list[str]]:
        """What the stand-in was called with."""
        record = self.folder / f"{tool}.calls"
        return (
            [json.loads(line) for line in record.read_text().splitlines()]
            if record.exists()
            else []
        )

    def run(self, script: str, *arguments: str) -> Run:
        """Run a script of the parent's side."""
        return self.command(str(PARENT / script), *arguments)

    def command(self, *command: str) -> Run:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            check=False,
            timeout=300,
        )
        return Run(done.returncode, done.stdout, done.stderr.decode())

    def names(self) -> set[str]:
        """What a script left in the folder, hidden names too."""
        return {path.name for path in self.folder.iterdir()} - {"tools", "enclave"}

    def sign(self, name: str = "signing") -> Path:
        """A signing key, made by our script."""
        assert self.run("make-signing-key", name).status == 0
        return self.folder / name

    def builder(self, pcr8: str = "", after: str = "") -> None:
        """A stand-in for nitro-cli build-enclave: PCR0 to 2, and PCR8 if given; then `after`."""
        listed = {"HashAlgorithm": "Sha512_48 { .. }"} | PCR | ({"PCR8": pcr8} if pcr8 else {})
        text = shlex.quote(json.dumps({"Measurements": listed}, indent=2))
        self.stand_in(
            "nitro-cli",
            "echo 'Start building the Enclave Image...' >&2\n"
            f'echo image > "$5"\necho {text}\n{after}',
        )

    def runner(self, description: dict[str, Any] | None = None, status: int = 0) -> None:
        """A stand-in for nitro-cli describe-eif and run-enclave."""
        described = shlex.quote(
            json.dumps({"IsSigned": False, "CheckCRC": True} | (description or {}), indent=2)
        )
        started = shlex.quote(
            json.dumps({"EnclaveName": "app", "EnclaveID": f"{INSTANCE}-enc1", "EnclaveCID": 16})
        )
        self.stand_in(
            "nitro-cli",
            f"case $1 in describe-eif) echo {described};; *) echo {started}; exit {status};; esac",
        )

    def eif(self, size: int = 1000) -> str:
        (self.folder / "app.eif").write_bytes(bytes(size))
        return "app.eif"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A build host or parent instance without any of AWS's tools."""
    return Host(tmp_path)


def signed(first: str, last: str) -> dict[str, Any]:
    """What describe-eif says of a signed image."""
    certificate = {"IssuerName": {"commonName": "app"}, "NotBefore": first, "NotAfter": last}
    return {"IsSigned": True, "SignatureCheck": True, "SigningCertificate": certificate}


# ---- the guide


def test_the_guide_runs_as_it_stands(host: Host) -> None:
    """In one shell and in order, in a folder that has of a checkout what the blocks name."""
    (host.folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    script = "set -euo pipefail\n" + "".join(
        f"echo block {i} >&2\n{text}" for i, text in enumerate(blocks("sh"), 1)
    )
    run = host.command("bash", "-c", script)
    assert run.status == 0, run.err
    out = run.out.decode()
    assert "the secret of node 3" in out
    assert (host.folder / "signing" / "pcr8").read_text() in out
    assert out.count("decision        allowed") == 3  # routes A, C and B, and another image each
    assert run.err.count("KMS refused to generate data key: AccessDeniedException") == 3
    assert "passed   clock" in out
    both = json.loads((host.folder / "both.json").read_text())["Statement"]
    assert [part["Sid"] for part in both if part["Sid"].startswith("Enclave")] == [
        "Enclave1",
        "Enclave2",
    ]


def test_every_block_of_the_guide_says_whether_it_runs() -> None:
    infos = set(re.findall(r"^```(.*)$", GUIDE, re.MULTILINE))
    assert infos == {"", "sh", "sh not-run-here", "toml", "dockerfile"}
    assert "were **not run\nhere**, for lack of an AWS account" in GUIDE
    for text in blocks("sh"):
        assert not re.search(
            r"^\s*(sudo |aws |nitro-cli |systemctl |docker |journalctl )", text, re.MULTILINE
        ), text


def test_commands_of_ours_that_are_not_run_have_the_options_that_they_use() -> None:
    """An option in a block that is not run stands in the help of its command."""
    for line in "".join(blocks("sh not-run-here")).replace("\\\n", " ").splitlines():
        for command in re.findall(r"(?:enclave/parent/[a-z]|attestor )[^|&;#]*", line):
            words = shlex.split(command)
            program = (
                [str(PARENT / Path(words[0]).name)]
                if "/" in words[0]
                else [sys.executable, "-m", "attestor"]
            )
            names = [] if "/" in words[0] else words[1 : 3 if words[1] in {"policy", "eif"} else 2]
            done = subprocess.run(
                [*program, *names, "--help"], cwd=ROOT, capture_output=True, check=True, text=True
            )
            for option in (word for word in words if word.startswith("--")):
                assert option in done.stdout, f"{option} of {command}"


def test_the_manifest_of_the_guide_is_one() -> None:
    text, unbound = blocks("toml")
    text = text.replace("app:app", "1000:1000")  # names are those of the image
    manifest = parse(text.encode(), {"NODE": "3"}, {})
    (entry,) = manifest.entries
    assert (entry.source, entry.place.name) == (
        "s3://my-bucket/node-3.enc",
        "/run/secrets/database",
    )
    assert (entry.context, entry.key_id) == ({"node": "3"}, manifest.key_id)
    assert manifest.endpoint_url == "https://kms.eu-west-1.amazonaws.com"
    assert manifest.ca_bundle == "/etc/attestor/aws-roots.pem"
    (entry,) = parse(unbound.encode(), {}, {}).entries
    assert (entry.context, entry.key_id) == ({}, manifest.key_id)


def test_commands_of_images_in_the_guide() -> None:
    """Each begins with our entrypoint, or is an `inject` with options and a program."""
    found = []
    for text in blocks("dockerfile"):
        (command,) = re.findall(r"^CMD (.*\])$", text.replace("\\\n", ""), re.MULTILINE)
        words = json.loads(command)
        found.append(words[0])
        if words[0] == "/usr/local/bin/attestor":
            options = words[2 : words.index("--")]
            assert words[1] == "inject"
            assert set(options[:-1:2]) == {"--vsock", "--imds-vsock", "--s3-vsock"}
            assert options[-1] == "/etc/attestor/manifest.toml"
            started = words[words.index("--") + 1]
            assert started in {"/docker-entrypoint.sh", "/usr/bin/setpriv"}
    assert sorted(found) == ["/usr/local/bin/attestor"] * 2 + ["/usr/local/bin/entrypoint"] * 3


def test_ports_are_the_same_in_entrypoint_scripts_and_guide(host: Host) -> None:
    entrypoint = (ENCLAVE / "entrypoint.sh").read_text(encoding="utf-8")
    assert host.run("configure", "--directory", "d", "eu-west-1").status == 0
    for name, file in (("KMS", "kms"), ("S3", "s3"), ("METADATA", "metadata")):
        found = re.search(rf"setting ATTESTOR_{name}_PORT (\d+)", entrypoint)
        assert found
        assert f"VSOCK_PORT={found[1]}\n" in (host.folder / "d" / f"{file}.env").read_text()
        assert f"| {found[1]} | `attestor-vsock@{file}` |" in GUIDE
    status = re.search(r"setting ATTESTOR_STATUS_PORT (\d+)", entrypoint)
    assert status
    assert f"VSOCK-LISTEN:{status[1]}," in (PARENT / "attestor-status.service").read_text()


# ---- scripts in general


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_wrong_options(host: Host, script: str) -> None:
    for option in ("-h", "--help"):
        run = host.run(script, option)
        assert (run.status, run.err) == (0, "")
        assert run.out.startswith(f"Usage: {script} ".encode())
    run = host.run(script, "--no-such-option")
    assert (run.status, run.out) == (2, b"")
    assert run.err == f"{script}: error: no such option: --no-such-option; {script} -h tells more\n"
    assert host.run(script).status == 2
    assert host.names() == set()


def test_scripts_are_short_and_checked() -> None:
    """All are among those that `make lint` gives to shellcheck; no function exceeds a screen."""
    listed = re.search(
        r"\$\(addprefix enclave/parent/,([a-z. -]+)\)", (ROOT / "Makefile").read_text()
    )
    assert listed
    assert set(listed[1].split()) == {*SCRIPTS, "common.sh"}
    for name in (*SCRIPTS, "common.sh"):
        text = (PARENT / name).read_text(encoding="utf-8")
        assert name == "common.sh" or "\nset -euo pipefail\n" in text
        for body in re.findall(r"^[a-z0-9_]+\(\) \{\n(.*?)^\}$", text, re.MULTILINE | re.DOTALL):
            assert body.count("\n") <= 40


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(
        ["shellcheck", *(str(PARENT / name) for name in (*SCRIPTS, "common.sh"))],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert done.stdout == b""


# ---- make-signing-key


def test_a_signing_key_is_private_and_its_pcr8_that_of_its_certificate(host: Host) -> None:
    run = host.run("make-signing-key", "--name", "my-app", "--days", "7", "signing")
    assert (run.status, run.err) == (0, "")
    folder = host.folder / "signing"
    certificate = x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes())
    expected = pcr_of_certificate(certificate.public_bytes(Encoding.DER)).hex()
    assert run.out.decode() == (folder / "pcr8").read_text() == f"{expected}\n"
    assert certificate.subject.rfc4514_string() == "CN=my-app"
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days == 7
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(
        ("cert.pem", "key.pem", "pcr8"), 0o600
    )
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_signing_key_is_never_overwritten(host: Host) -> None:
    before = {path.name: path.read_bytes() for path in host.sign().iterdir()}
    run = host.run("make-signing-key", "signing")
    assert (run.status, run.err) == (
        1,
        "make-signing-key: error: signing exists, and nothing is overwritten\n",
    )
    assert {path.name: path.read_bytes() for path in (host.folder / "signing").iterdir()} == before
    (host.folder / "dangling").symlink_to("nowhere")
    assert host.run("make-signing-key", "dangling").status == 1
    assert host.names() == {"signing", "dangling"}


@pytest.mark.parametrize(
    "options", [("--days", "0"), ("--days", "3651"), ("--days", "1e3"), ("--days",)]
)
def test_days_that_cannot_be(host: Host, options: tuple[str, ...]) -> None:
    assert host.run("make-signing-key", "x", *options).status == 2
    assert host.names() == set()


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "-x"])
def test_names_that_cannot_be(host: Host, name: str) -> None:
    assert host.run("make-signing-key", "--name", name, "x").status == 2
    assert host.names() == set()


def test_a_failure_of_openssl_leaves_nothing(host: Host) -> None:
    host.stand_in("openssl", "exit 1")
    assert host.run("make-signing-key", "signing").status == 1
    assert host.names() == {"openssl.calls"}


def test_openssl_is_missing(host: Host) -> None:
    for tool in ("bash", "dirname", "cat"):
        (host.tools / tool).symlink_to(shutil.which(tool) or "")
    host.environment["PATH"] = str(host.tools)
    run = host.run("make-signing-key", "signing")
    assert (run.status, run.err) == (
        2,
        "make-signing-key: error: openssl is missing: install openssl\n",
    )


# ---- build-eif


def test_a_signed_build(host: Host) -> None:
    pcr8 = (host.sign() / "pcr8").read_text().strip()
    host.builder(pcr8)
    run = host.run(
        "build-eif", "--key", "signing/key.pem", "--cert", "signing/cert.pem", "app:1", "app.eif"
    )
    assert run.status == 0, run.err
    (call,) = host.calls("nitro-cli")
    assert call[:4] == ["build-enclave", "--docker-uri", "app:1", "--output-file"]
    assert call[5:] == [
        "--private-key",
        "signing/key.pem",
        "--signing-certificate",
        "signing/cert.pem",
    ]
    assert run.out == (host.folder / "app.json").read_bytes()
    assert measurements(run.out)[8].hex() == pcr8
    assert (host.folder / "app.eif").read_text() == "image\n"
    assert host.names() == {"signing", "app.eif", "app.json", "nitro-cli.calls"}
    (said,) = [line for line in run.err.splitlines() if "attestor policy render" in line]
    assert said.endswith("--measurements app.json --take 8")
    follow_hint(host, said, pcr8)


def follow_hint(host: Host, said: str, pcr: str) -> None:
    """Run the command that build-eif hints at, with the people that it cannot know."""
    role = "arn:aws:iam::111122223333:role/"
    people = iter((f"{role}parent", f"{role}admin"))
    words = shlex.split(said.partition("next: attestor ")[2])
    command = [next(people) if word == "ROLE" else word for word in words]
    run = host.command(sys.executable, "-Im", "attestor", *command)
    assert run.status == 0, run.err
    assert pcr in run.out.decode()


@pytest.mark.parametrize(
    ("command", "noted"),
    [
        ('["/usr/local/bin/entrypoint","/usr/local/bin/server"]', False),
        ('["/usr/local/bin/server"]', True),
        ("null", True),
    ],
)
def test_an_image_that_would_start_without_the_entrypoint(
    host: Host, command: str, noted: bool
) -> None:
    """nitro-cli starts CMD, whatever ENTRYPOINT says; `docker` is a stand-in too."""
    host.builder()
    host.stand_in("docker", f"echo {shlex.quote(command)}")
    run = host.run("build-eif", "app:1", "app.eif")
    assert run.status == 0, run.err
    assert (f"the image's CMD is {command}: nothing is injected" in run.err) is noted
    assert host.calls("docker") == [
        ["image", "inspect", "--format", "{{json .Config.Cmd}}", "app:1"]
    ]


def other_way(host: Host) -> dict[str, str]:
    """What the other way wants, and its PCRs: an image of docker's, and the folder of nitro-cli."""
    blobs = host.folder / "blobs"
    blobs.mkdir()
    for name in ("bzImage", "Image", "init", "cmdline"):
        (blobs / name).write_text(name)
    layers: list[dict[str, Any]] = [{"bin/app": b"app"}]
    oci_archive(str(host.folder / "saved"), layers, {"Cmd": ["/bin/app"]})
    host.stand_in("docker", f'[ "$2" = save ] && cp {host.folder}/saved "$4"')
    host.environment["NITRO_CLI_BLOBS"] = str(blobs)
    options = ("--root", "saved", "--blobs", "blobs", "ours.eif")
    assert host.command(str(ENCLAVE / "build-eif"), *options).status == 0
    found = json.loads((host.folder / "ours.json").read_text())["Measurements"]
    for name in ("ours.eif", "ours.json"):
        (host.folder / name).unlink()
    return {name: found[name] for name in PCR}


def test_two_ways_that_differ(host: Host) -> None:
    ours = other_way(host)
    host.builder()
    before = host.names()
    run = host.run("build-eif", "--compare", "app:1", "app.eif")
    assert run.status == 0, run.err
    for name, value in PCR.items():
        assert f"{name}: {value} by nitro-cli, {ours[name]} by enclave/build-eif\n" in run.err
    assert "lets in what was built the one way, and not what was the other" in run.err
    assert measurements(run.out)[0].hex() == PCR["PCR0"]
    assert host.names() - before == {"app.eif", "app.json", "docker.calls", "nitro-cli.calls"}


def test_two_ways_that_agree(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_deployment.PCR", other_way(host))
    host.builder()
    run = host.run("build-eif", "--compare", "app:1", "app.eif")
    assert run.status == 0, run.err
    assert run.err.count("the same both ways") == 3
    assert "lets in" not in run.err


@pytest.mark.parametrize(
    ("broken", "status", "message"),
    [
        ("docker", 2, "docker is missing: --compare wants it"),
        ("blobs", 2, "blobs is missing, of which --compare takes the kernel"),
        ("saved", 1, "enclave/build-eif failed (see above), so that the two ways cannot"),
    ],
)
def test_two_ways_of_which_one_is_not_possible(
    host: Host, broken: str, status: int, message: str
) -> None:
    other_way(host)
    host.builder()
    if broken == "saved":
        (host.folder / "saved").write_bytes(b"no archive")
    elif broken == "blobs":
        shutil.rmtree(host.folder / broken)
    else:
        (host.tools / broken).unlink()
        if shutil.which("docker", path="/usr/bin:/bin"):
            pytest.skip("this machine has docker where every tool is")
    run = host.run("build-eif", "--compare", "app:1", "app.eif")
    assert run.status == status
    assert message in run.err
    assert not {"app.eif", "app.json"} & host.names()


def test_the_next_command_is_one(host: Host) -> None:
    host.builder()
    run = host.run("build-eif", "app:1", "an app.eif")
    assert run.status == 0, run.err
    command = shlex.split(run.err.partition("next: ")[2])
    people = iter(("arn:aws:iam::111122223333:role/parent", "arn:aws:iam::111122223333:role/admin"))
    rendered = host.command(*(next(people) if word == "ROLE" else word for word in command))
    assert rendered.status == 0, rendered.err
    assert PCR["PCR0"] in rendered.out.decode()


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ("exit 1", "nitro-cli build-enclave failed (see above)"),
        ('rm "$5"', "nitro-cli build-enclave left no image"),
        ('> "$5"', "nitro-cli build-enclave left no image"),
        ("kill -TERM $PPID; sleep 1", ""),
    ],
)
def test_a_build_that_fails_leaves_nothing(host: Host, after: str, message: str) -> None:
    host.builder(after=after)
    run = host.run("build-eif", "app:1", "app.eif")
    assert run.status != 0
    assert run.err.endswith(f"build-eif: error: {message}\n" if message else "")
    assert host.names() == {"nitro-cli.calls"}


def test_measurements_that_are_none(host: Host) -> None:
    host.stand_in("nitro-cli", 'echo image > "$5"; echo "{}"')
    run = host.run("build-eif", "app:1", "app.eif")
    assert (run.status, run.err) == (
        1,
        "build-eif: error: nitro-cli build-enclave printed no PCR0\n",
    )
    assert host.names() == {"nitro-cli.calls"}


@pytest.mark.parametrize("pcr8", ["", "e" * 96])
def test_another_pcr8_than_the_certificate_gives(host: Host, pcr8: str) -> None:
    expected = (host.sign() / "pcr8").read_text().strip()
    host.builder(pcr8)
    run = host.run(
        "build-eif", "--key", "signing/key.pem", "--cert", "signing/cert.pem", "app:1", "app.eif"
    )
    assert run.status == 1
    assert (
        f"says PCR8 {pcr8}, signing/cert.pem gives {expected}" if pcr8 else "printed no PCR8"
    ) in run.err
    assert host.names() == {"signing", "nitro-cli.calls"}


def test_an_expired_certificate_is_found_before_the_build(host: Host) -> None:
    folder = host.sign()
    issue(folder, "-not_before", "20200101000000Z", "-not_after", "20210101000000Z")
    host.builder()
    run = host.run(
        "build-eif", "--key", "signing/key.pem", "--cert", "signing/cert.pem", "app:1", "app.eif"
    )
    assert run.status == 1
    assert "signing/cert.pem expired on Jan  1 00:00:00 2021 GMT" in run.err
    assert host.calls("nitro-cli") == []


def issue(folder: Path, *dates: str) -> None:
    """Another certificate over a folder's key, dated as `openssl x509` of 3.4 would take it."""
    from datetime import datetime

    from cryptography.hazmat.primitives import hashes, serialization

    key = serialization.load_pem_private_key((folder / "key.pem").read_bytes(), None)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "app")])
    first, last = (datetime.strptime(date, "%Y%m%d%H%M%S%z") for date in dates[1::2])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, first, last)  # type: ignore[arg-type]  # it is an EC key
    certificate = builder.sign(key, hashes.SHA384())  # type: ignore[arg-type]  # it is an EC key
    (folder / "cert.pem").write_bytes(certificate.public_bytes(Encoding.PEM))


def test_a_certificate_of_tomorrow(host: Host) -> None:
    issue(host.sign(), "-not_before", "20990101000000Z", "-not_after", "21000101000000Z")
    run = host.run(
        "build-eif", "--key", "signing/key.pem", "--cert", "signing/cert.pem", "app:1", "app.eif"
    )
    assert run.status == 2  # nitro-cli is missing, which is found first
    host.builder()
    run = host.run(
        "build-eif", "--key", "signing/key.pem", "--cert", "signing/cert.pem", "app:1", "app.eif"
    )
    assert (run.status, host.calls("nitro-cli")) == (1, [])
    assert "is not valid before Jan  1 00:00:00 2099 GMT" in run.err


def test_a_certificate_of_another_key_and_files_that_are_none(host: Host) -> None:
    host.sign("one"), host.sign("two")
    host.builder()
    for key, cert, message in (
        ("one/key.pem", "two/cert.pem", "two/cert.pem does not belong to one/key.pem"),
        ("one/pcr8", "one/cert.pem", "one/pcr8 is not a private key in PEM"),
        ("one/key.pem", "one/pcr8", "one/pcr8 is not a certificate in PEM"),
        ("one/no", "one/cert.pem", "--key is not a readable file: one/no"),
        ("", "one/cert.pem", "--key and --cert go together"),
    ):
        run = host.run("build-eif", "--key", key, "--cert", cert, "app:1", "app.eif")
        assert run.status in {1, 2}
        assert message in run.err
    assert host.calls("nitro-cli") == []


def test_an_image_that_exists_is_kept_unless_forced(host: Host) -> None:
    host.builder()
    (host.folder / "app.json").write_text("old")
    run = host.run("build-eif", "app:1", "app.eif")
    assert (run.status, run.err) == (1, "build-eif: error: app.json exists; --force replaces it\n")
    assert host.run("build-eif", "-f", "app:1", "app.eif").status == 0
    assert measurements((host.folder / "app.json").read_bytes())[0].hex() == PCR["PCR0"]


def test_the_hint_for_an_image_that_is_not_signed(host: Host) -> None:
    host.builder()
    run = host.run("build-eif", "app:1", "app.eif")
    (said,) = [line for line in run.err.splitlines() if "attestor policy render" in line]
    assert said.endswith("--measurements app.json --take 0")
    follow_hint(host, said, PCR["PCR0"])


def test_nitro_cli_is_missing(host: Host) -> None:
    host.eif()
    for arguments in (("build-eif", "app:1", "new.eif"), ("run-enclave", "app.eif")):
        run = host.run(*arguments)
        assert run.status == 2
        assert (
            "nitro-cli is missing: on Amazon Linux 2023, dnf install aws-nitro-enclaves-cli"
            in run.err
        )
    assert host.names() == {"app.eif"}


@pytest.mark.parametrize("image", [name for name in HOSTILE if name != "x" * 300] + ["x" * 256])
def test_images_that_cannot_be(host: Host, image: str) -> None:
    host.builder()
    assert host.run("build-eif", image, "app.eif").status == 2
    assert host.names() == set()


# ---- run-enclave


def test_an_enclave_starts(host: Host) -> None:
    host.runner(signed("Jan  1 00:00:00 2020 GMT", "Jan  1 00:00:00 2099 GMT"))
    run = host.run(
        "run-enclave", "--cpus", "4", "--name", "app", "--cid", "16", host.eif(3 << 20 | 1)
    )
    assert (run.status, run.out.decode()) == (0, f"{INSTANCE}-enc1\n")
    assert run.err == "run-enclave: note: status lines: journalctl -fu attestor-status\n"
    start = (
        "run-enclave --eif-path app.eif --cpu-count 4 --memory 13 "
        "--enclave-name app --enclave-cid 16"
    )
    assert host.calls("nitro-cli") == [["describe-eif", "--eif-path", "app.eif"], start.split()]


def test_memory_is_what_was_said(host: Host) -> None:
    host.runner()
    run = host.run("run-enclave", "--memory", "512", host.eif())
    assert run.status == 0
    assert "app.eif is not signed: PCR8 will be zero" in run.err
    assert (
        host.calls("nitro-cli")[1]
        == "run-enclave --eif-path app.eif --cpu-count 2 --memory 512".split()
    )


def test_debug_mode_only_for_those_who_know(host: Host) -> None:
    host.runner()
    run = host.run("run-enclave", "--debug-mode", host.eif())
    assert (run.status, host.calls("nitro-cli")) == (2, [])
    assert "--debug-mode makes PCR0, 1, 2 and 8 zero" in run.err
    run = host.run("run-enclave", "--debug-mode", "--accept-zero-pcrs", "app.eif")
    assert run.status == 0
    assert "note: debug mode: PCR0, 1, 2 and 8 are zero" in run.err
    assert host.calls("nitro-cli")[1][-1] == "--debug-mode"
    assert host.run("run-enclave", "--accept-zero-pcrs", "app.eif").status == 0
    assert "--debug-mode" not in host.calls("nitro-cli")[3]


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"CheckCRC": False}, "app.eif is damaged: its checksum is wrong"),
        ({"SignatureCheck": False}, "app.eif has a signature that is wrong"),
        (
            signed("Jan  1 00:00:00 2020 GMT", "Jan  1 00:00:00 2021 GMT"),
            "certificate of app.eif expired on Jan  1 00:00",
        ),
        (
            signed("Jan  1 00:00:00 2099 GMT", "Jan  1 00:00:00 2100 GMT"),
            "certificate of app.eif is not valid before",
        ),
        (signed("whenever", "Jan  1 00:00:00 2100 GMT"), "valid from an unreadable date: whenever"),
    ],
)
def test_an_image_that_must_not_start(
    host: Host, description: dict[str, Any], message: str
) -> None:
    host.runner(description)
    run = host.run("run-enclave", host.eif())
    assert run.status == 1
    assert message in run.err
    assert [call[0] for call in host.calls("nitro-cli")] == ["describe-eif"]


def test_nitro_cli_refuses(host: Host) -> None:
    host.runner(status=39)
    run = host.run("run-enclave", host.eif())
    assert (run.status, run.out) == (1, b"")
    assert "nitro-cli run-enclave failed" in run.err
    host.stand_in("nitro-cli", "echo '{}'")
    run = host.run("run-enclave", "app.eif")
    assert (run.status, run.out) == (1, b"")
    assert "nitro-cli run-enclave printed no EnclaveID" in run.err
    host.stand_in("nitro-cli", "exit 1")
    assert "nitro-cli describe-eif failed" in host.run("run-enclave", "app.eif").err


@pytest.mark.parametrize("option", ["--cpus", "--memory", "--name", "--cid"])
def test_values_that_cannot_be(host: Host, option: str) -> None:
    host.runner()
    eif = host.eif()
    numbers = () if option == "--name" else ("0", "-1", "1.5", "09", "1e3", "1" * 10)
    for value in {*HOSTILE, *numbers, *(["3"] if option == "--cid" else [])} - {""}:
        assert host.run("run-enclave", option, value, eif).status == 2, value
    assert host.calls("nitro-cli") == []


# ---- tag-node


def test_a_node_is_tagged(host: Host) -> None:
    host.stand_in("aws")
    run = host.run("tag-node", "--region", "eu-west-1", "--instance", INSTANCE, "3")
    assert (run.status, run.out) == (0, b"")
    assert "/latest/meta-data/tags/instance/mpa-node is 3" in run.err
    tags = '[{"Key":"mpa-node","Value":"3"}]'
    options = "--http-endpoint enabled --http-tokens required --instance-metadata-tags enabled"
    assert host.calls("aws") == [
        ["ec2", "create-tags", "--region", "eu-west-1", "--resources", INSTANCE, "--tags", tags],
        f"ec2 modify-instance-metadata-options --region eu-west-1 --instance-id {INSTANCE} "
        f"{options}".split(),
    ]


def test_another_tag_with_all_that_may_be_in_it(host: Host) -> None:
    host.stand_in("aws")
    tag = "A-z0+=.,_:@-9"
    assert host.run("tag-node", "--tag", tag, "--instance", INSTANCE, "node-3.a").status == 0
    assert json.loads(host.calls("aws")[0][-1]) == [{"Key": tag, "Value": "node-3.a"}]


def test_a_failure_of_aws_stops(host: Host) -> None:
    host.stand_in("aws", "echo 'An error occurred (UnauthorizedOperation)' >&2; exit 254")
    run = host.run("tag-node", "--instance", INSTANCE, "3")
    assert run.status == 1
    assert run.err.endswith(
        "UnauthorizedOperation)\n"
        f"tag-node: error: tag mpa-node of {INSTANCE} cannot be set (see above)\n"
    )
    assert len(host.calls("aws")) == 1


@pytest.mark.parametrize("value", HOSTILE)
def test_tags_that_cannot_be(host: Host, value: str) -> None:
    host.stand_in("aws")
    fine = {"--instance": INSTANCE, "--tag": "mpa-node", "--region": "eu-west-1"}
    for option in fine:
        options = [word for pair in (fine | {option: value}).items() for word in pair]
        if (option, value) not in {("--tag", "a,b"), ("--tag", "-x")}:  # which are tags
            assert host.run("tag-node", *options, "3").status == 2, option
    assert host.run("tag-node", "--instance", INSTANCE, value).status == 2
    assert host.calls("aws") == []


@pytest.mark.parametrize("tag", [".", "..", "_index", "aws:x"])
def test_tags_that_are_never_shown(host: Host, tag: str) -> None:
    host.stand_in("aws")
    assert host.run("tag-node", "--tag", tag, "--instance", INSTANCE, "3").status == 2
    assert host.calls("aws") == []


# ---- configure and the services


def configured(host: Host, *arguments: str) -> dict[str, dict[str, str]]:
    """The environment of each service, and that the allow list says the same."""
    run = host.run("configure", "--directory", "etc/parent", *arguments)
    assert run.status == 0, run.err
    folder = host.folder / "etc" / "parent"
    services = {
        path.stem: dict(line.split("=", 1) for line in path.read_text().splitlines())
        for path in folder.glob("*.env")
    }
    allowed = yaml.safe_load((folder / "vsock-proxy.yaml").read_text())
    reached = [
        (services[name]["HOST"], int(services[name]["TCP_PORT"]))
        for name in ("kms", "s3", "metadata")
    ]
    assert allowed == {
        "allowlist": [{"address": address, "port": port} for address, port in reached]
    }
    assert {path.name for path in folder.iterdir()} == {
        "kms.env",
        "s3.env",
        "metadata.env",
        "vsock-proxy.yaml",
    }
    return services


@pytest.mark.parametrize(
    ("region", "suffix"),
    [
        ("eu-west-1", "amazonaws.com"),
        ("us-gov-west-1", "amazonaws.com"),
        ("cn-north-1", "amazonaws.com.cn"),
        ("eusc-de-east-1", "amazonaws.eu"),
    ],
)
def test_where_the_ports_lead(host: Host, region: str, suffix: str) -> None:
    services = configured(host, region)
    assert {
        name: (one["VSOCK_PORT"], one["HOST"], one["TCP_PORT"]) for name, one in services.items()
    } == {
        "kms": ("8000", f"kms.{region}.{suffix}", "443"),
        "s3": ("8001", f"s3.{region}.{suffix}", "443"),
        "metadata": ("8002", "169.254.169.254", "80"),
    }


def test_endpoints_that_are_named(host: Host) -> None:
    services = configured(
        host, "--kms-host", "kms-fips.us-east-1.amazonaws.com", "--connections", "64", "us-east-1"
    )
    assert services["kms"]["HOST"] == "kms-fips.us-east-1.amazonaws.com"
    assert services["s3"]["HOST"] == "s3.us-east-1.amazonaws.com"
    assert {one["CONNECTIONS"] for one in services.values()} == {"64"}
    assert (
        configured(host, "--kms-host", "1", "--s3-host", "no", "us-isob-east-1")["kms"]["HOST"]
        == "1"
    )


@pytest.mark.parametrize("value", HOSTILE)
def test_configurations_that_cannot_be(host: Host, value: str) -> None:
    assert host.run("configure", "--directory", "d", value).status == 2
    assert (
        host.run("configure", "--directory", "d", "--connections", value, "eu-west-1").status == 2
    )
    for option in ("--kms-host", "--s3-host"):
        assert (
            not value
            or host.run("configure", "--directory", "d", option, value, "eu-west-1").status == 2
        )
    assert host.run("configure", "--directory", "d", "us-isob-east-1").status == 2
    assert host.names() == set()


@pytest.mark.parametrize("name", UNITS)
def test_services_start_what_exists_and_may_do_little(host: Host, name: str) -> None:
    service = unit(name)["Service"]
    program, *arguments = shlex.split(service["ExecStart"])
    assert program in {"/usr/bin/vsock-proxy", "/usr/bin/socat"}
    used = set(re.findall(r"\$\{(\w+)\}", service["ExecStart"]))
    if "@" in name:
        assert used == set(configured(host, "eu-west-1")["kms"])
        assert service["EnvironmentFile"] == "/etc/attestor-enclave/%i.env"
        assert "/etc/attestor-enclave" in (PARENT / "configure").read_text()
    else:
        assert used == set()
    if program == "/usr/bin/vsock-proxy":
        assert arguments[:4] == [
            "-w",
            "${CONNECTIONS}",
            "--config",
            "/etc/attestor-enclave/vsock-proxy.yaml",
        ]
    for option in (
        "DynamicUser",
        "NoNewPrivileges",
        "MemoryDenyWriteExecute",
        "RestrictNamespaces",
        "PrivateTmp",
    ):
        assert service[option] == "yes"
    assert (service["ProtectSystem"], service["CapabilityBoundingSet"]) == ("strict", "")
    families = set(service["RestrictAddressFamilies"].split())
    assert families == (
        {"AF_VSOCK", "AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK"}
        if "@" in name
        else {"AF_VSOCK"}
    )


def test_one_of_a_pair_of_services_stops_the_other() -> None:
    assert unit("attestor-vsock@.service")["Unit"]["Conflicts"] == "attestor-socat@%i.service"
    assert unit("attestor-socat@.service")["Unit"]["Conflicts"] == "attestor-vsock@%i.service"


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(
        interpolation=None, strict=True, delimiters="=", comment_prefixes="#"
    )
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names in units have capitals
    parser.read_string((PARENT / name).read_text(encoding="utf-8"))
    return parser


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_understands_the_services(host: Host) -> None:
    """Templates as instances, and programs that this machine lacks as stand-ins."""
    host.stand_in("vsock-proxy")
    host.stand_in("socat")
    folder = host.folder / "units"
    folder.mkdir()
    for name in UNITS:
        text = (PARENT / name).read_text(encoding="utf-8")
        text = re.sub(r"/usr/bin/(vsock-proxy|socat)", rf"{host.tools}/\1", text)
        (folder / name.replace("@.", "@kms.")).write_text(text)
    units = sorted(str(path) for path in folder.iterdir())
    done = subprocess.run(
        ["systemd-analyze", "verify", *units], capture_output=True, check=False, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def status_service(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """attestor-status over a Unix socket: its path, and the file in the place of the journal."""
    if not shutil.which("socat"):
        pytest.skip("socat is not installed")
    door, journal = tmp_path / "door", tmp_path / "journal"
    command = unit("attestor-status.service")["Service"]["ExecStart"].replace(
        "VSOCK-LISTEN:8003", f"UNIX-LISTEN:{door}"
    )
    with (
        journal.open("wb") as output,
        subprocess.Popen(shlex.split(command), stdout=output) as process,
    ):
        wait_for(door.exists)
        yield door, journal
        process.terminate()


def wait_for(condition: Any) -> None:
    """Look again and again for a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def tell(door: Path, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(door))
        connection.sendall(data)


def test_a_status_line_reaches_the_journal(status_service: tuple[Path, Path]) -> None:
    door, journal = status_service
    line = b'{"version":1,"step":"program","status":0,"attempt":1}\n'
    tell(door, line)
    wait_for(lambda: journal.read_bytes() == line)
    tell(door, line)
    wait_for(lambda: journal.read_bytes() == 2 * line)


def test_a_long_status_line_is_cut(status_service: tuple[Path, Path]) -> None:
    door, journal = status_service
    # the other side may close before all is sent
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        tell(door, b"x" * 1_000_000)
    wait_for(lambda: journal.read_bytes() == b"x" * 4096)


def test_who_says_nothing_is_not_waited_for(status_service: tuple[Path, Path]) -> None:
    door, journal = status_service
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(door))
        assert connection.recv(1) == b""  # the other side closes, after 5 seconds
    assert journal.read_bytes() == b""
