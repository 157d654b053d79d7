"""A pipeline's layers as files, one each, which scripts write and read without an engine: `PipelineModule.save_state_dict`.

    layer_03-model_00-model_states.pt      the fourth layer's tensors by bare names; "-model_00" where there is a model axis

An engine's checkpoints are another thing (`deepspeed.checkpoint`): they have optimizer states, and whole tensors of any ZeRO stage.
Layers that are tied and read backwards have no file of their own: their module is another layer's.

Invariant: names do not depend on the cut, so any number of stages reads what any other has written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from deepspeed.parallel.pipeline.layers import LayerError
from deepspeed.parallel.pipeline.tied import Tie
from deepspeed.parallel.pipeline.topology import ProcessTopology


class OwnLayers(NamedTuple):
    """What one rank has: its layers by global number, and those of them that are tied."""

    topology: ProcessTopology
    rank: int
    layers: Sequence[tuple[int, Any]]
    ties: Sequence[Tie]

    def path(self, folder: str | Path, number: int) -> Path:
        """The file of the layer with this global number, as this rank writes and reads it."""
        place = self.topology.get_rank_repr(self.rank, omit_axes=["pipe", "data", "sequence"])
        return Path(folder) / f"layer_{number:02d}{'-' + place if place else ''}-model_states.pt"

    def with_tensors(self) -> list[tuple[int, nn.Module]]:
        """The layers that have a file."""
        return [(number, layer) for number, layer in self.layers if isinstance(layer, nn.Module) and layer.state_dict()]


def save_layers(own: OwnLayers, folder: str | Path, writer: Any, excludes_frozen: bool) -> None:
    """A rank's layers, where it is the first of those that have them. writer: writes tensors to a path by its method save; None for torch."""
    coord = own.topology.get_coord(own.rank)
    if any(getattr(coord, axis, 0) for axis in ("data", "sequence")):
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number, layer in own.with_tensors():
        frozen = {n for n, p in layer.named_parameters() if not p.requires_grad} if excludes_frozen else set()
        # Of views, torch would write all of the memory they look at.
        tensors = {n: _alone(value) for n, value in layer.state_dict().items() if n not in frozen}
        (torch if writer is None else writer).save(tensors, str(own.path(folder, number)))


def load_layers(own: OwnLayers, folder: str | Path, reader: Any, strict: bool) -> None:
    """The inverse; tied modules are made equal afterwards. Collective. Raises LayerError on all ranks where a file is missing or does
    not fit."""
    failure = None
    try:
        for number, layer in own.with_tensors():
            path = own.path(folder, number)
            if not path.is_file():
                raise LayerError(f"{path} is missing: layer {number} has not been saved.")
            tensors = (torch if reader is None else reader).load(str(path), map_location="cpu")
            layer.load_state_dict(tensors, strict=strict)
    except Exception as error:
        failure = error
    words: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(words, None if failure is None else f"[rank {own.rank}] {failure}")
    told = [text for text in words if text is not None]
    if told:
        raise LayerError(f"load_state_dir({str(folder)!r}) failed.\n  " + "\n  ".join(told)) from failure
    for tie in own.ties:
        tie.make_equal()


def _alone(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
