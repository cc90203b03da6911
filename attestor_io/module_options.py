"""Options that say where attestation documents come from, which `nsm` looks for in the environment:
so a program that calls attested() is steered in the same way.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import click

from attestor_io.errors import InputError
from attestor_io.text_options import complete_from

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_SOURCES: Final = ("auto", "nsm", "nitrotpm")


def _hand_on(_context: click.Context, option: click.Parameter, value: str | None) -> None:
    """Put the value of an option into the environment, for nsm; raises InputError."""
    name = option.opts[0]
    if value == "":
        raise InputError(f"{name} is empty")
    if name == "--source" and value not in {None, *_SOURCES}:
        raise InputError(f"{name} {value} is none of {', '.join(_SOURCES)}")
    if value is not None:
        os.environ[_VARIABLES[name]] = value


_VARIABLES: Final = {
    "--nsm-library": "NSM_LIBRARY",
    "--source": "NSM_SOURCE",
    "--tpm": "NSM_TPM",
}


def _option(name: str, metavar: str, said: str, **more: Any) -> Callable[[Callable[..., Any]], Any]:
    return click.option(
        name,
        metavar=metavar,
        callback=_hand_on,
        expose_value=False,
        help=f"{said}  [env: {_VARIABLES[name]}]",
        **more,
    )


SOURCE_OPTIONS: Final[Mapping[str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = {
    "source": _option(
        "--source",
        "SOURCE",
        "auto, nsm (an enclave) or nitrotpm (an EC2 instance)",
        shell_complete=complete_from(_SOURCES),
    ),
    "nsm_library": _option("--nsm-library", "FILE", "patched libnsm.so, which must work"),
    "tpm": _option("--tpm", "FILE", "device of the NitroTPM, such as /dev/tpm0"),
}
