"""A clock that is wrong, as an enclave's may be when it has just started: named, and no attack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Enclave

DAY: Final = 86400


@pytest.fixture
def with_clock(enclave: Enclave, preload: Path) -> Callable[[int], dict[str, str | None]]:
    """The environment of a process whose clock is so many seconds ahead."""
    libraries = f"{preload}:{enclave.environment['LD_PRELOAD']}"
    return lambda ahead: {"LD_PRELOAD": libraries, "CLOCK_AHEAD": str(ahead)}


@pytest.mark.parametrize("ahead", [-20000 * DAY, -9000 * DAY, -900, 900, 9000 * DAY])
def test_it_is_named_and_worth_another_try(
    enclave: Enclave, with_clock: Callable[[int], dict[str, str | None]], ahead: int
) -> None:
    """By the certificate, which is not valid at that time, or by the signature, which bears it."""
    enclave.place(enclave.encrypt())
    run = enclave.decrypt(environment=with_clock(ahead))
    assert run.status == 5, run.err
    side = "behind" if ahead < 0 else "ahead of"
    assert f"s {side} the Nitro Secure Module's" in run.error
    assert "middle" not in run.err
    assert "Warning" not in run.err
    assert enclave.files() == {"blob"}


@pytest.mark.parametrize("ahead", [-120, 0, 120])
def test_a_small_error_is_none(
    enclave: Enclave, with_clock: Callable[[int], dict[str, str | None]], ahead: int
) -> None:
    enclave.place(enclave.encrypt())
    assert enclave.decrypt(environment=with_clock(ahead)).status == 0


def test_a_clock_that_is_right_excuses_no_certificate(enclaves: Callable[..., Enclave]) -> None:
    enclave = enclaves()
    enclave.place(enclave.encrypt())
    run = enclave.decrypt(environment={"AWS_CA_BUNDLE": "/etc/ssl/certs/ca-certificates.crt"})
    assert run.status == 6
    assert "somebody may be in the middle" in run.err
