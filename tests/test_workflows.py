"""What the workflows may do, and whose code they run."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import pytest

from tests.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

WORKFLOWS: Final = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTIONS: Final = sorted((ROOT / ".github" / "actions").glob("*/action.yml"))
RELEASE: Final = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("workflow", [*WORKFLOWS, *ACTIONS], ids=lambda path: str(path.name))
def test_every_action_is_pinned_and_no_checkout_keeps_a_credential(workflow: Path) -> None:
    text = workflow.read_text(encoding="utf-8")
    used = re.findall(r"^ +(?:- )?uses: (.*)$", text, re.MULTILINE)
    assert len(used) == text.count("uses: ")
    for action in used:
        pinned = re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)
        assert pinned or action.startswith("./"), action
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: str(path.name))
def test_commands_are_not_made_of_what_others_write(workflow: Path) -> None:
    """An expression in a command is text of whoever names a branch or a tag."""
    lines = workflow.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if re.match(r" +(- )?run: .*\$\{\{", line)] == []


def jobs() -> dict[str, str]:
    """The jobs of the release, by their names."""
    parts = re.split(r"^  (\w+):\n", RELEASE.partition("\njobs:\n")[2], flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_only_what_publishes_may_write() -> None:
    assert re.search(r"^permissions: \{\}$", RELEASE, re.MULTILINE)
    granted = {
        name: set(
            re.findall(r"^      ([\w-]+): (\w+)", text.partition("permissions:\n")[2], re.MULTILINE)
        )
        for name, text in jobs().items()
    }
    writing = {
        name: {what for what, how in all_ if how == "write"} for name, all_ in granted.items()
    }
    assert writing == {
        "wheels": set(),
        "image": set(),
        "try": set(),
        "publish": {"id-token", "attestations"},
        "page": {"contents"},
    }
    assert "secrets." not in RELEASE
    assert "actions/checkout@" not in jobs()["publish"] + jobs()["page"]
    assert re.search(r"needs: \[wheels, image, try\]", jobs()["publish"])


def test_the_page_names_every_wheel_of_a_release() -> None:
    page = (ROOT / "docs" / "verify-a-release.md").read_text(encoding="utf-8")
    script = (ROOT / "release" / "build-wheels").read_text(encoding="utf-8")
    (rust,) = re.findall(r"^rust=(\S+)$", script, re.MULTILINE)
    assert f"rustup toolchain install {rust} " in page
    platforms = re.findall(r"^    \[(\w+linux_\d+_\d+)_(\w+)\]=", script, re.MULTILINE)
    assert len(platforms) == 4
    for libc, machine in platforms:
        assert re.search(
            rf"-py3-none-{libc}_x86_64\.whl`.*_{machine}\.whl`|-{libc}_{machine}", page
        )
