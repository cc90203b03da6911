"""attestor's command line many times over, from a process that has imported everything and forks.

A run costs a fifth of one that starts Python anew, which is why `Enclave.attestor` of conftest runs
most commands so. What it cannot show (the start itself, imports that come late, peak memory) tests
see in whole processes; with ATTESTOR_WHOLE_PROCESSES set, all do.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from tests.conftest import Run

_IMPORTED_LATE: Final = (
    "attestor_commands.doctor_checks",
    "attestor_io.refusal",
    "cryptography.x509.verification",
    "nsm.document",
    "nsm.entropy",
    "nsm.library",
)
PATIENCE: Final = 120  # seconds for one run, however busy the machine is
INPUT_MAX: Final = 1 << 16  # bytes that a pipe takes while nobody reads
# beginnings of the names of variables that Python, libc and OpenSSL look at once
_READ_AT_START: Final = (
    "GLIBC_",
    "LANG",
    "LC_",
    "LD_",
    "MALLOC_",
    "OPENSSL_",
    "PYTHON",
    "TZ",
)


class ForkServer:
    """Runs attestor, in this environment if a run names no other.

    With `vsock_to_tcp`, a run dials a TCP port of this host where the machine's own vsock would be
    dialled: `--vsock 3:PORT` leads there.
    """

    def __init__(
        self, environment: Mapping[str, str], folder: Path, *, vsock_to_tcp: bool = False
    ) -> None:
        self._environment, self._folder = dict(environment), folder
        self._options = ["--vsock-to-tcp"] if vsock_to_tcp else []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._outputs = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked", *self._options],
            env=self._environment,
            cwd=self._folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._outputs.cleanup()

    def attestor(
        self,
        *arguments: str,
        folder: Path | None = None,
        environment: Mapping[str, str | None] | None = None,
    ) -> Run:
        """Run one command, with an empty standard input; a variable of None is removed."""
        merged = {**self._environment, **(environment or {})}
        inside = {name: value for name, value in merged.items() if value is not None}
        done = self.run(arguments, inside, folder or self._folder)
        assert done, f"{sorted(environment or {})} cannot be had in a process that has started"
        return done

    def run(
        self,
        arguments: tuple[str, ...],
        environment: Mapping[str, str],
        folder: Path,
        stdin: bytes = b"",
    ) -> Run | None:
        """Run one command in this very environment; None for what needs a process of its own:
        variables that are read at the start, much input, and a run beside another one.
        """
        if _read_at_start(environment) != _read_at_start(self._environment):
            return None
        if len(stdin) > INPUT_MAX or not self._lock.acquire(blocking=False):
            return None
        with contextlib.ExitStack() as held:
            held.callback(self._lock.release)
            return self._ask(arguments, environment, folder, stdin)

    def _ask(
        self,
        arguments: tuple[str, ...],
        environment: Mapping[str, str],
        folder: Path,
        stdin: bytes,
    ) -> Run:
        from tests.conftest import Run

        paths = [Path(self._outputs.name, name) for name in ("stdout", "stderr")]
        request = {
            "arguments": arguments,
            "environment": environment,
            "folder": str(folder),
            "outputs": [str(path) for path in paths],
            "stdin": base64.b64encode(stdin).decode(),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        status = int(self._process.stdout.readline())
        out, err = (path.read_bytes() for path in paths)
        return Run(status if status >= 0 else 128 - status, out, err.decode())


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_AT_START)}


def _warm(*, vsock_to_tcp: bool) -> None:
    """Import what a run imports, and make the key pair: what each run would do over again."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    import attestor
    from attestor_io import sdk_data, vsock

    load = functools.cache(sdk_data._FileLoader().load_file)  # which a run only reads
    sdk_data._FileLoader.load_file = lambda _, path: load(path)  # type: ignore[assignment,method-assign]
    for module in _IMPORTED_LATE:
        importlib.import_module(module)
    for name in attestor.FURTHER_COMMANDS.values():
        attestor.load(name, name)
    session = sdk_data.new_session()
    session.set_credentials("none", "none")
    session.create_client("kms", region_name="eu-west-1")
    key = rsa.generate_private_key(65537, 2048)
    rsa.generate_private_key = lambda *_, **__: key
    if vsock_to_tcp:
        vsock.dial = _dial_tcp


def _dial_tcp(address: tuple[int, int], timeout: float | None) -> socket.socket:
    cid, port = address
    if cid != 3:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
    return socket.create_connection(("127.0.0.1", port), timeout)


def _serve() -> None:
    import attestor

    _warm(vsock_to_tcp="--vsock-to-tcp" in sys.argv)
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in requests:
        child = os.fork()
        if not child:
            _run(attestor, json.loads(line))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, file=answers, flush=True)


def _run(program: Any, request: dict[str, Any]) -> NoReturn:
    signal.alarm(PATIENCE)
    try:
        reader, writer = os.pipe()
        os.write(writer, base64.b64decode(request["stdin"]))
        os.close(writer)
        os.dup2(reader, 0)
        os.close(reader)
        for number, path in enumerate(request["outputs"], 1):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv[:] = [program.__file__, *request["arguments"]]
        program.main()
    finally:
        os._exit(1)


if __name__ == "__main__":
    _serve()
