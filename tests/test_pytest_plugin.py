"""The fixtures that nitrosim gives to other people's tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING, Final

from tests.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLE: Final = re.compile(
    r"```python\n(import boto3\n\nimport attestor\n\n\ndef test_.*?)```", re.DOTALL
)
MORE: Final = """

import os, subprocess, sys
import nsm


def test_a_subprocess(nitrosim_environment, nitrosim_world, tmp_path):
    command = [sys.executable, "-m", "attestor", "generate-random", "16", "-"]
    done = subprocess.run(
        command, env=nitrosim_environment, capture_output=True, cwd=tmp_path
    )
    assert (done.returncode, len(done.stdout)) == (0, 16), done.stderr
    assert nitrosim_environment["AWS_ENDPOINT_URL_KMS"] == nitrosim_world.url


def test_the_module(nitrosim_nsm):
    with nsm.Nsm() as module:
        assert module.describe_pcr(0).value == nitrosim_nsm.pcrs[0]


def test_everything_is_as_it_was():
    assert "AWS_ENDPOINT_URL_KMS" not in os.environ
"""


def test_the_example_in_the_documents(tmp_path: Path) -> None:
    """In a pytest of its own.

    It finds the plugin by its module, as an installed one is found by its entry point.
    """
    (example,) = EXAMPLE.findall((ROOT / "docs" / "testing.md").read_text(encoding="utf-8"))
    (tmp_path / "test_example.py").write_text(example + MORE, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-W",
        "error",
        "-p",
        "nitrosim.pytest_plugin",
        str(tmp_path),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, check=False, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


def test_the_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"nitrosim": "nitrosim.pytest_plugin"}


def test_the_plugin_imports_next_to_nothing() -> None:
    program = (
        "import sys, pytest; before = set(sys.modules); import nitrosim.pytest_plugin\n"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True, text=True
    )
    assert done.stdout == "['nitrosim', 'nitrosim.pytest_plugin']\n"
