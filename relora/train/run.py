"""A run: its settings, its model's config, its task, its data, its folder, and its newest state."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PretrainedConfig

from relora.checkpoint.load import checkpoint_problems, complete_checkpoints, open_checkpoint, read_manifest
from relora.checkpoint.run_folder import RunFolder
from relora.checkpoint.state import State
from relora.config import Config, ModelSection, UserError, raise_if_any
from relora.config.derived import fingerprint, identity, schedule_of
from relora.data import PreparedData
from relora.engines import is_first_on_node, launched_num_processes, launched_process_index, resume_problems
from relora.method.schedule import Schedule
from relora.method.usage import ModelUsage
from relora.model.tasks import Task


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


def run_identity(config: Config, hf_config: PretrainedConfig) -> dict[str, Any]:
    """The settings that make this run this run, the model's config among them."""
    settings = hf_config.to_dict()
    settings.pop("transformers_version", None)
    return identity(config, settings)


def newest_state(run: Run) -> State:
    """The state to resume from: that of the newest complete checkpoint, or a fresh one for a new run.

    A process whose index is beyond those that trained separately takes the state of one of them.

    Raises:
        UserError: the checkpoint is damaged, of another run, of other data, or needs another number of processes.
    """
    folders = complete_checkpoints(run.folder.checkpoints)
    if not folders:
        return State()
    newest, num_processes = folders[-1], launched_num_processes()
    manifest = read_manifest(newest)
    # Reading all files takes a while: one process of each node does it for all.
    raise_if_any(checkpoint_problems(newest) if is_first_on_node() else [])
    place, data = f"output_dir = {run.folder.path}", run.about["data"]
    if not run.folder.is_run and manifest.fingerprint != run.about["fingerprint"]:
        raise UserError([f"{place}: has lost its config.yaml and holds another run's checkpoints"])
    if manifest.data != data:
        hashes = f"was trained on data of hash {manifest.data[:12]}, these have {data[:12]}"
        reason = "the sources have changed, or how text becomes tokens (before release 0.2 it was data.add_bos = false)"
        raise UserError([f"{place}: {hashes}; {reason}"])
    raise_if_any(resume_problems(run.config, manifest.step, manifest.num_states, num_processes))
    return open_checkpoint(newest, state_index=launched_process_index() % manifest.num_states)
