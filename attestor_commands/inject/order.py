"""What the command line asks `attestor inject` for, which a refresh asks for again."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from attestor_commands.inject.manifest import parse
from attestor_io.errors import InputError
from attestor_io.secret_file import real_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from attestor_commands.inject.manifest import Manifest
    from attestor_io.vsock import Address


class Order(NamedTuple):
    """What the command line asks for: a manifest's text, and what comes before that.

    `settings` are the values of --set; `addresses` of vsock, imds_vsock and s3_vsock, and those of
    `host_vsock`, win over the manifest's; `receipt` is a path.
    """

    text: bytes
    settings: Mapping[str, str]
    addresses: Mapping[str, Address | None]
    host_vsock: Mapping[str, Address]
    receipt: str | None

    def manifest(self) -> Manifest:
        """The manifest, with the values that its variables have now; raises as `parse` does."""
        manifest = parse(self.text, self.settings, os.environ, self.addresses, self.host_vsock)
        if self.receipt is not None:
            _check_receipt(self.receipt, manifest)
        return manifest


def _check_receipt(receipt: str, manifest: Manifest) -> None:
    """Refuse one that would be a target's, or go with a generation."""
    if real_path(receipt) in {real_path(place.name) for place in manifest.files}:
        raise InputError(f"receipt {receipt} is a target too")
    folder = manifest.generation_folder
    if folder is not None and real_path(os.path.dirname(receipt)) == real_path(folder):
        raise InputError(f"receipt {receipt} is in generation_folder {folder}")
