"""The software NSM as a character device of the kernel's own: /dev/nsm for every process and every
container.

    with CuseDevice(SoftwareNsm(pki), Path("/dev/nsm")):
        subprocess.run(command)

CUSE hands each call on the device to this process as a message of the FUSE protocol (linux/fuse.h,
version 7), read from /dev/cuse and answered there. `Dialogue` is that protocol without a file
descriptor; `CuseDevice` gives it one. Who opened the device, and how often, makes no difference:
nothing is kept for a handle.

An ioctl comes in up to three messages. The first carries the argument alone, and is told to come
again with struct nsm_raw; the second carries that, and is told to come again with the request and
with room for the response; the third carries all. What cannot be copied is EFAULT, from the kernel.
As in drivers/misc/nsm.c a response is cut to the caller's room and its length is written back;
unlike there, the length is written before the response, so that it has changed, too, when the
response's address turns out to be bad.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import selectors
import socket
import stat
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from nitrosim.device import SilenceError, SimulatorError
from nsm.device import DEVICE, NSM_IOCTL_RAW
from nsm.module import REQUEST_MAX, RESPONSE_MAX

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Self

    from nitrosim.device import Module

CHANNEL: Final = Path("/dev/cuse")
_CLASS: Final = Path("/sys/class/cuse")
_PATIENCE: Final = 10.0  # seconds for the first message, which is there at once
_NAME_MAX: Final = 255

# enum fuse_opcode
FORGET: Final = 2
OPEN: Final = 14
READ: Final = 15
WRITE: Final = 16
RELEASE: Final = 18
FLUSH: Final = 25
INTERRUPT: Final = 36
IOCTL: Final = 39
BATCH_FORGET: Final = 42
CUSE_INIT: Final = 4096

# The structures, in the machine's own byte order: fuse_in_header, fuse_out_header, and so on
IN_HEADER: Final = struct.Struct(
    "=IIQQIIIHH"
)  # length, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
OUT_HEADER: Final = struct.Struct("=IiQ")  # length, error, unique
INIT_IN: Final = struct.Struct("=IIII")  # major, minor, unused, flags
INIT_OUT: Final = struct.Struct(
    "=IIIIIIII40x"
)  # the same, max_read, max_write, dev_major, dev_minor, spare
OPEN_OUT: Final = struct.Struct("=QII")  # fh, open_flags, padding
INTERRUPT_IN: Final = struct.Struct("=Q")  # unique
IOCTL_IN: Final = struct.Struct("=QIIQII")  # fh, flags, cmd, arg, in_size, out_size
IOCTL_OUT: Final = struct.Struct("=iIII")  # result, flags, in_iovs, out_iovs
IOVEC: Final = struct.Struct("=QQ")  # base, len
NSM_RAW: Final = struct.Struct(
    "=QQQQ"
)  # linux/nsm.h: request.addr, request.len, response.addr, response.len

_MAJOR: Final = 7  # FUSE_KERNEL_VERSION
# the first with struct fuse_ioctl_iovec in the place of iovec; nothing here needs a later one
_MINOR: Final = 16
_OLDEST: Final = 16
_UNRESTRICTED_IOCTL: Final = 1  # CUSE_UNRESTRICTED_IOCTL
_RETRY: Final = 4  # FUSE_IOCTL_RETRY
_DIRECT_IO: Final = 1  # FOPEN_DIRECT_IO
# of read and write: more than a TPM takes, so that a command too long for it comes in one piece
_TRANSFER_MAX: Final = 8192
_MESSAGE_MAX: Final = (
    1 << 16
)  # bytes, more than header, arguments, struct nsm_raw and a request; the kernel asks for 8192


class Message(NamedTuple):
    """What the kernel sends: an opcode, a number that the reply repeats, and the opcode's own
    arguments.
    """

    opcode: int
    unique: int
    body: bytes


def parse(data: bytes) -> Message | None:
    """A message without its header; None for what is none, and so cannot be answered."""
    if len(data) < IN_HEADER.size:
        return None
    length, opcode, unique, *_ = IN_HEADER.unpack_from(data)
    return Message(opcode, unique, data[IN_HEADER.size :]) if length == len(data) else None


def reply(unique: int, body: bytes = b"") -> bytes:
    """The message that ends a request well."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body


def refusal(unique: int, number: int) -> bytes:
    """The message that ends a request with an errno."""
    return OUT_HEADER.pack(OUT_HEADER.size, -number, unique)


def _retry(incoming: Iterable[tuple[int, int]], outgoing: Iterable[tuple[int, int]] = ()) -> bytes:
    """The answer to an ioctl that is to come again, with these pieces of the caller's memory:
    (address, length).
    """
    incoming, outgoing = list(incoming), list(outgoing)
    pieces = b"".join(IOVEC.pack(*piece) for piece in incoming + outgoing)
    return IOCTL_OUT.pack(0, _RETRY, len(incoming), len(outgoing)) + pieces


class RefusedError(Exception):
    """A call on the device that ends with an errno."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode[number])
        self.number = number


class Dialogue:
    """The messages of one device and its module: what comes from the kernel in, what goes back out.

    A module that is silent leaves its caller waiting; `unanswered` has the numbers of all who wait.
    """

    def __init__(self, module: Module, name: str) -> None:
        self._module = module
        self._name = name
        self.unanswered: set[int] = set()

    def receive(self, data: bytes) -> bytes | None:
        """The reply to a message; None when there is nothing to say."""
        message = parse(data)
        if message is None or message.opcode in {FORGET, BATCH_FORGET}:  # these two want no reply
            return None
        if message.opcode == INTERRUPT:
            return self._interrupt(message.body)
        self.unanswered.add(message.unique)
        try:
            body = self._perform(message)
            answer = None if body is None else reply(message.unique, body)
        except RefusedError as refused:
            answer = refusal(message.unique, refused.number)
        if answer is not None:
            self.unanswered.discard(message.unique)
        return answer

    def hang_up(self) -> Iterator[bytes]:
        """A reply of EIO to all who wait."""
        while self.unanswered:
            yield refusal(self.unanswered.pop(), errno.EIO)

    def _perform(self, message: Message) -> bytes | None:
        """The body of the reply; None leaves the caller waiting."""
        if message.opcode == IOCTL:
            return self._ioctl(message.body)
        if message.opcode == CUSE_INIT:
            return self._init(message.body)
        if message.opcode == OPEN:
            return OPEN_OUT.pack(0, _DIRECT_IO, 0)
        if message.opcode in {RELEASE, FLUSH}:
            return b""
        # As a device without the operation; ENOSYS to a poll makes the kernel answer it by itself,
        # always ready
        raise RefusedError(errno.EINVAL if message.opcode in {READ, WRITE} else errno.ENOSYS)

    def _init(self, body: bytes) -> bytes:
        """What the device is called, and that an ioctl may ask for any of its caller's memory."""
        if len(body) < INIT_IN.size:
            raise RefusedError(errno.EINVAL)
        major, minor, _, flags = INIT_IN.unpack_from(body)
        if major != _MAJOR or minor < _OLDEST or not flags & _UNRESTRICTED_IOCTL:
            raise RefusedError(errno.EPROTO)
        sizes = (_TRANSFER_MAX, _TRANSFER_MAX)
        kernel_chooses = (0, 0)
        settings = INIT_OUT.pack(_MAJOR, _MINOR, 0, _UNRESTRICTED_IOCTL, *sizes, *kernel_chooses)
        return settings + b"DEVNAME=" + self._name.encode() + b"\0"

    def _ioctl(self, body: bytes) -> bytes | None:
        if len(body) < IOCTL_IN.size:
            raise RefusedError(errno.EINVAL)
        _, _, command, argument, in_size, out_size = IOCTL_IN.unpack_from(body)
        data = body[IOCTL_IN.size :]
        if command != NSM_IOCTL_RAW or len(data) != in_size:
            raise RefusedError(errno.EINVAL)
        raw_piece = (argument, NSM_RAW.size)
        if in_size == 0:
            return _retry([raw_piece])
        if in_size < NSM_RAW.size:
            raise RefusedError(errno.EINVAL)
        raw, request = data[: NSM_RAW.size], data[NSM_RAW.size :]
        if not request:
            request_piece, response_piece = _pieces(raw)
            return _retry([raw_piece, request_piece], [raw_piece, response_piece])
        return self._ask(raw, request, out_size - NSM_RAW.size)

    def _ask(self, raw: bytes, request: bytes, room: int) -> bytes | None:
        """Put the request to the module.

        Its sizes are those that were checked, whatever struct nsm_raw says by now.
        """
        if len(request) > REQUEST_MAX or room < 0:
            raise RefusedError(errno.EINVAL)
        try:
            answer = self._module.answer(request)[:RESPONSE_MAX]
        except SilenceError:
            return None
        if not answer:
            raise RefusedError(errno.EIO)
        written = answer[:room]
        request_address, request_length, response_address, _ = NSM_RAW.unpack(raw)
        returned = NSM_RAW.pack(request_address, request_length, response_address, len(written))
        return IOCTL_OUT.pack(0, 0, 0, 0) + returned + written

    def _interrupt(self, body: bytes) -> bytes | None:
        """A signal came for somebody who waits, or has just been answered."""
        unique = INTERRUPT_IN.unpack_from(body)[0] if len(body) >= INTERRUPT_IN.size else None
        if unique not in self.unanswered:
            return None
        self.unanswered.discard(unique)
        return refusal(unique, errno.EINTR)


def _pieces(raw: bytes) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where the caller has its request, and where it wants its response, as struct nsm_raw says."""
    request_address, request_length, response_address, response_length = NSM_RAW.unpack(raw)
    if request_length > REQUEST_MAX:
        raise RefusedError(errno.EMSGSIZE)
    if request_length == 0:  # the driver would queue a buffer of no size, which virtio has not
        raise RefusedError(errno.EINVAL)
    return (request_address, request_length), (response_address, min(response_length, RESPONSE_MAX))


class CuseDevice:
    """One module as a character device at `path`, mode 0666, until it is closed; for root, on a
    kernel with CUSE.

    The name of the device is the path's last part; where /dev is not the kernel's own, or the path
    is not in /dev, the node is made and removed here. Whoever waits for an answer at the end sees
    EIO. Raises SimulatorError when it cannot be started.
    """

    _dialogue_type: ClassVar[type[Dialogue]] = Dialogue

    def __init__(self, module: Module, path: Path = Path(DEVICE)) -> None:
        self.path = path
        self._dialogue = self._dialogue_type(module, _name(path))
        with contextlib.ExitStack() as cleanup:
            self._channel = cleanup.enter_context(
                _open_channel()
            )  # as long as it is open there is a device
            _register(self._channel, self._dialogue, path.name)
            stop, stopped = (cleanup.enter_context(end) for end in socket.socketpair())
            thread = threading.Thread(
                target=self._serve, args=(stopped,), name="nitrosim-cuse", daemon=True
            )
            thread.start()
            cleanup.callback(thread.join)
            cleanup.callback(stop.shutdown, socket.SHUT_RDWR)
            cleanup.enter_context(_node(path))
            self._cleanup = cleanup.pop_all()

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """The variables of a process that is to find this module: what it has, since the device is
        there for all.
        """
        return dict(base)

    def close(self) -> None:
        """Take the device away; a second call does nothing."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, stopped: socket.socket) -> None:
        """One thread for all: the kernel's driver handles one request at a time as well."""
        with self._channel, selectors.DefaultSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ)
            selector.register(stopped, selectors.EVENT_READ)
            try:
                while all(key.fileobj is not stopped for key, _ in selector.select()):
                    if not _exchange(self._channel, self._dialogue):
                        return
            finally:  # also when the module itself broke
                for message in self._dialogue.hang_up():
                    _send(self._channel, message)


def _name(path: Path) -> str:
    """The name of a device, which the kernel takes from a line NAME=VALUE, without the blanks
    around it.
    """
    name = path.name
    if not (
        path.is_absolute() and name.isascii() and name.isprintable() and name == name.strip()
    ) or (
        not 0 < len(name) <= _NAME_MAX
        or name == ".."
        or "!" in name  # "!" stands for a slash there
    ):
        raise SimulatorError(f"no path of a device: {path}, expected one such as {DEVICE}")
    if path.exists() or path.is_symlink():
        raise SimulatorError(
            f"{path} is there already: this machine has one, or another simulator does"
        )
    return name


def _open_channel() -> io.FileIO:
    try:
        return io.FileIO(os.open(CHANNEL, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK), "r+")
    except PermissionError as error:
        raise SimulatorError(f"only root may open {CHANNEL} and make a device") from error
    except OSError as error:  # ENOENT, or a node that the module does not stand behind
        raise SimulatorError(
            f"this kernel offers no device in user space, {CHANNEL}: {error.strerror}; try: "
            "modprobe cuse"
        ) from error


def _register(channel: io.FileIO, dialogue: Dialogue, name: str) -> None:
    """Answer the first message, with which the kernel asks for the name; it hangs up when it wants
    none of that.
    """
    select.select([channel], [], [], _PATIENCE)
    asked, accepted = _exchange(channel, dialogue), _exchange(channel, dialogue)
    if not (asked and accepted):
        raise SimulatorError(
            f"the kernel refuses a device called {name}: is there another one of that name?"
        )


def _exchange(channel: io.FileIO, dialogue: Dialogue) -> bool:
    """Answer one message, if there is any; False when the kernel has hung up."""
    try:
        data = channel.read(_MESSAGE_MAX)
    except OSError as error:
        return error.errno == errno.ENOENT  # whoever asked is gone again
    answer = dialogue.receive(data) if data else None
    if answer is not None:
        _send(channel, answer)
    return data != b""


def _send(channel: io.FileIO, message: bytes) -> None:
    """Send a reply; none for a request that was given up meanwhile (ENOENT)."""
    with contextlib.suppress(OSError):
        channel.write(message)


@contextlib.contextmanager
def _node(path: Path) -> Iterator[None]:
    """The node of the device, for everyone; the kernel has made it where /dev is a devtmpfs."""
    with contextlib.ExitStack() as cleanup:
        try:
            device = _numbers(path.name)
            if not path.exists():
                os.mknod(path, stat.S_IFCHR | 0o666, device)
                cleanup.callback(path.unlink, missing_ok=True)
            if path.stat().st_rdev != device:
                raise SimulatorError(f"{path} is the node of another device")
            path.chmod(0o666)  # whatever the umask, and as the driver's
        except OSError as error:
            raise SimulatorError(f"cannot make {path}: {error}") from error
        yield


def _numbers(name: str) -> int:
    """Major and minor number of the device, as sysfs has them: "MAJOR:MINOR" and a line's end."""
    major, _, minor = (_CLASS / name / "dev").read_text(encoding="ascii").partition(":")
    return os.makedev(int(major), int(minor))
