"""Where the secrets and files of a manifest go: into files, or to the program alone."""

from __future__ import annotations

import grp
import itertools
import os
import posixpath
import pwd
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from attestor_commands.inject.fields import DOCUMENT_FIELDS, check_table
from attestor_io.errors import InputError
from attestor_io.secret_file import real_path
from attestor_io.urls import without_query

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from attestor_commands.inject.variables import Variables

FORMATS: Final = ("json", "dotenv")

_PATH_MAX: Final = 4096  # bytes, linux/limits.h
_MODE: Final = re.compile(r"0[0-7]{3}")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")  # as every shell can name it
_MEMBER: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where one secret or file goes.

    `kind` is the manifest's key for it, `name` a path or the name of a variable; `member` is the
    secret's name in a document, whose path is `name`.
    """

    kind: Literal["target", "environment", "fd", "document"]
    name: str
    mode: int = 0o600
    owner: tuple[int, int] = (-1, -1)
    member: str = ""

    def __str__(self) -> str:
        """As messages call it."""
        if self.kind == "target":
            return self.name
        return f"{self.name}: {self.member}" if self.member else f"{self.kind} {self.name}"

    @property
    def needs_program(self) -> bool:
        """Whether nobody but the program that `inject` becomes could have it."""
        return self.kind in {"environment", "fd"}


@dataclass(frozen=True, slots=True)
class Document:
    """One file of several secrets, in one of FORMATS."""

    place: Place
    form: str


def place_of(table: Mapping[str, Any], where: str, variables: Variables) -> Place:
    """Where a secret or file goes: its target, or what the program alone gets."""
    named = [kind for kind in ("target", "environment", "fd") if kind in table]
    match named:
        case ["target"]:
            path = variables.fill(table["target"], f"{where}: target", in_path=True)
            return Place("target", check_path(path, where), **_access(table, where))
        case ["environment"]:
            for name in ("mode", "owner", "world_readable"):
                if name in table:
                    raise InputError(f"{where}: {name} is of files, and environment is none")
            return Place("environment", _variable(table["environment"], where, "environment"))
        case ["fd"]:
            return Place("fd", _variable(table["fd"], where, "fd"), **_access(table, where))
        case []:
            raise InputError(f"{where} has no target")
        case _:
            raise InputError(f"{where} has {' and '.join(named)}, and goes to one place")


def _variable(name: str, where: str, what: str) -> str:
    if not _VARIABLE.fullmatch(name):
        raise InputError(f"{where}: {what} {name} is not a name of letters, digits and _")
    return name


def document_of(table: Mapping[str, Any], where: str, variables: Variables) -> Document:
    """The file of a [[document]], and its format."""
    check_table(table, DOCUMENT_FIELDS, where)
    if table.get("format") not in FORMATS:
        raise InputError(f"{where}: format must be one of {', '.join(FORMATS)}")
    if not table.get("secrets"):
        raise InputError(f"{where} has no secrets")
    return Document(place_of(table, where, variables), table["format"])


def member_of(document: Document, name: str, where: str) -> Place:
    """The place of a secret in a document."""
    if document.form == "dotenv":
        _variable(name, where, "dotenv's")
    elif not _MEMBER.fullmatch(name):
        raise InputError(f"{where}: {name} is not a name of letters, digits, _, . and -")
    return Place("document", document.place.name, member=name)


def _access(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Mode and owner of a file."""
    mode = table.get("mode", "0600")
    if not _MODE.fullmatch(mode):
        raise InputError(f"{where}: mode {mode} is not one such as 0600")
    if int(mode, 8) & 0o007 and not table.get("world_readable", False):
        raise InputError(
            f"{where}: mode {mode} opens it to everybody",
            "world_readable = true says that this is meant",
        )
    return {"mode": int(mode, 8), "owner": _owner(table.get("owner"), where)}


def check_path(path: str, where: str, what: str = "target") -> str:
    """The absolute path of a file, in the one way that it can be written; raises InputError."""
    if not path.startswith("/"):
        raise InputError(f"{where}: {what} {path} is not an absolute path")
    if len(os.fsencode(path)) >= _PATH_MAX:
        raise InputError(f"{where}: {what} is longer than {_PATH_MAX - 1} bytes")
    if (
        posixpath.normpath(path) != path
        or path.startswith("//")
        or not path.isprintable()
        or path == "/"
    ):
        shown = without_query(path)
        raise InputError(f"{where}: {what} {shown} is not in its shortest form, or names a folder")
    return path


def _owner(text: str | None, where: str) -> tuple[int, int]:
    """User and group ids of USER, USER:GROUP or numbers; -1 leaves one as it is."""
    if text is None:
        return -1, -1
    user, _, group = text.partition(":")
    try:
        uid = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
        gid = -1 if not group else int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except (KeyError, ValueError) as error:
        raise InputError(f"{where}: owner {text} is not known here") from error
    if max(uid, gid) >= 2**32 - 1:
        raise InputError(f"{where}: owner {text} is not known here")
    return uid, gid


def check_places(places: Sequence[Place], passed: Iterable[str]) -> None:
    """What places must not do to each other, nor to the variables that are `passed` on."""
    names = set(passed)
    for place in places:
        if place.needs_program:
            if place.name in names:
                raise InputError(f"variable {place.name} of the program is there twice")
            names.add(place.name)
    _check_paths([place.name for place in places if place.kind == "target"])


def check_generation(
    folder: str | None, places: Sequence[Place], variables: Variables
) -> str | None:
    """The path of the link that leads to a generation, in which every file must be."""
    if folder is None:
        return None
    folder = variables.fill(folder, "generation_folder", in_path=True)
    check_path(folder, "manifest", "generation_folder")
    for place in places:
        if place.kind == "target" and os.path.dirname(place.name) != folder:
            raise InputError(
                f"target {place.name} is not in generation_folder {folder}",
                "every file must be right in it: all of them are replaced at once",
            )
    return folder


def _check_paths(paths: Sequence[str]) -> None:
    real: dict[str, str] = {}
    for target in paths:
        folder, name = os.path.split(target)
        path = os.path.join(real_path(folder), name)
        if path in real:
            raise InputError(f"target {target} is there twice")
        real[path] = target
    # in this order a folder is followed at once by all that is in it
    for folder, path in itertools.pairwise(sorted(real, key=lambda path: path.split("/"))):
        if path.startswith(f"{folder}/"):
            raise InputError(f"target {real[path]} is inside target {real[folder]}")
