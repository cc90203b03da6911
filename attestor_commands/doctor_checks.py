"""The checks of `attestor doctor`: each thing that an attested call needs, looked at in order.

A check is a function from the case to a result; it raises an error of attestor's, which becomes a
failure with that error's exit status, or Skipped when what it needs has failed already.
"""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import urlsplit

import attestor
from attestor_commands import report
from attestor_io import errors, names
from attestor_io.deadline import Deadline
from attestor_io.refusal import SKEW_MAX, clock_skew
from attestor_io.urls import without_query
from nsm import document, library

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_SKEW_WARNED: Final = 60  # seconds
_EXPIRY_WARNED: Final = timedelta(minutes=5)


class Result(NamedTuple):
    """What one check found; `status` is the exit status of a failure, 0 for all else."""

    check: str
    outcome: str  # passed, warned, failed or skipped
    reason: str
    fix: str = ""
    status: int = 0


class Finding(NamedTuple):
    """What a check returns: a reason, and for a warning how to mend it."""

    reason: str
    fix: str = ""


class Skipped(Exception):  # noqa: N818 - no error: what a check needs is not there
    """A check that cannot be made."""


@dataclass(slots=True)
class Case:
    """What was asked, and what the checks so far have found for those behind them."""

    region: str | None = None
    key_id: str | None = None
    context: Mapping[str, str] = field(default_factory=dict)
    grant_tokens: tuple[str, ...] = ()
    endpoint_url: str | None = None
    deadline: Deadline = field(default_factory=lambda: Deadline(attestor.DEFAULT_TIMEOUT))
    vsock: tuple[int, int] | None = None
    imds_vsock: tuple[int, int] | None = None
    ca_bundle: str | None = None
    root: bytes = document.AWS_ROOT_G1_SHA256
    module: bool = False
    verified: document.VerifiedDocument | None = None
    kms: attestor.Kms | None = None
    session: Any = None
    client: Any = None
    target: tuple[str, int] | None = None
    connection: socket.socket | None = None
    tls: ssl.SSLSocket | None = None
    failed: bool = False

    @property
    def patience(self) -> float:
        """Seconds for one step."""
        return min(attestor.ATTEMPT_TIMEOUT, max(self.deadline.left, 0.001))  # 0 is no blocking

    @property
    def where(self) -> tuple[str, int]:
        """Host and port of the endpoint."""
        endpoint = urlsplit(self.client.meta.endpoint_url)
        return endpoint.hostname or "", endpoint.port or 443

    @property
    def proxy(self) -> str | None:
        """The proxy of the environment that the SDK would use."""
        http = self.client._endpoint.http_session
        proxy: str | None = http._proxy_config.proxy_url_for(self.client.meta.endpoint_url)
        return proxy


def examine(case: Case) -> list[Result]:
    """Make every check, in order."""
    results = []
    try:
        for name, check in CHECKS:
            results.append(_result(name, check, case))
            case.failed = case.failed or results[-1].outcome == "failed"
    finally:
        for connection in (case.tls, case.connection):
            if connection is not None:
                connection.close()
    return results


def _result(name: str, check: Callable[[Case], Finding], case: Case) -> Result:
    try:
        reason, fix = check(case)
    except Skipped as skipped:
        return Result(name, "skipped", str(skipped))
    except errors.AttestorError as error:
        return Result(name, "failed", str(error), next(iter(error.hints), ""), error.status)
    return Result(name, "warned" if fix else "passed", reason, fix)


# ---- the module


def _library(_: Case) -> Finding:
    """The patched library, if there is one; its ABI version is checked when it is loaded."""
    named = os.environ.get("NSM_LIBRARY")
    if named:
        try:
            library.load(named)
        except library.LibraryError as error:
            hint = "build it with make libnsm, or unset NSM_LIBRARY"
            raise errors.InputError(f"NSM_LIBRARY cannot be used: {error}", hint) from error
    found = named or library.find_library()
    if not found:
        raise Skipped("there is no patched libnsm.so: /dev/nsm is used directly")
    return Finding(f"{found} (ABI {library.ABI_VERSION})")


def _device(case: Case) -> Finding:
    description, name = attestor.use_module(
        lambda module: (module.describe(), module.transport_name)
    )
    case.module = True
    return Finding(f"{description.module_id} with {description.max_pcrs} PCRs, through {name}")


def _entropy(case: Case) -> Finding:
    """The module's randomness differs from draw to draw, and the kernel's pool is initialised."""
    _need(case.module, "device")
    draws = attestor.use_module(lambda module: [module.random(256), module.random(256)])
    if draws[0] == draws[1] or any(len(set(draw)) < 16 for draw in draws):
        raise errors.ModuleError("randomness of the Nitro Secure Module repeats itself")
    try:
        os.getrandom(1, os.GRND_NONBLOCK)
    except BlockingIOError:
        return Finding(
            "the kernel's random pool is not initialised yet",
            "decrypt does that, if it may: CAP_SYS_ADMIN",
        )
    return Finding("the module gives randomness, and the kernel's pool is initialised")


def _document(case: Case) -> Finding:
    """A document that carries our nonce, verified as anyone would; KMS alone decides what roots it
    trusts.
    """
    _need(case.module, "device")
    nonce = os.urandom(16)
    parsed = _parsed(attestor.use_module(lambda module: module.attest(nonce=nonce)))
    expect = document.Expectations(nonce=nonce, allow_debug=True)
    root = hashlib.sha256(parsed.cabundle[0]).digest()
    try:
        case.verified = document.verify(parsed, roots=[root], expect=expect)
    except document.DocumentError as error:
        hint = "the clock of this enclave may be wrong" if error.check == "validity" else ""
        raise errors.NotAuthenticError(
            f"document refused, {error.check}: {error}", *filter(None, [hint])
        ) from error
    if root != case.root:
        reason = (
            f"genuine only if the root with SHA-256 {root.hex()} is, which is not the one "
            "that is trusted here"
        )
        return Finding(
            reason,
            "a real enclave's is AWS's; --root FILE trusts another, $NITROSIM_NSM_ROOT nitrosim's",
        )
    return Finding(
        f"signed {report.age(round((datetime.now(UTC) - parsed.signed_at).total_seconds()))}, "
        "and verified"
    )


def _parsed(data: bytes) -> document.AttestationDocument:
    try:
        return document.AttestationDocument.parse(data)
    except document.DocumentError as error:
        raise errors.NotAuthenticError(f"document cannot be read: {error}") from error


def _debug_mode(case: Case) -> Finding:
    if case.verified is None:
        raise Skipped("needs the check document")
    if case.verified.document.debug_mode:
        fix = "start the enclave without --debug-mode: no key policy should allow zero PCRs"
        return Finding("this enclave runs in debug mode: PCR0, PCR1 and PCR2 are all zeros", fix)
    return Finding("this enclave does not run in debug mode")


# ---- AWS


def _region(case: Case) -> Finding:
    region = names.resolve_region(case.region, case.key_id, os.environ)
    import botocore.session

    case.session = botocore.session.Session()
    case.kms = attestor.Kms(
        region,
        case.endpoint_url,
        case.deadline,
        case.vsock,
        imds_vsock=case.imds_vsock,
        ca_bundle=case.ca_bundle,
    )
    case.kms.prepare(case.session)
    case.client = case.kms.client(case.session)
    return Finding(f"{region}, endpoint {without_query(case.client.meta.endpoint_url)}")


def _credentials(case: Case) -> Finding:
    """They are there, and do not expire soon; whether KMS takes them, only KMS can tell."""
    _need(case.client, "region")
    case.deadline.call(lambda: attestor.check_credentials(case.session))
    credentials = case.session.get_credentials()
    expiry = getattr(credentials, "_expiry_time", None)
    if expiry is None:
        return Finding(f"found by {credentials.method}; when they expire is not told")
    left = expiry - datetime.now(UTC)
    reason = f"found by {credentials.method}; they expire in {round(left.total_seconds())} s"
    return Finding(reason, "renew them" if left < _EXPIRY_WARNED else "")


def _name(case: Case) -> Finding:
    _need(case.client, "region")
    if case.vsock:
        return Finding(f"not needed: vsock {case.vsock[0]}:{case.vsock[1]} carries the connection")
    host, port = case.where
    if case.proxy:
        proxy = urlsplit(case.proxy)
        host, port = proxy.hostname or "", proxy.port or 80
    hint = "an enclave has no DNS of its own: name the endpoint in /etc/hosts, or use --vsock"
    try:
        found = case.deadline.within(case.patience).call(
            lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), "no answer"
        )
    except (OSError, UnicodeError, errors.UnreachableError) as error:
        raise errors.UnreachableError(f"name {host} cannot be resolved: {error}", hint) from error
    case.target = host, port
    return Finding(f"{host} is {found[0][4][0]}" + (", a proxy" if case.proxy else ""))


def _tcp(case: Case) -> Finding:
    """A connection to the endpoint, its proxy, or the parent's vsock-proxy."""
    if case.vsock:
        where = f"vsock {case.vsock[0]}:{case.vsock[1]}"
    elif case.target:
        where = f"{case.target[0]} port {case.target[1]}"
    else:
        raise Skipped("needs the check name")
    try:
        case.connection = _dial(case)
    except OSError as error:
        hint = "is vsock-proxy running on the parent, and does it allow this endpoint?"
        raise errors.UnreachableError(
            f"no connection to {where}: {error.strerror or error}", hint
        ) from error
    return Finding(f"connected to {where}")


def _dial(case: Case) -> socket.socket:
    if case.vsock:
        from attestor_io.vsock import dial

        return dial(case.vsock, case.patience)
    return socket.create_connection(case.target or ("", 0), case.patience)


def _tls(case: Case) -> Finding:
    """The certificate leads to a trusted root and names the endpoint."""
    if case.connection is None:
        raise Skipped("needs the check tcp")
    if case.proxy:
        raise Skipped(f"the proxy {urlsplit(case.proxy).hostname} is in between")
    bundle = _ca_bundle(case)
    try:
        context = ssl.create_default_context(cafile=bundle)
    except OSError as error:  # ssl.SSLError is one
        raise errors.InputError(
            f"CA bundle {bundle} cannot be read: {error}", "AWS_CA_BUNDLE names it"
        ) from error
    host, _ = case.where
    try:
        case.tls = context.wrap_socket(case.connection, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        hint = (
            f"somebody may be in the middle; the roots trusted are those in {bundle} "
            "(AWS_CA_BUNDLE)"
        )
        raise errors.NotAuthenticError(
            f"certificate of {host} is not valid: {error.verify_message}", hint
        ) from error
    except OSError as error:
        raise errors.UnreachableError(f"no TLS with {host}: {error}") from error
    return Finding(f"{case.tls.version()} with {host}, roots of {bundle}")


def _ca_bundle(case: Case) -> str:
    """The roots that the client trusts, as botocore chooses them."""
    from botocore.httpsession import get_cert_path

    return str(get_cert_path(case.client._endpoint.http_session._verify))


def _clock(case: Case) -> Finding:
    """Our clock against the Date header of the endpoint; a signature bears our time."""
    if case.tls is None:
        raise Skipped("needs the check tls")
    skew = clock_skew(_date(case.tls, case.where[0]), datetime.now(UTC))
    if skew is None:
        raise Skipped("the endpoint does not tell its time")
    reason = (
        f"this clock is {abs(round(skew))} s {'behind' if skew > 0 else 'ahead of'} the endpoint's"
    )
    fix = "set the clock of this enclave"
    if abs(skew) > SKEW_MAX:
        raise errors.RefusedError(f"{reason}, KMS takes {SKEW_MAX} s", fix)
    return Finding(reason, fix if abs(skew) > _SKEW_WARNED else "")


def _date(connection: socket.socket, host: str) -> str | None:
    from http.client import HTTPConnection, HTTPException

    http = HTTPConnection(host)
    http.sock = connection
    try:
        http.request("POST", "/")  # not signed: refused, but with a date
        return http.getresponse().headers["Date"]
    except (OSError, HTTPException) as error:
        raise errors.UnreachableError(f"{host} does not answer: {error}") from error


def _attested_call(case: Case) -> Finding:
    """A Decrypt without a ciphertext, which KMS only pretends to do."""
    if case.failed or case.kms is None:
        raise Skipped("a check above failed")
    if case.key_id is None:
        raise Skipped("needs --key-id")
    parameters = {
        "KeyId": case.key_id,
        "EncryptionContext": case.context,
        "GrantTokens": list(case.grant_tokens),
    }
    try:
        case.kms.call(
            "decrypt",
            DryRun=True,
            DryRunModifiers=["IGNORE_CIPHERTEXT"],
            **attestor.drop_unset(**parameters),
        )
    except errors.RefusedError as error:
        answer = getattr(error.__cause__, "response", {}).get("Error", {})
        if answer.get("Code") != "DryRunOperationException":
            raise
    else:
        raise errors.NotAuthenticError(
            "KMS answered a dry run with a plaintext", "is this endpoint AWS KMS?"
        )
    return Finding("KMS would decrypt for this enclave (a dry run)")


def _need(found: object, check: str) -> None:
    if not found:
        raise Skipped(f"needs the check {check}")


CHECKS: Final = (
    ("library", _library),
    ("device", _device),
    ("entropy", _entropy),
    ("document", _document),
    ("debug mode", _debug_mode),
    ("region", _region),
    ("credentials", _credentials),
    ("name", _name),
    ("tcp", _tcp),
    ("tls", _tls),
    ("clock", _clock),
    ("attested call", _attested_call),
)
