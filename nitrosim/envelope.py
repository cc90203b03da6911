"""Writes CiphertextForRecipient: the CMS EnvelopedData (RFC 5652, clause 6) in which KMS seals a
plaintext.

`seal` writes what honest services write, `malform` what a client must refuse: one defect in each,
and nothing else wrong. KMS's form is the one of genuine answers: indefinite lengths outside,
definite ones in the recipient.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

BLOCK: Final = 16  # AES
CHUNK: Final = 1000  # BouncyCastle, whose layout KMS's has, cuts BER octet strings here
SMALL_CHUNK: Final = 7  # for the form with many chunks: no divisor of a block

# Identifier octets (X.690, clause 8.1.2)
_INTEGER, _OCTETS, _NULL, _OID, _UTF8, _SEQUENCE, _SET = 0x02, 0x04, 0x05, 0x06, 0x0C, 0x30, 0x31
_CONTEXT, _CONSTRUCTED = 0x80, 0x20
_EOC: Final = b"\0\0"


def _tlv(tag: int, *parts: bytes) -> bytes:
    """Definite length, in as few octets as it takes (DER)."""
    content = b"".join(parts)
    length = len(content)
    if length < 0x80:
        return bytes((tag, length)) + content
    octets = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(octets))) + octets + content


def _indefinite(tag: int, *parts: bytes) -> bytes:
    """Indefinite length, up to an end-of-contents (X.690, clause 8.1.3.6)."""
    return bytes((tag, 0x80)) + b"".join(parts) + _EOC


def _oid(dotted: str) -> bytes:
    """An OBJECT IDENTIFIER whose first arc is 1 or 2."""
    first, second, *arcs = map(int, dotted.split("."))
    return _tlv(_OID, *(_base128(arc) for arc in (40 * first + second, *arcs)))


def _base128(arc: int) -> bytes:
    octets = [arc & 0x7F]
    while arc := arc >> 7:
        octets.append(arc & 0x7F | 0x80)
    return bytes(reversed(octets))


def _integer(value: int) -> bytes:
    return _tlv(_INTEGER, bytes((value,)))  # versions and serials here are below 128


_DATA: Final = _oid("1.2.840.113549.1.7.1")
_SIGNED_DATA: Final = _oid("1.2.840.113549.1.7.2")
_ENVELOPED_DATA: Final = _oid("1.2.840.113549.1.7.3")
_RSA_ENCRYPTION: Final = _oid("1.2.840.113549.1.1.1")
_RSAES_OAEP: Final = _oid("1.2.840.113549.1.1.7")
_MGF1: Final = _oid("1.2.840.113549.1.1.8")
_P_SPECIFIED: Final = _oid("1.2.840.113549.1.1.9")
_SHA1: Final = _tlv(_SEQUENCE, _oid("1.3.14.3.2.26"), _tlv(_NULL))
_SHA256: Final = _tlv(_SEQUENCE, _oid("2.16.840.1.101.3.4.2.1"), _tlv(_NULL))
_AES_128_CBC: Final = _oid("2.16.840.1.101.3.4.1.2")
_AES_256_CBC: Final = _oid("2.16.840.1.101.3.4.1.42")
_AES_256_GCM: Final = _oid("2.16.840.1.101.3.4.1.46")
_RECIPIENT_NAME: Final = _tlv(
    _SEQUENCE, _tlv(_SET, _tlv(_SEQUENCE, _oid("2.5.4.3"), _tlv(_UTF8, b"recipient")))
)  # CN=recipient, the issuer that LocalStack names
_LABEL: Final = b"nitrosim"


def _oaep_algorithm(
    digest: bytes = _SHA256, mgf: bytes = _SHA256, label: bytes | None = None
) -> bytes:
    """AlgorithmIdentifier of RSAES-OAEP with RSAES-OAEP-params (RFC 4055, clause 4.1)."""
    parameters = [
        _tlv(_CONTEXT | _CONSTRUCTED | 0, digest),
        _tlv(_CONTEXT | _CONSTRUCTED | 1, _tlv(_SEQUENCE, _MGF1, mgf)),
    ]
    if label is not None:
        parameters.append(
            _tlv(_CONTEXT | _CONSTRUCTED | 2, _tlv(_SEQUENCE, _P_SPECIFIED, _tlv(_OCTETS, label)))
        )
    return _tlv(_SEQUENCE, _RSAES_OAEP, _tlv(_SEQUENCE, *parameters))


def _oaep(
    digest: hashes.HashAlgorithm | None = None,
    mgf: hashes.HashAlgorithm | None = None,
    label: bytes | None = None,
) -> padding.OAEP:
    return padding.OAEP(padding.MGF1(mgf or hashes.SHA256()), digest or hashes.SHA256(), label)


@dataclass(frozen=True, slots=True, repr=False)
class _Opened:
    """What goes in: the recipient's key as SubjectPublicKeyInfo, and the plaintext."""

    plaintext: bytes
    spki: bytes


@dataclass(frozen=True, slots=True, repr=False)
class _Recipient:
    """KeyTransRecipientInfo (RFC 5652, clause 6.2.1); `spki` names the recipient, `key` is what it
    is encrypted to.
    """

    spki: bytes
    content_key: bytes
    version: int = 2
    identifier: bytes | None = None
    algorithm: bytes = field(default_factory=_oaep_algorithm)
    padding: padding.AsymmetricPadding = field(default_factory=_oaep)
    key: rsa.RSAPublicKey | None = None

    def encode(self) -> bytes:
        key = self.key or serialization.load_der_public_key(self.spki)
        if not isinstance(key, rsa.RSAPublicKey):
            raise TypeError(f"the recipient's key is not RSA but {type(key).__name__}")
        # subjectKeyIdentifier: KMS takes SHA-256 of the whole SubjectPublicKeyInfo
        identifier = self.identifier or _tlv(_CONTEXT | 0, hashlib.sha256(self.spki).digest())
        encrypted_key = key.encrypt(self.content_key, self.padding)
        return _tlv(
            _SEQUENCE,
            _integer(self.version),
            identifier,
            self.algorithm,
            _tlv(_OCTETS, encrypted_key),
        )


@dataclass(frozen=True, slots=True, repr=False)
class _Envelope:
    """ContentInfo around EnvelopedData with everything that a form or a defect may vary."""

    recipients: tuple[_Recipient, ...]
    iv: bytes
    ciphertext: bytes
    version: int = 2
    content_type: bytes = _ENVELOPED_DATA
    inner_type: bytes = _DATA
    cipher: bytes = _AES_256_CBC
    chunk: int = CHUNK
    primitive: bool = False
    outer: Callable[..., bytes] = _indefinite

    def content(self) -> bytes:
        """EncryptedContent, [0] IMPLICIT OCTET STRING: primitive, or constructed of chunks."""
        if self.primitive:
            return _tlv(_CONTEXT | 0, self.ciphertext)
        starts = range(0, len(self.ciphertext), self.chunk)
        chunks = [_tlv(_OCTETS, self.ciphertext[start : start + self.chunk]) for start in starts]
        return self.outer(_CONTEXT | _CONSTRUCTED | 0, *chunks)

    def content_info(self, content: bytes | None = None) -> bytes:
        """EncryptedContentInfo (RFC 5652, clause 6.1)."""
        algorithm = _tlv(_SEQUENCE, self.cipher, _tlv(_OCTETS, self.iv))
        return self.outer(
            _SEQUENCE, self.inner_type, algorithm, self.content() if content is None else content
        )

    def encode(self, content: bytes | None = None) -> bytes:
        """The whole, with `content` in the place of the [0] field if given."""
        recipients = _tlv(_SET, *(recipient.encode() for recipient in self.recipients))
        enveloped = self.outer(
            _SEQUENCE, _integer(self.version), recipients, self.content_info(content)
        )
        return self.outer(
            _SEQUENCE, self.content_type, self.outer(_CONTEXT | _CONSTRUCTED | 0, enveloped)
        )


def _pad(plaintext: bytes) -> bytes:
    """PKCS #7 padding as CMS has it (RFC 5652, clause 6.3)."""
    count = BLOCK - len(plaintext) % BLOCK
    return plaintext + bytes((count,)) * count


def _cbc(key: bytes, iv: bytes, padded: bytes) -> bytes:
    encryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()
    return encryptor.update(padded) + encryptor.finalize()


def _compose(
    opened: _Opened, key_size: int = 32, pad: Callable[[bytes], bytes] = _pad
) -> _Envelope:
    """An envelope as KMS makes it, under a fresh content key and IV."""
    content_key, iv = os.urandom(key_size), os.urandom(BLOCK)
    return _Envelope(
        (_Recipient(opened.spki, content_key),), iv, _cbc(content_key, iv, pad(opened.plaintext))
    )


def _one_recipient(envelope: _Envelope, change: Callable[[_Recipient], _Recipient]) -> _Envelope:
    return replace(envelope, recipients=(change(envelope.recipients[0]),))


def _localstack(envelope: _Envelope) -> _Envelope:
    identifier = _tlv(_SEQUENCE, _RECIPIENT_NAME, _integer(1))
    named = _one_recipient(
        envelope, lambda recipient: replace(recipient, version=0, identifier=identifier)
    )
    return replace(named, version=0, primitive=True, outer=_tlv)


class _Form(NamedTuple):
    description: str
    change: Callable[[_Envelope], _Envelope]


_FORMS: Final[Mapping[str, _Form]] = {
    "kms": _Form("as AWS KMS: indefinite lengths, chunks of 1000 bytes", lambda envelope: envelope),
    "kms-chunks": _Form(
        "as AWS KMS, content in many small chunks",
        lambda envelope: replace(envelope, chunk=SMALL_CHUNK),
    ),
    "kms-primitive": _Form(
        "as AWS KMS, content in one piece", lambda envelope: replace(envelope, primitive=True)
    ),
    "localstack": _Form("as LocalStack: DER, versions 0, issuer and serial number", _localstack),
}
FORMS: Final[Mapping[str, str]] = {name: form.description for name, form in _FORMS.items()}
"""Every form that `seal` writes, and what it looks like; a client must open them all."""


def seal(plaintext: bytes, spki_der: bytes, form: str = "kms") -> bytes:
    """Seal a plaintext for the RSA key of a DER SubjectPublicKeyInfo, in one of FORMS.

    In the form "kms" and for RSA-2048 the result is 445 bytes and the content's TLV long: 493 for
    32 bytes, as KMS's. Raises KeyError for another form, ValueError or TypeError for bytes that are
    no RSA key.
    """
    return _FORMS[form].change(_compose(_Opened(plaintext, spki_der))).encode()


# From here on: what must be refused.


@functools.cache
def _other_key() -> rsa.RSAPublicKey:
    """A key whose private half is gone."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()


def _to_recipient(change: Callable[[_Recipient], _Recipient]) -> Callable[[_Opened], bytes]:
    return lambda opened: _one_recipient(_compose(opened), change).encode()


def _to_envelope(change: Callable[[_Envelope], _Envelope]) -> Callable[[_Opened], bytes]:
    return lambda opened: change(_compose(opened)).encode()


def _to_bytes(change: Callable[[bytes], bytes]) -> Callable[[_Opened], bytes]:
    return lambda opened: change(_compose(opened).encode())


def _to_content(change: Callable[[bytes], bytes]) -> Callable[[_Opened], bytes]:
    """Another [0] field, made of the ciphertext."""

    def write(opened: _Opened) -> bytes:
        envelope = _compose(opened)
        return envelope.encode(change(envelope.ciphertext))

    return write


def _oaep_sha1(recipient: _Recipient) -> _Recipient:
    digest = hashes.SHA1()  # noqa: S303 - a defect to be refused
    return replace(
        recipient, algorithm=_oaep_algorithm(_SHA1, _SHA1), padding=_oaep(digest, digest)
    )


def _oaep_defaults(recipient: _Recipient) -> _Recipient:
    algorithm = _tlv(_SEQUENCE, _RSAES_OAEP, _tlv(_SEQUENCE))
    return replace(_oaep_sha1(recipient), algorithm=algorithm)


def _oaep_mgf1_sha1(recipient: _Recipient) -> _Recipient:
    return replace(
        recipient,
        algorithm=_oaep_algorithm(mgf=_SHA1),
        padding=_oaep(mgf=hashes.SHA1()),  # noqa: S303 - a defect to be refused
    )


def _oaep_label(recipient: _Recipient) -> _Recipient:
    return replace(recipient, algorithm=_oaep_algorithm(label=_LABEL), padding=_oaep(label=_LABEL))


def _pkcs1v15(recipient: _Recipient) -> _Recipient:
    algorithm = _tlv(_SEQUENCE, _RSA_ENCRYPTION, _tlv(_NULL))
    return replace(recipient, algorithm=algorithm, padding=padding.PKCS1v15())


def _other_identifier(recipient: _Recipient) -> _Recipient:
    return replace(
        recipient, identifier=_tlv(_CONTEXT | 0, hashlib.sha256(b"another key").digest())
    )


def _aes_128(opened: _Opened) -> bytes:
    return replace(_compose(opened, key_size=16), cipher=_AES_128_CBC).encode()


def _short_content_key(opened: _Opened) -> bytes:
    return _compose(opened, key_size=16).encode()


def _bad_padding(opened: _Opened) -> bytes:
    return _compose(opened, pad=lambda plaintext: _pad(plaintext)[:-1] + b"\0").encode()


def _deep(ciphertext: bytes) -> bytes:
    """One chunk nested a thousand deep, each level legal in itself."""
    chunk = _tlv(_OCTETS, ciphertext)
    for _ in range(1000):
        chunk = _indefinite(_OCTETS | _CONSTRUCTED, chunk)
    return _indefinite(_CONTEXT | _CONSTRUCTED | 0, chunk)


def _primitive_indefinite(ciphertext: bytes) -> bytes:
    return bytes((_CONTEXT | 0, 0x80)) + ciphertext + _EOC


class _Defect(NamedTuple):
    description: str
    write: Callable[[_Opened], bytes]


_DEFECTS: Final[Mapping[str, _Defect]] = {
    "envelope-two-recipients": _Defect(
        "the recipient twice",
        _to_envelope(lambda envelope: replace(envelope, recipients=envelope.recipients * 2)),
    ),
    "envelope-no-recipient": _Defect(
        "an empty set of recipients",
        _to_envelope(lambda envelope: replace(envelope, recipients=())),
    ),
    "envelope-content-type": _Defect(
        "content type signedData outside",
        _to_envelope(lambda envelope: replace(envelope, content_type=_SIGNED_DATA)),
    ),
    "envelope-inner-content-type": _Defect(
        "content type signedData inside",
        _to_envelope(lambda envelope: replace(envelope, inner_type=_SIGNED_DATA)),
    ),
    "envelope-version": _Defect(
        "EnvelopedData of version 3", _to_envelope(lambda envelope: replace(envelope, version=3))
    ),
    "envelope-recipient-version": _Defect(
        "a recipient of version 3", _to_recipient(lambda recipient: replace(recipient, version=3))
    ),
    "envelope-other-identifier": _Defect(
        "the subject key identifier of another key", _to_recipient(_other_identifier)
    ),
    "envelope-other-key": _Defect(
        "content key encrypted to another key",
        _to_recipient(lambda recipient: replace(recipient, key=_other_key())),
    ),
    "envelope-oaep-sha1": _Defect("RSAES-OAEP with SHA-1", _to_recipient(_oaep_sha1)),
    "envelope-oaep-defaults": _Defect(
        "RSAES-OAEP without parameters, which means SHA-1", _to_recipient(_oaep_defaults)
    ),
    "envelope-oaep-mgf1-sha1": _Defect(
        "RSAES-OAEP with SHA-256, but MGF1 with SHA-1", _to_recipient(_oaep_mgf1_sha1)
    ),
    "envelope-oaep-label": _Defect("RSAES-OAEP with a label", _to_recipient(_oaep_label)),
    "envelope-pkcs1v15": _Defect("RSAES-PKCS1-v1_5", _to_recipient(_pkcs1v15)),
    "envelope-aes-128-cbc": _Defect("AES-128-CBC", _aes_128),
    "envelope-aes-256-gcm": _Defect(
        "AES-256-GCM by its name",
        _to_envelope(lambda envelope: replace(envelope, cipher=_AES_256_GCM)),
    ),
    "envelope-short-content-key": _Defect(
        "a content key of 16 bytes for AES-256", _short_content_key
    ),
    "envelope-short-iv": _Defect(
        "an IV of 8 bytes", _to_envelope(lambda envelope: replace(envelope, iv=envelope.iv[:8]))
    ),
    "envelope-empty-content": _Defect(
        "encrypted content without chunks",
        _to_content(lambda _: _indefinite(_CONTEXT | _CONSTRUCTED | 0)),
    ),
    "envelope-no-content": _Defect("no encrypted content", _to_content(lambda _: b"")),
    "envelope-partial-block": _Defect(
        "encrypted content that ends inside a block",
        _to_envelope(lambda envelope: replace(envelope, ciphertext=envelope.ciphertext[:-1])),
    ),
    "envelope-padding": _Defect("wrong padding", _bad_padding),
    "envelope-trailing-byte": _Defect(
        "a byte after the end", _to_bytes(lambda whole: whole + b"\0")
    ),
    "envelope-truncated": _Defect(
        "cut in the middle", _to_bytes(lambda whole: whole[: len(whole) // 2])
    ),
    "envelope-missing-eoc": _Defect(
        "the last end-of-contents is missing", _to_bytes(lambda whole: whole[: -len(_EOC)])
    ),
    "envelope-extra-eoc": _Defect(
        "one end-of-contents too many", _to_bytes(lambda whole: whole + _EOC)
    ),
    "envelope-huge-length": _Defect(
        "a length of 2^56 bytes",
        _to_content(lambda ciphertext: b"\xa0\x88\1" + bytes(7) + ciphertext),
    ),
    "envelope-reserved-length": _Defect(
        "the reserved length octet 0xFF (X.690, clause 8.1.3.5)",
        _to_content(lambda ciphertext: b"\xa0\xff" + ciphertext),
    ),
    "envelope-indefinite-primitive": _Defect(
        "a primitive of indefinite length", _to_content(_primitive_indefinite)
    ),
    "envelope-deep": _Defect("content nested a thousand deep", _to_content(_deep)),
}
MALFORMED: Final[Mapping[str, str]] = {
    name: defect.description for name, defect in _DEFECTS.items()
}
"""Every defect that `malform` makes, and what is wrong; a client must refuse them all."""


def malform(name: str, plaintext: bytes, spki_der: bytes) -> bytes:
    """Seal a plaintext with exactly one defect of MALFORMED; what is not the defect is as KMS
    writes it.

    Raises KeyError for another name, ValueError or TypeError for bytes that are no RSA key.
    """
    return _DEFECTS[name].write(_Opened(plaintext, spki_der))
