"""The names of sources in a manifest: where a ciphertext or a file comes from."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from attestor_commands.inject.places import check_path
from attestor_io.errors import InputError
from attestor_io.urls import without_query

if TYPE_CHECKING:
    from attestor_commands.inject.variables import Variables

# what of a source no variable may change
_FIXED: Final = re.compile(
    r"/|-\Z|(s3|https)://[^/?#${}]+/|secretsmanager://(?!arn:)|secretsmanager://arn:[^${}]+:secret:"
    r"|ssm://"
)
_HTTPS: Final = re.compile(r"https://([^/?#]+)(/[^?#]*)(\?[^#]*)?")
_HOST: Final = re.compile(r"[A-Za-z0-9.-]{1,253}(:[0-9]{1,5})?")

_OBJECT: Final = re.compile(r"s3://([^/]+)/(.+)")  # whatever a key consists of
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]|arn:[A-Za-z0-9:._-]{1,200}")
_QUERY: Final = re.compile(r"\?[A-Za-z-]+=")  # no key is called so, but presigned URLs are
_KEY_MAX: Final = 1024  # bytes of UTF-8, "Naming Amazon S3 objects" of its user guide

# SecretId, VersionId and VersionStage of GetSecretValue, Secrets Manager API reference
_SECRET: Final = re.compile(
    r"secretsmanager://(arn:[a-z0-9-]+:secretsmanager:[a-z0-9-]+:[0-9]{12}:secret:)?"
    r"[A-Za-z0-9/_+=.@-]{1,519}(#[A-Za-z0-9/_+=.@:-]{1,256})?"
)
# Name of GetParameter, Systems Manager API reference: a path, or one name; a version or a label
_PARAMETER: Final = re.compile(
    r"ssm://(?=.{1,1011}(#|\Z))([A-Za-z0-9_.-]+|(/[A-Za-z0-9_.-]+)+)(#[A-Za-z0-9_.-]{1,100})?"
)


def source_of(text: str, where: str, variables: Variables) -> str:
    """A source after substitution; a variable chooses neither scheme nor host, bucket or account.

    Raises InputError.
    """
    if not _FIXED.match(text):
        what = (
            "is not https"
            if text.startswith("http://")
            else "is no absolute path, s3://, https://, secretsmanager://, ssm:// or -"
        )
        raise InputError(
            f"{where}: source {without_query(text)} {what}", "a variable may stand only in the path"
        )
    source = variables.fill(text, f"{where}: source", in_path=True)
    match source.partition("://")[0]:
        case "s3":
            _check_object(source, where)
        case "https":
            _check_url(source, where)
        case "secretsmanager":
            parts = _SECRET.fullmatch(source)
            if parts is None or not text.startswith(f"secretsmanager://{parts[1] or ''}"):
                raise InputError(f"{where}: source {source!a} names no secret")
        case "ssm":
            if not _PARAMETER.fullmatch(source):
                raise InputError(f"{where}: source {source!a} names no parameter")
        case _ if source != "-":
            check_path(source, where, "source")
    return source


def _check_object(source: str, where: str) -> None:
    parts, shown = _OBJECT.fullmatch(source), without_query(source)
    if parts is None or not _BUCKET.fullmatch(parts[1]) or len(parts[2].encode()) > _KEY_MAX:
        raise InputError(f"{where}: source {shown} names no object")
    if _QUERY.search(parts[2]):
        raise InputError(f"{where}: source {shown} has a query, which s3:// has not")
    _check_form(source, parts[2], where)


def _check_url(source: str, where: str) -> None:
    parts = _HTTPS.fullmatch(source)
    if parts is None or not _HOST.fullmatch(parts[1]):
        raise InputError(f"{where}: source {without_query(source)} names no host and path")
    _check_form(source, parts[2], where, blank=" ")


def _check_form(source: str, path: str, where: str, blank: str = "\0") -> None:
    """Refuse parts of a path that a server might take away, and characters that none shows."""
    if {".", ".."} & set(path.split("/")) or not source.isprintable() or blank in source:
        shown = without_query(source)
        raise InputError(f"{where}: source {shown} is not in its shortest form")
