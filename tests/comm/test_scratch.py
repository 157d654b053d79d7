"""What an exchange keeps for its next messages."""

from __future__ import annotations

import random

import torch

from deepspeed.comm.exchange import NUM_KEPT, Scratch, Shelf


def test_a_block_is_lent_again_to_messages_that_fill_at_least_half_of_it() -> None:
    shelf: Shelf[str] = Shelf(2)
    assert shelf.take(100) is None
    shelf.give_back(100, "a")
    assert shelf.take(49) is None
    assert shelf.take(101) is None
    assert shelf.take(50) == (100, "a")
    assert shelf.take(50) is None
    assert shelf.nbytes == 0


def test_the_smallest_block_that_fits_is_taken() -> None:
    shelf: Shelf[str] = Shelf(2)
    assert shelf.take(130) is None
    for nbytes, block in ((130, "c"), (100, "a"), (110, "b")):
        shelf.give_back(nbytes, block)
    assert shelf.take(105) == (110, "b")


def test_whatever_the_sizes_no_more_is_kept_than_a_few_of_the_largest() -> None:
    random.seed(0)
    shelf: Shelf[int] = Shelf(NUM_KEPT)
    sizes = [random.randint(1, 1000) for _ in range(200)]
    lent = []
    for size in sizes:
        found = shelf.take(size)
        lent.append(found[0] if found else size)
    given_up = [size for nbytes in lent for size in shelf.give_back(nbytes, nbytes)]
    assert shelf.nbytes <= NUM_KEPT * max(sizes)
    assert shelf.nbytes + sum(given_up) == sum(lent)


def test_scratch_has_the_length_and_dtype_of_the_message_and_its_memory_is_used_again() -> None:
    scratch = Scratch()
    first = scratch.take(8, torch.float32)
    assert first.shape == (8,) and first.dtype == torch.float32
    address = first.data_ptr()
    scratch.give_back([first])
    assert scratch.nbytes == 32
    second = scratch.take(9, torch.bfloat16)
    assert second.shape == (9,) and second.dtype == torch.bfloat16 and second.data_ptr() == address
    other = scratch.take(9, torch.bfloat16)
    assert other.data_ptr() != address


def test_scratch_taken_in_inference_mode_can_be_used_outside() -> None:
    scratch = Scratch()
    with torch.inference_mode():
        scratch.give_back([scratch.take(4, torch.float32)])
    scratch.take(4, torch.float32).add_(1)


def test_whoever_gives_back_is_told_whether_memory_was_given_up() -> None:
    scratch = Scratch()
    lent = [scratch.take(8, torch.float32) for _ in range(NUM_KEPT + 1)]
    assert not scratch.give_back(lent[:-1])
    assert scratch.give_back(lent[-1:])
