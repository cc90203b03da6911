"""A build hook: the types of attestor.py go into the wheel, which is for this platform alone where
it carries nsm/libnsm.so.
"""

from __future__ import annotations

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
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform}"
