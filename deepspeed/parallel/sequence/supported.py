"""What of a Hugging Face model does not go with a sequence in parts, by name: kinds of layers, and patterns of masks.

Asked when a model is registered and when it makes a mask. State-space and linear-attention layers carry a state along the
sequence, convolutions look across the cut, chunks and blocks count from the whole sequence's start; computed on a part
they would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from deepspeed.utils.errors import DeepSpeedConfigError

SUPPORTED = {"full_attention", "attention", "sliding_attention", "moe", "dense", "sparse"}
"""Kinds of layers, as configurations list them, that see the sequence through attention alone."""

RECURRENT = (
    "mamba",
    "rwkv",
    "recurrent_gemma",
    "xlstm",
    "bamba",
    "jamba",
    "zamba",
    "falcon_h1",
    "nemotron_h",
    "granitemoehybrid",
)
"""Types of models with recurrent layers whose configuration may list no kinds."""

_PATTERNS = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
    "padding_mask_function",
    "add_offsets_to_mask_function",
    "and_masks",
}
"""Makers of mask functions in transformers whose meaning attention here computes itself."""


def check_layers(config: Any, model: str) -> None:
    """Raise DeepSpeedConfigError, naming the layers, for a configuration with layers that a part of a sequence misleads."""
    kinds = [*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())]
    refused = {kind: [i for i, each in enumerate(kinds) if each == kind] for kind in kinds if kind not in SUPPORTED}
    kind_of_model = str(getattr(config, "model_type", ""))
    if not kinds and kind_of_model.startswith(RECURRENT):
        refused = {kind_of_model: list(range(getattr(config, "num_hidden_layers", 0)))}
    if refused:
        named = "; ".join(f"{kind}: layers {_short(layers)}" for kind, layers in refused.items())
        raise DeepSpeedConfigError(
            f"{model} ({kind_of_model}) has layers that see more of a sequence than this rank's part by another way than attention: "
            f"{named}.\n  Sequence parallelism would compute them wrongly. Use ZeRO and activation checkpointing for this model."
        )


def _short(layers: list[int]) -> str:
    shown = ", ".join(map(str, layers[:4]))
    return f"{shown}, ... ({len(layers)})" if len(layers) > 4 else shown


def check_mask_function(function: Callable[..., Any] | None) -> None:
    """Raise DeepSpeedConfigError for a mask with a pattern beyond causal order, windows, packed samples and padding."""
    unknown = [name for name in _makers(function) if name not in _PATTERNS]
    if unknown:
        raise DeepSpeedConfigError(
            f"this model's attention mask is made by {', '.join(sorted(set(unknown)))} of transformers, which speaks about the "
            "whole sequence.\n  Sequence parallelism knows causal and bidirectional attention, sliding windows, packed samples and "
            "padding."
        )


def _makers(function: Any) -> Iterator[str]:
    """The outermost functions by which a mask function was made, and those that made what it is made of."""
    if not callable(function) or not hasattr(function, "__qualname__"):
        return
    yield function.__qualname__.split(".")[0]
    for cell in function.__closure__ or ():
        held = cell.cell_contents
        for inner in held if isinstance(held, (tuple, list)) else (held,):
            yield from _makers(inner)
