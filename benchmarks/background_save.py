"""What a checkpoint costs training: written within the save, or in the background while updates go on.

    python -m benchmarks.background_save                         # 4 layers of width 2048, r = 128: 6 GB of disk
    python -m benchmarks.background_save --disk-mb-per-s 20      # as on a slow disk

Saves within and in the background alternate, after the same updates, both the first and a later one of a cycle. A
save in the background holds training up for the copy to host memory alone; beside the writing updates may be slower.
Medians.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import llama
from benchmarks.checkpoint import STAGE, settings
from benchmarks.tables import Limit, options_of, publish
from relora.checkpoint import folder_writer
from relora.checkpoint.format import History
from relora.checkpoint.save import Checkpoints
from relora.checkpoint.state import State
from relora.config import check
from relora.engines import Engine, TrainState, connect
from relora.engines.state_entry import Entry
from relora.model.model import load_hf_config
from relora.model.tasks import task_of
from relora.train.stages import build

FIRST, LATER = "first of a cycle", "later in it"
MOST_OF_A_SAVE = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    llama.add_options(parser)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: that of temporary files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--disk-mb-per-s", type=float, help="slow every file down to this speed")
    options = options_of(parser)
    config = check(settings(options))
    engine = connect(config)
    live = build(STAGE, State(), config=config, hf_config=load_hf_config(config.model, task_of(config)), engine=engine)
    update = updates(live, engine, num_tokens=min(64, options.sequence))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, slow_disk(options.disk_mb_per_s):
        rows = measure(live, engine, Path(folder), update, rounds=options.rounds)
    engine.world.close()
    limits = [
        Limit(
            f"{row['save']}: training waits / save within", row["waits, s"] / row["within, s"], at_most=MOST_OF_A_SAVE
        )
        for row in rows
    ]
    publish({"Saves in the background": rows}, limits, json_path=options.json)


def updates(live: TrainState, engine: Engine, *, num_tokens: int) -> Iterator[float]:
    """Make one update each time, and yield the seconds that it took."""
    ids = torch.randint(live.model.config.vocab_size, (1, num_tokens))
    while True:
        began = time.perf_counter()
        assert not engine.update(live, [{"input_ids": ids, "labels": ids}], seeds=[0], stop=False).skipped
        yield time.perf_counter() - began


def measure(
    live: TrainState, engine: Engine, folder: Path, update: Iterator[float], *, rounds: int
) -> list[dict[str, Any]]:
    """One row for the first save of a cycle, and one for a later one; a round is a cycle."""
    kinds: dict[str, list[tuple[float, ...]]] = {FIRST: [], LATER: []}
    about = {"fingerprint": "", "data": ""}
    within = Checkpoints(folder / "within", limit=2, writes=True)
    background = Checkpoints(folder / "background", limit=2, writes=True, in_background=True)
    how: dict[str, Any] = {"history": History(), "stage": STAGE.name, "about": about}
    step = 0
    with closing(background):
        for cycle in range(1, rounds + 2):
            for times in kinds.values():
                step += 1
                alone = statistics.median(next(update) for _ in range(3))
                saved = seconds_of(lambda: within.save(live, engine, step, cycle=cycle, **how))  # noqa: B023
                waited = seconds_of(lambda: background.save(live, engine, step, cycle=cycle, **how))  # noqa: B023
                began, beside = time.perf_counter(), list[float]()
                while not (folder / f"background/step-{step:08d}").is_dir():
                    beside.append(next(update))
                written = time.perf_counter() - began
                assert background.wait()
                times.append((saved, waited, written, alone, statistics.mean(beside or [alone])))
    # The first cycle is left out: it allocates the memory of the copies.
    return [row(kind, times[1:]) for kind, times in kinds.items()]


def row(kind: str, times: Sequence[tuple[float, ...]]) -> dict[str, Any]:
    saved, waited, written, alone, beside = (statistics.median(column) for column in zip(*times, strict=True))
    names = {"within, s": saved, "waits, s": waited, "then written in, s": written}
    return {"save": kind} | names | {"update alone, s": alone, "update beside it / alone": beside / alone}


def seconds_of(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@contextmanager
def slow_disk(mb_per_s: float | None) -> Iterator[None]:
    """Let every file of tensors take as long as a disk of this speed would, without using a core."""
    write_tensors = folder_writer.write_tensors

    def slowly(path: Path, entries: Sequence[Entry]) -> str:
        began = time.perf_counter()
        sha256 = write_tensors(path, entries)
        assert mb_per_s is not None
        time.sleep(max(0.0, path.stat().st_size / 1e6 / mb_per_s - (time.perf_counter() - began)))
        return sha256

    if mb_per_s is not None:
        folder_writer.write_tensors = slowly
    try:
        yield
    finally:
        folder_writer.write_tensors = write_tensors


if __name__ == "__main__":
    main()
