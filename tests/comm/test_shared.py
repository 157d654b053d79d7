"""Messages in shared memory: gloo's bits, whatever is in flight, and what happens where there is none or a rank is gone."""

from __future__ import annotations

import gc
import os
import random
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import deepspeed
from deepspeed.comm import choose
from deepspeed.comm import shared as shared_module
from deepspeed.comm.choose import make_exchange
from deepspeed.comm.direct import DirectExchange
from deepspeed.comm.exchange import Exchange, Pending
from deepspeed.comm.shared import MAX_NBYTES, SharedExchange
from deepspeed.comm.trial import Times, Verdict, verdicts
from deepspeed.launcher.failure import Failure
from deepspeed.utils.errors import DeepSpeedError, RankMismatchError, TrainingStateError
from tests.engine.runs import LONG, Run, make_config, train
from tests.harness import close_pools, end_group, run_ranks
from tests.models import build

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(scope="module", autouse=True)
def _new_ranks() -> None:
    """Meshes of earlier tests live as long as their ranks, and a process has so many boards at once."""
    close_pools()


def shared_exchange(ranks: list[int] | None = None) -> SharedExchange:
    group = dist.group.WORLD if ranks is None else dist.new_group(ranks)
    found = make_exchange(group, CPU, sharing=choose.Sharing.ALWAYS)
    assert isinstance(found, SharedExchange)
    return found


def results(exchange: Exchange, rank: int, order: random.Random) -> list[Tensor]:
    """What every verb gives on 60 buffers of many sizes, all in flight, waited for in some order."""
    generator, sizes = torch.Generator().manual_seed(rank), random.Random(3)
    started: list[tuple[Pending, Tensor]] = []
    for i in range(60):
        dtype = DTYPES[i % 4]
        full = torch.randn(sizes.choice([0, 1, 3, 500, 20_000]) * exchange.world_size, generator=generator).to(dtype)
        if i % 3 == 0:
            started.append((exchange.start_all_gather(full, None), full))
        elif i % 3 == 1:
            out = torch.full((full.numel() // exchange.world_size,), 0.5, dtype=torch.float32)
            started.append((exchange.start_reduce_scatter(full, out, divide_by=3, accumulate=i % 2 == 0), out))
        else:
            started.append((exchange.start_all_reduce(full, 3), full))
    waits = [pending for pending, _ in started]
    order.shuffle(waits)
    for pending in waits:
        pending.wait()
    return [result for _, result in started]


def equal_bits(rank: int, world_size: int, room_nbytes: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    expected = results(DirectExchange(group), rank, random.Random(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_module, "ROOM_NBYTES", room_nbytes)
        patch.setattr(shared_module, "NUM_MESSAGES", 64)
        exchange = shared_exchange()
        for _ in range(3):  # the room is used again
            found = results(exchange, rank, random.Random(rank))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("world_size", "room_nbytes"),
    [
        (3, 1 << 15),
        pytest.param(2, 1 << 15, marks=LONG),
        pytest.param(2, shared_module.ROOM_NBYTES, marks=LONG),
        pytest.param(4, shared_module.ROOM_NBYTES, marks=LONG),
    ],
)
def test_every_verb_has_the_bits_of_gloo_even_where_the_board_is_full(world_size: int, room_nbytes: int) -> None:
    run_ranks(world_size, equal_bits, room_nbytes)


def forgotten(rank: int, world_size: int) -> None:
    exchange = shared_exchange()
    for i in range(2 * shared_module.NUM_MESSAGES):
        kept = exchange.start_all_reduce(torch.ones(100))
        if i % 100 == 99:
            kept.wait()
    full = torch.full((64,), float(rank))
    exchange.start_all_reduce(full).wait()
    assert full.tolist() == [1.0] * 64


def test_messages_that_nobody_waits_for_do_not_fill_the_board() -> None:
    run_ranks(2, forgotten)


def crowded(rank: int, world_size: int) -> None:
    num = 300
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_module, "NUM_MESSAGES", 64)
        _crowd(shared_exchange(), rank, num)


def _crowd(exchange: SharedExchange, rank: int, num: int) -> None:
    buffers = [torch.full((3,), float(i * (rank + 1))) for i in range(num)]
    started = [exchange.start_all_reduce(buffer) for buffer in buffers]
    slices = [torch.full((2,), float(rank)) for _ in range(3)]
    started += [exchange.start_all_gather(full) for full in slices]
    for pending in started[::-1]:
        pending.wait()
    assert [buffer.tolist() for buffer in buffers] == [[3.0 * i] * 3 for i in range(num)]
    assert [full.tolist() for full in slices] == [[0.0, 1.0]] * 3


def test_more_messages_than_a_board_has_places_may_be_under_way() -> None:
    run_ranks(2, crowded)


def of_groups(rank: int, world_size: int) -> None:
    """Groups of other sizes, one after the other and side by side."""
    everyone, pairs = shared_exchange(), [dist.new_group([0, 1]), dist.new_group([1, 2])]
    mine = [
        make_exchange(group, CPU, sharing=choose.Sharing.ALWAYS) for i, group in enumerate(pairs) if rank in (i, i + 1)
    ]
    for _ in range(3):
        full = torch.full((6,), float(rank))
        everyone.start_all_reduce(full).wait()
        assert full.tolist() == [3.0] * 6
        for exchange in mine:
            first = exchange.group is pairs[0]
            pair = torch.full((4,), float(rank))
            exchange.start_all_reduce(pair).wait()
            assert pair.tolist() == ([1.0] * 4 if first else [3.0] * 4)
    for group in pairs:
        end_group(group)


def test_groups_of_several_sizes_have_boards_of_their_own() -> None:
    run_ranks(3, of_groups)


def without(rank: int, world_size: int, what: str) -> tuple[str, list[str]]:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "warn_once", said.append)
        if what == "hosts":
            patch.setattr(choose, "host_words", lambda: (rank, 0, 0))
        elif what == "memory" and rank == 1:

            def none(nbytes: int) -> int:
                raise OSError(28, "No space left on device")

            patch.setattr(shared_module, "_memory", none)
        elif what == "number" and rank == 1:

            def hidden(*args: Any) -> Any:
                raise PermissionError(13, "Permission denied")

            patch.setattr(shared_module, "_mapped", hidden)
        exchange = make_exchange(None, CPU, sharing=choose.Sharing.ALWAYS)
    full = torch.full((4,), float(rank))
    exchange.start_all_reduce(full).wait()
    assert full.tolist() == [1.0] * 4
    return type(exchange).__name__, said


@pytest.mark.parametrize("what", ["hosts", "memory", "number"])
def test_ranks_that_share_no_memory_go_through_gloo_all_together_and_one_line_says_so(what: str) -> None:
    for kind, said in run_ranks(2, without, what):
        assert kind == "DirectExchange"
        assert len(said) == 1
        assert "go through gloo, not shared memory: " in said[0]


def end(rank: int, world_size: int) -> None:
    exchange = shared_exchange()
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RankMismatchError, match=r"rank 1 will send no more: its process \d+ has ended") as raised:
        exchange.start_all_reduce(torch.ones(4)).wait()
    exchange._board.close()  # which waits for nobody who has ended
    maps = Path("/proc/self/maps").read_text()
    assert "memfd:deepspeed" not in maps
    assert "/dev/shm" not in maps, "memory without a name leaves no file"
    words = f"RankMismatchError: {raised.value}"
    assert Failure(who="rank 0", host="h", code=1, words=words).is_consequence, "or the launcher would blame this rank"


def test_a_rank_that_was_killed_is_an_error_for_those_who_wait_for_it() -> None:
    import multiprocessing

    from deepspeed.utils.ports import free_port

    context = multiprocessing.get_context("spawn")
    port = free_port()
    ranks = [context.Process(target=_alone, args=(rank, port)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, -signal.SIGKILL]


def _alone(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    end(rank, 2)
    os._exit(0)  # gloo would wait for the other


def sizes(rank: int, world_size: int) -> None:
    exchange = shared_exchange()
    before = exchange._board._num_posted
    exchange.start_all_reduce(torch.ones(MAX_NBYTES // 4 + 2)).wait()
    assert exchange._board._num_posted == before, "large ones go from rank to rank"


def test_large_messages_go_by_the_direct_exchange() -> None:
    run_ranks(2, sizes)


def tried(rank: int, world_size: int) -> str:
    """What is chosen by times that the ranks disagree about, and is said; and what a real trial chooses."""
    for times, kind, way in (
        (
            ((10, 20), (21, 30)),
            SharedExchange,
            "shared memory: an all-reduce of 64 KiB took 21 us there, 30 us in gloo",
        ),
        (((10, 20), (21, 15)), DirectExchange, "gloo: an all-reduce of 64 KiB took 21 us there, 20 us in gloo"),
    ):
        said: list[str] = []
        verdicts().clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choose, "log_dist", lambda line, ranks, said=said: said.append(line))
            patch.setattr(choose, "try_both", lambda first, second, times=times: Times(*times[rank]))
            assert type(make_exchange(None, CPU, sharing=choose.Sharing.IF_FASTER)) is kind
            assert said == [f"small messages between 2 CPU ranks go through {way}."]
            assert type(make_exchange(None, CPU, sharing=choose.Sharing.IF_FASTER)) is kind, "without another trial"
            assert len(said) == 1
        verdicts().clear()
    return type(make_exchange(None, CPU, sharing=choose.Sharing.IF_FASTER)).__name__


def test_a_trial_takes_what_is_faster_on_all_ranks_together() -> None:
    assert len(set(run_ranks(2, tried))) == 1


def limited(rank: int, world_size: int) -> tuple[list[str], list[str]]:
    """What is chosen for three groups where a process may have two boards, of which one rank has one already."""
    said: list[str] = []
    verdicts()[2] = Verdict.SHARED
    gc.collect()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "warn_once", said.append)
        patch.setattr(shared_module, "MAX_BOARDS", shared_module.Board.num_open + 2 + rank)
        made = [make_exchange(None, CPU, sharing=choose.Sharing.IF_FASTER) for _ in range(3)]
        kinds = [type(exchange).__name__ for exchange in made]
        del made[0]
        made.append(make_exchange(None, CPU, sharing=choose.Sharing.IF_FASTER))
    verdicts().clear()
    return [*kinds, type(made[-1]).__name__], said


def test_a_process_has_so_many_boards_and_a_group_more_goes_through_gloo_on_all_ranks() -> None:
    (kinds, said), (of_other, said_there) = run_ranks(2, limited)
    assert kinds == of_other == ["SharedExchange", "SharedExchange", "DirectExchange", "SharedExchange"]
    assert "no memory to share ([Errno 12] this process has boards of" in said[0]
    assert "some have no memory to share" in said_there[0]


def closed(rank: int, world_size: int) -> None:
    """One rank's end comes when the other has read nothing yet, and has something under way."""
    before, mapped = shared_module.Board.num_open, num_mapped()
    with ExitStack() as until:
        exchange = make_exchange(None, CPU, sharing=choose.Sharing.ALWAYS, until=until)
        assert isinstance(exchange, SharedExchange)
        fulls = [
            torch.full((shared_module.ROOM_NBYTES // 32,), float(rank)) for _ in range(12)
        ]  # more than there is room for
        pending = [exchange.start_all_reduce(full) for full in fulls]
        dist.barrier()
        for each in pending:
            each.wait()
        if rank == 0:
            never = exchange.start_all_reduce(torch.ones(4))
    assert all(full.eq(1).all() for full in fulls)
    assert (shared_module.Board.num_open, num_mapped()) == (before, mapped), "memory is held after the end"
    if rank == 0:
        with pytest.raises(TrainingStateError, match="the engine or group of this exchange has ended"):
            never.wait()
    dist.barrier()
    full = torch.full((4,), float(rank))
    exchange.start_all_reduce(full).wait()
    assert full.tolist() == [1.0] * 4, "what comes later goes by gloo"


def num_mapped() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:deepspeed")


def test_memory_is_given_back_with_what_it_was_made_for_although_something_is_under_way() -> None:
    run_ranks(2, closed)


@contextmanager
def uncollected() -> Iterator[None]:
    """Nothing is collected on its own, so that only what asks for it is seen."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()


def in_a_row(rank: int, world_size: int, stage: int, how: str) -> tuple[int, float, list[str]]:
    """How many of 40 engines exchange by shared memory; the most boards there were; what was said."""
    said: list[str] = []
    kept: list[Any] = []
    num_shared, most = 0, 0.0
    with pytest.MonkeyPatch.context() as patch, uncollected():
        patch.setenv(choose.SHARED_MEMORY, "1")
        patch.setattr(choose, "warn_once", said.append)
        for _ in range(40):
            model = torch.nn.Linear(4, 4)
            engine, *_ = deepspeed.initialize(model=model, config=make_config(stage, micro=2))
            engine.backward(engine(torch.ones(2, 4)).sum())
            engine.step()
            num_shared += isinstance(engine._built.builder.everyone, SharedExchange)
            most = max(most, shared_module.Board.num_open)
            if how == "kept":
                engine.destroy()
                kept.append(engine)
            elif how == "cycle":
                box = [engine]
                box.append(box)  # type: ignore[arg-type]
                del box
            del engine, model
    return num_shared, most, said


@pytest.mark.parametrize(
    ("stage", "how"), [(2, "kept"), (2, "cycle"), (3, "cycle"), pytest.param(3, "drop", marks=LONG)]
)
def test_forty_engines_in_a_row_all_have_boards(stage: int, how: str) -> None:
    for num_shared, most, said in run_ranks(2, in_a_row, stage, how):
        assert num_shared == 40, said
        assert not said
        assert most < shared_module.MAX_BOARDS + 1, "the last may have been a larger one than was left room for"


def restarted(rank: int, folder: Path) -> None:
    """Engines are kept, and the default process group ends under each."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", **{choose.SHARED_MEMORY: "1"})
    kept = []
    for i in range(6):
        dist.init_process_group("gloo", init_method=f"file://{folder}/{i}", rank=rank, world_size=2)
        engine, *_ = deepspeed.initialize(model=torch.nn.Linear(4, 4), config=make_config(2, micro=2))
        engine.backward(engine(torch.ones(2, 4)).sum())
        engine.step()
        assert isinstance(engine._built.builder.everyone, SharedExchange), i
        kept.append(engine)
        dist.barrier()
        (deepspeed.comm if i % 2 else dist).destroy_process_group()
    assert shared_module.Board.num_open == 0, "the last was ended by deepspeed.comm"
    assert "memfd:deepspeed" not in Path("/proc/self/maps").read_text()


def test_boards_end_with_the_default_process_group_whoever_ends_it(tmp_path: Path) -> None:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=restarted, args=(rank, tmp_path), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]


def asked_of_one(rank: int, world_size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(choose.SHARED_MEMORY, str(rank))
        with pytest.raises(
            RankMismatchError, match=r"rank 1: has the variable DS_SHARED_MEMORY = 1 where rank 0's has"
        ):
            deepspeed.initialize(model=build("mlp"), config=make_config(1, micro=2))


def trained(rank: int, world_size: int, stage: int, shares: bool) -> tuple[Run, bool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(choose.SHARED_MEMORY, str(int(shares)))
        before = posted[0]
        # Not the board's: what ranks agree on belongs to their mesh, and goes as its first engine was asked to.
        patch.setattr(SharedExchange, "_is_direct", counted)
        run = train(rank, world_size, "mlp", make_config(stage, micro=2), num_steps=3)
        return run, posted[0] > before


posted = [0]
_is_direct = SharedExchange._is_direct


def counted(exchange: SharedExchange, full: Tensor) -> bool:
    is_direct = _is_direct(exchange, full)
    posted[0] += not is_direct
    return is_direct


def test_ranks_that_do_not_all_ask_for_it_are_told_before_they_wait_for_each_other() -> None:
    run_ranks(2, asked_of_one)


@pytest.mark.parametrize("stage", [pytest.param(0, marks=LONG), pytest.param(1, marks=LONG), 2, 3])
def test_an_engine_trains_with_the_bits_of_one_without_it(stage: int) -> None:
    (shared, uses_it), *_ = run_ranks(2, trained, stage, True)
    (alone, does_not), *_ = run_ranks(2, trained, stage, False)
    assert (uses_it, does_not) == (True, False)
    assert (shared.losses, shared.grad_norms) == (alone.losses, alone.grad_norms)
    assert all(torch.equal(value, alone.weights[name]) for name, value in shared.weights.items())


def test_a_word_that_is_no_switch_is_refused() -> None:
    with pytest.raises(DeepSpeedError, match="DS_SHARED_MEMORY=yes says nothing"):
        choose.sharing_of({"DS_SHARED_MEMORY": "yes"})


def rings(rank: int, world_size: int) -> tuple[str, list[Any]]:
    """What a ring in shared memory says beside gloo's circle, calls begun in one order and ended in another."""
    group = dist.group.WORLD
    assert group is not None
    shared, circle = choose.make_ring(group, sharing=choose.Sharing.ALWAYS), choose.make_ring(group)
    answers = []
    for ring in (shared, circle):
        largest, gathered = ring.start_largest([rank, ~rank, -(2**63)]), ring.start_gather([rank * 10, 2**63 - 1])
        forgotten = ring.start_gather([rank]) if ring is shared else None
        answers.append((gathered(), largest()))
        del forgotten  # its room is given back all the same
        answers.append([ring.start_gather([rank, i])() for i in range(shared_module.NUM_MESSAGES + 10)])
    assert shared.num_calls == shared_module.NUM_MESSAGES + 13
    return f"{type(shared).__name__} {type(circle).__name__}", answers


@pytest.mark.parametrize("world_size", [2, 3, pytest.param(5, marks=LONG)])
def test_integers_read_in_shared_memory_are_those_that_go_around_the_circle(world_size: int) -> None:
    for kinds, (one, many, of_circle, many_of_circle) in run_ranks(world_size, rings):
        assert kinds == "SharedRing Circle"
        assert (
            one
            == of_circle
            == (
                [(rank * 10, 2**63 - 1) for rank in range(world_size)],
                (world_size - 1, -1, -(2**63)),
            )
        )
        assert many == many_of_circle


def posts_more_than_is_read(rank: int, world_size: int) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_module, "NUM_MESSAGES", 64)
        exchange = shared_exchange()
        exchange._timeout_s = 0.3
        if rank == 0:
            with pytest.raises(RankMismatchError, match="rank 1 has not sent its part") as caught:
                _ = [exchange.start_all_reduce(torch.ones(4), 1) for _ in range(65)]
        dist.barrier()
    return str(caught.value) if rank == 0 else ""


def test_who_is_a_circle_of_messages_ahead_does_not_wait_for_ever() -> None:
    found, _ = run_ranks(2, posts_more_than_is_read)
    assert "give init_distributed a longer timeout" in found
