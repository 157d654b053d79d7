"""Vision and language: a frozen image tower, a trained connector, a small language model that describes the picture.

Pictures show one coloured shape somewhere; the text names its colour, shape and place. The tower stands in for a
pretrained one: it is frozen, so ZeRO keeps no gradients and no moments for it, and stage 3 shards it all the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed

COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}
SHAPES = ("square", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
WORDS = ["<end>", "a", "at", *COLOURS, *SHAPES, "top", "bottom", "left", "right"]
SIZE = 32


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(pictures [count, 3, SIZE, SIZE], words [count, 7])."""
    generator = torch.Generator().manual_seed(seed)
    pictures = 0.1 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    texts = []
    for picture in pictures:
        pick = [int(torch.randint(n, (), generator=generator)) for n in (len(COLOURS), len(SHAPES), len(PLACES))]
        colour, shape, place = list(COLOURS)[pick[0]], SHAPES[pick[1]], PLACES[pick[2]]
        top, left = 4 + 16 * ("bottom" in place), 4 + 16 * ("right" in place)
        mask = torch.ones(8, 8) if shape == "square" else torch.zeros(8, 8)
        mask[3:5], mask[:, 3:5] = 1, 1
        picture[:, top : top + 8, left : left + 8] += torch.tensor(COLOURS[colour])[:, None, None] * mask
        texts.append([WORDS.index(word) for word in f"a {colour} {shape} at {place} <end>".split()])
    return pictures, torch.tensor(texts)


class Tower(nn.Module):
    """Patches to features: convolutions with weights that stay as they are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.GELU(), nn.Conv2d(width, width, 3, 1, 1), nn.GELU())

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures).flatten(2).transpose(1, 2)


class Describer(nn.Module):
    """Tower, connector, decoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tower = Tower(64).requires_grad_(False)
        self.connector = nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, width))
        self.words = nn.Embedding(len(WORDS), width)
        self.places = nn.Parameter(0.1 * torch.randn((SIZE // 4) ** 2 + 8, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(WORDS))

    def forward(self, pictures: Tensor, words: Tensor) -> Tensor:
        seen = self.connector(self.tower(pictures))
        sequence = torch.cat([seen, self.words(words[:, :-1])], 1)
        sequence = sequence + self.places[: sequence.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(sequence.shape[1], device=seen.device, dtype=seen.dtype)
        hidden = self.decoder(sequence, mask=mask, is_causal=True)
        logits = self.head(hidden[:, seen.shape[1] :])
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), words[:, 1:].flatten())


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; the mean losses over all ranks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--local_rank", type=int, default=-1)
    args = deepspeed.add_config_arguments(parser).parse_args(arguments)
    config = json.loads(Path(args.deepspeed_config or Path(__file__).with_name("zero2.json")).read_text())
    torch.manual_seed(0)
    model = Describer(args.width)
    tower = {name: value.clone() for name, value in model.tower.state_dict().items()}
    trained = [param for param in model.parameters() if param.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    losses = []
    for step in range(args.steps):
        pictures, words = draw(engine.train_micro_batch_size_per_gpu(), 1000 * step + engine.global_rank)
        loss = engine(pictures.to(engine.device), words.to(engine.device))
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float()
        dist.all_reduce(mean)
        losses.append(mean.item() / engine.world_size)
    with deepspeed.zero.GatheredParameters(list(model.tower.parameters())):
        unchanged = all(torch.equal(value.cpu(), tower[name]) for name, value in model.tower.state_dict().items())
    if engine.global_rank == 0:
        print(
            f"loss {losses[0]:.3f} -> {sum(losses[-10:]) / 10:.3f}; the tower is {'as it was' if unchanged else 'CHANGED'}"
        )
    engine.destroy()
    assert unchanged
    return losses


if __name__ == "__main__":
    main()
