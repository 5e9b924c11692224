"""Imports run one way, only the serving package knows vLLM, and no file outgrows its reader."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sere

PACKAGE = Path(sere.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# The house, top floor first: what stands in a line imports from lines below it only.
HOUSE = """
    __main__
    cli
    verbs  flags
    demo  doctor
    tuning  speed  engine_runs  page
    evaluation
    step_cost
    calibration
    models
    results  monitoring  demo_model  serving
    table  similarity  fitting
    statistics  cautious
    kernels
    policy  checkpoint  maps
    files  typed  extras  text  threads
    checks
"""
FLOORS = [set(line.split()) for line in HOUSE.splitlines() if line.strip()]
CORE = {
    *("table", "similarity", "fitting", "statistics", "kernels", "policy", "checkpoint", "maps"),
    *("files", "checks", "text", "cautious", "threads"),
}
MAY_SERVE = {"speed", "demo", "doctor", "engine_runs"}  # who starts an engine
MODULES_AT_THE_TOP, LINES, LINES_OF_A_FUNCTION = 16, 360, 60


def part(module: str) -> str:
    """ "sere.kernels.plan" -> "kernels"; the package itself -> ""."""
    return module.split(".")[1] if "." in module else ""


def imports_of(module: str) -> Iterator[str]:
    """Every module that `module` imports, anywhere in it, or names to `import_module`.

    What only type checkers import does not count.
    """
    tree = ast.parse(FILES[module].read_text("utf-8"))
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(a.value) for a in node.args if isinstance(a, ast.Constant))


IMPORTS = {module: set(imports_of(module)) for module in FILES}
OWN = {module: {i for i in imports if i in FILES} for module, imports in IMPORTS.items()}


def foreign(module: str) -> set[str]:
    return {name.split(".")[0] for name in IMPORTS[module]}


def test_the_imports_were_read() -> None:
    """The rules below would hold for anything if nothing were found."""
    assert OWN["sere.verbs"] >= {
        "sere.calibration.calibrate",
        "sere.calibration.inspect",
        "sere.demo.run",
        "sere.doctor",
    }
    assert "sere.kernels.plan" in OWN["sere.kernels"]
    assert "vllm" in foreign("sere.serving.engine")
    assert "transformers" in foreign("sere.models.loading")


def test_every_module_has_its_place() -> None:
    assert {part(module) for module in FILES} - {""} == set().union(*FLOORS)


@pytest.mark.parametrize("module", FILES)
def test_imports_run_one_way(module: str) -> None:
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    here = part(module)
    if not here:
        return  # the package re-exports core names lazily; its imports are for type checkers
    for there in {part(imported) for imported in OWN[module]} - {here, ""}:
        assert floor[there] > floor[here], f"{module} imports {there}"
        assert there != "serving" or here in MAY_SERVE, f"{module} imports {there}"
        assert here != "serving" or there in CORE, f"{module} imports {there}"


@pytest.mark.parametrize("module", [m for m in FILES if part(m) in CORE])
def test_core_needs_torch_and_safetensors_only(module: str) -> None:
    assert not foreign(module) & {"transformers", "vllm", "tqdm", "matplotlib", "huggingface_hub"}


@pytest.mark.parametrize("module", [m for m in FILES if part(m) != "serving"])
def test_only_serving_knows_vllm(module: str) -> None:
    assert "vllm" not in foreign(module)


def test_no_cycles_even_inside_functions() -> None:
    graph = {module: imports - {"sere", module} for module, imports in OWN.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("module", FILES)
def test_files_and_functions_are_short_and_named_for_what_they_do(module: str) -> None:
    source = FILES[module].read_text("utf-8")
    assert len(source.splitlines()) <= LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= LINES_OF_A_FUNCTION, f"{node.name} has {length} lines"
    assert not {"utils", "helpers", "common", "misc"} & set(module.split("."))


def test_the_tree_can_be_read() -> None:
    """Few modules at the top; every room says what it is for and what it may import."""
    assert len(list(PACKAGE.glob("*.py"))) <= MODULES_AT_THE_TOP
    for room in (path.parent for path in PACKAGE.glob("*/__init__.py")):
        says = ast.get_docstring(ast.parse((room / "__init__.py").read_text("utf-8")))
        assert says and "import" in says, f"{room.name} does not say what it may import"
