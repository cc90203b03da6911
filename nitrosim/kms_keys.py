"""The keys of the simulated KMS: moto's, with what moto lacks or gets wrong made right.

Ours are the ciphertexts (moto's confuse contexts whose names and values join to the same text, and
its RSA ones are not RSA), the resolution of identifiers, the states and usages. Creating,
describing, tagging, aliasing, signing and the like are moto's own. Nothing is shared between two
`Keys`, and nothing is written anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from typing import TYPE_CHECKING, Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from moto.core.exceptions import JsonRESTError
from moto.kms.models import Key, KmsBackend
from moto.kms.responses import KmsResponse

from nitrosim.kms_wire import KmsError, Parameters, invalid

if TYPE_CHECKING:
    from collections.abc import Mapping

SYMMETRIC: Final = "SYMMETRIC_DEFAULT"
OAEP: Final[Mapping[str, type[hashes.HashAlgorithm]]] = {
    "RSAES_OAEP_SHA_1": hashes.SHA1,
    "RSAES_OAEP_SHA_256": hashes.SHA256,
}
ECDSA: Final[Mapping[str, hashes.HashAlgorithm]] = {
    "ECDSA_SHA_256": hashes.SHA256(),
    "ECDSA_SHA_384": hashes.SHA384(),
    "ECDSA_SHA_512": hashes.SHA512(),
}
PLAINTEXT_MAX: Final = 4096
CIPHERTEXT_MAX: Final = 6144

_PREFIX: Final = bytes.fromhex("0102020078")  # how KMS's own ciphertexts begin, "AQICAH" in base64
_HANDLE_SIZE: Final = 32
_IV_SIZE: Final = 12
_HEADER_SIZE: Final = len(_PREFIX) + _HANDLE_SIZE + 4

# What moto answers as KMS does; the operations that need a key's secret are in
# nitrosim.kms_operations.
_MOTOS_OWN: Final = frozenset(
    """
    CancelKeyDeletion CreateAlias CreateGrant CreateKey DeleteAlias DescribeKey DisableKey
    DisableKeyRotation EnableKey EnableKeyRotation GenerateMac GetKeyPolicy GetKeyRotationStatus
    GetPublicKey ListAliases ListGrants ListKeyPolicies ListKeyRotations ListKeys ListResourceTags
    ListRetirableGrants PutKeyPolicy RetireGrant RevokeGrant RotateKeyOnDemand ScheduleKeyDeletion
    Sign TagResource UntagResource UpdateAlias UpdateKeyDescription Verify VerifyMac
    """.split()
)


class _Backend(KmsBackend):
    """moto's keys, the multi-Region ones with the ids of AWS: "mrk-" and 32 digits, not a UUID's
    36 characters; and symmetric ones without the RSA key that moto makes for them as well, which
    takes most of the simulator's start.
    """

    def create_key(
        self,
        policy: str | None,
        key_usage: str,
        key_spec: str,
        description: str,
        tags: list[dict[str, str]] | None,
        multi_region: bool = False,
        origin: str = "AWS_KMS",
    ) -> Key:
        symmetric = key_spec in {None, "", SYMMETRIC}
        spec = "ECC_NIST_P256" if symmetric else key_spec  # the quickest to make
        key = super().create_key(policy, key_usage, spec, description, None, multi_region, origin)
        if symmetric:
            key.key_spec = SYMMETRIC
            key.private_key = None  # type: ignore[assignment]  # there is none
        if multi_region:
            del self.keys[key.id]
            key.id = f"mrk-{key.id.removeprefix('mrk-').replace('-', '')}"
            key.arn = f"{key.arn.rpartition('/')[0]}/{key.id}"
            key.multi_region_configuration["PrimaryKey"]["Arn"] = key.arn
            self.keys[key.id] = key
        if tags:
            self.tagger.tag_resource(key.id, tags)
        return key


class _Moto(KmsResponse):
    """moto's operations on one backend of ours instead of its global ones, without its request
    dispatcher.
    """

    def __init__(self, backend: KmsBackend, parameters: Mapping[str, object]) -> None:
        super().__init__()
        self._backend = backend
        self.region = backend.region_name
        self.current_account = backend.account_id
        self.body = json.dumps(parameters)

    @property
    def kms_backend(self) -> KmsBackend:
        return self._backend

    def _validate_cmk_id(self, key_id: str) -> None:
        """Refuse what is no key's id; moto takes that of a multi-Region key for none."""
        if self._backend.get_key_id(key_id) not in self._backend.keys:
            super()._validate_cmk_id(key_id)


class Keys:
    """Every key of one account in one region."""

    def __init__(self, region: str, account: str) -> None:
        self._backend = _Backend(region, account)
        self._arn = f"arn:{self._backend.partition}:kms:{region}:{account}:"

    def create(self, policy: str, alias: str, description: str) -> Key:
        """A symmetric key with an alias; its policy is taken as it is, without a lockout check."""
        key = self._backend.create_key(policy, "ENCRYPT_DECRYPT", SYMMETRIC, description, tags=None)
        self._backend.create_alias(key.id, alias)
        return key

    def find(self, identifier: str) -> Key:
        """The key of a key id, key ARN, alias or alias ARN; KmsError if there is none in this
        account and region.
        """
        name = identifier.removeprefix(self._arn)
        if name.startswith("alias/"):
            key_id = self._backend.get_key_id_from_alias(name)
            missing = f"Alias {self._arn}{name} is not found."
        else:
            key_id = name.removeprefix("key/") if name != identifier else name
            arn = identifier if ":" in identifier else f"{self._arn}key/{identifier}"
            missing = f"Key '{arn}' does not exist"
        key = self._backend.keys.get(key_id or "")
        if key is None:
            raise KmsError("NotFoundException", missing)
        return key

    def find_by_ciphertext(self, blob: bytes) -> Key:
        """The key that a symmetric ciphertext was made with."""
        if (
            len(blob) < _HEADER_SIZE
            or _header(blob[len(_PREFIX) : _HEADER_SIZE - 4]) != blob[:_HEADER_SIZE]
        ):
            raise KmsError("InvalidCiphertextException")
        for key in self._backend.keys.values():
            if _header(_handle(key)) == blob[:_HEADER_SIZE]:
                return key
        raise KmsError(
            "AccessDeniedException",
            "The ciphertext refers to a customer master key that does not exist, does not exist "
            "in this region, or "
            "you are not allowed to access.",
        )

    def ask_moto(self, operation: str, parameters: Parameters) -> dict[str, Any]:
        """An operation that is moto's own."""
        if operation not in _MOTOS_OWN:
            raise KmsError("UnknownOperationException")
        members = dict(parameters.members)
        key = self.find(parameters.text("KeyId")) if members.get("KeyId") else None
        if key is not None:
            members["KeyId"] = key.id  # moto takes an ARN in some operations only
        moto = _Moto(self._backend, members)
        try:
            answer = json.loads(getattr(moto, _snake_case(operation))()) or {}
        except JsonRESTError as error:
            raise KmsError(error.error_type, error.message or None) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # moto's way to say that a parameter is missing or of another type
            raise KmsError("ValidationException", f"{operation}: {type(error).__name__}") from error
        return _corrected(answer, key)


def _snake_case(operation: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", operation).lower()


def _corrected(answer: dict[str, Any], key: Key | None) -> dict[str, Any]:
    """An answer of moto's with the ARN for the bare key id, and the algorithms that fit the key's
    usage.
    """
    if key is not None and answer.get("KeyId") == key.id:
        answer["KeyId"] = key.arn
    described = answer.get("KeyMetadata", answer)
    if described.get("KeyUsage") == "KEY_AGREEMENT":
        described.update(
            EncryptionAlgorithms=None, SigningAlgorithms=None, KeyAgreementAlgorithms=["ECDH"]
        )
    if "PublicKey" in answer and key is not None:
        answer["KeySpec"] = key.key_spec
    return answer


def check_usable(key: Key, usage: str, operation: str) -> None:
    """Refuse a key that is disabled, about to be deleted, or made for something else."""
    if key.key_state == "Disabled":
        raise KmsError("DisabledException", f"{key.arn} is disabled.")
    if key.key_state != "Enabled":
        state = "pending deletion" if key.key_state == "PendingDeletion" else key.key_state
        raise KmsError("KMSInvalidStateException", f"{key.arn} is {state}.")
    if (key.key_usage or "ENCRYPT_DECRYPT") != usage:
        raise KmsError(
            "InvalidKeyUsageException",
            f"{key.arn} key usage is {key.key_usage} which is not valid for {operation}.",
        )


def check_symmetric(key: Key, operation: str) -> None:
    """Refuse an asymmetric key for an operation that needs a symmetric one."""
    if key.key_spec != SYMMETRIC:
        raise KmsError(
            "InvalidKeyUsageException",
            f"{key.arn} key spec is {key.key_spec} which is not valid for {operation}.",
        )


def material_id(key: Key) -> str:
    """KeyMaterialId: 64 hexadecimal digits that name the material of a symmetric key."""
    return hashlib.sha256(b"material" + key.key_material).hexdigest()


def encrypt(key: Key, algorithm: str, plaintext: bytes, context: Mapping[str, str]) -> bytes:
    """A ciphertext blob under the key; with RSA a bare RSAES-OAEP ciphertext."""
    if algorithm != SYMMETRIC:
        return _encrypt_rsa(key, algorithm, plaintext)
    check_symmetric(key, algorithm)
    header, iv = _header(_handle(key)), os.urandom(_IV_SIZE)
    return (
        header + iv + AESGCM(key.key_material).encrypt(iv, plaintext, header + _canonical(context))
    )


def decrypt(key: Key, algorithm: str, blob: bytes, context: Mapping[str, str]) -> bytes:
    """The plaintext; KmsError (InvalidCiphertextException, without a message) if blob or context
    are not right.
    """
    if algorithm != SYMMETRIC:
        return _decrypt_rsa(key, algorithm, blob)
    check_symmetric(key, algorithm)
    header, iv, sealed = (
        blob[:_HEADER_SIZE],
        blob[_HEADER_SIZE:][:_IV_SIZE],
        blob[_HEADER_SIZE + _IV_SIZE :],
    )
    try:
        return AESGCM(key.key_material).decrypt(iv, sealed, header + _canonical(context))
    except (InvalidTag, ValueError) as error:
        raise KmsError("InvalidCiphertextException") from error


def sign_digest(key: Key, algorithm: str, digest: bytes) -> bytes:
    """An ECDSA signature in DER of a digest, which must be as long as the algorithm's hash."""
    private_key = getattr(key.private_key, "private_key", None)
    hashed = ECDSA.get(algorithm)
    if not isinstance(private_key, ec.EllipticCurvePrivateKey) or hashed is None:
        raise KmsError("ValidationException", f"{key.arn} signs no digest with {algorithm}.")
    if len(digest) != hashed.digest_size:
        raise KmsError("ValidationException", "Digest is invalid length for algorithm.")
    return private_key.sign(digest, ec.ECDSA(Prehashed(hashed)))


def derive(key: Key, public_key: ec.EllipticCurvePublicKey) -> bytes:
    """The raw ECDH secret: the x coordinate, as long as the curve's field."""
    private_key = getattr(key.private_key, "private_key", None)
    if (
        not isinstance(private_key, ec.EllipticCurvePrivateKey)
        or private_key.curve.name != public_key.curve.name
    ):
        raise KmsError(
            "ValidationException",
            f"The public key is on {public_key.curve.name}, the key is {key.key_spec}.",
        )
    return private_key.exchange(ec.ECDH(), public_key)


def _handle(key: Key) -> bytes:
    """What names a key inside its ciphertexts."""
    return hashlib.sha256(key.arn.encode()).digest()


def _header(handle: bytes) -> bytes:
    """The start of a ciphertext; its checksum tells a damaged handle from an unknown key's."""
    return _PREFIX + handle + zlib.crc32(handle).to_bytes(4, "big")


def _canonical(context: Mapping[str, str]) -> bytes:
    return json.dumps(context, sort_keys=True).encode()


def _rsa(key: Key, algorithm: str) -> rsa.RSAPrivateKey:
    private_key = getattr(key.private_key, "private_key", None)
    if key.key_spec == SYMMETRIC or not isinstance(private_key, rsa.RSAPrivateKey):
        raise KmsError(
            "InvalidKeyUsageException",
            f"{algorithm} is not valid for {key.arn}, whose key spec is {key.key_spec}.",
        )
    return private_key


def _oaep(algorithm: str) -> padding.OAEP:
    digest = OAEP[algorithm]()
    return padding.OAEP(padding.MGF1(digest), digest, None)


def _encrypt_rsa(key: Key, algorithm: str, plaintext: bytes) -> bytes:
    public_key = _rsa(key, algorithm).public_key()
    most = (
        public_key.key_size // 8 - 2 * OAEP[algorithm]().digest_size - 2
    )  # RFC 8017, clause 7.1.1
    if len(plaintext) > most:
        raise invalid(
            "Plaintext",
            f"have length less than or equal to {most} for {key.key_spec} with {algorithm}",
        )
    return public_key.encrypt(plaintext, _oaep(algorithm))


def _decrypt_rsa(key: Key, algorithm: str, blob: bytes) -> bytes:
    try:
        return _rsa(key, algorithm).decrypt(blob, _oaep(algorithm))
    except ValueError as error:
        raise KmsError("InvalidCiphertextException") from error
