"""The simulator's container: what its recipe, its compose file and the documents say of each other.

The image is built and tried by `make nitrosim-image`, which needs buildah and root.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml  # type: ignore[import-untyped]  # moto brings it, without types

from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable

FOLDER: Final = ROOT / "containers" / "nitrosim"
RECIPE: Final = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
SERVICES: Final[dict[str, Any]] = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
PAGE: Final = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")


def test_the_program_of_the_compose_file(tmp_path: Path) -> None:
    """In the world that its neighbour's options make; "$$" is how compose writes a dollar."""
    (script,) = SERVICES["your-program"]["command"]
    script = script.replace("$$", "$").replace(ready_file(), "/dev/null")
    programs = Path(sys.executable).parent
    run = [programs / "nitrosim", "run", *SERVICES["nitrosim"]["command"], "--"]
    done = subprocess.run(
        [*run, *SERVICES["your-program"]["entrypoint"], script],
        cwd=tmp_path,
        env={"PATH": f"{programs}:/usr/bin:/bin", "TMPDIR": str(tmp_path)},
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "the secret\n"), done.stderr
    assert "attestor: error" not in done.stderr


def ready_file() -> str:
    """What the recipe has the simulator write."""
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", RECIPE, re.MULTILINE)
    program, command, option, path = json.loads(entry)
    assert (program, command, option) == ("nitrosim", "serve", "--ready-file")
    return str(path)


def test_all_look_for_the_same_file_in_the_same_volume() -> None:
    path = ready_file()
    folder = str(Path(path).parent)
    assert f"\nVOLUME {folder}\n" in RECIPE
    assert f" TMPDIR={folder}\n" in RECIPE
    assert SERVICES["nitrosim"]["healthcheck"]["test"] == ["CMD", "test", "-e", path]
    volumes: Iterable[str] = {
        volume for service in SERVICES.values() for volume in service["volumes"]
    }
    assert volumes == {f"nitrosim:{folder}"}
    assert SERVICES["your-program"]["network_mode"] == "service:nitrosim"
    steps = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0]
    build, start, use = (step["run"] for step in yaml.safe_load(steps))
    (command,) = [line for line in build.splitlines() if line.startswith("docker ")]
    assert command in RECIPE
    words = command.split()
    assert (ROOT / words[words.index("-f") + 1]).samefile(FOLDER / "Dockerfile")
    assert f" {words[words.index('-t') + 1]} --tag mpa-node=3" in start
    assert f"--volume {folder}:{folder} " in start
    assert f"until [ -e {path} ]" in start
    assert use.startswith(f". {path} && ")


def test_the_service_is_built_of_this_checkout() -> None:
    build = SERVICES["nitrosim"]["build"]
    assert (FOLDER / build["context"]).samefile(ROOT)
    assert (ROOT / build["dockerfile"]).samefile(FOLDER / "Dockerfile")


def test_the_context_holds_what_the_distribution_is_built_of() -> None:
    """Nothing else of a checkout reaches the builder."""
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "*"
    taken = {line[1:] for line in ignored if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    built_of = {
        "pyproject.toml",
        project["project"]["readme"],
        *project["project"]["license-files"],
    }
    hatch = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    built_of |= {*hatch["only-include"], "bin", "patches", "requirements"}
    assert taken == built_of
    assert all((ROOT / name).exists() for name in taken)
    for lock in re.findall(r"requirements/[a-z]+\.txt", RECIPE):
        assert (ROOT / lock).exists()


def test_the_options_that_are_shown_are_those_of_serve() -> None:
    known = subprocess.run(
        [Path(sys.executable).parent / "nitrosim", "serve", "--help"],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    for option in [*SERVICES["nitrosim"]["command"], "--ready-file", "--tag"]:
        assert not option.startswith("--") or f"{option} " in known
