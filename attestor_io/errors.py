"""The errors of attestor: each has the exit status that the command ends with."""

from __future__ import annotations

from attestor_io.urls import redact_urls


class AttestorError(Exception):
    """Base of every error of attestor's own.

    `status` is the exit status, `notes` are facts, and `hints` say what to do (two at most).
    """

    status = 1
    notes: tuple[str, ...] = ()

    def __init__(self, message: str, *hints: str) -> None:
        super().__init__(message)
        self.hints = hints

    def __str__(self) -> str:
        """The message, without the query of any URL in it: libraries quote what they asked for."""
        return redact_urls(super().__str__())


class InputError(AttestorError):
    """An option or an input that is not what it must be."""

    status = 2


class ModuleError(AttestorError):
    """There is no Nitro Secure Module, or it refused."""

    status = 3


class RefusedError(AttestorError):
    """KMS refused, or there are no valid credentials; trying again changes nothing."""

    status = 4


class UnreachableError(AttestorError):
    """KMS cannot be reached, throttles or fails; worth another try."""

    status = 5


class NotAuthenticError(AttestorError):
    """An answer that KMS would not give: treat it as an attack."""

    status = 6


class EnvelopeError(NotAuthenticError):
    """CiphertextForRecipient is not an envelope for our key."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"bad envelope: {reason}")


class OutputError(AttestorError):
    """The secret cannot be written."""

    status = 7
