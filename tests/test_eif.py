"""Enclave image files, read: every byte is accounted for, and nothing foreign is raised."""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import tempfile
from typing import TYPE_CHECKING, Final

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from attestor_commands import eif_report
from attestor_eif import (
    EifError,
    Header,
    Image,
    InMemory,
    Kind,
    Metadata,
    NotAnEifError,
    Plan,
    read,
    signed_plan,
)
from attestor_eif import signature as eif_signature
from attestor_io.errors import AttestorError, InputError
from keypolicy import pcr_of_certificate
from nsm.cose import to_be_signed
from tests.eif_images import (
    HEADER_SIZE,
    NOW,
    PARTS,
    Signer,
    assembled,
    certificate_of,
    changed,
    loaded,
    signed,
    signer,
    with_crc,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Parts = list[tuple[Kind, bytes]]
OFFSETS: Final = 28  # of the table in the header
SIZES: Final = OFFSETS + 32 * 8
PLAIN: Final = assembled(PARTS)
US: Final = signer("P-256")
ANOTHER: Final = signer("P-256", -2, 2)


def pcr(*contents: bytes) -> bytes:
    return hashlib.sha384(bytes(48) + hashlib.sha384(b"".join(contents)).digest()).digest()


# ---- what is read


def test_what_an_image_measures_to() -> None:
    kernel, command_line, _, first, second = (data for _, data in PARTS)
    image = loaded(PLAIN)
    assert image.pcrs == {
        0: pcr(kernel, command_line, first, second),
        1: pcr(kernel, command_line, first),
        2: pcr(second),
    }
    assert (image.size, image.command_line) == (len(PLAIN), command_line)
    assert image.metadata == Metadata("app", "1.0", custom={"team": "ours"})


def test_a_signed_image_has_pcr8_and_the_same_others() -> None:
    image = loaded(signed(PLAIN, signer()))
    der = signer().certificate.der
    assert image.pcrs == {**loaded(PLAIN).pcrs, 8: pcr_of_certificate(der)}


def test_metadata_and_the_order_of_what_is_not_measured_change_no_pcr() -> None:
    parts = [part for part in PARTS if part[0] is not Kind.METADATA]
    without = loaded(assembled(parts))
    assert without.metadata is None
    first = loaded(assembled([(Kind.METADATA, Metadata("other", "2").to_bytes()), *parts]))
    assert without.pcrs == first.pcrs == loaded(PLAIN).pcrs


def test_a_stream_that_gives_a_byte_at_a_time() -> None:
    class Slow(io.BytesIO):
        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            return super().readinto(buffer[:1])

    assert read(Slow(PLAIN)) == read(io.BytesIO(PLAIN))


@given(
    st.binary(max_size=300),
    st.binary(max_size=40),
    st.lists(st.binary(max_size=300), min_size=1, max_size=5),
    st.booleans(),
)
def test_what_is_written_is_read_again(
    kernel: bytes, command_line: bytes, ramdisks: list[bytes], arm64: bool
) -> None:
    header = Header((), arm64=arm64, memory=7 << 30, cpus=3)
    disks = [InMemory(data) for data in ramdisks]
    metadata = Metadata("é\u0007", "1", custom={"b": [1, None], "a": "\u2028"})
    plan = Plan.of_parts(header, InMemory(kernel), command_line, disks, metadata.to_bytes())
    image = loaded(b"".join(plan.blocks()))
    assert image.command_line == command_line
    assert image.metadata == metadata
    assert (image.header.arm64, image.header.memory, image.header.cpus) == (arm64, 7 << 30, 3)
    assert image.pcrs[0] == pcr(kernel, command_line, *ramdisks)
    assert image.pcrs[1] == pcr(kernel, command_line, ramdisks[0])
    assert image.pcrs[2] == pcr(*ramdisks[1:])


# ---- what is refused


def with_table(index: int, value: int, table: int = OFFSETS) -> bytes:
    return changed(PLAIN, table + 8 * index, struct.pack(">Q", value))


def with_size(index: int, value: int) -> bytes:
    """The size of a section, by both headers."""
    at = loaded(PLAIN).sections[index].offset
    data = with_table(index, value, SIZES)
    return changed(data, at + 4, struct.pack(">Q", value))


def moved(kind: Kind, index: int) -> bytes:
    parts = [part for part in PARTS if part[0] is not kind]
    (mine,) = [part for part in PARTS if part[0] is kind]
    return assembled([*parts[:index], mine, *parts[index:]])


def without(kind: Kind) -> bytes:
    return assembled([part for part in PARTS if part[0] is not kind])


KERNEL_AT: Final = HEADER_SIZE
SPOILT: Final[dict[str, tuple[bytes, int, str]]] = {
    "nothing": (b"", 2, "does not begin with '.eif'"),
    "something else": (b"\x7fELF" + bytes(1000), 2, "does not begin with '.eif'"),
    "the magic alone": (b".eif", 6, "it ends after 4 of the 548 bytes of its header"),
    "a header cut short": (PLAIN[: HEADER_SIZE - 1], 6, "it ends after 547 of the 548 bytes"),
    "version 5": (changed(PLAIN, 4, b"\0\5"), 2, "is an EIF of version 5, and 2 to 4 are known"),
    "version 1": (changed(PLAIN, 4, b"\0\1"), 2, "is an EIF of version 1, and 2 to 4 are known"),
    "unknown flags": (changed(PLAIN, 6, b"\0\2"), 6, "header has the flags 0x0002, expected 0"),
    "a reserved field": (changed(PLAIN, 24, b"\0\1"), 6, "values where it has no fields"),
    "an unused field": (changed(PLAIN, 543, b"\1"), 6, "values where it has no fields"),
    "no section": (changed(PLAIN, 26, b"\0\0"), 6, "header tells of 0 sections, expected 1 to 32"),
    "33 sections": (changed(PLAIN, 26, b"\0\x21"), 6, "header tells of 33 sections"),
    "a hidden offset": (with_table(5, 548), 6, "entries behind those of its 5 sections"),
    "a hidden size": (with_table(31, 1, SIZES), 6, "entries behind those of its 5 sections"),
    "an overlap": (
        with_table(1, 600),
        6,
        "section 2 begins at byte 600, expected 1160: it overlaps",
    ),
    "a gap": (
        with_table(1, 1161),
        6,
        "section 2 begins at byte 1161, expected 1160: it leaves a gap",
    ),
    "a section in another": (with_table(4, HEADER_SIZE), 6, "section 5 begins at byte 548"),
    "more than a file has": (with_table(4, 1 << 63, SIZES), 6, "more than a file can have"),
    "two sizes": (
        changed(PLAIN, KERNEL_AT + 4, struct.pack(">Q", 599)),
        6,
        "section 1, the kernel, has 599 bytes by its own header, and 600 by the header of the file",
    ),
    "a size beyond the end": (with_size(4, 421), 6, "but the ramdisk should reach to byte"),
    "a huge size": (with_size(4, 1 << 62), 6, "but the ramdisk should reach to byte"),
    "type 6": (
        changed(PLAIN, KERNEL_AT, b"\0\6"),
        6,
        "section 1 is of type 6, expected 1 (kernel)",
    ),
    "type 0": (changed(PLAIN, KERNEL_AT, b"\0\0"), 6, "section 1 is of type 0"),
    "flags of a section": (changed(PLAIN, KERNEL_AT + 2, b"\0\1"), 6, "the kernel, has the flags"),
    "a second kernel": (assembled([*PARTS, PARTS[0]]), 6, "section 6 is a second kernel"),
    "a second command line": (assembled([*PARTS, PARTS[1]]), 6, "is a second command line"),
    "second metadata": (assembled([*PARTS, PARTS[2]]), 6, "section 6 is a second metadata"),
    "a late kernel": (moved(Kind.KERNEL, 1), 6, "section 2, the kernel, comes too late"),
    "a late command line": (moved(Kind.COMMAND_LINE, 3), 6, "the command line, comes too late"),
    "no kernel": (without(Kind.KERNEL), 6, "it has no kernel"),
    "no command line": (without(Kind.COMMAND_LINE), 6, "it has no command line"),
    "no ramdisk": (without(Kind.RAMDISK), 6, "it has no ramdisk"),
    "a byte behind": (PLAIN + b"\0", 6, "it goes on behind its last section, which ends at"),
    "another file behind": (PLAIN + PLAIN, 6, "it goes on behind its last section"),
    "a wrong CRC": (PLAIN[:-1] + b"?", 6, "CRC is "),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_no_image_or_a_damaged_one(name: str) -> None:
    data, status, part = SPOILT[name]
    with pytest.raises(AttestorError) as caught:
        loaded(data)
    assert caught.value.status == status
    assert isinstance(caught.value, EifError if status == 6 else NotAnEifError)
    assert part in str(caught.value)


@pytest.mark.parametrize("kind", [Kind.COMMAND_LINE, Kind.METADATA, Kind.SIGNATURE])
def test_sections_that_are_kept_in_memory_are_bounded(kind: Kind) -> None:
    """Before anything of them is read: the stream would end."""
    header = Header(tuple(1 << 40 for _ in range(5))).to_bytes()
    order = [kind, *(Kind.KERNEL, Kind.RAMDISK)]
    with pytest.raises(EifError, match=rf"{kind} has 1099511627776 bytes, expected at most \d+$"):
        read(io.BytesIO(header + struct.pack(">HHQ", order[0], 0, 1 << 40) + bytes(100)))
    sections = [(kind, InMemory(bytes(1 << 18)))]
    with pytest.raises(InputError, match=rf"{kind} has 262144 bytes, expected at most \d+$"):
        list(Plan(Header(()), sections).blocks())


def test_more_sections_than_the_header_has_room_for() -> None:
    ramdisks: Parts = [(Kind.RAMDISK, b"")] * 29
    assert len(loaded(assembled([*PARTS[:3], *ramdisks])).sections) == 32
    with pytest.raises(InputError, match="an EIF has at most 32 sections, and not 33"):
        assembled([*PARTS[:3], *ramdisks, (Kind.RAMDISK, b"")])


@pytest.mark.parametrize("data", [PLAIN, signed(PLAIN, signer())], ids=["plain", "signed"])
def test_every_truncation_is_refused(data: bytes) -> None:
    for size in range(len(data)):
        with pytest.raises((EifError, NotAnEifError)):
            read(io.BytesIO(data[:size]))


def flipped(data: bytes, seed: int, count: int) -> Iterator[tuple[int, int]]:
    """Random bits of a file, the same ones each time: the offset, and the byte that it becomes."""
    spots = random.Random(seed)  # noqa: S311 - nothing is secret
    for _ in range(count):
        at = spots.randrange(len(data))
        yield at, data[at] ^ 1 << spots.randrange(8)


def test_every_flipped_bit_is_refused() -> None:
    """Ten thousand of them, with the next: no exception is foreign."""
    for at, byte in flipped(PLAIN, 13, 8000):
        with pytest.raises((EifError, NotAnEifError)):
            loaded(PLAIN[:at] + bytes([byte]) + PLAIN[at + 1 :])


def test_a_flipped_bit_of_a_signed_image_is_told_by_what_it_changes() -> None:
    data = signed(PLAIN, US)
    measured = [
        range(part.contents, part.end)
        for part in loaded(data).sections
        if part.kind in {Kind.KERNEL, Kind.COMMAND_LINE, Kind.RAMDISK}
    ]
    for at, byte in flipped(data, 17, 2000):
        with pytest.raises((EifError, NotAnEifError)) as caught:
            loaded(data[:at] + bytes([byte]) + data[at + 1 :])
        covered = any("covers what was measured" in note for note in caught.value.notes)
        assert not covered or not any(at in part for part in measured)


def test_a_flipped_bit_with_the_right_crc_changes_nothing_that_is_measured() -> None:
    """As an attacker flips it: what is accepted has the PCRs that were signed."""
    data = signed(PLAIN, US)
    pcrs = loaded(data).pcrs
    accepted = 0
    for at, byte in flipped(data, 19, 3000):
        try:
            image = loaded(changed(data, at, bytes([byte])))
        except (EifError, NotAnEifError):
            continue
        accepted += 1
        eif_report.image_text(image)
        json.dumps(eif_report.image_object(image))
        assert [image.pcrs[index] for index in (0, 1, 2)] == [pcrs[index] for index in (0, 1, 2)]
    assert accepted  # metadata, and what the header says of memory


# ---- metadata


BUILD: Final = Metadata("", "").build
WHOLE: Final = {
    "ImageName": "app",
    "ImageVersion": "1",
    "BuildMetadata": BUILD,
    "DockerInfo": None,
    "CustomMetadata": None,
}
NESTED: Final = '{"a":' * 200 + "1" + "}" * 200


def told(**members: object) -> str:
    return json.dumps({name: value for name, value in {**WHOLE, **members}.items() if value != ...})


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "metadata is not a JSON document"),
        ("[]", "metadata is not a JSON object"),
        (told() + ".", "metadata is not a JSON document"),
        (told(ImageName=...), "metadata has no ImageName that is a string"),
        (told(ImageVersion=1), "metadata has no ImageVersion that is a string"),
        (told(BuildMetadata=...), "metadata has no BuildMetadata that is a JSON object"),
        (told(BuildMetadata={**BUILD, "BuildTime": None}), "metadata has no BuildTime"),
        (told(DockerInfo=...), "metadata has no DockerInfo"),
        (told(CustomMetadata=...), "metadata has no CustomMetadata"),
        (told()[:-1] + ',"ImageName":"b"}', "an object repeats a name"),
        (told(CustomMetadata="\ud800"), "it holds half a character"),
        (told()[:-1] + ',"x":1e999}', "no number"),
        (told()[:-1] + ',"x":NaN}', "NaN is no JSON"),
        (told()[:-1] + f',"x":{NESTED}}}', "metadata is nested more than 127 deep"),
        (told()[:-1] + f',"x":{"[" * 60000}', "metadata is not a JSON document"),
        (told()[:-1] + f',"x":{"1" * 5000}}}', "metadata is not a JSON document"),
        ("\ufeff" + told(), "metadata is not a JSON document"),
    ],
)
def test_metadata_that_no_reader_takes(text: str, part: str) -> None:
    parts = [*PARTS[:2], (Kind.METADATA, text.encode()), *PARTS[3:]]
    with pytest.raises(EifError) as caught:
        loaded(assembled(parts))
    assert part in str(caught.value)


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_metadata_is_read_or_refused(data: bytes) -> None:
    parts = [*PARTS[:2], (Kind.METADATA, data), *PARTS[3:]]
    with pytest.raises(EifError):
        loaded(assembled(parts))


# ---- signatures


def with_signature(section: bytes) -> bytes:
    return assembled([*PARTS, (Kind.SIGNATURE, section)])


def section_of(by: Signer, cose: bytes | None = None, pem: bytes | None = None) -> bytes:
    made = cbor2.loads(eif_signature.make(by.certificate, loaded(PLAIN).pcrs[0], by.sign))
    if cose is not None:
        made[0]["signature"] = list(cose)
    if pem is not None:
        made[0]["signing_certificate"] = list(pem)
    return cbor2.dumps(made)


def cose_of(
    by: Signer,
    payload: object = None,
    protected: object = None,
    unprotected: object = None,
    tag: int | None = None,
) -> bytes:
    """A COSE_Sign1 that is signed well, whatever it says."""
    curve = by.certificate.curve
    head = cbor2.dumps({1: curve.algorithm} if protected is None else protected)
    body = cbor2.dumps(
        {"register_index": 0, "register_value": list(loaded(PLAIN).pcrs[0])}
        if payload is None
        else payload
    )
    made = by.key.sign(to_be_signed(head, body), ec.ECDSA(curve.hash))
    value = b"".join(part.to_bytes(curve.size) for part in decode_dss_signature(made))
    item: object = [head, unprotected or {}, body, value]
    return cbor2.dumps(cbor2.CBORTag(tag, item) if tag else item)


VALUE: Final = list(loaded(PLAIN).pcrs[0])


@pytest.mark.parametrize("curve", ["P-256", "P-384", "P-521"])
def test_a_signature_by_each_curve(curve: str) -> None:
    image = loaded(signed(PLAIN, signer(curve)))
    assert image.signature is not None
    assert image.signature.certificate.key == signer(curve).key.public_key()


def test_a_tagged_signature_is_one() -> None:
    assert loaded(with_signature(section_of(US, cose_of(US, tag=18)))).pcrs[8]


def bad_signatures() -> dict[str, tuple[Callable[[], bytes], str]]:
    """Sections by what is wrong with them, and a part of the message."""
    other = {"register_index": 0, "register_value": [*VALUE[1:], VALUE[0]]}
    index = {"register_index": 1, "register_value": VALUE}
    as_bytes = {"register_index": 0, "register_value": bytes(VALUE)}
    more = {"register_index": 0, "register_value": VALUE, "x": 1}
    true = {"register_index": False, "register_value": VALUE}
    large = {"register_index": 0, "register_value": [*VALUE[1:], 256]}
    return {
        "not CBOR": (lambda: b"\xff", "signature section cannot be read"),
        "empty": (lambda: b"", "signature section cannot be read"),
        "not an array": (lambda: cbor2.dumps({}), "is a map of 0, expected an array of one map"),
        "two": (
            lambda: cbor2.dumps(cbor2.loads(section_of(US)) * 2),
            "an array of 2, expected an array of one map",
        ),
        "a name more": (
            lambda: cbor2.dumps([{**cbor2.loads(section_of(US))[0], "x": []}]),
            "has not signing_certificate and signature alone",
        ),
        "byte strings": (
            lambda: cbor2.dumps([{"signing_certificate": b"", "signature": b""}]),
            "signing_certificate is a byte string, expected an array",
        ),
        "floats": (
            lambda: cbor2.dumps([{"signing_certificate": [1.5], "signature": []}]),
            "signing_certificate is an array with other items than integers",
        ),
        "a trailing byte": (lambda: section_of(US) + b"\0", "1 trailing bytes"),
        "no certificate": (lambda: section_of(US, pem=b"x"), "not PEM of certificates"),
        "a key before it": (lambda: section_of(US, pem=US.key_pem + US.pem), "not PEM of cert"),
        "a trusted certificate before it": (
            lambda: section_of(
                US, pem=ANOTHER.pem.replace(b" CERTIFICATE", b" TRUSTED CERTIFICATE") + US.pem
            ),
            "not PEM of certificates",
        ),
        "a damaged certificate": (
            lambda: section_of(US, pem=US.pem.replace(b"MII", b"MIJ")),
            "signing certificate cannot be read",
        ),
        "an RSA key": (lambda: section_of(US, pem=rsa_pem()), "a key of another kind"),
        "another curve": (
            lambda: section_of(
                US, pem=certificate_of(ec.generate_private_key(ec.SECP256K1()).public_key(), US.key)
            ),
            "holds a key on secp256k1, expected a key on one of secp256r1, secp384r1, secp521r1",
        ),
        "another's certificate": (
            lambda: section_of(US, pem=ANOTHER.pem),
            "signature is not by the key of the signing certificate in the image",
        ),
        "not COSE": (lambda: section_of(US, b"\x80"), "an array of 0, expected the four elements"),
        "another tag": (lambda: section_of(US, cose_of(US, tag=17)), "signature cannot be read"),
        "another image": (
            lambda: section_of(US, cose_of(US, other)),
            "signature covers another im",
        ),
        "another PCR": (lambda: section_of(US, cose_of(US, index)), "signature covers PCR1, exp"),
        "a byte string": (
            lambda: section_of(US, cose_of(US, as_bytes)),
            "register_value is a byte",
        ),
        "a member more": (lambda: section_of(US, cose_of(US, more)), "signature covers a map of 3"),
        "a boolean": (lambda: section_of(US, cose_of(US, true)), "register_index is a boolean"),
        "no byte": (lambda: section_of(US, cose_of(US, large)), "integers that are no bytes"),
        "another algorithm": (
            lambda: section_of(US, cose_of(US, protected={1: -35})),
            "signature has the protected header a1013822, expected a10126",
        ),
        "an unprotected header": (
            lambda: section_of(US, cose_of(US, unprotected={4: b"1"})),
            "unprotected header is a map of 1, expected an empty map",
        ),
        "a curve too large": (
            lambda: section_of(US, cose_of(signer("P-384"))),
            "signature has 96 bytes, expected 64",
        ),
    }


def rsa_pem() -> bytes:
    key = rsa.generate_private_key(65537, 2048).public_key()
    return certificate_of(key, US.key)


@pytest.mark.parametrize("name", bad_signatures())
def test_a_signature_that_is_none(name: str) -> None:
    make, part = bad_signatures()[name]
    data = with_signature(make())
    with pytest.raises(EifError) as caught:
        loaded(data)
    assert part in str(caught.value)
    with pytest.raises(EifError, match=r"^CRC is ") as caught:  # and beside another damage
        loaded(data[: HEADER_SIZE - 1] + bytes([data[HEADER_SIZE - 1] ^ 1]) + data[HEADER_SIZE:])
    assert caught.value.notes == ("the signature does not cover what was measured, either",)


def test_damage_beside_a_good_signature_is_told_from_damage_to_what_is_measured() -> None:
    data = signed(PLAIN, US)
    for at, part in ((loaded(data).sections[2].contents + 20, "covers"), (600, "does not cover")):
        with pytest.raises(EifError, match=r"^CRC is ") as caught:
            loaded(data[:at] + b"\0" + data[at + 1 :])
        (note,) = caught.value.notes
        assert note.startswith(f"the signature {part} what was measured")


@pytest.mark.parametrize(("first", "last"), [(-2, -1), (1, 2)], ids=["expired", "not yet valid"])
def test_a_certificate_that_is_not_valid_now(first: int, last: int) -> None:
    with pytest.raises(EifError, match=r"signing certificate is valid from .* to .*, but it is "):
        loaded(signed(PLAIN, signer("P-256", first, last)))


def test_a_chain_measures_as_its_first_certificate() -> None:
    image = loaded(with_signature(section_of(US, pem=b"text before\n" + US.pem + ANOTHER.pem)))
    assert image.pcrs[8] == pcr_of_certificate(US.certificate.der)


def test_a_certificate_of_one_line_ending_or_another() -> None:
    pem = US.pem.replace(b"\n", b"\r\n")
    assert (
        loaded(with_signature(section_of(US, pem=pem))).pcrs[8] == loaded(signed(PLAIN, US)).pcrs[8]
    )


@pytest.mark.parametrize("by", [-1, 1])
def test_a_size_that_sign_eif_of_aws_has_left_behind(by: int) -> None:
    """Of the last signature alone: the others tell what is measured."""
    data = signed(PLAIN, US)
    last = loaded(data).sections[-1]
    stale = changed(data, SIZES + 8 * 5, struct.pack(">Q", last.size + by))
    assert loaded(stale).pcrs == loaded(data).pcrs
    assert loaded(stale).size == len(data)
    parts = [(part.kind, data[part.contents : part.end]) for part in loaded(data).sections]
    amid = assembled([*parts[:3], parts[-1], *parts[3:-1]])
    with pytest.raises(EifError, match=r"section 5 begins at byte \d+, expected \d+: it"):
        loaded(changed(amid, SIZES + 8 * 3, struct.pack(">Q", last.size + by)))


def test_two_signatures() -> None:
    data = signed(PLAIN, US)
    image = loaded(data)
    parts = [(part.kind, data[part.contents : part.end]) for part in image.sections]
    with pytest.raises(EifError, match="section 7 is a second signature"):
        loaded(assembled([*parts, parts[-1]]))


def test_a_key_that_is_not_the_certificates() -> None:
    with pytest.raises(EifError, match="key is not that of the signing certificate"):
        eif_signature.make(US.certificate, bytes(48), ANOTHER.sign)
    with pytest.raises(EifError, match="what the key made is no signature on secp256r1"):
        eif_signature.make(US.certificate, bytes(48), lambda _: b"nothing")


def test_an_older_signature_is_replaced_where_it_stands() -> None:
    """Also where another builder put it: the sections behind it stay behind it."""
    data = signed(PLAIN, US)
    image = loaded(data)
    parts = [(part.kind, data[part.contents : part.end]) for part in image.sections]
    data = assembled([*parts[:3], parts[-1], *parts[3:-1]], Header((), version=3))
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        section = section_of(signer("P-521"))
        again = b"".join(signed_plan(loaded(data), file.fileno(), section).blocks())
    replaced: Image = loaded(again)
    assert [part.kind for part in replaced.sections] == [
        part.kind for part in loaded(data).sections
    ]
    assert replaced.pcrs == {**image.pcrs, 8: pcr_of_certificate(signer("P-521").certificate.der)}
    assert replaced.header.version == 3


def test_a_file_of_version_2_becomes_one_that_has_signatures() -> None:
    data = assembled(PARTS, Header((), version=2))
    assert signed_plan(loaded(data), -1, b"").header.version == 3


def test_bytes_of_der_stay_what_they_are() -> None:
    certificate = loaded(signed(PLAIN, US)).signature
    assert certificate is not None
    assert certificate.certificate.der == US.certificate.certificate.public_bytes(Encoding.DER)
    assert NOW.tzinfo is not None
    assert with_crc(PLAIN) == PLAIN
