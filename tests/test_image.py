"""The scripts that build the enclave image, with a stand-in for buildah; the image itself is for
`make image` and `make vm-test`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.conftest import ROOT
from tests.test_entrypoint import APPLETS

if TYPE_CHECKING:
    from pathlib import Path

BUILDAH: Final = f"""#!{sys.executable}
import json, pathlib, sys
state = pathlib.Path(__file__).with_name("state.json")
images = json.loads(state.read_text())
while sys.argv[1].startswith("--"):
    del sys.argv[1:3]
command, last = sys.argv[1], sys.argv[-1]
if command == "images":
    for name, image in images.items():
        print("sha256:" + name, image["tag"])
elif command == "rmi":
    if any(image["parent"] == last for image in images.values()):
        sys.exit("image has children")
    del images[last]
    state.write_text(json.dumps(images))
elif command != "rm":
    sys.exit("unknown: " + command)
"""


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("there", "missing"), [((), "buildah debootstrap"), (("debootstrap",), "buildah")]
)
def test_missing_tools_are_named(tmp_path: Path, there: tuple[str, ...], missing: str) -> None:
    """buildah too, although the script has a function of that name."""
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or "")
    for tool in there:
        program(tmp_path, tool, "#!/bin/sh\n")
    done = subprocess.run(
        [ROOT / "enclave" / "build-image"],
        env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    expected = f"error: missing: {missing} (on Debian: apt-get install {missing})\n"
    assert (done.returncode, done.stderr) == (2, expected)


def image(number: int, parent: int | None = None, tag: str = "<none>") -> dict[str, Any]:
    return {f"{number:x}" * 64: {"tag": tag, "parent": parent and f"{parent:x}" * 64}}


def test_what_no_build_used_is_forgotten(tmp_path: Path) -> None:
    """Kept are images with a name, and the steps of the last build of each, cached ones too."""
    images = {
        **image(1, tag="localhost/debian"),
        **image(2, parent=1),  # a step of today's build
        **image(3, parent=2),  # of today's, from the cache
        **image(4, parent=2),  # of an earlier build, and what was made from it
        **image(5, parent=4),
        **image(6, parent=5),
        **image(7, parent=3, tag="localhost/attestor-enclave"),
        **image(8, parent=3),  # of another image
    }
    (tmp_path / "state.json").write_text(json.dumps(images))
    program(tmp_path, "buildah", BUILDAH)
    cache = tmp_path / "cache"
    (cache / "tree.abcdef").mkdir(parents=True)
    (cache / "debootstrap.log").write_text("I: base-system\n")
    (cache / "a.log").write_text(
        f"STEP 1/3: FROM x\n--> {'2' * 11}\n--> Using cache {'3' * 64}\n"
        f"--> {'7' * 11}\n{'7' * 64}\n"
    )
    (cache / "b.log").write_text(f"STEP 1/1: FROM x\n--> {'8' * 12}\n")
    script = f"source {ROOT}/enclave/buildah.sh; set -euo pipefail; cache=$1 driver=vfs; prune"
    done = subprocess.run(
        ["bash", "-c", script, "bash", str(cache)],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    left = json.loads((tmp_path / "state.json").read_text())
    assert {name[0] for name in left} == {"1", "2", "3", "7", "8"}
    assert {path.name for path in cache.iterdir()} == {"a.log", "b.log", "debootstrap.log"}


def test_the_applets_speak_to_no_network_and_change_no_user() -> None:
    assert len(set(APPLETS)) == len(APPLETS)
    assert not set(APPLETS) & set(
        "adduser ftpget ftpput httpd insmod login modprobe nc nslookup ping ssl_client su tftp "
        "telnet telnetd udhcpc wget".split()
    )


@pytest.mark.parametrize("name", ["signing/key.pem", "signing-2/key.pem", "app.eif", "a/key.pem"])
def test_keys_and_images_stay_out_of_commits(name: str) -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert any(fnmatch(name.rpartition("/")[2], pattern) for pattern in ignored)


def test_what_the_image_is_made_of_is_there_to_be_copied() -> None:
    """The build sees what .dockerignore lets in, and nothing else of the tree."""
    lines = (ROOT / "Dockerfile.enclave").read_text(encoding="utf-8").splitlines()
    copied = {
        line.split()[1].partition("/")[0]
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
    }
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert copied == {line.removeprefix("!") for line in ignored if line.startswith("!")}
