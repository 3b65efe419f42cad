"""`relora export RUN`: a plain Hugging Face folder of a run, every low-rank update merged."""

import os
from pathlib import Path

import torch

from relora.checkpoint.export import Card, export_model
from relora.checkpoint.run_folder import RunFolder, read_run_config
from relora.commands.load_model import find_checkpoint, load_run
from relora.config import UserError, raise_if_any
from relora.config.yaml12 import dump
from relora.files import folder_problems
from relora.model.tasks import task_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(run: str, output: str, *, dtype: str, step: int | None) -> None:
    """Write the model of `run` to the folder `output` in `dtype`, merged in float32 and rounded once.

    Args:
        step: of the checkpoint; None for the newest.

    Raises:
        UserError: no run, no checkpoint of that step, or something in the way at `output`.
        Failed: the disk refuses.
    """
    folder, target = RunFolder(Path(run)), Path(output)
    if not folder.is_run:
        raise UserError([f"{run}: is not a run folder (it has no config.yaml)"])
    raise_if_any(
        [f"--output {output}: exists already; nothing is overwritten"]
        if os.path.lexists(target)  # a link that leads nowhere is there too
        else folder_problems(f"--output {output}", output)
    )
    config, checkpoint = read_run_config(folder), find_checkpoint(folder, step)
    exported = load_run(folder, checkpoint, config)
    card = Card(
        folder.path.resolve().name,
        task=task_of(config),
        results={"checkpoint": checkpoint.name, "dtype": dtype},
        settings=dump(config.model_dump(mode="json")),
    )
    export_model(exported, target, card=card, dtype=DTYPES[dtype])
    print(f"{checkpoint.name} exported to {target}")
