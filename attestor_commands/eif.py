"""`attestor eif describe`, `build` and `sign`: enclave image files without anybody else's tool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from attestor import KMS_OPTIONS, MODULE_OPTIONS, options
from attestor_commands.inputs import FILES_ARGUMENT, FORCE_OPTION, evidence_errors
from attestor_commands.report import print_report

if TYPE_CHECKING:
    from attestor_eif import Image


@click.group()
def eif() -> None:
    """Describe, build and sign enclave image files (EIF)."""


@eif.command()
@FILES_ARGUMENT
@click.option("--json", "as_json", is_flag=True, help="print JSON, as nitro-cli describe-eif does")
def describe(file: tuple[str, ...], as_json: bool) -> None:
    """Measure an enclave image file, offline, and verify its signature and its CRC.

    \b
    Examples:
      attestor eif describe app.eif
      attestor eif describe --json app.eif > app.json

    FILE may be "-". PCR0, 1, 2 and 8 are what an enclave of this image attests; the metadata is not
    measured. A file that is damaged, ambiguous or signed for another image, or whose certificate is
    not valid now, prints nothing but the error, whatever FILEs are beside it. Exit status: 0 fine,
    2 not an EIF, 6 not authentic.
    """
    from attestor_commands import eif_report
    from attestor_commands.images import read_image

    images = [(name, read_image(name)) for name in file]
    if as_json:
        for _, image in images:
            print_report(eif_report.image_object(image), str, as_json=True)
    else:
        print_report({}, lambda _: eif_report.images_text(images), as_json=False)


@eif.command()
@click.argument("output")
@click.option("--kernel", metavar="FILE", required=True, help="bzImage (x86_64) or Image (aarch64)")
@click.option(
    "--cmdline", metavar="TEXT", required=True, help="the kernel's command line, or @FILE"
)
@click.option(
    "--ramdisk",
    "ramdisks",
    metavar="FILE",
    multiple=True,
    required=True,
    help="initramfs, repeatable: the first is part of PCR1, the others are PCR2",
)
@click.option(
    "--arch",
    type=click.Choice(("x86_64", "aarch64")),
    default="x86_64",
    help="[default: x86_64]",
)
@click.option("--name", metavar="TEXT", help="of the image  [default: the kernel's file name]")
@click.option("--version", metavar="TEXT", default="1.0", help="of the image  [default: 1.0]")
@click.option("--build-time", metavar="TEXT", help="[default: Unknown, so that builds are alike]")
@click.option("--os", "operating_system", metavar="TEXT", help="in the image  [default: Unknown]")
@click.option("--kernel-version", metavar="TEXT", help="[default: Unknown]")
@click.option("--metadata", "custom", metavar="FILE", help="more of it, a JSON object")
@FORCE_OPTION
def build(output: str, force: bool, **parts: Any) -> None:
    """Build an enclave image file, and print its measurements as nitro-cli does.

    \b
    Example:
      attestor eif build --kernel bzImage --cmdline @cmdline --ramdisk init.cpio.gz \\
          --ramdisk root.cpio.gz app.eif > app.json

    The same inputs give the same bytes, and those of AWS's eif_build with the same metadata. OUTPUT
    is complete or absent at any moment, and was read again before it gets its name.
    """
    from attestor_commands import eif_writing

    with evidence_errors():
        eif_writing.build(output, _print_measurements, force=force, **parts)


@eif.command()
@click.argument("file")
@click.option(
    "--key",
    metavar="FILE|ARN",
    required=True,
    help="private key in PEM, or a key in KMS by its ARN",
)
@click.option("--certificate", metavar="FILE", required=True, help="of that key, in PEM or DER")
@options(KMS_OPTIONS, without={"key_id", "any_key", "encryption_context", "grant_tokens"})
@options(MODULE_OPTIONS, without={"nsm_library"})
def sign(file: str, key: str, certificate: str, **connection: Any) -> None:
    """Sign an enclave image file, and print its measurements as nitro-cli does.

    \b
    Examples:
      attestor eif sign --key signing/key.pem --certificate signing/cert.pem app.eif > app.json
      attestor eif sign --key arn:aws:kms:...:key/... --certificate cert.pem app.eif

    The signature covers PCR0, and PCR8 becomes that of the certificate, which must be valid now. An
    older signature is replaced. Keys are on P-256, P-384 or P-521; KMS signs a digest, for which
    the caller needs kms:Sign. FILE is the old one or the signed one at any moment.
    """
    from attestor_commands import eif_writing

    with evidence_errors():
        eif_writing.sign(file, _print_measurements, key, certificate, connection)


def _print_measurements(image: Image) -> None:
    from attestor_commands import eif_report

    print_report(eif_report.measurements_object(image.pcrs), str, as_json=True)
