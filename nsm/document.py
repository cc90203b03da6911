"""Attestation documents of the Nitro Secure Module: parse one, and verify it offline.

A document is a COSE_Sign1 (RFC 9052, section 4.2) that an NSM signed with ES384; its payload is a
CBOR map with the PCRs, three optional fields of the caller, and the certificates from a pinned root
down to the signing key. The format and the steps of the verification are those of
docs/attestation_process.md in aws-nitro-enclaves-nsm-api. Two types keep what was merely parsed
apart from what was proved: `AttestationDocument` and `VerifiedDocument`.
"""

from __future__ import annotations

import hashlib
from dataclasses import KW_ONLY, InitVar, dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple, Self, TypeVar

import cbor2
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from nsm import cbor

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

# AWS_NitroEnclaves_Root-G1, SHA-256 of its DER; the root of the commercial partitions
AWS_ROOT_G1_SHA256: Final = bytes.fromhex(
    "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"
)

PCR_SIZE: Final = 48  # SHA-384, the only digest of the format
PAYLOAD_MAX: Final = 16384  # section 3.2.1
CERTIFICATE_MAX: Final = 1024  # section 3.2.2.1, as are the two below
PUBLIC_KEY_MAX: Final = 1024
# 512 in one section of the specification, 1024 in another; genuine NSMs sign more than 512 bytes
FIELD_MAX: Final = 1024
PCRS_MAX: Final = 32

_TAG_COSE_SIGN1: Final = b"\xd2"  # tag 18; allowed by the specification, never sent by an NSM
_ENVELOPE_MAX: Final = (
    PAYLOAD_MAX + 256
)  # tag, array and headers, the signature and the lengths around them
_PROTECTED_ES384: Final = bytes.fromhex("a1013822")  # {1: -35}, RFC 9053 table 1
_SIGNATURE_SIZE: Final = 96  # r || s, each as long as the order of P-384 (RFC 9053, section 2.1)
_TIMESTAMP_MAX: Final = 253_402_300_799_999  # the end of the year 9999, in milliseconds
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_ES384: Final = ec.ECDSA(hashes.SHA384())
# What cryptography raises for a certificate; warnings too, where a program has them raised
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    Warning,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
_UNDERSTOOD: Final = frozenset((x509.BasicConstraints.oid, x509.KeyUsage.oid))


class DocumentError(Exception):
    """The bytes are no attestation document, or not an authentic and expected one.

    `check` is the short name of the check that failed: "format", or one of `CHECKS`.
    """

    def __init__(self, check: str, message: str) -> None:
        self.check = check
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class AttestationDocument:
    """What a document says, parsed and **not verified**.

    `timestamp` is in milliseconds since the epoch, `pcrs` holds the locked PCRs as {index: 48
    bytes}, `certificate` is the signer's in DER and `cabundle` its issuers', root first.
    `protected`, `payload` and `signature` are the signed parts exactly as received.
    """

    module_id: str
    digest: str
    timestamp: int
    pcrs: Mapping[int, bytes]
    certificate: bytes = field(repr=False)
    cabundle: tuple[bytes, ...] = field(repr=False)
    public_key: bytes | None
    user_data: bytes | None
    nonce: bytes | None
    protected: bytes = field(repr=False)
    payload: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a COSE_Sign1, untagged or with tag 18, of up to some 16 KiB.

        Raises DocumentError with `check` "format".
        """
        protected, payload, signature = _cose_sign1(data)
        fields = _decode(payload, "payload")
        if type(fields) is not dict or not all(type(name) is str for name in fields):
            raise DocumentError(
                "format", f"payload is {_kind(fields)}, expected a map with text keys"
            )
        return cls(
            module_id=_module_id(fields),
            digest=_digest(fields),
            timestamp=_timestamp(fields),
            pcrs=_pcrs(fields),
            certificate=_sized(
                "certificate", _get(fields, "certificate", bytes), 1, CERTIFICATE_MAX
            ),
            cabundle=_cabundle(fields),
            public_key=_optional(fields, "public_key", 1, PUBLIC_KEY_MAX),
            user_data=_optional(fields, "user_data", 0, FIELD_MAX),
            nonce=_optional(fields, "nonce", 0, FIELD_MAX),
            protected=protected,
            payload=payload,
            signature=signature,
        )

    @property
    def debug_mode(self) -> bool:
        """Whether the enclave runs in debug mode, which zeroes PCR0; a document without PCR0 counts
        as such.
        """
        return not any(self.pcrs.get(0, b""))

    @property
    def signed_at(self) -> datetime:
        """The timestamp as an aware datetime."""
        return _EPOCH + timedelta(milliseconds=self.timestamp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectations:
    """What a document must say beyond being authentic; None and an absent PCR expect nothing.

    `max_age` bounds the distance between the timestamp and the real now, in both directions.
    """

    pcrs: Mapping[int, bytes] = field(default_factory=dict)
    nonce: bytes | None = None
    user_data: bytes | None = None
    public_key: bytes | None = None
    module_id: str | None = None
    max_age: timedelta | None = None
    allow_debug: bool = False


class ChainEntry(NamedTuple):
    """One certificate of a verified chain: its subject (RFC 4514) and validity, both ends
    inclusive.
    """

    subject: str
    not_before: datetime
    not_after: datetime


_SEAL: Final = object()


@dataclass(frozen=True, slots=True)
class VerifiedDocument:
    """A document that `verify` accepted; nothing else makes one.

    `root_sha256` is the pinned root it leads to, `at` the time it was verified for, `certificates`
    the chain, root first and leaf last, `checks` the names of the checks it passed, in order.
    """

    document: AttestationDocument
    root_sha256: bytes
    at: datetime
    certificates: tuple[x509.Certificate, ...] = field(repr=False)
    checks: tuple[str, ...]
    _: KW_ONLY
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("a VerifiedDocument is made by nsm.document.verify only")

    @property
    def chain(self) -> tuple[ChainEntry, ...]:
        """The certificates as a report shows them: root first, leaf last."""
        return tuple(
            ChainEntry(
                link.subject.rfc4514_string(), link.not_valid_before_utc, link.not_valid_after_utc
            )
            for link in self.certificates
        )


def verify(
    document: AttestationDocument | bytes,
    *,
    roots: Collection[bytes] = (AWS_ROOT_G1_SHA256,),
    at: datetime | None = None,
    expect: Expectations = Expectations(),
    now: datetime | None = None,
) -> VerifiedDocument:
    """Verify that a genuine NSM signed the document, and that it says what is expected.

    `roots` are SHA-256 fingerprints of the roots to trust, `at` is the time that the certificates
    must be valid at (now, unless told), `now` the time that `expect.max_age` counts from. Both must
    be aware. The checks run in the order of `CHECKS`, cheap ones before signatures and one
    signature before four; DocumentError names the first that fails. Revocation is not checked, as
    the specification of the format says.
    """
    now = now or datetime.now(UTC)
    at = at or now
    if at.tzinfo is None or now.tzinfo is None:
        raise ValueError("verification needs times with a time zone")
    if not isinstance(document, AttestationDocument):
        document = AttestationDocument.parse(document)
    root = _check_root(document, roots)
    _check_algorithm(document)
    chain = _load_chain(document)
    _check_signature(document, chain[-1])
    _check_certificates(chain, at)
    _check_chain(chain)
    _check_timestamp(document, chain[-1])
    _check_expectations(document, expect, now)
    return VerifiedDocument(
        document=document,
        root_sha256=root,
        at=at,
        certificates=tuple(link.certificate for link in chain),
        checks=_passed(expect),
        seal=_SEAL,
    )


# ---- parsing


def _cose_sign1(data: bytes) -> tuple[bytes, bytes, bytes]:
    """The protected header, payload and signature of COSE_Sign1 = [protected, unprotected, payload,
    signature].
    """
    if len(data) > _ENVELOPE_MAX:
        raise DocumentError(
            "format", f"document has {len(data)} bytes, expected at most {_ENVELOPE_MAX}"
        )
    item = _decode(data.removeprefix(_TAG_COSE_SIGN1), "document")
    if type(item) is not list or len(item) != 4:
        raise DocumentError(
            "format", f"document is {_kind(item)}, expected the four elements of a COSE_Sign1"
        )
    protected, unprotected, payload, signature = item
    if type(unprotected) is not dict or unprotected:
        # the NSM sends an empty map, and nothing in it would be signed
        raise DocumentError(
            "format", f"unprotected header is {_kind(unprotected)}, expected an empty map"
        )
    for name, part in (
        ("protected header", protected),
        ("payload", payload),
        ("signature", signature),
    ):
        if type(part) is not bytes:
            raise DocumentError("format", f"{name} is {_kind(part)}, expected a byte string")
    _sized("payload", payload, 1, PAYLOAD_MAX)
    return protected, payload, _sized("signature", signature, _SIGNATURE_SIZE, _SIGNATURE_SIZE)


def _decode(data: bytes, name: str) -> object:
    try:
        return cbor.decode(data)
    except cbor.CborError as error:
        raise DocumentError("format", f"{name} is not one item of CBOR: {error}") from error


_T = TypeVar("_T")


def _get(fields: Mapping[str, object], name: str, kind: type[_T]) -> _T:
    """A mandatory field; its exact type is checked, so that True never passes for 1."""
    value = fields.get(name)
    if type(value) is not kind:
        raise DocumentError("format", f"{name} is {_kind(value)}, expected {_KINDS[kind]}")
    return value


def _optional(fields: Mapping[str, object], name: str, low: int, high: int) -> bytes | None:
    """An optional byte string: absent, or null as NSMs send it, or of a length from low to high."""
    if fields.get(name) is None:
        return None
    return _sized(name, _get(fields, name, bytes), low, high)


def _sized(name: str, value: bytes, low: int, high: int) -> bytes:
    if not low <= len(value) <= high:
        expected = f"{low}" if low == high else f"{low} to {high}"
        raise DocumentError("format", f"{name} has {len(value)} bytes, expected {expected}")
    return value


def _module_id(fields: Mapping[str, object]) -> str:
    module_id = _get(fields, "module_id", str)
    if not module_id or not module_id.isprintable():
        raise DocumentError("format", "module_id is empty or not printable, expected a name")
    return module_id


def _digest(fields: Mapping[str, object]) -> str:
    digest = _get(fields, "digest", str)
    if digest != "SHA384":
        raise DocumentError("format", f"digest is {digest[:16]!r}, expected 'SHA384'")
    return digest


def _timestamp(fields: Mapping[str, object]) -> int:
    timestamp = _get(fields, "timestamp", int)
    if not 0 < timestamp <= _TIMESTAMP_MAX:
        raise DocumentError(
            "format", f"timestamp is {timestamp}, expected milliseconds from 1 to {_TIMESTAMP_MAX}"
        )
    return timestamp


def _pcrs(fields: Mapping[str, object]) -> Mapping[int, bytes]:
    """The PCRs; the specification allows other sizes, for digests that it does not allow."""
    pcrs: dict[object, object] = _get(fields, "pcrs", dict)
    if not 1 <= len(pcrs) <= PCRS_MAX:
        raise DocumentError("format", f"pcrs has {len(pcrs)} entries, expected 1 to {PCRS_MAX}")
    checked: dict[int, bytes] = {}
    for index, value in pcrs.items():
        if type(index) is not int or not 0 <= index < PCRS_MAX:
            raise DocumentError(
                "format", f"pcrs has the index {str(index)[:16]}, expected 0 to {PCRS_MAX - 1}"
            )
        if type(value) is not bytes:
            raise DocumentError("format", f"pcr {index} is {_kind(value)}, expected a byte string")
        checked[index] = _sized(f"pcr {index}", value, PCR_SIZE, PCR_SIZE)
    return MappingProxyType(checked)


def _cabundle(fields: Mapping[str, object]) -> tuple[bytes, ...]:
    cabundle: list[object] = _get(fields, "cabundle", list)
    if not cabundle:
        raise DocumentError("format", "cabundle has no entries, expected at least 1")
    checked = []
    for index, certificate in enumerate(cabundle):
        if type(certificate) is not bytes:
            raise DocumentError(
                "format", f"cabundle entry {index} is {_kind(certificate)}, expected a byte string"
            )
        checked.append(_sized(f"cabundle entry {index}", certificate, 1, CERTIFICATE_MAX))
    return tuple(checked)


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


def _kind(value: object) -> str:
    """CBOR's name for what a value is; its content is the sender's and stays out of messages."""
    kind = _KINDS.get(type(value), "an unknown item")
    return f"{kind} of {len(value)}" if isinstance(value, (list, dict)) else kind


# ---- verification


class _Link(NamedTuple):
    """A certificate of the chain, with what is asked of it more than once."""

    name: str
    certificate: x509.Certificate
    key: ec.EllipticCurvePublicKey
    not_before: datetime
    not_after: datetime


def _check_root(document: AttestationDocument, roots: Collection[bytes]) -> bytes:
    """The pin alone makes the root trusted: its own signature and name prove nothing."""
    root = hashlib.sha256(document.cabundle[0]).digest()
    if root not in roots:
        trusted = ", ".join(pin.hex() for pin in roots) or "none"
        raise DocumentError(
            "root", f"root certificate has SHA-256 {root.hex()}, trusted: {trusted}"
        )
    return root


def _check_algorithm(document: AttestationDocument) -> None:
    # compared as bytes: Python's {True: -35} equals {1: -35}
    if document.protected != _PROTECTED_ES384:
        raise DocumentError(
            "algorithm",
            f"protected header is {document.protected[:16].hex()}, expected "
            f"{_PROTECTED_ES384.hex()} (ES384)",
        )


def _load_chain(document: AttestationDocument) -> list[_Link]:
    """The certificates, root first, each with a P-384 key and an ECDSA signature over SHA-384."""
    names = [_issuer_name(index) for index in range(len(document.cabundle))]
    return [
        _load(name, der)
        for name, der in zip(
            [*names, "leaf certificate"], [*document.cabundle, document.certificate], strict=True
        )
    ]


def _issuer_name(index: int) -> str:
    return f"certificate {index} of cabundle" if index else "root certificate"


def _load(name: str, der: bytes) -> _Link:
    try:
        certificate = x509.load_der_x509_certificate(der)
        key = certificate.public_key()
        algorithm = certificate.signature_algorithm_oid
        validity = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except _UNREADABLE as error:
        raise DocumentError("certificates", f"{name} cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        kind = key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else type(key).__name__
        raise DocumentError("key_type", f"{name} holds a key on {kind}, expected secp384r1")
    if algorithm != x509.SignatureAlgorithmOID.ECDSA_WITH_SHA384:
        raise DocumentError(
            "key_type",
            f"{name} is signed with {algorithm.dotted_string}, expected ecdsa-with-SHA384",
        )
    return _Link(name, certificate, key, *validity)


def _check_certificates(chain: list[_Link], at: datetime) -> None:
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
                f"{link.name} is valid from {_utc(link.not_before)} to {_utc(link.not_after)}, "
                f"but verified at {_utc(at)}",
            )


def _check_names(chain: list[_Link]) -> None:
    """Each certificate's issuer must be the subject before it.

    Names cost as much as keys to read: not sooner.
    """
    try:
        subjects = [link.certificate.subject for link in chain]
        issuers = [link.certificate.issuer for link in chain]
    except _UNREADABLE as error:
        raise DocumentError("names", f"a certificate has an unreadable name: {error}") from error
    for link, issuer, expected in zip(chain[1:], issuers[1:], subjects, strict=False):
        if issuer != expected:
            raise DocumentError(
                "names",
                f"{link.name} names the issuer {issuer.rfc4514_string()}, "
                f"but follows the certificate of {expected.rfc4514_string()}",
            )


def _constraints(link: _Link) -> tuple[x509.BasicConstraints, x509.KeyUsage]:
    try:
        extensions = link.certificate.extensions
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound as error:
        raise DocumentError("extensions", f"{link.name} lacks {error.oid._name}") from error
    except _UNREADABLE as error:
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


def _check_leaf(link: _Link) -> None:
    constraints, usage = _constraints(link)
    if constraints.ca:
        raise DocumentError("basic_constraints", f"{link.name} is a CA's, expected an end entity's")
    if not usage.digital_signature:
        raise DocumentError(
            "key_usage", f"{link.name} may not sign data, expected the key usage digitalSignature"
        )


def _check_ca(link: _Link, below: int) -> None:
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


def _check_signature(document: AttestationDocument, leaf: _Link) -> None:
    """The document's own signature: one check refuses every change to the payload, certificates
    included.
    """
    half = _SIGNATURE_SIZE // 2
    r, s = (
        int.from_bytes(part, "big")
        for part in (document.signature[:half], document.signature[half:])
    )
    # Sig_structure of RFC 9052, section 4.4, with no external data
    signed = cbor2.dumps(["Signature1", document.protected, b"", document.payload])
    try:
        leaf.key.verify(encode_dss_signature(r, s), signed, _ES384)
    except InvalidSignature as error:
        raise DocumentError(
            "signature", "document is not signed by the key in its leaf certificate"
        ) from error


def _check_chain(chain: list[_Link]) -> None:
    for issuer, link in pairwise(chain):
        certificate = link.certificate
        try:
            issuer.key.verify(certificate.signature, certificate.tbs_certificate_bytes, _ES384)
        except InvalidSignature as error:
            subject = issuer.certificate.subject.rfc4514_string()
            raise DocumentError(
                "chain", f"{link.name} is not signed by its issuer, {subject}"
            ) from error


def _check_timestamp(document: AttestationDocument, leaf: _Link) -> None:
    if not leaf.not_before <= document.signed_at <= leaf.not_after:
        raise DocumentError(
            "timestamp",
            f"document was signed at {_utc(document.signed_at)}, but its leaf certificate is "
            "valid from "
            f"{_utc(leaf.not_before)} to {_utc(leaf.not_after)}",
        )


def _check_expectations(document: AttestationDocument, expect: Expectations, now: datetime) -> None:
    if document.debug_mode and not expect.allow_debug:
        # before the PCRs: it explains why they differ
        raise DocumentError(
            "debug_mode",
            "enclave runs in debug mode (PCR0 is all zeros), expected one that does not",
        )
    for index in sorted(expect.pcrs):
        _expect(f"PCR{index}", "pcrs", document.pcrs.get(index), expect.pcrs[index])
    for name in ("nonce", "user_data", "public_key", "module_id"):
        expected = getattr(expect, name)
        if expected is not None:
            _expect(name, name, getattr(document, name), expected)
    if expect.max_age is not None and abs(now - document.signed_at) > expect.max_age:
        raise DocumentError(
            "max_age",
            f"document was signed at {_utc(document.signed_at)}, expected at most "
            f"{expect.max_age} from {_utc(now)}",
        )


def _expect(name: str, check: str, got: bytes | str | None, expected: bytes | str) -> None:
    if got != expected:
        raise DocumentError(check, f"{name} is {_shown(got)}, expected {_shown(expected)}")


def _shown(value: bytes | str | None) -> str:
    if value is None:
        return "absent"
    return value if isinstance(value, str) else value.hex() or "empty"


def _utc(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


_ALWAYS: Final = (
    "root",
    "algorithm",
    "certificates",
    "key_type",
    "signature",
    "names",
    "extensions",
    "basic_constraints",
    "path_length",
    "key_usage",
    "validity",
    "chain",
    "timestamp",
)
CHECKS: Final = (
    *_ALWAYS,
    "debug_mode",
    "pcrs",
    "nonce",
    "user_data",
    "public_key",
    "module_id",
    "max_age",
)


def _passed(expect: Expectations) -> tuple[str, ...]:
    """The checks that were made: expectations count only where there was something to expect."""
    asked: Iterable[tuple[str, bool]] = (
        ("debug_mode", not expect.allow_debug),
        ("pcrs", bool(expect.pcrs)),
        ("nonce", expect.nonce is not None),
        ("user_data", expect.user_data is not None),
        ("public_key", expect.public_key is not None),
        ("module_id", expect.module_id is not None),
        ("max_age", expect.max_age is not None),
    )
    return (*_ALWAYS, *(name for name, made in asked if made))
