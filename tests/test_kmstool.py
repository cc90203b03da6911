"""The page about the move from kmstool: what it shows runs, and attestor has every option in it."""

from __future__ import annotations

import base64
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from click.testing import CliRunner

import attestor
from tests.conftest import ROOT, Run
from tests.test_entrypoint import APPLETS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Enclave

    Call = Callable[..., Run]

PAGE: Final = (ROOT / "docs" / "kmstool.md").read_text(encoding="utf-8")
SHELLS: Final = {
    "bash": ["bash"],
    "strict bash": ["bash", "-euo", "pipefail"],
    "dash": ["dash"],
    "busybox": ["busybox", "sh"],
}


def blocks(info: str) -> list[str]:
    return re.findall(rf"^```{re.escape(info)}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(params=SHELLS)
def call(request: pytest.FixtureRequest, enclave: Enclave, tmp_path: Path) -> Call:
    """Run the page's function in a shell with the applets of the image, or this machine's tools."""
    shell = SHELLS[request.param]
    if not shutil.which(shell[0]):
        pytest.skip(f"{shell[0]} is not installed")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "attestor").symlink_to(Path(sys.executable).parent / "attestor")
    if shell[0] == "busybox":
        for applet in APPLETS:
            (programs / applet).symlink_to(shutil.which("busybox") or "")
    (script,) = blocks("sh")
    left = tmp_path / "left"
    left.mkdir()

    def run(ciphertext: bytes, prefix: str = "") -> Run:
        path = str(programs) if shell[0] == "busybox" else f"{programs}:{os.environ['PATH']}"
        done = enclave.run(
            shutil.which(shell[0]) or "",
            *shell[1:],
            "-c",
            prefix + script,
            environment={
                "PATH": path,
                "TMPDIR": str(left),
                "CIPHERTEXT": base64.b64encode(ciphertext).decode(),
                "KEY": enclave.kms.describe_key(KeyId="alias/nitrosim")["KeyMetadata"]["Arn"],
            },
        )
        assert list(left.iterdir()) == []
        return done

    return run


def test_the_function_in_kmstools_place_prints_what_kmstool_does(
    call: Call, enclave: Enclave
) -> None:
    secret = bytes(range(256)) * 16  # 4096 bytes, the most that Encrypt takes
    run = call(enclave.encrypt(secret))
    assert run == Run(0, b"PLAINTEXT: " + base64.b64encode(secret) + b"\n", "")


def test_the_function_ends_as_attestor_does(call: Call, enclave: Enclave) -> None:
    """Without `set -e` and `pipefail`, too."""
    ciphertext = enclave.encrypt()
    run = call(ciphertext[:-1] + bytes([ciphertext[-1] ^ 1]))
    assert (run.status, run.out) == (4, b""), run.err


@pytest.mark.parametrize("part", ["mktemp", "base64"])
def test_the_function_fails_with_each_of_its_parts(call: Call, enclave: Enclave, part: str) -> None:
    run = call(enclave.encrypt(), f"{part}() {{ false; }}\n")
    assert (run.status, run.out) == (1, b""), run.err


def test_every_command_of_the_page_has_the_options_that_it_shows() -> None:
    shown = "".join(blocks("console")).replace("\\\n", " ")
    commands = re.findall(r"^\$ attestor (.*)$", shown, re.MULTILINE)
    assert len(commands) == 3
    for words in map(shlex.split, commands):
        known = CliRunner().invoke(attestor.cli, [words[0], "--help"]).output
        options = [word for word in words if word.startswith("--")]
        assert [option for option in options if f"{option} " not in known] == [], words[0]


def test_the_options_of_the_table_are_those_of_the_commands() -> None:
    table = PAGE.partition("| kmstool | attestor |")[2].partition("\n\n")[0]
    cells = [line.split(" | ")[1] for line in table.splitlines()[2:]]
    options = {option for cell in cells for option in re.findall(r"--[a-z0-9-]+", cell)}
    assert options >= {"--vsock", "--imds-vsock", "--key-id", "--context", "--spec", "--bytes"}
    known = "".join(
        CliRunner().invoke(attestor.cli, [command, "--help"]).output
        for command in ("decrypt", "generate-data-key", "generate-random")
    )
    assert {option for option in options if option not in known} == set()
