"""Gathers and reductions in int8 and int4 against the same steps in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm.choose import make_exchange
from deepspeed.comm.code import GRADIENTS, WEIGHTS, Code
from deepspeed.comm.feedback import ErrorFeedback
from deepspeed.comm.quantized_exchanges import Hops, QuantizedGather, QuantizedReduction
from deepspeed.comm.relay import Relay, RelayedExchange
from deepspeed.utils.waits import COMMUNICATION
from tests.comm.between_nodes import counted_between_nodes
from tests.engine.runs import LONG
from tests.harness import end_group, run_ranks

CPU = torch.device("cpu")


def values(rank: int, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank)).to(dtype)


@pytest.mark.parametrize("numel", [1, 2, 7, 63, 64, 256, 257, 1000])
@pytest.mark.parametrize("code", [WEIGHTS, GRADIENTS, Code(4, 16)])
def test_a_message_has_the_size_of_the_formula_and_half_a_scale_of_error(code: Code, numel: int) -> None:
    x = values(0, numel)
    message = code.encode(x)
    assert message.dtype is torch.uint8
    assert len(message) == code.nbytes(numel)
    back = code.decode(message, numel)
    assert back.shape == x.shape
    top = 2 ** (code.num_bits - 1) - 1
    for piece, was in zip(back.split(code.group_size), x.split(code.group_size), strict=True):
        assert (piece - was).abs().max() <= was.abs().max() / top / 2 * 1.0001


def test_what_is_not_finite_makes_its_group_nan_and_no_other() -> None:
    x = values(0, 600)
    x[300] = torch.inf
    back = WEIGHTS.decode(WEIGHTS.encode(x), 600)
    assert back[256:512].isnan().all()
    assert back[:256].isfinite().all()
    assert back[512:].isfinite().all()


def gathered(rank: int, world_size: int, dtype: torch.dtype, in_place: bool) -> bool:
    exchange = QuantizedGather(make_exchange(dist.group.WORLD, CPU))
    full = torch.zeros(world_size * 320, dtype=dtype)
    own = values(rank, 320, dtype)
    if in_place:
        full[rank * 320 : (rank + 1) * 320] = own
    exchange.start_all_gather(full, None if in_place else own).wait()
    of_ranks = [values(r, 320, dtype) for r in range(world_size)]
    return torch.equal(full, torch.cat([WEIGHTS.decode(WEIGHTS.encode(x), 320, dtype) for x in of_ranks]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_gather_gives_every_rank_what_every_owner_quantised(world_size: int, dtype: torch.dtype) -> None:
    for in_place in (False, True):
        assert all(run_ranks(world_size, gathered, dtype, in_place))


def gathered_in_hops(rank: int, world_size: int, num_near: int) -> tuple[bool, dict[str, int]]:
    """Whether gathers in two hops, in flight together and waited for in another order on every rank, have the bits of one hop;
    and how many bytes of each this rank sent to others' nodes."""
    grid = torch.arange(world_size).view(-1, num_near)
    hops, made = [], []
    for lists in (grid.tolist(), grid.T.tolist()):
        for ranks in lists:
            group = dist.new_group(ranks)
            if rank in ranks:
                hops.append(make_exchange(group, CPU))
                made.append(group)
    plain = make_exchange(dist.group.WORLD, CPU)
    in_hops = QuantizedGather(RelayedExchange(plain, Relay(*hops)))
    fulls = {
        numel: [torch.zeros(world_size * numel, dtype=torch.bfloat16) for _ in range(2)] for numel in (1, 257, 600)
    }
    pending = []
    for numel, (_, full) in fulls.items():
        own = values(rank, numel, torch.bfloat16)
        if numel == 257:  # in place already
            full[rank * numel : (rank + 1) * numel] = own
        pending.append(in_hops.start_all_gather(full, None if numel == 257 else own))
    for one in pending[rank % 3 :] + pending[: rank % 3]:
        one.wait()
    for numel, (full, _) in fulls.items():
        QuantizedGather(plain).start_all_gather(full, values(rank, numel, torch.bfloat16)).wait()
    sent = {}
    for exchange, kind in ((in_hops, "hops"), (QuantizedGather(plain), "one")):
        with counted_between_nodes(num_near) as nbytes:
            exchange.start_all_gather(torch.zeros(world_size * 600), values(rank, 600)).wait()
        sent[kind] = sum(nbytes)
    for group in made:
        end_group(group)
    return all(torch.equal(*pair) for pair in fulls.values()), sent


@pytest.mark.parametrize(
    ("world_size", "num_near"), [(4, 2), pytest.param(6, 2, marks=LONG), pytest.param(6, 3, marks=LONG)]
)
def test_a_gather_in_two_hops_has_the_bits_of_one_hop_and_crosses_once_for_each_node(
    world_size: int, num_near: int
) -> None:
    num_far = world_size // num_near
    for is_equal, sent in run_ranks(world_size, gathered_in_hops, num_near):
        assert is_equal
        assert sent["hops"] == (num_far - 1) * WEIGHTS.nbytes(600)
        assert sent["one"] == num_near * sent["hops"]


def groups_of(rank: int, num_near: int, num_far: int) -> tuple[Hops, list[dist.ProcessGroup]]:
    made, mine = [], {}
    grid = torch.arange(num_near * num_far).view(num_far, num_near)
    for kind, lists in (("near", grid.tolist()), ("far", grid.T.tolist())):
        for ranks in lists:
            group = dist.new_group(ranks)
            if rank in ranks:
                made.append(group)
                mine[kind] = group if len(ranks) > 1 else None
    return Hops(mine["near"], mine["far"]), made


def reduced(rank: int, world_size: int, num_near: int, numel: int, beta: float | None) -> list[Tensor]:
    hops, made = groups_of(rank, num_near, world_size // num_near)
    feedback = (lambda: ErrorFeedback(beta, 3)) if beta is not None else None
    exchange = QuantizedReduction(make_exchange(dist.group.WORLD, CPU), hops, feedback=feedback)
    outs, pending = [], []
    before = COMMUNICATION.nbytes.get("zero.quantized_far", 0)
    for step in range(4):
        full = values(10 * step + rank, world_size * numel)
        outs.append(torch.ones(numel))
        pending.append(exchange.start_reduce_scatter(full, outs[-1], divide_by=world_size, accumulate=step == 1))
    for one in reversed(pending):
        one.wait()
    num_far = world_size // num_near
    far_nbytes = 4 * num_far * GRADIENTS.nbytes(numel) if num_far > 1 else 0  # of which one slice is the rank's own
    assert COMMUNICATION.nbytes.get("zero.quantized_far", 0) - before == far_nbytes
    for group in made:
        end_group(group)
    return outs


def expected(world_size: int, num_near: int, numel: int, beta: float | None) -> list[list[Tensor]]:
    """outs[step][rank], made in one process."""
    num_far = world_size // num_near
    make = (lambda: ErrorFeedback(beta, 3)) if beta is not None else lambda: None
    near = [[make() for _ in range(num_near)] for _ in range(world_size)]
    far = [[make() for _ in range(num_far)] for _ in range(world_size)]

    def through(x: Tensor, kept: ErrorFeedback | None) -> Tensor:
        message = GRADIENTS.encode(x) if kept is None else kept.encode(x, GRADIENTS)
        return GRADIENTS.decode(message, len(x))

    steps = []
    for step in range(4):
        fulls = [values(10 * step + r, world_size * numel).view(num_far, num_near, numel) for r in range(world_size)]
        sums = {}
        for rank in range(world_size):
            node, place = divmod(rank, num_near)
            said = [
                through(fulls[node * num_near + i][:, place].reshape(-1), near[node * num_near + i][place])
                for i in range(num_near)
            ]
            total = said[0].clone()
            for more in said[1:]:
                total += more
            sums[rank] = total.view(num_far, numel)
        outs = []
        for rank in range(world_size):
            node, place = divmod(rank, num_near)
            if num_far == 1:
                total = sums[rank][0]
            else:
                said = [
                    through(sums[n * num_near + place][node], far[n * num_near + place][node]) for n in range(num_far)
                ]
                total = said[0].clone()
                for more in said[1:]:
                    total += more
            outs.append(total / world_size + (1 if step == 1 else 0))
        steps.append(outs)
    return steps


@pytest.mark.parametrize("beta", [None, 0.8])
@pytest.mark.parametrize(("world_size", "num_near"), [(2, 1), (2, 2), (3, 3), (4, 2)])
def test_a_reduction_in_two_hops_has_the_bits_of_the_same_steps_in_one_process(
    world_size: int, num_near: int, beta: float | None
) -> None:
    wanted = expected(world_size, num_near, 192, beta)
    for rank, outs in enumerate(run_ranks(world_size, reduced, num_near, 192, beta)):
        for step, out in enumerate(outs):
            assert torch.equal(out, wanted[step][rank]), (rank, step)


def test_fed_back_errors_make_the_mean_of_many_messages_exact() -> None:
    x, kept = values(0, 512), ErrorFeedback(0.0, 1000)
    said = sum(GRADIENTS.decode(kept.encode(x, GRADIENTS), 512) for _ in range(200)) / 200
    plain = GRADIENTS.decode(GRADIENTS.encode(x), 512)
    assert (said - x).abs().max() < 0.05 * (plain - x).abs().max()
