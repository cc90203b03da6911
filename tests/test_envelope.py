"""The envelope parser: real KMS answers, our own forms, second opinions, and what is not one."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Final

import pytest
from asn1crypto import cms
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from hypothesis import given
from hypothesis import strategies as st

from attestor import PLAINTEXT_MAX, EnvelopeError, _public_key_info, open_envelope
from attestor_io.ciphertext import CIPHERTEXT_MAX
from nitrosim.envelope import FORMS, MALFORMED, malform, seal

if TYPE_CHECKING:
    from pathlib import Path

NAMES: Final = ("kms_32-byte-key", "kms_json", "kms_json_multi-chunk", "localstack")
KEY: Final = rsa.generate_private_key(65537, 2048)
OTHER_KEY: Final = rsa.generate_private_key(65537, 2048)
SPKI: Final = KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def test_the_public_key_is_written_as_the_library_writes_it() -> None:
    assert _public_key_info(KEY) == SPKI


def test_a_key_of_another_size_is_not_ours() -> None:
    with pytest.raises(ValueError, match="3072 bits"):
        open_envelope(seal(b"the secret", SPKI), rsa.generate_private_key(65537, 3072))


def load(vectors: Path, name: str) -> tuple[bytes, rsa.RSAPrivateKey, bytes]:
    folder = vectors / "envelope"
    key = load_pem_private_key((folder / f"{name}.key.pem").read_bytes(), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    return (folder / f"{name}.ber").read_bytes(), key, (folder / f"{name}.plain").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_real_envelopes_open(vectors: Path, name: str) -> None:
    envelope, key, plaintext = load(vectors, name)
    assert open_envelope(envelope, key) == plaintext


@pytest.fixture(params=[*FORMS, *NAMES])
def sample(request: pytest.FixtureRequest) -> tuple[bytes, rsa.RSAPrivateKey, bytes]:
    """Envelope, key and plaintext: of each form of ours, and of the real service where at hand."""
    if request.param in FORMS:
        return (
            seal(b"the secret in two blocks", SPKI, request.param),
            KEY,
            b"the secret in two blocks",
        )
    return load(request.getfixturevalue("vectors"), request.param)


def test_another_key_and_every_truncation_are_refused(
    sample: tuple[bytes, rsa.RSAPrivateKey, bytes],
) -> None:
    envelope, key, _ = sample
    with pytest.raises(EnvelopeError):
        open_envelope(envelope, OTHER_KEY)
    for length in range(len(envelope)):
        with pytest.raises(EnvelopeError):
            open_envelope(envelope[:length], key)
    with pytest.raises(EnvelopeError, match="ends after"):
        open_envelope(envelope + b"\0", key)


def unprotected(envelope: bytes) -> set[int]:
    """Where the IV and the encrypted content stand, as asn1crypto sees it; CBC protects neither."""
    info = cms.ContentInfo.load(envelope)["content"]["encrypted_content_info"]
    start = envelope.index(info["content_encryption_algorithm"]["parameters"].native)
    positions = set(range(start, start + 16))
    for chunk in _chunks(envelope[start + 16 :]):
        start = envelope.index(chunk, start)
        positions |= set(range(start, start + len(chunk)))
    return positions


def _chunks(data: bytes) -> list[bytes]:
    """The contents of the primitives in the encrypted content: [0] alone, or OCTET STRINGs."""
    tag, length, head = data[0], data[1], 2
    if length > 0x80:
        head += length & 0x7F
        length = int.from_bytes(data[2:head], "big")
    if tag == 0x80:
        return [data[head : head + length]]
    chunks, rest = [], data[head:]
    while rest[:1] == b"\x04":
        length, head = rest[1], 2
        if length > 0x80:
            head += length & 0x7F
            length = int.from_bytes(rest[2:head], "big")
        chunks.append(rest[head : head + length])
        rest = rest[head + length :]
    return chunks


def test_a_flip_of_any_bit_gives_no_plaintext_but_in_iv_and_content(
    sample: tuple[bytes, rsa.RSAPrivateKey, bytes],
) -> None:
    envelope, key, plaintext = sample
    allowed = unprotected(envelope)
    assert len(allowed) >= 32
    for position in range(len(envelope) * 8):
        flipped = bytearray(envelope)
        flipped[position // 8] ^= 1 << position % 8
        try:
            opened = open_envelope(bytes(flipped), key)
        except EnvelopeError:
            continue
        # TLS is what protects these bytes; LocalStack's made-up issuer is not compared at all
        assert position // 8 in allowed or opened == plaintext


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 15, 16, 32, 999, 1000, PLAINTEXT_MAX])
def test_every_form_opens_and_two_others_agree(form: str, length: int, tmp_path: Path) -> None:
    plaintext = bytes(index % 251 for index in range(length))
    envelope = seal(plaintext, SPKI, form)
    assert open_envelope(envelope, KEY) == plaintext
    info = cms.ContentInfo.load(envelope, strict=True)
    assert info["content_type"].native == "enveloped_data"
    assert len(info["content"]["recipient_infos"]) == 1
    (tmp_path / "key.pem").write_bytes(
        KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    openssl = [
        "openssl",
        "cms",
        "-decrypt",
        "-binary",
        "-inform",
        "DER",
        "-inkey",
        str(tmp_path / "key.pem"),
    ]
    assert (
        subprocess.run(openssl, input=envelope, capture_output=True, check=True).stdout == plaintext
    )


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_envelopes_are_refused(name: str) -> None:
    with pytest.raises(EnvelopeError):
        open_envelope(malform(name, b"the secret", SPKI), KEY)


def test_a_wrong_key_and_a_wrong_padding_look_the_same() -> None:
    messages = set()
    for name in ("envelope-other-key", "envelope-short-content-key", "envelope-padding"):
        with pytest.raises(EnvelopeError) as caught:
            open_envelope(malform(name, b"the secret", SPKI), KEY)
        messages.add(str(caught.value))
    assert messages == {"bad envelope: it does not open with this enclave's key"}


@pytest.mark.parametrize("length", [0, PLAINTEXT_MAX + 1])
def test_a_plaintext_that_kms_never_sends_is_refused(length: int) -> None:
    with pytest.raises(EnvelopeError, match=f"it holds {length} bytes"):
        open_envelope(seal(bytes(length), SPKI), KEY)


def test_an_envelope_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(EnvelopeError, match=f"at most {CIPHERTEXT_MAX}"):
        open_envelope(bytes(CIPHERTEXT_MAX + 1), KEY)


@given(st.binary(max_size=300))
def test_any_bytes_end_in_our_own_error(data: bytes) -> None:
    with pytest.raises(EnvelopeError):
        open_envelope(data, KEY)


@given(st.data())
def test_any_splice_ends_in_our_own_error_or_a_plaintext(data: st.DataObject) -> None:
    envelope = seal(b"the secret", SPKI)
    start = data.draw(st.integers(0, len(envelope)))
    end = data.draw(st.integers(start, len(envelope)))
    spliced = envelope[:start] + data.draw(st.binary(max_size=40)) + envelope[end:]
    try:
        assert len(open_envelope(spliced, KEY)) <= PLAINTEXT_MAX
    except EnvelopeError as error:
        assert str(error).startswith("bad envelope: ")  # noqa: PT017 - either end is right, this is about one of them


@given(st.binary(min_size=1, max_size=PLAINTEXT_MAX), st.sampled_from(sorted(FORMS)))
def test_round_trip(plaintext: bytes, form: str) -> None:
    assert open_envelope(seal(plaintext, SPKI, form), KEY) == plaintext
