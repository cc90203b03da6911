"""Documents of a NitroTPM beside those of enclaves: two kinds, whose PCRs never meet."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any, Final

import pytest
from click.testing import CliRunner

import attestor
from attestor_commands.evidence_report import meaning
from attestor_commands.report import WIDTH
from keypolicy import PolicyError, measured
from nitrosim.pki import NsmPki
from nsm.document import (
    CHECKS,
    AttestationDocument,
    DocumentError,
    Expectations,
    Source,
    verify,
)
from tests.conftest import VECTORS, Run
from tests.test_document import MODULE, NOW, PCRS, signed
from tests.test_document import refusal as refusal_of

if TYPE_CHECKING:
    from pathlib import Path

GENUINE: Final = VECTORS / "nitrotpm" / "2026-02-03_nonce_ec-public-key.cose"
needs_vectors = pytest.mark.skipif(
    not GENUINE.exists(), reason="no ../shared/vectors beside the project"
)
TPM_PCRS: Final = {index: bytes([index + 1]) * 48 for index in range(24)}
ANY: Final = Expectations(source=None, allow_debug=True)
COMPUTED: Final = {
    "HashAlgorithm": "SHA384 { ... }",
    "PCR4": "4a" * 48,
    "PCR7": "7b" * 48,
    "PCR12": "00" * 48,
}


@pytest.fixture(scope="module")
def pki() -> NsmPki:
    return NsmPki.generate(now=NOW, module_id=MODULE)


def nitrotpm(pki: NsmPki, **changes: Any) -> bytes:
    return signed(pki, **({"pcrs": ..., "nitrotpm_pcrs": TPM_PCRS} | changes))


def command(*arguments: str) -> Run:
    result = CliRunner().invoke(attestor.cli, list(arguments))
    return Run(result.exit_code, result.stdout_bytes, result.stderr)


def verify_genuine(*options: str) -> Run:
    return command("verify", "--at", "document", *options, str(GENUINE))


# ---- the genuine document


@needs_vectors
def test_the_genuine_document_verifies_at_its_own_timestamp() -> None:
    document = AttestationDocument.parse(GENUINE.read_bytes())
    assert document.source == "nitrotpm"
    assert not document.pcrs
    assert sorted(document.nitrotpm_pcrs) == list(range(24))
    assert not document.debug_mode
    expect = Expectations(source="nitrotpm", nitrotpm_pcrs=document.nitrotpm_pcrs)
    checks = verify(document, at=document.signed_at, expect=expect).checks
    assert {"source", "pcrs"} <= {*checks}
    assert "debug_mode" not in checks


@needs_vectors
def test_the_genuine_document_has_expired_today() -> None:
    run = command("verify", "--any-image", str(GENUINE))
    assert run.status == 6
    assert "document refused, validity" in run.error


@needs_vectors
def test_every_truncation_and_flipped_bit_is_refused() -> None:
    data = bytearray(GENUINE.read_bytes())
    at = AttestationDocument.parse(bytes(data)).signed_at
    exhaustive = os.environ.get("ATTESTOR_EXHAUSTIVE") == "1"
    for index in range(len(data)):
        with pytest.raises(DocumentError):
            AttestationDocument.parse(bytes(data[:index]))
        for bit in range(8) if exhaustive else (index % 8,):
            data[index] ^= 1 << bit
            with pytest.raises(DocumentError):
                verify(bytes(data), at=at, expect=ANY)
            data[index] ^= 1 << bit


@needs_vectors
def test_verify_shows_it_as_what_it_is() -> None:
    run = verify_genuine("--any-image")
    assert (run.status, run.err) == (0, "")
    text = run.out.decode()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "NitroTPM of an EC2 instance" in text
    assert "PCR4   boot manager" in text
    assert "PCR7   Secure Boot" in text
    assert "PCR12  kernel command line\n         all zeros\n" in text
    assert "all ones: 17, 18, 19, 20, 21, 22" in text
    assert "debug mode " not in text
    assert "application" not in text
    shown = json.loads(verify_genuine("--any-image", "--json").out)
    assert (shown["source"], shown["debug_mode"], shown["pcrs"]) == ("nitrotpm", None, {})
    assert len(shown["nitrotpm_pcrs"]) == 24


@needs_vectors
def test_expectations_of_an_enclave_do_not_meet_it() -> None:
    """Not even where the value is the right one of the other kind."""
    pcr4 = AttestationDocument.parse(GENUINE.read_bytes()).nitrotpm_pcrs[4].hex()
    assert verify_genuine("--nitrotpm-pcr", f"4={pcr4}").status == 0
    run = verify_genuine("--pcr", f"4={pcr4}")
    assert run.status == 6
    assert "document is of a NitroTPM" in run.error
    assert "expected one of an enclave" in run.error
    assert "hint: --pcr is of enclaves, --nitrotpm-pcr" in run.err


@needs_vectors
def test_a_pcr_that_differs_is_named_with_its_kind() -> None:
    run = verify_genuine("--nitrotpm-pcr", f"4={'00' * 48}")
    assert run.status == 6
    assert "NitroTPM PCR4 is 1a1f166e" in run.error
    assert "nitro-tpm-pcr-compute" in run.err


@needs_vectors
def test_zero_is_a_value_as_any_other() -> None:
    assert verify_genuine("--nitrotpm-pcr", f"12={'00' * 48}").status == 0


@needs_vectors
def test_precomputed_measurements_are_of_the_right_kind(tmp_path: Path) -> None:
    pcrs = AttestationDocument.parse(GENUINE.read_bytes()).nitrotpm_pcrs
    listed = {f"PCR{index}": pcrs[index].hex() for index in (4, 7, 12)}
    path = tmp_path / "pcrs.json"
    path.write_text(json.dumps({"Measurements": {"HashAlgorithm": "SHA384"} | listed}))
    assert verify_genuine("--measurements", str(path)).status == 0
    path.write_text(json.dumps({"Measurements": COMPUTED}))
    assert verify_genuine("--measurements", str(path)).status == 6
    path.write_text(json.dumps({"Measurements": {"PCR0": "01" * 48}}))
    assert "expected one of an enclave" in verify_genuine("--measurements", str(path)).error


def test_one_kind_alone_can_be_expected(tmp_path: Path) -> None:
    path = tmp_path / "pcrs.json"
    path.write_text(json.dumps({"Measurements": COMPUTED}))
    for options in (["--nitrotpm-pcr", f"4={'01' * 48}"], ["--measurements", str(path)]):
        run = command("verify", "--pcr", f"0={'01' * 48}", *options, "absent")
        assert run.status == 2
        assert "a document has one kind" in run.error


def test_a_nitrotpm_has_24_pcrs() -> None:
    run = command("verify", "--nitrotpm-pcr", f"24={'01' * 48}", "absent")
    assert run.status == 2
    assert "N from 0 to 23" in run.error


# ---- the two kinds


def test_a_simulated_document_of_each_kind_meets_its_own_expectations_alone(pki: NsmPki) -> None:
    of: dict[Source, bytes] = {"enclave": signed(pki), "nitrotpm": nitrotpm(pki)}
    expects: dict[Source, list[Expectations]] = {
        "enclave": [Expectations(), Expectations(pcrs={4: PCRS[4]})],
        "nitrotpm": [
            Expectations(source="nitrotpm"),
            Expectations(source="nitrotpm", nitrotpm_pcrs={4: TPM_PCRS[4]}),
        ],
    }
    assert PCRS[4] == TPM_PCRS[4]
    for source, document in of.items():
        verify(document, roots=[pki.root_sha256], at=NOW, expect=Expectations(source=None))
        for kind, chosen in expects.items():
            for expect in chosen:
                if kind == source:
                    verify(document, roots=[pki.root_sha256], at=NOW, expect=expect)
                else:
                    assert refusal_of(document, pki, expect=expect).check == "source"


def test_the_kinds_are_checked_before_what_they_mean(pki: NsmPki) -> None:
    debug = signed(pki, pcrs={0: bytes(48)})
    assert refusal_of(debug, pki, expect=Expectations(source="nitrotpm")).check == "source"
    zero = nitrotpm(pki, nitrotpm_pcrs={0: bytes(48)})
    assert not AttestationDocument.parse(zero).debug_mode
    assert refusal_of(zero, pki, expect=Expectations()).check == "source"
    assert "source" in CHECKS


def test_expectations_of_another_kind_than_their_source_are_a_mistake() -> None:
    for wrong in (
        {"nitrotpm_pcrs": TPM_PCRS},
        {"source": "nitrotpm", "pcrs": PCRS},
        {"source": None, "pcrs": PCRS},
        {"source": None, "nitrotpm_pcrs": TPM_PCRS},
    ):
        with pytest.raises(ValueError, match="another kind"):
            dataclasses.replace(Expectations(), **wrong)


@pytest.mark.parametrize(
    "fields",
    [
        {"pcrs": PCRS},
        {"pcrs": {}},
        {"nitrotpm_pcrs": {}},
        {"nitrotpm_pcrs": None},
        {"nitrotpm_pcrs": {24: bytes(48)}},
        {"nitrotpm_pcrs": {index: bytes(48) for index in range(25)}},
        {"nitrotpm_pcrs": {True: bytes(48)}},
        {"nitrotpm_pcrs": {0: bytes(32)}},
        {"nitrotpm_pcrs": {0: "0" * 48}},
        {"nitrotpm_pcrs": [bytes(48)]},
    ],
    ids=str,
)
def test_other_shapes_are_refused(pki: NsmPki, fields: dict[str, Any]) -> None:
    assert refusal_of(nitrotpm(pki, **fields), pki).check == "format"


def test_a_field_of_the_other_kind_may_be_null(pki: NsmPki) -> None:
    """Modules send absent fields as null."""
    assert AttestationDocument.parse(nitrotpm(pki, pcrs=None)).source == "nitrotpm"
    assert AttestationDocument.parse(signed(pki, nitrotpm_pcrs=None)).source == "enclave"


def test_every_pcr_has_a_meaning() -> None:
    meanings = [meaning(index, "nitrotpm") for index in range(24)]
    assert "unused" not in meanings
    assert meanings[17:23] == ["of a measured launch"] * 6
    assert meaning(4) != meaning(4, "nitrotpm")


# ---- measurements


def test_measurements_tell_their_kind() -> None:
    assert measured(json.dumps({"Measurements": COMPUTED})) == (
        "nitrotpm",
        {4: b"\x4a" * 48, 7: b"\x7b" * 48, 12: bytes(48)},
    )
    enclave = {"Measurements": {"HashAlgorithm": "Sha384 { ... }", "PCR0": "01" * 48}}
    assert measured(json.dumps(enclave)) == ("enclave", {0: b"\x01" * 48})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"HashAlgorithm": "SHA256"}, "HashAlgorithm"),
        ({"PCR4": "4a" * 32}, "96 hexadecimal characters"),
        ({"PCR4": 4}, "96 hexadecimal characters"),
        ({"PCR0": "00" * 48}, "debug mode"),  # an enclave's, then
    ],
    ids=str,
)
def test_wrong_measurements_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        measured(json.dumps({"Measurements": COMPUTED | changes}))
    for text in ("{}", "[]", "1", "{", json.dumps({"Measurements": []})):
        with pytest.raises(PolicyError):
            measured(text)
