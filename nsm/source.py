"""Where attestation documents come from here, and what to say where none can be had.

An enclave has /dev/nsm, an EC2 instance with a NitroTPM has a TPM. Which is used is decided before
either is opened: an error of one is never a reason to take the other.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from nsm.module import NsmError, SetupError, Source, Transport

if TYPE_CHECKING:
    from collections.abc import Mapping

TITLES: Final[Mapping[Source, str]] = {
    "enclave": "Nitro Secure Module",
    "nitrotpm": "NitroTPM",
}
"""What it is that gets documents, in messages."""

SOURCES: Final = ("auto", "nsm", "nitrotpm")
_NSM_DEVICE: Final = "/dev/nsm"
_TPM_DEVICE: Final = "/dev/tpmrm0"


class SourceError(SetupError):
    """The environment names no source that there is, or two that contradict each other."""

    subject = "source of attestation documents"


def find_transport() -> Transport:
    """The NSM's library or device, or the NitroTPM, as NSM_SOURCE and the device nodes say.

    Raises SetupError or NsmError.
    """
    source, tpm = chosen(os.environ)
    if source == "nitrotpm":
        return _nitrotpm(tpm)
    return _nitrotpm_instead_of_nsm() if _is_instance(source) else _nsm()


def title() -> str:
    """What it is that gets documents here, by what the environment asks for and what is there."""
    return TITLES[_kind()]


def place() -> str:
    """What this machine is, in messages: "enclave" or "instance"."""
    return "enclave" if _kind() == "enclave" else "instance"


def _kind() -> Source:
    source, _ = chosen(os.environ)
    return "nitrotpm" if source == "nitrotpm" or _is_instance(source) else "enclave"


def _is_instance(source: str) -> bool:
    """Whether the source is to be found out, and there is a TPM and no NSM."""
    return source == "auto" and not os.path.exists(_NSM_DEVICE) and os.path.exists(_TPM_DEVICE)


def chosen(environment: Mapping[str, str]) -> tuple[str, str | None]:
    """What NSM_SOURCE, NSM_TPM and NSM_LIBRARY ask for: one of SOURCES, and a TPM's device.

    A device or a library decides for its kind. Raises SourceError.
    """
    source = environment.get("NSM_SOURCE") or "auto"
    tpm, library = environment.get("NSM_TPM") or None, environment.get("NSM_LIBRARY")
    if source not in SOURCES:
        raise SourceError(f"{source[:20]!r} is none of {', '.join(SOURCES)}")
    if tpm and (source == "nsm" or library):
        other = "NSM_LIBRARY is" if library else "the source nsm is"
        raise SourceError(f"{other} asked for, and the TPM {tpm}")
    if library and source == "nitrotpm":
        raise SourceError("NSM_LIBRARY is asked for, and the source nitrotpm")
    if source == "auto":
        source = "nitrotpm" if tpm else "nsm" if library else source
    return source, tpm


def _nsm() -> Transport:
    """The library that NSM_LIBRARY names, else one that is found, else the bare device."""
    from nsm import library

    path = os.environ.get("NSM_LIBRARY") or library.find_library()
    if path:
        return library.Library(path)
    from nsm.device import Device

    return Device()


def _nitrotpm(path: str | None) -> Transport:
    from nsm.tpm import NitroTpm
    from nsm.tpm2 import DeviceNode

    return NitroTpm(DeviceNode(path)) if path else NitroTpm.on_this_machine()


def _nitrotpm_instead_of_nsm() -> Transport:
    """The TPM of a machine without /dev/nsm, which may be any machine's: say both."""
    try:
        return _nitrotpm(None)
    except NsmError as error:
        if error.operation != "open":
            raise
        said = str(error).rpartition("): ")[2]
        if error.errno == errno.ENODEV:
            detail = f"{_NSM_DEVICE}; and {said}"
            raise NsmError("open", errno=errno.ENOENT, detail=detail) from error
        detail = f"{said}, tried because there is no {_NSM_DEVICE}"
        raise type(error)("open", errno=error.errno, detail=detail) from error


# ---- what to say

_NOT_PERMITTED: Final = "the device is there: this user or a sandbox lacks permission to use it"
_OPEN_HINTS: Final = {  # what open(2) can say although the device is there
    errno.EACCES: _NOT_PERMITTED,
    errno.EPERM: _NOT_PERMITTED,
    errno.EBUSY: "the device is there: another process holds it",
}
_NOWHERE: Final = {
    "Nitro Secure Module": (
        "this does not look like a Nitro Enclave: only there is the module's device"
    ),
    "NitroTPM": "an EC2 instance has one if its image was registered with TPM support v2.0",
}


def explain(error: NsmError) -> tuple[str, tuple[str, ...]]:
    """What an error of the module means, as a sentence, and hints."""
    if error.operation != "open":
        return f"the {error.module} refused: {error}", error.hints
    hint = _OPEN_HINTS.get(error.errno or 0)
    if hint is None:
        return f"no {error.module}: {error}", (_NOWHERE[error.module],)
    return f"{error.module} not opened: {error}", (hint,)
