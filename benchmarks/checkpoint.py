"""Saving and resuming a run, by the functions that a run goes through, against the disk and the hash themselves.

    python -m benchmarks.checkpoint        # 4 layers of width 2048, r = 128: 1.6 GB a checkpoint, 6 GB of disk

Base weights change at restarts only, so the second checkpoint of a cycle shares their files with the first. A save
writes, hashes and forces to the disk; its floor is a plain file of as many bytes, written and forced to the disk,
and their sha256. A resume checks every hash, from files that the system's cache has been told to forget, then reads
them into a model. Medians; memory of a process whose allocator gives back what is freed.
"""

import argparse
import gc
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import llama
from benchmarks.peaks import MIB, in_fresh_process, phase
from benchmarks.tables import Limit, options_of, publish
from relora.checkpoint.format import History
from relora.checkpoint.load import complete_checkpoints, open_checkpoint
from relora.checkpoint.save import Checkpoints
from relora.checkpoint.state import State
from relora.checkpoint.verify import checkpoint_problems
from relora.config import Config, check
from relora.engines import Engine, TrainState, connect
from relora.model.model import load_hf_config
from relora.model.tasks import task_of
from relora.train.stages import Stage, build

OVER_FLOOR = 1.25
# A tensor that is read stands there twice: the mapped pages of the file, and what they are copied to.
COPIES_SAVING, COPIES_READING, NOISE_MIB = 1, 2, 4
CHUNK = 64 * MIB
STAGE = Stage("low_rank", 1000)
FIRST, LATER, VERIFY, BUILD = "save, first of a cycle", "save, later in it", "resume: hashes", "resume: model"
WRITE, HASH, READ = "plain file, written and forced", "sha256 in memory", "plain file, read"


@dataclass
class Timing:
    """Of each time that something was done: seconds, bytes that went through, and bytes over the memory's level."""

    seconds: list[float] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    over: list[int] = field(default_factory=list)

    def add(self, seconds: float, num_bytes: int) -> None:
        self.seconds.append(seconds)
        self.num_bytes.append(num_bytes)

    def row(self, what: str) -> dict[str, Any]:
        seconds, num_bytes = statistics.median(self.seconds), statistics.median(self.num_bytes)
        over = max(self.over) / MIB if self.over else None
        rates = {"MB": num_bytes / 1e6, "MB/s": num_bytes / 1e6 / seconds}
        return {"what": what, "s": seconds, **rates, "over the level, MiB": over}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    llama.add_options(parser)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: that of temporary files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = options_of(parser)
    if options.measure:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            print(json.dumps(measure(Path(folder), options)))
        return
    found = in_fresh_process("benchmarks.checkpoint", [*sys.argv[1:], "--measure"])
    publish({"Checkpoints": found["rows"]}, limits_of(found), json_path=options.json)


def limits_of(found: dict[str, Any]) -> list[Limit]:
    rows, largest = {row["what"]: row for row in found["rows"]}, found["largest"] / MIB
    per_byte = 1 / rows[WRITE]["MB/s"] + 1 / rows[HASH]["MB/s"]
    times = [
        Limit(f"{name}: time / floor", rows[name]["s"] / (rows[name]["MB"] * per_byte), at_most=OVER_FLOOR)
        for name in (FIRST, LATER)
    ]
    memory = [
        Limit(f"{name}: over the level, MiB", rows[name]["over the level, MiB"], at_most=copies * largest + NOISE_MIB)
        for name, copies in {FIRST: COPIES_SAVING, LATER: COPIES_SAVING, BUILD: COPIES_READING}.items()
    ]
    return [*times, *memory]


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    config = check(settings(options))
    hf_config, engine = load_hf_config(config.model, task_of(config)), connect(config)
    how: dict[str, Any] = {"config": config, "hf_config": hf_config, "engine": engine}
    timings = {name: Timing() for name in (FIRST, LATER, WRITE, HASH, READ, VERIFY, BUILD)}
    live = build(STAGE, State(), **how)
    largest = max(p.nbytes for p in live.model.parameters())
    save_all(live, engine, folder, timings, config=config, rounds=options.rounds)
    engine.release(live)
    del live
    gc.collect()
    newest = complete_checkpoints(folder)[-1]
    num_bytes = sum(file.stat().st_size for file in newest.iterdir())
    for _ in range(options.rounds):
        forget(newest)
        read(newest, timings[READ])
        forget(newest)
        timed(timings[VERIFY], lambda: checkpoint_problems(newest), lambda: num_bytes)
        timed(timings[BUILD], lambda: build(STAGE, open_checkpoint(newest), **how), lambda: num_bytes)
    engine.world.close()
    return {"rows": [timing.row(name) for name, timing in timings.items()], "largest": largest}


def save_all(
    live: TrainState, engine: Engine, folder: Path, timings: dict[str, Timing], *, config: Config, rounds: int
) -> None:
    """Two checkpoints a cycle, and beside the first as many plain bytes."""
    checkpoints = Checkpoints(folder, limit=2, writes=True)
    ids = torch.randint(live.model.config.vocab_size, (1, min(64, config.data.sequence_length)))
    for number in range(1, 2 * rounds + 1):
        cycle = (number + 1) // 2
        assert not engine.update(live, [{"input_ids": ids, "labels": ids}], seeds=[0], stop=False).skipped

        def save(step: int = number, cycle: int = cycle) -> None:
            about = {"fingerprint": "", "data": ""}
            checkpoints.save(live, engine, step, history=History(), stage="low_rank", cycle=cycle, about=about)

        timed(timings[FIRST if number % 2 else LATER], save, lambda: written_bytes(complete_checkpoints(folder)[-1]))
        if number % 2:
            num_bytes = timings[FIRST].num_bytes[-1]
            plain = folder / "plain"
            write(plain, num_bytes, timings[WRITE])
            plain.unlink()
            digest(num_bytes, timings[HASH])


def timed(timing: Timing, call: Callable[[], object], num_bytes: Callable[[], int]) -> None:
    with phase() as memory:
        began = time.perf_counter()
        kept = call()
        seconds = time.perf_counter() - began
    timing.add(seconds, num_bytes())
    timing.over.append(memory.over)
    del kept


def written_bytes(checkpoint: Path) -> int:
    """Bytes of its files that no checkpoint before it has."""
    return sum(facts.st_size for facts in (file.stat() for file in checkpoint.iterdir()) if facts.st_nlink == 1)


def write(path: Path, num_bytes: int, timing: Timing) -> None:
    block = os.urandom(CHUNK)
    began = time.perf_counter()
    with path.open("wb") as file:
        for start in range(0, num_bytes, CHUNK):
            file.write(block[: num_bytes - start])
        file.flush()
        os.fsync(file.fileno())
    timing.add(time.perf_counter() - began, num_bytes)


def digest(num_bytes: int, timing: Timing) -> None:
    sha256, block = hashlib.sha256(), bytes(CHUNK)
    began = time.perf_counter()
    for start in range(0, num_bytes, CHUNK):
        sha256.update(block[: num_bytes - start])
    timing.add(time.perf_counter() - began, num_bytes)


def read(folder: Path, timing: Timing) -> None:
    buffer, num_bytes = bytearray(CHUNK), 0
    began = time.perf_counter()
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                num_bytes += count
    timing.add(time.perf_counter() - began, num_bytes)


def forget(folder: Path) -> None:
    """Tell the system's cache to drop the files, where it has such a call."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": "unused",
        "model": {"config": llama.model_section(options).config},
        "data": {"sequence_length": options.sequence, "eval_tokens": options.sequence},
        "lora": {"r": options.rank, "base_dtype": options.base_dtype or "float32"},
        "relora": {"restart_every": 100},
        "schedule": {"warmup_steps": 0, "restart_warmup_steps": 0},
        "training": {
            "max_steps": STAGE.end,
            "global_batch_size": 1,
            "per_device_batch_size": 1,
            "mixed_precision": "bf16" if options.bf16 else "no",
        },
    }


if __name__ == "__main__":
    main()
