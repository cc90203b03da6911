"""Attestation documents of the Nitro Secure Module: parse one, and verify it offline.

A document is a COSE_Sign1 (RFC 9052, section 4.2) that an NSM signed with ES384; its payload is a
CBOR map with the PCRs, three optional fields of the caller, and the certificates from a pinned root
down to the signing key. The format and the steps of the verification are those of
docs/attestation_process.md in aws-nitro-enclaves-nsm-api. Two types keep what was merely parsed
apart from what was proved: `AttestationDocument` and `VerifiedDocument`.

The NitroTPM of an EC2 instance signs documents in the same format but for the name of the PCRs,
which measure other things. The two kinds of PCRs are fields of their own everywhere, so that none
of one kind is ever compared with one of the other.
"""

from __future__ import annotations

import hashlib
from dataclasses import KW_ONLY, InitVar, dataclass, field
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from cryptography.exceptions import InvalidSignature

from nsm.certificates import ES384, Link, check_certificates, check_chain, in_utc, load_chain
from nsm.cose import (
    PAYLOAD_MAX,
    DocumentError,
    decode,
    kind_of,
    mandatory,
    optional,
    read_cose_sign1,
    signature_to_der,
    sized,
    to_be_signed,
)
from nsm.module import Source

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from cryptography import x509

__all__ = [
    "AWS_ROOT_G1_SHA256",
    "CERTIFICATE_MAX",
    "CHECKS",
    "FIELD_MAX",
    "NITROTPM_PCRS_MAX",
    "PAYLOAD_MAX",
    "PCRS_MAX",
    "PCR_SIZE",
    "PUBLIC_KEY_MAX",
    "AttestationDocument",
    "ChainEntry",
    "DocumentError",
    "Expectations",
    "Source",
    "VerifiedDocument",
    "verify",
]

# AWS_NitroEnclaves_Root-G1, SHA-256 of its DER; the root of the commercial partitions
AWS_ROOT_G1_SHA256: Final = bytes.fromhex(
    "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"
)

PCR_SIZE: Final = 48  # SHA-384, the only digest of the format
CERTIFICATE_MAX: Final = 1024  # section 3.2.2.1, as are the two below
PUBLIC_KEY_MAX: Final = 1024
# 512 in one section of the specification, 1024 in another; genuine NSMs sign more than 512 bytes
FIELD_MAX: Final = 1024
PCRS_MAX: Final = 32
NITROTPM_PCRS_MAX: Final = 24  # the PCRs of a PC Client TPM, all of which are in a document

_WHOSE: Final = {
    "enclave": "an enclave",
    "nitrotpm": "a NitroTPM, which is of a whole EC2 instance",
}

_PROTECTED_ES384: Final = bytes.fromhex("a1013822")  # {1: -35}, RFC 9053 table 1
_TIMESTAMP_MAX: Final = 253_402_300_799_999  # the end of the year 9999, in milliseconds
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class AttestationDocument:
    """What a document says, parsed and **not verified**.

    `timestamp` is in milliseconds since the epoch, `pcrs` holds the locked PCRs of an enclave as
    {index: 48 bytes}, `nitrotpm_pcrs` those of a NitroTPM; one of the two is empty. `certificate`
    is the signer's in DER and `cabundle` its issuers', root first. `protected`, `payload` and
    `signature` are the signed parts exactly as received.
    """

    module_id: str
    digest: str
    timestamp: int
    pcrs: Mapping[int, bytes]
    nitrotpm_pcrs: Mapping[int, bytes]
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
        protected, payload, signature = read_cose_sign1(data)
        fields = decode(payload, "payload")
        if type(fields) is not dict or not all(type(name) is str for name in fields):
            raise DocumentError(
                "format", f"payload is {kind_of(fields)}, expected a map with text keys"
            )
        pcrs, nitrotpm_pcrs = _pcrs_by_kind(fields)
        return cls(
            module_id=_module_id(fields),
            digest=_digest(fields),
            timestamp=_timestamp(fields),
            pcrs=pcrs,
            nitrotpm_pcrs=nitrotpm_pcrs,
            certificate=sized(
                "certificate", mandatory(fields, "certificate", bytes), 1, CERTIFICATE_MAX
            ),
            cabundle=_cabundle(fields),
            public_key=optional(fields, "public_key", 1, PUBLIC_KEY_MAX),
            user_data=optional(fields, "user_data", 0, FIELD_MAX),
            nonce=optional(fields, "nonce", 0, FIELD_MAX),
            protected=protected,
            payload=payload,
            signature=signature,
        )

    @property
    def source(self) -> Source:
        """Whose document it is, which its PCRs tell."""
        return "nitrotpm" if self.nitrotpm_pcrs else "enclave"

    @property
    def debug_mode(self) -> bool:
        """Whether the enclave runs in debug mode, which zeroes PCR0; a document without PCR0 counts
        as such. A NitroTPM has no such mode, and zero is a PCR of it that nothing was measured to.
        """
        return self.source == "enclave" and not any(self.pcrs.get(0, b""))

    @property
    def signed_at(self) -> datetime:
        """The timestamp as an aware datetime."""
        return _EPOCH + timedelta(milliseconds=self.timestamp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectations:
    """What a document must say beyond being authentic; None and an absent PCR expect nothing.

    `source` says whose document it must be, None that either kind will do. `pcrs` are an enclave's,
    `nitrotpm_pcrs` a NitroTPM's; raises ValueError for those of another kind than `source`.
    `max_age` bounds the distance between the timestamp and the real now, in both directions.
    """

    source: Source | None = "enclave"
    pcrs: Mapping[int, bytes] = field(default_factory=dict)
    nitrotpm_pcrs: Mapping[int, bytes] = field(default_factory=dict)
    nonce: bytes | None = None
    user_data: bytes | None = None
    public_key: bytes | None = None
    module_id: str | None = None
    max_age: timedelta | None = None
    allow_debug: bool = False

    def __post_init__(self) -> None:
        if (self.pcrs and self.source != "enclave") or (
            self.nitrotpm_pcrs and self.source != "nitrotpm"
        ):
            raise ValueError(f"PCRs are expected of another kind than source {self.source!r}")


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
    chain = load_chain(document.cabundle, document.certificate)
    _check_signature(document, chain[-1])
    check_certificates(chain, at)
    check_chain(chain)
    _check_timestamp(document, chain[-1])
    _check_expectations(document, expect, now)
    return VerifiedDocument(
        document=document,
        root_sha256=root,
        at=at,
        certificates=tuple(link.certificate for link in chain),
        checks=_passed(document, expect),
        seal=_SEAL,
    )


# ---- parsing


def _module_id(fields: Mapping[str, object]) -> str:
    module_id = mandatory(fields, "module_id", str)
    if not module_id or not module_id.isprintable():
        raise DocumentError("format", "module_id is empty or not printable, expected a name")
    return module_id


def _digest(fields: Mapping[str, object]) -> str:
    digest = mandatory(fields, "digest", str)
    if digest != "SHA384":
        raise DocumentError("format", f"digest is {digest[:16]!r}, expected 'SHA384'")
    return digest


def _timestamp(fields: Mapping[str, object]) -> int:
    timestamp = mandatory(fields, "timestamp", int)
    if not 0 < timestamp <= _TIMESTAMP_MAX:
        raise DocumentError(
            "format", f"timestamp is {timestamp}, expected milliseconds from 1 to {_TIMESTAMP_MAX}"
        )
    return timestamp


def _pcrs_by_kind(
    fields: Mapping[str, object],
) -> tuple[Mapping[int, bytes], Mapping[int, bytes]]:
    """The PCRs of an enclave and those of a NitroTPM, of which a document has one kind."""
    if fields.get("nitrotpm_pcrs") is None:
        return _pcrs(fields, "pcrs", PCRS_MAX), MappingProxyType({})
    if fields.get("pcrs") is not None:
        raise DocumentError("format", "payload has pcrs and nitrotpm_pcrs, expected one of the two")
    return MappingProxyType({}), _pcrs(fields, "nitrotpm_pcrs", NITROTPM_PCRS_MAX)


def _pcrs(fields: Mapping[str, object], name: str, count: int) -> Mapping[int, bytes]:
    """The PCRs; the specification allows other sizes, for digests that it does not allow."""
    pcrs: dict[object, object] = mandatory(fields, name, dict)
    if not 1 <= len(pcrs) <= count:
        raise DocumentError("format", f"{name} has {len(pcrs)} entries, expected 1 to {count}")
    checked: dict[int, bytes] = {}
    for index, value in pcrs.items():
        if type(index) is not int or not 0 <= index < count:
            raise DocumentError(
                "format", f"{name} has the index {str(index)[:16]}, expected 0 to {count - 1}"
            )
        if type(value) is not bytes:
            raise DocumentError(
                "format", f"pcr {index} is {kind_of(value)}, expected a byte string"
            )
        checked[index] = sized(f"pcr {index}", value, PCR_SIZE, PCR_SIZE)
    return MappingProxyType(checked)


def _cabundle(fields: Mapping[str, object]) -> tuple[bytes, ...]:
    cabundle: list[object] = mandatory(fields, "cabundle", list)
    if not cabundle:
        raise DocumentError("format", "cabundle has no entries, expected at least 1")
    checked = []
    for index, certificate in enumerate(cabundle):
        if type(certificate) is not bytes:
            raise DocumentError(
                "format",
                f"cabundle entry {index} is {kind_of(certificate)}, expected a byte string",
            )
        checked.append(sized(f"cabundle entry {index}", certificate, 1, CERTIFICATE_MAX))
    return tuple(checked)


# ---- verification


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


def _check_signature(document: AttestationDocument, leaf: Link) -> None:
    """The document's own signature: one check refuses every change to the payload, certificates
    included.
    """
    signed = to_be_signed(document.protected, document.payload)
    try:
        leaf.key.verify(signature_to_der(document.signature), signed, ES384)
    except InvalidSignature as error:
        raise DocumentError(
            "signature", "document is not signed by the key in its leaf certificate"
        ) from error


def _check_timestamp(document: AttestationDocument, leaf: Link) -> None:
    if not leaf.not_before <= document.signed_at <= leaf.not_after:
        raise DocumentError(
            "timestamp",
            f"document was signed at {in_utc(document.signed_at)}, but its leaf certificate is "
            "valid from "
            f"{in_utc(leaf.not_before)} to {in_utc(leaf.not_after)}",
        )


def _check_expectations(document: AttestationDocument, expect: Expectations, now: datetime) -> None:
    if expect.source not in {None, document.source}:
        # before all else: the other kind's PCRs and modes mean other things
        raise DocumentError(
            "source",
            f"document is of {_WHOSE[document.source]}, expected one of "
            f"{_WHOSE[expect.source or document.source]}",
        )
    if document.debug_mode and not expect.allow_debug:
        # before the PCRs: it explains why they differ
        raise DocumentError(
            "debug_mode",
            "enclave runs in debug mode (PCR0 is all zeros), expected one that does not",
        )
    for index in sorted(expect.pcrs):
        _expect(f"PCR{index}", "pcrs", document.pcrs.get(index), expect.pcrs[index])
    for index in sorted(expect.nitrotpm_pcrs):
        expected_pcr = expect.nitrotpm_pcrs[index]
        name = f"NitroTPM PCR{index}"
        _expect(name, "pcrs", document.nitrotpm_pcrs.get(index), expected_pcr)
    for name in ("nonce", "user_data", "public_key", "module_id"):
        expected = getattr(expect, name)
        if expected is not None:
            _expect(name, name, getattr(document, name), expected)
    if expect.max_age is not None and abs(now - document.signed_at) > expect.max_age:
        raise DocumentError(
            "max_age",
            f"document was signed at {in_utc(document.signed_at)}, expected at most "
            f"{expect.max_age} from {in_utc(now)}",
        )


def _expect(name: str, check: str, got: bytes | str | None, expected: bytes | str) -> None:
    if got != expected:
        raise DocumentError(check, f"{name} is {_shown(got)}, expected {_shown(expected)}")


def _shown(value: bytes | str | None) -> str:
    if value is None:
        return "absent"
    return value if isinstance(value, str) else value.hex() or "empty"


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
    "source",
    "debug_mode",
    "pcrs",
    "nonce",
    "user_data",
    "public_key",
    "module_id",
    "max_age",
)


def _passed(document: AttestationDocument, expect: Expectations) -> tuple[str, ...]:
    """The checks that were made: expectations count only where there was something to expect."""
    asked: Iterable[tuple[str, bool]] = (
        ("source", expect.source is not None),
        ("debug_mode", document.source == "enclave" and not expect.allow_debug),
        ("pcrs", bool(expect.pcrs or expect.nitrotpm_pcrs)),
        ("nonce", expect.nonce is not None),
        ("user_data", expect.user_data is not None),
        ("public_key", expect.public_key is not None),
        ("module_id", expect.module_id is not None),
        ("max_age", expect.max_age is not None),
    )
    return (*_ALWAYS, *(name for name, made in asked if made))
