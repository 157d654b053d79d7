"""Vision attention over parts of patches, and images among text, equal the whole in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed.sequence import (
    LlavaFusionAdapter,
    Qwen2VLFusionAdapter,
    UlyssesSPViTAttention,
    auto_wrap_model_for_sp,
    detect_model_sp_info,
)
from deepspeed.utils.errors import DeepSpeedError
from tests.harness import run_ranks


def tower() -> Any:
    """A CLIP vision model of one layer."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=2
        )
    )


def layer_of(model: Any) -> nn.Module:
    """Its attention."""
    return next(m for m in model.modules() if type(m).__name__ in ("CLIPAttention", "UlyssesSPViTAttention"))


def states() -> Tensor:
    """[b, 1 + patches, width]."""
    return torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))


def by_parts(rank: int, world: int) -> tuple[Tensor, Tensor, str]:
    """Output and input's gradient of this rank's patches; what a model without attention is told."""
    model = auto_wrap_model_for_sp(tower(), dist.group.WORLD)
    layer = layer_of(model)
    assert isinstance(layer, UlyssesSPViTAttention)
    assert layer.has_cls_token
    own = slice(1 + 4 * rank, 5 + 4 * rank)
    part = torch.cat([states()[:, :1], states()[:, own]], 1).requires_grad_()
    output = layer(part)[0]
    output[:, 1:].square().sum().backward()
    with pytest.raises(DeepSpeedError) as error:
        auto_wrap_model_for_sp(nn.Linear(2, 2), dist.group.WORLD)
    return output.detach(), part.grad, str(error.value)


def test_a_tower_s_attention_sees_all_patches() -> None:
    x = states().requires_grad_()
    whole = layer_of(tower())(x)[0]
    whole[:, 1:].square().sum().backward()
    found = run_ranks(2, by_parts)
    torch.testing.assert_close(torch.cat([found[0][0], found[1][0][:, 1:]], 1), whole.detach())
    torch.testing.assert_close(torch.cat([found[0][1][:, 1:], found[1][1][:, 1:]], 1), x.grad[:, 1:])
    assert "Linear has no attention of a class known here" in found[0][2]


def fuse(rank: int, world: int) -> tuple[Tensor, Tensor, str]:
    """Llava's and Qwen's fused parts; what too few features are told."""
    group = dist.group.WORLD
    features = torch.arange(4.0).view(1, 4, 1).chunk(world, 1)[rank] + 10
    text, ids = torch.arange(8.0).view(1, 8, 1), torch.tensor([[1, 7, 7, 7, 7, 2, 3, 4]])
    llava = LlavaFusionAdapter(lambda t: t * 2, group, 7)(features, text, ids)
    qwen = Qwen2VLFusionAdapter(lambda t: t * 2, group, 1, 2)(features, text, ids)
    with pytest.raises(DeepSpeedError) as error:
        LlavaFusionAdapter(lambda t: t, group, 3)(features, text, ids)
    return llava, qwen, str(error.value)


def test_images_take_the_place_of_their_tokens() -> None:
    found = run_ranks(2, fuse)
    for kind in (0, 1):
        assert torch.cat([each[kind] for each in found], 1).flatten().tolist() == [0, 20, 22, 24, 26, 5, 6, 7]
    assert "1 tokens stand for images, and there are 1 x 4 visual features" in found[0][2]


def test_what_a_model_has_is_found_by_name() -> None:
    model = nn.ModuleDict({"vision": tower(), "multi_modal_projector": nn.Linear(16, 8)})
    info = detect_model_sp_info(model)
    assert [type(module).__name__ for _, module in info.vit_attn_modules] == ["CLIPAttention"]
    assert info.llm_attn_modules == [] and info.vision_projection_module is not None
    assert info.vision_projection_module[0] == "multi_modal_projector"
