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

import fcntl
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from deepspeed.checkpoint import compat, files, rng
from deepspeed.checkpoint.container import lay_out
from deepspeed.checkpoint.digest import default_algorithm
from deepspeed.checkpoint.find import LATEST, LATEST_UNIVERSAL
from deepspeed.checkpoint.manifest import (
    FILE_NAME,
    STATE_NAME,
    Manifest,
    ParameterInfo,
    Piece,
    StoredTensor,
    merge,
    piece_key,
)
from deepspeed.checkpoint.ranks import Ranks
from deepspeed.checkpoint.staging import Staging
from deepspeed.checkpoint.subject import BUFFER, VALUE, Share, Subject, shares, whole
from deepspeed.checkpoint.values import encode
from deepspeed.checkpoint.writer import FileRecord, FileWriter, Reads, record_of
from deepspeed.utils.errors import CheckpointError
from deepspeed.utils.logging import logger
from deepspeed.zero.shards import PARAM, group_names, run_values

ASIDE = re.compile(r"\..+\.[0-9a-f]{8}\.(tmp|trash|old)")


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


@dataclass
class Snapshot:
    """Everything of a save that is small, taken at once: later changes of the run do not reach it."""

    parameters: dict[str, ParameterInfo]
    tied: dict[str, str]
    excluded: frozenset[str]
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
    found = list(shares(subject.flats(), excluded))
    shapes = {(share.piece.kind, share.piece.name): parameters[share.piece.name].shape for share in found}
    tensors: dict[str, Tensor] = {}
    own = _to_json({"rng": rng.capture(), **request.own}, tensors, f"rank{rank}")
    shared = b""
    if rank == 0:
        shared = _to_json(_shared_state(subject, request), tensors, "")
        for name, buffer in subject.buffers().items():
            found.append(whole(BUFFER, name, buffer))
            shapes[BUFFER, name] = tuple(buffer.shape)
    for name, tensor in tensors.items():
        found.append(whole(VALUE, name, tensor))
        shapes[VALUE, name] = tuple(tensor.shape)
    return Snapshot(
        parameters, subject.tied(), excluded, found, shapes, shared, own, _optimizer_values(subject, rank, found, shapes),
        compat.plain(request.shared.get("client_state", {})) if rank == 0 else {},
    )  # fmt: skip


def _shared_state(subject: Subject, request: SaveRequest) -> dict[str, Any]:
    state = {**request.shared, "module_extra": subject.extra_states()}
    optimizer = subject.optimizer
    if optimizer is not None:
        groups = [
            {"params": names, "settings": {key: value for key, value in group.items() if key != "params"}}
            for names, group in zip(group_names(optimizer), optimizer.param_groups, strict=True)
        ]
        state["optimizer"] = {"class": type(optimizer.optimizer).__name__, "groups": groups}
    return state


def _to_json(value: Any, tensors: dict[str, Tensor], path: str) -> bytes:
    parts = {key: encode(item, tensors, f"{path}.{key}".lstrip(".")) for key, item in value.items()}
    return json.dumps(parts, separators=(",", ":"), allow_nan=False).encode()


def _optimizer_values(
    subject: Subject, rank: int, found: list[Share], shapes: dict[tuple[str, str], tuple[int, ...]]
) -> list[tuple[tuple[str, ...], tuple[str, ...], str]]:
    """The optimizer's values besides its tensors; where every rank has the same, the first one's."""
    optimizer = subject.optimizer
    if optimizer is None or (not optimizer.policy.optimizer.is_sharded and rank > 0):
        return []
    listed = []
    for run in run_values(optimizer):
        tensors: dict[str, Tensor] = {}
        text = json.dumps(
            encode(run.values, tensors, f"optimizer_values.{run.names[0]}"), sort_keys=True, allow_nan=False
        )
        for name, tensor in tensors.items():
            found.append(whole(VALUE, name, tensor))
            shapes[VALUE, name] = tuple(tensor.shape)
        listed.append((run.names, run.kinds, text))
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
        self._lock: _Lock | None = None
        self._aside = Path(ranks.on_first(self._what, lambda: str(self._open_aside())))
        self._snapshot = self._together(lambda: take_snapshot(subject, request, ranks.rank))
        self._name = f"shard-{ranks.rank:05d}-of-{ranks.world_size:05d}.safetensors"

    def _together(self, step: Callable[[], Any]) -> Any:
        try:
            return self._ranks.together(self._what, step)
        except BaseException:
            self._drop_aside()
            raise

    def _open_aside(self) -> Path:
        self._target.parent.mkdir(parents=True, exist_ok=True)
        if self._target.is_symlink() or (self._target.exists() and not self._target.is_dir()):
            raise CheckpointError(f"{self._target} exists and is not a folder.\n  Choose another tag.")
        remove_stale(self._target.parent)
        aside = self._target.with_name(f".{self._target.name}.{uuid.uuid4().hex[:8]}.tmp")
        aside.mkdir()
        try:
            self._lock = _Lock(aside)
        except BaseException:
            remove_if_possible(aside)
            raise
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
        files.write_durably(self._aside / _rank_file(self._ranks.rank), snapshot.own)
        return RankRecord(
            self._name,
            file,
            [share.piece for share in snapshot.shares],
            snapshot.shapes,
            record_of(snapshot.own, default_algorithm()),
            snapshot.optimizer_values,
        )

    def _publish(self, everyone: Sequence[RankRecord]) -> None:
        manifest = self._make_manifest(everyone)
        algorithm = manifest.algorithm
        state = _with_optimizer_values(self._snapshot.shared, everyone)
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
        snapshot = self._snapshot
        shapes = {key: shape for record in everyone for key, shape in record.shapes.items()}
        tensors = merge([record.pieces for record in everyone], shapes)
        kept = {name: info for name, info in snapshot.parameters.items() if name not in snapshot.excluded}
        for name, info in kept.items():
            # Without elements a parameter has no piece; with elements and without a piece, coverage fails.
            tensors.setdefault(PARAM, {}).setdefault(name, StoredTensor(info.dtype, info.shape, ()))
        for names, kinds, _ in (entry for record in everyone for entry in record.optimizer_values):
            for kind in kinds:
                for name in names:
                    missing = StoredTensor("F32", snapshot.parameters[name].shape, ())
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
            parameters=snapshot.parameters,
            tied=snapshot.tied,
            tensors=tensors,
        )
        manifest.files |= {_rank_file(rank): record.rank_file for rank, record in enumerate(everyone)}
        if snapshot.excluded:
            manifest.about["excluded_frozen"] = sorted(snapshot.excluded)
        manifest.check_coverage()
        return manifest

    def _drop_aside(self) -> None:
        if self._ranks.is_first:
            remove_if_possible(self._aside)
        if self._lock is not None:
            self._lock.release()


def _key(piece: Piece) -> str:
    return piece_key(piece.kind, piece.name, piece.start, piece.stop)


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _with_optimizer_values(shared: bytes, everyone: Sequence[RankRecord]) -> bytes:
    """The shared state with the optimizer's values of all ranks, each distinct set once with the names it holds for."""
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
    state = json.loads(shared)
    if "optimizer" in state:
        state["optimizer"]["values"] = [
            {"params": list(names), "kinds": list(kinds), "values": json.loads(text)}
            for (kinds, text), names in distinct.items()
        ]
    return json.dumps(state, separators=(",", ":"), allow_nan=False).encode()


class _Lock:
    """Says that a folder is being written to; the kernel takes it back from a process that dies."""

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        """Give it back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def remove_stale(parent: Path) -> None:
    """Delete what saves that died have left in a folder; those still being written are locked and stay. Afterwards the space
    of everything that was removed is free."""
    files.finish_removals()
    for entry in os.scandir(parent):
        if ASIDE.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            if entry.name.endswith(".old") and not (parent / entry.name[1:-13]).exists():
                continue  # the only copy: a replacement died between its two renames
            try:
                lock = _Lock(Path(entry.path))
            except OSError:
                continue
            files.remove_tree(Path(entry.path))
            lock.release()
    files.finish_removals()


def remove_if_possible(folder: Path) -> None:
    """Delete a folder that nobody needs; a disk that refuses is no reason to call a save failed, or to hide why it was."""
    try:
        files.remove_tree(folder)
    except OSError as error:
        logger.warning("%s could not be removed: %s", folder, error)


def put_in_place(aside: Path, target: Path) -> None:
    """Publish a whole folder under its name. Where the system can exchange folders there is no instant without one."""
    if not target.exists():
        os.rename(aside, target)
        files.sync_folder(target.parent)
        return
    old = aside
    if not files.swap(aside, target):
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
        os.rename(target, old)
        os.rename(aside, target)
    files.sync_folder(target.parent)
    _keep_foreign_files(old, target)
    remove_if_possible(old)


def _keep_foreign_files(old: Path, new: Path) -> None:
    """Carry over what others put beside the old checkpoint's own files."""
    try:
        own = set(json.loads((old / FILE_NAME).read_bytes())["files"]) | {FILE_NAME}
    except (OSError, ValueError, KeyError, TypeError):
        own = set()
    for entry in os.scandir(old):
        is_own = entry.name in own or entry.name.endswith("_states.pt")
        if not is_own and not (new / entry.name).exists():
            os.rename(entry.path, new / entry.name)


def retain(folder: Path, keep: int, newest: Path) -> None:
    """Delete the oldest checkpoints of a folder beyond the newest `keep`; never `newest`, nor what `latest` or
    `latest_universal` names."""
    named = [folder / name for name in (LATEST, LATEST_UNIVERSAL)]
    protected = {newest, *(folder / path.read_text().strip() for path in named if path.exists())}
    found = []
    for entry in os.scandir(folder):
        manifest = Path(entry.path, FILE_NAME)
        if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False) and manifest.is_file():
            found.append((manifest.stat().st_mtime_ns, Path(entry.path)))
    for _, path in sorted(found, reverse=True)[keep:]:
        if path not in protected:
            logger.info("removing %s: checkpoint.keep_last_n is %d", path, keep)
            remove_if_possible(path)
