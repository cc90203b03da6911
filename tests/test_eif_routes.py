"""The guide's routes, from an image file to a key policy and what KMS decides under it: a rehearsal
of decrypting, with the simulators for hardware and KMS, and without `nitro-cli`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

import pytest

from attestor_eif import Kind
from tests.eif_images import PARTS, assembled, signed, signer
from tests.test_evidence import command
from tests.test_policy_commands import ADMIN, ROLE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Enclave

SECRET: Final = b"what the enclave alone may read"
OURS: Final = assembled(PARTS)
ANOTHER: Final = assembled([*PARTS, (Kind.RAMDISK, b"another application")])
PROVIDERS: Final = signed(OURS, signer("P-384"))
SOMEBODYS: Final = signed(OURS, signer("P-521"))

# the file that the policy is rendered from, its PCRs that are asked for, which images are let in,
# and which are not
ROUTES: Final = {
    "A, a provider's certificate": (
        PROVIDERS,
        "8",
        [signed(ANOTHER, signer("P-384"))],
        [SOMEBODYS, OURS],
    ),
    "B, one image": (OURS, "0", [OURS, PROVIDERS], [ANOTHER]),
    "B, its kernel and application": (OURS, "1,2", [OURS, SOMEBODYS], [ANOTHER]),
}


@pytest.mark.parametrize("route", ROUTES)
def test_from_a_file_to_allowed_and_refused_decrypts(
    enclaves: Callable[..., Enclave], tmp_path: Path, route: str
) -> None:
    data, take, allowed, refused = ROUTES[route]
    (tmp_path / "app.eif").write_bytes(data)
    taken = [word for index in take.split(",") for word in ("--take", index)]
    people = ("--principal", ROLE, "--admin", ADMIN)
    rendered = command("policy", "render", *people, "--eif", str(tmp_path / "app.eif"), *taken)
    assert rendered.status == 0, rendered.err
    policy = tmp_path / "policy.json"
    policy.write_bytes(rendered.out)
    checked = command("policy", "check", str(policy))
    assert checked.status == 0, checked.err
    for image, status in [*((one, 0) for one in allowed), *((one, 4) for one in refused)]:
        run = decrypted(enclaves, tmp_path / "image.eif", image, policy)
        assert run == (status, SECRET if status == 0 else None)


def decrypted(
    enclaves: Callable[..., Enclave], path: Path, image: bytes, policy: Path
) -> tuple[int, bytes | None]:
    """The exit status of `decrypt` in the enclave of this image, and what it wrote."""
    path.write_bytes(image)
    described = command("eif", "describe", "--json", str(path))
    assert described.status == 0, described.err
    measured = json.loads(described.out)["Measurements"]
    pcrs = {index: bytes.fromhex(measured.get(f"PCR{index}", "00" * 48)) for index in (0, 1, 2, 8)}
    enclave = enclaves(pcrs=pcrs)
    enclave.place(enclave.encrypt(SECRET))
    enclave.kms.put_key_policy(
        KeyId=enclave.world.kms.key_arn, PolicyName="default", Policy=policy.read_text()
    )
    run = enclave.attestor("decrypt", "--any-key", "--force", "blob", "out")
    output = enclave.folder / "out"
    try:
        return run.status, output.read_bytes() if output.exists() else None
    finally:
        output.unlink(missing_ok=True)
