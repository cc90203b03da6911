"""The program that `attestor inject` becomes: found and examined first, executed at last."""

from __future__ import annotations

import os
import re
import shutil
import signal
import struct
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from attestor_io.errors import AttestorError
from attestor_io.hold import inherited_mask

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CREDENTIALS: Final = frozenset(
    "AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_SECURITY_TOKEN "
    "AWS_CREDENTIAL_EXPIRATION AWS_CONTAINER_CREDENTIALS_RELATIVE_URI "
    "AWS_CONTAINER_CREDENTIALS_FULL_URI AWS_CONTAINER_AUTHORIZATION_TOKEN "
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE AWS_WEB_IDENTITY_TOKEN_FILE "
    "AWS_EC2_METADATA_TOKEN".split()
)
"""Variables that a program does not get, unless its manifest says so."""

_IGNORED_BY_PYTHON: Final = (signal.SIGPIPE, signal.SIGXFSZ)
_BEARER_TOKENS: Final = "AWS_BEARER_TOKEN_"
_HEAD: Final = 256  # bytes of a file that the kernel looks at: BINPRM_BUF_SIZE, linux/binfmts.h
_SCRIPTS_MAX: Final = 5  # scripts that are interpreters of scripts: exec_binprm, fs/exec.c
_PT_INTERP: Final = 3  # elf(5)
_PATH_MAX: Final = 4096


class ProgramError(AttestorError):
    """The program cannot be run; `status` is as in a shell."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def find_program(name: str) -> str:
    """The path of a program, looked up in PATH as a shell does, which execve will take.

    Raises ProgramError with status 127 where there is none, 126 where it cannot be executed: now,
    with nothing placed and nothing asked of KMS.
    """
    path = shutil.which(name)
    if path is not None:
        _examine(path, name)
        return path
    if os.path.sep in name and os.path.lexists(name):
        raise _not_executable(name, "it is no executable file")
    raise ProgramError(f"{name}: no such program", 127)


def _examine(path: str, name: str, scripts: int = 0) -> None:
    """Look at a file, and at the interpreters that it names, as the kernel will (execve(2))."""
    if not os.path.isfile(path):  # opening a FIFO would wait for ever
        raise _not_executable(name, "it is no file")
    try:
        with open(path, "rb") as program:
            head = program.read(_HEAD)
            interpreter = _interpreter_of_elf(head, program.fileno())
    except PermissionError:  # executable but not readable: only the kernel can tell
        return
    except (OSError, struct.error) as error:
        reason = getattr(error, "strerror", None) or "its ELF header is damaged"
        raise _not_executable(name, reason) from error
    if head.startswith(b"#!"):
        # blanks and tabs alone end the name: a carriage return is a part of it
        interpreter = re.split(rb"[ \t]", head[2:].split(b"\n")[0].strip(b" \t"))[0]
        if not interpreter or scripts == _SCRIPTS_MAX:
            raise _not_executable(name, f"{path} names no interpreter that could be")
    elif not head.startswith(b"\x7fELF"):
        raise _not_executable(name, "it is neither ELF nor a script with #!")
    if interpreter:
        found = os.fsdecode(interpreter)
        if not (os.path.isfile(found) and os.access(found, os.X_OK)):
            raise _not_executable(name, f"its interpreter {found} is no executable file")
        _examine(found, name, scripts + 1)


def _interpreter_of_elf(head: bytes, descriptor: int) -> bytes:
    """The dynamic loader that an ELF file names; none for a static one, or for another file."""
    if not head.startswith(b"\x7fELF"):
        return b""
    order = "<" if head[5] == 1 else ">"
    wide = head[4] == 2  # ELFCLASS64: e_phoff, p_offset and p_filesz have eight bytes
    (table,) = struct.unpack_from(order + ("Q" if wide else "I"), head, 32 if wide else 28)
    size, count = struct.unpack_from(order + "HH", head, 54 if wide else 42)
    for index in range(count):
        entry = os.pread(descriptor, size, table + index * size)
        if struct.unpack_from(order + "I", entry)[0] == _PT_INTERP:
            fields = order + ("8xQ16xQ" if wide else "4xI8xI")
            offset, length = struct.unpack_from(fields, entry)
            return os.pread(descriptor, min(length, _PATH_MAX), offset).rstrip(b"\0")
    return b""


def _not_executable(name: str, reason: str) -> ProgramError:
    return ProgramError(f"{name} cannot be executed: {reason}", 126)


class Inheritance(NamedTuple):
    """What a program gets beside this process's environment; the descriptors stay open."""

    variables: Mapping[str, str | bytes]
    descriptors: Sequence[int]


class Program(NamedTuple):
    """A program that was found: `path` is the file, `arguments` begin with its name."""

    path: str
    arguments: Sequence[str]
    pass_credentials: bool

    def execute(self, inheritance: Inheritance) -> NoReturn:
        """Become the program: its exit status and signals are its own. Raises ProgramError."""
        for descriptor in inheritance.descriptors:
            os.set_inheritable(descriptor, True)
        for number in _IGNORED_BY_PYTHON:  # which execve would keep
            signal.signal(number, signal.SIG_DFL)
        try:
            os.execve(  # noqa: S606 - no shell is the point
                self.path, list(self.arguments), self._environment(inheritance)
            )
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error
        finally:
            for number in _IGNORED_BY_PYTHON:
                signal.signal(number, signal.SIG_IGN)

    def start(self, inheritance: Inheritance) -> int:
        """Start it beside this process, as `execute` would become it; its process id.

        Raises ProgramError. Between fork and exec runs nothing of Python's (posix_spawn), so that
        it does not matter which locks other threads hold.
        """
        for descriptor in inheritance.descriptors:
            os.set_inheritable(descriptor, True)
        try:
            return os.posix_spawn(
                self.path,
                list(self.arguments),
                self._environment(inheritance),
                setsigmask=inherited_mask(),
                setsigdef=_IGNORED_BY_PYTHON,
            )
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error

    def _environment(self, inheritance: Inheritance) -> dict[str, str | bytes]:
        environment: dict[str, str | bytes] = {
            name: value
            for name, value in os.environ.items()
            if self.pass_credentials or not (name in CREDENTIALS or name.startswith(_BEARER_TOKENS))
        }
        return environment | dict(inheritance.variables)  # may be credentials of the program's own

    def _unusable(self, error: OSError | ValueError) -> ProgramError:
        return _not_executable(self.arguments[0], getattr(error, "strerror", None) or str(error))
