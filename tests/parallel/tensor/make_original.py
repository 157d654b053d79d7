"""Writes the files in `original/` with DeepSpeed 0.19.8: two steps of a small Llama whose layers are cut, saved.

In an environment that has the original, from a folder without this project's package, on as many ranks as wanted, with the environment of a launcher:

    python make_original.py NAME OUTPUT_DIR
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import transformers
from torch import Tensor, nn

CASES: dict[str, dict[str, Any]] = {
    "z0": {"tp": 2, "dp": 1, "stage": 0},
    "z0-bf16": {"tp": 2, "dp": 1, "stage": 0, "kind": "bf16"},
    "z1-dp2": {"tp": 2, "dp": 2, "stage": 1},
    "z1-tied": {"tp": 2, "dp": 1, "stage": 1, "model": {"tie_word_embeddings": True}},
    "z1-uneven": {
        "tp": 2,
        "dp": 1,
        "stage": 1,
        "model": {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3},
    },
    "z2-bf16": {"tp": 2, "dp": 1, "stage": 2, "kind": "bf16"},
    "z2-fused": {"tp": 2, "dp": 1, "stage": 2, "family": "phi3"},
    "z3-dp2": {"tp": 2, "dp": 2, "stage": 3},
}
PHI3 = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*\.down_proj\.weight$"], "partition_type": "row"},
        {"patterns": [r".*\.gate_up_proj\.weight$"], "partition_type": "column", "shape": [2, -1], "partition_dim": 0},
    ],
}  # fmt: skip
NUM_STEPS = 2


def model_of(case: dict[str, Any]) -> nn.Module:
    """The same values for everyone."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "vocab_size": 48,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if case.get("family", "llama") == "llama":
        sizes |= {"head_dim": 4, "attention_bias": True, "mlp_bias": True}
    config = transformers.AutoConfig.for_model(case.get("family", "llama"), **{**sizes, **case.get("model", {})})
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("bias"):
                param.normal_(0, 0.1)
    return model.float()


def config_of(case: dict[str, Any]) -> dict[str, Any]:
    """Adam in fp32 or beside bf16, clipped where the original clips rightly."""
    section: dict[str, Any] = {"autotp_size": case["tp"]}
    if case.get("family") == "phi3":
        section["partition_config"] = PHI3
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": case.get("clip", 0.0),
        "zero_optimization": {"stage": case["stage"], "stage3_param_persistence_threshold": 0},
        "tensor_parallel": section,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        "bf16": {"enabled": case.get("kind") == "bf16"},
    }


def batch(step: int, reader: int) -> dict[str, Tensor]:
    """Two samples of one reader of data."""
    generator = torch.Generator().manual_seed(100 * step + reader)
    tokens = torch.randint(3, 48, (2, 8), generator=generator)
    return {"input_ids": tokens, "labels": tokens.clone()}


def main() -> None:
    """Train, save, and print what one more step gives."""
    import deepspeed

    name, folder = sys.argv[1], sys.argv[2]
    case, rank = CASES[name], int(os.environ["RANK"])
    deepspeed.init_distributed("gloo")
    model = model_of(case)
    if case.get("kind") == "bf16":
        model = model.bfloat16()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config_of(case))
    for step in range(NUM_STEPS + 1):
        if step == NUM_STEPS:
            engine.save_checkpoint(folder, tag=name, client_state={"mine": 7})
        loss = engine(**batch(step, rank // case["tp"])).loss
        engine.backward(loss)
        engine.step()
        print(f"{name} rank {rank} step {step} loss {loss.item()}", flush=True)


if __name__ == "__main__":
    main()
