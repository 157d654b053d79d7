"""One accelerator, one command, no network: training beside FSDP2 and the original, what fits, kernels, generation.

    python benchmarks/gpu.py [--minutes 8] [--original PYTHON] [--tiny] [--out gpu]

Writes `<out>.md` and `<out>.json`. Each row runs in a process of its own (`gpu_rows.py`), so that one that runs out of memory is a row
too; rows that the minutes do not reach say so. `--original`: the interpreter of an environment with the original DeepSpeed.
`--tiny` is for trying the script where there is no accelerator: small models, the CPU if need be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_rows import FSDP2, ORIGINAL

import deepspeed
from deepspeed.accelerator import get_accelerator

ROW_TIMEOUT_S = 150
OURS = ("zero 2", "zero 3")
OFFLOADED = ("zero 2, optimizer on cpu", "zero 3, all on cpu")
FITS = ("2.7B", "6.7B", "10B", "20B")
"""Sizes that are tried in turn for each way to train, until one does not fit."""

Row = dict[str, Any]


def environment() -> dict[str, str]:
    """Of a process that is the only rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**os.environ, **one}


class Rows:
    """Rows that were measured, until the time is over."""

    def __init__(self, minutes: float, original: str | None) -> None:
        self._end = time.monotonic() + 60 * minutes
        self._original = original
        self.found: list[Row] = []

    def measure(self, kind: str, size: str, engine: str) -> bool:
        """Add a row; whether it was done."""
        row = {"kind": kind, "size": size, "engine": engine, **self._run(kind, size, engine)}
        print(json.dumps(row), file=sys.stderr, flush=True)
        self.found.append(row)
        return "failed" not in row

    def _run(self, kind: str, size: str, engine: str) -> Row:
        left = self._end - time.monotonic()
        if left < 5:
            return {"failed": "not run: the time was over"}
        python = self._original if engine.startswith(ORIGINAL) else sys.executable
        command = [python or sys.executable, str(Path(__file__).with_name("gpu_rows.py")), kind, size, engine]
        limit = min(ROW_TIMEOUT_S, left)
        try:
            done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {limit:.0f} s"}
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or ["no words"])[-1][:200]}
        row: Row = json.loads(done.stdout.strip().splitlines()[-1])
        return row

    def measure_all(self, sizes: list[str], fits: tuple[str, ...]) -> None:
        """Everything, what matters most first."""
        originals = [f"{ORIGINAL}{name}" for name in (*OURS, OFFLOADED[0])] if self._original else []
        self.measure("kernels", sizes[0], "")
        for size in sizes:
            for engine in (FSDP2, *OURS, *originals, *OFFLOADED):
                self.measure("train", size, engine)
            for engine in ("hugging face", "bf16", "int8", "int4"):
                self.measure("generate", size, engine)
        for engine in (FSDP2, "zero 3", *OFFLOADED):
            for size in fits:
                if not self.measure("train", size, engine):
                    break


def cell(value: Any) -> str:
    """A table's cell."""
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


def table(rows: list[Row], keys: list[str]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    return lines + ["| " + " | ".join(cell(row.get(key, "")) for key in keys) + " |" for row in rows]


def page(rows: list[Row], about: dict[str, str]) -> str:
    """All tables."""
    lines = [", ".join(f"{key} {value}" for key, value in about.items()), ""]
    (first, *_) = [row for row in rows if row["kind"] == "kernels"]
    rates = first.get("gb_per_s", {})
    if rates:
        lines += [
            f"The device copies {first['copy_gb_per_s']:.0f} GB/s and multiplies {first['matrix_tflops']:.1f} TFLOP/s in bf16.",
            "",
        ]
        shares = [
            {"kernel": name, "GB/s": rate, "share of the copy": rate / first["copy_gb_per_s"]}
            for name, rate in rates.items()
        ]
        lines += [*table(shares, ["kernel", "GB/s", "share of the copy"]), ""]
    for kind, keys in (
        ("train", ["size", "engine", "tokens_per_s", "tflops", "peak_gib", "failed"]),
        ("generate", ["size", "engine", "tokens_per_s", "failed"]),
    ):
        lines += [f"{kind}:", "", *table([row for row in rows if row["kind"] == kind], keys), ""]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--original", metavar="PYTHON", help="an interpreter whose deepspeed is the original")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--out", default="gpu")
    args = parser.parse_args()
    rows = Rows(args.minutes, args.original)
    rows.measure_all(["tiny"] if args.tiny else ["125M", "1.3B"], () if args.tiny else FITS)
    about = {
        "device": str(getattr(get_accelerator(), "device_name", lambda: "")()),
        "host": platform.machine(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }
    text = page(rows.found, about)
    Path(f"{args.out}.md").write_text(text)
    Path(f"{args.out}.json").write_text(json.dumps({**about, "rows": rows.found}, indent=1))
    print(text)


if __name__ == "__main__":
    main()
