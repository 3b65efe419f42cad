"""Two gloo processes that do not fit to their settings, or to each other."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from relora.config import check
from relora.train.train import train
from tests.helpers.launch import RELORA, forked_launch, launch_file, written


def test_settings_that_do_not_fit_the_launch_are_refused(
    tiny_run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    config = written(tiny_run(), tmp_path)
    wrong = ("training.per_device_batch_size=8", "training.num_processes=1")
    result = forked_launch(launch_file("ddp_cpu"), RELORA, "train", str(config), *wrong)
    assert result.returncode != 0
    assert "must be a multiple of training.per_device_batch_size x processes = 8 x 2 = 16" in result.stderr
    assert "training.num_processes = 1: the launcher started 2" in result.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_ranks_that_see_different_checkpoints_do_not_train(tiny_run: Callable[..., dict[str, Any]]) -> None:
    tree = tiny_run()
    train(check(tree))
    shutil.rmtree(Path(tree["output_dir"]) / "checkpoints" / "step-00000012")
    path = written(tree, Path(tree["output_dir"]).parent)
    result = forked_launch(launch_file("ddp_cpu"), "tests/helpers/other_disk_on_process_1.py", str(path))
    assert result.returncode != 0
    assert "or see different checkpoints; it must be one folder" in result.stderr
