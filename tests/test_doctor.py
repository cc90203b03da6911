"""`doctor`: passes where everything is right, and names the part that is broken."""

from __future__ import annotations

import json
import re
import socket
import sys
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import pytest

import attestor
from attestor_commands import doctor_checks as doctor
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
    """Exactly this part failed, with a reason and a fix, and everything before it passed."""
    assert found[0] == status
    outcomes = {name: check["outcome"] for name, check in found[1].items()}
    assert [name for name, outcome in outcomes.items() if outcome == "failed"] == [part], outcomes
    before = PARTS[: PARTS.index(part)]
    assert {outcomes[name] for name in before} <= {"passed", "warned", "skipped"}
    for text in texts:
        assert text in f"{found[1][part]['reason']} {found[1][part]['fix']}"


def test_everything_is_right(enclave: Enclave) -> None:
    status, checks = examine(enclave)
    assert status == 0
    outcomes = {name: check["outcome"] for name, check in checks.items()}
    assert outcomes.pop("library") in {"passed", "skipped"}  # whether libnsm.so is built
    assert set(outcomes.values()) == {"passed"}
    assert all(check["reason"] and not check["fix"] for check in checks.values())


def text_of(run: Run) -> str:
    text = run.out.decode()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.isascii()
    return " ".join(text.split())


def test_the_report(enclave: Enclave) -> None:
    run = enclave.attestor("doctor")
    assert (run.status, run.err) == (0, "")
    text = text_of(run)
    assert "warned document genuine only if the root with SHA-256" in text
    assert "fix: a real enclave's is AWS's" in text
    assert "skipped attested call needs --key-id" in text
    assert "passed tls TLSv1." in text


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
        ("nsm-empty-random", 3, "entropy", "no bytes"),
        ("bad-signature", 6, "document", "not signed by the key"),
        ("expired-leaf", 6, "document", "the clock of this enclave may be wrong"),
        ("tls-other-ca", 6, "tls", "AWS_CA_BUNDLE"),
        ("tls-wrong-name", 6, "tls", "certificate of localhost is not valid"),
        ("tls-expired", 6, "tls", "expired"),
        ("tls-plain", 5, "tls", "no TLS with localhost"),
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
    assert [checks[name]["outcome"] for name in ("document", "debug mode", "attested call")] == [
        "warned", "warned", "skipped",
    ]  # fmt: skip
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
    broken(examine(enclave, AWS_ENDPOINT_URL_KMS="http://localhost:1"), 2, "region", "is not https")


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


def test_through_a_proxy_tls_is_left_to_the_call(enclave: Enclave) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://localhost:{proxy.getsockname()[1]}"
        run = enclave.attestor("doctor", environment={"HTTPS_PROXY": address, "NO_PROXY": None})
    assert run.status == 0
    assert "skipped tls the proxy localhost is in between" in text_of(run)


def test_a_vsock_that_leads_nowhere(enclave: Enclave) -> None:
    found = examine(enclave, "--vsock", "3:9", "--timeout", "5")
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


def case_with(**members: Any) -> doctor.Case:
    return doctor.Case(module=True, **members)


def test_randomness_that_repeats_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attestor, "use_module", lambda _: [bytes(256), bytes(256)])
    with pytest.raises(attestor.ModuleError, match="repeats itself"):
        doctor._entropy(case_with())


def test_a_pool_that_is_not_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(*_: int) -> bytes:
        raise BlockingIOError

    monkeypatch.setattr(
        attestor, "use_module", lambda _: [bytes(range(256)), bytes(range(255, -1, -1))]
    )
    monkeypatch.setattr("os.getrandom", blocked)
    assert "not initialised yet" in doctor._entropy(case_with()).reason


def test_a_document_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU's module signs nothing: it sends a signature of 64 zero bytes."""
    monkeypatch.setattr(attestor, "use_module", lambda _: b"\x84")
    with pytest.raises(attestor.NotAuthenticError, match="document cannot be read"):
        doctor._document(case_with())


def test_a_kms_that_ignores_dry_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    kms = attestor.Kms("eu-west-1", None, Deadline(1))
    monkeypatch.setattr(attestor.Kms, "call", lambda *_, **__: {})
    with pytest.raises(attestor.NotAuthenticError, match="answered a dry run"):
        doctor._attested_call(doctor.Case(kms=kms, key_id="alias/x"))


def test_without_a_library_the_device_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NSM_LIBRARY", raising=False)
    monkeypatch.setattr("nsm.library.find_library", lambda: None)
    with pytest.raises(doctor.Skipped, match="/dev/nsm is used directly"):
        doctor._library(doctor.Case())


def test_an_endpoint_that_hangs_up() -> None:
    """After the handshake, before it answers."""
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(attestor.UnreachableError, match="kms does not answer"):
        doctor._date(ours, "kms")


def test_an_endpoint_that_does_not_tell_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_date", lambda *_: None)
    endpoint: Any = SimpleNamespace(meta=SimpleNamespace(endpoint_url="https://kms"))
    with pytest.raises(doctor.Skipped, match="does not tell its time"):
        doctor._clock(doctor.Case(client=endpoint, tls=endpoint))


def test_the_root_is_that_of_aws_unless_told() -> None:
    assert doctor.Case().root == AWS_ROOT_G1_SHA256
