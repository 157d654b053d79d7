"""Which layer becomes what: from the names in a plan, a preset, a user's patterns or the structure to one table. Pure.

Asked by `apply`, which alone changes modules. A table maps dotted names of modules and parameters to an `Action`.

    partition_config   regular expressions over "<name>.weight"; with use_default_specs the preset's come behind
    preset_model       the same, for families
    tp_plan            Transformers' own: exact names with * for numbers, and a style
    structure          blocks in lists of modules: what writes to the residual stream is a row, other layers are columns

Invariant: every entry of a plan finds a layer and every style is known, or the user is told its name.
After the public contract of the original (which tables win) and the styles of Transformers 5.24.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepspeed.parallel.tensor.refusal import CutRefusedError, Why
from deepspeed.utils.errors import DeepSpeedConfigError


class Action(enum.Enum):
    """What is done to a module or a parameter."""

    COLUMN = "column"
    COLUMN_GATHERED = "column, outputs gathered"
    ROW = "row"
    ROW_SPLIT = "row, inputs split"
    PACKED_COLUMN = "two columns in one"
    PACKED_ROW = "two rows in one"
    VOCAB = "embedding, cut over the vocabulary"
    WIDTH = "embedding, cut over the width"
    SUM_GRADIENT = "whole, its gradient summed"
    SUM_OUTPUT = "output summed"
    ROPE_TAIL = "whole, the gradient of the rotary part of its output summed"
    EXPERTS = "experts, whose outputs are summed"
    IDENTITY_EXPERT = "an expert that gives its input, divided by the ranks"
    WHOLE = "whole"


STYLES: Mapping[str, Action] = {
    "colwise": Action.COLUMN,
    "colwise_rep": Action.COLUMN_GATHERED,
    "colwise_gather_output": Action.COLUMN_GATHERED,
    "rowwise": Action.ROW,
    "rowwise_rep": Action.ROW_SPLIT,
    "rowwise_split_input": Action.ROW_SPLIT,
    "packed_colwise": Action.PACKED_COLUMN,
    "packed_rowwise": Action.PACKED_ROW,
    "embedding_rowwise": Action.VOCAB,
    "embedding_colwise": Action.WIDTH,
    "replicated_with_grad_allreduce": Action.SUM_GRADIENT,
    "all_reduce": Action.SUM_OUTPUT,
    "mla_kv_a_proj": Action.ROPE_TAIL,
    "moe_tp_experts": Action.EXPERTS,
    "moe_identity_expert": Action.IDENTITY_EXPERT,
    "local_params": Action.WHOLE,
    "replicate": Action.WHOLE,
    "sequence_parallel": Action.WHOLE,
}
"""Transformers' styles. Parameters are plain tensors here, so "local_params" asks for nothing."""


@dataclass(frozen=True)
class Spec:
    """A user's rule, or a preset's. `shape`, `dim`: how a fused weight divides, and which dim of that shape is cut."""

    patterns: tuple[str, ...]
    action: Action
    shape: tuple[Any, ...] | None = None
    dim: int | None = None
    model_types: tuple[str, ...] | None = None


def wildcards(name: str) -> str:
    """A dotted name with * for its numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", f".{name}")[1:]


def by_plan(plan: Mapping[str, str], names: Iterable[str]) -> dict[str, Action]:
    """The actions of a Transformers plan on the modules and parameters called `names`.

    Raises DeepSpeedConfigError for a style nobody knows.
    """
    unknown = {key: style for key, style in plan.items() if style not in STYLES}
    if unknown:
        key, style = next(iter(unknown.items()))
        raise CutRefusedError(
            Why.PLAN,
            f"the model's tp_plan has {key!r}: {style!r}, a style nobody knows{_more(len(unknown))}.",
            f"Styles are {', '.join(STYLES)}; or give tensor_parallel.partition_config, which takes the plan's place.",
        )
    found = {}
    for name in names:
        asked = plan.get(wildcards(name)) or plan.get(name)
        if asked is not None:
            found[name] = STYLES[asked]
    return found


def unmet(plan: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """The entries of a plan that name no layer."""
    known = {wildcards(name) for name in names} | set(names)
    return [key for key in plan if key not in known]


def _more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""


# Patterns. -----------------------------------------------------------------------------------------------------------


def by_specs(specs: Sequence[Spec], names: Iterable[str], model_type: str | None) -> dict[str, Spec]:
    """For each layer called in `names` the first spec one of whose patterns matches "<name>.weight".

    Raises DeepSpeedConfigError for a pattern that is no regular expression, and for a spec that matches nothing.
    """
    specs = [spec for spec in specs if spec.model_types is None or model_type in spec.model_types]
    compiled = [(spec, [_compiled(pattern) for pattern in spec.patterns]) for spec in specs]
    found: dict[str, Spec] = {}
    for name in names:
        matching = [spec for spec, patterns in compiled if any(p.match(f"{name}.weight") for p in patterns)]
        if matching:
            found[name] = matching[0]
    return found


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise DeepSpeedConfigError(
            f"tensor_parallel.partition_config: the pattern {pattern!r} is no regular expression: {error}."
        ) from error


def check_shape(spec: Spec) -> None:
    """Refuse a fused shape that cannot be. Raises DeepSpeedConfigError (a ValueError)."""
    if spec.shape is None:
        return
    dim = spec.dim or 0
    for i, size in enumerate(spec.shape):
        if isinstance(size, (tuple, list)):
            if i != dim:
                raise DeepSpeedConfigError(f"shape {spec.shape}: a nested tuple only allowed at partition_dim={dim}.")
            if any(isinstance(inner, (tuple, list)) for inner in size):
                raise DeepSpeedConfigError(f"shape {spec.shape}: a shape supports only 1-level nesting.")
        inner_sizes = size if isinstance(size, (tuple, list)) else (size,)
        if any(not isinstance(inner, int) or inner < -1 or inner == 0 for inner in inner_sizes):
            raise DeepSpeedConfigError(f"shape {spec.shape}: dimensions must be positive integers or -1.")
    if not -len(spec.shape) <= dim < len(spec.shape):
        raise DeepSpeedConfigError(f"shape {spec.shape}: partition_dim {dim} is out of range.")


_ATTENTION = r".*\.self_attn\."
_BLOOM = r".*\.self_attention\."
_MLP = r".*\.mlp\."


def _columns_and_rows(columns: Sequence[str], rows: Sequence[str], whole: Sequence[str] = ()) -> tuple[Spec, ...]:
    def spec(patterns: Sequence[str], action: Action) -> Spec:
        return Spec(tuple(rf"{pattern}\.weight$" for pattern in patterns), action)

    made = (spec(columns, Action.COLUMN), spec(rows, Action.ROW), spec(whole, Action.WHOLE))
    return tuple(s for s in made if s.patterns)


_LLAMA = _columns_and_rows(
    [_ATTENTION + "[qkv]_proj", _MLP + "(gate|up)_proj"], [_ATTENTION + "o_proj", _MLP + "down_proj"]
)
_FUSED = _columns_and_rows(
    [_BLOOM + "query_key_value", _MLP + "dense_h_to_4h"], [_BLOOM + "dense", _MLP + "dense_4h_to_h"]
)
PRESETS: Mapping[str, tuple[Spec, ...]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "bloom": _FUSED,
    "chatglm": _FUSED,
    "mixtral": _columns_and_rows(
        [_ATTENTION + "[qkv]_proj", r".*\.block_sparse_moe\.experts\.\d+\.w[13]"],
        [_ATTENTION + "o_proj", r".*\.block_sparse_moe\.experts\.\d+\.w2"],
    ),
    "deepseek_v2": _columns_and_rows(
        [_ATTENTION + "(q|q_b|kv_b)_proj", _MLP + "(.*\\.)?(gate|up)_proj"],
        [_ATTENTION + "o_proj", _MLP + "(.*\\.)?down_proj"],
        [_ATTENTION + "(q_a_proj|kv_a_proj_with_mqa)"],
    ),
    "phi3": (
        *_columns_and_rows([_ATTENTION + "qkv_proj"], [_ATTENTION + "o_proj", _MLP + "down_proj"]),
        Spec((_MLP + r"gate_up_proj\.weight$",), Action.PACKED_COLUMN),
    ),
}
"""By name; none cuts the head or the embedding."""

# Structure. ----------------------------------------------------------------------------------------------------------

ROW_NAMES = frozenset(
    "o_proj out_proj down_proj dense_4h_to_h w2 fc2 c_proj wo attention.dense self_attention.dense self_attn.dense "
    "attention.output.dense output.dense attn.proj mlp.proj proj_out lin2 out_lin SelfAttention.o EncDecAttention.o output_dense ffn_output pwconv2".split()
)
"""Ends of names of layers that write to the residual stream."""

UNSUPPORTED = frozenset("deberta flaubert fsmt jetmoe led longformer xlm xlnet".split())
"""Model types whose layers cannot be told by their structure."""


FUSED_NAMES = frozenset(
    "query_key_value qkv qkv_proj fused_qkv Wqkv W_pack c_attn in_proj in_proj_qkv gate_up_proj".split()
)
"""Last names of layers that are several in one. Consecutive rows of one do not make a part of each."""

FUSED_BY_HEAD = frozenset("bloom gpt_neox gpt_neox_japanese persimmon codegen".split())
"""Model types whose fused attention lies head by head (q, k and v of the first, of the second, ...): whole heads are rows. CodeGen's lies in
stripes of heads, of which `heads` looks that a rank has whole ones."""

FUSED_IN_PARTS = frozenset("gpt2 imagegpt decision_transformer openai-gpt mpt".split())
"""Model types whose fused attention lies in parts as wide as its input: all queries, all keys, all values; or keys and values."""

GATES_BEFORE_UPS = ("inkling",)
"""How model types begin whose plan cuts experts' gates and ups as one ("colwise", in Transformers 5.24), though all gates lie before all ups."""


def fused_parts(name: str, config: Any, width: int, given: int) -> int | tuple[int, ...] | None:
    """How the outputs of a column called `name` divide: 1 where it is no fused layer, or lies head by head; the number of equal parts, or
    their sizes; None where its name says that it is fused, and nothing how its rows are ordered. `config`: the model's; `width` and `given`:
    inputs and outputs."""
    model_type = getattr(config, "model_type", None)
    if name.rpartition(".")[2] not in FUSED_NAMES or model_type in FUSED_BY_HEAD:
        return 1
    if model_type in FUSED_IN_PARTS and given % width == 0:
        return given // width
    if model_type == "falcon" and config.new_decoder_architecture:
        return 1
    if model_type in ("falcon", "gpt_bigcode"):  # with one key and one value, those lie behind all queries
        one = width // config.num_attention_heads
        return (width, one, one) if config.multi_query else 1
    return None


def is_row(name: str) -> bool:
    """Whether a layer's name ends as those that write to the residual stream."""
    parts = name.split(".")
    return parts[-1] in ROW_NAMES or any(".".join(parts[-n:]) in ROW_NAMES for n in (2, 3))


def by_structure(linears: Iterable[tuple[str, str | None]], model_type: str | None) -> dict[str, Action]:
    """The actions on layers `(name, name of the module after it in its block)` inside of blocks; a norm after it makes a row.

    Raises DeepSpeedConfigError (an AssertionError too) for families that cannot be told.
    """
    if model_type in UNSUPPORTED:
        raise CutRefusedError(
            Why.FAMILY,
            f"AutoTP not supported for model. Its type, {model_type!r}, has layers that cannot be told by their structure.",
            "Give tensor_parallel.partition_config with patterns for its layers.",
        )
    return {
        name: Action.ROW if is_row(name) or (after is not None and "norm" in after.lower()) else Action.COLUMN
        for name, after in linears
    }
