"""What `check` reports, and the actions that its rules are about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

RECIPIENT_ACTIONS: Final = (
    "kms:Decrypt",
    "kms:DeriveSharedSecret",
    "kms:GenerateDataKey",
    "kms:GenerateDataKeyPair",
)
"""The actions on a key that take an attestation document."""

PLAINTEXT_ACTIONS: Final = ("kms:Decrypt", "kms:DeriveSharedSecret", "kms:ReEncryptFrom")
"""The actions that give away what the key protects."""

REWRITING: Final = "kms:PutKeyPolicy"
"""The action that can take every condition out of the policy again."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a statement, or with the policy as a whole, and how to mend it.

    `code` names the rule. A `warning` does not open the key, but its author should know it.
    """

    statement: str
    code: str
    problem: str
    fix: str
    warning: bool = False


class Problem(NamedTuple):
    """A Finding before it is known of which statement."""

    code: str
    problem: str
    fix: str
    warning: bool = False
