"""metrics.jsonl after damage: what is whole is kept, what is lost is said, and no run ends for it."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relora.checkpoint.format import MetricsFacts
from relora.config import check
from relora.errors import Stopped
from relora.tracking.metrics_file import cut_metrics, metrics_facts, read_metrics
from relora.tracking.tracker import MetricsFile, SinkContext
from relora.train.callbacks import Callbacks
from relora.train.train import train
from tests.helpers.tiny import metrics, only, settings, stopped, untimed
from tests.train.test_ends import ask_after

LINES: list[dict[str, Any]] = [
    {"step": 1, "loss": 3.0},
    {"step": 2, "loss": 2.5},
    {"step": 2, "restart": 1, "merge_error": 0.0},
    {"step": 2, "eval_loss": 2.4},
    {"step": 3, "loss": 2.2},
]
Edit = Callable[[list[str]], list[str]]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run without damage: evaluations at 0, 4, 8 and 12, restarts at 7 and 10."""
    tree = settings(corpus, tmp_path_factory.mktemp("whole") / "run", training__report_to=[])
    train(check(tree))
    return tree


def write(path: Path, lines: list[dict[str, Any]]) -> MetricsFacts:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = metrics_facts(path)
    assert facts is not None
    return facts


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    mark = "relora: warning: "
    return [line.partition(mark)[2] for line in capsys.readouterr().err.splitlines() if mark in line]


def test_what_was_recorded_is_kept_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    facts = write(path, LINES[:3])
    write(path, LINES)
    # The evaluation at step 2 came after the checkpoint, so the resumed run makes it again.
    cut_metrics(path, after_step=2, cycle=1, evaluated=False, facts=facts)
    assert read_metrics(path) == LINES[:3]
    assert said(capsys) == []


@pytest.mark.parametrize("facts", [True, False], ids=["recorded", "not recorded"])
def test_an_evaluation_that_is_made_again_stands_once(facts: bool, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    recorded = write(path, LINES[:3])
    write(path, LINES)
    cut_metrics(path, after_step=2, cycle=1, evaluated=False, facts=recorded if facts else None)
    assert "eval_loss" not in path.read_text()
    write(path, LINES)
    cut_metrics(path, after_step=2, cycle=1, evaluated=True)
    assert read_metrics(path) == LINES[:4]


DAMAGES: dict[str, tuple[Edit, int, str]] = {
    "a line lost": (lambda lines: lines[1:], 3, "it has 3 of 4 lines up to step 2"),
    "a line garbled": (
        lambda lines: [lines[0], lines[1][:9], *lines[2:]],
        3,
        "it has 3 of 4 lines up to step 2; 1 damaged ones are kept in metrics.damaged.jsonl",
    ),
    "all lost": (lambda _: [], 0, "it has 0 of 4 lines up to step 2"),
    "a line twice": (lambda lines: [*lines, lines[0]], 4, ""),
    "bytes": (lambda lines: [*lines[:3], "\x00\x00", lines[3]], 4, "1 damaged ones are kept"),
    "a number for text": (
        lambda lines: ['{"step": 1, "loss": "low"}', *lines[1:]],
        3,
        "1 damaged ones are kept in metrics.damaged.jsonl",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_said_and_ends_nothing(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit, num_left, warning = DAMAGES[name]
    path = tmp_path / "metrics.jsonl"
    facts = write(path, LINES[:4])
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in edit(lines)))
    cut_metrics(path, after_step=2, cycle=1, facts=facts)
    assert len(read_metrics(path)) == num_left
    assert warning in " ".join(said(capsys))
    aside = tmp_path / "metrics.damaged.jsonl"
    assert aside.exists() == ("damaged" in warning)


def test_a_folder_in_its_place_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    sink = MetricsFile(SinkContext(tmp_path, 2, cycle=0, total_steps=9, hparams={}))
    sink.metrics(LINES[4])
    sink.close()
    assert untimed(read_metrics(tmp_path / "metrics.jsonl")) == LINES[4:]
    assert (tmp_path / "metrics.jsonl.damaged").is_dir()
    assert len(said(capsys)) == 1


@pytest.mark.parametrize(("what", "num_lost"), [("removed", 0), ("replaced", 0), ("shortened", 1), ("emptied", 2)])
def test_a_file_that_changes_under_a_run(
    what: str, num_lost: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run/metrics.jsonl"
    sink = MetricsFile(SinkContext(tmp_path / "run", None, cycle=0, total_steps=9, hparams={}))
    for line in LINES[:2]:
        sink.metrics(line)
    content = path.read_text()
    if what == "removed":
        shutil.rmtree(path.parent)
    elif what == "replaced":
        path.rename(path.with_name("old"))
        path.write_text("{}")
    else:
        path.write_text(content[: content.index("\n") + 10] if what == "shortened" else "")
    for line in LINES[2:4]:
        sink.metrics(line)
    sink.sync(3)
    sink.metrics(LINES[4])
    sink.close()
    if what == "shortened":  # the cut line and the one that was added to it are one damaged line
        num_lost += 1
    assert len([line for line in untimed(read_metrics(path)) if line in LINES]) == 5 - num_lost
    warning, *_ = said(capsys)
    assert ("no line is lost" in warning) == (what in ("removed", "replaced"))


@pytest.mark.parametrize("damage", ["removed", "evaluations lost"])
def test_a_run_ends_without_its_metrics(
    damage: str, whole: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = stopped(whole, 12, tmp_path / "run")
    path = tmp_path / "run/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if damage == "removed":
        path.unlink()
    else:
        path.write_text("".join(line for line in lines if "eval_loss" not in line and "merge_error" not in line))
    train(check(tree))
    results = json.loads((tmp_path / "run/final/relora.json").read_text())
    assert not {"eval_loss", "eval_loss_at_switch", "merge_error"} & results.keys(), "nothing that was not measured"
    assert "metrics.jsonl is not what was written" in capsys.readouterr().err


def test_no_evaluation_is_logged_twice(whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stopped where an evaluation is due, which is left to the resumed run; that one is killed after it.
    tree = stopped(whole, 7, tmp_path / "run")
    with monkeypatch.context() as patch:
        ask_after(8, patch, signal.SIGUSR1)
        with pytest.raises(Stopped, match="ended after update 8"):
            train(check(tree))

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Callbacks, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(check(tree))
    assert 8 in only(metrics(tmp_path / "run"), "eval_loss")
    train(check(tree))
    ours = [line for line in metrics(tmp_path / "run") if "eval_loss" in line]
    assert ours == [line for line in metrics(whole["output_dir"]) if "eval_loss" in line]
