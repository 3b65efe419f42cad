"""Frozen weights that are stored on a coarser grid lose nothing of what is merged: runs, resumes, engines."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from relora.checkpoint.master_weights import memory_of
from relora.config import check
from relora.train.train import train
from tests.checkpoint.test_resume import assert_same, stopped
from tests.engines.test_engines import END, HARD, Run, launched
from tests.helpers.tiny import metrics, settings

KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {"lora__base_dtype": "bfloat16"},
    "int8": {"lora__base_dtype": "int8", "lora__master": "disk"},
    "nf4": {"lora__base_dtype": "nf4", "lora__master": "disk"},
    "nf4 carried": {"lora__base_dtype": "nf4", "relora__carry_residual": True},
}


# Every grid under some engine, every engine with some grid. A weight at the border of two codes may fall to either side
# of it for a rounding of 1e-7, and the model then trains beside another one by a step of the grid.
ENGINES = {"ddp": "nf4 carried", "fsdp2": "int8", "zero1": "bfloat16", "zero3": "nf4"}
TOLERANCE = {"bfloat16": 1e-4, "int8": 1e-3, "nf4": 1e-3, "nf4 carried": 1e-3}


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    folder, made = tmp_path_factory.mktemp("grids"), dict[str, Run]()

    def run(kind: str) -> Run:
        if kind not in made:
            tree = settings(corpus, folder / kind.replace(" ", "_"), **HARD, **KINDS[kind])
            train(check(tree))
            made[kind] = Run(tree)
        return made[kind]

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact(kind: str, runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = runs(kind)
    tree = stopped(run.tree, 17, tmp_path / "run")
    train(check(tree))
    assert_same(tree["output_dir"], run.folder, last=END)


@pytest.mark.parametrize("kind", KINDS)
def test_restarts_tell_what_the_live_model_and_its_master_lose(kind: str, runs: Callable[[str], Run]) -> None:
    restarts = [line for line in metrics(runs(kind).folder) if "restart" in line]
    assert len(restarts) == 2
    for line in restarts:
        assert line["master_error"] < 1e-5 < line["merge_error"]
        # The loss of the exact weights is that of the model that was merged; carried factors hold the rest.
        assert line["probe_loss_master"] == pytest.approx(line["probe_loss_before"], abs=0.05)


@pytest.mark.parametrize(("engine", "kind"), ENGINES.items())
def test_engines_train_the_same_model(
    engine: str, kind: str, runs: Callable[[str], Run], corpus: Path, tmp_path: Path
) -> None:
    tree = settings(corpus, tmp_path / engine, **HARD, **KINDS[kind])
    ours, theirs = runs(kind).final(), launched(engine, tree, tmp_path).ended_well().final()
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=TOLERANCE[kind], rtol=0)


def test_a_master_on_disk_leaves_nothing_there(tmp_path: Path) -> None:
    numbers = memory_of(1000, tmp_path / "run")
    numbers.copy_(torch.arange(1000.0))
    assert numbers[-1] == 999
    assert list((tmp_path / "run").iterdir()) == []


def test_a_disk_without_room_is_told_before_anything_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        memory_of(1000, tmp_path)
    assert list(tmp_path.iterdir()) == []
