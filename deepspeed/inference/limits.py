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


def check_length(module: Any, limit: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise TooManyTokensError where prompt and new tokens are more than `limit`; 0 is no limit."""
    prompt = _prompt_length(args, kwargs)
    if not limit or prompt is None:
        return
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        prompt_text, start = f"a prompt of {prompt} tokens", 1
        if prompt > limit:
            raise _too_many(prompt_text, limit)
    else:
        prompt_text, start = f"a prompt of {prompt} tokens", prompt
    new = _new_tokens(module, start, kwargs)
    if start + new > limit or prompt > limit:
        raise _too_many(f"{prompt_text} and {new} new ones", limit)


def _too_many(what: str, limit: int) -> TooManyTokensError:
    return TooManyTokensError(
        f"{what} are more than max_out_tokens = {limit}.\n"
        "  Give init_inference(max_out_tokens=...) a larger number, or none: the cache grows then. Or shorten the prompt, or "
        "ask for fewer with max_new_tokens."
    )


def _prompt_length(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    given = next((kwargs[name] for name in _PROMPTS if kwargs.get(name) is not None), args[0] if args else None)
    return int(given.shape[1]) if isinstance(given, Tensor) and given.dim() >= 2 else None


def _new_tokens(module: Any, prompt: int, kwargs: Mapping[str, Any]) -> int:
    holders = [kwargs, kwargs.get("generation_config"), getattr(module, "generation_config", None)]
    for holder in holders:
        new = _get(holder, "max_new_tokens")
        if new is not None:
            return int(new)
        length = _get(holder, "max_length")
        if length is not None:
            return max(int(length) - prompt, 0)
    return 0


def _get(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
