"""`deepspeed max-model CONFIG -c ds.json -m GIB`: the deepest model of a family that fits, found by prediction alone.

The family is a Hugging Face config.json with another number of layers. Memory grows with each layer by the same, so depth is
found by doubling and bisection on models of the meta device.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
EXACT_DEPTH = 64
"""Beyond, depths are predicted by the line through two shallow ones and confirmed once."""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(
        prog="deepspeed max-model", description="The deepest model of a family (a config.json's) that fits."
    )
    made.add_argument("model", type=Path, help="a Hugging Face config.json or its folder")
    made.add_argument("-b", "--batch", type=whole, default=1, help="samples per rank (%(default)s)")
    return add_arguments(made)


def deepest(args: argparse.Namespace) -> tuple[str, int, int, int]:
    """(the config's key, layers, bytes, parameters) of the deepest that fits; 0 layers if none does."""
    path = args.model / "config.json" if args.model.is_dir() else args.model
    if not path.is_file():
        raise DeepSpeedError(f"{path} does not exist.\n  Give a Hugging Face config.json, or its folder.")
    settings = read_settings(path)
    key = next((key for key in KEYS if key in settings), None)
    if key is None:
        raise DeepSpeedError(f"{path} has none of {', '.join(KEYS)}.\n  Give a configuration that says its depth.")
    config = read_config(args.config) if args.config else {"bf16": {"enabled": True}}
    given = with_values(config, {"train_batch_size": None, "train_micro_batch_size_per_gpu": args.batch})
    room = int(args.device_memory * GIB)

    def sized(layers: int) -> tuple[int, int]:
        return _needed({**settings, key: layers, "layer_types": None}, given, args)

    low, high = sized(2), sized(4)
    grown = max(1, (high[0] - low[0]) // 2)
    depth = max(0, 2 + (room - low[0]) // grown)
    depth = min(depth, 4096)
    while depth > 0 and depth <= EXACT_DEPTH and sized(depth)[0] > room:
        depth -= 1
    while 0 < depth < EXACT_DEPTH and sized(depth + 1)[0] <= room:
        depth += 1
    params = low[1] + (high[1] - low[1]) // 2 * (depth - 2)
    return key, depth, low[0] + grown * (depth - 2), params


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
        key, depth, needed, params = deepest(args)
    except DeepSpeedError as error:
        print(f"deepspeed max-model: {error}", file=sys.stderr)
        return 2
    if depth < 1:
        print(
            f"Not even one layer fits {args.device_memory:g} GiB. Use more ranks or ZeRO stage 3; see `deepspeed estimate`."
        )
        return 1
    print(
        f"{key}: {depth}\n{count(params)} parameters; a rank needs {gib(needed)} of {args.device_memory:g} GiB, "
        f"and one layer more does not fit."
    )
    return 0
