"""`attestor generate-data-key`, `-key-pair`, `-random` and `derive-shared-secret`.

The operations beside Decrypt that take a Recipient: their parameters in, files out.
"""

from __future__ import annotations

import base64
import contextlib
from typing import TYPE_CHECKING, Any, Final

import click

from attestor import (
    KMS_OPTIONS,
    MODULE_OPTIONS,
    VSOCK_OPTIONS,
    Kms,
    drop_unset,
    options,
    warn_unless_pinned,
)
from attestor_commands.inputs import FORCE_OPTION
from attestor_commands.placement import Placement
from attestor_commands.public_keys import read_public_key
from attestor_io.errors import InputError, NotAuthenticError
from attestor_io.secret_file import open_target, real_path
from attestor_io.text_options import complete_from

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

_KEY_SIZES: Final[Mapping[str, int]] = {"AES_256": 32, "AES_128": 16}  # DataKeySpec, KMS API
_PAIR_SPECS: Final = (  # DataKeyPairSpec, same place
    "RSA_2048 RSA_3072 RSA_4096 ECC_NIST_P256 ECC_NIST_P384 ECC_NIST_P521 ECC_SECG_P256K1 SM2 "
    "ECC_NIST_EDWARDS25519"
).split()


@click.command()
@click.argument("key")
@click.argument("wrapped")
@options(KMS_OPTIONS)
@click.option(
    "--spec",
    metavar="NAME",
    shell_complete=complete_from(_KEY_SIZES),
    help="AES_256 or AES_128",
)
@click.option(
    "--bytes",
    "size",
    metavar="N",
    type=click.IntRange(1, 1024),
    help="a key of 1 to 1024 bytes instead",
)
@FORCE_OPTION
@options(VSOCK_OPTIONS, MODULE_OPTIONS)
def generate_data_key(
    key: str,
    wrapped: str,
    spec: str | None,
    size: int | None,
    force: bool,
    encryption_context: Mapping[str, str],
    grant_tokens: tuple[str, ...],
    **connection: Any,
) -> None:
    """Let KMS make a symmetric data key for this enclave.

    \b
    Example:
      attestor generate-data-key --key-id arn:aws:kms:... --spec AES_256 data.key data.key.enc

    KEY gets the plaintext key, WRAPPED the CiphertextBlob that `attestor decrypt` opens again with
    the same context. Both files are there, or neither.
    """
    if (spec is None) == (size is None):
        raise InputError("give either --spec or --bytes")
    if spec is not None and spec not in _KEY_SIZES:
        raise InputError(f"--spec {spec} is none of {', '.join(_KEY_SIZES)}")
    kms = _connect(**connection)
    with _Outputs(key, wrapped, force=force) as outputs:
        answer = kms.call(
            "generate_data_key",
            KeyId=connection["key_id"],
            EncryptionContext=encryption_context,
            **drop_unset(KeySpec=spec, NumberOfBytes=size, GrantTokens=list(grant_tokens)),
        )
        _check_size(answer["Plaintext"], size or _KEY_SIZES[spec or ""])
        outputs.write(answer["Plaintext"], answer["CiphertextBlob"])


@click.command()
@click.argument("private")
@click.argument("public")
@click.argument("wrapped")
@options(KMS_OPTIONS)
@click.option(
    "--spec",
    metavar="NAME",
    required=True,
    shell_complete=complete_from(_PAIR_SPECS),
    help="such as ECC_NIST_P256 or RSA_2048, as KMS names them",
)
@click.option(
    "--format", "form", type=click.Choice(("pem", "der")), default="pem", help="[default: pem]"
)
@FORCE_OPTION
@options(VSOCK_OPTIONS, MODULE_OPTIONS)
def generate_data_key_pair(
    private: str,
    public: str,
    wrapped: str,
    spec: str,
    form: str,
    force: bool,
    encryption_context: Mapping[str, str],
    grant_tokens: tuple[str, ...],
    **connection: Any,
) -> None:
    """Let KMS make a key pair for this enclave.

    \b
    Example:
      attestor generate-data-key-pair --key-id arn:aws:kms:... --spec ECC_NIST_P256 KEY PUB ENC

    PRIVATE gets the private key (PKCS #8), PUBLIC the public one (SubjectPublicKeyInfo), WRAPPED
    the CiphertextBlob from which `attestor decrypt` gets the private key in DER again. All three
    files are there, or none.
    """
    if spec not in _PAIR_SPECS:
        raise InputError(f"--spec {spec} is none of {', '.join(_PAIR_SPECS)}")
    kms = _connect(**connection)
    with _Outputs(private, public, wrapped, force=force) as outputs:
        answer = kms.call(
            "generate_data_key_pair",
            KeyId=connection["key_id"],
            KeyPairSpec=spec,
            EncryptionContext=encryption_context,
            **drop_unset(GrantTokens=list(grant_tokens)),
        )
        private_key, public_key = answer["PrivateKeyPlaintext"], answer["PublicKey"]
        if form == "pem":
            private_key = _to_pem(private_key, "PRIVATE KEY")
            public_key = _to_pem(public_key, "PUBLIC KEY")
        outputs.write(private_key, public_key, answer["PrivateKeyCiphertextBlob"])


@click.command()
@click.argument("size", metavar="BYTES", type=click.IntRange(1, 1024))
@click.argument("output")
@options({name: KMS_OPTIONS[name] for name in ("region", "endpoint_url", "timeout")})
@FORCE_OPTION
@options(VSOCK_OPTIONS, MODULE_OPTIONS)
def generate_random(size: int, output: str, force: bool, **connection: Any) -> None:
    """Get 1 to 1024 random bytes from the hardware of KMS.

    \b
    Example:
      attestor generate-random --region eu-west-1 32 seed

    OUTPUT may be "-" for standard output.
    """
    kms = Kms.connect(None, **connection)
    with open_target(output, force=force) as target:
        answer = kms.call("generate_random", NumberOfBytes=size)
        _check_size(answer["Plaintext"], size)
        target.append(answer["Plaintext"])
        target.place()


@click.command()
@click.argument("peer")
@click.argument("output")
@options(KMS_OPTIONS, without={"encryption_context"})
@FORCE_OPTION
@options(VSOCK_OPTIONS, MODULE_OPTIONS)
def derive_shared_secret(
    peer: str, output: str, force: bool, grant_tokens: tuple[str, ...], **connection: Any
) -> None:
    """Agree on a secret: the private key stays in KMS, the peer's public key comes from a file.

    \b
    Example:
      attestor derive-shared-secret --key-id arn:aws:kms:...:key/... peer.pub secret

    PEER is a SubjectPublicKeyInfo in PEM or DER. OUTPUT gets the raw shared secret of ECDH (the x
    coordinate), which wants a key derivation function before it is a key; "-" is standard output.
    """
    public_key = read_public_key(peer, connection["deadline"])
    kms = _connect(**connection)
    with open_target(output, force=force) as target:
        answer = kms.call(
            "derive_shared_secret",
            KeyId=connection["key_id"],
            KeyAgreementAlgorithm="ECDH",
            PublicKey=public_key,
            **drop_unset(GrantTokens=list(grant_tokens)),
        )
        target.append(answer["SharedSecret"])
        target.place()


class _Outputs(Placement):
    """The files that one operation writes, checked before KMS is asked."""

    def __init__(self, *paths: str, force: bool) -> None:
        super().__init__()
        if len({real_path(path) for path in paths}) < len(paths):
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


def _connect(key_id: str | None, *, any_key: bool, **connection: Any) -> Kms:
    """KMS as the options name it, for an operation that needs a key."""
    if key_id is None:
        raise InputError("no key", "--key-id names it")
    warn_unless_pinned(key_id, any_key=any_key)
    return Kms.connect(key_id, **connection)


def _check_size(secret: bytes, size: int) -> None:
    if len(secret) != size:
        raise NotAuthenticError(f"answer of KMS holds {len(secret)} bytes, asked for {size}")


def _to_pem(der: bytes, label: str) -> bytes:
    """Textual encoding of keys (RFC 7468 sections 10 and 13): lines of 64 characters."""
    text = base64.b64encode(der)
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return b"\n".join(
        [f"-----BEGIN {label}-----".encode(), *lines, f"-----END {label}-----\n".encode()]
    )
