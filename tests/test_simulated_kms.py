"""The simulated KMS: what it gives, refuses and can do wrong, and the envelopes it writes.

Through a botocore client over TLS wherever a client can see it; below that only where a client
would hide it.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import socket
import ssl
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import botocore.session
import cbor2
import pytest
from asn1crypto import cms
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials as BotoCredentials
from botocore.exceptions import ClientError, SSLError
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from keypolicy import PolicyError
from nitrosim import envelope, kms, kms_faults, server
from nitrosim.kms import AttestedKms
from nitrosim.kms_wire import KmsError, Parameters
from nitrosim.module import DEFAULT_MODULE_ID, DEFAULT_PCRS, SoftwareNsm
from nitrosim.pki import NsmPki
from nitrosim.server import HttpsServer
from tests.conftest import no_thread_stays

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mypy_boto3_kms import KMSClient
    from mypy_boto3_kms.type_defs import RecipientInfoTypeDef

SECRET: Final = b"correct horse battery staple"
VECTORS: Final = Path(__file__).parents[2] / "shared" / "vectors" / "envelope"


@pytest.fixture(scope="module")
def pki() -> NsmPki:
    return NsmPki.generate(now=datetime.now(UTC), module_id=DEFAULT_MODULE_ID)


@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def spki_of(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def document_of(nsm: SoftwareNsm, public_key: bytes | None) -> bytes:
    fields = {"user_data": None, "nonce": None, "public_key": public_key}
    answer = cbor2.loads(nsm.answer(cbor2.dumps({"Attestation": fields})))
    document = answer["Attestation"]["document"]
    assert isinstance(document, bytes)
    return document


def recipient_of(document: bytes) -> RecipientInfoTypeDef:
    return {"KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_256", "AttestationDocument": document}


RSA_SPKI: Final = spki_of(rsa.generate_private_key(public_exponent=65537, key_size=2048))


@pytest.fixture(scope="module")
def recipient(pki: NsmPki, key: rsa.RSAPrivateKey) -> RecipientInfoTypeDef:
    return recipient_of(document_of(SoftwareNsm(pki), spki_of(key)))


def open_independently(sealed: bytes, key: rsa.RSAPrivateKey) -> bytes:
    """asn1crypto reads the structure, the primitives of cryptography do the rest."""
    info = cms.ContentInfo.load(sealed, strict=True)
    assert info["content_type"].native == "enveloped_data"
    (recipient,) = info["content"]["recipient_infos"]
    inner = info["content"]["encrypted_content_info"]
    assert recipient.chosen["key_encryption_algorithm"]["algorithm"].native == "rsaes_oaep"
    digest = hashes.SHA256()
    content_key = key.decrypt(
        recipient.chosen["encrypted_key"].native, padding.OAEP(padding.MGF1(digest), digest, None)
    )
    algorithm = inner["content_encryption_algorithm"]
    assert algorithm["algorithm"].native == "aes256_cbc"
    decryptor = Cipher(
        algorithms.AES(content_key), modes.CBC(algorithm["parameters"].native)
    ).decryptor()
    padded = decryptor.update(inner["encrypted_content"].native) + decryptor.finalize()
    return padded[: -padded[-1]]


def open_with_openssl(sealed: bytes, key: rsa.RSAPrivateKey, folder: Path) -> bytes:
    pem = folder / "key.pem"
    pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    command = ["openssl", "cms", "-decrypt", "-binary", "-inform", "DER", "-inkey", str(pem)]
    return subprocess.run(command, input=sealed, capture_output=True, check=True).stdout


@dataclass(frozen=True)
class Service:
    """A running simulator, and clients of it."""

    app: AttestedKms
    https: HttpsServer
    folder: Path

    @property
    def ca_file(self) -> str:
        path = self.folder / f"ca-{self.https.port}.pem"
        path.write_bytes(self.https.ca_pem)
        return str(path)

    def client(self, attempts: int = 1, timeout: float = 10, **changes: str) -> KMSClient:
        given = self.app.credentials
        settings: dict[str, Any] = {
            "region_name": self.app.region,
            "endpoint_url": self.https.url,
            "aws_access_key_id": given.access_key,
            "aws_secret_access_key": given.secret_key,
            "aws_session_token": given.token,
        }
        config = Config(
            retries={"total_max_attempts": attempts, "mode": "standard"},
            proxies={},
            read_timeout=timeout,
        )
        unset = {
            "config_file": (None, None, "/dev/null", None),
            "profile": (None, None, None, None),
        }
        session = botocore.session.Session(session_vars=unset)
        client = session.create_client(
            "kms", config=config, verify=self.ca_file, **(settings | changes)
        )
        return cast("KMSClient", client)

    def connect(self) -> http.client.HTTPSConnection:
        context = ssl.create_default_context(cafile=self.ca_file)
        return http.client.HTTPSConnection(
            "localhost", self.https.port, context=context, timeout=10
        )

    def signed(
        self, operation: str, members: dict[str, Any], **headers: str
    ) -> tuple[bytes, dict[str, str]]:
        """The body and headers of a request, signed by botocore."""
        body = json.dumps(members, default=lambda value: base64.b64encode(value).decode()).encode()
        given = self.app.credentials
        request = AWSRequest("POST", f"{self.https.url}/", data=body)
        request.headers["X-Amz-Target"] = f"TrentService.{operation}"
        request.headers["Content-Type"] = "application/x-amz-json-1.1"
        for name, value in headers.items():
            request.headers[name.replace("_", "-")] = value
        credentials = BotoCredentials(given.access_key, given.secret_key, given.token)
        SigV4Auth(credentials, "kms", self.app.region).add_auth(request)
        return body, dict(request.headers.items())

    def post(
        self, body: bytes, headers: dict[str, str]
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        with contextlib.closing(self.connect()) as connection:
            connection.request("POST", "/", body, headers)
            response = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content), response.headers


@contextlib.contextmanager
def running(
    folder: Path, pki: NsmPki, tls_fault: str | None = None, **settings: Any
) -> Iterator[Service]:
    app = AttestedKms(nsm_root_sha256=pki.root_sha256, **settings)
    with HttpsServer(app, region=app.region, fault=tls_fault) as https:
        yield Service(app, https, folder)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, pki: NsmPki) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("service"), pki) as started:
        yield started


@pytest.fixture(scope="module")
def client(service: Service) -> KMSClient:
    return service.client()


@pytest.fixture
def fresh(tmp_path: Path, pki: NsmPki) -> Iterator[Service]:
    """A simulator whose keys the test may spoil."""
    with running(tmp_path, pki) as started:
        yield started


@pytest.fixture(scope="module")
def blob(client: KMSClient) -> bytes:
    return client.encrypt(KeyId=kms.ALIAS, Plaintext=SECRET)["CiphertextBlob"]


@contextlib.contextmanager
def refused(code: str, text: str = "") -> Iterator[None]:
    with pytest.raises(ClientError) as caught:
        yield
    assert caught.value.response["Error"]["Code"] == code
    assert text in caught.value.response["Error"]["Message"]
    assert caught.value.response["ResponseMetadata"]["RequestId"]


def open_policy(service: Service) -> str:
    """A policy that lets the principal do everything, without a document."""
    statement = {
        "Effect": "Allow",
        "Principal": {"AWS": service.app.principal},
        "Action": "kms:*",
        "Resource": "*",
    }
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


@pytest.fixture
def unguarded(fresh: Service) -> KMSClient:
    client = fresh.client()
    client.put_key_policy(KeyId=fresh.app.key_arn, PolicyName="default", Policy=open_policy(fresh))
    return client


# ---- without a Recipient


@pytest.mark.parametrize("context", [{}, {"node": "3", "version": "7"}])
def test_a_ciphertext_opens_under_its_context(
    unguarded: KMSClient, context: dict[str, str]
) -> None:
    sealed = unguarded.encrypt(KeyId=kms.ALIAS, Plaintext=SECRET, EncryptionContext=context)
    opened = unguarded.decrypt(CiphertextBlob=sealed["CiphertextBlob"], EncryptionContext=context)
    assert opened["Plaintext"] == SECRET
    assert opened["KeyId"] == sealed["KeyId"]
    assert opened["EncryptionAlgorithm"] == sealed["EncryptionAlgorithm"] == "SYMMETRIC_DEFAULT"
    assert len(opened["KeyMaterialId"]) == 64


@pytest.mark.parametrize("context", [{}, {"ab": "c"}, {"a": "bc", "d": ""}, {"A": "bc"}])
def test_another_context_is_refused_without_a_message(
    unguarded: KMSClient, context: dict[str, str]
) -> None:
    sealed = unguarded.encrypt(KeyId=kms.ALIAS, Plaintext=SECRET, EncryptionContext={"a": "bc"})
    with refused("InvalidCiphertextException"):
        unguarded.decrypt(CiphertextBlob=sealed["CiphertextBlob"], EncryptionContext=context)


def test_every_flipped_byte_and_every_cut_of_a_ciphertext_is_refused(unguarded: KMSClient) -> None:
    sealed = unguarded.encrypt(KeyId=kms.ALIAS, Plaintext=b"s")["CiphertextBlob"]
    for index in range(len(sealed)):
        with refused("InvalidCiphertextException"):
            unguarded.decrypt(
                CiphertextBlob=sealed[:index] + bytes((sealed[index] ^ 1,)) + sealed[index + 1 :]
            )
        with refused("InvalidCiphertextException" if index else "ValidationException"):
            unguarded.decrypt(CiphertextBlob=sealed[:index])


def test_a_ciphertext_of_another_run_names_an_unknown_key(
    client: KMSClient, fresh: Service, recipient: RecipientInfoTypeDef
) -> None:
    foreign = fresh.client().encrypt(KeyId=kms.ALIAS, Plaintext=SECRET)["CiphertextBlob"]
    with refused("AccessDeniedException", "does not exist in this region"):
        client.decrypt(CiphertextBlob=foreign, Recipient=recipient)


def test_a_key_is_found_by_id_arn_alias_and_alias_arn(fresh: Service) -> None:
    client, arn = fresh.client(), fresh.app.key_arn
    start, _, key_id = arn.rpartition("key/")
    assert arn.startswith("arn:aws:kms:eu-west-1:111122223333:key/")
    for name in (key_id, arn, kms.ALIAS, start + kms.ALIAS):
        assert client.encrypt(KeyId=name, Plaintext=SECRET)["KeyId"] == arn
    for name in ("alias/other", "nonsense", arn[:-1], arn.replace("eu-west-1", "eu-west-2")):
        with refused("NotFoundException"):
            client.encrypt(KeyId=name, Plaintext=SECRET)


def test_a_new_key_and_alias_work_in_the_same_account(fresh: Service) -> None:
    client = fresh.client()
    made = client.create_key()["KeyMetadata"]
    client.create_alias(AliasName="alias/second", TargetKeyId=made["KeyId"])
    sealed = client.encrypt(KeyId="alias/second", Plaintext=SECRET)
    assert sealed["KeyId"] == made["Arn"]
    assert (
        client.decrypt(CiphertextBlob=sealed["CiphertextBlob"], KeyId=made["KeyId"])["Plaintext"]
        == SECRET
    )
    with refused("IncorrectKeyException"):
        client.decrypt(CiphertextBlob=sealed["CiphertextBlob"], KeyId=kms.ALIAS)


def test_a_multi_region_key_has_an_id_as_aws_gives_it(fresh: Service) -> None:
    """ "mrk-" and 32 hexadecimal digits; moto's is a UUID behind the prefix."""
    client = fresh.client()
    made = client.create_key(MultiRegion=True, Tags=[{"TagKey": "a", "TagValue": "b"}])[
        "KeyMetadata"
    ]
    assert re.fullmatch(r"mrk-[0-9a-f]{32}", made["KeyId"])
    assert made["Arn"].endswith(f":key/{made['KeyId']}")
    assert made["MultiRegionConfiguration"]["PrimaryKey"]["Arn"] == made["Arn"]
    client.create_alias(AliasName="alias/many", TargetKeyId=made["KeyId"])
    for name in (made["KeyId"], made["Arn"], "alias/many"):
        sealed = client.encrypt(KeyId=name, Plaintext=SECRET)["CiphertextBlob"]
        assert client.decrypt(CiphertextBlob=sealed, KeyId=name)["Plaintext"] == SECRET
        assert client.describe_key(KeyId=name)["KeyMetadata"]["KeyId"] == made["KeyId"]
    assert client.list_resource_tags(KeyId=made["KeyId"])["Tags"] == [
        {"TagKey": "a", "TagValue": "b"}
    ]
    client.disable_key(KeyId=made["KeyId"])
    with refused("DisabledException"):
        client.encrypt(KeyId=made["KeyId"], Plaintext=SECRET)
    for name in ("mrk-" + 32 * "0", "mrk-12345678-1234-1234-1234-123456789012"):
        with refused("NotFoundException"):
            client.describe_key(KeyId=name)
    with refused("NotFoundException"):
        client.create_alias(AliasName="alias/none", TargetKeyId="mrk-" + 32 * "0")


def test_a_symmetric_key_has_no_private_key(fresh: Service) -> None:
    """Nor is one made for it, which takes longer than the rest of the simulator's start."""
    client = fresh.client()
    with refused("InvalidKeyUsageException"):
        client.encrypt(KeyId=kms.ALIAS, Plaintext=SECRET, EncryptionAlgorithm="RSAES_OAEP_SHA_256")
    with refused("ValidationException"):
        client.get_public_key(KeyId=kms.ALIAS)
    described = client.describe_key(KeyId=kms.ALIAS)["KeyMetadata"]
    assert (described["KeySpec"], described["KeyUsage"]) == ("SYMMETRIC_DEFAULT", "ENCRYPT_DECRYPT")
    assert fresh.app._keys.find(kms.ALIAS).private_key is None


def test_two_simulators_share_no_key(fresh: Service, client: KMSClient) -> None:
    with refused("NotFoundException"):
        client.encrypt(KeyId=fresh.app.key_arn, Plaintext=SECRET)
    assert len(client.list_keys()["Keys"]) == 1


def test_re_encryption_moves_a_secret_to_another_context(unguarded: KMSClient) -> None:
    answer = unguarded.encrypt(KeyId=kms.ALIAS, Plaintext=SECRET, EncryptionContext={"v": "1"})
    sealed = answer["CiphertextBlob"]
    moved = unguarded.re_encrypt(
        CiphertextBlob=sealed,
        SourceEncryptionContext={"v": "1"},
        DestinationKeyId=kms.ALIAS,
        DestinationEncryptionContext={"v": "2"},
    )["CiphertextBlob"]
    assert (
        unguarded.decrypt(CiphertextBlob=moved, EncryptionContext={"v": "2"})["Plaintext"] == SECRET
    )


@pytest.mark.parametrize("algorithm", ["RSAES_OAEP_SHA_1", "RSAES_OAEP_SHA_256"])
def test_rsa_ciphertexts_are_rsa(fresh: Service, algorithm: Any) -> None:
    client = fresh.client()
    made = client.create_key(KeySpec="RSA_2048", KeyUsage="ENCRYPT_DECRYPT")["KeyMetadata"]["KeyId"]
    described = client.get_public_key(KeyId=made)
    public_key = serialization.load_der_public_key(described["PublicKey"])
    assert isinstance(public_key, rsa.RSAPublicKey)
    assert described["KeyId"].endswith(f":key/{made}")
    digest: hashes.HashAlgorithm = hashes.SHA1() if algorithm.endswith("_1") else hashes.SHA256()  # noqa: S303
    sealed = public_key.encrypt(SECRET, padding.OAEP(padding.MGF1(digest), digest, None))
    answer = client.encrypt(KeyId=made, Plaintext=SECRET, EncryptionAlgorithm=algorithm)
    for blob in (sealed, answer["CiphertextBlob"]):
        opened = client.decrypt(CiphertextBlob=blob, KeyId=made, EncryptionAlgorithm=algorithm)
        assert (opened["Plaintext"], opened["EncryptionAlgorithm"]) == (SECRET, algorithm)
        assert "KeyMaterialId" not in opened
    with refused("InvalidCiphertextException"):
        client.decrypt(CiphertextBlob=sealed[::-1], KeyId=made, EncryptionAlgorithm=algorithm)
    with refused("ValidationException", "length"):
        client.encrypt(KeyId=made, Plaintext=bytes(256), EncryptionAlgorithm=algorithm)


def test_limits_of_plaintext_and_ciphertext(unguarded: KMSClient) -> None:
    longest = unguarded.encrypt(KeyId=kms.ALIAS, Plaintext=bytes(4096))["CiphertextBlob"]
    assert unguarded.decrypt(CiphertextBlob=longest)["Plaintext"] == bytes(4096)
    with refused("ValidationException", "4096"):
        unguarded.encrypt(KeyId=kms.ALIAS, Plaintext=bytes(4097))
    with refused("ValidationException", "6144"):
        unguarded.decrypt(CiphertextBlob=bytes(6145))
    with refused("ValidationException", "number of bytes or key spec"):
        unguarded.generate_data_key(KeyId=kms.ALIAS)


@pytest.mark.parametrize(
    "spec", ["RSA_2048", "ECC_NIST_P256", "ECC_NIST_P384", "ECC_NIST_P521", "ECC_SECG_P256K1"]
)
def test_a_data_key_pair_is_a_pair(unguarded: KMSClient, spec: Any) -> None:
    pair = unguarded.generate_data_key_pair(KeyId=kms.ALIAS, KeyPairSpec=spec)
    private_key = serialization.load_der_private_key(pair["PrivateKeyPlaintext"], None)
    assert isinstance(private_key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey)
    assert spki_of(private_key) == pair["PublicKey"]
    assert pair["KeyPairSpec"] == spec
    assert (
        unguarded.decrypt(CiphertextBlob=pair["PrivateKeyCiphertextBlob"])["Plaintext"]
        == pair["PrivateKeyPlaintext"]
    )


def test_without_plaintext_means_it(client: KMSClient) -> None:
    data_key = client.generate_data_key_without_plaintext(KeyId=kms.ALIAS, KeySpec="AES_256")
    pair = client.generate_data_key_pair_without_plaintext(
        KeyId=kms.ALIAS, KeyPairSpec="ECC_NIST_P256"
    )
    assert "Plaintext" not in data_key
    assert "PrivateKeyPlaintext" not in pair
    assert data_key["CiphertextBlob"]
    assert pair["PrivateKeyCiphertextBlob"]


def agreement_key(client: KMSClient) -> tuple[str, ec.EllipticCurvePublicKey]:
    made = client.create_key(KeySpec="ECC_NIST_P256", KeyUsage="KEY_AGREEMENT")["KeyMetadata"]
    assert made["KeyAgreementAlgorithms"] == ["ECDH"]
    public_key = serialization.load_der_public_key(
        client.get_public_key(KeyId=made["KeyId"])["PublicKey"]
    )
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    return made["KeyId"], public_key


def test_a_derived_secret_is_what_the_other_side_derives(fresh: Service) -> None:
    client, mine = fresh.client(), ec.generate_private_key(ec.SECP256R1())
    key_id, theirs = agreement_key(client)
    answer = client.derive_shared_secret(
        KeyId=key_id, KeyAgreementAlgorithm="ECDH", PublicKey=spki_of(mine)
    )
    assert answer["SharedSecret"] == mine.exchange(ec.ECDH(), theirs)
    assert (answer["KeyAgreementAlgorithm"], answer["KeyOrigin"]) == ("ECDH", "AWS_KMS")
    for wrong in (spki_of(ec.generate_private_key(ec.SECP384R1())), b"no key"):
        with refused("ValidationException", "public key"):
            client.derive_shared_secret(KeyId=key_id, KeyAgreementAlgorithm="ECDH", PublicKey=wrong)
    with refused("InvalidKeyUsageException"):
        client.encrypt(KeyId=key_id, Plaintext=SECRET)


def test_keys_that_cannot_be_used(unguarded: KMSClient, fresh: Service) -> None:
    sealed, arn = (
        unguarded.encrypt(KeyId=kms.ALIAS, Plaintext=SECRET)["CiphertextBlob"],
        fresh.app.key_arn,
    )
    unguarded.disable_key(KeyId=arn)
    with refused("DisabledException", f"{arn} is disabled."):
        unguarded.decrypt(CiphertextBlob=sealed)
    unguarded.enable_key(KeyId=arn)
    assert unguarded.decrypt(CiphertextBlob=sealed)["Plaintext"] == SECRET
    unguarded.schedule_key_deletion(KeyId=arn, PendingWindowInDays=7)
    with refused("KMSInvalidStateException", f"{arn} is pending deletion."):
        unguarded.encrypt(KeyId=arn, Plaintext=SECRET)


def test_a_dry_run_tells_whether_it_would_succeed(
    client: KMSClient, service: Service, blob: bytes, recipient: RecipientInfoTypeDef
) -> None:
    with refused("DryRunOperationException"):
        client.decrypt(CiphertextBlob=blob, Recipient=recipient, DryRun=True)
    with refused("AccessDeniedException"):
        client.decrypt(CiphertextBlob=blob, DryRun=True)
    with refused("InvalidCiphertextException"):
        client.decrypt(CiphertextBlob=blob[:-1], Recipient=recipient, DryRun=True)
    with refused("DryRunOperationException"):
        client.decrypt(
            KeyId=service.app.key_arn,
            Recipient=recipient,
            DryRun=True,
            DryRunModifiers=["IGNORE_CIPHERTEXT"],
        )


def test_unknown_operations_and_bodies_are_refused(service: Service) -> None:
    for operation, members, code in (
        ("Nonsense", {}, "UnknownOperationException"),
        ("ReplicateKey", {}, "UnknownOperationException"),
        ("Encrypt", {}, "ValidationException"),
        ("Encrypt", {"KeyId": 1, "Plaintext": "AA=="}, "SerializationException"),
        ("Encrypt", {"KeyId": kms.ALIAS, "Plaintext": "?"}, "SerializationException"),
        (
            "Decrypt",
            {"CiphertextBlob": "AA==", "EncryptionContext": {"a": 1}},
            "SerializationException",
        ),
        ("CreateAlias", {}, "ValidationException"),
        ("CreateKey", {"Policy": "{}"}, "MalformedPolicyDocumentException"),
        ("DescribeKey", {}, "ValidationException"),
    ):
        status, error, headers = service.post(*service.signed(operation, members))
        assert (status, error["__type"]) == (400, code), operation
        assert headers["x-amzn-RequestId"]
        assert headers["Content-Type"] == "application/x-amz-json-1.1"
        assert headers["Date"].endswith(" GMT")


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_bodies_that_are_no_json_object_are_refused(body: bytes) -> None:
    with pytest.raises(KmsError, match="SerializationException"):
        Parameters.parse(body)


@pytest.mark.parametrize(
    ("operation", "members"),
    [
        ("GenerateRandom", {"NumberOfBytes": 1025}),
        ("GenerateRandom", {}),
        ("GenerateDataKey", {"KeyId": kms.ALIAS, "NumberOfBytes": 0}),
        ("GenerateDataKey", {"KeyId": kms.ALIAS, "KeySpec": "AES_512"}),
        ("Encrypt", {"KeyId": "", "Plaintext": b"s"}),
        ("Encrypt", {"KeyId": kms.ALIAS, "Plaintext": b""}),
        ("Encrypt", {"KeyId": kms.ALIAS, "Plaintext": b"s", "EncryptionAlgorithm": "SM2PKE"}),
        ("Decrypt", {"CiphertextBlob": b"s", "EncryptionAlgorithm": "RSAES_OAEP_SHA_256"}),
        (
            "DeriveSharedSecret",
            {"KeyAgreementAlgorithm": "ECDH", "PublicKey": RSA_SPKI, "KeyId": kms.ALIAS},
        ),
    ],
)
def test_members_out_of_bounds_are_refused(
    service: Service, operation: str, members: dict[str, Any]
) -> None:
    status, error, _ = service.post(*service.signed(operation, members))
    assert (status, error["__type"]) == (400, "ValidationException")


def test_the_right_key_of_the_wrong_kind_is_refused(unguarded: KMSClient) -> None:
    answer = unguarded.create_key(KeySpec="RSA_2048", KeyUsage="ENCRYPT_DECRYPT")
    made = answer["KeyMetadata"]["KeyId"]
    with refused("InvalidKeyUsageException"):
        unguarded.encrypt(KeyId=made, Plaintext=SECRET)
    with refused("InvalidKeyUsageException"):
        unguarded.encrypt(
            KeyId=kms.ALIAS, Plaintext=SECRET, EncryptionAlgorithm="RSAES_OAEP_SHA_256"
        )
    with refused("InvalidKeyUsageException"):
        unguarded.generate_data_key_pair(KeyId=made, KeyPairSpec="ECC_NIST_P256")


# ---- with a Recipient


def test_decrypt_seals_for_the_document(
    client: KMSClient,
    service: Service,
    key: rsa.RSAPrivateKey,
    recipient: RecipientInfoTypeDef,
    blob: bytes,
) -> None:
    answer = client.decrypt(CiphertextBlob=blob, Recipient=recipient)
    assert set(answer) == {
        "KeyId",
        "EncryptionAlgorithm",
        "CiphertextForRecipient",
        "ResponseMetadata",
    }
    assert answer["KeyId"] == service.app.key_arn
    assert open_independently(answer["CiphertextForRecipient"], key) == SECRET


def test_data_keys_are_sealed_and_open_again(
    client: KMSClient, key: rsa.RSAPrivateKey, recipient: RecipientInfoTypeDef
) -> None:
    made = client.generate_data_key(KeyId=kms.ALIAS, KeySpec="AES_256", Recipient=recipient)
    again = client.decrypt(CiphertextBlob=made["CiphertextBlob"], Recipient=recipient)
    sealed = made["CiphertextForRecipient"]
    assert not {"Plaintext", "KeyMaterialId"} & set(made)
    assert len(sealed) == 493
    assert open_independently(sealed, key) == open_independently(
        again["CiphertextForRecipient"], key
    )


@pytest.mark.parametrize("spec", ["ECC_NIST_P256", "RSA_3072"])
def test_data_key_pairs_are_sealed(
    client: KMSClient, key: rsa.RSAPrivateKey, recipient: RecipientInfoTypeDef, spec: Any
) -> None:
    pair = client.generate_data_key_pair(KeyId=kms.ALIAS, KeyPairSpec=spec, Recipient=recipient)
    private_key = serialization.load_der_private_key(
        open_independently(pair["CiphertextForRecipient"], key), None
    )
    assert isinstance(private_key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey)
    assert spki_of(private_key) == pair["PublicKey"]
    assert not {"PrivateKeyPlaintext", "KeyMaterialId"} & set(pair)


def test_random_bytes_are_sealed(
    client: KMSClient, key: rsa.RSAPrivateKey, recipient: RecipientInfoTypeDef
) -> None:
    answer = client.generate_random(NumberOfBytes=1024, Recipient=recipient)
    assert set(answer) == {"CiphertextForRecipient", "ResponseMetadata"}
    assert len(open_independently(answer["CiphertextForRecipient"], key)) == 1024
    assert len(client.generate_random(NumberOfBytes=16)["Plaintext"]) == 16


def test_shared_secrets_are_sealed(
    fresh: Service, key: rsa.RSAPrivateKey, recipient: RecipientInfoTypeDef
) -> None:
    client, mine = fresh.client(), ec.generate_private_key(ec.SECP256R1())
    key_id, theirs = agreement_key(client)
    answer = client.derive_shared_secret(
        KeyId=key_id, KeyAgreementAlgorithm="ECDH", PublicKey=spki_of(mine), Recipient=recipient
    )
    assert "SharedSecret" not in answer
    assert open_independently(answer["CiphertextForRecipient"], key) == mine.exchange(
        ec.ECDH(), theirs
    )


def test_secrets_need_a_document(client: KMSClient, service: Service, blob: bytes) -> None:
    text = (
        f"User: {service.app.principal} is not authorized to perform: kms:Decrypt "
        f"on resource: {service.app.key_arn} "
        "because no resource-based policy allows the kms:Decrypt action"
    )
    with refused("AccessDeniedException", text):
        client.decrypt(CiphertextBlob=blob)
    with refused("AccessDeniedException", "kms:GenerateDataKey "):
        client.generate_data_key(KeyId=kms.ALIAS, KeySpec="AES_256")
    with refused("AccessDeniedException", "kms:GenerateDataKeyPair "):
        client.generate_data_key_pair(KeyId=kms.ALIAS, KeyPairSpec="ECC_NIST_P256")


def test_the_refusal_is_spelled_as_kms_spells_it(service: Service, blob: bytes) -> None:
    status, error, _ = service.post(*service.signed("Decrypt", {"CiphertextBlob": blob}))
    assert (status, set(error), error["__type"]) == (
        400,
        {"__type", "Message"},
        "AccessDeniedException",
    )
    flipped = bytes((blob[0] ^ 1,)) + blob[1:]
    status, error, _ = service.post(*service.signed("Decrypt", {"CiphertextBlob": flipped}))
    assert (status, error) == (400, {"__type": "InvalidCiphertextException"})


@pytest.mark.parametrize("change", [{"debug": True}, {"pcrs": {0: bytes(range(48))}}])
def test_other_measurements_are_refused(
    client: KMSClient, pki: NsmPki, key: rsa.RSAPrivateKey, blob: bytes, change: dict[str, Any]
) -> None:
    other = recipient_of(document_of(SoftwareNsm(pki, **change), spki_of(key)))
    with refused("AccessDeniedException", "kms:Decrypt"):
        client.decrypt(CiphertextBlob=blob, Recipient=other)
    assert client.generate_random(NumberOfBytes=1, Recipient=other)["CiphertextForRecipient"]


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("bad-signature", "not signed by the key in its leaf certificate"),
        ("expired-leaf", "leaf certificate is valid from"),
        ("foreign-root", "root certificate has SHA-256"),
        ("no-public-key", "holds no public key"),
    ],
)
def test_documents_that_are_not_authentic_are_refused(
    client: KMSClient, pki: NsmPki, key: rsa.RSAPrivateKey, blob: bytes, fault: str, text: str
) -> None:
    other = recipient_of(document_of(SoftwareNsm(pki, fault=fault), spki_of(key)))
    with refused("ValidationException", text):
        client.decrypt(CiphertextBlob=blob, Recipient=other)


def test_recipients_that_are_none_are_refused(client: KMSClient, pki: NsmPki, blob: bytes) -> None:
    nsm = SoftwareNsm(pki)
    small = spki_of(rsa.generate_private_key(public_exponent=65537, key_size=1024))  # noqa: S505 - refused below
    for wrong in (b"garbage", document_of(nsm, b"no key"), document_of(nsm, small)):
        with refused("ValidationException"):
            client.decrypt(CiphertextBlob=blob, Recipient=recipient_of(wrong))
    on_a_curve = document_of(nsm, spki_of(ec.generate_private_key(ec.SECP256R1())))
    with refused("ValidationException", "RSA"):
        client.decrypt(CiphertextBlob=blob, Recipient=recipient_of(on_a_curve))
    with refused("ValidationException"):
        client.decrypt(
            CiphertextBlob=blob, Recipient={"AttestationDocument": document_of(nsm, small)}
        )


def test_a_document_cures_neither_key_nor_context_nor_blob(
    fresh: Service, recipient: RecipientInfoTypeDef
) -> None:
    client = fresh.client()
    answer = client.encrypt(KeyId=kms.ALIAS, Plaintext=SECRET, EncryptionContext={"node": "3"})
    sealed = answer["CiphertextBlob"]
    with refused("InvalidCiphertextException"):
        client.decrypt(CiphertextBlob=sealed, EncryptionContext={"node": "4"}, Recipient=recipient)
    with refused("InvalidCiphertextException"):
        client.decrypt(
            CiphertextBlob=sealed[:-1] + b"?", EncryptionContext={"node": "3"}, Recipient=recipient
        )
    other = client.create_key()["KeyMetadata"]["Arn"]
    with refused("IncorrectKeyException"):
        client.decrypt(
            CiphertextBlob=sealed, KeyId=other, EncryptionContext={"node": "3"}, Recipient=recipient
        )
    client.disable_key(KeyId=fresh.app.key_arn)
    with refused("DisabledException"):
        client.decrypt(CiphertextBlob=sealed, EncryptionContext={"node": "3"}, Recipient=recipient)


def test_the_longest_plaintext_comes_in_chunks(
    client: KMSClient, key: rsa.RSAPrivateKey, recipient: RecipientInfoTypeDef, tmp_path: Path
) -> None:
    secret = bytes(range(256)) * 16
    sealed = client.encrypt(KeyId=kms.ALIAS, Plaintext=secret)["CiphertextBlob"]
    answer = client.decrypt(CiphertextBlob=sealed, Recipient=recipient)["CiphertextForRecipient"]
    assert answer.count(bytes.fromhex("048203e8")) == 4
    assert open_independently(answer, key) == open_with_openssl(answer, key, tmp_path) == secret


# ---- policy


def policy_with(effect: str, principal: str, condition: dict[str, Any]) -> str:
    allow = {"Effect": "Allow", "Principal": {"AWS": principal}, "Action": "kms:*", "Resource": "*"}
    statement = allow | {"Effect": effect, "Condition": condition}
    return json.dumps(
        {
            "Version": "2012-10-17",
            "Statement": [statement] if effect == "Allow" else [allow, statement],
        }
    )


PCR8: Final = {
    "StringEqualsIgnoreCase": {"kms:RecipientAttestation:PCR8": DEFAULT_PCRS[8].hex().upper()}
}
NO_PCR8: Final = {
    "StringNotEqualsIgnoreCase": {"kms:RecipientAttestation:PCR8": DEFAULT_PCRS[8].hex()}
}
ROOT: Final = "arn:aws:iam::111122223333:root"


@pytest.mark.parametrize(
    ("policy", "bare", "attested"),
    [
        (policy_with("Allow", "*", {}), None, None),
        (policy_with("Allow", "*", PCR8), "because no resource-based policy", None),
        (
            policy_with("Deny", "*", NO_PCR8),
            "with an explicit deny in a resource-based policy",
            None,
        ),
        (policy_with("Allow", ROOT, {}), None, None),
        (
            policy_with("Allow", "arn:aws:iam::111122223333:role/other", {}),
            "because no",
            "because no",
        ),
        (
            policy_with("Allow", "*", {"StringEquals": {"kms:EncryptionContext:node": "3"}}),
            "because no",
            "because no",
        ),
        (
            policy_with(
                "Allow", "*", {"StringEquals": {"kms:EncryptionAlgorithm": "SYMMETRIC_DEFAULT"}}
            ),
            None,
            None,
        ),
    ],
)
def test_the_key_policy_decides(
    tmp_path: Path,
    pki: NsmPki,
    recipient: RecipientInfoTypeDef,
    policy: str,
    bare: str | None,
    attested: str | None,
) -> None:
    with running(tmp_path, pki, key_policy=policy) as service:
        client = service.client()
        for text, arguments in ((bare, {}), (attested, {"Recipient": recipient})):
            with refused("AccessDeniedException", text) if text else contextlib.nullcontext():
                client.generate_data_key(
                    KeyId=kms.ALIAS, KeySpec="AES_128", **cast("Any", arguments)
                )


def test_another_account_needs_more_than_the_key_policy(tmp_path: Path, pki: NsmPki) -> None:
    with (
        running(
            tmp_path,
            pki,
            principal="arn:aws:iam::999999999999:user/eve",
            key_policy=policy_with("Allow", "*", {}),
        ) as service,
        refused("AccessDeniedException"),
    ):
        service.client().encrypt(KeyId=kms.ALIAS, Plaintext=SECRET)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(PolicyError):
        AttestedKms(nsm_root_sha256=bytes(32), key_policy="{}")
    for wrong in ({"fault": "nonsense"}, {"envelope": "nonsense"}, {"principal": "nonsense"}):
        with pytest.raises(ValueError, match="nonsense"):
            AttestedKms(nsm_root_sha256=bytes(32), **cast("Any", wrong))
    with pytest.raises(ValueError, match="nonsense"):
        HttpsServer(AttestedKms(nsm_root_sha256=bytes(32)), fault="nonsense")


def test_account_region_and_principal_are_as_asked(tmp_path: Path, pki: NsmPki) -> None:
    with running(tmp_path, pki, region="cn-north-1", account="444455556666") as service:
        answer = service.client().encrypt(KeyId=kms.ALIAS, Plaintext=SECRET)
        assert answer["KeyId"].startswith("arn:aws-cn:kms:cn-north-1:444455556666:key/")
        assert service.app.principal.startswith("arn:aws-cn:sts::444455556666:assumed-role/")


# ---- signatures


def test_requests_are_authenticated(service: Service) -> None:
    for wrong, code in (
        ({"aws_access_key_id": "AKIAIOSFODNN7EXAMPLE"}, "UnrecognizedClientException"),
        ({"aws_session_token": "another"}, "UnrecognizedClientException"),
        ({"aws_secret_access_key": "another"}, "InvalidSignatureException"),
        ({"region_name": "eu-west-2"}, "InvalidSignatureException"),
    ):
        with refused(code):
            service.client(**cast("Any", wrong)).list_keys()


def test_a_changed_request_is_refused(service: Service) -> None:
    body, headers = service.signed("Encrypt", {"KeyId": kms.ALIAS, "Plaintext": SECRET})
    assert service.post(body, headers)[0] == 200
    for changed_body, changed in (
        (body + b" ", {}),
        (body, {"X-Amz-Target": "TrentService.Decrypt"}),
        (body, {"Authorization": headers["Authorization"][:-1] + "x"}),
        (body, {"Authorization": "Basic x"}),
    ):
        status, error, _ = service.post(changed_body, headers | changed)
        assert status == 400
        assert error["__type"] in {"InvalidSignatureException", "IncompleteSignatureException"}
        assert service.app.credentials.token not in str(error)
    del headers["X-Amz-Date"]
    assert service.post(body, headers)[1]["__type"] == "InvalidSignatureException"
    del headers["Authorization"]
    assert service.post(body, headers)[1]["__type"] == "MissingAuthenticationTokenException"


@pytest.mark.parametrize(
    ("minutes", "text"), [(6, "Signature expired"), (-6, "Signature not yet current")]
)
def test_a_clock_that_is_off_is_refused(
    tmp_path: Path, pki: NsmPki, minutes: int, text: str
) -> None:
    with (
        running(
            tmp_path, pki, clock=lambda: datetime.now(UTC) + timedelta(minutes=minutes)
        ) as service,
        refused("InvalidSignatureException", text),
    ):
        service.client().list_keys()


def test_credentials_do_not_show(service: Service) -> None:
    credentials = service.app.credentials
    assert credentials.secret_key not in repr(credentials)
    assert credentials.token not in repr(credentials)


# ---- faults

REFUSALS: Final = {
    "throttling": (400, "ThrottlingException"),
    "internal": (500, "KMSInternalException"),
    "unavailable": (503, "ServiceUnavailable"),
    "key-unavailable": (500, "KeyUnavailableException"),
    "dependency-timeout": (503, "DependencyTimeoutException"),
    "access-denied": (400, "AccessDeniedException"),
    "invalid-ciphertext": (400, "InvalidCiphertextException"),
    "not-found": (400, "NotFoundException"),
    "disabled": (400, "DisabledException"),
    "invalid-state": (400, "KMSInvalidStateException"),
    "invalid-key-usage": (400, "InvalidKeyUsageException"),
    "incorrect-key": (400, "IncorrectKeyException"),
    "invalid-grant-token": (400, "InvalidGrantTokenException"),
    "expired-token": (400, "ExpiredTokenException"),
    "unrecognized-client": (400, "UnrecognizedClientException"),
    "invalid-signature": (400, "InvalidSignatureException"),
    "validation": (400, "ValidationException"),
    "no-message": (400, "AccessDeniedException"),
    "escape-message": (400, "AccessDeniedException"),
    "echo-credentials": (400, "InvalidSignatureException"),
    "throttle-once": (400, "ThrottlingException"),
    "internal-once": (500, "KMSInternalException"),
}


@pytest.fixture
def faulty(tmp_path: Path, pki: NsmPki, request: pytest.FixtureRequest) -> Iterator[Service]:
    with running(tmp_path, pki, fault=request.param) as started:
        yield started


def faults(*names: str) -> Callable[[Any], Any]:
    return pytest.mark.parametrize("faulty", names, indirect=True, ids=names)


def attested_post(
    service: Service, recipient: RecipientInfoTypeDef
) -> tuple[int, dict[str, Any], http.client.HTTPMessage]:
    blob = service.client().encrypt(KeyId=kms.ALIAS, Plaintext=SECRET)["CiphertextBlob"]
    return service.post(
        *service.signed("Decrypt", {"CiphertextBlob": blob, "Recipient": recipient})
    )


@faults(*REFUSALS)
def test_refusals_on_demand(
    faulty: Service, recipient: RecipientInfoTypeDef, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    status, error, headers = attested_post(faulty, recipient)
    assert (status, error["__type"]) == REFUSALS[name]
    assert headers["x-amzn-RequestId"]
    message = error.get("message", error.get("Message", ""))
    assert bool(message) == (name not in {"no-message", "invalid-ciphertext", "internal-once"})
    if name == "echo-credentials":
        assert faulty.app.credentials.token in message
        assert faulty.app.credentials.access_key in message
        assert faulty.app.credentials.secret_key not in message
    if name == "escape-message":
        assert "\x1b[2J" in message
        assert "\n" in message


@faults("throttle-once", "internal-once")
def test_a_retry_passes(
    faulty: Service, key: rsa.RSAPrivateKey, recipient: RecipientInfoTypeDef
) -> None:
    client = faulty.client(attempts=2)
    blob = client.encrypt(KeyId=kms.ALIAS, Plaintext=SECRET)["CiphertextBlob"]
    answer = client.decrypt(CiphertextBlob=blob, Recipient=recipient)
    assert answer["ResponseMetadata"]["RetryAttempts"] == 1
    assert open_independently(answer["CiphertextForRecipient"], key) == SECRET


ANSWERS: Final = {
    "no-envelope": {"KeyId", "EncryptionAlgorithm", "Plaintext", "KeyMaterialId"},
    "plaintext-beside": {
        "KeyId",
        "EncryptionAlgorithm",
        "Plaintext",
        "KeyMaterialId",
        "CiphertextForRecipient",
    },
    "nothing-sealed": {"KeyId", "EncryptionAlgorithm"},
    "empty-envelope": {"KeyId", "EncryptionAlgorithm", "CiphertextForRecipient"},
    "wrong-key-id": {"KeyId", "EncryptionAlgorithm", "CiphertextForRecipient"},
    "no-key-id": {"EncryptionAlgorithm", "CiphertextForRecipient"},
}


@faults(*ANSWERS)
def test_wrong_answers_on_demand(
    faulty: Service, recipient: RecipientInfoTypeDef, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    status, answer, _ = attested_post(faulty, recipient)
    assert (status, set(answer)) == (200, ANSWERS[name])
    assert (answer.get("CiphertextForRecipient") == "") == (name == "empty-envelope")
    if "KeyId" in answer:
        assert (answer["KeyId"] == faulty.app.key_arn) == (name != "wrong-key-id")


@faults(*envelope.MALFORMED)
def test_malformed_envelopes_on_demand(faulty: Service, recipient: RecipientInfoTypeDef) -> None:
    status, answer, _ = attested_post(faulty, recipient)
    assert status == 200
    assert answer["KeyId"] == faulty.app.key_arn
    assert answer["CiphertextForRecipient"]
    assert "Plaintext" not in answer


@faults("not-json", "html-error", "empty-body")
def test_responses_that_are_no_json(
    faulty: Service, recipient: RecipientInfoTypeDef, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    with contextlib.closing(faulty.connect()) as connection:
        response = begin(faulty, connection, recipient)
        assert response.status == (502 if name == "html-error" else 200)
        assert response.read().startswith(b"" if name == "empty-body" else b"<html>")
        assert response.headers["x-amzn-RequestId"]


def begin(
    service: Service, connection: http.client.HTTPSConnection, recipient: RecipientInfoTypeDef
) -> http.client.HTTPResponse:
    body, headers = service.signed("GenerateRandom", {"NumberOfBytes": 32, "Recipient": recipient})
    connection.request("POST", "/", body, headers)
    return connection.getresponse()


@faults("cut-body")
def test_a_body_cut_short(faulty: Service, recipient: RecipientInfoTypeDef) -> None:
    with contextlib.closing(faulty.connect()) as connection:
        response = begin(faulty, connection, recipient)
        with pytest.raises(http.client.IncompleteRead):
            response.read()


@faults("reset")
def test_a_reset_connection(faulty: Service, recipient: RecipientInfoTypeDef) -> None:
    with contextlib.closing(faulty.connect()) as connection, pytest.raises(ConnectionResetError):
        begin(faulty, connection, recipient)


@faults("slow-body")
def test_a_body_byte_by_byte(faulty: Service, recipient: RecipientInfoTypeDef) -> None:
    with contextlib.closing(faulty.connect()) as connection:
        response = begin(faulty, connection, recipient)
        assert response.length is None
        assert response.read(1) == b"{"


@faults("hang")
def test_no_response(faulty: Service, recipient: RecipientInfoTypeDef) -> None:
    with contextlib.closing(faulty.connect()) as connection:
        connection.timeout = 0.3
        with pytest.raises(TimeoutError):
            begin(faulty, connection, recipient)


@faults("endless-body")
def test_a_body_without_end(faulty: Service, recipient: RecipientInfoTypeDef) -> None:
    with contextlib.closing(faulty.connect()) as connection:
        response = begin(faulty, connection, recipient)
        assert response.length is None
        received = sum(len(chunk) for chunk in iter(lambda: response.read(1 << 20), b""))
    assert received > kms_faults.ENDLESS


def test_every_fault_has_its_test() -> None:
    on_the_wire = {
        "not-json",
        "html-error",
        "empty-body",
        "cut-body",
        "reset",
        "slow-body",
        "hang",
        "endless-body",
    }
    assert set(kms.FAULTS) == set(REFUSALS) | set(ANSWERS) | set(envelope.MALFORMED) | on_the_wire
    assert all(kms.FAULTS.values())


@faults("reset", "hang", "no-envelope")
def test_faults_leave_other_requests_alone(faulty: Service) -> None:
    client = faulty.client()
    assert client.encrypt(KeyId=kms.ALIAS, Plaintext=SECRET)["CiphertextBlob"]
    assert client.generate_random(NumberOfBytes=1)["Plaintext"]


# ---- the server


def test_connections_are_kept_alive(service: Service) -> None:
    with contextlib.closing(service.connect()) as connection:
        for _ in range(3):
            connection.request("POST", "/", *service.signed("ListKeys", {}))
            response = connection.getresponse()
            assert response.status == 200
            response.read()
            assert connection.sock is not None


def test_a_client_that_says_nothing_blocks_nobody(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.https.port)):
        assert service.client().list_keys()["Keys"]


@pytest.mark.parametrize("fault", ["hang", "slow-body"])
def test_shutdown_waits_for_nobody(
    tmp_path: Path, pki: NsmPki, recipient: RecipientInfoTypeDef, fault: str
) -> None:
    with running(tmp_path, pki, fault=fault) as service:
        connection = service.connect()
        body, headers = service.signed(
            "GenerateRandom", {"NumberOfBytes": 32, "Recipient": recipient}
        )
        connection.request("POST", "/", body, headers)
        started = time.monotonic()
    assert time.monotonic() - started < 30  # half of what a client may be silent
    connection.close()


def test_threads_end_with_their_clients(
    tmp_path: Path, pki: NsmPki, recipient: RecipientInfoTypeDef
) -> None:
    with (
        running(tmp_path, pki, fault="hang") as service,
        no_thread_stays(),
        contextlib.closing(service.connect()) as connection,
    ):
        connection.request(
            "POST",
            "/",
            *service.signed("GenerateRandom", {"NumberOfBytes": 1, "Recipient": recipient}),
        )


@pytest.mark.parametrize(
    "headers",
    [{"Content-Length": "x"}, {"Content-Length": "99999999"}, {"Transfer-Encoding": "chunked"}],
)
def test_bodies_that_cannot_be_read_are_refused(service: Service, headers: dict[str, str]) -> None:
    with contextlib.closing(service.connect()) as connection:
        connection.putrequest("POST", "/")
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        assert connection.getresponse().status in {411, 413}


def test_no_output(service: Service, capfd: pytest.CaptureFixture[str]) -> None:
    service.client().list_keys()
    with socket.create_connection(("127.0.0.1", service.https.port)) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            plain.recv(100)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("fault", sorted(server.FAULTS))
def test_tls_faults(tmp_path: Path, pki: NsmPki, fault: str) -> None:
    texts = {
        "tls-other-ca": "certificate verify failed",
        "tls-wrong-name": "doesn't match",
        "tls-expired": "certificate has expired",
        "tls-plain": "wrong version number",
        "tls-old": "protocol version",
    }
    with running(tmp_path, pki, tls_fault=fault) as service, pytest.raises(SSLError) as caught:
        service.client().list_keys()
    assert texts[fault] in str(caught.value)


@pytest.mark.parametrize(
    "name", ["kms.eu-west-1.amazonaws.com", "kms-fips.eu-west-1.amazonaws.com", "127.0.0.1"]
)
def test_the_certificate_has_the_names_of_the_endpoints(service: Service, name: str) -> None:
    context = ssl.create_default_context(cafile=service.ca_file)
    with (
        socket.create_connection(("127.0.0.1", service.https.port)) as plain,
        context.wrap_socket(plain, server_hostname=name) as connection,
    ):
        assert connection.version() in {"TLSv1.2", "TLSv1.3"}


# ---- envelopes


@pytest.mark.parametrize("form", sorted(envelope.FORMS))
@pytest.mark.parametrize("size", [0, 1, 15, 16, 32, 154, 999, 1000, 1001, 4096])
def test_two_second_opinions_agree_on_every_envelope(
    form: str, size: int, key: rsa.RSAPrivateKey, tmp_path: Path
) -> None:
    secret = bytes(index % 251 for index in range(size))
    sealed = envelope.seal(secret, spki_of(key), form)
    assert open_independently(sealed, key) == secret
    assert open_with_openssl(sealed, key, tmp_path) == secret


@pytest.mark.parametrize("form", sorted(envelope.FORMS))
def test_the_service_writes_the_form_asked_for(
    tmp_path: Path, pki: NsmPki, key: rsa.RSAPrivateKey, recipient: RecipientInfoTypeDef, form: str
) -> None:
    with running(tmp_path, pki, envelope=form) as service:
        random = service.client().generate_random(NumberOfBytes=32, Recipient=recipient)
    answer = random["CiphertextForRecipient"]
    reference = envelope.seal(bytes(32), spki_of(key), form)
    assert (len(answer), answer[:60]) == (len(reference), reference[:60])
    assert len(open_with_openssl(answer, key, tmp_path)) == 32


@pytest.mark.parametrize(
    ("name", "form"),
    [("kms_32-byte-key", "kms"), ("kms_json", "kms"), ("localstack", "localstack")],
)
def test_envelopes_have_the_structure_of_genuine_ones(name: str, form: str) -> None:
    if not VECTORS.is_dir():
        pytest.skip("vectors of the real service are not here")
    genuine = (VECTORS / f"{name}.ber").read_bytes()
    key = serialization.load_pem_private_key((VECTORS / f"{name}.key.pem").read_bytes(), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    secret = (VECTORS / f"{name}.plain").read_bytes()
    ours = envelope.seal(secret, spki_of(key), form)
    assert open_independently(genuine, key) == open_independently(ours, key) == secret
    assert _masked(ours, key) == _masked(genuine, key)


def _masked(sealed: bytes, key: rsa.RSAPrivateKey) -> bytes:
    """All that is not random: encrypted key, IV and content blanked, structure and lengths kept."""
    content = cms.ContentInfo.load(sealed)["content"]
    (recipient,) = content["recipient_infos"]
    inner = content["encrypted_content_info"]
    for random in (
        recipient.chosen["encrypted_key"].native,
        inner["content_encryption_algorithm"]["parameters"].native,
        inner["encrypted_content"].native,
    ):
        assert sealed.count(random) == 1
        sealed = sealed.replace(random, bytes(len(random)))
    return sealed


def test_kms_envelopes_begin_as_genuine_ones(key: rsa.RSAPrivateKey) -> None:
    sealed = envelope.seal(bytes(12), spki_of(key))
    assert sealed.hex().startswith(
        "308006092a864886f70d010703a0803080020102318201" + "6b30820167020102" + "8020"
    )
    assert sealed.endswith(bytes(10))
    assert [len(envelope.seal(bytes(size), spki_of(key))) for size in (12, 28, 32, 154)] == [
        461,
        477,
        493,
        606,
    ]


@pytest.mark.parametrize("name", sorted(envelope.MALFORMED))
def test_a_malformed_envelope_is_no_honest_one(name: str, key: rsa.RSAPrivateKey) -> None:
    malformed = envelope.malform(name, bytes(range(40)), spki_of(key))
    honest = envelope.seal(bytes(range(40)), spki_of(key))
    assert name.startswith("envelope-")
    assert malformed[:11] == honest[:11] or malformed[:4] == honest[:4]
    with pytest.raises(KeyError):
        envelope.malform(f"{name}-not", b"", b"")


@pytest.mark.parametrize("name", ["envelope-oaep-sha1", "envelope-oaep-label", "envelope-pkcs1v15"])
def test_a_defect_is_one_that_a_lenient_client_would_open(
    name: str, key: rsa.RSAPrivateKey, tmp_path: Path
) -> None:
    sealed = envelope.malform(name, SECRET, spki_of(key))
    assert open_with_openssl(sealed, key, tmp_path) == SECRET


def test_only_rsa_keys_can_be_sealed_for() -> None:
    with pytest.raises(TypeError, match="not RSA"):
        envelope.seal(SECRET, spki_of(ec.generate_private_key(ec.SECP256R1())))
