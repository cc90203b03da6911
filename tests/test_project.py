"""What the project says of itself is so: help, exit statuses, versions, locks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from typing import Final

import click
import pytest
from click.testing import CliRunner

import attestor
from tests.conftest import ROOT

README: Final = (ROOT / "README.md").read_text(encoding="utf-8")


def names_of(group: click.Group, prefix: str = "") -> list[str]:
    """Every command by its full name, and no group: "decrypt", "policy check"."""
    return [
        name
        for short, command in sorted(group.commands.items())
        for name in (
            names_of(command, f"{short} ") if isinstance(command, click.Group) else [prefix + short]
        )
    ]


COMMANDS: Final = names_of(attestor.cli)


def help_of(command: str) -> str:
    result = CliRunner().invoke(
        attestor.cli, [*command.split(), "--help"], terminal_width=100, max_content_width=100
    )
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readme_shows_the_help(command: str) -> None:
    """Write it anew with: python -m tests.test_project."""
    assert block(command, help_of(command)) in README


def block(command: str, text: str) -> str:
    return (
        f"<!-- begin help of {command} -->\n```\n{text.rstrip()}\n```\n<!-- end help of "
        f"{command} -->"
    )


def test_every_status_stands_in_docstring_readme_and_code() -> None:
    classes = [value for value in vars(attestor).values() if isinstance(value, type)]
    used = {value.status for value in classes if issubclass(value, attestor.AttestorError)}
    documented = {
        int(number) for number in re.findall(r"^    (\d)    ", attestor.__doc__ or "", re.MULTILINE)
    }
    in_readme = {int(number) for number in re.findall(r"^\| (\d) \|", README, re.MULTILINE)}
    assert used | {0, attestor._UNDETERMINED} == documented == in_readme


def test_the_statuses_in_the_help_of_decrypt() -> None:
    text = " ".join(help_of("decrypt").split())
    assert (
        "Exit status: 0 done, 1 bug, 2 usage, 3 no module, 4 KMS refused, 5 try again, 6 not "
        "authentic, 7 output." in text
    )


def test_the_version() -> None:
    result = CliRunner().invoke(attestor.cli, ["--version"])
    assert result.output == f"attestor {attestor.__version__}\n"


def test_dependencies_are_justified_and_locked_with_hashes() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *extras["esdk"], *extras["sim"], *extras["dev"]]:
        assert re.search(rf'"{re.escape(requirement)}",? +# \w', text), requirement
    for lock in (ROOT / "requirements").glob("*.txt"):
        content = lock.read_text(encoding="utf-8")
        assert content.count("==") <= content.count("--hash=sha256:")
        assert "://" not in content


def test_importing_attestor_loads_no_sdk_and_opens_nothing() -> None:
    program = (
        "import sys, attestor\n"
        "print([m for m in ('botocore', 'boto3', 'cryptography', 'cbor2', 'ctypes') if m in "
        "sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True, text=True
    )
    assert done.stdout == "[]\n"


def test_functions_are_short() -> None:
    """None of our functions is longer than a screen."""
    for path in [
        ROOT / "attestor.py",
        ROOT / "doctor.py",
        *(ROOT / "injection").glob("*.py"),
        *(ROOT / "nsm").glob("*.py"),
        *(ROOT / "nitrosim").glob("*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{path.name}: {node.name} has {length} lines"


def test_the_group_has_one_command_for_each_help_block() -> None:
    assert isinstance(attestor.cli, click.Group)
    assert sorted(re.findall(r"<!-- begin help of ([a-z -]+) -->", README)) == sorted(COMMANDS)


def write_help_into_the_readme() -> None:
    """Replace every block between its markers."""
    text = README
    for command in COMMANDS:
        pattern = rf"<!-- begin help of {command} -->.*?<!-- end help of {command} -->"
        text = re.sub(
            pattern, lambda _, name=command: block(name, help_of(name)), text, flags=re.DOTALL
        )  # type: ignore[misc]  # a default argument
    (ROOT / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_help_into_the_readme()
