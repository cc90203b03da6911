"""Refusals of KMS, explained: what was sent, and the likeliest causes."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestor_io.refusal import HINTS_MAX, Refusal, clock_skew, explain
from nitrosim.kms import default_policy
from nitrosim.module import DEFAULT_PCRS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Enclave, Run

OTHER: Final = "cd" * 48
ROLE: Final = "arn:aws:iam::111122223333:role/nitrosim-enclave"


def short(digits: str) -> str:
    """A PCR as notes show it."""
    return f"{digits[:12]}...{digits[-4:]}"


SENT: Final = tuple(f"PCR{index} {short(DEFAULT_PCRS[index].hex())}" for index in (1, 2, 4))
NOW: Final = datetime(2026, 1, 3, 12, tzinfo=UTC)


def lines(run: Run, kind: str) -> list[str]:
    return [
        line.removeprefix(f"attestor: {kind}: ")
        for line in run.err.splitlines()
        if line.startswith(f"attestor: {kind}: ")
    ]


def refused(
    enclave: Enclave, *options: str, **environment: str | None
) -> tuple[list[str], list[str]]:
    """Notes and hints of a refusal, which come in this order after the error; no target is left."""
    run = enclave.decrypt(*options, environment=environment)
    assert run.status == 4, run.err
    assert run.error
    assert "out" not in enclave.files()
    kinds = re.sub("(error|note|hint).*", r"\1", run.err.replace("attestor: ", "")).split()
    assert kinds == sorted(kinds, key=["error", "note", "hint"].index)
    assert len(lines(run, "hint")) <= HINTS_MAX
    return lines(run, "note"), lines(run, "hint")


def with_blob(enclave: Enclave, **context: str) -> Enclave:
    enclave.place(enclave.encrypt(b"the secret", **context))
    return enclave


# -- through the command line


def test_debug_mode_is_the_first_hint(enclaves: Callable[..., Enclave]) -> None:
    notes, hints = refused(with_blob(enclaves(debug=True)))
    assert hints[0].startswith("debug mode: PCR0, 1 and 2 are all zeros")
    assert "attestor policy explain" in hints[1]
    assert notes[0].startswith("sent PCR0 zero, PCR1 zero, PCR2 zero, PCR3 ")
    assert notes[1] == "the enclave runs in debug mode"


def test_another_image(enclaves: Callable[..., Enclave]) -> None:
    enclave = with_blob(enclaves(pcrs={0: bytes.fromhex(OTHER)}), node="a value", app="another")
    notes, hints = refused(enclave, "--context", "node=a value", "--context", "app=another")
    assert notes[0].startswith(f"sent PCR0 {short(OTHER)}, {SENT[0]}, {SENT[1]}, PCR3 ")
    assert f"{SENT[2]}, PCR8 " in notes[0]
    assert notes[1] == "the enclave does not run in debug mode"
    assert (
        notes[2]
        == "key none named, KMS takes it from the ciphertext; encryption context names: node, app"
    )
    assert "value" not in "".join(notes)
    assert hints[0].startswith("no statement of the key policy allows this role with these PCRs")


def test_the_key_that_was_named_is_shown(enclaves: Callable[..., Enclave]) -> None:
    enclave = with_blob(enclaves(pcrs={0: bytes.fromhex(OTHER)}))
    run = enclave.attestor("decrypt", "--key-id", "alias/nitrosim", "--any-key", "blob", "out")
    assert lines(run, "note")[2] == "key alias/nitrosim; encryption context names: none"


def test_an_explicit_deny(enclaves: Callable[..., Enclave]) -> None:
    policy = json.loads(default_policy(ROLE, DEFAULT_PCRS[0]))
    guard: dict[str, Any] = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "kms:Decrypt",
        "Resource": "*",
    }
    guard["Condition"] = {"StringNotEqualsIgnoreCase": {"kms:RecipientAttestation:PCR8": OTHER}}
    policy["Statement"].append(guard)
    _, hints = refused(with_blob(enclaves(key_policy=json.dumps(policy))))
    assert hints[0].startswith("a Deny of the key policy holds")


def test_the_account_of_somebody_else(enclaves: Callable[..., Enclave]) -> None:
    """The key is of the simulator's account, the caller's is told by KMS."""
    enclave = enclaves(faults=["access-denied"])
    _, hints = refused(with_blob(enclave))
    assert hints[0].startswith("the key policy must allow this role with this enclave's PCRs")


def test_a_skewed_clock(enclaves: Callable[..., Enclave]) -> None:
    enclave = enclaves(clock_skew=600.0)
    enclave.place(b"\xff" * 200)
    notes, hints = refused(enclave)
    assert re.fullmatch(r"this enclave's clock is (599|600) s behind KMS's: set it", hints[0])
    assert hints[1].startswith("attestor doctor CIPHERTEXT, with the same options, ")
    assert notes


@pytest.mark.parametrize(
    ("fault", "hint"),
    [
        ("expired-token", "the credentials are expired or wrong"),
        ("unrecognized-client", "the credentials are expired or wrong"),
        (
            "invalid-signature",
            "the secret key is wrong, or the clock is more than five minutes off",
        ),
        ("not-found", "there is no such key in this region and in the credentials' account"),
        (
            "invalid-ciphertext",
            "the ciphertext is damaged, or was made with another encryption context",
        ),
        ("incorrect-key", "the ciphertext was made with another key than --key-id, or"),
        ("validation", "KMS does not take a parameter"),
    ],
)
def test_the_likeliest_cause(enclaves: Callable[..., Enclave], fault: str, hint: str) -> None:
    notes, hints = refused(with_blob(enclaves(faults=[fault])))
    assert hints[0].startswith(hint)
    assert len(notes) == 3


def test_a_refusal_without_a_known_cause_has_notes_alone(enclaves: Callable[..., Enclave]) -> None:
    notes, hints = refused(with_blob(enclaves(faults=["disabled"])))
    assert (len(notes), hints) == (3, [])


def test_what_kms_may_answer_later_is_not_explained(enclaves: Callable[..., Enclave]) -> None:
    run = with_blob(enclaves(faults=["throttling"])).decrypt(environment={"AWS_MAX_ATTEMPTS": "1"})
    assert (run.status, lines(run, "note"), lines(run, "hint")) == (5, [], [])


def test_credentials_that_say_themselves_that_they_are_expired(enclave: Enclave) -> None:
    run = with_blob(enclave).decrypt(
        environment={"AWS_CREDENTIAL_EXPIRATION": "2020-01-01T00:00:00Z"}
    )
    assert run.status == 4
    assert "still expired" in run.error
    assert lines(run, "hint") == ["they are expired: renew them"]
    assert enclave.world.kms.credentials.secret_key not in run.err


# -- what AWS says elsewhere


def denied(message: str, **members: Any) -> tuple[str, ...]:
    """The hints for an AccessDeniedException with this message."""
    default: dict[str, Any] = {
        "code": "AccessDeniedException",
        "pcrs": {},
        "key_id": None,
        "context": (),
        "skew": None,
    }
    return explain(Refusal(message=message, **(default | members)))[1]


WHO: Final = (
    "User: arn:aws:sts::111122223333:assumed-role/enclave/i-1 "
    "is not authorized to perform: kms:Decrypt on "
)
WHAT: Final = "resource: arn:aws:kms:eu-west-1:{}:key/1234abcd-12ab-34cd-56ef-1234567890ab "


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("because no resource-based policy allows the kms:Decrypt action",
         "no statement of the key policy allows"),
        ("because no identity-based policy allows the kms:Decrypt action",
         "the identity policy of the role allows"),
        ("because no permissions boundary allows the kms:Decrypt action",
         "the permissions boundary of the role"),
        ("because no session policy allows the kms:Decrypt action", "the policy of this session"),
        ("because no service control policy allows the kms:Decrypt action",
         "no service control policy"),
        ("because no VPC endpoint policy allows the kms:Decrypt action",
         "the policy of the VPC endpoint"),
        ("with an explicit deny in a resource-based policy", "a Deny of the key policy holds"),
        ("with an explicit deny in an identity-based policy",
         "a Deny in an identity policy of the role holds"),
        ("with an explicit deny in a service control policy",
         "a service control policy of the organization denies"),
        ("with an explicit deny in a resource control policy",
         "a resource control policy of the organization denies"),
        ("with an explicit deny in a permissions boundary",
         "the permissions boundary of the role denies"),
        ("with an explicit deny in a session policy", "the policy of this session denies"),
        ("with an explicit deny in a VPC endpoint policy", "the policy of the VPC endpoint denies"),
        ("with an explicit deny", "a policy denies it explicitly"),
        ("a customer master key that does not exist in this region",
         "the key is in another region or account"),
        ("because the resource does not exist in this Region",
         "the key is in another region or account"),
        ("", "the key policy must allow this role"),
    ],
)  # fmt: skip
def test_the_kind_of_policy_is_told_by_the_text_of_kms(text: str, hint: str) -> None:
    hints = denied(WHO + WHAT.format("111122223333") + text)
    assert hints[0].startswith(hint)
    assert "policy explain" in hints[1]


def test_another_account_is_told_by_the_text_of_kms() -> None:
    (first, _) = denied(
        WHO + WHAT.format("444455556666") + "because no resource-based policy allows the action"
    )
    assert first.startswith(
        "the credentials are of account 111122223333, the key of 444455556666, and both must allow"
    )


def test_a_call_without_a_document_has_no_pcrs() -> None:
    refusal = Refusal(
        code="AccessDeniedException",
        message="",
        pcrs=None,
        key_id="alias/x",
        context=(),
        skew=None,
    )
    notes, hints = explain(refusal)
    assert notes == ("key alias/x; encryption context names: none",)
    assert len(hints) == 1


@pytest.mark.parametrize(("skew", "side"), [(400.0, "400 s behind"), (-400.0, "400 s ahead of")])
def test_the_side_of_the_clock(skew: float, side: str) -> None:
    assert side in denied("", code="InvalidSignatureException", skew=skew)[0]
    assert "secret key is wrong" in denied("", code="InvalidSignatureException", skew=skew / 2)[0]


def test_clock_skew() -> None:
    assert clock_skew("Sat, 03 Jan 2026 12:00:05 GMT", NOW) == timedelta(seconds=5).total_seconds()
    assert clock_skew("Sat, 03 Jan 2026 11:00:00 GMT", NOW) == -3600
    for date in (
        None,
        "",
        "soon",
        "Sat, 03 Jan 2026 12:00:05 -0000",
        "Sat, 03 Jan 99999 12:00:05 GMT",
    ):
        assert clock_skew(date, NOW) is None


@given(st.text(), st.text(), st.dictionaries(st.integers(0, 31), st.binary(max_size=64)))
def test_whatever_kms_says_there_are_notes_and_at_most_two_hints(
    code: str, message: str, pcrs: dict[int, bytes]
) -> None:
    notes, hints = explain(
        Refusal(code=code, message=message, pcrs=pcrs, key_id=None, context=("a",), skew=0.0)
    )
    assert notes
    assert len(hints) <= HINTS_MAX


@given(st.text())
def test_any_date_is_a_skew_or_none(date: str) -> None:
    assert isinstance(clock_skew(date, NOW), float | None)
