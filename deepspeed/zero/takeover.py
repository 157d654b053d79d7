"""What a script changed about its model between steps, taken over as plain PyTorch would, or refused by name.

Made by the engine; called by the optimizer's step, which all ranks enter together, and before checkpoints. Most steps find
nothing: facts are compared on the host, and one number tells it to the others. Where any rank found something, all
compare what they found before anybody acts, so that a change on one rank alone is an error on all and hangs none.

    begin_step       facts are compared; ranks tell each other, with the norm's sum where O is sharded, else while they
                     measure it -> what changed -> act
    follow_written   after the norm, for which the host waited anyway: masters follow parameters that were written
    end_step         what is true now is written down

    change      action
    ADDED       nothing: it trains once a parameter group has it; until then one warning
    REMOVED     nothing: it has no gradients any more, and is not saved
    TRAINS      a bucket, a master, a run in its group; the gradient that autograd left is this step's     (zero.join)
    ASSIGNED    the values move into the bucket, the parameter is a view of it again
    WRITTEN     ranks compare; the masters follow, element by element
    GRADIENT    ranks compare; each has its slice of it stepped, after the reduction                        (zero.reduce)

Invariant: what is refused is refused before anything was changed, on every rank alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deepspeed.mesh import Mesh
from deepspeed.utils.errors import TrainingStateError
from deepspeed.utils.logging import warn_once
from deepspeed.zero.build import Built
from deepspeed.zero.facts import Change, Facts, Kind, Seal
from deepspeed.zero.join import Joining
from deepspeed.zero.param import grads_of, slot_of
from deepspeed.zero.prints import digest_of, settings_of
from deepspeed.zero.written import Writes, keep_if_written, not_alike, take_writes

if TYPE_CHECKING:
    from deepspeed.zero.optimizer import ZeroOptimizer

NO_BACKWARD = (
    "engine.step() before backward: no gradient arrived since the last step.\n"
    "  Call engine.backward(loss) (or loss.backward()) on a loss computed from the engine's output first."
)

IS_VALUE = (Kind.ASSIGNED, Kind.WRITTEN)
"""Changes of values. Ranks may see them differently, as long as the values are the same in the end."""


class Takeover:
    """Compares and acts, for one engine. `stage` is for messages."""

    def __init__(
        self, root: nn.Module, built: Built, optimizer: ZeroOptimizer, mesh: Mesh, joining: Joining, stage: int
    ) -> None:
        self._root, self._built, self._optimizer, self._mesh = root, built, optimizer, mesh
        self._joining, self._stage = joining, stage
        is_alone, may_differ = mesh.size("average") == 1, optimizer.own_reduction is not None
        self.facts = Facts(root, built, lambda: optimizer.param_groups, is_alone, may_differ)
        self._ranks = mesh.ranks("average")
        self._rides = len(self._ranks) > 1 and built.builder.placing.policy.optimizer.is_sharded
        """Whether ranks tell each other with the norm, which is summed over them anyway."""
        self._steps_whole = not self._rides
        self._may_overlap = len(self._ranks) > 1 and self._steps_whole
        self._told: Callable[[], list[tuple[int, ...]]] | None = None
        """What ranks tell each other while each measures its norm, where nothing else is summed over them."""
        self.news: bool | Tensor = False
        """Whether this rank has something to tell the others; a tensor [] where the device knows."""
        self._is_late = False
        """Whether this rank learned from the last step's norm that it has news, where the norm is not summed over ranks."""
        self._asked: list[Seal] = []
        self._broken: list[Tensor] = []

    def tell_early(self) -> None:
        """From now on ranks tell each other where a step begins, not with its norm, whose answer comes late."""
        self._rides = self._may_overlap = False

    def close(self) -> None:
        """The engine ends; no cycle is left to a collector."""
        self._optimizer.takeover = None

    @property
    def has_left_gradients(self) -> bool:
        """Whether parameters that do not train yet have gradients, those that groups were given since among them: a backward ran,
        though nobody took one over. Asked only where none arrived."""
        if any(param.grad is not None for param in self.facts.flags.params):
            return True
        runs = {id(run) for members in self._optimizer.runs.by_group() for run in members}
        listed = (tensor for group in self._optimizer.param_groups for tensor in group["params"])
        return any(tensor.grad is not None for tensor in listed if id(tensor) not in runs)

    def begin_step(self) -> None:
        """Look, and where nobody else tells this rank of the others' changes take them over now. Collective."""
        reducer = self._optimizer.reducer
        is_assigned = bool(reducer.look_for_assigned())
        is_changed, has_asked = self.facts.have_changed() or reducer.has_stood_in or is_assigned, False
        if self.facts.is_long_look:
            self._compare_settings()
        if self._may_overlap and not self.facts.is_long_look:
            self._told = self._mesh.start_agree("average", int(is_changed or self._is_late))
        elif not self._rides:
            self._take_over_if(is_changed or self._is_late)
            has_asked = True
        if self.facts.is_long_look:
            self._compare_bytes(is_changed and not has_asked)
        broken = self.facts.prints.are_broken()
        self.news = broken.any() if broken is not None and not is_changed else is_changed and self._rides
        self._ask_seals()

    def _compare_settings(self) -> None:
        groups = self._optimizer.param_groups
        if len({digest for (digest,) in self._mesh.agree("average", digest_of(groups))}) == 1:
            return
        everyone = self._mesh.gather_objects("average", [settings_of(group) for group in groups])
        for rank, theirs in zip(self._ranks, everyone, strict=True):
            for i, (here, there) in enumerate(zip(everyone[0], theirs, strict=False)):
                for key in sorted(key for key in {*here, *there} if here.get(key) != there.get(key)):
                    raise TrainingStateError(
                        f"optimizer.param_groups[{i}][{key!r}] is {there.get(key)} on rank {rank} and {here.get(key)} on rank "
                        f"{self._ranks[0]}: ranks would train different weights (ZeRO stage {self._stage}).\n"
                        "  Set the same on every rank; a schedule that follows a metric needs its average over ranks."
                    )

    def _take_over_if(self, is_changed: bool, is_step: bool = True) -> None:
        if any(changed for (changed,) in self._mesh.agree("average", int(is_changed))):
            self.take_over(is_step)

    def _ask_seals(self) -> None:
        self._asked = [seal for seal in self.facts.seals if not seal.master.bucket.is_away]
        self._broken = [seal.is_broken() for seal in self._asked]

    def take_over_told(self, changed_any: bool) -> bool:
        """After the norm, which has brought news if `changed_any`: take over what ranks have changed, now where all of them know,
        else in the next step's beginning; whether it was done. No wait of the host's for a few bytes of its own."""
        told, self._told = self._told, None
        all_know = (changed_any and self._rides) or (told is not None and any(changed for (changed,) in told()))
        if all_know:
            self.take_over()
        elif changed_any:
            self._is_late = True
        return all_know

    def follow_written(self) -> None:
        """Have masters follow parameters that were written. The host waits for what was started in `begin_step`."""
        for master in self._built.masters:
            if master.bucket.written.is_in_shard:
                master.bucket.written.is_in_shard = False
                master.follow_params()
        if self._broken:
            broken = torch.stack(self._broken).tolist()
            for seal, is_broken in zip(self._asked, broken, strict=True):
                if is_broken:
                    seal.master.follow_params()

    def end_step(self) -> None:
        """Write down what the step itself changed: published parameters, runs that were cut."""
        self.facts.groups.renew()
        self.facts.prints.renew()
        for seal in self._asked:
            seal.renew()

    @torch.no_grad()
    def put_in_order(self) -> None:
        """Everything in place between steps: before a checkpoint is written or read. Collective."""
        for bucket in self._built.sharded:
            if bucket.is_unsharded:  # since a call of a module, which may have written them
                keep_if_written(bucket)
        is_changed = self.facts.have_changed(looks_at_all=True) or bool(self._optimizer.reducer.assigned())
        self._take_over_if(is_changed or self._is_late or bool(self.facts.prints.written()), is_step=False)
        rename(self._built, self._root)  # also of modules that are where they were, and are called something else
        self._compare_bytes()
        self._ask_seals()
        self.follow_written()
        self.end_step()

    # Finding out. --------------------------------------------------------------------------------------------------

    def take_over(self, is_step: bool = True) -> None:
        """Act on what this rank and the others found. Collective. Raises TrainingStateError, on every rank alike: also where
        a step begins and no rank has seen a backward."""
        self.news = False
        refusal: str | None = None
        found: list[Change] = []
        try:
            found = self._changes()
        except TrainingStateError as error:
            refusal = str(error)
        has_nothing = is_step and self._optimizer.reducer.has_stood_in
        mine = (has_nothing, refusal, [(c.kind, c.name, c.line) for c in found])
        told = self._mesh.gather_objects("average", mine)
        if all(has_nothing for has_nothing, _, _ in told):
            self._optimizer.reducer.drop()
            raise TrainingStateError(self.why_nothing_arrived())
        self._raise_any([theirs for _, theirs, _ in told])
        structures = [[line for kind, _, line in theirs if kind not in IS_VALUE] for _, _, theirs in told]
        self._require_equal(structures)
        self._assign([change.param for change in found if change.kind is Kind.ASSIGNED])
        self._compare_values([{name for kind, name, _ in theirs if kind in IS_VALUE} for _, _, theirs in told])
        rename(self._built, self._root)
        joining = [change for change in found if change.kind is Kind.TRAINS]
        if joining or self.facts.groups.has_changed:
            self._built.builder.group_of.update(self._listed())
        if joining:  # the same on every rank: ways of sending are made there, by all of them
            self._joining.join([(change.param, change.name) for change in joining])
        self.facts.renew()
        self._ask_seals()

    def why_nothing_arrived(self) -> str:
        """The message for a step without a backward: none ran, or what it reached is not the optimizer's."""
        left = [
            name for name, param in self._root.named_parameters() if slot_of(param) is None and param.grad is not None
        ]
        if not left:
            return NO_BACKWARD
        return (
            f"engine.step(): all gradients are those of parameters that the optimizer does not have: {left[0]}"
            f"{f' and {len(left) - 1} more' if left[1:] else ''} (ZeRO stage {self._stage}). load_state_dict(assign=True) puts new "
            "parameters in the place of those that train.\n"
            '  Load without assign=True; or give the new ones to it: optimizer.add_param_group({"params": [param]}).'
        )

    def _refuse_swapped(self, names: Mapping[nn.Parameter, str]) -> None:
        """A parameter's object with another tensor inside has neither the hooks nor the memory by which it is trained."""
        for bucket in self._built.buckets:
            for param in bucket.params:
                if slot_of(param) is None and param in names:
                    raise TrainingStateError(
                        f"{names[param]} was swapped with another tensor (torch.utils.swap_tensors, or a conversion under "
                        f"set_swap_module_params_on_conversion) (ZeRO stage {self._stage}).\n"
                        "  Write the values into it instead: with torch.no_grad(): param.copy_(other)."
                    )

    def _changes(self) -> list[Change]:
        """What this rank's script changed, in an order that ranks share. Raises TrainingStateError for what cannot be."""
        groups = self._listed()
        names = {param: name for name, param in self._root.named_parameters()}
        self._refuse_swapped(names)
        found = self.facts.tree.changes()
        for param, name in names.items():
            wants = param.requires_grad
            if (wants or grads_of([param]) != [None]) and not self.facts.is_trained(param):
                group = groups.get(param)
                if group is not None:
                    found.append(Change(Kind.TRAINS, name, param, f" in group {group}, {tuple(_shape(param))}"))
                elif wants:
                    self._warn_of_untrained(param, name)
        assigned = self.facts.memory.changes(names)
        for change in assigned:
            self._check_assigned(change)
        if assigned:
            self._refuse_tied(names)
        written = self.facts.prints.buckets if self._is_late else self.facts.prints.written()
        self._is_late = False
        values = [Change(Kind.WRITTEN, names[p], p) for bucket in written for p in bucket.params if p in names]
        return found + assigned + self.facts.versions.changes(names) + values + self._assigned_gradients()

    def _assigned_gradients(self) -> list[Change]:
        """Gradients that the script gave to parameters. Ranks tell a checksum: each steps its part of what has to be one."""
        found = []
        for gradients, number, gradient in self._optimizer.reducer.assigned():
            name, shape = gradients.bucket.names[number], gradients.bucket.shapes[number]
            if gradient.shape != shape:
                raise TrainingStateError(
                    f"{name}.grad was given a gradient of shape {tuple(gradient.shape)}; the parameter's is {tuple(shape)} "
                    f"(ZeRO stage {self._stage}).\n  Use deepspeed.utils.safe_set_full_grad(param, gradient)."
                )
            param = gradients.bucket.params[number]
            digest = _crc(gradient) if len(self._ranks) > 1 else 0
            found.append(Change(Kind.GRADIENT, name, param, f" of {tuple(shape)} with checksum {digest:08x}"))
        return found

    def _listed(self) -> Mapping[nn.Parameter, int]:
        """Each parameter's group, with those that groups have been given since; they are taken out of the lists, where runs
        belong. Raises TrainingStateError where a group has lost its runs or got what is not the model's to train."""
        group_of = self._built.builder.group_of
        groups = self._optimizer.param_groups
        names = {param: name for name, param in self._root.named_parameters()}
        num_known = 1 + max((segment_group for segment_group in group_of.values()), default=-1)
        if len(groups) < num_known:
            raise TrainingStateError(
                f"the optimizer has {len(groups)} parameter groups, and had {num_known}.\n"
                "  Leave the groups there; to stop training parameters use requires_grad_(False)."
            )
        runs = self._optimizer.runs.by_group()
        known = {id(run) for members in runs for run in members}
        given: dict[nn.Parameter, int] = {}
        for i, (group, own) in enumerate(zip(groups, runs, strict=True)):
            listed = {id(tensor) for tensor in group["params"]}
            if any(id(run) not in listed for run in own):
                raise TrainingStateError(
                    f'optimizer.param_groups[{i}]["params"] does not list all of its tensors any more (ZeRO stage {self._stage} '
                    "keeps flat pieces of several parameters there).\n"
                    "  Append parameters or use add_param_group; to stop training some use requires_grad_(False)."
                )
            given.update({tensor: i for tensor in group["params"] if id(tensor) not in known})
        for param, i in given.items():
            if param not in names:
                raise TrainingStateError(
                    f"parameter group {i} was given a tensor of shape {tuple(param.shape)} that is no parameter of the model.\n"
                    "  Make it part of the model: what is not is neither reduced nor saved."
                )
            if self.facts.is_trained(param):
                raise TrainingStateError(
                    f"parameter group {i} was given {names[param]}, which is in group {group_of[param]} already.\n"
                    "  A parameter can be in one group only."
                )
        return {**group_of, **given}

    def _check_assigned(self, change: Change) -> None:
        slot = slot_of(change.param)
        assert slot is not None, "a parameter of a bucket"
        bucket, param = slot.bucket, change.param
        want, shape = bucket.view_of(param).dtype, bucket.shapes[slot.index]
        if param.shape != shape:
            raise TrainingStateError(
                f"{change.name} was given data of shape {tuple(param.shape)}; its shape is {tuple(shape)}.\n"
                "  For another shape give its module a new parameter, and that to optimizer.add_param_group."
            )
        if param.dtype != want:
            raise TrainingStateError(
                f"{change.name} is {_name(param.dtype)} now; this run keeps it in {_name(want)} (ZeRO stage {self._stage}).\n"
                f"  Convert the model back (engine.module.to({want})); for another precision set bf16, fp16 or neither in the "
                "configuration, and use torch_autocast to compute in another one than weights have."
            )
        if param.device != bucket.full.device:
            raise TrainingStateError(
                f"{change.name} is on {param.device} now; this run trains on {bucket.full.device}.\n"
                f"  Move the model back (engine.module.to({str(bucket.full.device)!r})) before the next step."
            )

    def _refuse_tied(self, names: Mapping[nn.Parameter, str]) -> None:
        owner: dict[int, nn.Parameter] = {}
        for bucket in self.facts.whole:
            for param in bucket.params:
                other = owner.setdefault(param.data_ptr(), param) if param.numel() and param in names else param
                if other is not param:
                    raise TrainingStateError(
                        f"{names[param]} was given the memory of {names[other]} (ZeRO stage {self._stage}): two parameters cannot "
                        "share memory here.\n"
                        f"  Tie them by making them one: module.weight = other.weight; or assign a copy (`.data.clone()`)."
                    )

    def _warn_of_untrained(self, param: nn.Parameter, name: str) -> None:
        if self.facts.is_news(param):
            warn_once(
                f"{name} wants gradients, but no parameter group of the optimizer has it: as in plain PyTorch it does not train.\n"
                '  Give it to one: optimizer.add_param_group({"params": [param]}).'
            )

    # Agreeing. -----------------------------------------------------------------------------------------------------

    def _raise_any(self, refusals: Sequence[str | None]) -> None:
        for rank, text in zip(self._ranks, refusals, strict=True):
            if text is not None:
                raise TrainingStateError(text if len(refusals) == 1 else f"[rank {rank}] {text}")

    def _require_equal(self, structures: Sequence[Sequence[str]]) -> None:
        for rank, lines in zip(self._ranks, structures, strict=True):
            differing = sorted(set(lines) ^ set(structures[0]))
            if differing:
                here = rank if differing[0] in lines else self._ranks[0]
                raise TrainingStateError(
                    f"ranks changed the model differently: {differing[0]} on rank {here}, and not on rank "
                    f"{rank if here != rank else self._ranks[0]} (ZeRO stage {self._stage}).\n"
                    "  Freeze, unfreeze, add and delete the same on every rank; gradients that you assign are averages over ranks."
                )

    def _compare_values(self, written: Sequence[set[str]]) -> None:
        """What any rank wrote is the same on all, or becomes the first rank's where each wrote its own. Collective."""
        names = sorted(set().union(*written))
        if len(written) == 1 or not names:
            return
        by_name = dict(self._root.named_parameters())
        digests = [_crc(by_name[name]) for name in names]
        everyone = self._mesh.gather_objects("average", digests)
        for i, name in enumerate(names):
            if len({theirs[i] for theirs in everyone}) == 1:
                continue
            without = [rank for rank, theirs in zip(self._ranks, written, strict=True) if name not in theirs]
            if without:
                raise TrainingStateError(
                    f"{name} was written on some ranks, and not on rank {without[0]}: ranks would train different weights "
                    f"(ZeRO stage {self._stage}).\n  Write the same values on every rank, or broadcast them to all."
                )
            warn_once(
                f"ranks wrote different values into {name}: the first rank's are taken, as by deepspeed.initialize."
            )
            self._built.builder.those_with(by_name[name]).broadcast(by_name[name].detach())

    def _compare_bytes(self, will_compare: bool = False) -> None:
        """All bytes are the same on all ranks, or somebody wrote a few alone that no sample had. A warning: who is right nobody
        knows, and devices of different kinds may round differently. Collective.

        will_compare: this rank's changes are not taken over yet, which compares values by itself.
        """
        prints, writes = self.facts.prints, take_writes(self._built.sharded)
        told = self._mesh.agree(
            "average", prints.digest(), int(will_compare), zlib.crc32(repr(sorted(writes.items())).encode())
        )
        if len({digest for *_, digest in told}) > 1:
            self._warn_of_writes(writes)
        if len({digest for digest, *_ in told}) == 1 or any(will for _, will, _ in told):
            return
        params = [
            (name, param) for bucket in prints.buckets for name, param in zip(bucket.names, bucket.params, strict=True)
        ]
        everyone = self._mesh.gather_objects("average", [_crc(param) for _, param in params])
        for rank, theirs in zip(self._ranks, everyone, strict=True):
            differing = [i for i, digest in enumerate(theirs) if digest != everyone[0][i]]
            if differing:
                name = params[differing[0]][0]
                warn_once(
                    f"{name} is not the same on rank {rank} as on rank {self._ranks[0]} (ZeRO stage {self._stage}), and "
                    f"{len(differing) - 1} more: ranks train different weights{'' if self._steps_whole else ' in this step'}.\n"
                    "  Some ranks wrote it alone, a few elements through `.data` perhaps: write the same values on every rank, or "
                    "broadcast them to all."
                )
                return

    def _warn_of_writes(self, writes: Writes) -> None:
        """Models wrote into sharded parameters while they ran, and not the same on all ranks. Collective."""
        found = not_alike(self._mesh.gather_objects("average", writes))
        if found is not None:
            name, place = found
            warn_once(
                f"{name} is written by the model while it runs, and rank {self._ranks[place]} writes something else than rank "
                f"{self._ranks[0]} (ZeRO stage {self._stage}): each rank's own part of it is as that rank wrote it.\n"
                "  Write the same on every rank: average over ranks what it is computed from, or write between steps, inside of "
                "deepspeed.zero.GatheredParameters([param], modifier_rank=0)."
            )

    # Acting. -------------------------------------------------------------------------------------------------------

    def _assign(self, params: Sequence[nn.Parameter]) -> None:
        """Move values that were assigned into buckets that begin new memory: a script that keeps what it took away (as EMA
        does, to put it back after a save) has it unchanged."""
        if any(not param.is_contiguous() for param in params):
            warn_once(
                "parameters were given another memory format; ZeRO keeps them contiguous in its buckets. Values are the same; "
                "give channels_last to the inputs, which convolutions follow."
            )
        slots = {param: slot for param in params if (slot := slot_of(param))}
        for bucket in dict.fromkeys(slot.bucket for slot in slots.values()):
            bucket.leave_memory()
            self._optimizer.runs.follow_memory(bucket)
        for param, slot in slots.items():
            view = slot.bucket.view_of(param)
            view.copy_(param.detach())
            param.data = view


def rename(built: Built, root: nn.Module) -> None:
    """Have buckets know their parameters by the names they have now; those that have left the model are not saved."""
    names = {param: name for name, param in root.named_parameters()}
    for bucket in built.buckets:
        bucket.rename(names)


def _shape(param: nn.Parameter) -> torch.Size:
    slot = slot_of(param)
    return slot.bucket.shapes[slot.index] if slot else param.shape


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _crc(tensor: Tensor) -> int:
    dense = (tensor.to_dense() if tensor.is_sparse else tensor).detach()
    # A copy: `numpy()` would pin the bucket's memory down, which then could not be put away any more.
    values = torch.empty(dense.shape, dtype=dense.dtype).copy_(dense).flatten().view(torch.uint8)
    return zlib.crc32(values.numpy().data)
