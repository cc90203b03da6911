"""KMS key policies that ask for an attested enclave: evaluate, check and write them.

    policy = Policy.parse(text)
    request = Request(principal=role, action="kms:Decrypt", resource=key, pcrs=pcrs)
    evaluate(policy, request).decision, check(policy)

A key policy is an IAM policy document attached to a key. KMS compares the PCRs of the attestation
document in a request's `Recipient` with the condition keys kms:RecipientAttestation:PCR<n> and
:ImageSha384, and only if a policy names them. What is evaluated here is the key policy alone;
`NOT_EVALUATED` names what else decides in AWS.

Sources: "IAM JSON policy elements reference" and "Policy evaluation logic" of the IAM User Guide;
"Key policies" and "Condition keys for AWS KMS" of the KMS Developer Guide; for the PCRs,
"Cryptographic attestation" of the Nitro Enclaves User Guide.

This package imports nothing else of the project, and its files import downwards only, in this
order: `check` over `never`, `parents`, `openings` and `documents`, which ask `evaluate`; that over
`callers`, `keys` and `operators`; beside them `render`, `pcr_values`, `findings`, `actions`,
`nitrotpm` and `measure`; all over `model`. Some of them are named like their function, which is
what the package's attribute of that name is.
"""

from __future__ import annotations

from keypolicy.actions import check_question
from keypolicy.check import check
from keypolicy.evaluate import (
    NOT_EVALUATED,
    ConditionFinding,
    Decision,
    Evaluation,
    Request,
    StatementFinding,
    evaluate,
)
from keypolicy.findings import RECIPIENT_ACTIONS, Finding
from keypolicy.measure import measurements, pcr_of_certificate, pcr_of_instance, pcr_of_role
from keypolicy.model import (
    ATTESTATION,
    POLICY_MAX,
    Condition,
    Policy,
    PolicyError,
    Source,
    Statement,
    is_key_arn,
    mixed_partitions,
)
from keypolicy.nitrotpm import Measured, measured
from keypolicy.render import Bind, Rendered, render

__all__ = [
    "ATTESTATION",
    "NOT_EVALUATED",
    "POLICY_MAX",
    "RECIPIENT_ACTIONS",
    "Bind",
    "Condition",
    "ConditionFinding",
    "Decision",
    "Evaluation",
    "Finding",
    "Measured",
    "Policy",
    "PolicyError",
    "Rendered",
    "Request",
    "Source",
    "Statement",
    "StatementFinding",
    "check",
    "check_question",
    "evaluate",
    "is_key_arn",
    "measured",
    "measurements",
    "mixed_partitions",
    "pcr_of_certificate",
    "pcr_of_instance",
    "pcr_of_role",
    "render",
]
