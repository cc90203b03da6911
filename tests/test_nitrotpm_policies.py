"""Key policies for EC2 instances with a NitroTPM: written, checked, explained, and not mixed up
with those for enclaves.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final

import pytest
from click.testing import CliRunner

import attestor
from keypolicy import (
    ATTESTATION,
    Bind,
    Decision,
    Policy,
    PolicyError,
    Request,
    check,
    evaluate,
    render,
)
from keypolicy.keys import closest_key
from keypolicy.nitrotpm import SECURE_BOOT_OFF, SEPARATOR_ALONE, indistinct
from tests.conftest import VECTORS, Run
from tests.test_policy import (
    ADMIN,
    ADMINISTRATION,
    ATTESTED,
    GOOD,
    GUARD,
    KEY,
    OPEN,
    PCR0,
    ROLE,
    ROOT,
    codes,
    refuse,
    statement,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from tests.conftest import Enclave

GENUINE: Final = VECTORS / "nitrotpm" / "2026-02-03_nonce_ec-public-key.cose"
needs_vectors = pytest.mark.skipif(
    not GENUINE.exists(), reason="no ../shared/vectors beside the project"
)
TPM4, TPM7, TPM8, TPM12 = (f"{ATTESTATION}NitroTPMPCR{index}" for index in (4, 7, 8, 12))
ZERO: Final = "0" * 96
OTHER: Final = "cd" * 48
BUILD: Final = {TPM4: GOOD, TPM12: ZERO}
IMAGE: Final = {4: b"\x4a" * 48, 12: bytes(48)}


def machine(condition: Mapping[str, Any], **members: Any) -> Any:
    return statement({"StringEqualsIgnoreCase": condition}, **members)


def guards(*keys: str) -> list[Any]:
    """A Deny for each key, as render writes them."""
    return [refuse({"StringNotEqualsIgnoreCase": {key: BUILD.get(key, GOOD)}}) for key in keys]


def command(*arguments: str) -> Run:
    result = CliRunner().invoke(attestor.cli, list(arguments))
    return Run(result.exit_code, result.stdout_bytes, result.stderr)


# ---- check


@pytest.mark.parametrize(
    ("statements", "expected"),
    [
        ([machine(BUILD)], []),
        ([machine({TPM7: GOOD})], []),
        ([machine({TPM4: GOOD, TPM7: GOOD})], []),
        ([OPEN, *guards(TPM4, TPM12)], []),
        ([OPEN, *guards(TPM7)], []),
        ([machine({TPM4: GOOD})], ["any_machine_image"]),
        ([machine({TPM12: ZERO})], ["any_machine_image"]),
        ([machine({TPM8: GOOD})], ["any_machine_image"]),
        ([OPEN, *guards(TPM4)], ["any_machine_image"]),
        ([OPEN, *guards(TPM12)], ["any_machine_image"]),
        # in one Deny the two are ANDed
        (
            [machine(BUILD), refuse({"StringNotEqualsIgnoreCase": BUILD})],
            ["deny_and"],
        ),
        # values that identify nothing
        ([machine({TPM7: SECURE_BOOT_OFF})], ["indistinct_pcr"]),
        ([machine({TPM7: [GOOD, SECURE_BOOT_OFF]})], ["indistinct_pcr"]),
        ([machine({TPM7: ZERO})], ["indistinct_pcr"]),
        ([machine({TPM4: SEPARATOR_ALONE, TPM12: ZERO})], ["indistinct_pcr"]),
        # others, with which they are ANDed, do identify
        ([machine({**BUILD, TPM7: SECURE_BOOT_OFF, TPM8: SEPARATOR_ALONE})], []),
        (
            [
                statement({"StringLike": {TPM7: "*"}, "StringEquals": BUILD}),
            ],
            [],
        ),
        (
            [statement({"StringLike": {TPM4: "*"}, "StringEquals": {TPM12: ZERO}})],
            ["pcr_pattern"],
        ),
        (
            [OPEN, refuse({"StringNotEquals": {TPM7: SECURE_BOOT_OFF}})],
            ["any_machine_image", "indistinct_pcr"],
        ),
        # forms that match nothing, as of an enclave's
        ([machine({TPM7: f"0x{GOOD}"})], ["pcr_prefix"]),
        ([machine({TPM7: GOOD[:64]})], ["pcr_length"]),
        ([statement({"StringEquals": {TPM7: GOOD.upper()}})], ["pcr_case"]),
        ([statement({"StringLike": {TPM7: "ab*"}})], ["pcr_pattern"]),
        ([statement({"NumericEquals": {TPM7: "4"}})], ["operator", "vacuous"]),
        ([machine({f"{ATTESTATION}NitroTPMPCR24": GOOD})], ["key", "unattested"]),
        ([statement({"Null": {TPM7: "false"}})], ["any_machine_image"]),
        ([refuse({"ForAnyValue:StringNotEquals": {TPM7: GOOD}}), machine(BUILD)], ["deny_hollow"]),
        # both kinds
        ([machine({PCR0: GOOD, **BUILD})], ["both_kinds"]),
        ([machine({PCR0: GOOD, TPM7: GOOD})], ["both_kinds"]),
        ([ATTESTED, machine(BUILD)], []),
        ([ATTESTED, *guards(TPM7)], ["never_allowed"]),
        ([machine(BUILD), GUARD], ["never_allowed"]),
        ([machine(BUILD), refuse({"StringNotEquals": {TPM4: OTHER}})], ["never_allowed"]),
        ([machine({TPM7: GOOD}), *guards(TPM4, TPM12)], []),
        ([ATTESTED, machine({TPM7: GOOD}), GUARD, *guards(TPM7)], ["both_kinds"]),
        ([OPEN, refuse({"StringNotEqualsIgnoreCase": {PCR0: GOOD, TPM7: GOOD}})], []),
        # who may call
        (
            [machine(BUILD), statement(Action="kms:PutKeyPolicy")],
            ["parent_administers"],
        ),
        ([machine(BUILD, Action="kms:Encrypt")], ["never_attested"]),
        ([statement(Principal={"AWS": ROOT}, Action="kms:*")], ["root_everything"]),
        (
            [statement(Principal={"AWS": ROOT}, Action="kms:*"), *guards(TPM4)],
            ["root_everything"],
        ),
    ],
    ids=repr,
)
def test_what_is_found(statements: list[Any], expected: list[str]) -> None:
    assert codes(*statements) == expected


def test_what_is_said(tmp_path: Path) -> None:
    """No such statement "allows without an attestation document"."""
    policy = {"Version": "2012-10-17", "Statement": [ADMINISTRATION, machine({TPM4: GOOD})]}
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy))
    run = command("policy", "check", str(path))
    assert run.status == 4
    said = " ".join(run.out.decode().split())
    assert "PCR4 without PCR12 admits any kernel command line" in said
    assert "add NitroTPMPCR4 together with NitroTPMPCR12, or NitroTPMPCR7" in said
    assert "without an attestation document" not in said


def test_whose_role_it_is() -> None:
    text = json.dumps({"Statement": [machine(BUILD), statement(Action="kms:PutKeyPolicy")]})
    assert any("the attested instance's" in found.problem for found in check(Policy.parse(text)))


def test_a_misspelt_key_is_guessed_as_its_kind() -> None:
    assert closest_key(f"{ATTESTATION}NitroTPM_PCR4") == TPM4
    assert closest_key(f"{ATTESTATION}TPMPCR12") == TPM12
    assert closest_key(f"{ATTESTATION}NitroPCR4") == f"{ATTESTATION}PCR4"
    assert closest_key(f"{ATTESTATION}NitroTPMPCR007") == TPM7
    for no_key in ("NitroTPMPCR24", "NitroTPMPCR99", "NitroTPMImageSha384", "NitroTPM"):
        assert closest_key(ATTESTATION + no_key) is None


def test_no_fix_is_of_the_other_kind() -> None:
    text = json.dumps({"Statement": [machine({f"{ATTESTATION}NitroTPMPCR24": GOOD})]})
    fixes = [found.fix for found in check(Policy.parse(text))]
    assert any(f"{TPM4} and {TPM12}" in fix for fix in fixes)
    assert not any(f"{ATTESTATION}PCR" in fix for fix in fixes)
    text = json.dumps({"Statement": [machine({TPM4: SEPARATOR_ALONE, TPM12: ZERO})]})
    (fix,) = [found.fix for found in check(Policy.parse(text)) if found.code == "indistinct_pcr"]
    assert fix == "use the value that nitro-tpm-pcr-compute prints"


@needs_vectors
def test_the_values_that_identify_nothing_are_those_of_a_genuine_document() -> None:
    from nsm.document import AttestationDocument

    pcrs = AttestationDocument.parse(GENUINE.read_bytes()).nitrotpm_pcrs
    assert pcrs[7].hex() == SECURE_BOOT_OFF
    assert {pcrs[index].hex() for index in (2, 3, 6)} == {SEPARATOR_ALONE}
    assert not indistinct(4, pcrs[4].hex())
    assert not indistinct(12, pcrs[12].hex())


# ---- evaluation


def decide(condition: Any, **request: Any) -> Decision:
    policy = Policy.parse(json.dumps({"Statement": [ADMINISTRATION, machine(condition)]}))
    asked = Request(principal=ROLE, action="kms:Decrypt", resource=KEY, **request)
    return evaluate(policy, asked).decision


def test_the_kinds_are_evaluated_apart() -> None:
    good = bytes.fromhex(GOOD)
    assert decide(BUILD, nitrotpm_pcrs={4: good, 12: bytes(48)}) is Decision.ALLOWED
    assert decide(BUILD, nitrotpm_pcrs={4: good, 12: good}) is Decision.DENIED
    assert decide(BUILD, nitrotpm_pcrs={4: good}) is Decision.DENIED
    assert decide(BUILD, nitrotpm_pcrs={4: good}, more_pcrs=True) is Decision.UNDETERMINED
    assert decide(BUILD, pcrs={4: good, 12: bytes(48)}) is Decision.DENIED
    assert decide(BUILD, pcrs={4: good}, more_pcrs=True) is Decision.DENIED
    assert decide({PCR0: GOOD}, nitrotpm_pcrs={0: good}) is Decision.DENIED
    assert decide({PCR0: GOOD}, nitrotpm_pcrs={0: good}, more_pcrs=True) is Decision.DENIED
    assert decide(BUILD) is Decision.DENIED


# ---- render


def written(**options: Any) -> Any:
    defaults: dict[str, Any] = {
        "principals": [ROLE],
        "admins": [ADMIN],
        "images": [IMAGE],
        "source": "nitrotpm",
    }
    return render(**{**defaults, **options})


@pytest.mark.parametrize(
    "images",
    [
        [IMAGE],
        [{7: b"\x07" * 48}],
        [IMAGE, {4: b"\x4b" * 48, 12: b"\x0c" * 48}],
        [{4: b"\x04" * 48, 7: b"\x07" * 48, 11: bytes(48), 12: bytes(48)}],
    ],
    ids=str,
)
def test_what_is_rendered_has_no_fault_and_lets_in_its_images_alone(
    images: list[dict[int, bytes]],
) -> None:
    rendered = written(images=images)
    policy = Policy.parse(rendered.text)
    assert check(policy) == ()

    def decision(**brought: Any) -> Decision:
        asked = Request(principal=ROLE, action="kms:Decrypt", resource=KEY, **brought)
        return evaluate(policy, asked).decision

    for image in images:
        assert decision(nitrotpm_pcrs=image) is Decision.ALLOWED
        assert decision(pcrs=image) is Decision.DENIED
        for index in image:
            changed = image | {index: hashlib.sha384(image[index]).digest()}
            assert decision(nitrotpm_pcrs=changed) is Decision.DENIED
    assert decision() is Decision.DENIED
    assert any("root in such an instance" in warning for warning in rendered.warnings)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"images": [{4: b"\x04" * 48}]}, "without PCR12"),
        ({"images": [{12: bytes(48)}]}, "without PCR4"),
        ({"images": [{8: b"\x08" * 48}]}, "alone admits any machine image"),
        ({"images": [{7: bytes.fromhex(SECURE_BOOT_OFF)}]}, "without Secure Boot"),
        ({"images": [{4: bytes(48), 12: bytes(48)}]}, "all zeros"),
        ({"images": [{4: bytes.fromhex(SEPARATOR_ALONE), 12: bytes(48)}]}, "nothing was measured"),
        ({"images": [{7: b"\x07" * 48, 24: b"\x18" * 48}]}, "PCR0 to PCR23"),
        ({"images": [{}]}, "no PCR is asked for"),
        ({"binds": [Bind.parse(f"node=3:{ROLE}")]}, "parent of an enclave"),
    ],
    ids=str,
)
def test_what_would_be_open_is_not_rendered(options: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        written(**options)


# ---- the commands


@pytest.fixture
def computed(tmp_path: Path) -> str:
    listed = {"HashAlgorithm": "SHA384", "PCR4": "4a" * 48, "PCR7": "7b" * 48, "PCR12": ZERO}
    path = tmp_path / "pcrs.json"
    path.write_text(json.dumps({"Measurements": listed}))
    return str(path)


def rendered_by(*options: str) -> Run:
    return command("policy", "render", "--principal", ROLE, "--admin", ADMIN, *options)


def keys_of(run: Run) -> set[str]:
    assert run.status == 0, run.err
    policy = json.loads(run.out)
    (allow,) = [part for part in policy["Statement"] if part["Sid"] == "Instance1"]
    return set(allow["Condition"]["StringEqualsIgnoreCase"])


def test_render_takes_what_was_computed(computed: str) -> None:
    assert keys_of(rendered_by("--measurements", computed)) == {TPM4, TPM12}
    assert keys_of(rendered_by("--measurements", computed, "--take", "7")) == {TPM7}
    pcrs = ["--nitrotpm-pcr", f"4={GOOD}", "--nitrotpm-pcr", f"12={ZERO}"]
    assert keys_of(rendered_by(*pcrs)) == {TPM4, TPM12}


@needs_vectors
def test_render_takes_a_genuine_document() -> None:
    assert keys_of(rendered_by("--document", str(GENUINE))) == {TPM4, TPM12}
    run = rendered_by("--document", str(GENUINE), "--take", "7")
    assert run.status == 2
    assert "PCR7 of every instance without Secure Boot" in run.error


@pytest.mark.parametrize(
    "options",
    [
        ["--pcr", f"0={GOOD}"],
        ["--role-arn", ROLE],
        ["--instance-id", "i-0123456789abcdef0"],
    ],
)
def test_render_does_not_mix_the_kinds(computed: str, options: list[str]) -> None:
    run = rendered_by("--measurements", computed, *options)
    assert run.status == 2
    assert "of an enclave and of a NitroTPM in one policy" in run.error


def test_explain(computed: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_bytes(rendered_by("--measurements", computed).out)

    def explain(*options: str) -> Run:
        return command("policy", "explain", str(path), "--principal", ROLE, *options)

    assert explain("--measurements", computed).status == 0
    run = explain("--nitrotpm-pcr", f"4={'4a' * 48}")
    assert run.status == 8
    assert "one with NitroTPM PCR4 as given" in run.out.decode()
    assert explain("--nitrotpm-pcr", f"4={OTHER}").status == 4
    run = explain("--pcr", f"4={'4a' * 48}", "--pcr", f"12={ZERO}", "--json")
    assert run.status == 4
    shown = json.loads(run.out)
    assert set(shown["pcrs"]) == {"4", "12"}
    assert shown["nitrotpm_pcrs"] == {}
    run = explain("--pcr", f"4={OTHER}", "--measurements", computed)
    assert run.status == 2
    assert "a document has one kind" in run.error


@needs_vectors
def test_explain_with_a_genuine_document(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_bytes(rendered_by("--document", str(GENUINE)).out)
    options = ["--principal", ROLE, "--document", str(GENUINE)]
    run = command("policy", "explain", str(path), *options)
    assert run.status == 0
    assert "debug mode" not in run.out.decode()
    shown = json.loads(command("policy", "explain", str(path), *options, "--json").out)
    assert shown["document"]["source"] == "nitrotpm"
    assert shown["document"]["debug_mode"] is None
    assert shown["nitrotpm_pcrs"]["7"] == SECURE_BOOT_OFF


def test_a_rendered_policy_lets_in_its_instance_alone(
    enclaves: Callable[..., Enclave], tmp_path: Path
) -> None:
    """From render to KMS, with the instance's own document."""
    first = enclaves(nitrotpm=True)
    role = first.world.kms.principal.replace(":sts:", ":iam:").replace("assumed-role", "role")
    role = role.rpartition("/")[0]
    assert first.attestor("attest", "document").status == 0
    root = ["--root", first.environment["NITROSIM_NSM_ROOT"]]
    people = ["--principal", role, "--admin", ADMIN]
    run = first.attestor("policy", "render", *people, *root, "--document", "document")
    assert run.status == 0, run.err
    policy = json.loads(run.out)
    # the operator of these tests calls with the same credentials
    policy["Statement"].append(statement(Principal={"AWS": role}, Action="kms:Encrypt"))
    for pcrs, status in ((None, 0), ({4: b"\x01" * 48}, 4), ({12: b"\x01" * 48}, 4)):
        instance = enclaves(nitrotpm=True, tpm_pcrs=pcrs, key_policy=json.dumps(policy))
        (tmp_path / "out").unlink(missing_ok=True)
        instance.place(instance.encrypt())
        run = instance.decrypt()
        assert run.status == status, run.err
    enclave = enclaves(key_policy=json.dumps(policy))
    enclave.place(enclave.encrypt())
    assert enclave.decrypt("--force").status == 4
