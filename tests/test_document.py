"""Attestation documents: what parses, what verifies, and the one check each wrong one fails."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from keypolicy import pcr_of_instance
from nitrosim.pki import SHAPES, NsmPki
from nsm.certificates import read_certificate
from nsm.document import (
    AWS_ROOT_G1_SHA256,
    CHECKS,
    AttestationDocument,
    DocumentError,
    Expectations,
    VerifiedDocument,
    verify,
)

VECTORS: Final = Path(__file__).parent.parent.parent / "shared" / "vectors" / "attestation"
GENUINE: Final = sorted(VECTORS.glob("*.cose"))
needs_vectors = pytest.mark.skipif(not GENUINE, reason="no ../shared/vectors beside the project")
genuine = pytest.mark.parametrize("path", GENUINE, ids=lambda path: path.stem)
flipped = GENUINE if os.environ.get("ATTESTOR_EXHAUSTIVE") == "1" else GENUINE[:1]

NOW: Final = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
MODULE: Final = "i-0123456789abcdef0-enc0123456789abcdef"
PCRS: Final = {index: bytes([index + 1]) * 48 for index in range(16)}
ANY: Final = Expectations(allow_debug=True)


def payload_of(pki: NsmPki, **changes: Any) -> dict[str, Any]:
    fields = {
        "module_id": MODULE,
        "digest": "SHA384",
        "timestamp": int(NOW.timestamp() * 1000),
        "pcrs": PCRS,
        "certificate": pki.leaf_der,
        "cabundle": list(pki.cabundle),
        "public_key": b"key",
        "user_data": None,
        "nonce": b"nonce",
    }
    return {name: value for name, value in (fields | changes).items() if value is not ...}


def sign(
    key: ec.EllipticCurvePrivateKey,
    payload: bytes,
    protected: bytes = b"\xa1\x01\x38\x22",
    unprotected: Any = None,
) -> bytes:
    der = key.sign(cbor2.dumps(["Signature1", protected, b"", payload]), ec.ECDSA(hashes.SHA384()))
    signature = b"".join(part.to_bytes(48, "big") for part in decode_dss_signature(der))
    return cbor2.dumps([protected, unprotected or {}, payload, signature])


def signed(pki: NsmPki, **changes: Any) -> bytes:
    return sign(pki.leaf_key, cbor2.dumps(payload_of(pki, **changes)))


@pytest.fixture(scope="module")
def pki() -> NsmPki:
    return NsmPki.generate(now=NOW, module_id=MODULE)


def refusal(document: bytes, pki: NsmPki, **options: Any) -> DocumentError:
    defaults: dict[str, Any] = {"roots": [pki.root_sha256], "at": NOW, "now": NOW}
    with pytest.raises(DocumentError) as caught:
        verify(document, **(defaults | options))
    return caught.value


# ---- genuine documents


@needs_vectors
@genuine
def test_genuine_documents_verify_at_their_own_timestamp(path: Path) -> None:
    document = AttestationDocument.parse(path.read_bytes())
    verified = verify(document, at=document.signed_at, expect=ANY)
    assert verified.document is document
    assert verified.root_sha256 == AWS_ROOT_G1_SHA256
    assert document.debug_mode == ("debug-mode" in path.stem)
    assert len(verified.chain) == 5
    assert verified.chain[0].subject == "CN=aws.nitro-enclaves,OU=AWS,O=Amazon,C=US"
    assert document.module_id in verified.chain[-1].subject
    assert verified.chain[-1].not_after - verified.chain[-1].not_before == timedelta(
        hours=3, seconds=3
    )
    assert path.stem.startswith(document.signed_at.strftime("%Y-%m-%d"))


@needs_vectors
@genuine
def test_genuine_documents_have_expired(path: Path) -> None:
    with pytest.raises(DocumentError, match=r"valid from .* to .*, but verified at ") as caught:
        verify(path.read_bytes(), expect=ANY)
    assert caught.value.check == "validity"


@needs_vectors
@genuine
def test_pcr4_is_the_instance_of_the_module_id(path: Path) -> None:
    document = AttestationDocument.parse(path.read_bytes())
    assert document.pcrs[4] == pcr_of_instance(document.module_id.partition("-enc")[0])


@needs_vectors
@genuine
def test_every_truncation_of_a_genuine_document_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for length in range(len(data)):
        with pytest.raises(DocumentError):
            AttestationDocument.parse(data[:length])


@needs_vectors
@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("path", flipped, ids=lambda path: path.stem)
def test_every_flipped_bit_of_a_genuine_document_is_refused(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    at = AttestationDocument.parse(bytes(data)).signed_at
    for index in range(len(data)):
        data[index] ^= 1 << bit
        with pytest.raises(DocumentError):
            verify(bytes(data), at=at, expect=ANY)
        data[index] ^= 1 << bit


# ---- parsing


def test_a_document_says_what_was_signed(pki: NsmPki) -> None:
    document = AttestationDocument.parse(signed(pki))
    assert document.module_id == MODULE
    assert document.digest == "SHA384"
    assert document.signed_at == NOW
    assert document.pcrs == PCRS
    assert document.certificate == pki.leaf_der
    assert document.cabundle == pki.cabundle
    assert (document.public_key, document.user_data, document.nonce) == (b"key", None, b"nonce")
    assert cbor2.loads(document.payload)["module_id"] == MODULE


def test_documents_are_read_only(pki: NsmPki) -> None:
    document = AttestationDocument.parse(signed(pki))
    with pytest.raises(FrozenInstanceError):
        document.module_id = "i-other"  # type: ignore[misc]  # what is tested
    with pytest.raises(TypeError):
        document.pcrs[0] = bytes(48)  # type: ignore[index]  # what is tested


def test_a_tagged_document_is_read(pki: NsmPki) -> None:
    document = signed(pki)
    assert AttestationDocument.parse(b"\xd2" + document) == AttestationDocument.parse(document)


def test_both_forms_of_the_payload_map_are_read(pki: NsmPki) -> None:
    definite = cbor2.dumps(payload_of(pki))
    assert definite[0] == 0xA9
    document = verify(
        sign(pki.leaf_key, b"\xbf" + definite[1:] + b"\xff"), roots=[pki.root_sha256], at=NOW
    ).document
    assert document.pcrs == PCRS


@pytest.mark.parametrize("name", ["public_key", "user_data", "nonce"])
def test_optional_fields_may_be_null_or_missing(pki: NsmPki, name: str) -> None:
    for absent in (None, ...):
        assert getattr(AttestationDocument.parse(signed(pki, **{name: absent})), name) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("module_id", ""),
        ("module_id", "i-\n"),
        ("module_id", b"i-0"),
        ("module_id", ...),
        ("digest", "SHA256"),
        ("digest", b"SHA384"),
        ("digest", None),
        ("timestamp", 0),
        ("timestamp", -1),
        ("timestamp", True),
        ("timestamp", 1.0),
        ("timestamp", 253_402_300_800_000),
        ("timestamp", "1"),
        ("pcrs", {}),
        ("pcrs", []),
        ("pcrs", {index: bytes(48) for index in range(33)}),
        ("pcrs", {32: bytes(48)}),
        ("pcrs", {-1: bytes(48)}),
        ("pcrs", {True: bytes(48)}),
        ("pcrs", {"0": bytes(48)}),
        ("pcrs", {0: bytes(47)}),
        ("pcrs", {0: bytes(49)}),
        ("pcrs", {0: bytes(32)}),
        ("pcrs", {0: "0" * 48}),
        ("pcrs", {0: None}),
        ("certificate", b""),
        ("certificate", bytes(1025)),
        ("certificate", None),
        ("cabundle", []),
        ("cabundle", None),
        ("cabundle", b"root"),
        ("cabundle", [b"root", b""]),
        ("cabundle", [b"root", bytes(1025)]),
        ("cabundle", [b"root", "regional"]),
        ("public_key", b""),
        ("public_key", bytes(1025)),
        ("public_key", "key"),
        ("user_data", bytes(1025)),
        ("user_data", 0),
        ("user_data", False),
        ("nonce", bytes(1025)),
        ("nonce", []),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_fields_out_of_the_specification_are_refused(pki: NsmPki, name: str, value: object) -> None:
    with pytest.raises(DocumentError, match=f"{name.removesuffix('s')}.*expected") as caught:
        AttestationDocument.parse(signed(pki, **{name: value}))
    assert caught.value.check == "format"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("public_key", bytes(1024)),
        ("user_data", b""),
        ("user_data", bytes(1024)),
        ("nonce", b""),
        ("nonce", bytes(1024)),
        ("timestamp", 1),
        ("pcrs", {index: bytes(48) for index in range(32)}),
        ("pcrs", {31: bytes(48)}),
        ("cabundle", [bytes(1024)] * 2),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_fields_at_the_limits_are_read(pki: NsmPki, name: str, value: object) -> None:
    read = getattr(AttestationDocument.parse(signed(pki, **{name: value})), name)
    assert (list(read) if isinstance(value, list) else read) == value


def test_unknown_fields_are_signed_and_ignored(pki: NsmPki) -> None:
    assert AttestationDocument.parse(signed(pki, later="addition")).module_id == MODULE


def test_duplicate_keys_are_refused(pki: NsmPki) -> None:
    payload = cbor2.dumps(payload_of(pki))
    twice = b"\xaa" + payload[1:] + cbor2.dumps("nonce") + cbor2.dumps(b"other")
    assert refusal(sign(pki.leaf_key, twice), pki).check == "format"
    pcr_twice = payload.replace(cbor2.dumps(PCRS), b"\xa2" + 2 * (b"\x00\x58\x30" + bytes(48)))
    assert refusal(sign(pki.leaf_key, pcr_twice), pki).check == "format"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xd2",
        b"\xf6",
        b"\x80",
        b"\x84\x40\xa0\x40",
        b"\x84\x40\xa0\x40\x40",
        cbor2.dumps([b"", {}, b"x", bytes(96), b""]),
        cbor2.dumps([b"", {}, b"x", bytes(95)]),
        cbor2.dumps([b"", {}, b"x", bytes(97)]),
        cbor2.dumps([b"", {}, b"x", "s" * 96]),
        cbor2.dumps(["", {}, b"x", bytes(96)]),
        cbor2.dumps([b"", [], b"x", bytes(96)]),
        cbor2.dumps([b"", None, b"x", bytes(96)]),
        cbor2.dumps([b"", {}, None, bytes(96)]),
        cbor2.dumps([b"", {}, bytes(16385), bytes(96)]),
        cbor2.dumps([b"", {}, cbor2.dumps([1]), bytes(96)]),
        cbor2.dumps([b"", {}, cbor2.dumps({1: 2}), bytes(96)]),
        cbor2.dumps({"not": "a list"}),
        b"\x81" * 5000,
        b"\x9f" * 5000,
        bytes(100_000),
    ],
    ids=lambda data: f"{data[:12].hex()}_{len(data)}",
)
def test_what_is_no_cose_sign1_is_refused(data: bytes) -> None:
    with pytest.raises(DocumentError) as caught:
        AttestationDocument.parse(data)
    assert caught.value.check == "format"


def test_wrappings_are_refused(pki: NsmPki) -> None:
    document = signed(pki)
    for wrapped in (
        document + b"\x00",
        b"\xd2\xd2" + document,
        b"\xd9\xd9\xf7" + document,
        b"\xd8\x12" + document,
        b"\x81" + document,
        sign(pki.leaf_key, cbor2.dumps(payload_of(pki)) + b"\x00"),
        sign(pki.leaf_key, b"\xd9\xd9\xf7" + cbor2.dumps(payload_of(pki))),
        sign(pki.leaf_key, cbor2.dumps(payload_of(pki)), unprotected={4: b"key id"}),
    ):
        assert refusal(wrapped, pki).check == "format"


def test_absurd_nesting_in_the_payload_is_refused(pki: NsmPki) -> None:
    deep: object = 0
    for _ in range(200):
        deep = [deep]
    assert refusal(signed(pki, later=deep), pki).check == "format"


# ---- the checks of a verification, each failing alone


def test_a_simulated_document_verifies(pki: NsmPki) -> None:
    verified = verify(signed(pki), roots=[pki.root_sha256], at=NOW)
    assert verified.root_sha256 == pki.root_sha256
    assert verified.at == NOW
    assert [entry.not_before for entry in verified.chain] == [
        NOW - SHAPES[level].age for level in SHAPES
    ]
    assert verified.checks == CHECKS[:15]
    assert "debug_mode" in verified.checks


def test_the_root_must_be_pinned(pki: NsmPki) -> None:
    error = refusal(signed(pki), pki, roots=[AWS_ROOT_G1_SHA256, bytes(32)])
    assert error.check == "root"
    assert pki.root_sha256.hex() in str(error)
    assert AWS_ROOT_G1_SHA256.hex() in str(error)
    assert refusal(signed(pki), pki, roots=[]).check == "root"


def test_a_root_of_the_same_name_is_another_root(pki: NsmPki) -> None:
    twin = pki.twin(NOW)
    assert refusal(signed(twin), pki).check == "root"
    bundle = [pki.cabundle[0], *twin.cabundle[1:]]
    assert refusal(signed(twin, cabundle=bundle), pki).check == "chain"


@pytest.mark.parametrize(
    "protected",
    [
        b"",
        b"\xa0",
        b"\xa1\x01\x26",
        b"\xa1\x01\x20",
        b"\xa1\xf5\x38\x22",
        b"\xa2\x01\x38\x22\x04\x40",
        b"\xa1\x01\x39\x00\x22",
    ],
    ids=bytes.hex,
)
def test_only_es384_is_accepted(pki: NsmPki, protected: bytes) -> None:
    error = refusal(sign(pki.leaf_key, cbor2.dumps(payload_of(pki)), protected), pki)
    assert error.check == "algorithm"
    assert "a1013822 (ES384)" in str(error)


def test_a_changed_payload_is_refused(pki: NsmPki) -> None:
    other = dict(PCRS) | {0: bytes([99]) * 48}
    document = signed(pki).replace(cbor2.dumps(PCRS), cbor2.dumps(other))
    assert refusal(document, pki).check == "signature"


def test_r_and_s_are_not_exchangeable(pki: NsmPki) -> None:
    document = signed(pki)
    assert refusal(document[:-96] + document[-48:] + document[-96:-48], pki).check == "signature"


@pytest.mark.parametrize(
    "signature", [bytes(96), b"\xff" * 96, bytes(48) + b"\x01" * 48, b"\x01" * 48 + bytes(48)]
)
def test_degenerate_signatures_are_refused(pki: NsmPki, signature: bytes) -> None:
    assert refusal(signed(pki)[:-96] + signature, pki).check == "signature"


def test_a_document_signed_by_another_leaf_is_refused(pki: NsmPki) -> None:
    document = sign(pki.with_leaf_of(NOW).leaf_key, cbor2.dumps(payload_of(pki)))
    assert refusal(document, pki).check == "signature"


def test_the_order_of_the_chain_counts(pki: NsmPki) -> None:
    root, regional, zonal, instance = pki.cabundle
    for cabundle in (
        [root, zonal, regional, instance],
        [root, regional, zonal],
        [root, instance],
        [root],
    ):
        assert refusal(signed(pki, cabundle=cabundle), pki).check == "names"
    assert refusal(signed(pki, cabundle=[instance, zonal, regional, root]), pki).check == "root"


def test_an_issuer_of_the_right_name_must_have_signed(pki: NsmPki) -> None:
    twin = pki.twin(NOW)
    for level, name in enumerate(("regional", "zonal", "instance"), start=1):
        bundle = [*pki.cabundle[:level], twin.levels[name].der, *pki.cabundle[level + 1 :]]
        error = refusal(signed(pki, cabundle=bundle), pki)
        assert error.check == "chain"
        assert "is not signed by its issuer" in str(error)


@pytest.mark.parametrize("level", ["root", "regional", "zonal", "instance", "leaf"])
def test_every_certificate_must_be_valid(pki: NsmPki, level: str) -> None:
    lifetime = SHAPES[level].lifetime
    expired = NsmPki.generate(
        now=NOW, module_id=MODULE, changes={level: {"age": lifetime + timedelta(seconds=1)}}
    )
    error = refusal(signed(expired), expired)
    assert error.check == "validity"
    assert level in str(error) or "cabundle" in str(error)
    assert "2026-03-04T05:06:07Z" in str(error)
    future = NsmPki.generate(
        now=NOW, module_id=MODULE, changes={level: {"age": timedelta(seconds=-1)}}
    )
    assert refusal(signed(future), future).check == "validity"


def test_certificates_that_are_known_are_examined_again(pki: NsmPki) -> None:
    """Reading them is all that is spared to whoever verifies many documents."""
    document = signed(pki)
    expired = NOW + timedelta(days=365 * 50)
    verify(document, roots=[pki.root_sha256], at=NOW)
    read = read_certificate.cache_info().misses
    assert verify(document, roots=[pki.root_sha256], at=NOW).checks
    assert refusal(document, pki, at=expired).check == "validity"
    changed = bytearray(document)
    changed[-1] ^= 1
    assert refusal(bytes(changed), pki).check == "signature"
    assert read_certificate.cache_info().misses == read


def test_validity_includes_both_ends(pki: NsmPki) -> None:
    leaf = pki.levels["leaf"].certificate
    for at in (leaf.not_valid_before_utc, leaf.not_valid_after_utc):
        assert verify(signed(pki), roots=[pki.root_sha256], at=at).at == at
    for at in (
        leaf.not_valid_before_utc - timedelta(microseconds=1),
        leaf.not_valid_after_utc + timedelta(microseconds=1),
    ):
        assert refusal(signed(pki), pki, at=at).check == "validity"


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"regional": {"path_length": 1}}, "path_length"),
        ({"zonal": {"path_length": 0}}, "path_length"),
        ({"root": {"path_length": 2}}, "path_length"),
        ({"root": {"ca": False}}, "basic_constraints"),
        ({"regional": {"ca": False, "path_length": None}}, "basic_constraints"),
        ({"instance": {"ca": False, "path_length": None}}, "basic_constraints"),
        ({"instance": {"ca": None}}, "extensions"),
        ({"leaf": {"ca": True}}, "basic_constraints"),
        ({"leaf": {"ca": None}}, "extensions"),
        ({"leaf": {"usage": frozenset({"content_commitment"})}}, "key_usage"),
        ({"leaf": {"usage": None}}, "extensions"),
        ({"zonal": {"usage": frozenset({"digital_signature"})}}, "key_usage"),
        ({"zonal": {"usage": None}}, "extensions"),
        ({"leaf": {"curve": ec.SECP256R1()}}, "key_type"),
        ({"leaf": {"curve": ec.SECP521R1()}}, "key_type"),
        ({"regional": {"curve": ec.SECP256R1()}}, "key_type"),
        ({"root": {"curve": ec.SECP256K1()}}, "key_type"),
    ],
    ids=[f"case{number}" for number in range(1, 18)],
)
def test_certificates_must_be_fit_for_their_place(
    changes: dict[str, dict[str, Any]], check: str
) -> None:
    wrong = NsmPki.generate(now=NOW, module_id=MODULE, changes=changes)
    payload = cbor2.dumps(payload_of(wrong))
    key = (
        wrong.leaf_key
        if isinstance(wrong.leaf_key.curve, ec.SECP384R1)
        else ec.generate_private_key(ec.SECP384R1())
    )
    error = refusal(sign(key, payload), wrong)
    assert error.check == check


def test_longer_path_lengths_are_fine() -> None:
    roomy = NsmPki.generate(now=NOW, module_id=MODULE, changes={"regional": {"path_length": None}})
    assert verify(signed(roomy), roots=[roomy.root_sha256], at=NOW).document.module_id == MODULE


def test_a_leaf_signed_with_sha256_is_refused(pki: NsmPki) -> None:
    instance, leaf = pki.levels["instance"], pki.levels["leaf"].certificate
    builder = (
        x509.CertificateBuilder(
            issuer_name=leaf.issuer, subject_name=leaf.subject, public_key=leaf.public_key()
        )
        .serial_number(1)
        .not_valid_before(leaf.not_valid_before_utc)
        .not_valid_after(leaf.not_valid_after_utc)
    )
    for extension in leaf.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    weak = builder.sign(instance.key, hashes.SHA256()).public_bytes(Encoding.DER)
    error = refusal(signed(pki, certificate=weak), pki)
    assert error.check == "key_type"
    assert "expected ecdsa-with-SHA384" in str(error)
    # and the same with a critical extension that no one understands
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
    strange = builder.add_extension(unknown, critical=True).sign(instance.key, hashes.SHA384())
    error = refusal(signed(pki, certificate=strange.public_bytes(Encoding.DER)), pki)
    assert error.check == "extensions"
    assert "1.2.3.4" in str(error)


def test_an_rsa_leaf_is_refused(pki: NsmPki) -> None:
    leaf = pki.levels["leaf"].certificate
    key = rsa.generate_private_key(65537, 2048)
    certificate = (
        x509.CertificateBuilder(
            issuer_name=leaf.issuer, subject_name=leaf.subject, public_key=key.public_key()
        )
        .serial_number(1)
        .not_valid_before(leaf.not_valid_before_utc)
        .not_valid_after(leaf.not_valid_after_utc)
        .sign(pki.levels["instance"].key, hashes.SHA384())
    )
    error = refusal(signed(pki, certificate=certificate.public_bytes(Encoding.DER)), pki)
    assert error.check == "key_type"
    assert "expected secp384r1" in str(error)


@pytest.mark.parametrize(
    "junk", [b"\x00", b"\x30\x00", b"\x30\x82\x02\x11", bytes(500)], ids=lambda junk: junk[:4].hex()
)
def test_unreadable_certificates_are_refused(pki: NsmPki, junk: bytes) -> None:
    assert refusal(signed(pki, certificate=junk), pki).check == "certificates"
    assert refusal(signed(pki, cabundle=[pki.root_der, junk]), pki).check == "certificates"
    assert (
        refusal(signed(pki, cabundle=[junk]), pki, roots=[hashlib.sha256(junk).digest()]).check
        == "certificates"
    )


@pytest.mark.parametrize("offset", [timedelta(hours=-1), timedelta(hours=4)])
def test_the_timestamp_must_be_within_the_life_of_the_leaf(pki: NsmPki, offset: timedelta) -> None:
    stamp = int((NOW + offset).timestamp() * 1000)
    error = refusal(signed(pki, timestamp=stamp), pki)
    assert error.check == "timestamp"
    assert "document was signed at" in str(error)
    assert "is valid from" in str(error)


def test_debug_mode_is_refused_unless_allowed(pki: NsmPki) -> None:
    for pcrs in (PCRS | {0: bytes(48)}, {3: bytes([3]) * 48}):
        document = signed(pki, pcrs=pcrs)
        assert AttestationDocument.parse(document).debug_mode
        # before the PCRs: debug mode is why they differ
        assert refusal(document, pki, expect=Expectations(pcrs={0: PCRS[0]})).check == "debug_mode"
        checks = verify(document, roots=[pki.root_sha256], at=NOW, expect=ANY).checks
        assert "debug_mode" not in checks
    assert (
        refusal(
            signed(pki, pcrs={0: bytes(48)}), pki, expect=Expectations(pcrs={0: bytes(48)})
        ).check
        == "debug_mode"
    )


@pytest.mark.parametrize(
    ("expect", "check", "got", "wanted"),
    [
        (Expectations(pcrs={0: PCRS[0], 2: PCRS[3]}), "pcrs", PCRS[2].hex(), PCRS[3].hex()),
        (Expectations(pcrs={16: PCRS[0]}), "pcrs", "PCR16 is absent", PCRS[0].hex()),
        (Expectations(pcrs={0: b""}), "pcrs", PCRS[0].hex(), "empty"),
        (Expectations(nonce=b"other"), "nonce", b"nonce".hex(), b"other".hex()),
        (Expectations(user_data=b"x"), "user_data", "absent", "78"),
        (Expectations(user_data=b""), "user_data", "absent", "empty"),
        (Expectations(public_key=b"other"), "public_key", b"key".hex(), b"other".hex()),
        (Expectations(module_id="i-other"), "module_id", MODULE, "i-other"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_expectations_name_both_sides(
    pki: NsmPki, expect: Expectations, check: str, got: str, wanted: str
) -> None:
    error = refusal(signed(pki), pki, expect=expect)
    assert error.check == check
    assert got in str(error)
    assert wanted in str(error).partition("expected ")[2]


def test_met_expectations_are_listed(pki: NsmPki) -> None:
    expect = Expectations(
        pcrs=PCRS,
        nonce=b"nonce",
        user_data=b"",
        public_key=b"key",
        module_id=MODULE,
        max_age=timedelta(minutes=1),
    )
    verified = verify(
        signed(pki, user_data=b""), roots=[pki.root_sha256], at=NOW, now=NOW, expect=expect
    )
    assert verified.checks == CHECKS


def test_age_counts_from_the_real_now_in_both_directions(pki: NsmPki) -> None:
    expect = Expectations(max_age=timedelta(minutes=5))
    for minutes in (-5, 0, 5):
        now = NOW + timedelta(minutes=minutes)
        assert (
            verify(signed(pki), roots=[pki.root_sha256], at=NOW, now=now, expect=expect).at == NOW
        )
    for minutes in (-6, 6):
        error = refusal(signed(pki), pki, now=NOW + timedelta(minutes=minutes), expect=expect)
        assert error.check == "max_age"
        assert "0:05:00" in str(error)


def test_expectations_come_after_authenticity(pki: NsmPki) -> None:
    document = signed(pki).replace(b"nonce" + b"\x45nonce", b"nonce" + b"\x45other")
    assert refusal(document, pki, expect=Expectations(nonce=b"fresh")).check == "signature"


def test_times_need_a_zone(pki: NsmPki) -> None:
    for times in ({"at": datetime(2026, 1, 1)}, {"at": NOW, "now": datetime(2026, 1, 1)}):  # noqa: DTZ001 - what is tested
        with pytest.raises(ValueError, match="time zone"):
            verify(signed(pki), roots=[pki.root_sha256], **times)  # type: ignore[arg-type]  # mypy unifies the values


def test_only_verify_makes_a_verified_document(pki: NsmPki) -> None:
    verified = verify(signed(pki), roots=[pki.root_sha256], at=NOW)
    with pytest.raises(TypeError, match="verify only"):
        VerifiedDocument(verified.document, bytes(32), NOW, (), (), seal=object())
    with pytest.raises((TypeError, ValueError), match="seal"):  # Python 3.13 raises the former
        replace(verified, at=NOW)  # type: ignore[call-arg]  # what is tested
    assert not isinstance(verified.document, VerifiedDocument)


def test_certificates_and_signature_stay_out_of_the_repr(pki: NsmPki) -> None:
    verified = verify(signed(pki), roots=[pki.root_sha256], at=NOW)
    assert not re.search(r"(certificates?|cabundle|signature|payload)=", repr(verified))


def test_importing_nsm_does_not_import_cryptography() -> None:
    code = (
        "import sys, nsm; "
        "sys.exit(any(name.partition('.')[0] == 'cryptography' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- anything at all

_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.binary(max_size=60)
    | st.text(max_size=20)
    | st.floats()
)
_ITEMS = st.recursive(
    _LEAVES,
    lambda items: st.lists(items, max_size=4) | st.dictionaries(_LEAVES, items, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_document_errors(data: bytes) -> None:
    with pytest.raises(DocumentError):
        AttestationDocument.parse(data)


@settings(deadline=None)
@given(
    st.sampled_from(["module_id", "timestamp", "pcrs", "certificate", "cabundle", "nonce"]), _ITEMS
)
def test_arbitrary_fields_raise_only_document_errors(name: str, value: object) -> None:
    payload = cbor2.dumps(
        {"module_id": "i", "digest": "SHA384", "timestamp": 1, "pcrs": {0: bytes(48)}, name: value}
    )
    with pytest.raises(DocumentError):
        AttestationDocument.parse(cbor2.dumps([b"", {}, payload, bytes(96)]))


@pytest.mark.parametrize("mask", [0x01, 0xFF])
def test_damaged_certificates_raise_only_document_errors(pki: NsmPki, mask: int) -> None:
    """A hostile document's own leaf signs it, so its certificates reach the parser as they are."""
    for position, der in ((None, pki.leaf_der), (1, pki.cabundle[1])):
        damaged = bytearray(der)
        for index in range(len(damaged)):
            damaged[index] ^= mask
            bundle = [
                bytes(damaged) if number == position else good
                for number, good in enumerate(pki.cabundle)
            ]
            document = signed(
                pki, cabundle=bundle, certificate=pki.leaf_der if position else bytes(damaged)
            )
            # one may verify: the unused bits of the signature's BIT STRING are not signed
            with contextlib.suppress(DocumentError):
                verify(document, roots=[pki.root_sha256], at=NOW)
            damaged[index] ^= mask
