"""The NSM as Python programs use it: `Nsm` over every transport, against the software NSM.

Each snippet runs in a process of its own, led to the software NSM by the shim: what is tested is
the way through open and ioctl that a program in an enclave takes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import cbor2
import pytest

import nsm
from nitrosim.device import SimulatedDevice
from nitrosim.module import DEFAULT_MODULE_ID, DEFAULT_PCRS, FAULTS, SoftwareNsm
from nitrosim.pki import NsmPki
from nsm import document

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nitrosim.device import Module

ROOT: Final = Path(__file__).parent.parent
LIBRARY: Final = ROOT / "nsm" / "libnsm.so"
CODES: Final = [code.name for code in nsm.ErrorCode if code]
OPERATIONS: Final = {
    "DescribeNSM": "nsm.describe()",
    "DescribePCR": "nsm.describe_pcr(16)",
    "ExtendPCR": "nsm.extend_pcr(16, b'data')",
    "LockPCR": "nsm.lock_pcr(16)",
    "LockPCRs": "nsm.lock_pcrs(16)",
    "Attestation": "nsm.attest()",
    "GetRandom": "nsm.random()",
}

# Runs a snippet with an open `nsm`; prints its `result`, bytes as hex, or the NsmError that ended
# it.
RUNNER: Final = """
import dataclasses, json, os, sys
from nsm import Nsm, NsmError
from nsm.device import Device
from nsm.library import Library

def plain(value):
    return value.hex() if isinstance(value, bytes) else dataclasses.asdict(value)

def shown(error):
    code = error.code and error.code.name
    return {"operation": error.operation, "code": code, "errno": error.errno}

def failure(call):
    try:
        call()
    except NsmError as error:
        return shown(error)

def open_transport():
    return eval(os.environ["TRANSPORT"], {"Device": Device, "Library": Library})

scope = {"open_transport": open_transport, "Nsm": Nsm, "failure": failure, "os": os}
try:
    if "PREPARE" in os.environ:
        exec(os.environ["PREPARE"], scope)
    with Nsm(open_transport()) as scope["nsm"]:
        exec(sys.argv[1], scope)
    answer = scope["result"]
except NsmError as error:
    answer = shown(error)
print(json.dumps(answer, default=plain))
"""


class Answers:
    """A module with prepared answers, one after the other."""

    def __init__(self, answers: Iterable[bytes]) -> None:
        self._answers = iter(answers)

    def answer(self, request: bytes) -> bytes:  # noqa: ARG002 - whatever the question
        return next(self._answers)


def refused(operation: str, code: str) -> dict[str, object]:
    return {"operation": operation, "code": code, "errno": None}


def in_enclave(transport: str, module: Module, code: str) -> Any:
    with SimulatedDevice(module) as device:
        return run(code, device.environment({**os.environ, "TRANSPORT": transport}))


def run(code: str, environment: Mapping[str, str]) -> Any:
    command = [sys.executable, "-c", RUNNER, textwrap.dedent(code)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.fixture(params=["device", "library"])
def transport(request: pytest.FixtureRequest) -> str:
    """The expression that opens a transport."""
    if request.param == "device":
        return "Device()"
    if not LIBRARY.exists():
        pytest.skip("the patched libnsm.so is not built")
    return f"Library({str(LIBRARY)!r})"


@pytest.fixture(scope="module")
def pki() -> NsmPki:
    return NsmPki.generate(now=datetime.now(UTC), module_id=DEFAULT_MODULE_ID)


@pytest.fixture
def module(pki: NsmPki) -> SoftwareNsm:
    return SoftwareNsm(pki)


def test_describe(transport: str, module: SoftwareNsm) -> None:
    assert in_enclave(transport, module, "result = nsm.describe()") == {
        "version": [1, 0, 0],
        "module_id": DEFAULT_MODULE_ID,
        "max_pcrs": 32,
        "locked_pcrs": list(range(16)),
        "digest": "SHA384",
    }


def test_describe_pcr(transport: str, module: SoftwareNsm) -> None:
    result = in_enclave(
        transport, module, "result = [nsm.describe_pcr(index) for index in range(32)]"
    )
    assert result[:16] == [
        {"locked": True, "value": DEFAULT_PCRS[index].hex()} for index in range(16)
    ]
    assert result[16:] == [{"locked": False, "value": bytes(48).hex()}] * 16


def test_extend_pcr(transport: str, module: SoftwareNsm) -> None:
    code = "result = [nsm.extend_pcr(16, b'one'), nsm.extend_pcr(16, b''), nsm.describe_pcr(16)]"
    first = hashlib.sha384(bytes(48) + b"one").digest()
    second = hashlib.sha384(first).digest()
    assert in_enclave(transport, module, code) == [
        first.hex(),
        second.hex(),
        {"locked": False, "value": second.hex()},
    ]


def test_locked_pcr_stays_as_it_is(transport: str, module: SoftwareNsm) -> None:
    code = """
        result = [
            nsm.lock_pcr(16),
            failure(lambda: nsm.lock_pcr(16)),
            failure(lambda: nsm.extend_pcr(16, b"x")),
            failure(lambda: nsm.extend_pcr(0, b"x")),
            nsm.describe_pcr(16),
        ]
    """
    assert in_enclave(transport, module, code) == [
        None,
        refused("LockPCR", "ReadOnlyIndex"),
        refused("ExtendPCR", "ReadOnlyIndex"),
        refused("ExtendPCR", "ReadOnlyIndex"),
        {"locked": True, "value": bytes(48).hex()},
    ]


@pytest.mark.parametrize(("count", "locked"), [(0, 16), (16, 16), (17, 17), (32, 32)])
def test_lock_pcrs(transport: str, module: SoftwareNsm, count: int, locked: int) -> None:
    code = f"result = [nsm.lock_pcrs({count}), nsm.describe().locked_pcrs]"
    assert in_enclave(transport, module, code) == [None, list(range(locked))]


@pytest.mark.parametrize("index", [-1, 32, 255, 256, 65535, 65536, 2**64])
def test_index_out_of_range(transport: str, module: SoftwareNsm, index: int) -> None:
    code = f"""
        result = [failure(call) for call in (
            lambda: nsm.describe_pcr({index}),
            lambda: nsm.extend_pcr({index}, b""),
            lambda: nsm.lock_pcr({index}),
            lambda: nsm.lock_pcrs({index + (index == 32)}),
        )]
    """
    operations = ("DescribePCR", "ExtendPCR", "LockPCR", "LockPCRs")
    assert in_enclave(transport, module, code) == [
        refused(name, "InvalidIndex") for name in operations
    ]


@pytest.mark.parametrize(
    "fields", [(None, None, None), (b"", b"", b"\x00"), (b"user", b"nonce", b"key" * 98)]
)
def test_document_holds_what_was_asked_for(
    transport: str, module: SoftwareNsm, pki: NsmPki, fields: tuple[bytes | None, ...]
) -> None:
    data = bytes.fromhex(in_enclave(transport, module, f"result = nsm.attest(*{fields})"))
    found = document.verify(data, roots=[pki.root_sha256]).document
    assert (found.user_data, found.nonce, found.public_key) == fields
    assert found.module_id == DEFAULT_MODULE_ID
    assert dict(found.pcrs) == dict(DEFAULT_PCRS)


def test_document_holds_the_locked_pcrs_of_the_application(
    transport: str, module: SoftwareNsm, pki: NsmPki
) -> None:
    code = (
        "nsm.extend_pcr(16, b'x'); nsm.extend_pcr(17, b'x'); nsm.lock_pcr(16); "
        "result = nsm.attest()"
    )
    data = bytes.fromhex(in_enclave(transport, module, code))
    found = document.verify(data, roots=[pki.root_sha256]).document
    assert dict(found.pcrs) == {**DEFAULT_PCRS, 16: hashlib.sha384(bytes(48) + b"x").digest()}


def test_document_as_long_as_the_device_allows(transport: str) -> None:
    longest = bytes(range(256)) * 48
    longest = longest[: nsm.RESPONSE_MAX - 26]  # what {"Attestation": {"document": ...}} takes
    answer = cbor2.dumps({"Attestation": {"document": longest}})
    assert len(answer) == nsm.RESPONSE_MAX
    assert in_enclave(transport, Answers([answer]), "result = nsm.attest()") == longest.hex()


@pytest.mark.parametrize(
    ("call", "operation", "largest"),
    [
        ("nsm.attest(user_data=bytes({}))", "Attestation", 4050),
        ("nsm.attest(nonce=bytes({}))", "Attestation", 4050),
        ("nsm.attest(public_key=bytes({}))", "Attestation", 4050),
        ("nsm.extend_pcr(16, bytes({}))", "ExtendPCR", 4069),
    ],
)
def test_request_size_ends_at_4096_bytes(
    transport: str, module: SoftwareNsm, call: str, operation: str, largest: int
) -> None:
    sizes = (largest, largest + 1, 4096, 4097, 100_000)
    calls = ", ".join(f"lambda: {call.format(size)}" for size in sizes)
    result = in_enclave(transport, module, f"result = [failure(call) for call in ({calls})]")
    assert result == [None, *[refused(operation, "InputTooLarge")] * 4]


def test_fields_that_are_too_large_together(transport: str, module: SoftwareNsm) -> None:
    code = "result = nsm.attest(bytes(1500), bytes(1500), bytes(1500))"
    assert in_enclave(transport, module, code) == refused("Attestation", "InputTooLarge")


def test_random(transport: str, module: SoftwareNsm) -> None:
    code = (
        "result = [nsm.random(length) for length in (0, 1, 255, 256, 257, 1000)] + [nsm.random()]"
    )
    result = in_enclave(transport, module, code)
    assert [len(text) // 2 for text in result] == [0, 1, 255, 256, 257, 1000, 256]
    parts = {text[start : start + 64] for text in result for start in range(0, len(text) - 63, 64)}
    assert len(parts) == 7 + 8 + 8 + 31 + 8  # no 32 bytes came twice


def test_random_without_bytes_is_an_error(transport: str, pki: NsmPki) -> None:
    module = SoftwareNsm(pki, fault="nsm-empty-random")
    assert in_enclave(transport, module, "result = nsm.random(1)") == refused(
        "GetRandom", "InvalidResponse"
    )


@pytest.mark.parametrize("code", CODES)
def test_every_error_of_the_nsm_keeps_its_name(transport: str, code: str) -> None:
    answers = Answers([cbor2.dumps({"Error": code})] * len(OPERATIONS))
    calls = ", ".join(f"lambda: {call}" for call in OPERATIONS.values())
    result = in_enclave(transport, answers, f"result = [failure(call) for call in ({calls})]")
    assert result == [refused(operation, code) for operation in OPERATIONS]


@pytest.mark.parametrize("fault", [name for name in FAULTS if name.startswith("nsm-")])
def test_every_fault_of_the_nsm_is_an_error(transport: str, pki: NsmPki, fault: str) -> None:
    by_name = {code.lower(): code for code in CODES}
    by_name |= {
        "garbage": "InternalError",
        "wrongkind": "InvalidResponse",
        "emptyrandom": "InvalidResponse",
    }
    expected = by_name[fault.removeprefix("nsm-").replace("-", "")]
    module = SoftwareNsm(pki, fault=fault)
    assert in_enclave(transport, module, "result = nsm.random()") == refused("GetRandom", expected)


UNDECODABLE: Final = {
    "no CBOR": b"\xff",
    "cut short": cbor2.dumps("LockPCR")[:-1],
    "trailing bytes": cbor2.dumps("LockPCR") + b"\x00",
}


@pytest.mark.parametrize("answer", UNDECODABLE.values(), ids=UNDECODABLE)
def test_undecodable_answer(transport: str, answer: bytes) -> None:
    assert in_enclave(transport, Answers([answer]), "result = nsm.lock_pcr(16)") == refused(
        "LockPCR", "InternalError"
    )


@pytest.mark.parametrize("operation", OPERATIONS)
def test_answer_to_another_question(transport: str, pki: NsmPki, operation: str) -> None:
    module = SoftwareNsm(pki, fault="nsm-wrong-kind")
    result = in_enclave(transport, module, f"result = {OPERATIONS[operation]}")
    assert result == refused(operation, "InvalidResponse")


def test_answers_of_the_wrong_type() -> None:
    answers: list[object] = [
        7,
        [],
        {},
        {"Error": "NoSuchError"},
        {"Error": 8},
        {"DescribePCR": {}, "LockPCR": {}},
        {"DescribePCR": None},
        {"DescribePCR": {"lock": 1, "data": b""}},
        {"DescribePCR": {"lock": True, "data": "text"}},
        {"DescribePCR": {"lock": True}},
        "DescribePCR",
    ]
    code = f"result = [failure(lambda: nsm.describe_pcr(0)) for _ in range({len(answers)})]"
    result = in_enclave("Device()", Answers(map(cbor2.dumps, answers)), code)
    assert result == [refused("DescribePCR", "InvalidResponse")] * len(answers)


def test_no_damaged_answer_raises_anything_else(pki: NsmPki) -> None:
    """Every truncation and bit flip of two answers: the snippet would end with a traceback."""
    module = SoftwareNsm(pki)
    requests = {
        "describe()": cbor2.dumps("DescribeNSM"),
        "describe_pcr(3)": cbor2.dumps({"DescribePCR": {"index": 3}}),
    }
    for call, request in requests.items():
        answer = module.answer(request)
        damaged = [answer[:end] for end in range(1, len(answer))]
        damaged += [
            (int.from_bytes(answer) ^ 1 << bit).to_bytes(len(answer))
            for bit in range(8 * len(answer))
        ]
        code = f"result = [failure(lambda: nsm.{call}) for _ in range({len(damaged)})]"
        result = in_enclave("Device()", Answers(damaged), code)
        assert None not in result[: len(answer) - 1]
        assert {error["errno"] for error in result if error} == {None}


def test_closed(transport: str, module: SoftwareNsm) -> None:
    calls = ", ".join(f"lambda: {call}" for call in OPERATIONS.values())
    code = f"nsm.close(); nsm.close(); result = [failure(call) for call in ({calls})]"
    assert in_enclave(transport, module, code) == [
        refused(name, "InvalidOperation") for name in OPERATIONS
    ]


def test_close_gives_the_descriptor_back(transport: str, module: SoftwareNsm) -> None:
    code = """
        before = os.listdir("/proc/self/fd")
        with Nsm(open_transport()) as other:
            other.describe()
            inside = os.listdir("/proc/self/fd")
        result = [len(inside) - len(before), os.listdir("/proc/self/fd") == before]
    """
    assert in_enclave(transport, module, code) == [1, True]


def test_descriptor_is_not_inherited(module: SoftwareNsm) -> None:
    code = "result = os.get_inheritable(nsm._transport._fd)"
    assert in_enclave("Device()", module, code) is False


def test_without_a_device(transport: str, module: SoftwareNsm) -> None:
    with SimulatedDevice(module) as device:
        environment = device.environment({**os.environ, "TRANSPORT": transport})
    result = run("result = nsm.describe()", environment)
    assert result == {"operation": "open", "code": None, "errno": 2}  # ENOENT


def test_without_permission(transport: str, module: SoftwareNsm) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody whom the device keeps out")
    with SimulatedDevice(module) as device:
        device.socket.chmod(0o600)  # the simulator's own device is everybody's
        variables = {"TRANSPORT": transport, "PREPARE": "os.setgroups([]); os.setuid(65534)"}
        result = run("result = nsm.describe()", device.environment({**os.environ, **variables}))
    assert result == {"operation": "open", "code": None, "errno": 13}  # EACCES


def test_errno_of_a_failed_ioctl(module: SoftwareNsm) -> None:
    code = """
        fd = os.open("/dev/null", os.O_RDWR)
        os.dup2(fd, nsm._transport._fd)
        result = nsm.describe()
    """
    result = in_enclave("Device()", module, code)
    assert result == {"operation": "DescribeNSM", "code": None, "errno": 25}  # ENOTTY


def test_one_nsm_in_many_threads(transport: str, module: SoftwareNsm) -> None:
    code = """
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(8) as pool:
            values = list(pool.map(lambda n: nsm.extend_pcr(16, bytes([n])), range(64)))
            pcrs = list(pool.map(lambda _: nsm.describe_pcr(3), range(64)))
        locked = set(pcr.locked for pcr in pcrs)
        result = [len(set(values)), nsm.describe_pcr(16).value in values, locked == {True}]
    """
    assert in_enclave(transport, module, code) == [64, True, True]


def test_importing_opens_nothing() -> None:
    code = "import sys, nsm; sys.exit('cbor2' in sys.modules or 'nsm.device' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
