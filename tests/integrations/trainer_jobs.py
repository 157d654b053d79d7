"""Jobs under the Transformers Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deepspeed import utils
from tests.integrations.common import ByteDataset

LR = 1e-2
STEPS = 6


def arguments(folder: str, deepspeed: Any, **changes: Any) -> Any:
    """TrainingArguments of a short run on CPU."""
    from transformers import TrainingArguments

    values: dict[str, Any] = {
        "output_dir": folder,
        "deepspeed": deepspeed,
        "use_cpu": True,
        "ddp_backend": "gloo",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "warmup_steps": 2,
        "learning_rate": LR,
        "adam_epsilon": 1e-6,
        "weight_decay": 0.0,  # Transformers spares norms and biases, an optimizer of the configuration does not
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 1,
    }
    return TrainingArguments(**{**values, **changes})


def make_trainer(model_folder: str, args: Any, *, delays_lr: bool = False, **kwargs: Any) -> Any:
    """A Trainer over the model in `model_folder`, which is loaded after the arguments: under zero.Init at stage 3.

    `delays_lr`: with Transformers' linear schedule one step later, which is what WarmupDecayLR is.
    """
    from transformers import AutoModelForCausalLM, Trainer

    class Delayed(Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            made = super().create_scheduler(num_training_steps, optimizer)
            made.lr_lambdas = [lambda step, f=f: f(max(0, step - 1)) for f in made.lr_lambdas]
            return made

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    data = {"train_dataset": ByteDataset(64), "eval_dataset": ByteDataset(12, offset=64)}
    return (Delayed if delays_lr else Trainer)(model=model, args=args, **{**data, **kwargs})


def curve(trainer: Any) -> list[float]:
    """The logged training losses."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def norms(trainer: Any) -> list[float]:
    """The logged gradient norms."""
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


def train(
    rank: int,
    world_size: int,
    model_folder: str,
    folder: str,
    deepspeed: Any,
    *,
    delays_lr: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """Train, evaluate, predict, save; what there is to compare."""
    args = arguments(folder, deepspeed, **changes)
    trainer = make_trainer(model_folder, args, delays_lr=delays_lr)
    trainer.train()
    evaluation = trainer.evaluate()
    prediction = trainer.predict(ByteDataset(8, offset=80))
    trainer.save_model(str(Path(folder) / "saved"))
    found = {
        "losses": curve(trainer),
        "norms": norms(trainer),
        "eval": evaluation["eval_loss"],
        "predictions": torch.from_numpy(prediction.predictions),
        "is_deepspeed": trainer.is_deepspeed_enabled,
    }
    return found


def train_twice(
    rank: int, world_size: int, model_folder: str, folder: str, deepspeed: Any, *, evaluates_first: bool = False
) -> dict[str, Any]:
    """The curves of two trainings by one Trainer, with an optimizer that has no state, and the loss after them."""
    trainer = make_trainer(model_folder, arguments(folder, deepspeed, optim="sgd", learning_rate=0.1, max_steps=3))
    if evaluates_first:
        trainer.evaluate()
    curves = []
    for _ in range(2):
        trainer.train()
        curves += curve(trainer)
    return {"losses": curves, "eval": trainer.evaluate()["eval_loss"]}


def watch(rank: int, world_size: int, model_folder: str, folder: str, deepspeed: Any) -> dict[str, Any]:
    """A callback that reads a weight's gradient, master and first moment at every step, and sets the last two once."""
    from transformers import TrainerCallback

    found: dict[str, Any] = {"gradients": [], "weights": [], "moments": []}

    class Watcher(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            weight = model.model.layers[0].mlp.up_proj.weight
            found["gradients"].append((weight.grad if deepspeed is None else utils.safe_get_full_grad(weight)).clone())

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            weight = model.model.layers[0].mlp.up_proj.weight
            if deepspeed is None:
                master, moment = weight.detach(), trainer.optimizer.state[weight]["exp_avg"]
            else:
                master = utils.safe_get_full_fp32_param(weight)
                moment = utils.safe_get_full_optimizer_state(weight, "exp_avg")
            found["weights"].append(master.clone())
            found["moments"].append(moment.clone())
            if state.global_step == 3 and deepspeed is None:
                master.fill_(0.01)
                moment.fill_(0.001)
            elif state.global_step == 3:
                utils.safe_set_full_fp32_param(weight, torch.full_like(master, 0.01))
                utils.safe_set_full_optimizer_state(weight, torch.full_like(moment, 0.001), "exp_avg")

    trainer = make_trainer(model_folder, arguments(folder, deepspeed))
    trainer.add_callback(Watcher())
    trainer.train()
    return {**found, "losses": curve(trainer), "norms": norms(trainer)}


def resume(
    rank: int, world_size: int, model_folder: str, folder: str, deepspeed: Any, from_step: int | None, **changes: Any
) -> dict[str, Any]:
    """Train from the start, or from the checkpoint of `from_step`; saves every third step."""
    args = arguments(folder, deepspeed, save_strategy="steps", save_steps=3, **changes)
    trainer = make_trainer(model_folder, args)
    trainer.train(resume_from_checkpoint=str(Path(folder) / f"checkpoint-{from_step}") if from_step else None)
    return {"losses": curve(trainer), "eval": trainer.evaluate()["eval_loss"], "step": trainer.state.global_step}


def keep_best(rank: int, world_size: int, model_folder: str, folder: str, deepspeed: Any) -> dict[str, Any]:
    """`load_best_model_at_end` where the best is the first checkpoint, with rotation of the others."""
    args = arguments(
        folder,
        deepspeed,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer = make_trainer(model_folder, args)
    trainer.train()
    evaluated = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    return {
        "best": trainer.state.best_model_checkpoint,
        "evaluated": evaluated,
        "eval": trainer.evaluate()["eval_loss"],
        "left": sorted(path.name for path in Path(folder).glob("checkpoint-*")),
    }


def second_trainer(rank: int, world_size: int, model_folder: str, folder: str, deepspeed: Any) -> list[float]:
    """Two Trainers, one after the other, on one model: the second takes the model over from the first's engine."""
    from transformers import Trainer

    trainer = make_trainer(model_folder, arguments(folder, deepspeed, max_steps=2))
    trainer.train()
    again = Trainer(model=trainer.model, args=arguments(folder, deepspeed, max_steps=2), train_dataset=ByteDataset(64))
    again.train()
    return curve(trainer) + curve(again)


def find_batch_size(rank: int, world_size: int, model_folder: str, folder: str, deepspeed: Any) -> dict[str, Any]:
    """`auto_find_batch_size`: the first try runs out of memory, the second has half the batch and a new engine."""
    args = arguments(
        folder,
        deepspeed,
        auto_find_batch_size=True,
        per_device_train_batch_size=8,
        max_steps=2,
        gradient_accumulation_steps=1,
    )
    trainer = make_trainer(model_folder, args)
    compute_loss = trainer.compute_loss

    def limited(model: Any, inputs: Any, **kwargs: Any) -> Any:
        if len(inputs["input_ids"]) > 4:
            raise RuntimeError("CUDA out of memory.")
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = limited
    trainer.train()
    return {"losses": curve(trainer), "batch": trainer._train_batch_size}
