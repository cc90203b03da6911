"""What a laptop lacks: a software Nitro Secure Module behind /dev/nsm, and a KMS that honours
attestation documents.

Importing this package opens nothing, starts nothing and loads none of its parts.
"""

from __future__ import annotations


def missing_package(error: ImportError) -> str:
    """Say in one line what to install where a package of the extra `sim` is not there, or is of a
    version that lacks what the simulator uses.
    """
    package = (error.name or "a package").partition(".")[0]
    needed = package if isinstance(error, ModuleNotFoundError) else f"another version of {package}"
    return f"the simulator needs {needed}: install nitro-attestor with the extra sim"
