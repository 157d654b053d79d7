"""`deepspeed max-model CONFIG -c ds.json -m GIB`: the deepest model of a family that fits, found by prediction alone.

The family is a Hugging Face config.json with another number of layers. Memory grows with each layer by the same, so depth is
found on few models of the meta device.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deepspeed.config import read_config
from deepspeed.config.dotted import with_values
from deepspeed.memory.cli import from_hugging_face, gib, read_settings
from deepspeed.memory.estimator import Estimator
from deepspeed.planner.largest import GIB, add_arguments
from deepspeed.utils.arguments import whole
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.figures import count

KEYS = ("num_hidden_layers", "n_layer", "num_layers")
"""How families call their depth."""
EXACT_DEPTH = 96
"""Deeper ones are not traced, which takes minutes: they are on the line through this one and one of two thirds."""


class Deepest(NamedTuple):
    """The deepest model that fits."""

    key: str
    """The configuration's, for the depth."""
    layers: int
    """0: none fits."""
    nbytes: int
    """Of a rank."""
    num_params: int
    is_exact: bool
    """Whether it and one layer more were predicted, not a line's."""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(
        prog="deepspeed max-model", description="The deepest model of a family (a config.json's) that fits."
    )
    made.add_argument("model", type=Path, help="a Hugging Face config.json or its folder")
    made.add_argument("-b", "--batch", type=whole, default=1, help="samples per rank (%(default)s)")
    return add_arguments(made)


def deepest(args: argparse.Namespace) -> Deepest:
    """The deepest model of the family that fits. Raises DeepSpeedError where there is no family."""
    path = args.model / "config.json" if args.model.is_dir() else args.model
    if not path.is_file():
        raise DeepSpeedError(f"{path} does not exist.\n  Give a Hugging Face config.json, or its folder.")
    settings = read_settings(path)
    key = next((key for key in KEYS if key in settings), None)
    if key is None:
        raise DeepSpeedError(f"{path} has none of {', '.join(KEYS)}.\n  Give a configuration that says its depth.")
    config = read_config(args.config) if args.config else {"bf16": {"enabled": True}}
    given = with_values(config, {"train_batch_size": None, "train_micro_batch_size_per_gpu": args.batch})

    @functools.cache
    def needs(layers: int) -> tuple[int, int]:
        """(bytes, parameters)"""
        return _needed({**settings, key: layers, "layer_types": None}, given, args)

    layers, is_exact = deepest_below(int(args.device_memory * GIB), lambda layers: needs(layers)[0], EXACT_DEPTH)
    if is_exact:
        nbytes, num_params = needs(layers) if layers else (0, 0)
    else:
        near, far = 2 * EXACT_DEPTH // 3, EXACT_DEPTH
        nbytes, num_params = (
            b + (layers - far) * (b - a) // (far - near) for a, b in zip(needs(near), needs(far), strict=True)
        )
    return Deepest(key, layers, nbytes, num_params, is_exact)


def deepest_below(room: int, needs: Callable[[int], int], most: int) -> tuple[int, bool]:
    """(the most layers whose bytes are at most `room`, True); beyond `most` layers, (what a line says, False). 0: not even one.

    Bytes grow with layers, and nearly by the same with each: the next depth to look at is where the line through the last two ends.
    """
    low, high = 0, most + 1  # fits; does not
    guess, before = 2, 1
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        low, high = (guess, high) if needs(guess) <= room else (low, guess)
        grown = (needs(guess) - needs(before)) / (guess - before) if guess != before else 0.0
        before, guess = guess, guess + int((room - needs(guess)) // grown) if grown > 0 else (low + high) // 2
    if low < most:
        return low, True
    near = 2 * most // 3
    grown = (needs(most) - needs(near)) / (most - near)
    return most + int((room - needs(most)) // grown), False


def _needed(settings: dict[str, Any], config: dict[str, Any], args: argparse.Namespace) -> tuple[int, int]:
    """(bytes of a rank, parameters) of one depth."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
        model, batch = from_hugging_face(path, args.batch, args.seq)
    found = Estimator(model, batch, device_type=args.device).estimate(config, world_size=args.ranks, bounds=False)
    extra = found.allowance_nbytes if args.device != "cpu" else 0
    return found.peak_nbytes + extra, found.num_params


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 1 where not even one layer fits."""
    args = parser().parse_args(arguments)
    try:
        found = deepest(args)
    except DeepSpeedError as error:
        print(f"deepspeed max-model: {error}", file=sys.stderr)
        return 2
    if not found.layers:
        print(
            f"Not even one layer fits {args.device_memory:g} GiB. Use more ranks or ZeRO stage 3; see `deepspeed estimate`."
        )
        return 1
    end = (
        "and one layer more does not fit" if found.is_exact else f"as far as {EXACT_DEPTH} layers tell of deeper models"
    )
    print(
        f"{found.key}: {found.layers}\n{count(found.num_params)} parameters; a rank needs {gib(found.nbytes)} of "
        f"{args.device_memory:g} GiB, {end}."
    )
    return 0
