"""An enclave and its KMS around one command: the simulated device and endpoint, and the environment that names them.

with World(pcrs={0: pcr0}) as world:
    subprocess.run(command, env=world.environment(os.environ))
"""

from __future__ import annotations

import contextlib
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nitrosim import kms, module, objects, server
from nitrosim.device import SimulatedDevice
from nitrosim.pki import NsmPki

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import TracebackType
    from typing import Self

FAULTS: Final[Mapping[str, str]] = {**module.FAULTS, **kms.FAULTS, **server.FAULTS}
"""Everything that can be made to go wrong, with what it does: in the NSM, in KMS and in TLS."""

# Whatever of the host could lead a command out of this world: AWS_* all of it, and these
_LEFT_BEHIND: Final = ("NSM_LIBRARY", "SSL_CERT_DIR", "SSLKEYLOGFILE")
_PROXIES: Final = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_CA_VARIABLES: Final = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")


class World:
    """A software NSM, an attested KMS and a private CA, all new; a context manager that starts and stops them.

    `faults` are names of FAULTS, at most one of each layer. `pcrs` and `debug` change the enclave, never what the
    policy of alias/nitrosim asks for; `key_policy` replaces that policy. `clock_skew` is how many seconds the clock of
    KMS is ahead. Raises ValueError for what cannot be, and `nitrosim.device.SimulatorError` when this machine lacks
    something.
    """

    def __init__(
        self,
        *,
        pcrs: Mapping[int, bytes] | None = None,
        debug: bool = False,
        key_policy: str | None = None,
        principal: str | None = None,
        envelope: str = "kms",
        faults: Iterable[str] = (),
        clock_skew: float = 0,
        port: int = 0,
    ) -> None:
        chosen = _by_layer(faults)
        pki = NsmPki.generate(now=datetime.now(UTC), region=kms.REGION, module_id=module.DEFAULT_MODULE_ID)
        self.kms = kms.AttestedKms(
            nsm_root_sha256=pki.root_sha256,
            principal=principal,
            account=principal.split(":")[4] if principal and principal.count(":") > 4 else kms.ACCOUNT,
            key_policy=key_policy,
            envelope=envelope,
            fault=chosen.get("kms"),
            clock=lambda: datetime.now(UTC) + timedelta(seconds=clock_skew),
        )
        role = {3: module.extended(module.ZERO_PCR, kms.role_of(self.kms.principal).encode())}
        self.module = module.SoftwareNsm(pki, pcrs={**role, **(pcrs or {})}, debug=debug, fault=chosen.get("nsm"))
        self.store = objects.ObjectStore(self.kms)
        self._server = server.HttpsServer(self.store, region=kms.REGION, fault=chosen.get("tls"), port=port)
        self._root_der = pki.root_der

    @property
    def url(self) -> str:
        """The endpoint of KMS; beside it, /BUCKET/KEY of S3."""
        return self._server.url

    @property
    def port(self) -> int:
        """The TCP port of both."""
        return self._server.port

    @property
    def connections(self) -> int:
        """How many TLS connections were opened so far."""
        return self._server.connections

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """The variables of a command in this world: nothing of the host's AWS set-up or proxies is left in them."""
        kept = {name: value for name, value in base.items() if not name.startswith("AWS_")}
        kept = {name: value for name, value in kept.items() if name.upper() not in (*_PROXIES, *_LEFT_BEHIND)}
        ca = str(self.folder / "ca.pem")
        return self._device.environment(
            kept
            | {name: ca for name in _CA_VARIABLES if name in base}
            | {
                "AWS_REGION": kms.REGION,
                "AWS_DEFAULT_REGION": kms.REGION,
                "AWS_ENDPOINT_URL_KMS": self.url,
                "AWS_ENDPOINT_URL_S3": f"https://127.0.0.1:{self._server.port}",  # a number: buckets stay in the path
                "AWS_CA_BUNDLE": ca,
                "AWS_ACCESS_KEY_ID": self.kms.credentials.access_key,
                "AWS_SECRET_ACCESS_KEY": self.kms.credentials.secret_key,
                "AWS_SESSION_TOKEN": self.kms.credentials.token,
                "AWS_CONFIG_FILE": str(self.folder / "no-config"),
                "AWS_SHARED_CREDENTIALS_FILE": str(self.folder / "no-credentials"),
                "AWS_EC2_METADATA_DISABLED": "true",
                "NITROSIM_NSM_ROOT": str(self.folder / "nsm-root.der"),
            }
        )

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as parts:
            self.folder = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="nitrosim-")))
            (self.folder / "ca.pem").write_bytes(self._server.ca_pem)
            (self.folder / "nsm-root.der").write_bytes(self._root_der)
            self._device = parts.enter_context(SimulatedDevice(self.module))
            parts.enter_context(self._server)
            self._parts = parts.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._parts.close()


def _by_layer(faults: Iterable[str]) -> dict[str, str]:
    """The faults, each with the layer it belongs to."""
    chosen: dict[str, str] = {}
    for fault in faults:
        layers = [name for name, known in _LAYERS.items() if fault in known]
        if not layers:
            raise ValueError(f"no fault is called {fault}")
        if layers[0] in chosen:
            raise ValueError(f"faults {chosen[layers[0]]} and {fault} are of one layer: choose one")
        chosen[layers[0]] = fault
    return chosen


_LAYERS: Final = {"nsm": module.FAULTS, "kms": kms.FAULTS, "tls": server.FAULTS}
