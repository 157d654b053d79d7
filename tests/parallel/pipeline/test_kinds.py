"""Precisions, tiers, and engines that scripts derive: each trains as the plain pipeline does."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.engine.pipeline import DualPipeVEngine, PipelineEngine
from deepspeed.monitor.report import write_report
from deepspeed.monitor.run_record import read_records
from deepspeed.parallel.pipeline.instructions import BackwardPass, ForwardPass, PipeInstruction
from deepspeed.parallel.pipeline.layers import PipelineError
from deepspeed.parallel.pipeline.module import DualPipeVModule, PipelineModule
from deepspeed.parallel.pipeline.schedules import one_f_one_b, zb_h1
from deepspeed.parallel.pipeline.slots import PipeSchedule
from deepspeed.utils.errors import DeepSpeedConfigError
from tests.harness import run_ranks
from tests.parallel.pipeline.models import (
    LONG,
    batches,
    config_of,
    joined,
    mlp,
    start,
    train,
    train_plain,
    whole_weights,
)

# Tiers. --------------------------------------------------------------------------------------------------------------


def _cut() -> PipelineModule:
    return PipelineModule(mlp(), num_stages=2, loss_fn=nn.MSELoss(), partition_method="uniform")


def _tiers(rank: int, world: int, cases: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    found = []
    for zero, tiers in cases:
        config = config_of(
            zero, schedule="zb-h1" if zero == 2 else "1f1b", optimizer={"type": "Adam", "params": {"lr": 0.01}}
        )
        config["zero_optimization"] |= tiers
        engine = deepspeed.initialize(model=_cut(), config=config)[0]
        data = batches(12)
        losses = [engine.train_batch(data).item() for _ in range(3)]
        found.append({"losses": losses, "weights": whole_weights(engine)})
        engine.destroy()
    return found


def test_every_tier_has_the_bits_of_memory(tmp_path: Path) -> None:
    cpu, nvme = {"device": "cpu"}, {"device": "nvme", "nvme_path": str(tmp_path)}
    cases: list[tuple[int, dict[str, Any]]] = [
        (1, {"offload_optimizer": cpu}),
        (3, {"offload_optimizer": nvme, "offload_param": cpu}),
    ]
    if LONG:
        cases += [
            (2, {"offload_optimizer": cpu}),
            (3, {"offload_optimizer": cpu}),
            (3, {"offload_optimizer": nvme, "offload_param": nvme}),
        ]
    cases = [(1, {}), *cases]
    found = run_ranks(2, _tiers, cases, timeout=200)
    in_memory = [mine[0] for mine in found]
    for i, case in enumerate(cases):
        assert found[0][i]["losses"] == found[1][i]["losses"] == pytest.approx(in_memory[0]["losses"], rel=1e-6), case
        for mine, whole in zip(found, in_memory, strict=True):
            for name, value in whole["weights"].items():
                assert torch.allclose(mine[i]["weights"][name], value, atol=1e-6), (case, name)


# Precisions. ---------------------------------------------------------------------------------------------------------


def _half(rank: int, world: int) -> dict[str, Any]:
    section = {"enabled": True, "auto_cast": True, "initial_scale_power": 8}
    engine = start(_cut(), config_of(1, fp16=section))
    data = batches(12)
    losses = [engine.train_batch(data).item() for _ in range(3)]
    found = {"losses": losses, "dtype": next(engine.module.parameters()).dtype, "scale": engine.loss_scale()}
    engine.destroy()
    return found


def test_fp16_takes_floating_inputs_as_the_plain_engine_does() -> None:
    expected = train_plain(mlp(), steps=3)["losses"]
    first, second = run_ranks(2, _half)
    assert first["losses"] == second["losses"] and first["dtype"] is torch.float16 and first["scale"] == 256
    assert first["losses"] == pytest.approx(expected, rel=1e-2)


# Derived engines. ----------------------------------------------------------------------------------------------------


class Note(PipeInstruction):
    """An instruction of the script's own."""


class AllForwardsFirst(PipeSchedule):
    """GPipe, in the contract's words."""

    def steps(self) -> Any:
        for micro in range(self.micro_batches):
            yield [ForwardPass(micro)]
        yield [Note(text="turning")]
        for micro in range(self.micro_batches):
            yield [BackwardPass(micro)]


class Derived(PipelineEngine):
    train_schedule = AllForwardsFirst
    notes: ClassVar[list[str]] = []

    def note(self, text: str) -> None:
        self.notes.append(f"{text} after {len(self.actions_done)}")

    _INSTRUCTION_MAP: ClassVar[Any] = {**PipelineEngine._INSTRUCTION_MAP, Note: note}


class Counting(PipelineEngine):
    """Replaces a handler, and calls the one that was there."""

    num_forwards = 0

    def _exec_forward_pass(self, buffer_id: int, phase: int = 0) -> None:
        self.num_forwards += 1
        super()._exec_forward_pass(buffer_id, phase)

    _INSTRUCTION_MAP: ClassVar[Any] = {**PipelineEngine._INSTRUCTION_MAP, ForwardPass: _exec_forward_pass}


class Deaf(PipelineEngine):
    train_schedule = AllForwardsFirst


def _derived(rank: int, world: int) -> dict[str, Any]:
    found = {}
    for kind in (Derived, Counting):
        module = _cut()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        engine = kind(model=module, config=config_of(1), optimizer=optimizer)
        found[kind.__name__] = train(engine)
        if isinstance(engine, Counting):
            assert engine.num_forwards == 8
        else:
            assert engine.notes == ["turning after 4"] * 2
        engine.destroy()
    deaf = _cut()
    engine = Deaf(model=deaf, config=config_of(0), optimizer=torch.optim.SGD(deaf.parameters(), lr=0.1))
    with pytest.raises(PipelineError, match="Deaf does not understand the instruction Note"):
        engine.train_batch(batches(4))
    engine.destroy()
    return found


def test_an_engine_with_its_own_schedule_and_instructions_has_the_same_bits() -> None:
    expected = train_plain(mlp())
    found = run_ranks(2, _derived)
    for kind in ("Derived", "Counting"):
        mine = [part[kind] for part in found]
        assert [part["losses"] for part in mine] == [expected["losses"]] * 2
        for name, value in joined(mine).items():
            assert torch.equal(value, expected["weights"][name]), (kind, name)


def _dual(rank: int, world: int) -> dict[str, Any]:
    def module() -> DualPipeVModule:
        return DualPipeVModule(mlp(), num_stages=2, loss_fn=nn.MSELoss(), partition_method="uniform")

    with pytest.raises(AssertionError, match="DualPipeV on 2 ranks needs at least 4 micro-batches"):
        start(module(), config_of(accumulation=3))
    with pytest.raises(DeepSpeedConfigError, match="runs a DualPipeVModule"):
        DualPipeVEngine(model=_cut(), config=config_of())
    engine = start(module(), config_of(2))
    assert type(engine) is DualPipeVEngine and engine.actions.name == "dualpipe-v"
    assert engine.is_first_stage() == engine.is_last_stage() == (rank == 0)
    found = train(engine)
    engine.destroy()
    return found


def test_a_dual_pipe_module_gets_its_own_engine() -> None:
    expected = train_plain(mlp())
    found = run_ranks(2, _dual)
    assert [part["losses"] for part in found] == [expected["losses"]] * 2
    for name, value in joined(found).items():
        assert torch.equal(value, expected["weights"][name])


class NoBackward(PipeSchedule):
    def steps(self) -> Any:
        for micro in range(self.micro_batches):
            yield [ForwardPass(micro)]


class NoSteps(PipeSchedule):
    def steps(self) -> Any:
        return None


class Words(PipeSchedule):
    def steps(self) -> Any:
        yield ["forward"]


def _wrong_schedules(rank: int, world: int, folder: str) -> None:
    wrong: list[tuple[Any, str]] = [
        (NoBackward, "NoBackward has forwards alone: nothing would be trained"),
        (NoSteps, r"NoSteps.steps\(\) returns a NoneType"),
        (Words, r"Words.steps\(\) yields 'forward': each step is a list of instructions"),
        (dict, "train_schedule is <class 'dict'>, not a class derived from"),
    ]
    module = _cut()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    engine = Counting(model=module, config=config_of(0), optimizer=optimizer)
    for kind, words in wrong:
        Counting.train_schedule = kind
        with pytest.raises((PipelineError, ValueError), match=words):
            engine.train_batch(batches(4))
    Counting.train_schedule = None
    assert engine.train_batch(batches(4)).isfinite()
    assert (engine.prev_stage, engine.next_stage) == (rank - 1, rank + 1)
    assert (engine.is_pipe_parallel, engine.is_data_parallel, engine.is_model_parallel) == (True, False, False)
    with pytest.raises(PipelineError, match=r"num_micro_batches=0\): use 1 or more"):
        engine.eval_batch(batches(4), num_micro_batches=0)
    with pytest.raises(PipelineError, match=r"a list is no iterator.\n  Pass iter\(loader\)"):
        engine.train_batch(list(batches(4)))  # type: ignore[arg-type]
    engine.set_dataloader(list(batches(4)))  # keeps no state
    engine.train_batch()
    engine.save_checkpoint(folder)
    assert engine.load_checkpoint(folder)[0]
    engine.destroy()


def test_schedules_that_are_none_are_refused_by_words_and_the_next_batch_trains(tmp_path: Path) -> None:
    run_ranks(2, _wrong_schedules, str(tmp_path))


def _files(rank: int, world: int, folder: str) -> list[float]:
    def losses(name: str) -> float:
        engine = start(_cut(), config_of(0, schedule=f"{folder}/{name}"))
        loss = engine.train_batch(batches(4)).item()
        engine.destroy()
        return loss

    wrong = {
        "missing.csv": r"(?s)missing.csv\": pipeline rank 1: 1W2 comes before 1I2, or 1I2 is missing",
        "forwards.csv": r"forwards.csv has forwards alone",
        "semicolons.csv": "rank 0, cell 1: '0F0;0F1.* is not a pipeline action",
        "latin.csv": "can't decode byte",
        f"own{rank}.csv": "rank 1 has another list of actions than rank 0",
        "one.csv" if rank == 1 else "nowhere.csv": 'nowhere.csv" is neither a file nor one of auto',
    }
    for name, words in wrong.items():
        with pytest.raises(DeepSpeedConfigError, match=words):
            losses(name)
    return [losses(name) for name in ("one.csv", "mark.csv")]


def test_a_file_is_carried_out_or_refused_by_name_rank_and_micro_batch_on_all_ranks(tmp_path: Path) -> None:
    text = zb_h1(2, 4).to_csv()
    for name, wrong in (
        ("one.csv", text), ("mark.csv", "\ufeff" + text.replace(",", " , ")), ("missing.csv", text.replace("1I2,", "")),
        ("forwards.csv", "0F0,0F1,0F2,0F3\n1F0,1F1,1F2,1F3\n"), ("semicolons.csv", text.replace(",", ";")),
        ("own0.csv", text), ("own1.csv", one_f_one_b(2, 4).to_csv()),
    ):  # fmt: skip
        (tmp_path / name).write_text(wrong)
    (tmp_path / "latin.csv").write_bytes(b"0F0,\xe9")
    for found in run_ranks(2, _files, str(tmp_path)):
        assert found == [train_plain(mlp(), steps=1)["losses"][0]] * 2


# The report. ---------------------------------------------------------------------------------------------------------


def _reported(rank: int, world: int, folder: str) -> None:
    engine = start(_cut(), config_of(1, schedule="zb-h1", monitor={"run_dir": folder}))
    train(engine, steps=3)
    engine.destroy()


def test_the_report_draws_the_batch_that_ran_beside_its_plan(tmp_path: Path) -> None:
    run_ranks(2, _reported, str(tmp_path))
    (record,) = read_records(tmp_path)
    assert record.start["params"] == sum(p.numel() for layer in mlp() for p in layer.parameters())  # of both stages
    told = record.pipeline
    assert told is not None and (told["step"], told["name"]) == (2, "zb-h1")
    assert [[action[0] for action in row] for row in told["measured"]] == [
        [a[0] for a in row] for row in told["planned"]
    ]
    assert len(told["measured"]) == 2 and len(told["measured"][0]) == 12
    for row in told["measured"]:
        assert all(0 <= start <= end and 0 <= waited <= end - start for _, start, end, waited, _ in row)
        assert all(before[2] <= after[1] + 1e-6 for before, after in itertools.pairwise(row))
    waits = {action[0]: action[4] for row in told["measured"] for action in row}
    assert waits["0F0"] is None and waits["1F0"] == 0 and waits["0I0"] == 1 and waits["0W0"] is None
    assert '"pipeline":{"kind":"pipeline","step":2' in write_report([tmp_path]).read_text()
