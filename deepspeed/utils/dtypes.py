"""Names of dtypes as the JSON configuration spells them. Pure; used by config, precision and inference."""

from __future__ import annotations

import torch

_NAMES: dict[torch.dtype, tuple[str, ...]] = {
    torch.float16: ("fp16", "float16", "half"),
    torch.float32: ("fp32", "float32", "float"),
    torch.bfloat16: ("bf16", "bfloat16"),
    torch.int8: ("int8",),
}
_BY_NAME = {name: dtype for dtype, names in _NAMES.items() for name in names}


def parse_dtype(value: str | torch.dtype) -> torch.dtype:
    """A torch dtype from a dtype or from one of its names, with or without a leading "torch.".

    Raises ValueError, listing the accepted names.
    """
    if isinstance(value, torch.dtype):
        return value
    try:
        return _BY_NAME[str(value).lower().removeprefix("torch.")]
    except KeyError:
        raise ValueError(f"{value!r} is not a dtype. Use one of {', '.join(_BY_NAME)}.") from None


def dtype_name(dtype: torch.dtype) -> str:
    """The short name ("bf16") of a dtype; torch's own spelling where it has none here."""
    return _NAMES.get(dtype, (str(dtype).removeprefix("torch."),))[0]
