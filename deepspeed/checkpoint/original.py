"""Checkpoints that the original DeepSpeed (0.19) wrote with ZeRO stages 1, 2 and 3, opened for reading.

Made by `find.open_checkpoint`; answers `source.Source`, so that loading, consolidation and inspection work on them as on
ours. Nothing in the files is run: they are read with `torch.load(weights_only=True)`, where the few classes that the
original pickles stand for inert records of the same fields (`STAND_INS`, listed in the log). Any other name is refused.

    stages 1, 2   a group's fp32 weights end to end, cut into equal partitions; `param_slice_mappings` says which interval
                  of a rank's partition belongs to which parameter
    stage 3       each parameter cut into ceil(numel / world_size) elements per rank; a rank's pieces end to end in the
                  order of `param_shapes`; frozen parameters likewise, in `frozen_param_fragments`

Tensors are mapped from the files, not read, until they are fetched. Source: the files themselves, looked at as data.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspeed.checkpoint.boxes import meeting
from deepspeed.checkpoint.container import dtype_key
from deepspeed.checkpoint.files import open_plain
from deepspeed.checkpoint.manifest import Extent, ParameterInfo, StoredTensor, coverage_problem
from deepspeed.checkpoint.mapped import Mapped
from deepspeed.checkpoint.original_autoep import LAYERS, plain_names
from deepspeed.checkpoint.original_experts import EXPERT_FILE, Experts, names_of_groups
from deepspeed.checkpoint.original_stages import Stages, is_pipeline, read_stages
from deepspeed.checkpoint.source import Wanted
from deepspeed.checkpoint.subject import BUFFER
from deepspeed.utils.errors import CheckpointError
from deepspeed.utils.logging import warn_once
from deepspeed.zero.checkpoint_flats import OPTIM, PARAM


class Inert:
    """Stands for one of the original's objects: its arguments and fields as plain data, no behaviour."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


THE_ORIGINALS = "the original's optimizer"
"""Stands for the class, which the files do not name."""
STAND_INS = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
)
_SETTINGS_LEFT_OUT = {
    "params",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
    "maximize",
    "step",
    "decoupled_weight_decay",
}
"""Settings of a group that belong to the implementation that wrote them."""
_INTERNAL = set(
    "module buffer_names optimizer param_shapes frozen_param_shapes shared_params frozen_param_fragments lr_scheduler "
    "data_sampler random_ltd sparse_tensor_module_names skipped_steps global_steps global_samples dp_world_size "
    "mp_world_size ds_autoep_layers checkpoint_parallel_dimensions ds_config ds_version universal_checkpoint_info".split()
)
_OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")


_ZIP = b"PK\x03\x04"


def read_torch_file(path: Path) -> Any:
    """The content of a torch file, as data. Raises CheckpointError for classes that are not in STAND_INS, and damage."""
    with open_plain(path) as fd:
        start = os.pread(fd, len(_ZIP), 0)
    if not start:
        raise CheckpointError(f"{path} is empty.\n  Copy or download it again.")
    try:
        if start != _ZIP:  # as torch wrote before 1.6: cannot be mapped, and is read whole
            return torch.load(path, map_location="cpu", weights_only=True)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        unknown = sorted(set(names) - set(STAND_INS))
        if unknown:
            raise CheckpointError(
                f"{path} holds pickled objects of {', '.join(unknown[:5])}: refused, because reading those would run code.\n"
                "  Load it with the software that wrote it and save it without them, or export its weights as safetensors."
            )
        if names:
            warn_once(f"classes of the original's checkpoints that are read as plain records: {', '.join(STAND_INS)}.")
        allowed = [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in names]
        with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{path} cannot be read: it is damaged, or not what torch.save writes ({type(error).__name__}: {first[:300]})."
        ) from error


class Original:
    """See `source.Source`."""

    def __init__(self, folder: Path, model_rank: int = 0) -> None:
        self.folder = folder
        self._model_rank = model_rank
        """Whose files are read: of ranks that shared layers, one has parts (`original_tensor` puts them together)."""
        self.about: dict[str, Any] = {}
        self.parameters: dict[str, ParameterInfo] = {}
        self.tied: dict[str, str] = {}
        self.tensors: dict[str, dict[str, StoredTensor]] = {}
        self._pieces: dict[tuple[str, str], list[Tensor]] = {}
        self._values: list[dict[str, Any]] = []
        self._groups: list[dict[str, Any]] = []
        self._scaler: Any = None
        try:
            self._open()
            self._mapped = Mapped(folder.resolve())
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{folder} looks like a checkpoint of the original DeepSpeed but is not laid out as version 0.19 does: {error!r}."
            ) from error

    def _open(self) -> None:
        if is_pipeline(self.folder):
            self._open_stages(read_stages(self.folder, read_torch_file))
            return
        models = _by_rank(self.folder, MODEL_FILE, self._model_rank)
        optims = _by_rank(self.folder, _OPTIM, self._model_rank)
        self._model: dict[str, Any] = read_torch_file(models[0])
        model = self._model
        if not isinstance(model.get("module"), Mapping):
            raise CheckpointError(
                f"{models[0]} holds no weights: it is one of the files that stand beside a checkpoint for other libraries' helpers.\n"
                "  Copy the checkpoint's folder whole, with its manifest.json."
            )
        if any(not EXPERT_FILE.fullmatch(path.name) for path in self.folder.glob("layer_*")):
            raise CheckpointError(
                f"{self.folder} was written with experts inside of tensor parallelism, which cannot be imported.\n"
                "  Load it with the software that wrote it, export whole weights, and start from those."
            )
        states = [read_torch_file(path) for path in optims]
        stage = _stage(states[0]["optimizer_state_dict"]) if states else 0
        self.about = _about(model, stage)
        world_size = self.about["world_size"]
        if states and len(states) != world_size:
            raise CheckpointError(
                f"{self.folder} was written by {world_size} ranks; it has optimizer files of {len(states)}."
            )
        self.tied = dict(model.get("shared_params") or {})
        self._experts = Experts(self.folder, model, read_torch_file)
        if model.get(LAYERS):
            self._open_autoep()
            return
        told = [{name: tuple(shape) for name, shape in group.items()} for group in model.get("param_shapes") or []]
        shapes = [self._experts.of_all_ranks(group) for group in told]
        self._trained = {name for group in shapes for name in group} if told else None
        optimizers = [state["optimizer_state_dict"] for state in states]
        if stage in (1, 2):
            self._read_partitions(optimizers, shapes)
        elif stage == 3:
            self._read_sharded(optimizers, shapes, world_size)
            self._read_frozen(models, world_size)
        self._read_module(stage)
        if not states:
            self._read_whole_states()
        if states:
            self._scaler = optimizers[0].get("loss_scaler")
        self._finish(shapes)

    def _open_autoep(self) -> None:
        """A model whose experts AutoEP had spread: its weights, as the plain model's."""
        self._model = {**self._model, "module": plain_names(self._model), "param_shapes": None}
        self.tied = {name: source for name, source in self.tied.items() if {name, source} <= set(self._model["module"])}
        self._trained = None
        warn_once(
            f"{self.folder} was written by the original's AutoEP: weights are loaded, in the precision of its model; the optimizer begins anew."
        )
        self._read_module(0)
        self._finish([])

    def _open_stages(self, found: Stages) -> None:
        """A pipeline's, whose optimizers have names at ZeRO stage 1 alone; at stage 0 its weights are read."""
        self._model = found.model
        self._experts = Experts(self.folder, self._model, read_torch_file)
        told = self._model.get("param_shapes")
        self._trained = {name for group in told for name in group} if told else None
        with_optimizers = [stage for stage in found.stages if stage.optimizers]
        self.about = _about(self._model, 1 if with_optimizers else 0)
        for stage in with_optimizers:
            self._read_partitions(stage.optimizers, stage.shapes)
            self._scaler = stage.optimizers[0].get("loss_scaler")
        self._read_module(1)
        self._finish([shape for stage in found.stages for shape in stage.shapes])

    def model_info(self, key: str) -> Any:
        """An entry of the model file."""
        return self._model.get(key)

    def pieces(self, kind: str, name: str) -> list[Tensor]:
        """The tensors, each 1-D, that lie at the extents of one in `tensors`."""
        return self._pieces[kind, name]

    def let_go(self, part: Tensor) -> None:
        """Give back the memory of what was read of a file."""
        self._mapped.let_go(part)

    def _add(self, kind: str, name: str, values: Tensor) -> None:
        self._pieces.setdefault((kind, name), []).append(values)

    def _read_partitions(self, ranks: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Any]]) -> None:
        for group, members in enumerate(shapes):
            self._note_group(ranks[0]["base_optimizer_state"], group, list(members))
            for index, rank in enumerate(ranks):
                flat = rank["single_partition_of_fp32_groups"][group]
                state = rank["base_optimizer_state"]["state"].get(group, {})
                for name, place in rank["param_slice_mappings"][group].items():
                    # The last parameter's interval may reach into the padding, which the weights lack.
                    numel = min(place.numel, flat.numel() - place.start)
                    name = self._experts.name(name, self._experts.rank_of(index))
                    self._add_state(name, flat, state, place.start, numel)

    def _add_state(self, name: str, flat: Tensor, state: Mapping[str, Any], start: int, numel: int) -> None:
        self._add(PARAM, name, flat.narrow(0, start, numel))
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                self._add(OPTIM + key, name, value.view(-1).narrow(0, start, numel))

    def _read_sharded(
        self, ranks: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Any]], world_size: int
    ) -> None:
        for sub_group, members in enumerate(shapes):
            self._note_group(ranks[0]["optimizer_state_dict"], sub_group, list(members))
            for index, rank in enumerate(ranks):
                flat, position = rank["fp32_flat_groups"][sub_group], 0
                state = rank["optimizer_state_dict"]["state"].get(sub_group, {})
                for name, shape in members.items():
                    numel = math.prod(shape)
                    part = -(-numel // world_size)
                    self._add_state(name, flat, state, position, max(0, min(part, numel - index * part)))
                    position += part

    def _note_group(self, base: Mapping[str, Any], index: int, names: list[str]) -> None:
        """Settings and values besides tensors of the flat group `index`, for its parameters."""
        group = next(group for group in base["param_groups"] if index in group["params"])
        settings = {k: v for k, v in group.items() if k not in _SETTINGS_LEFT_OUT}
        self._groups.append({"params": names, "settings": settings})
        state = dict(base["state"].get(index, {}))
        step = state.get("step", group.get("step"))
        if state and step is not None:
            state["step"] = torch.tensor(float(step))
        kinds = [OPTIM + key for key, value in state.items() if isinstance(value, Tensor) and value.dim() > 0]
        values = {key: value for key, value in state.items() if OPTIM + key not in kinds}
        if state:
            self._values.append({"params": names, "kinds": kinds, "values": values})

    def _read_frozen(self, models: Sequence[Path], world_size: int) -> None:
        frozen = {name: math.prod(shape) for name, shape in (self._model.get("frozen_param_shapes") or {}).items()}
        for index, path in enumerate(models if frozen else []):
            fragments = read_torch_file(path)["frozen_param_fragments"]
            for name, numel in frozen.items():
                part = -(-numel // world_size)
                own = max(0, min(part, numel - index * part))
                self._add(PARAM, name, fragments[name].view(-1).narrow(0, 0, own))

    def _read_module(self, stage: int) -> None:
        module = {**(self._model.get("module") or {}), **self._experts.tensors}
        buffers = set(self._model.get("buffer_names") or ())
        for name, value in module.items():
            if not isinstance(value, Tensor):
                continue
            is_buffer = name in buffers
            kind = BUFFER if is_buffer else PARAM
            if not is_buffer:
                is_trained = self._trained is None or name in self._trained
                self.parameters[name] = ParameterInfo(dtype_key(value.dtype, name), tuple(value.shape), not is_trained)
            if name in self.tied or (kind, name) in self._pieces or (stage == 3 and not is_buffer):
                continue
            self._add(kind, name, value.reshape(-1))

    def _read_whole_states(self) -> None:
        """Optimizer states of a run without ZeRO, whose files have numbers instead of names."""
        dense = [name for name in self.parameters if name not in self._experts.tensors]
        ranks = self._experts.states(dense)
        if not ranks and isinstance(self._model.get("optimizer"), dict):
            ranks = self._beside_masters(self._model["optimizer"], dense)
        if any(not groups and state.get("state") for state, groups in ranks):
            warn_once(
                f"{self.folder} has optimizer states of several groups without names: weights are loaded, the optimizer begins anew."
            )
            return
        seen: set[str] = set()
        for state, groups in ranks:
            for group, names in zip(state["param_groups"], groups, strict=True):
                self._read_whole_group(state["state"], group, [n for n in names if n not in seen], names)
                seen |= set(names)

    def _beside_masters(
        self, optimizer: dict[str, Any], dense: list[str]
    ) -> list[tuple[dict[str, Any], list[list[str]]]]:
        """The optimizer's state and names; in low precision it lies within another's, beside weights in fp32, which then count."""
        state: dict[str, Any] = optimizer.get("optimizer_state_dict", optimizer)
        if state is optimizer:
            return [(state, names_of_groups(state, dense, []))]
        masters = optimizer.get("fp32_groups")
        groups = names_of_groups(state, dense, []) if masters else []
        if not masters or [len(group) for group in masters] != [len(names) for names in groups]:
            warn_once(f"{self.folder} has one flat optimizer state: weights are loaded, the optimizer begins anew.")
            return []
        for tensors, names in zip(masters, groups, strict=True):
            for tensor, name in zip(tensors, names, strict=True):
                self._pieces[PARAM, name] = [tensor.detach().reshape(-1)]
        return [(state, groups)]

    def _read_whole_group(
        self, states: Mapping[int, Any], group: Mapping[str, Any], new: list[str], names: list[str]
    ) -> None:
        settings = {key: value for key, value in group.items() if key not in _SETTINGS_LEFT_OUT}
        same = next((known for known in self._groups if known["settings"] == settings), None)
        if same is None:
            self._groups.append({"params": list(new), "settings": settings})
        else:
            same["params"] += new
        for index, name in zip(group["params"], names, strict=True):
            state = states.get(index) if name in new else None
            if not state:
                continue
            kinds = [key for key, value in state.items() if isinstance(value, Tensor) and value.dim() > 0]
            for key in kinds:
                self._add(OPTIM + key, name, state[key].reshape(-1))
            rest = {key: value for key, value in state.items() if key not in kinds}
            self._values.append({"params": [name], "kinds": [OPTIM + key for key in kinds], "values": rest})

    def _finish(self, shapes: Iterable[Mapping[str, Any]]) -> None:
        known = {name: shape for group in shapes for name, shape in group.items()}
        known |= {name: tuple(shape) for name, shape in (self._model.get("frozen_param_shapes") or {}).items()}
        for name in self.tied:
            self.parameters.pop(name, None)
        for name, info in self.parameters.items():  # at stage 3 the module holds placeholders without elements
            self.parameters[name] = ParameterInfo(info.dtype, known.get(name, info.shape), info.is_frozen)
        for (kind, name), pieces in self._pieces.items():
            shape = known.get(name, ()) if kind != BUFFER else tuple(self._model["module"][name].shape)
            if kind != BUFFER and name not in known:
                shape = self.parameters[name].shape
            extents, start = [], 0
            for index, piece in enumerate(pieces):
                extents.append(Extent(start, start + piece.numel(), index))
                start += piece.numel()
            problem = coverage_problem(extents, math.prod(shape))
            if problem:
                raise CheckpointError(f"{self.folder}: {kind} {name}: {problem}.")
            dtype = dtype_key(pieces[0].dtype, name)
            self.tensors.setdefault(kind, {})[name] = StoredTensor(dtype, shape, tuple(extents))

    def state(self) -> dict[str, Any]:
        """The state, in the words of ours."""
        model = self._model
        state: dict[str, Any] = {"client_state": {k: v for k, v in model.items() if k not in _INTERNAL}}
        if model.get("lr_scheduler") is not None:
            state["lr_scheduler"] = dict(model["lr_scheduler"])
        if self._groups:
            state["optimizer"] = {"class": THE_ORIGINALS, "groups": self._groups, "values": self._values}
            scaler = vars(self._scaler) if isinstance(self._scaler, Inert) else {}
            state["loss_scale"] = {
                "is_dynamic": bool(scaler.get("dynamic", "cur_iter" in scaler)),
                "scale": float(scaler.get("cur_scale", 1.0)),
                "tolerance_left": int(scaler.get("cur_hysteresis", 1)),
                "num_steps": int(scaler.get("cur_iter", 0)),
                "last_overflow": int(scaler.get("last_overflow_iter", -1)),
            }
        return state

    def rank_state(self, rank: int) -> dict[str, Any] | None:
        """The original keeps no random state and no loader position."""
        return None

    def fetch(self, wanted: Sequence[Wanted]) -> None:
        """Deliver elements to their sinks."""
        for want in wanted:
            start, shape = 0, self.tensors[want.kind][want.name].shape
            wanted_of_box = want.box, want.start, want.start + want.numel
            for piece in self._pieces[want.kind, want.name]:
                for meets in meeting((None, start, start + piece.numel()), wanted_of_box, shape):
                    part = piece.narrow(0, meets.at_first - start, meets.numel)
                    want.sink(meets.at_second - want.start, part)
                    self.let_go(part)
                start += piece.numel()


def _about(model: Mapping[str, Any], stage: int) -> dict[str, Any]:
    return {
        "deepspeed_version": model.get("ds_version"),
        "zero_stage": stage,
        "world_size": int(model["dp_world_size"]),
        "global_steps": int(model.get("global_steps") or 0),
        "global_samples": int(model.get("global_samples") or 0),
        "skipped_steps": int(model.get("skipped_steps") or 0),
        "original": True,
    }


def _by_rank(folder: Path, pattern: re.Pattern[str], model_rank: int) -> list[Path]:
    paths = {path: match for path in folder.iterdir() if (match := pattern.fullmatch(path.name))}
    found = {int(match[1] or 0): path for path, match in paths.items() if int(match[2]) == model_rank}
    if paths and not found:
        raise CheckpointError(f"{folder}: the file of model-parallel rank {model_rank} is missing.")
    missing = sorted(set(range(max(found, default=-1) + 1)) - found.keys())
    if missing:
        raise CheckpointError(
            f"{folder}: the file of rank {missing[0]} is missing (others: {next(iter(found.values())).name})."
        )
    if not found and pattern is MODEL_FILE:
        raise CheckpointError(f"{folder} has no model state file of the first rank.")
    return [found[rank] for rank in sorted(found)]


def _stage(optimizer: Mapping[str, Any]) -> int:
    stage = optimizer["zero_stage"]
    return int(stage.args[0] if isinstance(stage, Inert) else stage)
