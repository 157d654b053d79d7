"""Memory under tensor parallelism is what theory says: parts of parameters and activations, and never the logits as a whole."""

from __future__ import annotations

from typing import Any

import pytest

import deepspeed
from tests.harness import run_ranks
from tests.parallel.counted import Largest, kept_nbytes
from tests.parallel.tensor.models import LONG, batch, small
from tests.parallel.tensor.runs import config

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96, "vocab_size": 96}
NUM_TOKENS = 2 * 16


def kept(rank: int, world: int, layers: int, section: dict[str, Any]) -> tuple[int, int]:
    """Bytes of activations that one forward keeps, and of the parameters that are cut."""
    asked = config(world)
    asked["tensor_parallel"].update(section)
    engine, *_ = deepspeed.initialize(model=small("llama", num_hidden_layers=layers, **SIZES), config=asked)
    found = kept_nbytes(engine.module, lambda: engine(**batch(2, length=16)).loss)
    cut = sum(p.numel() for name, p in engine.module.named_parameters() if "proj" in name) * 4
    engine.destroy()
    return found, cut


def per_layer(ranks: int, section: dict[str, Any]) -> tuple[float, float]:
    """What the second and third layers keep and have, each; the most of all ranks."""
    one, three = (run_ranks(ranks, kept, layers, section) for layers in (1, 3))
    return tuple(max((c[i] - a[i]) / 2 for a, c in zip(one, three, strict=True)) for i in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=LONG)])
def test_a_layer_keeps_what_theory_says(ranks: int) -> None:
    """Of a token, rank by rank: norms, residual sums and the inputs of columns; the rest in parts. With regions all is in parts
    but the inputs of columns, of which there are two."""
    whole, weights = per_layer(1, {})
    plain, cut = per_layer(ranks, {})
    regions, _ = per_layer(ranks, {"sequence_parallel_regions": True})
    hidden, heads, head_dim, width, elsewhere = 32, 8, 8, 96, 1 - 1 / ranks
    attention = (
        heads * head_dim * 3 + heads
    )  # queries, keys and values of half as many heads, outputs; a sum for each head
    divided = NUM_TOKENS * 4 * (attention + 4 * width)  # gate, its activation, up, their product
    assert cut == weights / ranks
    assert plain == pytest.approx(whole - divided * elsewhere, rel=0.02)
    assert regions == pytest.approx(whole / ranks + NUM_TOKENS * 4 * 2 * hidden * elsewhere, rel=0.02)


VOCAB = 200
"""No other size of the model."""


def largest(rank: int, world: int, section: dict[str, Any], width: int) -> int:
    """Elements of the largest tensor of a width, in a forward and a backward."""
    asked = config(world)
    asked["tensor_parallel"].update(section)
    engine, *_ = deepspeed.initialize(model=small("llama", **{**SIZES, "vocab_size": VOCAB}), config=asked)
    with Largest(width) as seen:
        engine.backward(engine(**batch(2, length=40)).loss)
    engine.step()
    engine.destroy()
    return seen.numel


def test_logits_are_never_whole_under_a_head_that_is_cut() -> None:
    whole, cut = 2 * 40 * VOCAB, {"vocab_parallel_lm_head": True}
    assert set(run_ranks(2, largest, {}, VOCAB)) == {whole}
    assert max(run_ranks(2, largest, cut, VOCAB)) < whole // 2  # the head's weight, transposed
    assert set(run_ranks(2, largest, cut, VOCAB // 2)) == {whole // 2}
