"""A checkpoint of any tensor-parallel size loads into any other; the exported model is the whole one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.harness import run_ranks
from tests.parallel.tensor import checkpoint_runs as runs

pytest.importorskip("transformers")


def test_a_checkpoint_loads_at_another_size(tmp_path: Path) -> None:
    first = run_ranks(2, runs.save, str(tmp_path), 2, 2, timeout=120.0)
    exported = torch.load(tmp_path / "export" / "model.bin")
    assert exported["model.layers.0.self_attn.q_proj.weight"].shape == (32, 32)
    for other_tp, other_world in ((1, 1), (1, 2), (2, 2)):
        for losses in run_ranks(other_world, runs.resume, str(tmp_path), other_tp, 2):
            assert losses == pytest.approx(first[0], rel=1e-5)
