"""Messages of the AWS Encryption SDK as people have them: keys of several regions, required
encryption context, base64 text, and no key commitment.
"""

from __future__ import annotations

import base64
import io
import itertools
import os
from typing import TYPE_CHECKING, Any, Final

import aws_encryption_sdk
import pytest
from aws_encryption_sdk.identifiers import AlgorithmSuite, CommitmentPolicy
from aws_encryption_sdk.structures import EncryptedDataKey, MasterKeyInfo

from attestor import InputError, NotAuthenticError, RefusedError
from attestor_commands import esdk
from attestor_io.names import key_arn_here, key_arn_region
from attestor_io.reading import Base64Text
from tests.test_encrypt import ARN, CONTEXT, DONE, PLAINTEXT, REGION, Safe, message, opened

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.conftest import Enclave

MRK: Final = "mrk-1234abcd12ab34cd56ef1234567890ab"


def arn(
    region: str = REGION, key: str = MRK, account: str = "111122223333", partition: str = "aws"
) -> str:
    return f"arn:{partition}:kms:{region}:{account}:key/{key}"


class Kms(Safe):
    """KMS of one region, which knows the keys of its own region alone, and what replicas seal."""

    def __init__(self, *known: str) -> None:
        super().__init__()
        self.known, self.asked = known, list[str]()

    def encrypt(self, parameters: dict[str, Any]) -> dict[str, Any]:
        return {**super().encrypt(parameters), "KeyId": parameters["KeyId"]}

    def decrypt(self, parameters: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(parameters["KeyId"])
        plaintext, context = self.kept.get(parameters["CiphertextBlob"], (b"", {}))
        if parameters["KeyId"] not in self.known:
            raise RefusedError("NotFoundException")
        if context != parameters["EncryptionContext"]:
            raise RefusedError("InvalidCiphertextException")
        return {"Plaintext": plaintext}


class Wrapping(esdk._Wrapping):
    """Ours, with some of the context required, and with more data keys."""

    def __init__(
        self, kms: Kms, key_id: str, required: tuple[str, ...] = (), others: tuple[str, ...] = ()
    ) -> None:
        super().__init__(kms.encrypt, key_id)
        self.kms, self.required, self.others = kms, required, others

    def get_encryption_materials(self, request: Any) -> Any:
        made = super().get_encryption_materials(request)
        if self.required:
            made.required_encryption_context_keys = self.required
        key = made.data_encryption_key.data_key
        for other in self.others:
            parameters = {"KeyId": other, "Plaintext": key}
            answer = self.kms.encrypt({**parameters, "EncryptionContext": made.encryption_context})
            provider = MasterKeyInfo("aws-kms", other)
            sealed = EncryptedDataKey(provider, answer["CiphertextBlob"])
            made.encrypted_data_keys = {*made.encrypted_data_keys, sealed}
        return made


def sealed(wrapping: Wrapping, context: Mapping[str, str] = CONTEXT) -> bytes:
    client = aws_encryption_sdk.EncryptionSDKClient(
        commitment_policy=CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT
    )
    made, _ = client.encrypt(
        source=PLAINTEXT,
        materials_manager=wrapping,
        encryption_context=dict(context),
        frame_length=1024,
    )
    data: bytes = made
    return data


# -- multi-Region keys


@pytest.mark.parametrize("key_id", [MRK, None, arn(), "alias/any"])
def test_a_message_of_another_region_under_a_multi_region_key(key_id: str | None) -> None:
    kms = Kms(arn())
    made = sealed(Wrapping(kms, arn("us-east-1")))
    assert opened(made, safe=kms, key_id=key_id) == PLAINTEXT
    assert kms.asked == [arn()]


@pytest.mark.parametrize(
    "claimed",
    [
        arn("us-east-1", account="444455556666"),
        arn("us-east-1", partition="aws-cn"),
        arn("us-east-1", key="mrk-" + "0" * 32),
        arn("us-east-1", key=ARN[-36:]),
        arn("us-east-1", key=MRK + "0"),
        arn("us-east-1", key=f"{MRK}\n"),
        arn("us-east-1", key=MRK.upper()),
        arn("us-east-1").replace(":key/", ":alias/"),
        arn("us-east-1").replace(":kms:", ":s3:"),
        f"{arn('us-east-1')}:{arn()}",
        f"arn:aws:kms:us-east-1:444455556666:key/{arn()}",
        arn("us-east-1/../eu-west-1"),
        arn(""),
    ],
)
def test_but_for_the_region_the_arn_must_be_equal(claimed: str) -> None:
    """The parent chooses the message, and with it what it says of its keys."""
    kms = Kms(arn())
    made = sealed(Wrapping(kms, claimed))
    with pytest.raises(RefusedError, match="no data key under") as refused:
        opened(made, safe=kms, key_id=arn())
    assert refused.value.hints == ()
    assert kms.asked == []


def test_a_bare_id_names_a_key_of_this_region_only() -> None:
    key = ARN[-36:]
    kms = Kms(ARN)
    made = sealed(Wrapping(kms, arn("us-east-1", key=key)))
    with pytest.raises(RefusedError, match="no data key under") as refused:
        opened(made, safe=kms, key_id=key)
    assert refused.value.notes == (f"it has one under {arn('us-east-1', key=key)}",)
    assert refused.value.hints[0].startswith("--region us-east-1, or region in a manifest,")
    with pytest.raises(RefusedError, match="any key of KMS in eu-west-1"):
        opened(made, safe=kms, key_id=None)
    assert kms.asked == []


def test_the_key_of_this_region_is_asked_first() -> None:
    kms = Kms(arn())
    others = (arn("eu-central-1"), arn("eu-west-2", key=ARN[-36:]), arn())
    made = sealed(Wrapping(kms, arn("us-east-1"), others=others))
    assert opened(made, safe=kms, key_id=MRK) == PLAINTEXT
    assert kms.asked == [arn()]
    kms.known, kms.asked = (), []
    with pytest.raises(RefusedError, match="NotFoundException"):
        opened(made, safe=kms, key_id=MRK)
    assert kms.asked == [arn()] * 3  # each of its data keys, and none of another key


def test_the_arn_in_another_region() -> None:
    assert key_arn_here(arn("us-east-1"), REGION) == arn()
    assert key_arn_here(arn("cn-north-1", partition="aws-cn"), "cn-northwest-1") == arn(
        "cn-northwest-1", partition="aws-cn"
    )
    for other in (ARN, MRK, "alias/x", f"{arn()}\n", f" {arn()}", arn().replace("key/", "alias/")):
        assert key_arn_here(other, "us-east-1") == other
    assert key_arn_region(arn()) == REGION
    for other in (MRK, "alias/x", arn().replace("key/", "alias/"), arn(key=f"key/{MRK}"), ""):
        assert key_arn_region(other) is None


# -- required encryption context


ALL: Final = {**CONTEXT, "tenant": "x"}


def test_required_context_is_reproduced() -> None:
    kms = Kms(ARN)
    made = sealed(Wrapping(kms, ARN, ("tenant", "stage")), ALL)
    assert b"tenant" not in made
    assert opened(made, safe=kms, context=ALL) == PLAINTEXT


@pytest.mark.parametrize("contains", [False, True])
@pytest.mark.parametrize(
    "context",
    [
        CONTEXT,  # the required name is missing
        {**ALL, "tenant": "y"},
        {**ALL, "more": "z"},
        {**CONTEXT, "tenants": "x"},
        {"tenant": "x"},
    ],
)
def test_required_context_is_exact(context: dict[str, str], contains: bool) -> None:
    kms = Kms(ARN)
    made = sealed(Wrapping(kms, ARN, ("tenant", "stage")), ALL)
    with pytest.raises((RefusedError, NotAuthenticError)):
        opened(made, safe=kms, context=context, contains=contains)


def test_required_context_is_authenticated_by_the_message_too() -> None:
    """Whatever KMS opens: the header's authentication covers what is not in the header."""

    class Open(Kms):
        def decrypt(self, parameters: dict[str, Any]) -> dict[str, Any]:
            return {"Plaintext": self.kept[parameters["CiphertextBlob"]][0]}

    kms = Open(ARN)
    made = sealed(Wrapping(kms, ARN, ("tenant",)), ALL)
    assert opened(made, safe=kms, context=ALL) == PLAINTEXT
    for context in (CONTEXT, {**ALL, "tenant": "y"}, {**ALL, "more": "z"}):
        with pytest.raises(NotAuthenticError):
            opened(made, safe=kms, context=context)
    plain = sealed(Wrapping(kms, ARN))
    with pytest.raises(NotAuthenticError):
        opened(plain, safe=kms, context=ALL)


# Written by AWS's own code: the required encryption context CMM around the default one with a KMS
# keyring (aws-cryptographic-material-providers 1.11.3), and a KMS that answered with this data key.
AWS_MESSAGE: Final = base64.b64decode(
    "AgV4MI7RmewYpsElKm6u+L6PuTVGFWUNAjWPuQ73/MPkiaYAaAACABVhd3MtY3J5cHRvLXB1YmxpYy1rZXkAREEw"
    "S3g0WlNOTDdWUFJZbkVXeXdCSllOOFU4SlNPcXVEc0pUcXRIYXdGcnFjUEdQZk5hckpDYkZFVlQ1Y2RrMk9Odz09"
    "AARub2RlAAEzAAEAB2F3cy1rbXMAS2Fybjphd3M6a21zOmV1LXdlc3QtMToxMTExMjIyMjMzMzM6a2V5LzEyMzRh"
    "YmNkLTEyYWItMzRjZC01NmVmLTEyMzQ1Njc4OTBhYgAQNRghUXt658UDCSa0kvMkWQIAAACA3oop46UEDOlRJB09"
    "R+bE3q0LVTQmTIm07RG1UZcSPAWUgpEyPCiWuNv8CL9JGeLg/////wAAAAEAAAAAAAAAAAAAAAEAAAAKO1OKFxyE"
    "veKrsPR2q2DW1qATUuY/KWJXiTgAZzBlAjBAyctLPPry/xHs4Ej5Bi3JewOC6P5LbKvJdhtfiz9dh1V4UwaA+qbk"
    "zypc7N286TICMQCYA1y3AngUFccPY+X9BlMDoka131DWGKpFQPYvxnkbvsr9e8NDm6tCypxy5ILo4p8="
)
AWS_BLOB: Final = bytes.fromhex("351821517b7ae7c5030926b492f32459")
AWS_DATA_KEY: Final = bytes.fromhex(
    "c2342c1e955d87febb539b7c1dcad423375b770fb687329a6723d878a64878b7"
)


def test_a_message_of_aws_with_required_context() -> None:
    class Aws(Kms):
        def decrypt(self, parameters: dict[str, Any]) -> dict[str, Any]:
            context = dict(parameters["EncryptionContext"])
            assert parameters["CiphertextBlob"] == AWS_BLOB
            assert context.pop("aws-crypto-public-key")
            if context != ALL:
                raise RefusedError("InvalidCiphertextException")
            return {"Plaintext": AWS_DATA_KEY}

    assert b"tenant" not in AWS_MESSAGE
    assert opened(AWS_MESSAGE, safe=Aws(), context=ALL, signed=True) == b"the secret"
    for other in (CONTEXT, {**ALL, "tenant": "y"}, {**ALL, "more": "z"}):
        with pytest.raises(RefusedError):
            opened(AWS_MESSAGE, safe=Aws(), context=other)


# -- base64 text


@pytest.mark.parametrize("size", [1, 20_000])
def test_base64_of_a_message(enclave: Enclave, size: int) -> None:
    enclave.place(os.urandom(size), "plain")
    key = ["--key-id", enclave.world.kms.key_arn]
    assert enclave.attestor("encrypt", *key, "--format", "esdk", "plain", "blob") == DONE
    text = base64.encodebytes((enclave.folder / "blob").read_bytes())
    enclave.place(text, "text")
    assert enclave.attestor("decrypt", *key, "--base64", "--signed", "text", "out") == DONE
    assert (enclave.folder / "out").read_bytes() == (enclave.folder / "plain").read_bytes()
    run = enclave.attestor("decrypt", *key, "text", "other")
    assert (run.status, run.error) == (
        2,
        "ciphertext text is base64 text, not the bytes it stands for",
    )
    assert "attestor: hint: add --base64\n" in run.err
    manifest = (
        f'key_id = "{key[1]}"\n[[secret]]\nunbound = true\nsource = "{enclave.folder}/text"\n'
        f'target = "{enclave.folder}/two"\nform = "message"\n'
    )
    enclave.place(manifest.encode(), "raw.toml")
    run = enclave.attestor("inject", "raw.toml")
    assert (run.status, 'hint: add encoding = "base64"\n' in run.err) == (2, True), run.err
    enclave.place(manifest.encode() + b'encoding = "base64"\n', "m.toml")
    assert enclave.attestor("inject", "m.toml") == DONE
    assert (enclave.folder / "two").read_bytes() == (enclave.folder / "plain").read_bytes()
    enclave.place(text[: len(text) * 3 // 4] + b"*" + text[len(text) * 3 // 4 :], "damaged")
    run = enclave.attestor("decrypt", *key, "--base64", "damaged", "other")
    assert (run.status, run.error) == (2, "ciphertext damaged is not base64 text")
    assert "other" not in enclave.files()


class Stream:
    """Gives what it has in pieces of any size, as a pipe does behind a buffer: exactly so many."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, size: int = -1, /) -> bytes:
        end = len(self.data) if size < 0 else size
        piece, self.data = self.data[:end], self.data[end:]
        return piece


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 48 << 10, (48 << 10) + 1, 200_000])
@pytest.mark.parametrize("every", [0, 1, 76])
def test_base64_text_in_pieces(length: int, every: int) -> None:
    data = os.urandom(length)
    text = base64.b64encode(data)
    if every and length < 100_000:
        text = b"\n".join(text[start : start + every] for start in range(0, len(text), every))
    source = Base64Text(Stream(text), "it")
    sizes = itertools.cycle([1, 0, 5, 70_000])
    found = b""
    for size in itertools.islice(sizes, 40):
        piece = source.read(size)
        assert len(piece) == min(size, len(data) - len(found))
        found += piece
    assert found + source.read() + source.read(1) == data


@pytest.mark.parametrize(
    "text", [b"A", b"AA", b"AAA", b"AA=", b"A===", b"AA==AA==", b"AAAA=", b"====", b"AA*A", b"=AAA",
             b"AA==\n=", b"A" * (1 << 16) + b"A", b"A" * ((1 << 16) - 2) + b"==AAAA", b"\xff" * 8]
)  # fmt: skip
def test_what_is_no_base64_text(text: bytes) -> None:
    with pytest.raises(InputError, match="it is not base64 text"):
        Base64Text(Stream(text), "it").read()


def test_a_message_without_commitment_says_so(enclave: Enclave) -> None:
    algorithm = AlgorithmSuite.AES_256_GCM_IV12_TAG16_HKDF_SHA384_ECDSA_P384
    made = message(algorithm=algorithm, policy=CommitmentPolicy.FORBID_ENCRYPT_ALLOW_DECRYPT)
    enclave.place(made)
    run = enclave.decrypt("--context", "node=3", "--context", "stage=test")
    assert run.status == 6
    assert run.error.startswith("message of the AWS Encryption SDK has no key commitment")
    assert "attestor: hint: attestor encrypt, or the AWS Encryption SDK from 2.0 on" in run.err
    assert enclave.files() == {"blob"}


def test_a_multi_region_key_through_the_commands(enclave: Enclave) -> None:
    key = enclave.kms.create_key(MultiRegion=True)["KeyMetadata"]["Arn"]
    elsewhere = key.replace(":eu-west-1:", ":us-east-1:")

    def encrypt(parameters: dict[str, Any]) -> dict[str, Any]:
        """KMS of another region, whose replica has the same key material."""
        return {**enclave.kms.encrypt(**{**parameters, "KeyId": key}), "KeyId": elsewhere}

    pieces: list[bytes] = []
    esdk.encrypt(io.BytesIO(b"the secret"), pieces.append, encrypt, key_id=key, context={})
    enclave.place(b"".join(pieces))
    for options in (["--any-key"], ["--key-id", key], ["--key-id", key.rpartition("/")[2]]):
        assert enclave.attestor("decrypt", *options, "-f", "blob", "out") == DONE
        assert (enclave.folder / "out").read_bytes() == b"the secret"
    manifest = (
        f'key_id = "{key}"\n[[secret]]\nunbound = true\nsource = "{enclave.folder}/blob"\n'
        f'target = "{enclave.folder}/two"\n'
    )
    enclave.place(manifest.encode(), "m.toml")
    assert enclave.attestor("inject", "m.toml") == DONE
