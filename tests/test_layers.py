"""Imports point one way: each package imports only from those to its left in `LAYERS`, also inside functions.

Reads the sources with `ast`, imports nothing. A new package must be given its place in `LAYERS` first.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "deepspeed"

LADDER = [
    "utils accelerator",
    "kernels",
    "config comm",
    "mesh monitor",
    "tiers precision quant optim",
    "zero",
    "parallel activation",
    "assembly",
    "checkpoint profiling",
    "memory",
    "engine",
    "inference elasticity launcher planner autotuning",
    "op_builders env_report porch",
    "__init__ legacy",
]
LAYERS = [name for step in LADDER for name in step.split()]
"""From left to right, as in the design; within a step of the ladder the same rule holds."""

TOP = {"__init__", "legacy"}
"""The package's face and porch: one layer, which nothing below may import."""

PURE = [
    "mesh/shape.py",
    "mesh/marks.py",
    "zero/layout.py",
    "zero/policy.py",
    "zero/plan.py",
    "checkpoint/boxes.py",
    "checkpoint/names.py",
    *(f"planner/{name}.py" for name in ("cluster", "cost", "divided", "layouts", "search")),
    *(f"autotuning/{name}.py" for name in ("lessons", "prior", "script", "space", "surrogate", "tuners")),
    *(str(path.relative_to(PACKAGE)) for path in sorted((PACKAGE / "parallel/pipeline/schedules").glob("*.py"))),
    "parallel/expert/capacity.py",
    *(f"parallel/pipeline/{name}.py" for name in ("actions", "check", "generate", "partition", "topology")),
]
"""Arithmetic, tested without processes: no import of torch.distributed."""


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in a module of `package`; "deepspeed.x" for `from deepspeed import x`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def layer_of(module: str) -> str:
    """The name in LAYERS of a module of ours, "deepspeed.zero.layout" -> "zero"; the face for names defined there."""
    name = [*module.split("."), "__init__"][1]
    return name if name in LAYERS or (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file() else "__init__"


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """One line per import of `module` that points to the right."""
    importer = layer_of(module)
    package = module if is_package else module.rpartition(".")[0]
    ours = ((line, name) for line, name in imported_modules(source, package) if name.split(".")[0] == "deepspeed")
    return [
        f"{module}:{line} imports {name}; {imported} is not to the left of {importer}"
        for line, name in ours
        if (imported := layer_of(name)) != importer
        and not {imported, importer} <= TOP
        and LAYERS.index(imported) > LAYERS.index(importer)
    ]


def named_modules(source: str) -> Iterator[str]:
    """Dotted names that a module imports by string."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "import_module":
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def circles(uses: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that reach each other; `uses[module]` are those that it imports."""
    reached = {name: set(others) for name, others in uses.items()}
    for middle in uses:
        for name in uses:
            if middle in reached[name]:
                reached[name] |= reached[middle]
    found = {frozenset(n for n in uses if n in reached[m] and m in reached[n]) for m in uses if m in reached[m]}
    return [set(circle) for circle in found]


def uses_within(folder: str) -> dict[str, set[str]]:
    """Who imports whom inside of a folder, also for types alone, inside functions, and by string."""
    sources = {name: path.read_text() for path, name, _ in _modules() if name.startswith(f"deepspeed.{folder}.")}
    uses = {}
    for name, source in sources.items():
        imported = {module for _, module in imported_modules(source, name.rpartition(".")[0])}
        imported |= set(named_modules(source))
        parents = {module.rpartition(".")[0] for module in imported}
        uses[name] = (imported | parents) & set(sources) - {name}
    return uses


def _modules() -> Iterator[tuple[Path, str, bool]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        yield path, ".".join(parts[:-1] if is_package else parts), is_package


def test_every_package_has_its_place_in_the_layers() -> None:
    unplaced = {layer_of(name) for _, name, _ in _modules()} - set(LAYERS)
    assert not unplaced, f"give {sorted(unplaced)} a place in LAYERS, and in the design"


def test_imports_point_to_the_left() -> None:
    found = [line for path, name, is_package in _modules() for line in violations(path.read_text(), name, is_package)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", sorted({p.parent.name for p in PACKAGE.glob("*/*.py")} - {"zero"}))
def test_no_modules_of_a_folder_import_each_other_in_a_circle_counting_types_and_strings(folder: str) -> None:
    assert not circles(uses_within(folder))


IN_CIRCLES = [
    {"access", "join", "optimizer", "own_reduction", "takeover"},  # the wrapper, and what acts on it between its phases
    {"bucket", "param", "space"},  # a parameter asks its bucket, which knows its parameters
]
"""Files of zero/ that know each other, by types or in functions. None may join them, and no third circle be made."""


def test_the_circles_within_zero_are_those_that_are_listed() -> None:
    found = [{name.rpartition(".")[2] for name in circle} for circle in circles(uses_within("zero"))]
    assert sorted(found, key=sorted) == IN_CIRCLES


def test_a_circle_over_three_modules_is_found_and_a_tail_is_not_in_it() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]


@pytest.mark.parametrize("name", PURE)
def test_pure_arithmetic_does_not_import_torch_distributed(name: str) -> None:
    modules = {module for _, module in imported_modules((PACKAGE / name).read_text(), "deepspeed.zero")}
    assert not {module for module in modules if module.startswith("torch.distributed")}


@pytest.mark.parametrize(
    "source",
    [
        "import deepspeed.engine.build",
        "from deepspeed.engine import build",
        "from deepspeed import engine",
        "from deepspeed import initialize",
        "import deepspeed",
        "from ..engine import build",
        "def f():\n    from ..engine.build import step",
    ],
)
def test_an_import_to_the_right_is_found(source: str) -> None:
    assert len(violations(source, "deepspeed.zero.bucket")) == 1


@pytest.mark.parametrize(
    "source", ["from . import layout", "from ..mesh import mesh", "from deepspeed import utils", "import torch"]
)
def test_imports_of_the_own_package_and_to_the_left_are_allowed(source: str) -> None:
    assert violations(source, "deepspeed.zero.bucket") == []


def test_the_face_may_import_the_porch_and_everything_else() -> None:
    source = "from . import legacy\nfrom .engine import build\nfrom deepspeed import launcher"
    assert violations(source, "deepspeed", is_package=True) == []
