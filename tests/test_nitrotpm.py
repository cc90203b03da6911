"""An EC2 instance with a NitroTPM: every command as in an enclave, from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import pytest

from nitrosim.tpm import DEFAULT_MODULE_ID, DEFAULT_PCRS
from nitrosim.world import World
from nsm.document import AttestationDocument
from nsm.tpm import INDEXES
from tests.conftest import Enclave, Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DONE: Final = Run(0, b"", "")
OTHER: Final = b"\x01" * 48


@pytest.fixture(scope="module")
def _instance_world() -> Iterator[World]:
    with World(nitrotpm=True) as world:
        yield world


@pytest.fixture
def instance(_instance_world: World, tmp_path: Path) -> Enclave:
    """An instance that the policy of alias/nitrosim lets in."""
    return Enclave(_instance_world, tmp_path)


def indexes(instance: Enclave) -> list[int]:
    assert instance.world.tpm
    return sorted(instance.world.tpm.indexes)


# ---- decrypt and inject


def test_decrypt(instance: Enclave) -> None:
    instance.place(instance.encrypt(b"for this instance", node="3"))
    run = instance.decrypt("--context", "node=3", "-v")
    assert (run.status, run.out) == (0, b"")
    assert "note: NitroTPM through /dev/tpmrm0" in run.err
    assert (instance.folder / "out").read_bytes() == b"for this instance"
    assert indexes(instance) == []


def test_inject_with_a_receipt(instance: Enclave) -> None:
    instance.place(instance.encrypt(b"injected"))
    manifest = f"""
any_key = true
[[secret]]
source = "{instance.folder}/blob"
target = "{instance.folder}/secret"
unbound = true
"""
    instance.place(manifest.encode(), "manifest.toml")
    options = ["--receipt", str(instance.folder / "receipt"), "manifest.toml"]
    run = instance.attestor("inject", *options, "--", "cat", "secret")
    assert (run.status, run.out) == (0, b"injected"), run.err
    receipt = json.loads((instance.folder / "receipt").read_bytes())
    assert receipt["module_id"] == DEFAULT_MODULE_ID
    assert receipt["pcrs"] == {}
    assert receipt["nitrotpm_pcrs"]["4"] == DEFAULT_PCRS[4].hex()


def test_the_other_operations(instance: Enclave) -> None:
    assert instance.attestor("generate-random", "32", "random") == DONE
    options = ["--key-id", instance.world.kms.key_arn, "--spec", "AES_256"]
    assert instance.attestor("generate-data-key", *options, "key", "wrapped") == DONE
    for name in ("random", "key"):
        assert len((instance.folder / name).read_bytes()) == 32


PROGRAM: Final = """
import boto3, sys, attestor
kms = attestor.attested(boto3.client("kms"))
sys.stdout.buffer.write(kms.decrypt(CiphertextBlob=open("blob", "rb").read())["Plaintext"])
"""


def test_attested_clients(instance: Enclave) -> None:
    instance.place(instance.encrypt(b"by a program"))
    assert instance.run(sys.executable, "-c", PROGRAM) == Run(0, b"by a program", "")


def test_another_boot_manager_is_refused_and_named(
    enclaves: Callable[..., Enclave],
) -> None:
    instance = enclaves(nitrotpm=True, tpm_pcrs={4: OTHER})
    instance.place(instance.encrypt())
    run = instance.decrypt()
    assert run.status == 4
    assert f"sent NitroTPM PCR4 {OTHER.hex()[:12]}..." in run.err
    assert "PCR7" in run.err
    assert "conditions (NitroTPMPCR4 with NitroTPMPCR12, or NitroTPMPCR7)" in run.err
    assert "debug mode" not in run.err
    assert "enclave's PCRs" not in run.err
    assert not (instance.folder / "out").exists()


# ---- evidence


def test_a_document_is_verified_as_what_it_is(instance: Enclave) -> None:
    assert instance.attestor("attest", "--nonce", "0102", "document") == DONE
    data = (instance.folder / "document").read_bytes()
    assert AttestationDocument.parse(data).source == "nitrotpm"
    root = instance.environment["NITROSIM_NSM_ROOT"]
    pcr4 = f"4={DEFAULT_PCRS[4].hex()}"
    for options, status in (
        (["--nitrotpm-pcr", pcr4, "--nonce", "0102"], 0),
        (["--nitrotpm-pcr", f"4={OTHER.hex()}"], 6),
        (["--pcr", pcr4], 6),
    ):
        run = instance.attestor("verify", "--root", root, *options, "document")
        assert run.status == status, run.err


def test_describe(instance: Enclave) -> None:
    run = instance.attestor("describe")
    assert (run.status, run.err) == (0, "")
    text = run.out.decode()
    assert "NitroTPM of an EC2 instance" in text
    assert "PCR4   boot manager" in text
    assert "debug mode " not in text
    assert "locked" not in text
    shown: dict[str, Any] = json.loads(instance.attestor("describe", "--json").out)
    assert (shown["source"], shown["module_id"]) == ("nitrotpm", DEFAULT_MODULE_ID)
    assert (shown["pcrs"], shown["debug_mode"]) == ({}, None)
    assert shown["nitrotpm_pcrs"]["12"]["value"] == "00" * 48


def test_doctor(instance: Enclave) -> None:
    root = ["--root", instance.environment["NITROSIM_NSM_ROOT"]]
    key = ["--key-id", instance.world.kms.key_arn]
    run = instance.attestor("doctor", "--json", *root, *key)
    found = {result["check"]: result for result in json.loads(run.out)["checks"]}
    assert run.status == 0, run.out
    assert "NitroTPM" in found["library"]["reason"]
    assert DEFAULT_MODULE_ID in found["device"]["reason"]
    assert found["verification"]["outcome"] == "passed"
    assert "no debug mode" in found["debug mode"]["reason"]
    assert found["attested call"]["outcome"] == "passed"
    assert "for this instance" in found["attested call"]["reason"]


# ---- the choice of the source


def test_the_source_can_be_told(instance: Enclave, enclave: Enclave) -> None:
    for options in ([], ["--source", "auto"], ["--source", "nitrotpm"], ["--tpm", "/dev/tpm0"]):
        assert instance.attestor("attest", "-f", *options, "document") == DONE
    for options in ([], ["--source", "auto"], ["--source", "nsm"]):
        assert enclave.attestor("attest", "-f", *options, "document") == DONE


def test_no_source_falls_back_to_the_other(instance: Enclave, enclave: Enclave) -> None:
    run = instance.attestor("attest", "--source", "nsm", "document")
    assert (run.status, run.error.partition(":")[0]) == (3, "no Nitro Secure Module")
    run = enclave.attestor("attest", "--source", "nitrotpm", "document")
    assert (run.status, run.error.partition(":")[0]) == (3, "no NitroTPM")
    assert "TPM support v2.0" in run.err
    both = {"NITROSIM_TPM_SOCKET": instance.environment["NITROSIM_TPM_SOCKET"]}
    assert enclave.attestor("attest", "document", environment=both) == DONE
    data = (enclave.folder / "document").read_bytes()
    assert AttestationDocument.parse(data).source == "enclave"
    gone = both | {"NITROSIM_NSM_SOCKET": "/nowhere/nsm.sock"}
    run = enclave.attestor("attest", "-f", "document", environment=gone)
    assert run.status == 3
    assert "Nitro Secure Module" in run.error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--source", "tpm"], "--source tpm is none of auto, nsm, nitrotpm"),
        (["--source", ""], "--source is empty"),
        (["--source", "nsm", "--tpm", "/dev/tpm0"], "the source nsm is asked for, and the TPM"),
        (["--nsm-library", "x.so", "--tpm", "/dev/tpm0"], "NSM_LIBRARY is asked for"),
    ],
)
def test_options_that_cannot_be(instance: Enclave, options: list[str], said: str) -> None:
    run = instance.attestor("attest", *options, "document")
    assert run.status == 2
    assert said in run.error
    assert instance.files() == set()


def test_the_environment_is_checked_as_the_options_are(instance: Enclave) -> None:
    run = instance.attestor("attest", "document", environment={"NSM_SOURCE": "tpm"})
    assert run.status == 2
    assert "source of attestation documents cannot be used: 'tpm' is none of" in run.error


def test_a_tpm_of_somebody_else_is_no_nitrotpm(enclaves: Callable[..., Enclave]) -> None:
    """As on most machines outside AWS: what was missing there before is still what is said."""
    machine = enclaves(nitrotpm=True, faults=["tpm-other-vendor"])
    run = machine.attestor("attest", "document")
    assert run.status == 3
    assert "no Nitro Secure Module: open: ENOENT" in run.error
    assert "/dev/tpmrm0 is a TPM of 'SW   TPM'" in run.error
    run = machine.attestor("attest", "--source", "nitrotpm", "document")
    assert run.status == 3
    assert "no NitroTPM: open: ENODEV" in run.error


@pytest.mark.parametrize("fault", ["tpm-no-room", "tpm-no-nsm", "nsm-internal-error"])
def test_a_tpm_that_refuses(enclaves: Callable[..., Enclave], fault: str) -> None:
    machine = enclaves(nitrotpm=True, faults=[fault])
    machine.place(machine.encrypt())
    run = machine.decrypt()
    assert run.status == 3
    assert run.error.startswith("the NitroTPM refused: ")
    assert machine.files() == {"blob"}


@pytest.mark.parametrize("fault", ["silent-module", "silent-attestation"])
def test_a_silent_tpm_is_waited_for_as_long_as_told(
    enclaves: Callable[..., Enclave], fault: str
) -> None:
    machine = enclaves(nitrotpm=True, faults=[fault])
    machine.place(machine.encrypt())
    began = time.monotonic()
    run = machine.decrypt("--timeout", "2")
    assert (run.status, run.error) == (3, "the NitroTPM does not answer within 2 seconds")
    doctor = machine.attestor("doctor", "--timeout", "2", "blob")
    assert doctor.status == 3, doctor.out
    assert b"Nitro Secure Module" not in doctor.out
    assert time.monotonic() - began < 60


# ---- runs that are killed


KILLED: Final = """
import os, random, signal, sys, time
import nsm, nsm.tpm
chance = random.Random(1)
for _ in range(int(sys.argv[1])):
    child = os.fork()
    if child == 0:
        with nsm.Nsm() as module:
            while True:
                module.attest(public_key=bytes(294))
    time.sleep(0.005 + chance.random() * 0.03)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_no_index_remains_after_runs_that_were_killed(instance: Enclave) -> None:
    """Somewhere in their loops: each cleans up behind those before, and the next run behind all."""
    count = 1000 if os.environ.get("ATTESTOR_EXHAUSTIVE") == "1" else 100
    assert instance.run(sys.executable, "-c", KILLED, str(count)) == DONE
    assert len(indexes(instance)) <= len(INDEXES)
    assert instance.attestor("attest", "document") == DONE
    assert indexes(instance) == []


# ---- nitrosim


def nitrosim(*arguments: str) -> Run:
    done = subprocess.run(
        [sys.executable, "-m", "nitrosim.cli", "run", *arguments],
        capture_output=True,
        check=False,
        timeout=120,
    )
    return Run(done.returncode, done.stdout, done.stderr.decode())


def test_nitrosim_runs_a_command_in_an_instance() -> None:
    pcr = f"12={OTHER.hex()}"
    command = (sys.executable, "-m", "attestor", "describe", "--json")
    run = nitrosim("--nitrotpm", "--tpm-pcr", pcr, "--", *command)
    assert run.status == 0, run.err
    assert json.loads(run.out)["nitrotpm_pcrs"]["12"]["value"] == OTHER.hex()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tpm-pcr", f"4={OTHER.hex()}"], "--tpm-pcr needs --nitrotpm"),
        (["--nitrotpm", "--pcr", f"4={OTHER.hex()}"], "--pcr is of an enclave"),
        (["--nitrotpm", "--debug-mode"], "--debug-mode is of an enclave"),
        (["--nitrotpm", "--tpm-pcr", f"24={OTHER.hex()}"], "the last is 23"),
        (["--nitrotpm", "--tpm-pcr", "4=00"], "48 bytes"),
        (["--nitrotpm", "--tpm-pcr", "4"], "--tpm-pcr wants N=HEX"),
        (["--fault", "tpm-busy"], "no fault of the NSM"),
    ],
)
def test_worlds_that_cannot_be(options: list[str], said: str) -> None:
    run = nitrosim(*options, "--", "true")
    assert run.status == 2
    assert said in run.err


def test_the_device_is_a_character_device_and_no_nsm_is_there(instance: Enclave) -> None:
    program = """
import os, stat
status = os.stat("/dev/tpmrm0")
fd = os.open("/dev/tpmrm0", os.O_RDWR)
print(stat.S_ISCHR(status.st_mode), stat.S_ISCHR(os.fstat(fd).st_mode))
print(os.access("/dev/tpm0", os.W_OK))
print(os.path.exists("/dev/nsm"))
"""
    run = instance.run(sys.executable, "-c", program)
    assert run == Run(0, b"True True\nTrue\nFalse\n", "")
