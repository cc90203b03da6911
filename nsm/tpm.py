"""The NitroTPM of an EC2 instance as a transport of the NSM: attestation documents, randomness, and
the PCRs of the TPM.

A request is the NSM's own CBOR, written into an index of the TPM's non-volatile memory; Amazon's
command puts the answer in its place, and it is read back (NitroTPM-Tools of Amazon). Whoever may
talk to the TPM may write into the index in between, so a document must hold what was asked for.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
from typing import TYPE_CHECKING, Final, NoReturn

import cbor2

from nsm import cbor
from nsm.cose import DocumentError, decode, read_cose_sign1
from nsm.module import REQUEST_MAX, Description, ErrorCode, Pcr, Source
from nsm.tpm2 import (
    AUTH_READ,
    AUTH_WRITE,
    BARE_DEVICE,
    DEVICE,
    FIRMWARE_VERSIONS,
    PCR_COUNT,
    RC_HANDLE,
    RC_NV_DEFINED,
    RC_NV_SPACE,
    RC_NV_UNINITIALIZED,
    SHA384_SIZE,
    WRITTEN,
    Channel,
    DeviceNode,
    Tpm2,
    TpmError,
    vendor,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

VENDOR: Final = "NitroTPM"
INDEX_SIZE: Final = 8192  # request and answer, whichever is larger; as Amazon's own client
INDEX_ATTRIBUTES: Final = AUTH_READ | AUTH_WRITE
# Within what the TCG leaves to the owner, 0x01800000 to 0x01bfffff ("Registry of Reserved TPM 2.0
# Handles and Localities"); Amazon's client takes the first that is free, from 0x01000000 on.
INDEXES: Final = range(0x01A7_7E50, 0x01A7_7E60)
_ATTEMPTS: Final = 16
_INTERFERED: Final = frozenset({RC_HANDLE, RC_NV_UNINITIALIZED})
_RANDOM_SIZE: Final = 64
_ATTESTATION: Final = "Attestation"


class NitroTpm:
    """A transport over a NitroTPM; see `nsm.module.Transport`.

    Raises TpmError for a TPM that is not Nitro's (ENODEV) as well. Its PCRs are the machine's: none
    can be extended or locked here, and none counts as locked.
    """

    source: Source = "nitrotpm"

    def __init__(self, channel: Channel | None = None) -> None:
        channel = channel or DeviceNode()
        self.name = channel.name
        self._tpm = Tpm2(channel)
        try:
            _demand_nitro(self._tpm)
        except BaseException:
            self._tpm.close()
            raise

    @classmethod
    def on_this_machine(cls) -> Self:
        """The TPM through /dev/tpmrm0, which processes share, or through /dev/tpm0 where the
        resource manager in front of it would not pass Amazon's command on.
        """
        shared = cls(DeviceNode(DEVICE))
        try:
            if shared._tpm.lists_nsm_request():
                return shared
        except BaseException:
            shared.close()
            raise
        shared.close()
        return cls(DeviceNode(BARE_DEVICE))

    def describe(self) -> Description:
        """The firmware's version, and the module's id as a document tells it."""
        found = self._tpm.properties(FIRMWARE_VERSIONS[0], len(FIRMWARE_VERSIONS))
        first, second = (found.get(number, 0) for number in FIRMWARE_VERSIONS)
        return Description(
            version=(first >> 16, first & 0xFFFF, second),
            module_id=str(_fields(self.attest(None, None, None)).get("module_id")),
            max_pcrs=PCR_COUNT,
            locked_pcrs=(),
            digest="SHA384",
        )

    def describe_pcr(self, index: int) -> Pcr:
        """One PCR of the bank of SHA-384, of which documents are made."""
        if index >= PCR_COUNT:
            raise TpmError("DescribePCR", code=ErrorCode.InvalidIndex)
        value = self._tpm.pcr(index)
        if len(value) != SHA384_SIZE:
            detail = "the TPM has no bank of PCRs with SHA-384"
            raise TpmError("DescribePCR", code=ErrorCode.InvalidResponse, detail=detail)
        return Pcr(locked=False, value=value)

    def extend_pcr(self, index: int, data: bytes) -> bytes:  # noqa: ARG002 - the transport's
        """Refuse: the PCRs are the machine's."""
        _refuse("ExtendPCR")

    def lock_pcr(self, index: int) -> None:  # noqa: ARG002 - the transport's
        """Refuse: a TPM has no locks of PCRs."""
        _refuse("LockPCR")

    def lock_pcrs(self, count: int) -> None:  # noqa: ARG002 - the transport's
        """Refuse: a TPM has no locks of PCRs."""
        _refuse("LockPCRs")

    def attest(
        self, user_data: bytes | None, nonce: bytes | None, public_key: bytes | None
    ) -> bytes:
        """A document with exactly these fields; begun anew when somebody else took the index."""
        fields = {"user_data": user_data, "nonce": nonce, "public_key": public_key}
        request = cbor2.dumps({_ATTESTATION: fields})
        if len(request) > REQUEST_MAX:
            raise TpmError(_ATTESTATION, code=ErrorCode.InputTooLarge)
        for attempt in range(_ATTEMPTS):
            try:
                document = _document(self._ask(request, tidy=attempt == 0))
            except TpmError as error:
                if error.rc not in _INTERFERED:
                    raise
                continue
            said = _fields(document)
            if all(said.get(name) == value for name, value in fields.items()):
                return document
        detail = "another program of this instance uses the same index of the TPM"
        raise TpmError(_ATTESTATION, code=ErrorCode.InvalidResponse, detail=detail)

    def random(self) -> bytes:
        """Random bytes of the TPM, as many as it gives at once."""
        found = self._tpm.random(_RANDOM_SIZE)
        if not found:
            raise TpmError("GetRandom", code=ErrorCode.InvalidResponse, detail="no bytes")
        return found

    def close(self) -> None:
        """Close the device."""
        self._tpm.close()

    # ---- the index

    def _ask(self, request: bytes, *, tidy: bool) -> bytes:
        """The answer to a request, through an index that is gone again afterwards.

        What was there before and still is when we are done was left behind by a run that was
        killed: a TPM does one thing after the other, so whoever is alive is done, too. If one is
        not, it begins anew, and does not tidy: others are alive beside it. So each run takes an
        index from another one once at most, and as many as fit in our range come to an end.
        """
        there = self._ours()
        index = self._define(there)
        try:
            self._tpm.write(index, request)
            self._tpm.nsm_request(index)
            answer = self._tpm.read(index, INDEX_SIZE)
        finally:
            with contextlib.suppress(TpmError):  # what went wrong before is worth more
                self._tpm.undefine(index)
        if tidy and there:
            self._remove(handle for handle in self._ours() if handle in there)
        return answer

    def _ours(self) -> list[int]:
        """The indexes that are there now and look like those of ours."""
        return [handle for handle in self._defined() if self._looks_like_ours(handle)]

    def _defined(self) -> list[int]:
        found = self._tpm.handles(INDEXES.start, len(INDEXES))
        return [handle for handle in found if handle in INDEXES]

    def _looks_like_ours(self, handle: int) -> bool:
        try:
            public = self._tpm.read_public(handle)
        except TpmError as error:
            if error.rc != RC_HANDLE:  # it is gone
                raise
            return False
        return public.size == INDEX_SIZE and public.attributes & ~WRITTEN == INDEX_ATTRIBUTES

    def _define(self, left_behind: list[int]) -> int:
        """Define a free index; what was left behind makes room for it where there is none."""
        for last in (False, True):
            taken = self._defined()
            candidates = [handle for handle in INDEXES if handle not in taken]
            secrets.SystemRandom().shuffle(candidates)
            for handle in candidates:
                try:
                    self._tpm.define(handle, INDEX_SIZE)
                except TpmError as error:
                    if error.rc == RC_NV_DEFINED:  # another process was faster
                        continue
                    if last or error.rc != RC_NV_SPACE or not left_behind:
                        raise
                    break
                return handle
            self._remove(left_behind)
        detail = f"every index from {INDEXES.start:#x} to {INDEXES[-1]:#x} is taken"
        raise TpmError(_ATTESTATION, code=ErrorCode.InternalError, detail=detail)

    def _remove(self, handles: Iterable[int]) -> None:
        for handle in handles:
            with contextlib.suppress(TpmError):  # somebody else may have removed it
                self._tpm.undefine(handle)


def _demand_nitro(tpm: Tpm2) -> None:
    found = vendor(tpm)
    if found != VENDOR:
        detail = f"{tpm.name} is a TPM of {found!r}, not of {VENDOR!r}"
        raise TpmError("open", errno=errno.ENODEV, detail=detail)


def _refuse(operation: str) -> NoReturn:
    detail = "PCRs of a NitroTPM are the machine's: neither extended nor locked here"
    raise TpmError(operation, code=ErrorCode.InvalidOperation, detail=detail)


def _document(answer: bytes) -> bytes:
    """The document in an answer: one CBOR item {"Attestation": {"document": ...}} or {"Error": name
    of a code}, and padding of 0xff.
    """
    try:
        item, padding = cbor.decode_first(answer)
    except cbor.CborError as error:
        detail = f"answer is no CBOR: {error}"
        raise TpmError(_ATTESTATION, code=ErrorCode.InternalError, detail=detail) from error
    if isinstance(item, dict) and len(item) == 1 and not padding.strip(b"\xff"):
        refusal, answered = item.get("Error"), item.get(_ATTESTATION)
        if isinstance(refusal, str) and refusal in ErrorCode.__members__:
            raise TpmError(_ATTESTATION, code=ErrorCode[refusal])
        document = answered.get("document") if isinstance(answered, dict) else None
        if type(document) is bytes and document:
            return document
    raise TpmError(_ATTESTATION, code=ErrorCode.InvalidResponse)


def _fields(document: bytes) -> dict[object, object]:
    """The payload of a document, which is our own: read, not verified."""
    try:
        _, payload, _ = read_cose_sign1(document)
        fields = decode(payload, "payload")
    except DocumentError as error:
        detail = f"document cannot be read: {error}"
        raise TpmError(_ATTESTATION, code=ErrorCode.InvalidResponse, detail=detail) from error
    return fields if isinstance(fields, dict) else {}
