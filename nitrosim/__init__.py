"""What a laptop lacks: a software Nitro Secure Module behind /dev/nsm, and a KMS that honours
attestation documents.

Importing this package opens nothing, starts nothing and loads none of its parts.
"""

from __future__ import annotations


def missing_package(error: ModuleNotFoundError) -> str:
    """Say in one line what to install where a package of the extra `sim` is not there."""
    package = (error.name or "a package").partition(".")[0]
    return f"the simulator needs {package}: install nitro-attestor with the extra sim"
