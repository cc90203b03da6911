"""The instance metadata service of an EC2 instance (IMDS), version 2 only: a WSGI application.

A client puts to latest/api/token for a token, and gets what is below latest/meta-data with it.
There are no others of the service's trees (dynamic, user-data) here. As with the real service, the
tags of the instance are not there unless they are enabled.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from werkzeug.wrappers import Request, Response

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from wsgiref.types import StartResponse, WSGIEnvironment

    from nitrosim.kms_wire import Credentials

TTL_MAX: Final = 21600  # seconds, six hours
_ROOT: Final = "latest/meta-data"
_TOKEN_PATH: Final = "latest/api/token"  # noqa: S105 - a path
_TTL: Final = "X-aws-ec2-metadata-token-ttl-seconds"
_TOKEN: Final = "X-aws-ec2-metadata-token"  # noqa: S105 - a header's name
# What the EC2 user guide allows in a tag's key once tags are in the metadata; "_index" is reserved
_KEY: Final = re.compile(r"(?!(?:\.{1,2}|_index)\Z)[A-Za-z0-9+\-=.,_:@]{1,128}")
_VALUE_MAX: Final = 256


class MetadataService:
    """What one instance is told of itself: its id, place, role credentials and, with `tags`, its
    tags.

    Tags of None are not enabled, as is the default of an instance. `clock` counts seconds. Raises
    ValueError for a tag that cannot be in the metadata.
    """

    def __init__(
        self,
        *,
        instance_id: str,
        region: str,
        role: str,
        credentials: Credentials,
        tags: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for key, value in (tags or {}).items():
            _check_tag(key, value)
        self._fixed = {
            "instance-id": instance_id,
            "placement/availability-zone": f"{region}a",
            "placement/region": region,
            **{f"tags/instance/{key}": value for key, value in (tags or {}).items()},
        }
        self._role = role
        self._credentials = credentials
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens: dict[str, float] = {}  # each with its end

    def set_tag(self, key: str, value: str) -> None:
        """Tag the instance anew, as its owner may at any time; raises ValueError."""
        _check_tag(key, value)
        self._fixed = self._fixed | {f"tags/instance/{key}": value}

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        return self._respond(Request(environ))(environ, start_response)

    def _respond(self, request: Request) -> Response:
        path = request.path.strip("/")
        if request.method == "PUT" and path == _TOKEN_PATH:
            return self._issue(request)
        if request.method != "GET":
            return _plain(405, "Method Not Allowed")
        with self._lock:
            end = self._tokens.get(request.headers.get(_TOKEN, ""))
        if end is None or end <= self._clock():
            return _plain(401, "Unauthorized")
        text = self._look_up(path)
        return _plain(404, "Not Found") if text is None else _plain(200, text)

    def _issue(self, request: Request) -> Response:
        """A new token; none for a request that came through a proxy, as X-Forwarded-For tells."""
        ttl = request.headers.get(_TTL, "")
        if "X-Forwarded-For" in request.headers:
            return _plain(403, "Forbidden")
        if not re.fullmatch(r"[0-9]{1,5}", ttl) or not 1 <= int(ttl) <= TTL_MAX:
            return _plain(400, "Bad Request")
        now = self._clock()
        token = secrets.token_urlsafe(42)
        with self._lock:
            self._tokens = {old: end for old, end in self._tokens.items() if end > now} | {
                token: now + int(ttl)
            }
        response = _plain(200, token)
        response.headers[_TTL] = ttl
        return response

    def _look_up(self, path: str) -> str | None:
        """A value, or the list of what is below the path: a line each, and a slash after what has
        more below it.
        """
        if not f"{path}/".startswith(f"{_ROOT}/"):
            return None
        tree = self._fixed | {
            f"iam/security-credentials/{self._role}": _role_credentials(self._credentials)
        }
        path = path.removeprefix(_ROOT).lstrip("/")
        if path in tree:
            return tree[path]
        prefix = f"{path}/" if path else ""
        below = (
            name.removeprefix(prefix).partition("/") for name in tree if name.startswith(prefix)
        )
        return "\n".join(sorted({name + slash for name, slash, _ in below})) or None


def _check_tag(key: str, value: str) -> None:
    if not _KEY.fullmatch(key):
        raise ValueError(
            f"{key!r} cannot be the key of a tag in the metadata: letters, digits and + - = . , "
            "_ : @"
        )
    if len(value) > _VALUE_MAX:
        raise ValueError(
            f"the value of a tag has at most {_VALUE_MAX} characters, {key} has {len(value)}"
        )


def _role_credentials(credentials: Credentials) -> str:
    now = datetime.now(UTC)
    fields = {
        "Code": "Success",
        "LastUpdated": _timestamp(now),
        "Type": "AWS-HMAC",
        "AccessKeyId": credentials.access_key,
        "SecretAccessKey": credentials.secret_key,
        "Token": credentials.token,
        "Expiration": _timestamp(now + timedelta(hours=6)),
    }
    return json.dumps(fields, indent=2)


def _timestamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _plain(status: int, text: str) -> Response:
    return Response(text, status, content_type="text/plain; charset=utf-8")
