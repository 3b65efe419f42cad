"""The format of a checkpoint: its number, its groups, and an optimizer that keeps no step count."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from relora.checkpoint.format import FORMAT, History
from relora.checkpoint.load import complete_checkpoints, format_problems, open_checkpoint, read_manifest
from relora.checkpoint.save import Checkpoints
from relora.config import UserError, check
from relora.config.yaml12 import dump
from relora.engines import TrainState
from relora.method.store import TorchStore
from relora.train.preflight import preflight

Settings = Callable[..., dict[str, Any]]

OLD = (
    "checkpoint format 1, written by relora 0.1; finish or export the run with relora 0.1, or start anew from its "
    "final model with model.name_or_path"
)
# As relora 0.1 wrote it: two counters for one clock, the stages under other names.
MANIFEST_1 = {
    "format": 1,
    "step": 6,
    "samples_seen": 48,
    "stage": "relora",
    "cycle": 1,
    "steps": {"model.norm.weight": 2.0},
    "num_shares": 1,
    "fingerprint": "0123456789abcdef",
    "data": "0123456789abcdef",
    "evaluated": True,
    "files": {"base-00001-00001.safetensors": {"group": "base-00001", "bytes": 8, "sha256": "00"}},
    "tensors": {"model.norm.weight": "base-00001-00001.safetensors"},
}


def old_run(folder: Path, *, with_checkpoint: bool) -> None:
    """A run folder of relora 0.1, of another run than any that is tried here."""
    folder.mkdir()
    (folder / "config.yaml").write_text(dump({"derived": {"identity": {"lora.r": 999}, "code_version": "0.1.0"}}))
    (folder / "final").mkdir()
    if with_checkpoint:
        checkpoint = folder / "checkpoints" / "step-00000006"
        checkpoint.mkdir(parents=True)
        (checkpoint / "MANIFEST.json").write_text(json.dumps(MANIFEST_1))


@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_a_run_of_the_first_version_is_answered_in_one_line(with_checkpoint: bool, tiny_run: Settings) -> None:
    tree = tiny_run()
    folder = Path(tree["output_dir"])
    old_run(folder, with_checkpoint=with_checkpoint)
    with pytest.raises(UserError) as error:
        preflight(check(tree))
    place = folder / "checkpoints" / "step-00000006" if with_checkpoint else folder
    assert error.value.problems == [f"{place}: {OLD}"], "nor is a word said of the settings that differ"


def test_the_old_format_is_reported_beside_other_problems(tiny_run: Settings) -> None:
    tree = tiny_run(model={"config": {"model_type": "lama"}})
    old_run(Path(tree["output_dir"]), with_checkpoint=True)
    with pytest.raises(UserError) as error:
        preflight(check(tree))
    model, old = error.value.problems
    assert "model_type lama is unknown" in model
    assert old.endswith(OLD)


def test_a_manifest_of_the_first_version_is_refused_by_its_number(tmp_path: Path) -> None:
    old_run(tmp_path / "run", with_checkpoint=True)
    [checkpoint] = complete_checkpoints(tmp_path / "run" / "checkpoints")
    for read in (read_manifest, open_checkpoint):
        with pytest.raises(UserError) as error:
            read(checkpoint)
        assert error.value.problems == [f"{checkpoint}: {OLD}"]
    (checkpoint / "MANIFEST.json").write_text('{"format": 4}')
    [problem] = format_problems(checkpoint.parent)
    assert problem == f"{checkpoint}: checkpoint format 4, this version reads {FORMAT}"
    (checkpoint / "MANIFEST.json").write_text("{")
    assert format_problems(checkpoint.parent) == [], "damage is another matter"


class NoStepStore(TorchStore):
    """For an optimizer that counts no steps."""

    def has_state(self, optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> bool:
        return bool(optimizer.state[parameter])

    def step(self, *_: Any) -> None:  # type: ignore[override]
        return None


def test_an_optimizer_without_a_step_count_has_none_in_the_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    train_state: Any = TrainState(model, model, optimizer)
    engine: Any = SimpleNamespace(
        store=NoStepStore(),
        world=SimpleNamespace(sum=list),
        num_states=1,
        trained_entries=list,
        extra_state=lambda: {"velocity/x": torch.ones(2)},
    )
    checkpoints = Checkpoints(tmp_path, limit=None, writes=True)
    about = {"fingerprint": "", "data": ""}
    checkpoints.save(train_state, engine, 5, history=History(skipped=2), stage="full_rank", cycle=0, about=about)
    [folder] = complete_checkpoints(tmp_path)
    state = open_checkpoint(folder)
    assert (state.step, state.history.skipped, state.steps) == (5, 2, {})
    assert state.moments.keys() == {"weight", "bias"}
    momentum = optimizer.state[model.weight]["momentum_buffer"]
    assert torch.equal(state.moments["weight"]["momentum_buffer"], momentum)
    assert momentum.any()
    assert torch.equal(state.extra["velocity/x"], torch.ones(2))
    assert torch.equal(state.weights.take("weight"), model.weight)
