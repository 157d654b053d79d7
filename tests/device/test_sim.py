"""The simulated device is what it stands for: other memory than the host's, queues, and an order that is checked."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.accelerator import get_accelerator
from tests.device import group, sim
from tests.harness import run_ranks

SIM = "sim"


def on_device(rank: int, world_size: int, name: str) -> None:
    globals()[name]()


def run(name: str) -> None:
    """A function of this file in a process that has the device."""
    run_ranks(1, on_device, name, device=SIM)


def mixing() -> None:
    x = torch.ones(2, device=SIM)
    with pytest.raises(RuntimeError, match=r"same device.*sim:0 and cpu"):
        x + torch.ones(2)
    with pytest.raises(RuntimeError, match=r"same device.*sim:0 and sim:1"):
        x + torch.ones(2, device="sim:1")
    assert (x + torch.tensor(1.0)).tolist() == [2.0, 2.0]


def test_tensors_of_two_devices_do_not_mix() -> None:
    run("mixing")


def memory() -> None:
    before = torch.sim.memory_allocated()
    x = torch.empty(1000, device=SIM)
    assert torch.sim.memory_allocated() - before == x.nbytes
    assert x.isnan().all()
    x.untyped_storage().resize_(0)
    assert torch.sim.memory_allocated() == before
    assert torch.sim.max_memory_allocated() >= before + 4000


def test_memory_is_counted_and_fresh_memory_is_poison() -> None:
    run("memory")


def numbers() -> None:
    torch.manual_seed(0)
    here = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1))
    x = torch.randn(4, 8)
    results = []
    for device in ("cpu", SIM):
        model = here.to(device)
        model.zero_grad()
        model(x.to(device)).square().mean().backward()
        results.append([parameter.grad.cpu().clone() for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operators_give_the_bits_of_the_cpu() -> None:
    run("numbers")


def waits() -> None:
    x = torch.ones(3, device=SIM)
    with sim.watched() as seen:
        y = x * 2 + 1
        pinned = torch.empty(3, pin_memory=True)
        pinned.copy_(y, non_blocking=True)
        y.copy_(pinned, non_blocking=True)
    assert seen.sites == []
    with sim.watched() as seen:
        y.sum().item()
        y.cpu()
        y.copy_(torch.ones(3))
        torch.nonzero(y)
        torch.sim.synchronize()
    assert [site.partition(" in ")[0] for site in seen.sites] == [
        "item",
        "copy_ to the host",
        "copy_ from pageable memory or blocking",
        "aten::nonzero",
        "device.synchronize",
    ]


def test_what_makes_the_host_wait_is_told() -> None:
    run("waits")


def side_stream() -> tuple[Tensor, torch.Stream]:
    sim.reset(0)
    return torch.zeros(4, device=SIM), torch.Stream(device=SIM)


def unordered_use() -> None:
    x, side = side_stream()
    with (
        torch.sim.stream(side),
        pytest.raises(RuntimeError, match=r"race: aten::add_ on stream \d+ writes bytes 0 to 16.*zero_ on the default"),
    ):
        x.add_(1)
    sim.reset()


def test_work_on_two_streams_that_nothing_orders_is_a_named_race() -> None:
    run("unordered_use")


def ordered_use() -> None:
    x, side = side_stream()
    side.wait_stream(torch.sim.current_stream())
    with torch.sim.stream(side):
        x.add_(1)
    torch.sim.current_stream().wait_stream(side)
    assert x.tolist() == [1.0] * 4
    sim.check()
    sim.reset()


def test_a_wait_orders_streams() -> None:
    run("ordered_use")


def early_free() -> None:
    x, side = side_stream()
    side.wait_stream(torch.sim.current_stream())
    with torch.sim.stream(side):
        x.add_(1)
    del x
    with pytest.raises(
        RuntimeError,
        match=r"race: memory block \d+ is freed on the default stream while aten::add_ on stream \d+ may still use it",
    ):
        sim.check()
    x, side = side_stream()
    side.wait_stream(torch.sim.current_stream())
    with torch.sim.stream(side):
        x.add_(1)
    x.record_stream(side)
    del x
    sim.check()
    sim.reset()


def test_memory_freed_under_another_streams_work_is_a_race_without_record_stream() -> None:
    run("early_free")


def late_copy() -> None:
    sim.reset(0)
    x = torch.ones(4, device=SIM)
    host = torch.zeros(4, pin_memory=True)
    host.copy_(x, non_blocking=True)
    assert host.isnan().all()
    event = torch.Event(SIM)
    event.record()
    event.synchronize()
    assert host.tolist() == [1.0] * 4
    x.copy_(host, non_blocking=True)
    host.fill_(7)  # too early: the copy has not read it
    assert x.tolist() == [7.0] * 4
    sim.reset()


def test_a_copy_that_nobody_waited_for_has_not_happened() -> None:
    run("late_copy")


def asked_while_it_runs() -> None:
    sim.reset(0)
    has_begun, is_asked, answers = threading.Event(), threading.Event(), []

    def work() -> None:
        has_begun.set()
        answers.append(is_asked.wait(20))

    group._queued[-1] = ([], work)
    x = torch.zeros(1, device=SIM)
    torch.ops.sim.host_work([x], [], "work", -1)
    event = torch.Event(SIM)
    event.record()
    waiter = threading.Thread(target=event.synchronize)
    waiter.start()
    assert has_begun.wait(20)
    assert not event.query()
    is_asked.set()
    waiter.join()
    assert event.query()
    assert answers == [True]
    sim.reset()


def test_asking_does_not_wait_for_work_that_another_thread_waits_for() -> None:
    run("asked_while_it_runs")


def collectives(rank: int, world_size: int, seed: int | None) -> None:
    sim.reset(seed)
    device = torch.device(SIM, rank)
    full = torch.arange(4.0, device=device) + rank
    work = dist.all_reduce(full, async_op=True)
    work.wait()
    assert full.tolist() == [1.0, 3.0, 5.0, 7.0]
    out = torch.empty(2, device=device)
    dist.reduce_scatter_tensor(out, full)
    assert out.tolist() == [[2.0, 6.0], [10.0, 14.0]][rank]
    dist.all_gather_into_tensor(full, out)
    assert full.tolist() == [2.0, 6.0, 10.0, 14.0]
    dist.broadcast(full.mul_(rank + 1), 1)
    assert full[0].item() == 4.0
    sim.check()
    sim.reset()


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_collectives_are_queued_and_give_what_gloo_gives(seed: int | None) -> None:
    run_ranks(2, collectives, seed, device=SIM)


def missing_wait(rank: int, world_size: int) -> None:
    sim.reset(0)
    full = torch.ones(4, device=torch.device(SIM, rank))
    work = dist.all_reduce(full, async_op=True)
    with pytest.raises(
        RuntimeError, match=r"race: aten::mul on the default stream reads .* that \S*all_reduce on stream \d+ writes"
    ):
        full * 2
    work.wait()
    assert (full * 2).tolist() == [4.0] * 4
    sim.reset()


def test_a_collective_that_nobody_waited_for_is_a_named_race() -> None:
    run_ranks(2, missing_wait, device=SIM)


def door() -> None:
    accelerator = get_accelerator()
    assert (accelerator.name, accelerator.device_name(1)) == (SIM, "sim:1")
    assert accelerator.communication_backend_name() == SIM
    assert accelerator.on_accelerator(accelerator.FloatTensor([1.0]).to(SIM))
    assert accelerator.total_memory() >= accelerator.available_memory() > 0
    accelerator.manual_seed_all(3)
    first = torch.rand(2, device=SIM)
    accelerator.manual_seed_all(3)
    assert torch.equal(first, torch.rand(2, device=SIM))
    assert accelerator.pin_memory(torch.ones(2)).is_pinned()


def test_get_accelerator_takes_a_device_that_a_package_brings() -> None:
    run("door")
