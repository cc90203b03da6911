"""The version of a secret: a number in its encryption context, which tells an old ciphertext from
the one that is meant.

KMS, or the header of a message, proves the number as it proves the rest of the context. Whether it
is new enough only the enclave knows: a ciphertext of last year is as authentic as that of today.
"""

from __future__ import annotations

import re
from typing import Final

VERSION: Final = "version"  # the name of the context's entry
VERSION_MAX: Final = 2**53 - 1  # the largest that every reader of JSON has exactly

_NUMBER: Final = re.compile(r"[1-9][0-9]{0,15}")  # one way to write each: no sign, space or zero


def fault_of(version: str | None, minimum: int) -> str:
    """What is wrong with the version in a context, where `minimum` is asked for; "" for nothing.

    `version` is None where the context has none.
    """
    asked = f"and minimum_version is {minimum}"
    if version is None:
        return f"has no version in its context, {asked}"
    number = number_of(version)
    if number is None:
        return f"has a version that is no number from 1 to {VERSION_MAX}, {asked}"
    if number < minimum:
        return f"has version {version}, which is too old: minimum_version is {minimum}"
    return ""


def number_of(version: str | None) -> int | None:
    """The number that a version is; None for what is none."""
    if version is None or not _NUMBER.fullmatch(version) or int(version) > VERSION_MAX:
        return None
    return int(version)
