"""Loading: from the names and intervals of any checkpoint into this run's own flats, whatever wrote it and on how many ranks.

Called by `engine.checkpoints`. Everything that can be refused is refused before anything is overwritten: names, shapes, sizes,
headers. Only damage inside the data can be found later; then the error says that the model is half loaded.

    check     names against the model's, shapes, what is missing and unexpected            all ranks agree
    weights   each flat's spans are fetched into it; masters published to parameters
    states    runs are cut where the checkpoint's parameters differ, states made and fetched
    rest      groups' settings, loss scale, schedule, counters, random generators          by `engine.checkpoints`

Invariant: after `load` all ranks have loaded the same checkpoint, or all raise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deepspeed.checkpoint.boxes import Box
from deepspeed.checkpoint.container import DTYPE_OF
from deepspeed.checkpoint.manifest import StoredTensor
from deepspeed.checkpoint.names import apart, is_apart
from deepspeed.checkpoint.original import THE_ORIGINALS
from deepspeed.checkpoint.source import Source, Wanted
from deepspeed.checkpoint.subject import BUFFER, Subject
from deepspeed.checkpoint.values import encode
from deepspeed.comm.exchange import Pending
from deepspeed.optim.first_states import alike
from deepspeed.utils.errors import CheckpointError
from deepspeed.utils.logging import log_dist, logger
from deepspeed.zero.checkpoint_flats import OPTIM, PARAM, Flat, StateSpec, group_names, renew_states, weights
from deepspeed.zero.master import Master
from deepspeed.zero.optimizer import ZeroOptimizer
from deepspeed.zero.param import stored_shape

KEPT_SETTINGS = ("exp_avg_mask",)
"""Settings of a parameter group that stay as the script gave them."""


@dataclass
class Names:
    """Which stored name each of the model's has, and what has no counterpart."""

    params: dict[str, str] = field(default_factory=dict)
    """By local name."""
    boxes: dict[str, Box | None] = field(default_factory=dict)
    """What this rank holds of the stored tensor, by local name."""
    used: set[str] = field(default_factory=set)
    """Stored names that have a counterpart on this rank."""
    buffers: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def pair_names(subject: Subject, source: Source) -> Names:
    """Pair this rank's names with the checkpoint's. Raises CheckpointError for differing shapes."""
    stored, stored_buffers = source.tensors.get(PARAM, {}), source.tensors.get(BUFFER, {})
    names, problems = Names(), []
    ours = subject.tied_locally()
    # What a rank stored apart has a meaning to the same rank of an equal division alone.
    is_alike = int(source.about.get("model_parallel_size", 1)) == subject.mesh.size("model")
    own = [partial(apart, model_rank=subject.mesh.rank("model"))] if is_alike else []
    for local, _ in subject.module.named_parameters():
        named = subject.box_of(local)
        aliases = [subject.name_of(name) for name in (local, *(a for a, first in ours.items() if first == local))]
        aliases += [called(name) for called in own for name in aliases]
        found = next((source.tied.get(a, a) for a in aliases if source.tied.get(a, a) in stored), None)
        if found is None:
            names.missing.append(named.name)
            continue
        is_own = any(found == called(named.name) for called in own)
        shape = tuple(stored_shape(subject.module.get_parameter(local))) if is_own else named.whole
        if stored[found].shape != shape:
            problems.append(
                f"{named.name} is {list(stored[found].shape)} in the checkpoint, {list(shape)} in the model"
            )
        else:
            names.params[local] = found
            names.boxes[local] = None if is_own else named.box
            names.used |= {found, *(alias for alias in aliases if alias in stored)}
    for name, buffer in subject.buffers().items():
        found = next((n for n in (name, *(called(name) for called in own)) if n in stored_buffers), None)
        if found is None:
            names.missing.append(name)
        elif stored_buffers[found].shape != tuple(buffer.shape):
            problems.append(
                f"{name} is {list(stored_buffers[found].shape)} in the checkpoint, {list(buffer.shape)} in the model"
            )
        else:
            names.buffers[name] = found
            names.used.add(found)
    if problems:
        raise CheckpointError(
            f"{source.folder}: shapes differ.\n  "
            + "\n  ".join(_some(problems))
            + "\n  Give the model the checkpoint's shapes; "
            "or give what is new another name, and load with load_module_strict=False."
        )
    return names


def has_unquantized(names: Names, source: Source) -> bool:
    """Whether the checkpoint has whole weights of layers that are quantized in the model."""
    stored = source.tensors.get(PARAM, {})
    quantized = [name.partition(".quantized.") for name in names.missing]
    return any(inner and f"{layer}.weight" in stored for layer, inner, _ in quantized)


def check_names(names: Names, source: Source, used: set[str], is_strict: bool) -> None:
    """Note what has no counterpart; `used` are the stored names that any rank has. Raises CheckpointError if `is_strict`
    and there is such."""
    stored = [*source.tensors.get(PARAM, {}), *source.tensors.get(BUFFER, {})]
    names.unexpected = [name for name in stored if name not in used]
    if is_strict and (names.missing or names.unexpected):
        raise CheckpointError(
            f"{source.folder} does not fit the model.\n  {_describe(names, source)}\n  load_module_strict=False loads what fits."
        )
    if names.missing or names.unexpected:
        log_dist(f"{source.folder} was loaded in part. {_describe(names, source)}", [0], 30)


def _describe(names: Names, source: Source) -> str:
    left_out = set(source.about.get("excluded_frozen", ())) & set(names.missing)
    lines = []
    if left_out:
        lines.append(
            f"Saved with exclude_frozen_parameters, so without {len(left_out)} frozen parameters: {', '.join(_some(sorted(left_out)))}. "
            "They keep the values that the model has now."
        )
    missing = [name for name in names.missing if name not in left_out]
    if missing:
        lines.append(f"Not in the checkpoint, and unchanged: {', '.join(_some(missing))}.")
    if names.unexpected:
        lines.append(f"Not in the model, and ignored: {', '.join(_some(names.unexpected))}.")
    if any(is_apart(name) for name in names.unexpected):
        lines.append(
            f"Names with mp_rank_ are parts of which nobody said where they lie in the whole (deepspeed.mesh.marks): only "
            f"{source.about.get('model_parallel_size', 1)} model-parallel ranks can load them."
        )
    return "\n  ".join(lines)


def _some(items: list[str], limit: int = 8) -> list[str]:
    return items if len(items) <= limit else [*items[:limit], f"... ({len(items)} in all)"]


# Weights. ----------------------------------------------------------------------------------------------------------


def load_weights(subject: Subject, source: Source, names: Names, is_rounded: bool = False) -> None:
    """Write the stored weights into masters, shards and unsharded parameters.

    This rank's part of the parameters follows each master as soon as that is filled, while the disk brings the next;
    with `is_rounded` the master is then rounded to it. `publish` gives the other ranks theirs.
    """
    flats = list(weights(subject.built, subject.module, subject.mesh))
    wanted: list[Wanted] = []
    for i, flat in enumerate(flats):
        wants = list(_wanted(flat, names))
        if i < len(subject.built.masters):  # those are first
            wants = _when_filled(wants, partial(_publish_master, subject.built.masters[i], is_rounded))
        wanted += wants
    buffers = subject.buffers()
    wanted += [
        Wanted(BUFFER, stored, 0, buffers[name].numel(), _writes_to(buffers[name]))
        for name, stored in names.buffers.items()
        if buffers[name].numel()
    ]
    with torch.no_grad():
        source.fetch(wanted)


def publish(subject: Subject) -> list[Pending]:
    """After `load_weights`: start giving every rank the other ranks' parts of the parameters. Collective.

    What comes back is to be waited for before they are used; until then the optimizer's states may be read.
    """
    waiting = [master.bucket.publish() for master in subject.built.masters if master.is_sharded]
    for bucket in subject.built.buckets:
        bucket.shard_changed()
    return [pending for pending in waiting if pending is not None]


def _publish_master(master: Master, is_rounded: bool) -> None:
    master.to_params()
    if is_rounded:
        master.from_params()


def _when_filled(wants: list[Wanted], then: Callable[[], None]) -> list[Wanted]:
    """The same, with `then` called once the last element is there; at once if none is wanted."""
    left = sum(want.numel for want in wants)

    def counted(want: Wanted) -> Wanted:
        def sink(offset: int, values: Tensor) -> None:
            nonlocal left
            want.sink(offset, values)
            left -= values.numel()
            if left == 0:
                then()

        return replace(want, sink=sink)

    if not left:
        then()
    return [counted(want) for want in wants]


def _wanted(flat: Flat, names: Names) -> Iterable[Wanted]:
    for span in flat.spans:
        if span.name in names.params:
            stored, box = names.params[span.name], names.boxes[span.name]
            yield Wanted(flat.kind, stored, span.in_param, span.numel, _writes_at(flat, span.at), box)


def _writes_at(flat: Flat, at: int) -> Callable[[int, Tensor], None]:
    return lambda offset, values: flat.write(at + offset, values)


def _writes_to(tensor: Tensor) -> Callable[[int, Tensor], None]:
    def write(offset: int, values: Tensor) -> None:
        if tensor.is_contiguous():
            tensor.detach().view(-1).narrow(0, offset, values.numel()).copy_(values)
        else:
            whole = tensor.detach().contiguous().view(-1)
            whole.narrow(0, offset, values.numel()).copy_(values)
            tensor.detach().copy_(whole.view_as(tensor))

    return write


# Optimizer. --------------------------------------------------------------------------------------------------------


def load_optimizer(subject: Subject, source: Source, state: Mapping[str, Any], names: Names) -> None:
    """Take over the optimizer's states and its groups' settings."""
    optimizer = subject.optimizer
    assert optimizer is not None, "the caller has checked"
    saved = state["optimizer"]
    current = type(optimizer.optimizer).__name__
    listed = saved["values"]
    if saved["class"] != current and not _has_what_it_needs(optimizer.optimizer, listed):
        log_dist(f"{current} does not keep the state of {saved['class']}: it starts anew. Weights are loaded.", [0], 30)
        listed = []
    else:
        if saved["class"] not in (current, THE_ORIGINALS):
            log_dist(f"optimizer state of {saved['class']} is loaded into {current}.", [0], 30)
        _load_groups(optimizer, saved["groups"], names)
    specs = state_specs(source, listed, names)
    stored = source.tensors.get(PARAM, {})
    masters = {name: DTYPE_OF[stored[other].dtype] for name, other in names.params.items()}
    with torch.no_grad():
        flats = renew_states(optimizer, subject.mesh, specs, masters)
        source.fetch([want for flat in flats for want in _wanted(flat, names)])
        optimizer.states_loaded()


def _has_what_it_needs(optimizer: torch.optim.Optimizer, listed: Iterable[Mapping[str, Any]]) -> bool:
    """Whether saved state is what an optimizer of another class makes at its first step, tried on a parameter of one
    element. True where that cannot be tried."""
    stored = [{*entry["values"], *(kind.removeprefix(OPTIM) for kind in entry["kinds"])} for entry in listed]
    probe = torch.nn.Parameter(torch.zeros(1))
    probe.grad = torch.zeros(1)
    try:
        tried = alike(optimizer, probe)
        tried.step()
    except Exception:
        return True
    needed = {key for key, value in tried.state[probe].items() if value is not None}
    # Some keep the step count in their groups.
    return all(needed - {"step"} == state - {"step"} for state in stored)


def state_specs(source: Source, listed: Iterable[Mapping[str, Any]], names: Names) -> dict[str, StateSpec]:
    """What state each of the model's parameters gets. Raises CheckpointError where states are not of the weights' shape."""
    ours = {stored: name for name, stored in names.params.items()}
    specs: dict[str, StateSpec] = {}
    for i, entry in enumerate(listed):
        values = repr(encode(entry["values"], {}, str(i)))  # tensors in it get names of their own, and are never equal
        for stored in entry["params"]:
            name = ours.get(stored)
            if name is None:
                continue
            dtypes = {kind: DTYPE_OF[_state_tensor(source, kind, stored).dtype] for kind in entry["kinds"]}
            key = json.dumps([sorted((k, str(d)) for k, d in dtypes.items()), values])
            specs[name] = StateSpec(dtypes, entry["values"], key)
    return specs


def _state_tensor(source: Source, kind: str, name: str) -> StoredTensor:
    found = source.tensors.get(kind, {}).get(name)
    if found is None or found.shape != source.tensors[PARAM][name].shape or not kind.startswith(OPTIM):
        raise CheckpointError(f"{source.folder}: the optimizer state {kind} of {name} is missing or has another shape.")
    return found


def _load_groups(optimizer: ZeroOptimizer, saved: list[Mapping[str, Any]], names: Names) -> None:
    """Settings by the parameters' names, so that groups may have another order or other members."""
    group_of = {name: i for i, group in enumerate(saved) for name in group["params"]}
    for i, (group, members) in enumerate(zip(optimizer.param_groups, group_names(optimizer), strict=True)):
        sources = {group_of[names.params[name]] for name in members if names.params.get(name) in group_of}
        if not sources and not members and len(saved) == len(optimizer.param_groups):
            sources = {i}  # a group without parameters: by position
        settings = [saved[j]["settings"] for j in sorted(sources)]
        if not settings:
            continue
        if any(other != settings[0] for other in settings[1:]):
            logger.warning(
                "parameter group %d has members of %d saved groups with different settings; it keeps its own.",
                i,
                len(settings),
            )
            continue
        group.update({key: value for key, value in settings[0].items() if key not in KEPT_SETTINGS})
