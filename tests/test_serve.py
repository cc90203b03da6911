"""`attestor serve`: SDKs that are not changed, callers that may not ask, and KMS when it fails."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from botocore.exceptions import ClientError
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_private_key,
    load_der_public_key,
)

from nitrosim import kms_faults
from nitrosim.kms_wire import Credentials, Parameters
from nitrosim.world import World
from nsm.library import IN_PACKAGE
from tests.conftest import Enclave, wait_until
from tests.hostile import Server, whole
from tests.serving import DEVICE, Served
from tests.test_credentials import BARE, given
from tests.test_credentials import FULL as FULL_URI

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONTEXT: Final = {"node": "3"}
KEY: Final = "1234abcd-12ab-34cd-56ef-1234567890ab"
PASSED: Final = [
    "Encrypt", "ReEncrypt", "DescribeKey", "GetPublicKey", "Sign", "Verify", "GenerateMac",
    "VerifyMac",
]  # fmt: skip


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Enclave]:
    """An enclave for all tests of this file: what goes wrong in it, a test undoes."""
    with World() as world:
        yield Enclave(world, tmp_path_factory.mktemp("inside"))


@pytest.fixture(scope="module")
def served(inside: Enclave) -> Iterator[Served]:
    """All that can be asked, for every key."""
    with Served(inside, "--any-key", *(f"--pass={name}" for name in PASSED)) as served:
        yield served


@pytest.fixture
def outside(inside: Enclave, tmp_path: Path) -> Enclave:
    """The same enclave, with another folder."""
    return Enclave(inside.world, tmp_path)


@pytest.fixture
def asked(inside: Enclave, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that KMS is asked for, as they come."""
    operations: list[str] = []
    accept = inside.world.kms._accept

    def note(request: Any, body: bytes) -> Any:
        operations.append(request.headers["X-Amz-Target"])
        return accept(request, body)

    monkeypatch.setattr(inside.world.kms, "_accept", note)
    return operations


@pytest.fixture
def fail(inside: Enclave, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes KMS fail in this way until the test ends."""
    return lambda name: monkeypatch.setattr(inside.world.kms, "_fault", kms_faults.BY_NAME[name])


def refused(call: Callable[[], object]) -> tuple[int, str, str, str | None]:
    """Status, code, message and request id of the error that a client of boto3 raises."""
    with pytest.raises(ClientError) as raised:
        call()
    error, metadata = raised.value.response["Error"], raised.value.response["ResponseMetadata"]
    request_id = metadata.get("RequestId")
    return metadata["HTTPStatusCode"], error["Code"], error["Message"], request_id


# ---- SDKs that are not changed


@pytest.mark.parametrize("transport", ["library", "device"])
def test_all_five_operations_through_both_transports(outside: Enclave, transport: str) -> None:
    if transport == "library" and not IN_PACKAGE.exists():
        pytest.skip("nsm/libnsm.so is not built: make libnsm")
    key = outside.world.kms.key_arn
    seam = DEVICE if transport == "device" else ""
    with Served(outside, "--key-id", key, "-v", seam=seam) as served:
        kms = served.client()
        opened = kms.decrypt(
            CiphertextBlob=outside.encrypt(b"s", node="3"), EncryptionContext=CONTEXT
        )
        made = kms.generate_data_key(KeyId=key, KeySpec="AES_256")
        pair = kms.generate_data_key_pair(KeyId=key, KeyPairSpec="ECC_NIST_P256")
        random = kms.generate_random(NumberOfBytes=33)
        again = kms.decrypt(CiphertextBlob=made["CiphertextBlob"])
        run = served.end()
    assert (opened["Plaintext"], opened["KeyId"]) == (b"s", key)
    assert again["Plaintext"] == made["Plaintext"]
    private = load_der_private_key(pair["PrivateKeyPlaintext"], None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.public_key() == load_der_public_key(pair["PublicKey"])
    assert len(random["Plaintext"]) == 33
    for answer in (opened, made, pair, random):
        assert "CiphertextForRecipient" not in answer
        assert re.fullmatch(r"[0-9a-f-]{36}", answer["ResponseMetadata"]["RequestId"])
    way = "/dev/nsm" if transport == "device" else IN_PACKAGE
    assert f"through {way}" in run.err
    assert (run.status, run.out, served.folder.exists()) == (143, b"", True)
    assert "attestor: warning" not in run.err
    assert outside.files() == set()


def test_a_shared_secret(inside: Enclave, served: Served) -> None:
    made = inside.kms.create_key(KeySpec="ECC_NIST_P256", KeyUsage="KEY_AGREEMENT")
    key = made["KeyMetadata"]["Arn"]
    peer = ec.generate_private_key(ec.SECP256R1())
    spki = peer.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    answer = served.client().derive_shared_secret(
        KeyId=key, KeyAgreementAlgorithm="ECDH", PublicKey=spki
    )
    theirs = load_der_public_key(inside.kms.get_public_key(KeyId=key)["PublicKey"])
    assert isinstance(theirs, ec.EllipticCurvePublicKey)
    assert answer["SharedSecret"] == peer.exchange(ec.ECDH(), theirs)


def test_what_is_passed_comes_back_as_it_was(inside: Enclave, served: Served) -> None:
    kms, key = served.client(), inside.world.kms.key_arn
    described = kms.describe_key(KeyId=key)["KeyMetadata"]
    assert described == inside.kms.describe_key(KeyId=key)["KeyMetadata"]  # a time is in it
    blob = kms.encrypt(KeyId=key, Plaintext=b"x", EncryptionContext=CONTEXT)["CiphertextBlob"]
    assert kms.decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT)["Plaintext"] == b"x"
    signer = inside.kms.create_key(KeySpec="ECC_NIST_P256", KeyUsage="SIGN_VERIFY")
    signing = {
        "KeyId": signer["KeyMetadata"]["Arn"], "Message": b"m", "SigningAlgorithm": "ECDSA_SHA_256",
    }  # fmt: skip
    signature = kms.sign(**signing)["Signature"]
    assert kms.verify(**signing, Signature=signature)["SignatureValid"] is True


def test_the_socket_needs_no_signature(inside: Enclave, served: Served) -> None:
    blob = base64.b64encode(inside.encrypt(b"the secret", node="3")).decode()
    reply = served.ask("Decrypt", CiphertextBlob=blob, EncryptionContext=CONTEXT, GrantTokens=None)
    assert reply.status == 200
    assert reply.members == {
        "Plaintext": base64.b64encode(b"the secret").decode(),
        "KeyId": inside.world.kms.key_arn,
        "EncryptionAlgorithm": "SYMMETRIC_DEFAULT",
    }
    assert reply.request_id


def test_a_thousand_secrets_and_none_is_mixed_up(inside: Enclave, served: Served) -> None:
    secrets = [f"secret {number}".encode() for number in range(1000)]
    blobs = [encrypted(inside, secret) for secret in secrets]
    kms = served.client()

    def opened(blob: bytes) -> bytes:
        secret: bytes = kms.decrypt(CiphertextBlob=blob)["Plaintext"]
        return secret

    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(opened, blobs)) == secrets


def encrypted(enclave: Enclave, secret: bytes) -> bytes:
    """A ciphertext as KMS makes it, without a call over the wire."""
    asked = {"KeyId": "alias/nitrosim", "Plaintext": base64.b64encode(secret).decode()}
    operations = enclave.world.kms._operations
    blob: bytes = operations.run("Encrypt", Parameters(asked), lambda *_: None)["CiphertextBlob"]
    return blob


# ---- who may ask


def test_nobody_else_sees_the_key_pair(served: Served) -> None:
    for path in (served.credentials_file, served.socket):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secret = re.search(rb"secret_access_key = (\S+)", served.credentials_file.read_bytes())
    assert secret
    for name in ("cmdline", "environ"):
        path = Path("/proc", str(served.process.pid), name)
        with contextlib.suppress(PermissionError):  # it is not dumpable
            assert secret[1] not in path.read_bytes()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"aws_access_key_id": "AKIAIOSFODNN7EXAMPLE"}, "UnrecognizedClientException"),
        ({"aws_secret_access_key": "x" * 40}, "InvalidSignatureException"),
        ({"region_name": "eu-central-1"}, "InvalidSignatureException"),
    ],
)
def test_another_signature(
    served: Served, asked: list[str], options: dict[str, Any], code: str
) -> None:
    status, found, _, request_id = refused(
        lambda: served.client(**options).generate_random(NumberOfBytes=1)
    )
    assert (status, found, request_id, asked) == (400, code, None, [])


def test_a_session_token_changes_nothing(served: Served) -> None:
    kms = served.client(aws_session_token="t" * 100)
    assert len(kms.generate_random(NumberOfBytes=5)["Plaintext"]) == 5


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
def test_users_at_the_socket(outside: Enclave, asked: list[str]) -> None:
    """One that is named, one that is not; and then this one is not, either."""
    for folder in (outside.folder, *outside.folder.parents[:3]):
        if folder.stat().st_uid == os.geteuid() and str(folder) != "/tmp":
            folder.chmod(folder.stat().st_mode | 0o011)
    program = (
        "import os, socket, sys\n"  # first: others may not read where this Python is
        "os.setgroups([]), os.setgid(65534), os.setuid(int(sys.argv[2]))\n"
        "with socket.socket(socket.AF_UNIX) as s:\n"
        "    s.connect(sys.argv[1])\n"
        "    body = b'{\"NumberOfBytes\": 4}'\n"
        "    try:\n"
        "        s.sendall(b'POST / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n'\n"
        "            b'Content-Type: application/x-amz-json-1.1\\r\\nContent-Length: 20\\r\\n'\n"
        "            b'X-Amz-Target: TrentService.GenerateRandom\\r\\n\\r\\n' + body)\n"
        "    except ConnectionError:\n"
        "        pass\n"
        "    print(s.makefile('rb').readline().decode())\n"
    )
    with Served(outside, "--any-key", "--allow-uid", "65534") as served:
        found = []
        for uid in ("65534", "65533"):
            command = [sys.executable, "-c", program, str(served.socket), uid]
            done = subprocess.run(command, capture_output=True, check=False, cwd="/", text=True)
            found.append(done.stdout.split()[1] if done.stdout else done.stderr)
        before = list(asked)
        with socket.socket(socket.AF_UNIX) as own:
            own.connect(str(served.socket))
            assert own.makefile("rb").readline().startswith(b"HTTP/1.1 403 ")
        run = served.end()
    assert found == ["200", "403"]
    assert asked == before == ["TrentService.GenerateRandom"]
    assert run.err == (
        "attestor: warning: AccessDeniedException: a user that is none of --allow-uid\n"
    )


# ---- what may be asked


@pytest.fixture(scope="module")
def bounded(inside: Enclave, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two keys, and contexts with a node and this very app."""
    other = inside.kms.create_key()["KeyMetadata"]["Arn"]
    enclave = Enclave(inside.world, tmp_path_factory.mktemp("bounded"))
    keys = ["--key-id", inside.world.kms.key_arn, "--key-id", other.rpartition("/")[2]]
    contexts = ["--require-context", "node", "--require-context", "app=x"]
    with Served(enclave, *keys, *contexts, "--pass=Encrypt", "--pass=ReEncrypt") as served:
        yield served


FULL: Final = {"node": "3", "app": "x"}


@pytest.mark.parametrize(
    ("operation", "members", "said"),
    [
        ("Decrypt", {"EncryptionContext": {"app": "x"}}, "EncryptionContext lacks"),
        ("Decrypt", {"EncryptionContext": {"node": "3", "app": "y"}}, "EncryptionContext lacks"),
        ("Decrypt", {"EncryptionContext": {"node": 3, "app": "x"}}, "EncryptionContext lacks"),
        ("Decrypt", {"EncryptionContext": ["node", "app"]}, "EncryptionContext lacks"),
        ("Decrypt", {}, "EncryptionContext lacks"),
        ("Decrypt", {"EncryptionContext": FULL, "KeyId": "alias/nitrosim"}, "KeyId is none"),
        ("GenerateDataKey", {"EncryptionContext": FULL, "KeyId": "alias/x"}, "KeyId is none"),
        ("GenerateDataKey", {"EncryptionContext": FULL, "KeyId": ["x"]}, "KeyId is none"),
        ("Encrypt", {"KeyId": KEY}, "KeyId is none"),
        ("DeriveSharedSecret", {"KeyId": "alias/x"}, "KeyId is none"),
        (
            "ReEncrypt",
            {"SourceEncryptionContext": FULL, "DestinationEncryptionContext": {"node": "3"}},
            "DestinationEncryptionContext lacks",
        ),
        (
            "ReEncrypt",
            {
                "SourceEncryptionContext": FULL,
                "DestinationEncryptionContext": FULL,
                "DestinationKeyId": "alias/x",
            },
            "DestinationKeyId is none",
        ),
    ],
)
def test_what_is_out_of_bounds_is_never_asked(
    bounded: Served, asked: list[str], operation: str, members: dict[str, Any], said: str
) -> None:
    reply = bounded.ask(operation, CiphertextBlob="AAAA", **members) if operation in {
        "Decrypt", "ReEncrypt"
    } else bounded.ask(operation, **members)  # fmt: skip
    assert reply.error == (400, "AccessDeniedException")
    assert reply.members["message"].startswith(said)
    assert (reply.request_id, asked) == (None, [])


def test_what_is_within_bounds(inside: Enclave, bounded: Served, asked: list[str]) -> None:
    kms, key = bounded.client(), inside.world.kms.key_arn
    for name in (key, key.rpartition("/")[2]):
        made = kms.generate_data_key(KeyId=name, KeySpec="AES_256", EncryptionContext=FULL)
        for named in ({}, {"KeyId": name}):
            opened = kms.decrypt(
                CiphertextBlob=made["CiphertextBlob"], EncryptionContext=FULL, **named
            )
            assert opened["Plaintext"] == made["Plaintext"]
    assert len(asked) == 6


def test_a_ciphertext_under_another_key(inside: Enclave, bounded: Served) -> None:
    """KMS finds the key in the ciphertext: its answer is not given away."""
    third = inside.kms.create_key()["KeyMetadata"]["Arn"]
    blob = inside.kms.encrypt(KeyId=third, Plaintext=b"x", EncryptionContext=FULL)["CiphertextBlob"]
    kms = bounded.client()
    status, code, said, _ = refused(
        lambda: kms.decrypt(CiphertextBlob=blob, EncryptionContext=FULL)
    )
    assert (status, code) == (400, "AttestorNotAuthenticException")
    assert f"from key {third}" in said


@pytest.mark.parametrize(
    "operation", ["Encrypt", "Sign", "CreateKey", "decrypt", "Decrypt\x85", ""]
)
def test_other_operations(bounded: Served, asked: list[str], operation: str) -> None:
    if operation == "Encrypt":
        assert bounded.ask("Encrypt", KeyId="alias/x").error == (400, "AccessDeniedException")
        return
    assert bounded.ask(operation).error == (400, "UnknownOperationException")
    assert asked == []


@pytest.mark.parametrize(
    ("members", "code"),
    [
        ({"Recipient": {"AttestationDocument": "AAAA"}}, "ValidationException"),
        ({"NumberOfBytes": 4, "Plaintext": "AAAA"}, "ValidationException"),
        ({"NumberOfBytes": "four"}, "ValidationException"),
        ({"NumberOfBytes": True, "recipient": {}}, "ValidationException"),
    ],
)
def test_what_botocore_or_we_do_not_know(
    served: Served, asked: list[str], members: dict[str, Any], code: str
) -> None:
    assert served.ask("GenerateRandom", **members).error == (400, code)
    assert asked == []


@pytest.mark.parametrize("blob", ["é", "A", "AA=A", 3, ["AAAA"], {"a": "AAAA"}, True])
def test_bytes_that_are_not_base64(served: Served, asked: list[str], blob: object) -> None:
    assert served.ask("Decrypt", CiphertextBlob=blob).error == (400, "SerializationException")
    assert asked == []


# ---- KMS and the module when they fail


def test_kms_denies(inside: Enclave, served: Served) -> None:
    """The client sees KMS's own words, and the id by which AWS finds the request."""
    policy = json.loads(
        inside.kms.get_key_policy(KeyId=inside.world.kms.key_arn, PolicyName="default")["Policy"]
    )
    del policy["Statement"][2]
    key = inside.kms.create_key(Policy=json.dumps(policy))["KeyMetadata"]["Arn"]
    kms = served.client(attempts=3)
    status, code, said, request_id = refused(
        lambda: kms.generate_data_key(KeyId=key, KeySpec="AES_256")
    )
    assert (status, code) == (400, "AccessDeniedException")
    assert f"is not authorized to perform: kms:GenerateDataKey on resource: {key}" in said
    assert re.fullmatch(r"[0-9a-f-]{36}", request_id or "")


@pytest.mark.parametrize(
    ("fault", "status", "code", "attempts"),
    [
        ("throttling", 400, "ThrottlingException", 3),
        ("internal", 500, "KMSInternalException", 3),
        ("unavailable", 503, "ServiceUnavailable", 3),
        ("access-denied", 400, "AccessDeniedException", 1),
        ("invalid-ciphertext", 400, "InvalidCiphertextException", 1),
        ("reset", 503, "AttestorUnreachableException", 3),
        ("cut-body", 503, "AttestorUnreachableException", 3),
        ("no-envelope", 400, "AttestorNotAuthenticException", 1),
        ("plaintext-beside", 400, "AttestorNotAuthenticException", 1),
        ("envelope-other-key", 400, "AttestorNotAuthenticException", 1),
        ("not-json", 400, "AttestorNotAuthenticException", 1),
        ("html-error", 502, "502", 3),
    ],
)
def test_a_failure_is_seen_as_what_it_is(
    inside: Enclave,
    served: Served,
    asked: list[str],
    fail: Callable[[str], None],
    fault: str,
    status: int,
    code: str,
    attempts: int,
) -> None:
    """And tried again by the client's SDK alone, where that may help."""
    fail(fault)
    blob = inside.encrypt()
    asked.clear()
    kms = served.client(attempts=3)
    found = refused(lambda: kms.decrypt(CiphertextBlob=blob))
    assert found[:2] == (status, code)
    assert len(asked) == attempts
    assert (found[3] is None) == (code.startswith("Attestor") or fault == "html-error")


@pytest.mark.parametrize("fault", ["throttle-once", "internal-once"])
def test_an_sdk_gets_over_a_failure(
    inside: Enclave, served: Served, fail: Callable[[str], None], fault: str
) -> None:
    inside.world.kms._faulted = iter(range(9))  # type: ignore[assignment]  # counts, too
    fail(fault)
    blob = inside.encrypt(b"the secret")
    answer = served.client(attempts=2).decrypt(CiphertextBlob=blob)
    assert (answer["Plaintext"], answer["ResponseMetadata"]["RetryAttempts"]) == (b"the secret", 1)


def test_credentials_are_not_given_away(
    inside: Enclave, served: Served, fail: Callable[[str], None]
) -> None:
    fail("echo-credentials")
    kms = served.client()
    status, code, said, _ = refused(lambda: kms.decrypt(CiphertextBlob=b"x"))
    assert (status, code) == (400, "InvalidSignatureException")
    assert said.startswith("The request signature we calculated does not match")
    assert "x-amz-security-token" not in said


@pytest.mark.parametrize("fault", ["hang", "slow-body"])
def test_kms_that_does_not_end(outside: Enclave, fail: Callable[[str], None], fault: str) -> None:
    blob = base64.b64encode(outside.encrypt()).decode()
    with Served(outside, "--any-key", "--timeout", "1", "--concurrency", "1") as served:
        fail(fault)
        assert served.ask("Decrypt", CiphertextBlob=blob).error == (
            503, "AttestorUnreachableException",
        )  # fmt: skip
        fail("throttle-once")  # the one connection is free again
        assert served.ask("Decrypt", CiphertextBlob=blob).error[0] in {200, 400}
        run = served.end()
    assert run.err.count("attestor: warning: AttestorUnreachableException: ") == 1


def test_no_kms(outside: Enclave) -> None:
    environment = {"AWS_ENDPOINT_URL_KMS": "https://localhost:1"}
    with Served(outside, "--any-key", environment=environment) as served:
        reply = served.ask("GenerateRandom", NumberOfBytes=1)
    assert reply.error == (503, "AttestorUnreachableException")
    assert "KMS cannot be reached" in reply.members["message"]


def test_credentials_that_are_renewed_in_a_file(outside: Enclave) -> None:
    """What the parent puts there is read again once KMS takes the old ones no longer."""

    def write(credentials: Credentials) -> None:
        outside.place(
            f"[default]\naws_access_key_id = {credentials.access_key}\n"
            f"aws_secret_access_key = {credentials.secret_key}\n"
            f"aws_session_token = {credentials.token}\n".encode(),
            "role.ini",
        )

    kms = outside.world.kms
    before, after = kms.credentials, Credentials.generate()
    environment = {
        "AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "AWS_SESSION_TOKEN": None,
        "AWS_SHARED_CREDENTIALS_FILE": "role.ini",
    }  # fmt: skip
    write(before)
    with Served(outside, "--any-key", environment=environment) as served:
        assert served.ask("GenerateRandom", NumberOfBytes=1).status == 200
        kms.credentials = after
        try:
            write(after)
            assert served.ask("GenerateRandom", NumberOfBytes=1).status == 200
            write(before)
            kms.credentials = Credentials.generate()  # and it does not search all the time
            found = [served.ask("GenerateRandom", NumberOfBytes=1).error for _ in range(2)]
        finally:
            kms.credentials = before
    assert found == [(400, "UnrecognizedClientException")] * 2


def test_credentials_are_renewed_before_they_expire(outside: Enclave) -> None:
    """A container's endpoint gives new ones, while KMS takes the old ones no longer."""
    kms = outside.world.kms
    before = kms.credentials

    def answer(connection: socket.socket, head: bytes) -> None:
        soon = (datetime.now(UTC) + timedelta(minutes=5)).strftime("%Y-%m-%dT%H:%M:%SZ")
        whole(given(outside, Expiration=soon))(connection, head)

    with Server(answer) as server:
        environment = {**BARE, FULL_URI: server.url}
        with Served(outside, "--any-key", environment=environment) as served:
            assert served.ask("GenerateRandom", NumberOfBytes=1).status == 200
            try:
                kms.credentials = Credentials.generate()
                assert served.ask("GenerateRandom", NumberOfBytes=1).status == 200
            finally:
                kms.credentials = before
            server.requests.clear()
            assert served.ask("GenerateRandom", NumberOfBytes=1).status == 200
            assert server.requests
            run = served.end()
    assert (run.status, run.err) == (143, "")


def test_a_module_that_hangs(enclaves: Callable[..., Enclave]) -> None:
    """It does so while nobody looks, and then no call waits for longer than it may."""
    enclave = enclaves()
    seam = "attestor.DOCUMENT_FRESH = 0\n"
    with Served(enclave, "--any-key", "--timeout", "3", seam=seam) as served:
        assert served.ask("GenerateRandom", NumberOfBytes=1).status == 200
        enclave.world.module._fault = "silent-module"
        replies = [served.ask("GenerateRandom", NumberOfBytes=1) for _ in range(2)]
        run = served.end()
    for reply in replies:
        assert reply.error == (503, "AttestorUnreachableException")
        assert reply.members["message"] == "no attestation document within 3 seconds"
    assert (run.status, run.err.count("\n")) == (143, 1)


def test_the_module_fails_for_a_while(
    outside: Enclave, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    """With documents that are never fresh."""
    seam = "attestor.DOCUMENT_FRESH = 0\n"
    with Served(outside, "--any-key", seam=seam) as served:
        assert served.ask("GenerateRandom", NumberOfBytes=1).status == 200
        with monkeypatch.context() as failing:
            failing.setattr(outside.world.module, "_fault", "nsm-internal-error")
            reply = served.ask("GenerateRandom", NumberOfBytes=1)
        assert served.ask("GenerateRandom", NumberOfBytes=1).status == 200
        run = served.end()
    assert reply.error == (503, "AttestorModuleException")
    assert "InternalError" in reply.members["message"]
    assert len(asked) == 2
    assert run.err.count("\n") == 1


# ---- beginning and end


def test_a_signal_lets_what_is_under_way_end(
    outside: Enclave, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle connection ends at once, and nobody new is served."""
    arrived, go_on = threading.Event(), threading.Event()
    accept = outside.world.kms._accept

    def hold(request: Any, body: bytes) -> Any:
        arrived.set()
        go_on.wait(60)
        return accept(request, body)

    with Served(outside, "--any-key") as served, ThreadPoolExecutor(2) as threads:
        with socket.socket(socket.AF_UNIX) as idle:
            idle.connect(str(served.socket))
            monkeypatch.setattr(outside.world.kms, "_accept", hold)
            answer = threads.submit(served.ask, "GenerateRandom", NumberOfBytes=7)
            assert arrived.wait(60)
            ended = threads.submit(served.end)
            assert idle.recv(1) == b""
            go_on.set()
        reply, run = answer.result(), ended.result()
    assert (reply.status, len(base64.b64decode(reply.members["Plaintext"]))) == (200, 7)
    assert (run.status, run.err, outside.files()) == (143, "", set())


def test_what_is_under_way_has_a_deadline(outside: Enclave, fail: Callable[[str], None]) -> None:
    with Served(outside, "--any-key", "--timeout", "60") as served:
        assert served.ask("GenerateRandom", NumberOfBytes=1).status == 200
    fail("hang")
    with Served(outside, "--any-key", "--timeout", "2") as served, ThreadPoolExecutor(1) as threads:
        answer = threads.submit(served.ask, "GenerateRandom", NumberOfBytes=1)
        run = served.end()
        with contextlib.suppress(OSError):
            assert answer.result().status == 503
    assert run.status == 143
    assert outside.files() == set()


def test_it_is_fit_to_be_process_1(outside: Enclave, namespaces: None) -> None:
    unshare = ["unshare", "--map-root-user", "--pid", "--fork"]
    # one orphan that has ended before, and one that ends when attestor listens
    waiting = "until [ -e kms.sock ]; do sleep 0.01; done"
    orphans = f'sh -c "(exec >&- 2>&-; {waiting}) & : & :"; exec "$@"'
    wrapper = [*unshare, "sh", "-c", orphans, "sh"]
    with Served(outside, "--any-key", wrapper=wrapper) as served:
        assert served.ask("GenerateRandom", NumberOfBytes=1).status == 200
        outer = served.process.pid
        (inner,) = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
        wait_until(lambda: not Path(f"/proc/{inner}/task/{inner}/children").read_text())
        os.kill(int(inner), signal.SIGTERM)
        run = served.outcome()
    assert (run.status, run.err, outside.files()) == (143, "", set())


def test_files_that_are_there(outside: Enclave) -> None:
    outside.place(b"mine", "kms.ini")
    run = Served(outside, "--any-key").outcome()
    assert (run.status, run.error) == (7, "kms.ini exists")
    assert outside.files() == {"kms.ini"}
    with Served(outside, "--any-key", "--force", "--ready-file", "ready") as again:
        text = (outside.folder / "ready").read_text()
        assert text == f"unix:{again.socket}\n{again.url}\n"
        assert b"mine" not in (outside.folder / "kms.ini").read_bytes()


def test_after_a_kill(outside: Enclave) -> None:
    with Served(outside, "--any-key") as served:
        served.end(signal.SIGKILL)
        assert outside.files() == {"kms.sock", "kms.ini"}
        with Served(outside, "--any-key", "-f") as again:
            assert again.ask("GenerateRandom", NumberOfBytes=1).status == 200
        assert outside.files() == set()


@pytest.mark.parametrize(
    ("options", "status", "part"),
    [
        ([], 2, "nothing to listen on"),
        (["--port", "0"], 2, "need each other"),
        (["--credentials-file", "c", "--socket", "s"], 2, "need each other"),
        (["--port", "0", "--credentials-file", "c", "--allow-uid", "1"], 2, "is of --socket"),
        (["--socket", "s", "--key-id", "x"], 2, "no key ARN"),
        (["--socket", "s", "--pass", "Decrypt"], 2, "--pass Decrypt is none of Encrypt"),
        (["--socket", "s", "--require-context", "=3"], 2, "wants NAME or NAME=VALUE"),
        (["--socket", "s", "--require-context", "a", "--require-context", "a=b"], 2, "a twice"),
        (["--socket", "s", "--any-key", "--ready-fd", "99"], 2, "no open file"),
        (["--socket", "s", "--timeout", "0"], 2, "--timeout wants"),
        (["--socket", "no/s", "--any-key"], 7, "cannot listen on socket no/s"),
        (["--socket", "x" * 200, "--any-key"], 7, "cannot listen"),
        (["--socket", "file", "--any-key"], 7, "in use"),
        (["--socket", "s", "--any-key", "--ready-file", "no/r"], 7, "there is no folder no"),
        (
            ["--socket", "s", "--key-id", f"arn:aws:kms:eu-west-1:111122223333:key/{KEY}",
             "--key-id", f"arn:aws:kms:eu-central-1:111122223333:key/{KEY}"], 2, "eu-central-1",
        ),
        (["--socket", "s", "--any-key", "--key-id", KEY], 2, "contradicts"),
    ],
)  # fmt: skip
def test_what_cannot_be_served(
    outside: Enclave, options: list[str], status: int, part: str
) -> None:
    outside.place(b"", "file")
    run = outside.attestor("serve", *options)
    assert (run.status, run.out) == (status, b""), run.err
    assert part in run.error
    assert outside.files() == {"file"}


def test_without_a_module_or_credentials(outside: Enclave) -> None:
    options = ["serve", "--any-key", "--socket", "s"]
    run = outside.attestor(*options, environment={"NITROSIM_NSM_SOCKET": "/nowhere"})
    assert run.status == 3, run.err
    run = outside.attestor(*options, environment={"AWS_ACCESS_KEY_ID": None})
    assert run.status == 4, run.err
    assert outside.files() == set()


def test_without_h11(outside: Enclave) -> None:
    program = "import sys, attestor\nsys.modules['h11'] = None\nattestor.main()"
    options = ["serve", "--any-key", "--socket", "s"]
    run = outside.run(sys.executable, "-c", program, *options)
    assert (run.status, run.error) == (2, "attestor serve needs the package h11")
    assert "attestor: hint: pip install '.[serve]' in a checkout" in run.err


def test_an_unpinned_key_is_warned_about(outside: Enclave) -> None:
    with Served(outside, "--key-id", "alias/nitrosim") as served:
        kms = served.client()
        made = kms.generate_data_key(KeyId="alias/nitrosim", KeySpec="AES_256")
        assert kms.decrypt(CiphertextBlob=made["CiphertextBlob"])["Plaintext"] == made["Plaintext"]
        run = served.end()
    assert run.err.startswith("attestor: warning: alias/nitrosim pins no key")
    assert run.err.count("\n") == 1
