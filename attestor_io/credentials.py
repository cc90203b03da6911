"""Where a session of the SDK finds its credentials: the parent's choice, so nothing that it answers
is trusted, and no message repeats any of it.

The chain and the refreshing are botocore's. What asks the metadata service and the endpoints of
containers is ours: bounded in bytes and time, never through a proxy, through vsock where an address
is named, and with errors that tell a source that is not reached from one that has nothing.
"""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from attestor_io import kms_errors
from attestor_io.deadline import Deadline
from attestor_io.errors import (
    AttestorError,
    NotAuthenticError,
    RefusedError,
    UnreachableError,
)
from attestor_io.urls import without_query

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from attestor_io.metadata import Service
    from attestor_io.vsock import Address

_CONTAINER: Final = "http://169.254.170.2"  # what a relative URI is relative to
_FIELDS: Final = ("AccessKeyId", "SecretAccessKey", "Token", "Expiration")
_ANSWER_SECONDS: Final = 5  # for a connection to a container's endpoint, and for silence
_PAUSES: Final = (0.1, 0.2)  # seconds before its second and third attempt
_GRACE: Final = timedelta(minutes=15)


def equip(
    session: Any, deadline: Deadline, imds_vsock: Address | None, hosts: Mapping[str, Address]
) -> None:
    """Let a botocore session ask the metadata service and containers' endpoints in our way.

    Roles that a profile takes on with these as their source do so too. Raises what botocore does
    for a configuration that it cannot use.
    """
    resolver = session.get_component("credential_provider")
    resolver.get_provider("iam-role")._role_fetcher = _RoleFetcher(imds_vsock, deadline)
    resolver.get_provider("container-role")._fetcher = _ContainerFetcher(hosts, deadline)
    for provider in resolver.providers:
        provider.load = partial(_load, session, provider.METHOD, provider.load)
    if session.get_config_variable("defaults_mode") == "auto":
        # which asks the metadata service for its region, by itself
        session.set_config_variable("defaults_mode", "standard")


def _load(session: Any, method: str, load: Callable[[], Any]) -> Any:
    session.attestor_asks = method
    found = load()
    session.attestor_asks = None
    return found


def not_in_time(session: Any) -> str:
    """What does not come in time, of a session that `equip` prepared: the source is botocore's name
    for it, such as "custom-process".
    """
    # credentials of a role may be found at once, and fetched when they are used
    found = getattr(session._credentials, "method", None)
    method = getattr(session, "attestor_asks", None) or found
    return f"no AWS credentials from {method}" if method else "no AWS credentials"


def check(session: Any) -> None:
    """Have a session find its credentials now; raises only errors of ours.

    UnreachableError, which names the source, is for one that does not answer or fails.
    """
    try:
        credentials = session.get_credentials()
        found = credentials.get_frozen_credentials() if credentials else None
    except AttestorError as error:
        raise kms_errors.redacted(error, session) from error
    except Exception as error:
        raise kms_errors.redacted(_translated(error), session) from error
    if found is None:
        raise missing("there are none")
    for value in filter(None, (found.access_key, found.secret_key, found.token)):
        if not (isinstance(value, str) and value.isascii() and value.isprintable()):
            raise missing("they hold what no credentials hold")


def missing(reason: str, hint: str = kms_errors.CREDENTIALS_HINT) -> RefusedError:
    """The error for credentials that are not there, or are none."""
    return RefusedError(f"no valid AWS credentials: {reason}", hint)


def _not_reached(error: AttestorError) -> UnreachableError:
    hints = (*error.hints, kms_errors.CREDENTIALS_HINT)
    return UnreachableError(f"AWS credentials cannot be fetched: {error}", *hints)


def _translated(error: Exception) -> AttestorError:  # noqa: PLR0911 - a table
    """What one of the chain's sources raised, STS among them."""
    from botocore import exceptions as sdk

    if kms_errors.is_of_expired_credentials(error):
        return missing(str(error), kms_errors.EXPIRED_HINT)
    if isinstance(error, OSError) and error.filename and not isinstance(error, sdk.BotoCoreError):
        return missing(f"token file {error.filename} cannot be read: {error.strerror}")
    if kms_errors.is_unreadable(error) and not isinstance(error, sdk.BotoCoreError):
        if isinstance(error, ValueError):  # of a file or a variable: answers raise others
            return missing(f"they cannot be read ({type(error).__name__})")
        return _not_reached(UnreachableError("answer of their source cannot be read"))
    ours = kms_errors.translate(error, "give credentials", "their source")
    if isinstance(ours, UnreachableError):
        return _not_reached(ours)
    if isinstance(ours, NotAuthenticError):
        return NotAuthenticError(f"AWS credentials cannot be fetched: {ours}", *ours.hints)
    if isinstance(error, sdk.ClientError | sdk.BotoCoreError) and isinstance(ours, RefusedError):
        return missing(kms_errors.cut(str(error)))
    return ours or missing(f"they cannot be read ({type(error).__name__})")


class _RoleFetcher:
    """In the place of botocore's InstanceMetadataFetcher."""

    def __init__(self, address: Address | None, deadline: Deadline) -> None:
        self._address, self._deadline = address, deadline

    def retrieve_iam_role_credentials(self) -> dict[str, str]:
        """The credentials of the instance's role; none where the metadata service is disabled."""
        from attestor_io.metadata import Service

        if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
            return {}
        deadline = _part_of(self._deadline)
        service = Service.at(self._address, os.environ, deadline)
        try:
            role, fields = _role(service)
        except UnreachableError as error:
            raise _not_reached(error) from error
        except RefusedError as error:
            raise missing(str(error)) from error
        return {
            "role_name": role,
            "access_key": fields["AccessKeyId"],
            "secret_key": fields["SecretAccessKey"],
            "token": fields["Token"],
            "expiry_time": fields["Expiration"],
        }


def _role(service: Service) -> tuple[str, dict[str, str]]:
    role, body = service.role()
    return role, _fields(body, f"metadata service at {service.where}")


class _ContainerFetcher:
    """In the place of botocore's ContainerMetadataFetcher: of ECS, EKS Pod Identity and others."""

    def __init__(self, hosts: Mapping[str, Address], deadline: Deadline) -> None:
        self._hosts, self._deadline = hosts, deadline

    def full_url(self, relative_uri: str) -> str:
        """Where $AWS_CONTAINER_CREDENTIALS_RELATIVE_URI leads."""
        return _CONTAINER + relative_uri

    def retrieve_full_uri(
        self, full_url: str, headers: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """The members of an answer, of which four are there; raises only errors of ours."""
        from botocore.utils import ContainerMetadataFetcher

        shown = f"endpoint of container credentials {without_query(full_url)}"
        try:
            validator: Any = ContainerMetadataFetcher(session=object())
            validator._validate_allowed_url(full_url)
        except ValueError as error:
            reason = "http is for the loopback and the addresses of container services only"
            raise missing(f"{shown} is not asked: {reason}") from error
        deadline = _part_of(self._deadline)
        work = partial(self._ask, full_url, headers or {}, shown)
        try:
            return deadline.call(partial(_tried_again, work), f"no answer of {shown}")
        except UnreachableError as error:
            raise _not_reached(error) from error

    def _ask(self, url: str, headers: Mapping[str, str], shown: str) -> dict[str, str]:
        """Ask once."""
        from botocore.awsrequest import AWSRequest
        from botocore.httpsession import URLLib3Session

        from attestor_io import connections

        http_session = URLLib3Session(timeout=_ANSWER_SECONDS)
        connections.govern(http_session, connections.by_name(self._hosts))
        request = AWSRequest("GET", url, {"Accept": "application/json", **headers})
        try:
            answer = http_session.send(request.prepare())
        except Exception as error:
            ours = kms_errors.translate(error, "give credentials", shown)
            raise ours or UnreachableError(f"{shown} failed ({type(error).__name__})") from error
        finally:
            http_session.close()
        if answer.status_code == 200:
            return _fields(answer.content, shown)
        if answer.status_code == 429 or answer.status_code >= 500:
            raise UnreachableError(f"{shown} answers {answer.status_code}")
        raise missing(f"{shown} answers {answer.status_code}")


def _tried_again(work: Callable[[], dict[str, str]]) -> dict[str, str]:
    for pause in _PAUSES:
        try:
            return work()
        except UnreachableError:
            time.sleep(pause)
    return work()


def _part_of(deadline: Deadline) -> Deadline:
    """The time that one source has: some is left for saying what became of it."""
    from attestor_io.metadata import TIMEOUT

    return Deadline(min(TIMEOUT, 0.75 * deadline.left))


def _fields(body: bytes, source: str) -> dict[str, str]:
    """The JSON object of credentials in an answer; raises UnreachableError and RefusedError."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UnreachableError(f"answer of {source} is not JSON") from error
    if not isinstance(fields, dict):
        raise UnreachableError(f"answer of {source} is JSON, but no object")
    lacking = [name for name in _FIELDS if not isinstance(fields.get(name), str)]
    if lacking:
        code = fields.get("Code") or fields.get("code")
        said = f", it says {kms_errors.cut(code)}" if isinstance(code, str) else ""
        raise RefusedError(f"answer of {source} has no {', '.join(lacking)}{said}")
    return {**fields, "Expiration": _renewal(fields["Expiration"], source)}


def _renewal(expiration: str, source: str) -> str:
    """When to renew credentials: in some minutes, if they seem to have expired already.

    The source cannot give newer ones, or our clock is ahead: whether they hold is AWS's to say.
    """
    try:
        expires = datetime.fromisoformat(expiration)
        soon = datetime.now(UTC) + _GRACE
        lasts = expires > datetime.now(UTC)
    except (ValueError, TypeError) as error:  # no time at all, or one without a zone
        raise UnreachableError(f"answer of {source} has an Expiration that is none") from error
    return (expires if lasts else soon).isoformat(timespec="seconds")
