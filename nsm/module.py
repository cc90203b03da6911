"""What every transport to the Nitro Secure Module (NSM) speaks: results, errors, limits."""

from __future__ import annotations

import enum
import errno as errno_names
import os
from dataclasses import dataclass
from typing import Final, Literal, Protocol

Source = Literal["enclave", "nitrotpm"]
"""Whose module it is, and so whose documents: a Nitro Enclave's NSM, or the NitroTPM of an EC2
instance.
"""

REQUEST_MAX: Final = (
    0x1000  # NSM_REQUEST_MAX_SIZE of linux/nsm.h: user data, nonce and public key together
)
RESPONSE_MAX: Final = 0x3000  # NSM_RESPONSE_MAX_SIZE: bounds an attestation document to some 12 KiB


class ErrorCode(enum.IntEnum):
    """The NSM's own error codes; names and numbers are those of aws-nitro-enclaves-nsm-api."""

    Success = 0
    InvalidArgument = 1
    InvalidIndex = 2
    InvalidResponse = 3
    ReadOnlyIndex = 4
    InvalidOperation = 5
    BufferTooSmall = 6
    InputTooLarge = 7
    InternalError = 8


class SetupError(Exception):
    """What leads to the NSM is set up wrongly; `subject` is what cannot be used."""

    subject = "library of the Nitro Secure Module"


class NsmError(Exception):
    """The NSM could not be reached, or refused.

    `operation` is the NSM's name of the request ("Attestation", "LockPCR", ...) or "open". Exactly
    one of `code` (the NSM, or the library in front of it, refused) and `errno` (the kernel did) is
    set.
    """

    module = "Nitro Secure Module"
    """what could not be reached, or refused"""
    hints: tuple[str, ...] = ()
    """what to do about it, where that is known"""

    def __init__(
        self,
        operation: str,
        *,
        code: ErrorCode | None = None,
        errno: int | None = None,
        detail: str = "",
    ) -> None:
        self.operation = operation
        self.code = code
        self.errno = errno
        if code is not None:
            reason = code.name
        else:
            number = errno or 0
            reason = (
                f"{errno_names.errorcode.get(number, f'errno {number}')} ({os.strerror(number)})"
            )
        super().__init__(f"{operation}: {reason}" + (f": {detail}" if detail else ""))


@dataclass(frozen=True, slots=True)
class Description:
    """Answer of DescribeNSM: `digest` is "SHA256", "SHA384" or "SHA512", `locked_pcrs` are indices
    in rising order.
    """

    version: tuple[int, int, int]
    module_id: str
    max_pcrs: int
    locked_pcrs: tuple[int, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class Pcr:
    """Answer of DescribePCR: `value` is as long as the module's digest, 48 bytes for SHA384."""

    locked: bool
    value: bytes


class Transport(Protocol):
    """The operations of the NSM, the same over the patched library and over the bare device.

    Every method raises NsmError and nothing else. Indices are 0..65535 and lengths at most
    REQUEST_MAX: `nsm.Nsm` has checked them.
    """

    source: Source
    """whose documents it gets"""
    name: str
    """what to tell a user of -v: the library's path and ABI version, or the device's path"""

    def describe(self) -> Description:
        """DescribeNSM."""
        ...

    def describe_pcr(self, index: int) -> Pcr:
        """DescribePCR."""
        ...

    def extend_pcr(self, index: int, data: bytes) -> bytes:
        """ExtendPCR: the new value, SHA384(old value || data)."""
        ...

    def lock_pcr(self, index: int) -> None:
        """LockPCR: one PCR, until the enclave ends."""
        ...

    def lock_pcrs(self, count: int) -> None:
        """LockPCRs: the PCRs 0 to count - 1."""
        ...

    def attest(
        self, user_data: bytes | None, nonce: bytes | None, public_key: bytes | None
    ) -> bytes:
        """Attestation: a COSE_Sign1 document; None leaves a field out, b"" does not."""
        ...

    def random(self) -> bytes:
        """GetRandom: at least one byte, up to 256."""
        ...

    def close(self) -> None:
        """Give the descriptor back; called exactly once."""
        ...
