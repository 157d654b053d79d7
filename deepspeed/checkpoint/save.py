"""Saving: every rank writes its share of the tensors into one file, then the first rank publishes all of them at once.

Called by `api`, for synchronous saves from start to end, for asynchronous ones up to `fill`; then `background` runs
`commit` in a thread.

    open     an aside folder `.<tag>.<8 hex>.tmp`, locked while somebody writes to it           all ranks agree
    fill     copy this rank's shares into staging; threads write them as blocks fill
    commit   wait and fsync; all ranks agree; coverage is proved; state, manifest last;
             rename over the old checkpoint in one step; then `latest`                           all ranks agree

Invariant: at every instant the folder named by `latest` is a whole checkpoint, the old or the new, whatever dies.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from deepspeed.checkpoint import compat, files, owners, rng
from deepspeed.checkpoint.aside import Lock, open_aside, put_in_place, remove_if_possible, retain
from deepspeed.checkpoint.container import lay_out
from deepspeed.checkpoint.digest import default_algorithm
from deepspeed.checkpoint.manifest import (
    FILE_NAME,
    STATE_NAME,
    Manifest,
    ParameterInfo,
    Piece,
    StoredTensor,
    merge,
)
from deepspeed.checkpoint.names import piece_key, rank_file, shard_file
from deepspeed.checkpoint.ranks import Ranks
from deepspeed.checkpoint.staging import Staging
from deepspeed.checkpoint.subject import BUFFER, VALUE, Share, Subject, shares, whole
from deepspeed.checkpoint.values import encode
from deepspeed.checkpoint.writer import FileRecord, FileWriter, Reads, record_of
from deepspeed.utils.errors import CheckpointError
from deepspeed.zero.checkpoint_flats import PARAM, group_names, run_values


@dataclass(frozen=True, kw_only=True)
class SaveRequest:
    """One call of `save_checkpoint`. `about` goes into the manifest as it is; `shared` is the first rank's state,
    `own` each rank's; both are made of values that `values.encode` takes."""

    folder: Path
    tag: str
    about: Mapping[str, Any]
    shared: Mapping[str, Any]
    own: Mapping[str, Any]
    save_latest: bool = True
    exclude_frozen: bool = False
    keep_last_n: int | None = None
    is_node_local: bool = False
    compat_prefix: str = ""


class RankRecord(NamedTuple):
    """What one rank tells the first about its part."""

    name: str
    file: FileRecord
    pieces: list[Piece]
    shapes: dict[tuple[str, str], tuple[int, ...]]
    rank_file: FileRecord
    optimizer_values: list[tuple[tuple[str, ...], tuple[str, ...], str]]
    """(parameter names, kinds of state, values as JSON text)."""
    of_model: OfModel | None
    """From one rank of each model-parallel position."""


class OfModel(NamedTuple):
    """What a rank knows of the model, and others of its data-parallel group know too."""

    parameters: dict[str, ParameterInfo]
    tied: dict[str, str]
    excluded: frozenset[str]
    state: bytes
    """JSON: `module_extra`, and the `optimizer`'s class and groups."""


@dataclass
class Snapshot:
    """Everything of a save that is small, taken at once: later changes of the run do not reach it."""

    of_model: OfModel | None
    shares: list[Share]
    shapes: dict[tuple[str, str], tuple[int, ...]]
    shared: bytes
    own: bytes
    optimizer_values: list[tuple[tuple[str, ...], tuple[str, ...], str]]
    client_state: Mapping[str, Any] = field(default_factory=dict)


def take_snapshot(subject: Subject, request: SaveRequest, rank: int) -> Snapshot:
    """Encode this rank's state and list its shares. Raises CheckpointError for values that cannot be stored."""
    parameters = subject.parameters()
    excluded = frozenset(n for n, p in parameters.items() if request.exclude_frozen and p.is_frozen)
    found = list(shares(subject, excluded))
    shapes = {(share.piece.kind, share.piece.name): parameters[share.piece.name].shape for share in found}
    tensors: dict[str, Tensor] = {}
    own = _to_json({"rng": rng.capture(), **request.own}, tensors, f"rank{rank}")
    shared = _to_json(request.shared, tensors, "") if rank == 0 else b""
    of_model = None
    if subject.is_first_of_model:
        state = _to_json(_state_of_model(subject), tensors, "" if rank == 0 else f"rank{rank}")
        of_model = OfModel(parameters, subject.tied(), excluded, state)
        written = subject.buffers()
        if subject.mesh.rank("average") != 0:  # what is no expert's, the first rank has too
            written = {name: written[name] for name in subject.buffers_of_experts()}
        for name, buffer in written.items():
            if name not in subject.elsewhere:
                found.append(whole(BUFFER, name, buffer))
                shapes[BUFFER, name] = tuple(buffer.shape)
    for name, tensor in tensors.items():
        found.append(whole(VALUE, name, tensor))
        shapes[VALUE, name] = tuple(tensor.shape)
    return Snapshot(
        of_model, found, shapes, shared, own, _optimizer_values(subject, found, shapes),
        compat.plain(request.shared.get("client_state", {})) if rank == 0 else {},
    )  # fmt: skip


def _state_of_model(subject: Subject) -> dict[str, Any]:
    state: dict[str, Any] = {"module_extra": subject.extra_states()}
    optimizer = subject.optimizer
    if optimizer is not None:
        groups = [
            {
                "params": [subject.name_of(name) for name in names],
                "settings": {key: value for key, value in group.items() if key != "params"},
            }
            for names, group in zip(group_names(optimizer), optimizer.param_groups, strict=True)
        ]
        state["optimizer"] = {"class": type(optimizer.optimizer).__name__, "groups": groups}
    return state


def _to_json(value: Any, tensors: dict[str, Tensor], path: str) -> bytes:
    parts = {key: encode(item, tensors, f"{path}.{key}".lstrip(".")) for key, item in value.items()}
    return json.dumps(parts, separators=(",", ":"), allow_nan=False).encode()


def _optimizer_values(
    subject: Subject, found: list[Share], shapes: dict[tuple[str, str], tuple[int, ...]]
) -> list[tuple[tuple[str, ...], tuple[str, ...], str]]:
    """The optimizer's values besides its tensors; where every rank has the same, the first one's."""
    optimizer = subject.optimizer
    if optimizer is None or (not optimizer.policy.optimizer.is_sharded and not subject.is_first_of_model):
        return []
    listed = []
    for run in run_values(optimizer):
        names = tuple(name for name in map(subject.name_of, run.names) if name not in subject.elsewhere)
        if not names:
            continue
        tensors: dict[str, Tensor] = {}
        text = json.dumps(encode(run.values, tensors, f"optimizer_values.{names[0]}"), sort_keys=True, allow_nan=False)
        for name, tensor in tensors.items():
            found.append(whole(VALUE, name, tensor))
            shapes[VALUE, name] = tuple(tensor.shape)
        listed.append((names, run.kinds, text))
    return listed


class Save:
    """One save on its way. Collective: every rank makes it, fills it and commits it."""

    def __init__(
        self, subject: Subject, request: SaveRequest, ranks: Ranks, staging_for: Callable[[int], Staging]
    ) -> None:
        self.request = request
        self._ranks = ranks
        self._staging_for = staging_for
        self._writer: FileWriter | None = None
        self._error: BaseException | None = None
        self.nbytes = 0
        """Bytes of this rank's file."""
        self._what = f"save_checkpoint({str(request.folder)!r}, tag={request.tag!r})"
        self._target = request.folder / files.check_tag(request.tag)
        self._lock: Lock | None = None
        self._aside = Path(ranks.on_first(self._what, lambda: str(self._open_aside())))
        subject = self._of_this_rank(subject)
        self._snapshot = self._together(lambda: take_snapshot(subject, request, ranks.rank))
        self._name = shard_file(ranks.rank, ranks.world_size)

    def _of_this_rank(self, subject: Subject) -> Subject:
        """The subject with what other model-parallel ranks write, and what has to be stored apart. Collective."""
        if subject.mesh.size("model") == 1:
            return subject
        holdings = self._together(lambda: owners.holdings(subject))
        try:
            return owners.share_out(subject, holdings, self._ranks)
        except BaseException:
            self._drop_aside()
            raise

    def _together(self, step: Callable[[], Any]) -> Any:
        try:
            return self._ranks.together(self._what, step)
        except BaseException:
            self._drop_aside()
            raise

    def _open_aside(self) -> Path:
        aside, self._lock = open_aside(self._target)
        return aside

    def fill(self) -> None:
        """Copy this rank's shares into staging. Returns when the run may go on; errors wait for `commit`."""
        try:
            if self.request.is_node_local:
                self._aside.mkdir(parents=True, exist_ok=True)
            named = {_key(share.piece): share for share in self._snapshot.shares}
            layout = lay_out(
                ((key, share.dtype, (share.piece.stop - share.piece.start,)) for key, share in named.items()),
                {"format": "pt"},
            )
            self.nbytes = layout.nbytes
            self._writer = FileWriter(
                self._aside / self._name, layout, self._staging_for(layout.nbytes), default_algorithm()
            )
            reads: dict[str, Reads] = {key: share.read for key, share in named.items()}
            self._writer.fill(reads)
        except BaseException as error:
            self._error = error
            if self._writer is not None:
                self._writer.abandon()
                self._writer = None
            if not isinstance(error, Exception):  # Ctrl-C: nobody will call `commit`, and a notebook lives on
                self._drop_aside()
                raise

    def commit(self) -> None:
        """Make the save durable and public, on all ranks or on none. Raises CheckpointError on every rank."""
        try:
            record = self._together(self._finish_own)
            everyone = self._ranks.to_first(record)
            self._ranks.on_first(self._what, lambda: self._publish(everyone or []))
        except BaseException:
            self._drop_aside()
            raise
        finally:
            if self._lock is not None:
                self._lock.release()

    def _finish_own(self) -> RankRecord:
        if self._error is not None:
            raise self._error
        assert self._writer is not None, "fill comes before commit"
        file = self._writer.finish()
        snapshot = self._snapshot
        files.write_durably(self._aside / rank_file(self._ranks.rank), snapshot.own)
        return RankRecord(
            self._name,
            file,
            [share.piece for share in snapshot.shares],
            snapshot.shapes,
            record_of(snapshot.own, default_algorithm()),
            snapshot.optimizer_values,
            snapshot.of_model,
        )

    def _publish(self, everyone: Sequence[RankRecord]) -> None:
        manifest = self._make_manifest(everyone)
        algorithm = manifest.algorithm
        state = _whole_state(self._snapshot.shared, everyone)
        self._write(manifest, STATE_NAME, state, algorithm)
        for name, data in compat.state_files(self.request.about, self._snapshot.client_state, manifest).items():
            self._write(manifest, name, data, algorithm)
        files.write_durably(self._aside / FILE_NAME, manifest.to_json())
        files.sync_folder(self._aside)
        put_in_place(self._aside, self._target)
        if self.request.save_latest:
            files.replace_durably(self.request.folder / "latest", self.request.tag.encode())
        compat.write_script(self.request.folder)
        if self.request.keep_last_n:
            retain(self.request.folder, self.request.keep_last_n, self._target)

    def _write(self, manifest: Manifest, name: str, data: bytes, algorithm: str) -> None:
        files.write_durably(self._aside / name, data)
        manifest.files[name] = record_of(data, algorithm)

    def _make_manifest(self, everyone: Sequence[RankRecord]) -> Manifest:
        shapes = {key: shape for record in everyone for key, shape in record.shapes.items()}
        tensors = merge([record.pieces for record in everyone], shapes)
        whole = merge_models([record.of_model for record in everyone if record.of_model is not None])
        for name, info in whole.parameters.items():
            # Without elements a parameter has no piece; with elements and without a piece, coverage fails.
            if name not in whole.excluded:
                tensors.setdefault(PARAM, {}).setdefault(name, StoredTensor(info.dtype, info.shape, ()))
        for names, kinds, _ in (entry for record in everyone for entry in record.optimizer_values):
            for kind in kinds:
                for name in names:
                    missing = StoredTensor("F32", whole.parameters[name].shape, ())
                    tensors.setdefault(kind, {}).setdefault(name, missing)
        manifest = Manifest(
            {
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "tag": self.request.tag,
                **self.request.about,
            },
            default_algorithm(),
            shards=[record.name for record in everyone],
            files={record.name: record.file for record in everyone},
            parameters=whole.parameters,
            tied=whole.tied,
            tensors=tensors,
        )
        manifest.files |= {rank_file(rank): record.rank_file for rank, record in enumerate(everyone)}
        if whole.excluded:
            manifest.about["excluded_frozen"] = sorted(whole.excluded)
        manifest.check_coverage()
        return manifest

    def _drop_aside(self) -> None:
        if self._ranks.is_first:
            remove_if_possible(self._aside)
        if self._lock is not None:
            self._lock.release()


def _key(piece: Piece) -> str:
    return piece_key(piece.kind, piece.name, piece.start, piece.stop)


def merge_models(parts: Sequence[OfModel]) -> OfModel:
    """The parameters of the whole model from those of each model-parallel rank. Raises CheckpointError, naming the
    parameter, where two say different things about one."""
    parameters: dict[str, ParameterInfo] = {}
    for part in parts:
        for name, info in part.parameters.items():
            known = parameters.setdefault(name, info)
            if (known.dtype, known.shape) != (info.dtype, info.shape):
                raise CheckpointError(
                    f"{name} is {known.dtype} {list(known.shape)} on one model-parallel rank, {info.dtype} {list(info.shape)} on "
                    "another.\n  Give what is not the same parameter another name (checkpoint.names.name_children)."
                )
    tied = {name: first for part in parts for name, first in part.tied.items() if name not in parameters}
    return OfModel(parameters, tied, frozenset().union(*(part.excluded for part in parts)), b"")


def _whole_state(shared: bytes, everyone: Sequence[RankRecord]) -> bytes:
    """The shared state, with what each model-parallel rank knows of modules and groups, and all optimizer values."""
    state = json.loads(shared)
    parts = [json.loads(record.of_model.state) for record in everyone if record.of_model is not None]
    state["module_extra"] = {
        prefix: extra for part in reversed(parts) for prefix, extra in part["module_extra"].items()
    }
    with_optimizer = [part["optimizer"] for part in parts if "optimizer" in part]
    if with_optimizer:
        state["optimizer"] = {"class": with_optimizer[0]["class"], "groups": _merge_groups(with_optimizer)}
        state["optimizer"]["values"] = _merge_values(everyone)
    return json.dumps(state, separators=(",", ":"), allow_nan=False).encode()


def _merge_groups(optimizers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups by position, with the members of all ranks; the first rank's settings."""
    merged: list[dict[str, Any]] = []
    for optimizer in optimizers:
        for i, group in enumerate(optimizer["groups"]):
            if i == len(merged):
                merged.append({"params": [], "settings": group["settings"]})
            merged[i]["params"] = list(dict.fromkeys([*merged[i]["params"], *group["params"]]))
    return merged


def _merge_values(everyone: Sequence[RankRecord]) -> list[dict[str, Any]]:
    """The optimizer's values of all ranks, each distinct set once with the names it holds for."""
    distinct: dict[tuple[tuple[str, ...], str], dict[str, None]] = {}
    owner: dict[str, tuple[tuple[str, ...], str]] = {}
    for record in everyone:
        for names, kinds, text in record.optimizer_values:
            key = (tuple(sorted(kinds)), text)
            for name in names:
                if owner.setdefault(name, key) != key:
                    raise CheckpointError(
                        f"ranks disagree about the optimizer's state of {name}: {owner[name][1][:200]} and {text[:200]}."
                    )
                distinct.setdefault(key, {})[name] = None
    return [
        {"params": list(names), "kinds": list(kinds), "values": json.loads(text)}
        for (kinds, text), names in distinct.items()
    ]
