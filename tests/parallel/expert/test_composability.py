"""What combines with experts: a few cells of the matrix here, all of them with DS_TEST_LONG (make test-experts)."""

from __future__ import annotations

import os

import pytest

from tests.parallel.expert.composability import CELLS, DOC, Cell, run_cell

SHORT = [cell for cell in CELLS if cell.refused or (cell.stage, cell.what) in ((2, "bf16"), (2, "LAMB"))]


@pytest.mark.parametrize(
    "cell", CELLS if os.environ.get("DS_TEST_LONG") else SHORT, ids=lambda c: f"{c.what}-{c.stage}"
)
def test_a_combination_equals_one_process_or_is_refused_as_the_page_says(cell: Cell) -> None:
    line = f"| {cell.what} | {cell.stage} | {cell.ranks}, {cell.ep} | {run_cell(cell)} |"
    assert line in DOC.read_text()
