"""`InferenceEngine`: a model that is called, generates, is timed and compiled.

Made by `initialize.init_inference`. The engine changes the module in place and then stands before it: attributes it does not
have are the module's, so that it can be put where the module was. Equality comes first: what is generated is Hugging Face's
own loop over the module's own forward, and everything faster is put beneath both.

Invariant: nothing of the module is changed before all that can be refused has been; what fails later on any rank raises on all, and leaves the
module as it was where memory allows to keep the old values until then (`undo`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from deepspeed import comm
from deepspeed.inference import agreed, experts, prepare, tensor
from deepspeed.inference.calls import asking, attend
from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.inference.found import open_weights
from deepspeed.inference.fused import fuse, unfuse
from deepspeed.inference.limits import check_length
from deepspeed.inference.load import Loader, make_loader
from deepspeed.inference.policy import row_names
from deepspeed.inference.quantize_layers import quantize
from deepspeed.inference.save import check_can_save, save
from deepspeed.inference.served import Served
from deepspeed.inference.streamed import Streamed
from deepspeed.inference.times import ForwardTimes
from deepspeed.inference.undo import Before, has_room
from deepspeed.kernels.pages import gather_in_large_pages
from deepspeed.quant.replace import Around
from deepspeed.utils.errors import DeepSpeedConfigError, TrainingStateError
from deepspeed.utils.logging import warn_once


@dataclass(frozen=True)
class _Plan:
    """What will be done to one module."""

    module: nn.Module
    dtype: torch.dtype
    loader: Loader | None
    decided: tensor.Decided | None


class InferenceEngine(nn.Module):
    """A model ready to run. `module` is the user's object; everything it has, the engine has too."""

    def __init__(self, model: Any, config: DeepSpeedInferenceConfig | None = None) -> None:
        super().__init__()
        config = config or DeepSpeedInferenceConfig()
        modules = list(_modules_of(model))
        self._config = config
        self._times: ForwardTimes | None = None
        self._is_compiled = False
        self._streamed: list[Streamed] = []
        self._has_generated = False
        self._served: Served | None = None
        self._attended: list[Callable[[], None]] = []
        _check(modules, config)
        for key in config.without_effect():
            warn_once(f"init_inference: {key} has no effect.")
        self._experts = experts.ranks_of(modules, config)
        self._ranks = tensor.ranks_of(config)
        self.mp_world_size = 1 if self._ranks is None else self._ranks.tensor.size
        gathers: list[agreed.Gather] = [ranks.gather for ranks in (self._ranks, self._experts) if ranks is not None]
        if (job := agreed.job_gather(config)) is not None:
            gathers.append(job)
        before: list[Before] = []
        try:
            with self._call() as calls:
                self._make(modules, gathers, agreed.Steps(gathers, has_calls=calls is not None), before)
        except BaseException:
            self._release()
            for each in before:
                each.put_back()
            raise
        self.module = model
        self.training = False
        if self._streamed and comm.get_world_size() > 1:
            self._served = Served([hooks for streamed in self._streamed if (hooks := streamed.hooks) is not None])
        self._stand_before(modules)

    def _stand_before(self, modules: list[nn.Module]) -> None:
        """Where ranks run modules together, have calls of a module itself be what the engine's are: made by all, and told of errors."""
        for module in modules if self._has_others() else ():
            self._attended.append(attend(module, self._call if self._served is None else self._served.forward))
            own: Any = getattr(module, "generate", None)
            if own is not None:
                module.__dict__["generate"] = _Generate(self, module, own)

    def _has_others(self) -> bool:
        """Whether a forward is one of several ranks."""
        return bool(self._ranks or self._experts or self._served)

    def _make(
        self, modules: list[nn.Module], gathers: list[agreed.Gather], steps: agreed.Steps, before: list[Before]
    ) -> None:
        """Decide, and prepare the modules; what they were goes to `before`."""
        made = steps.do(lambda: [self._decide(module) for module in modules])
        for gather, module in itertools.product(gathers, modules):
            agreed.require_same(gather, agreed.description(module, self._config))
        if steps.all(all(map(has_room, modules))):
            before += [Before(module, is_written=self._rank > 0) for module in modules]
        for plan in made:
            if self._ranks is not None and plan.decided is not None:
                steps.do_together(partial(tensor.cut, plan.module, self._ranks, plan.decided))
            steps.do(partial(self._prepare, plan, steps))
        if self._ranks is not None:
            self._ranks.same_draws()

    def _decide(self, module: nn.Module) -> _Plan:
        """All that can be refused, before the module is changed."""
        dtype = prepare.run_dtype(module, self._config)
        check_can_save(self._config)
        weights = open_weights(self._config, self._rank, self.mp_world_size)
        loader = None if weights is None else make_loader(module, weights)
        decided = None if self._ranks is None else tensor.decide(module, self._config, self._ranks)
        if self._experts is not None:
            self._experts.check(module)
        return _Plan(module, dtype, loader, decided)

    def _prepare(self, plan: _Plan, steps: agreed.Steps) -> None:
        module = plan.module
        if self._ranks is not None:
            self._ranks.compare_first_inputs(module)
        if self._experts is not None:
            self._experts.spread(module)
        prepare.cast(module, plan.dtype)
        streamed = None
        if self._config.streams:
            steps.meet()
            streamed = Streamed(self._config.zero, plan.dtype, steps.meet)
            self._streamed.append(streamed)
        self._fill(plan, streamed)
        module.eval()
        if streamed is not None:
            steps.meet()
            streamed.start(module)
            return
        prepare.place(module, self._config)
        if self._ranks is None and prepare.is_on_host(module):
            fuse(module)
        save(module, self._config, self._rank, self.mp_world_size)

    def _fill(self, plan: _Plan, streamed: Streamed | None) -> None:
        """Read weights and quantize them, layer by layer; each rests before the next where weights are streamed."""
        module, loader = plan.module, plan.loader
        around = Around() if loader is None else Around(fill=loader.fill, quantized=loader.quantized)
        if streamed is not None:
            around = dataclasses.replace(around, made=streamed.put_quantized)
        quantize(module, self._config, around)
        if loader is not None:
            loader.fill_rest() if streamed is None else loader.fill_rest(streamed.put)
        elif streamed is not None:
            for layer in list(module.modules()):
                streamed.put(layer)

    @property
    def _rank(self) -> int:
        return 0 if self._ranks is None else self._ranks.tensor.rank

    def _behind(self) -> Any:
        """The module, or the object that holds modules; None while the engine is made."""
        return self.__dict__.get("module", self.__dict__.get("_modules", {}).get("module"))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self._behind()
            if module is None or name.startswith("__"):
                raise
            return getattr(module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What the module has, and the engine has not, is set on the module: it is the one that reads it."""
        module = None if name.startswith("_") or name in self.__dict__ or hasattr(type(self), name) else self._behind()
        if module is not None and name not in self._modules and hasattr(module, name):
            setattr(module, name, value)
        else:
            super().__setattr__(name, value)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module answers; timed in `model_times` after `profile_model_time`. Without gradients."""
        with self._call():
            if self._times is None:
                return self.module(*args, **kwargs)
            return self._times.call(self.module, args, kwargs)

    def _call(self) -> contextlib.AbstractContextManager[Any]:
        """Around what all ranks do together: one that fails inside tells the others."""
        ranks = self._ranks or self._experts
        if ranks is not None:
            return ranks.call()
        return contextlib.nullcontext() if self._served is None else self._served.call()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own `generate`, with prompt and answer checked against `max_out_tokens` first.

        The first call asks for large pages for weights in main memory (`kernels.pages`): each is read for every token.
        Raises TooManyTokensError (a RuntimeError), naming both numbers, before any work.
        """
        generate = getattr(self.module, "generate", None)
        if generate is None:
            raise DeepSpeedConfigError(f"{type(self.module).__name__} has no generate.\n  Call the engine itself.")
        if isinstance(generate, _Generate):
            return generate(*args, **kwargs)
        return self._generate(self.module, generate, args, kwargs)

    def _generate(
        self, module: Any, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        check_length(module, self._config.limit, args, kwargs)
        reset = getattr(module, "reset_cache", None)
        if callable(reset):
            reset()
        if not (self._has_generated or self._streamed):
            gather_in_large_pages(
                t for m in _modules_of(self.module) for t in itertools.chain(m.parameters(), m.buffers())
            )
        self._has_generated = True
        with contextlib.ExitStack() as around:
            around.enter_context(self._call())
            if self._served is not None:
                around.enter_context(asking(module, self._served.any))
            if self._experts is not None:
                around.enter_context(asking(module, self._experts.tokens.any))
            return self._generate_together(module, generate, args, kwargs)

    def _generate_together(
        self, module: Any, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What all ranks do together."""
        if self._ranks is not None:
            self._ranks.compare((*args, *kwargs.values()))
            self._ranks.same_draws()
        if self._experts is not None:
            kwargs = self._experts.in_step(kwargs)
        if self._config.kv_cache.dtype == "int8":
            kwargs = _with_int8_cache(module, kwargs)
        for streamed in self._streamed:
            kwargs = streamed.in_step(kwargs)
        times = self._times.inside(module, self._is_compiled) if self._times else contextlib.nullcontext()
        with torch.no_grad(), times:
            return generate(*args, **kwargs)

    def profile_model_time(self, use_cuda_events: bool = True) -> None:
        """From now on, note how long each forward takes, those inside of `generate` too; `use_cuda_events` changes nothing: the device is waited for."""
        if self._times is None:
            self._times = ForwardTimes()

    def model_times(self) -> list[float]:
        """Milliseconds of each forward since the last call; forgets them. Raises TrainingStateError before `profile_model_time`."""
        if self._times is None:
            raise TrainingStateError(
                "model_times() before profile_model_time(): no forward was timed.\n  Call it first."
            )
        times = self._times.take()
        if not times and self._config.enable_cuda_graph:
            raise TrainingStateError("model_times() has no times: no forward ran since the last call.")
        return times

    def compile(self, backend: Any = None, compile_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Compile the module in place; `compile_kwargs` are torch.compile's."""
        options = {**(compile_kwargs or {}), **kwargs}
        if backend is not None:
            options["backend"] = backend
        unfuse(self.module)
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
        """Give the module back, with its own forward; the engine holds nothing that outlives it."""
        self._times = None
        unfuse(self.module)
        self._release()

    def _release(self) -> None:
        while self._streamed:
            self._streamed.pop().release()
        for ranks in (self._experts, self._ranks):
            if ranks is not None:
                ranks.release()
        while self._attended:
            self._attended.pop()()
        self._experts = self._ranks = self._served = None
        module = self._behind()
        for each in () if module is None else _modules_of(module):
            if isinstance(each.__dict__.get("generate"), _Generate):
                del each.__dict__["generate"]


class _Generate:
    """`generate` of a module that several ranks run together: the engine's, so that a pipeline that has the module has that, too."""

    def __init__(self, engine: InferenceEngine, module: nn.Module, own: Callable[..., Any]) -> None:
        functools.update_wrapper(self, own)
        self._engine, self._module, self._own = engine, module, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine._generate(self._module, self._own, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied module has its class's own."""
        kind: Any = type(self._module)
        return kind.generate.__get__(memo[id(self._module)])


def _with_int8_cache(module: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of generate with an empty cache in int8, unless they say another, or none."""
    given = [kwargs.get("generation_config"), getattr(module, "generation_config", None)]
    said = [getattr(holder, "cache_implementation", None) for holder in given] + [kwargs.get("cache_implementation")]
    if any(said) or kwargs.get("use_cache") is False or any(kwargs.get(name) is not None for name in _CACHES):
        return kwargs
    from deepspeed.inference.int8_cache import new_cache

    made = new_cache(module)
    name = next((name for name in _CACHES if name in inspect.signature(module.forward).parameters), _CACHES[0])
    return kwargs if made is None else {**kwargs, name: made}


_CACHES = ("cache", "past_key_values")
"""What Hugging Face's models call it."""


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
    if len(modules) > 1 and (config.checkpoint is not None or config.checkpoint_config.checkpoint_dir):
        raise DeepSpeedConfigError(
            f"checkpoint is for one module, and a pipeline of {len(modules)} was given.\n  Load each, or pass the module."
        )
    if config.enable_cuda_graph:
        warn_once("enable_cuda_graph = true has no effect: forwards are not recorded.")
    if config.replace_with_kernel_inject and config.tensor_parallel.tp_size > 1:
        warn_once("replace_with_kernel_inject has no effect over ranks: parts of layers run unfused.")
