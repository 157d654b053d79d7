"""A model's own seconds come from short copies of it, whatever the engine has made of the model."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from deepspeed.activation.blocks import find_blocks
from deepspeed.memory import clocked as module
from deepspeed.memory.clocked import Clocked, clocked
from deepspeed.planner.cost import Choice, Work, step_parts
from deepspeed.profiling.rates import Rates


class Stack(nn.Module):
    """Blocks between an embedding and a head that is tied to it; positions are looked up in a buffer."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.positions = nn.Embedding(5, 8)
        self.register_buffer("order", torch.arange(5), persistent=False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)) for _ in range(depth))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.positions(self.order[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.head(x).logsumexp(-1).mean()


def test_a_stacks_seconds_are_affine_in_its_blocks_and_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(model: nn.Module, batch: tuple[torch.Tensor]) -> module._Run:
        depth, samples = len(find_blocks(model)), len(batch[0])
        forward_s, backward_s = 3 + 2 * depth + samples * (1 + 0.5 * depth), 5 + samples * 4 * depth
        return module._Run(forward_s, backward_s, forward_s + backward_s)

    monkeypatch.setattr(module, "_seconds", seconds)
    for depth in (2, 9):
        found = clocked(Stack(depth), (torch.zeros(2, 5, dtype=torch.long),), 2, torch.float32)
        assert found.forward_s(7) == pytest.approx(3 + 2 * depth + 7 * (1 + 0.5 * depth))
        assert found.backward_s(7) == pytest.approx(5 + 7 * 4 * depth)


def test_copies_are_clocked_and_the_model_and_its_random_numbers_stay() -> None:
    model, tokens = Stack(5), torch.randint(11, (3, 5))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    found = clocked(model, {"tokens": tokens}, 3, torch.bfloat16)
    assert found.forward_s(1) > 0
    assert found.backward_s(1) > 0
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())
    assert len(model.blocks) == 5


def test_recomputation_costs_the_clocked_forward_once_more() -> None:
    rates = Rates(matmul_flops=1e9, copy_nbytes_s=1e9)
    own = Clocked(forward_call_s=0.1, forward_sample_s=0.2, backward_call_s=0.3, backward_sample_s=0.4)
    work = Work(num_params=0, flops=1e9, forward_flops=3e8, activation_nbytes=1e9, clocked=own)
    plain, again = (
        step_parts(rates, work, Choice(stage=0, micro=2, accumulation=3, recompute=r)) for r in ("none", "full")
    )
    assert plain.busy == pytest.approx(3 * (0.1 + 0.3 + 2 * 0.6))
    assert again.busy - plain.busy == pytest.approx(3 * (0.1 + 2 * 0.2))


def test_samples_that_a_disturbed_clock_took_for_free_cost_at_least_their_operations() -> None:
    wrong = Clocked(forward_call_s=0.1, forward_sample_s=0.0, backward_call_s=0.01, backward_sample_s=0.05)
    right = wrong.at_least(0.02, 0.04)
    assert right.forward_s(4) == pytest.approx(wrong.forward_s(4))
    assert right.forward_sample_s == pytest.approx(0.02)
    assert (right.backward_call_s, right.backward_sample_s) == (0.01, 0.05)
    work = Work(num_params=0, flops=6e9, forward_flops=2e9, activation_nbytes=0, clocked=wrong)
    parts = step_parts(Rates(matmul_flops=1e11, copy_nbytes_s=1e9), work, Choice(stage=0, micro=1, recompute="full"))
    assert parts.again == pytest.approx(2e9 / 2e11), "a forward that took no time would be recomputed in none"


def test_what_else_the_machine_does_for_a_while_meets_all_runs_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = []

    def seconds(model: nn.Module, batch: tuple[torch.Tensor]) -> module._Run:
        turns.append(1)
        samples, waited = len(batch[0]), 10 if len(turns) <= 5 else 2
        return module._Run(samples, 2 * samples, waited * 3 * samples)

    monkeypatch.setattr(module, "_seconds", seconds)
    found = clocked(Stack(9), (torch.zeros(2, 5, dtype=torch.long),), 2, torch.float32)
    assert (found.forward_call_s, found.forward_sample_s, found.backward_sample_s) == pytest.approx((0, 2, 4))


def test_a_run_on_a_cpu_counts_its_own_work_and_not_what_it_waited_for() -> None:
    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.3)
            return (self.weight * x).sum()

    run = module._seconds(Waits(), (torch.ones(1),))
    assert run.wall_s > 0.3
    assert 0 < run.forward_s < 0.2
