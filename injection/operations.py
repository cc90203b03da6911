"""The commands beside `decrypt` that have a Recipient: their parameters in, files out."""

from __future__ import annotations

import base64
import contextlib
import os
import re
from typing import TYPE_CHECKING, Any, Final

from attestor import (
    PLAINTEXT_MAX,
    InputError,
    Kms,
    Message,
    NotAuthenticError,
    connect,
    given,
    open_target,
    read_head,
    warn_unless_pinned,
)
from injection.placement import Placement

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

_KEY_SIZES: Final[Mapping[str, int]] = {
    "AES_256": 32,
    "AES_128": 16,
}  # DataKeySpec, KMS API reference
_PAIR_SPECS: Final = (  # DataKeyPairSpec, same place
    "RSA_2048 RSA_3072 RSA_4096 ECC_NIST_P256 ECC_NIST_P384 ECC_NIST_P521 ECC_SECG_P256K1 SM2 "
    "ECC_NIST_EDWARDS25519"
).split()
_PUBLIC_KEY_MAX: Final = 8192  # PublicKey, same place
_PEM: Final = re.compile(
    rb"\s*-----BEGIN PUBLIC KEY-----\s+([A-Za-z0-9+/=\s]+)-----END PUBLIC KEY-----\s*"
)


def generate_data_key(
    key_file: str,
    wrapped_file: str,
    *,
    spec: str | None,
    size: int | None,
    force: bool,
    key_id: str | None,
    any_key: bool,
    encryption_context: Mapping[str, str],
    grant_tokens: tuple[str, ...],
    **connection: Any,
) -> None:
    """GenerateDataKey: the plaintext key into one file, the CiphertextBlob into another; both or
    neither.
    """
    if (spec is None) == (size is None):
        raise InputError("give either --spec or --bytes")
    if spec is not None and spec not in _KEY_SIZES:
        raise InputError(f"--spec {spec} is none of {', '.join(_KEY_SIZES)}")
    kms = _kms_for(key_id, any_key=any_key, connection=connection)
    with _Files(key_file, wrapped_file, force=force) as files:
        answer = kms.call(
            "generate_data_key",
            KeyId=key_id,
            EncryptionContext=encryption_context,
            **given(KeySpec=spec, NumberOfBytes=size, GrantTokens=list(grant_tokens)),
        )
        _check_size(answer["Plaintext"], size or _KEY_SIZES[spec or ""])
        files.write(answer["Plaintext"], answer["CiphertextBlob"])


def generate_data_key_pair(
    private_file: str,
    public_file: str,
    wrapped_file: str,
    *,
    spec: str,
    form: str,
    force: bool,
    key_id: str | None,
    any_key: bool,
    encryption_context: Mapping[str, str],
    grant_tokens: tuple[str, ...],
    **connection: Any,
) -> None:
    """GenerateDataKeyPair: private key, public key, and the CiphertextBlob of the private one; all
    or none.
    """
    if spec not in _PAIR_SPECS:
        raise InputError(f"--spec {spec} is none of {', '.join(_PAIR_SPECS)}")
    kms = _kms_for(key_id, any_key=any_key, connection=connection)
    with _Files(private_file, public_file, wrapped_file, force=force) as files:
        answer = kms.call(
            "generate_data_key_pair",
            KeyId=key_id,
            KeyPairSpec=spec,
            EncryptionContext=encryption_context,
            **given(GrantTokens=list(grant_tokens)),
        )
        private, public = answer["PrivateKeyPlaintext"], answer["PublicKey"]
        if form == "pem":
            private, public = _pem(private, "PRIVATE KEY"), _pem(public, "PUBLIC KEY")
        files.write(private, public, answer["PrivateKeyCiphertextBlob"])


def generate_random(size: int, output: str, *, force: bool, **connection: Any) -> None:
    """GenerateRandom: 1 to 1024 bytes into one file."""
    kms = connect(None, **connection)
    with open_target(output, force=force) as target:
        answer = kms.call("generate_random", NumberOfBytes=size)
        _check_size(answer["Plaintext"], size)
        target.write(answer["Plaintext"])


def derive_shared_secret(
    peer_file: str,
    output: str,
    *,
    force: bool,
    key_id: str | None,
    any_key: bool,
    grant_tokens: tuple[str, ...],
    **connection: Any,
) -> None:
    """DeriveSharedSecret: the raw ECDH secret of a KMS key and a peer's key into one file."""
    public_key = _read_public_key(peer_file)
    kms = _kms_for(key_id, any_key=any_key, connection=connection)
    with open_target(output, force=force) as target:
        answer = kms.call(
            "derive_shared_secret",
            KeyId=key_id,
            KeyAgreementAlgorithm="ECDH",
            PublicKey=public_key,
            **given(GrantTokens=list(grant_tokens)),
        )
        target.write(answer["SharedSecret"])


class _Files(Placement):
    """The outputs of one operation, checked before KMS is asked."""

    def __init__(self, *paths: str, force: bool) -> None:
        super().__init__()
        if len({os.path.realpath(path) for path in paths}) < len(paths):
            raise InputError("every output wants a file of its own")
        self._paths, self._force = paths, force

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as unfinished:
            unfinished.push(super().__exit__)
            self._files = [self.add(path, force=self._force) for path in self._paths]
            unfinished.pop_all()
        return self

    def write(self, *contents: bytes) -> None:
        """Write all of them, then give all of them their names."""
        for target, content in zip(self._files, contents, strict=True):
            target.append(content)
            target.seal()
        self.place()


def encrypt(
    plaintext_file: str,
    output: str,
    *,
    form: str,
    force: bool,
    key_id: str | None,
    encryption_context: Mapping[str, str],
    grant_tokens: tuple[str, ...],
    **connection: Any,
) -> None:
    """Encrypt, or a message of the AWS Encryption SDK; no Nitro Secure Module is needed."""
    if key_id is None:
        raise InputError("no key", "--key-id names it")
    kms = connect(key_id, **connection, vsock=None, imds_vsock=None)
    head, rest = read_head(plaintext_file, PLAINTEXT_MAX + 1, f"plaintext {plaintext_file}")
    if not head:
        raise InputError(f"plaintext {plaintext_file} is empty")
    if form == "kms" and len(head) > PLAINTEXT_MAX:
        raise InputError(
            f"plaintext {plaintext_file} is longer than the {PLAINTEXT_MAX} bytes that KMS takes"
        )

    def ask(parameters: dict[str, Any]) -> Mapping[str, Any]:
        return kms.call_plainly("encrypt", **parameters, **given(GrantTokens=list(grant_tokens)))

    with open_target(output, force=force) as target:
        if form == "esdk" or len(head) > PLAINTEXT_MAX:
            from injection import esdk

            esdk.encrypt(
                Message(head, rest), target.append, ask, key_id=key_id, context=encryption_context
            )
        else:
            answer = ask(
                {"KeyId": key_id, "Plaintext": head, "EncryptionContext": encryption_context}
            )
            target.append(answer["CiphertextBlob"])
        target.seal()
        target.place()


def _kms_for(key_id: str | None, *, any_key: bool, connection: Mapping[str, Any]) -> Kms:
    if key_id is None:
        raise InputError("no key", "--key-id names it")
    warn_unless_pinned(key_id, any_key=any_key)
    return connect(key_id, **connection)


def _check_size(secret: bytes, size: int) -> None:
    if len(secret) != size:
        raise NotAuthenticError(f"answer of KMS holds {len(secret)} bytes, asked for {size}")


def _pem(der: bytes, label: str) -> bytes:
    """Textual encoding of keys (RFC 7468 sections 10 and 13): lines of 64 characters."""
    text = base64.b64encode(der)
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return b"\n".join(
        [f"-----BEGIN {label}-----".encode(), *lines, f"-----END {label}-----\n".encode()]
    )


def _read_public_key(path: str) -> bytes:
    """A DER SubjectPublicKeyInfo of at most 8192 bytes, from DER or PEM; KMS checks its key."""
    try:
        with open(path, "rb") as source:
            data = source.read(2 * _PUBLIC_KEY_MAX)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise InputError(f"public key {path} cannot be read: {reason}") from error
    if found := _PEM.fullmatch(data):
        with contextlib.suppress(ValueError):
            data = base64.b64decode(b"".join(found[1].split()), validate=True)
    if not data.startswith(b"\x30") or len(data) > _PUBLIC_KEY_MAX:
        raise InputError(
            f"public key {path} is no SubjectPublicKeyInfo in PEM or DER, at most "
            f"{_PUBLIC_KEY_MAX} bytes"
        )
    return data
