"""Why KMS refused an attested call: what was sent, and the likeliest causes.

AWS answers every mismatch with the same exception, but its text tells which kind of policy lacked
an allow or denied ("Troubleshoot access denied error messages" of the IAM User Guide). A text that
AWS words otherwise only costs a hint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from attestor_io.errors import RefusedError
from attestor_io.kms_errors import UNSIGNED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SKEW_MAX: Final = 300  # seconds between two clocks that Signature Version 4 forgives
HINTS_MAX: Final = 2
_SHOWN: Final = (0, 1, 2, 3, 4, 8)  # the PCRs that CloudTrail shows
_SHOWN_OF_NITROTPM: Final = (4, 7, 12)  # the PCRs that tell machine images apart
_DIGITS: Final = (12, 4)  # of a PCR in notes, from its start and its end
_NITROTPM_KEYS: Final = "NitroTPMPCR4 with NitroTPMPCR12, or NitroTPMPCR7"
_EXPIRED: Final = frozenset(
    "ExpiredTokenException ExpiredToken UnrecognizedClientException InvalidClientTokenId".split()
)

# what KMS answers to a ciphertext or a key of another kind than its default algorithm's
_WRONG_ALGORITHM: Final = ("InvalidCiphertextException", "InvalidKeyUsageException")
_RSA_SIZES: Final = (256, 384, 512)  # bytes of a ciphertext under RSA_2048, RSA_3072, RSA_4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A refused call: KMS's `code` and `message`, and what was sent.

    `pcrs` are those of an enclave's attestation document, `nitrotpm_pcrs` those of a NitroTPM's,
    None where the call carries none; `context` holds
    names only; `skew` is how many seconds KMS's clock is ahead of ours, None where its answer had
    no date. `algorithm` and `size` (0 for none) are those of the ciphertext. `commands` says
    whether hints may name attestor's further commands.
    """

    code: str
    message: str
    pcrs: Mapping[int, bytes] | None = None
    nitrotpm_pcrs: Mapping[int, bytes] | None = None
    key_id: str | None
    context: tuple[str, ...]
    skew: float | None
    algorithm: str | None = None
    size: int = 0
    commands: bool = True


def clock_skew(date: str | None, now: datetime) -> float | None:
    """Seconds that an answer's Date header (RFC 9110 5.6.7) is ahead of us; None without one."""
    try:
        return (parsedate_to_datetime(date or "") - now).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None


def explained(
    refused: RefusedError,
    response: Mapping[str, Any],
    parameters: Mapping[str, Any],
    sent: Mapping[str, Mapping[int, bytes]],
) -> RefusedError:
    """KMS's refusal of a call with these parameters, what was sent, and the likeliest causes.

    `response` is the SDK's; `sent` has the PCRs of the document by their name in `Refusal`.
    """
    answer, metadata = response.get("Error", {}), response.get("ResponseMetadata", {})
    refusal = Refusal(
        code=str(answer.get("Code")),
        message=str(answer.get("Message") or ""),
        pcrs=sent.get("pcrs"),
        nitrotpm_pcrs=sent.get("nitrotpm_pcrs"),
        key_id=parameters.get("KeyId"),
        context=tuple(parameters.get("EncryptionContext") or ()),
        algorithm=parameters.get("EncryptionAlgorithm"),
        size=len(parameters.get("CiphertextBlob", b"")),
        skew=clock_skew(metadata.get("HTTPHeaders", {}).get("date"), datetime.now(UTC)),
        commands=find_spec("attestor_commands") is not None,
    )
    notes, hints = explain(refusal)
    ours = RefusedError(str(refused), *hints)
    ours.notes = notes
    return ours


def explain(refusal: Refusal) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Notes on what was sent, and at most two hints, the likeliest cause first."""
    pcrs = refusal.pcrs or {}
    first, *others = [*_causes(refusal, pcrs)] or [""]
    hints = [hint for hint in (first, *_more(refusal), *others) if hint]
    return tuple(_notes(refusal, pcrs)), tuple(hints[:HINTS_MAX])


def _notes(refusal: Refusal, pcrs: Mapping[int, bytes]) -> Iterable[str]:
    if pcrs:
        shown = (f"PCR{index} {_short(pcrs[index])}" for index in _SHOWN if index in pcrs)
        yield f"sent {', '.join(shown)}"
        yield f"the enclave {'runs' if _debug(pcrs) else 'does not run'} in debug mode"
    of_tpm = refusal.nitrotpm_pcrs or {}
    shown_of_tpm = [f"PCR{n} {_short(of_tpm[n])}" for n in _SHOWN_OF_NITROTPM if n in of_tpm]
    if shown_of_tpm:
        yield f"sent NitroTPM {', '.join(shown_of_tpm)}"
    key = refusal.key_id or "none named, KMS takes it from the ciphertext"
    yield f"key {key}; encryption context names: {', '.join(refusal.context) or 'none'}"


def _short(value: bytes) -> str:
    """Enough of a PCR to tell it from others by; "zero" only for zeros, as in debug mode."""
    digits, (start, end) = value.hex(), _DIGITS
    return f"{digits[:start]}...{digits[-end:]}" if any(value) else "zero"


def _attested(refusal: Refusal) -> bool:
    return refusal.pcrs is not None or refusal.nitrotpm_pcrs is not None


def _debug(pcrs: Mapping[int, bytes]) -> bool:
    return 0 in pcrs and not any(pcrs[0])


def _causes(refusal: Refusal, pcrs: Mapping[int, bytes]) -> Iterable[str]:
    """The likeliest causes, in this order."""
    code = refusal.code
    if code in _WRONG_ALGORITHM and not refusal.algorithm:
        yield from _algorithm(refusal)
    if code == "AccessDeniedException":
        yield from _denials(refusal, pcrs)
    elif code == "NotFoundException":
        yield "there is no such key in this region and in the credentials' account: check both"
    elif code in _EXPIRED:
        yield "the credentials are expired or wrong: renew them"
    elif code in UNSIGNED:
        yield (
            _clock(refusal)
            or _scope(refusal.message)
            or ("the secret key is wrong, or the clock is more than five minutes off")
        )
    elif code == "InvalidCiphertextException":
        yield (
            "the ciphertext is damaged, or was made with another encryption context: compare "
            "--context, or context in the manifest and the variables in it"
        )
    elif code == "IncorrectKeyException":
        yield (
            "the ciphertext was made with another key than --key-id, or key_id in the manifest, "
            "names"
        )
    elif code == "ValidationException" and _attested(refusal):
        yield (
            "KMS does not take a parameter, such as the attestation document: is it a Nitro "
            "Secure Module's or a NitroTPM's, and is the clock right?"
        )


def _scope(message: str) -> str:
    """Signature Version 4 signs for one region ("Credential should be scoped to ...")."""
    if "should be scoped to" not in message:
        return ""
    return "the endpoint is in another region than the one that was named: compare both"


def _algorithm(refusal: Refusal) -> Iterable[str]:
    """Whether the ciphertext, or the key, may be RSA, which KMS must be told."""
    if refusal.size in _RSA_SIZES:
        yield (
            f"{refusal.size} bytes are the length of an RSA ciphertext: if it is one, say "
            "--key-id and --algorithm RSAES_OAEP_SHA_256 (in a manifest, key_id and algorithm)"
        )
    elif refusal.code == "InvalidKeyUsageException":
        yield "an RSA key wants --algorithm (in a manifest, algorithm), such as RSAES_OAEP_SHA_256"


def _clock(refusal: Refusal) -> str:
    skew, where = refusal.skew, "enclave" if refusal.nitrotpm_pcrs is None else "instance"
    if skew is None or abs(skew) <= SKEW_MAX:
        return ""
    return (
        f"this {where}'s clock is {abs(round(skew))} s {'behind' if skew > 0 else 'ahead of'} "
        "KMS's: set it"
    )


def _denials(refusal: Refusal, pcrs: Mapping[int, bytes]) -> Iterable[str]:
    if _debug(pcrs):
        yield (
            "debug mode: PCR0, 1 and 2 are all zeros, which no key policy should allow; start "
            "it without --debug-mode"
        )
    message = refusal.message.lower()
    unknown = (
        "the key policy must allow this role with this enclave's PCRs, and no policy may deny it"
    )
    cause = next((cause for text, cause in _TEXTS if text in message), unknown)
    if refusal.nitrotpm_pcrs is not None and "PCRs" in cause:
        cause = f"{cause.replace('enclave', 'instance')} ({_NITROTPM_KEYS})"
    caller, key = _accounts(refusal.message)
    if caller and key and caller != key:
        cause = (
            f"the credentials are of account {caller}, the key of {key}, and both must "
            f"allow; {cause}"
        )
    yield cause


# What AWS's texts say, the more telling ones first
_TEXTS: Final = (
    (
        "does not exist in this region",
        (
            "the key is in another region or account, or its policy does not allow this role with "
            "these PCRs"
        ),
    ),
    (
        "explicit deny in a resource-based policy",
        (
            "a Deny of the key policy holds, such as a guard on PCRs: compare them with the PCRs "
            "that were sent"
        ),
    ),
    ("explicit deny in an identity-based policy", "a Deny in an identity policy of the role holds"),
    (
        "explicit deny in a service control policy",
        "a service control policy of the organization denies it",
    ),
    (
        "explicit deny in a resource control policy",
        "a resource control policy of the organization denies it",
    ),
    ("explicit deny in a permissions boundary", "the permissions boundary of the role denies it"),
    ("explicit deny in a session policy", "the policy of this session denies it"),
    ("explicit deny in a vpc endpoint policy", "the policy of the VPC endpoint denies it"),
    ("explicit deny", "a policy denies it explicitly"),
    (
        "no resource-based policy allows",
        (
            "no statement of the key policy allows this role with these PCRs: "
            "compare them with its conditions"
        ),
    ),
    (
        "no identity-based policy allows",
        "the identity policy of the role allows neither this action nor this key",
    ),
    ("no permissions boundary allows", "the permissions boundary of the role does not allow it"),
    ("no service control policy allows", "no service control policy of the organization allows it"),
    ("no session policy allows", "the policy of this session does not allow it"),
    ("no vpc endpoint policy allows", "the policy of the VPC endpoint does not allow it"),
)


def _accounts(message: str) -> tuple[str | None, str | None]:
    """The accounts of the caller and of the key, as far as AWS's text names them."""
    caller = re.search(r"User: arn:[a-z-]+:(?:sts|iam)::(\d{12}):", message)
    key = re.search(r"on resource: arn:[a-z-]+:kms:[a-z0-9-]+:(\d{12}):", message)
    return caller and caller[1], key and key[1]


def _more(refusal: Refusal) -> Iterable[str]:
    """The command that tells more."""
    if not refusal.commands:
        return
    if refusal.code == "AccessDeniedException" and _attested(refusal):
        caller = re.search(r"User: (arn:[a-z-]+:(?:sts|iam)::\d{12}:[\w+=,.@/-]+)", refusal.message)
        yield (
            "attestor attest DOC, then attestor policy explain POLICY --document DOC --principal "
            f"{caller[1] if caller else 'ROLE'}: which condition does not hold"
        )
    elif refusal.code in (*_EXPIRED, *UNSIGNED, "NotFoundException", "ValidationException"):
        yield (
            "attestor doctor CIPHERTEXT, with the same options, looks at everything on the way to "
            "KMS"
        )
