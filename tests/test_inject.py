"""`attestor inject`: every secret of a manifest or none of them, then the program."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import botocore.session
import pytest
from werkzeug.wrappers import Request, Response

from attestor_commands.inject.sources import is_of_aws
from nitrosim.server import HttpsServer
from tests.conftest import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Enclave

DONE: Final = Run(0, b"", "")
KILLS: Final = 200 if os.environ.get("ATTESTOR_EXHAUSTIVE") else 20
ENDLESS: Final = 64 << 20


class Manifest:
    """A manifest in the making, whose targets lie in the folder "run" of the enclave."""

    def __init__(self, enclave: Enclave) -> None:
        self.enclave = enclave
        self.run = enclave.folder / "run"
        self.run.mkdir()
        self.kms = enclave.kms
        self.text = f'region = "eu-west-1"\nkey_id = "{enclave.world.kms.key_arn}"\n'

    def add(self, kind: str = "secret", /, **keys: Any) -> Manifest:
        """One more entry; values become TOML as JSON has them, and tables inline ones."""
        lines = [f"{name} = {_toml(value)}\n" for name, value in keys.items()]
        self.text += f"[[{kind}]]\n" + "".join(lines)
        return self

    def encrypt(self, plaintext: bytes, node: str = "3") -> bytes:
        """A ciphertext bound to a node."""
        answer = self.kms.encrypt(
            KeyId="alias/nitrosim", Plaintext=plaintext, EncryptionContext={"node": node}
        )
        blob: bytes = answer["CiphertextBlob"]
        return blob

    def secret(self, name: str, plaintext: bytes = b"the secret", **keys: Any) -> Manifest:
        """A secret of a ciphertext in a file of its own, bound to node 3."""
        source = self.enclave.folder / self.enclave.place(self.encrypt(plaintext), f"{name}.enc")
        keys = {
            "source": str(source),
            "target": str(self.run / name),
            "context": {"node": "3"},
            **keys,
        }
        return self.add("secret", **keys)

    def inject(self, *arguments: str, environment: dict[str, str | None] | None = None) -> Run:
        """Run `attestor inject`; options come before, a program behind "--"."""
        (self.enclave.folder / "m.toml").write_text(self.text, encoding="utf-8")
        return self.enclave.attestor("inject", "m.toml", *arguments, environment=environment)

    def placed(self) -> dict[str, bytes]:
        """What lies in the folder of the targets, hidden files too."""
        return {path.name: path.read_bytes() for path in self.run.iterdir()}


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml(one)}" for name, one in value.items()) + "}"
    return json.dumps(value)


@pytest.fixture
def manifest(enclave: Enclave) -> Manifest:
    """An empty manifest."""
    return Manifest(enclave)


def refused(manifest: Manifest, run: Run, status: int, *parts: str) -> None:
    """One message, its exit status, nothing on disk."""
    assert run.status == status, run.err
    assert run.out == b""
    assert len([line for line in run.err.splitlines() if line.startswith("attestor: error: ")]) == 1
    for part in parts:
        assert part in run.err
    assert manifest.placed() == {}


# -- what works


def test_keys_of_s3(manifest: Manifest) -> None:
    """Whatever S3 allows, as it is; see "Naming Amazon S3 objects" of its user guide."""
    keys = ["a b.enc", " x/y ", "a+b&c=d;e@f,g:h", "h(i)!*'~$\\\"", "a?b#c", "100%", "a%2Fb"]
    keys.append("\u00e9/\u4e2d")
    for number, key in enumerate(keys):
        manifest.enclave.world.store.objects[f"bucket/{key}"] = key.encode()
        target = f"{manifest.run}/{number}"
        manifest.add("file", source=f"s3://bucket/{key}", target=target, unauthenticated=True)
    assert manifest.inject() == DONE
    assert manifest.placed() == {str(number): key.encode() for number, key in enumerate(keys)}


def test_secrets_and_files_of_every_source(manifest: Manifest) -> None:
    enclave = manifest.enclave
    enclave.world.store.objects["bucket/b.enc"] = manifest.encrypt(b"from S3")
    enclave.world.store.objects["web/app.toml"] = b"x = 1\n"
    context = {"node": "3"}
    manifest.secret("a", b"from a file", mode="0640")
    manifest.add(source="s3://bucket/b.enc", target=f"{manifest.run}/b", context=context)
    manifest.add(
        source=f"{enclave.world.url}/bucket/b.enc", target=f"{manifest.run}/c", context=context
    )
    sha256 = hashlib.sha256(b"x = 1\n").hexdigest()
    url = f"{enclave.world.url}/web/app.toml"
    manifest.add(
        "file",
        source=url,
        target=f"{manifest.run}/d",
        sha256=sha256,
        mode="0644",
        world_readable=True,
    )
    manifest.add("file", source=url, target=f"{manifest.run}/e", unauthenticated=True)
    assert manifest.inject() == DONE
    expected = {
        "a": b"from a file",
        "b": b"from S3",
        "c": b"from S3",
        "d": b"x = 1\n",
        "e": b"x = 1\n",
    }
    assert manifest.placed() == expected
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in manifest.run.iterdir()}
    assert modes == {"a": 0o640, "b": 0o600, "c": 0o600, "d": 0o644, "e": 0o600}


def test_standard_input_and_base64(manifest: Manifest) -> None:
    import base64

    blob = base64.encodebytes(manifest.encrypt(b"typed"))
    manifest.add(source="-", target=f"{manifest.run}/a", context={"node": "3"}, encoding="base64")
    (manifest.enclave.folder / "m.toml").write_text(manifest.text, encoding="utf-8")
    assert manifest.enclave.attestor("inject", "m.toml", stdin=blob) == DONE
    assert manifest.placed() == {"a": b"typed"}


def test_the_manifest_from_standard_input(manifest: Manifest) -> None:
    manifest.secret("a")
    assert manifest.enclave.attestor("inject", "-", stdin=manifest.text.encode()) == DONE
    assert manifest.placed() == {"a": b"the secret"}


def test_variables_choose_among_what_the_manifest_allows(manifest: Manifest) -> None:
    enclave = manifest.enclave
    enclave.world.store.objects["bucket/node-3/key"] = manifest.encrypt(b"of node 3")
    manifest.text += '[variables]\nNODE = "[0-9]{1,4}"\n'
    target = f"{manifest.run}/key-${{NODE}}"
    manifest.add(source="s3://bucket/node-${NODE}/key", target=target, context={"node": "${NODE}"})
    assert manifest.inject("--set", "NODE=3") == DONE
    assert manifest.placed() == {"key-3": b"of node 3"}
    assert manifest.inject("--force", environment={"NODE": "3"}) == DONE
    for hostile in ("3/../4", "../3", "3\n", "", "33333", "$(id)", "${NODE}"):
        run = manifest.inject("--force", "--set", f"NODE={hostile}")
        assert (run.status, manifest.placed()) == (2, {"key-3": b"of node 3"})


@pytest.mark.parametrize(
    ("made", "wanted", "part"),
    [("kms", "message", "it is a CiphertextBlob"), ("esdk", "blob", "it is a message")],
)
def test_the_form_that_the_manifest_says(
    manifest: Manifest, made: str, wanted: str, part: str
) -> None:
    enclave = manifest.enclave
    enclave.place(b"the secret", "plain")
    key = ["--key-id", enclave.world.kms.key_arn, "--context", "node=3"]
    assert enclave.attestor("encrypt", *key, "--format", made, "plain", "source") == DONE
    source, target = str(enclave.folder / "source"), str(manifest.run / "a")
    entry = {"source": source, "target": target, "context": {"node": "3"}}
    text = manifest.text
    refused(manifest, manifest.add(**entry, form=wanted).inject(), 2, part)
    manifest.text = text
    assert manifest.add(**entry, form={"kms": "blob", "esdk": "message"}[made]).inject() == DONE


def test_fifty_secrets_with_one_document_and_few_connections(manifest: Manifest) -> None:
    enclave = manifest.enclave
    blobs = {str(number): manifest.encrypt(b"%d" % number, str(number)) for number in range(49)}
    for node, blob in blobs.items():
        source = enclave.folder / enclave.place(blob, f"{node}.enc")
        manifest.add(source=str(source), target=f"{manifest.run}/{node}", context={"node": node})
    enclave.place(large := os.urandom(1 << 20) * 64, "large")
    key = ["--key-id", enclave.world.kms.key_arn, "--context", "node=3"]
    assert enclave.attestor("encrypt", *key, "large", "large.enc") == DONE
    message = str(enclave.folder / "large.enc")
    manifest.add(source=message, target=f"{manifest.run}/large", context={"node": "3"}, signed=True)
    connections = enclave.world.connections
    run = manifest.inject("-v", "--receipt", "receipt")
    assert run.status == 0, run.err
    assert enclave.world.connections - connections <= 4
    assert run.err.count("attestation document of") == 1
    assert manifest.placed() == {**{node: node.encode() for node in blobs}, "large": large}
    receipt = json.loads((enclave.folder / "receipt").read_bytes())
    assert receipt["module_id"].startswith("i-")
    assert receipt["pcrs"]["0"] == enclave.world.module.pcrs[0].hex()
    lengths = [*(len(node) for node in blobs), len(large)]
    assert [entry["bytes"] for entry in receipt["entries"]] == lengths
    assert len({entry["request_id"] for entry in receipt["entries"]}) == 50
    assert {entry["key_id"] for entry in receipt["entries"]} == {enclave.world.kms.key_arn}
    assert all(hashlib.sha256(value).hexdigest() not in run.err for value in (b"1", large))


def test_an_existing_target_needs_force(manifest: Manifest) -> None:
    manifest.secret("a").secret("b")
    (manifest.run / "b").write_bytes(b"old")
    run = manifest.inject()
    assert (run.status, run.error) == (7, f"{manifest.run}/b exists")
    assert manifest.placed() == {"b": b"old"}
    assert manifest.inject("--force") == DONE
    assert manifest.placed() == {"a": b"the secret", "b": b"the secret"}


# -- all or nothing


@pytest.mark.parametrize("number", [1, 5, 10])
def test_any_secret_that_fails_leaves_the_folder_as_it_was(manifest: Manifest, number: int) -> None:
    for one in range(1, 11):
        context = {"node": "4"} if one == number else {"node": "3"}
        manifest.secret(f"s{one}", context=context)
    refused(
        manifest,
        manifest.inject(),
        4,
        f"/run/s{number}: KMS refused to decrypt: InvalidCiphertextException",
    )
    (manifest.run / "s3").write_bytes(b"old")
    assert manifest.inject("--force").status == 4
    assert manifest.placed() == {"s3": b"old"}


def interrupted(manifest: Manifest, point: int, what: str) -> Run:
    """Inject with an error, or a signal's name, behind the point-th name that is given."""
    (manifest.enclave.folder / "m.toml").write_text(manifest.text, encoding="utf-8")
    program = (
        "import attestor, os, signal\n"
        "from attestor_io import secret_file\n"
        "take_name, calls = secret_file.SecretFile.take_name, []\n"
        "def failing(self):\n"
        "    calls.append(1)\n"
        "    take_name(self)\n"
        f"    if len(calls) == {point}:\n"
        f"        if {what!r} == 'EIO': raise attestor.OutputError('EIO')\n"
        f"        os.kill(os.getpid(), signal.{what if what != 'EIO' else 'SIGTERM'})\n"
        "secret_file.SecretFile.take_name = failing\n"
        "attestor.main()"
    )
    return manifest.enclave.run(sys.executable, "-c", program, "inject", "--force", "m.toml")


@pytest.mark.parametrize("point", [1, 2, 3])
def test_a_failure_while_names_are_given_takes_all_of_them_back(
    manifest: Manifest, point: int
) -> None:
    for name in "abc":
        manifest.secret(name)
    (manifest.run / "b").write_bytes(b"old")
    (manifest.run / "c").symlink_to("nowhere")
    inodes = [(manifest.run / name).lstat().st_ino for name in "bc"]
    assert interrupted(manifest, point, "EIO").status == 7
    assert set(os.listdir(manifest.run)) == {"b", "c"}
    assert [(manifest.run / name).lstat().st_ino for name in "bc"] == inodes
    assert (manifest.run / "b").read_bytes() == b"old"
    assert (manifest.run / "c").readlink().name == "nowhere"


@pytest.mark.parametrize("what", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_while_names_are_given_lets_all_of_them_be_given(
    manifest: Manifest, what: str
) -> None:
    for name in "abc":
        manifest.secret(name, name.encode())
    (manifest.run / "b").write_bytes(b"old")
    assert interrupted(manifest, 2, what) == DONE
    assert manifest.placed() == {name: name.encode() for name in "abc"}


def test_kill_at_any_moment_leaves_only_complete_and_private_targets(manifest: Manifest) -> None:
    names = [f"s{number}" for number in range(20)]
    for name in names:
        manifest.secret(name, name.encode() * 100)
    assert manifest.inject() == DONE
    start = time.monotonic()
    assert manifest.inject("--force") == DONE
    duration = time.monotonic() - start
    seed = random.randrange(1 << 32)  # noqa: S311 - nothing is secret here
    moments = random.Random(seed)  # noqa: S311
    for _ in range(KILLS):
        for path in manifest.run.iterdir():
            path.unlink()
        killed_after(manifest, moments.uniform(duration / 2, duration))
        for name, content in manifest.placed().items():
            assert name in names, f"{name} is left, seed {seed}"
            assert content == name.encode() * 100, f"{name} is not complete, seed {seed}"
            assert stat.S_IMODE((manifest.run / name).stat().st_mode) == 0o600


def killed_after(manifest: Manifest, seconds: float) -> None:
    """Start an injection, and end it with SIGKILL so many seconds later, if it still runs."""
    command = [sys.executable, "-m", "attestor", "inject", "m.toml"]
    with subprocess.Popen(
        command, cwd=manifest.enclave.folder, env=manifest.enclave.environment
    ) as child:
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_kms_is_silent(
    enclaves: Callable[..., Enclave], number: signal.Signals
) -> None:
    manifest = Manifest(enclaves(faults=["hang"])).secret("a").secret("b")
    (manifest.enclave.folder / "m.toml").write_text(manifest.text, encoding="utf-8")
    child = subprocess.Popen(
        [sys.executable, "-m", "attestor", "inject", "-v", "m.toml"],
        cwd=manifest.enclave.folder, env=manifest.enclave.environment,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with child:
        assert child.stderr is not None
        while "KMS at" not in (line := child.stderr.readline()):
            assert line
        child.send_signal(number)
        assert child.wait(timeout=60) == -number
    assert manifest.placed() == {}


def test_a_kms_that_is_silent_ends_it_in_time(enclaves: Callable[..., Enclave]) -> None:
    manifest = Manifest(enclaves(faults=["hang"]))
    manifest.text += "timeout = 6\n"
    manifest.secret("a").secret("b")
    refused(manifest, manifest.inject(), 5, "within 6 seconds")


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("no-envelope", 6),
        ("wrong-key-id", 6),
        ("throttling", 5),
        ("bad-signature", 4),
        ("tls-other-ca", 6),
    ],
)
def test_an_answer_that_cannot_be_trusted(
    enclaves: Callable[..., Enclave], fault: str, status: int
) -> None:
    enclave = enclaves(faults=[fault] if fault != "tls-other-ca" else [])
    manifest = Manifest(enclave).secret("a").secret("b")
    environment: dict[str, str | None] = {"AWS_MAX_ATTEMPTS": "1"}
    if fault == "tls-other-ca":
        environment["AWS_CA_BUNDLE"] = str(enclaves().world.folder / "ca.pem")
    refused(manifest, manifest.inject(environment=environment), status)


def test_without_a_module_nothing_is_asked(manifest: Manifest) -> None:
    manifest.secret("a")
    run = manifest.inject(environment={"LD_PRELOAD": None, "NITROSIM_NSM_SOCKET": None})
    refused(manifest, run, 3, "no Nitro Secure Module")


# -- the program that follows


def test_the_program_takes_over(manifest: Manifest) -> None:
    manifest.secret("a")
    run = manifest.inject(
        "--", "sh", "-c", 'cat run/a; echo "$@" >&2; exit 42', "sh", "-x", "--force"
    )
    assert run == Run(42, b"the secret", "-x --force\n")


def test_the_program_dies_of_its_own_signals(manifest: Manifest) -> None:
    manifest.secret("a")
    assert manifest.inject("--", "sh", "-c", "kill -TERM $$").status == 128 + signal.SIGTERM
    shown = manifest.inject("--force", "--", "sh", "-c", "grep SigIgn /proc/self/status")
    assert int(shown.out.split()[1], 16) & 1 << (signal.SIGPIPE - 1) == 0


def test_the_program_gets_no_credentials_and_no_descriptors(manifest: Manifest) -> None:
    manifest.secret("a")
    script = "env; ulimit -c; ls /proc/self/fd | wc -l"
    run = manifest.inject(
        "--", "sh", "-c", script, environment={"AWS_CONTAINER_AUTHORIZATION_TOKEN": "x"}
    )
    *lines, core, descriptors = run.out.decode().splitlines()
    names = {line.partition("=")[0] for line in lines}
    assert not names & {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}
    assert "AWS_CONTAINER_AUTHORIZATION_TOKEN" not in names
    assert "AWS_REGION" in names
    assert (core, descriptors) == ("0", "4")  # 0, 1, 2 and the folder that ls reads
    manifest.text = "pass_credentials = true\n" + manifest.text
    run = manifest.inject("--force", "--", "sh", "-c", 'test -n "$AWS_SESSION_TOKEN"')
    assert run == DONE


@pytest.mark.parametrize(
    ("program", "status", "part"),
    [
        ("no-such-program", 127, "no such program"),
        ("./absent", 127, "no such program"),
        ("./plain", 126, "cannot be executed"),
        ("./folder", 126, "cannot be executed"),
        ("./text", 126, "neither ELF nor a script"),
        ("./dangling", 126, "cannot be executed"),
        ("./orphan", 126, "cannot be executed"),
    ],
)
def test_a_program_that_cannot_be_run(
    manifest: Manifest, program: str, status: int, part: str
) -> None:
    folder = manifest.enclave.folder
    (folder / "plain").write_bytes(b"#!/bin/sh\n")
    (folder / "folder").mkdir()
    (folder / "dangling").symlink_to("nowhere")
    for name, content in (("text", b"hello"), ("orphan", b"#!/no/such/interpreter\n")):
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o755)
    manifest.secret("a")
    refused(manifest, manifest.inject("--", program), status, part)


def last_minute(manifest: Manifest) -> str:
    """A program that nothing but execve refuses: ELF, without an interpreter and without code."""
    path = manifest.enclave.folder / "broken"
    path.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(249))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("kind", ["fifo", "carriage return"])
def test_a_program_that_only_looks_like_one(manifest: Manifest, kind: str) -> None:
    program = manifest.enclave.folder / "program"
    if kind == "fifo":
        os.mkfifo(program, 0o755)
    else:
        program.write_bytes(b"#!/bin/sh\r\nexit 0\r\n")
        program.chmod(0o755)
    manifest.secret("a")
    run = manifest.inject("-v", "--", str(program))
    refused(manifest, run, 126, "it is no file" if kind == "fifo" else "is no executable file")
    assert "KMS" not in run.err


def test_a_program_may_be_what_was_placed(manifest: Manifest) -> None:
    """Nothing holds it open for writing any more when it is executed."""
    script = b"#!/bin/sh\necho new\n"
    source = str(manifest.enclave.folder / manifest.enclave.place(script, "source"))
    target = manifest.run / "app"
    target.write_bytes(b"#!/bin/sh\necho old\n")
    target.chmod(0o755)
    manifest.add(
        "file",
        source=source,
        target=str(target),
        mode="0700",
        sha256=hashlib.sha256(script).hexdigest(),
    )
    run = manifest.inject("--force", "--", str(target))
    assert run == Run(0, b"new\n", "")


def test_as_process_1_nothing_is_left_and_no_child_is_added(
    manifest: Manifest, namespaces: None
) -> None:
    manifest.secret("a")
    (manifest.run / "a").write_bytes(b"old")
    manifest.enclave.place(manifest.text.encode(), "m.toml")
    unshare = ["unshare", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    command = [sys.executable, "-m", "attestor", "inject", "--force", "m.toml", "--"]
    shown = ["sh", "-c", "ls -A run; cat /proc/1/task/1/children"]
    run = manifest.enclave.run(*unshare, *command, *shown)
    assert run.status == 0, run.err
    assert run.out.split()[0] == b"a"
    assert len(run.out.split()) <= 2  # the target, and ls or cat itself
    assert manifest.placed() == {"a": b"the secret"}


def test_a_helper_that_cannot_be_started_is_an_output_that_cannot_be(manifest: Manifest) -> None:
    manifest.secret("a")
    (manifest.run / "a").write_bytes(b"old")
    manifest.enclave.place(manifest.text.encode(), "m.toml")
    program = (
        "import attestor, os\n"
        "fork, parent = os.fork, os.getpid()\n"
        "def second_fails():\n"
        "    if os.getpid() != parent: raise BlockingIOError(11, 'no more processes')\n"
        "    return fork()\n"
        "os.fork = second_fails\n"
        "attestor.main()"
    )
    command = ("inject", "--force", "m.toml", "--", "true")
    run = manifest.enclave.run(sys.executable, "-c", program, *command)
    assert run.status == 7, run.err
    assert "no process for it can be started" in run.error
    assert manifest.placed() == {"a": b"old"}


def test_a_program_that_fails_at_last_leaves_what_was_replaced(manifest: Manifest) -> None:
    """The same files are there again, not copies: links, times, and a symbolic link as a target."""
    for name in ("new", "old", "link"):
        manifest.secret(name)
    (manifest.run / "old").write_bytes(b"old")
    (manifest.run / "old").chmod(0o640)
    (manifest.run / "other name").hardlink_to(manifest.run / "old")
    (manifest.run / "link").symlink_to("nowhere")
    before = {path.name: path.lstat() for path in manifest.run.iterdir()}
    run = manifest.inject("--force", "--", last_minute(manifest))
    assert run.status == 126
    assert "Exec format error" in run.error
    after = {path.name: path.lstat() for path in manifest.run.iterdir()}
    same = ("st_ino", "st_nlink", "st_mode", "st_mtime_ns", "st_size")
    assert {name: [getattr(status, one) for one in same] for name, status in after.items()} == {
        name: [getattr(status, one) for one in same] for name, status in before.items()
    }


def test_a_full_disk_does_not_keep_what_was_replaced_from_coming_back(
    manifest: Manifest, namespaces: None
) -> None:
    manifest.secret("a").secret("b")
    manifest.enclave.place(manifest.text.encode(), "m.toml")
    script = (
        f"mount -t tmpfs -o size=24k none {manifest.run} && cd {manifest.run} && "
        "printf old-a > a && printf old-b > b && head -c 8192 /dev/zero > x && cd - >/dev/null && "
        f"{sys.executable} -m attestor inject --force m.toml -- {last_minute(manifest)}; "
        f"status=$?; cat /dev/zero > {manifest.run}/filler 2>/dev/null; ls -A {manifest.run}; "
        f"cat {manifest.run}/a {manifest.run}/b; exit $status"
    )
    run = manifest.enclave.run("unshare", "--map-root-user", "--mount", "sh", "-c", script)
    assert run.status == 126, run.err
    assert run.out.endswith(b"old-aold-b")
    assert set(run.out.split()[:-1]) == {b"a", b"b", b"filler", b"x"}


@pytest.mark.parametrize("descriptors", [20, 24, 29, 34])
def test_few_descriptors_lose_nothing(manifest: Manifest, descriptors: int) -> None:
    names = [f"t{number}" for number in range(10)]
    for name in names:
        manifest.secret(name)
        (manifest.run / name).write_bytes(b"old")
    manifest.enclave.place(manifest.text.encode(), "m.toml")
    command = f"{sys.executable} -m attestor inject --force m.toml -- {last_minute(manifest)}"
    run = manifest.enclave.run("sh", "-c", f"ulimit -n {descriptors}; exec {command}")
    assert run.status in {3, 5, 7, 126}, run.err
    assert manifest.placed() == dict.fromkeys(names, b"old")


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("unnamed", [True, False])
def test_no_name_is_left_behind_exec(
    manifest: Manifest, namespaces: None, force: tuple[str, ...], unnamed: bool
) -> None:
    """The program's unlink removes the secret: there is no second, hidden name of it."""
    manifest.secret("a").secret("b")
    if force:
        (manifest.run / "a").write_bytes(b"old")
    manifest.enclave.place(manifest.text.encode(), "m.toml")
    program = manifest.enclave.place(
        b"#!/bin/sh\nstat -c %h run/a run/b\nsleep 1; ls -A run\n", "p"
    )
    (manifest.enclave.folder / program).chmod(0o755)
    hide = "" if unnamed else "mount -t tmpfs none /proc && "
    command = f"{hide}exec {sys.executable} -m attestor inject {' '.join(force)} m.toml -- ./p"
    run = manifest.enclave.run("unshare", "--map-root-user", "--mount", "sh", "-c", command)
    assert (run.status, run.out.split(), run.err) == (0, [b"1", b"1", b"a", b"b"], "")


# -- sources


SIGNATURE: Final = "5f6e7d8c"


def hostile(environ: Any, start_response: Any) -> Any:
    """Paths of a hostile server."""
    request = Request(environ)
    name = request.path.rpartition("/")[2]
    if name == "to-nowhere":  # which werkzeug would not send
        start_response("302 Found", [("Location", "https://[bad"), ("Content-Length", "0")])
        return [b""]
    location = {
        "to-http": f"http://me:{SIGNATURE}@localhost/x?sig={SIGNATURE}&a= {SIGNATURE}",
        "to-nobody": f"https://127.0.0.1:1/x?sig={SIGNATURE}",
        "to-itself": request.url,
        "to-good": "/good",
    }.get(name)
    response = Response(b"good", 200)
    if location:
        response = Response(b"", 302, headers={"Location": location})
    elif name.isdigit():
        response = Response(b"", int(name))
    elif name == "endless":
        response = Response((bytes(1 << 16) for _ in range(ENDLESS >> 16)), 200)
    elif name == "slow":
        response = Response(drip(), 200)
    elif name == "cut":
        response = Response(iter([b"12345"]), 200, headers={"Content-Length": "10"})
    return response(environ, start_response)


def drip() -> Iterator[bytes]:
    while True:
        yield b"x"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def server() -> Iterator[HttpsServer]:
    """A server that nobody should trust, with a CA of its own."""
    with HttpsServer(hostile) as started:
        yield started


def trusting(manifest: Manifest, server: HttpsServer) -> dict[str, str | None]:
    """An environment in which the server's CA is good, for hosts that are not AWS's."""
    return {
        "SSL_CERT_FILE": str(
            manifest.enclave.folder / manifest.enclave.place(server.ca_pem, "web.pem")
        )
    }


@pytest.mark.parametrize(
    ("path", "status", "part"),
    [
        ("404", 2, "HTTP status 404"),
        ("403", 4, "HTTP status 403"),
        ("500", 5, "HTTP status 500"),
        ("to-http", 6, "which is not https"),
        ("to-nowhere", 6, "which is not https"),
        ("to-nobody", 5, "Connection refused"),
        ("to-itself", 2, "redirects more than 3 times"),
        ("endless", 2, "longer than 1000 bytes"),
        ("cut", 5, "cannot be read"),
        ("good", 6, "expected 0000"),
        ("slow", 5, "not done within 6 seconds"),
    ],
)
def test_a_hostile_web_server(
    manifest: Manifest, server: HttpsServer, path: str, status: int, part: str
) -> None:
    """Whoever has a presigned URL has what it is for, so that no message shows its query."""
    manifest.text += "timeout = 6\n" if path == "slow" else ""
    manifest.secret("a")
    url = f"{server.url}/{path}"
    source = f"{url}?X-Amz-Credential='me'&X-Amz-Signature={SIGNATURE}"
    manifest.add("file", source=source, target=f"{manifest.run}/f", sha256="0" * 64, max_bytes=1000)
    run = manifest.inject("--receipt", f"{manifest.run}/r", environment=trusting(manifest, server))
    refused(manifest, run, status, part, f"{url}?..." if path != "slow" else "")
    assert SIGNATURE not in run.err


def test_a_redirect_to_https_is_followed(manifest: Manifest, server: HttpsServer) -> None:
    url = f"{server.url}/to-good?sig={SIGNATURE}"
    manifest.add("file", source=url, target=f"{manifest.run}/f", unauthenticated=True).secret("a")
    receipt = f"{manifest.run}/r"
    assert manifest.inject("--receipt", receipt, environment=trusting(manifest, server)) == DONE
    assert manifest.placed()["f"] == b"good"
    assert SIGNATURE.encode() not in manifest.placed()["r"]


def test_a_web_server_with_a_certificate_of_nobody(manifest: Manifest, server: HttpsServer) -> None:
    manifest.add(
        "file",
        source=f"{server.url}/good?sig={SIGNATURE}",
        target=f"{manifest.run}/f",
        unauthenticated=True,
    ).secret("a")
    run = manifest.inject()
    refused(manifest, run, 6, "certificate is not valid")
    assert SIGNATURE not in run.err


def test_the_ca_of_the_manifest_for_web_servers_wins(
    manifest: Manifest, server: HttpsServer
) -> None:
    trusted = trusting(manifest, server)["SSL_CERT_FILE"]
    manifest.text += f'https_ca_bundle = "{trusted}"\n'
    manifest.add(
        "file", source=f"{server.url}/good", target=f"{manifest.run}/f", unauthenticated=True
    ).secret("a")
    assert manifest.inject(environment={"SSL_CERT_FILE": "/absent"}) == DONE


def test_a_ca_bundle_for_web_servers_that_is_not_there(
    manifest: Manifest, server: HttpsServer
) -> None:
    manifest.add(
        "file", source=f"{server.url}/good", target=f"{manifest.run}/f", unauthenticated=True
    ).secret("a")
    refused(
        manifest,
        manifest.inject(environment={"SSL_CERT_FILE": "/absent"}),
        2,
        "CA bundle /absent cannot be read",
    )


RESOLVING: Final = """
import socket, attestor
resolve = socket.getaddrinfo
socket.getaddrinfo = lambda host, port, *rest: resolve("127.0.0.1", port, *rest)
attestor.main()
"""


@pytest.mark.parametrize(("host", "status"), [("kms.eu-west-1.amazonaws.com", 0), ("localhost", 6)])
def test_hosts_of_aws_have_roots_of_their_own(
    manifest: Manifest, server: HttpsServer, host: str, status: int
) -> None:
    enclave = manifest.enclave
    enclave.world.store.objects["web/app"] = b"x = 1\n"
    source = f"https://{host}:{enclave.world.port}/web/app"
    manifest.add("file", source=source, target=f"{manifest.run}/f", unauthenticated=True).secret(
        "a"
    )
    (enclave.folder / "m.toml").write_text(manifest.text, encoding="utf-8")
    command = [sys.executable, "-c", RESOLVING, "inject", "m.toml"]
    assert enclave.run(*command, environment=trusting(manifest, server)).status == status


@pytest.mark.parametrize(
    ("host", "aws"),
    [
        ("s3.eu-west-1.amazonaws.com", True),
        ("bucket.S3.eu-west-1.amazonaws.COM.", True),
        ("amazonaws.com", True),
        ("s3.cn-north-1.amazonaws.com.cn", True),
        ("s3.eusc-de-east-1.amazonaws.eu", True),
        ("s3.dualstack.eu-west-1.api.aws", True),
        ("notamazonaws.com", False),
        ("amazonaws.com.example", False),
        ("config.example", False),
        ("127.0.0.1", False),
        ("::1", False),
        ("com", False),
        ("", False),
    ],
)
def test_which_hosts_are_of_aws(host: str, aws: bool) -> None:
    assert is_of_aws(host, botocore.session.Session()) is aws


def test_a_web_server_that_is_not_there(manifest: Manifest) -> None:
    manifest.add(
        "file", source="https://127.0.0.1:1/x", target=f"{manifest.run}/f", unauthenticated=True
    )
    manifest.secret("a")
    refused(manifest, manifest.inject(), 5, "https://127.0.0.1:1/x")


@pytest.mark.parametrize(
    ("source", "status", "part"),
    [
        ("s3://bucket/absent", 2, "NoSuchKey"),
        ("s3://forbidden/x", 4, "AccessDenied"),
        ("/absent", 2, "No such file"),
        ("/", 2, "names a folder"),
        ("/dev", 2, "Is a directory"),
        ("/dev/null", 2, "is empty"),
        ("/dev/zero", 2, "longer than the 6144 bytes"),
    ],
)
def test_a_source_that_cannot_be_read(
    manifest: Manifest, source: str, status: int, part: str
) -> None:
    manifest.secret("a").add(source=source, target=f"{manifest.run}/b", context={"node": "3"})
    refused(manifest, manifest.inject(), status, part)


def test_an_insecure_endpoint_of_s3(manifest: Manifest) -> None:
    manifest.secret("a").add(
        source="s3://bucket/x", target=f"{manifest.run}/b", context={"node": "3"}
    )
    run = manifest.inject(environment={"AWS_ENDPOINT_URL_S3": "http://localhost:1"})
    refused(manifest, run, 2, "http://localhost:1 is not https")


# -- the manifest itself


def test_a_manifest_that_cannot_be_read(manifest: Manifest) -> None:
    refused(
        manifest,
        manifest.enclave.attestor("inject", "absent.toml"),
        2,
        "manifest absent.toml cannot be read",
    )
    manifest.text = "x = "
    refused(manifest, manifest.inject(), 2, "not TOML")
    manifest.text = "#" * (1 << 20) + "#"
    refused(manifest, manifest.inject(), 2, "longer than")


def test_a_document_that_is_none_ends_it_before_kms_is_asked(manifest: Manifest) -> None:
    """A receipt says what the document says, which must be known before anything is placed."""
    manifest.secret("a")
    manifest.enclave.place(manifest.text.encode(), "m.toml")
    program = (
        "import attestor, nsm\n"
        "nsm.Nsm.attest = lambda self, **fields: b'no document'\n"
        "attestor.main()"
    )
    command = ("inject", "-v", "--receipt", "receipt", "m.toml")
    run = manifest.enclave.run(sys.executable, "-c", program, *command)
    refused(manifest, run, 6, "attestation document of this enclave cannot be read")
    assert "KMS answered" not in run.err
    assert "receipt" not in manifest.enclave.files()


def test_a_receipt_in_the_place_of_a_target(manifest: Manifest) -> None:
    manifest.secret("a")
    refused(manifest, manifest.inject("--force", "--receipt", "run/./a"), 2, "is a target too")


def test_an_unwritable_target_ends_it_before_kms_is_asked(manifest: Manifest) -> None:
    manifest.secret("a", target=f"{manifest.run}/absent/a")
    refused(
        manifest,
        manifest.inject(environment={"AWS_ACCESS_KEY_ID": None}),
        7,
        "there is no folder",
    )


@pytest.mark.parametrize("setting", ["NODE", "=3"])
def test_a_setting_that_cannot_be(manifest: Manifest, setting: str) -> None:
    manifest.secret("a")
    refused(manifest, manifest.inject("--set", setting), 2, "NAME=VALUE")
    refused(manifest, manifest.inject("--set", "A=1", "--set", "A=2"), 2, "A twice")


def test_the_endpoint_and_the_ca_of_the_manifest_win(manifest: Manifest) -> None:
    world = manifest.enclave.world
    manifest.text += f'endpoint_url = "{world.url}"\nca_bundle = "{world.folder}/ca.pem"\n'
    manifest.secret("a")
    astray: dict[str, str | None] = {
        "AWS_ENDPOINT_URL_KMS": "https://127.0.0.1:1",
        "AWS_CA_BUNDLE": "/absent",
    }
    assert manifest.inject(environment=astray) == DONE


def test_the_schema_is_printed(manifest: Manifest) -> None:
    run = manifest.enclave.attestor("inject", "--schema")
    assert (run.status, run.err) == (0, "")
    assert json.loads(run.out)["title"] == "manifest of attestor inject"


def test_a_terminal_sees_progress_and_others_do_not(manifest: Manifest) -> None:
    for number in range(12):
        manifest.secret(f"s{number}")
    assert manifest.inject() == DONE
    leader, follower = os.openpty()
    command = [sys.executable, "-m", "attestor", "inject", "-f", "m.toml"]
    done = subprocess.run(
        command,
        cwd=manifest.enclave.folder,
        env=manifest.enclave.environment,
        stderr=follower,
        check=False,
    )
    os.close(follower)
    shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert done.returncode == 0
    assert " of 12" in shown
    assert shown.endswith("\r\x1b[K")


def test_the_owner_of_a_target(manifest: Manifest, tmp_path: Path) -> None:
    manifest.secret("a", owner=f"{os.getuid()}:{os.getgid()}")
    assert manifest.inject() == DONE
    assert (manifest.run / "a").stat().st_uid == os.getuid()
