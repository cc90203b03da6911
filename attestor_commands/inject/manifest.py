"""The manifest of `attestor inject`: TOML in, checked values out.

The manifest comes from the image, and so do key, endpoint and CA in it. Variables are the parent's
claims: they are filled in after parsing, only where they are declared, must match their pattern in
full, and cannot become a path separator, so that they choose among what the manifest allows and
never something else.
"""

from __future__ import annotations

import grp
import itertools
import os
import posixpath
import pwd
import re
import tomllib
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

from attestor import Binding
from attestor_commands.inject.fields import (
    FILE_FIELDS,
    SECRET_FIELDS,
    SECRET_MAX,
    TOP_FIELDS,
    VARIABLE_FIELDS,
    check_table,
    nearest,
)
from attestor_commands.versions import VERSION, fault_of
from attestor_io.ciphertext import check_algorithm, is_symmetric
from attestor_io.deadline import Deadline
from attestor_io.errors import InputError, RefusedError
from attestor_io.names import is_pinned, parse_endpoint, parse_key_id
from attestor_io.secret_file import real_path
from attestor_io.urls import without_query
from attestor_io.vsock import Address, parse_address, parse_hosts

if TYPE_CHECKING:
    from collections.abc import Mapping

MANIFEST_MAX: Final = 1 << 20
ENTRIES_MAX: Final = 300  # each needs two descriptors, of 1024 that a process has by default
FILE_MAX: Final = 16 << 20
VALUE_MAX: Final = 1024
_PATH_MAX: Final = 4096  # bytes, linux/limits.h
_DOTS_MAX: Final = 1000  # in one line, or as many squares of them in all lines together
CONCURRENCY: Final = 3  # vsock-proxy serves four connections by default: one is left for others
VERSION_HINT: Final = (
    'context = { version = "${VERSION}" } says which one it is; only a message of the AWS '
    "Encryption SDK carries its own"
)
DEFAULT_PATTERN: Final = "[A-Za-z0-9._-]{1,64}"

_REFERENCE: Final = re.compile(r"\$\{([^}]*)\}|\$\{")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_SOURCE: Final = re.compile(r"https://([^/?#]+)(/[^?#]*)(\?[^#]*)?")
_OBJECT: Final = re.compile(r"s3://([^/]+)/(.+)")  # whatever a key consists of
_QUERY: Final = re.compile(r"\?[A-Za-z-]+=")  # no key is called so, but presigned URLs are
_KEY_MAX: Final = 1024  # bytes of UTF-8, "Naming Amazon S3 objects" of its user guide
# what of a source no variable may change
_FIXED: Final = re.compile(r"/|-\Z|(s3|https)://[^/?#${}]+/")
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]|arn:[A-Za-z0-9:._-]{1,200}")
_HOST: Final = re.compile(r"[A-Za-z0-9.-]{1,253}(:[0-9]{1,5})?")
_MODE: Final = re.compile(r"0[0-7]{3}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_SEPARATORS: Final = frozenset("/\\?#%")


@dataclass(frozen=True, slots=True)
class Entry:
    """One target: a secret, or with `kind` "file" a file that is not sensitive."""

    kind: Literal["secret", "file"]
    source: str
    target: str
    mode: int
    owner: tuple[int, int]
    max_bytes: int
    key_id: str | None = None
    context: Mapping[str, str] | None = None
    grant_tokens: tuple[str, ...] = ()
    base64: bool = False
    algorithm: str | None = None
    signed: bool = False
    form: Literal["blob", "message"] | None = None
    context_contains: bool = False
    minimum_version: int | None = None
    sha256: str | None = None

    @property
    def bound(self) -> Binding:
        """What the ciphertext of a secret must be bound to."""
        return Binding(self.key_id, self.context or {}, self.grant_tokens, self.context_contains)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest with its variables filled in; nothing in it is unchecked."""

    entries: tuple[Entry, ...]
    region: str | None
    key_id: str | None
    endpoint_url: str | None
    ca_bundle: str | None
    https_ca_bundle: str | None
    vsock: Address | None
    imds_vsock: Address | None
    s3_vsock: Address | None
    host_vsock: Mapping[str, Address]
    deadline: Deadline
    concurrency: int
    pass_credentials: bool


def parse(
    text: bytes,
    given: Mapping[str, str],
    environment: Mapping[str, str],
    addresses: Mapping[str, Address | None] = MappingProxyType({}),
    host_vsock: Mapping[str, Address] = MappingProxyType({}),
) -> Manifest:
    """The manifest in a TOML document; `given` are the values of --set, which come before the
    environment's.

    `addresses` of the keys vsock, imds_vsock and s3_vsock win over its own, and so do those of
    hosts in `host_vsock`. Raises InputError, and RefusedError for a version that is too old. Only
    with a variable that has a `tag` and no other value is the metadata service asked, over TCP
    where there is no imds_vsock.
    """
    _check_dots(text)
    try:
        table = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"manifest is not TOML: {error}") from error
    check_table(table, TOP_FIELDS, "manifest")
    deadline = Deadline(float(table.get("timeout", 60)))
    ways = {
        name: addresses.get(name) or _address(table, name)
        for name in ("vsock", "imds_vsock", "s3_vsock")
    }
    variables = _Variables(
        table.get("variables", {}), given, environment, ways["imds_vsock"], deadline
    )
    entries = [
        _secret(number, one, table, variables)
        for number, one in enumerate(table.get("secret", []), 1)
    ]
    entries += [
        _file(number, one, variables) for number, one in enumerate(table.get("file", []), 1)
    ]
    _check_entries(entries)
    return Manifest(
        entries=tuple(entries),
        region=table.get("region"),
        key_id=parse_key_id(table.get("key_id"), "key_id"),
        endpoint_url=parse_endpoint(table.get("endpoint_url"), "endpoint_url"),
        ca_bundle=table.get("ca_bundle"),
        https_ca_bundle=table.get("https_ca_bundle"),
        **ways,
        host_vsock=_hosts(table) | dict(host_vsock),
        deadline=deadline,
        concurrency=table.get("concurrency", CONCURRENCY),
        pass_credentials=table.get("pass_credentials", False),
    )


def _check_dots(text: bytes) -> None:
    """Refuse what tomllib would take minutes for: its time is the square of a dotted key's parts.

    Which dots belong to keys only a parser could tell, and a line of a manifest has few of any.
    """
    if sum(line.count(b".") ** 2 for line in text.split(b"\n")) > _DOTS_MAX**2:
        most = f"at most {_DOTS_MAX} in one line, and less in all"
        raise InputError(f"manifest has more dots than its keys and values need: {most}")


def _address(table: Mapping[str, Any], name: str) -> Address | None:
    return parse_address(table[name]) if name in table else None


def _hosts(table: Mapping[str, Any]) -> dict[str, Address]:
    given = table.get("host_vsock", {})
    return parse_hosts([f"{host}={address}" for host, address in given.items()], "host_vsock")


class _Variables:
    """The declared variables and their values; one without a value is an error only where it is
    used.
    """

    def __init__(
        self,
        declared: Mapping[str, Any],
        given: Mapping[str, str],
        environment: Mapping[str, str],
        imds_vsock: Address | None,
        deadline: Deadline,
    ) -> None:
        for name in given:
            if name not in declared:
                raise InputError(
                    f"--set {name}: the manifest declares no such variable",
                    *nearest(name, declared),
                )
        from attestor_io.metadata import tag as instance_tag

        self._values: dict[str, str | None] = {}
        for name, declaration in declared.items():
            if not _NAME.fullmatch(name):
                raise InputError(f"variables: {name} is not a name of letters, digits and _")
            pattern, tag = _declaration(name, declaration)
            value = given.get(name, environment.get(name))
            if value is None and tag is not None:
                value = instance_tag(tag, imds_vsock, deadline)
            self._values[name] = value
            if value is not None and not _matches(pattern, value, name):
                raise InputError(f"value of variable {name} does not match {pattern}")

    def fill(self, text: str, where: str, *, in_path: bool = False) -> str:
        """The text with its references replaced; in a path no value may bring a separator."""

        def value_of(reference: re.Match[str]) -> str:
            name = reference[1]
            if name not in self._values:
                what = f"undeclared variable {name}" if name else "${ without a name"
                raise InputError(f"{where}: {what}", *nearest(name or "", self._values))
            value = self._values[name]
            if value is None:
                raise InputError(
                    f"{where}: variable {name} has no value", f"--set {name}=VALUE gives one"
                )
            if in_path and (_SEPARATORS.intersection(value) or value in {"", ".", ".."}):
                raise InputError(f"{where}: value of variable {name} is no part of a path")
            return value

        return _REFERENCE.sub(value_of, text)


def _declaration(name: str, declaration: Any) -> tuple[str, str | None]:
    """Pattern and instance tag of a variable, which is declared as a pattern or as a table."""
    if isinstance(declaration, str):
        return declaration or DEFAULT_PATTERN, None
    if not isinstance(declaration, dict):
        raise InputError(f"variables: {name} must be a pattern, or a table with pattern and tag")
    check_table(declaration, VARIABLE_FIELDS, f"variables: {name}")
    return declaration.get("pattern", DEFAULT_PATTERN), declaration.get("tag")


def _matches(pattern: str, value: str, name: str) -> bool:
    try:
        found = re.compile(pattern).fullmatch(value[: VALUE_MAX + 1])
    except re.error as error:
        raise InputError(
            f"variables: pattern of {name} is no regular expression: {error}"
        ) from error
    return found is not None and len(value) <= VALUE_MAX and value.isprintable()


def _secret(
    number: int, table: Mapping[str, Any], top: Mapping[str, Any], variables: _Variables
) -> Entry:
    where = f"secret {number}"
    check_table(table, SECRET_FIELDS, where)
    key_id = _key_of(table, top, where)
    _check_form(table, where, key_id)
    context = {
        name: variables.fill(value, f"{where}: context")
        for name, value in table.get("context", {}).items()
    }
    _check_version(table, where, context)
    return Entry(
        kind="secret",
        key_id=key_id,
        algorithm=table.get("algorithm"),
        context=context,
        grant_tokens=tuple(
            variables.fill(token, f"{where}: grant_tokens")
            for token in table.get("grant_tokens", ())
        ),
        base64=table.get("encoding") == "base64",
        signed=table.get("signed", False),
        form=table.get("form"),
        context_contains=table.get("context_contains", False),
        minimum_version=table.get("minimum_version"),
        **_placement(table, where, variables, SECRET_MAX),
    )


def _key_of(table: Mapping[str, Any], top: Mapping[str, Any], where: str) -> str | None:
    """The key that must answer for a secret, which only `any_key` lets be an alias or missing."""
    key_id = parse_key_id(table.get("key_id", top.get("key_id")), f"{where}: key_id")
    if not is_pinned(key_id) and not top.get("any_key", False):
        raise InputError(
            f"{where}: no key is pinned",
            "key_id wants a key ARN or key id; any_key = true accepts every key",
        )
    return key_id


def _check_form(table: Mapping[str, Any], where: str, key_id: str | None) -> None:
    """Refuse what contradicts itself about the form of a ciphertext, and about its context."""
    context, unbound = table.get("context"), table.get("unbound", False)
    algorithm, form = table.get("algorithm"), table.get("form")
    check_algorithm(algorithm, f"{where}: algorithm", key_id, has_context=bool(context))
    if not context and not unbound:
        binds = 'context = { name = "value" } binds it, or say unbound = true'
        alone = "anybody with the public key can make another one: unbound = true accepts that"
        raise InputError(f"{where} has no context", binds if is_symmetric(algorithm) else alone)
    if context and unbound:
        raise InputError(f"{where} has a context, and unbound = true")
    if table.get("encoding", "raw") not in {"raw", "base64"}:
        raise InputError(f"{where}: encoding {table['encoding']} is neither raw nor base64")
    if form not in {None, "blob", "message"}:
        raise InputError(f"{where}: form {form} is neither blob nor message")
    for name in ("signed", "context_contains"):
        if form == "blob" and table.get(name, False):
            raise InputError(f'{where} says form = "blob", and {name} = true, which is of messages')
        if not is_symmetric(algorithm) and (form == "message" or table.get(name, False)):
            raise InputError(f"{where}: a message has no algorithm {algorithm}")


def _check_version(table: Mapping[str, Any], where: str, context: Mapping[str, str]) -> None:
    """Compare the version in the filled-in context; without one there, a message may carry it.

    KMS opens nothing that was made with another version than the context says, so that one too old
    is refused here as KMS would refuse it: RefusedError.
    """
    minimum = table.get("minimum_version")
    if minimum is None:
        return
    if not is_symmetric(table.get("algorithm")):
        raise InputError(f"{where}: minimum_version is of a context, an RSA ciphertext has none")
    if VERSION not in context:
        if table.get("form") == "blob":
            raise InputError(f"{where}: minimum_version needs a version in context", VERSION_HINT)
        return
    fault = fault_of(context[VERSION], minimum)
    if fault:
        raise RefusedError(f"{where} {fault}")


def _file(number: int, table: Mapping[str, Any], variables: _Variables) -> Entry:
    where = f"file {number}"
    check_table(table, FILE_FIELDS, where)
    sha256 = table.get("sha256")
    if (sha256 is None) != table.get("unauthenticated", False):
        raise InputError(f"{where} wants either sha256 or unauthenticated = true")
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise InputError(f"{where}: sha256 is not 64 lower-case hexadecimal digits")
    return Entry(kind="file", sha256=sha256, **_placement(table, where, variables, FILE_MAX))


def _placement(
    table: Mapping[str, Any], where: str, variables: _Variables, max_bytes: int
) -> dict[str, Any]:
    """What secrets and files have in common."""
    for name in ("source", "target"):
        if name not in table:
            raise InputError(f"{where} has no {name}")
    mode = table.get("mode", "0600")
    if not _MODE.fullmatch(mode):
        raise InputError(f"{where}: mode {mode} is not one such as 0600")
    if int(mode, 8) & 0o007 and not table.get("world_readable", False):
        raise InputError(
            f"{where}: mode {mode} opens it to everybody",
            "world_readable = true says that this is meant",
        )
    return {
        "source": _source(table["source"], where, variables),
        "target": _target(variables.fill(table["target"], f"{where}: target", in_path=True), where),
        "mode": int(mode, 8),
        "owner": _owner(table.get("owner"), where),
        "max_bytes": table.get("max_bytes", max_bytes),
    }


def _source(text: str, where: str, variables: _Variables) -> str:
    """A source after substitution; a variable chooses neither scheme nor host nor bucket."""
    if not _FIXED.match(text):
        what = (
            "is not https"
            if text.startswith("http://")
            else "is no absolute path, s3://, https:// or -"
        )
        raise InputError(
            f"{where}: source {without_query(text)} {what}", "a variable may stand only in the path"
        )
    source = variables.fill(text, f"{where}: source", in_path=True)
    if source == "-":
        return source
    if source.startswith("/"):
        return _target(source, where, "source")
    shown = without_query(source)
    parts = (_OBJECT if source.startswith("s3") else _SOURCE).fullmatch(source)
    if source.startswith("s3"):
        if parts is None or not _BUCKET.fullmatch(parts[1]) or len(parts[2].encode()) > _KEY_MAX:
            raise InputError(f"{where}: source {shown} names no object")
        if _QUERY.search(parts[2]):
            raise InputError(f"{where}: source {shown} has a query, which s3:// has not")
    elif parts is None or not _HOST.fullmatch(parts[1]):
        raise InputError(f"{where}: source {shown} names no host and path")
    blank = source.startswith("https") and " " in source
    if {".", ".."} & set(parts[2].split("/")) or not source.isprintable() or blank:
        raise InputError(f"{where}: source {shown} is not in its shortest form")
    return source


def _target(path: str, where: str, what: str = "target") -> str:
    if not path.startswith("/"):
        raise InputError(f"{where}: {what} {path} is not an absolute path")
    if len(os.fsencode(path)) >= _PATH_MAX:
        raise InputError(f"{where}: {what} is longer than {_PATH_MAX - 1} bytes")
    if (
        posixpath.normpath(path) != path
        or path.startswith("//")
        or not path.isprintable()
        or path == "/"
    ):
        raise InputError(f"{where}: {what} {path} is not in its shortest form, or names a folder")
    return path


def _owner(text: str | None, where: str) -> tuple[int, int]:
    """User and group ids of USER, USER:GROUP or numbers; -1 leaves one as it is."""
    if text is None:
        return -1, -1
    user, _, group = text.partition(":")
    try:
        uid = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
        gid = -1 if not group else int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except (KeyError, ValueError) as error:
        raise InputError(f"{where}: owner {text} is not known here") from error
    if max(uid, gid) >= 2**32 - 1:
        raise InputError(f"{where}: owner {text} is not known here")
    return uid, gid


def _check_entries(entries: list[Entry]) -> None:
    """What entries must not do to each other."""
    if not 0 < len(entries) <= ENTRIES_MAX:
        raise InputError(
            f"manifest has {len(entries)} secrets and files, expected 1 to {ENTRIES_MAX}"
        )
    if sum(entry.source == "-" for entry in entries) > 1:
        raise InputError("two sources are standard input")
    real: dict[str, str] = {}
    for entry in entries:
        folder, name = os.path.split(entry.target)
        path = os.path.join(real_path(folder), name)
        if path in real:
            raise InputError(f"target {entry.target} is there twice")
        real[path] = entry.target
    # in this order a folder is followed at once by all that is in it
    for folder, path in itertools.pairwise(sorted(real, key=lambda path: path.split("/"))):
        if path.startswith(f"{folder}/"):
            raise InputError(f"target {real[path]} is inside target {real[folder]}")
