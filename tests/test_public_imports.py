"""Every name that public code imports from `deepspeed` can be imported; what comes later says so when it is called.

`public_imports.txt` lists the names, one a line; some of them the original does not have any more either.
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

NAMES = Path(__file__).with_name("public_imports.txt").read_text().split()


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


@pytest.mark.parametrize(
    ("path", "cure"),
    [
        ("deepspeed.add_argument", r"deepspeed\.add_config_arguments\(parser\)"),
        ("deepspeed.comm.comm.icdf", r"torch\.distributions\.Normal"),
        ("deepspeed.moe.layer.MoE_tutel", "Use MoE of the same module"),
    ],
)
def test_a_name_that_the_original_has_lost_names_the_cure_when_it_is_called(path: str, cure: str) -> None:
    with pytest.raises(
        NotAvailableError,
        match=rf"{path.replace('comm.comm', 'comm')} is in no recent version .* no counterpart here\.\n  .*{cure}",
    ):
        find(path)()


def test_names_that_the_original_has_lost_and_that_mean_something_here_mean_that() -> None:
    import deepspeed
    from deepspeed.runtime.pipe import topology
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION_OPTIMIZER_STATES

    assert ZERO_OPTIMIZATION_OPTIMIZER_STATES == 1
    assert deepspeed.utils.init_distributed is deepspeed.init_distributed
    assert deepspeed.checkpointing.get_cpus_rng_tracker is deepspeed.checkpointing.get_cuda_rng_tracker
    assert deepspeed.origin == deepspeed.__file__
    assert list(deepspeed.submodule_search_locations) == list(deepspeed.__path__)
    assert (
        topology.get_pipe_parallel_rank()
        == topology.get_slice_parallel_rank()
        == topology.get_data_parallel_rank()
        == 0
    )
    assert topology.get_pipe_parallel_world_size() == topology.get_data_parallel_world_size() == 1


def test_a_function_of_a_later_feature_says_so_when_it_is_called() -> None:
    from deepspeed.module_inject import generic_injection

    with pytest.raises(NotAvailableError, match=r"generic_injection is not available yet: kernels of diffusion models"):
        generic_injection(nn.Linear(1, 1))
