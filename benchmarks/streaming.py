"""A model that is read from disk for every token, beside the disk's own speed in the same run.

    python benchmarks/streaming.py [--folder .] [--layers 8] [--hidden 2048] [--tokens 4] [--rounds 5]

A Llama with random weights in fp32, batch 1, greedy, one thread for products; `init_inference(zero={"stage": 3, "offload_param": nvme})` with room for
about one and a half layers. The disk's speed is that of the same store reading the same number of bytes in pieces of a layer, two under way, into
memory that stays. Both are taken in each round, because the speed of a virtual disk moves by a third within minutes; what was written
is on the disk before.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import deepspeed
from deepspeed.config.storage import AioConfig
from deepspeed.tiers.buffers import aligned_buffer
from deepspeed.tiers.nvme import NvmeStore
from deepspeed.tiers.rest import OnDisk
from deepspeed.tiers.swap_folder import SwapFolder


def memory(key: str) -> int:
    """Bytes of this process, by a key of the kernel's."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


class Disk:
    """The same bytes in a store of their own."""

    def __init__(self, folder: Path, piece: int, pieces: int) -> None:
        self._rest = OnDisk(NvmeStore(SwapFolder(folder, 0), AioConfig()), "speed", piece * pieces, torch.uint8)
        self._buffers = [aligned_buffer(piece) for _ in range(2)]
        self._starts = range(0, piece * pieces, piece)
        for i, start in enumerate(self._starts):
            self._rest.start_store(start, self._buffers[i % 2].fill_(i)).wait()

    def read_s(self) -> float:
        """Seconds of reading all pieces, two under way."""
        start = time.perf_counter()
        under_way: list[Any] = []
        for i, at in enumerate(self._starts):
            if len(under_way) == 2:
                under_way.pop(0).wait()
            under_way.append(self._rest.start_load(at, self._buffers[i % 2]))
        for transfer in under_way:
            transfer.wait()
        return time.perf_counter() - start


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=".", help="on the disk that is measured")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 4, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 256, eos_token_id=None,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, torch.no_grad():
        with deepspeed.OnDevice(dtype=torch.float32, device="meta"):
            model = transformers.LlamaForCausalLM(config)
        nbytes = sum(param.nbytes for param in model.parameters())
        weights = {name: torch.empty(param.shape).normal_(0, 0.02) for name, param in model.state_dict().items()}
        torch.save(weights, f"{folder}/weights.pt")
        del weights
        layer = nbytes // args.layers
        offload = {"device": "nvme", "nvme_path": f"{folder}/swap", "max_in_cpu": 0}
        zero = {"stage": 3, "offload_param": offload, "stage3_prefetch_bucket_size": layer // 5,
                "stage3_max_live_parameters": layer // 2, "stage3_max_reuse_distance": 0}  # fmt: skip
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        engine = deepspeed.init_inference(model, dtype="fp32", checkpoint=f"{folder}/weights.pt", zero=zero)
        prompt = torch.arange(3, 11).unsqueeze(0)
        engine.generate(prompt, max_new_tokens=2, do_sample=False, pad_token_id=0)
        peak = memory("VmHWM") - before
        piece = layer // 65536 * 65536
        disk = Disk(Path(folder) / "speed", piece, args.layers)
        os.sync()
        rounds = []
        for _ in range(args.rounds):
            start = time.perf_counter()
            engine.generate(prompt, max_new_tokens=args.tokens, do_sample=False, pad_token_id=0)
            rounds.append(((time.perf_counter() - start) / args.tokens, disk.read_s() * nbytes / piece / args.layers))
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(
        f"{platform.machine()}, torch {torch.__version__}, commit {done.stdout.strip() or '?'}, load {os.getloadavg()[0]:.1f}\n"
    )
    seconds, read_s = (statistics.median(each) for each in zip(*rounds, strict=True))
    shares = sorted(read / token for token, read in rounds)
    print(
        "| weights, MB | peak above the start, MB | ms a token | GB/s | the disk's GB/s | share, median | least, most |\n"
        "|--:|--:|--:|--:|--:|--:|--:|"
    )
    print(
        f"| {nbytes / 1e6:.0f} | {peak / 1e6:.0f} | {seconds * 1e3:.0f} | {nbytes / seconds / 1e9:.2f} | {nbytes / read_s / 1e9:.2f} "
        f"| {statistics.median(shares):.0%} | {shares[0]:.0%}, {shares[-1]:.0%} |"
    )


if __name__ == "__main__":
    main()
