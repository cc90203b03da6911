"""AWS KMS on a laptop, with the Recipient honoured: a WSGI application on top of moto's keys.

A request is authenticated (Signature Version 4), its attestation document verified against the
simulated root, the key policy evaluated with the document's PCRs, and the secret sealed for the
document's public key. What is assumed where no behaviour of KMS is public:

- A document that is not authentic, or that holds no RSA-2048 SubjectPublicKeyInfo, is a
ValidationException. - The document is verified before the key policy is evaluated, and a dry run
evaluates its PCRs. - There are no identity policies here. Where a key policy leaves a request to
them alone, it is allowed if the key is of
  the principal's own account; where it cannot be told otherwise, as with an unknown operator, it
  is refused.
  Operations that use no key's secret (CreateKey, DisableKey, ...) are allowed to everyone.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import threading
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from moto.utilities.utils import get_partition
from werkzeug.http import http_date
from werkzeug.wrappers import Request, Response

import keypolicy
from nitrosim import kms_faults
from nitrosim.envelope import FORMS, seal
from nitrosim.kms_keys import OAEP, SYMMETRIC, Keys
from nitrosim.kms_operations import SECRETS, Answer, Operations
from nitrosim.kms_wire import (
    CONTENT_TYPE,
    TARGET,
    Credentials,
    KmsError,
    Parameters,
    authenticate,
    invalid,
)
from nitrosim.module import DEFAULT_PCRS
from nsm.document import AttestationDocument, DocumentError, Expectations, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from wsgiref.types import StartResponse, WSGIEnvironment

    from moto.kms.models import Key

ALIAS: Final = "alias/nitrosim"
ACCOUNT: Final = "111122223333"
REGION: Final = "eu-west-1"
ROLE: Final = "nitrosim-enclave"
ADMINISTRATOR: Final = "nitrosim-administrator"

FAULTS: Final[Mapping[str, str]] = {
    name: fault.description for name, fault in kms_faults.BY_NAME.items()
}
"""What `AttestedKms` can do wrong to a request with a Recipient, and what that is."""

_PRINCIPAL: Final = re.compile(r"arn:[a-z-]+:(?:iam|sts)::\d{12}:\S+")
_DOCUMENT_MAX: Final = 262_144
_RECIPIENT_BITS: Final = 2048
_ADMINISTRATION: Final = [
    f"kms:{verb}*"
    for verb in (
        "Create",
        "Describe",
        "Enable",
        "List",
        "Put",
        "Update",
        "Revoke",
        "Disable",
        "Get",
        "Delete",
        "Tag",
        "Untag",
        "Schedule",
        "Cancel",
    )
]
_WITHOUT_DOCUMENT: Final = [
    "kms:Encrypt",
    "kms:DescribeKey",
    "kms:GetPublicKey",
    "kms:GenerateDataKeyWithoutPlaintext",
    "kms:GenerateDataKeyPairWithoutPlaintext",
]
_WITH_DOCUMENT: Final = [
    "kms:Decrypt",
    "kms:GenerateDataKey",
    "kms:GenerateDataKeyPair",
    "kms:DeriveSharedSecret",
]


class _Recipient(NamedTuple):
    """Whom an answer is sealed for, and what the attestation document says of it."""

    spki: bytes
    pcrs: Mapping[int, bytes] | None
    nitrotpm_pcrs: Mapping[int, bytes] | None


class AttestedKms:
    """KMS of one account in one region, with one symmetric key behind alias/nitrosim; a WSGI
    application.

    `nsm_root_sha256` is the root that attestation documents must lead to. `pcr0` is what the key's
    policy asks for, or `nitrotpm_pcrs` of an instance; `key_policy` replaces that policy as it
    stands, without a lockout check, and raises `keypolicy.PolicyError` if it is none. `principal`
    is whom `credentials` belong to, by default a session of a role in the account. `envelope` is
    one of `nitrosim.envelope.FORMS`, `fault` one of FAULTS: ValueError for others.
    """

    def __init__(
        self,
        *,
        nsm_root_sha256: bytes,
        region: str = REGION,
        account: str = ACCOUNT,
        principal: str | None = None,
        pcr0: bytes = DEFAULT_PCRS[0],
        nitrotpm_pcrs: Mapping[int, bytes] | None = None,
        key_policy: str | None = None,
        envelope: str = "kms",
        fault: str | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        for what, name, names in (("envelope", envelope, FORMS), ("fault of KMS", fault, FAULTS)):
            if name is not None and name not in names:
                raise ValueError(f"{name!r} is no {what}, expected one of {', '.join(names)}")
        self.region = region
        self.credentials = Credentials.generate()
        self.principal = (
            principal or f"arn:{get_partition(region)}:sts::{account}:assumed-role/{ROLE}/nitrosim"
        )
        if not _PRINCIPAL.fullmatch(self.principal):
            raise ValueError(
                f"{self.principal!r} is not the ARN of a user, role or assumed-role session"
            )
        self._root = nsm_root_sha256
        self._form = envelope
        self._fault = kms_faults.BY_NAME[fault] if fault else None
        self._faulted = itertools.count()
        self._clock = clock
        self._lock = threading.Lock()
        self._keys = Keys(region, account)
        self._operations = Operations(self._keys)
        text = key_policy
        if text is None:
            text = default_policy(self.principal, pcr0, nitrotpm_pcrs)
        keypolicy.Policy.parse(text)
        self.key_arn: str = self._keys.create(text, ALIAS, "nitrosim").arn

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        return self._respond(Request(environ))(environ, start_response)

    def _respond(self, request: Request) -> Response:
        body = request.get_data()
        try:
            parameters = self._accept(request, body)
            fault = self._fault_for(parameters)
            if fault and fault.refuse:
                raise fault.refuse(request, body)
            with self._lock:
                answer = self._answer(
                    request.headers["X-Amz-Target"].removeprefix(TARGET), parameters, fault
                )
            response = Response(_encode(answer), content_type=CONTENT_TYPE)
            if fault and fault.respond:
                response = fault.respond(response)
        except KmsError as error:
            response = Response(error.body(), error.status, content_type=CONTENT_TYPE)
        response.headers["x-amzn-RequestId"] = str(uuid.uuid4())
        response.headers["Date"] = http_date(self._clock())
        return response

    def _accept(self, request: Request, body: bytes) -> Parameters:
        """The parameters of an authentic request for an operation."""
        authenticate(request, body, self.credentials, self.region, self._clock())
        if request.method != "POST" or not request.headers.get("X-Amz-Target", "").startswith(
            TARGET
        ):
            raise KmsError("UnknownOperationException")
        return Parameters.parse(body)

    def _fault_for(self, parameters: Parameters) -> kms_faults.Fault | None:
        """The fault that meets this request: none but those with a Recipient, and maybe none but
        the first.
        """
        if self._fault is None or "Recipient" not in parameters:
            return None
        first = next(self._faulted) == 0
        return self._fault if first or not self._fault.once else None

    def _answer(
        self, operation: str, parameters: Parameters, fault: kms_faults.Fault | None
    ) -> Answer:
        attested = operation in SECRETS and "Recipient" in parameters
        recipient = self._recipient(parameters.inner("Recipient")) if attested else None

        def authorize(action: str, key: Key, context: Mapping[str, str]) -> None:
            self._authorize(f"kms:{action}", key, context, parameters, recipient)

        if operation in ("CreateKey", "PutKeyPolicy") and "Policy" in parameters:
            _check_policy(parameters.text("Policy"))
        plain = self._operations.run(operation, parameters, authorize)
        if recipient is None:
            return plain
        # KMS leaves the plaintext out, and the id of the key material too
        sealed = {
            name: value
            for name, value in plain.items()
            if name not in (SECRETS[operation], "KeyMaterialId")
        }
        sealed["CiphertextForRecipient"] = seal(
            plain[SECRETS[operation]], recipient.spki, self._form
        )
        if fault and fault.alter:
            return fault.alter(kms_faults.Sealed(sealed, plain, operation, recipient.spki))
        return sealed

    def _recipient(self, parameters: Parameters) -> _Recipient:
        """Verify the attestation document of a Recipient, of either kind; a debug enclave's is as
        authentic as another's.
        """
        parameters.choice("KeyEncryptionAlgorithm", ("RSAES_OAEP_SHA_256",))
        blob = parameters.blob("AttestationDocument", _DOCUMENT_MAX)
        any_kind = Expectations(source=None, allow_debug=True)
        try:
            verified = verify(blob, roots=[self._root], at=self._clock(), expect=any_kind)
        except DocumentError as error:
            raise KmsError(
                "ValidationException", f"The attestation document is not valid: {error}"
            ) from error
        found = verified.document
        return _Recipient(
            _public_key(found),
            found.pcrs if found.source == "enclave" else None,
            found.nitrotpm_pcrs if found.source == "nitrotpm" else None,
        )

    def _authorize(
        self,
        action: str,
        key: Key,
        context: Mapping[str, str],
        parameters: Parameters,
        recipient: _Recipient | None,
    ) -> None:
        asked = keypolicy.Request(
            principal=self.principal,
            action=action,
            resource=key.arn,
            pcrs=recipient.pcrs if recipient else None,
            nitrotpm_pcrs=recipient.nitrotpm_pcrs if recipient else None,
            context=context,
            keys=_condition_keys(key, parameters),
        )
        found = keypolicy.evaluate(keypolicy.Policy.parse(key.policy), asked)
        own = key.arn.split(":")[4] == self.principal.split(":")[4]
        if found.decision is keypolicy.Decision.ALLOWED or (found.delegated and own):
            return
        explicit = any(
            part.applies and part.statement.effect == "Deny" for part in found.statements
        )
        reason = (
            "with an explicit deny in a resource-based policy"
            if explicit
            else f"because no resource-based policy allows the {action} action"
        )
        raise KmsError(
            "AccessDeniedException",
            f"User: {self.principal} is not authorized to perform: {action} on resource: "
            f"{key.arn} {reason}",
        )


def _condition(pcr0: bytes, nitrotpm_pcrs: Mapping[int, bytes] | None) -> dict[str, str]:
    """What a document must hold: an enclave's PCR0, or PCRs of an instance's NitroTPM."""
    if nitrotpm_pcrs is None:
        return {f"{keypolicy.ATTESTATION}PCR0": pcr0.hex()}
    return {
        f"{keypolicy.ATTESTATION}NitroTPMPCR{index}": value.hex()
        for index, value in nitrotpm_pcrs.items()
    }


def default_policy(
    principal: str, pcr0: bytes, nitrotpm_pcrs: Mapping[int, bytes] | None = None
) -> str:
    """The key policy of alias/nitrosim: secrets for the principal's role with a document of this
    PCR0, or of these PCRs of a NitroTPM, and only so.

    It names no account root, so nothing is left to identity policies; a role of its own administers
    the key.
    """
    role = role_of(principal)
    partition, account = role.split(":")[1], role.split(":")[4]
    condition = {"StringEqualsIgnoreCase": _condition(pcr0, nitrotpm_pcrs)}
    administrator = f"arn:{partition}:iam::{account}:role/{ADMINISTRATOR}"
    return json.dumps(
        {
            "Version": "2012-10-17",
            "Id": "nitrosim",
            "Statement": [
                _allow("Administration", administrator, _ADMINISTRATION),
                _allow("WithoutDocument", role, _WITHOUT_DOCUMENT),
                _allow("WithDocument", role, _WITH_DOCUMENT) | {"Condition": condition},
            ],
        },
        indent=2,
    )


def _allow(sid: str, principal: str, actions: list[str]) -> dict[str, Any]:
    return {
        "Sid": sid,
        "Effect": "Allow",
        "Principal": {"AWS": principal},
        "Action": actions,
        "Resource": "*",
    }


def role_of(principal: str) -> str:
    """The role of an assumed-role session; any other principal as it is."""
    _, partition, service, _, account, resource = principal.split(":", 5)
    kind, _, rest = resource.partition("/")
    if (service, kind) != ("sts", "assumed-role"):
        return principal
    return f"arn:{partition}:iam::{account}:role/{rest.partition('/')[0]}"


def _check_policy(text: str) -> None:
    try:
        keypolicy.Policy.parse(text)
    except keypolicy.PolicyError as error:
        raise KmsError("MalformedPolicyDocumentException", str(error)) from error


def _condition_keys(key: Key, parameters: Parameters) -> dict[str, str]:
    """What a policy can ask of the key and the request beside PCRs and the encryption context."""
    keys = {
        "kms:KeySpec": key.key_spec,
        "kms:KeyUsage": key.key_usage or "ENCRYPT_DECRYPT",
        "kms:KeyOrigin": key.origin,
        "kms:MultiRegion": str(bool(key.multi_region)).lower(),
    }
    if keys["kms:KeyUsage"] == "ENCRYPT_DECRYPT":
        keys["kms:EncryptionAlgorithm"] = parameters.choice(
            "EncryptionAlgorithm", (SYMMETRIC, *OAEP), SYMMETRIC
        )
    return keys


def _public_key(document: AttestationDocument) -> bytes:
    spki = document.public_key
    if spki is None:
        raise KmsError("ValidationException", "The attestation document holds no public key.")
    try:
        public_key = serialization.load_der_public_key(spki)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KmsError(
            "ValidationException", "The attestation document's public key cannot be read."
        ) from error
    if not isinstance(public_key, rsa.RSAPublicKey) or public_key.key_size != _RECIPIENT_BITS:
        raise invalid("AttestationDocument", f"hold an RSA public key of {_RECIPIENT_BITS} bits")
    return spki


def _encode(answer: Answer) -> bytes:
    return json.dumps(answer, default=lambda value: base64.b64encode(value).decode()).encode()
