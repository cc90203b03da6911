"""The manifest of `attestor inject`: TOML in, checked values out.

The manifest comes from the image, and so do key, endpoint and CA in it. Variables are the parent's
claims: they are filled in after parsing, only where they are declared, must match their pattern in
full, and cannot become a path separator, so that they choose among what the manifest allows and
never something else.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

from attestor import Binding
from attestor_commands.inject.fields import (
    FILE_FIELDS,
    MEMBER_FIELDS,
    SECRET_FIELDS,
    SECRET_MAX,
    TOP_FIELDS,
    check_table,
)
from attestor_commands.inject.places import (
    Document,
    Place,
    check_generation,
    check_places,
    document_of,
    member_of,
    place_of,
)
from attestor_commands.inject.source_names import source_of
from attestor_commands.inject.variables import Variables
from attestor_commands.versions import VERSION, fault_of
from attestor_io.ciphertext import check_algorithm, is_symmetric
from attestor_io.deadline import Deadline
from attestor_io.errors import InputError, RefusedError
from attestor_io.names import is_pinned, parse_endpoint, parse_key_id
from attestor_io.vsock import Address, parse_address, parse_hosts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

MANIFEST_MAX: Final = 1 << 20
ENTRIES_MAX: Final = 300  # each needs two descriptors, of 1024 that a process has by default
FILE_MAX: Final = 16 << 20
_DOTS_MAX: Final = 1000  # in one line, or as many squares of them in all lines together
STOP_TIMEOUT: Final = 10  # seconds, as containers have them
CONCURRENCY: Final = 3  # vsock-proxy serves four connections by default: one is left for others
VERSION_HINT: Final = (
    'context = { version = "${VERSION}" } says which one it is; only a message of the AWS '
    "Encryption SDK carries its own"
)

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A secret, or with `kind` "file" a file that is not sensitive: from a source to its place."""

    kind: Literal["secret", "file"]
    source: str
    max_bytes: int
    place: Place
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
    documents: tuple[Document, ...]
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
    passed_variables: Mapping[str, str]
    generation_folder: str | None
    on_change: str
    stop_timeout: int

    @property
    def places(self) -> tuple[Place, ...]:
        """Every place of an entry or a document."""
        documents = (document.place for document in self.documents)
        return (*(entry.place for entry in self.entries), *documents)

    @property
    def files(self) -> tuple[Place, ...]:
        """Every file that is to be there: of secrets, files and documents, in this order."""
        targets = (entry.place for entry in self.entries if entry.place.kind == "target")
        return (*targets, *(document.place for document in self.documents))


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
    variables = Variables(
        table.get("variables", {}), given, environment, ways["imds_vsock"], deadline
    )
    documents = [
        document_of(one, f"document {number}", variables)
        for number, one in enumerate(table.get("document", []), 1)
    ]
    entries = [*_secrets(table, documents, variables), *_files(table, variables)]
    passed = variables.values if table.get("pass_variables", False) else {}
    _check_entries(entries)
    places = [*(one.place for one in entries), *(one.place for one in documents)]
    check_places(places, passed)
    generation_folder = check_generation(table.get("generation_folder"), places, variables)
    on_change = table.get("on_change", "restart")
    _check_change(on_change, places)
    return Manifest(
        entries=tuple(entries),
        documents=tuple(documents),
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
        passed_variables=passed,
        generation_folder=generation_folder,
        on_change=on_change,
        stop_timeout=table.get("stop_timeout", STOP_TIMEOUT),
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


def _secrets(
    top: Mapping[str, Any], documents: Sequence[Document], variables: Variables
) -> Iterator[Entry]:
    """Every [[secret]], then those of each [[document]]."""
    for number, table in enumerate(top.get("secret", []), 1):
        where = f"secret {number}"
        check_table(table, SECRET_FIELDS, where)
        yield _secret(table, top, where, variables, place_of(table, where, variables))
    for number, document in enumerate(documents, 1):
        for name, table in top["document"][number - 1]["secrets"].items():
            place = member_of(document, name, f"document {number}")
            where = f"document {number}: {name}"
            check_table(table, MEMBER_FIELDS, where)
            yield _secret(table, top, where, variables, place)


def _secret(
    table: Mapping[str, Any], top: Mapping[str, Any], where: str, variables: Variables, place: Place
) -> Entry:
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
        place=place,
        **_origin(table, where, variables, SECRET_MAX),
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


def _files(top: Mapping[str, Any], variables: Variables) -> Iterator[Entry]:
    """Every [[file]]."""
    for number, table in enumerate(top.get("file", []), 1):
        where = f"file {number}"
        check_table(table, FILE_FIELDS, where)
        yield _file(table, where, variables)


def _file(table: Mapping[str, Any], where: str, variables: Variables) -> Entry:
    sha256 = table.get("sha256")
    if (sha256 is None) != table.get("unauthenticated", False):
        raise InputError(f"{where} wants either sha256 or unauthenticated = true")
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise InputError(f"{where}: sha256 is not 64 lower-case hexadecimal digits")
    return Entry(
        kind="file",
        sha256=sha256,
        place=place_of(table, where, variables),
        **_origin(table, where, variables, FILE_MAX),
    )


def _origin(
    table: Mapping[str, Any], where: str, variables: Variables, most: int
) -> dict[str, Any]:
    """Where the bytes of a secret or file come from, and how many there may be."""
    if "source" not in table:
        raise InputError(f"{where} has no source")
    return {
        "source": source_of(table["source"], where, variables),
        "max_bytes": table.get("max_bytes", most),
    }


def _check_change(on_change: str, places: Sequence[Place]) -> None:
    """Refuse to tell a running program of what only a new one can get."""
    for place in places:
        if place.needs_program and on_change != "restart":
            raise InputError(
                f"on_change is {on_change}, but {place} reaches a program only when it starts",
                'on_change = "restart" starts it again; a target can change beside it',
            )


def _check_entries(entries: Sequence[Entry]) -> None:
    """How many entries there may be, and what they must not do to each other."""
    if not 0 < len(entries) <= ENTRIES_MAX:
        raise InputError(
            f"manifest has {len(entries)} secrets and files, expected 1 to {ENTRIES_MAX}"
        )
    if sum(entry.source == "-" for entry in entries) > 1:
        raise InputError("two sources are standard input")
