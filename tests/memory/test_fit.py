"""Parts that do not fit together are told before a model is cut, by shapes alone."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from deepspeed.memory.fit import check_fit
from deepspeed.memory.layers import AbsentRanks
from deepspeed.parallel.tensor.apply import draw
from deepspeed.parallel.tensor.choose import Wishes, choose
from deepspeed.utils.errors import DeepSpeedConfigError
from tests.parallel.tensor.models import small

pytest.importorskip("transformers")


def fits(model: nn.Module, size: int) -> None:
    chosen, _ = draw(model, AbsentRanks(size), Wishes())
    before = {name: (param.shape, param.data_ptr()) for name, param in model.named_parameters()}
    try:
        check_fit(model, size, Wishes(), chosen)
    finally:
        assert {name: (param.shape, param.data_ptr()) for name, param in model.named_parameters()} == before


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_next", "t5"])
def test_families_that_are_cut_fit(family: str) -> None:
    layers = {"layer_types": ["linear_attention", "full_attention"]} if family == "qwen3_next" else {}
    if family == "t5":
        import transformers

        config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        fits(transformers.T5ForConditionalGeneration(config), 2)
        return
    fits(small(family, **layers), 2)
    fits(small(family, **layers), 3)


def test_what_meets_a_part_and_expects_the_whole_is_named() -> None:
    types = ["recurrent", "recurrent", "attention"]
    model = small("recurrent_gemma", num_hidden_layers=3, lru_width=32, block_types=types)
    words = (
        r"cut over 2 ranks by its structure: in model\.layers\.0\.temporal_block\.conv_1d a part meets .*expected input"
    )
    with pytest.raises(DeepSpeedConfigError, match=words):
        fits(model, 2)


def test_pictures_and_sound_are_judged_too() -> None:
    import transformers

    config = transformers.SwinConfig(image_size=32, embed_dim=24, depths=[1, 1], num_heads=[2, 4], window_size=4)
    with pytest.raises(
        DeepSpeedConfigError, match=r"cut over 2 ranks by its structure: in encoder\.layers\.0\.blocks\.0\.attention"
    ):
        fits(transformers.SwinModel(config), 2)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 64}
    fits(transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8)), 2)
    sound = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    places = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    fits(transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes, **sound, **places)), 2)


class Mean(nn.Module):
    """A norm over all heads, between a column and a row."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.weight = inner, nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[.., width] -> [.., out]."""
        return self.inner(x * self.weight)  # type: ignore[no-any-return]


def test_a_script_s_own_layer_between_two_that_are_cut_is_named() -> None:
    model = small("llama")
    model.model.layers[1].mlp.act_fn = nn.Sequential(nn.SiLU(), Mean(nn.Identity(), 48))
    with pytest.raises(DeepSpeedConfigError, match=r"in model\.layers\.1\.mlp\.act_fn\.1 a part meets"):
        fits(model, 2)


def test_a_model_that_cannot_be_copied_is_not_judged() -> None:
    model = small("llama")
    model.model.layers[1].mlp.act_fn = nn.Sequential(nn.SiLU(), Mean(nn.Identity(), 48))
    model.model.layers[0].lock = threading.Lock()
    fits(model, 2)


def test_gates_and_ups_in_one_layer_of_no_known_name_are_refused() -> None:
    blocks = nn.Module()
    blocks.layers = nn.ModuleList([nn.Module()])
    blocks.layers[0].wide, blocks.layers[0].out_proj = nn.Linear(8, 32), nn.Linear(16, 8)
    with pytest.raises(DeepSpeedConfigError, match=r"layers\.0\.wide is several layers in one"):
        choose(blocks, Wishes())
