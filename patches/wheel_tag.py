"""A build hook: the types of attestor.py go into the wheel, which is for one platform alone where
it carries nsm/libnsm.so.

release/build-wheels says by two variables what it has checked: ATTESTOR_WHEEL_PLATFORM, the
platform tag, and ATTESTOR_WHEEL_SBOM, the library's bill of materials (PEP 770).
"""

from __future__ import annotations

import os
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class WheelTag(BuildHookInterface):  # type: ignore[type-arg]  # generic only for type checkers
    """Adds the stubs, and sets the tag; Python's version does not matter, since the library knows
    nothing of it.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it builds; `version` is "standard" or "editable"."""
        # A single file cannot carry a py.typed (PEP 561), stubs can: its own source has its types.
        # They are copied, because hatchling leaves a file out that it includes under another name.
        self._stubs = tempfile.NamedTemporaryFile(suffix=".pyi")  # noqa: SIM115 - until it is built
        self._stubs.write(Path(self.root, "attestor.py").read_bytes())
        self._stubs.flush()
        build_data["force_include"][self._stubs.name] = "attestor-stubs/__init__.pyi"
        if version == "standard" and Path(self.root, "nsm", "libnsm.so").exists():
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform()}"
            if sbom := os.environ.get("ATTESTOR_WHEEL_SBOM"):
                build_data["sbom_files"].append(sbom)


def _platform() -> str:
    """The tag that was checked, or this machine's own, which no package index takes."""
    own = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return os.environ.get("ATTESTOR_WHEEL_PLATFORM") or own
