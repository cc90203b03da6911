"""The house: a script that stands alone, rooms above it, floors that a tool keeps, one wheel."""

from __future__ import annotations

import ast
import base64
import importlib.metadata
import importlib.util
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
import venv
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import pytest

import attestor
from nsm.library import IN_PACKAGE
from tests.conftest import ROOT, Run
from tests.test_vsock import HOST, ONCE, PROXY, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.conftest import Enclave

DONE: Final = Run(0, b"", "")
README: Final = (ROOT / "README.md").read_text(encoding="utf-8")
OURS: Final = "nitro-attestor"
METADATA: Final = f"nitro_attestor-{attestor.__version__}"
ROOMS: Final = ("attestor_commands", "attestor_eif", "attestor_io", "keypolicy", "nitrosim", "nsm")
PRODUCT: Final = sorted(
    [
        ROOT / "attestor.py",
        ROOT / "bin" / "attestor",
        ROOT / "enclave" / "initramfs",
        ROOT / "enclave" / "tell-parent",
        ROOT / "patches" / "wheel_tag.py",
        *(path for room in ROOMS for path in (ROOT / room).rglob("*.py")),
    ]
)
BYTECODE: Final = shutil.ignore_patterns("__pycache__")


# ---- environments that hold what a test gives them, and nothing of this checkout


def new_environment(folder: Path, distributions: Iterable[str]) -> Path:
    """Make a virtual environment with these distributions of ours; return its site-packages.

    They are linked, not copied, and without their .pth files, one of which leads to this checkout.
    """
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    for distribution in map(importlib.metadata.distribution, distributions):
        files = distribution.files or []
        names = {file.parts[0] for file in files if not file.match("*.pth")}
        for name in names - {"..", "__pycache__"}:
            (packages / name).symlink_to(str(distribution.locate_file(name)))
    return packages


def locked_for_running() -> list[str]:
    """Names of what `decrypt` needs on this platform: requirements/run.txt."""
    lock = (ROOT / "requirements" / "run.txt").read_text(encoding="utf-8")
    there = {normal_name(name) for name in installed()}
    return [name for name in re.findall(r"^([a-z0-9.-]+)==", lock, re.MULTILINE) if name in there]


def installed(without: Iterable[str] = ()) -> list[str]:
    """Names of all distributions here, but for our own and those named `without`."""
    names = {found.metadata["Name"] for found in importlib.metadata.distributions()}
    return sorted(name for name in names if normal_name(name) not in {OURS, *without})


def normal_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def clean_environment(environment: dict[str, str], programs: Path) -> dict[str, str]:
    """An environment whose `python3` is the one in `programs`, untouched by make and pytest."""
    prefixes = ("PYTHON", "PYTEST", "MAKE", "MFLAGS", "MYPY", "PIP_", "VIRTUAL_ENV")
    kept = {name: value for name, value in environment.items() if not name.startswith(prefixes)}
    return kept | {"PATH": f"{programs}:{environment['PATH']}"}


def run_in(folder: Path, programs: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with the programs of an environment first on the path."""
    return subprocess.run(
        command,
        cwd=folder,
        env=clean_environment(dict(os.environ), programs),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )


# ---- the script and its ground rooms, alone


class Script:
    """attestor.py and its ground rooms in the folder of an enclave, which holds nothing else."""

    def __init__(self, enclave: Enclave, programs: Path, transport: str) -> None:
        self.enclave = enclave
        self.folder = enclave.folder
        assert enclave.files() == set()
        shutil.copy(ROOT / "attestor.py", self.folder)
        for room in ground_rooms():
            shutil.copytree(ROOT / room, self.folder / room, ignore=BYTECODE)
        if transport == "device":
            (self.folder / "nsm" / "libnsm.so").unlink(missing_ok=True)
        self.copied = enclave.files()
        cleaned = clean_environment(enclave.environment, programs)
        gone = enclave.environment.keys() - cleaned.keys()
        self.environment = cleaned | dict.fromkeys(gone)

    def python(self, *arguments: str, environment: dict[str, str | None] | None = None) -> Run:
        """Run `python3` in that folder."""
        merged = {**self.environment, **(environment or {})}
        return self.enclave.run("python3", *arguments, environment=merged)

    def run(self, *arguments: str, environment: dict[str, str | None] | None = None) -> Run:
        """Run `python3 attestor.py` in that folder."""
        return self.python("attestor.py", *arguments, environment=environment)

    def decrypt(self, *options: str) -> Run:
        """Run `python3 attestor.py decrypt` from "blob" to "out" with any key."""
        return self.run("decrypt", "--any-key", *options, "blob", "out")

    def new_files(self) -> set[str]:
        """Names in the folder that were not copied there."""
        return self.enclave.files() - self.copied - {"__pycache__"}


def ground_rooms() -> set[str]:
    """The packages of this checkout that the script imports, and those that these import."""
    found: set[str] = set()
    left = {ROOT / "attestor.py"}
    while left:
        for name in imports_of(left.pop()) - found:
            if (ROOT / name).is_dir():
                found.add(name)
                left.update((ROOT / name).rglob("*.py"))
    return found


def imports_of(path: Path) -> set[str]:
    """Top-level names that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the locked packages, and nothing of this checkout."""
    folder = tmp_path_factory.mktemp("alone")
    new_environment(folder, locked_for_running())
    return folder / "bin"


@pytest.fixture(params=["library", "device"])
def transport(request: pytest.FixtureRequest) -> str:
    """Each way to the module in turn."""
    if request.param == "library" and not IN_PACKAGE.exists():
        pytest.skip("nsm/libnsm.so is not built: make libnsm")
    return str(request.param)


@pytest.fixture
def script(enclave: Enclave, programs: Path, transport: str) -> Script:
    """The script alone, with a ciphertext in "blob" that it may decrypt."""
    made = Script(enclave, programs, transport)
    enclave.place(enclave.encrypt())
    return made


def test_the_ground_rooms_are_those_of_the_readme() -> None:
    (listed,) = re.findall(r"copy\s(`attestor\.py`, .*?) side by side", README, re.DOTALL)
    assert set(re.findall(r"`(\w+)/`", listed)) == ground_rooms()


def test_nothing_of_the_checkout_is_beside_the_script(script: Script) -> None:
    program = (
        "import importlib.util, sys, attestor, nsm\n"
        f"rooms = {sorted(set(ROOMS) - ground_rooms())!r}\n"
        "print(attestor.__file__, nsm.__file__, *filter(importlib.util.find_spec, rooms))\n"
        f"print([path for path in sys.path if path.startswith({str(ROOT)!r} + '/')])"
    )
    run = script.python("-c", program)
    own = f"{script.folder}/attestor.py {script.folder}/nsm/__init__.py"
    assert run == Run(0, f"{own}\n[]\n".encode(), "")


def test_the_script_alone_decrypts(script: Script) -> None:
    assert script.decrypt() == DONE
    assert (script.folder / "out").read_bytes() == b"the secret"
    assert stat.S_IMODE((script.folder / "out").stat().st_mode) == 0o600
    assert script.new_files() == {"blob", "out"}


def test_the_script_alone_says_what_it_does(script: Script, transport: str) -> None:
    run = script.decrypt("-v")
    library = f"{script.folder}/nsm/libnsm.so (ABI 1)"
    way = library if transport == "library" else "/dev/nsm"
    assert run.status == 0, run.err
    assert f"attestor: note: Nitro Secure Module through {way}\n" in run.err
    assert "attestor: note: KMS answered request " in run.err
    assert (script.folder / "out").read_bytes() == b"the secret"


def test_the_script_alone_takes_base64_and_replaces_a_file(script: Script) -> None:
    script.enclave.place(base64.encodebytes(script.enclave.encrypt(b"another secret")))
    script.enclave.place(b"the old one", "out")
    run = script.decrypt("--base64")
    assert (run.status, run.out) == (7, b"")
    assert "exists" in run.error
    assert (script.folder / "out").read_bytes() == b"the old one"
    assert script.decrypt("--base64", "--force") == DONE
    assert (script.folder / "out").read_bytes() == b"another secret"
    assert script.new_files() == {"blob", "out"}


def test_the_script_alone_explains_a_refusal(
    enclaves: Callable[..., Enclave], programs: Path, transport: str
) -> None:
    enclave = enclaves(debug=True)
    script = Script(enclave, programs, transport)
    enclave.place(enclave.encrypt(node="3"))
    run = script.decrypt("--context", "node=3")
    assert (run.status, run.out) == (4, b"")
    assert run.error.startswith("KMS refused to decrypt: AccessDeniedException: ")
    assert "attestor: note: sent PCR0 zero, PCR1 zero, PCR2 zero, PCR3 " in run.err
    assert "attestor: note: the enclave runs in debug mode\n" in run.err
    assert len(re.findall(r"attestor: hint: (?!.*attestor )", run.err)) == 2  # no command but ours
    assert "attestor: hint: debug mode: PCR0, 1 and 2 are all zeros" in run.err
    assert script.new_files() == {"blob"}


def test_the_script_alone_without_a_module(script: Script) -> None:
    run = script.run(
        "decrypt", "--any-key", "blob", "out", environment={"NITROSIM_NSM_SOCKET": "/nowhere"}
    )
    assert run.status == 3, run.err
    assert "attestor: hint: " in run.err
    assert script.new_files() == {"blob"}


def test_the_script_alone_through_a_dial_of_vsock(script: Script) -> None:
    """With TCP to this host in the place of AF_VSOCK, which not every kernel has."""
    command = ["decrypt", "--any-key", "--vsock", f"3:{script.enclave.world.port}", "blob", "out"]
    assert script.python("-c", HOST, *command, environment={**ONCE, **PROXY}) == DONE
    assert (script.folder / "out").read_bytes() == b"the secret"


@pytest.mark.vsock
def test_the_script_alone_through_af_vsock(script: Script) -> None:
    """Where the kernel has vsock_loopback: VMADDR_CID_LOCAL is 1."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        listener.bind((1, socket.VMADDR_PORT_ANY))
        listener.listen()
        port = script.enclave.world.port
        threading.Thread(target=serve, args=(listener, port), daemon=True).start()
        way = ["--vsock", f"1:{listener.getsockname()[1]}"]
        run = script.run("decrypt", "--any-key", *way, "blob", "out", environment=ONCE)
    assert run == DONE
    assert (script.folder / "out").read_bytes() == b"the secret"


@pytest.fixture
def bare_script(enclave: Enclave, programs: Path) -> Script:
    """The script alone, for what never reaches the module."""
    return Script(enclave, programs, "device")


@pytest.mark.parametrize(
    "command",
    [
        ("inject", "manifest.toml"),
        ("inject", "--schema"),
        ("policy", "check", "policy.json"),
        ("policy", "--help"),
        ("doctor",),
    ],
    ids=" ".join,
)
def test_a_command_that_is_not_there_names_its_package(
    bare_script: Script, command: tuple[str, ...]
) -> None:
    run = bare_script.run(*command)
    assert (run.status, run.out) == (2, b"")
    missing = f"the command {command[0]} needs attestor_commands, which is not installed"
    assert run.error == missing
    assert f"checkout of {OURS} brings it" in run.err


def test_a_message_of_the_encryption_sdk_names_its_package(bare_script: Script) -> None:
    bare_script.enclave.place(b"\x02\x05\x78" + bytes(100))
    run = bare_script.decrypt()
    assert (run.status, run.out) == (2, b"")
    needed = "needs attestor_commands, which is not installed"
    assert run.error == f"a message of the AWS Encryption SDK {needed}"
    assert f"checkout of {OURS} brings it" in run.err
    assert bare_script.new_files() == {"blob"}


def test_the_help_of_the_script_alone(bare_script: Script) -> None:
    run = bare_script.run("--help")
    assert (run.status, run.err) == (0, "")
    _, _, commands = run.out.decode().partition("\nCommands:\n")
    assert re.findall(r"^  (\S+)", commands, re.MULTILINE) == ["decrypt"]


# ---- the wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout with what is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    done = subprocess.run(
        [*build, "--directory", str(folder)], cwd=ROOT, capture_output=True, check=False, text=True
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def install(wheel: Path, folder: Path, distributions: Iterable[str]) -> Path:
    """Install the wheel into a new environment with these distributions; return its programs."""
    new_environment(folder, distributions)
    programs = folder / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--quiet"]
    options = ["--no-index", "--no-deps", "--disable-pip-version-check"]
    done = run_in(folder, programs, *pip, *options, str(wheel))
    assert done.returncode == 0, done.stderr
    return programs


def test_the_top_level_of_the_wheel_is_that_of_the_readme(wheel: Path) -> None:
    said = re.search(
        r"Its wheel puts \w+ names at the top level of site-packages, (.*?)"
        r"two commands on the path, (.*?)\.",
        README,
        re.DOTALL,
    )
    assert said
    with zipfile.ZipFile(wheel) as archive:
        paths = [Path(name).parts for name in archive.namelist()]
        entry_points = archive.read(f"{METADATA}.dist-info/entry_points.txt").decode()
    top = {parts[0] for parts in paths} - {f"{METADATA}.dist-info", f"{METADATA}.data"}
    assert top == set(re.findall(r"`([\w.-]+)`", said[1]))
    assert top == {"attestor.py", "attestor-stubs", *ROOMS}
    assert {parts[0] for parts in paths if parts[-1] == "py.typed"} == set(ROOMS)
    made_by_pip = entry_points.partition("[console_scripts]\n")[2].partition("\n\n")[0]
    commands = re.findall(r"^(\w+) = ", made_by_pip, re.MULTILINE)
    commands += [parts[-1] for parts in paths if parts[0] == f"{METADATA}.data"]
    assert sorted(commands) == re.findall(r"`(\w+)`", said[2])


def test_the_commands_of_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, with nothing beside it but what the wheel asks for."""
    programs = install(wheel, tmp_path / "installed", locked_for_running())
    done = run_in(tmp_path, programs, "attestor", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"attestor {attestor.__version__}\n"
    listed = run_in(tmp_path, programs, "attestor", "--help").stdout.partition("\nCommands:\n")[2]
    commands = re.findall(r"^  (\S+)", listed, re.MULTILINE)
    assert commands == sorted(attestor.cli.list_commands(click.Context(attestor.cli)))
    for name in commands:
        shown = run_in(tmp_path, programs, "attestor", name, "--help")
        assert shown.stdout.startswith(f"Usage: attestor {name} "), shown.stderr


def test_the_types_of_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """What boto3-stubs knows of a client stays known, and the documented errors are public."""
    programs = install(wheel, tmp_path / "installed", installed())
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    errors = re.findall(r"^\| `(\w+)` \| .* \| \d? ?\|$", page, re.MULTILINE)
    assert len(errors) > 5
    folder = tmp_path / "somewhere"
    folder.mkdir()
    (folder / "program.py").write_text(
        "import boto3\n"
        "import botocore.session\n"
        "import attestor\n"
        "import nsm\n"
        "from attestor import *\n"
        'kms = attestor.attested(boto3.client("kms"))\n'
        "reveal_type(kms)\n"
        "reveal_type(attestor.attested(botocore.session.Session()))\n"
        'plaintext: bytes = kms.decrypt(CiphertextBlob=b"")["Plaintext"]\n'
        "document: bytes = nsm.Nsm().attest()\n"
        f"errors: list[type[attestor.AttestorError]] = [{', '.join(errors)}]\n"
        "statuses: list[int] = [error.status for error in errors]\n",
        encoding="utf-8",
    )
    mypy = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-incremental"]
    python = ["--python-executable", str(programs / "python")]
    done = run_in(folder, programs, *mypy, *python, "program.py")
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert revealed == ["mypy_boto3_kms.client.KMSClient", "botocore.session.Session"], done.stdout
    assert "error:" not in done.stdout
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def without_simulator(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment with the wheel and all packages but those of the extra `sim`."""
    return install(wheel, tmp_path_factory.mktemp("bare"), installed({"moto", "werkzeug"}))


MISSING: Final = re.compile(
    r"the simulator needs (moto|werkzeug): install nitro-attestor with the extra sim"
)


def test_nitrosim_says_what_to_install(without_simulator: Path, tmp_path: Path) -> None:
    done = run_in(tmp_path, without_simulator, "nitrosim", "run", "--", "true")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert MISSING.fullmatch(line.removeprefix("nitrosim: error: "))


def test_the_fixtures_say_what_to_install(without_simulator: Path, tmp_path: Path) -> None:
    """The plugin is found by its entry point."""
    (tmp_path / "test_it.py").write_text("def test_it(nitrosim_kms): pass\n", encoding="utf-8")
    command = ["python", "-m", "pytest", "-p", "no:cacheprovider", "test_it.py"]
    done = run_in(tmp_path, without_simulator, *command)
    assert done.returncode == 1, done.stderr
    _, _, shown = done.stdout.partition(" ERROR at setup of test_it ")
    section = shown.partition("\n=")[0].splitlines()[1:]  # what pytest shows of the error
    assert len(section) == 1, done.stdout
    assert MISSING.fullmatch(section[0]), done.stdout


# ---- the floors


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    """Check a copy of the tree with the very commands of `make lint`."""
    programs = Path(sys.executable).parent
    make = ["make", "--dry-run", "--old-file=.venv/.ready", "lint", f"BIN={programs}"]
    recipe = run_in(tree, programs, *make)
    assert recipe.returncode == 0, recipe.stderr
    commands = [line for line in recipe.stdout.splitlines() if ".cache/imports" in line]
    assert "lint-imports" in commands[-1]
    return run_in(tree, programs, "sh", "-euc", "\n".join(commands))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the product, to add an import to."""
    if importlib.util.find_spec("importlinter") is None:
        pytest.skip("import-linter is not installed: requirements/dev.txt")
    for name in ("attestor.py", "Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=BYTECODE)
    return tmp_path


def test_no_import_goes_upward(tree: Path) -> None:
    done = lint_imports(tree)
    assert done.returncode == 0, done.stdout
    assert re.search(r"Contracts: \d+ kept, 0 broken\.", done.stdout)


@pytest.mark.parametrize(
    ("file", "added", "broken"),
    [
        ("attestor.py", "import attestor_commands.doctor", "attestor -> attestor_commands"),
        ("attestor.py", "def f(): from keypolicy import check", "attestor -> keypolicy.check"),
        ("nsm/cbor.py", "import attestor", "nsm.cbor -> attestor"),
        ("attestor_io/vsock.py", "import nsm.device", "attestor_io.vsock -> nsm.device"),
        (
            "attestor_io/vsock.py",
            "if TYPE_CHECKING:\n    from attestor_commands.inject import inject",
            "attestor_io.vsock -> attestor_commands.inject",
        ),
        ("keypolicy/model.py", "import keypolicy.check", "- .model -> .check"),  # a circle
    ],
)
def test_an_import_that_goes_upward_is_found(
    tree: Path, file: str, added: str, broken: str
) -> None:
    with (tree / file).open("a", encoding="utf-8") as source:
        source.write(f"\n{added}\n")
    done = lint_imports(tree)
    assert done.returncode == 1, done.stdout
    assert broken in done.stdout


# ---- sizes


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_functions_and_lines_are_short(path: Path) -> None:
    """Lines are measured as ruff measures them: without the pragma that ends them."""
    text = path.read_text(encoding="utf-8")
    lines = [re.sub(r"  # (noqa|type: ignore)\b.*", "", line) for line in text.splitlines()]
    assert len(lines) <= (1400 if path.name == "attestor.py" else 500)
    assert [number for number, line in enumerate(lines, 1) if len(line) > 100] == []
    functions = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = [one.name for one in functions if (one.end_lineno or 0) - one.lineno >= 60]
    assert long == []
