"""Jobs with a PipelineModule under the libraries: what they make of its engine, and of the calls that it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.pipe import PipelineModule
from tests.integrations.accelerate_jobs import make_accelerator

CONFIG = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "zero_optimization": {"stage": 1}}


def module() -> PipelineModule:
    """Two layers on two ranks."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)]
    return PipelineModule(layers, num_stages=2, loss_fn=nn.MSELoss(), partition_method="uniform")


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(4, 16, generator=generator), torch.randn(4, 4, generator=generator)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def losses_of(engine: Any) -> list[float]:
    """Of three steps."""
    data = batches()
    return [float(engine.train_batch(data)) for _ in range(3)]


def words_of(call: Callable[[], Any], kind: type[BaseException] = RuntimeError) -> str:
    """Why the call was refused."""
    with pytest.raises(kind) as caught:
        call()
    return f"{type(caught.value).__name__}: {caught.value}"


def by_hand(rank: int, world_size: int) -> list[float]:
    model = module()
    return losses_of(deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=CONFIG)[0])


def accelerate(rank: int, world_size: int) -> dict[str, Any]:
    """`prepare`, `train_batch`, and the calls of Accelerate's own loop."""
    accelerator = make_accelerator(1, config=dict(CONFIG))
    model = module()
    engine, optimizer = accelerator.prepare(model, optimizer_of(model))
    found: dict[str, Any] = {
        "kind": type(engine).__name__,
        "losses": losses_of(engine),
        "unwrapped": accelerator.unwrap_model(engine) is model,
        "forward": words_of(lambda: engine(torch.ones(4, 16))),
        "backward": words_of(lambda: accelerator.backward(torch.ones((), requires_grad=True))),
        "after": losses_of(engine)[0],
        "optimizer": type(optimizer).__name__,
    }
    optimizer.step()
    optimizer.zero_grad()
    found["later"] = losses_of(engine)[0] < found["after"]
    accelerator.free_memory()
    return found


def accelerate_counts(rank: int, world_size: int, config: dict[str, Any]) -> str:
    """A configuration whose batch size Accelerate works out: by processes, not by pipelines."""
    accelerator = make_accelerator(1, config=config)
    model = module()
    return words_of(lambda: accelerator.prepare(model, optimizer_of(model)), ValueError)


def trainer(rank: int, world_size: int, folder: str) -> str:
    from transformers import Trainer

    from tests.integrations.trainer_jobs import arguments

    data = [{"forward_input": torch.ones(16)} for _ in range(8)]
    config = {**CONFIG, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    args = arguments(folder, config, remove_unused_columns=False)
    made = Trainer(model=module(), args=args, train_dataset=data)
    return words_of(made.train, Exception)


def fabric(rank: int, world_size: int) -> dict[str, Any]:
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import TorchElasticEnvironment

    from tests.integrations.lightning_jobs import FabricOnCpu

    strategy = FabricOnCpu(config=dict(CONFIG), process_group_backend="gloo")
    maker = Fabric(accelerator="cpu", devices=2, strategy=strategy, plugins=[TorchElasticEnvironment()])
    maker.launch()
    model = module()
    wrapped, _ = maker.setup(model, optimizer_of(model))
    engine = wrapped._forward_module
    return {
        "kind": type(engine).__name__,
        "losses": losses_of(engine),
        "forward": words_of(lambda: wrapped(torch.ones(4, 16))),
        "backward": words_of(lambda: maker.backward(torch.ones((), requires_grad=True), model=wrapped)),
    }


def inside(rank: int, world_size: int) -> str:
    """A LightningModule, or any other module, that has a pipeline as a part."""
    import lightning.pytorch as pl
    from lightning.fabric.plugins.environments import TorchElasticEnvironment

    from tests.integrations.lightning_jobs import OnCpu, loader

    class Holder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = module()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.net(batch[0]).sum()

        def configure_optimizers(self) -> Any:
            return optimizer_of(self)

    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=OnCpu(stage=1, process_group_backend="gloo"), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, plugins=[TorchElasticEnvironment()], max_steps=1,
    )  # fmt: skip
    return words_of(lambda: trainer.fit(Holder(), loader()), Exception)
