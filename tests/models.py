"""Small deterministic models, one per way in which real ones use their parameters, and batches for them.

The oracle tests train each of them with plain PyTorch (`oracle.py`) and with the engine. Every model is called as
`model(x, y)` and answers a loss, or an output that holds it; `total_loss` finds it in either. Losses are means over
samples in fp32, so that the mean of the ranks' losses is the loss of their joined batch.

    model = build("branching")
    batches = make_batches(model, num_steps=4, accumulation=1, samples=6)
    for (x, y), in batches: total_loss(model(*rank_share((x, y), rank, world_size))).backward()
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Batch = tuple[Tensor, Tensor]

WIDTH, OUTPUTS = 16, 4
VOCAB, SEQ = 48, 12


class Model(nn.Module):
    """A model that knows what its batches look like."""

    def example(self, samples: int, index: int, generator: torch.Generator) -> Batch:
        """The `index`-th micro-batch."""
        raise NotImplementedError


class Regression(Model):
    """Base: x is [samples, WIDTH], y is [samples, OUTPUTS]; the first column of x is one sign per micro-batch."""

    def example(self, samples: int, index: int, generator: torch.Generator) -> Batch:
        x = torch.randn(samples, WIDTH, generator=generator)
        x[:, 0] = 1.0 if index % 3 else -1.0
        return x, torch.randn(samples, OUTPUTS, generator=generator)


def squared_error(output: Tensor, y: Tensor) -> Tensor:
    """Mean squared error in fp32."""
    return F.mse_loss(output.float(), y.float())


def block(width: int = WIDTH) -> nn.Sequential:
    """Linear, GELU, LayerNorm."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))


class Mlp(Regression):
    """The plain case: a stack of blocks, each used once, in order."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, OUTPUTS)

    def features(self, x: Tensor) -> Tensor:
        """[samples, WIDTH] before the head."""
        for layer in self.blocks:
            x = x + layer(x)
        return x

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return squared_error(self.head(self.features(x)), y)


class WithFrozen(Mlp):
    """A whole block, and one bias of another, do not train."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].requires_grad_(False)
        self.head.bias.requires_grad_(False)


class WithUnused(Mlp):
    """One block is never called, and another only in every third micro-batch (in steps without it, it is not stepped)."""

    def __init__(self) -> None:
        super().__init__()
        self.never = block()
        self.sometimes = block()

    def features(self, x: Tensor) -> Tensor:
        is_used = x[0, 0] < 0
        x = super().features(x)
        return self.sometimes(x) if is_used else x


class Shared(Regression):
    """One block is called three times in a forward; two modules hold the same Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight
        self.block = block()
        self.head = nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = x + self.block(x)
        return squared_error(self.head(self.second(x)), y)


class Borrower(nn.Module):
    """Multiplies by the weight of a module that is not its child."""

    def __init__(self, lender: nn.Linear) -> None:
        super().__init__()
        self.lender = (lender,)  # in a tuple, so that it is not registered here
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.lender[0].weight) * self.scale


class OutsideUse(Regression):
    """Parameters used outside their module: by a sibling, and by the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.lender = nn.Linear(WIDTH, WIDTH)
        self.borrower = Borrower(self.lender)
        self.block = block()
        self.head = nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.block(self.borrower(self.lender(x)))
        return squared_error(F.linear(x, self.head.weight) + self.head.bias, y)


class Branching(Mlp):
    """The order of the blocks depends on the data; it is the same on all ranks, and changes between micro-batches."""

    def features(self, x: Tensor) -> Tensor:
        first, second, third = self.blocks
        for layer in (first, second, third) if x[0, 0] > 0 else (third, first):
            x = x + layer(x)
        return x


class Experts(Mlp):
    """Each sample goes to one of four blocks, so that ranks use different ones, and not all of them."""

    def __init__(self) -> None:
        super().__init__(depth=4)

    def features(self, x: Tensor) -> Tensor:
        chosen = x[:, 1:5].argmax(dim=1)
        out = x
        for i in chosen.unique().tolist():
            picked = (chosen == i).nonzero().squeeze(1)
            out = out.index_add(0, picked, self.blocks[i](x[picked]))
        return out


class Checkpointed(Mlp):
    """Blocks recompute their activations in backward."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.entry = nn.Linear(WIDTH, WIDTH)

    def features(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for layer in self.blocks:
            x = x + checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x


class TwoLosses(Mlp):
    """Answers (loss, auxiliary loss); both share the blocks, each has a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(x)
        return squared_error(self.head(x), y), 0.1 * squared_error(self.auxiliary(x), y.mean(1, keepdim=True))


class DictOutput(Mlp):
    """Answers a dict that holds the loss."""

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        output = self.head(self.features(x))
        return {"loss": squared_error(output, y), "output": output}


@dataclass
class Output:
    """What `DataclassOutput` answers."""

    loss: Tensor
    output: Tensor


class DataclassOutput(DictOutput):
    """Answers a dataclass that holds the loss."""

    def forward(self, x: Tensor, y: Tensor) -> Output:  # type: ignore[override]
        return Output(**super().forward(x, y))


class TinyGptBlock(nn.Module):
    """Pre-norm attention and MLP; [samples, seq, width] in and out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        samples, seq, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(samples, seq, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(samples, seq, width))
        return x + self.mlp(self.norm2(x))


class TinyGpt(Model):
    """A decoder of two blocks; x and y are [samples, SEQ] tokens, y one later. `tied`: the output layer is the embedding."""

    def __init__(self, tied: bool = True, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width)
        self.position = nn.Parameter(torch.randn(SEQ, width) * 0.02)
        self.blocks = nn.ModuleList(TinyGptBlock(width, heads=2) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.05)
        if tied:
            self.head.weight = self.embedding.weight

    def example(self, samples: int, index: int, generator: torch.Generator) -> Batch:
        tokens = torch.randint(VOCAB, (samples, SEQ + 1), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embedding(x) + self.position
        for layer in self.blocks:
            h = layer(h)
        return F.cross_entropy(self.head(self.norm(h)).float().flatten(0, 1), y.flatten())


def example_module() -> ModuleType:
    """`examples/gpt/model.py`, which is no package."""
    path = Path(__file__).parents[1] / "examples" / "gpt" / "model.py"
    spec = importlib.util.spec_from_file_location("example_gpt_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Example(TinyGpt):
    """The model of examples/gpt, small; its weights tied."""

    def __init__(self) -> None:
        Model.__init__(self)
        example = example_module()
        config = example.GptConfig(vocab=VOCAB, seq=SEQ, width=32, layers=2, heads=2, tied=True)
        self.gpt = example.Gpt(config)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.gpt(x, y)


MODELS: dict[str, Callable[[], Model]] = {
    "example": Example,
    "mlp": Mlp,
    "gpt_tied": partial(TinyGpt, tied=True),
    "gpt_untied": partial(TinyGpt, tied=False),
    "shared": Shared,
    "frozen": WithFrozen,
    "unused": WithUnused,
    "outside_use": OutsideUse,
    "branching": Branching,
    "experts": Experts,
    "checkpointed": partial(Checkpointed, use_reentrant=False),
    "checkpointed_reentrant": partial(Checkpointed, use_reentrant=True),
    "two_losses": TwoLosses,
    "dict_output": DictOutput,
    "dataclass_output": DataclassOutput,
}


def build(name: str, seed: int = 0) -> Model:
    """The model of that name in `MODELS`; the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name]()


def make_batches(model: Model, *, num_steps: int, accumulation: int, samples: int, seed: int = 1) -> list[list[Batch]]:
    """batches[step][micro] = (x, y) with `samples` samples of all ranks together; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [model.example(samples, step * accumulation + micro, generator) for micro in range(accumulation)]
        for step in range(num_steps)
    ]


def rank_share(batch: Batch, rank: int, world_size: int) -> Batch:
    """The samples of one rank: the rank-th of `world_size` equal runs of the joined batch."""
    assert len(batch[0]) % world_size == 0, f"{len(batch[0])} samples for {world_size} ranks"
    x, y = (tensor.chunk(world_size)[rank] for tensor in batch)
    return x, y


def to_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch with its floating-point tensors in the dtype of the model; tokens as they are."""
    x, y = (tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in batch)
    return x, y


def total_loss(output: Any) -> Tensor:
    """The loss to run backward from: the output itself, its sum, its ["loss"] or its .loss."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        return torch.stack(output).sum()
    return output["loss"] if isinstance(output, Mapping) else output.loss
