"""The values of attestation conditions that no document has, or too many have."""

from __future__ import annotations

import base64
import binascii
import contextlib
import itertools
import re
from typing import TYPE_CHECKING

from keypolicy.findings import Problem
from keypolicy.keys import is_about_document, is_about_enclave, pcr_index
from keypolicy.measure import PCR_HEX_LENGTH, ZERO_PCR_HEX
from keypolicy.nitrotpm import indistinct
from keypolicy.operators import Operator, matches_wildcards

if TYPE_CHECKING:
    from collections.abc import Iterator

    from keypolicy.model import Statement


def check_pcr_values(statement: Statement) -> Iterator[Problem]:
    """Find values of attestation conditions that no document has, or too many have."""
    for condition in statement.conditions:
        operator = Operator.parse(condition.operator)
        if not is_about_document(condition.key) or not operator.name.startswith("string"):
            continue
        lets_in = operator.negated == (statement.effect == "Deny")
        right = {value for value in condition.values if _is_right(value)}
        for value in condition.values:
            if value not in right and _as_kms_writes(value) in right:
                continue  # the same PCR once more, in a form that matches nothing and harms nobody
            problems = _pcr_value_problems(
                value, operator.name, zero=lets_in and is_about_enclave(condition.key)
            )
            if lets_in and not is_about_enclave(condition.key):
                problems = itertools.chain(_machine_problems(condition.key, value), problems)
            found = next(problems, None)
            if found:
                yield found._replace(problem=f"{condition.key}: {found.problem}")


def _is_right(value: str) -> bool:
    """Tell whether a value is as KMS has it: 96 hexadecimal digits in lower case."""
    return bool(re.fullmatch(rf"[0-9a-f]{{{PCR_HEX_LENGTH}}}", value))


def _as_kms_writes(value: str) -> str:
    """Return the value that was meant by one in upper case, with 0x, or in base64."""
    if len(value) == 64 and not re.fullmatch(r"[0-9a-fA-F]*", value):
        with contextlib.suppress(binascii.Error, ValueError):
            return base64.b64decode(value, validate=True).hex()
    return value.lower().removeprefix("0x")


def _machine_problems(key: str, value: str) -> Iterator[Problem]:
    """Find that a value of a NitroTPM's PCR lets any machine image in."""
    why = indistinct(pcr_index(key), value)
    if why:
        fix = "turn Secure Boot on, or ask for NitroTPMPCR4 together with NitroTPMPCR12"
        yield Problem("indistinct_pcr", why, fix)


def _pcr_value_problems(value: str, operator: str, *, zero: bool) -> Iterator[Problem]:
    """Find what is wrong with a PCR's value under an operator, given by its bare name; worst first.

    `zero` says that enclaves of this value are let in, rather than kept out. Only the first
    problem is worth reporting: all zeros let an enclave in where other wrong values match none, and
    a pattern or 0x also makes the length and the letters wrong.
    """
    like = operator.endswith("like")
    as_printed = "use the value that nitro-cli build-enclave prints"
    whole = "use the whole SHA-384 value"
    if len(value) == 64:  # 48 bytes in base64
        whole = "write it in hexadecimal, not in base64"
    if zero and (value == ZERO_PCR_HEX or (like and matches_wildcards(value, ZERO_PCR_HEX))):
        problem = "all zeros let every enclave in debug mode in, whatever its image"
        yield Problem("zero_pcr", problem, as_printed)
    if like and re.search(r"[*?]", value):
        yield Problem("pcr_pattern", "a pattern can fit more than one image", whole)
    if value.lower().startswith("0x"):
        yield Problem("pcr_prefix", "the value starts with 0x, unlike KMS's", "drop the 0x")
    if len(value) != PCR_HEX_LENGTH:
        problem = f"the value has {len(value)} characters, expected {PCR_HEX_LENGTH}"
        yield Problem("pcr_length", problem, whole)
    if not re.fullmatch(r"[0-9a-fA-F]*", value):
        yield Problem("pcr_hex", "the value is not hexadecimal", as_printed)
    if value != value.lower() and "ignorecase" not in operator:
        problem = "the value has upper case letters, unlike KMS's"
        yield Problem("pcr_case", problem, "write it in lower case")
