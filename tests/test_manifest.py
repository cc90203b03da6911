"""The manifest: what it may say, and that no variable makes it say something else."""

from __future__ import annotations

import os
import tomllib
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestor import InputError
from attestor_commands.inject.fields import json_schema
from attestor_commands.inject.manifest import ENTRIES_MAX, Entry, Manifest, parse
from attestor_commands.inject.places import FORMATS

if TYPE_CHECKING:
    from pathlib import Path

    from attestor_io.deadline import Deadline

ARN: Final = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
TOP: Final = f'region = "eu-west-1"\nkey_id = "{ARN}"\n'
SECRET: Final = '[[secret]]\nsource = "/in/a"\ntarget = "/out/a"\ncontext = {node = "3"}\n'
FILE: Final = (
    '[[file]]\nsource = "https://config.example/app"\ntarget = "/out/f"\nunauthenticated = true\n'
)


def read(
    text: str, given: dict[str, str] | None = None, environment: dict[str, str] | None = None
) -> Manifest:
    return parse(text.encode(), given or {}, environment or {})


def refused(text: str, *parts: str, given: dict[str, str] | None = None) -> None:
    with pytest.raises(InputError) as caught:
        read(text, given)
    for part in parts:
        assert part in " ".join([str(caught.value), *caught.value.hints])


def secret(**keys: str) -> str:
    """A manifest with one secret; values are TOML, and "" leaves a key out."""
    table = {"source": '"/in/a"', "target": '"/out/a"', "context": '{node = "3"}', **keys}
    return (
        TOP
        + "[[secret]]\n"
        + "".join(f"{name} = {value}\n" for name, value in table.items() if value)
    )


def file(**keys: str) -> str:
    table = {"source": '"/in/f"', "target": '"/out/f"', "unauthenticated": "true", **keys}
    return (
        TOP
        + "[[file]]\n"
        + "".join(f"{name} = {value}\n" for name, value in table.items() if value)
    )


def only(manifest: Manifest) -> Entry:
    (entry,) = manifest.entries
    return entry


def test_the_least_a_manifest_says() -> None:
    text = f"""
region = "eu-west-1"
key_id = "{ARN}"
[variables]
NODE = "[0-9]{{1,4}}"
[[secret]]
source = "s3://bucket/node-${{NODE}}/encryptor-key.enc"
target = "/run/secrets/encryptor-key"
context = {{ node = "${{NODE}}" }}
[[file]]
source = "https://config.example/app.toml"
target = "/run/app.toml"
sha256 = "{"0" * 64}"
"""
    manifest = read(text, {"NODE": "12"})
    first, second = manifest.entries
    assert (first.source, first.context) == (
        "s3://bucket/node-12/encryptor-key.enc",
        {"node": "12"},
    )
    assert (first.key_id, first.place.mode, first.place.owner, first.base64) == (
        ARN,
        0o600,
        (-1, -1),
        False,
    )
    assert (second.kind, second.sha256) == ("file", "0" * 64)
    assert (manifest.deadline.seconds, manifest.concurrency, manifest.pass_credentials) == (
        60.0,
        3,
        False,
    )


def test_everything_a_manifest_may_say() -> None:
    text = f"""
region = "eu-west-1"
any_key = true
endpoint_url = "https://kms-fips.eu-west-1.amazonaws.com"
ca_bundle = "/etc/ca.pem"
https_ca_bundle = "/etc/web.pem"
vsock = "3:8000"
imds_vsock = "3:8001"
s3_vsock = "3:8002"
timeout = 30
concurrency = 2
pass_credentials = true
[[secret]]
source = "-"
target = "/out/a"
unbound = true
key_id = "alias/x"
grant_tokens = ["one"]
encoding = "base64"
mode = "0644"
world_readable = true
owner = "{os.getuid()}:{os.getgid()}"
max_bytes = 100
signed = true
form = "message"
context_contains = true
"""
    manifest = read(text)
    assert (manifest.vsock, manifest.imds_vsock, manifest.s3_vsock) == (
        (3, 8000),
        (3, 8001),
        (3, 8002),
    )
    assert (manifest.deadline.seconds, manifest.concurrency, manifest.pass_credentials) == (
        30.0,
        2,
        True,
    )
    assert (manifest.ca_bundle, manifest.https_ca_bundle) == ("/etc/ca.pem", "/etc/web.pem")
    entry = only(manifest)
    assert (entry.place.mode, entry.place.owner) == (0o644, (os.getuid(), os.getgid()))
    assert (entry.form, entry.bound.contains) == ("message", True)
    assert (entry.base64, entry.signed, entry.max_bytes, entry.grant_tokens) == (
        True,
        True,
        100,
        ("one",),
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "0 secrets and files"),
        ("=", "not TOML"),
        ("\udcff", "not TOML"),
        ("a = " + "[" * 5000, "not TOML"),
        ("regoin = 'x'\n" + TOP + SECRET, "did you mean region?"),
        (TOP.replace('"eu-west-1"', "3") + SECRET, "region must be a string"),
        (TOP + "timeout = 0\n" + SECRET, "timeout must be a number from 1"),
        (TOP + "timeout = true\n" + SECRET, "timeout must be a number from 1"),
        (TOP + "concurrency = 65\n" + SECRET, "concurrency must be"),
        (TOP + "secret = 3", "secret must be a list of tables"),
        (TOP + "[secret]\nsource = 'x'", "secret must be a list of tables"),
        (TOP + "vsock = '3'\n" + SECRET, "no vsock address"),
        (TOP + "vsock = '3:4294967296'\n" + SECRET, "no vsock address"),
        (TOP + "endpoint_url = 'http://localhost'\n" + SECRET, "endpoint_url is not https"),
        (TOP.replace(ARN, "arn:x") + SECRET, "is no key ARN"),
        (TOP.replace(ARN, "alias/x") + SECRET, "no key is pinned"),
        (TOP.replace(f'key_id = "{ARN}"', "") + SECRET, "no key is pinned"),
        (TOP + SECRET + SECRET, "/out/a is there twice"),
        (TOP + SECRET + SECRET.replace("/out/a", "/out/a/b"), "/out/a/b is inside target /out/a"),
        (TOP + SECRET.replace("/in/a", "-") + SECRET.replace("/in/a", "-").replace("/out/a", "/b"),
         "two sources"),
        (TOP + (SECRET * (ENTRIES_MAX + 1)), f"expected 1 to {ENTRIES_MAX}"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be(text: str, part: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text.encode(errors="surrogateescape"), {}, {})
    assert part in " ".join([str(caught.value), *caught.value.hints])


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"contexts": "1"}, "did you mean context?"),
        ({"source": ""}, "no source"),
        ({"target": ""}, "no target"),
        ({"context": ""}, "has no context"),
        ({"context": "{}"}, "has no context"),
        ({"context": "{node = 3}"}, "context must be a table of strings"),
        ({"context": '["node"]'}, "context must be a table of strings"),
        ({"unbound": "true"}, "has a context, and unbound"),
        ({"grant_tokens": '"x"'}, "list of strings"),
        ({"encoding": '"hex"'}, "neither raw nor base64"),
        ({"form": '"both"'}, "neither blob nor message"),
        ({"form": '"blob"', "signed": "true"}, "signed = true, which is of messages"),
        ({"form": '"blob"', "context_contains": "true"}, "context_contains = true, which is of"),
        ({"mode": '"600"'}, "is not one such as 0600"),
        ({"mode": '"4755"'}, "is not one such as 0600"),
        ({"mode": "600"}, "mode must be a string"),
        ({"mode": '"0604"'}, "opens it to everybody"),
        ({"mode": '"0601"'}, "opens it to everybody"),
        ({"owner": '"no-such-user-here"'}, "not known here"),
        ({"owner": '"0:no-such-group-here"'}, "not known here"),
        ({"owner": '"4294967295"'}, "not known here"),
        ({"max_bytes": "0"}, "max_bytes must be a number from 1"),
        ({"target": '"out"'}, "not an absolute path"),
        ({"target": '"/"'}, "names a folder"),
        ({"target": '"/out/"'}, "names a folder"),
        ({"target": '"/out/../etc/passwd"'}, "not in its shortest form"),
        ({"target": '"/out/./a"'}, "not in its shortest form"),
        ({"target": '"//out"'}, "not in its shortest form"),
        ({"target": '"/out/a\\n"'}, "not in its shortest form"),
        ({"source": '"in"'}, "no absolute path"),
        ({"source": '""'}, "no absolute path"),
        ({"source": '"/in/../x"'}, "not in its shortest form"),
        ({"source": '"http://host/x"'}, "is not https"),
        ({"source": '"ftp://host/x"'}, "no absolute path"),
        ({"source": '"https://host"'}, "no absolute path"),
        ({"source": '"https://user@host/x"'}, "names no host"),
        ({"source": '"https://host/x#y"'}, "names no host"),
        ({"source": '"https://host/a/../b"'}, "not in its shortest form"),
        ({"source": '"https://host/a b"'}, "not in its shortest form"),
        ({"source": '"s3://BUCKET/key"'}, "names no object"),
        ({"source": '"s3://bucket/"'}, "names no object"),
        ({"source": f'"s3://bucket/{"x" * 1025}"'}, "names no object"),
        ({"source": '"s3://bucket/key?versionId=1"'}, "has a query"),
        ({"source": '"s3://bucket/a\\tb"'}, "not in its shortest form"),
        ({"source": '"s3://bucket/a/../b"'}, "not in its shortest form"),
        ({"key_id": '"alias/x"'}, "no key is pinned"),
        ({"key_id": '"x"'}, "secret 1: key_id x is no key ARN"),
        ({"sha256": '"x"'}, "unknown key sha256"),
    ],
)  # fmt: skip
def test_a_secret_that_cannot_be(keys: dict[str, str], part: str) -> None:
    refused(secret(**keys), part)


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"unauthenticated": ""}, "either sha256 or unauthenticated"),
        ({"unauthenticated": "false"}, "either sha256 or unauthenticated"),
        ({"sha256": f'"{"0" * 64}"'}, "either sha256 or unauthenticated"),
        ({"unauthenticated": "", "sha256": '"00"'}, "64 lower-case"),
        ({"context": '{node = "3"}'}, "unknown key context"),
    ],
)
def test_a_file_that_cannot_be(keys: dict[str, str], part: str) -> None:
    refused(file(**keys), part)


# -- variables


def with_variable(declaration: str, **keys: str) -> str:
    table = {"source": '"/in/${V}/a"', "target": '"/out/a"', "context": '{v = "${V}"}', **keys}
    return (
        TOP
        + f"[variables]\nV = {declaration}\n[[secret]]\n"
        + "".join(f"{k} = {v}\n" for k, v in table.items())
    )


def test_a_value_comes_from_the_option_before_the_environment() -> None:
    text = with_variable('""')
    assert only(read(text, {"V": "option"}, {"V": "environment"})).source == "/in/option/a"
    assert only(read(text, {}, {"V": "environment"})).source == "/in/environment/a"


def test_a_variable_is_filled_in_only_where_it_is_declared() -> None:
    refused(secret(source='"/in/${HOME}"'), "undeclared variable HOME")
    refused(with_variable('""', source='"/in/${W}"'), "undeclared variable W", given={"V": "x"})
    refused(with_variable('""', source='"/in/${V"'), "${ without a name", given={"V": "x"})
    refused(with_variable('""', source='"/in/${}"'), "${ without a name", given={"V": "x"})
    refused(with_variable('""'), "variable V has no value")
    refused(with_variable('""'), "declares no such variable", given={"V": "x", "W": "y"})
    assert (
        only(
            read(with_variable('""', source='"/in/$V"', context='{v = "${V}"}'), {"V": "x"})
        ).source
        == "/in/$V"
    )


def test_an_unused_variable_needs_no_value() -> None:
    assert only(read(with_variable('""', source='"/in/a"', context='{v = "1"}'))).source == "/in/a"


@pytest.mark.parametrize(
    ("pattern", "value"),
    [
        ("", "a/b"),
        ("", ""),
        ("", "a" * 65),
        ("", "a\n"),
        ("[0-9]{1,4}", "12345"),
        ("[0-9]{1,4}", "12\n"),
        ("[0-9]{1,4}", "x12"),
        ("[0-9]{1,4}", "\u0663"),
        (".*", "a\x00"),
        (".*", "a\u202e"),
        (".*", "a" * 1025),
    ],
)
def test_a_value_must_match_its_pattern_in_full(pattern: str, value: str) -> None:
    refused(with_variable(f'"{pattern}"'), "does not match", given={"V": value})


@pytest.mark.parametrize("value", [".", "..", "", "../x", "a/b", "a\\b", "a?b", "a#b", "a%2e"])
def test_a_value_is_never_more_than_a_part_of_a_path(value: str) -> None:
    refused(with_variable('"(?s:.*)"'), "is no part of a path", given={"V": value})


def test_dots_do_not_add_up() -> None:
    refused(with_variable('"[.x]+"', source='"/in/.${V}"'), "no part of a path", given={"V": "."})
    refused(
        with_variable('"[.x]+"', source='"/in/${V}${V}"'), "no part of a path", given={"V": "."}
    )


@pytest.mark.parametrize(
    "source",
    ["${V}", "${V}//host/x", "https://${V}/x", "https://a.${V}/x", "s3://${V}/k", "s3:${V}"],
)
def test_a_variable_chooses_neither_scheme_nor_host_nor_bucket(source: str) -> None:
    refused(with_variable('".*"', source=f'"{source}"'), "only in the path", given={"V": "https:"})


def test_a_value_is_not_expanded_again() -> None:
    text = with_variable('".*"', source='"/in/a"').replace("V = ", 'W = ""\nV = ')
    assert only(read(text, {"V": "${W}", "W": "x"})).context == {"v": "${W}"}


@pytest.mark.parametrize(
    ("declaration", "part"),
    [
        ("3", "a pattern, or a table"),
        ('"("', "no regular expression"),
        ("{ patern = 'x' }", "did you mean pattern?"),
        ("{ tag = 'a key' }", "tags/instance/a key is no path of instance metadata"),
    ],
)
def test_a_declaration_that_cannot_be(declaration: str, part: str) -> None:
    given = {} if "tag" in declaration else {"V": "x"}
    refused(with_variable(declaration), part, given=given)


def test_a_tag_is_asked_for_where_the_manifest_says_or_the_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, tuple[int, int] | None]] = []

    def tag(name: str, address: tuple[int, int] | None, _deadline: Deadline) -> str:
        asked.append((name, address))
        return "3"

    monkeypatch.setattr("attestor_io.metadata.tag", tag)
    text = with_variable("{ tag = 'Node' }")
    assert only(read(text)).context == {"v": "3"}
    text = 'imds_vsock = "3:8002"\n' + text
    assert read(text, {"V": "4"}).imds_vsock == (3, 8002)
    assert read(text).imds_vsock == (3, 8002)
    assert parse(text.encode(), {}, {}, {"imds_vsock": (4, 1), "vsock": None}).imds_vsock == (4, 1)
    assert asked == [("Node", None), ("Node", (3, 8002)), ("Node", (4, 1))]


def test_addresses_of_the_caller_win() -> None:
    given: dict[str, tuple[int, int] | None] = {
        "vsock": (4, 1),
        "imds_vsock": None,
        "s3_vsock": (4, 3),
    }
    manifest = parse(('vsock = "3:1"\nimds_vsock = "3:2"\n' + TOP + SECRET).encode(), {}, {}, given)
    assert (manifest.vsock, manifest.imds_vsock, manifest.s3_vsock) == ((4, 1), (3, 2), (4, 3))
    assert read(TOP + SECRET).vsock is None


def test_two_paths_to_one_target(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    one, other = (SECRET.replace("/out/a", f"{tmp_path}/{name}/a") for name in ("real", "link"))
    refused(TOP + one + other, "is there twice")


@settings(max_examples=300)
@given(st.text(max_size=80), st.text(max_size=30))
def test_only_our_error_escapes(text: str, value: str) -> None:
    document = with_variable('"(?s:.*)"') + text
    try:
        manifest = parse(document.encode(errors="replace"), {"V": value}, {})
    except InputError:
        return
    assert only(manifest).source == f"/in/{value}/a"
    assert "/" not in value


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_no_manifest(data: bytes) -> None:
    with pytest.raises(InputError):
        parse(data, {}, {})


# -- the schema


def test_the_schema_knows_the_keys_that_the_parser_knows() -> None:
    schema = json_schema()
    text = with_variable('"x"')
    table: dict[str, Any] = tomllib.loads(text)
    assert set(table) <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    for name in ("secret", "file"):
        assert schema["properties"][name]["items"]["additionalProperties"] is False
        assert schema["properties"][name]["items"]["required"][0] == "source"
    document = schema["properties"]["document"]["items"]
    assert document["additionalProperties"] is False
    assert document["properties"]["format"]["enum"] == list(FORMATS)
    members = document["properties"]["secrets"]["additionalProperties"]["properties"]
    secret = set(schema["properties"]["secret"]["items"]["properties"])
    places = {"target", "environment", "fd", "mode", "owner", "world_readable"}
    assert secret - places == set(members)
