"""The keys that a manifest's tables may have: for its check, and for its JSON schema."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from attestor_commands.versions import VERSION_MAX
from attestor_io.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SECRET_MAX: Final = 1 << 30  # bytes of a source
SIGNALS: Final = "SIGHUP SIGINT SIGQUIT SIGTERM SIGUSR1 SIGUSR2 SIGWINCH SIGCONT".split()
CHANGES: Final = ("restart", "none", *SIGNALS)
"""What `inject --watch` can do to its program when something has changed."""


class Field(NamedTuple):
    """What a key of a table must be, for the check and for the JSON schema."""

    check: Callable[[Any], bool]
    what: str
    schema: Mapping[str, Any]


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind  # a bool is no number here


def _is_table_of_strings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _between(low: int, high: int) -> Field:
    return Field(
        lambda value: type(value) is int and low <= value <= high,
        f"a number from {low} to {high}",
        {"type": "integer", "minimum": low, "maximum": high},
    )


def _one_of(*known: str) -> Field:
    return Field(
        lambda value: isinstance(value, str) and value in known,
        f"one of {', '.join(known)}",
        {"enum": list(known)},
    )


_STRING: Final = Field(_is(str), "a string", {"type": "string"})
_FLAG: Final = Field(_is(bool), "true or false", {"type": "boolean"})
_STRINGS: Final = Field(
    _is_list_of_strings, "a list of strings", {"type": "array", "items": {"type": "string"}}
)
_STRING_TABLE: Final = Field(
    _is_table_of_strings,
    "a table of strings",
    {"type": "object", "additionalProperties": {"type": "string"}},
)
_TABLES: Final = Field(
    lambda value: isinstance(value, list) and all(isinstance(one, dict) for one in value),
    "a list of tables",
    {},
)
_VARIABLES: Final = Field(_is(dict), "a table", {})

_ORIGIN: Final[Mapping[str, Field]] = {"source": _STRING, "max_bytes": _between(1, SECRET_MAX)}
_FILE: Final[Mapping[str, Field]] = {
    "target": _STRING,
    "mode": _STRING,
    "owner": _STRING,
    "world_readable": _FLAG,
}
MEMBER_FIELDS: Final[Mapping[str, Field]] = {
    **_ORIGIN,
    "key_id": _STRING,
    "context": _STRING_TABLE,
    "unbound": _FLAG,
    "grant_tokens": _STRINGS,
    "encoding": _STRING,
    "algorithm": _STRING,
    "signed": _FLAG,
    "form": _STRING,
    "context_contains": _FLAG,
    "minimum_version": _between(1, VERSION_MAX),
}
SECRET_FIELDS: Final[Mapping[str, Field]] = {
    **_FILE,
    "environment": _STRING,
    "fd": _STRING,
    **MEMBER_FIELDS,
}
DOCUMENT_FIELDS: Final[Mapping[str, Field]] = {
    **_FILE,
    "format": _STRING,
    "secrets": Field(
        lambda value: (
            isinstance(value, dict) and all(isinstance(one, dict) for one in value.values())
        ),
        "a table of tables",
        {},
    ),
}
FILE_FIELDS: Final[Mapping[str, Field]] = {
    **_ORIGIN,
    **_FILE,
    "sha256": _STRING,
    "unauthenticated": _FLAG,
}
VARIABLE_FIELDS: Final[Mapping[str, Field]] = {"pattern": _STRING, "tag": _STRING}
TOP_FIELDS: Final[Mapping[str, Field]] = {
    "region": _STRING,
    "key_id": _STRING,
    "any_key": _FLAG,
    "endpoint_url": _STRING,
    "ca_bundle": _STRING,
    "https_ca_bundle": _STRING,
    "vsock": _STRING,
    "imds_vsock": _STRING,
    "s3_vsock": _STRING,
    "host_vsock": _STRING_TABLE,
    "timeout": _between(1, 86400),
    "concurrency": _between(1, 64),
    "generation_folder": _STRING,
    "on_change": _one_of(*CHANGES),
    "stop_timeout": _between(1, 3600),
    "pass_credentials": _FLAG,
    "pass_variables": _FLAG,
    "variables": _VARIABLES,
    "secret": _TABLES,
    "document": _TABLES,
    "file": _TABLES,
}


def check_table(table: Mapping[str, Any], fields: Mapping[str, Field], where: str) -> None:
    """Refuse a key that a table may not have, or whose value is of another kind: InputError."""
    for name, value in table.items():
        if name not in fields:
            raise InputError(f"{where}: unknown key {name}", *nearest(name, fields))
        if not fields[name].check(value):
            raise InputError(f"{where}: {name} must be {fields[name].what}")


def nearest(name: str, known: Mapping[str, Any]) -> list[str]:
    """A hint for a name that is not known: the one that was probably meant, or all there are."""
    near = difflib.get_close_matches(name, known, 1) or sorted(known)
    return (
        [f"did you mean {near[0]}?" if len(near) == 1 else f"known are {', '.join(near)}"]
        if near
        else []
    )


def json_schema() -> dict[str, Any]:
    """The manifest's structure as a JSON schema (draft 2020-12); patterns and paths are checked
    beyond it.
    """

    def table(
        fields: Mapping[str, Field], required: tuple[str, ...] = (), **schemas: Any
    ) -> dict[str, Any]:
        properties = {name: schemas.get(name, field.schema) for name, field in fields.items()}
        return {
            "type": "object",
            "properties": properties,
            "additionalProperties": False,
            **({"required": list(required)} if required else {}),
        }

    places = ("target", "environment", "fd")
    secret = table(SECRET_FIELDS, ("source",)) | {"oneOf": [{"required": [one]} for one in places]}
    member = table(MEMBER_FIELDS, ("source",))
    document = table(
        DOCUMENT_FIELDS,
        ("target", "format", "secrets"),
        format={"enum": ["json", "dotenv"]},
        secrets={"type": "object", "additionalProperties": member, "minProperties": 1},
    )
    variable = {"oneOf": [{"type": "string"}, table(VARIABLE_FIELDS)]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "manifest of attestor inject",
        **table(
            TOP_FIELDS,
            variables={"type": "object", "additionalProperties": variable},
            secret={"type": "array", "items": secret},
            document={"type": "array", "items": document},
            file={"type": "array", "items": table(FILE_FIELDS, ("source", "target"))},
        ),
    }
