"""CBOR (RFC 8949) as the Nitro Secure Module writes it, and nothing more."""

from __future__ import annotations

import io
from typing import Final, NoReturn

import cbor2

MAX_DEPTH: Final = 8  # an answer nests two deep, a document's payload three


class CborError(Exception):
    """The bytes are not exactly one CBOR item of the subset that the NSM uses."""


def decode(data: bytes) -> object:
    """Decode exactly one item: no trailing bytes, duplicate keys, deep nesting or tags.

    Raises CborError.
    """
    item, rest = decode_first(data)
    if rest:
        raise CborError(f"{len(rest)} trailing bytes")
    return item


def decode_first(data: bytes) -> tuple[object, bytes]:
    """Decode the item that the data begins with, and return what follows it.

    Raises CborError. Every tag is refused before its content is interpreted: a hostile item must
    not choose which of the decoder's many types it becomes, nor make it compute (a bigfloat of tag
    5 can ask for gigabytes).
    """
    source = io.BytesIO(data)
    try:
        item: object = cbor2.load(
            source,
            max_depth=MAX_DEPTH,
            allow_duplicate_keys=False,
            semantic_decoders=_TAGS_WITH_A_MEANING,
            tag_hook=_refuse_tag,
        )
    except (cbor2.CBORError, ValueError, OverflowError, MemoryError) as error:
        raise CborError(str(error) or type(error).__name__) from error
    return item, data[source.tell() :]


def _refuse_tag(*_: object) -> NoReturn:
    raise ValueError("tags are not part of the format")


_TAGS_WITH_A_MEANING: Final = dict.fromkeys(
    (
        0,
        1,
        2,
        3,
        4,
        5,
        25,
        28,
        29,
        30,
        35,
        36,
        37,
        52,
        54,
        100,
        256,
        258,
        260,
        261,
        1004,
        43000,
        55799,
    ),
    _refuse_tag,
)
