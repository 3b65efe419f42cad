"""Write checkpoints from which any engine and any number of processes can resume.

A folder `step-00001000/` is complete if and only if MANIFEST.json is in it. It is written under a temporary name,
forced to the disk, and renamed. Frozen weights change only at restarts: their files are written once a cycle and
shared, by hard links, by the checkpoints of the cycle. Only safetensors and JSON are read back (`load.py`).
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from relora.checkpoint.format import (
    BASE,
    BUFFERS,
    EXTRA,
    FORMAT,
    MANIFEST,
    MOMENTS,
    QUANTIZED,
    QUANTIZED_SUFFIX,
    TEMPORARY_PREFIX,
    TRAINED,
    FileFacts,
)
from relora.checkpoint.load import complete_checkpoints, read_manifest
from relora.checkpoint.safetensors_stream import write_tensors
from relora.checkpoint.weights import persistent_buffers
from relora.engines import Engine, TrainState
from relora.engines.state_entry import Entry
from relora.files import publish_folder, share, write_json
from relora.method.choices import StageName
from relora.method.lora import lora_layers
from relora.method.names import named_parameters

SHARD_BYTES = 2**30
FIRST_CHECKPOINT_S = 20.0


class Checkpoints:
    """The checkpoints of one run, newest last. All processes call `save`; the one with `writes` writes the files."""

    def __init__(self, folder: Path, *, limit: int | None, writes: bool) -> None:
        self.folder, self.limit, self.writes = folder, limit, writes
        self._longest_s: float | None = None

    def save(
        self,
        train_state: TrainState,
        engine: Engine,
        step: int,
        *,
        skipped: int,
        stage: StageName,
        cycle: int,
        about: Mapping[str, Any],
    ) -> None:
        """Write the checkpoint of `step`, and remove those beyond the limit. Collective.

        Args:
            skipped: batches skipped so far.
            cycle: restarts so far: the frozen weights are those of this cycle.
            about: further entries of the manifest (fingerprint, hash of the data, evaluated).
        """
        final, start_s = self.folder / f"step-{step:08d}", time.perf_counter()
        writer = FolderWriter(final, writes=self.writes)
        self._write_frozen(writer, train_state.model, engine, stage=stage, cycle=cycle)
        writer.write(BUFFERS, [entry_of(*item) for item in persistent_buffers(train_state.model).items()])
        trained = {name: p for name, p in named_parameters(train_state.model).items() if p.requires_grad}
        moments, steps = _optimizer_state(train_state, engine, trained)
        writer.write(TRAINED, engine.trained_entries(_parameters(engine, trained)))
        writer.write(MOMENTS, engine.trained_entries(moments))
        writer.write(EXTRA, [entry_of(*item) for item in engine.extra_state().items()])
        facts = {"step": step, "skipped": skipped, "stage": stage, "cycle": cycle, "steps": steps}
        writer.publish(facts | {"num_states": engine.num_states} | dict(about))
        if self.writes and self.limit is not None:
            for folder in complete_checkpoints(self.folder)[: -self.limit]:
                # Without its manifest a folder is no checkpoint: a kill in between leaves no damaged one.
                (folder / MANIFEST).unlink()
                shutil.rmtree(folder)
        self._longest_s = max(time.perf_counter() - start_s, self._longest_s or 0.0)

    def expected_seconds(self) -> float:
        """How long the next checkpoint may take, by those before it; without any, a guess."""
        return 1.5 * self._longest_s if self._longest_s is not None else FIRST_CHECKPOINT_S

    def remove_leftovers(self) -> None:
        """Remove what killed processes have left: temporary folders, and checkpoints whose removal was under way."""
        for folder in self.folder.glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(folder)
        for folder in self.folder.glob("step-*"):
            if not (folder / MANIFEST).is_file():
                shutil.rmtree(folder)

    def _write_frozen(
        self, writer: "FolderWriter", model: nn.Module, engine: Engine, *, stage: StageName, cycle: int
    ) -> None:
        """The frozen weights: linked from an earlier checkpoint of this cycle, or written."""
        base, quantized = f"{BASE}-{cycle:05d}", f"{QUANTIZED}-{cycle:05d}"
        source: Path | None = None
        for folder in complete_checkpoints(self.folder) if self.writes else []:
            manifest = read_manifest(folder)
            if (manifest.stage, manifest.cycle) == (stage, cycle):
                source = folder
        # Processes that write nothing still take part in reading: it is collective where parameters are sharded.
        [num_linking] = engine.world.sum([float(source is not None)])
        if source is not None:
            writer.link(source, (base, quantized))
        elif not num_linking:
            frozen = {name: p for name, p in named_parameters(model).items() if not p.requires_grad}
            writer.write(base, _parameters(engine, frozen))
            writer.write(quantized, _quantized(engine, model))


def write_stage_start(folder: Path, train_state: TrainState, engine: Engine, *, writes: bool) -> None:
    """Save the wrapped weights as they are at the beginning of the low-rank stage. Collective."""
    writer = FolderWriter(folder, writes=writes)
    layers = {f"{name}.weight": layer.weight for name, layer in lora_layers(train_state.model).items()}
    writer.write("weights", _parameters(engine, layers))
    writer.publish({})


class FolderWriter:
    """Tensors -> safetensors files of about SHARD_BYTES -> a manifest, under a temporary name until it is published.

    Args:
        writes: False only fetches the tensors, for the process that writes them.
    """

    def __init__(self, final: Path, *, writes: bool) -> None:
        self.final, self.temporary = final, final.with_name(f"{TEMPORARY_PREFIX}{final.name}")
        self.writes = writes
        self.files: dict[str, FileFacts] = {}
        self.tensors: dict[str, str] = {}
        if writes:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary.mkdir(parents=True)

    def write(self, group: str, entries: Sequence[Entry]) -> None:
        """Write `entries`, in order, to files of this group."""
        if not self.writes:
            for entry in entries:
                entry.fetch()
            return
        for number, shard in enumerate(shards_of(entries), start=1):
            path = self.temporary / f"{group}-{number:05d}.safetensors"
            sha256 = write_tensors(path, shard)
            self.files[path.name] = FileFacts(group=group, bytes=path.stat().st_size, sha256=sha256)
            self.tensors |= dict.fromkeys((entry.name for entry in shard), path.name)

    def link(self, source: Path, groups: Sequence[str]) -> None:
        """Share the files of `groups` with the checkpoint `source`."""
        manifest = read_manifest(source)
        files = {name: facts for name, facts in manifest.files.items() if facts.group in groups}
        for name in files:
            share(source / name, self.temporary / name)
        self.files |= files
        self.tensors |= {name: file for name, file in manifest.tensors.items() if file in files}

    def publish(self, facts: Mapping[str, Any]) -> None:
        """Write the manifest, with `facts` in it, and rename the folder to its final name."""
        if self.writes:
            files = {name: of_file.model_dump() for name, of_file in self.files.items()}
            manifest = {"format": FORMAT, **facts, "files": files, "tensors": self.tensors}
            write_json(self.temporary / MANIFEST, manifest)
            publish_folder(self.temporary, self.final)


def shards_of(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries in order, cut after each that fills a file to SHARD_BYTES."""
    shards: list[list[Entry]] = []
    num_bytes = SHARD_BYTES  # of the last file: full, as there is none yet
    for entry in entries:
        if num_bytes >= SHARD_BYTES:
            shards.append([])
            num_bytes = 0
        shards[-1].append(entry)
        num_bytes += entry.num_bytes
    return shards


def entry_of(name: str, tensor: Tensor) -> Entry:
    """An entry for a tensor that every process holds."""
    return Entry(name, tensor.shape, tensor.dtype, lambda: tensor)


def _parameters(engine: Engine, parameters: Mapping[str, nn.Parameter]) -> list[Entry]:
    """The exact values of `parameters`, in full shape."""
    store = engine.store
    return [Entry(name, store.shape(p), store.dtype(p), partial(store.read, p)) for name, p in parameters.items()]


def _quantized(engine: Engine, model: nn.Module) -> list[Entry]:
    """Quantized weights as they are stored: with a carried residual they do not follow from the master."""
    store = engine.store
    weights = {
        f"{name}.weight{QUANTIZED_SUFFIX}": layer.weight
        for name, layer in lora_layers(model).items()
        if layer.weight_format.is_quantized
    }
    return [Entry(name, store.raw_shape(p), p.dtype, partial(store.raw, p)) for name, p in weights.items()]


def _optimizer_state(
    train_state: TrainState, engine: Engine, trained: Mapping[str, nn.Parameter]
) -> tuple[list[Entry], dict[str, float]]:
    """The moments as entries `<parameter>:<slot>`, and the step counts of parameters that have one."""
    store, optimizer = engine.store, train_state.optimizer
    moments, steps = list[Entry](), dict[str, float]()
    for name, p in trained.items():
        if not store.has_state(optimizer, p):
            continue
        for key, slot in store.slots(optimizer, p).items():
            fetch = partial(store.read_slot, optimizer, p, key)
            moments.append(Entry(f"{name}:{key}", slot.shape, slot.dtype, fetch))
        step: float | None = store.step(optimizer, p)
        if step is not None:
            steps[name] = step
    return moments, steps
