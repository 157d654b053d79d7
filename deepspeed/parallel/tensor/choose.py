"""Which table of rules holds for a model, and what it says: names of modules and parameters to decisions.

Called by `apply`. Reads the model's tree, its configuration and its `tp_plan`; changes nothing. The first that is given holds:
`partition_config` (with the preset's behind), `preset_model`, the model's own plan, its structure.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from deepspeed.parallel.tensor import rules
from deepspeed.parallel.tensor.layers import is_conv1d, is_linear, widths
from deepspeed.parallel.tensor.refusal import CutRefusedError, Why
from deepspeed.parallel.tensor.rules import Action, Spec
from deepspeed.utils.errors import DeepSpeedConfigError

PLAN, STRUCTURE = "tp_plan", "structure"


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the configuration says about a model's layers."""

    specs: tuple[Spec, ...] = ()
    use_default_specs: bool = True
    preset: str | None = None
    cuts_words: bool = False
    """Embeddings that a rule names are cut over the vocabulary, not over the width."""
    overlaps: bool = False
    grain: int = 1
    cuts_head: bool | None = None
    """Keep logits cut over the vocabulary, and compute the loss from them."""
    has_regions: bool = False
    """Ranks have some tokens each between layers."""
    size_key: str = "tensor_parallel.autotp_size"
    """What the number of ranks is called where the user says it."""
    copies_shared: bool = False
    """Of a fused layer with one key and one value for all queries, those may be on every rank: in a model that does not train."""
    is_part: bool = False
    """The model is a stage's layers: what a rule names may be on another stage."""


@dataclass(frozen=True)
class Decision:
    """What becomes of one module or parameter. `parts`: sizes of a fused weight's parts, "equal" ones where it is an int."""

    action: Action
    parts: int | tuple[int, ...] = 1
    dim: int | None = None


@dataclass(frozen=True)
class Chosen:
    """The decisions, and where they are from."""

    source: str
    decisions: dict[str, Decision]
    unmet: tuple[tuple[str, ...], ...] = ()
    """Patterns of specs that no layer here matches."""

    @property
    def num_acted(self) -> int:
        """Layers that do not stay as they are."""
        return sum(d.action not in (Action.WHOLE, Action.SUM_GRADIENT) for d in self.decisions.values())


def choose(model: nn.Module, wishes: Wishes) -> Chosen:
    """Decide. Raises DeepSpeedConfigError for what cannot be cut; whether enough was found is `require_found`'s."""
    if wishes.specs or wishes.preset:
        chosen = _by_specs(model, wishes)
    else:
        planned = _planned(model)
        chosen = _by_plans(planned, wishes) if planned else _by_structure(model, wishes.is_part)
    if chosen.source != PLAN:
        tell_fused(model, chosen)
    return chosen


def require_found(model: nn.Module, everyone: Sequence[Chosen]) -> None:
    """Raise DeepSpeedConfigError where rules name what is on no stage, or no stage has anything to cut. `everyone`: what
    was chosen for each part of the model; one, where it is not in parts."""
    unmet = [patterns for patterns in everyone[0].unmet if all(patterns in other.unmet for other in everyone)]
    if unmet and everyone[0].source == PLAN:
        raise CutRefusedError(
            Why.PLAN,
            f"the tp_plan of {type(model).__name__} names {unmet[0][0]!r}, and no layer or parameter is called that.",
            "Numbers are written as *; or give tensor_parallel.partition_config, which takes the plan's place.",
        )
    if unmet:
        names = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding)) or is_conv1d(m)]
        raise DeepSpeedConfigError(
            f"tensor_parallel.partition_config: no layer of {type(model).__name__} matches {list(unmet[0])}.\n"
            "  Patterns are matched from the start of '<full name>.weight'; the first layers are "
            f"{', '.join(names[:3])}."
        )
    if not any(chosen.num_acted for chosen in everyone):
        raise CutRefusedError(
            Why.NOTHING,
            f"tensor parallelism finds nothing to cut in {type(model).__name__} by its {everyone[0].source}.",
            "Give tensor_parallel.partition_config with patterns for its layers, or leave tensor_parallel out.",
        )


def tell_fused(model: nn.Module, chosen: Chosen) -> None:
    """Put into the decisions in what parts fused layers lie, where that is known. Raises CutRefusedError where it is not."""
    config = next((m.config for m in model.modules() if hasattr(m, "config")), None)
    modules = dict(model.named_modules())
    wider = set(_wider_than_rows(model, chosen)) if chosen.source == STRUCTURE else ()
    for name, decision in list(chosen.decisions.items()):
        is_whole = decision.parts == 1 and decision.action in (Action.COLUMN, Action.COLUMN_GATHERED)
        if not is_whole or not is_linear(modules[name]):
            continue
        parts = None if name in wider else rules.fused_parts(name, config, *widths(modules[name]))
        if parts is not None:
            chosen.decisions[name] = replace(decision, parts=parts)
        else:
            raise CutRefusedError(
                Why.FUSED,
                f"{name} is several layers in one, and its {chosen.source} does not say how its rows are ordered: cut as one, "
                "ranks would take parts of the wrong heads.",
                'Say it in tensor_parallel.partition_config: "shape" and "partition_dim" of that layer\'s spec, for example '
                '"shape": [[<rows of q>, <rows of k>, <rows of v>], -1], "partition_dim": 0.',
            )


def _wider_than_rows(model: nn.Module, chosen: Chosen) -> Iterator[str]:
    """Columns that stand alone before one row, and give twice what it takes, or more: gates and ups in one, say."""
    modules = dict(model.named_modules())
    of_parents: dict[str, list[str]] = {}
    for name in chosen.decisions:
        of_parents.setdefault(name.rpartition(".")[0], []).append(name)
    for names in of_parents.values():
        wide = {chosen.decisions[name].action: widths(modules[name]) for name in names if is_linear(modules[name])}
        if len(names) == 2 and set(wide) == {Action.COLUMN, Action.ROW}:
            given, taken = wide[Action.COLUMN][1], wide[Action.ROW][0]
            column = next(name for name in names if chosen.decisions[name].action is Action.COLUMN)
            if given > taken and given % taken == 0 and column.rpartition(".")[2] not in rules.FUSED_NAMES:
                yield column


# Specs. --------------------------------------------------------------------------------------------------------------


def _by_specs(model: nn.Module, wishes: Wishes) -> Chosen:
    defaults = rules.PRESETS[wishes.preset] if wishes.preset and wishes.use_default_specs else ()
    if wishes.preset and not wishes.specs:
        defaults = rules.PRESETS[wishes.preset]
    for spec in wishes.specs:
        rules.check_shape(spec)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding)) or is_conv1d(m)}
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    own = rules.by_specs(wishes.specs, layers, model_type)
    unmet = tuple(
        spec.patterns
        for spec in wishes.specs
        if spec not in own.values() and (spec.model_types is None or model_type in spec.model_types)
    )
    found = {**rules.by_specs(defaults, layers, model_type), **own}
    decisions = {name: _decision(layers[name], spec, wishes.cuts_words) for name, spec in found.items()}
    return Chosen("partition_config" if wishes.specs else f"preset {wishes.preset!r}", decisions, unmet)


def _decision(layer: nn.Module, spec: Spec, cuts_words: bool) -> Decision:
    if isinstance(layer, nn.Embedding):
        is_whole = spec.action in (Action.WHOLE, Action.SUM_GRADIENT)
        return Decision(spec.action if is_whole else Action.VOCAB if cuts_words else Action.WIDTH)
    if spec.shape is None:
        return Decision(spec.action)
    dim = (spec.dim or 0) % len(spec.shape)
    size = spec.shape[dim]
    return Decision(spec.action, tuple(size) if isinstance(size, (tuple, list)) else int(size))


# Transformers' plan. -------------------------------------------------------------------------------------------------


def _planned(model: nn.Module) -> list[tuple[str, nn.Module, dict[str, str]]]:
    """The outermost modules that have a plan, with their names; several where a model is in parts."""
    found: list[tuple[str, nn.Module, dict[str, str]]] = []
    for name, module in model.named_modules():
        plan = inspect.getattr_static(module, "_tp_plan", None)  # adapters' wrappers hand on what is not theirs
        is_inside = any(not outer or name.startswith(f"{outer}.") for outer, *_ in found)
        if isinstance(plan, dict) and plan and not is_inside:
            found.append((name, module, dict(plan)))
    return found


def _by_plans(planned: Sequence[tuple[str, nn.Module, dict[str, str]]], wishes: Wishes) -> Chosen:
    decisions: dict[str, Decision] = {}
    unmet: list[str] = []
    for prefix, module, plan in planned:
        missing = rules.unmet(plan, dict(_without_wrappers(module)))
        unmet += [key for key in missing if not _is_familys(key, module)]
        decisions.update(_by_plan(prefix, module, plan))
    return Chosen(PLAN, decisions, tuple((key,) for key in unmet))


def _is_familys(key: str, model: nn.Module) -> bool:
    """Whether an entry is in the plan that Transformers gives to all models of a kind: it need not be met by each."""
    plans = [getattr(type(module), "_tp_plan", None) for module in model.modules()]
    plans += [getattr(type(getattr(m, "config", None)), "base_model_tp_plan", None) for m in model.modules()]
    return any(key == entry or key.endswith(f".{entry}") for plan in plans if plan for entry in plan)


def _by_plan(prefix: str, model: nn.Module, plan: dict[str, str]) -> dict[str, Decision]:
    bare = dict(_without_wrappers(model))
    actions = rules.by_plan(plan, bare)
    modules = dict(model.named_modules())
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    decisions: dict[str, Decision] = {}
    for name, action in actions.items():
        if name.endswith(".experts.gate_up_proj") and model_type.startswith(rules.GATES_BEFORE_UPS):
            action = Action.PACKED_COLUMN
        full = ".".join(part for part in (prefix, bare[name]) if part)
        made = Decision(action, 2 if action in (Action.PACKED_COLUMN, Action.PACKED_ROW) else 1)
        decisions.update((each, made) for each in _each_layer(modules.get(bare[name]), full))
    return decisions


def _each_layer(module: nn.Module | None, name: str) -> Iterator[str]:
    """The name itself, or those of the linear layers in a list of that name (one head for each code)."""
    if isinstance(module, nn.ModuleList) and all(isinstance(layer, nn.Linear) for layer in module):
        yield from (f"{name}.{index}" for index, _ in module.named_children())
    else:
        yield name


def _without_wrappers(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(name in the plan's terms, name) of modules and parameters."""
    for name, _ in model.named_modules():
        if name:
            yield name, name
    for name, _ in model.named_parameters(remove_duplicate=False):
        yield name, name


# Structure. ----------------------------------------------------------------------------------------------------------


def _by_structure(model: nn.Module, is_part: bool) -> Chosen:
    source = next((m for m in model.modules() if hasattr(m, "config")), None) if is_part else model
    model_type = getattr(getattr(source, "config", None), "model_type", None)
    linears: list[tuple[str, str | None]] = []
    for list_name, blocks in model.named_modules():
        if isinstance(blocks, nn.ModuleList) and not _is_inside(list_name, linears):
            for index, block in blocks.named_children():
                linears += _linears(f"{list_name}.{index}", block)
    actions = rules.by_structure(linears, model_type)
    if is_part:
        for name, layer in model.named_children():
            if not isinstance(layer, nn.ModuleDict) and not any(isinstance(m, nn.ModuleList) for m in layer.modules()):
                actions.update(_of_block(rules.by_structure(_linears(name, layer), model_type)))
    return Chosen(STRUCTURE, {name: Decision(action) for name, action in actions.items()})


def _linears(block_name: str, block: nn.Module) -> list[tuple[str, str | None]]:
    """The linear layers of a block, and what stands after each; not those of which `nn.MultiheadAttention` reads the weight itself."""
    names = [(f"{block_name}.{name}", m) for name, m in block.named_modules() if name]
    leaves = [(name, m) for name, m in names if not list(m.children())]
    following = zip(leaves, [*leaves[1:], None], strict=False)
    return [(name, _kind_name(after)) for (name, module), after in following if is_linear(module)]


def _of_block(actions: dict[str, Action]) -> dict[str, Action]:
    """A pipeline's layer is a block where it takes cut inputs and gives cut outputs; a head or an embedding stays whole."""
    return actions if {Action.ROW, Action.COLUMN} <= set(actions.values()) else {}


def _kind_name(leaf: Any) -> str | None:
    return None if leaf is None else type(leaf[1]).__name__


def _is_inside(name: str, linears: list[tuple[str, str | None]]) -> bool:
    """Whether a list lies inside of blocks that were read already."""
    return any(found.startswith(f"{name}.") for found, _ in linears)
