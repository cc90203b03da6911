"""Versions: an authentic ciphertext that is too old is refused, in whichever form it comes."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import pytest

from attestor_commands.versions import VERSION_MAX, fault_of
from tests.conftest import Run

if TYPE_CHECKING:
    from tests.conftest import Enclave

DONE: Final = Run(0, b"", "")


class Vault:
    """An operator's commands, and a manifest with one secret."""

    def __init__(self, enclave: Enclave) -> None:
        self.enclave, self._folder = enclave, enclave.folder
        self.attestor = enclave.attestor

    def encrypt(self, *options: str) -> Run:
        """Encrypt "the secret" to the file "source"."""
        self.enclave.place(b"the secret", "plain")
        key = ["--key-id", self.enclave.world.kms.key_arn, "--context", "node=3"]
        return self.attestor("encrypt", *key, *options, "-f", "plain", "source")

    def inject(self, lines: str, *options: str) -> Run:
        """Inject "source" to "target", which is removed again where it was placed."""
        text = (
            f'region = "eu-west-1"\nkey_id = "{self.enclave.world.kms.key_arn}"\n'
            '[variables]\nVERSION = ".*"\n[[secret]]\n'
            f'source = "{self._folder}/source"\ntarget = "{self._folder}/target"\n{lines}\n'
        )
        self.enclave.place(text.encode(), "m.toml")
        run = self.attestor("inject", *options, "m.toml")
        assert (self._folder / "target").exists() == (run.status == 0)
        (self._folder / "target").unlink(missing_ok=True)
        return run


@pytest.fixture
def vault(enclave: Enclave) -> Vault:
    """Nothing in it yet."""
    return Vault(enclave)


CLAIMED: Final = 'context = { node = "3", version = "${VERSION}" }\nminimum_version = 5'
CARRIED: Final = 'context = { node = "3" }\nminimum_version = 5'


@pytest.mark.parametrize("form", ["kms", "esdk"])
def test_a_version_that_the_parent_claims_is_proved_by_kms(vault: Vault, form: str) -> None:
    assert vault.encrypt("--format", form, "--version", "7") == DONE
    assert vault.inject(CLAIMED, "--set", "VERSION=7") == DONE
    run = vault.inject(CLAIMED, "--set", "VERSION=6")  # new enough, but not what is in it
    assert run.status == (4 if form == "kms" else 6), run.err
    assert vault.encrypt("--format", form, "--version", "4") == DONE
    run = vault.inject(CLAIMED, "--set", "VERSION=4")
    assert run.status == 4, run.err
    assert run.error == "secret 1 has version 4, which is too old: minimum_version is 5"
    run = vault.inject(CLAIMED, "--set", "VERSION=5")
    assert run.status == (4 if form == "kms" else 6), run.err


@pytest.mark.parametrize("version", ["", "0", "-7", "+7", "07", " 7", "7 ", "7.0", "\u0667", "x",
                                     str(VERSION_MAX + 1), "9" * 5000])  # fmt: skip
def test_what_is_no_version(vault: Vault, version: str) -> None:
    assert fault_of(version, 1)
    run = vault.encrypt(f"--version={version}")
    assert (run.status, run.error) == (2, f"--version wants a number from 1 to {VERSION_MAX}")
    if len(version) < 1000:  # longer values of variables are refused as such
        run = vault.inject(CLAIMED, "--set", f"VERSION={version}")
        assert run.status == 4, run.err
        assert f"secret 1 has a version that is no number from 1 to {VERSION_MAX}" in run.error


@pytest.mark.parametrize(("version", "status"), [("4", 6), ("5", 0), (str(VERSION_MAX), 0)])
def test_a_message_carries_its_version(vault: Vault, version: str, status: int) -> None:
    assert vault.encrypt("--format", "esdk", "--version", version) == DONE
    run = vault.inject(CARRIED)
    assert run.status == status, run.err
    if status:
        told = "has version 4, which is too old: minimum_version is 5"
        assert run.error.endswith(f": message of the AWS Encryption SDK {told}")
    assert vault.inject(CARRIED.replace("5", "1")) == DONE


@pytest.mark.parametrize("context", [(), ("--context", "version=v7"), ("--context", "Version=7")])
def test_a_message_without_a_version(vault: Vault, context: tuple[str, ...]) -> None:
    assert vault.encrypt("--format", "esdk", *context) == DONE
    run = vault.inject(f"{CARRIED}\ncontext_contains = true")
    assert run.status == 6, run.err
    assert " version" in run.error
    assert "minimum_version is 5" in run.error


def test_a_blob_does_not_say_its_version(vault: Vault) -> None:
    """The parent that serves a blob in the place of a message gains nothing."""
    assert vault.encrypt("--version", "7") == DONE
    run = vault.inject(CARRIED)
    assert run.status == 4, run.err
    assert run.error.endswith("a CiphertextBlob does not say its version, and minimum_version is 5")
    assert 'version = "${VERSION}"' in run.err


def test_only_the_version_is_let_in_beside_the_context(vault: Vault) -> None:
    assert vault.encrypt("--format", "esdk", "--version", "7", "--context", "stage=x") == DONE
    run = vault.inject(CARRIED)
    assert run.status == 6, run.err
    assert "another context: stage differs" in run.error
    assert vault.encrypt("--format", "esdk", "--version", "7") == DONE
    run = vault.inject(CARRIED.replace("minimum_version = 5", ""))
    assert run.status == 6, run.err
    assert "another context: version differs" in run.error
    run = vault.inject(CARRIED.replace('node = "3"', 'node = "4"'))
    assert run.status == 6, run.err


def test_a_forged_version_in_a_header(vault: Vault) -> None:
    """It passes the comparison, and KMS does not open the data key."""
    assert vault.encrypt("--format", "esdk", "--version", "4") == DONE
    source = vault.enclave.folder / "source"
    data = source.read_bytes()
    old, new = (struct.pack(">H7sH1s", 7, b"version", 1, one) for one in (b"4", b"9"))
    assert data.count(old) == 1
    source.write_bytes(data.replace(old, new))
    run = vault.inject(CARRIED)
    assert run.status == 4, run.err
    assert "InvalidCiphertextException" in run.error


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        ("minimum_version = 0", "minimum_version must be a number from 1"),
        ('minimum_version = "5"', "minimum_version must be a number from 1"),
        ('minimum_version = 5\nform = "blob"', "minimum_version needs a version in context"),
        (
            'minimum_version = 5\nalgorithm = "RSAES_OAEP_SHA_256"',
            "minimum_version is of a context",
        ),
    ],
)
def test_manifests_that_cannot_be(vault: Vault, lines: str, part: str) -> None:
    run = vault.inject(f"unbound = true\n{lines}")
    assert run.status == 2, run.err
    assert part in run.error


def test_the_option_and_the_version_of_attestor(vault: Vault) -> None:
    """`attestor --version` stays what it is; behind encrypt it is the secret's."""
    assert vault.attestor("--version").out.startswith(b"attestor ")
    assert vault.attestor("--version", "encrypt").out.startswith(b"attestor ")
    run = vault.encrypt("--version", "3", "--context", "version=3")
    assert run.status == 2
    assert "--version contradicts --context version=..." in run.error
    run = vault.attestor("encrypt", "--algorithm", "RSAES_OAEP_SHA_256", "--public-key", "plain",
                         "--version", "3", "plain", "x")  # fmt: skip
    assert run.status == 2
    assert "takes no encryption context" in run.error


def test_what_encrypt_writes(vault: Vault) -> None:
    assert vault.encrypt("--version", "12") == DONE
    key = ["--key-id", vault.enclave.world.kms.key_arn, "--context", "node=3"]
    for context, status in (("version=12", 0), ("version=11", 4)):
        run = vault.attestor("decrypt", *key, "--context", context, "-f", "source", "out")
        assert run.status == status, run.err
