"""`attest`, `describe` and `verify`: what an enclave proves, from the command line."""

from __future__ import annotations

import base64
import json
import re
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import cbor2
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

import attestor
from attestor_commands.evidence_report import meaning
from attestor_commands.report import WIDTH, age
from nitrosim.module import DEFAULT_MODULE_ID, DEFAULT_PCRS
from nsm.document import CHECKS, AttestationDocument
from tests.conftest import Run
from tests.test_document import signed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Enclave

DOCUMENTS: Final = [
    "2022-10-12_debug-mode",
    "2022-11-09_user-data_nonce",
    "2023-01-18_user-data_nonce-256",
    "2024-08-16_debug-mode_all-fields",
    "2025-04-15_public-key-32",
    "2026-01-03_user-data_indefinite-map",
]
PCR0: Final = DEFAULT_PCRS[0].hex()


def command(*arguments: str) -> Run:
    """Run the command line in this process: fast, for what needs neither module nor KMS."""
    result = CliRunner().invoke(attestor.cli, list(arguments))
    return Run(result.exit_code, result.stdout_bytes, result.stderr)


def report(run: Run) -> str:
    """The report of a success: nothing on stderr, and no line longer than 100 columns."""
    assert (run.status, run.err) == (0, "")
    text = run.out.decode()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.isascii()
    assert "\x1b" not in text
    return text


def refused(run: Run, status: int, *parts: str) -> None:
    assert run.status == status, run.err
    assert run.out == b""
    assert all(re.match(r"attestor: (error|note|hint): ", line) for line in run.err.splitlines())
    assert run.error
    for part in parts:
        assert part in run.err


@pytest.fixture
def genuine(vectors: Path, request: pytest.FixtureRequest) -> str:
    return str(vectors / "attestation" / f"{request.param}.cose")


def debug(path: str) -> list[str]:
    return ["--allow-debug"] if "debug-mode" in path else []


# -- genuine documents


@pytest.mark.parametrize("genuine", DOCUMENTS, indirect=True)
def test_a_genuine_document_verifies_at_its_own_timestamp(genuine: str) -> None:
    text = report(command("verify", "--at", "document", "--any-image", *debug(genuine), genuine))
    assert "(its own timestamp)" in text
    assert "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b" in text
    assert "CN=aws.nitro-enclaves" in text
    assert "days ago" in text
    assert ("YES: PCR0 is all zeros" in text) == bool(debug(genuine))


@pytest.mark.parametrize("genuine", DOCUMENTS, indirect=True)
def test_a_genuine_document_has_expired_today(genuine: str) -> None:
    run = command("verify", "--any-image", *debug(genuine), genuine)
    refused(run, 6, "document refused, validity", "verified at", "hint: ", "--at document")


@pytest.mark.parametrize("genuine", DOCUMENTS, indirect=True)
def test_an_image_must_be_expected_or_any_be_meant(genuine: str) -> None:
    refused(
        command("verify", "--at", "document", *debug(genuine), genuine),
        2,
        "no PCR is expected",
        "--any-image",
    )


@pytest.mark.parametrize("genuine", DOCUMENTS, indirect=True)
def test_debug_mode_must_be_allowed(genuine: str) -> None:
    run = command("verify", "--at", "document", "--any-image", genuine)
    if debug(genuine):
        refused(run, 6, "debug mode", "--allow-debug")
    else:
        report(run)


@pytest.mark.parametrize("genuine", DOCUMENTS[-1:], indirect=True)
def test_a_genuine_document_meets_its_pcrs_in_both_encodings(genuine: str) -> None:
    shown = json.loads(
        command("verify", "--at", "document", "--any-image", "--json", "--base64", genuine).out
    )
    assert shown["pcr_encoding"] == "base64"
    for value in (shown["pcrs"]["0"], base64.b64decode(shown["pcrs"]["0"]).hex()):
        report(command("verify", "--at", "document", "--pcr", f"0={value}", genuine))
    refused(
        command("verify", "--at", "document", "--pcr", f"0={PCR0}", genuine),
        6,
        "PCR0 is",
        f"expected {PCR0}",
    )


def test_the_vectors_are_those_that_are_tested(vectors: Path) -> None:
    assert {path.stem for path in (vectors / "attestation").glob("*.cose")} == set(DOCUMENTS)


# -- attest and verify


def attest(enclave: Enclave, *options: str) -> AttestationDocument:
    run = enclave.attestor("attest", "--force", *options, "document")
    assert (run.status, run.out, run.err) == (0, b"", "")
    return AttestationDocument.parse((enclave.folder / "document").read_bytes())


def verify(enclave: Enclave, *options: str) -> Run:
    root = ["--root", enclave.environment["NITROSIM_NSM_ROOT"]]
    return command("verify", *root, *options, str(enclave.folder / "document"))


def test_a_document_holds_the_fields_that_were_given(enclave: Enclave) -> None:
    enclave.place(b"\x00a key", "key")
    document = attest(enclave, "--nonce", "00ff", "--user-data", "", "--public-key", "@key")
    assert (document.nonce, document.user_data, document.public_key) == (
        b"\x00\xff",
        b"",
        b"\x00a key",
    )
    document = attest(enclave)
    assert (document.nonce, document.user_data, document.public_key) == (None, None, None)


def test_a_document_on_standard_output(enclave: Enclave) -> None:
    run = enclave.attestor("attest", "--nonce", "01", "-")
    assert (run.status, run.err) == (0, "")
    assert AttestationDocument.parse(run.out).nonce == b"\x01"
    assert enclave.files() == set()


def test_an_existing_document_is_not_replaced(enclave: Enclave) -> None:
    enclave.place(b"there", "document")
    run = enclave.attestor("attest", "document")
    refused(run, 7, "document exists", "--force")
    assert (enclave.folder / "document").read_bytes() == b"there"


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("0", "neither pairs of hexadecimal"),
        ("xy", "neither"),
        ("@absent", "absent cannot be read"),
        ("@big", "longer"),
    ],
)
def test_a_field_that_cannot_be(enclave: Enclave, value: str, part: str) -> None:
    enclave.place(bytes(4097), "big")
    refused(enclave.attestor("attest", "--nonce", value, "document"), 2, part)
    assert enclave.files() == {"big"}


@pytest.mark.parametrize("option", ["--nonce", "--user-data", "--public-key"])
def test_fields_that_no_verifier_takes(enclave: Enclave, option: str) -> None:
    """The module signs more than the specification allows, and then nobody can verify it."""
    part = f"{option} has 1025 bytes, expected at most 1024"
    refused(enclave.attestor("attest", option, "00" * 1025, "document"), 2, part)
    assert enclave.files() == set()
    assert enclave.attestor("attest", option, "00" * 1024, "document").status == 0
    root = enclave.environment["NITROSIM_NSM_ROOT"]
    assert enclave.attestor("verify", "--any-image", "--root", root, "document").status == 0


def test_attest_and_describe_outside_an_enclave(enclave: Enclave) -> None:
    outside = {"LD_PRELOAD": None}
    refused(
        enclave.attestor("attest", "document", environment=outside), 3, "no Nitro Secure Module"
    )
    refused(enclave.attestor("describe", environment=outside), 3, "no Nitro Secure Module")
    assert enclave.files() == set()


def test_a_fresh_document_verifies_now(enclave: Enclave) -> None:
    attest(enclave, "--nonce", "0123", "--user-data", "45", "--public-key", "67")
    measurements = {
        "Measurements": {"HashAlgorithm": "Sha384 { ... }"}
        | {f"PCR{n}": DEFAULT_PCRS[n].hex() for n in range(3)}
    }
    enclave.place(json.dumps(measurements).encode(), "build.json")
    text = report(
        verify(
            enclave, "--measurements", str(enclave.folder / "build.json"),
            "--pcr", f"8={DEFAULT_PCRS[8].hex()}", "--nonce", "0123", "--user-data", "45",
            "--public-key", "67", "--module-id", DEFAULT_MODULE_ID, "--max-age", "60",
        )
    )  # fmt: skip
    assert "not asked" not in text
    assert "  pcrs              passed: 0, 1, 2, 8\n" in text
    assert "nonce           2 bytes: 0123\n" in text
    for index in (0, 1, 2, 4, 8):
        assert (
            f"  PCR{index}   {meaning(index)}\n         {DEFAULT_PCRS[index].hex()[:48]}\n" in text
        )


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--pcr", f"1={PCR0}"], "PCR1 is"),
        (["--pcr", f"16={PCR0}"], "PCR16 is absent"),
        (["--any-image", "--nonce", "0124"], "nonce is 0123, expected 0124"),
        (["--any-image", "--nonce", ""], "nonce is 0123, expected empty"),
        (["--any-image", "--user-data", "45"], "user_data is absent, expected 45"),
        (["--any-image", "--public-key", "45"], "public_key is absent"),
        (["--any-image", "--module-id", "i-1"], "module_id is"),
        (["--any-image", "--at", "2020-01-01T00:00:00Z"], "validity"),
        (["--any-image", "--at", "2999-01-01T00:00:00+02:00"], "validity"),
    ],
)
def test_a_document_that_says_something_else(
    enclave: Enclave, options: list[str], part: str
) -> None:
    attest(enclave, "--nonce", "0123")
    refused(verify(enclave, *options), 6, part)


def test_a_simulated_document_does_not_lead_to_the_root_of_aws(enclave: Enclave) -> None:
    attest(enclave)
    refused(
        command("verify", "--any-image", str(enclave.folder / "document")),
        6,
        "document refused, root",
        "--root",
    )


def test_the_root_may_be_pem(enclave: Enclave, tmp_path: Path) -> None:
    attest(enclave)
    with open(enclave.environment["NITROSIM_NSM_ROOT"], "rb") as source:
        root = x509.load_der_x509_certificate(source.read())
    (tmp_path / "root.pem").write_bytes(root.public_bytes(Encoding.PEM))
    document = str(enclave.folder / "document")
    report(command("verify", "--root", str(tmp_path / "root.pem"), "--pcr", f"0={PCR0}", document))
    refused(command("verify", "--root", document, "--any-image", document), 2, "no certificate")


def test_an_old_document_is_told_by_its_age(enclave: Enclave) -> None:
    attest(enclave)
    soon = (datetime.now(UTC) + timedelta(minutes=1)).isoformat()
    report(verify(enclave, "--any-image", "--max-age", "60", "--at", soon))
    refused(
        verify(enclave, "--any-image", "--max-age", "0.001"), 6, "max age: document was signed at"
    )


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--at", "document", "--max-age", "60"], "--max-age contradicts --at document"),
        (["--max-age", "soon"], "no number of seconds"),
        (["--max-age", "0"], "no number of seconds"),
        (["--max-age", "99999999"], "no number of seconds"),
        (["--at", "yesterday"], "no time such as"),
        (["--at", "2026-01-01T00:00:00"], "no time zone"),
        (["--at", "0001-01-01T00:00:00+14:00"], "beyond the years"),
        (["--pcr", "0"], "is not N=HEX"),
        (["--pcr", "32=" + PCR0], "is not N=HEX"),
        (["--pcr", "00=" + PCR0], "is not N=HEX"),
        (["--pcr", "0=0x" + PCR0], "98 characters, expected 96 hexadecimal ones or 64 of base64"),
        (["--pcr", "0=" + "g" * 96], "expected 96 hexadecimal"),
        (["--pcr", "0=" + "=" * 64], "expected 96 hexadecimal"),
        (["--pcr", f"0={PCR0}", "--pcr", f"0={'ab' * 48}"], "PCR0 is given twice"),
        (["--nonce", "0"], "neither pairs of hexadecimal"),
        (["--root", "/nowhere"], "root /nowhere cannot be read"),
        (["--measurements", "/nowhere"], "/nowhere cannot be read"),
    ],
)
def test_an_option_of_verify_that_cannot_be(options: list[str], part: str) -> None:
    refused(command("verify", "--any-image", *options, "document"), 2, part)


def test_measurements_of_a_debug_enclave_are_refused(tmp_path: Path) -> None:
    enclaves = [{"Flags": "DEBUG_MODE", "Measurements": {"PCR0": PCR0}}]
    (tmp_path / "enclaves.json").write_text(json.dumps(enclaves))
    refused(
        command("verify", "--measurements", str(tmp_path / "enclaves.json"), "document"),
        2,
        "debug mode",
    )


@pytest.mark.parametrize(
    "data", [b"", b"\x84", base64.b64encode(bytes(99)), bytes(20000), bytes(300000)]
)
def test_what_is_no_document(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "document").write_bytes(data)
    run = command("verify", "--any-image", str(tmp_path / "document"))
    refused(
        run,
        2 if len(data) > 262144 else 6,
        "longer than" if len(data) > 262144 else "document refused, format",
    )
    assert ("decode base64 text" in run.err) == (len(data) == 132)


def test_the_document_of_qemu_is_refused_by_its_form(enclave: Enclave) -> None:
    """Its nitro-enclave machine has no key: certificates and signature are 64 zero bytes."""
    payload = {
        "module_id": "i-234-enc5678",
        "digest": "SHA384",
        "timestamp": 1770000000000,
        "pcrs": dict.fromkeys(range(16), bytes(48)),
        "certificate": bytes(64),
        "cabundle": [bytes(64)],
        "public_key": None,
        "user_data": None,
        "nonce": None,
    }
    document = [cbor2.dumps({1: -1}), {}, cbor2.dumps(payload), bytes(64)]
    enclave.place(cbor2.dumps(document), "doc")
    run = enclave.attestor("verify", "--any-image", "doc")
    refused(run, 6, "document refused, format: ")
    assert "base64" not in run.err


def test_a_serial_number_that_is_negative_prints_no_warning_of_a_library(enclave: Enclave) -> None:
    """RFC 5280 forbids it (4.1.2.2), and cryptography says so; what a document is, verify says."""
    pki = enclave.world.module._pki
    serial = pki.levels["leaf"].certificate.serial_number
    number = serial.to_bytes((serial.bit_length() + 8) // 8)
    negative = pki.leaf_der.replace(number, bytes((number[0] | 0x80,)) + number[1:], 1)
    assert negative != pki.leaf_der
    assert x509.load_der_x509_certificate(pki.leaf_der).serial_number > 0
    now = datetime.now(UTC).timestamp()
    fields = {"certificate": negative, "module_id": DEFAULT_MODULE_ID, "timestamp": int(now * 1000)}
    enclave.place(signed(pki, **fields), "doc")
    root = enclave.environment["NITROSIM_NSM_ROOT"]
    run = enclave.attestor("verify", "--any-image", "--root", root, "doc")
    refused(run, 6, "document refused, ")
    assert len(run.err.splitlines()) == 1


def test_a_document_from_standard_input_and_one_that_is_not_there(enclave: Enclave) -> None:
    document = enclave.attestor("attest", "-").out
    run = enclave.attestor(
        "verify",
        "--any-image",
        "--root",
        enclave.environment["NITROSIM_NSM_ROOT"],
        "-",
        stdin=document,
    )
    assert DEFAULT_MODULE_ID in report(run)
    refused(command("verify", "--any-image", "absent"), 2, "document absent cannot be read")


def test_one_changed_bit_is_refused(enclave: Enclave) -> None:
    attest(enclave)
    data = bytearray((enclave.folder / "document").read_bytes())
    data[data.index(DEFAULT_PCRS[0])] ^= 1
    enclave.place(bytes(data), "document")
    refused(verify(enclave, "--any-image"), 6, "document refused, signature")


# -- JSON


def test_the_json_of_verify(enclave: Enclave) -> None:
    """The schema that the README documents."""
    document = attest(enclave, "--nonce", "0123")
    run = verify(enclave, "--pcr", f"0={PCR0}", "--json")
    assert (run.status, run.err) == (0, "")
    shown: dict[str, Any] = json.loads(run.out)
    chain, checks = shown.pop("chain"), shown.pop("checks")
    assert shown.pop("age_seconds") in range(-1, 60)
    assert datetime.fromisoformat(shown.pop("verified_at")).tzinfo
    assert shown == {
        "verified": True,
        "source": "enclave",
        "module_id": DEFAULT_MODULE_ID,
        "digest": "SHA384",
        "signed_at": document.signed_at.isoformat(timespec="seconds").replace("+00:00", "Z"),
        "at_own_timestamp": False,
        "debug_mode": False,
        "pcr_encoding": "hex",
        "pcrs": {str(index): value.hex() for index, value in sorted(DEFAULT_PCRS.items())}
        | {"3": document.pcrs[3].hex()},
        "nitrotpm_pcrs": {},
        "expected_pcrs": [0],
        "public_key": None,
        "user_data": None,
        "nonce": "0123",
        "root_sha256": enclave.world.kms._root.hex(),
    }
    assert [set(link) for link in chain] == [{"subject", "not_before", "not_after"}] * 5
    assert list(checks) == list(CHECKS)
    assert set(checks.values()) == {"passed", "not asked"}
    assert (checks["pcrs"], checks["nonce"]) == ("passed", "not asked")


def test_the_json_of_describe(enclave: Enclave) -> None:
    run = enclave.attestor("describe", "--json")
    assert (run.status, run.err) == (0, "")
    shown: dict[str, Any] = json.loads(run.out)
    pcrs, transport = shown.pop("pcrs"), shown.pop("transport")
    assert transport
    assert shown == {
        "source": "enclave",
        "nitrotpm_pcrs": {},
        "module_id": DEFAULT_MODULE_ID,
        "version": "1.0.0",
        "digest": "SHA384",
        "max_pcrs": 32,
        "debug_mode": False,
        "pcr_encoding": "hex",
    }
    assert list(pcrs) == [str(index) for index in range(32)]
    assert pcrs["0"] == {"value": PCR0, "locked": True}
    assert pcrs["16"] == {"value": "00" * 48, "locked": False}


# -- describe


def test_describe(enclave: Enclave) -> None:
    text = report(enclave.attestor("describe"))
    assert f"module          {DEFAULT_MODULE_ID}\n" in text
    assert "debug mode      no\n" in text
    assert "locked PCRs     0, 1, 2" in text
    assert "  PCR0   image\n" in text
    text = report(enclave.attestor("describe", "--base64"))
    assert f"         {base64.b64encode(DEFAULT_PCRS[0]).decode()}\n" in text


def test_describe_names_debug_mode(enclaves: Callable[..., Enclave]) -> None:
    text = report(enclaves(debug=True).attestor("describe"))
    assert "debug mode      YES: PCR0 is all zeros, as in every enclave in debug mode\n" in text
    assert "  PCR0   image\n         all zeros\n" in text


def test_a_report_with_all_fields_and_an_application_pcr_fits(
    enclaves: Callable[..., Enclave],
) -> None:
    enclave = enclaves(pcrs={16: bytes(range(48)), 31: bytes(range(48))})
    attest(enclave, "--nonce", "ab" * 1024, "--user-data", "cd" * 1024, "--public-key", "ef" * 1024)
    assert "1024 bytes: abab" in report(verify(enclave, "--any-image"))
    assert "  PCR16  the application's own\n" in report(enclave.attestor("describe"))


def test_names_cannot_steer_a_terminal() -> None:
    from attestor_commands.report import wrapped

    assert wrapped("a\x1b[2J\nb\u202e", "  ") == ["  a?[2J?b?"]
    assert wrapped("", "label  ") == ["label"]


def test_the_pcrs_that_were_compared_are_named(enclave: Enclave) -> None:
    attest(enclave)
    options = [
        part
        for index in range(16)
        if index != 3
        for part in ("--pcr", f"{index}={DEFAULT_PCRS[index].hex()}")
    ]
    assert "passed: 0, 1, 2, 4, 5, 6" in report(verify(enclave, *options))
    assert "  pcrs              not asked\n" in report(verify(enclave, "--any-image"))


def test_ages() -> None:
    assert [age(seconds) for seconds in (0, 119, 120, 7200, 172800, -5, -7200)] == [
        "0 s ago", "119 s ago", "2 min ago", "2 h ago", "2 days ago",
        "5 s ahead of this clock", "2 h ahead of this clock",
    ]  # fmt: skip


def test_a_report_that_cannot_be_written(enclave: Enclave) -> None:
    shell = f"exec {sys.executable} -m attestor describe > /dev/full"
    refused(enclave.run("sh", "-c", shell), 7, "standard output cannot be written: No space left")
    shell = f"exec {sys.executable} -m attestor describe >&-"
    refused(enclave.run("sh", "-c", shell), 7, "standard output is closed")
