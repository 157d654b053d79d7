"""Candidates that the engine refuses: the first run says so and why, the search leaves them out, and the page shows the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import deepspeed
from deepspeed.autotuning.space import TENSOR
from deepspeed.engine.probe import CANDIDATES
from deepspeed.utils.errors import DeepSpeedError
from tests.autotuning.test_experiments import config_file, on_cpus, tune
from tests.harness import run_ranks
from tests.planner import families

__all__ = ["on_cpus"]
WHY = "AutoTP not supported for model. Its type, 'fsmt', has layers that cannot be told by their structure."


def candidate(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "micro": 1, "rest": name, "num_ranks": 2, "degrees": {}, "overrides": {}, **more}


def probed(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """What a first run says of three candidates."""
    wrong = {"zero_optimization.stage": 5}
    asked = [
        candidate("plain"),
        candidate("cut", degrees={"tp": 2}, overrides={TENSOR: 2}),
        candidate("deep", degrees={"tp": 2, "pp": 2}, overrides={TENSOR: 2}, num_ranks=4),
        candidate("wrong", overrides=wrong),
    ]
    (folder / CANDIDATES).write_text(json.dumps(asked))
    path = folder / "model_info.json"
    own = {"enabled": True, "model_info": {"profile": True}, "model_info_path": str(path)}
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}, "autotuning": own}
    engine = deepspeed.initialize(model=families.make("untold"), config=config)[0]
    with pytest.raises(SystemExit):
        engine(**families.batch(samples=1))
    return json.loads(path.read_text())


def test_the_first_run_says_which_candidates_the_engine_refuses_and_why(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = run_ranks(1, probed, tmp_path)[0]["memory"]
    assert found["plain"]["fits"] is True
    for name in ("cut", "deep"):
        assert found[name]["refused"] is True and found[name]["why"].startswith(WHY)
    assert found["wrong"]["refused"] is True and "zero_optimization.stage = 5" in found["wrong"]["why"]


def test_what_the_engine_refuses_is_not_tried_and_the_page_says_why(tmp_path: Path) -> None:
    config = config_file(tmp_path, zero_optimization={"stage": [1, 2]}, train_micro_batch_size_per_gpu=[2, 4])
    assert tune(config, "--refuse", "z2_") == 0
    results = tmp_path / "autotuning_results"
    state = json.loads((results / "state.json").read_text())
    assert set(state["outcomes"]) == {"z1_gas1_tmbspg2", "z1_gas1_tmbspg4"}
    page = (results / "report.html").read_text()
    assert "not tried: the engine refuses it: layers that cannot be told" in page and "2 refused by the engine" in page
    assert "2 refused by the engine" in (results / "summary.txt").read_text()


def test_where_the_engine_refuses_everything_its_reason_is_the_error(tmp_path: Path) -> None:
    config = config_file(tmp_path, zero_optimization={"stage": [1, 2]}, train_micro_batch_size_per_gpu=[2, 4])
    with pytest.raises(
        DeepSpeedError, match="the engine refuses all of 4 configurations; .* layers that cannot be told"
    ):
        tune(config, "--refuse", "z")
