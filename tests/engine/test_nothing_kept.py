"""A run keeps no object per step, however seldom it prints, and writes nothing that was not asked for."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deepspeed
from tests.harness import run_ranks

STEPS = 20

ASKED: dict[str, dict[str, Any]] = {
    "prints seldom": {},
    "prints never": {"steps_per_print": None},
    "two micro-batches, clipped, a schedule": {
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.1,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
    },
    "times, and logs collectives": {"wall_clock_breakdown": True, "comms_logger": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 4}},
    "bf16": {"bf16": {"enabled": True}},
}


def objects_grown(rank: int, world_size: int, stage: int, asked: dict[str, Any]) -> dict[str, int]:
    """Objects by type that two times STEPS steps left more than one time did, those that a step keeps for the next aside."""
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **asked,
    }
    engine, *_ = deepspeed.initialize(model=nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), config=config)
    dtype = next(engine.module.parameters()).dtype
    counts: list[Counter[str]] = []
    for _ in range(3):
        for _ in range(STEPS):
            loss = engine(torch.ones(2, 8, dtype=dtype)).float().pow(2).mean()
            engine.backward(loss)
            engine.step()
        gc.collect()
        counts.append(Counter(type(thing).__name__ for thing in gc.get_objects()))
    engine.destroy()
    return {name: n for name, n in (counts[2] - counts[1]).items() if n >= STEPS // 4}


@pytest.mark.quick("3-2-*", "0-1-fp16")
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
@pytest.mark.parametrize(("stage", "world_size"), [(0, 1), (2, 2), (3, 2)])
def test_no_object_is_kept_per_step(stage: int, world_size: int, asked: dict[str, Any]) -> None:
    assert run_ranks(world_size, objects_grown, stage, asked) == [{}] * world_size


NOTEBOOK = """
import json, sys
import torch, deepspeed
config = json.loads(sys.argv[1])
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
engine, *_ = deepspeed.initialize(model=model, config=config)
for _ in range(3):
    loss = engine(torch.ones(2, 4)).pow(2).mean()
    engine.backward(loss)
    engine.step()
engine.destroy()
"""
"""A script without a file of its own and without a launcher."""

SILENT: dict[str, dict[str, Any]] = {
    "nothing": {},
    "times and a profile": {
        "wall_clock_breakdown": True,
        "memory_breakdown": True,
        "flops_profiler": {"enabled": True, "profile_step": 1},
        "dump_state": True,
    },
    "monitors that are off": {
        "csv_monitor": {"enabled": False, "output_path": "csv"},
        "tensorboard": {"enabled": False, "output_path": "tb", "job_name": "j"},
        "comms_logger": {"enabled": True, "verbose": True},
    },
}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


@pytest.mark.quick("times and a profile")
@pytest.mark.parametrize("asked", SILENT.values(), ids=SILENT.keys())
def test_a_notebook_next_to_tensorboards_runs_finds_its_folder_as_it_was(asked: dict[str, Any], tmp_path: Path) -> None:
    runs = tmp_path / "runs" / "Nov29_12-00-00_host"
    runs.mkdir(parents=True)
    (runs / "events.out.tfevents.1.host").write_bytes(b"an event")
    before = snapshot(tmp_path)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "steps_per_print": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": min(len(asked), 3)},
        **asked,
    }
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, json.dumps(config)], cwd=tmp_path, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert snapshot(tmp_path) == before
