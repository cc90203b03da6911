"""The PCRs of a NitroTPM that tell one machine image from another, and their precomputed values.

"Attestable AMIs" and "NitroTPM" of the EC2 User Guide; what each PCR measures is of the TCG PC
Client Platform Firmware Profile and, from PCR11 on, of systemd-stub.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Final, NamedTuple

from keypolicy.measure import (
    PCR_BYTES,
    PCR_HEX_LENGTH,
    check_algorithm,
    measurements,
    without_preamble,
)
from keypolicy.model import PolicyError, Source, abbreviated, read_json

if TYPE_CHECKING:
    from collections.abc import Iterable

SECURE_BOOT_OFF: Final = (
    "98441c7f7625d10058c47683aec486ce311c633235eb5555"
    "93a7ee791121e3578ae72d04ecef661f272d59058b77af35"
)
"""PCR7 of every instance of EC2 without Secure Boot, as unrelated documents have it."""

# Of a PCR that nothing but the EV_SEPARATOR was measured to (firmware profile, 3.3.2.2).
SEPARATOR_ALONE: Final = hashlib.sha384(
    bytes(PCR_BYTES) + hashlib.sha384(bytes(4)).digest()
).hexdigest()

_COMPUTED: Final = frozenset({"PCR4", "PCR7", "PCR12"})  # what nitro-tpm-pcr-compute prints


def indistinct(index: int, value: str) -> str:
    """Say why a value of a PCR, in hexadecimal, is that of any machine image; else nothing.

    Zero is what a PCR has that nothing was measured to, such as PCR12 without a command line: it
    says something beside another PCR. It cannot be that of PCR4 and PCR7.
    """
    value = value.lower()
    if index == 7 and value == SECURE_BOOT_OFF:
        return "this is PCR7 of every instance without Secure Boot"
    if value == SEPARATOR_ALONE:
        return f"this is PCR{index} of every machine where nothing was measured to it"
    if index in {4, 7} and value and not value.strip("0"):
        return f"all zeros are PCR{index} of a machine whose firmware measures nothing"
    return ""


def machine_identity_problem(pinned: Iterable[int]) -> str:
    """Say why these PCRs do not tell one machine image from another; empty when they do."""
    found = set(pinned)
    if 7 in found or found >= {4, 12}:
        return ""
    if 4 in found:
        return "NitroTPM PCR4 without PCR12 admits any kernel command line"
    if 12 in found:
        return "NitroTPM PCR12 without PCR4 admits any kernel with this command line"
    names = ", ".join(f"PCR{index}" for index in sorted(found))
    return f"NitroTPM {names} alone admits any machine image" if found else "no PCR is asked for"


IDENTITY_FIX: Final = "add NitroTPMPCR4 together with NitroTPMPCR12, or NitroTPMPCR7"


class Measured(NamedTuple):
    """The precomputed PCRs of one image; `source` says whose they are."""

    source: Source
    pcrs: dict[int, bytes]


def measured(text: str | bytes) -> Measured:
    """Read the measurements of an enclave's image or of a machine image, whichever they are.

    Those of an enclave are as `measurements` takes them; those of a machine image the JSON that
    `nitro-tpm-pcr-compute` prints, whose names are PCR4, PCR7 and PCR12 alone. Raises PolicyError.
    """
    listed = _listed(text)
    names = {name for name in listed if re.fullmatch(r"PCR[0-9]+", name)}
    if not names or not names <= _COMPUTED:
        return Measured("enclave", measurements(text))
    check_algorithm(listed.get("HashAlgorithm"))
    return Measured("nitrotpm", {int(name[3:]): _value(name, listed[name]) for name in names})


def _listed(text: str | bytes) -> dict[str, object]:
    """The members of "Measurements", if the text is an object with that; else none."""
    document = read_json(without_preamble(text))
    listed = document.get("Measurements") if isinstance(document, dict) else None
    return listed if isinstance(listed, dict) else {}


def _value(name: str, value: object) -> bytes:
    """Read one PCR; all zeros are a value as any other, as of PCR12 without a command line."""
    if not isinstance(value, str) or not re.fullmatch(rf"[0-9a-fA-F]{{{PCR_HEX_LENGTH}}}", value):
        raise PolicyError(
            f"{name} is {abbreviated(value)}, expected {PCR_HEX_LENGTH} hexadecimal characters"
        )
    return bytes.fromhex(value)
