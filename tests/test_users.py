"""What hurts users of the original, and the tests that show that it cannot happen here.

One row per complaint in this version's scope, by its number in the list of complaints that this table answers; tests
elsewhere by file and name, those without a better home below.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.zero.bucket import Bucket
from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks
from tests.models import build

ROWS: dict[int, tuple[str, str]] = {
    3: (
        "silently wrong gradients with overlap, or at one stage only",
        "engine/test_equals_plain_pytorch.py: test_overlap_on_and_off_agree_bit_for_bit "
        "test_stages_agree_with_each_other_bit_for_bit_without_clipping "
        "test_twenty_steps_of_fp32_equal_plain_pytorch test_bf16_follows_the_same_mixed_precision_policy",
    ),
    4: (
        "hangs with only a timeout to show",
        "zero/test_gather.py: test_any_order_on_any_rank_is_served | "
        "engine/test_bad_input.py: test_ranks_with_other_configurations_or_models_are_named "
        "test_ranks_with_other_buffers_are_named",
    ),
    5: (
        "stage 3 breaks on dynamic graphs",
        "engine/test_equals_plain_pytorch.py: test_models_that_use_parameters_in_every_way_equal_plain_pytorch | "
        "zero/test_gather.py: test_a_rank_that_leaves_the_plan_is_served_and_the_others_finish_theirs",
    ),
    6: (
        "frozen parameters, adapters and empty groups",
        "engine/test_optimizers.py: test_adapters_on_a_frozen_base_train_with_checkpointing_in_both_modes "
        "test_interleaved_empty_and_all_frozen_groups_keep_their_places_and_settings",
    ),
    7: (
        "the loss scale at its minimum without a cause",
        "engine/test_bad_input.py: test_nan_under_fp16_skips_and_at_the_floor_names_the_first_bad_parameter",
    ),
    8: (
        "parameters look empty under stage 3, weights are lost on the way out",
        "test_users.py: test_consolidation_holds_one_bucket_whole_at_a_time | "
        "zero/test_param.py: test_every_use_of_a_sharded_parameter_outside_a_forward_is_refused_with_the_cure | "
        "engine/test_bad_input.py: test_a_sharded_parameter_in_arithmetic_names_itself_and_the_cure",
    ),
    10: (
        "batch-size arithmetic and values of the wrong type",
        "config/test_batch.py: test_a_contradiction_shows_every_number_its_origin_and_the_cure "
        "test_sizes_written_as_strings_are_numbers | config/test_values.py: test_a_value_is_read_as",
    ),
    11: (
        "typos in the configuration ignored",
        "config/test_errors.py: test_an_unknown_key_is_named_in_full_with_the_nearest_valid_one | "
        "engine/test_bad_input.py: test_bad_configurations_are_refused_alike_on_every_rank",
    ),
    13: (
        "no_sync and accumulation asserted at stages 2 and 3",
        "engine/test_accumulation.py: test_every_way_to_spell_a_step_equals_plain_pytorch",
    ),
    15: (
        "slower than DDP on models of many small tensors",
        "test_users.py: test_many_small_parameters_share_one_collective",
    ),
    17: (
        "memory estimates wrong, engines never freed",
        "engine/test_lifetime.py: test_a_dropped_engine_is_freed_with_its_hooks | "
        "zero/test_memory.py: test_bytes_at_rest_equal_the_table",
    ),
    18: (
        "slow start: imports, and layers gathered several times",
        "test_import.py: test_importing_prints_nothing_and_does_not_even_import_torch "
        "test_the_training_face_imports_torch_and_nothing_heavy_and_touches_no_device | "
        "zero/test_init.py: test_no_rank_ever_holds_more_than_a_bucket_or_two_whole",
    ),
    20: ("noise", "test_users.py: test_training_prints_at_most_one_line_by_default"),
    21: (
        "a single process needs mpi4py",
        "engine/test_engine.py: test_one_process_trains_without_any_launcher | "
        "comm/test_init.py: test_one_process_needs_no_launcher_and_no_mpi",
    ),
    22: (
        "several engines, copies of models",
        "engine/test_engine.py: test_two_engines_train_against_each_other_as_plain_models_do | "
        "engine/test_lifetime.py: test_a_model_goes_from_one_engine_to_the_next "
        "test_the_module_of_an_engine_can_be_copied_and_saved_and_the_engine_says_that_it_cannot "
        "test_at_stage_3_a_gathered_module_can_be_copied",
    ),
    25: ("no types", "test_users.py: test_the_public_api_is_typed"),
}
IN_SCOPE = {3, 4, 5, 6, 7, 8, 10, 11, 13, 15, 17, 18, 20, 21, 22, 25}


def test_every_complaint_in_scope_has_a_row() -> None:
    assert set(ROWS) == IN_SCOPE


@pytest.mark.parametrize("number", sorted(ROWS))
def test_the_tests_of_a_row_exist(number: int) -> None:
    _, tests = ROWS[number]
    for part in tests.split(" | "):
        file, _, names = part.partition(": ")
        tree = ast.parse((Path(__file__).parent / file).read_text())
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert names and set(names.split()) <= there, f"{file} lacks {sorted(set(names.split()) - there)}"


# The tests without a better home. --------------------------------------------------------------------------------------


def consolidate(rank: int, world_size: int) -> tuple[int, int]:
    """Elements of the largest bucket, and of all that were ever whole at once during a consolidation."""
    peak = 0
    unshard = Bucket.unshard

    def counting(bucket: Bucket) -> None:
        nonlocal peak
        unshard(bucket)
        peak = max(peak, sum(b.full.untyped_storage().nbytes() // 4 for b in engine._built.sharded))

    with engine_of(build("gpt_untied"), make_config(3, micro=1)) as engine:
        with mock.patch.object(Bucket, "unshard", counting):
            state = engine._zero3_consolidated_16bit_state_dict()
        assert (state is not None) == (rank == 0)
        return max(bucket.layout.padded_numel for bucket in engine._built.sharded), peak


def test_consolidation_holds_one_bucket_whole_at_a_time() -> None:
    for largest, peak in run_ranks(2, consolidate):
        assert 0 < peak <= largest


class ManyLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(100)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean()


def collectives(rank: int, world_size: int, stage: int) -> list[int]:
    """How many tensors the optimizer steps, buckets are reduced, and buckets are gathered at stage 3."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage},
    }
    with engine_of(ManyLayers(), config) as engine:
        stepped = sum(len(group["params"]) for group in engine.optimizer.param_groups)
        return [stepped, len(engine._reducer.gradients), len(engine._built.sharded)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_many_small_parameters_share_one_collective(stage: int) -> None:
    assert run_ranks(2, collectives, stage) == [[1, 1, 0]] * 2


SCRIPT = """
import torch, deepspeed
model = torch.nn.Linear(4, 1)
config = {"train_batch_size": 2, "optimizer": {"type": "AdamW", "params": {}}, "zero_optimization": {"stage": STAGE}}
engine, *_ = deepspeed.initialize(model=model, config=config)
for _ in range(20):
    engine.backward(engine(torch.ones(2, 4)).mean())
    engine.step()
engine.destroy()
"""


@pytest.mark.parametrize("stage", [0, 3])
def test_training_prints_at_most_one_line_by_default(stage: int) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("STAGE", str(stage))], capture_output=True, text=True, check=True
    )
    assert len((run.stdout + run.stderr).splitlines()) <= 1, run.stdout + run.stderr


def unannotated(kind: Any) -> list[str]:
    """The public functions of a class whose parameters or result are not all annotated."""
    return [
        name
        for name, function in inspect.getmembers(kind, inspect.isfunction)
        if function.__module__.startswith("deepspeed.") and not name.startswith("_")
        if inspect.signature(function).return_annotation is inspect.Signature.empty
        or any(p.annotation is p.empty for n, p in inspect.signature(function).parameters.items() if n != "self")
    ]


def test_the_public_api_is_typed() -> None:
    assert (Path(deepspeed.__file__).parent / "py.typed").exists()
    for kind in (
        deepspeed.DeepSpeedEngine,
        deepspeed.ZeroOptimizer,
        deepspeed.zero.Init,
        deepspeed.zero.GatheredParameters,
    ):
        assert unannotated(kind) == []
    annotations = inspect.get_annotations(deepspeed.initialize)
    assert set(annotations) == {*inspect.signature(deepspeed.initialize).parameters, "return"}
    assert torch.optim.Optimizer in deepspeed.DeepSpeedOptimizer.__mro__
