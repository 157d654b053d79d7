"""Stands for a training script: reads its configuration and writes what an engine's observers would, without importing torch.

A trial of it takes a launcher's start. `--mode` says how it misbehaves; `--crash` and the like name candidates by a part of
their name. Seconds of a step follow a formula, so that the best configuration is known.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def step_s(config: dict[str, Any]) -> float:
    """The truth: ZeRO stage 2 is the fastest, and of micro-batches that of 8."""
    stage, micro = config["zero_optimization"]["stage"], config["train_micro_batch_size_per_gpu"]
    per_sample = 0.010 if micro <= 8 else 0.010 + 0.002 * (micro - 8)
    return 0.02 * (1 + abs(stage - 2)) + per_sample * micro


def write(path: Path, values: dict[str, Any]) -> None:
    aside = path.with_name(f"{path.name}.aside")
    aside.write_text(json.dumps(values))
    aside.replace(path)


REFUSED = {"fits": None, "refused": True, "why": "layers that cannot be told by their structure"}


def profile(section: dict[str, Any], refuses: str, takes_s: float) -> None:
    path = Path(section["model_info_path"])
    write(path.with_name(f"{path.name}.progress"), {"step": 0})
    time.sleep(takes_s)
    asked = json.loads((path.parent / "candidates.json").read_text())
    memory = {c["name"]: {"fits": c["micro"] <= 16, "nbytes": c["micro"] << 20, "why": "too large"} for c in asked}
    memory |= {c["name"]: REFUSED for c in asked if refuses and refuses in c["name"]}
    rates = {"matmul_flops": 1e11, "copy_nbytes_s": 1e10, "wire_nbytes_s": 1e9, "wire_latency_s": 1e-5}
    info = {"num_params": 10**6, "flops": 1e9, "forward_flops": 3e8, "activation_mem_per_gpu": 1 << 20, "device": "cpu",
            "micro_batch": 1, "input_numels": [128]}  # fmt: skip
    write(path, {**info, "dtype": "float32", "rates": rates, "memory": memory, "device_nbytes": 16 << 20})


def measure(config: dict[str, Any], section: dict[str, Any], follows: bool, slowed: float) -> None:
    path = Path(section["metric_path"])
    seconds = step_s(config) * slowed
    batch = config["train_batch_size"]
    write(path.with_name(f"{path.name}.progress"), {"step": section["end_profile_step"]})
    write(
        path,
        {
            "latency": seconds,
            "throughput": batch / seconds,
            "FLOPS_per_gpu": batch * 1e9 / seconds,
            "step_s": [seconds] * 3,
            "input_numels": [128 * (config["train_micro_batch_size_per_gpu"] if follows else 1)],
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    for flag in ("crash", "hang", "kill", "memory"):
        parser.add_argument(f"--{flag}", nargs="*", default=[])
    parser.add_argument("--mode", default="")
    parser.add_argument("--refuse", default="", help="a part of the names that the engine would refuse")
    parser.add_argument("--at", default="", help="the name of a run that waits for a file")
    parser.add_argument("--waits-for", type=Path)
    parser.add_argument("--slow-once", default="", help="the name of a trial whose first run has slow steps")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("--deepspeed_config")
    args = parser.parse_args()
    config = json.loads(Path(args.deepspeed_config).read_text())
    section = config["autotuning"]
    name = Path(args.deepspeed_config).parent.name
    if args.log and os.environ["RANK"] == "0":
        with args.log.open("a") as file:
            file.write(f"{name} {os.getpid()}\n")
    if args.mode == "silent":
        return
    if args.mode == "never":
        time.sleep(600)
    if args.mode in ("first-step", "no-step") and "metric_path" in section:
        path = Path(section["metric_path"])
        write(path.with_name(f"{path.name}.progress"), {"step": 0})
        sys.exit("RuntimeError: shapes (3, 4) and (5, 6)" if args.mode == "first-step" else 0)
    if os.environ["RANK"] != "0":
        return
    while name == args.at and not args.waits_for.exists():
        time.sleep(0.05)
    if section.get("model_info"):
        profile(section, args.refuse, 4.0 if args.mode == "slow-profile" else 0.0)
        return
    if name in args.crash:
        sys.exit("ValueError: not this one")
    if name in args.memory:
        sys.exit("torch.OutOfMemoryError: out of memory")
    if name in args.kill:
        os.kill(os.getpid(), signal.SIGKILL)
    if name in args.hang:
        time.sleep(600)
    is_first = name == args.slow_once and args.log.read_text().count(f"{name} ") == 1
    measure(config, section, args.mode != "own-batches", 3.0 if is_first else 1.0)


if __name__ == "__main__":
    main()
