from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from deepspeed.config import DeepSpeedConfigError, load_config, read_config

CONFIG = {"train_batch_size": 8, "zero_optimization": {"stage": 2}}


def written(folder: Path, text: str) -> Path:
    path = folder / "ds_config.json"
    path.write_text(text)
    return path


def test_a_dict_is_copied_and_not_changed() -> None:
    mine: dict[str, Any] = {"zero_optimization": {"stage": "auto"}, "optimizer": {"params": {"betas": [0.9, 0.95]}}}
    before = json.dumps(mine)
    copy = read_config(mine)
    load_config(mine)
    copy["optimizer"]["params"]["betas"].append(1)
    assert json.dumps(mine) == before


def test_an_object_inside_a_dict_is_shared_and_not_copied() -> None:
    group = object()
    assert read_config({"tensor_parallel": {"tp": {"tp_group": group}}})["tensor_parallel"]["tp"]["tp_group"] is group


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_to_json_is_read(tmp_path: Path, kind: type) -> None:
    assert read_config(kind(written(tmp_path, json.dumps(CONFIG)))) == CONFIG


def test_hjson_allows_comments_trailing_commas_and_bare_keys(tmp_path: Path) -> None:
    text = """
    {
      # sizes
      train_batch_size: 8,
      "zero_optimization": {"stage": 2,},  // stage
    }
    """
    assert read_config(written(tmp_path, text)) == CONFIG


def test_base64_of_json_is_read() -> None:
    text = json.dumps({"optimizer": {"type": "???>>>~~~"}, **CONFIG})
    assert read_config(base64.urlsafe_b64encode(text.encode()).decode())["train_batch_size"] == 8


def test_very_long_base64_is_read() -> None:
    long = {"tensor_parallel": {"injection_policy_tuple": ["layer"] * 1000}}
    assert read_config(base64.urlsafe_b64encode(json.dumps(long).encode()).decode()) == long


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 2}', ["gives keys twice: a."]),
        ('{"fp16": {"enabled": true, "enabled": false}}', ["gives keys twice: fp16.enabled."]),
        ('{a: 1, // twice\n a: 2, "fp16": {"x": 1, "x": 1}}', ["gives keys twice: a, fp16.x."]),
        ('{"a": [{"b": 1, "b": 1}]}', ["gives keys twice: a.0.b."]),
        ('{\n"a": 1\n"b": [}', ["is malformed", "As JSON: line 3, column 1", "As Hjson"]),
        ("", ["is empty", "Write a JSON object"]),
        ("[1, 2]", ["holds a list", "Write a JSON object"]),
        ("3", ["holds a int", "Write a JSON object"]),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, words: list[str]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(DeepSpeedConfigError) as caught:
        read_config(path)
    assert [word for word in [str(path), *words] if word not in str(caught.value)] == []


def test_a_missing_path_is_named() -> None:
    with pytest.raises(DeepSpeedConfigError, match=r"file /nowhere/ds\.json does not exist"):
        read_config(Path("/nowhere/ds.json"))


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(DeepSpeedConfigError, match="cannot be read"):
        read_config(str(tmp_path))


def test_a_string_that_is_nothing_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DeepSpeedConfigError) as caught:
        read_config("ds_config.json")
    assert '"ds_config.json" is neither a file nor base64 of JSON' in str(caught.value)
    assert f"Looked for the file {tmp_path / 'ds_config.json'}" in str(caught.value)


def test_base64_of_something_else_is_refused() -> None:
    with pytest.raises(DeepSpeedConfigError, match="nor base64 of JSON"):
        read_config(base64.urlsafe_b64encode(b"[1]").decode())


@pytest.mark.parametrize("source", [None, 3, [1], b"{}"])
def test_any_other_source_is_refused(source: Any) -> None:
    with pytest.raises(DeepSpeedConfigError, match="Give a dict, the path of a JSON file, or URL-safe base64"):
        read_config(source)


def test_errors_about_keys_name_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, '{"gradient_clipp1ng": 1.0}')
    with pytest.raises(DeepSpeedConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"in {path}: gradient_clipp1ng is not a configuration key.")
