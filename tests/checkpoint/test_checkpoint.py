"""What is in a checkpoint, what is shared, what is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from relora.checkpoint import folder_writer as checkpoint_module
from relora.checkpoint.load import complete_checkpoints, open_checkpoint, read_manifest
from relora.checkpoint.verify import checkpoint_problems
from relora.config import check
from relora.method.names import named_parameters
from relora.train.train import train


@pytest.fixture
def run(tiny_run: Callable[..., dict[str, Any]]) -> Path:
    tree = tiny_run()
    train(check(tree))
    return Path(tree["output_dir"])


def base_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("base-*"))


def test_base_weights_are_written_once_a_cycle(run: Path) -> None:
    by_step = {read_manifest(folder).step: folder for folder in complete_checkpoints(run / "checkpoints")}
    assert not base_files(by_step[3]), "in the warm start every weight is trained"
    for cycle in ((4, 5, 6), (7, 8, 9), (10, 11, 12)):
        inodes = {base_files(by_step[step])[0].stat().st_ino for step in cycle}
        assert len(inodes) == 1
    assert len({base_files(by_step[step])[0].stat().st_ino for step in (4, 7, 10)}) == 3


def test_names_and_shapes_are_canonical(run: Path) -> None:
    state = open_checkpoint(complete_checkpoints(run / "checkpoints")[-1])
    assert state.weights.take("model.layers.0.mlp.up_proj.weight").shape == (48, 32)
    assert state.weights.take("model.layers.0.mlp.up_proj.lora_A").shape == (4, 32)
    assert set(state.moments["model.layers.1.self_attn.q_proj.lora_B"]) == {"exp_avg", "exp_avg_sq"}
    assert state.steps["model.norm.weight"] == 8, "full modules keep their step count over restarts"
    assert state.steps["model.layers.0.mlp.up_proj.lora_A"] == 2, "the last restart was two updates ago"


def test_limit_keeps_the_newest_and_their_shared_files(tiny_run: Callable[..., dict[str, Any]]) -> None:
    tree = tiny_run(training__save_total_limit=2)
    train(check(tree))
    kept = complete_checkpoints(Path(tree["output_dir"]) / "checkpoints")
    assert [folder.name for folder in kept] == ["step-00000011", "step-00000012"]
    assert sorted(p.name for p in kept[0].parent.iterdir()) == [folder.name for folder in kept]
    assert [problem for folder in kept for problem in checkpoint_problems(folder)] == []


def test_a_removal_under_way_is_finished(run: Path, tiny_run: Callable[..., dict[str, Any]]) -> None:
    first, second, *_ = complete_checkpoints(run / "checkpoints")
    (first / "MANIFEST.json").unlink()  # as earlier versions began
    leftover = second.rename(second.with_name(f".tmp-{second.name}"))
    train(check(tiny_run()))
    assert not first.exists()
    assert not leftover.exists()


def test_many_small_files_hold_the_same(
    run: Path, tiny_run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "SHARD_BYTES", 4096)
    tree = tiny_run("sharded")
    train(check(tree))
    whole, split = (
        open_checkpoint(complete_checkpoints(Path(folder) / "checkpoints")[-1]) for folder in (run, tree["output_dir"])
    )
    assert len(list((Path(tree["output_dir"]) / "checkpoints" / "step-00000012").glob("base-*"))) > 3
    assert whole.weights.names == split.weights.names
    for name in whole.weights.names:
        assert torch.equal(whole.weights.take(name), split.weights.take(name))


def test_every_parameter_is_there(run: Path) -> None:
    from relora.config import load_config
    from relora.config.derived import lora_config
    from relora.method.inject import inject_lora
    from relora.model.model import load_hf_config, skeleton
    from relora.model.tasks import task_of

    config = load_config(run / "config.yaml")
    model = skeleton(config.model, load_hf_config(config.model, task_of(config)), task_of(config))
    inject_lora(model, lora_config(config))
    state = open_checkpoint(complete_checkpoints(run / "checkpoints")[-1])
    assert state.weights.names == named_parameters(model).keys()


def test_a_damaged_file_is_named(run: Path) -> None:
    folder = complete_checkpoints(run / "checkpoints")[-1]
    target = next(folder.glob("trained-*"))
    content = bytearray(target.read_bytes())
    content[-1] ^= 1
    target.write_bytes(content)
    [problem] = checkpoint_problems(folder)
    assert f"{target.name} is not what was written" in problem


def test_a_folder_without_a_manifest_is_no_checkpoint(run: Path) -> None:
    newest = complete_checkpoints(run / "checkpoints")[-1]
    (newest / "MANIFEST.json").unlink()
    assert complete_checkpoints(run / "checkpoints")[-1].name == "step-00000011"


def test_the_manifest_says_which_run_and_data(run: Path) -> None:
    manifest = json.loads((complete_checkpoints(run / "checkpoints")[-1] / "MANIFEST.json").read_text())
    assert {"format", "step", "skipped", "stage", "cycle", "fingerprint", "data", "files"} <= manifest.keys()
    assert "samples_seen" not in manifest
    assert all({"bytes", "sha256"} <= facts.keys() for facts in manifest["files"].values())
