"""The autotuner's choice beside the best of an exhaustive grid, its predictions beside measured steps.

    python benchmarks/autotuning.py [--ranks 2] [--model llama|gpt2|bert] [--width 128] [--layers 4] [--visits 2] [--json FILE]
    python benchmarks/autotuning.py --model gpt2 --json FILE --seconds 200      # as much as fits in so long; the same again goes on
    python benchmarks/autotuning.py --model gpt2 --json FILE --points 0:32      # these alone

A grid of real configurations of a small model (ZeRO stage x micro-batch x recomputation, some with offload, some with cut layers) runs
in one set of ranks. A host's clock moves by a third within minutes, so a point is measured beside a reference, the first point of the grid: their steps
take turns, and the point's seconds are the median of its steps over the mean of the reference's before and after, times the reference's
seconds of all visits. Each point is visited some times, in other orders; by what two visits differ no prediction can be judged. Then the
model-based tuner is let loose on the measured grid, as it would be on a machine: it sees the first run's facts and what its own trials gave.
Regret is what its choice is slower than the best of the grid; "unseen" are the points that it did not try.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from in_ranks import measure_and_report  # noqa: E402

import deepspeed  # noqa: E402
from deepspeed.autotuning.lessons import Outcome  # noqa: E402
from deepspeed.autotuning.prior import prior_parts  # noqa: E402
from deepspeed.autotuning.space import Candidate, Question, candidates  # noqa: E402
from deepspeed.autotuning.tuners import ModelBasedTuner  # noqa: E402
from deepspeed.comm import board  # noqa: E402
from deepspeed.config import load_config  # noqa: E402
from deepspeed.config.dotted import leaves  # noqa: E402

OPTIMIZER = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}
NUM_WARM = 3
"""Rounds of a piece before it counts."""
UNDISTURBED = 0.25
"""Quantile of steps that is a point's own, as of what the first run clocks (`profiling.rates.undisturbed`)."""
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
    asked = [  # all of a point's configuration: what its space fixes is not in the engine's own
        {"name": c.name, "micro": c.micro, "rest": c.rest, "num_ranks": c.num_ranks, "degrees": c.degrees,
         "overrides": dict(leaves(config))} for c, config in points
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
        else:
            info["rates"][name] = max(info["rates"][name], again)
    return info


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class _Point:
    """A configuration's engine."""

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


def work(args: argparse.Namespace) -> None:
    """One rank of a piece: rounds until there are enough, or the time is over."""
    began_s = time.perf_counter()
    deepspeed.init_distributed("gloo")
    points = grid(dist.get_world_size(), args.model)
    path = Path(args.worker)
    told = json.loads(path.read_text()) if path.is_file() else {}
    dist.barrier()  # nobody writes before all have read
    piece: dict[str, list[float]] = {candidate.name: [] for candidate, _ in points}
    told.setdefault("pieces", []).append(piece)
    if "info" not in told:
        told["info"] = facts(args, points)
        if dist.get_rank() == 0:
            path.write_text(json.dumps(told))
    board.MAX_BOARDS = 16 * len(points)  # each engine talks as if it were alone
    made = [_Point(args, candidate, config) for candidate, config in points]
    for number in range(NUM_WARM + args.rounds - num_rounds(told)):
        passed_s = torch.tensor(time.perf_counter() - began_s)
        dist.all_reduce(passed_s, op=dist.ReduceOp.MAX)  # all end with the same round
        if args.seconds and passed_s > args.seconds:
            break
        random.Random(number).shuffle(made)
        for point in made:
            point.step_s()  # its memory is in the caches then, as in training
            step_s = point.step_s()
            if number >= NUM_WARM:
                piece[point.name].append(step_s)
        if dist.get_rank() == 0 and number >= NUM_WARM:
            path.write_text(json.dumps(told))
    for point in made:
        point.engine.destroy()


def num_rounds(told: dict[str, Any]) -> int:
    """That were made."""
    return sum(min(map(len, piece.values())) for piece in told.get("pieces", ()))


def is_done(args: argparse.Namespace, told: dict[str, Any]) -> bool:
    """Whether all was measured that is asked for."""
    return "info" in told and num_rounds(told) >= args.rounds


class Truth(NamedTuple):
    """What rounds say of a point."""

    step_s: float
    doubt: float
    """Of its logarithm: two standard errors."""
    parts_s: list[float]
    """The same of every fourth round, four times."""


def truths(pieces: Sequence[Mapping[str, list[float]]]) -> dict[str, Truth]:
    """Lower quartiles of steps, without what all points of a round have in common (a polish of logarithms, after Tukey)."""
    names = list(pieces[0])
    logs = np.concatenate(
        [np.log([p[n][: min(map(len, p.values()))] for n in names]) for p in pieces if p[names[-1]]], axis=1
    )
    rows = np.quantile(logs, UNDISTURBED, axis=1)
    for _ in range(3):
        rounds = np.median(logs - rows[:, None], axis=0)
        own = logs - (rounds - np.median(rounds))
        rows = np.quantile(own, UNDISTURBED, axis=1)
    low, high = np.quantile(own, (0.25, 0.75), axis=1)
    doubts = 2 * 1.36 * (high - low) / 1.35 / math.sqrt(own.shape[1])
    parts = np.exp([np.quantile(own[:, i::4], UNDISTURBED, axis=1) for i in range(4)])
    return {
        name: Truth(float(np.exp(rows[i])), float(doubts[i]), [float(s) for s in parts[:, i]])
        for i, name in enumerate(names)
    }


def report(args: argparse.Namespace, told: dict[str, Any]) -> None:
    """Regret, trials, errors of predictions, and how sure the clock's own word is."""
    points = [candidate for candidate, _ in grid(args.ranks, args.model)]
    if not is_done(args, told):
        print(f"{num_rounds(told)} of {args.rounds} rounds were made; run the same again.")
        return
    info = told["info"]
    found = truths(told["pieces"])
    seconds = {name: truth.step_s for name, truth in found.items()}
    doubts = sorted(truth.doubt for truth in found.values())
    fits = [c for c in points if info["memory"].get(c.name, {}).get("fits")]
    print(f"\n{args.model}, {args.ranks} rank(s), {args.clock} time, {num_rounds(told)} rounds in {len(told['pieces'])} piece(s): {len(points)} points, {len(fits)} predicted to fit; "
          f"two standard errors of a point: {100 * statistics.median(doubts):.1f} % (median), {100 * doubts[-1]:.0f} % (most)")  # fmt: skip
    print(
        "\n| metric | tried | chosen | regret | unseen within 10 % | median error | worst |\n|---|--:|---|--:|--:|--:|--:|"
    )
    for metric in ("throughput", "latency"):
        tuner = ModelBasedTuner(fits, prior_parts(info, fits), metric, most_micros=10**9)
        while (chosen := tuner.next()) is not None:
            s, _, each = found[chosen.name]
            tuner.tell(chosen, Outcome("measured", metrics={"latency": s, "throughput": chosen.train_batch / s, "step_s": each}))  # fmt: skip

        def value(c: Candidate, metric: str = metric) -> float:
            return c.train_batch / seconds[c.name] if metric == "throughput" else 1 / seconds[c.name]

        best, own = max(points, key=value), max((c for c in fits if c.name in tuner.outcomes), key=value)
        unseen = [c for c in fits if c.name not in tuner.outcomes]
        errors = {c.name: tuner.predictions[c.name].step_s / seconds[c.name] - 1 for c in unseen}
        sizes = sorted(map(abs, errors.values()))
        print(f"| {metric} | {len(tuner.outcomes)} of {len(points)} | {own.name} (best {best.name}) | {100 * (1 - value(own) / value(best)):.1f} % | "
              f"{sum(e <= 0.1 for e in sizes)} of {len(sizes)} | {100 * statistics.median(sizes):.1f} % | {100 * sizes[-1]:.0f} % |")  # fmt: skip
        by_value(unseen, errors)
    prior = {name: sum(parts.values()) for name, parts in prior_parts(info, points).items()}
    changes(points, prior, seconds)
    print("\n| point | predicted before any trial, ms | measured, ms | two standard errors |\n|---|--:|--:|--:|")
    for candidate in sorted(points, key=lambda c: seconds[c.name] / c.train_batch):
        name = candidate.name
        print(f"| {name} | {1e3 * prior[name]:.1f} | {1e3 * seconds[name]:.1f} | {100 * found[name].doubt:.1f} % |")


def parts_of(c: Candidate) -> dict[str, Any]:
    """What distinguishes a point, by short names."""
    short = {
        key.rpartition(".")[2] if "zero_" in key else key.rpartition(".")[0]: value for key, value in c.values.items()
    }
    return {"stage": c.stage, "micro-batch": c.micro, **short, **c.degrees}


def by_value(unseen: list[Candidate], errors: dict[str, float]) -> None:
    """How far predictions are off at each value, to see what is off always."""
    found: dict[str, list[float]] = {}
    for candidate in unseen:
        for key, value in parts_of(candidate).items():
            found.setdefault(f"{key} {value}", []).append(errors[candidate.name])
    print("  " + "; ".join(f"{what}: {100 * statistics.median(each):+.0f} % ({sum(abs(e) > 0.1 for e in each)} of {len(each)} beyond)"
                           for what, each in sorted(found.items())))  # fmt: skip


def changes(points: list[Candidate], prior: dict[str, float], seconds: dict[str, float]) -> None:
    """What `deepspeed doctor` would say of each single change, from the same cost model, beside what the change gave."""

    def gain(times: dict[str, float], a: Candidate, b: Candidate) -> float:
        return b.train_batch / times[b.name] / (a.train_batch / times[a.name]) - 1

    found: dict[str, list[tuple[float, float]]] = {}
    for a in points:
        for b in points:
            old, new = parts_of(a), parts_of(b)
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
    parser.add_argument("--rounds", type=int, default=60, help="in each of which every point makes a step that counts")
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="begin no round after so long; what is left, the same command does"
    )
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: processor time, where others use the machine"
    )
    measure_and_report(parser, __file__, work, report, is_done)


if __name__ == "__main__":
    main()
