"""From a container's root to an enclave image file: ramdisks that are the same each time."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from attestor_eif import Kind, read
from tests.conftest import ROOT

INITRAMFS: Final = ROOT / "enclave" / "initramfs"
BUILD: Final = ROOT / "enclave" / "build-eif"
COMMAND: Final = ("--command", '["/bin/app", "a b"]')


class File(NamedTuple):
    """What an archive says of one file, and its contents."""

    mode: int
    owner: tuple[int, int]
    links: int
    data: bytes
    device: tuple[int, int]
    number: int


def unpacked(path: Path | str) -> dict[str, File]:
    """Read a cpio archive (newc) in gzip; its names in their order."""
    data = gzip.decompress(Path(path).read_bytes())
    found: dict[str, File] = {}
    at = 0
    while True:
        head = data[at : at + 110]
        assert head[:6] == b"070701"
        field = [int(head[6 + 8 * index : 14 + 8 * index], 16) for index in range(13)]
        name = data[at + 110 : at + 110 + field[11] - 1].decode()
        begin = at + (110 + field[11] + 3) // 4 * 4
        contents = data[begin : begin + field[6]]
        at = begin + (field[6] + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert data[at:] == b""
            return found
        assert field[5] == 0  # the time
        device = (field[9], field[10])
        found[name] = File(field[1], (field[2], field[3]), field[4], contents, device, field[0])


def initramfs(*arguments: str, status: int = 0) -> str:
    ran = subprocess.run(
        [sys.executable, "-IS", INITRAMFS, *arguments], capture_output=True, check=False, text=True
    )
    assert ran.returncode == status, ran.stderr
    assert (ran.stderr == "") == (status == 0)
    return ran.stderr


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a small root."""
    monkeypatch.chdir(tmp_path)
    for name in ("root/bin", "root/etc/empty"):
        Path(name).mkdir(parents=True)
    Path("root/bin/app").write_bytes(b"\x7fELF")
    Path("root/bin/app").chmod(0o755)
    Path("root/bin/sh").symlink_to("app")
    Path("root/etc/a-b").write_text("1")
    os.mkfifo("root/etc/fifo")
    return tmp_path


def archive(path: str, members: dict[str, Any], mode: str = "w") -> None:
    """Write a tar: bytes are files, other members TarInfo as they are."""
    with tarfile.open(path, mode) as target:  # type: ignore[call-overload]
        for name, what in members.items():
            info = what if isinstance(what, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            if isinstance(what, bytes):
                info.size = len(what)
            target.addfile(info, io.BytesIO(what) if isinstance(what, bytes) else None)


def special(kind: bytes, link: str = "", device: tuple[int, int] = (0, 0)) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, link
    info.devmajor, info.devminor = device
    info.mode, info.uid, info.gid, info.mtime = 0o640, 1000, 100, 12345
    return info


def image(path: str, layers: list[dict[str, Any]], config: dict[str, Any], copies: int = 1) -> None:
    """Write an OCI archive, with every other layer in gzip."""
    blobs: dict[str, bytes] = {}

    def blob(data: bytes) -> dict[str, str]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = data
        return {"digest": f"sha256:{digest}"}

    described = []
    for number, members in enumerate(layers):
        archive("layer", members, "w:gz" if number % 2 else "w")
        described.append(blob(Path("layer").read_bytes()))
        Path("layer").unlink()
    shown = {"config": blob(json.dumps({"config": config}).encode()), "layers": described}
    manifest = blob(json.dumps(shown).encode())
    index = json.dumps({"manifests": [manifest] * copies}).encode()
    archive(path, {"oci-layout": b"{}", "index.json": index, **blobs})


# ---- ramdisks


def test_a_folder(folder: Path) -> None:
    initramfs("--under", "/r/", "root", "out")
    found = unpacked("out")
    assert list(found) == [
        "r",
        "r/bin",
        "r/bin/app",
        "r/bin/sh",
        "r/etc",
        "r/etc/a-b",
        "r/etc/empty",
        "r/etc/fifo",
    ]
    assert found["r/bin/app"][:4] == (stat.S_IFREG | 0o755, (0, 0), 1, b"\x7fELF")
    assert found["r/bin/sh"][:4] == (stat.S_IFLNK | 0o777, (0, 0), 1, b"app")
    assert stat.S_ISFIFO(found["r/etc/fifo"].mode)
    assert len({file.number for file in found.values()}) == len(found)


def test_times_owners_and_the_order_of_writing_change_nothing(folder: Path) -> None:
    initramfs("root", "first")
    shutil.copytree("root", "again", symlinks=True, ignore=lambda *_: ["fifo", "app"])
    shutil.copy("root/bin/app", "again/bin/app")
    os.mkfifo("again/etc/fifo")
    os.utime("again/bin/app", (1, 1))
    if os.geteuid() == 0:
        os.chown("again/bin/app", 1000, 1000)
    initramfs("again", "second")
    assert Path("first").read_bytes() == Path("second").read_bytes()


def test_an_archive_keeps_owners_links_and_devices(folder: Path) -> None:
    archive(
        "root.tar",
        {
            "./": special(tarfile.DIRTYPE),
            "./dev/null": special(tarfile.CHRTYPE, device=(1, 3)),
            "./b/two": b"contents",
            "./a/one": special(tarfile.LNKTYPE, "./b/two"),
            "./c/three": special(tarfile.LNKTYPE, "b/two"),
            "./link": special(tarfile.SYMTYPE, "../outside"),
        },
    )
    initramfs("root.tar", "out")
    found = unpacked("out")
    assert list(found) == ["a", "a/one", "b", "b/two", "c", "c/three", "dev", "dev/null", "link"]
    assert found["dev/null"] == (stat.S_IFCHR | 0o640, (1000, 100), 1, b"", (1, 3), 8)
    linked = [found[name] for name in ("a/one", "b/two", "c/three")]
    assert [file.data for file in linked] == [b"", b"", b"contents"]
    assert {(file.links, file.number) for file in linked} == {(3, linked[0].number)}
    assert found["link"].data == b"../outside"


def test_layers_lie_over_each_other(folder: Path) -> None:
    image(
        "app.oci",
        [
            {"a/old": b"1", "a/keep": b"2", "b/x": b"3", "c": b"4", "d/deep/y": b"5", "e": b"6"},
            {"a/.wh.old": b"", "b/.wh..wh..opq": b"", "b/new": b"7", "c/now-a-folder": b"8"},
            {".wh.d": b"", "e": b"9", "f": special(tarfile.LNKTYPE, "a/keep")},
        ],
        {"Cmd": ["/bin/app", "x y"], "Env": ["PATH=/bin"]},
    )
    initramfs("--container", "--env", "NODE=3", "app.oci", "out")
    found = unpacked("out")
    assert {name: file.data for name, file in found.items() if stat.S_ISREG(file.mode)} == {
        "cmd": b"/bin/app\nx y\n",
        "env": b"PATH=/bin\nNODE=3\n",
        "rootfs/a/keep": b"",
        "rootfs/b/new": b"7",
        "rootfs/c/now-a-folder": b"8",
        "rootfs/e": b"9",
        "rootfs/f": b"2",
    }
    assert found["rootfs/a/keep"].links == 2
    initramfs("--container", *COMMAND, "app.oci", "out")
    assert unpacked("out")["cmd"].data == b"/bin/app\na b\n"


def test_files_beside_the_root(folder: Path) -> None:
    Path("init").write_bytes(b"init")
    Path("init").chmod(0o755)
    initramfs("--add", "init=init", "--add", "modules/1.ko=root/etc/a-b", "out")
    found = unpacked("out")
    assert list(found) == ["init", "modules", "modules/1.ko"]
    assert found["init"].mode == stat.S_IFREG | 0o755


def test_the_tool_that_everybody_has_reads_it(folder: Path) -> None:
    if shutil.which("cpio") is None:
        pytest.skip("cpio is not installed")
    Path("out").mkdir()
    initramfs("root", "out.gz")
    packed = gzip.decompress(Path("out.gz").read_bytes())
    command = ["cpio", "--extract", "--quiet", "--no-absolute-filenames", "--make-directories"]
    subprocess.run(command, input=packed, cwd="out", check=True)
    assert Path("out/bin/sh").read_bytes() == b"\x7fELF"
    assert Path("out/etc/a-b").read_text() == "1"


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        (["nothing", "out"], 1, "No such file"),
        (["root/bin/app", "out"], 1, "file could not be opened successfully"),
        (["upward.tar", "out"], 1, "'../x' leads out of the archive"),
        (["through.tar", "out"], 1, "'bin/x' lies in 'bin', which is no folder"),
        (["dangling.tar", "out"], 1, "'x' is a link to 'y', not there"),
        (["two.oci", "out"], 1, "two.oci holds 2 images, expected 1"),
        (["digest.oci", "out"], 1, "a digest is not sha256 of 64 digits"),
        (["socket", "out"], 1, "socket/it is a socket"),
        (["--container", "root", "out"], 1, "no command to start: --command JSON, or an OCI arch"),
        (["--container", "--command", "[]", "root", "out"], 1, "no command to start"),
        (["--container", "--command", '"a"', "root", "out"], 1, "no command to start"),
        (["--container", "--command", "{", "root", "out"], 1, "Expecting property name"),
        (["--container", "--command", '["a\\nb"]', "root", "out"], 1, "the command holds a line b"),
        (["--container", *COMMAND, "--env", "A=\n", "root", "out"], 1, "the environment holds a l"),
        (["--add", "init=nothing", "out"], 1, "No such file"),
        (["root", "no/out"], 1, "No such file"),
        (["root", "another", "out"], 2, "one ROOT and one OUTPUT"),
        ([], 2, "the following arguments are required"),
    ],
)
def test_a_ramdisk_that_cannot_be(
    folder: Path, arguments: list[str], status: int, part: str
) -> None:
    archive("upward.tar", {"../x": b""})
    archive("through.tar", {"bin": special(tarfile.SYMTYPE, "/usr/bin"), "bin/x": b""})
    archive("dangling.tar", {"x": special(tarfile.LNKTYPE, "y")})
    image("two.oci", [], {}, copies=2)
    manifests = json.dumps({"manifests": [{"digest": "sha256:../../x"}]}).encode()
    archive("digest.oci", {"oci-layout": b"", "index.json": manifests})
    Path("socket").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket/it")
    before = set(os.listdir())
    assert part in initramfs(*arguments, status=status)
    assert set(os.listdir()) == before


# ---- images


def build(*arguments: str, status: int = 0, by: Path = BUILD) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        [by, *arguments],
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "PATH": path},
    )
    assert ran.returncode == status, ran.stderr
    return ran.stdout if status == 0 else ran.stderr


def ramdisks(path: str) -> list[dict[str, File]]:
    data = Path(path).read_bytes()
    found = []
    for section in read(io.BytesIO(data)).sections:
        if section.kind is Kind.RAMDISK:
            Path("ramdisk").write_bytes(data[section.contents : section.end])
            found.append(unpacked("ramdisk"))
    Path("ramdisk").unlink()
    return found


@pytest.fixture
def blobs(folder: Path) -> Path:
    """What nitro-cli's package has of a kernel."""
    made = folder / "blobs"
    made.mkdir()
    for name in ("bzImage", "Image", "init", "nsm.ko"):
        (made / name).write_text(f"nitro-cli's {name}")
    (made / "cmdline").write_text("reboot=k panic=30\n")
    return made


def test_an_image_with_the_kernel_of_nitro_cli(blobs: Path) -> None:
    options = ("--root", "root", "--blobs", "blobs", *COMMAND, "--name", "app")
    printed = build(*options, "one.eif")
    assert Path("one.json").read_text() == printed
    first, second = ramdisks("one.eif")
    assert {name: file.data for name, file in first.items()} == {
        "init": b"nitro-cli's init",
        "nsm.ko": b"nitro-cli's nsm.ko",
    }
    assert second["rootfs/bin/app"].data == b"\x7fELF"
    assert second["cmd"].data == b"/bin/app\na b\n"
    assert build(*options, "two.eif") == printed
    assert Path("one.eif").read_bytes() == Path("two.eif").read_bytes()
    assert "one.eif exists" in build(*options, "one.eif", status=1).replace("one.json", "one.eif")
    assert build(*options, "--force", "one.eif") == printed


def test_an_image_with_a_kernel_of_ones_own(folder: Path) -> None:
    """Our init is compiled, the same each time, and modules keep their order."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    for name in ("kernel", "vsock.ko", "nsm.ko"):
        Path(name).write_text(name)
    options = ["--root", "root", "--kernel", "kernel", "--cmdline", "reboot=k", *COMMAND]
    options += ["--module", "vsock.ko", "--module", "nsm.ko"]
    assert build(*options, "one.eif") == build(*options, "two.eif")
    assert Path("one.eif").read_bytes() == Path("two.eif").read_bytes()
    first, _ = ramdisks("one.eif")
    assert list(first) == ["init", "modules", "modules/100-vsock.ko", "modules/101-nsm.ko"]
    assert first["init"].data.startswith(b"\x7fELF")
    assert first["init"].mode == stat.S_IFREG | 0o755


def kernel_archive(path: str, **left_out: bool) -> None:
    """What `enclave/build-image --kernel` makes."""
    members: dict[str, Any] = {
        "./vmlinuz": b"Debian's kernel",
        "./cmdline": b"reboot=k\n",
        "./init": b"\x7fELF",
        "./modules/100-virtio_mmio.ko": b"first",
        "./modules/101-nsm.ko": b"second",
    }
    for name in left_out:
        del members[f"./{name}"]
    archive(path, members)


def test_an_image_with_the_kernel_of_debian(folder: Path) -> None:
    kernel_archive("kernel.tar")
    options = ["--root", "root", "--kernel", "kernel.tar", *COMMAND]
    assert build(*options, "one.eif") == build(*options, "two.eif")
    assert Path("one.eif").read_bytes() == Path("two.eif").read_bytes()
    first, _ = ramdisks("one.eif")
    names = ["init", "modules", "modules/100-virtio_mmio.ko", "modules/101-nsm.ko"]
    assert list(first) == names
    assert first["modules/101-nsm.ko"].data == b"second"
    with Path("one.eif").open("rb") as file:
        assert read(file).command_line == b"reboot=k"
    build(*options, "--cmdline", "quiet", "three.eif")
    with Path("three.eif").open("rb") as file:
        assert read(file).command_line == b"quiet"


def test_the_kernel_of_debian_is_the_default(folder: Path) -> None:
    """It lies where `enclave/build-image --kernel` leaves it; without it, that is what is said."""
    shutil.copytree(BUILD.parent, "copy/enclave")
    options = ["--root", "root", *COMMAND]
    build_copy = Path("copy/enclave/build-eif").absolute()
    assert "enclave/build-image --kernel makes it" in build(
        *options, "a.eif", status=2, by=build_copy
    )
    Path("copy/.cache/image").mkdir(parents=True)
    kernel_archive("copy/.cache/image/attestor-kernel.tar")
    assert build(*options, "a.eif", by=build_copy) == build(
        *options, "--kernel", "copy/.cache/image/attestor-kernel.tar", "b.eif"
    )
    kernel_archive("copy/.cache/image/attestor-kernel.tar", init=True)
    assert "is not what enclave/build-image" in build(*options, "c.eif", status=1, by=build_copy)
    assert not Path("c.eif").exists()


@pytest.mark.parametrize(
    ("options", "status", "part"),
    [
        (["--root", "root", "--blobs", "blobs", *COMMAND], 2, "OUTPUT is missing"),
        (["--root", "root", "--blobs", "blobs", *COMMAND, "app"], 2, "a name that ends in .eif"),
        (["--blobs", "blobs", "app.eif"], 2, "one of --root and --image is needed"),
        (["--root", "root", "--image", "x", "app.eif"], 2, "one of --root and --image is needed"),
        (["--root", "root", "--kernel", "k", "app.eif"], 2, "--kernel FILE wants --cmdline"),
        (["--root", "root", "--kernel", "k", "--blobs", "b", "app.eif"], 2, "not both"),
        (["--root", "root", "--module", "m", "app.eif"], 2, "--module goes with --kernel FILE"),
        (["--root", "root", "--kernel", "no.tar", "app.eif"], 2, "no.tar is not there"),
        (["--root", "root", "--blobs", "blobs", "app.eif"], 1, "no command to start"),
        (["--root", "root", "--blobs", "root", *COMMAND, "app.eif"], 1, "first ramdisk cannot be"),
        (["--root"], 2, "--root wants a value"),
        (["--rot"], 2, "no such option: --rot"),
    ],
)
def test_an_image_that_cannot_be(blobs: Path, options: list[str], status: int, part: str) -> None:
    before = set(os.listdir())
    assert part in build(*options, status=status)
    assert set(os.listdir()) == before


def test_the_help_of_build_eif(folder: Path) -> None:
    assert "--blobs DIR" in build("--help")
