"""Public keys that people have in files, or in KMS: read, and encrypted to."""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING, Any, Final

from attestor_io.errors import InputError, NotAuthenticError, RefusedError
from attestor_io.names import is_same_key
from attestor_io.reading import read_bounded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from attestor_io.deadline import Deadline

PUBLIC_KEY_MAX: Final = 8192  # bytes of PublicKey, KMS API reference
_DER: Final = b"\x30"  # a SEQUENCE, as SubjectPublicKeyInfo is
_PEM: Final = (b"-----BEGIN PUBLIC KEY-----", b"-----END PUBLIC KEY-----")  # RFC 7468 section 13
_BASE64: Final = re.compile(rb"[A-Za-z0-9+/]++={0,2}")
_HASHES: Final = {"RSAES_OAEP_SHA_1": "SHA1", "RSAES_OAEP_SHA_256": "SHA256"}
_RSA_BITS: Final = (2048, 3072, 4096)  # RSA_2048 and so on, the KeySpecs of KMS


def read_public_key(path: str, deadline: Deadline) -> bytes:
    """A DER SubjectPublicKeyInfo of at most 8192 bytes, from DER or PEM; KMS checks its key.

    Raises InputError, and UnreachableError if it is not there by the deadline.
    """
    data = read_bounded(path, 2 * PUBLIC_KEY_MAX, f"public key {path}", deadline)
    der = _from_pem(data) if _PEM[0] in data else data
    if not der.startswith(_DER) or len(der) > PUBLIC_KEY_MAX:
        wanted = f"SubjectPublicKeyInfo in PEM or DER, at most {PUBLIC_KEY_MAX} bytes"
        is_base64 = _BASE64.fullmatch(b"".join(data.split()))
        hint = "it is base64 text, as the AWS CLI prints it: base64 -d first"
        raise InputError(f"public key {path} is no {wanted}", *([hint] if is_base64 else []))
    return der


def _from_pem(data: bytes) -> bytes:
    """The bytes that a PEM text of one public key stands for; none for any other text."""
    begin, end = _PEM
    text = data.strip()
    if not (text.startswith(begin) and text.endswith(end)):
        return b""
    try:
        return base64.b64decode(b"".join(text[len(begin) : -len(end)].split()), validate=True)
    except ValueError:
        return b""


def check_can_encrypt(algorithm: str) -> None:
    """Refuse an algorithm that needs KMS itself to encrypt; raises InputError."""
    if algorithm not in _HASHES:
        raise InputError(f"--algorithm {algorithm} cannot be encrypted with here, only by KMS")


def public_key_of(answer: Mapping[str, Any], key_id: str, algorithm: str) -> bytes:
    """The public key in an answer of GetPublicKey; raises RefusedError if its use is another."""
    if not is_same_key(key_id, str(answer.get("KeyId"))):
        raise NotAuthenticError(f"answer of KMS is from {answer.get('KeyId')}, asked for {key_id}")
    taken = answer.get("EncryptionAlgorithms") or ["no encryption"]
    if algorithm not in taken:
        spec = f"key {key_id} is {answer.get('KeySpec')} and takes {', '.join(taken)}"
        raise RefusedError(f"{spec}, not {algorithm}")
    der: bytes = answer["PublicKey"]
    return der


def encrypt_to(der: bytes, algorithm: str, plaintext: bytes, what: str) -> bytes:
    """An RSAES-OAEP ciphertext (RFC 8017 section 7.1.1), as KMS Encrypt makes it.

    `what` names the public key. Raises InputError for a key that KMS could not have, and for a
    plaintext that is too long for it.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import padding, rsa

    try:
        key = serialization.load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{what} cannot be read") from error
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size not in _RSA_BITS:
        sizes = ", ".join(map(str, _RSA_BITS))
        raise InputError(f"{what} is no RSA key of {sizes} bits, as KMS has them")
    digest = getattr(hashes, _HASHES[algorithm])()
    most = key.key_size // 8 - 2 * digest.digest_size - 2
    if len(plaintext) > most:
        reason = f"longer than the {most} bytes that RSA_{key.key_size} with {algorithm} takes"
        raise InputError(f"plaintext is {reason}", "a symmetric key takes any length")
    return key.encrypt(plaintext, padding.OAEP(padding.MGF1(digest), digest, None))
