"""Which way to the module: the library that is named, one that is found, or the device alone."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Final

import pytest

from nsm.library import IN_PACKAGE
from tests.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Enclave

NEEDS_LIBRARY: Final = pytest.mark.skipif(
    not IN_PACKAGE.exists(), reason="nsm/libnsm.so is not built: make libnsm"
)


def without_library(enclave: Enclave, folder: Path) -> dict[str, str | None]:
    """An environment in which attestor runs from a copy without nsm/libnsm.so."""
    shutil.copy(ROOT / "attestor.py", folder)
    shutil.copytree(
        ROOT / "nsm", folder / "nsm", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return {"PYTHONPATH": str(folder)}


@NEEDS_LIBRARY
def test_the_library_of_the_package_is_used(enclave: Enclave) -> None:
    enclave.place(enclave.encrypt())
    run = enclave.decrypt("-v")
    assert f"attestor: note: Nitro Secure Module through {IN_PACKAGE} (ABI 1)\n" in run.err


def test_with_no_library_the_device_is_used(
    enclave: Enclave, tmp_path_factory: pytest.TempPathFactory
) -> None:
    enclave.place(enclave.encrypt())
    run = enclave.decrypt(
        "-v", environment=without_library(enclave, tmp_path_factory.mktemp("copy"))
    )
    assert run.status == 0, run.err
    assert "attestor: note: Nitro Secure Module through /dev/nsm\n" in run.err
    assert (enclave.folder / "out").read_bytes() == b"the secret"


def test_a_found_library_without_our_functions_is_passed_over_and_told(
    enclave: Enclave, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("copy")
    environment = without_library(enclave, folder)
    (folder / "nsm" / "libnsm.so").write_text("no library")
    enclave.place(enclave.encrypt())
    run = enclave.decrypt("-v", environment=environment)
    assert run.status == 0, run.err
    assert "note: passed over" in run.err
    assert "not a shared library" in run.err
    assert "through /dev/nsm\n" in run.err


@NEEDS_LIBRARY
@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_named_library_is_used(enclave: Enclave, how: str) -> None:
    shutil.copy(IN_PACKAGE, enclave.folder / "mine.so")
    enclave.place(enclave.encrypt())
    named = ["--nsm-library", "./mine.so"] if how == "option" else []
    run = enclave.decrypt("-v", *named, environment={} if named else {"NSM_LIBRARY": "./mine.so"})
    assert run.status == 0, run.err
    assert "through ./mine.so (ABI 1)\n" in run.err


@pytest.mark.parametrize("how", ["option", "environment"])
@pytest.mark.parametrize(
    ("content", "part"), [(b"text", "not a shared library"), (None, "not found")]
)
def test_a_named_library_must_work(
    enclave: Enclave, how: str, content: bytes | None, part: str
) -> None:
    if content is not None:
        enclave.place(content, "bad.so")
    enclave.place(enclave.encrypt())
    named = ["--nsm-library", "./bad.so"] if how == "option" else []
    run = enclave.decrypt(*named, environment={} if named else {"NSM_LIBRARY": "./bad.so"})
    assert run.status == 2
    assert "./bad.so" in run.error
    assert part in run.error
    assert "out" not in enclave.files()


@NEEDS_LIBRARY
def test_outside_an_enclave_both_ways_say_the_same(
    enclave: Enclave, tmp_path_factory: pytest.TempPathFactory
) -> None:
    enclave.place(b"\0" * 200)
    nowhere: dict[str, str | None] = {"LD_PRELOAD": None}
    direct = enclave.decrypt(
        environment=without_library(enclave, tmp_path_factory.mktemp("copy")) | nowhere
    )
    library = enclave.decrypt(environment=nowhere)
    assert direct == library
    assert direct.status == 3
