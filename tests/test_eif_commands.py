"""`attestor eif`, and every option that takes an enclave image file: judged by AWS's own crate."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_der_public_key,
)

import attestor
from attestor_eif import Header, Image, Kind, read
from keypolicy import pcr_of_certificate
from tests.conftest import ROOT
from tests.eif_images import (
    CRC,
    PARTS,
    assembled,
    certificate_of,
    changed,
    loaded,
    signed,
    signer,
)
from tests.test_evidence import command, refused, report
from tests.test_policy_commands import ADMIN, PEOPLE, ROLE, images, render

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Enclave, Run

Json = dict[str, Any]
CURVES: Final = (None, "P-256", "P-384", "P-521")
PLAIN: Final = assembled(PARTS)
UNMEASURED: Final = "not measured, so that whoever carries the file can change it"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an image, and what another could be made of."""
    monkeypatch.chdir(tmp_path)
    files = {"app.eif": PLAIN, "signed.eif": signed(PLAIN, signer())}
    files |= {"cert.pem": signer().pem, "key.pem": signer().key_pem}
    files |= {"kernel": b"kernel" * 100, "init": b"first" * 50, "root": b"second" * 70}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def done(run: Run) -> Json:
    """What a command printed as JSON, with nothing on stderr."""
    assert (run.status, run.err) == (0, "")
    shown: Json = json.loads(run.out)
    return shown


def described(path: str | Path) -> Json:
    return done(command("eif", "describe", "--json", str(path)))


BUILD: Final = ("eif", "build", "--kernel", "kernel", "--cmdline", "reboot=k panic=30")
BUILD_ALL: Final = (*BUILD, "--ramdisk", "init", "--ramdisk", "root")
SIGN: Final = ("eif", "sign", "--key", "key.pem", "--certificate", "cert.pem")


# ---- AWS's own tools


@pytest.fixture(scope="session")
def tools() -> Path:
    """The folder of eif_build and eif_judge."""
    script = ROOT / "tests" / "eif_judge" / "build"
    if shutil.which("cargo") is None:
        pytest.skip("AWS's eif_build is built with cargo, which is not installed")
    built = subprocess.run([script], capture_output=True, check=False, text=True)
    if built.returncode:
        pytest.skip(f"AWS's eif_build cannot be built: {built.stderr.strip()[-300:]}")
    return Path(os.environ.get("EIF_JUDGE_CACHE") or ROOT / ".cache" / "eif_judge") / "bin"


def judged(tools: Path, path: str | Path) -> Json:
    """What AWS's crate reads in a file, which it verifies if it is signed."""
    ran = subprocess.run([tools / "eif_judge", path], capture_output=True, check=False, text=True)
    assert ran.returncode == 0, ran.stderr
    shown: Json = json.loads(ran.stdout)
    return shown


@pytest.mark.parametrize("number", range(20))
def test_aws_builds_and_reads_the_same(tools: Path, folder: Path, number: int) -> None:
    """Generated inputs: ramdisks, command line, architecture and signature vary."""
    chance = random.Random(number)  # noqa: S311 - the same inputs each time
    for name in ("kernel", *"12345"):
        (folder / name).write_bytes(chance.randbytes(chance.choice([0, 1, 999, 300_001])))
    arch, curve = ("x86_64", "aarch64")[number % 2], CURVES[number // 5]
    command_line = chance.choice(["", "reboot=k", "é=\t" * 20])
    inputs = ["--kernel", "kernel", f"--cmdline={command_line}", "--arch", arch]
    for name in "12345"[: 1 + number % 5]:
        inputs += ["--ramdisk", name]
    custom = chance.choice(
        [None, {}, {"b": 'é"\\', "a": [None, True, -1, 1.5, {"z": 1, "y": "\x1f"}]}]
    )
    if custom is not None:
        (folder / "custom").write_text(json.dumps(custom))
        inputs += ["--metadata", "custom"]
    name = chance.choice(["app", 'é"\n\x7f\u2028'])  # eif_build takes the name for the version, too
    inputs += ["--name", name, "--version", name]
    measured = done(command("eif", "build", *inputs, "ours.eif"))["Measurements"]
    same = {"build-tool": "attestor", "build-tool-version": attestor.__version__}
    same |= {"build-time": "Unknown", "img-os": "Unknown", "img-kernel": "Unknown"}
    theirs = [part for option, value in same.items() for part in (f"--{option}", value)]
    shown = eif_build(tools, *inputs, *theirs, "--output", "theirs.eif")
    assert shown == measured
    assert Path("ours.eif").read_bytes() == Path("theirs.eif").read_bytes()
    if curve is not None:
        Path("key.pem").write_bytes(signer(curve).key_pem)
        Path("cert.pem").write_bytes(signer(curve).pem)
        keys = ["--private-key", "key.pem", "--signing-certificate", "cert.pem"]
        shown = eif_build(tools, *inputs, *theirs, *keys, "--output", "theirs.eif")
        assert done(command(*SIGN, "ours.eif")) == {"Measurements": shown}
        ours, other = Path("ours.eif").read_bytes(), Path("theirs.eif").read_bytes()
        end = loaded(ours).sections[-1].offset  # a signature is random, and so is its length
        assert ours[CRC.stop : end] == other[CRC.stop : end]
    for path in ("ours.eif", "theirs.eif"):
        assert described(path) == judged(tools, path)


def eif_build(tools: Path, *options: str) -> Json:
    """Run AWS's builder; the measurements that it prints behind a line of its own."""
    ran = subprocess.run(
        [tools / "eif_build", *options], capture_output=True, check=False, text=True
    )
    assert ran.returncode == 0, ran.stderr
    shown: Json = json.loads(ran.stdout.partition("\n")[2])
    return shown


def test_aws_reads_an_image_that_was_signed_anew(tools: Path, folder: Path) -> None:
    Path("key.pem").write_bytes(signer("P-521").key_pem)
    Path("cert.pem").write_bytes(signer("P-521").pem)
    done(command(*SIGN, "signed.eif"))
    assert described("signed.eif") == judged(tools, "signed.eif")


# ---- describe


def test_describe_prints_what_nitro_cli_does(folder: Path) -> None:
    shown = described("signed.eif")
    assert (
        list(shown)
        == (
            "EifVersion Measurements IsSigned SigningCertificate CheckCRC SignatureCheck ImageName "
            "ImageVersion Metadata"
        ).split()
    )
    assert list(shown["Measurements"]) == "HashAlgorithm PCR0 PCR1 PCR2 PCR8".split()
    assert shown["Metadata"]["team"] == "ours"
    plain = described("app.eif")
    assert (plain["IsSigned"], "SignatureCheck" in plain, "PCR8" in plain["Measurements"]) == (
        False,
        False,
        False,
    )


def test_describe_for_people(folder: Path) -> None:
    text = report(command("eif", "describe", "signed.eif"))
    assert "x86_64, version 4 of the format, CRC " in text
    assert "command line    reboot=k panic=30\n" in text
    assert "asks for        1024 MiB and 2 CPUs by default\n" in text
    assert "  PCR8   signing certificate\n" in text
    assert "signature       covers PCR0, by the key of this certificate (secp384r1)\n" in text
    assert text.count(UNMEASURED) == 1
    plain = report(command("eif", "describe", "app.eif"))
    assert "signature       none\n" in plain
    bare = assembled(
        [part for part in PARTS if part[0] is not Kind.METADATA], Header((), arm64=True)
    )
    (folder / "app.eif").write_bytes(bare)
    plain = report(command("eif", "describe", "app.eif"))
    assert "aarch64" in plain
    assert plain.endswith("metadata        none\n")


def test_describe_of_several_names_them(folder: Path) -> None:
    lone = {name: report(command("eif", "describe", name)) for name in ("app.eif", "signed.eif")}
    text = report(command("eif", "describe", *lone))
    parts = [f"file            {name}\n{shown}" for name, shown in lone.items()]
    assert text == "\n".join(parts)
    shown = command("eif", "describe", "--json", *lone).out
    assert shown == b"".join(command("eif", "describe", "--json", name).out for name in lone)
    (folder / "bad.eif").write_bytes(PLAIN[:-1])
    run = command("eif", "describe", "app.eif", "bad.eif")
    refused(run, 6, "bad.eif refused: it ends after ")
    assert run.out == b""


def test_describe_from_standard_input_and_of_what_is_not_there(enclave: Enclave) -> None:
    run = enclave.attestor("eif", "describe", "--json", "-", stdin=PLAIN)
    assert json.loads(run.out)["Measurements"]["PCR0"] == loaded(PLAIN).pcrs[0].hex()
    refused(enclave.attestor("eif", "describe", "-", stdin=b""), 2, "standard input does not begin")
    refused(
        enclave.attestor("eif", "describe", "nothing"), 2, "nothing cannot be read: No such file"
    )
    refused(enclave.attestor("eif", "describe", "."), 2, ". cannot be read: Is a directory")


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (b"MZ" + bytes(1000), 2, "bad.eif does not begin with '.eif', as an EIF does"),
        (PLAIN[:-1], 6, "bad.eif refused: it ends after "),
        (PLAIN[:-1] + b"?", 6, "bad.eif refused: CRC is "),
        (signed(PLAIN, signer())[:-1] + b"?", 6, "signature does not cover what was measured, eit"),
        (changed(signed(PLAIN, signer()), 600, b"?"), 6, "refused: signature covers another image"),
        (
            signed(PLAIN, signer("P-256", -2, -1)),
            6,
            "attestor: hint: nitro-cli starts no image who",
        ),
    ],
    ids=["no image", "cut short", "damaged", "damaged, signed", "replaced", "expired"],
)
def test_describe_refuses(folder: Path, data: bytes, status: int, message: str) -> None:
    (folder / "bad.eif").write_bytes(data)
    refused(command("eif", "describe", "bad.eif"), status, message)


def test_names_in_an_image_cannot_steer_a_terminal(folder: Path) -> None:
    parts = [(kind, b"\x1b[2J\xff" if kind is Kind.COMMAND_LINE else data) for kind, data in PARTS]
    (folder / "app.eif").write_bytes(assembled(parts))
    run = command("eif", "describe", "app.eif")
    assert (run.status, run.err) == (0, "")
    assert b"\x1b" not in run.out


@pytest.mark.parametrize("size", [1 << 20, 1 << 30], ids=["1 MiB", "1 GiB"])
def test_memory_does_not_grow_with_the_image(folder: Path, size: int) -> None:
    path = folder / "large.eif"
    sparse(path, size)
    # a small process between, since the kernel counts a parent's memory as the least of a child's
    program = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    measure = [sys.executable, "-c", program, sys.executable, "-m", "attestor", "eif", "describe"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.check_output([*measure, str(path)], env=environment)
    assert int(shown) < 60 << 10  # KiB


class Zeros:
    """So many zeros as contents, of which a file system stores none."""

    def __init__(self, size: int) -> None:
        self.size = size

    def blocks(self) -> Iterator[bytes]:
        yield from (bytes(1 << 20) for _ in range(self.size >> 20))


def sparse(path: Path, size: int) -> None:
    """Write an image whose ramdisk of zeros, its last section, has this size."""
    from attestor_eif import InMemory, Plan

    sections = [(kind, InMemory(data)) for kind, data in PARTS[:3]]
    with path.open("wb") as file:
        for block in Plan(Header(()), [*sections, (Kind.RAMDISK, Zeros(size))]).blocks():
            if block.strip(b"\0"):
                file.write(block)
            else:
                file.seek(len(block), os.SEEK_CUR)
        file.truncate(file.tell())


# ---- build


def test_the_same_inputs_give_the_same_bytes(folder: Path) -> None:
    first = done(command(*BUILD_ALL, "first.eif"))
    assert done(command(*BUILD_ALL, "second.eif")) == first
    assert Path("first.eif").read_bytes() == Path("second.eif").read_bytes()
    assert stat.S_IMODE(Path("first.eif").stat().st_mode) == 0o600
    assert first["Measurements"] == described("first.eif")["Measurements"]
    assert described("first.eif")["ImageName"] == "kernel"


def test_what_is_said_of_the_image(folder: Path) -> None:
    said = ["--name", "app", "--version", "2", "--build-time", "now", "--os", "Linux"]
    done(command(*BUILD_ALL, *said, "--kernel-version", "6.12", "--arch", "aarch64", "a.eif"))
    with Path("a.eif").open("rb", buffering=0) as file:
        image: Image = read(file)
    assert image.header.arm64
    assert image.metadata is not None
    assert (image.metadata.name, image.metadata.version) == ("app", "2")
    build = image.metadata.build
    assert (build["BuildTool"], build["BuildToolVersion"]) == ("attestor", attestor.__version__)
    assert (build["BuildTime"], build["OperatingSystem"], build["KernelVersion"]) == (
        "now",
        "Linux",
        "6.12",
    )


def test_a_command_line_from_a_file(folder: Path) -> None:
    (folder / "cmdline").write_text("reboot=k panic=30\n")
    first = done(command(*BUILD_ALL, "first.eif"))
    options = ["--kernel", "kernel", "--ramdisk", "init", "--ramdisk", "root"]
    assert done(command("eif", "build", *options, "--cmdline", "@cmdline", "second.eif")) == first


def test_an_existing_file_is_not_replaced_but_with_force(folder: Path) -> None:
    before = Path("app.eif").read_bytes()
    refused(command(*BUILD_ALL, "app.eif"), 7, "app.eif exists", "--force replaces it")
    assert Path("app.eif").read_bytes() == before
    done(command(*BUILD_ALL, "--force", "app.eif"))
    assert Path("app.eif").read_bytes() != before


@pytest.mark.parametrize(
    ("options", "status", "part"),
    [
        (["--ramdisk", "nothing", "x.eif"], 2, "nothing cannot be read: No such file"),
        (["--ramdisk", ".", "x.eif"], 2, ". cannot be read: Is a directory"),
        (["--ramdisk", "fifo", "x.eif"], 2, "fifo is read twice, so that it must be a file"),
        (["--ramdisk", "init", "-"], 2, "an EIF is read again before it counts: name a file"),
        (["--ramdisk", "init", "no/x.eif"], 7, "no/x.eif cannot be written: there is no folder no"),
        (["x.eif"], 2, "missing option '--ramdisk'"),
        (["--ramdisk", "init"] * 30 + ["x.eif"], 2, "an EIF has at most 32 sections, and not 33"),
        (["--ramdisk", "init", "--cmdline", "@nul", "x.eif"], 2, "--cmdline holds a byte of zeros"),
        (["--ramdisk", "init", "--cmdline", "@nothing", "x.eif"], 2, "nothing cannot be read"),
        (["--ramdisk", "init", "--metadata", "init", "x.eif"], 2, "init: metadata is not a JSON"),
        (["--ramdisk", "init", "--metadata", "list", "x.eif"], 2, "list is not a JSON object"),
        (["--ramdisk", "init", "--metadata", "large", "x.eif"], 2, "large is longer than 4096 by"),
        (["--ramdisk", "init", "--arch", "arm64", "x.eif"], 2, "'arm64' is not one of"),
    ],
)
def test_a_build_that_cannot_be(folder: Path, options: list[str], status: int, part: str) -> None:
    os.mkfifo("fifo")
    Path("nul").write_bytes(b"a\0b")
    Path("list").write_text("[]")
    Path("large").write_text(json.dumps({"a": "b" * 4096}))
    before = set(os.listdir())
    refused(command(*BUILD, *options), status, part)
    assert set(os.listdir()) == before


def test_a_file_that_changes_while_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the CRC and the copy, as a build beside it could: what was written is read again."""
    from attestor_eif import writing

    genuine = writing.FileRange.blocks
    looked: list[int] = []

    def blocks(self: Any) -> Iterator[bytes]:
        looked.append(self.descriptor)
        if len(looked) == 4:  # kernel and two ramdisks once, and the kernel again
            Path("kernel").write_bytes(b"another" + bytes(593))
        yield from genuine(self)

    monkeypatch.setattr(writing.FileRange, "blocks", blocks)
    before = set(os.listdir())
    refused(command(*BUILD_ALL, "x.eif"), 7, "x.eif cannot be written: read again, CRC is ")
    assert set(os.listdir()) == before


def test_measurements_that_cannot_be_printed_take_the_file_back(enclave: Enclave) -> None:
    for name, data in (("kernel", b"k"), ("init", b"i"), ("signed.eif", signed(PLAIN, signer()))):
        enclave.place(data, name)
    enclave.place(signer("P-256").pem, "cert.pem")
    enclave.place(signer("P-256").key_pem, "key.pem")
    before = enclave.files()
    attestor_ = f"{sys.executable} -m attestor"
    run = enclave.run(
        "sh", "-c", f'{attestor_} "$@" > /dev/full', "sh", *BUILD, "--ramdisk", "init", "x"
    )
    assert (run.status, enclave.files()) == (7, before), run.err
    run = enclave.run("sh", "-c", f'{attestor_} "$@" > /dev/full', "sh", *SIGN, "signed.eif")
    assert (run.status, enclave.files()) == (7, before), run.err
    assert (enclave.folder / "signed.eif").read_bytes() == signed_bytes(enclave)


def signed_bytes(enclave: Enclave) -> bytes:
    return (enclave.folder / "signed.eif").read_bytes()


# ---- sign


@pytest.mark.parametrize("curve", ["P-256", "P-384", "P-521"])
@pytest.mark.parametrize("name", ["app.eif", "signed.eif"])
def test_an_image_is_signed_in_its_place(folder: Path, name: str, curve: str) -> None:
    Path("key.pem").write_bytes(signer(curve).key_pem)
    Path("cert.pem").write_bytes(signer(curve).pem)
    Path(name).chmod(0o644)
    before = described(name)["Measurements"]
    shown = done(command(*SIGN, name))["Measurements"]
    assert shown == {**before, "PCR8": pcr_of_certificate(signer(curve).certificate.der).hex()}
    assert described(name)["Measurements"] == shown
    assert stat.S_IMODE(Path(name).stat().st_mode) == 0o644


def test_a_signature_that_has_expired_is_replaced_and_a_link_is_followed(folder: Path) -> None:
    Path("old.eif").write_bytes(signed(PLAIN, signer("P-256", -2, -1)))
    Path("link.eif").symlink_to("old.eif")
    done(command(*SIGN, "link.eif"))
    assert Path("link.eif").is_symlink()
    assert described("old.eif")["IsSigned"] is True


def test_keys_as_openssl_writes_them(folder: Path) -> None:
    """With the parameters before the key, and as PKCS #8; the certificate in DER, too."""
    key = signer().key
    parameters = b"-----BEGIN EC PARAMETERS-----\nBgUrgQQAIg==\n-----END EC PARAMETERS-----\n"
    from cryptography.hazmat.primitives.serialization import NoEncryption

    old = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    Path("key.pem").write_bytes(parameters + old)
    Path("cert.pem").write_bytes(signer().certificate.der)
    assert (
        done(command(*SIGN, "app.eif"))["Measurements"] == described("signed.eif")["Measurements"]
    )


def spoil_key(data: bytes) -> Callable[[Path], None]:
    return lambda folder: _ignore((folder / "key.pem").write_bytes(data))


def spoil_certificate(data: bytes) -> Callable[[Path], None]:
    return lambda folder: _ignore((folder / "cert.pem").write_bytes(data))


def spoil_image(data: bytes) -> Callable[[Path], None]:
    return lambda folder: _ignore((folder / "app.eif").write_bytes(data))


def _ignore(_: object) -> None:
    pass


LOCKED: Final = signer().key.private_bytes(
    Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
)


@pytest.mark.parametrize(
    ("spoil", "status", "part"),
    [
        (spoil_key(b"key"), 2, "key.pem holds no private key in PEM without a password"),
        (spoil_key(LOCKED), 2, "key.pem holds no private key in PEM without a password"),
        (spoil_key(signer("P-256").key_pem), 2, "key.pem does not sign for cert.pem: what the key"),
        (spoil_key(signer("P-384", -2).key_pem), 2, "key is not that of the signing certificate"),
        (spoil_certificate(b"cert"), 2, "cert.pem: no certificate in PEM or DER"),
        (spoil_certificate(signer("P-384", 1, 2).pem), 2, "cert.pem: signing certificate is valid"),
        (
            spoil_certificate(signer().pem + signer().key_pem),
            2,
            "not PEM of certificates and nothi",
        ),
        (spoil_image(b"x"), 2, "app.eif does not begin with '.eif'"),
        (spoil_image(PLAIN[:-1]), 6, "app.eif refused: it ends after"),
        (spoil_image(PLAIN[:-1] + b"?"), 6, "app.eif refused: CRC is"),
    ],
)
def test_what_cannot_be_signed_stays_as_it_was(
    folder: Path, spoil: Callable[[Path], None], status: int, part: str
) -> None:
    spoil(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused(command(*SIGN, "app.eif"), status, part)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def key_in_kms(enclave: Enclave, spec: str) -> tuple[str, bytes]:
    """A signing key's ARN, and a certificate over it that another key signed."""
    made = enclave.kms.create_key(KeyUsage="SIGN_VERIFY", KeySpec=spec)["KeyMetadata"]
    public = load_der_public_key(enclave.kms.get_public_key(KeyId=made["Arn"])["PublicKey"])
    assert isinstance(public, ec.EllipticCurvePublicKey)
    return made["Arn"], certificate_of(public, signer().key)


@pytest.mark.parametrize("spec", ["ECC_NIST_P256", "ECC_NIST_P384", "ECC_NIST_P521"])
def test_a_key_in_kms_signs(enclave: Enclave, spec: str) -> None:
    arn, pem = key_in_kms(enclave, spec)
    enclave.place(pem, "cert.pem")
    enclave.place(PLAIN, "app.eif")
    sign = ["eif", "sign", "--key", arn, "--certificate", "cert.pem", "app.eif"]
    shown = done(enclave.attestor(*sign))["Measurements"]
    assert described(enclave.folder / "app.eif")["Measurements"] == shown
    assert "PCR8" in shown


def test_a_key_in_kms_that_is_another(enclave: Enclave) -> None:
    arn, _ = key_in_kms(enclave, "ECC_NIST_P384")
    enclave.place(signer().pem, "cert.pem")
    enclave.place(PLAIN, "app.eif")
    sign = ["eif", "sign", "--certificate", "cert.pem", "app.eif", "--key"]
    refused(enclave.attestor(*sign, arn), 2, "key is not that of the signing certificate")
    refused(enclave.attestor(*sign, arn[:-1] + "?"), 2, "is no key ARN, key id or alias")
    gone = f"{arn[:-4]}{'0' * 4}"
    refused(enclave.attestor(*sign, gone), 4, "KMS refused to sign: NotFoundException")
    assert (enclave.folder / "app.eif").read_bytes() == PLAIN
    assert enclave.files() == {"app.eif", "cert.pem"}


# ---- wherever measurements are taken


def test_render_takes_images(folder: Path) -> None:
    pcrs = {
        str(index): value.hex() for index, value in loaded(signed(PLAIN, signer())).pcrs.items()
    }
    assert images(render("--eif", "signed.eif")) == [pcrs]
    assert images(render("--eif", "signed.eif", "--take", "8")) == [{"8": pcrs["8"]}]
    both = render("--eif", "app.eif", "--eif", "signed.eif", "--take", "0", "--role-arn", ROLE)
    assert [list(image) for image in images(both)] == [["0", "3"]] * 2
    run = command("policy", "render", *PEOPLE, "--eif", "app.eif", "--take", "8")
    refused(run, 2, "--take 8: app.eif has no PCR8: the image is not signed")


def test_a_signing_certificate_may_be_an_images(folder: Path) -> None:
    assert render("--signing-certificate", "signed.eif") == render(
        "--signing-certificate", "cert.pem"
    )
    run = command("policy", "render", *PEOPLE, "--signing-certificate", "app.eif")
    refused(run, 2, "app.eif is not signed: it has no certificate")
    Path("bad.eif").write_bytes(changed(signed(PLAIN, signer()), 600, b"?"))
    run = command("policy", "render", *PEOPLE, "--signing-certificate", "bad.eif")
    refused(run, 6, "bad.eif refused: signature covers another image")
    Path("long").write_bytes(bytes(1 << 19))
    run = command("policy", "render", *PEOPLE, "--signing-certificate", "long")
    refused(run, 2, "long is longer than 262144 bytes")


@pytest.mark.parametrize("option", ["--measurements", "--document", "--root"])
def test_an_image_in_another_place_is_told_where_it_belongs(folder: Path, option: str) -> None:
    Path("app.eif").write_bytes(assembled([*PARTS, (Kind.RAMDISK, bytes(1 << 18))]))
    run = command("policy", "render", *PEOPLE, "--document", "app.eif", option, "app.eif")
    refused(
        run, 2, "app.eif is longer than 262144 bytes", "hint: --eif FILE takes an enclave image"
    )


def test_an_image_is_explained_and_verified(enclaves: Callable[..., Enclave], folder: Path) -> None:
    image = loaded(signed(PLAIN, signer()))
    enclave = enclaves(pcrs=dict(image.pcrs))
    policy = command("policy", "render", *PEOPLE, "--eif", "signed.eif").out
    enclave.place(policy, "policy.json")
    explain = ["policy", "explain", "policy.json", "--principal", ROLE]
    assert enclave.attestor(*explain, "--eif", "signed.eif").status == 0
    denied = assembled([*PARTS, (Kind.RAMDISK, b"more")])
    enclave.place(denied, "other.eif")
    assert enclave.attestor(*explain, "--eif", "other.eif").status == 4
    enclave.attestor("attest", "document")
    run = enclave.attestor(*explain, "--eif", "signed.eif", "--document", "document")
    refused(run, 2, "--document tells every PCR: --pcr, --measurements and --eif contradict it")
    root = enclave.environment["NITROSIM_NSM_ROOT"]
    verify = ["verify", "--root", root, "document", "--json", "--eif"]
    assert done(enclave.attestor(*verify, "signed.eif"))["expected_pcrs"] == [0, 1, 2, 8]
    refused(enclave.attestor(*verify, "other.eif"), 6, "document refused, pcrs: ")
    assert ADMIN in policy.decode()
