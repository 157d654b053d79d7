"""What `init_inference` is told: typed, strict, with the original's names and defaults.

Read once, by `initialize`; the engine and what it builds are handed the sections they need. A key that has no effect
here is accepted and named in one warning (`without_effect`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, PlainSerializer

from deepspeed.config import ZeroConfig
from deepspeed.config.base import OldKey, PositiveInt, Problem, Section, also
from deepspeed.config.parallelism import TP_KEY
from deepspeed.utils.dtypes import dtype_name, parse_dtype
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.utils.lazy import lazy_exports

__getattr__, _ = lazy_exports(
    __name__,
    {"DtypeEnum": "deepspeed.porch.enums"}
    | dict.fromkeys(("QuantTypeEnum", "MoETypeEnum"), "deepspeed.inference.injection"),
)


def _dtype(value: Any) -> torch.dtype:
    with contextlib.suppress(ValueError):
        dtype = parse_dtype(getattr(value, "value", value))
        if dtype in (torch.float16, torch.float32, torch.bfloat16, torch.int8):
            return dtype
    raise ValueError(f"{value!r} is no dtype to run a model in. Use fp32, fp16, bf16, or int8 or int4 for its weights.")


class DeepSpeedTPConfig(Section):
    """`tensor_parallel`: over how many ranks the layers are cut."""

    enabled: bool = True
    """Cut them, where tp_size is above 1."""
    tp_size: PositiveInt = 1
    """Tensor-parallel ranks."""
    tp_grain_size: PositiveInt = 64
    """Shards that nothing else aligns are multiples of this."""
    mpu: Any = None
    """An object that knows the group, from Python."""
    tp_group: Any = None
    """The group itself, from Python."""


class DeepSpeedMoEConfig(Section):
    """`moe`: over how many ranks experts are spread."""

    enabled: bool = True
    """Spread them, where ep_size is above 1."""
    ep_size: PositiveInt | tuple[PositiveInt, ...] = 1
    """Expert-parallel ranks; a list has one for each layer with experts."""
    moe_experts: Annotated[tuple[PositiveInt, ...], also("moe_experts", "num_experts")] = (1,)
    """Experts of each such layer."""
    type: Literal["standard", "residual"] = "standard"
    """Whether a dense layer is added to what experts say."""
    ep_mp_group: Any = None
    """A group that cuts each expert, from Python."""
    ep_group: Annotated[Any, also("ep_group", "expert_group")] = None
    """The group of experts, from Python."""


class BaseQuantConfig(Section):
    """What weights and activations have in common."""

    enabled: bool = True
    """Quantize; weights are where `dtype` is int8."""
    num_bits: Literal[4, 8] = 8
    """Bits per value."""
    q_type: Literal["symmetric", "asymmetric"] = "symmetric"
    """Without or with a zero point."""
    q_groups: PositiveInt = 1
    """Groups that each row of a weight is divided into; 1 lets `group_size` decide."""


class WeightQuantConfig(BaseQuantConfig):
    """The key "weight" of `quant`."""

    group_size: PositiveInt = 64
    """Neighbours in a row of a weight that share a scale. Not in the original."""
    quantized_initialization: dict[str, Any] = Field(default_factory=dict)
    """One description for all weights; {} is off."""
    post_init_quant: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """A piece of a module's name, and how its weight is quantized."""


class ActivationQuantConfig(BaseQuantConfig):
    """The key "activation" of `quant`."""


class QKVQuantConfig(Section):
    """The key "qkv" of `quant`."""

    enabled: bool = True
    """Whether the layers that make queries, keys and values are quantized too."""


class QuantizationConfig(Section):
    """`quant`: how weights are quantized where `dtype` is int8."""

    enabled: bool = True
    """Quantize, where `dtype` is int8."""
    activation: ActivationQuantConfig = Field(default_factory=ActivationQuantConfig)
    """Of what products read."""
    weight: WeightQuantConfig = Field(default_factory=WeightQuantConfig)
    """Of what they multiply with."""
    qkv: QKVQuantConfig = Field(default_factory=QKVQuantConfig)
    """Of the first layers of attention."""


class InferenceCheckpointConfig(Section):
    """`checkpoint_config`: the older place of the keys about checkpoints."""

    checkpoint_dir: str | None = None
    """As `checkpoint`."""
    save_mp_checkpoint_path: str | None = None
    """As the key of the same name."""
    base_dir: str | None = None
    """As the key of the same name."""


class CacheConfig(Section):
    """`kv_cache`: how keys and values are kept while a model generates. Not in the original."""

    dtype: Annotated[
        Literal["model", "int8"], BeforeValidator(lambda given: "int8" if given is torch.int8 else given)
    ] = "model"
    """The model's own, or int8 with a scale for each position and head."""


def _moe(value: Any) -> Any:
    return {"enabled": value} if isinstance(value, bool) else value


def _dump_dtype(value: torch.dtype) -> str:
    return dtype_name(value)


class DeepSpeedInferenceConfig(Section):
    """All that `init_inference` takes, from `config` and keywords together."""

    replace_with_kernel_inject: Annotated[bool, also("replace_with_kernel_inject", "kernel_inject")] = False
    """Nothing more: fused steps are used wherever a model fits, without being asked for."""
    dtype: Annotated[torch.dtype, BeforeValidator(_dtype), PlainSerializer(_dump_dtype)] = torch.float16
    """fp16, bf16, fp32; "int8" and "int4" quantize the weights and leave everything else in the model's own dtype. Where it is not
    given and the device has no fp16, the model's own."""
    tensor_parallel: Annotated[DeepSpeedTPConfig, also("tensor_parallel", TP_KEY)] = Field(
        default_factory=DeepSpeedTPConfig
    )
    """Over ranks."""
    enable_cuda_graph: bool = False
    """Replay a recorded forward."""
    use_triton: bool = False
    """Nothing: kernels are chosen by device."""
    triton_autotune: bool = False
    """Nothing."""
    zero: ZeroConfig = Field(default_factory=ZeroConfig)
    """With stage 3 weights are sharded over the ranks of the job, and rest where `offload_param` says between their uses."""
    triangular_masking: Annotated[bool, also("triangular_masking", "tm")] = True
    """Nothing: the model masks itself."""
    moe: Annotated[DeepSpeedMoEConfig, BeforeValidator(_moe)] = Field(default_factory=DeepSpeedMoEConfig)
    """Experts."""
    keep_module_on_host: bool = False
    """Leave the module where it is."""
    quant: QuantizationConfig = Field(default_factory=QuantizationConfig)
    """How int8 is meant."""
    kv_cache: CacheConfig = Field(default_factory=CacheConfig)
    """Keys and values that `generate` keeps."""
    checkpoint: Any = None
    """What to load: the path of a folder, of a JSON file or of weights, or a dict as such a JSON has it."""
    base_dir: str = ""
    """The folder that paths in `checkpoint` start from."""
    set_empty_params: bool = False
    """Nothing: a module on "meta" is built empty."""
    save_mp_checkpoint_path: str | None = None
    """Write what was loaded, cut and quantized, to this folder."""
    checkpoint_config: Annotated[InferenceCheckpointConfig, also("checkpoint_config", "ckpt_config")] = Field(
        default_factory=InferenceCheckpointConfig
    )
    """The older place of those keys."""
    return_tuple: bool = True
    """Nothing: a layer returns what it returns."""
    training_mp_size: PositiveInt = 1
    """Nothing: a checkpoint says how it is cut."""
    injection_policy: Annotated[dict[Any, Any] | None, also("injection_policy", "injection_dict")] = None
    """{LayerClass: names of its sub-layers whose outputs are summed over ranks}."""
    injection_policy_tuple: tuple[Any, ...] | None = None
    """Such names for every layer."""
    config: Annotated[Any, also("config", "args")] = None
    """A model configuration in place of the module's own."""
    max_out_tokens: Annotated[PositiveInt, also("max_out_tokens", "max_tokens")] = 1024
    """Prompt and answer together, a limit where it is given; the cache grows where it is not."""
    min_out_tokens: Annotated[PositiveInt, also("min_out_tokens", "min_tokens")] = 1
    """Nothing: memory is taken as it is needed."""
    transposed_mode: bool = False
    """Nothing: layouts are the model's."""

    old_keys: ClassVar[dict[str, OldKey]] = {"replace_method": OldKey(None)}

    @classmethod
    def adapt(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Move keys of older versions into the sections that have them now."""
        given = dict(data)
        if str(given.get("dtype")).removeprefix("torch.") == "int4":
            quant = dict(given.get("quant", {}))
            given |= {"dtype": "int8", "quant": quant | {"weight": {"num_bits": 4, **quant.get("weight", {})}}}
        for section, moved in _MOVED.items():
            found = {new: given.pop(old) for old, new in moved.items() if old in given}
            if found:
                alias = TP_KEY if section == "tensor_parallel" and TP_KEY in given else section
                inner = given.get(alias, {})
                inner = {"enabled": inner} if isinstance(inner, bool) else dict(inner)
                for old, new in moved.items():
                    if new in found and new in inner and inner[new] != found[new] and old in data:
                        raise DeepSpeedConfigError(
                            f"{old} = {found[new]!r}, and {section}.{new} = {inner[new]!r}: both say the same thing.\n"
                            f"  Give {section}.{new} alone."
                        )
                given[alias] = inner | found
        return given

    def rules(self) -> Iterator[Problem]:
        """Ways to replace layers exclude each other; a recorded forward cannot wait for other ranks."""
        if self.injection_policy is not None and self.replace_with_kernel_inject:
            yield Problem(
                ("replace_with_kernel_inject",),
                "an injection_policy is given too, and both say what happens to the layers",
                "Give one of the two.",
            )
        if self.enable_cuda_graph and self.tensor_parallel.tp_size > 1:
            yield Problem(
                ("enable_cuda_graph", "tensor_parallel.tp_size"),
                "a recorded forward cannot wait for other ranks",
                "Set enable_cuda_graph to false, or run on one rank.",
            )
        older = self.checkpoint_config
        for key, old_key, given, old in (
            ("checkpoint", "checkpoint_dir", self.checkpoint, older.checkpoint_dir),
            ("base_dir", "base_dir", self.base_dir or None, older.base_dir or None),
            ("save_mp_checkpoint_path",) * 2 + (self.save_mp_checkpoint_path, older.save_mp_checkpoint_path),
        ):
            if given is not None and old is not None and str(given) != str(old):
                yield Problem(
                    (key, f"checkpoint_config.{old_key}"),
                    f"{key} says {given!r}, and both say the same thing",
                    f"Give {key} alone.",
                )
        yield from self._rules_of_streams()

    def _rules_of_streams(self) -> Iterator[Problem]:
        offload = self.zero.offload_param
        if self.zero.stage != 3 and offload is not None and offload.device != "none":
            yield Problem(
                ("zero.offload_param", "zero.stage"), "weights rest elsewhere at stage 3 alone", "Set zero.stage to 3."
            )
        if self.zero.stage != 3:
            return
        for key, is_given in (
            ("tensor_parallel.tp_size", self.tensor_parallel.tp_size > 1),
            ("moe.ep_size", self.moe.ep_size != 1),
            ("save_mp_checkpoint_path", bool(self.save_mp_checkpoint_path)),
            ("enable_cuda_graph", self.enable_cuda_graph),
            ("keep_module_on_host", self.keep_module_on_host),
        ):
            if is_given:
                yield Problem(
                    ("zero.stage", key), "weights that are sharded and streamed are whole nowhere", f"Leave {key} out."
                )

    @property
    def streams(self) -> bool:
        """Whether weights rest elsewhere between their uses."""
        return self.zero.stage == 3

    def without_effect(self) -> Iterator[str]:
        """The keys that were given another value than their default and do nothing."""
        for key in _NO_EFFECT:
            section, _, inner = key.rpartition(".")
            holder = getattr(self, section) if section else self
            default = type(holder).model_fields[inner].get_default(call_default_factory=True)
            if inner in holder.model_fields_set and getattr(holder, inner) != default:
                yield key
        if self.zero.stage in (1, 2):
            yield f"zero.stage = {self.zero.stage}"
        if self.zero.offload_optimizer is not None and self.zero.offload_optimizer.device != "none":
            yield "zero.offload_optimizer"

    @property
    def limit(self) -> int:
        """Tokens of prompt and answer together; 0 is no limit."""
        return self.max_out_tokens if "max_out_tokens" in self.model_fields_set else 0


_MOVED = {
    "tensor_parallel": {"mp_size": "tp_size", "mpu": "mpu"},
    "moe": {
        "ep_size": "ep_size",
        "ep_group": "ep_group",
        "ep_mp_group": "ep_mp_group",
        "moe_experts": "moe_experts",
        "moe_type": "type",
    },
}
"""Keys of older versions: the section that has them now, and their names there."""

_NO_EFFECT = (
    "use_triton triton_autotune triangular_masking set_empty_params return_tuple training_mp_size min_out_tokens "
    "transposed_mode injection_policy_tuple config moe.moe_experts moe.type moe.ep_group moe.ep_mp_group"
).split()
"""Nobody reads these. Those of ranks and experts: models run on one rank, their experts as the model has them."""
