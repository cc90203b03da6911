"""The values of attestation conditions that no document has, or too many have."""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
from typing import TYPE_CHECKING, Final

from keypolicy.findings import Problem
from keypolicy.keys import is_about_document, is_about_enclave, pcr_index
from keypolicy.measure import PCR_HEX_LENGTH, ZERO_PCR_HEX, image_identity_problem
from keypolicy.nitrotpm import IDENTITY_FIX, indistinct, machine_identity_problem
from keypolicy.operators import Operator, matches_wildcards

if TYPE_CHECKING:
    from collections.abc import Iterator

    from keypolicy.model import Condition, Statement

_ZERO_IN_DEBUG: Final = frozenset({0, 1, 2, 8})


def check_pcr_values(statement: Statement, *, debug: bool) -> Iterator[Problem]:
    """Find values of attestation conditions that no document has, or too many have.

    `debug` says that an Allow lets debug mode in, by all its conditions and every Deny.
    """
    for condition in statement.conditions:
        operator = Operator.parse(condition.operator)
        if not is_about_document(condition.key) or not operator.name.startswith("string"):
            continue
        lets_in = operator.negated == (statement.effect == "Deny")
        of_enclave = is_about_enclave(condition.key)
        passes_debug = pcr_index(condition.key) in _ZERO_IN_DEBUG
        zero = of_enclave and lets_in and (debug if statement.effect == "Allow" else passes_debug)
        identified = _is_identified_without(condition, statement)
        right = {value for value in condition.values if _is_right(value)}
        for value in condition.values:
            if value not in right and _as_kms_writes(value) in right:
                continue  # the same PCR once more, in a form that matches nothing and harms nobody
            if identified and operator.name.endswith("like") and re.search(r"[*?]", value):
                continue  # the others say which image it is
            found = None
            if lets_in and not of_enclave and not identified:
                found = _machine_problem(condition.key, value)
            found = found or next(_pcr_value_problems(value, operator.name, zero=zero), None)
            if found:
                yield found._replace(problem=f"{condition.key}: {found.problem}")


def _is_identified_without(condition: Condition, statement: Statement) -> bool:
    """Tell whether the other conditions of an Allow, with which it is ANDed, name the image."""
    of_enclave = is_about_enclave(condition.key)
    pinned = {
        pcr_index(other.key)
        for other in statement.conditions
        if is_about_document(other.key)
        and is_about_enclave(other.key) == of_enclave
        and pcr_index(other.key) != pcr_index(condition.key)
        and other.operator.lower() in {"stringequals", "stringequalsignorecase"}
        and all(_is_distinct(other.key, value.lower()) for value in other.values)
    }
    problem = image_identity_problem if of_enclave else machine_identity_problem
    return statement.effect == "Allow" and not problem(pinned)


def _is_distinct(key: str, value: str) -> bool:
    """Tell whether a value of a PCR is not that of many images; zeros may be a NitroTPM's PCR12."""
    if is_about_enclave(key):
        return value != ZERO_PCR_HEX
    return not indistinct(pcr_index(key), value)


def _is_right(value: str) -> bool:
    """Tell whether a value is as KMS has it: 96 hexadecimal digits in lower case."""
    return bool(re.fullmatch(rf"[0-9a-f]{{{PCR_HEX_LENGTH}}}", value))


def _as_kms_writes(value: str) -> str:
    """Return the value that was meant by one in upper case, with 0x, or in base64."""
    if len(value) == 64 and not re.fullmatch(r"[0-9a-fA-F]*", value):
        with contextlib.suppress(binascii.Error, ValueError):
            return base64.b64decode(value, validate=True).hex()
    return value.lower().removeprefix("0x")


def _machine_problem(key: str, value: str) -> Problem | None:
    """Find that a value of a NitroTPM's PCR lets any machine image in."""
    index = pcr_index(key)
    why = indistinct(index, value)
    fixes = {
        4: "use the value that nitro-tpm-pcr-compute prints",
        7: "turn Secure Boot on, or ask for NitroTPMPCR4 together with NitroTPMPCR12",
    }
    return Problem("indistinct_pcr", why, fixes.get(index, IDENTITY_FIX)) if why else None


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
