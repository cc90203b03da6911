"""Names that a call is made with: keys, endpoints and regions, as people and KMS write them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from attestor_io.errors import InputError
from attestor_io.urls import without_query

if TYPE_CHECKING:
    from collections.abc import Mapping

_REGION: Final = re.compile(r"[a-z]{2,8}(-[a-z]{2,16}){1,3}-[0-9]{1,2}")
_KEY_ID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|mrk-[0-9a-f]{32}")
_ALIAS: Final = re.compile(r"alias/[A-Za-z0-9/_-]{1,250}")
_ARN: Final = re.compile(r"arn:aws[a-z-]*:kms:([a-z0-9-]+):[0-9]{12}:(.+)")
# of these two, few commands need any: they are compiled where they are used
_MULTI_REGION: Final = r"(arn:aws[a-z-]*:kms:)[a-z0-9-]+(:[0-9]{12}:key/mrk-[0-9a-f]{32})"
_ENDPOINT: Final = r"(?i:https)://[A-Za-z0-9._-]+(:[0-9]{1,5})?/?"

ENDPOINT_HINT: Final = (
    "an option, AWS_ENDPOINT_URL_KMS, AWS_ENDPOINT_URL or endpoint_url of a profile names it"
)
TLS_HINT: Final = "TLS is what authenticates the answer of KMS"


def parse_endpoint(url: str | None, what: str) -> str | None:
    """The endpoint, which must be https; `what` names where it stands. Raises InputError."""
    if url is not None and not url.lower().startswith("https://"):
        raise InputError(f"{what} is not https", TLS_HINT)
    if url is not None and not re.fullmatch(_ENDPOINT, url):
        example = "https://kms.eu-west-1.amazonaws.com"
        raise InputError(f"{what} {without_query(url)} is no endpoint, such as {example}")
    return url


def parse_key_id(key_id: str | None, what: str) -> str | None:
    """The key ARN, key id or alias; `what` names where it stands. Raises InputError."""
    if key_id is None or _KEY_ID.fullmatch(key_id) or _ALIAS.fullmatch(key_id):
        return key_id
    arn = _ARN.fullmatch(key_id)
    resource = arn[2] if arn else ""
    is_key = resource.startswith("key/") and _KEY_ID.fullmatch(resource.removeprefix("key/"))
    if not (is_key or _ALIAS.fullmatch(resource)):
        raise InputError(f"{what} {key_id} is no key ARN, key id or alias")
    return key_id


def resolve_region(option: str | None, key_id: str | None, environment: Mapping[str, str]) -> str:
    """The region of the option, the environment or the key's ARN, which must agree; no default."""
    arn = _ARN.fullmatch(key_id or "")
    if option == "":
        raise InputError("--region is empty")
    in_environment = _region_in(environment)
    region = option or in_environment or (arn and arn[1])
    if not region:
        raise InputError(
            "no region",
            "give --region (in a manifest: region), set AWS_REGION, or name the key by its ARN",
        )
    if not _REGION.fullmatch(region):
        raise InputError(f"region {region} is not a region's name, such as eu-west-1")
    if arn and arn[1] != region:
        raise InputError(f"region is {region}, the key ARN is in {arn[1]}")
    return region


def tells_region(key_id: str | None, environment: Mapping[str, str]) -> bool:
    """Whether the key's ARN or the environment names a region."""
    return bool(_ARN.fullmatch(key_id or "")) or _region_in(environment) is not None


def _region_in(environment: Mapping[str, str]) -> str | None:
    return environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or None


def is_same_key(asked: str, answered: str) -> bool:
    """Whether the ARN in an answer is the key asked for; an alias names no key to compare."""
    if not is_pinned(asked):
        return True
    return asked == answered or answered.endswith(f":key/{asked}")


def is_pinned(key_id: str | None) -> bool:
    """Whether this names one key: an ARN or an id does; an alias the parent's account resolves."""
    return key_id is not None and "alias/" not in key_id


def key_arn_region(arn: str) -> str | None:
    """The region in a key's ARN; None for everything that is no key's ARN."""
    found = _ARN.fullmatch(arn)
    is_key = found and _KEY_ID.fullmatch(found[2].removeprefix("key/"))
    return found[1] if found and is_key and found[2].startswith("key/") else None


def key_arn_here(arn: str, region: str) -> str:
    """The ARN by which KMS of a region knows this key: of a multi-Region key, that of its replica.

    Replicas share id, account, partition and key material, and differ in their region alone; every
    other key is known in its own region only, and its ARN returned as it is.
    """
    found = re.fullmatch(_MULTI_REGION, arn)
    return f"{found[1]}{region}{found[2]}" if found else arn
