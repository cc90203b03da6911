"""COSE_Sign1 and the members of a CBOR map, read strictly: the form of an attestation document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

import cbor2
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from nsm import cbor

if TYPE_CHECKING:
    from collections.abc import Mapping

PAYLOAD_MAX: Final = 16384  # section 3.2.1
_TAG_COSE_SIGN1: Final = b"\xd2"  # tag 18; allowed by the specification, never sent by an NSM
# tag, array and headers, the signature and the lengths around them
_ENVELOPE_MAX: Final = PAYLOAD_MAX + 256
SIGNATURE_SIZE: Final = 96  # r || s, each as long as the order of P-384 (RFC 9053, section 2.1)


class DocumentError(Exception):
    """The bytes are no attestation document, or not an authentic and expected one.

    `check` is the short name of the check that failed: "format", or one of `CHECKS`.
    """

    def __init__(self, check: str, message: str) -> None:
        self.check = check
        super().__init__(message)


def read_cose_sign1(
    data: bytes, what: str = "document", signature_size: int = SIGNATURE_SIZE
) -> tuple[bytes, bytes, bytes]:
    """The protected header, payload and signature of COSE_Sign1 = [protected, unprotected, payload,
    signature]; `what` is its name in messages, and the signature has so many bytes.
    """
    if len(data) > _ENVELOPE_MAX:
        raise DocumentError(
            "format", f"{what} has {len(data)} bytes, expected at most {_ENVELOPE_MAX}"
        )
    item = decode(data.removeprefix(_TAG_COSE_SIGN1), what)
    if type(item) is not list or len(item) != 4:
        raise DocumentError(
            "format", f"{what} is {kind_of(item)}, expected the four elements of a COSE_Sign1"
        )
    protected, unprotected, payload, signature = item
    if type(unprotected) is not dict or unprotected:
        # the NSM sends an empty map, and nothing in it would be signed
        raise DocumentError(
            "format", f"unprotected header is {kind_of(unprotected)}, expected an empty map"
        )
    for name, part in (
        ("protected header", protected),
        ("payload", payload),
        ("signature", signature),
    ):
        if type(part) is not bytes:
            raise DocumentError("format", f"{name} is {kind_of(part)}, expected a byte string")
    sized("payload", payload, 1, PAYLOAD_MAX)
    return protected, payload, sized("signature", signature, signature_size, signature_size)


def to_be_signed(protected: bytes, payload: bytes) -> bytes:
    """Return what the signature is over: Sig_structure of RFC 9052, section 4.4, with no external
    data.
    """
    return cbor2.dumps(["Signature1", protected, b"", payload])


def signature_to_der(signature: bytes) -> bytes:
    """Turn r || s, as COSE has it (RFC 9053, section 2.1), into what X.509 and OpenSSL have."""
    half = len(signature) // 2
    return encode_dss_signature(int.from_bytes(signature[:half]), int.from_bytes(signature[half:]))


def decode(data: bytes, name: str) -> object:
    """The one item of CBOR that the data is; `name` is for the message."""
    try:
        return cbor.decode(data)
    except cbor.CborError as error:
        raise DocumentError("format", f"{name} is not one item of CBOR: {error}") from error


_T = TypeVar("_T")


def mandatory(fields: Mapping[str, object], name: str, kind: type[_T]) -> _T:
    """A mandatory field; its exact type is checked, so that True never passes for 1."""
    value = fields.get(name)
    if type(value) is not kind:
        raise DocumentError("format", f"{name} is {kind_of(value)}, expected {_KINDS[kind]}")
    return value


def optional(fields: Mapping[str, object], name: str, low: int, high: int) -> bytes | None:
    """An optional byte string: absent, or null as NSMs send it, or of a length from low to high."""
    if fields.get(name) is None:
        return None
    return sized(name, mandatory(fields, name, bytes), low, high)


def sized(name: str, value: bytes, low: int, high: int) -> bytes:
    """The value itself, if its length is from low to high."""
    if not low <= len(value) <= high:
        expected = f"{low}" if low == high else f"{low} to {high}"
        raise DocumentError("format", f"{name} has {len(value)} bytes, expected {expected}")
    return value


_KINDS: Final[Mapping[type, str]] = {
    int: "an integer",
    str: "a text string",
    bytes: "a byte string",
    list: "an array",
    dict: "a map",
    bool: "a boolean",
    float: "a float",
    type(None): "absent or null",
}


def kind_of(value: object) -> str:
    """CBOR's name for what a value is; its content is the sender's and stays out of messages."""
    kind = _KINDS.get(type(value), "an unknown item")
    return f"{kind} of {len(value)}" if isinstance(value, (list, dict)) else kind
