"""libnsm.so through ctypes: the real one over the simulated device, and some that are not it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import cbor2
import pytest

from nitrosim.device import SimulatedDevice
from nitrosim.module import DEFAULT_MODULE_ID, FAULTS, SoftwareNsm
from nitrosim.pki import NsmPki
from nsm import ErrorCode, Nsm, NsmError, library
from nsm.device import Device
from nsm.library import Library, LibraryError, Reason, find_library

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT: Final = Path(__file__).parent.parent
BUILD: Final = ROOT / "patches" / "build-libnsm"
PATCH: Final = ROOT / "patches" / "nsmlib_cpython_wrappers.patch"
NSM_FAULTS: Final = sorted(fault for fault in FAULTS if fault.startswith("nsm-"))

# Every function of the interface in C, so that a test chooses what comes back: the status of
# nsmpy_attest is the length of the nonce less 200, nsmpy_lock_pcr blocks until the descriptor of
# that number can be read.
FAKE: Final = """
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>
#define OUT uint8_t *out, size_t *len
int32_t nsmpy_abi_version(void) { return ABI; }
int32_t nsmpy_open(void) { return 0; }
int32_t nsmpy_close(int32_t fd) { return fd == 0 ? 0 : -9; }
int32_t nsmpy_describe(int32_t fd, OUT) { return -EIO_; }
int32_t nsmpy_describe_pcr(int32_t fd, uint32_t index, uint8_t *locked, OUT) { return 8; }
int32_t nsmpy_extend_pcr(int32_t fd, uint32_t index, const uint8_t *data, size_t size, OUT) {
    memcpy(out, data, size); *len = size; return 0; }
int32_t nsmpy_lock_pcr(int32_t fd, uint32_t index) {
    char byte; return read(index, &byte, 1) == 1 ? 0 : 8; }
int32_t nsmpy_lock_pcrs(int32_t fd, uint32_t count) { return 0; }
int32_t nsmpy_attest(int32_t fd, const uint8_t *u, size_t ul, const uint8_t *n, size_t nl,
    const uint8_t *k, size_t kl, OUT) { *len = 123456; return (int32_t)nl - 200; }
int32_t nsmpy_random(int32_t fd, OUT) { memset(out, 7, *len); return 0; }
"""
STOCK: Final = """
#include <stdint.h>
int32_t nsm_lib_init(void) { return -1; }
void nsm_lib_exit(int32_t fd) { (void)fd; }
"""


def compiled(folder: Path, source: str, *options: str) -> str:
    """The path of a shared library of that source."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a library with")
    output = folder / "libnsm.so"
    command = [
        compiler,
        "-shared",
        "-fPIC",
        f"-DEIO_={errno.EIO}",
        *options,
        "-x",
        "c",
        "-",
        "-o",
        str(output),
    ]
    subprocess.run(command, input=source.encode(), check=True)
    return str(output)


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of the real library, built now if need be."""
    if library.IN_PACKAGE.exists():
        return str(library.IN_PACKAGE)
    if shutil.which("cargo") is None:
        pytest.skip("no nsm/libnsm.so, and no cargo to build it with")
    output = tmp_path_factory.mktemp("libnsm") / "libnsm.so"
    subprocess.run([str(BUILD), "--output", str(output)], check=True)
    return str(output)


@pytest.fixture
def fake(tmp_path: Path) -> str:
    """The path of a library with our functions, but none of their sense."""
    return compiled(tmp_path, FAKE, f"-DABI={library.ABI_VERSION}")


@pytest.fixture(scope="session")
def pki() -> NsmPki:
    return NsmPki.generate(now=datetime.now(UTC), region="eu-west-1", module_id=DEFAULT_MODULE_ID)


class Echo:
    """A module that is quick: its documents are the requests that asked for them."""

    def answer(self, request: bytes) -> bytes:
        return cbor2.dumps({"Attestation": {"document": request + bytes(4500)}})


@pytest.fixture
def echo() -> Iterator[SimulatedDevice]:
    with SimulatedDevice(Echo()) as device:
        yield device


def inside(environment: dict[str, str], function: Callable[..., Any], *arguments: str) -> Any:
    """Call a function of this file in a new process, and return what it returns, by way of JSON."""
    code = (
        "import json, sys; "
        f"from {__name__} import {function.__name__} as f; print(json.dumps(f(*sys.argv[1:])))"
    )
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(
        command,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- the real library over the simulated device ---


def transport(path: str) -> Library | Device:
    return Library(path) if path else Device()


def told(call: Callable[[], object]) -> str:
    """What a call returns, or raises."""
    try:
        return repr(call())
    except NsmError as error:
        return f"{error.operation} {error.code!r} {error.errno}"


def every_answer(path: str) -> list[str]:
    """Every operation and its refusals, on the transport of that path."""
    with Nsm(transport(path)) as nsm:
        return [
            told(nsm.describe),
            *(
                told(partial(nsm.describe_pcr, index))
                for index in (0, 3, 16, 31, 32, 255, 65535, 65536)
            ),
            told(lambda: nsm.extend_pcr(16, b"")),
            told(lambda: nsm.extend_pcr(16, b"\0one")),
            told(lambda: nsm.extend_pcr(16, bytes(4069))),
            told(lambda: nsm.extend_pcr(16, bytes(4070))),
            told(lambda: nsm.extend_pcr(0, b"locked")),
            told(lambda: nsm.lock_pcr(16)),
            told(lambda: nsm.lock_pcr(16)),
            told(lambda: nsm.lock_pcr(32)),
            told(lambda: nsm.extend_pcr(16, b"locked now")),
            told(lambda: nsm.lock_pcrs(20)),
            told(lambda: nsm.lock_pcrs(33)),
            told(lambda: nsm.lock_pcrs(65536)),
            told(nsm.describe),
            told(lambda: len(nsm.random(600))),
            told(lambda: sorted(fields(nsm.attest(b"user", b"", b"\0key")).items())),
            told(lambda: sorted(fields(nsm.attest()).items())),
            told(lambda: nsm.attest(user_data=bytes(2048), nonce=bytes(2048))),
            told(lambda: nsm.attest(nonce=bytes(4097))),
        ]


def fields(document: bytes) -> dict[str, object]:
    payload: dict[str, object] = cbor2.loads(cbor2.loads(document)[2])
    return {name: payload[name] for name in ("user_data", "nonce", "public_key", "module_id")}


def test_both_transports_tell_the_same(real: str, pki: NsmPki) -> None:
    answers = []
    for path in (real, ""):
        with SimulatedDevice(SoftwareNsm(pki)) as device:
            answers.append(inside(device.environment(os.environ), every_answer, path))
    assert answers[0] == answers[1]
    told_by_library = "\n".join(answers[0])
    assert "Description(version=(1, 0, 0)" in told_by_library
    assert "('nonce', b''), ('public_key', b'\\x00key'), ('user_data', b'user')" in told_by_library
    assert "('nonce', None), ('public_key', None), ('user_data', None)" in told_by_library
    assert {code.name for code in ErrorCode if f"ErrorCode.{code.name}:" in told_by_library} == {
        "InvalidIndex",
        "ReadOnlyIndex",
        "InputTooLarge",
    }


def refusals(path: str) -> list[str]:
    with Nsm(transport(path)) as nsm:
        return [
            told(nsm.describe),
            told(nsm.attest),
            told(nsm.random),
            told(lambda: nsm.describe_pcr(3)),
            told(lambda: nsm.extend_pcr(16, b"data")),
            told(lambda: nsm.lock_pcr(16)),
            told(lambda: nsm.lock_pcrs(16)),
        ]


@pytest.mark.parametrize("fault", [fault for fault in NSM_FAULTS if fault != "nsm-empty-random"])
def test_both_transports_refuse_alike(real: str, pki: NsmPki, fault: str) -> None:
    with SimulatedDevice(SoftwareNsm(pki, fault=fault)) as device:
        by_library, directly = (
            inside(device.environment(os.environ), refusals, path) for path in (real, "")
        )
    assert by_library == directly
    assert all("ErrorCode." in refusal for refusal in by_library)


class HangUp:
    """A device that breaks under every request."""

    def answer(self, request: bytes) -> bytes:  # noqa: ARG002 - what was asked makes no difference
        return b""


def test_the_kernels_errors_keep_their_number(real: str) -> None:
    with SimulatedDevice(HangUp()) as device:
        refused = inside(device.environment(os.environ), refusals, real)
    assert {refusal.split(" ", 1)[1] for refusal in refused} == {f"None {errno.EIO}"}


def test_a_missing_device_is_named(real: str) -> None:
    if Path(library.DEVICE).exists():
        pytest.skip("this machine has an NSM")
    with pytest.raises(NsmError, match=r"open: ENOENT \(No such file or directory\): /dev/nsm"):
        Library(real)


def closed_twice(path: str) -> list[str]:
    nsm = Library(path)
    nsm.close()
    return [nsm.name, told(nsm.close), told(nsm.random)]


def test_a_closed_library_touches_no_other_descriptor(real: str, echo: SimulatedDevice) -> None:
    name, *late = inside(echo.environment(os.environ), closed_twice, real)
    assert name == f"{real} (ABI 1)"
    assert late == [f"close None {errno.EBADF}", f"GetRandom None {errno.EBADF}"]


def growth(path: str, count: str) -> dict[str, int]:
    """Descriptors and KiB of memory that many calls leave behind."""
    with Nsm(Library(path)) as nsm:
        for _ in range(200):
            nsm.attest(nonce=b"first")
        before = measured()
        for number in range(int(count)):
            nonce = number.to_bytes(4, "big")
            assert nonce in nsm.attest(nonce=nonce, public_key=bytes(294))
        return {name: value - before[name] for name, value in measured().items()}


def measured() -> dict[str, int]:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "memory": pages * resource.getpagesize() // 1024,
    }


def test_ten_thousand_documents_leave_nothing_behind(real: str, echo: SimulatedDevice) -> None:
    grown = inside(echo.environment(os.environ), growth, real, "10000")
    assert grown["descriptors"] == 0
    assert grown["memory"] < 512  # one lost document in twenty would be more


def ask_for_own_nonces(nsm: Nsm, number: int) -> int:
    """Documents that hold the nonce asked for."""
    nonces = [hashlib.sha256(f"{number} {turn}".encode()).digest() for turn in range(100)]
    return sum(nonce in nsm.attest(nonce=nonce) for nonce in nonces)


def shared_by_threads(path: str) -> list[int]:
    with Nsm(Library(path)) as nsm, ThreadPoolExecutor(8) as threads:
        return list(threads.map(lambda number: ask_for_own_nonces(nsm, number), range(8)))


def test_threads_get_the_documents_they_asked_for(real: str, echo: SimulatedDevice) -> None:
    assert inside(echo.environment(os.environ), shared_by_threads, real) == [100] * 8


def shared_by_processes(path: str) -> list[int]:
    with Nsm(Library(path)) as nsm:
        children = []
        for number in range(4):
            child = os.fork()
            if child == 0:
                os._exit(ask_for_own_nonces(nsm, number))
            children.append(child)
        own = ask_for_own_nonces(nsm, 4)
        return [own, *(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)]


def test_forked_processes_share_the_device(real: str, echo: SimulatedDevice) -> None:
    assert inside(echo.environment(os.environ), shared_by_processes, real) == [100] * 5


# --- one check of every status ---


@pytest.mark.parametrize("code", list(ErrorCode)[1:])
def test_a_refusal_is_its_code(fake: str, code: ErrorCode) -> None:
    with pytest.raises(NsmError) as caught:
        Library(fake).attest(None, bytes(200 + code), None)
    assert (caught.value.operation, caught.value.code, caught.value.errno) == (
        "Attestation",
        code,
        None,
    )


def test_a_negative_status_is_an_errno(fake: str) -> None:
    with pytest.raises(NsmError, match=r"Attestation: ENODEV") as caught:
        Library(fake).attest(None, bytes(200 - errno.ENODEV), None)
    assert (caught.value.code, caught.value.errno) == (None, errno.ENODEV)
    with pytest.raises(NsmError, match=r"DescribeNSM: EIO"):
        Library(fake).describe()


def test_a_short_buffer_says_that_the_operation_has_happened(fake: str) -> None:
    with pytest.raises(
        NsmError, match=r"BufferTooSmall: done, but the answer takes 123456 bytes, not 12288$"
    ):
        Library(fake).attest(None, bytes(300), None)


@pytest.mark.parametrize("status", [9, 99, 101, 2**11])
def test_an_unknown_status_is_no_success(fake: str, status: int) -> None:
    with pytest.raises(NsmError, match=f"InternalError: unknown status {status}$"):
        Library(fake).attest(None, bytes(200 + status), None)


def test_a_length_beyond_the_buffer_is_not_read(fake: str) -> None:
    assert len(Library(fake).attest(None, bytes(200), None)) == 12288


def test_what_cannot_be_asked_is_refused_before_the_call(fake: str) -> None:
    nsm = Library(fake)
    for index in (-1, 65536, 2**32, 2**64):
        for call in (nsm.describe_pcr, nsm.lock_pcr, nsm.lock_pcrs):
            with pytest.raises(NsmError, match="InvalidIndex"):
                call(index)
    with pytest.raises(NsmError, match="InputTooLarge"):
        nsm.extend_pcr(16, bytes(4097))
    with pytest.raises(NsmError, match="InputTooLarge"):
        nsm.attest(bytes(4097), None, None)


def test_zero_bytes_are_no_end(fake: str) -> None:
    data = bytes(range(256)) * 16
    assert Library(fake).extend_pcr(16, data) == data
    assert Library(fake).random() == b"\7" * 12288


def others_run(path: str) -> bool:
    """A thread waits in the library for what another one writes."""
    reader, writer = os.pipe()
    waiting = threading.Thread(target=Library(path).lock_pcr, args=(reader,))
    waiting.start()
    os.write(writer, b".")
    waiting.join()
    return True


def test_other_threads_run_during_a_call(fake: str) -> None:
    assert inside(dict(os.environ), others_run, fake)


# --- libraries that are not it ---


def other_machine(path: str) -> bytes:
    """The library with another e_machine (elf(5))."""
    data = bytearray(Path(path).read_bytes())
    data[18:20] = (183 if data[18] != 183 else 62).to_bytes(2, "little")
    return bytes(data)


def other_class(path: str) -> bytes:
    data = bytearray(Path(path).read_bytes())
    data[4] = 1  # EI_CLASS: 32-bit
    return bytes(data)


def unusable(kind: str, folder: Path) -> str:
    """The path of a library that cannot be used, in that way."""
    path = folder / "libnsm.so"
    match kind:
        case "text":
            path.write_text("not a library, and long enough to be one\n", encoding="ascii")
        case "empty":
            path.write_bytes(b"")
        case "folder":
            path.mkdir()
        case "stock":
            return compiled(folder, STOCK)
        case "some wrappers":
            return compiled(folder, STOCK + "int32_t nsmpy_abi_version(void) { return 1; }")
        case "other version":
            return compiled(folder, STOCK + "int32_t nsmpy_abi_version(void) { return 2; }")
        case "other machine":
            path.write_bytes(other_machine(sys.executable))
        case "other class":
            path.write_bytes(other_class(sys.executable))
        case "cut":
            path.write_bytes(Path(compiled(folder, STOCK)).read_bytes()[:64])
    return str(path)


UNUSABLE: Final = {
    "missing": (Reason.NOT_FOUND, r"libnsm\.so: not found$"),
    "text": (Reason.NOT_A_LIBRARY, r"libnsm\.so: not a shared library$"),
    "empty": (Reason.NOT_A_LIBRARY, r"not a shared library$"),
    "folder": (Reason.NOT_LOADABLE, r"cannot be loaded: .*Is a directory"),
    "stock": (
        Reason.WITHOUT_WRAPPERS,
        r"without the functions of nsmlib_cpython_wrappers\.patch: .*nsmpy_abi_version",
    ),
    "some wrappers": (Reason.WITHOUT_WRAPPERS, r"nsmpy_open"),
    "other version": (Reason.OTHER_ABI, r"another ABI version: 2, not 1$"),
    "other machine": (
        Reason.OTHER_ARCHITECTURE,
        r"another architecture: 64-bit little-endian \S+, not 64-bit",
    ),
    "other class": (
        Reason.OTHER_ARCHITECTURE,
        r"another architecture: 32-bit little-endian \S+, not 64-bit",
    ),
    "cut": (Reason.NOT_LOADABLE, r"cannot be loaded: "),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_named_library_has_to_work(tmp_path: Path, kind: str) -> None:
    reason, message = UNUSABLE[kind]
    path = unusable(kind, tmp_path)
    with pytest.raises(LibraryError, match=message) as caught:
        Library(path)
    assert (caught.value.reason, caught.value.path) == (reason, path)


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_found_library_without_our_functions_is_passed_over(
    tmp_path: Path,
    fake: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    path = unusable(kind, folder)
    monkeypatch.setattr(library, "IN_PACKAGE", Path(path))
    monkeypatch.setattr(library, "BY_THE_LOADER", (fake,))
    with caplog.at_level("INFO", logger="attestor.nsm"):
        assert find_library() == fake
    passed_over = [record.getMessage() for record in caplog.records]
    assert [message.split(": ")[0] for message in passed_over] == (
        [f"passed over {path}"] if kind != "missing" else []
    )


def test_the_loader_is_asked_last_and_for_both_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "IN_PACKAGE", tmp_path / "missing.so")
    assert library.BY_THE_LOADER == ("libnsm.so", "libnsm.so.0")
    compiled(tmp_path, STOCK)
    wrapped = tmp_path / "fake"
    wrapped.mkdir()
    Path(compiled(wrapped, FAKE, "-DABI=1")).rename(tmp_path / "libnsm.so.0")
    assert (
        inside(os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}, found_by_the_loader)
        == "libnsm.so.0"
    )
    assert inside(os.environ | {"LD_LIBRARY_PATH": str(wrapped)}, found_by_the_loader) is None


def found_by_the_loader() -> str | None:
    return find_library(library.BY_THE_LOADER)


# --- the patch and the build ---


def test_the_patch_holds_our_own_lines_only() -> None:
    lines = PATCH.read_text(encoding="utf-8").splitlines()
    body = lines[lines.index("--- a/src/lib.rs") :]
    assert {line[0] for line in body if not line.startswith(("--- ", "+++ "))} == {"@", "+"}
    assert [line for line in body if line.startswith("+++ ")] == [
        "+++ b/src/lib.rs",
        "+++ b/src/cpython.rs",
    ]


def test_the_library_is_small_and_exports_nothing_foreign(real: str) -> None:
    assert Path(real).stat().st_size <= 1 << 20
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm to list symbols with")
    listing = subprocess.run(
        [nm, "-D", "--defined-only", real], capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[2] for line in listing.splitlines()} == set(library._PARAMETERS)


def test_the_build_says_that_cargo_is_missing(tmp_path: Path) -> None:
    for name in ("bash", "dirname"):
        found = shutil.which(name)
        assert found is not None
        (tmp_path / name).symlink_to(found)
    done = subprocess.run(
        [str(tmp_path / "bash"), str(BUILD)],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("libnsm: error: cargo not found: install Rust")
