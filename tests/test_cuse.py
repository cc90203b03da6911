"""The software NSM as a device: the protocol against a kernel of our own, the real one in a VM."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from nitrosim import cuse
from nitrosim.cli import _container, cli
from nitrosim.cuse import CuseDevice, Dialogue
from nitrosim.device import SilenceError, SimulatorError
from nitrosim.module import SoftwareNsm
from nsm.device import NSM_IOCTL_RAW
from tests.conftest import no_thread_stays
from tests.test_simulated_device import DESCRIBE_NSM, GOLDEN, PKI, Answers

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Enclave

U64: Final = 2**64 - 1
INIT_BODY: Final = cuse.INIT_IN.pack(7, 39, 0, 1)
INIT_ANSWER: Final = cuse.INIT_OUT.pack(7, 16, 0, 1, 8192, 8192, 0, 0) + b"DEVNAME=nsm\0"


class Silent(Answers):
    def answer(self, request: bytes) -> bytes:
        raise SilenceError(request)


class Broken(Answers):
    def answer(self, request: bytes) -> bytes:
        raise RuntimeError(request)


def message(opcode: int, body: bytes = b"", unique: int = 7) -> bytes:
    return (
        cuse.IN_HEADER.pack(
            cuse.IN_HEADER.size + len(body), opcode, unique, 0, 1000, 1000, 42, 0, 0
        )
        + body
    )


def ioctl_body(
    argument: int, data: bytes = b"", out_size: int = 0, command: int = NSM_IOCTL_RAW
) -> bytes:
    return cuse.IOCTL_IN.pack(0, 2, command, argument, len(data), out_size) + data


def opened(answer: bytes | None) -> tuple[int, int, bytes]:
    """A reply as (errno, unique, body); its length must be right."""
    assert answer is not None
    length, number, unique = cuse.OUT_HEADER.unpack_from(answer)
    assert length == len(answer)
    return -number, unique, answer[cuse.OUT_HEADER.size :]


class Kernel:
    """What fs/fuse/ioctl.c does with an ioctl, on a memory of its own: bytes by their addresses."""

    def __init__(self, dialogue: Dialogue, memory: dict[int, bytearray]) -> None:
        self.dialogue = dialogue
        self.memory = memory
        self.unique = 0

    def read(self, address: int, length: int) -> bytes:
        for start, piece in self.memory.items():
            if start <= address and address + length <= start + len(piece):
                return bytes(piece[address - start : address - start + length])
        raise OSError(errno.EFAULT, "no such address")

    def write(self, address: int, data: bytes) -> None:
        self.read(address, len(data))
        for start, piece in self.memory.items():
            if start <= address < start + len(piece):
                piece[address - start : address - start + len(data)] = data

    def send(self, opcode: int, body: bytes) -> tuple[int, bytes]:
        self.unique += 2
        number, unique, answer = opened(self.dialogue.receive(message(opcode, body, self.unique)))
        assert unique == self.unique
        assert not self.dialogue.unanswered
        return number, answer

    def ioctl(self, argument: int, command: int = NSM_IOCTL_RAW) -> int:
        """0, or an errno."""
        incoming: list[tuple[int, int]] = []
        outgoing: list[tuple[int, int]] = []
        try:
            for _ in range(3):
                data = b"".join(self.read(*piece) for piece in incoming)
                room = sum(length for _, length in outgoing)
                number, answer = self.send(cuse.IOCTL, ioctl_body(argument, data, room, command))
                if number:
                    return number
                result, flags, ins, outs = cuse.IOCTL_OUT.unpack_from(answer)
                content = answer[cuse.IOCTL_OUT.size :]
                if not flags & 4:
                    self.finish(outgoing, content)
                    return int(-result)
                pieces = [
                    cuse.IOVEC.unpack_from(content, 16 * index)
                    for index in range(len(content) // 16)
                ]
                assert len(pieces) == ins + outs <= 256
                incoming, outgoing = pieces[:ins], pieces[ins:]
        except OSError as error:
            return error.errno or 0
        raise AssertionError("the ioctl never ends")

    def finish(self, outgoing: list[tuple[int, int]], content: bytes) -> None:
        assert len(content) <= sum(length for _, length in outgoing)
        for address, length in outgoing:
            part, content = content[:length], content[length:]
            self.write(address, part)


RAW_AT, REQUEST_AT, RESPONSE_AT = 0x1000, 0x2000, 0x10000


def ask(
    module: Any,
    request: bytes = b"question",
    *,
    length: int | None = None,
    room: int = 12288,
    addresses: tuple[int, int] = (REQUEST_AT, RESPONSE_AT),
) -> tuple[int, int, bytes]:
    """One call as a program makes it: (errno, response.len afterwards, what the buffer holds)."""
    raw = cuse.NSM_RAW.pack(
        addresses[0], len(request) if length is None else length, addresses[1], room
    )
    memory = {
        RAW_AT: bytearray(raw),
        REQUEST_AT: bytearray(request),
        RESPONSE_AT: bytearray(b"\xee" * 12288),
    }
    number = Kernel(Dialogue(module, "nsm"), memory).ioctl(RAW_AT)
    returned = cuse.NSM_RAW.unpack(memory[RAW_AT])
    assert returned[:3] == cuse.NSM_RAW.unpack(raw)[:3]
    return number, returned[3], bytes(memory[RESPONSE_AT])


# The protocol


def test_sizes_are_the_kernels() -> None:
    structures = [cuse.IN_HEADER, cuse.OUT_HEADER, cuse.INIT_IN, cuse.INIT_OUT, cuse.OPEN_OUT]
    structures += [cuse.INTERRUPT_IN, cuse.IOCTL_IN, cuse.IOCTL_OUT, cuse.IOVEC, cuse.NSM_RAW]
    assert [structure.size for structure in structures] == [40, 16, 16, 72, 16, 8, 32, 16, 16, 32]


@pytest.mark.parametrize(("request_", "answer"), GOLDEN.values(), ids=GOLDEN)
def test_golden_bytes(request_: str, answer: str) -> None:
    expected = bytes.fromhex(answer)
    number, length, found = ask(SoftwareNsm(PKI), bytes.fromhex(request_))
    assert (number, length, found[:length]) == (0, len(expected), expected)
    assert set(found[length:]) == {0xEE}


@pytest.mark.parametrize("room", [0, 1, 5, 6, 7, 12288, 12289, 2**32, U64])
def test_an_answer_is_cut_to_the_callers_room(room: int) -> None:
    cut = b"answer"[:room]
    assert ask(Answers(), room=room) == (0, len(cut), cut.ljust(12288, b"\xee"))


def test_sizes_at_their_limits() -> None:
    module = Answers(b"\x11" * 12289)
    assert ask(module, bytes(4096)) == (0, 12288, b"\x11" * 12288)
    for length in (4097, 2**32, U64):
        assert ask(module, bytes(4096), length=length)[0] == errno.EMSGSIZE
    assert ask(module, b"x", length=0)[0] == errno.EINVAL
    assert [len(request) for request in module.requests] == [4096]


@pytest.mark.parametrize("bad", [0, 8, U64, U64 - 16, 1 << 63])
def test_bad_pointers(bad: int) -> None:
    module = Answers()
    assert ask(module, addresses=(bad, RESPONSE_AT))[0] == errno.EFAULT
    assert module.requests == []  # before it is asked
    assert ask(module, addresses=(REQUEST_AT, bad))[0] == errno.EFAULT
    assert Kernel(Dialogue(module, "nsm"), {}).ioctl(bad) == errno.EFAULT


def test_a_module_that_hangs_up() -> None:
    assert ask(Answers(b""))[0] == errno.EIO


@pytest.mark.parametrize("command", [0, 0xC0200A01, 0xC0100A00, 0x5401, 0xFFFFFFFF])
def test_another_command(command: int) -> None:
    assert (
        Kernel(Dialogue(Answers(), "nsm"), {RAW_AT: bytearray(32)}).ioctl(RAW_AT, command)
        == errno.EINVAL
    )


def test_memory_that_changes_between_the_messages() -> None:
    """What was copied counts, not what struct nsm_raw says the second time."""
    dialogue = Dialogue(Answers(b"answer"), "nsm")
    changed = cuse.NSM_RAW.pack(U64, U64, U64, U64)
    _, _, body = opened(
        dialogue.receive(message(cuse.IOCTL, ioctl_body(RAW_AT, changed + b"question", 32 + 3)))
    )
    assert body == bytes(16) + cuse.NSM_RAW.pack(U64, U64, U64, 3) + b"ans"


def test_the_first_message() -> None:
    dialogue = Dialogue(Answers(), "nsm")
    assert opened(dialogue.receive(message(cuse.CUSE_INIT, INIT_BODY))) == (0, 7, INIT_ANSWER)


@pytest.mark.parametrize("body", [(7, 15, 0, 1), (6, 39, 0, 1), (8, 0, 0, 1), (7, 39, 0, 0)])
def test_a_kernel_of_another_kind(body: tuple[int, ...]) -> None:
    answer = Dialogue(Answers(), "nsm").receive(message(cuse.CUSE_INIT, cuse.INIT_IN.pack(*body)))
    assert opened(answer) == (errno.EPROTO, 7, b"")


OTHERS: Final = {
    cuse.OPEN: (0, cuse.OPEN_OUT.pack(0, 1, 0)),
    cuse.RELEASE: (0, b""),
    cuse.FLUSH: (0, b""),
    cuse.READ: (errno.EINVAL, b""),
    cuse.WRITE: (errno.EINVAL, b""),
}
# 40 is poll, which the kernel then answers as for a device without it
UNKNOWN: Final = (errno.ENOSYS, b"")
SPECIAL: Final = {cuse.FORGET, cuse.BATCH_FORGET, cuse.INTERRUPT, cuse.IOCTL, cuse.CUSE_INIT}


@pytest.mark.parametrize("opcode", sorted({*range(64), 4095, 4097, 1048576, 2**32 - 1} - SPECIAL))
def test_every_other_opcode(opcode: int) -> None:
    number, body = OTHERS.get(opcode, UNKNOWN)
    for content in (b"", bytes(8), bytes(64)):
        assert opened(Dialogue(Answers(), "nsm").receive(message(opcode, content))) == (
            number,
            7,
            body,
        )


@pytest.mark.parametrize("opcode", [cuse.FORGET, cuse.BATCH_FORGET])
def test_what_wants_no_reply(opcode: int) -> None:
    assert Dialogue(Answers(), "nsm").receive(message(opcode, bytes(16))) is None


WHOLE: Final = {
    "init": message(cuse.CUSE_INIT, INIT_BODY),
    "open": message(cuse.OPEN, bytes(8)),
    "interrupt": message(cuse.INTERRUPT, cuse.INTERRUPT_IN.pack(7)),
    "ioctl": message(cuse.IOCTL, ioctl_body(RAW_AT)),
    "ioctl with nsm_raw": message(cuse.IOCTL, ioctl_body(RAW_AT, cuse.NSM_RAW.pack(1, 2, 3, 4))),
    "ioctl with all": message(
        cuse.IOCTL, ioctl_body(RAW_AT, cuse.NSM_RAW.pack(1, 2, 3, 4) + b"xy", 36)
    ),
}


@pytest.mark.parametrize("whole", WHOLE.values(), ids=WHOLE)
def test_messages_that_are_cut_short(whole: bytes) -> None:
    """A message shorter than it says is none; arguments too short for their opcode are EINVAL."""
    module = Answers()
    for end in range(len(whole)):
        assert Dialogue(module, "nsm").receive(whole[:end]) is None
    for end in range(cuse.IN_HEADER.size, len(whole)):
        cut = end.to_bytes(4, sys.byteorder) + whole[4:end]
        answer = Dialogue(module, "nsm").receive(cut)
        if whole is not WHOLE["open"] and whole is not WHOLE["interrupt"]:
            assert opened(answer) == (errno.EINVAL, 7, b"")
    assert module.requests == []


@pytest.mark.parametrize("out_size", [0, 31])
def test_no_room_for_nsm_raw(out_size: int) -> None:
    body = ioctl_body(RAW_AT, bytes(32) + b"question", out_size)
    assert opened(Dialogue(Answers(), "nsm").receive(message(cuse.IOCTL, body)))[0] == errno.EINVAL


@pytest.mark.parametrize("in_size", [1, 31, 33, 2**32 - 1])
def test_lengths_that_contradict_the_message(in_size: int) -> None:
    body = cuse.IOCTL_IN.pack(0, 2, NSM_IOCTL_RAW, RAW_AT, in_size, 64) + bytes(32)
    assert opened(Dialogue(Answers(), "nsm").receive(message(cuse.IOCTL, body)))[0] == errno.EINVAL


@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_damaged_messages(name: str, data: st.DataObject) -> None:
    """Whatever comes, the reply is one or none, and never longer than the kernel has room for."""
    damaged = bytearray(WHOLE[name])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(4, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    dialogue = Dialogue(SoftwareNsm(PKI), "nsm")
    answer = dialogue.receive(bytes(damaged))
    if answer is not None:
        number, _, body = opened(answer)
        assert 0 <= number < 512
        assert len(body) <= 4096
    assert not dialogue.unanswered


# Those who wait


def waiting(unique: int) -> bytes:
    return message(cuse.IOCTL, ioctl_body(RAW_AT, bytes(32) + b"question", 64), unique)


def test_a_silent_module_and_signals() -> None:
    dialogue = Dialogue(Silent(), "nsm")
    assert [dialogue.receive(waiting(unique)) for unique in (2, 4, 6)] == [None] * 3
    assert dialogue.unanswered == {2, 4, 6}
    interrupt = message(cuse.INTERRUPT, cuse.INTERRUPT_IN.pack(4), 5)
    assert opened(dialogue.receive(interrupt)) == (errno.EINTR, 4, b"")
    assert dialogue.receive(interrupt) is None  # it was answered
    assert [opened(answer)[0] for answer in dialogue.hang_up()] == [errno.EIO] * 2
    assert not dialogue.unanswered


def test_a_module_that_breaks_leaves_its_caller_to_be_told() -> None:
    dialogue = Dialogue(Broken(), "nsm")
    with pytest.raises(RuntimeError):
        dialogue.receive(waiting(2))
    assert [opened(answer) for answer in dialogue.hang_up()] == [(errno.EIO, 2, b"")]


# The device, with a kernel at the other end of a socket


class FakeChannel:
    """The kernel's end of the channel, and the device that was made of it."""

    def __init__(self, kernel: socket.socket, make: Callable[[], CuseDevice]) -> None:
        self.kernel = kernel
        self.make = make

    def ask(self, data: bytes) -> tuple[int, int, bytes]:
        self.kernel.send(data)
        return opened(self.kernel.recv(1 << 16))


def fake_channel(monkeypatch: pytest.MonkeyPatch, module: Any) -> FakeChannel:
    """Patch what opens /dev/cuse, and what makes a node, which takes root."""
    kernel, channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kernel.settimeout(10)
    channel.setblocking(False)
    file = io.FileIO(channel.detach(), "r+")
    monkeypatch.setattr(cuse, "_open_channel", lambda: file)
    monkeypatch.setattr(cuse, "_node", contextlib.nullcontext)
    kernel.send(message(cuse.CUSE_INIT, INIT_BODY))
    return FakeChannel(kernel, lambda: CuseDevice(module, Path("/dev/nitrosim-test")))


def test_a_device_and_its_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_channel(monkeypatch, SoftwareNsm(PKI))
    with no_thread_stays(), fake.kernel, fake.make() as device:
        assert device.environment({"HOME": "/"}) == {"HOME": "/"}
        assert fake.kernel.recv(4096).endswith(b"DEVNAME=nitrosim-test\0")
        assert fake.ask(message(cuse.OPEN, bytes(8)))[0] == 0
        body = ioctl_body(RAW_AT, bytes(32) + bytes.fromhex(DESCRIBE_NSM), 32 + 12288)
        assert b"DescribeNSM" in fake.ask(message(cuse.IOCTL, body))[2]
        fake.kernel.send(b"short")  # no message, and no answer
        assert fake.ask(message(cuse.RELEASE, bytes(24)))[0] == 0
        device.close()
        assert fake.kernel.recv(4096) == b""  # closed


def test_who_waits_at_the_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_channel(monkeypatch, Silent())
    with fake.kernel:
        with fake.make():
            fake.kernel.recv(4096)
            fake.kernel.send(waiting(2))
            # the other has been read before
            assert fake.ask(message(cuse.OPEN, bytes(8), 4))[1] == 4
        assert opened(fake.kernel.recv(4096)) == (errno.EIO, 2, b"")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_module_that_breaks_takes_the_device_away(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_channel(monkeypatch, Broken())
    with fake.kernel, fake.make():
        fake.kernel.recv(4096)
        assert fake.ask(waiting(2)) == (errno.EIO, 2, b"")
        assert fake.kernel.recv(4096) == b""


def test_a_kernel_that_hangs_up(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_channel(monkeypatch, Answers())
    fake.kernel.shutdown(socket.SHUT_RDWR)  # as it does for a name that it does not want
    with fake.kernel, pytest.raises(SimulatorError, match="refuses a device called nitrosim-test"):
        fake.make()


NO_DEVICES: Final = [
    "nsm",
    "/",
    "/dev/..",
    "/dev/a!b",
    "/dev/\u00e9",
    "/dev/ nsm",
    "/dev/a\nb",
    "/dev/" + "x" * 256,
]


@pytest.mark.parametrize("path", NO_DEVICES)
def test_paths_that_cannot_be(path: str) -> None:
    with pytest.raises(SimulatorError, match="no path of a device"):
        CuseDevice(Answers(), Path(path))


def test_a_path_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    for path in (Path("/dev/null"), tmp_path, tmp_path / "dangling"):
        with pytest.raises(SimulatorError, match="is there already"):
            CuseDevice(Answers(), path)


@pytest.mark.parametrize(
    ("number", "part"),
    [(errno.ENOENT, "modprobe cuse"), (errno.ENODEV, "modprobe cuse"), (errno.EACCES, "only root")],
)
def test_without_cuse_or_root(monkeypatch: pytest.MonkeyPatch, number: int, part: str) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(SimulatorError, match=part):
        CuseDevice(Answers(), Path("/dev/nitrosim-test"))


def test_serve_where_there_is_no_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line and status 1, and nothing is left running."""
    monkeypatch.setattr(signal, "pthread_sigmask", lambda *_: None)  # of the test's own process
    monkeypatch.setattr(cuse, "CHANNEL", tmp_path / "cuse")
    with no_thread_stays():
        done = CliRunner().invoke(cli, ["serve", "--device", "/dev/nitrosim-test"])
    assert done.exit_code == 1
    assert re.fullmatch(
        r"nitrosim: error: cannot start: this kernel offers no device.*modprobe cuse\n", done.output
    )


def test_what_a_container_is_told(enclave: Enclave) -> None:
    """Any image can be in the world of a real device; shim and socket are not needed there."""
    environment = {"AWS_REGION": "eu-west-1"}
    for device, option in (("/dev/nsm", "/dev/nsm"), ("/dev/nsm-two", "/dev/nsm-two:/dev/nsm")):
        world = SimpleNamespace(folder=enclave.world.folder, device=Path(device), tpm=None)
        first, second = _container(world, environment)
        assert "any image" in first
        assert (
            f" --device {option} --volume {world.folder}:{world.folder} --env AWS_REGION IMAGE"
            in second
        )


def test_a_node_of_another_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "null").mkdir()
    (tmp_path / "null" / "dev").write_text("1:5\n")
    monkeypatch.setattr(cuse, "_CLASS", tmp_path)
    with pytest.raises(SimulatorError, match="another device"), cuse._node(Path("/dev/null")):
        pass
    with (
        pytest.raises(SimulatorError, match="cannot make /dev/absent"),
        cuse._node(Path("/dev/absent")),
    ):
        pass
