"""Secrets Manager and Parameter Store on moto's secrets and parameters: for the ciphertexts that
teams keep there.

Both speak JSON 1.1 with the operation in X-Amz-Target, as KMS does. Requests are authenticated, and
everything is allowed but what is called "forbidden" or "/forbidden". Nothing is shared between two
of these, unlike moto's own. moto is imported with the first request: its Parameter Store brings
half of EC2.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import uuid
from typing import TYPE_CHECKING, Any, Final

from werkzeug.wrappers import Request, Response

from nitrosim.kms_wire import CONTENT_TYPE, KmsError, Parameters, authenticate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from datetime import datetime
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from nitrosim.kms_wire import Credentials

FORBIDDEN: Final = "forbidden"

# by the prefix of X-Amz-Target: the service that a request is signed for, and what is answered
_SERVICES: Final[Mapping[str, tuple[str, frozenset[str]]]] = {
    "secretsmanager": (
        "secretsmanager",
        frozenset(
            "CreateSecret DeleteSecret DescribeSecret GetSecretValue ListSecrets "
            "ListSecretVersionIds PutSecretValue RestoreSecret UpdateSecret "
            "UpdateSecretVersionStage".split()
        ),
    ),
    "AmazonSSM": (
        "ssm",
        frozenset(
            "DeleteParameter DeleteParameters DescribeParameters GetParameter GetParameterHistory "
            "GetParameters GetParametersByPath LabelParameterVersion PutParameter".split()
        ),
    ),
}


class StoredValues:
    """A WSGI application in front of another, which gets what is for neither service."""

    def __init__(
        self,
        other: WSGIApplication,
        *,
        region: str,
        account: str,
        credentials: Credentials,
        clock: Callable[[], datetime],
    ) -> None:
        self._other = other
        self._region, self._account = region, account
        self._credentials, self._clock = credentials, clock
        self._lock = threading.Lock()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        prefix, _, operation = environ.get("HTTP_X_AMZ_TARGET", "").partition(".")
        if prefix not in _SERVICES:
            return self._other(environ, start_response)
        return self._respond(Request(environ), *_SERVICES[prefix], operation)(
            environ, start_response
        )

    def _respond(
        self, request: Request, service: str, known: frozenset[str], operation: str
    ) -> Response:
        body = request.get_data()
        try:
            authenticate(request, body, self._credentials, self._region, self._clock(), service)
            parameters = Parameters.parse(body).members
            _authorize(service, operation, parameters, known)
            with self._lock:
                answer, status = self._answer(service, operation, parameters), 200
        except KmsError as error:
            answer, status = error.body(), error.status
        response = Response(answer, status, content_type=CONTENT_TYPE)
        response.headers["x-amzn-RequestId"] = str(uuid.uuid4())
        return response

    def _answer(self, service: str, operation: str, parameters: Mapping[str, object]) -> bytes:
        """What moto answers, and its errors as these services send them."""
        from moto.core.exceptions import JsonRESTError, ServiceException

        moto = self._moto[service](parameters)
        try:
            answer = getattr(moto, re.sub(r"(?<!^)(?=[A-Z])", "_", operation).lower())()
        except JsonRESTError as error:
            raise KmsError(error.error_type, error.message or None) from error
        except ServiceException as error:
            raise KmsError(error.code, error.message or None) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # moto's way to say that a parameter is missing or of another type
            raise KmsError("ValidationException", f"{operation}: {type(error).__name__}") from error
        if isinstance(answer, str):
            return answer.encode()
        return json.dumps(answer.result, default=lambda moment: moment.timestamp()).encode()

    @functools.cached_property
    def _moto(self) -> Mapping[str, Callable[[Mapping[str, object]], Any]]:
        """moto's operations on backends of our own, by service."""
        from moto.secretsmanager.models import SecretsManagerBackend
        from moto.secretsmanager.responses import SecretsManagerResponse
        from moto.ssm.models import SimpleSystemManagerBackend
        from moto.ssm.responses import SimpleSystemManagerResponse

        secrets = SecretsManagerBackend(self._region, self._account)
        systems = SimpleSystemManagerBackend(self._region, self._account)

        class Secrets(SecretsManagerResponse):
            backend = secrets

        class Parameters(SimpleSystemManagerResponse):
            ssm_backend = systems

        def prepared(kind: type[Any]) -> Callable[[Mapping[str, object]], Any]:
            def prepare(parameters: Mapping[str, object]) -> Any:
                made = kind()
                made.region, made.current_account = self._region, self._account
                made.body, made.querystring, made.uri_match = json.dumps(parameters), {}, {}
                return made

            return prepare

        return {"secretsmanager": prepared(Secrets), "ssm": prepared(Parameters)}


def _authorize(
    service: str, operation: str, parameters: Mapping[str, object], known: frozenset[str]
) -> None:
    if operation not in known:
        raise KmsError("UnknownOperationException")
    named = parameters.get("SecretId") or parameters.get("Name")
    if named in {FORBIDDEN, f"/{FORBIDDEN}"}:
        raise KmsError(
            "AccessDeniedException",
            f"User is not authorized to perform: {service}:{operation} on resource: {named}",
        )
