"""Saves in the background: training goes on, the bytes are the same, and a disk that fails costs no run."""

import errno
import gc
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relora.checkpoint.folder_writer import FolderWriter
from relora.checkpoint.format import History
from relora.checkpoint.load import complete_checkpoints, open_checkpoint
from relora.checkpoint.run_folder import RunFolder
from relora.checkpoint.save import MAX_FAILED_IN_A_ROW, Checkpoints
from relora.checkpoint.verify import checkpoint_problems
from relora.engines import TrainState
from relora.errors import Failed
from relora.files import sha256_of
from relora.method.store import TorchStore
from relora.train.train import train
from tests.helpers.full_disk import no_file_over
from tests.helpers.tiny import config, metrics

ABOUT = {"fingerprint": "", "data": ""}
WAIT_S = 30


@dataclass
class SlowDisk:
    """A model of one frozen and one trained layer, and checkpoints whose frozen weights are read when `go` is set."""

    folder: Path
    go: threading.Event = field(default_factory=threading.Event)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
        self.model[0].requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model[1].parameters(), lr=0.1)
        self.checkpoints = Checkpoints(
            self.folder, limit=None, writes=True, in_background=True, warn=self.warnings.append
        )

    def update(self) -> Tensor:
        self.model(torch.ones(1, 3)).sum().backward()
        self.optimizer.step()
        return self.model[1].weight.detach().clone()

    def save(self, step: int) -> None:
        go = self.go

        class SlowStore(TorchStore):
            def read(self, parameter: nn.Parameter) -> Tensor:
                assert parameter.requires_grad or go.wait(WAIT_S), "nobody let the disk go on"
                return super().read(parameter)

        engine: Any = SimpleNamespace(
            store=SlowStore(), world=SimpleNamespace(sum=list), num_states=1, trained_entries=list, extra_state=dict
        )
        state: Any = TrainState(self.model, self.model, self.optimizer)
        self.checkpoints.save(state, engine, step, history=History(), stage="low_rank", cycle=step, about=ABOUT)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[SlowDisk]:
    disk = SlowDisk(tmp_path)
    with closing(disk.checkpoints):
        yield disk
        disk.go.set()


def test_training_goes_on_while_a_disk_is_slow_and_changes_nothing_of_what_is_saved(slow: SlowDisk) -> None:
    weight = slow.update()
    moments = slow.optimizer.state[slow.model[1].weight]["exp_avg"].clone()
    slow.save(1)
    assert not complete_checkpoints(slow.folder)
    assert not torch.allclose(slow.update(), weight, atol=0.01)
    slow.go.set()
    assert slow.checkpoints.wait()
    state = open_checkpoint(slow.folder / "step-00000001")
    assert torch.equal(state.weights.take("1.weight"), weight)
    assert torch.equal(state.moments["1.weight"]["exp_avg"], moments)
    assert state.steps == {"1.weight": 1}


def test_one_save_is_in_flight_at_most(slow: SlowDisk) -> None:
    slow.update()
    slow.save(1)
    threading.Timer(0.5, slow.go.set).start()
    slow.save(2)  # waits for the first
    assert (slow.folder / "step-00000001").is_dir()
    assert slow.checkpoints.wait()
    assert (slow.folder / "step-00000002").is_dir()


def test_a_full_disk_costs_checkpoints_and_the_third_in_a_row_ends_the_run(slow: SlowDisk) -> None:
    slow.go.set()
    slow.update()
    with no_file_over(64):
        for step in range(1, MAX_FAILED_IN_A_ROW):
            slow.save(step)
            assert not slow.checkpoints.wait()
        slow.save(MAX_FAILED_IN_A_ROW)
        with pytest.raises(Failed, match=r"step 3 .*File too large \(disk /.*MiB free\); that is 3 in a row"):
            slow.checkpoints.wait()
    assert [warning.partition(" could")[0] for warning in slow.warnings] == [
        "the checkpoint of step 1",
        "the checkpoint of step 2",
    ]
    assert list(slow.folder.iterdir()) == []


def test_a_save_that_finds_no_room_says_what_it_needs_and_the_count_begins_anew_after_a_success(
    slow: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow.go.set()
    slow.update()
    for step in range(1, 2 * MAX_FAILED_IN_A_ROW):
        with monkeypatch.context() as full:
            if step % MAX_FAILED_IN_A_ROW:
                full.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=127))
            slow.save(step)
            assert slow.checkpoints.wait() == (step % MAX_FAILED_IN_A_ROW == 0)
    # 12 + 8 weights and 2 * 8 moments of 4 bytes: 144
    assert all("No space left on device, 0 MiB are needed" in warning for warning in slow.warnings)
    assert [path.name for path in slow.folder.iterdir()] == ["step-00000003"]


def test_an_old_checkpoint_that_stays_is_no_new_one_that_failed(
    slow: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow.go.set()
    slow.update()
    slow.checkpoints.limit = 1

    def failing(path: Path) -> None:
        if path.exists() and path.name == ".tmp-step-00000001":
            raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("relora.checkpoint.save.remove", failing)
    for step in (1, 2):
        slow.save(step)
        assert slow.checkpoints.wait()
    [warning] = slow.warnings
    assert warning == (
        "after the checkpoint of step 2 an older one could not be removed: "
        f"{slow.folder / '.tmp-step-00000001'}: Input/output error"
    )
    assert checkpoint_problems(slow.folder / "step-00000002") == []


def hashes(run: Path) -> dict[str, Any]:
    """By file the hash; of a manifest all but what it says of the metrics, among which are timings."""
    found: dict[str, Any] = {}
    for path in (path for path in sorted((run / "checkpoints").rglob("*.*")) if path.is_file()):
        name = str(path.relative_to(run))
        found[name] = sha256_of(path)
        if path.name == "MANIFEST.json":
            found[name] = json.loads(path.read_text())
            del found[name]["metrics"], found[name]["sha256"]
    return found


def test_a_run_that_saves_in_the_background_writes_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    runs = {True: tmp_path / "background", False: tmp_path / "within"}
    for in_background, run in runs.items():
        train(config(corpus, run, training__async_save=in_background, training__save_steps=2))
    assert hashes(runs[True]) == hashes(runs[False])
    assert len(complete_checkpoints(RunFolder(runs[True]).checkpoints)) == 6


def test_a_restart_waits_for_the_save_that_reads_the_weights_which_it_changes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Restarts at 7 and 10. The save of step 6 is the first of its cycle: it writes the frozen weights.
    settings = {"training__save_steps": 6, "training__max_steps": 9}
    train(config(corpus, tmp_path / "within", training__async_save=False, **settings))
    reserve = FolderWriter.reserve

    def slowly(writer: FolderWriter, num_bytes: int) -> None:
        time.sleep(1)  # far longer than an update
        reserve(writer, num_bytes)

    monkeypatch.setattr(FolderWriter, "reserve", slowly)
    train(config(corpus, tmp_path / "background", **settings))
    assert hashes(tmp_path / "background") == hashes(tmp_path / "within")


def test_the_last_save_reads_the_exact_masters_though_training_has_ended_meanwhile(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The save of the last step is the first of its cycle: it writes the frozen weights.
    settings = {"training__save_steps": 9, "training__max_steps": 9, "lora__base_dtype": "bfloat16"}
    train(config(corpus, tmp_path / "within", training__async_save=False, **settings))
    reserve = FolderWriter.reserve

    def slowly(writer: FolderWriter, num_bytes: int) -> None:
        time.sleep(1)  # training ends
        gc.collect()
        reserve(writer, num_bytes)

    monkeypatch.setattr(FolderWriter, "reserve", slowly)
    train(config(corpus, tmp_path / "background", **settings))
    assert hashes(tmp_path / "background") == hashes(tmp_path / "within")


def test_a_run_trains_through_a_full_disk_and_says_at_the_end_that_its_last_checkpoint_is_missing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(corpus, tmp_path / "run", training__save_steps=5)
    usage = shutil.disk_usage

    def full_from_step_10_on(path: Any) -> Any:
        return SimpleNamespace(free=0) if (tmp_path / "run/checkpoints/step-00000005").exists() else usage(path)

    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", full_from_step_10_on)
        with pytest.raises(Failed, match=r"the checkpoint of step 12 could not be written; .* resumes from step 5"):
            train(settings)
    assert "the checkpoint of step 10 could not be written" in capsys.readouterr().out
    [checkpoint] = complete_checkpoints(tmp_path / "run/checkpoints")
    assert checkpoint_problems(checkpoint) == []
    train(settings)
    train(config(corpus, tmp_path / "through", training__save_steps=5))
    assert hashes(tmp_path / "run") == hashes(tmp_path / "through")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "through")
