"""The NitroTPM as a source of documents: its commands, its index, and what can go wrong with them.

The software TPM of nitrosim answers; where swtpm is installed, that judges the standard commands.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitrosim import tpm as simulator
from nitrosim.pki import NsmPki
from nitrosim.tpm import DEFAULT_MODULE_ID, SoftwareTpm
from nsm import Nsm, NsmError, SetupError
from nsm.document import Expectations, verify
from nsm.module import ErrorCode
from nsm.source import chosen, explain, find_transport
from nsm.tpm import INDEX_SIZE, INDEXES, NitroTpm
from nsm.tpm2 import AUTH_READ, AUTH_WRITE, DeviceNode, NvPublic, Tpm2, TpmError, vendor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

KEY: Final = b"k" * 294
HEADER: Final = struct.Struct(">HII")
NSM_REQUEST: Final = 0x2000_0001
NV_WRITE: Final = 0x137


@pytest.fixture(scope="module")
def pki() -> NsmPki:
    return NsmPki.generate(now=datetime.now(UTC), module_id=DEFAULT_MODULE_ID)


class InProcess:
    """A channel to a software TPM in this process; `spoil` may change each response."""

    name = "a software TPM"

    def __init__(
        self, tpm: SoftwareTpm, spoil: Callable[[int, bytes], bytes] | None = None
    ) -> None:
        self.tpm = tpm
        self.commands: list[int] = []
        self._spoil = spoil
        self.closed = 0

    def exchange(self, command: bytes) -> bytes:
        code = HEADER.unpack_from(command)[2]
        self.commands.append(code)
        answer = self.tpm.answer(command)
        return self._spoil(code, answer) if self._spoil else answer

    def close(self) -> None:
        self.closed += 1


def refusal(pki: NsmPki, fault: str) -> TpmError:
    tpm = SoftwareTpm(pki, fault=fault)
    with pytest.raises(TpmError) as caught, Nsm(NitroTpm(InProcess(tpm))) as module:
        module.attest(public_key=KEY)
    assert not tpm.indexes
    return caught.value


# ---- documents


def test_a_document_holds_what_was_asked_for_and_no_index_remains(pki: NsmPki) -> None:
    tpm = SoftwareTpm(pki, pcrs={4: b"\x04" * 48})
    with Nsm(NitroTpm(InProcess(tpm))) as module:
        assert (module.source, module.title) == ("nitrotpm", "NitroTPM")
        document = module.attest(user_data=b"", nonce=b"n" * 1024, public_key=KEY)
    expect = Expectations(
        source="nitrotpm",
        nitrotpm_pcrs=tpm.pcrs,
        user_data=b"",
        nonce=b"n" * 1024,
        public_key=KEY,
        module_id=DEFAULT_MODULE_ID,
    )
    verified = verify(document, roots=[pki.root_sha256], expect=expect)
    assert verified.document.nitrotpm_pcrs[4] == b"\x04" * 48
    assert not tpm.indexes


def test_the_largest_fields_and_more_than_a_request_holds(pki: NsmPki) -> None:
    """Each field of a document has 1024 bytes at most; all three are in the index twice over."""
    with Nsm(NitroTpm(InProcess(SoftwareTpm(pki)))) as module:
        fields = {name: bytes(1024) for name in ("user_data", "nonce", "public_key")}
        assert len(module.attest(**fields)) <= INDEX_SIZE
        with pytest.raises(NsmError) as caught:
            module.attest(user_data=bytes(4090))
        assert caught.value.code is ErrorCode.InputTooLarge


def test_the_module_describes_itself(pki: NsmPki) -> None:
    tpm = SoftwareTpm(pki)
    with Nsm(NitroTpm(InProcess(tpm))) as module:
        description = module.describe()
        assert (description.module_id, description.digest) == (DEFAULT_MODULE_ID, "SHA384")
        assert (description.max_pcrs, description.locked_pcrs) == (24, ())
        assert [module.describe_pcr(index).value for index in range(24)] == [*tpm.pcrs.values()]
        assert len({module.random(300) for _ in range(3)}) == 3
        for refused in (
            lambda: module.extend_pcr(23, b"x"),
            lambda: module.lock_pcr(23),
            lambda: module.lock_pcrs(24),
        ):
            with pytest.raises(TpmError, match="neither extended nor locked"):
                refused()
        with pytest.raises(TpmError, match="InvalidIndex"):
            module.describe_pcr(24)


@pytest.mark.parametrize("fault", ["no-public-key", "other-public-key"])
def test_a_document_of_somebody_else_is_refused(pki: NsmPki, fault: str) -> None:
    assert "uses the same index" in str(refusal(pki, fault))


def test_a_request_that_was_exchanged_once_is_made_again(pki: NsmPki) -> None:
    """Between our request and Amazon's command another program writes its own into the index."""
    tpm = SoftwareTpm(pki)
    others = InProcess(tpm)

    def interpose(code: int, answer: bytes) -> bytes:
        if code == NV_WRITE and not others.commands:  # once, behind our NV_Write
            (index,) = tpm.indexes
            Tpm2(others).write(index, b"\xa1kAttestation\xa3iuser_data\xf6enonce\xf6jpublic_keyAx")
        return answer

    channel = InProcess(tpm, interpose)
    with Nsm(NitroTpm(channel)) as module:
        document = module.attest(public_key=KEY)
    verify(
        document,
        roots=[pki.root_sha256],
        expect=Expectations(source="nitrotpm", public_key=KEY),
    )
    assert channel.commands.count(NSM_REQUEST) == 2


# ---- faults


@pytest.mark.parametrize(
    ("fault", "said", "hinted"),
    [
        ("tpm-other-vendor", "is a TPM of 'SW   TPM', not of 'NitroTPM'", "TPM support v2.0"),
        ("tpm-no-nsm", "TPM2_VENDOR_AWS_NSM_REQUEST: TPM_RC_COMMAND_CODE (0x143)", "/dev/tpm0"),
        ("tpm-no-room", "TPM2_NV_DefineSpace: TPM_RC_NV_SPACE (0x14b)", "tpm2_nvundefine"),
        ("tpm-owner-password", "TPM2_NV_DefineSpace: TPM_RC_BAD_AUTH (0x9a2)", "password"),
        ("tpm-always-busy", "TPM2_GetCapability: TPM_RC_RETRY (0x922)", ""),
        ("tpm-lockout", "TPM2_NV_Write: TPM_RC_LOCKOUT (0x921)", "lockout"),
        ("tpm-cut-short", "TPM2_GetCapability: InvalidResponse: answer of the TPM", ""),
        ("tpm-garbage", "Attestation: InternalError: answer is no CBOR", ""),
        ("tpm-vanishing-index", "uses the same index", ""),
        ("nsm-garbage", "Attestation: InternalError: answer is no CBOR", ""),
        ("nsm-wrong-kind", "Attestation: InvalidResponse", ""),
        ("nsm-invalid-operation", "Attestation: InvalidOperation", ""),
        ("nsm-input-too-large", "Attestation: InputTooLarge", ""),
    ],
)
def test_every_fault_is_named(
    pki: NsmPki, fault: str, said: str, hinted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsm.tpm2._PAUSES", (0.0, 0.0))
    error = refusal(pki, fault)
    reason, hints = explain(error)
    assert said in reason
    assert "NitroTPM" in reason
    assert (hinted in "; ".join(hints)) if hinted else hints == ()


def test_all_faults_of_the_tpm_are_tested_here() -> None:
    (mark,) = [
        mark
        for mark in test_every_fault_is_named.pytestmark  # type: ignore[attr-defined]
        if mark.name == "parametrize"
    ]
    assert set(simulator.FAULTS) - {"tpm-busy", "tpm-unlisted-nsm"} <= {
        case[0] for case in mark.args[1]
    }


def test_a_busy_tpm_is_asked_again(pki: NsmPki) -> None:
    with Nsm(NitroTpm(InProcess(SoftwareTpm(pki, fault="tpm-busy")))) as module:
        assert module.attest(public_key=KEY)


@pytest.mark.parametrize(
    ("fault", "node"),
    [(None, "/dev/tpmrm0"), ("tpm-unlisted-nsm", "/dev/tpm0"), ("tpm-no-nsm", "/dev/tpm0")],
)
def test_the_bare_device_where_the_resource_manager_would_not_do(
    pki: NsmPki, monkeypatch: pytest.MonkeyPatch, fault: str | None, node: str
) -> None:
    """It passes on what the TPM lists; that is asked before anything else is."""
    tpm = SoftwareTpm(pki, fault=fault)
    opened: list[InProcess] = []

    def open_node(path: str) -> InProcess:
        opened.append(InProcess(tpm))
        opened[-1].name = path
        return opened[-1]

    monkeypatch.setattr("nsm.tpm.DeviceNode", open_node)
    with Nsm(NitroTpm.on_this_machine()) as module:
        assert module.transport_name == node
    assert [channel.closed for channel in opened] == [1] * len(opened)


def test_a_refused_open_closes_the_device(pki: NsmPki) -> None:
    channel = InProcess(SoftwareTpm(pki, fault="tpm-other-vendor"))
    with pytest.raises(TpmError) as caught:
        NitroTpm(channel)
    assert (caught.value.errno, channel.closed) == (errno.ENODEV, 1)


@pytest.mark.parametrize("kind", ["file", "fifo", "socket", "link"])
def test_what_is_no_device_is_not_written_to(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    target = tmp_path / "precious"
    target.write_bytes(b"precious")
    match kind:
        case "file":
            path = target
        case "fifo":
            os.mkfifo(path)
        case "socket":
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(path))
            listener.close()
        case "link":
            path.symlink_to(target)
    with pytest.raises(TpmError) as caught:
        DeviceNode(str(path))
    assert (caught.value.errno, target.read_bytes()) == (errno.ENODEV, b"precious")
    assert f"{path} is no device" in explain(caught.value)[0]


@pytest.mark.parametrize("fault", ["tpm-always-busy", "tpm-cut-short"])
def test_an_error_of_the_list_is_no_reason_for_the_bare_device(
    pki: NsmPki, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("nsm.tpm2._PAUSES", (0.0, 0.0))
    opened: list[str] = []
    well, ill = SoftwareTpm(pki), SoftwareTpm(pki, fault=fault)
    lists = Tpm2.lists_nsm_request

    def open_node(path: str) -> InProcess:
        opened.append(path)
        return InProcess(well)

    def fail(_: Tpm2) -> bool:
        return lists(Tpm2(InProcess(ill)))

    monkeypatch.setattr("nsm.tpm.DeviceNode", open_node)
    monkeypatch.setattr("nsm.tpm.Tpm2.lists_nsm_request", fail)
    with pytest.raises(TpmError):
        NitroTpm.on_this_machine()
    assert opened == ["/dev/tpmrm0"]


def test_a_device_that_cannot_be_opened_or_talked_to_says_so(tmp_path: Path) -> None:
    for path, number in ((tmp_path / "absent", errno.ENOENT), (tmp_path, errno.ENODEV)):
        with pytest.raises(TpmError) as caught:
            DeviceNode(str(path))
        assert caught.value.errno == number
        assert explain(caught.value)[0].startswith("no NitroTPM: open: ")
    with pytest.raises(TpmError) as caught:
        NitroTpm(DeviceNode("/dev/null"))
    assert "InvalidResponse" in str(caught.value)
    with pytest.raises(TpmError) as caught:
        NitroTpm(DeviceNode("/dev/full"))
    assert caught.value.errno == errno.ENOSPC


def test_every_truncated_response_is_refused(pki: NsmPki) -> None:
    """Of every kind of command; the header says the new length, so that parameters are cut."""
    tpm = SoftwareTpm(pki)
    whole = InProcess(tpm)
    with Nsm(NitroTpm(whole)) as module:
        module.attest(public_key=KEY)
        module.random(1)
        module.describe_pcr(0)
    Tpm2(whole).define(INDEXES[0], 10)
    Tpm2(whole).read_public(INDEXES[0])
    for code in {*whole.commands} - {0x122}:  # NV_UndefineSpace cleans up, its failure is no news
        for keep in (*range(40), -1):
            cut = _cutting(code, keep)
            with pytest.raises(TpmError), Nsm(NitroTpm(InProcess(tpm, cut))) as module:
                _use_everything(module, Tpm2(InProcess(tpm, cut)))


def _use_everything(module: Nsm, tpm: Tpm2) -> None:
    module.attest(public_key=KEY)
    module.random(1)
    module.describe_pcr(0)
    tpm.read_public(INDEXES[0])


def _cutting(wanted: int, keep: int) -> Callable[[int, bytes], bytes]:
    def cut(code: int, answer: bytes) -> bytes:
        if code != wanted or len(answer[:keep]) == len(answer):
            return answer[:-1] if code == wanted else answer
        shorter = answer[:keep]
        return shorter[:2] + struct.pack(">I", len(shorter)) + shorter[6:]

    return cut


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=64), st.booleans())
def test_arbitrary_responses_raise_only_our_errors(data: bytes, framed: bool) -> None:
    class Answers:
        name = "x"

        def exchange(self, command: bytes) -> bytes:
            if not framed:
                return data
            return command[:2] + struct.pack(">II", 10 + len(data), 0) + data

        def close(self) -> None:
            pass

    tpm = Tpm2(Answers())
    for ask in (
        lambda: tpm.properties(0x106, 4),
        lambda: tpm.handles(0, 1),
        lambda: tpm.random(1),
        lambda: tpm.pcr(0),
        lambda: tpm.read_public(1),
        lambda: tpm.read(1, 8),
        lambda: tpm.write(1, b"x"),
        lambda: tpm.nsm_request(1),
        lambda: vendor(tpm),
    ):
        with contextlib.suppress(TpmError):
            ask()


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([0x122, 0x12A, 0x137, 0x14E, 0x169, 0x17A, 0x17B, 0x17E, NSM_REQUEST, 0x144]),
    st.sampled_from([0x8001, 0x8002, 0x00C4]),
    st.binary(max_size=80),
)
def test_the_software_tpm_answers_everything(code: int, tag: int, body: bytes) -> None:
    tpm = SoftwareTpm(_PKI)
    answer = tpm.answer(HEADER.pack(tag, HEADER.size + len(body), code) + body)
    assert HEADER.unpack_from(answer)[1] == len(answer)


_PKI: Final = NsmPki.generate(now=datetime.now(UTC), module_id=DEFAULT_MODULE_ID)

# ---- what a killed run leaves behind


class Dies(InProcess):
    """A channel whose process is killed behind so many commands: nothing follows, no clean-up."""

    def __init__(self, tpm: SoftwareTpm, after: int) -> None:
        super().__init__(tpm)
        self._left = after

    def exchange(self, command: bytes) -> bytes:
        if self._left == 0:
            raise OSError(errno.EIO, "killed")
        self._left -= 1
        return super().exchange(command)


def test_killed_at_every_command_no_index_remains_after_the_next_run(pki: NsmPki) -> None:
    tpm = SoftwareTpm(pki)
    whole = InProcess(tpm)
    NitroTpm(whole).attest(None, None, KEY)
    left = 0
    for count in range(len(whole.commands)):
        with contextlib.suppress(TpmError):  # the last command only cleans up
            NitroTpm(Dies(tpm, count)).attest(None, None, KEY)
        left += len(tpm.indexes)
        assert len(tpm.indexes) <= 1
        NitroTpm(InProcess(tpm)).attest(None, None, KEY)
        assert not tpm.indexes
    assert left > 10  # most of them did leave one behind


def test_many_killed_runs_in_a_row_fill_nothing(pki: NsmPki) -> None:
    """More of them than there are indexes of ours, or room in the TPM."""
    tpm = SoftwareTpm(pki)
    for number in range(3 * len(INDEXES)):
        after = 4 + number % 8
        with contextlib.suppress(TpmError):
            NitroTpm(Dies(tpm, after)).attest(None, None, KEY)
    for handle in INDEXES:
        with contextlib.suppress(TpmError):
            Tpm2(InProcess(tpm)).define(handle, INDEX_SIZE)
    assert len(tpm.indexes) == len(INDEXES)
    NitroTpm(InProcess(tpm)).attest(None, None, KEY)
    assert not tpm.indexes


def test_room_is_made_of_what_was_left_behind_alone(pki: NsmPki) -> None:
    tpm = SoftwareTpm(pki)
    other = Tpm2(InProcess(tpm))
    for number in range(18):  # 18 of 20 that fit
        other.define(0x0100_0000 + number, simulator.NV_INDEX_MAX)
    for handle in INDEXES[:2]:
        other.define(handle, INDEX_SIZE)
    NitroTpm(InProcess(tpm)).attest(None, None, KEY)
    assert sorted(tpm.indexes) == [0x0100_0000 + number for number in range(18)]


def test_a_run_takes_an_index_from_another_one_once_at_most(pki: NsmPki) -> None:
    """The schedule that is worst for whoever is slow: before each of its writes fifteen others end.

    Each of them saw the index of the slow one, and takes it for left behind.
    """
    tpm = SoftwareTpm(pki)
    faster = len(INDEXES) - 1
    ended = 0

    class Slow(InProcess):
        def exchange(self, command: bytes) -> bytes:
            nonlocal ended
            if HEADER.unpack_from(command)[2] == NV_WRITE and ended < faster:
                ended += 1
                NitroTpm(InProcess(tpm)).attest(None, None, b"faster")
            return super().exchange(command)

    slow = Slow(tpm)
    document = NitroTpm(slow).attest(None, None, KEY)
    assert KEY in document
    assert ended == faster
    assert slow.commands.count(NV_WRITE) == faster + 1
    assert not tpm.indexes


def test_one_that_has_begun_anew_does_not_tidy(pki: NsmPki) -> None:
    tpm = SoftwareTpm(pki)
    other = Tpm2(InProcess(tpm))

    class Interfered(InProcess):
        """Loses its index before its first write, to somebody who is alive."""

        def exchange(self, command: bytes) -> bytes:
            code = HEADER.unpack_from(command)[2]
            if code == NV_WRITE and NV_WRITE not in self.commands:
                other.undefine(next(handle for handle in tpm.indexes if handle != INDEXES[0]))
            return super().exchange(command)

    other.define(INDEXES[0], INDEX_SIZE)
    NitroTpm(Interfered(tpm)).attest(None, None, KEY)
    assert list(tpm.indexes) == [INDEXES[0]]
    NitroTpm(InProcess(tpm)).attest(None, None, KEY)
    assert not tpm.indexes


def test_indexes_that_are_not_like_ours_are_left_alone(pki: NsmPki) -> None:
    tpm = SoftwareTpm(pki)
    other = Tpm2(InProcess(tpm))
    other.define(INDEXES[0], INDEX_SIZE, AUTH_READ)
    other.define(INDEXES[1], INDEX_SIZE - 1)
    other.define(INDEXES.stop, INDEX_SIZE)
    other.define(INDEXES.start - 1, INDEX_SIZE)
    before = sorted(tpm.indexes)
    for _ in range(20):
        NitroTpm(InProcess(tpm)).attest(None, None, KEY)
    assert sorted(tpm.indexes) == before


def test_runs_at_the_same_time_leave_each_other_alone(pki: NsmPki) -> None:
    tpm = SoftwareTpm(pki)
    documents: list[bytes] = []

    def run(number: int) -> None:
        key = bytes([number]) * 294
        document = NitroTpm(InProcess(tpm)).attest(None, None, key)
        assert key in document
        documents.append(document)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(documents) == 12
    NitroTpm(InProcess(tpm)).attest(None, None, KEY)
    assert not tpm.indexes


# ---- the choice


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, ("auto", None)),
        ({"NSM_SOURCE": ""}, ("auto", None)),
        ({"NSM_SOURCE": "nsm"}, ("nsm", None)),
        ({"NSM_SOURCE": "nitrotpm"}, ("nitrotpm", None)),
        ({"NSM_TPM": "/dev/tpm0"}, ("nitrotpm", "/dev/tpm0")),
        ({"NSM_SOURCE": "auto", "NSM_TPM": "/dev/tpm0"}, ("nitrotpm", "/dev/tpm0")),
        ({"NSM_LIBRARY": "lib.so"}, ("nsm", None)),
        ({"NSM_SOURCE": "nsm", "NSM_LIBRARY": "lib.so"}, ("nsm", None)),
    ],
    ids=str,
)
def test_the_environment_chooses(
    environment: dict[str, str], found: tuple[str, str | None]
) -> None:
    assert chosen(environment) == found


@pytest.mark.parametrize(
    "environment",
    [
        {"NSM_SOURCE": "tpm"},
        {"NSM_SOURCE": "nsm", "NSM_TPM": "/dev/tpm0"},
        {"NSM_LIBRARY": "lib.so", "NSM_TPM": "/dev/tpm0"},
        {"NSM_LIBRARY": "lib.so", "NSM_SOURCE": "nitrotpm"},
    ],
    ids=str,
)
def test_contradictions_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(SetupError):
        chosen(environment)


def test_a_machine_with_a_tpm_and_no_nsm_is_told_of_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as a laptop, whose user may not open its TPM."""

    def refuse(path: str) -> None:
        raise TpmError("open", errno=errno.EACCES, detail=path)

    monkeypatch.setattr("nsm.tpm.DeviceNode", refuse)
    monkeypatch.setattr("os.path.exists", lambda path: path == "/dev/tpmrm0")
    for name in ("NSM_SOURCE", "NSM_TPM", "NSM_LIBRARY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TpmError) as caught:
        find_transport()
    reason, hints = explain(caught.value)
    assert reason == (
        "NitroTPM not opened: open: EACCES (Permission denied): /dev/tpmrm0, "
        "tried because there is no /dev/nsm"
    )
    assert "permission" in hints[0]


# ---- another judge: swtpm

needs_swtpm = pytest.mark.skipif(not shutil.which("swtpm"), reason="swtpm is not installed")


class Stream:
    """A channel to swtpm, which has no messages but lengths."""

    name = "swtpm"

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def exchange(self, command: bytes) -> bytes:
        self._socket.sendall(command)
        answer = b""
        while len(answer) < HEADER.size or len(answer) < HEADER.unpack_from(answer)[1]:
            piece = self._socket.recv(4096)
            if not piece:
                raise OSError(errno.EIO, "swtpm hung up")
            answer += piece
        return answer

    def close(self) -> None:
        self._socket.close()


def _connected(path: Path) -> Stream:
    """A channel to a swtpm that is starting: its socket is there before it listens."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(60)
    for _ in range(600):
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            connection.connect(str(path))
            return Stream(connection)
        time.sleep(0.05)
    connection.close()
    return pytest.fail("swtpm does not start")


@pytest.fixture
def swtpm(tmp_path: Path) -> Iterator[Stream]:
    path = tmp_path / "tpm.sock"
    process = subprocess.Popen(
        [
            *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}"),
            *("--server", f"type=unixio,path={path}", "--ctrl", f"type=unixio,path={path}.ctrl"),
            *("--flags", "not-need-init,startup-clear"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with contextlib.closing(_connected(path)) as channel:
            yield channel
    finally:
        process.kill()
        process.wait()


def codes(tpm: Tpm2, wanted: int) -> dict[str, int]:
    """The response codes of what must be refused; `wanted` is an index of 100 bytes."""

    def code(ask: Callable[[], object]) -> int:
        with pytest.raises(TpmError) as caught:
            ask()
        return caught.value.rc

    absent = wanted + 1
    return {
        "define again": code(lambda: tpm.define(wanted, 100)),
        "define too much": code(lambda: tpm.define(absent, 0xFFFF)),
        "read nothing": code(lambda: tpm.read(absent, 1)),
        "read unwritten": code(lambda: tpm.read(wanted, 1)),
        "write nothing": code(lambda: tpm.write(absent, b"x")),
        "write too much": code(lambda: tpm.write(wanted, bytes(101))),
        "undefine nothing": code(lambda: tpm.undefine(absent)),
        "public of nothing": code(lambda: tpm.read_public(absent)),
        "another vendor's": code(lambda: tpm._ask(0x2000_0002, (), b"")),
    }


@pytest.fixture
def _unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("nsm.tpm2").tpm2._NAMES, 0x2000_0002, "unknown")


@needs_swtpm
@pytest.mark.usefixtures("_unknown")
def test_swtpm_refuses_as_the_software_tpm_does(swtpm: Stream, pki: NsmPki) -> None:
    other, ours = Tpm2(swtpm), Tpm2(InProcess(SoftwareTpm(pki)))
    for tpm in (other, ours):
        tpm.define(INDEXES[0], 100)
    assert codes(other, INDEXES[0]) == codes(ours, INDEXES[0])


@needs_swtpm
def test_swtpm_takes_the_standard_commands(swtpm: Stream) -> None:
    tpm = Tpm2(swtpm)
    chunk = tpm.properties(0x12C, 1)[0x12C]
    largest = tpm.properties(0x117, 1)[0x117]
    assert vendor(tpm).startswith("SW")
    assert not tpm.lists_nsm_request()
    assert len(tpm.pcr(0)) == len(tpm.pcr(23)) == 48
    assert tpm.pcr(17) == b"\xff" * 48
    assert tpm.random(16) != tpm.random(16)
    for size in sorted({1, chunk - 1, chunk, chunk + 1, largest - 1, largest}):
        data = os.urandom(size)
        tpm.define(INDEXES[3], size)
        assert tpm.read_public(INDEXES[3]) == NvPublic(size, AUTH_READ | AUTH_WRITE)
        tpm.write(INDEXES[3], data)
        assert tpm.read(INDEXES[3], size) == data
        assert tpm.handles(INDEXES.start, 16) == [INDEXES[3]]
        tpm.undefine(INDEXES[3])
        assert tpm.handles(INDEXES.start, 16) == []


@needs_swtpm
def test_swtpm_is_no_nitrotpm(swtpm: Stream) -> None:
    with pytest.raises(TpmError, match="not of 'NitroTPM'"):
        NitroTpm(swtpm)
