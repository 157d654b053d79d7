"""The original's calls beneath `init_inference`, for scripts that change a model with them and keep the model: `module_inject`'s.

Rows of `legacy` point here. Each does with this package's own means what the name says: `replace_transformer_layer` prepares a model as
`init_inference` does and returns the model, `AutoTP` answers which layers' outputs are summed over ranks, as values of
`injection_policy`. Layers are cut by `init_inference` and `initialize` alone.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.inference.fused import unfuse
from deepspeed.inference.initialize import init_inference
from deepspeed.inference.policies import replace_policies
from deepspeed.inference.policy import row_names
from deepspeed.parallel.tensor.choose import Wishes, choose
from deepspeed.parallel.tensor.rules import UNSUPPORTED, Action
from deepspeed.quant.linear import QuantizedEmbedding, QuantizedLinear
from deepspeed.utils.errors import DeepSpeedConfigError, NotAvailableError

Policy = list[tuple[type[nn.Module], tuple[str, ...]]]
"""Classes of blocks, and the sub-layers whose outputs are summed; `dict` of it is an `injection_policy`."""


class QuantTypeEnum(str, enum.Enum):
    """How groups of quantized weights lie about 0; equal to the words of the configuration."""

    asym = "asymmetric"
    sym = "symmetric"


class MoETypeEnum(str, enum.Enum):
    """Kinds of expert layers; equal to the words of the configuration."""

    residual = "residual"
    standard = "standard"


def replace_transformer_layer(
    orig_layer_impl: type[nn.Module] | None,
    model: nn.Module,
    checkpoint_dict: Mapping[str, Any] | None,
    config: DeepSpeedInferenceConfig | Mapping[str, Any] | None,
    model_config: Any = None,
) -> nn.Module:
    """Prepare a model as `init_inference(model, config, checkpoint=checkpoint_dict)` does, in place, and return it.

    orig_layer_impl: the class of its layers, which it has to have, None any. model_config changes nothing: a model has its own.
    """
    if orig_layer_impl is not None:
        _require(model, orig_layer_impl)
    more = {} if checkpoint_dict is None else {"checkpoint": dict(checkpoint_dict)}
    prepared: nn.Module = init_inference(model, dict(config) if isinstance(config, Mapping) else config, **more).module
    return prepared


def revert_transformer_layer(
    orig_layer_impl: type[nn.Module] | None, model: nn.Module, config: Any = None, preln: bool = False
) -> nn.Module:
    """Give a model that was prepared its own forward back. `config` and `preln` change nothing: layers are where they were.

    Raises DeepSpeedConfigError where weights were quantized, which cannot be undone.
    """
    if orig_layer_impl is not None:
        _require(model, orig_layer_impl)
    if any(isinstance(layer, (QuantizedLinear, QuantizedEmbedding)) for layer in model.modules()):
        raise DeepSpeedConfigError(
            f"{type(model).__name__} has quantized weights: what they were is gone.\n  Load the model again."
        )
    unfuse(model)
    return model


def _require(model: nn.Module, layer_class: type[nn.Module]) -> None:
    if not any(isinstance(layer, layer_class) for layer in model.modules()):
        raise DeepSpeedConfigError(
            f"{type(model).__name__} has no layer of the class {layer_class.__name__}.\n"
            f"  Its blocks are of the classes {', '.join(kind.__name__ for kind in _block_classes(model)) or '(none)'}."
        )


class AutoTP:
    """What automatic tensor parallelism knows of a model. Its static functions answer; an object of it is not made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotAvailableError(
            "AutoTP is not made by hand here: a model is cut as a whole.\n"
            "  Use init_inference(model, tensor_parallel={'tp_size': n}), or deepspeed.tp_model_init for training."
        )

    @staticmethod
    def supported(model: nn.Module) -> bool:
        """Whether a model's layers can be told without a policy."""
        return getattr(getattr(model, "config", None), "model_type", None) not in UNSUPPORTED

    @staticmethod
    def kernel_supported(module_list: Iterable[nn.Module]) -> bool:
        """Whether one of these blocks is of a family that has a layer policy."""
        families = {
            policy.__name__.removeprefix("HF").removesuffix("LayerPolicy").lower() for policy in replace_policies
        }
        names = [type(module).__name__.lower() for module in module_list]
        return any(name.startswith(family) for name in names for family in families)

    @staticmethod
    def get_module_list(model: nn.Module) -> list[nn.Module]:
        """One block of each class."""
        return list(_block_classes(model).values())

    @staticmethod
    def in_module_list(module: nn.Module, module_list: Iterable[nn.Module]) -> bool:
        """Whether a block of the same class is there."""
        return any(type(other) is type(module) for other in module_list)

    @staticmethod
    def update_policy_list(policy_list: Policy, new_module: type[nn.Module], new_gems: Sequence[str]) -> Policy:
        """The list with a class's sub-layers added to those that it has."""
        merged = {kind: list(names) for kind, names in policy_list}
        merged.setdefault(new_module, []).extend(new_gems)
        return [(kind, tuple(dict.fromkeys(names))) for kind, names in merged.items()]

    @staticmethod
    def tp_parser(model: nn.Module) -> Policy:
        """Which sub-layers' outputs are summed, by the class of their block: `injection_policy=dict(AutoTP.tp_parser(model))`.

        Raises DeepSpeedConfigError (an AssertionError too) where layers cannot be told, or none would be cut.
        """
        rows = [name for name, decision in choose(model, Wishes()).decisions.items() if decision.action is Action.ROW]
        found: Policy = []
        for prefix, block in _blocks(model):
            names = [name.removeprefix(f"{prefix}.") for name in rows if name.startswith(f"{prefix}.")]
            found = AutoTP.update_policy_list(found, type(block), names) if names else found
        if not found:
            raise DeepSpeedConfigError(
                "Not able to determine model policy automatically. Please provide policy.\n"
                f"  {type(model).__name__} has no blocks with layers whose outputs are summed: give injection_policy."
            )
        row_names(model, dict(found))
        return found

    @staticmethod
    def get_model_num_kv_heads(config: Any) -> int | None:
        """Heads of keys and values that a model's configuration says, by whichever of its names."""
        holders = [config, getattr(config, "text_config", None), getattr(config, "attn_config", None)]
        names = "num_key_value_heads multi_query_group_num num_kv_heads kv_n_heads num_attention_heads n_heads n_head attention_heads"
        for name in names.split():
            for holder in holders:
                found = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
                if isinstance(found, int):
                    return found
        return None


def _blocks(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The outermost lists' blocks and their names."""
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
            yield from ((f"{name}.{index}", block) for index, block in module.named_children())


def _block_classes(model: nn.Module) -> dict[type[nn.Module], nn.Module]:
    return {type(block): block for _, block in _blocks(model)}
