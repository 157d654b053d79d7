"""The optimizer's step where masters and states rest on a tier: a stream of tiles through main memory.

Made by `zero.optimizer` for the masters that are not in the device's memory; element-wise optimizers only.

    disk     read tile 1 | read 2       | read 3, write 1 | ...                        masters, moments, gradients
    cpu                  | step tile 1  | step 2          | step 3  | ...              the wrapped optimizer
    device                              | copy 1 up       | copy 2  | ...              low-precision parameters

A **tile** is an interval of one bucket's shard. It is what is read, stepped and written together, so a step needs the
memory of three tiles, however large the model is. In a tile each **segment** belongs to one parameter group and is a
tensor in the wrapped optimizer's `param_groups`; its data and its state are views of a tile's buffers while it is
stepped, or, where they rest in main memory, of those bytes themselves: then nothing moves.

Invariant: each element is read, stepped and written at most once per step, and the update of an element does not
depend on how the shard is cut, so that every tier gives the same bits.

After ZeRO-Infinity (arXiv:2104.07857), section 5.2 (the infinity offload engine) and ZeRO-Offload (2101.06840),
section 5. Different: tiles are cut by size, not by parameter; reads, step and writes always overlap.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.optim.traits import StepsFused
from deepspeed.tiers import Rest, Transfer
from deepspeed.utils.waits import OFFLOAD_S
from deepspeed.zero.gradients import Gradients
from deepspeed.zero.master import Master
from deepspeed.zero.on_disk import on_disk
from deepspeed.zero.placing import Placing

TILE_NUMEL = 1 << 22
"""Elements of a tile unless `sub_group_size` is smaller: 16 MB per fp32 state, long enough for a disk's full speed."""

TILE_UNITS = (1 << 15, 1 << 11)
"""Tiles start at multiples of the first, so that no two share bytes under one checksum in any dtype of two bytes or more, or, where
they are smaller, of the second, so that each begins on a disk's page."""

NUM_SETS = 3
"""Tiles in memory: one being read, one stepped, one written."""

WEIGHTS, GRADIENT, LOW = "master", "gradient", "low"
"""Kinds of bytes in a tile besides the optimizer's states, which go by their own names."""


@dataclasses.dataclass(eq=False)
class Segment:
    """The elements [start, stop) of a shard, of one parameter group; `param` is what the optimizer knows them by."""

    group: int
    start: int
    stop: int
    param: nn.Parameter
    states: set[str] = dataclasses.field(default_factory=set)
    """States that exist for these elements: none before their first step."""


@dataclasses.dataclass(eq=False)
class Tile:
    """The elements [start, stop) of one master's shard."""

    index: int
    """Of the master."""
    start: int
    stop: int
    segments: list[Segment]


class _Buffers:
    """The memory of one tile, by kind; made at first use."""

    def __init__(self, numel: int, allocate: Callable[[int, torch.dtype], Tensor]) -> None:
        self._numel, self._allocate = numel, allocate
        self._tensors: dict[str, Tensor] = {}
        self.writes: list[Transfer] = []

    def get(self, kind: str, numel: int, dtype: torch.dtype) -> Tensor:
        """A buffer [numel]."""
        if kind not in self._tensors:
            self._tensors[kind] = self._allocate(self._numel, dtype)
        return self._tensors[kind][:numel]


@dataclasses.dataclass
class _Loaded:
    """A tile in memory: each kind's elements, and what is still on its way."""

    tile: Tile
    buffers: _Buffers
    values: dict[str, Tensor]
    reads: list[Transfer]


class TileStream:
    """Steps `optimizer` on the masters whose bytes rest on tiers.

    The optimizer's state is in `states[index][name]`, one flat rest per master and state; `optimizer.state` shows it where
    it is in memory, and what says so where it is on disk (`zero.on_disk`).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        masters: Sequence[Master],
        gradients: Sequence[Gradients],
        placing: Placing,
        sub_group_numel: int,
    ) -> None:
        self.optimizer = optimizer
        self.masters, self.gradients = masters, gradients
        self.placing = placing
        self.tile_numel = tile_numel(sub_group_numel)
        self.states: list[dict[str, Rest]] = []
        self.tiles: list[Tile] = []
        self._known = optimizer.state_names if isinstance(optimizer, StepsFused) else {}
        """States that the optimizer will have: their space is taken now, and they start as zeros in a tile's buffers."""
        self.add()

    def add(self) -> None:
        """Stream the masters too that have joined since the last call."""
        for i in range(len(self.states), len(self.masters)):
            master = self.masters[i]
            self.states.append({})
            for name, dtype in self._known.items() if master.is_streamed else ():
                self._state_rest(i, name, dtype)
            self.tiles += self._cut(i, master) if master.is_streamed else ()

    def _cut(self, index: int, master: Master) -> Iterator[Tile]:
        for start in range(0, master.numel, self.tile_numel):
            stop = min(start + self.tile_numel, master.numel)
            segments = [
                Segment(span.group, max(span.start, start), min(span.stop, stop), nn.Parameter(torch.empty(0)))
                for span in master.spans
                if max(span.start, start) < min(span.stop, stop)
            ]
            tile = Tile(index, start, stop, segments)
            self._show(tile)
            yield tile

    def show(self, index: int) -> None:
        """The masters of this number are in other memory."""
        for tile in self.tiles:
            if tile.index == index:
                self._show(tile)

    def _show(self, tile: Tile) -> None:
        """Give segments whose masters are in memory their data between steps too, for whoever looks at param_groups."""
        for segment in tile.segments:
            here = self.masters[tile.index].weights.view(segment.start, segment.stop)
            segment.param.data = here if here is not None else torch.empty(0)

    def segments(self, index: int | None = None) -> Iterator[Segment]:
        """All segments, or those of one master, in the order of the shard."""
        return (s for tile in self.tiles if index is None or tile.index == index for s in tile.segments)

    # The step. -----------------------------------------------------------------------------------------------------

    def step(self, update: Callable[[list[Segment], dict[int, Tensor], dict[int, Tensor | None]], None]) -> None:
        """Step every tile. `update(segments, gradients, low)` steps loaded segments, given by position.

        Raises TierError where bytes could not be moved; masters and states of this rank are then half updated.
        """
        for tile in self.tiles:
            for segment in tile.segments:
                self._follow(tile.index, segment)
        sets = [_Buffers(self._largest_tile(), self._allocate) for _ in range(NUM_SETS)]
        tiles = [tile for tile in self.tiles if tile.segments]
        ahead = self._start_reading(tiles[0], sets[0]) if tiles else None
        for position, _ in enumerate(tiles):
            loaded = ahead
            assert loaded is not None
            following = position + 1
            ahead = (
                self._start_reading(tiles[following], sets[following % NUM_SETS]) if following < len(tiles) else None
            )
            _wait(loaded.reads)
            self._update(loaded, update)
            self._start_writing(loaded)
        for buffers in sets:
            _wait(buffers.writes)

    def _follow(self, index: int, segment: Segment) -> None:
        """Take over what a script made of a segment's states since the last step: dropped them, or gave it others."""
        shown = self.optimizer.state.get(segment.param, {})
        numel = segment.stop - segment.start
        for name in list(segment.states):
            value, rest = shown.get(name), self.states[index][name]
            if not isinstance(value, Tensor):
                rest.start_store(segment.start, torch.zeros(numel, dtype=rest.dtype)).wait()
                segment.states.discard(name)
            elif value.numel() == numel and not _is_at_rest(value, rest, segment.start):
                rest.start_store(segment.start, value.detach().reshape(-1).to(rest.dtype)).wait()
        for name, value in list(shown.items()):
            if name not in segment.states and isinstance(value, Tensor) and value.dim() and value.numel() == numel:
                rest = self.adopt_state(index, segment, name, value.dtype)
                rest.start_store(segment.start, value.detach().reshape(-1).to(rest.dtype)).wait()

    def _largest_tile(self) -> int:
        return max((tile.stop - tile.start for tile in self.tiles), default=0)

    def _allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        return self.placing.buffer(numel, dtype)

    def _low_rest(self, master: Master) -> Rest | None:
        """Where the parameters' own slice rests, if the step has to write it apart from the master."""
        return None if master.is_alias else master.bucket.rest

    def _start_reading(self, tile: Tile, buffers: _Buffers) -> _Loaded:
        _wait(buffers.writes)
        master = self.masters[tile.index]
        states = self.states[tile.index]
        kinds = {name for segment in tile.segments for name in segment.states}
        rests = {WEIGHTS: master.weights, GRADIENT: self.gradients[tile.index].rest(), **{k: states[k] for k in kinds}}
        values, reads = {}, []
        for kind, rest in rests.items():
            here = rest.view(tile.start, tile.stop)
            if here is None or here.device.type != "cpu":
                here = buffers.get(kind, tile.stop - tile.start, rest.dtype)
                reads.append(rest.start_load(tile.start, here))
            values[kind] = here
        low = self._low_rest(master)
        if low is not None:
            here = low.view(tile.start, tile.stop)
            is_here = here is not None and here.device.type == "cpu"
            values[LOW] = here if is_here else buffers.get(LOW, tile.stop - tile.start, low.dtype)  # type: ignore[assignment]
        return _Loaded(tile, buffers, values, reads)

    def _update(self, loaded: _Loaded, update: Callable[..., None]) -> None:
        began = time.perf_counter()
        tile, values = loaded.tile, loaded.values
        low = values.get(LOW)
        for name in self._known:
            if name not in values:
                values[name] = self._zeros(loaded, name)
        for segment in tile.segments:
            segment.states.update(self._known)
            segment.param.data = self._part(tile, segment, values[WEIGHTS])
            for name in segment.states:
                self.optimizer.state[segment.param][name] = self._part(tile, segment, values[name])
        update(
            tile.segments,
            {i: self._part(tile, s, values[GRADIENT]) for i, s in enumerate(tile.segments)},
            {i: None if low is None else self._part(tile, s, low) for i, s in enumerate(tile.segments)},
        )
        for segment in tile.segments:
            self._keep_states(loaded, segment)
        OFFLOAD_S["compute"] += time.perf_counter() - began

    def _part(self, tile: Tile, segment: Segment, values: Tensor) -> Tensor:
        return values[segment.start - tile.start : segment.stop - tile.start]

    def _keep_states(self, loaded: _Loaded, segment: Segment) -> None:
        """Take over states that the optimizer made or replaced: as long as the segment, they rest with the others."""
        numel = segment.stop - segment.start
        state = self.optimizer.state.get(segment.param, {})
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.dim() != 1 or value.numel() != numel:
                continue
            self._state_rest(loaded.tile.index, name, value.dtype)
            if name not in loaded.values:
                loaded.values[name] = self._zeros(loaded, name)
            part = self._part(loaded.tile, segment, loaded.values[name])
            if part.data_ptr() != value.data_ptr():
                part.copy_(value)
                state[name] = part
            segment.states.add(name)

    def _zeros(self, loaded: _Loaded, name: str) -> Tensor:
        """A tile's elements of a state that it has not had yet."""
        tile, rest = loaded.tile, self.states[loaded.tile.index][name]
        here = rest.view(tile.start, tile.stop)
        return here if here is not None else loaded.buffers.get(name, tile.stop - tile.start, rest.dtype).zero_()

    def _state_rest(self, index: int, name: str, dtype: torch.dtype) -> Rest:
        states, master = self.states[index], self.masters[index]
        if name not in states:
            states[name] = self.placing.optimizer(master.tier, name, master.numel, dtype)
        return states[name]

    def adopt_state(self, index: int, segment: Segment, name: str, dtype: torch.dtype) -> Rest:
        """The rest of a state that a segment is about to be given from outside; what nobody writes there is zero."""
        is_new = not any(name in other.states for other in self.segments(index))
        rest = self._state_rest(index, name, dtype)
        if is_new:
            for tile in self.tiles:
                if tile.index == index:
                    rest.start_store(tile.start, torch.zeros(tile.stop - tile.start, dtype=rest.dtype)).wait()
        segment.states.add(name)
        self.optimizer.state[segment.param][name] = self._piece_of_state(index, name, segment.start, segment.stop)
        return rest

    def _start_writing(self, loaded: _Loaded) -> None:
        tile, buffers = loaded.tile, loaded.buffers
        master, states = self.masters[tile.index], self.states[tile.index]
        targets = {WEIGHTS: master.weights, **states}
        low = self._low_rest(master)
        if low is not None:
            targets[LOW] = low
        for kind, rest in targets.items():
            values = loaded.values.get(kind)
            if values is not None and not _is_at_rest(values, rest, tile.start):
                buffers.writes.append(rest.start_store(tile.start, values))
        for segment in tile.segments:
            # No reference may stay to a buffer that another tile will fill.
            for name in segment.states:
                self.optimizer.state[segment.param][name] = self._piece_of_state(
                    tile.index, name, segment.start, segment.stop
                )
        self._show(tile)

    # Cutting out parameters that are not stepped. -----------------------------------------------------------------------

    def isolate(self, index: int, start: int, stop: int) -> list[Segment]:
        """Have the elements [start, stop) of a shard be segments of their own, for good; returns them."""
        found = []
        for tile in self.tiles:
            if tile.index != index:
                continue
            for segment in list(tile.segments):
                low, high = max(segment.start, start), min(segment.stop, stop)
                if low < high:
                    found.append(self._cut_out(tile, segment, low, high))
        return found

    def _cut_out(self, tile: Tile, segment: Segment, start: int, stop: int) -> Segment:
        bounds = [segment.start, start, stop, segment.stop]
        cuts = [(a, b) for a, b in itertools.pairwise(bounds) if a < b]
        if len(cuts) == 1:
            return segment
        state = self.optimizer.state.pop(segment.param, {})
        made = []
        for a, b in cuts:
            piece = Segment(segment.group, a, b, nn.Parameter(torch.empty(0)), set(segment.states))
            if state:
                self.optimizer.state[piece.param] = {
                    name: self._piece_of_state(tile.index, name, a, b) if name in segment.states else _copy(value)
                    for name, value in state.items()
                }
            made.append(piece)
        at = tile.segments.index(segment)
        tile.segments[at : at + 1] = made
        members = self.optimizer.param_groups[segment.group]["params"]
        position = next(i for i, tensor in enumerate(members) if tensor is segment.param)
        members[position : position + 1] = [piece.param for piece in made]
        self._show(tile)
        return made[cuts.index((start, stop))]

    def _piece_of_state(self, index: int, name: str, start: int, stop: int) -> Tensor:
        rest = self.states[index][name]
        here = rest.view(start, stop)
        return here if here is not None else on_disk(rest.dtype)


def tile_numel(sub_group_numel: int) -> int:
    """Elements of a tile where `sub_group_size` is given."""
    most = min(TILE_NUMEL, sub_group_numel)
    return next((most // unit * unit for unit in TILE_UNITS if most >= unit), TILE_UNITS[-1])


def _wait(transfers: list[Transfer]) -> None:
    while transfers:
        transfers.pop().wait()


def _is_at_rest(values: Tensor, rest: Rest, start: int) -> bool:
    here = rest.view(start, start + values.numel())
    return here is not None and here.data_ptr() == values.data_ptr()


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
