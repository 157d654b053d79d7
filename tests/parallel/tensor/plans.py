"""Every family of Transformers that has a plan, built small in depth and on the meta device: `on_meta(name)`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_DEPTHS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")
_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type")
_NUM_LAYERS = 4
_MOE = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
_ROPE = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
_OCR = {
    "num_hidden_layers": _NUM_LAYERS,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
_TALKER = {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 64}}
FILLED: dict[str, dict[str, Any]] = {
    "cohere_compass": {"text_config": {"rope_parameters": _ROPE}},
    "cohere_compass_text": {"rope_parameters": _ROPE},
    "deepseek_ocr2": {"text_config": _OCR},
    "deepseek_ocr2_text": _OCR,
    "diffusion_gemma": {"text_config": _MOE},
    "diffusion_gemma_text": _MOE,
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense"] + ["sparse"] * 3, "num_experts_per_tok": 2},
    "granite4_vision": {"downsample_rate": "1/4", "deepstack_layer_map": [[-2, 1], [-1, 2]]},
    "qwen3_omni_moe": {"talker_config": _TALKER},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "lfm2_moe": {"num_hidden_layers": _NUM_LAYERS, "layer_types": ["conv", "full_attention"] * 2},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 64},
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl_text": {"head_dim": 128},
    "ministral": {"head_dim": 128},
}
"""Sizes that a family's configuration leaves to its checkpoints."""
_OF_THE_EMBEDDER = ("hidden_size", "rms_norm_eps", "vocab_size", "vocab_offset")
TOWERS = {"gemma3n": "siglip_vision_model"}
"""Vision towers that no plan cuts, of libraries that need not be there, and what stands in for them."""


def names() -> list[str]:
    """The model types whose configuration, or a configuration inside of it, has a plan, and whose code is in Transformers."""
    return [name for name in CONFIG_MAPPING if _has_plan(CONFIG_MAPPING[name]) and _modeling(name) is not None]


def _modeling(name: str) -> str | None:
    module = CONFIG_MAPPING[name].__module__.replace(".configuration_", ".modeling_")
    return module if importlib.util.find_spec(module) is not None else None


def _has_plan(config: Any, depth: int = 0) -> bool:
    if getattr(config, "base_model_tp_plan", None):
        return True
    inner = getattr(config, "sub_configs", None) or {}
    return depth < 3 and any(
        inspect.isclass(c) and c.__name__ != "AutoConfig" and _has_plan(c, depth + 1) for c in inner.values()
    )


def on_meta(name: str) -> nn.Module:
    """The family's model, with 4 layers where it can be that few; the last error where nothing builds."""
    error: Exception | None = None
    for is_shallow in (True, False):
        for make in _makers(name):
            try:
                config = CONFIG_MAPPING[name](**FILLED.get(name, {}))
                if is_shallow:
                    _shorten(config)
                if name in TOWERS:
                    asked = vars(config)["vision_config"].to_dict()
                    seen = {key: asked[key] for key in _OF_THE_EMBEDDER}
                    tower = CONFIG_MAPPING[TOWERS[name]](num_attention_heads=16, **seen)
                    vars(config)["vision_config"] = tower  # past a check of its type
                with torch.device("meta"):
                    return make(config)
            except Exception as caught:
                error = caught
    raise LookupError(f"{name} cannot be built: {error!r}")


def _makers(name: str) -> list[Any]:
    kinds = ("CausalLM", "ImageTextToText", "Seq2SeqLM", "MultimodalLM", "SpeechSeq2Seq")
    autos = [getattr(transformers, f"AutoModelFor{kind}", None) for kind in kinds] + [transformers.AutoModel]
    cls = CONFIG_MAPPING[name]
    module = importlib.import_module(str(_modeling(name)))
    own = [
        model
        for _, model in inspect.getmembers(module, inspect.isclass)
        if issubclass(model, transformers.PreTrainedModel)
        and "PreTrainedModel" not in model.__name__  # the base, which has no layers
        and model.__dict__.get("config_class", getattr(model, "config_class", None)) is cls
    ]
    return [auto.from_config for auto in autos if auto is not None] + own


def _shorten(config: Any) -> None:
    for depth in _DEPTHS:
        if isinstance(getattr(config, depth, None), int) and getattr(config, depth) > _NUM_LAYERS:
            setattr(config, depth, _NUM_LAYERS)
    for per_layer in _PER_LAYER:
        is_computed = isinstance(inspect.getattr_static(config, per_layer, None), property)
        if isinstance(getattr(config, per_layer, None), list) and not is_computed:
            setattr(config, per_layer, getattr(config, per_layer)[:_NUM_LAYERS])
    for inner in getattr(config, "sub_configs", None) or {}:
        if getattr(config, inner, None) is not None:
            _shorten(getattr(config, inner))
