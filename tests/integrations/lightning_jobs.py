"""Jobs under Lightning and Fabric.

Lightning lets DeepSpeed strategies run on CUDA alone: `setup_environment` refuses any other accelerator, and the check
of device indices refuses CPU devices. The classes here lift these two checks of Lightning's, in a subclass of its own
strategy registered under names of its own; nothing of this package is touched.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.strategies import DeepSpeedStrategy as FabricStrategy
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

LR = 0.05


class OnCpu(DeepSpeedStrategy):
    """Lightning's strategy without its insistence on CUDA."""

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class FabricOnCpu(FabricStrategy):
    """Fabric's strategy without its insistence on CUDA."""

    def setup_environment(self) -> None:
        self._setup_distributed()

    def _setup_distributed(self) -> None:
        self._set_world_ranks()
        self._init_deepspeed_distributed()
        if not self._config_initialized:
            self._format_config()
            self._config_initialized = True


class Rows(Dataset[Tensor]):
    """Points and their labels."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, 16, generator=generator)
        self.y = (self.x[:, 0] > 0).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Classifier(pl.LightningModule):
    """Two layers, with a schedule that Lightning steps."""

    def __init__(self, width: int = 32, divide: float = 1.0) -> None:
        """`divide`: Lightning divides the loss by the micro-batches of a step, and DeepSpeed's `backward` does it again; a
        plain run divides once more to be compared."""
        super().__init__()
        self.save_hyperparameters()
        self.layers: nn.Module | None = None
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.layers is None:
            torch.manual_seed(0)
            width = self.hparams["width"]
            self.layers = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        assert self.layers is not None
        return self.layers(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]).float(), batch[1])
        self.log("loss", loss)
        self.losses.append(self.all_gather(loss.detach()).mean().item())
        return loss / self.hparams["divide"]

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]).float(), batch[1]), sync_dist=True)

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]).float(), batch[1]), sync_dist=True)

    def predict_step(self, batch: Any, index: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=LR, eps=1e-6, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(count: int = 64) -> DataLoader[Tensor]:
    """Batches of four."""
    return DataLoader(Rows(count), batch_size=4, shuffle=False)


def make_trainer(folder: str, stage: int | None, **options: Any) -> Any:
    """A Trainer on two CPU ranks; `stage` None is plain distributed training."""
    offload = options.pop("offload", False)
    extra = {"offload_optimizer": offload, "offload_parameters": offload and stage == 3} if offload else {}
    strategy = (
        DDPStrategy(process_group_backend="gloo")
        if stage is None
        else OnCpu(stage=stage, process_group_backend="gloo", **extra)
    )
    defaults = {
        "accelerator": "cpu",
        "devices": 2,
        "max_epochs": 1,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "enable_progress_bar": False,
        "enable_model_summary": True,
        "logger": False,
        "use_distributed_sampler": True,
        "default_root_dir": folder,
        "num_sanity_val_steps": 1,
        "plugins": [TorchElasticEnvironment()],
        "limit_train_batches": 8,
    }
    return pl.Trainer(strategy=strategy, **{**defaults, **options})


def fit(rank: int, world_size: int, folder: str, stage: int | None, **options: Any) -> dict[str, Any]:
    """Fit, validate, test and predict with one module; losses, and what its weights are at the end."""
    os.environ["TORCHELASTIC_RUN_ID"] = "job"
    module = Classifier(divide=2.0 if stage is None else 1.0)
    trainer = make_trainer(folder, stage, **options)
    trainer.fit(module, loader(), loader(16))
    found: dict[str, Any] = {
        "losses": module.losses,
        "val": float(trainer.callback_metrics["val_loss"]),
        "steps": trainer.global_step,
    }
    if stage is not None:
        found["engine_steps"] = trainer.strategy.model.global_steps
        found["summary"] = trainer.strategy.deepspeed_engine is trainer.strategy.model
    found["test"] = trainer.test(module, loader(16), verbose=False)[0]["test_loss"]
    found["predictions"] = torch.cat(trainer.predict(module, loader(16)))
    return found


def resume(rank: int, world_size: int, folder: str, stage: int, continues: bool) -> dict[str, Any]:
    """Two epochs, the first of which is saved; or the second from that checkpoint."""
    os.environ["TORCHELASTIC_RUN_ID"] = "job"
    module = Classifier()
    saver = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = make_trainer(folder, stage, max_epochs=2, callbacks=[saver])
    path = Path(folder) / "epoch=0.ckpt"
    trainer.fit(module, loader(), loader(16), ckpt_path=str(path) if continues else None)
    found: dict[str, Any] = {
        "losses": module.losses[-8:],
        "files": sorted(p.name for p in path.rglob("*")),
        "steps": trainer.global_step,
    }
    found["test"] = make_trainer(folder, stage).test(Classifier(), loader(16), ckpt_path=str(path), verbose=False)[0][
        "test_loss"
    ]
    if rank == 0:
        from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

        whole = convert_zero_checkpoint_to_fp32_state_dict(path, Path(folder) / "whole.ckpt")
        found["whole"] = {name: value.clone() for name, value in whole["state_dict"].items()}
    return found


def fabric_of_several(rank: int, world_size: int, folder: str, stage: int | None) -> dict[str, Any]:
    """Two models in turns, one of them in pairs of micro-batches by `no_backward_sync`; then a third that only evaluates,
    with the weights of a checkpoint of the first."""
    os.environ["TORCHELASTIC_RUN_ID"] = "job"
    config = {
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
        "train_micro_batch_size_per_gpu": 4,
    }
    strategy: Any = "ddp" if stage is None else FabricOnCpu(config=config, process_group_backend="gloo")
    runner = Fabric(accelerator="cpu", devices=2, strategy=strategy, plugins=[TorchElasticEnvironment()])
    runner.launch()

    def make(seed: int) -> Any:
        with runner.init_module(empty_init=False if stage is None or stage < 3 else None):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))

    def make_trained(seed: int) -> Any:
        model = make(seed)
        return runner.setup(model, torch.optim.AdamW(model.parameters(), lr=LR, eps=1e-6, weight_decay=0.0))

    (first, first_optimizer), (second, second_optimizer) = make_trained(0), make_trained(1)
    losses = []
    for index, (x, y) in enumerate(runner.setup_dataloaders(loader())):
        is_boundary = index % 2 == 1
        with runner.no_backward_sync(first, enabled=not is_boundary):
            loss = nn.functional.cross_entropy(first(x), y)
            runner.backward(loss / 2, model=first)
        if is_boundary:
            first_optimizer.step()
            first_optimizer.zero_grad()
        other = nn.functional.cross_entropy(second(x) + first(x).detach(), y)
        runner.backward(other, model=second)
        second_optimizer.step()
        second_optimizer.zero_grad()
        losses += [runner.all_gather(value.detach()).mean().item() for value in (loss, other)]
    found: dict[str, Any] = {"losses": losses}
    if stage is not None:
        runner.save(folder, {"model": first, "optimizer": first_optimizer, "epoch": 3})
        loaded = runner.setup(make(2))
        found["left"] = sorted(runner.load(folder, {"model": loaded}))
        with torch.no_grad():
            found["is_loaded"] = torch.equal(loaded(x), first(x))
    return found


def fabric(
    rank: int, world_size: int, folder: str, stage: int | None, clip: float = 0.0, **options: Any
) -> dict[str, Any]:
    """Fabric's loop: the optimizer is stepped, not the engine; save and load."""
    os.environ["TORCHELASTIC_RUN_ID"] = "job"
    config = {
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": clip,
        "train_micro_batch_size_per_gpu": 4,
    }
    strategy: Any = "ddp" if stage is None else FabricOnCpu(config=config, process_group_backend="gloo", **options)
    runner = Fabric(accelerator="cpu", devices=2, strategy=strategy, plugins=[TorchElasticEnvironment()])
    runner.launch()
    with runner.init_module(empty_init=False if stage is None or stage < 3 else None):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=LR, eps=1e-6, weight_decay=0.0)
    model, optimizer = runner.setup(model, optimizer)
    data = runner.setup_dataloaders(loader())
    batches = list(data)

    def run(some: Any) -> list[float]:
        losses = []
        for x, y in some:
            loss = nn.functional.cross_entropy(model(x), y)
            runner.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(runner.all_gather(loss.detach()).mean().item())
        return losses

    found: dict[str, Any] = {"losses": run(batches[:4])}
    if stage is not None:
        state = {"model": model, "optimizer": optimizer, "epoch": 3}
        runner.save(folder, state)
        found["rest"] = run(batches[4:])
        left = runner.load(folder, {**state, "epoch": 0})
        found["again"] = run(batches[4:])
        found["left"] = sorted(left)
        found["kind"] = type(optimizer).__mro__[1].__name__
    return found
