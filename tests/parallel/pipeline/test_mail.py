"""Messages between stages: awaited ahead, whatever shapes come, and forgotten when they have left."""

from __future__ import annotations

import random
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.parallel.pipeline.actions import Action, Actions, Op
from deepspeed.parallel.pipeline.form import form_of
from deepspeed.parallel.pipeline.layers import PipelineError
from deepspeed.parallel.pipeline.mail import Mail, Post
from deepspeed.parallel.pipeline.postbox import MOST_GUESSES, MOST_PACKED
from deepspeed.parallel.pipeline.routes import Key, Way, routes_of
from deepspeed.parallel.pipeline.schedules import gpipe, interleaved, one_f_one_b, zb_h2, zb_v
from tests.harness import end_group, run_ranks
from tests.parallel.pipeline.models import LONG

WIDTHS = (3, 3, 5, 3, 7, 7, 9, 9, 2, 3, 5, 5, 5, 4, 4, 3)


def test_a_message_says_how_many_of_the_receiver_s_were_taken_before_it() -> None:
    routes = routes_of(one_f_one_b(3, 4), 1)
    assert routes.due[Way(0, True)] == tuple(Key(1, micro, True) for micro in range(4))
    assert routes.to_send[Way(0, False)] == tuple(Key(0, micro, False) for micro in range(4))
    assert Way(0, False) not in routes.due and Way(2, True) not in routes.due
    # Rank 0 sends three activations before it takes a gradient, rank 2 each gradient after one more activation.
    assert [routes.taken_before[Key(1, micro, True)] for micro in range(4)] == [(0, 0), (0, 0), (0, 0), (1, 0)]
    assert [routes.taken_before[Key(1, micro, False)] for micro in range(4)] == [(0, 1), (0, 2), (0, 3), (0, 4)]


def _values(micro: int) -> list[Tensor | None]:
    width = WIDTHS[micro % len(WIDTHS)]
    return [torch.full((2, width), float(micro)), None, torch.tensor([True, False]), torch.empty(0, width)]


def _post(rank: int) -> tuple[Post, list[Any]]:
    made = [dist.new_group([0, 1]), dist.new_group([0, 1])]
    groups = {(forward, up): made[not forward] for forward in (True, False) for up in (True, False)}
    return Post([0, 1], rank, groups, torch.device("cpu")), made


def _exchange(rank: int, world: int) -> dict[str, Any]:
    post, made = _post(rank)
    actions, num_kept = one_f_one_b(2, len(WIDTHS)), []
    for _ in range(2):  # what the first engine awaited is still awaited when the second begins
        mail = Mail(post)
        for _ in range(2):
            mail.begin(actions)
            for stage, op, micro in actions.lists[rank]:
                is_forward = op is Op.FORWARD
                if is_forward is (rank == 1):
                    parcel = mail.receive(Key(stage, micro, is_forward), 1 - rank)
                    for got, sent in zip(parcel.values, _values(micro), strict=True):
                        assert (got is None) is (sent is None)
                        assert got is None or (torch.equal(got, sent) and got.dtype is sent.dtype)
                else:
                    mail.send(1 - rank, Key(1 - stage, micro, is_forward), _values(micro), True)
                assert all(len(inbox._guesses) <= MOST_GUESSES for inbox in post.inboxes.values())  # type: ignore[attr-defined]
                num_kept.append(sum(len(outbox._under_way) for outbox in post.outboxes.values()))
            mail.wait_sent()
    dist.barrier()
    for group in made:
        end_group(group)
    return {"kept": max(num_kept), "control": mail.control_bytes_sent, "sent": mail.bytes_sent}


def test_shapes_that_change_all_the_time_arrive_whole_and_what_left_is_let_go() -> None:
    for found in run_ranks(2, _exchange):
        assert found["control"] == 2 * 8 * len(WIDTHS)  # the second engine describes nothing again
        assert found["sent"] == 2 * sum(2 * 4 * width + 2 for width in WIDTHS)
        assert found["kept"] <= 3 * 4  # of 16 messages of three parts (and a text): those the other rank may not have


FIRST_NBYTES = (8, 8, 4 * MOST_PACKED, 4 * MOST_PACKED, 8, MOST_PACKED, MOST_PACKED)


def _count_messages(rank: int, world: int) -> list[int]:
    """How many messages of the transport each of ours took, and that they arrived."""
    post, made = _post(rank)
    way, found = Way(1 - rank, True), list[int]()
    for micro, nbytes in enumerate(FIRST_NBYTES):
        values: list[Tensor | None] = [torch.full((nbytes // 4,), float(micro)), torch.full((2,), -micro)]
        if rank == 0:
            with mock.patch.object(dist, "isend", side_effect=dist.isend) as sent:
                post.outbox(way).send(values, form_of(values, True))
            found.append(sent.call_count)
        else:
            parcel = post.inbox(way).take()
            assert all(map(torch.equal, parcel.values, values))  # type: ignore[union-attr]
            assert parcel.values[0].data_ptr() % 64 == 0  # type: ignore[union-attr]
    if rank == 0:
        post.outbox(way).wait_sent()
    dist.barrier()
    for group in made:
        end_group(group)
    return found


def test_a_message_of_the_last_one_s_form_has_its_first_value_in_one_piece_with_what_announces_it() -> None:
    # A second value each; the first of its form has a text; what is too large to copy goes by itself.
    assert run_ranks(2, _count_messages)[0] == [4, 2, 4, 3, 3, 4, 2]


def _failing(rank: int, world: int) -> list[str]:
    post, made = _post(rank)
    mail, found = Mail(post), []
    actions: Actions = gpipe(2, 4)
    for fails in (True, False):
        mail.begin(actions)
        if rank == 0:
            for micro in range(2 if fails else 4):
                mail.send(1, Key(1, micro, True), [torch.full((3,), float(micro))], False)
            if fails:
                mail.tell_failure("out of patience")
        for micro in range(1 if rank else 0) if fails else range(4 if rank else 0):
            (value,) = mail.receive(Key(1, micro, True), 0).values
            assert value is not None and value.tolist() == [micro] * 3
        if rank == 1 and not fails:
            found.append(f"{Action(1, Op.FORWARD, 3)} arrived")
        logs: list[Any] = [None, None]
        dist.all_gather_object(logs, mail.log)
        mail.drain(logs)
    dist.barrier()
    for group in made:
        end_group(group)
    return found


def test_what_nobody_reads_after_a_failure_does_not_reach_the_next_batch() -> None:
    assert run_ranks(2, _failing) == [[], ["1F3 arrived"]]


# At random. ----------------------------------------------------------------------------------------------------------

SHAPES = ((2, 3), (3, 2), (), (0, 4), (1, 300), (MOST_PACKED // 4 + 1,))
KINDS = (torch.float32, torch.int64, torch.bool, torch.bfloat16, torch.complex64)


def _parcel(seed: int, key: Key, num_forms: int) -> list[Tensor | None]:
    """What a message of a seed has: of few forms or of many, the same for sender and receiver."""
    which = random.Random(f"{seed} {key}")
    form = random.Random(f"{seed} {which.randrange(num_forms)}")
    made: list[Tensor | None] = []
    for _ in range(form.randint(1, 4)):
        if form.random() < 0.15:
            made.append(None)
            continue
        fill, kind = which.randrange(2), form.choice(KINDS)
        made.append(torch.full(form.choice(SHAPES), which.randrange(100) if kind is not torch.bool else fill).to(kind))
    return made


def _list_of(seed: int, world: int) -> tuple[Actions, dict[int, int], int]:
    """A list, after how many actions which ranks fail, and how many forms there are."""
    chosen = random.Random(seed)
    makers = [gpipe, one_f_one_b, zb_h2, zb_v, lambda p, m: interleaved(p, p * m, 2)]
    actions = chosen.choice(makers)(world, chosen.randint(1, 9))
    failing = chosen.sample(range(world), chosen.choice((0, 0, 1, 1, 2)))
    return actions, {rank: chosen.randrange(len(actions.lists[rank])) for rank in failing}, chosen.choice((1, 2, 9))


def _same(got: Tensor | None, sent: Tensor | None) -> bool:
    return got is sent is None or (
        got is not None and sent is not None and got.dtype is sent.dtype and torch.equal(got, sent)
    )


def _carry_out(mail: Mail, rank: int, seed: int, world: int, naps: random.Random) -> str:
    """One list; the words that it failed with."""
    actions, fails_at, num_forms = _list_of(seed, world)
    mail.begin(actions)
    last, rank_of = actions.num_stages - 1, actions.rank_of
    try:
        for at, (stage, op, micro) in enumerate(actions.lists[rank]):
            if fails_at.get(rank) == at:
                raise PipelineError(f"rank {rank} in {seed}")
            if naps.random() < 0.2:
                time.sleep(naps.random() * 2e-3)
            if op is Op.WEIGHT:
                continue
            is_forward = op is Op.FORWARD
            before, after = (stage - 1, stage + 1) if is_forward else (stage + 1, stage - 1)
            if 0 <= before <= last:
                key = Key(stage, micro, is_forward)
                got = mail.receive(key, rank_of[before]).values
                assert all(map(_same, got, _parcel(seed, key, num_forms))), (seed, key)
            if 0 <= after <= last:
                key = Key(after, micro, is_forward)
                mail.send(rank_of[after], key, _parcel(seed, key, num_forms), True)
    except PipelineError as error:
        mail.tell_failure(str(error))
        return str(error)
    return ""


def _at_random(rank: int, world: int, seeds: list[int]) -> int:
    ranks = list(range(world))
    made = [dist.new_group(ranks), dist.new_group(ranks)]
    groups = {(forward, up): made[not forward] for forward in (True, False) for up in (True, False)}
    post, num_failed = Post(ranks, rank, groups, torch.device("cpu")), 0
    mail = Mail(post)
    for seed in seeds:
        words = _carry_out(mail, rank, seed, world, random.Random(f"{seed} {rank}"))
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, (words, mail.log))
        failing = _list_of(seed, world)[1]
        if failing:
            mail.drain([log for _, log in everyone])
            num_failed += 1
        elif seed % 3 == 0:  # otherwise some of it is still on its way in the next list, as with late steps
            mail.wait_sent()
        assert any(said for said, _ in everyone) == bool(failing), (seed, everyone)
        assert all(not said or int(said.split()[1]) in failing for said, _ in everyone), (seed, everyone)
        if seed % 5 == 0:
            mail = Mail(post)  # the next engine's
    dist.barrier()
    for group in made:
        end_group(group)
    return num_failed


@pytest.mark.quick("3")
@pytest.mark.parametrize("world", [2, 3])
def test_any_list_of_any_forms_arrives_whole_however_late_ranks_are_and_whoever_fails(world: int) -> None:
    seeds = list(range(1500 if LONG else 60))
    for num_failed in run_ranks(world, _at_random, seeds, timeout=900 if LONG else 60):
        assert len(seeds) / 3 < num_failed < len(seeds)
