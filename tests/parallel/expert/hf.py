"""Tiny models of the families with experts, from their configurations, with random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, HIDDEN, SEQ = 32, 16, 6
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
_DEEPSEEK = {
    **_COMMON, "n_routed_experts": 4, "n_shared_experts": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "head_dim": 4,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**_COMMON, "num_local_experts": 4, "intermediate_size": 16}),
    "qwen2_moe": ("Qwen2Moe", {**_COMMON, "num_experts": 4, "shared_expert_intermediate_size": 8, "decoder_sparse_step": 1}),
    "qwen3_moe": ("Qwen3Moe", {**_COMMON, "num_experts": 4, "decoder_sparse_step": 1, "norm_topk_prob": True}),
    "deepseek_v2": ("DeepseekV2", {**_DEEPSEEK, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("DeepseekV3", {**_DEEPSEEK, "routed_scaling_factor": 2.5}),
    "minimax": ("MiniMax", {**_COMMON, "num_local_experts": 4, "intermediate_size": 16, "block_size": 4}),
    "minimax_m3": (
        "MiniMaxM3VL",
        {
            **_COMMON, "num_local_experts": 4, "intermediate_size": 16, "dense_intermediate_size": 24, "shared_intermediate_size": 8,
            "rotary_dim": 4, "layer_types": ["full_attention"] * 2, "mlp_layer_types": ["sparse"] * 2,
        },
    ),
    "gpt_oss": ("GptOss", {**_COMMON, "num_local_experts": 4, "intermediate_size": 16, "layer_types": ["full_attention"] * 2}),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        {
            **_COMMON, "num_experts": 4, "shared_expert_intermediate_size": 8, "layer_types": ["full_attention"] * 2,
        },
    ),
}  # fmt: skip


def build(family: str, how: str = "") -> nn.Module:
    """The family's causal language model; every weight is random, also biases that routers begin with zeros.

    how: "adapted" experts and attention by PEFT, on frozen weights; "recomputed" or "re-entrant" activation checkpoints.
    """
    import transformers

    prefix, settings = FAMILIES[family]
    suffix = "TextConfig" if family in ("qwen3_5_moe", "minimax_m3") else "Config"
    config = getattr(transformers, f"{prefix}{suffix}")(**settings)
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    model.config.use_cache = False
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.dim() > 1 or name.endswith("e_score_correction_bias"):
                value.normal_(std=0.3)
    if how in ("recomputed", "re-entrant"):
        model.gradient_checkpointing_enable({"use_reentrant": how == "re-entrant"})
        model.enable_input_require_grads()
    return adapted(model) if how == "adapted" else model


def adapted(model: nn.Module) -> nn.Module:
    """Factors of rank 3 on every expert's matrices and on queries; none of them zeros."""
    from peft import LoraConfig, get_peft_model

    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=experts)
    wrapped = get_peft_model(model, config)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.2)
    return wrapped


def tokens(num_steps: int, num_ranks: int) -> list[list[Tensor]]:
    """Per step and rank two sequences."""
    generator = torch.Generator().manual_seed(9)
    return [
        [torch.randint(0, VOCAB, (2, SEQ), generator=generator) for _ in range(num_ranks)] for _ in range(num_steps)
    ]


@dataclass
class Trained:
    """Per step loss and norm; then the weights that this rank holds, with the first row of those that are cut."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    first: int = 0


def train(
    rank: int,
    world_size: int,
    family: str,
    ep: int,
    stage: int,
    extra: dict[str, Any] | None = None,
    how: str = "",
    parts: int = 1,
) -> Trained:
    """Clipped steps with spread experts, each of `parts` micro-batches."""
    import deepspeed
    from tests.engine.runs import engine_of, make_config, mean_over_ranks
    from tests.parallel.expert.runs import CLIP, SGD

    model = build(family, how)
    config = make_config(
        stage, micro=2 // parts, accumulation=parts, clip=CLIP, **{"optimizer": SGD, "expert_parallel": {"enabled": True, "autoep_size": ep}, **(extra or {})}
    )  # fmt: skip
    found = Trained()
    with engine_of(model, config) as engine:
        for step in tokens(2, world_size):
            losses = []
            for ids in step[rank].chunk(parts):
                loss = engine(input_ids=ids, labels=ids).loss
                engine.backward(loss)
                engine.step()
                losses.append(mean_over_ranks(loss))
            found.losses.append(sum(losses) / parts)
            found.norms.append(engine.get_global_grad_norm())
        for name, param in model.named_parameters():
            if param.requires_grad:
                found.weights[name] = deepspeed.utils.safe_get_full_fp32_param(param).clone()
    assert found.weights
    found.first = rank % ep
    return found


def plain(family: str, num_ranks: int, how: str = "") -> Trained:
    """The plain model in one process."""
    from tests.parallel.expert.runs import CLIP

    model = build(family, how)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.9)
    found = Trained()
    for step in tokens(2, num_ranks):
        loss = torch.stack([model(input_ids=ids, labels=ids).loss for ids in step]).mean()
        optimizer.zero_grad()
        loss.backward()
        found.norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        found.losses.append(loss.item())
    found.weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    return found


def compare(ranks: list[Trained], expected: Trained) -> None:
    """Losses to 1e-6, norms and weights to 1e-5."""
    for found in ranks:
        torch.testing.assert_close(found.losses, expected.losses, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.norms, expected.norms, rtol=1e-5, atol=1e-6)
        for name, value in found.weights.items():
            whole = expected.weights[name]
            if value.shape != whole.shape:
                whole = part_of(name, whole, value, found.first)
            torch.testing.assert_close(value, whole, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def part_of(name: str, whole: Tensor, part: Tensor, index: int) -> Tensor:
    """What rank `index` holds of a tensor of all experts."""
    if "lora_B" not in name:
        return whole[index * len(part) : (index + 1) * len(part)]
    per_expert = whole.view(len(whole), 3, 4)  # [out, r, experts], as PEFT reads it
    here = part.shape[1] // 3
    return per_expert[:, :, index * here : (index + 1) * here].reshape(len(whole), -1)
