"""`attestor inject`: every secret of a manifest into its place, then the program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from attestor import MODULE_OPTIONS, VSOCK_OPTIONS, options, parse_vsock
from attestor_commands.inputs import FORCE_OPTION
from attestor_commands.report import print_report
from attestor_io.text_options import FileName, parse_pairs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from attestor_io.vsock import Address

WATCH_MAX: Final = 86_400  # seconds


def _print_schema(context: click.Context, _option: click.Parameter, asked: bool) -> None:
    if asked:
        from attestor_commands.inject.fields import json_schema

        print_report(json_schema(), str, as_json=True)
        context.exit()


@click.command()
@click.argument("manifest")
@click.argument(
    "program",
    nargs=-1,
    type=click.UNPROCESSED,
    metavar="[-- PROGRAM ARG...]",
    shell_complete=FileName().shell_complete,
)
@click.option(
    "--set",
    "settings",
    metavar="NAME=VALUE",
    multiple=True,
    callback=parse_pairs,
    help="value of a variable, repeatable",
)
@click.option(
    "--receipt", metavar="FILE", help="write there, as JSON, what was done; no secret is in it"
)
@click.option(
    "--watch",
    metavar="SECONDS",
    type=click.IntRange(1, WATCH_MAX),
    help="stay beside PROGRAM, fetch again so often, and tell it of changes",
)
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    callback=_print_schema,
    expose_value=False,
    help="print the JSON schema of a manifest and exit",
)
@FORCE_OPTION
@options(VSOCK_OPTIONS)
@click.option("--s3-vsock", metavar="CID:PORT", callback=parse_vsock, help="reach S3 so")
@options(MODULE_OPTIONS)
def inject(
    manifest: str,
    program: tuple[str, ...],
    settings: Mapping[str, str],
    receipt: str | None,
    force: bool,
    watch: int | None,
    host_vsock: Mapping[str, Address],
    **addresses: Address | None,
) -> int:
    """Put every secret and file of a manifest in its place, then become PROGRAM.

    \b
    Examples:
      attestor inject --set NODE=3 /etc/secrets.toml -- /usr/bin/server --port 80
      attestor inject --watch 300 /etc/secrets.toml -- /usr/bin/server --port 80

    Nothing is placed unless everything opened; a failure takes back what this run placed. PROGRAM
    replaces this process: its exit status and signals are its own, 127 if there is no such program,
    126 if it cannot be executed. With --watch this process stays, passes signals on, restarts or
    signals PROGRAM when something has changed, and ends as PROGRAM does. docs/manifest.md describes
    the manifest; its own vsock addresses give way to those of the options.
    """
    from attestor_commands.inject.run import inject as run

    return run(
        manifest,
        program,
        settings=settings,
        receipt=receipt,
        force=force,
        watch=watch,
        addresses=addresses,
        host_vsock=host_vsock,
    )
