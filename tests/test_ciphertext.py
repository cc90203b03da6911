"""What people take for a ciphertext: text of every kind, RSA ciphertexts, and contexts as the AWS
CLI writes them.
"""

from __future__ import annotations

import base64
import json
import os
from typing import TYPE_CHECKING, Any, Final

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from attestor_io.ciphertext import BASE64_KEY, read_ciphertext, take_ciphertext
from attestor_io.deadline import Deadline
from attestor_io.errors import InputError
from attestor_io.text_options import parse_context
from tests.test_encrypt import ARN, DONE

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Enclave

RAW: Final = bytes.fromhex("0102020078") + bytes(range(256))[3:] * 2
TEXT: Final = base64.b64encode(RAW)
URL_TEXT: Final = base64.urlsafe_b64encode(b"\xfb\xff" * 100)
CLI: Final = json.dumps(
    {"CiphertextBlob": TEXT.decode(), "KeyId": ARN, "EncryptionAlgorithm": "SYMMETRIC_DEFAULT"},
    indent=4,
).encode()
RSA: Final = "RSAES_OAEP_SHA_256"


def said(data: bytes, *, base64_text: bool = False, option: str = "--base64") -> tuple[str, str]:
    """The error about a file with these bytes, and its hint."""

    class Nothing:
        def read(self, _size: int = -1, /) -> bytes:
            return b""

    with pytest.raises(InputError) as refused:
        take_ciphertext(data, Nothing(), "it", base64_text=base64_text, message=True, option=option)
    assert len(refused.value.hints) <= 1
    return str(refused.value), "".join(refused.value.hints)


# -- text that is no ciphertext


@pytest.mark.parametrize("base64_text", [False, True])
@pytest.mark.parametrize(
    ("data", "form", "hint"),
    [
        (RAW.hex().encode(), "hexadecimal text", "xxd -r -p"),
        (RAW.hex().upper().encode() + b"\r\n", "hexadecimal text", "xxd -r -p"),
        (CLI, "JSON of the AWS CLI", "--query CiphertextBlob --output text"),
        (json.dumps({"CiphertextBlob": "x"}).encode(), "JSON of the AWS CLI", "--query"),
        (
            TEXT + b"\tSYMMETRIC_DEFAULT\t" + ARN.encode() + b"\n",
            "output of the AWS CLI",
            "--query",
        ),
        (b"CiphertextBlob: " + TEXT + b"\n", "output of the AWS CLI", "--query"),
        (b'"' + TEXT + b'"\n', "base64 text in quotation marks", "--output text"),
        (("\ufeff" + TEXT.decode()).encode("utf-16-le"), "UTF-16 text", "PowerShell"),
        (TEXT.decode().encode("utf-16-be"), "UTF-16 text", "PowerShell"),
        ("\ufeffpassword\r\n".encode("utf-16-le"), "UTF-16 text", "PowerShell"),
        (URL_TEXT, "base64url text", "tr -- -_ +/"),
    ],
)
def test_text_is_called_what_it_is(data: bytes, form: str, hint: str, base64_text: bool) -> None:
    message, hinted = said(data, base64_text=base64_text)
    assert message == f"ciphertext it is {form}, not the bytes it stands for"
    assert hint in hinted


def test_base64_text_wants_its_option() -> None:
    for data in (TEXT, base64.encodebytes(RAW), b"\xef\xbb\xbf" + TEXT, TEXT.rstrip(b"=")):
        assert said(data) == (
            "ciphertext it is base64 text, not the bytes it stands for",
            "add --base64",
        )
    assert said(TEXT, option=BASE64_KEY)[1] == 'add encoding = "base64"'
    message = base64.b64encode(b"\x02\x05\x78" + os.urandom(100))
    assert said(message)[1] == "add --base64"


def test_base64_of_something_else() -> None:
    twice = base64.encodebytes(TEXT)
    for asked in (False, True):
        message, hint = said(twice, base64_text=asked)
        assert message.startswith("ciphertext it is base64 of base64 text, not")
        assert hint == "base64 -d removes one layer, and --base64 another"
    assert "base64 of base64 of base64 text" in said(base64.b64encode(twice))[0]
    assert "base64 of JSON of the AWS CLI" in said(base64.b64encode(CLI))[0]
    assert "base64 of JSON of the AWS CLI" in said(base64.b64encode(CLI), base64_text=True)[0]
    plain = base64.b64encode(b"correct horse battery staple")
    assert "it is base64 of text, which" in said(plain, base64_text=True)[0]


@pytest.mark.parametrize(
    "data",
    [
        b"hunter2",
        b"password",  # its letters are base64, and stand for nothing that KMS makes
        b"cGFzc3dvcmQ=",
        b"AQICAHg=",
        b"deadbeef",
        b"1234",
        base64.b64encode(bytes(range(32))) + b"\n",  # a key of 256 bits
        base64.b64encode(bytes(range(64))),
        bytes(range(32)).hex().encode(),
        b'{"user": "admin", "password": "x"}',
        "pässwörd\n".encode(),
        b"-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----\n",
        b"a line\n" * 2000,
        b"some words in a line of letters " * 9,
        b"one word\nand\nanother\nin\nlines\n" * 20,
    ],
)
def test_a_plaintext_is_no_base64_text(data: bytes) -> None:
    message, hint = said(data)
    assert message == "ciphertext it is text, which no ciphertext is"
    assert hint == "swapped arguments? attestor encrypt makes a ciphertext of a plaintext"
    assert "swapped" not in said(data, option=BASE64_KEY)[1]


def test_bytes_where_base64_text_was_asked_for() -> None:
    for option in ("--base64", BASE64_KEY):
        assert said(RAW, base64_text=True, option=option) == (
            "ciphertext it is not base64 text",
            f"these are bytes already: leave out {option}",
        )


def test_a_text_of_any_length_is_told_by_its_beginning(tmp_path: Path) -> None:
    deadline = Deadline(60)
    path = tmp_path / "file"
    for text, form in (
        (base64.b64encode(RAW * 99), "base64"),
        (b"words " * 9999, ""),
        ("ä" * 9999, ""),
    ):
        path.write_bytes(text if isinstance(text, bytes) else b"x" + text.encode())
        with pytest.raises(InputError, match=f"is {form or 'text, which no'}"):
            read_ciphertext(str(path), deadline, base64_text=False)
    path.write_bytes(os.urandom(7000))
    with pytest.raises(InputError, match="longer than the 6144 bytes"):
        read_ciphertext(str(path), deadline, base64_text=False)
    path.write_bytes(base64.b64encode(os.urandom(7000)))
    with pytest.raises(InputError, match="longer than the 6144 bytes"):
        read_ciphertext(str(path), deadline, base64_text=True)


@pytest.mark.parametrize("size", [65, 153, 184, 256, 384, 512, 6144])
def test_no_ciphertext_is_taken_for_text(size: int) -> None:
    class Nothing:
        def read(self, _size: int = -1, /) -> bytes:
            return b""

    def taken(data: bytes, *, base64_text: bool) -> Any:
        return take_ciphertext(data, Nothing(), "it", base64_text=base64_text, message=False)

    uuid = ARN[-36:].encode()  # how blobs of moto and LocalStack begin
    for start in (b"", b"\x01\x02\x02", b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"{", uuid):
        for _ in range(50):
            data = start + os.urandom(size - len(start))
            assert taken(data, base64_text=False) == data
            assert taken(base64.b64encode(data), base64_text=True) == data
            assert taken(base64.encodebytes(data), base64_text=True) == data


def test_a_real_blob_is_refused_in_every_other_form(enclave: Enclave) -> None:
    blob = enclave.encrypt()
    enclave.place(blob.hex().encode(), "blob")
    run = enclave.decrypt()
    assert (run.status, run.out) == (2, b"")
    assert run.error == "ciphertext blob is hexadecimal text, not the bytes it stands for"
    assert enclave.files() == {"blob"}


@pytest.mark.parametrize(
    ("data", "encoding", "hint"),
    [
        (TEXT, "raw", 'attestor: hint: add encoding = "base64"'),
        (RAW, "base64", 'leave out encoding = "base64"'),
        (b"a plaintext", "raw", "attestor: hint: attestor encrypt makes a ciphertext"),
    ],
)
def test_hints_of_inject_speak_of_the_manifest(
    enclave: Enclave, data: bytes, encoding: str, hint: str
) -> None:
    enclave.place(data, "source")
    manifest = (
        f'key_id = "{ARN}"\n[[secret]]\nunbound = true\nsource = "{enclave.folder}/source"\n'
        f'target = "{enclave.folder}/target"\nencoding = "{encoding}"\n'
    )
    enclave.place(manifest.encode(), "m.toml")
    run = enclave.attestor("inject", "m.toml")
    assert run.status == 2
    assert hint in run.err
    assert "--base64" not in run.err
    assert enclave.files() == {"source", "m.toml"}


def test_a_source_longer_than_max_bytes_is_not_cut_off(enclave: Enclave) -> None:
    enclave.place(enclave.encrypt(), "source")
    manifest = (
        f'key_id = "{enclave.world.kms.key_arn}"\n[[secret]]\nunbound = true\nmax_bytes = 50\n'
        f'source = "{enclave.folder}/source"\ntarget = "{enclave.folder}/target"\n'
    )
    enclave.place(manifest.encode(), "m.toml")
    run = enclave.attestor("inject", "m.toml")
    assert run.status == 2
    assert "longer than 50 bytes" in run.error


# -- the context as the AWS CLI writes it


class Option:
    opts = ("--context",)


def context(*texts: str) -> dict[str, str]:
    return parse_context(None, Option(), texts)  # type: ignore[arg-type]  # its name is all it uses


@pytest.mark.parametrize("text", ["a=b,c=d", "a=,c=", "a=b, c=d", "a=b,c=d,e=f", "dn=cn=Bob,ou=IT"])
def test_shorthand_is_asked_about(text: str) -> None:
    name, second = text.partition("=")[0], text.partition(",")[2].strip().partition("=")[0]
    with pytest.raises(InputError, match="is two pairs, or one value") as refused:
        context(text)
    assert refused.value.hints == (
        f"two pairs: --context {name}=... --context {second}=...",
        f"""one value: --context '{{"{name}": "..."}}'""",
    )


def test_what_is_no_shorthand() -> None:
    for value in ("a,b", "a,b,", "1,000", ",", "x=1", "a,=b", "Ym9i==", "a=b;c=d"):
        assert context(f"n={value}") == {"n": value}


def test_a_value_with_a_comma_as_json() -> None:
    assert context('{"dn": "cn=Bob,ou=IT"}') == {"dn": "cn=Bob,ou=IT"}
    assert context('{"a": "b", "c": ""}', "e=f", "{}") == {"a": "b", "c": "", "e": "f"}


@pytest.mark.parametrize(
    ("texts", "part"),
    [
        (["{a=b"], "wants a JSON object of strings"),
        (['{"a": 1}'], "wants a JSON object of strings"),
        (['{"a": {"b": "c"}}'], "wants a JSON object of strings"),
        (['{"": "b"}'], "wants a JSON object of strings"),
        (['{"a": "b"} x'], "wants a JSON object of strings"),
        (['{"a": ' * 100_000], "wants a JSON object of strings"),
        (['{"a": ' + "9" * 100_000 + "}"], "wants a JSON object of strings"),
        (['{"a": "b", "a": "c"}'], "names a twice"),
        (['{"a": "b"}', "a=b"], "names a twice"),
        (['{"a": "\\ud800"}'], "is not UTF-8 text"),
    ],
)
def test_json_that_is_no_context(texts: list[str], part: str) -> None:
    with pytest.raises(InputError, match=part):
        context(*texts)


def test_a_context_as_json_through_the_command(enclave: Enclave) -> None:
    enclave.place(enclave.encrypt(dn="cn=Bob,ou=IT", node="3"))
    assert enclave.decrypt("--context", '{"dn": "cn=Bob,ou=IT"}', "--context", "node=3") == DONE
    run = enclave.decrypt("--context", "dn=cn=Bob,ou=IT", "--force")
    assert run.status == 2
    assert "is two pairs, or one value" in run.error
    assert "Bob" not in run.err


# -- RSA ciphertexts


def rsa_key(enclave: Enclave, spec: str = "RSA_2048") -> str:
    made = enclave.kms.create_key(KeyUsage="ENCRYPT_DECRYPT", KeySpec=spec)
    arn: str = made["KeyMetadata"]["Arn"]
    return arn


@pytest.mark.parametrize(("spec", "algorithm", "most"), [
    ("RSA_2048", "RSAES_OAEP_SHA_256", 190), ("RSA_4096", "RSAES_OAEP_SHA_1", 470)
])  # fmt: skip
def test_encrypt_with_the_public_key_of_kms(
    enclave: Enclave, spec: str, algorithm: str, most: int
) -> None:
    key = rsa_key(enclave, spec)
    how = ["--algorithm", algorithm]
    enclave.place(bytes(most), "plain")
    assert enclave.attestor("encrypt", "--key-id", key, *how, "plain", "blob") == DONE
    assert (enclave.folder / "blob").stat().st_size == int(spec[-4:]) // 8
    assert enclave.attestor("decrypt", "--key-id", key, *how, "blob", "out") == DONE
    assert (enclave.folder / "out").read_bytes() == bytes(most)
    enclave.place(bytes(most + 1), "plain")
    run = enclave.attestor("encrypt", "--key-id", key, *how, "-f", "plain", "blob")
    assert run.status == 2
    assert f"longer than the {most} bytes that {spec} with {algorithm} takes" in run.error


@pytest.mark.parametrize("form", ["PEM", "DER"])
def test_encrypt_with_a_public_key_from_a_file(enclave: Enclave, form: str) -> None:
    key = rsa_key(enclave)
    der = enclave.kms.get_public_key(KeyId=key)["PublicKey"]
    encoding = {"PEM": serialization.Encoding.PEM, "DER": serialization.Encoding.DER}[form]
    subject = serialization.PublicFormat.SubjectPublicKeyInfo
    public = serialization.load_der_public_key(der).public_bytes(encoding, subject)
    enclave.place(public, "rsa.pub")
    enclave.place(b"the secret", "plain")
    offline: dict[str, str | None] = dict.fromkeys(
        ("AWS_ACCESS_KEY_ID", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_KMS")
    )
    run = enclave.attestor(
        "encrypt", "--algorithm", RSA, "--public-key", "rsa.pub", "plain", "blob",
        environment=offline,
    )  # fmt: skip
    assert run == DONE
    assert enclave.attestor("decrypt", "--key-id", key, "--algorithm", RSA, "blob", "out") == DONE
    assert (enclave.folder / "out").read_bytes() == b"the secret"


def spki(key: Any) -> bytes:
    der: bytes = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return der


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        (["--public-key", "rsa.pub"], 2, "--public-key needs --algorithm"),
        (["--algorithm", RSA], 2, "needs --key-id"),
        (["--algorithm", "SM2PKE", "--public-key", "rsa.pub"], 2, "only by KMS"),
        (["--algorithm", "ROT13", "--public-key", "rsa.pub"], 2, "is none of"),
        (["--algorithm", RSA, "--public-key", "rsa.pub", "--key-id", ARN], 2, "contradicts"),
        (["--algorithm", RSA, "--public-key", "rsa.pub", "--format", "esdk"], 2, "contradicts"),
        (["--algorithm", RSA, "--public-key", "rsa.pub", "--context", "a=b"], 2,
         "takes no encryption context"),
        (["--algorithm", RSA, "--public-key", "ec.pub"], 2, "is no RSA key of 2048, 3072, 4096"),
        (["--algorithm", RSA, "--public-key", "small.pub"], 2, "is no RSA key of"),
        (["--algorithm", RSA, "--public-key", "text.pub"], 2, "is no SubjectPublicKeyInfo"),
        (["--algorithm", RSA, "--public-key", "damaged.pub"], 2, "cannot be read"),
        (["--algorithm", RSA, "--public-key", "absent"], 2, "cannot be read"),
        (["--algorithm", RSA, "--key-id", ARN], 4, "refused to get public key: NotFound"),
        (["--algorithm", RSA, "--key-id", "alias/nitrosim"], 4, ""),
    ],
)  # fmt: skip
def test_what_cannot_be_encrypted(
    enclave: Enclave, arguments: list[str], status: int, part: str
) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    enclave.place(spki(key), "rsa.pub")
    enclave.place(spki(ec.generate_private_key(ec.SECP256R1())), "ec.pub")
    enclave.place(
        spki(rsa.generate_private_key(public_exponent=65537, key_size=1024)),  # noqa: S505
        "small.pub",
    )
    enclave.place(base64.b64encode(spki(key)), "text.pub")
    enclave.place(spki(key)[:-1], "damaged.pub")
    enclave.place(b"the secret", "plain")
    before = enclave.files()
    run = enclave.attestor("encrypt", *arguments, "plain", "out")
    assert run.status == status, run.err
    assert part in run.error
    assert ("base64 -d first" in run.err) == ("text.pub" in arguments)
    assert enclave.files() == before


def test_an_rsa_key_of_another_use(enclave: Enclave) -> None:
    signing = enclave.kms.create_key(KeyUsage="SIGN_VERIFY", KeySpec="RSA_2048")
    key = signing["KeyMetadata"]["Arn"]
    enclave.place(b"the secret", "plain")
    run = enclave.attestor("encrypt", "--key-id", key, "--algorithm", RSA, "plain", "out")
    assert run.status == 4
    assert run.error == f"key {key} is RSA_2048 and takes no encryption, not {RSA}"
    assert enclave.files() == {"plain"}


def test_inject_opens_rsa_ciphertexts(enclave: Enclave) -> None:
    key = rsa_key(enclave)
    enclave.place(b"the secret", "plain")
    how = ["--key-id", key, "--algorithm", RSA]
    assert enclave.attestor("encrypt", *how, "plain", "blob") == DONE
    text = base64.encodebytes((enclave.folder / "blob").read_bytes())
    enclave.place(text, "text")
    manifest = "".join(
        f'[[secret]]\nunbound = true\nkey_id = "{key}"\nsource = "{enclave.folder}/{source}"\n'
        f'target = "{enclave.folder}/{source}.out"\nalgorithm = "{RSA}"\nencoding = "{encoding}"\n'
        for source, encoding in (("blob", "raw"), ("text", "base64"))
    )
    enclave.place(manifest.encode(), "m.toml")
    assert enclave.attestor("inject", "m.toml") == DONE
    for source in ("blob", "text"):
        assert (enclave.folder / f"{source}.out").read_bytes() == b"the secret"


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (f'key_id = "{ARN}"\ncontext = {{a = "b"}}\nalgorithm = "{RSA}"',
         f"secret 1: algorithm {RSA} takes no encryption context"),
        (f'key_id = "{ARN}"\nalgorithm = "{RSA}"', "secret 1 has no context"),
        (f'key_id = "{ARN}"\nunbound = true\nalgorithm = "ROT13"', "algorithm ROT13 is none of"),
        (f'unbound = true\nalgorithm = "{RSA}"', f"secret 1: algorithm {RSA} needs key_id"),
        (f'key_id = "{ARN}"\nunbound = true\nalgorithm = "{RSA}"\nform = "message"',
         f"secret 1: a message has no algorithm {RSA}"),
        (f'key_id = "{ARN}"\nunbound = true\nalgorithm = "{RSA}"\nsigned = true',
         f"secret 1: a message has no algorithm {RSA}"),
    ],
)  # fmt: skip
def test_manifests_that_contradict_an_algorithm(enclave: Enclave, lines: str, part: str) -> None:
    manifest = f'any_key = true\nregion = "eu-west-1"\n[[secret]]\nsource = "-"\n{lines}\n'
    enclave.place(f'{manifest}target = "{enclave.folder}/target"\n'.encode(), "m.toml")
    run = enclave.attestor("inject", "m.toml")
    assert run.status == 2, run.err
    assert part in run.error
    if part.endswith("no context"):
        assert "anybody with the public key can make another one" in run.err


def test_a_ciphertext_of_an_rsa_key_without_its_algorithm(enclave: Enclave) -> None:
    key = rsa_key(enclave)
    enclave.place(b"the secret", "plain")
    how = ["--key-id", key, "--algorithm", RSA]
    assert enclave.attestor("encrypt", *how, "plain", "blob") == DONE
    for options in ([], ["--key-id", key]):
        run = enclave.attestor("decrypt", *options, "blob", "out")
        assert run.status == 4, run.err
        assert "hint: 256 bytes are the length of an RSA ciphertext" in run.err
        assert f"--algorithm {RSA}" in run.err
    for size, hinted in ((255, False), (384, True), (512, True), (513, False)):
        enclave.place(os.urandom(size))
        run = enclave.decrypt()
        assert run.status == 4
        assert ("the length of an RSA ciphertext" in run.err) == hinted
    run = enclave.attestor("encrypt", "--key-id", key, "plain", "out")
    assert run.status == 4
    assert "hint: an RSA key wants --algorithm" in run.err


def test_decrypt_refuses_a_context_with_rsa(enclave: Enclave) -> None:
    enclave.place(bytes(256))
    how = ["--key-id", ARN, "--algorithm", RSA, "--context", "node=3"]
    run = enclave.attestor("decrypt", *how, "blob", "out")
    assert (run.status, run.out) == (2, b"")
    assert "takes no encryption context" in run.error
