"""The model of a run, from a checkpoint and from what the run keeps besides: its tokenizer, and its model's own files.

A run that continues a pretrained model keeps all of it but the weights. So export, generation and evaluation need
nothing outside the run folder, and a setting that training does not read, such as those of sampling, is not lost.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import cached_file

from relora.checkpoint.format import TEMPORARY_PREFIX
from relora.checkpoint.load import open_states
from relora.checkpoint.run_folder import RunFolder
from relora.checkpoint.weights import merged_model
from relora.config import Config, UserError, raise_if_any
from relora.config.derived import tokenizer_of
from relora.config.yaml12 import parse
from relora.data import PreparedData
from relora.data.tokenizer import read_tokenizer
from relora.files import publish_folder, remove
from relora.model.model import load_hf_config
from relora.model.tasks import Task

CONFIG, GENERATION = "config.json", "generation_config.json"


@dataclass(frozen=True)
class RunModel:
    """A plain model in float32 on the CPU, its tokenizer, and the content of its generation_config.json.

    Attributes:
        generation: None for a model that has no settings of its own.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    generation: dict[str, Any] | None


def keep_files(folder: RunFolder, config: Config, data: PreparedData) -> None:
    """Save the tokenizer of a run, and of a pretrained model its config, its settings of generation and its code.

    The tokenizer is the one that the configuration names: that of the prepared data has the same tokens, but may have
    been prepared for a model with another chat template.

    Raises:
        UserError: the tokenizer cannot be read any more.
    """
    tokenizer, wanted = data.tokenizer(), tokenizer_of(config)
    if wanted["tokenizer"] is not None:
        name = wanted.pop("tokenizer")
        given, problems = read_tokenizer(name, key="data.tokenizer", **wanted)
        raise_if_any(problems)
        tokenizer = given or tokenizer
    draft = folder.path / f"{TEMPORARY_PREFIX}{folder.tokenizer.name}"
    remove(draft)
    tokenizer.save_pretrained(draft)
    publish_folder(draft, folder.tokenizer)
    if config.model.name_or_path is not None:
        _keep_model_files(folder, config)


def load_run_model(folder: RunFolder, checkpoint: Path, config: Config, task: Task) -> RunModel:
    """The model of a checkpoint, every low-rank update merged; the files that the run began with may be gone.

    Raises:
        UserError: the checkpoint cannot be read, or is of another model.
    """
    trust = config.model.trust_remote_code
    model = merged_model(open_states(checkpoint), config, read_kept_config(folder, config, task), task)
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(  # nosec B615  # a folder of the run, never the hub
        str(folder.tokenizer), trust_remote_code=trust, local_files_only=True
    )
    kept, generation = folder.model / GENERATION, None
    if kept.is_file():
        try:
            generation = dict(json.loads(kept.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError([f"{kept}: is damaged ({error}); the next start of the run writes it again"]) from None
    ids = token_ids(model.config.to_dict(), tokenizer, config)
    if generation is not None:
        generation |= token_ids(generation, tokenizer, config)
    for settings, values in ((model.config, ids), (model.generation_config, ids | (generation or {}))):
        for name in ids if settings is not None else ():
            setattr(settings, name, values[name])
    return RunModel(model, tokenizer, generation)


def read_kept_config(folder: RunFolder, config: Config, task: Task) -> PretrainedConfig:
    """The Hugging Face config of a run's model, as the run read it when it began."""
    trust = config.model.trust_remote_code
    if config.model.name_or_path is None:
        return load_hf_config(config.model, task)
    if (folder.model / CONFIG).is_file():
        return AutoConfig.from_pretrained(  # nosec B615  # a folder of the run, never the hub
            str(folder.model), trust_remote_code=trust, local_files_only=True
        )
    # A run of an earlier version kept the settings alone.
    settings = parse(folder.config.read_text(encoding="utf-8"))["derived"]["identity"]["model.config"]
    if settings["model_type"] in CONFIG_MAPPING:
        return CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
    return load_hf_config(config.model, task)


def token_ids(known: Mapping[str, Any], tokenizer: Tokenizer, config: Config) -> dict[str, int | list[int]]:
    """The ids of BOS, EOS and padding of a run's model.

    A config from scratch does not know the tokenizer, and generation would not end at its EOS. A pretrained model keeps
    its own ids, of which several may end a text; the EOS of the training data is added to them.

    Args:
        known: the ids in the model's config, or in its generation_config.json.
    """
    is_pretrained, is_own = config.model.name_or_path is not None, config.data.tokenizer is None
    ids: dict[str, int | list[int]] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        before, of_tokenizer = known.get(name), getattr(tokenizer, name)
        candidates = before if isinstance(before, list) else [before]
        # Of another tokenizer than the model's, the same number may be any token.
        kept = [i for i in candidates if is_pretrained and (is_own or i in tokenizer.added_tokens_decoder)]
        together = [i for i in dict.fromkeys([*kept, of_tokenizer]) if i is not None]
        if together:
            ids[name] = together if name == "eos_token_id" and len(together) > 1 else together[0]
    return ids


def _keep_model_files(folder: RunFolder, config: Config) -> None:
    """Copy the files of a pretrained model that hold no weights to the run folder."""
    name, revision = str(config.model.name_or_path), config.model.revision
    draft = folder.path / f"{TEMPORARY_PREFIX}{folder.model.name}"
    remove(draft)
    draft.mkdir()
    for file in (CONFIG, GENERATION):
        found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            shutil.copyfile(found, draft / file)
            if file == CONFIG and config.model.trust_remote_code:
                for code in Path(found).parent.glob("*.py"):
                    shutil.copyfile(code, draft / code.name)
    publish_folder(draft, folder.model)
