"""attestor: get a KMS secret into an AWS Nitro Enclave so that nobody outside it could have read
it.

    RSA-2048 key pair
      -> attestation document (PCRs and public key, signed by the Nitro Secure Module)
      -> KMS Decrypt with Recipient -> CiphertextForRecipient
      -> RSA and AES unwrap
      -> plaintext file

The parent instance is hostile: it carries every byte, chooses credentials, region and clock, and
can replay what it saw. TLS that ends in here authenticates KMS's answer; the attestation document
proves this enclave to KMS, whose key policy decides; a pinned key and an encryption context tell
which ciphertext is meant. No path falls back to less.

Exit status:
    0    done
    1    a bug: an unexpected exception
    2    usage: options, a ciphertext or policy that cannot be read or is not one, an insecure
         endpoint
    3    no Nitro Secure Module, or it refused
    4    KMS refused, or there are no valid credentials: do not retry; a key policy denies or is
         wrong
    5    KMS not reachable, throttled or failing: retry
    6    not authentic: attestation document, envelope, TLS certificate or name, key id
    7    the output cannot be written
    8    policy explain cannot tell
    126  inject: the program cannot be executed; 127 there is no such program
    129  SIGHUP; 130 SIGINT; 143 SIGTERM
"""

from __future__ import annotations

import atexit
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
from typing import IO, TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeVar

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

# ---------------------------------------------------------------------------------------- constants

CIPHERTEXT_MAX: Final = 6144  # CiphertextBlob and CiphertextForRecipient, KMS API reference
PLAINTEXT_MAX: Final = 4096  # Plaintext, same place
DOCUMENT_FRESH: Final = 60.0  # seconds that one attestation document serves further calls
_PR_SET_DUMPABLE: Final = 4  # linux/prctl.h
ATTEMPT_TIMEOUT: Final = (
    20.0  # seconds for one connection or one answer; --timeout bounds them all together
)
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

# SubjectPublicKeyInfo (RFC 5280 4.1.2.7, RFC 3279 2.3.1) around the modulus of an RSA-2048 key of
# exponent 65537
_RSA_2048_HEAD: Final = bytes.fromhex(
    "30820122300d06092a864886f70d01010105000382010f003082010a0282010100"
)
_RSA_2048_TAIL: Final = bytes.fromhex("0203010001")

# The operations that take a Recipient, and the member of the answer in which the SDK's callers look
# for the secret
_SECRET_MEMBER: Final = {
    "Decrypt": "Plaintext",
    "GenerateDataKey": "Plaintext",
    "GenerateDataKeyPair": "PrivateKeyPlaintext",
    "GenerateRandom": "Plaintext",
    "DeriveSharedSecret": "SharedSecret",
}

_REGION_VARIABLES: Final = frozenset({"AWS_REGION", "AWS_DEFAULT_REGION"})
_REGION: Final = re.compile(r"[a-z]{2,8}(-[a-z]{2,16}){1,3}-[0-9]{1,2}")
_KEY_ID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|mrk-[0-9a-f]{32}")
_ALIAS: Final = re.compile(r"alias/[A-Za-z0-9/_-]{1,250}")
_ARN: Final = re.compile(r"arn:aws[a-z-]*:kms:([a-z0-9-]+):[0-9]{12}:(.+)")
_ENDPOINT: Final = re.compile(r"https://[A-Za-z0-9._-]+(:[0-9]{1,5})?/?", re.IGNORECASE)
_BASE64: Final = re.compile(rb"[A-Za-z0-9+/\s]++={0,2}")

# Worth another try: the SDK's throttling codes, and what KMS documents as transient
_TRANSIENT: Final = frozenset(
    "ThrottlingException Throttling ThrottledException RequestThrottled "
    "RequestThrottledException RequestLimitExceeded "
    "TooManyRequestsException SlowDown DependencyTimeoutException KMSInternalException "
    "KeyUnavailableException "
    "InternalFailure InternalServerError ServiceUnavailable ServiceUnavailableException".split()
)
_ALGORITHMS: Final = ("SYMMETRIC_DEFAULT", "RSAES_OAEP_SHA_1", "RSAES_OAEP_SHA_256", "SM2PKE")

# ------------------------------------------------------------------------------------------- errors


class AttestorError(Exception):
    """Base of every error of attestor's own.

    `status` is the exit status, `notes` are facts, and `hints` say what to do (two at most).
    """

    status = 1
    notes: tuple[str, ...] = ()

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
    """SIGINT, SIGTERM or SIGHUP; no `except Exception` in between must swallow it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.status = 128 + signal_number


# ------------------------------------------------------------------- the envelope (RFC 5652, X.690)


@dataclass(slots=True)  # frozen, the thirty of an envelope would cost a quarter of its parsing
class _Element:
    """One BER element: its identifier octet and either its contents or, when constructed, its
    children.
    """

    tag: int
    contents: bytes = field(repr=False)
    children: tuple[_Element, ...] = field(default=(), repr=False)


def open_envelope(envelope: bytes, key: RSAPrivateKey) -> bytes:
    """Open KMS's CiphertextForRecipient: a CMS EnvelopedData (RFC 5652 section 6) of at most 6144
    bytes.

    Tolerant of form (definite or indefinite lengths, content primitive or in chunks, as KMS and
    LocalStack write them), strict of content: one recipient, RSAES-OAEP with SHA-256 and
    MGF1-SHA-256, AES-256-CBC, nothing behind. Returns the plaintext of 1 to 4096 bytes; raises
    EnvelopeError, with one message for a wrong key and a wrong padding, and ValueError for a key
    that is not RSA-2048 with exponent 65537. The envelope carries no integrity of its own: TLS must
    have authenticated who sent it.
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
    if (
        tag in {0x00, 0x20} or tag & 0x1F == 0x1F
    ):  # end-of-contents where none belongs; a tag of several octets
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
    """The elements up to `limit`, or up to the end-of-contents octets when the length is
    indefinite.
    """
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
            f"{what} has tag {element.tag:#04x} and {len(element.children)} elements, expected "
            f"{tag:#04x} and {count}"
        )
    return element.children


def _contents(element: _Element, tag: int, what: str, length: int | None = None) -> bytes:
    """The contents of a primitive element; exactly this tag and this length."""
    if element.tag != tag or length not in {None, len(element.contents)}:
        size = "" if length is None else f" and {length}"
        raise EnvelopeError(
            f"{what} has tag {element.tag:#04x} and {len(element.contents)} bytes, expected "
            f"{tag:#04x}{size}"
        )
    return element.contents


def _expect(found: bytes, expected: bytes, what: str) -> None:
    if found != expected:
        raise EnvelopeError(f"{what} is {found.hex()}, expected {expected.hex()}")


def _parse_enveloped_data(
    content_info: _Element, key_identifier: bytes
) -> tuple[bytes, bytes, bytes]:
    """Encrypted key, initialisation vector and encrypted content (RFC 5652 sections 3 and 6.1)."""
    content_type, explicit = _children(content_info, _SEQUENCE, 2, "content info")
    _expect(_contents(content_type, _OID, "content type"), _ENVELOPED_DATA, "content type")
    (enveloped,) = _children(explicit, _CONTEXT_0_CONSTRUCTED, 1, "content")
    # three elements: neither originatorInfo nor unprotectedAttrs
    version, recipients, content = _children(enveloped, _SEQUENCE, 3, "enveloped data")
    (recipient,) = _children(recipients, _SET, 1, "recipient infos")
    encrypted_key = _parse_recipient(
        recipient, _contents(version, _INTEGER, "version"), key_identifier
    )
    return encrypted_key, *_parse_encrypted_content(content)


def _parse_recipient(recipient: _Element, data_version: bytes, key_identifier: bytes) -> bytes:
    """The encrypted key of a KeyTransRecipientInfo (RFC 5652 section 6.2.1), which must be meant
    for our key.
    """
    version, identifier, algorithm, encrypted_key = _children(
        recipient, _SEQUENCE, 4, "recipient info"
    )
    if (
        identifier.tag == _CONTEXT_0
    ):  # subjectKeyIdentifier: KMS writes the SHA-256 of our SubjectPublicKeyInfo
        expected_version = b"\x02"
        _expect(identifier.contents, key_identifier, "subject key identifier")
    # issuerAndSerialNumber: LocalStack writes a made-up one, there is nothing to compare it with
    else:
        expected_version = b"\x00"
        _, serial = _children(identifier, _SEQUENCE, 2, "recipient identifier")
        _contents(serial, _INTEGER, "serial number")
    _expect(data_version, expected_version, "version of the enveloped data")
    _expect(
        _contents(version, _INTEGER, "recipient version"),
        expected_version,
        "version of the recipient info",
    )
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
    """Initialisation vector and ciphertext of an EncryptedContentInfo (RFC 5652 section 6.1, RFC
    3565).
    """
    content_type, algorithm, encrypted = _children(content, _SEQUENCE, 3, "encrypted content info")
    _expect(_contents(content_type, _OID, "inner content type"), _DATA, "inner content type")
    cipher, iv = _children(algorithm, _SEQUENCE, 2, "content encryption algorithm")
    _expect(_contents(cipher, _OID, "cipher"), _AES256_CBC, "content encryption algorithm")
    if encrypted.tag == _CONTEXT_0_CONSTRUCTED:
        ciphertext = b"".join(
            _contents(chunk, _OCTETS, "content chunk") for chunk in encrypted.children
        )
    else:
        ciphertext = _contents(encrypted, _CONTEXT_0, "encrypted content")
    if not ciphertext or len(ciphertext) % 16:
        raise EnvelopeError(
            f"encrypted content is {len(ciphertext)} bytes long, not whole blocks of 16"
        )
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
    """Decrypt and unpad (RFC 5652 section 6.3); a missing key and a wrong padding end alike, so
    there is no oracle.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    decryptor = Cipher(algorithms.AES256(content_key or bytes(32)), modes.CBC(iv)).decryptor()
    padded = bytearray(len(ciphertext) + 15)  # update_into wants room for a block less a byte
    try:
        length = decryptor.update_into(ciphertext, padded)
        count = padded[length - 1]
        if (
            content_key is None
            or not 1 <= count <= 16
            or padded[length - count : length] != bytes([count]) * count
        ):
            raise EnvelopeError("it does not open with this enclave's key")
        if not 0 < length - count <= PLAINTEXT_MAX:
            raise EnvelopeError(f"it holds {length - count} bytes, KMS sends 1 to {PLAINTEXT_MAX}")
        return bytes(memoryview(padded)[: length - count])
    finally:
        padded[:] = bytes(len(padded))  # the one copy that is ours to wipe


def _key_identifier(key: RSAPrivateKey) -> bytes:
    import hashlib

    return hashlib.sha256(_public_key_info(key)).digest()


def _public_key_info(key: RSAPrivateKey) -> bytes:
    """The DER SubjectPublicKeyInfo, 294 bytes: what KMS takes from the attestation document.

    Written here because the serialisation module would cost 10 ms and 2.5 MiB of enclave memory for
    a constant.
    """
    numbers = key.public_key().public_numbers()
    if key.key_size != 2048 or numbers.e != 65537:
        raise ValueError(
            f"recipient key has {key.key_size} bits and exponent {numbers.e}, expected 2048 and "
            "65537"
        )
    return _RSA_2048_HEAD + numbers.n.to_bytes(256) + _RSA_2048_TAIL


# ----------------------------------------------- the recipient: a KMS client and two event handlers


class Recipient:
    """This process's RSA-2048 key pair, and the attestation document that carries its public key.

    Key and document are made in a thread, beside whatever the caller does (importing the SDK takes
    as long). The private key stays in this object. Thread-safe; errors of the module are raised as
    ModuleError where it is used.
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

    def wait(self) -> None:
        """Return when the key is made, or cannot be."""
        self._key.exception()

    def wait_for_module(self, timeout: float) -> None:
        """Return once the module has answered; it comes before credentials and network."""
        try:
            self._answered.result(timeout)
        except FutureTimeoutError:
            raise ModuleError(
                f"the Nitro Secure Module does not answer within {timeout:g} seconds"
            ) from None

    def document(self) -> bytes:
        """An attestation document for our public key, not older than a minute."""
        return self._fresh_document(self._key.result())

    @property
    def last_document(self) -> bytes:
        """The document that was asked for last, however old; empty before the first."""
        return self._document

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
            log.info(
                "kernel's random pool was not initialised: credited with the module's randomness"
            )
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._fresh_document(key)
        return key

    def _fresh_document(self, key: RSAPrivateKey) -> bytes:
        with self._lock:
            if time.monotonic() - self._asked >= DOCUMENT_FRESH:
                asked = time.monotonic()
                self._document = _with_module(
                    lambda module: module.attest(public_key=_public_key_info(key))
                )
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
            hint = (
                "this does not look like a Nitro Enclave: the module's device is there only "
                "inside one"
            )
            raise ModuleError(f"no Nitro Secure Module: {error}", hint) from error
        raise ModuleError(f"the Nitro Secure Module refused: {error}") from error


def _in_background(make: Callable[[], _T]) -> Future[_T]:
    """Run `make` in a daemon thread: a signal or a deadline ends the process without waiting for
    it.
    """
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


def _let_the_key_be_made() -> None:
    """Wait for the thread: a fork, or the interpreter's end, amid its imports and native code
    leaves wreckage.
    """
    if _processes_recipient is not None:
        _processes_recipient.wait()


os.register_at_fork(before=_let_the_key_be_made, after_in_child=_forget_recipient)
atexit.register(_let_the_key_be_made)


def attested(client_or_session: _T) -> _T:
    """Make a KMS client, or every KMS client that a session makes from now on, decrypt for this
    enclave only.

        kms = attestor.attested(boto3.client("kms"))
        kms.decrypt(CiphertextBlob=blob, EncryptionContext={"node": "3"})["Plaintext"]

    Takes a boto3 or botocore session, or a client of either, and returns it; may be called twice.
    The five operations that have a Recipient (Decrypt, GenerateDataKey, GenerateDataKeyPair,
    GenerateRandom, DeriveSharedSecret) then send the attestation document, and answer with the
    unwrapped secret in the member where it always is. Raises InputError for an endpoint without
    https, a client made with verify=False or a call with a Recipient of its own, ModuleError
    without a Nitro Secure Module, and NotAuthenticError for an answer without an envelope or from
    another key.
    """
    subject: Any = client_or_session
    if hasattr(subject, "meta"):
        if subject.meta.service_model.service_name != "kms":
            raise InputError(
                f"a client of {subject.meta.service_model.service_name} cannot be attested, only "
                "KMS's"
            )
        _require_authenticated(subject._endpoint)
        events = subject.meta.events
    else:
        events = getattr(subject, "events", subject)  # boto3's session has them, botocore's is one
    if not hasattr(events, "register"):
        raise InputError(
            f"{type(subject).__name__} is neither a client nor a session of boto3 or botocore"
        )
    process_recipient()
    events.register("creating-client-class.kms", _add_client_check, unique_id="attestor-client")
    events.register("before-parameter-build.kms", _add_recipient, unique_id="attestor-recipient")
    events.register("before-call.kms", _require_https, unique_id="attestor-https")
    events.register("after-call.kms", _unwrap_answer, unique_id="attestor-unwrap")
    return client_or_session


class _AuthenticatedClient:
    """First base of a session's KMS clients: refuses to be made where nobody checks who answers."""

    def __init__(
        self, serializer: object, endpoint: object, *args: object, **kwargs: object
    ) -> None:
        _require_authenticated(endpoint)
        super().__init__(serializer, endpoint, *args, **kwargs)  # type: ignore[call-arg]  # botocore's BaseClient


def _add_client_check(base_classes: list[type], **_: object) -> None:
    base_classes.insert(0, _AuthenticatedClient)


def _require_authenticated(endpoint: Any) -> None:
    """Whoever has seen the document can encrypt to its key: only TLS tells KMS's answer from the
    parent's.
    """
    if not endpoint.host.lower().startswith("https://"):
        raise InputError(
            f"endpoint {endpoint.host} is not https", "TLS is what authenticates the answer of KMS"
        )
    if not endpoint.http_session._verify:
        raise InputError(
            "the client was made with verify=False", "TLS is what authenticates the answer of KMS"
        )
    if endpoint.http_session._proxy_config.settings.get("proxy_use_forwarding_for_https"):
        raise InputError(
            "the client lets its proxy end TLS", "TLS is what authenticates the answer of KMS"
        )


def _require_https(params: Mapping[str, Any], **_: object) -> None:
    if not params["url"].lower().startswith("https://"):
        raise InputError("endpoint is not https", "TLS is what authenticates the answer of KMS")


def _add_recipient(
    params: dict[str, Any], model: Any, context: dict[str, Any], **_: object
) -> None:
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
        raise UnreachableError(
            f"answer of KMS is cut short: {len(http_response.content)} of {announced} bytes"
        )
    member = _SECRET_MEMBER[model.name]
    if parsed.get(member):
        raise NotAuthenticError(f"answer of KMS has a {member} in the clear")
    if not parsed.get("CiphertextForRecipient"):
        raise NotAuthenticError(
            "answer of KMS has no CiphertextForRecipient", "is this endpoint AWS KMS?"
        )
    asked = context["attestor_key_id"]
    if asked and not is_same_key(asked, str(parsed.get("KeyId"))):
        raise NotAuthenticError(
            f"answer of KMS is from key {parsed.get('KeyId')}, asked for {asked}"
        )
    parsed[member] = process_recipient().open(parsed.pop("CiphertextForRecipient"))


def is_same_key(asked: str, answered: str) -> bool:
    """Whether the ARN in an answer is the key asked for; an alias names no key, so it cannot be
    compared.
    """
    if not is_pinned(asked):
        return True
    return asked == answered or answered.endswith(f":key/{asked}")


def is_pinned(key_id: str | None) -> bool:
    """Whether this names one key: an ARN or an id does, an alias does not (the parent's account
    resolves it).
    """
    return key_id is not None and "alias/" not in key_id


# --------------------------------------------------------------------------------------- edges: KMS


@dataclass(frozen=True, slots=True)
class Kms:
    """KMS as one command meets it; `timeout` is in seconds for a whole call, retries included.

    `vsock` and `imds_vsock` are (CID, port) pairs that carry the connections to KMS and to the
    metadata service.
    """

    region: str
    endpoint_url: str | None
    timeout: float
    vsock: tuple[int, int] | None = None
    imds_vsock: tuple[int, int] | None = None
    ca_bundle: str | None = None

    def call(self, operation: str, **parameters: object) -> dict[str, Any]:
        """Call an operation ("decrypt") of the attested client; raises only errors of ours."""
        recipient = process_recipient()
        import botocore.config
        import botocore.session

        deadline = time.monotonic() + self.timeout
        recipient.wait_for_module(self.timeout)
        left = deadline - time.monotonic()
        return within(
            left,
            lambda: self._call(botocore.session.Session(), operation, parameters),
            self.timeout,
        )

    def call_plainly(self, operation: str, **parameters: object) -> dict[str, Any]:
        """The same without a Recipient, for an operation that has none."""
        import botocore.session

        session = botocore.session.Session()
        return within(
            self.timeout, lambda: self._call(session, operation, parameters, attest=False)
        )

    def _call(
        self, session: Any, operation: str, parameters: Mapping[str, object], *, attest: bool = True
    ) -> dict[str, Any]:
        client = self.ready_client(session)
        with translated(session, operation, parameters):
            answer: dict[str, Any] = getattr(attested(client) if attest else client, operation)(
                **parameters
            )
        log.info("KMS answered request %s", answer.get("ResponseMetadata", {}).get("RequestId"))
        return answer

    def ready_client(self, session: Any, connections: int = 10) -> Any:
        """A client of a new botocore session that has credentials; not yet attested."""
        self.prepare(session)
        check_credentials(session)
        return self.client(session, connections)

    def prepare(self, session: Any) -> None:
        """Let a new session load its data and find its credentials in our way."""
        session.register_component("data_loader", _loader())
        if self.imds_vsock:
            from injection.vsock import carry_metadata

            carry_metadata(session, self.imds_vsock)

    def client(self, session: Any, connections: int = 10) -> Any:
        """A client that keeps so many connections at most; whatever keeps it from being made is
        configuration.
        """
        from urllib.parse import urlsplit

        from botocore.config import Config

        attempt = min(ATTEMPT_TIMEOUT, self.timeout)
        with _configuring():
            client = session.create_client(
                "kms",
                region_name=self.region,
                endpoint_url=self.endpoint_url,
                verify=self.ca_bundle,
                config=Config(
                    connect_timeout=attempt, read_timeout=attempt, max_pool_connections=connections
                ),
            )
            urlsplit(client.meta.endpoint_url).port  # noqa: B018 - a ValueError for one that cannot be
        if self.vsock:
            from injection.vsock import carry

            carry(client, self.vsock)
        log.info("KMS at %s", client.meta.endpoint_url)
        _require_authenticated(client._endpoint)
        return client


def check_credentials(session: Any) -> None:
    """Have the session find its credentials now.

    They are the parent's choice: hostile, and never repeated.
    """
    from botocore import exceptions as sdk

    try:
        credentials = session.get_credentials()
        found = credentials.get_frozen_credentials() if credentials else None
    except (sdk.MetadataRetrievalError, sdk.ConnectionError, sdk.HTTPClientError) as error:
        raise UnreachableError(f"AWS credentials cannot be fetched: {error}") from error
    except Exception as error:
        expired = "still expired" in str(error)
        told = expired or isinstance(error, sdk.BotoCoreError | sdk.ClientError)
        reason = str(error) if told else f"they cannot be read ({type(error).__name__})"
        hint = "they are expired: renew them" if expired else _CREDENTIALS_HINT
        raise _redacted(
            RefusedError(f"no valid AWS credentials: {reason}", hint), session
        ) from error
    if found is None:
        raise RefusedError("no valid AWS credentials: there are none", _CREDENTIALS_HINT)
    for value in (found.access_key, found.secret_key, found.token):
        if value is not None and not (
            isinstance(value, str) and value.isascii() and value.isprintable()
        ):
            raise RefusedError(
                "no valid AWS credentials: they hold what no credentials hold", _CREDENTIALS_HINT
            )


_CREDENTIALS_HINT: Final = (
    "in an enclave the parent must pass them on, and renew them when they expire"
)


@contextlib.contextmanager
def _configuring() -> Iterator[None]:
    """Let only InputError out of the making of a client, and RefusedError where a profile has no
    credentials.
    """
    from botocore import exceptions as sdk

    try:
        yield
    except (
        sdk.ProfileNotFound,
        sdk.PartialCredentialsError,
        sdk.CredentialRetrievalError,
    ) as error:
        raise RefusedError(f"no valid AWS credentials: {error}", _CREDENTIALS_HINT) from error
    except Exception as error:
        reason = (
            str(error)
            if isinstance(error, sdk.BotoCoreError | ValueError)
            else type(error).__name__
        )
        raise InputError(
            f"client of KMS cannot be made: {reason}", "environment or configuration is wrong"
        ) from error


def within(timeout: float, work: Callable[[], _T], told: float | None = None) -> _T:
    """What `work` gives, if it does so in time; `told` is the time that the user gave."""
    try:
        return _in_background(work).result(timeout)
    except FutureTimeoutError:
        raise UnreachableError(f"no answer of KMS within {told or timeout:g} seconds") from None


@contextlib.contextmanager
def translated(
    session: Any, operation: str, parameters: Mapping[str, object] | None = None
) -> Iterator[None]:
    """Let only errors of ours out of a call of this operation, and no credentials of the session in
    them.
    """
    try:
        yield
    except AttestorError:
        raise
    except Exception as error:
        ours = _translate(error, operation)
        if ours is None:
            raise
        if isinstance(ours, RefusedError) and hasattr(error, "response"):
            ours = _explained(ours, error, parameters or {})
        raise _redacted(ours, session) from error


def _explained(refused: RefusedError, error: Any, parameters: Mapping[str, Any]) -> RefusedError:
    """KMS's refusal of a call with these parameters, what was sent, and the likeliest causes."""
    from datetime import UTC, datetime

    from nsm.refusal import Refusal, clock_skew, explain

    answer, metadata = error.response.get("Error", {}), error.response.get("ResponseMetadata", {})
    refusal = Refusal(
        code=str(answer.get("Code")),
        message=str(answer.get("Message") or ""),
        document=process_recipient().last_document
        if error.operation_name in _SECRET_MEMBER
        else None,
        key_id=parameters.get("KeyId"),
        context=tuple(parameters.get("EncryptionContext") or ()),
        skew=clock_skew(metadata.get("HTTPHeaders", {}).get("date"), datetime.now(UTC)),
    )
    notes, hints = explain(refusal)
    explained = RefusedError(str(refused), *hints)
    explained.notes = notes
    return explained


def _loader() -> Any:
    """The SDK's loader of its own data, in half the time and memory.

    It neither walks over some 400 folders to list the services, nor makes an OrderedDict of each
    object in the megabyte of endpoints: a dict keeps its order as well. A search path of the
    environment is not followed.
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
    services = "kms s3 sts sso sso-oidc signin".split()
    loader.list_available_services = lambda type_name: services  # noqa: ARG005
    return loader


def _translate(error: Exception, operation: str) -> AttestorError | None:  # noqa: PLR0911 - a table, as match
    """The SDK's exception as ours; None for one that we do not know: a bug."""
    from botocore import exceptions as sdk

    match error:
        case sdk.ClientError():
            return _translate_answer(error, operation)
        case sdk.SSLError():
            return _translate_tls(error)
        case (
            sdk.ConnectionError()
            | sdk.HTTPClientError()
            | sdk.IncompleteReadError()
            | sdk.MetadataRetrievalError()
        ):
            return UnreachableError(f"KMS cannot be reached: {error}")
        case (
            sdk.NoCredentialsError()
            | sdk.PartialCredentialsError()
            | sdk.CredentialRetrievalError()
        ):
            return RefusedError(f"no valid AWS credentials: {error}", _CREDENTIALS_HINT)
        case sdk.ParamValidationError():
            return InputError("KMS would not take these parameters: a length or a type is wrong")
        case RuntimeError() if "still expired" in str(
            error
        ):  # botocore.credentials, of what it was given
            return RefusedError(
                f"no valid AWS credentials: {error}", "they are expired: renew them"
            )
        case sdk.BotoCoreError():
            return RefusedError(f"KMS cannot be called: {error}")
        case ValueError() | TypeError() | AttributeError() | LookupError():
            return NotAuthenticError(f"answer of KMS cannot be read ({type(error).__name__})")
        case _:
            return None


def _translate_answer(error: Any, operation: str) -> AttestorError:
    """An error that KMS answered with: its code, its message and its request id, always."""
    answer = error.response.get("Error", {})
    metadata = error.response.get("ResponseMetadata", {})
    code, message = str(answer.get("Code") or "unknown error"), str(answer.get("Message") or "")
    said = (
        ": ".join(filter(None, (code, message)))
        + f" (request id {metadata.get('RequestId') or 'none'})"
    )
    if code in _TRANSIENT or metadata.get("HTTPStatusCode", 0) >= 500:
        return UnreachableError(f"KMS cannot answer now: {said}")
    return RefusedError(f"KMS refused to {operation.replace('_', ' ')}: {said}")


def _translate_tls(error: Exception) -> AttestorError:
    import ssl

    from urllib3.util.ssl_match_hostname import (
        CertificateError,
    )  # a wrong name, found by urllib3 and not by ssl

    found = list(causes(error))
    if any(isinstance(cause, ssl.SSLCertVerificationError | CertificateError) for cause in found):
        return NotAuthenticError(
            f"certificate of KMS is not valid: {error}",
            "somebody may be in the middle; AWS_CA_BUNDLE names the roots to trust",
        )
    unreadable = FileNotFoundError | PermissionError | IsADirectoryError
    if any(isinstance(cause, unreadable) or _is_no_bundle(cause) for cause in found):
        return InputError(
            f"CA bundle cannot be read: {error}",
            "AWS_CA_BUNDLE or ca_bundle in the configuration names it",
        )
    return UnreachableError(f"no TLS with KMS: {error}")


def _is_no_bundle(cause: BaseException) -> bool:
    """OpenSSL found no certificate where it was told to look for roots."""
    return getattr(cause, "library", None) == "X509"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it was raised from, also where libraries hand it on as an argument."""
    while error is not None:
        yield error
        inner = getattr(error, "kwargs", {}).get("error") or next(
            (argument for argument in error.args if isinstance(argument, BaseException)), None
        )
        error = inner or error.__cause__ or error.__context__


def _redacted(error: AttestorError, session: Any) -> AttestorError:
    """The error without the credentials: signature errors of AWS may echo the request that was
    signed.
    """
    credentials = session._credentials
    if credentials is None:
        return error
    message = str(error)
    for name, secret in vars(credentials).items():  # as properties they might be refreshed
        if secret and isinstance(secret, str) and name.strip("_") in {"secret_key", "token"}:
            message = message.replace(secret, "[redacted]").replace(
                repr(secret)[1:-1], "[redacted]"
            )
    redacted = type(error)(message, *error.hints)
    redacted.notes = error.notes
    return redacted


# ------------------------------------------------------------------------- edges: files and streams


class Readable(Protocol):
    """What can be read from: at most so many bytes, fewer only at the end."""

    def read(self, size: int = -1, /) -> bytes:
        """As of any binary stream."""
        ...


class Message:
    """A stream that starts as a message of the AWS Encryption SDK does: its head, which was read,
    and the rest.
    """

    def __init__(self, head: bytes, rest: Readable) -> None:
        self._head, self._rest = head, rest

    def read(self, size: int = -1) -> bytes:
        """As of any stream: exactly so many bytes, fewer at the end; raises InputError."""
        head = self._head if size < 0 else self._head[:size]
        self._head = self._head[len(head) :]
        try:
            return head + self._rest.read(size if size < 0 else size - len(head))
        except OSError as error:
            raise InputError(f"message cannot be read: {error.strerror}") from error


def is_message(head: bytes) -> bool:
    """Whether these are the first bytes of a message of the AWS Encryption SDK, formats 1 and 2.

    Version 1 has a type (0x80) and then the algorithm, version 2 the algorithm (AWS Encryption SDK
    message format reference); a symmetric CiphertextBlob starts with 01 02.
    """
    return head[:2] == b"\x01\x80" or head[:3] in {b"\x02\x04\x78", b"\x02\x05\x78"}


def read_ciphertext(path: str, *, base64_text: bool, message: bool = False) -> bytes | Message:
    """Read a CiphertextBlob, 1 to 6144 bytes, from a file or ("-") from standard input.

    With `message`, a message of the AWS Encryption SDK is returned as the open stream that it is.
    """
    what = "standard input" if path == "-" else path
    head, rest = read_head(
        path, (2 * CIPHERTEXT_MAX if base64_text else CIPHERTEXT_MAX) + 1, f"ciphertext {what}"
    )
    if message and not base64_text and is_message(head):
        return Message(head, rest)
    rest.close()
    return check_ciphertext(head, what, base64_text=base64_text)


def check_ciphertext(data: bytes, what: str, *, base64_text: bool) -> bytes:
    """The CiphertextBlob that was read as bytes or as base64 text; raises InputError."""
    if not data.strip():
        raise InputError(f"ciphertext {what} is empty")
    if base64_text and len(data) > 2 * CIPHERTEXT_MAX:
        raise InputError(
            f"ciphertext {what} is longer than the {CIPHERTEXT_MAX} bytes that KMS takes"
        )
    if base64_text:
        data = _decode_base64(data, what)
    elif _BASE64.fullmatch(data.rstrip()):
        raise InputError(
            f"ciphertext {what} is base64 text, not the bytes it stands for", "add --base64"
        )
    if len(data) > CIPHERTEXT_MAX:
        raise InputError(
            f"ciphertext {what} is longer than the {CIPHERTEXT_MAX} bytes that KMS takes"
        )
    return data


def read_bounded(path: str, limit: int, what: str) -> bytes:
    """At most so many bytes of a file or ("-") of standard input; raises InputError, which says
    `what` it is.
    """
    head, source = read_head(path, limit, what)
    source.close()
    return head


def read_head(path: str, limit: int, what: str) -> tuple[bytes, IO[bytes]]:
    """The first bytes, and the stream behind them, which stays open while somebody holds it."""
    try:
        descriptor = 0 if path == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        source = open(descriptor, "rb", closefd=path != "-")  # noqa: SIM115 - the caller reads on
        head: bytes | None = source.read(limit)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise InputError(f"{what} cannot be read: {reason}") from error
    if head is None:
        raise InputError(f"{what} cannot be read: it would block")
    return head, source


def _decode_base64(text: bytes, what: str) -> bytes:
    import base64

    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except ValueError as error:
        raise InputError(f"ciphertext {what} is not base64 text") from error


class Signals:
    """SIGINT, SIGTERM and SIGHUP as an exception, up to the point of no return: behind it they come
    too late.
    """

    late = False

    def install(self) -> None:
        """Take over these signals, unless whoever started us has them ignored."""
        import signal

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._interrupt)
        self.late = False

    def point_of_no_return(self) -> None:
        """From here on the process ends with its result; handlers run in this thread, so there is
        no window.
        """
        self.late = True

    def _interrupt(self, number: int, _frame: FrameType | None) -> None:
        if not self.late:
            self.late = True  # while this one is unwound, another must not stop the cleaning up
            raise Interrupted(number)


signals = Signals()


class Target(Protocol):
    """Where a secret goes.

    Entering checks what can be checked; leaving without `write` leaves nothing.
    """

    def write(self, secret: bytes) -> None:
        """Put the secret in its place, whole or not at all; raises OutputError."""
        ...

    def append(self, data: bytes) -> None:
        """Write more of it, without the name yet; raises OutputError."""
        ...

    def seal(self) -> None:
        """Make what was appended durable; raises OutputError."""
        ...

    def place(self) -> None:
        """Put what was appended in its place; raises OutputError."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
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
            raise InputError(
                "refusing to write a secret to a terminal", "name a file, or pipe it into a program"
            )
        self._held: list[bytes] = []

    def write(self, secret: bytes) -> None:
        """Write all of it; a reader that went away is an error."""
        view = memoryview(secret)
        try:
            while view:
                view = view[os.write(1, view) :]
        except OSError as error:
            raise OutputError(f"standard output cannot be written: {error.strerror}") from error

    def append(self, data: bytes) -> None:
        """Hold it in memory: nothing may come out before all of it is known to be authentic."""
        self._held.append(data)

    def seal(self) -> None:
        """A stream is not synced."""

    def place(self) -> None:
        """Write what was held."""
        for data in self._held:
            self.write(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


class SecretFile:
    """A file that is absent or complete at any moment, durable when it is there; mode 0600 until it
    is complete.

    An unnamed file (O_TMPFILE) gets its name by linkat when it is written and synced: until then
    even SIGKILL leaves nothing. A file system without them, or a missing /proc, gets a temporary
    name in the same folder instead. The folder is held open, so that nobody can swap it in between;
    a symbolic link as the target is never followed. Leaving with an error takes back what was
    placed; what it replaced comes back too if it was kept. SIGKILL amid a replacement may leave a
    second name of the old file, never a part of the new one.
    """

    def __init__(
        self, path: str, *, force: bool, mode: int = 0o600, owner: tuple[int, int] = (-1, -1)
    ) -> None:
        self._path = path
        self._force = force
        self._mode, self._owner = mode, owner
        folder, self._name = os.path.split(path)
        self._temporary: str | None = None
        self._kept: str | None = None
        self._file = self._old = -1
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
        self.append(secret)
        self.seal()
        signals.point_of_no_return()
        self.place(keep=True)
        self.settle()

    def append(self, data: bytes) -> None:
        """Write more of it; it has no name yet."""
        try:
            if self._file < 0:
                self._file = self._open(self._new_name(), os.O_CREAT | os.O_EXCL)
            view = memoryview(data)
            while view:
                view = view[os.write(self._file, view) :]
        except OSError as error:
            raise self._failed(error) from error

    def seal(self) -> None:
        """Give the complete file its owner and mode, and make its contents durable."""
        try:
            if self._owner != (-1, -1):
                os.fchown(self._file, *self._owner)
            os.fchmod(self._file, self._mode)  # the umask may have taken bits away
            os.fsync(self._file)
        except OSError as error:
            raise self._failed(error) from error

    def place(self, *, keep: bool = False) -> None:
        """Give the file its name, durably; `keep` what it replaces, for `take_back`, until
        `settle`.
        """
        try:
            if keep and self._force:
                self._keep()
            self._place()
            os.fsync(self._folder)
        except OSError as error:
            self.take_back()
            raise self._failed(error) from error

    def _place(self) -> None:
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

    def _keep(self) -> None:
        """Give what will be replaced a second name."""
        self._kept = _random_name()
        try:
            os.link(
                self._name,
                self._kept,
                src_dir_fd=self._folder,
                dst_dir_fd=self._folder,
                follow_symlinks=False,
            )
        except FileNotFoundError:  # there is nothing to replace
            self._kept = None

    def settle(self) -> None:
        """Let go of what was replaced; until exec or the end its contents stay at hand for
        `take_back`.
        """
        if self._kept is not None:
            with contextlib.suppress(OSError):  # ELOOP: a symbolic link
                self._old = os.open(
                    self._kept, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._folder
                )
            with contextlib.suppress(OSError):
                os.unlink(self._kept, dir_fd=self._folder)
            self._kept = None

    def take_back(self) -> None:
        """Remove the placed file, or put back what it replaced; what somebody else put there
        meanwhile stays.
        """
        with contextlib.suppress(OSError):
            if self._is_placed() and self._old >= 0:
                self._kept = self._copy_of_old()
            if self._is_placed() and self._kept is not None:
                os.rename(self._kept, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
                self._kept = None
            elif self._is_placed():
                os.unlink(self._name, dir_fd=self._folder)
        self.settle()

    def _copy_of_old(self) -> str:
        """The name of a file that is what was replaced: contents, mode and owner."""
        status, name = os.fstat(self._old), _random_name()
        copy = self._open(name, os.O_CREAT | os.O_EXCL)
        try:
            while os.sendfile(copy, self._old, None, 1 << 30):
                pass
            os.fchown(copy, status.st_uid, status.st_gid)
            os.fchmod(copy, status.st_mode & 0o7777)
            os.fsync(copy)
        finally:
            os.close(copy)
        return name

    def _is_placed(self) -> bool:
        if self._file < 0:
            return False
        placed = os.stat(self._name, dir_fd=self._folder, follow_symlinks=False)
        return os.path.samestat(placed, os.fstat(self._file))

    def _link(self, name: str) -> None:
        # dst_dir_fd makes Python call linkat with AT_SYMLINK_FOLLOW, which is what open(2)
        # prescribes for O_TMPFILE
        os.link(f"/proc/self/fd/{self._file}", name, dst_dir_fd=self._folder, follow_symlinks=True)

    def _open(self, name: str, flags: int) -> int:
        return os.open(
            name, flags | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._folder
        )

    def _new_name(self) -> str:
        self._temporary = _random_name()
        return self._temporary

    def _failed(self, error: Exception) -> OutputError:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        return OutputError(f"{self._path} cannot be written: {reason}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.take_back()
        if self._temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary, dir_fd=self._folder)
        for descriptor in (self._file, self._old, self._folder):
            if descriptor >= 0:
                os.close(descriptor)


def _random_name() -> str:
    return f".attestor-{os.urandom(8).hex()}"


def _no_tmpfile_errors() -> frozenset[int]:
    import errno

    # open(2): EOPNOTSUPP by a file system without it, EISDIR and ENOENT by kernels and overlays
    # without it
    return frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL})


_NO_TMPFILE: Final = _no_tmpfile_errors()


# ----------------------------------------------------------------------------------------- commands


class _Cli(click.Group):
    """The one place where an error becomes a message and an exit status."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run a command and exit; see the module's docstring for the statuses."""
        signals.install()
        kwargs |= {"prog_name": "attestor", "standalone_mode": False}
        sys.exit(_status_of(lambda: super(_Cli, self).main(*args, **kwargs)))


def _status_of(command: Callable[[], Any]) -> int:
    """Run a command to its exit status; from its error on, a signal comes too late."""
    try:
        return int(command() or 0)
    except Interrupted as interrupted:
        return interrupted.status
    except Exception as error:  # noqa: BLE001 - every one becomes a message and a status
        signals.point_of_no_return()
        return _report(error)


def _report(error: Exception) -> int:
    """Say what went wrong, and return its exit status."""
    match error:
        case AttestorError():
            return _fail(error.status, str(error), *error.hints, notes=error.notes)
        case click.exceptions.NoArgsIsHelpError():
            with contextlib.suppress(OSError):
                click.echo(error.format_message(), err=True)
            return InputError.status
        case click.ClickException():
            message = error.format_message().rstrip(".")
            return _fail(
                InputError.status,
                message[:1].lower() + message[1:],
                "--help shows arguments and options",
            )
    # its message may hold anything: say only where it happened
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    file = os.path.basename(trace.tb_frame.f_code.co_filename) if trace else "nowhere"
    if (
        isinstance(error, OSError) and trace and trace.tb_frame.f_code is click.echo.__code__
    ):  # of a help text
        return _fail(OutputError.status, f"standard output cannot be written: {error.strerror}")
    where = f"{file}:{trace.tb_lineno}" if trace else file
    return _fail(
        1,
        f"unexpected {type(error).__name__} at {where}",
        "this is a bug in attestor: please report it",
    )


def _fail(status: int, message: str, *hints: str, notes: Sequence[str] = ()) -> int:
    _say("error", message)
    for note in notes:
        _say("note", note)
    for hint in hints[:2]:
        _say("hint", hint)
    return status


def _say(kind: str, message: str) -> None:
    """One line on stderr; what a parent or a server put into it cannot add lines or steer a
    terminal.
    """
    line = "".join(character if character.isprintable() else " " for character in message)
    with contextlib.suppress(OSError):  # a log that is full or gone must not change what happens
        click.echo(f"attestor: {kind}: {line}", err=True)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _say("note", record.getMessage())


def _set_verbose(_context: click.Context, _option: click.Parameter, verbose: bool) -> None:
    """Let our own logger speak and no other: the SDK's loggers print requests and answers whole."""
    if verbose:
        log.handlers = [_Notes()]
        log.setLevel(logging.INFO)
        log.propagate = False


def _set_library(_context: click.Context, _option: click.Parameter, path: str | None) -> None:
    """Hand the library on to nsm, which looks for it in the environment."""
    if path == "":
        raise InputError("--nsm-library is empty")
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
    return parse_endpoint(url, "--endpoint-url")


def parse_endpoint(url: str | None, what: str) -> str | None:
    """The endpoint, which must be https; `what` names where it stands. Raises InputError."""
    if url is not None and not url.lower().startswith("https://"):
        raise InputError(f"{what} is not https", "TLS is what authenticates the answer of KMS")
    if url is not None and not _ENDPOINT.fullmatch(url):
        raise InputError(
            f"{what} {url} is no endpoint, such as https://kms.eu-west-1.amazonaws.com"
        )
    return url


def _vsock(
    _context: click.Context, _option: click.Parameter, text: str | None
) -> tuple[int, int] | None:
    if text is None:
        return None
    from injection.vsock import parse_address

    return parse_address(text)


def _encryption_context(
    _context: click.Context, _option: click.Parameter, pairs: Sequence[str]
) -> dict[str, str]:
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
    return parse_key_id(key_id, "--key-id")


def parse_key_id(key_id: str | None, what: str) -> str | None:
    """The key ARN, key id or alias; `what` names where it stands. Raises InputError."""
    if key_id is None or _KEY_ID.fullmatch(key_id) or _ALIAS.fullmatch(key_id):
        return key_id
    arn = _ARN.fullmatch(key_id)
    resource = arn[2] if arn else ""
    if not (
        (resource.startswith("key/") and _KEY_ID.fullmatch(resource[4:]))
        or _ALIAS.fullmatch(resource)
    ):
        raise InputError(f"{what} {key_id} is no key ARN, key id or alias")
    return key_id


def resolve_region(option: str | None, key_id: str | None, environment: Mapping[str, str]) -> str:
    """The region from the option, the environment or the key's ARN; there is no default, and they
    must agree.
    """
    arn = _ARN.fullmatch(key_id or "")
    if option == "":
        raise InputError("--region is empty")
    region = (
        option
        or environment.get("AWS_REGION")
        or environment.get("AWS_DEFAULT_REGION")
        or (arn and arn[1])
    )
    if not region:
        raise InputError("no region", "give --region, set AWS_REGION, or name the key by its ARN")
    if not _REGION.fullmatch(region):
        raise InputError(f"region {region} is not a region's name, such as eu-west-1")
    if arn and arn[1] != region:
        raise InputError(f"region is {region}, the key ARN is in {arn[1]}")
    return region


_MODULE_OPTIONS: Final = (
    click.option(
        "--nsm-library",
        metavar="FILE",
        callback=_set_library,
        expose_value=False,
        help="patched libnsm.so, which must work  [env: NSM_LIBRARY]",
    ),
    click.option(
        "-v",
        "--verbose",
        is_flag=True,
        callback=_set_verbose,
        expose_value=False,
        help="say on stderr what is done",
    ),
)
_KMS_OPTIONS: Final = (
    click.option(
        "--region",
        metavar="REGION",
        help="AWS region of the key  [env: AWS_REGION, AWS_DEFAULT_REGION]",
    ),
    click.option(
        "--key-id",
        metavar="KEY",
        callback=_key,
        help="key ARN or id that must answer (or an alias)",
    ),
    click.option("--any-key", is_flag=True, help="accept any key, and do not warn about it"),
    click.option(
        "--context",
        "encryption_context",
        metavar="NAME=VALUE",
        multiple=True,
        callback=_encryption_context,
        help="encryption context, repeatable",
    ),
    click.option(
        "--grant-token",
        "grant_tokens",
        metavar="TOKEN",
        multiple=True,
        help="grant token, repeatable",
    ),
    click.option(
        "--endpoint-url", metavar="URL", callback=_https, help="another endpoint, https only"
    ),
    click.option(
        "--timeout",
        metavar="SECONDS",
        default=f"{DEFAULT_TIMEOUT:g}",
        callback=_seconds,
        help=f"for the whole call, retries included  [default: {DEFAULT_TIMEOUT:g}]",
    ),
)
_VSOCK_OPTIONS: Final = (
    click.option(
        "--vsock",
        metavar="CID:PORT",
        callback=_vsock,
        help="reach KMS through the parent's vsock-proxy",
    ),
    click.option(
        "--imds-vsock",
        metavar="CID:PORT",
        callback=_vsock,
        help="reach the instance metadata service so, for credentials and region",
    ),
)
_NAMED_KMS_OPTIONS: Final = dict(
    zip(
        "region key_id any_key encryption_context grant_tokens endpoint_url timeout".split(),
        _KMS_OPTIONS,
        strict=True,
    )
)
_WITHOUT_KEY: Final = frozenset({"region", "endpoint_url", "timeout"})
_FORCE: Final = click.option("-f", "--force", is_flag=True, help="replace what exists")


def _options(
    options: Sequence[Callable[..., Any]],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command several options at once, in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(
    __version__, message="%(prog)s %(version)s", help="print the version and exit"
)
def cli() -> None:
    """Get KMS secrets into an AWS Nitro Enclave so that nobody outside it could have read them."""


@cli.command()
@click.argument("ciphertext")
@click.argument("output")
@_options(_KMS_OPTIONS)
@click.option("--algorithm", metavar="NAME", help=f"{', '.join(_ALGORITHMS)}  [default: the first]")
@click.option("--base64", "base64_text", is_flag=True, help="CIPHERTEXT is base64 text")
@click.option("--signed", is_flag=True, help="demand a signed message of the AWS Encryption SDK")
@click.option("-f", "--force", is_flag=True, help="replace OUTPUT if it exists")
@_options(_VSOCK_OPTIONS)
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
    vsock: tuple[int, int] | None,
    imds_vsock: tuple[int, int] | None,
    algorithm: str | None,
    base64_text: bool,
    signed: bool,
    force: bool,
) -> None:
    """Decrypt a KMS ciphertext inside this enclave and write the plaintext to a file.

    \b
    Examples:
      attestor decrypt --key-id arn:aws:kms:...:key/... secret.enc /run/secrets/db
      attestor decrypt --region eu-west-1 --any-key - - < secret.enc | consumer

    CIPHERTEXT is a file with the bytes of a CiphertextBlob, at most 6144, or with a message of the
    AWS Encryption SDK of any length; "-" reads standard input. OUTPUT is created with mode 0600 and
    is complete or absent at any moment; "-" writes to standard output.

    Exit status: 0 done, 1 bug, 2 usage, 3 no module, 4 KMS refused, 5 try again, 6 not authentic, 7
    output.
    """
    _check_key_options(key_id, any_key=any_key, algorithm=algorithm)
    kms = connect(key_id, region, endpoint_url, timeout, vsock, imds_vsock)
    blob = read_ciphertext(
        ciphertext, base64_text=base64_text, message=algorithm in {None, "SYMMETRIC_DEFAULT"}
    )
    if signed and not isinstance(blob, Message):
        raise InputError(
            "--signed wants a message of the AWS Encryption SDK: a CiphertextBlob has no signature"
        )
    with open_target(output, force=force) as target:
        warn_unless_pinned(key_id, any_key=any_key)
        if isinstance(blob, Message):
            from injection.esdk import decrypt_alone

            decrypt_alone(
                kms, blob, target, key_id, encryption_context, grant_tokens, signed=signed
            )
            return
        answer = kms.call(
            "decrypt",
            CiphertextBlob=blob,
            EncryptionContext=encryption_context,
            **given(KeyId=key_id, GrantTokens=list(grant_tokens), EncryptionAlgorithm=algorithm),
        )
        target.write(answer["Plaintext"])


def connect(
    key_id: str | None,
    region: str | None,
    endpoint_url: str | None,
    timeout: float,
    vsock: tuple[int, int] | None,
    imds_vsock: tuple[int, int] | None,
    ca_bundle: str | None = None,
) -> Kms:
    """KMS as the options name it; the metadata service is asked for the region only if nothing else
    says it.
    """
    if imds_vsock and not (
        region or _ARN.fullmatch(key_id or "") or os.environ.keys() & _REGION_VARIABLES
    ):
        from injection.metadata import region as region_of

        region = region_of(imds_vsock)
    return Kms(
        resolve_region(region, key_id, os.environ),
        endpoint_url,
        timeout,
        vsock,
        imds_vsock,
        ca_bundle,
    )


def warn_unless_pinned(key_id: str | None, *, any_key: bool) -> None:
    """Say that the parent may have chosen the key, unless one is pinned or that is meant."""
    if not (any_key or is_pinned(key_id)):
        _say(
            "warning",
            "no key is pinned: the parent may have chosen ciphertext and key; give --key-id or "
            "--any-key",
        )


def given(**parameters: object) -> dict[str, object]:
    """The parameters that were given: the SDK takes no None, and KMS no empty list."""
    return {name: value for name, value in parameters.items() if value}


def _check_key_options(key_id: str | None, *, any_key: bool, algorithm: str | None) -> None:
    if any_key and is_pinned(key_id):
        raise InputError(f"--any-key contradicts --key-id {key_id}", "leave one of them out")
    if algorithm is not None and algorithm not in _ALGORITHMS:
        raise InputError(f"--algorithm {algorithm} is none of {', '.join(_ALGORITHMS)}")
    if algorithm not in {None, "SYMMETRIC_DEFAULT"} and key_id is None:
        raise InputError(
            f"--algorithm {algorithm} needs --key-id: an asymmetric ciphertext does not name its "
            "key"
        )


# --------------------------------------------------------- commands: evidence, key policies, doctor

_FILE_MAX: Final = 256 << 10  # of documents, policies, measurements and certificates
_UNDETERMINED: Final = 8  # exit status of policy explain, and no error

_DOCUMENT_HINTS: Final = {
    "format": "a document is binary, as attestor attest writes it: decode base64 text first",
    "root": "--root FILE trusts another root; nitrosim's is in $NITROSIM_NSM_ROOT",
    "validity": (
        "a document is valid for three hours: --at document verifies it at its own "
        "timestamp, --at TIME then"
    ),
    "debug_mode": "--allow-debug accepts it, for tests",
    "pcrs": "another image, kernel or instance: compare with what nitro-cli build-enclave printed",
}
_FIELD_OPTIONS: Final = (
    click.option("--nonce", metavar="VALUE", help="hexadecimal, or @FILE"),
    click.option("--user-data", metavar="VALUE", help="hexadecimal, or @FILE"),
    click.option("--public-key", metavar="VALUE", help="hexadecimal, or @FILE"),
)
_ROOT_OPTION: Final = click.option(
    "--root",
    metavar="FILE",
    help="certificate to trust, PEM or DER  [default: AWS Nitro Enclaves root G1]",
)
_JSON_OPTION: Final = click.option(
    "--json", "as_json", is_flag=True, help="print JSON, as the README describes it"
)
_BASE64_OPTION: Final = click.option(
    "--base64", "in_base64", is_flag=True, help="show PCRs in base64, as CloudTrail does"
)
_PCR_OPTION: Final = click.option(
    "--pcr",
    "pcrs",
    metavar="N=HEX",
    multiple=True,
    help="value of a PCR (base64 is taken too), repeatable",
)


@contextlib.contextmanager
def _evidence_errors() -> Iterator[None]:
    """Errors about documents, policies and their options as ours."""
    from nsm.arguments import ArgumentError
    from nsm.document import DocumentError
    from nsm.policy import PolicyError

    try:
        yield
    except (ArgumentError, PolicyError) as error:
        raise InputError(str(error)) from error
    except DocumentError as error:
        hints = [_DOCUMENT_HINTS[error.check]] if error.check in _DOCUMENT_HINTS else []
        raise NotAuthenticError(
            f"document refused, {error.check.replace('_', ' ')}: {error}", *hints
        ) from error


def _read_file(path: str, what: str, limit: int = _FILE_MAX) -> bytes:
    data = read_bounded(path, limit + 1, what)
    if len(data) > limit:
        raise InputError(f"{what} is longer than {limit} bytes")
    return data


def _fields(**texts: str | None) -> dict[str, bytes]:
    """The fields of a document that were given, as bytes."""
    from nsm.arguments import parse_bytes
    from nsm.module import REQUEST_MAX

    return {
        name: parse_bytes(text, lambda path: _read_file(path, path, REQUEST_MAX))
        for name, text in texts.items()
        if text is not None
    }


def _roots(path: str | None) -> list[bytes]:
    from nsm.arguments import parse_root
    from nsm.document import AWS_ROOT_G1_SHA256

    return (
        [parse_root(_read_file(path, f"root {path}"))] if path is not None else [AWS_ROOT_G1_SHA256]
    )


def _print(report: dict[str, Any], text: Callable[[dict[str, Any]], str], *, as_json: bool) -> None:
    """A report on standard output, which may be a terminal."""
    import json

    shown = json.dumps(report, indent=2) if as_json else text(report)
    if sys.stdout is None:
        raise OutputError("standard output is closed")
    try:
        click.echo(shown.encode() + b"\n" if shown else b"", nl=False)
    except OSError as error:
        raise OutputError(f"standard output cannot be written: {error.strerror}") from error


@cli.command()
@click.argument("output")
@_options(_FIELD_OPTIONS)
@click.option("-f", "--force", is_flag=True, help="replace OUTPUT if it exists")
@_options(_MODULE_OPTIONS)
def attest(
    output: str, nonce: str | None, user_data: str | None, public_key: str | None, force: bool
) -> None:
    """Write an attestation document of this enclave.

    \b
    Examples:
      attestor attest --nonce 00112233445566778899aabbccddeeff document
      attestor attest --public-key @key.der - | ship-it

    OUTPUT is created as decrypt does; "-" writes to standard output. The three fields share some
    4000 bytes.
    """
    with _evidence_errors():
        fields = _fields(nonce=nonce, user_data=user_data, public_key=public_key)
    with open_target(output, force=force) as target:
        target.write(_with_module(lambda module: module.attest(**fields)))


@cli.command()
@_BASE64_OPTION
@_JSON_OPTION
@_options(_MODULE_OPTIONS)
def describe(in_base64: bool, as_json: bool) -> None:
    """Show the Nitro Secure Module of this enclave and its PCRs."""
    from nsm import report
    from nsm.document import PCRS_MAX

    def look(module: Any) -> dict[str, Any]:
        description = module.describe()
        pcrs = {
            index: module.describe_pcr(index)
            for index in range(min(description.max_pcrs, PCRS_MAX))
        }
        return report.description_object(
            description, pcrs, module.transport_name, in_base64=in_base64
        )

    _print(_with_module(look), report.description_text, as_json=as_json)


@cli.command()
@click.argument("document")
@_PCR_OPTION
@click.option(
    "--measurements", metavar="FILE", help="expect the PCRs that nitro-cli build-enclave printed"
)
@click.option("--any-image", is_flag=True, help="expect no PCR, and say that this is meant")
@_options(_FIELD_OPTIONS)
@click.option("--module-id", metavar="ID", help="expect this module")
@click.option(
    "--at", metavar="TIME", help='of verification; "document": when it was signed  [default: now]'
)
@click.option("--max-age", metavar="SECONDS", help="between the document's timestamp and now")
@click.option("--allow-debug", is_flag=True, help="accept an enclave in debug mode")
@_ROOT_OPTION
@_BASE64_OPTION
@_JSON_OPTION
def verify(
    document: str,
    pcrs: tuple[str, ...],
    measurements: str | None,
    any_image: bool,
    at: str | None,
    max_age: str | None,
    root: str | None,
    in_base64: bool,
    as_json: bool,
    **expected: Any,
) -> None:
    """Verify an attestation document, offline, and show what it says.

    \b
    Examples:
      attestor verify --measurements build.json --nonce 00112233445566778899aabbccddeeff document
      attestor verify --any-image --at document old-document

    A nonce that you chose, or --max-age, tells a fresh document from a replayed one. Revocation is
    not checked, as the specification of the format says. A document that is refused prints nothing
    but the error.
    """
    from datetime import UTC, datetime

    from nsm import report
    from nsm.arguments import parse_time
    from nsm.document import AttestationDocument
    from nsm.document import verify as verify_document

    if max_age is not None and at == "document":
        raise InputError(
            "--max-age contradicts --at document, at which every document is new",
            "leave one of them out",
        )
    if not (pcrs or measurements or any_image):
        hint = "give --pcr or --measurements, or --any-image if that is meant"
        raise InputError("no PCR is expected: every genuine enclave's document would pass", hint)
    with _evidence_errors():
        expect = _expectations(pcrs, measurements, max_age, expected)
        now, roots = datetime.now(UTC), _roots(root)
        time = now if at in {None, "document"} else parse_time(str(at))
        parsed = AttestationDocument.parse(_read_file(document, f"document {document}"))
        if at == "document":
            time = parsed.signed_at
        verified = verify_document(parsed, roots=roots, at=time, expect=expect, now=now)
    shown = report.document_object(verified, now=now, expected=expect.pcrs, in_base64=in_base64)
    _print(shown, report.document_text, as_json=as_json)


def _expectations(
    pcrs: Sequence[str], measurements: str | None, max_age: str | None, expected: Mapping[str, Any]
) -> Any:
    from nsm.arguments import merge, parse_age, parse_pcr
    from nsm.document import Expectations
    from nsm.policy import measurements as parse_measurements

    measured = parse_measurements(_read_file(measurements, measurements)) if measurements else {}
    return Expectations(
        pcrs=merge(*([pair] for pair in map(parse_pcr, pcrs)), measured.items()),
        max_age=parse_age(max_age) if max_age is not None else None,
        module_id=expected["module_id"],
        allow_debug=expected["allow_debug"],
        **_fields(**{name: expected[name] for name in ("nonce", "user_data", "public_key")}),
    )


@cli.group()
def policy() -> None:
    """Write, check and explain key policies that ask for attested enclaves."""


@policy.command()
@click.option(
    "--principal",
    "principals",
    metavar="ARN",
    multiple=True,
    required=True,
    help="role of the enclave's parent instance, repeatable",
)
@click.option(
    "--admin",
    "admins",
    metavar="ARN",
    multiple=True,
    required=True,
    help="who manages the key without using it, repeatable",
)
@click.option(
    "--encryptor",
    "encryptors",
    metavar="ARN",
    multiple=True,
    help="who may encrypt only, repeatable",
)
@click.option(
    "--action",
    "actions",
    metavar="ACTION",
    multiple=True,
    default=["kms:Decrypt"],
    help="what an enclave may do, repeatable  [default: kms:Decrypt]",
)
@_PCR_OPTION
@click.option(
    "--measurements",
    metavar="FILE",
    multiple=True,
    help="an image, as nitro-cli printed it, repeatable",
)
@click.option(
    "--document",
    "documents",
    metavar="FILE",
    multiple=True,
    help="an image, by a document, repeatable",
)
@click.option(
    "--take",
    metavar="N",
    multiple=True,
    type=click.IntRange(0, 31),
    default=[0, 1, 2, 8],
    help="PCR to take from those, repeatable  [default: 0, 1, 2, 8]",
)
@click.option("--role-arn", metavar="ARN", help="computes PCR3")
@click.option("--instance-id", metavar="ID", help="computes PCR4")
@click.option("--signing-certificate", metavar="FILE", help="computes PCR8")
@click.option(
    "--bind",
    "binds",
    metavar="NAME=VALUE:WHO",
    multiple=True,
    help="a context value for one role's ARN or instance's id only, repeatable",
)
@_ROOT_OPTION
def render(
    principals: tuple[str, ...],
    admins: tuple[str, ...],
    encryptors: tuple[str, ...],
    actions: tuple[str, ...],
    binds: tuple[str, ...],
    **sources: Any,
) -> None:
    """Write a key policy that gives plaintexts to attested enclaves only.

    \b
    Examples:
      attestor policy render --principal ROLE --admin ROLE --measurements build.json
      attestor policy render --principal ROLE --admin ROLE --signing-certificate cert.pem
      attestor policy render --principal ROLE --admin ROLE --pcr 0=OLD --pcr 0=NEW

    A PCR that is named again begins another image, for a roll-over. PCR8 survives new builds, but
    admits every older image signed with that certificate; PCR0, or PCR1 with PCR2, must be renewed
    at each build; the other PCRs alone tell no image from another and are refused. Documents are
    verified at their own timestamp.
    """
    from nsm import policy as key_policy

    with _evidence_errors():
        rendered = key_policy.render(
            principals=principals,
            admins=admins,
            encryptors=encryptors,
            actions=actions,
            images=_images(sources),
            binds=[key_policy.Bind.parse(text) for text in binds],
        )
    for warning in rendered.warnings:
        _say("note", warning)
    _print(rendered.policy, str, as_json=True)


def _images(sources: Mapping[str, Any]) -> list[dict[int, bytes]]:
    """The PCRs of each image: those given, measured or attested, each with what is computed for all
    of them.
    """
    from nsm import policy as key_policy
    from nsm.arguments import merge, parse_certificate, parse_images

    computed = {}
    if sources["role_arn"]:
        computed[3] = key_policy.pcr_of_role(sources["role_arn"])
    if sources["instance_id"]:
        computed[4] = key_policy.pcr_of_instance(sources["instance_id"])
    if sources["signing_certificate"]:
        path = sources["signing_certificate"]
        computed[8] = key_policy.pcr_of_certificate(parse_certificate(_read_file(path, path)))
    measured = [key_policy.measurements(_read_file(path, path)) for path in sources["measurements"]]
    for path in sources["documents"]:
        pcrs = _verified_at_its_time(path, sources["root"], allow_debug=False).document.pcrs
        measured.append({index: value for index, value in pcrs.items() if any(value)})
    taken = [
        {index: pcrs[index] for index in sources["take"] if index in pcrs} for pcrs in measured
    ]
    images = parse_images(sources["pcrs"]) + taken
    return [merge(image.items(), computed.items()) for image in images or [{}]]


def _verified_at_its_time(path: str, root: str | None, *, allow_debug: bool) -> Any:
    """A document that was genuine when it was signed, which says nothing about its age."""
    from nsm.document import AttestationDocument, Expectations, verify

    parsed = AttestationDocument.parse(_read_file(path, f"document {path}"))
    return verify(
        parsed,
        roots=_roots(root),
        at=parsed.signed_at,
        expect=Expectations(allow_debug=allow_debug),
    )


@policy.command()
@click.argument("file")
@_JSON_OPTION
def check(file: str, as_json: bool) -> int:
    """Find what makes a key policy open or useless; nothing found prints nothing.

    \b
    Example:
      aws kms get-key-policy --key-id KEY --query Policy --output text | attestor policy check -

    FILE is the policy in JSON; "-" reads standard input. The policy is read as that of a key for
    attested enclaves only. Exit status: 0 nothing found, 4 findings.
    """
    from nsm import policy as key_policy
    from nsm import report

    with _evidence_errors():
        findings = key_policy.check(_read_policy(file))
    _print(report.findings_object(findings), report.findings_text, as_json=as_json)
    return RefusedError.status if findings else 0


def _read_policy(path: str) -> Any:
    from nsm.policy import Policy

    return Policy.parse(_read_file(path, "standard input" if path == "-" else path))


@policy.command()
@click.argument("file")
@click.option(
    "--document", metavar="FILE", help="the attestation document that is sent  [default: none]"
)
@click.option(
    "--principal",
    metavar="ARN",
    required=True,
    help="role, user or assumed-role session that calls",
)
@click.option(
    "--action",
    metavar="ACTION",
    default="kms:Decrypt",
    help="what it calls  [default: kms:Decrypt]",
)
@click.option("--key-id", metavar="ARN", help="the key  [default: one of the principal's account]")
@click.option(
    "--context",
    "encryption_context",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_encryption_context,
    help="encryption context, repeatable",
)
@_ROOT_OPTION
@_JSON_OPTION
def explain(
    file: str,
    document: str | None,
    principal: str,
    action: str,
    key_id: str | None,
    encryption_context: dict[str, str],
    root: str | None,
    as_json: bool,
) -> int:
    """Tell statement by statement what a key policy decides about a call.

    \b
    Example:
      attestor policy explain policy.json --document doc --principal arn:aws:iam::...:role/parent

    FILE is the policy in JSON; "-" reads standard input. The document is verified at its own
    timestamp. What depends on other policies is named, not guessed. Exit status: 0 allowed, 4
    denied, 8 cannot be told.
    """
    from datetime import UTC, datetime

    from nsm import policy as key_policy
    from nsm import report

    with _evidence_errors():
        parsed = _read_policy(file)
        verified = (
            _verified_at_its_time(document, root, allow_debug=True)
            if document is not None
            else None
        )
        request = key_policy.Request(
            principal=principal,
            action=action,
            resource=key_id or _some_key(parsed, principal),
            pcrs=verified.document.pcrs if verified else None,
            context=encryption_context,
        )
        found = key_policy.evaluate(parsed, request)
    _print(
        report.evaluation_object(found, request, verified, now=datetime.now(UTC)),
        report.evaluation_text,
        as_json=as_json,
    )
    return {"allowed": 0, "denied": RefusedError.status}.get(found.decision.value, _UNDETERMINED)


def _some_key(parsed: Any, principal: str) -> str:
    """A key of the principal's account, if the policy does not look at which or in what region."""
    conditions = (
        condition.key.lower()
        for statement in parsed.statements
        for condition in statement.conditions
    )
    if (
        any(statement.resources != ("*",) for statement in parsed.statements)
        or "aws:requestedregion" in conditions
    ):
        raise InputError(
            "the policy looks at the key or at its region", "give the key's ARN as --key-id"
        )
    partition, account = (principal.split(":") + [""] * 5)[1:5:3]
    return f"arn:{partition}:kms:*:{account}:key/*"


@cli.command()
@_options([option for name, option in _NAMED_KMS_OPTIONS.items() if name != "any_key"])
@_options(_VSOCK_OPTIONS)
@_ROOT_OPTION
@_JSON_OPTION
@_options(_MODULE_OPTIONS)
def doctor(
    as_json: bool, root: str | None, encryption_context: dict[str, str], **options: Any
) -> int:
    """Find out why an attested call fails here.

    \b
    Example:
      attestor doctor --key-id arn:aws:kms:eu-west-1:111122223333:key/...

    Checks the module, its document, credentials, and the way to KMS; with --key-id also a Decrypt
    as a dry run, which needs no ciphertext. Exit status: that of the first check that failed, as
    decrypt would end.
    """
    from doctor import Case, examine, results_object, results_text, status_of

    with _evidence_errors():
        (trusted,) = _roots(root)
    results = examine(Case(root=trusted, context=encryption_context, **options))
    _print(results_object(results), results_text, as_json=as_json)
    return status_of(results)


# --------------------------- commands: the other operations, encrypt, inject (bodies in injection/)


@cli.command()
@click.argument("key")
@click.argument("wrapped")
@_options(_KMS_OPTIONS)
@click.option("--spec", metavar="NAME", help="AES_256 or AES_128")
@click.option(
    "--bytes",
    "size",
    metavar="N",
    type=click.IntRange(1, 1024),
    help="a key of 1 to 1024 bytes instead",
)
@_FORCE
@_options(_VSOCK_OPTIONS)
@_options(_MODULE_OPTIONS)
def generate_data_key(key: str, wrapped: str, force: bool, **options: Any) -> None:
    """Let KMS make a symmetric data key for this enclave.

    \b
    Example:
      attestor generate-data-key --key-id arn:aws:kms:... --spec AES_256 data.key data.key.enc

    KEY gets the plaintext key, WRAPPED the CiphertextBlob that `attestor decrypt` opens again with
    the same context. Both files are there, or neither.
    """
    from injection import operations

    operations.generate_data_key(key, wrapped, force=force, **options)


@cli.command()
@click.argument("private")
@click.argument("public")
@click.argument("wrapped")
@_options(_KMS_OPTIONS)
@click.option(
    "--spec",
    metavar="NAME",
    required=True,
    help="such as ECC_NIST_P256 or RSA_2048, as KMS names them",
)
@click.option(
    "--format", "form", type=click.Choice(("pem", "der")), default="pem", help="[default: pem]"
)
@_FORCE
@_options(_VSOCK_OPTIONS)
@_options(_MODULE_OPTIONS)
def generate_data_key_pair(
    private: str, public: str, wrapped: str, force: bool, **options: Any
) -> None:
    """Let KMS make a key pair for this enclave.

    \b
    Example:
      attestor generate-data-key-pair --key-id arn:aws:kms:... --spec ECC_NIST_P256 \\
          tls.key tls.pub tls.key.enc

    PRIVATE gets the private key (PKCS #8), PUBLIC the public one (SubjectPublicKeyInfo), WRAPPED
    the CiphertextBlob from which `attestor decrypt` gets the private key in DER again. All three
    files are there, or none.
    """
    from injection import operations

    operations.generate_data_key_pair(private, public, wrapped, force=force, **options)


@cli.command()
@click.argument("size", metavar="BYTES", type=click.IntRange(1, 1024))
@click.argument("output")
@_options([option for name, option in _NAMED_KMS_OPTIONS.items() if name in _WITHOUT_KEY])
@_FORCE
@_options(_VSOCK_OPTIONS)
@_options(_MODULE_OPTIONS)
def generate_random(size: int, output: str, force: bool, **options: Any) -> None:
    """Get 1 to 1024 random bytes from the hardware of KMS.

    \b
    Example:
      attestor generate-random --region eu-west-1 32 seed

    OUTPUT may be "-" for standard output.
    """
    from injection import operations

    operations.generate_random(size, output, force=force, **options)


@cli.command()
@click.argument("peer")
@click.argument("output")
@_options([option for name, option in _NAMED_KMS_OPTIONS.items() if name != "encryption_context"])
@_FORCE
@_options(_VSOCK_OPTIONS)
@_options(_MODULE_OPTIONS)
def derive_shared_secret(peer: str, output: str, force: bool, **options: Any) -> None:
    """Agree on a secret: the private key stays in KMS, the peer's public key comes from a file
    (ECDH).

    \b
    Example:
      attestor derive-shared-secret --key-id arn:aws:kms:...:key/... peer.pub secret

    PEER is a SubjectPublicKeyInfo in PEM or DER. OUTPUT gets the raw shared secret (the x
    coordinate), which wants a key derivation function before it is a key; "-" is standard output.
    """
    from injection import operations

    operations.derive_shared_secret(peer, output, force=force, **options)


@cli.command()
@click.argument("plaintext")
@click.argument("output")
@_options([option for name, option in _NAMED_KMS_OPTIONS.items() if name != "any_key"])
@click.option(
    "--format",
    "form",
    type=click.Choice(("auto", "kms", "esdk")),
    default="auto",
    help="[default: auto]",
)
@_FORCE
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    callback=_set_verbose,
    expose_value=False,
    help="say on stderr what is done",
)
def encrypt(plaintext: str, output: str, form: str, force: bool, **options: Any) -> None:
    """Make a ciphertext that `decrypt` and `inject` open: the operator's side, outside any enclave.

    \b
    Example:
      attestor encrypt --key-id arn:aws:kms:...:key/... --context node=3 secret secret.enc

    PLAINTEXT is a file or "-". Up to 4096 bytes become a CiphertextBlob of KMS Encrypt, more of
    them (or all, with --format esdk) a signed message of the AWS Encryption SDK with key
    commitment, for which the package aws-encryption-sdk must be there. OUTPUT may be "-".
    """
    from injection import operations

    operations.encrypt(plaintext, output, form=form, force=force, **options)


def _print_schema(context: click.Context, _option: click.Parameter, asked: bool) -> None:
    if asked:
        from injection.manifest import json_schema

        _print(json_schema(), str, as_json=True)
        context.exit()


@cli.command()
@click.argument("manifest")
@click.argument("program", nargs=-1, type=click.UNPROCESSED, metavar="[-- PROGRAM ARG...]")
@click.option(
    "--set", "settings", metavar="NAME=VALUE", multiple=True, help="value of a variable, repeatable"
)
@click.option(
    "--receipt", metavar="FILE", help="write there, as JSON, what was done; no secret is in it"
)
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    callback=_print_schema,
    expose_value=False,
    help="print the JSON schema of a manifest and exit",
)
@_FORCE
@_options(_VSOCK_OPTIONS)
@click.option("--s3-vsock", metavar="CID:PORT", callback=_vsock, help="reach S3 so")
@_options(_MODULE_OPTIONS)
def inject(
    manifest: str,
    program: tuple[str, ...],
    settings: tuple[str, ...],
    receipt: str | None,
    force: bool,
    **addresses: tuple[int, int] | None,
) -> None:
    """Put every secret and file of a manifest in its place, then become PROGRAM.

    \b
    Example:
      attestor inject --set NODE=3 /etc/secrets.toml -- /usr/bin/server --port 80

    Nothing is placed unless everything opened; a failure takes back what this run placed. PROGRAM
    replaces this process: its exit status and signals are its own, 127 if there is no such program,
    126 if it cannot be executed. The README describes the manifest; its own vsock addresses give
    way to those of the options.
    """
    from injection.run import inject as run

    run(
        manifest,
        program,
        settings=_settings(settings),
        receipt=receipt,
        force=force,
        addresses=addresses,
    )


def _settings(pairs: Sequence[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise InputError("--set wants NAME=VALUE")
        if name in values:
            raise InputError(f"--set names {name} twice")
        values[name] = value
    return values


@cli.command()
@click.argument("path")
@click.option(
    "--imds-vsock",
    metavar="CID:PORT",
    callback=_vsock,
    help="reach the instance metadata service so",
)
@click.option(
    "--timeout",
    metavar="SECONDS",
    default="10",
    callback=_seconds,
    help="for everything, retries included  [default: 10]",
)
def metadata(path: str, imds_vsock: tuple[int, int] | None, timeout: float) -> None:
    """Print one value of the instance metadata service (version 2).

    \b
    Examples:
      attestor metadata placement/region
      attestor metadata --imds-vsock 3:8002 tags/instance/mpa-node

    PATH is below latest/meta-data/; credentials are never printed. The value is the parent's claim.
    Without vsock the service is at AWS_EC2_METADATA_SERVICE_ENDPOINT or http://169.254.169.254.

    Exit status: 0 done, 2 usage, 4 no such value, 5 try again.
    """
    from injection.metadata import fetch

    value = fetch(path, imds_vsock, timeout)
    _print({}, lambda _: value, as_json=False)


def main() -> NoReturn:
    """Run the command line."""
    _hide_memory()
    gc.disable()  # so short a process ends before a collection pays
    try:
        cli.main()
    except SystemExit as end:
        _leave(end.code if isinstance(end.code, int) else 1)


def _hide_memory() -> None:
    """No core dump, which execve keeps, and no debugger of the same user, which it does not
    (prctl(2)).
    """
    import ctypes  # the NSM's transport needs it anyway
    import resource

    os.environ.pop("SSLKEYLOGFILE", None)  # would open our TLS to whoever recorded it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _leave(status: int) -> NoReturn:
    """End here and now: taking the interpreter apart would cost more than a tenth of the time that
    users wait.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.modules.setdefault(
        "attestor", sys.modules[__name__]
    )  # modules that import attestor get this one
    main()
