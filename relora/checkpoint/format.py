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
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from relora.method.choices import StageName

FORMAT: Literal[2] = 2
MANIFEST = "MANIFEST.json"
BASE, QUANTIZED, BUFFERS, TRAINED, MOMENTS, EXTRA = "base", "quantized", "buffers", "trained", "moments", "extra"
# The groups in which each process that trains separately has tensors of its own.
PER_PROCESS = (TRAINED, MOMENTS)
# Frozen weights stand beside their quantized form: a name and a suffix.
QUANTIZED_SUFFIX = f":{QUANTIZED}"
TEMPORARY_PREFIX = ".tmp-"
# While a run lives, its status.json becomes no older than this: the time of its last change is a heartbeat.
BEAT_S = 10.0


class FileFacts(BaseModel):
    """One file: its group with the cycle ("base-00002"), its size and its hash."""

    group: str
    bytes: int
    sha256: str


class TensorManifest(BaseModel):
    """A manifest of tensors: the files, and the file of each tensor."""

    format: Literal[2] = FORMAT
    files: dict[str, FileFacts]
    tensors: dict[str, str]


class Manifest(TensorManifest):
    """The manifest of a checkpoint.

    Attributes:
        step: batches consumed.
        skipped: how many of them were skipped, as their loss or gradient was not finite.
        stage: the stage of the next update.
        cycle: restarts so far.
        steps: the optimizer's step count by parameter, of those that have one.
        num_states: processes that trained parameters of their own; 1 if all trained the same.
        evaluated: whether the evaluation that was due at this step, if any, has been made.
        fingerprint, data: of the run, and of the prepared data.
    """

    step: int
    skipped: int
    stage: StageName
    cycle: int
    steps: dict[str, float]
    num_states: int
    evaluated: bool = True
    fingerprint: str
    data: str


def format_problem(place: Path, number: object) -> str:
    """Report that `place` has the format `number`, which is not ours, and name the version that reads it."""
    if number == 1:
        return (
            f"{place}: checkpoint format 1, written by relora 0.1; finish or export the run with relora 0.1, or start "
            "anew from its final model with model.name_or_path"
        )
    return f"{place}: checkpoint format {number}, this version reads {FORMAT}"
