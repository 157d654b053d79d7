"""Low-rank adapters on matrices of all experts (PEFT's `target_parameters`): cut like the matrices that they adapt.

Called by `hugging_face` when a module's experts are spread. PEFT wraps the module, once per adapted matrix; a wrapper keeps
the factors of all experts in two Linear layers, which it reads as

    lora_A.weight [experts * r, in]      as [experts, r, in]: an expert's rows are neighbours
    lora_B.weight [out, r * experts]     as [out, r, experts]: an expert's columns are `experts` apart

Known by what it has, so PEFT is not imported. Invariant: the factors stay the objects that they were.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from deepspeed.mesh import marks
from deepspeed.mesh.marks import Cut, Mark
from deepspeed.parallel.expert.place import ExpertPlace
from deepspeed.utils.errors import DeepSpeedConfigError

BASE = "base_layer"
"""What a wrapper calls the module that it adapts."""


def without_wrappers(name: str) -> str:
    """The name that an adapted module had before."""
    while name.endswith(f".{BASE}"):
        name = name.removesuffix(f".{BASE}")
    return name


def wrappers(model: nn.Module, name: str) -> list[Any]:
    """The adapters around a module of that name, from the outermost."""
    found = []
    outer = without_wrappers(name)
    while outer != name:
        module: Any = model.get_submodule(outer)
        if hasattr(module, "lora_A") and hasattr(module, "num_experts"):
            found.append(module)
        outer = f"{outer}.{BASE}"
    return found


def check(model: nn.Module, name: str, num_here: int) -> None:
    """Refuse what PEFT cannot adapt once it is cut. Raises DeepSpeedConfigError, naming the layer."""
    around = wrappers(model, name)
    if around and num_here == 1 and getattr(model.get_submodule(name), "is_transposed", False):
        raise DeepSpeedConfigError(
            f"adapters on the experts of {name} with one expert per rank: PEFT multiplies a single expert's factors the other "
            "way round than its matrices lie.\n  Choose a smaller expert_parallel.autoep_size."
        )


def cut(wrapper: Any, place: ExpertPlace, mark: Mark) -> None:
    """Keep the factors of a rank's experts, marked as `mark` says."""
    whole, first, stop = place.num_experts, place.first, place.first + place.num_here
    for name, down in wrapper.lora_A.items():
        up, r = wrapper.lora_B[name], wrapper.r[name]
        rows = Cut(marks.EXPERT_DIM, 0, ((first * r, stop * r),), whole * r)
        columns = Cut(marks.EXPERT_DIM, 1, tuple((j * whole + first, j * whole + stop) for j in range(r)), whole * r)
        factors = up.weight.data
        _keep(down, down.weight.data[first * r : stop * r], rows, mark)
        _keep(up, factors.view(len(factors), r, whole)[:, :, first:stop].reshape(len(factors), -1), columns, mark)
        down.out_features = up.in_features = r * place.num_here
    wrapper.num_experts = place.num_here


def _keep(linear: nn.Linear, values: Any, held: Cut, mark: Mark) -> None:
    weight: Any = linear.weight
    weight.data = values.clone()
    assert mark.expert is not None, "factors of experts"
    marks.mark(weight, Mark(cuts=(held,), expert=mark.expert))
    weight.allreduce, weight.group_name = False, mark.expert.group
