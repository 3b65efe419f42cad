"""`relora export RUN`: a plain Hugging Face folder of a run, every low-rank update merged."""

from pathlib import Path

import torch

from relora.checkpoint.export import export_model, model_card
from relora.checkpoint.run_folder import RunFolder
from relora.commands.load_model import find_checkpoint, load_run
from relora.config import UserError, raise_if_any
from relora.files import folder_problems

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(run: str, output: str, *, dtype: str, step: int | None) -> None:
    """Write the model of `run` to the folder `output` in `dtype`, merged in float32 and rounded once.

    Args:
        step: of the checkpoint; None for the newest.

    Raises:
        UserError: no run, no checkpoint of that step, or something in the way at `output`.
    """
    folder, target = RunFolder(Path(run)), Path(output)
    if not folder.is_run:
        raise UserError([f"{run}: is not a run folder (it has no config.yaml)"])
    raise_if_any(
        [f"--output {output}: exists already; nothing is overwritten"]
        if target.exists()
        else folder_problems(f"--output {output}", output)
    )
    checkpoint = find_checkpoint(folder, step)
    model, tokenizer = load_run(folder, step)
    results = {"run": folder.path.name, "checkpoint": checkpoint.name, "dtype": dtype}
    card = model_card(folder.path.name, results=results, settings=folder.config.read_text(encoding="utf-8"))
    export_model(model, tokenizer, target, dtype=DTYPES[dtype], files={"README.md": card})
    print(f"{checkpoint.name} exported to {target}")
