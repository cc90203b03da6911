"""`attestor serve`: KMS's own protocol for every program in the enclave, answered attested."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from attestor import (
    KMS_OPTIONS,
    MODULE_OPTIONS,
    VSOCK_OPTIONS,
    options,
    parse_timeout,
    warn_unless_pinned,
)
from attestor_commands.inputs import FORCE_OPTION
from attestor_io import names
from attestor_io.errors import InputError
from attestor_io.text_options import complete_from

if TYPE_CHECKING:
    from collections.abc import Sequence

TIMEOUT: Final = 20  # seconds for one call: SDKs wait 60, and try again
PASSED: Final = (
    "Encrypt ReEncrypt DescribeKey GetPublicKey Sign Verify GenerateMac VerifyMac".split()
)
"""What has no Recipient, and may go to KMS as it came."""

_CONNECTIONS: Final = 64  # of clients: four services with the pools that SDKs have by default
_CONCURRENCY: Final = 16
_VSOCK_CONCURRENCY: Final = 3  # vsock-proxy serves four by default: one is left for others


def _parse_key_ids(
    _context: click.Context, _option: click.Parameter, key_ids: Sequence[str]
) -> tuple[str, ...]:
    for key_id in key_ids:
        names.parse_key_id(key_id, "--key-id")
    return tuple(key_ids)


def _parse_required(
    _context: click.Context, _option: click.Parameter, texts: Sequence[str]
) -> dict[str, str | None]:
    """NAME or NAME=VALUE, as the values by names; None stands for any value."""
    required: dict[str, str | None] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name:
            raise InputError("--require-context wants NAME or NAME=VALUE")
        if name in required:
            raise InputError(f"--require-context names {name} twice")
        required[name] = value if equals else None
    return required


def _parse_passed(
    _context: click.Context, _option: click.Parameter, operations: Sequence[str]
) -> frozenset[str]:
    for operation in operations:
        if operation not in PASSED:
            raise InputError(f"--pass {operation} is none of {', '.join(PASSED)}")
    return frozenset(operations)


def _parse_seconds(context: click.Context, option: click.Parameter, text: str) -> float:
    return parse_timeout(context, option, text).seconds


@click.command()
@click.option("--socket", "socket_path", metavar="FILE", help="listen on this unix socket")
@click.option(
    "--allow-uid",
    "uids",
    metavar="UID",
    multiple=True,
    type=click.IntRange(0, 2**32 - 2),
    help="who may use the socket, repeatable  [default: this user]",
)
@click.option(
    "--port",
    metavar="N",
    type=click.IntRange(0, 65535),
    help="listen on this port of 127.0.0.1; 0 is any that is free",
)
@click.option(
    "--credentials-file",
    metavar="FILE",
    help="write there the key pair that signs what comes to the port",
)
@click.option(
    "--key-id",
    "key_ids",
    metavar="KEY",
    multiple=True,
    callback=_parse_key_ids,
    help="key ARN or id that may be used (or an alias), repeatable",
)
@click.option(
    "--require-context",
    "required",
    metavar="NAME[=VALUE]",
    multiple=True,
    callback=_parse_required,
    help="what every encryption context must hold, repeatable",
)
@click.option(
    "--pass",
    "passed",
    metavar="OPERATION",
    multiple=True,
    callback=_parse_passed,
    shell_complete=complete_from(PASSED),
    help="let it through to KMS, repeatable: Encrypt, ReEncrypt, ...",
)
@click.option("--ready-file", metavar="FILE", help="write there where it listens, once it does")
@click.option(
    "--ready-fd",
    metavar="N",
    type=click.IntRange(3, 65535),
    help="the same into this open descriptor, which is then closed",
)
@FORCE_OPTION
@options(KMS_OPTIONS, without={"key_id", "encryption_context", "grant_tokens", "timeout"})
@click.option(
    "--timeout",
    "seconds",
    metavar="SECONDS",
    default=f"{TIMEOUT}",
    callback=_parse_seconds,
    help=f"for each call, and for the last ones of a signal  [default: {TIMEOUT}]",
)
@click.option(
    "--connections",
    metavar="N",
    type=click.IntRange(1, 1000),
    default=_CONNECTIONS,
    help=f"of clients, at most  [default: {_CONNECTIONS}]",
)
@click.option(
    "--concurrency",
    metavar="N",
    type=click.IntRange(1, 1000),
    help=f"connections to KMS, at most  [default: {_CONCURRENCY}, with --vsock "
    f"{_VSOCK_CONCURRENCY}]",
)
@options(VSOCK_OPTIONS, MODULE_OPTIONS)
def serve(
    socket_path: str | None,
    uids: tuple[int, ...],
    port: int | None,
    credentials_file: str | None,
    key_ids: tuple[str, ...],
    any_key: bool,
    concurrency: int | None,
    **settings: Any,
) -> None:
    """Answer KMS's own protocol, so that any AWS SDK in here gets attested answers.

    \b
    Examples:
      attestor serve --port 8009 --credentials-file /run/kms.ini --key-id arn:aws:kms:...
      attestor serve --socket /run/kms.sock --allow-uid 1000 --key-id arn:aws:kms:...

    A program whose SDK has AWS_ENDPOINT_URL_KMS=http://127.0.0.1:8009 and
    AWS_SHARED_CREDENTIALS_FILE=/run/kms.ini calls Decrypt, GenerateDataKey, GenerateDataKeyPair,
    GenerateRandom and DeriveSharedSecret as ever. It needs no other change, and no credentials of
    AWS. SIGTERM lets what is under way end. docs/serve.md tells who may ask, and for what.
    """
    if socket_path is None and port is None:
        raise InputError("nothing to listen on", "give --socket FILE, or --port N")
    if (port is None) != (credentials_file is None):
        raise InputError("--port and --credentials-file need each other")
    if uids and socket_path is None:
        raise InputError("--allow-uid is of --socket")
    if any_key and any(map(names.is_pinned, key_ids)):
        raise InputError("--any-key contradicts --key-id", "leave one of them out")
    for key_id in key_ids or (None,):
        warn_unless_pinned(key_id, any_key=any_key)
    if concurrency is None:
        concurrency = _VSOCK_CONCURRENCY if settings["vsock"] else _CONCURRENCY
    from attestor_commands.serve_run import Places, run

    places = Places(socket_path, frozenset(uids), port, credentials_file)
    run(places, key_ids=key_ids, concurrency=concurrency, **settings)
