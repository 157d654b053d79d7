"""The same training step in plain PyTorch on one process: what `train.py --plain` runs instead of DeepSpeed.

Reads the same JSON and shows the same few methods as the engine, so that the loop in `train.py` is one. In fp32 its
losses equal those of every ZeRO stage on the same total batch: compare the `losses.json` of two runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class PlainEngine:
    """AdamW with accumulation and clipping, as the JSON says; `num_ranks` ranks' samples make one micro-batch."""

    def __init__(self, model: nn.Module, config_path: str, num_ranks: int, make_scheduler: Callable[..., Any]) -> None:
        config = json.loads(Path(config_path).read_text())
        if any(config.get(section, {}).get("enabled") for section in ("fp16", "bf16", "torch_autocast")):
            raise ValueError(f"{config_path} asks for mixed precision; --plain compares in fp32 only.")
        self.module = model
        self.num_ranks = num_ranks
        self._micro_batch = config["train_micro_batch_size_per_gpu"]
        self._accumulation = config.get("gradient_accumulation_steps", 1)
        self._clip = config.get("gradient_clipping", 0.0)
        self._micro_steps = 0
        self.device = torch.device("cpu")
        self.optimizer = torch.optim.AdamW(model.parameters(), **config["optimizer"]["params"])
        self.scheduler = make_scheduler(self.optimizer)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.module(x, y)

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's share of the gradient."""
        (loss / self._accumulation).backward()

    def step(self) -> None:
        """Count a micro-batch; at the last of a step, clip and update."""
        self._micro_steps += 1
        if self._micro_steps % self._accumulation:
            return
        if self._clip:
            nn.utils.clip_grad_norm_(self.module.parameters(), self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples of one rank in a micro-batch."""
        return self._micro_batch

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per step."""
        return self._accumulation

    def train(self) -> None:
        """Training mode."""
        self.module.train()

    def eval(self) -> None:
        """Evaluation mode."""
        self.module.eval()

    def destroy(self) -> None:
        """Nothing to free: there are no hooks and no process groups."""
