"""The tests of this folder are the only source of docs/compatibility.md.

    pytest tests/integrations                              stages 2 and 3, one pair of optimizer and schedule: `make test`
    pytest tests/integrations --matrix                     every stage and pair
    ... --matrix --compatibility docs/compatibility.md     and write down what passed: `make test-integrations`

A test that carries `pytest.mark.compat(integration, feature)` is a row; its parameters say ZeRO stage, precision and
offload. A cell is "works" if every such test passed, "fails" if one did not, empty if there is none.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integrations import refused, suites

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl", "datasets", "lightning")
STAGES = (0, 1, 2, 3)
Row = tuple[str, str, str, str]
_cells: dict[Row, dict[int, bool]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    """The two options."""
    group = parser.getgroup("integrations")
    group.addoption("--matrix", action="store_true", help="every ZeRO stage and combination")
    group.addoption("--compatibility", metavar="FILE", help="write the table of what works")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to write the table from workers: only they see what passed."""
    if config.getoption("--compatibility", default=None) and config.getoption("numprocesses", default=None):
        raise pytest.UsageError("--compatibility is written by one process: leave out -n.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --matrix leave out what differs in the stage or the pair alone, or is marked `matrix`."""
    if config.getoption("--matrix", default=False):
        return
    left_out = [item for item in items if "integrations" in item.path.parts and _is_repetition(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        kept = set(left_out)
        items[:] = [item for item in items if item not in kept]


def _is_repetition(item: Any) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if params.get("stage") in (0, 1) or item.get_closest_marker("matrix"):
        return True
    return params.get("optimizer", "hf") != params.get("scheduler", params.get("optimizer", "hf"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Iterator[None]:
    """Note the outcome of a row's test."""
    report = yield
    if call.when == "call" or report.failed:
        for marker in item.iter_markers("compat"):
            params = {**(item.callspec.params if hasattr(item, "callspec") else {}), **marker.kwargs}
            integration, feature = marker.args
            row = (integration, feature.format(**params), params.get("precision", "fp32"), params.get("offload") or "-")
            stages = params["stage"] if isinstance(params["stage"], tuple) else (params["stage"],)
            for stage in stages:
                cells = _cells.setdefault(row, {})
                cells[stage] = cells.get(stage, True) and report.passed
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the table."""
    path = session.config.getoption("--compatibility", default=None)
    if path:
        Path(path).write_text(_page())


def _page() -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name).partition('+')[0]}" for name in LIBRARIES)
    lines = [
        "# Compatibility",
        "",
        "Written by `make test-integrations`; do not edit. Every cell is a set of tests in `tests/integrations` that ran two gloo "
        "ranks on a CPU, unchanged libraries over this package. Most compare losses with the same job without it; "
        '"exactly" compares a resumed run with an uninterrupted one, bit for bit; the tests have the rest.',
        "",
        f"Versions: {versions}; Python {platform.python_version()}.",
        "",
        "`works`: passed. `fails`: ran and did not pass. Empty: not tried. What is not in this page is not claimed: no GPU was used, "
        "pipelines and experts over ranks were not tried under these libraries, and tensor and sequence parallelism only where a "
        "row says so.",
        "",
        "| integration | what | precision | offload (to CPU unless it says NVMe) | "
        + " | ".join(f"ZeRO {stage}" for stage in STAGES)
        + " |",
        "|---" * (4 + len(STAGES)) + "|",
    ]
    for row in sorted(_cells):
        cells = [{True: "works", False: "fails", None: ""}[_cells[row].get(stage)] for stage in STAGES]
        lines.append(f"| {' | '.join([*row, *cells])} |")
    lines += ["", "## Refused, and why", "", *(f"- {text}" for text in refused.REASONS)]
    lines += ["", "## The libraries' own tests", "", *suites.PARAGRAPHS, ""]
    return "\n".join(lines)
