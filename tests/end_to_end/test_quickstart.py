"""The quickstart as a user sees it, by one thread: what it must show, and what one that learns nothing must not."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from relora.tracking.metrics_file import read_metrics
from tests.checkpoint.test_export import live_model
from tests.helpers import programs
from tests.helpers.tiny import only

CONFIG = programs.ROOT / "configs" / "quickstart.yaml"
TIMEOUT_S = 1200


def relora(*arguments: str) -> str:
    result = programs.run([sys.executable, "-m", "relora", *arguments], timeout_s=TIMEOUT_S)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    print(relora("train", str(CONFIG), f"output_dir={folder / 'run'}"))
    return folder / "run"


def settings() -> dict[str, Any]:
    return dict(yaml.safe_load(CONFIG.read_text()))


def gains(run: Path) -> tuple[float, float]:
    """Nats under the unigram entropy, and under the loss at the switch."""
    results = yaml.safe_load((run / "final" / "relora.json").read_text())
    loss = results["eval_loss"]
    return results["unigram_entropy"] - loss, results["eval_loss_at_switch"] - loss


def test_it_learns_from_context_and_in_the_low_rank_stage(run: Path) -> None:
    from_context, since_switch = gains(run)
    assert from_context >= 1.5
    assert since_switch >= 0.1


def test_at_rate_zero_after_the_switch_it_does_not(folder: Path) -> None:
    ours, rate = folder / "rate_zero", settings()["optim"]["warm_start_learning_rate"]
    arguments = ["optim.learning_rate=0", f"optim.warm_start_learning_rate={rate}", "training.probe_steps=0"]
    # So early in training that a stage which learned anything would gain far more than the tolerance.
    shorter = ["relora.warm_start_steps=40", "relora.restart_every=40", "training.max_steps=120"]
    relora("train", str(CONFIG), f"output_dir={ours}", *arguments, *shorter)
    loss_at_start = only(read_metrics(ours / "metrics.jsonl"), "eval_loss")[0]
    loss_at_switch = yaml.safe_load((ours / "final" / "relora.json").read_text())["eval_loss_at_switch"]
    assert loss_at_start - loss_at_switch > 0.5
    assert gains(ours)[1] == pytest.approx(0, abs=1e-4)


def test_restarts_keep_the_function_and_bring_no_bump(run: Path) -> None:
    lines = read_metrics(run / "metrics.jsonl")
    restarts = {line["step"]: line for line in lines if "restart" in line}
    assert len(restarts) >= 4
    probes = only(lines, "probe_loss")
    for step, line in restarts.items():
        before = line["probe_loss_before"]
        assert line["probe_loss_after"] == pytest.approx(before, abs=1e-4)
        after = [probes[step + i] for i in range(1, settings()["training"]["probe_steps"] + 1)]
        assert max(after) <= before + 0.1


def test_transformers_loads_what_was_trained(run: Path) -> None:
    # In float64, where the two ways to compute the same function do not differ by rounding.
    exported, live = AutoModelForCausalLM.from_pretrained(run / "final").double(), live_model(run).double()
    ids = torch.randint(live.config.vocab_size, (2, 64))
    torch.testing.assert_close(exported(ids).logits, live(ids).logits, atol=1e-5, rtol=0)


def test_the_final_model_has_the_runs_loss_and_writes(run: Path) -> None:
    loss = only(read_metrics(run / "metrics.jsonl"), "eval_loss")[settings()["training"]["max_steps"]]
    assert f"held-out loss {loss:.4f} nats" in relora("eval", str(run / "final"))
    text = relora("generate", str(run), "--prompt", "def read_lines(path):")
    assert text.startswith("def read_lines(path):")
    assert len(text) > 60
