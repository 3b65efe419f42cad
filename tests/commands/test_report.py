"""The report of runs whose names and metrics hold what is markup to somebody."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from relora.cli import main
from relora.commands import report

NAMES = ["<img src=x onerror=alert(1)>", "_hidden_", "costs $\\frac{1$ & more", "a </td><script>"]
LINES: list[dict[str, Any]] = [
    {"step": 1, "loss": 3.0, "tokens": 64, "learning_rate": 1e-3},
    {"step": 2, "loss": "<b>4</b>", "tokens": None},
    {"step": 2, "eval_loss": 2.5},
    {"step": 2, "restart": 1},
    {"step": 3, "loss": 2.0},
]


def test_names_and_values_are_text(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name.replace("/", "\N{FRACTION SLASH}")).mkdir()
    runs = sorted(tmp_path.iterdir())
    for run in runs:
        (run / "config.yaml").write_text("")
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    assert main(["report", *map(str, runs), "--output", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert re.findall(r"<(img|script|b)\b[^>]*>", page) == ["img"], "the plot alone"
    assert page.count("<tr>") == 1 + len(NAMES)
    assert "<td>&lt;img src=x onerror=alert(1)&gt;</td><td>1</td><td>64</td><td>2.5000</td><td>1</td><td></td>" in page
    assert image.imread(tmp_path / "report" / "overview.png").std() > 0


def test_every_cell_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "summary", lambda _: ["<script>alert(1)</script>"])
    assert "<script>" not in report.page({"run": []})
