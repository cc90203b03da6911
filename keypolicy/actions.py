"""The actions of KMS, as far as they are known here, and those that no key policy decides about.

"Actions, resources, and condition keys for AWS Key Management Service" of the service authorization
reference, and "Permissions reference" of the KMS Developer Guide. AWS adds actions without notice.
"""

from __future__ import annotations

import difflib
import re
from typing import Final

from keypolicy.model import PolicyError, abbreviated

_WITHOUT_KEY: Final = tuple(
    f"kms:{name}"
    for name in """
        ConnectCustomKeyStore CreateCustomKeyStore CreateKey DeleteCustomKeyStore
        DescribeCustomKeyStores DisconnectCustomKeyStore GenerateRandom ListAliases ListKeys
        ListRetirableGrants RetireGrant UpdateCustomKeyStore
    """.split()
)
ACTIONS: Final = (
    *(
        f"kms:{name}"
        for name in """
            CancelKeyDeletion CreateAlias CreateGrant Decapsulate Decrypt DeleteAlias
            DeleteImportedKeyMaterial DeriveSharedSecret DescribeKey DisableKey DisableKeyRotation
            EnableKey EnableKeyRotation Encapsulate Encrypt GenerateDataKey GenerateDataKeyPair
            GenerateDataKeyPairWithoutPlaintext GenerateDataKeyWithoutPlaintext GenerateMac
            GetKeyLastUsage GetKeyPolicy GetKeyRotationStatus GetParametersForImport GetPublicKey
            ImportKeyMaterial ListGrants ListKeyPolicies ListKeyRotations ListResourceTags
            PutKeyPolicy ReEncryptFrom ReEncryptTo ReplicateKey RevokeGrant RotateKeyOnDemand
            ScheduleKeyDeletion Sign SynchronizeMultiRegionKey TagResource UntagResource UpdateAlias
            UpdateKeyDescription UpdatePrimaryRegion Verify VerifyMac
        """.split()
    ),
    *_WITHOUT_KEY,
)
"""All of them, those without a key included."""

_BY_NAME: Final = {name.lower(): name for name in ACTIONS}


def check_question(action: str) -> None:
    """Raise PolicyError unless this is one action of KMS that key policies decide about."""
    found = _BY_NAME.get(action.lower())
    if found in _WITHOUT_KEY:
        raise PolicyError(f"no key policy decides about {found}: identity policies do")
    if found:
        return
    if re.search(r"[*?]", action):
        raise PolicyError(f"action {abbreviated(action)} is a pattern: ask about one action")
    problem = f"action {abbreviated(action)} is not known here"
    closest = closest_action(action)
    if closest:
        raise PolicyError(problem, f"did you mean {closest}?")
    raise PolicyError(f"{problem}, expected one of KMS, such as kms:Decrypt")


def fits_an_action(pattern: str) -> bool:
    """Tell whether a pattern of a policy may fit an action of KMS; only what is before its first
    wildcard is looked at.
    """
    literal = re.match(r"[^*?]*", pattern.lower())[0]  # type: ignore[index]  # it matches anything
    if literal == pattern.lower():
        return literal in _BY_NAME
    return any(name.startswith(literal) for name in _BY_NAME)


def closest_action(action: str) -> str | None:
    """Guess the action that a misspelt one was meant to be; None where nothing is close."""
    name = action.lower() if ":" in action else f"kms:{action.lower()}"
    found = difflib.get_close_matches(name, _BY_NAME, 1, cutoff=0.8)
    return _BY_NAME[found[0]] if found else None
