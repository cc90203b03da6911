"""`policy render`, `check` and `explain`, and that the simulated KMS decides as they say."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from attestor_commands.report import WIDTH
from keypolicy import NOT_EVALUATED, pcr_of_certificate, pcr_of_instance, pcr_of_role
from nitrosim.module import DEFAULT_MODULE_ID, DEFAULT_PCRS
from tests.conftest import Run
from tests.test_evidence import command, refused, report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Enclave

ACCOUNT: Final = "111122223333"
ROLE: Final = f"arn:aws:iam::{ACCOUNT}:role/nitrosim-enclave"
SESSION: Final = f"arn:aws:sts::{ACCOUNT}:assumed-role/nitrosim-enclave/nitrosim"
ROOT: Final = f"arn:aws:iam::{ACCOUNT}:root"
ADMIN: Final = f"arn:aws:iam::{ACCOUNT}:role/admin"
PEOPLE: Final = ("--principal", ROLE, "--admin", ADMIN)
PCR: Final = {index: value.hex() for index, value in DEFAULT_PCRS.items()}
OTHER: Final = "cd" * 48
KEY: Final = "kms:RecipientAttestation:PCR"
Json = dict[str, Any]


def render(*options: str) -> Json:
    """A policy without a fault, whose author was told that conditions can be removed."""
    run = command("policy", "render", *PEOPLE, *options)
    assert run.status == 0, run.err
    assert (
        "attestor: note: whoever may call kms:PutKeyPolicy can remove these conditions" in run.err
    )
    policy: Json = json.loads(run.out)
    return policy


def images(policy: Json) -> list[Json]:
    """The PCRs that each Allow for enclaves asks for, by number."""
    return [
        {
            name.removeprefix(KEY): value
            for name, value in part["Condition"]["StringEqualsIgnoreCase"].items()
        }
        for part in policy["Statement"]
        if part["Sid"].startswith("Enclave")
    ]


def place(folder: Path, policy: Json, name: str = "policy.json") -> str:
    (folder / name).write_text(json.dumps(policy))
    return str(folder / name)


# -- render


def test_what_is_rendered_is_found_without_fault(enclave: Enclave) -> None:
    shell = (
        f'{sys.executable} -m attestor policy render "$@" 2>/dev/null | '
        f"{sys.executable} -m attestor policy check -"
    )
    encryptor = f"arn:aws:iam::{ACCOUNT}:user/ci"
    options = ["--encryptor", encryptor, "--pcr", f"0={PCR[0]}", "--bind", f"node=3:{ROLE}"]
    done = enclave.run("sh", "-c", shell, "sh", *PEOPLE, *options)
    assert (done.status, done.out, done.err) == (0, b"", "")


def test_a_pcr_that_is_named_again_begins_another_image() -> None:
    assert images(render("--pcr", f"0={PCR[0].upper()}", "--pcr", f"0={OTHER}")) == [
        {"0": PCR[0]},
        {"0": OTHER},
    ]
    both = [
        "--pcr",
        f"1={PCR[1]}",
        "--pcr",
        f"2={PCR[2]}",
        "--pcr",
        f"1={OTHER}",
        "--pcr",
        f"2={PCR[2]}",
    ]
    assert images(render(*both)) == [{"1": PCR[1], "2": PCR[2]}, {"1": OTHER, "2": PCR[2]}]


def test_pcrs_are_computed_for_every_image(tmp_path: Path, enclave: Enclave) -> None:
    with open(enclave.environment["NITROSIM_NSM_ROOT"], "rb") as source:
        der = source.read()
    (tmp_path / "cert.pem").write_bytes(
        x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
    )
    computed = {"3": pcr_of_role(ROLE).hex(), "4": pcr_of_instance("i-0123456789abcdef0").hex()}
    computed["8"] = pcr_of_certificate(der).hex()
    options = ["--role-arn", ROLE, "--instance-id", "i-0123456789abcdef0"]
    options += ["--signing-certificate", str(tmp_path / "cert.pem")]
    assert images(render(*options)) == [computed]
    assert images(render(*options, "--pcr", f"0={PCR[0]}", "--pcr", f"0={OTHER}")) == [
        {"0": PCR[0]} | computed,
        {"0": OTHER} | computed,
    ]
    contradiction = command("policy", "render", *PEOPLE, *options, "--pcr", f"3={OTHER}")
    refused(contradiction, 2, "PCR3 is given twice")


def test_images_of_measurements_and_documents(enclave: Enclave) -> None:
    enclave.attestor("attest", "document")
    built = {
        "Measurements": {
            "HashAlgorithm": "Sha384 { ... }",
            "PCR0": OTHER,
            "PCR1": OTHER,
            "PCR2": OTHER,
            "PCR8": OTHER,
        }
    }
    sources = ["--measurements", place(enclave.folder, built, "build.json")]
    sources += [
        "--document",
        str(enclave.folder / "document"),
        "--root",
        enclave.environment["NITROSIM_NSM_ROOT"],
    ]
    assert images(render(*sources)) == [
        dict.fromkeys("0128", OTHER),
        {str(index): PCR[index] for index in (0, 1, 2, 8)},
    ]
    assert images(render(*sources, "--take", "8")) == [{"8": OTHER}, {"8": PCR[8]}]


MEASURED: Final = {
    "Measurements": {"HashAlgorithm": "Sha512_48 { .. }"}
    | {f"PCR{index}": OTHER for index in (0, 1, 2)}
}


def test_a_pcr_that_is_asked_for_and_not_there_is_an_error(tmp_path: Path) -> None:
    """Left out, the policy would pin less than its author believes."""
    file = place(tmp_path, MEASURED, "build.json")
    both = ["--measurements", file, "--take", "0", "--take", "8"]
    for options in (both, [*both[:2], "--take", "8"], [*both, "--pcr", f"8={OTHER}"]):
        run = command("policy", "render", *PEOPLE, *options)
        refused(
            run, 2, "build.json has no PCR8: the image is not signed", "it has PCR0, PCR1, PCR2"
        )
    run = command("policy", "render", *PEOPLE, "--measurements", file, "--take", "3")
    refused(run, 2, "build.json has no PCR3\n")
    run = command("policy", "render", *PEOPLE, "--pcr", f"0={OTHER}", "--take", "0")
    refused(run, 2, "--take needs --measurements, --eif or --document")
    assert images(render("--measurements", file)) == [dict.fromkeys("012", OTHER)]


def test_a_pcr_of_zeros_is_not_there_to_be_taken(enclaves: Callable[..., Enclave]) -> None:
    """The document of an image that is not signed has a PCR8, of zeros."""
    enclave = enclaves(pcrs={8: bytes(48)})
    enclave.attestor("attest", "document")
    sources = ["--document", str(enclave.folder / "document")]
    sources += ["--root", enclave.environment["NITROSIM_NSM_ROOT"]]
    refused(command("policy", "render", *PEOPLE, *sources, "--take", "8"), 2, "has no PCR8")
    assert images(render(*sources)) == [{str(index): PCR[index] for index in (0, 1, 2)}]


@pytest.mark.parametrize("data", [b"{", b"", b"\xff", b"[]", b'"text"', b'{"a": 1, "a": 2}'])
def test_errors_name_the_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "one.json").write_bytes(data)
    file = str(tmp_path / "one.json")
    for arguments in (
        ("policy", "render", *PEOPLE, "--measurements", file),
        ("policy", "render", *PEOPLE, "--signing-certificate", file),
        ("policy", "render", *PEOPLE, "--document", file, "--root", file),
        ("policy", "check", file),
        ("policy", "explain", file, "--principal", ROLE),
        ("verify", "--measurements", file, file),
        ("verify", "--any-image", "--root", file, file),
    ):
        run = command(*arguments)
        assert run.status in {2, 6}
        assert file in run.err, arguments


def test_the_document_that_is_refused_is_named(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"no document")
    run = command("policy", "render", *PEOPLE, "--document", str(tmp_path / "one"))
    refused(run, 6, "document refused, format", f"attestor: note: this is document {tmp_path}/one")


def test_a_bound_context_value_is_rendered() -> None:
    policy = render("--pcr", f"0={PCR[0]}", "--bind", "node=3:i-0123456789abcdef0")
    text = json.dumps(policy)
    assert '"kms:EncryptionContext:node": "3"' in text
    assert pcr_of_instance("i-0123456789abcdef0").hex() in text


def test_other_actions_are_rendered() -> None:
    policy = render(
        "--pcr", f"0={PCR[0]}", "--action", "kms:Decrypt", "--action", "kms:GenerateDataKey"
    )
    assert policy["Statement"][1]["Action"] == ["kms:Decrypt", "kms:GenerateDataKey"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "no PCR is asked for, so that any image is admitted, in debug mode too"),
        (["--pcr", f"3={OTHER}"], "PCR3 alone admits any image, in debug mode too"),
        (
            ["--role-arn", ROLE, "--instance-id", "i-0123456789abcdef0"],
            "PCR3, PCR4 alone admits any image",
        ),
        (["--pcr", f"2={OTHER}"], "PCR2 without PCR1 admits a foreign kernel and init"),
        (["--pcr", f"1={OTHER}"], "PCR1 without PCR2 admits any application"),
        (["--pcr", f"0={'0' * 96}"], "debug mode"),
        (
            ["--pcr", f"0={OTHER}", "--pcr", f"1={OTHER}", "--pcr", f"0={OTHER}"],
            "expected the same PCRs in each",
        ),
        (["--pcr", f"0={OTHER}", "--encryptor", ROLE], "cannot be encryptor too"),
        (["--pcr", f"0={OTHER}", "--action", "kms:*"], "actions are kms:*"),
        (["--pcr", f"0={OTHER}", "--bind", "node"], "is not NAME=VALUE:ROLE_ARN"),
        (["--pcr", f"0={OTHER}", "--principal", "*"], "is not the ARN of a role or user"),
        (["--role-arn", "role"], "is not the ARN of a role"),
        (["--instance-id", "i-1"], "is not the id of an instance"),
        (["--signing-certificate", "/nowhere"], "/nowhere cannot be read"),
        (["--measurements", "/nowhere"], "/nowhere cannot be read"),
        (["--document", "/nowhere"], "/nowhere cannot be read"),
    ],
)
def test_a_policy_that_would_be_open_is_not_rendered(options: list[str], part: str) -> None:
    refused(command("policy", "render", *PEOPLE, *options), 2, part)


def test_a_document_in_debug_mode_or_of_another_root_is_no_measurement(
    enclaves: Callable[..., Enclave],
) -> None:
    enclave = enclaves(debug=True)
    enclave.attestor("attest", "document")
    document = ["--document", str(enclave.folder / "document")]
    root = ["--root", enclave.environment["NITROSIM_NSM_ROOT"]]
    run = command("policy", "render", *PEOPLE, *document, *root)
    refused(run, 6, "debug mode", "hint: it attests zeros, not its image: --measurements takes")
    assert "--allow-debug" not in run.err  # which this command has not
    refused(command("policy", "render", *PEOPLE, *document), 6, "root")


def test_principal_and_administrator_are_needed() -> None:
    refused(command("policy", "render", "--admin", ADMIN), 2, "missing option '--principal'")
    refused(command("policy", "render", "--principal", ROLE), 2, "missing option '--admin'")


# -- check


def attested(value: str = OTHER, key: str = f"{KEY}0", **members: Any) -> Json:
    return {
        "Effect": "Allow", "Principal": {"AWS": ROLE}, "Action": "kms:Decrypt", "Resource": "*",
        "Condition": {"StringEqualsIgnoreCase": {key: value}},
    } | members  # fmt: skip


def deny(**condition: Json) -> Json:
    return attested(Effect="Deny", Condition=condition)


def policy_of(*statements: Json) -> Json:
    administration = attested(Principal={"AWS": ADMIN}, Action="kms:PutKeyPolicy", Sid="Admin")
    del administration["Condition"]
    return {"Version": "2012-10-17", "Statement": [administration, *statements]}


@pytest.mark.parametrize(
    ("statement", "code", "part"),
    [
        (attested(key="kms:RecipientAttestation:PCR00"), "key",
         "did you mean kms:RecipientAttestation:PCR0?"),
        (attested("0" * 96), "zero_pcr", "debug mode"),
        (attested("0x" + OTHER), "pcr_prefix", "drop the 0x"),
        (attested(OTHER[:64]), "pcr_length", "expected 96"),
        (attested(Condition={"StringEquals": {f"{KEY}0": OTHER.upper()}}), "pcr_case",
         "lower case"),
        (attested(Condition={}), "unattested", "without an attestation document"),
        (attested(Principal={"AWS": ROOT}, Action="kms:*", Condition={}), "root_everything",
         "root"),
        (attested(Condition={"StringEqualsIfExists": {f"{KEY}0": OTHER}}), "vacuous",
         "StringEqualsIgnoreCase"),
        (attested(Principal="*"), "wildcard_principal", "everyone"),
        (attested(Principal={"AWS": ROOT}, Action="kms:Put*", Condition={}), "anyone_administers",
         "any identity policy of which can allow it"),
        (attested(Resource=f"arn:aws:kms:eu-west-1:{ACCOUNT}:alias/x"), "resource",
         'write "*"'),
        (attested(Action="kms:Dcrypt"), "action", "did you mean kms:Decrypt?"),
        (attested(Condition={"StringEquals": {f"{KEY}0": OTHER, f"{KEY}00": "x"} | {
            "kms:RecipientAttestation:ImageSha384": PCR[0]}}), "never_allowed",
         "no attestation document meets its conditions"),
        (attested(Action=["kms:Decrypt", "kms:Encrypt"]), "never_attested",
         "kms:Encrypt takes no attestation"),
    ],
)  # fmt: skip
def test_check_finds_what_is_open(tmp_path: Path, statement: Json, code: str, part: str) -> None:
    file = place(tmp_path, policy_of(attested(), statement))
    run = command("policy", "check", file)
    assert (run.status, run.err) == (4, "")
    text = run.out.decode()
    assert "statement 3: " in text
    assert f"[{code}]" in " ".join(text.split())
    assert part in " ".join(text.split())
    assert "    fix: " in text
    assert max(map(len, text.splitlines())) <= WIDTH


def test_the_json_of_check(tmp_path: Path) -> None:
    """The schema that the README documents."""
    run = command("policy", "check", "--json", place(tmp_path, policy_of(attested("0" * 96))))
    assert (run.status, run.err) == (4, "")
    (finding,) = json.loads(run.out)["findings"]
    assert {name: type(value) for name, value in finding.items()} == dict.fromkeys(
        ("statement", "code", "severity", "problem", "fix"), str
    )
    assert finding["severity"] == "error"
    run = command("policy", "check", "--json", place(tmp_path, policy_of(attested())))
    assert (run.status, json.loads(run.out)) == (0, {"findings": []})


def test_several_policies_are_checked_and_named(tmp_path: Path) -> None:
    good = place(tmp_path, policy_of(attested()), "good.json")
    zeros = place(tmp_path, policy_of(attested("0" * 96)), "zeros.json")
    parent = policy_of(attested(), attested(Action="kms:Encrypt", Condition={}))
    warned = place(tmp_path, parent, "warned\x1b[2J.json")
    assert command("policy", "check", good, good) == Run(0, b"", "")
    run = command("policy", "check", good, zeros, warned)
    assert (run.status, run.err) == (4, "")
    text = " ".join(run.out.decode().split())
    assert text.startswith(f"{zeros}: statement 2: ")
    assert f"{tmp_path}/warned?[2J.json: statement 3: warning: allows kms:Encrypt" in text
    assert good not in text
    assert command("policy", "check", good, warned).status == 0
    run = command("policy", "check", "--json", good, zeros)
    assert run.status == 4
    objects = list(objects_in(run.out.decode()))
    assert [found["file"] for found in objects] == [good, zeros]
    assert objects[0]["findings"] == []
    assert objects[1]["findings"]


def objects_in(text: str) -> Iterator[Json]:
    """JSON objects that stand one after the other, as jq reads them."""
    while text:
        found, end = json.JSONDecoder().raw_decode(text)
        text = text[end:].lstrip()
        yield found


def test_one_of_several_that_is_no_policy_is_named(tmp_path: Path) -> None:
    zeros = place(tmp_path, policy_of(attested("0" * 96)), "zeros.json")
    text = str(tmp_path / "text.json")
    (tmp_path / "text.json").write_text("text")
    refused(command("policy", "check", zeros, text), 2, f"{text}: ")
    refused(command("policy", "check", text, zeros), 2, f"{text}: ")
    refused(command("policy", "check", zeros, ""), 2, "FILE is empty")
    refused(command("policy", "check"), 2, "missing argument 'FILE...'")


def test_a_warning_is_printed_and_is_no_fault(tmp_path: Path) -> None:
    parent = attested(Action="kms:Encrypt", Condition={})
    file = place(tmp_path, policy_of(attested(), parent))
    run = command("policy", "check", file)
    assert (run.status, run.err) == (0, "")
    text = " ".join(run.out.decode().split())
    assert text.startswith(f"statement 3: warning: allows kms:Encrypt to {ROLE}, the parent")
    (found,) = json.loads(command("policy", "check", "--json", file).out)["findings"]
    assert (found["code"], found["severity"]) == ("parent_encrypts", "warning")
    file = place(tmp_path, policy_of(attested(), parent, attested(Action="kms:Put*", Condition={})))
    assert command("policy", "check", file).status == 4


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"\xff", b"{}", b'{"Statement": 1}', b" " * 300000]
)
def test_what_is_no_policy(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "policy").write_bytes(data)
    refused(command("policy", "check", str(tmp_path / "policy")), 2)
    refused(command("policy", "explain", str(tmp_path / "policy"), "--principal", ROLE), 2)
    refused(command("policy", "check", "absent"), 2, "absent cannot be read")


# -- explain


def explain(enclave: Enclave, file: str, *options: str) -> Run:
    if "--document" in options:
        options += ("--root", enclave.environment["NITROSIM_NSM_ROOT"])
    return command("policy", "explain", file, "--principal", SESSION, *options)


def test_explain_shows_both_values(enclave: Enclave) -> None:
    enclave.attestor("attest", "document")
    file = place(enclave.folder, policy_of(attested(Sid="Enclave")))
    run = explain(enclave, file, "--document", str(enclave.folder / "document"))
    assert (run.status, run.err) == (4, "")
    text = run.out.decode()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.startswith("decision        denied: no statement allows\n")
    assert "statement 2 (Enclave), Allow: does not apply\n" in text
    assert f"    request   {PCR[0][:86]}\n              {PCR[0][86:]}\n" in text
    assert f"    policy    {OTHER[:86]}\n              {OTHER[86:]}\n" in text
    assert " s ago" in text
    assert "not evaluated   identity policies, grants" in text


def test_explain_says_what_depends_on_other_policies(tmp_path: Path, enclave: Enclave) -> None:
    root = {"Effect": "Allow", "Principal": {"AWS": ROOT}, "Action": "kms:*", "Resource": "*"}
    run = explain(enclave, place(tmp_path, policy_of(root)))
    assert (run.status, run.err) == (8, "")
    assert run.out.startswith(
        b"decision        undetermined: statement 2 leaves the decision to the identity policies"
    )
    assert b"document        none: a call without attestation\n" in run.out
    unknown = attested(Condition={"StringResembles": {f"{KEY}0": OTHER}})
    run = explain(enclave, place(tmp_path, policy_of(unknown)))
    assert run.status == 8
    assert b"cannot be told" in run.out


def test_explain_needs_the_key_where_the_policy_looks_at_it(
    tmp_path: Path, enclave: Enclave
) -> None:
    key = f"arn:aws:kms:eu-west-1:{ACCOUNT}:key/1234abcd-12ab-34cd-56ef-1234567890ab"
    for statement in (
        attested(Resource=key, Condition={}),
        attested(Condition={"StringEquals": {"aws:RequestedRegion": "eu-west-1"}}),
    ):
        file = place(tmp_path, policy_of(statement))
        refused(explain(enclave, file), 2, "looks at the key or at its region", "--key-id")
        assert explain(enclave, file, "--key-id", key).status == 0
        assert (
            explain(enclave, file, "--key-id", key.replace("eu-west-1", "eu-north-1")).status == 4
        )


PINNED: Final = attested(Condition={"StringEqualsIgnoreCase": {f"{KEY}0": OTHER, f"{KEY}8": OTHER}})


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (["--pcr", f"0={OTHER}", "--pcr", f"8={OTHER}"], 0),
        (["--pcr", f"0={OTHER}"], 8),  # nobody has told PCR8
        (["--pcr", f"8={PCR[8]}"], 4),
        (["--measurements", "build.json"], 8),
        (["--measurements", "build.json", "--pcr", f"8={OTHER}"], 0),
        (["--measurements", "build.json", "--pcr", f"8={'0' * 96}"], 4),
        ([], 4),
    ],
)
def test_explain_without_a_document(tmp_path: Path, options: list[str], status: int) -> None:
    place(tmp_path, MEASURED, "build.json")
    options = [option.replace("build.json", str(tmp_path / "build.json")) for option in options]
    asked = ["policy", "explain", place(tmp_path, policy_of(PINNED)), "--principal", ROLE, *options]
    run = command(*asked)
    assert (run.status, run.err) == (status, "")
    text = " ".join(run.out.decode().split())
    assert ("whose other PCRs are not known" in text) == bool(options)
    assert ("a call without attestation" in text) == (not options)
    shown = json.loads(command(*asked, "--json").out)
    assert shown["document"] is None
    assert bool(shown["pcrs"]) == bool(options)
    assert shown["decision"] == {0: "allowed", 4: "denied", 8: "undetermined"}[status]


def test_explain_takes_no_document_beside_pcrs(tmp_path: Path) -> None:
    file = place(tmp_path, policy_of(PINNED))
    asked = ["policy", "explain", file, "--principal", ROLE]
    for options in (["--pcr", f"0={OTHER}"], ["--measurements", file]):
        refused(command(*asked, "--document", file, *options), 2, "--document tells every PCR")
    options = ["--pcr", f"0={OTHER}", "--pcr", f"0={PCR[0]}"]
    refused(command(*asked, *options), 2, "PCR0 is given twice")
    for action in ("kms:PutKeyPolicy", "kms:ReEncryptFrom", "kms:Encrypt"):
        run = command(*asked, "--action", action, "--pcr", f"0={OTHER}")
        refused(run, 2, f"{action} carries no attestation document", "kms:Decrypt")
    assert command(*asked, "--action", "KMS:decrypt", "--pcr", f"0={PCR[0]}").status == 4


def test_the_hint_after_a_refusal_can_be_followed(enclaves: Callable[..., Enclave]) -> None:
    policy = policy_of(attested(PCR[0]), attested(Action="kms:Encrypt", Condition={}))
    enclave = enclaves(key_policy=json.dumps(policy), debug=True)
    enclave.place(enclave.encrypt())
    run = enclave.decrypt()
    assert run.status == 4
    hint = run.err.partition("hint: attestor attest ")[2].splitlines()[0]
    attest, explain_it = f"attest {hint}".partition(": which")[0].split(", then attestor ")
    place(enclave.folder, policy, "POLICY")
    assert enclave.attestor(*attest.split()).status == 0
    root = ["--root", enclave.environment["NITROSIM_NSM_ROOT"]]
    told = enclave.attestor(*explain_it.split(), *root)
    assert (told.status, told.err) == (4, "")
    assert b"denied: no statement allows" in told.out


def test_a_policy_larger_than_kms_takes(tmp_path: Path) -> None:
    many = [part for number in range(120) for part in ("--bind", f"n={number}:i-{number:017x}")]
    run = command("policy", "render", *PEOPLE, "--pcr", f"0={OTHER}", *many)
    refused(run, 2, "bytes, but KMS takes 32,768", "of 120 binds fit: use another key")
    file = place(tmp_path, policy_of(attested()) | {"Id": "x" * 33_000})
    run = command("policy", "check", file)
    assert run.status == 4
    assert run.out.startswith(b"policy: it has 33,")


def test_the_answer_of_get_key_policy_is_recognised(tmp_path: Path) -> None:
    file = place(tmp_path, {"Policy": json.dumps(policy_of()), "PolicyName": "default"})
    for arguments in (("check", file), ("explain", file, "--principal", ROLE)):
        run = command("policy", *arguments)
        refused(run, 2, f"{file}: the answer of aws kms get-key-policy", "--query Policy")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--principal", "somebody"], "'somebody' is not an ARN"),
        (["--principal", "arn:aws:s3:::bucket"], "is not the ARN of a user, role or session"),
        (["--principal", ROLE, "--key-id", "1234"], "--key-id 1234 is not the ARN of a key"),
        (["--principal", ROLE, "--key-id", ""], "is not the ARN of a key"),
        (["--principal", ROLE, "--key-id", "arn:aws:s3:::bucket"], "is not the ARN of a key"),
        (
            ["--principal", ROLE, "--key-id", f"arn:aws:kms:eu-west-1:{ACCOUNT}:alias/x"],
            "is not the ARN of a key",
        ),
        (
            ["--principal", ROLE, "--key-id", f"arn:aws-cn:kms:cn-north-1:{ACCOUNT}:key/1"],
            "of the partitions aws, aws-cn",
        ),
        (["--principal", f"{ROLE[:-1]}*"], "is a pattern: name one"),
        (["--principal", f"arn:aws:iam::{ACCOUNT}:group/x"], "is not the ARN of a user, role"),
        (
            ["--principal", ROLE, "--action", "kms:generaterandom"],
            "no key policy decides about kms:GenerateRandom",
        ),
        (
            ["--principal", ROLE, "--action", "kms:CreateKey", "--pcr", f"0={OTHER}"],
            "no key policy decides about kms:CreateKey",
        ),
        (["--principal", ROLE, "--action", "kms:*"], "'kms:*' is a pattern: ask about one action"),
        (["--principal", ROLE, "--action", "kms:Dcrypt"], "did you mean kms:Decrypt?"),
        (["--principal", ROLE, "--action", "Decrypt"], "did you mean kms:Decrypt?"),
        (["--principal", ROLE, "--action", "s3:GetObject"], "expected one of KMS"),
        (["--principal", ROLE, "--action", ""], "action '' is not known here"),
        (["--principal", ROLE, "--context", "node"], "NAME=VALUE"),
        (["--principal", ROLE, "--document", "/nowhere"], "cannot be read"),
        ([], "missing option '--principal'"),
    ],
)
def test_an_option_of_explain_that_cannot_be(tmp_path: Path, options: list[str], part: str) -> None:
    refused(command("policy", "explain", place(tmp_path, policy_of()), *options), 2, part)


def test_a_document_that_is_not_genuine_explains_nothing(tmp_path: Path, enclave: Enclave) -> None:
    enclave.attestor("attest", "document")
    document = ["--document", str(enclave.folder / "document")]
    run = command("policy", "explain", place(tmp_path, policy_of()), "--principal", ROLE, *document)
    refused(run, 6, "document refused, root")


def test_the_json_of_explain(enclave: Enclave) -> None:
    """The schema that the README documents."""
    enclave.attestor("attest", "document")
    file = place(enclave.folder, policy_of(attested(Sid="Enclave")))
    run = explain(
        enclave,
        file,
        "--json",
        "--context",
        "node=3",
        "--document",
        str(enclave.folder / "document"),
    )
    assert (run.status, run.err) == (4, "")
    shown = json.loads(run.out)
    statements, document = shown.pop("statements"), shown.pop("document")
    pcrs = shown.pop("pcrs")
    assert {pcrs[str(index)] for index in (0, 1, 2, 8)} == {PCR[index] for index in (0, 1, 2, 8)}
    assert shown == {
        "decision": "denied",
        "reason": "no statement allows",
        "principal": SESSION,
        "action": "kms:Decrypt",
        "resource": f"arn:aws:kms:*:{ACCOUNT}:key/*",
        "context": {"node": "3"},
        "nitrotpm_pcrs": {},
        "undetermined": [],
        "not_evaluated": list(NOT_EVALUATED),
    }
    assert set(document) == {"source", "module_id", "signed_at", "age_seconds", "debug_mode"}
    assert document["module_id"] == DEFAULT_MODULE_ID
    assert statements[1].pop("reasons")
    assert statements[1] == {
        "statement": 2,
        "sid": "Enclave",
        "effect": "Allow",
        "applies": False,
        "delegates": False,
        "conditions": [
            {
                "operator": "StringEqualsIgnoreCase",
                "key": f"{KEY}0",
                "held": False,
                "request": [PCR[0]],
                "policy": [OTHER],
                "note": "",
            }
        ],
    }


# -- the simulated KMS decides alike


def decide(enclave: Enclave, policy: Json, *context: str) -> tuple[int, int]:
    """Exit status of explain, and of the attested call as a dry run, under the same policy."""
    file = place(enclave.folder, policy)
    enclave.attestor("attest", "--force", "document")
    options = [part for pair in context for part in ("--context", pair)]
    explained = explain(
        enclave,
        file,
        "--key-id",
        enclave.world.kms.key_arn,
        "--document",
        str(enclave.folder / "document"),
        *options,
    )
    root = ["--root", enclave.environment["NITROSIM_NSM_ROOT"]]
    run = enclave.attestor("doctor", "--key-id", enclave.world.kms.key_arn, *root, *options)
    return explained.status, run.status


POLICIES: Final[dict[str, tuple[list[Json], tuple[int, int]]]] = {
    "the right image": ([attested(PCR[0])], (0, 0)),
    "upper case": ([attested(PCR[0].upper())], (0, 0)),
    "upper case, case-sensitive": (
        [attested(Condition={"StringEquals": {f"{KEY}0": PCR[0].upper()}})], (4, 4),
    ),
    "another image": ([attested()], (4, 4)),
    "either image": ([attested(), attested(PCR[0])], (0, 0)),
    "two PCRs, one wrong": (
        [attested(Condition={"StringEqualsIgnoreCase": {f"{KEY}0": PCR[0], f"{KEY}1": OTHER}})],
        (4, 4),
    ),
    "ImageSha384": ([attested(PCR[0], "kms:RecipientAttestation:ImageSha384")], (0, 0)),
    "another role": ([attested(PCR[0], Principal={"AWS": ADMIN})], (4, 4)),
    "another action": ([attested(PCR[0], Action="kms:GenerateDataKey")], (4, 4)),
    "a wildcard action": ([attested(PCR[0], Action="kms:De*")], (0, 0)),
    "a deny that holds": (
        [attested(PCR[0]), deny(StringNotEqualsIgnoreCase={f"{KEY}8": OTHER})], (4, 4),
    ),
    "a deny that does not hold": (
        [attested(PCR[0]), deny(StringNotEqualsIgnoreCase={f"{KEY}0": PCR[0]})], (0, 0),
    ),
    "Null": ([attested(Condition={"Null": {f"{KEY}0": "false"}})], (0, 0)),
    "the right context": (
        [attested(Condition={"StringEquals": {"kms:EncryptionContext:node": "3"}})], (0, 0),
    ),
    "another context": (
        [attested(Condition={"StringEquals": {"kms:EncryptionContext:node": "4"}})], (4, 4),
    ),
    "an unknown operator": ([attested(Condition={"StringResembles": {f"{KEY}0": PCR[0]}})], (8, 4)),
    "a deny with an unknown operator": (
        [attested(PCR[0]), deny(StringResembles={f"{KEY}0": OTHER})], (8, 4),
    ),
    # explain does not know the identity policies; the simulator has none and lets its own account
    # pass
    "the account's root": ([attested(PCR[0], Principal={"AWS": ROOT})], (8, 0)),
    "nothing": ([], (4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
def test_the_simulated_kms_decides_as_explain_says(
    enclaves: Callable[..., Enclave], name: str
) -> None:
    statements, expected = POLICIES[name]
    policy = policy_of(*statements)
    assert decide(enclaves(key_policy=json.dumps(policy)), policy, "node=3") == expected


RENDERED: Final = ("--pcr", f"0={PCR[0]}", "--pcr", f"8={PCR[8]}")


@pytest.mark.parametrize(
    ("enclave_of", "expected"),
    [
        ({}, (0, 0)),
        ({"pcrs": {1: bytes.fromhex(OTHER)}}, (0, 0)),
        ({"pcrs": {0: bytes.fromhex(OTHER)}}, (4, 4)),
        ({"pcrs": {8: bytes.fromhex(OTHER)}}, (4, 4)),
        ({"debug": True}, (4, 4)),
    ],
)
def test_a_rendered_policy_lets_the_matching_enclave_through_and_no_other(
    enclaves: Callable[..., Enclave], enclave_of: Json, expected: tuple[int, int]
) -> None:
    policy = render(*RENDERED)
    assert decide(enclaves(key_policy=json.dumps(policy), **enclave_of), policy) == expected


def test_a_rendered_policy_from_end_to_end(enclaves: Callable[..., Enclave]) -> None:
    """Encrypted by the encryptor's statement, decrypted by an enclave, refused without document."""
    encryptor = f"arn:aws:iam::{ACCOUNT}:role/encryptor"
    policy = render(*RENDERED, "--encryptor", encryptor)
    blob_policy = policy | {
        "Statement": [*policy["Statement"], attested(Action="kms:Encrypt", Condition={})]
    }
    enclave = enclaves(key_policy=json.dumps(blob_policy))
    enclave.place(enclave.encrypt())
    assert enclave.decrypt().status == 0
    with pytest.raises(
        enclave.kms.exceptions.ClientError, match=r"AccessDeniedException.*explicit deny"
    ):
        enclave.kms.decrypt(CiphertextBlob=(enclave.folder / "blob").read_bytes())


def test_a_document_has_the_pcrs_that_are_computed_for_the_parent(enclave: Enclave) -> None:
    enclave.attestor("attest", "document")
    options = ["--root", enclave.environment["NITROSIM_NSM_ROOT"], str(enclave.folder / "document")]
    pcr4 = hashlib.sha384(bytes(48) + DEFAULT_MODULE_ID.partition("-enc")[0].encode()).digest()
    expected = [
        "--pcr",
        f"3={pcr_of_role(ROLE).hex()}",
        "--pcr",
        f"4={base64.b64encode(pcr4).decode()}",
    ]
    assert "pcrs              passed: 3, 4" in report(command("verify", *expected, *options))
