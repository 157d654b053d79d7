"""Writes the files in `original_pipeline/` with DeepSpeed 0.19.8 on two ranks, a stage each; and the model and batches, for the tests.

python make_original_pipeline.py {0,1} OUTPUT_DIR        in a launcher's environment that has the original
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

NUM_STEPS = 3


class Embed(nn.Module):
    """Tokens to vectors, and by `head` back."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(11, 6) * 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.weight)


def head(module: Embed, x: Tensor) -> Tensor:
    """Logits by the embedding's weight."""
    return x @ module.weight.t()


def layers(pipe: Any) -> list[Any]:
    """Tied ends, layers with and without parameters, one with a buffer."""
    return [
        pipe.TiedLayerSpec("embed", Embed),
        pipe.LayerSpec(nn.Linear, 6, 9),
        pipe.LayerSpec(nn.Tanh),
        pipe.LayerSpec(nn.Linear, 9, 6),
        pipe.LayerSpec(nn.LayerNorm, 6),
        pipe.TiedLayerSpec("embed", Embed, forward_fn=head),
    ]


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over tokens."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def config_of(stage: int) -> dict[str, Any]:
    """Two micro-batches per step, clipped."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
    }


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """As many as are asked for."""
    generator = torch.Generator().manual_seed(5)
    while True:
        tokens = torch.randint(0, 11, (2, 5), generator=generator)
        yield tokens, tokens.roll(1, 1)


def main() -> None:
    """Train, save, and note what two more steps give."""
    import deepspeed
    from deepspeed import pipe

    stage, folder = int(sys.argv[1]), sys.argv[2]
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    module = pipe.PipelineModule(layers(pipe), num_stages=2, loss_fn=token_loss, partition_method="uniform")
    engine = deepspeed.initialize(model=module, config=config_of(stage), model_parameters=list(module.parameters()))[0]
    data = batches()
    for _ in range(NUM_STEPS):
        engine.train_batch(data)
    engine.save_checkpoint(folder, tag=f"z{stage}", client_state={"note": 7})
    after = [float(engine.train_batch(data)) for _ in range(2)]
    print(f"losses after z{stage}: {after}", flush=True)


if __name__ == "__main__":
    main()
