"""Fixtures: simulated enclaves, and the command line run in them as a user runs it."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import botocore.session
import pytest

from attestor_io.signals import PASSED_ON
from nitrosim.world import World
from tests.forked import ForkServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# whoever started the tests may ignore them (nohup, a shell's background job), and a command would
# then rightly ignore them as well
for _number in PASSED_ON:
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)

# a command that is installed has byte code: without it every start would compile anew
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

OPERATOR: Final = botocore.session.Session()  # one for all: it reads the SDK's data once
ROOT: Final = Path(__file__).parent.parent
PATIENCE: Final = 60.0  # seconds that end a test on the busiest machine
VECTORS: Final = ROOT.parent / "shared" / "vectors"


@dataclass(frozen=True)
class Run:
    """What a command did: exit status as a shell shows it, standard output, standard error."""

    status: int
    out: bytes
    err: str

    @property
    def error(self) -> str:
        """The only error line; notes, warnings and hints aside."""
        (line,) = [line for line in self.err.splitlines() if line.startswith("attestor: error: ")]
        return line.removeprefix("attestor: error: ")


_CLIENTS: Final[WeakKeyDictionary[World, Any]] = WeakKeyDictionary()


class Enclave:
    """A simulated enclave and KMS, and an operator who encrypts for it."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.folder = folder
        self.environment = world.environment(os.environ) | {"PYTHONPATH": str(ROOT)}

    @property
    def kms(self) -> Any:
        """A plain client of the KMS, as the operator has it: one for all tests in this world."""
        if self.world not in _CLIENTS:
            credentials = self.world.kms.credentials
            _CLIENTS[self.world] = OPERATOR.create_client(
                "kms",
                region_name=self.world.kms.region,
                endpoint_url=self.environment["AWS_ENDPOINT_URL_KMS"],
                verify=self.environment["AWS_CA_BUNDLE"],
                aws_access_key_id=credentials.access_key,
                aws_secret_access_key=credentials.secret_key,
                aws_session_token=credentials.token,
            )
        return _CLIENTS[self.world]

    def encrypt(self, plaintext: bytes = b"the secret", **context: str) -> bytes:
        """A ciphertext under alias/nitrosim."""
        blob: bytes = self.kms.encrypt(
            KeyId="alias/nitrosim", Plaintext=plaintext, EncryptionContext=context
        )["CiphertextBlob"]
        return blob

    def place(self, data: bytes, name: str = "blob") -> str:
        """Write a file into the folder that commands run in."""
        (self.folder / name).write_bytes(data)
        return name

    def run(
        self,
        *command: str,
        stdin: bytes | None = None,
        environment: Mapping[str, str | None] | None = None,
    ) -> Run:
        """Run any command inside; a variable set to None is removed."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self._inside(environment),
            input=stdin if stdin is not None else b"",
            capture_output=True,
            check=False,
            timeout=120,
        )
        status = done.returncode if done.returncode >= 0 else 128 - done.returncode
        return Run(status, done.stdout, done.stderr.decode())

    def attestor(
        self,
        *arguments: str,
        stdin: bytes | None = None,
        environment: Mapping[str, str | None] | None = None,
        whole_process: bool = False,
    ) -> Run:
        """Run attestor inside, forked from a process that has imported it (tests/forked.py) where
        that makes no difference; `whole_process` is for tests of what it does make one to.
        """
        done = (
            None if whole_process else self.forked(*arguments, stdin=stdin, environment=environment)
        )
        return done or self.run(
            sys.executable, "-m", "attestor", *arguments, stdin=stdin, environment=environment
        )

    def forked(
        self,
        *arguments: str,
        stdin: bytes | None = None,
        environment: Mapping[str, str | None] | None = None,
        vsock_to_tcp: bool = False,
    ) -> Run | None:
        """Run attestor so; None for what needs a process of its own, and where all are to be whole.

        With `vsock_to_tcp`, the ports of vsock's CID 3 are TCP ports of this host.
        """
        preloaded = self.environment.get("LD_PRELOAD")  # not where the device is the kernel's own
        if os.environ.get("ATTESTOR_WHOLE_PROCESSES") or not preloaded:
            return None
        server = _fork_server(preloaded, vsock_to_tcp=vsock_to_tcp)
        return server.run(arguments, self._inside(environment), self.folder, stdin or b"")

    def _inside(self, environment: Mapping[str, str | None] | None) -> dict[str, str]:
        merged = {**self.environment, **(environment or {})}
        return {name: value for name, value in merged.items() if value is not None}

    def decrypt(self, *options: str, environment: Mapping[str, str | None] | None = None) -> Run:
        """Run `attestor decrypt` from "blob" to "out" with any key."""
        return self.attestor(
            "decrypt", "--any-key", *options, "blob", "out", environment=environment
        )

    def files(self) -> set[str]:
        """Names in the folder, hidden ones too."""
        return {path.name for path in self.folder.iterdir()}


_FORK_SERVERS: Final = contextlib.ExitStack()


@functools.cache
def _fork_server(preloaded: str, *, vsock_to_tcp: bool) -> ForkServer:
    """One for all enclaves behind the same shim, to the end of the session."""
    environment = os.environ | {"LD_PRELOAD": preloaded, "PYTHONPATH": str(ROOT)}
    server = ForkServer(environment, ROOT, vsock_to_tcp=vsock_to_tcp)
    return _FORK_SERVERS.enter_context(server)


@pytest.fixture(scope="session")
def _world() -> Iterator[World]:
    with World() as world:
        yield world


@pytest.fixture
def enclave(_world: World, tmp_path: Path) -> Enclave:
    """An enclave that the policy of alias/nitrosim lets in."""
    return Enclave(_world, tmp_path)


@pytest.fixture
def enclaves(tmp_path: Path) -> Iterator[Callable[..., Enclave]]:
    """Makes enclaves with other options of World; all of them see one folder."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: Enclave(stack.enter_context(World(**options)), tmp_path)


def wait_until(holds: Callable[[], object]) -> None:
    """Poll until something holds."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "it does not come"
        threading.Event().wait(0.01)


@contextlib.contextmanager
def no_thread_stays() -> Iterator[None]:
    """Every thread that was started in it ends, if not at once: one that has given back all that it
    had may still be on its way out.
    """
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive(), thread


@pytest.fixture(scope="session")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of preload.c: a wrong clock, or a module's device that cannot be opened."""
    library = tmp_path_factory.mktemp("preload") / "preload.so"
    compiler = os.environ.get("CC", "cc").split()
    source = str(ROOT / "tests" / "preload.c")
    subprocess.run(
        [*compiler, "-shared", "-fPIC", "-O1", "-o", str(library), source, "-ldl"], check=True
    )
    return library


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skip where nobody may mount."""
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    if (
        shutil.which("unshare") is None
        or subprocess.run(command, capture_output=True, check=False).returncode
    ):
        pytest.skip(
            "mount namespaces are not to be had: as root, or with user namespaces allowed, they are"
        )


@pytest.fixture(scope="session")
def vectors() -> Path:
    """What the real service produced; not part of the project."""
    if not VECTORS.is_dir():
        pytest.skip(f"no vectors of the real service at {VECTORS}")
    return VECTORS


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the processes that commands are forked from.

    With ATTESTOR_NO_SKIPS set, a skip is a failure: so .ci/run keeps checks from vanishing."""
    _FORK_SERVERS.close()
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("ATTESTOR_NO_SKIPS") and reporter and reporter.stats.get("skipped"):
        reporter.write_line("ATTESTOR_NO_SKIPS is set, but tests were skipped", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
