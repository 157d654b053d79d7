"""How far a reader walks through one step at stage 3, which must not grow unnoticed."""

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


def walked(rank: int, world_size: int) -> list[tuple[int, int]]:
    """(files, depth) of the sixth step's forward and backward, over gloo."""
    walk = _benchmark()
    before = sys.getprofile()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SHARED_MEMORY, "0")
        engine = walk.engine_at(3)
    walks = walk.watched(engine, 6)
    sys.setprofile(before)
    engine.destroy()
    return [
        (len({name for name, _ in walks[phase].functions}), walks[phase].max_depth) for phase in ("forward", "backward")
    ]


def test_a_step_at_stage_3_crosses_at_most_8_files_and_10_frames() -> None:
    # Ranks of its own: groups outlive engines, with the way of sending that an earlier test's environment chose.
    pool = Pool(2)
    try:
        walks = pool.call(walked, (), {}, 300.0)
    finally:
        pool.kill()
    for forward, backward in walks:
        assert forward[0] <= 8 and forward[1] <= 10
        assert backward[0] <= 8 and backward[1] <= 10
