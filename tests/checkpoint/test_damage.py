"""Damaged and malicious checkpoints: always an error with words, never a wrong load, never code that runs."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.checkpoint import container
from deepspeed.checkpoint.__main__ import main
from deepspeed.checkpoint.find import open_checkpoint
from deepspeed.checkpoint.manifest import FILE_NAME, SEAL, parse_manifest, seal
from deepspeed.checkpoint.source import Source, Wanted
from deepspeed.checkpoint.writer import record_of
from deepspeed.checkpoint.zero_to_fp32 import open_tag
from deepspeed.utils.errors import CheckpointError
from tests.checkpoint.runs import save_and_go_on
from tests.harness import run_ranks

NUM_PLACES = 200


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tag's folder of a checkpoint written by two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(2, save_and_go_on, folder, 2, "gpt_tied", num_after=0)
    return folder / "global_step3"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "copy")


def read_all(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Everything of a checkpoint that a load reads."""
    source: Source = open_checkpoint(folder)
    found = {}
    for kind, by_name in source.tensors.items():
        for name, stored in by_name.items():
            values = torch.empty(stored.numel, dtype=container.DTYPE_OF[stored.dtype])
            found[kind, name] = values
            sink = lambda at, chunk, into=values: into[at : at + chunk.numel()].copy_(chunk)  # noqa: E731
            source.fetch([Wanted(kind, name, 0, stored.numel, sink)])
    source.state()
    for rank in range(2):
        source.rank_state(rank)
    return found


def test_bit_flips_and_cuts_at_random_places_are_always_noticed(whole: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    names = sorted(p.name for p in whole.iterdir() if p.suffix in (".safetensors", ".json"))
    shards = [name for name in names if name.endswith(".safetensors")]
    for number in range(NUM_PLACES):
        folder = shutil.copytree(whole, tmp_path / f"{number}")
        path = folder / chance.choice(shards if number % 2 else names)
        size = path.stat().st_size
        if number % 4 == 3:
            os.truncate(path, chance.randrange(size))
        else:
            data = bytearray(path.read_bytes())
            data[chance.randrange(size)] ^= 1 << chance.randrange(8)
            path.write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            read_all(folder)
        assert path.name in str(caught.value)
        shutil.rmtree(folder)


def test_a_damaged_tensor_is_named(copy: Path) -> None:
    store: Any = open_checkpoint(copy)
    file = store.manifest.shards[1]
    key, entry = next((k, e) for k, e in store.layout(file).entries.items() if k.startswith("param/"))
    with open(copy / file, "r+b") as opened:
        opened.seek(entry.start + 5)
        opened.write(b"\x55")
    name = key.removeprefix("param/").rpartition("[")[0]
    with pytest.raises(CheckpointError) as caught:
        store.fetch([Wanted("param", name, 0, store.tensors["param"][name].numel, lambda *_: None)])
    assert file in str(caught.value)
    assert f"param {name}" in str(caught.value)


def _reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as somebody would who knows the format."""
    value = json.loads((folder / FILE_NAME).read_bytes())
    change(value)
    value.pop(SEAL)
    (folder / FILE_NAME).write_bytes(seal(json.dumps(value).encode(), "xxh3_64"))


def _replace(folder: Path, name: str, data: bytes) -> None:
    """Change a file and its record in the manifest: digests match, only sense can refuse it."""
    (folder / name).unlink()
    (folder / name).write_bytes(data)
    record = record_of(data, "xxh3_64")
    _reseal(
        folder, lambda value: value["files"].update({name: {"bytes": record.nbytes, "digests": list(record.digests)}})
    )


def _shard(folder: Path) -> tuple[str, dict[str, Any], bytes]:
    name = "shard-00000-of-00002.safetensors"
    data = (folder / name).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return name, json.loads(data[8 : 8 + length]), data[8 + length :]


def _with_header(folder: Path, change: Callable[[dict[str, Any]], None], length: int | None = None) -> None:
    name, header, body = _shard(folder)
    change(header)
    text = json.dumps(header).encode()
    _replace(folder, name, struct.pack("<Q", len(text) if length is None else length) + text + body)


def _first(header: dict[str, Any]) -> dict[str, Any]:
    return next(value for key, value in header.items() if key != "__metadata__")


def _overlap(header: dict[str, Any]) -> None:
    entries = [value for key, value in header.items() if key.startswith("param/")]
    size = entries[1]["data_offsets"][1] - entries[1]["data_offsets"][0]
    entries[1]["data_offsets"] = [entries[0]["data_offsets"][0], entries[0]["data_offsets"][0] + size]


class _Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/never-run",)


HEADERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a length beyond the file": (lambda f: _with_header(f, lambda h: None, 1 << 40), "header claims"),
    "a length of all ones": (lambda f: _with_header(f, lambda h: None, 2**64 - 1), "header claims"),
    "a header that is no JSON": (lambda f: _replace(f, _shard(f)[0], struct.pack("<Q", 4) + b"\x80\x04N."), "not valid JSON"),
    "a header nested without end": (
        lambda f: _replace(f, _shard(f)[0], struct.pack("<Q", 200_000) + b"[" * 200_000), "not valid JSON"
    ),
    "a header that is a list": (lambda f: _replace(f, _shard(f)[0], struct.pack("<Q", 2) + b"[]"), "not a JSON object"),
    "a shape that lies": (lambda f: _with_header(f, lambda h: _first(h).update(shape=[1 << 40])), "which is not the"),
    "a negative size": (lambda f: _with_header(f, lambda h: _first(h).update(shape=[-1])), "malformed"),
    "a size that is no number": (lambda f: _with_header(f, lambda h: _first(h).update(shape=["9"])), "malformed"),
    "an offset beyond the file": (
        lambda f: _with_header(f, lambda h: _first(h).update(data_offsets=[1 << 61, (1 << 61) + 4])), "is not the"
    ),
    "an unknown dtype": (lambda f: _with_header(f, lambda h: _first(h).update(dtype="X9")), "malformed"),
    "overlapping tensors": (lambda f: _with_header(f, _overlap), "overlaps|leaves a gap"),
    "a missing tensor": (lambda f: _with_header(f, lambda h: h.pop(next(k for k in h if k != "__metadata__"))), "leaves a gap"),
    "a pickle instead of a shard": (lambda f: _replace(f, _shard(f)[0], pickle.dumps(_Bomb())), "header claims|cut off"),
    "a pickle instead of the state": (lambda f: _replace(f, "state.json", pickle.dumps(_Bomb())), "not valid JSON"),
    "an unknown kind of value": (
        lambda f: _replace(f, "state.json", b'{"client_state": {"x": {"$object": "os.system"}}}'), "kind '.object' cannot be read"
    ),
    "a reference to no tensor": (
        lambda f: _replace(f, "state.json", b'{"client_state": {"x": {"$tensor": "nowhere"}}}'), "nowhere .* is missing"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_files_made_to_deceive_are_refused(copy: Path, case: str) -> None:
    make, words = HEADERS[case]
    make(copy)
    with pytest.raises(CheckpointError, match=words):
        read_all(copy)
    assert not Path("/tmp/never-run").exists()


def _rename_file(value: dict[str, Any], new: str) -> None:
    name = value["shards"][0]
    value["shards"][0] = new
    value["files"][new] = value["files"].pop(name)


def _first_tensor(value: dict[str, Any]) -> dict[str, Any]:
    return next(iter(value["tensors"]["param"].values()))


def _boxed(value: dict[str, Any], start: int, stop: int) -> None:
    tensor = _first_tensor(value)
    rest = [[[0, size]] for size in tensor["shape"][1:]]
    tensor["boxes"] = [[[[start, stop]], *rest]]
    tensor["pieces"] = [[*piece[:3], 0] for piece in tensor["pieces"]]


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a name with ..": (lambda v: _rename_file(v, "../stolen"), "not a plain file name: refused"),
    "an absolute path": (lambda v: _rename_file(v, "/etc/passwd"), "not a plain file name: refused"),
    "a hidden name": (lambda v: _rename_file(v, ".."), "not a plain file name: refused"),
    "a newer version": (lambda v: v.update(version=3), "Use a newer release"),
    "another format": (lambda v: v.update(format="zip"), "not a manifest"),
    "an overlap": (lambda v: _first_tensor(v)["pieces"].append([0, 0, 1]), "stored twice"),
    "a box that is not there": (lambda v: _first_tensor(v)["pieces"][0].append(0), "malformed"),
    "a box beyond the tensor": (lambda v: _boxed(v, 0, 1 << 20), "malformed"),
    "a box that is not sorted": (lambda v: _boxed(v, 2, 1), "malformed"),
    "a box that leaves a gap": (lambda v: _boxed(v, 0, 1), "of its box .0:1|elements"),
    "a gap": (lambda v: _first_tensor(v)["pieces"].pop(), "are missing"),
    "a file that is not there": (lambda v: _first_tensor(v)["pieces"].append([99, 0, 1]), "malformed"),
    "a huge shape": (lambda v: _first_tensor(v).update(shape=[1 << 50, 1 << 50]), "malformed"),
    "a size as text": (lambda v: v["files"]["state.json"].update(bytes="12"), "malformed"),
    "a missing digest": (lambda v: v["files"]["state.json"].update(digests=[]), "malformed"),
    "an unknown digest": (lambda v: v["digest"].update(algorithm="md5"), "unknown"),
    "tiny blocks": (lambda v: v["digest"].update(block=1), "malformed"),
    "no tensors": (lambda v: v.pop("tensors"), "malformed"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests_made_to_deceive_are_refused(copy: Path, case: str) -> None:
    change, words = MANIFESTS[case]
    _reseal(copy, change)
    with pytest.raises(CheckpointError, match=words):
        read_all(copy)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "shard-00000-of-00002.safetensors"])
def test_links_and_pipes_are_refused(copy: Path, tmp_path: Path, name: str) -> None:
    shutil.move(copy / name, tmp_path / "elsewhere")
    (copy / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="symbolic link: refused"):
        read_all(copy)
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(CheckpointError, match="not a plain file: refused"):
        read_all(copy)


@pytest.mark.parametrize("tag", ["../elsewhere", "/etc", "a/../../b", "", "."])
def test_a_latest_that_leads_out_of_the_folder_is_refused(tmp_path: Path, tag: str) -> None:
    (tmp_path / "latest").write_text(tag)
    with pytest.raises(CheckpointError, match="not the name of a folder below"):
        open_tag(tmp_path)


def test_random_manifests_are_read_or_refused(whole: Path) -> None:
    chance = random.Random(1)
    text = (whole / FILE_NAME).read_bytes()
    for _ in range(300):
        data = bytearray(text)
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        value = bytes(data)
        with contextlib.suppress(CheckpointError):
            parse_manifest(seal(value[: value.rfind(b',"seal"')] + b"}", "xxh3_64"), "manifest.json")


def test_verify_lists_all_damage_and_nothing_else(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["verify", str(copy)])
    assert status.value.code == 0
    for name in ("state.json", "shard-00001-of-00002.safetensors"):
        with open(copy / name, "r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"\x00\x01")
    (copy / "rank-00001.json").unlink()
    with pytest.raises(SystemExit) as status:
        main(["verify", str(copy)])
    assert status.value.code == 1
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("state.json", "shard-00001", "rank-00001.json is missing"))
    assert "shard-00000-of" not in printed
    assert "3 problems" in printed


def test_a_damaged_file_is_listed_once(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "shard-00000-of-00002.safetensors").unlink()
    with pytest.raises(SystemExit) as status:
        main(["verify", str(copy)])
    assert status.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "shard-00000-of-00002.safetensors is missing" in lines[0]
    assert lines[1].endswith("1 problem")


@pytest.mark.parametrize("stage", [0, 2])
def test_a_checkpoint_without_its_manifest_is_not_taken_for_an_originals(tmp_path: Path, stage: int) -> None:
    run_ranks(2, save_and_go_on, tmp_path, stage, num_before=1, num_after=0)
    folder = tmp_path / "global_step1"
    for name in ("manifest", "state"):
        (folder / f"{name}.json").unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match="global_step1 has lost its manifest.json"):
            open_tag(tmp_path)
    for path in folder.glob("shard-*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="_model_states.pt holds no weights"):
        open_tag(tmp_path)


def test_a_damaged_manifest_is_damage_and_a_folder_without_is_no_checkpoint(copy: Path, tmp_path: Path) -> None:
    (copy / "manifest.json").write_bytes((copy / "manifest.json").read_bytes()[:-9])
    (tmp_path / "empty").mkdir()
    for arguments, code in (
        (["verify", str(copy)], 1),
        (["diff", str(copy), str(copy)], 1),
        (["inspect", str(tmp_path / "empty")], 2),
    ):
        with pytest.raises(SystemExit) as status:
            main(arguments)
        assert status.value.code == code
