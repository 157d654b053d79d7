"""What is refused before a prompt costs any work: more tokens than `max_out_tokens`.

Called by the engine's `generate`, with the arguments of Hugging Face's. The length asked for is what `generate` itself
would make of them: `max_new_tokens` before `max_length`, arguments before the generation config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deepspeed.utils.errors import DeepSpeedError


class TooManyTokensError(DeepSpeedError, RuntimeError):
    """A prompt and its answer do not fit."""


_PROMPTS = ("inputs", "input_ids", "inputs_embeds")
_DEFAULT_NEW = 20
"""New tokens where nothing says how many, as Hugging Face has it."""


def check_length(module: Any, limit: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise TooManyTokensError where prompt and new tokens are more than `limit`; 0 is no limit."""
    if not limit:
        return
    prompt = start = _prompt_length(args, kwargs)
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        start = _length(kwargs.get("decoder_input_ids")) or _length(kwargs.get("decoder_inputs_embeds"))
    start = start or 1  # the token that an answer without a prompt begins with
    new = _new_tokens(module, start, kwargs)
    if prompt > limit or start + new > limit:
        raise TooManyTokensError(
            f"a prompt of {prompt} tokens and {new} new ones are more than max_out_tokens = {limit}.\n"
            "  Give init_inference(max_out_tokens=...) a larger number, or none: the cache grows then. Or shorten the prompt, or "
            "ask for fewer with max_new_tokens."
        )


def _prompt_length(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Tokens of the prompt; 0 for none, and for sounds and pictures, which are no tokens."""
    given = next((kwargs[name] for name in _PROMPTS if kwargs.get(name) is not None), args[0] if args else None)
    is_embedded = kwargs.get("inputs_embeds") is given
    return _length(given) if is_embedded or not (isinstance(given, Tensor) and given.is_floating_point()) else 0


def _length(given: Any) -> int:
    return int(given.shape[1]) if isinstance(given, Tensor) and given.dim() >= 2 else 0


def _new_tokens(module: Any, prompt: int, kwargs: Mapping[str, Any]) -> int:
    """How many `generate` makes at most: `max_new_tokens` of anyone before `max_length` of anyone, before the default."""
    holders = [kwargs, kwargs.get("generation_config"), getattr(module, "generation_config", None)]

    def said(name: str) -> int | None:
        found = [value for holder in holders if (value := _get(holder, name)) is not None]
        return int(found[0]) if found else None

    new, length = said("max_new_tokens"), said("max_length")
    if new is not None:
        return new
    if length is None:
        most = getattr(getattr(module, "config", None), "max_position_embeddings", None) or prompt + _DEFAULT_NEW
        length = min(prompt + _DEFAULT_NEW, most)
    return max(length - prompt, 0)


def _get(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
