"""Experts in checkpoints of the original DeepSpeed: files of their own, and names that each rank counted from 0.

Used by `original`, which reads the rest. What is where, by the files of version 0.19.8:

    layer_{L}_expert_{E}_mp_rank_00_model_states.pt   one expert of a layer, names as in the whole model
    expp_rank_{R}_mp_rank_00_optim_states.pt          without ZeRO: all optimizer states of expert-parallel rank R
    (bf16_)zero_pp_rank_{R}_..._optim_states.pt       with ZeRO: rank R's partition, its experts named from 0

Which experts a rank's names mean follows from its place: ranks with other experts are neighbours ("E+D"), or those with the
same ones where the saved configuration has `use_data_before_expert_parallelism`.

Source: the files themselves, looked at as data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from deepspeed.checkpoint.original_autoep import LAYERS, fused_experts
from deepspeed.utils.errors import CheckpointError

EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt")
_STATES_FILE = re.compile(r"expp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_NAME = re.compile(r"(.*\bdeepspeed_experts\.)(\d+)(\..*)")

Shapes = dict[str, tuple[int, ...]]


class Experts:
    """The experts of one checkpoint; without any where it has no such files."""

    def __init__(self, folder: Path, model: Mapping[str, Any], read: Callable[[Path], Any]) -> None:
        self._folder, self._read = folder, read
        self.tensors: dict[str, Tensor] = {}
        """The weights of all experts, in order, by their names in the whole model."""
        found = {}
        for path in folder.glob("layer_*_expert_*"):
            match = EXPERT_FILE.fullmatch(path.name)
            if match:
                found[int(match[1]), int(match[2])] = path
        if model.get(LAYERS):
            self.tensors = fused_experts(folder, model, read)
        else:
            for key in sorted(found):
                self.tensors |= read(found[key])
        self._whole = _counts(self.tensors)
        self._world_size = int(model["dp_world_size"])
        self._is_data_first = bool((model.get("ds_config") or {}).get("use_data_before_expert_parallelism"))
        local = _counts(name for group in model.get("param_shapes") or [] for name in group)
        self._check(model, local, len(list(folder.glob("expp_rank_*"))))

    def _check(self, model: Mapping[str, Any], local: dict[str, int], num_files: int) -> None:
        self.size = 1
        """Ranks that shared the experts."""
        if not self._whole:
            return
        sizes = {self._whole[prefix] // num for prefix, num in local.items() if prefix in self._whole} or {num_files}
        self.size = sizes.pop()
        missing = [prefix for prefix, num in self._whole.items() if _gaps(self.tensors, prefix, num)]
        if sizes or missing or self.size < 1 or self._world_size % self.size:
            raise CheckpointError(
                f"{self._folder}: the files of single experts are not whole: "
                + (f"some of {missing[0]} are missing." if missing else f"{self._whole} on {self._world_size} ranks.")
                + "\n  Copy the checkpoint's folder whole."
            )

    def rank_of(self, rank: int) -> int:
        """The expert-parallel rank of a data-parallel one."""
        return rank // (self._world_size // self.size) if self._is_data_first else rank % self.size

    def name(self, local: str, rank: int) -> str:
        """The name in the whole model of what expert-parallel rank `rank` calls `local`."""
        match = _NAME.fullmatch(local)
        if match is None or match[1] not in self._whole:
            return local
        here = self._whole[match[1]] // self.size
        return f"{match[1]}{int(match[2]) + rank * here}{match[3]}"

    def of_all_ranks(self, shapes: Shapes) -> Shapes:
        """A group's parameters, of which one rank told its own."""
        names = [(self.name(name, rank), shape) for rank in range(self.size) for name, shape in shapes.items()]
        return dict(names)

    def states(self, dense: Iterable[str]) -> list[tuple[dict[str, Any], list[list[str]]]]:
        """Without ZeRO: each expert-parallel rank's optimizer state, and the names of each of its groups' parameters.

        None where the groups do not tell which parameter is which.
        """
        files = sorted((int(m[1]), p) for p in self._folder.iterdir() if (m := _STATES_FILE.fullmatch(p.name)))
        found = []
        for rank, path in files:
            state = self._read(path)["optimizer"]
            here = [name for name in self.tensors if self._is_of(name, rank)]
            found.append((state, names_of_groups(state, list(dense), here)))
        return found

    def _is_of(self, name: str, rank: int) -> bool:
        match = _NAME.fullmatch(name)
        return match is not None and int(match[2]) // (self._whole[match[1]] // self.size) == rank


def local_experts(folder: Path, layers: Sequence[tuple[int, int]], read: Callable[[Path], Any]) -> dict[str, Tensor]:
    """The weights of a rank's experts, named as the rank counts them: in layer L those from `layers[L][0]`, so many.

    Raises CheckpointError, naming the file that is missing.
    """
    found: dict[str, Tensor] = {}
    for number, (first, num) in enumerate(layers):
        for expert in range(first, first + num):
            path = folder / f"layer_{number}_expert_{expert}_mp_rank_00_model_states.pt"
            if not path.exists():
                raise CheckpointError(
                    f"{path} is missing: expert {expert} of layer {number}.\n  Copy the checkpoint's folder whole."
                )
            for name, value in read(path).items():
                match = _NAME.fullmatch(name)
                found[f"{match[1]}{expert - first}{match[3]}" if match else name] = value
    return found


def names_of_groups(state: Mapping[str, Any], dense: Sequence[str], experts: Sequence[str]) -> list[list[str]]:
    """Parameters of each group, where one group has all that are no experts', in the model's order; else nothing.

    Files without ZeRO have numbers instead of names, and two groups may have shared the parameters in any way.
    """
    groups = state.get("param_groups") or []
    if sum(not group.get("moe") for group in groups) != 1:
        return []
    rest, found = list(experts), []
    for group in groups:
        num = len(group["params"])
        names = list(dense) if not group.get("moe") else rest[:num]
        rest = rest if not group.get("moe") else rest[num:]
        if len(names) != num:
            return []
        found.append(names)
    return found if not rest else []


def _counts(names: Iterable[str]) -> dict[str, int]:
    """Experts by the name of their list."""
    found: dict[str, int] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if match:
            found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found


def _gaps(names: Iterable[str], prefix: str, num: int) -> bool:
    return len({name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)}) != num
