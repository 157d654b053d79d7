"""The autotuner's choice beside the best of an exhaustive grid, its predictions beside measured steps; layouts by prediction and by clock.

    python benchmarks/autotuning.py [--ranks 2] [--model llama|gpt2|bert] [--width 128] [--layers 4] [--rounds 8] [--json FILE]

A grid of real configurations of a small model (ZeRO stage x micro-batch x recomputation, some with offload, some with cut layers) runs
in one set of ranks: a few points at a time, step by step in turns, in rounds; the fastest step of the slowest rank counts. Then the
model-based tuner is let loose on the measured grid, as it would be on a machine: it sees the first run's facts and what its own trials gave, with what rounds differ by as their noise.
Regret is what its choice is slower than the best of the grid; "unseen" are the points that it did not try.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from in_ranks import measure_and_report  # noqa: E402

import deepspeed  # noqa: E402
from deepspeed.autotuning.lessons import Outcome  # noqa: E402
from deepspeed.autotuning.prior import prior_parts  # noqa: E402
from deepspeed.autotuning.space import Candidate, Question, candidates  # noqa: E402
from deepspeed.autotuning.tuners import ModelBasedTuner  # noqa: E402
from deepspeed.config import load_config  # noqa: E402

OPTIMIZER = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}
NUM_WARM, NUM_TURNS = 2, 2
AT_ONCE = 4
"""Points whose engines are there together: a process has shared memory for a few."""
RECOMPUTE = {"activation_checkpointing": {"recompute": ["none", "full"]}}
SPACES: tuple[dict[str, Any], ...] = (
    {"train_micro_batch_size_per_gpu": [1, 2, 4, 8], **RECOMPUTE},
    {
        "train_micro_batch_size_per_gpu": [2, 4],
        "zero_optimization": {"stage": [1, 2, 3], "offload_optimizer": {"device": ["cpu"]}},
    },
    {
        "train_micro_batch_size_per_gpu": [2, 4, 8],
        "zero_optimization": {
            "stage": [3],
            "stage3_max_reuse_distance": [0, 10**9],
            "stage3_prefetch_bucket_size": [0, 50_000_000],
            "stage3_param_persistence_threshold": 0,
        },
    },
    {
        "train_micro_batch_size_per_gpu": [2, 8],
        "zero_optimization": {"stage": [1, 2], "reduce_bucket_size": [100_000, 500_000_000]},
    },
    {
        "train_micro_batch_size_per_gpu": [2, 4, 8],
        "zero_optimization": {"stage": [0, 1]},
        "tensor_parallel": {"autotp_size": [2]},
    },
)


def grid(ranks: int, model: str) -> list[tuple[Candidate, dict[str, Any]]]:
    """Every point, with its configuration. GPT-2's layers are not cut: more buckets stand in for that space."""
    section = load_config({}).autotuning
    found = []
    for space in SPACES[: len(SPACES) if ranks > 1 else 2]:
        if model == "gpt2" and "tensor_parallel" in space:
            space = {
                "train_micro_batch_size_per_gpu": [4],
                "zero_optimization": {"stage": [1, 2, 3], "reduce_bucket_size": [20_000, 1_000_000]},
            }
        asked = {**OPTIMIZER, **space}
        found += [(c, c.apply(asked)) for c in candidates(Question(asked, section, ranks, is_host=True))]
    return found


def make_model(args: argparse.Namespace) -> torch.nn.Module:
    """The same weights on every rank."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, GPT2Config, LlamaConfig

    torch.manual_seed(0)
    if args.model == "gpt2":
        sizes = {"n_embd": args.width, "n_layer": args.layers, "n_head": 4, "n_positions": args.seq}
        return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=512, **sizes, bos_token_id=0, eos_token_id=0))
    sizes = {
        "vocab_size": 512,
        "hidden_size": args.width,
        "intermediate_size": (3 if args.model == "llama" else 4) * args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": 4,
        "max_position_embeddings": args.seq,
    }
    if args.model == "bert":
        return AutoModelForMaskedLM.from_config(BertConfig(**sizes))
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, use_cache=False))


def facts(args: argparse.Namespace, points: list[tuple[Candidate, dict[str, Any]]]) -> dict[str, Any]:
    """What the autotuner's first run says of the model and of the machine. Collective."""
    from deepspeed.engine.probe import CANDIDATES
    from deepspeed.profiling.rates import measure_rates

    folder = Path(tempfile.mkdtemp())
    asked = [
        {"name": c.name, "micro": c.micro, "rest": c.rest, "num_ranks": c.num_ranks, "degrees": c.degrees,
         "overrides": c.overrides()} for c, _ in points
    ]  # fmt: skip
    (folder / CANDIDATES).write_text(json.dumps(asked))
    tuning = {"enabled": True, "model_info": {"profile": True}, "model_info_path": str(folder / "info.json")}
    config = {"train_micro_batch_size_per_gpu": 2, **OPTIMIZER, "autotuning": tuning}
    engine = deepspeed.initialize(model=make_model(args), config=config)[0]
    tokens = torch.zeros(2, args.seq, dtype=torch.long)
    with contextlib.suppress(SystemExit):
        engine(input_ids=tokens, labels=tokens)
    engine.destroy()
    rates = measure_rates(torch.float32).as_json()  # once more: whichever is faster was less disturbed
    if dist.get_rank() != 0:
        return {}
    info = json.loads((folder / "info.json").read_text())

    for name, again in rates.items():
        if name.endswith("latency_s") or name == "launch_s":
            info["rates"][name] = min(info["rates"][name], again)
        elif not name.endswith("message_s"):
            info["rates"][name] = max(info["rates"][name], again)
    return info


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class _Point:
    """A configuration's engine. Points take turns step by step, so that what disturbs a machine meets several."""

    def __init__(self, args: argparse.Namespace, candidate: Candidate, config: dict[str, Any]) -> None:
        self.name = candidate.name
        self.engine = deepspeed.initialize(model=make_model(args), config=config)[0]
        generator = torch.Generator().manual_seed(1)
        self._tokens = torch.randint(64, (candidate.micro, args.seq), generator=generator)
        self._clock = CLOCKS[args.clock]

    def step_s(self) -> float:
        """Of this step, of the slowest rank. Collective."""
        dist.barrier()
        start_s = self._clock()
        self.engine.backward(self.engine(input_ids=self._tokens, labels=self._tokens).loss)
        self.engine.step()
        slowest = torch.tensor(self._clock() - start_s)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return float(slowest)


def measured(args: argparse.Namespace, points: list[tuple[Candidate, dict[str, Any]]]) -> dict[str, list[float]]:
    """Seconds of the steps of a few points, by name. Collective."""
    engines = [_Point(args, candidate, config) for candidate, config in points]
    found: dict[str, list[float]] = {point.name: [] for point in engines}
    for turn in range(NUM_WARM + NUM_TURNS):
        for point in engines:
            point.step_s()  # caches are the point's before it counts
            seconds = point.step_s()
            if turn >= NUM_WARM:
                found[point.name].append(seconds)
    for point in engines:
        point.engine.destroy()
    return found


def work(args: argparse.Namespace) -> None:
    """One rank of the grid."""
    deepspeed.init_distributed("gloo")
    points = grid(dist.get_world_size(), args.model)
    info = facts(args, points)
    times: dict[str, list[list[float]]] = {candidate.name: [] for candidate, _ in points}
    num_sets = -(-len(points) // AT_ONCE)
    for turn in range(args.rounds):
        shifted = points[turn:] + points[:turn]
        for i in range(num_sets):
            for name, steps in measured(args, shifted[i::num_sets]).items():
                times[name].append(steps)
    if dist.get_rank() == 0:
        Path(args.worker).write_text(json.dumps({"info": info, "times": times}))


def _halves(rounds: list[list[float]]) -> list[float]:
    """The fastest step of every other round, and of the rest."""
    return [min(min(steps) for steps in part) for part in (rounds[::2], rounds[1::2] or rounds)]


def report(args: argparse.Namespace, told: dict[str, Any]) -> None:
    """Regret, trials, errors of predictions."""
    points = [candidate for candidate, _ in grid(args.ranks, args.model)]
    info = told["info"]
    seconds = {name: min(min(steps) for steps in rounds) for name, rounds in told["times"].items()}
    halves = {name: _halves(rounds) for name, rounds in told["times"].items()}
    spreads = [max(pair) / min(pair) - 1 for pair in halves.values()]
    fits = [c for c in points if info["memory"].get(c.name, {}).get("fits")]
    print(f"\n{args.model}, {args.ranks} rank(s), {args.clock} time: {len(points)} points, {len(fits)} predicted to fit; the fastest steps of every other round and of the rest differ by "
          f"{100 * sorted(spreads)[len(spreads) // 2]:.0f} % (median), {100 * max(spreads):.0f} % (most)")  # fmt: skip
    for metric in ("throughput", "latency"):
        tuner = ModelBasedTuner(fits, prior_parts(info, fits), metric, most_micros=10**9)
        while (chosen := tuner.next()) is not None:
            s, pair = seconds[chosen.name], halves[chosen.name]
            tuner.tell(chosen, Outcome("measured", metrics={"latency": s, "throughput": chosen.train_batch / s, "step_s": pair}))  # fmt: skip

        def value(c: Candidate, metric: str = metric) -> float:
            return c.train_batch / seconds[c.name] if metric == "throughput" else 1 / seconds[c.name]

        best, own = max(points, key=value), max((c for c in fits if c.name in tuner.outcomes), key=value)
        unseen = [c for c in fits if c.name not in tuner.outcomes]
        errors = sorted(abs(tuner.predictions[c.name].step_s / seconds[c.name] - 1) for c in unseen)
        print(f"| {metric} | {len(tuner.outcomes)} of {len(points)} tried | chosen {own.name} | best {best.name} | regret "
              f"{100 * (1 - value(own) / value(best)):.1f} % | unseen: median error {100 * errors[len(errors) // 2]:.0f} %, "
              f"{sum(e <= 0.1 for e in errors)} of {len(errors)} within 10 %, worst {100 * errors[-1]:.0f} % |")  # fmt: skip
    prior = {name: sum(parts.values()) for name, parts in prior_parts(info, points).items()}
    changes(points, prior, seconds)
    print("\n| point | predicted before any trial, ms | measured, ms |\n|---|--:|--:|")
    for candidate in sorted(points, key=lambda c: seconds[c.name] / c.train_batch):
        print(f"| {candidate.name} | {1e3 * prior[candidate.name]:.1f} | {1e3 * seconds[candidate.name]:.1f} |")


def changes(points: list[Candidate], prior: dict[str, float], seconds: dict[str, float]) -> None:
    """What `deepspeed doctor` would say of each single change, from the same cost model, beside what the change gave."""

    def parts(c: Candidate) -> dict[str, Any]:
        return {"stage": c.stage, "micro-batch": c.micro, **{key.rpartition(".")[2] if "zero_" in key else key.rpartition(".")[0]: v for key, v in c.values.items()}}  # fmt: skip

    def gain(times: dict[str, float], a: Candidate, b: Candidate) -> float:
        return b.train_batch / times[b.name] / (a.train_batch / times[a.name]) - 1

    found: dict[str, list[tuple[float, float]]] = {}
    for a in points:
        for b in points:
            old, new = parts(a), parts(b)
            differ = [key for key in old.keys() & new.keys() if old[key] != new[key]]
            if old.keys() == new.keys() and len(differ) == 1 and a is not b:
                what = f"{differ[0]} {old[differ[0]]} to {new[differ[0]]}"
                found.setdefault(what, []).append((gain(prior, a, b), gain(seconds, a, b)))
    print(
        "\n| one change | pairs | predicted gain, median | measured gain, median | same sign where predicted above 5 % |"
    )
    print("|---|--:|--:|--:|--:|")
    for what, pairs in sorted(found.items()):
        middle = [100 * sorted(column)[len(column) // 2] for column in zip(*pairs, strict=True)]
        clear = [real > 0 for said, real in pairs if said > 0.05]
        if middle[0] > 0:
            print(f"| {what} | {len(pairs)} | {middle[0]:+.0f} % | {middle[1]:+.0f} % | {sum(clear)} of {len(clear)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", choices=("llama", "gpt2", "bert"), default="llama")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: processor time, where others use the machine"
    )
    measure_and_report(parser, __file__, work, report)


if __name__ == "__main__":
    main()
