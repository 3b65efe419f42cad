"""relora.sync: restart: two processes train factors of their own and meet at restarts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from relora.checkpoint.load import open_checkpoint, open_states
from relora.config import UserError, check
from relora.engines import resume_problems
from relora.engines.local_sgd import OuterOptimizer
from relora.train.train import train
from tests.checkpoint.test_resume import stopped
from tests.helpers.launch import accelerate, written
from tests.helpers.tiny import all_metrics, metrics, only, settings, settings_of

R, EVERY, END = 4, 6, 18


def apart(corpus: Path, folder: Path, **relora: Any) -> dict[str, Any]:
    """A run whose processes meet after 6, 12 and 18 updates, with momentum of the mean updates."""
    how = {"sync": "restart", "restart_every": EVERY, "outer_learning_rate": 0.9, "outer_momentum": 0.5} | relora
    return settings(corpus, folder, relora=how, training__max_steps=END, training__per_device_batch_size=2)


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("apart")
    accelerate("ddp_cpu", written(apart(corpus, folder / "whole"), folder))
    return folder / "whole"


def factors(run: Path, step: int, which: str) -> list[dict[str, torch.Tensor]]:
    """Of each process, by name."""
    shares = open_states(run / "checkpoints" / f"step-{step:08d}")
    return [{name: state.weights.take(name) for name in state.weights.names if which in name} for state in shares]


def test_no_gradient_travels_and_the_meeting_is_cheap(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    [update] = {line["bytes_sent"] for line in lines if "loss" in line and "bytes_sent" in line}
    [meeting] = {line["bytes_sent"] for line in lines if "restart" in line}
    assert update == 32, "label tokens and stop, then loss and norm: four numbers of 8 bytes"
    W = {layer.removesuffix(".weight") for layer in load_file(next((run / "stage_start").glob("*.safetensors")))}
    trained = sum(p.nbytes for name, p in factors(run, 1, "")[0].items() if name.removesuffix(".weight") not in W)
    assert meeting == trained, "each sends its factors once, and takes part in the sum of what trains in full"
    # Step by step the gradient of all that is trained would travel, in an all-reduce.
    assert trained * EVERY / (meeting + EVERY * update) > 0.8 * EVERY


def test_a_cycle_learns_more_than_one_rank(run: Path) -> None:
    assert only(metrics(run), "restart") == {6: 1, 12: 2, 18: 3}
    assert all(R < rank <= 2 * R for rank in only(metrics(run), "update_effective_rank").values())


def test_subspaces_differ_and_all_else_is_common_after_a_meeting(run: Path) -> None:
    (first, second), (B, other_B) = factors(run, EVERY, "lora_A"), factors(run, EVERY, "lora_B")
    assert all(not torch.equal(first[name], second[name]) for name in first)
    assert all(not values.any() for values in (*B.values(), *other_B.values()))
    ours, theirs = factors(run, EVERY, "")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "lora" not in name)


def test_w_takes_the_mean_through_the_outer_optimizer(run: Path) -> None:
    """Within what one update more makes of the factors: a sum for a mean would be off by 1, not by 0.3."""
    layer, scale, outer = "model.layers.0.mlp.up_proj", 6 / R, OuterOptimizer(0.9, 0.5)
    for meeting in (EVERY, 2 * EVERY):
        before, after = (factors(run, step, f"{layer}.weight")[0][f"{layer}.weight"] for step in (meeting - 1, meeting))
        shares = factors(run, meeting - 1, f"{layer}.lora")
        deltas = [share[f"{layer}.lora_B"] @ share[f"{layer}.lora_A"] * scale for share in shares]
        expected = outer.step(layer, torch.stack(deltas).mean(0))
        assert (after - before - expected).norm() < 0.3 * expected.norm()
        assert expected.norm() > 0.1


def test_final_is_the_common_model(run: Path) -> None:
    final = load_file(run / "final" / "model.safetensors")
    for name, values in factors(run, END, "")[0].items():
        if "lora" not in name:
            torch.testing.assert_close(final[name], values, atol=1e-6, rtol=0)


def test_goes_on_exactly_between_two_meetings(run: Path, tmp_path: Path) -> None:
    tree = stopped(settings_of(run), EVERY + 3, tmp_path / "again")
    accelerate("ddp_cpu", written(tree, tmp_path))
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (run, tmp_path / "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert only(metrics(tmp_path / "again"), "loss") == only(metrics(run), "loss")
    sent = [[(line["step"], line.get("bytes_sent")) for line in all_metrics(of)] for of in (tmp_path / "again", run)]
    assert sent[0] == sent[1], "the lines right after a resume too"


def test_another_number_of_processes_goes_on_from_a_meeting_only(run: Path, tmp_path: Path) -> None:
    tree = settings_of(run)
    with pytest.raises(UserError, match="holds the separate states of 2 processes"):
        train(check(stopped(tree, EVERY + 3, tmp_path / "between")))
    train(check(stopped(tree, EVERY, tmp_path / "meeting")))
    theirs = only(metrics(tmp_path / "meeting"), "eval_loss")
    assert theirs[END] == pytest.approx(only(metrics(run), "eval_loss")[END], abs=0.5)
    assert theirs[END] < only(metrics(run), "eval_loss")[0] - 1


@pytest.mark.parametrize(
    ("step", "num_processes", "is_refused"),
    [(7, 1, True), (7, 3, True), (7, 2, False), (EVERY, 1, False), (END, 3, False), (0, 1, False)],
)
def test_other_processes_resume_at_restarts_only(step: int, num_processes: int, is_refused: bool, corpus: Path) -> None:
    tree = apart(corpus, corpus / "nowhere", warm_start_steps=0)
    problems = resume_problems(check(tree), step, 2, num_processes)
    assert len(problems) == is_refused
    assert all(f"the checkpoint at step {step} holds the separate states of 2 processes" in line for line in problems)
    step_by_step = tree | {"relora": {"restart_every": EVERY}}
    assert resume_problems(check(step_by_step), step, 2, num_processes) == []


def test_the_share_of_a_rank_is_its_own(run: Path) -> None:
    folder = run / "checkpoints" / f"step-{EVERY + 1:08d}"
    shares = [open_checkpoint(folder, state_index=index) for index in (0, 1)]
    name = "model.layers.0.mlp.up_proj.lora_B"
    moments = [state.moments[name]["exp_avg"] for state in shares]
    assert shares[0].weights.names == shares[1].weights.names
    assert not torch.equal(*moments)


def test_velocity_and_anchors_of_a_resume_go_where_the_delta_is() -> None:
    # A fake tensor has a device, and refuses to be mixed with those of another.
    with FakeTensorMode():
        host, device = torch.zeros(3), torch.zeros(3, device="cuda")
        outer = OuterOptimizer(0.7, 0.9)
        for name, loaded, computed in (("W", device, host), ("norm", host, device)):
            outer.load(f"velocity/{name}", loaded)
            outer.load(f"anchor/{name}", loaded)
            assert outer.step(name, computed).device == computed.device
            assert outer.velocity[name].device == computed.device
            assert outer.combine(name, computed).device == computed.device


def test_nesterov_is_torchs() -> None:
    parameter = torch.nn.Parameter(torch.zeros(5))
    sgd, ours = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True), OuterOptimizer(0.7, 0.9)
    mine = torch.zeros(5)
    for seed in range(4):
        delta = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        parameter.grad = -delta
        sgd.step()
        mine = mine + ours.step("w", delta)
        torch.testing.assert_close(mine, parameter.detach())
