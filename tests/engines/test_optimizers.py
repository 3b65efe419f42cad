"""The other optimizers of `optim.name` through a run: they learn, restart, and resume to the bit."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from relora.checkpoint.load import open_checkpoint
from relora.config import UserError, check
from relora.method.adamw_8bit import COMPANIONS, dequantize
from relora.train.train import train
from tests.checkpoint.test_resume import assert_same, stopped
from tests.helpers.tiny import MODEL, metrics, only, settings

# Factors of 32 x 128 entries, which bitsandbytes keeps in codes, and norms, which it does not.
WIDE = MODEL | {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 1}
RESTARTS, END = (4, 7), 9
SETTINGS = {
    "model": {"config": WIDE},
    "lora": {"r": 32, "lora_alpha": 32},
    "relora": {"restart_every": 3, "warm_start_steps": 1},
    "training__max_steps": END,
    "training__eval_steps": END,
    "training__probe_steps": 0,
}


CUSTOM = "tests.helpers.custom_policies"
Run = dict[str, Any]


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Run]:
    """The run by an optimizer and with a kind of reset, made when it is first asked for."""

    @cache
    def made(name: str, reset: str) -> Run:
        optim = {"name": name, "learning_rate": 3e-3}
        folder = tmp_path_factory.mktemp("optimizers") / "run"
        tree = settings(corpus, folder, **SETTINGS, optim=optim, relora__optimizer_reset=reset)
        train(check(tree))
        return tree

    return made


# From just after a restart, and from within a cycle.
@pytest.mark.parametrize(
    ("name", "reset", "step"),
    [
        ("adamw_8bit", "zero", 7),
        ("adamw_8bit", "magnitude", 6),
        ("adamw_fused", "zero", 6),
        (f"{CUSTOM}:ademamix_8bit", "zero", 7),  # of the factors there is no state then
    ],
)
def test_resume_is_exact(name: str, reset: str, step: int, runs: Callable[[str, str], Run], tmp_path: Path) -> None:
    tree = runs(name, reset)
    lines = metrics(tree["output_dir"])
    assert only(lines, "eval_loss")[END] < only(lines, "eval_loss")[0] - 0.5
    assert set(only(lines, "restart")) == set(RESTARTS)
    again = stopped(tree, step, tmp_path / "again")
    train(check(again))
    assert_same(again["output_dir"], tree["output_dir"], last=END)


@pytest.mark.parametrize(
    ("name", "reset", "message"),
    [
        (
            "averaged",
            "zero",
            r"averaged: counts updates beside the state .* \(k, weight_sum, .*which no checkpoint holds",
        ),
        ("adafactor", "magnitude", r"adafactor, relora\.optimizer_reset: Adafactor .* only optimizer_reset = zero can"),
    ],
)
def test_what_no_checkpoint_holds_or_no_restart_clears_is_known_before_training(
    name: str, reset: str, message: str, corpus: Path, tmp_path: Path
) -> None:
    relora = {"restart_every": 3, "optimizer_reset": reset}
    tree = settings(corpus, tmp_path / "run", **SETTINGS | {"relora": relora}, optim={"name": f"{CUSTOM}:{name}"})
    with pytest.raises(UserError, match=message):
        train(check(tree))
    assert not [*(tmp_path / "run").glob("checkpoints/step-*")]


# Within the warm start, where hidden matrices train; and after the first restart, where their momenta are gone.
def test_a_run_by_muon_resumes_exactly(tiny_run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    tree = tiny_run(optim={"name": "muon", "learning_rate": 1e-2, "factors": "product", "factors_learning_rate": 0.1})
    train(check(tree))
    checkpoints = Path(tree["output_dir"], "checkpoints")
    momenta = {step: open_checkpoint(checkpoints / f"step-{step:08d}").moments for step in (2, 7)}
    by_muon = [[name for name, of in found.items() if set(of) == {"momentum_buffer"}] for found in momenta.values()]
    assert [sum("lora" in name for name in names) for names in by_muon] == [0, 28]
    assert [len(names) for names in by_muon] == [14, 28]
    for step in momenta:
        again = stopped(tree, step, tmp_path / str(step))
        train(check(again))
        assert_same(again["output_dir"], tree["output_dir"])


def test_factors_have_the_rate_that_is_theirs(tiny_run: Callable[..., dict[str, Any]]) -> None:
    tree = tiny_run(optim={"learning_rate": 1e-2, "factors_learning_rate": 0.0})
    train(check(tree))
    states = [open_checkpoint(Path(tree["output_dir"], "checkpoints", f"step-{step:08d}")) for step in (4, 12)]
    switch, end = ({name: state.weights.take(name) for name in state.weights.names} for state in states)
    assert not any(values.any() for name, values in end.items() if name.endswith("lora_B"))
    assert (end["model.norm.weight"] - switch["model.norm.weight"]).abs().max() > 1e-2


def test_checkpoints_hold_the_codes_as_they_are(runs: Callable[[str, str], Run]) -> None:
    tree = runs("adamw_8bit", "zero")
    state = open_checkpoint(Path(tree["output_dir"], "checkpoints", f"step-{RESTARTS[0]:08d}"))
    coded = {name: of for name, of in state.moments.items() if of["state1"].dtype == torch.uint8}
    plain = state.moments.keys() - coded.keys()
    assert sum("lora" in name for name in coded) == 14
    assert plain
    assert not any("lora" in name for name in plain)
    for name, of in coded.items():
        assert of["state2"].shape == of["state1"].shape
        assert of["absmax1"].shape == (-(-of["state1"].numel() // 256),)
        moments = [dequantize(*(of[key] for key in (slot, *COMPANIONS[slot]))) for slot in COMPANIONS]
        assert [bool(moment.any()) for moment in moments] == [False, False] if "lora" in name else [True, True], name
        assert state.steps[name] == (0 if "lora" in name else 3)
