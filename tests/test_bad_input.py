"""Every bad input: one message, its exit status, no traceback, no target, no leftover."""

from __future__ import annotations

import base64
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Self

import pytest

from nitrosim.envelope import MALFORMED

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Enclave, Run

ARN: Final = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
BLOB: Final = bytes(range(256)) * 2


def refused(enclave: Enclave, run: Run, status: int, *parts: str) -> str:
    """Check the contract of a refusal and return its message."""
    assert run.status == status, run.err
    assert run.out == b""
    assert "Traceback" not in run.err
    assert "out" not in enclave.files()
    assert not [name for name in enclave.files() if name.startswith(".")]
    assert all(
        line.startswith(
            ("attestor: error: ", "attestor: note: ", "attestor: hint: ", "attestor: warning: ")
        )
        for line in run.err.splitlines()
    )
    for part in parts:
        assert part in run.err
    return run.error


# -- the ciphertext


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (bytes(6145), "longer than the 6144 bytes"),
        (base64.b64encode(BLOB), "is base64 text"),
        (base64.encodebytes(BLOB), "is base64 text"),
    ],
)
def test_a_file_that_is_no_ciphertext(enclave: Enclave, data: bytes, part: str) -> None:
    enclave.place(data)
    refused(enclave, enclave.decrypt(), 2, part)


@pytest.mark.parametrize(
    "data", [b"no*base64", b"AAAA=AAA", base64.b64encode(bytes(6145)), b"A" * 20000, b"A", b"="]
)
def test_text_that_is_no_base64(enclave: Enclave, data: bytes) -> None:
    enclave.place(data)
    refused(enclave, enclave.decrypt("--base64"), 2)


def test_a_ciphertext_that_cannot_be_read(enclave: Enclave) -> None:
    assert "No such file" in refused(enclave, enclave.decrypt(), 2)
    (enclave.folder / "blob").mkdir()
    assert "directory" in refused(enclave, enclave.decrypt(), 2)
    run = enclave.attestor("decrypt", "--any-key", "-", "out", stdin=b"")
    assert "standard input is empty" in refused(enclave, run, 2)
    closed = enclave.run(
        "sh", "-c", f"exec {sys.executable} -m attestor decrypt --any-key - out <&-"
    )
    assert "cannot be read" in refused(enclave, closed, 2)


# -- the options


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--region", "Mars"], "region Mars"),
        (["--region", ""], "--region is empty"),
        (["--nsm-library", ""], "--nsm-library is empty"),
        (["--endpoint-url", "https://localhost:99999"], "client of KMS cannot be made"),
        (["--region", "eu-west-1.evil.example"], "is not a region's name"),
        (["--region", "eu-west-1\n\x1b[2J"], "is not a region's name"),
        (["--context", "node"], "NAME=VALUE"),
        (["--context", "=3"], "NAME=VALUE"),
        (["--context", "node=3", "--context", "node=4"], "node twice"),
        (["--key-id", "arn:aws:kms:eu-west-1:1:key/x"], "is no key ARN"),
        (["--key-id", "arn:aws:s3:::bucket"], "is no key ARN"),
        (["--key-id", "1234"], "is no key ARN, key id or alias"),
        (["--key-id", ""], "is no key ARN"),
        (["--region", "us-east-1", "--key-id", ARN], "key ARN is in eu-west-1"),
        (["--any-key", "--key-id", ARN], "contradicts"),
        (["--endpoint-url", "http://localhost:1"], "not https"),
        (["--endpoint-url", "https://"], "endpoint"),
        (["--endpoint-url", "https://exa mple"], "endpoint"),
        (["--timeout", "soon"], "number of seconds"),
        (["--timeout", "0"], "number of seconds"),
        (["--timeout", "nan"], "number of seconds"),
        (["--timeout", "-1"], "number of seconds"),
        (["--algorithm", "ROT13"], "is none of"),
        (["--algorithm", "RSAES_OAEP_SHA_256"], "needs --key-id"),
        (["--frobnicate"], "no such option"),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be(enclave: Enclave, options: list[str], part: str) -> None:
    enclave.place(BLOB)
    refused(enclave, enclave.attestor("decrypt", *options, "blob", "out"), 2, part)


def test_a_missing_argument_and_one_too_many(enclave: Enclave) -> None:
    enclave.place(BLOB)
    refused(enclave, enclave.attestor("decrypt", "blob"), 2, "missing argument")
    refused(
        enclave, enclave.attestor("decrypt", "blob", "out", "more"), 2, "unexpected extra argument"
    )
    refused(enclave, enclave.attestor("frobnicate"), 2, "no such command")


def test_there_is_no_default_region(enclave: Enclave) -> None:
    enclave.place(BLOB)
    run = enclave.decrypt(environment={"AWS_REGION": None, "AWS_DEFAULT_REGION": None})
    refused(enclave, run, 2, "no region", "--region")


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_KMS"])
def test_an_insecure_endpoint_from_the_environment(enclave: Enclave, variable: str) -> None:
    enclave.place(BLOB)
    run = enclave.decrypt(
        environment={"AWS_ENDPOINT_URL_KMS": None, variable: "http://localhost:1"}
    )
    refused(enclave, run, 2, "endpoint http://localhost:1 is not https")


def test_an_insecure_endpoint_from_the_configuration(enclave: Enclave, tmp_path: Any) -> None:
    enclave.place(BLOB)
    config = tmp_path / "config"
    config.write_text(
        "[default]\nservices = lan\n[services lan]\nkms =\n  endpoint_url = http://localhost:1\n"
    )
    run = enclave.decrypt(
        environment={"AWS_ENDPOINT_URL_KMS": None, "AWS_CONFIG_FILE": str(config)}
    )
    refused(enclave, run, 2, "endpoint http://localhost:1 is not https")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_MAX_ATTEMPTS", "many"),
        ("AWS_MAX_ATTEMPTS", "-1"),
        ("AWS_RETRY_MODE", "never"),
        ("AWS_DEFAULTS_MODE", "odd"),
        ("AWS_ENDPOINT_URL_KMS", "https://[::1"),
        ("AWS_ENDPOINT_URL_KMS", "https://localhost:99999"),
    ],
)
def test_a_configuration_that_cannot_be(enclave: Enclave, variable: str, value: str) -> None:
    enclave.place(BLOB)
    refused(enclave, enclave.decrypt(environment={variable: value}), 2)


@pytest.mark.parametrize("bundle", [b"", b"no certificate"])
def test_a_ca_bundle_without_certificates(enclave: Enclave, bundle: bytes) -> None:
    enclave.place(BLOB)
    environment = {"AWS_CA_BUNDLE": enclave.place(bundle, "ca.pem")}
    refused(
        enclave,
        enclave.decrypt(environment=environment),
        2,
        "CA bundle cannot be read",
        "AWS_CA_BUNDLE",
    )


def test_a_ca_bundle_that_is_not_there(enclave: Enclave) -> None:
    enclave.place(BLOB)
    refused(
        enclave,
        enclave.decrypt(environment={"AWS_CA_BUNDLE": "/nowhere.pem"}),
        2,
        "CA bundle cannot be read",
        "AWS_CA_BUNDLE",
    )


# -- the module


def test_a_variable_for_completion_makes_nothing_look_done(enclave: Enclave) -> None:
    """click would print a script and exit with 0: only a call without arguments may ask for it."""
    asked: dict[str, str | None] = {"_ATTESTOR_COMPLETE": "bash_source"}
    enclave.place(enclave.encrypt())
    run = enclave.decrypt(environment=asked)
    assert (run.status, run.out, run.err) == (0, b"", "")
    assert (enclave.folder / "out").read_bytes() == b"the secret"
    assert b"complete" in enclave.attestor(environment=asked).out


def test_data_of_the_sdk_comes_from_nowhere_else(enclave: Enclave) -> None:
    """~/.aws/models could lead the name of KMS to another host, past --endpoint-url even."""
    enclave.place(enclave.encrypt())
    models = enclave.folder / "home" / ".aws" / "models"
    models.mkdir(parents=True)
    (models / "partitions.json").write_text("{", encoding="utf-8")
    (models / "endpoints.json").write_text("{", encoding="utf-8")
    home = str(enclave.folder / "home")
    assert enclave.decrypt(environment={"HOME": home}).status == 0
    (enclave.folder / "out").unlink()
    assert enclave.decrypt(environment={"AWS_DATA_PATH": str(models)}).status == 0


def test_outside_an_enclave(enclave: Enclave) -> None:
    enclave.place(BLOB)
    run = enclave.decrypt(environment={"LD_PRELOAD": None, "AWS_ACCESS_KEY_ID": None})
    refused(enclave, run, 3, "no Nitro Secure Module", "does not look like a Nitro Enclave")


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        ("nsm-internal-error", "InternalError"),
        ("nsm-invalid-operation", "InvalidOperation"),
        ("nsm-garbage", "refused"),
        ("nsm-wrong-kind", "InvalidResponse"),
        ("nsm-empty-random", "no bytes"),
    ],
)
def test_a_module_that_refuses(enclaves: Callable[..., Enclave], fault: str, part: str) -> None:
    enclave = enclaves(faults=[fault])
    enclave.place(BLOB)
    refused(enclave, enclave.decrypt(), 3, part)


@pytest.mark.parametrize("fault", ["silent-module", "silent-attestation"])
def test_a_module_that_does_not_answer_is_bounded_by_the_timeout(
    enclaves: Callable[..., Enclave], fault: str
) -> None:
    """Nobody else is blamed, KMS least of all."""
    enclave = enclaves(faults=[fault])
    enclave.place(BLOB)
    start = time.monotonic()
    reason = "the Nitro Secure Module does not answer within 2 seconds"
    refused(enclave, enclave.decrypt("--timeout", "2"), 3, reason)
    assert enclave.attestor("doctor", "--timeout", "2", "blob").status == 3
    assert time.monotonic() - start < 60


# -- credentials


def test_no_credentials(enclave: Enclave) -> None:
    enclave.place(BLOB)
    nothing = {
        name: None for name in enclave.environment if name.startswith("AWS_") and "KEY" in name
    }
    refused(enclave, enclave.decrypt(environment=nothing), 4, "no valid AWS credentials")
    refused(
        enclave,
        enclave.decrypt(environment={"AWS_SECRET_ACCESS_KEY": None}),
        4,
        "no valid AWS credentials",
    )
    refused(enclave, enclave.decrypt(environment={"AWS_PROFILE": "absent", **nothing}), 4, "absent")


@pytest.mark.parametrize(
    "token", ["a-secret-token\n", "a-secret-token\r\nHost: x", "a-secret-t\u00f6ken", "\udcff"]
)
def test_credentials_with_odd_characters_are_refused_and_not_repeated(
    enclave: Enclave, token: str
) -> None:
    enclave.place(BLOB)
    run = enclave.decrypt(environment={"AWS_SESSION_TOKEN": token})
    refused(enclave, run, 4, "no valid AWS credentials")
    assert "a-secret" not in run.err


MADE_UP: Final = (
    '{"AccessKeyId": "A", "SecretAccessKey": "a-secret", "Token": "%s", "Expiration": "%s"}'
)


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (5, "[" * 200000),
        (5, "[]"),
        (5, "null"),
        (4, '{"AccessKeyId": 1, "SecretAccessKey": "a-secret", "Token": "a-secret"}'),
        (4, '{"AccessKeyId": "A", "SecretAccessKey": 1, "Token": "a-secret"}'),
        (5, MADE_UP % ("a-secret", "99999999999-01-01")),
        (5, MADE_UP % ("a-secret", "soon")),
        (4, MADE_UP % (r"a-secret\nX: y", "2099-01-01T00:00:00Z")),
    ],
    ids=["deep", "list", "null", "number-id", "number-key", "far", "soon", "newline"],
)
def test_credentials_that_the_parent_made_up(enclave: Enclave, status: int, answer: str) -> None:
    """From a container credentials endpoint: whatever it says, one error that repeats nothing.

    One that answers what no source does may do better the next time: 5.
    """
    enclave.place(BLOB)
    with Parent(answer.encode()) as parent:
        nothing: dict[str, str | None] = {
            name: None
            for name in enclave.environment
            if name.startswith("AWS_") and ("KEY" in name or "TOKEN" in name)
        }
        run = enclave.decrypt(
            environment={**nothing, "AWS_CONTAINER_CREDENTIALS_FULL_URI": parent.url}
        )
    refused(enclave, run, status, "credentials")
    assert "a-secret" not in run.err


class Parent:
    """The parent's metadata service, which says what it likes."""

    def __init__(self, answer: bytes) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/credentials"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_wrong_credentials_are_not_repeated(enclave: Enclave) -> None:
    enclave.place(BLOB)
    run = enclave.decrypt(environment={"AWS_SECRET_ACCESS_KEY": "a-wrong-secret-key"})
    refused(enclave, run, 4, "InvalidSignatureException", "request id")
    assert "a-wrong-secret-key" not in run.err


# -- the way to KMS


def test_a_refused_connection(enclave: Enclave) -> None:
    enclave.place(BLOB)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"https://127.0.0.1:{unused.getsockname()[1]}"
        run = enclave.decrypt("--endpoint-url", url, environment={"AWS_MAX_ATTEMPTS": "1"})
    refused(enclave, run, 5, "cannot be reached", url)


def test_a_name_that_does_not_resolve(enclave: Enclave) -> None:
    enclave.place(BLOB)
    options = ["--endpoint-url", "https://kms.invalid", "--timeout", "20"]
    refused(
        enclave, enclave.decrypt(*options, environment={"AWS_MAX_ATTEMPTS": "1"}), 5, "kms.invalid"
    )


@pytest.mark.parametrize(
    ("fault", "status", "part"),
    [
        ("tls-other-ca", 6, "certificate"),
        ("tls-wrong-name", 6, "certificate"),
        ("tls-expired", 6, "expired"),
        ("tls-plain", 5, "no TLS with KMS"),
        ("tls-old", 5, "no TLS with KMS"),
    ],
)
def test_tls_that_proves_nothing(
    enclaves: Callable[..., Enclave], fault: str, status: int, part: str
) -> None:
    enclave = enclaves(faults=[fault])
    enclave.place(BLOB)
    refused(enclave, enclave.decrypt(), status, part)


def test_an_expired_certificate_is_not_retried_into_a_success(
    enclaves: Callable[..., Enclave],
) -> None:
    enclave = enclaves(faults=["tls-expired"])
    enclave.place(BLOB)
    run = enclave.decrypt(
        environment={"AWS_MAX_ATTEMPTS": "5", "SSL_CERT_FILE": enclave.environment["AWS_CA_BUNDLE"]}
    )
    refused(enclave, run, 6)


@pytest.mark.parametrize("fault", ["hang", "slow-body"])
def test_the_timeout_bounds_everything(enclaves: Callable[..., Enclave], fault: str) -> None:
    enclave = enclaves(faults=[fault])
    enclave.place(enclave.encrypt())
    start = time.monotonic()
    refused(enclave, enclave.decrypt("--timeout", "2"), 5, "KMS")
    assert time.monotonic() - start < 60


# -- what KMS answers


@pytest.mark.parametrize(
    ("fault", "status", "part"),
    [
        ("access-denied", 4, "AccessDeniedException: User"),
        ("invalid-ciphertext", 4, "InvalidCiphertextException (request id "),
        ("not-found", 4, "NotFoundException"),
        ("disabled", 4, "DisabledException"),
        ("invalid-state", 4, "KMSInvalidStateException"),
        ("invalid-key-usage", 4, "InvalidKeyUsageException"),
        ("incorrect-key", 4, "IncorrectKeyException"),
        ("invalid-grant-token", 4, "InvalidGrantTokenException"),
        ("expired-token", 4, "ExpiredTokenException"),
        ("unrecognized-client", 4, "UnrecognizedClientException"),
        ("invalid-signature", 4, "InvalidSignatureException"),
        ("validation", 4, "ValidationException"),
        ("no-message", 4, "(request id "),
        ("throttling", 5, "ThrottlingException"),
        ("internal", 5, "KMSInternalException"),
        ("unavailable", 5, "(request id "),
        ("key-unavailable", 5, "KeyUnavailableException"),
        ("dependency-timeout", 5, "DependencyTimeoutException"),
        ("html-error", 5, "cannot answer now"),
    ],
)
def test_a_refusal_shows_code_message_and_request_id(
    enclaves: Callable[..., Enclave], fault: str, status: int, part: str
) -> None:
    enclave = enclaves(faults=[fault])
    enclave.place(enclave.encrypt())
    message = refused(enclave, enclave.decrypt(environment={"AWS_MAX_ATTEMPTS": "2"}), status, part)
    assert "request id" in message


@pytest.mark.parametrize(
    ("fault", "status", "part"),
    [
        ("not-json", 6, "no CiphertextForRecipient"),
        ("empty-body", 6, "no CiphertextForRecipient"),
        ("no-envelope", 6, "in the clear"),
        ("nothing-sealed", 6, "no CiphertextForRecipient"),
        ("plaintext-beside", 6, "in the clear"),
        ("empty-envelope", 6, "no CiphertextForRecipient"),
        ("endless-body", 6, ""),
        ("cut-body", 5, "cut short"),
        ("reset", 5, "cannot be reached"),
        ("bad-signature", 4, "ValidationException"),
        ("expired-leaf", 4, "ValidationException"),
        ("foreign-root", 4, "ValidationException"),
        ("no-public-key", 4, "ValidationException"),
        ("other-public-key", 6, "subject key identifier"),
        *((name, 6, "bad envelope: ") for name in MALFORMED),
    ],
)
def test_an_answer_that_kms_would_not_give(
    enclaves: Callable[..., Enclave], fault: str, status: int, part: str
) -> None:
    enclave = enclaves(faults=[fault])
    enclave.place(enclave.encrypt())
    refused(enclave, enclave.decrypt(environment={"AWS_MAX_ATTEMPTS": "2"}), status, part)


@pytest.mark.parametrize("fault", ["wrong-key-id", "no-key-id"])
def test_an_answer_from_another_key(enclaves: Callable[..., Enclave], fault: str) -> None:
    enclave = enclaves(faults=[fault])
    enclave.place(enclave.encrypt())
    arn = enclave.world.kms.key_arn
    for key in (arn, arn.split("/")[1]):
        message = refused(
            enclave, enclave.attestor("decrypt", "--key-id", key, "blob", "out"), 6, "is from key"
        )
        assert f"asked for {key}" in message


def test_credentials_echoed_by_a_server_are_redacted(enclaves: Callable[..., Enclave]) -> None:
    enclave = enclaves(faults=["echo-credentials"])
    enclave.place(enclave.encrypt())
    run = enclave.decrypt()
    refused(enclave, run, 4, "[redacted]")
    credentials = enclave.world.kms.credentials
    assert credentials.token not in run.err
    assert credentials.secret_key not in run.err


def test_a_message_cannot_add_lines_or_steer_the_terminal(enclaves: Callable[..., Enclave]) -> None:
    enclave = enclaves(faults=["escape-message"])
    enclave.place(enclave.encrypt())
    run = enclave.decrypt()
    refused(enclave, run, 4)
    assert "\x1b" not in run.err


# -- what KMS refuses by itself


def test_the_wrong_enclave(enclaves: Callable[..., Enclave]) -> None:
    for options in ({"debug": True}, {"pcrs": {0: bytes(47) + b"\1"}}):
        enclave = enclaves(**options)
        enclave.place(enclave.encrypt())
        refused(enclave, enclave.decrypt(), 4, "AccessDeniedException", "request id", "PCR")


def test_a_policy_that_asks_for_another_image(enclaves: Callable[..., Enclave]) -> None:
    from nitrosim.kms import default_policy

    principal = "arn:aws:iam::111122223333:role/other"
    enclave = enclaves(principal=principal, key_policy=default_policy(principal, bytes(47) + b"\1"))
    enclave.place(enclave.encrypt())
    refused(enclave, enclave.decrypt(), 4, "AccessDeniedException", "request id")


def test_another_context_a_tampered_blob_and_a_disabled_key(
    enclaves: Callable[..., Enclave],
) -> None:
    enclave = enclaves()
    blob = enclave.encrypt(node="3")
    enclave.place(blob)
    refused(
        enclave,
        enclave.decrypt("--context", "node=4"),
        4,
        "InvalidCiphertextException",
        "--context",
    )
    refused(enclave, enclave.decrypt(), 4, "InvalidCiphertextException")
    enclave.place(blob[:-1] + bytes([blob[-1] ^ 1]))
    refused(enclave, enclave.decrypt("--context", "node=3"), 4, "InvalidCiphertextException")
    other = enclave.kms.create_key()["KeyMetadata"]["Arn"]
    enclave.place(blob)
    run = enclave.attestor("decrypt", "--key-id", other, "--context", "node=3", "blob", "out")
    refused(enclave, run, 4, "IncorrectKeyException")
    enclave.kms.disable_key(KeyId=enclave.world.kms.key_arn.split("/")[1])
    refused(enclave, enclave.decrypt("--context", "node=3"), 4, "DisabledException")


def test_a_bug_shows_where_it_is_and_nothing_else(enclave: Enclave) -> None:
    enclave.place(BLOB)
    program = (
        "import attestor\n"
        "def fail(*a, **k): raise RuntimeError('a secret in an exception')\n"
        "attestor.read_ciphertext = fail\n"
        "attestor.main()"
    )
    run = enclave.run(sys.executable, "-c", program, "decrypt", "--any-key", "blob", "out")
    assert run.status == 1
    assert run.error == "unexpected RuntimeError at <string>:2"
    assert "secret" not in run.err


@pytest.mark.parametrize("sink", [">/dev/full", "> >(true)"])
def test_a_standard_error_that_takes_nothing_changes_nothing(enclave: Enclave, sink: str) -> None:
    enclave.place(enclave.encrypt())
    attestor = f"{sys.executable} -m attestor"
    assert enclave.run("bash", "-c", f"{attestor} decrypt --any-key absent out 2{sink}").status == 2
    assert enclave.run("bash", "-c", f"{attestor} decrypt -v blob out 2{sink}").status == 0
    assert (enclave.folder / "out").read_bytes() == b"the secret"


def test_a_help_text_that_cannot_be_written(enclave: Enclave) -> None:
    run = enclave.run("sh", "-c", f"{sys.executable} -m attestor decrypt --help >/dev/full")
    assert run.status == 7
    assert "No space left on device" in run.error


def test_a_standard_input_that_does_not_block_is_waited_for(enclave: Enclave) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    options = ["--any-key", "--timeout", "1"]
    command = [sys.executable, "-m", "attestor", "decrypt", *options, "-", "out"]
    done = subprocess.run(
        command,
        cwd=enclave.folder,
        env=enclave.environment,
        stdin=reader,
        capture_output=True,
        check=False,
    )
    os.close(reader)
    os.close(writer)
    assert done.returncode == 5
    assert b"standard input cannot be read: nothing came within 1 seconds" in done.stderr


def test_errors_survive_a_closed_standard_error(enclave: Enclave) -> None:
    command = [sys.executable, "-m", "attestor", "decrypt", "--any-key", "absent", "out"]
    shell = ["sh", "-c", '"$@" 2>&-', "sh", *command]
    done = subprocess.run(
        shell, cwd=enclave.folder, env=enclave.environment, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, b"")
