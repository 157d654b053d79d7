"""Files of GPTQ, AWQ, bitsandbytes and 8-bit floats hold what their formulas say, bit for bit, and a model loads from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deepspeed
from deepspeed.checkpoint.boxes import box_of
from deepspeed.inference.found import open_weights
from deepspeed.inference.initialize import read_inference_config
from deepspeed.utils.errors import CheckpointError
from tests.inference.families import build, prompts
from tests.inference.test_engine import logits_of

pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip


def opened(folder: Path) -> Any:
    return open_weights(read_inference_config({"checkpoint": str(folder)}, {}), 0, 1)


def word(values: list[int], bits: int) -> int:
    """Neighbours in 32 bits, the first lowest, as the signed number that a file has."""
    found = sum(value << (bits * place) for place, value in enumerate(values))
    return found - 2**32 if found >= 2**31 else found


def gptq(q: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor, bits: int, offset: int) -> dict[str, Tensor]:
    """q [in, out], zeros and scales [groups, out], as the files of AutoGPTQ have them."""
    each = 32 // bits
    rows = [[word(q[i : i + each, j].tolist(), bits) for j in range(q.shape[1])] for i in range(0, q.shape[0], each)]
    packed = [
        [word([(z - offset) % 2**bits for z in row[j : j + each]], bits) for j in range(0, len(row), each)]
        for row in zeros.tolist()
    ]
    return {
        "qweight": torch.tensor(rows, dtype=torch.int32),
        "qzeros": torch.tensor(packed, dtype=torch.int32),
        "scales": scales,
        "g_idx": groups.int(),
    }


def draw(bits: int, width: int = 64, out: int = 48, group: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(bits)
    groups = torch.arange(width) // group
    q = torch.randint(0, 2**bits, (width, out))
    zeros = torch.randint(1, 2**bits, (width // group, out))
    return q, zeros, torch.rand(width // group, out).half() / 50, groups


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_is_scale_times_integer_less_zero_also_in_another_order_of_inputs(
    bits: int, checkpoint_format: str, tmp_path: Path
) -> None:
    q, zeros, scales, groups = draw(bits)
    groups = groups[torch.randperm(len(groups))]
    stored = gptq(q, zeros, scales, groups, bits, 1 if checkpoint_format == "gptq" else 0)
    safetensors.save_file({f"a.{name}": part for name, part in stored.items()}, tmp_path / "model.safetensors")
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": bits, "checkpoint_format": checkpoint_format}))
    expected = torch.stack([(q[i] - zeros[g]).half() * scales[g] for i, g in enumerate(groups.tolist())]).t()
    found = opened(tmp_path)
    assert list(found.held) == ["a.weight"] and torch.equal(found.read("a.weight", None), expected)
    box = box_of([48, 64], {0: [(8, 20), (40, 44)]})
    assert torch.equal(found.read("a.weight", box), torch.cat([expected[8:20], expected[40:44]]))


def test_awq_interleaves_eight_neighbours_of_a_row(tmp_path: Path) -> None:
    q, zeros, scales, _ = draw(4)

    def pack(values: Tensor) -> Tensor:
        rows = values.tolist()
        return torch.tensor(
            [[word([row[j + k] for k in AWQ_ORDER], 4) for j in range(0, len(row), 8)] for row in rows],
            dtype=torch.int32,
        )

    stored = {"a.qweight": pack(q), "a.qzeros": pack(zeros), "a.scales": scales}
    safetensors.save_file(stored, tmp_path / "model.safetensors")
    expected = torch.stack([(q[i] - zeros[i // 16]).half() * scales[i // 16] for i in range(64)]).t()
    assert torch.equal(opened(tmp_path).read("a.weight", None), expected)


def test_bitsandbytes_in_eight_bits_has_a_scale_for_each_row(tmp_path: Path) -> None:
    values, largest = torch.randint(-127, 128, (12, 32), dtype=torch.int8), torch.rand(12)
    stored = {"a.weight": values, "a.SCB": largest, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    safetensors.save_file(stored, tmp_path / "model.safetensors")
    found = opened(tmp_path)
    assert list(found.held) == ["a.weight"]
    assert torch.equal(found.read("a.weight", None), values * largest.view(-1, 1) * 7.874015718698502e-3)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_in_four_bits_looks_values_up_and_scales_blocks(nested: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    q = torch.randint(0, 16, (24 * 64,))
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [24, 64]}
    stored = {
        "a.weight": (q[::2] * 16 + q[1::2]).to(torch.uint8).view(-1, 1),
        "a.weight.quant_map": torch.tensor(NF4),
        "a.weight.absmax": torch.rand(24),
    }
    largest = stored["a.weight.absmax"]
    if nested:
        state |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": 0.25}
        stored |= {
            "a.weight.absmax": torch.randint(0, 256, (24,), dtype=torch.uint8),
            "a.weight.nested_absmax": torch.rand(2),
            "a.weight.nested_quant_map": torch.linspace(-1, 1, 256),
        }
        places = stored["a.weight.absmax"].tolist()
        of = stored["a.weight.nested_absmax"]
        largest = torch.stack(
            [stored["a.weight.nested_quant_map"][p] * of[i // 16] + 0.25 for i, p in enumerate(places)]
        )
    stored["a.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    safetensors.save_file(stored, tmp_path / "model.safetensors")
    expected = torch.stack([torch.tensor(NF4)[v] * largest[i // 64] for i, v in enumerate(q.tolist())])
    found = opened(tmp_path)
    assert list(found.held) == ["a.weight"]
    assert torch.equal(found.read("a.weight", None), expected.to(torch.bfloat16).view(24, 64))


def test_a_model_loads_from_packed_layers_beside_whole_ones(tmp_path: Path) -> None:
    plain, batch = build("llama", hidden_size=96, intermediate_size=64), prompts("left")
    state = {name: value.clone() for name, value in plain.state_dict().items()}
    for name in [name for name in state if name.endswith("_proj.weight")]:
        out, width = state.pop(name).shape
        q, zeros, scales, groups = draw(4, width, out)
        stem = name.removesuffix(".weight")
        state |= {f"{stem}.{part}": value for part, value in gptq(q, zeros, scales, groups, 4, 1).items()}
        weight = (scales[groups] * (q - zeros[groups]).half()).t().float()
        with torch.no_grad():
            plain.get_parameter(name).copy_(weight)
    safetensors.save_file(state, tmp_path / "model.safetensors")
    with deepspeed.OnDevice(dtype=torch.float32, device="meta"):
        model = build("llama", hidden_size=96, intermediate_size=64)
    engine = deepspeed.init_inference(model, dtype="fp32", checkpoint=str(tmp_path))
    expected = logits_of(plain, batch)
    assert (logits_of(engine, batch) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", ["block", "row", "one"])
def test_8_bit_floats_are_multiplied_with_their_scales(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = (torch.randn(70, 48) * 30).to(torch.float8_e4m3fn)
    scale = {"block": torch.rand(3, 2) + 0.5, "row": torch.rand(70, 1) + 0.5, "one": torch.tensor(0.7)}[kind]
    of_element = scale.repeat_interleave(32, 0)[:70].repeat_interleave(40, 1)[:, :48] if kind == "block" else scale
    end = "scale_inv" if kind == "block" else "scale"
    safetensors.save_file({"a.weight": values, f"a.weight_{end}": scale}, tmp_path / "model.safetensors")
    about = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 40]}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    weights = opened(tmp_path)
    assert list(weights.held) == ["a.weight"] and torch.equal(
        weights.read("a.weight", None), values.float() * of_element
    )
    box = box_of([70, 48], {0: [(3, 40)]})
    assert torch.equal(weights.read("a.weight", box, torch.bfloat16), (values.float() * of_element)[3:40].bfloat16())
    if kind == "block":
        (tmp_path / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"a.weight_scale_inv is \[3, 2\]: .* nor of blocks of 128 by 128"):
            opened(tmp_path)


def test_layouts_that_are_none_of_these_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    words = torch.zeros(8, 16, dtype=torch.int32)
    safetensors.save_file({"a.qweight": words}, path)
    with pytest.raises(CheckpointError, match="a has a qweight, and no qzeros and no scales"):
        opened(tmp_path)
    stored = {"a.qweight": words, "a.qzeros": torch.zeros(4, 3, dtype=torch.int32), "a.scales": torch.ones(4, 32)}
    safetensors.save_file(stored, path)
    with pytest.raises(CheckpointError, match=r"a.qweight is \[8, 16\] beside scales \[4, 32\].*neither GPTQ"):
        opened(tmp_path)
    bad = {
        "a.weight": torch.zeros(4, 1, dtype=torch.uint8),
        "a.weight.quant_state.bitsandbytes__nf4": torch.ones(3).byte(),
    }
    safetensors.save_file(bad, path)
    with pytest.raises(CheckpointError, match="a.weight.quant_state.bitsandbytes__nf4 is no description of a weight"):
        opened(tmp_path)
