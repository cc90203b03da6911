"""Building and signing enclave image files, which are read again before they count."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from attestor import Kms, __version__
from attestor_commands.images import eif_errors
from attestor_commands.inputs import read_file
from attestor_eif import (
    EifError,
    FileRange,
    Header,
    Image,
    Metadata,
    Plan,
    read,
    signed_plan,
    verified,
)
from attestor_io import names
from attestor_io.errors import InputError, OutputError
from attestor_io.secret_file import SecretFile, placed, real_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from attestor_eif.signature import SigningCertificate

_CUSTOM_MAX: Final = 4096  # bytes of a user's metadata that AWS's builder takes
_COMMAND_LINE_MAX: Final = 65536  # bytes
_PEM_MAX: Final = 65536  # bytes of a key or of certificates


def build(
    output: str,
    report: Callable[[Image], None],
    *,
    force: bool,
    kernel: str,
    ramdisks: Sequence[str],
    **said: Any,
) -> None:
    """Build an enclave image file of the options of the command, and report what was written.

    Raises InputError and OutputError.
    """
    if output == "-":
        raise InputError("an EIF is read again before it counts: name a file, and not -")
    command_line = _command_line(said["cmdline"])
    metadata = _metadata(kernel, **said)
    with contextlib.ExitStack() as stack:
        parts = [stack.enter_context(_opened(path)) for path in (kernel, *ramdisks)]
        contents = [FileRange(part.fileno(), 0, os.fstat(part.fileno()).st_size) for part in parts]
        plan = Plan.of_parts(
            Header((), arm64=said["arch"] == "aarch64"),
            contents[0],
            command_line,
            contents[1:],
            metadata.to_bytes(),
        )
        with SecretFile(output, force=force) as target:
            _write(plan, target, output, report)


def _command_line(text: str) -> bytes:
    """Return the bytes of TEXT, or of @FILE without its last line break; raises InputError."""
    data = text.encode()
    if text.startswith("@"):
        data = read_file(text[1:], text[1:], _COMMAND_LINE_MAX).removesuffix(b"\n")
    if b"\0" in data:
        raise InputError("--cmdline holds a byte of zeros, where the kernel would end it")
    return data


def _metadata(
    kernel: str,
    *,
    name: str | None,
    version: str,
    build_time: str | None,
    operating_system: str | None,
    kernel_version: str | None,
    custom: str | None,
    **_: object,
) -> Metadata:
    """Return the metadata that was asked for: no time, and nothing of this host, unless it was."""
    from attestor_eif.metadata import UNKNOWN, read_value

    more: object = None
    if custom is not None:
        try:
            more = read_value(read_file(custom, custom, _CUSTOM_MAX))
        except EifError as error:
            raise InputError(f"{custom}: {error}") from error
        if not isinstance(more, dict):
            raise InputError(f"{custom} is not a JSON object")
    return Metadata(
        name=name
        if name is not None
        else os.fsencode(os.path.basename(kernel)).decode(errors="replace"),
        version=version,
        build_time=build_time or UNKNOWN,
        build_tool="attestor",
        build_tool_version=__version__,
        operating_system=operating_system or UNKNOWN,
        kernel_version=kernel_version or UNKNOWN,
        custom=more,
    )


def sign(
    path: str,
    report: Callable[[Image], None],
    key: str,
    certificate: str,
    connection: Mapping[str, Any],
) -> None:
    """Sign an enclave image file in its place, and report what was written.

    Everything that can be wrong here is found before KMS is asked. Raises errors of ours.
    """
    from attestor_eif import signature

    signer = _certificate(certificate)
    make = _kms_signer(key, signer, connection) if key.startswith("arn:") else _local_signer(key)
    path = real_path(path)
    with _opened(path) as source:
        with eif_errors(path):
            image = read(source)
        status = os.fstat(source.fileno())
        owner = (-1, -1) if os.geteuid() else (status.st_uid, status.st_gid)  # root keeps it
        mode = stat.S_IMODE(status.st_mode)
        with SecretFile(path, force=True, mode=mode, owner=owner) as target:
            try:
                section = signature.make(signer, image.pcrs[0], make)
            except EifError as error:
                raise InputError(f"{key} does not sign for {certificate}: {error}") from error
            _write(signed_plan(image, source.fileno(), section), target, path, report)


def _certificate(path: str) -> SigningCertificate:
    """Read the signing certificate, as it is if it is PEM; raises InputError."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    from attestor_eif.signature import SigningCertificate, check_validity

    data = read_file(path, path, _PEM_MAX)
    try:
        if b"-----BEGIN" not in data:
            data = x509.load_der_x509_certificate(data).public_bytes(Encoding.PEM)
        certificate = SigningCertificate.load(data)
        check_validity(certificate, datetime.now(UTC))
    except (EifError, ValueError) as error:
        reason = str(error) if isinstance(error, EifError) else "no certificate in PEM or DER"
        raise InputError(f"{path}: {reason}") from error
    return certificate


def _local_signer(path: str) -> Callable[[bytes], bytes]:
    """Return what signs a digest with the private key in a file; raises InputError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    from attestor_eif.signature import CURVES

    data = read_file(path, path, _PEM_MAX)
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path} holds no private key in PEM without a password") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in CURVES:
        raise InputError(f"{path} holds a key of another kind than {', '.join(CURVES)}")
    algorithm: hashes.HashAlgorithm = CURVES[key.curve.name].hash

    def sign_digest(digest: bytes) -> bytes:
        if len(digest) != algorithm.digest_size:
            raise ValueError("the certificate's key is on another curve")
        return key.sign(digest, ec.ECDSA(utils.Prehashed(algorithm)))

    return sign_digest


def _kms_signer(
    arn: str, certificate: SigningCertificate, connection: Mapping[str, Any]
) -> Callable[[bytes], bytes]:
    """Return what signs a digest with a key in KMS; raises InputError."""
    names.parse_key_id(arn, "--key")
    kms = Kms.connect(arn, **connection)

    def sign_digest(digest: bytes) -> bytes:
        answer = kms.call_unattested(
            "sign",
            KeyId=arn,
            Message=digest,
            MessageType="DIGEST",
            SigningAlgorithm=certificate.curve.kms_algorithm,
        )
        made = answer.get("Signature")
        return made if isinstance(made, bytes) else b""

    return sign_digest


@contextlib.contextmanager
def _opened(path: str) -> Iterator[io.FileIO]:
    """Open a file that is read more than once, so that it must be a regular one."""
    with eif_errors(path):
        # a FIFO without a writer would block
        source = io.FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    with source:
        if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
            raise InputError(f"{path} is read twice, so that it must be a file")
        yield source


def _write(plan: Plan, target: SecretFile, path: str, report: Callable[[Image], None]) -> None:
    """Write a file, read it again, give it its name, and report; raises OutputError, InputError.

    A report that cannot be written takes the file back: it is part of the result.
    """
    with _reading_errors():
        for block in plan.blocks():
            target.append(block)
    with target.read_again() as again:
        try:
            image = verified(read(again), datetime.now(UTC))
        except (EifError, OSError) as error:
            hint = "a file that it is made of may have changed meanwhile"
            raise OutputError(f"{path} cannot be written: read again, {error}", hint) from error
    target.seal()
    with placed([target]):
        report(image)


@contextlib.contextmanager
def _reading_errors() -> Iterator[None]:
    """Have errors about the files that are copied as ours."""
    try:
        yield
    except EifError as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise InputError(f"a file cannot be read: {error.strerror}") from error
