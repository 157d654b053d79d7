"""What combines with experts on several ranks: one run per cell, each equal to one process or refused with a reason.

`python -m tests.parallel.expert.composability` writes docs/composability.md; the tests run the same cells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from deepspeed.utils.errors import DeepSpeedError
from tests.harness import close_pools, run_ranks
from tests.parallel.expert import test_pipeline
from tests.parallel.expert.runs import ADAM, compare, plain, train
from tests.parallel.test_pairs import SHOWN, check

DOC = Path(__file__).resolve().parents[3] / "docs" / "composability.md"
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
PAIRS = [
    "# Two ways of dividing ranks at once",
    "",
    "Models of Transformers (Llama; Mixtral for experts), three clipped steps of packed and whole sequences; losses to 1e-6, the",
    "first gradients and norms to 1e-5 of one process. Every stage, and more ranks: `make test-pairs`. Pipelines: their page.",
    "",
    "| tensor | sequence | experts | layers with experts | ZeRO | ranks | |",
    "|--:|--:|--:|---|---|--:|---|",
]
STAGED = [
    "# Experts inside of a pipeline's stages",
    "",
    "Two `MoE` layers on two stages, three clipped steps of two micro-batches; losses to 1e-6, norms to 1e-5 of one process.",
    "",
    "| pipeline | experts | layers with experts | ZeRO | ranks | |",
    "|--:|--:|---|---|--:|---|",
]
KINDS = {
    "": "fused",
    "native": "`MoE`",
    "cut": "`MoE`, `enable_expert_tensor_parallelism`, residual",
    "list": "a list of modules",
}


@dataclass(frozen=True)
class Cell:
    """One combination: on `ranks` ranks, experts over `ep` of them."""

    what: str
    stage: int
    ranks: int = 2
    ep: int = 2
    extra: dict[str, Any] = field(default_factory=dict)
    within: float = 0.0
    """Compared with ep 1, to so much: low precision rounds partial sums where one process would not."""
    refused: str = ""
    """The beginning of the reason."""


CELLS = [
    *(Cell("fp32", stage) for stage in range(4)),
    *(Cell("fp32, 2 copies of each expert", stage, ranks=4) for stage in range(4)),
    *(Cell("fp32, 2 copies, data before experts", stage, ranks=4, extra={"use_data_before_expert_parallelism": True}) for stage in (0, 3)),
    *(Cell("bf16", stage, extra=BF16, within=1e-2) for stage in range(4)),
    *(Cell("fp16", stage, extra=FP16, within=1e-2) for stage in range(4)),
    *(Cell("optimizer on the CPU's tier", stage, extra={"zero": OFFLOAD, "optimizer": ADAM}) for stage in (1, 2, 3)),
    Cell("parameters on the CPU's tier", 3, extra={"zero": {**OFFLOAD, "offload_param": {"device": "cpu"}}, "optimizer": ADAM}),
    *(Cell("LAMB", stage, extra={"optimizer": {"type": "Lamb", "params": {"lr": 0.01}}}, within=1e-5) for stage in (0, 2)),
    Cell("MiCS", 3, ranks=4, extra={"zero": {"mics_shard_size": 2}}, refused="zero_optimization.mics_shard_size = 2 with experts"),
    Cell("hpZ", 3, ranks=4, extra={"zero": {"zero_hpz_partition_size": 2}}, refused="zero_optimization.zero_hpz_partition_size = 2 with experts"),
    Cell("1-bit Adam", 1, extra={"optimizer": {"type": "OneBitAdam", "params": {"lr": 0.01}}}, refused="OnebitAdam averages"),
    Cell("experts on 3 of 4 ranks", 1, ranks=4, ep=3, refused="num_experts = 4 should be divisible by ep_size = 3"),
]  # fmt: skip


def run_cell(cell: Cell) -> str:
    """The cell's words for the table; raises where it is neither equal nor refused as it says."""
    if cell.refused:
        texts = run_ranks(cell.ranks, refusal, cell.ep, cell.stage, cell.extra)
        assert all(text.startswith(cell.refused) for text in texts), texts
        return f"refused: {texts[0].splitlines()[0]}"
    found = run_ranks(cell.ranks, train, cell.ep, 2, cell.stage, cell.extra)
    if cell.within:
        alone = run_ranks(cell.ranks, train, 1, 2, cell.stage, cell.extra)[0]
        for mine in found:
            assert mine.losses == pytest.approx(alone.losses, rel=cell.within)
            assert mine.norms == pytest.approx(alone.norms, rel=3 * cell.within)
        return f"equals ep 1, to {cell.within:g}"
    compare(found, plain(cell.ranks, 2, is_adam="optimizer" in cell.extra))
    return "equals one process"


def refusal(rank: int, world_size: int, ep: int, stage: int, extra: dict[str, Any]) -> str:
    """What a rank is told."""
    with pytest.raises(DeepSpeedError) as caught:
        train(rank, world_size, ep, 2, stage, extra)
    return str(caught.value)


def write() -> str:
    """The page."""
    lines = [
        "# What combines with experts on several ranks",
        "",
        "Written by `python -m tests.parallel.expert.composability`: every line is a training run of a model with two layers of four",
        "experts, top-2, clipped, three steps; losses to 1e-6, norms and weights to 1e-5 of a dense loop over all experts in one",
        "process. The same lines are tests.",
        "",
        "| with | ZeRO stage | ranks, ep | |",
        "|---|--:|---|---|",
    ]
    for cell in CELLS:
        print(cell, flush=True)
        lines.append(f"| {cell.what} | {cell.stage} | {cell.ranks}, {cell.ep} | {run_cell(cell)} |")
    text = "\n".join([*lines, "", *written_pairs(), "", *written_pipelines()]) + "\n"
    close_pools()
    return text


def written_pairs() -> list[str]:
    """The second table."""
    lines = [*PAIRS]
    for world, way in SHOWN:
        check(world, way)
        zero = ", ".join([str(way.stage), *(f"{key} = {value}" for key, value in way.zero.items())])
        lines.append(
            f"| {way.tp} | {way.sp} | {way.ep} | {KINDS[way.experts] if way.ep > 1 else ''} | {zero} | {world} | equals one process |"
        )
    return lines


def written_pipelines() -> list[str]:
    """The third table."""
    lines = [*STAGED]
    for stage in test_pipeline.STAGES:
        test_pipeline.check(stage)
        lines.append(test_pipeline.PIPELINES.format(stage))
    return lines


if __name__ == "__main__":
    DOC.write_text(write())
