"""The condition keys that a request to KMS can have, as far as they are known here.

"Condition keys for AWS KMS" of the KMS Developer Guide and "Actions, resources, and condition keys
for AWS Key Management Service" of the service authorization reference list KMS's own; "AWS global
condition context keys" and "Available keys for AWS STS" of the IAM User Guide those that ride in a
role's session. AWS adds keys without notice: one that is not here may exist all the same.
"""

from __future__ import annotations

import difflib
import re
from typing import Final

from keypolicy.model import (
    ATTESTATION,
    ENCRYPTION_CONTEXT,
    NITROTPM_PCRS,
    nitrotpm_condition_key,
    pcr_condition_key,
)

KMS_CONDITION_KEYS: Final = tuple(
    f"kms:{name}"
    for name in """
        BypassPolicyLockoutSafetyCheck CallerAccount CustomerMasterKeySpec CustomerMasterKeyUsage
        DataKeyPairSpec EncryptionAlgorithm EncryptionContextKeys ExpirationModel
        GrantConstraintSourceArn GrantConstraintType GrantIsForAWSResource GrantOperations
        GranteePrincipal GranteeServicePrincipal KeyAgreementAlgorithm KeyOrigin KeySpec KeyUsage
        MacAlgorithm MessageType MultiRegion MultiRegionKeyType PrimaryRegion ReEncryptOnSameKey
        ReplicaRegion RequestAlias ResourceAliases RetiringPrincipal RetiringServicePrincipal
        RotationPeriodInDays ScheduleKeyDeletionPendingWindowInDays SigningAlgorithm
        TrailingDaysWithoutKeyUsage ValidTo ViaService WrappingAlgorithm WrappingKeySpec
    """.split()
)
"""The keys of KMS, without those of attestation and of the encryption context."""

# What other services put into the sessions of roles that they hand out.
_SESSION_KEYS: Final = frozenset(
    """
    codebuild:buildarn codebuild:projectarn ec2:roledelivery ec2:sourceinstancearn
    glue:credentialissuingservice glue:roleassumedby identitystore:userid lambda:sourcefunctionarn
    ssm:sourceinstancearn
    """.split()
)
# Claims of an identity provider, by its host name ("accounts.google.com:aud"), and those of SAML.
_FEDERATION_KEY: Final = re.compile(r"(?:saml|[a-z0-9-]+(?:\.[a-z0-9-]+)+(?:/[^:]*)?):[a-z_0-9]+")

_ENCLAVE_KEY: Final = re.compile(
    r"kms:recipientattestation:(imagesha384|pcr([0-9]|[12][0-9]|3[01]))"
)
_NITROTPM_KEY: Final = re.compile(r"kms:recipientattestation:nitrotpmpcr([0-9]|1[0-9]|2[0-3])")
_MISPLACED: Final = re.compile(r"attestation|pcr\d|sha384")
_KNOWN_KEYS: Final = frozenset(name.lower() for name in KMS_CONDITION_KEYS)


def is_about_enclave(key: str) -> bool:
    """Tell whether a key is of an enclave's attestation document."""
    return bool(_ENCLAVE_KEY.fullmatch(key.lower()))


def is_about_nitrotpm(key: str) -> bool:
    """Tell whether a key is of the attestation document of an instance's NitroTPM."""
    return bool(_NITROTPM_KEY.fullmatch(key.lower()))


def is_about_document(key: str) -> bool:
    """Tell whether a key is of an attestation document of either kind."""
    return is_about_enclave(key) or is_about_nitrotpm(key)


def is_about_context(key: str) -> bool:
    """Tell whether a key is of the encryption context."""
    key, prefix = key.lower(), ENCRYPTION_CONTEXT.lower()
    return key == "kms:encryptioncontextkeys" or (key.startswith(prefix) and key != prefix)


def pcr_index(key: str) -> int:
    """Return which PCR a key of a document is about; ImageSha384 is PCR0."""
    found = re.search(r"pcr(\d+)$", key.lower())
    return int(found[1]) if found else 0


def is_known(key: str) -> bool:
    """Tell whether a request to KMS is known to be able to have a key.

    Any global key counts that is not a misplaced one of KMS: they are too many, and too often new,
    to be listed.
    """
    key = key.lower()
    return (
        key in _KNOWN_KEYS
        or is_about_document(key)
        or is_about_context(key)
        or key in _SESSION_KEYS
        or (not _MISPLACED.search(key) and bool(_FEDERATION_KEY.fullmatch(key)))
        or (key.startswith("aws:") and not _MISPLACED.search(key))
    )


def closest_key(key: str) -> str | None:
    """Guess the condition key that a misspelt one was meant to be; None where nothing is close."""
    # Before likeness, which does not know that the number has to stay.
    # The end is enough, and bounds the search in a key that is as long as the policy.
    end = key.lower()[-40:]
    pcr = re.search(r"pcr[^0-9]*([0-9]+)$", end)
    if "tpm" in end:  # nor that the kind has to stay
        index = int(pcr[1]) if pcr else len(NITROTPM_PCRS)
        return nitrotpm_condition_key(index) if index in NITROTPM_PCRS else None
    if pcr:
        return pcr_condition_key(int(pcr[1])) if int(pcr[1]) < 32 else None
    known = (*KMS_CONDITION_KEYS, f"{ATTESTATION}ImageSha384", pcr_condition_key(0))
    names = {name.lower(): name for name in known}
    found = difflib.get_close_matches(key.lower(), names, 1, cutoff=0.85)
    return names[found[0]] if found else None
