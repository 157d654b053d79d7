"""How far a reader walks through one step at stage 3, over gloo and through shared memory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from deepspeed.comm.choose import SHARED_MEMORY
from tests.harness import Pool


def _benchmark() -> Any:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "walk.py"
    spec = importlib.util.spec_from_file_location("walk", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def walked(rank: int, world_size: int, shares: bool) -> list[tuple[int, int]]:
    """(files, depth) of the fourth step's forward and backward."""
    walk = _benchmark()
    before = sys.getprofile()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SHARED_MEMORY, str(int(shares)))
        engine = walk.engine_at(3)
    walks = walk.watched(engine, 4)
    sys.setprofile(before)
    engine.destroy()
    return [
        (len({name for name, _ in walks[phase].functions}), walks[phase].max_depth) for phase in ("forward", "backward")
    ]


@pytest.mark.parametrize("shares", [False, True])
def test_a_step_at_stage_3_crosses_at_most_8_files_and_10_frames(shares: bool) -> None:
    # Ranks of its own: groups outlive engines, with the way of sending that an earlier test's environment chose.
    pool = Pool(2)
    try:
        walks = pool.call(walked, (shares,), {}, 300.0)
    finally:
        pool.kill()
    for forward, backward in walks:
        assert forward[0] <= 8 and forward[1] <= 10
        assert backward[0] <= 8 and backward[1] <= 10
