"""What a release consists of: which libraries may go into a wheel, what is in wheel and sdist, and
that an installed wheel uses its library. `make wheels-test` tries the wheels of `make wheels`.
"""

from __future__ import annotations

import io
import json
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from cyclonedx.output.json import JsonV1Dot6

from nsm.library import IN_PACKAGE
from release import sbom
from release.check_library import problems
from tests.conftest import ROOT
from tests.test_house import clean_environment, install, locked_for_running

if TYPE_CHECKING:
    from tests.conftest import Enclave

MACHINE: Final = platform.machine()
OTHER: Final = {"x86_64": "aarch64", "aarch64": "x86_64"}.get(MACHINE, "x86_64")
GLIBC: Final = f"manylinux_2_17_{MACHINE}"
OURS: Final = "int nsmpy_abi_version(void) { return 1; }\n"
# Each is a library with something wrong: its source, options of the linker, the tag, what is said.
WRONG: Final[dict[str, tuple[str, str, str, str]]] = {
    "a foreign name": ("int nsm_lib_init(void) { return 0; }", "", GLIBC, "not ours: nsm_lib_init"),
    "not our interface": ("", "-Dnsmpy_abi_version=nsmpy_x", GLIBC, "no nsmpy_abi_version"),
    "a library beside": ("", "-Wl,--no-as-needed -lm", GLIBC, "it needs libm.so.6"),
    "a newer glibc": (
        "int arc4random(void); int nsmpy_x(void) { return arc4random(); }",
        "",
        GLIBC,
        r"it needs GLIBC_2\.\d+, and the tag says 2\.17",
    ),
    "glibc for musl": ("", "", f"musllinux_1_2_{MACHINE}", "it needs libc.so.6"),
    "another machine": ("", "", f"manylinux_2_17_{OTHER}", "it is .*EM_.* and the tag says"),
    "a search path": ("", "-Wl,-rpath,/opt", GLIBC, "it names a folder to search"),
    "lazy binding": ("", "-Wl,-z,lazy", GLIBC, "its addresses are bound late"),
    "a stack of code": ("", "-Wl,-z,execstack", GLIBC, "its stack is executable"),
    "late relocations": ("", "-Wl,-z,norelro", GLIBC, "its relocations stay writable"),
}


def compiled(folder: Path, source: str, options: str = "") -> Path:
    """A shared library of our own name and that source."""
    output = folder / "libnsm.so"
    linker = "-shared -fPIC -Wl,-z,now -Wl,-z,relro -Wl,--no-as-needed -lc"
    command = ["cc", "-x", "c", "-", "-o", str(output), *linker.split(), *options.split()]
    subprocess.run(command, input=(OURS + source).encode(), check=True)
    return output


def test_a_library_as_it_should_be(tmp_path: Path) -> None:
    assert problems(compiled(tmp_path, "int nsmpy_x(void) { return 1; }"), GLIBC) == []


@pytest.mark.parametrize("what", WRONG)
def test_a_library_that_no_wheel_may_have(tmp_path: Path, what: str) -> None:
    source, options, tag, said = WRONG[what]
    found = problems(compiled(tmp_path, source, options), tag)
    assert any(re.search(said, line) for line in found), found


@pytest.mark.parametrize("data", [b"", b"no library", b"\x7fELF" + bytes(60)])
def test_what_is_no_library(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "libnsm.so"
    path.write_bytes(data)
    assert problems(path, GLIBC) != []


@pytest.mark.parametrize("tag", ["linux_x86_64", "manylinux2014_x86_64", "musllinux_1_2_riscv64"])
def test_a_tag_that_is_none_of_ours(tmp_path: Path, tag: str) -> None:
    path = compiled(tmp_path, "")
    with pytest.raises(ValueError, match=f"{tag} is no platform tag"):
        problems(path, tag)
    command = [sys.executable, "-m", "release.check_library", str(path), tag]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr == f"check_library: error: {tag} is no platform tag of manylinux or musllinux\n"
    )


def test_the_page_shows_how_a_library_is_judged(tmp_path: Path) -> None:
    """Its block, with this Python in the place of the release's, and a stand-in for auditwheel."""
    page = (ROOT / "docs" / "verify-a-release.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh not-run-here\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (block,) = [text for text in blocks if "release.check_library" in text]
    block = block.replace("x86_64", MACHINE)
    name = f"nitro_attestor-0.1.0-py3-none-{GLIBC}.whl"
    (tmp_path / "dist").mkdir()
    with zipfile.ZipFile(tmp_path / "dist" / name, "w") as wheel:
        wheel.write(compiled(tmp_path, ""), "nsm/libnsm.so")
    (tmp_path / "release").symlink_to(ROOT / "release")
    programs = tmp_path / ".cache" / "release" / "bin"
    programs.mkdir(parents=True)
    for program, text in {
        "python": f'exec "{sys.executable}" "$@"',
        "auditwheel": 'echo "$@"',
    }.items():
        (programs / program).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (programs / program).chmod(0o755)
    done = subprocess.run(
        ["sh", "-euc", block],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"show dist/{name}\n", "")


# ---- bills of materials


def components(bom: Any) -> dict[str, str]:
    """Package URLs of a bill of materials, and the SHA-256 of each or nothing."""
    read = json.loads(JsonV1Dot6(bom).output_as_string())
    return {
        part["purl"]: "".join(entry["content"] for entry in part.get("hashes", []))
        for part in read["components"]
    }


def test_the_bill_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS's crate and its dependencies with the checksums of the lock."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    bom = sbom.library()
    found = components(bom)
    lock = (ROOT / "patches" / "libnsm" / "Cargo.lock").read_text(encoding="utf-8")
    assert "pkg:cargo/aws-nitro-enclaves-nsm-api@0.4.0" in found
    assert len(found) > 5
    assert all(f'checksum = "{digest}"' in lock for digest in found.values())
    assert JsonV1Dot6(bom).output_as_string() == JsonV1Dot6(sbom.library()).output_as_string()


def test_the_bill_of_a_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    lock = (ROOT / "requirements" / "run.txt").read_text(encoding="utf-8")
    versions = dict(re.findall(r"^(\S+)==(\S+)", lock, re.MULTILINE))
    found = components(sbom.release())
    assert {f"pkg:pypi/{name}@{number}" for name, number in versions.items()} < set(found)
    assert found.items() > components(sbom.library()).items()


def test_the_bill_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as root:
        for name, text in {
            "./etc/attestor/debian-packages": "libc6 2.41-12+deb13u1 arm64\n",
            "./usr/lib/x/boto3-1.2.dist-info/METADATA": "Name: boto3\nVersion: 1.2\n\nVersion: 3\n",
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            root.addfile(member, io.BytesIO(text.encode()))
    packed.seek(0)
    with tarfile.open(fileobj=packed) as root:
        found = set(components(sbom.image(root)))
    assert found - set(components(sbom.library())) == {
        "pkg:deb/debian/libc6@2.41-12%2Bdeb13u1?arch=arm64",
        "pkg:pypi/boto3@1.2",
    }


# ---- wheel and sdist


def built(
    folder: Path, kind: str, environment: dict[str, str] | None = None, tree: Path = ROOT
) -> Path:
    """The sdist or wheel of this checkout, or of another tree."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "-d", str(folder)]
    base = clean_environment({"PATH": "/usr/bin:/bin"}, Path(sys.executable).parent)
    done = subprocess.run(
        command,
        cwd=tree,
        env=base | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (found,) = folder.iterdir()
    return found


def test_the_sdist_is_enough_to_build_from(tmp_path: Path) -> None:
    """It has what is tracked, and no library that was built here."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    sdist = built(tmp_path / "one", "sdist")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert set(tracked) <= names
    (tree,) = tmp_path.glob("nitro_attestor-*")
    assert built(tmp_path / "two", "sdist", tree=tree).read_bytes() == sdist.read_bytes()


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with the library that is built here, under a tag that this machine takes."""
    if not IN_PACKAGE.exists():
        pytest.skip("nsm/libnsm.so is not built: make libnsm")
    folder = tmp_path_factory.mktemp("native")
    bill = folder / "libnsm.cdx.json"
    bill.write_text("{}", encoding="utf-8")
    (folder / "wheel").mkdir()
    said = {"ATTESTOR_WHEEL_PLATFORM": f"linux_{MACHINE}", "ATTESTOR_WHEEL_SBOM": str(bill)}
    return built(folder / "wheel", "wheel", said)


def test_the_wheel_carries_the_library_and_its_bill(native: Path) -> None:
    assert native.name.endswith(f"-py3-none-linux_{MACHINE}.whl")
    with zipfile.ZipFile(native) as archive:
        assert archive.read("nsm/libnsm.so") == IN_PACKAGE.read_bytes()
        (bill,) = [name for name in archive.namelist() if ".dist-info/sboms/" in name]
        (wheel,) = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        assert "Root-Is-Purelib: false" in archive.read(wheel).decode()
    assert bill.endswith("/libnsm.cdx.json")


def test_an_installed_wheel_decrypts_through_its_library(
    native: Path, enclave: Enclave, tmp_path: Path
) -> None:
    decrypts_by_itself(native, locked_for_running(), enclave, tmp_path)


def decrypts_by_itself(wheel: Path, beside: list[str], enclave: Enclave, folder: Path) -> None:
    """Install a wheel and decrypt, with nothing on the path but the environment: no compiler, no
    cargo, no checkout.
    """
    programs = install(wheel, folder / "installed", beside)
    assert shutil.which("cc", path=str(programs)) is None
    environment = clean_environment(enclave.environment, programs) | {"PATH": str(programs)}
    gone: dict[str, None] = dict.fromkeys(enclave.environment.keys() - environment.keys())
    enclave.place(enclave.encrypt())
    attestor = str(programs / "attestor")
    run = enclave.run(
        attestor, "decrypt", "-v", "--any-key", "blob", "out", environment={**environment, **gone}
    )
    assert run.status == 0, run.err
    library = r"\S+/installed/lib/\S+/site-packages/nsm/libnsm\.so \(ABI 1\)"
    assert re.search(f"through {library}", run.err), run.err
    assert (enclave.folder / "out").read_bytes() == b"the secret"
