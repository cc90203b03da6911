"""The software TPM as a device: the protocol, against a kernel of our own."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitrosim import cuse, cuse_tpm
from nitrosim.cli import _mapping
from nitrosim.cuse_tpm import TpmDialogue
from nitrosim.device import SimulatorError
from nitrosim.tpm import SoftwareTpm
from nitrosim.world import World
from nsm import Nsm
from nsm.document import Expectations, verify
from nsm.tpm import NitroTpm
from tests.test_cuse import message, opened
from tests.test_simulated_device import PKI

GET_RANDOM = struct.pack(">HIIH", 0x8001, 12, 0x17B, 8)


class File:
    """One open file of a device, as the kernel hands its calls on; a channel of a TPM."""

    name = "a device of the kernel's"

    def __init__(self, dialogue: TpmDialogue) -> None:
        self.dialogue = dialogue
        number, _, body = opened(dialogue.receive(message(cuse.OPEN, bytes(8))))
        assert number == 0
        self.handle: int = cuse.OPEN_OUT.unpack(body)[0]

    def call(self, opcode: int, data: bytes = b"", size: int | None = None) -> tuple[int, bytes]:
        length = len(data) if size is None else size
        body = cuse_tpm.TRANSFER_IN.pack(self.handle, 0, length, 0, 0, 0, 0) + data
        number, _, answer = opened(self.dialogue.receive(message(opcode, body)))
        return number, answer

    def write(self, command: bytes) -> int:
        number, body = self.call(cuse.WRITE, command)
        assert number or cuse_tpm.WRITE_OUT.unpack(body)[0] == len(command)
        return number

    def read(self, size: int = 4096) -> bytes:
        number, body = self.call(cuse.READ, size=size)
        assert number == 0
        return body

    def exchange(self, command: bytes) -> bytes:
        number = self.write(command)
        if number:
            raise OSError(number, os.strerror(number))
        return self.read()

    def close(self) -> None:
        body = cuse_tpm.HANDLE_IN.pack(self.handle) + bytes(16)
        assert opened(self.dialogue.receive(message(cuse.RELEASE, body)))[0] == 0


@pytest.fixture
def dialogue() -> TpmDialogue:
    return TpmDialogue(SoftwareTpm(PKI), "tpmrm0")


def test_a_document_through_the_device(dialogue: TpmDialogue) -> None:
    with Nsm(NitroTpm(File(dialogue))) as module:
        document = module.attest(public_key=b"k" * 294)
    expect = Expectations(source="nitrotpm", public_key=b"k" * 294)
    verify(document, roots=[PKI.root_sha256], at=None, expect=expect)
    assert not dialogue.open_files


def test_a_response_is_read_in_pieces_and_once(dialogue: TpmDialogue) -> None:
    file = File(dialogue)
    assert file.read() == b""
    assert file.write(GET_RANDOM) == 0
    whole = file.read(7) + file.read(1) + file.read()
    assert len(whole) == 20
    assert file.read() == b""


def test_open_files_have_responses_of_their_own(dialogue: TpmDialogue) -> None:
    first, second = File(dialogue), File(dialogue)
    assert first.write(GET_RANDOM) == 0
    assert second.write(GET_RANDOM) == 0
    assert first.read() != second.read()


def test_what_the_driver_refuses(dialogue: TpmDialogue) -> None:
    file = File(dialogue)
    assert file.write(bytes(4097)) == errno.E2BIG
    assert file.write(b"") == file.write(GET_RANDOM[:5]) == errno.EINVAL
    assert file.write(GET_RANDOM[:-1]) == errno.EINVAL  # shorter than it says
    assert file.write(GET_RANDOM + b"more") == 0
    assert len(file.read()) == 20
    assert file.write(GET_RANDOM) == 0
    assert file.write(GET_RANDOM) == errno.EBUSY
    assert file.call(cuse.WRITE, GET_RANDOM, size=3)[0] == errno.EINVAL
    file.close()
    assert file.call(cuse.READ, size=1)[0] == errno.EBADF
    body = cuse.IOCTL_IN.pack(0, 2, 0x1234, 0, 0, 0)
    assert opened(dialogue.receive(message(cuse.IOCTL, body)))[0] == errno.ENOTTY


def test_who_waits_for_a_silent_tpm_sees_eio_in_the_end() -> None:
    dialogue = TpmDialogue(SoftwareTpm(PKI, fault="silent-module"), "tpmrm0")
    file = File(dialogue)
    body = cuse_tpm.TRANSFER_IN.pack(file.handle, 0, len(GET_RANDOM), 0, 0, 0, 0) + GET_RANDOM
    assert dialogue.receive(message(cuse.WRITE, body, unique=9)) is None
    assert [opened(answer)[:2] for answer in dialogue.hang_up()] == [(errno.EIO, 9)]


@given(
    st.sampled_from([cuse.OPEN, cuse.READ, cuse.WRITE, cuse.RELEASE, cuse.IOCTL]),
    st.binary(max_size=80),
)
def test_arbitrary_messages_are_answered(opcode: int, body: bytes) -> None:
    answer = TpmDialogue(SoftwareTpm(PKI), "tpmrm0").receive(message(opcode, body))
    assert opened(answer)[0] >= 0


def test_a_world_with_a_device_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cuse, "CHANNEL", tmp_path / "cuse")
    world = World(nitrotpm=True, device=Path("/dev/nitrosim-test"))
    with pytest.raises(SimulatorError, match="modprobe cuse"), world:
        pytest.fail("there is no CUSE")


@pytest.mark.parametrize(
    ("device", "tpm", "mapped"),
    [
        ("/dev/tpmrm0", object(), "/dev/tpmrm0"),
        ("/dev/tpm1", object(), "/dev/tpm1:/dev/tpmrm0"),
        ("/dev/nsm", None, "/dev/nsm"),
        ("/dev/tpmrm0", None, "/dev/tpmrm0:/dev/nsm"),
    ],
)
def test_a_container_gets_the_device_by_its_usual_name(device: str, tpm: Any, mapped: str) -> None:
    assert _mapping(SimpleNamespace(device=Path(device), tpm=tpm)) == mapped
