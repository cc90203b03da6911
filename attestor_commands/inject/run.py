"""`attestor inject`: every secret of a manifest into its place, all of them or none, then the
program.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from attestor import (
    DEFAULT_TIMEOUT,
    Kms,
    attested,
    drop_unset,
    errors_translated,
    log,
    process_recipient,
)
from attestor_commands.inject.deliveries import Deliveries
from attestor_commands.inject.manifest import (
    MANIFEST_MAX,
    VERSION_HINT,
    Entry,
    Manifest,
    parse,
)
from attestor_commands.inject.program import execute, find_program
from attestor_commands.inject.sources import Sources, Stream
from attestor_commands.placement import Placement
from attestor_commands.versions import VERSION
from attestor_io.ciphertext import BASE64_KEY, head_size, is_symmetric, take_ciphertext
from attestor_io.deadline import Deadline
from attestor_io.errors import AttestorError, InputError, NotAuthenticError, RefusedError
from attestor_io.progress import Progress
from attestor_io.reading import Message, read_bounded
from attestor_io.secret_file import real_path
from attestor_io.urls import without_query

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from attestor_commands.inject.deliveries import Delivery
    from attestor_commands.inject.places import Place
    from attestor_io.vsock import Address
    from nsm.document import AttestationDocument

PROGRAM_HINT: Final = "attestor inject MANIFEST -- PROGRAM names one"
STORED_HINT: Final = (
    "a plaintext there is the parent's to read: store what attestor encrypt writes, in base64"
)
_SILENT: Final = "no document of the Nitro Secure Module"
_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a receipt says of one entry; `size` is in bytes."""

    size: int
    key_id: str | None = None
    request_id: str | None = None


def inject(
    manifest_file: str,
    program: Sequence[str],
    *,
    settings: Mapping[str, str],
    receipt: str | None,
    force: bool,
    addresses: Mapping[str, Address | None],
    host_vsock: Mapping[str, Address],
) -> None:
    """Place everything of a manifest, then become the program if there is one.

    `addresses` of vsock, imds_vsock and s3_vsock, and those of `host_vsock`, win over the
    manifest's. Raises an AttestorError,
    and then nothing that this run placed is left; ProgramError for the program itself.
    """
    text = read_bounded(
        manifest_file, MANIFEST_MAX + 1, f"manifest {manifest_file}", Deadline(DEFAULT_TIMEOUT)
    )
    if len(text) > MANIFEST_MAX:
        raise InputError(f"manifest {manifest_file} is longer than {MANIFEST_MAX} bytes")
    manifest = parse(text, settings, os.environ, addresses, host_vsock)
    if manifest_file == "-" and any(entry.source == "-" for entry in manifest.entries):
        raise InputError("standard input is the manifest, and a source in it")
    if receipt is not None and real_path(receipt) in {
        real_path(place.name) for place in manifest.files
    }:
        raise InputError(f"receipt {receipt} is a target too")
    for entry in manifest.entries:
        if entry.place.needs_program and not program:
            raise InputError(f"{entry.place} is for a program, and none is named", PROGRAM_HINT)
    executable = find_program(program[0]) if program else None
    kms = _kms(manifest)
    with Placement() as placement:
        deliveries = Deliveries(manifest, placement, force=force)
        receipt_file = placement.add(receipt, force=force) if receipt is not None else None
        injector = _Injector(manifest, kms, placement)
        # what a receipt says of this enclave is read before anything is asked of KMS
        document = kms.deadline.call(_own_document, _SILENT) if receipt_file is not None else None
        outcomes = injector.run(deliveries.all)
        deliveries.complete()
        if receipt_file is not None and document is not None:
            receipt_file.append(_receipt(manifest, outcomes, document))
            receipt_file.seal()
        if executable is None:
            placement.place()
        else:
            passed, inheritance = manifest.pass_credentials, deliveries.inheritance()
            placement.place_and_become(
                lambda: execute(executable, program, inheritance, pass_credentials=passed)
            )


def _kms(manifest: Manifest) -> Kms:
    """KMS as the manifest names it; what it leaves open comes from the environment."""
    key_id = manifest.key_id or next(
        (entry.key_id for entry in manifest.entries if entry.key_id), None
    )
    return Kms.connect(
        key_id,
        manifest.region,
        manifest.endpoint_url,
        manifest.deadline,
        manifest.vsock,
        manifest.imds_vsock,
        manifest.ca_bundle,
        manifest.host_vsock,
    )


class _Injector:
    """One key pair, one client with its connections kept alive, and few threads that share them."""

    def __init__(self, manifest: Manifest, kms: Kms, placement: Placement) -> None:
        self._manifest, self._region = manifest, kms.region
        self._placement = placement
        recipient = process_recipient()
        from attestor_io.sdk_data import new_session

        recipient.wait_for_module(kms.deadline)
        self._session = new_session()
        self._client = attested(kms.ready_client(self._session, connections=manifest.concurrency))
        recipient.wait_for_document(kms.deadline)
        self._sources = Sources(
            self._session,
            kms.region,
            manifest.ca_bundle,
            manifest.https_ca_bundle,
            manifest.s3_vsock,
            manifest.host_vsock,
            size=manifest.concurrency,
        )
        self._progress = Progress("written", len(manifest.entries))

    def run(self, deliveries: Sequence[Delivery]) -> list[_Outcome]:
        """Fill every one of them, as the entries are in order; raises the first error."""
        pool = ThreadPoolExecutor(self._manifest.concurrency, "attestor-inject")
        work = [
            pool.submit(self._fill, entry, delivery)
            for entry, delivery in zip(self._manifest.entries, deliveries, strict=True)
        ]
        try:
            with self._progress:
                for future in as_completed(work, self._manifest.deadline.left):
                    future.result()
                    self._progress.count()
        except TimeoutError:
            raise self._manifest.deadline.passed("not done") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [future.result() for future in work]

    def _fill(self, entry: Entry, target: Delivery) -> _Outcome:
        try:
            with self._sources.open(entry.source, entry.max_bytes) as stream:
                fill = self._secret if entry.kind == "secret" else self._copy
                outcome = fill(entry, stream, target)
            target.seal()
        except AttestorError as error:
            if str(entry.place) not in str(error):
                error.args = (f"{entry.place}: {error}",)
            raise
        return outcome

    def _secret(self, entry: Entry, stream: Stream, target: Delivery) -> _Outcome:
        taken = _ciphertext(entry, stream)
        message = isinstance(taken, Message)
        if entry.form not in {None, "message" if message else "blob"}:
            other = "a CiphertextBlob" if entry.form == "message" else "a message"
            raise InputError(f'it is {other}, but the manifest says form = "{entry.form}"')
        if isinstance(taken, Message):
            return self._message(entry, taken, target)
        if entry.signed or entry.context_contains:
            name = "signed" if entry.signed else "context_contains"
            raise InputError(f"it says {name} = true, but a CiphertextBlob is no message")
        if entry.minimum_version and VERSION not in entry.bound.context:
            asked = f"and minimum_version is {entry.minimum_version}"
            raise RefusedError(f"a CiphertextBlob does not say its version, {asked}", VERSION_HINT)
        algorithm = drop_unset(EncryptionAlgorithm=entry.algorithm)
        answer = self._decrypt({"CiphertextBlob": taken, **entry.bound.parameters(), **algorithm})
        self._append(target, answer["Plaintext"])
        return _Outcome(
            len(answer["Plaintext"]), answer["KeyId"], answer["ResponseMetadata"]["RequestId"]
        )

    def _message(self, entry: Entry, message: Message, target: Delivery) -> _Outcome:
        from attestor_commands import esdk

        answers: list[Mapping[str, Any]] = []
        size = 0

        def ask(parameters: dict[str, Any]) -> Mapping[str, Any]:
            answers.append(self._decrypt(parameters))
            return answers[-1]

        def append(piece: bytes) -> None:
            nonlocal size
            size += len(piece)
            self._append(target, piece)

        esdk.decrypt(
            message,
            append,
            ask,
            entry.bound,
            region=self._region,
            signed=entry.signed,
            minimum_version=entry.minimum_version,
        )
        return _Outcome(size, answers[-1]["KeyId"], answers[-1]["ResponseMetadata"]["RequestId"])

    def _append(self, target: Delivery, piece: bytes) -> None:
        self._placement.append(target, piece)
        self._progress.add(len(piece))

    def _decrypt(self, parameters: dict[str, Any]) -> Mapping[str, Any]:
        with errors_translated(self._session, "decrypt", parameters):
            answer: Mapping[str, Any] = self._client.decrypt(**parameters)
        log.info("KMS answered request %s", answer["ResponseMetadata"].get("RequestId"))
        return answer

    def _copy(self, entry: Entry, stream: Stream, target: Delivery) -> _Outcome:
        """A file that is not sensitive, as it is."""
        digest = hashlib.sha256()
        size = 0
        while piece := stream.read(_CHUNK):
            digest.update(piece)
            size += len(piece)
            self._append(target, piece)
        if size == 0:
            raise InputError(f"source {without_query(entry.source)} is empty")
        if entry.sha256 not in {None, digest.hexdigest()}:
            found = f"{digest.hexdigest()}, expected {entry.sha256}"
            raise NotAuthenticError(f"source {without_query(entry.source)} has SHA-256 {found}")
        return _Outcome(size)


def _ciphertext(entry: Entry, stream: Stream) -> bytes | Message:
    """The ciphertext that a source holds; text of a service that keeps values is base64."""
    base64_text = entry.base64 or stream.is_text
    try:
        return take_ciphertext(
            stream.read(head_size(base64_text=base64_text)),
            stream,
            "source",
            base64_text=base64_text,
            message=is_symmetric(entry.algorithm),
            option=BASE64_KEY,
        )
    except InputError as error:
        if stream.is_text:
            raise InputError(str(error), *error.hints, STORED_HINT) from error
        raise


def _own_document() -> AttestationDocument:
    """The document that is sent to KMS, parsed; raises NotAuthenticError if that cannot be."""
    from nsm.document import AttestationDocument, DocumentError

    try:
        return AttestationDocument.parse(process_recipient().document())
    except DocumentError as error:
        from nsm.source import place

        reason = f"attestation document of this {place()} cannot be read: {error}"
        raise NotAuthenticError(reason) from error


def _receipt(
    manifest: Manifest, outcomes: Sequence[_Outcome], document: AttestationDocument
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
    receipt = {
        "version": 1,
        "module_id": document.module_id,
        "pcrs": _in_hex(document.pcrs),
        **drop_unset(nitrotpm_pcrs=_in_hex(document.nitrotpm_pcrs)),
        "entries": entries,
    }
    return json.dumps(receipt, indent=2).encode() + b"\n"


def _place_in_receipt(place: Place) -> dict[str, str]:
    if place.kind == "document":
        return {"target": place.name, "member": place.member}
    return {place.kind: place.name}


def _in_hex(pcrs: Mapping[int, bytes]) -> dict[str, str]:
    return {str(number): value.hex() for number, value in sorted(pcrs.items())}
