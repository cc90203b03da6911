"""The metadata of an enclave image file: JSON that names the image and tells how it was built.

Nothing measures it, so that whoever carries the file can change it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, Self

from attestor_eif.errors import EifError
from keypolicy.model import PolicyError, read_json

UNKNOWN: Final = "Unknown"  # what AWS's builder says, too, where it cannot tell
_DEPTH_MAX: Final = 127  # that serde_json reads, with which AWS's tools do
_BUILD_FIELDS: Final = {
    "build_time": "BuildTime",
    "build_tool": "BuildTool",
    "build_tool_version": "BuildToolVersion",
    "operating_system": "OperatingSystem",
    "kernel_version": "KernelVersion",
}


@dataclass(frozen=True, slots=True)
class Metadata:
    """What the metadata section says. `docker` and `custom` are any JSON; None is null."""

    name: str
    version: str
    build_time: str = UNKNOWN
    build_tool: str = UNKNOWN
    build_tool_version: str = UNKNOWN
    operating_system: str = UNKNOWN
    kernel_version: str = UNKNOWN
    docker: object = None
    custom: object = None

    @property
    def build(self) -> dict[str, str]:
        """Return how the image was built, by the names of the format."""
        return {name: getattr(self, field) for field, name in _BUILD_FIELDS.items()}

    def to_bytes(self) -> bytes:
        """Return the JSON as AWS's builder writes it: no white space, UTF-8, members in order."""
        members = {
            "ImageName": self.name,
            "ImageVersion": self.version,
            "BuildMetadata": self.build,
            "DockerInfo": _sorted(self.docker),
            "CustomMetadata": _sorted(self.custom),
        }
        return json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a metadata section; members that are not known are passed over. Raises EifError."""
        members = read_value(data)
        if not isinstance(members, dict):
            raise EifError("metadata is not a JSON object")
        build = members.get("BuildMetadata")
        if not isinstance(build, dict):
            raise EifError("metadata has no BuildMetadata that is a JSON object")
        for name in ("DockerInfo", "CustomMetadata"):
            if name not in members:
                raise EifError(f"metadata has no {name}")
        return cls(
            name=_text(members, "ImageName"),
            version=_text(members, "ImageVersion"),
            **{field: _text(build, name) for field, name in _BUILD_FIELDS.items()},
            docker=members["DockerInfo"],
            custom=members["CustomMetadata"],
        )


def _text(members: dict[str, Any], name: str) -> str:
    value = members.get(name)
    if not isinstance(value, str):
        raise EifError(f"metadata has no {name} that is a string")
    return value


def read_value(data: bytes) -> object:
    """Read one JSON document that can be written again; raises EifError."""
    try:
        value = read_json(data)
    except PolicyError as error:
        raise EifError(f"metadata is {error}") from error
    if _depth(value) > _DEPTH_MAX:
        raise EifError(f"metadata is nested more than {_DEPTH_MAX} deep")
    try:
        # half of a surrogate pair and a number beyond a double's are read, and not written again
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise EifError("metadata is not JSON: it holds half a character or no number") from error
    return value


def _depth(value: object) -> int:
    """Return how deep lists and objects are nested, without recursion."""
    depth, level = 0, [value]
    while level:
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        depth += 1
    return depth


def _sorted(value: object) -> object:
    """Return the value with the members of its objects in order, as serde_json keeps them."""
    if isinstance(value, dict):
        return {name: _sorted(value[name]) for name in sorted(value, key=str.encode)}
    if isinstance(value, list):
        return [_sorted(item) for item in value]
    return value
