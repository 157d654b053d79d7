"""Small models of the families that `deepspeed plan` knows, and a step of each as a run's comms logger counts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import deepspeed
from deepspeed.comm.recorder import Current

SEQ = 8
FAMILIES = ("gpt2", "llama", "bert", "mixtral", "t5")


def make(family: str, layers: int = 3) -> Any:
    """A model of random weights, the same on every rank."""
    import transformers as hf

    torch.manual_seed(0)
    llama = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 32, "use_cache": False,
    }  # fmt: skip
    if family == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**llama))
    if family == "mixtral":
        return hf.MixtralForCausalLM(hf.MixtralConfig(**llama, num_local_experts=4, num_experts_per_tok=2))
    if family == "switching":
        return hf.MixtralForCausalLM(hf.MixtralConfig(**llama, num_local_experts=4, num_experts_per_tok=1))
    if family == "untold":  # of a type whose layers cannot be told
        model = make("gpt2", layers)
        model.config.model_type = "fsmt"
        return model
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 32}
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=64, **sizes, bos_token_id=0, eos_token_id=0, use_cache=False)
        )
    if family == "bert":
        keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        return hf.BertForMaskedLM(hf.BertConfig(**{key: llama[key] for key in keys}, intermediate_size=128))
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=layers,
            num_heads=4,
            use_cache=False,
            decoder_start_token_id=0,
        )
    )


def batch(device: str = "cpu", samples: int = 2) -> dict[str, torch.Tensor]:
    """A micro-batch of tokens with labels."""
    ids = torch.zeros(samples, SEQ, dtype=torch.int64, device=device)
    return {"input_ids": ids, "labels": ids}


Counts = dict[str, tuple[int, int]]
"""(calls, message bytes) of a step, by operation."""


def counted_step(step: Callable[[], object]) -> Counts:
    """What the log of collectives says of the last of four steps."""
    for _ in range(4):
        recorder = Current.recorder
        assert recorder is not None
        recorder.clear()
        step()
    found = {
        op: (sum(map(len, sizes.values())), sum(nbytes * len(times) for nbytes, times in sizes.items()))
        for op, sizes in recorder.records.items()
    }
    for (op, nbytes, _), flow in recorder.flows.items():
        if flow.count:
            calls, total = found.get(op, (0, 0))
            found[op] = (calls + flow.count, total + nbytes * flow.count)
    return found


def counted_run(rank: int, family: str, config: dict[str, Any]) -> Counts:
    """A step of a family under a configuration with a log, on this rank of a run."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    model, mpu, inputs = make(family), None, batch()
    parts = config.get("sequence_parallel_size", 1)
    if parts > 1:
        mpu = UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=model, core_attn_implementation="sdpa", sequence_parallel_size=parts, micro_batch_size=2,
            seq_length=SEQ, seq_length_is_variable=True,
        )  # fmt: skip
        part = rank // config.get("tensor_parallel", {}).get("autotp_size", 1) % parts
        inputs |= {"position_ids": torch.arange(SEQ).expand(2, -1), "shift_labels": inputs["labels"]}
        inputs = {key: tensor.tensor_split(parts, dim=1)[part].contiguous() for key, tensor in inputs.items()}
    engine = deepspeed.initialize(model=model, config=config, mpu=mpu)[0]

    def step() -> None:
        engine.backward(engine(**inputs).loss)
        engine.step()

    try:
        return counted_step(step)
    finally:
        engine.destroy()
        UlyssesSPAttentionHF.unregister()
