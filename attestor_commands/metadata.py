"""`attestor metadata`: one value of the instance metadata service."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from attestor import parse_timeout, parse_vsock
from attestor_commands.report import print_report
from attestor_io.text_options import complete_from

if TYPE_CHECKING:
    from attestor_io.deadline import Deadline
    from attestor_io.vsock import Address


@click.command()
@click.argument(
    "path", shell_complete=complete_from(("placement/region", "instance-id", "tags/instance/"))
)
@click.option(
    "--imds-vsock",
    metavar="CID:PORT",
    callback=parse_vsock,
    help="reach the instance metadata service so",
)
@click.option(
    "--timeout",
    "deadline",
    metavar="SECONDS",
    default="10",
    callback=parse_timeout,
    help="for everything, retries included  [default: 10]",
)
def metadata(path: str, imds_vsock: Address | None, deadline: Deadline) -> None:
    """Print one value of the instance metadata service (version 2).

    \b
    Examples:
      attestor metadata placement/region
      attestor metadata --imds-vsock 3:8002 tags/instance/mpa-node

    PATH is below latest/meta-data/; credentials are never printed. The value is the parent's claim.
    Without vsock the service is at AWS_EC2_METADATA_SERVICE_ENDPOINT, or else at its IPv4 or IPv6
    address as AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE says; no proxy is asked.

    Exit status: 0 done, 2 usage, 4 no such value, 5 try again.
    """
    from attestor_io.metadata import fetch

    value = fetch(path, imds_vsock, deadline)
    print_report({}, lambda _: value, as_json=False)
