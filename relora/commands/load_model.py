"""The model that a command is given: a run folder, or any folder or hub id with a Hugging Face model."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from relora.checkpoint.load import checkpoint_problems, complete_checkpoints, open_states
from relora.checkpoint.run_folder import RunFolder
from relora.checkpoint.weights import merged_model
from relora.config import Config, UserError, load_config, raise_if_any
from relora.config.derived import lora_config
from relora.model.model import load_hf_config, looks_like_a_path, refusal


def load(run_or_model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (plain, float32, on the GPU if there is one) and tokenizer.

    A run gives its newest checkpoint, every update merged.

    Raises:
        UserError: nothing there, no complete checkpoint, or not a model.
    """
    folder = RunFolder(Path(run_or_model))
    model, tokenizer = load_run(folder) if folder.is_run else _load_plain(run_or_model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def load_run(folder: RunFolder, step: int | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a run at its newest checkpoint, or at the one of `step`."""
    config = load_config(folder.config)
    checkpoint = find_checkpoint(folder, step)
    raise_if_any(checkpoint_problems(checkpoint))
    hf_config = load_hf_config(config.model)
    model = merged_model(open_states(checkpoint), config.model, hf_config, lora_config(config))
    return model, AutoTokenizer.from_pretrained(folder.tokenizer)


def find_checkpoint(folder: RunFolder, step: int | None) -> Path:
    checkpoints = complete_checkpoints(folder.checkpoints)
    if not checkpoints:
        raise UserError([f"{folder.path}: the run has no complete checkpoint yet"])
    if step is None:
        return checkpoints[-1]
    names = {path.name: path for path in checkpoints}
    wanted = f"step-{step:08d}"
    if wanted not in names:
        steps = ", ".join(str(int(name.removeprefix("step-"))) for name in names)
        raise UserError([f"--step {step}: the run has checkpoints at {steps}"])
    return names[wanted]


def run_of(run_or_model: str) -> Config | None:
    """The configuration of the run that a run folder, or a model folder in one, belongs to."""
    path = Path(run_or_model)
    run = next((RunFolder(p) for p in (path, path.resolve().parent) if RunFolder(p).is_run), None)
    return load_config(run.config) if run is not None else None


def _load_plain(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not Path(name).is_dir() and (Path(name).exists() or looks_like_a_path(name)):
        raise UserError([f"{name}: there is no such folder"])
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        # With a cache transformers does not keep packed documents apart; generation asks for one itself.
        model.config.use_cache = False
        return model, AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever a model's own code may raise
        reason = refusal(error) if Path(name).exists() else f"there is no such folder; {refusal(error)}"
        raise UserError([f"{name}: neither a run folder nor a model that transformers can load ({reason})"]) from None
