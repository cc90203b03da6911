"""Throw-away PKIs: the five certificates behind an attestation document, and TLS for the simulated
endpoints.

The NSM's certificates have the real shapes and lifetimes (AWS's "Nitro Enclaves attestation
process" and genuine documents), so that a verifier meets here what it meets on hardware; only their
names say that nothing of this is AWS.
"""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

_USAGES: Final = (
    "digital_signature",
    "content_commitment",  # RFC 5280 section 4.2.1.3; nonRepudiation in its older name
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)
_CA_USAGE: Final = frozenset({"digital_signature", "key_cert_sign", "crl_sign"})


@dataclass(frozen=True, slots=True)
class Shape:
    """What one certificate is made like; a negative test alters single fields of it.

    `age` is how long ago it was issued. `ca` None leaves basicConstraints out, `usage` None
    keyUsage; `identifiers` says whether it carries the subject's and the authority's key
    identifiers.
    """

    common_name: str
    lifetime: timedelta
    age: timedelta = timedelta()
    ca: bool | None = True
    path_length: int | None = None
    usage: frozenset[str] | None = _CA_USAGE
    usage_critical: bool = True
    identifiers: bool = True
    crl: bool = False
    curve: ec.EllipticCurve = field(default_factory=ec.SECP384R1)


SHAPES: Final[Mapping[str, Shape]] = {
    "root": Shape(
        common_name="nitrosim.nitro-enclaves",
        lifetime=timedelta(days=30 * 365.25),
        age=timedelta(days=365),
    ),
    "regional": Shape(
        common_name="{region}.nitrosim.nitro-enclaves",
        lifetime=timedelta(days=20, hours=1),
        age=timedelta(days=5),
        path_length=2,
        crl=True,
    ),
    "zonal": Shape(
        common_name="zonal.{region}.nitrosim.nitro-enclaves",
        lifetime=timedelta(days=5, hours=18),
        age=timedelta(days=2),
        path_length=1,
        crl=True,
    ),
    "instance": Shape(
        common_name="{instance}.{region}.nitrosim.nitro-enclaves",
        lifetime=timedelta(days=1),
        age=timedelta(hours=12),
        path_length=0,
        usage=frozenset({"key_cert_sign"}),
    ),
    "leaf": Shape(
        common_name="{module_id}.{region}.nitrosim",
        lifetime=timedelta(hours=3, seconds=3),
        age=timedelta(seconds=3),
        ca=False,
        usage=frozenset({"digital_signature", "content_commitment"}),
        usage_critical=False,
        identifiers=False,
    ),
}
"""The five levels of an attestation document's certificates, from the root down."""


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def der(self) -> bytes:
        """The certificate in DER."""
        return self.certificate.public_bytes(serialization.Encoding.DER)


def issue(
    shape: Shape,
    *,
    now: datetime,
    issuer: Issued | None = None,
    extensions: Sequence[x509.ExtensionType] = (),
) -> Issued:
    """Make a key and its certificate; without an issuer it signs itself."""
    key = ec.generate_private_key(shape.curve)
    subject = _name(shape.common_name)
    signer = issuer.key if issuer else key
    start = now.replace(microsecond=0) - shape.age
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + shape.lifetime)
    )
    for extension, critical in _extensions(shape, key, signer):
        builder = builder.add_extension(extension, critical)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return Issued(builder.sign(signer, hashes.SHA384()), key)


def _extensions(
    shape: Shape, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey
) -> list[tuple[x509.ExtensionType, bool]]:
    found: list[tuple[x509.ExtensionType, bool]] = []
    if shape.ca is not None:
        found.append((x509.BasicConstraints(shape.ca, shape.path_length), True))
    if shape.identifiers:
        found.append((x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False))
        if signer is not key:
            found.append(
                (x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False)
            )
    if shape.usage is not None:
        usage = x509.KeyUsage(**{name: name in shape.usage for name in _USAGES})
        found.append((usage, shape.usage_critical))
    if shape.crl:
        url = x509.UniformResourceIdentifier("http://crl.nitrosim.invalid/crl")
        found.append(
            (x509.CRLDistributionPoints([x509.DistributionPoint([url], None, None, None)]), False)
        )
    return found


def _name(common_name: str) -> x509.Name:
    parts = {
        NameOID.COMMON_NAME: common_name[:64],  # ub-common-name of RFC 5280
        NameOID.ORGANIZATIONAL_UNIT_NAME: "simulator",
        NameOID.ORGANIZATION_NAME: "nitrosim",
    }
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts.items()])


@dataclass(frozen=True, slots=True)
class NsmPki:
    """The certificates and keys behind one NSM's attestation documents."""

    levels: Mapping[str, Issued]
    shapes: Mapping[str, Shape] = field(repr=False)

    @classmethod
    def generate(
        cls,
        *,
        now: datetime,
        module_id: str,
        region: str = "eu-west-1",
        changes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Self:
        """A new PKI as a module of that id and region would have it at `now` (an aware datetime).

        `changes` makes it wrong on purpose: fields of `Shape` by level, as in {"leaf": {"usage":
        None}}.
        """
        names = {
            "region": region,
            "module_id": module_id,
            "instance": module_id.partition("-enc")[0],
        }
        shapes = {
            level: replace(
                shape,
                common_name=shape.common_name.format_map(names),
                **(changes or {}).get(level, {}),
            )
            for level, shape in SHAPES.items()
        }
        return cls(_issue_levels(shapes, {}, now), shapes)

    def renewed(self, now: datetime) -> Self:
        """This PKI with every certificate issued anew that is in the last tenth of its life, and
        all below it.
        """
        kept: dict[str, Issued] = {}
        for level, issued in self.levels.items():
            if now > issued.certificate.not_valid_after_utc - self.shapes[level].lifetime / 10:
                break
            kept[level] = issued
        if len(kept) == len(self.levels):
            return self
        return replace(self, levels=_issue_levels(self.shapes, kept, now))

    def twin(self, now: datetime) -> Self:
        """Another PKI of the same names and shapes, under keys of its own."""
        return replace(self, levels=_issue_levels(self.shapes, {}, now))

    def with_leaf_of(self, now: datetime) -> Self:
        """This PKI with a leaf issued at another time."""
        kept = {level: issued for level, issued in self.levels.items() if level != "leaf"}
        return replace(self, levels=_issue_levels(self.shapes, kept, now))

    @property
    def root_der(self) -> bytes:
        """The root certificate in DER."""
        return self.levels["root"].der

    @property
    def root_sha256(self) -> bytes:
        """SHA-256 of the root certificate's DER, what a verifier pins."""
        return hashlib.sha256(self.root_der).digest()

    @property
    def cabundle(self) -> tuple[bytes, ...]:
        """A document's cabundle: root, regional, zonal and instance certificates in DER."""
        return tuple(issued.der for level, issued in self.levels.items() if level != "leaf")

    @property
    def leaf_der(self) -> bytes:
        """The certificate that a document is signed with, in DER."""
        return self.levels["leaf"].der

    @property
    def leaf_key(self) -> ec.EllipticCurvePrivateKey:
        """The private key that a document is signed with."""
        return self.levels["leaf"].key


def _issue_levels(
    shapes: Mapping[str, Shape], kept: Mapping[str, Issued], now: datetime
) -> dict[str, Issued]:
    """Issue the levels that are not kept, each signed by the one above it."""
    levels: dict[str, Issued] = {}
    issuer = None
    for level, shape in shapes.items():
        issuer = levels[level] = kept.get(level) or issue(shape, now=now, issuer=issuer)
    return levels


@dataclass(frozen=True, slots=True)
class TlsPki:
    """A private CA and one server certificate from it, all in PEM."""

    ca_pem: bytes
    chain_pem: bytes
    key_pem: bytes = field(repr=False)

    @classmethod
    def generate(
        cls, *, now: datetime, names: Sequence[str], ips: Sequence[str] = (), expired: bool = False
    ) -> Self:
        """A new CA, and a certificate for those DNS names and addresses; an expired one ended an
        hour before `now`.
        """
        ca = issue(
            Shape(
                "nitrosim TLS CA", timedelta(days=30), age=timedelta(days=10), curve=ec.SECP256R1()
            ),
            now=now,
        )
        life = timedelta(days=7)
        server = Shape(
            "nitrosim TLS server",
            life,
            age=life + timedelta(hours=1) if expired else timedelta(hours=1),
            ca=False,
            usage=frozenset({"digital_signature"}),
            curve=ec.SECP256R1(),
        )
        alternatives: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
        alternatives += [x509.IPAddress(ipaddress.ip_address(ip)) for ip in ips]
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        extensions = (x509.SubjectAlternativeName(alternatives), purpose)
        issued = issue(server, now=now, issuer=ca, extensions=extensions)
        return cls(_pem(ca.certificate), _pem(issued.certificate), _key_pem(issued.key))


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
