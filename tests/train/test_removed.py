"""The run folder is removed while a run is in it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relora.checkpoint.load import complete_checkpoints
from relora.checkpoint.verify import checkpoint_problems
from relora.cli import main
from relora.config import check
from relora.train.loop import Loop
from relora.train.train import train
from tests.helpers.tiny import metrics

Settings = Callable[..., dict[str, Any]]


# The thread in which TensorBoard writes says so on its own; the sink then begins a new file.
@pytest.mark.filterwarnings("ignore:Exception in thread")
@pytest.mark.parametrize("part", ["", "stage_start", "checkpoints"])
def test_a_run_goes_on_without_what_was_removed(
    part: str, run: Path, tiny_run: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tiny_run(training__async_save=False)  # a save in flight would fill the folder again while it is removed
    folder, update = Path(tree["output_dir"]), Loop.update

    def removing(loop: Loop, at: int, batches: Any) -> Any:
        if at == 8:
            shutil.rmtree(folder / part)
        return update(loop, at, batches)

    monkeypatch.setattr(Loop, "update", removing)
    train(check(tree))
    monkeypatch.undo()
    ours, theirs = (load_file(each / "final/model.safetensors") for each in (folder, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics(folder) == metrics(run), "the lines are written again from the open file"
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"
    steps = [int(path.name[5:]) for path in complete_checkpoints(folder / "checkpoints")]
    assert steps == list(range(1 if part == "stage_start" else 9, 13))
    assert all(checkpoint_problems(path) == [] for path in complete_checkpoints(folder / "checkpoints"))
    output = capsys.readouterr()
    assert output.err.count("was removed or moved before step 9; it is made anew") == (part == "")
    assert output.out.count("no spectrum of") == (8 if part != "checkpoints" else 0)
    assert main(["export", str(folder), "--output", f"{folder}-exported"]) == 0
