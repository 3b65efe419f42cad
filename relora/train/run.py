"""A run: its settings, its model's config, its task, its data, its folder, and its newest state."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PretrainedConfig

from relora.checkpoint.format import MANIFEST, History, LeftOut
from relora.checkpoint.load import complete_checkpoints, open_checkpoint, read_manifest
from relora.checkpoint.run_folder import RunFolder
from relora.checkpoint.run_model import keep_files
from relora.checkpoint.state import State
from relora.checkpoint.verify import checkpoint_problems, newest_whole, put_damaged_aside
from relora.config import Config, ModelSection, UserError, raise_if_any
from relora.config.derived import derived_numbers, fingerprint, identity, schedule_of
from relora.data import PreparedData
from relora.engines import (
    World,
    is_first_on_node,
    launched_num_processes,
    launched_process_index,
    resume_problems,
)
from relora.errors import warn
from relora.method.schedule import Schedule
from relora.method.usage import ModelUsage
from relora.model.tasks import Task
from relora.train.spikes import left_out_of


@dataclass(frozen=True)
class Run:
    """One run, checked (`preflight`); nothing of it is built yet.

    Attributes:
        hf_config: the Hugging Face config of the model.
        identity: the settings that change the result, flat by key.
        usage: how the model uses its layers and parameters.
    """

    config: Config
    hf_config: PretrainedConfig
    task: Task
    data: PreparedData
    folder: RunFolder
    identity: dict[str, Any]
    usage: ModelUsage

    @property
    def vocab_size(self) -> int:
        return int(self.hf_config.get_text_config().vocab_size)

    @cached_property
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
        """The entries of every checkpoint's manifest that tie it to this run."""
        return {"fingerprint": fingerprint(self.identity), "data": self.data.manifest.content_hash}


def run_identity(config: Config, hf_config: PretrainedConfig, saved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings that make this run this run, the model's config among them.

    Args:
        saved: the identity that the run in the folder was begun with. Another release of transformers may have other
            keys in the config of the same model. So the saved config stays the run's, if this release reads it as it
            reads the config that is given now.
    """
    settings = hf_config.to_dict()
    settings.pop("transformers_version", None)
    there = (saved or {}).get("model.config")
    if isinstance(there, dict):
        with suppress(Exception):  # each architecture raises as it pleases: then the config is not the same
            reread = type(hf_config).from_dict(there).to_dict()
            reread.pop("transformers_version", None)
            if json.dumps(reread, sort_keys=True) == json.dumps(settings, sort_keys=True):
                settings = there
    return identity(config, settings)


def write_settings(run: Run, num_processes: int) -> None:
    """Write what a run folder needs beside checkpoints for a resume, an export and a reader."""
    folder, config = run.folder, run.config
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    numbers = derived_numbers(config, num_processes)
    settings = config.model_copy(update={"model": run.resolved_model})
    keep_files(folder, config, run.data)
    folder.write_config(settings, identity=run.identity, numbers=numbers)


def newest_state(run: Run, world: World, *, strict: bool = False, may_change: bool = False) -> State:
    """The state to resume from: that of the newest whole checkpoint, or a fresh one for a new run. Collective.

    The first process looks, decides for all, and sets damaged checkpoints aside. A process whose index is beyond those
    that trained separately takes the state of one of them.

    Args:
        strict: a damaged checkpoint is an error, although one before it is whole.
        may_change: this launch holds the lock of the run folder.

    Raises:
        UserError: no checkpoint is whole, or the one to resume from is of another run, of other data, or needs another
            number of processes. All processes raise it.
    """
    name, problems, left_out = None, list[str](), list[LeftOut]()
    if world.process_index == 0:
        try:
            left_out = left_out_of(run.folder, may_change=may_change)
            name = _place_to_resume(run, strict=strict, may_rename=may_change)
        except UserError as error:
            problems = error.problems
    name, problems, left_out = world.gather((name, problems, left_out))[0]
    raise_if_any(problems)
    # Where the first process has none, one that sees another disk takes its own: the states are compared afterwards.
    own = [folder.name for folder in complete_checkpoints(run.folder.checkpoints)]
    folder = run.folder.checkpoints / (name or (own or [""])[-1])
    is_there, is_other_node = (folder / MANIFEST).is_file(), is_first_on_node() and world.process_index != 0
    # The first process has read all files; each other node has a look of its own.
    found = world.gather(checkpoint_problems(folder) if is_there and is_other_node else [])
    raise_if_any(problem for problems in found for problem in problems)
    if not is_there:
        return State(history=History(left_out=left_out))
    state = open_checkpoint(folder, state_index=launched_process_index() % read_manifest(folder).num_states)
    return replace(state, history=state.history.model_copy(update={"left_out": left_out}))


def check_agreement(run: Run, world: World, state: State) -> None:
    """UserError if the processes hold different data or settings, or would resume from different states."""
    if not world.all_equal(run.data.manifest.content_hash):
        raise UserError(["data: the processes of this launch hold different prepared data; compare the sources"])
    usage = [sorted(run.usage.unfit), sorted(run.usage.idle)]
    settings = [run.about["fingerprint"], run.config.training.per_device_batch_size, usage]
    if not world.all_equal(json.dumps([*settings, state.stage, state.step, state.history.model_dump()])):
        raise UserError(
            [
                f"output_dir = {run.config.output_dir}: the processes of this launch have different settings, or see "
                "different checkpoints; it must be one folder on a disk that all nodes share"
            ]
        )


def _place_to_resume(run: Run, *, strict: bool, may_rename: bool) -> str | None:
    """The name of the newest whole checkpoint, None if there is no checkpoint; errors as `newest_state`."""
    newest, place = newest_whole(run.folder.checkpoints), f"output_dir = {run.folder.path}"
    if newest.damaged and strict:
        raise UserError([f"{place}: damaged: {newest.explain()}; without --strict the run resumes from the one before"])
    if newest.folder is None:
        return None
    manifest, data = read_manifest(newest.folder), run.about["data"]
    if not run.folder.is_run and manifest.fingerprint != run.about["fingerprint"]:
        raise UserError([f"{place}: has lost its config.yaml and holds another run's checkpoints"])
    if manifest.data != data:
        hashes = f"was trained on data of hash {manifest.data[:12]}, these have {data[:12]}"
        reason = "the sources have changed, or how text becomes tokens (before release 0.2 it was data.add_bos = false)"
        raise UserError([f"{place}: {hashes}; {reason}"])
    raise_if_any(resume_problems(run.config, manifest.step, manifest.num_states, launched_num_processes()))
    if may_rename:
        put_damaged_aside(newest)
    elif newest.damaged:
        warn(f"{place}: damaged: {newest.explain()}; the run would resume from {newest.folder.name}")
    return newest.folder.name
