"""The software NSM, byte by byte, and the shim that is /dev/nsm for programs in any language."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import resource
import ssl
import stat
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import cbor2
import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from nitrosim.device import SimulatedDevice, SimulatorError, build_shim
from nitrosim.module import (
    DEFAULT_MODULE_ID,
    DEFAULT_PCRS,
    FAULTS,
    SoftwareNsm,
    default_pcrs,
    extended,
)
from nitrosim.pki import NsmPki, TlsPki
from nsm import document

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nitrosim.device import Module

ROOT: Final = Path(__file__).parent.parent
NOW: Final = datetime.now(UTC)
PKI: Final = NsmPki.generate(now=NOW, module_id=DEFAULT_MODULE_ID)

# The wire format of aws-nitro-enclaves-nsm-api, as its own golden vectors have it.
DESCRIBE_NSM: Final = "6b44657363726962654e534d"
GET_RANDOM: Final = "6947657452616e646f6d"
GOLDEN: Final = {
    "DescribePCR 3": (
        "a16b4465736372696265504352a165696e64657803",
        "a16b4465736372696265504352a2646c6f636bf564646174615830" + DEFAULT_PCRS[3].hex(),
    ),
    "DescribePCR 16": (
        "a16b4465736372696265504352a165696e64657810",
        "a16b4465736372696265504352a2646c6f636bf464646174615830" + bytes(48).hex(),
    ),
    "ExtendPCR 4": (
        "a169457874656e64504352a265696e64657804646461746143010203",
        "a1654572726f726d526561644f6e6c79496e646578",
    ),
    "ExtendPCR 16": (
        "a169457874656e64504352a265696e64657810646461746143010203",
        "a169457874656e64504352a164646174615830"
        + hashlib.sha384(bytes(48) + b"\1\2\3").hexdigest(),
    ),
    "LockPCR 5": (
        "a1674c6f636b504352a165696e64657805",
        "a1654572726f726d526561644f6e6c79496e646578",
    ),
    "LockPCR 16": ("a1674c6f636b504352a165696e64657810", "674c6f636b504352"),
    "LockPCRs 16": ("a1684c6f636b50435273a16572616e676510", "684c6f636b50435273"),
    "DescribePCR 32": (
        "a16b4465736372696265504352a165696e6465781820",
        "a1654572726f726c496e76616c6964496e646578",
    ),
    "DescribeNSM": (
        DESCRIBE_NSM,
        "a16b44657363726962654e534da76d76657273696f6e5f6d616a6f7201"
        "6d76657273696f6e5f6d696e6f72006d76657273696f6e5f706174636800696d6f64756c655f69647827"
        + DEFAULT_MODULE_ID.encode().hex()
        + "686d61785f7063727318206b6c6f636b"
        "65645f7063727390000102030405060708090a0b0c0d0e0f6664696765737466534841333834",
    ),
}
ATTESTATION: Final = (
    "a16b4174746573746174696f6ea369757365725f64617461420909656e6f6e6365f66a7075626c69635f6b65794107"
)


def ask(module: SoftwareNsm, request: object) -> Any:
    return cbor2.loads(module.answer(cbor2.dumps(request)))


def attest(module: SoftwareNsm, **fields: bytes) -> bytes:
    answer = ask(
        module, {"Attestation": {"user_data": None, "nonce": None, "public_key": None, **fields}}
    )
    data = answer["Attestation"]["document"]
    assert isinstance(data, bytes)
    return data


def payload_of(data: bytes) -> dict[str, Any]:
    payload = cbor2.loads(cbor2.loads(data)[2])
    assert isinstance(payload, dict)
    return payload


# The module


@pytest.mark.parametrize(("request_", "answer"), GOLDEN.values(), ids=GOLDEN)
def test_golden_bytes(request_: str, answer: str) -> None:
    assert SoftwareNsm(PKI).answer(bytes.fromhex(request_)).hex() == answer


def test_golden_random() -> None:
    module = SoftwareNsm(PKI)
    first, second = (module.answer(bytes.fromhex(GET_RANDOM)) for _ in range(2))
    assert first.startswith(bytes.fromhex("a16947657452616e646f6da16672616e646f6d590100"))
    assert len(first) == len(second) == 22 + 256
    assert first != second


def test_golden_attestation() -> None:
    answer = SoftwareNsm(PKI).answer(bytes.fromhex(ATTESTATION))
    assert answer.startswith(bytes.fromhex("a16b4174746573746174696f6ea168646f63756d656e7459"))
    payload = payload_of(cbor2.loads(answer)["Attestation"]["document"])
    assert (payload["user_data"], payload["nonce"], payload["public_key"]) == (
        b"\x09\x09",
        None,
        b"\x07",
    )


REFUSED: Final[dict[str, tuple[object, str]]] = {
    "unknown name": ("Reboot", "InvalidOperation"),
    "unknown name with fields": ({"Reboot": {}}, "InvalidOperation"),
    "fields missing": ("DescribePCR", "InvalidOperation"),
    "fields not asked for": ({"DescribeNSM": {}}, "InvalidOperation"),
    "two requests": ({"LockPCR": {"index": 16}, "LockPCRs": {"range": 16}}, "InvalidOperation"),
    "a number": (7, "InvalidOperation"),
    "index missing": ({"DescribePCR": {}}, "InvalidOperation"),
    "index a text": ({"DescribePCR": {"index": "3"}}, "InvalidOperation"),
    "index a truth value": ({"DescribePCR": {"index": True}}, "InvalidOperation"),
    "index negative": ({"DescribePCR": {"index": -1}}, "InvalidOperation"),
    "index of 17 bits": ({"DescribePCR": {"index": 65536}}, "InvalidOperation"),
    "index too high": ({"LockPCR": {"index": 32}}, "InvalidIndex"),
    "range too high": ({"LockPCRs": {"range": 33}}, "InvalidIndex"),
    "data missing": ({"ExtendPCR": {"index": 16}}, "InvalidOperation"),
    "data a list": ({"ExtendPCR": {"index": 16, "data": [1]}}, "InvalidOperation"),
    "nonce a number": ({"Attestation": {"nonce": 1}}, "InvalidOperation"),
    "too large": ({"ExtendPCR": {"index": 16, "data": bytes(4070)}}, "InputTooLarge"),
}


@pytest.mark.parametrize(("request_", "code"), REFUSED.values(), ids=REFUSED)
def test_refusals(request_: object, code: str) -> None:
    module = SoftwareNsm(PKI)
    assert ask(module, request_) == {"Error": code}
    assert module.pcrs[16] == bytes(48)


def test_damaged_requests_get_an_answer() -> None:
    module = SoftwareNsm(PKI)
    for request in (bytes.fromhex(text) for text, _ in GOLDEN.values()):
        damaged = [request[:end] for end in range(len(request))]
        damaged += [
            (int.from_bytes(request) ^ 1 << bit).to_bytes(len(request))
            for bit in range(8 * len(request))
        ]
        for bad in damaged:
            assert cbor2.loads(module.answer(bad))


@given(st.binary(max_size=200))
def test_any_request_gets_an_answer(request_: bytes) -> None:
    assert cbor2.loads(SoftwareNsm(PKI).answer(request_))


def test_default_pcrs() -> None:
    values = default_pcrs("i-0000000000000000f-enc1", "arn:aws:iam::123456789012:role/Webserver")
    assert values[3].hex().startswith("78fce75d")  # AWS's documented example
    assert values[3].hex().endswith("21e6")
    assert values[4] == hashlib.sha384(bytes(48) + b"i-0000000000000000f").digest()
    assert extended(bytes(48), b"x") == hashlib.sha384(bytes(48) + b"x").digest()
    assert len(set(values.values())) == 7  # PCR0 to 4 and 8 differ, the others are zero


def test_chosen_pcrs_and_debug_mode() -> None:
    chosen = {0: b"\1" * 48, 16: b"\2" * 48}
    assert SoftwareNsm(PKI, pcrs=chosen).pcrs[:17] == tuple(({**DEFAULT_PCRS, **chosen}).values())
    pcrs = SoftwareNsm(PKI, pcrs=chosen, debug=True).pcrs
    assert [index for index in range(9) if pcrs[index] == bytes(48)] == [0, 1, 2, 5, 6, 7, 8]


@pytest.mark.parametrize("pcrs", [{32: bytes(48)}, {-1: bytes(48)}, {0: bytes(47)}, {0: b""}])
def test_impossible_pcrs(pcrs: dict[int, bytes]) -> None:
    with pytest.raises(ValueError, match="PCR"):
        SoftwareNsm(PKI, pcrs=pcrs)


# Documents


def test_document_has_the_shape_of_genuine_ones() -> None:
    data = attest(SoftwareNsm(PKI), public_key=b"key")
    protected, unprotected, payload, signature = cbor2.loads(data)
    assert data.startswith(bytes.fromhex("8444a1013822a059"))
    assert data[-98:-96] == bytes.fromhex("5860")
    assert (protected.hex(), unprotected, len(signature)) == ("a1013822", {}, 96)
    assert (payload[:1], payload[-1:]) == (b"\xbf", b"\xff")
    assert list(payload_of(data)) == [
        "module_id",
        "digest",
        "timestamp",
        "pcrs",
        "certificate",
        "cabundle",
        "public_key",
        "user_data",
        "nonce",
    ]
    assert b"jpublic_keyCkeyiuser_data\xf6enonce\xf6" in payload
    assert b"ipcrs\xb0\x00X0"[1:] in payload  # 16 of them, in order
    assert b"itimestamp\x1b" in payload


def test_document_in_the_older_form_is_the_same() -> None:
    data = attest(SoftwareNsm(PKI, map_form="definite"))
    assert cbor2.loads(data)[2][:1] == b"\xa9"
    document.verify(data, roots=[PKI.root_sha256])


def test_document_carries_the_clock() -> None:
    data = attest(SoftwareNsm(PKI, clock=lambda: NOW + timedelta(minutes=1)))
    assert payload_of(data)["timestamp"] == int((NOW + timedelta(minutes=1)).timestamp() * 1000)


def test_certificates_are_renewed() -> None:
    """Over two days of a served simulator every document verifies at its time, by the same root."""
    now = NOW
    module = SoftwareNsm(PKI, clock=lambda: now)
    leaves = set()
    for _ in range(48):
        data = attest(module)
        document.verify(data, roots=[PKI.root_sha256], at=now)
        leaves.add(payload_of(data)["certificate"])
        now += timedelta(hours=1)
    assert 16 <= len(leaves) <= 24


@pytest.mark.parametrize("fault", ["bad-signature", "expired-leaf", "foreign-root"])
def test_documents_that_must_not_verify(fault: str) -> None:
    data = attest(SoftwareNsm(PKI, fault=fault))
    with pytest.raises(document.DocumentError):
        document.verify(data, roots=[PKI.root_sha256])


def test_faults_of_the_public_key() -> None:
    missing, other = (
        payload_of(attest(SoftwareNsm(PKI, fault=fault), public_key=b"key"))["public_key"]
        for fault in ("no-public-key", "other-public-key")
    )
    assert missing is None
    assert len(other) == 294  # an RSA-2048 SubjectPublicKeyInfo


def test_faults_have_descriptions() -> None:
    assert all(FAULTS.values())
    with pytest.raises(ValueError, match="no-such-fault"):
        SoftwareNsm(PKI, fault="no-such-fault")


# Certificates


def test_certificates_have_the_shapes_of_genuine_ones() -> None:
    chain = [x509.load_der_x509_certificate(der) for der in (*PKI.cabundle, PKI.leaf_der)]
    constraints = [cert.extensions.get_extension_for_class(x509.BasicConstraints) for cert in chain]
    lifetimes = [cert.not_valid_after_utc - cert.not_valid_before_utc for cert in chain]
    assert hashlib.sha256(PKI.cabundle[0]).digest() == PKI.root_sha256
    assert [(found.value.ca, found.value.path_length) for found in constraints] == [
        (True, None),
        (True, 2),
        (True, 1),
        (True, 0),
        (False, None),
    ]
    assert all(found.critical for found in constraints)
    assert lifetimes[1] == timedelta(days=20, hours=1)
    assert lifetimes[3:] == [timedelta(days=1), timedelta(hours=3, seconds=3)]
    assert all(cert.not_valid_before_utc <= NOW <= cert.not_valid_after_utc for cert in chain)
    for issuer, cert in itertools.pairwise(chain):
        cert.verify_directly_issued_by(issuer)
    assert [extension.oid._name for extension in chain[-1].extensions] == [
        "basicConstraints",
        "keyUsage",
    ]


def handshake(pki: TlsPki, folder: Path, name: str) -> None:
    """A TLS handshake in memory, as strict as Python 3.13 is by default."""
    for part in ("ca", "chain", "key"):
        (folder / part).write_bytes(getattr(pki, f"{part}_pem"))
    client_context = ssl.create_default_context(cafile=str(folder / "ca"))
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(folder / "chain", folder / "key")
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname=name)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server) * 2:
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    assert client.version() == "TLSv1.3"


@pytest.mark.parametrize("name", ["kms.eu-west-1.amazonaws.com", "127.0.0.1"])
def test_tls_certificate(tmp_path: Path, name: str) -> None:
    handshake(
        TlsPki.generate(now=NOW, names=["kms.eu-west-1.amazonaws.com"], ips=["127.0.0.1"]),
        tmp_path,
        name,
    )


@pytest.mark.parametrize(
    ("name", "expired", "reason"),
    [("localhost", True, "expired"), ("other.example", False, "mismatch")],
)
def test_tls_certificate_that_is_refused(
    tmp_path: Path, name: str, expired: bool, reason: str
) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=reason):
        handshake(TlsPki.generate(now=NOW, names=["localhost"], expired=expired), tmp_path, name)


# The shim


class Answers:
    """A module that gives the same answer to everything and keeps what it was asked."""

    def __init__(self, answer: bytes = b"answer") -> None:
        self._answer = answer
        self.requests: list[bytes] = []

    def answer(self, request: bytes) -> bytes:
        self.requests.append(request)
        return self._answer


# The start of each snippet: the raw ioctl by ctypes, with errno and the length that was written
# back.
PRELUDE: Final = """
import ctypes, errno, fcntl, json, os, stat, struct, subprocess, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
COMMAND = 0xC0200A00

class Raw(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64) for name in ("request", "request_len", "response", "response_len")
    ]

def ioctl(fd, command, argument):
    ctypes.set_errno(0)
    result = libc.ioctl(fd, ctypes.c_ulong(command), argument)
    return errno.errorcode[ctypes.get_errno()] if result else "done"

def ask(fd, request, room=12288):
    answer = ctypes.create_string_buffer(b"\\xee" * 12288, 12288)
    data = ctypes.create_string_buffer(request, len(request) or 1)
    raw = Raw(ctypes.addressof(data), len(request), ctypes.addressof(answer), room)
    outcome = ioctl(fd, COMMAND, ctypes.byref(raw))
    return outcome, raw.response_len, answer.raw
"""


def run(device: SimulatedDevice, code: str) -> Any:
    """The JSON that a Python snippet prints in a process that has the device."""
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=device.environment(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


def in_enclave(module: Module, code: str) -> Any:
    with SimulatedDevice(module) as device:
        return run(device, code)


@pytest.fixture(scope="module")
def device() -> Iterator[SimulatedDevice]:
    with SimulatedDevice(SoftwareNsm(PKI)) as shared:
        yield shared


C_PROGRAM: Final = r"""
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/ioctl.h>

int main(void)
{
	static uint8_t answer[12288];
	char request[] = "\xa1\x6b" "Attestation"
		"\xa3\x69user_data\xf6\x65nonce\xf6\x6apublic_key\xf6";
	struct { void *request; uint64_t size; void *answer; uint64_t room; } raw =
		{ request, sizeof request - 1, answer, sizeof answer };
	int fd = open("/dev/nsm", O_RDWR);
	return fd < 0 || ioctl(fd, _IOC(_IOC_READ | _IOC_WRITE, 0x0a, 0, 32), &raw) ||
		!fwrite(answer, raw.room, 1, stdout);
}
"""


@pytest.mark.parametrize("flags", [[], ["-O2", "-D_FORTIFY_SOURCE=2", "-D_FILE_OFFSET_BITS=64"]])
def test_a_program_in_c_gets_a_document(
    device: SimulatedDevice, tmp_path: Path, flags: list[str]
) -> None:
    source, program = tmp_path / "program.c", tmp_path / "program"
    source.write_text(C_PROGRAM)
    subprocess.run(["cc", "-Wall", "-Werror", *flags, source, "-o", program], check=True)
    done = subprocess.run(
        [program], env=device.environment(os.environ), capture_output=True, check=True
    )
    document.verify(cbor2.loads(done.stdout)["Attestation"]["document"], roots=[PKI.root_sha256])


FORTIFIED: Final = r"""
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
int __open_2(const char *, int), __open64_2(const char *, int);
int __openat_2(int, const char *, int), __openat64_2(int, const char *, int);
int open64(const char *, int, ...), openat64(int, const char *, int, ...);
int main(int count, char **names)
{
    int flags = O_RDWR;
    for (int i = 1; i < count; i++) {
        const char *p = names[i];
        printf("%d%d%d%d%d%d%d%d ",
               open(p, flags) >= 0, open64(p, flags) >= 0, __open_2(p, flags) >= 0,
               __open64_2(p, flags) >= 0, openat(-1, p, flags) >= 0, openat64(-1, p, flags) >= 0,
               __openat_2(-1, p, flags) >= 0, __openat64_2(-1, p, flags) >= 0);
    }
    return 0;
}
"""


def test_every_name_of_open(device: SimulatedDevice, tmp_path: Path) -> None:
    if os.confstr("CS_GNU_LIBC_VERSION") is None:
        pytest.skip("only glibc has them all")
    source, program = tmp_path / "program.c", tmp_path / "program"
    source.write_text(FORTIFIED)
    subprocess.run(["cc", source, "-o", program], check=True)
    command = [str(program), "/dev/nsm", "/dev/null", "/dev/nsm2", "/dev//nsm"]
    done = subprocess.run(
        command, env=device.environment(os.environ), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1" * 8, "1" * 8, "0" * 8, "0" * 8]


def test_shim_compiles_without_a_warning(tmp_path: Path) -> None:
    source, output = ROOT / "nitrosim" / "shim.c", tmp_path / "shim.so"
    strict = ["-std=c11", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    for more in ([], ["-O0"], ["-D_FORTIFY_SOURCE=2", "-D_FILE_OFFSET_BITS=64"]):
        subprocess.run(["cc", *strict, *more, source, "-o", output, "-ldl"], check=True)


def test_looks_like_a_character_device(device: SimulatedDevice) -> None:
    code = """
        fd = os.open("/dev/nsm", os.O_RDWR)
        found = [os.stat("/dev/nsm"), os.lstat("/dev/nsm")]
        found += [os.stat("/dev/nsm", dir_fd=fd), os.fstat(fd)]
        access = [os.access("/dev/nsm", mode) for mode in (os.F_OK, os.R_OK | os.W_OK, os.X_OK)]
        access += [os.access("/dev/nsm", os.R_OK, effective_ids=True)]
        with open("/dev/nsm", "r+") as file:
            modes = [status.st_mode for status in found]
            print(json.dumps([modes, access, file.isatty(), os.lseek(fd, 0, 0)]))
    """
    assert run(device, code) == [[stat.S_IFCHR | 0o666] * 4, [True, True, False, True], False, 0]


@pytest.mark.parametrize(
    "command", ["test -c /dev/nsm -a -r /dev/nsm -a -w /dev/nsm", "stat -c %A:%F /dev/nsm"]
)
def test_looks_like_a_character_device_to_a_shell(device: SimulatedDevice, command: str) -> None:
    done = subprocess.run(
        ["sh", "-c", command],
        env=device.environment(os.environ),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() in {"", "crw-rw-rw-:character special file"}


def test_open_flags(device: SimulatedDevice) -> None:
    code = """
        def attempt(flags):
            try:
                fd = os.open("/dev/nsm", flags)
            except OSError as error:
                return errno.errorcode[error.errno]
            return bool(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC)

        libc.open(b"/dev/nsm", os.O_RDWR)
        raw = [fcntl.fcntl(libc.open(b"/dev/nsm", os.O_RDWR | flag), fcntl.F_GETFD)
               for flag in (0, os.O_CLOEXEC)]
        print(json.dumps([attempt(os.O_RDWR), attempt(os.O_RDONLY | os.O_DIRECTORY),
                          attempt(os.O_RDWR | os.O_CREAT | os.O_EXCL), raw]))
    """
    assert run(device, code) == [True, "ENOTDIR", "EEXIST", [0, 1]]


def test_answer_and_its_length() -> None:
    module = Answers(b"answer")
    code = """
        fd = os.open("/dev/nsm", os.O_RDWR)
        found = [ask(fd, b"question", room) for room in (12288, 6, 5, 0, 2**64 - 1)]
        shown = [(outcome, length, answer[:7].hex()) for outcome, length, answer in found]
        print(json.dumps(shown))
    """
    whole = ["done", 6, b"answer\xee".hex()]
    assert in_enclave(module, code) == [
        whole,
        whole,
        ["done", 5, b"answe\xee\xee".hex()],  # cut in silence, as by drivers/misc/nsm.c
        ["done", 0, (b"\xee" * 7).hex()],
        whole,
    ]
    assert module.requests == [b"question"] * 5


def test_largest_request_and_answer() -> None:
    module = Answers(b"\x11" * 12288)
    code = """
        fd = os.open("/dev/nsm", os.O_RDWR)
        found = [ask(fd, bytes(size)) for size in (4096, 4097, 0)]
        whole = b"\\x11" * 12288
        print(json.dumps([(outcome, length, answer == whole) for outcome, length, answer in found]))
    """
    assert in_enclave(module, code) == [
        ["done", 12288, True],
        ["EMSGSIZE", 12288, False],
        ["EINVAL", 12288, False],
    ]
    assert [len(request) for request in module.requests] == [4096]


def test_bad_pointers() -> None:
    code = """
        import mmap
        fd = os.open("/dev/nsm", os.O_RDWR)
        good = ctypes.create_string_buffer(64)
        address = ctypes.addressof(good)
        libc.mmap.restype = ctypes.c_void_p
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        read_only = libc.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ, flags, -1, 0)
        raws = [Raw(8, 8, address, 64), Raw(address, 8, 8, 64), Raw(address, 8, read_only, 64)]
        found = [ioctl(fd, COMMAND, ctypes.byref(raw)) for raw in raws]
        found += [ioctl(fd, COMMAND, ctypes.c_void_p(bad)) for bad in (0, 8, 2**64 - 8)]
        found += [ioctl(fd, COMMAND, ctypes.c_void_p(read_only))]
        print(json.dumps(found))
    """
    # the last is a zeroed nsm_raw
    assert in_enclave(Answers(), code) == [*["EFAULT"] * 6, "EINVAL"]


def test_other_ioctls(device: SimulatedDevice) -> None:
    code = """
        import termios
        fd = os.open("/dev/nsm", os.O_RDWR)
        space = ctypes.create_string_buffer(256)
        commands = (0xC0200A01, 0xC0100A00, 0x5401, termios.FIONREAD)
        found = [ioctl(fd, command, space) for command in commands]
        os.set_inheritable(fd, True)
        found += [os.isatty(fd), os.get_inheritable(fd)]
        with open("/dev/null") as null:
            found += [ioctl(null.fileno(), COMMAND, space), ioctl(-1, COMMAND, space)]
        print(json.dumps(found))
    """
    assert run(device, code) == [
        "EINVAL",
        "EINVAL",
        "ENOTTY",
        "EINVAL",
        False,
        True,
        "ENOTTY",
        "EBADF",
    ]


def test_every_other_file_is_left_alone(device: SimulatedDevice, tmp_path: Path) -> None:
    code = f"""
        import errno as names, pathlib, socket, tempfile
        path = pathlib.Path({str(tmp_path)!r}) / "file"
        os.umask(0)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o640))
        path.write_bytes(b"content")
        fd = os.open(".", os.O_RDONLY)
        inside = os.open("file", os.O_RDONLY, dir_fd=os.open(path.parent, os.O_RDONLY))
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        waiting = bytearray(4)
        ends[0].send(b"12345")
        fcntl.ioctl(ends[1], 0x541B, waiting)
        def refused(call, *arguments):
            try:
                call(*arguments)
            except OSError as error:
                return names.errorcode[error.errno]
        with tempfile.TemporaryFile(dir=path.parent) as unnamed:
            unnamed.write(b"x")
        print(json.dumps([
            oct(path.stat().st_mode), path.read_text(),
            os.lseek(inside, 3, 0), os.read(inside, 9).decode(), os.fstat(inside).st_size,
            struct.unpack("i", waiting)[0], stat.S_ISSOCK(os.fstat(ends[0].fileno()).st_mode),
            [refused(os.lseek, ends[0].fileno(), 0, 0), refused(os.stat, "/dev/nsm/x"),
             refused(os.open, "/nowhere", 0), refused(os.stat, "/dev/nsm2"),
             refused(os.open, "/dev/nsm", os.O_RDWR | os.O_DIRECTORY)],
            libc.open(None, 0), os.access(path, os.X_OK),
        ]))
    """
    assert run(device, code) == [
        oct(stat.S_IFREG | 0o640),
        "content",
        3,
        "tent",
        7,
        5,
        True,
        ["ESPIPE", "ENOENT", "ENOENT", "ENOENT", "ENOTDIR"],
        -1,
        False,
    ]


def test_without_the_variable_everything_is_left_alone(device: SimulatedDevice) -> None:
    code = "import os, sys; sys.exit(os.path.exists('/dev/nsm'))"
    environment = device.environment(os.environ)
    del environment["NITROSIM_NSM_SOCKET"]
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == Path("/dev/nsm").exists()


def test_after_fork_dup_and_exec_and_in_threads() -> None:
    module = Answers(b"answer")
    child = (
        "from nsm.device import Device; device = Device.__new__(Device); "
        "device._fd = int(__import__('sys').argv[1]);"
        "print(device._exchange('x', b'exec'))"
    )
    code = f"""
        fd = os.open("/dev/nsm", os.O_RDWR)
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
    assert in_enclave(module, code) == [0, "done", "b'answer'", ["done"] * 8]
    assert module.requests == [b"fork", b"dup", b"exec", *[b"thread"] * 8]


def test_descriptor_that_became_another_file(device: SimulatedDevice) -> None:
    code = """
        fd = os.open("/dev/nsm", os.O_RDWR)
        os.dup2(os.open("/dev/null", os.O_RDWR), fd)
        print(json.dumps([ask(fd, b"x")[0], os.fstat(fd).st_rdev == os.stat("/dev/null").st_rdev]))
    """
    assert run(device, code) == ["ENOTTY", True]


def test_eight_processes_of_eight_threads() -> None:
    """Each gets what it asked for: PCR 16 is extended once a request, no value is given twice."""
    module = SoftwareNsm(PKI)
    code = """
        from concurrent.futures import ThreadPoolExecutor
        from nsm import Nsm
        from nsm.device import Device
        with Nsm(Device()) as module, ThreadPoolExecutor(8) as pool:
            values = pool.map(lambda _: module.extend_pcr(16, b"x"), range(32))
            print(json.dumps([value.hex() for value in values]))
    """
    with SimulatedDevice(module) as shared, ThreadPoolExecutor(8) as pool:
        values = [
            value for found in pool.map(lambda _: run(shared, code), range(8)) for value in found
        ]
    assert len(set(values)) == 8 * 32
    assert module.pcrs[16].hex() in values


def test_server_gone() -> None:
    code = """
        fd = os.open("/dev/nsm", os.O_RDWR)
        before = ask(fd, b"x")[0]
        print("open", flush=True)
        sys.stdin.readline()
        try:
            os.open("/dev/nsm", os.O_RDWR)
        except OSError as error:
            print(json.dumps([before, ask(fd, b"x")[0], errno.errorcode[error.errno]]))
    """
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code)]
    with SimulatedDevice(Answers()) as device:
        environment = device.environment(os.environ)
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
    out, _ = process.communicate("\n")
    assert json.loads(out) == ["done", "EIO", "ENOENT"]


def test_module_that_hangs_up() -> None:
    code = "print(json.dumps(ask(os.open('/dev/nsm', os.O_RDWR), b'x')[0]))"
    assert in_enclave(Answers(b""), code) == "EIO"


def test_clients_that_vanish(device: SimulatedDevice) -> None:
    """Connections that never ask, or do not wait for the answer, leave the others served."""
    code = """
        import socket
        held = []
        for _ in range(100):
            client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            client.connect(os.environ["NITROSIM_NSM_SOCKET"])
            held.append(client)
            other = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            other.connect(os.environ["NITROSIM_NSM_SOCKET"])
            other.send(b"x")
            other.close()
        fds = [os.open("/dev/nsm", os.O_RDWR) for _ in range(200)]
        print(json.dumps([ask(fds[-1], b"x")[0]]))
    """
    assert run(device, code) == ["done"]


def test_server_without_descriptors_recovers() -> None:
    """The server's own limit is met while clients hold on; it goes on when they let go."""
    code = """
        import socket
        held = []
        for _ in range(60):
            client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            client.connect(os.environ["NITROSIM_NSM_SOCKET"])
            held.append(client)
        for client in held:
            client.close()
        print(json.dumps(ask(os.open("/dev/nsm", os.O_RDWR), b"x")[0]))
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with SimulatedDevice(Answers()) as device:
        used = max(int(name) for name in os.listdir("/proc/self/fd"))
        child = ["prlimit", f"--nofile={soft}:{hard}"]
        command = [*child, sys.executable, "-c", PRELUDE + textwrap.dedent(code)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 24, hard))
        try:
            done = subprocess.run(
                command,
                env=device.environment(os.environ),
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (done.stdout.strip(), done.stderr) == ('"done"', "")


# The device as an object


def test_environment_keeps_what_was_preloaded(device: SimulatedDevice) -> None:
    environment = device.environment({"LD_PRELOAD": "/other.so", "HOME": "/"})
    assert environment == {
        "HOME": "/",
        "LD_PRELOAD": f"{build_shim()} /other.so",
        "NITROSIM_NSM_SOCKET": str(device.socket),
    }


def test_close_leaves_nothing(tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    own = SimulatedDevice(Answers())
    named = SimulatedDevice(Answers(), folder=tmp_path)
    assert stat.S_IMODE(own.socket.parent.stat().st_mode) == 0o755
    assert stat.S_IMODE(named.socket.stat().st_mode) == 0o666
    for device in (own, named, own):
        device.close()
    assert not own.socket.parent.exists()
    assert list(tmp_path.iterdir()) == []
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_folder_whose_path_is_too_long(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 108)
    folder.mkdir()
    with pytest.raises(SimulatorError, match="at most 107 bytes"):
        SimulatedDevice(Answers(), folder=folder)


def test_shim_is_compiled_once(tmp_path: Path) -> None:
    first = build_shim(tmp_path / "cache")
    made = first.stat()
    assert build_shim(tmp_path / "cache") == first
    assert first.stat() == made
    assert list((tmp_path / "cache").iterdir()) == [first]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the shim is kept for every user, in a temporary folder as /tmp is."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "private"))
    return folder / f"nitrosim-{os.geteuid()}"


def test_the_shim_is_kept_where_every_user_can_read_it(shared: Path) -> None:
    before = os.umask(0o077)
    try:
        library = build_shim()
    finally:
        os.umask(before)
    assert library.parent == shared
    assert stat.S_IMODE(shared.stat().st_mode) == 0o755
    assert stat.S_IMODE(library.stat().st_mode) == 0o755
    shared.chmod(0o700)
    assert build_shim() == library
    assert stat.S_IMODE(shared.stat().st_mode) == 0o755


def planted_folder(shared: Path) -> None:
    shared.mkdir()
    shared.chmod(0o777)


def planted_link(shared: Path) -> None:
    (shared.parent / "theirs").mkdir(mode=0o755)
    shared.symlink_to(shared.parent / "theirs")


def planted_file(shared: Path) -> None:
    shared.touch()


def movable(shared: Path) -> None:
    shared.parent.chmod(0o777)


@pytest.mark.parametrize("plant", [planted_folder, planted_link, planted_file, movable])
def test_nobody_else_puts_a_shim_in_the_way(
    shared: Path, tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    plant(shared)
    assert build_shim().parent == tmp_path / "private" / "nitrosim"
    assert not list((shared.parent / "theirs").glob("*"))


def test_a_folder_of_somebody_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, shared: Path, tmp_path: Path
) -> None:
    other = os.geteuid() + 1
    shared.with_name(f"nitrosim-{other}").mkdir(mode=0o755)
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert build_shim().parent == tmp_path / "private" / "nitrosim"


def test_a_path_that_cannot_be_preloaded_is_not_used(
    monkeypatch: pytest.MonkeyPatch, shared: Path, tmp_path: Path
) -> None:
    (tmp_path / "a b").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a b"))
    assert build_shim().parent == tmp_path / "private" / "nitrosim"


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    with pytest.raises(SimulatorError, match="no C compiler: no-such-compiler"):
        build_shim(tmp_path)


def test_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "cc -no-such-option")
    with pytest.raises(SimulatorError, match="no-such-option"):
        build_shim(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SimulatorError, match="cannot build the shim"):
        build_shim(tmp_path / "file")
    with pytest.raises(SimulatorError, match="cannot be preloaded"):
        build_shim(tmp_path / "a b")
    with pytest.raises(SimulatorError, match=os.strerror(errno.ENOENT)):
        SimulatedDevice(Answers(), folder=tmp_path / "missing")
