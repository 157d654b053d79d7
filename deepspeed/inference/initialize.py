"""`deepspeed.init_inference` and `deepspeed.default_inference_config`: the doors of running models."""

from __future__ import annotations

from typing import Any

from deepspeed.config.explain import read_section
from deepspeed.config.parse import read_config
from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.inference.engine import InferenceEngine
from deepspeed.utils.errors import DeepSpeedConfigError


def init_inference(model: Any, config: Any = None, **kwargs: Any) -> InferenceEngine:
    """Make a model ready to run; returns an engine that is called, and generates, as the model does.

    model: an nn.Module, or an object that holds some (a pipeline); changed in place: cast, quantized, cut over ranks, moved.
    config: None, a dict (not modified) or the path of a JSON file; keywords are the same keys.
    Collective where the model is cut over ranks. Raises DeepSpeedConfigError for what contradicts itself or the model.
    """
    return InferenceEngine(model, read_inference_config(config, kwargs))


def default_inference_config() -> dict[str, Any]:
    """Every key of `init_inference`'s configuration with its default, as a dict to be changed and passed on."""
    return DeepSpeedInferenceConfig().model_dump()


def read_inference_config(config: Any, keywords: dict[str, Any]) -> DeepSpeedInferenceConfig:
    """One configuration from the two ways to give it. Raises DeepSpeedConfigError where they differ, or for bad keys."""
    if isinstance(config, DeepSpeedInferenceConfig) and not keywords:
        return config
    if isinstance(config, DeepSpeedInferenceConfig):
        config = {key: getattr(config, key) for key in config.model_fields_set}
    data = _as_dict(config)
    for key, value in keywords.items():
        if key in data and data[key] != value and _read({key: data[key]}) != _read({key: value}):
            raise DeepSpeedConfigError(
                f"init_inference({key}={value!r}), but its config says {key} = {data[key]!r}.\n  Give one of the two."
            )
        data[key] = value
    return _read(data)


def _read(data: dict[str, Any]) -> DeepSpeedInferenceConfig:
    return read_section(DeepSpeedInferenceConfig, data, "the configuration")


def _as_dict(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, dict):
        return dict(config)  # read_config would make text of the classes in an injection policy
    return read_config(config)
