"""The files of ranks that shared layers when the original saved them, put together to whole parameters.

Made by `find.open_checkpoint` where there are model files of several model-parallel ranks and no layers of a pipeline. Each rank's files are
those of a run of its own (`original.Original`), whose parameters are the rank's parts; where those lie in the whole, each rank's model file
says for all ranks under `universal_checkpoint_info`:

    affine_map          from 0.19: per parameter and rank, rectangles: offset and strides in the part and in the whole, and a shape
    *_patterns          otherwise: rows cut in dim 1, replicated; whatever neither names is cut in dim 0

Parts become boxes (`boxes`), so any layout of ranks loads them. Source: the files themselves, looked at as data.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from deepspeed.checkpoint.boxes import Box, Range, box_of, meeting
from deepspeed.checkpoint.manifest import Extent, ParameterInfo, StoredTensor
from deepspeed.checkpoint.original import MODEL_FILE, Original
from deepspeed.checkpoint.source import Wanted
from deepspeed.checkpoint.subject import BUFFER
from deepspeed.utils.errors import CheckpointError

_INFO = "universal_checkpoint_info"
Place = tuple[tuple[int, ...], list["Box | None"]]
"""The whole shape, and each rank's box of it; what holds nothing has a box without elements."""


def num_model_ranks(folder: Path) -> int:
    """How many ranks shared layers, by the files."""
    found = [int(match[2]) for path in folder.iterdir() if (match := MODEL_FILE.fullmatch(path.name))]
    return max(found, default=0) + 1


class OriginalParts:
    """See `source.Source`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ranks = [Original(folder, rank) for rank in range(num_model_ranks(folder))]
        first = self._ranks[0]
        self.about = {**first.about, "world_size": int(first.about["world_size"]) * len(self._ranks)}
        self.tied = first.tied
        self.parameters: dict[str, ParameterInfo] = {}
        self.tensors: dict[str, dict[str, StoredTensor]] = {}
        self._pieces: dict[tuple[str, str], list[Tensor]] = {}
        self._places = _Places(folder, first.model_info(_INFO), len(self._ranks))
        for name, info in first.parameters.items():
            whole, _ = self._place(name)
            self.parameters[name] = ParameterInfo(info.dtype, whole, info.is_frozen)
        for kind, by_name in first.tensors.items():
            for name in by_name:
                self._join(kind, name)

    def _place(self, name: str) -> Place:
        return self._places.of(name, [rank.parameters[name].shape for rank in self._ranks])

    def _join(self, kind: str, name: str) -> None:
        if kind == BUFFER:
            shape = self._ranks[0].tensors[kind][name].shape
            place: Place = (shape, [None] * len(self._ranks))
        else:
            place = self._place(name)
        extents: list[Extent] = []
        pieces: list[Tensor] = []
        seen: set[Box | None] = set()
        for rank, box in zip(self._ranks, place[1], strict=True):
            if box in seen or (box is not None and box.numel == 0):
                continue  # what several ranks have alike counts once
            seen.add(box)
            for extent, piece in zip(rank.tensors[kind][name].extents, rank.pieces(kind, name), strict=True):
                extents.append(Extent(extent.start, extent.stop, len(extents), box))
                pieces.append(piece)
        stored = StoredTensor(self._ranks[0].tensors[kind][name].dtype, place[0], tuple(extents))
        problem = stored.coverage_problem()
        if problem:
            raise CheckpointError(f"{self.folder}: {kind} {name}: {problem}.")
        self.tensors.setdefault(kind, {})[name] = stored
        self._pieces[kind, name] = pieces

    def state(self) -> dict[str, Any]:
        """The state, which all ranks have alike."""
        return self._ranks[0].state()

    def rank_state(self, rank: int) -> dict[str, Any] | None:
        """The original keeps no random state and no loader position."""
        return None

    def fetch(self, wanted: Sequence[Wanted]) -> None:
        """Deliver elements to their sinks."""
        for want in wanted:
            stored = self.tensors[want.kind][want.name]
            wanted_of_box = want.box, want.start, want.start + want.numel
            for extent, piece in zip(stored.extents, self._pieces[want.kind, want.name], strict=True):
                held = extent.box, extent.start, extent.stop
                for meets in meeting(held, wanted_of_box, stored.shape):
                    part = piece.narrow(0, meets.at_first - extent.start, meets.numel)
                    want.sink(meets.at_second - want.start, part)
                    self._ranks[0].let_go(part)


class _Places:
    """Where each rank's part of a parameter lies."""

    def __init__(self, folder: Path, info: Any, num_ranks: int) -> None:
        if not isinstance(info, Mapping):
            raise CheckpointError(
                f"{folder} was written by {num_ranks} ranks that shared layers, and does not say how ({_INFO} is missing).\n"
                "  Load it with the software that wrote it, export whole weights, and start from those."
            )
        self._folder, self._num_ranks = folder, num_ranks
        self._map: Mapping[str, Any] = (info.get("affine_map") or {}).get("params") or {}
        self._rows = list(info.get("parameter_with_row_parallelism_patterns") or ())
        self._whole = list(info.get("tp_replicated_parameter_patterns") or ())
        self._fused = [p for entry in info.get("parameter_with_sub_params") or () for p in _patterns(entry)]
        self._unsupported: Mapping[str, str] = info.get("autotp_unsupported_parameter_patterns") or {}

    def of(self, name: str, shapes: Sequence[tuple[int, ...]]) -> Place:
        """By the map, else by the patterns. Raises CheckpointError, naming the parameter, where neither tells."""
        reason = next((why for pattern, why in self._unsupported.items() if re.match(pattern, name)), None)
        if reason is not None:
            raise self._error(name, f"the original says that it cannot be put together: {reason}")
        entry = next((entry for pattern, entry in self._map.items() if re.match(pattern, name)), None)
        try:
            return self._mapped(entry, shapes) if entry is not None else self._by_pattern(name, shapes)
        except (KeyError, TypeError, ValueError, IndexError, StopIteration) as error:
            raise self._error(name, f"its parts do not lie in a box each: {error!r}") from error

    def _error(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self._folder}: {name} was cut over {self._num_ranks} ranks; {why}.\n"
            "  Load it with the software that wrote it, export whole weights, and start from those."
        )

    def _mapped(self, entry: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> Place:
        whole = tuple(int(size) for size in entry["logical_shape"])
        boxes = [_box(whole, tuple(shape), entry["ranks"][rank]["pieces"]) for rank, shape in enumerate(shapes)]
        return whole, boxes

    def _by_pattern(self, name: str, shapes: Sequence[tuple[int, ...]]) -> Place:
        def is_in(patterns: Sequence[str]) -> bool:
            return any(re.match(pattern, name) for pattern in patterns)

        if is_in(self._whole):
            return shapes[0], [None] * len(shapes)
        if is_in(self._fused):
            raise ValueError("several layers in one, without the map of where their rows lie")
        dim = 1 if is_in(self._rows) else 0
        ends = [0, *itertools.accumulate(shape[dim] for shape in shapes)]
        whole = tuple(ends[-1] if d == dim else size for d, size in enumerate(shapes[0]))
        return whole, [
            box_of(whole, {dim: [(a, b)]}) if a < b else _nothing(whole) for a, b in itertools.pairwise(ends)
        ]


def _patterns(entry: Any) -> list[str]:
    found = entry.get("patterns", ()) if isinstance(entry, Mapping) else getattr(entry, "patterns", ())
    return [found] if isinstance(found, str) else list(found)


def _nothing(whole: Sequence[int]) -> Box:
    return Box(tuple(() for _ in whole))


def _box(whole: tuple[int, ...], part: tuple[int, ...], pieces: Sequence[Mapping[str, Any]]) -> Box | None:
    """The box whose elements, row-major, are a part that was laid out as these rectangles.

    Raises ValueError where they are no box in order.
    """
    if math.prod(part) == 0 or not whole:
        return _nothing(whole) if whole else None
    found: list[set[tuple[int, int, int]]] = [set() for _ in whole]
    for piece in pieces:
        here, there = (_corner(piece[end], size) for end, size in (("dest", part), ("source", whole)))
        for dim, size in enumerate(piece["shape"]):
            found[dim].add((here[dim], there[dim], there[dim] + int(size)))
    if math.prod(len(of_dim) for of_dim in found) != len(pieces):
        raise ValueError(f"{len(pieces)} pieces")
    cuts: dict[int, list[Range]] = {}
    for dim, of_dim in enumerate(found):
        ranges, at = [], 0
        for here_at, start, stop in sorted(of_dim):
            if here_at != at:
                raise ValueError(f"a piece at {here_at} of dim {dim}, after {at}")
            ranges.append((start, stop))
            at += stop - start
        cuts[dim] = ranges
    box = box_of(whole, cuts)
    if (box.shape if box is not None else whole) != part:
        raise ValueError(f"pieces of {box.shape if box is not None else whole} elements, a part of {part}")
    return box


def _corner(view: Sequence[Any], shape: Sequence[int]) -> list[int]:
    """The indices of a view's first element. Raises ValueError for strides that are not the shape's own."""
    offset, strides = int(view[0]), [int(stride) for stride in view[1]]
    if strides != [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]:
        raise ValueError(f"strides {strides} of shape {list(shape)}")
    found = []
    for stride in strides:
        found.append(offset // stride)
        offset %= stride
    return found
