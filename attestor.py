"""attestor: get a KMS secret into an AWS Nitro Enclave so that nobody outside it could have read it.

    RSA-2048 key pair -> attestation document (PCRs and public key, signed by the Nitro Secure Module)
      -> KMS Decrypt with Recipient -> CiphertextForRecipient -> RSA and AES unwrap -> plaintext file

The parent instance is hostile: it carries every byte, chooses credentials, region and clock, and can replay what it
saw. TLS that ends in here authenticates KMS's answer; the attestation document proves this enclave to KMS, whose key
policy decides; a pinned key and an encryption context tell which ciphertext is meant. No path falls back to less.

Exit status:
    0    done
    1    a bug: an unexpected exception
    2    usage: options, a ciphertext that cannot be read or is not one, an insecure endpoint
    3    no Nitro Secure Module, or it refused
    4    KMS refused, or there are no valid credentials: do not retry
    5    KMS not reachable, throttled or failing: retry
    6    not authentic: envelope, TLS certificate or name, key id
    7    the output cannot be written
    130  SIGINT; 143 SIGTERM
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import sys
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import FrameType, TracebackType
    from typing import Self

    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

__version__ = "0.1.0"
__all__ = ["AttestorError", "EnvelopeError", "Recipient", "attested", "main", "open_envelope"]

log = logging.getLogger("attestor")
_T = TypeVar("_T")

# ---------------------------------------------------------------------------------------------- constants

CIPHERTEXT_MAX: Final = 6144  # CiphertextBlob and CiphertextForRecipient, KMS API reference
PLAINTEXT_MAX: Final = 4096  # Plaintext, same place
DOCUMENT_FRESH: Final = 60.0  # seconds that one attestation document serves further calls
ATTEMPT_TIMEOUT: Final = 20.0  # seconds for one connection or one answer; --timeout bounds them all together
DEFAULT_TIMEOUT: Final = 60.0

# BER identifier octets (X.690 8.1.2)
_INTEGER, _OCTETS, _NULL, _OID, _SEQUENCE, _SET = 0x02, 0x04, 0x05, 0x06, 0x30, 0x31
_CONTEXT_0, _CONTEXT_0_CONSTRUCTED, _CONTEXT_1_CONSTRUCTED = 0x80, 0xA0, 0xA1
_DEPTH_MAX: Final = 12  # KMS nests nine deep: ContentInfo down to the hash inside MGF1

# Object identifiers as their BER contents
_ENVELOPED_DATA: Final = bytes.fromhex("2a864886f70d010703")  # 1.2.840.113549.1.7.3, RFC 5652 6.1
_DATA: Final = bytes.fromhex("2a864886f70d010701")  # 1.2.840.113549.1.7.1, RFC 5652 4
_RSAES_OAEP: Final = bytes.fromhex("2a864886f70d010107")  # 1.2.840.113549.1.1.7, RFC 4055 4.1
_MGF1: Final = bytes.fromhex("2a864886f70d010108")  # 1.2.840.113549.1.1.8, RFC 4055 2.2
_SHA256: Final = bytes.fromhex("608648016503040201")  # 2.16.840.1.101.3.4.2.1, RFC 4055 2.1
_AES256_CBC: Final = bytes.fromhex("60864801650304012a")  # 2.16.840.1.101.3.4.1.42, RFC 3565 4.1

# SubjectPublicKeyInfo (RFC 5280 4.1.2.7, RFC 3279 2.3.1) around the modulus of an RSA-2048 key of exponent 65537
_RSA_2048_HEAD: Final = bytes.fromhex("30820122300d06092a864886f70d01010105000382010f003082010a0282010100")
_RSA_2048_TAIL: Final = bytes.fromhex("0203010001")

# The operations that take a Recipient, and the member of the answer in which the SDK's callers look for the secret
_SECRET_MEMBER: Final = {
    "Decrypt": "Plaintext",
    "GenerateDataKey": "Plaintext",
    "GenerateDataKeyPair": "PrivateKeyPlaintext",
    "GenerateRandom": "Plaintext",
    "DeriveSharedSecret": "SharedSecret",
}

_REGION: Final = re.compile(r"[a-z]{2,8}(-[a-z]{2,16}){1,3}-[0-9]{1,2}")
_KEY_ID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|mrk-[0-9a-f]{32}")
_ALIAS: Final = re.compile(r"alias/[A-Za-z0-9/_-]{1,250}")
_ARN: Final = re.compile(r"arn:aws[a-z-]*:kms:([a-z0-9-]+):[0-9]{12}:(.+)")
_ENDPOINT: Final = re.compile(r"https://[A-Za-z0-9._-]+(:[0-9]{1,5})?/?", re.IGNORECASE)
_BASE64: Final = re.compile(rb"[A-Za-z0-9+/\s]+={0,2}\s*")

# Worth another try: the SDK's throttling codes, and what KMS documents as transient
_TRANSIENT: Final = frozenset(
    "ThrottlingException Throttling ThrottledException RequestThrottled RequestThrottledException RequestLimitExceeded "
    "TooManyRequestsException SlowDown DependencyTimeoutException KMSInternalException KeyUnavailableException "
    "InternalFailure InternalServerError ServiceUnavailable ServiceUnavailableException".split()
)
_ALGORITHMS: Final = ("SYMMETRIC_DEFAULT", "RSAES_OAEP_SHA_1", "RSAES_OAEP_SHA_256", "SM2PKE")

# ------------------------------------------------------------------------------------------------- errors


class AttestorError(Exception):
    """Base of every error of attestor's own; `status` is the exit status, `hints` say what to do (two at most)."""

    status = 1

    def __init__(self, message: str, *hints: str) -> None:
        super().__init__(message)
        self.hints = hints


class InputError(AttestorError):
    """An option or an input that is not what it must be."""

    status = 2


class ModuleError(AttestorError):
    """There is no Nitro Secure Module, or it refused."""

    status = 3


class RefusedError(AttestorError):
    """KMS refused, or there are no valid credentials; trying again changes nothing."""

    status = 4


class UnreachableError(AttestorError):
    """KMS cannot be reached, throttles or fails; worth another try."""

    status = 5


class NotAuthenticError(AttestorError):
    """An answer that KMS would not give: treat it as an attack."""

    status = 6


class EnvelopeError(NotAuthenticError):
    """CiphertextForRecipient is not an envelope for our key."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"bad envelope: {reason}")


class OutputError(AttestorError):
    """The secret cannot be written."""

    status = 7


class Interrupted(BaseException):
    """SIGINT or SIGTERM; no `except Exception` in between must swallow it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.status = 128 + signal_number


# ------------------------------------------------------------------------------ the envelope (RFC 5652, X.690)


@dataclass(frozen=True, slots=True)
class _Element:
    """One BER element: its identifier octet and either its contents or, when constructed, its children."""

    tag: int
    contents: bytes = field(repr=False)
    children: tuple[_Element, ...] = field(default=(), repr=False)


def open_envelope(envelope: bytes, key: RSAPrivateKey) -> bytes:
    """Open KMS's CiphertextForRecipient: a CMS EnvelopedData (RFC 5652 section 6) of at most 6144 bytes.

    Tolerant of form (definite or indefinite lengths, content primitive or in chunks, as KMS and LocalStack write
    them), strict of content: one recipient, RSAES-OAEP with SHA-256 and MGF1-SHA-256, AES-256-CBC, nothing behind.
    Returns the plaintext of 1 to 4096 bytes; raises EnvelopeError, with one message for a wrong key and a wrong
    padding. The envelope carries no integrity of its own: TLS must have authenticated who sent it.
    """
    encrypted_key, iv, content = _parse_enveloped_data(_parse_ber(envelope), _key_identifier(key))
    return _decrypt_content(_unwrap_key(encrypted_key, key), iv, content)


def _parse_ber(data: bytes) -> _Element:
    """The single BER element that the data consists of (X.690 section 8.1)."""
    if len(data) > CIPHERTEXT_MAX:
        raise EnvelopeError(f"{len(data)} bytes long, KMS sends at most {CIPHERTEXT_MAX}")
    element, end = _read_element(data, 0, len(data), _DEPTH_MAX)
    if end != len(data):
        raise EnvelopeError(f"it ends after {end} of {len(data)} bytes")
    return element


def _read_element(data: bytes, start: int, limit: int, depth: int) -> tuple[_Element, int]:
    """The element at `start` and the offset behind it; it may not reach beyond `limit`."""
    if depth == 0:
        raise EnvelopeError(f"it nests more than {_DEPTH_MAX} deep")
    if limit - start < 2:
        raise EnvelopeError(f"cut short at byte {start}")
    tag = data[start]
    if tag & 0x1F in {0x00, 0x1F} and tag < 0x80:  # end-of-contents where none belongs; tags of several octets
        raise EnvelopeError(f"unexpected tag {tag:#04x} at byte {start}")
    length, start = _read_length(data, start + 1, limit)
    if length is None:
        if not tag & 0x20:
            raise EnvelopeError(f"primitive element of indefinite length at byte {start}")
        children, end = _read_children(data, start, limit, depth, indefinite=True)
        return _Element(tag, b"", children), end
    end = start + length
    if end > limit:
        raise EnvelopeError(f"cut short at byte {limit}")
    if tag & 0x20:
        return _Element(tag, b"", _read_children(data, start, end, depth, indefinite=False)[0]), end
    return _Element(tag, data[start:end]), end


def _read_length(data: bytes, start: int, limit: int) -> tuple[int | None, int]:
    """A length (None: indefinite) and the offset behind it (X.690 8.1.3)."""
    first = data[start]
    if first < 0x80:
        return first, start + 1
    if first == 0x80:
        return None, start + 1
    end = start + 1 + (first & 0x7F)
    if end - start > 5 or end > limit:
        raise EnvelopeError(f"length of {first & 0x7F} octets at byte {start}")
    return int.from_bytes(data[start + 1 : end], "big"), end


def _read_children(
    data: bytes, start: int, limit: int, depth: int, *, indefinite: bool
) -> tuple[tuple[_Element, ...], int]:
    """The elements up to `limit`, or up to the end-of-contents octets when the length is indefinite."""
    children: list[_Element] = []
    while indefinite or start < limit:
        if indefinite and data[start : min(start + 2, limit)] == b"\0\0":
            return tuple(children), start + 2
        child, start = _read_element(data, start, limit, depth - 1)
        children.append(child)
    return tuple(children), start


def _children(element: _Element, tag: int, count: int, what: str) -> tuple[_Element, ...]:
    """The children of a constructed element; exactly this tag and this many."""
    if element.tag != tag or len(element.children) != count:
        raise EnvelopeError(
            f"{what} has tag {element.tag:#04x} and {len(element.children)} elements, expected {tag:#04x} and {count}"
        )
    return element.children


def _contents(element: _Element, tag: int, what: str, length: int | None = None) -> bytes:
    """The contents of a primitive element; exactly this tag and this length."""
    if element.tag != tag or length not in {None, len(element.contents)}:
        size = "" if length is None else f" and {length}"
        raise EnvelopeError(
            f"{what} has tag {element.tag:#04x} and {len(element.contents)} bytes, expected {tag:#04x}{size}"
        )
    return element.contents


def _expect(found: bytes, expected: bytes, what: str) -> None:
    if found != expected:
        raise EnvelopeError(f"{what} is {found.hex()}, expected {expected.hex()}")


def _parse_enveloped_data(content_info: _Element, key_identifier: bytes) -> tuple[bytes, bytes, bytes]:
    """Encrypted key, initialisation vector and encrypted content (RFC 5652 sections 3 and 6.1)."""
    content_type, explicit = _children(content_info, _SEQUENCE, 2, "content info")
    _expect(_contents(content_type, _OID, "content type"), _ENVELOPED_DATA, "content type")
    (enveloped,) = _children(explicit, _CONTEXT_0_CONSTRUCTED, 1, "content")
    # three elements: neither originatorInfo nor unprotectedAttrs
    version, recipients, content = _children(enveloped, _SEQUENCE, 3, "enveloped data")
    (recipient,) = _children(recipients, _SET, 1, "recipient infos")
    encrypted_key = _parse_recipient(recipient, _contents(version, _INTEGER, "version"), key_identifier)
    return encrypted_key, *_parse_encrypted_content(content)


def _parse_recipient(recipient: _Element, data_version: bytes, key_identifier: bytes) -> bytes:
    """The encrypted key of a KeyTransRecipientInfo (RFC 5652 section 6.2.1), which must be meant for our key."""
    version, identifier, algorithm, encrypted_key = _children(recipient, _SEQUENCE, 4, "recipient info")
    if identifier.tag == _CONTEXT_0:  # subjectKeyIdentifier: KMS writes the SHA-256 of our SubjectPublicKeyInfo
        expected_version = b"\x02"
        _expect(identifier.contents, key_identifier, "subject key identifier")
    else:  # issuerAndSerialNumber: LocalStack writes a made-up one, there is nothing to compare it with
        expected_version = b"\x00"
        _, serial = _children(identifier, _SEQUENCE, 2, "recipient identifier")
        _contents(serial, _INTEGER, "serial number")
    _expect(data_version, expected_version, "version of the enveloped data")
    _expect(_contents(version, _INTEGER, "recipient version"), expected_version, "version of the recipient info")
    _parse_oaep(algorithm)
    return _contents(encrypted_key, _OCTETS, "encrypted key", 256)


def _parse_oaep(algorithm: _Element) -> None:
    """RSAES-OAEP with SHA-256, MGF1 with SHA-256 and no label (RFC 4055 section 4.1)."""
    identifier, parameters = _children(algorithm, _SEQUENCE, 2, "key encryption algorithm")
    _expect(_contents(identifier, _OID, "key encryption"), _RSAES_OAEP, "key encryption algorithm")
    hashing, masking = _children(parameters, _SEQUENCE, 2, "OAEP parameters")
    (hash_algorithm,) = _children(hashing, _CONTEXT_0_CONSTRUCTED, 1, "OAEP hash")
    _parse_sha256(hash_algorithm, "OAEP hash")
    (mask_algorithm,) = _children(masking, _CONTEXT_1_CONSTRUCTED, 1, "OAEP mask")
    mask, mask_hash = _children(mask_algorithm, _SEQUENCE, 2, "OAEP mask")
    _expect(_contents(mask, _OID, "OAEP mask"), _MGF1, "OAEP mask")
    _parse_sha256(mask_hash, "MGF1 hash")


def _parse_sha256(algorithm: _Element, what: str) -> None:
    """SHA-256, with NULL parameters or none: RFC 4055 section 2.1 wants both accepted."""
    identifier, *parameters = _children(algorithm, _SEQUENCE, len(algorithm.children) or 1, what)
    _expect(_contents(identifier, _OID, what), _SHA256, what)
    if parameters and (len(parameters) > 1 or _contents(parameters[0], _NULL, what, 0)):
        raise EnvelopeError(f"{what} has parameters")


def _parse_encrypted_content(content: _Element) -> tuple[bytes, bytes]:
    """Initialisation vector and ciphertext of an EncryptedContentInfo (RFC 5652 section 6.1, RFC 3565)."""
    content_type, algorithm, encrypted = _children(content, _SEQUENCE, 3, "encrypted content info")
    _expect(_contents(content_type, _OID, "inner content type"), _DATA, "inner content type")
    cipher, iv = _children(algorithm, _SEQUENCE, 2, "content encryption algorithm")
    _expect(_contents(cipher, _OID, "cipher"), _AES256_CBC, "content encryption algorithm")
    if encrypted.tag == _CONTEXT_0_CONSTRUCTED:
        ciphertext = b"".join(_contents(chunk, _OCTETS, "content chunk") for chunk in encrypted.children)
    else:
        ciphertext = _contents(encrypted, _CONTEXT_0, "encrypted content")
    if not ciphertext or len(ciphertext) % 16:
        raise EnvelopeError(f"encrypted content is {len(ciphertext)} bytes long, not whole blocks of 16")
    return _contents(iv, _OCTETS, "initialisation vector", 16), ciphertext


def _unwrap_key(encrypted_key: bytes, key: RSAPrivateKey) -> bytes | None:
    """The content encryption key, or None; the caller goes on with the work either way."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    oaep = padding.OAEP(mgf=padding.MGF1(hashes.SHA256()), algorithm=hashes.SHA256(), label=None)
    try:
        content_key = key.decrypt(encrypted_key, oaep)
    except ValueError:
        return None
    return content_key if len(content_key) == 32 else None


def _decrypt_content(content_key: bytes | None, iv: bytes, ciphertext: bytes) -> bytes:
    """Decrypt and unpad (RFC 5652 section 6.3); a missing key and a wrong padding end alike, so there is no oracle."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    decryptor = Cipher(algorithms.AES256(content_key or bytes(32)), modes.CBC(iv)).decryptor()
    padded = decryptor.update(ciphertext) + decryptor.finalize()
    count = padded[-1]
    if content_key is None or not 1 <= count <= 16 or not padded.endswith(bytes([count]) * count):
        raise EnvelopeError("it does not open with this enclave's key")
    if not 0 < len(padded) - count <= PLAINTEXT_MAX:
        raise EnvelopeError(f"it holds {len(padded) - count} bytes, KMS sends 1 to {PLAINTEXT_MAX}")
    return padded[:-count]


def _key_identifier(key: RSAPrivateKey) -> bytes:
    import hashlib

    return hashlib.sha256(_public_key_info(key)).digest()


def _public_key_info(key: RSAPrivateKey) -> bytes:
    """The DER SubjectPublicKeyInfo, 294 bytes: what KMS takes from the attestation document.

    Written here because the serialisation module would cost 10 ms and 2.5 MiB of enclave memory for a constant.
    """
    return _RSA_2048_HEAD + key.public_key().public_numbers().n.to_bytes(256) + _RSA_2048_TAIL


# ------------------------------------------------------------- the recipient: a KMS client and two event handlers


class Recipient:
    """This process's RSA-2048 key pair, and the attestation document that carries its public key.

    Key and document are made in a thread, beside whatever the caller does (importing the SDK takes as long). The
    private key stays in this object. Thread-safe; errors of the module are raised as ModuleError where it is used.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._document = b""
        self._asked = -DOCUMENT_FRESH
        self._answered: Future[None] = Future()
        self._key = _in_background(self._make)

    @property
    def failed(self) -> bool:
        """Whether the key could not be made."""
        return self._key.done() and self._key.exception() is not None

    def wait_for_module(self) -> None:
        """Return as soon as the module has answered once; it comes before credentials and network."""
        self._answered.result()

    def document(self) -> bytes:
        """An attestation document for our public key, not older than a minute."""
        return self._fresh_document(self._key.result())

    def open(self, envelope: bytes) -> bytes:
        """The plaintext of an envelope for our key; see `open_envelope`."""
        return open_envelope(envelope, self._key.result())

    def _make(self) -> RSAPrivateKey:
        """Make the key from a pool that has the module's randomness, and the first document."""
        try:
            randomness = _with_module(lambda module: module.random(256))
        except BaseException as error:
            self._answered.set_exception(error)
            raise
        self._answered.set_result(None)
        from cryptography.hazmat.primitives.asymmetric import rsa

        from nsm.entropy import mix_into_kernel

        if mix_into_kernel(randomness):
            log.info("kernel's random pool was not initialised: credited with the module's randomness")
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._fresh_document(key)
        return key

    def _fresh_document(self, key: RSAPrivateKey) -> bytes:
        with self._lock:
            if time.monotonic() - self._asked >= DOCUMENT_FRESH:
                asked = time.monotonic()
                self._document = _with_module(lambda module: module.attest(public_key=_public_key_info(key)))
                self._asked = asked
                log.info("attestation document of %d bytes", len(self._document))
            return self._document


def _with_module(use: Callable[[Any], _T]) -> _T:
    """Open the module, use it, close it; its errors become ours."""
    from nsm import Nsm, NsmError
    from nsm.library import LibraryError

    try:
        with Nsm() as module:
            log.info("Nitro Secure Module through %s", module.transport_name)
            return use(module)
    except LibraryError as error:
        raise InputError(f"library of the Nitro Secure Module cannot be used: {error}") from error
    except NsmError as error:
        if error.operation == "open":
            hint = "this does not look like a Nitro Enclave: the module's device is there only inside one"
            raise ModuleError(f"no Nitro Secure Module: {error}", hint) from error
        raise ModuleError(f"the Nitro Secure Module refused: {error}") from error


def _in_background(make: Callable[[], _T]) -> Future[_T]:
    """Run `make` in a daemon thread: a signal or a deadline ends the process without waiting for it."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(make())
        except BaseException as error:  # noqa: BLE001 - whatever it was, it is raised where the result is awaited
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


_processes_recipient: Recipient | None = None
_recipient_lock = threading.Lock()


def process_recipient() -> Recipient:
    """The one recipient of this process, made anew after a failure."""
    global _processes_recipient  # noqa: PLW0603 - one key pair per process is the point
    with _recipient_lock:
        if _processes_recipient is None or _processes_recipient.failed:
            _processes_recipient = Recipient()
        return _processes_recipient


def _forget_recipient() -> None:
    """A forked child has neither the thread that makes the key nor a claim to it."""
    global _processes_recipient, _recipient_lock
    _processes_recipient, _recipient_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_recipient)


def attested(client_or_session: _T) -> _T:
    """Make a KMS client, or every KMS client of a session, decrypt for this enclave only; return what was given.

        kms = attestor.attested(boto3.client("kms"))
        kms.decrypt(CiphertextBlob=blob, EncryptionContext={"node": "3"})["Plaintext"]

    Takes a boto3 or botocore session, or a client of either; may be called twice. The five operations that have a
    Recipient (Decrypt, GenerateDataKey, GenerateDataKeyPair, GenerateRandom, DeriveSharedSecret) then send the
    attestation document, and answer with the unwrapped secret in the member where it always is. Raises InputError
    for an endpoint without https, a client made with verify=False or a call with a Recipient of its own, ModuleError
    without a Nitro Secure Module, and NotAuthenticError for an answer without an envelope or from another key.
    """
    subject: Any = client_or_session
    events = subject.meta.events if hasattr(subject, "meta") else getattr(subject, "events", None) or subject
    if hasattr(subject, "meta"):
        _require_authenticated(subject._endpoint)
    process_recipient()
    events.register("creating-client-class.kms", _add_client_check, unique_id="attestor-client")
    events.register("before-parameter-build.kms", _add_recipient, unique_id="attestor-recipient")
    events.register("before-call.kms", _require_https, unique_id="attestor-https")
    events.register("after-call.kms", _unwrap_answer, unique_id="attestor-unwrap")
    return client_or_session


class _AuthenticatedClient:
    """First base of a session's KMS clients: refuses to be made where nobody checks who answers."""

    def __init__(self, serializer: object, endpoint: object, *args: object, **kwargs: object) -> None:
        _require_authenticated(endpoint)
        super().__init__(serializer, endpoint, *args, **kwargs)  # type: ignore[call-arg]  # botocore's BaseClient


def _add_client_check(base_classes: list[type], **_: object) -> None:
    base_classes.insert(0, _AuthenticatedClient)


def _require_authenticated(endpoint: Any) -> None:
    """Whoever has seen the document can encrypt to its key: only TLS tells KMS's answer from the parent's."""
    if not endpoint.host.lower().startswith("https://"):
        raise InputError(f"endpoint {endpoint.host} is not https", "TLS is what authenticates the answer of KMS")
    if endpoint.http_session._verify is False:
        raise InputError("the client was made with verify=False", "TLS is what authenticates the answer of KMS")


def _require_https(params: Mapping[str, Any], **_: object) -> None:
    if not params["url"].lower().startswith("https://"):
        raise InputError("endpoint is not https", "TLS is what authenticates the answer of KMS")


def _add_recipient(params: dict[str, Any], model: Any, context: dict[str, Any], **_: object) -> None:
    if model.name not in _SECRET_MEMBER:
        return
    if "Recipient" in params:
        raise InputError(f"{model.name} of an attested client brings a Recipient of its own")
    context["attestor_key_id"] = params.get("KeyId")
    params["Recipient"] = {
        "KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_256",
        "AttestationDocument": process_recipient().document(),
    }


def _unwrap_answer(
    http_response: Any, parsed: dict[str, Any], model: Any, context: Mapping[str, Any], **_: object
) -> None:
    if model.name not in _SECRET_MEMBER or http_response.status_code >= 300:
        return
    announced = http_response.headers.get("Content-Length")
    if announced and announced != str(len(http_response.content)):
        raise UnreachableError(f"answer of KMS is cut short: {len(http_response.content)} of {announced} bytes")
    member = _SECRET_MEMBER[model.name]
    if parsed.get(member):
        raise NotAuthenticError(f"answer of KMS has a {member} in the clear")
    if not parsed.get("CiphertextForRecipient"):
        raise NotAuthenticError("answer of KMS has no CiphertextForRecipient", "is this endpoint AWS KMS?")
    asked = context["attestor_key_id"]
    if asked and not _same_key(asked, str(parsed.get("KeyId"))):
        raise NotAuthenticError(f"answer of KMS is from key {parsed.get('KeyId')}, asked for {asked}")
    parsed[member] = process_recipient().open(parsed.pop("CiphertextForRecipient"))


def _same_key(asked: str, answered: str) -> bool:
    """Whether the ARN in an answer is the key asked for; an alias names no key, so it cannot be compared."""
    if not is_pinned(asked):
        return True
    return asked == answered or answered.endswith(f":key/{asked}")


def is_pinned(key_id: str | None) -> bool:
    """Whether this names one key: an ARN or an id does, an alias does not (the parent's account resolves it)."""
    return key_id is not None and "alias/" not in key_id


# ------------------------------------------------------------------------------------------- edges: KMS


@dataclass(frozen=True, slots=True)
class Kms:
    """KMS as one command meets it; `timeout` is in seconds for a whole call, retries included."""

    region: str
    endpoint_url: str | None
    timeout: float

    def call(self, operation: str, **parameters: object) -> dict[str, Any]:
        """Call an operation ("decrypt") of the attested client; raises only errors of ours."""
        recipient = process_recipient()
        import botocore.config
        import botocore.session

        recipient.wait_for_module()
        answer = _in_background(lambda: self._call(botocore.session.Session(), operation, parameters))
        try:
            return answer.result(self.timeout)
        except FutureTimeoutError:
            raise UnreachableError(f"no answer of KMS within {self.timeout:g} seconds") from None

    def _call(self, session: Any, operation: str, parameters: Mapping[str, object]) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = getattr(self._client(session), operation)(**parameters)
        except AttestorError:
            raise
        except Exception as error:
            translated = _translate(error, operation)
            if translated is None:
                raise
            raise _redacted(translated, session) from error
        log.info("KMS answered request %s", answer.get("ResponseMetadata", {}).get("RequestId"))
        return answer

    def _client(self, session: Any) -> Any:
        from botocore.config import Config

        session.register_component("data_loader", _loader())
        attempt = min(ATTEMPT_TIMEOUT, self.timeout)
        client = session.create_client(
            "kms",
            region_name=self.region,
            endpoint_url=self.endpoint_url,
            config=Config(connect_timeout=attempt, read_timeout=attempt),
        )
        log.info("KMS at %s", client.meta.endpoint_url)
        return attested(client)


def _loader() -> Any:
    """The SDK's loader of its own data, in half the time and memory.

    It neither walks over some 400 folders to list the services, nor makes an OrderedDict of each object in the
    megabyte of endpoints: a dict keeps its order as well. A search path of the environment is not followed.
    """
    import json

    from botocore.loaders import JSONFileLoader, Loader

    class FileLoader(JSONFileLoader):
        def load_file(self, file_path: str) -> Any:
            try:
                with open(f"{file_path}.json", "rb") as source:
                    return json.load(source)
            except FileNotFoundError:  # or it is compressed, or not there at all
                return super().load_file(file_path)

    loader: Any = Loader(file_loader=FileLoader())
    # besides KMS, the services that a source of credentials may call
    loader.list_available_services = lambda type_name: ["kms", "sts", "sso", "sso-oidc", "signin"]  # noqa: ARG005
    return loader


def _translate(error: Exception, operation: str) -> AttestorError | None:  # noqa: PLR0911 - a table, as match
    """The SDK's exception as ours; None for one that we do not know: a bug."""
    from botocore import exceptions as sdk

    match error:
        case sdk.ClientError():
            return _translate_answer(error, operation)
        case sdk.SSLError():
            return _translate_tls(error)
        case sdk.ConnectionError() | sdk.HTTPClientError() | sdk.IncompleteReadError():
            return UnreachableError(f"KMS cannot be reached: {error}")
        case sdk.NoCredentialsError() | sdk.PartialCredentialsError() | sdk.CredentialRetrievalError():
            hint = "in an enclave the parent must pass them on; see the README's section on credentials"
            return RefusedError(f"no valid AWS credentials: {error}", hint)
        case sdk.ParamValidationError():
            return InputError("KMS would not take these parameters: a length or a type is wrong")
        case sdk.BotoCoreError():
            return RefusedError(f"KMS cannot be called: {error}")
        case ValueError() if "Invalid endpoint" in str(error):
            return InputError(str(error))
        case ValueError() | TypeError() | AttributeError() | LookupError():
            return NotAuthenticError(f"answer of KMS cannot be read ({type(error).__name__})")
        case _:
            return None


def _translate_answer(error: Any, operation: str) -> AttestorError:
    """An error that KMS answered with: its code, its message and its request id, always."""
    answer = error.response.get("Error", {})
    metadata = error.response.get("ResponseMetadata", {})
    code, message = str(answer.get("Code") or "unknown error"), str(answer.get("Message") or "")
    said = ": ".join(filter(None, (code, message))) + f" (request id {metadata.get('RequestId') or 'none'})"
    if code in _TRANSIENT or metadata.get("HTTPStatusCode", 0) >= 500:
        return UnreachableError(f"KMS cannot answer now: {said}")
    return RefusedError(f"KMS refused to {operation.replace('_', ' ')}: {said}", *_hints(code))


def _hints(code: str) -> tuple[str, ...]:
    match code:
        case "AccessDeniedException":
            return (
                "the key policy must allow this role with this enclave's PCRs; in debug mode PCR0 to 2 are all zero",
            )
        case "InvalidCiphertextException":
            return ("the ciphertext is damaged, or was made with another --context",)
        case "IncorrectKeyException":
            return ("the ciphertext was made with another key than --key-id names",)
        case "ExpiredTokenException" | "UnrecognizedClientException" | "InvalidClientTokenId":
            return ("the credentials are expired or wrong: renew them",)
        case "InvalidSignatureException" | "SignatureDoesNotMatch" | "RequestExpired":
            return ("the secret key is wrong, or the clock of this enclave is more than five minutes off",)
        case _:
            return ()


def _translate_tls(error: Exception) -> AttestorError:
    import ssl

    from urllib3.util.ssl_match_hostname import CertificateError  # a wrong name, found by urllib3 and not by ssl

    causes = list(_causes(error))
    if any(isinstance(cause, ssl.SSLCertVerificationError | CertificateError) for cause in causes):
        return NotAuthenticError(
            f"certificate of KMS is not valid: {error}",
            "somebody may be in the middle; AWS_CA_BUNDLE names the roots to trust",
        )
    if any(isinstance(cause, FileNotFoundError | PermissionError | IsADirectoryError) for cause in causes):
        return InputError(
            f"CA bundle cannot be read: {error}", "AWS_CA_BUNDLE or ca_bundle in the configuration names it"
        )
    return UnreachableError(f"no TLS with KMS: {error}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it was raised from, also where libraries hand it on as an argument."""
    while error is not None:
        yield error
        inner = getattr(error, "kwargs", {}).get("error") or next(
            (argument for argument in error.args if isinstance(argument, BaseException)), None
        )
        error = inner or error.__cause__ or error.__context__


def _redacted(error: AttestorError, session: Any) -> AttestorError:
    """The error without the credentials: signature errors of AWS may echo the request that was signed."""
    credentials = session._credentials
    if credentials is None:
        return error
    message = str(error)
    for secret in (credentials.secret_key, credentials.token):
        if secret:
            message = message.replace(secret, "[redacted]")
    return type(error)(message, *error.hints)


# ------------------------------------------------------------------------------------- edges: files and streams


def read_ciphertext(path: str, *, base64_text: bool) -> bytes:
    """Read a CiphertextBlob, 1 to 6144 bytes, from a file or ("-") from standard input."""
    limit = 2 * CIPHERTEXT_MAX if base64_text else CIPHERTEXT_MAX
    what = "standard input" if path == "-" else path
    data = _read_bounded(path, limit + 1, what)
    if not data.strip():
        raise InputError(f"ciphertext {what} is empty")
    if base64_text:
        data = _decode_base64(data, what)
    elif _BASE64.fullmatch(data):
        raise InputError(f"ciphertext {what} is base64 text, not the bytes it stands for", "add --base64")
    if len(data) > CIPHERTEXT_MAX:
        raise InputError(f"ciphertext {what} is longer than the {CIPHERTEXT_MAX} bytes that KMS takes")
    return data


def _read_bounded(path: str, limit: int, what: str) -> bytes:
    try:
        descriptor = 0 if path == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with open(descriptor, "rb", closefd=path != "-") as source:
            return source.read(limit)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise InputError(f"ciphertext {what} cannot be read: {reason}") from error


def _decode_base64(text: bytes, what: str) -> bytes:
    import base64

    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except ValueError as error:
        raise InputError(f"ciphertext {what} is not base64 text") from error


class Signals:
    """SIGINT and SIGTERM as an exception, up to the point of no return: behind it they come too late."""

    late = False

    def install(self) -> None:
        """Take over both signals, unless whoever started us has them ignored."""
        import signal

        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._interrupt)
        self.late = False

    def point_of_no_return(self) -> None:
        """From here on the process ends with its result; handlers run in this thread, so there is no window."""
        self.late = True

    def _interrupt(self, number: int, _frame: FrameType | None) -> None:
        if not self.late:
            raise Interrupted(number)


signals = Signals()


class Target(Protocol):
    """Where a secret goes. Entering checks what can be checked; leaving without `write` leaves nothing."""

    def write(self, secret: bytes) -> None:
        """Put the secret in its place, whole or not at all; raises OutputError."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_target(path: str, *, force: bool) -> Target:
    """The target for a path; "-" is standard output."""
    return StandardOutput() if path == "-" else SecretFile(path, force=force)


class StandardOutput:
    """A pipe or a file that a shell opened; a terminal is refused, since it keeps what it shows."""

    def __init__(self) -> None:
        if sys.stdout is None:
            raise OutputError("standard output is closed")
        if os.isatty(1):
            raise InputError("refusing to write a secret to a terminal", "name a file, or pipe it into a program")

    def write(self, secret: bytes) -> None:
        """Write all of it; a reader that went away is an error."""
        view = memoryview(secret)
        try:
            while view:
                view = view[os.write(1, view) :]
        except OSError as error:
            raise OutputError(f"standard output cannot be written: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class SecretFile:
    """A file of mode 0600 that is absent or complete at any moment, durable when it is there.

    An unnamed file (O_TMPFILE) gets its name by linkat when it is written and synced: until then even SIGKILL leaves
    nothing. A file system without them, or a missing /proc, gets a temporary name in the same folder instead. The
    folder is held open, so that nobody can swap it in between; a symbolic link as the target is never followed.
    """

    def __init__(self, path: str, *, force: bool) -> None:
        self._path = path
        self._force = force
        folder, self._name = os.path.split(path)
        self._temporary: str | None = None
        self._file = -1
        try:
            self._folder = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise self._failed(error) from error
        try:
            self._check()
        except BaseException:
            os.close(self._folder)
            raise

    def _check(self) -> None:
        """Everything that can be known before KMS is asked."""
        try:
            self._check_name()
            if not os.access(".", os.W_OK | os.X_OK, dir_fd=self._folder, effective_ids=True):
                raise OutputError(f"{self._path} cannot be written: its folder is not writable")
            if os.path.isdir("/proc/self/fd"):  # linkat needs it to find the unnamed file
                self._file = self._open(".", os.O_TMPFILE)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise self._failed(error) from error

    def _check_name(self) -> None:
        import stat

        if self._name in {"", ".", ".."}:
            raise OutputError(f"{self._path} cannot be written: it names a folder")
        try:
            mode = os.stat(self._name, dir_fd=self._folder, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return
        if not self._force:
            raise OutputError(f"{self._path} exists", "--force replaces it")
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise OutputError(f"{self._path} is no file that could be replaced")

    def write(self, secret: bytes) -> None:
        """Write, sync, and give it its name."""
        try:
            if self._file < 0:
                self._file = self._open(self._new_name(), os.O_CREAT | os.O_EXCL)
            os.fchmod(self._file, 0o600)  # the umask may have taken bits away
            view = memoryview(secret)
            while view:
                view = view[os.write(self._file, view) :]
            os.fsync(self._file)
            signals.point_of_no_return()
            self._place()
        except OSError as error:
            raise self._failed(error) from error

    def _place(self) -> None:
        """Give the file its name; take it back when even that cannot be made durable."""
        unnamed = self._temporary is None
        if unnamed and self._force:  # linkat cannot replace: first any name, then rename
            self._link(self._new_name())
        if self._temporary is None:
            self._link(self._name)
        elif self._force:
            os.rename(self._temporary, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            self._temporary = None
        else:
            os.link(self._temporary, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        try:
            os.fsync(self._folder)
        except OSError:
            os.unlink(self._name, dir_fd=self._folder)
            raise

    def _link(self, name: str) -> None:
        # dst_dir_fd makes Python call linkat with AT_SYMLINK_FOLLOW, which is what open(2) prescribes for O_TMPFILE
        os.link(f"/proc/self/fd/{self._file}", name, dst_dir_fd=self._folder, follow_symlinks=True)

    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._folder)

    def _new_name(self) -> str:
        self._temporary = f".attestor-{os.urandom(8).hex()}"
        return self._temporary

    def _failed(self, error: Exception) -> OutputError:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        return OutputError(f"{self._path} cannot be written: {reason}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary, dir_fd=self._folder)
        for descriptor in (self._file, self._folder):
            if descriptor >= 0:
                os.close(descriptor)


def _no_tmpfile_errors() -> frozenset[int]:
    import errno

    # open(2): EOPNOTSUPP by a file system without it, EISDIR and ENOENT by kernels and overlays without it
    return frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL})


_NO_TMPFILE: Final = _no_tmpfile_errors()


# ----------------------------------------------------------------------------------------------- commands


class _Cli(click.Group):
    """The one place where an error becomes a message and an exit status."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run a command and exit; see the module's docstring for the statuses."""
        signals.install()
        kwargs |= {"prog_name": "attestor", "standalone_mode": False}
        sys.exit(_status_of(lambda: super(_Cli, self).main(*args, **kwargs)))


def _status_of(command: Callable[[], Any]) -> int:
    try:
        return int(command() or 0)
    except Interrupted as interrupted:
        return interrupted.status
    except AttestorError as error:
        return _fail(error.status, str(error), *error.hints)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return InputError.status
    except click.ClickException as error:
        message = error.format_message().rstrip(".")
        return _fail(InputError.status, message[:1].lower() + message[1:], "--help shows arguments and options")
    except Exception as error:  # noqa: BLE001 - the message may hold anything: say only where it happened
        trace = error.__traceback__
        while trace and trace.tb_next:
            trace = trace.tb_next
        where = f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}" if trace else "nowhere"
        return _fail(1, f"unexpected {type(error).__name__} at {where}", "this is a bug in attestor: please report it")


def _fail(status: int, message: str, *hints: str) -> int:
    _say("error", message)
    for hint in hints[:2]:
        _say("hint", hint)
    return status


def _say(kind: str, message: str) -> None:
    """One line on stderr; what a parent or a server put into it cannot add lines or steer a terminal."""
    line = "".join(character if character.isprintable() else " " for character in message)
    click.echo(f"attestor: {kind}: {line}", err=True)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _say("note", record.getMessage())


def _set_verbose(_context: click.Context, _option: click.Parameter, verbose: bool) -> None:
    """Let our own logger speak, and no other: the SDK's loggers print requests and answers whole."""
    if verbose:
        log.handlers = [_Notes()]
        log.setLevel(logging.INFO)
        log.propagate = False


def _set_library(_context: click.Context, _option: click.Parameter, path: str | None) -> None:
    """Hand the library on to nsm, which looks for it in the environment."""
    if path is not None:
        os.environ["NSM_LIBRARY"] = path


def _seconds(_context: click.Context, _option: click.Parameter, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise InputError("--timeout wants a number of seconds, more than 0 and at most 86400")
    return seconds


def _https(_context: click.Context, _option: click.Parameter, url: str | None) -> str | None:
    if url is not None and not url.lower().startswith("https://"):
        raise InputError("--endpoint-url is not https", "TLS is what authenticates the answer of KMS")
    if url is not None and not _ENDPOINT.fullmatch(url):
        raise InputError(f"--endpoint-url {url} is no endpoint, such as https://kms.eu-west-1.amazonaws.com")
    return url


def _encryption_context(_context: click.Context, _option: click.Parameter, pairs: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE pairs as KMS's encryption context; values are not repeated in messages."""
    context: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise InputError("--context wants NAME=VALUE")
        if name in context:
            raise InputError(f"--context names {name} twice")
        context[name] = value
    return context


def _key(_context: click.Context, _option: click.Parameter, key_id: str | None) -> str | None:
    if key_id is None or _KEY_ID.fullmatch(key_id) or _ALIAS.fullmatch(key_id):
        return key_id
    arn = _ARN.fullmatch(key_id)
    resource = arn[2] if arn else ""
    if not ((resource.startswith("key/") and _KEY_ID.fullmatch(resource[4:])) or _ALIAS.fullmatch(resource)):
        raise InputError(f"--key-id {key_id} is no key ARN, key id or alias")
    return key_id


def resolve_region(option: str | None, key_id: str | None, environment: Mapping[str, str]) -> str:
    """The region from the option, the environment or the key's ARN; there is no default, and they must agree."""
    arn = _ARN.fullmatch(key_id or "")
    region = option or environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or (arn and arn[1])
    if not region:
        raise InputError("no region", "give --region, set AWS_REGION, or name the key by its ARN")
    if not _REGION.fullmatch(region):
        raise InputError(f"region {region} is not a region's name, such as eu-west-1")
    if arn and arn[1] != region:
        raise InputError(f"region is {region}, the key ARN is in {arn[1]}")
    return region


# fmt: off
_MODULE_OPTIONS: Final = (
    click.option("--nsm-library", metavar="FILE", callback=_set_library, expose_value=False,
        help="patched libnsm.so, which must work  [env: NSM_LIBRARY]"),
    click.option("-v", "--verbose", is_flag=True, callback=_set_verbose, expose_value=False,
        help="say on stderr what is done"),
)
_KMS_OPTIONS: Final = (
    click.option("--region", metavar="REGION",
        help="AWS region of the key  [env: AWS_REGION, AWS_DEFAULT_REGION]"),
    click.option("--key-id", metavar="KEY", callback=_key, help="key ARN or id that must answer (or an alias)"),
    click.option("--any-key", is_flag=True, help="accept any key, and do not warn about it"),
    click.option("--context", "encryption_context", metavar="NAME=VALUE", multiple=True,
        callback=_encryption_context, help="encryption context, repeatable"),
    click.option("--grant-token", "grant_tokens", metavar="TOKEN", multiple=True, help="grant token, repeatable"),
    click.option("--endpoint-url", metavar="URL", callback=_https, help="another endpoint, https only"),
    click.option("--timeout", metavar="SECONDS", default=f"{DEFAULT_TIMEOUT:g}", callback=_seconds,
        help=f"for the whole call, retries included  [default: {DEFAULT_TIMEOUT:g}]"),
)
# fmt: on


def _options(options: Sequence[Callable[..., Any]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command several options at once, in this order."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s", help="print the version and exit")
def cli() -> None:
    """Get KMS secrets into an AWS Nitro Enclave so that nobody outside it could have read them."""


@cli.command()
@click.argument("ciphertext")
@click.argument("output")
@_options(_KMS_OPTIONS)
@click.option("--algorithm", metavar="NAME", help=f"{', '.join(_ALGORITHMS)}  [default: the first]")
@click.option("--base64", "base64_text", is_flag=True, help="CIPHERTEXT is base64 text")
@click.option("-f", "--force", is_flag=True, help="replace OUTPUT if it exists")
@_options(_MODULE_OPTIONS)
def decrypt(
    ciphertext: str,
    output: str,
    region: str | None,
    key_id: str | None,
    any_key: bool,
    encryption_context: dict[str, str],
    grant_tokens: tuple[str, ...],
    endpoint_url: str | None,
    timeout: float,
    algorithm: str | None,
    base64_text: bool,
    force: bool,
) -> None:
    """Decrypt a KMS ciphertext inside this enclave and write the plaintext to a file.

    \b
    Examples:
      attestor decrypt --key-id arn:aws:kms:...:key/... secret.enc /run/secrets/db
      attestor decrypt --region eu-west-1 --any-key - - < secret.enc | consumer

    CIPHERTEXT is a file with the bytes of a CiphertextBlob, at most 6144; "-" reads standard input. OUTPUT is
    created with mode 0600 and is complete or absent at any moment; "-" writes to standard output.

    Exit status: 0 done, 1 bug, 2 usage, 3 no module, 4 KMS refused, 5 try again, 6 not authentic, 7 output.
    """
    _check_key_options(key_id, any_key=any_key, algorithm=algorithm)
    kms = Kms(resolve_region(region, key_id, os.environ), endpoint_url, timeout)
    blob = read_ciphertext(ciphertext, base64_text=base64_text)
    with open_target(output, force=force) as target:
        if not (any_key or is_pinned(key_id)):
            _say(
                "warning", "no key is pinned: the parent may have chosen ciphertext and key; give --key-id or --any-key"
            )
        answer = kms.call(
            "decrypt",
            CiphertextBlob=blob,
            EncryptionContext=encryption_context,
            **_given(KeyId=key_id, GrantTokens=list(grant_tokens), EncryptionAlgorithm=algorithm),
        )
        target.write(answer["Plaintext"])


def _given(**parameters: object) -> dict[str, object]:
    """The parameters that were given: the SDK takes no None, and KMS no empty list."""
    return {name: value for name, value in parameters.items() if value}


def _check_key_options(key_id: str | None, *, any_key: bool, algorithm: str | None) -> None:
    if any_key and is_pinned(key_id):
        raise InputError(f"--any-key contradicts --key-id {key_id}", "leave one of them out")
    if algorithm is not None and algorithm not in _ALGORITHMS:
        raise InputError(f"--algorithm {algorithm} is none of {', '.join(_ALGORITHMS)}")
    if algorithm not in {None, "SYMMETRIC_DEFAULT"} and key_id is None:
        raise InputError(f"--algorithm {algorithm} needs --key-id: an asymmetric ciphertext does not name its key")


def main() -> NoReturn:
    """Run the command line."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold the secret
    gc.disable()  # so short a process ends before a collection pays
    try:
        cli.main()
    except SystemExit as end:
        _leave(end.code if isinstance(end.code, int) else 1)


def _leave(status: int) -> NoReturn:
    """End here and now: taking the interpreter apart would cost more than a tenth of the time that users wait."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
