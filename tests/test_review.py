"""What checks a change where it is reviewed: the action, the hooks, and the shell in them."""

from __future__ import annotations

import errno
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import yaml  # type: ignore[import-untyped]  # moto brings it, without types

from tests.conftest import ROOT, Run
from tests.eif_images import PARTS, assembled
from tests.test_policy_commands import attested, policy_of

if TYPE_CHECKING:
    from collections.abc import Mapping

ACTION: Final = ROOT / ".github" / "actions" / "check"
DESCRIBED: Final = yaml.safe_load((ACTION / "action.yml").read_text(encoding="utf-8"))
STEPS: Final[list[dict[str, Any]]] = DESCRIBED["runs"]["steps"]
HOOKS: Final = {
    hook["id"]: hook for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
}
PAGE: Final = (ROOT / "docs" / "review.md").read_text(encoding="utf-8")
OPEN: Final = json.dumps(policy_of(attested("0" * 96)))
GOOD: Final = json.dumps(policy_of(attested()))
HOSTILE: Final = "::error::x,y:%0A;##[error]$(touch owned)`touch owned`"


@pytest.fixture
def change(tmp_path: Path) -> Path:
    """A checkout with policies and images, some of them hostile."""
    (tmp_path / "policies" / "of a team").mkdir(parents=True)
    files: dict[str, str | bytes] = {
        "policies/good.json": GOOD,
        "policies/of a team/open.json": OPEN,
        f"{HOSTILE}.json": OPEN,
        "text.json": "text\n::error::owned",
        "-x.json": GOOD,
        "app.eif": assembled(PARTS),
        "bad.eif": assembled(PARTS)[:-1],
        "attestor.py": "raise SystemExit('the module of a stranger')",
        "json.py": "raise SystemExit('the module of a stranger')",
    }
    for name, data in files.items():
        text = data if isinstance(data, bytes) else data.encode()
        (tmp_path / name).write_bytes(text)
    return tmp_path


def bash(script: str, folder: Path, environment: Mapping[str, str]) -> Run:
    """Run a step's shell as the runner does: bash, by -e and pipefail."""
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=120,
    )
    return Run(done.returncode, done.stdout, done.stderr.decode())


def checked(folder: Path, policies: str = "", images: str = "") -> Run:
    """Run the last step of the action in a checkout, with this Python in the place of its own."""
    runner = folder / ".runner"
    runner.mkdir(exist_ok=True)
    if not (runner / "attestor").exists():
        (runner / "attestor").symlink_to(sys.prefix)
    step = STEPS[-1]
    environment = {"inputs.policies": policies, "inputs.images": images}
    environment |= {"github.action_path": str(ACTION)}
    filled = {
        name: re.sub(r"\$\{\{ (.*?) \}\}", lambda found: environment[found[1]], text)
        for name, text in step["env"].items()
    }
    run = bash(step["run"], folder, {**filled, "RUNNER_TEMP": str(runner)})
    assert not (folder / "owned").exists()
    return run


# ---- the page


def test_the_page_shows_what_there_is() -> None:
    workflow, config = (
        yaml.safe_load(text)
        for text in re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    )
    step = workflow["jobs"]["enclave"]["steps"][-1]
    assert step["uses"].startswith(f"OWNER/REPOSITORY/{ACTION.relative_to(ROOT)}@")
    assert step["with"].keys() == DESCRIBED["inputs"].keys()
    assert [hook["id"] for hook in config["repos"][0]["hooks"]] == list(HOOKS)
    assert set(re.findall(r"^\| `([a-z]+)` \|", PAGE, re.MULTILINE)) == DESCRIBED["inputs"].keys()


def test_the_command_of_the_page(change: Path) -> None:
    (command,) = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    assert bash(command, change, {"PATH": path}) == Run(0, b"", "")


# ---- the action


def test_nothing_of_a_workflow_is_pasted_into_shell() -> None:
    """An expression in `run` is replaced before the shell reads it, whatever it holds."""
    for step in STEPS:
        assert "${{" not in step.get("run", "")
        assert step.get("shell", "bash") == "bash"


def test_actions_are_pinned_as_in_the_workflow() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    text = (ACTION / "action.yml").read_text(encoding="utf-8")
    (used,) = re.findall(r"uses: (.*)$", text, re.MULTILINE)
    assert re.fullmatch(r"actions/setup-python@[0-9a-f]{40} # v[0-9.]+", used)
    assert f"uses: {used}\n" in workflow


def test_the_installing_step_runs_no_module_of_the_change(change: Path) -> None:
    """With a recorder in the place of Python: what is run, and where."""
    recorder = change / "python"
    recorder.write_text(
        f'#!/bin/sh\nprintf "%s|" "$PWD" "$@" >> {change}/calls; echo >> {change}/calls\n'
        f'mkdir -p {change}/attestor/bin; cp "$0" {change}/attestor/bin/python 2>/dev/null || :\n'
    )
    recorder.chmod(0o755)
    environment = {"PYTHON": str(recorder), "ACTION": str(ACTION), "RUNNER_TEMP": str(change)}
    assert bash(STEPS[1]["run"], change, environment).status == 0
    calls = [line.split("|")[:-1] for line in (change / "calls").read_text().splitlines()]
    assert {(call[0], call[1], call[2]) for call in calls} == {(str(ROOT), "-I", "-m")}
    assert [call[3] for call in calls] == ["venv", "pip", "pip"]
    assert "--require-hashes" in calls[1]
    files = [ROOT / calls[1][at + 1] for at, word in enumerate(calls[1]) if word == "-r"]
    assert len(files) == 2
    assert all(file.exists() for file in files)
    assert calls[2][-3:] == ["--no-deps", "--no-build-isolation", "."]


def test_good_files_pass(change: Path) -> None:
    run = checked(change, "policies/good.json\n\n  -x.json  \n", "app.eif")
    assert (run.status, run.err) == (0, "")
    text = run.out.decode()
    assert text.startswith("'policies/good.json': no fault\n'-x.json': no fault\n::stop-commands::")
    assert re.search(r"^  PCR0 +image$", text, re.MULTILINE)
    first, *_, last = text.partition("::stop-commands::")[2].splitlines()
    assert last == f"::{first}::"


def test_findings_are_annotations_of_their_file(change: Path) -> None:
    run = checked(change, "policies/**/*.json")
    assert (run.status, run.err) == (4, "")
    annotated = [line for line in run.out.decode().splitlines() if line.startswith("::")]
    assert annotated
    for line in annotated:
        assert line.startswith(
            "::error file=policies/of a team/open.json,title=attestor::statement 2: "
        )
        assert "%0Afix: " in line


def test_names_and_texts_command_nothing(change: Path) -> None:
    run = checked(change, f"{HOSTILE}.json\ntext.json\n/nowhere/*.json", f"bad.eif\n{HOSTILE}.eif")
    assert run.status == 4
    lines = run.out.decode().splitlines()
    name = HOSTILE.replace("%", "%25").replace(":", "%3A").replace(",", "%2C")
    assert lines[0].startswith(f"::error file={name}.json,title=attestor::statement 2: ")
    assert any(
        line.startswith("::error file=text.json,title=attestor::text.json") for line in lines
    )
    assert any(line.startswith("::error file=bad.eif,title=attestor::bad.eif") for line in lines)
    assert "::error title=attestor::nothing is called /nowhere/*.json" in lines
    assert f"::error title=attestor::nothing is called {HOSTILE}.eif".replace("%", "%25") in lines
    commands = [line for line in lines if line.startswith("::")]
    assert all(re.match(r"::error (file=[^:]*,)?title=attestor::", line) for line in commands)


def test_a_name_in_the_log_is_no_command(change: Path) -> None:
    """The runner takes `##[command]` anywhere in a line."""
    name = "##[stop-commands]x"
    (change / f"{name}.json").write_text(GOOD)
    (change / f"{name}.eif").write_bytes(assembled(PARTS))
    run = checked(change, f"{name}.json", f"{name}.eif")
    assert run.status == 0
    assert b"##[" not in run.out
    assert run.out.count(rb"'\x23\x23[stop-commands]x") == 2


def test_no_name_leads_away_from_others(change: Path) -> None:
    """What is called like the pattern is one of its files, and so is what hides."""
    (change / "policies" / "**").mkdir()
    (change / "policies" / "**" / "*.json").write_text(GOOD)
    (change / "policies" / ".x").mkdir()
    (change / "policies" / ".x" / ".y.json").write_text(OPEN)
    run = checked(change, "policies/**/*.json")
    assert run.status == 4
    text = run.out.decode()
    for name in ("of a team/open.json", ".x/.y.json"):
        assert f"::error file=policies/{name},title=attestor::statement 2: " in text
    assert "'policies/**/*.json': no fault" in text
    assert "'policies/good.json': no fault" in text


def test_nothing_hides_its_neighbours(change: Path) -> None:
    """A link to itself is no folder, and no reason to leave the others; a name may have lines."""
    folder = change / "policies" / "of a team"
    (folder / "loop").symlink_to("loop")
    (folder / "nowhere").symlink_to("gone/for/ever")
    (folder / "two\nlines.json").write_text(OPEN)
    for pattern in ("policies/**/*.json", "policies/of a team/**"):
        run = checked(change, pattern)
        text = run.out.decode()
        assert "::error file=policies/of a team/open.json,title=attestor::statement 2: " in text
        assert "::error file=policies/of a team/two%0Alines.json,title=attestor::" in text


def test_a_tree_as_deep_as_links_can_make_it(change: Path) -> None:
    (change / "deep").mkdir()
    for number in range(1500):
        (change / "deep" / str(number)).mkdir()
        (change / "deep" / str(number) / "n").symlink_to(f"../{number + 1}")
    (change / "deep" / "1400" / "open.json").write_text(OPEN)
    run = checked(change, "deep/1399/**/*.json")
    assert (run.status, run.err) == (4, "")
    assert b"::error file=deep/1399/n/open.json,title=attestor::statement 2: " in run.out
    run = checked(change, "deep/0/**/*.json")  # by this way nobody can read it
    assert (run.status, run.err) == (2, "")
    assert b"Too many levels of symbolic links" in run.out


def test_a_folder_that_cannot_be_read(
    change: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is in it would pass unseen."""
    listdir = os.listdir

    def refuse(path: str) -> list[str]:
        if path.endswith("of a team"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.chdir(change)
    monkeypatch.setenv("POLICIES", "policies/**/*.json")
    assert runpy.run_path(str(ACTION / "annotate.py"))["main"]() == 2
    assert capsys.readouterr().out == (
        "::error title=attestor::policies/of a team/ cannot be looked at: Permission denied\n"
    )


def test_links_between_folders(change: Path) -> None:
    """They are followed, as whoever uses the files follows them, and not for ever."""
    (change / "elsewhere").mkdir()
    (change / "elsewhere" / "open.json").write_text(OPEN)
    (change / "policies" / "linked").symlink_to("../elsewhere")
    (change / "policies" / "out").symlink_to("/")
    for name in ("again", "and again"):
        (change / "policies" / name).symlink_to(".")
    run = checked(change, "policies/**/*.json")
    assert run.status == 4
    assert b"::error file=policies/linked/open.json," in run.out
    for name in "abcdefghijklmnopqrstuvw":
        (change / "policies" / name).mkdir()
        for link in ("1", "2"):
            (change / "policies" / name / link).symlink_to(f"../{chr(ord(name) + 1)}")
    run = checked(change, "policies/**/*.json")
    assert run.status == 2
    assert run.out.startswith(
        b"::error title=attestor::more than 100000 names to look at: policies"
    )
    assert run.out.count(b"\n") == 1


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("a.json", "a.json", True),
        ("a.json", "a_json", False),
        ("*.json", "b/a.json", False),
        ("**/*.json", "a.json", True),
        ("**/*.json", "b/c/a.json", True),
        ("p/**/x/?.json", "p/q/r/x/y.json", True),
        ("p/**/x/?.json", "p/x/yy.json", False),
        ("p/**", "p/q/r", True),
        ("p**/a", "p/q/a", False),
        ("[a].json", "[a].json", True),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, name: str, fits: bool) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(GOOD)
    assert (checked(tmp_path, pattern).status == 0) == fits


@pytest.mark.parametrize(
    ("policies", "images", "status"),
    [("", " \n ", 2), ("nothing.json", "", 2), ("text.json", "", 2), ("", "bad.eif", 6)],
)
def test_what_is_not_checked_is_no_success(
    change: Path, policies: str, images: str, status: int
) -> None:
    run = checked(change, policies, images)
    assert (run.status, run.err) == (status, "")
    assert run.out.startswith(b"::error ")


# ---- the hooks


def hook(name: str, folder: Path, *files: str) -> Run:
    """Run a hook as pre-commit does: its entry split as by a shell, its arguments, the files."""
    described = HOOKS[name]
    program, *arguments = shlex.split(described["entry"])
    done = subprocess.run(
        [Path(sys.executable).parent / program, *arguments, *described["args"], *files],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=120,
    )
    return Run(done.returncode, done.stdout, done.stderr.decode())


def test_the_hook_for_policies(change: Path) -> None:
    assert hook("attestor-policy-check", change, "policies/good.json", "-x.json") == Run(0, b"", "")
    run = hook(
        "attestor-policy-check", change, "policies/good.json", "policies/of a team/open.json"
    )
    assert (run.status, run.err) == (4, "")
    assert run.out.startswith(b"policies/of a team/open.json: statement 2: ")
    assert hook("attestor-policy-check", change, "text.json").status == 2


def test_the_hook_for_images(change: Path) -> None:
    run = hook("attestor-eif-describe", change, "app.eif", "app.eif")
    assert (run.status, run.err) == (0, "")
    assert run.out.count(b"file            app.eif\n") == 2
    assert hook("attestor-eif-describe", change, "app.eif", "bad.eif").status == 6


@pytest.mark.parametrize(
    ("name", "taken", "left"),
    [
        (
            "attestor-policy-check",
            ["key-policy.json", "terraform/key-policy.json", "a/my-key-policy-2.json"],
            ["package.json", "key-policy.json.tftpl", "key-policy/other.json"],
        ),
        ("attestor-eif-describe", ["app.eif", "a/b.eif"], ["app.eif.json", "eif"]),
    ],
)
def test_the_files_of_the_hooks(name: str, taken: list[str], left: list[str]) -> None:
    assert HOOKS[name]["language"] == "python"
    # a link is of type symlink and no other, and whoever uses the files follows it
    assert HOOKS[name]["types"] == []
    assert "symlink" in HOOKS[name]["types_or"]
    found = re.compile(HOOKS[name]["files"])
    assert [one for one in taken + left if found.search(one)] == taken
