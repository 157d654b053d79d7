"""`deepspeed plan MODEL --cluster FILE`: which layout of a cluster is the fastest for a model, before there is one.

MODEL is what `deepspeed estimate` takes: a Hugging Face config.json (or its folder), or `file.py:function`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deepspeed.memory.cli import build
from deepspeed.memory.inside import Way
from deepspeed.memory.shape import ModelShape, shape_of, with_inside
from deepspeed.mesh.shape import DEGREES
from deepspeed.planner.cluster import Cluster, read_cluster
from deepspeed.planner.layouts import Plan, check_divides, evaluate, ways_of
from deepspeed.planner.page import page
from deepspeed.planner.search import Answer, parse_layout, plan_cluster, simulated
from deepspeed.utils.arguments import amount, whole
from deepspeed.utils.dtypes import parse_dtype
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.figures import count, many, nbytes, seconds
from deepspeed.utils.whole_files import write_page


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(
        prog="deepspeed plan",
        description="Rank the layouts of a model over a cluster: pipeline, data, sequence, tensor and expert parallel ranks, "
        "ZeRO stage, micro-batch, recomputation; with memory, bytes, bubble, time and cost.",
    )
    made.add_argument("model", help="a Hugging Face config.json or its folder; or file.py:function, module:function")
    made.add_argument("--cluster", required=True, metavar="FILE", help="nodes, devices, links, disks, prices (JSON)")
    made.add_argument("-b", "--batch", type=whole, help="samples per step, all ranks; default: one per device")
    made.add_argument("-s", "--seq", type=whole, default=2048, help="tokens per sample (%(default)s)")
    made.add_argument("--dtype", default="bf16", help="that is trained in (%(default)s)")
    made.add_argument("--top", type=whole, default=10, help="layouts to show (%(default)s)")
    made.add_argument("--layout", help='evaluate this one alone: "pp2 dp4 tp2 zero1 4x8 recompute"')
    made.add_argument("--tokens", type=amount, help="of the whole training, to tell its days and cost")
    made.add_argument("--html", type=Path, help="write a page with the layout and the step drawn")
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        with _collecting_nothing():
            shape, cluster, answer = run(args)
        if args.html:  # before anything is printed: whoever reads may stop
            write_page(args.html, page(shape, cluster, answer, args.seq))
            print(f"page: {args.html}", file=sys.stderr)
        print(
            json.dumps(as_json(shape, cluster, answer), indent=2)
            if args.json
            else as_text(shape, cluster, answer, args)
        )
    except DeepSpeedError as error:
        print(f"deepspeed plan: {error}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def _collecting_nothing() -> Iterator[None]:
    """Looking for cycles among all that torch and Transformers have made takes a tenth of this command's time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def run(args: argparse.Namespace) -> tuple[ModelShape, Cluster, Answer]:
    """What the arguments ask for."""
    cluster = read_cluster(args.cluster)
    try:
        dtype = parse_dtype(args.dtype)
        if not dtype.is_floating_point:
            raise ValueError("models train in floating-point numbers.")
    except ValueError as error:
        raise DeepSpeedError(f"--dtype {args.dtype}: {error}\n  Use bf16, fp16 or fp32.") from None
    layout = None if args.layout is None else parse_layout(args.layout)
    if layout is not None and layout.num_ranks != cluster.num_devices:
        raise DeepSpeedError(
            f"--layout {args.layout}: pp x dp x sp x tp = {layout.num_ranks}, and the cluster has {cluster.num_devices} devices.\n"
            "  Change one of the dims."
        )
    model, batch = build(args.model, 1, args.seq)
    shape = shape_of(model, batch, dtype=dtype)
    if layout is not None:
        own = {Way(layout.tp), Way(1, layout.ep)}
        shape = with_inside(shape, model, batch, own, dtype=dtype)
        if layout.ep > 1 and not shape.num_experts:
            raise DeepSpeedError(f"--layout {args.layout}: {shape.name} has no experts to spread.\n  Leave ep out.")
        check_divides(shape, layout)
        plan = simulated(evaluate(shape, cluster, layout))
        return shape, cluster, Answer([plan], 1, int(plan.fits(cluster)))
    shape = with_inside(shape, model, batch, ways_of(shape, cluster), dtype=dtype)
    return shape, cluster, plan_cluster(shape, cluster, args.batch or cluster.num_devices, most=args.top)


def as_text(shape: ModelShape, cluster: Cluster, answer: Answer, args: argparse.Namespace) -> str:
    """A table, the fastest first, and the configuration of the first."""
    best = answer.plans[0]
    batch = best.layout.dp * best.layout.micro * best.layout.accumulation
    lines = [
        f"{shape.name}: {count(shape.num_params)} parameters, {many(shape.num_blocks, 'block')}, {args.seq} tokens; "
        f"{cluster.nodes} x {cluster.devices_per_node} devices of {cluster.device.memory_gb:g} GB, {many(batch, 'sample')} per step",
        f"{many(answer.num_layouts, 'layout')} compared; within the memory of a device: {answer.num_fitting}",
        "",
        f"  {'layout':44} {'memory':>9} {'host':>8} {'sent':>9} {'bubble':>7} {'step':>9} {'tokens/s':>11} {'MFU':>6} {'per 1e9 tokens':>15}",
    ]
    lines += [_line(shape, cluster, plan, args.seq) for plan in answer.plans]
    if args.tokens:
        steps = args.tokens / (batch * args.seq)
        lines += ["", _whole(cluster, best, steps, args.tokens)]
    for name, why in shape.refused.items():
        lines += ["", f"Not compared, {name}: {why}"]
    return "\n".join([*lines, "", "The first, as a configuration:", json.dumps(as_config(best), indent=2)])


def _line(shape: ModelShape, cluster: Cluster, plan: Plan, seq: int) -> str:
    layout = plan.layout
    batch = layout.dp * layout.micro * layout.accumulation
    tokens_s = batch * seq / plan.step_s
    mfu = shape.flops * batch / plan.step_s / (layout.num_ranks * cluster.device.tflops * 1e12)
    cost = plan.cost(cluster) / (batch * seq) * 1e9
    host = nbytes(plan.host_nbytes) if plan.host_nbytes else "-"
    money = f"{cost:,.4g}" if cost else "-"
    bubble = f"{100 * plan.bubble:.1f}%" if layout.pp > 1 else "-"
    return (
        f"  {layout.name:44} {nbytes(plan.device_nbytes):>9} {host:>8} {nbytes(sum(plan.traffic.values()), 2):>9} "
        f"{bubble:>7} {seconds(plan.step_s):>9} {tokens_s:>11,.0f} {100 * mfu:>5.1f}% {money:>15}"
    )


def _whole(cluster: Cluster, best: Plan, steps: float, tokens: float) -> str:
    days = steps * best.step_s / 86400
    money = f", cost {steps * best.cost(cluster):,.0f}" if cluster.price_per_device_hour else ""
    return f"{tokens:.3g} tokens with the first: {steps:,.0f} steps, {days:,.1f} days{money}"


def as_config(plan: Plan) -> dict[str, Any]:
    """What of a layout a configuration says. Pipeline stages are the script's (PipelineModule, `pipeline.stages`)."""
    layout = plan.layout
    zero: dict[str, Any] = {"stage": layout.stage}
    if layout.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_batch_size": layout.dp * layout.micro * layout.accumulation,
        "train_micro_batch_size_per_gpu": layout.micro,
        "gradient_accumulation_steps": layout.accumulation,
        "zero_optimization": zero,
    }
    if layout.recompute:
        config["activation_checkpointing"] = {"recompute": "full"}
    if layout.tp > 1:
        config["tensor_parallel"] = {"autotp_size": layout.tp}
    if layout.sp > 1:
        config["sequence_parallel_size"] = layout.sp
    if layout.ep > 1:
        config["expert_parallel"] = {"enabled": True, "autoep_size": layout.ep}
    if layout.pp > 1:
        config["pipeline"] = {"stages": layout.pp}
    return config


def as_json(shape: ModelShape, cluster: Cluster, answer: Answer) -> dict[str, Any]:
    """All figures: bytes, seconds, money."""
    return {
        "model": shape.name,
        "num_params": shape.num_params,
        "num_devices": cluster.num_devices,
        "num_layouts": answer.num_layouts,
        "num_fitting": answer.num_fitting,
        "plans": [
            {
                "layout": plan.layout.name,
                **{dim: getattr(plan.layout, dim) for dim in (*DEGREES, "stage")},
                "micro": plan.layout.micro,
                "accumulation": plan.layout.accumulation,
                "recompute": plan.layout.recompute,
                "device_nbytes": plan.device_nbytes,
                "memory": plan.memory,
                "host_nbytes": plan.host_nbytes,
                "traffic": plan.traffic,
                "bubble": plan.bubble,
                "step_s": plan.step_s,
                "compute_s": plan.compute_s,
                "exposed_s": plan.exposed_s,
                "update_s": plan.update_s,
                "cost_per_step": plan.cost(cluster),
                "config": as_config(plan),
            }
            for plan in answer.plans
        ],
    }
