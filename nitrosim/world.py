"""An enclave and its KMS around one command: the simulated device and endpoint, and the environment
that names them.

with World(pcrs={0: pcr0}) as world:
    subprocess.run(command, env=world.environment(os.environ))
"""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from nitrosim import kms, metadata, module, objects, server, tpm
from nitrosim.device import SimulatedDevice, SimulatedTpm, open_folder
from nitrosim.pki import NsmPki
from nitrosim.stored_values import StoredValues

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path
    from typing import Self

    from nitrosim.cuse import CuseDevice
    from nitrosim.parent import Parent

FAULTS: Final[Mapping[str, str]] = {
    **module.FAULTS,
    **tpm.FAULTS,
    **kms.FAULTS,
    **server.FAULTS,
}
"""Everything that can be made to go wrong, with what it does: in NSM, TPM, KMS and TLS."""

# Whatever of the host could lead a command out of this world: AWS_* all of it, and these
_LEFT_BEHIND: Final = tuple(
    """
    NSM_LIBRARY NSM_SOURCE NSM_TPM NITROSIM_NSM_SOCKET NITROSIM_TPM_SOCKET SSL_CERT_DIR
    SSLKEYLOGFILE
    """.split()
)
_PROXIES: Final = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_METADATA: Final = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
# Names nothing (RFC 2606), so that nobody asks the service of the host; and says what would help
_NO_METADATA: Final = "http://only-with-tag.nitrosim.invalid"
_CA_VARIABLES: Final = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")


class World:
    """A software NSM, an attested KMS and a private CA, all new; a context manager that starts and
    stops them.

    `faults` are names of FAULTS, at most one of each layer. `pcrs` and `debug` change the enclave,
    never what the policy of alias/nitrosim asks for; `key_policy` replaces that policy.
    `clock_skew` is how many seconds the clock of KMS is ahead. `device` is the path of a real
    device in the place of the shim, for root where the kernel has CUSE. `tags` are those of the
    instance; None leaves them disabled. With `vsock` the services of the parent are on its vsock
    ports; status lines that come there go into `status_lines`, and to `on_status`.

    With `nitrotpm` the command is in an EC2 instance in the place of an enclave: it has a TPM with
    `tpm_pcrs` and no NSM, and the policy of alias/nitrosim asks for PCR4 and PCR12 of the built-in
    image.

    The metadata service runs when one of these three asks for it. Raises ValueError for what cannot
    be, and `nitrosim.device.SimulatorError` when this machine lacks something.
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
        device: Path | None = None,
        tags: Mapping[str, str] | None = None,
        vsock: bool = False,
        nitrotpm: bool = False,
        tpm_pcrs: Mapping[int, bytes] | None = None,
        on_status: Callable[[str], object] | None = None,
    ) -> None:
        chosen = _by_layer(faults)
        _check_kind(
            nitrotpm=nitrotpm,
            of_enclave={"pcr": pcrs, "debug-mode": debug, "vsock": vsock},
            of_nitrotpm={"tpm-pcr": tpm_pcrs},
        )
        module_id = tpm.DEFAULT_MODULE_ID if nitrotpm else module.DEFAULT_MODULE_ID
        pki = NsmPki.generate(now=datetime.now(UTC), region=kms.REGION, module_id=module_id)
        self.kms = kms.AttestedKms(
            nsm_root_sha256=pki.root_sha256,
            nitrotpm_pcrs={index: tpm.DEFAULT_PCRS[index] for index in (4, 12)}
            if nitrotpm
            else None,
            principal=principal,
            account=principal.split(":")[4]
            if principal and principal.count(":") > 4
            else kms.ACCOUNT,
            key_policy=key_policy,
            envelope=envelope,
            fault=chosen.get("kms"),
            clock=lambda: datetime.now(UTC) + timedelta(seconds=clock_skew),
        )
        role = {3: module.extended(module.ZERO_PCR, kms.role_of(self.kms.principal).encode())}
        fault = chosen.get("nsm")
        self.module = module.SoftwareNsm(
            pki, pcrs={**role, **(pcrs or {})}, debug=debug, fault=None if nitrotpm else fault
        )
        self.tpm = tpm.SoftwareTpm(pki, pcrs=tpm_pcrs, fault=fault) if nitrotpm else None
        self.store = _beside(self.kms, clock_skew)
        self.status_lines: list[str] = []
        self.device = device
        self._vsock = vsock
        self._on_status = on_status
        self._instance = _instance(self.kms, tags)
        self._server = server.HttpsServer(
            self.store, region=kms.REGION, fault=chosen.get("tls"), port=port
        )
        wanted = vsock or device is not None or tags is not None
        self._metadata = server.HttpServer(self._instance) if wanted else None
        self._root_der = pki.root_der

    @property
    def url(self) -> str:
        """The endpoint of KMS and of what is beside it: /BUCKET/KEY of S3, stored values."""
        return self._server.url

    @property
    def port(self) -> int:
        """The TCP port of all of them."""
        return self._server.port

    @property
    def connections(self) -> int:
        """How many TLS connections were opened so far."""
        return self._server.connections

    @property
    def metadata_url(self) -> str | None:
        """The endpoint of the metadata service, if it runs."""
        return self._metadata.url if self._metadata else None

    def set_tag(self, key: str, value: str) -> None:
        """Tag the instance anew; raises ValueError for a tag that cannot be in the metadata."""
        self._instance.set_tag(key, value)

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """The variables of a command in this world: nothing of the host's AWS set-up or proxies is
        left in them.
        """
        kept = {name: value for name, value in base.items() if not name.startswith("AWS_")}
        kept = {
            name: value
            for name, value in kept.items()
            if name.upper() not in (*_PROXIES, *_LEFT_BEHIND)
        }
        ca = str(self.folder / "ca.pem")
        return self._device.environment(
            kept
            | {name: ca for name in _CA_VARIABLES if name in base}
            | {
                "AWS_REGION": kms.REGION,
                "AWS_DEFAULT_REGION": kms.REGION,
                "AWS_ENDPOINT_URL_KMS": self.url,
                "AWS_ENDPOINT_URL_SECRETS_MANAGER": self.url,
                "AWS_ENDPOINT_URL_SSM": self.url,
                # a number: buckets stay in the path
                "AWS_ENDPOINT_URL_S3": f"https://127.0.0.1:{self._server.port}",
                "AWS_CA_BUNDLE": ca,
                "SSL_CERT_FILE": ca,  # of servers that are not AWS's
                "AWS_ACCESS_KEY_ID": self.kms.credentials.access_key,
                "AWS_SECRET_ACCESS_KEY": self.kms.credentials.secret_key,
                "AWS_SESSION_TOKEN": self.kms.credentials.token,
                "AWS_CONFIG_FILE": str(self.folder / "no-config"),
                "AWS_SHARED_CREDENTIALS_FILE": str(self.folder / "no-credentials"),
                "NITROSIM_NSM_ROOT": str(self.folder / "nsm-root.der"),
            }
            | (
                {_METADATA: self._metadata.url}
                if self._metadata
                else {"AWS_EC2_METADATA_DISABLED": "true", _METADATA: _NO_METADATA}
            )
        )

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as parts:
            self.folder = parts.enter_context(open_folder())
            for name, data in (("ca.pem", self._server.ca_pem), ("nsm-root.der", self._root_der)):
                (self.folder / name).write_bytes(data)
                (self.folder / name).chmod(0o644)  # whatever the umask: other users verify, too
            parts.enter_context(self._server)
            if self._metadata:
                parts.enter_context(self._metadata)
            self._device = self._new_device()
            parts.enter_context(self._device)
            if self._metadata and self._vsock:
                parts.enter_context(self._parent(self._metadata.port))
            self._parts = parts.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.close()

    def _new_device(self) -> SimulatedDevice | CuseDevice:
        if self.tpm is not None:
            return self._new_tpm(self.tpm)
        if self.device is None:
            return SimulatedDevice(self.module, folder=self.folder)
        from nitrosim.cuse import CuseDevice

        return CuseDevice(self.module, self.device)

    def _new_tpm(self, software: tpm.SoftwareTpm) -> SimulatedDevice | CuseDevice:
        if self.device is None:
            return SimulatedTpm(software, folder=self.folder)
        from nitrosim.cuse_tpm import CuseTpm

        return CuseTpm(software, self.device)

    def _parent(self, metadata_port: int) -> Parent:
        from nitrosim.parent import Parent, Ports, listeners

        return Parent(
            listeners(Ports(), kms=self.port, metadata=metadata_port, tell=self._take_status)
        )

    def _take_status(self, line: str) -> None:
        self.status_lines.append(line)
        if self._on_status:
            self._on_status(line)


def _beside(attested: kms.AttestedKms, clock_skew: float) -> objects.ObjectStore:
    """KMS, and in front of it what else is at its endpoint."""
    values = StoredValues(
        attested,
        region=kms.REGION,
        account=kms.ACCOUNT,
        credentials=attested.credentials,
        clock=lambda: datetime.now(UTC) + timedelta(seconds=clock_skew),
    )
    return objects.ObjectStore(values)


def _instance(
    attested: kms.AttestedKms, tags: Mapping[str, str] | None
) -> metadata.MetadataService:
    """The metadata of the enclave's instance, with the role that it calls KMS with."""
    return metadata.MetadataService(
        instance_id=module.instance_of(module.DEFAULT_MODULE_ID),
        region=kms.REGION,
        role=kms.role_of(attested.principal).rpartition("/")[2],
        credentials=attested.credentials,
        tags=tags,
    )


def _check_kind(
    *, nitrotpm: bool, of_enclave: Mapping[str, object], of_nitrotpm: Mapping[str, object]
) -> None:
    """Refuse what the other kind of machine has."""
    for wrong, options, what in (
        (nitrotpm, of_enclave, "is of an enclave, and this is an instance with a NitroTPM"),
        (not nitrotpm, of_nitrotpm, "needs --nitrotpm"),
    ):
        given = [name for name, value in options.items() if value]
        if wrong and given:
            raise ValueError(f"--{given[0]} {what}")


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


_LAYERS: Final = {"nsm": {**module.FAULTS, **tpm.FAULTS}, "kms": kms.FAULTS, "tls": server.FAULTS}
