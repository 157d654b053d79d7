"""The original's estimators of model states: parameters, gradients and optimizer states by formula, nothing else.

Exported under their known names (`deepspeed.runtime.zero.stage3.estimate_zero3_model_states_mem_needs_all_live`, ...).
For P parameters, L parameters of the largest layer, G devices per node, N nodes, T = G N, a buffer factor f, and mixed
precision with Adam (2 bytes of weights and 2 of gradients, 4 + 4 + 4 of master and moments, 4 of fp32 gradients):

    ZeRO-2 offloaded             device 2 P                 host per node P max(4 T, 16) f
    ZeRO-2                       device 2 P + 18 P / T      host P 4 G f
    ZeRO-3 parameters and states device 4 L                 host P 18 / N f, or P max(4 G, 18 / N) f
    ZeRO-3 states offloaded      device 4 L + 2 P / T       host P 16 / N f, or P max(4 G, 16 / N) f
    ZeRO-3                       device 4 L + 18 P / T      host L 4 G f, or P 4 G f

where the first host figure is with `zero.Init`, the second without. What a run really needs, activations and buffers
included, and for what this package does, is `deepspeed.memory.estimate`. Source: the public contract of the original.
"""

from __future__ import annotations

from torch import nn

from deepspeed.zero.param import full_numel

GIB = 2**30
HEADER = "per CPU  |  per GPU |   Options"


def estimate_zero2_model_states_mem_needs(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int]:
    """(host, device) bytes of model states at ZeRO stage 2."""
    total_gpus = num_nodes * num_gpus_per_node
    if cpu_offload:
        return int(total_params * max(4 * total_gpus, 16) * additional_buffer_factor), 2 * total_params
    device = 2 * total_params + int(18 * total_params / total_gpus)
    return int(total_params * 4 * num_gpus_per_node * additional_buffer_factor), device


def estimate_zero3_model_states_mem_needs(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    cpu_offload_params: bool = True,
    zero_init: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int, int]:
    """(host, device, largest layer) bytes of model states at ZeRO stage 3."""
    total_gpus = num_nodes * num_gpus_per_node
    largest_layer = 4 * largest_layer_params
    whole = 4 * num_gpus_per_node  # without zero.Init every rank of a node builds the model in fp32 first
    if cpu_offload:
        per_param = (18 if cpu_offload_params else 16) / num_nodes
        device = largest_layer + (0 if cpu_offload_params else int(2 * total_params / total_gpus))
        host = total_params * (per_param if zero_init else max(whole, per_param))
    else:
        device = largest_layer + int(18 * total_params / total_gpus)
        host = (largest_layer_params if zero_init else total_params) * whole
    return int(host * additional_buffer_factor), device, largest_layer


def count_params(model: nn.Module) -> tuple[int, int]:
    """(all parameters, those of the largest module by itself); tensors that share memory count once."""
    seen: dict[int, int] = {}
    for param in model.parameters():
        key = param.data_ptr() if not param.is_meta and param.numel() else 0
        seen[key or id(param)] = full_numel(param)
    largest = max(
        (sum(full_numel(param) for param in module.parameters(recurse=False)) for module in model.modules()), default=0
    )
    return sum(seen.values()), largest


def _hardware(num_gpus_per_node: int, num_nodes: int) -> str:
    def plural(count: int, what: str) -> str:
        return f"{count} {what}{'s' if count > 1 else ''}"

    return f"HW: Setup with {plural(num_nodes, 'node')}, {plural(num_gpus_per_node, 'GPU')} per node."


def _row(host: int, device: int, options: str) -> None:
    print(f"{host / GIB:7.2f}GB | {device / GIB:6.2f}GB | {options}")


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print the table of a model's ZeRO-2 options."""
    total, _ = count_params(model)
    estimate_zero2_model_states_mem_needs_all_cold(total, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print the table of ZeRO-2 options for a number of parameters."""
    print(
        "Estimated memory needed for params, optim states and gradients for a:\n"
        f"{_hardware(num_gpus_per_node, num_nodes)}\nSW: Model with {total_params // 10**6}M total params.\n  {HEADER}"
    )
    for cpu_offload in (True, False):
        host, device = estimate_zero2_model_states_mem_needs(
            total_params, num_gpus_per_node, num_nodes, cpu_offload, additional_buffer_factor
        )
        _row(host, device, f"offload_optimizer={'cpu ' if cpu_offload else 'none'}")


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print the table of a model's ZeRO-3 options."""
    total, largest = count_params(model)
    estimate_zero3_model_states_mem_needs_all_cold(
        total, largest, num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print the table of ZeRO-3 options for numbers of parameters."""
    print(
        "Estimated memory needed for params, optim states and gradients for a:\n"
        f"{_hardware(num_gpus_per_node, num_nodes)}\nSW: Model with {total_params // 10**6}M total params, "
        f"{largest_layer_params // 10**6}M largest layer params.\n  {HEADER}"
    )
    for cpu_offload, cpu_offload_params in ((True, True), (True, False), (False, False)):
        for zero_init in (True, False):
            host, device, _ = estimate_zero3_model_states_mem_needs(
                total_params, largest_layer_params, num_gpus_per_node, num_nodes, cpu_offload, cpu_offload_params,
                zero_init, additional_buffer_factor,
            )  # fmt: skip
            param, optimizer = ("cpu " if offloads else "none" for offloads in (cpu_offload_params, cpu_offload))
            _row(host, device, f"offload_param={param}, offload_optimizer={optimizer}, zero_init={int(zero_init)}")
