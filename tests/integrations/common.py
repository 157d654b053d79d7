"""What the jobs of this folder share: text, tiny models, and a clean start for each job in a warm process.

A job is a function `job(rank, world_size, ...)` that `run_ranks` calls in processes that have imported the libraries
already. `run_job` makes each as good as a fresh script: the libraries' process-wide state is reset before it, and
environment variables they set are put back after it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tests.harness import run_ranks

SEQ = 32
VOCAB = 256
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def corpus() -> bytes:
    """Text of this machine: the licence that comes with Python, or a module of its library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return next(path for path in (library / "LICENSE.txt", library / "argparse.py") if path.exists()).read_bytes()


def byte_windows(count: int, offset: int = 0, length: int = SEQ) -> Tensor:
    """`count` windows of the text as byte values, [count, length]."""
    text = corpus()
    starts = [(offset + i) * length % (len(text) - length) for i in range(count)]
    return torch.tensor([list(text[start : start + length]) for start in starts])


class ByteDataset(Dataset[dict[str, Tensor]]):
    """Windows of the text with their own labels, as causal models of Transformers take them."""

    def __init__(self, count: int, offset: int = 0) -> None:
        self.windows = byte_windows(count, offset)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.windows[index]
        return {"input_ids": window, "labels": window.clone(), "attention_mask": torch.ones_like(window)}


def llama_config(**changes: Any) -> Any:
    """A Llama of 15 thousand parameters."""
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**{**sizes, "tie_word_embeddings": True, **changes})


def save_model(folder: Path | str, **changes: Any) -> str:
    """A randomly initialised Llama in Transformers' format; returns the folder."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(**changes)).save_pretrained(folder)
    return str(folder)


def save_tokenizer(folder: Path | str) -> Any:
    """A byte-level BPE tokenizer trained on the text, with room for nothing but bytes and five special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([corpus().decode("utf-8", "ignore")], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast


def ds_config(stage: int, *, precision: str = "fp32", **extra: Any) -> dict[str, Any]:
    """A configuration as the Trainer's documentation writes it: "auto" wherever the Trainer knows the value."""
    zero = {
        "stage": stage,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
        **extra.pop("zero", {}),
    }
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": zero,
        **extra,
    }


ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
WARMUP_DECAY = {
    "type": "WarmupDecayLR",
    "params": {
        "warmup_min_lr": "auto",
        "warmup_max_lr": "auto",
        "warmup_num_steps": "auto",
        "total_num_steps": "auto",
        "warmup_type": "linear",
    },
}
"""The same curve as Transformers' "linear" schedule."""


def run_job(job: Callable[..., Any], /, *args: Any, world_size: int = 2, timeout: float = 110.0, **kwargs: Any) -> Any:
    """What rank 0 returns of `job(rank, world_size, *args, **kwargs)`, run on gloo ranks like scripts of their own."""
    __tracebackhide__ = True
    name = (job.__module__, job.__qualname__)
    return run_ranks(world_size, _as_script, name, args, kwargs, timeout=timeout)[0]


def _as_script(rank: int, world_size: int, name: tuple[str, str], args: Any, kwargs: Any) -> Any:
    with like_a_new_process():
        return getattr(importlib.import_module(name[0]), name[1])(rank, world_size, *args, **kwargs)


@contextlib.contextmanager
def like_a_new_process() -> Iterator[None]:
    """Offline, with the libraries' state reset, and the environment put back at the end."""
    before = dict(os.environ)
    os.environ.update(OFFLINE)
    reset_libraries()
    try:
        yield
    finally:
        reset_libraries()
        gc.collect()
        os.environ.clear()
        os.environ.update(before)


def reset_libraries() -> None:
    """Forget what Accelerate and Transformers keep for the life of a process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=False)
    PartialState._reset_state()
    GradientState._reset_state()
    unset_hf_deepspeed_config()
