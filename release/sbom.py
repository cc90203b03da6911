"""Bills of materials in CycloneDX 1.6: of a release, of a wheel's library, of the enclave image.

    python -m release.sbom library            what is linked into nsm/libnsm.so
    python -m release.sbom release            that, and the locked packages of `decrypt`
    python -m release.sbom image ROOT.tar     everything in a root that enclave/build-image made

Written to standard output, the same bytes each time: the serial number is made from the contents,
the time is SOURCE_DATE_EPOCH. The model, its JSON and the schema that it is validated by are those
of cyclonedx-python-lib.
"""

from __future__ import annotations

import os
import re
import sys
import tarfile
import tomllib
import uuid
from datetime import UTC, datetime
from email.parser import HeaderParser
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parent.parent
NAME: Final = "nitro-attestor"
CRATE: Final = "aws-nitro-enclaves-nsm-api"
_CARGO_LOCK: Final = ROOT / "patches" / "libnsm" / "Cargo.lock"
_PYTHON_LOCK: Final = ROOT / "requirements" / "run.txt"
_DEBIAN: Final = "etc/attestor/debian-packages"


def version() -> str:
    """The version that attestor.py gives itself, without an import of it."""
    text = (ROOT / "attestor.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return str(found)


def library() -> Bom:
    """The crates that are compiled into libnsm.so."""
    subject = _component("libnsm", version(), "generic")
    return _bom(subject, crates(_CARGO_LOCK.read_text(encoding="utf-8")))


def release() -> Bom:
    """The crates, and the packages of Python in the lock that `decrypt` is tested with."""
    text = _PYTHON_LOCK.read_text(encoding="utf-8")
    parts = [*crates(_CARGO_LOCK.read_text(encoding="utf-8")), *locked(text)]
    return _bom(_component(NAME, version(), "pypi"), parts)


def image(archive: tarfile.TarFile) -> Bom:
    """Debian's packages, Python's and the crates, by what the image says of itself."""
    parts = [*debian(_read(archive, _DEBIAN)), *installed(archive)]
    parts += crates(_CARGO_LOCK.read_text(encoding="utf-8"))
    kind = ComponentType.CONTAINER
    return _bom(_component("attestor-enclave", version(), "oci", kind=kind), parts)


def crates(lock: str) -> list[Component]:
    """AWS's crate and whatever it depends on, by Cargo.lock; what only our tests need is not."""
    by_name = {package["name"]: package for package in tomllib.loads(lock)["package"]}
    found: dict[str, Component] = {}
    ahead = [CRATE]
    while ahead:
        # "name", or "name version" where the lock has several
        package = by_name[ahead.pop().partition(" ")[0]]
        if package["name"] not in found:
            found[package["name"]] = _component(
                package["name"], package["version"], "cargo", digest=package["checksum"]
            )
            ahead += package.get("dependencies", [])
    return list(found.values())


def locked(lock: str) -> list[Component]:
    """The packages of a lock that pip reads, those for other platforms too."""
    entries = re.findall(r"^([\w.-]+)==([\w.+-]+)", lock, re.MULTILINE)
    return [_component(name, number, "pypi") for name, number in entries]


def debian(lines: str) -> list[Component]:
    """Packages of Debian, a line each: name, version, architecture."""
    return [
        _component(name, number, "deb", namespace="debian", qualifiers={"arch": architecture})
        for name, number, architecture in (line.split() for line in lines.splitlines())
    ]


def installed(archive: tarfile.TarFile) -> Iterator[Component]:
    """The distributions of Python in a root, by their METADATA."""
    for member in archive.getmembers():
        if re.search(r"\.dist-info/METADATA$", member.name):
            headers = HeaderParser().parsestr(_read(archive, member.name))
            yield _component(headers["Name"], headers["Version"], "pypi")


def _component(
    name: str,
    number: str,
    ecosystem: str,
    *,
    digest: str | None = None,
    kind: ComponentType = ComponentType.LIBRARY,
    namespace: str | None = None,
    qualifiers: dict[str, str] | None = None,
) -> Component:
    """One component, named by its package URL, by which scanners know it; a digest is SHA-256's."""
    url = PackageURL(ecosystem, namespace, name, number, qualifiers)
    hashes = [HashType(alg=HashAlgorithm.SHA_256, content=digest)] if digest else []
    return Component(
        type=kind, name=name, version=number, purl=url, bom_ref=url.to_string(), hashes=hashes
    )


def _bom(subject: Component, parts: list[Component]) -> Bom:
    names = "\n".join(sorted(str(part.purl) for part in [subject, *parts]))
    bom = Bom(components=parts, serial_number=uuid.uuid5(uuid.NAMESPACE_URL, names))
    bom.metadata.component = subject
    bom.metadata.timestamp = datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), UTC)
    bom.register_dependency(subject, parts)
    return bom


def _read(archive: tarfile.TarFile, name: str) -> str:
    """A text file of a root, whose names may begin with "./"."""
    for spelled in (name, f"./{name}"):
        try:
            file = archive.extractfile(spelled)
        except KeyError:
            continue
        if file is not None:
            return file.read().decode()
    raise ValueError(f"the root has no {name}")


def main() -> None:
    """Write the bill of materials that the command line names."""
    match sys.argv[1:]:
        case ["library"]:
            bom = library()
        case ["release"]:
            bom = release()
        case ["image", root]:
            with tarfile.open(root) as archive:
                bom = image(archive)
        case _:
            sys.exit(__doc__)
    text = JsonV1Dot6(bom).output_as_string(indent=2)
    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if wrong is not None:
        sys.exit(f"sbom: error: this is no CycloneDX: {wrong}")
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    main()
