"""Every check before processes join and a model is built, phase by phase, all problems of a phase together.

0. the configuration itself, when it is loaded
1. the launch, the files, the run folder
2. the model: its positions, how it uses its layers, those to wrap, the parameters that would never be trained
3. the tokenizer and the data, which are prepared now if they are not there yet

Each room says what is wrong with its part: `problems(...) -> list[str]`. One check comes later, as it needs weights:
whether the attention of the model leaks (`Task.leaks`).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

import relora.data
import relora.engines
import relora.method.inject
import relora.model.model
from relora.checkpoint.run_folder import RunFolder, run_folder_problems, saved_identity
from relora.config import Config, raise_if_any
from relora.config.derived import lora_config, tokenizer_of
from relora.config.yaml12 import format_value
from relora.data import PreparedData, amount_problems, prepare
from relora.engines import is_first_on_node, launched_num_processes
from relora.files import write_problems
from relora.method.base_weights import quantization_problem
from relora.method.parameter_report import parameter_report
from relora.method.registry import object_problems
from relora.method.reinit import REINITS, Reinit
from relora.method.reset import RESETS, Reset
from relora.method.triton_extra import kernels_problem
from relora.method.usage import ModelUsage, usage_in_source
from relora.model.model import read_hf_config, read_skeleton
from relora.model.probe import probe
from relora.model.tasks import Task, task_of
from relora.tracking.tracker import sink_problems
from relora.train.run import Run, run_identity
from relora.train.stages import freeze_untrained


def preflight(config: Config, *, extend: bool = False) -> Run:
    """Check everything that can be checked, and prepare the data if they are not there yet.

    Args:
        extend: the run in the folder may have a smaller training.max_steps.

    Raises:
        UserError: all problems of the first phase that has any.
    """
    task, folder = task_of(config), RunFolder(Path(config.output_dir))
    hf_config = _read_files(config, task, folder, extend=extend, launch=launch_problems(config))
    usage, problems = check_model(config, hf_config, task)
    raise_if_any(problems)
    data = _prepared_data(config, hf_config)
    identity = run_identity(config, hf_config, saved_identity(folder))
    return Run(config, hf_config, task=task, data=data, folder=folder, identity=identity, usage=usage)


def prepare_data(config: Config) -> PreparedData:
    """The data of `config`, prepared now if they are not there yet, whatever the launch and whether the model fits.

    Raises:
        UserError: as `preflight`.
    """
    hf_config = _read_files(config, task_of(config), RunFolder(Path(config.output_dir)), extend=True, launch=())
    return _prepared_data(config, hf_config)


def launch_problems(config: Config) -> list[str]:
    """Problems of the processes that the launcher started, of named objects, and libraries that are missing."""
    lora, is_low_rank = config.lora, config.training.method != "full"
    quantized = quantization_problem(lora.base_dtype) if is_low_rank else None
    kernels = kernels_problem(lora.kernels) if is_low_rank else None
    return [
        *relora.engines.problems(config, launched_num_processes()),
        *object_problems("relora.reinit", config.relora.reinit, REINITS, Reinit),  # type: ignore[type-abstract]
        *object_problems("relora.optimizer_reset", config.relora.optimizer_reset, RESETS, Reset),  # type: ignore[type-abstract]
        *sink_problems(config.training.report_to),
        *([f"lora.base_dtype = {quantized}"] if quantized else []),
        *([f"lora.{kernels}"] if kernels else []),
    ]


def check_model(config: Config, hf_config: PretrainedConfig, task: Task) -> tuple[ModelUsage, list[str]]:
    """How the model uses its layers, and the settings that do not fit it, tried on a copy of it without memory."""
    model, problems = read_skeleton(config.model, hf_config, task)
    if model is None:
        return ModelUsage(), problems
    problems = relora.model.model.problems(model, config, task)
    usage = usage_in_source(model) if problems else probe(config, hf_config, task)
    problems += [f"model: {problem}" for problem in usage.problems()]
    if config.training.method == "full":
        return usage, problems + _trainable_problems(config, model, usage)
    return usage, problems + _lora_problems(config, model, replace(usage, written=()))


def _read_files(
    config: Config, task: Task, folder: RunFolder, *, extend: bool, launch: Sequence[str]
) -> PretrainedConfig:
    """Phase 1, with the problems of the launch; returns the Hugging Face config of the model."""
    hf_config, unreadable = read_hf_config(config.model, task)
    in_the_way = write_problems(f"output_dir = {config.output_dir}", config.output_dir)
    identity = None if hf_config is None else run_identity(config, hf_config, saved_identity(folder))
    other_run = [] if in_the_way else run_folder_problems(folder, identity, extend=extend)
    raise_if_any([*launch, *in_the_way, *relora.data.problems(config.data), *unreadable, *other_run])
    assert hf_config is not None
    return hf_config


def _prepared_data(config: Config, hf_config: PretrainedConfig) -> PreparedData:
    """Phase 3. Without data.tokenizer the tokenizer is that of a pretrained model, or one is trained."""
    data = prepare(
        config.data,
        vocab_size=hf_config.get_text_config().vocab_size,
        quiet=not is_first_on_node(),
        **tokenizer_of(config),
    )
    raise_if_any(amount_problems(data, config.data))
    return data


def _trainable_problems(config: Config, model: PreTrainedModel, usage: ModelUsage) -> list[str]:
    """Method full: training.trainable matches nothing, or leaves random parameters out. Freezes parameters."""
    trainable = config.training.trainable
    try:
        freeze_untrained(model, trainable, usage)
    except ValueError as error:
        return [str(error)]
    return _random_problems(config, model, usage, "training.trainable", trainable)


def _lora_problems(config: Config, model: PreTrainedModel, usage: ModelUsage) -> list[str]:
    """Layers that cannot be wrapped or saved, or would never be trained. Wraps the layers of `model`."""
    lora = lora_config(config)
    problems = relora.method.inject.problems(model, lora, usage)
    if problems:
        return [f"lora.{problem}" for problem in problems]
    if config.relora.warm_start_steps:
        return []  # the warm start trains every parameter
    relora.method.inject.inject_lora(model, lora, usage=usage)
    return _random_problems(config, model, usage, "lora.modules_to_save", config.lora.modules_to_save)


def _random_problems(config: Config, model: PreTrainedModel, usage: ModelUsage, key: str, value: Any) -> list[str]:
    """Parameters of a model from scratch that nothing ever trains, though the loss depends on them."""
    names = [name for name in parameter_report(model).frozen_names if name not in usage.idle | usage.frozen]
    if not names or config.model.name_or_path is not None:
        return []
    listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return [
        f"{key} = {format_value(value)}: {len(names)} parameters would stay at their random initialization: they are "
        f"frozen, not wrapped and not pretrained: {listed}"
    ]
