"""Fine-tune a causal language model with the Transformers Trainer: a small random Llama on the text of Python's licence.

`--deepspeed FILE` (or `accelerate launch`) decides about ZeRO; nothing here mentions it. The model comes from a folder
so that ZeRO stage 3 loads it already sharded, as it would a large one.
"""

from __future__ import annotations

import dataclasses
import os
import sysconfig
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

SEQ = 64


@dataclasses.dataclass
class DataArguments:
    """What is trained on, and how large a model."""

    text: str = ""
    """A file; default the licence that comes with Python, or a module of its library."""
    width: int = 64
    model: str = ""
    """A folder in Transformers' format; default a random model, written below the output folder."""


class Bytes(Dataset[dict[str, torch.Tensor]]):
    """Windows of a file, byte by byte; a byte is a token."""

    def __init__(self, path: str) -> None:
        library = Path(sysconfig.get_paths()["stdlib"])
        found = next(p for p in (Path(path), library / "LICENSE.txt", library / "argparse.py") if p.is_file())
        data = torch.frombuffer(bytearray(found.read_bytes()), dtype=torch.uint8).long()
        self.windows = data[: len(data) // SEQ * SEQ].view(-1, SEQ)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index].clone()}


def make_model(folder: Path, width: int) -> str:
    """Write a random Llama; the first rank does, the others wait."""
    if int(os.environ.get("RANK", 0)) == 0:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=SEQ,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return str(folder)


def main() -> None:
    """Train and save."""
    data_args, args = HfArgumentParser((DataArguments, TrainingArguments)).parse_args_into_dataclasses()
    _ = args.device  # starts torch.distributed
    folder = data_args.model or make_model(Path(args.output_dir) / "random", data_args.width)
    data = Bytes(data_args.text)
    trainer = Trainer(model=AutoModelForCausalLM.from_pretrained(folder), args=args, train_dataset=data)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if args.process_index == 0:
        print(f"ZeRO: {trainer.is_deepspeed_enabled}; loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
