"""The command `nitrosim`: run a command in a simulated enclave, or serve one.

Exit status of `run`: the command's own; 127 if there is no such program, 126 if it cannot be
executed, 128 plus the number of the signal that ended it; 2 for options that cannot be, 1 when the
simulator cannot start.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from nitrosim import missing_package

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_PATHS: Final = ("LD_PRELOAD", "NITROSIM_NSM_SOCKET", "NITROSIM_TPM_SOCKET")
_DEVICE: Final = "/dev/nsm"
_TPM_DEVICE: Final = "/dev/tpmrm0"
_FORMS: Final = "kms, kms-chunks, kms-primitive, localstack"


class _Cli(click.Group):
    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run a command; whatever is wrong becomes one line and an exit status."""
        kwargs |= {"prog_name": "nitrosim", "standalone_mode": False}
        try:
            sys.exit(super().main(*args, **kwargs) or 0)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except click.ClickException as error:
            _fail(error.format_message().rstrip("."), error.exit_code)
        except ImportError as error:
            _fail(missing_package(error), 2)
        except click.Abort:
            sys.exit(128 + signal.SIGINT)
        except OSError as error:
            _fail(f"standard output cannot be written: {error.strerror}", 1)


def _fail(message: str, status: int) -> NoReturn:
    with contextlib.suppress(OSError):
        click.echo(f"nitrosim: error: {message}", err=True)
    sys.exit(status)


def _complete_fault(_context: object, _option: object, incomplete: str) -> list[str]:
    """The faults that a shell can complete to; none where the simulator is not installed whole."""
    try:
        from nitrosim.world import FAULTS
    except ModuleNotFoundError:
        return []
    return [name for name in FAULTS if name.startswith(incomplete)]


_WORLD_OPTIONS: Final = (
    click.option(
        "--pcr",
        "pcrs",
        metavar="N=HEX",
        multiple=True,
        help="a PCR of the enclave, repeatable; 0 is short for 48 zero bytes",
    ),
    click.option(
        "--debug-mode",
        "debug",
        is_flag=True,
        help="an enclave in debug mode: PCR0, 1, 2 and 8 are zero",
    ),
    click.option(
        "--nitrotpm",
        is_flag=True,
        help="an EC2 instance with a NitroTPM at /dev/tpmrm0, in the place of an enclave",
    ),
    click.option(
        "--tpm-pcr",
        "tpm_pcrs",
        metavar="N=HEX",
        multiple=True,
        help="a PCR of the NitroTPM, repeatable; 0 as above",
    ),
    click.option(
        "--key-policy",
        metavar="FILE",
        help='JSON policy of alias/nitrosim; "-" is standard input',
    ),
    click.option("--principal", metavar="ARN", help="whose credentials the command gets"),
    click.option("--envelope", metavar="FORM", default="kms", help=f"{_FORMS}  [default: kms]"),
    click.option(
        "--fault",
        "faults",
        metavar="NAME",
        multiple=True,
        shell_complete=_complete_fault,
        help='what goes wrong, one of each layer; "nitrosim faults" lists them',
    ),
    click.option(
        "--tag",
        "tags",
        metavar="NAME=VALUE",
        multiple=True,
        help="a tag of the instance, repeatable; starts the metadata service",
    ),
    click.option(
        "--clock-skew",
        metavar="SECONDS",
        type=click.FloatRange(-1e6, 1e6),
        default=0.0,
        help="how far the clock of KMS is ahead",
    ),
)


def _world_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_WORLD_OPTIONS):
        command = option(command)
    return command


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """A Nitro Enclave and an attested KMS on a laptop, for tests and for trying things out."""


@cli.command(context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@_world_options
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(command: tuple[str, ...], **options: Any) -> int:
    """Start both, run COMMAND, pass its exit status on.

    \b
    Example:
      nitrosim run -- sh -c 'attestor decrypt --any-key blob out && cat out'

    COMMAND finds a Nitro Secure Module at /dev/nsm, and a KMS with a key behind alias/nitrosim in
    eu-west-1. Keys and certificates are new in each run.
    """
    with _world(**options) as world:
        return _run(command, world.environment(os.environ))


@cli.command()
@_world_options
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="of the KMS  [default: a free one]"
)
@click.option(
    "--device",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="a device of the kernel's own, such as /dev/nsm, in the place of the shim; for root, "
    "needs CUSE",
)
@click.option(
    "--no-instance-tags", is_flag=True, help="tags are not in the metadata, as by default in EC2"
)
@click.option(
    "--vsock",
    is_flag=True,
    help="the parent's services on vsock: 8000 KMS, 8001 S3, 8002 metadata, 8003 status lines, "
    "shown on stderr",
)
@click.option(
    "--ready-file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="written in one step when all answers, with what would be printed; gone in the end",
)
def serve(*, ready_file: Path | None, **options: Any) -> None:
    """Start both and stay; prints the environment that leads a command to them, as shell commands.

    \b
    Example:
      nitrosim serve --ready-file simulator.env &
      while kill -0 $! && ! test -e simulator.env; do sleep 0.1; done
      . ./simulator.env

    Ends with SIGINT or SIGTERM.
    """
    ending = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)  # before the threads start, which inherit it
    with _ready_file(ready_file) as show, _world(**options, on_status=_show) as world:
        if options["vsock"]:
            from nitrosim.parent import unreachable

            for problem in unreachable():
                _show(f"nitrosim: warning: {problem}")
        lines = [
            *_exports(world.environment(os.environ)),
            *_container(world, world.environment({})),
        ]
        show("".join(f"{line}\n" for line in lines))
        signal.sigwait(ending)


@contextlib.contextmanager
def _ready_file(path: Path | None) -> Iterator[Callable[[str], object]]:
    """What shows a text, on standard output or as the whole of a file at once, which is there no
    longer than this lasts.
    """
    if path is None:
        yield _print
        return
    with _errors_of(path):
        path.parent.stat()
        path.unlink(missing_ok=True)  # of a server that was killed
    try:
        yield functools.partial(_write_whole, path)
    finally:
        path.unlink(missing_ok=True)


def _print(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


def _write_whole(path: Path, text: str) -> None:
    """Write a file of this user's that nobody sees half of: it names credentials, if simulated
    ones.
    """
    with (
        _errors_of(path),
        tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as work,
    ):
        whole = Path(work, path.name)
        whole.touch(mode=0o600)
        whole.write_text(text, encoding="utf-8")
        whole.replace(path)


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise click.UsageError(f"--ready-file {path}: {error.strerror}") from error


def _show(line: str) -> None:
    with contextlib.suppress(OSError):
        click.echo(line, err=True)


@cli.command()
def faults() -> None:
    """List what --fault can make go wrong."""
    from nitrosim.world import FAULTS

    width = max(map(len, FAULTS))
    for name, description in FAULTS.items():
        click.echo(f"{name:{width}}  {description}")


@contextlib.contextmanager
def _world(
    *,
    pcrs: Sequence[str],
    tpm_pcrs: Sequence[str],
    key_policy: str | None,
    tags: Sequence[str],
    no_instance_tags: bool = False,
    **options: Any,
) -> Iterator[Any]:
    from keypolicy import PolicyError
    from nitrosim.device import SimulatorError
    from nitrosim.world import World

    with contextlib.ExitStack() as stack:
        try:
            options["tags"] = dict(map(_tag, tags)) if tags or no_instance_tags else None
            if no_instance_tags:  # there, but the metadata has none of them
                options["tags"].clear()
            world = stack.enter_context(
                World(
                    pcrs=dict(_pcr(text, "--pcr") for text in pcrs),
                    tpm_pcrs=dict(_pcr(text, "--tpm-pcr") for text in tpm_pcrs),
                    key_policy=_read(key_policy),
                    **options,
                )
            )
        except (ValueError, PolicyError) as error:
            raise click.UsageError(str(error)) from error
        except (SimulatorError, OSError) as error:
            raise click.ClickException(f"cannot start: {error}") from error
        yield world


def _pcr(text: str, option: str) -> tuple[int, bytes]:
    """Read N=HEX; the value "0" is that of a PCR into which nothing was extended.

    Half a byte is no hexadecimal text otherwise, so that "0" stands for nothing else. The banks of
    an enclave and of a NitroTPM are both of SHA-384.
    """
    from nitrosim.module import ZERO_PCR

    number, equals, value = text.partition("=")
    if not (number.isascii() and number.isdigit() and equals):
        raise ValueError(f"{option} wants N=HEX, got {text}")
    return int(number), ZERO_PCR if value == "0" else bytes.fromhex(value)


def _tag(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--tag wants NAME=VALUE, got {text}")
    return key, value


def _read(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--key-policy {path} cannot be read: {error}") from error


def _run(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run the command as a shell would: a terminal's signals reach it directly, others are passed
    on.
    """
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _frame: object) -> None:
        for child in children:
            child.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGHUP, pass_on)
    try:
        children.append(subprocess.Popen(command, env=environment))
    except FileNotFoundError:
        click.echo(f"nitrosim: error: {command[0]}: not found", err=True)
        return 127
    except OSError as error:
        click.echo(f"nitrosim: error: {command[0]}: {error.strerror}", err=True)
        return 126
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status = children[0].wait()
    return status if status >= 0 else 128 - status


def _exports(environment: dict[str, str]) -> list[str]:
    """Shell commands that turn the caller's environment into this one."""
    gone = [f"unset {name}" for name in os.environ if name not in environment]
    new = [
        f"export {name}={shlex.quote(value)}"
        for name, value in environment.items()
        if os.environ.get(name) != value
    ]
    return gone + new


def _container(world: Any, environment: dict[str, str]) -> list[str]:
    """Comments that say what a container needs to be in this world: its files, its network, its
    variables.
    """
    paths = {str(Path(environment[name]).parent) for name in _PATHS if name in environment}
    folders = sorted({str(world.folder), *paths})
    volumes = "".join(f" --volume {shlex.quote(f'{folder}:{folder}')}" for folder in folders)
    device = f" --device {shlex.quote(_mapping(world))}" if world.device else ""
    variables = "".join(f" --env {name}" for name in sorted(environment))
    return [
        (
            f"# a container of {'any image' if world.device else 'an image with glibc'} is in this "
            "world with:"
        ),
        f"#   podman run --network host{device}{volumes}{variables} IMAGE",
    ]


def _mapping(world: Any) -> str:
    """A device as a container gets it: at /dev/nsm, whatever it is called here."""
    device, usual = world.device, _TPM_DEVICE if world.tpm else _DEVICE
    return str(device) if device == Path(usual) else f"{device}:{usual}"


def main() -> NoReturn:
    """Run the command line."""
    cli.main()


if __name__ == "__main__":
    main()
