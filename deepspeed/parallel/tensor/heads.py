"""How attention divides: whole groups of query heads with their key and value heads, or, where those are fewer than ranks, query
heads with copies of what they need.

Asked by `apply` about the module around q, k, v and the output layer; changes that module's counts of heads.

    8 kv heads over 3 ranks              3, 3, 2 of them, each with its query heads
    2 kv heads, 8 query heads, 4 ranks   2 query heads each; k and v stay whole, each rank computes the one head it needs
    1 kv head, 7 query heads, 3 ranks    3, 2, 2 query heads; the kv head everywhere

Invariant: every query head is on one rank, beside its key and value head, in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deepspeed.parallel.tensor.cuts import even
from deepspeed.utils.errors import DeepSpeedConfigError

_KV_COUNTS = (
    "num_key_value_heads num_kv_heads multi_query_group_num n_head_kv kv_n_heads num_attention_heads n_heads attention_heads "
    "num_heads n_head"
).split()
_Q_COUNTS = "num_attention_heads num_heads n_heads n_head attention_heads".split()
_Q_ATTRIBUTES = (
    "num_heads num_attention_heads n_heads n_head nh num_q_heads attn_heads attention_heads n_local_heads".split()
)
_KV_ATTRIBUTES = "num_key_value_heads num_kv_heads n_kv_heads kv_heads n_head_kv".split()
_BIASES, _MASK = ("alibi", "position_bias"), "attention_mask"
_WIDTHS = "all_head_size embed_dim d_model inner_dim hidden_size split_size".split()


@dataclass(frozen=True)
class Heads:
    """How the heads of one attention module are shared out. `num_blocks`: what q is cut in, kv groups or query heads."""

    num_q: int
    num_kv: int
    num_ranks: int

    @property
    def copies_kv(self) -> bool:
        """Whether k and v stay whole, as there are fewer heads of them than ranks."""
        return self.num_kv < self.num_ranks

    @property
    def num_blocks(self) -> int:
        """The blocks that stay together on one rank, in q and in the output layer."""
        return self.num_q if self.copies_kv else self.num_kv

    def own_q(self, rank: int) -> tuple[int, int]:
        """The query heads of a rank."""
        start, stop = even(self.num_blocks, self.num_ranks, rank)
        per_block = self.num_q // self.num_blocks
        return start * per_block, stop * per_block

    def kv_for(self, rank: int) -> tuple[int, ...]:
        """The kv heads that a rank computes where they are copied: one for all its query heads, or one for each."""
        start, stop = self.own_q(rank)
        per_kv = self.num_q // self.num_kv
        needed = [head // per_kv for head in range(start, stop)]
        return tuple(needed[:1]) if len(set(needed)) == 1 else tuple(needed)

    def num_kv_of(self, rank: int) -> int:
        """How many kv heads a rank's attention sees."""
        if self.copies_kv:
            return len(self.kv_for(rank))
        start, stop = even(self.num_kv, self.num_ranks, rank)
        return stop - start


def heads_of(module: nn.Module, config: Any, num_ranks: int, name: str, size_key: str) -> Heads | None:
    """Of an attention module, by its layers where they tell, else by the configuration; None where nothing tells.

    Raises DeepSpeedConfigError where there are fewer query heads than ranks.
    """
    num_q, num_kv = _by_layers(module) or _by_config(module, config)
    if not num_q or not num_kv:
        return None
    stripes = getattr(module, "mp_num", None)
    if isinstance(stripes, int) and stripes % num_ranks:
        raise DeepSpeedConfigError(
            f"{name}: its fused layer lies in {stripes} stripes (mp_num), which {size_key} = {num_ranks} does not "
            "divide.\n  Choose a size that does."
        )
    if num_q % num_kv:
        return None
    if num_q < num_ranks:
        raise DeepSpeedConfigError(
            f"{name} has {num_q} attention heads, which cannot be split over {size_key} = {num_ranks} ranks: a "
            f"head stays on one rank.\n  Choose a size of at most {num_q}."
        )
    return Heads(num_q, num_kv, num_ranks)


def _by_layers(module: nn.Module) -> tuple[int, int] | None:
    head_dim, groups = getattr(module, "head_dim", None), getattr(module, "num_key_value_groups", None)
    key: Any = getattr(module, "k_proj", None)
    if not isinstance(head_dim, int) or not isinstance(groups, int) or not hasattr(key, "out_features"):
        return None
    num_kv, rest = divmod(int(key.out_features), head_dim)
    return (num_kv * groups, num_kv) if num_kv and not rest else None


def _by_config(module: nn.Module, config: Any) -> tuple[int | None, int | None]:
    num_q = _count(config, _Q_COUNTS)
    return num_q, num_q and (_kv_by_layers(module, num_q) or _count(config, _KV_COUNTS) or num_q)


def _kv_by_layers(module: nn.Module, num_q: int) -> int | None:
    """The heads of keys, where layers of queries and keys stand side by side: their widths tell; or all queries share one."""
    if getattr(module, "multi_query", False) is True and not getattr(module, "new_decoder_architecture", False):
        return 1
    for query, key in (("q_proj", "k_proj"), ("query", "key"), ("q", "k")):
        widths = [getattr(getattr(module, name, None), "out_features", None) for name in (query, key)]
        if all(isinstance(width, int) and width for width in widths):
            heads, rest = divmod(num_q * widths[1], widths[0])  # type: ignore[operator]
            return heads if not rest else None
    return None


def _count(config: Any, names: list[str]) -> int | None:
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = next((value for name in names if isinstance(value := _value(text, name), int)), None)
    return found or None


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception as error:  # Transformers' own, of models whose layers differ: the layer's module tells, or nobody
        if "PerLayer" not in type(error).__name__:
            raise
        return None


def narrow(module: nn.Module, heads: Heads, rank: int) -> None:
    """Have an attention module's own counts of heads be this rank's."""
    start, stop = heads.own_q(rank)
    num_q, num_kv = stop - start, heads.num_kv_of(rank)
    state = module.__dict__
    for attribute in _WIDTHS:
        width = state.get(attribute)
        if isinstance(width, int) and width % heads.num_q == 0 and _is_product(module, width, heads.num_q):
            state[attribute] = width // heads.num_q * num_q
    for attributes, before, now in ((_Q_ATTRIBUTES, heads.num_q, num_q), (_KV_ATTRIBUTES, heads.num_kv, num_kv)):
        for attribute in attributes:
            if state.get(attribute) == before:
                state[attribute] = now
    for attribute in ("num_key_value_groups", "n_rep", "num_kv_groups"):
        if isinstance(state.get(attribute), int):
            state[attribute] = num_q // num_kv
    if isinstance(state.get("mp_num"), int):  # CodeGen's fused layer: stripes of q, v and k, whole ones on a rank
        state["mp_num"] //= heads.num_ranks


def own_bias(heads: Heads, rank: int, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A hook before an attention: of a bias for all heads, [batch * heads, 1, keys] or [heads, queries, keys], or in a mask
    [batch, heads, queries, keys], the rank's."""

    def own(name: str, value: Any) -> Any:
        if name == _MASK:
            is_for_each = isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] == heads.num_q > 1
            return value[:, slice(*heads.own_q(rank))] if is_for_each else value
        if not isinstance(value, Tensor) or value.dim() != 3 or value.shape[0] % heads.num_q:
            return value
        start, stop = heads.own_q(rank)
        return value.unflatten(0, (-1, heads.num_q))[:, start:stop].flatten(0, 1)

    return args, {name: own(name, value) if name in (*_BIASES, _MASK) else value for name, value in kwargs.items()}


def _is_product(module: nn.Module, width: int, num_q: int) -> bool:
    """Whether a width is all heads together, and so is cut; a head's own width stays."""
    head_dim = next((v for n in ("head_dim", "head_size") if isinstance(v := module.__dict__.get(n), int)), None)
    return head_dim is None or head_dim * num_q == width
