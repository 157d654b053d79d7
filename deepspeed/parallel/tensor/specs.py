"""Rules about layers as Python objects: the names of `deepspeed.module_inject.autotp_config`.

What `partition_config` says in a configuration, for scripts that ask which rule holds for a layer. `rules` has the tables.

Names and arguments are the public contract of the original.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from deepspeed.parallel.tensor import rules
from deepspeed.parallel.tensor.rules import Action, Spec
from deepspeed.utils.errors import DeepSpeedConfigError, NotAvailableError


class PartitionType(enum.Enum):
    """How a layer is cut: its outputs, its inputs, or not at all."""

    COLUMN = "column"
    ROW = "row"
    SKIP = "skip"


_TYPES = {
    Action.COLUMN: PartitionType.COLUMN,
    Action.PACKED_COLUMN: PartitionType.COLUMN,
    Action.ROW: PartitionType.ROW,
    Action.WHOLE: PartitionType.SKIP,
}


@dataclass
class TPLayerSpec:
    """One rule: regular expressions over "<full name>.weight", and what becomes of the layers that they match.

    shape, partition_dim: how a fused weight divides, and which dimension of that shape is cut. Raises DeepSpeedConfigError (a ValueError)
    for a shape that cannot be, NotAvailableError (a NotImplementedError) for one with `gather_output`.
    """

    patterns: list[str]
    partition_type: PartitionType = PartitionType.COLUMN
    shape: tuple[Any, ...] | None = None
    partition_dim: int | None = None
    model_types: list[str] | None = None
    gather_output: bool = False
    grad_allreduce: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.partition_type, str):
            self.partition_type = PartitionType(self.partition_type)
        if self.shape is None:
            return
        self.shape = tuple(tuple(size) if isinstance(size, list) else size for size in self.shape)
        rules.check_shape(Spec(tuple(self.patterns), Action.COLUMN, self.shape, self.get_partition_dim()))
        if self.gather_output:
            raise NotAvailableError("gather_output of a layer that has a shape.\n  Leave one of them out.")

    def get_partition_dim(self) -> int:
        """The dimension that is cut: outputs of columns, inputs of rows."""
        return self.partition_dim if self.partition_dim is not None else int(self.partition_type is PartitionType.ROW)

    def matches(self, param_name: str, model_type: str | None = None) -> bool:
        """Whether it holds for the parameter of that full name in a model of that type."""
        if self.model_types and model_type is not None and model_type not in self.model_types:
            return False
        return any(re.match(pattern, param_name) for pattern in self.patterns)


@dataclass
class AutoTPConfig:
    """Several rules; the first that matches holds."""

    tp_size: int = 1
    layer_specs: list[TPLayerSpec] = field(default_factory=list)
    embedding_partition_dim: int = 1
    lm_head_patterns: list[str] = field(default_factory=lambda: ["lm_head", "embed_out"])
    use_default_specs: bool = True
    strict_mode: bool = False

    def find_matching_spec(self, param_name: str, model_type: str | None = None) -> TPLayerSpec | None:
        """The rule for a parameter, None without one."""
        return next((spec for spec in self.layer_specs if spec.matches(param_name, model_type)), None)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AutoTPConfig:
        """From what stands in `tensor_parallel.partition_config`. Raises DeepSpeedConfigError (a ValueError) for what it does not know."""
        known = {
            "tp_size",
            "layer_specs",
            "embedding_partition_dim",
            "lm_head_patterns",
            "use_default_specs",
            "strict_mode",
        }
        if strange := set(config) - known:
            raise DeepSpeedConfigError(f"partition_config has {sorted(strange)}; its keys are {sorted(known)}.")
        made = {key: value for key, value in config.items() if key != "layer_specs"}
        return cls(layer_specs=[TPLayerSpec(**spec) for spec in config.get("layer_specs", ())], **made)


def merge_autotp_configs(base: AutoTPConfig, override: AutoTPConfig) -> AutoTPConfig:
    """`override`, with the rules of `base` behind its own where it uses defaults."""
    behind = base.layer_specs if override.use_default_specs else []
    return replace(override, layer_specs=[*override.layer_specs, *behind])


class AutoTPPresets:
    """Rules for families of models, by the names that `tensor_parallel.preset_model` knows."""

    @staticmethod
    def get_preset(model_type: str) -> AutoTPConfig | None:
        """A family's rules, None for one that is not known."""
        specs = rules.PRESETS.get(model_type.lower().replace("-", "_"))
        if specs is None:
            return None
        return AutoTPConfig(
            layer_specs=[
                TPLayerSpec(
                    list(spec.patterns),
                    _TYPES[spec.action],
                    shape=(2, -1) if spec.action is Action.PACKED_COLUMN else None,
                    partition_dim=0 if spec.action is Action.PACKED_COLUMN else None,
                )
                for spec in specs
            ]
        )

    @staticmethod
    def llama_gqa(num_heads: int, num_kv_heads: int, head_dim: int) -> AutoTPConfig:
        """Llama's with queries, keys and values in one layer, `qkv_proj`, behind each other."""
        found = AutoTPPresets.get_preset("llama")
        assert found is not None, "a preset"
        sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        fused = TPLayerSpec([r".*\.self_attn\.qkv_proj\.weight$"], PartitionType.COLUMN, (sizes, -1), 0)
        return replace(found, layer_specs=[fused, *found.layer_specs])


def _preset(name: str) -> Any:
    def made() -> AutoTPConfig:
        found = AutoTPPresets.get_preset(name)
        assert found is not None, "a preset"
        return found

    made.__doc__ = f"The rules of {name}."
    return staticmethod(made)


for _name in rules.PRESETS:
    setattr(AutoTPPresets, _name, _preset(_name))
