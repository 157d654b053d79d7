"""Predicted against measured peak memory of examples/gpt: stage x precision x checkpointing x offload.

    python benchmarks/memory.py [--ranks 2] [--width 256] [--only 3-bf16]

Each case trains in processes of its own: initialization and four steps, under `deepspeed.memory.measure_peak` (the bytes
that torch's CPU allocator hands out). The resident set beside it has the pages of everything in the process.
The error is to the nearer end of what is predicted: from reductions that are done at once to as many on the wire as are likely.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "gpt")]

import torch  # noqa: E402

NVME = {"device": "nvme", "nvme_path": os.path.join(tempfile.gettempdir(), "deepspeed-memory-benchmark")}
OFFLOADS: dict[str, dict[str, Any]] = {
    "device": {},
    "cpu": {"offload_optimizer": {"device": "cpu"}},
    "nvme": {"offload_optimizer": NVME},
    "nvme-all": {"offload_optimizer": NVME, "offload_param": NVME},
}


def cases() -> dict[str, dict[str, Any]]:
    """By name: the keys that differ."""
    found: dict[str, dict[str, Any]] = {}
    for stage in range(4):
        for precision in ("fp32", "bf16"):
            for recompute in ("none", "full"):
                for offload in OFFLOADS if stage == 3 else list(OFFLOADS)[: 1 + min(stage, 1)]:
                    found[f"{stage}-{precision}-{recompute}-{offload}"] = {
                        "zero_optimization": {"stage": stage, **OFFLOADS[offload]},
                        "bf16": {"enabled": precision == "bf16"},
                        "activation_checkpointing": {"recompute": recompute},
                    }
    return found


def config_of(case: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The whole configuration of a case."""
    zero = {"reduce_bucket_size": 200_000, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    return {
        "train_micro_batch_size_per_gpu": args.micro,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        **case,
        "zero_optimization": {**zero, **case["zero_optimization"]},
    }


def make_model(args: argparse.Namespace) -> torch.nn.Module:
    """The example's model."""
    from model import Gpt, GptConfig

    torch.manual_seed(0)
    return Gpt(GptConfig(width=args.width, layers=args.layers, heads=args.width // 64, seq=args.seq))


def counted_buffer(nbytes: int, *, is_locked: bool = False, is_huge: bool = True) -> torch.Tensor:
    """A page-aligned buffer of torch's."""
    page = 4096
    made = torch.zeros(nbytes + page, dtype=torch.uint8)
    start = -made.data_ptr() % page
    return made[start : start + nbytes]


def worker(args: argparse.Namespace) -> None:
    """One rank of one case: initialize, four steps; prints what was measured."""
    import deepspeed
    from deepspeed.memory.measure import measure_peak
    from deepspeed.tiers import nvme

    torch.set_num_threads(1)
    deepspeed.init_distributed()
    tokens = torch.randint(256, (args.micro, args.seq))
    config = config_of(cases()[args.worker], args)

    def run(width: int) -> None:
        shape = argparse.Namespace(**{**vars(args), "width": width})
        engine, *_ = deepspeed.initialize(model=make_model(shape), config=config)
        for _ in range(4):
            engine.backward(engine(tokens.clone(), tokens.clone()))
            engine.step()
        engine.destroy()

    run(64)  # imports, thread pools and libraries' workspaces
    gc.collect()  # the nvme store goes with the last that rests in it
    # What the nvme store maps for its buffers is given by torch's allocator here, so that it is counted.
    nvme.aligned_buffer = counted_buffer
    measured = measure_peak(lambda: run(args.width), counts=not args.resident)
    if int(os.environ["RANK"]) == 0:
        print(json.dumps([measured.allocated_nbytes, measured.resident_nbytes]))
    torch.distributed.destroy_process_group()


def measure(name: str, args: argparse.Namespace, resident: bool = False) -> tuple[int, int]:
    """Start the ranks of a case; rank 0's figures."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(args.ranks)}
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--worker", name]
    for key in ("ranks", "width", "layers", "seq", "micro"):
        command += [f"--{key}", str(getattr(args, key))]
    command += ["--resident"] * resident
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, **malloc, "RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_SIZE": str(args.ranks)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if r else None,
            text=True,
        )
        for r in range(args.ranks)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    allocated, resident = json.loads(outputs[0].strip().splitlines()[-1])
    return allocated, resident


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"ranks": 2, "width": 256, "layers": 6, "seq": 128, "micro": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--resident", action="store_true", help="a second run of each case for the resident set")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    from deepspeed.memory.estimator import Estimator

    tokens = torch.zeros(args.micro, args.seq, dtype=torch.int64)
    estimator = Estimator(make_model(args), (tokens, tokens), device_type="cpu")
    title = f" {'resident':>9}" * args.resident
    print(f"{'stage-precision-recompute-offload':34} {'predicted':>15} {'measured':>9} {'error':>7}{title}  peak is in")
    for name, case in cases().items():
        if args.only not in name:
            continue
        predicted = estimator.estimate(config_of(case, args), world_size=args.ranks)
        allocated, _ = measure(name, args)
        resident = f" {measure(name, args, resident=True)[1] / 1e6:9.1f}" if args.resident else ""
        low, high = predicted.low_nbytes, predicted.peak_nbytes
        error = min(max(allocated, low), high) / allocated - 1
        interval = f"{low / 1e6:.1f} to {high / 1e6:.1f}" if low < high else f"{high / 1e6:.1f}"
        print(
            f"{name:34} {interval:>15} {allocated / 1e6:9.1f} {error:+7.1%}{resident}  {predicted.phase}",
            flush=True,
        )


if __name__ == "__main__":
    main()
