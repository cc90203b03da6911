"""The page about the move from kmstool: what it shows runs, and attestor has every option in it."""

from __future__ import annotations

import base64
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from click.testing import CliRunner

import attestor
from tests.conftest import ROOT, Run

if TYPE_CHECKING:
    from tests.conftest import Enclave

PAGE: Final = (ROOT / "docs" / "kmstool.md").read_text(encoding="utf-8")


def blocks(info: str) -> list[str]:
    return re.findall(rf"^```{re.escape(info)}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_function_in_kmstools_place_prints_what_kmstool_does(enclave: Enclave) -> None:
    (script,) = blocks("sh")
    secret = bytes(range(256)) * 16  # 4096 bytes, the most that Encrypt takes
    ciphertext = enclave.encrypt(secret)
    run = enclave.run(
        "bash",
        "-euo",
        "pipefail",
        "-c",
        script,
        environment={
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CIPHERTEXT": base64.b64encode(ciphertext).decode(),
            "KEY": enclave.kms.describe_key(KeyId="alias/nitrosim")["KeyMetadata"]["Arn"],
        },
    )
    assert run == Run(0, b"PLAINTEXT: " + base64.b64encode(secret) + b"\n", "")


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
