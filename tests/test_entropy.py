"""The random pool: mixed before the key is made, credited only where nothing else could be."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import nsm.entropy
from nsm.entropy import RNDADDENTROPY, mix_into_kernel

if TYPE_CHECKING:
    import pytest

    from tests.conftest import Enclave

RANDOMNESS: Final = bytes(range(256))


class Pool:
    """A file in the place of /dev/random, and what ioctl is called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.file = folder / "random"
        self.file.touch()
        self.credits: list[tuple[int, Any]] = []
        monkeypatch.setattr(nsm.entropy, "RANDOM", str(self.file))
        monkeypatch.setattr(
            fcntl, "ioctl", lambda _, command, argument: self.credits.append((command, argument))
        )


def blocking(*_: object) -> NoReturn:
    raise BlockingIOError


def test_an_initialised_pool_is_mixed_and_not_credited(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pool = Pool(monkeypatch, tmp_path)
    assert mix_into_kernel(RANDOMNESS) is False
    assert pool.file.read_bytes() == RANDOMNESS
    assert pool.credits == []


def test_a_pool_that_is_not_initialised_is_credited(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pool = Pool(monkeypatch, tmp_path)
    monkeypatch.setattr(os, "getrandom", blocking)
    assert mix_into_kernel(RANDOMNESS) is True
    # struct rand_pool_info of linux/random.h: entropy in bits, size in bytes, the bytes
    assert pool.credits == [(RNDADDENTROPY, struct.pack("ii", 2048, 256) + RANDOMNESS)]


def test_a_missing_node_or_privilege_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Pool(monkeypatch, tmp_path)
    monkeypatch.setattr(os, "getrandom", blocking)

    def not_permitted(*_: object) -> NoReturn:
        raise PermissionError

    monkeypatch.setattr(fcntl, "ioctl", not_permitted)
    assert mix_into_kernel(RANDOMNESS) is False
    monkeypatch.setattr(nsm.entropy, "RANDOM", str(tmp_path / "absent"))
    assert mix_into_kernel(RANDOMNESS) is False


def test_the_real_pool_takes_it() -> None:
    assert Path("/dev/random").is_char_device()
    assert mix_into_kernel(RANDOMNESS) is False


def test_the_modules_randomness_is_mixed_before_the_key_is_made(enclave: Enclave) -> None:
    program = """
import attestor, nsm, nsm.entropy
from cryptography.hazmat.primitives.asymmetric import rsa
def note(owner, name):
    original = getattr(owner, name)
    def noted(*a, **k):
        result = original(*a, **k)
        print(name, len(a[0]) if name == "mix_into_kernel" else "")
        return result
    setattr(owner, name, noted)
note(nsm.Nsm, "random")
note(nsm.entropy, "mix_into_kernel")
note(rsa, "generate_private_key")
note(nsm.Nsm, "attest")
attestor.Recipient().document()
"""
    run = enclave.run(sys.executable, "-c", program)
    assert run.out.split() == [
        b"random",
        b"mix_into_kernel",
        b"256",
        b"generate_private_key",
        b"attest",
    ]
