"""`attestor serve` beside a test: started in an enclave, asked as SDKs and strangers ask, ended."""

from __future__ import annotations

import configparser
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import boto3
from botocore.config import Config

from tests.conftest import Run
from tests.forked import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Self

    from tests.conftest import Enclave

# the module straight through its device, where the library would be taken
DEVICE: Final = 'from nsm import library\nlibrary.IN_PACKAGE = library.Path("/nowhere")\n'
HEADERS: Final = {"Content-Type": "application/x-amz-json-1.1"}


class Served:
    """`attestor serve` in an enclave, on a socket and on a port; `seam` is what a test changes."""

    def __init__(
        self,
        enclave: Enclave,
        *options: str,
        seam: str = "",
        wrapper: Sequence[str] = (),
        environment: Mapping[str, str | None] | None = None,
    ) -> None:
        self.enclave, self.folder = enclave, enclave.folder
        self._said: tuple[bytes, bytes] | None = None
        self.socket = self.folder / "kms.sock"
        self.credentials_file = self.folder / "kms.ini"
        reader, writer = os.pipe()
        self._ready = open(reader, "rb")  # noqa: SIM115 - closed once it is read
        merged = {**enclave.environment, **(environment or {})}
        places = ["--socket", "kms.sock", "--port", "0", "--credentials-file", "kms.ini"]
        program = [*wrapper, sys.executable, "-c", f"import attestor\n{seam}attestor.main()"]
        self.process = subprocess.Popen(
            [*program, "serve", *places, "--ready-fd", str(writer), *options],
            cwd=self.folder,
            env={name: value for name, value in merged.items() if value is not None},
            pass_fds=[writer],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        os.close(writer)

    def __enter__(self) -> Self:
        with self._ready as ready:  # two lines, and not all there is: a wrapper keeps it open
            said = (ready.readline() + ready.readline()).decode().split()
        if len(said) != 2:
            raise AssertionError(f"it does not listen: {self.outcome()}")
        assert said[0] == f"unix:{self.socket}"
        self.url = said[1]
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self, number: int = signal.SIGTERM) -> Run:
        """Send it a signal, if it is still there, and return what it did."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        return self.outcome()

    def outcome(self) -> Run:
        """Wait for its end, and return what it did; may be called again."""
        self._ready.close()
        if self._said is None:
            self._said = self.process.communicate(timeout=PATIENCE)
        status = self.process.returncode
        return Run(status if status >= 0 else 128 - status, self._said[0], self._said[1].decode())

    @property
    def port(self) -> int:
        """The TCP port."""
        return int(self.url.rpartition(":")[2])

    def client(self, *, attempts: int = 1, **options: Any) -> Any:
        """A client of boto3 as a program of the enclave has it: endpoint and credentials file."""
        found = configparser.ConfigParser()
        found.read(self.credentials_file)
        pair = {name: found["default"][name] for name in found["default"]}
        config = Config(retries={"total_max_attempts": attempts}, max_pool_connections=20)
        chosen = {"region_name": "eu-west-1", "endpoint_url": self.url, "config": config}
        return boto3.session.Session().client("kms", **{**chosen, **pair, **options})

    def ask(self, operation: str, **members: object) -> Reply:
        """Ask at the unix socket, as a program without an SDK does."""
        connection = UnixConnection(self.socket)
        headers = {**HEADERS, "X-Amz-Target": f"TrentService.{operation}"}
        try:
            connection.request("POST", "/", json.dumps(members), headers)
            return Reply.of(connection.getresponse())
        finally:
            connection.close()


@dataclass(frozen=True)
class Reply:
    """An answer of KMS's protocol."""

    status: int
    members: dict[str, Any]
    request_id: str | None

    @classmethod
    def of(cls, response: http.client.HTTPResponse) -> Self:
        """Read it to its end."""
        request_id = response.getheader("x-amzn-RequestId")
        return cls(response.status, json.loads(response.read()), request_id)

    @property
    def error(self) -> tuple[int, str]:
        """Status and code."""
        return self.status, str(self.members.get("__type"))


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        """Connect to the path."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(self._path))
