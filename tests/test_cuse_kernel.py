"""The software NSM as a device of a real kernel: /dev/cuse, as root, in a virtual machine."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import cbor2
import pytest

from nitrosim.cuse import CuseDevice
from nitrosim.device import SimulatorError
from nitrosim.module import SoftwareNsm
from nsm import document
from tests.conftest import ROOT
from tests.test_cuse import Broken, Silent
from tests.test_simulated_device import ATTESTATION, C_PROGRAM, DESCRIBE_NSM, PKI, PRELUDE, Answers

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.vm

DEVICE: Final = Path("/dev/nsm")


def run(code: str, *, user: int | None = None, path: Path = DEVICE) -> Any:
    """The JSON that a Python snippet prints in another process; `fd` is the open device."""
    start = f"{PRELUDE}\nfd = os.open({str(path)!r}, os.O_RDWR)\n"
    command = [sys.executable, "-c", start + textwrap.dedent(code)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, user=user, timeout=120
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


def in_enclave(module: Any, code: str) -> Any:
    with CuseDevice(module):
        return run(code)


@pytest.fixture
def module() -> SoftwareNsm:
    return SoftwareNsm(PKI)


@pytest.fixture
def device(module: SoftwareNsm) -> Iterator[CuseDevice]:
    with CuseDevice(module) as made:
        yield made


@pytest.mark.parametrize("transport", ["device", "library"])
def test_every_operation(device: CuseDevice, module: SoftwareNsm, transport: str) -> None:
    code = f"""
        import nsm, nsm.device, nsm.library
        chosen = nsm.device.Device() if {transport!r} == "device" else None
        with nsm.Nsm(chosen) as module:
            found = [type(module._transport).__name__, module.describe().max_pcrs]
            found += [module.describe_pcr(16).locked]
            found += [module.extend_pcr(16, b"x").hex(), module.lock_pcr(16), module.lock_pcrs(20)]
            found += [list(module.describe().locked_pcrs)[-1], len(module.random(300))]
            found += [module.attest(nonce=b"n").hex()]
            try:
                module.extend_pcr(16, b"x")
            except nsm.NsmError as error:
                found.append(error.code.name)
        print(json.dumps(found))
    """
    name, *found, data, refused = run(code)
    assert name == {"device": "Device", "library": "Library"}[transport]
    assert found == [32, False, module.pcrs[16].hex(), None, None, 19, 300]
    assert refused == "ReadOnlyIndex"
    assert document.verify(bytes.fromhex(data), roots=[PKI.root_sha256]).document.nonce == b"n"


def test_a_program_in_c(device: CuseDevice, tmp_path: Path) -> None:
    source, program = tmp_path / "program.c", tmp_path / "program"
    source.write_text(C_PROGRAM)
    subprocess.run(["cc", "-static", source, "-o", program], check=True)
    done = subprocess.run([program], env={}, capture_output=True, check=True)
    document.verify(cbor2.loads(done.stdout)["Attestation"]["document"], roots=[PKI.root_sha256])


def test_the_node(device: CuseDevice) -> None:
    status = DEVICE.stat()
    assert (stat.S_ISCHR(status.st_mode), stat.S_IMODE(status.st_mode)) == (True, 0o666)
    assert (
        run(f"print(json.dumps(ask(fd, bytes.fromhex({ATTESTATION!r}))[0]))", user=65534) == "done"
    )


def test_answer_and_its_length() -> None:
    code = """
        found = [ask(fd, b"question", room) for room in (12288, 6, 5, 0, 2**64 - 1)]
        shown = [(outcome, length, answer[:7].hex()) for outcome, length, answer in found]
        print(json.dumps(shown))
    """
    whole = ["done", 6, b"answer\xee".hex()]
    cut = [["done", 5, b"answe\xee\xee".hex()], ["done", 0, (b"\xee" * 7).hex()]]
    asked = Answers()
    assert in_enclave(asked, code) == [whole, whole, *cut, whole]
    assert asked.requests == [b"question"] * 5


def test_sizes_at_their_limits() -> None:
    code = """
        found = [ask(fd, bytes(size)) for size in (4096, 4097, 0)]
        whole = b"\\x11" * 12288
        print(json.dumps([(outcome, length, answer == whole) for outcome, length, answer in found]))
    """
    refused = [["EMSGSIZE", 12288, False], ["EINVAL", 12288, False]]
    assert in_enclave(Answers(b"\x11" * 12288), code) == [["done", 12288, True], *refused]


def test_bad_pointers() -> None:
    code = """
        import mmap
        good = ctypes.create_string_buffer(64)
        address = ctypes.addressof(good)
        libc.mmap.restype = ctypes.c_void_p
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        read_only = libc.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ, flags, -1, 0)
        raws = [Raw(8, 8, address, 64), Raw(address, 8, 8, 64), Raw(address, 8, read_only, 64)]
        raws += [Raw(2**64 - 4, 8, address, 64), Raw(address, 8, 2**64 - 4, 64)]
        raws += [Raw(0, 4096, 0, 2**64 - 1)]
        found = [ioctl(fd, COMMAND, ctypes.byref(raw)) for raw in raws]
        found += [ioctl(fd, COMMAND, ctypes.c_void_p(bad)) for bad in (0, 8, 2**64 - 8, 2**63)]
        found += [ioctl(fd, COMMAND, ctypes.c_void_p(read_only))]
        raw = Raw(address, 2**64 - 1, address, 64)
        found += [ioctl(fd, COMMAND, ctypes.byref(raw))]
        print(json.dumps(found))
    """
    assert in_enclave(Answers(), code) == [*["EFAULT"] * 10, "EINVAL", "EMSGSIZE"]


def test_everything_but_the_ioctl() -> None:
    code = """
        import select
        def refused(call, *arguments):
            try:
                return call(*arguments)
            except OSError as error:
                return errno.errorcode[error.errno]
        space = ctypes.create_string_buffer(256)
        poll = select.poll()
        poll.register(fd)
        found = [ioctl(fd, command, space) for command in (0xC0200A01, 0xC0100A00, 0x5401)]
        found += [refused(os.read, fd, 10), refused(os.write, fd, b"x"), refused(os.fsync, fd)]
        found += [os.isatty(fd)]
        print(json.dumps([*found, poll.poll(0)[0][1] & (select.POLLIN | select.POLLOUT)]))
    """
    assert in_enclave(Answers(), code) == [*["EINVAL"] * 6, False, 5]


def test_a_module_that_hangs_up() -> None:
    assert in_enclave(Answers(b""), "print(json.dumps(ask(fd, b'x')[0]))") == "EIO"


def test_after_fork_dup_and_exec_and_in_threads() -> None:
    asked = Answers()
    child = (
        "from nsm.device import Device; d = Device.__new__(Device); "
        "d._fd = int(__import__('sys').argv[1]);"
        "print(d._exchange('x', b'exec'))"
    )
    code = f"""
        pid = os.fork()
        if pid == 0:
            os._exit(ask(fd, b"fork")[0] != "done")
        found = [os.waitpid(pid, 0)[1], ask(os.dup(fd), b"dup")[0]]
        os.close(fd)
        fd = os.open("/dev/nsm", os.O_RDWR)
        os.set_inheritable(fd, True)
        command = [sys.executable, "-c", {child!r}, str(fd)]
        done = subprocess.run(command, close_fds=False, capture_output=True, text=True)
        found.append(done.stdout.strip())
        outcomes = []
        ask_too = lambda: outcomes.append(ask(fd, b"thread")[0])
        threads = [threading.Thread(target=ask_too) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(json.dumps([*found, outcomes]))
    """
    assert in_enclave(asked, code) == [0, "done", "b'answer'", ["done"] * 8]
    assert asked.requests == [b"fork", b"dup", b"exec", *[b"thread"] * 8]


def test_four_processes_of_eight_threads(device: CuseDevice, module: SoftwareNsm) -> None:
    """PCR 16 is extended once for each request, and no value is given twice."""
    code = """
        from concurrent.futures import ThreadPoolExecutor
        from nsm import Nsm
        from nsm.device import Device
        with Nsm(Device()) as module, ThreadPoolExecutor(8) as pool:
            values = pool.map(lambda _: module.extend_pcr(16, b"x"), range(32))
            print(json.dumps([value.hex() for value in values]))
    """
    with ThreadPoolExecutor(4) as pool:
        values = [value for found in pool.map(lambda _: run(code), range(4)) for value in found]
    assert len(set(values)) == 4 * 32
    assert module.pcrs[16].hex() in values


def test_a_thousand_calls_leave_nothing(device: CuseDevice) -> None:
    code = """
        outcomes = set()
        for _ in range(1000):
            other = os.open("/dev/nsm", os.O_RDWR)
            outcomes.add(ask(other, bytes.fromhex("6947657452616e646f6d"))[0])
            os.close(other)
        print(json.dumps([sorted(outcomes), len(os.listdir("/proc/self/fd"))]))
    """
    before = len(os.listdir("/proc/self/fd"))
    first = resident()
    assert run(code) == [["done"], run("print(json.dumps(len(os.listdir('/proc/self/fd'))))")]
    assert len(os.listdir("/proc/self/fd")) <= before  # an earlier thread may close its own
    assert resident() - first < 4096  # KiB
    assert not device._dialogue.unanswered
    assert waiting_calls() == 0


def test_a_signal_ends_the_wait() -> None:
    code = """
        import signal
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        print(json.dumps(ask(fd, b"x")[0]))
    """
    assert in_enclave(Silent(), code) == "EINTR"


def test_a_killed_caller_is_gone() -> None:
    asking = "print('asking', flush=True)\nask(os.open('/dev/nsm', os.O_RDWR), b'x')"
    with CuseDevice(Silent()) as device, python(asking) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "asking\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=20) == -signal.SIGKILL
        assert not device._dialogue.unanswered


def test_who_waits_at_the_end_is_told() -> None:
    code = (
        "fd = os.open('/dev/nsm', os.O_RDWR)\n"
        "print('asking', flush=True)\n"
        "print(ask(fd, b'x')[0])\n"
        "print(ask(fd, b'x')[0])"
    )
    with CuseDevice(Silent()) as device:
        process = python(code)
        assert process.stdout is not None
        assert process.stdout.readline() == "asking\n"
        while not device._dialogue.unanswered:
            pass
    out, _ = process.communicate(timeout=20)
    waiting, after = out.split()
    assert waiting == "EIO"
    # while the kernel takes the connection down, and when it has
    assert after in {"ECONNABORTED", "ENOTCONN"}


def test_it_is_gone_after_the_end() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with CuseDevice(Answers()) as device:
        assert DEVICE.exists()
        with pytest.raises(SimulatorError, match="is there already"):
            CuseDevice(Answers())
    device.close()
    assert not DEVICE.exists()
    assert not Path("/sys/class/cuse/nsm").exists()
    assert len(os.listdir("/proc/self/fd")) <= before  # an earlier thread may close its own


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_module_that_breaks() -> None:
    with CuseDevice(Broken()):
        assert run("print(json.dumps(ask(fd, b'x')[0]))") == "EIO"
        assert not DEVICE.exists()


def test_a_name_that_the_kernel_knows(device: CuseDevice, tmp_path: Path) -> None:
    with pytest.raises(SimulatorError, match="refuses a device called nsm"):
        CuseDevice(Answers(), tmp_path / "nsm")
    assert run(f"print(json.dumps(ask(fd, bytes.fromhex({DESCRIBE_NSM!r}))[0]))") == "done"


def test_a_node_outside_of_dev(device: CuseDevice, tmp_path: Path) -> None:
    other = tmp_path / "nsm-two"
    with CuseDevice(Answers(b"two"), other):
        assert run("print(json.dumps(ask(fd, b'x')[:2]))", path=other) == ["done", 3]
        assert stat.S_IMODE(other.stat().st_mode) == 0o666
    assert not other.exists()
    assert not Path("/dev/nsm-two").exists()


def test_serve_with_a_device(tmp_path: Path) -> None:
    """A command finds all of it with the variables that `serve` prints, and without the shim."""
    command = [
        sys.executable,
        "-m",
        "nitrosim.cli",
        "serve",
        "--device",
        "/dev/nsm",
        "--tag",
        "mpa-node=3",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        lines: list[str] = []
        while not (lines and "podman" in lines[-1]):
            lines.append(server.stdout.readline())
        (tmp_path / "env").write_text("".join(lines))
        python = f"PYTHONPATH={ROOT} {sys.executable}"
        script = (
            ". ./env; echo secret >secret; "
            f"{python} -m attestor encrypt --key-id alias/nitrosim secret blob && "
            f"{python} -m attestor decrypt --any-key blob out"
        )
        done = subprocess.run(
            ["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        server.terminate()
    assert (done.returncode, done.stdout, done.stderr, server.returncode) == (0, "", "", 0)
    assert (tmp_path / "out").read_text() == "secret\n"
    assert not re.search("^export (LD_PRELOAD|NITROSIM_NSM_SOCKET)", "".join(lines), re.MULTILINE)
    assert " --device /dev/nsm " in lines[-1]
    assert not DEVICE.exists()


def python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def resident() -> int:
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS")
    ]
    return int(line.split()[1])


def waiting_calls() -> int:
    return int(Path("/sys/class/cuse/nsm/waiting").read_text())
