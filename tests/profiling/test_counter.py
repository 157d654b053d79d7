"""Operations counted against the analytic count, whatever kernel runs and whatever is recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from deepspeed.profiling.counter import OpCounter, Phase, StepFlops
from tests.models import example_module

B, T, L, C, H, V = 2, 24, 3, 32, 4, 48
LINEAR = 2 * B * T * (12 * L * C * C + V * C)
"""Forward of the example GPT's matrices: qkv 3 C^2, proj C^2, MLP 8 C^2 per block, and the head."""
SCORES = 2 * B * T * T * C * L
"""Forward of the attention scores; mixing the values takes as many."""
FORWARD = LINEAR + 2 * SCORES


def gpt(**changes: Any) -> nn.Module:
    example = example_module()
    torch.manual_seed(0)
    return example.Gpt(example.GptConfig(**({"vocab": V, "seq": T, "width": C, "layers": L, "heads": H} | changes)))


def tokens() -> Tensor:
    return torch.randint(V, (B, T))


def count(call: Callable[[], Tensor]) -> dict[str, int]:
    """Operations of a loss and its backward by phase, those that are not zero."""
    flops = StepFlops()
    with OpCounter(flops.add):
        call().backward()
    return {phase.value: n for phase, n in flops.by_phase.items() if n}


@pytest.mark.parametrize("tied", [False, True])
def test_the_example_gpt_counts_exactly(tied: bool) -> None:
    model, x = gpt(tied=tied), tokens()
    assert count(lambda: model(x, x)) == {"forward": FORWARD, "backward": 2 * FORWARD, "recompute": SCORES}


def test_the_models_own_operations_do_not_depend_on_the_attention_kernel() -> None:
    model, x = gpt(), tokens()
    with sdpa_kernel(SDPBackend.MATH):  # keeps the scores, so its backward computes nothing again
        assert count(lambda: model(x, x)) == {"forward": FORWARD, "backward": 2 * FORWARD}


def test_inference_mode_counts_the_same_forward() -> None:
    model, x, flops = gpt(), tokens(), StepFlops()
    with torch.inference_mode(), OpCounter(flops.add):
        model(x)
    assert flops.by_phase[Phase.FORWARD] == flops.model == FORWARD


class Recomputed(nn.Module):
    def __init__(self, inner: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.inner, *args, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_checkpointing_repeats_is_counted_apart(use_reentrant: bool) -> None:
    model, x = gpt(), tokens()
    model.blocks = nn.ModuleList(Recomputed(block, use_reentrant) for block in model.blocks)
    # A block's own forward, and the kernel's scores. Without reentry the recomputation stops when the last saved tensor
    # is there, which is before a block's last product.
    last = 2 * B * T * 4 * C * C * L
    again = FORWARD - 2 * B * T * V * C - (0 if use_reentrant else last)
    assert count(lambda: model(x, x)) == {"forward": FORWARD, "backward": 2 * FORWARD, "recompute": again + SCORES}


def test_a_compiled_model_counts_the_same() -> None:
    model, x = torch.compile(gpt(), backend="eager"), tokens()
    assert count(lambda: model(x, x))["forward"] == FORWARD
    torch._dynamo.reset()


class Lora(nn.Module):
    """A frozen matrix and a trained detour of rank R."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(C, C), nn.Linear(C, 4, bias=False), nn.Linear(4, C, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def test_frozen_matrices_cost_one_product_in_backward_and_lora_two() -> None:
    model, x = nn.Sequential(Lora(), Lora()), torch.randn(T, C)
    base, detour = 2 * T * C * C, 2 * T * 2 * 4 * C
    # The first layer's input needs no gradient: its base costs nothing in backward, its `a` one product.
    backward = base + 2 * detour + (2 * detour - detour // 2)
    assert count(lambda: model(x).sum()) == {"forward": 2 * (base + detour), "backward": backward}


def test_grouped_heads_count_by_the_queries() -> None:
    q = torch.randn(B, H, T, 8, requires_grad=True)
    k, v = (torch.randn(B, 2, T, 8, requires_grad=True) for _ in range(2))
    counted = count(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True).sum())
    product = 2 * B * H * T * T * 8
    assert counted["forward"] == 2 * product
    assert counted["backward"] == 4 * product


def test_convolutions_and_einsums_are_counted_and_elementwise_operations_are_not() -> None:
    x = torch.randn(2, 3, 8, 8)
    conv = nn.Conv2d(3, 5, 3, padding=1)
    assert count(lambda: F.gelu(conv(x)).sum())["forward"] == 2 * 2 * 5 * 8 * 8 * 3 * 9
    a, b = torch.randn(4, 6, requires_grad=True), torch.randn(6, 5)
    assert count(lambda: torch.einsum("ij,jk->ik", a, b).exp().sum()) == {"forward": 240, "backward": 240}


def test_results_are_those_of_the_unwatched_program() -> None:
    model, x = gpt(), tokens()
    plain = torch.autograd.grad(model(x, x), list(model.parameters()))
    with OpCounter(lambda *_: None):
        counted = torch.autograd.grad(model(x, x), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, counted, strict=True))


@pytest.mark.parametrize("pads", [False, True])
def test_whole_transformer_layers_without_gradients_count_as_those_with(pads: bool) -> None:
    batch, lengths, width, hidden = 2, (6, 6) if not pads else (6, 4), 32, 48
    layer = nn.TransformerEncoderLayer(width, 4, hidden, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=pads).eval()
    x = torch.randn(batch, 6, width)
    mask = torch.arange(6)[None] >= torch.tensor(lengths)[:, None] if pads else None
    flops = StepFlops()
    with torch.no_grad(), OpCounter(flops.add):
        encoder(x, src_key_padding_mask=mask)
    scores = 2 * sum(length * length for length in lengths) * width
    assert flops.model == 2 * sum(lengths) * (4 * width * width + 2 * width * hidden) + 2 * scores


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_recurrent_layers_are_counted(name: str) -> None:
    times, batch, width, hidden = 5, 3, 4, 8
    layer = getattr(nn, name)(width, hidden, num_layers=2, bidirectional=True)
    x = torch.randn(times, batch, width, requires_grad=True)
    seen = count(lambda: layer(x)[0].sum())
    numel = sum(param.numel() for param in layer.parameters() if param.dim() == 2)
    assert seen["forward"] == 2 * times * batch * numel
    # GRU's first times multiply by a hidden state of zeros, which needs no gradient.
    assert 2 * seen["forward"] - 4 * 2 * batch * hidden * 3 * hidden <= seen["backward"] <= 2 * seen["forward"]
