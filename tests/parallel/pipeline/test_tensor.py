"""Layers cut over tensor-parallel ranks inside of a pipeline's stages equal one process, with data parallelism beside both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed.parallel.pipeline.hf import pipeline_of
from deepspeed.parallel.pipeline.layers import LayerSpec
from deepspeed.parallel.pipeline.module import PipelineModule
from deepspeed.parallel.pipeline.topology import PipeModelDataParallelTopology
from deepspeed.utils.errors import DeepSpeedConfigError
from tests.harness import run_ranks
from tests.parallel.pipeline.models import LONG, WIDTH, batches, config_of, start, train
from tests.parallel.pipeline.test_hf import build, token_batches

TENSOR = {"tensor_parallel": {"autotp_size": 2}}
PATTERNS = [
    {"patterns": [r".*\.fc1\.weight$"], "partition_type": "column"},
    {"patterns": [r".*\.fc2\.weight$"], "partition_type": "row"},
]


class Block(nn.Module):
    """Its layers are named as those of a transformer, so its structure says how it is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return hidden


def _described(size: int, stages: int, ranks: int, **more: Any) -> PipelineModule:
    layers = [nn.Linear(WIDTH, WIDTH), *(LayerSpec(Block) for _ in range(3)), nn.Linear(WIDTH, 4)]
    topology = PipeModelDataParallelTopology(num_pp=stages, num_mp=size, num_dp=ranks // (stages * size))
    settings = {"loss_fn": nn.MSELoss(), "partition_method": "uniform", "seed_layers": True}
    return PipelineModule(layers, topology=topology, **{**settings, **more})


def _blocks(rank: int, world: int, size: int, stages: int, cases: list[tuple[int, str, bool]]) -> list[Any]:
    found = []
    for zero, schedule, has_patterns in cases:
        section: dict[str, Any] = {"autotp_size": size}
        if has_patterns and size > 1:
            section["partition_config"] = {"layer_specs": PATTERNS}
        torch.manual_seed(4)
        engine = start(
            _described(size, stages, world, activation_checkpoint_interval=int(zero == 1)),
            config_of(zero, schedule=schedule, gradient_clipping=0.5, tensor_parallel=section),
        )
        made = train(engine)
        numels = {name: param.numel() for name, param in engine.module.named_parameters() if zero < 3}
        found.append({"losses": made["losses"], "norm": made["norm"], "numels": numels})
        engine.destroy()
    return found


def test_described_layers_are_cut_in_width_and_in_depth_at_every_zero_stage() -> None:
    cases = [(1, "zb-h1", True), (3, "1f1b", False)]
    if LONG:
        cases += [(zero, schedule, zero > 0) for zero in range(4) for schedule in ("gpipe", "zb-h2")]
    (expected,) = run_ranks(1, _blocks, 1, 1, cases)
    for found in run_ranks(4, _blocks, 2, 2, cases):
        for case, mine, wanted in zip(cases, found, expected, strict=True):
            assert mine["losses"] == pytest.approx(wanted["losses"], rel=2e-6), case
            assert mine["norm"] == pytest.approx(wanted["norm"], rel=1e-5), case
            cut = [numel for name, numel in mine["numels"].items() if "fc1.weight" in name]
            assert set(cut) <= {WIDTH * 24}, "each rank has half of a layer"


@pytest.mark.skipif(not LONG, reason="eight ranks: make test-pipeline")
def test_three_dims_equal_one_process_at_every_zero_stage() -> None:
    cases = [(zero, "1f1b", False) for zero in range(4)]
    (expected,) = run_ranks(1, _doubled, cases)
    for found in run_ranks(8, _blocks, 2, 2, cases, timeout=200):
        for mine, wanted in zip(found, expected, strict=True):
            assert mine["losses"] == pytest.approx(wanted["losses"], rel=2e-6)
            assert mine["norm"] == pytest.approx(wanted["norm"], rel=1e-5)


def _doubled(rank: int, world: int, cases: list[Any]) -> list[dict[str, Any]]:
    """One process that has both data-parallel ranks' micro-batches, as twice as many."""
    data = [item for pair in zip(batches(8, 0, 2), batches(8, 1, 2), strict=True) for item in pair]
    torch.manual_seed(4)
    engine = start(_described(1, 1, 1), config_of(0, accumulation=8, gradient_clipping=0.5))
    losses = [engine.train_batch(iter(data[i : i + 8])).item() for i in (0, 8)]
    found = {"losses": losses, "norm": engine.get_global_grad_norm()}
    engine.destroy()
    return [found] * len(cases)


def _families(rank: int, world: int, size: int, stages: int, families: list[tuple[str, int]]) -> list[Any]:
    found = []
    for family, zero in families:
        topology = PipeModelDataParallelTopology(num_pp=stages, num_mp=size, num_dp=1)
        model = build(family, attention_dropout=0.0, num_key_value_heads=2 if family != "gpt_neox" else None)
        module = pipeline_of(model, topology=topology)
        config = config_of(zero, accumulation=2, tensor_parallel={"autotp_size": size})
        engine = start(module, config)
        data = token_batches(4)
        losses = [engine.train_batch(data).item() for _ in range(2)]
        found.append((losses, engine.get_global_grad_norm()))
        engine.destroy()
    return found


def test_families_of_hugging_face_are_cut_by_their_own_plan_in_each_stage() -> None:
    families = [("gemma3_text", 1)]
    if LONG:
        families += [
            ("llama", 1),
            ("qwen3", 3),
            ("phi3", 0),
            ("gpt_neox", 1),
            ("olmo2", 2),
            ("granite", 0),
            ("cohere", 1),
        ]
    (expected,) = run_ranks(1, _families, 1, 1, families)
    for found in run_ranks(4, _families, 2, 2, families):
        for family, (losses, norm), (wanted, wanted_norm) in zip(families, found, expected, strict=True):
            assert losses == pytest.approx(wanted, rel=5e-6), family
            assert norm == pytest.approx(wanted_norm, rel=2e-5), family


def _refused(rank: int, world: int) -> None:
    unmet = {
        **TENSOR["tensor_parallel"],
        "partition_config": {"layer_specs": [{**PATTERNS[0], "patterns": ["nothing"]}]},
    }
    for section, words in ((unmet, "matches \\['nothing'\\]"), (TENSOR["tensor_parallel"], "finds nothing to cut")):
        topology = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=1)
        module = PipelineModule([nn.Linear(4, 4) for _ in range(4)], topology=topology, loss_fn=nn.MSELoss())
        with pytest.raises(DeepSpeedConfigError, match=words):
            start(module, config_of(tensor_parallel=section))


def test_rules_that_no_stage_meets_are_refused_on_all_ranks() -> None:
    run_ranks(4, _refused)
