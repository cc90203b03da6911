"""`attestor.attested`: an attested client for any Python program."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Any, Final

import botocore.client
import botocore.session
import pytest

from attestor import InputError, attested
from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Enclave

PRELUDE: Final = """
import attestor, boto3, botocore.session, json, os
kms = attestor.attested(boto3.client("kms"))
def show(value): print(json.dumps(value, default=lambda b: b.hex()))
"""


def python(enclave: Enclave, program: str, environment: dict[str, str | None] | None = None) -> Any:
    """Run a program inside; return what it shows."""
    run = enclave.run(sys.executable, "-c", PRELUDE + program, environment=environment)
    assert run.status == 0, run.err
    return json.loads(run.out)


def error_of(enclave: Enclave, statement: str) -> list[str]:
    """The class and the message of the error that a statement ends with."""
    program = (
        f"try:\n    {statement}\n"
        "except Exception as error:\n    show([type(error).__name__, str(error)])"
    )
    shown: list[str] = python(enclave, program)
    return shown


def test_the_program_in_the_documents(enclave: Enclave) -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(import attestor.*?)```", text, re.DOTALL)
    assert len(program.splitlines()) <= 10
    enclave.place(enclave.encrypt(b"the secret", node="3"), "secret.enc")
    run = enclave.run(sys.executable, "-c", program)
    assert run.status == 0, run.err
    assert run.out.splitlines() == [b"10 bytes", b"32 bytes"]


def test_a_data_key_opens_what_it_wraps(enclave: Enclave) -> None:
    plain, again = python(
        enclave,
        """
made = kms.generate_data_key(KeyId="alias/nitrosim", KeySpec="AES_256")
again = kms.decrypt(CiphertextBlob=made["CiphertextBlob"])
show([made["Plaintext"], again["Plaintext"]])
""",
    )
    assert plain == again
    assert len(bytes.fromhex(plain)) == 32


def test_random_bytes_and_a_key_pair(enclave: Enclave) -> None:
    length, kind, members = python(
        enclave,
        """
from cryptography.hazmat.primitives.serialization import load_der_private_key
answer = kms.generate_data_key_pair(KeyId="alias/nitrosim", KeyPairSpec="ECC_NIST_P256")
key = load_der_private_key(answer["PrivateKeyPlaintext"], None)
random = kms.generate_random(NumberOfBytes=33)
show([len(random["Plaintext"]), key.curve.name, sorted(answer)])
""",
    )
    assert (length, kind) == (33, "secp256r1")
    assert "CiphertextForRecipient" not in members


def test_a_shared_secret(enclave: Enclave) -> None:
    ours, theirs = python(
        enclave,
        """
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
plain = boto3.client("kms")
key_id = plain.create_key(KeySpec="ECC_NIST_P256", KeyUsage="KEY_AGREEMENT")["KeyMetadata"]["Arn"]
peer = ec.generate_private_key(ec.SECP256R1())
spki = peer.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
answer = kms.derive_shared_secret(KeyId=key_id, KeyAgreementAlgorithm="ECDH", PublicKey=spki)
public_key = load_der_public_key(plain.get_public_key(KeyId=key_id)["PublicKey"])
show([answer["SharedSecret"], peer.exchange(ec.ECDH(), public_key)])
""",
    )
    assert ours == theirs


@pytest.mark.parametrize(
    "client",
    [
        'boto3.client("kms")',
        'attestor.attested(attestor.attested(boto3.client("kms")))',
        'attestor.attested(boto3.Session()).client("kms")',
        'attestor.attested(attestor.attested(botocore.session.Session()).create_client("kms"))',
    ],
)
def test_clients_and_sessions_however_often(enclave: Enclave, client: str) -> None:
    if not client.startswith("attestor"):
        client = f"attestor.attested({client})"
    enclave.place(enclave.encrypt(b"the secret", node="3"))
    program = f"kms = {client}\nblob = open('blob', 'rb').read()\n"
    program += (
        "show(kms.decrypt(CiphertextBlob=blob, EncryptionContext={'node': '3'})['Plaintext'])"
    )
    assert bytes.fromhex(python(enclave, program)) == b"the secret"


def test_other_operations_are_left_alone(enclave: Enclave) -> None:
    assert (
        python(enclave, 'show(kms.describe_key(KeyId="alias/nitrosim")["KeyMetadata"]["Enabled"])')
        is True
    )


def test_a_recipient_of_the_callers_own_is_refused(enclave: Enclave) -> None:
    kind, message = error_of(
        enclave, 'kms.generate_random(NumberOfBytes=1, Recipient={"AttestationDocument": b"x"})'
    )
    assert (kind, message) == (
        "InputError",
        "GenerateRandom of an attested client brings a Recipient of its own",
    )


@pytest.mark.parametrize(
    ("statement", "part"),
    [
        (
            'attestor.attested(boto3.client("kms", endpoint_url="http://localhost:1"))',
            "is not https",
        ),
        ('attestor.attested(boto3.client("kms", verify=False))', "verify=False"),
        ('attestor.attested(boto3.client("kms", verify=0))', "verify=False"),
        ('attestor.attested(boto3.client("s3"))', "client of s3"),
        ("attestor.attested(boto3)", "neither a client nor a session"),
        (
            (
                'attestor.attested(boto3.client("kms", config=botocore.config.Config('
                'proxies_config={"proxy_use_forwarding_for_https": True})))'
            ),
            "lets its proxy end TLS",
        ),
        (
            'attestor.attested(boto3.Session()).client("kms", endpoint_url="http://localhost:1")',
            "is not https",
        ),
        ('attestor.attested(boto3.Session()).client("kms", verify=False)', "verify=False"),
    ],
)
def test_a_client_that_authenticates_nobody_is_refused(
    enclave: Enclave, statement: str, part: str
) -> None:
    kind, message = error_of(enclave, statement)
    assert kind == "InputError"
    assert part in message


@pytest.mark.parametrize(
    "fault", ["no-envelope", "nothing-sealed", "plaintext-beside", "wrong-key-id"]
)
def test_no_answer_falls_back(enclaves: Callable[..., Enclave], fault: str) -> None:
    enclave = enclaves(faults=[fault])
    statement = f"kms.generate_data_key(KeyId={enclave.world.kms.key_arn!r}, NumberOfBytes=16)"
    assert error_of(enclave, statement)[0] == "NotAuthenticError"


def test_errors_of_kms_stay_the_sdks_own(enclaves: Callable[..., Enclave]) -> None:
    enclave = enclaves(debug=True)
    kind, message = error_of(
        enclave, 'kms.generate_data_key(KeyId="alias/nitrosim", NumberOfBytes=16)'
    )
    assert "AccessDeniedException" in kind + message


def test_the_document_is_asked_for_anew_when_it_is_a_minute_old(enclave: Enclave) -> None:
    counts = python(
        enclave,
        """
import nsm, time
asked = []
attest = nsm.Nsm.attest
def counted(self, *a, **k): asked.append(1); return attest(self, *a, **k)
nsm.Nsm.attest = counted
counts = []
clock = time.monotonic
for later in (0, 0, 59, 61, 61):
    time.monotonic = lambda: clock() + later
    kms.generate_random(NumberOfBytes=8)
    counts.append(len(asked))
show(counts)
""",
    )
    assert counts == [1, 1, 1, 2, 2]


def test_one_key_pair_per_process_and_a_forked_child_makes_its_own(enclave: Enclave) -> None:
    first, again, child = python(
        enclave,
        """
from concurrent.futures import ThreadPoolExecutor
def identifier(_=None): return attestor._key_identifier(attestor.process_recipient()._key.result())
with ThreadPoolExecutor(8) as pool: seen = set(pool.map(identifier, range(32)))
reader, writer = os.pipe()
if os.fork() == 0:
    kms.generate_random(NumberOfBytes=8)
    os.write(writer, identifier())
    os._exit(0)
child = os.read(reader, 64)
os.wait()
show([seen.pop() if len(seen) == 1 else None, identifier(), child])
""",
    )
    assert first == again
    assert len(bytes.fromhex(child)) == 32
    assert child != first


def test_a_fork_right_after_attested_is_safe(enclave: Enclave) -> None:
    """The key is being made in a thread: the child must not inherit half an import."""
    run = enclave.run(
        sys.executable,
        "-c",
        """
import attestor, boto3, os
statuses = []
for _ in range(5):
    attestor.forget_recipient()
    kms = attestor.attested(boto3.client("kms"))
    if (child := os.fork()) == 0:
        os._exit(len(kms.generate_random(NumberOfBytes=8)["Plaintext"]))
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(statuses)
""",
    )
    assert run.out == b"[8, 8, 8, 8, 8]\n", run.err


def test_a_program_may_end_while_the_key_is_made(enclave: Enclave) -> None:
    program = "import attestor\nattestor.process_recipient().wait_for_module(9)"
    assert [enclave.run(sys.executable, "-c", program).status for _ in range(5)] == [0] * 5


def test_threads_share_one_client(enclave: Enclave) -> None:
    enclave.place(enclave.encrypt(b"the secret"))
    shown = python(
        enclave,
        """
from concurrent.futures import ThreadPoolExecutor
blob = open("blob", "rb").read()
with ThreadPoolExecutor(8) as pool:
    answers = pool.map(lambda _: kms.decrypt(CiphertextBlob=blob), range(32))
    show(sorted({answer["Plaintext"] for answer in answers}))
""",
    )
    assert [bytes.fromhex(value) for value in shown] == [b"the secret"]


def test_a_module_that_comes_back_is_asked_again(enclave: Enclave) -> None:
    kinds = python(
        enclave,
        """
import nsm.device
attestor.forget_recipient()
kinds = []
for path in ("/nowhere", "/dev/nsm"):
    nsm.device.Device.__init__.__defaults__ = (path,)
    os.environ["NSM_LIBRARY"] = ""
    nsm._find_transport = lambda: nsm.device.Device()
    try: kms.generate_random(NumberOfBytes=8); kinds.append("done")
    except Exception as error: kinds.append(type(error).__name__)
show(kinds)
""",
    )
    assert kinds == ["ModuleError", "done"]


# -- asyncio: aiobotocore's classes derive from botocore's, and add these methods


class AioClient(botocore.client.BaseClient):  # type: ignore[misc,unused-ignore]  # has no types
    async def _make_api_call(self, *_: object) -> object:
        return {}


class AioSession(botocore.session.Session):  # type: ignore[misc,unused-ignore]  # has no types
    async def get_credentials(self) -> Any:  # type: ignore[override,unused-ignore]
        return None


class SessionOfAioboto3:
    def __init__(self) -> None:
        self._session = AioSession()
        self.events = self._session.get_component("event_emitter")


def test_clients_and_sessions_of_asyncio_are_refused_at_once() -> None:
    """Their answers come to an emitter that awaits: nothing of a secret would be unwrapped."""
    for subject in (object.__new__(AioClient), AioSession(), SessionOfAioboto3()):
        with pytest.raises(InputError, match="is asynchronous: its answers would not") as refused:
            attested(subject)
        assert "asyncio.to_thread" in refused.value.hints[0]
