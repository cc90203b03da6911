"""URLs in messages: no query, no fragment, no user, no password, whoever quotes them."""

from __future__ import annotations

import http.client
import os
from typing import TYPE_CHECKING, Final

import pytest
import urllib3
from hypothesis import given
from hypothesis import strategies as st

import attestor
from attestor_commands.inject.manifest import parse
from attestor_io import metadata, names
from attestor_io.errors import AttestorError, InputError
from attestor_io.urls import redact_urls, without_query

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Enclave

HIDDEN: Final = "5f6e7d8c"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"https://host/path?sig={HIDDEN}", "https://host/path?..."),
        (f"https://host/path#{HIDDEN}", "https://host/path?..."),
        (f"https://me:{HIDDEN}@host/path", "https://host/path"),
        (f"https://{HIDDEN}@host?a=b", "https://host?..."),
        (f"https://a@{HIDDEN}@host/", "https://host/"),
        (f"https://host/?a=/b?c= {HIDDEN}", "https://host/?..."),
        ("https://host/a@b", "https://host/a@b"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("/a/file?of=this#name", "/a/file?of=this#name"),
        (f"host/path?sig={HIDDEN}", "host/path?..."),
        (f"https:/host/path?sig={HIDDEN}", "https:/host/path?..."),
        (f"https:host/path?sig={HIDDEN}", "https:host/path?..."),
        (f"//me:{HIDDEN}@host/path?sig={HIDDEN}", "//host/path?..."),
        (f"https:/me:{HIDDEN}@host/path", "https:/host/path"),
        (f"me:{HIDDEN}@host/path", "host/path"),
        ("-", "-"),
    ],
)
def test_what_is_shown(url: str, shown: str) -> None:
    assert without_query(url) == shown
    if " " not in url and "://" in url:  # in a sentence nothing else is known for one
        assert redact_urls(f"source {url} is late") == f"source {shown} is late"


@given(st.text(alphabet=st.characters(exclude_categories=("Z", "C"), exclude_characters="@")))
def test_any_query(query: str) -> None:
    url = f"https://host/path?{query}{HIDDEN}"
    for text in (without_query(url), redact_urls(f"(see '{url}', now)"), redact_urls(repr(url))):
        assert HIDDEN not in text


def urllib3_refused() -> None:
    urllib3.PoolManager(retries=0).request("GET", f"https://127.0.0.1:1/x?sig={HIDDEN}")


def urllib3_elsewhere() -> None:
    pool = urllib3.HTTPConnectionPool("127.0.0.1", 1)
    pool.urlopen("GET", f"http://elsewhere/x?sig={HIDDEN}", assert_same_host=True)


def http_control() -> None:
    http.client.HTTPConnection("127.0.0.1").putrequest("GET", f"/x?sig={HIDDEN}\t")


@pytest.mark.parametrize("quoting", [urllib3_refused, urllib3_elsewhere, http_control])
def test_what_libraries_quote(quoting: Callable[[], None]) -> None:
    with pytest.raises(Exception, match=HIDDEN) as caught:
        quoting()
    assert HIDDEN not in str(AttestorError(f"it cannot be read: {caught.value}"))
    late = AttestorError("")
    late.args = (f"source: {caught.value}",)
    assert HIDDEN not in str(late)


@pytest.mark.parametrize(
    "message",
    ["did you mean eu-west-1?", "is this endpoint AWS KMS? 'no'", "a pattern (?:a|b)?c", "a/b ?c"],
)
def test_other_question_marks_stay(message: str) -> None:
    assert redact_urls(message) == message


def test_long_messages_take_no_longer_than_their_length() -> None:
    for piece in ("x", "'/", "://@", "/?", "a://"):
        redact_urls(piece * 200_000)


def test_notes_are_shown_so_too(capsys: pytest.CaptureFixture[str]) -> None:
    attestor.say("note", f"KMS at https://host/?token={HIDDEN}")
    assert capsys.readouterr().err == "attestor: note: KMS at https://host/?...\n"


# -- where URLs come from


@pytest.mark.parametrize(
    "source",
    [
        f"https://host?sig={HIDDEN}",
        f"https://host/a/../b?sig={HIDDEN}",
        f"https://host/a?b c&sig={HIDDEN}",
        f"https://me:{HIDDEN}@host/a",
        f"http://host/a?sig={HIDDEN}",
        f"http://host/a?b c&sig={HIDDEN}",
        f"ftp://me:{HIDDEN}@host/a",
        f"s3://bucket/key?sig={HIDDEN}",
        f"https://host/a?sig={HIDDEN}#x",
        f"host/a?sig={HIDDEN}",
        f"https:/host/a?sig={HIDDEN}",
        f"https:me:{HIDDEN}@host/a",
        f"//me:{HIDDEN}@host/a?sig={HIDDEN}",
    ],
)
def test_a_source_that_is_refused(source: str) -> None:
    text = f"""
        any_key = true
        [[secret]]
        source = "{source}"
        target = "/run/a"
        unbound = true
    """
    with pytest.raises(InputError, match="source") as caught:
        parse(text.encode(), {}, {})
    assert HIDDEN not in str(caught.value)


@pytest.mark.parametrize(
    "rest", [f"me:{HIDDEN}@host/", f"host/?token={HIDDEN}", f"host/?a b&token={HIDDEN}"]
)
def test_an_endpoint_that_is_refused(rest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no endpoint") as caught:
        names.parse_endpoint(f"https://{rest}", "--endpoint-url")
    assert HIDDEN not in str(caught.value)
    monkeypatch.setenv(metadata.ENDPOINT_VARIABLE, f"http://{rest}")
    with pytest.raises(InputError, match="no endpoint") as caught:
        metadata.region()
    assert HIDDEN not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:1/x?token={HIDDEN}"),
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://elsewhere/x?token={HIDDEN}"),
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://me:{HIDDEN}@127.0.0.1:1/"),
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://[bad?token={HIDDEN}"),
        ("AWS_ENDPOINT_URL_KMS", f"https://127.0.0.1:1/?token={HIDDEN}"),
        ("AWS_ENDPOINT_URL_KMS", f"http://127.0.0.1:1/?token={HIDDEN}"),
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"me:{HIDDEN}@h/x?token={HIDDEN}"),
        ("AWS_ENDPOINT_URL_KMS", f"kms.example?token={HIDDEN}"),
        ("AWS_ENDPOINT_URL_KMS", f"me:{HIDDEN}@kms.example"),
        ("HTTPS_PROXY", f"http://me:{HIDDEN}@127.0.0.1:1"),
        ("HTTPS_PROXY", f"http://me:{HIDDEN}/x@127.0.0.1:1"),
        ("HTTPS_PROXY", f"http://{HIDDEN}:x/y@127.0.0.1:1"),
        ("HTTPS_PROXY", f"http://[{HIDDEN}"),
        ("HTTPS_PROXY", f"http://me:{HIDDEN}@h:99999"),
    ],
)
def test_a_url_of_the_environment(enclave: Enclave, variable: str, url: str) -> None:
    enclave.place(os.urandom(200))
    environment: dict[str, str | None] = {variable: url, "AWS_MAX_ATTEMPTS": "1"}
    if "PROXY" in variable:
        environment |= {"NO_PROXY": None, "no_proxy": None}
    if "ENDPOINT_URL" not in variable and "PROXY" not in variable:
        gone = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
        environment |= dict.fromkeys((*gone, "AWS_EC2_METADATA_DISABLED"))
    for command in (["decrypt", "-v", "--any-key", "blob", "out"], ["doctor"]):
        run = enclave.attestor(*command, environment=environment)
        assert run.status in {2, 4, 5}, run.err
        assert HIDDEN not in run.err + run.out.decode()
