"""Faults of the surroundings: permission, memory, descriptors, bytes that are no text."""

from __future__ import annotations

import errno
import os
import ssl
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import pytest

import attestor
import nsm
from attestor import InputError, ModuleError, OutputError, UnreachableError
from attestor_io.shortage import shortage
from attestor_io.text_options import Text
from nsm import NsmError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Enclave

# -- the module's device


@pytest.mark.parametrize(
    ("number", "status", "parts"),
    [
        (errno.EACCES, 3, ["lacks permission", "EACCES"]),
        (errno.EPERM, 3, ["lacks permission", "EPERM"]),
        (errno.EBUSY, 3, ["another process holds it", "EBUSY"]),
        (errno.ENOENT, 3, ["does not look like a Nitro Enclave"]),
        (errno.EMFILE, 5, ["too few descriptors"]),
        (errno.ENOMEM, 5, ["too little memory"]),
    ],
)
@pytest.mark.parametrize("command", ["decrypt", "describe"])
def test_a_device_that_cannot_be_opened(
    enclave: Enclave, preload: Path, command: str, number: int, status: int, parts: list[str]
) -> None:
    enclave.place(bytes(range(256)))
    environment: dict[str, str | None] = {"LD_PRELOAD": str(preload), "NSM_OPEN_ERRNO": str(number)}
    arguments = ["--any-key", "blob", "out"] if command == "decrypt" else []
    run = enclave.attestor(command, *arguments, environment=environment)
    assert run.status == status, run.err
    assert all(part in run.err for part in parts), run.err
    assert ("does not look like" in run.err) == (number == errno.ENOENT)
    assert enclave.files() == {"blob"}


@pytest.mark.parametrize("operation", ["open", "Attestation"])
def test_memory_that_the_module_lacks(monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    """Of the library there is only a number, and no OSError."""

    def fail() -> None:
        raise NsmError(operation, errno=errno.ENOMEM)

    monkeypatch.setattr(nsm, "_find_transport", fail)
    with pytest.raises(ModuleError) as caught:
        attestor.use_module(lambda module: module)
    assert attestor._report(caught.value) == UnreachableError.status


# -- memory, descriptors, threads


def caused(error: Exception, cause: BaseException) -> Exception:
    """An error as a library raises it from another one."""
    error.__cause__ = cause
    return error


def unverified(code: int) -> ssl.SSLCertVerificationError:
    """A certificate's refusal, for the reason that OpenSSL has this number for."""
    error = ssl.SSLCertVerificationError("certificate verify failed")
    error.verify_code = code
    return error


SHORT: Final = {
    "memory": MemoryError(),
    "a thread": RuntimeError("can't start new thread"),
    "a lock": RuntimeError("can't allocate lock"),
    "a shared object": ImportError("_ssl.so: failed to map segment from shared object"),
    "a buffer": ImportError("/lib/x.so: cannot allocate memory in static TLS block"),
    "OpenSSL": OSError("[X509] malloc failure (_ssl.c:4149)"),
    "a page": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "a descriptor": OSError(errno.EMFILE, "Too many open files"),
    "the system's": OSError(errno.ENFILE, "Too many open files in system"),
    "a certificate": unverified(17),
    "behind usage": caused(InputError("client of KMS cannot be made"), MemoryError()),
    "behind two": caused(InputError("x"), caused(ValueError(), MemoryError())),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_shortage_is_worth_another_try(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert attestor._report(SHORT[name]) == UnreachableError.status
    said = capsys.readouterr().err
    assert said.startswith("attestor: error: too ")
    assert "bug" not in said


@pytest.mark.parametrize(
    "error",
    [RuntimeError("x"), OSError(errno.ENOSPC, "full"), ImportError("no name"), unverified(18)],
)
def test_other_faults_are_no_shortage(error: Exception) -> None:
    assert shortage(error) is None


def test_causes_in_a_circle() -> None:
    first, second = ValueError(), ValueError()
    first.__cause__, second.__cause__ = second, first
    assert shortage(first) is None


STARVED: Final = """
import sys, threading, attestor
class Starved:
    def find_spec(self, name, path=None, target=None):
        if name == lacking:
            raise {"memory": MemoryError(), "map": ImportError("x.so: failed to map segment")}[why]
lacking, why = sys.argv[1:3]
del sys.argv[1:3]
if why == "thread":
    threading.Thread.start = lambda self: threading._start_new_thread(None, None)
    threading._start_new_thread = lambda *_: (_ for _ in ()).throw(
        RuntimeError("can't start new thread"))
sys.meta_path.insert(0, Starved())
attestor.main()
"""


@pytest.mark.parametrize(
    ("module", "why"),
    [
        ("nsm.library", "memory"),  # in the thread that makes the key
        ("botocore.session", "memory"),
        ("botocore.session", "map"),
        ("botocore.httpsession", "memory"),
        ("urllib3", "map"),
        ("attestor_io.sdk_data", "memory"),  # in the thread of the call
        ("none", "thread"),
    ],
)
def test_a_shortage_anywhere_in_a_call(enclave: Enclave, module: str, why: str) -> None:
    """As under ulimit -v 90000, where what fails first depends on the machine."""
    enclave.place(enclave.encrypt())
    command = [sys.executable, "-c", STARVED, module, why, "decrypt", "--any-key", "blob", "out"]
    run = enclave.run(*command)
    assert run.status == 5, run.err
    assert run.error.startswith("too little memory")
    assert "Traceback" not in run.err
    assert enclave.files() == {"blob"}


# -- text


def options(command: click.Command, *path: str) -> Iterator[tuple[str, ...]]:
    """Every option with a value that is text, of every command, after the command's words."""
    inner = getattr(command, "commands", {})
    for name in inner:
        yield from options(inner[name], *path, name)
    for option in command.params:
        if isinstance(option, click.Option) and isinstance(option.type, Text):
            yield (*path, option.opts[0])


COMMANDS: Final = sorted(attestor.cli.list_commands(click.Context(attestor.cli)))
TEXTS: Final = [
    line
    for name in COMMANDS
    for line in options(
        attestor.cli.get_command(click.Context(attestor.cli), name) or attestor.cli, name
    )
]


def test_every_command_has_such_options() -> None:
    found = {line[-1] for line in TEXTS}
    assert found >= {"--context", "--grant-token", "--set", "--principal", "--bind", "--module-id"}
    assert not found & {"--receipt", "--root", "--nsm-library", "--document", "--measurements"}


@pytest.mark.parametrize("value", [b"\xff", b"a=\xff", b"\xe4=1", b"a=\xed\xa0\x80"])
@pytest.mark.parametrize("line", TEXTS, ids=" ".join)
def test_bytes_that_are_no_text(
    line: tuple[str, ...], value: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        attestor.cli([*line, os.fsdecode(value)])
    assert ended.value.code == InputError.status
    assert capsys.readouterr().err == f"attestor: error: {line[-1]} is not UTF-8 text\n"


def test_a_context_that_is_no_text_is_not_sent(enclave: Enclave) -> None:
    enclave.place(enclave.encrypt())
    command = 'exec "$0" -m attestor decrypt --any-key --context "$(printf "a=\\377")" blob out'
    run = enclave.run("sh", "-c", command, sys.executable)
    assert (run.status, run.err) == (2, "attestor: error: --context is not UTF-8 text\n")


def test_a_file_may_have_any_name(enclave: Enclave) -> None:
    name = os.fsdecode(b"\xff-out")
    enclave.place(enclave.encrypt())
    assert enclave.attestor("decrypt", "--any-key", "blob", name).status == 0
    assert (enclave.folder / Path(name)).read_bytes() == b"the secret"


def test_a_target_that_cannot_be_prepared_is_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever there was too little of: it is known before KMS is asked, and the status says so."""
    error = caused(OutputError("out cannot be written"), OSError(errno.EMFILE, ""))
    assert attestor._report(error) == OutputError.status
    assert capsys.readouterr().err == "attestor: error: out cannot be written\n"
