"""Computation that treats tokens alone, tile by tile: an MLP, or logits and their loss, of a long sequence in little memory.

Public as `sequence_tiled_compute`, `SequenceTiledCompute`, `TiledMLP`; `logits_loss.py` builds on it. Forward keeps the input
and nothing else; backward computes one tile at a time again and differentiates it. What lies between (an MLP's inner
width, 3 to 8 times the input) exists for one tile only.

    x [b, s, h]   ->   tiles of ceil(s / shards) tokens   ->   f(tile), joined

Parameters are inputs of the autograd function, so that each gets one gradient, the sum over tiles, and a reducer sees one
arrival and not one per tile. Where parameters come and go (ZeRO stage 3) they cannot be differentiated by name between two
modules; then each tile's gradients arrive by themselves, and `ds_grad_is_ready` says which of them is the last, as in the
original. Random numbers and autocast are as they were in the forward.

Invariant: tiled equals whole, to the rounding of sums. After ALST (arXiv:2506.13996), section on sequence tiling.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from deepspeed.utils.errors import DeepSpeedError

READY = "ds_grad_is_ready"
"""Attribute of a parameter by which a reducer knows whether more of its gradient is to come in this backward."""

Run = Callable[[int, Tensor], Any]
"""(number of the tile, tile of x) -> output of the tile."""
Weight = float | Tensor
"""What a tile's loss is multiplied by: a number, or a scalar of the device [] where the host would have to wait for it."""


class Moment(NamedTuple):
    """What a computation depends on beside its inputs."""

    cpu: Tensor
    device_states: tuple[list[int], list[Tensor]]
    device_type: str
    autocast: torch.autocast

    @classmethod
    def now(cls, tensor: Tensor) -> Moment:
        """Random states and autocast of now, on the CPU and where the tensor is."""
        kind = tensor.device.type
        autocast = torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=torch.is_autocast_cache_enabled(),
        )
        return cls(torch.get_rng_state(), get_device_states(tensor), kind, autocast)

    def return_to(self) -> None:
        """Set the random states back to then."""
        torch.set_rng_state(self.cpu)
        devices, states = self.device_states
        set_device_states(devices, states, device_type=self.device_type)


def trained(params: Iterable[Any] | None, module: Any = None) -> list[nn.Parameter]:
    """The given parameters that train, each once; those of the module where none are given."""
    given = list(params) if params is not None else list(module.parameters()) if isinstance(module, nn.Module) else []
    return [param for param in dict.fromkeys(given) if param.requires_grad]


def tile_bounds(length: int, shards: int) -> list[tuple[int, int]]:
    """Where tiles begin and end: of ceil(length / shards) tokens, the last one shorter; none is empty."""
    if not isinstance(shards, int) or shards < 1:
        raise DeepSpeedError(f"shards = {shards!r}: the number of tiles is a whole number of at least 1.")
    size = max(1, -(-length // shards))
    return [(start, min(start + size, length)) for start in range(0, length, size)] or [(0, length)]


def tiled(run: Run, join: Any, bounds: list[tuple[int, int]], dim: int, x: Tensor, params: Sequence[Any]) -> Tensor:
    """join(run(i, tile i of x)): x is cut along `dim` at `bounds`; differentiable in x and the parameters."""
    if comes_and_goes(params):
        # A sharded parameter has no shape that an edge of the graph could have; an empty tensor stands for all of them.
        found = Tiles.apply(run, join, bounds, dim, tuple(params), x, x.new_empty(0).requires_grad_())
    else:
        found = Tiles.apply(run, join, bounds, dim, (), x, *params)
    assert isinstance(found, Tensor), "one output"
    return found


class Tiles(torch.autograd.Function):
    """y = join(run(i, tile i of x)), computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        join: Any,
        bounds: list[tuple[int, int]],
        dim: int,
        arriving: tuple[Any, ...],
        x: Tensor,
        *params: Tensor,
    ) -> Tensor:
        """arriving: parameters whose gradients arrive by themselves, in place of `params`."""
        ctx.run, ctx.join, ctx.bounds, ctx.dim, ctx.arriving, ctx.params = run, join, bounds, dim, arriving, params
        ctx.moment = Moment.now(x)
        ctx.save_for_backward(x)
        with torch.no_grad():
            return join.join(run(i, x.narrow(dim, start, end - start)) for i, (start, end) in enumerate(bounds))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        later = Moment.now(x)
        ctx.moment.return_to()
        needs_x = ctx.needs_input_grad[5]
        grad_x = torch.empty_like(x) if needs_x else None
        sums: list[Tensor | None] = [None] * len(ctx.params)
        for i, (start, end) in enumerate(ctx.bounds):
            tile = x.narrow(ctx.dim, start, end - start).detach().requires_grad_(needs_x)
            with torch.enable_grad(), ctx.moment.autocast:
                output = ctx.run(i, tile)
            if ctx.arriving:
                _arrive(output, ctx.join.of_tile(grads[0], i, output), ctx.arriving, is_last=i == len(ctx.bounds) - 1)
                if grad_x is not None:
                    target = grad_x.narrow(ctx.dim, start, end - start)
                    _ = target.zero_() if tile.grad is None else target.copy_(tile.grad)
                continue
            wanted = [*([tile] if needs_x else []), *ctx.params]
            found = list(torch.autograd.grad(output, wanted, ctx.join.of_tile(grads[0], i, output), allow_unused=True))
            if grad_x is not None:
                own = found.pop(0)
                target = grad_x.narrow(ctx.dim, start, end - start)
                _ = target.zero_() if own is None else target.copy_(own)
            for n, grad in enumerate(found):
                before = sums[n]
                sums[n] = grad if before is None else before if grad is None else before.add_(grad)
        later.return_to()
        return None, None, None, None, None, grad_x, *sums


def comes_and_goes(params: Sequence[Any]) -> bool:
    """Whether parameters are whole only while modules run."""
    return any(hasattr(param, "ds_status") for param in params)


def _arrive(output: Tensor, grad: Tensor, params: Sequence[Any], *, is_last: bool) -> None:
    """Backward of a tile into the parameters themselves."""
    for param in params:
        param.__dict__[READY] = is_last
    try:
        torch.autograd.backward(output, grad)
    finally:
        for param in params:
            param.__dict__.pop(READY, None)


class Concatenated(NamedTuple):
    """Outputs side by side along a dimension."""

    dim: int
    bounds: Sequence[tuple[int, int]]

    def join(self, outputs: Iterable[Tensor]) -> Tensor:
        """The whole output, into which each goes as it comes, so that none is there twice."""
        coming = iter(outputs)
        whole = first = next(coming)
        if len(self.bounds) > 1:
            dim = self.dim % first.dim()
            shape = [*first.shape[:dim], self.bounds[-1][1], *first.shape[dim + 1 :]]
            whole = first.new_empty(shape)
            for (start, end), output in zip(self.bounds, itertools.chain([first], coming), strict=True):
                target = whole.narrow(dim, start, end - start)
                if output.shape != target.shape:
                    raise DeepSpeedError(
                        f"A tile of {end - start} tokens gave a tensor of shape {tuple(output.shape)}, not {tuple(target.shape)}: "
                        f"outputs are joined along dimension {dim}, a token for each token."
                    )
                target.copy_(output)
        return whole

    def of_tile(self, grad: Tensor, index: int, output: Tensor) -> Tensor:
        """The part of the whole output's gradient that is a tile's."""
        start, end = self.bounds[index]
        return grad.narrow(self.dim, start, end - start)


class Summed(NamedTuple):
    """Scalars, each times its weight, added up."""

    weights: Sequence[Weight]

    def join(self, outputs: Iterable[Tensor]) -> Tensor:
        """The whole output. A tile of no weight counts for nothing, whatever it is."""
        return torch.stack([_share(out, weight) for out, weight in zip(outputs, self.weights, strict=True)]).sum()

    def of_tile(self, grad: Tensor, index: int, output: Tensor) -> Tensor:
        """A tile's share of the gradient."""
        return (grad * self.weights[index]).to(output.dtype)


def _share(output: Tensor, weight: Weight) -> Tensor:
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, output * weight).to(output.dtype)
    return output * weight if weight else torch.zeros_like(output)


class TiledMLP:
    """`fn(module, x)` for a layer that treats tokens alone."""

    @staticmethod
    def apply(
        fn: Callable[[Any, Tensor], Tensor],
        module: Any,
        x: Tensor,
        shards: int,
        compute_params: Iterable[Any] | None = None,
    ) -> Tensor:
        """x: [batch, sequence, hidden] or [sequence, hidden]; the output in the same layout. Differentiable.

        compute_params: parameters that `fn` uses; default all of the module's.
        """
        dim = x.dim() - 2
        bounds = tile_bounds(x.shape[dim], shards)
        params = trained(compute_params, module)
        return tiled(lambda _, tile: fn(module, tile), Concatenated(dim, bounds), bounds, dim, x, params)


class AutogradComputeMLP:
    """The same without tiles."""

    @staticmethod
    def apply(fn: Callable[[Any, Tensor], Tensor], module: Any, x: Tensor) -> Tensor:
        """`fn(module, x)`."""
        return fn(module, x)


def sequence_tiled_compute(
    fn: Callable[..., Tensor],
    seqlen: int,
    shards: int,
    kwargs_to_shard: Mapping[str, Tensor],
    kwargs_to_pass: Mapping[str, Any],
    grad_requiring_tensor_key: str,
    compute_params: Iterable[Any] | None = None,
    output_unshard_dimension: int = 1,
    output_reduction: str | None = "mean",
) -> Tensor:
    """`fn(**kwargs)` with some arguments cut along dimension 1, tile by tile.

    Gradients reach `kwargs_to_shard[grad_requiring_tensor_key]` and compute_params. A tile's output is concatenated along
    `output_unshard_dimension`; a scalar is reduced, by "mean" (weighted by tokens) or "sum".
    """
    if grad_requiring_tensor_key not in kwargs_to_shard:
        raise DeepSpeedError(
            f"grad_requiring_tensor_key = {grad_requiring_tensor_key!r} is not in kwargs_to_shard, which has "
            f"{sorted(kwargs_to_shard)}."
        )
    wrong = {key: tuple(t.shape) for key, t in kwargs_to_shard.items() if t.dim() < 2 or t.shape[1] != seqlen}
    if wrong:
        raise DeepSpeedError(
            f"kwargs_to_shard are cut along dimension 1, of seqlen = {seqlen}; these are not: {wrong}."
        )
    bounds = tile_bounds(seqlen, shards)
    others = {key: tensor for key, tensor in kwargs_to_shard.items() if key != grad_requiring_tensor_key}
    is_scalar: list[bool] = []

    def run(index: int, tile: Tensor) -> Tensor:
        start, end = bounds[index]
        cut = {key: tensor[:, start:end] for key, tensor in others.items()}
        output = fn(**kwargs_to_pass, **cut, **{grad_requiring_tensor_key: tile})
        is_scalar.append(output.dim() == 0)
        return output

    x = kwargs_to_shard[grad_requiring_tensor_key]
    join = _ByShape(output_unshard_dimension, bounds, _weights(bounds, output_reduction), is_scalar)
    return tiled(run, join, bounds, 1, x, trained(compute_params))


def _weights(bounds: Sequence[tuple[int, int]], reduction: str | None) -> list[float]:
    if reduction not in ("mean", "sum", None):
        raise DeepSpeedError(f'output_reduction = {reduction!r}: it is "mean" or "sum".')
    total = bounds[-1][1]
    return [1.0 if reduction == "sum" or not total else (end - start) / total for start, end in bounds]


class _ByShape(NamedTuple):
    """Concatenated or summed, as the first tile's output says."""

    dim: int
    bounds: Sequence[tuple[int, int]]
    weights: Sequence[float]
    is_scalar: list[bool]

    def _chosen(self) -> Summed | Concatenated:
        return Summed(self.weights) if self.is_scalar[0] else Concatenated(self.dim, self.bounds)

    def join(self, outputs: Iterable[Tensor]) -> Tensor:
        """The whole output."""
        coming = iter(outputs)
        first = next(coming)  # only now is it known what it is
        return self._chosen().join(itertools.chain([first], coming))

    def of_tile(self, grad: Tensor, index: int, output: Tensor) -> Tensor:
        """The part of the gradient that is a tile's."""
        return self._chosen().of_tile(grad, index, output)


class SequenceTiledCompute:
    """The original's autograd function behind `sequence_tiled_compute`."""

    @staticmethod
    def apply(
        fn: Callable[..., Tensor],
        seqlen: int,
        shards: int,
        keys_to_shard: Sequence[str],
        keys_to_pass: Sequence[str],
        grad_requiring_tensor_key: str,
        compute_params: Iterable[Any] | None,
        output_unshard_dimension: int,
        output_reduction: str | None,
        *args: Any,
    ) -> Tensor:
        """As `sequence_tiled_compute`; args: the values of keys_to_shard, then of keys_to_pass."""
        num = len(keys_to_shard)
        return sequence_tiled_compute(
            fn,
            seqlen,
            shards,
            dict(zip(keys_to_shard, args[:num], strict=True)),
            dict(zip(keys_to_pass, args[num:], strict=True)),
            grad_requiring_tensor_key,
            compute_params,
            output_unshard_dimension,
            output_reduction,
        )
