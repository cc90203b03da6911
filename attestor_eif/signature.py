"""The signature of an enclave image file, which covers PCR0, and the certificate, which is PCR8.

The section is CBOR: an array with one map of signing_certificate, in PEM, and signature, an
untagged COSE_Sign1. AWS's builder writes both, and the register's value within the payload, as
arrays of small integers rather than as byte strings. The payload is the map of register_index, 0,
and register_value, the 48 bytes of PCR0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import cbor2
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import Encoding

from attestor_eif.errors import EifError
from keypolicy.measure import pcr_of_certificate
from nsm.certificates import UNREADABLE, in_utc
from nsm.cose import (
    DocumentError,
    decode,
    kind_of,
    mandatory,
    read_cose_sign1,
    signature_to_der,
    to_be_signed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime


class Curve(NamedTuple):
    """How a curve signs: COSE's algorithm (RFC 9053, table 1), its hash, and bytes of r and s."""

    algorithm: int
    hash: hashes.HashAlgorithm
    size: int
    kms_algorithm: str


CURVES: Final[Mapping[str, Curve]] = {
    "secp256r1": Curve(-7, hashes.SHA256(), 32, "ECDSA_SHA_256"),
    "secp384r1": Curve(-35, hashes.SHA384(), 48, "ECDSA_SHA_384"),
    "secp521r1": Curve(-36, hashes.SHA512(), 66, "ECDSA_SHA_512"),
}
_BEGIN: Final = re.compile(rb"^-----BEGIN CERTIFICATE-----\s*?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class SigningCertificate:
    """A certificate that enclave images are signed with, and its key."""

    pem: bytes = field(repr=False)
    certificate: x509.Certificate
    key: ec.EllipticCurvePublicKey

    @classmethod
    def load(cls, pem: bytes) -> SigningCertificate:
        """Read the first certificate of PEM text; raises EifError.

        Readers differ in which blocks they pass over, so that all must be certificates.
        """
        found = len(_BEGIN.findall(pem))
        if not found or found != pem.count(b"-----BEGIN"):
            raise EifError("signing certificate is not PEM of certificates and nothing else")
        try:
            certificate = x509.load_pem_x509_certificate(pem)
            key = certificate.public_key()
            # what is read late by the library: nothing of it may fail where it is shown
            _ = certificate.subject.rfc4514_string(), certificate.issuer.rfc4514_string()
            _ = certificate.not_valid_before_utc, certificate.not_valid_after_utc
            _ = certificate.signature_algorithm_oid, certificate.signature
        except UNREADABLE as error:
            raise EifError(f"signing certificate cannot be read: {error}") from error
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in CURVES:
            raise EifError(
                f"signing certificate holds {_name_of(key)}, expected a key on one of "
                f"{', '.join(CURVES)}"
            )
        return cls(pem, certificate, key)

    @property
    def der(self) -> bytes:
        """Return the certificate in DER."""
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def curve(self) -> Curve:
        """Return how its key signs."""
        return CURVES[self.key.curve.name]


@dataclass(frozen=True, slots=True)
class Signature:
    """The content of a signature section; what it says is not verified."""

    certificate: SigningCertificate
    cose: bytes = field(repr=False)

    @property
    def pcr8(self) -> bytes:
        """Return what an enclave of the image attests as PCR8."""
        return pcr_of_certificate(self.certificate.der)


def _name_of(key: object) -> str:
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"a key on {key.curve.name}"
    return f"a key of another kind ({type(key).__name__.strip('_')})"


def parse(section: bytes) -> Signature:
    """Read the contents of a signature section; raises EifError."""
    try:
        item = decode(section, "it")
        if type(item) is not list or len(item) != 1 or type(item[0]) is not dict:
            raise EifError(f"signature section is {kind_of(item)}, expected an array of one map")
        fields = item[0]
        if set(fields) != {"signing_certificate", "signature"}:
            raise EifError("signature section has not signing_certificate and signature alone")
        pem, cose = (
            _bytes_of(mandatory(fields, name, list), name)
            for name in ("signing_certificate", "signature")
        )
    except DocumentError as error:
        raise EifError(f"signature section cannot be read: {error}") from error
    return Signature(SigningCertificate.load(pem), cose)


def _bytes_of(numbers: list[object], name: str) -> bytes:
    """Return the bytes that an array of integers stands for; raises EifError."""
    if any(type(number) is not int for number in numbers):
        raise EifError(f"{name} is an array with other items than integers")
    try:
        return bytes(numbers)  # type: ignore[arg-type]  # they were looked at
    except ValueError:
        raise EifError(f"{name} is an array with integers that are no bytes") from None


def verify(signature: Signature, pcr0: bytes) -> None:
    """Raise EifError unless the signature is by the certificate's key and covers this PCR0."""
    curve = signature.certificate.curve
    try:
        protected, payload, value = read_cose_sign1(signature.cose, "COSE_Sign1", 2 * curve.size)
        if protected != _protected(curve):
            raise EifError(
                f"signature has the protected header {protected[:16].hex()}, expected "
                f"{_protected(curve).hex()} for a key on {signature.certificate.key.curve.name}"
            )
        signed = _signed_pcr0(payload)
    except DocumentError as error:
        raise EifError(f"signature cannot be read: {error}") from error
    if not _is_by_key(signature.certificate, to_be_signed(protected, payload), value):
        raise EifError("signature is not by the key of the signing certificate in the image")
    if signed != pcr0:
        raise EifError(
            f"signature covers another image: PCR0 {signed.hex()}, measured {pcr0.hex()}"
        )


def _is_by_key(certificate: SigningCertificate, signed: bytes, value: bytes) -> bool:
    algorithm = ec.ECDSA(certificate.curve.hash)
    try:
        certificate.key.verify(signature_to_der(value), signed, algorithm)
    except InvalidSignature:
        return False
    return True


def _signed_pcr0(payload: bytes) -> bytes:
    """Read the PCR0 that a payload names; raises EifError, DocumentError."""
    item = decode(payload, "payload")
    if type(item) is not dict or set(item) != {"register_index", "register_value"}:
        raise EifError(
            f"signature covers {kind_of(item)}, expected one of register_index, register_value"
        )
    index = mandatory(item, "register_index", int)
    if index != 0:
        raise EifError(f"signature covers PCR{index}, expected PCR0")
    return _bytes_of(mandatory(item, "register_value", list), "register_value")


def check_validity(signer: SigningCertificate, at: datetime) -> None:
    """Raise EifError unless the certificate is valid then: no enclave starts otherwise."""
    first, last = signer.certificate.not_valid_before_utc, signer.certificate.not_valid_after_utc
    if not first <= at <= last:
        raise EifError(
            f"signing certificate is valid from {in_utc(first)} to {in_utc(last)}, but it is "
            f"{in_utc(at)}",
            "nitro-cli starts no image whose certificate is not valid: it must be signed anew",
        )


def make(certificate: SigningCertificate, pcr0: bytes, sign: Callable[[bytes], bytes]) -> bytes:
    """Make the contents of a signature section that covers this PCR0.

    `sign` makes an ECDSA signature in DER of a digest by the hash of the certificate's curve.
    Raises EifError if what it returns is no signature by the certificate's key.
    """
    curve = certificate.curve
    protected = _protected(curve)
    payload = cbor2.dumps({"register_index": 0, "register_value": list(pcr0)})
    signed = to_be_signed(protected, payload)
    digest = hashes.Hash(curve.hash)
    digest.update(signed)
    try:
        r, s = utils.decode_dss_signature(sign(digest.finalize()))
        value = r.to_bytes(curve.size) + s.to_bytes(curve.size)
    except (ValueError, OverflowError) as error:
        wanted = certificate.key.curve.name
        raise EifError(f"what the key made is no signature on {wanted}") from error
    if not _is_by_key(certificate, signed, value):
        raise EifError("key is not that of the signing certificate")
    cose = cbor2.dumps([protected, {}, payload, value])
    return cbor2.dumps([{"signing_certificate": list(certificate.pem), "signature": list(cose)}])


def _protected(curve: Curve) -> bytes:
    """Return the protected header: a map of the algorithm alone (RFC 9052, section 3.1)."""
    return cbor2.dumps({1: curve.algorithm})
