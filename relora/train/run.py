"""What a run is, settled before any process group exists and any model is built.

Mistakes are told phase by phase, all of a phase at once: the configuration (at load), the files and the
launch, the model, the tokenizer and the data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from relora.checkpoint.load import Manifest, complete_checkpoints, open_checkpoint, read_manifest, verify_checkpoint
from relora.checkpoint.run_folder import RunFolder, same_run_problems
from relora.checkpoint.state import State
from relora.config import Config, ModelSection, UserError, raise_if_any
from relora.config.derived import accumulation_steps, fingerprint, identity, lora_config, schedule_of
from relora.config.load import shown
from relora.data import PreparedData, amount_problems, prepare
from relora.data import problems as problems_of_sources
from relora.engines import (
    check_world,
    is_first_on_node,
    launch_refusals,
    launched_num_processes,
    launched_process_index,
)
from relora.files import folder_problems
from relora.method.base_weights import quantization_problem
from relora.method.inject import find_modules, find_targets, inject_lora
from relora.method.parameter_report import parameter_report
from relora.method.schedule import Schedule
from relora.model.liger import liger_problems
from relora.model.model import load_hf_config, model_problems, refusal, said_of, skeleton
from relora.train.stages import freeze_untrained


@dataclass(frozen=True)
class Run:
    """One run: its settings, its model's config, its data, its folder."""

    config: Config
    hf_config: PretrainedConfig
    data: PreparedData
    folder: RunFolder
    identity: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        return int(self.hf_config.get_text_config().vocab_size)

    @property
    def schedule(self) -> Schedule:
        return schedule_of(self.config)

    @property
    def resolved_model(self) -> ModelSection:
        """The model's settings with the Hugging Face config in place of the path it was read from."""
        section = self.config.model
        if section.name_or_path is not None:
            return section
        return section.model_copy(update={"config": self.identity["model.config"]})

    @property
    def about(self) -> dict[str, Any]:
        """What every checkpoint says of the run it belongs to."""
        return {"fingerprint": fingerprint(self.identity), "data": self.data.manifest.content_hash}


def open_run(config: Config, *, extend: bool = False) -> Run:
    """Check everything that can be checked, and prepare the data if they are not there yet.

    Raises:
        UserError: all mistakes of the first phase that has any.
    """
    folder = RunFolder(Path(config.output_dir))
    hf_config = check_surroundings(config, folder, extend=extend, problems=launch_problems(config))
    raise_if_any(check_model(config, hf_config))
    data = prepare_data(config, hf_config)
    raise_if_any(amount_problems(data, config.data))
    return Run(config, hf_config, data, folder, run_identity(config, hf_config))


def launch_problems(config: Config) -> list[str]:
    """What is wrong with the processes that the launcher started."""
    num_processes = launched_num_processes()
    return [
        *launch_refusals(config, num_processes),
        *missing_libraries(config),
        *_problems_of(lambda: check_world(num_processes, config.training.num_processes)),
        *_problems_of(lambda: accumulation_steps(config, num_processes)),
    ]


def missing_libraries(config: Config) -> list[str]:
    """What the settings need that is not installed, with the line that installs it."""
    problem = quantization_problem(config.lora.base_dtype) if config.training.method != "full" else None
    return [f"lora.base_dtype = {problem}"] if problem else []


def check_surroundings(
    config: Config, folder: RunFolder, *, extend: bool, problems: Sequence[str] = ()
) -> PretrainedConfig:
    """Files and run folder, beside `problems` of the same phase; returns the Hugging Face config of the model."""
    found: list[PretrainedConfig] = []
    in_the_way = folder_problems(f"output_dir = {config.output_dir}", config.output_dir)
    problems = [
        *problems,
        *in_the_way,
        *problems_of_sources(config.data),
        *_problems_of(lambda: found.append(load_hf_config(config.model))),
    ]
    if found and not in_the_way:
        run = run_identity(config, found[0])
        problems += _problems_of(lambda: raise_if_any(same_run_problems(folder, run, extend=extend)))
    raise_if_any(problems)
    return found[0]


def check_model(config: Config, hf_config: PretrainedConfig) -> list[str]:
    """What does not fit the model: its positions, the targets, what would stay frozen and random for ever."""
    try:
        model = skeleton(config.model, hf_config)
    except Exception as error:  # each architecture raises as it pleases
        return [building_problem(config.model, hf_config, error)]
    problems = [*model_problems(model, config.data), *liger_problems(config.model, hf_config)]
    untrained = trainable_problems(config, model) if config.training.method == "full" else lora_problems(config, model)
    return [*problems, *untrained]


def building_problem(section: ModelSection, hf_config: PretrainedConfig, error: Exception) -> str:
    """Why the model cannot be built: for its attention kernel, if it can be built with another."""
    try:
        skeleton(section.model_copy(update={"attn_implementation": "eager"}), hf_config)
    except Exception:
        return f"{said_of(section)}: transformers cannot build the model: {refusal(error)}"
    return (
        f"model.attn_implementation = {section.attn_implementation}: cannot be used here, eager can: {refusal(error)}"
    )


def trainable_problems(config: Config, model: PreTrainedModel) -> list[str]:
    """Method full: what training.trainable leaves out, or cannot find. Freezes parameters of `model`."""
    found = _problems_of(lambda: freeze_untrained(model, config.training.trainable))
    return found or _random_for_ever(config, model, "training.trainable", config.training.trainable)


def lora_problems(config: Config, model: PreTrainedModel) -> list[str]:
    """What cannot be wrapped or saved, or would never be trained. Wraps the layers of `model`."""
    lora = lora_config(config)
    saved = lora.modules_to_save
    unknown = _problems_of(lambda: find_modules(model, saved)) if saved and saved != "rest" else []
    findable = replace(lora, modules_to_save=None) if unknown else lora
    found = [*unknown, *_problems_of(lambda: find_targets(model, findable))]
    if found:
        return [f"lora.{problem}" for problem in found]
    inject_lora(model, lora)
    if config.relora.warm_start_steps:
        return []  # the warm start trains every parameter
    return _random_for_ever(config, model, "lora.modules_to_save", config.lora.modules_to_save)


def prepare_data(config: Config, hf_config: PretrainedConfig) -> PreparedData:
    """The prepared data of the configuration, made now if they are missing. The tokenizer may be the model's own."""
    vocab_size = hf_config.get_text_config().vocab_size
    return prepare(
        config.data,
        vocab_size=vocab_size,
        tokenizer=config.data.tokenizer or config.model.name_or_path,
        trust_remote_code=config.model.trust_remote_code,
        quiet=not is_first_on_node(),
    )


def newest_state(job: Run) -> State:
    """The state to go on from; a fresh one for a new run. UserError if the checkpoint is damaged or of other data."""
    folders = complete_checkpoints(job.folder.checkpoints)
    if not folders:
        return State()
    if is_first_on_node():
        verify_checkpoint(folders[-1])
    manifest = read_manifest(folders[-1])
    if not job.folder.is_run and manifest.fingerprint != job.about["fingerprint"]:
        raise UserError(
            [f"output_dir = {job.folder.path}: has lost its config.yaml and holds another run's checkpoints"]
        )
    there, here = manifest.data, job.about["data"]
    if there != here:
        raise UserError(
            [
                f"output_dir = {job.folder.path}: was trained on data of hash {there[:12]}, these have {here[:12]}; "
                "the sources have changed"
            ]
        )
    return _share_of_this_rank(folders[-1], manifest, job)


def _share_of_this_rank(folder: Path, manifest: Manifest, job: Run) -> State:
    """What this rank goes on from. Between two restarts ranks that train apart must be as many as they were."""
    num_processes, saved = launched_num_processes(), manifest.num_shares
    apart = job.config.relora.sync == "restart" and manifest.stage == "low_rank"
    between = manifest.step != job.schedule.warm_start_steps and not job.schedule.restart_due(manifest.step)
    if apart and between and saved != num_processes:
        raise UserError(
            [
                f"{folder}: relora.sync = restart: holds what {saved} processes trained apart since the last restart, "
                f"and the launcher started {num_processes}; go on with {saved} up to the next restart"
            ]
        )
    return open_checkpoint(folder, share=launched_process_index() % saved)


def run_identity(config: Config, hf_config: PretrainedConfig) -> dict[str, Any]:
    settings = hf_config.to_dict()
    settings.pop("transformers_version", None)
    return identity(config, settings)


def _random_for_ever(config: Config, model: PreTrainedModel, key: str, value: Any) -> list[str]:
    names = parameter_report(model).frozen_names
    if not names or config.model.name_or_path is not None:
        return []
    shown_names = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return [
        f"{key} = {shown(value)}: {len(names)} parameters would keep their random values for ever, "
        f"frozen and neither wrapped nor pretrained: {shown_names}"
    ]


def _problems_of(check: Callable[[], object]) -> list[str]:
    """Run a check that raises; what it raised, as lines."""
    try:
        check()
    except UserError as error:
        return error.problems
    except ValueError as error:
        return str(error).splitlines()
    return []
