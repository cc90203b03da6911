"""What somebody at a terminal sees while a command takes long, and nobody else does."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final

import pytest

from attestor_io import progress
from attestor_io.progress import Progress

if TYPE_CHECKING:
    from tests.conftest import Enclave

LARGE: Final = bytes(9 << 20)
CLEARED: Final = "\r\x1b[K"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error is one, and time passes quickly."""
    terminal = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=terminal))
    monkeypatch.setattr(progress, "_PAUSE", 0.0)
    monkeypatch.delenv("TERM", raising=False)
    return terminal


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1 KiB"), (5 << 20, "5 MiB")]
)
def test_the_count_fits_small_secrets_and_large_ones(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, count: int, shown: str
) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    with Progress("written", total=3) as line:
        line.add(count)
        line.count()
    assert f"\rattestor: 1 of 3, {shown} written\x1b[K" in terminal.getvalue()
    assert terminal.getvalue().endswith(CLEARED)


@pytest.mark.parametrize(
    ("total", "count", "is_shown"), [(9, 100, False), (10, 100, True), (1, 8 << 20, True)]
)
def test_what_is_short_is_not_shown(
    terminal: Terminal, total: int, count: int, is_shown: bool
) -> None:
    with Progress("written", total) as line:
        line.add(count)
    assert bool(terminal.getvalue()) == is_shown


def test_what_takes_long_is_shown_however_small(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Progress("decrypted")
    line.add(1)
    assert terminal.getvalue() == ""
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    line.add(1)
    assert "attestor: 2 bytes decrypted" in terminal.getvalue()


def test_a_terminal_that_cannot_clear_a_line(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with Progress("written", total=100) as line:
        line.count()
    assert terminal.getvalue() == ""


def test_without_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=None))
    with Progress("written", total=100) as line:
        line.count()


def seen(enclave: Enclave, *arguments: str) -> str:
    """What a command shows on a terminal."""
    leader, follower = os.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        try:
            while chunk := os.read(leader, 1 << 16):
                chunks.append(chunk)
        except OSError:  # the other end is closed: EIO
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        subprocess.run(
            [sys.executable, "-m", "attestor", *arguments],
            cwd=enclave.folder,
            env=enclave.environment | {"TERM": "xterm"},
            stderr=follower,
            check=True,
        )
    finally:
        os.close(follower)
        reader.join()
        os.close(leader)
    return b"".join(chunks).decode()


def test_a_long_encrypt_and_a_long_decrypt(enclave: Enclave) -> None:
    pytest.importorskip("aws_encryption_sdk")
    enclave.place(LARGE, "plain")
    key = enclave.world.kms.key_arn
    shown = seen(enclave, "encrypt", "--key-id", key, "plain", "blob")
    assert "MiB encrypted" in shown
    assert shown.endswith(CLEARED)
    shown = seen(enclave, "decrypt", "--key-id", key, "blob", "out")
    assert "MiB decrypted" in shown
    assert shown.endswith(CLEARED)
    assert (enclave.folder / "out").read_bytes() == LARGE
    run = enclave.attestor("decrypt", "--key-id", key, "-f", "blob", "out")
    assert (run.status, run.out, run.err) == (0, b"", "")
