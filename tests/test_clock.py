"""A clock that is wrong, as an enclave's may be when it has just started: named, and no attack."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Enclave

SHIM: Final = r"""
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/time.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static long ahead(void) { return atol(getenv("CLOCK_AHEAD")); }
int clock_gettime(clockid_t id, struct timespec *now) {
    int failed = (int) syscall(SYS_clock_gettime, id, now);
    if (!failed && id == CLOCK_REALTIME) now->tv_sec += ahead();
    return failed;
}
time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into) *into = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *restrict into, void *restrict zone) {
    struct timespec now;
    (void) zone;
    clock_gettime(CLOCK_REALTIME, &now);
    into->tv_sec = now.tv_sec;
    into->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""
DAY: Final = 86400


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that sets the clock of one process."""
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(SHIM, encoding="utf-8")
    compiler = os.environ.get("CC", "cc").split()
    library = folder / "clock.so"
    command = [*compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(folder / "clock.c")]
    subprocess.run(command, check=True)
    return library


@pytest.fixture
def with_clock(enclave: Enclave, shim: Path) -> Callable[[int], dict[str, str | None]]:
    """The environment of a process whose clock is so many seconds ahead."""
    preload = f"{shim}:{enclave.environment['LD_PRELOAD']}"
    return lambda ahead: {"LD_PRELOAD": preload, "CLOCK_AHEAD": str(ahead)}


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
