"""Experts of `MoE` layers on ranks that share layers: cut like any feed-forward network where the layer asks for it, else whole.

Called by `engine.tensor` with what rules decided about the whole model. A gate is whole everywhere, so that all ranks route
alike. An expert of a layer with `enable_expert_tensor_parallelism` is cut by its structure: the layers that read tokens by
their outputs, the one that gives them back by its inputs; a single one by its outputs, which are joined.

Invariant: what a `partition_config` says of an expert's layers holds, whatever the layer asks for.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from deepspeed.parallel.expert.layer import MoE
from deepspeed.parallel.tensor import rules
from deepspeed.parallel.tensor.choose import PLAN, STRUCTURE, Chosen, Decision
from deepspeed.parallel.tensor.rules import Action
from deepspeed.utils.errors import DeepSpeedConfigError

_ASKED = "enable_expert_tensor_parallelism = True"


def decide(model: nn.Module, chosen: Chosen) -> Chosen:
    """The decisions, with those about `MoE` layers. Raises DeepSpeedConfigError for experts that cannot be told."""
    for name, layer in ((name, module) for name, module in model.named_modules() if isinstance(module, MoE)):
        whole = (f"{name}.deepspeed_moe.gate.wg".lstrip("."), f"{name}.coefficient".lstrip("."))
        is_told = chosen.source not in (PLAN, STRUCTURE)
        for known in [known for known in chosen.decisions if not name or known.startswith(f"{name}.")]:
            if known in whole or not is_told:
                del chosen.decisions[known]
        if layer.enable_expert_tensor_parallelism:
            for of_expert, expert in _experts(name, layer):
                if not any(known.startswith(f"{of_expert}.") or known == of_expert for known in chosen.decisions):
                    width = layer.deepspeed_moe.gate.wg.in_features
                    chosen.decisions.update(_of_expert(of_expert, expert, width))
    return chosen


def _experts(name: str, layer: MoE) -> Iterator[tuple[str, nn.Module]]:
    """The experts of a layer, and the one that every token visits."""
    for i, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
        yield f"{name}.deepspeed_moe.experts.deepspeed_experts.{i}".lstrip("."), expert
    if layer.use_residual:
        yield f"{name}.mlp".lstrip("."), layer.mlp


def _of_expert(name: str, expert: nn.Module, width: int) -> dict[str, Decision]:
    linears = {
        ".".join(part for part in (name, inner) if part): module
        for inner, module in expert.named_modules()
        if isinstance(module, nn.Linear)
    }
    if not linears:
        if any(getattr(param, "tensor_model_parallel", False) for param in expert.parameters()):
            return {}  # its own layers are cut by hand
        raise DeepSpeedConfigError(
            f"{_ASKED}, but {name} ({type(expert).__name__}) has no nn.Linear to be cut.\n  Leave it False: whole experts."
        )
    if len(linears) == 1:
        return {each: Decision(Action.COLUMN_GATHERED) for each in linears}
    rows = [each for each in linears if rules.is_row(each)] or [list(linears)[-1]]
    columns = [each for each in linears if each not in rows]
    fits = all(linears[each].in_features == width for each in columns) and linears[rows[0]].out_features == width
    if len(rows) != 1 or len(columns) not in (1, 2) or not fits:
        raise DeepSpeedConfigError(
            f"{_ASKED}, but how the layers of {name} ({', '.join(linears)}) follow on one another cannot be told.\n"
            "  Say it in tensor_parallel.partition_config (column: by outputs, row: by inputs), or leave it False: whole experts."
        )
    return {**{each: Decision(Action.COLUMN) for each in columns}, rows[0]: Decision(Action.ROW)}
