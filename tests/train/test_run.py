"""One run seen from outside: its metrics, its TensorBoard, its folder, its methods."""

import gc
import json
import math
import os
import shutil
import sys
import weakref
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from relora.checkpoint.run_folder import RunFolder
from relora.cli import main
from relora.config import UserError, check
from relora.engines import TrainState
from relora.train.train import train
from tests.helpers.tiny import MODEL, metrics, only

Settings = Callable[..., dict[str, Any]]


def pinned_rate(t: int, *, T: int, W: int, R: int, q: float, ws: int, every: int | None) -> float:
    """The formula of the design, written down a second time and differently: restart by restart."""

    def base(t: int) -> float:
        if t < W:
            return (t + 1) / W
        return q if t >= T else q + (1 - q) * (1 + math.cos(math.pi * (t - W) / (T - W))) / 2

    starts = [ws] if ws else []
    s = ws + every if every else T
    while s < T:
        starts.append(s)
        s += every or T
    for s in starts:
        if s <= t < s + R:
            return base(s + R) * (t - s + 1) / R
    return base(t)


SHAPES = [
    {"T": 12, "W": 2, "R": 1, "q": 0.1, "ws": 4, "every": 3},
    {"T": 12, "W": 0, "R": 0, "q": 0.0, "ws": 0, "every": 1},
    {"T": 10, "W": 6, "R": 3, "q": 0.5, "ws": 3, "every": 3},
    {"T": 10, "W": 1, "R": 3, "q": 0.1, "ws": 0, "every": 8},
    {"T": 9, "W": 2, "R": 2, "q": 1.0, "ws": 5, "every": None},
    {"T": 8, "W": 7, "R": 2, "q": 0.1, "ws": 7, "every": 2},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_rate_in_the_metrics_is_the_pinned_formula(shape: dict[str, Any], tiny_run: Settings) -> None:
    tree = tiny_run(
        training__max_steps=shape["T"],
        training__save_steps=100,
        schedule={"warmup_steps": shape["W"], "restart_warmup_steps": shape["R"], "min_lr_ratio": shape["q"]},
        relora={"restart_every": shape["every"], "warm_start_steps": shape["ws"]},
        optim={"learning_rate": 2e-3, "warm_start_learning_rate": 5e-4},
    )
    train(check(tree))
    rates = only(metrics(tree["output_dir"]), "learning_rate")
    assert list(rates) == list(range(1, shape["T"] + 1))
    for step, rate in rates.items():
        peak = 5e-4 if step - 1 < shape["ws"] else 2e-3
        assert rate == pytest.approx(peak * pinned_rate(step - 1, **shape), rel=1e-12), step


def test_the_loss_falls_and_restarts_keep_it(run: Path) -> None:
    lines = metrics(run)
    losses = only(lines, "eval_loss")
    assert losses[12] < losses[4] - 0.5 < losses[0] - 1
    restarts = [line for line in lines if "restart" in line]
    assert [line["step"] for line in restarts] == [7, 10]
    for line in restarts:
        assert line["probe_loss_after"] == pytest.approx(line["probe_loss_before"], abs=1e-5)
        assert line["merge_error"] < 1e-4
        assert line["optimizer_zeroed_fraction"] == 1.0
        assert line["merged_layers"] == 14
        assert 1 < line["update_effective_rank"] <= 4


def test_lines_have_the_pinned_fields(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    update = next(line for line in lines if "loss" in line)
    assert list(update) == [
        "step",
        "samples_seen",
        "tokens",
        "loss",
        "learning_rate",
        "grad_norm",
        "skipped",
        "tokens_per_second",
        "step_seconds",
        "peak_memory_bytes",
        "time",
    ]
    assert (update["step"], update["samples_seen"], update["tokens"], update["skipped"]) == (1, 8, 8 * 32, 0)
    assert list(next(line for line in lines if "eval_loss" in line)) == ["step", "eval_loss", "eval_perplexity", "time"]
    assert update["peak_memory_bytes"] > 2**26


def test_tensorboard_shows_the_same(run: Path) -> None:
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    board.Reload()
    tags = board.Tags()
    wanted = {"train/loss", "train/learning_rate", "eval/loss", "eval/perplexity", "restart/merge_error", "probe/loss"}
    assert wanted <= set(tags["scalars"])
    shown = {event.step: event.value for event in board.Scalars("train/loss")}
    assert shown == pytest.approx(only(metrics(run), "loss"), rel=1e-6)
    assert [event.step for event in board.Images("spectrum")] == [7, 10, 12]
    assert any(tag.startswith("sample/0") for tag in tags["tensors"])


def test_the_folder_tells_how_it_stands(run: Path) -> None:
    status = json.loads((run / "status.json").read_text())
    assert {key: status[key] for key in ("status", "step", "reason")} == {
        "status": "finished",
        "step": 12,
        "reason": None,
    }
    assert status["pid"] == os.getpid()
    assert status["host"]
    assert datetime.now(UTC) - datetime.fromisoformat(status["time"]) < timedelta(hours=1)
    assert json.loads((run / "parameters_low_rank.json").read_text())["factors"]["num_tensors"] == 28
    assert (run / "stage_start" / "MANIFEST.json").is_file()


def test_the_written_config_is_the_same_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(run / "config.yaml")]) == 0
    assert "resuming from step 12" in capsys.readouterr().out


def test_nothing_of_the_warm_start_stays_in_memory(tiny_run: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[weakref.ref[Any]] = []
    alive_at_the_end: list[bool] = []
    train_module = sys.modules[train.__module__]  # hidden by the function of the same name
    build, finish = train_module.build, train_module.finish

    def watched_build(*args: Any, **kwargs: Any) -> TrainState:
        live = build(*args, **kwargs)
        built.extend((weakref.ref(live.model), weakref.ref(live.optimizer)))
        if len(built) == 4:
            gc.collect()
            alive_at_the_end.extend(ref() is not None for ref in built[:2])
        return live

    monkeypatch.setattr(train_module, "build", watched_build)
    monkeypatch.setattr(train_module, "finish", finish)
    train(check(tiny_run()))
    assert alive_at_the_end == [False, False]


def test_method_lora_has_a_switch_and_no_restart(tiny_run: Settings) -> None:
    tree = tiny_run(training__method="lora")
    train(check(tree))
    lines = metrics(tree["output_dir"])
    assert not only(lines, "restart")
    assert only(lines, "eval_loss")[12] < only(lines, "eval_loss")[4]
    rates = only(lines, "learning_rate")
    shape = {"T": 12, "W": 2, "R": 1, "q": 0.1, "ws": 4, "every": None}
    assert rates[6] == pytest.approx(1e-2 * pinned_rate(5, **shape))


def test_method_full_is_plain_training(tiny_run: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tiny_run(training__method="full")
    train(check(tree))
    assert "settings of relora and lora are not used" in capsys.readouterr().out
    assert not (Path(tree["output_dir"]) / "stage_start").exists()
    losses = only(metrics(tree["output_dir"]), "eval_loss")
    assert losses[12] < losses[0] - 1


def test_bf16_trains_fp32_parameters(tiny_run: Settings) -> None:
    tree = tiny_run(training__mixed_precision="bf16")
    train(check(tree))
    losses = only(metrics(tree["output_dir"]), "eval_loss")
    assert losses[12] < losses[0] - 1
    from safetensors.torch import load_file

    weights = load_file(Path(tree["output_dir"]) / "final" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_ten_bad_updates_in_a_row_stop_the_run(tiny_run: Settings) -> None:
    # A rate of 1e30 makes the second update overflow, and every one after it.
    tree = tiny_run(optim={"learning_rate": 1e30, "max_grad_norm": None}, training__method="full")
    with pytest.raises(RuntimeError, match="10 in a row"):
        train(check(tree))
    status = json.loads((Path(tree["output_dir"]) / "status.json").read_text())
    assert status["status"] == "failed"
    assert "10 in a row" in status["reason"]


def test_a_second_process_does_not_train_in_the_same_folder(tiny_run: Settings) -> None:
    tree = tiny_run()
    train(check(tree))
    run = Path(tree["output_dir"])
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    with RunFolder(run).locked(), pytest.raises(UserError, match="another process is training"):
        train(check(tree))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_report_draws_every_run(run: Path, tmp_path: Path) -> None:
    assert main(["report", str(run), str(run), "--output", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "overview.png").stat().st_size > 10_000
    assert "<td>run</td>" in (tmp_path / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    "options",
    [{}, {"relora__warm_start_steps": 0, "lora__base_dtype": "bfloat16", "lora__master": "disk"}],
    ids=["default", "masters on disk"],
)
def test_dry_run_writes_nothing(
    options: dict[str, Any], tiny_run: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tiny_run(**options)
    train(check(tree), dry_run=True)
    assert "one forward pass, loss 5." in capsys.readouterr().out
    assert not Path(tree["output_dir"]).exists()


@pytest.mark.skipif(
    shutil.which("g++") is None or " " in torch.__file__,
    reason="torch.compile on a CPU calls g++, and not rightly where torch lies under a path with a space",
)
def test_a_compiled_model_trains_the_same(tiny_run: Settings) -> None:
    losses = []
    for compiled in (False, True):
        tree = tiny_run(
            f"compiled_{compiled}",
            model={"config": MODEL | {"num_hidden_layers": 1}, "torch_compile": compiled},
            relora={"restart_every": 2, "warm_start_steps": 2},
            training__max_steps=5,
        )
        train(check(tree))
        losses.append(only(metrics(tree["output_dir"]), "loss"))
    assert list(losses[1].values()) == pytest.approx(list(losses[0].values()), abs=1e-5)


@pytest.mark.parametrize("options", [{"model__gradient_checkpointing": True}, {"data__num_workers": 2}], ids=str)
def test_how_it_is_computed_does_not_change_the_result(options: dict[str, Any], run: Path, tiny_run: Settings) -> None:
    tree = tiny_run(**options)
    train(check(tree))
    ours, theirs = only(metrics(tree["output_dir"]), "loss"), only(metrics(run), "loss")
    assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=1e-5)
