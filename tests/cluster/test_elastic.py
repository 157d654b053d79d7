"""An elastic job loses a node, goes on alone from its last checkpoint, and takes the node back."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import until
from tests.cluster.nodes import Cluster, deepspeed, environment

TRAIN = """
import json, os, sys, time, torch, torch.distributed as dist, deepspeed

folder = sys.argv[-1]
config = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}},
    "zero_optimization": {"stage": 2},
    "gradient_clipping": 0.0,
    "elasticity": {
        "enabled": True, "version": 0.1, "max_train_batch_size": 8, "micro_batch_sizes": [2, 4], "max_gpus": 4,
    },
}
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
engine, *_ = deepspeed.initialize(model=model, config=config)
checkpoints = os.path.join(folder, "checkpoints")
if os.path.exists(os.path.join(checkpoints, "latest")):
    engine.load_checkpoint(checkpoints)
world, rank, micro = dist.get_world_size(), dist.get_rank(), engine.train_micro_batch_size_per_gpu()
assert engine.train_batch_size() == 8, engine.train_batch_size()


def batch(step, sample):
    generator = torch.Generator().manual_seed(1000 * step + sample)
    x = torch.randn(8, generator=generator)
    return x, x.sum(0, keepdim=True)


while engine.global_steps < 100000:
    step = engine.global_steps
    total = torch.zeros(1)
    for accumulated in range(engine.gradient_accumulation_steps()):
        first = (accumulated * world + rank) * micro
        x, y = (torch.stack(part) for part in zip(*(batch(step, first + i) for i in range(micro))))
        loss = (engine(x) - y).square().mean()
        engine.backward(loss)
        engine.step()
        total += loss.detach() / engine.gradient_accumulation_steps()
    dist.all_reduce(total)
    engine.save_checkpoint(checkpoints, tag=f"step{engine.global_steps}")
    if rank == 0:
        with open(os.path.join(folder, "log"), "a") as file:
            file.write(json.dumps([step, world, total.item() / world]) + "\\n")
    if os.path.exists(os.path.join(folder, "finish")):
        break
    time.sleep(0.1)
"""


def _log(folder: Path) -> list[Any]:
    path = folder / "log"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def mended(nodes: Cluster) -> Iterator[None]:
    yield
    nodes.mend("b")


def test_a_cut_node_is_left_behind_and_taken_back(nodes: Cluster, tmp_path: Path, mended: None) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    flags = ["-H", nodes.hostfile(a=1, b=1), "--launcher", "ssh", "--elastic_training"]
    flags += ["--master_addr", nodes["a"].address, "--min_elastic_nodes", "1", "--max_elastic_nodes", "2"]
    with (tmp_path / "err").open("w") as err:
        command = deepspeed(*flags, str(script), str(tmp_path))
        running = nodes.head.start(*command, env=environment(), stdout=err, stderr=err)
        try:
            assert until(lambda: len(_log(tmp_path)) >= 5, 90), (tmp_path / "err").read_text()
            assert {world for _, world, _ in _log(tmp_path)} == {2}
            nodes.cut("b")
            assert until(lambda: _log(tmp_path)[-1][1] == 1, 90), (tmp_path / "err").read_text()
            assert until(lambda: _log(tmp_path)[-5][1] == 1, 30)
            nodes.mend("b")
            assert until(lambda: _log(tmp_path)[-1][1] == 2, 120), (tmp_path / "err").read_text()
            (tmp_path / "finish").touch()
            assert running.wait(60) == 0, (tmp_path / "err").read_text()
        finally:
            running.kill()
            running.wait()
    assert until(lambda: not nodes.leftovers(), 30)
    _assert_no_step_is_lost(_log(tmp_path))


def _assert_no_step_is_lost(log: list[Any]) -> None:
    """Steps follow each other; one that was not saved in time is done again. Losses are a single process's."""
    worlds = [world for _, world, _ in log]
    assert worlds == sorted(worlds[: worlds.index(1)], reverse=True) + [1] * worlds.count(1) + [2] * (
        len(worlds) - worlds.count(1) - worlds.index(1)
    )
    for (before, *_), (after, *_) in itertools.pairwise(log):
        assert after in (before, before + 1)
    losses = {step: loss for step, _, loss in log}
    reference = _reference(max(losses) + 1)
    assert [losses[step] for step in sorted(losses)] == pytest.approx(reference, rel=1e-5)


def _reference(steps: int) -> list[float]:
    """Plain PyTorch, one process, the whole batch."""
    code = """
import json, sys, torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for step in range(int(sys.argv[1])):
    xs = [torch.randn(8, generator=torch.Generator().manual_seed(1000 * step + sample)) for sample in range(8)]
    x = torch.stack(xs)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(json.dumps(losses))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(steps)], capture_output=True, text=True, check=True, timeout=60
    )
    return list(json.loads(done.stdout))
