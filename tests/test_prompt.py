"""What somebody at a prompt meets: completion, a reader that goes away, -v, empty variables."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import click
import pytest

import attestor
from attestor_io.text_options import FileName
from nitrosim.world import FAULTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Enclave


# -- completion


def complete(enclave: Enclave, program: str, *words: str) -> list[tuple[str, str]]:
    """What the command offers a shell for the last of these words: pairs of type and value."""
    module = {"attestor": "attestor", "nitrosim": "nitrosim.cli"}[program]
    environment = {
        f"_{program.upper()}_COMPLETE": "zsh_complete",
        "COMP_WORDS": " ".join([program, *words]),
        "COMP_CWORD": str(len(words)),
    }
    run = enclave.run(sys.executable, "-m", module, environment=environment)
    assert (run.status, run.err) == (0, "")
    lines = run.out.decode().splitlines()
    return list(zip(lines[::3], lines[1::3], strict=True))


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("decrypt", "--algorithm", "RSAES"), ["RSAES_OAEP_SHA_1", "RSAES_OAEP_SHA_256"]),
        (("generate-data-key", "--spec", "AES"), ["AES_256", "AES_128"]),
        (("generate-data-key-pair", "--spec", "SM"), ["SM2"]),
        (("metadata", "pl"), ["placement/region"]),
        (("decrypt", "--source", "n"), ["nsm", "nitrotpm"]),
        (("gen",), ["generate-data-key", "generate-data-key-pair", "generate-random"]),
        (("policy", "ch"), ["check"]),
        (("encrypt", "--format", "e"), ["esdk"]),
    ],
)
def test_values_are_completed(enclave: Enclave, words: tuple[str, ...], offered: list[str]) -> None:
    assert complete(enclave, "attestor", *words) == [("plain", value) for value in offered]


@pytest.mark.parametrize(
    "words",
    [
        ("decrypt", "se"),
        ("decrypt", "--any-key", "secret.enc", "/ru"),
        ("inject", "/etc/se"),
        ("inject", "m.toml", "--", "/usr/b"),
        ("verify", "--root", "ro"),
        ("policy", "explain", "policy.json", "--document", "d"),
    ],
)
def test_files_are_completed(enclave: Enclave, words: tuple[str, ...]) -> None:
    assert complete(enclave, "attestor", *words) == [("file", words[-1])]


def test_faults_are_completed(enclave: Enclave) -> None:
    offered = [name for name in FAULTS if name.startswith("tls")]
    assert complete(enclave, "nitrosim", "run", "--fault", "tls") == [
        ("plain", name) for name in offered
    ]


# -- a reader that goes away


@pytest.mark.parametrize(
    "command",
    [
        ("--help",),
        ("decrypt", "--help"),
        ("--version",),
        ("describe",),
        ("describe", "--json"),
        ("doctor",),
        ("decrypt", "--any-key", "blob", "-"),
    ],
    ids=" ".join,
)
def test_nobody_reads_what_is_printed(enclave: Enclave, command: tuple[str, ...]) -> None:
    """As with `| true`: the one who went away knows."""
    enclave.place(enclave.encrypt())
    reader, writer = os.pipe()
    os.close(reader)  # before anything is written: `true` itself may be slow to go
    done = subprocess.run(
        [sys.executable, "-m", "attestor", *command],
        cwd=enclave.folder, env=enclave.environment, stdout=writer, stderr=subprocess.PIPE,
        check=False, timeout=120,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (7, b"")


# -- -v


def test_a_line_is_said_once(enclave: Enclave) -> None:
    """The module is opened for randomness and for a document, each as often as it must."""
    enclave.place(enclave.encrypt())
    lines = enclave.decrypt("-v").err.splitlines()
    assert len(lines) == len(set(lines)) > 3


# -- variables of a shell that are not set


def names_of_files() -> Iterator[tuple[str, list[str]]]:
    """Every argument and option that names a file: its name, and a line where it is empty."""
    group = attestor.cli
    context = click.Context(group)
    for name in group.list_commands(context):
        yield from _of(group.get_command(context, name), [name])


def _of(command: click.Command | None, words: list[str]) -> Iterator[tuple[str, list[str]]]:
    assert command is not None
    for inner in getattr(command, "commands", {}).values():
        yield from _of(inner, [*words, inner.name])
    arguments = [one for one in command.params if isinstance(one, click.Argument)]
    for parameter in command.params:
        if isinstance(parameter.type, FileName):
            values = ["" if one is parameter else "1" for one in arguments]
            option = [] if parameter in arguments else [parameter.opts[0], ""]
            name = option[0] if option else parameter.human_readable_name
            yield name, [*words, *option, *values]


EMPTY: Final = list(names_of_files())


def test_every_command_has_files() -> None:
    assert {"CIPHERTEXT", "OUTPUT", "MANIFEST", "--root", "--receipt"} <= {
        name for name, _ in EMPTY
    }


@pytest.mark.parametrize(("name", "line"), EMPTY, ids=[" ".join(line) for _, line in EMPTY])
def test_no_name_is_empty(name: str, line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        attestor.cli(line)
    assert ended.value.code == attestor.InputError.status
    assert capsys.readouterr().err == (
        f"attestor: error: {name} is empty\n"
        "attestor: hint: perhaps a variable of the shell is not set\n"
    )


def test_a_folder_that_is_not_there(enclave: Enclave) -> None:
    """The hint is what makes it."""
    enclave.place(enclave.encrypt())
    command = ["decrypt", "--any-key", "blob", "a folder/of mine/out"]
    run = enclave.attestor(*command)
    assert run.status == 7
    assert run.error.endswith("cannot be written: there is no folder a folder/of mine")
    hint = run.err.splitlines()[-1].removeprefix("attestor: hint: ")
    assert hint == "mkdir -p 'a folder/of mine' makes it"
    assert enclave.run("sh", "-c", hint.removesuffix(" makes it")).status == 0
    assert enclave.attestor(*command).status == 0
