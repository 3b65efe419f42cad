"""The laboratory at a size of no interest: its page holds the numbers of its runs, and a run is made once."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from benchmarks.quality.__main__ import main
from benchmarks.quality.arms import ARMS
from benchmarks.quality.bed import VOCAB_SIZE, model_of, num_parameters, write_tokenizer
from benchmarks.quality.grid import Cell, Grid
from benchmarks.quality.report import Searched, differs
from benchmarks.quality.runs import Outcome, make_all
from relora.config import check
from relora.forecast.memory import stage_model
from relora.model.model import read_hf_config
from relora.model.tasks import CausalLM
from relora.tracking.metrics_file import read_metrics
from relora.train.stages import Stage
from tests.helpers.programs import ROOT
from tests.helpers.tiny import only

GRIDS = sorted((ROOT / "benchmarks" / "quality").glob("*.yaml"))
ADAMW, OURS = [3e-3, 0.02], [0.05, 0.2]
TREE = {
    "widths": [16],
    "tokens_per_parameter": [0.1],
    "ranks": [4],
    "sequence_length": 32,
    "batch_size": 4,
    "cycles": 3,
    "evaluations": 3,
    "eval_tokens": 256,
    "least_wrapped": 0.5,
    "arms": {"full_adamw": ADAMW, "offset_product": OURS},
    "note": "Too small to mean anything.",
}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TREE | changes))
    return path


def rows_under(header: str, text: str) -> list[list[str]]:
    """The cells of the rows of the table whose first line begins so."""
    _, _, below = text.partition(header)
    lines = below.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_holds_the_numbers_of_the_runs_and_a_run_is_made_once(corpus: Path, tmp_path: Path) -> None:
    page, runs = tmp_path / "quality.md", tmp_path / "runs"
    arguments = [str(written(tmp_path, source=str(corpus))), "--folder", str(runs), "--page", str(page), "--jobs=2"]
    main(arguments)
    text = page.read_text()
    losses = {}
    for arm, rates in (("full_adamw", ADAMW), ("offset_product-d4", OURS)):
        for rate in rates:
            run = runs / "tiny" / "w16-t0.1" / arm / f"lr{rate:g}-s0"
            [*_, last] = only(read_metrics(run / "metrics.jsonl"), "eval_loss").items()
            assert last[0] == 9
            losses[arm.replace("-d4", " r=d/4"), f"{rate:g}"] = f"{last[1]:.4f}"
    assert len(set(losses.values())) == 4
    told = rows_under("| arm | rate | loss", text)
    assert {(arm, rate): loss for arm, rate, loss, _ in told} == losses
    best = {row[0]: row[1:] for row in rows_under("| arm | best rate | loss", text)}
    for arm, (rate, loss, spread, apart, *_) in best.items():
        of_arm = {key[1]: float(value) for key, value in losses.items() if key[0] == arm}
        best_of_arm = min(of_arm, key=of_arm.__getitem__)
        assert (rate, float(loss), spread) == (f"{best_of_arm} (edge)", of_arm[best_of_arm], "-")
        assert float(apart) == pytest.approx(float(loss) - float(best["full_adamw"][1]), abs=2e-4)
    assert "One seed: no spread is known" in text and TREE["note"] in text
    assert all((tmp_path / name).stat().st_size > 1000 for name in re.findall(r"\]\((.*\.png)\)", text))
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.json*")}
    grid, made = Grid.read(Path(arguments[0])), runs / "tiny"
    make_all(grid, made, jobs=1)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.json*")} == before
    with pytest.raises(SystemExit, match="a run by other settings has this name"):
        make_all(replace(grid, rest_learning_rate=0.5), made, jobs=1)


@pytest.mark.parametrize("width", [64, 128])
def test_nearly_all_parameters_are_wrapped(width: int, tmp_path: Path) -> None:
    grid = Grid(arms={"relora": [0.01]}, widths=[width], tokens_per_parameter=[1], ranks=[8])
    [cell] = grid.cells()
    config = check(cell.settings(grid, tmp_path, tmp_path))
    hf_config, _ = read_hf_config(config.model, CausalLM())
    assert hf_config is not None
    counted = stage_model(Stage("low_rank", 1), config, hf_config).parameter_report
    hidden = counted.wrapped.num_parameters
    assert num_parameters(width) == (hidden, hidden + counted.full.num_parameters)
    assert hidden > 0.95 * (hidden + counted.full.num_parameters)
    assert config.lora.r == width // 8 and model_of(width, sequence_length=8)["num_hidden_layers"] == 3 * width // 32


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_grids_are_of_valid_configurations(path: Path, tmp_path: Path) -> None:
    grid = Grid.read(path)
    cells = list(grid.cells())
    assert len({cell.folder(tmp_path) for cell in cells}) == len(cells)
    for arm in grid.arms:
        check(next(cell for cell in cells if cell.arm == arm).settings(grid, tmp_path, tmp_path))


def test_all_arms_are_in_the_map() -> None:
    assert Grid.read(ROOT / "benchmarks" / "quality" / "map.yaml").arms.keys() == ARMS.keys()


def test_a_token_is_a_byte(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path))
    text = 'def f(x):\n\treturn "\u00e9\u20ac\U0001f600"  \n'
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode()) and max(ids) < VOCAB_SIZE == len(tokenizer)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"relora": [0.1], "full_muon": [0.1, 0.2]}}, "each must have as many learning rates"),
        ({"arms": {"reloar": [0.1]}}, "reloar: must be of full_adamw"),
        ({"least_wrapped": 0.95}, r"widths = 16: 66\.2% of the parameters are hidden matrices, less than .* = 95"),
        ({"width": [16]}, "width: unknown; known are arms"),
    ],
)
def test_a_grid_that_would_mislead_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        Grid.read(written(tmp_path, **changes))


@pytest.fixture
def searched() -> Callable[..., Searched]:
    def made(losses: dict[float, list[float]]) -> Searched:
        ones = [
            Outcome(Cell(seed, 16, 1, "relora", 4, rate), [{"step": 1, "eval_loss": loss}], loss == float("inf"))
            for rate, of_rate in losses.items()
            for seed, loss in enumerate(of_rate)
        ]
        return Searched("relora", ones)

    return made


def test_the_best_rate_is_that_of_the_best_mean_and_spread_decides(searched: Callable[..., Searched]) -> None:
    inf = float("inf")
    ours = searched({0.1: [1.9, 1.1], 0.2: [1.2, 1.4], 0.4: [1.0, inf]})
    assert (ours.best_rate, ours.loss, ours.spread) == (0.2, pytest.approx(1.3), pytest.approx(0.2))
    assert not ours.is_at_the_edge
    close, far, alone = searched({0.1: [1.45, 1.35]}), searched({0.1: [1.6, 1.6]}), searched({0.1: [1.6]})
    assert close.is_at_the_edge
    assert [differs(arm, ours) for arm in (close, far, alone, ours)] == ["within the spread", "yes", None, None]
