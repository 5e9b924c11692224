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

# A module imports from its own layer or from one further down.
LAYERS: list[set[str]] = [
    {"__main__"},
    {"cli"},
    {"verbs"},
    {
        "demo",
        "calibrate",
        "tune",
        "harness",
        "harness_hf",
        "harness_vllm",
        "harness_tasks",
        "generation",
        "bench",
        "inspect",
        "compare",
        "doctor",
        "top",
        "page",
    },
    {"evaluate", "bench_result", "choice"},
    {"bench_server", "bench_setup"},
    {"search"},
    {"quality", "cost"},
    {"arms"},
    {"rivals", "decoding"},
    {"stream"},
    {"shapes"},
    {"null_models", "roofline"},
    {"observation", "skeleton"},
    {"agreement", "loading", "unfinished"},
    {"moe"},
    {
        "adapters",
        "similarity",
        "corpus",
        "tasks",
        "demo_model",
        "report",
        "serving",
        "journal",
        "scrape",
    },
    {"policy", "kernels", "checkpoint", "files", "table"},
]
CORE = LAYERS[-1]
MAY_SERVE = {
    "bench",
    "bench_server",
    "bench_setup",
    "demo",
    "doctor",
    "generation",
    "harness_vllm",
    "serving",
}
VLLM_LINES, LINES = 450, 360


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
    assert OWN["sere.verbs"] >= {"sere.calibrate", "sere.inspect", "sere.demo", "sere.doctor"}
    assert "sere.kernels.plan" in OWN["sere.kernels"]
    assert "vllm" in foreign("sere.serving.engine")
    assert "transformers" in foreign("sere.loading")


def test_every_module_has_its_place() -> None:
    assert {part(module) for module in FILES} - {""} == set().union(*LAYERS)


@pytest.mark.parametrize("module", FILES)
def test_imports_run_one_way(module: str) -> None:
    depth = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    if not part(module):
        return  # the package re-exports core names lazily; its imports are for type checkers
    for imported in OWN[module]:
        if part(imported):
            assert depth[part(imported)] >= depth[part(module)], f"{module} imports {imported}"
            if part(imported) == "serving":
                assert part(module) in MAY_SERVE, f"{module} imports {imported}"
            if part(module) == "serving":
                assert part(imported) in CORE | {"serving"}, f"{module} imports {imported}"


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
def test_files_are_short_and_named_for_what_they_do(module: str) -> None:
    lines = len(FILES[module].read_text("utf-8").splitlines())
    assert lines <= (VLLM_LINES if module.endswith(".vllm_plugin") else LINES)
    assert not {"utils", "helpers", "common", "misc"} & set(module.split("."))
