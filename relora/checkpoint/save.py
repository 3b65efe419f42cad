"""Write checkpoints from which any engine and any number of processes can resume.

A folder `step-00001000/` is complete if and only if MANIFEST.json is in it. It is written under a temporary name,
forced to the disk, and renamed. Frozen weights change only at restarts: their files are written once a cycle and
shared, by hard links, by the checkpoints of the cycle. Only safetensors and JSON are read back (`load.py`).

Training goes on as soon as the values are copied to host memory: a thread writes them, one checkpoint at a time. A disk
that fails costs a checkpoint and not the run.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from relora.checkpoint.folder_writer import MIB, FolderWriter, FrozenFiles, is_unchanged
from relora.checkpoint.format import (
    BASE,
    BUFFERS,
    EXTRA,
    MANIFEST,
    MOMENTS,
    QUANTIZED,
    QUANTIZED_SUFFIX,
    TEMPORARY_PREFIX,
    TRAINED,
    History,
    checkpoint_name,
)
from relora.checkpoint.host_copies import HostCopies
from relora.checkpoint.load import complete_checkpoints, last_step, read_manifest, step_of
from relora.checkpoint.weights import persistent_buffers
from relora.config import UserError
from relora.engines import Engine, TrainState
from relora.engines.state_entry import Entry
from relora.errors import Failed
from relora.files import DRAFTS, mount_point, remove
from relora.method.choices import StageName
from relora.method.lora import lora_layers
from relora.method.names import named_parameters

FIRST_CHECKPOINT_S = 20.0
MAX_FAILED_IN_A_ROW = 3


class Checkpoints:
    """The checkpoints of one run, newest last. All processes call `save`; the one with `writes` writes the files.

    Args:
        limit: number of newest checkpoints that stay; None for all.
        in_background: write in a thread of its own, from copies in host memory, instead of within `save`.
        warn: is told, in the thread that calls `save` or `wait`, of a checkpoint that could not be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        limit: int | None,
        writes: bool,
        in_background: bool = False,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.limit, self.writes = folder, limit, writes
        self._in_background, self._warn = in_background, warn
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copies = HostCopies(keep=writes)
        # The step, its writing, and the model while its frozen weights are being read: without its layers the store
        # would not find the exact masters.
        self._in_flight: tuple[int, Future[None], nn.Module | None] | None = None
        self._num_failed = 0  # in a row
        self._not_removed: OSError | None = None
        self._longest_s: float | None = None

    def save(
        self,
        train_state: TrainState,
        engine: Engine,
        step: int,
        *,
        history: History,
        stage: StageName,
        cycle: int,
        about: Mapping[str, Any],
    ) -> None:
        """Write the checkpoint of `step`, and remove those beyond the limit. Collective.

        Waits for the save before it, so that one is in flight at most. Until the next restart nothing else may write to
        frozen weights: they are read while they are written to the disk, where this process holds them whole.

        Args:
            history: what the updates so far have told.
            cycle: restarts so far: the frozen weights are those of this cycle.
            about: further entries of the manifest (fingerprint, hash of the data, evaluated, metrics).

        Raises:
            Failed: this is the third checkpoint in a row that the disk did not take. Of two before it `warn` was told.
        """
        self.wait()
        began_s = time.perf_counter()
        moments, steps = _optimizer_state(train_state, engine)
        groups = _groups(train_state, engine, cycle=cycle, moments=moments)
        names = f"{BASE}-{cycle:05d}", f"{QUANTIZED}-{cycle:05d}"
        frozen = FrozenFiles(names, self._with_frozen(stage, cycle, names))
        # Processes that write nothing still take part in reading: it is collective where parameters are sharded.
        [num_linking] = engine.world.sum([float(frozen.source is not None)])
        if num_linking:
            groups = {group: entries for group, entries in groups.items() if group not in frozen.groups}
        facts = {"step": step, "stage": stage, "cycle": cycle, "steps": steps, "num_states": engine.num_states}
        facts |= history.model_dump() | dict(about)
        write = partial(self._write, step, frozen=frozen, facts=facts, began_s=began_s)
        if not self._in_background:
            self._note(step, _fetching_all(write, groups))
            return
        copies = self._copies.take(groups)
        if self.writes:
            is_read = any(entry.is_constant for entries in copies.values() for entry in entries)
            self._in_flight = step, self._thread.submit(write, copies), train_state.model if is_read else None

    def wait(self) -> bool:
        """Wait for the save in flight, and return whether the newest checkpoint that was due is on the disk.

        Raises:
            Failed: as `save`.
        """
        if self._in_flight is not None:
            step, writing, _ = self._in_flight
            error, self._in_flight = writing.exception(), None
            self._note(step, error)
        return self._num_failed == 0

    def close(self) -> None:
        """Let the save in flight come to its end, whatever it is."""
        self._thread.shutdown(wait=True)

    def expected_seconds(self) -> float:
        """How long it may take until the next checkpoint is on the disk, by those before it; without any, a guess."""
        one_s = 1.5 * self._longest_s if self._longest_s is not None else FIRST_CHECKPOINT_S
        return one_s if self._in_flight is None else 2 * one_s

    def remove_leftovers(self) -> None:
        """Remove what killed processes have left: temporary names, drafts, checkpoints of older versions."""
        run, temporary = self.folder.parent, f"{TEMPORARY_PREFIX}*"
        for path in (*self.folder.glob(temporary), *run.glob(temporary), *run.glob(DRAFTS)):
            remove(path)
        newest = last_step(self.folder)
        for path in self.folder.glob("step-*"):
            step = step_of(path)
            if step is not None and step < newest and path.is_dir() and not (path / MANIFEST).exists():
                remove(path)

    def _with_frozen(self, stage: StageName, cycle: int, groups: Sequence[str]) -> Path | None:
        """The newest checkpoint if it is of this cycle and its frozen weights can be shared; None on other processes.

        The newest one alone: it was read as a whole when the run resumed from it, or this process wrote it.
        """
        for folder in complete_checkpoints(self.folder)[-1:] if self.writes else []:
            with suppress(UserError):  # damaged since: the files are written anew
                manifest = read_manifest(folder)
                if (manifest.stage, manifest.cycle) == (stage, cycle) and is_unchanged(folder, manifest, groups):
                    return folder
        return None

    def _write(
        self,
        step: int,
        groups: Mapping[str, Sequence[Entry]],
        *,
        frozen: FrozenFiles,
        facts: Mapping[str, Any],
        began_s: float,
    ) -> None:
        """Write a folder and remove those beyond the limit; where that fails, the new one stands nevertheless.

        Raises:
            OSError: the disk is full or fails. The temporary folder is gone then, so that it takes no room.
        """
        writer = FolderWriter(self.folder / checkpoint_name(step), writes=self.writes)
        try:
            writer.reserve(sum(entry.num_bytes for entries in groups.values() for entry in entries))
            writer.link(frozen)
            for group, entries in groups.items():
                writer.write(group, entries)
            writer.publish(facts)
        except OSError:
            shutil.rmtree(writer.temporary, ignore_errors=True)
            raise
        try:
            for folder in complete_checkpoints(self.folder)[: -self.limit] if self.writes and self.limit else []:
                # Under a temporary name first: a kill in between leaves no damaged checkpoint.
                doomed = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}")
                remove(doomed)
                remove(folder.rename(doomed))
        except OSError as error:
            self._not_removed = error
        self._longest_s = max(time.perf_counter() - began_s, self._longest_s or 0.0)

    def _note(self, step: int, error: BaseException | None) -> None:
        """Count the failures in a row; warn of a few, and end the run at the third."""
        if self._not_removed is not None:
            left, self._not_removed = self._not_removed, None
            place = left.filename or self.folder
            self._warn(
                f"after the checkpoint of step {step} an older one could not be removed: {place}: {left.strerror}"
            )
        if error is None:
            self._num_failed = 0
            return
        if not isinstance(error, OSError):
            raise error
        self._num_failed += 1
        disk = mount_point(self.folder)
        message = (
            f"the checkpoint of step {step} could not be written: {error.filename or self.folder}: {error.strerror} "
            f"(disk {disk}, {shutil.disk_usage(disk).free / MIB:,.0f} MiB free)"
        )
        if self._num_failed >= MAX_FAILED_IN_A_ROW:
            raise Failed(
                f"{message}; that is {self._num_failed} in a row, so the run stops. Make room, then the same command "
                f"resumes from step {last_step(self.folder)}"
            )
        self._warn(f"{message}; training goes on, a resume would begin at step {last_step(self.folder)}")


def write_stage_start(folder: Path, train_state: TrainState, engine: Engine, *, writes: bool) -> None:
    """Save the wrapped weights as they are at the beginning of the low-rank stage. Collective."""
    writer = FolderWriter(folder, writes=writes)
    layers = {f"{name}.weight": layer.weight for name, layer in lora_layers(train_state.model).items()}
    writer.write("weights", _parameters(engine, layers))
    writer.publish({})


def entry_of(name: str, tensor: Tensor) -> Entry:
    """An entry for a tensor that every process holds."""
    return Entry(name, tensor.shape, tensor.dtype, lambda: tensor)


def _fetching_all(
    write: Callable[[Mapping[str, Sequence[Entry]]], None], groups: Mapping[str, Sequence[Entry]]
) -> OSError | None:
    """Call `write`; where a disk fails in the middle, fetch the rest: the other processes take part in every fetch."""
    fetched = set[str]()

    def fetch(entry: Entry) -> Tensor:
        fetched.add(entry.name)
        return entry.fetch()

    noted = {group: [replace(e, fetch=partial(fetch, e)) for e in entries] for group, entries in groups.items()}
    try:
        write(noted)
    except OSError as error:
        for entry in (entry for entries in groups.values() for entry in entries if entry.name not in fetched):
            entry.fetch()
        return error
    return None


def _groups(
    train_state: TrainState, engine: Engine, *, cycle: int, moments: Sequence[Entry]
) -> dict[str, Sequence[Entry]]:
    """All tensors of a checkpoint by group, in the order in which they are written."""
    parameters = named_parameters(train_state.model)
    frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    return {
        f"{BASE}-{cycle:05d}": _parameters(engine, frozen),
        f"{QUANTIZED}-{cycle:05d}": _quantized(engine, train_state.model),
        BUFFERS: [entry_of(*item) for item in persistent_buffers(train_state.model).items()],
        TRAINED: engine.trained_entries(_parameters(engine, trained)),
        MOMENTS: engine.trained_entries(moments),
        EXTRA: [entry_of(*item) for item in engine.extra_state().items()],
    }


def _parameters(engine: Engine, parameters: Mapping[str, nn.Parameter]) -> list[Entry]:
    """The exact values of `parameters`, in full shape."""
    store, entries = engine.store, []
    for name, p in parameters.items():
        is_constant = not p.requires_grad and not store.master(p).is_partial
        entries.append(Entry(name, store.shape(p), store.dtype(p), partial(store.read, p), is_constant))
    return entries


def _quantized(engine: Engine, model: nn.Module) -> list[Entry]:
    """Quantized weights as they are stored: with a carried residual they do not follow from the master."""
    store = engine.store
    weights = {
        f"{name}.weight{QUANTIZED_SUFFIX}": layer.weight
        for name, layer in lora_layers(model).items()
        if layer.weight_format.is_quantized
    }
    return [
        Entry(name, store.raw_shape(p), p.dtype, partial(store.raw, p), is_constant=not store.local(p).is_partial)
        for name, p in weights.items()
    ]


def _optimizer_state(train_state: TrainState, engine: Engine) -> tuple[list[Entry], dict[str, float]]:
    """The moments as entries `<parameter>:<slot>`, and the step counts of parameters that have one."""
    store, optimizer = engine.store, train_state.optimizer
    moments, steps = list[Entry](), dict[str, float]()
    for name, p in named_parameters(train_state.model).items():
        if not p.requires_grad or not store.has_state(optimizer, p):
            continue
        for key, slot in store.slots(optimizer, p).items():
            fetch = partial(store.read_slot, optimizer, p, key)
            moments.append(Entry(f"{name}:{key}", slot.shape, slot.dtype, fetch))
        step: float | None = store.step(optimizer, p)
        if step is not None:
            steps[name] = step
    return moments, steps
