"""Marks on modules that stage 3 does not open."""

from __future__ import annotations

import pytest
from torch import nn

from deepspeed import utils
from tests.models import Mlp

FULL_PATH = f"{nn.LayerNorm.__module__}.{nn.LayerNorm.__qualname__}"


def marked(model: nn.Module) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[module] for module in utils.get_z3_leaf_modules(model)]


@pytest.mark.parametrize("kind", [nn.LayerNorm, "LayerNorm", FULL_PATH])
def test_modules_are_marked_by_class_name_or_path_and_unmarked(kind: type | str) -> None:
    model = Mlp(depth=2)
    assert len(utils.set_z3_leaf_modules(model, [kind])) == 2
    assert marked(model) == ["blocks.0.2", "blocks.1.2"]
    assert utils.z3_leaf_module(model.blocks[0][2])
    assert len(utils.unset_z3_leaf_modules(model, [kind])) == 2
    assert marked(model) == []


def test_modules_are_marked_by_name_and_by_suffix() -> None:
    model = Mlp(depth=2)
    found, missing = utils.set_z3_leaf_modules_by_name(model, ["head", "tail"], raise_if_not_found=False)
    assert (found, missing) == ([model.head], ["tail"])
    found, missing = utils.set_z3_leaf_modules_by_suffix(model, [".2"])
    assert (len(found), missing) == (2, [])
    assert marked(model) == ["blocks.0.2", "blocks.1.2", "head"]
    utils.set_z3_leaf_modules_by_name(model, ["head"], flag=False)
    utils.set_z3_leaf_module(model.blocks[0][2], False)
    assert marked(model) == ["blocks.1.2"]


def test_what_is_not_found_is_an_error_unless_told_otherwise() -> None:
    model = Mlp(depth=1)
    with pytest.raises(ValueError, match=r"no module of Mlp is one of \['Nothing'\]"):
        utils.set_z3_leaf_modules(model, ["Nothing"])
    with pytest.raises(ValueError, match=r"no module is named \['tail'\]"):
        utils.set_z3_leaf_modules_by_name(model, ["tail"])
    with pytest.raises(ValueError, match=r"no module is named \['tail'\]"):
        utils.set_z3_leaf_modules_by_suffix(model, ["tail"])
    assert utils.set_z3_leaf_modules(model, ["Nothing"], raise_if_not_found=False) == []
