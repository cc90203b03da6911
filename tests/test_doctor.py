"""`doctor`: passes where everything is right, and names the part that is broken."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import pytest
from botocore.exceptions import ClientError

import attestor
from attestor_commands import doctor_checks as doctor
from attestor_commands.doctor_call import NoVerdict, dry_run
from attestor_commands.report import WIDTH
from attestor_io.deadline import Deadline
from nsm.document import AWS_ROOT_G1_SHA256
from tests.conftest import ROOT
from tests.test_evidence import refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Enclave, Run

PARTS: Final = [name for name, _ in doctor.CHECKS]
OTHER: Final = "cd" * 48


def examine(
    enclave: Enclave, *options: str, **environment: str | None
) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit status and the checks by name, of `doctor --json` for the simulator's key and root."""
    root = ["--root", enclave.environment["NITROSIM_NSM_ROOT"], "--key-id", "alias/nitrosim"]
    run = enclave.attestor("doctor", "--json", *root, *options, environment=environment)
    assert run.err == ""
    shown = json.loads(run.out)
    assert set(shown) == {"checks", "status"}
    assert shown["status"] == run.status
    assert [check["check"] for check in shown["checks"]] == PARTS
    return run.status, {check["check"]: check for check in shown["checks"]}


def broken(
    found: tuple[int, dict[str, dict[str, str]]], status: int, part: str, *texts: str
) -> None:
    """This part failed first, with a reason and a fix, and nothing else but what it breaks."""
    assert found[0] == status
    outcomes = {name: check["outcome"] for name, check in found[1].items()}
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
    assert failed in ([part], [part, "attested call"]), outcomes
    before = PARTS[: PARTS.index(part)]
    assert {outcomes[name] for name in before} <= {"passed", "warned", "skipped"}
    for text in texts:
        assert text in f"{found[1][part]['reason']} {found[1][part]['fix']}"


def test_everything_is_right(enclave: Enclave) -> None:
    status, checks = examine(enclave)
    assert status == 0
    outcomes = {name: check["outcome"] for name, check in checks.items()}
    assert outcomes.pop("library") in {"passed", "skipped"}  # whether libnsm.so is built
    assert outcomes.pop("ciphertext") == "skipped"
    assert set(outcomes.values()) == {"passed"}
    assert all(check["reason"] and not check["fix"] for check in checks.values())


def test_of_a_ciphertext(enclave: Enclave) -> None:
    """By its own key and context, with no key named."""
    root = ["--root", enclave.environment["NITROSIM_NSM_ROOT"]]
    enclave.place(enclave.encrypt(node="3"))
    run = enclave.attestor("doctor", *root, "--context", "node=3", "blob")
    assert run.status == 0
    assert "passed attested call KMS would decrypt" in text_of(run)
    run = enclave.attestor("doctor", *root, "--context", "node=4", "blob")
    assert run.status == 4
    assert "failed attested call KMS refused to decrypt: InvalidCiphertext" in text_of(run)
    assert enclave.files() == {"blob"}


def test_of_a_message(enclave: Enclave) -> None:
    """Its data key is asked for; what is behind it nobody reads."""
    enclave.place(b"x" * 10000, "plain")
    options = ["--key-id", enclave.world.kms.key_arn, "--context", "node=3"]
    assert enclave.attestor("encrypt", "--format", "esdk", *options, "plain", "blob").status == 0
    run = enclave.attestor("doctor", *options, "blob")
    assert run.status == 0, run
    assert "passed ciphertext a message of the AWS Encryption SDK" in text_of(run)
    assert "passed attested call KMS would decrypt" in text_of(run)
    run = enclave.attestor("doctor", "--context", "node=4", "blob")
    assert run.status == 6
    assert "failed attested call message of the AWS Encryption SDK has another context" in (
        text_of(run)
    )


def text_of(run: Run) -> str:
    text = run.out.decode()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.isascii()
    return " ".join(text.split())


def test_the_report(enclave: Enclave) -> None:
    run = enclave.attestor("doctor")
    assert (run.status, run.err) == (0, "")
    text = text_of(run)
    assert "warned verification genuine only if the root with SHA-256" in text
    assert "fix: a real enclave's is AWS's" in text
    assert "skipped attested call needs CIPHERTEXT, or else --key-id" in text
    assert "passed tls certificate of localhost is valid by the roots of" in text


def test_no_device(enclave: Enclave) -> None:
    broken(
        examine(enclave, LD_PRELOAD=None), 3, "device", "no Nitro Secure Module", "Nitro Enclave"
    )


def test_a_library_that_does_not_work(enclave: Enclave) -> None:
    status, checks = examine(enclave, NSM_LIBRARY="/nowhere/libnsm.so")
    assert status == 2
    assert checks["library"]["outcome"] == checks["device"]["outcome"] == "failed"
    assert "/nowhere/libnsm.so" in checks["library"]["reason"]


@pytest.mark.parametrize(
    ("fault", "status", "part", "text"),
    [
        ("nsm-internal-error", 3, "device", "InternalError"),
        ("nsm-empty-random", 3, "device", "no bytes"),
        ("bad-signature", 4, "verification", "not signed by the key"),
        ("expired-leaf", 4, "verification", "validity"),
        ("tls-other-ca", 6, "tls", "AWS_CA_BUNDLE"),
        ("tls-wrong-name", 6, "tls", "certificate of KMS is not valid"),
        ("tls-expired", 6, "tls", "expired"),
        ("tls-plain", 5, "tls", "no TLS with KMS"),
        ("expired-token", 4, "attested call", "the credentials are expired"),
        ("throttling", 5, "attested call", "ThrottlingException"),
    ],
)
def test_a_fault(
    enclaves: Callable[..., Enclave], fault: str, status: int, part: str, text: str
) -> None:
    broken(examine(enclaves(faults=[fault]), AWS_MAX_ATTEMPTS="1"), status, part, text)


def test_an_unknown_root_is_a_warning_and_debug_mode_too(enclaves: Callable[..., Enclave]) -> None:
    run = enclaves(debug=True).attestor("doctor", "--json")
    checks = {check["check"]: check for check in json.loads(run.out)["checks"]}
    assert run.status == 0
    names = ("verification", "debug mode", "attested call")
    assert [checks[name]["outcome"] for name in names] == ["warned", "warned", "skipped"]
    assert "PCR0, PCR1 and PCR2 are all zeros" in checks["debug mode"]["reason"]


@pytest.mark.parametrize("seconds", [400.0, -400.0])
def test_a_skewed_clock(enclaves: Callable[..., Enclave], seconds: float) -> None:
    side = "behind" if seconds > 0 else "ahead of"
    broken(examine(enclaves(clock_skew=seconds)), 4, "clock", f" s {side}", "set the clock")


def test_nitrosim_skews_the_clock_on_demand(enclave: Enclave) -> None:
    nitrosim = [sys.executable, "-m", "nitrosim.cli", "run", "--clock-skew", "-7200", "--"]
    run = enclave.run(*nitrosim, sys.executable, "-m", "attestor", "doctor")
    assert run.status == 4, run.err
    # a whole second of the Date header may pass on a busy machine
    assert re.search(
        r"failed clock this clock is 7(199|200|201) s ahead of the endpoint's", text_of(run)
    )


def test_a_clock_that_is_a_little_off_is_a_warning(enclaves: Callable[..., Enclave]) -> None:
    status, checks = examine(enclaves(clock_skew=120.0))
    assert (status, checks["clock"]["outcome"]) == (0, "warned")


def test_wrong_pcrs(enclaves: Callable[..., Enclave]) -> None:
    enclave = enclaves(pcrs={0: bytes.fromhex(OTHER)})
    broken(
        examine(enclave),
        4,
        "attested call",
        "AccessDeniedException",
        "allows this role with these PCRs",
    )
    broken(examine(enclaves(debug=True)), 4, "attested call", "debug mode")


def test_credentials(enclave: Enclave) -> None:
    expired = examine(enclave, AWS_CREDENTIAL_EXPIRATION="2020-01-01T00:00:00Z")
    broken(expired, 4, "credentials", "expired", "renew them")
    nothing = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"))
    broken(
        examine(enclave, **nothing),
        4,
        "credentials",
        "no valid AWS credentials",
        "the parent must pass them on",
    )
    soon = (datetime.now(UTC) + timedelta(seconds=200)).isoformat()
    status, checks = examine(enclave, AWS_CREDENTIAL_EXPIRATION=soon)
    assert (status, checks["credentials"]["outcome"]) == (0, "warned")
    later = (datetime.now(UTC) + timedelta(hours=2)).isoformat()
    status, checks = examine(enclave, AWS_CREDENTIAL_EXPIRATION=later)
    assert (status, checks["credentials"]["outcome"]) == (0, "passed")
    assert "they expire in " in checks["credentials"]["reason"]


def test_credentials_are_not_shown(enclave: Enclave) -> None:
    root = ["--root", enclave.environment["NITROSIM_NSM_ROOT"]]
    for secret in ("a-wrong-secret-key", enclave.world.kms.credentials.secret_key):
        run = enclave.attestor(
            "doctor",
            *root,
            "--key-id",
            "alias/nitrosim",
            environment={"AWS_SECRET_ACCESS_KEY": secret},
        )
        assert secret not in run.out.decode() + run.err
        assert enclave.world.kms.credentials.token not in run.out.decode()


def test_no_region(enclave: Enclave) -> None:
    broken(
        examine(enclave, AWS_REGION=None, AWS_DEFAULT_REGION=None),
        2,
        "region",
        "no region",
        "--region",
    )


def test_an_insecure_endpoint(enclave: Enclave) -> None:
    broken(
        examine(enclave, AWS_ENDPOINT_URL_KMS="http://localhost:1"), 2, "endpoint", "is not https"
    )


@pytest.fixture
def refusing() -> Iterator[int]:
    """A port that is bound, but where nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield unused.getsockname()[1]


def test_a_refused_port(enclave: Enclave, refusing: int) -> None:
    found = examine(enclave, "--endpoint-url", f"https://localhost:{refusing}")
    broken(found, 5, "tcp", f"localhost port {refusing}", "Connection refused", "vsock-proxy")


def test_a_name_that_does_not_resolve(enclave: Enclave) -> None:
    broken(
        examine(enclave, "--endpoint-url", "https://kms.invalid"),
        5,
        "name",
        "kms.invalid",
        "--vsock",
    )


def test_a_proxy_is_named(enclave: Enclave, refusing: int) -> None:
    found = examine(enclave, HTTPS_PROXY=f"http://localhost:{refusing}", NO_PROXY=None)
    broken(found, 5, "tcp", f"localhost port {refusing}")
    assert found[1]["name"]["reason"].endswith("a proxy")


def test_through_a_proxy_tls_is_checked_too(enclave: Enclave) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        thread = threading.Thread(target=refuse, args=(proxy, 2), daemon=True)
        thread.start()
        address = f"http://localhost:{proxy.getsockname()[1]}"
        run = enclave.attestor("doctor", environment={"HTTPS_PROXY": address, "NO_PROXY": None})
        thread.join()
    assert run.status == 5
    assert "failed tls KMS cannot be reached: Failed to connect to proxy" in text_of(run)


def refuse(proxy: socket.socket, count: int) -> None:
    """Answer so many connections as a proxy that lets nobody through; the first only looks."""
    for _ in range(count):
        connection, _address = proxy.accept()
        with connection:
            if connection.recv(4096):
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")


def test_a_vsock_that_leads_nowhere(enclave: Enclave) -> None:
    found = examine(enclave, "--vsock", "3:9")
    broken(found, 5, "tcp", "no connection to vsock 3:9")
    assert "vsock 3:9 carries the connection" in found[1]["name"]["reason"]


def test_a_ca_bundle_that_is_none(enclave: Enclave) -> None:
    enclave.place(b"no certificate", "ca.pem")
    for path in ("ca.pem", "/nowhere.pem"):
        broken(examine(enclave, AWS_CA_BUNDLE=path), 2, "tls", path, "AWS_CA_BUNDLE")


def test_another_key_and_another_context(enclaves: Callable[..., Enclave]) -> None:
    enclave = enclaves()
    root = ["--root", enclave.environment["NITROSIM_NSM_ROOT"]]
    other = enclave.kms.create_key()["KeyMetadata"]["Arn"]
    # its policy delegates to the account
    assert enclave.attestor("doctor", *root, "--key-id", other).status == 0
    absent = other[:-12] + "0" * 12
    run = enclave.attestor("doctor", *root, "--key-id", absent)
    assert run.status == 4
    assert "NotFoundException" in text_of(run)


def test_the_script_as_a_file(enclave: Enclave) -> None:
    """As `python3 attestor.py` the module is __main__; what doctor imports must be the same."""
    run = enclave.run(
        sys.executable, str(ROOT / "attestor.py"), "doctor", environment={"LD_PRELOAD": None}
    )
    assert (run.status, run.err) == (3, "")


def test_options_that_cannot_be(enclave: Enclave) -> None:
    refused(enclave.attestor("doctor", "--root", "/nowhere"), 2, "root /nowhere cannot be read")
    refused(enclave.attestor("doctor", "--key-id", "1234"), 2, "is no key ARN")
    refused(enclave.attestor("doctor", "--any-key"), 2, "no such option")


# -- what no simulator breaks


def case(**members: Any) -> doctor.Case:
    return doctor.Case(connection={"deadline": Deadline(60)}, **members)


def test_randomness_that_repeats_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """decrypt would not see it: a warning."""
    monkeypatch.setattr(attestor, "use_module", lambda _: [bytes(256), bytes(256)])
    assert doctor._entropy(case()).fix == "trust no key that is made here"


def test_a_pool_that_is_not_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(*_: int) -> bytes:
        raise BlockingIOError

    monkeypatch.setattr(
        attestor, "use_module", lambda _: [bytes(range(256)), bytes(range(255, -1, -1))]
    )
    monkeypatch.setattr("os.getrandom", blocked)
    assert "not initialised yet" in doctor._entropy(case()).reason


class Recipient:
    """A recipient whose module is not a simulated one."""

    def __init__(self, document: bytes = b"") -> None:
        self._document = document

    def wait_for_module(self, _: Deadline) -> None:
        """It answers."""

    def wait_for_document(self, _: Deadline) -> None:
        """It signs one."""

    def document(self) -> bytes:
        """What it signs."""
        return self._document


def test_a_document_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU's module signs nothing: it sends a signature of 64 zero bytes. KMS would refuse it."""
    monkeypatch.setattr(attestor, "process_recipient", lambda: Recipient(b"\x84"))
    with pytest.raises(attestor.RefusedError, match="KMS would refuse the document, format"):
        doctor._verification(case())


def test_a_module_that_does_not_describe_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """decrypt does not ask for that."""

    def refuse_all(_: object) -> None:
        raise attestor.ModuleError("the Nitro Secure Module refused: DescribeNSM")

    monkeypatch.setattr(attestor, "process_recipient", Recipient)
    monkeypatch.setattr(attestor, "use_module", refuse_all)
    assert doctor._device(case()).fix == "decrypt can do without"


def test_a_module_that_falls_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = threading.Event()
    monkeypatch.setattr(attestor, "use_module", lambda _: silent.wait())
    with pytest.raises(attestor.ModuleError, match="does not answer within"):
        doctor.Case(connection={"deadline": Deadline(0.01)}).ask_module(lambda module: module)
    silent.set()


def answer(code: str) -> attestor.RefusedError:
    """KMS's refusal with this code."""
    error = attestor.RefusedError(f"KMS refused to decrypt: {code}")
    error.__cause__ = ClientError({"Error": {"Code": code}}, "Decrypt")
    return error


KMS: Final = attestor.Kms("eu-west-1", None, Deadline(60))
BY_KEY: Final = attestor.Binding("alias/x")


def call(monkeypatch: pytest.MonkeyPatch, result: Exception | dict[str, Any]) -> None:
    """Let KMS answer so."""

    def ask(*_: object, **__: object) -> dict[str, Any]:
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(attestor.Kms, "call", ask)


def test_a_kms_that_ignores_dry_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a ciphertext it has done what decrypt does; without one it has made something up."""
    monkeypatch.setattr(attestor, "process_recipient", Recipient)
    call(monkeypatch, {"Plaintext": b"x"})
    reason, fix = dry_run(KMS, b"blob", attestor.Binding(None), None)
    assert (reason.startswith("KMS decrypted"), fix) == (True, "is this endpoint AWS KMS?")
    with pytest.raises(attestor.NotAuthenticError, match="without a ciphertext"):
        dry_run(KMS, None, BY_KEY, None)


@pytest.mark.parametrize("code", ["InvalidCiphertextException", "ValidationException"])
def test_a_kms_that_knows_no_dry_run_without_a_ciphertext(
    monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """It misses the ciphertext: nothing is known of it, and it is not called damaged."""
    monkeypatch.setattr(attestor, "process_recipient", Recipient)
    call(monkeypatch, answer(code))
    with pytest.raises(NoVerdict, match="name one as CIPHERTEXT"):
        dry_run(KMS, None, BY_KEY, None)
    with pytest.raises(attestor.RefusedError):
        dry_run(KMS, b"blob", BY_KEY, None)
    with pytest.raises(doctor.Skipped, match="name one as CIPHERTEXT"):
        doctor._attested_call(case(kms=KMS, bound=BY_KEY))


def test_a_document_that_kms_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same exception, but here we know why."""
    call(monkeypatch, answer("ValidationException"))
    with pytest.raises(attestor.RefusedError):
        dry_run(KMS, None, BY_KEY, None, document_holds=False)


def test_a_botocore_that_knows_no_dry_run_without_a_ciphertext(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call(monkeypatch, attestor.InputError("KMS would not take these parameters"))
    with pytest.raises(NoVerdict, match="this botocore"):
        dry_run(KMS, None, BY_KEY, None)


def test_a_failure_that_kms_does_not_mind_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: doctor.Case) -> doctor.Finding:
        raise attestor.UnreachableError("no answer")

    checks = (("tls", failing), ("attested call", lambda _: doctor.Finding("KMS would")))
    monkeypatch.setattr(doctor, "CHECKS", checks)
    results = doctor.examine(case())
    assert [result.outcome for result in results] == ["warned", "passed"]
    assert doctor.status_of(results) == 0


def test_without_a_library_the_device_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NSM_LIBRARY", raising=False)
    monkeypatch.setattr("nsm.library.find_library", lambda: None)
    with pytest.raises(doctor.Skipped, match="/dev/nsm is used directly"):
        doctor._library(case())


def test_an_endpoint_that_does_not_tell_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(doctor.Skipped, match="has not told its time"):
        doctor._clock(case())
    monkeypatch.setattr(attestor, "wrong_clock", lambda: "clock of this enclave is 400 s behind")
    assert doctor._clock(case()).fix == "set the clock of this enclave"
    with pytest.raises(attestor.UnreachableError, match="KMS takes 300 s"):
        doctor._clock(case(skew=400.0))


def test_the_root_is_that_of_aws_unless_told() -> None:
    assert doctor.Case().root == AWS_ROOT_G1_SHA256
