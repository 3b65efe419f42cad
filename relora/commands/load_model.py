"""The model that a command is given: a run folder, or any folder or hub id with a Hugging Face model."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from relora.checkpoint.load import complete_checkpoints, open_states, step_of
from relora.checkpoint.run_folder import RunFolder, read_run_config
from relora.checkpoint.verify import checkpoint_problems
from relora.checkpoint.weights import merged_model
from relora.config import Config, UserError, raise_if_any
from relora.files import looks_like_a_path
from relora.model.model import first_lines, load_hf_config, without_cache
from relora.model.tasks import CausalLM, Task, task_of


def load(run_or_model: str, task: Task | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model (plain, float32, on the GPU if there is one) and its tokenizer.

    A run gives its newest checkpoint, every update merged.

    Args:
        task: what a model of no run is for (default: causal language modelling); a run's config names its own.

    Raises:
        UserError: nothing there, no complete checkpoint, or not a model.
    """
    folder = RunFolder(Path(run_or_model))
    model, tokenizer = load_run(folder) if folder.is_run else _load_plain(run_or_model, task or CausalLM())
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def load_run(folder: RunFolder, step: int | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model of a run from its newest checkpoint, or from that of `step`; UserError as `load`."""
    config = read_run_config(folder)
    checkpoint = find_checkpoint(folder, step)
    raise_if_any(checkpoint_problems(checkpoint))
    task = task_of(config)
    model = merged_model(open_states(checkpoint), config, load_hf_config(config.model, task), task)
    return model, AutoTokenizer.from_pretrained(folder.tokenizer)


def find_checkpoint(folder: RunFolder, step: int | None) -> Path:
    """The folder of a run's newest complete checkpoint, or of that of `step`; UserError if there is none."""
    checkpoints = complete_checkpoints(folder.checkpoints)
    if not checkpoints:
        raise UserError([f"{folder.path}: the run has no complete checkpoint yet"])
    if step is None:
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


def _load_plain(name: str, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a Hugging Face model by folder or hub id; UserError with the reason of transformers."""
    if not Path(name).is_dir() and (Path(name).exists() or looks_like_a_path(name)):
        raise UserError([f"{name}: there is no such folder"])
    try:
        model = task.auto_class.from_pretrained(name, dtype=torch.float32)
        return without_cache(model), AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever a model's own code may raise
        reason = first_lines(error) if Path(name).exists() else f"there is no such folder; {first_lines(error)}"
        raise UserError([f"{name}: neither a run folder nor a model that transformers can load ({reason})"]) from None
