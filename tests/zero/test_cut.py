"""Which parameters share a unit, on module trees compared as text: `users: parameters`, one unit a line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deepspeed.zero.cut import cut_by_module, cut_by_size, users_of
from deepspeed.zero.leaves import set_z3_leaf_modules


def layer() -> nn.Linear:
    """4 elements."""
    return nn.Linear(2, 2, bias=False)


class Block(nn.Module):
    """8 elements."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = layer(), layer()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = layer()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(1, bias=False)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.model = inner
        self.head = layer()


class NanoGpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({"wte": layer(), "h": nn.ModuleList(Block() for _ in range(2))})
        self.lm_head = layer()


def tied() -> nn.Module:
    model = NanoGpt()
    model.lm_head.weight = model.transformer["wte"].weight  # type: ignore[assignment, union-attr]
    return model


def leaf() -> nn.Module:
    model = Wrapper(Plain())
    set_z3_leaf_modules(model, [Plain])
    return model


def as_text(model: nn.Module, min_numel: int = 4, max_numel: int = 100) -> str:
    names = {module: name or "(root)" for name, module in model.named_modules()}
    wanted = {param: name.removesuffix(".weight") for name, param in model.named_parameters()}
    units = cut_by_module(model, wanted, min_numel=min_numel, max_numel=max_numel)
    users = users_of(model, units)
    return "\n".join(
        f"{'+'.join(names[module] for module, used in users.items() if i in used)}: "
        + " ".join(name for name in wanted.values() if name in dict(unit.params))
        for i, unit in enumerate(units)
    )


PLAIN = """
embed: embed
blocks.0: blocks.0.a blocks.0.b
blocks.1: blocks.1.a blocks.1.b
(root): norm
"""
WRAPPED = """
model.embed: model.embed
model.blocks.0: model.blocks.0.a model.blocks.0.b
model.blocks.1: model.blocks.1.a model.blocks.1.b
model: model.norm
head: head
"""
NANO = """
transformer.wte: transformer.wte
transformer.h.0: transformer.h.0.a transformer.h.0.b
transformer.h.1: transformer.h.1.a transformer.h.1.b
lm_head: lm_head
"""
TIED = """
transformer.wte+lm_head: transformer.wte
transformer.h.0: transformer.h.0.a transformer.h.0.b
transformer.h.1: transformer.h.1.a transformer.h.1.b
"""
NESTED = """
0: 0
1: 1.0 1.1
2: 2
"""
LEAF = """
model: model.embed model.blocks.0.a model.blocks.0.b model.blocks.1.a model.blocks.1.b model.norm
head: head
"""


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Plain, PLAIN),
        (lambda: Wrapper(Plain()), WRAPPED),
        (NanoGpt, NANO),
        (tied, TIED),
        (lambda: nn.Sequential(layer(), nn.Sequential(layer(), layer()), layer()), NESTED),
        (leaf, LEAF),
    ],
    ids=["blocks in a list", "a wrapper around", "nanoGPT", "tied weights", "nested sequential", "leaf mark"],
)
def test_a_model_is_cut_at_its_blocks(make: Callable[[], nn.Module], expected: str) -> None:
    assert as_text(make()) == expected.strip()


def test_small_neighbours_in_a_container_share_a_unit() -> None:
    assert as_text(nn.Sequential(*(layer() for _ in range(5))), min_numel=8) == "0+1: 0 1\n2+3: 2 3\n4: 4"


def test_an_element_larger_than_the_limit_is_opened() -> None:
    assert as_text(Plain(), max_numel=7) == "\n".join(
        ["embed: embed", "blocks.0.a: blocks.0.a", "blocks.0.b: blocks.0.b", "blocks.1.a: blocks.1.a"]
        + ["blocks.1.b: blocks.1.b", "(root): norm"]
    )


def test_small_modules_outside_of_containers_belong_to_the_root() -> None:
    assert as_text(Plain(), min_numel=100).splitlines()[-1] == "(root): embed norm"


def test_every_wanted_parameter_is_in_exactly_one_unit() -> None:
    model = Wrapper(Plain())
    wanted = {param: name for name, param in list(model.named_parameters())[::2]}
    units = cut_by_module(model, wanted, min_numel=4, max_numel=6)
    assert sorted(name for unit in units for name, _ in unit.params) == sorted(wanted.values())


@given(st.lists(st.integers(0, 20)), st.integers(1, 30))
def test_chunks_keep_the_order_and_the_limit_and_no_two_neighbours_fit_in_one(numels: list[int], limit: int) -> None:
    chunks = cut_by_size(numels, limit)
    assert [i for chunk in chunks for i in chunk] == list(range(len(numels)))
    totals = [sum(numels[i] for i in chunk) for chunk in chunks]
    assert all(
        total <= limit or len(chunk) == 1 or numels[chunk[0]] > limit
        for total, chunk in zip(totals, chunks, strict=True)
    )
    assert all(total + numels[chunk[0]] > limit for total, chunk in zip(totals, chunks[1:], strict=False))
