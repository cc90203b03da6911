"""The NSM straight over /dev/nsm: one ioctl and CBOR, no compiled library.

The wire format is serde's externally tagged enum of aws-nitro-enclaves-nsm-api: a request without
fields is a text string, one with fields a map of one entry, {name: {field: value}}; answers
likewise, or {"Error": code name}.
"""

from __future__ import annotations

import fcntl
import os
from array import array
from typing import Final, TypeVar

import cbor2

from nsm import cbor
from nsm.module import REQUEST_MAX, RESPONSE_MAX, Description, ErrorCode, NsmError, Pcr, Source

DEVICE: Final = "/dev/nsm"
# _IOWR(0x0A, 0, struct nsm_raw) of linux/nsm.h; struct nsm_raw is {u64 address, u64 length} for the
# request, then the same for the response. The driver writes the response's true length back.
NSM_IOCTL_RAW: Final = 0xC0200A00


class Device:
    """A transport over the device node; see `nsm.module.Transport`."""

    source: Source = "enclave"

    def __init__(self, path: str = DEVICE) -> None:
        self.name = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise NsmError("open", errno=error.errno, detail=path) from error

    def describe(self) -> Description:
        """DescribeNSM."""
        answer = self._ask("DescribeNSM")
        version = tuple(
            _field(answer, "DescribeNSM", f"version_{part}", int)
            for part in ("major", "minor", "patch")
        )
        locked = _field(answer, "DescribeNSM", "locked_pcrs", list)
        if not all(type(index) is int for index in locked):
            raise NsmError("DescribeNSM", code=ErrorCode.InvalidResponse, detail="locked_pcrs")
        return Description(
            version=(version[0], version[1], version[2]),
            module_id=_field(answer, "DescribeNSM", "module_id", str),
            max_pcrs=_field(answer, "DescribeNSM", "max_pcrs", int),
            locked_pcrs=tuple(sorted(locked)),
            digest=_field(answer, "DescribeNSM", "digest", str),
        )

    def describe_pcr(self, index: int) -> Pcr:
        """DescribePCR."""
        answer = self._ask("DescribePCR", index=index)
        return Pcr(
            _field(answer, "DescribePCR", "lock", bool),
            _field(answer, "DescribePCR", "data", bytes),
        )

    def extend_pcr(self, index: int, data: bytes) -> bytes:
        """ExtendPCR."""
        return _field(self._ask("ExtendPCR", index=index, data=data), "ExtendPCR", "data", bytes)

    def lock_pcr(self, index: int) -> None:
        """LockPCR."""
        self._ask("LockPCR", index=index)

    def lock_pcrs(self, count: int) -> None:
        """LockPCRs."""
        self._ask("LockPCRs", range=count)

    def attest(
        self, user_data: bytes | None, nonce: bytes | None, public_key: bytes | None
    ) -> bytes:
        """Attestation."""
        answer = self._ask("Attestation", user_data=user_data, nonce=nonce, public_key=public_key)
        return _field(answer, "Attestation", "document", bytes)

    def random(self) -> bytes:
        """GetRandom."""
        return _field(self._ask("GetRandom"), "GetRandom", "random", bytes)

    def close(self) -> None:
        """Close the device."""
        os.close(self._fd)

    def _ask(self, operation: str, **fields: object) -> object:
        """Send one request; return the fields of its answer, or the bare name when it has none."""
        request = cbor2.dumps({operation: fields} if fields else operation)
        if len(request) > REQUEST_MAX:
            raise NsmError(operation, code=ErrorCode.InputTooLarge)
        try:
            answer = cbor.decode(self._exchange(operation, request))
        except cbor.CborError as error:
            raise NsmError(
                operation, code=ErrorCode.InternalError, detail=f"answer is no CBOR: {error}"
            ) from error
        if answer == operation:
            return answer
        if isinstance(answer, dict) and len(answer) == 1:
            if operation in answer:
                return answer[operation]
            refusal = answer.get("Error")
            if isinstance(refusal, str) and refusal in ErrorCode.__members__:
                raise NsmError(operation, code=ErrorCode[refusal])
        raise NsmError(operation, code=ErrorCode.InvalidResponse)

    def _exchange(self, operation: str, request: bytes) -> bytes:
        outgoing = array("B", request)
        incoming = array(
            "B", bytes(RESPONSE_MAX)
        )  # both stay referenced until the kernel is done with them
        raw = array(
            "Q",
            (outgoing.buffer_info()[0], len(outgoing), incoming.buffer_info()[0], len(incoming)),
        )
        try:
            fcntl.ioctl(self._fd, NSM_IOCTL_RAW, raw, True)
        except OSError as error:
            raise NsmError(operation, errno=error.errno) from error
        return incoming[: raw[3]].tobytes()


_T = TypeVar("_T")


def _field(answer: object, operation: str, name: str, kind: type[_T]) -> _T:
    """The field of an answer; its exact type is checked, so that True never passes for 1."""
    value = answer.get(name) if isinstance(answer, dict) else None
    if type(value) is not kind:
        raise NsmError(operation, code=ErrorCode.InvalidResponse, detail=name)
    return value
