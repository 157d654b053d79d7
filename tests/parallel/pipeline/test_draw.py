"""Pictures of lists: a box per action at its time, and the picture of the docs is what is drawn."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from deepspeed.parallel.pipeline import schedules
from deepspeed.parallel.pipeline.actions import read_csv
from deepspeed.parallel.pipeline.check import Costs
from deepspeed.parallel.pipeline.draw import drawing
from deepspeed.utils.errors import DeepSpeedError

PICTURE = Path(__file__).parents[3] / "docs" / "images" / "schedules.svg"
SVG = "{http://www.w3.org/2000/svg}"


def _boxes(text: str) -> dict[str, tuple[float, float]]:
    """Where each action begins, and its width, in pixels."""
    found = {}
    for box in ET.fromstring(text).iter(f"{SVG}rect"):
        title = box.find(f"{SVG}title")
        if title is not None:
            found[str(title.text)] = float(box.get("x", "")), float(box.get("width", ""))
    return found


def test_the_picture_of_the_docs_is_what_is_drawn() -> None:
    """To write it anew: `PICTURE.write_text(drawing([make(4, 8) for make in schedules.NAMED.values()]))`."""
    assert PICTURE.read_text() == drawing([make(4, 8) for make in schedules.NAMED.values()])


def test_a_box_is_where_its_action_is_on_the_clock() -> None:
    text = drawing([schedules.one_f_one_b(2, 2)], Costs([1, 2], [1, 2], [1, 2]))
    boxes, unit = _boxes(text), (1100 - 52) / 15  # 1 + (2 + 4) * 2 + 2
    assert len(boxes) == 8
    assert boxes["0F0"] == pytest.approx((52, unit), abs=0.06)
    assert boxes["1B1"] == pytest.approx((52 + 9 * unit, 4 * unit), abs=0.06)
    assert boxes["0B1"] == pytest.approx((52 + 13 * unit, 2 * unit), abs=0.06)
    assert "1f1b: 2 ranks, 2 micro-batches; bubble of one batch 40.0%, of batches in a row" in text


def test_a_list_from_a_file_is_drawn_by_its_name() -> None:
    text = drawing([read_csv("0F0,0B0\n1F0,1B0\n", "a <list> & more")])
    assert "a &lt;list&gt; &amp; more: 2 ranks" in text
    assert sorted(_boxes(text)) == ["0B0", "0F0", "1B0", "1F0"]


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(DeepSpeedError, match=r"a picture of 8320 actions: it has room for 1 to 8192\.\n  Draw"):
        drawing([schedules.gpipe(65, 64)])
    with pytest.raises(DeepSpeedError, match="costs of 3 stages for a list of 2"):
        drawing([schedules.gpipe(2, 2)], Costs.equal(3))
    with pytest.raises(DeepSpeedError, match="wait for each other for ever"):
        drawing([read_csv("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n")])
