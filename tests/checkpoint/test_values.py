"""Values survive the way through JSON; what cannot be stored is refused by name."""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepspeed.checkpoint.values import decode, encode
from deepspeed.utils.errors import CheckpointError


def through_json(value: Any) -> Any:
    """Encoded, printed, parsed, decoded."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(value, tensors, "x"), allow_nan=False)
    return decode(json.loads(text), tensors)


KEYS = st.one_of(st.text(max_size=5), st.integers(), st.booleans(), st.tuples(st.integers(), st.text(max_size=2)))
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8), st.binary(max_size=8)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(KEYS, inner, max_size=4),
        st.sets(st.integers()),
    ),
    max_leaves=12,
)


@given(VALUES)
def test_plain_values_come_back_equal_and_of_the_same_types(value: Any) -> None:
    back = through_json(value)
    assert repr(back) == repr(value) or back == value


def test_what_training_code_keeps_comes_back() -> None:
    value = {
        "nan": float("nan"), "minus_zero": -0.0, "huge": 2**200, "complex": 1 + 2j, "path": Path("a/b"), "dtype": torch.bfloat16,
        "device": torch.device("cpu"), "size": torch.Size([2, 3]), "deque": deque([1, 2]), "frozen": frozenset({1}),
        "ordered": OrderedDict(a=1), "numpy": np.float32(0.5), "$tag": 1, 7: "seven", "scalar": torch.tensor(3, dtype=torch.int16),
    }  # fmt: skip
    back = through_json(value)
    assert np.isnan(back.pop("nan"))
    assert str(back["minus_zero"]) == "-0.0"
    assert back["scalar"].dtype == torch.int16
    value.pop("nan")
    assert back == value


def test_tensors_and_arrays_are_copies(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    value = {"a": torch.arange(6).view(2, 3).t(), "b": np.arange(4.0), "c": torch.empty(0)}
    encoded = encode(value, tensors, "x")
    value["b"][:] = 9
    back = decode(encoded, tensors)
    assert torch.equal(back["a"], value["a"])
    assert back["b"].tolist() == [0, 1, 2, 3]
    assert back["c"].shape == (0,)


def test_arrays_of_the_other_byte_order_come_back_equal() -> None:
    tensors: dict[str, torch.Tensor] = {}
    encoded = encode(np.arange(3, dtype=">i4"), tensors, "x")
    assert decode(encoded, tensors).tolist() == [0, 1, 2]


class Thing:
    """Not a value."""


def endless() -> list[Any]:
    """A list that contains itself."""
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": {"b": [1, Thing()]}}, r"x\.a\.b\.1 is a .*test_values\.Thing, which a checkpoint cannot hold"),
        (lambda: 1, "function, which a checkpoint cannot hold"),
        (torch.zeros(2, device="meta"), "x is a meta tensor"),
        (torch.eye(2).to_sparse(), "sparse"),
        (np.array(["text"]), "array of <U4"),
        (np.longdouble(1.5), "x is a numpy.longdouble, which a checkpoint cannot hold.*float"),
        ({"a": endless()}, r"x\.a\.0\.0.*contains itself"),
    ],
)
def test_everything_else_is_refused_by_name(value: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        encode(value, {}, "x")


@pytest.mark.parametrize(
    "value", [{"$dtype": "load"}, {"$scalar": ["float32", "x"]}, {"$what": 1}, {"$bytes": 3}, {"$dict": 1}]
)
def test_what_encode_never_writes_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        decode(value, {})
