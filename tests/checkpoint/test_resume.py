"""A run that was stopped and resumed equals one that never was, to the bit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relora.checkpoint.load import open_checkpoint
from relora.config import UserError, check
from relora.files import sha256_of
from relora.model.tasks import CausalLM
from relora.train.preflight import preflight
from relora.train.train import train
from tests.helpers.tiny import metrics, only, settings, stopped

HARD = {"lora__lora_dropout": 0.1, "training__per_device_batch_size": 2, "data__document_mask": True}


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run without a stop, with dropout, accumulation and masked documents; a checkpoint at every step."""
    tree = settings(corpus, tmp_path_factory.mktemp("whole") / "run", **HARD)
    train(check(tree))
    return tree


def assert_same(run: Path | str, reference: Path | str, *, last: int = 12) -> None:
    assert metrics(run) == metrics(reference)
    for name in ("final", f"checkpoints/step-{last:08d}"):
        files = sorted((Path(reference) / name).glob("*.safetensors"))
        assert files
        for file in files:
            assert sha256_of(Path(run) / name / file.name) == sha256_of(file), file.name


@pytest.mark.parametrize("step", [1, 3, 4, 5, 7, 8, 10, 11])
def test_resume_at_any_step(whole: dict[str, Any], step: int, tmp_path: Path) -> None:
    # 4 is the switch, 7 and 10 are restarts, the second epoch begins before 8.
    tree = stopped(whole, step, tmp_path / "run")
    train(check(tree))
    assert_same(tree["output_dir"], whole["output_dir"])


@pytest.fixture(scope="module")
def offset(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run whose factors begin with B != 0, and have an optimizer and a rate of their own."""
    relora = {"restart_every": 3, "warm_start_steps": 4, "reinit": "offset", "offset_norm": 5.0}
    optim = {"learning_rate": 1e-2, "factors": "product", "factors_learning_rate": 0.1}
    tree = settings(corpus, tmp_path_factory.mktemp("offset") / "run", relora=relora, optim=optim)
    train(check(tree))
    return tree


@pytest.mark.parametrize("step", [4, 6, 7])
def test_resume_of_factors_that_begin_with_b(offset: dict[str, Any], step: int, tmp_path: Path) -> None:
    tree = stopped(offset, step, tmp_path / "run")
    train(check(tree))
    assert_same(tree["output_dir"], offset["output_dir"])


def test_an_offset_is_there_from_the_switch_on_and_leaves_the_function_alone(offset: dict[str, Any]) -> None:
    folder, layer = Path(offset["output_dir"]), "model.layers.1.mlp.down_proj"
    for step in (4, 7):
        weights = open_checkpoint(folder / "checkpoints" / f"step-{step:08d}").weights
        A, B = (weights.take(f"{layer}.{factor}").double() for factor in ("lora_A", "lora_B"))
        largest = torch.linalg.matrix_norm(6 / 4 * B @ A, 2).item()
        assert largest == pytest.approx(5.0 * 0.1, rel=1e-5)  # offset_norm peak rates of the factors
    lines = metrics(folder)
    before, after = only(lines, "probe_loss_before"), only(lines, "probe_loss_after")
    assert before.keys() == {7, 10}
    assert after == pytest.approx(before, abs=1e-5)
    state = open_checkpoint(folder / "checkpoints" / "step-00000012")
    slots = {name: sorted(of) for name, of in state.moments.items()}
    assert {name for name, of in slots.items() if of == ["momentum_buffer"]} == {
        name for name in slots if "lora" in name
    }
    assert only(lines, "eval_loss")[12] < only(lines, "eval_loss")[4] - 0.1


def test_resume_twice(whole: dict[str, Any], tmp_path: Path) -> None:
    tree = stopped(whole, 2, tmp_path / "first")
    train(check(tree))
    again = stopped(tree, 9, tmp_path / "second")
    train(check(again))
    assert_same(again["output_dir"], whole["output_dir"])


def test_the_run_passes_through_every_epoch(whole: dict[str, Any]) -> None:
    job = preflight(check(whole))
    rows = sum(stream.num_rows for stream in job.data.streams("train", 32))
    assert rows < 8 * 8, "the second epoch must begin before step 8, from which the tests above resume"


def test_moments_and_steps_are_in_the_checkpoint(whole: dict[str, Any]) -> None:
    # A resume that lost the optimizer would still run; here it would change the last update.
    files = sorted(Path(whole["output_dir"], "checkpoints", "step-00000012").glob("moments-*.safetensors"))
    tensors = load_file(files[0])
    assert any(name.endswith("lora_A:exp_avg_sq") for name in tensors)
    assert all(tensor.abs().sum() > 0 for name, tensor in tensors.items() if "lora" in name)


def test_a_finished_run_is_left_alone(whole: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole["output_dir"], folder)
    before = {file: file.stat().st_mtime_ns for file in (folder / "final").iterdir()}
    train(check(whole | {"output_dir": str(folder)}))
    assert {file: file.stat().st_mtime_ns for file in (folder / "final").iterdir()} == before
    assert metrics(folder) == metrics(whole["output_dir"])


def test_extend(tiny_run: Callable[..., dict[str, Any]]) -> None:
    tree = tiny_run()
    train(check(tree))
    longer = check(tree | {"training": tree["training"] | {"max_steps": 14}})
    with pytest.raises(UserError, match=r"training\.max_steps is 12 there and 14 here; --extend"):
        train(longer)
    train(longer, extend=True)
    lines = metrics(tree["output_dir"])
    assert max(line["step"] for line in lines) == 14
    assert (Path(tree["output_dir"]) / "final" / "config.json").is_file()


def test_extend_makes_the_restart_of_the_old_end(tiny_run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    # At step 13, the old end, no restart was due; in the longer run one is, and the rate re-warms after it.
    tree = tiny_run(training__max_steps=13)
    train(check(tree))
    assert only(metrics(tree["output_dir"]), "restart") == {7: 1, 10: 2}
    longer = tree | {"training": tree["training"] | {"max_steps": 18}}
    train(check(longer), extend=True)
    assert only(metrics(tree["output_dir"]), "restart") == {7: 1, 10: 2, 13: 3, 16: 4}

    # Killed after that restart and before the next checkpoint: it is made again, and told once.
    again = stopped(longer, 13, tmp_path / "again")
    train(check(again))
    assert_same(again["output_dir"], tree["output_dir"], last=18)


def test_a_skipped_batch_is_skipped_again(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned = CausalLM.loss
    bad_ids = preflight(check(whole)).data.samples(check(whole).data, 0)[20]["input_ids"]

    def loss(task: CausalLM, model: Any, batch: Any) -> Any:
        summed = poisoned(task, model, batch)
        return summed * float("nan") if model.training and (batch["input_ids"] == bad_ids).all(1).any() else summed

    monkeypatch.setattr(CausalLM, "loss", loss)
    tree = whole | {"output_dir": str(tmp_path / "skipping")}
    train(check(tree))
    lines = {line["step"]: line for line in metrics(tree["output_dir"]) if "loss" in line}
    assert lines[2]["skipped"] == 0
    assert 3 not in lines, "the third batch was skipped"
    assert lines[4]["skipped"] == 1
    again = stopped(tree, 2, tmp_path / "again")
    train(check(again))
    assert_same(again["output_dir"], tree["output_dir"])


def test_what_may_change_between_resumes(whole: dict[str, Any], tmp_path: Path) -> None:
    tree = stopped(whole, 8, tmp_path / "run")
    changed = {"per_device_batch_size": 8, "save_steps": 5, "eval_steps": 2, "logging_steps": 4}
    train(check(tree | {"training": tree["training"] | changed}))
    ours = {line["step"]: line for line in metrics(tree["output_dir"]) if "loss" in line}
    theirs = {line["step"]: line for line in metrics(whole["output_dir"]) if "loss" in line}
    assert ours[12]["tokens"] == theirs[12]["tokens"]
    assert ours[12]["learning_rate"] == theirs[12]["learning_rate"]
