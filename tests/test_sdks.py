"""AWS's SDKs for Go and for JavaScript against `attestor serve`, unmodified but for variables.

`make sdk-test` runs them: they need go, node and npm, and modules that these fetch by the hashes in
tests/sdks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any, Final

import pytest

from nsm.library import IN_PACKAGE
from tests.conftest import ROOT, Enclave
from tests.serving import DEVICE, Served

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.sdks
SOURCES: Final = ROOT / "tests" / "sdks"
BUILT: Final = ROOT / ".cache" / "sdks"


@pytest.fixture(scope="module", params=["go", "javascript"])
def program(request: pytest.FixtureRequest) -> list[str]:
    """The command of a program with an SDK in it, built if need be."""
    BUILT.mkdir(parents=True, exist_ok=True)
    for path in SOURCES.iterdir():
        shutil.copy(path, BUILT)
    if request.param == "go":
        build("go", "build", "-o", "calls", ".")
        return [str(BUILT / "calls")]
    build("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
    return ["node", str(BUILT / "calls.mjs")]


def build(*command: str) -> None:
    done = subprocess.run(command, cwd=BUILT, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def call(program: list[str], served: Served, *arguments: str) -> dict[str, Any]:
    """Run it with the variables that docs/serve.md names, and nothing of the enclave's."""
    environment = {
        "HOME": str(served.folder),
        "PATH": os.environ["PATH"],
        "AWS_ENDPOINT_URL_KMS": served.url,
        "AWS_SHARED_CREDENTIALS_FILE": str(served.credentials_file),
        "AWS_REGION": "eu-west-1",
    }
    done = subprocess.run(
        [*program, *arguments],
        cwd=served.folder,
        env=environment,
        capture_output=True,
        check=False,
        timeout=120,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@pytest.mark.parametrize("transport", ["library", "device"])
def test_an_sdk_gets_attested_answers(
    enclave: Enclave, program: list[str], transport: str, tmp_path: Path
) -> None:
    """It decrypts, gets a data key, and sees KMS's AccessDenied with the id of its request."""
    if transport == "library":
        assert IN_PACKAGE.exists(), "make libnsm builds it"
    key = enclave.world.kms.key_arn
    policy = json.loads(enclave.kms.get_key_policy(KeyId=key, PolicyName="default")["Policy"])
    del policy["Statement"][2]
    denied = enclave.kms.create_key(Policy=json.dumps(policy))["KeyMetadata"]["Arn"]
    enclave.place(enclave.encrypt(b"the secret", node="3"))
    keys = ["--key-id", key, "--key-id", denied]
    seam = DEVICE if transport == "device" else ""
    with Served(enclave, *keys, "--require-context", "node=3", "-v", seam=seam) as served:
        said = call(program, served, key, denied)
        run = served.end()
    assert bytes.fromhex(said["plaintext"]) == b"the secret"
    assert said["key"] == said["again"]
    assert len(said["key"]) == 64
    assert (said["code"], said["status"]) == ("AccessDeniedException", 400)
    assert re.fullmatch(r"[0-9a-f-]{36}", said["id"])
    assert f"through {IN_PACKAGE if transport == 'library' else '/dev/nsm'}" in run.err
