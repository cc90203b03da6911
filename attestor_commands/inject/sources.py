"""Where the bytes of a manifest come from: files, S3, Secrets Manager, Parameter Store, https and
standard input; bounded, and only over verified TLS.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
from functools import partial
from typing import IO, TYPE_CHECKING, Any, Final
from urllib.parse import urljoin, urlsplit

from attestor import ATTEMPT_TIMEOUT, clock_fault
from attestor_io.errors import (
    AttestorError,
    InputError,
    NotAuthenticError,
    RefusedError,
    UnreachableError,
)
from attestor_io.kms_errors import (
    cut,
    fault_on_the_way,
    is_unreadable,
    kind_of,
    redacted,
    translate,
)
from attestor_io.reading import open_patiently
from attestor_io.shortage import causes
from attestor_io.urls import without_query

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from attestor_io.deadline import Deadline
    from attestor_io.vsock import Address

_REDIRECTS_MAX: Final = 3


class Text(io.BytesIO):
    """A value that its service keeps as text, so that a ciphertext in it is base64."""


class Stream:
    """The bytes of one source; more than `limit` of them are an error.

    `is_text` says that they are of a `Text`.
    """

    def __init__(
        self,
        source: IO[bytes] | Any,
        what: str,
        limit: int,
        translated: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._source, self._what, self._limit = source, what, limit
        self.is_text = isinstance(source, Text)
        self._translated = translated
        self._count = 0

    def read(self, size: int = -1) -> bytes:
        """Exactly so many bytes, fewer only at the end; raises an AttestorError."""
        want = min(size if size >= 0 else self._limit + 1, self._limit + 1 - self._count)
        with self._translated():
            data: bytes = self._source.read(want)
        self._count += len(data)
        if self._count > self._limit:
            raise InputError(f"source {self._what} is longer than {self._limit} bytes")
        return data


class Sources:
    """Opens sources; clients and connections are made once and kept. Thread-safe.

    `ca_bundle` is for hosts of AWS, `https_ca_bundle` for all others; None leaves it to the
    environment. All of them end by the deadline, a FIFO that nobody writes to as well.
    """

    def __init__(
        self,
        session: Any,
        region: str,
        ca_bundle: str | None,
        https_ca_bundle: str | None,
        s3_vsock: Address | None,
        host_vsock: Mapping[str, Address],
        deadline: Deadline,
        size: int,
    ) -> None:
        self._session, self._region, self._s3_vsock = session, region, s3_vsock
        self._host_vsock, self._deadline = host_vsock, deadline
        self._ca_bundle, self._https_ca_bundle = ca_bundle, https_ca_bundle
        self._connections = size
        self._lock = threading.Lock()
        self._clients: dict[str, Any] = {}  # by service
        self._pools: dict[bool, Any] = {}  # for hosts of AWS, for others

    @contextlib.contextmanager
    def open(self, source: str, limit: int) -> Iterator[Stream]:
        """The stream of a source as the manifest names it: a path, "-", s3://BUCKET/KEY, https://,
        secretsmanager:// or ssm://.
        """
        what = "standard input" if source == "-" else without_query(source)
        with contextlib.ExitStack() as opened:
            translated = partial(_translated, what, self._session)
            with translated():
                raw = opened.enter_context(self._open(source, limit))
            yield Stream(raw, what, limit, translated)

    def _open(self, source: str, limit: int) -> Any:
        if source.startswith(("secretsmanager://", "ssm://")):
            return self._value(source)
        if source.startswith("s3://"):
            bucket, _, key = source.removeprefix("s3://").partition("/")
            body = self._sdk("s3").get_object(Bucket=bucket, Key=key)["Body"]
            _bound(body._raw_stream, limit)
            return contextlib.closing(body)
        if source.startswith("https://"):
            return self._get(source, limit)
        return io.BufferedReader(open_patiently(source, "nothing came", self._deadline))

    def _value(self, source: str) -> IO[bytes]:
        """A value of Secrets Manager or Parameter Store, as a stream; text is a `Text`."""
        scheme, _, rest = source.partition("://")
        name, _, version = rest.partition("#")
        if scheme == "secretsmanager":
            asked = {"SecretId": name, **_version_of_secret(version)}
            answer = self._sdk("secretsmanager").get_secret_value(**asked)
            found = answer.get("SecretString") or answer.get("SecretBinary")
        else:
            named = f"{name}:{version}" if version else name
            answer = self._sdk("ssm").get_parameter(Name=named, WithDecryption=False)
            found = answer["Parameter"]["Value"]
        if isinstance(found, str):
            return Text(found.encode())
        if isinstance(found, bytes):
            return io.BytesIO(found)
        raise UnreachableError("answer has no value")

    def _sdk(self, service: str) -> Any:
        """The client of a service in which ciphertexts are kept."""
        from botocore.config import Config

        with self._lock:
            if service not in self._clients:
                client = self._session.create_client(
                    service,
                    region_name=self._region,
                    verify=self._ca_bundle,
                    config=Config(
                        max_pool_connections=self._connections,
                        connect_timeout=ATTEMPT_TIMEOUT,
                        read_timeout=ATTEMPT_TIMEOUT,
                    ),
                )
                if not client.meta.endpoint_url.startswith("https://"):
                    raise InputError(f"endpoint {client.meta.endpoint_url} is not https")
                if service == "s3" and self._s3_vsock:
                    from attestor_io.connections import carry

                    carry(client, self._s3_vsock)
                self._clients[service] = client
            return self._clients[service]

    @contextlib.contextmanager
    def _get(self, url: str, limit: int) -> Iterator[Any]:
        """The body of an https answer with status 200; redirects lead to https only."""
        for _ in range(_REDIRECTS_MAX + 1):
            answer = self._pool(urlsplit(url).hostname or "").request(
                "GET",
                url,
                preload_content=False,
                redirect=False,
                headers={"Accept-Encoding": "identity"},
            )
            with contextlib.closing(answer):
                if answer.status == 200:
                    _bound(answer, limit)
                    yield answer
                    return
                url = _https_url(url, _location(answer))
        raise InputError(f"it redirects more than {_REDIRECTS_MAX} times")

    def _pool(self, host: str) -> Any:
        """Connections whose other end is verified as a host of AWS, or as any other."""
        import urllib3

        from attestor_io.connections import OBJECTS_BOUND, by_name, governed_pools

        with self._lock:
            aws = is_of_aws(host, self._session)
            if aws not in self._pools:
                pool = urllib3.PoolManager(
                    maxsize=self._connections,
                    ssl_context=self._trust(aws=aws),
                    timeout=urllib3.Timeout(ATTEMPT_TIMEOUT),
                    retries=urllib3.Retry(connect=2, read=0, redirect=0, status=0, other=0),
                )
                pool.pool_classes_by_scheme = governed_pools(
                    pool.pool_classes_by_scheme,
                    by_name(self._host_vsock),
                    OBJECTS_BOUND._replace(deadline=self._deadline),
                )
                self._pools[aws] = pool
            return self._pools[aws]

    def _trust(self, *, aws: bool) -> Any:
        """What verifies a server: for AWS the SDK's bundle, for others OpenSSL's: SSL_CERT_FILE or
        its default.
        """
        import ssl

        from botocore.httpsession import get_cert_path

        if aws:
            bundle = (
                self._ca_bundle
                or self._session.get_config_variable("ca_bundle")
                or get_cert_path(True)
            )
        else:  # a file that is named must be there: OpenSSL by itself would go on without it
            bundle = self._https_ca_bundle or os.environ.get("SSL_CERT_FILE") or None
        try:
            return ssl.create_default_context(cafile=bundle)
        except OSError as error:
            raise InputError(
                f"CA bundle {bundle} cannot be read: {error.strerror or error}"
            ) from error


def _version_of_secret(version: str) -> dict[str, str]:
    """What asks Secrets Manager for a version; an id has 32 to 64 characters, a label has not."""
    if not version:
        return {}
    return {"VersionId" if 32 <= len(version) <= 64 else "VersionStage": version}


def _bound(response: Any, limit: int) -> None:
    from attestor_io.connections import bound_object

    bound_object(response, limit)


def is_of_aws(host: str, session: Any) -> bool:
    """Whether a host's name ends in a DNS suffix of a partition that the session's data knows."""
    partitions = session.get_component("data_loader").load_data("partitions")["partitions"]
    suffixes = {
        partition["outputs"][name]
        for partition in partitions
        for name in ("dnsSuffix", "dualStackDnsSuffix")
    }
    labels = host.lower().removesuffix(".").split(".")
    return any(".".join(labels[start:]) in suffixes for start in range(len(labels)))


def _location(answer: Any) -> str:
    """Where an answer redirects to; every other one is an error."""
    if answer.status in {301, 302, 303, 307, 308} and answer.headers.get("Location"):
        return str(answer.headers["Location"])
    raise _refusal(answer.status, f"HTTP status {answer.status}")


def _https_url(base: str, location: str) -> str:
    """Where a redirect leads, which must be https."""
    try:
        url = urljoin(base, location)
        secure = urlsplit(url).scheme == "https" and bool(urlsplit(url).hostname)
    except ValueError:  # such as a host that begins like an IPv6 address
        secure, url = False, location
    if not secure:
        raise NotAuthenticError(f"it redirects to {without_query(url)!r}, which is not https")
    return url


def _refusal(status: int, said: str) -> AttestorError:
    if status in {401, 403}:
        return RefusedError(said)
    if status == 429 or status >= 500:
        return UnreachableError(said)
    return InputError(said)


@contextlib.contextmanager
def _translated(what: str, session: Any) -> Iterator[None]:
    """Let only errors of ours out, which name the source and show no credential."""
    try:
        yield
    except Exception as error:
        ours = clock_fault(error) or _ours(error)
        if ours is None:
            raise
        ours.args = (f"source {what} cannot be read: {ours}",)
        if ours is error:
            raise
        raise redacted(ours, session) from error


def _ours(error: Exception) -> AttestorError | None:  # noqa: PLR0911 - a table, as match
    """What a file, urllib3 or the SDK raised."""
    import ssl

    from botocore import exceptions as sdk
    from urllib3 import exceptions as http
    from urllib3.util.ssl_match_hostname import CertificateError

    kinds = (ssl.SSLCertVerificationError, CertificateError)
    match error:
        case AttestorError():
            return error
        case sdk.ClientError():
            answer = error.response.get("Error", {})
            code, message = str(answer.get("Code") or "error"), str(answer.get("Message") or "")
            said = ": ".join(cut(one) for one in (code, message) if one)
            kind = kind_of(code)
            return (
                kind(said)
                if kind
                else _refusal(
                    error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0), said
                )
            )
        case http.HTTPError() | sdk.HTTPClientError() | sdk.ConnectionError() if any(
            isinstance(cause, kinds) for cause in causes(error)
        ):
            return NotAuthenticError(f"certificate is not valid: {error}")
        case http.HTTPError():
            return fault_on_the_way(error, "its server") or UnreachableError(str(error))
        case OSError() if not isinstance(error, sdk.BotoCoreError):
            return InputError(error.strerror or str(error))
        case RecursionError():  # a loop of redirects is one for the SDK
            return UnreachableError("answer redirects without end, or is nested too deep")
        case _ if is_unreadable(error):
            return UnreachableError(f"answer cannot be read ({type(error).__name__})")
        case _:
            return translate(error, "read it", "its server")
