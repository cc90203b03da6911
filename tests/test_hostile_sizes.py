"""Everything that is read from outside, as large and as odd as it may be: linear time, errors of
ours.

The bound is one of CPU time, and orders of magnitude above what a linear parser takes.
"""

from __future__ import annotations

import contextlib
import json
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import pytest

from attestor_commands import arguments, public_keys
from attestor_commands.arguments import ArgumentError
from attestor_commands.inject.manifest import MANIFEST_MAX, parse
from attestor_commands.inputs import FILE_MAX
from attestor_io import names, refusal, urls
from attestor_io.ciphertext import head_size, take_ciphertext
from attestor_io.deadline import Deadline
from attestor_io.errors import InputError
from attestor_io.reading import Base64Text
from keypolicy import PolicyError, measure
from keypolicy.model import POLICY_MAX, read_json
from tests.test_messages import Stream

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MOST: Final = 10.0  # seconds of CPU for a MiB, of which what is not linear takes minutes and hours
OURS: Final = (InputError, PolicyError, ArgumentError)


def refused_in_time(use: Callable[[Any], object], data: Any, most: float = MOST) -> None:
    """Call it with hostile data: it returns, or raises an error of ours, before long."""
    begin = time.thread_time()
    with contextlib.suppress(*OURS):
        use(data)
    assert time.thread_time() - begin < most


HEAD: Final = 'key_id = "1234abcd-12ab-34cd-56ef-1234567890ab"\n'
SECRET: Final = f'{HEAD}[[secret]]\nunbound = true\ntarget = "/run/x"\nsource = "'
TARGET: Final = f'{HEAD}[[secret]]\nunbound = true\nsource = "-"\ntarget = "'
LINES: Final = MANIFEST_MAX // 200


def filled(begin: str, repeated: str, end: str = "") -> str:
    """A manifest as long as one may be."""
    return begin + repeated * ((MANIFEST_MAX - len(begin) - len(end)) // len(repeated)) + end


@pytest.mark.parametrize(
    "text",
    [
        filled("", "a.", "a = 1"),
        filled("", '"a".', "a = 1"),
        filled("", "a . ", "a = 1"),
        filled("[", "a.", "a]"),
        filled("[[", "a.", "a]]"),
        filled("x = {", "a.", "a = 1}"),
        filled('x = {y = """\n\' """, ', "a.", "a = 1, c=''}"),
        "\n".join(f"a{number}.{'b.' * 90}c = 1" for number in range(LINES)),
        "\n".join(f"[{'b.' * 90}c{number}]" for number in range(LINES)),
        filled("x = ", "["),
        filled("x = ", "{a="),
        filled("x = ", "9"),
        filled("x = 0x", "f"),
        filled("timeout = 1e", "9"),
        filled('x = "', "\\n", '"'),
        filled('x = """', "\\\n", '"""'),
        filled(HEAD, "a", " = 1"),
        filled(HEAD, "[[secret]]\n"),
        HEAD + "[variables]\n" + "".join(f'A{n} = ""\n' for n in range(LINES)) + SECRET + '${B}"\n',
        filled(SECRET, "${", '"\n'),
        filled(f"{SECRET}s3://", "a.", '/"\n'),
        filled(f"{SECRET}https://h/", "?", '"\n'),
        filled(TARGET, "/a", '"\n'),
        filled(f"{TARGET}/", "../", '"\n'),
        filled(f'{TARGET}/run/x"\nowner = "', "9", '"\n'),
        filled(f'{TARGET}/run/x"\nmode = "0', "7", '"\n'),
        filled('key_id = "arn:aws', "-a", '"\n[[secret]]\nunbound = true\n'),
        filled('vsock = "', "1", ':1"\n'),
    ],
    ids=lambda text: repr(text[:12]),
)
def test_a_manifest(text: str) -> None:
    assert len(text) <= MANIFEST_MAX
    refused_in_time(lambda data: parse(data, {}, {}), text.encode())


def test_a_manifest_with_dots_in_its_values() -> None:
    many = "".join(
        f'[[secret]]\nunbound = true\nsource = "https://a.b.c.example.org/v1.2.3/{number}.enc"\n'
        f'target = "/run/secrets.d/{number}.key"\n'
        for number in range(300)
    )
    assert len(parse((HEAD + 'region = "eu-west-1"\n' + many).encode(), {}, {}).entries) == 300
    dotted = HEAD + "variables.NODE.pattern = '[0-9.]{1,9}'\nvariables.NODE.tag = 'a.b'\n"
    with pytest.raises(InputError, match="0 secrets and files"):
        parse(dotted.encode(), {"NODE": "1"}, {})


@pytest.mark.parametrize("end", [b"", b"-----END PUBLIC KEY-----"])
@pytest.mark.parametrize(
    "filling", [b"\n", b" ", b"A", b"A\n", b"=", b"-----BEGIN PUBLIC KEY-----"]
)
def test_a_public_key(tmp_path: Path, filling: bytes, end: bytes) -> None:
    begin, size = b"-----BEGIN PUBLIC KEY-----", 2 * public_keys.PUBLIC_KEY_MAX
    path = tmp_path / "key"
    path.write_bytes(begin + filling * ((size - 60) // len(filling)) + end)
    refused_in_time(lambda name: public_keys.read_public_key(name, Deadline(60)), str(path), 1)


@pytest.mark.parametrize(
    "filling", [b"\n", b"-", b"a: b\n", b"A", b"-----BEGIN CERTIFICATE-----\n"]
)
@pytest.mark.parametrize("end", [b"", b"\n-----END CERTIFICATE-----\n"])
def test_a_certificate(filling: bytes, end: bytes) -> None:
    begin = b"-----BEGIN CERTIFICATE-----\n"
    data = begin + filling * ((FILE_MAX - 60) // len(filling)) + end
    refused_in_time(arguments.parse_certificate, data)


@pytest.mark.parametrize(
    "text",
    [
        "[" * POLICY_MAX,
        '{"a":' * (POLICY_MAX // 5),
        "9" * POLICY_MAX,
        " " * POLICY_MAX,
        "[\n" * (POLICY_MAX // 2),
        "\t\n" * (POLICY_MAX // 2),
        "[" + "\n" * (POLICY_MAX - 1),
        "{" + '"a":1,' * (POLICY_MAX // 6 - 1) + "}",
        json.dumps({"HashAlgorithm": "Sha" + "3" * 100_000, "PCR0": "a" * 96}),
        json.dumps({"HashAlgorithm": "Sha384_" + "4" * 100_000, "PCR0": "a" * 96}),
        json.dumps({"HashAlgorithm": "sha" * 30_000, "PCR0": "a" * 96}),
        json.dumps({"PCR" + "0" * 100_000: "a" * 96}),
        json.dumps({"PCR0": "9" * 100_000}),
    ],
    ids=lambda text: repr(text[:12]),
)
def test_json(text: str) -> None:
    assert len(text) <= POLICY_MAX
    refused_in_time(read_json, text)
    refused_in_time(measure.measurements, text.encode())


@pytest.mark.parametrize("begin", ["", "arn:aws", "arn:aws:kms:", "alias/", "arn:aws:kms:a:1:key/"])
@pytest.mark.parametrize("filling", ["a", "-a", "a-", ":", "/", "1", "\n"])
def test_names(begin: str, filling: str) -> None:
    text = begin + filling * (100_000 // len(filling))
    refused_in_time(lambda name: names.parse_key_id(name, "it"), text)
    refused_in_time(lambda name: names.parse_endpoint(f"https://{name}", "it"), text)
    refused_in_time(lambda name: names.resolve_region(name, None, {}), text)
    refused_in_time(lambda name: names.key_arn_here(name, "eu-west-1"), text)


@pytest.mark.parametrize(
    "part",
    ["User: arn:", "User: arn:a:sts::1", "on resource: arn:", "https://a?b ", "://", "@", "'/a?",
     "1", "(", "Mon, ", " ", ":"],
)  # fmt: skip
def test_what_a_server_says(part: str) -> None:
    text = part * ((1 << 18) // len(part))

    def explain(message: str) -> object:
        return refusal.explain(
            refusal.Refusal(
                code="AccessDeniedException",
                message=message,
                pcrs={0: bytes(48)},
                key_id=None,
                context=(),
                skew=refusal.clock_skew(f"Mon, 01 Jan 2026 00:00:00 {message}", datetime.now(UTC)),
            )
        )

    refused_in_time(explain, text)
    refused_in_time(urls.redact_urls, text)
    refused_in_time(urls.without_query, text)


@pytest.mark.parametrize(
    "filling", [b"A", b"A\n", b"\n", b"=", b"0", b"a ", b"{", b"[", b'"', b"\0A"]
)
def test_a_ciphertext(filling: bytes) -> None:
    for base64_text in (False, True):
        size = head_size(base64_text=base64_text)

        def take(data: bytes, base64_text: bool = base64_text) -> object:
            return take_ciphertext(data, Stream(b""), "it", base64_text=base64_text, message=True)

        refused_in_time(take, filling * (size // len(filling)))


@pytest.mark.parametrize("filling", [b"AAAA", b"A   ", b"\n\n\n\n", b"A\nAA"])
def test_a_long_base64_text(filling: bytes) -> None:
    refused_in_time(lambda text: Base64Text(Stream(text), "it").read(), filling * (1 << 20))


@pytest.mark.parametrize("part", ["9", "2026", "T", "1.", "-"])
def test_times_and_numbers(part: str) -> None:
    text = part * 100_000
    refused_in_time(arguments.parse_time, text)
    refused_in_time(arguments.parse_age, text)
    refused_in_time(arguments.parse_pcr, f"{text}={text}")
    refused_in_time(arguments.parse_pcr, f"0={text}")
