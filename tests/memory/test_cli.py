"""`deepspeed estimate`: its table, its advice, its page, and what it refuses."""

from __future__ import annotations

import html.parser
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deepspeed.launcher.runner import main
from deepspeed.memory import cli
from deepspeed.memory.estimator import Estimator
from deepspeed.memory.html import page
from deepspeed.memory.options import Limits, advise, survey
from tests.models import example_module


def small() -> nn.Module:
    example = example_module()
    return example.Gpt(example.GptConfig(width=64, layers=3, heads=2, seq=64))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[str]:
    """A file with functions that make models."""
    path = tmp_path / "models_of_a_user.py"
    path.write_text(
        "from tests.memory.test_cli import small as make\n"
        "import torch\n"
        "def with_batch():\n    return torch.nn.Linear(8, 8), torch.ones(4, 8)\n"
        "def nothing():\n    return 5\n"
    )
    yield str(path)
    sys.path[:] = [each for each in sys.path if each != str(tmp_path)]
    sys.modules.pop("models_of_a_user", None)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["estimate", *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_table_has_every_option_and_marks_the_own(
    capsys: pytest.CaptureFixture[str], place: str, tmp_path: Path
) -> None:
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}}))
    code, out, _ = run(capsys, f"{place}:make", "-c", str(config), "-n", "4", "-s", "64")
    assert code == 0
    rows = [line for line in out.splitlines() if line[2:3].isdigit()]
    assert len(rows) == 3 * (1 + 2 + 2 + 4)
    assert [row.split()[1:4] for row in rows if row.startswith(">")] == [["2", "none", "none"]]
    assert "Gpt: 0.2M parameters, batch 4x64 per rank, 4 ranks on cuda" in out
    assert "the configuration names no optimizer; AdamW is assumed" in out


def test_json_has_bytes(capsys: pytest.CaptureFixture[str], place: str) -> None:
    code, out, _ = run(capsys, f"{place}:with_batch", "--json", "--device", "cpu")
    found = json.loads(out)
    assert code == 0 and found["model"] == "Linear"
    assert found["options"][0]["by_kind"]["optimizer states"] == 72 * 12 + 56 * 4, "masters are padded, moments are not"


def test_the_smallest_change_that_fits_is_told() -> None:
    tokens = torch.zeros(16, 64, dtype=torch.int64)
    config = {"train_micro_batch_size_per_gpu": 16, "zero_optimization": {"stage": 2}}
    result = survey(small(), config, (tokens, tokens), world_size=4, device_type="cuda")

    def advised(nbytes: int) -> Any:
        result.limits = Limits(device_nbytes=nbytes)
        result.advice = advise(result, lambda batch: Estimator(small(), batch, device_type="cuda"), (tokens, tokens))
        return result.advice

    needed = result.current.estimate.peak_nbytes + result.current.estimate.allowance_nbytes
    assert advised(needed).fits and advised(needed).changes == {}
    assert advised(int(0.85 * needed)).changes == {"activation_checkpointing.recompute": "selective"}
    least = min(option.estimate.peak_nbytes + option.estimate.allowance_nbytes for option in result.options)
    assert advised(least - 1).changes["train_micro_batch_size_per_gpu"] == 8
    assert advised(least - 1).fits and not advised(1000).fits
    assert "Nothing fits" in cli.advice_text(result)


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, str]] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.addresses += [value for key, value in found.items() if key in ("src", "href")]
        if "row" in found.get("class", "").split():
            self.rows.append(found)


def test_the_page_stands_alone_and_has_a_bar_per_option() -> None:
    tokens = torch.zeros(4, 64, dtype=torch.int64)
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}
    result = survey(small(), config, (tokens, tokens), world_size=4, device_type="cuda")
    result.limits = Limits(device_nbytes=result.current.estimate.peak_nbytes)
    result.advice = advise(result, lambda batch: Estimator(small(), batch, device_type="cuda"), (tokens, tokens))
    text = page(result)
    parsed = _Page()
    parsed.feed(text)
    assert parsed.addresses == [] and "http" not in text and "@import" not in text
    assert len(parsed.rows) == len(result.options)
    classes = [row["class"].split() for row in parsed.rows]
    assert sum("now" in names for names in classes) == sum("best" in names for names in classes) == 1
    label, figures = json.loads(parsed.rows[0]["data-d"])
    assert label.startswith("stage 0, offload none, recompute none: ")
    assert {"parameters", "gradients", "optimizer states", "activations"} <= {name for name, _, _ in figures}


def test_a_page_is_written_where_asked(capsys: pytest.CaptureFixture[str], place: str, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "page.html"
    code, _, err = run(capsys, f"{place}:make", "-s", "32", "--html", str(target), "-m", "1")
    assert code == 0 and str(target) in err
    assert target.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing_here", "neither a Hugging Face config.json"),
        ("{place}:absent", "has no function 'absent'"),
        ("{place}:nothing", "returned a int"),
        ("no/such.py:make", "the file no/such.py does not exist"),
        ("no.such.module:make", "the module no.such.module cannot be imported"),
    ],
)
def test_what_is_no_model_is_refused(capsys: pytest.CaptureFixture[str], place: str, source: str, message: str) -> None:
    sys.path.append(str(Path(place).parent))  # for the fixture, where the file was not loaded
    code, out, err = run(capsys, source.format(place=place))
    sys.path.remove(str(Path(place).parent)) if sys.path.count(str(Path(place).parent)) > 1 else None
    assert code == 2 and out == "" and message in err


def test_no_ranks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(capsys, "models_of_a_user.py:make", "--ranks", "0")
    assert "--ranks: 0 is not a whole number of at least 1" in capsys.readouterr().err


class _Config:
    """Enough of a Hugging Face configuration."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    @classmethod
    def for_model(cls, kind: str, **values: Any) -> _Config:
        return cls(kind=kind, **values)


class _Decoder(nn.Module):
    """Enough of a Hugging Face model: called with input_ids and labels, answers a dict with the loss."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gpt = small()
        assert config.use_cache is False and config.kind == "toy"

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.gpt(input_ids, labels), "logits": self.gpt(input_ids)}


def test_a_hugging_face_configuration_is_built_on_the_meta_device(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # transformers is optional: a module with what is used of it stands in.
    module = types.ModuleType("transformers")
    module.AutoConfig, module.ToyForCausalLM = _Config, _Decoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", module)
    settings = {"model_type": "toy", "architectures": ["ToyForCausalLM"], "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model, batch = cli.build(str(tmp_path), 2, 32)
    assert all(param.is_meta for param in model.parameters())
    assert {name: tuple(value.shape) for name, value in batch.items()} == {"input_ids": (2, 32), "labels": (2, 32)}
    code, out, _ = run(capsys, str(tmp_path), "-b", "2", "-s", "32")
    assert code == 0 and "_Decoder" in out
    code, _, err = run(capsys, str(tmp_path), "-s", "65")
    assert code == 2 and "--seq 65 is longer than the model's 64 positions" in err
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = run(capsys, str(tmp_path))
    assert code == 2 and "transformers is not installed" in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list, not an object"),
        (
            '{"model_type": "nope"}',
            "Transformers makes no model of it: ValueError: Unrecognized model identifier: nope",
        ),
        ('{"model_type": "gpt2", "n_head": 0}', "Transformers makes no model of it: ZeroDivisionError"),
        ('{"model_type": "gpt2", "n_embd": "wide"}', "Transformers makes no model of it: "),
    ],
)
@pytest.mark.parametrize("command", ["estimate", "max-model"])
def test_a_damaged_configuration_of_a_model_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str, command: str
) -> None:
    pytest.importorskip("transformers")
    text = text.replace('"model_type"', '"n_layer": 2, "model_type"') if command == "max-model" else text
    (tmp_path / "config.json").write_text(text)
    assert main([command, str(tmp_path), "-m", "1"]) == 2
    assert words in capsys.readouterr().err


def test_a_command_whose_output_nobody_reads_ends_in_silence(place: str) -> None:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "estimate", f"{place}:make", "-s", "32"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (0, b"")


def test_a_page_that_cannot_be_written_is_told(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, f"{place}:make", "-s", "32", "--html", f"{place}/page.html")
    assert (code, out) == (2, "") and "page.html cannot be written: " in err
