"""`attestor decrypt` where everything is as it should be, and what it says when somebody asks."""

from __future__ import annotations

import base64
import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from nitrosim.envelope import FORMS
from tests.conftest import Run

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Enclave

SILENT_SUCCESS = Run(0, b"", "")


def test_the_secret_lands_in_a_private_file_and_nothing_is_said(enclave: Enclave) -> None:
    enclave.place(enclave.encrypt())
    command = (
        f"umask 000; exec {sys.executable} -m attestor "
        "decrypt --any-key --region eu-west-1 blob out"
    )
    assert enclave.run("sh", "-c", command) == SILENT_SUCCESS
    assert enclave.files() == {"blob", "out"}
    assert (enclave.folder / "out").read_bytes() == b"the secret"
    assert stat.S_IMODE((enclave.folder / "out").stat().st_mode) == 0o600


def test_a_umask_that_takes_everything_leaves_the_owner_his_file(enclave: Enclave) -> None:
    enclave.place(enclave.encrypt())
    assert (
        enclave.run(
            "sh", "-c", f"umask 777; exec {sys.executable} -m attestor decrypt --any-key blob out"
        ).status
        == 0
    )
    assert stat.S_IMODE((enclave.folder / "out").stat().st_mode) == 0o600


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 4096])
def test_every_form_of_envelope(enclaves: Callable[..., Enclave], form: str, length: int) -> None:
    enclave = enclaves(envelope=form)
    plaintext = os.urandom(length)
    enclave.place(enclave.encrypt(plaintext))
    assert enclave.decrypt() == SILENT_SUCCESS
    assert (enclave.folder / "out").read_bytes() == plaintext


def test_the_context_that_the_ciphertext_was_made_with(enclave: Enclave) -> None:
    enclave.place(enclave.encrypt(node="3", stage="a=b"))
    assert enclave.decrypt("--context", "stage=a=b", "--context", "node=3") == SILENT_SUCCESS


def test_a_key_pinned_by_arn_brings_its_region_and_needs_no_warning(enclave: Enclave) -> None:
    enclave.place(enclave.encrypt())
    arn = enclave.world.kms.key_arn
    nowhere = {"AWS_REGION": None, "AWS_DEFAULT_REGION": None}
    assert (
        enclave.attestor("decrypt", "--key-id", arn, "blob", "out", environment=nowhere)
        == SILENT_SUCCESS
    )
    assert (
        enclave.attestor("decrypt", "--key-id", arn.split("/")[1], "-f", "blob", "out")
        == SILENT_SUCCESS
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [((), "no key is pinned: "), (("--key-id", "alias/nitrosim"), "alias/nitrosim pins no key: ")],
)
def test_without_a_pinned_key_one_line_warns(
    enclave: Enclave, options: tuple[str, ...], said: str
) -> None:
    enclave.place(enclave.encrypt())
    run = enclave.attestor("decrypt", *options, "blob", "out")
    assert run.status == 0
    (line,) = run.err.splitlines()
    assert line.startswith(f"attestor: warning: {said}")


def test_an_alias_and_any_key_need_no_warning(enclave: Enclave) -> None:
    enclave.place(enclave.encrypt())
    assert enclave.decrypt("--key-id", "alias/nitrosim") == SILENT_SUCCESS


def test_base64_text_when_it_is_said(enclave: Enclave) -> None:
    enclave.place(base64.encodebytes(enclave.encrypt()))
    assert enclave.decrypt("--base64") == SILENT_SUCCESS
    assert (enclave.folder / "out").read_bytes() == b"the secret"


def test_standard_input_and_standard_output(enclave: Enclave) -> None:
    run = enclave.attestor("decrypt", "--any-key", "-", "-", stdin=enclave.encrypt())
    assert run == Run(0, b"the secret", "")
    assert enclave.files() == set()


def test_an_asymmetric_ciphertext(enclave: Enclave) -> None:
    kms = enclave.kms
    key_id = kms.create_key(KeySpec="RSA_2048", KeyUsage="ENCRYPT_DECRYPT")["KeyMetadata"]["KeyId"]
    algorithm = "RSAES_OAEP_SHA_256"
    answer = kms.encrypt(KeyId=key_id, Plaintext=b"the secret", EncryptionAlgorithm=algorithm)
    enclave.place(answer["CiphertextBlob"])
    run = enclave.attestor("decrypt", "--key-id", key_id, "--algorithm", algorithm, "blob", "out")
    assert run == SILENT_SUCCESS
    assert (enclave.folder / "out").read_bytes() == b"the secret"


def test_a_passing_fault_is_retried(enclaves: Callable[..., Enclave]) -> None:
    enclave = enclaves(faults=["throttle-once"])
    enclave.place(enclave.encrypt())
    assert enclave.decrypt() == SILENT_SUCCESS


def test_verbose_tells_what_is_done_and_no_secret(enclave: Enclave) -> None:
    enclave.place(enclave.encrypt(b"a rather unlikely secret"))
    run = enclave.decrypt("-v")
    assert run.status == 0
    assert run.out == b""
    assert all(line.startswith("attestor: note: ") for line in run.err.splitlines())
    assert "Nitro Secure Module through " in run.err
    assert "KMS answered request " in run.err
    credentials = enclave.world.kms.credentials
    for secret in ("a rather unlikely secret", credentials.secret_key, credentials.token):
        assert secret not in run.err


def test_a_grant_token_is_passed_on(enclave: Enclave) -> None:
    enclave.place(enclave.encrypt())
    assert enclave.decrypt("--grant-token", "a-token", "--grant-token", "another") == SILENT_SUCCESS


def test_the_checkout_runs_without_being_installed(enclave: Enclave) -> None:
    script = str(enclave.environment["PYTHONPATH"]) + "/attestor.py"
    enclave.place(enclave.encrypt())
    assert (
        enclave.run(sys.executable, script, "decrypt", "--any-key", "blob", "out") == SILENT_SUCCESS
    )


def test_a_terminal_is_refused_as_standard_output(enclave: Enclave) -> None:
    enclave.place(enclave.encrypt())
    leader, follower = os.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "attestor", "decrypt", "--any-key", "blob", "-"],
            cwd=enclave.folder, env=enclave.environment,
            stdout=follower, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    finally:
        os.close(follower)
        os.close(leader)
    assert done.returncode == 2
    assert b"terminal" in done.stderr
