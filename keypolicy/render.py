"""A right key policy, written from the PCRs of images: plaintexts for attested enclaves only.

An Allow alone would do until somebody adds another beside it; so each PCR also gets a Deny, which
no Allow overrides ("Policy evaluation logic" of the IAM User Guide).
"""

from __future__ import annotations

import bisect
import json
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn, Self

from keypolicy.findings import PLAINTEXT_ACTIONS, RECIPIENT_ACTIONS
from keypolicy.measure import (
    PCR_BYTES,
    image_identity_problem,
    pcr_names,
    pcr_of_instance,
    pcr_of_role,
)
from keypolicy.model import (
    ENCRYPTION_CONTEXT,
    KEY_POLICY_MAX,
    NITROTPM_PCRS,
    PolicyError,
    Source,
    abbreviated,
    iam_entity_type,
    mixed_partitions,
    nitrotpm_condition_key,
    pcr_condition_key,
)
from keypolicy.nitrotpm import IDENTITY_FIX, indistinct, machine_identity_problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

_ADMINISTRATION: Final = tuple(
    f"kms:{name}"
    for name in """
        CancelKeyDeletion CreateAlias DeleteAlias DescribeKey DisableKey DisableKeyRotation
        EnableKey EnableKeyRotation GetKeyPolicy GetKeyRotationStatus ListGrants ListKeyPolicies
        ListKeyRotations ListResourceTags PutKeyPolicy RevokeGrant RotateKeyOnDemand
        ScheduleKeyDeletion TagResource UntagResource UpdateAlias UpdateKeyDescription
    """.split()
)


class Bind(NamedTuple):
    """An encryption context value that only enclaves with this value of PCR3 or PCR4 may use.

    `parent` is the role's ARN or the instance's id that the PCR is of, where that is known.
    """

    name: str
    value: str
    pcr: int
    digest: bytes
    parent: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read NAME=VALUE:ROLE_ARN or NAME=VALUE:INSTANCE_ID; raises PolicyError."""
        found = re.fullmatch(r"([^=]+)=(.+):(arn:[^:]+:iam::\d{12}:role/.+|i-[0-9a-f]+)", text)
        if not found:
            raise PolicyError(
                f"{abbreviated(text)} is not NAME=VALUE:ROLE_ARN or NAME=VALUE:INSTANCE_ID"
            )
        name, value, parent = found.groups()
        if parent.startswith("arn:"):
            return cls(name, value, 3, pcr_of_role(parent), parent)
        return cls(name, value, 4, pcr_of_instance(parent), parent)


class _Kind(NamedTuple):
    """What differs between policies for enclaves and for instances with a NitroTPM."""

    source: Source
    allow: str
    """the Sid of an Allow, before its number"""
    pcr: str
    """what a PCR is called in a Sid, before its number"""
    condition_key: Callable[[int], str]


_KINDS: Final[Mapping[Source, _Kind]] = {
    "enclave": _Kind("enclave", "Enclave", "PCR", pcr_condition_key),
    "nitrotpm": _Kind("nitrotpm", "Instance", "NitroTPMPCR", nitrotpm_condition_key),
}


class Rendered(NamedTuple):
    """A key policy as a JSON-able object, and what its author should know about it."""

    policy: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def text(self) -> str:
        """Return its JSON as short as can still be read, a line for each statement.

        KMS is not known to leave white space out when it measures a policy.
        """
        version, statements = self.policy["Version"], self.policy["Statement"]
        lines = ",\n".join(json.dumps(part, separators=(",", ":")) for part in statements)
        return f'{{"Version":"{version}","Statement":[\n{lines}\n]}}'

    @property
    def size(self) -> int:
        """The bytes of a file that holds the text, with the end of its last line."""
        return len(self.text) + 1


def render(
    *,
    principals: Sequence[str],
    admins: Sequence[str],
    images: Sequence[Mapping[int, bytes]],
    encryptors: Sequence[str] = (),
    binds: Sequence[Bind] = (),
    actions: Sequence[str] = ("kms:Decrypt",),
    source: Source = "enclave",
) -> Rendered:
    """Write a key policy that gives plaintexts to attested enclaves only, or, with the source
    "nitrotpm", to instances with a NitroTPM only.

    `principals` are the roles (or users) that the enclaves' parents run with, `admins` manage the
    key without using it, `encryptors` may only encrypt. Each image is {PCR index: 48 bytes};
    several are for a roll-over and name the same PCRs. `binds` are of enclaves, `actions` of
    RECIPIENT_ACTIONS. Raises PolicyError for what would be open or useless, or is more than KMS
    takes; `check` finds no fault in what is returned.
    """
    _check_people(principals, admins, encryptors)
    kind = _KINDS[source]
    _check_images(images, kind)
    if binds and source != "enclave":
        raise PolicyError("a context value is bound to the parent of an enclave, not to a NitroTPM")
    _check_binds(binds, actions)
    _check_actions(actions)
    people = (principals, admins, encryptors)
    arns = [*principals, *admins, *encryptors, *(bind.parent for bind in binds)]

    def written(images: Sequence[Mapping[int, bytes]], binds: Sequence[Bind]) -> Rendered:
        policy = _policy(kind, *people, images, binds, actions)
        return Rendered(policy, tuple(_warnings(kind, images[0], arns)))

    rendered = written(images, binds)
    if rendered.size > KEY_POLICY_MAX:
        _refuse_size(written, images, binds)
    return rendered


def _policy(
    kind: _Kind,
    principals: Sequence[str],
    admins: Sequence[str],
    encryptors: Sequence[str],
    images: Sequence[Mapping[int, bytes]],
    binds: Sequence[Bind],
    actions: Sequence[str],
) -> dict[str, Any]:
    """Write the policy of what has been checked."""
    statements = [_allow("Administration", admins, _ADMINISTRATION)]
    if encryptors:
        statements.append(_allow("Encryption", encryptors, ["kms:Encrypt"]))
    for number, image in enumerate(images, start=1):
        allow = _allow(f"{kind.allow}{number}", principals, actions)
        statements.append(allow | {"Condition": _image_condition(kind, image, binds)})
    for index in sorted(images[0]):
        differs = _pcr_differs(kind.condition_key(index), [image[index] for image in images])
        statements.append(_deny(f"DenyOther{kind.pcr}{index}", differs))
    statements += _bind_guards(binds)
    return {"Version": "2012-10-17", "Statement": statements}


def _refuse_size(
    written: Callable[[Sequence[Mapping[int, bytes]], Sequence[Bind]], Rendered],
    images: Sequence[Mapping[int, bytes]],
    binds: Sequence[Bind],
) -> NoReturn:
    """Refuse a policy that is too large, and say how much of it would fit."""

    def fits(images: Sequence[Mapping[int, bytes]], binds: Sequence[Bind]) -> bool:
        return written(images, binds).size <= KEY_POLICY_MAX

    size = written(images, binds).size
    too_large = f"the policy has {size:,} bytes, but KMS takes {KEY_POLICY_MAX:,}"
    # every part only adds to the size, so what fits is a beginning
    if binds and fits(images, ()):
        count = bisect.bisect(range(1, len(binds)), 0, key=lambda n: not fits(images, binds[:n]))
        hint = f"the first {count} of {len(binds)} binds fit: use another key for the rest"
    elif fits(images[:1], ()):
        count = bisect.bisect(range(1, len(images)), 0, key=lambda n: not fits(images[:n], ()))
        hint = f"the first {count} of {len(images)} images fit: leave old ones out"
    else:
        hint = "name fewer principals, administrators and encryptors"
    raise PolicyError(too_large, hint)


# ---- what would be open or useless


def _check_people(
    principals: Sequence[str], admins: Sequence[str], encryptors: Sequence[str]
) -> None:
    """Refuse a missing principal or administrator, a wrong ARN, and a parent with another part."""
    if not principals or not admins:
        missing = "administrator" if principals else "principal"
        raise PolicyError(f"the policy names no {missing}")
    for what, arns in (
        ("principal", principals),
        ("administrator", admins),
        ("encryptor", encryptors),
    ):
        for arn in arns:
            # the account's root leaves the decision to any identity policy
            if iam_entity_type(arn) not in {"role", "user"}:
                raise PolicyError(f"{what} {abbreviated(arn)} is not the ARN of a role or user")
            if what != "principal" and arn in principals:
                raise PolicyError(
                    f"{arn} is the parent instance's, which is not trusted: it cannot be {what} too"
                )


def _check_images(images: Sequence[Mapping[int, bytes]], kind: _Kind) -> None:
    """Refuse images that do not name the same PCRs, or whose PCRs admit other images, too."""
    count = 32 if kind.source == "enclave" else len(NITROTPM_PCRS)
    if not images:
        raise PolicyError("the policy names no image")
    for image in images:
        if set(image) != set(images[0]):
            raise PolicyError(
                f"images name {pcr_names(images[0])} and {pcr_names(image)}, "
                "expected the same PCRs in each"
            )
        for index, value in image.items():
            if not 0 <= index < count or len(value) != PCR_BYTES:
                raise PolicyError(
                    f"PCR{index} has {len(value)} bytes, "
                    f"expected PCR0 to PCR{count - 1} with {PCR_BYTES}"
                )
            _check_value(kind, index, value)
    if kind.source == "enclave":
        problem = image_identity_problem(images[0])
        fix = "add PCR0, PCR8, or PCR1 together with PCR2"
    else:
        problem, fix = machine_identity_problem(images[0]), IDENTITY_FIX
    if problem:
        raise PolicyError(f"{problem}: {fix}")


def _check_value(kind: _Kind, index: int, value: bytes) -> None:
    """Refuse a value that many images have."""
    if kind.source == "enclave" and not any(value):
        raise PolicyError(
            f"PCR{index} is all zeros, which is what an enclave in debug mode attests"
        )
    why = indistinct(index, value.hex()) if kind.source == "nitrotpm" else ""
    if why:
        raise PolicyError(f"NitroTPM PCR{index} tells no image from another: {why}")


def _check_binds(binds: Sequence[Bind], actions: Sequence[str]) -> None:
    """Refuse binds that KMS could not tell apart, or would not take literally."""
    if binds and "kms:DeriveSharedSecret" in actions:
        raise PolicyError("kms:DeriveSharedSecret has no encryption context to bind")
    if len({bind.name.lower() for bind in binds}) != len({bind.name for bind in binds}):
        raise PolicyError(
            "bound context names differ in case only, which condition keys do not tell apart"
        )
    for bind in binds:
        if "${" in bind.value:
            raise PolicyError(
                f"bound value {abbreviated(bind.value)} would be read as a policy variable"
            )
        same = [other for other in binds if (other.name, other.value) == (bind.name, bind.value)]
        if len({other.pcr for other in same}) > 1:
            raise PolicyError(
                f"{bind.name}={bind.value} is bound to a role and to an instance, "
                "expected one of them"
            )


def _check_actions(actions: Sequence[str]) -> None:
    """Refuse no action at all, and actions that take no attestation document."""
    if not actions or not set(actions) <= set(RECIPIENT_ACTIONS):
        raise PolicyError(
            f"actions are {', '.join(actions) or 'none'}, "
            f"expected some of {', '.join(RECIPIENT_ACTIONS)}"
        )


# ---- statements


def _allow(sid: str, principals: Sequence[str], actions: Sequence[str]) -> dict[str, Any]:
    """Write an Allow of actions for principals; in a key policy, Resource "*" is the key itself."""
    return {
        "Sid": sid,
        "Effect": "Allow",
        "Principal": {"AWS": _one_or_list(principals)},
        "Action": _one_or_list(actions),
        "Resource": "*",
    }


def _deny(sid: str, condition: dict[str, Any]) -> dict[str, Any]:
    """Write a Deny of every plaintext of the key for everyone, under a condition."""
    return {
        "Sid": sid,
        "Effect": "Deny",
        "Principal": "*",
        "Action": list(PLAINTEXT_ACTIONS),
        "Resource": "*",
        "Condition": condition,
    }


def _one_or_list(values: Iterable[str]) -> str | list[str]:
    """Drop repetitions, and write a single value without a list."""
    unique = list(dict.fromkeys(values))
    return unique[0] if len(unique) == 1 else unique


def _image_condition(
    kind: _Kind, image: Mapping[int, bytes], binds: Sequence[Bind]
) -> dict[str, Any]:
    """Ask for the PCRs of an image and, where context names are bound, a bound value of each."""
    condition: dict[str, Any] = {
        "StringEqualsIgnoreCase": {
            kind.condition_key(index): image[index].hex() for index in sorted(image)
        }
    }
    names = dict.fromkeys(bind.name for bind in binds)
    if names:
        condition["StringEquals"] = {
            f"{ENCRYPTION_CONTEXT}{name}": _one_or_list(
                bind.value for bind in binds if bind.name == name
            )
            for name in names
        }
    return condition


def _pcr_differs(key: str, values: Iterable[bytes]) -> dict[str, Any]:
    """Hold where no document, or one with another value of this PCR, is sent.

    It is one key for each statement, since several keys of a statement are ANDed.
    """
    allowed = _one_or_list(value.hex() for value in values)
    return {"StringNotEqualsIgnoreCase": {key: allowed}}


def _bind_guards(binds: Sequence[Bind]) -> Iterator[dict[str, Any]]:
    """Deny each bound context value to enclaves with another PCR than those that it is bound to."""
    # one Deny for all digests of a value: a Deny for each would deny it to the others
    bound = dict.fromkeys((bind.name, bind.value, bind.pcr) for bind in binds)
    for number, (name, value, pcr) in enumerate(bound, start=1):
        digests = [bind.digest for bind in binds if (bind.name, bind.value) == (name, value)]
        context = {"StringEquals": {f"{ENCRYPTION_CONTEXT}{name}": value}}
        guard = _deny(
            f"DenyOtherPCR{pcr}ForBind{number}",
            context | _pcr_differs(pcr_condition_key(pcr), digests),
        )
        # DeriveSharedSecret has no context: its guard would be forty bytes for nothing
        yield guard | {"Action": ["kms:Decrypt", "kms:ReEncryptFrom"]}


def _warnings(kind: _Kind, pinned: Iterable[int], arns: Iterable[str]) -> Iterator[str]:
    """Say what the author of a policy that pins these PCRs for these ARNs should know."""
    mixed = mixed_partitions(arns)
    if mixed:
        yield mixed
    yield (
        "whoever may call kms:PutKeyPolicy can remove these conditions: "
        "CloudTrail shows that, nothing prevents it"
    )
    if kind.source == "nitrotpm":
        yield from _warnings_of_nitrotpm(pinned)
        return
    if 8 in pinned:
        yield (
            "PCR8 admits every image signed with this certificate, older ones too: "
            "use one certificate per application and environment"
        )
    if {0, 1, 2} & set(pinned):
        yield (
            "PCR0, PCR1 and PCR2 change with every build: "
            "render this policy anew for each, or use PCR8 alone"
        )


def _warnings_of_nitrotpm(pinned: Iterable[int]) -> Iterator[str]:
    """Say what a document of a NitroTPM does not prove."""
    yield (
        "root in such an instance sees every secret: the image must allow no login, and run "
        "nothing that it was not built with"
    )
    if 7 in pinned:
        yield "PCR7 admits every image signed with these Secure Boot keys, older ones too"
    if {4, 12} & set(pinned):
        yield "PCR4 and PCR12 change with every build: render this policy anew for each"
