"""Models with spread experts answer what they would alone: Hugging Face's, and `MoE` with the drops of evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.moe.layer import MoE
from deepspeed.utils.errors import DeepSpeedError
from tests.harness import run_ranks
from tests.parallel.expert.hf import build
from tests.parallel.expert.models import NUM_EXPERTS, WIDTH, FeedForward, set_values

pytest.importorskip("transformers")
PROMPTS = [[3, 7, 1], [9, 2, 4, 4, 11]]
NEW = 5


def layer(ep: int) -> MoE:
    made = MoE(
        WIDTH,
        FeedForward(),
        NUM_EXPERTS,
        ep_size=ep,
        k=1,
        capacity_factor=4.0,
        eval_capacity_factor=0.5,
        min_capacity=1,
        use_rts=False,
    )
    set_values(made)
    return made


def answers(rank: int, world_size: int) -> dict[str, Any]:
    """Of this rank's own prompt: alone, and with experts on two ranks."""
    ids = torch.tensor([PROMPTS[rank]])
    found: dict[str, Any] = {}
    plain = build("mixtral").eval()
    with torch.no_grad():
        found["logits"] = plain(input_ids=ids).logits
    # Rank 0's answer ends at once: its eos is the first token that it says.
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    first = plain.generate(ids, **settings)[0, len(PROMPTS[rank])]
    settings["eos_token_id"] = int(first) if rank == 0 else None
    found["words"] = plain.generate(ids, **settings)
    engine = deepspeed.init_inference(build("mixtral"), dtype=torch.float32, moe={"ep_size": 2})
    found["experts"] = engine.module.model.layers[0].mlp.experts.down_proj.shape[0]
    found["spread logits"] = engine(input_ids=ids).logits
    found["spread words"] = engine.generate(ids, **settings)
    with pytest.raises(DeepSpeedError, match="spread over 2 ranks would write those of this rank"):
        engine.save_pretrained("not_made")
    engine.destroy()
    x = torch.randn(11, WIDTH, generator=torch.Generator().manual_seed(rank))
    with torch.no_grad():
        found["native"] = layer(1).eval()(x)[0]
    engine = deepspeed.init_inference(layer(1), dtype=torch.float32, ep_size=2)
    found["spread native"] = engine(x)[0]
    engine.destroy()
    return found


def test_each_rank_answers_what_it_would_alone() -> None:
    for rank, found in enumerate(run_ranks(2, answers)):
        assert found["experts"] == 2
        torch.testing.assert_close(found["spread logits"], found["logits"], rtol=1e-5, atol=1e-6)
        assert torch.equal(found["spread words"], found["words"])
        assert found["words"].shape[1] == len(PROMPTS[rank]) + (1 if rank == 0 else NEW)
        torch.testing.assert_close(found["spread native"], found["native"], rtol=1e-5, atol=1e-6)
        assert (found["native"] == 0).all(1).any(), "nothing was dropped"


def refusals(rank: int, world_size: int) -> list[str]:
    cases: list[tuple[nn.Module, dict[str, Any]]] = [
        (nn.Linear(2, 2), {"moe": {"ep_size": 2}}),
        (layer(1), {"moe": {"ep_size": [2, 4]}}),
        (layer(1), {"moe": {"ep_size": 3}}),
        (layer(1), {"moe": {"ep_size": 2}, "checkpoint": "nowhere"}),
    ]
    found = []
    for module, settings in cases:
        with pytest.raises((ValueError, AssertionError)) as caught:
            deepspeed.init_inference(module, dtype=torch.float32, **settings)
        found.append(str(caught.value))
    return found


def test_what_cannot_be_spread_is_refused_on_all_ranks() -> None:
    expected = [
        "moe.ep_size = 2, but Linear has no layers with experts",
        "moe.ep_size = (2, 4): experts are spread over 2 and over 4 ranks",
        "moe.ep_size = 3, but the job has 2 ranks",
        "moe.ep_size = 2 together with checkpoint",
    ]
    for found in run_ranks(2, refusals):
        assert all(text.startswith(start) for text, start in zip(found, expected, strict=True)), found
