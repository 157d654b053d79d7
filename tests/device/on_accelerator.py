"""`make test-gpu`: this machine's accelerator against plain PyTorch on its CPU, one rank; `--simulate` tries it on the simulated device.

    python -m tests.device.on_accelerator [--simulate]

Training at every stage and on the tiers that one rank has, checkpoints, recomputation with activations on the CPU, the kernels of
`kernels.table`, and generation. Every check is run and printed; the exit status is 1 where one failed. No network.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.accelerator import get_accelerator
from deepspeed.kernels.reference import quantize as formats
from deepspeed.kernels.reference import signs
from deepspeed.kernels.table import pick
from deepspeed.optim import FusedAdam, FusedLamb, FusedLion
from deepspeed.quant.linear import QuantizedLinear, QuantizedWeight
from deepspeed.quant.spec import Spec
from tests.device import sim
from tests.device.answers import generated
from tests.device.cases import config_of, tier_section
from tests.device.test_training import LOW, assert_same_bits, resume
from tests.engine.runs import Run, train
from tests.engine.test_equals_plain_pytorch import adamw
from tests.harness import free_port
from tests.models import build, make_batches
from tests.oracle import assert_close_weights, train_plain

TIERS = [(stage, "none", "none") for stage in range(4)] + [(2, "cpu", "none"), (3, "cpu", "cpu"), (3, "nvme", "nvme")]
NUMEL = (1, 255, 4096, 100_003)


def _run(stage: int, optimizer: str = "none", param: str = "none", **extra: Any) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(stage, zero=tier_section(optimizer, param, Path(folder)), **extra)
        return train(0, 1, "gpt_tied", config, samples=3)


@functools.cache
def _expected() -> Any:
    model = build("gpt_tied")
    return train_plain(model, make_batches(model, num_steps=4, accumulation=2, samples=3), adamw)


def fp32(stage: int, optimizer: str, param: str) -> None:
    """Plain PyTorch's numbers."""
    run, expected = _run(stage, optimizer, param), _expected()
    assert run.losses == pytest.approx(expected.losses, rel=1e-5)
    assert_close_weights(run.weights, expected.weights)


def low(precision: str) -> None:
    """Every stage has the bits of stage 0, and trains as fp32 does to the precision."""
    runs = [_run(stage, **LOW[precision]) for stage in range(4)]
    for run in runs[1:]:
        assert_same_bits(run, runs[0])
    assert runs[0].losses == pytest.approx(_expected().losses, rel=2e-2)


def recomputed(stage: int) -> None:
    """Blocks that are computed again, their inputs kept on the CPU, change no bit."""
    extra = {"activation_checkpointing": {"recompute": "full", "cpu_checkpointing": True}}
    assert_same_bits(_run(stage, **extra), _run(stage))


def resumed(stage: int) -> None:
    """A run from a checkpoint has the bits of the run that went on."""
    with tempfile.TemporaryDirectory() as folder:
        whole, again = (resume(0, 1, config_of(stage, accumulation=1), folder, loads) for loads in (False, True))
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


def codecs() -> None:
    """Quantisation and signs have the bits of torch's operations on the CPU."""
    device = torch.device(get_accelerator().current_device_name())
    for numel in (64, 4096, 64 * 1563):
        x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
        for num_bits in (8, 4):
            packed = pick("quantize", device.type)(x.to(device), 64, num_bits, symmetric=True)
            reference = formats.quantize(x, 64, num_bits, symmetric=True)
            assert torch.equal(packed.values.cpu(), reference.values)
            assert torch.equal(packed.scales.cpu(), reference.scales)
            back = pick("dequantize", device.type)(packed, num_bits, torch.float32)
            assert torch.equal(back.cpu(), formats.dequantize(reference, num_bits, torch.float32))
        errors = torch.zeros(numel, device=device), torch.zeros(numel)
        bits, _ = pick("compress_signs", device.type)(x.to(device), errors[0])
        assert torch.equal(bits.cpu(), signs.compress_signs(x, errors[1])[0])
        torch.testing.assert_close(errors[0].cpu(), errors[1], rtol=1e-6, atol=1e-6)


def products() -> None:
    """One row and many meet a weight of 8 or 4 bits as they meet the dequantized one."""
    device = torch.device(get_accelerator().current_device_name())
    for num_bits, symmetric in ((8, True), (4, True), (8, False), (4, False)):
        values = torch.Generator().manual_seed(num_bits)
        spec = Spec(num_bits=num_bits, group_size=64, symmetric=symmetric)
        held = QuantizedWeight(torch.randn(250, 192, generator=values), spec)
        layer = QuantizedLinear(held, torch.randn(250, generator=values)).to(device)
        for rows in (1, 7, 16, 40):
            x = torch.randn(rows, 192, generator=values)
            expected = torch.nn.functional.linear(x, layer.weight.cpu(), layer.bias.cpu())
            with torch.no_grad():
                torch.testing.assert_close(layer(x.to(device)).cpu(), expected, rtol=1e-4, atol=1e-3)


def _stepped(make: Callable[[Any], Any], device: torch.device) -> list[Tensor]:
    make_values = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(numel, generator=make_values).to(device)) for numel in NUMEL]
    optimizer = make(params)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=make_values).to(device)
        optimizer.step()
    return [param.detach().cpu() for param in params]


def optimizers() -> None:
    """Three steps of each have the CPU's numbers."""
    device = torch.device(get_accelerator().current_device_name())
    for kind in (FusedAdam, FusedLamb, FusedLion):
        make = functools.partial(kind, lr=1e-2, weight_decay=0.1)
        ours, theirs = _stepped(make, device), _stepped(make, torch.device("cpu"))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def words(dtype: str) -> None:
    """Generation ends, with finite logits, the same twice."""
    first, second = (generated(0, 1, dtype) for _ in range(2))
    assert first["logits"].isfinite().all()
    assert torch.equal(first["words"], second["words"])


def checks() -> Iterator[tuple[str, Callable[[], None]]]:
    """All of them, by name."""
    for stage, optimizer, param in TIERS:
        name = f"fp32, stage {stage}, optimizer on {optimizer}, parameters on {param}"
        yield name, functools.partial(fp32, stage, optimizer, param)
    for precision in LOW:
        yield f"{precision}, stages 0 to 3", functools.partial(low, precision)
    for stage in (0, 3):
        yield f"recomputation, stage {stage}", functools.partial(recomputed, stage)
        yield f"checkpoints, stage {stage}", functools.partial(resumed, stage)
    yield "kernels: codecs", codecs
    yield "kernels: products", products
    yield "kernels: optimizers", optimizers
    for dtype in ("fp32", "int8", "int4"):
        yield f"generation, {dtype}", functools.partial(words, dtype)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulate", action="store_true")
    if parser.parse_args().simulate:
        sim.install()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    torch.backends.cuda.matmul.allow_tf32 = False
    accelerator = get_accelerator()
    dist.init_process_group(accelerator.communication_backend_name())
    print(f"{accelerator.current_device_name()}, torch {torch.__version__}")
    failed = []
    for name, check in checks():
        began = time.perf_counter()
        try:
            check()
        except Exception:
            failed.append(name)
            traceback.print_exc()
        print(f"{'FAILED' if name in failed else 'equal'} {time.perf_counter() - began:6.1f} s  {name}", flush=True)
    dist.destroy_process_group()
    print(f"{len(failed)} failed" + (": " + "; ".join(failed) if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
