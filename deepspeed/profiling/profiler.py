"""The flops profiler: operations, parameters and time of every module of a model.

`FlopsProfiler` around any code that runs the model; `get_model_profile` for a model and an input shape; and the section
`flops_profiler`, for which the engine drives a `FlopsProfiler` through one step (`engine/observe.py`). The contract is the
original's; what is counted is what ran (`counter.py`), backward included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepspeed.accelerator.peak import measured_peak
from deepspeed.profiling import text
from deepspeed.profiling.flame import flame_chart
from deepspeed.profiling.tree import Profile
from deepspeed.profiling.watch import ModuleWatch
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.figures import number, seconds


class FlopsProfiler:
    """Profiles whatever runs `model` between `start_profile` and `stop_profile`.

    Counts and times in one pass, so that times include the counting; `get_model_profile` and the engine take them in
    passes of their own. `ds_engine` is accepted for callers that pass their engine. `recompute_fwd_factor` is the share of
    forward that backward repeats; it is used for the estimate where no backward runs inside.
    """

    def __init__(self, model: nn.Module, ds_engine: Any = None, recompute_fwd_factor: float = 0.0) -> None:
        self.model = model
        self.ds_engine = ds_engine
        self.recompute_fwd_factor = recompute_fwd_factor
        self.started = False
        self.watch: ModuleWatch | None = None
        self._running = ExitStack()
        self._profile: Profile | None = None

    def start_profile(self, ignore_list: Sequence[type[nn.Module]] | None = None) -> None:
        """Begin anew; modules of the classes in `ignore_list` are left out."""
        self.end_profile()
        self.open(ignore_list)
        assert self.watch is not None
        self._running.enter_context(self.watch.timing())
        self._running.enter_context(self.watch.counting())

    def open(self, ignore_list: Sequence[type[nn.Module]] | None = None) -> None:
        """Attach to the model, and leave counting and timing to whoever called (`watch.counting()`, `watch.timing()`)."""
        self.watch = ModuleWatch(self.model, ignore_list or ())
        self.watch.attach()
        self.started = True
        self._profile = None

    def stop_profile(self) -> None:
        """Stop counting; the numbers stay."""
        self._running.close()

    def reset_profile(self) -> None:
        """Forget the numbers, and go on counting if that is running."""
        if self.watch is not None:
            self.start_profile(self.watch._ignored)

    def end_profile(self) -> None:
        """Stop, take the hooks away and forget the numbers."""
        self._running.close()
        if self.watch is not None:
            self.watch.detach()
        self.watch, self._profile, self.started = None, None, False

    @property
    def profile(self) -> Profile:
        """The numbers. Raises DeepSpeedError before `start_profile`."""
        if self.watch is None:
            raise DeepSpeedError("the flops profiler has no numbers.\n  Call start_profile() before the model runs.")
        if self._profile is None:
            self._profile = Profile(self.watch.root, recompute_factor=self.recompute_fwd_factor)
        self._profile.root = self.watch.finish()
        self._profile.update_flops = self.watch.update_flops
        return self._profile

    def get_total_flops(self, as_string: bool = False) -> Any:
        """Operations of forward."""
        return number(self.profile.root.flops, "FLOPs") if as_string else self.profile.root.flops

    def get_total_macs(self, as_string: bool = False) -> Any:
        """Multiply-adds of forward."""
        return number(self.profile.root.macs, "MACs") if as_string else self.profile.root.macs

    def get_total_duration(self, as_string: bool = False) -> Any:
        """Seconds of forward."""
        return seconds(self.profile.root.forward_s) if as_string else self.profile.root.forward_s

    def get_total_params(self, as_string: bool = False) -> Any:
        """Elements of all parameters, each once."""
        return number(self.profile.root.all_params) if as_string else self.profile.root.all_params

    def print_model_profile(
        self,
        profile_step: int = 1,
        module_depth: int = -1,
        top_modules: int = 1,
        detailed: bool = True,
        output_file: str | Path | None = None,
    ) -> None:
        """Print the profile, or write it: text to `output_file`, and beside it the same as .json and .html."""
        profile = self.profile
        profile.title = profile.title or f"{profile.root.name}, step {profile_step}"
        if profile.peak_flops is None:
            profile.peak_flops = _peak_for(self.model)
        shown = text.report(profile, module_depth=module_depth, top_modules=top_modules, detailed=detailed)
        if output_file is None:
            print(shown, flush=True)
            return
        path = Path(output_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(profile.as_dict()), encoding="utf-8")
        path.with_suffix(".html").write_text(flame_chart(profile), encoding="utf-8")
        if path.suffix not in (".json", ".html"):
            path.write_text(shown, encoding="utf-8")

    def print_model_aggregated_profile(self, module_depth: int = -1, top_modules: int = 1) -> None:
        """Print the heaviest modules of each depth."""
        print(text.aggregated(self.profile, module_depth, top_modules), flush=True)


def _peak_for(model: nn.Module) -> float | None:
    param = next((param for param in model.parameters() if param.is_floating_point()), None)
    return measured_peak(param.dtype) if param is not None else None


def get_model_profile(
    model: nn.Module,
    input_shape: tuple[int, ...] | None = None,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | Path | None = None,
    ignore_modules: Sequence[type[nn.Module]] | None = None,
    mode: str = "forward",
) -> tuple[Any, Any, Any]:
    """Forward's operations and multiply-adds, and the parameters of a model: (flops, macs, params).

    The model is called with one tensor of ones of `input_shape` in the dtype and on the device of its parameters, or with
    `args` and `kwargs`; `mode="generate"` calls its `generate`. It is set to eval, as the contract says, and runs without
    gradients: `warm_up` times, once to be counted and once to be timed.
    """
    call = _call_of(model, input_shape, args, kwargs or {}, mode)
    model.eval()
    profiler = FlopsProfiler(model)
    with torch.no_grad():
        for _ in range(warm_up):
            call()
        profiler.open(ignore_modules)
        assert profiler.watch is not None
        with profiler.watch.counting():
            call()
        with profiler.watch.timing():
            call()
    root = profiler.profile.root
    profiler.profile.title = root.name
    if print_profile or output_file is not None:
        profiler.print_model_profile(
            module_depth=module_depth, top_modules=top_modules, detailed=detailed, output_file=output_file
        )
    numbers = root.flops, root.macs, root.all_params
    profiler.end_profile()
    if not as_string:
        return numbers
    return number(numbers[0], "FLOPs"), number(numbers[1], "MACs"), number(numbers[2])


def _call_of(
    model: nn.Module, input_shape: tuple[int, ...] | None, args: Sequence[Any], kwargs: dict[str, Any], mode: str
) -> Callable[[], Any]:
    if not isinstance(model, nn.Module):
        raise DeepSpeedError(f"get_model_profile: model is a {type(model).__name__}, not an nn.Module.")
    if mode not in ("forward", "generate"):
        raise DeepSpeedError(f'get_model_profile: mode = {mode!r}.\n  Use "forward" or "generate".')
    if input_shape is not None:
        if not isinstance(input_shape, (tuple, torch.Size)) or not input_shape:
            raise DeepSpeedError(
                f"get_model_profile: input_shape = {input_shape!r} is not a tuple of sizes, such as (1, 3, 224, 224)."
            )
        like = next((param for param in model.parameters() if param.is_floating_point()), torch.empty(0))
        args = [torch.ones(input_shape, dtype=like.dtype, device=like.device)]
    if not args and not kwargs:
        raise DeepSpeedError(
            "get_model_profile: no input.\n  Pass input_shape=(...), or the model's own args=[...] or kwargs={...}."
        )
    target = model if mode == "forward" else model.generate
    return lambda: target(*args, **kwargs)  # type: ignore[operator]
