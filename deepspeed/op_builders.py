"""The builders of `deepspeed.ops.op_builder`: names by which scripts ask for native operations.

Reached by the legacy paths and by `get_accelerator().create_op_builder`. In the original each compiles an extension on
the user's machine. Here everything native was compiled with the package, so `load` returns the module that does the
work, or says that there is none; and nothing is ever built.

Invariant: `is_compatible()` is true exactly where `load()` returns.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any, ClassVar

from deepspeed.utils.errors import NotAvailableError
from deepspeed.utils.logging import logger


class OpBuilder:
    """One operation. Subclasses are rows of the table below."""

    NAME: ClassVar[str]
    MODULE: ClassVar[str | None]
    SOURCES: ClassVar[tuple[str, ...]]
    INSTEAD: ClassVar[str]

    def load(self, verbose: bool = True) -> ModuleType:
        """The module that has the operation. Raises NotAvailableError where this version has none."""
        if self.MODULE is None or not self.is_compatible():
            raise NotAvailableError(
                f"{type(self).__name__}().load(): {self.NAME} is no native operation in this version.\n  {self.INSTEAD}"
            )
        return importlib.import_module(self.MODULE)

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether `load` returns a module; `verbose` logs why not."""
        found = self.MODULE is not None and importlib.util.find_spec(self.MODULE) is not None
        if verbose and not found:
            logger.warning(f"{self.NAME} is no native operation in this version. {self.INSTEAD}")
        return found

    def builder(self) -> Any:
        """Raises NotAvailableError: there is no extension for setuptools to build."""
        raise NotAvailableError(
            f"{type(self).__name__}().builder(): nothing is built on its own here.\n"
            "  Install the package; setup.py compiles what is native in it."
        )

    def absolute_name(self) -> str:
        """Where the operation is."""
        return self.MODULE or ""

    def sources(self) -> list[str]:
        """The files of the repository that were compiled for it."""
        return list(self.SOURCES)

    def include_paths(self) -> list[str]:
        """None: the sources need the standard library alone."""
        return []

    def cxx_args(self) -> list[str]:
        """None beside those of setup.py."""
        return []

    def nvcc_args(self) -> list[str]:
        """None: no CUDA sources."""
        return []


_KERNELS = ("csrc/optimizers.cpp",)
_NO_KERNELS = "It is computed by torch; call the module or function that you need directly."
_COLLECTIVES = "deepspeed.comm has the collectives, on torch.distributed."

_TABLE: dict[str, tuple[str, str | None, tuple[str, ...], str]] = {
    "AsyncIOBuilder": ("async_io", "deepspeed.tiers.aio", ("csrc/aio.cpp",), ""),
    "GDSBuilder": (
        "gds",
        None,
        (),
        "GPUDirect Storage needs CUDA and cuFile, which are not used: AsyncIOBuilder's aio_handle takes tensors on a GPU too.",
    ),
    "CPUAdamBuilder": ("cpu_adam", "deepspeed.optim.adam", _KERNELS, ""),
    "CPUAdagradBuilder": ("cpu_adagrad", "deepspeed.optim.adagrad", _KERNELS, ""),
    "CPULionBuilder": ("cpu_lion", "deepspeed.optim.lion", _KERNELS, ""),
    "FusedAdamBuilder": ("fused_adam", "deepspeed.optim.adam", _KERNELS, ""),
    "FusedLambBuilder": ("fused_lamb", "deepspeed.optim.lamb", _KERNELS, ""),
    "FusedLionBuilder": ("fused_lion", "deepspeed.optim.lion", _KERNELS, ""),
    "PinMemoryBuilder": ("pin_memory", None, (), "get_accelerator().pin_memory pins tensors."),
    "CCLCommBuilder": ("deepspeed_ccl_comm", None, (), _COLLECTIVES),
    "ShareMemCommBuilder": ("deepspeed_shm_comm", None, (), _COLLECTIVES),
    "NotImplementedBuilder": ("deepspeed_not_implemented", None, (), _NO_KERNELS),
    **{
        f"{prefix}Builder": (name, None, (), _NO_KERNELS)
        for prefix, name in {
            "Quantizer": "quantizer",
            "FPQuantizer": "fp_quantizer",
            "RandomLTD": "random_ltd",
            "SparseAttn": "sparse_attn",
            "Transformer": "transformer",
            "StochasticTransformer": "stochastic_transformer",
            "Inference": "transformer_inference",
            "SpatialInference": "spatial_inference",
            "EvoformerAttn": "evoformer_attn",
            "RaggedOps": "ragged_ops",
            "RaggedUtils": "ragged_device_ops",
            "InferenceCore": "inference_core_ops",
            "InferenceCutlass": "cutlass_ops",
            "DeepCompile": "dc",
        }.items()
    },
}
"""Class: the operation's name, the module that has it, what was compiled for it, and what to use without it."""

BUILDERS: dict[str, type[OpBuilder]] = {
    class_name: type(class_name, (OpBuilder,), {"NAME": name, "MODULE": module, "SOURCES": sources, "INSTEAD": instead})
    for class_name, (name, module, sources, instead) in _TABLE.items()
}

ALL_OPS: dict[str, OpBuilder] = {builder.NAME: builder() for builder in BUILDERS.values()}


def __getattr__(name: str) -> type[OpBuilder]:
    try:
        return BUILDERS[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
