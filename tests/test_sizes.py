"""How large a class and a function may be, and which are larger, because others ask for all of their names."""

from __future__ import annotations

import ast
import functools
import subprocess
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "deepspeed"

MAX_METHODS, MAX_ATTRIBUTES, MAX_LINES = 30, 20, 60

LARGER = {
    "DeepSpeedAccelerator": "the public contract of accelerators",
    "DeviceAccelerator": "the same, by the device's own functions",
    "DeepSpeedEngine": "the public contract of the engine: most of its methods are one statement",
    "PipelineEngine": "the same, of the engine of pipelines",
    "PipelineModule": "the public contract of modules that are cut in depth",
    "PipelineParallelGrid": "the public contract of the grid: one attribute per name that scripts read",
}


@functools.cache
def nodes() -> list[tuple[str, ast.AST]]:
    """(file, node) of every class and function of the package."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        (str(path.relative_to(PACKAGE)), node)
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kinds)
    ]


def size_of(node: ast.ClassDef) -> tuple[int, int]:
    """(methods by name, attributes that the class's own methods set on self)."""
    methods = [member for member in node.body if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef))]
    attributes = {
        target.attr
        for method in methods
        for target in ast.walk(method)
        if isinstance(target, ast.Attribute)
        and isinstance(target.ctx, ast.Store)
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
    }
    return len({method.name for method in methods}), len(attributes)


def too_large() -> dict[str, tuple[int, int]]:
    """By name; of classes of one name the largest counts."""
    found: dict[str, tuple[int, int]] = {}
    for methods, attributes, name in sorted(
        (*size_of(node), node.name) for _, node in nodes() if isinstance(node, ast.ClassDef)
    ):
        if methods > MAX_METHODS or attributes > MAX_ATTRIBUTES:
            found[name] = (methods, attributes)
    return found


def test_a_class_has_at_most_thirty_methods_and_twenty_attributes() -> None:
    found = {name: size for name, size in too_large().items() if name not in LARGER}
    assert not found, f"(methods, attributes) of classes that should be several: {found}"


def test_every_class_that_may_be_larger_is_larger() -> None:
    assert LARGER.keys() <= too_large().keys(), "one is small enough: delete its row"


def test_a_function_has_at_most_sixty_lines() -> None:
    found = {
        f"{path}: {node.name}": lines
        for path, node in nodes()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_LINES
    }
    assert not found, f"lines of functions that should be several: {found}"


def test_no_file_of_the_repository_is_larger_than_a_megabyte() -> None:
    """What a killed benchmark leaves behind is not a part of the project."""
    root = PACKAGE.parent
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout")
    paths = [root / name for name in listed.stdout.split("\0") if name]
    found = {
        str(path.relative_to(root)): size
        for path in paths
        if path.is_file() and (size := path.stat().st_size) > 1 << 20
    }
    assert paths and not found, f"files that should not be here: {found}"
