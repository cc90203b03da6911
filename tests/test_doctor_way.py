"""doctor goes the way of decrypt: whatever is wrong, alone or with something else, it ends as
decrypt does.
"""

from __future__ import annotations

import itertools
import json
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import botocore
import pytest

from nitrosim import kms_faults
from nitrosim.world import World
from tests.conftest import ROOT, Enclave
from tests.forked import ForkServer

if TYPE_CHECKING:
    from collections.abc import Iterator

DAY: Final = 86400
OTHER_ROOTS: Final = str(Path(botocore.__file__).with_name("cacert.pem"))


@dataclass(frozen=True)
class Fault:
    """Something that is wrong, at one stage of the way, and how to bring it about."""

    stage: str
    environment: dict[str, str | None] = field(default_factory=dict)
    region_option: str | None = None
    metadata_tells: bool = False
    vsock: bool = False
    port: str = "kms"
    module: str | None = None
    kms: str | None = None
    blob: str = "blob"


NO_REGION: Final[dict[str, str | None]] = {"AWS_REGION": None, "AWS_DEFAULT_REGION": None}
NO_KEYS: Final[dict[str, str | None]] = dict.fromkeys(
    ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
)
FAULTS: Final = {
    "nothing": Fault("none"),
    "no region": Fault("region", NO_REGION),
    "bad region": Fault("region", {"AWS_REGION": "eu_west"}),
    "bad --region": Fault("region", region_option="nowhere"),
    "empty --region": Fault("region", region_option=""),
    "empty region": Fault("region", {"AWS_REGION": ""}),  # the other variable tells
    "empty regions": Fault("region", {"AWS_REGION": "", "AWS_DEFAULT_REGION": ""}),
    "region of the metadata service": Fault("region", NO_REGION, metadata_tells=True),
    "missing ciphertext": Fault("ciphertext", blob="nowhere"),
    "empty ciphertext": Fault("ciphertext", blob="empty"),
    "no module": Fault("module", {"NITROSIM_NSM_SOCKET": None}),
    "unreadable module": Fault("module", {"NSM_OPEN_ERRNO": "13"}),
    "refusing module": Fault("module", module="nsm-internal-error"),
    "babbling module": Fault("module", module="nsm-garbage"),
    "no library": Fault("module", {"NSM_LIBRARY": "/nowhere/libnsm.so"}),
    "bad profile": Fault("credentials", {"AWS_PROFILE": "nobody"}),
    "no credentials": Fault("credentials", NO_KEYS),
    "half the credentials": Fault("credentials", {"AWS_SECRET_ACCESS_KEY": None}),
    "expired credentials": Fault(
        "credentials", {"AWS_CREDENTIAL_EXPIRATION": "2020-01-01T00:00:00Z"}
    ),
    "insecure endpoint": Fault("client", {"AWS_ENDPOINT_URL": "http://localhost"}, port="none"),
    "vsock": Fault("way", vsock=True),
    "unreachable": Fault("network", port="closed"),
    "unreachable over vsock": Fault("network", port="closed", vsock=True),
    "unknown name": Fault("network", {"AWS_ENDPOINT_URL_KMS": "https://kms.invalid"}, port="none"),
    "hanging": Fault("network", port="silent"),
    "hanging over vsock": Fault("network", port="silent", vsock=True),
    "wrong TLS": Fault("tls", {"AWS_CA_BUNDLE": OTHER_ROOTS}),
    "no CA bundle": Fault("tls", {"AWS_CA_BUNDLE": "/nowhere.pem"}),
    "clock 200 s behind": Fault("clock", {"CLOCK_AHEAD": "-200"}),
    "clock 400 s behind": Fault("clock", {"CLOCK_AHEAD": "-400"}),
    "clock a day behind": Fault("clock", {"CLOCK_AHEAD": f"-{DAY}"}),
    "clock a day ahead": Fault("clock", {"CLOCK_AHEAD": f"{DAY}"}),
    "clock of 1970": Fault("clock", {"CLOCK_AHEAD": f"{-20000 * DAY}"}),
    "wrong credentials": Fault("signature", {"AWS_SECRET_ACCESS_KEY": "wrong"}),
    "expired token": Fault("signature", kms="expired-token"),
    "bad document": Fault("document", module="bad-signature"),
    "damaged ciphertext": Fault("decision", blob="damaged"),
    "throttling": Fault("decision", kms="throttling"),
    "throttling once": Fault("decision", {"AWS_MAX_ATTEMPTS": "2"}, kms="throttle-once"),
    "denying": Fault("decision", kms="access-denied"),
    "failing": Fault("decision", kms="internal"),
}
# One for each stage, or two where they differ in kind: every pair of these is tried
REPRESENTATIVES: Final = (
    "no region", "region of the metadata service", "missing ciphertext", "refusing module",
    "bad profile", "vsock", "unreachable", "wrong TLS", "clock 400 s behind", "clock a day ahead",
    "wrong credentials", "bad document", "denying", "damaged ciphertext",
)  # fmt: skip
PAIRS: Final = [
    pair
    for pair in itertools.combinations(REPRESENTATIVES, 2)
    if FAULTS[pair[0]].stage != FAULTS[pair[1]].stage
]


class Place:
    """One simulated enclave, in which each fault can be brought about and is gone afterwards."""

    def __init__(self, enclave: Enclave, server: ForkServer, ports: dict[str, int]) -> None:
        self._enclave, self._server, self._ports = enclave, server, ports

    def both(self, *names: str, key: bool = False) -> tuple[int, int, dict[str, dict[str, str]]]:
        """The statuses of decrypt and of doctor, and doctor's checks by name.

        With `key` doctor is told the key, and not the ciphertext.
        """
        faults = [FAULTS[name] for name in names]
        environment: dict[str, str | None] = {"AWS_MAX_ATTEMPTS": "1"}
        for fault in faults:
            environment |= fault.environment
        blob = next((fault.blob for fault in faults if fault.blob != "blob"), "blob")
        options = [*self._options(faults, environment)]
        kms, module = self._enclave.world.kms, self._enclave.world.module
        before = kms._fault, module._fault
        try:
            for fault in faults:
                kms._fault = kms_faults.BY_NAME[fault.kms] if fault.kms else kms._fault
                module._fault = fault.module or module._fault
            pinned = ["--key-id", kms.key_arn.rpartition("/")[2]] if key else []
            chosen = [*(pinned or ["--any-key"]), "-f", *options]
            decrypt = self._run("decrypt", *chosen, blob, "out", environment=environment)
            asked = pinned or [blob]
            doctor = self._run("doctor", "--json", *options, *asked, environment=environment)
        finally:
            kms._fault, module._fault = before
        assert doctor[2] == "", doctor
        shown = json.loads(doctor[1])
        assert shown["status"] == doctor[0]
        return decrypt[0], doctor[0], {check["check"]: check for check in shown["checks"]}

    def _run(self, *arguments: str, environment: dict[str, str | None]) -> tuple[int, bytes, str]:
        self._enclave.world.kms._faulted = itertools.count()  # a fault that happens once may again
        run = self._server.attestor(*arguments, environment=environment)
        return run.status, run.out, run.err

    def _options(self, faults: list[Fault], environment: dict[str, str | None]) -> Iterator[str]:
        port = self._ports[next((one.port for one in faults if one.port != "kms"), "kms")]
        if any(fault.vsock for fault in faults):
            yield from ("--vsock", f"3:{port}")
        elif port:
            environment["AWS_ENDPOINT_URL_KMS"] = f"https://localhost:{port}"
        elif "AWS_ENDPOINT_URL_KMS" not in environment:
            environment["AWS_ENDPOINT_URL_KMS"] = None
        if any(fault.port == "silent" for fault in faults):
            yield from ("--timeout", "3")
        for fault in faults:
            if fault.region_option is not None:
                yield from ("--region", fault.region_option)
            if fault.metadata_tells:
                yield from ("--imds-vsock", f"3:{self._ports['metadata']}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, preload: Path) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    with World(tags={}) as world, socket.socket() as closed, socket.socket() as silent:
        for bound in (closed, silent):
            bound.bind(("127.0.0.1", 0))
        silent.listen()
        enclave = Enclave(world, folder)
        blob = enclave.encrypt()
        enclave.place(blob)
        enclave.place(blob[:-1] + bytes((blob[-1] ^ 1,)), "damaged")
        enclave.place(b"", "empty")
        environment = enclave.environment | {
            "LD_PRELOAD": f"{preload}:{enclave.environment['LD_PRELOAD']}",
            "AWS_EC2_METADATA_DISABLED": "true",  # a service that does not answer is waited for
        }
        ports = {
            "kms": world.port,
            "closed": closed.getsockname()[1],
            "silent": silent.getsockname()[1],
            "metadata": int((world.metadata_url or "").rpartition(":")[2]),
            "none": 0,
        }
        inside = environment | {"PYTHONPATH": str(ROOT)}
        with ForkServer(inside, folder, vsock_to_tcp=True) as server:
            yield Place(enclave, server, ports)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault(place: Place, name: str) -> None:
    decrypt, doctor, checks = place.both(name)
    assert decrypt == doctor != 1, checks
    failed = [check for check in checks.values() if check["outcome"] == "failed"]
    assert bool(failed) == bool(doctor)
    # and without the ciphertext, where KMS has been reached
    if FAULTS[name].stage in {"none", "clock", "signature", "document", "decision"} and (
        FAULTS[name].blob == "blob"
    ):
        decrypt, doctor, checks = place.both(name, key=True)
        assert decrypt == doctor != 1, checks


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_two_faults(place: Place, pair: tuple[str, str]) -> None:
    decrypt, doctor, checks = place.both(*pair)
    assert decrypt == doctor != 1, checks
