"""Short scenes whose waits a whole training run would hide: something it does later happens to wait as well.

Run by `adversity` under every seed, and by `mutations` without each of their waits. A scene gives tensors by name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.tiers import CopyStream, OnHost, Tier
from deepspeed.zero.delivery import Moved
from deepspeed.zero.gradients import FlatPool
from deepspeed.zero.master import Master
from deepspeed.zero.placing import Places
from tests.device.cases import config_of
from tests.engine.runs import engine_of
from tests.models import build

NUMEL = 64


def lent_again() -> dict[str, Tensor]:
    """Gradients on their way to main memory, whose buffer the next bucket of the same size borrows."""
    device = torch.device(get_accelerator().current_device_name())
    pool, rest = FlatPool(), OnHost(torch.zeros(NUMEL, pin_memory=True), CopyStream(device))
    moved = Moved(rest, pool)
    for i in range(3):
        buffer = pool.take(NUMEL, torch.float32, device)
        buffer.flat.fill_(i)
        moved.put(buffer.flat, buffer)
        moved.wait()
    pool.take(NUMEL, torch.float32, device).flat.fill_(9)
    arrived = rest.view(0, NUMEL)
    assert arrived is not None
    return {"arrived": arrived.clone()}


def written_again() -> dict[str, Tensor]:
    """A frozen parameter on the cpu tier, written in nested contexts: the outer one writes what the inner one is storing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    zero = {"stage3_max_reuse_distance": 0, "offload_param": {"device": "cpu", "pin_memory": True}}
    param = model[0].weight
    with engine_of(model, config_of(3, zero=zero)):
        with deepspeed.zero.GatheredParameters([param]), torch.no_grad():
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                param.mul_(2)
            param.add_(1)
        with deepspeed.zero.GatheredParameters([param]):
            return {"weight": param.detach().clone().cpu()}


def read_at_once() -> dict[str, Tensor]:
    """Whole masters of stage 3, read before anything else is gathered."""
    model = build("gpt_tied")
    with engine_of(model, config_of(3)):
        whole = {
            name: deepspeed.utils.safe_get_full_fp32_param(param).cpu() for name, param in model.named_parameters()
        }
    return whole


def written_at_once() -> dict[str, Tensor]:
    """A weight that is written right after its master was made, which is on the way to the cpu tier."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    zero = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    with engine_of(model, config_of(2, zero=zero)) as engine, torch.no_grad():
        bucket, placing = engine.zero_optimizer.masters[0].bucket, engine.zero_optimizer.runs._placing
        places = Places(params=Tier.DEVICE, optimizer=Tier.CPU, is_alias=False)
        master = Master(bucket, engine.policy, None, places, placing)
        model.weight.add_(1)
        return {"master": master.tensor.clone()}


def mastered_again() -> dict[str, Tensor]:
    """A master that a script sets right after the step, while the step's weights are on the way to the cpu tier."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    zero = {"stage3_max_reuse_distance": 0, "offload_param": {"device": "cpu", "pin_memory": True}}
    with engine_of(model, config_of(3, accumulation=1, zero=zero)) as engine:
        engine.backward(engine(torch.ones(3, 8, device=engine.device)).sum())
        value = torch.full((8, 8), 2.0, device=engine.device)
        engine.step()
        deepspeed.utils.safe_set_full_fp32_param(model.weight, value)
        value.zero_()
        with deepspeed.zero.GatheredParameters([model.weight]):
            return {"weight": model.weight.detach().clone().cpu()}


def lent_away() -> dict[str, Tensor]:
    """States that a script puts away in a stream of its own, and whose memory the default stream gets at once."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    device = torch.get_device_module(get_accelerator().device_name())
    with engine_of(model, config_of(2, accumulation=1)) as engine:
        engine.backward(engine(torch.ones(3, 8, device=engine.device)).sum())
        engine.step()
        device.synchronize()
        with device.stream(device.Stream()):
            engine.offload_states(non_blocking=True)
        engine.reload_states()
        whole = deepspeed.utils.safe_get_full_fp32_param(model.weight)
        assert whole is not None
        return {"weight": whole.detach().clone().cpu()}


SCENES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "scene: a buffer that is lent again": lent_again,
    "scene: a parameter that is written again": written_again,
    "scene: masters that are read at once": read_at_once,
    "scene: a weight that is written at once": written_at_once,
    "scene: a master that is written again": mastered_again,
    "scene: states that are put away in another stream": lent_away,
}
