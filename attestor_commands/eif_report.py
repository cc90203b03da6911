"""What an enclave image file is: for programs as `nitro-cli` prints it, and for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attestor_commands.evidence_report import pcr_lines
from attestor_commands.report import Object, field

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from cryptography import x509

    from attestor_eif import Image, Metadata

HASH_ALGORITHM: Final = "Sha384 { ... }"
"""The name as the Nitro Enclaves User Guide shows it; `nitro-cli` 1.5 has another for the same."""


def measurements_object(pcrs: Mapping[int, bytes]) -> Object:
    """Give what `nitro-cli build-enclave` prints."""
    return {
        "Measurements": {
            "HashAlgorithm": HASH_ALGORITHM,
            **{f"PCR{index}": pcrs[index].hex() for index in sorted(pcrs)},
        }
    }


def image_object(image: Image) -> Object:
    """Give what `nitro-cli describe-eif` prints, with its names and in its order."""
    shown: Object = {"EifVersion": image.header.version, **measurements_object(image.pcrs)}
    shown["IsSigned"] = image.signature is not None
    if image.signature is not None:
        shown["SigningCertificate"] = _certificate_object(image.signature.certificate.certificate)
    shown["CheckCRC"] = True  # and so is the next: an image of which they do not hold is refused
    if image.signature is not None:
        shown["SignatureCheck"] = True
    if image.metadata is not None:
        shown["ImageName"] = image.metadata.name
        shown["ImageVersion"] = image.metadata.version
        shown["Metadata"] = _metadata_object(image.metadata)
    return shown


def _metadata_object(metadata: Metadata) -> Object:
    shown: Object = {**metadata.build, "DockerInfo": metadata.docker}
    match metadata.custom:
        case None:
            return shown
        case dict() as members:  # nitro-cli prints them beside the others
            return {**shown, **members}
        case other:
            return {**shown, "CustomMetadata": other}


def _certificate_object(certificate: x509.Certificate) -> Object:
    """Give a certificate as the crate shows it, by OpenSSL's names."""
    issuer = {_long_name(part.oid): _escaped(part.value) for part in certificate.issuer}
    return {
        "IssuerName": dict(sorted(issuer.items())),
        "Algorithm": _long_name(certificate.signature_algorithm_oid),
        "NotBefore": _asn1_time(certificate.not_valid_before_utc),
        "NotAfter": _asn1_time(certificate.not_valid_after_utc),
        "Signature": certificate.signature.hex(":").upper(),
    }


def _long_name(oid: x509.ObjectIdentifier) -> str:
    name = oid._name
    return oid.dotted_string if name == "Unknown OID" else name


def _escaped(value: str | bytes) -> str:
    """Show a part of a name as the Debug of Rust's str does, without quotes."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    plain = {"\t": r"\t", "\r": r"\r", "\n": r"\n", "\0": r"\0", "\\": r"\\", '"': "\\"}
    return "".join(
        plain.get(one, one if one.isprintable() else f"\\u{{{ord(one):x}}}") for one in text
    )


def _asn1_time(time: datetime) -> str:
    """Show a time as OpenSSL prints it: "Jan  3 12:00:00 2026 GMT", in English everywhere."""
    month = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()[time.month - 1]
    return f"{month} {time.day:2} {time:%H:%M:%S} {time.year} GMT"


# ---- for people


def image_text(image: Image) -> str:
    """Make the report on an image."""
    header = image.header
    kinds = f"{header.architecture}, version {header.version} of the format"
    lines = [
        *field("image", f"{image.size} bytes, {kinds}, CRC {header.crc:08x} holds"),
        *field("asks for", f"{header.memory >> 20} MiB and {header.cpus} CPUs by default"),
        *field("command line", image.command_line.decode(errors="replace") or "(empty)"),
        "",
        "PCRs (SHA384)",
        *pcr_lines({str(index): image.pcrs[index].hex() for index in sorted(image.pcrs)}),
    ]
    return "\n".join([*lines, *_signature_lines(image), *_section_lines(image), *_told(image)])


def images_text(images: Sequence[tuple[str, Image]]) -> str:
    """Make one report on images by the names of their files, which are shown where several are."""
    if len(images) == 1:
        return image_text(images[0][1])
    return "\n\n".join(
        "\n".join([*field("file", name), image_text(image)]) for name, image in images
    )


def _signature_lines(image: Image) -> list[str]:
    if image.signature is None:
        return ["", *field("signature", "none")]
    certificate = image.signature.certificate
    first, last = (
        _asn1_time(time)
        for time in (
            certificate.certificate.not_valid_before_utc,
            certificate.certificate.not_valid_after_utc,
        )
    )
    return [
        "",
        *field("signature", f"covers PCR0, by the key of this certificate ({_curve(image)})"),
        *field("  subject", certificate.certificate.subject.rfc4514_string()),
        *field("  issuer", certificate.certificate.issuer.rfc4514_string()),
        *field("  valid", f"{first} to {last}"),
    ]


def _curve(image: Image) -> str:
    return image.signature.certificate.key.curve.name if image.signature else ""


def _section_lines(image: Image) -> list[str]:
    """List the sections, with where their contents begin."""
    rows = [
        f"  {section.contents:>12} {section.size:>12}  {section.kind}" for section in image.sections
    ]
    return ["", f"  {'contents at':>12} {'bytes':>12}  section", *rows]


def _told(image: Image) -> list[str]:
    """Show the metadata, and that nothing vouches for it."""
    if image.metadata is None:
        return ["", *field("metadata", "none")]
    metadata = image.metadata
    warning = "not measured, so that whoever carries the file can change it"
    lines = ["", *field("metadata", warning)]
    lines += field("  name", f"{metadata.name}, version {metadata.version}")
    lines += field(
        "  built", f"{metadata.build_time}, by {metadata.build_tool} {metadata.build_tool_version}"
    )
    lines += field("  system", f"{metadata.operating_system}, kernel {metadata.kernel_version}")
    for name, value in (("Docker's", metadata.docker), ("custom", metadata.custom)):
        if value is not None:
            lines += field(f"  {name}", "there is some, which --json shows")
    return lines
