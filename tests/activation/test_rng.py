"""Named random states: apart from the default one, and repeatable."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from deepspeed.activation.rng import (
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
    model_parallel_reconfigure_tp_seed,
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    get_cuda_rng_tracker().reset()
    yield
    get_cuda_rng_tracker().reset()


def draw(seed: int, count: int = 1) -> list[float]:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()


def test_default_and_model_parallel_states_have_the_seeds_of_the_contract() -> None:
    model_parallel_cuda_manual_seed(11)
    assert torch.rand(1).tolist() == draw(11)
    with get_cuda_rng_tracker().fork():
        assert torch.rand(1).tolist() == draw(11 + 2718)
    assert torch.rand(1).item() == draw(11, 2)[1], "the default state went on from where it was"
    with get_cuda_rng_tracker().fork():
        assert torch.rand(1).item() == draw(11 + 2718, 2)[1]


def test_a_state_can_be_seeded_anew() -> None:
    model_parallel_cuda_manual_seed(11)
    model_parallel_reconfigure_tp_seed(20)
    with get_cuda_rng_tracker().fork():
        assert torch.rand(1).tolist() == draw(20 + 2718)


def test_states_are_taken_and_put_back() -> None:
    tracker = get_cuda_rng_tracker()
    tracker.add("mine", 5)
    states = tracker.get_states()
    with tracker.fork("mine"):
        first = torch.rand(1)
    tracker.set_states(states)
    with tracker.fork("mine"):
        assert torch.equal(torch.rand(1), first)


def test_an_error_inside_leaves_the_states_in_order() -> None:
    model_parallel_cuda_manual_seed(1)
    with pytest.raises(RuntimeError, match="inside"), get_cuda_rng_tracker().fork():
        torch.rand(1)
        raise RuntimeError("inside")
    assert torch.rand(1).tolist() == draw(1)


def test_duplicates_and_unknown_names_are_refused() -> None:
    tracker = get_cuda_rng_tracker()
    tracker.add("mine", 5)
    with pytest.raises(Exception, match="the random state 'mine' exists already"):
        tracker.add("mine", 6)
    with pytest.raises(Exception, match="the random seed 5 is used"):
        tracker.add("other", 5)
    with pytest.raises(Exception, match=r"no random state 'none' \(there are: 'mine'\)"), tracker.fork("none"):
        pass
