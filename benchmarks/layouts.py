"""Eight layouts of the same training step: `deepspeed plan`'s order beside the clock's, and its bubbles beside those of stages that sleep.

    python benchmarks/layouts.py [--ranks 4] [--width 256] [--layers 8] [--seq 64] [--samples 8] [--rounds 20] [--json FILE]
    python benchmarks/layouts.py --unit_ms 40 [--ranks 8]      stages that sleep, at two numbers of micro-batches

A small Llama, the same number of samples per step in every layout. The cluster that the planner is given is this machine, measured by all
ranks at once: products, copies, messages, also amid computing. Layouts take turns, step by step; the lower quartile of the slowest rank's steps counts, as of what
is measured of the machine, and layouts that differ by less than their doubt are tied. More ranks than cores share them, as the measured rates do. So bubbles hardly show there: with `--unit_ms` the layers of a pipeline sleep instead of computing, one
unit forward and two backward, in the same engine, and the share of the step in which stages neither sleep nor are late to wake is the bubble.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from in_ranks import measure_and_report  # noqa: E402

import deepspeed  # noqa: E402
from deepspeed.comm import board  # noqa: E402
from deepspeed.engine.message_costs import shared_costs  # noqa: E402
from deepspeed.memory.inside import Way  # noqa: E402
from deepspeed.memory.shape import shape_of, with_inside  # noqa: E402
from deepspeed.planner.cluster import GB, Cluster, Device, Links  # noqa: E402
from deepspeed.planner.cost import CALLS_PER_MODULE, ENGINE_CALLS_PER_MODULE  # noqa: E402
from deepspeed.planner.layouts import Layout, Plan, evaluate  # noqa: E402
from deepspeed.planner.search import parse_layout, simulated  # noqa: E402
from deepspeed.profiling.rates import processors, undisturbed  # noqa: E402
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF  # noqa: E402

NUM_WARM = 3
OF_RANKS = {
    2: "dp2 zero0, dp2 zero1, dp2 zero3, dp2 zero1 recompute, tp2, sp2 zero1, pp2, pp2 recompute",
    4: "dp4 zero1, dp4 zero3, dp4 zero1 recompute, tp4, dp2 tp2 zero1, pp4, pp2 dp2 zero1, sp4 zero1",
    8: "dp8 zero1, dp8 zero3, dp4 tp2 zero1, dp2 tp4 zero1, pp8, pp4 dp2 zero1, pp2 dp4 zero1, dp4 sp2 zero1",
}


def layouts(ranks: int, samples: int) -> list[Layout]:
    """Of so many ranks; a pipeline's micro-batches are of one sample, all others take their samples at once."""
    found = []
    for text in OF_RANKS[ranks].split(", "):
        at = parse_layout(text)
        mine = samples // at.dp
        found.append(dataclasses.replace(at, micro=1 if at.pp > 1 else mine, accumulation=mine if at.pp > 1 else 1))
    return found


def llama(args: argparse.Namespace) -> torch.nn.Module:
    """The same weights on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": args.width, "intermediate_size": 3 * args.width, "num_hidden_layers": args.layers}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=512, **sizes, num_attention_heads=8, max_position_embeddings=args.seq, use_cache=False)
    )


def config_of(at: Layout) -> dict[str, Any]:
    """As JSON has it."""
    return {
        "train_micro_batch_size_per_gpu": at.micro,
        "gradient_accumulation_steps": at.accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": at.stage},
        **({"tensor_parallel": {"autotp_size": at.tp}} if at.tp > 1 else {}),
        **({"sequence_parallel_size": at.sp} if at.sp > 1 else {}),
        **({"activation_checkpointing": {"recompute": "full"}} if at.recompute and at.pp == 1 else {}),
    }


def stepper(args: argparse.Namespace, at: Layout) -> tuple[Any, Callable[[], object]]:
    """(engine, what is one step)."""
    tokens = torch.randint(64, (at.micro, args.seq), generator=torch.Generator().manual_seed(1))
    if at.pp > 1:
        from deepspeed.parallel.pipeline.hf import pipeline_of
        from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

        topology = PipeDataParallelTopology(num_pp=at.pp, num_dp=at.dp)
        interval = 1 if at.recompute else 0
        net = pipeline_of(llama(args), num_stages=None, topology=topology, activation_checkpoint_interval=interval)
        engine = deepspeed.initialize(model=net, config=config_of(at))[0]
        return engine, lambda: engine.train_batch(iter([((tokens,), tokens)] * at.accumulation))
    model, mpu, batch = llama(args), None, {"input_ids": tokens, "labels": tokens}
    if at.sp > 1:
        mpu = UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=model, core_attn_implementation="sdpa", sequence_parallel_size=at.sp,
            micro_batch_size=at.micro, seq_length=args.seq, seq_length_is_variable=True,
        )  # fmt: skip
        part = dist.get_rank() % at.sp
        batch |= {"position_ids": torch.arange(args.seq).expand(at.micro, -1), "shift_labels": tokens}
        batch = {key: tensor.tensor_split(at.sp, dim=1)[part].contiguous() for key, tensor in batch.items()}
    engine = deepspeed.initialize(model=model, config=config_of(at), mpu=mpu)[0]

    def step() -> None:
        engine.backward(engine(**batch).loss)
        engine.step()

    return engine, step


class _Asleep(torch.autograd.Function):
    """Sleeps forward, and twice as long backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, unit_s: float) -> torch.Tensor:
        ctx.unit_s = unit_s
        time.sleep(unit_s)
        return x * 1

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        time.sleep(2 * ctx.unit_s)
        return grads[0], torch.zeros(1), None


class Sleeper(torch.nn.Module):
    """A layer of a pipeline whose stages need no processor."""

    def __init__(self, unit_s: float) -> None:
        super().__init__()
        self.unit_s, self.weight = unit_s, torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Asleep.apply(x, self.weight, self.unit_s)


def sleeping_layouts(ranks: int) -> list[Layout]:
    """Every number of stages that divides the ranks, with as many micro-batches as stages and four times as many."""
    stages = [pp for pp in (2, 4, 8) if ranks % pp == 0]
    return [Layout(pp=pp, dp=ranks // pp, accumulation=n * pp) for pp in stages for n in (1, 4)]


def sleep(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of the lists of actions of each layout, the earliest start to the latest end. Collective."""
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    times: dict[str, list[float]] = {}
    for at in sleeping_layouts(dist.get_world_size()) * args.rounds:
        layers = [Sleeper(args.unit_ms / 1e3) for _ in range(at.pp)]
        topology = PipeDataParallelTopology(num_pp=at.pp, num_dp=at.dp)
        net = PipelineModule(layers, topology=topology, loss_fn=lambda out, _: out.sum(), partition_method="uniform")
        engine = deepspeed.initialize(model=net, config=config_of(at))[0]
        for _ in range(2):
            engine.train_batch(iter([(torch.zeros(1, 1, requires_grad=True), torch.zeros(1))] * at.accumulation))
            done = engine.actions_done
            ends = torch.tensor([-done[0].start_s, done[-1].end_s], dtype=torch.float64)
            dist.all_reduce(ends, op=dist.ReduceOp.MAX)
            times.setdefault(at.name, []).append(float(ends.sum()))
        engine.destroy()
    return times


def report_sleep(args: argparse.Namespace, times: dict[str, list[float]]) -> None:
    """The planner's simulated bubble of each layout beside the one that was seen."""
    unit_s = args.unit_ms / 1e3
    print(f"\n{args.ranks} ranks, stages that sleep {args.unit_ms} ms forward and twice as long backward\n")
    print("| layout | bubble, planned | seen | step, planned, ms | seen, ms |\n|---|--:|--:|--:|--:|")
    for at in sleeping_layouts(args.ranks):
        costs = {"forward_s": unit_s, "backward_s": 2 * unit_s, "compute_s": 3 * unit_s * at.accumulation, "hop_s": 0.0}
        made = Plan(layout=at, memory={}, host_nbytes=0, traffic={}, bubble_s=0.0, exposed_s=0.0, update_s=0.0, **costs)
        plan, seen_s = simulated(made), min(times[at.name])
        bubble = 1 - plan.compute_s / seen_s
        print(f"| {at.name} | {plan.bubble:.1%} | {bubble:.1%} | {1e3 * plan.step_s:.0f} | {1e3 * seen_s:.0f} |")


def work(args: argparse.Namespace) -> None:
    """One rank."""
    from deepspeed.profiling.rates import Rates, measure_rates

    deepspeed.init_distributed("gloo")
    if args.unit_ms:
        slept = sleep(args)
        if dist.get_rank() == 0:
            Path(args.worker).write_text(json.dumps({"times": slept}))
        return
    rates = [measure_rates(torch.float32).as_json() for _ in range(2)]
    amid = shared_costs(Rates(**rates[0]))
    times: dict[str, list[float]] = {}
    board.MAX_BOARDS = 64  # of all these engines at once
    listed = layouts(dist.get_world_size(), args.samples)
    for together in ([at for at in listed if at.sp > 1], [at for at in listed if at.sp == 1]):
        made = [(at, *stepper(args, at)) for at in together]
        for turn in range(NUM_WARM + args.rounds):
            for at, _, step in made:
                dist.barrier()
                start_s = time.perf_counter()
                step()
                slowest = torch.tensor(time.perf_counter() - start_s)
                dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
                if turn >= NUM_WARM:
                    times.setdefault(at.name, []).append(float(slowest))
        for _, engine, _ in made:
            engine.destroy()
        UlyssesSPAttentionHF.unregister()  # whose attention is every model's of its kind
    if dist.get_rank() == 0:
        best = {key: (min if key.endswith("latency_s") else max)(each[key] for each in rates) for key in rates[0]}
        Path(args.worker).write_text(json.dumps({"rates": best | amid, "times": times}))


def predicted(args: argparse.Namespace, rates: dict[str, float]) -> list[Plan]:
    """By the planner, on a cluster with this machine's rates."""
    tokens = torch.zeros(1, args.seq, dtype=torch.long, device="meta")
    model, batch = llama(args), {"input_ids": tokens, "labels": tokens}
    ways = sorted({Way(at.tp) for at in layouts(args.ranks, args.samples)})
    shape = with_inside(shape_of(model, batch, dtype=torch.float32), model, batch, ways, dtype=torch.float32)
    device = Device(
        memory_gb=8,
        tflops=rates["matmul_flops"] / 1e12,
        memory_gb_s=rates["copy_nbytes_s"] / GB,
        call_us=1e6 * (CALLS_PER_MODULE + ENGINE_CALLS_PER_MODULE) * rates["launch_s"],
    )
    wire, latency_s = (
        min(rates["wire_nbytes_s"], rates["sum_nbytes_s"]),
        max(rates["wire_latency_s"], rates["sum_latency_s"]),
    )
    doublings = max(1, (args.ranks - 1).bit_length())
    links = Links(
        within_gb_s=wire / GB,
        latency_us=1e6 * latency_s / doublings,
        inside_us=1e6 * rates["shared_message_s"] / doublings,
        wait=min(1.0, rates["shared_wait"]),
        overlap=0,
    )
    cluster = Cluster(devices_per_node=args.ranks, device=device, links=links, processors=processors())
    return [simulated(evaluate(shape, cluster, at)) for at in layouts(args.ranks, args.samples)]


def _longer(times: list[float], fastest: list[float]) -> tuple[float, float]:
    """(percent, its doubt: two standard errors) by which steps took longer than others. Those of one turn are compared, where they took turns."""
    ratios = sorted(100 * (a / b - 1) for a, b in zip(times, fastest, strict=False))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, 2 * 1.25 * (high - low) / 1.35 / len(ratios) ** 0.5


def report(args: argparse.Namespace, told: dict[str, Any]) -> None:
    """A table, the slowest last."""
    if args.unit_ms:
        report_sleep(args, told["times"])
        return
    seconds = {name: undisturbed(times) for name, times in told["times"].items()}
    plans = predicted(args, told["rates"])
    first = min(plans, key=lambda plan: plan.step_s).layout.name
    print(
        f"\n{args.ranks} ranks, {args.samples} samples of {args.seq} tokens, width {args.width}, {args.layers} layers\n"
    )
    print("| layout | predicted, ms | bubble | measured, ms | longer than the fastest |\n|---|--:|--:|--:|--:|")
    order = sorted(seconds, key=lambda name: seconds[name])
    longer = {name: _longer(told["times"][name], told["times"][order[0]]) for name in order}
    for plan in sorted(plans, key=lambda plan: seconds[plan.layout.name]):
        name = plan.layout.name
        more, doubt = longer[name]
        print(
            f"| {name} | {1e3 * plan.step_s:.1f} | {100 * plan.bubble:.0f} % | {1e3 * seconds[name]:.1f} | "
            f"{more:+.1f} +- {doubt:.1f} % |"
        )
    more, doubt = longer[first]
    print(f"\nfastest by prediction: {first}, {more:.1f} +- {doubt:.1f} % slower than the fastest by the clock")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, choices=OF_RANKS, default=4)
    for name, size in (("width", 256), ("layers", 8), ("seq", 64), ("samples", 8), ("rounds", 20)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--unit_ms", type=int, default=0, help="layers that sleep so long, in place of a Llama")
    measure_and_report(parser, __file__, work, report)


if __name__ == "__main__":
    main()
