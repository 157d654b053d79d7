"""Flat buffers that reductions borrow: what is kept of them, and the views that buckets have."""

from __future__ import annotations

import torch

from deepspeed.zero.gradients import FlatPool

CPU = torch.device("cpu")


def test_a_buffer_is_lent_again_to_buckets_that_fill_at_least_half_of_it() -> None:
    pool = FlatPool()
    first = pool.take(100, torch.float32, CPU)
    address = first.flat.data_ptr()
    pool.give_back(first)
    second = pool.take(60, torch.float32, CPU)
    assert (second.flat.numel(), second.flat.data_ptr()) == (60, address)
    pool.give_back(second)
    assert pool.take(49, torch.float32, CPU).flat.data_ptr() != address
    assert pool.take(100, torch.float32, CPU).flat.data_ptr() == address


def test_dtypes_do_not_share_buffers() -> None:
    pool = FlatPool()
    pool.give_back(pool.take(100, torch.float32, CPU))
    assert pool.take(100, torch.bfloat16, CPU).flat.dtype == torch.bfloat16
    assert pool.nbytes == 400


def test_whatever_the_sizes_no_more_is_kept_than_the_largest() -> None:
    pool = FlatPool()
    for buffer in [pool.take(numel, torch.float32, CPU) for numel in (10, 300, 50, 200, 200)]:
        pool.give_back(buffer)
    assert 0 < pool.nbytes <= 4 * 300
    pool.clear()
    assert pool.nbytes == 0
