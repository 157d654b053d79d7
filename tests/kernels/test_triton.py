"""The Triton kernels: torch's numbers in Triton's interpreter, and compiled for the GPUs people have. No GPU is needed."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepspeed.kernels import native_quantize
from deepspeed.kernels.reference import quantize as reference
from deepspeed.kernels.reference import signs as reference_signs
from deepspeed.kernels.table import pick
from deepspeed.optim import kernels
from deepspeed.utils.errors import DeepSpeedError
from tests.harness import run_alone

# Not imported here: the interpreter must be chosen before Triton is imported, and a worker imports this module first.
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not packaged for this platform")

SHAPES = [(3, 5), (1,), (8192,), (8193,), (1000, 17), (0,), ()]
"""Around the size of a chunk, and awkward ones."""
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.manual_seed(0)


def _lists(*dtypes: torch.dtype) -> list[list[Tensor]]:
    """Columns of tensors; the third and fourth are states, and the fourth is not negative."""
    columns = [[torch.randn(shape).to(dtype) for shape in SHAPES] for dtype in dtypes]
    return [[t.abs() if i == 3 else t for t in column] for i, column in enumerate(columns)]


def _close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        tolerance = {FP32: 1e-6, BF16: 1e-2, FP16: 2e-3}[one.dtype]
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def _copies(columns: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[tensor.clone() for tensor in column] for column in columns]


def _adam_equals_torch(dtypes: tuple[torch.dtype, ...], low: torch.dtype | None, settings: dict[str, Any]) -> None:
    _interpret()
    from deepspeed.kernels.triton.adam import TritonAdam

    columns = _lists(*dtypes)
    steps = [torch.tensor(float(i + 1)) for i in range(len(SHAPES))]
    lows = None if low is None else [torch.zeros(shape, dtype=low) for shape in SHAPES]
    theirs, their_lows = _copies(columns), None if lows is None else [t.clone() for t in lows]
    assert TritonAdam()(*columns, steps, lows=lows, **settings)
    kernels.adam_(*theirs, steps, lows=their_lows, **settings)
    for ours, other in zip([*columns, lows or []], [*theirs, their_lows or []], strict=True):
        _close(ours, other)


ADAM = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "decoupled": True, "bias_correction": True}


@pytest.mark.parametrize(
    ("dtypes", "low", "changes"),
    [
        ((FP32,) * 4, None, {}),
        ((FP32,) * 4, None, {"decoupled": False}),
        ((FP32,) * 4, None, {"bias_correction": False, "weight_decay": 0.0}),
        ((FP32, BF16, FP32, FP32), BF16, {"grad_factor": 0.125}),
        ((FP32, FP16, BF16, BF16), FP16, {}),
    ],
)
def test_adam_equals_torch_in_any_mix_of_dtypes(dtypes: Any, low: Any, changes: Any) -> None:
    run_alone(_adam_equals_torch, dtypes, low, {**ADAM, **changes})


def _lion_equals_torch() -> None:
    _interpret()
    from deepspeed.kernels.triton.lion import TritonLion

    for dtypes, low in (((FP32,) * 3, None), ((FP32, BF16, FP32), BF16)):
        columns = _lists(*dtypes)
        columns[1][0].zero_()
        columns[2][0].zero_()  # a direction of zero has no sign
        lows = None if low is None else [torch.zeros(shape, dtype=low) for shape in SHAPES]
        theirs, their_lows = _copies(columns), None if lows is None else [t.clone() for t in lows]
        settings = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "grad_factor": 0.5}
        assert TritonLion()(*columns, lows=lows, **settings)
        kernels.lion_(*theirs, lows=their_lows, **settings)
        for ours, other in zip([*columns, lows or []], [*theirs, their_lows or []], strict=True):
            _close(ours, other)


def test_lion_equals_torch() -> None:
    run_alone(_lion_equals_torch)


def _lamb_equals_torch(settings: dict[str, Any], low: torch.dtype | None) -> None:
    _interpret()
    from deepspeed.kernels.triton.lamb import TritonLamb

    columns = _lists(FP32, BF16, FP32, FP32)
    steps = [torch.tensor(float(i + 1)) for i in range(len(SHAPES))]
    theirs = _copies(columns)
    of = kernels.LambSettings(1e-2, (0.9, 0.999), 1e-6, 0.1, **settings)
    lamb = TritonLamb()
    squares = lamb.moments(*columns, steps, grad_factor=0.5, **of.shape())
    assert squares is not None
    expected, updates = kernels.lamb_moments_(*theirs, steps, of, 0.5)
    torch.testing.assert_close(squares, expected, rtol=1e-5, atol=1e-6)
    ratios = torch.linspace(0.5, 2, len(SHAPES))
    lows = None if low is None else [torch.zeros(shape, dtype=low) for shape in SHAPES]
    their_lows = None if lows is None else [t.clone() for t in lows]
    lamb.apply(columns[0], *columns[2:], steps, ratios, lr=of.lr, lows=lows, **of.shape())
    kernels.lamb_apply_(theirs[0], *theirs[2:], steps, of, updates, ratios, their_lows)
    for ours, other in zip([*columns, lows or []], [*theirs, their_lows or []], strict=True):
        _close(ours, other)


@pytest.mark.parametrize("low", [None, BF16])
@pytest.mark.parametrize(
    "settings",
    [
        {"bias_correction": True, "eps_inside_sqrt": False},
        {"bias_correction": False, "eps_inside_sqrt": True},
    ],
)
def test_lamb_equals_torch(settings: Any, low: Any) -> None:
    run_alone(_lamb_equals_torch, settings, low)


def _quantisation_is_bitwise(dtype: torch.dtype) -> None:
    _interpret()
    from deepspeed.kernels.triton import quantize as triton

    for numel, group_size in ((320, 64), (231, 33), (4000, 1000), (10, 2), (7, 1), (0, 4)):
        x = (torch.randn(numel) * 3).to(dtype)
        x[:group_size] = 0
        for num_bits, symmetric in ((8, True), (8, False), (4, True), (4, False)):
            if num_bits == 4 and group_size % 2:
                continue
            ours = triton.quantize(x, group_size, num_bits, symmetric=symmetric)
            theirs = reference.quantize(x, group_size, num_bits, symmetric=symmetric)
            for one, other in zip(ours, theirs, strict=True):
                assert one is other is None or torch.equal(one, other)
            for out in (FP32, BF16, FP16):
                assert torch.equal(triton.dequantize(ours, num_bits, out), reference.dequantize(theirs, num_bits, out))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_quantisation_equals_the_reference_bit_for_bit(dtype: torch.dtype) -> None:
    run_alone(_quantisation_is_bitwise, dtype)


def _bad_groups_are_found() -> None:
    _interpret()
    from deepspeed.kernels.triton import quantize as triton

    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(128)
        x[70] = bad
        for num_bits in (8, 4):
            for symmetric in (True, False):
                ours = triton.quantize(x, 64, num_bits, symmetric=symmetric)
                theirs = reference.quantize(x, 64, num_bits, symmetric=symmetric)
                assert reference.has_bad_groups(ours)
                assert reference.has_bad_groups(theirs)
                assert torch.equal(ours.values, theirs.values)
                assert not reference.has_bad_groups(ours._replace(scales=ours.scales[:1]))


def test_nan_and_infinity_are_found_in_their_group() -> None:
    run_alone(_bad_groups_are_found)


def _signs_are_bitwise() -> None:
    _interpret()
    from deepspeed.kernels.triton import signs as triton

    for numel in (8, 4096, 4104, 20000):
        errors = [torch.randn(numel), torch.zeros(0)]
        errors[1] = errors[0].clone()
        x = torch.randn(numel)
        x[0] = -errors[0][0]
        ours, theirs = triton.compress_signs(x, errors[0]), reference_signs.compress_signs(x, errors[1])
        sums = [torch.randn(numel), torch.zeros(0)]
        sums[1] = sums[0].clone()
        triton.add_signs(*(ours[0], sums[0], ours[1]))
        reference_signs.add_signs(*(theirs[0], sums[1], theirs[1]))
        for one, other in zip([*ours, errors[0], sums[0]], [*theirs, errors[1], sums[1]], strict=True):
            assert torch.equal(one, other)


def test_signs_equal_the_reference_bit_for_bit() -> None:
    run_alone(_signs_are_bitwise)


GROUPS = [
    # (rows per group, in, out): a group without rows, one row, more than a tile; widths of no tile; no rows at all
    ([70, 0, 1, 130], 33, 65),
    ([5, 64], 64, 64),
    ([0, 3, 0], 1, 7),
    ([0, 0], 16, 16),
]


def _grouped_products_equal_a_loop(dtype: torch.dtype) -> None:
    _interpret()
    from deepspeed.kernels.grouped import looped
    from deepspeed.kernels.triton.grouped import grouped_product

    for counts, inner, columns in GROUPS:
        for is_transposed in (False, True):
            weight = torch.randn(len(counts), columns, inner).to(dtype) / inner**0.5
            weight = weight.transpose(1, 2) if is_transposed else weight.transpose(1, 2).contiguous()
            rows = torch.randn(sum(counts) + 1, inner + 3).to(dtype)[
                1:, 3:
            ]  # neither starts nor ends where memory does
            found = []
            for product in (looped, grouped_product):
                left, right = rows.detach().requires_grad_(), weight.detach().requires_grad_()
                result = product(left, right, counts)
                gradients = torch.autograd.grad(result, (left, right), torch.ones(1, 1, dtype=dtype).expand_as(result))
                found.append([result, *gradients])
            for ours, theirs in zip(found[1], found[0], strict=True):
                tolerance = 1e-5 if dtype is FP32 else 2e-2
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_grouped_products_equal_a_loop_at_awkward_sizes(dtype: torch.dtype) -> None:
    run_alone(_grouped_products_equal_a_loop, dtype)


def _attention_equals_the_reference(dtype: torch.dtype) -> None:
    _interpret()
    from deepspeed.kernels.reference.attention import decode_attention as expected
    from deepspeed.kernels.triton.attention import decode_attention
    from tests.kernels.test_attention import case

    for shape in ((2, 8, 2, 31, 64), (1, 7, 1, 300, 80), (3, 6, 3, 513, 48)):
        arguments = case(shape, dtype)
        batch, heads, _, positions, _ = shape
        starts = torch.arange(batch) % positions
        ranges = torch.stack([starts, torch.full((batch,), positions) - starts // 2], 1)
        bias = torch.randn(1, heads, positions)
        bias[:, :, ::3] = -torch.inf
        extras: list[dict[str, Tensor]] = [
            {},
            {"ranges": ranges, "bias": bias},
            {"bias": torch.full((1, 1, 1), -torch.inf)},
        ]
        for extra in extras:
            found = decode_attention(**arguments, **extra)
            torch.testing.assert_close(found, expected(**arguments, **extra), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.int8])
def test_attention_over_a_cache_equals_the_reference(dtype: torch.dtype) -> None:
    run_alone(_attention_equals_the_reference, dtype)


def _products_equal_the_dequantized_weight(dtype: torch.dtype) -> None:
    _interpret()
    from deepspeed.kernels.triton.products import MAX_ROWS, quantized_product

    tolerance = {FP32: 1e-5, BF16: 2e-2, FP16: 3e-3}[dtype]
    for rows, columns, width, group in ((1, 7, 64, 64), (3, 33, 90, 18), (MAX_ROWS, 64, 192, 32), (2, 1, 2, 2)):
        x = torch.randn(rows + 1, 1, width).to(dtype)[1:]
        weight, bias = torch.randn(columns * width) / width**0.5, torch.randn(columns).to(dtype)
        for num_bits, symmetric in ((8, True), (8, False), (4, True), (4, False)):
            held = reference.quantize(weight, group, num_bits, symmetric=symmetric)
            whole = reference.dequantize(held, num_bits, dtype).view(columns, width)
            for added in (None, bias):
                found = quantized_product(x, held, num_bits, columns, added)
                assert found is not None
                assert found.dtype is dtype
                expected = torch.nn.functional.linear(
                    x.double(), whole.double(), added if added is None else added.double()
                )
                torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert quantized_product(torch.randn(MAX_ROWS + 1, width).to(dtype), held, num_bits, columns, None) is None
    assert quantized_product(torch.randn(1, width, dtype=torch.float64), held, num_bits, columns, None) is None


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_products_with_integers_equal_those_of_the_dequantized_weight(dtype: torch.dtype) -> None:
    run_alone(_products_equal_the_dequantized_weight, dtype)


def _refuses() -> None:
    _interpret()
    from deepspeed.kernels.triton.adam import TritonAdam

    adam = TritonAdam()
    steps = [torch.ones(())]
    wide = [[torch.randn(4, dtype=torch.float64)] for _ in range(4)]
    crossed = [[torch.randn(4, 4)], [torch.randn(4, 4).t()], [torch.randn(4, 4)], [torch.randn(4, 4)]]
    gaps = [[torch.randn(4, 8)[:, :4]] for _ in range(4)]
    for columns in (wide, crossed, gaps):
        before = _copies(columns)
        assert not adam(*columns, steps, **ADAM)
        for ours, other in zip(columns, before, strict=True):
            assert torch.equal(ours[0], other[0])


def test_what_a_kernel_does_not_take_is_left_unchanged() -> None:
    run_alone(_refuses)


def _tables_are_reused() -> None:
    _interpret()
    from deepspeed.kernels.triton.lists import TableCache

    cache = TableCache(max_kept=2)
    lists = [[[torch.randn(3)], [torch.randn(3)]] for _ in range(3)]
    first = cache.table(lists[0])
    assert cache.table(lists[0]) is first
    cache.table(lists[1])
    cache.table(lists[2])
    assert cache.table(lists[0]) is not first


def test_a_table_is_made_once_while_addresses_stay_and_few_are_kept() -> None:
    run_alone(_tables_are_reused)


SCALARS = {"num_tensors": "i32", "group_size": "i32", "numel": "i64"}
POINTERS = {
    "corrections": "*fp32", "sums": "*fp32", "out": "*fp32", "ratios": "*fp32", "scales": "*fp32", "minima": "*fp32",
    "x": "*bf16", "values": "*i8",
}  # fmt: skip
TABLES = ("addresses", "numels", "owners", "starts", "firsts")


_STRIDES = "inner columns row_stride row_step gradient_stride gradient_step group_stride inner_stride column_stride"
PRODUCTS = {
    **dict.fromkeys(("rows", "weight", "gradient", "out"), "*bf16"), **dict.fromkeys(("tiles", "starts"), "*i64"),
    **dict.fromkeys(_STRIDES.split(), "i32"),
}  # fmt: skip
_SIZES = "shared positions dim num_chunks key_of_batch key_of_head key_of_row value_of_batch value_of_head value_of_row"
ATTENTION = {
    **dict.fromkeys(("query", "out"), "*bf16"), **dict.fromkeys(_SIZES.split(), "i32"), "ranges": "*i64",
    **dict.fromkeys(("key_scales", "value_scales", "bias", "tops", "sums", "parts"), "*fp32"),
}  # fmt: skip
QUANTIZED = {
    **dict.fromkeys(("x", "bias", "out"), "*bf16"), **dict.fromkeys(("scales", "minima"), "*fp32"),
    **dict.fromkeys(("num_rows", "num_columns", "width", "group_size"), "i32"),
}  # fmt: skip
SIGNS = {"x": "*fp32", "error": "*fp32", "into": "*fp32", "bits": "*u8", "scale": "*fp32", "sums": "*fp64"}


def _compile(kernel: Any, constants: dict[str, Any], target: Any, pointers: dict[str, str] = POINTERS) -> None:
    import triton
    from triton.compiler import ASTSource

    is_old = "constants" in inspect.signature(ASTSource).parameters  # Triton 3.2, torch 2.6's
    signature, constexprs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            constexprs[name if is_old else (i,)] = constants[name]
            if not is_old:
                signature[name] = "constexpr"
        elif name in TABLES:
            signature[name] = "*i64"
        else:
            signature[name] = pointers.get(name) or SCALARS.get(name, "fp32")
    source = ASTSource(kernel, signature, constexprs)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False})
    assert compiled.asm.keys() & {"cubin", "hsaco"}


def _compile_all(backend: str, arch: Any, warp: int) -> None:
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    from deepspeed.kernels.triton import adam, attention, grouped, lamb, lion, products, quantize, signs

    target = GPUTarget(backend, arch, warp)
    types = {"param_type": tl.float32, "grad_type": tl.bfloat16, "state_type": tl.float32, "low_type": tl.bfloat16}
    sizes = {"chunk_numel": 8192, "block": 1024}
    _compile(adam.adam_kernel, {**types, **sizes, "decay": 1, "has_low": True}, target)
    _compile(lion.lion_kernel, {**types, **sizes, "has_low": True}, target)
    _compile(lamb.moments_kernel, {**types, **sizes, "eps_inside": False}, target)
    _compile(lamb.apply_kernel, {**types, **sizes, "eps_inside": False, "has_low": True}, target)
    _compile(lamb.sums_kernel, {"block": 128}, target)
    for num_bits, symmetric in ((8, True), (4, True), (4, False)):
        form = {"num_bits": num_bits, "symmetric": symmetric, "half_block": 64}
        _compile(quantize.quantize_kernel, form, target)
        _compile(quantize.dequantize_kernel, {**form, "out_type": tl.float32}, target)
        tiles = {"padded_rows": 16, "tile": 32, "pairs": 32, "kind": tl.bfloat16, "widens": False, "has_bias": True}
        held = {**QUANTIZED, "values": "*i8" if num_bits == 8 else "*u8"}
        form = {"num_bits": num_bits, "symmetric": symmetric, **tiles}
        _compile(products.product_kernel, form, target, held)
    _compile(signs.add_and_square_kernel, {"block": 4096}, target, SIGNS)
    _compile(signs.take_signs_kernel, {"num_bytes": 512}, target, SIGNS)
    _compile(signs.add_signs_kernel, {"block": 4096}, target, SIGNS)
    for is_int8 in (False, True):
        tiles = {"num_heads": 4, "padded_heads": 4, "padded_dim": 128, "chunk": 256, "tile": 32}
        cache = {**ATTENTION, **dict.fromkeys(("keys", "values"), "*i8" if is_int8 else "*bf16")}
        _compile(attention.chunk_kernel, {**tiles, "is_int8": is_int8, "has_bias": True}, target, cache)
    _compile(attention.combine_kernel, {"padded_dim": 128}, target, ATTENTION)
    _compile(
        grouped.multiply_kernel, {"num_rows": 64, "num_columns": 64, "block": 32, "widens": False}, target, PRODUCTS
    )
    _compile(
        grouped.weight_kernel, {"num_inner": 64, "num_columns": 64, "block": 32, "widens": False}, target, PRODUCTS
    )


def _links_for_amd() -> bool:
    """Whether Triton brings a linker for AMD's code, as it does since 3.3, or the machine has one."""
    version = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    return version >= (3, 3) or Path(os.environ.get("TRITON_HIP_LLD_PATH", "/opt/rocm/llvm/bin/ld.lld")).exists()


@pytest.mark.parametrize(("backend", "arch", "warp"), [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)])
def test_every_kernel_compiles_for_gpus(backend: str, arch: Any, warp: int) -> None:
    if backend == "hip" and not _links_for_amd():
        pytest.skip("this Triton needs ROCm's ld.lld")
    run_alone(_compile_all, backend, arch, warp, timeout=110)


def test_a_cpu_is_given_compiled_loops_and_an_unknown_operation_is_refused() -> None:
    assert pick("quantize", "cpu") is native_quantize.quantize
    assert pick("quantize", "hpu") is reference.quantize
    assert pick("adam", "cpu") is None
    with pytest.raises(DeepSpeedError, match="'fft' is not an operation of the table: adam, add_signs"):
        pick("fft", "cpu")
