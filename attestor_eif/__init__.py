"""Enclave image files (EIF): read, measured, verified, written and signed.

The format is that of AWS's crate aws-nitro-enclaves-image-format, version 4 of it. `read` goes
through a file once, in memory that does not grow with it; `verified` checks its signature; `write`
makes one of kernel, command line and ramdisks, or of another with a new signature.
"""

from __future__ import annotations

from attestor_eif.errors import EifError, NotAnEifError
from attestor_eif.layout import Header, Kind, Section, is_eif
from attestor_eif.metadata import Metadata
from attestor_eif.reading import Image, read, verified
from attestor_eif.writing import Content, FileRange, InMemory, Plan, signed_plan

__all__ = [
    "Content",
    "EifError",
    "FileRange",
    "Header",
    "Image",
    "InMemory",
    "Kind",
    "Metadata",
    "NotAnEifError",
    "Plan",
    "Section",
    "is_eif",
    "read",
    "signed_plan",
    "verified",
]
