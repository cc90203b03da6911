"""The software TPM as a character device of the kernel's own: /dev/tpmrm0 for every process and
every container.

A TPM has no ioctl: a command is one write, its response is what is read next, through the same open
file (drivers/char/tpm/tpm-dev-common.c in Linux). So each open file has a response that waits to be
read; the one of a file that nobody reads does not expire here, as it would after two minutes.
"""

from __future__ import annotations

import errno
import itertools
import struct
from typing import TYPE_CHECKING, ClassVar, Final

from nitrosim.cuse import (
    OPEN,
    OPEN_OUT,
    READ,
    RELEASE,
    WRITE,
    CuseDevice,
    Dialogue,
    Message,
    RefusedError,
)
from nitrosim.device import SilenceError

if TYPE_CHECKING:
    from nitrosim.device import Module

# fuse_read_in and fuse_write_in: fh, offset, size, flags, lock_owner, flags of the file, padding
TRANSFER_IN: Final = struct.Struct("=QQIIQII")
WRITE_OUT: Final = struct.Struct("=II")  # size, padding
HANDLE_IN: Final = struct.Struct("=Q")  # what fuse_release_in begins with
COMMAND_MAX: Final = 4096  # TPM_BUFSIZE
_HEADER_MIN: Final = 6  # tag and length, of which the driver takes note
_DIRECT_IO: Final = 1  # FOPEN_DIRECT_IO: reads and writes come as they were made


class TpmDialogue(Dialogue):
    """The messages of one device and its TPM.

    `open_files` has the response that each open file has to be read, by the number of the file.
    """

    def __init__(self, module: Module, name: str) -> None:
        super().__init__(module, name)
        self.open_files: dict[int, bytes] = {}
        self._numbers = itertools.count(1)

    def _perform(self, message: Message) -> bytes | None:
        """The body of the reply; None leaves the caller waiting."""
        if message.opcode == OPEN:
            number = next(self._numbers)
            self.open_files[number] = b""
            return OPEN_OUT.pack(number, _DIRECT_IO, 0)
        if message.opcode == RELEASE and len(message.body) >= HANDLE_IN.size:
            self.open_files.pop(HANDLE_IN.unpack_from(message.body)[0], None)
            return b""
        if message.opcode in {READ, WRITE}:
            return self._transfer(message)
        return super()._perform(message)

    def _ioctl(self, _: bytes) -> bytes | None:
        raise RefusedError(errno.ENOTTY)

    def _transfer(self, message: Message) -> bytes | None:
        if len(message.body) < TRANSFER_IN.size:
            raise RefusedError(errno.EINVAL)
        number, _, size, *_ = TRANSFER_IN.unpack_from(message.body)
        data = message.body[TRANSFER_IN.size :]
        if number not in self.open_files:
            raise RefusedError(errno.EBADF)
        if message.opcode == READ:
            waiting = self.open_files[number]
            self.open_files[number] = waiting[size:]
            return waiting[:size]
        if len(data) != size:
            raise RefusedError(errno.EINVAL)
        return self._write(number, data)

    def _write(self, number: int, data: bytes) -> bytes | None:
        """Put a command to the TPM; what follows its own length is not part of it."""
        if len(data) > COMMAND_MAX:
            raise RefusedError(errno.E2BIG)
        if self.open_files[number]:
            raise RefusedError(errno.EBUSY)  # the response before it has not been read
        length = int.from_bytes(data[2:_HEADER_MIN], "big")
        if len(data) < _HEADER_MIN or len(data) < length:
            raise RefusedError(errno.EINVAL)
        try:
            self.open_files[number] = self._module.answer(data[:length])
        except SilenceError:
            return None
        return WRITE_OUT.pack(len(data), 0)


class CuseTpm(CuseDevice):
    """One TPM as a character device at `path`; as `CuseDevice` is for an NSM."""

    _dialogue_type: ClassVar = TpmDialogue
