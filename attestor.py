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
    2    usage: options, a ciphertext, manifest or policy that cannot be read or is not one, an
         insecure endpoint, a command that is not installed
    3    no Nitro Secure Module, or it refused
    4    KMS refused, or there are no valid credentials: do not retry; a key policy denies or is
         wrong
    5    KMS not reachable, throttled or failing; too little memory: retry
    6    not authentic: attestation document, envelope, TLS certificate or name, key id
    7    the output cannot be written
    8    policy explain cannot tell
    126  inject: the program cannot be executed; 127 there is no such program
    129  SIGHUP; 130 SIGINT; 143 SIGTERM

What touches a secret here is this file, `nsm/` and `attestor_io/`; further commands are named in
FURTHER_COMMANDS and loaded when they are called.
"""

from __future__ import annotations

from attestor_io.hold import hold

if __name__ == "__main__":
    hold()  # before the slow imports: a signal amid them would leave a traceback

import atexit
import contextlib
import gc
import logging
import os
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn, TypeVar

import click

from attestor_io import kms_errors, names, signals
from attestor_io.background import IdleWorker, run_in_background
from attestor_io.ciphertext import (
    ALGORITHMS,
    CIPHERTEXT_MAX,
    check_algorithm,
    is_symmetric,
    read_ciphertext,
)
from attestor_io.deadline import Deadline
from attestor_io.errors import (
    AttestorError,
    EnvelopeError,
    InputError,
    ModuleError,
    NotAuthenticError,
    OutputError,
    RefusedError,
    UnreachableError,
)
from attestor_io.module_options import SOURCE_OPTIONS
from attestor_io.reading import Message
from attestor_io.secret_file import Target, open_target
from attestor_io.shortage import shortage
from attestor_io.text_options import complete_from, demand_text, parse_context
from attestor_io.urls import redact_urls, without_query

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence
    from typing import Self

    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

    from attestor_io.vsock import Address

__version__ = "0.1.0"
__all__ = [
    "AttestorError",
    "EnvelopeError",
    "InputError",
    "ModuleError",
    "NotAuthenticError",
    "OutputError",
    "Recipient",
    "RefusedError",
    "UnreachableError",
    "attested",
    "main",
    "open_envelope",
]

log = logging.getLogger("attestor")
_T = TypeVar("_T")

# ---------------------------------------------------------------------------------------- constants

PLAINTEXT_MAX: Final = 4096  # Plaintext, same place
DOCUMENT_FRESH: Final = 60.0  # seconds that one attestation document serves further calls
_NOTES_MAX: Final = 100  # lines that are remembered
_PR_SET_DUMPABLE: Final = 4  # linux/prctl.h
ATTEMPT_TIMEOUT: Final = 20.0  # seconds for one connection or one answer, within --timeout
DEFAULT_TIMEOUT: Final = 60.0
CLOCK_ERROR_MAX: Final = 240.0  # seconds; Signature Version 4 forgives 300, and time goes on

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

# SubjectPublicKeyInfo (RFC 5280 4.1.2.7, RFC 3279 2.3.1) around an RSA-2048 modulus, exponent 65537
_RSA_2048_HEAD: Final = bytes.fromhex(
    "30820122300d06092a864886f70d01010105000382010f003082010a0282010100"
)
_RSA_2048_TAIL: Final = bytes.fromhex("0203010001")

# The operations that take a Recipient, and the answer's member in which callers look for the secret
SECRET_MEMBER: Final = {
    "Decrypt": "Plaintext",
    "GenerateDataKey": "Plaintext",
    "GenerateDataKeyPair": "PrivateKeyPlaintext",
    "GenerateRandom": "Plaintext",
    "DeriveSharedSecret": "SharedSecret",
}


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
    # end-of-contents where none belongs, or a tag of several octets (8.1.5 and 8.1.2.4)
    if tag in {0x00, 0x20} or tag & 0x1F == 0x1F:
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
    """The elements up to `limit`, or to the end-of-contents octets of an indefinite length."""
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
        found = f"tag {element.tag:#04x} and {len(element.children)} elements"
        raise EnvelopeError(f"{what} has {found}, expected {tag:#04x} and {count}")
    return element.children


def _contents(element: _Element, tag: int, what: str, length: int | None = None) -> bytes:
    """The contents of a primitive element; exactly this tag and this length."""
    if element.tag != tag or length not in {None, len(element.contents)}:
        found = f"tag {element.tag:#04x} and {len(element.contents)} bytes"
        expected = f"{tag:#04x}" if length is None else f"{tag:#04x} and {length}"
        raise EnvelopeError(f"{what} has {found}, expected {expected}")
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
    """The encrypted key of a KeyTransRecipientInfo for our key (RFC 5652 section 6.2.1)."""
    version, identifier, algorithm, encrypted_key = _children(
        recipient, _SEQUENCE, 4, "recipient info"
    )
    if identifier.tag == _CONTEXT_0:
        # subjectKeyIdentifier: KMS writes the SHA-256 of our SubjectPublicKeyInfo
        expected_version = b"\x02"
        _expect(identifier.contents, key_identifier, "subject key identifier")
    else:
        # issuerAndSerialNumber: LocalStack writes a made-up one, nothing to compare it with
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
    """Initialisation vector and ciphertext of an EncryptedContentInfo (RFC 5652 6.1, RFC 3565)."""
    content_type, algorithm, encrypted = _children(content, _SEQUENCE, 3, "encrypted content info")
    _expect(_contents(content_type, _OID, "inner content type"), _DATA, "inner content type")
    cipher, iv = _children(algorithm, _SEQUENCE, 2, "content encryption algorithm")
    _expect(_contents(cipher, _OID, "cipher"), _AES256_CBC, "content encryption algorithm")
    if encrypted.tag == _CONTEXT_0_CONSTRUCTED:
        chunks = (_contents(chunk, _OCTETS, "content chunk") for chunk in encrypted.children)
        ciphertext = b"".join(chunks)
    else:
        ciphertext = _contents(encrypted, _CONTEXT_0, "encrypted content")
    if not ciphertext or len(ciphertext) % 16:
        raise EnvelopeError(
            f"encrypted content has {len(ciphertext)} bytes, not whole blocks of 16"
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
    """Decrypt and unpad (RFC 5652 6.3); a missing key and a wrong padding end alike: no oracle."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    decryptor = Cipher(algorithms.AES256(content_key or bytes(32)), modes.CBC(iv)).decryptor()
    padded = bytearray(len(ciphertext) + 15)  # update_into wants room for a block less a byte
    try:
        length = decryptor.update_into(ciphertext, padded)
        count = padded[length - 1]
        padding_holds = (
            1 <= count <= 16 and padded[length - count : length] == bytes([count]) * count
        )
        if content_key is None or not padding_holds:
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
        found = f"{key.key_size} bits and exponent {numbers.e}"
        raise ValueError(f"recipient key has {found}, expected 2048 and 65537")
    return _RSA_2048_HEAD + numbers.n.to_bytes(256) + _RSA_2048_TAIL


# ----------------------------------------------- the recipient: a KMS client and two event handlers


class Recipient:
    """This process's RSA-2048 key pair, and the attestation document that carries its public key.

    Key and document are made in a thread, beside whatever the caller does (importing the SDK takes
    as long). The private key stays in this object. Thread-safe; errors of the module are raised as
    ModuleError where it is used.
    """

    def __init__(self, worker: IdleWorker | None = None) -> None:
        self._lock = threading.Lock()
        self._document = b""
        self._asked = -DOCUMENT_FRESH  # on the monotonic clock
        self._asked_at = 0.0  # on the clock that can be wrong
        self._asking = False  # or has asked already
        self._answered: Future[None] = Future()
        self._key = (worker or IdleWorker()).submit(self._make)

    @property
    def failed(self) -> bool:
        """Whether the key could not be made."""
        return self._key.done() and self._key.exception() is not None

    def wait(self, timeout: float | None = None) -> None:
        """Return when the key is made, or cannot be, or after so many seconds."""
        with contextlib.suppress(FutureTimeoutError):
            self._key.exception(timeout)

    def wait_for_module(self, timeout: float | Deadline) -> None:
        """Return once the module has answered; it comes before credentials and network.

        Raises ModuleError for one that has not by then, or within so many seconds.
        """
        deadline = timeout if isinstance(timeout, Deadline) else Deadline(timeout)
        try:
            self._answered.result(deadline.left)
        except FutureTimeoutError:
            raise _silent_module(deadline) from None

    def wait_for_document(self, deadline: Deadline) -> None:
        """Return once the first document is there, or cannot be had, which using it then says.

        It comes before a call, whose wait would be blamed on KMS. Raises ModuleError for a module
        that was asked and has not answered by then, UnreachableError if it was not asked yet.
        """
        try:
            self._key.exception(deadline.left)
        except FutureTimeoutError:
            late = _silent_module(deadline) if self._asking else deadline.passed("no key pair")
            raise late from None

    def document(self) -> bytes:
        """An attestation document for our public key, not older than a minute."""
        return self._fresh_document(self._key.result())

    @property
    def last_document(self) -> bytes:
        """The document that was asked for last, however old; empty before the first."""
        return self._document

    def clock_error(self) -> float:
        """Seconds that this enclave's clock is behind the last document's timestamp; 0 without one.

        The hypervisor signs that time. What else tells the time comes from the parent.
        """
        from nsm.document import AttestationDocument, DocumentError

        try:
            return AttestationDocument.parse(self._document).timestamp / 1000 - self._asked_at
        except DocumentError:
            return 0.0

    def open(self, envelope: bytes) -> bytes:
        """The plaintext of an envelope for our key; see `open_envelope`."""
        return open_envelope(envelope, self._key.result())

    def _make(self) -> RSAPrivateKey:
        """Make the key from a pool that has the module's randomness, and the first document."""
        try:
            randomness = use_module(lambda module: module.random(256))
        except BaseException as error:
            self._answered.set_exception(error)
            raise
        self._answered.set_result(None)
        from cryptography.hazmat.primitives.asymmetric import rsa

        from nsm.entropy import mix_into_kernel

        # before the key is made: the parent knows what else an enclave's pool is filled from
        if mix_into_kernel(randomness):
            log.info("kernel's random pool was not initialised: credited the module's randomness")
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._fresh_document(key)
        return key

    def _fresh_document(self, key: RSAPrivateKey) -> bytes:
        with self._lock:
            asked = time.monotonic()
            if asked - self._asked >= DOCUMENT_FRESH:
                public_key = _public_key_info(key)
                self._asking = True
                self._document = use_module(lambda module: module.attest(public_key=public_key))
                self._asked, self._asked_at = asked, time.time()
                log.info("attestation document of %d bytes", len(self._document))
            return self._document


def use_module(use: Callable[[Any], _T]) -> _T:
    """Open the Nitro Secure Module, or the NitroTPM, use it, close it; its errors become ours."""
    from nsm import Nsm, NsmError, SetupError, source

    try:
        with Nsm() as module:
            log.info("%s through %s", module.title, module.transport_name)
            return use(module)
    except SetupError as error:
        raise InputError(f"{error.subject} cannot be used: {error}") from error
    except NsmError as error:
        reason, hints = source.explain(error)
        raise ModuleError(reason, *hints) from error


def ask_module(use: Callable[[Any], _T], deadline: Deadline) -> _T:
    """The same where nothing else is waited for: ModuleError also for one that stays silent."""
    try:
        return run_in_background(lambda: use_module(use)).result(deadline.left)
    except FutureTimeoutError:
        raise _silent_module(deadline) from None


def _silent_module(deadline: Deadline) -> ModuleError:
    from nsm.source import title

    return ModuleError(f"the {title()} does not answer within {deadline.seconds:g} seconds")


_worker: IdleWorker | None = None
_recipient: Recipient | None = None
_recipient_lock = threading.Lock()


def process_recipient() -> Recipient:
    """The one recipient of this process, made anew after a failure."""
    global _worker, _recipient  # noqa: PLW0603 - one key pair per process is the point
    with _recipient_lock:
        if _recipient is None or _recipient.failed:
            _worker = _worker or IdleWorker()
            _recipient = Recipient(_worker)
        return _recipient


def forget_recipient() -> None:
    """Drop the recipient: a forked child has neither its thread nor a claim to its key."""
    global _worker, _recipient, _recipient_lock
    _worker, _recipient, _recipient_lock = None, None, threading.Lock()


def _wait_until_key_is_made() -> None:
    """Wait for the thread that makes the key, a minute at most.

    A fork, or the interpreter's end, amid its imports and native code leaves wreckage. Once the key
    is made the thread idles and holds no lock of OpenSSL's; see `IdleWorker`.
    """
    if _recipient is not None:
        _recipient.wait(DEFAULT_TIMEOUT)


os.register_at_fork(before=_wait_until_key_is_made, after_in_child=forget_recipient)
atexit.register(_wait_until_key_is_made)


def attested(client_or_session: _T) -> _T:
    """Make a KMS client, or every KMS client of a session, decrypt for this enclave only.

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
    if _is_asynchronous(subject):
        reason = f"{type(subject).__name__} is asynchronous: its answers would not be unwrapped"
        raise InputError(reason, "take a client of botocore, and call it by asyncio.to_thread")
    if hasattr(subject, "meta"):
        service = subject.meta.service_model.service_name
        if service != "kms":
            raise InputError(f"a client of {service} cannot be attested, only KMS's")
        _require_authenticated(subject._endpoint)
        events = subject.meta.events
    else:
        events = getattr(subject, "events", subject)  # boto3's session has them, botocore's is one
    if not hasattr(events, "register"):
        kind = type(subject).__name__
        raise InputError(f"{kind} is neither a client nor a session of boto3 or botocore")
    process_recipient()
    events.register("creating-client-class.kms", _add_client_check, unique_id="attestor-client")
    events.register("before-parameter-build.kms", _add_recipient, unique_id="attestor-recipient")
    events.register("before-call.kms", _require_https, unique_id="attestor-https")
    events.register("after-call.kms", _unwrap_answer, unique_id="attestor-unwrap")
    return client_or_session


def _is_asynchronous(subject: Any) -> bool:
    """Whether a client or session is aiobotocore's or aioboto3's, which looks like botocore's."""
    from inspect import iscoroutinefunction

    # aioboto3's session holds aiobotocore's
    kind = type(getattr(subject, "__dict__", {}).get("_session", subject))
    methods = (getattr(kind, name, None) for name in ("_make_api_call", "get_credentials"))
    return any(map(iscoroutinefunction, methods))


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
    """Refuse an endpoint without verified TLS, and bound what comes from one with it.

    Whoever has seen the attestation document can encrypt to its public key: only TLS tells KMS's
    answer from the parent's.
    """
    if not endpoint.host.lower().startswith("https://"):
        reason = f"endpoint {without_query(endpoint.host)} is not https"
        raise InputError(reason, names.ENDPOINT_HINT, names.TLS_HINT)
    if not endpoint.http_session._verify:
        raise InputError("the client was made with verify=False", names.TLS_HINT)
    if endpoint.http_session._proxy_config.settings.get("proxy_use_forwarding_for_https"):
        raise InputError("the client lets its proxy end TLS", names.TLS_HINT)
    from attestor_io.connections import bound_answers

    bound_answers(endpoint.http_session)


def _require_https(params: Mapping[str, Any], **_: object) -> None:
    if not params["url"].lower().startswith("https://"):
        raise InputError("endpoint is not https", names.TLS_HINT)


def _add_recipient(
    params: dict[str, Any], model: Any, context: dict[str, Any], **_: object
) -> None:
    if model.name not in SECRET_MEMBER:
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
    if model.name not in SECRET_MEMBER or http_response.status_code >= 300:
        return
    announced, length = http_response.headers.get("Content-Length"), len(http_response.content)
    if announced and announced != str(length):
        raise UnreachableError(f"answer of KMS is cut short: {length} of {announced} bytes")
    member = SECRET_MEMBER[model.name]
    if parsed.get(member):
        raise NotAuthenticError(f"answer of KMS has a {member} in the clear")
    if not parsed.get("CiphertextForRecipient"):
        hint = "is this endpoint AWS KMS?"
        raise NotAuthenticError("answer of KMS has no CiphertextForRecipient", hint)
    asked, answered = context["attestor_key_id"], str(parsed.get("KeyId"))
    if asked and not names.is_same_key(asked, answered):
        raise NotAuthenticError(f"answer of KMS is from key {answered}, asked for {asked}")
    parsed[member] = process_recipient().open(parsed.pop("CiphertextForRecipient"))


# --------------------------------------------------------------------------------------- edges: KMS


@dataclass(frozen=True, slots=True)
class Kms:
    """KMS as one command meets it; `deadline` is that of the command, for all of its calls.

    `vsock` and `imds_vsock` carry the connections to KMS and to the metadata service, `host_vsock`
    those to other hosts by their names, such as that of STS.
    """

    region: str
    endpoint_url: str | None
    deadline: Deadline
    vsock: Address | None = None
    imds_vsock: Address | None = None
    ca_bundle: str | None = None
    host_vsock: Mapping[str, Address] = field(default_factory=dict)

    @classmethod
    def connect(
        cls,
        key_id: str | None,
        region: str | None,
        endpoint_url: str | None,
        deadline: Deadline,
        vsock: Address | None = None,
        imds_vsock: Address | None = None,
        ca_bundle: str | None = None,
        host_vsock: Mapping[str, Address] | None = None,
    ) -> Self:
        """KMS as options name it; the metadata service tells the region if nothing else does.

        No connection is made yet. Raises InputError.
        """
        if imds_vsock and not (region or names.tells_region(key_id, os.environ)):
            from attestor_io import metadata

            region = metadata.region(imds_vsock, deadline)
        region = names.resolve_region(region, key_id, os.environ)
        hosts = host_vsock or {}
        return cls(region, endpoint_url, deadline, vsock, imds_vsock, ca_bundle, hosts)

    def call(self, operation: str, **parameters: object) -> dict[str, Any]:
        """Call an operation ("decrypt") of the attested client; raises only errors of ours."""
        recipient = process_recipient()  # first: its key is made while the SDK is imported
        from attestor_io import sdk_data

        recipient.wait_for_module(self.deadline)
        session = sdk_data.new_session()
        client = attested(self.ready_client(session))
        recipient.wait_for_document(self.deadline)
        return self._call(session, client, operation, parameters)

    def call_unattested(self, operation: str, **parameters: object) -> dict[str, Any]:
        """The same without a Recipient, for an operation that has none."""
        from attestor_io import sdk_data

        session = sdk_data.new_session()
        return self._call(session, self.ready_client(session), operation, parameters)

    def _call(
        self, session: Any, client: Any, name: str, parameters: Mapping[str, Any]
    ) -> dict[str, Any]:
        call = getattr(client, name)
        with errors_translated(session, name, parameters):
            answer: dict[str, Any] = self.deadline.call(lambda: call(**parameters))
        log.info("KMS answered request %s", answer.get("ResponseMetadata", {}).get("RequestId"))
        return answer

    def ready_client(self, session: Any, connections: int = 10) -> Any:
        """A client of a new session that has credentials; not yet attested."""

        def make() -> Any:
            self.prepare(session)
            check_credentials(session)
            return self.client(session, connections)

        from attestor_io import credentials

        return self.deadline.call(make, lambda: credentials.not_in_time(session))

    def prepare(self, session: Any) -> None:
        """Let a new session find its credentials and connect in our way.

        Raises InputError and RefusedError for a configuration that the SDK cannot use.
        """
        from attestor_io import connections, credentials

        session.set_config_variable("region", self.region)  # of STS, too
        connections.govern_session(session, self.host_vsock, self.deadline)
        with _configuration_errors_translated():
            credentials.equip(session, self.deadline, self.imds_vsock, self.host_vsock)

    def client(self, session: Any, connections: int = 10) -> Any:
        """A client with so many connections at most; raises InputError if it cannot be made."""
        from urllib.parse import urlsplit

        from botocore.config import Config

        attempt = min(ATTEMPT_TIMEOUT, self.deadline.seconds)
        with _configuration_errors_translated():
            client = session.create_client(
                "kms",
                region_name=self.region,
                endpoint_url=self.endpoint_url,
                verify=self.ca_bundle,
                config=Config(
                    connect_timeout=attempt, read_timeout=attempt, max_pool_connections=connections
                ),
            )
            urlsplit(client.meta.endpoint_url).port  # noqa: B018 - raises ValueError for nonsense
        if self.vsock:
            from attestor_io.connections import carry

            carry(client, self.vsock)
        log.info("KMS at %s", client.meta.endpoint_url)
        _require_authenticated(client._endpoint)
        return client


def check_credentials(session: Any) -> None:
    """Have the session find its credentials now; a wrong clock is told from a wrong answer."""
    from attestor_io import credentials

    try:
        credentials.check(session)
    except AttestorError as error:
        raise clock_fault(error) or error from error.__cause__


@contextlib.contextmanager
def _configuration_errors_translated() -> Iterator[None]:
    """Let only errors of ours out of the making of a client, and no value of a profile."""
    from botocore import exceptions as sdk

    from attestor_io import credentials

    try:
        yield
    except AttestorError:
        raise
    except (
        sdk.ProfileNotFound,
        sdk.PartialCredentialsError,
        sdk.CredentialRetrievalError,
    ) as error:
        raise credentials.missing(str(error)) from error
    except Exception as error:
        harmless = isinstance(error, sdk.BotoCoreError | ValueError)
        words = str(error).split(" ") if harmless else [type(error).__name__]
        reason = f"client of KMS cannot be made: {' '.join(map(without_query, words))}"
        raise InputError(reason, "a variable AWS_... or a profile says so") from error


@contextlib.contextmanager
def errors_translated(
    session: Any, operation: str, parameters: Mapping[str, object]
) -> Iterator[None]:
    """Let only errors of ours out of a call, with a refusal explained and no credential in them."""
    try:
        yield
    except AttestorError:
        raise
    except Exception as error:
        ours = clock_fault(error) or kms_errors.translate(error, operation)
        if ours is None:
            raise
        if isinstance(ours, RefusedError) and hasattr(error, "response"):
            from attestor_io.refusal import explained

            refusal: Any = error
            sent = _sent_pcrs() if refusal.operation_name in SECRET_MEMBER else {}
            ours = explained(ours, refusal.response, parameters, sent)
        raise kms_errors.redacted(ours, session) from error


def clock_fault(error: Exception) -> UnreachableError | None:
    """What the SDK's exception means if this enclave's clock is wrong: no attack, and not final."""
    if not kms_errors.may_be_of_clock(error) or not (wrong := wrong_clock()):
        return None
    return UnreachableError(f"{wrong}: {error}", "set the clock, and try again")


def wrong_clock() -> str:
    """What to say of this enclave's clock if it is wrong, by the module's time; else nothing."""
    behind = _recipient.clock_error() if _recipient else 0.0
    if abs(behind) <= CLOCK_ERROR_MAX:
        return ""
    side = "behind" if behind > 0 else "ahead of"
    from nsm.source import place, title

    return f"clock of this {place()} is {abs(round(behind))} s {side} the {title()}'s"


def _sent_pcrs() -> Mapping[str, Mapping[int, bytes]]:
    """The PCRs, by kind, of the document that was sent last: our own, so parsed, not verified."""
    from nsm.document import AttestationDocument, DocumentError

    try:
        document = AttestationDocument.parse(process_recipient().last_document)
    except DocumentError:
        return {"pcrs": {}}
    if document.source == "nitrotpm":
        return {"nitrotpm_pcrs": document.nitrotpm_pcrs}
    return {"pcrs": document.pcrs}


# ---------------------------------------------------------------------------- edges: the ciphertext


class Binding(NamedTuple):
    """What a ciphertext must be bound to: a key, an encryption context; and tokens of grants.

    With `contains` the context of a message of the AWS Encryption SDK may hold more than this one;
    a CiphertextBlob's is always equal.
    """

    key_id: str | None
    context: Mapping[str, str] = {}
    grant_tokens: tuple[str, ...] = ()
    contains: bool = False

    def parameters(self) -> dict[str, object]:
        """The members of a Decrypt that say so."""
        return {
            "EncryptionContext": self.context,
            **drop_unset(KeyId=self.key_id, GrantTokens=list(self.grant_tokens)),
        }


def drop_unset(**parameters: object) -> dict[str, object]:
    """The parameters that have a value: the SDK takes no None, and KMS no empty list."""
    return {name: value for name, value in parameters.items() if value}


# ------------------------------------------------------------------------- messages and exit status


class _Cli(click.Group):
    """The group of all commands, and the one place where an error becomes an exit status.

    Further commands are loaded when they are called or listed (click's "Lazily Loading
    Subcommands").
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands that are installed."""
        from importlib.util import find_spec

        there = [name for name, spec in FURTHER_COMMANDS.items() if find_spec(_room_of(spec))]
        return sorted([*super().list_commands(ctx), *there])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name; raises InputError for one that is not installed."""
        if cmd_name in FURTHER_COMMANDS:
            command = load(FURTHER_COMMANDS[cmd_name], f"the command {cmd_name}")
        else:
            command = super().get_command(ctx, cmd_name)
        return demand_text(command) if command else None

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run a command and exit; see the module's docstring for the statuses."""
        if sys.argv[1:]:  # completion asks without arguments: with some, nothing must look done
            os.environ.pop("_ATTESTOR_COMPLETE", None)
        kwargs |= {"prog_name": "attestor", "standalone_mode": False}
        sys.exit(_status_of(lambda: super(_Cli, self).main(*args, **kwargs)))


def load(spec: str, what: str) -> Any:
    """The object of "module:name" in a room above this script; `what` is for the message.

    Raises InputError where that room is not installed.
    """
    from importlib import import_module

    module, _, name = spec.partition(":")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {
            _room_of(spec),
            "attestor_eif",
            "keypolicy",
        }:
            raise
        hint = "this is the script alone: pip install . in a checkout of nitro-attestor brings it"
        raise InputError(f"{what} needs {error.name}, which is not installed", hint) from error


def _room_of(spec: str) -> str:
    return spec.partition(".")[0]


def _status_of(command: Callable[[], Any]) -> int:
    """Run a command to its exit status."""
    try:
        return int(command() or 0)
    except signals.Interrupted as interrupted:
        signals.end_by(interrupted.number)
    except SystemExit as ended:  # click's own: 1 if the reader of a help text went away
        return OutputError.status if ended.code == 1 else int(ended.code or 0)
    except Exception as error:  # noqa: BLE001 - every one becomes a message and a status
        return _report(error)


def _report(error: Exception) -> int:
    """Say what went wrong, and return its exit status."""
    short = shortage(error)
    match error:
        case _ if short and not isinstance(error, OutputError):  # it may come out as any other
            said = f": {error}" if isinstance(error, AttestorError) else ""
            return _fail(UnreachableError.status, f"{short}{said}")
        case OutputError(__cause__=BrokenPipeError()):  # silent, as whoever SIGPIPE ends
            return OutputError.status
        case AttestorError():
            return _fail(error.status, str(error), *error.hints, notes=error.notes)
        case click.exceptions.NoArgsIsHelpError():
            with contextlib.suppress(OSError):
                click.echo(error.format_message(), err=True)
            return InputError.status
        case click.ClickException():
            message = error.format_message().rstrip(".")
            message = message[:1].lower() + message[1:]
            return _fail(InputError.status, message, "--help shows arguments and options")
    return _report_unexpected(error)


def _report_unexpected(error: Exception) -> int:
    """Say where an exception happened, and nothing of its message, which may hold anything."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    code = trace.tb_frame.f_code if trace else None
    if isinstance(error, OSError) and code is click.echo.__code__:  # of a help text
        return _fail(OutputError.status, f"standard output cannot be written: {error.strerror}")
    where = (
        f"{os.path.basename(code.co_filename)}:{trace.tb_lineno}" if trace and code else "nowhere"
    )
    message = f"unexpected {type(error).__name__} at {where}"
    return _fail(1, message, "this is a bug in attestor: please report it")


def _fail(status: int, message: str, *hints: str, notes: Sequence[str] = ()) -> int:
    say("error", message)
    for note in notes:
        say("note", note)
    for hint in hints[:2]:
        say("hint", hint)
    return status


def say(kind: str, message: str) -> None:
    """One line on stderr; nothing from outside in it can add lines or steer a terminal."""
    shown = redact_urls(message)
    line = "".join(character if character.isprintable() else " " for character in shown)
    with contextlib.suppress(OSError):  # a log that is full or gone must not change what happens
        click.echo(f"attestor: {kind}: {line}", err=True)


class _Notes(logging.Handler):
    """Says a line once, however often it is done: the module is opened twice for a document.

    A command that stays has no end of lines, so that no more than the last ones are remembered.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said: deque[str] = deque(maxlen=_NOTES_MAX)

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line not in self._said:
            self._said.append(line)
            say("note", line)


# ------------------------------------------------------------------------------------------ options


def _set_verbose(_context: click.Context, _option: click.Parameter, verbose: bool) -> None:
    """Let our own logger speak and no other: the SDK's loggers print requests and answers whole."""
    if verbose:
        log.handlers = [_Notes()]
        log.setLevel(logging.INFO)
        log.propagate = False


def parse_timeout(_context: click.Context, _option: click.Parameter, text: str) -> Deadline:
    """The deadline of a command, from now on, as an option's value; raises InputError."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise InputError("--timeout wants a number of seconds, more than 0 and at most 86400")
    return Deadline(seconds)


def _parse_hosts(
    _context: click.Context, _option: click.Parameter, pairs: Sequence[str]
) -> dict[str, Address]:
    """NAME=CID:PORT as an option's values; raises InputError."""
    if not pairs:
        return {}
    from attestor_io.vsock import parse_hosts

    return parse_hosts(pairs, "--host-vsock")


def _parse_endpoint(_context: click.Context, _option: click.Parameter, url: str | None) -> Any:
    return names.parse_endpoint(url, "--endpoint-url")


def _parse_key_id(_context: click.Context, _option: click.Parameter, key_id: str | None) -> Any:
    return names.parse_key_id(key_id, "--key-id")


def parse_vsock(
    _context: click.Context, _option: click.Parameter, text: str | None
) -> Address | None:
    """CID:PORT as an option's value; raises InputError."""
    if text is None:
        return None
    from attestor_io.vsock import parse_address

    return parse_address(text)


_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
MODULE_OPTIONS: Final[Mapping[str, _Decorator]] = {
    **SOURCE_OPTIONS,
    "verbose": click.option(
        "-v",
        "--verbose",
        is_flag=True,
        callback=_set_verbose,
        expose_value=False,
        help="say on stderr what is done",
    ),
}
KMS_OPTIONS: Final[Mapping[str, _Decorator]] = {
    "region": click.option(
        "--region",
        metavar="REGION",
        help="AWS region of the key  [env: AWS_REGION, AWS_DEFAULT_REGION]",
    ),
    "key_id": click.option(
        "--key-id",
        metavar="KEY",
        callback=_parse_key_id,
        help="key ARN or id that must answer (or an alias)",
    ),
    "any_key": click.option(
        "--any-key", is_flag=True, help="accept any key, and do not warn about it"
    ),
    "encryption_context": click.option(
        "--context",
        "encryption_context",
        metavar="NAME=VALUE",
        multiple=True,
        callback=parse_context,
        help="encryption context, repeatable",
    ),
    "grant_tokens": click.option(
        "--grant-token",
        "grant_tokens",
        metavar="TOKEN",
        multiple=True,
        help="grant token, repeatable",
    ),
    "endpoint_url": click.option(
        "--endpoint-url",
        metavar="URL",
        callback=_parse_endpoint,
        help="another endpoint, https only",
    ),
    "timeout": click.option(
        "--timeout",
        "deadline",
        metavar="SECONDS",
        default=f"{DEFAULT_TIMEOUT:g}",
        callback=parse_timeout,
        help=f"for everything, retries included  [default: {DEFAULT_TIMEOUT:g}]",
    ),
}
VSOCK_OPTIONS: Final[Mapping[str, _Decorator]] = {
    "vsock": click.option(
        "--vsock",
        metavar="CID:PORT",
        callback=parse_vsock,
        help="reach KMS through the parent's vsock-proxy",
    ),
    "imds_vsock": click.option(
        "--imds-vsock",
        metavar="CID:PORT",
        callback=parse_vsock,
        help="reach the instance metadata service so, for credentials and region",
    ),
    "host_vsock": click.option(
        "--host-vsock",
        metavar="NAME=CID:PORT",
        multiple=True,
        callback=_parse_hosts,
        help="reach another host so, such as that of STS, repeatable",
    ),
}


def options(*groups: Mapping[str, _Decorator], without: Container[str] = ()) -> _Decorator:
    """Give a command the options of these groups, in this order, but for those named `without`."""
    chosen = [one for group in groups for name, one in group.items() if name not in without]

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(chosen):
            command = option(command)
        return command

    return add


# ----------------------------------------------------------------------------------------- commands

FURTHER_COMMANDS: Final = {
    "attest": "attestor_commands.evidence:attest",
    "derive-shared-secret": "attestor_commands.operations:derive_shared_secret",
    "describe": "attestor_commands.evidence:describe",
    "doctor": "attestor_commands.doctor:doctor",
    "eif": "attestor_commands.eif:eif",
    "encrypt": "attestor_commands.encrypt:encrypt",
    "generate-data-key": "attestor_commands.operations:generate_data_key",
    "generate-data-key-pair": "attestor_commands.operations:generate_data_key_pair",
    "generate-random": "attestor_commands.operations:generate_random",
    "inject": "attestor_commands.inject:inject",
    "metadata": "attestor_commands.metadata:metadata",
    "policy": "attestor_commands.policy:policy",
    "serve": "attestor_commands.serve:serve",
    "verify": "attestor_commands.evidence:verify",
}
"""The commands of the rooms above this script, by name: module and object."""

DECRYPT_MESSAGE: Final = "attestor_commands.esdk:decrypt_into"


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(
    __version__, message="%(prog)s %(version)s", help="print the version and exit"
)
def cli() -> None:
    """Get KMS secrets into an AWS Nitro Enclave so that nobody outside it could have read them."""


@cli.command()
@click.argument("ciphertext")
@click.argument("output")
@options(KMS_OPTIONS)
@click.option(
    "--algorithm",
    metavar="NAME",
    shell_complete=complete_from(ALGORITHMS),
    help=f"{', '.join(ALGORITHMS)}  [default: the first]",
)
@click.option("--base64", "base64_text", is_flag=True, help="CIPHERTEXT is base64 text")
@click.option("--signed", is_flag=True, help="demand a signed message of the AWS Encryption SDK")
@click.option("--context-contains", is_flag=True, help="a message's context may hold more names")
@click.option("-f", "--force", is_flag=True, help="replace OUTPUT if it exists")
@options(VSOCK_OPTIONS, MODULE_OPTIONS)
def decrypt(
    ciphertext: str,
    output: str,
    key_id: str | None,
    any_key: bool,
    encryption_context: dict[str, str],
    grant_tokens: tuple[str, ...],
    algorithm: str | None,
    base64_text: bool,
    signed: bool,
    context_contains: bool,
    force: bool,
    **connection: Any,
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
    if any_key and names.is_pinned(key_id):
        raise InputError(f"--any-key contradicts --key-id {key_id}", "leave one of them out")
    check_algorithm(algorithm, "--algorithm", key_id, has_context=bool(encryption_context))
    kms = Kms.connect(key_id, **connection)
    symmetric = is_symmetric(algorithm)
    blob = read_ciphertext(ciphertext, kms.deadline, base64_text=base64_text, message=symmetric)
    if (signed or context_contains) and not isinstance(blob, Message):
        option = "--signed" if signed else "--context-contains"
        raise InputError(f"{option} is of messages of the AWS Encryption SDK, this is none")
    with open_target(output, force=force) as target:
        warn_unless_pinned(key_id, any_key=any_key)
        bound = Binding(key_id, encryption_context, grant_tokens, context_contains)
        if isinstance(blob, Message):
            what = "a message of the AWS Encryption SDK"
            load(DECRYPT_MESSAGE, what)(target, kms, blob, bound, signed=signed)
        else:
            decrypt_into(target, kms, blob, bound, algorithm)


def decrypt_into(
    target: Target, kms: Kms, blob: bytes, bound: Binding, algorithm: str | None = None
) -> None:
    """The pipeline: from a CiphertextBlob to the plaintext in its place, or to an AttestorError."""
    process_recipient()  # 1. an RSA-2048 key pair, and 2. the attestation document that carries it
    answer = kms.call(  # 3. Decrypt with Recipient; 4. unwrap CiphertextForRecipient: `attested`
        "decrypt",
        CiphertextBlob=blob,
        **bound.parameters(),
        **drop_unset(EncryptionAlgorithm=algorithm),
    )
    target.append(answer["Plaintext"])
    target.place()  # 5. the file


def warn_unless_pinned(key_id: str | None, *, any_key: bool) -> None:
    """Say that the parent may have chosen the key, unless one is pinned or that is meant.

    An alias pins none: it means what the account of the parent's credentials says.
    """
    if not (any_key or names.is_pinned(key_id)):
        what = f"{key_id} pins no key" if key_id else "no key is pinned"
        said = f"{what}: the parent may have chosen ciphertext and key"
        say("warning", f"{said}; give a key's ARN or id as --key-id, or --any-key")


def main() -> NoReturn:
    """Run the command line."""
    try:
        sys.exit(_status_of(_prepare_process) or cli.main())
    except SystemExit as end:
        _exit_now(end.code if isinstance(end.code, int) else 1)


def _prepare_process() -> None:
    hold()
    signals.owner.start()
    warnings.simplefilter("ignore")  # of libraries, such as that the clock is off: errors say so
    _hide_memory()
    gc.disable()  # so short a process ends before a collection pays


def _hide_memory() -> None:
    """Forbid core dumps, which execve keeps, and debuggers, which it does not (prctl(2))."""
    import ctypes  # the NSM's transport needs it anyway
    import resource

    os.environ.pop("SSLKEYLOGFILE", None)  # would open our TLS to whoever recorded it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _exit_now(status: int) -> NoReturn:
    """End at once: taking the interpreter apart would cost a tenth of the time that users wait."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
    os._exit(status)


if __name__ == "__main__":
    # further commands import this module by its name: they must not get a second copy, with a
    # second key pair
    sys.modules.setdefault("attestor", sys.modules[__name__])
    main()
