"""What the workflows may do, and whose code they run."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any, Final

import pytest
import yaml  # type: ignore[import-untyped]  # moto brings it, without types
from hatchling.metadata.spec import DEFAULT_METADATA_VERSION

from tests.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

WORKFLOWS: Final = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTIONS: Final = sorted((ROOT / ".github" / "actions").glob("*/action.yml"))
ALL: Final = pytest.mark.parametrize(
    "path", [*WORKFLOWS, *ACTIONS], ids=lambda path: str(path.relative_to(ROOT / ".github"))
)


def parsed(path: Path) -> dict[str, Any]:
    """A file as the machine that runs it reads it."""
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def steps(path: Path) -> list[dict[str, Any]]:
    """The steps of all jobs of a workflow, or of an action."""
    found = parsed(path)
    parts = found["jobs"].values() if "jobs" in found else [found["runs"]]
    return [step for part in parts for step in part["steps"]]


RELEASE: Final = parsed(ROOT / ".github" / "workflows" / "release.yml")["jobs"]


@ALL
def test_every_step_says_what_it_does_and_every_job_ends(path: Path) -> None:
    assert all(len({"run", "uses"} & step.keys()) == 1 for step in steps(path))
    for job in parsed(path).get("jobs", {}).values():
        assert job["timeout-minutes"] <= 90
        assert job["runs-on"]


@ALL
def test_every_action_is_pinned_and_no_checkout_keeps_a_credential(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for step in steps(path):
        used = step.get("uses", "./")
        if used.startswith("./"):
            continue
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", used)
        assert re.search(rf"uses: {re.escape(used)} # v\d+\.\d+\.\d+$", text, re.MULTILINE)
        if used.startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@ALL
def test_commands_are_not_made_of_what_others_write(path: Path) -> None:
    """An expression in a command is text of whoever names a branch or a tag."""
    assert [step["run"] for step in steps(path) if "${{" in step.get("run", "")] == []


@ALL
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_commands_are_without_fault(path: Path) -> None:
    for step in steps(path):
        command = ["shellcheck", "--shell=bash", "-"]
        script = f"set -e\n{step.get('run', '')}\n"  # as whoever runs it sets
        run = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
        assert (run.returncode, run.stdout) == (0, "")


def test_only_what_publishes_may_write() -> None:
    assert parsed(ROOT / ".github" / "workflows" / "release.yml")["permissions"] == {}
    writing = {
        name: {what for what, how in job["permissions"].items() if how == "write"}
        for name, job in RELEASE.items()
    }
    assert writing == {
        "wheels": set(),
        "image": set(),
        "try": set(),
        "publish": {"id-token", "attestations"},
        "page": {"contents"},
    }
    assert "secrets." not in str(RELEASE)
    assert "actions/checkout@" not in str([RELEASE["publish"], RELEASE["page"]])
    assert RELEASE["publish"]["needs"] == ["wheels", "image", "try"]


def test_the_page_makes_each_image_as_the_workflow_does() -> None:
    """Root, the snapshot and the tag: without one of them the digest is another, or none."""
    page = (ROOT / "docs" / "verify-a-release.md").read_text(encoding="utf-8")
    for machine in RELEASE["image"]["strategy"]["matrix"]["include"]:
        name = f"attestor-enclave-{machine['arch']}"
        (flags,) = re.findall(rf"^sudo make image IMAGE_FLAGS='(.*{name} .*)'$", page, re.MULTILINE)
        assert flags.startswith("--twice ")
        assert flags.endswith(f"--tag {name} --apt SNAPSHOT")
        assert f"\nmake sbom IMAGE={name}" in page


def test_what_is_published_is_of_the_job_that_built_it() -> None:
    """An artifact of another job must not bring a wheel of its own."""
    for job in ("publish", "page"):
        downloads = [
            step["with"]
            for step in RELEASE[job]["steps"]
            if step.get("uses", "").startswith("actions/download-artifact@")
        ]
        assert downloads == [
            {"name": "wheels", "path": "wheels/"},
            {"pattern": "image-*", "path": "images/", "merge-multiple": True},
        ]
    uploaded = [
        step["with"]["name"]
        for job in RELEASE.values()
        for step in job["steps"]
        if step.get("uses", "").startswith("actions/upload-artifact@")
    ]
    assert uploaded == ["wheels", "image-${{ matrix.arch }}"]


def test_the_publisher_takes_the_metadata_that_hatchling_writes() -> None:
    """2.5 is known to Twine from 7.0.0 on, which the publisher has from 1.14.2 on: before it tells
    anybody, the release would be attested, and refused.
    """
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    (version,) = re.findall(r"gh-action-pypi-publish@\w+ # v([\d.]+)$", text, re.MULTILINE)
    assert tuple(map(int, version.split("."))) >= (1, 14, 2)
    assert DEFAULT_METADATA_VERSION == "2.5"


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
