"""An out-of-memory error tells what holds the memory and one setting to change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks
from tests.models import Mlp, make_batches


class Greedy(Mlp):
    """Runs out of memory as an allocator does, when told to."""

    error: Exception | None = None

    def forward(self, x: Tensor, y: Tensor) -> Any:
        if self.error is not None:
            raise self.error
        return super().forward(x, y)


def raised(rank: int, world_size: int, stage: int, error: Exception, zero: dict[str, Any]) -> str:
    model = Greedy()
    ((batch,),) = make_batches(model, num_steps=1, accumulation=1, samples=2)
    with engine_of(model, make_config(stage, micro=2, zero=zero)) as engine:
        engine.backward(engine(*batch))
        engine.step()
        model.error = error
        with pytest.raises(type(error)) as caught:
            engine(*batch)
        if stage == 3:
            engine._gatherer.end()
        return str(caught.value)


@pytest.mark.parametrize(
    ("stage", "largest", "cure"),
    [(0, "optimizer", '{"stage": 1}: each rank then keeps 1/2 of it.'), (1, "parameters", '{"stage": 3}: each rank')],
)
def test_what_holds_most_is_named_with_a_cure(stage: int, largest: str, cure: str) -> None:
    message = run_ranks(2, raised, stage, torch.OutOfMemoryError("CUDA out of memory"), {})[1]
    told = f"CUDA out of memory\n[rank 1] out of memory in forward. Largest: {largest} (of {largest} "
    assert message.startswith(told)
    assert cure in message


def test_the_cpu_allocator_s_error_is_told_like_any_other() -> None:
    error = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
    assert "out of memory in forward" in run_ranks(2, raised, 1, error, {})[0]


def test_other_errors_stay_as_they_are() -> None:
    assert run_ranks(2, raised, 1, RuntimeError("shapes differ"), {})[0] == "shapes differ"
