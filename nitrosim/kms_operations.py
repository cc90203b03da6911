"""The operations of the simulated KMS that need a key's secret.

Each gives the whole answer as KMS gives it without a Recipient, with bytes for what is base64 on
the wire; `nitrosim.kms` seals the secret member for a recipient afterwards. Every one authorises
first, through the function it is given, then looks at the key's state and usage, then at the
cryptography.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from moto.kms.models import Key

from nitrosim import kms_keys
from nitrosim.kms_keys import CIPHERTEXT_MAX, OAEP, PLAINTEXT_MAX, SYMMETRIC, Keys
from nitrosim.kms_wire import KmsError, Parameters

Answer = dict[str, Any]
Authorize = Callable[[str, Key, Mapping[str, str]], None]
"""Called with the operation's name, the key, and the encryption context; raises KmsError."""

SECRETS: Final[Mapping[str, str]] = {
    "Decrypt": "Plaintext",
    "GenerateDataKey": "Plaintext",
    "GenerateDataKeyPair": "PrivateKeyPlaintext",
    "GenerateRandom": "Plaintext",
    "DeriveSharedSecret": "SharedSecret",
}
"""The five operations that take a Recipient, and the member of their answers that is sealed for it.
"""

_ALGORITHMS: Final = (SYMMETRIC, *OAEP)
_RSA_PAIRS: Final = {"RSA_2048": 2048, "RSA_3072": 3072, "RSA_4096": 4096}
_EC_PAIRS: Final[Mapping[str, type[ec.EllipticCurve]]] = {
    "ECC_NIST_P256": ec.SECP256R1,
    "ECC_NIST_P384": ec.SECP384R1,
    "ECC_NIST_P521": ec.SECP521R1,
    "ECC_SECG_P256K1": ec.SECP256K1,
}
_PUBLIC_KEY_MAX: Final = 8192
_MESSAGE_MAX: Final = 4096


class Operations:
    """What KMS does with the keys of one account and region."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._known: Mapping[str, Callable[[Parameters, Authorize], Answer]] = {
            "Decrypt": self._decrypt,
            "DeriveSharedSecret": self._derive_shared_secret,
            "Encrypt": self._encrypt,
            "GenerateDataKey": self._generate_data_key,
            "GenerateDataKeyWithoutPlaintext": self._generate_data_key_without_plaintext,
            "GenerateDataKeyPair": self._generate_data_key_pair,
            "GenerateDataKeyPairWithoutPlaintext": self._generate_data_key_pair_without_plaintext,
            "GenerateRandom": self._generate_random,
            "ReEncrypt": self._re_encrypt,
            "Sign": self._sign,
        }

    def run(self, operation: str, parameters: Parameters, authorize: Authorize) -> Answer:
        """Do one operation and give its answer; KmsError if it is refused.

        A dry run is refused last, once everything else has been found right.
        """
        known = self._known.get(operation)
        if known is None:
            return self._keys.ask_moto(operation, parameters)
        answer = known(parameters, authorize)
        if operation != "GenerateRandom" and parameters.flag("DryRun"):
            raise KmsError(
                "DryRunOperationException",
                "The request would have succeeded, but the DryRun option is set.",
            )
        return answer

    def _encrypt(self, parameters: Parameters, authorize: Authorize) -> Answer:
        plaintext = parameters.blob("Plaintext", PLAINTEXT_MAX)
        algorithm = parameters.choice("EncryptionAlgorithm", _ALGORITHMS, SYMMETRIC)
        key, context = self._key_to_encrypt(parameters, authorize, "Encrypt")
        blob = kms_keys.encrypt(key, algorithm, plaintext, context)
        return {"CiphertextBlob": blob, "KeyId": key.arn, "EncryptionAlgorithm": algorithm}

    def _decrypt(self, parameters: Parameters, authorize: Authorize) -> Answer:
        ignore = "IGNORE_CIPHERTEXT" in parameters.names("DryRunModifiers") and parameters.flag(
            "DryRun"
        )
        blob = b"" if ignore else parameters.blob("CiphertextBlob", CIPHERTEXT_MAX)
        algorithm = parameters.choice("EncryptionAlgorithm", _ALGORITHMS, SYMMETRIC)
        identifier = parameters.text("KeyId") if "KeyId" in parameters or ignore else None
        context, key = parameters.context(), self._key_to_decrypt(identifier, algorithm, blob)
        authorize("Decrypt", key, context)
        kms_keys.check_usable(key, "ENCRYPT_DECRYPT", "Decrypt")
        plaintext = b"" if ignore else kms_keys.decrypt(key, algorithm, blob, context)
        answer: Answer = {
            "KeyId": key.arn,
            "Plaintext": plaintext,
            "EncryptionAlgorithm": algorithm,
        }
        return answer | _material(key)

    def _re_encrypt(self, parameters: Parameters, authorize: Authorize) -> Answer:
        blob = parameters.blob("CiphertextBlob", CIPHERTEXT_MAX)
        source_algorithm = parameters.choice("SourceEncryptionAlgorithm", _ALGORITHMS, SYMMETRIC)
        algorithm = parameters.choice("DestinationEncryptionAlgorithm", _ALGORITHMS, SYMMETRIC)
        identifier = parameters.text("SourceKeyId") if "SourceKeyId" in parameters else None
        source, key = (
            self._key_to_decrypt(identifier, source_algorithm, blob),
            self._find(parameters, "DestinationKeyId"),
        )
        old, new = (
            parameters.context("SourceEncryptionContext"),
            parameters.context("DestinationEncryptionContext"),
        )
        authorize("ReEncryptFrom", source, old)
        authorize("ReEncryptTo", key, new)
        for one in (source, key):
            kms_keys.check_usable(one, "ENCRYPT_DECRYPT", "ReEncrypt")
        plaintext = kms_keys.decrypt(source, source_algorithm, blob, old)
        return {
            "CiphertextBlob": kms_keys.encrypt(key, algorithm, plaintext, new),
            "SourceKeyId": source.arn,
            "KeyId": key.arn,
            "SourceEncryptionAlgorithm": source_algorithm,
            "DestinationEncryptionAlgorithm": algorithm,
        }

    def _generate_data_key(
        self, parameters: Parameters, authorize: Authorize, operation: str = "GenerateDataKey"
    ) -> Answer:
        plaintext = os.urandom(_data_key_size(parameters))
        key, context = self._key_to_encrypt(parameters, authorize, operation)
        blob = kms_keys.encrypt(key, SYMMETRIC, plaintext, context)
        answer: Answer = {"CiphertextBlob": blob, "Plaintext": plaintext, "KeyId": key.arn}
        return answer | _material(key)

    def _generate_data_key_without_plaintext(
        self, parameters: Parameters, authorize: Authorize
    ) -> Answer:
        answer = self._generate_data_key(parameters, authorize, "GenerateDataKeyWithoutPlaintext")
        return _without(answer, "Plaintext")

    def _generate_data_key_pair(
        self, parameters: Parameters, authorize: Authorize, operation: str = "GenerateDataKeyPair"
    ) -> Answer:
        spec = parameters.choice("KeyPairSpec", (*_RSA_PAIRS, *_EC_PAIRS))
        key, context = self._key_to_encrypt(parameters, authorize, operation)
        kms_keys.check_symmetric(key, operation)
        private_key = _new_pair(spec)
        private = private_key.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        public = private_key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        blob = kms_keys.encrypt(key, SYMMETRIC, private, context)
        answer: Answer = {
            "PrivateKeyCiphertextBlob": blob,
            "PrivateKeyPlaintext": private,
            "PublicKey": public,
        }
        return answer | {"KeyId": key.arn, "KeyPairSpec": spec} | _material(key)

    def _generate_data_key_pair_without_plaintext(
        self, parameters: Parameters, authorize: Authorize
    ) -> Answer:
        answer = self._generate_data_key_pair(
            parameters, authorize, "GenerateDataKeyPairWithoutPlaintext"
        )
        return _without(answer, "PrivateKeyPlaintext")

    def _generate_random(self, parameters: Parameters, authorize: Authorize) -> Answer:  # noqa: ARG002 - no key to ask
        return {"Plaintext": os.urandom(parameters.number("NumberOfBytes", 1, 1024))}

    def _derive_shared_secret(self, parameters: Parameters, authorize: Authorize) -> Answer:
        algorithm = parameters.choice("KeyAgreementAlgorithm", ("ECDH",))
        public_key = _public_key(parameters.blob("PublicKey", _PUBLIC_KEY_MAX))
        key = self._find(parameters, "KeyId")
        authorize("DeriveSharedSecret", key, {})
        kms_keys.check_usable(key, "KEY_AGREEMENT", "DeriveSharedSecret")
        secret = kms_keys.derive(key, public_key)
        return {
            "KeyId": key.arn,
            "SharedSecret": secret,
            "KeyAgreementAlgorithm": algorithm,
            "KeyOrigin": key.origin,
        }

    def _sign(self, parameters: Parameters, authorize: Authorize) -> Answer:
        """Sign a digest; moto signs messages, and would hash a digest once more."""
        key = self._find(parameters, "KeyId")
        authorize("Sign", key, {})
        kms_keys.check_usable(key, "SIGN_VERIFY", "Sign")
        if parameters.choice("MessageType", ("RAW", "DIGEST"), "RAW") == "RAW":
            return self._keys.ask_moto("Sign", parameters)
        algorithm = parameters.choice("SigningAlgorithm", tuple(key.signing_algorithms))
        digest = parameters.blob("Message", _MESSAGE_MAX)
        signature = kms_keys.sign_digest(key, algorithm, digest)
        return {"KeyId": key.arn, "Signature": signature, "SigningAlgorithm": algorithm}

    def _find(self, parameters: Parameters, name: str) -> Key:
        return self._keys.find(parameters.text(name))

    def _key_to_encrypt(
        self, parameters: Parameters, authorize: Authorize, operation: str
    ) -> tuple[Key, dict[str, str]]:
        key, context = self._find(parameters, "KeyId"), parameters.context()
        authorize(operation, key, context)
        kms_keys.check_usable(key, "ENCRYPT_DECRYPT", operation)
        return key, context

    def _key_to_decrypt(self, identifier: str | None, algorithm: str, blob: bytes) -> Key:
        """The key that was named, which must be the one that a symmetric ciphertext names."""
        named = self._keys.find(identifier) if identifier else None
        if named is not None and (algorithm != SYMMETRIC or not blob):
            return named
        if algorithm != SYMMETRIC:
            raise KmsError("ValidationException", f"KeyId is required to decrypt with {algorithm}.")
        key = self._keys.find_by_ciphertext(blob)
        if named is not None and named is not key:
            raise KmsError(
                "IncorrectKeyException",
                "The key ID in the request does not identify a CMK that can perform this "
                "operation.",
            )
        return key


def _material(key: Key) -> Answer:
    return {"KeyMaterialId": kms_keys.material_id(key)} if key.key_spec == SYMMETRIC else {}


def _without(answer: Answer, name: str) -> Answer:
    return {member: value for member, value in answer.items() if member != name}


def _data_key_size(parameters: Parameters) -> int:
    if ("KeySpec" in parameters) == ("NumberOfBytes" in parameters):
        raise KmsError("ValidationException", "Please specify either number of bytes or key spec.")
    if "KeySpec" in parameters:
        return {"AES_128": 16, "AES_256": 32}[parameters.choice("KeySpec", ("AES_256", "AES_128"))]
    return parameters.number("NumberOfBytes", 1, 1024)


def _new_pair(spec: str) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey:
    if spec in _RSA_PAIRS:
        return rsa.generate_private_key(public_exponent=65537, key_size=_RSA_PAIRS[spec])
    return ec.generate_private_key(_EC_PAIRS[spec]())


def _public_key(spki: bytes) -> ec.EllipticCurvePublicKey:
    try:
        public_key = serialization.load_der_public_key(spki)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KmsError(
            "ValidationException", "The public key is no DER SubjectPublicKeyInfo."
        ) from error
    if not isinstance(public_key, ec.EllipticCurvePublicKey):
        raise KmsError("ValidationException", "The public key is not on an elliptic curve.")
    return public_key
