"""PCR values that a key policy can ask for: computed from names, or read from nitro-cli's output.

"Cryptographic attestation" of the Nitro Enclaves User Guide says what each PCR measures and how.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Final

from keypolicy.model import PolicyError, abbreviated, iam_entity_type, read_json

if TYPE_CHECKING:
    from collections.abc import Iterable

PCR_BYTES: Final = hashlib.sha384().digest_size
PCR_HEX_LENGTH: Final = 2 * PCR_BYTES
ZERO_PCR_HEX: Final = "0" * PCR_HEX_LENGTH

# ---- single PCRs


def pcr_of_role(arn: str) -> bytes:
    """Compute PCR3: the IAM role of the parent instance, by its ARN with path and partition."""
    if iam_entity_type(arn) != "role" or not arn.isascii():
        raise PolicyError(f"{abbreviated(arn)} is not the ARN of a role")
    return extended_once(arn.encode("ascii"))


def pcr_of_instance(instance_id: str) -> bytes:
    """Compute PCR4: the parent instance, by its id, as i-0123456789abcdef0."""
    if not re.fullmatch(r"i-([0-9a-f]{8}|[0-9a-f]{17})", instance_id):
        raise PolicyError(f"{abbreviated(instance_id)} is not the id of an instance")
    return extended_once(instance_id.encode("ascii"))


def pcr_of_certificate(der: bytes) -> bytes:
    """Compute PCR8: the certificate that signed the image, in DER.

    A renewed certificate over the same key gives another value.
    """
    return extended_once(hashlib.sha384(der).digest())


def extended_once(data: bytes) -> bytes:
    """Return a PCR after its first extension with the data: SHA384(initial zeros || data)."""
    return hashlib.sha384(bytes(PCR_BYTES) + data).digest()


# ---- measurements of an image


def measurements(text: str | bytes) -> dict[int, bytes]:
    """Read the PCRs that `nitro-cli build-enclave` or `describe-enclaves` prints for one enclave.

    Takes their JSON, and that of `eif_build` with the line that it prints before. Raises
    PolicyError; also for an enclave in debug mode, whose listed PCRs are not those that it attests.
    """
    document = read_json(without_preamble(text))
    if isinstance(document, list):  # describe-enclaves lists enclaves, build-enclave prints one
        if len(document) != 1:
            raise PolicyError(f"measurements list {len(document)} enclaves, expected 1")
        document = document[0]
    if not isinstance(document, dict):
        raise PolicyError("measurements are not a JSON object")
    if "DEBUG_MODE" in str(document.get("Flags")).upper():
        raise PolicyError(
            "measurements are of an enclave in debug mode, which attests zeros instead of them"
        )
    listed = document.get("Measurements", document)
    if not isinstance(listed, dict):
        raise PolicyError("Measurements is not a JSON object")
    check_algorithm(listed.get("HashAlgorithm"))
    pcrs = {
        int(name[3:]): _measurement(name, value)
        for name, value in listed.items()
        if re.fullmatch(r"PCR([0-9]|[12][0-9]|3[01])", name)
    }
    if not pcrs:
        raise PolicyError("measurements list no PCR")
    return pcrs


def without_preamble(text: str | bytes) -> bytes:
    """Drop the lines before the JSON: `eif_build` begins with "Output file: ..." on its stdout."""
    data = text.encode(errors="replace") if isinstance(text, str) else text
    # An object, or a list of objects: a line that begins with "[INFO]" is neither.
    begin = re.search(rb"^[ \t]*(?:\{|\[\s*[{\]])", data, re.MULTILINE)
    return data[begin.start() :] if begin else data


def check_algorithm(name: object) -> None:
    """Refuse a hash algorithm whose values have another length than SHA-384's.

    The 96 digits say themselves what they are; the name is the Debug output of a Rust type, and
    has changed before: nitro-cli 1.4 prints "Sha384 { ... }", 1.5 with sha2 0.10 "Sha512_48
    { .. }", which is SHA-512's core cut to 48 bytes. Other names tell nothing.
    """
    found = re.search(r"sha-?([0-9]{1,6})(?:_([0-9]{1,6}))?", str(name).lower())
    if found and (int(found[2]) if found[2] else int(found[1]) // 8) != PCR_BYTES:
        raise PolicyError(f"measurements are of HashAlgorithm {abbreviated(name)}, expected Sha384")


def _measurement(name: str, value: object) -> bytes:
    """Read the value of one PCR from its hexadecimal, unless it is all zeros."""
    if not isinstance(value, str) or not re.fullmatch(rf"[0-9a-fA-F]{{{PCR_HEX_LENGTH}}}", value):
        raise PolicyError(
            f"{name} is {abbreviated(value)}, expected {PCR_HEX_LENGTH} hexadecimal characters"
        )
    if value == ZERO_PCR_HEX:
        raise PolicyError(f"{name} is all zeros, which is what an enclave in debug mode attests")
    return bytes.fromhex(value)


# ---- several PCRs together


def image_identity_problem(pinned: Iterable[int]) -> str:
    """Say why these PCRs do not tell one image from another; empty when they do."""
    found = set(pinned)
    if found & {0, 8} or found >= {1, 2}:
        return ""
    if 2 in found:
        return "PCR2 without PCR1 admits a foreign kernel and init around the genuine application"
    if 1 in found:
        return "PCR1 without PCR2 admits any application on this kernel"
    if not found:
        return "no PCR is asked for, so that any image is admitted, in debug mode too"
    return f"{pcr_names(found)} alone admits any image, in debug mode too"


def pcr_names(indexes: Iterable[int]) -> str:
    """List PCRs for a message, as "PCR0, PCR3"."""
    return ", ".join(f"PCR{index}" for index in sorted(indexes)) or "no PCR"
