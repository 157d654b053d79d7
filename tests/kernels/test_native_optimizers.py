"""The compiled loops: the same bits on every instruction set, thread count and cut; torch's numbers or better."""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from deepspeed.kernels import native
from deepspeed.kernels.native_optimizers import Columns, Decay, Operation, step_
from deepspeed.optim import kernels

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16, FP16]

LOOPS: list[tuple[Operation, int, int, list[float]]] = [
    *((Operation.ADAM, d, 2, [0.5, 0.9, 0.1, 0.999, 0.001, 0.01, 50.0, 1e-6]) for d in Decay),
    (Operation.ADAM, Decay.NONE, 2, [1.0, 0.1, 0.9, 0.2, 0.8, 0.0, 50.0, 1e-6]),
    *((Operation.LION, d, 1, [0.5, 0.9, 0.1, 0.99, 0.01, 0.01, 0.02]) for d in (Decay.NONE, Decay.DECOUPLED)),
    *((Operation.ADAGRAD, has_decay, 1, [0.5, 0.1, 0.02, 1e-10]) for has_decay in (0, 1)),
    (Operation.SGD, 0, 0, [0.5, 0.1, 0.02, 0.0, 1.0]),
    *((Operation.SGD, form, 1, [0.5, 0.1, 0.02, 0.9, 0.7]) for form in (1, 2)),
    *((Operation.LAMB_MOMENTS, i, 2, [0.5, 0.9, 0.1, 0.999, 0.001, 0.01, 2.0, 5.0, 1e-6]) for i in (0, 1)),
    *((Operation.LAMB_APPLY, i, 2, [1.0, 0.9, 0.1, 0.999, 0.001, 0.01, 2.0, 5.0, 1e-6, 0.02]) for i in (0, 1)),
]
"""Operation, variant, number of states, scalars."""

SPECIAL = torch.tensor(
    [
        0.0,
        -0.0,
        1e-45,
        -1e-40,
        6e-8,
        6.1e-5,
        65504.0,
        65520.0,
        -7e4,
        1e20,
        3.4e38,
        -3.4e38,
        torch.inf,
        -torch.inf,
        torch.nan,
    ]
)


@pytest.fixture(autouse=True)
def _best_isa() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    native.use_isa()
    torch.set_num_threads(threads)


@functools.lru_cache(maxsize=None)
def numbers(numel: int, seed: int) -> Tensor:
    """Random numbers of all magnitudes among which special ones are strewn."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator) * 10 ** torch.randint(-6, 3, (numel,), generator=generator)
    at = torch.randperm(numel, generator=generator)[: numel // 5]
    x[at] = SPECIAL[torch.randint(0, len(SPECIAL), (len(at),), generator=generator)]
    return x


def values(numel: int, dtype: torch.dtype, seed: int, offset: int = 0, positive: bool = False) -> Tensor:
    """`numbers` in a dtype, `offset` elements into their memory."""
    x = numbers(numel, seed)
    return torch.empty(numel + offset, dtype=dtype)[offset:].copy_(x.abs() if positive else x)


def stepped(
    loop: tuple[Operation, int, int, list[float]],
    numel: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype | None],
    *,
    cuts: tuple[int, ...] = (),
    offset: int = 0,
) -> list[Tensor]:
    """What a loop leaves of the same inputs, as integers, NaN as one of its bit patterns; in pieces between `cuts`."""
    operation, variant, num_states, scalars = loop
    param, grad = values(numel, dtypes[0], 1, offset), values(numel, dtypes[1], 2, offset)
    states = [values(numel, dtypes[2], 3 + i, offset, positive=i == 1) for i in range(num_states)]
    low = None if dtypes[3] is None else torch.zeros(numel + offset, dtype=dtypes[3])[offset:]
    pieces = [slice(a, b) for a, b in itertools.pairwise([0, *cuts, numel])]
    columns = Columns(
        [param[piece] for piece in pieces],
        None if operation is Operation.LAMB_APPLY else [grad[piece] for piece in pieces],
        *([state[piece] for piece in pieces] for state in states),
        *[None] * (2 - num_states),  # type: ignore[arg-type]
        lows=None if low is None else [low[piece] for piece in pieces],
    )
    squares = torch.empty(len(pieces), 2, dtype=torch.float64) if operation is Operation.LAMB_MOMENTS else None
    assert step_(operation, variant, columns, [scalars] * len(pieces), squares)
    left = [param, *states, *([] if low is None else [low]), *([] if squares is None or cuts else [squares])]
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [t.masked_fill(t.isnan(), torch.nan).view(ints[t.element_size()]) for t in left]


def assert_same_bits(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} differ"


MIXES = [
    *((FP32, grad, FP32, low) for grad in DTYPES for low in (None, BF16, FP16)),
    *((p, g, s, None) for p in (BF16, FP16) for g in (p, FP32) for s in (FP32, p)),
    (FP32, BF16, BF16, BF16),
]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: f"{loop[0].name}-{int(loop[1])}")
def test_results_are_the_same_on_every_instruction_set(loop: Any, isa: str) -> None:
    for dtypes, (numel, offset) in itertools.product(MIXES, [(1, 0), (19, 3), (2100, 1)]):
        native.use_isa("portable")
        expected = stepped(loop, numel, dtypes, offset=offset)
        native.use_isa(isa)
        assert_same_bits(stepped(loop, numel, dtypes, offset=offset), expected)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: f"{loop[0].name}-{int(loop[1])}")
def test_results_do_not_depend_on_threads_or_cuts(loop: Any, isa: str) -> None:
    numel, dtypes = 150_001, (FP32, BF16, FP32, FP16)
    torch.set_num_threads(1)
    whole = stepped(loop, numel, dtypes)
    for num_threads in (2, 5):
        torch.set_num_threads(num_threads)
        assert_same_bits(stepped(loop, numel, dtypes), whole)
    in_pieces = stepped(loop, numel, dtypes, cuts=(1, 2, 40_007, 40_007, 72_775, 149_998))
    assert_same_bits(in_pieces, whole[: len(in_pieces)])


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_value_of_low_precision_widens_exactly(dtype: torch.dtype, isa: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    param = torch.zeros(len(every))
    assert step_(Operation.SGD, 0, Columns([param], [every]), [[1.0, 0.0, -1.0, 0.0, 1.0]])
    torch.testing.assert_close(param, every.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("numel", [300_001, (4 << 20) + 33])
def test_copies_round_to_nearest_even_and_keep_nan(dtype: torch.dtype, isa: str, numel: int) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (numel,), generator=generator)
    bits[::3] = bits[::3] & ~0xFFFF | 0x8000  # half way between two neighbours in bf16
    bits[1::3] = bits[1::3] & ~0x1FFF | 0x1000  # and in fp16
    bits[5::7] = bits[5::7] & 0x8FFFFFFF | 0x30000000  # the magnitudes that fp16 has
    param = bits.to(torch.int32).view(torch.float32)
    expected = param.to(dtype)
    low = torch.zeros(numel + 1, dtype=dtype)[1:]
    assert step_(Operation.SGD, 0, Columns([param], [torch.zeros(numel)], lows=[low]), [[1.0, 0.0, 0.0, 0.0, 1.0]])
    is_number = ~expected.isnan()
    assert torch.equal(low[is_number].view(torch.int16), expected[is_number].view(torch.int16))
    assert torch.equal(low.isnan(), ~is_number)


def adam_errors(step: Callable[..., None], num_steps: int, seed: int) -> tuple[float, float]:
    """Greatest and mean error of the parameters after some AdamW steps, in units of |p| + lr, against float64."""
    generator = torch.Generator().manual_seed(seed)
    n, lr, b1, b2, eps, decay = 20_000, 1e-3, 0.9, 0.999, 1e-8, 0.01
    p = torch.randn(n, generator=generator) * 0.05
    m, v, exact_p = torch.zeros(n), torch.zeros(n), p.double()
    exact_m, exact_v = m.double(), v.double()
    for t in range(1, num_steps + 1):
        g = torch.randn(n, generator=generator) * 10 ** torch.empty(n).uniform_(-6, 0, generator=generator)
        step([p], [g], [m], [v], [torch.tensor(float(t))], lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay)
        exact_m = b1 * exact_m + (1 - b1) * g.double()
        exact_v = b2 * exact_v + (1 - b2) * g.double() ** 2
        update = exact_m / (1 - b1**t) / ((exact_v / (1 - b2**t)).sqrt() + eps)
        exact_p = exact_p * (1 - lr * decay) - lr * update
    error = (p.double() - exact_p).abs() / (exact_p.abs() + lr)
    return error.max().item(), error.mean().item()


def torch_fused(
    p: Any, g: Any, m: Any, v: Any, t: Any, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    torch._fused_adamw_(p, g, m, v, [], t, amsgrad=False, lr=lr, beta1=betas[0], beta2=betas[1],
                        weight_decay=weight_decay, eps=eps, maximize=False, grad_scale=None, found_inf=None)  # fmt: skip


@pytest.mark.parametrize("num_steps", [1, 5, 60])
def test_adam_is_no_further_from_float64_than_torchs(num_steps: int, isa: str) -> None:
    def ours(*tensors: Any, **settings: Any) -> None:
        kernels.adam_(*tensors, decoupled=True, bias_correction=True, **settings)

    for seed in range(2):
        largest, mean = adam_errors(ours, num_steps, seed)
        torch_largest, torch_mean = adam_errors(torch_fused, num_steps, seed)
        assert largest <= torch_largest
        assert mean <= torch_mean


def test_second_moments_that_overflowed_stay_infinite_as_in_torch(isa: str) -> None:
    gradients = [torch.tensor([g]) for g in (1e22, 1.0, 1e20, torch.inf, 1.0)]
    for skipped in range(4):
        ours, theirs = ([torch.ones(1), torch.zeros(1), torch.zeros(1)] for _ in range(2))
        for t, g in enumerate(gradients[skipped:], start=1):
            settings: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
            step = torch.tensor(float(t))
            kernels.adam_(
                [ours[0]], [g], [ours[1]], [ours[2]], [step], decoupled=True, bias_correction=True, **settings
            )
            torch_fused([theirs[0]], [g], [theirs[1]], [theirs[2]], [step], **settings)
            torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_denormals_are_flushed_as_torch_is_told_to_and_alike_on_all_threads(isa: str) -> None:
    numel = 200_000
    torch.set_num_threads(2)
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        try:
            param = torch.zeros(numel)
            step_(Operation.SGD, 0, Columns([param], [torch.full((numel,), 2e-38)]), [[0.25, 0.0, -1.0, 0.0, 1.0]])
        finally:
            torch.set_flush_denormal(False)
        assert param.count_nonzero().item() == (0 if flush else numel)


def test_tensors_in_another_memory_order_are_stepped_in_it() -> None:
    param, grad, sums = (values(12, FP32, seed, positive=True).nan_to_num(1, 1, 1).view(3, 4).t() for seed in range(3))
    expected = [t.contiguous() for t in (param, grad, sums)]
    assert step_(Operation.ADAGRAD, 0, Columns([param], [grad], [sums]), [[1.0, 0.0, 0.1, 1e-10]])
    step_(Operation.ADAGRAD, 0, Columns(*([t] for t in expected)), [[1.0, 0.0, 0.1, 1e-10]])
    torch.testing.assert_close([param, sums], [expected[0], expected[2]], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("param", "grad", "low"),
    [
        (torch.zeros(4, dtype=torch.float64), torch.zeros(4), None),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int32), None),
        (torch.zeros(8)[::2], torch.zeros(8)[::2], None),
        (torch.zeros(4, 2), torch.zeros(2, 4).t(), None),
        (torch.zeros(4), torch.zeros(5), None),
        (torch.zeros(4), torch.zeros(4), torch.zeros(4)),
        (torch.zeros(4, device="meta"), torch.zeros(4, device="meta"), None),
    ],
)
def test_what_the_loops_do_not_take_is_left_to_torch(param: Tensor, grad: Tensor, low: Tensor | None) -> None:
    columns = Columns([torch.zeros(2), param], [torch.ones(2), grad], lows=[None, low])
    assert not step_(Operation.SGD, 0, columns, [[1.0, 0.0, 1.0, 0.0, 1.0]] * 2)
    assert columns.params[0].tolist() == [0, 0]


def test_states_of_different_dtypes_are_left_to_torch() -> None:
    columns = Columns(*([torch.zeros(4, dtype=dtype)] for dtype in (FP32, FP32, FP32, BF16)))
    assert not step_(Operation.ADAM, 0, columns, [[1.0] * 9])


def test_runs_of_different_dtypes_and_sizes_go_in_one_call() -> None:
    params = [torch.ones(n, dtype=dtype) for n, dtype in [(3, FP32), (0, FP32), (5, BF16), (70_000, FP32)]]
    grads = [torch.full_like(p, 2.0, dtype=dtype) for p, dtype in zip(params, [FP16, FP32, BF16, FP16], strict=True)]
    assert step_(Operation.SGD, 0, Columns(params, grads), [[1.0, 0.0, lr, 0.0, 1.0] for lr in (0.5, 1, 0.25, 1)])
    assert [set(p.tolist()) for p in params] == [{0.0}, set(), {0.5}, {-1.0}]


def _sgd_of_ones(numel: int) -> Tensor:
    param = torch.zeros(numel)
    step_(Operation.SGD, 0, Columns([param], [torch.ones(numel)]), [[1.0, 0.0, -1.0, 0.0, 1.0]])
    return param


def test_steps_from_several_threads_at_once_are_right() -> None:
    torch.set_num_threads(3)
    results: list[bool] = []

    def work() -> None:
        results.extend(bool((_sgd_of_ones(100_000 + i) == 1).all()) for i in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 80


def test_a_forked_child_steps_too() -> None:
    torch.set_num_threads(2)
    assert (_sgd_of_ones(200_000) == 1).all()
    columns = Columns([torch.zeros(200_000)], [torch.ones(200_000)])
    child = os.fork()
    if child == 0:
        step_(Operation.SGD, 0, columns, [[1.0, 0.0, -1.0, 0.0, 1.0]])
        torch.set_num_threads(1)  # torch's own threads do not survive a fork
        os._exit(0 if bool((columns.params[0] == 1).all()) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_an_instruction_set_that_is_forced_stays_until_it_is_released() -> None:
    library = native.library()
    assert library is not None
    native.use_isa("portable")
    assert native.isas()[library.ds_isa_chosen()] == "portable"
    native.use_isa()
    assert library.ds_isa_chosen() == 0
