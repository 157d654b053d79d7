"""The oracle itself: every model learns, and the mirrored policies agree where they must."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from tests.models import MODELS, Model, build, make_batches, total_loss
from tests.oracle import LossScale, assert_close_weights, train_plain


def _adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=3e-3)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_learns_one_batch_by_heart(name: str) -> None:
    model = build(name)
    batches = make_batches(model, num_steps=1, accumulation=1, samples=6) * 15
    losses = train_plain(model, batches, _adam).losses
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_same_seed_gives_the_same_model_and_batches(name: str) -> None:
    first, second = build(name), build(name)
    assert_close_weights(first.state_dict(), second.state_dict(), tolerance=0)
    assert all(
        torch.equal(a, b)
        for one, two in zip(_flat(first), _flat(second), strict=True)
        for a, b in zip(one, two, strict=True)
    )


def _flat(model: Model) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [batch for step in make_batches(model, num_steps=2, accumulation=2, samples=4) for batch in step]


def test_fp32_is_the_textbook_loop() -> None:
    model, by_hand = build("mlp"), build("mlp")
    batches = make_batches(model, num_steps=5, accumulation=2, samples=6)
    optimizer = _adam(list(by_hand.parameters()))
    for micro_batches in batches:
        for batch in micro_batches:
            (total_loss(by_hand(*batch)) / 2).backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert_close_weights(train_plain(model, batches, _adam, clip=0.5).weights, by_hand.state_dict(), tolerance=1e-6)


@pytest.mark.parametrize("reduce_at", ["micro_batch", "boundary"])
def test_low_precision_follows_fp32(reduce_at: Literal["micro_batch", "boundary"]) -> None:
    model = build("gpt_tied")
    batches = make_batches(model, num_steps=5, accumulation=2, samples=6)
    exact = train_plain(model, batches, _adam)
    rounded = train_plain(model, batches, _adam, dtype=torch.bfloat16, world_size=3, reduce_at=reduce_at)
    assert rounded.losses == pytest.approx(exact.losses, rel=0.02)
    assert rounded.losses != exact.losses
    assert rounded.weights["head.weight"].dtype == torch.float32


def test_dynamic_loss_scale_skips_halves_and_doubles() -> None:
    model = build("mlp")
    batches = make_batches(model, num_steps=8, accumulation=1, samples=2)
    scale = LossScale(scale=2.0**40, window=2, hysteresis=1)
    trained = train_plain(model, batches, _adam, dtype=torch.float16, loss_scale=scale)
    assert trained.num_skipped == 8
    assert trained.loss_scales[:3] == [2.0**40, 2.0**39, 2.0**38]
    assert_close_weights(trained.weights, model.state_dict(), tolerance=0)
    scale = LossScale(scale=8.0, window=2, hysteresis=1)
    grown = train_plain(model, batches, _adam, dtype=torch.float16, loss_scale=scale)
    assert grown.loss_scales == [8, 8, 8, 16, 16, 32, 32, 64]
