"""The few commands of a TPM 2.0 that a NitroTPM's attestation document needs, over its device node.

Citations are of the TPM 2.0 Library specification, revision 1.59: part 2 for structures, part 3 for
commands. Integers are big-endian, a TPM2B is its size in two bytes and then its contents.
Authorizations are password sessions with an empty password (part 1, 19.4): the device node decides
who may talk to the TPM.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import threading
import time
from errno import ENODEV
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from nsm.module import ErrorCode, NsmError

if TYPE_CHECKING:
    from collections.abc import Sequence

DEVICE: Final = "/dev/tpmrm0"
BARE_DEVICE: Final = "/dev/tpm0"  # without the kernel's resource manager, for one process at a time
PCR_COUNT: Final = 24  # of the PC Client platform
SHA384_SIZE: Final = 48

_NO_SESSIONS, _SESSIONS = 0x8001, 0x8002  # TPM_ST, part 2, 6.9
_HEADER: Final = struct.Struct(">HII")  # tag, size of the whole, command or response code
_RESPONSE_MAX: Final = 4096  # what the kernel's driver holds (TPM_BUFSIZE)
_CHUNK_MAX: Final = 2048  # bytes of an index in one command, whatever the TPM says it could take

# TPM_CC, part 2, 6.5.2
_NV_UNDEFINE_SPACE: Final = 0x122
_NV_DEFINE_SPACE: Final = 0x12A
_NV_WRITE: Final = 0x137
_NV_READ: Final = 0x14E
_NV_READ_PUBLIC: Final = 0x169
_GET_CAPABILITY: Final = 0x17A
_GET_RANDOM: Final = 0x17B
_PCR_READ: Final = 0x17E
_NSM_REQUEST: Final = 0x2000_0001  # Amazon's own: bit 29 marks a vendor's command
_NAMES: Final = {
    _NV_UNDEFINE_SPACE: "TPM2_NV_UndefineSpace",
    _NV_DEFINE_SPACE: "TPM2_NV_DefineSpace",
    _NV_WRITE: "TPM2_NV_Write",
    _NV_READ: "TPM2_NV_Read",
    _NV_READ_PUBLIC: "TPM2_NV_ReadPublic",
    _GET_CAPABILITY: "TPM2_GetCapability",
    _GET_RANDOM: "TPM2_GetRandom",
    _PCR_READ: "TPM2_PCR_Read",
    _NSM_REQUEST: "TPM2_VENDOR_AWS_NSM_REQUEST",
}

_OWNER: Final = 0x4000_0001  # TPM_RH_OWNER, part 2, 7.4
_PASSWORD: Final = 0x4000_0009  # TPM_RS_PW, same place
_SHA256, _SHA384 = 0x000B, 0x000C  # TPM_ALG_ID, part 2, 6.3
_CAP_HANDLES, _CAP_COMMANDS, _CAP_PROPERTIES = 1, 2, 6  # TPM_CAP, part 2, 6.12
# TPMA_CC, part 2, 8.9: the number of a command, and whether it is a vendor's
_COMMAND_OF: Final = 1 << 29 | 0xFFFF

# TPM_PT, part 2, 6.13
VENDOR_STRINGS: Final = (0x106, 0x107, 0x108, 0x109)
FIRMWARE_VERSIONS: Final = (0x10B, 0x10C)
NV_BUFFER_MAX: Final = 0x12C

# TPMA_NV, part 2, 13.4
AUTH_WRITE: Final = 1 << 2
AUTH_READ: Final = 1 << 18
WRITTEN: Final = 1 << 29

# TPM_RC, part 2, 6.6.3; what is answered with one of the last is to be sent again
RC_HANDLE: Final = 0x08B
RC_COMMAND_CODE: Final = 0x143
RC_NV_UNINITIALIZED: Final = 0x14A
RC_NV_SPACE: Final = 0x14B
RC_NV_DEFINED: Final = 0x14C
_RC_NAMES: Final = {
    0x082: "TPM_RC_ATTRIBUTES",
    0x084: "TPM_RC_VALUE",
    0x085: "TPM_RC_HIERARCHY",
    RC_HANDLE: "TPM_RC_HANDLE",
    0x08E: "TPM_RC_AUTH_FAIL",
    0x095: "TPM_RC_SIZE",
    0x0A2: "TPM_RC_BAD_AUTH",
    0x100: "TPM_RC_INITIALIZE",
    0x101: "TPM_RC_FAILURE",
    0x120: "TPM_RC_DISABLED",
    RC_COMMAND_CODE: "TPM_RC_COMMAND_CODE",
    0x146: "TPM_RC_NV_RANGE",
    0x147: "TPM_RC_NV_SIZE",
    0x148: "TPM_RC_NV_LOCKED",
    0x149: "TPM_RC_NV_AUTHORIZATION",
    RC_NV_UNINITIALIZED: "TPM_RC_NV_UNINITIALIZED",
    RC_NV_SPACE: "TPM_RC_NV_SPACE",
    RC_NV_DEFINED: "TPM_RC_NV_DEFINED",
    0x908: "TPM_RC_YIELDED",
    0x90A: "TPM_RC_TESTING",
    0x920: "TPM_RC_NV_RATE",
    0x921: "TPM_RC_LOCKOUT",
    0x922: "TPM_RC_RETRY",
    0x923: "TPM_RC_NV_UNAVAILABLE",
}
_AGAIN: Final = frozenset({0x908, 0x90A, 0x920, 0x922})
_PAUSES: Final = (0.005, 0.02, 0.1, 0.2, 0.5, 1.0)  # seconds before it is sent again
_OWNED_HINT: Final = "the owner of this TPM has set a password, but an empty one is used here"
_AROUND_HINT: Final = "--tpm /dev/tpm0 goes around the kernel's resource manager"
_HINTS: Final = {
    0x08E: (_OWNED_HINT,),
    0x0A2: (_OWNED_HINT,),
    RC_NV_SPACE: ("indexes of other programs fill the TPM: tpm2_nvundefine removes one",),
    0x921: ("the TPM is locked for a while: tpm2_dictionarylockout --clear-lockout unlocks it",),
}


class TpmError(NsmError):
    """The TPM could not be reached, or refused.

    `rc` is its response code without the number of the parameter that it is about, else 0. `code`
    is InternalError where the TPM itself refused.
    """

    module = "NitroTPM"

    def __init__(
        self,
        operation: str,
        *,
        code: ErrorCode | None = None,
        errno: int | None = None,
        detail: str = "",
        rc: int = 0,
    ) -> None:
        self.rc = rc
        self.hints = _HINTS.get(rc, ())
        super().__init__(operation, code=code, errno=errno, detail=detail)
        if rc:
            self.args = (f"{operation}: {detail}",)

    @classmethod
    def of_response(cls, operation: str, response: int) -> TpmError:
        """The error of a response code, by its name."""
        rc = _bare(response & 0xFFFF)
        detail = f"{_RC_NAMES.get(rc, 'a response code of the TPM')} ({response & 0xFFFF:#05x})"
        return cls(operation, code=ErrorCode.InternalError, detail=detail, rc=rc)


def _bare(response: int) -> int:
    """A response code without what it is about: a format-one code has its number in bits 0 to 5,
    and where in the others (part 2, 6.6.2).
    """
    return response & 0x0BF if response & 0x080 else response & 0xD7F


# ---- one command, one response


class Channel(Protocol):
    """What carries commands to a TPM: a device node, or a socket of an emulator."""

    name: str

    def exchange(self, command: bytes) -> bytes:
        """The whole response to a command; raises OSError."""
        ...

    def close(self) -> None:
        """Give the channel back; called exactly once."""
        ...


class DeviceNode:
    """A channel over /dev/tpmrm0, or /dev/tpm0: a command is one write, its response one read."""

    def __init__(self, path: str = DEVICE) -> None:
        self.name = path
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY
        try:
            # a command that is written into a file replaces what is in it: nothing else is opened
            self._fd = os.open(path, flags) if stat.S_ISCHR(os.stat(path).st_mode) else -1
        except OSError as error:
            raise TpmError("open", errno=error.errno, detail=path) from error
        if self._fd < 0:
            raise TpmError("open", errno=ENODEV, detail=f"{path} is no device")
        self._lock = threading.Lock()  # the kernel holds one response for each open file

    def exchange(self, command: bytes) -> bytes:
        """The whole response to a command; raises OSError."""
        with self._lock:
            os.write(self._fd, command)
            return os.read(self._fd, _RESPONSE_MAX)

    def close(self) -> None:
        """Close the device."""
        os.close(self._fd)


class _Reader:
    """A response's parameters, read from the front; raises TpmError where they end too early."""

    def __init__(self, operation: str, data: bytes) -> None:
        self.operation = operation
        self.rest = data

    def take(self, size: int) -> bytes:
        if size > len(self.rest):
            raise _malformed(self.operation, f"it ends {size - len(self.rest)} bytes too early")
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def sized(self) -> bytes:
        """A TPM2B."""
        return self.take(self.number(2))

    def end(self) -> None:
        if self.rest:
            raise _malformed(self.operation, f"it has {len(self.rest)} bytes too many")


def _malformed(operation: str, why: str) -> TpmError:
    return TpmError(operation, code=ErrorCode.InvalidResponse, detail=f"answer of the TPM: {why}")


def _sized(data: bytes) -> bytes:
    """A TPM2B."""
    return len(data).to_bytes(2, "big") + data


# TPMS_AUTH_COMMAND (part 2, 10.13.2): session, nonce, attributes, password; its size before it
_EMPTY_PASSWORD: Final = struct.pack(">IIHBH", 9, _PASSWORD, 0, 0, 0)


class NvPublic(NamedTuple):
    """What an index is like: its size in bytes, and its attributes (TPMA_NV)."""

    size: int
    attributes: int


class Tpm2:
    """A TPM 2.0 behind a channel; each method is one command of part 3, and raises TpmError."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.name = channel.name
        self._chunk = 0

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def properties(self, first: int, count: int) -> dict[int, int]:
        """TPM2_GetCapability (30.2): properties from a number on, as TPML_TAGGED_TPM_PROPERTY."""
        listed = self._capability(_CAP_PROPERTIES, first, count)
        found = {}
        for _ in range(listed.number(4)):
            number = listed.number(4)
            found[number] = listed.number(4)
        listed.end()
        return found

    def handles(self, first: int, count: int) -> list[int]:
        """TPM2_GetCapability (30.2): the first handles of one kind from a number on, rising."""
        listed = self._capability(_CAP_HANDLES, first, count)
        found = [listed.number(4) for _ in range(listed.number(4))]
        listed.end()
        return found

    def lists_nsm_request(self) -> bool:
        """TPM2_GetCapability (30.2): whether Amazon's command is in the TPM's list of commands.

        The kernel's resource manager passes on what is in that list alone.
        """
        listed = self._capability(_CAP_COMMANDS, _NSM_REQUEST, 1)
        found = [listed.number(4) for _ in range(listed.number(4))]
        listed.end()
        return any(attributes & _COMMAND_OF == _NSM_REQUEST for attributes in found)

    def _capability(self, capability: int, first: int, count: int) -> _Reader:
        """The list in a TPMS_CAPABILITY_DATA (part 2, 10.10.2)."""
        answer = self._ask(_GET_CAPABILITY, (), struct.pack(">III", capability, first, count))
        answer.take(1)  # whether there is more
        if answer.number(4) != capability:
            raise _malformed(answer.operation, "it is about another capability")
        return answer

    def random(self, size: int) -> bytes:
        """TPM2_GetRandom (16.1): up to so many bytes, as many as the TPM's largest digest."""
        answer = self._ask(_GET_RANDOM, (), struct.pack(">H", size))
        found = answer.sized()
        answer.end()
        return found

    def pcr(self, index: int) -> bytes:
        """TPM2_PCR_Read (22.4): one PCR of the bank of SHA-384, 48 bytes; none without that bank.

        A selection (TPMS_PCR_SELECTION; part 2, 10.6.2) is a bit for each PCR, the lowest first.
        """
        selection = (1 << index).to_bytes(PCR_COUNT // 8, "little")
        asked = struct.pack(">IHB", 1, _SHA384, len(selection)) + selection
        answer = self._ask(_PCR_READ, (), asked)
        answer.take(4)  # how often PCRs were extended
        for _ in range(answer.number(4)):
            answer.take(2)
            answer.take(answer.number(1))
        values = [answer.sized() for _ in range(answer.number(4))]
        answer.end()
        return values[0] if values else b""

    def define(self, index: int, size: int, attributes: int = AUTH_READ | AUTH_WRITE) -> None:
        """TPM2_NV_DefineSpace (31.3) under the owner: an index without a password or a policy.

        TPMS_NV_PUBLIC (part 2, 13.5): index, algorithm of its name, attributes, policy, size.
        """
        public = struct.pack(">IHIHH", index, _SHA256, attributes, 0, size)
        self._ask(_NV_DEFINE_SPACE, (_OWNER,), _sized(b"") + _sized(public)).end()

    def undefine(self, index: int) -> None:
        """TPM2_NV_UndefineSpace (31.4) under the owner."""
        self._ask(_NV_UNDEFINE_SPACE, (_OWNER, index)).end()

    def read_public(self, index: int) -> NvPublic:
        """TPM2_NV_ReadPublic (31.6): a TPM2B_NV_PUBLIC (part 2, 13.6), and the index's name."""
        answer = self._ask(_NV_READ_PUBLIC, (index,), session=False)
        public = _Reader(answer.operation, answer.sized())
        answer.sized()
        answer.end()
        public.take(6)
        attributes = public.number(4)
        public.sized()
        size = public.number(2)
        public.end()
        return NvPublic(size, attributes)

    def write(self, index: int, data: bytes) -> None:
        """TPM2_NV_Write (31.7) by the index's own password, in pieces that the TPM takes."""
        chunk = self._chunk_size()
        for offset in range(0, len(data), chunk):
            parameters = _sized(data[offset : offset + chunk]) + offset.to_bytes(2, "big")
            self._ask(_NV_WRITE, (index, index), parameters).end()

    def read(self, index: int, size: int) -> bytes:
        """TPM2_NV_Read (31.13) by the index's own password, in pieces that the TPM takes."""
        found = b""
        while len(found) < size:
            asked = min(self._chunk_size(), size - len(found))
            parameters = struct.pack(">HH", asked, len(found))
            answer = self._ask(_NV_READ, (index, index), parameters)
            piece = answer.sized()
            answer.end()
            if len(piece) != asked:
                raise _malformed(answer.operation, f"{len(piece)} bytes, asked for {asked}")
            found += piece
        return found

    def nsm_request(self, index: int) -> None:
        """Amazon's command: the request that is in the index becomes its answer."""
        self._ask(_NSM_REQUEST, (index, index)).end()

    def _chunk_size(self) -> int:
        """TPM_PT_NV_BUFFER_MAX: how much of an index fits into one command."""
        if not self._chunk:
            told = self.properties(NV_BUFFER_MAX, 1).get(NV_BUFFER_MAX, 0)
            if told == 0:
                raise _malformed(_NAMES[_GET_CAPABILITY], "no TPM_PT_NV_BUFFER_MAX")
            self._chunk = min(told, _CHUNK_MAX)
        return self._chunk

    def _ask(
        self,
        command: int,
        handles: Sequence[int],
        parameters: bytes = b"",
        *,
        session: bool | None = None,
    ) -> _Reader:
        """Send a command (part 1, 18); its answer's parameters.

        One with handles has a session, unless told.
        """
        operation = _NAMES[command]
        session = bool(handles) if session is None else session
        body = b"".join(handle.to_bytes(4, "big") for handle in handles)
        body += (_EMPTY_PASSWORD if session else b"") + parameters
        tag = _SESSIONS if session else _NO_SESSIONS
        whole = _HEADER.pack(tag, _HEADER.size + len(body), command) + body
        answer = self._transmit(operation, whole)
        if not session:
            return answer
        inner = _Reader(operation, answer.take(answer.number(4)))
        answer.sized()  # TPMS_AUTH_RESPONSE (part 2, 10.13.3) of a password: two empty TPM2Bs
        answer.take(1)  # around the attributes
        answer.sized()
        answer.end()
        return inner

    def _transmit(self, operation: str, command: bytes) -> _Reader:
        """Send a command until the TPM has the time for it; the body of its response."""
        for pause in (*_PAUSES, None):
            response, answer = self._exchange(operation, command)
            if _bare(response & 0xFFFF) not in _AGAIN or pause is None:
                break
            time.sleep(pause)
        if response:
            error = TpmError.of_response(operation, response)
            if error.rc == RC_COMMAND_CODE and self.name != BARE_DEVICE:
                error.hints = (_AROUND_HINT,)
            raise error
        return answer

    def _exchange(self, operation: str, command: bytes) -> tuple[int, _Reader]:
        try:
            data = self._channel.exchange(command)
        except OSError as error:
            raise TpmError(operation, errno=error.errno) from error
        if len(data) < _HEADER.size:
            raise _malformed(operation, f"{len(data)} bytes")
        tag, size, response = _HEADER.unpack_from(data)
        if size != len(data):
            raise _malformed(operation, f"{len(data)} bytes, but it says {size}")
        expected = _NO_SESSIONS if response else int.from_bytes(command[:2], "big")
        if tag != expected:
            raise _malformed(operation, f"tag {tag:#06x}, expected {expected:#06x}")
        return response, _Reader(operation, data[_HEADER.size :])


def vendor(tpm: Tpm2) -> str:
    """Who made a TPM, in its own words: TPM_PT_VENDOR_STRING_1 to 4, four characters each."""
    found = tpm.properties(VENDOR_STRINGS[0], len(VENDOR_STRINGS))
    text = b"".join(found.get(number, 0).to_bytes(4, "big") for number in VENDOR_STRINGS)
    with contextlib.suppress(UnicodeDecodeError):
        return text.replace(b"\0", b"").decode("ascii").strip()
    return text.hex()
