"""--timeout covers everything that is waited for: names, the region, tags, and every input."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Final

import pytest

from attestor import UnreachableError
from attestor_commands.inject.sources import Sources
from attestor_io import metadata
from attestor_io.background import run_in_background
from attestor_io.deadline import Deadline
from attestor_io.reading import read_bounded, read_head
from tests.conftest import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import Enclave, Run

FOREVER: Final = """
import socket, threading, attestor
from attestor_io import vsock
vsock.dial = lambda address, timeout: socket.create_connection(("127.0.0.1", address[1]), timeout)
real = socket.getaddrinfo
def resolve(host, *rest, **more):
    if not str(host)[:1].isdigit() and host != "localhost":
        threading.Event().wait()
    return real(host, *rest, **more)
socket.getaddrinfo = resolve
attestor.main()
"""
SHORT: Final = ["--timeout", "1"]
NAME: Final[dict[str, str | None]] = {metadata.ENDPOINT_VARIABLE: "http://metadata.example"}


def attestor(
    enclave: Enclave, *arguments: str, environment: dict[str, str | None] | None = None
) -> Run:
    """Run attestor where no name is ever resolved; what waits longer than a test may, fails."""
    return enclave.run(sys.executable, "-c", FOREVER, *arguments, environment=environment)


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


# -- the object


def test_a_deadline_is_one_for_all() -> None:
    deadline = Deadline(1000)
    assert 0 < deadline.left <= 1000
    assert deadline.within(2000) is deadline
    assert deadline.within(1).left <= 1
    assert deadline.call(lambda: 3) == 3
    assert repr(deadline) == "Deadline(1000)"
    with pytest.raises(ZeroDivisionError):
        deadline.call(lambda: 1 // 0)


def test_one_that_has_passed() -> None:
    deadline = Deadline(0)
    assert deadline.left == 0
    assert deadline.within(1000) is deadline
    with pytest.raises(UnreachableError, match="no name within 0 seconds"):
        deadline.call(threading.Event().wait, "no name")


# -- names, regions, tags


def test_the_name_of_the_metadata_service(enclave: Enclave) -> None:
    run = attestor(enclave, "metadata", *SHORT, "placement/region", environment=NAME)
    assert (run.status, run.out) == (5, b"")
    assert run.error.startswith("no connection to the metadata service at metadata.example within")


def test_a_tag_of_a_manifest(enclave: Enclave) -> None:
    text = (
        'region = "eu-west-1"\nany_key = true\ntimeout = 1\n'
        '[variables]\nNODE = { tag = "node" }\n'
        f'[[secret]]\nsource = "{enclave.folder}/blob"\ntarget = "{enclave.folder}/out"\n'
        'context = {node = "${NODE}"}\n'
    )
    enclave.place(text.encode(), "m.toml")
    run = attestor(enclave, "inject", "m.toml", environment=NAME)
    assert run.status == 5, run.err
    assert "metadata.example within" in run.error


@pytest.mark.parametrize("command", [["decrypt", "--any-key", "blob", "out"], ["doctor"]])
def test_the_name_of_kms(enclave: Enclave, command: list[str]) -> None:
    enclave.place(enclave.encrypt())
    run = attestor(enclave, *command, "--timeout", "5", "--endpoint-url", "https://kms.example")
    assert run.status == 5, run.err
    assert "kms.example" in run.out.decode() or "no answer of KMS within 5 seconds" in run.err


def test_the_region_of_the_instance(enclave: Enclave, silent: int) -> None:
    enclave.place(enclave.encrypt())
    gone: dict[str, str | None] = {"AWS_REGION": None, "AWS_DEFAULT_REGION": None}
    way = ["--imds-vsock", f"3:{silent}", *SHORT]
    run = attestor(enclave, "decrypt", "--any-key", *way, "blob", "out", environment=gone)
    assert run.status == 5, run.err
    assert run.error == f"no answer of the metadata service at vsock 3:{silent} in time"


# -- inputs


@pytest.fixture
def fifo(enclave: Enclave) -> Path:
    """A FIFO without a writer in the place of the ciphertext."""
    os.mkfifo(enclave.folder / "blob")
    return enclave.folder / "blob"


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (["decrypt", "--any-key", "blob", "out"], "ciphertext blob"),
        (["decrypt", "--any-key", "--base64", "blob", "out"], "ciphertext blob"),
        (["encrypt", "--key-id", "alias/nitrosim", "blob", "out"], "plaintext blob"),
        (["derive-shared-secret", "--key-id", "alias/x", "blob", "out"], "public key blob"),
    ],
)
def test_a_fifo_without_a_writer(
    enclave: Enclave, fifo: Path, command: list[str], what: str
) -> None:
    run = enclave.attestor(*command, *SHORT)
    assert (run.status, run.error) == (
        5,
        f"{what} cannot be read: nothing came within 1 seconds",
    )
    assert enclave.files() == {fifo.name}


def test_a_fifo_as_a_source(enclave: Enclave, fifo: Path) -> None:
    text = (
        'region = "eu-west-1"\nany_key = true\ntimeout = 5\n'
        f'[[secret]]\nsource = "{fifo}"\ntarget = "{enclave.folder}/out"\nunbound = true\n'
    )
    enclave.place(text.encode(), "m.toml")
    run = enclave.attestor("inject", "m.toml")
    assert run.status == 5, run.err
    assert run.error.endswith("within 5 seconds")
    assert enclave.files() == {"blob", "m.toml"}


def test_a_fifo_as_a_source_keeps_no_thread(fifo: Path) -> None:
    """Of `inject --watch`, each refresh of which would keep one more."""
    deadline = Deadline(0.1)
    sources = Sources(None, "eu-west-1", None, None, None, {}, deadline, size=1)

    def read() -> None:
        with sources.open(str(fifo), 10) as stream:
            stream.read(1)

    with pytest.raises(UnreachableError, match=r"cannot be read: nothing came within 0\.1 sec"):
        run_in_background(read).result(PATIENCE)


def test_a_writer_that_says_nothing(enclave: Enclave, fifo: Path) -> None:
    writer = os.open(fifo, os.O_RDWR)
    run = enclave.decrypt(*SHORT)
    os.close(writer)
    assert run.status == 5, run.err


def test_a_silent_standard_input(enclave: Enclave) -> None:
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "attestor", "decrypt", "--any-key", *SHORT, "-", "out"]
    done = subprocess.run(
        command,
        cwd=enclave.folder,
        env=enclave.environment,
        stdin=reader,
        capture_output=True,
        check=False,
    )
    os.close(reader)
    os.close(writer)
    assert done.returncode == 5
    assert b"ciphertext standard input cannot be read: nothing came" in done.stderr


def test_a_writer_that_comes_later(enclave: Enclave, fifo: Path) -> None:
    """It blocks until the command has opened its end."""
    threading.Thread(target=fifo.write_bytes, args=(enclave.encrypt(),), daemon=True).start()
    assert enclave.decrypt().status == 0
    assert (enclave.folder / "out").read_bytes() == b"the secret"


def test_what_comes_in_pieces(tmp_path: Path) -> None:
    """A read gives what was asked for, or all up to the end."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR)
    taken = threading.Event()

    def write() -> None:
        os.write(writer, b"abc")
        taken.wait()
        os.write(writer, b"defgh")
        os.close(writer)

    thread = threading.Thread(target=write)
    thread.start()
    first, rest = read_head(str(path), 3, "it", Deadline(60))
    taken.set()
    with rest:
        assert (first, rest.read(2), rest.read()) == (b"abc", b"de", b"fgh")
        thread.join()
        assert rest.read(1) == b""


def test_silence_behind_the_head_is_bounded_too(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR)
    os.write(writer, b"abc")
    head, rest = read_head(str(path), 3, "message", Deadline(0.2))
    assert head == b"abc"
    with rest:
        for _ in range(2):
            with pytest.raises(UnreachableError, match="message cannot be read: nothing came"):
                rest.read(1)
        os.write(writer, b"d")
        os.close(writer)
        assert rest.read(1) == b"d"


def test_files_are_never_late(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert read_bounded(str(path), 10, "it", Deadline(0)) == b"x" * 10
    head, rest = read_head(str(path), 10, "it")
    with rest:
        assert head + rest.read() == b"x" * 100
