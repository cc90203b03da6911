"""What in the environment could run other code, or tell others: not in the command."""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING

import pytest

from tests.conftest import Run

if TYPE_CHECKING:
    from tests.conftest import Enclave

DONE = Run(0, b"", "")
EVIL = "open('evil-was-here', 'w').close()\ndef initialize_client_plugin(client):\n    pass\n"


def manifest(enclave: Enclave) -> str:
    """One that decrypts the blob in the folder."""
    text = (
        f'key_id = "{enclave.world.kms.key_arn}"\n[[secret]]\nunbound = true\n'
        f'source = "{enclave.folder}/blob"\ntarget = "{enclave.folder}/target"\n'
    )
    return enclave.place(text.encode(), "m.toml")


def test_no_plugin_of_the_sdk_is_run(enclave: Enclave) -> None:
    enclave.place(EVIL.encode(), "evil.py")
    enclave.place(enclave.encrypt())
    path = f"{enclave.folder}:{enclave.environment['PYTHONPATH']}"
    plugin: dict[str, str | None] = {
        "PYTHONPATH": path,
        "BOTOCORE_EXPERIMENTAL__PLUGINS": "it=evil",
    }
    key = ["--key-id", enclave.world.kms.key_arn]
    for command in (
        ["decrypt", *key, "blob", "out"],
        ["encrypt", *key, "out", "again"],
        ["generate-random", "16", "random"],
        ["doctor", *key],
    ):
        run = enclave.attestor(*command, environment=plugin)
        assert run.status == 0, run.err
    program = [
        sys.executable,
        "-c",
        "import os; print(os.environ['BOTOCORE_EXPERIMENTAL__PLUGINS'])",
    ]
    run = enclave.attestor("inject", manifest(enclave), "--", *program, environment=plugin)
    assert run == Run(0, b"it=evil\n", "")  # the program's environment is its own
    assert "evil-was-here" not in enclave.files()
    client = (
        "import botocore.session\n"
        "botocore.session.Session().create_client('kms', region_name='eu-west-1')"
    )
    assert enclave.run(sys.executable, "-c", client, environment=plugin) == DONE
    assert "evil-was-here" in enclave.files()  # as it would be


@pytest.mark.parametrize("where", ["environment", "profile"])
def test_nothing_is_reported_to_a_monitor(enclave: Enclave, where: str) -> None:
    """It would be told access key id and session token with each call."""
    enclave.place(enclave.encrypt())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as monitor:
        monitor.bind(("127.0.0.1", 0))
        port = str(monitor.getsockname()[1])
        settings: dict[str, str | None] = {
            "AWS_CSM_ENABLED": "true", "AWS_CSM_HOST": "127.0.0.1", "AWS_CSM_PORT": port
        }  # fmt: skip
        if where == "profile":
            lines = f"[default]\ncsm_enabled = true\ncsm_host = 127.0.0.1\ncsm_port = {port}\n"
            settings = {"AWS_CONFIG_FILE": str(enclave.folder / enclave.place(lines.encode(), "c"))}
        assert enclave.decrypt(environment=settings) == DONE
        assert enclave.attestor("inject", manifest(enclave), environment=settings) == DONE
        monitor.setblocking(False)
        with pytest.raises(BlockingIOError):
            monitor.recv(1 << 16)


def test_isolated_mode_does_not_import_from_the_working_folder(enclave: Enclave) -> None:
    """Of the two ways to name the module, documents recommend the second."""
    enclave.place(b"open('evil-was-here', 'w').close()\nraise SystemExit(9)\n", "click.py")
    assert enclave.attestor("--version", whole_process=True).status == 9
    (enclave.folder / "evil-was-here").unlink()
    run = enclave.run(sys.executable, "-Im", "attestor", "--version")
    assert (run.status, run.err) == (0, "")
    assert "evil-was-here" not in enclave.files()
