"""`save_mp_checkpoint_path`: a prepared model as files that are read without the original checkpoint, each rank its own.

    non-tp.pt            what every rank has whole, written by the first
    tp_00_00.pt ...      a rank's parts, in eight files; quantized weights as [values, scale of each group], in the parameter's own
                         shape: of one that is transposed (Conv1D) scales are [groups, outputs]
    ds_inference_config.json

Read by `found` at the same tp_size. Names of files, keys of the JSON and the pairs are the original's format.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.checkpoint.files import replace_durably
from deepspeed.config.parallelism import TP_KEY
from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.inference.found import SAVED
from deepspeed.inference.quantized_experts import held_experts, stacked
from deepspeed.kernels.reference.quantize import Quantized
from deepspeed.kernels.table import pick
from deepspeed.mesh import marks
from deepspeed.parallel.expert.hugging_face import HELD
from deepspeed.quant.linear import QuantizedWeight
from deepspeed.utils.dtypes import dtype_name
from deepspeed.utils.errors import DeepSpeedConfigError

NUM_FILES = 8
"""Of each rank, as the original writes."""


def check_can_save(config: DeepSpeedInferenceConfig) -> None:
    """Raise DeepSpeedConfigError, before anything is loaded, for a folder that cannot be made."""
    path = _folder(config)
    if path is None:
        return
    if config.quant.weight.q_type != "symmetric":
        raise DeepSpeedConfigError(
            "save_mp_checkpoint_path with quant.weight.q_type = 'asymmetric': the format has a scale per group and no minimum.\n"
            "  Quantize symmetrically, or do not save."
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeepSpeedConfigError(
            f"save_mp_checkpoint_path = {str(path)!r} cannot be made: {error.strerror}."
        ) from error


def save(module: nn.Module, config: DeepSpeedInferenceConfig, rank: int, tp_size: int) -> None:
    """Write this rank's files, and the first rank's the common ones, where the configuration asks for it."""
    folder = _folder(config)
    if folder is None:
        return
    common, own = _entries(module)
    if rank == 0:
        torch.save(common, folder / "non-tp.pt")
    names = list(own)
    for index in range(NUM_FILES):
        part = {name: own[name] for name in names[index::NUM_FILES]}
        torch.save(part, folder / f"tp_{rank:02d}_{index:02d}.pt")
    if rank == 0:
        files = [f"tp_{r:02d}_{index:02d}.pt" for r in range(tp_size) for index in range(NUM_FILES)]
        content = {
            "type": type(module).__name__,
            "base_dir": "",
            "checkpoints": {"non_tp": ["non-tp.pt"], TP_KEY: files},
            "version": 1.0,
            "parallelization": TP_KEY,
            "tp_size": tp_size,
            "dtype": dtype_name(config.dtype),
        }
        replace_durably(folder / SAVED, json.dumps(content, indent=1).encode())


def _folder(config: DeepSpeedInferenceConfig) -> Path | None:
    given = config.save_mp_checkpoint_path or config.checkpoint_config.save_mp_checkpoint_path
    return Path(given) if given else None


def _entries(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """What all ranks have, and what is this rank's: quantized layers are."""
    common: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for prefix, layer in module.named_modules():
        weight = getattr(layer, "quantized", None) or getattr(getattr(layer, "product", None), "quantized", None)
        if isinstance(weight, QuantizedWeight) and f".{HELD}." not in prefix:
            own[f"{prefix}.weight"] = _pair(weight)
            if prefix.endswith(".product"):
                del own[f"{prefix}.weight"]
    for name, weights, is_transposed in held_experts(module):
        if is_transposed:  # groups lie across its rows
            own[name] = torch.stack([weight.whole().t() for weight in weights])
        else:
            own[name] = stacked(weights, _pair)
    for name, param in module.named_parameters(remove_duplicate=False):
        (own if marks.of(param).cuts else common)[name] = param.detach()
    for name, buffer in module.state_dict().items():
        if name not in common and name not in own and ".quantized." not in f".{name}":
            common[name] = buffer
    return common, own


def _pair(weight: QuantizedWeight) -> list[Tensor]:
    """Values, and the scale of each group."""
    values = _integers(weight)
    if not weight.is_transposed:
        return [values, weight.scales]
    return [values.t().contiguous(), weight.scales.view(weight.rows, -1).t().contiguous()]


def _integers(weight: QuantizedWeight) -> Tensor:
    """[rows, width] int8, also of 4 bits."""
    ones = Quantized(weight.values, torch.ones_like(weight.scales), None)
    whole: Tensor = pick("dequantize", weight.values.device.type)(ones, weight.spec.num_bits, torch.float32)
    return whole.view(weight.rows, weight.width).to(torch.int8)
