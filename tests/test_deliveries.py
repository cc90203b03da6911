"""What `attestor inject` gives beside files: variables, sealed memory, documents."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest

from attestor import InputError, OutputError
from attestor_commands.inject.deliveries import ENVIRONMENT_MAX, MEMBER_MAX, MemoryFile
from attestor_commands.inject.manifest import parse
from attestor_commands.inject.places import Place
from tests.conftest import Run

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.conftest import Enclave

DONE: Final = Run(0, b"", "")
ARN: Final = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"

# A program that tells, as JSON, what it got: variables, and of each descriptor from 3 on what is in
# it, its mode, and why it cannot be written
TELL: Final = """
import fcntl, json, os
told = {"variables": {name: os.environb[name.encode()].decode("latin-1") for name in os.environ}}
for number in sorted(int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2):
    try:
        status = os.fstat(number)
    except OSError:
        continue  # that of the listing
    link = os.readlink(f"/proc/self/fd/{number}")
    one = told.setdefault("descriptors", {})[number] = {"mode": status.st_mode & 0o7777}
    one["link"] = link
    one["data"] = os.read(number, 100).decode("latin-1")
    one["seals"] = fcntl.fcntl(number, fcntl.F_GET_SEALS)
    one["errors"] = []
    for change in (lambda: os.pwrite(number, b"x", 0), lambda: os.ftruncate(number, 0),
                   lambda: os.ftruncate(number, 1 << 20),
                   lambda: fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)):
        try:
            change()
        except OSError as error:
            one["errors"].append(error.errno)
print(json.dumps(told))
"""
TELLER: Final = ("--", sys.executable, "-Ic", TELL)


class Bench:
    """Secrets in files of their own, and a manifest in the making."""

    def __init__(self, enclave: Enclave) -> None:
        self.enclave, self.attestor = enclave, enclave.attestor
        self.run = enclave.folder / "run"
        self.run.mkdir()
        self.head = f'region = "eu-west-1"\nkey_id = "{enclave.world.kms.key_arn}"\n'
        self.text = ""
        self._count = 0

    def source(self, plaintext: bytes) -> dict[str, Any]:
        """The keys of a secret with this plaintext."""
        self._count += 1
        name = f"{self._count}.enc"
        if len(plaintext) <= 4096:
            self.enclave.place(self.enclave.encrypt(plaintext, node="3"), name)
        else:
            self.enclave.place(plaintext, "plain")
            key = ["--key-id", self.enclave.world.kms.key_arn, "--context", "node=3"]
            assert self.attestor("encrypt", *key, "plain", name) == DONE
        return {"source": str(self.enclave.folder / name), "context": {"node": "3"}}

    def secret(self, plaintext: bytes, **keys: Any) -> Bench:
        """One more secret."""
        self.text += f"[[secret]]\n{_lines({**self.source(plaintext), **keys})}"
        return self

    def document(self, form: str, **members: bytes) -> Bench:
        """One more document, which is called as its format."""
        keys = {"target": str(self.run / form), "format": form}
        self.text += f"[[document]]\n{_lines(keys)}"
        for name, plaintext in members.items():
            self.text += f"[document.secrets.{name}]\n{_lines(self.source(plaintext))}"
        return self

    def inject(self, *arguments: str, environment: Mapping[str, str | None] | None = None) -> Run:
        """Run `attestor inject` with the manifest."""
        self.enclave.place((self.head + self.text).encode(), "m.toml")
        return self.attestor("inject", "m.toml", *arguments, environment=environment)

    def placed(self) -> dict[str, bytes]:
        """What lies in the folder of the targets, hidden files too."""
        return {path.name: path.read_bytes() for path in self.run.iterdir()}


def _lines(keys: Mapping[str, Any]) -> str:
    return "".join(f"{name} = {_toml(value)}\n" for name, value in keys.items())


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml(one)}" for name, one in value.items()) + "}"
    return json.dumps(value)


@pytest.fixture
def bench(enclave: Enclave) -> Bench:
    """No secret yet."""
    return Bench(enclave)


def told(run: Run) -> dict[str, Any]:
    """What the program told."""
    assert run.status == 0, run.err
    assert run.err == ""
    answer: dict[str, Any] = json.loads(run.out)
    return answer


# -- what works


def test_all_forms_at_once(bench: Bench) -> None:
    bench.secret(b"of a file", target=str(bench.run / "file"))
    bench.secret(b"of a variable\n\xff", environment="DATABASE_PASSWORD")
    bench.secret(b"of memory\0\xff", fd="KEY_FD")
    bench.secret(b"more of it", fd="OTHER_FD", mode="0440")
    bench.document("json", **{"A": b"a", '"b.c-d"': '"\u00e9\\\0'.encode()})
    bench.document("dotenv", A=b"a b", B=b"=")
    answer = told(bench.inject("--receipt", "receipt", *TELLER))
    assert bench.placed()["file"] == b"of a file"
    assert json.loads(bench.placed()["json"]) == {"A": "a", "b.c-d": '"\u00e9\\\0'}
    assert bench.placed()["dotenv"] == b"A='a b'\nB='='\n"
    assert {stat.S_IMODE(path.stat().st_mode) for path in bench.run.iterdir()} == {0o600}
    assert answer["variables"]["DATABASE_PASSWORD"] == "of a variable\n\xff"
    descriptors = answer["descriptors"]
    numbers = [answer["variables"][name] for name in ("KEY_FD", "OTHER_FD")]
    assert list(descriptors) == sorted(numbers, key=int)  # and no other is open
    key, other = (descriptors[number] for number in numbers)
    assert (key["data"], key["mode"], key["link"]) == (
        "of memory\0\xff",
        0o600,
        "/memfd:KEY_FD (deleted)",
    )
    assert (other["data"], other["mode"]) == ("more of it", 0o440)
    for one in (key, other):
        assert one["seals"] & 0b1111 == 0b1111
        assert one["errors"] == [errno.EPERM] * 4
    receipt = json.loads((bench.enclave.folder / "receipt").read_bytes())
    assert [
        {name: one[name] for name in one if name not in {"key_id", "request_id", "kind"}}
        for one in receipt["entries"]
    ] == [
        {"target": str(bench.run / "file"), "bytes": 9},
        {"environment": "DATABASE_PASSWORD", "bytes": 15},
        {"fd": "KEY_FD", "bytes": 11},
        {"fd": "OTHER_FD", "bytes": 10},
        {"target": str(bench.run / "json"), "member": "A", "bytes": 1},
        {"target": str(bench.run / "json"), "member": "b.c-d", "bytes": 5},
        {"target": str(bench.run / "dotenv"), "member": "A", "bytes": 3},
        {"target": str(bench.run / "dotenv"), "member": "B", "bytes": 1},
    ]


def test_the_longest_variable(bench: Bench) -> None:
    """Which Linux takes, and not a byte more."""
    most = ENVIRONMENT_MAX - len("NAME=")
    bench.secret(b"x" * most, environment="NAME")
    run = bench.inject("--", sys.executable, "-Ic", "import os; print(len(os.environ['NAME']))")
    assert (run.status, run.out) == (0, b"%d\n" % most)
    bench.text = ""
    bench.secret(b"x" * (most + 1), environment="NAME").secret(b"a", target=str(bench.run / "a"))
    run = bench.inject("--", "true")
    assert run.status == 7, run.err
    assert f"environment NAME cannot be written: it is longer than {most} bytes" in run.error
    assert bench.placed() == {}


def test_memory_larger_than_a_blob(bench: Bench) -> None:
    bench.secret(b"x" * 3_000_000, fd="FD")
    count = (
        "import os; print(sum(map(len, iter(lambda: os.read(int(os.environ['FD']), 1<<16), b''))))"
    )
    run = bench.inject("--", sys.executable, "-Ic", count)
    assert (run.status, run.out, run.err) == (0, b"3000000\n", "")


def test_a_descriptor_is_never_standard_input(bench: Bench) -> None:
    bench.secret(b"x", fd="FD").inject("--", "true")
    shell = 'exec <&-; exec "$0" -m attestor inject m.toml -- sh -c "echo \\$FD"'
    run = bench.enclave.run("sh", "-c", shell, sys.executable)
    assert run.status == 0, run.err
    assert int(run.out) > 2


@pytest.mark.parametrize(
    "value",
    ['a"b', "$HOME", "a b  #c", "`id`$(id)", "1\n2\n", "\u00e9 !~*?", "-----BEGIN\nx\n-----"],
)
def test_a_shell_reads_what_dotenv_holds(bench: Bench, value: str) -> None:
    assert bench.document("dotenv", VALUE=value.encode(), B=b"b").inject() == DONE
    told_by = (
        'set -a; . ./run/dotenv; exec "$0" -Ic "import os; print(ascii(os.environ[\'VALUE\']))"'
    )
    assert bench.enclave.run("sh", "-euc", told_by, sys.executable).out.decode() == f"{value!a}\n"


def test_variables_of_the_manifest_only_where_it_says_so(bench: Bench) -> None:
    bench.head += "pass_variables = true\n"
    bench.secret(b"x", environment="SECRET").text += '[variables]\nNODE = "[0-9]"\nOTHER = ""\n'
    environment = {"NODE": "4"}
    answer = told(bench.inject("--set", "NODE=3", *TELLER, environment=environment))
    assert answer["variables"]["NODE"] == "3"
    assert "OTHER" not in answer["variables"]
    bench.head = bench.head.replace("pass_variables = true", "")
    answer = told(bench.inject("--set", "NODE=3", *TELLER))
    assert "NODE" not in answer["variables"]


def test_a_secret_may_be_a_credential_of_the_program(bench: Bench) -> None:
    answer = told(bench.secret(b"its own", environment="AWS_SECRET_ACCESS_KEY").inject(*TELLER))
    assert answer["variables"]["AWS_SECRET_ACCESS_KEY"] == "its own"
    assert "AWS_ACCESS_KEY_ID" not in answer["variables"]


# -- all or nothing


@pytest.mark.parametrize("kind", ["environment", "fd"])
def test_without_a_program_nobody_could_have_it(bench: Bench, kind: str) -> None:
    bench.secret(b"x", **{kind: "NAME"}).secret(b"y", target=str(bench.run / "y"))
    run = bench.inject()
    assert run.status == 2, run.err
    assert run.error == f"{kind} NAME is for a program, and none is named"
    assert bench.placed() == {}


@pytest.mark.parametrize(
    ("form", "value", "part"),
    [
        ("environment", b"a\0b", "a byte of zeros"),
        ("json", b"\xff", "no UTF-8 text, as JSON wants it"),
        ("json", b"x" * (MEMBER_MAX + 1), f"longer than {MEMBER_MAX} bytes"),
        ("dotenv", b"\xff", "no UTF-8 text, as dotenv wants it"),
        *(("dotenv", value, 'format = "json"') for value in (b"'", b"\\", b"a${b}", b"\r", b"\0")),
    ],
)
def test_what_a_form_cannot_hold(bench: Bench, form: str, value: bytes, part: str) -> None:
    (bench.run / "a").write_bytes(b"old")
    bench.secret(b"new", target=str(bench.run / "a"))
    if form == "environment":
        bench.secret(value, environment="NAME")
    else:
        bench.document(form, GOOD=b"good", NAME=value)
    run = bench.inject("--force", "--", "echo", "started")
    assert (run.status, run.out) == (7, b""), run.err
    assert "NAME cannot be written: " in run.error
    assert part in run.err
    assert bench.placed() == {"a": b"old"}


def test_one_secret_that_does_not_open_keeps_all_back(bench: Bench) -> None:
    bench.document("json", A=b"a").secret(b"x", fd="FD").secret(b"x", environment="E")
    wrong = {**bench.source(b"y"), "context": {"node": "4"}}
    bench.text += f"[[document]]\n{_lines({'target': str(bench.run / 'other'), 'format': 'json'})}"
    bench.text += f"[document.secrets.WRONG]\n{_lines(wrong)}"
    run = bench.inject("--", "echo", "started")
    assert (run.status, run.out) == (4, b""), run.err
    assert f"{bench.run}/other: WRONG: KMS refused" in run.error
    assert bench.placed() == {}


def test_variables_that_are_too_much_together(bench: Bench) -> None:
    """Which only execve can tell: all is taken back."""
    bench.secret(b"x" * 100_000, environment="V0").secret(b"a", target=str(bench.run / "a"))
    one, rest = bench.text.split("[[secret]]\n")[1:]
    many = "".join(f"[[secret]]\n{one.replace('V0', f'V{number}')}" for number in range(70))
    bench.text = f"{many}[[secret]]\n{rest}"
    run = bench.inject("--", "echo", "started")
    assert (run.status, run.out) == (126, b""), run.err
    assert "Argument list too long" in run.error
    assert bench.placed() == {}


def test_a_kernel_without_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_name: str, _flags: int) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(OutputError, match="fd KEY cannot be written: Function not implemented"):
        MemoryFile(Place("fd", "KEY"))


# -- manifests


SECRET: Final = '[[secret]]\nsource = "/in"\nunbound = true\n'
DOCUMENT: Final = '[[document]]\ntarget = "/out/d"\nformat = "json"\n'
MEMBER: Final = 'source = "/in"\nunbound = true\n'


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (SECRET, "secret 1 has no target"),
        (SECRET + 'target = "/out/a"\nfd = "A"', "has target and fd, and goes to one place"),
        (SECRET + 'environment = "A"\nfd = "A"', "has environment and fd"),
        (SECRET + 'environment = "A"\nmode = "0600"', "mode is of files"),
        (SECRET + 'environment = "A"\nowner = "0"', "owner is of files"),
        (SECRET + 'environment = "A=B"', "environment A=B is not a name of letters"),
        (SECRET + 'environment = ""', "is not a name of letters"),
        (SECRET + 'environment = "1A"', "is not a name of letters"),
        (SECRET + 'environment = "\u00c4"', "is not a name of letters"),
        (SECRET + 'fd = "A\\u0000"', "is not a name of letters"),
        (SECRET + f'fd = "{"A" * 129}"', "is not a name of letters"),
        (SECRET + "fd = 3", "fd must be a string"),
        (SECRET + 'fd = "A"\nmode = "0604"', "opens it to everybody"),
        (SECRET + 'fd = "A"\n' + SECRET + 'environment = "A"', "A of the program is there twice"),
        ('[variables]\nA = ".*"\n' + SECRET + 'fd = "A"', "A of the program is there twice"),
        ('[[file]]\nsource = "/in"\nunauthenticated = true\nfd = "A"', "unknown key fd"),
        ('[[document]]\ntarget = "/d"\n[document.secrets.A]\n' + MEMBER, "format must be one of"),
        (DOCUMENT.replace("json", "yaml") + "[document.secrets.A]\n" + MEMBER,
         "format must be one of json, dotenv"),
        (DOCUMENT, "document 1 has no secrets"),
        (DOCUMENT + "secrets = {}", "document 1 has no secrets"),
        (DOCUMENT + 'secrets = { A = "x" }', "secrets must be a table of tables"),
        (DOCUMENT + 'environment = "A"', "unknown key environment"),
        (DOCUMENT + "[document.secrets.A]\nunbound = true", "document 1: A has no source"),
        (DOCUMENT + '[document.secrets.A]\nsource = "/in"', "document 1: A has no context"),
        (DOCUMENT + "[document.secrets.A]\n" + MEMBER + 'target = "/x"', "unknown key target"),
        (DOCUMENT + '[document.secrets."a b"]\n' + MEMBER, "a b is not a name of letters"),
        (DOCUMENT + '[document.secrets."a\\nb"]\n' + MEMBER, "is not a name of letters"),
        (DOCUMENT.replace("json", "dotenv") + '[document.secrets."a-b"]\n' + MEMBER,
         "a-b is not a name of letters, digits and _"),
        (DOCUMENT + "[document.secrets.A]\n" + MEMBER + SECRET + 'target = "/out/d/x"',
         "target /out/d/x is inside target /out/d"),
        (DOCUMENT + "[document.secrets.A]\n" + MEMBER + SECRET + 'target = "/out/d"',
         "target /out/d is there twice"),
        (DOCUMENT + "".join(f"[document.secrets.A{n}]\n{MEMBER}" for n in range(301)),
         "301 secrets and files"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be(text: str, part: str) -> None:
    head = f'region = "eu-west-1"\nkey_id = "{ARN}"\npass_variables = true\n'
    with pytest.raises(InputError) as caught:
        parse((head + text).encode(), {"A": "1"} if "variables" in text else {}, {})
    assert part in str(caught.value)


def test_a_receipt_that_is_a_document(bench: Bench) -> None:
    run = bench.document("json", A=b"a").inject("--receipt", str(bench.run / "json"))
    assert run.status == 2
    assert "is a target too" in run.error


def test_what_a_secret_looks_like_in_its_place() -> None:
    assert str(Place("target", "/a")) == "/a"
    assert str(Place("fd", "KEY")) == "fd KEY"
    assert str(Place("document", "/a", member="B")) == "/a: B"


def test_the_owner_of_memory(bench: Bench, tmp_path: Path) -> None:
    bench.secret(b"x", fd="FD", owner=f"{os.getuid()}:{os.getgid()}")
    run = bench.inject("--", "sh", "-c", 'cat "/proc/self/fd/$FD"')
    assert (run.status, run.out, run.err) == (0, b"x", "")
