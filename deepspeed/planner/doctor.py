"""`deepspeed doctor MODEL -c ds.json`: what of a configuration is slow or wasteful, and the one change that helps most.

Every change of a table is tried on the cost model and on predicted memory, one at a time and, where a change makes room, with a
larger micro-batch; what does not fit is left out. What is found is ranked by the gain in samples per second. Rates are a
cluster's (`--cluster`), or measured here by as many ranks as are asked for, which also clock the model's own forward and backward.
`--html` makes a page of it (`doctor_page`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.config import Config, load_config, read_config
from deepspeed.config.dotted import with_values
from deepspeed.config.refused_or_ignored import given_without_effect
from deepspeed.memory.cli import build
from deepspeed.memory.clocked import SAMPLES
from deepspeed.memory.estimator import Estimate
from deepspeed.memory.scaling import BatchEstimator
from deepspeed.memory.trace import own_memory
from deepspeed.planner.cluster import Cluster, read_cluster
from deepspeed.planner.cost import Choice, Work, step_parts
from deepspeed.planner.diagnosis import Diagnosis, Finding
from deepspeed.planner.doctor_page import page
from deepspeed.planner.machine import Asked, Measured, measure
from deepspeed.profiling.counter import Phase
from deepspeed.profiling.rates import Rates
from deepspeed.utils.arguments import amount, whole
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.figures import seconds
from deepspeed.utils.whole_files import write_page
from deepspeed.zero.policy import Tier

GIB = 2**30
MIN_GAIN = 0.1
"""Of an advice: predictions of single changes were right to about so much where they were run (docs/autotuning.md)."""
SAME = 0.02
"""Gains that differ by less do not differ."""
OFFLOADS = {"zero_optimization.offload_optimizer": None, "zero_optimization.offload_param": None}


@dataclass(frozen=True)
class Change:
    """Something that could be set otherwise."""

    what: str
    values: Mapping[str, Any]
    """Dotted keys; None takes one away."""
    apply: Callable[[Choice], Choice]
    applies: Callable[[Config, Choice], bool]


def _stage(number: int) -> Change:
    return Change(
        f"ZeRO stage {number}",
        {"zero_optimization.stage": number},
        lambda choice: replace(choice, stage=number),
        lambda config, choice: choice.stage != number and (number < 3 or choice.ranks > 1),
    )


CHANGES: tuple[Change, ...] = (
    *map(_stage, range(4)),
    Change(
        "nothing offloaded",
        OFFLOADS,
        lambda choice: replace(choice, states_on="device", params_on="device"),
        lambda config, choice: "device" not in (choice.states_on, choice.params_on) or choice.states_on != "device",
    ),
    Change(
        "no recomputation",
        {"activation_checkpointing.recompute": "none"},
        lambda choice: replace(choice, recompute="none"),
        lambda config, choice: choice.recompute != "none",
    ),
    Change(
        "recomputed blocks",
        {"activation_checkpointing.recompute": "full"},
        lambda choice: replace(choice, recompute="full"),
        lambda config, choice: choice.recompute == "none",
    ),
    Change(
        "larger buckets",
        {"zero_optimization.reduce_bucket_size": 500_000_000},
        lambda choice: replace(choice, bucket_numel=8 << 20),
        lambda config, choice: choice.bucket_numel < 1 << 20,
    ),
    Change(
        "prefetched parameters",
        {"zero_optimization.stage3_prefetch_bucket_size": 50_000_000},
        lambda choice: replace(choice, prefetch_numel=50_000_000),
        lambda config, choice: choice.stage == 3 and choice.prefetch_numel < 1_000_000,
    ),
    Change(
        "parameters kept from forward to backward",
        {"zero_optimization.stage3_max_reuse_distance": 1_000_000_000},
        lambda choice: replace(choice, reuse_numel=10**9),
        lambda config, choice: choice.stage == 3 and choice.reuse_numel < 10**8,
    ),
)
AS_IT_IS = Change("as it is", {}, lambda choice: choice, lambda config, choice: True)


def _counted(estimate: Estimate | None) -> dict[str, Any]:
    """What of a step's messages was counted, as fields of a `Choice`."""
    return {} if estimate is None else {"messages": estimate.messages, "unshards": estimate.unshards}


def diagnose(
    estimator: BatchEstimator,
    given: dict[str, Any],
    work: Work,
    *,
    micro: int,
    ranks: int,
    rates: Rates,
    room: int | None,
) -> Diagnosis:
    """Try every change of a configuration with `micro` samples, whose step is `work`. `room`: bytes of a rank's device; None: any."""
    read = load_config(given)
    base = _estimated(estimator, given, micro, ranks)
    own = replace(choice_of(read, micro, ranks), **_counted(base))
    parts = step_parts(rates, work, own)
    speed = ranks * own.micro * own.accumulation / parts.total
    findings: dict[str, Finding] = {}
    alone: dict[int, float] = {}  # what micro-batches of so many samples gain without any other change
    for change in (AS_IT_IS, *CHANGES):
        if not change.applies(read, own):
            continue
        for size in (micro, 2 * micro, 4 * micro, 8 * micro):
            values = dict(change.values) | ({"train_micro_batch_size_per_gpu": size} if size != micro else {})
            if not values:
                continue
            found = _estimated(estimator, with_values(given, values), size, ranks)
            if found is None or (room is not None and _needed(found) > room):
                break
            choice = replace(change.apply(own), micro=size, **_counted(found if base else None))
            gain = ranks * size * own.accumulation / step_parts(rates, work, choice).total / speed - 1
            what = ", ".join([change.what] * (change is not AS_IT_IS) + [f"micro-batch {size}"] * (size != micro))
            if change is AS_IT_IS:
                alone[size] = gain
            elif gain < alone.get(size, 0.0) + SAME:
                continue  # the micro-batch's gain, not the change's
            if change.what not in findings or gain > findings[change.what].gain + SAME:
                findings[change.what] = Finding(what, values, gain, _needed(found))
    needed = _needed(base) if base else 0
    ranked = sorted((f for f in findings.values() if f.gain > MIN_GAIN), key=lambda f: -f.gain)
    notes = [f"{path} has no effect here" for path in given_without_effect(read)]
    fits = room is None or needed <= room
    return Diagnosis(parts, speed, needed, fits, room, ranked, notes, is_clocked=work.clocked is not None)


def _estimated(estimator: BatchEstimator, config: dict[str, Any], micro: int, ranks: int) -> Estimate | None:
    try:
        return estimator.estimate(config, micro=micro, world_size=ranks, bounds=False)
    except DeepSpeedError:
        return None


def _needed(found: Estimate) -> int:
    return found.on(Tier.DEVICE) + found.allowance_nbytes


def _work(estimator: BatchEstimator, config: dict[str, Any], device_type: str) -> Work:
    plain = with_values(config, {"activation_checkpointing": None})
    trace = estimator.trace(plain, 1)
    itemsize = load_config(plain).precision_dtype.itemsize
    return Work(
        num_params=sum(param.numel() for param in trace.params),
        flops=trace.flops.model,
        forward_flops=trace.flops.by_phase[Phase.FORWARD],
        activation_nbytes=max(own_memory(trace), default=0),
        num_modules=len(trace.modules),
        num_tensors=sum(param.requires_grad for param in trace.params),
        param_itemsize=itemsize,
        state_itemsize=8 if itemsize == 4 else 12,
        is_host=device_type == "cpu",
    )


def choice_of(config: Config, micro: int, ranks: int) -> Choice:
    """A configuration as the cost model knows it."""
    zero = config.zero_optimization

    def tier(section: Any) -> Any:
        return "device" if section is None or section.device == "none" else section.device

    return Choice(
        stage=zero.stage,
        micro=micro,
        accumulation=config.gradient_accumulation_steps or 1,
        ranks=ranks,
        recompute=config.activation_checkpointing.recompute,
        states_on=tier(zero.offload_optimizer),
        params_on=tier(zero.offload_param) if zero.stage == 3 else "device",
        bucket_numel=min(zero.reduce_bucket_size, 8 << 20),
        reuse_numel=zero.stage3_max_reuse_distance,
        prefetch_numel=zero.stage3_prefetch_bucket_size,
        quantized_weights=zero.zero_quantized_weights,
        quantized_gradients=zero.zero_quantized_gradients,
    )


def as_text(found: Diagnosis) -> str:
    """The step, and what to change, the best first."""
    shares = ", ".join(
        f"{name} {100 * share:.0f}%" for name, share in found.parts.shares().items() if abs(share) > 0.005
    )
    room = f" of {found.room_nbytes / GIB:.2f} GiB" if found.room_nbytes else ""
    lines = [
        f"A step is predicted to take {seconds(found.parts.total)} ({found.samples_s:.3g} samples/s): {shares}.",
        "The model's forward and backward were clocked here."
        if found.is_clocked
        else "They are operations over rates; the model was not clocked.",
        f"A rank needs {found.nbytes / GIB:.2f} GiB{room}.",
        *found.notes,
    ]
    if not found.fits:
        lines.append("That does not fit. `deepspeed estimate` has the smallest change that does.")
    if not found.findings:
        return "\n".join(
            [
                *lines,
                "No single change that fits is predicted to gain more than a tenth; less is not foreseen with certainty.",
            ]
        )
    best = found.findings[0]
    lines += ["", f"The one change that helps most: {best.what}, +{100 * best.gain:.0f}%, {best.nbytes / GIB:.2f} GiB:"]
    lines += [f"  {key}: {json.dumps(value)}" for key, value in best.values.items()]
    others = [f"  {f.what}: +{100 * f.gain:.0f}%, {f.nbytes / GIB:.2f} GiB" for f in found.findings[1:5]]
    return "\n".join([*lines, *(["Others, each by itself:", *others] if others else [])])


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(prog="deepspeed doctor", description=(__doc__ or "").splitlines()[0])
    made.add_argument("model", help="a Hugging Face config.json or its folder; or file.py:function, module:function")
    made.add_argument("-c", "--config", required=True, help="the DeepSpeed configuration (JSON)")
    made.add_argument("-n", "--ranks", type=whole, default=1, help="data-parallel ranks (%(default)s)")
    made.add_argument("-s", "--seq", type=whole, default=1024, help="tokens per sample (%(default)s)")
    made.add_argument("--cluster", metavar="FILE", help="its rates and memory; default: this machine's, measured")
    made.add_argument(
        "--device", help="what ranks compute on: cuda, cpu, ... (cuda with --cluster, else this machine's)"
    )
    made.add_argument("--html", type=Path, help="write a page with the step drawn, and every change")
    made.add_argument("-m", "--device-memory", type=amount, metavar="GIB", help="memory of a device")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        found = run(args)
        if args.html:  # before anything is printed: whoever reads may stop
            write_page(args.html, page(found, args.model, args.config, args.ranks))
            print(f"page: {args.html}", file=sys.stderr)
        print(as_text(found))
    except DeepSpeedError as error:
        print(f"deepspeed doctor: {error}", file=sys.stderr)
        return 2
    return 0


def _disk(config: Config) -> Path | None:
    """Where states or parameters are offloaded to a disk."""
    sections = config.zero_optimization.offload_optimizer, config.zero_optimization.offload_param
    paths = [s.nvme_path for s in sections if s is not None and s.device == "nvme" and s.nvme_path]
    return Path(paths[0]) if paths else None


def run(args: argparse.Namespace) -> Diagnosis:
    """The diagnosis that the arguments ask for."""
    config = read_config(args.config)
    micro = config.get("train_micro_batch_size_per_gpu")
    micro = micro if isinstance(micro, int) else 1
    model, batch = build(args.model, micro, args.seq)
    cluster: Cluster | None = read_cluster(args.cluster) if args.cluster else None
    room = args.device_memory * GIB if args.device_memory else cluster.device.memory_gb * 1e9 if cluster else None
    if args.ranks < 1:
        raise DeepSpeedError(f"--ranks {args.ranks} is too few.\n  Give at least 1.")
    given = with_values(config, {"train_batch_size": None, "train_micro_batch_size_per_gpu": micro})
    read = load_config(given)
    here = get_accelerator().device_name()
    device = args.device or ("cuda" if cluster else here)
    estimator = BatchEstimator(model, batch, micro, device_type=device)
    work = _work(estimator, given, device)
    if cluster:
        measured = Measured(cluster.rates())
    else:
        computes = device.partition(":")[0] == here and not read.torch_autocast.enabled
        asked = Asked(args.model, micro, args.seq) if computes and _has_room(work, args.ranks) else None
        measured = measure(read.precision_dtype, args.ranks, _disk(read), asked)
    if measured.why:
        print(f"deepspeed doctor: the model could not be clocked ({measured.why}).", file=sys.stderr)
    work = replace(work, clocked=measured.clocked)
    room = int(room) if room else None
    return diagnose(estimator, given, work, micro=micro, ranks=args.ranks, rates=measured.rates, room=room)


def _has_room(work: Work, ranks: int) -> bool:
    """Whether every rank can clock copies here: their parameters, gradients, and what is kept of a few samples, at most the whole model's."""
    needed = 3 * work.num_params * work.param_itemsize + max(SAMPLES) * work.activation_nbytes
    accelerator = get_accelerator()
    return needed * (ranks if accelerator.device_name() == "cpu" else 1) < accelerator.available_memory() / 2
