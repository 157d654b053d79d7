"""Cuts a model in place, by the decisions of `choose`: every rank keeps its part of each layer.

Called by the engine before an optimizer is built or looked at. Parameters stay the objects that they are, only their memory
becomes a part's: what holds them (an optimizer that came first, a second module that is tied) goes on to.

    choose        which layer becomes what
    agree         a parameter that two modules use is cut as both want it, or by neither
    cut           values of the first rank to all, the own ranges kept, a mark with them
    turn          the layer's class, hooks around modules that are no layers, heads counted anew

Invariant: all ranks do the same in the same order; nothing is changed before everything was decided.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from deepspeed.mesh import marks
from deepspeed.mesh.shape import ROLES
from deepspeed.parallel.tensor import cuts, surround
from deepspeed.parallel.tensor.adapters import refuse_later_adapters
from deepspeed.parallel.tensor.blocks import divide_blocks
from deepspeed.parallel.tensor.choose import Chosen, Decision, Wishes, choose
from deepspeed.parallel.tensor.collectives import TensorGroup
from deepspeed.parallel.tensor.from_meta import fill, is_on_meta
from deepspeed.parallel.tensor.head import find_head, replace_loss
from deepspeed.parallel.tensor.heads import Heads, heads_of, narrow, own_bias
from deepspeed.parallel.tensor.layers import (
    ColumnLinear,
    HeadLinear,
    Part,
    RowLinear,
    VocabEmbedding,
    WidthEmbedding,
    is_conv1d,
    kind_for,
    turn,
)
from deepspeed.parallel.tensor.refusal import CutRefusedError, Why
from deepspeed.parallel.tensor.rules import FUSED_NAMES, Action
from deepspeed.parallel.tensor.whole import carry
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.utils.save_pretrained import refuse_resizing, refuse_save_pretrained

_DIM = ROLES["tensor"][0]
PARSED = "ds_autotp_parsed"
"""The contract's attribute of a model that was cut."""

Ranges = cuts.Ranges
_GROUPED_GRAIN = 8
"""Indices in which the width of experts is cut: torch multiplies them in groups, whose rows begin at multiples of 16 bytes."""
_HEAD_NORM = re.compile(r"(q|k|v|qk|query|key|value)_?(layer_?)?norm\w*$")
_COLUMNS = (Action.COLUMN, Action.COLUMN_GATHERED, Action.PACKED_COLUMN)
_ROWS = (Action.ROW, Action.ROW_SPLIT, Action.PACKED_ROW)
_KEY_OR_VALUE = frozenset("k_proj v_proj key value k v wk wv k_lin v_lin key_proj value_proj".split())
_MLP = (
    "mlp",
    "gate_proj",
    "up_proj",
    "down_proj",
    "w1",
    "w2",
    "w3",
    "fc1",
    "fc2",
    "lm_head",
    "embed_out",
    "4h",
    "expert",
)


@dataclass(frozen=True)
class Cut:
    """One parameter's dimension `dim`, of which each rank holds `ranges[rank]`; None: whole, with a gradient to be summed."""

    dim: int
    ranges: tuple[Ranges, ...] | None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Indices per rank."""
        assert self.ranges is not None, "a whole parameter has no ranges"
        return tuple(cuts.numel(ranges) for ranges in self.ranges)


@dataclass
class Drawn:
    """Everything decided, before anything is changed."""

    cuts: dict[nn.Parameter, Cut] = field(default_factory=dict)
    turns: list[Callable[[], Any]] = field(default_factory=list)
    wanted_by: dict[nn.Parameter, list[str]] = field(default_factory=dict)


def draw(model: nn.Module, ranks: TensorGroup, wishes: Wishes, chosen: Chosen | None = None) -> tuple[Chosen, Drawn]:
    """Decide all, changing nothing; `chosen` has decisions in place of those of `choose`.

    Raises DeepSpeedConfigError for rules and layers that do not go together.
    """
    chosen = chosen or choose(model, wishes)
    if wishes.cuts_head:
        _, head, table = find_head(model)
        chosen.decisions[head] = Decision(Action.COLUMN)
        if table is not None:
            chosen.decisions[table] = Decision(Action.VOCAB)
    return chosen, _Plan(model, ranks, wishes, chosen.decisions).draw()


def carry_out(
    model: nn.Module,
    ranks: TensorGroup,
    drawn: Drawn,
    open_param: Callable[[nn.Parameter], None],
    fills: bool = False,
) -> None:
    """Cut `model` over `ranks`. `open_param` makes a parameter a plain one with all its values; `fills` gives values to a model
    on meta, which stays there otherwise. Collective over `ranks`."""

    def finish(param: nn.Parameter) -> None:
        open_param(param)
        if (cut := drawn.cuts.get(param)) is not None:
            _cut(param, cut, ranks)
        else:
            _share(param.data, ranks)

    if fills and is_on_meta(model):
        fill(model, finish)
    else:
        for param in dict.fromkeys(model.parameters()):
            finish(param)
    for buffer in dict.fromkeys(model.buffers()):
        _share(buffer, ranks)
    for do in drawn.turns:
        do()
    for layer in model.modules():
        if any(marks.of(param).cuts for param in layer.parameters(recurse=False)):
            marks.load_own_parts(layer)
        if isinstance(layer, nn.TransformerEncoderLayer):
            layer.activation_relu_or_gelu = 0  # torch's own fast path multiplies with the weights, not by the layers
    model.__dict__[PARSED] = True
    refuse_later_adapters(model)
    refuse_save_pretrained(
        model,
        lambda layer: any(marks.of(param).cuts for param in layer.parameters(recurse=False)),
        f"whose layers are cut over {ranks.size} ranks would write this rank's part",
        "Write the whole model: engine.save_16bit_model(folder), or engine.save_checkpoint and zero_to_fp32; "
        "for inference init_inference(save_mp_checkpoint_path=...).",
    )
    refuse_resizing(
        model,
        f"whose layers are cut over {ranks.size} ranks: each holds some of the rows",
        "Resize the embeddings before the model is cut.",
    )


def _share(values: Tensor, ranks: TensorGroup) -> None:
    if not values.is_meta and values.numel() and not values.is_nested and values.layout is torch.strided:
        held = values.contiguous()
        ranks.broadcast_(held)
        if held is not values:
            values.copy_(held)


def _cut(param: nn.Parameter, cut: Cut, ranks: TensorGroup) -> None:
    _share(param.data, ranks)
    if cut.ranges is None:
        if param.requires_grad:
            param.register_hook(partial(_summed, ranks))
        return
    own, whole = cut.ranges[ranks.rank], param.shape[cut.dim]
    param.data = _part(param.data, cut, ranks)
    param.grad = None
    marks.cut_further(param, marks.Cut(_DIM, cut.dim, own, whole))
    carry(param, ranks)


def _part(whole: Tensor, cut: Cut, ranks: TensorGroup) -> Tensor:
    assert cut.ranges is not None, "a whole parameter has no parts"
    kept = [whole.narrow(cut.dim, start, stop - start) for start, stop in cut.ranges[ranks.rank]]
    return torch.cat(kept, dim=cut.dim).clone() if kept else whole.narrow(cut.dim, 0, 0).clone()


def cut_states(states: Mapping[Tensor, dict[str, Any]], ranks: TensorGroup, drawn: Drawn) -> None:
    """Have an optimizer's states of whole parameters, by parameter, be those of the parts: what has the whole's shape is cut."""
    for param, cut in drawn.cuts.items():
        if cut.ranges is None or param not in states:
            continue
        whole = list(param.shape)
        whole[cut.dim] = sum(cut.lengths)
        for name, value in states[param].items():
            if isinstance(value, Tensor) and list(value.shape) == whole:
                states[param][name] = _part(value, cut, ranks)


def _summed(ranks: TensorGroup, grad: Tensor) -> Tensor:
    return ranks.sum_(grad.clone(memory_format=torch.contiguous_format))


class _Plan:
    """Turns decisions about names into cuts of parameters."""

    def __init__(self, model: nn.Module, ranks: TensorGroup, wishes: Wishes, decisions: dict[str, Decision]) -> None:
        self.model, self.ranks, self.wishes, self.decisions = model, ranks, wishes, decisions
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.params = dict(model.named_parameters(remove_duplicate=False))
        self.config: Any = next((m.config for m in model.modules() if hasattr(m, "config")), None)
        self.drawn = Drawn()
        self.heads: dict[str, Heads] = {}

    def draw(self) -> Drawn:
        """All of it."""
        whole = self._tied_apart()
        for name, decision in self._expanded():
            if name in whole or (self.wishes.is_part and _has_left(self.modules.get(name))):
                continue
            if name in self.params and name not in self.modules:
                self._param(name, decision)
            elif isinstance(module := self.modules[name], nn.Embedding) or decision.action in (
                Action.VOCAB,
                Action.WIDTH,
            ):
                self._embedding(name, module, decision)
            elif decision.action in (*_COLUMNS, *_ROWS):
                self._linear(name, module, decision)
            else:
                self._surround(name, module, decision)
        for name, heads in self.heads.items():
            self.drawn.turns.append(partial(narrow, self.modules[name], heads, self.ranks.rank))
            self._biases(self.modules[name], heads)
            self._norms(name, heads)
        if self.wishes.has_regions:
            self._divide_tokens()
        if self.wishes.cuts_head:
            owner, head, _ = find_head(self.model)
            lengths = self.drawn.cuts[cast(nn.Parameter, self.modules[head].weight)].lengths
            self.drawn.turns.append(partial(replace_loss, owner, self.ranks, lengths))
        return self.drawn

    def _divide_tokens(self) -> None:
        """Between layers, to be done after the layers were turned."""
        known = self.drawn.cuts
        other = "tp_overlap_comm" if self.wishes.overlaps else "a pipeline's stages" if self.wishes.is_part else None
        if other is not None:
            raise DeepSpeedConfigError(
                f"tensor_parallel.sequence_parallel_regions = true beside {other}, which is not there.\n  Leave out one of them."
            )

        def sum_gradient(param: nn.Parameter) -> None:
            known.setdefault(param, Cut(0, None))

        decisions = dict(self._expanded())
        self.drawn.turns += divide_blocks(self.model, self.ranks, decisions, known.__contains__, sum_gradient)

    def _biases(self, attention: nn.Module, heads: Heads) -> None:
        """What is added to scores head by head: a table of distances inside of the module, or an argument (ALiBi)."""
        ranges = tuple((heads.own_q(rank),) for rank in range(self.ranks.size))
        for table in attention.children():
            if isinstance(table, nn.Embedding) and _shape(table.weight)[1] == heads.num_q:
                self.drawn.cuts.setdefault(cast(nn.Parameter, table.weight), Cut(1, ranges))
        self.drawn.turns.append(partial(_with_kwargs, attention, partial(own_bias, heads, self.ranks.rank)))

    def _norms(self, around: str, heads: Heads) -> None:
        """Of queries and keys, where no rule says: one for all heads sees some of them here, so gradients are summed; one with a
        row for each head is cut."""
        attention: Any = self.modules[around]
        for child, norm in attention.named_children():
            if not _HEAD_NORM.match(child) or f"{around}.{child}" in self.decisions:
                continue
            for param in norm.parameters():
                shape = _shape(param)
                whole = heads.num_kv if child.startswith("k") else heads.num_q
                if isinstance(norm, nn.ModuleList) or any(True for _ in norm.children()):
                    raise _per_head(f"{around}.{child}", "is a norm of each head's own")
                if len(shape) == 1 and shape[0] == getattr(attention, "head_dim", None):
                    self.drawn.cuts.setdefault(param, Cut(0, None))
                elif len(shape) == 2 and shape[0] == whole and not (heads.copies_kv and child.startswith("k")):
                    ranges = self._cut(whole, 0, 1, heads.num_blocks, f"{around}.{child}").ranges
                    self.drawn.cuts.setdefault(param, Cut(0, ranges))
                else:
                    raise _per_head(f"{around}.{child}", "does not see each head alone")

    def _expanded(self) -> Iterator[tuple[str, Decision]]:
        """With adapters around a layer: what is inside is cut, and the adapter's side that meets the cut."""
        for name, decision in self.decisions.items():
            module = self.modules.get(name)
            if module is None or not hasattr(module, "base_layer"):
                yield name, decision
                continue
            if decision.action in (Action.EXPERTS, Action.SUM_OUTPUT):
                raise DeepSpeedConfigError(
                    f"{name} has adapters around its parameters, which cannot be cut over tensor-parallel ranks with them.\n"
                    "  Leave target_parameters out of the adapters' configuration, or merge them first (merge_and_unload)."
                )
            yield f"{name}.base_layer", decision
            side = "lora_B" if decision.action in _COLUMNS else "lora_A"
            for adapter, _ in getattr(module, side, nn.ModuleDict()).named_children():
                yield f"{name}.{side}.{adapter}", decision

    def _tied_apart(self) -> set[str]:
        """Modules whose parameter another module uses that is not cut in the same way, or another stage of a pipeline: all of
        those stay whole."""
        users: dict[nn.Parameter, list[str]] = {}
        for name, param in self.params.items():
            users.setdefault(param, []).append(name.rpartition(".")[0])
        same = {Action.VOCAB: 0, Action.COLUMN_GATHERED: 0, Action.COLUMN: 0, Action.WIDTH: 1}
        apart: set[str] = set()
        for param, owners in users.items():
            kinds = {
                same.get(self.decisions[owner].action, owner) if owner in self.decisions else None for owner in owners
            }
            if (len(owners) > 1 and len(kinds) > 1) or marks.of(param).counts is not None:
                apart |= {owner for owner in owners if owner in self.decisions}
        return apart

    # One layer. ------------------------------------------------------------------------------------------------------

    def _linear(self, name: str, module: Any, decision: Decision) -> None:
        is_column = decision.action in _COLUMNS
        kind = kind_for(module, ColumnLinear if is_column else RowLinear)
        if kind is None:
            replaced = " whose forward was replaced" if "forward" in module.__dict__ else ""
            raise CutRefusedError(
                Why.REPLACED if replaced else Why.KIND,
                f"{name} is a {type(module).__name__}{replaced}, which tensor parallelism cannot cut as {decision.action.value}: only "
                "nn.Linear and what only surrounds its forward.",
                "Give tensor_parallel.partition_config, with partition_type skip for it.",
            )
        weight = module.weight
        around = self._attention(name) if decision.action in (*_COLUMNS, *_ROWS) else None
        heads = around[1] if around is not None else None
        dim = int(is_column is is_conv1d(module))
        size = int(_shape(weight)[dim])
        is_fused = name.rpartition(".")[2] in FUSED_NAMES and decision.action is Action.COLUMN
        num_shared = 2 if self.wishes.copies_shared and heads is not None and heads.num_kv == 1 else 0
        if heads is not None and heads.copies_kv and is_fused and not num_shared:
            raise _few_keys(name, heads, self.wishes.size_key)
        if heads is not None and decision.action is Action.COLUMN and heads.copies_kv and _is_kv(name):
            self._copied_head(module, heads)
        else:
            blocks = heads.num_blocks if heads is not None and decision.action in (Action.COLUMN, Action.ROW) else 1
            cut = self._cut(size, dim, decision.parts, blocks, name, num_shared=num_shared if is_fused else 0)
            self._want(weight, cut, name)
            if module.bias is not None and is_column:
                self._want(module.bias, Cut(0, cut.ranges), name)
            part = Part(
                ranks=self.ranks,
                lengths=cut.lengths,
                gathers=decision.action is Action.COLUMN_GATHERED,
                splits=decision.action is Action.ROW_SPLIT,
                overlaps=self.wishes.overlaps,
            )
            self.drawn.turns.append(partial(turn, module, kind, part))
        if around is not None and decision.action is Action.COLUMN:
            self.heads[around[0]] = around[1]

    def _copied_head(self, module: Any, heads: Heads) -> None:
        """k or v where there are fewer heads of them than ranks."""
        part = Part(ranks=self.ranks, lengths=(), heads=heads.kv_for(self.ranks.rank), num_heads=heads.num_kv)
        for param in (module.weight, module.bias):
            if param is not None:
                self.drawn.cuts[param] = Cut(0, None)
        self.drawn.turns.append(partial(turn, module, kind_for(module, HeadLinear) or HeadLinear, part))

    def _attention(self, name: str) -> tuple[str, Heads] | None:
        """The attention module around a layer, and how its heads are shared out."""
        parts = name.split(".")
        is_own_gate = parts[-1] == "gate_proj" and "attn" in parts[-2:][0].lower()
        if not is_own_gate and any(word in parts[-1] or f".{word}." in f".{name}." for word in _MLP):
            return None
        for length in range(len(parts) - 1, max(len(parts) - 4, 0), -1):
            around = ".".join(parts[:length])
            module = self.modules[around]
            if "attention" in type(module).__name__.lower() or "attn" in parts[length - 1].lower():
                heads = heads_of(
                    module, getattr(module, "config", self.config), self.ranks.size, around, self.wishes.size_key
                )
                return (around, heads) if heads is not None else None
        return None

    def _cut(
        self,
        size: int,
        dim: int,
        parts: int | tuple[int, ...],
        blocks: int,
        name: str,
        grain: int = 1,
        num_shared: int = 0,
    ) -> Cut:
        """`num_shared`: of how many parts, the last ones, every rank has all."""
        sizes = (size // parts,) * parts if isinstance(parts, int) else _filled(parts, size)
        if sum(sizes) != size:
            raise DeepSpeedConfigError(f"{name} has {size} indices, which are not the parts {parts} of its rule.")
        of_ranks = []
        for rank in range(self.ranks.size):
            start, ranges = 0, []
            for number, part in enumerate(sizes):
                low, high = (
                    (0, part)
                    if number >= len(sizes) - num_shared
                    else cuts.blocks(part, blocks, self.ranks.size, rank)
                    if blocks > 1 and part % blocks == 0
                    else cuts.even(part, self.ranks.size, rank, max(self.wishes.grain, grain))
                )
                ranges.append((start + low, start + high))
                start += part
            of_ranks.append(cuts.packed(ranges))
        if size < self.ranks.size:
            raise DeepSpeedConfigError(
                f"{name} has {size} indices to cut, fewer than {self.wishes.size_key} = {self.ranks.size} ranks."
            )
        return Cut(dim, tuple(of_ranks))

    def _want(self, param: nn.Parameter, cut: Cut, name: str) -> None:
        before = self.drawn.cuts.setdefault(param, cut)
        if before != cut:
            raise CutRefusedError(
                Why.SHARED,
                f"{name} and another module share a parameter, and would cut it in different ways.",
                "Give tensor_parallel.partition_config, with partition_type skip for both.",
            )

    # What is no linear layer. ----------------------------------------------------------------------------------------

    def _param(self, name: str, decision: Decision) -> None:
        """A bare parameter: experts' weights, attention sinks. After Transformers: columns are the last dim but one."""
        param = self.params[name]
        shape, action = _shape(param), decision.action
        if action in (Action.WHOLE, Action.SUM_GRADIENT):
            if action is Action.SUM_GRADIENT:
                self.drawn.cuts[param] = Cut(0, None)
            return
        last = len(shape) - 1
        dim = last if action in _ROWS else max(last - 1, 0)
        around = self._attention(name)
        blocks = around[1].num_blocks if around is not None and dim == 0 else 1
        grain = _GROUPED_GRAIN if len(shape) > 2 else 1
        self._want(param, self._cut(int(shape[dim]), dim, decision.parts, blocks, name, grain), name)

    def _embedding(self, name: str, module: Any, decision: Decision) -> None:
        action = decision.action
        if action is Action.WHOLE:
            return
        if action is Action.SUM_GRADIENT:
            self._surround(name, module, decision)
            return
        over_vocab = action in (Action.VOCAB, Action.ROW)
        kind = (
            kind_for(module, VocabEmbedding if over_vocab else WidthEmbedding)
            if isinstance(module, nn.Embedding)
            else None
        )
        if kind is None or getattr(module, "max_norm", None) is not None:
            what = "has max_norm, which needs whole vectors" if kind is not None else "is no plain nn.Embedding"
            what = "has a forward that was replaced" if "forward" in module.__dict__ else what
            raise DeepSpeedConfigError(
                f"{name} ({type(module).__name__}) cannot be cut over tensor-parallel ranks: it {what}."
            )
        dim = 0 if over_vocab else 1
        cut = self._cut(int(_shape(module.weight)[dim]), dim, 1, 1, name)
        self._want(module.weight, cut, name)
        self.drawn.turns.append(partial(turn, module, kind, Part(ranks=self.ranks, lengths=cut.lengths)))

    def _surround(self, name: str, module: Any, decision: Decision) -> None:
        ranks, turns = self.ranks, self.drawn.turns
        if decision.action is Action.SUM_GRADIENT:
            for param in module.parameters(recurse=False):
                self.drawn.cuts[param] = Cut(0, None)
        elif decision.action is Action.SUM_OUTPUT:
            turns.append(partial(module.register_forward_hook, partial(surround.sum_output, ranks)))
        elif decision.action is Action.EXPERTS:
            turns.append(partial(_with_kwargs, module, partial(surround.enter_experts, ranks)))
            turns.append(partial(module.register_forward_hook, partial(surround.sum_output, ranks)))
        elif decision.action is Action.IDENTITY_EXPERT:
            turns.append(partial(module.register_forward_pre_hook, partial(surround.divide_input, ranks)))
        elif decision.action is Action.ROPE_TAIL:
            config = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
            rope = getattr(config, "qk_rope_head_dim", None)
            if not isinstance(rope, int):
                raise DeepSpeedConfigError(
                    f"{name}: the style mla_kv_a_proj needs qk_rope_head_dim in the model's config."
                )
            turns.append(partial(module.register_forward_hook, partial(surround.enter_tail, ranks, rope)))


def _with_kwargs(module: nn.Module, hook: Any) -> None:
    module.register_forward_pre_hook(hook, with_kwargs=True)


def _shape(param: Tensor) -> torch.Size:
    """The whole shape, also of a parameter that ZeRO has sharded already."""
    shape = getattr(param, "ds_shape", None)
    return torch.Size(shape) if shape is not None else param.shape


def _filled(parts: tuple[int, ...], size: int) -> tuple[int, ...]:
    rest = size - sum(part for part in parts if part > 0)
    return tuple(part if part > 0 else rest for part in parts)


def _is_kv(name: str) -> bool:
    parts = name.split(".")
    return any(part in _KEY_OR_VALUE for part in parts[-3:])


def _few_keys(name: str, heads: Heads, size_key: str) -> CutRefusedError:
    return CutRefusedError(
        Why.KEYS,
        f"{name} has {heads.num_kv} key heads in one layer with their queries, fewer than {size_key} = {heads.num_ranks}.",
        f"Choose a size of at most {heads.num_kv}."
        if heads.num_kv > 1
        else "Give tensor_parallel.partition_config, with partition_type skip for the layers of that attention.",
    )


def _per_head(name: str, what: str) -> CutRefusedError:
    return CutRefusedError(
        Why.NORM,
        f"{name} {what}, and its attention's heads would be on several ranks.",
        "Give tensor_parallel.partition_config, with partition_type skip for the layers of that attention.",
    )


def _has_left(module: nn.Module | None) -> bool:
    """Whether something without parameters stands where the plan names a layer, which is on another stage."""
    return module is not None and next(module.parameters(), None) is None
