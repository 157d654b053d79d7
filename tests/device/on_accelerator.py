"""`make test-gpu`: the oracle's training runs on this machine's accelerator, one rank; `--simulate` tries it on the simulated device.

    python -m tests.device.on_accelerator [--simulate]

Every stage and the tiers that one rank has, in fp32, against plain PyTorch on the CPU within the oracle's tolerances.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from deepspeed.accelerator import get_accelerator
from tests.device import sim
from tests.device.cases import config_of, tier_section
from tests.engine.runs import train
from tests.engine.test_equals_plain_pytorch import adamw
from tests.harness import free_port
from tests.models import build, make_batches
from tests.oracle import assert_close_weights, train_plain

CASES = [(stage, "none", "none") for stage in range(4)] + [(2, "cpu", "none"), (3, "cpu", "cpu"), (3, "nvme", "nvme")]


def main() -> None:
    """Raises AssertionError at the first run that differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulate", action="store_true")
    if parser.parse_args().simulate:
        sim.install()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    torch.backends.cuda.matmul.allow_tf32 = False
    accelerator = get_accelerator()
    dist.init_process_group(accelerator.communication_backend_name())
    model = build("gpt_tied")
    batches = make_batches(model, num_steps=4, accumulation=2, samples=3)
    expected = train_plain(model, batches, adamw)
    for stage, optimizer, param in CASES:
        with tempfile.TemporaryDirectory() as folder:
            config = config_of(stage, zero=tier_section(optimizer, param, Path(folder)))
            run = train(0, 1, "gpt_tied", config, samples=3)
        assert run.losses == pytest.approx(expected.losses, rel=1e-5)
        assert_close_weights(run.weights, expected.weights)
        print(
            f"{accelerator.current_device_name()}: stage {stage}, optimizer on {optimizer}, parameters on {param}: equal"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
