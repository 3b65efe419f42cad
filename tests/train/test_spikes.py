"""Spikes of the loss: told by the losses before them, skipped, or gone back for; the same in a resumed run."""

import json
import math
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from relora.checkpoint.load import complete_checkpoints
from relora.config import check
from relora.data import Batch
from relora.data.batches import disjoint, index_of
from relora.errors import Failed
from relora.method.schedule import Schedule
from relora.model.tasks import CausalLM
from relora.train.loop import Losses
from relora.train.preflight import preflight
from relora.train.run import newest_state
from relora.train.train import train
from tests.helpers.tiny import metrics, only, settings, stopped

STEPS, SPIKE, BEFORE = (
    39,
    36,
    25,
)  # updates of 8 samples; a checkpoint every 5
FIRST, END = (SPIKE - 10) * 8, SPIKE * 8
BAD: dict[str, Any] = {"samples": [], "factor": 1.0}


class SpikyTask(CausalLM):
    """Causal language modelling in which the loss of some samples is multiplied."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        is_bad = any(torch.equal(row, bad) for row in batch["input_ids"] for bad in BAD["samples"])
        return super().loss(model, batch) * (BAD["factor"] if model.training and is_bad else 1.0)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run without restarts, whose loss hardly changes; it sees no sample twice."""
    folder = tmp_path_factory.mktemp("spikes")
    draw = random.Random(0)
    texts = [" ".join(str(draw.randrange(1000)) for _ in range(200)) for _ in range(60)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    steps = {"training__max_steps": STEPS, "training__save_steps": 5, "training__eval_steps": 20}
    others = {"training__task": f"{__name__}:SpikyTask", "training__report_to": [], "relora__restart_every": None}
    others |= {"relora__warm_start_steps": 0}
    return settings(corpus, folder / "run", **steps, **others, optim__learning_rate=1e-4)


@pytest.fixture(autouse=True)
def bad(tree: dict[str, Any]) -> Iterator[None]:
    mark(tree)
    yield
    BAD.update(samples=[], factor=1.0)


def mark(tree: dict[str, Any], num_samples: int = 1) -> None:
    """Make samples bad, from the last one of update SPIKE on."""
    config = check(tree)
    samples = preflight(config).data.samples(config.data, config.seed)
    BAD.update(samples=[samples[END - 1 + i]["input_ids"] for i in range(num_samples)], factor=8.0)


def run_of(tree: dict[str, Any], folder: Path, on_spike: str = "warn", **data: Any) -> Path:
    own = {"output_dir": str(folder), "training": tree["training"] | {"on_spike": on_spike}}
    train(check(tree | own | {"data": tree["data"] | data}))
    return folder


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "final" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def record_of(run: Path) -> list[dict[str, Any]]:
    return list(json.loads((run / "skipped_data.json").read_text())["left_out"])


def results(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "final" / "relora.json").read_text()))


def test_the_limit_is_six_robust_deviations_above_the_median() -> None:
    schedule = Schedule(max_steps=1000)
    draw = np.random.default_rng(0)
    losses = draw.normal(3.0, 0.1, 200).tolist()
    judge = Losses(schedule)
    for step, loss in enumerate(losses, start=1):
        limit = judge.limit(step)
        before = np.array(losses[: max(0, step - 2)][-64:])
        if len(before) < 32:
            assert limit == math.inf
        else:
            deviation = 1.4826 * np.median(np.abs(before - np.median(before)))
            assert limit == pytest.approx(np.median(before) + 6 * max(deviation, 0.01 * np.median(before)))
        judge.known.append((step, loss))
        # The host may have read the result already, or not: the next limit is the same.
        late = Losses(schedule, list(judge.known)[:-1])
        assert late.limit(step + 1) == judge.limit(step + 1)


def test_the_updates_after_a_restart_neither_judge_nor_are_judged() -> None:
    schedule = Schedule(max_steps=300, warm_start_steps=100, restart_every=50, restart_warmup_steps=15)
    judge = Losses(schedule, [(step, 2.0) for step in range(1, 65)])
    unjudged = [step for step in range(1, 300) if judge.limit(step) is None]
    assert unjudged == [step for at in (100, 150, 200, 250) for step in range(at + 1, at + 16)]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 15)), max_size=6))
def test_the_samples_left_out_are_those_and_no_others(pairs: list[tuple[int, int]]) -> None:
    ranges = disjoint([(first, first + length) for first, length in pairs])
    left = [i for i in range(200) if not any(first <= i < first + length for first, length in pairs)]
    assert [index_of(i, ranges) for i in range(len(left))] == left


def test_a_spike_is_told_and_no_more(tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tree, tmp_path / "run")
    [line] = [line for line in metrics(run) if "spike_loss" in line]
    assert line["step"] == SPIKE and line["spikes"] == 1 and line["spike_loss"] > line["spike_limit"]
    assert (line["first_sample"], line["last_sample"]) == (END - 8, END - 1)
    assert f"step {SPIKE}: the loss {line['spike_loss']:.4f} is a spike" in capsys.readouterr().out
    assert results(run)["spikes"] == 1 and results(run)["skipped"] == 0
    assert not (run / "skipped_data.json").exists()
    # A resumed run finds the same, though it has seen none of the losses itself.
    again = stopped(tree | {"output_dir": str(run)}, 35, tmp_path / "again")
    train(check(again))
    assert metrics(again["output_dir"]) == metrics(run)


def test_a_skipped_spike_is_skipped_as_a_loss_that_is_not_finite(tree: dict[str, Any], tmp_path: Path) -> None:
    skipped = run_of(tree, tmp_path / "skipped", "skip")
    assert results(skipped)["skipped"] == results(skipped)["spikes"] == 1
    BAD["factor"] = math.nan
    reference = run_of(tree, tmp_path / "reference")
    assert results(reference)["skipped"] == 1
    assert_same_weights(skipped, reference)


@pytest.fixture(scope="module")
def without(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that never sees the bad data and the nine batches before them."""
    return run_of(tree, tmp_path_factory.mktemp("without") / "run", skip=[[FIRST, END]])


@pytest.fixture(scope="module")
def rolled_back(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has gone back once."""
    mark(tree)
    return run_of(tree, tmp_path_factory.mktemp("rolled_back") / "run", "rollback")


def test_a_run_goes_back_for_a_spike_and_past_its_data(rolled_back: Path, without: Path) -> None:
    [entry] = record_of(rolled_back)
    assert (entry["first"], entry["end"], entry["step"], entry["checkpoint"]) == (FIRST, END, SPIKE, BEFORE)
    assert results(rolled_back)["left_out"] == 1
    assert_same_weights(rolled_back, without)
    assert only(metrics(rolled_back), "loss") == only(metrics(without), "loss")


def test_a_run_that_is_killed_on_its_way_back_goes_on_alike(
    tree: dict[str, Any], without: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    folder, calls = tmp_path / "run", iter([newest_state, killed])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("relora.train.train.newest_state", lambda *args, **keys: next(calls)(*args, **keys))
        run_of(tree, folder, "rollback")
    told = f"goes back to the checkpoint of step {BEFORE}, without the samples {FIRST} to {END - 1}"
    assert told in capsys.readouterr().out
    # The checkpoints of the way that was given up are still there, and must not be resumed from.
    assert complete_checkpoints(folder / "checkpoints")[-1].name == "step-00000035"
    run_of(tree, folder, "rollback")
    assert_same_weights(folder, without)


@pytest.mark.parametrize("damage", ["edited", "lost"])
def test_checkpoints_make_up_for_the_record(
    damage: str, tree: dict[str, Any], rolled_back: Path, without: Path, tmp_path: Path, capsys: Any
) -> None:
    stopped(tree | {"output_dir": str(rolled_back)}, 35, tmp_path / "run")
    record = tmp_path / "run" / "skipped_data.json"
    if damage == "lost":
        record.unlink()
    else:
        record.write_text(record.read_text().replace(f'"end": {END}', f'"end": {END + 8}'))
    run_of(tree, tmp_path / "run", "rollback")
    assert_same_weights(tmp_path / "run", without)
    assert record_of(tmp_path / "run") == record_of(rolled_back)
    printed = capsys.readouterr().err
    assert f"{record} lacks entries that the checkpoints have; it is written again" in printed
    assert ("its hash differs); it is kept as skipped_data.json.damaged" in printed) == (damage == "edited")


def test_going_back_has_an_end(tree: dict[str, Any], tmp_path: Path) -> None:
    mark(tree, num_samples=400)
    with pytest.raises(Failed, match="gone back to the checkpoint of step 20 3 times, which has not helped"):
        run_of(tree, tmp_path / "run", "rollback")
    record = record_of(tmp_path / "run")
    assert [entry["checkpoint"] for entry in record][-3:] == [20, 20, 20]
    assert all(one["end"] < other["end"] for one, other in pairwise(record))


def test_the_start_is_gone_back_to_where_there_is_no_checkpoint(
    tree: dict[str, Any], without: Path, tmp_path: Path
) -> None:
    few = tree | {"training": tree["training"] | {"save_steps": 100}}
    run = run_of(few, tmp_path / "run", "rollback")
    assert [entry["checkpoint"] for entry in record_of(run)] == [0]
    assert_same_weights(run, without)


def test_a_run_that_has_diverged_says_so(tree: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    hot = tree | {"optim": {"learning_rate": 5.0}, "training": tree["training"] | {"max_steps": 8}}
    run = run_of(hot, tmp_path / "run")
    assert results(run)["worse_than_uniform_guess"] is True
    assert "a uniform guess among 300 tokens has the loss 5.7038: the model has learned nothing, or the run has" in (
        capsys.readouterr().out
    )
