"""Names in docstrings exist: a dotted name in backticks that looks like ours is looked up in the sources.

Reads the sources with `ast`, imports nothing. "Ours" is what begins with a folder, a module or a class of the package, or
with a section of the configuration. What begins with anything else is a foreign word, listed in FOREIGN: a new one is added
there by hand, so that a misspelt head is no way around the test.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "deepspeed"
TICKED = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\([^`]*\))?`")

FOREIGN = set(
    "torch nn F json shlex apex args param loss module weight child self timers costs root optimizer Module".split()
)
"""First words of names that are not ours: other libraries, and variables of an example. `engine` is looked up in the engine."""
FOREIGN_NAMES = set(
    "state.json ds_config_optimal.json cmd_optimal.txt summary.txt cmd.txt model_info.json ds_config.json metrics.json candidates.json report.html run.jsonl pytorch_model.bin engine.set_custom_curriculum_learning_schedule".split()
)
"""Files that a run writes, and what comes later."""
LATER = set("parallel data compression".split())
"""Folders that features of a later version come with."""


@functools.cache
def sources() -> dict[str, ast.Module]:
    """Every module's syntax, by dotted name without "deepspeed."."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = ast.parse(path.read_text())
    return found


def defined(body: list[ast.stmt]) -> set[str]:
    """Names that statements bind: definitions, assignments, imports; also in branches and in a class's methods, on self."""
    names: set[str] = set()
    for node in (inner for statement in body for inner in ast.walk(statement)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            names.add(node.value)  # names in tables, from which methods and lazy exports are made
    return names


def exported(tree: ast.Module) -> set[str]:
    """Words in the tables of a folder's `__init__`, which make names at the first use."""
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in texts]
    return {word for node in strings if isinstance(node.value, str) for word in re.findall(r"[A-Za-z_]\w*", node.value)}


@functools.cache
def modules() -> dict[str, set[str]]:
    """Names at hand in each module, by every tail of its dotted name: "zero.gather" and "gather"."""
    found: dict[str, set[str]] = {}
    for name, tree in sources().items():
        names = defined(tree.body)
        if (PACKAGE / name.replace(".", "/")).is_dir():
            names |= exported(tree)
        parts = name.split(".")
        for start in range(len(parts)):
            found.setdefault(".".join(parts[start:]), set()).update(names)
    for name in list(found):
        for other in sources():
            if other.startswith(f"{name}."):
                found[name].add(other[len(name) + 1 :].split(".")[0])
    return found


@functools.cache
def classes() -> dict[str, set[str]]:
    """Members of each class, with those of its bases where these are ours."""
    own: dict[str, set[str]] = {}
    bases: dict[str, set[str]] = {}
    for tree in sources().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                own.setdefault(node.name, set()).update(defined(node.body))
                bases.setdefault(node.name, set()).update(ast.unparse(base).rpartition(".")[2] for base in node.bases)
    for name in own:
        waiting = set(bases[name])
        while waiting:
            base = waiting.pop()
            if base in own and base != name:
                own[name] |= own[base]
                waiting |= bases[base] - {name, base}
    return own


@functools.cache
def config_fields() -> set[str]:
    """Keys of the configuration."""
    return {
        node.target.id
        for name, tree in sources().items()
        if name.startswith("config")
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


@functools.cache
def public_words() -> str:
    """What the package's face and porch, and the list of names that programs import, spell out."""
    listed = (PACKAGE.parent / "tests/public_imports.txt").read_text()
    return listed + "".join((PACKAGE / name).read_text() for name in ("legacy.py", "__init__.py"))


def resolves(name: str, module: str = "") -> bool:
    """Whether a dotted name in a docstring of `module` names something."""
    words = name.split(".")
    if words[-1] in ("py", "html"):
        return bool(list(PACKAGE.rglob(name)))
    if words[0] in FOREIGN or name in FOREIGN_NAMES:
        return True
    if words[0] == "deepspeed":
        is_public = words[1] in public_words() and any(words[-1] in names for names in modules().values())
        return is_public or name in public_words() or resolves_inside(words[1:])
    if words[0] == "engine" and any(
        words[1] in names for name, names in modules().items() if name.startswith("engine.")
    ):
        return True
    return resolves_inside(words) or set(words) <= config_fields() or f"deepspeed.{name}" in public_words()


def resolves_inside(words: list[str]) -> bool:
    """Whether the words are a module, or something in it, or a member of a class."""
    if ".".join(words) in modules():
        return True
    for end in range(len(words) - 1, 0, -1):
        module = ".".join(words[:end])
        if module in modules() and words[end] in modules()[module] and f"{module}.{words[end]}" not in modules():
            return len(words) == end + 1 or words[end + 1] in classes().get(words[end], {words[end + 1]})
    if len(words) == 1:
        return words[0] in modules()[""] or words[0] in LATER
    return words[-2] in classes() and words[-1] in classes()[words[-2]]


def ticked_names() -> Iterator[tuple[str, int, str]]:
    """(module, line, dotted name) of every one in a docstring, or a string under a field."""
    for module, tree in sources().items():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                yield from ((module, node.lineno, found) for found in TICKED.findall(node.value.value))


def test_every_name_in_a_docstring_exists() -> None:
    lost = [f"{module}:{line} `{name}`" for module, line, name in ticked_names() if not resolves(name, module)]
    assert not lost, "\n".join(lost)


@pytest.mark.parametrize(
    "name",
    ["zero.gather.Gatherer", "gather.Gatherer.request", "deepspeed.initialize", "engine.backward", "fp16.auto_cast"],
)
def test_what_is_there_is_found(name: str) -> None:
    assert resolves(name)


@pytest.mark.parametrize(
    "name", ["zero.gather.Collector", "Gatherer.fetch", "launch.LocalBackend", "engine.obsrve", "nosuch.py", "wrd.x"]
)
def test_what_is_not_there_is_missed(name: str) -> None:
    assert not resolves(name)


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_the_index_of_a_folder_lists_every_file(folder: str) -> None:
    text = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text()), clean=False) or ""
    files = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"}
    if not files & set(re.findall(r"^[ |`]*(\w+)", text, re.M)):
        assert len(files) < 4, "a folder of so many files has an index"
        pytest.skip("no index: its text says what the folder is for")
    indexed = " ".join(re.findall(r"^[ |].*", text, re.M))
    missing = {name for name in files if not re.search(rf"\b{name}\b", indexed) and f"{name}.py" not in text}
    assert not missing, f"missing in {folder}/__init__.py: {sorted(missing)}"
    gone = set(re.findall(r"\b(\w+)\.py\b", text)) - {path.stem for path in PACKAGE.rglob("*.py")}
    assert not gone, f"files that are gone: {sorted(gone)}"
