"""Eight layouts of the same training step: `deepspeed plan`'s order beside the clock's, and its bubbles beside those of stages that sleep.

    python benchmarks/layouts.py [--ranks 4] [--width 256] [--layers 8] [--seq 64] [--samples 8] [--rounds 3] [--json FILE]

A small Llama, the same number of samples per step in every layout. The cluster that the planner is given is this machine, measured by all
ranks at once: products, copies, messages. Layouts take turns; the fastest step of the slowest rank counts. More ranks than cores
share them, as the measured rates do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
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
from deepspeed.memory.shape import shape_of  # noqa: E402
from deepspeed.planner.cluster import GB, Cluster, Device, Links  # noqa: E402
from deepspeed.planner.layouts import Layout, Plan, evaluate  # noqa: E402
from deepspeed.planner.search import parse_layout, simulated  # noqa: E402
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF  # noqa: E402

NUM_WARM, NUM_STEPS = 2, 3
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


def work(args: argparse.Namespace) -> None:
    """One rank."""
    from deepspeed.profiling.rates import measure_rates

    deepspeed.init_distributed("gloo")
    rates = [measure_rates(torch.float32).as_json() for _ in range(2)]
    times: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for at in layouts(dist.get_world_size(), args.samples):
            engine, step = stepper(args, at)
            for turn in range(NUM_WARM + NUM_STEPS):
                dist.barrier()
                start_s = time.perf_counter()
                step()
                slowest = torch.tensor(time.perf_counter() - start_s)
                dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
                if turn >= NUM_WARM:
                    times.setdefault(at.name, []).append(float(slowest))
            engine.destroy()
            UlyssesSPAttentionHF.unregister()
    if dist.get_rank() == 0:
        best = {key: (min if key.endswith("latency_s") else max)(each[key] for each in rates) for key in rates[0]}
        Path(args.worker).write_text(json.dumps({"rates": best, "times": times}))


def predicted(args: argparse.Namespace, rates: dict[str, float]) -> list[Plan]:
    """By the planner, on a cluster with this machine's rates."""
    tokens = torch.zeros(1, args.seq, dtype=torch.long, device="meta")
    shape = shape_of(llama(args), {"input_ids": tokens, "labels": tokens}, dtype=torch.float32)
    device = Device(memory_gb=8, tflops=rates["matmul_flops"] / 1e12, memory_gb_s=rates["copy_nbytes_s"] / GB)
    wire, latency_s = (
        min(rates["wire_nbytes_s"], rates["sum_nbytes_s"]),
        max(rates["wire_latency_s"], rates["sum_latency_s"]),
    )
    links = Links(within_gb_s=wire / GB, latency_us=1e6 * latency_s, overlap=0)
    cluster = Cluster(devices_per_node=args.ranks, device=device, links=links)
    return [simulated(evaluate(shape, cluster, at)) for at in layouts(args.ranks, args.samples)]


def report(args: argparse.Namespace, told: dict[str, Any]) -> None:
    """A table, the slowest last."""
    seconds = {name: min(times) for name, times in told["times"].items()}
    plans = predicted(args, told["rates"])
    first = min(plans, key=lambda plan: plan.step_s).layout.name
    print(
        f"\n{args.ranks} ranks, {args.samples} samples of {args.seq} tokens, width {args.width}, {args.layers} layers\n"
    )
    print("| layout | predicted, ms | bubble | measured, ms |\n|---|--:|--:|--:|")
    for plan in sorted(plans, key=lambda plan: seconds[plan.layout.name]):
        name = plan.layout.name
        print(f"| {name} | {1e3 * plan.step_s:.1f} | {100 * plan.bubble:.0f} % | {1e3 * seconds[name]:.1f} |")
    print(f"\nfastest by prediction: {first}, {100 * (seconds[first] / min(seconds.values()) - 1):.1f} % slower than the fastest by the clock")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, choices=OF_RANKS, default=4)
    for name, size in (("width", 256), ("layers", 8), ("seq", 64), ("samples", 8), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=size)
    measure_and_report(parser, __file__, work, report)


if __name__ == "__main__":
    main()
