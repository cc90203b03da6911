"""What can be wrong with an enclave image file."""

from __future__ import annotations

from attestor_io.errors import InputError, NotAuthenticError


class NotAnEifError(InputError):
    """The bytes are no enclave image file, or one of a version that is not known here.

    The message is to follow the file's name.
    """


class EifError(NotAuthenticError):
    """An enclave image file that is damaged, that two readers could read in two ways, or that its
    signature does not cover.
    """
