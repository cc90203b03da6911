"""The NSM through libnsm.so: AWS's crate with the C functions of
patches/nsmlib_cpython_wrappers.patch, by ctypes.

Those functions return one int32: 0 done, 1 to 8 the number of an ErrorCode, 100 done but the answer
does not fit into the buffer, negative -errno. ctypes releases the GIL around each call. The library
keeps no state, so that a transport may be shared by threads and inherited by forked processes.

This module is not called libnsm, because Python would import the libnsm.so beside it in its place.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import logging
from ctypes import POINTER, c_char, c_char_p, c_int32, c_size_t, c_uint8, c_uint32
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from nsm.module import (
    REQUEST_MAX,
    RESPONSE_MAX,
    Description,
    ErrorCode,
    NsmError,
    Pcr,
    SetupError,
    Source,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ABI_VERSION: Final = 1  # NSMPY_ABI_VERSION
IN_PACKAGE: Final = Path(__file__).with_name("libnsm.so")
BY_THE_LOADER: Final = ("libnsm.so", "libnsm.so.0")
DEVICE: Final = "/dev/nsm"

_log: Final = logging.getLogger("attestor.nsm")

_SHORT_BUFFER: Final = 100  # NSMPY_SHORT_BUFFER
_INDEX_MAX: Final = 0xFFFF
_INPUT: Final = (c_char_p, c_size_t)
_OUTPUT: Final = (
    POINTER(c_char),
    POINTER(c_size_t),
)  # a buffer; its size on entry, the answer's size afterwards
_PARAMETERS: Final[dict[str, tuple[type, ...]]] = {
    "nsmpy_abi_version": (),
    "nsmpy_open": (),
    "nsmpy_close": (c_int32,),
    "nsmpy_describe": (c_int32, *_OUTPUT),
    "nsmpy_describe_pcr": (c_int32, c_uint32, POINTER(c_uint8), *_OUTPUT),
    "nsmpy_extend_pcr": (c_int32, c_uint32, *_INPUT, *_OUTPUT),
    "nsmpy_lock_pcr": (c_int32, c_uint32),
    "nsmpy_lock_pcrs": (c_int32, c_uint32),
    "nsmpy_attest": (c_int32, *_INPUT, *_INPUT, *_INPUT, *_OUTPUT),
    "nsmpy_random": (c_int32, *_OUTPUT),
}


_CODES: Final = frozenset(ErrorCode)
_ELF_HEADER: Final = 20  # up to e_machine, elf(5)
_MACHINES: Final = {3: "x86", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv"}  # e_machine


class Reason(enum.StrEnum):
    """Why a library cannot be used."""

    NOT_FOUND = "not found"
    NOT_A_LIBRARY = "not a shared library"
    OTHER_ARCHITECTURE = "built for another architecture"
    NOT_LOADABLE = "cannot be loaded"
    WITHOUT_WRAPPERS = "without the functions of nsmlib_cpython_wrappers.patch"
    OTHER_ABI = "another ABI version"


class LibraryError(SetupError):
    """A libnsm.so that cannot be used; `reason` says why, `path` which."""

    def __init__(self, path: str, reason: Reason, detail: str = "") -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"{path}: {reason}" + (f": {detail}" if detail else ""))


def load(path: str) -> ctypes.CDLL:
    """The library of that path, or of that name by the loader's rules, with every function
    declared.

    Raises LibraryError.
    """
    if "/" in path:
        _examine(path)
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        missing = f"{path}: " in str(error) and "No such file" in str(
            error
        )  # itself, not a library that it needs
        raise LibraryError(
            path, Reason.NOT_FOUND if missing else Reason.NOT_LOADABLE, str(error)
        ) from error
    version = _function(library, path, "nsmpy_abi_version")()
    if version != ABI_VERSION:
        raise LibraryError(path, Reason.OTHER_ABI, f"{version}, not {ABI_VERSION}")
    for name in _PARAMETERS:
        _function(library, path, name)
    return library


def find_library(candidates: Sequence[str] | None = None) -> str | None:
    """The first usable library: the one in this package, then the loader's; others are passed over,
    and logged.
    """
    for candidate in (str(IN_PACKAGE), *BY_THE_LOADER) if candidates is None else candidates:
        try:
            load(candidate)
        except LibraryError as error:
            if error.reason is not Reason.NOT_FOUND:
                _log.info("passed over %s", error)
        else:
            return candidate
    return None


class Library:
    """A transport over the library of a path; see `nsm.module.Transport`.

    Raises LibraryError when the library cannot be used, NsmError when it cannot open the device.
    """

    source: Source = "enclave"

    def __init__(self, path: str) -> None:
        self._library = load(path)
        self.name = f"{path} (ABI {ABI_VERSION})"
        self._fd = self._library.nsmpy_open()
        if self._fd < 0:
            raise NsmError("open", errno=-self._fd, detail=DEVICE)

    def describe(self) -> Description:
        """DescribeNSM."""
        return _description(self._output("DescribeNSM", self._library.nsmpy_describe))

    def describe_pcr(self, index: int) -> Pcr:
        """DescribePCR."""
        locked = c_uint8()
        value = self._output(
            "DescribePCR",
            self._library.nsmpy_describe_pcr,
            _index("DescribePCR", index),
            ctypes.byref(locked),
        )
        return Pcr(bool(locked.value), value)

    def extend_pcr(self, index: int, data: bytes) -> bytes:
        """ExtendPCR."""
        parameters = (_index("ExtendPCR", index), *_input("ExtendPCR", data))
        return self._output("ExtendPCR", self._library.nsmpy_extend_pcr, *parameters)

    def lock_pcr(self, index: int) -> None:
        """LockPCR."""
        _check("LockPCR", self._library.nsmpy_lock_pcr(self._fd, _index("LockPCR", index)))

    def lock_pcrs(self, count: int) -> None:
        """LockPCRs."""
        _check("LockPCRs", self._library.nsmpy_lock_pcrs(self._fd, _index("LockPCRs", count)))

    def attest(
        self, user_data: bytes | None, nonce: bytes | None, public_key: bytes | None
    ) -> bytes:
        """Attestation."""
        inputs = [
            part
            for field in (user_data, nonce, public_key)
            for part in _input("Attestation", field)
        ]
        return self._output("Attestation", self._library.nsmpy_attest, *inputs)

    def random(self) -> bytes:
        """GetRandom."""
        return self._output("GetRandom", self._library.nsmpy_random)

    def close(self) -> None:
        """Close the device."""
        fd, self._fd = (
            self._fd,
            -1,
        )  # -1 is EBADF for whoever comes late, never somebody else's descriptor
        _check("close", self._library.nsmpy_close(fd))

    def _output(self, operation: str, function: Callable[..., int], *parameters: object) -> bytes:
        """Call a function whose last two parameters are a buffer and its length, and return what it
        wrote.

        No answer of the NSM is longer than this buffer; should one be, the operation has happened
        all the same.
        """
        buffer = ctypes.create_string_buffer(RESPONSE_MAX)
        length = c_size_t(RESPONSE_MAX)
        status = function(self._fd, *parameters, buffer, ctypes.byref(length))
        _check(operation, status, length.value)
        return ctypes.string_at(buffer, min(length.value, RESPONSE_MAX))


def _function(library: ctypes.CDLL, path: str, name: str) -> Callable[..., int]:
    """A function of the library, declared: ctypes keeps the declaration with the library."""
    try:
        function: Any = getattr(library, name)
    except AttributeError as error:
        raise LibraryError(path, Reason.WITHOUT_WRAPPERS, str(error)) from error
    function.argtypes, function.restype = _PARAMETERS[name], c_int32
    found: Callable[..., int] = function
    return found


def _check(operation: str, status: int, length: int = 0) -> None:
    """Raise the error that a function's status stands for."""
    if status < 0:
        raise NsmError(operation, errno=-status)
    if status == _SHORT_BUFFER:
        detail = f"done, but the answer takes {length} bytes, not {RESPONSE_MAX}"
        raise NsmError(operation, code=ErrorCode.BufferTooSmall, detail=detail)
    if status not in _CODES:
        raise NsmError(operation, code=ErrorCode.InternalError, detail=f"unknown status {status}")
    if status:
        raise NsmError(operation, code=ErrorCode(status))


def _index(operation: str, index: int) -> int:
    """An index or a count; ctypes would silently cut a larger one."""
    if not 0 <= index <= _INDEX_MAX:
        raise NsmError(operation, code=ErrorCode.InvalidIndex)
    return index


def _input(operation: str, data: bytes | None) -> tuple[bytes | None, int]:
    """Pointer and length of an input: NULL stands for None, while empty bytes have an address."""
    if data is None:
        return None, 0
    if len(data) > REQUEST_MAX:
        raise NsmError(operation, code=ErrorCode.InputTooLarge)
    return bytes(data), len(data)


def _description(answer: bytes) -> Description:
    """The library has checked the fields and their types; this is the map it wrote them into."""
    from nsm import cbor  # here, because attesting needs no CBOR

    fields: Any = cbor.decode(answer)
    fields = fields["DescribeNSM"]
    return Description(
        version=(fields["version_major"], fields["version_minor"], fields["version_patch"]),
        module_id=fields["module_id"],
        max_pcrs=fields["max_pcrs"],
        locked_pcrs=tuple(sorted(fields["locked_pcrs"])),
        digest=fields["digest"],
    )


def _examine(path: str) -> None:
    """Tell what the dynamic linker's messages do not: it calls a library for another architecture
    not found.
    """
    try:
        with Path(path).open("rb") as file:
            header = file.read(_ELF_HEADER)
    except FileNotFoundError as error:
        raise LibraryError(path, Reason.NOT_FOUND) from error
    except (OSError, ValueError) as error:
        raise LibraryError(path, Reason.NOT_LOADABLE, str(error)) from error
    if len(header) < _ELF_HEADER or not header.startswith(b"\x7fELF"):
        raise LibraryError(path, Reason.NOT_A_LIBRARY)
    with contextlib.suppress(OSError):  # without /proc the dynamic linker has to say it
        with Path("/proc/self/exe").open("rb") as file:
            ours = file.read(_ELF_HEADER)
        if _architecture(header) != _architecture(ours):
            raise LibraryError(
                path,
                Reason.OTHER_ARCHITECTURE,
                f"{_architecture(header)}, not {_architecture(ours)}",
            )


def _architecture(header: bytes) -> str:
    """EI_CLASS, EI_DATA and e_machine of an ELF header (elf(5)), in words."""
    order: Literal["little", "big"] = "big" if header[5] == 2 else "little"
    machine = int.from_bytes(header[18:20], order)
    return (
        f"{64 if header[4] == 2 else 32}-bit {order}-endian "
        f"{_MACHINES.get(machine, f'machine {machine}')}"
    )
