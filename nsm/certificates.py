"""The certificates of an attestation document, root first and leaf last (RFC 5280, section 6.1)."""

from __future__ import annotations

import functools
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from nsm.cose import DocumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

ES384: Final = ec.ECDSA(hashes.SHA384())
# What cryptography raises for a certificate; warnings too, where a program has them raised
UNREADABLE: Final = (
    ValueError,
    TypeError,
    Warning,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
_UNDERSTOOD: Final = frozenset((x509.BasicConstraints.oid, x509.KeyUsage.oid))


class Link(NamedTuple):
    """A certificate of the chain, with what is asked of it more than once."""

    name: str
    certificate: x509.Certificate
    key: ec.EllipticCurvePublicKey
    not_before: datetime
    not_after: datetime


def load_chain(cabundle: Sequence[bytes], certificate: bytes) -> list[Link]:
    """The certificates, root first, each with a P-384 key and an ECDSA signature over SHA-384."""
    names = [_issuer_name(index) for index in range(len(cabundle))]
    return [
        read_certificate(name, der)
        for name, der in zip([*names, "leaf certificate"], [*cabundle, certificate], strict=True)
    ]


def _issuer_name(index: int) -> str:
    return f"certificate {index} of cabundle" if index else "root certificate"


@functools.lru_cache(maxsize=64)
def read_certificate(name: str, der: bytes) -> Link:
    """Read one certificate of a chain, `name` in messages; nothing of it is trusted yet.

    Whoever verifies many documents meets the same certificates for hours: an NSM's own is valid for
    three. To read them again, and to set up their keys, costs a fifth of a verification. Raises
    DocumentError.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        key = certificate.public_key()
        algorithm = certificate.signature_algorithm_oid
        validity = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except UNREADABLE as error:
        raise DocumentError("certificates", f"{name} cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        kind = key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else type(key).__name__
        raise DocumentError("key_type", f"{name} holds a key on {kind}, expected secp384r1")
    if algorithm != x509.SignatureAlgorithmOID.ECDSA_WITH_SHA384:
        raise DocumentError(
            "key_type",
            f"{name} is signed with {algorithm.dotted_string}, expected ecdsa-with-SHA384",
        )
    return Link(name, certificate, key, *validity)


def check_certificates(chain: list[Link], at: datetime) -> None:
    """Everything about the certificates that needs no signature (RFC 5280, section 6.1)."""
    _check_names(chain)
    for below, link in enumerate(reversed(chain), start=-1):
        if below < 0:
            _check_leaf(link)
        else:
            _check_ca(link, below)
    for link in chain:
        if not link.not_before <= at <= link.not_after:
            raise DocumentError(
                "validity",
                f"{link.name} is valid from {in_utc(link.not_before)} to {in_utc(link.not_after)}, "
                f"but verified at {in_utc(at)}",
            )


def _check_names(chain: list[Link]) -> None:
    """Each certificate's issuer must be the subject before it.

    Names cost as much as keys to read: not sooner.
    """
    try:
        subjects = [link.certificate.subject for link in chain]
        issuers = [link.certificate.issuer for link in chain]
    except UNREADABLE as error:
        raise DocumentError("names", f"a certificate has an unreadable name: {error}") from error
    for link, issuer, expected in zip(chain[1:], issuers[1:], subjects, strict=False):
        if issuer != expected:
            raise DocumentError(
                "names",
                f"{link.name} names the issuer {issuer.rfc4514_string()}, "
                f"but follows the certificate of {expected.rfc4514_string()}",
            )


def _constraints(link: Link) -> tuple[x509.BasicConstraints, x509.KeyUsage]:
    try:
        extensions = link.certificate.extensions
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound as error:
        raise DocumentError("extensions", f"{link.name} lacks {error.oid._name}") from error
    except UNREADABLE as error:
        raise DocumentError(
            "extensions", f"{link.name} has unreadable extensions: {error}"
        ) from error
    for extension in extensions:
        if extension.critical and extension.oid not in _UNDERSTOOD:
            raise DocumentError(
                "extensions",
                f"{link.name} has the critical extension {extension.oid.dotted_string}, not "
                "understood",
            )
    return constraints, usage


def _check_leaf(link: Link) -> None:
    constraints, usage = _constraints(link)
    if constraints.ca:
        raise DocumentError("basic_constraints", f"{link.name} is a CA's, expected an end entity's")
    if not usage.digital_signature:
        raise DocumentError(
            "key_usage", f"{link.name} may not sign data, expected the key usage digitalSignature"
        )


def _check_ca(link: Link, below: int) -> None:
    """An issuer of certificates, with this many issuers between it and the leaf."""
    constraints, usage = _constraints(link)
    if not constraints.ca:
        raise DocumentError("basic_constraints", f"{link.name} is an end entity's, expected a CA's")
    if constraints.path_length is not None and constraints.path_length < below:
        raise DocumentError(
            "path_length",
            f"{link.name} allows {constraints.path_length} issuers below it, but {below} follow",
        )
    if not usage.key_cert_sign:
        raise DocumentError(
            "key_usage",
            f"{link.name} may not sign certificates, expected the key usage keyCertSign",
        )


def check_chain(chain: list[Link]) -> None:
    """Each certificate must be signed by the one before it."""
    for issuer, link in pairwise(chain):
        certificate = link.certificate
        try:
            issuer.key.verify(certificate.signature, certificate.tbs_certificate_bytes, ES384)
        except InvalidSignature as error:
            subject = issuer.certificate.subject.rfc4514_string()
            raise DocumentError(
                "chain", f"{link.name} is not signed by its issuer, {subject}"
            ) from error


def in_utc(time: datetime) -> str:
    """A time as messages show it: in UTC, to the second."""
    return time.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
