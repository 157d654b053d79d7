"""Sequence parallelism for models that see: `auto_wrap_model_for_sp`, and adapters where images join text.

A vision tower's attention is over patches, few and bidirectional: each rank has a part of them, gathers all, attends, and keeps its
own part. Towers are found by their class; the language model's own attention is left to `UlyssesSPAttentionHF`, and said so.
Where images join text, an adapter gathers the visual features of all ranks, puts them in place of the image's tokens, and
keeps this rank's part of the fused sequence.

A leading class token is every rank's: the parts are [class token, own patches].
Names are the public contract of the original.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed.comm.collective import all_gather_single, reduce_scatter_single
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.logging import warn_once

Group = Any

VISION_ATTENTION = (
    "ViTAttention",
    "CLIPAttention",
    "SiglipAttention",
    "InternVisionAttention",
    "InternVLVisionAttention",
    "Qwen2VLVisionAttention",
    "Idefics2VisionAttention",
    "PaliGemmaVisionAttention",
)
"""Classes of attention in vision towers, of [batch, patches, width]."""
PROJECTIONS = (
    "multi_modal_projector",
    "mm_projector",
    "visual_projection",
    "vision_projection",
    "mlp1",
    "merger",
    "connector",
)
"""Last names of modules between a vision tower and a language model."""


class _Gathered(torch.autograd.Function):
    """Every rank's part side by side along dimension 1; backward sums what all ranks did with one's part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.num_ranks = group, dist.get_world_size(group)
        found = part.new_empty(ctx.num_ranks, *part.shape)
        all_gather_single(found.view(-1), part.contiguous().view(-1), group=group)
        return torch.cat(list(found), dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        pieces = torch.stack(grads[0].chunk(ctx.num_ranks, dim=1)).contiguous()
        own = pieces.new_empty(pieces.shape[1:])
        reduce_scatter_single(own.view(-1), pieces.view(-1), group=ctx.group)
        return own, None


def gather_sequence(part: Tensor, group: Group) -> Tensor:
    """[b, s/P, ...] of every rank as [b, s, ...]. Collective; differentiable. The parts are of one size."""
    found = _Gathered.apply(part, group)
    assert isinstance(found, Tensor), "one output"
    return found


class UlyssesSPViTAttention(nn.Module):
    """A vision tower's attention over all patches, for this rank's part of them."""

    def __init__(self, attn: nn.Module, process_group: Group, has_cls_token: bool = True) -> None:
        super().__init__()
        self.attn, self.process_group, self.has_cls_token = attn, process_group, has_cls_token

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states: [b, (1 +) patches/P, width]; the output of the wrapped attention for the same tokens. Collective."""
        num_first = int(self.has_cls_token)
        first, patches = hidden_states[:, :num_first], hidden_states[:, num_first:]
        whole = torch.cat([first, gather_sequence(patches, self.process_group)], dim=1)
        output = self.attn(whole, *args, **kwargs)
        start = num_first + dist.get_rank(self.process_group) * patches.shape[1]

        def own(tensor: Tensor) -> Tensor:
            return torch.cat([tensor[:, :num_first], tensor[:, start : start + patches.shape[1]]], dim=1)

        return own(output) if isinstance(output, Tensor) else (own(output[0]), *output[1:])


@dataclass
class SPModelInfo:
    """What of a model attends: names and modules of vision towers' attention, and of language models'; and what brings the one's
    features to the other's width, None without such a module."""

    vit_attn_modules: list[tuple[str, nn.Module]] = field(default_factory=list)
    llm_attn_modules: list[tuple[str, nn.Module]] = field(default_factory=list)
    vision_projection_module: tuple[str, nn.Module] | None = None


def detect_model_sp_info(model: nn.Module) -> SPModelInfo:
    """Find attention by its class's name, and the projection by its own."""
    info = SPModelInfo()
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in VISION_ATTENTION:
            info.vit_attn_modules.append((name, module))
        elif kind.endswith("Attention") and hasattr(module, "layer_idx"):
            info.llm_attn_modules.append((name, module))
        if info.vision_projection_module is None and name.rpartition(".")[2] in PROJECTIONS:
            info.vision_projection_module = (name, module)
    return info


def auto_wrap_model_for_sp(model: nn.Module, process_group: Group) -> nn.Module:
    """Wrap the attention of a model's vision towers, in place; the model. Raises DeepSpeedError where there is none."""
    info = detect_model_sp_info(model)
    if not info.vit_attn_modules and not info.llm_attn_modules:
        raise DeepSpeedError(
            f"auto_wrap_model_for_sp: {type(model).__name__} has no attention of a class known here: {', '.join(VISION_ATTENTION)}.\n"
            "  Wrap its attention in UlyssesSPViTAttention yourself."
        )
    for name, module in info.vit_attn_modules:
        parent, _, own = name.rpartition(".")
        has_cls = hasattr(getattr(module, "config", None), "image_size") and type(module).__name__.startswith(
            ("ViT", "CLIP", "Intern")
        )
        setattr(model.get_submodule(parent), own, UlyssesSPViTAttention(module, process_group, has_cls))
    if info.llm_attn_modules:
        warn_once(
            f"auto_wrap_model_for_sp leaves the language model's attention ({len(info.llm_attn_modules)} modules) as it is: register the "
            "model with UlyssesSPAttentionHF.register_with_transformers."
        )
    return model


class ModalityFusionSPAdapter(nn.Module):
    """Visual features in place of an image's tokens, over all ranks; this rank's part of the result."""

    def __init__(
        self, projection: Callable[[Tensor], Tensor], process_group: Group, image_token_id: int = -200
    ) -> None:
        super().__init__()
        self.projection, self.process_group, self.image_token_id = projection, process_group, image_token_id

    def is_image(self, input_ids: Tensor) -> Tensor:
        """Which tokens of [b, s] a feature stands for."""
        return input_ids == self.image_token_id

    def forward(self, visual_features: Tensor, text_embeds: Tensor, input_ids: Tensor) -> Tensor:
        """visual_features: [b, features/P, width] of this rank; text_embeds [b, s, hidden] and input_ids [b, s], whole. This rank's
        [b, s/P, hidden]. Collective; differentiable. Raises DeepSpeedError where features and tokens differ in number."""
        features = self.projection(gather_sequence(visual_features, self.process_group))
        where = self.is_image(input_ids)
        if int(where.sum()) != features.shape[0] * features.shape[1]:
            raise DeepSpeedError(
                f"{type(self).__name__}: {int(where.sum())} tokens stand for images, and there are {features.shape[0]} x "
                f"{features.shape[1]} visual features over all ranks."
            )
        num_ranks, rank = dist.get_world_size(self.process_group), dist.get_rank(self.process_group)
        if text_embeds.shape[1] % num_ranks:
            raise DeepSpeedError(
                f"{type(self).__name__}: a fused sequence of {text_embeds.shape[1]} does not divide by the {num_ranks} ranks.\n"
                f"  Pad it to a multiple of {num_ranks}."
            )
        fused = text_embeds.masked_scatter(where[..., None], features.to(text_embeds.dtype))
        return fused.chunk(num_ranks, dim=1)[rank].contiguous()


class LlavaFusionAdapter(ModalityFusionSPAdapter):
    """Of LLaVA: one token for each feature."""


class InternVLFusionAdapter(ModalityFusionSPAdapter):
    """Of InternVL: context tokens, one for each feature."""


class Qwen2VLFusionAdapter(ModalityFusionSPAdapter):
    """Of Qwen2-VL: the tokens between the vision's start and end."""

    def __init__(
        self,
        projection: Callable[[Tensor], Tensor],
        process_group: Group,
        vision_start_token_id: int,
        vision_end_token_id: int,
    ) -> None:
        super().__init__(projection, process_group, -1)
        self.vision_start_token_id, self.vision_end_token_id = vision_start_token_id, vision_end_token_id

    def is_image(self, input_ids: Tensor) -> Tensor:
        """Behind a start and before its end."""
        starts, ends = input_ids == self.vision_start_token_id, input_ids == self.vision_end_token_id
        is_open = starts.cumsum(1) - ends.cumsum(1) > 0
        return is_open & ~starts
