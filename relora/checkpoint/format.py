"""The format of a checkpoint folder, for writing and for reading.

MANIFEST.json beside safetensors files. A tensor belongs to one group, a file to one group too:

    base-<cycle>        frozen parameters, in their exact values; the checkpoints of a cycle share the files
    quantized-<cycle>   int8 and nf4 weights as stored, under their names + ":quantized"; shared likewise
    buffers             persistent buffers
    trained             trained parameters
    moments             optimizer moments, as "<parameter>:<slot>"
    extra               state of the engine (an outer optimizer)

Where processes train separately, `trained` and `moments` hold the tensors of each: the names of process n >= 1 begin
with "process-<n>/". All names are canonical, all shapes full.

Format 3 has the hash of each file in the manifest, and that of the manifest itself. Format 2, still read, lacks
the latter: of its manifest only what contradicts itself, the folder or the files is noticed. The hash has a number of
its own, and is no field that may be absent: damage that takes it away would make a manifest an old one.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from relora.engines.state_entry import STATE_PREFIX, state_prefix
from relora.files import sha256_of_json
from relora.method.choices import StageName

FORMAT: Literal[3] = 3
MANIFEST = "MANIFEST.json"
BASE, QUANTIZED, BUFFERS, TRAINED, MOMENTS, EXTRA = "base", "quantized", "buffers", "trained", "moments", "extra"
# The groups in which each process that trains separately has tensors of its own.
PER_PROCESS = (TRAINED, MOMENTS)
# Frozen weights stand beside their quantized form: a name and a suffix.
QUANTIZED_SUFFIX = f":{QUANTIZED}"
TEMPORARY_PREFIX = ".tmp-"
# While a run lives, its status.json becomes no older than this: the time of its last change is a heartbeat.
BEAT_S = 10.0
HASH = "sha256"  # the entry of a manifest with the hash of all others

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Group = Annotated[str, StringConstraints(pattern=r"^[a-z]{1,20}(-[0-9]{5,9})?$")]
Count = Annotated[int, Field(ge=0)]
StepLoss = Annotated[tuple[int, float], Field(strict=False)]  # a list in JSON


class Strict(BaseModel):
    """No unknown entries, no values of a similar type, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class FileFacts(Strict):
    """One file: its group with the cycle ("base-00002"), its size and its hash."""

    group: Group
    bytes: Count
    sha256: Sha256


class MetricsFacts(Strict):
    """metrics.jsonl as it was when the checkpoint was written: later lines only follow."""

    bytes: Count
    lines: Count
    sha256: Sha256


class LeftOut(Strict):
    """Training data that a run leaves out: the samples first <= i < end.

    Attributes:
        step, loss, limit: of the update whose loss was a spike: above `limit`.
        checkpoint: the step that the run went back to, 0 for its start.
    """

    first: Count
    end: Count
    step: Count
    loss: float
    limit: float
    checkpoint: Count

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.first >= self.end or self.checkpoint >= self.step:
            raise ValueError(f"the samples {self.first} to {self.end} are no range before step {self.step}")
        return self


class History(Strict):
    """What the updates of a run so far have told, but for their metrics.

    Attributes:
        skipped: updates that no process applied, as their loss or gradient was not finite, or their loss a spike.
        spikes: updates whose loss was a spike.
        losses: (step, loss) of the newest updates that were applied, by which the next one is judged.
        left_out: the training data that the run leaves out, as it has gone back for them.
    """

    skipped: Count = 0
    spikes: Count = 0
    losses: list[StepLoss] = []
    left_out: list[LeftOut] = []


class TensorManifest(Strict):
    """A manifest of tensors: the files, and the file of each tensor."""

    format: Literal[2, 3]
    files: dict[str, FileFacts]
    tensors: dict[str, str]
    sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if (self.sha256 is not None) != (self.format == FORMAT):
            raise ValueError(f"format {self.format} with{'out' if self.sha256 is None else ''} a hash of the manifest")
        for name, facts in self.files.items():
            if not re.fullmatch(rf"{facts.group}-[0-9]{{5,9}}\.safetensors", name):
                raise ValueError(f"{name[:80]!r} is no file of the group {facts.group[:80]!r}")
        differing = sorted(self.files.keys() ^ set(self.tensors.values()))
        if differing:
            raise ValueError(f"{differing[0][:80]!r} is listed without its tensors, or holds some without being listed")
        return self


class Manifest(History, TensorManifest):
    """The manifest of a checkpoint.

    Attributes:
        step: batches consumed.
        stage: the stage of the next update.
        cycle: restarts so far.
        steps: the optimizer's step count by parameter, of those that have one.
        num_states: processes that trained parameters of their own; 1 if all trained the same.
        evaluated: whether the evaluation that was due at this step, if any, has been made.
        metrics: the metrics file at this step; None where nobody recorded it.
        fingerprint, data: of the run, and of the prepared data.
    """

    step: Annotated[int, Field(ge=1)]
    skipped: Count
    stage: StageName
    cycle: Count
    steps: dict[str, float]
    num_states: Annotated[int, Field(ge=1)]
    evaluated: bool = True
    metrics: MetricsFacts | None = None
    fingerprint: str
    data: str

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        known = {f"{BASE}-{self.cycle:05d}", f"{QUANTIZED}-{self.cycle:05d}", BUFFERS, TRAINED, MOMENTS, EXTRA}
        groups = {facts.group for facts in self.files.values()}
        if not groups <= known or TRAINED not in groups:
            raise ValueError(f"files of the groups {', '.join(sorted(groups))[:80]} at cycle {self.cycle}")
        if self.skipped > self.step:
            raise ValueError(f"{self.skipped} of {self.step} updates were skipped")
        steps = [step for step, _ in self.losses]
        if steps != sorted(set(steps)) or max(steps, default=0) > self.step:
            raise ValueError("the losses are not those of earlier steps, in order")
        trained = self._names(TRAINED)
        moments = {name.rpartition(":")[0] for name in self._names(MOMENTS)}
        for index in range(1, self.num_states):
            prefix = state_prefix(index)
            theirs = ({n[len(prefix) :] for n in names if n.startswith(prefix)} for names in (trained, moments))
            if any(ours != own for ours, own in zip(theirs, (_own(trained), _own(moments)), strict=True)):
                raise ValueError(f"process {index} has other parameters than process 0")
        strangers = sorted((moments - trained) | (self.steps.keys() - trained))
        # Format 2 knew no optimizer that counts the steps of some parameters only.
        if self.format != FORMAT and self.steps:
            strangers += sorted(_own(moments) ^ self.steps.keys())
        if strangers:
            raise ValueError(
                f"the optimizer's state of {strangers[0][:80]!r} is incomplete, or of no trained parameter"
            )
        return self

    def _names(self, group: str) -> set[str]:
        """The names of the tensors in the files of `group`."""
        files = {name for name, facts in self.files.items() if facts.group == group}
        return {name for name, file in self.tensors.items() if file in files}


def _own(names: set[str]) -> set[str]:
    """Those of process 0."""
    return {name for name in names if not name.startswith(STATE_PREFIX)}


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest, or another JSON file of ours, with the hash of its other entries in it."""
    entries = {key: value for key, value in content.items() if key != HASH}
    return entries | {HASH: sha256_of_json(entries)}


def checkpoint_name(step: int) -> str:
    """The name of the folder of the checkpoint at `step`; folders of any other name are none of ours."""
    return f"step-{step:08d}"


def format_problem(place: Path, number: object) -> str:
    """Report that `place` has the format `number`, which is not ours, and name the version that reads it."""
    if number == 1:
        return (
            f"{place}: checkpoint format 1, written by relora 0.1; finish or export the run with relora 0.1, or start "
            "anew from its final model with model.name_or_path"
        )
    return f"{place}: checkpoint format {str(number)[:80]}, this version reads {FORMAT}"
