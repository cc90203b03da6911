"""Exceptions of the SDK, and errors that KMS answers with, as errors of ours."""

from __future__ import annotations

from typing import Any, Final

from attestor_io.errors import (
    AttestorError,
    InputError,
    NotAuthenticError,
    RefusedError,
    UnreachableError,
)
from attestor_io.shortage import causes

CREDENTIALS_HINT: Final = (
    "in an enclave the parent must pass them on, and renew them when they expire"
)
EXPIRED_HINT: Final = "they are expired: renew them"
SHOWN_MAX: Final = 2000  # characters of a text from outside
_PROXY_HINT: Final = "is vsock-proxy running on the parent, and does it listen on this port?"
_CLOSED_HINT: Final = (
    "vsock-proxy does that if its allow list lacks the host, or if it cannot reach the host itself"
)

# What AWS answers to a signature that it cannot verify, which bears the caller's time
UNSIGNED: Final = frozenset(
    "InvalidSignatureException SignatureDoesNotMatch RequestExpired IncompleteSignature "
    "RequestTimeTooSkewed".split()
)
_VALIDITY: Final = frozenset({9, 10})  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
# Worth another try: the SDK's throttling codes, and what KMS documents as transient
_TRANSIENT: Final = frozenset(
    "ThrottlingException Throttling ThrottledException RequestThrottled RequestThrottledException "
    "RequestLimitExceeded TooManyRequestsException SlowDown DependencyTimeoutException "
    "KMSInternalException KeyUnavailableException InternalFailure InternalServerError "
    "IDPCommunicationError "
    "ServiceUnavailable ServiceUnavailableException".split()
)

# What a caller's credentials or permissions are to blame for, whichever status AWS gives it
_NOT_ALLOWED: Final = UNSIGNED | frozenset(
    "AccessDenied AccessDeniedException DecryptionFailure ExpiredToken ExpiredTokenException "
    "InvalidClientTokenId MissingAuthenticationTokenException UnrecognizedClientException".split()
)


def kind_of(code: str) -> type[AttestorError] | None:
    """What an error code of AWS is, where it tells more than the HTTP status: worth another try,
    or a refusal.
    """
    if code in _TRANSIENT:
        return UnreachableError
    return RefusedError if code in _NOT_ALLOWED else None


def translate(  # noqa: PLR0911 - a table
    error: Exception, operation: str, service: str = "KMS"
) -> AttestorError | None:
    """The SDK's exception in a call of `operation` as ours; None for an unknown one: a bug."""
    from botocore import exceptions as sdk

    ours = next((one for one in causes(error) if isinstance(one, AttestorError)), None)
    if ours is not None:
        return _answered_too_much(ours, service)
    match error:
        case sdk.ClientError():
            return _translate_answer(error, operation, service)
        case (
            sdk.ConnectionError()
            | sdk.HTTPClientError()
            | sdk.IncompleteReadError()
            | sdk.MetadataRetrievalError()
        ):
            return _translate_connection(error, service)
        case sdk.NoCredentialsError() | sdk.PartialCredentialsError():
            return RefusedError(f"no valid AWS credentials: {error}", CREDENTIALS_HINT)
        case sdk.CredentialRetrievalError():
            return RefusedError(f"no valid AWS credentials: {error}", CREDENTIALS_HINT)
        case sdk.ParamValidationError():
            return InputError("KMS would not take these parameters: a length or a type is wrong")
        case RuntimeError() if is_of_expired_credentials(error):
            return RefusedError(f"no valid AWS credentials: {error}", EXPIRED_HINT)
        case sdk.BotoCoreError():
            return RefusedError(f"{service} cannot be called: {error}")
        case _ if is_unreadable(error):
            return NotAuthenticError(f"answer of {service} cannot be read ({type(error).__name__})")
        case _:
            return None


def is_unreadable(error: Exception) -> bool:
    """Whether this is what the SDK raises when it parses an answer that makes no sense to it."""
    from botocore.parsers import ResponseParserError

    kinds = ValueError | TypeError | AttributeError | LookupError | ArithmeticError | RecursionError
    return isinstance(error, kinds | ResponseParserError)


def cut(text: str) -> str:
    """So much of a text from outside as a message has room for."""
    return text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}... ({len(text)} characters)"


def _answered_too_much(error: AttestorError, service: str) -> AttestorError:
    """An error that was raised below the SDK; KMS sends nothing of that length, others might."""
    from attestor_io.connections import AnswerTooLongError

    if not isinstance(error, AnswerTooLongError):
        return error
    if service == "KMS":
        return NotAuthenticError(f"answer of KMS cannot be read: {error}")
    return UnreachableError(f"answer of {service} cannot be read: {error}")


def _translate_connection(error: Any, service: str) -> AttestorError:
    """A connection that there is not, or that does not last."""
    from botocore.exceptions import SSLError
    from urllib3.exceptions import LocationParseError

    # of a proxy: whatever else is asked was a URL before. Its text may end in a password
    unsplit = "Invalid IPv6 URL" in str(error.kwargs.get("error"))  # urllib.parse's ValueError
    if unsplit or any(isinstance(one, LocationParseError) for one in causes(error)):
        return InputError(f"{service} cannot be called: the proxy of HTTPS_PROXY is no URL")
    if fault := fault_on_the_way(error, service):
        return fault
    if isinstance(error, SSLError):
        return _translate_tls(error, service)
    return UnreachableError(f"{service} cannot be reached: {error}")


def fault_on_the_way(error: Exception, service: str) -> UnreachableError | None:
    """What vsock, a proxy or an early end is to blame for; libraries would blame the endpoint."""
    from attestor_io.connections import ClosedEarlyError, NoWayError, NoWayInTimeError

    for cause in causes(error):
        if isinstance(cause, NoWayError | NoWayInTimeError):
            reason = f"no connection to {cause.where}: {cause.reason}"
            return UnreachableError(f"{service} cannot be reached: {reason}", _PROXY_HINT)
        if isinstance(cause, ClosedEarlyError):
            hints = [_CLOSED_HINT] if cause.where.startswith("vsock") else []
            return UnreachableError(f"{service} cannot be reached: {cause}", *hints)
    return None


def may_be_of_clock(error: Exception) -> bool:
    """Whether a wrong clock can be the cause: of a certificate's validity, or of a signature's."""
    import ssl

    from botocore.exceptions import ClientError

    found = list(causes(error))
    answers = (cause.response for cause in found if isinstance(cause, ClientError))
    if any(answer.get("Error", {}).get("Code") in UNSIGNED for answer in answers):
        return True
    certificates = (cause for cause in found if isinstance(cause, ssl.SSLCertVerificationError))
    return any(cause.verify_code in _VALIDITY for cause in certificates)


def is_of_expired_credentials(error: Exception) -> bool:
    """Whether botocore says that what a source of credentials gave had expired already."""
    return "still expired" in str(error)


def _translate_answer(error: Any, operation: str, service: str) -> AttestorError:
    """An error that KMS answered with: its code, its message and its request id, always."""
    answer = error.response.get("Error", {})
    metadata = error.response.get("ResponseMetadata", {})
    code, message = str(answer.get("Code") or "unknown error"), str(answer.get("Message") or "")
    request_id = cut(str(metadata.get("RequestId") or "none"))
    said = f"{': '.join(cut(one) for one in (code, message) if one)} (request id {request_id})"
    if code in _TRANSIENT or metadata.get("HTTPStatusCode", 0) >= 500:
        return UnreachableError(f"{service} cannot answer now: {said}")
    return RefusedError(f"{service} refused to {operation.replace('_', ' ')}: {said}")


def _translate_tls(error: Exception, service: str) -> AttestorError:
    import ssl

    # a wrong name is found by urllib3, and not by ssl
    from urllib3.util.ssl_match_hostname import CertificateError

    found = list(causes(error))
    if any(isinstance(cause, ssl.SSLCertVerificationError | CertificateError) for cause in found):
        return NotAuthenticError(
            f"certificate of {service} is not valid: {error}",
            "somebody may be in the middle; AWS_CA_BUNDLE names the roots to trust",
        )
    unreadable = FileNotFoundError | PermissionError | IsADirectoryError
    if any(isinstance(cause, unreadable) or _has_no_root(cause) for cause in found):
        return InputError(f"CA bundle cannot be read: {error}", _bundle_hint())
    return UnreachableError(f"no TLS with {service}: {error}")


def _bundle_hint() -> str:
    """Say what names the CA bundle: the variables that are set, or else a file."""
    import os

    variables = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")
    named = [f"{name}={os.environ[name]}" for name in variables if os.environ.get(name)]
    return f"{' or '.join([*named, 'ca_bundle of a profile or manifest'])} names it"


def _has_no_root(cause: BaseException) -> bool:
    """Whether OpenSSL found no certificate where it was told to look for roots."""
    return getattr(cause, "library", None) == "X509"


def redacted(error: AttestorError, session: Any) -> AttestorError:
    """The error without a session's credentials: AWS may echo the request that was signed."""
    credentials = session._credentials
    if credentials is None:
        return error
    message = str(error)
    for name, secret in vars(credentials).items():  # as properties they might be refreshed
        if secret and isinstance(secret, str) and name.strip("_") in {"secret_key", "token"}:
            for shown in (secret, repr(secret)[1:-1]):
                message = message.replace(shown, "[redacted]")
    without = type(error)(message, *error.hints)
    without.notes = error.notes
    return without
