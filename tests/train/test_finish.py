"""The end of a run: `final/` comes whole whatever stands in its place, and the summary tells what was measured."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relora.checkpoint.format import HASH
from relora.config import check
from relora.errors import Failed
from relora.train.train import train
from tests.helpers.tiny import settings_of


@pytest.fixture
def trained(run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that lacks its final model: it was lost, or not yet written."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    return tmp_path / "run"


def start(run: Path) -> None:
    train(check(settings_of(run) | {"output_dir": str(run)}))


def assert_is_whole(run: Path, as_in: Path) -> None:
    assert not (run / "final").is_symlink()
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (run, as_in))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert [path.name for path in run.glob(".tmp-*")] == []


def link_to_a_folder(run: Path, name: str) -> None:
    (run.parent / "elsewhere").mkdir()
    (run.parent / "elsewhere" / "mine").write_text("mine")
    (run / name).symlink_to(run.parent / "elsewhere")


def link_to_nothing(run: Path, name: str) -> None:
    (run / name).symlink_to(run.parent / "nowhere")


def a_file(run: Path, name: str) -> None:
    (run / name).write_text("a file")


@pytest.mark.parametrize("obstacle", [link_to_a_folder, link_to_nothing, a_file])
def test_what_stands_in_the_place_of_the_final_model_is_replaced(
    obstacle: Callable[[Path, str], None], run: Path, trained: Path
) -> None:
    for name in ("final", ".tmp-final"):
        obstacle(trained, name)
        start(trained)
        assert_is_whole(trained, run)
        if (elsewhere := trained.parent / "elsewhere").exists():  # nothing was written or removed through the link
            assert [path.name for path in elsewhere.iterdir()] == ["mine"]
            shutil.rmtree(elsewhere)
        shutil.rmtree(trained / "final")


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond `num_bytes`: to write more fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_refuses_leaves_what_was_there_and_the_next_start_goes_on(run: Path, trained: Path) -> None:
    (trained / "final").mkdir()
    (trained / "final" / "of_an_earlier_step").write_text("still here")
    with largest_file(100_000), pytest.raises(Failed, match=r"final: the model could not be written .* MB are free"):
        start(trained)
    status = json.loads((trained / "status.json").read_text())
    assert status["status"] == "failed" and "could not be written" in status["reason"]
    assert [path.name for path in (trained / "final").iterdir()] == ["of_an_earlier_step"]
    assert list(trained.glob(".tmp-*")) == []
    start(trained)
    assert_is_whole(trained, run)


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?")])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_final_model_with_a_lost_or_changed_file_is_written_again(
    name: str, harm: Callable[[Path], object], run: Path, trained: Path
) -> None:
    shutil.copytree(run / "final", trained / "final")
    (trained / "final" / "README.md").write_text("edited")
    start(trained)
    assert (trained / "final" / "README.md").read_text() == "edited", "it was whole"
    harm(trained / "final" / name)
    start(trained)
    assert_is_whole(trained, run)
    assert (trained / "final" / name).read_bytes() == (run / "final" / name).read_bytes()


def results(run: Path) -> dict[str, Any]:
    content = json.loads((run / "final" / "relora.json").read_text())
    return {key: value for key, value in content.items() if key != HASH}


def edit(metrics: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    lines = [change(json.loads(line)) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines if line))


def without_key(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "probe_loss_after"}


# What is lost, how, the results that are not known then, and the words for it.
LOSSES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any] | None], set[str], str]] = {
    "last evaluation": (
        lambda line: None if "eval_loss" in line and line["step"] == 12 else line,
        {"eval_loss"},
        "the held-out loss at step 12",
    ),
    "switch": (
        lambda line: None if "eval_loss" in line and line["step"] == 4 else line,
        {"eval_loss_at_switch"},
        "the held-out loss at step 4",
    ),
    "restart": (
        lambda line: None if line.get("restart") == 2 else line,
        {"merge_error", "restart_jump", "rise_after_restart"},
        "the lines of 1 of 2 are lost",
    ),
    "field": (without_key, {"merge_error", "restart_jump", "rise_after_restart"}, "the lines of 2 of 2 are lost"),
    "probe": (
        lambda line: None if "probe_loss" in line and line["step"] == 8 else line,
        {"rise_after_restart"},
        "1 of 2 probes are missing",
    ),
    "all": (
        lambda _: None,
        {"eval_loss", "eval_loss_at_switch", "merge_error", "restart_jump", "rise_after_restart"},
        "the held-out loss at step 12",
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_line_of_metrics_costs_what_it_told_and_nothing_else(
    loss: str, run: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, unknown, words = LOSSES[loss]
    edit(trained / "metrics.jsonl", change)
    start(trained)
    assert_is_whole(trained, run)
    found, whole = results(trained), results(run)
    assert whole.keys() - found.keys() == unknown
    assert {key: found[key] for key in whole.keys() - unknown} == {key: whole[key] for key in whole.keys() - unknown}
    assert any(words in phrase for phrase in found["not_measured"])
    printed = capsys.readouterr().out
    assert words in printed
    assert ("held-out loss" in printed.partition("not known")[0]) == ("eval_loss" not in unknown)
    card = (trained / "final" / "README.md").read_text()
    assert not any(f"| {name} |" in card for name in unknown)


def test_a_rise_that_no_probe_has_measured_is_not_reported(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = settings_of(trained) | {"output_dir": str(trained)}
    edit(trained / "metrics.jsonl", lambda line: None if "probe_loss" in line else line)
    train(check(tree | {"training": tree["training"] | {"probe_steps": 0}}))
    found = results(trained)
    assert found["restarts"] == 2 and found["restart_jump"] < 1e-4
    assert "rise_after_restart" not in found and "not_measured" not in found
    assert "rose by" not in capsys.readouterr().out
