"""The PCRs of a NitroTPM that tell one machine image from another, and their precomputed values.

"Attestable AMIs" and "NitroTPM" of the EC2 User Guide; what each PCR measures is of the TCG PC
Client Platform Firmware Profile and, from PCR11 on, of systemd-stub.
"""

from __future__ import annotations

import re
from typing import Final, Literal, NamedTuple

from keypolicy.measure import PCR_HEX_LENGTH, check_algorithm, measurements, without_preamble
from keypolicy.model import PolicyError, abbreviated, read_json

NITROTPM_PCRS: Final = range(24)

_COMPUTED: Final = frozenset({"PCR4", "PCR7", "PCR12"})  # what nitro-tpm-pcr-compute prints


class Measured(NamedTuple):
    """The precomputed PCRs of one image; `source` says whose they are."""

    source: Literal["enclave", "nitrotpm"]
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
