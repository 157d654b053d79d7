"""`InferenceEngine`: a model that is called, generates, is timed and compiled.

Made by `initialize.init_inference`. The engine changes the module in place and then stands before it: attributes it does not
have are the module's, so that it can be put where the module was. Equality comes first: what is generated is Hugging Face's
own loop over the module's own forward, and everything faster is put beneath both.

Invariant: nothing of the module is changed before all that can be refused has been.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from deepspeed.accelerator import get_accelerator
from deepspeed.inference import prepare, tensor
from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.inference.limits import check_length
from deepspeed.inference.policy import row_names
from deepspeed.inference.quantized import quantize
from deepspeed.utils.errors import DeepSpeedConfigError, NotAvailableError, TrainingStateError
from deepspeed.utils.logging import warn_once


class InferenceEngine(nn.Module):
    """A model ready to run. `module` is the user's object; everything it has, the engine has too."""

    def __init__(self, model: Any, config: DeepSpeedInferenceConfig | None = None) -> None:
        super().__init__()
        config = config or DeepSpeedInferenceConfig()
        modules = list(_modules_of(model))
        self._config = config
        self._times: list[float] | None = None
        self._is_compiled = False
        _check(modules, config)
        dtypes = [prepare.run_dtype(module, config) for module in modules]
        for key in config.without_effect():
            warn_once(f"init_inference: {key} has no effect.")
        self._ranks = tensor.ranks_of(config)
        decided = [tensor.decide(module, config, self._ranks) for module in modules] if self._ranks else []
        for module, dtype in zip(modules, dtypes, strict=True):
            if self._ranks is not None:
                tensor.cut(module, self._ranks, decided.pop(0))
                self._ranks.compare_first_inputs(module)
            prepare.cast(module, dtype)
            quantize(module, config)
            prepare.place(module, config)
            module.eval()
        self.module = model
        self.mp_world_size = 1
        if self._ranks is not None:
            self.mp_world_size = self._ranks.tensor.size
            self._ranks.same_draws()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("module", self.__dict__.get("_modules", {}).get("module"))
            if module is None or name.startswith("__"):
                raise
            return getattr(module, name)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module answers; timed in `model_times` after `profile_model_time`. Without gradients."""
        if self._times is None:
            return self.module(*args, **kwargs)
        accelerator = get_accelerator()
        accelerator.synchronize()
        start = time.perf_counter()
        outputs = self.module(*args, **kwargs)
        accelerator.synchronize()
        self._times.append((time.perf_counter() - start) * 1e3)
        return outputs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own `generate`, with prompt and answer checked against `max_out_tokens` first.

        Raises TooManyTokensError (a RuntimeError), naming both numbers, before any work.
        """
        generate = getattr(self.module, "generate", None)
        if generate is None:
            raise DeepSpeedConfigError(f"{type(self.module).__name__} has no generate.\n  Call the engine itself.")
        check_length(self.module, self._config.limit, args, kwargs)
        reset = getattr(self.module, "reset_cache", None)
        if callable(reset):
            reset()
        if self._ranks is not None:
            self._ranks.same_draws()
        with torch.no_grad():
            return generate(*args, **kwargs)

    def profile_model_time(self, use_cuda_events: bool = True) -> None:
        """From now on, note how long each forward takes; `use_cuda_events` changes nothing: the device is waited for."""
        if self._times is None:
            self._times = []

    def model_times(self) -> list[float]:
        """Milliseconds of each forward since the last call; forgets them. Raises TrainingStateError before `profile_model_time`."""
        if self._times is None:
            raise TrainingStateError(
                "model_times() before profile_model_time(): no forward was timed.\n  Call it first."
            )
        times, self._times = self._times, []
        if not times and self._config.enable_cuda_graph:
            raise TrainingStateError("model_times() has no times: no forward ran since the last call.")
        return times

    def compile(self, backend: Any = None, compile_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Compile the module in place; `compile_kwargs` are torch.compile's."""
        options = {**(compile_kwargs or {}), **kwargs}
        if backend is not None:
            options["backend"] = backend
        self.module.compile(**options)
        self._is_compiled = True

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` was called."""
        return self._is_compiled

    @property
    def config(self) -> Any:
        """The module's own configuration, where it has one; what `init_inference` was told otherwise."""
        return getattr(self.module, "config", self._config)

    def destroy(self) -> None:
        """Give the module back; the engine holds nothing that outlives it."""
        self._times = None
        if self._ranks is not None:
            self._ranks.release()
            self._ranks = None


def _modules_of(model: Any) -> Iterator[nn.Module]:
    """The module itself; or those that a pipeline has as attributes. Raises DeepSpeedConfigError where there is none."""
    if isinstance(model, nn.Module):
        yield model
        return
    found = (
        [value for value in vars(model).values() if isinstance(value, nn.Module)] if hasattr(model, "__dict__") else []
    )
    if not found or not callable(model):
        raise DeepSpeedConfigError(
            f"init_inference got a {type(model).__name__}, which is no nn.Module and no pipeline that holds some.\n"
            "  Pass the model."
        )
    yield from found


def _check(modules: list[nn.Module], config: DeepSpeedInferenceConfig) -> None:
    """Refuse what contradicts the model, or is not there yet, before anything is changed."""
    if config.injection_policy is not None:
        for module in modules:
            row_names(module, config.injection_policy)
    sizes = config.moe.ep_size if isinstance(config.moe.ep_size, tuple) else (config.moe.ep_size,)
    if config.moe.enabled and max(sizes) > 1:
        raise NotAvailableError(
            f"moe.ep_size = {max(sizes)} is not available yet for inference.\n  Run every expert on one rank."
        )
    older = config.checkpoint_config
    if config.checkpoint is not None or config.save_mp_checkpoint_path or any(older.model_dump().values()):
        raise NotAvailableError("loading a checkpoint in init_inference is not available yet.\n  Load it before.")
    if config.enable_cuda_graph:
        warn_once("enable_cuda_graph = true has no effect: forwards are not recorded.")
    if config.replace_with_kernel_inject:
        for module in modules:
            warn_once(f"{type(module).__name__} has no fused kernels here: it runs unfused.")
