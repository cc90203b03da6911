"""`attestor inject --watch`: secrets that change, and the program that they are for."""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import itertools
import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from attestor import InputError, OutputError
from attestor_commands.inject.fields import json_schema
from attestor_commands.inject.manifest import parse
from attestor_commands.placement import Placement
from attestor_io import folder, signals
from nitrosim.kms import REGION
from nitrosim.server import HttpsServer
from tests.conftest import OPERATOR, PATIENCE, Run, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Self

    from tests.conftest import Enclave

CHANGES: Final = 200 if os.environ.get("ATTESTOR_EXHAUSTIVE") else 8
DONE: Final = Run(0, b"", "")

# A program that says what it finds at its start and at each signal, one JSON object a line: the
# files that it is given, and the variables SECRET and FD
TELLER: Final = """
import json, os, signal, sys
numbers = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
           signal.SIGWINCH, signal.SIGCONT, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
stubborn = "--stubborn" in sys.argv
def tell(word):
    found = {"word": word, "pid": os.getpid()}
    found["files"] = [open(path).read() for path in sys.argv[1:] if path != "--stubborn"]
    found["variables"] = [os.environ.get("SECRET"), "AWS_SECRET_ACCESS_KEY" in os.environ]
    if "FD" in os.environ:
        found["memory"] = os.pread(int(os.environ["FD"]), 100, 0).decode()
    print(json.dumps(found), flush=True)
tell("started")
while True:
    number = signal.sigwait(numbers)
    tell(signal.Signals(number).name)
    if number == signal.SIGTERM and not stubborn:
        sys.exit(7)
"""


class Bench:
    """A manifest in the making, whose targets lie in the folder "run" of the enclave."""

    def __init__(self, enclave: Enclave) -> None:
        self.enclave, self.folder = enclave, enclave.folder
        self.run = self.folder / "run"
        self.run.mkdir()
        self.head = f'region = "eu-west-1"\nkey_id = "{enclave.world.kms.key_arn}"\n'
        self.text = ""

    def set(self, **keys: Any) -> Bench:
        """Keys of the manifest itself."""
        self.head += _lines(keys)
        return self

    def source(self, name: str, plaintext: str, **context: str) -> str:
        """A ciphertext in a file, put there in one step, as an operator would."""
        new = self.folder / f"{name}.new"
        new.write_bytes(self.enclave.encrypt(plaintext.encode(), **{"node": "3", **context}))
        return str(new.rename(self.folder / f"{name}.enc"))

    def secret(self, name: str, plaintext: str, **keys: Any) -> Bench:
        """One more secret, whose target is called as it is unless the keys say otherwise."""
        place = {} if {"environment", "fd"} & keys.keys() else {"target": str(self.run / name)}
        source = keys.pop("source", None) or self.source(name, plaintext)
        return self.add("secret", source=source, context={"node": "3"}, **{**place, **keys})

    def add(self, kind: str, **keys: Any) -> Bench:
        """One more entry."""
        self.text += f"[[{kind}]]\n{_lines(keys)}"
        return self

    def write(self) -> None:
        """Write the manifest."""
        (self.folder / "m.toml").write_text(self.head + self.text, encoding="utf-8")

    def inject(self, *arguments: str) -> Run:
        """Run `attestor inject` with the manifest to its end."""
        self.write()
        return self.enclave.attestor("inject", "m.toml", *arguments)

    def watch(self, *arguments: str, **options: Any) -> Watched:
        """Run `attestor inject --watch` with the teller, or with another program behind "--"."""
        self.write()
        return Watched(self.enclave, *arguments, **options)

    def placed(self) -> dict[str, str]:
        """What lies in the folder of the targets, hidden files too."""
        return {path.name: path.read_text(encoding="utf-8") for path in self.run.iterdir()}


def _lines(keys: dict[str, Any]) -> str:
    return "".join(f"{name} = {_toml(value)}\n" for name, value in keys.items())


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml(one)}" for name, one in value.items()) + "}"
    return json.dumps(value)


class Watched:
    """`attestor inject --watch 1` at work, and what its program says."""

    def __init__(
        self,
        enclave: Enclave,
        *arguments: str,
        wrapper: Sequence[str] = (),
        seconds: int = 1,
        **options: Any,
    ) -> None:
        if "--" not in arguments:
            arguments = ("--", sys.executable, "-Ic", TELLER, *arguments)
        command = [sys.executable, "-m", "attestor", "inject", f"--watch={seconds}", "m.toml"]
        streams = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(
            [*wrapper, *command, *arguments],
            cwd=enclave.folder,
            env=enclave.environment,
            **{"stdin": subprocess.DEVNULL, **streams, **options},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.terminate()
            self.process.wait(PATIENCE)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def hear(self) -> dict[str, Any]:
        """The next line that the program says."""
        line = self.read_line(self.process.stdout)
        assert line, self.outcome()
        told: dict[str, Any] = json.loads(line)
        return told

    def expect(self, word: str) -> dict[str, Any]:
        """The next line, which must be of this word."""
        told = self.hear()
        assert told["word"] == word, told
        return told

    def read_line(self, stream: Any) -> bytes:
        """One line of a stream, if one comes in time; stdout's and stderr's are told apart by whom
        asks: each must be read by this alone.
        """
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([stream], [], [], PATIENCE)
            assert ready, "it says nothing"
            piece = os.read(stream.fileno(), 1)
            if not piece:
                break
            line += piece
        return line

    def has_said_something(self) -> bool:
        """Whether there is something on standard output that was not read."""
        stream: Any = self.process.stdout
        return bool(select.select([stream], [], [], 0)[0])

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal, and return how it ended."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def outcome(self) -> tuple[int, str]:
        """How it ended, and what it said on standard error."""
        assert self.process.stderr is not None
        status = self.process.wait(PATIENCE)
        return status, self.process.stderr.read().decode()


@pytest.fixture
def bench(enclave: Enclave) -> Bench:
    """An empty manifest."""
    return Bench(enclave)


# -- what changes, and what does not


def test_a_change_of_every_source_is_seen(bench: Bench) -> None:
    world = bench.enclave.world
    ssm: Any = OPERATOR.create_client(
        "ssm",
        region_name=REGION,
        endpoint_url=world.url,
        verify=bench.enclave.environment["AWS_CA_BUNDLE"],
        aws_access_key_id=world.kms.credentials.access_key,
        aws_secret_access_key=world.kms.credentials.secret_key,
        aws_session_token=world.kms.credentials.token,
    )

    def encrypt(plaintext: str) -> bytes:
        return bench.enclave.encrypt(plaintext.encode(), node="3")

    def put(name: str, plaintext: str) -> None:
        if name == "file":
            bench.source("file", plaintext)
        elif name == "ssm":
            value = base64.b64encode(encrypt(plaintext)).decode()
            ssm.put_parameter(Name="/watched", Value=value, Type="String", Overwrite=True)
        elif name == "plain":
            world.store.objects["watched/plain"] = plaintext.encode()
        else:
            world.store.objects[f"watched/{name}"] = encrypt(plaintext)

    names = ["file", "s3", "https", "ssm", "plain"]
    for name in names:
        put(name, "old")
    bench.set(on_change="SIGHUP").secret("file", "", source=str(bench.folder / "file.enc"))
    bench.secret("s3", "", source="s3://watched/s3", mode="0640")
    bench.secret("https", "", source=f"{world.url}/watched/https")
    bench.secret("ssm", "", source="ssm:///watched")
    target = str(bench.run / "plain")
    bench.add("file", source="s3://watched/plain", target=target, unauthenticated=True)
    with bench.watch(*(str(bench.run / name) for name in names)) as watched:
        assert watched.expect("started")["files"] == ["old"] * 5
        expected = dict.fromkeys(names, "old")
        for name in names:
            before = {other: os.stat(bench.run / other).st_ino for other in names}
            put(name, "new")
            expected[name] = "new"
            assert watched.expect("SIGHUP")["files"] == list(expected.values())
            for other in names:
                assert (os.stat(bench.run / other).st_ino == before[other]) == (other != name)
        assert (bench.run / "s3").stat().st_mode & 0o777 == 0o640
        assert watched.end() == 7
    assert bench.placed() == dict.fromkeys(names, "new")


def test_nothing_new_tells_the_program_nothing(bench: Bench) -> None:
    """A file that the program has removed, and another ciphertext of the same secret, neither."""
    bench.set(on_change="SIGHUP").secret("a", "same")
    with bench.watch() as watched:
        watched.expect("started")
        (bench.run / "a").unlink()
        bench.source("a", "same")
        before = bench.enclave.world.connections
        wait_until(lambda: bench.enclave.world.connections >= before + 3)
        watched.process.send_signal(signal.SIGUSR1)
        told = watched.hear()
        assert told["word"] == "SIGUSR1"
        assert watched.end() == 7
        assert watched.outcome() == (7, "")
    assert bench.placed() == {}


def test_every_change_is_said(bench: Bench) -> None:
    """With -v, though the lines are much alike."""
    bench.set(on_change="SIGHUP").secret("a", "old")
    with bench.watch("-v", "--", sys.executable, "-Ic", TELLER) as watched:
        watched.expect("started")
        for plaintext in ("new", "newer", "newest"):
            bench.source("a", plaintext)
            watched.expect("SIGHUP")
        assert watched.end() == 7
        _, err = watched.outcome()
    assert err.count("1 of 1 have changed\n") == 3


def test_a_refresh_that_fails_changes_nothing(bench: Bench) -> None:
    """All or nothing, one line says so, and what comes later is taken."""
    bench.set(on_change="SIGHUP").secret("a", "old a").secret("b", "old b")
    with bench.watch(str(bench.run / "a"), str(bench.run / "b")) as watched:
        watched.expect("started")
        (bench.folder / "b.enc").unlink()
        bench.source("a", "new a")
        line = watched.read_line(watched.process.stderr).decode()
        assert line.startswith("attestor: warning: refresh failed with status 2, and nothing was")
        assert f"{bench.run}/b: source {bench.folder}/b.enc cannot be read" in line
        before = bench.enclave.world.connections
        wait_until(lambda: bench.enclave.world.connections >= before + 2)
        assert bench.placed() == {"a": "old a", "b": "old b"}
        bench.source("b", "new b")
        assert watched.expect("SIGHUP")["files"] == ["new a", "new b"]
        assert watched.end() == 7
        assert watched.outcome() == (7, "")  # one line a minute is enough


@pytest.mark.parametrize("scheme", ["s3", "https"])
def test_a_source_that_drips_is_given_up(bench: Bench, scheme: str) -> None:
    """At the deadline, with its connection and thread: each refresh would keep one more."""
    answers: list[Iterable[bytes]] = [[bench.enclave.encrypt(b"old", node="3")]]
    given_up = threading.Event()

    def drip() -> Iterator[bytes]:
        try:
            while not given_up.wait(0.1):
                yield b"\1"
        finally:
            given_up.set()

    def serve(_: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        return answers.pop() if answers else drip()

    with HttpsServer(serve) as server:
        inside = bench.enclave.environment
        roots = Path(inside["AWS_CA_BUNDLE"]).read_bytes() + server.ca_pem
        inside["AWS_CA_BUNDLE"] = inside["SSL_CERT_FILE"] = bench.enclave.place(roots, "roots.pem")
        inside["AWS_ENDPOINT_URL_S3"] = server.url
        source = f"{server.url}/a" if scheme == "https" else "s3://bucket/a"
        bench.set(on_change="SIGHUP", timeout=15).secret("a", "", source=source)
        with bench.watch(str(bench.run / "a")) as watched:
            assert watched.expect("started")["files"] == ["old"]
            line = watched.read_line(watched.process.stderr).decode()
            assert "refresh failed with status 5" in line
            assert line.endswith("not done within 15 seconds\n")
            assert given_up.wait(PATIENCE)
            assert watched.end() == 7


def test_credentials_are_looked_for_anew(bench: Bench) -> None:
    """As a parent renews them in a file."""
    found = bench.enclave.world.kms.credentials
    variables = {
        "aws_access_key_id": found.access_key,
        "aws_secret_access_key": found.secret_key,
        "aws_session_token": found.token,
    }
    file = bench.folder / "credentials"

    def renew(**other: str) -> None:
        lines = [f"{name} = {value}\n" for name, value in {**variables, **other}.items()]
        new = bench.folder / "new-credentials"
        new.write_text("[default]\n" + "".join(lines))
        new.rename(file)

    for name in variables:
        del bench.enclave.environment[name.upper()]
    bench.enclave.environment["AWS_SHARED_CREDENTIALS_FILE"] = str(file)
    renew()
    bench.set(on_change="SIGHUP").secret("a", "old")
    with bench.watch(str(bench.run / "a")) as watched:
        watched.expect("started")
        renew(aws_secret_access_key="expired")
        bench.source("a", "new")
        line = watched.read_line(watched.process.stderr).decode()
        assert line.startswith("attestor: warning: refresh failed with status 4, and nothing was")
        assert "expired" not in line
        renew()
        assert watched.expect("SIGHUP")["files"] == ["new"]
        assert watched.end() == 7


def test_a_target_that_cannot_be_replaced(bench: Bench) -> None:
    """Then the other one is put back as well."""
    bench.set(on_change="SIGHUP").secret("a", "old").secret("b", "old")
    with bench.watch() as watched:
        watched.expect("started")
        (bench.run / "b").unlink()
        (bench.run / "b").mkdir()
        bench.source("a", "new")
        line = watched.read_line(watched.process.stderr).decode()
        assert "refresh failed with status 7" in line
        assert (bench.run / "a").read_text() == "old"
        (bench.run / "b").rmdir()
        watched.expect("SIGHUP")
        assert bench.placed() == {"a": "new"}  # b is as it was fetched first
        assert watched.end() == 7


def test_a_folder_that_the_program_has_swapped(bench: Bench) -> None:
    """One without privileges could lead root's refresh into any folder."""
    link = generation(bench, ["a"])
    bench.set(on_change="SIGHUP")
    with bench.watch(str(link / "a")) as watched:
        watched.expect("started")
        elsewhere = bench.folder / "elsewhere"
        elsewhere.mkdir()
        moved = bench.run.rename(bench.folder / "moved")
        bench.run.symlink_to(elsewhere)
        bench.source("a", "new")
        line = watched.read_line(watched.process.stderr).decode()
        assert "refresh failed with status 7" in line
        assert line.endswith(f"{link} is in another folder than when the program started\n")
        assert os.listdir(elsewhere) == []
        bench.run.unlink()
        moved.rename(bench.run)
        assert watched.expect("SIGHUP")["files"] == ["new"]
        assert watched.end() == 7


@pytest.mark.parametrize("what", ["secret", "receipt"])
def test_a_folder_of_one_file_that_was_swapped(bench: Bench, what: str) -> None:
    bench.set(on_change="SIGHUP").secret("a", "old")
    where = bench.run if what == "secret" else bench.folder / "receipts"
    where.mkdir(exist_ok=True)
    receipt = ("--receipt", str(where / "receipt")) if what == "receipt" else ()
    with bench.watch(*receipt, "--", sys.executable, "-Ic", TELLER) as watched:
        watched.expect("started")
        where.rename(bench.folder / "moved")
        where.mkdir()
        bench.source("a", "new")
        line = watched.read_line(watched.process.stderr).decode()
        assert "is in another folder than when the program started" in line
        assert os.listdir(where) == []
        assert watched.end() == 7
    assert (bench.folder / "moved" / ("a" if what == "secret" else "receipt")).exists()


def test_never_an_older_version_than_the_one_in_place(bench: Bench) -> None:
    def put(plaintext: str, version: int) -> None:
        bench.enclave.place(plaintext.encode(), "plain")
        key = ["--key-id", bench.enclave.world.kms.key_arn, "--context", "node=3"]
        form = ["--format", "esdk", "--force", "--version", str(version)]
        assert bench.enclave.attestor("encrypt", *key, *form, "plain", "a.enc") == DONE

    put("five", 5)
    bench.set(on_change="SIGHUP")
    bench.secret("a", "", source=str(bench.folder / "a.enc"), minimum_version=3)
    with bench.watch(str(bench.run / "a")) as watched:
        watched.expect("started")
        put("six", 6)
        assert watched.expect("SIGHUP")["files"] == ["six"]
        put("five", 5)
        line = watched.read_line(watched.process.stderr).decode()
        assert "has version 5, which is too old: minimum_version is 6" in line
        assert bench.placed() == {"a": "six"}
        put("seven", 6)
        assert watched.expect("SIGHUP")["files"] == ["seven"]
        assert watched.end() == 7


def test_a_version_that_cannot_be_compared(bench: Bench) -> None:
    """Nothing then stops a refresh from bringing an older one, which nobody may have meant."""
    source = bench.source("a", "x", version="v7")
    context = {"node": "3", "version": "v7"}
    bench.add("secret", source=source, target=str(bench.run / "a"), context=context)
    bench.secret("b", "y")
    with bench.watch(str(bench.run / "a")) as watched:
        assert watched.read_line(watched.process.stderr).decode() == (
            f"attestor: warning: {bench.run}/a: version in its context is no number, "
            "so that a refresh may bring an older one\n"
        )
        assert watched.expect("started")["files"] == ["x"]
        assert watched.end() == 7


def test_a_version_that_a_tag_says(enclaves: Callable[..., Enclave]) -> None:
    """It is asked for anew in each refresh, and must not go back."""
    bench = Bench(enclaves(tags={"release": "7"}))
    for version in ("6", "7", "8"):
        bench.source(f"v{version}", version, version=version)
    bench.set(on_change="SIGHUP")
    bench.text = '[variables]\nRELEASE = { pattern = "[0-9]+", tag = "release" }\n'
    context = {"node": "3", "version": "${RELEASE}"}
    source = f"{bench.folder}/v${{RELEASE}}.enc"
    bench.add("secret", source=source, target=str(bench.run / "a"), context=context)
    with bench.watch(str(bench.run / "a")) as watched:
        assert watched.expect("started")["files"] == ["7"]
        bench.enclave.world.set_tag("release", "8")
        assert watched.expect("SIGHUP")["files"] == ["8"]
        bench.enclave.world.set_tag("release", "6")
        line = watched.read_line(watched.process.stderr).decode()
        assert f"{bench.run}/a has version 6, which is too old: minimum_version is 8" in line
        assert watched.end() == 7
    assert bench.placed() == {"a": "8"}


def test_places_that_a_tag_moves(enclaves: Callable[..., Enclave]) -> None:
    bench = Bench(enclaves(tags={"place": "a"}))
    bench.text = '[variables]\nPLACE = { pattern = "[ab]", tag = "place" }\n'
    bench.secret("${PLACE}", "x", source=bench.source("x", "x"))
    with bench.watch() as watched:
        watched.expect("started")
        bench.enclave.world.set_tag("place", "b")
        line = watched.read_line(watched.process.stderr).decode()
        assert "variables now lead to other places" in line
        assert watched.end() == 7
    assert bench.placed() == {"a": "x"}


# -- restarts


def test_restart(bench: Bench) -> None:
    """Without on_change: of a new process, which has all that is new, and no credentials."""
    bench.secret("e", "old e", environment="SECRET").secret("f", "old f", fd="FD")
    bench.secret("a", "old a")
    with bench.watch(str(bench.run / "a")) as watched:
        first = watched.expect("started")
        assert (first["files"], first["memory"]) == (["old a"], "old f")
        assert first["variables"] == ["old e", False]
        bench.source("e", "new e")
        assert watched.expect("SIGTERM")["variables"] == ["old e", False]
        second = watched.expect("started")
        assert second["pid"] != first["pid"]
        assert (second["files"], second["memory"]) == (["old a"], "old f")
        assert second["variables"] == ["new e", False]
        bench.source("f", "new f")
        watched.expect("SIGTERM")
        third = watched.expect("started")
        assert (third["memory"], third["variables"]) == ("new f", ["new e", False])
        assert watched.end() == 7
        assert watched.outcome() == (7, "")


def test_a_program_that_does_not_end_is_killed(bench: Bench) -> None:
    bench.set(stop_timeout=1).secret("a", "old")
    with bench.watch("--stubborn", str(bench.run / "a")) as watched:
        watched.expect("started")
        bench.source("a", "new")
        watched.expect("SIGTERM")
        line = watched.read_line(watched.process.stderr).decode()
        assert line == "attestor: warning: the program does not end within 1 seconds\n"
        assert watched.expect("started")["files"] == ["new"]
        watched.process.send_signal(signal.SIGTERM)
        told = watched.expect("SIGTERM")
        os.kill(told["pid"], signal.SIGKILL)
        assert watched.process.wait(PATIENCE) == -signal.SIGKILL


def test_a_program_that_cannot_start_again(bench: Bench) -> None:
    program = bench.folder / "program"
    program.write_text('#!/bin/sh\necho \'{"word": "started"}\'\nexec sleep 600\n')
    program.chmod(0o700)
    bench.secret("a", "old")
    with bench.watch("--", str(program)) as watched:
        watched.expect("started")
        program.write_text("#!/nowhere\n")
        bench.source("a", "new")
        status, err = watched.outcome()
        assert status == 126
        assert f"{program} cannot be executed: No such file or directory" in err
    assert bench.placed() == {"a": "new"}


def test_on_change_none(bench: Bench) -> None:
    """For a program that looks at its files by itself."""
    bench.set(on_change="none").secret("a", "old")
    with bench.watch() as watched:
        watched.expect("started")
        bench.source("a", "new")
        wait_until(lambda: bench.placed() == {"a": "new"})
        watched.process.send_signal(signal.SIGUSR1)
        watched.expect("SIGUSR1")
        assert watched.end() == 7


# -- signals, and the end


def test_signals_are_passed_on(bench: Bench) -> None:
    bench.secret("a", "x")
    numbers = "SIGHUP SIGINT SIGQUIT SIGUSR1 SIGUSR2 SIGWINCH".split()
    with bench.watch(process_group=0) as watched:  # as a shell that could go on with it starts it
        watched.expect("started")
        for name in numbers:
            watched.process.send_signal(signal.Signals[name])
            watched.expect(name)
        watched.process.send_signal(signal.SIGTSTP)
        stat = Path(f"/proc/{watched.process.pid}/stat")
        wait_until(lambda: stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "T")
        watched.process.send_signal(signal.SIGCONT)
        watched.expect("SIGCONT")
        assert watched.end() == 7


# makes the terminal at its standard input that of its session, which it leads
LEADS: Final = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
LEADER: Final = (sys.executable, "-c", f"{LEADS}os.execv(sys.argv[1], sys.argv[1:])")


def test_a_terminal_s_signals_come_once(bench: Bench) -> None:
    """Which sends them to the program itself."""
    bench.secret("a", "x")
    master, slave = pty.openpty()
    with bench.watch(stdin=slave, wrapper=LEADER, start_new_session=True) as watched:
        os.close(slave)
        watched.expect("started")
        os.write(master, b"\x03")
        watched.expect("SIGINT")
        watched.process.send_signal(signal.SIGUSR1)
        watched.expect("SIGUSR1")
        assert watched.end() == 7
    os.close(master)


def test_nobody_stops_whom_nobody_could_go_on_with(bench: Bench) -> None:
    """The first process of a terminal: of its process group the kernel stops nobody, either."""
    bench.secret("a", "x")
    master, slave = pty.openpty()
    with bench.watch(stdin=slave, wrapper=LEADER, start_new_session=True) as watched:
        os.close(slave)
        watched.expect("started")
        os.write(master, b"\x1a")
        watched.process.send_signal(signal.SIGTSTP)
        os.write(master, b"\x03")  # once SIGTSTP has been taken
        watched.expect("SIGINT")
        watched.process.send_signal(signal.SIGUSR1)  # which one that is stopped passes on to nobody
        watched.expect("SIGUSR1")
        assert watched.end() == 7
    os.close(master)


def test_a_standard_error_that_nobody_reads(bench: Bench) -> None:
    """It holds up neither signals nor the end."""
    reader, writer = os.pipe()
    os.write(writer, bytes(fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)))
    bench.secret("a", "x")
    with bench.watch(stderr=writer) as watched:
        os.close(writer)
        watched.expect("started")
        (bench.folder / "a.enc").write_bytes(b"\1\2\2\0no ciphertext")
        before = bench.enclave.world.connections
        wait_until(lambda: bench.enclave.world.connections >= before + 3)
        watched.process.send_signal(signal.SIGUSR1)
        watched.expect("SIGUSR1")
        assert watched.end() == 7
    os.close(reader)


def test_the_program_finds_the_signals_as_they_were(bench: Bench) -> None:
    bench.secret("a", "x")
    shown = ("grep", "-E", "^Sig(Blk|Ign|Cgt)", "/proc/self/status")
    bench.write()
    run = bench.enclave.attestor("inject", "--watch", "600", "m.toml", "--", *shown)

    def masks(out: bytes) -> list[int]:
        # without the two of the C library (signal(7)), which its posix_spawn ignores
        return [int(line.split()[1], 16) & ~0x180000000 for line in out.splitlines()]

    assert masks(run.out) == masks(bench.enclave.run(*shown).out)
    assert len(masks(run.out)) == 3


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 41", 41), ("kill -9 $$", 137), ("kill $$", 143)]
)
def test_it_ends_as_the_program_does(bench: Bench, script: str, status: int) -> None:
    bench.secret("a", "x").write()
    arguments = ("inject", "--watch", "86400", "m.toml", "--", "sh", "-c", script)
    assert bench.enclave.attestor(*arguments) == Run(status, b"", "")
    assert bench.placed() == {"a": "x"}


def test_one_that_comes_before_the_program(enclaves: Callable[..., Enclave]) -> None:
    bench = Bench(enclaves(faults=["hang"])).set(generation_folder="/nowhere")
    bench.head = bench.head.replace("/nowhere", str(bench.run / "now"))
    bench.secret("a", "x", target=str(bench.run / "now" / "a"))
    with bench.watch("-v", "--", "echo", "started") as watched:
        wait_until(lambda: any(bench.run.iterdir()))
        watched.process.send_signal(signal.SIGWINCH)  # ends nobody
        assert watched.end(signal.SIGUSR2) == -signal.SIGUSR2
        assert watched.process.stdout is not None
        assert watched.process.stdout.read() == b""
    assert bench.placed() == {}


PID_1: Final = ("unshare", "--map-root-user", "--pid", "--fork", "--mount-proc")
# it has an orphan, which ends, and says how many zombies there are once that is so
ORPHANED: Final = """
import json, os, signal, sys, time
if os.fork() == 0:
    orphan = os.fork()
    if orphan == 0:
        os.execlp("true", "true")
    os._exit(0)
os.wait()
end = time.monotonic() + 50
left = {"1", str(os.getpid())}
while (names := {name for name in os.listdir("/proc") if name.isdecimal()}) != left:
    assert time.monotonic() < end, names
print(json.dumps({"word": "alone", "parent": os.getppid()}), flush=True)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.pause()
"""


def test_process_1(bench: Bench, namespaces: None) -> None:
    """It reaps orphans, passes signals on, and ends by 128 + N: no signal would end it."""
    bench.secret("a", "x")
    program = ("--", sys.executable, "-Ic", ORPHANED)
    with bench.watch(*program, wrapper=PID_1) as watched:
        assert watched.hear() == {"word": "alone", "parent": 1}
        children = Path(f"/proc/{watched.process.pid}/task/{watched.process.pid}/children")
        os.kill(int(children.read_text()), signal.SIGTERM)
        assert watched.outcome() == (128 + signal.SIGTERM, "")


# -- generations


def generation(bench: Bench, names: Sequence[str], plaintext: str = "old") -> Path:
    """Have these secrets in a generation; the path of its link."""
    link = bench.run / "now"
    bench.set(generation_folder=str(link))
    for name in names:
        bench.secret(name, plaintext, target=str(link / name))
    return link


def generations(bench: Bench) -> list[str]:
    """The folders of all generations, and whatever else is hidden there."""
    return sorted(name for name in os.listdir(bench.run) if name != "now")


def test_a_generation_without_watch(bench: Bench) -> None:
    link = generation(bench, ["a", "b"])
    assert bench.inject() == DONE
    assert generations(bench) == [os.readlink(link)]
    assert [(link / name).read_text() for name in "ab"] == ["old", "old"]
    assert bench.inject().error == f"{link} exists"
    bench.source("a", "new")
    with open(link / "b", encoding="utf-8") as reader:
        assert bench.inject("--force") == DONE
        assert reader.read() == "old"
    assert generations(bench) == [os.readlink(link)]
    assert [(link / name).read_text() for name in "ab"] == ["new", "old"]
    bench.source("a", "newer")
    run = bench.inject("--force", "--", "cat", str(link / "a"))
    assert run == Run(0, b"newer", "")
    wait_until(lambda: generations(bench) == [os.readlink(link)])


def test_a_generation_that_fails_is_none(bench: Bench) -> None:
    link = generation(bench, ["a", "b"])
    assert bench.inject() == DONE
    before = os.readlink(link)
    bench.source("a", "new")
    (bench.folder / "b.enc").write_bytes(b"\1\2\2\0no ciphertext")
    assert bench.inject("--force").status == 4
    assert generations(bench) == [os.readlink(link)] == [before]
    bench.source("b", "new")
    program = bench.folder / "program"  # which execve alone finds out about
    program.write_bytes(b"\x7fELF" + bytes(200))
    program.chmod(0o700)
    for options in ([], ["--watch", "1"]):
        run = bench.inject("--force", *options, "--", str(program))
        assert run.status == 126, run.err
        assert generations(bench) == [os.readlink(link)] == [before]
        assert [(link / name).read_text() for name in "ab"] == ["old", "old"]


def test_a_file_system_that_can_do_little(bench: Bench) -> None:
    """Neither unnamed files nor an exchange of names."""
    link = generation(bench, ["a", "b"])
    bench.write()
    program = (
        "import attestor, errno, os\n"
        "from attestor_io import folder\n"
        "def refuse(*_):\n"
        "    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))\n"
        "folder._exchange = refuse\n"
        "isdir = os.path.isdir\n"
        "os.path.isdir = lambda path: path != '/proc/self/fd' and isdir(path)\n"
        "attestor.main()"
    )
    for plaintext in ("old", "new"):
        bench.source("a", plaintext)
        command = (sys.executable, "-c", program, "inject", "--force", "m.toml")
        assert bench.enclave.run(*command) == DONE
        assert [(link / name).read_text() for name in "ab"] == [plaintext, "old"]
        assert generations(bench) == [os.readlink(link)]


def write_generation(link: Path, text: str) -> None:
    """Write one of two files that hold this text, in this process."""
    with Placement() as placement:
        placement.begin_generation(str(link), force=True, keeps=False)
        for name in "ab":
            file = placement.add(f"{link}/{name}", force=True, in_generation=True)
            file.append(text.encode())
            file.seal()
        placement.place()


SYSTEM_CALLS: Final = "mkdir open symlink readlink listdir link rename unlink rmdir".split()


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("function", [*SYSTEM_CALLS, "stat", "fstat", "fsync", "fchmod"])
def test_whatever_fails_a_generation_is_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, *, exchange: bool
) -> None:
    """Each call of the function fails once; an error of ours says so, or it did not matter."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    if not exchange:
        monkeypatch.setattr(folder, "_exchange", refuse)
    link = tmp_path / "now"
    write_generation(link, "0")
    signals.owner.leave()
    original, calls = getattr(os, function), 0
    text = "0"
    for number in itertools.count(1):
        calls = 0

        def fail_once(*args: Any, number: int = number, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return original(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(os, function, fail_once)
            with contextlib.suppress(OutputError):
                write_generation(link, str(number))
                text = str(number)
            signals.owner.leave()
        assert [(link / name).read_text() for name in "ab"] == [text, text]
        if calls < number:
            break
    assert set(os.listdir(tmp_path)) == {"now", os.readlink(link)}


def test_a_receipt_beside_a_generation(bench: Bench) -> None:
    """Never in it: it would go with the next one."""
    link = generation(bench, ["a"])
    assert bench.inject("--receipt", "receipt.json") == DONE
    receipt = json.loads((bench.folder / "receipt.json").read_text())
    assert receipt["entries"][0]["target"] == str(link / "a")
    run = bench.inject("--force", "--receipt", str(link / "receipt.json"))
    assert run.status == 2
    assert run.error == f"receipt {link}/receipt.json is in generation_folder {link}"


def test_what_is_no_link_is_not_replaced(bench: Bench) -> None:
    link = generation(bench, ["a"])
    link.mkdir()
    run = bench.inject("--force")
    assert (run.status, run.error) == (7, f"{link} is no symbolic link that could be replaced")
    assert generations(bench) == []


def test_generations_of_others_stay(bench: Bench) -> None:
    """Those of another link, and what only looks like one."""
    link = generation(bench, ["a"])
    others = [
        ".attestor-now-2-0123456789abcdef",
        ".attestor-now-0123",
        ".attestor-then-" + "0" * 16,
    ]
    for name in others:
        (bench.run / name).mkdir()
    dead = bench.run / (".attestor-now-" + "0" * 16)
    dead.mkdir()
    (dead / "a").write_text("left")
    assert bench.inject() == DONE
    names = {path.name for path in bench.run.iterdir()}
    assert names == {*others, "now", os.readlink(link)}


def test_the_generation_before_stays_until_the_next_refresh(bench: Bench) -> None:
    link = generation(bench, ["a", "b"])
    bench.set(on_change="SIGHUP")
    with bench.watch(str(link / "a"), str(link / "b")) as watched:
        watched.expect("started")
        folder = os.open(link, os.O_RDONLY | os.O_DIRECTORY)
        before = os.readlink(link)
        bench.source("a", "new")
        assert watched.expect("SIGHUP")["files"] == ["new", "old"]
        assert before != os.readlink(link)
        wait_until(lambda: before not in os.listdir(bench.run))
        assert os.listdir(folder) == []
        os.close(folder)
        assert watched.end() == 7
    assert generations(bench) == [os.readlink(link)]


class Reader(threading.Thread):
    """Reads a whole generation through the link over and over, as a careful program does."""

    def __init__(self, link: Path, names: Sequence[str]) -> None:
        super().__init__()
        self._link, self._names = link, names
        self._over = threading.Event()
        self.seen: list[int] = []
        self.faults: list[str] = []

    def run(self) -> None:
        while not self._over.wait(0.001) and not self.faults:
            with contextlib.suppress(FileNotFoundError):  # before the first one
                folder = os.open(self._link, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    self._read(folder)
                finally:
                    os.close(folder)

    def _read(self, folder: int) -> None:
        contents = {}
        for name in self._names:
            try:
                file = os.open(name, os.O_RDONLY, dir_fd=folder)
            except FileNotFoundError:
                if os.path.samestat(os.stat(self._link), os.fstat(folder)):
                    self.faults.append(f"the link leads to a folder without {name}")
                return  # replaced, and by now removed
            with open(file, encoding="utf-8") as reader:
                contents[name] = reader.read()
        numbers = {content.split(":")[0] for content in contents.values()}
        whole = all(text == secret_of(text.split(":")[0], name) for name, text in contents.items())
        if len(numbers) != 1 or not whole:
            self.faults.append(f"not one whole generation: {contents}"[:1000])
        elif int(*numbers) not in self.seen[-1:]:
            self.seen.append(int(*numbers))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join(PATIENCE)


def secret_of(number: object, name: str) -> str:
    return f"{number}:{name}:" + "x" * 2000


def test_no_reader_sees_a_mixed_generation(enclaves: Callable[..., Enclave]) -> None:
    """Whatever signal comes whenever; and what was killed leaves nothing behind the next start."""
    bench = Bench(enclaves(tags={"generation": "0"}))
    names, link = ["a", "b", "c"], bench.run / "now"
    bench.set(generation_folder=str(link), on_change="SIGHUP")
    bench.text = '[variables]\nN = { pattern = "[0-9]+", tag = "generation" }\n'
    for name in names:
        source, target = f"{bench.folder}/{name}-${{N}}.enc", str(link / name)
        context = {"node": "3", "version": "${N}"}
        bench.add("secret", source=source, target=target, context=context)
    bench.write()
    seed = random.randrange(1 << 32)  # noqa: S311 - nothing is secret here
    print(f"seed {seed}")  # noqa: T201 - shown with a failure
    chance = random.Random(seed)  # noqa: S311
    # the orphan of a kill must not stay: the way that the documentation shows
    script = "trap '' HUP; echo; exec sleep 600"
    sleeper = ("--", "setpriv", "--pdeathsig", "KILL", "sh", "-c", script)
    with Reader(link, names) as reader, contextlib.ExitStack() as running:
        watched: Watched | None = None
        for number in range(1, CHANGES + 1):
            for name in names:
                bench.source(f"{name}-{number}", secret_of(number, name), version=str(number))
            bench.enclave.world.set_tag("generation", str(number))
            if watched is None:
                watched = running.enter_context(bench.watch("--force", *sleeper))
            watched = _disturb(chance, watched, reader, number)
            assert not reader.faults, f"seed {seed}: {reader.faults}"
        watched = watched or running.enter_context(bench.watch("--force", *sleeper))
        wait_until(lambda: reader.faults or reader.seen[-1:] == [CHANGES])
        wait_until(watched.has_said_something)
        assert watched.end() == -signal.SIGTERM
    assert not reader.faults, f"seed {seed}: {reader.faults}"
    assert (link / "a").read_text() == secret_of(CHANGES, "a")
    assert generations(bench) == [os.readlink(link)], f"seed {seed}"


def _disturb(
    chance: random.Random, watched: Watched, reader: Reader, number: int
) -> Watched | None:
    """Let a change be seen, or send a signal at any moment; what is left running."""
    kill, hang_up = signal.SIGKILL, signal.SIGHUP
    what = chance.choice([None, hang_up, signal.SIGTERM, kill, kill])
    if what is None:
        wait_until(lambda: reader.faults or reader.seen[-1:] == [number])
        return watched
    with contextlib.suppress(subprocess.TimeoutExpired):
        watched.process.wait(chance.uniform(0, 1.6))
    watched.process.send_signal(what)
    if what == hang_up:  # which ends attestor if it comes before there is a program
        wait_until(lambda: watched.process.poll() is not None or watched.has_said_something())
        return watched if watched.process.poll() is None else None
    watched.process.wait(PATIENCE)
    return None


# -- manifests and options


ARN: Final = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
SECRET: Final = '[[secret]]\nsource = "/in"\nunbound = true\n'
VALUES: Final = (
    "restart, none, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH, SIGCONT"
)


@pytest.mark.parametrize(
    ("head", "text", "part"),
    [
        ('on_change = "SIGKILL"', 'target = "/out/a"', f"on_change must be one of {VALUES}"),
        ("on_change = 1", 'target = "/out/a"', "on_change must be one of"),
        ("stop_timeout = 0", 'target = "/out/a"', "stop_timeout must be a number from 1 to 3600"),
        ('on_change = "SIGHUP"', 'environment = "A"', "on_change is SIGHUP, but environment A"),
        ('on_change = "none"', 'fd = "A"', "on_change is none, but fd A reaches a program only"),
        ('generation_folder = "x"', 'target = "/x/a"', "generation_folder x is not an absolute"),
        ('generation_folder = "/x"', 'target = "/y/a"', "target /y/a is not in generation_folder"),
        ('generation_folder = "/x"', 'target = "/x/y/a"', "/x/y/a is not in generation_folder /x"),
        ('generation_folder = "/x"', 'target = "/x"', "target /x is not in generation_folder /x"),
    ],
)
def test_a_manifest_that_cannot_be(head: str, text: str, part: str) -> None:
    whole = f'region = "eu-west-1"\nkey_id = "{ARN}"\n{head}\n{SECRET}{text}\n'
    with pytest.raises(InputError) as caught:
        parse(whole.encode(), {}, {})
    assert part in str(caught.value)


def test_what_a_manifest_may_say() -> None:
    head = f'key_id = "{ARN}"\n' + 'generation_folder = "/run/${A}"\n[variables]\nA = ""\n'
    text = SECRET + 'target = "/run/3/a"\n' + SECRET + 'fd = "B"\n'
    manifest = parse((head + text).encode(), {"A": "3"}, {})
    assert manifest.generation_folder == "/run/3"
    assert (manifest.on_change, manifest.stop_timeout) == ("restart", 10)
    assert json_schema()["properties"]["on_change"] == {"enum": VALUES.split(", ")}


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--watch", "0"], "--watch"),
        (["--watch", "86401"], "--watch"),
        (["--watch", "1.5"], "--watch"),
        (["--watch", "60"], "--watch is beside a program, and none is named"),
        (["--watch", "60", "--", "true"], "a source is standard input, which --watch could not"),
    ],
)
def test_options_that_cannot_be(bench: Bench, options: list[str], part: str) -> None:
    bench.secret("a", "", source="-")
    run = bench.inject(*options)
    assert run.status == 2
    assert part in run.error
    assert bench.placed() == {}


def test_the_receipt_is_renewed(bench: Bench) -> None:
    bench.set(on_change="SIGHUP").secret("a", "old").write()
    receipt = bench.folder / "receipt.json"
    with Watched(bench.enclave, "--receipt", str(receipt), "--", "sleep", "600") as watched:
        wait_until(receipt.exists)
        before = json.loads(receipt.read_text())["entries"]
        bench.source("a", "longer")
        wait_until(lambda: json.loads(receipt.read_text())["entries"] != before)
        assert json.loads(receipt.read_text())["entries"][0]["bytes"] == 6
        assert watched.process.wait(PATIENCE) == -signal.SIGHUP  # which sleep does not know
    assert not [name for name in os.listdir(bench.folder) if name.startswith(".attestor")]
