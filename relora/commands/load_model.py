"""The model that a command is given: a run folder, or any folder or hub id with a Hugging Face model."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from relora.checkpoint.format import MANIFEST
from relora.checkpoint.load import complete_checkpoints, step_of
from relora.checkpoint.run_folder import RunFolder, read_run_config
from relora.checkpoint.run_model import RunModel, load_run_model
from relora.checkpoint.verify import checkpoint_problems
from relora.config import Config, UserError, raise_if_any
from relora.files import missing_folder
from relora.model.model import reason_of, without_cache
from relora.model.pretrained import folder_problems, weight_problems
from relora.model.tasks import CausalLM, Task, task_of


def load(
    run_or_model: str, task: Task | None = None, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model (plain, float32, on the GPU if there is one) and its tokenizer.

    A run gives its newest checkpoint, every update merged.

    Args:
        task: what a model of no run is for (default: causal language modelling); a run's config names its own.
        trust_remote_code: run code that comes with a model of no run; a run's config says it for its own.

    Raises:
        UserError: nothing there, no complete checkpoint, or not a model.
    """
    folder = RunFolder(Path(run_or_model))
    if folder.is_run:
        loaded = load_run(folder, find_checkpoint(folder, None), read_run_config(folder))
        model, tokenizer = loaded.model, loaded.tokenizer
    else:
        run = run_of(run_or_model)  # code that the run was told to run comes with the model in its folder
        trusted = trust_remote_code or (run is not None and run.model.trust_remote_code)
        model, tokenizer = _load_plain(run_or_model, task or CausalLM(), trust_remote_code=trusted)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def load_run(folder: RunFolder, checkpoint: Path, config: Config) -> RunModel:
    """Load the model of a checkpoint after its files have been checked; UserError as `load`."""
    raise_if_any(checkpoint_problems(checkpoint))
    return load_run_model(folder, checkpoint, config, task_of(config))


def find_checkpoint(folder: RunFolder, step: int | None) -> Path:
    """The folder of a run's newest checkpoint, or of that of `step`; UserError if it is not there, or not complete."""
    checkpoints = complete_checkpoints(folder.checkpoints)
    if not checkpoints:
        raise UserError([f"{folder.path}: the run has no complete checkpoint yet"])
    if step is None:
        newest = max(folder.checkpoints.glob("step-*"), key=lambda path: step_of(path) or 0)
        if newest != checkpoints[-1]:  # a save is renamed when it is complete: something was removed since
            before = checkpoints[-1]
            remedy = (
                f"`relora train` resumes from {before.name}, `relora export --step {step_of(before)}` writes that one"
            )
            raise UserError([f"{newest}: is damaged ({MANIFEST} is missing); {remedy}"])
        return checkpoints[-1]
    by_step = {step_of(path): path for path in checkpoints}
    if step not in by_step:
        raise UserError([f"--step {step}: the run has checkpoints at {', '.join(map(str, by_step))}"])
    return by_step[step]


def run_of(run_or_model: str) -> Config | None:
    """The configuration of a run, given its folder or a model folder inside of it; None for any other model."""
    path = Path(run_or_model)
    run = next((RunFolder(p) for p in (path, path.resolve().parent) if RunFolder(p).is_run), None)
    return read_run_config(run) if run is not None else None


def _load_plain(name: str, task: Task, *, trust_remote_code: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a Hugging Face model by folder or hub id; UserError with the reason of transformers."""
    missing, path = missing_folder(name), Path(name)
    if missing is not None:
        raise UserError([f"{name}: {missing}"])
    if path.is_dir():
        raise_if_any(folder_problems(name, path) or weight_problems(name, path))
    try:
        model = task.auto_class.from_pretrained(name, dtype=torch.float32, trust_remote_code=trust_remote_code)
        # A hub id here is one that the user has just typed, with or without leave for its code.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)  # nosec B615  # see above
        return without_cache(model), tokenizer
    except Exception as error:  # whatever a model's own code may raise
        remedy = "generate --trust-remote-code, or model.trust_remote_code = true in the --config of eval"
        reason = reason_of(error, remedy=remedy)
        if not Path(name).exists():
            reason = f"there is no such folder; {reason}"
        raise UserError([f"{name}: neither a run folder nor a model that transformers can load ({reason})"]) from None
