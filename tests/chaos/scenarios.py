"""The commands that are tried, and what they are given: ciphertexts, manifests, programs."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from nitrosim.world import World

Before = Literal["absent", "file", "symlink", "hardlink"]
"""What lies where a target will be."""

PROGRAM_STATUS: Final = 42
PLAINTEXT: Final = b"a line of the secret\n" * 150
MESSAGE: Final = b"a line of the message\n" * 500
PLAIN_FILE: Final = b"a line that is no secret\n" * 40
OLD: Final = b"what was there before\n" * 20
CONTEXT: Final = {"node": "3"}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What every run is given; the driver writes it once, and the workers read where it is."""

    folder: str
    root: str
    key_arn: str
    blob_size: int
    pair_blob_size: int

    def save(self) -> None:
        """Write it for the workers."""
        (Path(self.folder) / "inputs.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Inputs:
        """Read what `save` wrote."""
        return cls(**json.loads((folder / "inputs.json").read_text(encoding="utf-8")))


@dataclass(frozen=True, slots=True)
class Target:
    """One file that a command writes: its path below the root, what it holds, what was there."""

    path: str
    kind: str
    before: Before = "absent"
    mode: int = 0o600


@dataclass(frozen=True, slots=True)
class Scenario:
    """One command, with paths in it as {inputs}, {root} and {key}.

    `status` is that of a run to which nothing happens; `program` says that it becomes a program,
    which cannot be run where `status` is not PROGRAM_STATUS.
    """

    name: str
    command: str
    targets: tuple[Target, ...]
    status: int = 0
    program: bool = False

    def arguments(self, inputs: Inputs, *, again: bool = False) -> list[str]:
        """Return the command line; `again`: of a run that finds its targets there, and succeeds."""
        words = self.command.split()
        if again and "--force" not in words:
            words.insert(1, "--force")
        if again:
            words = [word.replace("/missing", "/program") for word in words]
        return [
            word.format(inputs=inputs.folder, root=inputs.root, key=inputs.key_arn)
            for word in words
        ]


def _both(
    name: str,
    command: str,
    *targets: tuple[str, str],
    status: int = 0,
    program: bool = False,
) -> list[Scenario]:
    """Run a command on new targets, and with --force on old ones."""
    verb, _, rest = command.partition(" ")
    ways: tuple[tuple[str, str, Before], ...] = (
        ("new", "", "absent"),
        ("force", "--force ", "file"),
    )
    return [
        Scenario(
            f"{name}-{kind}",
            f"{verb} {options}{rest}",
            tuple(Target(path, holds, before) for path, holds in targets),
            status,
            program,
        )
        for kind, options, before in ways
    ]


_DECRYPT: Final = "decrypt --any-key {inputs}/blob {root}/t/out"
_PAIR: Final = "generate-data-key-pair --key-id {key} --spec ECC_NIST_P256"
_MANY: Final = (
    Target("t/a", "plaintext"),
    Target("t/m", "message-plaintext", mode=0o400),
    Target("u/b", "plaintext"),
    Target("u/c", "file"),
    Target("t/receipt", "receipt"),
)
_BEFORE: Final[tuple[Before, ...]] = ("file", "symlink", "hardlink", "absent", "file")
_OLD_MANY: Final = tuple(
    Target(target.path, target.kind, before, target.mode)
    for target, before in zip(_MANY, _BEFORE, strict=True)
)


def _injections() -> list[Scenario]:
    """Inject into two folders, with a receipt: alone, and before a program that runs or cannot."""
    scenarios: list[Scenario] = []
    for kind, options, targets in (("new", "", _MANY), ("force", "--force ", _OLD_MANY)):
        base = f"inject {options}--receipt {{root}}/t/receipt {{inputs}}/many.toml"
        scenarios += [
            Scenario(f"inject-{kind}", base, targets),
            Scenario(
                f"inject-exec-{kind}",
                f"{base} -- {{inputs}}/program x",
                targets,
                PROGRAM_STATUS,
                program=True,
            ),
            Scenario(
                f"inject-missing-{kind}",
                f"{base} -- {{inputs}}/missing x",
                targets,
                126,
                program=True,
            ),
        ]
    return scenarios


def _all() -> list[Scenario]:
    one = ("t/out", "plaintext")
    return [
        *_both("decrypt", _DECRYPT, one),
        Scenario(
            "decrypt-symlink",
            _DECRYPT.replace("decrypt", "decrypt --force", 1),
            (Target(*one, "symlink"),),
        ),
        Scenario(
            "decrypt-hardlink",
            _DECRYPT.replace("decrypt", "decrypt --force", 1),
            (Target(*one, "hardlink"),),
        ),
        *_both(
            "message",
            "decrypt --any-key --context node=3 {inputs}/message {root}/t/out",
            ("t/out", "message-plaintext"),
        ),
        *_both(
            "encrypt",
            "encrypt --key-id {key} --context node=3 {inputs}/plaintext {root}/t/out",
            ("t/out", "blob"),
        ),
        *_both(
            "encrypt-message",
            "encrypt --key-id {key} --format esdk {inputs}/plaintext {root}/t/out",
            ("t/out", "message"),
        ),
        *_both("attest", "attest --nonce 00ff {root}/t/out", ("t/out", "document")),
        *_both(
            "key-pair",
            f"{_PAIR} {{root}}/t/private {{root}}/t/public {{root}}/u/wrapped",
            ("t/private", "private-key"),
            ("t/public", "public-key"),
            ("u/wrapped", "pair-blob"),
        ),
        *_injections(),
    ]


SCENARIOS: Final = {scenario.name: scenario for scenario in _all()}


def is_complete(kind: str, data: bytes, inputs: Inputs) -> bool:
    """Tell whether a target holds all of what it should."""
    exact = {"plaintext": PLAINTEXT, "message-plaintext": MESSAGE, "file": PLAIN_FILE}
    sizes = {"blob": inputs.blob_size, "pair-blob": inputs.pair_blob_size}
    if kind in exact:
        return data == exact[kind]
    if kind in sizes:
        return len(data) == sizes[kind]
    check = {"message": _is_message, "document": _is_document, "receipt": _is_receipt}
    return check[kind](data) if kind in check else _is_pem(data, kind)


def _is_pem(data: bytes, kind: str) -> bool:
    label = kind.replace("-", " ").upper().encode()
    ends = (b"-----BEGIN " + label + b"-----\n", b"-----END " + label + b"-----\n")
    return data.startswith(ends[0]) and data.endswith(ends[1])


def _is_message(message: bytes) -> bool:
    """Look for the footer of an AWS Encryption SDK message: a signature behind its length."""
    sizes = range(95, 110)
    return message.startswith(b"\x02") and any(
        message[-size - 2 : -size] == size.to_bytes(2, "big") for size in sizes
    )


def _is_document(data: bytes) -> bool:
    from nsm.document import AttestationDocument, DocumentError

    try:
        return AttestationDocument.parse(data).nonce == b"\x00\xff"
    except DocumentError:
        return False


def _is_receipt(data: bytes) -> bool:
    try:
        return len(json.loads(data)["entries"]) == len(_MANY) - 1
    except ValueError:
        return False


def write_inputs(folder: Path, root: Path, world: World) -> Inputs:
    """Write all that the scenarios read; os.environ must lead into the world already."""
    import botocore.session

    kms: Any = botocore.session.Session().create_client("kms")
    arn = world.kms.key_arn
    blob = kms.encrypt(KeyId=arn, Plaintext=PLAINTEXT)["CiphertextBlob"]
    bound = kms.encrypt(KeyId=arn, Plaintext=PLAINTEXT, EncryptionContext=CONTEXT)
    pair = kms.generate_data_key_pair_without_plaintext(KeyId=arn, KeyPairSpec="ECC_NIST_P256")
    files = {
        "blob": blob,
        "bound": bound["CiphertextBlob"],
        "message": _message(arn),
        "plaintext": PLAINTEXT,
        "file": PLAIN_FILE,
        "many.toml": _manifest(folder, root, arn).encode(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    _write_programs(folder)
    inputs = Inputs(
        str(folder),
        str(root),
        arn,
        len(bound["CiphertextBlob"]),
        len(pair["PrivateKeyCiphertextBlob"]),
    )
    inputs.save()
    return inputs


def _message(arn: str) -> bytes:
    """Make a message of several frames, so that it is written in several pieces."""
    import aws_encryption_sdk as sdk
    import botocore.session

    keys = sdk.StrictAwsKmsMasterKeyProvider(
        key_ids=[arn], botocore_session=botocore.session.Session()
    )
    message: bytes
    message, _ = sdk.EncryptionSDKClient().encrypt(
        source=MESSAGE, key_provider=keys, encryption_context=CONTEXT, frame_length=4096
    )
    return message


def _manifest(folder: Path, root: Path, arn: str) -> str:
    import hashlib

    sha256 = hashlib.sha256(PLAIN_FILE).hexdigest()
    owner = f"{os.geteuid()}:{os.getegid()}"
    # one thread fills the targets: the order of calls, and so a fault's name, is always the same
    return f"""region = "eu-west-1"
key_id = "{arn}"
concurrency = 1
[[secret]]
source = "{folder}/bound"
target = "{root}/t/a"
context = {{ node = "3" }}
[[secret]]
source = "{folder}/message"
target = "{root}/t/m"
mode = "0400"
context = {{ node = "3" }}
[[secret]]
source = "{folder}/blob"
target = "{root}/u/b"
owner = "{owner}"
unbound = true
[[file]]
source = "{folder}/file"
target = "{root}/u/c"
sha256 = "{sha256}"
"""


def _write_programs(folder: Path) -> None:
    for name, interpreter in (("program", "/bin/sh"), ("missing", f"{folder}/no-such-shell")):
        script = folder / name
        script.write_text(f"#!{interpreter}\nexit {PROGRAM_STATUS}\n", encoding="ascii")
        script.chmod(0o755)
