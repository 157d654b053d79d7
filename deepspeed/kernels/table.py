"""Which operation has which implementation, and which of them a device takes: one table.

Asked by the optimizers, by everything that quantises, and by models that generate; a new kernel is a row here and a module beside the others.

Rows name modules instead of importing them: Triton is imported by the first operation on a device that runs it, never
by `import deepspeed`. Where Triton is not installed, the next implementation runs and one warning says what is slower.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any, NamedTuple

from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.logging import warn_once

TRITON_DEVICES = frozenset({"cuda", "xpu"})
"""Device types that Triton compiles for; ROCm's GPUs are "cuda" to torch."""


class Implementation(NamedTuple):
    """A function or class of a module. Classes are made once per process: their objects keep tables in device memory."""

    module: str
    name: str
    is_class: bool = False

    def load(self) -> Any:
        """Import it."""
        found = getattr(importlib.import_module(f"deepspeed.kernels.{self.module}"), self.name)
        return found() if self.is_class else found


TABLE: dict[str, dict[str, Implementation]] = {
    "adam": {"triton": Implementation("triton.adam", "TritonAdam", is_class=True)},
    "lamb": {"triton": Implementation("triton.lamb", "TritonLamb", is_class=True)},
    "lion": {"triton": Implementation("triton.lion", "TritonLion", is_class=True)},
    "quantize": {
        "triton": Implementation("triton.quantize", "quantize"),
        "native": Implementation("native_quantize", "quantize"),
        "torch": Implementation("reference.quantize", "quantize"),
    },
    "dequantize": {
        "triton": Implementation("triton.quantize", "dequantize"),
        "native": Implementation("native_quantize", "dequantize"),
        "torch": Implementation("reference.quantize", "dequantize"),
    },
    "compress_signs": {
        "triton": Implementation("triton.signs", "compress_signs"),
        "native": Implementation("native_quantize", "compress_signs"),
        "torch": Implementation("reference.signs", "compress_signs"),
    },
    "add_signs": {
        "triton": Implementation("triton.signs", "add_signs"),
        "native": Implementation("native_quantize", "add_signs"),
        "torch": Implementation("reference.signs", "add_signs"),
    },
    "add_up": {
        "native": Implementation("native_sums", "add_up"),
        "torch": Implementation("reference.sums", "add_up"),
    },
    "grouped_product": {"triton": Implementation("triton.grouped", "grouped_product")},
    "quantized_product": {
        "triton": Implementation("triton.products", "quantized_product"),
        "native": Implementation("native_products", "quantized_product"),
    },
    "decode_attention": {
        "triton": Implementation("triton.attention", "decode_attention"),
        "native": Implementation("native_attention", "decode_attention"),
        "torch": Implementation("reference.attention", "decode_attention"),
    },
}
"""The optimizers' torch implementations are in `optim.kernels`, beside the compiled loops' calls."""


@functools.cache
def pick(operation: str, device_type: str) -> Any:
    """The best implementation of an operation for a device type; None where there is none but the caller's own.

    Raises DeepSpeedError for an operation that is not in the table.
    """
    if operation not in TABLE:
        raise DeepSpeedError(f"{operation!r} is not an operation of the table: {', '.join(sorted(TABLE))}.")
    row = TABLE[operation]
    if "triton" in row and device_type in TRITON_DEVICES:
        if importlib.util.find_spec("triton") is not None:
            return row["triton"].load()
        warn_once(
            f"Triton is not installed: {operation} on {device_type} runs on torch's kernels, with more passes over memory.\n"
            "  Install torch's build for this device, which brings it, or `pip install triton`."
        )
    if "native" in row and device_type == "cpu":
        return row["native"].load()
    return row["torch"].load() if "torch" in row else None
