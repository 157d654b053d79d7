"""Every name that public code imports from `deepspeed` can be imported; what comes later says so when it is called.

`public_imports.txt` lists the names, one a line; "gone" marks those that the original does not have any more either.
"""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from deepspeed.legacy import PATHS
from deepspeed.porch.placeholder import Placeholder
from deepspeed.utils.errors import NotAvailableError

LINES = [line.split() for line in Path(__file__).with_name("public_imports.txt").read_text().splitlines()]
NAMES = [words[0] for words in LINES if len(words) == 1]


def find(path: str) -> Any:
    """What `from <module> import <name>` gives."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        return importlib.import_module(path)


@pytest.mark.parametrize("path", NAMES)
def test_a_name_that_public_code_imports_is_there(path: str) -> None:
    found = find(path)
    if isinstance(found, type) and issubclass(found, Placeholder):
        with pytest.raises(NotAvailableError, match="not available yet: |no counterpart here"):
            found(1, key=2)


@pytest.mark.parametrize("path", sorted(PATHS))
def test_every_row_of_the_porch_names_something_that_is_there(path: str) -> None:
    module = importlib.import_module(path)
    for name in set(PATHS[path]) - {"*", "="}:
        getattr(module, name)


def test_a_star_brings_a_path_s_names_and_no_modules_below_it() -> None:
    brought: dict[str, Any] = {}
    exec("from deepspeed.runtime.pipe.topology import *", brought)
    assert brought.keys() - {"__builtins__"} == {
        name for name in PATHS["deepspeed.runtime.pipe.topology"] if not name.startswith("_")
    }
    brought.clear()
    exec("from deepspeed.runtime.pipe import *", brought)
    assert not any(isinstance(value, type(pytest)) for value in brought.values())


def test_a_placeholder_is_harmless_until_it_is_called() -> None:
    from deepspeed.runtime.data_pipeline.data_routing import basic_layer as same
    from deepspeed.runtime.data_pipeline.data_routing.basic_layer import RandomLayerTokenDrop as Placeholder

    class Mine(Placeholder, nn.Module):
        layers: list[Placeholder] | None = None

        def forward(self) -> int:
            return 1

    assert Placeholder is same.RandomLayerTokenDrop
    assert not isinstance(nn.Linear(1, 1), (Placeholder, Mine))
    assert issubclass(Mine, Placeholder)
    assert pickle.loads(pickle.dumps(Placeholder)) is Placeholder
    with pytest.raises(NotAvailableError, match=r"RandomLayerTokenDrop is not available yet: random layer-token drop"):
        Placeholder(layers=[], num_stages=2)
    with pytest.raises(NotAvailableError, match="random layer-token drop"):
        Mine()


def test_a_function_of_a_later_feature_says_so_when_it_is_called() -> None:
    from deepspeed.module_inject import generic_injection

    with pytest.raises(NotAvailableError, match=r"generic_injection is not available yet: kernels of diffusion models"):
        generic_injection(nn.Linear(1, 1))
