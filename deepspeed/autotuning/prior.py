"""What the first run found out, as the cost model's `Work` and `Rates`; and its seconds for every candidate. Pure.

Forward and backward are as the first run clocked them. Where it could not, they are predicted from operations; and where the model could not
be traced either, those are taken for six per parameter and token of one: the constant is wrong, and the first trials correct it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepspeed.autotuning.space import (
    BUCKET,
    DIVIDING,
    OFFLOAD,
    PREFETCH,
    RECOMPUTE,
    REUSE,
    SEQUENCE,
    Candidate,
)
from deepspeed.memory.clocked import Clocked
from deepspeed.memory.messages import Messages, Unshards
from deepspeed.memory.shape import ModelShape
from deepspeed.planner.cost import Choice, Work
from deepspeed.planner.divided import divided_parts
from deepspeed.planner.layouts import Layout
from deepspeed.profiling.rates import Rates


def work_of(info: Mapping[str, Any]) -> Work:
    """The model's step, from `model_info.json`."""
    params = int(info["num_params"])
    flops = float(info.get("flops") or 6 * params)
    itemsize = 4 if info.get("dtype") == "float32" else 2
    return Work(
        num_params=params,
        flops=flops,
        forward_flops=float(info.get("forward_flops") or flops / 3),
        activation_nbytes=float(info.get("activation_mem_per_gpu") or 0),
        num_modules=int(info.get("num_modules", 0)),
        num_tensors=int(info.get("num_tensors", 0)),
        param_itemsize=itemsize,
        state_itemsize=8 if itemsize == 4 else 12,
        is_host=info.get("device") == "cpu",
        clocked=Clocked(**info["clocked"]) if info.get("clocked") else None,
    )


def choice_of(candidate: Candidate, played: Mapping[str, Any] | None = None) -> Choice:
    """A candidate as the cost model knows it. `played`: what the first run predicted of it, with (calls, bytes) of a step's messages by
    operation where they were counted."""
    messages: Mapping[str, Sequence[int]] | None = (played or {}).get("messages")
    values = candidate.values

    def number(key: str, default: int) -> int:
        value = values.get(key, default)
        return int(value) if isinstance(value, (int, float)) else default

    return Choice(
        stage=candidate.stage,
        micro=candidate.micro,
        accumulation=candidate.accumulation,
        ranks=candidate.data_parallel * candidate.degrees.get(DIVIDING[SEQUENCE], 1),
        messages=None if messages is None else {op: Messages(*sent) for op, sent in messages.items()},
        unshards=Unshards(*(played or {}).get("unshards", ())),
        recompute=str(values.get(RECOMPUTE, "none")),
        states_on=str(values.get(OFFLOAD, "device")).replace("none", "device"),  # type: ignore[arg-type]
        bucket_numel=min(number(BUCKET, 8 << 20), 8 << 20),
        reuse_numel=number(REUSE, 10**9),
        prefetch_numel=number(PREFETCH, 50_000_000),
        quantized_weights=bool(values.get("zero_optimization.zero_quantized_weights")),
        quantized_gradients=bool(values.get("zero_optimization.zero_quantized_gradients")),
    )


def layout_of(candidate: Candidate) -> Layout:
    """A candidate's division of the ranks, the model and the batch."""
    return Layout(
        **candidate.degrees,  # type: ignore[arg-type]
        dp=candidate.data_parallel,
        stage=candidate.stage,
        micro=candidate.micro,
        accumulation=candidate.accumulation,
        recompute=candidate.values.get(RECOMPUTE) == "full",
    )


def prior_parts(
    info: Mapping[str, Any], candidates: Sequence[Candidate], schedule: str = "1f1b"
) -> dict[str, dict[str, float]]:
    """Seconds of each part of the step of each candidate, by name. `schedule`: of pipelines."""
    rates, work = Rates(**info["rates"]), work_of(info)
    shape = ModelShape.from_json(info["shape"]) if info.get("shape") else None
    found = {}
    for candidate in candidates:
        layout = layout_of(candidate)
        # What the estimator played has all blocks: it is a rank's own where no pipeline divides them.
        played = info.get("memory", {}).get(candidate.name, {}) if layout.pp == 1 else {}
        flops = played["flops"] / candidate.micro if layout.tp > 1 and played.get("flops") else None
        choice = choice_of(candidate, played)
        found[candidate.name] = divided_parts(rates, work, choice, shape, layout, schedule, flops=flops).costs()
    return found
