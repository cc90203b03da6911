"""Key policies: how KMS decides, what is wrong with one, and how a right one is written.

The table of decisions is written from AWS's documentation; each case names the rule that it shows.
EVAL is "Policy evaluation logic", COND "Condition operators", MULTI "Conditions with multiple
context keys or values", SETS "Set operators for multivalued context keys", PRINCIPAL and
NOTPRINCIPAL "Principal" and "NotPrincipal", ELEMENTS the rest of "IAM JSON policy elements
reference" of the IAM User Guide; KMS is "Condition keys for AWS KMS" and "Key policies" of the KMS
Developer Guide.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from dataclasses import replace
from typing import Any, Final

import pytest
from botocore.loaders import Loader
from hypothesis import given, settings
from hypothesis import strategies as st

from keypolicy import (
    ATTESTATION,
    RECIPIENT_ACTIONS,
    Bind,
    Decision,
    Evaluation,
    Policy,
    PolicyError,
    Rendered,
    Request,
    check,
    evaluate,
    measurements,
    pcr_of_certificate,
    pcr_of_instance,
    pcr_of_role,
    render,
)
from keypolicy.actions import ACTIONS
from keypolicy.keys import closest_key

ACCOUNT: Final = "111122223333"
ROOT: Final = f"arn:aws:iam::{ACCOUNT}:root"
ROLE: Final = f"arn:aws:iam::{ACCOUNT}:role/Enclave"
SESSION: Final = f"arn:aws:sts::{ACCOUNT}:assumed-role/Enclave/i-0123456789abcdef0"
USER: Final = f"arn:aws:iam::{ACCOUNT}:user/Eve"
ADMIN: Final = f"arn:aws:iam::{ACCOUNT}:role/Admin"
OTHER: Final = "arn:aws:iam::444455556666:role/Enclave"
KEY: Final = f"arn:aws:kms:eu-west-1:{ACCOUNT}:key/1234abcd-12ab-34cd-56ef-1234567890ab"
PCR0: Final = f"{ATTESTATION}PCR0"
PCR1: Final = f"{ATTESTATION}PCR1"
PCR2: Final = f"{ATTESTATION}PCR2"
PCR3: Final = f"{ATTESTATION}PCR3"
PCR4: Final = f"{ATTESTATION}PCR4"
PCR8: Final = f"{ATTESTATION}PCR8"
GOOD: Final = "ab" * 48
BAD: Final = "cd" * 48
ZERO: Final = "0" * 96

ALLOWED, DENIED, UNDETERMINED = Decision.ALLOWED, Decision.DENIED, Decision.UNDETERMINED
Json = dict[str, Any]


def statement(condition: Json | None = None, effect: str = "Allow", **members: Any) -> Json:
    """A statement about kms:Decrypt by the enclave's role; None drops a member."""
    default: Json = {
        "Effect": effect,
        "Principal": {"AWS": ROLE},
        "Action": "kms:Decrypt",
        "Resource": "*",
    }
    if condition is not None:
        default["Condition"] = condition
    return {name: value for name, value in (default | members).items() if value is not None}


def parse(*statements: Json) -> Policy:
    return Policy.parse(json.dumps({"Version": "2012-10-17", "Statement": list(statements)}))


def request(**members: Any) -> Request:
    """kms:Decrypt by a session of the enclave's role, with a document of the right PCR0."""
    default: Json = {
        "principal": SESSION,
        "action": "kms:Decrypt",
        "resource": KEY,
        "pcrs": {0: bytes.fromhex(GOOD)},
    }
    return Request(**(default | members))


def decide(statements: list[Json], asked: Request) -> Evaluation:
    return evaluate(parse(*statements), asked)


OPEN: Final = statement()
CONTEXT: Final = {"node": "3", "app": "db"}
NO_DOCUMENT: Final[Json] = {"pcrs": None}


def allow(**condition: Json) -> list[Json]:
    """One Allow with these condition operators; _ stands for the colon after a set operator."""
    return [statement({name.replace("_", ":"): keys for name, keys in condition.items()})]


def deny(**condition: Json) -> list[Json]:
    """The same as a Deny, beside an Allow of everything."""
    return [
        OPEN,
        statement(
            {name.replace("_", ":"): keys for name, keys in condition.items()}, effect="Deny"
        ),
    ]


CASES: Final[dict[str, tuple[list[Json], Json, Decision]]] = {
    # -- effects
    "EVAL: an allow that applies allows": ([OPEN], {}, ALLOWED),
    "EVAL: without an allow it is denied implicitly": (
        [statement(Action="kms:Encrypt")],
        {},
        DENIED,
    ),
    "EVAL: an explicit deny overrides any allow": ([OPEN, statement(effect="Deny")], {}, DENIED),
    "EVAL: the order of statements does not matter": ([statement(effect="Deny"), OPEN], {}, DENIED),
    "EVAL: a deny that does not apply changes nothing": (
        [OPEN, statement(effect="Deny", Action="kms:Encrypt")],
        {},
        ALLOWED,
    ),
    "EVAL: one of several allows is enough": (
        [*allow(StringEquals={PCR0: BAD}), OPEN],
        {},
        ALLOWED,
    ),
    "EVAL: a deny alone allows nobody else": (
        [statement(effect="Deny", Principal={"AWS": USER})],
        {},
        DENIED,
    ),
    # -- principals
    "PRINCIPAL: a role's sessions are the role": ([OPEN], {"principal": SESSION}, ALLOWED),
    "PRINCIPAL: the role itself": ([OPEN], {"principal": ROLE}, ALLOWED),
    "PRINCIPAL: another role is not": ([OPEN], {"principal": ADMIN}, DENIED),
    "PRINCIPAL: a user of the account is not": ([OPEN], {"principal": USER}, DENIED),
    "PRINCIPAL: a session's ARN lacks the role's path": (
        [statement(Principal={"AWS": f"arn:aws:iam::{ACCOUNT}:role/team/app/Enclave"})],
        {},
        ALLOWED,
    ),
    "PRINCIPAL: a role with another path is another role": (
        [statement(Principal={"AWS": f"arn:aws:iam::{ACCOUNT}:role/team/Enclave"})],
        {"principal": ROLE},
        DENIED,
    ),
    "PRINCIPAL: a session named in full": ([statement(Principal={"AWS": SESSION})], {}, ALLOWED),
    "PRINCIPAL: another session of the role": (
        [statement(Principal={"AWS": f"{SESSION}1"})],
        {},
        DENIED,
    ),
    "PRINCIPAL: a role's ARN does not tell its session": (
        [statement(Principal={"AWS": SESSION})],
        {"principal": ROLE},
        UNDETERMINED,
    ),
    "PRINCIPAL: one of a list": ([statement(Principal={"AWS": [USER, ROLE]})], {}, ALLOWED),
    "PRINCIPAL: * is everyone": ([statement(Principal="*")], {}, ALLOWED),
    "PRINCIPAL: AWS * is everyone": ([statement(Principal={"AWS": "*"})], {}, ALLOWED),
    "PRINCIPAL: wildcards do not match a part of a name": (
        [statement(Principal={"AWS": f"{ROLE[:-1]}*"})],
        {},
        DENIED,
    ),
    "PRINCIPAL: a service is no role": (
        [statement(Principal={"Service": "ec2.amazonaws.com"})],
        {},
        DENIED,
    ),
    "PRINCIPAL: the id of a deleted role is nobody": (
        [statement(Principal={"AWS": "AROAEXAMPLEEXAMPLE123"})],
        {},
        DENIED,
    ),
    "PRINCIPAL: another partition": (
        [statement(Principal={"AWS": ROLE.replace("aws", "aws-cn")})],
        {},
        DENIED,
    ),
    "KMS: the account delegates to its identity policies": (
        [statement(Principal={"AWS": ROOT})],
        {},
        UNDETERMINED,
    ),
    "KMS: the account's bare id, too": ([statement(Principal={"AWS": ACCOUNT})], {}, UNDETERMINED),
    "KMS: a delegation under a condition that fails": (
        [statement({"StringEquals": {PCR0: BAD}}, Principal={"AWS": ROOT})],
        {},
        DENIED,
    ),
    "KMS: the root user needs no identity policy": (
        [statement(Principal={"AWS": ROOT})],
        {"principal": ROOT},
        ALLOWED,
    ),
    "KMS: the root user by the account's id": (
        [statement(Principal={"AWS": ACCOUNT})],
        {"principal": ROOT},
        ALLOWED,
    ),
    "EVAL: a deny for the account reaches everyone in it": (
        [OPEN, statement(effect="Deny", Principal={"AWS": ROOT})],
        {},
        DENIED,
    ),
    "EVAL: a direct allow needs no delegation": (
        [statement(Principal={"AWS": ROOT}), OPEN],
        {},
        ALLOWED,
    ),
    "EVAL: a deny beats a delegation": (
        [statement(Principal={"AWS": ROOT}), statement(effect="Deny")],
        {},
        DENIED,
    ),
    "EVAL: across accounts an identity policy must allow, too": (
        [statement(Principal={"AWS": OTHER})],
        {"principal": OTHER},
        UNDETERMINED,
    ),
    "EVAL: another account's root delegates to that account": (
        [statement(Principal={"AWS": "444455556666"})],
        {"principal": OTHER},
        UNDETERMINED,
    ),
    "NOTPRINCIPAL: a deny spares nobody that it does not list": (
        [OPEN, statement(effect="Deny", Principal=None, NotPrincipal={"AWS": USER})],
        {},
        DENIED,
    ),
    "NOTPRINCIPAL: account, role and session have to be listed": (
        [OPEN, statement(effect="Deny", Principal=None, NotPrincipal={"AWS": ROLE})],
        {},
        UNDETERMINED,
    ),
    "NOTPRINCIPAL: an allow reaches everyone else": (
        [statement(Principal=None, NotPrincipal={"AWS": USER})],
        {},
        ALLOWED,
    ),
    "NOTPRINCIPAL: a deny of everyone but everyone": (
        [OPEN, statement(effect="Deny", Principal=None, NotPrincipal="*")],
        {},
        ALLOWED,
    ),
    # -- actions and resources
    "ELEMENTS: actions have no case": ([statement(Action="KMS:decrypt")], {}, ALLOWED),
    "ELEMENTS: * matches any end of an action": ([statement(Action="kms:Dec*")], {}, ALLOWED),
    "ELEMENTS: ? matches one character": ([statement(Action="kms:Decryp?")], {}, ALLOWED),
    "ELEMENTS: all actions": ([statement(Action="*")], {}, ALLOWED),
    "ELEMENTS: GenerateDataKey is not its longer namesakes": (
        [statement(Action="kms:GenerateDataKey")],
        {"action": "kms:GenerateDataKeyPair"},
        DENIED,
    ),
    "ELEMENTS: NotAction allows what it does not list": (
        [statement(Action=None, NotAction="kms:Encrypt")],
        {},
        ALLOWED,
    ),
    "ELEMENTS: NotAction does not allow what it lists": (
        [statement(Action=None, NotAction="kms:Dec*")],
        {},
        DENIED,
    ),
    "KMS: in a key policy * is this key": ([statement(Resource="*")], {}, ALLOWED),
    "ELEMENTS: the key's ARN": ([statement(Resource=KEY)], {}, ALLOWED),
    "ELEMENTS: another key's ARN": ([statement(Resource=KEY[:-1] + "c")], {}, DENIED),
    "ELEMENTS: NotResource": ([statement(Resource=None, NotResource=KEY)], {}, DENIED),
    # -- attestation
    "KMS: the PCR of the document": (allow(StringEquals={PCR0: GOOD}), {}, ALLOWED),
    "KMS: another PCR": (allow(StringEquals={PCR0: BAD}), {}, DENIED),
    "KMS: without a document the key is absent": (
        allow(StringEquals={PCR0: GOOD}),
        NO_DOCUMENT,
        DENIED,
    ),
    "KMS: ImageSha384 is PCR0": (
        allow(StringEquals={f"{ATTESTATION}ImageSha384": GOOD}),
        {},
        ALLOWED,
    ),
    "KMS: a PCR that the document lacks": (
        allow(StringEquals={f"{ATTESTATION}PCR16": GOOD}),
        {},
        DENIED,
    ),
    "KMS: names of condition keys have no case": (
        allow(StringEquals={PCR0.upper(): GOOD}),
        {},
        ALLOWED,
    ),
    "KMS: values are in lower case": (allow(StringEquals={PCR0: GOOD.upper()}), {}, DENIED),
    "COND: StringEqualsIgnoreCase": (
        allow(StringEqualsIgnoreCase={PCR0: GOOD.upper()}),
        {},
        ALLOWED,
    ),
    "KMS: 0x is no part of the value": (
        allow(StringEqualsIgnoreCase={PCR0: f"0x{GOOD}"}),
        {},
        DENIED,
    ),
    "KMS: debug mode reports zeros": (
        allow(StringEquals={PCR0: ZERO}),
        {"pcrs": {0: bytes(48)}},
        ALLOWED,
    ),
    "KMS: NitroTPM has keys of its own": (
        allow(StringEquals={f"{ATTESTATION}NitroTPMPCR0": GOOD}),
        {},
        DENIED,
    ),
    "KMS: a key that is not known here may exist": (
        allow(StringEquals={"kms:RecipientAttestation:PCRO": GOOD}),
        {},
        UNDETERMINED,
    ),
    "KMS: so may one of KMS's that is newer than this program": (
        allow(StringEquals={"kms:GranteeFuturePrincipal": "x"}),
        {},
        UNDETERMINED,
    ),
    "KMS: a Deny by such a key may deny": (
        deny(StringEquals={"kms:GranteeFuturePrincipal": "x"}),
        {},
        UNDETERMINED,
    ),
    "KMS: keys of grants": (
        allow(StringEquals={"kms:GranteeServicePrincipal": "rds.amazonaws.com"}),
        {"action": "kms:Decrypt"},
        UNDETERMINED,
    ),
    "a key of another service that rides in a session": (
        allow(ArnEquals={"lambda:SourceFunctionArn": "arn:aws:lambda:eu-west-1:1:function:f"}),
        {},
        UNDETERMINED,
    ),
    "a key of the instance that rides in a session": (
        allow(ArnEquals={"ec2:SourceInstanceARN": "arn:aws:ec2:eu-west-1:1:instance/i-1"}),
        {},
        UNDETERMINED,
    ),
    "a claim of an identity provider": (
        allow(StringEquals={"accounts.google.com:aud": "x"}),
        {},
        UNDETERMINED,
    ),
    "KMS: PCRs beside those that are known": (
        allow(StringEquals={PCR1: GOOD}),
        {"more_pcrs": True},
        UNDETERMINED,
    ),
    "KMS: a known PCR decides all the same": (
        allow(StringEquals={PCR0: BAD, PCR1: GOOD}),
        {"more_pcrs": True},
        DENIED,
    ),
    "KMS: no more PCRs without a document": (
        allow(StringEquals={PCR1: GOOD}),
        {"more_pcrs": True, "pcrs": None},
        DENIED,
    ),
    # -- several keys and values
    "MULTI: several keys are ANDed": (allow(StringEquals={PCR0: GOOD, PCR1: GOOD}), {}, DENIED),
    "MULTI: several keys that all hold": (
        allow(StringEquals={PCR0: GOOD, PCR1: BAD}),
        {"pcrs": {0: bytes.fromhex(GOOD), 1: bytes.fromhex(BAD)}},
        ALLOWED,
    ),
    "MULTI: several values are ORed": (allow(StringEquals={PCR0: [BAD, GOOD]}), {}, ALLOWED),
    "MULTI: several operators are ANDed": (
        allow(StringEquals={PCR0: GOOD}, StringLike={PCR0: "cd*"}),
        {},
        DENIED,
    ),
    "MULTI: values of a negated operator are NORed": (
        allow(StringNotEquals={PCR0: [BAD, GOOD]}),
        {},
        DENIED,
    ),
    "MULTI: a negated operator with none of the values": (
        allow(StringNotEquals={PCR0: [BAD, ZERO]}),
        {},
        ALLOWED,
    ),
    "MULTI: a deny of two negated keys needs both to differ": (
        deny(StringNotEquals={PCR0: GOOD, PCR1: GOOD}),
        {},
        ALLOWED,
    ),
    "MULTI: a deny of one negated key guards": (deny(StringNotEquals={PCR0: BAD}), {}, DENIED),
    # -- operators
    "COND: negated operators hold for an absent key": (
        allow(StringNotEquals={PCR0: BAD}),
        NO_DOCUMENT,
        ALLOWED,
    ),
    "COND: so a negated deny applies without a document": (
        deny(StringNotEquals={PCR0: GOOD}),
        NO_DOCUMENT,
        DENIED,
    ),
    "COND: and spares the right document": (
        deny(StringNotEqualsIgnoreCase={PCR0: GOOD.upper()}),
        {},
        ALLOWED,
    ),
    "COND: StringNotEquals minds the case": (
        allow(StringNotEquals={PCR0: GOOD.upper()}),
        {},
        ALLOWED,
    ),
    "COND: StringLike takes *": (allow(StringLike={PCR0: "abab*"}), {}, ALLOWED),
    "COND: StringLike takes ?": (allow(StringLike={PCR0: "?" * 96}), {}, ALLOWED),
    "COND: StringLike is whole": (allow(StringLike={PCR0: "abab"}), {}, DENIED),
    "COND: StringEquals takes no wildcards": (allow(StringEquals={PCR0: "*"}), {}, DENIED),
    "COND: StringNotLike": (allow(StringNotLike={PCR0: "ab*"}), {}, DENIED),
    "COND: StringNotLike of another pattern": (allow(StringNotLike={PCR0: "cd*"}), {}, ALLOWED),
    "COND: IfExists holds for an absent key": (
        allow(StringEqualsIfExists={PCR0: GOOD}),
        NO_DOCUMENT,
        ALLOWED,
    ),
    "COND: IfExists compares a key that is there": (
        allow(StringEqualsIfExists={PCR0: BAD}),
        {},
        DENIED,
    ),
    "COND: Null true wants the key absent": (deny(Null={PCR0: "true"}), NO_DOCUMENT, DENIED),
    "COND: Null true with the key": (deny(Null={PCR0: True}), {}, ALLOWED),
    "COND: Null false wants the key": (allow(Null={PCR0: "false"}), {}, ALLOWED),
    "COND: Null false without the key": (allow(Null={PCR0: "false"}), NO_DOCUMENT, DENIED),
    "COND: Bool": (allow(Bool={"aws:SecureTransport": "true"}), {}, ALLOWED),
    "COND: Bool false": (deny(Bool={"aws:SecureTransport": False}), {}, ALLOWED),
    "COND: ArnLike by parts": (
        allow(ArnLike={"aws:PrincipalArn": f"arn:aws:iam::{ACCOUNT}:role/Enc*"}),
        {},
        ALLOWED,
    ),
    "COND: ArnEquals takes wildcards, too": (
        allow(ArnEquals={"aws:PrincipalArn": "arn:*:iam::*:role/*"}),
        {},
        ALLOWED,
    ),
    "COND: a wildcard of an ARN spans no colon": (
        allow(ArnLike={"aws:PrincipalArn": "arn:aws:*:role/Enclave:*:*"}),
        {},
        DENIED,
    ),
    "COND: ArnNotLike": (deny(ArnNotLike={"aws:PrincipalArn": ROLE}), {}, ALLOWED),
    "COND: ArnNotEquals of another role": (
        deny(ArnNotEquals={"aws:PrincipalArn": ADMIN}),
        {},
        DENIED,
    ),
    "COND: a session does not tell its role's path": (
        allow(ArnLike={"aws:PrincipalArn": f"arn:aws:iam::{ACCOUNT}:role/team/*"}),
        {},
        UNDETERMINED,
    ),
    "COND: nor does it for a Deny of others": (
        deny(ArnNotEquals={"aws:PrincipalArn": f"arn:aws:iam::{ACCOUNT}:role/team/Enclave"}),
        {},
        UNDETERMINED,
    ),
    "COND: a role tells it": (
        allow(ArnLike={"aws:PrincipalArn": f"arn:aws:iam::{ACCOUNT}:role/team/*"}),
        {"principal": ROLE},
        DENIED,
    ),
    "COND: and so does whoever asks": (
        allow(ArnLike={"aws:PrincipalArn": f"arn:aws:iam::{ACCOUNT}:role/team/*"}),
        {"keys": {"aws:PrincipalArn": f"arn:aws:iam::{ACCOUNT}:role/team/Enclave"}},
        ALLOWED,
    ),
    "COND: Null of something else": (allow(Null={PCR0: "maybe"}), {}, UNDETERMINED),
    "COND: a pattern that is no ARN": (allow(ArnLike={"aws:PrincipalArn": "*"}), {}, UNDETERMINED),
    "SETS: no such set operator": (allow(ForSome_StringEquals={PCR0: GOOD}), {}, UNDETERMINED),
    "COND: operators have no case": (allow(stringequals={PCR0: GOOD}), {}, ALLOWED),
    "COND: policy variables cannot be told": (
        allow(StringEquals={PCR0: "${aws:username}"}),
        {},
        UNDETERMINED,
    ),
    "an operator that does not exist never allows": (
        allow(StringEqual={PCR0: GOOD}),
        {},
        UNDETERMINED,
    ),
    "an operator that is not evaluated never allows": (
        allow(NumericLessThan={"aws:MultiFactorAuthAge": 9}),
        {},
        UNDETERMINED,
    ),
    "an unknown deny does not allow either": (deny(StringEqual={PCR0: GOOD}), {}, UNDETERMINED),
    "an unknown deny that fails otherwise is out": (
        deny(StringEqual={PCR0: GOOD}, StringEquals={PCR0: BAD}),
        {},
        ALLOWED,
    ),
    "unknown conditions without an allow are denied": (
        [statement({"StringEqual": {PCR0: GOOD}}, effect="Deny")],
        {},
        DENIED,
    ),
    "a key that the request does not tell": (
        allow(StringEquals={"aws:SourceVpc": "vpc-1"}),
        {},
        UNDETERMINED,
    ),
    "a key that the caller tells": (
        allow(StringEquals={"aws:SourceVpc": "vpc-1"}),
        {"keys": {"aws:sourceVPC": "vpc-1"}},
        ALLOWED,
    ),
    # -- sets
    "SETS: ForAllValues holds for an absent key": (
        allow(ForAllValues_StringEquals={PCR0: GOOD}),
        NO_DOCUMENT,
        ALLOWED,
    ),
    "SETS: ForAllValues of one value": (allow(ForAllValues_StringEquals={PCR0: BAD}), {}, DENIED),
    "SETS: ForAnyValue fails for an absent key": (
        allow(ForAnyValue_StringEquals={PCR0: GOOD}),
        NO_DOCUMENT,
        DENIED,
    ),
    "SETS: ForAnyValue, negated, fails for an absent key": (
        deny(ForAnyValue_StringNotEquals={PCR0: GOOD}),
        NO_DOCUMENT,
        ALLOWED,
    ),
    "SETS: ForAllValues wants a subset": (
        allow(ForAllValues_StringEquals={"kms:EncryptionContextKeys": ["app", "node", "env"]}),
        {"context": CONTEXT},
        ALLOWED,
    ),
    "SETS: ForAllValues refuses what is not listed": (
        allow(ForAllValues_StringEquals={"kms:EncryptionContextKeys": ["node"]}),
        {"context": CONTEXT},
        DENIED,
    ),
    "SETS: ForAnyValue wants an intersection": (
        allow(ForAnyValue_StringEquals={"kms:EncryptionContextKeys": ["node"]}),
        {"context": CONTEXT},
        ALLOWED,
    ),
    "SETS: several values under a plain operator": (
        allow(StringEquals={"kms:EncryptionContextKeys": ["node"]}),
        {"context": CONTEXT},
        UNDETERMINED,
    ),
    # -- other keys of KMS
    "KMS: encryption context": (
        allow(StringEquals={"kms:EncryptionContext:node": "3"}),
        {"context": CONTEXT},
        ALLOWED,
    ),
    "KMS: encryption context of another value": (
        allow(StringEquals={"kms:EncryptionContext:node": "4"}),
        {"context": CONTEXT},
        DENIED,
    ),
    "KMS: without encryption context": (
        allow(StringEquals={"kms:EncryptionContext:node": "3"}),
        {},
        DENIED,
    ),
    "KMS: names of a context have no case in a condition": (
        allow(StringEquals={"kms:EncryptionContext:NODE": "3"}),
        {"context": CONTEXT},
        ALLOWED,
    ),
    "KMS: an absent context is Null": (
        deny(Null={"kms:EncryptionContextKeys": "true"}),
        {},
        DENIED,
    ),
    "KMS: CallerAccount": (allow(StringEquals={"kms:CallerAccount": ACCOUNT}), {}, ALLOWED),
    "KMS: a direct call comes via no service": (
        allow(StringEquals={"kms:ViaService": "s3.eu-west-1.amazonaws.com"}),
        {},
        DENIED,
    ),
    "KMS: properties of the key are told by the caller": (
        allow(StringEquals={"kms:KeySpec": "SYMMETRIC_DEFAULT"}),
        {"keys": {"kms:KeySpec": "SYMMETRIC_DEFAULT"}},
        ALLOWED,
    ),
    "KMS: or not known": (
        allow(StringEquals={"kms:KeySpec": "SYMMETRIC_DEFAULT"}),
        {},
        UNDETERMINED,
    ),
}


@pytest.mark.parametrize("rule", CASES)
def test_decisions(rule: str) -> None:
    statements, members, expected = CASES[rule]
    found = decide(statements, request(**members))
    assert found.decision is expected, found.reason
    assert bool(found.undetermined) == (expected is UNDETERMINED)
    assert len(found.statements) == len(statements)


def test_findings_name_both_values() -> None:
    found = decide([statement({"StringEquals": {PCR0: BAD, PCR1: BAD}}, Sid="Enclave")], request())
    (finding,) = found.statements
    assert finding.statement.label == "statement 1 (Enclave)"
    assert finding.applies is False
    assert [condition.actual for condition in finding.conditions] == [(GOOD,), ()]
    assert [condition.condition.values for condition in finding.conditions] == [(BAD,), (BAD,)]
    assert finding.reasons == (
        f"StringEquals {PCR0} does not hold: {GOOD}, policy: {BAD}",
        f"StringEquals {PCR1} does not hold: absent, policy: {BAD}",
    )


def test_findings_name_what_else_differs() -> None:
    found = decide(
        [statement(Principal={"AWS": USER}, Action="kms:Encrypt", Resource=KEY[:-1])], request()
    )
    assert [reason.partition(" ")[0] for reason in found.statements[0].reasons] == [
        "principal",
        "action",
        "resource",
    ]


def test_only_identity_policies_are_missing_for_a_delegated_decision() -> None:
    root = statement(Principal={"AWS": ROOT})
    assert decide([root], request()).delegated
    unknown = statement({"StringEqual": {PCR0: GOOD}})
    assert not decide([root, unknown], request()).delegated
    assert not decide([unknown], request()).delegated
    assert not decide([OPEN], request()).delegated


@pytest.mark.parametrize(
    "principal",
    [
        "",
        "Enclave",
        "arn:aws:iam::1:role/R",
        "arn:aws:s3:::bucket",
        KEY,
        f"{ROLE}*",
        f"arn:aws:iam::{ACCOUNT}:role/",
        f"arn:aws:iam::{ACCOUNT}:group/g",
        f"arn:aws:iam::{ACCOUNT}:instance-profile/p",
    ],
)
def test_principals_that_are_none_are_refused(principal: str) -> None:
    with pytest.raises(PolicyError):
        decide([OPEN], request(principal=principal))


def test_a_resource_that_is_no_arn_is_refused() -> None:
    with pytest.raises(PolicyError, match="alias/x"):
        decide([OPEN], request(resource="alias/x"))


def test_patterns_are_matched_in_reasonable_time() -> None:
    pattern = "*a" * 2000 + "b"
    assert (
        decide(allow(StringLike={PCR0: pattern}), request(pcrs={0: b"\xaa" * 48})).decision
        is DENIED
    )
    long = {"context": {"x": "a" * 8000}}
    assert (
        decide(
            allow(StringLike={"kms:EncryptionContext:x": "*a" * 200 + "b"}), request(**long)
        ).decision
        is DENIED
    )


# ---- reading

BROKEN: Final[dict[str, str | bytes]] = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[]",
    "not UTF-8": b"\xff",
    "a number": "1",
    "nested": "[" * 100_000,
    "too long": " " * 131_073,
    "no statement": json.dumps({"Version": "2012-10-17"}),
    "no statements": json.dumps({"Statement": []}),
    "a statement of text": json.dumps({"Statement": ["Allow"]}),
    "another version": json.dumps({"Version": "2012-10-18", "Statement": [OPEN]}),
    "an unknown element": json.dumps({"Statement": [OPEN], "Statements": []}),
    "a repeated name": '{"Statement": [], "Statement": []}',
    "a number that is none": '{"Version": NaN, "Statement": []}',
    "another effect": json.dumps({"Statement": [OPEN | {"Effect": "allow"}]}),
    "no effect": json.dumps({"Statement": [statement(Effect=None)]}),
    "a misspelt member": json.dumps({"Statement": [OPEN | {"Conditions": {}}]}),
    "no principal": json.dumps({"Statement": [statement(Principal=None)]}),
    "both principals": json.dumps({"Statement": [statement(NotPrincipal="*")]}),
    "no action": json.dumps({"Statement": [statement(Action=None)]}),
    "empty actions": json.dumps({"Statement": [statement(Action=[])]}),
    "no resource": json.dumps({"Statement": [statement(Resource=None)]}),
    "an unknown kind of principal": json.dumps({"Statement": [statement(Principal={"GCP": "x"})]}),
    "an empty principal": json.dumps({"Statement": [statement(Principal={})]}),
    "a principal of text": json.dumps({"Statement": [statement(Principal=ROLE)]}),
    "a Sid of numbers": json.dumps({"Statement": [statement(Sid=1)]}),
    "a condition of text": json.dumps({"Statement": [statement(Condition="x")]}),
    "an operator of text": json.dumps({"Statement": [statement(Condition={"StringEquals": "x"})]}),
    "no values": json.dumps({"Statement": [statement(Condition={"StringEquals": {PCR0: []}})]}),
    "a value that is an object": json.dumps(
        {"Statement": [statement(Condition={"StringEquals": {PCR0: {}}})]}
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_policy_is_refused(name: str) -> None:
    with pytest.raises(PolicyError):
        Policy.parse(BROKEN[name])


def test_one_statement_needs_no_list() -> None:
    assert Policy.parse(json.dumps({"Statement": OPEN})).statements[0].number == 1
    assert Policy.parse(json.dumps({"Statement": OPEN}).encode()).version == "2008-10-17"


def test_booleans_and_numbers_are_their_text() -> None:
    (read,) = parse(statement({"Null": {"a": True}, "NumericEquals": {"b": [7, 1.5]}})).statements
    assert [condition.values for condition in read.conditions] == [("true",), ("7", "1.5")]


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(["*", "Allow", ROLE, PCR0]),
    lambda items: (
        st.lists(items, max_size=3)
        | st.dictionaries(
            st.sampled_from([*OPEN, "Condition", "NotAction", "Statement", "AWS", "Null", PCR0]),
            items,
        )
    ),
    max_leaves=10,
)


@given(
    st.text(max_size=50)
    | _JSON.map(json.dumps)
    | _JSON.map(lambda item: json.dumps({"Statement": item}))
)
def test_arbitrary_policies_raise_only_policy_errors(text: str) -> None:
    try:
        policy = Policy.parse(text)
    except PolicyError:
        return
    check(policy)
    evaluate(policy, request())


@given(
    st.dictionaries(
        st.sampled_from([*OPEN, "Sid", "NotPrincipal", "NotAction", "Condition"]), _JSON
    )
)
def test_arbitrary_statements_raise_only_policy_errors(members: Json) -> None:
    try:
        policy = parse(OPEN | members)
    except PolicyError:
        return
    check(policy)
    assert evaluate(policy, request()).decision in Decision


# ---- checking

ADMINISTRATION: Final = statement(
    Principal={"AWS": ADMIN}, Action=["kms:PutKeyPolicy", "kms:DescribeKey"]
)
ATTESTED: Final = statement({"StringEqualsIgnoreCase": {PCR0: GOOD}})
GUARD: Final = statement(
    {"StringNotEqualsIgnoreCase": {PCR0: GOOD}},
    effect="Deny",
    Principal="*",
    Action=["kms:Decrypt", "kms:DeriveSharedSecret", "kms:ReEncryptFrom"],
)


def codes(*statements: Json) -> list[str]:
    return [finding.code for finding in check(parse(ADMINISTRATION, *statements))]


def guard(**condition: Json) -> Json:
    """The Deny for everyone under other conditions."""
    return GUARD | {"Condition": {name.replace("_", ":"): keys for name, keys in condition.items()}}


def refuse(condition: Json | None = None, **members: Any) -> Json:
    """A Deny for everyone that nothing about a document limits."""
    return statement(condition, effect="Deny", **({"Principal": "*"} | members))


def attested_by(condition: Json) -> Json:
    """kms:PutKeyPolicy for the enclave's role under a condition."""
    return statement(condition, Action="kms:PutKeyPolicy")


def limited(operator: str, key: str, value: str) -> Json:
    """The attested Allow for everyone of whom a condition holds."""
    found = attested(**{operator: {key: value}})
    return found | {"Principal": "*"}


def attested(**condition: Any) -> Json:
    return statement({"StringEqualsIgnoreCase": {PCR0: GOOD}} | condition)


def by_arn(arn: str, pcr: str = "", **members: Any) -> Json:
    """An Allow for everyone, or who is named, whose aws:PrincipalArn is like this."""
    condition: Json = {"ArnLike": {"aws:PrincipalArn": arn}}
    if pcr:
        condition["StringEquals"] = {PCR0: pcr}
    return statement(condition, **({"Principal": "*"} | members))


def granting(operator: str, *operations: str, **members: Any) -> Json:
    """kms:CreateGrant for a user under a condition on the operations of the grant."""
    default: Json = {"Action": "kms:CreateGrant", "Principal": {"AWS": USER}}
    condition = {operator: {"kms:GrantOperations": list(operations)}}
    return statement(condition, **(default | members))


UNATTESTED: Final = ["unattested"]
NEVER: Final = ["never_allowed"]
RESOURCE: Final = ["resource"]
IMAGE_OPEN: Final = ["any_image"]
DENY_ALL: Final = statement(effect="Deny", Principal="*", Action="kms:*")
SESSION_AND_GRANT_KEYS: Final = (
    "kms:RetiringServicePrincipal kms:GranteeServicePrincipal kms:GrantConstraintSourceArn "
    "kms:TrailingDaysWithoutKeyUsage lambda:SourceFunctionArn ec2:SourceInstanceARN "
    "ec2:RoleDelivery glue:RoleAssumedBy glue:CredentialIssuingService ssm:SourceInstanceArn "
    "codebuild:BuildArn codebuild:ProjectArn identitystore:UserId saml:sub "
    "accounts.google.com:aud oidc.eks.eu-west-1.amazonaws.com/id/ABC:sub"
).split()

FINDINGS: Final[dict[str, tuple[list[Json], list[str]]]] = {
    "nothing is wrong": ([ATTESTED], []),
    "nothing is wrong with a guard": ([ATTESTED, GUARD], []),
    "ImageSha384 is as good": (
        [statement({"StringEquals": {f"{ATTESTATION}ImageSha384": GOOD}})],
        [],
    ),
    "an encryptor may encrypt": ([statement(Principal={"AWS": USER}, Action="kms:Encrypt")], []),
    "a misspelt PCR": ([attested(StringEquals={f"{ATTESTATION}PCRO": GOOD})], ["key"]),
    "a PCR out of range": ([attested(StringEquals={f"{ATTESTATION}PCR32": GOOD})], ["key"]),
    "a padded PCR": (
        [statement({"StringEquals": {f"{ATTESTATION}PCR00": GOOD}})],
        ["key", "unattested"],
    ),
    "a missing prefix": ([statement({"StringEquals": {"kms:PCR0": GOOD}})], ["key", "unattested"]),
    "a wrong prefix": ([attested(StringEquals={"aws:RecipientAttestation:PCR0": GOOD})], ["key"]),
    "an unnamed context": ([attested(StringEquals={"kms:EncryptionContext:": "x"})], ["key"]),
    "a misspelt key": ([attested(StringEquals={"kms:ViaServices": "x"})], ["key"]),
    "a known key": (
        [attested(StringEquals={"KMS:keyspec": "SYMMETRIC_DEFAULT", "aws:SourceVpc": "vpc-1"})],
        [],
    ),
    "a zero PCR": ([statement({"StringEquals": {PCR0: [GOOD, ZERO]}})], ["zero_pcr"]),
    "zeros spared by a guard": (
        [ATTESTED, GUARD | {"Condition": {"StringNotEquals": {PCR0: [GOOD, ZERO]}}}],
        ["zero_pcr"],
    ),
    "a pattern that zeros fit": ([statement({"StringLike": {PCR0: "*"}})], ["zero_pcr"]),
    "zeros denied": (
        [ATTESTED, statement({"StringEquals": {PCR0: ZERO}}, effect="Deny", Principal="*")],
        [],
    ),
    "a pattern": ([statement({"StringLike": {PCR0: "ab*"}})], ["pcr_pattern"]),
    "a pattern beside a certificate": (
        [statement({"StringLike": {PCR0: "*"}, "StringEquals": {PCR8: GOOD}})],
        [],
    ),
    "a pattern beside a kernel": (
        [statement({"StringLike": {PCR2: "ab*"}, "StringEquals": {PCR1: GOOD}})],
        ["pcr_pattern"],
    ),
    "zeros of the program's PCR beside a certificate": (
        [statement({"StringEquals": {f"{ATTESTATION}PCR16": ZERO, PCR8: GOOD}})],
        [],
    ),
    "zeros of the role's PCR beside a certificate": (
        [statement({"StringEquals": {PCR3: ZERO, PCR8: GOOD}})],
        [],
    ),
    "an image that is not signed": ([statement({"StringEquals": {PCR0: GOOD, PCR8: ZERO}})], []),
    "zeros that a guard keeps out": (
        [statement({"StringEquals": {PCR0: [GOOD, ZERO]}}), GUARD],
        [],
    ),
    "zeros of the program's PCR spared by a guard": (
        [ATTESTED, guard(StringNotEquals={f"{ATTESTATION}PCR16": ZERO})],
        [],
    ),
    "a short value": ([statement({"StringEquals": {PCR0: GOOD[:-1]}})], ["pcr_length"]),
    "SHA-256 is too short": ([statement({"StringEquals": {PCR0: "ab" * 32}})], ["pcr_length"]),
    "0x": ([statement({"StringEqualsIgnoreCase": {PCR0: "0X" + GOOD[2:]}})], ["pcr_prefix"]),
    "no hexadecimal": ([statement({"StringEquals": {PCR0: "g" + GOOD[1:]}})], ["pcr_hex"]),
    "upper case": ([statement({"StringEquals": {PCR0: GOOD.upper()}})], ["pcr_case"]),
    "upper case where it does not matter": (
        [statement({"StringEqualsIgnoreCase": {PCR0: GOOD.upper()}})],
        [],
    ),
    "an allow beside it": ([ATTESTED, statement(Principal={"AWS": USER})], ["unattested"]),
    "an allow of ReEncrypt*": ([ATTESTED, statement(Action="kms:ReEncrypt*")], ["unattested"]),
    "an allow beside it, guarded": ([ATTESTED, GUARD, statement(Principal={"AWS": USER})], []),
    # -- guards: any document will do, or one image is meant
    "an allow beside it, guarded by Null": (
        [ATTESTED, guard(Null={PCR0: "true"}), statement(Principal={"AWS": USER})],
        ["any_image"],
    ),
    "guarded by the parent's role alone": ([guard(StringNotEquals={PCR3: GOOD}), OPEN], IMAGE_OPEN),
    "guarded by the instance alone": ([guard(StringNotEquals={PCR4: GOOD}), OPEN], IMAGE_OPEN),
    "guarded by PCR1 alone": ([guard(StringNotEquals={PCR1: GOOD}), OPEN], IMAGE_OPEN),
    "guarded by PCR2 alone": ([guard(StringNotEquals={PCR2: GOOD}), OPEN], IMAGE_OPEN),
    "guarded by a program's PCR alone": (
        [guard(StringNotEquals={f"{ATTESTATION}PCR16": GOOD}), OPEN],
        IMAGE_OPEN,
    ),
    "guarded by what debug mode passes": (
        [guard(StringNotEquals={PCR0: [GOOD, ZERO]}), OPEN],
        ["zero_pcr", "any_image"],
    ),
    "guarded by IfExists of a foreign image": (
        [guard(StringEqualsIfExists={PCR0: BAD}), OPEN],
        IMAGE_OPEN,
    ),
    "guarded by PCR1 and PCR2, each in a statement": (
        [guard(StringNotEquals={PCR1: GOOD}), guard(StringNotEquals={PCR2: GOOD}), OPEN],
        [],
    ),
    "guarded by PCR8": ([guard(StringNotEquals={PCR8: GOOD}), OPEN], []),
    "guarded by ImageSha384": (
        [guard(StringNotEquals={f"{ATTESTATION}ImageSha384": GOOD}), OPEN],
        [],
    ),
    "guarded by Null and a PCR": (
        [guard(Null={PCR0: "true"}), guard(ForAnyValue_StringNotEquals={PCR0: GOOD}), OPEN],
        ["deny_hollow"],
    ),
    "guarded over TLS, which is all that KMS answers": (
        [guard(StringNotEquals={PCR0: GOOD}, Bool={"aws:SecureTransport": "true"}), OPEN],
        [],
    ),
    "an image by the Allow and the guard together": (
        [
            statement({"StringEquals": {PCR1: GOOD}}),
            guard(StringNotEquals={PCR2: GOOD}),
        ],
        [],
    ),
    "a role's Allow under a guard of the image": (
        [statement({"StringEquals": {PCR3: GOOD}}), GUARD],
        [],
    ),
    "a guard with a document only": (
        [guard(Null={PCR0: "false"}, StringNotEquals={PCR0: GOOD}), OPEN],
        ["unattested"],
    ),
    "a guard of another key": (
        [GUARD | {"Resource": KEY}, OPEN],
        ["unattested"],
    ),
    "a guard of all keys": ([GUARD | {"Resource": "arn:aws:kms:*:*:key/*"}, OPEN], []),
    "a guard of all keys in any partition": ([GUARD | {"Resource": "arn:*:key/*"}, OPEN], []),
    "a guard of all keys of China": (
        [GUARD | {"Resource": "arn:aws-cn:kms:*:*:key/*"}, OPEN],
        ["unattested", "partition"],
    ),
    "a guard of all keys in regions of nine letters": (
        [GUARD | {"Resource": f"arn:aws:kms:{'?' * 9}:*:key/*"}, OPEN],
        ["unattested"],
    ),
    "a guard of all keys but one": (
        [
            refuse({"StringNotEquals": {PCR0: GOOD}}, Resource=None, NotResource=KEY),
            OPEN,
        ],
        ["unattested"],
    ),
    "a guard of the account's keys": (
        [GUARD | {"Resource": f"arn:aws:kms:*:{ACCOUNT}:key/*"}, OPEN],
        ["unattested"],  # the key may be another account's
    ),
    "a guard of the key by its ARN, as the Allow": (
        [
            ADMINISTRATION | {"Resource": KEY},
            GUARD | {"Resource": KEY},
            OPEN | {"Resource": KEY},
        ],
        ["unattested"],  # the administrator's Allow in front names every key
    ),
    # -- Denys without a document in view
    "an unconditional Deny": ([OPEN, refuse()], []),
    "an unconditional Deny of the very role": ([OPEN, refuse(Principal={"AWS": ROLE})], []),
    "an unconditional Deny of its account": ([OPEN, refuse(Principal={"AWS": ROOT})], []),
    "an unconditional Deny of the role, a session allowed": (
        [statement(Principal={"AWS": SESSION}), refuse(Principal={"AWS": ROLE})],
        [],
    ),
    "an unconditional Deny of one session, the role allowed": (
        [OPEN, refuse(Principal={"AWS": SESSION})],
        ["unattested"],
    ),
    "an unconditional Deny of another role": (
        [OPEN, refuse(Principal={"AWS": ADMIN})],
        ["unattested"],
    ),
    "an unconditional Deny of all but others": (
        [OPEN, refuse(Principal=None, NotPrincipal={"AWS": USER})],
        ["not_principal"],
    ),
    "an unconditional Deny of all but the role": (
        [OPEN, refuse(Principal=None, NotPrincipal={"AWS": ROLE})],
        ["unattested", "not_principal"],
    ),
    "a Deny by aws:PrincipalArn": (
        [OPEN, refuse({"ArnLike": {"aws:PrincipalArn": ROLE}})],
        [],
    ),
    "a Deny by aws:PrincipalArn of others": (
        [OPEN, refuse({"ArnNotLike": {"aws:PrincipalArn": ROLE}})],
        ["unattested"],
    ),
    "a Deny under what the caller chooses": (
        [OPEN, refuse({"StringEquals": {"kms:EncryptionContext:a": "b"}})],
        ["unattested"],
    ),
    "a Deny with an operator that is not evaluated": (
        [OPEN, refuse({"NumericLessThan": {"aws:MultiFactorAuthAge": 9}})],
        ["unattested"],
    ),
    "a Deny of others than a path, a session of which is allowed": (
        [
            statement(Principal={"AWS": SESSION}),
            refuse(
                {"ArnNotLike": {"aws:PrincipalArn": f"arn:aws:iam::{ACCOUNT}:role/team/Enclave"}}
            ),
        ],
        ["unattested"],
    ),
    "everyone but one may decrypt": (
        [statement(Principal=None, NotPrincipal={"AWS": USER})],
        ["not_principal", "unattested"],
    ),
    "everyone but one may, and all are denied": (
        [statement(Principal=None, NotPrincipal={"AWS": USER}), refuse()],
        ["not_principal"],
    ),
    "ways around, denied": (
        [
            statement(Principal={"AWS": USER}, Action=["kms:CreateGrant", "kms:ReplicateKey"]),
            refuse(Action=["kms:CreateGrant", "kms:ReplicateKey"]),
        ],
        [],
    ),
    "a service that is denied": (
        [
            statement(Principal={"Service": "s3.amazonaws.com"}),
            refuse(Principal={"Service": "s3.amazonaws.com"}),
        ],
        [],
    ),
    "a service that is not": ([statement(Principal={"Service": "s3.amazonaws.com"})], UNATTESTED),
    "a condition that the principal cannot meet": (
        [statement({"StringEquals": {"aws:PrincipalAccount": "444455556666"}})],
        [],
    ),
    # -- the account's root
    "root with everything beside full guards": (
        [ATTESTED, GUARD, statement(Principal={"AWS": ROOT}, Action="kms:*")],
        ["root_everything"],
    ),
    "root with everything, everything of which is denied": (
        [ATTESTED, statement(Principal={"AWS": ROOT}, Action="kms:*"), DENY_ALL],
        ["never_allowed", "no_administrator"],
    ),
    "root and a role with everything": (
        [ATTESTED, statement(Principal={"AWS": [ROOT, USER]}, Action="kms:*")],
        ["root_everything", "unattested", "detour"],
    ),
    "root may rewrite the policy": (
        [ATTESTED, statement(Principal={"AWS": ROOT}, Action=["kms:Put*", "kms:Describe*"])],
        ["anyone_administers"],
    ),
    "root may rewrite the policy and grant": (
        [ATTESTED, statement(Principal={"AWS": ROOT}, Action=["kms:Put*", "kms:CreateGrant"])],
        ["detour", "anyone_administers"],
    ),
    "the account may with a second factor": (
        [
            ATTESTED,
            attested_by({"Bool": {"aws:MultiFactorAuthPresent": "true"}})
            | {"Principal": {"AWS": ACCOUNT}},
        ],
        ["anyone_administers"],
    ),
    "the account's administrator may": (
        [ATTESTED, by_arn(ADMIN, Action="kms:PutKeyPolicy", Principal={"AWS": ROOT})],
        [],
    ),
    "the account's administrators may, by a pattern": (
        [ATTESTED, by_arn(f"{ADMIN}*", Action="kms:PutKeyPolicy", Principal={"AWS": ROOT})],
        [],
    ),
    "all roles of the account may, by a pattern": (
        [
            ATTESTED,
            by_arn(
                f"arn:aws:iam::{ACCOUNT}:role/*", Action="kms:PutKeyPolicy", Principal={"AWS": ROOT}
            ),
        ],
        ["anyone_administers"],
    ),
    "the account's administrators may, by a tag": (
        [
            ATTESTED,
            attested_by({"StringEquals": {"aws:PrincipalTag/admin": "yes"}})
            | {"Principal": {"AWS": ROOT}},
        ],
        [],
    ),
    "the account's administrator may do everything": (
        [ATTESTED, GUARD, by_arn(ADMIN, Action="kms:*", Principal={"AWS": ROOT})],
        ["detour"],
    ),
    "everyone of the account may": (
        [
            limited("StringEquals", "kms:CallerAccount", ACCOUNT),
            attested_by({"StringEquals": {"kms:CallerAccount": ACCOUNT}}) | {"Principal": "*"},
        ],
        ["anyone_administers"],
    ),
    # -- what the parent instance may do beside
    "the parent may rewrite the policy": (
        [ATTESTED, statement(Action="kms:PutKeyPolicy")],
        ["parent_administers"],
    ),
    "by a pattern": ([ATTESTED, statement(Action="kms:Put*")], ["parent_administers"]),
    "by one session of it": (
        [ATTESTED, statement(Action="kms:PutKeyPolicy", Principal={"AWS": SESSION})],
        ["parent_administers"],
    ),
    "by its role, a session attested": (
        [ATTESTED | {"Principal": {"AWS": SESSION}}, statement(Action="kms:PutKeyPolicy")],
        ["parent_administers"],
    ),
    "by a list": (
        [ATTESTED, statement(Action="kms:PutKeyPolicy", Principal={"AWS": [USER, ROLE]})],
        ["parent_administers"],
    ),
    "by its ARN, attested and not": (
        [by_arn(ROLE, pcr=GOOD), by_arn(ROLE, Action="kms:PutKeyPolicy")],
        ["parent_administers"],
    ),
    "by its ARN, attested as one of everyone": (
        [by_arn(ROLE, pcr=GOOD), statement(Action="kms:PutKeyPolicy")],
        ["parent_administers"],
    ),
    "by its ARN, attested as one of the account": (
        [by_arn(ROLE, pcr=GOOD, Principal={"AWS": ACCOUNT}), statement(Action="kms:PutKeyPolicy")],
        ["parent_administers"],
    ),
    "by a pattern of its ARN, which leaves it to the account": (
        [ATTESTED, by_arn(f"{ROLE[:-3]}*", Action="kms:PutKeyPolicy", Principal={"AWS": ROOT})],
        ["parent_administers"],
    ),
    "attested by a pattern of its ARN": (
        [by_arn(f"{ROLE[:-3]}*", pcr=GOOD), statement(Action="kms:PutKeyPolicy")],
        ["parent_administers"],
    ),
    "by the pattern that it is attested by": (
        [
            by_arn(f"{ROLE[:-3]}*", pcr=GOOD),
            by_arn(f"{ROLE[:-3]}*", Action="kms:PutKeyPolicy"),
        ],
        ["parent_administers"],
    ),
    "by the id that it is attested by": (
        [
            limited("StringLike", "aws:userId", "AROAEXAMPLEEXAMPLEXX:*"),
            attested_by({"StringLike": {"aws:userid": "AROAEXAMPLEEXAMPLEXX:i-01*"}})
            | {"Principal": "*"},
        ],
        ["parent_administers"],
    ),
    "another id than it is attested by": (
        [
            limited("StringLike", "aws:userId", "AROAEXAMPLEEXAMPLEXX:*"),
            attested_by({"StringLike": {"aws:userId": "AROAEXAMPLEEXAMPLEYY:*"}})
            | {"Principal": "*"},
        ],
        [],
    ),
    "by any name of a user": (
        [
            limited("StringEquals", "kms:CallerAccount", ACCOUNT),
            attested_by({"StringLike": {"aws:username": "*"}}) | {"Principal": {"AWS": ROOT}},
        ],
        ["anyone_administers"],
    ),
    "by its ARN, but denied it": (
        [
            by_arn(ROLE, pcr=GOOD),
            statement(Action="kms:PutKeyPolicy", Principal={"AWS": [ROLE, USER]}),
            refuse({"ArnEquals": {"aws:PrincipalArn": ROLE}}, Action="kms:Put*"),
        ],
        [],
    ),
    "the parent, by its ARN, may encrypt": (
        [by_arn(ROLE, pcr=GOOD), statement(Action="kms:Encrypt")],
        ["parent_encrypts"],
    ),
    "another account's role by its ARN, of this account": (
        [by_arn(OTHER, Principal={"AWS": ROOT})],
        [],
    ),
    "as one of everyone": (
        [ATTESTED, statement(Action="kms:PutKeyPolicy", Principal="*")],
        ["wildcard_principal", "parent_administers"],
    ),
    "as one that NotPrincipal does not list": (
        [
            ATTESTED,
            statement(Action="kms:PutKeyPolicy", Principal=None, NotPrincipal={"AWS": USER}),
        ],
        ["not_principal", "parent_administers"],
    ),
    "by NotAction": (
        [ATTESTED, statement(Action=None, NotAction=["kms:De*", "kms:Re*", "kms:*e*Key*Mat*"])],
        ["not_action", "detour", "parent_administers"],
    ),
    "under a condition that it may meet": (
        [ATTESTED, attested_by({"Bool": {"aws:MultiFactorAuthPresent": "true"}})],
        ["parent_administers"],
    ),
    "under a document, which PutKeyPolicy does not carry": (
        [ATTESTED | {"Action": ["kms:Decrypt", "kms:PutKeyPolicy"]}],
        ["never_attested"],
    ),
    "with everything, beside guards": (
        [GUARD, statement(Action="kms:*")],
        ["detour", "parent_administers"],
    ),
    "and is denied it": (
        [
            ATTESTED,
            statement(Action="kms:Put*"),
            refuse(Action="kms:Put*", Principal={"AWS": ROLE}),
        ],
        [],
    ),
    "an administrator beside guards is no parent": (
        [ATTESTED, GUARD, statement(Principal={"AWS": ADMIN}, Action=["kms:Dec*", "kms:Put*"])],
        [],
    ),
    "the parent may encrypt": ([ATTESTED, statement(Action="kms:Encrypt")], ["parent_encrypts"]),
    "the parent may make data keys": (
        [ATTESTED, statement(Action="kms:GenerateDataKey*")],
        ["parent_encrypts"],
    ),
    "the parent may re-encrypt to the key": (
        [ATTESTED, statement(Action="kms:ReEncryptTo")],
        ["parent_encrypts"],
    ),
    "the parent may grant": ([ATTESTED, statement(Action="kms:CreateGrant")], ["detour"]),
    # -- what never applies
    "a guard of another image": ([ATTESTED, guard(StringNotEquals={PCR0: BAD})], NEVER),
    "a guard of another image, and an Allow without a document": (
        [OPEN, GUARD, guard(StringNotEquals={PCR0: BAD})],
        NEVER,
    ),
    "a guard of another image beside one of both": (
        [ATTESTED, guard(StringNotEquals={PCR0: BAD}), attested() | {"Action": "kms:Encrypt"}],
        ["never_allowed", "never_attested"],
    ),
    "a guard of either image": ([ATTESTED, guard(StringNotEquals={PCR0: [GOOD, BAD]})], []),
    "a guard in upper case": (
        [ATTESTED, guard(StringNotEqualsIgnoreCase={PCR0: GOOD.upper()})],
        [],
    ),
    "a guard of a certificate, and a revoked image": (
        [
            statement({"StringEquals": {PCR8: GOOD}}),
            refuse({"StringEquals": {PCR0: [BAD, ZERO]}}),
        ],
        [],
    ),
    "the only image is revoked": ([ATTESTED, refuse({"StringEquals": {PCR0: GOOD}})], NEVER),
    "a document without a PCR of the program": (
        [ATTESTED, refuse({"Null": {f"{ATTESTATION}PCR16": "false"}})],
        [],
    ),
    "an attested action that is denied": ([ATTESTED, refuse()], NEVER),
    "an attested action that is denied to the role": (
        [ATTESTED, refuse(Principal={"AWS": ROLE})],
        NEVER,
    ),
    "an attested action that is denied to one of two": (
        [ATTESTED | {"Principal": {"AWS": [ROLE, USER]}}, refuse(Principal={"AWS": ROLE})],
        [],
    ),
    "one of the attested actions is denied": (
        [ATTESTED | {"Action": ["kms:Decrypt", "kms:GenerateDataKey"]}, refuse()],
        NEVER,
    ),
    "one of a pattern's actions is denied": (
        [ATTESTED | {"Action": "kms:GenerateDataKey*"}, refuse(Action="kms:GenerateDataKeyPair")],
        [],
    ),
    "two values of one PCR at once": (
        [statement({"StringEquals": {PCR0: GOOD}, "StringLike": {PCR0: BAD}})],
        NEVER,
    ),
    "PCR0 and ImageSha384 differ": (
        [statement({"StringEquals": {PCR0: GOOD, f"{ATTESTATION}ImageSha384": BAD}})],
        NEVER,
    ),
    "debug mode with a certificate": (
        [statement({"StringEquals": {PCR0: ZERO, PCR8: GOOD}})],
        NEVER,
    ),
    "a guard with a pattern, which is not decided": (
        [ATTESTED, guard(StringNotLike={PCR0: "cd*"})],
        ["pcr_pattern"],
    ),
    "a guard over no TLS": (
        [statement({"StringEquals": {PCR0: GOOD}, "Bool": {"aws:SecureTransport": "false"}})],
        NEVER,
    ),
    "an alias as Resource": ([ATTESTED | {"Resource": KEY.replace(":key/", ":alias/")}], RESOURCE),
    "aliases as Resource": ([ATTESTED | {"Resource": "arn:aws:kms:*:*:alias/*"}], RESOURCE),
    "nothing as Resource": ([ATTESTED | {"Resource": ""}], RESOURCE),
    "a key's id as Resource": ([ATTESTED | {"Resource": KEY.partition("/")[2]}], RESOURCE),
    "another service's Resource": ([ATTESTED | {"Resource": "arn:aws:s3:::bucket/*"}], RESOURCE),
    "a guard of an alias": ([ATTESTED, GUARD | {"Resource": "arn:aws:kms:*:*:alias/*"}], RESOURCE),
    "an alias beside the key": (
        [ATTESTED | {"Resource": [KEY, KEY.replace(":key/", ":alias/")]}],
        [],
    ),
    "all keys as Resource": ([ATTESTED | {"Resource": "arn:aws:kms:*:*:key/*"}], []),
    "nobody as principal": ([ATTESTED | {"Principal": {"AWS": ""}}], ["principal"]),
    "a group as principal": (
        [ATTESTED | {"Principal": {"AWS": f"arn:aws:iam::{ACCOUNT}:group/g"}}],
        ["principal"],
    ),
    "an instance profile as principal": (
        [ATTESTED | {"Principal": {"AWS": f"arn:aws:iam::{ACCOUNT}:instance-profile/Enclave"}}],
        ["principal"],
    ),
    "a misspelt action": ([ATTESTED | {"Action": "kms:Dcrypt"}], ["action"]),
    "a misspelt pattern": ([ATTESTED | {"Action": ["kms:Decrypt", "kms:Dcr*"]}], ["action"]),
    "an action of another service": ([ATTESTED, statement(Action="s3:*")], ["action"]),
    # -- who or what never attests
    "an attested service": (
        [ATTESTED, ATTESTED | {"Principal": {"Service": "rds.amazonaws.com"}}],
        ["service_principal"],
    ),
    "an attested service beside a role": (
        [ATTESTED | {"Principal": {"AWS": ROLE, "Service": "rds.amazonaws.com"}}],
        ["service_principal"],
    ),
    "an attested federated user": (
        [ATTESTED | {"Principal": {"Federated": "accounts.google.com"}}],
        ["service_principal"],
    ),
    "a NitroTPM": (
        [statement({"StringEquals": {f"{ATTESTATION}NitroTPMPCR7": GOOD}})],
        [],
    ),
    "a NitroTPM by a guard": (
        [refuse({"StringNotEquals": {f"{ATTESTATION}NitroTPMPCR4": GOOD}}), OPEN],
        ["any_machine_image"],
    ),
    "a NitroTPM's IfExists": (
        [statement({"StringEqualsIfExists": {f"{ATTESTATION}NitroTPMPCR7": GOOD}})],
        ["vacuous"],
    ),
    # -- what is right
    "a value in upper case beside the right one": (
        [statement({"StringEquals": {PCR0: [GOOD.upper(), GOOD]}})],
        [],
    ),
    "a value with 0x beside the right one": (
        [statement({"StringEquals": {PCR0: [f"0x{GOOD}", GOOD]}})],
        [],
    ),
    "a value in base64 beside the right one": (
        [statement({"StringEquals": {PCR0: [base64.b64encode(b"\xab" * 48).decode(), GOOD]}})],
        [],
    ),
    "a value in upper case beside another one": (
        [statement({"StringEquals": {PCR0: [GOOD.upper(), BAD]}})],
        ["pcr_case"],
    ),
    "ForAllValues with Null": (
        [statement({"ForAllValues:StringEquals": {PCR0: GOOD}, "Null": {PCR0: "false"}})],
        [],
    ),
    "IfExists with Null": (
        [statement({"StringEqualsIfExists": {PCR0: GOOD}, "Null": {PCR0: "false"}})],
        [],
    ),
    "a negated operator with Null": (
        [statement({"StringNotEquals": {PCR0: BAD}, "Null": {PCR0: "false"}})],
        ["any_image"],
    ),
    "everyone of the account": ([limited("StringEquals", "kms:CallerAccount", ACCOUNT)], []),
    "everyone of the organization": ([limited("StringEquals", "aws:PrincipalOrgID", "o-1")], []),
    "everyone of a path in the account": (
        [limited("ArnLike", "aws:PrincipalArn", f"arn:aws:iam::{ACCOUNT}:role/enclaves/*")],
        [],
    ),
    "everyone of a path in any account": (
        [limited("ArnLike", "aws:PrincipalArn", "arn:aws:iam::*:role/enclaves/*")],
        ["wildcard_principal"],
    ),
    "everyone of a unit of the organization": (
        [limited("ForAnyValue:StringLike", "aws:PrincipalOrgPaths", "o-a1b2/r-ab12/ou-ab12-1/*")],
        [],
    ),
    "everyone of a unit of any organization": (
        [limited("ForAnyValue:StringLike", "aws:PrincipalOrgPaths", "o-*/ou-ab12-1/*")],
        ["wildcard_principal"],
    ),
    "everyone with a session of a role": (
        [limited("StringLike", "aws:userId", "AROAEXAMPLEEXAMPLEXX:*")],
        [],
    ),
    "everyone with a session of any role": (
        [limited("StringLike", "aws:userId", "AROA*:*")],
        ["wildcard_principal"],
    ),
    "everyone on an instance of the account": (
        [limited("ArnLike", "ec2:SourceInstanceARN", f"arn:aws:ec2:*:{ACCOUNT}:instance/*")],
        [],
    ),
    "everyone but an account": (
        [limited("StringNotEquals", "kms:CallerAccount", ACCOUNT)],
        ["wildcard_principal"],
    ),
    "everyone whose account is not told": (
        [limited("StringEqualsIfExists", "kms:CallerAccount", ACCOUNT)],
        ["wildcard_principal"],
    ),
    "ImageSha384 and PCR0 are one PCR": (
        [
            ATTESTED,
            guard(StringNotEquals={PCR0: GOOD, f"{ATTESTATION}ImageSha384": GOOD}),
        ],
        [],
    ),
    "a Deny of everything for one role": (
        [ATTESTED, refuse({"StringNotEquals": {PCR0: GOOD}}, Principal={"AWS": ROLE}, Action="*")],
        [],
    ),
    "keys of grants, of services and of identity providers": (
        [
            attested(StringEquals=dict.fromkeys(SESSION_AND_GRANT_KEYS, "x")),
        ],
        [],
    ),
    "a key of another service that no session has": (
        [attested(StringEquals={"s3:prefix": "x"})],
        ["key"],
    ),
    "two partitions": (
        [
            ATTESTED,
            statement(Principal={"AWS": OTHER.replace(":aws:", ":aws-cn:")}, Action="kms:Encrypt"),
        ],
        ["partition"],
    ),
    "a guard under another condition does not guard": (
        [
            GUARD
            | {
                "Condition": GUARD["Condition"] | {"StringEquals": {"kms:EncryptionContext:a": "b"}}
            },
            OPEN,
        ],
        ["unattested"],
    ),
    "a guard of one principal does not guard": (
        [GUARD | {"Principal": {"AWS": USER}}, OPEN],
        ["unattested"],
    ),
    "a grant that gives no plaintext": (
        [ATTESTED, granting("ForAllValues:StringEquals", "Encrypt", "DescribeKey")],
        [],
    ),
    "a grant that may give a plaintext": (
        [ATTESTED, granting("ForAllValues:StringEquals", "Encrypt", "Decrypt")],
        ["detour"],
    ),
    "a grant that gives no plaintext alone": (
        [ATTESTED, granting("ForAnyValue:StringEquals", "Encrypt")],
        ["detour"],
    ),
    "a grant of whatever is not named": (
        [ATTESTED, granting("ForAllValues:StringNotEquals", "Decrypt")],
        ["detour"],
    ),
    "a grant of whatever is not named, no plaintext": (
        [
            ATTESTED,
            granting(
                "ForAllValues:StringNotEquals", "Decrypt", "DeriveSharedSecret", "ReEncryptFrom"
            ),
        ],
        [],
    ),
    "grants of plaintexts are denied": (
        [
            ATTESTED,
            statement(Action="kms:CreateGrant", Principal={"AWS": USER}),
            granting(
                "ForAnyValue:StringEquals",
                "Decrypt",
                "DeriveSharedSecret",
                "ReEncryptFrom",
                effect="Deny",
                Principal="*",
            ),
        ],
        [],
    ),
    "grants of plaintexts alone are denied": (
        [
            ATTESTED,
            statement(Action="kms:CreateGrant", Principal={"AWS": USER}),
            granting(
                "ForAllValues:StringEquals",
                "Decrypt",
                "DeriveSharedSecret",
                "ReEncryptFrom",
                effect="Deny",
                Principal="*",
            ),
        ],
        ["detour"],
    ),
    "ways around": (
        [statement(Action=["kms:CreateGrant", "kms:ReplicateKey", "kms:ImportKeyMaterial"])],
        ["detour"],
    ),
    "root with everything": (
        [ATTESTED, statement(Principal={"AWS": ROOT}, Action="kms:*")],
        ["root_everything"],
    ),
    "the account with everything": (
        [statement(Principal={"AWS": ACCOUNT}, Action="*")],
        ["root_everything"],
    ),
    "root that may decrypt": ([statement(Principal={"AWS": ROOT})], ["unattested"]),
    "IfExists": ([statement({"StringEqualsIfExists": {PCR0: GOOD}})], ["vacuous"]),
    "ForAllValues": ([statement({"ForAllValues:StringEquals": {PCR0: GOOD}})], ["vacuous"]),
    "a negated operator": ([statement({"StringNotEquals": {PCR0: BAD}})], ["vacuous"]),
    "Null true": ([statement({"Null": {PCR0: "true"}})], ["vacuous"]),
    "a negated operator beside a good one": ([attested(StringNotEquals={PCR1: BAD})], []),
    "several keys in one negated deny": (
        [ATTESTED, GUARD | {"Condition": {"StringNotEquals": {PCR0: GOOD, PCR1: GOOD}}}],
        ["deny_and"],
    ),
    "several operators in one negated deny": (
        [
            ATTESTED,
            GUARD | {"Condition": {"StringNotEquals": {PCR0: GOOD}, "StringNotLike": {PCR1: GOOD}}},
        ],
        ["deny_and"],
    ),
    "a deny that needs a document": (
        [ATTESTED, GUARD | {"Condition": {"ForAnyValue:StringNotEquals": {PCR0: GOOD}}}],
        ["deny_hollow"],
    ),
    "a deny of everything": (
        [ATTESTED, GUARD | {"Action": "kms:*"}],
        ["deny_everything", "deny_everything"],
    ),
    "attestation by a service": (
        [attested(StringEquals={"kms:ViaService": "s3.eu-west-1.amazonaws.com"})],
        ["via_service"],
    ),
    "NotAction": (
        [statement(Action=None, NotAction="kms:Decrypt")],
        ["not_action", "unattested", "detour"],
    ),
    "NotResource": (
        [statement({"StringEquals": {PCR0: GOOD}}, Resource=None, NotResource=KEY)],
        ["not_resource"],
    ),
    "NotPrincipal": (
        [ATTESTED, statement(effect="Deny", Principal=None, NotPrincipal={"AWS": ROLE})],
        ["not_principal"],
    ),
    "everyone": (
        [statement({"StringEquals": {PCR0: GOOD}}, Principal="*")],
        ["wildcard_principal"],
    ),
    "everyone in AWS": (
        [statement({"StringEquals": {PCR0: GOOD}}, Principal={"AWS": "*"})],
        ["wildcard_principal"],
    ),
    "a part of a name": (
        [statement({"StringEquals": {PCR0: GOOD}}, Principal={"AWS": ROLE + "*"})],
        ["principal"],
    ),
    "a deleted role": (
        [statement({"StringEquals": {PCR0: GOOD}}, Principal={"AWS": "AROAEXAMPLEEXAMPLE123"})],
        ["principal"],
    ),
    "encryption under attestation": (
        [ATTESTED | {"Action": ["kms:Decrypt", "kms:Encrypt"]}],
        ["never_attested"],
    ),
    "everything under attestation": ([ATTESTED | {"Action": "kms:*"}], ["never_attested"]),
    "description under attestation": (
        [ATTESTED | {"Action": ["kms:Decrypt", "kms:DescribeKey"]}],
        ["never_attested"],
    ),
    "all that takes a document": (
        [ATTESTED | {"Action": [*RECIPIENT_ACTIONS, "kms:GenerateDataKey*"]}],
        [],
    ),
    "no such operator": ([attested(StringEqual={"kms:KeySpec": "x"})], ["operator"]),
    "no operator of strings": ([attested(ArnEquals={PCR0: GOOD})], ["operator"]),
    "any image of a role": (
        [statement({"StringEquals": {f"{ATTESTATION}PCR3": GOOD}})],
        ["any_image"],
    ),
    "any image at all": ([statement({"Null": {PCR0: "false"}})], ["any_image"]),
    "any application": ([statement({"StringEquals": {PCR1: GOOD}})], ["any_image"]),
    "any kernel": ([statement({"StringEquals": {PCR2: GOOD}})], ["any_image"]),
    "kernel and application": ([statement({"StringEquals": {PCR1: GOOD, PCR2: GOOD}})], []),
}


# ---- check and evaluate decide alike

_VALUES = st.sampled_from([GOOD, BAD, ZERO])
_CONDITION = st.tuples(
    st.sampled_from(
        "StringEquals StringNotEquals StringEqualsIfExists StringNotEqualsIfExists StringLike "
        "ForAllValues:StringEquals ForAnyValue:StringNotEquals Null ArnLike".split()
    ),
    st.sampled_from([PCR0, PCR1, PCR2, PCR3, PCR8, "aws:PrincipalArn", "kms:CallerAccount"]),
    st.lists(
        _VALUES | st.sampled_from(["true", "false", ROLE, ACCOUNT, "*"]), min_size=1, max_size=2
    ),
).map(lambda part: {part[0]: {part[1]: part[2]}})
_STATEMENT = st.fixed_dictionaries(
    {
        "Effect": st.sampled_from(["Allow", "Deny", "Deny"]),
        "Principal": st.sampled_from(
            ["*", {"AWS": ROLE}, {"AWS": USER}, {"AWS": [ROLE, ADMIN]}, {"AWS": SESSION}]
        ),
        "Action": st.sampled_from(
            ["kms:Decrypt", "kms:*", ["kms:CreateGrant", "kms:PutKeyPolicy"], "kms:Put*"]
        ),
        "Resource": st.just("*"),
        "Condition": st.just({})
        | _CONDITION
        | st.tuples(_CONDITION, _CONDITION).map(lambda pair: pair[0] | pair[1]),
    }
)
OPEN_CODES: Final = set(
    "unattested vacuous any_image detour root_everything zero_pcr pcr_pattern".split()
)
FOREIGN: Final = b"\x01" * 48
DOCUMENTS: Final = (
    None,
    {0: FOREIGN, 1: FOREIGN, 2: FOREIGN, 3: bytes.fromhex(GOOD), 4: FOREIGN, 8: FOREIGN},
    {0: FOREIGN, 1: bytes.fromhex(GOOD), 2: FOREIGN, 3: bytes.fromhex(GOOD), 8: FOREIGN},
    {0: FOREIGN, 1: FOREIGN, 2: bytes.fromhex(GOOD), 3: bytes.fromhex(BAD), 8: FOREIGN},
    {0: bytes(48), 1: bytes(48), 2: bytes(48), 3: bytes.fromhex(GOOD), 8: bytes(48)},
)


@settings(max_examples=200, deadline=None)
@given(st.lists(_STATEMENT, min_size=1, max_size=4))
def test_what_is_found_without_fault_lets_no_other_image_in(statements: list[Json]) -> None:
    policy = parse(*statements)
    if not {finding.code for finding in check(policy)} & OPEN_CODES:
        for principal in (ROLE, SESSION, USER, ADMIN):
            for pcrs in DOCUMENTS:
                asked = request(principal=principal, pcrs=pcrs)
                assert evaluate(policy, asked).decision is not ALLOWED, (principal, pcrs)
            for action in ("kms:CreateGrant", "kms:ReEncryptFrom", "kms:ImportKeyMaterial"):
                asked = request(principal=principal, pcrs=None, action=action)
                assert evaluate(policy, asked).decision is not ALLOWED, (principal, action)


def test_an_action_that_aws_may_have_added_is_no_fault() -> None:
    (found,) = check(parse(ADMINISTRATION, ATTESTED, statement(Action="kms:Entangle")))
    assert (found.code, found.warning) == ("action", True)
    (found,) = check(parse(ADMINISTRATION, ATTESTED | {"Action": ["kms:Decrypt", "kms:Dcrypt"]}))
    assert (found.code, found.warning) == ("action", False)


@settings(max_examples=200, deadline=None)
@given(st.lists(_STATEMENT, min_size=1, max_size=4))
def test_what_is_denied_to_everybody_is_not_found_open(statements: list[Json]) -> None:
    """Of principals that are named: of everyone, some may not be known."""
    policy = parse(*(part for part in statements if part["Principal"] != "*"), DENY_ALL)
    found = {finding.code for finding in check(policy)} - {"zero_pcr", "pcr_pattern"}
    assert not found & {*OPEN_CODES, "parent_administers"}
    named = (part for part in statements if part["Principal"] != "*")
    policy = parse(ADMINISTRATION, *named)
    decisions = {
        evaluate(policy, request(principal=principal, pcrs=pcrs)).decision
        for principal in (ROLE, SESSION, USER, ADMIN)
        for pcrs in DOCUMENTS[:1]
    }
    if decisions == {DENIED}:
        problems = [part.problem for part in check(policy) if part.code == "unattested"]
        assert not any("kms:Decrypt" in problem for problem in problems)


_PCRS = st.fixed_dictionaries(
    {
        index: st.sampled_from([bytes.fromhex(GOOD), bytes.fromhex(BAD), FOREIGN])
        for index in (0, 1, 2)
    }
    | {index: st.sampled_from([bytes.fromhex(GOOD), bytes(48)]) for index in (3, 8)}
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_STATEMENT, min_size=1, max_size=3), st.lists(_PCRS, min_size=8, max_size=8))
def test_what_is_never_allowed_is_never_allowed(
    statements: list[Json], documents: list[dict[int, bytes]]
) -> None:
    policy = parse(*statements)
    for found in check(policy):
        if found.code == "never_allowed" and "kms:Decrypt" in found.problem:
            others = (part for part in policy.statements if part.effect == "Deny")
            never = (part for part in policy.statements if part.label == found.statement)
            alone = replace(policy, statements=(*never, *others))
            for pcrs in (*documents, *DOCUMENTS):
                for principal in (ROLE, SESSION, USER, ADMIN):
                    asked = request(principal=principal, pcrs=pcrs)
                    assert evaluate(alone, asked).decision is not ALLOWED, (principal, pcrs)


@pytest.mark.parametrize(
    "kind",
    ["everyone", "roles", "Denys by role", "Denys by condition", "by patterns", "no actions"],
)
def test_a_large_policy_is_checked_in_time(kind: str) -> None:
    """As many statements as there is room for; quadratic work took eleven seconds."""

    def role(number: int) -> Json:
        return {"AWS": f"arn:aws:iam::{ACCOUNT}:role/{number}"}

    def one(number: int) -> Json:
        if kind == "everyone":
            return statement(Principal="*", Action="*")
        if kind == "by patterns":
            return by_arn(f"{ROLE}{number}*", pcr=str(number), Action="*")
        if kind == "no actions":
            return statement(Action=f"kms:{number}")
        if kind == "roles" or number % 2:
            return statement(Principal=role(number), Action="*")
        if kind == "Denys by role":
            return refuse(Principal=role(number + 1))
        arn = {"ArnLike": {"aws:PrincipalArn": role(number + 1)["AWS"]}}
        return refuse(arn)

    sizes = {"everyone": 2060, "roles": 1000, "Denys by role": 1000, "Denys by condition": 240}
    sizes |= {"by patterns": 120, "no actions": 1000}
    text = json.dumps(
        {"Statement": [one(number) for number in range(sizes[kind])]}, separators=(",", ":")
    )
    policy = Policy.parse(text)
    begin = time.process_time()
    assert check(policy)
    assert time.process_time() - begin < 2  # a fifth of it on a machine that is not busy


@pytest.mark.parametrize(
    "key", ["pcr" * 30_000, "kms:" + "a" * 90_000, "a." * 45_000 + ":b", "kms:x" * 20_000]
)
def test_a_long_condition_key_is_checked_in_time(key: str) -> None:
    policy = parse(statement({"StringEquals": {key: "x"}}))
    begin = time.process_time()
    assert check(policy)
    assert time.process_time() - begin < 1


@pytest.mark.parametrize("name", FINDINGS)
def test_check_finds(name: str) -> None:
    statements, expected = FINDINGS[name]
    assert codes(*statements) == expected


def test_a_policy_without_administrator_is_found() -> None:
    (finding,) = check(parse(ATTESTED))
    assert (finding.statement, finding.code) == ("policy", "no_administrator")


def test_findings_say_where_what_and_how_to_mend_it() -> None:
    (finding,) = check(
        parse(
            ADMINISTRATION,
            statement({"StringEquals": {f"{ATTESTATION}PCRO": GOOD, PCR0: GOOD}}, Sid="E"),
        )
    )
    assert finding.statement == "statement 2 (E)"
    assert "PCRO" in finding.problem
    assert finding.fix.startswith("did you mean kms:")


@pytest.mark.parametrize(
    ("key", "guess"),
    [
        ("kms:RecipientAttestation:PCR00", PCR0),
        ("kms:RecipientAttestation:PCR_8", f"{ATTESTATION}PCR8"),
        ("kms:Recipient:PCR3", f"{ATTESTATION}PCR3"),
        ("kms:RecipientAttestation:ImageSha256", f"{ATTESTATION}ImageSha384"),
        ("kms:ViaServices", "kms:ViaService"),
    ],
)
def test_misspelt_keys_are_recognised(key: str, guess: str) -> None:
    (finding,) = check(parse(ADMINISTRATION, attested(StringEquals={key: "x"})))
    assert finding.fix == f"did you mean {guess}?"


@pytest.mark.parametrize("number", ["32", "100", "9" * 30])
def test_a_pcr_that_there_is_not_is_not_guessed(number: str) -> None:
    assert closest_key(f"{ATTESTATION}PCR{number}") is None


# ---- actions


def test_every_operation_of_kms_is_known() -> None:
    operations = set(Loader().load_service_model("kms", "service-2")["operations"])
    named = {action.removeprefix("kms:") for action in ACTIONS}
    assert operations - named == {"ReEncrypt"}  # which asks for two actions
    assert named - operations == {"ReEncryptFrom", "ReEncryptTo", "SynchronizeMultiRegionKey"}


# ---- measuring


def test_pcr3_is_the_documented_example() -> None:
    value = pcr_of_role("arn:aws:iam::123456789012:role/Webserver").hex()
    assert value.startswith("78fce75d")
    assert value.endswith("21e6")


def test_pcr3_covers_path_and_partition() -> None:
    arns = [ROLE, ROLE.replace("role/", "role/team/"), ROLE.replace("arn:aws:", "arn:aws-cn:")]
    assert len({pcr_of_role(arn) for arn in arns}) == 3


def test_pcr8_is_of_the_certificate() -> None:
    assert (
        pcr_of_certificate(b"der")
        == hashlib.sha384(bytes(48) + hashlib.sha384(b"der").digest()).digest()
    )


@pytest.mark.parametrize(
    "arn", ["", "Enclave", SESSION, USER, ROOT, f"{ROLE}*", "arn:aws:iam::1:role/x"]
)
def test_what_is_no_role_has_no_pcr3(arn: str) -> None:
    with pytest.raises(PolicyError, match="role"):
        pcr_of_role(arn)


@pytest.mark.parametrize(
    "instance",
    ["", "i-", "i-0123", "I-0123456789abcdef0", "i-0123456789abcdef0-enc0", "i-0123456g"],
)
def test_what_is_no_instance_has_no_pcr4(instance: str) -> None:
    with pytest.raises(PolicyError, match="instance"):
        pcr_of_instance(instance)


BUILT: Final = {
    "Measurements": {
        "HashAlgorithm": "Sha384 { ... }",
        "PCR0": GOOD,
        "PCR1": BAD,
        "PCR2": GOOD.upper(),
    }
}
RUNNING: Final = {"EnclaveID": "i-1-enc1", "State": "RUNNING", "Flags": "NONE", **BUILT}


def test_measurements_of_build_and_describe_enclaves() -> None:
    pcrs = {0: bytes.fromhex(GOOD), 1: bytes.fromhex(BAD), 2: bytes.fromhex(GOOD)}
    assert measurements(json.dumps(BUILT)) == pcrs
    assert measurements(json.dumps([RUNNING]).encode()) == pcrs
    assert measurements(json.dumps(BUILT["Measurements"])) == pcrs


@pytest.mark.parametrize(
    "algorithm",
    [
        "Sha384 { ... }",  # nitro-cli up to 1.4
        "Sha512_48 { .. }",  # nitro-cli from 1.5, by the name that sha2 0.10 gives SHA-384
        "SHA384",
        "SHA-384",
        "CoreWrapper { .. }",
        None,
    ],
)
def test_the_digits_tell_the_algorithm_whatever_it_is_called(algorithm: str | None) -> None:
    named = {"HashAlgorithm": algorithm, "PCR0": GOOD}
    assert measurements(json.dumps({"Measurements": named})) == {0: bytes.fromhex(GOOD)}


@pytest.mark.parametrize("algorithm", ["Sha256", "Sha256_32 { .. }", "SHA512", "Sha512_64 { .. }"])
def test_another_length_of_hash_is_refused_by_its_name(algorithm: str) -> None:
    with pytest.raises(PolicyError, match="expected Sha384"):
        measurements(json.dumps({"HashAlgorithm": algorithm, "PCR0": GOOD}))


@pytest.mark.parametrize(
    "before",
    [
        'Output file: "/tmp/app.eif"\n',  # eif_build
        "Start building the Enclave Image...\nEnclave Image successfully created.\n",
        "[2026-11-03 12:00:00] building {app}\n  ",
    ],
)
@pytest.mark.parametrize("document", [BUILT, [RUNNING]], ids=["object", "list"])
def test_measurements_after_lines_that_are_not_json(before: str, document: object) -> None:
    text = before + json.dumps(document, indent=2)
    assert measurements(text)[0].hex() == GOOD
    assert measurements(text.encode())[0].hex() == GOOD


def test_a_preamble_is_looked_through_in_linear_time() -> None:
    for line in ("\n", " ", "[", "[ \n", "Output\n"):
        begin = time.process_time()
        with pytest.raises(PolicyError):
            measurements(line * (131_072 // len(line)))
        assert time.process_time() - begin < 1


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ([RUNNING | {"Flags": "DEBUG_MODE"}], "debug mode"),
        (RUNNING | {"Flags": ["DEBUG_MODE"]}, "debug mode"),
        ([], "0 enclaves"),
        ([RUNNING, RUNNING], "2 enclaves"),
        ([1], "object"),
        ("x", "object"),
        ({"Measurements": []}, "object"),
        ({"Measurements": {}}, "no PCR"),
        ({}, "no PCR"),
        ({"Measurements": {"PCR0": GOOD, "HashAlgorithm": "Sha256"}}, "expected Sha384"),
        ({"PCR0": GOOD[:-1]}, "expected 96"),
        ({"PCR0": 0}, "expected 96"),
        ({"PCR0": ZERO}, "all zeros"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_measurements_that_say_nothing_are_refused(document: object, complaint: str) -> None:
    with pytest.raises(PolicyError, match=complaint):
        measurements(json.dumps(document))


def test_measurements_that_are_no_json_are_refused() -> None:
    with pytest.raises(PolicyError, match="JSON"):
        measurements("Start building the Enclave Image...")


# ---- writing

IMAGE: Final = {0: bytes.fromhex(GOOD)}
NEXT: Final = {0: bytes.fromhex(BAD)}
INSTANCES: Final = [f"i-0123456789abcdef{number}" for number in range(3)]


def rendered(**members: Any) -> Policy:
    default: Json = {"principals": [ROLE], "admins": [ADMIN], "images": [IMAGE]}
    return Policy.parse(json.dumps(render(**(default | members)).policy))


VARIANTS: Final[dict[str, Json]] = {
    "plain": {},
    "roll-over": {"images": [IMAGE, NEXT]},
    "signed": {"images": [{8: b"\x08" * 48}]},
    "kernel and application": {"images": [{1: b"\x01" * 48, 2: b"\x02" * 48}]},
    "role": {"images": [IMAGE | {3: pcr_of_role(ROLE), 16: b"\x10" * 48}]},
    "several people": {
        "principals": [ROLE, USER],
        "admins": [ADMIN, f"{USER}3"],
        "encryptors": [f"{USER}2"],
    },
    "all actions": {"actions": RECIPIENT_ACTIONS},
    "instances": {
        "binds": [Bind.parse(f"node={number}:{INSTANCES[number]}") for number in range(3)]
    },
    "roles": {
        "binds": [
            Bind.parse(f"node=1:{ROLE}"),
            Bind.parse(f"node=1:{ADMIN}"),
            Bind.parse(f"env=a:b:{ROLE}"),
        ]
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_wrong_with_what_is_rendered(name: str) -> None:
    assert check(rendered(**VARIANTS[name])) == ()


def test_the_matching_enclave_alone_may_decrypt() -> None:
    policy = rendered(images=[IMAGE, NEXT], encryptors=[USER])
    assert evaluate(policy, request()).decision is ALLOWED
    assert evaluate(policy, request(pcrs=NEXT)).decision is ALLOWED
    for members in (
        {"pcrs": {0: bytes(48)}},
        {"pcrs": {0: b"\x01" * 48}},
        {"pcrs": {1: bytes.fromhex(GOOD)}},
        {"pcrs": None},
        {"principal": ADMIN},
        {"principal": USER},
        {"principal": ROOT},
        {"principal": OTHER},
        {"action": "kms:ReEncryptFrom"},
        {"action": "kms:Encrypt"},
        {"action": "kms:CreateGrant"},
    ):
        assert evaluate(policy, request(**members)).decision is DENIED


@pytest.mark.parametrize("index", [0, 8])
def test_the_guard_holds_against_an_allow_added_later(index: int) -> None:
    policy = rendered(images=[{0: bytes.fromhex(GOOD), 8: b"\x08" * 48}])
    wide = replace(
        policy,
        statements=(
            *policy.statements,
            *parse(statement(Principal="*", Action="kms:*")).statements,
        ),
    )
    good = {0: bytes.fromhex(GOOD), 8: b"\x08" * 48}
    assert evaluate(wide, request(pcrs=good)).decision is ALLOWED
    for pcrs in (None, good | {index: bytes(48)}, good | {index: b"\x09" * 48}):
        assert evaluate(wide, request(pcrs=pcrs)).decision is DENIED
    assert evaluate(wide, request(pcrs=None, action="kms:ReEncryptFrom")).decision is DENIED


def test_images_do_not_mix() -> None:
    images = [{1: b"\x01" * 48, 2: b"\x02" * 48}, {1: b"\x03" * 48, 2: b"\x04" * 48}]
    policy = rendered(images=images)
    for pcrs in images:
        assert evaluate(policy, request(pcrs=pcrs)).decision is ALLOWED
    assert evaluate(policy, request(pcrs={1: b"\x01" * 48, 2: b"\x04" * 48})).decision is DENIED


def test_administrators_and_encryptors_cannot_decrypt_or_go_around() -> None:
    policy = rendered(encryptors=[USER])
    for action in (
        "Decrypt",
        "CreateGrant",
        "ReEncryptFrom",
        "ReEncryptTo",
        "ReplicateKey",
        "ImportKeyMaterial",
        "Encrypt",
    ):
        assert evaluate(policy, request(principal=ADMIN, action=f"kms:{action}")).decision is DENIED
    assert (
        evaluate(policy, request(principal=ADMIN, action="kms:PutKeyPolicy", pcrs=None)).decision
        is ALLOWED
    )
    assert (
        evaluate(policy, request(principal=USER, action="kms:Encrypt", pcrs=None)).decision
        is ALLOWED
    )
    assert (
        evaluate(policy, request(principal=USER, action="kms:PutKeyPolicy", pcrs=None)).decision
        is DENIED
    )


def test_a_bound_context_value_belongs_to_its_instance() -> None:
    policy = rendered(**VARIANTS["instances"])
    for node in range(3):
        for instance in range(3):
            asked = request(
                pcrs=IMAGE | {4: pcr_of_instance(INSTANCES[instance])}, context={"node": str(node)}
            )
            assert evaluate(policy, asked).decision is (ALLOWED if node == instance else DENIED)
    for context in ({}, {"node": "9"}, {"other": "1"}):
        asked = request(pcrs=IMAGE | {4: pcr_of_instance(INSTANCES[0])}, context=context)
        assert evaluate(policy, asked).decision is DENIED


def test_several_roles_may_share_a_context_value() -> None:
    policy = rendered(**VARIANTS["roles"])
    context = {"node": "1", "env": "a:b"}
    assert (
        evaluate(policy, request(pcrs=IMAGE | {3: pcr_of_role(ROLE)}, context=context)).decision
        is ALLOWED
    )
    # the other role holds node 1, but not env a:b
    assert (
        evaluate(policy, request(pcrs=IMAGE | {3: pcr_of_role(ADMIN)}, context=context)).decision
        is DENIED
    )


def test_values_are_written_in_lower_case_under_pcr_keys() -> None:
    text = json.dumps(render(principals=[ROLE], admins=[ADMIN], images=[IMAGE]).policy)
    assert PCR0 in text
    assert GOOD in text
    assert "ImageSha384" not in text


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"principals": []}, "no principal"),
        ({"admins": []}, "no administrator"),
        ({"images": []}, "no image"),
        ({"images": [{}]}, "no PCR is asked for, so that any image"),
        ({"images": [{3: b"\x03" * 48}]}, "PCR3 alone admits any image"),
        ({"images": [{4: b"\x04" * 48, 16: b"\x04" * 48}]}, "PCR4, PCR16 alone admits any image"),
        ({"images": [{1: b"\x01" * 48}]}, "any application"),
        ({"images": [{2: b"\x02" * 48}]}, "foreign kernel"),
        ({"images": [{0: bytes(48)}]}, "all zeros"),
        ({"images": [IMAGE | {3: bytes(48)}]}, "all zeros"),
        ({"images": [{0: b"\x01" * 32}]}, "32 bytes"),
        ({"images": [IMAGE | {32: b"\x01" * 48}]}, "PCR32"),
        ({"images": [IMAGE, {8: b"\x08" * 48}]}, "the same PCRs"),
        ({"principals": ["*"]}, "not the ARN"),
        ({"principals": [ROOT]}, "not the ARN"),
        ({"principals": [SESSION]}, "not the ARN"),
        ({"principals": [f"{ROLE}*"]}, "not the ARN"),
        ({"admins": [ACCOUNT]}, "not the ARN"),
        ({"admins": [ROOT]}, "not the ARN of a role or user"),
        ({"encryptors": [ROOT]}, "not the ARN"),
        ({"encryptors": [ROLE]}, "cannot be encryptor"),
        ({"admins": [ADMIN, ROLE]}, "cannot be administrator"),
        ({"actions": []}, "expected some of"),
        ({"actions": ["kms:Encrypt"]}, "expected some of"),
        ({"actions": RECIPIENT_ACTIONS, **VARIANTS["roles"]}, "no encryption context"),
        (
            {"binds": [Bind.parse(f"n=1:{ROLE}"), Bind.parse(f"n=1:{INSTANCES[0]}")]},
            "expected one of them",
        ),
        ({"binds": [Bind.parse(f"n=1:{ROLE}"), Bind.parse(f"N=1:{ROLE}")]}, "case only"),
        ({"binds": [Bind.parse(f"n=${{aws:username}}:{ROLE}")]}, "policy variable"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_policies_that_would_be_open_or_useless_are_not_rendered(
    members: Json, complaint: str
) -> None:
    with pytest.raises(PolicyError, match=complaint):
        rendered(**members)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "node",
        "node=3",
        f"=3:{ROLE}",
        "node=3:role/x",
        f"node=3:{USER}",
        "node=3:i-zz",
        "node=3:i-01",
    ],
)
def test_what_binds_nothing_is_refused(text: str) -> None:
    with pytest.raises(PolicyError):
        Bind.parse(text)


def binds(count: int) -> list[Bind]:
    return [Bind.parse(f"node={number}:i-{number:017x}") for number in range(count)]


def written(**members: Any) -> Rendered:
    default: Json = {"principals": [ROLE], "admins": [ADMIN], "images": [IMAGE]}
    return render(**(default | members))


def builds(count: int) -> list[dict[int, bytes]]:
    return [{0: number.to_bytes(48, "big")} for number in range(1, count + 1)]


@pytest.mark.parametrize("what", ["binds", "images"])
def test_a_policy_that_kms_would_not_keep_says_how_much_fits(what: str) -> None:
    make: dict[str, Any] = {"binds": binds, "images": builds}
    with pytest.raises(PolicyError, match="bytes, but KMS takes 32,768") as refusal:
        written(**{what: make[what](200)})
    (hint,) = refusal.value.hints
    count = int(hint.split()[2])
    assert f"the first {count} of 200 {what} fit" in hint
    fitting = written(**{what: make[what](count)})
    assert 32_000 < fitting.size <= 32_768
    assert check(Policy.parse(fitting.text + "\n")) == ()
    with pytest.raises(PolicyError, match="KMS takes"):
        written(**{what: make[what](count + 1)})


def test_a_policy_of_too_many_people_is_refused() -> None:
    with pytest.raises(PolicyError, match="KMS takes") as refusal:
        written(encryptors=[f"{USER}{number}" for number in range(1000)], binds=binds(3))
    assert refusal.value.hints == ("name fewer principals, administrators and encryptors",)


def test_the_text_of_a_policy_is_compact_and_the_same_policy() -> None:
    found = written(binds=binds(80))
    assert json.loads(found.text) == found.policy
    assert len(found.text.splitlines()) == len(found.policy["Statement"]) + 2
    assert found.size <= 32_768 < len(json.dumps(found.policy, indent=2))


@pytest.mark.parametrize(("size", "found"), [(32_768, []), (32_769, ["size"]), (131_072, ["size"])])
def test_check_knows_the_size_that_kms_takes(size: int, found: list[str]) -> None:
    text = json.dumps({"Statement": [ADMINISTRATION, ATTESTED]})
    assert [part.code for part in check(Policy.parse(text.ljust(size)))] == found


def test_arns_of_several_partitions_are_noted() -> None:
    china = ROLE.replace(":aws:", ":aws-cn:")
    for members in (
        {"admins": [china]},
        {"encryptors": [china]},
        {"principals": [ADMIN, china], "admins": [USER]},
        {"binds": [Bind.parse(f"node=1:{china}")]},
    ):
        assert "ARNs are of the partitions aws, aws-cn" in written(**members).warnings[0]
    assert not any("partition" in warning for warning in written(binds=binds(1)).warnings)


@pytest.mark.parametrize(
    "printed",
    [
        {"Policy": json.dumps({"Statement": OPEN}), "PolicyName": "default"},
        {"Policy": json.dumps({"Statement": OPEN})},
        json.dumps({"Statement": OPEN}),
    ],
    ids=["without --query", "before it had a name", "without --output text"],
)
def test_what_the_cli_prints_around_a_policy_is_recognised(printed: object) -> None:
    with pytest.raises(PolicyError, match="is not the policy, but holds it") as refusal:
        Policy.parse(json.dumps(printed))
    assert "--query Policy --output text" in refusal.value.hints[0]


def test_warnings_say_what_remains_possible() -> None:
    def warned(*pcrs: int) -> str:
        image = dict.fromkeys(pcrs, b"\x01" * 48)
        return "\n".join(render(principals=[ROLE], admins=[ADMIN], images=[image]).warnings)

    assert "kms:PutKeyPolicy" in warned(0)
    assert "every build" in warned(0)
    assert "older ones" not in warned(0)
    assert "older ones" in warned(8)
    assert "every build" not in warned(8)
