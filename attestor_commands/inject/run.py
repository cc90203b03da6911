"""`attestor inject`: every secret of a manifest into its place, all of them or none, then the
program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attestor import DEFAULT_TIMEOUT
from attestor_commands.inject.fetch import fetch
from attestor_commands.inject.manifest import MANIFEST_MAX
from attestor_commands.inject.order import Order
from attestor_commands.inject.program import Program, find_program
from attestor_io import signals
from attestor_io.deadline import Deadline
from attestor_io.errors import InputError
from attestor_io.reading import read_bounded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from attestor_commands.inject.manifest import Manifest
    from attestor_io.vsock import Address

PROGRAM_HINT: Final = "attestor inject MANIFEST -- PROGRAM names one"


def inject(
    manifest_file: str,
    program: Sequence[str],
    *,
    settings: Mapping[str, str],
    receipt: str | None,
    force: bool,
    watch: int | None,
    addresses: Mapping[str, Address | None],
    host_vsock: Mapping[str, Address],
) -> int:
    """Place everything of a manifest, then become the program if there is one; or, with `watch`,
    stay beside it, fetch again after so many seconds, and return its exit status.

    Raises an AttestorError, and then nothing that this run placed is left; ProgramError for the
    program itself.
    """
    if watch is not None:
        if not program:
            raise InputError("--watch is beside a program, and none is named", PROGRAM_HINT)
        signals.owner.take_more()  # before anything here starts a thread
    text = read_bounded(
        manifest_file, MANIFEST_MAX + 1, f"manifest {manifest_file}", Deadline(DEFAULT_TIMEOUT)
    )
    if len(text) > MANIFEST_MAX:
        raise InputError(f"manifest {manifest_file} is longer than {MANIFEST_MAX} bytes")
    order = Order(text, settings, addresses, host_vsock, receipt)
    manifest = order.manifest()
    _check_input(manifest, manifest_file, stays=watch is not None)
    for entry in manifest.entries:
        if entry.place.needs_program and not program:
            raise InputError(f"{entry.place} is for a program, and none is named", PROGRAM_HINT)
    found = (
        Program(find_program(program[0]), program, manifest.pass_credentials) if program else None
    )
    if found is not None and watch is not None:
        from attestor_commands.inject.watch import Watch

        return Watch(order, found, watch).run(manifest, force=force)
    with fetch(manifest, receipt, force=force) as fetched:
        if found is None:
            fetched.placement.place()
        else:
            inheritance = fetched.deliveries.inheritance()
            fetched.placement.place_and_become(lambda: found.execute(inheritance))
    return 0


def _check_input(manifest: Manifest, manifest_file: str, *, stays: bool) -> None:
    """Refuse standard input where it would be read twice."""
    if any(entry.source == "-" for entry in manifest.entries):
        if manifest_file == "-":
            raise InputError("standard input is the manifest, and a source in it")
        if stays:
            raise InputError("a source is standard input, which --watch could not read again")
