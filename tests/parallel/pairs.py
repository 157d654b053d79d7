"""Training with two ways of dividing ranks at once, and the same in one process with plain PyTorch.

Imported by the tests of pairs. `train` runs on every rank of a pool and compares there: losses, the gradients of the first
step, norms, and weights after clipped steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.mesh import marks
from deepspeed.moe.layer import MoE
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from tests.parallel.expert import lists
from tests.parallel.expert.models import NUM_EXPERTS, FeedForward, Loop, set_values
from tests.parallel.sequence.runs import Batch, batch_of, cut, loss_of, tiny_model
from tests.parallel.tensor.runs import error, part

STEPS, CLIP = 3, 0.5
ADAM = {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.0}


@dataclass(frozen=True)
class Way:
    """How ranks are divided: `tp` share layers, `sp` a sequence, `ep` experts. `zero`: more of that section.

    `experts`: in the place of each block's network, "native" `MoE` layers, "cut" ones (over `tp`, too), or a "list".
    """

    tp: int = 1
    sp: int = 1
    ep: int = 1
    stage: int = 0
    experts: str = ""
    zero: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """For the engine."""
        made: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": CLIP,
            "optimizer": {"type": "AdamW", "params": {**ADAM, "torch_adam": True}},
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 0, **self.zero},
            **self.more,
        }
        if self.tp > 1:
            made["tensor_parallel"] = {"autotp_size": self.tp}
        if self.ep > 1 and not self.is_native:
            made["expert_parallel"] = {"enabled": True, "autoep_size": self.ep}
        return made

    @property
    def is_native(self) -> bool:
        """Whether the model's own code has `MoE` layers."""
        return self.experts in ("native", "cut")

    def made(self, *, is_plain: bool = False) -> Any:
        """The model, with the same values for everyone; `is_plain`: of plain PyTorch alone."""
        model: Any = tiny_model(**self.model)
        for i, layer in enumerate(model.model.layers if self.experts else ()):
            width = model.config.hidden_size
            layer.mlp = lists.Routed(width) if self.experts == "list" else Native(self._native(width, is_plain))
            first = 0 if is_plain else torch.distributed.get_rank() // self.tp % self.ep * NUM_EXPERTS // self.ep
            set_values(layer.mlp, _whole_names(layer.mlp, first, i))
            layer.mlp.requires_grad_(False).apply(_shrink).requires_grad_()
        with torch.no_grad():  # so that routers tell experts apart
            for name, param in model.named_parameters():
                if "mlp.gate." in name:
                    param.mul_(20)
        return model

    def _native(self, width: int, is_plain: bool) -> nn.Module:
        if is_plain:
            return Loop(2, use_residual=self.experts == "cut", width=width)
        return MoE(
            width, FeedForward(width), NUM_EXPERTS, self.ep, k=2, use_residual=self.experts == "cut", drop_tokens=False,
            top2_2nd_expert_sampling=False, enable_expert_tensor_parallelism=self.experts == "cut",
        )  # fmt: skip


class Native(nn.Module):
    """A layer with experts that gives its output alone."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x.view(-1, x.shape[-1]))[0].view(x.shape)


def _shrink(module: nn.Module) -> None:
    """Values at which a step does not make rounding visible."""
    for param in module.parameters(recurse=False):
        param.mul_(0.3)


def _whole_names(model: nn.Module, first: int, layer: int) -> dict[str, str]:
    """Of parameters: what their values follow from. Local experts begin at `first`."""
    found = {}
    for name, _ in model.named_parameters():
        head, middle, tail = name.partition(".deepspeed_experts.")
        local, _, rest = tail.partition(".")
        found[name] = f"{layer}.{head}{middle}{int(local) + first}.{rest}" if middle else f"{layer}.{name}"
    return found


def whole_name(name: str, param: nn.Parameter) -> str:
    """In the whole model: an expert has its number there."""
    expert = marks.of(param).expert
    for middle in (".deepspeed_experts.", ".mlp.experts."):
        head, found, tail = name.partition(middle)
        number, _, rest = tail.partition(".")
        if number.isdigit() and expert is not None:
            return f"{head}{found}{expert.index}.{rest}"
    return name


EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def start(way: Way) -> Any:
    """An engine over the ranks of the pool."""
    model, mpu = way.made(), None
    if way.sp > 1:
        mpu = UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", way.sp, micro_batch_size=2)
    return deepspeed.initialize(model=model, mpu=mpu, config=way.config())[0]


def stop(engine: Any) -> None:
    """And leave nothing."""
    engine.destroy()
    UlyssesSPAttentionHF.unregister()
    parallel_state_sp.destroy_sequence_parallel()


def batches(num: int, shares: int) -> list[list[Batch]]:
    """Per step the batch of every rank that reads its own."""
    kinds = ("packed", "plain")
    return [[batch_of(kinds[step % 2], 12, 2, seed=10 * step + i) for i in range(shares)] for step in range(num)]


def plain(way: Way, shares: int, num: int = STEPS) -> tuple[list[float], list[float], dict[str, Tensor], Any]:
    """Losses, norms, the first gradients, and the model after `num` steps in one process."""
    model = way.made(is_plain=True)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, **ADAM)
    losses, norms, first = [], [], {}
    for of_step in batches(num, shares):
        loss = sum(loss_of(model, batch) for batch in of_step) / shares
        loss.backward()
        losses.append(float(loss.detach()))
        first = first or {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norms.append(float(nn.utils.clip_grad_norm_(params, CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, first, model


def step(engine: Any, way: Way, rank: int, of_step: list[Batch], look: Any = None) -> float:
    """One step over this rank's part; the whole batch's mean loss."""
    index = rank // way.tp
    whole = of_step[index // way.sp]
    own = cut(whole, index % way.sp, way.sp)
    loss = engine(**own, labels=own["shift_labels"]).loss
    engine.backward(loss)
    if look is not None:
        look()
    engine.step()
    counts = [(batch["labels"][:, 1:] != -100).sum() for batch in of_step]
    count = (own["shift_labels"] != -100).sum() / counts[index // way.sp] / len(of_step) / way.tp
    mean = loss.detach().nan_to_num() * count
    torch.distributed.all_reduce(mean)
    return float(mean)


def train(rank: int, world: int, way: Way) -> dict[str, float]:
    """The largest differences to one process."""
    shares = world // way.tp // way.sp
    losses, norms, first, oracle = plain(way, shares)
    engine = start(way)
    found = {"loss": 0.0, "grad": 0.0, "norm": 0.0, "weight": 0.0, "cut": 0.0}

    def look() -> None:
        for name, param in engine.module.named_parameters():
            got = deepspeed.utils.safe_get_full_grad(param)
            if (whole := whole_name(name, param)) in first:
                found["grad"] = max(found["grad"], error(got, _part(first[whole], param)))
            found["cut"] += bool(marks.of(param).cuts)

    for i, of_step in enumerate(batches(STEPS, shares)):
        loss = step(engine, way, rank, of_step, look if i == 0 else None)
        found["loss"] = max(found["loss"], abs(loss - losses[i]) / losses[i])
        found["norm"] = max(found["norm"], abs(engine.get_global_grad_norm() - norms[i]) / norms[i])
    weights = dict(oracle.named_parameters())
    for name, param in engine.module.named_parameters():
        got = deepspeed.utils.safe_get_full_fp32_param(param)
        want = _part(weights[whole_name(name, param)].detach(), param)
        found["weight"] = max(found["weight"], float((got - want).abs().max()) if want.numel() else 0.0)
    stop(engine)
    return found


def _part(whole: Tensor, param: nn.Parameter) -> Tensor:
    return part(whole, param) if marks.of(param).cuts else whole


def save(rank: int, world: int, way: Way, folder: str) -> list[float]:
    """Steps, a checkpoint, and the losses of the steps after it."""
    return _continue(rank, world, way, lambda engine: engine.save_checkpoint(folder))


def load(rank: int, world: int, way: Way, folder: str) -> list[float]:
    """Other values first; then a checkpoint's, and the losses of the steps after it."""
    return _continue(rank, world, way, lambda engine: engine.load_checkpoint(folder))


def _continue(rank: int, world: int, way: Way, at_half: Any) -> list[float]:
    engine, shares = start(way), world // way.tp // way.sp
    made = batches(2 * STEPS, SAMPLES)
    losses = []
    for i, of_step in enumerate(made):
        if i == STEPS:
            at_half(engine)
        loss = step(engine, way, rank, joined(of_step, shares))
        losses.append(loss)
    stop(engine)
    return losses[STEPS:]


SAMPLES = 2
"""Shares of a step's batch in tests of checkpoints, whatever the number of ranks."""


def joined(of_step: list[Batch], shares: int) -> list[Batch]:
    """The same samples in other shares."""
    whole = {name: torch.cat([batch[name] for batch in of_step]) for name in of_step[0]}
    return [{name: tensor.tensor_split(shares)[i] for name, tensor in whole.items()} for i in range(shares)]
