"""All hints that the source can give, found by reading it: what follows on the message where an
error of ours is made, what doctor says is a fix, and the constants that hold hints.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Final

from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOMS: Final = (
    "attestor.py",
    "attestor_io",
    "attestor_commands",
    "attestor_eif",
    "keypolicy",
    "nsm",
)
_ERRORS: Final = frozenset(
    "InputError ModuleError RefusedError UnreachableError NotAuthenticError OutputError "
    "PolicyError Finding missing _unwritable _impossible nearest _fail".split()
)
_CONSTANTS: Final = ("HINT", "_NOWHERE", "_NOT_PERMITTED", "_NOT_BASE64", "_ENABLE", "_HOP_LIMIT")
_OTHER: Final = ("keypolicy/check.py",)  # its findings are no errors of ours
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def all_hints() -> set[str]:
    """Every hint, with "{}" for what is filled in."""
    found: set[str] = set()
    for room in _ROOMS:
        path = ROOT / room
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            if str(file.relative_to(ROOT)) not in _OTHER:
                found.update(_hints_in(ast.parse(file.read_text(encoding="utf-8"))))
    return found


def _hints_in(tree: ast.Module) -> Iterator[str]:
    for function in [tree, *(node for node in ast.walk(tree) if isinstance(node, _Function))]:
        for call in _calls(function):
            for argument in _hints_of(call):
                yield from _texts(argument, function, tree)
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and any(part in target.id for part in _CONSTANTS):
                yield from _texts(node.value, tree, tree)


def _hints_of(call: ast.Call) -> list[ast.expr]:
    """The arguments of a call that are hints: all behind the message."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name not in _ERRORS:
        return []
    return call.args[2 if name in {"_fail", "_impossible"} else 1 :]


def _calls(function: ast.AST) -> Iterator[ast.Call]:
    """The calls of a function, and not those of functions in it."""
    for node in ast.iter_child_nodes(function):
        if isinstance(node, _Function):
            continue
        if isinstance(node, ast.Call):
            yield node
        yield from _calls(node)


def _texts(node: ast.AST, function: ast.AST, tree: ast.AST) -> Iterator[str]:
    """The strings that an expression can be, as far as the file itself says."""
    match node:
        case ast.Constant(value=str(text)) if text:
            yield text
        case ast.JoinedStr():
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield "".join(str(part) for part in parts)
        case ast.IfExp():
            yield from _texts(node.body, function, tree)
            yield from _texts(node.orelse, function, tree)
        case ast.Dict(values=values) | ast.Tuple(elts=values) | ast.List(elts=values):
            for value in values:
                yield from _texts(value, function, tree)
        case ast.Starred(value=value):
            yield from _texts(value, function, tree)
        case ast.Name(id=name):
            for assigned in [*_assigned(name, function)] or [*_assigned(name, tree)]:
                yield from _texts(assigned, function, tree)


def _assigned(name: str, where: ast.AST) -> Iterator[ast.AST]:
    """What is assigned to a name within a function or file."""
    for node in ast.walk(where):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                yield node.value
