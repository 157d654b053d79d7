from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed.config import BatchSizes, DeepSpeedConfigError, load_config, resolve_batch
from deepspeed.config.batch import Given

COUNTED_BY = "torch.distributed"
small = st.integers(1, 64)


def resolve(train: Given, micro: Given, accumulation: Given, world: int = 8) -> BatchSizes:
    return resolve_batch(train, micro, accumulation, data_parallel_size=world, size_source=COUNTED_BY)


def message(train: Given, micro: Given, accumulation: Given, world: int = 8) -> str:
    with pytest.raises(DeepSpeedConfigError) as caught:
        resolve(train, micro, accumulation, world)
    return str(caught.value)


@given(small, small, small)
def test_whatever_is_left_out_is_computed(micro: int, accumulation: int, world: int) -> None:
    train = micro * accumulation * world
    for sizes in (
        resolve(train, micro, accumulation, world),
        resolve(train, micro, None, world),
        resolve(train, None, accumulation, world),
        resolve(None, micro, accumulation, world),
    ):
        assert (sizes.train, sizes.micro, sizes.accumulation) == (train, micro, accumulation)


@given(small, small)
def test_one_size_alone_means_no_accumulation(micro: int, world: int) -> None:
    for sizes in (resolve(micro * world, None, None, world), resolve(None, micro, None, world)):
        assert (sizes.train, sizes.micro, sizes.accumulation) == (micro * world, micro, 1)


optional = st.none() | st.integers(1, 200)


@given(optional, optional, optional, small)
def test_sizes_satisfy_the_equation_or_there_are_none(
    train: int | None, micro: int | None, accumulation: int | None, world: int
) -> None:
    try:
        sizes = resolve(train, micro, accumulation, world)
    except DeepSpeedConfigError:
        return
    assert sizes.train == sizes.micro * sizes.accumulation * world
    assert min(sizes.train, sizes.micro, sizes.accumulation) > 0


@given(st.integers(1, 500), optional, optional, small)
def test_every_size_the_cure_proposes_is_accepted(
    train: int, micro: int | None, accumulation: int | None, world: int
) -> None:
    try:
        resolve(train, micro, accumulation, world)
    except DeepSpeedConfigError as error:
        proposed = re.search(r"(?:set it|Set train_batch_size) to ([\d or]+),", str(error))
        assert proposed is not None
        for size in proposed[1].split(" or "):
            resolve(int(size), micro, accumulation, world)


def test_the_origin_of_each_number_is_kept() -> None:
    assert resolve(64, 4, None).origins == {
        "train_batch_size": "given",
        "train_micro_batch_size_per_gpu": "given",
        "gradient_accumulation_steps": "computed",
        "data-parallel world size": COUNTED_BY,
    }
    assert resolve(64, None, None).origins["gradient_accumulation_steps"] == "default"


def test_a_contradiction_shows_every_number_its_origin_and_the_cure() -> None:
    assert message(48, 4, 2).splitlines() == [
        "Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * gradient_acc_step * "
        "world_size 48 != 4 * 2 * 8",
        "  train_batch_size = 48 (given)",
        "  train_micro_batch_size_per_gpu = 4 (given)",
        "  gradient_accumulation_steps = 2 (given)",
        "  data-parallel world size = 8 (torch.distributed)",
        "  Set train_batch_size to 64, or remove one of the three keys to have it computed.",
    ]


@pytest.mark.parametrize(
    ("given_sizes", "words"),
    [
        ((50, 4, None), ["50 != 4 * 1 * 8", "computed from the others", "multiple of 32: set it to 32 or 64"]),
        ((4, 4, None), ["4 != 4 * 0 * 8", "multiple of 32: set it to 32,"]),
        ((4, None, None), ["4 != 0 * 1 * 8", "= 1 (default, not given)", "multiple of 8: set it to 8,"]),
        ((10, None, 3), ["multiple of 24: set it to 24,"]),
        ((None, None, None), ["Either train_batch_size or train_micro_batch_size_per_gpu", "gives no batch size"]),
        (
            (None, None, 2),
            ["gradient_accumulation_steps = 2 alone does not say", "Give train_micro_batch_size_per_gpu"],
        ),
        (("auto", None, None), ['train_batch_size = "auto"', "Hugging Face Trainer", "give a number"]),
        ((8, None, "auto"), ['gradient_accumulation_steps = "auto"']),
        ((0, None, None), ["train_batch_size = 0 is too small", "at least 1"]),
    ],
)
def test_an_error_says_what_to_change(given_sizes: tuple[Given, Given, Given], words: list[str]) -> None:
    text = message(*given_sizes)
    assert [word for word in words if word not in text] == []


def test_a_size_that_counts_ranks_which_share_layers_is_divided_by_them(warned: pytest.LogCaptureFixture) -> None:
    sizes = resolve_batch(16, 2, 1, data_parallel_size=4, size_source=COUNTED_BY, num_sharers=2)
    assert (sizes.train, sizes.micro, sizes.accumulation) == (8, 2, 1)
    assert "train_batch_size = 16 counts each of the 2 ranks that share layers" in warned.text
    assert resolve_batch(8, 2, 1, data_parallel_size=4, size_source=COUNTED_BY, num_sharers=2).train == 8
    with pytest.raises(DeepSpeedConfigError, match="Set train_batch_size to 8"):
        resolve_batch(32, 2, 1, data_parallel_size=4, size_source=COUNTED_BY, num_sharers=2)


def test_one_process_where_more_were_meant_is_hinted_at() -> None:
    assert "deepspeed script.py" in message(8, 4, 1, world=1)
    assert "deepspeed script.py" not in message(8, 4, 1, world=3)


def test_auto_matters_only_when_sizes_are_resolved() -> None:
    config = load_config({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"})
    assert config.train_batch_size is None
    with pytest.raises(DeepSpeedConfigError, match='train_batch_size = "auto" was never replaced'):
        config.batch_sizes(data_parallel_size=2, size_source=COUNTED_BY)


def test_sizes_written_as_strings_are_numbers() -> None:
    config = load_config({"train_batch_size": "8", "train_micro_batch_size_per_gpu": 4.0})
    assert config.batch_sizes(data_parallel_size=2, size_source=COUNTED_BY).accumulation == 1
