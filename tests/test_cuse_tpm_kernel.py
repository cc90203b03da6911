"""The software TPM as a device of a real kernel: /dev/cuse, as root, in a virtual machine."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from nitrosim.tpm import DEFAULT_PCRS
from nitrosim.world import World
from nsm.document import Expectations, verify
from tests.conftest import Enclave

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.vm

DEVICE: Final = Path("/dev/tpmrm0")
GET_RANDOM: Final = struct.pack(">HIIH", 0x8001, 12, 0x17B, 8)


@pytest.fixture
def world() -> Iterator[World]:
    with World(nitrotpm=True, device=DEVICE) as made:
        yield made


def test_a_secret_and_a_document_through_the_kernel(world: World, tmp_path: Path) -> None:
    assert stat.S_ISCHR(DEVICE.stat().st_mode)
    instance = Enclave(world, tmp_path)
    assert "LD_PRELOAD" not in instance.environment
    instance.place(instance.encrypt(b"the secret"))
    for command in ("decrypt --any-key blob out", "attest --source nitrotpm --nonce 00ff document"):
        run = instance.attestor(*command.split())
        assert (run.status, run.err) == (0, ""), command
    assert (tmp_path / "out").read_bytes() == b"the secret"
    root = hashlib.sha256(Path(instance.environment["NITROSIM_NSM_ROOT"]).read_bytes()).digest()
    expect = Expectations(source="nitrotpm", nitrotpm_pcrs={4: DEFAULT_PCRS[4]}, nonce=b"\0\xff")
    verify((tmp_path / "document").read_bytes(), roots=[root], at=None, expect=expect)


def test_reads_and_writes_as_the_driver_of_a_tpm_takes_them(world: World) -> None:
    """A command is one write; its response is read in parts, and belongs to the open file."""
    first, second = (os.open(DEVICE, os.O_RDWR) for _ in range(2))
    try:
        assert os.write(first, GET_RANDOM) == len(GET_RANDOM)
        with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
            os.write(first, GET_RANDOM)
        assert os.read(second, 4096) == b""
        head, rest = os.read(first, 10), os.read(first, 4096)
        assert struct.unpack(">HII", head) == (0x8001, 20, 0)
        assert rest[:2] == b"\0\x08"
        assert (len(rest), os.read(first, 4096)) == (10, b"")
        for command, number in ((b"\x80\x01", errno.EINVAL), (bytes(4097), errno.E2BIG)):
            with pytest.raises(OSError, match=os.strerror(number)):
                os.write(second, command)
    finally:
        os.close(first)
        os.close(second)
