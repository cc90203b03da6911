"""attestor's command line many times over, from a process that has imported everything and forks.

A run costs a fifth of one that starts Python anew. Where the machine's own vsock would be dialled,
a run dials a TCP port of this host: `--vsock 3:PORT` leads there.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
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


class ForkServer:
    """Runs attestor in this environment, in which also LD_PRELOAD is that of every run."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self._environment, self._folder = environment, folder

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            env=self._environment,
            cwd=self._folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def attestor(
        self,
        *arguments: str,
        folder: Path | None = None,
        environment: Mapping[str, str | None] | None = None,
    ) -> Run:
        """Run one command, with an empty standard input; a variable of None is removed."""
        from tests.conftest import Run

        names = ("stdout", "stderr")
        paths = [str(self._folder / f".{name}") for name in names]
        request = {
            "arguments": arguments,
            "environment": environment or {},
            "folder": str(folder or self._folder),
            "outputs": paths,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        status = int(self._process.stdout.readline())
        out, err = (Path(path).read_bytes() for path in paths)
        return Run(status if status >= 0 else 128 - status, out, err.decode())


def _warm() -> None:
    """Import what a run imports, and make the key pair: what each run would do over again."""
    import botocore.session
    from cryptography.hazmat.primitives.asymmetric import rsa

    import attestor
    from attestor_io import sdk_data, vsock

    for module in _IMPORTED_LATE:
        importlib.import_module(module)
    for name in attestor.FURTHER_COMMANDS.values():
        attestor.load(name, name)
    session = botocore.session.Session()
    sdk_data.confine(session)
    session.set_credentials("none", "none")
    session.create_client("kms", region_name="eu-west-1")
    key = rsa.generate_private_key(65537, 2048)
    rsa.generate_private_key = lambda *_, **__: key
    vsock.dial = lambda address, timeout: socket.create_connection(
        ("127.0.0.1", address[1]), timeout
    )


def _serve() -> None:
    import attestor

    _warm()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            _run(attestor.main, **request)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()


def _run(
    main: Callable[[], NoReturn],
    arguments: list[str],
    environment: dict[str, str | None],
    folder: str,
    outputs: list[str],
) -> NoReturn:
    signal.alarm(PATIENCE)
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in enumerate(outputs, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(folder)
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        sys.argv[1:] = arguments
        main()
    finally:
        os._exit(1)


if __name__ == "__main__":
    _serve()
