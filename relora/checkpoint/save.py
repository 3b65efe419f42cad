"""Checkpoints that any engine and any number of processes can go on from.

A folder `step-00001000/` is complete if and only if MANIFEST.json is in it. It is written under another name,
forced to the disk, and renamed. Base weights change only at restarts: their files are written once a cycle
and shared by the checkpoints of the cycle. Only safetensors and JSON are read back (`restore.py`).
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from relora.checkpoint.load import CODES, FORMAT, MANIFEST, FileFacts, complete_checkpoints, read_manifest, share_prefix
from relora.checkpoint.safetensors_stream import Entry, entry_of, write_tensors
from relora.checkpoint.state import Clock
from relora.checkpoint.weights import persistent_buffers
from relora.engines import Engine, TrainState
from relora.engines.world import World
from relora.files import publish_folder, share, write_json
from relora.method.lora import lora_layers
from relora.method.names import named_parameters

SHARD_BYTES = 2**30
FIRST_CHECKPOINT_S = 20.0


class Checkpoints:
    """The checkpoints of one run, newest last. Every rank calls `save`; `writes` says whose files they are."""

    def __init__(self, folder: Path, *, limit: int | None, writes: bool) -> None:
        self.folder, self.limit, self.writes = folder, limit, writes
        self._longest_s: float | None = None

    def save(
        self, live: TrainState, engine: Engine, clock: Clock, *, stage: str, cycle: int, about: Mapping[str, Any]
    ) -> None:
        """Write one checkpoint and drop those beyond the limit.

        Args:
            cycle: restarts so far: the base weights are those of this cycle.
            about: what else the manifest says (fingerprint, hash of the data).
        """
        final, start_s = self.folder / f"step-{clock.step:08d}", time.perf_counter()
        writer = _Writer(final.with_name(f".draft-{final.name}") if self.writes else None)
        writer.begin()
        parameters = named_parameters(live.model)
        base = {name: p for name, p in parameters.items() if not p.requires_grad}
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        shared = self._of_this_cycle(stage, cycle) if self.writes else None
        # Ranks that do not write still take part in reading: it is collective where parameters are sharded.
        [num_sharing] = engine.world.sum([float(shared is not None)])
        if shared is not None:
            writer.link(shared, f"base-{cycle:05d}")
            writer.link(shared, f"codes-{cycle:05d}")
        elif not num_sharing:
            writer.write(f"base-{cycle:05d}", _weights(engine, base))
            writer.write(f"codes-{cycle:05d}", _codes(engine, live.model))
        writer.write("buffers", [entry_of(*item) for item in persistent_buffers(live.model).items()])
        for owned in _shares(engine):
            writer.write("trained", owned.of(_weights(engine, trained)))
            writer.write("moments", owned.of(_moments(engine, live, trained)))
        writer.write("outer", [entry_of(*item) for item in engine.outer.tensors().items()])
        with_state = {name: p for name, p in trained.items() if _has_state(engine, live, p)}
        counts = {name: engine.store.step(live.optimizer, p) for name, p in with_state.items()}
        steps = {name: step for name, step in counts.items() if step is not None}
        stands = asdict(clock) | {"stage": stage, "cycle": cycle, "steps": steps}
        num_shares = engine.world.num_processes if engine.is_apart else 1
        writer.finish(final, stands | {"num_shares": num_shares} | dict(about))
        if self.writes:
            self._drop_old()
        self._longest_s = max(time.perf_counter() - start_s, self._longest_s or 0.0)

    def expected_seconds(self) -> float:
        """How long the next checkpoint may take, by those before it; without any, a guess."""
        return 1.5 * self._longest_s if self._longest_s is not None else FIRST_CHECKPOINT_S

    def remove_leftovers(self) -> None:
        """Remove what killed processes have left: drafts, and checkpoints whose removal was under way."""
        for folder in (*self.folder.glob(".draft-*"), *self.folder.glob("step-*")):
            if not (folder / MANIFEST).is_file() or folder.name.startswith(".draft-"):
                shutil.rmtree(folder)

    def _of_this_cycle(self, stage: str, cycle: int) -> Path | None:
        for folder in reversed(complete_checkpoints(self.folder)):
            manifest = read_manifest(folder)
            if (manifest.stage, manifest.cycle) == (stage, cycle):
                return folder
        return None

    def _drop_old(self) -> None:
        if self.limit is not None:
            for folder in complete_checkpoints(self.folder)[: -self.limit]:
                # Without its manifest a folder is no checkpoint: a kill in between leaves nothing half whole.
                (folder / MANIFEST).unlink()
                shutil.rmtree(folder)


def write_stage_start(folder: Path, live: TrainState, engine: Engine, *, writes: bool) -> None:
    """Keep the wrapped weights as they are at the beginning of the low-rank stage."""
    writer = _Writer(folder.with_name(f".draft-{folder.name}") if writes else None)
    writer.begin()
    layers = {f"{name}.weight": layer.weight for name, layer in lora_layers(live.model).items()}
    writer.write("weights", _weights(engine, layers))
    writer.finish(folder, {})


class _Writer:
    """Tensors -> safetensors files of about SHARD_BYTES -> a manifest. With no folder it only reads."""

    def __init__(self, draft: Path | None) -> None:
        self.draft = draft
        self.files: dict[str, FileFacts] = {}
        self.tensors: dict[str, str] = {}

    def begin(self) -> None:
        if self.draft is not None:
            shutil.rmtree(self.draft, ignore_errors=True)
            self.draft.mkdir(parents=True)

    def write(self, group: str, entries: Sequence[Entry]) -> None:
        for shard in _shards(entries):
            if self.draft is None:
                for entry in shard:
                    entry.fetch()
            else:
                self._write_shard(self.draft, group, shard)

    def link(self, source: Path, group: str) -> None:
        """Share the files of `group` with another checkpoint."""
        manifest = read_manifest(source)
        files = {name: facts for name, facts in manifest.files.items() if facts.group == group}
        for name in files:
            assert self.draft is not None
            share(source / name, self.draft / name)
        self.files |= files
        self.tensors |= {name: file for name, file in manifest.tensors.items() if file in files}

    def finish(self, final: Path, about: dict[str, Any]) -> None:
        if self.draft is not None:
            files = {name: facts.model_dump() for name, facts in self.files.items()}
            write_json(self.draft / MANIFEST, {"format": FORMAT, **about, "files": files, "tensors": self.tensors})
            publish_folder(self.draft, final)

    def _write_shard(self, draft: Path, group: str, shard: Sequence[Entry]) -> None:
        count = sum(facts.group == group for facts in self.files.values())
        path = draft / f"{group}-{count + 1:05d}.safetensors"
        sha256 = write_tensors(path, shard)
        self.files[path.name] = FileFacts(group=group, bytes=path.stat().st_size, sha256=sha256)
        self.tensors |= dict.fromkeys((entry.name for entry in shard), path.name)


def _shards(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Entries in order, in files of about SHARD_BYTES."""
    shard: list[Entry] = []
    for entry in entries:
        shard.append(entry)
        if sum(held.num_bytes for held in shard) >= SHARD_BYTES:
            yield shard
            shard = []
    if shard:
        yield shard


@dataclass(frozen=True)
class _Share:
    """What one rank trains. Ranks that train apart have one each, named `rank-1/...`; else all have the first."""

    process_index: int
    world: World

    def of(self, entries: Sequence[Entry]) -> list[Entry]:
        if self.process_index == 0:
            return list(entries)
        prefix = share_prefix(self.process_index)
        return [replace(entry, name=prefix + entry.name, fetch=partial(self._sent, entry)) for entry in entries]

    def _sent(self, entry: Entry) -> Tensor:
        return self.world.broadcast(entry.fetch(), self.process_index)


def _shares(engine: Engine) -> list[_Share]:
    return [
        _Share(process_index, engine.world)
        for process_index in range(engine.world.num_processes if engine.is_apart else 1)
    ]


def _has_state(engine: Engine, live: TrainState, parameter: nn.Parameter) -> bool:
    return engine.store.has_state(live.optimizer, parameter)


def _weights(engine: Engine, parameters: Mapping[str, nn.Parameter]) -> list[Entry]:
    store = engine.store
    return [Entry(name, store.shape(p), store.dtype(p), partial(store.read, p)) for name, p in parameters.items()]


def _codes(engine: Engine, model: nn.Module) -> list[Entry]:
    """Frozen weights as they are stored, those whose master does not say it all: codes."""
    coded = {
        f"{name}.weight{CODES}": layer.weight
        for name, layer in lora_layers(model).items()
        if layer.weight_format.is_quantized
    }
    store = engine.store
    return [Entry(name, store.raw_shape(p), p.dtype, partial(store.raw, p)) for name, p in coded.items()]


def _moments(engine: Engine, live: TrainState, trained: Mapping[str, nn.Parameter]) -> list[Entry]:
    store, optimizer = engine.store, live.optimizer
    return [
        Entry(f"{name}:{key}", slot.shape, slot.dtype, partial(store.read_slot, optimizer, p, key))
        for name, p in trained.items()
        if store.has_state(optimizer, p)
        for key, slot in store.slots(optimizer, p).items()
    ]
