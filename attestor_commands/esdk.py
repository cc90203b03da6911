"""Messages of the AWS Encryption SDK, streamed through the package aws-encryption-sdk.

Their data keys are opened by the attested client.

A message is released frame by frame before its signature is known, so the caller must not let
anybody see what was appended before `decrypt` has returned. Key commitment is demanded. Memory is
bounded by the frame length.
"""

from __future__ import annotations

import functools
import io
import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from attestor import drop_unset
from attestor_commands.versions import VERSION, fault_of
from attestor_io.background import IdleWorker
from attestor_io.errors import AttestorError, InputError, NotAuthenticError, RefusedError
from attestor_io.names import is_pinned, is_same_key, key_arn_here, key_arn_region
from attestor_io.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from concurrent.futures import Future

    from attestor import Binding, Kms
    from attestor_io.reading import Readable
    from attestor_io.secret_file import Target

    Ask = Callable[[dict[str, Any]], Mapping[str, Any]]
    """One operation of a KMS client: its parameters in, its answer out."""

try:
    import aws_encryption_sdk as sdk
    from aws_encryption_sdk.exceptions import ActionNotAllowedError
    from aws_encryption_sdk.identifiers import AlgorithmSuite, CommitmentPolicy
    from aws_encryption_sdk.internal.crypto.authentication import Signer, Verifier
    from aws_encryption_sdk.internal.crypto.elliptic_curve import generate_ecc_signing_key
    from aws_encryption_sdk.internal.defaults import ENCODED_SIGNER_KEY
    from aws_encryption_sdk.materials_managers import EncryptionMaterials
    from aws_encryption_sdk.materials_managers.base import CryptoMaterialsManager
    from aws_encryption_sdk.structures import DataKey, EncryptedDataKey, MasterKeyInfo
except ImportError as missing:
    raise InputError(
        "messages of the AWS Encryption SDK need the package aws-encryption-sdk",
        "pip install '.[esdk]' in a checkout of nitro-attestor brings it",
    ) from missing

FRAME_LENGTH: Final = 1 << 20  # of the messages we write
FRAME_MAX: Final = 16 << 20  # of the messages we read; the body, where there are no frames
DATA_KEYS_MAX: Final = 10
_CHUNK: Final = 1 << 20
_WORTH_WAKING: Final = 1 << 16  # bytes to hash, for the thread that does it
_ALGORITHM: Final = AlgorithmSuite.AES_256_GCM_HKDF_SHA512_COMMIT_KEY_ECDSA_P384
_RESERVED: Final = "aws-crypto-"  # encryption context, AWS Encryption SDK message format reference

# the package's errors are ours to report, and it can log keys
_quiet = logging.getLogger("aws_encryption_sdk")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


def decrypt(
    message: Readable,
    append: Callable[[bytes], None],
    ask: Ask,
    bound: Binding,
    *,
    region: str,
    signed: bool = False,
    minimum_version: int | None = None,
) -> str | None:
    """Decrypt a message and hand on its plaintext in pieces, authentic only when this returns.

    Returns the version in its context, if there is one.

    The context of `bound` must be the message's, without the names that the AWS Encryption SDK
    reserves, as that of a CiphertextBlob must be its own: the parent chooses which form it serves.
    `region` is that of the KMS that `ask` calls, where a multi-Region key of the message has its
    replica. With `signed` an unsigned message is refused, with `minimum_version` one whose header
    has an older version or none, unless the context of `bound` says which. Raises NotAuthenticError
    for everything that is wrong with the message itself, RefusedError when KMS refuses.
    """
    minimum = None if VERSION in bound.context else minimum_version
    materials = _Materials(ask, bound, region, minimum, signed=signed)
    for piece in _verified(message, materials):
        append(piece)
    return materials.version


def _verified(message: Readable, materials: CryptoMaterialsManager) -> Iterator[bytes]:
    """The pieces of the plaintext; the package's errors, whichever they are, become ours."""
    client = sdk.EncryptionSDKClient(
        commitment_policy=CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT,
        max_encrypted_data_keys=DATA_KEYS_MAX,
    )
    stream = client.stream(
        mode="d", source=message, materials_manager=materials, max_body_length=FRAME_MAX
    )
    try:
        size = stream.header.frame_length or _CHUNK
        if stream.verifier is not None:
            stream.verifier = _HashedBeside(stream.verifier)
        while piece := stream.read(size):
            yield piece
        stream.close()  # fails if the footer was not read
    except AttestorError:
        raise
    except ActionNotAllowedError as error:  # of the commitment policy above, in decryption
        raise NotAuthenticError(
            "message of the AWS Encryption SDK has no key commitment, which is demanded here: "
            "it could open to different plaintexts with different keys",
            "attestor encrypt, or the AWS Encryption SDK from 2.0 on, writes one with it",
        ) from error
    except Exception as error:
        raise NotAuthenticError(
            "message of the AWS Encryption SDK is damaged, not authentic or out of bounds "
            f"({type(error).__name__})"
        ) from error
    finally:
        # its own would complain on stderr of a message that was given up, from Python 3.13 on
        io.IOBase.close(stream)
    if message.read(1):
        raise NotAuthenticError("message of the AWS Encryption SDK has bytes behind its end")


_hasher: Final = functools.cache(IdleWorker)
"""One thread for all messages of this process: an enclave has few cores."""


class _HashedBeside:
    """The package's verifier, fed by another thread: SHA-384 of a message takes as long as all
    the rest of it, and needs no lock of Python's.

    One frame at most waits while the next is read, so that memory stays bounded.
    """

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier
        self._pieces: list[bytes] = []
        self._size = 0
        self._hashing: Future[None] | None = None

    def update(self, data: bytes) -> None:
        """Take what the signature covers, in order."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size >= _WORTH_WAKING:
            self._hash()

    def verify(self, signature: bytes) -> None:
        """Verify the signature over all of it; raises what the package's verifier does."""
        self._hash()
        self._wait()
        self._verifier.verify(signature)

    def _hash(self) -> None:
        self._wait()
        pieces, self._pieces, self._size = self._pieces, [], 0

        def update() -> None:
            for piece in pieces:
                self._verifier.update(piece)

        self._hashing = _hasher().submit(update)

    def _wait(self) -> None:
        if self._hashing is not None:
            self._hashing.result()


@dataclass(frozen=True, slots=True)
class _DecryptionMaterials:
    """What the package needs to open a message; it tells by its attributes what it may ask for.

    Required encryption context is in no header, but the header's authentication covers it: the
    "encryption context to only authenticate" of the AWS Encryption SDK specification, decrypt.md.
    """

    verification_key: bytes | None
    data_key: DataKey = field(repr=False)
    encryption_context: Mapping[str, str]
    required_encryption_context_keys: tuple[str, ...]


class _Materials(CryptoMaterialsManager):  # type: ignore[misc]  # the package has no types
    """Decides whether a message may be opened, and gets its data key from KMS."""

    def __init__(
        self, ask: Ask, bound: Binding, region: str, minimum_version: int | None, *, signed: bool
    ) -> None:
        self._ask, self._bound, self._region, self._signed = ask, bound, region, signed
        self._minimum_version = minimum_version
        self.version: str | None = None

    def get_encryption_materials(self, request: Any) -> Any:
        """Never called: this is for decryption."""
        raise NotImplementedError

    def decrypt_materials(self, request: Any) -> _DecryptionMaterials:
        """Data key and verification key of a message whose header was parsed."""
        found = request.encryption_context
        self._check_context(found)
        self._check_version(found)
        required = {name: value for name, value in self._bound.context.items() if name not in found}
        context = {**found, **required}
        self.version = context.get(VERSION)
        return _DecryptionMaterials(
            verification_key=self._verification_key(request.algorithm, found),
            data_key=self._data_key(request, context, required),
            encryption_context=context,
            required_encryption_context_keys=tuple(required),
        )

    def _check_context(self, found: Mapping[str, str]) -> None:
        """Refuse a header whose context differs from what was asked for.

        What was asked for and is not in it can only be required encryption context: whether it is,
        KMS says, which is asked for all of it.
        """
        asked = self._bound.context
        differing = [
            name
            for name, value in asked.items()
            if found.get(name, value) != value or (name not in found and _is_reserved(name))
        ]
        if not self._bound.contains:
            known = {*asked, *([VERSION] if self._minimum_version else [])}
            differing += [name for name in found if not (name in known or _is_reserved(name))]
        if differing:
            reason = (
                f"message of the AWS Encryption SDK has another context: {differing[0]} differs"
            )
            hint = "--context-contains, or context_contains = true, lets it hold more names"
            more = set(differing).isdisjoint(asked)
            raise NotAuthenticError(reason, *([hint] if more else []))

    def _check_version(self, found: Mapping[str, str]) -> None:
        """Refuse an old message: the header's authentication, which comes next, covers this."""
        if self._minimum_version:
            fault = fault_of(found.get(VERSION), self._minimum_version)
            if fault:
                raise NotAuthenticError(f"message of the AWS Encryption SDK {fault}")

    def _verification_key(self, algorithm: Any, context: Mapping[str, str]) -> bytes | None:
        """The public key that a signed message has in its context, and that an unsigned one has
        not.
        """
        point = context.get(ENCODED_SIGNER_KEY)
        if (algorithm.signing_algorithm_info is None) != (point is None):
            raise NotAuthenticError(
                "message of the AWS Encryption SDK contradicts itself about its signature"
            )
        if point is None and self._signed:
            raise NotAuthenticError(
                "message of the AWS Encryption SDK is not signed, asked for a signed one"
            )
        if point is None:
            return None
        key: bytes = Verifier.from_encoded_point(
            algorithm=algorithm, encoded_point=point
        ).key_bytes()
        return key

    def _data_key(
        self, request: Any, context: Mapping[str, str], required: Mapping[str, str]
    ) -> DataKey:
        """The first data key that KMS opens, of those under our key; this region's come first."""
        refusal: RefusedError | None = None
        keys = [(_arn_of(wrapped), wrapped) for wrapped in request.encrypted_data_keys]
        for arn, wrapped in sorted(keys, key=lambda key: (self._is_elsewhere(key[0]), key[0])):
            here = key_arn_here(arn, self._region)
            if self._is_elsewhere(here) or not self._is_ours(here):
                continue
            try:
                return self._ask_for(wrapped, here, context, request.algorithm.data_key_len)
            except RefusedError as error:
                refusal = error
        if refusal is None:
            raise self._no_data_key(filter(None, (arn for arn, _ in keys)))
        if required:
            # KMS cannot tell a name that is missing from a value that differs
            names = ", ".join(required)
            note = f"the message's header has no {names}: asked for as required encryption context"
            refusal.notes = (*refusal.notes, note)
        raise refusal

    def _is_elsewhere(self, arn: str) -> bool:
        return key_arn_region(arn) != self._region

    def _is_ours(self, arn: str) -> bool:
        return self._bound.key_id is None or is_same_key(self._bound.key_id, arn)

    def _no_data_key(self, arns: Iterable[str]) -> RefusedError:
        """What to say of a message with data keys of KMS under these ARNs, or under none."""
        pinned = is_pinned(self._bound.key_id)
        wanted = f"key {self._bound.key_id}" if pinned else f"any key of KMS in {self._region}"
        found = sorted(set(arns))
        hints = [
            f"--region {key_arn_region(arn)}, or region in a manifest, asks where that key is"
            for arn in found
            if self._is_ours(arn)  # and so elsewhere
        ]
        reason = f"message of the AWS Encryption SDK has no data key under {wanted}"
        refusal = RefusedError(reason, *hints[:1])
        refusal.notes = tuple(f"it has one under {arn}" for arn in found)
        return refusal

    def _ask_for(self, wrapped: Any, arn: str, context: Mapping[str, str], length: int) -> DataKey:
        answer = self._ask(
            {
                "CiphertextBlob": wrapped.encrypted_data_key,
                "KeyId": arn,
                "EncryptionContext": context,
                **drop_unset(GrantTokens=list(self._bound.grant_tokens)),
            }
        )
        if len(answer["Plaintext"]) != length:
            raise NotAuthenticError(
                "data key in the message of the AWS Encryption SDK has a wrong length"
            )
        return DataKey(wrapped.key_provider, answer["Plaintext"], wrapped.encrypted_data_key)


def _arn_of(wrapped: Any) -> str:
    """The ARN of the KMS key that wraps a data key; empty if something else does."""
    provider = wrapped.key_provider
    if provider.provider_id not in {"aws-kms", b"aws-kms"}:
        return ""
    info = provider.key_info
    arn = info.decode(errors="replace") if isinstance(info, bytes) else str(info)
    return arn if key_arn_region(arn) else ""


def _is_reserved(name: str) -> bool:
    return name.startswith(_RESERVED)


def decrypt_into(
    target: Target, kms: Kms, message: Readable, bound: Binding, *, signed: bool
) -> None:
    """Decrypt one message into one target, which is placed once the message is authentic."""

    def ask(parameters: dict[str, Any]) -> Mapping[str, Any]:
        return kms.call("decrypt", **parameters)

    with Progress("decrypted") as progress:
        append = progress.counting(target.append)
        decrypt(message, append, ask, bound, region=kms.region, signed=signed)
    target.place()


def encrypt(
    plaintext: Readable,
    append: Callable[[bytes], None],
    ask: Ask,
    *,
    key_id: str,
    context: Mapping[str, str],
) -> None:
    """Write a message, signed and with key commitment; `ask` is Encrypt of a KMS client.

    The data key is made here and wrapped by Encrypt, so that an operator needs no permission that
    could decrypt.
    """
    for name in context:
        if _is_reserved(name):
            raise InputError(
                f"context {name}: names that start with {_RESERVED} are the AWS Encryption SDK's "
                "own"
            )
    client = sdk.EncryptionSDKClient(
        commitment_policy=CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT
    )
    with client.stream(
        mode="e",
        source=plaintext,
        materials_manager=_Wrapping(ask, key_id),
        encryption_context=dict(context),
        frame_length=FRAME_LENGTH,
    ) as stream:
        while piece := stream.read(FRAME_LENGTH):
            append(piece)


class _Wrapping(CryptoMaterialsManager):  # type: ignore[misc]  # the package has no types
    """Makes a data key and a signing key, and lets KMS encrypt the data key."""

    def __init__(self, ask: Ask, key_id: str) -> None:
        self._ask, self._key_id = ask, key_id

    def get_encryption_materials(self, request: Any) -> EncryptionMaterials:
        """Keys for one message; the public one goes into its context."""
        signer = Signer(algorithm=_ALGORITHM, key=generate_ecc_signing_key(algorithm=_ALGORITHM))
        context = {
            **request.encryption_context,
            ENCODED_SIGNER_KEY: signer.encoded_public_key().decode(),
        }
        key = os.urandom(_ALGORITHM.kdf_input_len)
        answer = self._ask({"KeyId": self._key_id, "Plaintext": key, "EncryptionContext": context})
        provider = MasterKeyInfo("aws-kms", answer["KeyId"])
        return EncryptionMaterials(
            algorithm=_ALGORITHM,
            data_encryption_key=DataKey(provider, key, answer["CiphertextBlob"]),
            encrypted_data_keys={EncryptedDataKey(provider, answer["CiphertextBlob"])},
            encryption_context=context,
            signing_key=signer.key_bytes(),
        )

    def decrypt_materials(self, request: Any) -> Any:
        """Never called: this is for encryption."""
        raise NotImplementedError
