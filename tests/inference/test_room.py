"""While weights are loaded, memory holds the model and one tensor more, whatever the file and the precision."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.kernels import native_quantize

WIDTH, LAYERS = 1024, 6


def resident(field: str) -> int:
    """Bytes that the system counts for this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def made(dtype: torch.dtype, device: str) -> nn.Module:
    """Linear layers, as a model."""
    with torch.device(device):
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(LAYERS)))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    safetensors = pytest.importorskip("safetensors.torch")
    folder, found = tmp_path_factory.mktemp("weights"), {}
    for dtype in (torch.float32, torch.bfloat16):
        state = made(dtype, "cpu").state_dict()
        for suffix, write in (("pt", torch.save), ("safetensors", safetensors.save_file)):
            path = found[f"{dtype}.{suffix}"] = folder / f"{dtype}.{suffix}"
            write(state, path)
    return found


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not count peaks anew")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int8 without compiled loops"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_peak_is_the_model_and_its_largest_tensor(
    stored: torch.dtype, suffix: str, dtype: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = files[f"{stored}.{suffix}"]
    if "without" in dtype:
        monkeypatch.setattr(native_quantize, "_library", lambda: None)
        dtype = "int8"
    deepspeed.init_inference(made(stored, "meta"), dtype=dtype, checkpoint=str(path))  # what is made once
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    engine = deepspeed.init_inference(made(stored, "meta"), dtype=dtype, checkpoint=str(path))
    peak = resident("VmHWM") - before
    held = sum(tensor.nbytes for tensor in (*engine.parameters(), *engine.buffers()))
    largest = WIDTH * WIDTH * stored.itemsize
    assert peak <= held + largest + (3 << 20), (peak, held, largest)
