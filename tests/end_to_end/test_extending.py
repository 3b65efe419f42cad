"""The examples of docs/extending.md: each trains, restarts, and resumes to the same weights as without a stop."""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from relora.config import check
from relora.errors import UserError
from relora.files import sha256_of
from relora.train.train import train
from tests.helpers.launch import accelerate, written
from tests.helpers.programs import ROOT
from tests.helpers.tiny import all_metrics, metrics, only, settings, stopped

PAGE = ROOT / "docs" / "extending.md"
STOP_STEP = 8  # after the restart at 7, before the one at 10
LAST_STEP = 12

Trained = Callable[[str | None], dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """One section of the page."""

    file: str
    code: str
    keys: dict[str, dict[str, Any]]


def examples() -> dict[str, Example]:
    """The sections of the page by title: one python block, whose first line names its file, and one yaml block."""
    found = {}
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        [code] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        [keys] = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
        path = re.match(r"# (my_project/\w+\.py)\n", code)
        assert path is not None, section.splitlines()[0]
        found[section.splitlines()[0]] = Example(path[1], code, yaml.safe_load(keys))
    return found


EXAMPLES = examples()
# The engine needs two processes and has a test of its own. A sink changes nothing of the training.
IN_ONE_PROCESS = [title for title in EXAMPLES if title != "An engine"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with my_project in it, on the path."""
    folder = tmp_path_factory.mktemp("project")
    for example in EXAMPLES.values():
        path = folder / example.file
        path.parent.mkdir(exist_ok=True)
        path.write_text(example.code, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_project"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def trained(
    corpus: Path,
    project: Path,  # noqa: ARG001 (the examples must be importable)
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    """Settings of a finished tiny run by the title of its example, None for a run without any; each trains once."""

    @cache
    def run_of(title: str | None) -> dict[str, Any]:
        tree = settings_with(title, corpus, tmp_path_factory.mktemp("example") / "run")
        train(check(tree))
        return tree

    return run_of


def settings_with(title: str | None, corpus: Path, run: Path) -> dict[str, Any]:
    """The settings of the tiny run and, over them, the keys of the example."""
    tree = settings(corpus, run)
    for section, keys in EXAMPLES[title].keys.items() if title is not None else ():
        tree[section] |= keys
    return tree


def hashes(run: Path) -> dict[str, str]:
    """Of all tensors of the newest checkpoint and the final model."""
    folders = (run / "final", run / "checkpoints" / f"step-{LAST_STEP:08d}")
    return {str(file.relative_to(run)): sha256_of(file) for folder in folders for file in folder.glob("*.safetensors")}


def test_the_page_has_an_example_of_each_kind() -> None:
    trees = [example.keys for example in EXAMPLES.values()]
    keys = {f"{section}.{key}" for tree in trees for section, values in tree.items() for key in values}
    kinds = ("optim.name", "relora.reinit", "relora.optimizer_reset")
    more = ("training.report_to", "data.sources", "training.task", "training.engine")
    assert {*kinds, *more} <= keys
    assert len(EXAMPLES) == len({*kinds, *more})


@pytest.mark.parametrize("title", IN_ONE_PROCESS)
def test_an_example_trains_restarts_and_resumes(title: str, trained: Trained, tmp_path: Path) -> None:
    tree, resumed = trained(title), tmp_path / "resumed"
    lines = metrics(tree["output_dir"])
    assert list(only(lines, "restart")) == [7, 10]
    losses = only(lines, "loss")
    assert list(losses) == list(range(1, LAST_STEP + 1))
    # The example is in effect: without it the run trains otherwise, unless the example only watches.
    plain_losses = only(metrics(trained(None)["output_dir"]), "loss")
    assert (losses == plain_losses) == (title == "A metric sink")

    train(check(stopped(tree, STOP_STEP, resumed)))
    assert metrics(resumed) == lines
    assert len(hashes(resumed)) >= 2
    assert hashes(resumed) == hashes(Path(tree["output_dir"]))


def test_the_optimizer_learns_and_a_restart_clears_its_state(trained: Trained) -> None:
    lines = metrics(trained("An optimizer")["output_dir"])
    losses = only(lines, "eval_loss")
    assert losses[LAST_STEP] < losses[0] - 0.05
    assert set(only(lines, "optimizer_zeroed_fraction").values()) == {1.0}


def test_the_reinit_with_factors_that_are_not_zero_preserves_the_function(trained: Trained) -> None:
    lines = metrics(trained("A reinit policy")["output_dir"])
    before, after = only(lines, "probe_loss_before"), only(lines, "probe_loss_after")
    assert list(before) == [7, 10]
    assert all(abs(before[step] - after[step]) < 1e-4 for step in before)


def test_the_reset_clears_the_fraction_that_the_settings_ask_for(trained: Trained) -> None:
    tree = trained("A reset policy")
    # At least prune_ratio: a moment may have had zeros before.
    for fraction in only(metrics(tree["output_dir"]), "optimizer_zeroed_fraction").values():
        assert tree["relora"]["prune_ratio"] <= fraction < 1


def test_the_sink_has_each_loss_once_after_a_resume(trained: Trained, tmp_path: Path) -> None:
    tree = trained("A metric sink")
    csv_file = Path(tree["output_dir"]) / "loss.csv"
    losses = only(metrics(tree["output_dir"]), "loss")
    assert csv_file.read_text().splitlines() == [f"{step},{loss}" for step, loss in losses.items()]
    train(check(stopped(tree, STOP_STEP, tmp_path / "resumed")))
    assert (tmp_path / "resumed" / "loss.csv").read_text() == csv_file.read_text()


@pytest.mark.usefixtures("project")
def test_the_source_reports_its_own_mistakes(corpus: Path, tmp_path: Path) -> None:
    tree = settings_with("A kind of data source", corpus, tmp_path / "run")
    tree["data"]["sources"] = [tree["data"]["sources"][0] | {"name": "many"}]
    with pytest.raises(UserError, match="name = many: must be the number of documents"):
        train(check(tree))


@pytest.mark.usefixtures("project")
def test_the_engine_halves_the_gradients_that_travel(corpus: Path, tmp_path: Path) -> None:
    accelerate("ddp_cpu", written(settings(corpus, tmp_path / "ddp"), tmp_path))
    accelerate("ddp_cpu", written(settings_with("An engine", corpus, tmp_path / "fp16"), tmp_path))
    sent = {name: bytes_sent_in_an_update(tmp_path / name) for name in ("ddp", "fp16")}
    assert 0.45 * sent["ddp"] < sent["fp16"] < 0.55 * sent["ddp"]
    losses = {name: only(metrics(tmp_path / name), "loss") for name in ("ddp", "fp16")}
    assert losses["fp16"] != losses["ddp"]
    assert losses["fp16"][LAST_STEP] == pytest.approx(losses["ddp"][LAST_STEP], abs=0.05)


def bytes_sent_in_an_update(run: Path) -> int:
    """Of the last update, a low-rank one."""
    return int(only([line for line in all_metrics(run) if "loss" in line], "bytes_sent")[LAST_STEP])
