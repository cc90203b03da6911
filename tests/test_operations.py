"""The other four operations with a Recipient: what they write, and what they refuse."""

from __future__ import annotations

import re
import stat
import sys
from typing import TYPE_CHECKING, Final

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.conftest import ROOT, Run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Enclave

DONE: Final = Run(0, b"", "")


def arn(enclave: Enclave) -> str:
    return enclave.world.kms.key_arn


def read(enclave: Enclave, name: str) -> bytes:
    return (enclave.folder / name).read_bytes()


def private(path: Path) -> bool:
    return stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("options", "size"),
    [(["--spec", "AES_256"], 32), (["--spec", "AES_128"], 16), (["--bytes", "77"], 77)],
)
def test_a_data_key_and_its_wrapped_form(enclave: Enclave, options: list[str], size: int) -> None:
    key_id = ["--key-id", arn(enclave), "--context", "node=3"]
    assert enclave.attestor("generate-data-key", *key_id, *options, "key", "blob") == DONE
    assert len(read(enclave, "key")) == size
    assert private(enclave.folder / "key")
    assert enclave.attestor("decrypt", *key_id, "blob", "out") == DONE
    assert read(enclave, "out") == read(enclave, "key")


@pytest.mark.parametrize("form", ["pem", "der"])
def test_a_key_pair(enclave: Enclave, form: str) -> None:
    command = [
        "generate-data-key-pair",
        "--key-id",
        arn(enclave),
        "--spec",
        "ECC_NIST_P256",
        "--format",
        form,
    ]
    assert enclave.attestor(*command, "key", "pub", "blob") == DONE
    if form == "pem":
        key = serialization.load_pem_private_key(read(enclave, "key"), None)
        public = serialization.load_pem_public_key(read(enclave, "pub"))
    else:
        key = serialization.load_der_private_key(read(enclave, "key"), None)
        public = serialization.load_der_public_key(read(enclave, "pub"))
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.public_key() == public
    assert enclave.attestor("decrypt", "--key-id", arn(enclave), "blob", "out") == DONE
    opened = serialization.load_der_private_key(read(enclave, "out"), None)
    assert isinstance(opened, ec.EllipticCurvePrivateKey)
    assert opened.private_numbers() == key.private_numbers()
    assert private(enclave.folder / "key")


def test_an_rsa_pair_in_pem_has_short_lines(enclave: Enclave) -> None:
    command = ["generate-data-key-pair", "--key-id", arn(enclave), "--spec", "RSA_4096"]
    assert enclave.attestor(*command, "key", "pub", "blob") == DONE
    assert max(map(len, read(enclave, "key").splitlines())) == 64
    assert isinstance(
        serialization.load_pem_private_key(read(enclave, "key"), None), rsa.RSAPrivateKey
    )


@pytest.mark.parametrize("size", [1, 1024])
def test_random_bytes(enclave: Enclave, size: int) -> None:
    assert enclave.attestor("generate-random", str(size), "out") == DONE
    assert len(read(enclave, "out")) == size
    run = enclave.attestor("generate-random", str(size), "-")
    assert (run.status, len(run.out), run.err) == (0, size, "")


@pytest.mark.parametrize("encoding", [serialization.Encoding.PEM, serialization.Encoding.DER])
def test_a_shared_secret(enclave: Enclave, encoding: serialization.Encoding) -> None:
    made = enclave.kms.create_key(KeySpec="ECC_NIST_P256", KeyUsage="KEY_AGREEMENT")
    key = made["KeyMetadata"]["Arn"]
    peer = ec.generate_private_key(ec.SECP256R1())
    enclave.place(
        peer.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo),
        "peer",
    )
    assert enclave.attestor("derive-shared-secret", "--key-id", key, "peer", "out") == DONE
    theirs = serialization.load_der_public_key(enclave.kms.get_public_key(KeyId=key)["PublicKey"])
    assert isinstance(theirs, ec.EllipticCurvePublicKey)
    assert read(enclave, "out") == peer.exchange(ec.ECDH(), theirs)


def test_the_commands_in_the_documents(enclave: Enclave) -> None:
    (script,) = re.findall(
        r"```sh\n(attestor generate-data-key .*?)```",
        (ROOT / "docs" / "commands.md").read_text("utf-8"),
        re.DOTALL,
    )
    made = enclave.kms.create_key(KeySpec="ECC_NIST_P384", KeyUsage="KEY_AGREEMENT")
    agreement = made["KeyMetadata"]["Arn"]
    peer = ec.generate_private_key(ec.SECP384R1()).public_key()
    spki = peer.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    enclave.place(spki, "peer.pub")
    prelude = f'set -e\nattestor() {{ {sys.executable} -m attestor "$@"; }}\n'
    keys: dict[str, str | None] = {"KEY": arn(enclave), "AGREEMENT_KEY": agreement}
    assert enclave.run("sh", "-c", prelude + script, environment=keys) == DONE
    sizes = {name: len(read(enclave, name)) for name in ("data.key", "seed", "shared")}
    assert sizes == {"data.key": 32, "seed": 32, "shared": 48}
    assert {"data.key.enc", "tls.key", "tls.pub", "tls.key.enc"} <= enclave.files()


def test_an_alias_warns(enclave: Enclave) -> None:
    command = ["generate-data-key", "--key-id", "alias/nitrosim", "--spec", "AES_256"]
    run = enclave.attestor(*command, "key", "blob")
    assert run.status == 0
    assert run.err.startswith("attestor: warning: alias/nitrosim pins no key")


@pytest.mark.parametrize(
    ("command", "part"),
    [
        (["generate-data-key", "--spec", "AES_256", "a", "b"], "no key"),
        (["generate-data-key", "--any-key", "--key-id", "alias/x", "a", "b"],
         "either --spec or --bytes"),
        (["generate-data-key", "--key-id", "alias/x", "--spec", "AES_256", "--bytes", "3",
          "a", "b"], "either"),
        (["generate-data-key", "--key-id", "alias/x", "--spec", "DES", "a", "b"],
         "none of AES_256"),
        (["generate-data-key", "--key-id", "alias/x", "--bytes", "1025", "a", "b"], "1025"),
        (["generate-data-key", "--any-key", "--key-id", "alias/x", "--bytes", "9", "a", "./a"],
         "file of its own"),
        (["generate-data-key-pair", "--key-id", "alias/x", "--spec", "DSA", "a", "b", "c"],
         "none of RSA_2048"),
        (["generate-data-key-pair", "--key-id", "alias/x", "a", "b", "c"],
         "missing option '--spec'"),
        (["generate-random", "0", "a"], "0"),
        (["generate-random", "1025", "a"], "1025"),
        (["derive-shared-secret", "--key-id", "alias/x", "absent", "a"], "cannot be read"),
        (["derive-shared-secret", "--key-id", "alias/x", "junk", "a"], "no SubjectPublicKeyInfo"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(enclave: Enclave, command: list[str], part: str) -> None:
    enclave.place(b"-----BEGIN PUBLIC KEY-----\n*\n-----END PUBLIC KEY-----\n", "junk")
    run = enclave.attestor(*command)
    assert run.status == 2, run.err
    assert part in run.error
    assert enclave.files() == {"junk"}


def test_all_files_or_none(enclave: Enclave) -> None:
    enclave.place(b"mine", "pub")
    command = [
        "generate-data-key-pair",
        "--key-id",
        arn(enclave),
        "--spec",
        "ECC_NIST_P256",
        "key",
        "pub",
        "blob",
    ]
    run = enclave.attestor(*command)
    assert (run.status, run.error) == (7, "pub exists")
    assert enclave.files() == {"pub"}
    assert enclave.attestor(*command, "--force") == DONE
    assert enclave.files() == {"key", "pub", "blob"}


@pytest.mark.parametrize(
    "fault", ["no-envelope", "plaintext-beside", "wrong-key-id", "other-public-key"]
)
def test_no_answer_falls_back(enclaves: Callable[..., Enclave], fault: str) -> None:
    enclave = enclaves(faults=[fault])
    run = enclave.attestor(
        "generate-data-key", "--key-id", arn(enclave), "--spec", "AES_256", "key", "blob"
    )
    assert run.status == 6, run.err
    assert enclave.files() == set()


def test_a_refusal_of_kms(enclaves: Callable[..., Enclave]) -> None:
    enclave = enclaves(debug=True)
    run = enclave.attestor(
        "generate-data-key", "--key-id", arn(enclave), "--spec", "AES_256", "key", "blob"
    )
    assert run.status == 4
    assert "refused to generate data key: AccessDeniedException" in run.error
    assert enclave.files() == set()
