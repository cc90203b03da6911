"""The receipt of `attestor inject`: what was done, and nothing of a secret."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attestor import drop_unset, process_recipient
from attestor_io.errors import NotAuthenticError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from attestor_commands.inject.manifest import Manifest
    from attestor_commands.inject.places import Place
    from nsm.document import AttestationDocument


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one entry: `size` in bytes, the version that it was proved to have, and a
    keyed digest of the plaintext where one was asked for.
    """

    size: int
    key_id: str | None = None
    request_id: str | None = None
    version: int | None = None
    digest: bytes = b""


def own_document() -> AttestationDocument:
    """The document that is sent to KMS, parsed; raises NotAuthenticError if that cannot be."""
    from nsm.document import AttestationDocument, DocumentError

    try:
        return AttestationDocument.parse(process_recipient().document())
    except DocumentError as error:
        from nsm.source import place

        reason = f"attestation document of this {place()} cannot be read: {error}"
        raise NotAuthenticError(reason) from error


def receipt_of(
    manifest: Manifest, outcomes: Sequence[Outcome], document: AttestationDocument
) -> bytes:
    """What was done, as JSON: no secret, and no digest of one."""
    entries = [
        {
            "kind": entry.kind,
            **_place_in_receipt(entry.place),
            "bytes": outcome.size,
            **drop_unset(key_id=outcome.key_id, request_id=outcome.request_id),
        }
        for entry, outcome in zip(manifest.entries, outcomes, strict=True)
    ]
    members = {
        "version": 1,
        "module_id": document.module_id,
        "pcrs": _in_hex(document.pcrs),
        **drop_unset(nitrotpm_pcrs=_in_hex(document.nitrotpm_pcrs)),
        "entries": entries,
    }
    return json.dumps(members, indent=2).encode() + b"\n"


def _place_in_receipt(place: Place) -> dict[str, str]:
    if place.kind == "document":
        return {"target": place.name, "member": place.member}
    return {place.kind: place.name}


def _in_hex(pcrs: Mapping[int, bytes]) -> dict[str, str]:
    return {str(number): value.hex() for number, value in sorted(pcrs.items())}
