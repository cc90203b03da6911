"""The attestation documents, and calls without one, that tell what a policy opens."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Final, NamedTuple

from keypolicy.evaluate import KnownValues, values_of_nitrotpm, values_of_pcrs
from keypolicy.findings import PLAINTEXT_ACTIONS
from keypolicy.keys import is_about_document, is_about_enclave, is_about_nitrotpm, pcr_index
from keypolicy.measure import PCR_BYTES, ZERO_PCR_HEX
from keypolicy.model import ATTESTATION, Policy, nitrotpm_condition_key, pcr_condition_key
from keypolicy.nitrotpm import SECURE_BOOT_OFF

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_ANY_CALL: Final = {"aws:securetransport": ("true",)}  # KMS answers over TLS alone
_GRANT_OPERATIONS: Final = "kms:grantoperations"


class Document(NamedTuple):
    """An attestation document, or none, that a caller may bring; PCRs that it lacks are absent,
    those that `values` does not tell are the attacker's to choose.
    """

    name: str
    values: KnownValues


class Documents(NamedTuple):
    """The documents by which openings are found.

    `unknown` is one, or none, of which nothing is known; `grants` are calls of CreateGrant, without
    a document, for each operation by which a grant gives plaintexts.
    """

    none: Document
    grants: tuple[Document, ...]
    foreign: tuple[Document, ...]
    debug: Document
    foreign_machines: tuple[Document, ...]
    any_enclave: Document
    any_nitrotpm: Document
    unknown: Document

    def unattested(self, action: str) -> tuple[Document, ...]:
        """Return the calls of an action that bring no document."""
        return self.grants if action == "kms:CreateGrant" else (self.none,)


def documents(policy: Policy) -> Documents:
    """Make the documents that tell a policy which pins an image from others.

    A foreign image has another PCR0 and PCR8 than any that the policy names, but may keep PCR1
    (the genuine kernel around another application) or PCR2 (another kernel around the genuine
    application), so there are two. PCR3 and PCR4 are the parent's, which is no other one; the
    further PCRs are the program's to extend. Debug mode zeroes PCR0, 1, 2 and 8.

    Of a NitroTPM, a foreign machine image has another PCR4, or keeps that and has another PCR12, a
    command line; PCR7 is another one, as of other keys, or that of no Secure Boot. The further PCRs
    are what its firmware, boot loader and programs make of them.
    """
    other = _unnamed_value(policy)

    def enclave(name: str, value: bytes, *indexes: int) -> Document:
        values = values_of_pcrs(dict.fromkeys(indexes, value))
        return Document(name, KnownValues(_ANY_CALL | values, is_about_nitrotpm))

    def machine(name: str, pcrs: Mapping[int, bytes]) -> Document:
        return Document(name, KnownValues(_ANY_CALL | values_of_nitrotpm(pcrs), is_about_enclave))

    return Documents(
        none=Document("none", KnownValues(_ANY_CALL, is_about_document)),
        grants=tuple(_granting(action.removeprefix("kms:")) for action in PLAINTEXT_ACTIONS),
        foreign=(enclave("application", other, 0, 2, 8), enclave("kernel", other, 0, 1, 8)),
        debug=enclave("debug", bytes(PCR_BYTES), 0, 1, 2, 8),
        foreign_machines=(
            machine("machine image", {4: other, 7: other}),
            machine("command line", {7: other, 12: other}),
            machine("no Secure Boot", {4: other, 7: bytes.fromhex(SECURE_BOOT_OFF)}),
        ),
        any_enclave=enclave("enclave", b""),
        any_nitrotpm=machine("NitroTPM", {}),
        unknown=Document("unknown", KnownValues(_ANY_CALL, lambda _: False)),
    )


def _unnamed_value(policy: Policy) -> bytes:
    """Return 48 bytes that the policy does not name: no value is the digest of all values."""
    text = repr([statement.conditions for statement in policy.statements])
    return hashlib.sha384(text.encode(errors="replace")).digest()


def _granting(operation: str) -> Document:
    """Make the call of CreateGrant for an operation, and for others beside it."""
    values = _ANY_CALL | {_GRANT_OPERATIONS: (operation,)}
    partial = frozenset({_GRANT_OPERATIONS})
    return Document(f"grant {operation}", KnownValues(values, is_about_document, partial=partial))


# ---- all documents, as far as a policy tells them apart

_Alternatives = tuple[Document, ...]


def kinds_of_document(policy: Policy) -> tuple[tuple[_Alternatives, ...], ...]:
    """Make what stands for any call: of each kind, for each PCR, all values that a policy tells
    apart.

    A policy lets no document of a kind in if all alternatives of one PCR are kept out; the converse
    does not hold, since PCRs are looked at one by one. PCRs that are compared with patterns or
    policy variables are left out. PCR0, 1 and 2 are zeros in debug mode alone.
    """
    known, other = documents(policy), _unnamed_value(policy).hex()
    named = _named_values(policy)

    def alternatives(base: Document, is_of_kind: Callable[[str], bool]) -> Iterator[_Alternatives]:
        yield (base,)
        for key, values in named.items():
            if is_of_kind(key) and not any(re.search(r"[*?]|\$\{", value) for value in values):
                possible = [(value,) for value in (*values, other) if not _is_debug(key, value)]
                yield tuple(_with_value(base, key, found) for found in (*possible, ()))

    return (
        ((known.none,),),
        ((known.debug,),),
        tuple(alternatives(known.any_enclave, is_about_enclave)),
        tuple(alternatives(known.any_nitrotpm, is_about_nitrotpm)),
    )


def _named_values(policy: Policy) -> dict[str, dict[str, None]]:
    """Return the values of each PCR that a policy names, as they are and in lower case, by its
    condition key.
    """
    named: dict[str, dict[str, None]] = {}
    for statement in policy.statements:
        for condition in statement.conditions:
            index = pcr_index(condition.key)
            if is_about_document(condition.key):
                of_enclave = is_about_enclave(condition.key)
                key = pcr_condition_key(index) if of_enclave else nitrotpm_condition_key(index)
                values = named.setdefault(key, {})
                for value in condition.values:
                    values |= {value: None, value.lower(): None}
    return named


def _is_debug(key: str, value: str) -> bool:
    """Tell whether a document has this value in debug mode alone; PCR8 is zeros unsigned, too."""
    return is_about_enclave(key) and pcr_index(key) in {0, 1, 2} and value == ZERO_PCR_HEX


def _with_value(base: Document, key: str, value: tuple[str, ...]) -> Document:
    """Return a document of which one more PCR is known, or known to be absent."""
    keys = [key, f"{ATTESTATION}ImageSha384"] if key == pcr_condition_key(0) else [key]
    values = dict(base.values.values) | {name.lower(): value for name in keys}
    return Document(f"{key} {value}", base.values._replace(values=values))
