"""`attestor encrypt`, and messages of the AWS Encryption SDK: ours, others', and hostile ones."""

from __future__ import annotations

import io
import itertools
import os
import re
import struct
import sys
from typing import TYPE_CHECKING, Any, Final

import aws_encryption_sdk
import pytest
from aws_encryption_sdk.identifiers import AlgorithmSuite, CommitmentPolicy
from aws_encryption_sdk.key_providers.raw import RawMasterKeyProvider
from aws_encryption_sdk.structures import DataKey, EncryptedDataKey, MasterKeyInfo

from attestor import Binding, InputError, NotAuthenticError, RefusedError
from attestor_commands import esdk
from nitrosim.kms import default_policy
from tests.conftest import ROOT, Run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.conftest import Enclave

DONE: Final = Run(0, b"", "")
ARN: Final = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
REGION: Final = "eu-west-1"
CONTEXT: Final = {"node": "3", "stage": "test"}
OPEN_POLICY: Final = """{"Version": "2012-10-17", "Statement": [
    {"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "kms:*", "Resource": "*"}]}"""


# -- the command line


@pytest.mark.parametrize("size", [1, 4096, 4097, 3_000_000])
def test_what_encrypt_makes_decrypt_opens(enclave: Enclave, size: int) -> None:
    plaintext = os.urandom(size)
    enclave.place(plaintext, "plain")
    key = ["--key-id", enclave.world.kms.key_arn, "--context", "node=3"]
    assert enclave.attestor("encrypt", *key, "--context", "stage=x", "plain", "blob") == DONE
    assert enclave.attestor("decrypt", *key, "--context", "stage=x", "blob", "out") == DONE
    assert (enclave.folder / "out").read_bytes() == plaintext
    assert ((enclave.folder / "blob").read_bytes()[:1] == b"\x02") == (size > 4096)


def test_a_message_through_pipes_with_a_part_of_its_context(enclave: Enclave) -> None:
    key = ["--key-id", enclave.world.kms.key_arn]
    contexts = ["--context", "node=3", "--context", "stage=x"]
    made = enclave.attestor(
        "encrypt", *key, *contexts, "--format", "esdk", "-", "-", stdin=b"the secret"
    )
    assert (made.status, made.err) == (0, "")
    part = ["decrypt", *key, "--signed", "--context", "stage=x"]
    run = enclave.attestor(*part, "--context-contains", "-", "-", stdin=made.out)
    assert run == Run(0, b"the secret", "")
    run = enclave.attestor(*part, "-", "-", stdin=made.out)
    assert (run.status, run.out) == (6, b"")
    assert "another context: node differs" in run.error
    assert "--context-contains" in run.err
    assert enclave.files() == set()


@pytest.mark.parametrize("context", [{}, {"node": "3"}, {"node": "3", "purpose": "x"}])
def test_both_forms_have_one_rule_about_contexts(enclave: Enclave, context: dict[str, str]) -> None:
    """The parent chooses which form it serves: none may open where the other does not."""
    enclave.place(b"the secret", "plain")
    asked = ["--key-id", enclave.world.kms.key_arn, "--context", "node=3"]
    for form in ("kms", "esdk"):
        pairs = [part for name in context for part in ("--context", f"{name}={context[name]}")]
        made = enclave.attestor(
            "encrypt", *asked[:2], *pairs, "--format", form, "-f", "plain", form
        )
        assert made == DONE
        run = enclave.attestor("decrypt", *asked, "-f", form, "out")
        assert (run.status == 0) == (context == {"node": "3"}), form


def test_a_key_by_its_id_and_any_key(enclave: Enclave) -> None:
    key_id = enclave.world.kms.key_arn.split("/")[1]
    enclave.place(b"the secret", "plain")
    assert (
        enclave.attestor(
            "encrypt", "--key-id", "alias/nitrosim", "--format", "esdk", "plain", "blob"
        )
        == DONE
    )
    assert enclave.attestor("decrypt", "--key-id", key_id, "blob", "out") == DONE
    assert enclave.decrypt("--force") == DONE
    other = enclave.kms.create_key()["KeyMetadata"]["Arn"]
    run = enclave.attestor("decrypt", "--key-id", other, "blob", "other")
    assert (run.status, run.error) == (
        4,
        f"message of the AWS Encryption SDK has no data key under key {other}",
    )
    assert f"attestor: note: it has one under {enclave.world.kms.key_arn}\n" in run.err


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        (["encrypt", "plain", "out"], 2, "no key"),
        (["encrypt", "--key-id", ARN, "absent", "out"], 2, "cannot be read"),
        (["encrypt", "--key-id", ARN, "empty", "out"], 2, "is empty"),
        (["encrypt", "--key-id", ARN, "--format", "kms", "large", "out"], 2,
         "longer than the 4096 bytes"),
        (["encrypt", "--key-id", ARN, "plain", "absent/out"], 7, "there is no folder absent"),
        (["encrypt", "--key-id", ARN, "plain", "out"], 4, "refused to encrypt: NotFoundException"),
        (["encrypt", "--key-id", ARN, "large", "out"], 4, "refused to encrypt: NotFoundException"),
        (["encrypt", "--key-id", ARN, "--context", "aws-crypto-x=1", "large", "out"], 2,
         "SDK's own"),
        (["encrypt", "--key-id", ARN, "--endpoint-url", "http://localhost:1", "plain", "out"], 2,
         "not https"),
        (["decrypt", "--any-key", "--signed", "plain", "out"], 2, "--signed is of messages"),
        (["decrypt", "--any-key", "--context-contains", "plain", "out"], 2, "this is none"),
    ],
)  # fmt: skip
def test_what_cannot_be(enclave: Enclave, arguments: list[str], status: int, part: str) -> None:
    for name, content in (("plain", b"\x00x"), ("empty", b""), ("large", bytes(5000))):
        enclave.place(content, name)
    run = enclave.attestor(*arguments)
    assert run.status == status, run.err
    assert part in run.error
    assert enclave.files() == {"plain", "empty", "large"}


def test_the_operator_needs_no_permission_that_could_decrypt(
    enclaves: Callable[..., Enclave],
) -> None:
    principal = "arn:aws:iam::111122223333:role/operator"
    policy = default_policy(principal, bytes(47) + b"\1")  # attested operations need another image
    enclave = enclaves(principal=principal, key_policy=policy)
    enclave.place(bytes(5000), "plain")
    key = ["--key-id", enclave.world.kms.key_arn]
    without: dict[str, str | None] = {"LD_PRELOAD": None, "NITROSIM_NSM_SOCKET": None}
    assert enclave.attestor("encrypt", *key, "plain", "blob", environment=without) == DONE
    assert enclave.attestor("decrypt", *key, "blob", "out").status == 4
    assert enclave.files() == {"plain", "blob"}


@pytest.mark.parametrize("where", ["head", "middle", "end"])
def test_a_damaged_message_leaves_nothing(enclave: Enclave, where: str) -> None:
    enclave.place(bytes(3 << 20), "plain")
    key = ["--key-id", enclave.world.kms.key_arn]
    assert enclave.attestor("encrypt", *key, "plain", "blob") == DONE
    message = bytearray((enclave.folder / "blob").read_bytes())
    message[{"head": 40, "middle": len(message) // 2, "end": -1}[where]] ^= 1
    enclave.place(bytes(message))
    run = enclave.attestor("decrypt", *key, "blob", "out")
    assert run.status in {4, 6} if where == "head" else run.status == 6, run.err
    assert enclave.files() == {"plain", "blob"}
    piped = enclave.attestor("decrypt", *key, "blob", "-")
    assert (piped.status, piped.out) == (run.status, b"")


def test_without_the_package_it_is_said_what_is_missing(enclave: Enclave) -> None:
    (enclave.folder / "aws_encryption_sdk.py").write_text("raise ImportError", encoding="utf-8")
    enclave.place(bytes(5000), "plain")
    path = f"{enclave.folder}:{ROOT}"
    run = enclave.attestor(
        "encrypt", "--key-id", ARN, "plain", "out", environment={"PYTHONPATH": path}
    )
    assert run.status == 2
    assert "need the package aws-encryption-sdk" in run.error


# -- other programs


PROGRAM: Final = re.compile(r"```python\n(import aws_encryption_sdk.*?)```", re.DOTALL)


def test_the_program_in_the_documents(enclave: Enclave) -> None:
    (program,) = PROGRAM.findall((ROOT / "docs" / "python.md").read_text(encoding="utf-8"))
    assert len(program.splitlines()) <= 10
    program = program.replace(ARN, enclave.world.kms.key_arn)
    enclave.place(b"the secret", "plain")
    key = ["--key-id", enclave.world.kms.key_arn, "--format", "esdk"]
    assert enclave.attestor("encrypt", *key, "plain", "secret.enc") == DONE
    run = enclave.run(sys.executable, "-c", program)
    assert (run.status, run.out) == (0, b"10 bytes\n"), run.err


@pytest.mark.parametrize("frame_length", [0, 1024, 4096])
def test_messages_of_other_programs(enclaves: Callable[..., Enclave], frame_length: int) -> None:
    enclave = enclaves(key_policy=OPEN_POLICY)
    program = (
        "import aws_encryption_sdk, botocore.session, attestor\n"
        "session = attestor.attested(botocore.session.Session())\n"
        f"arns = [{enclave.world.kms.key_arn!r}]\n"
        "keys = aws_encryption_sdk.StrictAwsKmsMasterKeyProvider(\n"
        "    botocore_session=session, key_ids=arns)\n"
        "client = aws_encryption_sdk.EncryptionSDKClient()\n"
        "message, header = client.encrypt(source=b'0123456789' * 1000, key_provider=keys,\n"
        f"    encryption_context={CONTEXT!r}, frame_length={frame_length})\n"
        "plaintext, _ = client.decrypt(source=message, key_provider=keys)\n"
        "assert plaintext == b'0123456789' * 1000\n"
        "open('blob', 'wb').write(message)"
    )
    run = enclave.run(sys.executable, "-c", program)
    assert run.status == 0, run.err
    key = ["--key-id", enclave.world.kms.key_arn]
    for name, value in CONTEXT.items():
        key += ["--context", f"{name}={value}"]
    assert enclave.attestor("decrypt", *key, "blob", "out") == DONE
    assert (enclave.folder / "out").read_bytes() == b"0123456789" * 1000


# -- hostile messages, without KMS: its part is a table of data keys


class Safe:
    """What KMS is to a message: it wraps data keys, and opens them in their context."""

    def __init__(self) -> None:
        self.kept: dict[bytes, tuple[bytes, Mapping[str, str]]] = {}

    def encrypt(self, parameters: dict[str, Any]) -> dict[str, Any]:
        blob = os.urandom(184)
        self.kept[blob] = (parameters["Plaintext"], parameters["EncryptionContext"])
        return {"CiphertextBlob": blob, "KeyId": ARN}

    def decrypt(self, parameters: dict[str, Any]) -> dict[str, Any]:
        plaintext, context = self.kept.get(parameters["CiphertextBlob"], (b"", {}))
        if (
            not plaintext
            or context != parameters["EncryptionContext"]
            or parameters["KeyId"] != ARN
        ):
            raise RefusedError("InvalidCiphertextException")
        return {"Plaintext": plaintext}


SAFE: Final = Safe()
PLAINTEXT: Final = bytes(range(256)) * 10


def message(plaintext: bytes = PLAINTEXT, frame_length: int = 1024, **config: Any) -> bytes:
    """A message with frames as short as tests want them."""
    client = aws_encryption_sdk.EncryptionSDKClient(
        commitment_policy=config.pop("policy", CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT)
    )
    made, _ = client.encrypt(
        source=plaintext, materials_manager=Wrapping(SAFE.encrypt, ARN, **config),
        encryption_context=CONTEXT, frame_length=frame_length,
        **({"algorithm": config["algorithm"]} if config else {}),
    )  # fmt: skip
    data: bytes = made
    return data


class Wrapping(esdk._Wrapping):
    """Ours, with another algorithm and several data keys."""

    def __init__(self, ask: Any, key_id: str, algorithm: Any = None, data_keys: int = 1) -> None:
        super().__init__(ask, key_id)
        self.algorithm, self.data_keys = algorithm, data_keys

    def get_encryption_materials(self, request: Any) -> Any:
        made = super().get_encryption_materials(request)
        if self.algorithm is not None:
            made.algorithm = self.algorithm
            if self.algorithm.signing_algorithm_info is None:
                made.signing_key = None
                made.encryption_context = request.encryption_context
            key, provider = (
                made.data_encryption_key.data_key[: self.algorithm.kdf_input_len],
                made.data_encryption_key,
            )
            answer = SAFE.encrypt({"Plaintext": key, "EncryptionContext": made.encryption_context})
            wrapped = EncryptedDataKey(provider.key_provider, answer["CiphertextBlob"])
            made.data_encryption_key = DataKey(provider.key_provider, key, answer["CiphertextBlob"])
            made.encrypted_data_keys = {wrapped}
        for _ in range(self.data_keys - 1):
            provider = MasterKeyInfo("aws-kms", ARN)
            made.encrypted_data_keys = {
                *made.encrypted_data_keys,
                EncryptedDataKey(provider, os.urandom(9)),
            }
        return made


def opened(data: bytes, **options: Any) -> bytes:
    """The plaintext, once all of it is known to be authentic."""
    pieces: list[bytes] = []
    signed = options.pop("signed", False)
    safe, region = options.pop("safe", SAFE), options.pop("region", REGION)
    bound = Binding(**{"key_id": ARN, "context": CONTEXT, **options})
    esdk.decrypt(io.BytesIO(data), pieces.append, safe.decrypt, bound, region=region, signed=signed)
    return b"".join(pieces)


def first_frame(made: bytes) -> int:
    """Where the body starts: behind frame length (1024), commitment (32 bytes) and tag (16)."""
    return made.index(struct.pack(">I", 1024)) + 4 + 32 + 16


def test_it_opens() -> None:
    assert opened(message()) == PLAINTEXT
    assert opened(message(b"")) == b""
    assert opened(message(PLAINTEXT[:2048])) == PLAINTEXT[:2048]
    assert opened(message(frame_length=0)) == PLAINTEXT


def test_truncated_anywhere() -> None:
    made = message()
    every_frame = [first_frame(made) + number * (4 + 12 + 1024 + 16) for number in range(3)]
    for length in sorted({*every_frame, *range(0, len(made), 7), len(made) - 1}):
        with pytest.raises(NotAuthenticError):
            opened(made[:length])


def test_every_byte_counts() -> None:
    made = message(b"x" * 200, frame_length=128)
    for position in range(len(made)):
        damaged = bytearray(made)
        damaged[position] ^= 0x40
        with pytest.raises((NotAuthenticError, RefusedError)):
            opened(bytes(damaged))


def test_swapped_and_repeated_frames() -> None:
    made = message()
    start, size = first_frame(made), 4 + 12 + 1024 + 16
    first, second = made[start : start + size], made[start + size : start + 2 * size]
    assert second[:4] == struct.pack(">I", 2)
    rest = made[start + 2 * size :]
    for frames in (second + first, first + first, second + second, first + second + second):
        with pytest.raises(NotAuthenticError):
            opened(made[:start] + frames + rest)


def test_frames_of_another_message() -> None:
    one, other = message(), message()
    with pytest.raises(NotAuthenticError):
        opened(one[: first_frame(one)] + other[first_frame(other) :])


def test_a_wrong_commitment() -> None:
    made = bytearray(message())
    start = made.index(struct.pack(">I", 1024)) + 4  # the commitment stands behind the frame length
    made[start] ^= 1
    with pytest.raises(NotAuthenticError, match="MasterKeyProviderError"):
        opened(bytes(made))


def test_without_commitment() -> None:
    algorithm = AlgorithmSuite.AES_256_GCM_IV12_TAG16_HKDF_SHA384_ECDSA_P384
    made = message(algorithm=algorithm, policy=CommitmentPolicy.FORBID_ENCRYPT_ALLOW_DECRYPT)
    assert made[:2] == b"\x01\x80"
    with pytest.raises(NotAuthenticError, match="has no key commitment") as refused:
        opened(made)
    assert "attestor encrypt" in refused.value.hints[0]


def test_unsigned_where_a_signature_is_asked_for() -> None:
    made = message(algorithm=AlgorithmSuite.AES_256_GCM_HKDF_SHA512_COMMIT_KEY)
    assert opened(made) == PLAINTEXT
    with pytest.raises(NotAuthenticError, match="is not signed"):
        opened(made, signed=True)
    assert opened(message(), signed=True) == PLAINTEXT


@pytest.mark.parametrize("algorithm", [0x0000, 0x0579, 0x0014, 0xFFFF])
def test_an_unknown_or_another_algorithm(algorithm: int) -> None:
    made = message()
    with pytest.raises(NotAuthenticError):
        opened(made[:1] + struct.pack(">H", algorithm) + made[3:])


def test_another_context() -> None:
    made = message()
    assert opened(made, context={"node": "3"}, contains=True) == PLAINTEXT
    assert opened(made, context={}, contains=True) == PLAINTEXT
    for context in ({"node": "4"}, {"node": ""}, {"aws-crypto-x": "1"}):
        for contains in (False, True):
            with pytest.raises(NotAuthenticError, match="another context"):
                opened(made, context=context, contains=contains)
    for contains in (False, True):  # what is not there may be required context: KMS decides
        with pytest.raises(RefusedError) as refused:
            opened(made, context={**CONTEXT, "version": "1"}, contains=contains)
        assert "the message's header has no version" in refused.value.notes[0]
    for context in ({}, {"node": "3"}):
        with pytest.raises(NotAuthenticError, match="another context") as differs:
            opened(made, context=context)
        assert "--context-contains" in differs.value.hints[0]


def test_another_key() -> None:
    for key_id in (ARN[:-1] + "c", ARN[-36:-1] + "c"):
        with pytest.raises(RefusedError, match="no data key under"):
            opened(message(), key_id=key_id)
    assert opened(message(), key_id=ARN[-36:]) == PLAINTEXT
    assert opened(message(), key_id=None) == PLAINTEXT


def test_a_data_key_that_others_wrapped() -> None:
    class Raw(RawMasterKeyProvider):  # type: ignore[misc]  # the package has no types
        provider_id = "theirs"

        def _get_raw_key(self, _key_id: Any) -> Any:
            from aws_encryption_sdk.identifiers import EncryptionKeyType, WrappingAlgorithm
            from aws_encryption_sdk.internal.crypto.wrapping_keys import WrappingKey

            algorithm = WrappingAlgorithm.AES_256_GCM_IV12_TAG16_NO_PADDING
            return WrappingKey(algorithm, bytes(32), EncryptionKeyType.SYMMETRIC)

    raw = Raw()
    raw.add_master_key("key")
    made, _ = aws_encryption_sdk.EncryptionSDKClient().encrypt(source=b"x", key_provider=raw)
    with pytest.raises(RefusedError, match="no data key under any key of KMS"):
        opened(made, key_id=None, context={})


def test_several_data_keys_of_which_one_opens() -> None:
    algorithm = AlgorithmSuite.AES_256_GCM_HKDF_SHA512_COMMIT_KEY_ECDSA_P384
    assert opened(message(algorithm=algorithm, data_keys=5)) == PLAINTEXT


def test_bounds() -> None:
    algorithm = AlgorithmSuite.AES_256_GCM_HKDF_SHA512_COMMIT_KEY_ECDSA_P384
    with pytest.raises(NotAuthenticError, match="out of bounds"):
        opened(message(algorithm=algorithm, data_keys=esdk.DATA_KEYS_MAX + 1))
    with pytest.raises(NotAuthenticError, match="out of bounds"):
        opened(message(b"x", frame_length=esdk.FRAME_MAX + 128))
    large = message(bytes(esdk.FRAME_MAX + 1), frame_length=0)
    with pytest.raises(NotAuthenticError, match="out of bounds"):
        opened(large)


def test_bytes_behind_the_end() -> None:
    with pytest.raises(NotAuthenticError, match="behind its end"):
        opened(message() + b"x")


def test_nothing_is_released_before_the_header_is_authentic() -> None:
    pieces: list[bytes] = []
    made = bytearray(message())
    made[made.index(struct.pack(">I", 1024)) + 4] ^= 1
    bound = Binding(ARN, CONTEXT)
    with pytest.raises(NotAuthenticError):
        esdk.decrypt(io.BytesIO(made), pieces.append, SAFE.decrypt, bound, region=REGION)
    assert pieces == []


def test_reserved_names_of_the_context() -> None:
    with pytest.raises(InputError, match="own"):
        esdk.encrypt(
            io.BytesIO(b"x"),
            lambda _: None,
            SAFE.encrypt,
            key_id=ARN,
            context={"aws-crypto-public-key": "x"},
        )


def test_it_is_read_in_small_pieces() -> None:
    """Memory stays bounded by the frame, whatever the length: no read asks for more."""

    class Counting(io.BytesIO):
        largest = 0

        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            assert size >= 0
            Counting.largest = max(Counting.largest, size)
            return super().read(size)

    sizes: list[int] = []
    made = message(PLAINTEXT * 40)
    stream = Counting(made)

    def append(piece: bytes) -> None:
        sizes.append(len(piece))

    esdk.decrypt(stream, append, SAFE.decrypt, Binding(ARN, CONTEXT), region=REGION)
    assert sum(sizes) == len(PLAINTEXT) * 40
    assert max(itertools.chain(sizes, [Counting.largest])) <= 2048
