"""What ends a run beside signals: the file STOP, the time limit, a watchdog, a launcher that is gone; its status."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.forks import Forked, forked
from relora.checkpoint.run_folder import RunFolder
from relora.cli import main
from relora.commands.status import SILENT_S, duration, seconds_per_update, standing_of
from relora.config import check
from relora.errors import Stopped
from relora.train.callbacks import Callbacks
from relora.train.loop import Loop
from relora.train.train import train
from tests.helpers.tiny import all_metrics, metrics

Settings = Callable[..., dict[str, Any]]
SLOW_S = 0.3


def slow_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates that take as long as those of a larger model."""
    update = Loop.update

    def slowly(*arguments: Any) -> Any:
        time.sleep(SLOW_S)
        return update(*arguments)

    monkeypatch.setattr(Loop, "update", slowly)


def told(tree: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads((Path(tree["output_dir"]) / "status.json").read_text()))


def test_the_file_stop_is_obeyed_and_removed(tiny_run: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_updates(monkeypatch)
    tree = tiny_run(training__max_steps=200, training__save_steps=1000)
    place = Path(tree["output_dir"]) / "STOP"
    place.parent.mkdir(parents=True)
    place.touch()
    with pytest.raises(Stopped, match=rf"found {place}: ended after update (\d+); resumes from step \1"):
        train(check(tree))
    assert not place.exists()
    assert told(tree)["status"] == "preempted"


def test_a_time_limit_leaves_time_for_the_checkpoint(tiny_run: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_updates(monkeypatch)
    # 20 s are kept for a first checkpoint.
    limits = {"training__max_hours": (20 + 3) / 3600, "training__save_steps": 1000, "training__max_steps": 200}
    tree, began_s = tiny_run(**limits), time.monotonic()
    with pytest.raises(Stopped, match=r"training.max_hours = 0.00\d+ is reached: ended after update"):
        train(check(tree))
    assert time.monotonic() - began_s < 15
    assert told(tree)["step"] > 0


def hang(monkeypatch: pytest.MonkeyPatch) -> None:
    def hung(*_: Any) -> None:
        threading.Event().wait()

    monkeypatch.setattr(Loop, "update", hung)


def test_a_run_in_which_nothing_moves_ends_with_its_stacks(
    tiny_run: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang(monkeypatch)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", str(tmp_path / "flight_record_"))
    tree = tiny_run(training__timeout_minutes=2 / 60)
    with forked(lambda: train(check(tree))) as run:
        code, said = run.end()
    assert code == 1
    reason = "nothing has moved for 0.0333333 minutes (training.timeout_minutes)"
    assert f"relora: {reason}\n" in said
    assert "in hung" in said, "the stack of the main thread"
    assert {key: told(tree)[key] for key in ("status", "reason")} == {"status": "failed", "reason": reason}
    assert json.loads((tmp_path / "error.json").read_text())["message"] == f"relora: {reason}"
    assert (tmp_path / "flight_record_0").exists()


def test_a_long_evaluation_that_moves_is_no_hang(tiny_run: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = Callbacks.give_up_if_asked

    def slowly(callbacks: Callbacks) -> None:
        time.sleep(0.02)  # after each batch and each token: more than two seconds in all
        given_up(callbacks)

    monkeypatch.setattr(Callbacks, "give_up_if_asked", slowly)
    limits = {"training__timeout_minutes": 1 / 60, "training__max_steps": 1, "training__per_device_eval_batch_size": 1}
    tree = tiny_run(
        **limits,
        training__report_to=[],
        relora={"restart_every": None},
        schedule={"warmup_steps": 0, "restart_warmup_steps": 0},
    )
    with forked(lambda: train(check(tree))) as run:
        code, said = run.end()
    assert code == 0, said
    assert told(tree)["status"] == "finished"


def waiting_run(tree: dict[str, Any]) -> Forked:
    """A forked run that has come to its second line of metrics."""
    run = forked(lambda: train(check(tree)))
    lines = Path(tree["output_dir"]) / "metrics.jsonl"
    run.wait_until(lambda: lines.exists() and len(lines.read_text().splitlines()) > 2)
    return run


def test_a_run_that_was_killed_is_said_to_be_gone(
    tiny_run: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow_updates(monkeypatch)
    tree = tiny_run(training__max_steps=200, training__save_steps=2)
    with waiting_run(tree) as run:
        living = standing_of(Path(tree["output_dir"]))
        run.send(signal.SIGKILL)
        run.end()
    assert (living.status, living.alive, living.pid, living.max_steps) == ("running", True, run.pid, 200)
    assert living.eta_seconds is not None
    assert SLOW_S * 150 < living.eta_seconds < 10 * SLOW_S * 200
    gone = standing_of(Path(tree["output_dir"]))
    assert (gone.status, gone.alive) == ("lost", False)
    assert main(["status", tree["output_dir"]]) == 0
    said = capsys.readouterr().out
    assert f"not running: pid {run.pid} on {gone.host} is gone" in said
    assert f"resume with  relora train {tree['output_dir']}/config.yaml" in said
    assert main(["status", tree["output_dir"], "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["status"], shown["checkpoint_step"]) == ("lost", gone.checkpoint_step)


def test_on_another_host_the_heartbeat_tells(tiny_run: Settings) -> None:
    folder = RunFolder(Path(tiny_run()["output_dir"]))
    folder.path.mkdir(parents=True)
    folder.config.write_text("training: {max_steps: 12}\n")
    folder.write_status("running", step=3)
    assert standing_of(folder.path).alive is True
    here = json.loads(folder.status.read_text())
    for host, pid, age_s, alive in (
        ("elsewhere", 1, 1.0, True),
        ("elsewhere", 1, SILENT_S + 5, False),
        (here["host"], os.getpid(), SILENT_S + 5, None),
        (here["host"], 2**22 + 1, 1.0, False),
    ):
        folder.status.write_text(json.dumps(here | {"host": host, "pid": pid}))
        os.utime(folder.status, (time.time() - age_s,) * 2)
        assert standing_of(folder.path).alive is alive, (host, pid, age_s)


def test_status_says_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert f"relora: {tmp_path}: is not a run folder" in capsys.readouterr().err


def test_a_living_run_shows_it_while_nothing_else_is_written(
    tiny_run: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["relora.train.watch"], "BEAT_S", 0.5)
    hang(monkeypatch)
    tree = tiny_run()
    path = Path(tree["output_dir"]) / "status.json"
    with forked(lambda: train(check(tree))) as run:
        run.wait_until(path.exists)
        first_s, content = path.stat().st_mtime, path.read_bytes()
        run.wait_until(lambda: path.stat().st_mtime > first_s + 1)
        assert path.read_bytes() == content
        run.send(signal.SIGKILL)


def test_lines_of_metrics_have_the_time(run: Path) -> None:
    lines = all_metrics(run)
    assert all(list(line)[-1] == "time" for line in lines)
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    assert lines[0]["time"].endswith("+00:00")
    assert "time" not in metrics(run)[0], "no resumed run has the times of one that was never stopped"


def test_a_pause_between_two_runs_is_no_pace() -> None:
    clock = ["10:00:00", "10:00:02", "10:00:04", "13:00:00", "13:00:02"]
    lines = [{"step": 10 * n, "time": f"2026-01-01T{at}.000+00:00"} for n, at in enumerate(clock)]
    assert seconds_per_update(lines) == pytest.approx(0.2)
    assert seconds_per_update(lines[:1]) is None
    assert [duration(s) for s in (59, 1800, 7260, 300_000)] == ["59 s", "30 min", "2 h 1 min", "3.5 days"]
