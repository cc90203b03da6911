"""The wheels that `make wheels` left in dist/, tried on this machine: `make wheels-test`."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import subprocess
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from nitrosim.device import SimulatedDevice
from nitrosim.module import DEFAULT_MODULE_ID, SoftwareNsm
from nitrosim.pki import NsmPki
from nsm import cbor
from nsm.document import AttestationDocument
from release.check_library import problems
from tests.conftest import ROOT
from tests.test_house import locked_for_running
from tests.test_wheels import MACHINE, decrypts_by_itself

if TYPE_CHECKING:
    from tests.conftest import Enclave

pytestmark = pytest.mark.wheels

DIST: Final = ROOT / "dist"
PLATFORMS: Final = (
    "manylinux_2_17_x86_64",
    "manylinux_2_17_aarch64",
    "musllinux_1_2_x86_64",
    "musllinux_1_2_aarch64",
)


def wheel(platform: str) -> Path:
    """The one wheel with that tag."""
    (found,) = DIST.glob(f"nitro_attestor-*-py3-none-{platform}.whl")
    return found


def library_of(platform: str, folder: Path) -> Path:
    """The library in that wheel, unpacked."""
    with zipfile.ZipFile(wheel(platform)) as archive:
        return Path(archive.extract("nsm/libnsm.so", folder))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_library_is_for_the_platform_that_its_wheel_names(
    platform: str, tmp_path: Path
) -> None:
    assert problems(library_of(platform, tmp_path), platform) == []


def test_the_pure_wheel_and_the_sdist_have_no_library() -> None:
    with zipfile.ZipFile(wheel("any")) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]


def test_the_checksums() -> None:
    lines = (DIST / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    said = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert len(said) == len(PLATFORMS) + 3  # the pure wheel, the sdist, the bill of materials
    for name, digest in said.items():
        assert hashlib.sha256((DIST / name).read_bytes()).hexdigest() == digest


def test_the_wheel_of_this_machine_decrypts(enclave: Enclave, tmp_path: Path) -> None:
    native = wheel(f"manylinux_2_17_{MACHINE}")
    decrypts_by_itself(native, locked_for_running(), enclave, tmp_path)


def test_the_library_for_musl_under_its_own_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A C program of musl's, since few machines have a Python of it: every kind of call."""
    if shutil.which("musl-gcc") is None:
        pytest.skip("no musl-gcc (on Debian: apt-get install musl-tools)")
    probe = tmp_path / "probe"
    source = str(ROOT / "tests" / "musl_probe.c")
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["musl-gcc", *flags, source, "-o", str(probe)], check=True)
    assert b"/lib/ld-musl-" in probe.read_bytes()
    monkeypatch.setenv("CC", "musl-gcc")  # the shim goes into a process of musl
    library = library_of(f"musllinux_1_2_{MACHINE}", tmp_path)
    pki = NsmPki.generate(now=datetime.now(UTC), region="eu-west-1", module_id=DEFAULT_MODULE_ID)
    with SimulatedDevice(SoftwareNsm(pki)) as device:
        done = subprocess.run(
            [str(probe), str(library)],
            env=device.environment(os.environ), capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    said = dict(re.findall(r"^(\w+) (.*)$", done.stdout, re.MULTILINE))
    assert said["abi"] == "1 "
    assert said["open"] == said["close"] == "0 "
    assert cbor.decode(answer(said["describe"])).keys() == {"DescribeNSM"}  # type: ignore[attr-defined]
    assert len(answer(said["random"])) == 256
    assert answer(said["extend"]) == hashlib.sha384(bytes(48) + b"data").digest()
    assert said["lock"] == "4 "  # ReadOnlyIndex
    assert said["short"] == "100 longer"
    assert AttestationDocument.parse(answer(said["attest"])).nonce == b"nonce"
    assert said["closed"] == f"{-errno.EBADF} "


def answer(line: str) -> bytes:
    """The bytes behind the status 0."""
    status, _, digits = line.partition(" ")
    assert status == "0"
    return bytes.fromhex(digits)
