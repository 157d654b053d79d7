"""Checkpoints of models that ranks hold in parts: one manifest of whole tensors, loaded by any other division."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from deepspeed.checkpoint.owners import Holding, assign, find_conflicts
from deepspeed.checkpoint.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from tests.checkpoint.divided import NUM_LAYERS, WIDTH, Held, load_version_1, put_together, run
from tests.harness import run_ranks


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # (ranks, pp, tp, ZeRO stage)
        ((4, 1, 2, 2), (3, 1, 1, 3)),
        ((3, 1, 1, 1), (4, 2, 2, 0)),
        ((4, 2, 2, 1), (4, 1, 4, 2)),
        ((4, 2, 1, 3), (4, 1, 2, 3)),
    ],
)
def test_every_division_loads_every_other_bit_for_bit(
    tmp_path: Path, before: tuple[int, int, int, int], after: tuple[int, int, int, int]
) -> None:
    num_ranks, pp, tp, stage = before
    saved = put_together(run_ranks(num_ranks, run, tmp_path, pp, tp, stage, "save"), pp, tp)
    num_ranks, pp, tp, stage = after
    loaded = put_together(run_ranks(num_ranks, run, tmp_path, pp, tp, stage, "load"), pp, tp)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)


def test_the_export_of_a_divided_model_is_whole(tmp_path: Path) -> None:
    saved = put_together(run_ranks(4, run, tmp_path, 2, 2, 2, "save"), 2, 2)
    exported = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    assert {name: list(value.shape) for name, value in exported.items()} == {
        name: list(value.shape) for name, value in saved.items() if " " not in name
    }
    assert all(torch.equal(value, saved[name]) for name, value in exported.items())


def test_each_element_is_written_once_and_the_work_is_divided(tmp_path: Path) -> None:
    run_ranks(4, run, tmp_path, 1, 2, 1, "save")
    manifest = json.loads((tmp_path / "global_step2" / "manifest.json").read_text())
    assert manifest["version"] == 2
    written = [0] * 4
    for kind in manifest["tensors"].keys() - {"value"}:
        for tensor in manifest["tensors"][kind].values():
            for file, start, stop, *_ in tensor["pieces"]:
                written[file] += stop - start
    numel = NUM_LAYERS * (3 * WIDTH * WIDTH + WIDTH * WIDTH + WIDTH)
    assert sum(written) == 3 * numel + NUM_LAYERS  # weights, two moments, and a buffer of one element each
    assert max(written) - min(written) <= 3 * 64 + NUM_LAYERS  # a slice's padding


@pytest.mark.parametrize("marks", ["megatron", "none"])
def test_what_nobody_placed_is_kept_by_rank_and_refused_on_others_by_name(tmp_path: Path, marks: str) -> None:
    saved = run_ranks(2, run, tmp_path, 1, 2, 1, "save", marks)
    loaded = run_ranks(2, run, tmp_path, 1, 2, 1, "load", marks)
    for mine, theirs in zip(loaded, saved, strict=True):
        assert all(torch.equal(mine.weights[name], value) for name, value in theirs.weights.items())
        assert all(torch.equal(mine.states[key], value) for key, value in theirs.states.items())
    errors = {held.error for held in run_ranks(2, run, tmp_path, 1, 1, 1, "load", marks)}
    (error,) = errors
    assert "layers.0.fused" in error and "mp_rank_00.layers.0.fused" in error
    assert "only 2 model-parallel ranks can load them" in error


def test_a_missing_piece_is_an_error_on_every_rank_before_anything_is_changed(tmp_path: Path) -> None:
    run_ranks(2, run, tmp_path, 1, 2, 1, "save")
    (folder,) = tmp_path.glob("global_step*")
    (folder / "shard-00001-of-00002.safetensors").unlink()
    errors = [held.error for held in run_ranks(2, run, tmp_path, 1, 1, 1, "load")]
    assert len(set(errors)) == 1 and "shard-00001-of-00002" in errors[0]


def test_a_checkpoint_of_version_1_loads(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parent / "version_1", tmp_path / "v1")
    expected = json.loads((tmp_path / "v1" / "expected.json").read_text())
    assert json.loads((tmp_path / "v1" / "old" / "manifest.json").read_text())["version"] == 1
    exported = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "v1"))
    assert {name: value.tolist() for name, value in exported.items()} == expected["weights"]
    loaded = run_ranks(3, load_version_1, tmp_path / "v1")
    assert {name: value.tolist() for name, value in loaded[0].weights.items()} == expected["weights"]
    assert whole_states(loaded) == whole_states([Held(states=of_json(states)) for states in expected["states"]])


def of_json(states: dict[str, list[float]]) -> dict[tuple[str, str, int], torch.Tensor]:
    keys = (key.split("|") for key in states)
    return {(kind, name, int(at)): torch.tensor(v) for (kind, name, at), v in zip(keys, states.values(), strict=True)}


def whole_states(ranks: list[Held]) -> dict[tuple[str, str], list[float]]:
    pieces: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for held in ranks:
        for (kind, name, start), values in held.states.items():
            pieces.setdefault((kind, name), {})[start] = values
    return {key: torch.cat([found[at] for at in sorted(found)]).tolist() for key, found in pieces.items()}


def holding(numel: int, digest: int = 0, dtype: str = "F32") -> Holding:
    return Holding((numel,), dtype, None, numel, ((0, numel, digest),))


def test_what_several_ranks_hold_goes_to_the_one_with_least_to_write() -> None:
    everyone = [{"own": holding(10), "a": holding(6), "b": holding(4)}, {"a": holding(6), "b": holding(4)}]
    assert assign(everyone) == [frozenset({"a", "b"}), frozenset()]
    assert assign([{"a": holding(6), "b": holding(4)}] * 2) == [frozenset({"b"}), frozenset({"a"})]


def test_one_name_for_two_things_is_found() -> None:
    assert find_conflicts([{"a": holding(4)}, {"a": holding(4)}]) == frozenset()
    assert find_conflicts([{"a": holding(4)}, {"a": holding(4, digest=1)}]) == {"a"}
    assert find_conflicts([{"a": holding(4)}, {"a": holding(5)}]) == {"a"}
    assert find_conflicts([{"a": holding(4)}, {"a": holding(4, dtype="BF16")}]) == {"a"}
