"""The named schedules: torch's order of actions, the papers' bubbles and memory, no rank that waits for ever."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import schedules as theirs
from torch.distributed.pipelining.stage import _PipelineStageBase

from deepspeed.parallel.pipeline import schedules
from deepspeed.parallel.pipeline.actions import Action, Actions, Op, read_csv
from deepspeed.parallel.pipeline.check import Costs, in_a_row, peak_alive, require_valid, simulate, steady_bubble
from deepspeed.utils.errors import DeepSpeedError


class _Stage(_PipelineStageBase):
    """As much of a stage as torch's generators look at."""

    _create_grad_recv_info = _prepare_backward_infra = _prepare_forward_infra = None

    def __init__(self, num_ranks: int, num_stages: int, index: int) -> None:
        self.group_rank, self.group_size, self.num_stages, self.stage_index = 0, num_ranks, num_stages, index
        self.stage_index_to_group_rank, self.has_backward = {}, False
        self.submod = self.group = None
        self.device, self.name = torch.device("cpu"), ""


def _torch_order(kind: Any, num_ranks: int, num_micro: int, stages: list[int], num_stages: int) -> list[list[str]]:
    schedule = kind([_Stage(num_ranks, num_stages, i) for i in stages], num_micro, loss_fn=lambda *_: None)
    return [[str(action) for action in _flat(schedule.pipeline_order[rank])] for rank in range(num_ranks)]


def _flat(row: list[Any]) -> Iterator[Any]:
    for action in row:
        if action is not None:
            yield from action.sub_actions or [action]


ORACLES: dict[str, tuple[Callable[..., Actions], Any, int]] = {
    "interleaved-2": (lambda p, m: schedules.interleaved(p, m, 2), theirs.ScheduleInterleaved1F1B, 2),
    "interleaved-3": (lambda p, m: schedules.interleaved(p, m, 3), theirs.ScheduleInterleaved1F1B, 3),
    "zb-h1": (schedules.zb_h1, theirs.ScheduleInterleavedZeroBubble, 1),
    "zb-h1-2": (lambda p, m: schedules.zb_h1(p, m, 2), theirs.ScheduleInterleavedZeroBubble, 2),
    "zb-v": (schedules.zb_v, theirs.ScheduleZBVZeroBubble, 2),
    "dualpipe-v": (schedules.dual_pipe_v, theirs.ScheduleDualPipeV, 2),
}


@pytest.mark.parametrize("name", ORACLES)
def test_the_order_is_that_of_torch(name: str) -> None:
    make, kind, chunks = ORACLES[name]
    compared = 0
    for num_ranks in (1, 2, 3, 4, 8):
        for num_micro in (1, 2, 3, 4, 8, 9, 16, 30):
            stages = (
                [0, 2 * num_ranks - 1] if name in ("zb-v", "dualpipe-v") else [i * num_ranks for i in range(chunks)]
            )
            try:
                expected = _torch_order(kind, num_ranks, num_micro, stages, chunks * num_ranks)
            except ValueError:
                with pytest.raises(DeepSpeedError):
                    make(num_ranks, num_micro)
                continue
            assert [[str(action) for action in row] for row in make(num_ranks, num_micro).lists] == expected
            compared += 1
    assert compared > 15


def test_1f1b_as_text() -> None:
    assert str(schedules.one_f_one_b(2, 3)) == "rank 0: 0F0 0F1 0B0 0F2 0B1 0B2\nrank 1: 1F0 1B0 1F1 1B1 1F2 1B2"


def test_zb_h2_as_text() -> None:
    assert str(schedules.zb_h2(2, 3)) == (
        "rank 0: 0F0 0F1 0F2 0I0 0W0 0I1 0W1 0I2 0W2\nrank 1: 1F0 1I0 1F1 1I1 1F2 1I2 1W0 1W1 1W2"
    )


SIZES = [(1, 1), (2, 1), (2, 8), (4, 8), (8, 64), (5, 10), (16, 64)]


@pytest.mark.parametrize("name", schedules.NAMED)
def test_every_schedule_is_complete_and_ends(name: str) -> None:
    for num_ranks, num_micro in SIZES:
        if name == "dualpipe-v" and num_micro < 2 * num_ranks:
            continue
        require_valid(schedules.NAMED[name](num_ranks, num_micro))
    require_valid(schedules.inference(4, 7))


def _made(num_ranks: int, num_micro: int) -> dict[str, Actions]:
    return {name: make(num_ranks, num_micro) for name, make in schedules.NAMED.items()}


@pytest.mark.parametrize(("num_ranks", "num_micro"), [(4, 8), (8, 64)])
def test_bubbles_and_memory_are_those_of_the_papers(num_ranks: int, num_micro: int) -> None:
    p, m = num_ranks, num_micro
    made = _made(p, m)
    lines = {name: simulate(actions, Costs.equal(actions.num_stages)) for name, actions in made.items()}
    assert lines["gpipe"].bubble == pytest.approx((p - 1) / (m + p - 1))
    assert lines["1f1b"].bubble == pytest.approx((p - 1) / (m + p - 1))
    assert lines["interleaved"].bubble == pytest.approx((p - 1) / (2 * m + p - 1))
    assert lines["zb-h1"].makespan == 3 * m + p - 1
    assert all(lines[name].bubble_of(rank) == 0 for name in ("zb-h2", "zb-v") for rank in range(p))
    assert peak_alive(made["gpipe"]) == [m] * p
    assert peak_alive(made["1f1b"]) == [p - rank for rank in range(p)]
    assert peak_alive(made["zb-h1"]) == [p] * p
    assert peak_alive(made["zb-h2"]) == [2 * p - 1] * p
    assert peak_alive(made["zb-v"]) == [2 * p] * p  # stages of half the size


def test_batches_in_a_row_have_the_bubble_of_the_paper() -> None:
    p, m = 8, 64
    steady = {name: steady_bubble(a, Costs.equal(a.num_stages)) for name, a in _made(p, m).items()}
    assert steady["zb-h2"] == steady["zb-v"] == 0
    assert steady["dualpipe-v"] == pytest.approx(7 / 391)  # of stages of half the size
    assert steady["gpipe"] == steady["1f1b"] == pytest.approx((p - 1) / (m + p - 1))
    assert steady["zb-h1"] == pytest.approx((p - 1) / (3 * m + p - 1))  # which waits inside of a batch
    h2 = schedules.zb_h2(p, m)
    hops = steady_bubble(h2, Costs.equal(p, hop=0.01))
    assert hops == pytest.approx(1 - 3 * m / (3 * m + 2 * (p - 1) * 0.01))  # a batch's first gradient, there and back
    uneven = Costs([1.0] * 7 + [2.0], [1.0] * 7 + [2.0], [1.0] * 7 + [2.0])
    assert steady_bubble(h2, uneven) == pytest.approx(1 - (7 * 3 + 6) / (8 * 6))  # as long as the slowest rank's work
    assert steady_bubble(schedules.gpipe(1, 2), Costs.equal(1)) == 0


def test_batches_in_a_row_are_a_list_as_any_other() -> None:
    twice = in_a_row(schedules.one_f_one_b(2, 2), 2)
    require_valid(twice)
    assert str(twice).splitlines()[1] == "rank 1: 1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3"
    assert twice.num_micro == 4


@pytest.mark.parametrize("name", schedules.NAMED)
@pytest.mark.parametrize(("num_ranks", "num_micro"), [(64, 64), (16, 256), (4, 1024)])
def test_a_list_of_4096_stages_x_micro_batches_is_proved_in_seconds(name: str, num_ranks: int, num_micro: int) -> None:
    ranks = num_ranks // 2 if name == "dualpipe-v" and num_micro < 2 * num_ranks else num_ranks
    actions = schedules.NAMED[name](ranks, num_micro)
    began = time.process_time()
    require_valid(actions)
    most = max(peak_alive(actions))
    assert time.process_time() - began < 5
    known = {
        "gpipe": num_micro, "1f1b": ranks, "zb-h1": ranks, "zb-h2": min(num_micro, 2 * ranks - 1), "zb-v": 2 * ranks,
        "dualpipe-v": 2 * ranks + 1,
    }  # fmt: skip
    assert most == known.get(name, most)


def test_lists_survive_csv_and_torch_files_with_gaps_are_read() -> None:
    actions = schedules.zb_v(3, 7)
    again = read_csv(actions.to_csv(), actions.name)
    assert again == actions
    assert str(read_csv("0F0,,,0B0\n,1F0,1B0,\n")) == "rank 0: 0F0 0B0\nrank 1: 1F0 1B0"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0F0,0X0\n", "rank 0, cell 2: '0X0' is not a pipeline action"),
        ("0F0,0B0\n0F1\n", "rank 1, cell 1: 0F1 is on rank 1, but rank 0 has stage 0 already"),
        ("1F0,1B0\n", "no rank has stage 0"),
        ("", "the list of actions is empty"),
    ],
)
def test_a_file_that_is_no_list_is_refused_by_cell(text: str, words: str) -> None:
    with pytest.raises(DeepSpeedError, match=words):
        read_csv(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0F0,0F1,0B1\n1F0,1B0,1F1,1B1\n", "rank 0: stage 0 has no backward of micro-batch 0"),
        ("0F0,0B0\n1B0,1F0\n", "rank 1: 1B0 comes before 1F0, or 1F0 is missing"),
        ("0F0,0B0,0B0\n1F0,1B0\n", "rank 0: 0B0 is there twice"),
        ("0F0,0B0\n1F0,1W0\n", "rank 1: 1W0 comes before 1I0, or 1I0 is missing"),
        ("0F0,0B0,0W0\n1F0,1B0\n", "rank 0: 0W0 comes after 0B0: a backward is B alone, or I and later W"),
        ("0F0,0I0,0B0\n1F0,1B0\n", "rank 0: 0B0 comes after 0I0: a backward is B alone"),
        ("0F0,0F0\n1F0,1B0\n", "rank 0: 0F0 is there twice"),
        ("0F0,0I0\n1F0,1B0\n", "stage 0 has no weight gradient of micro-batch 0"),
        ("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n", "wait for each other for ever: rank 0 with 0B0 for the backward of micro-batch 0"),
    ],
)  # fmt: skip
def test_a_list_that_cannot_be_carried_out_is_refused_by_rank_and_action(text: str, words: str) -> None:
    with pytest.raises(DeepSpeedError, match=words):
        require_valid(read_csv(text))


def test_a_stage_on_another_rank_and_a_micro_batch_too_many_are_refused() -> None:
    wrong = Actions(((Action(1, Op.FORWARD, 0),), ()), (0, 1), 1)
    with pytest.raises(DeepSpeedError, match="rank 0: 1F0 is of a stage that this rank does not have"):
        require_valid(wrong)
    with pytest.raises(DeepSpeedError, match="0F3 is of a micro-batch beyond the 2 there are"):
        require_valid(Actions(((Action(0, Op.FORWARD, 3),),), (0,), 2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: schedules.interleaved(4, 10), None),
        (lambda: schedules.interleaved(4, 13), "13 micro-batches on 4 ranks are 3 rounds"),
        (lambda: schedules.dual_pipe_v(4, 7), r"at least as many micro-batches as stages: 7 < 2 \* 4 ranks"),
    ],
)
def test_numbers_that_a_schedule_does_not_take_are_refused(make: Callable[[], Actions], words: str | None) -> None:
    if words is None:
        require_valid(make())
        return
    with pytest.raises(DeepSpeedError, match=words):
        make()
