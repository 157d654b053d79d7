"""Small models of many families of Transformers, for the long matrix: `small(*FAMILIES[name])`.

Six query heads over three key and value heads where a family can: they divide over 3 ranks, not over 2, and are fewer than 4.
"""

from __future__ import annotations

from typing import Any

# fmt: off
_ROUND: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "intermediate_size": 52}
_ALL = {**_ROUND, "num_key_value_heads": 6}
_NONE = dict.fromkeys(("num_key_value_heads", "num_attention_heads", "num_hidden_layers", "hidden_size",
                       "intermediate_size"), "none")
_GPT: dict[str, Any] = {**_NONE, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64, "n_inner": 52}
_STILL = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_MLA: dict[str, Any] = {**_ALL, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 20, "n_shared_experts": 1, "head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _ROUND),
    "llama, tied": ("llama", {**_ROUND, "tie_word_embeddings": True}),
    "llama, one kv head": ("llama", {**_ROUND, "num_key_value_heads": 1}),
    "mistral": ("mistral", {**_ROUND, "sliding_window": None}),
    "qwen2": ("qwen2", _ROUND),
    "qwen3": ("qwen3", _ROUND),
    "gemma": ("gemma", _ROUND),
    "gemma2": ("gemma2", {**_ROUND, "sliding_window": 16}),
    "gemma3": ("gemma3_text", {**_ROUND, "sliding_window": 16}),
    "phi": ("phi", _ALL),
    "phi3": ("phi3", _ROUND),
    "olmo": ("olmo", _ROUND),
    "olmo2": ("olmo2", _ROUND),
    "cohere": ("cohere", _ROUND),
    "starcoder2": ("starcoder2", _ROUND),
    "granite": ("granite", _ROUND),
    "stablelm": ("stablelm", _ROUND),
    "glm4": ("glm4", _ROUND),
    "ernie4_5": ("ernie4_5", _ROUND),
    "helium": ("helium", _ROUND),
    "smollm3": ("smollm3", _ROUND),
    "mixtral": ("mixtral", {**_ROUND, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**_ROUND, **_EXPERTS, "shared_expert_intermediate_size": 20}),
    "qwen3_moe": ("qwen3_moe", {**_ROUND, **_EXPERTS}),
    "qwen3_next": ("qwen3_next", {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48, **_EXPERTS,
                                  "shared_expert_intermediate_size": 20, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                                  "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                                  "layer_types": ["linear_attention", "full_attention"]}),
    "gpt_oss": ("gpt_oss", {**_ROUND, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": ("deepseek_v2", _MLA),
    "deepseek_v3": ("deepseek_v3", _MLA),
    "llama4": ("llama4_text", {**_ROUND, "num_local_experts": 4, "intermediate_size_mlp": 52}),
    "gpt_neox": ("gpt_neox", _ALL),
    "bloom": ("bloom", {**_NONE, "hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "persimmon": ("persimmon", _ALL),
    "falcon, several heads": ("falcon", {**_ALL, "num_kv_heads": 3, "new_decoder_architecture": True, "alibi": False,
                                         "head_dim": "none", "num_key_value_heads": "none"}),
    "opt": ("opt", {"num_key_value_heads": "none", "hidden_size": 48, "ffn_dim": 52, "num_attention_heads": 6,
                    "word_embed_proj_dim": 48}),
    "gpt2": ("gpt2", {**_GPT, **_STILL}),
    "gpt2, five heads": ("gpt2", {**_GPT, **_STILL, "n_embd": 40, "n_head": 5}),
    "mpt": ("mpt", {**_NONE, "d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 64}),
    "gpt_bigcode, several heads": ("gpt_bigcode", {**_GPT, **_STILL, "multi_query": False}),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4}),
    "codegen": ("codegen", {**_GPT, "n_embd": 64, "n_head": 8, "rotary_dim": 4}),
    "gpt_neo": ("gpt_neo", {**_NONE, "hidden_size": 48, "num_layers": 2, "num_heads": 6, "intermediate_size": 52,
                            "attention_types": [[["global", "local"], 1]], "window_size": 16}),
}
# fmt: on
