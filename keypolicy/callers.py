"""Who calls KMS, and whether a statement's Principal or NotPrincipal is about them.

"AWS JSON policy elements: Principal" and "NotPrincipal" of the IAM User Guide are the sources, and
"Key policies" of the KMS Developer Guide for what an account as principal means.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from keypolicy.model import EVERYONE, PolicyError, Statement, abbreviated, split_arn

if TYPE_CHECKING:
    from collections.abc import Iterator

_KINDS: Final = frozenset(
    {("iam", "role"), ("iam", "user"), ("sts", "assumed-role"), ("sts", "federated-user")}
)

CALLER_KEYS: Final = frozenset(
    "aws:principalaccount aws:principalarn aws:principalisawsservice kms:calleraccount".split()
)
"""The condition keys, in lower case, that say who calls."""


class Caller(NamedTuple):
    """Who asks, by all the names that a statement may use.

    `principal_arn` is aws:PrincipalArn: for a session it is the ARN of its role, here without the
    role's path, which a session does not tell. Without `arn` it is anybody: of `account` where
    there is one, of the AWS service `service` where there is one.
    """

    account: str = ""
    root: str = ""
    arn: str = ""
    principal_arn: str = ""
    role: str = ""  # the name of the role of a session or a role, else ""
    session: bool = False
    service: str = ""

    @classmethod
    def from_arn(cls, arn: str) -> Self:
        """Read the ARN of a user, role, assumed-role session or root, or raise PolicyError."""
        _, partition, service, _, account, resource = split_arn(arn)
        kind, _, rest = resource.partition("/")
        session = (service, kind) == ("sts", "assumed-role")
        role = ""
        if session:
            role = rest.partition("/")[0]  # role name/session name
        elif (service, kind) == ("iam", "role"):
            role = rest.rpartition("/")[2]  # path/role name
        named = (service, resource) == ("iam", "root") or ((service, kind) in _KINDS and rest)
        if not re.fullmatch(r"\d{12}", account) or not named:
            raise PolicyError(
                f"principal {abbreviated(arn)} is not the ARN of a user, role or session"
            )
        root = f"arn:{partition}:iam::{account}:root"
        principal_arn = f"arn:{partition}:iam::{account}:role/{role}" if session else arn
        return cls(account, root, arn, principal_arn, role, session)

    @classmethod
    def of_principal(cls, kind: str, name: str, partition: str) -> Self | None:
        """Return whom one principal of a statement lets call, None where that is nobody.

        `partition` is that of an account which is named by its number alone.
        """
        if kind == "*":
            return cls()
        if kind != "AWS":
            return cls(service=name)
        if re.fullmatch(r"\d{12}", name):
            return cls(account=name, root=f"arn:{partition}:iam::{name}:root")
        try:
            named = cls.from_arn(name)
        except PolicyError:
            return None  # the id of a deleted user, or no principal at all
        # an account's root is everybody in the account whom identity policies let
        return cls(named.account, named.root) if name == named.root else named

    @property
    def known(self) -> bool:
        """Whether it is one caller, rather than anybody."""
        return bool(self.arn)

    def condition_values(self) -> dict[str, tuple[str, ...]]:
        """Return the values of those of CALLER_KEYS that this caller tells."""
        values: dict[str, tuple[str, ...]] = {}
        if self.account:
            values["aws:principalaccount"] = values["kms:calleraccount"] = (self.account,)
        if self.arn:
            values["aws:principalarn"] = (self.principal_arn,)
        if self.account or self.service:
            values["aws:principalisawsservice"] = (str(bool(self.service)).lower(),)
        return values

    def names(self) -> Iterator[tuple[str, str]]:
        """Yield what a statement that is about this caller may list, as keys of an index."""
        yield EVERYONE
        if self.service:
            yield "", self.service
        for name in (self.arn, self.account, self.root):
            if name:
                yield "AWS", name
        if self.role:
            yield self.root, self.role


class Principals:
    """The Principal or NotPrincipal of a statement, ready to be compared with many callers."""

    def __init__(self, statement: Statement) -> None:
        self._listed = frozenset(statement.principals)
        self._negated = statement.not_principal
        self._allows = statement.effect == "Allow"
        named = [_role_of(name) for kind, name in statement.principals if kind == "AWS"]
        self._roles = {(root, role) for root, role, session in named if role and not session}
        self._sessions = {(root, role) for root, role, session in named if session}

    def names(self) -> Iterator[tuple[str, str]]:
        """Yield the keys of an index by which Caller.names finds all that this may be about."""
        if self._negated:
            yield EVERYONE
            return
        for kind, name in self._listed:
            yield (kind, name) if kind in ("*", "AWS") else ("", name)
        yield from self._roles
        yield from self._sessions

    def judge(self, caller: Caller) -> tuple[bool | None, bool]:
        """Find whether this is about the caller, and whether it only delegates to the account.

        "Key policies" of KMS: an Allow for an account lets that account's identity policies allow.
        """
        named = self._names(caller)
        if self._negated:
            return self._judge_negated(named, caller), False
        # before the account: who is named beside it needs no identity policy
        if named:
            return True, False
        if self._names_account(caller):
            # a Deny for it reaches everyone in it; an Allow only lets its identity policies allow
            return True, self._allows
        return named, False

    def _judge_negated(self, named: bool | None, caller: Caller) -> bool | None:
        """Find whether a statement with NotPrincipal reaches the caller.

        NotPrincipal compares every name of the caller: account, role and session must all be listed
        to be exempt. Where some are listed this cannot be told, since a request has only one of
        them; nor for anybody, who may be one of those listed.
        """
        if EVERYONE in self._listed:
            return False
        if not caller.known or self._names_account(caller) or named is not False:
            return None
        return True

    def _names_account(self, caller: Caller) -> bool:
        """Tell whether the caller's account is listed, by its number or as its root."""
        listed = (("AWS", caller.account), ("AWS", caller.root))
        return bool(caller.account) and not self._listed.isdisjoint(listed)

    def _names(self, caller: Caller) -> bool | None:
        """Tell whether the caller itself is listed, rather than its account.

        None where the caller is a role and one session of it is listed: it may be that session.
        """
        if EVERYONE in self._listed:
            return True
        if not caller.known:
            return any(kind != "AWS" and name == caller.service for kind, name in self._listed)
        own = {("AWS", caller.arn)}
        if caller.arn == caller.root:
            own.add(("AWS", caller.account))  # the root user is its account
        if not self._listed.isdisjoint(own):
            return True
        if caller.session:
            # a session's ARN lacks the role's path, but a role's name is unique in its account
            return (caller.root, caller.role) in self._roles
        return None if (caller.root, caller.role) in self._sessions else False


def _role_of(name: str) -> tuple[str, str, bool]:
    """Return the account's root and the role that a principal is or is a session of; else ""."""
    try:
        caller = Caller.from_arn(name)
    except PolicyError:
        return "", "", False
    return caller.root, caller.role, caller.session
