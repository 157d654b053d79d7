"""Scripts that change their adapters in the middle of a run train as in plain PyTorch, at every ZeRO stage."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")

from tests.harness import run_ranks
from tests.integrations import peft_edits as jobs


@pytest.mark.quick("3-fp32-2", "2-bf16-1")
@pytest.mark.compat(
    "PEFT", "adapters unfrozen, alternated, merged and unmerged, added, switched, deleted and unloaded between steps"
)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_adapters_that_change_between_steps_train_as_in_plain_pytorch(
    stage: int, dtype: torch.dtype, world_size: int
) -> None:
    run_ranks(world_size, jobs.edit, stage, dtype)


@pytest.mark.compat("PEFT", "AdaLoRA prunes its ranks")
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", range(4))
def test_adalora_prunes_the_same_ranks_as_in_plain_pytorch_and_has_the_same_weights(
    stage: int, world_size: int
) -> None:
    run_ranks(world_size, jobs.prune, stage)
