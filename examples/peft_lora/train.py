"""Train a LoRA adapter on a frozen, sharded base model with PEFT and the Trainer; then load it into a plain model.

deepspeed --num_accelerators 2 examples/peft_lora/train.py --deepspeed examples/peft_lora/zero3.json ...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "hf_trainer"))
from train import Bytes, DataArguments, make_model


def main() -> None:
    """Train, save the adapter, and compare it with what a plain model makes of it."""
    data_args, args = HfArgumentParser((DataArguments, TrainingArguments)).parse_args_into_dataclasses()
    _ = args.device  # starts torch.distributed
    folder = data_args.model or make_model(Path(args.output_dir) / "random", data_args.width)
    data = Bytes(data_args.text)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=torch.utils.data.Subset(data, range(8)))
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    adapter = Path(args.output_dir) / "adapter"
    trainer.save_model(str(adapter))
    if args.process_index == 0:
        plain(folder, str(adapter), torch.stack([data[i]["input_ids"] for i in range(8)]), loss)


def plain(folder: str, adapter: str, windows: torch.Tensor, expected: float) -> None:
    """The loss of the base model with the adapter merged, without DeepSpeed."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else Transformers would build this model sharded as well
    base = AutoModelForCausalLM.from_pretrained(folder)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    with torch.no_grad():
        loss = merged(input_ids=windows, labels=windows).loss.item()
    print(f"loss of the trained adapter {expected:.4f}, merged into a plain model {loss:.4f}")


if __name__ == "__main__":
    main()
