"""The autotuner's first run, seen from inside: what the model is, what the machine can do, what each candidate would need.

An observer, made where `autotuning.model_info.profile` is on and `model_info_path` names a file (the autotuner writes both).
At the first forward of training there are a model, a micro-batch and a configuration, which is all that `deepspeed.memory`
needs: the first rank predicts the peak of every candidate that lies beside the file (`candidates.json`), all ranks measure
the machine together and clock short copies of the model, and the run ends with exit code 0 before anything large was computed.

Invariant: a model that cannot be traced is no error; its memory is then unknown, and the file says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deepspeed.accelerator import get_accelerator
from deepspeed.activation.blocks import find_blocks
from deepspeed.config import Config
from deepspeed.config.dotted import with_values
from deepspeed.engine.message_costs import message_costs
from deepspeed.engine.observer import Observer, computing_dtype
from deepspeed.engine.step_work import input_numels
from deepspeed.engine.trial import tell_progress, write_result
from deepspeed.memory.clocked import SAMPLES, clocked
from deepspeed.memory.inside import REFUSALS, Way
from deepspeed.memory.scaling import BatchEstimator, resized
from deepspeed.memory.shape import shape_of, with_inside
from deepspeed.memory.trace import own_memory
from deepspeed.mesh import Mesh
from deepspeed.profiling.counter import Phase
from deepspeed.profiling.rates import measure_rates
from deepspeed.utils.logging import current_rank
from deepspeed.zero.param import full_numel

CANDIDATES = "candidates.json"
"""Beside the result: [{"name": ..., "overrides": {dotted key: value}, "micro": samples, "rest": ..., "num_ranks": ..., "degrees": {dim: ranks}}]."""
MAX_PREDICT_S = 300.0
"""After so long the rest of the candidates go without a prediction."""
USABLE = 0.92
"""Of the memory there is; drivers, contexts and fragmentation have the rest."""


@final
class Probe(Observer):
    """Says what it sees at the first forward, and ends the run."""

    def __init__(
        self,
        config: Config,
        user_config: dict[str, Any],
        model: nn.Module,
        mesh: Mesh,
        sizes: tuple[int, int],
        make_engine: Callable[..., Any],
    ) -> None:
        """user_config: as the script gave it. sizes: samples per rank and micro-batch, and micro-batches per step. make_engine: of
        `model` and `config` by name, a DeepSpeedEngine."""
        assert config.autotuning.model_info_path is not None, "made where a file is named"
        self._base = {key: value for key, value in user_config.items() if key != "autotuning"}
        self._config, self._model, self._mesh, self._sizes = config, model, mesh, sizes
        self._make_engine = make_engine
        self._path = config.autotuning.model_info_path.absolute()
        if current_rank() == 0:
            tell_progress(self._path, 0)

    def begins(self, phase: str, value: Any) -> None:
        """See Observer."""
        if phase != "forward" or not torch.is_grad_enabled():
            return
        offload = self._config.zero_optimization.offload_optimizer
        rates = measure_rates(computing_dtype(self._config), offload.nvme_path if offload else None)
        costs = message_costs(self._make_engine, rates) if get_accelerator().device_name() == "cpu" else {}
        limit = self._limit()
        found: dict[str, Any] = {}
        if current_rank() == 0:
            found = {**self._facts(limit), "input_numels": input_numels(value)}
            found["rates"] = {**rates.as_json(), **costs}
            found |= self._predictions(value, limit)
        found |= self._clocked(value, self._may_clock(found, limit))
        if current_rank() == 0:
            write_result(self._path, found)
        if dist.is_initialized():
            dist.barrier()
        raise SystemExit(0)

    def _may_clock(self, found: dict[str, Any], limit: int) -> bool:
        """Whether there is room for short copies of the model, their gradients and what they keep; and whether it is one rank's own. Collective."""
        small = 3 * found.get("num_params", 0) * self._config.precision_dtype.itemsize
        kept = max(SAMPLES) * (found.get("activation_mem_per_gpu") or 0)
        undivided = self._mesh.size("batch") == self._mesh.size("job") and not self._config.torch_autocast.enabled
        mine = undivided and bool(found.get("flops")) and small + kept < limit / 2
        return bool(self._mesh.gather_objects("job", mine)[0])

    def _clocked(self, inputs: Any, may: bool) -> dict[str, Any]:
        """The model's own seconds, of the slowest rank, while all ranks compute; nothing where a rank could not. Collective."""
        mine = None
        if may:
            self._mesh.gather_objects("job", None)  # all begin at once
            with contextlib.suppress(Exception):  # whatever the model raises
                batch = inputs[1] or tuple(inputs[0])
                seconds = clocked(self._model, batch, _samples(batch, self._sizes[0]), computing_dtype(self._config))
                mine = dataclasses.asdict(seconds)
        all_of_them = self._mesh.gather_objects("job", mine)
        if any(each is None for each in all_of_them):
            return {}
        return {"clocked": max(all_of_them, key=lambda each: sum(each.values()))}

    def _facts(self, limit: int) -> dict[str, Any]:
        params = list(self._model.parameters())
        optimizer = self._config.optimizer
        return {
            "num_params": sum(full_numel(param) for param in params),
            "trainable_num_params": sum(full_numel(param) for param in params if param.requires_grad),
            "rank": 0,
            "model": type(self._model).__name__,
            "num_tensors": sum(1 for param in params if param.requires_grad),
            "num_modules": sum(1 for _ in self._model.modules()),
            "has_blocks": bool(find_blocks(self._model)),
            "dtype": str(self._config.precision_dtype).removeprefix("torch."),
            "device": get_accelerator().device_name(),
            "num_ranks": dist.get_world_size() if dist.is_initialized() else 1,
            "data_parallel": self._mesh.size("batch"),
            "micro_batch": self._sizes[0],
            "accumulation": self._sizes[1],
            "filled_by_transformers": "transformers.trainer" in sys.modules,
            "optimizer": optimizer.type if optimizer is not None else None,
            "device_nbytes": limit,
        }

    def _limit(self) -> int:
        """Bytes that a rank may use: the configuration's, the device's, or this rank's part of the free main memory. Collective."""
        given = self._config.autotuning.device_memory_gb
        if given is not None:
            return int(given * 2**30)
        if get_accelerator().device_name() == "cpu":
            here = psutil.Process().memory_info().rss
            free = psutil.virtual_memory().available
            local = sum(self._mesh.gather_objects("job", here)) if dist.is_initialized() else here
            ranks = dist.get_world_size() if dist.is_initialized() else 1
            return int(USABLE * (free + local) / ranks) - here
        return int(USABLE * get_accelerator().total_memory())

    def _predictions(self, inputs: Any, limit: int) -> dict[str, Any]:
        """What the model's step is and what the candidates need; or why nobody knows."""
        args, kwargs = inputs
        batch: Any = {**kwargs} if kwargs and not args else tuple(args) if args and not kwargs else None
        if batch is None:
            return {
                "memory": {},
                "unknown": "the model is not called with one batch (arguments in order and by name, or a pipeline)",
            }
        estimator = BatchEstimator(self._model, batch, _samples(batch, self._sizes[0]))
        try:
            own = estimator.trace(self._plain(), self._sizes[0])
            single = estimator.trace(self._plain(), 1)
        except Exception as error:  # whatever the model raises
            return {"memory": {}, "unknown": _said(error)}
        shape = self._shape(batch)
        return {
            "activation_mem_per_gpu": max(own_memory(single), default=0),
            "forward_flops": single.flops.by_phase[Phase.FORWARD],
            "flops": single.flops.model,
            "num_events": len(own.events),
            "shape": shape,
            "memory": dict(self._each(estimator, limit, (shape or {}).get("refused", {}))),
        }

    def _shape(self, batch: Any) -> dict[str, Any] | None:
        """The model as a stack of blocks, where a candidate divides it; None where it is no such stack."""
        degrees = [candidate["degrees"] for candidate in self._candidates()]
        if not any(degrees):
            return None
        ways = {way for each in degrees for way in _ways(each)}
        samples = _samples(batch, self._sizes[0])
        try:
            single = resized(batch, samples, 1)
            dtype = self._config.precision_dtype
            shape = shape_of(self._model, single, dtype=dtype)
            return dataclasses.asdict(with_inside(shape, self._model, single, sorted(ways), dtype=dtype))
        except Exception:  # whatever the model raises
            return None

    def _candidates(self) -> list[dict[str, Any]]:
        path = self._path.parent / CANDIDATES
        return json.loads(path.read_text()) if path.is_file() else []

    def _plain(self) -> dict[str, Any]:
        return {"train_micro_batch_size_per_gpu": 1, **_precision(self._config)}

    def _each(
        self, estimator: BatchEstimator, limit: int, refused: Mapping[str, str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, prediction) of every candidate; larger micro-batches than one that does not fit are not played, nor ways of sharing
        layers that are refused (why, by name)."""
        began_s = time.monotonic()
        too_large: dict[str, int] = {}
        for candidate in sorted(self._candidates(), key=lambda each: each["micro"]):
            rest, micro = candidate["rest"], candidate["micro"]
            why = next((refused[way.name()] for way in _ways(candidate["degrees"]) if way.name() in refused), None)
            if why is not None:
                yield candidate["name"], _refused(why)
                continue
            if rest in too_large:
                yield candidate["name"], {"fits": False, "why": f"micro-batch {too_large[rest]} does not fit either"}
                continue
            if time.monotonic() - began_s > MAX_PREDICT_S:
                return
            try:
                config = with_values(self._base, candidate["overrides"])
                found = estimator.estimate(config, micro=micro, world_size=candidate["num_ranks"], bounds=False)
            except REFUSALS as error:
                yield candidate["name"], _refused(str(error))
                continue
            except Exception as error:  # one that cannot be predicted is no reason to know nothing of the others
                yield candidate["name"], {"fits": None, "why": _said(error)}
                continue
            needed = found.peak_nbytes + (found.allowance_nbytes if get_accelerator().device_name() != "cpu" else 0)
            if needed > limit:
                too_large[rest] = micro
            yield (
                candidate["name"],
                {
                    "fits": needed <= limit,
                    "nbytes": needed,
                    "phase": found.phase,
                    "by_kind": found.by_kind,
                    "messages": found.messages,
                    "unshards": found.unshards,
                    "flops": found.flops,
                },
            )


def _samples(batch: Any, micro: int) -> int:
    """The first dim that scales with the micro-batch: the engine's number where a tensor has it, else the first tensor's."""
    firsts = [tensor.shape[0] for tensor in tree_leaves(batch) if isinstance(tensor, Tensor) and tensor.dim()]
    return micro if micro in firsts or not firsts else int(firsts[0])


def _ways(degrees: Mapping[str, int]) -> list[Way]:
    """How a candidate's ranks share layers, and experts."""
    return [Way(**{dim: degrees.get(dim, 1)}) for dim in Way._fields]


def _refused(why: str) -> dict[str, Any]:
    """Of a candidate that the engine would not run."""
    return {"fits": None, "refused": True, "why": why}


def _said(error: Exception) -> str:
    """An error in a line."""
    return next(iter(f"{type(error).__name__}: {error}".splitlines()))


def _precision(config: Config) -> dict[str, Any]:
    return {"fp16": {"enabled": config.fp16.enabled}, "bf16": {"enabled": config.bf16.enabled}}
