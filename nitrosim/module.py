"""A Nitro Secure Module in software: CBOR requests in, CBOR answers and attestation documents out.

It answers as the hardware does: names, field order and errors of aws-nitro-enclaves-nsm-api,
documents in the shape of genuine ones. Where no hardware behaviour is public, it follows QEMU's
virtio-nsm; what it assumes is said there.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Literal

import cbor2
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from nitrosim.device import SilenceError
from nsm import cbor
from nsm.module import REQUEST_MAX, ErrorCode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nitrosim.pki import NsmPki

MapForm = Literal["indefinite", "definite"]
_Fields = dict[Any, Any]  # what a hostile request holds

MAX_PCRS: Final = 32
PCR_SIZE: Final = 48  # SHA-384
BOOT_LOCKED: Final = range(
    16
)  # PCR0 to PCR15 belong to the platform, the others to the application
RANDOM_SIZE: Final = 256
VERSION: Final = (1, 0, 0)
ZERO_PCR: Final = bytes(PCR_SIZE)
DEBUG_ZEROES: Final = (0, 1, 2, 8)  # what debug mode zeroes; PCR3 and PCR4 keep their values

DEFAULT_MODULE_ID: Final = "i-0123456789abcdef0-enc0123456789abcdef"
DEFAULT_ROLE_ARN: Final = "arn:aws:iam::123456789012:role/nitrosim"

_ERROR_FAULTS: Final = {
    "nsm-" + re.sub(r"(?<=[a-z])(?=[A-Z])", "-", code.name).lower(): code
    for code in ErrorCode
    if code
}
FAULTS: Final[Mapping[str, str]] = {
    **{
        name: f"the NSM answers every request with {code.name}"
        for name, code in _ERROR_FAULTS.items()
    },
    "nsm-garbage": "the NSM's answers are no CBOR",
    "nsm-wrong-kind": "the NSM answers another question than the one asked",
    "nsm-empty-random": "the NSM's random answer holds no bytes",
    "silent-module": "the NSM answers nothing, as the driver waits 120 s for it",
    "silent-attestation": "the same for attestation documents alone",
    "bad-signature": "the document's signature is wrong",
    "expired-leaf": "the document and the certificate it is signed with are six hours old",
    "foreign-root": "the document comes from another PKI",
    "no-public-key": "the document lacks the public key that was asked for",
    "other-public-key": "the document holds somebody else's public key",
}
"""Faults of the NSM by name, each with what it does."""


def extended(value: bytes, data: bytes) -> bytes:
    """The value of a PCR after data was extended into it."""
    return hashlib.sha384(value + data).digest()


def default_pcrs(
    module_id: str = DEFAULT_MODULE_ID, role_arn: str = DEFAULT_ROLE_ARN
) -> dict[int, bytes]:
    """PCR0 to PCR15 of the built-in image, signed, on the parent instance and with the role that
    are named.
    """
    values = dict.fromkeys(BOOT_LOCKED, ZERO_PCR)
    for index, label in enumerate((b"nitrosim image", b"nitrosim kernel", b"nitrosim application")):
        values[index] = hashlib.sha384(label).digest()
    values[3] = extended(ZERO_PCR, role_arn.encode())
    values[4] = extended(ZERO_PCR, instance_of(module_id).encode())
    values[8] = extended(ZERO_PCR, hashlib.sha384(b"nitrosim signing certificate").digest())
    return values


def instance_of(module_id: str) -> str:
    """The id of the parent instance, which the module's own begins with."""
    return module_id.partition("-enc")[0]


DEFAULT_PCRS: Final[Mapping[int, bytes]] = default_pcrs()


def encode_payload(fields: Mapping[str, object], map_form: MapForm = "indefinite") -> bytes:
    """A document's payload; modules of today write its map with indefinite length, those to early
    2025 definite.
    """
    if map_form == "definite":
        return cbor2.dumps(fields)
    return (
        b"\xbf"
        + b"".join(cbor2.dumps(key) + cbor2.dumps(value) for key, value in fields.items())
        + b"\xff"
    )


def sign_document(payload: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """An attestation document: its payload in an untagged COSE_Sign1 (RFC 9052 4.2), ES384."""
    protected = cbor2.dumps({1: -35})  # alg: ES384
    signed = cbor2.dumps(["Signature1", protected, b"", payload])
    r, s = decode_dss_signature(key.sign(signed, ec.ECDSA(hashes.SHA384())))
    return cbor2.dumps([protected, {}, payload, r.to_bytes(48) + s.to_bytes(48)])


class _RefusalError(Exception):
    def __init__(self, code: ErrorCode) -> None:
        super().__init__(code.name)
        self.code = code


class SoftwareNsm:
    """One module with its PCR bank; `answer` may be called from any thread.

    `pcrs` replaces single values of the built-in image; debug mode zeroes PCR0, 1, 2 and 8 whatever
    they are. PCR0 to PCR15 are locked from the start. `pki` is renewed, below its root, as
    certificates near their end. `fault` is one of FAULTS. Raises ValueError for a PCR or a fault
    that cannot be.
    """

    def __init__(
        self,
        pki: NsmPki,
        *,
        pcrs: Mapping[int, bytes] | None = None,
        debug: bool = False,
        module_id: str = DEFAULT_MODULE_ID,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        map_form: MapForm = "indefinite",
        fault: str | None = None,
    ) -> None:
        if fault is not None and fault not in FAULTS:
            raise ValueError(f"no fault of the NSM: {fault}")
        self._module_id = module_id
        self._clock = clock
        self._map_form: MapForm = map_form
        self._fault = fault
        self._pki = pki.twin(clock()) if fault == "foreign-root" else pki
        self._pcrs = _bank(default_pcrs(module_id) | dict(pcrs or {}), debug=debug)
        self._locked = set(BOOT_LOCKED)
        self._lock = threading.Lock()

    @property
    def pcrs(self) -> tuple[bytes, ...]:
        """The 32 values as they are now."""
        with self._lock:
            return tuple(self._pcrs)

    def answer(self, request: bytes) -> bytes:
        """Answer one request; a refusal is an answer too, so nothing is ever raised for what a
        request holds. Raises SilenceError where the fault is that.
        """
        if self._fault == "silent-module":
            raise SilenceError
        if self._fault == "nsm-garbage":
            return b"\xffno CBOR"
        try:
            with self._lock:
                return cbor2.dumps(self._answer(request))
        except _RefusalError as refusal:
            return cbor2.dumps({"Error": refusal.code.name})

    def _answer(self, request: bytes) -> object:
        if self._fault in _ERROR_FAULTS:
            raise _RefusalError(_ERROR_FAULTS[self._fault])
        if len(request) > REQUEST_MAX:
            raise _RefusalError(ErrorCode.InputTooLarge)
        name, fields = _parse(request)
        if self._fault == "silent-attestation" and name == "Attestation":
            raise SilenceError
        if self._fault == "nsm-wrong-kind":
            return "LockPCRs" if name == "LockPCR" else "LockPCR"
        result = self._perform(name, fields)
        return name if result is None else {name: result}

    def _perform(self, name: str, fields: _Fields | None) -> object:
        """The fields of the answer, None when it has none."""
        if fields is None:
            bare = {"DescribeNSM": self._describe, "GetRandom": self._random}.get(name)
            if bare is None:
                raise _RefusalError(ErrorCode.InvalidOperation)
            return bare()
        operations: dict[str, Callable[[_Fields], object]] = {
            "DescribePCR": self._describe_pcr,
            "ExtendPCR": self._extend_pcr,
            "LockPCR": self._lock_pcr,
            "LockPCRs": self._lock_pcrs,
            "Attestation": self._attest,
        }
        if name not in operations:
            raise _RefusalError(ErrorCode.InvalidOperation)
        return operations[name](fields)

    def _describe(self) -> object:
        major, minor, patch = VERSION
        return {
            "version_major": major,
            "version_minor": minor,
            "version_patch": patch,
            "module_id": self._module_id,
            "max_pcrs": MAX_PCRS,
            "locked_pcrs": sorted(self._locked),
            "digest": "SHA384",
        }

    def _describe_pcr(self, fields: _Fields) -> object:
        index = _index(fields)
        return {"lock": index in self._locked, "data": self._pcrs[index]}

    def _extend_pcr(self, fields: _Fields) -> object:
        data = _bytes(fields, "data")
        if data is None:
            raise _RefusalError(ErrorCode.InvalidOperation)
        index = self._writable(fields)
        self._pcrs[index] = extended(self._pcrs[index], data)
        return {"data": self._pcrs[index]}

    def _lock_pcr(self, fields: _Fields) -> None:
        self._locked.add(self._writable(fields))

    def _lock_pcrs(self, fields: _Fields) -> None:
        """Lock a range; members that are locked already are no error."""
        count = _number(fields, "range")
        if count > MAX_PCRS:
            raise _RefusalError(ErrorCode.InvalidIndex)
        self._locked.update(range(count))

    def _writable(self, fields: _Fields) -> int:
        index = _index(fields)
        if index in self._locked:
            raise _RefusalError(ErrorCode.ReadOnlyIndex)
        return index

    def _random(self) -> object:
        return {"random": b"" if self._fault == "nsm-empty-random" else os.urandom(RANDOM_SIZE)}

    def _attest(self, fields: _Fields) -> object:
        now, pki = self._signer()
        payload = {
            "module_id": self._module_id,
            "digest": "SHA384",
            "timestamp": int(now.timestamp() * 1000),
            **self._measurements(),
            "certificate": pki.leaf_der,
            "cabundle": list(pki.cabundle),
            "public_key": self._public_key(_bytes(fields, "public_key")),
            "user_data": _bytes(fields, "user_data"),
            "nonce": _bytes(fields, "nonce"),
        }
        document = sign_document(encode_payload(payload, self._map_form), pki.leaf_key)
        if self._fault == "bad-signature":
            document = document[:-1] + bytes([document[-1] ^ 1])
        return {"document": document}

    def _measurements(self) -> dict[str, object]:
        """The PCRs of a document, under the name of their kind."""
        return {"pcrs": {index: self._pcrs[index] for index in sorted(self._locked)}}

    def _signer(self) -> tuple[datetime, NsmPki]:
        """The time to write into a document, and the PKI to sign it with."""
        now = self._clock()
        self._pki = self._pki.renewed(now)
        if self._fault == "expired-leaf":
            past = now - timedelta(hours=6)
            return past, self._pki.with_leaf_of(past)
        return now, self._pki

    def _public_key(self, asked: bytes | None) -> bytes | None:
        if self._fault == "no-public-key":
            return None
        return _other_public_key() if self._fault == "other-public-key" else asked


def _bank(values: Mapping[int, bytes], *, debug: bool) -> list[bytes]:
    for index, value in values.items():
        if not 0 <= index < MAX_PCRS:
            raise ValueError(f"no such PCR: {index}, the last is {MAX_PCRS - 1}")
        if len(value) != PCR_SIZE:
            raise ValueError(f"PCR{index} has {PCR_SIZE} bytes, not {len(value)}")
    zeroes = DEBUG_ZEROES if debug else ()
    return [
        ZERO_PCR if index in zeroes else values.get(index, ZERO_PCR) for index in range(MAX_PCRS)
    ]


def _parse(request: bytes) -> tuple[str, _Fields | None]:
    """The name of a request and its fields: serde's externally tagged enum, a text or a map of one
    entry.
    """
    try:
        item = cbor.decode(request)
    except cbor.CborError as error:
        raise _RefusalError(ErrorCode.InvalidOperation) from error
    if isinstance(item, str):
        return item, None
    if isinstance(item, dict) and len(item) == 1:
        ((name, fields),) = item.items()
        if isinstance(name, str) and isinstance(fields, dict):
            return name, fields
    raise _RefusalError(ErrorCode.InvalidOperation)


def _number(fields: _Fields, name: str) -> int:
    """A field of type u16; its exact type is checked, so that True never passes for 1."""
    value = fields.get(name)
    if type(value) is not int or not 0 <= value <= 0xFFFF:
        raise _RefusalError(ErrorCode.InvalidOperation)
    return value


def _index(fields: _Fields) -> int:
    index = _number(fields, "index")
    if index >= MAX_PCRS:
        raise _RefusalError(ErrorCode.InvalidIndex)
    return index


def _bytes(fields: _Fields, name: str) -> bytes | None:
    """An optional byte string; a text is taken as its bytes, an absent field as null."""
    value = fields.get(name)
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    raise _RefusalError(ErrorCode.InvalidOperation)


@functools.cache
def _other_public_key() -> bytes:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
