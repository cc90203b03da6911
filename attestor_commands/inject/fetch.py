"""Everything of a manifest from its sources into what it becomes, which nobody can see yet."""

from __future__ import annotations

import contextlib
import hashlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from attestor import Kms, attested, drop_unset, errors_translated, log, process_recipient
from attestor_commands.inject.deliveries import Deliveries
from attestor_commands.inject.manifest import VERSION_HINT
from attestor_commands.inject.receipt import Outcome, own_document, receipt_of
from attestor_commands.inject.sources import Sources, Stream
from attestor_commands.placement import Placement
from attestor_commands.versions import VERSION, number_of
from attestor_io.ciphertext import BASE64_KEY, head_size, is_symmetric, take_ciphertext
from attestor_io.errors import (
    AttestorError,
    InputError,
    NotAuthenticError,
    RefusedError,
    UnreachableError,
)
from attestor_io.progress import Progress
from attestor_io.reading import Message
from attestor_io.urls import without_query

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Self

    from attestor_commands.inject.deliveries import Delivery
    from attestor_commands.inject.manifest import Entry, Manifest
    from attestor_commands.inject.places import Place
    from attestor_io.secret_file import SecretFile

STORED_HINT: Final = (
    "a plaintext there is the parent's to read: store what attestor encrypt writes, in base64"
)
_SILENT: Final = "no document of the Nitro Secure Module"
_CHUNK: Final = 1 << 20


class Staying(NamedTuple):
    """How a command fetches that stays and fetches again: digests of plaintexts have this key, so
    that nothing but a comparison can be done with them. `check` refuses, by an OutputError, where
    files would come to, before anything is fetched.
    """

    digest_key: bytes
    check: Callable[[Placement], None]


@dataclass(frozen=True, slots=True)
class Fetched:
    """All of a manifest, fetched, opened and sealed; a context manager.

    Leaving it without `placement.place` or the like leaves nothing.
    """

    manifest: Manifest
    placement: Placement
    deliveries: Deliveries
    outcomes: list[Outcome]
    receipt: SecretFile | None

    def files_of(self, places: Iterable[Place]) -> list[SecretFile]:
        """The files of these places, and the receipt, which tells of all."""
        receipt = [] if self.receipt is None else [self.receipt]
        return [*self.deliveries.files_of(places), *receipt]

    def close(self) -> None:
        """Give back what was not placed, and all descriptors."""
        self.placement.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fetch(
    manifest: Manifest,
    receipt_path: str | None,
    *,
    force: bool,
    staying: Staying | None = None,
    shows_progress: bool = True,
) -> Fetched:
    """Fetch, open and seal all of a manifest; raises an AttestorError, and then leaves nothing."""
    kms = _kms(manifest)
    with contextlib.ExitStack() as unfinished:
        placement = unfinished.enter_context(Placement())
        if manifest.generation_folder is not None:
            keeps = staying is not None
            placement.begin_generation(manifest.generation_folder, force=force, keeps=keeps)
        deliveries = Deliveries(manifest, placement, force=force)
        receipt = None if receipt_path is None else placement.add(receipt_path, force=force)
        if staying is not None:
            staying.check(placement)
        injector = _Injector(manifest, kms, placement, staying, shows_progress=shows_progress)
        # what a receipt says of this enclave is read before anything is asked of KMS
        document = None if receipt is None else kms.deadline.call(own_document, _SILENT)
        outcomes = injector.run(deliveries.all)
        deliveries.complete()
        if receipt is not None and document is not None:
            receipt.append(receipt_of(manifest, outcomes, document))
            receipt.seal()
        unfinished.pop_all()
    return Fetched(manifest, placement, deliveries, outcomes, receipt)


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


class _Filling:
    """A delivery while it is filled, and what an outcome says of what went into it."""

    def __init__(
        self,
        delivery: Delivery,
        placement: Placement,
        progress: Progress,
        digest_key: bytes | None,
    ) -> None:
        self._delivery, self._placement, self._progress = delivery, placement, progress
        self._digest = None if digest_key is None else hashlib.blake2b(key=digest_key)
        self.size = 0  # bytes

    def append(self, piece: bytes) -> None:
        """Take more of it; raises OutputError."""
        self._placement.append(self._delivery, piece)
        self._progress.add(len(piece))
        self.size += len(piece)
        if self._digest is not None:
            self._digest.update(piece)

    def outcome(self, answer: Mapping[str, Any] | None, version: int | None) -> Outcome:
        """What became of it, by an answer of KMS if it was a secret."""
        digest = self._digest.digest() if self._digest is not None else b""
        if answer is None:
            return Outcome(self.size, digest=digest)
        request_id = answer["ResponseMetadata"]["RequestId"]
        return Outcome(self.size, answer["KeyId"], request_id, version, digest)


class _Injector:
    """One key pair, one client with its connections kept alive, and few threads that share them."""

    def __init__(
        self,
        manifest: Manifest,
        kms: Kms,
        placement: Placement,
        staying: Staying | None,
        *,
        shows_progress: bool,
    ) -> None:
        self._manifest, self._region = manifest, kms.region
        self._placement, self._staying = placement, staying
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
            manifest.deadline,
            size=manifest.concurrency,
        )
        self._progress = Progress("written", len(manifest.entries), shows=shows_progress)

    def run(self, deliveries: Sequence[Delivery]) -> list[Outcome]:
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

    def _fill(self, entry: Entry, target: Delivery) -> Outcome:
        key = self._staying.digest_key if self._staying else None
        filling = _Filling(target, self._placement, self._progress, key)
        try:
            with self._sources.open(entry.source, entry.max_bytes) as stream:
                fill = self._secret if entry.kind == "secret" else self._copy
                outcome = fill(entry, stream, filling)
            target.seal()
        except AttestorError as error:
            if isinstance(error, UnreachableError) and not self._manifest.deadline.left:
                raise self._manifest.deadline.passed("not done") from error  # as `run` says it
            if str(entry.place) not in str(error):
                error.args = (f"{entry.place}: {error}",)
            raise
        return outcome

    def _secret(self, entry: Entry, stream: Stream, filling: _Filling) -> Outcome:
        taken = _ciphertext(entry, stream)
        message = isinstance(taken, Message)
        if entry.form not in {None, "message" if message else "blob"}:
            other = "a CiphertextBlob" if entry.form == "message" else "a message"
            raise InputError(f'it is {other}, but the manifest says form = "{entry.form}"')
        if isinstance(taken, Message):
            return self._message(entry, taken, filling)
        if entry.signed or entry.context_contains:
            name = "signed" if entry.signed else "context_contains"
            raise InputError(f"it says {name} = true, but a CiphertextBlob is no message")
        version = entry.bound.context.get(VERSION)
        if entry.minimum_version and version is None:
            asked = f"and minimum_version is {entry.minimum_version}"
            raise RefusedError(f"a CiphertextBlob does not say its version, {asked}", VERSION_HINT)
        algorithm = drop_unset(EncryptionAlgorithm=entry.algorithm)
        answer = self._decrypt({"CiphertextBlob": taken, **entry.bound.parameters(), **algorithm})
        filling.append(answer["Plaintext"])
        return filling.outcome(answer, number_of(version))

    def _message(self, entry: Entry, message: Message, filling: _Filling) -> Outcome:
        from attestor_commands import esdk

        answers: list[Mapping[str, Any]] = []

        def ask(parameters: dict[str, Any]) -> Mapping[str, Any]:
            answers.append(self._decrypt(parameters))
            return answers[-1]

        version = esdk.decrypt(
            message,
            filling.append,
            ask,
            entry.bound,
            region=self._region,
            signed=entry.signed,
            minimum_version=entry.minimum_version,
        )
        return filling.outcome(answers[-1], number_of(version))

    def _decrypt(self, parameters: dict[str, Any]) -> Mapping[str, Any]:
        with errors_translated(self._session, "decrypt", parameters):
            answer: Mapping[str, Any] = self._client.decrypt(**parameters)
        log.info("KMS answered request %s", answer["ResponseMetadata"].get("RequestId"))
        return answer

    def _copy(self, entry: Entry, stream: Stream, filling: _Filling) -> Outcome:
        """A file that is not sensitive, as it is."""
        digest = hashlib.sha256()
        while piece := stream.read(_CHUNK):
            digest.update(piece)
            filling.append(piece)
        if filling.size == 0:
            raise InputError(f"source {without_query(entry.source)} is empty")
        if entry.sha256 not in {None, digest.hexdigest()}:
            found = f"{digest.hexdigest()}, expected {entry.sha256}"
            raise NotAuthenticError(f"source {without_query(entry.source)} has SHA-256 {found}")
        return filling.outcome(None, None)


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
