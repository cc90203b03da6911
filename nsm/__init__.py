"""The Nitro Secure Module (NSM) of an AWS Nitro Enclave, or the NitroTPM of an EC2 instance, and
their evidence.

    with Nsm() as nsm:
        document = nsm.attest(public_key=spki)

Importing this package opens nothing and works anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nsm.module import (
    REQUEST_MAX,
    RESPONSE_MAX,
    Description,
    ErrorCode,
    NsmError,
    Pcr,
    SetupError,
    Source,
    Transport,
)
from nsm.source import TITLES
from nsm.source import find_transport as _find_transport

if TYPE_CHECKING:
    from typing import Self

__all__ = [
    "REQUEST_MAX",
    "RESPONSE_MAX",
    "Description",
    "ErrorCode",
    "Nsm",
    "NsmError",
    "Pcr",
    "SetupError",
    "Source",
    "Transport",
]

_INDEX_MAX: Final = 0xFFFF  # indices are u16 in the NSM's interface


class Nsm:
    """One open NSM, safe to share between threads; a context manager that closes it once.

    Without a transport it is found. NSM_SOURCE says whose module it is: "nsm", "nitrotpm", or
    "auto", which is the NSM where /dev/nsm is, else a TPM that says it is Nitro's. The NSM is
    reached through the library that NSM_LIBRARY names (which must work), else the patched libnsm.so
    of this package or of the dynamic linker, else the device node /dev/nsm; the NitroTPM through
    NSM_TPM or /dev/tpmrm0. Raises SetupError for what is set up wrongly; opening and every
    operation raise NsmError.
    """

    def __init__(self, transport: Transport | None = None) -> None:
        self._transport: Transport | None = transport or _find_transport()
        self.transport_name = self._transport.name
        self.source: Source = self._transport.source
        self.title = TITLES[self.source]

    def describe(self) -> Description:
        """Module id, version, digest, number of PCRs and which of them are locked."""
        return self._open("DescribeNSM").describe()

    def describe_pcr(self, index: int) -> Pcr:
        """Value and lock of one PCR."""
        return self._open("DescribePCR", index=index).describe_pcr(index)

    def extend_pcr(self, index: int, data: bytes) -> bytes:
        """Extend one PCR, SHA384(old value || data), and return its new value."""
        return self._open("ExtendPCR", index=index, size=len(data)).extend_pcr(index, data)

    def lock_pcr(self, index: int) -> None:
        """Make one PCR read-only until the enclave ends."""
        self._open("LockPCR", index=index).lock_pcr(index)

    def lock_pcrs(self, count: int) -> None:
        """Make the PCRs 0 to count - 1 read-only until the enclave ends."""
        self._open("LockPCRs", index=count).lock_pcrs(count)

    def attest(
        self,
        user_data: bytes | None = None,
        nonce: bytes | None = None,
        public_key: bytes | None = None,
    ) -> bytes:
        """An attestation document, an untagged COSE_Sign1 of 4 to 12 KiB; the fields share about
        4000 bytes.
        """
        size = sum(len(field) for field in (user_data, nonce, public_key) if field)
        document = self._open("Attestation", size=size).attest(user_data, nonce, public_key)
        if not document:
            raise NsmError("Attestation", code=ErrorCode.InvalidResponse, detail="no document")
        return document

    def random(self, length: int = 256) -> bytes:
        """Random bytes, asked for in as many requests as it takes (the NSM gives up to 256 at a
        time).
        """
        transport = self._open("GetRandom")
        parts = bytearray()
        while len(parts) < length:
            part = transport.random()
            if not part:
                raise NsmError("GetRandom", code=ErrorCode.InvalidResponse, detail="no bytes")
            parts += part
        return bytes(parts[:length])

    def close(self) -> None:
        """Give the descriptor back; a second call does nothing."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, operation: str, index: int = 0, size: int = 0) -> Transport:
        """The transport, once what is asked can be put into a request at all."""
        if self._transport is None:
            raise NsmError(operation, code=ErrorCode.InvalidOperation, detail="this Nsm is closed")
        if not 0 <= index <= _INDEX_MAX:
            raise NsmError(operation, code=ErrorCode.InvalidIndex)
        if size > REQUEST_MAX:
            raise NsmError(operation, code=ErrorCode.InputTooLarge)
        return self._transport
