"""Two processes under every engine train the model that one process trains, and go on with each other's runs."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from relora.checkpoint.load import open_checkpoint
from relora.checkpoint.state import State
from relora.config import check
from relora.method.reinit import REINITS, DrawKey, LayerView
from relora.train.train import train
from tests.checkpoint.test_resume import assert_same, stopped
from tests.helpers.launch import RELORA, forked_launch, launch_file, written
from tests.helpers.tiny import metrics, only, settings

NAMES = {
    "ddp": "DDP (gloo)",
    "fsdp2": "FSDP2 (gloo)",
    "zero1": "DeepSpeed ZeRO-1 (gloo)",
    "zero2": "DeepSpeed ZeRO-2 (gloo)",
    "zero3": "DeepSpeed ZeRO-3 (gloo)",
}
ENGINES = tuple(NAMES)
TOLERANCE = 1e-4
MOVED = 100 * TOLERANCE  # what has moved less was not compared
SWITCH, RESTARTS, END = 6, {14: 1, 22: 2}, 24
# Two micro-batches an update on each of two processes, rows of very unequal label counts, clipping, a re-warm-up.
HARD = {
    "data__document_mask": True,
    "training__per_device_batch_size": 2,
    "training__max_steps": END,
    "training__eval_steps": END,
    "relora__warm_start_steps": SWITCH,
    "relora__restart_every": 8,
    "schedule__restart_warmup_steps": 2,
}


@dataclass(frozen=True)
class Run:
    """A run that has ended: its settings, and the launch that it ended with."""

    tree: dict[str, Any]
    launch: CompletedProcess[str] = field(default_factory=lambda: CompletedProcess((), 0))

    @property
    def folder(self) -> Path:
        return Path(self.tree["output_dir"])

    def ended_well(self) -> "Run":
        assert self.launch.returncode == 0, self.launch.stderr[-6000:]
        return self

    def state(self, step: int) -> State:
        return open_checkpoint(self.folder / "checkpoints" / f"step-{step:08d}")

    def final(self) -> dict[str, Tensor]:
        return load_file(self.folder / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The run under an engine, or by a single process; each is made when it is first asked for, and only once."""
    folder = tmp_path_factory.mktemp("engines")

    @cache
    def made(engine: str) -> Run:
        tree = settings(corpus, folder / engine, **HARD)
        if engine == "single":
            train(check(tree))
            return Run(tree)
        return launched(engine, tree, folder)

    return lambda engine: made(engine).ended_well()


@pytest.fixture(scope="module")
def single(runs: Callable[[str], Run]) -> Run:
    return runs("single")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(engine: str, runs: Callable[[str], Run]) -> Run:
    """The run by two processes under `engine`."""
    return runs(engine)


def launched(engine: str, tree: dict[str, Any], folder: Path) -> Run:
    """Train by two processes on the CPU, as the file in launch/ says."""
    config = str(written(tree, folder))
    # DeepSpeed's first run on a machine compiles for a minute.
    return Run(tree, forked_launch(launch_file(f"{engine}_cpu"), RELORA, "train", config, timeout_s=300))


def assert_equal_numbers(run: Run, single: Run) -> None:
    """All that metrics.jsonl tells of the two, timings apart."""
    ours, theirs = metrics(single.folder), metrics(run.folder)
    assert [(line["step"], line.keys()) for line in theirs] == [(line["step"], line.keys()) for line in ours]
    for name in {key for line in ours for key in line}:
        expected, found = only(ours, name), only(theirs, name)
        # The rate is no measurement; the error of a merge is rounding, and so its own.
        tolerance = {"learning_rate": 0.0, "merge_error": 1e-6}.get(name, TOLERANCE)
        assert found == pytest.approx(expected, abs=tolerance, rel=0), name


def assert_equal_weights(run: Run, single: Run) -> None:
    ours, theirs = single.final(), run.final()
    assert theirs.keys() == ours.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def is_factor(name: str) -> bool:
    return name.endswith(("lora_A", "lora_B"))


def test_the_first_line_says_what_runs(engine: str, pair: Run) -> None:
    # DeepSpeed talks too, in the launcher's own process, and torchrun of the threads that it sets.
    ours = [line for line in pair.launch.stdout.splitlines() if line and not re.match(r"\[.*\[WARNING\]", line)]
    assert f"engine {NAMES[engine]}, processes 2, device cpu" in ours[0]
    assert pair.launch.stdout.count("engine ") == 1, "only rank 0 talks"


@pytest.mark.parametrize("stage", ["full_rank", "low_rank"])
def test_the_census_counts_whole_parameters(pair: Run, single: Run, stage: str) -> None:
    ours, theirs = (json.loads((run.folder / f"parameters_{stage}.json").read_text()) for run in (single, pair))
    assert ours["full"]["num_parameters"] > 0
    assert theirs == ours


def test_every_number_is_that_of_one_process(pair: Run, single: Run) -> None:
    lines = metrics(single.folder)
    restarts = {"probe_loss_after", "merge_error", "optimizer_zeroed_fraction", "update_effective_rank"}
    assert {"loss", "eval_loss", "grad_norm", "learning_rate", *restarts} <= {key for line in lines for key in line}
    assert only(lines, "loss")[1] - only(lines, "loss")[END] > MOVED, "nothing was learned: nothing was compared"
    assert only(lines, "restart") == RESTARTS
    assert_equal_numbers(pair, single)


def test_the_gradients_that_travel_are_those_of_trained_parameters(engine: str, pair: Run) -> None:
    lines = [json.loads(line) for line in (pair.folder / "metrics.jsonl").read_text().splitlines()]
    of_full, of_low = (
        next(line for line in lines if "bytes_sent_full_rank" in line and (line["step"] <= SWITCH) == is_full)
        for is_full in (True, False)
    )
    trained = {stage: num_trained(pair, stage) for stage in ("full_rank", "low_rank")}
    assert trained["low_rank"] < 0.7 * trained["full_rank"]
    # A ring of two sends a byte for each of an all-reduce, half of one for each of a reduction to parts or a gathering.
    # DDP and ZeRO-1 reduce once an update, ZeRO-2 in each of two micro-batches; ZeRO then gathers what was updated.
    per_byte = {"ddp": 1.0, "zero1": 1.5, "zero2": 2.5}
    if engine in per_byte:
        for line, stage in ((of_full, "full_rank"), (of_low, "low_rank")):
            assert 0 <= line["bytes_sent"] - 4 * per_byte[engine] * trained[stage] <= 64, "some numbers beside them"
        assert of_low["bytes_sent_full_rank"] == pytest.approx(of_full["bytes_sent"], abs=64)
    assert of_full["bytes_sent_full_rank"] == of_full["bytes_sent"] > of_low["bytes_sent"]


def num_trained(run: Run, stage: str) -> int:
    counted = json.loads((run.folder / f"parameters_{stage}.json").read_text())
    return int(counted["factors"]["num_parameters"] + counted["full"]["num_parameters"])


def test_a_restart_leaves_the_function_alone(pair: Run) -> None:
    lines = metrics(pair.folder)
    before, after = only(lines, "probe_loss_before"), only(lines, "probe_loss_after")
    assert before.keys() == RESTARTS.keys()
    assert after == pytest.approx(before, abs=1e-5, rel=0)
    assert set(only(lines, "optimizer_zeroed_fraction").values()) == {1.0}


def test_final_weights_are_those_of_one_process(pair: Run, single: Run) -> None:
    assert_equal_weights(pair, single)
    at_switch, final = single.state(SWITCH).weights, single.final()
    for name in filter(lambda name: not is_factor(name), at_switch.names):
        assert (final[name] - at_switch.take(name)).abs().max() > MOVED, f"{name} has hardly moved: nothing compared"


def test_stage_start_is_that_of_one_process(pair: Run, single: Run) -> None:
    ours, theirs = (load_file(next((run.folder / "stage_start").glob("*.safetensors"))) for run in (single, pair))
    assert theirs.keys() == ours.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=TOLERANCE, rtol=0)


# A warm start's, one before and at a restart, one after it, the last.
@pytest.mark.parametrize("step", [4, 13, 14, 15, END])
def test_checkpoints_are_those_of_one_process(pair: Run, single: Run, step: int) -> None:
    ours, theirs = single.state(step), pair.state(step)
    place = attrgetter("step", "history.skipped", "history.spikes", "stage", "cycle")
    assert place(theirs) == place(ours)
    assert theirs.steps == ours.steps, "Adam's step counts"
    assert theirs.weights.names == ours.weights.names
    for name in ours.weights.names:
        torch.testing.assert_close(theirs.weights.take(name), ours.weights.take(name), atol=TOLERANCE, rtol=0)
    assert theirs.moments.keys() == ours.moments.keys() == ours.steps.keys()
    for name, moments in ours.moments.items():
        assert theirs.moments[name].keys() == moments.keys() == {"exp_avg", "exp_avg_sq"}
        for slot, values in moments.items():
            # Moments are of any size: a thousandth of the largest entry.
            limit = 1e-3 * values.abs().max().item()
            torch.testing.assert_close(theirs.moments[name][slot], values, atol=limit, rtol=0)


@pytest.mark.parametrize("step", RESTARTS)
def test_a_restart_resets_the_factors_alone(pair: Run, step: int) -> None:
    state, since_switch = pair.state(step), step - SWITCH
    for name, moments in state.moments.items():
        largest = max(values.abs().max() for values in moments.values())
        if is_factor(name):
            assert largest == 0, name
            assert state.steps[name] == 0
        else:
            assert largest > 0, name
            assert state.steps[name] == since_switch


@pytest.mark.parametrize("step", RESTARTS)
def test_factors_stay_drawn_anew_after_the_next_update(pair: Run, step: int) -> None:
    # An engine with a second copy of its parameters could bring the old factors back in this update.
    before, at, after = (pair.state(s).weights for s in (step - 1, step, step + 1))
    rate = only(metrics(pair.folder), "learning_rate")[step + 1]
    factors = sorted(name for name in at.names if is_factor(name))
    assert len(factors) == 2 * 2 * 7, "of two blocks with seven linear layers"
    for name in factors:
        old, fresh, moved = (weights.take(name) for weights in (before, at, after))
        assert (old - fresh).abs().max() > MOVED, name
        if name.endswith("lora_B"):
            assert (fresh == 0).all(), name
            # Adam's first update moves every entry by the rate, or less.
            assert 0 < moved.abs().max() <= 1.001 * rate, name
        else:
            r, d_in = fresh.shape
            layer = name.removesuffix(".lora_A")
            view = LayerView(layer, r, d_in, out_features=1, scale=1.0, read_weight=torch.Tensor)
            drawn, _ = REINITS["kaiming"].factors(view, DrawKey(0, RESTARTS[step], layer), None)
            # The gradient of A is a product with B, which was zero: the first update leaves A alone.
            torch.testing.assert_close(fresh, drawn, atol=0, rtol=0)
            torch.testing.assert_close(moved, drawn, atol=TOLERANCE, rtol=0)


def test_the_final_model_loads_and_computes_the_same(pair: Run, single: Run) -> None:
    ours, theirs = (AutoModelForCausalLM.from_pretrained(run.folder / "final").eval() for run in (single, pair))
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected, found = ours(ids).logits, theirs(ids).logits
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


# From within a cycle (10) and from just after a restart (15). One process to two, and every change of engine.
@pytest.mark.parametrize(
    ("source", "step", "target"),
    [
        ("single", 10, "fsdp2"),
        ("fsdp2", 15, "zero1"),
        ("zero1", 10, "zero2"),
        ("zero2", 15, "zero3"),
        ("zero3", 15, "ddp"),
    ],
)
def test_goes_on_under_another_engine(
    source: str, step: int, target: str, runs: Callable[[str], Run], single: Run, tmp_path: Path
) -> None:
    tree = stopped(runs(source).tree, step, tmp_path / target)
    again = launched(target, tree, tmp_path).ended_well()
    assert f"engine {NAMES[target]}, processes 2" in again.launch.stdout
    assert f"resuming from step {step}" in again.launch.stdout
    assert_equal_numbers(again, single)
    assert_equal_weights(again, single)


@pytest.mark.parametrize(("source", "step"), [("ddp", 15), ("zero3", 10)])
def test_one_process_goes_on_where_two_stopped(
    source: str, step: int, runs: Callable[[str], Run], single: Run, tmp_path: Path
) -> None:
    tree = stopped(runs(source).tree, step, tmp_path / "run")
    train(check(tree))
    assert_equal_numbers(Run(tree), single)
    assert_equal_weights(Run(tree), single)


def test_the_same_engine_goes_on_to_the_bit(runs: Callable[[str], Run], tmp_path: Path) -> None:
    # ZeRO-3, which has the most to put back: partitions of weights, masters and moments.
    tree = stopped(runs("zero3").tree, 15, tmp_path / "zero3")
    launched("zero3", tree, tmp_path).ended_well()
    assert_same(tree["output_dir"], runs("zero3").folder, last=END)


@pytest.mark.parametrize(("engine", "method"), [("fsdp2", "full"), ("zero3", "lora")])
def test_the_other_methods(engine: str, method: str, corpus: Path, tmp_path: Path) -> None:
    short = {"training__method": method, "training__max_steps": 10, "training__eval_steps": 10}
    alone = settings(corpus, tmp_path / "single", **HARD | short)
    train(check(alone))
    together = settings(corpus, tmp_path / engine, **HARD | short)
    run = launched(engine, together, tmp_path).ended_well()
    assert_equal_numbers(run, Run(alone))
    assert_equal_weights(run, Run(alone))
