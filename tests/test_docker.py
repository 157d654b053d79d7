"""docker/ without Docker: what a Dockerfile copies is here, what it starts from is pinned, and what runs in it needs no compiler.

Where a daemon answers the long tests build the CPU image and run it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.engine.runs import LONG

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
INSTRUCTIONS = {"ARG", "FROM", "RUN", "COPY", "WORKDIR", "CMD", "ENV", "LABEL", "USER", "ENTRYPOINT", "EXPOSE"}


class Line(NamedTuple):
    """An instruction with its continuation lines joined."""

    instruction: str
    rest: str


def parse(text: str) -> list[Line]:
    """The instructions. Raises ValueError for a line that begins with none."""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    lines = []
    for line in re.sub(r"\\\n", " ", kept).splitlines():
        if not line.strip():
            continue
        instruction, _, rest = line.strip().partition(" ")
        if instruction not in INSTRUCTIONS or not rest.strip():
            raise ValueError(f"not an instruction: {line!r}")
        lines.append(Line(instruction, " ".join(rest.split())))
    return lines


def test_there_is_an_image_for_each_kind_of_machine() -> None:
    assert [path.suffix for path in FILES] == [".cpu", ".cuda", ".rocm"]


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def lines(request: pytest.FixtureRequest) -> list[Line]:
    return parse(request.param.read_text())


def test_it_starts_from_a_pinned_image(lines: list[Line]) -> None:
    args = dict(line.rest.split("=", 1) for line in lines if line.instruction == "ARG")
    bases = [line.rest.split(" ")[0] for line in lines if line.instruction == "FROM"]
    assert bases
    for base in bases:
        image = args["BASE"] if base == "${BASE}" else base
        assert re.search(r":.*[0-9]+\.[0-9]+", image), f"{image} has no version"
        assert not image.endswith(":latest")


def test_what_it_copies_exists_and_comes_from_here_or_a_stage(lines: list[Line]) -> None:
    stages = {line.rest.partition(" AS ")[2] for line in lines if line.instruction == "FROM"}
    for copied in (line.rest.split(" ") for line in lines if line.instruction == "COPY"):
        stage = copied.pop(0).removeprefix("--from=") if copied[0].startswith("--") else None
        *sources, target = copied
        assert target.startswith("/")
        assert stage in stages if stage else all((ROOT / source).exists() for source in sources)


def test_shell_lines_are_whole_commands_that_stop_at_an_error(lines: list[Line]) -> None:
    for line in lines:
        if line.instruction == "RUN":
            assert ";" not in re.sub(r"\"[^\"]*\"", "", line.rest), "a failure before a semicolon goes unseen"
            assert not line.rest.rstrip().endswith("&&")
            if "apt-get install" in line.rest:
                assert "--no-install-recommends" in line.rest
                assert "rm -rf /var/lib/apt/lists/*" in line.rest


def test_the_installation_is_tried_while_the_image_is_built(lines: list[Line]) -> None:
    last = [line.rest for line in lines if line.instruction == "RUN"][-1]
    assert "pip install" in last
    assert last.endswith("ds_report --hide_errors_and_warnings")


def test_the_torch_that_is_installed_is_pinned(lines: list[Line]) -> None:
    installs = " ".join(line.rest for line in lines if line.instruction == "RUN" and "pip install" in line.rest)
    assert "-c /tmp/constraints.txt" in installs or "torch==${TORCH}" in installs


def test_the_cpu_image_that_runs_has_no_compiler() -> None:
    lines = parse((ROOT / "docker" / "Dockerfile.cpu").read_text())
    last_stage = max(i for i, line in enumerate(lines) if line.instruction == "FROM")
    assert not [line for line in lines[last_stage:] if re.search(r"\b(g\+\+|gcc|build-essential|nvcc)\b", line.rest)]


@pytest.mark.parametrize("name", [".git", ".venv"])
def test_what_no_image_needs_is_left_out(name: str) -> None:
    assert name in (ROOT / ".dockerignore").read_text().split()


@LONG
def test_the_cpu_image_is_built_and_reports_what_it_has() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True, timeout=60).returncode:
        pytest.skip("no Docker, or none of its daemons answers")
    tag = f"deepspeed-cpu-test:{os.getpid()}"
    build = [docker, "build", "-f", str(ROOT / "docker" / "Dockerfile.cpu"), "-t", tag, str(ROOT)]
    subprocess.run(build, check=True, timeout=1800)
    try:
        shown = subprocess.run([docker, "run", "--rm", tag], check=True, capture_output=True, text=True, timeout=300)
        assert re.search(r"accelerator \.+ cpu", shown.stdout)
    finally:
        subprocess.run([docker, "image", "rm", "-f", tag], check=False, timeout=300)
