"""What scripts do to adapters (PEFT) in the middle of a run, as edits of a side: `tests/edits.py` runs them twice.

The model is the small net of `tests/edits.py` with adapters on its layers, so that plain PyTorch's side has masters in low
precision, too. Writes are wrapped in `side.writing`, which is `GatheredParameters` at stage 3 and nothing elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.edits import Net, assert_same, two_sides

LAYERS = ["layers.0", "layers.1", "layers.2"]


class Adapted(nn.Module):
    """The net, and adapters on its layers."""

    def __init__(self, kind: str = "lora") -> None:
        from peft import AdaLoraConfig, get_peft_model

        super().__init__()
        settings = pruning(AdaLoraConfig) if kind == "adalora" else low_rank()
        self.net: Any = get_peft_model(Net(), settings)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean squared error, fp32."""
        return self.net(x, y)


def low_rank(rank: int = 2) -> Any:
    """LoRA whose product is not zero."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=4, target_modules=LAYERS, lora_dropout=0.0, init_lora_weights=False)


def pruning(kind: Any) -> Any:
    """AdaLoRA that goes from 12 to 6 ranks in a few steps, masks while it does, and freezes its pattern then."""
    return kind(
        init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=1, total_step=7, target_modules=LAYERS, init_lora_weights=False
    )


def adapters(side: Any) -> list[nn.Parameter]:
    """All weights of adapters."""
    return [param for name, param in side.module.named_parameters() if "lora_" in name]


def train(side: Any, *seeds: int) -> None:
    """Steps of two micro-batches' gradients each."""
    for seed in seeds:
        side.backward(seed)
        side.step()


def freeze_adapters(module: Any) -> None:
    """Of the first two layers; the last one's train from the beginning."""
    for name, param in module.named_parameters():
        if "lora_" in name and "layers.2" not in name:
            param.requires_grad_(False)


def unfreeze(side: Any) -> None:
    train(side, 1)
    for param in adapters(side):
        param.requires_grad_(True)
    train(side, 2)


def alternate(side: Any) -> None:
    for turn in range(4):
        for name, param in side.module.named_parameters():
            if "lora_" in name:
                param.requires_grad_(("lora_A" in name) == (turn % 2 == 0))
        train(side, 10 + turn)


def merge_and_unmerge(side: Any) -> None:
    for turn in range(2):
        with side.writing(side.module.parameters()):
            side.module.net.merge_adapter()
        side.forward(20 + turn)
        with side.writing(side.module.parameters()):
            side.module.net.unmerge_adapter()
        train(side, 30 + turn)


def train_while_merged(side: Any) -> None:
    """The layers themselves train while the adapters are in them, and go on without what those added."""
    with side.writing(side.module.parameters()):
        side.module.net.merge_adapter()
    for name, param in side.module.named_parameters():
        param.requires_grad_("lora_" not in name)
    train(side, 40, 41)
    with side.writing(side.module.parameters()):
        side.module.net.unmerge_adapter()
    for param in adapters(side):
        param.requires_grad_(True)
    train(side, 42)


def merge_for_good(side: Any) -> None:
    with side.writing(side.module.parameters()):
        side.module.net = side.module.net.merge_and_unload()
    side.module.requires_grad_(True)
    train(side, 50)


def unload(side: Any) -> None:
    side.module.net = side.module.net.unload()
    side.module.requires_grad_(True)
    train(side, 55)


def add_adapter(side: Any, name: str = "second") -> None:
    torch.manual_seed(3)
    before = set(side.module.parameters())
    side.module.net.add_adapter(name, low_rank(3), autocast_adapter_dtype=False)
    new = [param for param in side.module.parameters() if param not in before]
    with torch.no_grad():
        for param in new:
            param.copy_(torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel())) * 0.3)
    side.give(new)


def switch(side: Any) -> None:
    add_adapter(side)
    for turn in range(4):
        side.module.net.set_adapter(("second", "default")[turn % 2])
        train(side, 60 + turn)


def weigh_together(side: Any) -> None:
    """Both adapters at once, and then one of them deleted."""
    add_adapter(side)
    side.module.net.base_model.set_adapter(["default", "second"])
    train(side, 70, 71)
    side.module.net.base_model.set_adapter(["default"])
    side.module.net.delete_adapter("second")
    train(side, 72)


def without_adapters(side: Any) -> None:
    """As a reference model is had from the same weights."""
    for turn in range(2):
        with side.module.net.disable_adapter():
            side.forward(80)
        train(side, 81 + turn)


EDITS: dict[str, tuple[Any, Any]] = {
    "unfreeze": (unfreeze, freeze_adapters),
    "alternate": (alternate, None),
    "merge and unmerge": (merge_and_unmerge, None),
    "train while merged": (train_while_merged, None),
    "merge for good": (merge_for_good, None),
    "unload": (unload, None),
    "switch": (switch, None),
    "weigh together": (weigh_together, None),
    "without adapters": (without_adapters, None),
}


def edit(rank: int, world_size: int, stage: int, dtype: torch.dtype) -> None:
    """Every edit, on both sides, between steps; the same weights in the end."""
    for i, (name, (change, prepare)) in enumerate(EDITS.items()):
        optimizer = ("sgd", "adamw")[i % 2]
        try:
            with two_sides(rank, world_size, stage, dtype, optimizer, prepare, Adapted) as (plain, side):
                for either in (plain, side):
                    train(either, 0)
                    change(either)
                    train(either, 100, 101)
                assert_same(plain, side)
        except BaseException as error:
            error.add_note(f"[{name}, stage {stage}, {dtype}, {world_size} ranks]")
            raise


def prune(rank: int, world_size: int, stage: int) -> None:
    """AdaLoRA's allocation of ranks between backward and step, which reads gradients and masks weights."""
    from transformers.integrations import HfDeepSpeedConfig

    with two_sides(rank, world_size, stage, optimizer="adamw", make_model=lambda: Adapted("adalora")) as (plain, side):
        for number in range(7):
            plain.backward(number)
            for param in adapters(plain):
                param.grad = torch.stack(plain._grads[param]).sum(0) / world_size
            plain.module.net.base_model.update_and_allocate(number)
            plain.step()
        known = HfDeepSpeedConfig({"zero_optimization": {"stage": stage}})  # by which PEFT asks for whole gradients
        for number in range(7):
            side.backward(number)
            with side.writing(adapters(side)):
                side.module.net.base_model.update_and_allocate(number)
            side.step()
        del known
        patterns = [either.module.net.peft_config["default"].rank_pattern for either in (plain, side)]
        assert patterns[0] == patterns[1] and sum(sum(row) for row in patterns[0].values()) == 6
        assert_same(plain, side)
