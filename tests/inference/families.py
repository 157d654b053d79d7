"""Small models of Hugging Face's families, with random weights, for the tests of inference.

`build("llama")` is a model in eval mode that generates 8 tokens greedily; `prompts(...)` are batches of its words. Sizes are
such that heads are grouped, and in some families uneven, where the family can.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCAB, PAD = 96, 0

_SIZES = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 6, "max_position_embeddings": 64}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 3}
_HEAD = {**_GROUPED, "head_dim": 8}
_GPT = {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64, "n_inner": 64}
_T5 = {"vocab_size": VOCAB, "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 6,
       "decoder_start_token_id": PAD}  # fmt: skip
_BART = {"vocab_size": VOCAB, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 6,
         "decoder_attention_heads": 6, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
         "forced_eos_token_id": None, "forced_bos_token_id": None, "decoder_start_token_id": 1}  # fmt: skip
_MOE = {"num_experts_per_tok": 2}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _GROUPED),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": None}),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", _HEAD),
    "mixtral": ("Mixtral", {**_GROUPED, **_MOE, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {**_GROUPED, **_MOE, "num_experts": 4, "moe_intermediate_size": 32,
                               "shared_expert_intermediate_size": 32}),
    "qwen3_next": ("Qwen3Next", {**_HEAD, **_MOE, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4,
                                 "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
                                 "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                                 "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}),
    "gemma": ("Gemma", _HEAD),
    "gemma2": ("Gemma2", {**_HEAD, "sliding_window": 16}),
    "phi": ("Phi", _SIZES),
    "phi3": ("Phi3", {**_GROUPED, "sliding_window": None}),
    "falcon": ("Falcon", {**_SIZES, "alibi": False, "new_decoder_architecture": False, "multi_query": True}),
    "bloom": ("Bloom", {"vocab_size": VOCAB, "hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "opt": ("OPT", {"vocab_size": VOCAB, "hidden_size": 48, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
                    "max_position_embeddings": 64, "word_embed_proj_dim": 48}),
    "gpt2": ("GPT2", _GPT),
    "gptj": ("GPTJ", {**_GPT, "rotary_dim": 4}),
    "gpt_neo": ("GPTNeo", {"vocab_size": VOCAB, "hidden_size": 48, "num_layers": 2, "num_heads": 6, "intermediate_size": 64,
                           "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, "window_size": 16}),
    "gpt_neox": ("GPTNeoX", _SIZES),
    "gpt_bigcode": ("GPTBigCode", _GPT),
    "codegen": ("CodeGen", {**_GPT, "n_head": 8, "n_embd": 64, "rotary_dim": 4}),
    "stablelm": ("StableLm", _GROUPED),
    "olmo": ("Olmo", _GROUPED),
    "cohere": ("Cohere", _GROUPED),
    "mpt": ("Mpt", {"vocab_size": VOCAB, "d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 64}),
    "starcoder2": ("Starcoder2", {**_GROUPED, "sliding_window": None}),
    "granite": ("Granite", _GROUPED),
    "xglm": ("XGLM", {"vocab_size": VOCAB, "d_model": 48, "ffn_dim": 64, "num_layers": 2, "attention_heads": 6,
                      "max_position_embeddings": 64}),
}  # fmt: skip
ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", _T5),
    "bart": ("Bart", _BART),
    "mbart": ("MBart", _BART),
    "pegasus": ("Pegasus", _BART),
}
FAMILIES = [*DECODERS, *ENCODER_DECODERS]


def build(family: str, **changes: Any) -> Any:
    """A model of a family, the same every time."""
    import transformers

    prefix, sizes = (DECODERS | ENCODER_DECODERS)[family]
    config = getattr(transformers, f"{prefix}Config")(
        **{**sizes, "pad_token_id": PAD, "eos_token_id": None, "bos_token_id": 1, **changes}
    )
    head = "ForCausalLM"
    if family in ENCODER_DECODERS:
        head = "ForConditionalGeneration"
    elif family == "gpt2":
        head = "LMHeadModel"
    torch.manual_seed(5)
    model = getattr(transformers, prefix + head)(config).eval()
    with torch.no_grad():
        for param in model.parameters():  # spread logits apart, so that the largest is so by more than rounding
            if param.dim() > 1:
                param.mul_(3.0)
    return model


def prompts(padded: str = "alone", batch: int = 3, length: int = 7) -> dict[str, Tensor]:
    """input_ids and attention_mask [batch, length]; "left" and "right" pad all but the first."""
    generator = torch.Generator().manual_seed(11)
    if padded == "alone":
        batch = 1
    ids = torch.randint(2, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        where = slice(0, row + 1) if padded == "left" else slice(length - row - 1, length)
        ids[row, where], mask[row, where] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}
