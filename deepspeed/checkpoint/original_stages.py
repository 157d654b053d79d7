"""The files of a pipeline that the original wrote, put together to what one process of it would have written.

Called by `original.Original`. Weights lie in a file per layer, with bare names; each stage has a file of its own beside, where its
number stands in place of the model-parallel rank:

    layer_03-model_states.pt                           weight, bias      ours: 3.weight, 3.bias
    mp_rank_01_model_states.pt                         stage 1: counters, names and shapes
    zero_pp_rank_0_mp_rank_01_optim_states.pt          its flat masters and moments, of data-parallel rank 0 (ZeRO 1)

Tied layers are called `tied_modules.<key>` by the stages' files alone, and stand in those of every stage that has them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from deepspeed.utils.errors import CheckpointError

_LAYER = re.compile(r"layer_(\d+)-model_states\.pt")
_STAGE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
Read = Callable[[Path], Any]


@dataclass(frozen=True)
class Stage:
    """One stage: names and shapes by optimizer group, and its data-parallel ranks' optimizers, of what no stage before has."""

    shapes: list[dict[str, Any]]
    optimizers: list[dict[str, Any]]


@dataclass(frozen=True)
class Stages:
    """`model`: as the one model file of a run without stages."""

    model: dict[str, Any]
    stages: list[Stage]


def is_pipeline(folder: Path) -> bool:
    """Whether there are files of layers."""
    return any(_LAYER.fullmatch(path.name) for path in folder.glob("layer_*"))


def read_stages(folder: Path, read: Read) -> Stages:
    """All files. Raises CheckpointError for what was cut beside its stages, or has optimizers that nobody can name."""
    layers = _layers(folder, read)
    models = [read(folder / f"mp_rank_{stage:02d}_model_states.pt") for stage in range(_num_stages(folder))]
    degree = (models[0].get("checkpoint_parallel_dimensions") or {}).get("tp_degree", 1)
    if degree != 1 or any(
        path.name.startswith("layer_") and not _LAYER.fullmatch(path.name) for path in folder.iterdir()
    ):
        raise CheckpointError(
            f"{folder} was written by a pipeline with tensor or expert parallelism, which cannot be imported.\n"
            "  Load it with the software that wrote it, export whole weights, and start from those."
        )
    stages, seen = [], set[str]()
    for number, model in enumerate(models):
        stages.append(_stage(folder, number, model, seen, read))
        seen |= {name for group in stages[-1].shapes for name in group}
    module = _named(layers, [shape for stage in stages for shape in stage.shapes])
    frozen: dict[str, Any] = {}
    for model in models:
        frozen |= model.get("frozen_param_shapes") or {}
    trained = {name for stage in stages for group in stage.shapes for name in group}
    whole = {
        **models[0],
        "module": module,
        "param_shapes": [group for stage in stages for group in stage.shapes] or [dict.fromkeys(module)],
        "frozen_param_shapes": frozen,
        "buffer_names": [name for name in module if trained and name not in trained and name not in frozen],
        "dp_world_size": int(models[0]["dp_world_size"]) * len(models),
        "mp_world_size": 1,
    }
    return Stages(whole, stages)


def _layers(folder: Path, read: Read) -> dict[int, Mapping[str, Any]]:
    found = {int(match[1]): read(path) for path in folder.iterdir() if (match := _LAYER.fullmatch(path.name))}
    return dict(sorted(found.items()))


def _num_stages(folder: Path) -> int:
    found = sorted(int(match[1]) for path in folder.iterdir() if (match := _STAGE.fullmatch(path.name)))
    missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
    if missing:
        raise CheckpointError(f"{folder}: the file of pipeline stage {missing[0]} is missing.")
    return len(found)


def _stage(folder: Path, number: int, model: Mapping[str, Any], seen: set[str], read: Read) -> Stage:
    ranks = {
        int(match[1]): path
        for path in folder.iterdir()
        if (match := _OPTIM.fullmatch(path.name)) and int(match[2]) == number
    }
    expected = int(model["dp_world_size"]) if ranks else 0
    if sorted(ranks) != list(range(expected)):
        raise CheckpointError(
            f"{folder}: stage {number} was written by {expected} ranks; it has files of {len(ranks)}."
        )
    shapes = [{n: s for n, s in group.items() if n not in seen} for group in model.get("param_shapes") or []]
    optimizers = []
    for rank in sorted(ranks):
        state = dict(read(ranks[rank])["optimizer_state_dict"])
        state["param_slice_mappings"] = [
            {name: place for name, place in group.items() if name not in seen}
            for group in state["param_slice_mappings"]
        ]
        optimizers.append(state)
    return Stage(shapes, optimizers)


def _named(layers: Mapping[int, Mapping[str, Any]], shapes: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The layers' tensors by the names of the whole model; a tied one is found by its last name and shape."""
    tied = {n: tuple(s) for group in shapes for n, s in group.items() if n.startswith("tied_modules.")}
    trained = {name for group in shapes for name in group}
    module: dict[str, Tensor] = {}
    for number, tensors in layers.items():
        for key, value in tensors.items():
            name = f"{number}.{key}"
            alias = next(
                (t for t, shape in tied.items() if t.endswith(f".{key}") and shape == tuple(value.shape)), None
            )
            if trained and name not in trained and alias is not None:
                name = alias
                del tied[alias]
            module[name] = value
    return module
