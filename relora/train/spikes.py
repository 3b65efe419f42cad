"""A spike of the loss, and the way back: to a checkpoint before it, and past the data that it came from.

    RUN/skipped_data.json    the training data that the run leaves out, oldest first, with the spike of each

A checkpoint's manifest lists what the run left out on its way there. So one that lacks an entry of the file, and lies
past the checkpoint that the run went back to, is of a way that was given up.
"""

from dataclasses import dataclass

from pydantic import ValidationError

from relora.checkpoint.format import LeftOut, sealed
from relora.checkpoint.load import complete_checkpoints, read_manifest, step_of
from relora.checkpoint.run_folder import RunFolder
from relora.config import UserError
from relora.engines import World
from relora.errors import Failed, warn
from relora.files import json_of, remove, set_aside, write_json

NUM_LEFT_OUT = 10  # batches: what a spike comes from may lie in those before it
MAX_RETURNS = 3  # to one checkpoint


@dataclass(frozen=True)
class Spike:
    """An update whose loss is far above those before it.

    Attributes:
        step: the step that it led to.
        limit: the largest loss that would have been no spike.
        first, end: the training samples first <= i < end are its batch and the nine before it.
    """

    step: int
    loss: float
    limit: float
    first: int
    end: int


class SpikeError(Exception):
    """The run has to go back to a checkpoint before `spike`."""

    def __init__(self, spike: Spike) -> None:
        super().__init__(f"step {spike.step}: the loss {spike.loss:.4f} is a spike")
        self.spike = spike


def go_back(folder: RunFolder, world: World, spike: Spike) -> None:
    """Record that the data of `spike` are left out from the newest checkpoint before them on. Collective.

    The next `newest_state` begins there.

    Raises:
        Failed: the run has gone back to that checkpoint three times already.
    """
    told: tuple[bool, str] | None = None
    if world.process_index == 0:
        known = read_left_out(folder)
        steps = [step_of(path) or 0 for path in complete_checkpoints(folder.checkpoints)]
        checkpoint = max((step for step in steps if step <= spike.step - NUM_LEFT_OUT), default=0)
        place = f"the checkpoint of step {checkpoint}" if checkpoint else "its start"
        about = f"step {spike.step}: the loss {spike.loss:.4f} is a spike, above {spike.limit:.4f}"
        may_return = sum(entry.checkpoint == checkpoint for entry in known) < MAX_RETURNS
        if may_return:
            write_left_out(folder, [*known, LeftOut(**vars(spike), checkpoint=checkpoint)])
            told = True, f"{about}; the run goes back to {place}, without the samples {spike.first} to {spike.end - 1}"
        else:
            told = False, f"{about}; the run has gone back to {place} {MAX_RETURNS} times, which has not helped"
    may_return, line = world.gather(told)[0] or (False, "")
    if not may_return:
        raise Failed(f"{line}; try a lower learning rate, or look at the data there ({folder.skipped_data.name})")
    if world.process_index == 0:
        print(line, flush=True)


def left_out_of(folder: RunFolder, *, may_change: bool) -> list[LeftOut]:
    """What the run leaves out, by its file and by its checkpoints, which each make up for a loss of the other.

    Args:
        may_change: remove the checkpoints of ways that were given up, and write the file again where it lacks entries.
    """
    in_file, known = read_left_out(folder, may_change=may_change), list[LeftOut]()
    for path in complete_checkpoints(folder.checkpoints):
        try:
            manifest = read_manifest(path)
        except UserError:
            continue  # damaged: whoever resumes deals with that
        known += manifest.left_out
        given_up = [entry for entry in in_file if entry not in manifest.left_out and manifest.step > entry.checkpoint]
        if given_up and may_change:
            remove(path)
    found = list(dict.fromkeys([*known, *in_file]))
    if found != in_file and may_change:
        warn(f"{folder.skipped_data} lacks entries that the checkpoints have; it is written again")
        write_left_out(folder, found)
    return found


def read_left_out(folder: RunFolder, *, may_change: bool = True) -> list[LeftOut]:
    """The entries of skipped_data.json, none without it; where it is damaged it is set aside, with a warning."""
    path = folder.skipped_data
    if not path.is_file():
        return []
    try:
        content = json_of(path.read_bytes())
        if sealed(content) != content:
            raise ValueError("its hash differs")
        return [LeftOut.model_validate(entry) for entry in content["left_out"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        kept = f"; it is kept as {set_aside(path).name}" if may_change else ""
        warn(f"{path} is damaged ({str(error).splitlines()[0]}){kept}")
        return []


def write_left_out(folder: RunFolder, entries: list[LeftOut]) -> None:
    """Write skipped_data.json, with a hash of itself."""
    write_json(folder.skipped_data, sealed({"left_out": [entry.model_dump() for entry in entries]}))
