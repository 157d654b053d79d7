"""One accelerator: tokens/s and peak memory of training a GPT, here and under FSDP2; our fused Adam beside torch's.

    python benchmarks/gpu.py [--tiny] [--out gpu]

Writes `<out>.md` and `<out>.json`. Each row runs in a process of its own, so that one that runs out of memory is a row too. `--tiny` is
for trying the script where there is no accelerator: small models, the CPU if need be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "gpt"))

SIZES = {
    "tiny": (64, 2, 2, 64),
    "125M": (768, 12, 12, 1024),
    "1.3B": (2048, 24, 16, 1024),
    "6.7B": (4096, 32, 32, 1024),
}
"""width, layers, heads, tokens per sample."""

ENGINES: dict[str, dict[str, Any] | None] = {
    "fsdp2": None,
    "zero 2": {"stage": 2},
    "zero 3": {"stage": 3},
    "zero 2, optimizer on cpu": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
}
"""Our `zero_optimization` sections; None: torch's FSDP2."""

WARM, STEPS, ROW_TIMEOUT_S = 3, 10, 240


def make_model(size: str, device: torch.device) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """A GPT in fp32 and a batch for it."""
    from model import Gpt, GptConfig

    width, layers, heads, seq = SIZES[size]
    torch.manual_seed(0)
    model = Gpt(GptConfig(width=width, layers=layers, heads=heads, seq=seq))
    tokens = torch.randint(256, (4, seq + 1), device=device)
    return model, (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def fsdp2_step(model: nn.Module, device: torch.device) -> Callable[[Any], None]:
    """A step of FSDP2 in bf16 with fp32 masters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    model.to(device)
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batch: Any) -> None:
        model(*batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(model: nn.Module, zero: dict[str, Any]) -> Callable[[Any], None]:
    """A step of our engine in bf16 with fp32 masters."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": zero,
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)

    def step(batch: Any) -> None:
        engine.backward(engine(*batch))
        engine.step()

    return step


def run_row(size: str, engine: str) -> dict[str, Any]:
    """Tokens/s and peak memory of one engine; in a process that is alone."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    device = torch.device(accelerator.current_device_name())
    dist.init_process_group(accelerator.communication_backend_name())
    model, batch = make_model(size, device)
    zero = ENGINES[engine]
    step = fsdp2_step(model, device) if zero is None else our_step(model, zero)
    for _ in range(WARM):
        step(batch)
    accelerator.synchronize()
    accelerator.reset_peak_memory_stats()
    start_s = time.perf_counter()
    for _ in range(STEPS):
        step(batch)
    accelerator.synchronize()
    seconds = time.perf_counter() - start_s
    return {"tokens_per_s": batch[0].numel() * STEPS / seconds, "peak_gib": accelerator.max_memory_allocated() / 2**30}


def run_adam(size: str) -> dict[str, Any]:
    """Milliseconds of one step of our FusedAdam and of torch's fused AdamW on the model's parameters."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.optim import FusedAdam

    accelerator = get_accelerator()
    device = torch.device(accelerator.current_device_name())
    found: dict[str, Any] = {}
    makers: dict[str, Callable[[Any], Any]] = {
        "ours_ms": FusedAdam,
        "torch_ms": lambda params: torch.optim.AdamW(params, fused=True),
    }
    for name, make in makers.items():
        params = list(make_model(size, device)[0].to(device).parameters())
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer = make(params)
        for i in range(WARM + STEPS):
            if i == WARM:
                accelerator.synchronize()
                start_s = time.perf_counter()
            optimizer.step()
        accelerator.synchronize()
        found[name] = (time.perf_counter() - start_s) / STEPS * 1e3
    return found


def in_process(*args: str) -> dict[str, Any]:
    """A row, made by this script in a process of its own; its last line of error where it fails."""
    env = {
        **os.environ,
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29577",
    }
    try:
        done = subprocess.run(
            [sys.executable, __file__, *args], env=env, capture_output=True, text=True, timeout=ROW_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {ROW_TIMEOUT_S} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no words"])[-1][:200]}
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def write(rows: list[dict[str, Any]], out: str) -> None:
    """The table as Markdown and JSON."""
    keys = ["size", "engine", "tokens_per_s", "peak_gib", "ours_ms", "torch_ms", "failed"]
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        cells = [f"{v:.2f}" if isinstance(v := row.get(key, ""), float) else str(v) for key in keys]
        lines.append("| " + " | ".join(cells) + " |")
    Path(f"{out}.md").write_text("\n".join(lines) + "\n")
    Path(f"{out}.json").write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))
    print("\n".join(lines))


def main() -> None:
    """Every row, or with --row one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--out", default="gpu")
    parser.add_argument("--row", nargs=2, metavar=("SIZE", "ENGINE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        size, engine = args.row
        print(json.dumps(run_adam(size) if engine == "adam" else run_row(size, engine)))
        return
    rows = []
    for size in ["tiny"] if args.tiny else ["125M", "1.3B", "6.7B"]:
        for engine in [*ENGINES, "adam"]:
            rows.append({"size": size, "engine": engine, **in_process("--row", size, engine)})
    write(rows, args.out)


if __name__ == "__main__":
    main()
