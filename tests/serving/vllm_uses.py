"""What of vLLM a file uses, found in its source: names that it looks up, attributes that it reads.

In this project vLLM's objects are `Any`, and sere's own are typed. So everything counts that is
reached from a parameter annotated `Any`, or from a symbol of vLLM.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_PATH = re.compile(r"\bvllm(?:\.\w+)+")
_LOOKUPS = ("symbol", "here", "loaded", "module_of")
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@dataclass
class Uses:
    """symbols: names given to `symbol` and the like. modules: of vLLM, imported or named in text.
    imported: names taken from the package itself. attributes: read of vLLM's objects, or wrapped.
    """

    symbols: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)
    imported: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)


def uses_of(file: Path) -> Uses:
    tree = ast.parse(file.read_text("utf-8"))
    found = Uses()
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.modules |= {a.name for a in node.names if a.name.startswith("vllm.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "vllm":
            found.imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("vllm."):
            found.modules.add(str(node.module))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings:
                found.modules |= set(_PATH.findall(node.value))
        elif isinstance(node, ast.Call):
            found.symbols |= _looked_up(node)
            if ast.unparse(node.func) == "wrap":
                found.attributes.add(_text(node.args[1]))
    _read(tree, set(), found.attributes)
    return found


def _looked_up(call: ast.Call) -> set[str]:
    name, arguments = ast.unparse(call.func), call.args
    if name in ("map", "filter") and ast.unparse(arguments[0]) in _LOOKUPS:
        texts = (c for a in arguments[1:] for c in ast.walk(a) if isinstance(c, ast.Constant))
        return {str(c.value) for c in texts}
    return {_text(arguments[0])} if name in _LOOKUPS else set()


def _text(node: ast.expr) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else ast.unparse(node)


def _read(scope: ast.AST, outer: set[str], attributes: set[str]) -> None:
    """Collect what is read of vLLM's objects in a scope and in the functions within it."""
    vllm = outer | _parameters(scope)
    size = -1
    while size < len(vllm):  # until no more names are found to hold such an object
        size = len(vllm)
        for node in _within(scope):
            for target, value in _bindings(node):
                if _is_vllm(value, vllm) and not isinstance(target, ast.Attribute):
                    vllm |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
    for node in _within(scope):
        if isinstance(node, Function):
            _read(node, vllm, attributes)
        elif isinstance(node, ast.Attribute) and _is_vllm(node.value, vllm):
            attributes.add(node.attr)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("getattr", "hasattr")
            and _is_vllm(node.args[0], vllm)
        ):
            attributes.add(_text(node.args[1]))


def _within(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope, functions inside it as one node each."""
    for child in ast.iter_child_nodes(scope):
        yield child
        if not isinstance(child, Function):
            yield from _within(child)


def _parameters(scope: ast.AST) -> set[str]:
    if not isinstance(scope, Function):
        return set()
    every = (*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs)
    return {a.arg for a in every if a.annotation and ast.unparse(a.annotation) == "Any"}


def _bindings(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    if isinstance(node, ast.Assign):
        yield from ((target, node.value) for target in node.targets)
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value:
        yield node.target, node.value
    elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
        yield node.target, node.iter


def _is_vllm(value: ast.expr, vllm: set[str]) -> bool:
    """Whether an expression is one of vLLM's objects, or reached from one."""
    if isinstance(value, ast.Name):
        return value.id in vllm
    if isinstance(value, ast.Attribute) and value.attr in ("sere", "_sere"):
        return False  # our own, kept on one of vLLM's objects
    if isinstance(value, ast.Attribute | ast.Subscript | ast.Await | ast.Starred):
        return _is_vllm(value.value, vllm)
    if isinstance(value, ast.Call):
        return bool(_looked_up(value)) or _is_vllm(value.func, vllm)
    if isinstance(value, ast.ListComp | ast.GeneratorExp):
        return _is_vllm(value.generators[0].iter, vllm)
    return False
