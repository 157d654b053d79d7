"""`UlyssesSPAttentionHF`: sequence parallelism for models of Hugging Face Transformers, without a change to them.

Transformers looks its attention up by name, and the maker of its masks too. `register_with_transformers` puts a wrapper under
the name that the model uses, in both tables:

    attention    exchange to heads; the function that was there, over whole sequences (`core.py`); exchange back
    masks        none is made while a forward of parts runs: for the whole it would be s x s elements, for a part of no use

The wrapper leaves everything else alone: modules of another configuration (a vision tower), evaluation where that was asked
for. It is there once; registering again with the same settings renews it, with others it is refused, and `unregister` takes it
away. Names, arguments and checks are the public contract of the original (arXiv:2506.13996), which wraps without an end and
counts on fixed batch sizes and lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from deepspeed.parallel.sequence import parallel_state
from deepspeed.parallel.sequence.attention import expanded
from deepspeed.parallel.sequence.core import LocalModule, attend
from deepspeed.parallel.sequence.exchange import layout_of, qkv_ranges, to_heads, to_sequence
from deepspeed.parallel.sequence.forward import SequenceForward, forward_of
from deepspeed.parallel.sequence.heads import share_heads
from deepspeed.parallel.sequence.inputs import REQUIRES_POSITION_IDS, SequenceInputs, gather_inputs
from deepspeed.parallel.sequence.ring import plan_ring, ring_attention
from deepspeed.parallel.sequence.supported import check_layers, check_mask_function
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError
from deepspeed.utils.logging import warn_once

OLDEST = "4.51.3"


@dataclass(frozen=True, kw_only=True)
class Registration:
    """What was asked for."""

    core: str
    size: int
    config_type: type
    seq_length: int | None
    disable_in_eval: bool
    given: Any = None
    """A group that somebody else made, such as a pipeline's grid; None for the job's own (`parallel_state`)."""

    @property
    def group(self) -> Any:
        """The ranks that share a sequence."""
        return self.given if self.given is not None else parallel_state.get_sequence_parallel_group()

    @property
    def is_of_this_job(self) -> bool:
        """Whether the group is there still."""
        return self.given is not None or parallel_state.is_initialized()

    def check_length(self, length: int) -> None:
        """Refuse a whole sequence of another length than was said to be fixed."""
        if self.seq_length not in (None, length):
            raise DeepSpeedError(
                f"a sequence of {length} tokens, but register_with_transformers(seq_length={self.seq_length}, "
                "seq_length_is_variable=False).\n  Leave seq_length_is_variable at True."
            )


class SequenceAttention:
    """Stands in the table of attention functions, and as `make_mask` in that of masks."""

    def __init__(self, registration: Registration, core: Callable[..., Any], masks: Callable[..., Any] | None) -> None:
        self.registration, self.core, self.masks = registration, core, masks
        self.forward: SequenceForward | None = None

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """query [b, h, s_r, d], key and value [b, kv, s_r, d]; the output [b, s_r, h, d]. Collective."""
        if not self._applies(module):
            return self.core(module, query, key, value, attention_mask, *args, **kwargs)
        inputs = self._inputs(kwargs.get("position_ids"))
        _check(module, query, key, inputs, kwargs)
        window = self.forward.window if self.forward is not None else None
        if window is not None and window < inputs.length and "sliding_window" not in kwargs:
            raise DeepSpeedError(
                f"{type(module).__name__} has its sliding window of {window} tokens in its mask alone: sequence parallelism cannot "
                "tell whether this layer has it.\n  Use sequences of at most the window, or a model that passes sliding_window."
            )
        if key.shape[1] < self.registration.size and can_ring(self.registration.core, kwargs):
            return self._by_ring(module, query, key, value, inputs, kwargs), None
        group = self.registration.group
        heads = share_heads(query.shape[1], key.shape[1], self.registration.size)
        there, back = (layout_of(group, inputs.lengths, *dims) for dims in ((2, 1), (1, 2)))
        query, key, value = to_heads((query, key, value), qkv_ranges(heads), there, group)
        key, value = (expanded(t, heads, there.rank, 1) for t in (key, value))
        local = LocalModule(module, heads.group_size(there.rank))
        first, end = heads.query[there.rank]
        if kwargs.get("s_aux") is not None:  # a sink for each query head
            kwargs = {**kwargs, "s_aux": kwargs["s_aux"][first:end]}
        kwargs = {**kwargs, "position_ids": inputs.position_ids}
        output = attend(self.core, self.registration.core, local, query, key, value, inputs, kwargs)
        return to_sequence((output,), (heads.query,), back, group)[0], None

    def _by_ring(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        inputs: SequenceInputs,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """As many ranks as there are key heads exchange heads; the keys of the rest come round in a ring."""
        group = self.registration.group
        plan = plan_ring(query.shape[1], key.shape[1], inputs.length, self.registration.size, inputs.rank)
        there = layout_of(group, inputs.lengths, 2, 1, plan.chunks)
        query, key, value = to_heads((query, key, value), qkv_ranges(plan.heads), there, group)
        key, value = (expanded(t, plan.heads, inputs.rank, 1) for t in (key, value))
        given, window = kwargs.get("is_causal"), kwargs.get("sliding_window")
        output = ring_attention(
            query,
            key,
            value,
            plan,
            group,
            inputs.documents,
            is_causal=bool(getattr(module, "is_causal", True) if given is None else given),
            window=int(window) if window and window < inputs.length else None,
            scale=kwargs.get("scaling"),
        )
        return to_sequence((output,), (plan.heads.query,), there, group)[0].transpose(1, 2)

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        """No mask in a forward of parts; else what the function that was there makes."""
        if self.forward is not None and self.forward.is_running:
            check_mask_function(kwargs.get("mask_function"))
            size = kwargs.get("local_size")
            if size is not None:
                self.forward.window = min(size, self.forward.window or size)
            return None
        assert self.masks is not None, "registered only where there was one"
        return self.masks(*args, **kwargs)

    def _applies(self, module: nn.Module) -> bool:
        config = getattr(module, "config", None)
        if self.registration.disable_in_eval and not module.training:
            return False
        return self.registration.is_of_this_job and (
            config is None or isinstance(config, self.registration.config_type)
        )

    def _inputs(self, position_ids: Any) -> SequenceInputs:
        found = self.forward.of(position_ids) if self.forward is not None else None
        if found is not None:
            return found
        if not isinstance(position_ids, Tensor):
            raise DeepSpeedError(REQUIRES_POSITION_IDS)
        warn_once(
            "sequence parallelism: the model was registered by its path and runs outside of an engine, so every layer gathers the "
            "position ids again, and a missing position_ids goes unnoticed. Pass the model to deepspeed.initialize."
        )
        return gather_inputs(self.registration.group, position_ids)


def _check(module: nn.Module, query: Tensor, key: Tensor, inputs: SequenceInputs, kwargs: dict[str, Any]) -> None:
    own = inputs.lengths[inputs.rank]
    if query.shape[2] != own or key.shape[2] != own:
        raise DeepSpeedError(
            f"{type(module).__name__} attends with {query.shape[2]} queries to {key.shape[2]} keys, but this rank's part of the "
            f"sequence is {own} tokens.\n  Cross attention, prompt tokens of adapters and key-value caches do not go with "
            "sequence parallelism; evaluate with disable_in_eval=True."
        )
    if kwargs.get("position_bias") is not None:
        raise DeepSpeedError(
            f"{type(module).__name__} adds a position bias to attention, made for this rank's part of the sequence alone.\n"
            "  Sequence parallelism does not go with it."
        )


def can_ring(core: str, kwargs: dict[str, Any]) -> bool:
    """Whether ring attention computes what the core would: plain softmax, no dropout, no sinks, no caps."""
    return (
        core == "sdpa" and not kwargs.get("dropout") and kwargs.get("s_aux") is None and kwargs.get("softcap") is None
    )


class UlyssesSPAttentionHF:
    """The original's class: its one use is `register_with_transformers`."""

    @classmethod
    def register_with_transformers(
        cls,
        model_name_or_path: Any,
        core_attn_implementation: str | None,
        sequence_parallel_size: int,
        micro_batch_size: int | None = None,
        seq_length: int | None = None,
        seq_length_is_variable: bool = True,
        disable_in_eval: bool = False,
        max_length: int | None = None,
    ) -> Any:
        """Have models of Transformers attend over sequences that are spread over `sequence_parallel_size` ranks.

        model_name_or_path: the model, or what its configuration is read from. core_attn_implementation: "sdpa",
        "flex_attention", "flash_attention_2", "flash_attention_3" or a kernel's "org/name". Batches and lengths may vary from
        forward to forward, so micro_batch_size is not needed; seq_length holds where it is said not to be variable.
        disable_in_eval: forwards of a model in evaluation mode get whole sequences.

        Returns the `mpu` for `deepspeed.initialize`; None for one rank. Collective. Raises DeepSpeedConfigError.
        """
        if sequence_parallel_size == 1:
            return None
        fixed = None if seq_length_is_variable else seq_length or max_length
        registration = _registration(
            model_name_or_path, core_attn_implementation, sequence_parallel_size, fixed, disable_in_eval
        )
        attention = _install(registration)
        if isinstance(model_name_or_path, nn.Module):
            attention.forward = SequenceForward(registration)
            attention.forward.attach(model_name_or_path)
        return parallel_state

    @classmethod
    def unregister(cls) -> None:
        """Put back what was there before."""
        for attention in _registered():
            _uninstall(attention)


def register_group(model: Any, core: str | None, group: Any) -> SequenceForward:
    """Have a model's kind attend over sequences that are spread over a group which is there already, while `SequenceForward.over` says
    that such a forward runs: for whoever runs some of its layers, as a pipeline's stages do. Raises DeepSpeedConfigError."""
    registration = _registration(model, core, dist.get_world_size(group), None, False, group)
    for before in _registered():
        if before.registration == registration and before.forward is not None:
            return before.forward
    attention = _install(registration)
    attention.forward = SequenceForward(registration)
    return attention.forward


def split_model(model: nn.Module, group: Any) -> None:
    """Have a model of Transformers attend over sequences spread over a group that is there already, unless it does so by its
    script. Raises DeepSpeedConfigError."""
    if forward_of(model) is None:
        attention = _install(_registration(model, None, dist.get_world_size(group), None, False, group))
        attention.forward = SequenceForward(attention.registration)
        attention.forward.attach(model)


def _registration(
    model: Any, core: str | None, size: int, seq_length: int | None, disable_in_eval: bool, group: Any = None
) -> Registration:
    """What is asked for, checked."""
    config = _config_of(model)
    core = core or getattr(config, "_attn_implementation", None) or "sdpa"
    _check_core(core, model)
    text = config.get_text_config()
    check_layers(text, type(model).__name__)
    num_heads = text.num_attention_heads
    num_key = getattr(text, "num_key_value_heads", None) or num_heads
    if num_key >= size or core != "sdpa":  # with fewer a ring needs no more heads
        share_heads(num_heads, num_key, size)
    return Registration(
        core=core,
        size=size,
        config_type=type(text),
        seq_length=seq_length,
        disable_in_eval=disable_in_eval,
        given=group,
    )


def prepare_forward(model: nn.Module) -> None:
    """Attach the forward's hook to a model whose kind was registered by a path, before there was one."""
    if forward_of(model) is not None:
        return
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return
    for attention in _registered():
        if isinstance(config.get_text_config(), attention.registration.config_type):
            attention.forward = SequenceForward(attention.registration)
            attention.forward.attach(model)


def _config_of(model: Any) -> Any:
    try:
        import transformers
        from packaging import version
    except ImportError as error:
        raise DeepSpeedError(
            f"UlyssesSPAttentionHF needs transformers, which cannot be imported: {error}.\n  pip install transformers"
        ) from None
    if version.parse(transformers.__version__) < version.parse(OLDEST):
        raise DeepSpeedError(
            f"UlyssesSPAttentionHF needs transformers {OLDEST} or newer; here is {transformers.__version__}."
        )
    if isinstance(model, nn.Module):
        if not hasattr(model, "config"):
            raise DeepSpeedConfigError(
                f"register_with_transformers: a {type(model).__name__} has no config; it takes models of Hugging Face "
                "Transformers.\n  For other models build their attention with deepspeed.sequence.layer.DistributedAttention."
            )
        return model.config
    return transformers.AutoConfig.from_pretrained(model)


def _check_core(core: str, model: Any) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if core == "eager":
        raise DeepSpeedConfigError(
            'core_attn_implementation = "eager": eager attention builds its masks by itself and cannot be split.\n'
            '  Use "sdpa", "flex_attention" or a flash attention.'
        )
    if core not in ALL_ATTENTION_FUNCTIONS and "/" in core:
        from transformers.integrations.hub_kernels import load_and_register_attn_kernel

        load_and_register_attn_kernel(core)
    if core not in ALL_ATTENTION_FUNCTIONS:
        raise DeepSpeedConfigError(
            f"core_attn_implementation = {core!r} is not an attention of transformers: it has "
            f"{sorted(ALL_ATTENTION_FUNCTIONS.valid_keys())}."
        )
    used = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if isinstance(model, nn.Module) and used is not None and used != core:
        raise DeepSpeedConfigError(
            f"core_attn_implementation = {core!r}, but the model was made with attn_implementation = {used!r}.\n"
            "  Load the model with the attention that is registered."
        )


def _registered() -> list[SequenceAttention]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    table: dict[str, Any] = ALL_ATTENTION_FUNCTIONS._global_mapping
    return [found for found in table.values() if isinstance(found, SequenceAttention)]


def _install(registration: Registration) -> SequenceAttention:
    """Put the wrapper in place, and make the groups. Collective the first time in a job."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from deepspeed.comm import init_distributed

    if not dist.is_initialized():
        init_distributed()
    is_this_job = registration.is_of_this_job
    for before in _registered():
        if before.registration.is_of_this_job and before.registration != registration:
            raise DeepSpeedConfigError(
                f"register_with_transformers was called before with other settings: {before.registration}, and now "
                f"{registration}.\n  Register once per process, or call UlyssesSPAttentionHF.unregister() between."
            )
        _uninstall(before)
    if is_this_job and registration.given is None:
        if parallel_state.get_sequence_parallel_world_size() != registration.size:
            raise DeepSpeedConfigError(
                f"sequence_parallel_size = {registration.size}, but this job's groups were made for "
                f"{parallel_state.get_sequence_parallel_world_size()} ranks."
            )
    elif registration.given is None:
        parallel_state.initialize_sequence_parallel(registration.size)
    masks: Any = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.get(registration.core)
    made = SequenceAttention(registration, ALL_ATTENTION_FUNCTIONS[registration.core], masks)
    ALL_ATTENTION_FUNCTIONS.register(registration.core, made)
    if masks is not None:
        ALL_MASK_ATTENTION_FUNCTIONS.register(registration.core, made.make_mask)
    return made


def _uninstall(attention: SequenceAttention) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if attention.forward is not None:
        attention.forward.detach()
    ALL_ATTENTION_FUNCTIONS.register(attention.registration.core, attention.core)
    if attention.masks is not None:
        ALL_MASK_ATTENTION_FUNCTIONS.register(attention.registration.core, attention.masks)
