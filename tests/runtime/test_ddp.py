"""Two gloo processes train the model that one process trains, from a plain `accelerate launch`."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from relora.config import check
from relora.train import train
from tests.processes import run
from tests.tiny import metrics, only


def launch(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch --config_file launch/ddp_cpu.yaml -m relora train`, no environment variable set."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/ddp_cpu.yaml"]
    return run([*launcher, "--main_process_port", "0", "-m", "relora", "train", str(config), *overrides])


def written(tree: dict[str, Any], folder: Path) -> Path:
    path = folder / f"{Path(tree['output_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def pair(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, subprocess.CompletedProcess[str]]:
    """The same run by one process and by two: three restarts, masked documents of very unequal length."""
    from tests.tiny import settings

    folder = tmp_path_factory.mktemp("ddp")
    hard = {"data__document_mask": True, "training__max_steps": 16, "training__per_device_batch_size": 2}
    one, two = settings(corpus, folder / "one", **hard), settings(corpus, folder / "two", **hard)
    train(check(one))
    result = launch(written(two, folder))
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / "one", folder / "two", result


def test_losses_are_equal(pair: tuple[Path, Path, Any]) -> None:
    one, two, _ = pair
    for field in ("loss", "eval_loss", "grad_norm", "probe_loss_after"):
        ours, theirs = only(metrics(one), field), only(metrics(two), field)
        assert ours.keys() == theirs.keys()
        assert [theirs[step] for step in ours] == pytest.approx(list(ours.values()), abs=1e-5), field


def test_weights_are_equal_and_have_moved(pair: tuple[Path, Path, Any]) -> None:
    one, two, _ = pair
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (one, two))
    start = load_file(next((one / "stage_start").glob("*.safetensors")))
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=1e-4, rtol=0)
    for name, weight in start.items():
        assert (ours[name] - weight).abs().max() > 100 * 1e-4, f"{name} has hardly moved: nothing was compared"


def test_the_first_line_says_what_runs(pair: tuple[Path, Path, Any]) -> None:
    first = pair[2].stdout.splitlines()[0]
    assert "engine DDP (gloo), world size 2, device cpu" in first
    assert pair[2].stdout.count("engine DDP") == 1, "only rank 0 talks"


def test_the_restarts_fell_where_they_should(pair: tuple[Path, Path, Any]) -> None:
    assert only(metrics(pair[1]), "restart") == {7: 1, 10: 2, 13: 3}


def test_one_process_goes_on_where_two_stopped(pair: tuple[Path, Path, Any], tmp_path: Path) -> None:
    from tests.runtime.test_resume import stopped

    one, two, _ = pair
    tree = yaml.safe_load(written_config(two))
    train(check(stopped(tree, 8, tmp_path / "resumed")))
    ours, theirs = only(metrics(one), "loss"), only(metrics(tmp_path / "resumed"), "loss")
    assert list(theirs.values()) == pytest.approx(list(ours.values()), abs=1e-5)


def written_config(run: Path) -> str:
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree.pop("derived")
    return yaml.safe_dump(tree)


def test_a_batch_that_does_not_divide_over_the_processes(
    tiny_run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    result = launch(written(tiny_run(), tmp_path), "training.per_device_batch_size=8")
    assert result.returncode != 0
    assert "training.global_batch_size = 8: must be a multiple" in result.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_another_world_size_than_wanted_is_refused(tiny_run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    result = launch(written(tiny_run(), tmp_path), "training.num_processes=4", "training.global_batch_size=16")
    assert result.returncode != 0
    assert "training.num_processes = 4: the launcher started 2" in result.stderr


def test_ranks_that_see_different_checkpoints_do_not_train(tiny_run: Callable[..., dict[str, Any]]) -> None:
    tree = tiny_run()
    train(check(tree))
    shutil.rmtree(Path(tree["output_dir"]) / "checkpoints" / "step-00000012")
    path = written(tree, Path(tree["output_dir"]).parent)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = run([*launcher, "-m", "tests.runtime.other_disk_on_rank_1", str(path)])
    assert result.returncode != 0
    assert "or see different checkpoints; it must be one folder" in result.stderr


def test_nan_on_one_rank_skips_the_update_everywhere() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = run([*launcher, "-m", "tests.runtime.nan_on_rank_1"])
    assert result.stdout.count("rank skipped and unchanged, then updated") == 2, result.stderr[-3000:]
