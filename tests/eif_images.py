"""Enclave image files for tests: made by the room itself, by AWS's eif_build, or spoilt by hand."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from attestor_eif import Header, Image, InMemory, Kind, Metadata, Plan, read, verified
from attestor_eif import signature as eif_signature
from attestor_eif.signature import SigningCertificate

if TYPE_CHECKING:
    from collections.abc import Sequence

NOW: Final = datetime.now(UTC)
DAY: Final = timedelta(days=1)
HEADER_SIZE: Final = 548
CRC: Final = slice(HEADER_SIZE - 4, HEADER_SIZE)
CURVES: Final[dict[str, ec.EllipticCurve]] = {
    "P-256": ec.SECP256R1(),
    "P-384": ec.SECP384R1(),
    "P-521": ec.SECP521R1(),
}


@dataclass(frozen=True)
class Signer:
    """A key and its certificate, in PEM as in files."""

    key: ec.EllipticCurvePrivateKey
    pem: bytes

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def certificate(self) -> SigningCertificate:
        return SigningCertificate.load(self.pem)

    def sign(self, digest: bytes) -> bytes:
        algorithm = self.certificate.curve.hash
        return self.key.sign(digest, ec.ECDSA(utils.Prehashed(algorithm)))


def certificate_of(
    public: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
    issuer: ec.EllipticCurvePrivateKey,
    *,
    days: tuple[int, int] = (-1, 1),
) -> bytes:
    """A certificate in PEM, valid from so many days before now to so many behind it."""
    name = x509.Name(
        [
            x509.NameAttribute(x509.NameOID.COUNTRY_NAME, "DE"),
            x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, 'A "provider"'),
            x509.NameAttribute(x509.NameOID.COMMON_NAME, "enclave"),
        ]
    )
    builder = x509.CertificateBuilder(
        name, name, public, 17, NOW + days[0] * DAY, NOW + days[1] * DAY
    )
    return builder.sign(issuer, hashes.SHA384()).public_bytes(Encoding.PEM)


@cache
def signer(curve: str = "P-384", first: int = -1, last: int = 1) -> Signer:
    """A signer with a key on this curve, and a certificate valid on these days."""
    key = ec.generate_private_key(CURVES[curve])
    return Signer(key, certificate_of(key.public_key(), key, days=(first, last)))


PARTS: Final[list[tuple[Kind, bytes]]] = [
    (Kind.KERNEL, b"kernel" * 100),
    (Kind.COMMAND_LINE, b"reboot=k panic=30"),
    (Kind.METADATA, Metadata("app", "1.0", custom={"team": "ours"}).to_bytes()),
    (Kind.RAMDISK, b"first" * 50),
    (Kind.RAMDISK, b"second" * 70),
]


def assembled(parts: Sequence[tuple[Kind, bytes]], header: Header | None = None) -> bytes:
    """The file that these sections make, in this order, whatever a reader says to it."""
    sections = [(kind, InMemory(data)) for kind, data in parts]
    return b"".join(Plan(header or Header(()), sections).blocks())


def loaded(data: bytes) -> Image:
    """The image that a file is, with its signature verified."""
    return verified(read(io.BytesIO(data)), NOW)


def signed(data: bytes, by: Signer) -> bytes:
    """The file with a signature as its last section."""
    image = read(io.BytesIO(data))
    section = eif_signature.make(by.certificate, image.pcrs[0], by.sign)
    parts = [(part.kind, data[part.contents : part.end]) for part in image.sections]
    return assembled([*parts, (Kind.SIGNATURE, section)], image.header)


def with_crc(data: bytes) -> bytes:
    """The file with the CRC that its bytes have now, as an attacker would leave it."""
    crc = zlib.crc32(data[HEADER_SIZE:], zlib.crc32(data[: CRC.start]))
    return data[: CRC.start] + struct.pack(">I", crc) + data[HEADER_SIZE:]


def changed(data: bytes, at: int, value: bytes) -> bytes:
    """The file with other bytes at an offset, and the CRC made right again."""
    return with_crc(data[:at] + value + data[at + len(value) :])
