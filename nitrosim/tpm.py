"""A NitroTPM in software: TPM 2.0 commands in, responses out, and attestation documents by Amazon's
command.

It knows what a client of such documents needs: capabilities, randomness, PCRs of SHA-384, indexes
of the non-volatile memory. Citations are of the TPM 2.0 Library specification, revision 1.59. What
no public source tells of the hardware is assumed: sizes are those of TPMs in software, and indexes
live as long as the simulator.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from nitrosim.device import SilenceError
from nitrosim.module import FAULTS as NSM_FAULTS
from nitrosim.module import PCR_SIZE, ZERO_PCR, SoftwareNsm, extended
from nsm import cbor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nitrosim.pki import NsmPki

DEFAULT_MODULE_ID: Final = "i-0123456789abcdef0-tpm0000000000000000"
PCR_COUNT: Final = 24
LAUNCH_PCRS: Final = range(17, 23)  # of a measured launch: all ones, as none took place
NV_BUFFER_MAX: Final = 1024  # bytes of an index in one command
NV_INDEX_MAX: Final = 8192  # bytes of an index
NV_ROOM: Final = 20 * NV_INDEX_MAX  # bytes of all of them
_COMMAND_MAX: Final = 4096

FAULTS: Final[Mapping[str, str]] = {
    "tpm-other-vendor": "the TPM is somebody else's, not Nitro's",
    "tpm-no-nsm": "the TPM does not know Amazon's command, as behind an old resource manager",
    "tpm-unlisted-nsm": "the TPM does not list Amazon's command, which it knows",
    "tpm-no-room": "the TPM has no room for another index",
    "tpm-owner-password": "the owner of the TPM has set a password",
    "tpm-busy": "the TPM asks to send each first command again",
    "tpm-always-busy": "the TPM asks to send every command again, for ever",
    "tpm-lockout": "the TPM is locked after too many wrong passwords",
    "tpm-cut-short": "the TPM's responses end too early",
    "tpm-garbage": "the TPM's answer to Amazon's command is no CBOR",
    "tpm-vanishing-index": "another program removes each index before it is read",
}
"""Faults of the TPM by name, each with what it does."""


def default_pcrs() -> dict[int, bytes]:
    """PCR0 to PCR23 of the built-in machine image, with Secure Boot and no kernel command line."""
    separator = extended(ZERO_PCR, hashlib.sha384(bytes(4)).digest())
    values = dict.fromkeys(range(PCR_COUNT), ZERO_PCR)
    for index, label in enumerate(
        ("firmware", "configuration", "", "", "boot manager", "partitions", "", "Secure Boot")
    ):
        digest = hashlib.sha384(f"nitrosim {label}".encode()).digest()
        values[index] = extended(ZERO_PCR, digest) if label else separator
    values[11] = extended(ZERO_PCR, hashlib.sha384(b"nitrosim unified kernel image").digest())
    values |= dict.fromkeys(LAUNCH_PCRS, b"\xff" * PCR_SIZE)
    return values


DEFAULT_PCRS: Final[Mapping[int, bytes]] = default_pcrs()


class _Signer(SoftwareNsm):
    """What signs documents with the PCRs of a TPM in the place of an enclave's."""

    def __init__(self, pki: NsmPki, bank: Mapping[int, bytes], **options: Any) -> None:
        super().__init__(pki, **options)
        self._bank = bank

    def _measurements(self) -> dict[str, object]:
        return {"nitrotpm_pcrs": dict(sorted(self._bank.items()))}


# ---- structures

_HEADER: Final = struct.Struct(">HII")  # tag, size of the whole, command or response code
_NO_SESSIONS, _SESSIONS = 0x8001, 0x8002  # TPM_ST, part 2, 6.9
_OWNER: Final = 0x4000_0001  # TPM_RH_OWNER, part 2, 7.4
_PASSWORD: Final = 0x4000_0009  # TPM_RS_PW
_SHA256, _SHA384 = 0x000B, 0x000C
_AUTH_WRITE, _AUTH_READ, _WRITTEN = 1 << 2, 1 << 18, 1 << 29  # TPMA_NV, part 2, 13.4
_NV_FIRST: Final = 0x0100_0000  # TPM_HT_NV_INDEX, part 2, 7.2
_NV_LAST: Final = 0x01FF_FFFF

# TPM_RC, part 2, 6.6.3, and what a format-one code is about (6.6.2)
_BAD_TAG: Final = 0x01E
_COMMAND_SIZE: Final = 0x142
_COMMAND_CODE: Final = 0x143
_AUTH_MISSING: Final = 0x125
_AUTHSIZE: Final = 0x144
_ATTRIBUTES, _VALUE, _HANDLE, _SIZE, _INSUFFICIENT = 0x082, 0x084, 0x08B, 0x095, 0x09A
_HASH: Final = 0x083
_BAD_AUTH: Final = 0x0A2
_NV_RANGE, _NV_AUTHORIZATION, _NV_UNINITIALIZED = 0x146, 0x149, 0x14A
_NV_SPACE, _NV_DEFINED = 0x14B, 0x14C
_LOCKOUT, _RETRY = 0x921, 0x922
_PARAMETER: Final = 0x040
_COMMAND: Final = 1 << 29 | 0xFFFF  # of a TPMA_CC
_RESOURCE_MANAGER: Final = 0xB_0000


def _about_parameter(number: int) -> int:
    return _PARAMETER | number << 8


def _about_handle(number: int) -> int:
    return number << 8


def _about_session(number: int) -> int:
    return 0x800 | number << 8


class _RefusedError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"{code:#x}")
        self.code = code


class _Reader:
    """What is left of a command."""

    def __init__(self, data: bytes) -> None:
        self.rest = data

    def take(self, size: int) -> bytes:
        if size > len(self.rest):
            raise _RefusedError(_INSUFFICIENT)
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def sized(self) -> bytes:
        return self.take(self.number(2))

    def end(self) -> None:
        if self.rest:
            raise _RefusedError(_SIZE)


def _sized(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


class _Index:
    """One index: what it is like, and what is in it; unwritten bytes are 0xff."""

    def __init__(self, attributes: int, size: int) -> None:
        self.attributes = attributes
        self.data = bytearray(b"\xff" * size)


class _Command(NamedTuple):
    """How many handles a command has, whether the first is authorized, and what performs it."""

    handles: int
    authorized: bool
    perform: Callable[[list[int], _Reader], bytes]


class SoftwareTpm:
    """One TPM with its PCR bank and indexes; `answer` may be called from any thread.

    `pcrs` replaces single values of the built-in image. `fault` is one of FAULTS, or of those of
    the NSM, which then refuses Amazon's command or signs what it should not. Raises ValueError for
    a PCR or a fault that cannot be.
    """

    def __init__(
        self,
        pki: NsmPki,
        *,
        pcrs: Mapping[int, bytes] | None = None,
        module_id: str = DEFAULT_MODULE_ID,
        fault: str | None = None,
    ) -> None:
        if fault is not None and fault not in {*FAULTS, *NSM_FAULTS}:
            raise ValueError(f"no fault of the TPM: {fault}")
        self.pcrs = default_pcrs() | _checked(pcrs or {})
        self._fault = fault
        of_nsm = fault if fault in NSM_FAULTS else None
        self._documents = _Signer(pki, self.pcrs, module_id=module_id, fault=of_nsm)
        self.indexes: dict[int, _Index] = {}
        self._lock = threading.Lock()
        self._asked_again = False
        self._commands = {
            0x122: _Command(2, True, self._undefine),
            0x12A: _Command(1, True, self._define),
            0x137: _Command(2, True, self._write),
            0x14E: _Command(2, True, self._read),
            0x169: _Command(1, False, self._read_public),
            0x17A: _Command(0, False, self._capability),
            0x17B: _Command(0, False, self._random),
            0x17E: _Command(0, False, self._read_pcrs),
            0x2000_0001: _Command(2, True, self._nsm_request),
        }

    def answer(self, command: bytes) -> bytes:
        """The response to a command; whatever is wrong with it is a response, too.

        Raises SilenceError where the fault is that.
        """
        if self._fault == "silent-module":
            raise SilenceError
        with self._lock:
            try:
                tag, body = self._respond(command)
            except _RefusedError as refused:
                return _HEADER.pack(_NO_SESSIONS, _HEADER.size, refused.code)
        whole = _HEADER.pack(tag, _HEADER.size + len(body), 0) + body
        return whole[:-1] if self._fault == "tpm-cut-short" else whole

    def _respond(self, data: bytes) -> tuple[int, bytes]:
        """The tag and the body of a response (part 1, 18)."""
        if len(data) < _HEADER.size or len(data) > _COMMAND_MAX:
            raise _RefusedError(_COMMAND_SIZE)
        tag, size, code = _HEADER.unpack_from(data)
        if tag not in {_NO_SESSIONS, _SESSIONS}:
            raise _RefusedError(_BAD_TAG)
        if size != len(data):
            raise _RefusedError(_COMMAND_SIZE)
        self._refuse_by_fault(code)
        command = self._commands.get(code)
        if command is None:
            raise _RefusedError(_COMMAND_CODE)
        reader = _Reader(data[_HEADER.size :])
        handles = [reader.number(4) for _ in range(command.handles)]
        self._check_handles(handles)
        if tag == _SESSIONS:
            self._check_password(reader, handles)
        elif command.authorized:
            raise _RefusedError(_AUTH_MISSING)
        body = command.perform(handles, reader)
        if tag == _NO_SESSIONS:
            return tag, body
        # TPMS_AUTH_RESPONSE of a password (part 2, 10.13.3), in a session that goes on
        return tag, len(body).to_bytes(4, "big") + body + b"\0\0\1\0\0"

    def _refuse_by_fault(self, code: int) -> None:
        again, self._asked_again = self._asked_again, not self._asked_again
        if self._fault == "tpm-always-busy" or (self._fault == "tpm-busy" and not again):
            raise _RefusedError(_RETRY)
        if self._fault == "tpm-lockout" and code in {0x137, 0x14E}:
            raise _RefusedError(_LOCKOUT)
        if self._fault == "tpm-no-nsm" and code == 0x2000_0001:
            raise _RefusedError(_RESOURCE_MANAGER | _COMMAND_CODE)
        if self._fault == "tpm-vanishing-index" and code == 0x14E:
            self.indexes.clear()

    def _check_handles(self, handles: list[int]) -> None:
        for number, handle in enumerate(handles, start=1):
            if handle != _OWNER and handle not in self.indexes:
                raise _RefusedError(_HANDLE | _about_handle(number))

    def _check_password(self, reader: _Reader, handles: list[int]) -> None:
        """One session, by a password, which is empty (part 1, 19.4)."""
        area = _Reader(reader.take(reader.number(4)))
        session = area.number(4)
        area.sized()
        area.take(1)
        password = area.sized()
        if area.rest or session != _PASSWORD:
            raise _RefusedError(_AUTHSIZE if area.rest else _VALUE | _about_session(1))
        if password or (self._fault == "tpm-owner-password" and handles[:1] == [_OWNER]):
            raise _RefusedError(_BAD_AUTH | _about_session(1))

    # ---- commands, part 3

    def _capability(self, _: list[int], reader: _Reader) -> bytes:
        """TPM2_GetCapability (30.2) of handles of indexes, of commands, and of properties."""
        capability, first, count = reader.number(4), reader.number(4), reader.number(4)
        reader.end()
        if capability == 1:
            found = [(handle,) for handle in sorted(self.indexes) if handle >= first]
        elif capability == 2:
            found = [(code,) for code in self._listed_commands() if code & _COMMAND >= first]
        elif capability == 6:
            found = [pair for pair in sorted(self._properties().items()) if pair[0] >= first]  # type: ignore[misc]
        else:
            raise _RefusedError(_VALUE | _about_parameter(1))
        listed = b"".join(number.to_bytes(4, "big") for item in found[:count] for number in item)
        head = struct.pack(">BII", len(found) > count, capability, len(found[:count]))
        return head + listed

    def _listed_commands(self) -> list[int]:
        """TPMA_CC (part 2, 8.9): the number of a command, a vendor's bit, and its handles."""
        hidden = {0x2000_0001} if self._fault in {"tpm-no-nsm", "tpm-unlisted-nsm"} else set()
        return [
            code | command.handles << 25
            for code, command in sorted(self._commands.items())
            if code not in hidden
        ]

    def _properties(self) -> dict[int, int]:
        """TPM_PT (part 2, 6.13)."""
        vendor = b"SW   TPM" if self._fault == "tpm-other-vendor" else b"NitroTPM"
        return {
            0x105: int.from_bytes(b"AMZN", "big"),
            0x106: int.from_bytes(vendor[:4], "big"),
            0x107: int.from_bytes(vendor[4:], "big"),
            0x108: 0,
            0x109: 0,
            0x10B: 1 << 16,
            0x10C: 0,
            0x117: NV_INDEX_MAX,
            0x12C: NV_BUFFER_MAX,
        }

    def _random(self, _: list[int], reader: _Reader) -> bytes:
        """TPM2_GetRandom (16.1): as many bytes as the largest digest has, at most."""
        asked = reader.number(2)
        reader.end()
        return _sized(os.urandom(min(asked, 64)))

    def _read_pcrs(self, _: list[int], reader: _Reader) -> bytes:
        """TPM2_PCR_Read (22.4) of one selection, up to eight PCRs of the bank of SHA-384."""
        if reader.number(4) != 1:
            raise _RefusedError(_SIZE | _about_parameter(1))
        algorithm = reader.number(2)
        bits = int.from_bytes(reader.take(reader.number(1)), "little")
        reader.end()
        if algorithm not in {_SHA256, _SHA384}:
            raise _RefusedError(_HASH | _about_parameter(1))
        wanted = range(PCR_COUNT) if algorithm == _SHA384 else range(0)
        chosen = [index for index in wanted if bits >> index & 1][:8]
        selected = sum(1 << index for index in chosen).to_bytes(3, "little")
        head = struct.pack(">IIHB", 0, 1, algorithm, 3) + selected
        values = b"".join(_sized(self.pcrs[index]) for index in chosen)
        return head + len(chosen).to_bytes(4, "big") + values

    def _define(self, handles: list[int], reader: _Reader) -> bytes:
        """TPM2_NV_DefineSpace (31.3) by the owner."""
        password = reader.sized()
        public = _Reader(reader.sized())
        reader.end()
        index, algorithm, attributes = public.number(4), public.number(2), public.number(4)
        policy, size = public.sized(), public.number(2)
        public.end()
        if handles[0] != _OWNER:
            raise _RefusedError(_HANDLE | _about_handle(1))
        if not _NV_FIRST <= index <= _NV_LAST:
            raise _RefusedError(_VALUE | _about_parameter(2))
        if attributes & ~(_AUTH_READ | _AUTH_WRITE) or not attributes or password or policy:
            raise _RefusedError(_ATTRIBUTES | _about_parameter(2))  # more than is simulated
        if algorithm not in {_SHA256, _SHA384}:
            raise _RefusedError(_HASH | _about_parameter(2))
        if size > NV_INDEX_MAX:
            raise _RefusedError(_SIZE | _about_parameter(2))
        if index in self.indexes:
            raise _RefusedError(_NV_DEFINED)
        used = sum(len(known.data) for known in self.indexes.values())
        if self._fault == "tpm-no-room" or used + size > NV_ROOM:
            raise _RefusedError(_NV_SPACE)
        self.indexes[index] = _Index(attributes, size)
        return b""

    def _undefine(self, handles: list[int], reader: _Reader) -> bytes:
        """TPM2_NV_UndefineSpace (31.4) by the owner."""
        reader.end()
        if handles[0] != _OWNER:
            raise _RefusedError(_HANDLE | _about_handle(1))
        self._index(handles[1], 2)
        del self.indexes[handles[1]]
        return b""

    def _read_public(self, handles: list[int], reader: _Reader) -> bytes:
        """TPM2_NV_ReadPublic (31.6); the name is the digest of the public part (part 1, 16)."""
        reader.end()
        index = self._index(handles[0], 1)
        size = len(index.data)
        public = struct.pack(">IHIHH", handles[0], _SHA256, index.attributes, 0, size)
        name = _SHA256.to_bytes(2, "big") + hashlib.sha256(public).digest()
        return _sized(public) + _sized(name)

    def _write(self, handles: list[int], reader: _Reader) -> bytes:
        """TPM2_NV_Write (31.7) by the index's own password."""
        data, offset = reader.sized(), reader.number(2)
        reader.end()
        index = self._authorized(handles, _AUTH_WRITE)
        if len(data) > NV_BUFFER_MAX:
            raise _RefusedError(_SIZE | _about_parameter(1))
        if offset + len(data) > len(index.data):
            raise _RefusedError(_NV_RANGE)
        index.data[offset : offset + len(data)] = data
        index.attributes |= _WRITTEN
        return b""

    def _read(self, handles: list[int], reader: _Reader) -> bytes:
        """TPM2_NV_Read (31.13) by the index's own password."""
        size, offset = reader.number(2), reader.number(2)
        reader.end()
        index = self._authorized(handles, _AUTH_READ)
        if not index.attributes & _WRITTEN:
            raise _RefusedError(_NV_UNINITIALIZED)
        if size > NV_BUFFER_MAX:
            raise _RefusedError(_VALUE | _about_parameter(1))
        if offset + size > len(index.data):
            raise _RefusedError(_NV_RANGE)
        return _sized(bytes(index.data[offset : offset + size]))

    def _nsm_request(self, handles: list[int], reader: _Reader) -> bytes:
        """Amazon's command: the request at the beginning of the index becomes its answer."""
        reader.end()
        index = self._authorized(handles, _AUTH_READ | _AUTH_WRITE)
        if not index.attributes & _WRITTEN:
            raise _RefusedError(_NV_UNINITIALIZED)
        answer = self._documents.answer(_first_item(bytes(index.data)))
        if self._fault == "tpm-garbage":
            answer = b"\xffno CBOR"
        if len(answer) > len(index.data):
            raise _RefusedError(_NV_RANGE)
        index.data[:] = answer.ljust(len(index.data), b"\xff")
        return b""

    def _authorized(self, handles: list[int], needed: int) -> _Index:
        """The index, where its own password is the authorization and its attributes allow that."""
        index = self._index(handles[1], 2)
        if handles[0] != handles[1] or index.attributes & needed != needed:
            raise _RefusedError(_NV_AUTHORIZATION)
        return index

    def _index(self, handle: int, number: int) -> _Index:
        if handle not in self.indexes:
            raise _RefusedError(_HANDLE | _about_handle(number))
        return self.indexes[handle]


def _checked(pcrs: Mapping[int, bytes]) -> dict[int, bytes]:
    for index, value in pcrs.items():
        if not 0 <= index < PCR_COUNT:
            raise ValueError(f"no such PCR of a TPM: {index}, the last is {PCR_COUNT - 1}")
        if len(value) != PCR_SIZE:
            raise ValueError(f"PCR{index} has {PCR_SIZE} bytes, not {len(value)}")
    return dict(pcrs)


def _first_item(data: bytes) -> bytes:
    """The request that was written into an index, without what follows; all of it if it is none."""
    try:
        _, rest = cbor.decode_first(data)
    except cbor.CborError:
        return data
    return data[: len(data) - len(rest)]
