from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import deepspeed
from deepspeed import op_builders
from deepspeed.op_builders import ALL_OPS, BUILDERS
from deepspeed.utils.errors import NotAvailableError

ROOT = Path(__file__).resolve().parent.parent
PROMISED = """
AsyncIOBuilder GDSBuilder CPUAdamBuilder CPUAdagradBuilder CPULionBuilder FusedAdamBuilder FusedLambBuilder
FusedLionBuilder QuantizerBuilder FPQuantizerBuilder RandomLTDBuilder TransformerBuilder StochasticTransformerBuilder
InferenceBuilder SpatialInferenceBuilder EvoformerAttnBuilder RaggedOpsBuilder RaggedUtilsBuilder InferenceCoreBuilder
InferenceCutlassBuilder DeepCompileBuilder PinMemoryBuilder SparseAttnBuilder CCLCommBuilder ShareMemCommBuilder
NotImplementedBuilder
""".split()


@pytest.mark.parametrize("name", PROMISED)
def test_a_promised_builder_is_at_its_legacy_path_and_loads_or_says_what_to_use(name: str) -> None:
    builder = getattr(importlib.import_module("deepspeed.ops.op_builder"), name)()
    assert ALL_OPS[builder.NAME].absolute_name() == builder.absolute_name()
    if builder.is_compatible():
        assert builder.load(verbose=False).__name__ == builder.absolute_name()
    else:
        with pytest.raises(NotAvailableError, match=rf"{name}\(\).load\(\): {builder.NAME} is no native .*\n  \w+"):
            builder.load()
    assert (builder.include_paths(), builder.cxx_args(), builder.nvcc_args()) == ([], [], [])
    with pytest.raises(NotAvailableError, match="nothing is built on its own here"):
        builder.builder()


def test_the_optimizers_are_what_their_builders_load() -> None:
    for name, member in [
        ("CPUAdamBuilder", "DeepSpeedCPUAdam"),
        ("CPUAdagradBuilder", "DeepSpeedCPUAdagrad"),
        ("CPULionBuilder", "DeepSpeedCPULion"),
        ("FusedLambBuilder", "FusedLamb"),
    ]:
        assert getattr(deepspeed.get_accelerator().create_op_builder(name).load(), member)
        assert all((ROOT / source).is_file() for source in BUILDERS[name]().sources())


def test_a_builder_says_why_it_is_not_compatible(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(op_builders.logger, "warning", said.append)
    assert not BUILDERS["PinMemoryBuilder"]().is_compatible(verbose=True)
    assert said == ["pin_memory is no native operation in this version. get_accelerator().pin_memory pins tensors."]


def test_all_ops_is_where_scripts_look_for_it() -> None:
    assert importlib.import_module("deepspeed.ops.op_builder.all_ops").ALL_OPS is ALL_OPS
    assert len(ALL_OPS) == len(BUILDERS)
