"""URLs in messages: shown without what authorises whoever has it.

The query of a presigned URL is a signature, that of a credentials endpoint may be a token, and user
and password stand before the host. Messages go into logs and to the parent.
"""

from __future__ import annotations

import re
from typing import Final

_HIDDEN: Final = "?..."
_START: Final = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:)?/+")
_QUERY: Final = re.compile(r"[?#](?=\S)")


def without_query(url: str) -> str:
    """A URL as messages show it: with neither query, fragment, user nor password.

    What was only meant to be one, without a scheme or with too few slashes, is shown in this way.
    """
    if url.startswith("/") and not url.startswith("//"):
        return url  # a file's path, which has none of these
    shown = re.split(r"[?#]", url, maxsplit=1)[0]
    start = _START.match(shown)
    end = start.end() if start else 0
    return shown[:end] + _without_user(shown[end:]) + (_HIDDEN if shown != url else "")


def redact_urls(text: str) -> str:
    """A text with every URL in it shown so, whoever quotes it; in linear time."""
    words = re.split(r"(\s+)", text)
    for number, word in enumerate(words):
        # urllib3 and http.client name what they asked for by path and query alone
        before = words[number - 2] if number > 1 else ""
        is_path = word.startswith(("'/", '"/')) or (word.startswith("/") and before == "url:")
        found = _QUERY.search(word)
        head = word[: found.start()] if found else word
        # all of the word goes: a query may hold a quotation mark, or brackets
        shown = head + _HIDDEN if found and ("://" in head or is_path) else word
        first, *others = shown.split("://")
        words[number] = "://".join([first, *map(_without_user, others)])
    return "".join(words)


def _without_user(rest: str) -> str:
    """What follows on the scheme, without user and password (RFC 3986, 3.2.1)."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    return rest[authority.rfind("@") + 1 :]
