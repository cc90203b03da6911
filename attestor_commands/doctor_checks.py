"""The checks of `attestor doctor`: decrypt's own way, step by step, and what explains its failures.

The steps of `WAY` run the code that decrypt runs, in its order, and the attested call at the end is
decrypt's as a dry run. The checks between them look at what such a step hides: a name, a port, a
certificate, a clock, a document.

A check is a function from the case to a finding; it raises an error of attestor's, which becomes a
failure with that error's exit status, or Skipped when what it needs is not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar
from urllib.parse import urlsplit

import attestor
from attestor_commands import report
from attestor_commands.doctor_call import NoVerdict, dry_run
from attestor_io import credentials as credential_sources
from attestor_io import errors
from attestor_io.ciphertext import is_symmetric, read_ciphertext
from attestor_io.reading import Message
from attestor_io.refusal import SKEW_MAX, clock_skew
from attestor_io.urls import without_query
from keypolicy.nitrotpm import SECURE_BOOT_OFF
from nsm import document, library, source

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from attestor_io.deadline import Deadline

_T = TypeVar("_T")
_UNBOUND: Final = attestor.Binding(None)
_SKEW_WARNED: Final = 60  # seconds
_EXPIRY_WARNED: Final = timedelta(minutes=5)
_ANY_REGION: Final = "eu-west-1"  # where none is known: credentials do not depend on it


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
    """What was asked, and what the checks so far have found for those behind them.

    `connection` is what `Kms.connect` takes beside the key. `skew` is how many seconds the clock of
    KMS is ahead of ours. `failed` are the names of the checks that did.
    """

    bound: attestor.Binding = _UNBOUND
    connection: Mapping[str, Any] = field(default_factory=dict)
    ciphertext: str | None = None
    base64_text: bool = False
    algorithm: str | None = None
    root: bytes = document.AWS_ROOT_G1_SHA256
    blob: bytes | Message | None = None
    parsed: document.AttestationDocument | None = None
    kms: attestor.Kms | None = None
    session: Any = None
    client: Any = None
    target: tuple[str, int] | None = None
    connected: bool = False
    skew: float | None = None
    failed: set[str] = field(default_factory=set)

    @property
    def deadline(self) -> Deadline:
        """The deadline of the command."""
        deadline: Deadline = self.connection["deadline"]
        return deadline

    @property
    def vsock(self) -> tuple[int, int] | None:
        """The address of the parent's vsock-proxy, if KMS is reached so."""
        return self.connection.get("vsock")

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

    def in_time(self, work: Callable[[], _T], what: str) -> _T:
        """Return what one step gives, or raise UnreachableError, which says `what`."""
        return self.deadline.within(self.patience).call(work, what)

    def ask_module(self, use: Callable[[Any], _T]) -> _T:
        """Use the module; ModuleError also for one that does not answer in time."""
        return attestor.ask_module(use, self.deadline.within(self.patience))

    def need(self, check: str) -> None:
        """Skip the check that runs if this one failed."""
        if check in self.failed:
            raise Skipped(f"needs the check {check}")


def examine(case: Case) -> list[Result]:
    """Make every check, in order; what failed although KMS would decrypt is a warning."""
    results = []
    for name, check in CHECKS:
        results.append(_result(name, check, case))
        if results[-1].outcome == "failed":
            case.failed.add(name)
    if results[-1].outcome not in {"passed", "warned"}:
        return results
    return [
        result._replace(outcome="warned", status=0) if result.outcome == "failed" else result
        for result in results
    ]


def status_of(results: list[Result]) -> int:
    """The exit status of decrypt: that of the call, or of the first failure where none was made."""
    if results[-1].outcome != "skipped":
        return results[-1].status
    return next((result.status for result in results if result.outcome == "failed"), 0)


def _result(name: str, check: Callable[[Case], Finding], case: Case) -> Result:
    try:
        reason, fix = check(case)
    except Skipped as skipped:
        return Result(name, "skipped", str(skipped))
    except errors.AttestorError as error:
        fix = next((hint for hint in error.hints if "attestor doctor" not in hint), "")
        return Result(name, "failed", str(error), fix, error.status)
    return Result(name, "warned" if fix else "passed", reason, fix)


# ---- options and input


def _region(case: Case) -> Finding:
    case.kms = attestor.Kms.connect(case.bound.key_id, **case.connection)
    return Finding(case.kms.region)


def _ciphertext(case: Case) -> Finding:
    if case.ciphertext is None:
        raise Skipped("none is named")
    case.blob = read_ciphertext(
        case.ciphertext,
        case.deadline,
        base64_text=case.base64_text,
        message=is_symmetric(case.algorithm),
    )
    if isinstance(case.blob, Message):
        return Finding("a message of the AWS Encryption SDK")
    return Finding(f"{len(case.blob)} bytes")


# ---- the module


def _library(_: Case) -> Finding:
    """The patched library, if there is one; its ABI version is checked when it is loaded."""
    if source.title() == source.TITLES["nitrotpm"]:
        raise Skipped("not needed: the NitroTPM is reached through its device")
    named = os.environ.get("NSM_LIBRARY")
    if named:
        try:
            library.load(named)
        except library.LibraryError as error:
            hint = "make libnsm builds it; without --nsm-library and NSM_LIBRARY none is needed"
            raise errors.InputError(f"library cannot be used: {error}", hint) from error
    found = named or library.find_library()
    if not found:
        raise Skipped("there is no patched libnsm.so: /dev/nsm is used directly")
    return Finding(f"{found} (ABI {library.ABI_VERSION})")


def _device(case: Case) -> Finding:
    """The module gives the randomness that the key is made with: decrypt asks it nothing before."""
    attestor.process_recipient().wait_for_module(case.deadline.within(case.patience))
    try:
        description, name = case.ask_module(
            lambda module: (module.describe(), module.transport_name)
        )
    except errors.ModuleError as error:
        return Finding(
            f"it gives randomness, but does not describe itself: {error}", "decrypt can do without"
        )
    return Finding(f"{description.module_id} with {description.max_pcrs} PCRs, through {name}")


def _entropy(case: Case) -> Finding:
    """The module's randomness differs from draw to draw, and the kernel's pool is initialised."""
    case.need("device")
    draws = case.ask_module(lambda module: [module.random(256), module.random(256)])
    if draws[0] == draws[1] or any(len(set(draw)) < 16 for draw in draws):
        return Finding(
            f"randomness of the {source.title()} repeats itself",
            "trust no key that is made here",
        )
    try:
        os.getrandom(1, os.GRND_NONBLOCK)
    except BlockingIOError:
        return Finding(
            "the kernel's random pool is not initialised yet",
            "decrypt does that, if it may: CAP_SYS_ADMIN",
        )
    return Finding("the module gives randomness, and the kernel's pool is initialised")


# ---- AWS


def _credentials(case: Case) -> Finding:
    """They are there, and do not expire soon; whether KMS takes them, only KMS can tell."""
    from attestor_io.sdk_data import new_session

    kms = case.kms or attestor.Kms.connect(None, **{**case.connection, "region": _ANY_REGION})
    case.session = new_session()
    late = partial(credential_sources.not_in_time, case.session)
    case.deadline.call(lambda: _find_credentials(kms, case.session), late)
    credentials = case.session.get_credentials()
    expiry = getattr(credentials, "_expiry_time", None)
    if expiry is None:
        return Finding(f"found by {credentials.method}; when they expire is not told")
    left = expiry - datetime.now(UTC)
    reason = f"found by {credentials.method}; they expire in {round(left.total_seconds())} s"
    return Finding(reason, "renew them" if left < _EXPIRY_WARNED else "")


def _find_credentials(kms: attestor.Kms, session: Any) -> None:
    kms.prepare(session)
    attestor.check_credentials(session)


def _endpoint(case: Case) -> Finding:
    """The client; without credentials one that signs nothing, since what follows asks unsigned."""
    if case.kms is None:
        raise Skipped("needs the check region")
    if "credentials" in case.failed:
        from attestor_io.sdk_data import new_session

        case.session = new_session()
        case.kms.prepare(case.session)
        case.session.set_credentials("none", "none")
    case.client = case.kms.client(case.session)
    return Finding(without_query(case.client.meta.endpoint_url))


def _document(case: Case) -> Finding:
    """The attestation document that is sent to KMS."""
    case.need("device")
    recipient = attestor.process_recipient()
    recipient.wait_for_document(case.deadline.within(case.patience))
    return Finding(f"{len(recipient.document())} bytes")


# ---- the way to KMS


def _name(case: Case) -> Finding:
    if case.vsock:
        return Finding(f"not needed: vsock {case.vsock[0]}:{case.vsock[1]} carries the connection")
    _need_client(case)
    host, port = case.where
    if case.proxy:
        host, port = _host_of(case.proxy)
    hint = "an enclave has no DNS of its own: name the endpoint in /etc/hosts, or use --vsock"
    try:
        found = case.in_time(
            lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), "no answer"
        )
    except (OSError, UnicodeError, errors.UnreachableError) as error:
        raise errors.UnreachableError(f"name {host} cannot be resolved: {error}", hint) from error
    case.target = host, port
    return Finding(f"{host} is {found[0][4][0]}" + (", a proxy" if case.proxy else ""))


def _host_of(proxy: str) -> tuple[str, int]:
    """Host and port of a proxy's URL; raises InputError, as decrypt does."""
    with contextlib.suppress(ValueError):
        url = urlsplit(proxy)
        return url.hostname or "", url.port or 80
    raise errors.InputError("KMS cannot be called: the proxy of HTTPS_PROXY is no URL")


def _tcp(case: Case) -> Finding:
    """A connection to the endpoint, its proxy, or the parent's vsock-proxy."""
    if case.vsock:
        where = f"vsock {case.vsock[0]}:{case.vsock[1]}"
    elif case.target:
        where = f"{case.target[0]} port {case.target[1]}"
    else:
        raise Skipped("needs the check name")
    try:
        _dial(case).close()
    except OSError as error:
        hint = "is vsock-proxy running on the parent, and does it allow this endpoint?"
        raise errors.UnreachableError(
            f"no connection to {where}: {error.strerror or error}", hint
        ) from error
    case.connected = True
    return Finding(f"connected to {where}")


def _dial(case: Case) -> socket.socket:
    if case.vsock:
        from attestor_io.vsock import dial

        return dial(case.vsock, case.patience)
    return socket.create_connection(case.target or ("", 0), case.patience)


def _tls(case: Case) -> Finding:
    """The client's own connections lead to an endpoint whose certificate it takes.

    KMS refuses the request, which is not signed, and tells its time.
    """
    from botocore.awsrequest import AWSRequest

    _need_client(case)
    if not case.connected:
        raise Skipped("needs the check tcp")
    http = case.client._endpoint.http_session
    # a stream: its headers are all that is read of it
    request = AWSRequest("POST", case.client.meta.endpoint_url, stream_output=True).prepare()
    with attestor.errors_translated(case.session, "decrypt", {}):
        answer = case.in_time(lambda: http.send(request), "no answer of KMS")
    answer.raw.close()
    case.skew = clock_skew(answer.headers.get("Date"), datetime.now(UTC))
    return Finding(f"certificate of {case.where[0]} is valid by the roots of {_ca_bundle(case)}")


def _ca_bundle(case: Case) -> str:
    """The roots that the client trusts, as botocore chooses them."""
    from botocore.httpsession import get_cert_path

    return str(get_cert_path(case.client._endpoint.http_session._verify))


def _need_client(case: Case) -> None:
    if case.client is None:
        raise Skipped("needs the check endpoint")


def _clock(case: Case) -> Finding:
    """Our clock against the Date header of the endpoint, and against the module's time.

    A signature bears our time, and a certificate is valid for a time.
    """
    fix = f"set the clock of this {source.place()}"
    wrong = attestor.wrong_clock()
    if case.skew is None and wrong:
        return Finding(wrong, fix)
    if case.skew is None:
        raise Skipped("the endpoint has not told its time")
    side = "behind" if case.skew > 0 else "ahead of"
    reason = f"this clock is {abs(round(case.skew))} s {side} the endpoint's"
    if abs(case.skew) > SKEW_MAX:
        # as in decrypt: by the module's time it is our clock that is wrong, which time can mend
        kind = errors.UnreachableError if wrong else errors.RefusedError
        raise kind(f"{reason}, KMS takes {SKEW_MAX} s", fix)
    return Finding(reason, fix if abs(case.skew) > _SKEW_WARNED or wrong else "")


# ---- what KMS decides


def _verification(case: Case) -> Finding:
    """The document verified as KMS does, by KMS's time; KMS alone decides what roots it trusts."""
    case.need("device")
    case.need("document")
    try:
        case.parsed = document.AttestationDocument.parse(attestor.process_recipient().document())
        at = case.parsed.signed_at
        if case.skew is not None and "clock" not in case.failed:
            at = datetime.now(UTC) + timedelta(seconds=case.skew)
        root = hashlib.sha256(case.parsed.cabundle[0]).digest()
        expect = document.Expectations(source=None, allow_debug=True)
        document.verify(case.parsed, roots=[root], at=at, expect=expect)
    except document.DocumentError as error:
        raise errors.RefusedError(
            f"KMS would refuse the document, {error.check.replace('_', ' ')}: {error}"
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
    seconds = (datetime.now(UTC) - case.parsed.signed_at).total_seconds()
    return Finding(f"the document was signed {report.age(round(seconds))}, and is genuine")


def _debug_mode(case: Case) -> Finding:
    if case.parsed is None:
        raise Skipped("needs the check verification")
    if case.parsed.source == "nitrotpm":
        off = case.parsed.nitrotpm_pcrs.get(7, b"").hex() == SECURE_BOOT_OFF
        also = "; Secure Boot is off, so PCR7 is that of every such instance" if off else ""
        raise Skipped(f"the NitroTPM of an EC2 instance has no debug mode{also}")
    if case.parsed.debug_mode:
        fix = "start the enclave without --debug-mode: no key policy should allow zero PCRs"
        return Finding("this enclave runs in debug mode: PCR0, PCR1 and PCR2 are all zeros", fix)
    return Finding("this enclave does not run in debug mode")


def _attested_call(case: Case) -> Finding:
    """Decrypt's own call, which KMS only pretends to answer."""
    for name in WAY:
        case.need(name)
    if case.kms is None or not (case.blob or case.bound.key_id):
        raise Skipped("needs CIPHERTEXT, or else --key-id")
    holds = "verification" not in case.failed
    try:
        verdict = dry_run(case.kms, case.blob, case.bound, case.algorithm, document_holds=holds)
    except NoVerdict as unclear:
        raise Skipped(str(unclear)) from unclear
    return Finding(*verdict)


CHECKS: Final = (
    ("region", _region),
    ("ciphertext", _ciphertext),
    ("library", _library),
    ("device", _device),
    ("entropy", _entropy),
    ("credentials", _credentials),
    ("endpoint", _endpoint),
    ("document", _document),
    ("name", _name),
    ("tcp", _tcp),
    ("tls", _tls),
    ("clock", _clock),
    ("verification", _verification),
    ("debug mode", _debug_mode),
    ("attested call", _attested_call),
)
WAY: Final = ("region", "ciphertext", "device", "credentials", "endpoint", "document")
"""The checks that are decrypt's own steps before its call: where one fails, so does decrypt."""
