"""`import deepspeed` is cheap: it prints nothing, touches no device and imports hardly anything."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

import deepspeed

PROBE = """
import json, os, sys
{code}
torch = sys.modules.get("torch")
print("PROBE" + json.dumps({{
    "modules": sorted(sys.modules),
    "has_device_context": bool(torch and torch.cuda.is_initialized()),
    "has_process_group": bool(torch and torch.distributed.is_available() and torch.distributed.is_initialized()),
    "cpu_time_s": sum(os.times()[:2]),
}}))
"""

HEAVY = {
    "torch._dynamo",
    "torch._inductor",
    "transformers",
    "accelerate",
    "lightning",
    "matplotlib",
    "pandas",
    "triton",
    "mpi4py",
}
"""What a training script pays for only if it asks."""


def probe(code: str) -> dict[str, Any]:
    """Run `code` in a fresh interpreter; what it left in the process, and its own output."""
    run = subprocess.run([sys.executable, "-c", PROBE.format(code=code)], capture_output=True, text=True, check=True)
    said, _, answer = run.stdout.partition("PROBE")
    return {**json.loads(answer), "stdout": said, "stderr": run.stderr}


def test_importing_prints_nothing_and_does_not_even_import_torch() -> None:
    seen = probe("import deepspeed")
    assert (seen["stdout"], seen["stderr"]) == ("", "")
    assert "torch" not in seen["modules"]
    ours = {name for name in seen["modules"] if name.startswith("deepspeed.")}
    assert ours <= {"deepspeed.legacy", "deepspeed.utils", "deepspeed.utils.lazy", "deepspeed.utils.logging"}


def test_the_training_face_imports_torch_and_nothing_heavy_and_touches_no_device(record_property: Any) -> None:
    code = "import deepspeed; deepspeed.initialize; deepspeed.DeepSpeedEngine; deepspeed.zero.Init; deepspeed.comm"
    seen = probe(code)
    record_property("cpu_time_s", seen["cpu_time_s"])
    record_property("cpu_time_of_torch_s", probe("import torch")["cpu_time_s"])
    assert (seen["stdout"], seen["stderr"]) == ("", "")
    assert not HEAVY & set(seen["modules"])
    assert not seen["has_device_context"] and not seen["has_process_group"]


TRAINS = """
import deepspeed, torch
config = {"train_micro_batch_size_per_gpu": 1, "steps_per_print": 1, "optimizer": {"type": "AdamW"}}
engine, *_ = deepspeed.initialize(model=torch.nn.Linear(4, 4), config=config)
engine.backward(engine(torch.ones(2, 4)).sum())
engine.step()
"""


def test_training_by_a_configured_optimizer_leaves_the_compiler_unloaded() -> None:
    seen = probe(TRAINS)
    assert "step 1" in seen["stdout"], "the operations of a step were counted"
    assert not HEAVY & set(seen["modules"])


@pytest.mark.parametrize(
    "name", ["deepspeed.zero", "deepspeed.utils.logging", "deepspeed.runtime.lr_schedules", "deepspeed.comm"]
)
def test_submodules_are_attributes_after_a_plain_import(name: str) -> None:
    seen = probe(f"import deepspeed; {name}; print({name}.__name__)")
    assert seen["stdout"].startswith("deepspeed.")


def test_the_version_satisfies_every_integration() -> None:
    declared = re.search(
        r'^version = "(.+)"$', Path(__file__).parents[1].joinpath("pyproject.toml").read_text(), re.MULTILINE
    )
    assert declared is not None and declared[1] == deepspeed.__version__
    assert Version(deepspeed.__version__) >= Version("0.19.6") and not Version(deepspeed.__version__).is_prerelease
