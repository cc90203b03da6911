"""What of the SDK a command imports, and that the rest is still there for whoever asks."""

from __future__ import annotations

import subprocess
import sys

import pytest

UNREAD = ("botocore.docs.docstring", "botocore.docs.service", "html.parser", "importlib.metadata")


def python(program: str) -> str:
    """What a program prints that imported sessions as a command does."""
    command = [sys.executable, "-W", "error", "-c", f"import attestor_io.sdk_data\n{program}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_what_no_command_reads_is_not_imported() -> None:
    found = python("import sys; print(*sys.modules)").split()
    assert set(UNREAD).isdisjoint(found)
    assert "botocore.client" in found


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import importlib.metadata as m; print(bool(m.version('botocore')))", "True"),
        ("from urllib3 import http2; print(http2.version('urllib3') > '2')", "True"),
        ("from botocore.docs import generate_docs; print(generate_docs.__name__)", "generate_docs"),
        ("from botocore.docs.docstring import LazyLoadedDocstring as d; print(d.__module__)",
         "botocore.docs.docstring"),
    ],
)  # fmt: skip
def test_what_was_left_out_is_there_when_it_is_asked_for(program: str, said: str) -> None:
    assert python(program).strip() == said


def test_a_name_that_nobody_foresaw_is_the_real_ones() -> None:
    program = """
from attestor_io.sdk_import import _placeholders
import sys
with _placeholders():
    assert type(sys.modules["importlib.metadata"]).__name__ == "_Placeholder"
    from importlib.metadata import Distribution
    from botocore.docs.docstring import LazyLoadedDocstring
    from botocore.docs.service import ServiceDocumenter
import importlib.metadata
print(importlib.metadata.Distribution is Distribution)
"""
    assert python(program).strip() == "True"


def test_a_program_s_own_client_keeps_its_help() -> None:
    program = (
        "import attestor, boto3; print('botocore.docs.docstring' in __import__('sys').modules)"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "True\n"


def test_handlers_of_our_services_and_of_all() -> None:
    program = """
from botocore.session import Session
ours, theirs = attestor_io.sdk_data.new_session(), Session()
def handlers(session, event):
    emitter = session.get_component("event_emitter")._emitter
    return [getattr(one, "__qualname__", one) for one in emitter._handlers.prefix_search(event)]
stages = ["creating-client-class", "before-parameter-build", "before-call", "request-created",
    "before-sign", "choose-signer", "after-call", "needs-retry", "before-parse",
    "before-endpoint-resolution", "provide-client-params", "getattr", "choose-service-name"]
for service, operation in [("kms", "Decrypt"), ("s3", "GetObject"), ("s3", "ListObjects"),
        ("secrets-manager", "GetSecretValue"), ("ssm", "GetParameter"), ("sts", "AssumeRole"),
        ("sts", "AssumeRoleWithWebIdentity"), ("sso", "GetRoleCredentials"),
        ("sso-oidc", "CreateToken"), ("signin", "create_o_auth2_token")]:
    for stage in stages:
        event = f"{stage}.{service}.{operation}"
        found = handlers(ours, event)
        assert found == handlers(theirs, event), event
        print(len(found))
"""
    assert sum(map(int, python(program).split())) > 50
