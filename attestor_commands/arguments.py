"""What people write for PCRs, bytes, times and roots, as values: text in, value or ArgumentError
out.
"""

from __future__ import annotations

import base64
import hashlib
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from nsm.document import NITROTPM_PCRS_MAX, PCR_SIZE, PCRS_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_HEX: Final = re.compile(r"([0-9a-fA-F]{2})*")
_YEAR: Final = 366 * 86400  # seconds
_BASE64_LENGTH: Final = 4 * PCR_SIZE // 3  # 48 bytes need no padding


class ArgumentError(Exception):
    """A text that is not what it must be; the message names it, so it is not for secrets."""


def parse_pcr(text: str, count: int = PCRS_MAX) -> tuple[int, bytes]:
    """Read N=VALUE: 96 hexadecimal characters, as nitro-cli prints PCRs, or 64 of base64, as
    CloudTrail shows them. There are `count` PCRs.
    """
    number, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[0-9]|[12][0-9]|3[01]", number) or int(number) >= count:
        raise ArgumentError(f"{text[:40]!r} is not N=HEX with N from 0 to {count - 1}")
    if len(value) == 2 * PCR_SIZE and _HEX.fullmatch(value):
        return int(number), bytes.fromhex(value)
    if re.fullmatch(rf"[A-Za-z0-9+/]{{{_BASE64_LENGTH}}}", value):
        return int(number), base64.b64decode(value)
    raise ArgumentError(
        f"PCR{number} has a value of {len(value)} characters, expected {2 * PCR_SIZE} "
        "hexadecimal ones "
        f"or {_BASE64_LENGTH} of base64"
    )


def parse_nitrotpm_pcr(text: str) -> tuple[int, bytes]:
    """Read N=VALUE of a NitroTPM, which has fewer PCRs."""
    return parse_pcr(text, NITROTPM_PCRS_MAX)


def merge(*parts: Iterable[tuple[int, bytes]]) -> dict[int, bytes]:
    """The PCRs of several sources, which must not contradict each other."""
    merged: dict[int, bytes] = {}
    for index, value in (pair for pairs in parts for pair in pairs):
        if merged.setdefault(index, value) != value:
            raise ArgumentError(
                f"PCR{index} is given twice: {merged[index].hex()} and {value.hex()}"
            )
    return merged


def parse_images(pcrs: Iterable[tuple[int, bytes]]) -> list[dict[int, bytes]]:
    """The PCRs of one image after the other: a PCR that is named again begins the next."""
    images: list[dict[int, bytes]] = []
    for index, value in pcrs:
        if not images or index in images[-1]:
            images.append({})
        images[-1][index] = value
    return images


def parse_bytes(text: str, read: Callable[[str], bytes]) -> bytes:
    """Read hexadecimal characters, or @FILE for the bytes of a file, which `read` reads."""
    if text.startswith("@"):
        return read(text[1:])
    if not _HEX.fullmatch(text):
        raise ArgumentError(f"{text[:40]!r} is neither pairs of hexadecimal characters nor @FILE")
    return bytes.fromhex(text)


def parse_time(text: str) -> datetime:
    """Read a time with its zone, such as 2026-01-03T12:00:00Z (ISO 8601)."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise ArgumentError(f"{text[:40]!r} is no time such as 2026-01-03T12:00:00Z") from error
    if time.tzinfo is None:
        raise ArgumentError(
            f"{text[:40]!r} has no time zone, such as the Z in 2026-01-03T12:00:00Z"
        )
    try:
        return time.astimezone(UTC)
    except OverflowError as error:
        raise ArgumentError(f"{text[:40]!r} is beyond the years that can be told") from error


def parse_age(text: str) -> timedelta:
    """Read a number of seconds, more than 0 and at most a year."""
    if not re.fullmatch(r"[0-9]{1,8}(\.[0-9]{1,3})?", text) or not 0 < float(text) <= _YEAR:
        raise ArgumentError(
            f"{text[:40]!r} is no number of seconds, more than 0 and at most a year"
        )
    return timedelta(seconds=float(text))


def parse_certificate(data: bytes) -> bytes:
    """A certificate in PEM or DER, as DER."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding

    load = (
        x509.load_pem_x509_certificate if b"-----BEGIN" in data else x509.load_der_x509_certificate
    )
    try:
        return load(data).public_bytes(Encoding.DER)
    except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise ArgumentError("it holds no certificate in PEM or DER") from error


def parse_root(data: bytes) -> bytes:
    """The SHA-256 fingerprint of a root certificate in PEM or DER."""
    return hashlib.sha256(parse_certificate(data)).digest()
