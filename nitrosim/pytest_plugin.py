"""pytest fixtures: an enclave and its KMS for the tests of any program; installed with the package.

Nothing starts before a test asks for it. All tests of a session share one world, and each gets it
fresh in its environment.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from nitrosim import missing_package

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nitrosim.module import SoftwareNsm
    from nitrosim.world import World


@pytest.fixture(scope="session")
def nitrosim_world() -> Iterator[World]:
    """The simulated enclave and KMS, with keys and certificates of their own; see
    `nitrosim.world.World`.
    """
    try:
        from nitrosim.world import World
    except ImportError as error:
        raise pytest.fail.Exception(missing_package(error), pytrace=False) from None
    with World() as world:
        yield world


@pytest.fixture
def nitrosim_environment(nitrosim_world: World) -> dict[str, str]:
    """The environment for a subprocess that is to run inside the enclave."""
    return nitrosim_world.environment(os.environ)


@pytest.fixture
def nitrosim_nsm(nitrosim_world: World, monkeypatch: pytest.MonkeyPatch) -> SoftwareNsm:
    """The software Nitro Secure Module, which `nsm.Nsm()` reaches in this process, too, while the
    test runs.
    """
    import attestor
    import nsm
    from nsm.device import Device

    module = nitrosim_world.module

    class InProcess(Device):
        """The device's requests and answers, without a device."""

        def __init__(self) -> None:
            self.name = "nitrosim"

        def _exchange(self, operation: str, request: bytes) -> bytes:  # noqa: ARG002 - an error would name it
            return module.answer(request)

        def close(self) -> None:
            """There is nothing to give back."""

    monkeypatch.setattr(nsm, "_find_transport", InProcess)
    attestor.forget_recipient()  # it may be of an enclave before this one
    return module


@pytest.fixture
def nitrosim_kms(
    nitrosim_environment: dict[str, str],
    nitrosim_nsm: SoftwareNsm,  # noqa: ARG001 - what makes attested clients work in this process
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """An operator's plain boto3 client of the KMS, with a key behind alias/nitrosim.

    While the test runs the process's environment is that of the enclave: `boto3.client("kms")` is
    the same KMS, and `attestor.attested` of it works.
    """
    import boto3

    for name in set(os.environ) - set(nitrosim_environment):
        monkeypatch.delenv(name)
    for name, value in nitrosim_environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    return boto3.session.Session().client("kms")
