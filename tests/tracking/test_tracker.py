"""Where a run reports to: the sinks that come with the package, and a user's own."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from relora.config import check
from relora.tracking.metrics_file import read_metrics
from relora.tracking.tracker import SINKS, Sink, SinkContext, Tracker, open_tracker, sink_problems
from relora.train.train import train
from tests.helpers.tiny import all_metrics, untimed

OWN = f"{__name__}:Recorder"
Settings = Callable[..., dict[str, Any]]


class Recorder(Sink):
    """A user's own sink: remembers every call."""

    opened: ClassVar[list["Recorder"]] = []

    def __init__(self, context: SinkContext) -> None:
        super().__init__(context)
        self.calls: list[tuple[Any, ...]] = []
        Recorder.opened.append(self)

    def metrics(self, line: Mapping[str, Any]) -> None:
        self.calls.append(("metrics", dict(line)))

    def progress(self, step: int, **fields: str) -> None:
        self.calls.append(("progress", step, fields))

    def message(self, text: str) -> None:
        self.calls.append(("message", text))

    def text(self, tag: str, text: str, step: int) -> None:
        self.calls.append(("text", tag, text, step))

    def spectra(self, spectra: Mapping[str, torch.Tensor], step: int) -> None:
        self.calls.append(("spectra", list(spectra), step))

    def sync(self, step: int) -> None:
        self.calls.append(("sync", step))

    def close(self) -> None:
        self.calls.append(("close",))


class Broken(Recorder):
    def close(self) -> None:
        raise OSError("disk full")


def context(folder: Path, start_step: int | None = None, *, cycle: int = 0) -> SinkContext:
    return SinkContext(folder, start_step, cycle=cycle, total_steps=12, hparams={"lora.r": 4, "data.sources": ["a"]})


def report_everything(tracker: Tracker) -> None:
    tracker.line({"step": 1, "loss": 2.0})
    tracker.progress(1, loss="2.0")
    tracker.log("hello")
    tracker.text("sample/0", "once", 1)
    tracker.spectra({"layer": torch.tensor([2.0, 1.0])}, 1)
    tracker.sync(1)
    tracker.close()


def test_every_sink_gets_everything_and_no_sink_is_no_error(tmp_path: Path) -> None:
    first, second = Recorder(context(tmp_path)), Recorder(context(tmp_path))
    report_everything(Tracker([first, Sink(context(tmp_path)), second]))
    report_everything(Tracker([]))
    assert [call[0] for call in first.calls] == [
        *("metrics", "progress", "message", "text", "spectra", "sync", "close")
    ]
    assert first.calls == second.calls


def test_all_are_closed_although_one_fails(tmp_path: Path) -> None:
    last = Recorder(context(tmp_path))
    with pytest.raises(OSError, match="disk full"):
        Tracker([Broken(context(tmp_path)), last]).close()
    assert last.calls == [("close",)]


def test_a_run_reports_to_a_users_own_sink(tiny_run: Settings) -> None:
    Recorder.opened.clear()
    tree = tiny_run(training__report_to=[OWN], training__max_steps=5, relora__restart_every=None)
    train(check(tree))
    [sink] = Recorder.opened
    assert not (Path(tree["output_dir"]) / "tensorboard").exists()
    lines = [{key: value for key, value in line.items() if key != "time"} for line in all_metrics(tree["output_dir"])]
    assert [call[1] for call in sink.calls if call[0] == "metrics"] == lines
    assert [call[1] for call in sink.calls if call[0] == "progress"] == [1, 2, 3, 4, 5]
    assert sink.calls[-1] == ("close",)
    assert (sink.context.start_step, sink.context.total_steps) == (None, 5)
    assert sink.context.hparams["lora.r"] == 4


def test_sync_brings_the_lines_and_the_status_to_the_disk(tmp_path: Path) -> None:
    tracker = open_tracker(context(tmp_path), [])
    tracker.line({"step": 3, "loss": 1.0})
    assert untimed(read_metrics(tmp_path / "metrics.jsonl")) == [{"step": 3, "loss": 1.0}]
    assert not (tmp_path / "status.json").exists()
    tracker.sync(3)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["status"], status["step"]) == ("running", 3)
    tracker.close()


def test_a_resumed_run_cuts_off_what_it_reports_again(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"step": 3, "loss": 1.0},
        {"step": 4, "loss": 0.9},
        {"step": 4, "restart": 1},
        {"step": 4, "restart": 2},
        {"step": 5, "loss": 0.8},
    ]
    tracker = open_tracker(context(tmp_path), ["tensorboard"])
    for line in lines:
        tracker.line(line)
    tracker.close()
    resumed = open_tracker(context(tmp_path, 4, cycle=1), ["tensorboard"])
    assert untimed(read_metrics(tmp_path / "metrics.jsonl")) == lines[:3]
    resumed.line({"step": 5, "loss": 0.7})
    resumed.close()
    first, second = sorted(path.name.split(".")[3] for path in (tmp_path / "tensorboard").iterdir())
    assert first < second, "TensorBoard reads files of the same second in any order"
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [
        (3, 1.0),
        (4, pytest.approx(0.9)),
        (5, pytest.approx(0.7)),
    ]


def test_a_cut_off_last_line_is_left_out_and_a_damaged_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    assert read_metrics(path) == [{"step": 1}]
    assert capsys.readouterr().err == ""
    path.write_text('{"step": 1}\n{"ste\n')
    assert read_metrics(path) == [{"step": 1}]
    assert "1 damaged lines are left out" in capsys.readouterr().err


def test_names_that_are_no_sink() -> None:
    assert sink_problems(["tensorboard", OWN]) == []
    assert sink_problems(["tensorbord", "math:pi", "no_such_module:Sink"]) == [
        "training.report_to = tensorbord: must be tensorboard, or module:attribute; the nearest is tensorboard",
        "training.report_to = math:pi: must be a subclass of relora.tracking.tracker.Sink",
        "training.report_to = no_such_module:Sink: cannot be imported (No module named 'no_such_module')",
    ]
    assert set(SINKS) == {"tensorboard"} and __name__ in sys.modules
