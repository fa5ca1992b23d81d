"""`tools/figures`: what tests note is added up, and takes the place of the figures before."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.figures import tally
from tools import figures


def test_what_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CDP_FIGURES", raising=False)
    tally("nobody asks", images=1)
    monkeypatch.setenv("CDP_FIGURES", str(tmp_path / "notes"))
    tally("power", images=3)
    tally("power", images=4, syncs=1)
    lines = (tmp_path / "notes").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"what": "power", "images": 3},
        {"what": "power", "images": 4, "syncs": 1},
    ]


def test_the_page_has_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{figures.BEGIN}\n{figures.END}\nbelow\n")
    monkeypatch.setattr(figures, "PAGE", page)
    for number in (7, 1234):
        figures.write(figures.table({"power": Counter(images=number), "flips": Counter(flips=2)}, 12.4, 0))
    text = page.read_text()
    assert text.startswith(f"above\n{figures.BEGIN}\n\n| what |") and text.endswith(f"{figures.END}\nbelow\n")
    assert "| power | 1,234 images |" in text and "| all | 1,234 images, 2 flips |" in text
    assert "7 images" not in text and text.count("s of CPU") == 1


def test_the_page_of_the_project_has_their_place() -> None:
    text = figures.PAGE.read_text()
    assert text.count(figures.BEGIN) == text.count(figures.END) == 1
