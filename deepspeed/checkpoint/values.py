"""Python values as JSON and back: what a checkpoint holds that is not a tensor, without pickle.

Used by save and load for the state of schedulers, loaders, random generators, and the user's `client_state`.

JSON has six types; what else training code keeps is written as an object with one key that begins with "$":

    (1, 2)              {"$tuple": [1, 2]}               a tensor   {"$tensor": "key in the safetensors file"}
    {1: "a"}            {"$dict": [[1, "a"]]}            an array   {"$array": "key"}
    float("nan")        {"$float": "nan"}                ...see docs/checkpoint-format.md

Invariant: `decode(encode(x)) == x`, with numpy scalars as Python numbers and subclasses of dict, list and str as these.
Anything else is refused by name; decoding builds nothing but the types listed here.
"""

from __future__ import annotations

import base64
import math
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepspeed.utils.errors import CheckpointError

MAX_DEPTH = 100
"""Containers inside each other. What is written has to be read again, and Python's stack holds some hundreds of levels."""


def encode(value: Any, tensors: dict[str, Tensor], path: str, depth: int = 0) -> Any:
    """`value`, `depth` containers deep, as JSON; its tensors go to `tensors` under keys that begin with `path`.

    Raises CheckpointError.
    """
    if depth > MAX_DEPTH:
        raise CheckpointError(
            f"{path[:200]}... is nested more than {MAX_DEPTH} levels deep, or contains itself, which a checkpoint cannot hold.\n"
            "  Store its parts under names of their own."
        )
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float, complex, np.number, np.bool_)):
        return _encode_number(_as_python(value, path) if isinstance(value, np.generic) else value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return _encode_mapping(value, tensors, path, depth)
    if isinstance(value, torch.Size):
        return {"$size": list(value)}
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        items = [encode(item, tensors, f"{path}.{i}", depth + 1) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {_TAG_OF[type_of(value)]: items}
    if isinstance(value, (Tensor, np.ndarray)):
        return _encode_array(value, tensors, path)
    for kind, tag, to_text in _AS_TEXT:
        if isinstance(value, kind):
            return {tag: to_text(value)}
    raise CheckpointError(
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold.\n"
        "  Checkpoints hold numbers, strings, lists, tuples, sets, dicts, tensors and arrays, never pickled objects. Store the "
        "object's own state (its state_dict(), or its fields) instead."
    )


def type_of(value: Any) -> type:
    """Which of the sequence types listed here `value` is."""
    return next(kind for kind in _TAG_OF if isinstance(value, kind))


_TAG_OF: dict[type, str] = {tuple: "$tuple", set: "$set", frozenset: "$frozenset", deque: "$deque"}
_AS_TEXT: tuple[tuple[type, str, Callable[[Any], Any]], ...] = (
    (bytes, "$bytes", lambda value: base64.b64encode(value).decode()),
    (torch.dtype, "$dtype", lambda value: str(value).removeprefix("torch.")),
    (torch.device, "$device", str),
    (PurePath, "$path", str),
)


def _as_python(value: Any, path: str) -> Any:
    number = value.item()
    if isinstance(number, np.generic):  # numpy keeps what no Python number holds
        raise CheckpointError(
            f"{path} is a numpy.{type(value).__name__}, which a checkpoint cannot hold.\n  Store it as float() or complex()."
        )
    return number


def _encode_number(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, complex):
        return {"$complex": [_encode_number(value.real), _encode_number(value.imag)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(float(value))}
    # Python refuses to print or parse integers of more than 4300 digits as decimals.
    if isinstance(value, int):
        return int(value) if value.bit_length() < 64 else {"$int": hex(value)}
    return float(value)


def _encode_mapping(value: Mapping[Any, Any], tensors: dict[str, Tensor], path: str, depth: int) -> Any:
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {str(key): encode(item, tensors, f"{path}.{key}", depth + 1) for key, item in value.items()}
    pairs = []
    for i, (key, item) in enumerate(value.items()):
        pairs.append(
            [
                encode(key, tensors, f"{path}.key{i}", depth + 1),
                encode(item, tensors, f"{path}.{key}", depth + 1),
            ]
        )
    return {"$dict": pairs}


def _encode_array(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    is_tensor = isinstance(value, Tensor)
    try:
        tensor = value.detach() if is_tensor else torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
    except TypeError as error:
        raise CheckpointError(f"{path} is an array of {value.dtype}, which a checkpoint cannot hold.") from error
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        raise CheckpointError(
            f"{path} is a {'meta' if tensor.is_meta else 'sparse, quantized or nested'} tensor, which a checkpoint cannot hold.\n"
            "  Store it dense, e.g. tensor.to_dense()."
        )
    if is_tensor and tensor.dim() == 0:
        return {"$scalar": [str(tensor.dtype).removeprefix("torch."), _encode_number(tensor.item())]}
    key = path
    while key in tensors:
        key += "_"
    # A copy: what the user does to it after `save_checkpoint` returned must not reach the file.
    tensors[key] = tensor.to("cpu", copy=True).contiguous()
    return {"$tensor" if is_tensor else "$array": key}


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `encode` was given. Raises CheckpointError for what `encode` does not write."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: decode(item, tensors) for key, item in value.items()}
    try:
        return _decode_tagged(tag, value[tag], tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"a value of kind {tag!r} cannot be read: {error!r}") from error


def _decode_tagged(tag: str, inner: Any, tensors: Mapping[str, Tensor]) -> Any:
    if tag == "$dict":
        return {decode(key, tensors): decode(item, tensors) for key, item in inner}
    if tag == "$tensor":
        return tensors[inner].clone()
    if tag == "$array":
        return tensors[inner].clone().numpy()
    if tag == "$complex":
        return complex(*(decode(part, tensors) for part in inner))
    if tag == "$dtype":
        return _dtype(inner)
    if tag == "$scalar":
        return torch.tensor(decode(inner[1], tensors), dtype=_dtype(inner[0]))
    for kind, its_tag in _TAG_OF.items():
        if tag == its_tag:
            return kind(decode(item, tensors) for item in inner)
    return _FROM_TEXT[tag](inner)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype


_FROM_TEXT: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$int": lambda text: int(text, 16),
    "$size": lambda sizes: torch.Size(sizes),
    "$bytes": base64.b64decode,
    "$device": torch.device,
    "$path": Path,
}
