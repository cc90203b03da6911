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
    "ServiceUnavailable ServiceUnavailableException".split()
)


def translate(error: Exception, operation: str) -> AttestorError | None:  # noqa: C901, PLR0911 - a table
    """The SDK's exception in a call of `operation` as ours; None for an unknown one: a bug."""
    from botocore import exceptions as sdk

    match error:
        case sdk.ClientError():
            return _translate_answer(error, operation)
        case sdk.SSLError():
            return _translate_tls(error)
        case sdk.ConnectionError() | sdk.HTTPClientError():
            return UnreachableError(f"KMS cannot be reached: {error}")
        case sdk.IncompleteReadError() | sdk.MetadataRetrievalError():
            return UnreachableError(f"KMS cannot be reached: {error}")
        case sdk.NoCredentialsError() | sdk.PartialCredentialsError():
            return RefusedError(f"no valid AWS credentials: {error}", CREDENTIALS_HINT)
        case sdk.CredentialRetrievalError():
            return RefusedError(f"no valid AWS credentials: {error}", CREDENTIALS_HINT)
        case sdk.ParamValidationError():
            return InputError("KMS would not take these parameters: a length or a type is wrong")
        case RuntimeError() if is_of_expired_credentials(error):
            return RefusedError(f"no valid AWS credentials: {error}", EXPIRED_HINT)
        case sdk.BotoCoreError():
            return RefusedError(f"KMS cannot be called: {error}")
        case ValueError() | TypeError() | AttributeError() | LookupError():
            return NotAuthenticError(f"answer of KMS cannot be read ({type(error).__name__})")
        case _:
            return None


def may_be_of_clock(error: Exception) -> bool:
    """Whether a wrong clock can be the cause: of a certificate's validity, or of a signature's."""
    import ssl

    from botocore.exceptions import ClientError

    if isinstance(error, ClientError):
        return error.response.get("Error", {}).get("Code") in UNSIGNED
    found = (cause for cause in causes(error) if isinstance(cause, ssl.SSLCertVerificationError))
    return any(cause.verify_code in _VALIDITY for cause in found)


def is_of_expired_credentials(error: Exception) -> bool:
    """Whether botocore says that what a source of credentials gave had expired already."""
    return "still expired" in str(error)


def _translate_answer(error: Any, operation: str) -> AttestorError:
    """An error that KMS answered with: its code, its message and its request id, always."""
    answer = error.response.get("Error", {})
    metadata = error.response.get("ResponseMetadata", {})
    code, message = str(answer.get("Code") or "unknown error"), str(answer.get("Message") or "")
    request_id = metadata.get("RequestId") or "none"
    said = f"{': '.join(filter(None, (code, message)))} (request id {request_id})"
    if code in _TRANSIENT or metadata.get("HTTPStatusCode", 0) >= 500:
        return UnreachableError(f"KMS cannot answer now: {said}")
    return RefusedError(f"KMS refused to {operation.replace('_', ' ')}: {said}")


def _translate_tls(error: Exception) -> AttestorError:
    import ssl

    # a wrong name is found by urllib3, and not by ssl
    from urllib3.util.ssl_match_hostname import CertificateError

    found = list(causes(error))
    if any(isinstance(cause, ssl.SSLCertVerificationError | CertificateError) for cause in found):
        return NotAuthenticError(
            f"certificate of KMS is not valid: {error}",
            "somebody may be in the middle; AWS_CA_BUNDLE names the roots to trust",
        )
    unreadable = FileNotFoundError | PermissionError | IsADirectoryError
    if any(isinstance(cause, unreadable) or _has_no_root(cause) for cause in found):
        return InputError(f"CA bundle cannot be read: {error}", _bundle_hint())
    return UnreachableError(f"no TLS with KMS: {error}")


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
