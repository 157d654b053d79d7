"""Edit a running script at random points, against plain PyTorch: the same weights in the end, or a refusal in our words.

`make test-edits` runs it. Every program is a random list of steps and edits (write, assign, freeze, unfreeze, replace, add,
delete, cast, evaluate, save, load, an exception in the forward), made once in plain PyTorch and once through an engine of a
random ZeRO stage, precision, optimizer and place (main memory, MiCS, hpZ). A difference, another error, or one that is not on every rank, is a finding.

    python -m tests.soak.edits --rounds 200 --seed 1
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepspeed.utils.errors import DeepSpeedError
from tests.edits import OPTIMIZERS, EngineSide, PlainSide, assert_same, two_sides
from tests.harness import close_pools, run_ranks

Choice = Callable[[random.Random, Any], None]
"""An edit of one side; both sides get generators in the same state."""


def _params(rng: random.Random, side: Any) -> list[nn.Parameter]:
    params = list(side.module.parameters())
    return rng.sample(params, rng.randint(1, len(params)))


def step(rng: random.Random, side: Any) -> None:
    for _ in range(rng.randint(1, 2)):
        side.backward(rng.randrange(1000))
        side.step()


def write(rng: random.Random, side: Any) -> None:
    params, through_data = _params(rng, side), rng.random() < 0.5
    with side.writing(params):
        for param in params:
            (param.data if through_data else param).mul_(0.5).add_(rng.uniform(-0.2, 0.2))


def clamp(rng: random.Random, side: Any) -> None:
    params = _params(rng, side)
    with side.writing(params):
        for param in params:
            param.data.clamp_(-0.2, 0.2)


def assign(rng: random.Random, side: Any) -> None:
    params = _params(rng, side)
    with side.writing(params):
        for param in params:
            param.data = param.data * rng.uniform(0.5, 1.2)


def freeze(rng: random.Random, side: Any) -> None:
    for param in _params(rng, side):
        param.requires_grad_(False)
    side.module.last.requires_grad_(True)


def unfreeze(rng: random.Random, side: Any) -> None:
    for param in _params(rng, side):
        param.requires_grad_(True)


def _layer(rng: random.Random, side: Any) -> nn.Linear:
    torch.manual_seed(rng.randrange(1000))
    return nn.Linear(8, 8, dtype=side.dtype)


def add(rng: random.Random, side: Any) -> None:
    side.module.layers.append(_layer(rng, side))
    if rng.random() < 0.8:
        side.give(list(side.module.layers[-1].parameters()))


def replace(rng: random.Random, side: Any) -> None:
    if len(side.module.layers):
        layer, weight = rng.choice(list(side.module.layers)), _layer(rng, side).weight.detach()
        layer.weight = nn.Parameter(weight)
        if rng.random() < 0.8:
            side.give([layer.weight])


def delete(rng: random.Random, side: Any) -> None:
    if len(side.module.layers):
        del side.module.layers[rng.randrange(len(side.module.layers))]


def cast(rng: random.Random, side: Any) -> None:
    if side.stage < 3:
        side.module.double()
        side.module.to(side.dtype)


def evaluate(rng: random.Random, side: Any) -> None:
    side.module.eval()
    side.forward(rng.randrange(1000))
    side.module.train()


def fail(rng: random.Random, side: Any) -> None:
    def explode(*_: Any) -> None:
        raise RuntimeError("on purpose")

    handle = side.module.last.register_forward_pre_hook(explode)
    try:
        side.forward(0)
    except RuntimeError as error:
        if "on purpose" not in str(error):
            raise
    handle.remove()


CHOICES: tuple[Choice, ...] = (
    write, clamp, assign, freeze, unfreeze, unfreeze, add, replace, delete, cast, evaluate, fail,
)  # fmt: skip


HOUSES: dict[str, tuple[Callable[[int, int], bool], dict[str, Any]]] = {
    "-": (lambda stage, ranks: True, {}),
    "optimizer in main memory": (lambda stage, ranks: stage > 0, {"offload_optimizer": {"device": "cpu"}}),
    "all in main memory": (
        lambda stage, ranks: stage == 3,
        {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    ),
    "a part of the optimizer in main memory": (
        lambda stage, ranks: stage == 3,
        {"offload_optimizer": {"device": "cpu", "ratio": 0.5}},
    ),
    "MiCS": (lambda stage, ranks: stage == 3 and ranks > 1, {"mics_shard_size": 1}),
    "MiCS of two": (lambda stage, ranks: stage == 3 and ranks == 4, {"mics_shard_size": 2}),
    "hpZ": (lambda stage, ranks: stage == 3 and ranks == 4, {"zero_hpz_partition_size": 2}),
}
"""Where states rest and over whom they are cut: at which stages and numbers of ranks, and the configuration."""


def _form(side: Any) -> list[tuple[str, bool]]:
    return [(name, param.requires_grad) for name, param in side.module.named_parameters()]


def program(rank: int, world_size: int, seed: int, folder: Path) -> str:
    """Run one program on both sides; what it was, in words. Raises AssertionError for a difference."""
    rng = random.Random(seed)
    stage, dtype = rng.randrange(4), rng.choice([torch.float32, torch.bfloat16, torch.float16])
    if world_size == 4:
        stage = max(stage, rng.choice([0, 3]))
    frozen = rng.random() < 0.5
    house = rng.choice([name for name, (fits, _) in HOUSES.items() if fits(stage, world_size)])
    told = [f"seed {seed}: stage {stage}, {dtype}, {house}"]
    with two_sides(
        rank, world_size, stage, dtype, rng.choice(list(OPTIMIZERS)),
        prepare=(lambda module: module.first.requires_grad_(False) and None) if frozen else None, **HOUSES[house][1],
    ) as (plain, side):  # fmt: skip
        saved: tuple[Any, Any, list[tuple[str, bool]]] | None = None
        try:
            for _ in range(rng.randint(3, 8)):
                kind = rng.choice(["edit", "edit", "edit", "save", "load"])
                if kind == "edit":
                    edit = rng.choice(CHOICES)
                    told.append(edit.__name__)
                    _both(rng, plain, side, edit)
                elif kind == "save":
                    told.append("save")
                    saved = plain.save(), side.save(folder), _form(plain)
                elif saved is not None and saved[2] == _form(plain):
                    told.append("load")
                    plain.load(saved[0])
                    side.load(saved[1])
                told.append("step")
                _both(rng, plain, side, step)
        except DeepSpeedError as error:
            return f"refused: {str(error).splitlines()[0][:90]}"
        try:
            assert_same(plain, side)
        except AssertionError as error:
            raise AssertionError(f"{', '.join(told)}: {error}") from None
    return "the same"


def _both(rng: random.Random, plain: PlainSide, side: EngineSide, edit: Choice) -> None:
    state = rng.getstate()
    edit(rng, plain)
    after = rng.getstate()
    rng.setstate(state)
    edit(rng, side)
    rng.setstate(after)


def programs(rank: int, world_size: int, seeds: list[int], folder: Path) -> list[tuple[int, str]]:
    found = []
    for seed in seeds:
        try:
            found.append((seed, program(rank, world_size, seed, folder / str(seed))))
        except Exception as error:
            found.append((seed, f"FOUND: {type(error).__name__}: {error}"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=0, help="0: one, two and four in turn")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    began = time.perf_counter()
    for first in range(args.seed, args.seed + args.rounds, 20):
        seeds = list(range(first, min(first + 20, args.seed + args.rounds)))
        world_size = args.ranks or 2 ** (first // 20 % 3)
        with tempfile.TemporaryDirectory() as folder:
            of_ranks = run_ranks(world_size, programs, seeds, Path(folder), timeout=300.0)
        for told in zip(*of_ranks, strict=True):
            texts = {text for _, text in told}
            text = texts.pop() if len(texts) == 1 else f"FOUND: ranks differ: {told}"
            counts[text if "FOUND" not in text else "FOUND"] += 1
            if "FOUND" in text:
                print(f"{world_size} ranks, {text}", flush=True)
    close_pools()
    for text, count in counts.most_common():
        print(f"{count:5}  {text}")
    print(f"{args.rounds} programs in {time.perf_counter() - began:.0f} s, {counts['FOUND']} findings")
    raise SystemExit(counts["FOUND"] > 0)


if __name__ == "__main__":
    main()
