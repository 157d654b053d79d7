"""The original's calls beneath `init_inference`: models prepared and given back, policies told, groups quantized."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.inference.config import DeepSpeedInferenceConfig, MoETypeEnum, QuantTypeEnum
from deepspeed.module_inject import GroupQuantizer
from deepspeed.module_inject.auto_tp import AutoTP
from deepspeed.module_inject.replace_policy import UNetPolicy, generic_policies, replace_policies
from deepspeed.utils.errors import DeepSpeedConfigError, NotAvailableError
from tests.inference.families import build, prompts
from tests.inference.test_engine import logits_of

pytest.importorskip("transformers")


def test_layers_are_replaced_filled_and_given_back(tmp_path: Path) -> None:
    plain = build("llama")
    torch.save(plain.state_dict(), tmp_path / "w.pt")
    other = copy.deepcopy(plain)
    for param in other.parameters():
        param.data.zero_()
    form = {"type": "ds_model", "checkpoints": [str(tmp_path / "w.pt")], "version": 1.0}
    layer_class = type(plain.model.layers[0])
    config = DeepSpeedInferenceConfig(dtype=torch.float32)
    made = deepspeed.replace_transformer_layer(layer_class, other, form, config, other.config)
    assert made is other
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(made.generate(**prompts("left"), **options), plain.generate(**prompts("left"), **options))
    assert deepspeed.revert_transformer_layer(layer_class, made, config) is other
    assert torch.equal(logits_of(other, prompts("left")), logits_of(plain, prompts("left")))
    with pytest.raises(DeepSpeedConfigError, match="has no layer of the class Conv2d"):
        deepspeed.replace_transformer_layer(nn.Conv2d, other, None, {"dtype": "fp32"}, None)
    quantized = deepspeed.replace_transformer_layer(None, other, None, {"dtype": "int8"}, None)
    with pytest.raises(DeepSpeedConfigError, match="what they were is gone"):
        deepspeed.revert_transformer_layer(None, quantized)


def test_a_models_policy_is_told_and_is_an_injection_policy() -> None:
    for family, wanted in (("llama", {"self_attn.o_proj", "mlp.down_proj"}), ("opt", {"self_attn.out_proj", "fc2"})):
        model = build(family)
        ((block, names),) = AutoTP.tp_parser(model)
        assert set(names) == wanted
        assert AutoTP.in_module_list(model.get_decoder().layers[0], AutoTP.get_module_list(model))
        assert AutoTP.supported(model)
        assert AutoTP.kernel_supported(AutoTP.get_module_list(model))
        assert AutoTP.get_model_num_kv_heads(model.config) == (
            model.config.num_key_value_heads if family == "llama" else model.config.num_attention_heads
        )
        engine = deepspeed.init_inference(
            model, dtype="fp32", injection_policy=dict(AutoTP.update_policy_list([], block, names))
        )
        assert engine.module is model
    with pytest.raises(DeepSpeedConfigError, match="Not able to determine model policy"):
        AutoTP.tp_parser(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(NotAvailableError, match="tp_model_init"):
        AutoTP(model, [], "", None, None, None)
    assert not set(generic_policies) & set(replace_policies)
    with pytest.raises(DeepSpeedConfigError, match="UNetPolicy.*names no sub-layers"):
        deepspeed.init_inference(model, dtype="fp32", injection_policy={block: UNetPolicy})


@pytest.mark.parametrize("num_bits", [4, 8])
def test_groups_of_rows_come_back_within_half_a_scale(num_bits: int) -> None:
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    x[2] = 0
    for groups in ({"group_size": 2}, {"num_groups": 6}):
        found = GroupQuantizer(num_bits=num_bits, **groups).quantize(x)
        assert found.dtype is torch.int8
        assert not found.requires_grad
        rows = len(found.scale)
        difference = (found.view(rows, -1) * found.scale - x.view(rows, -1)).abs()
        half = 2 ** (num_bits - 1)
        assert bool((difference <= found.scale * (0.5 + (found.view(rows, -1) == half - 1) * 0.5) + 1e-6).all())
    assert torch.equal(GroupQuantizer(q_int8=False).quantize(x), x)
    with pytest.raises(DeepSpeedConfigError, match="does not divide into groups of 4 rows"):
        GroupQuantizer(group_size=4).quantize(x)
    assert (QuantTypeEnum.sym, MoETypeEnum.standard) == ("symmetric", "standard")
