"""Every hint is followed: what it says is run, and then the command does its job.

A new hint belongs into LEADS, with what it leads to, or into NOTHING_TO_RUN, with the reason.
"""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import botocore
import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from nitrosim.kms import default_policy, role_of
from nitrosim.module import DEFAULT_PCRS, SoftwareNsm
from nitrosim.world import World
from nsm.document import AttestationDocument
from tests.conftest import ROOT, Enclave
from tests.forked import ForkServer
from tests.hints import all_hints

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Run


OTHER_ROOTS: Final = Path(botocore.__file__).with_name("cacert.pem")


class Lead(NamedTuple):
    """A hint, the command that gives it, and the lines that follow it, which must succeed.

    A line begins with variables (NAME=, without a value, removes one), and is a command of
    attestor's, or behind "!" one of the shell's. $KEY is the key's ARN, $ROLE the enclave's.
    """

    hint: str
    first: str
    then: tuple[str, ...]


_OPEN: Final = "decrypt --any-key -f blob out"
_VERIFY: Final = "verify --any-image --root $ROOT"
_EXPLAIN: Final = "policy explain keyed.json --principal $ROLE"
_RENDER: Final = "policy render --principal $ROLE --admin arn:aws:iam::111122223333:role/a"
LEADS: Final = [
    Lead("--help shows arguments and options", "decrypt --nonsense", ("decrypt --help",)),
    Lead(
        "perhaps a variable of the shell is not set",
        'decrypt --any-key blob "$OUTPUT"',
        ("!OUTPUT=out", _OPEN),
    ),
    Lead("leave one of them out", "decrypt --any-key --key-id $KEY blob out", (_OPEN,)),
    Lead("leave one of them out", f"{_VERIFY} --at document --max-age 5 doc", (f"{_VERIFY} doc",)),
    Lead("--force replaces it", "decrypt --any-key blob plain.old", (f"{_OPEN}",)),
    Lead("mkdir -p {} makes it", "decrypt --any-key blob no/out",
         ("!mkdir -p no", "decrypt --any-key -f blob no/out")),
    *(
        Lead("give --region (in a manifest: region), set AWS_REGION, or name the key by its ARN",
             "AWS_REGION= AWS_DEFAULT_REGION= decrypt --any-key blob out", (then,))
        for then in (
            "AWS_REGION= AWS_DEFAULT_REGION= decrypt --any-key -f --region eu-west-1 blob out",
            f"AWS_REGION=eu-west-1 AWS_DEFAULT_REGION= {_OPEN}",
            "AWS_REGION= AWS_DEFAULT_REGION= decrypt --key-id $KEY -f blob out",
        )
    ),
    # the ciphertext
    Lead("add {}", "decrypt --any-key blob.b64 out",
         ("decrypt --any-key -f --base64 blob.b64 out",)),
    Lead("add {}", "inject -f base64.toml", ("inject -f base64-said.toml",)),
    Lead("base64 -d removes one layer, and {} another",
         "decrypt --any-key --base64 blob.b64.b64 out",
         ("!base64 -d < blob.b64.b64 > one", "decrypt --any-key -f --base64 one out")),
    Lead("tr -- -_ +/ makes it base64 text", "decrypt --any-key blob.url out",
         ("!tr -- -_ +/ < blob.url > made", "decrypt --any-key -f --base64 made out")),
    Lead("xxd -r -p prints the bytes that it stands for", "decrypt --any-key blob.hex out",
         ("!xxd -r -p < blob.hex > bytes", "decrypt --any-key -f bytes out")),
    Lead("swapped arguments? {}", "decrypt --any-key plain blob",
         ("decrypt --any-key -f blob plain.out",)),
    Lead("attestor encrypt makes a ciphertext of a plaintext", "inject -f plain.toml",
         ("encrypt --key-id $KEY -f plain enc", "decrypt --any-key -f enc out")),
    Lead("two pairs: {} {}=... {} {}=...", "decrypt --any-key --context node=3,app=x bound out",
         ("decrypt --any-key -f --context node=3 --context app=x bound out",)),
    Lead("one value: {} '{\"{}\": \"...\"}'", "decrypt --any-key --context node=3,app=x comma out",
         ("""decrypt --any-key -f --context '{"node": "3,app=x"}' comma out""",)),
    Lead("--context-contains, or context_contains = true, lets it hold more names",
         "decrypt --any-key -f message out",
         ("decrypt --any-key -f --context-contains message out",)),
    # keys
    Lead("--key-id names it", "encrypt -f plain enc", ("encrypt --key-id $KEY -f plain enc",)),
    Lead("RSAES_OAEP_SHA_256 is the usual one", "encrypt -f --public-key rsa.pem plain enc",
         ("encrypt -f --public-key rsa.pem --algorithm RSAES_OAEP_SHA_256 plain enc",)),
    Lead("a symmetric key takes any length",
         "encrypt -f --public-key rsa.pem --algorithm RSAES_OAEP_SHA_256 long enc",
         ("encrypt -f --key-id $KEY long enc",)),
    Lead("it is base64 text, as the AWS CLI prints it: base64 -d first",
         "encrypt -f --public-key rsa.b64 --algorithm RSAES_OAEP_SHA_256 plain enc",
         ("!base64 -d < rsa.b64 > rsa.der",
          "encrypt -f --public-key rsa.der --algorithm RSAES_OAEP_SHA_256 plain enc")),
    # surroundings
    Lead("set the clock, and try again", f"CLOCK_AHEAD=9000 {_OPEN}", (_OPEN,)),
    Lead("set the clock of this {}", "CLOCK_AHEAD=-9000 doctor blob", ("doctor blob",)),
    Lead("in an enclave the parent must pass them on, and renew them when they expire",
         f"AWS_ACCESS_KEY_ID= AWS_SECRET_ACCESS_KEY= {_OPEN}", (_OPEN,)),
    Lead("they are expired: renew them",
         f"AWS_CREDENTIAL_EXPIRATION=2020-01-01T00:00:00Z {_OPEN}", (_OPEN,)),
    Lead("somebody may be in the middle; AWS_CA_BUNDLE names the roots to trust",
         f"AWS_CA_BUNDLE={OTHER_ROOTS} {_OPEN}", (_OPEN,)),
    Lead("TLS is what authenticates the answer of KMS",
         "decrypt --any-key --endpoint-url http://localhost blob out", (_OPEN,)),
    Lead("an option, AWS_ENDPOINT_URL_KMS, AWS_ENDPOINT_URL or endpoint_url of a profile names it",
         f"AWS_ENDPOINT_URL_KMS= AWS_ENDPOINT_URL=http://localhost {_OPEN}", (_OPEN,)),
    Lead("a variable AWS_... or a profile says so", f"AWS_MAX_ATTEMPTS=many {_OPEN}",
         (f"AWS_MAX_ATTEMPTS=1 {_OPEN}",)),
    Lead("make libnsm builds it; without --nsm-library and NSM_LIBRARY none is needed",
         "NSM_LIBRARY=/nowhere doctor blob", ("doctor blob",)),
    Lead("a real enclave's is AWS's; --root FILE trusts another, $NITROSIM_NSM_ROOT nitrosim's",
         "doctor blob", ("doctor --root $NITROSIM_NSM_ROOT blob",)),
    Lead("use --imds-vsock", "decrypt --any-key --host-vsock 169.254.169.254=3:8002 blob out",
         ("decrypt --any-key -f --imds-vsock 3:8002 blob out",)),
    # documents
    Lead("--root FILE trusts another root; nitrosim's is in $NITROSIM_NSM_ROOT",
         "verify --any-image doc", ("verify --any-image --root $NITROSIM_NSM_ROOT doc",)),
    Lead("give --pcr, --measurements or --eif, or --any-image if that is meant",
         "verify --root $ROOT doc",
         ("verify --root $ROOT --measurements m.json doc", f"{_VERIFY} doc")),
    Lead("--allow-debug accepts it, for tests", f"{_VERIFY} debug.doc",
         (f"{_VERIFY} --allow-debug debug.doc",)),
    Lead("it attests zeros, not its image: --measurements takes what nitro-cli printed of the "
         "image, and --eif the image itself",
         f"{_RENDER} --root $ROOT --document debug.doc", (f"{_RENDER} --measurements m.json",)),
    Lead("a document is valid for three hours: --at document verifies it at its own timestamp, "
         "--at TIME then", f"{_VERIFY} old.doc",
         (f"{_VERIFY} --at document old.doc", f"{_VERIFY} --at $THEN old.doc")),
    Lead("a document is binary, as attestor attest writes it: decode base64 text first",
         f"{_VERIFY} doc.b64", ("!base64 -d < doc.b64 > decoded", f"{_VERIFY} decoded")),
    Lead("--pcr is of enclaves, --nitrotpm-pcr of EC2 instances: they measure other things",
         "verify --root $ROOT --nitrotpm-pcr 4=$PCR0 doc",
         ("verify --root $ROOT --pcr 0=$PCR0 doc",)),
    # policies
    Lead("it has {}", f"{_RENDER} --measurements m.json --take 8",
         (f"{_RENDER} --measurements m.json --take 0",)),
    Lead("give the key's ARN as --key-id", f"{_EXPLAIN} --pcr 0=$PCR0",
         (f"{_EXPLAIN} --pcr 0=$PCR0 --key-id $KEY",)),
    Lead("leave it out; {} carry one",
         "policy explain policy.json --principal $ROLE --action kms:Encrypt --pcr 0=$PCR0",
         ("policy explain policy.json --principal $ROLE --action kms:Encrypt",)),
    Lead("did you mean {}?", "policy explain policy.json --principal $ROLE --action Encrypt",
         ("policy explain policy.json --principal $ROLE --action kms:Encrypt",)),
    *(
        Lead("leave out --document, or all of them",
             f"{_EXPLAIN} --key-id $KEY --root $ROOT --document doc --pcr 0=$PCR0",
             (f"{_EXPLAIN} --key-id $KEY {then}",))
        for then in ("--root $ROOT --document doc", "--pcr 0=$PCR0")
    ),
    Lead("use a key for each", f"{_RENDER} --pcr 0=$PCR0 --nitrotpm-pcr 4=$PCR0",
         (f"{_RENDER} --pcr 0=$PCR0", f"{_RENDER} --nitrotpm-pcr 7=$PCR0")),
    # manifests
    Lead('context = { name = "value" } binds it, or say unbound = true',
         "inject -f no-context.toml",
         ("inject -f good.toml",)),
    Lead("key_id wants a key ARN or key id; any_key = true accepts every key",
         "inject -f no-key.toml", ("inject -f good.toml",)),
    Lead("world_readable = true says that this is meant", "inject -f open.toml",
         ("inject -f open-said.toml",)),
    Lead("a variable may stand only in the path", "inject -f --set N=s3 variable.toml",
         ("inject --set N=blob -f variable-said.toml",)),
    Lead("--set {}=VALUE gives one", "inject -f variable-said.toml",
         ("inject --set N=blob -f variable-said.toml",)),
    Lead("anybody with the public key can make another one: unbound = true accepts that",
         "inject -f rsa.toml", ("inject -f rsa-said.toml",)),
    Lead("attestor inject MANIFEST -- PROGRAM names one", "inject -f program.toml",
         ("inject -f program.toml -- true",)),
    Lead('format = "json" can hold it', "inject -f dotenv.toml", ("inject -f json.toml",)),
    Lead('context = { version = "${VERSION}" } says which one it is; only a message of the AWS '
         "Encryption SDK carries its own",
         "inject -f new.toml", ("inject -f --set VERSION=7 new-said.toml",)),
]  # fmt: skip
NOTHING_TO_RUN: Final = {
    reason: set(hints)
    for reason, *hints in (
        ("of another machine, or of somebody's own",
         "PowerShell's > writes that: have the bytes written that the text stands for",
         "an enclave has no DNS of its own: name the endpoint in /etc/hosts, or use --vsock",
         "attestor encrypt, or the AWS Encryption SDK from 2.0 on, writes one with it",
         "take a client of botocore, and call it by asyncio.to_thread",
         "is vsock-proxy running on the parent, and does it listen on this port?",
         ("vsock-proxy does that if its allow list lacks the host, or if it cannot reach the host "
          "itself"),
         "is vsock-proxy running on the parent, and does it allow this endpoint?",
         "a file that it is made of may have changed meanwhile",
         "this is a bug in attestor: please report it"),
        ("a TPM that others use is in tests/test_tpm.py alone",
         "--tpm /dev/tpm0 goes around the kernel's resource manager",
         "the TPM is locked for a while: tpm2_dictionarylockout --clear-lockout unlocks it",
         "the owner of this TPM has set a password, but an empty one is used here",
         "indexes of other programs fill the TPM: tpm2_nvundefine removes one",
         "an EC2 instance has one if its image was registered with TPM support v2.0"),
        ("the AWS CLI is not here",
         "aws kms ... --query CiphertextBlob --output text | base64 -d prints the bytes",
         "aws kms get-key-policy --key-id KEY --query Policy --output text prints the policy",
         ("aws ec2 modify-instance-metadata-options --instance-id ID --instance-metadata-tags "
          "enabled lets it show them"),
         ("it takes connections but gives no token: a hop limit of 1 does that to containers; "
          "aws ec2 modify-instance-metadata-options --instance-id ID --http-put-response-hop-limit "
          "2 mends it")),
        ("nitro-cli is not here",
         ("another image, kernel or instance: compare with what nitro-cli build-enclave printed, "
          "or nitro-tpm-pcr-compute"),
         "start the enclave without --debug-mode: no key policy should allow zero PCRs"),
        ("needs a package index",
         "pip install '.[esdk]' in a checkout of nitro-attestor brings it",
         "pip install '.[serve]' in a checkout of nitro-attestor brings it",
         "this is the script alone: pip install . in a checkout of nitro-attestor brings it"),
        ("a question, a fact or a warning",
         "is this endpoint AWS KMS?",
         "this does not look like a Nitro Enclave: only there is the module's device",
         "the device is there: another process holds it",
         "the device is there: this user or a sandbox lacks permission to use it",
         "decrypt can do without",
         "decrypt does that, if it may: CAP_SYS_ADMIN",
         "trust no key that is made here",
         "renew them",
         "name fewer principals, administrators and encryptors"),
        ("tests/test_stored_values.py has what it speaks of",
         ("a plaintext there is the parent's to read: store what attestor encrypt writes, "
          "in base64")),
        ("it goes on until a signal comes: tests/test_serve.py", "give --socket FILE, or --port N"),
        ("tests/test_watch.py has what it speaks of",
         "every file must be right in it: all of them are replaced at once",
         'on_change = "restart" starts it again; a target can change beside it'),
        ("tests/test_output.py has a terminal", "name a file, or pipe it into a program"),
        ("test_what_fits",
         "the first {} of {} binds fit: use another key for the rest",
         "the first {} of {} images fit: leave old ones out"),
    )
}  # fmt: skip


def test_every_hint_is_followed() -> None:
    known = {lead.hint for lead in LEADS}.union(*NOTHING_TO_RUN.values())
    found = all_hints()
    assert found - known == set(), "follow it in LEADS"
    assert known - found == set(), "nobody gives it any more"


class Prompt:
    """A shell's prompt in one simulated enclave, in a folder with a file of every kind."""

    def __init__(self, enclave: Enclave, server: ForkServer, words: dict[str, str]) -> None:
        self._enclave, self._server, self._words = enclave, server, words

    def place(self, data: bytes, name: str) -> None:
        """Write a file into the folder."""
        self._enclave.place(data, name)

    def run(self, line: str) -> Run:
        """Run one line."""
        if line.startswith("!"):
            return self._enclave.run("sh", "-euc", line[1:])
        words = shlex.split(re.sub(r"\$(\w+)", lambda name: self._words[name[1]], line))
        environment: dict[str, str | None] = {}
        while re.match(r"[A-Z_]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            environment[name] = value or None
        return self._server.attestor(*words, environment=environment)


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory, preload: Path) -> Iterator[Prompt]:
    folder = tmp_path_factory.mktemp("prompt")
    with World() as world:
        enclave = Enclave(world, folder)
        fill(enclave)
        old = AttestationDocument.parse((folder / "old.doc").read_bytes())
        words = {
            "KEY": world.kms.key_arn,
            "ROLE": role_of(world.kms.principal),
            "ROOT": enclave.environment["NITROSIM_NSM_ROOT"],
            "NITROSIM_NSM_ROOT": enclave.environment["NITROSIM_NSM_ROOT"],
            "PCR0": DEFAULT_PCRS[0].hex(),
            "THEN": (old.signed_at + timedelta(minutes=1)).isoformat(timespec="seconds"),
            "OUTPUT": "",
        }
        environment = enclave.environment | {
            "LD_PRELOAD": f"{preload}:{enclave.environment['LD_PRELOAD']}",
            "PYTHONPATH": str(ROOT),
        }
        with ForkServer(environment, folder, vsock_to_tcp=True) as server:
            made = Prompt(enclave, server, words)
            options = "--key-id $KEY --context node=3 --context app=x -f --format esdk"
            assert made.run(f"encrypt {options} plain message").status == 0
            assert made.run("attest doc").status == 0
            enclave.place(base64.encodebytes((folder / "doc").read_bytes()), "doc.b64")
            yield made


def fill(enclave: Enclave) -> None:
    """Place what the lines name."""
    blob = enclave.encrypt()
    while not {b"+", b"/"} & set(re.findall(rb"[+/]", base64.b64encode(blob))):
        blob = enclave.encrypt()
    text = base64.encodebytes(blob)
    for name, data in {
        "blob": blob,
        "blob.b64": text,
        "blob.b64.b64": base64.encodebytes(text),
        "blob.url": base64.urlsafe_b64encode(blob),
        "blob.hex": blob.hex().encode(),
        "plain": b"a plaintext that somebody wrote\n",
        "plain.old": b"",
        "long": bytes(3000),
        "bound": enclave.encrypt(node="3", app="x"),
        "quoted": enclave.encrypt(b"it's"),
        "versioned": enclave.encrypt(version="7"),
        "comma": enclave.encrypt(node="3,app=x"),
    }.items():
        enclave.place(data, name)
    key = rsa.generate_private_key(65537, 2048).public_key()
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    enclave.place(pem, "rsa.pem")
    enclave.place(base64.encodebytes(der), "rsa.b64")
    pki = enclave.world.module._pki
    enclave.place(document(SoftwareNsm(pki, debug=True)), "debug.doc")
    enclave.place(document(SoftwareNsm(pki, fault="expired-leaf")), "old.doc")
    fill_policies(enclave)
    fill_manifests(enclave)


def document(module: SoftwareNsm) -> bytes:
    """An attestation document of this module."""
    request = cbor2.dumps({"Attestation": {"user_data": None, "nonce": None, "public_key": None}})
    answer: dict[str, Any] = cbor2.loads(module.answer(request))
    signed: bytes = answer["Attestation"]["document"]
    return signed


def fill_policies(enclave: Enclave) -> None:
    policy = default_policy(role_of(enclave.world.kms.principal), DEFAULT_PCRS[0])
    enclave.place(policy.encode(), "policy.json")
    keyed = json.loads(policy)
    for statement in keyed["Statement"]:
        statement["Resource"] = enclave.world.kms.key_arn
    enclave.place(json.dumps(keyed).encode(), "keyed.json")
    measured = {f"PCR{index}": DEFAULT_PCRS[index].hex() for index in (0, 1, 2)}
    measurements = {"HashAlgorithm": "Sha384 { ... }", **measured}
    enclave.place(json.dumps({"Measurements": measurements}).encode(), "m.json")


def fill_manifests(enclave: Enclave) -> None:
    folder, key = enclave.folder, enclave.world.kms.key_arn
    rsa_key = enclave.kms.create_key(KeySpec="RSA_2048", KeyUsage="ENCRYPT_DECRYPT")["KeyMetadata"]
    sealed = enclave.kms.encrypt(
        KeyId=rsa_key["Arn"], Plaintext=b"x", EncryptionAlgorithm="RSAES_OAEP_SHA_256"
    )["CiphertextBlob"]
    enclave.place(sealed, "sealed")
    pinned, unbound = f'key_id = "{key}"', "unbound = true"
    asymmetric = f'key_id = "{rsa_key["Arn"]}"\nalgorithm = "RSAES_OAEP_SHA_256"'
    parts = {
        "good": (pinned, f"{folder}/blob", unbound),
        "no-context": (pinned, f"{folder}/blob", ""),
        "no-key": ("", f"{folder}/blob", unbound),
        "plain": (pinned, f"{folder}/plain", unbound),
        "base64": (pinned, f"{folder}/blob.b64", unbound),
        "base64-said": (pinned, f"{folder}/blob.b64", f'{unbound}\nencoding = "base64"'),
        "open": (pinned, f"{folder}/blob", f'{unbound}\nmode = "0644"'),
        "open-said": (pinned, f"{folder}/blob", f'{unbound}\nmode = "0644"\nworld_readable = true'),
        "variable": (f'{pinned}\n[variables]\nN = "[a-z0-9]+"', "${N}://bucket/key", unbound),
        "variable-said": (f'{pinned}\n[variables]\nN = "[a-z]+"', f"{folder}/${{N}}", unbound),
        "node": (
            f'{pinned}\n[variables]\nNODE = "[0-9]"',
            f"{folder}/bound",
            'context = { node = "${NODE}", app = "x" }',
        ),
        "new": (pinned, f"{folder}/versioned", f"{unbound}\nminimum_version = 5"),
        "new-said": (
            f'{pinned}\n[variables]\nVERSION = "[0-9]+"',
            f"{folder}/versioned",
            'context = { version = "${VERSION}" }\nminimum_version = 5',
        ),
        "rsa": ("", f"{folder}/sealed", asymmetric),
        "rsa-said": ("", f"{folder}/sealed", f"{asymmetric}\n{unbound}"),
    }
    for name, (top, source, rest) in parts.items():
        secret = f'[[secret]]\nsource = "{source}"\ntarget = "{folder}/secret"\n{rest}\n'
        enclave.place(f"{top}\n{secret}".encode(), f"{name}.toml")
    text = f'{pinned}\n[[secret]]\nsource = "{folder}/blob"\n{unbound}\nenvironment = "SECRET"\n'
    enclave.place(text.encode(), "program.toml")
    for name in ("dotenv", "json"):
        member = f'[document.secrets.A]\nsource = "{folder}/quoted"\n{unbound}\n'
        place = f'target = "{folder}/document"\nformat = "{name}"\n'
        enclave.place(f"{pinned}\n[[document]]\n{place}{member}".encode(), f"{name}.toml")


@pytest.mark.parametrize("lead", LEADS, ids=[f"{lead.hint[:40]} {lead.then[0]}" for lead in LEADS])
def test_a_hint(prompt: Prompt, lead: Lead) -> None:
    tools = {line[1:].split()[0] for line in lead.then if line.startswith("!") and "=" not in line}
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    pattern = re.escape(lead.hint).replace(r"\{\}", "(.*)")
    run = prompt.run(lead.first)
    said = f"{run.err} {' '.join(run.out.decode().split())}"
    assert re.search(pattern, said), said
    if not lead.first.startswith("doctor"):
        assert run.status != 0
    for line in lead.then:
        run = prompt.run(line)
        assert run.status == 0, (line, run)
    assert not re.search(pattern, f"{run.err} {' '.join(run.out.decode().split())}")


@pytest.mark.parametrize("what", ["binds", "images"])
def test_what_fits(prompt: Prompt, what: str) -> None:
    """As many of the first as the hint says make a policy, and one more does not."""
    count = 300

    def render(most: int) -> Run:
        bound = "".join(f" --bind node={number}:$ROLE-{number}" for number in range(most))
        images = "".join(f" --measurements image-{number}.json" for number in range(most))
        return prompt.run(
            _RENDER + (bound + " --measurements m.json" if what == "binds" else images)
        )

    for number in range(count):
        image = {"HashAlgorithm": "SHA384", "PCR0": f"{number + 1:096x}"}
        prompt.place(json.dumps({"Measurements": image}).encode(), f"image-{number}.json")
    found = re.search(rf"the first (\d+) of {count} {what} fit", render(count).err)
    assert found
    assert render(int(found[1])).status == 0
    assert render(int(found[1]) + 1).status == 2


def test_from_a_refusal_to_the_condition_that_does_not_hold(
    enclaves: Callable[..., Enclave],
) -> None:
    """By the commands that the hints say, each as it stands."""
    enclave = enclaves(pcrs={0: bytes(47) + b"\1"})
    enclave.place(enclave.encrypt())
    role = role_of(enclave.world.kms.principal)
    enclave.place(default_policy(role, DEFAULT_PCRS[0]).encode(), "POLICY")
    run = enclave.decrypt()
    assert "sent PCR0 000000000000...0001, " in run.err  # and not as in debug mode
    hint = run.err.splitlines()[-1].removeprefix("attestor: hint: ")
    commands = [line.split(", then ")[-1] for line in hint.rpartition(": ")[0].split(", then ")]
    attest, explain = (line.split()[1:] for line in commands)
    assert enclave.attestor(*attest).status == 0
    run = enclave.attestor(*explain)
    assert "--root FILE trusts another root; nitrosim's is in $NITROSIM_NSM_ROOT" in run.err
    run = enclave.attestor(*explain, "--root", enclave.environment["NITROSIM_NSM_ROOT"])
    assert run.status == 4
    assert b"PCR0" in run.out


def test_from_a_refusal_to_doctor(enclave: Enclave) -> None:
    """With the same options, as the hint says."""
    enclave.place(enclave.encrypt())
    wrong: dict[str, str | None] = {"AWS_SECRET_ACCESS_KEY": "wrong"}
    run = enclave.decrypt(environment=wrong)
    assert "attestor doctor CIPHERTEXT, with the same options, " in run.err
    doctor = enclave.attestor("doctor", "blob", environment=wrong)
    assert doctor.status == run.status == 4
    assert b"attestor doctor" not in doctor.out  # which is what runs


def test_a_wrong_context_in_a_manifest_is_explained_in_its_words(prompt: Prompt) -> None:
    """inject has no --context: its values come from --set, or from the instance's tag."""
    run = prompt.run("inject -f --set NODE=4 node.toml")
    assert run.status == 4, run.err
    assert "or context in the manifest and the variables in it" in run.err
    assert prompt.run("inject -f --set NODE=3 node.toml").status == 0


def test_a_simulator_without_a_metadata_service_says_what_starts_one(enclave: Enclave) -> None:
    """And does not lead to that of the host, which may refuse, or answer."""
    nitrosim = [sys.executable, "-m", "nitrosim.cli", "run"]
    command = ["--", sys.executable, "-m", "attestor", "metadata", "placement/region"]
    run = enclave.run(*nitrosim, *command)
    assert run.status == 5, run.err
    assert "only-with-tag.nitrosim" in run.error
    assert enclave.run(*nitrosim, "--tag", "a=b", *command).out == b"eu-west-1\n"


def test_an_endpoint_of_another_region_does_not_blame_the_secret_key(enclave: Enclave) -> None:
    enclave.place(enclave.encrypt())
    run = enclave.decrypt("--region", "eu-central-1")
    assert run.status == 4
    assert "attestor: hint: the endpoint is in another region than " in run.err
    assert "secret key" not in run.err
