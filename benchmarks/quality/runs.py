"""Runs of a grid: each a whole `relora train` in a fork of this process; those that have ended are not made again."""

import json
import time
from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.forks import Forked, forked, run_to_end
from benchmarks.quality.arms import Tree
from benchmarks.quality.bed import write_tokenizer
from benchmarks.quality.grid import Cell, Grid
from relora.commands.prepare import prepare
from relora.config import check
from relora.files import write_json
from relora.tracking.metrics_file import read_metrics
from relora.train.train import train

DIVERGED = "in a row, so the run stops"  # of the error that ends a run whose loss is not finite


@dataclass(frozen=True)
class Outcome:
    """A run that has ended; one that diverged has no loss."""

    cell: Cell
    lines: list[dict[str, Any]]
    has_diverged: bool

    @property
    def curve(self) -> list[tuple[int, float]]:
        """(step, held-out loss in nats a byte)."""
        return [(line["step"], line["eval_loss"]) for line in self.lines if "eval_loss" in line]

    @property
    def loss(self) -> float:
        """At the end; infinite if it diverged."""
        return float("inf") if self.has_diverged else self.curve[-1][1]

    @property
    def update_seconds(self) -> float:
        """The median."""
        found = sorted(line["step_seconds"] for line in self.lines if "step_seconds" in line)
        return float(found[len(found) // 2])


def make_all(grid: Grid, folder: Path, *, jobs: int) -> list[Outcome]:
    """Make the runs that are missing, `jobs` at a time, and return all."""
    cells = list(grid.cells())
    shared = folder / "shared"
    trees = {cell: cell.settings(grid, folder, shared) for cell in cells}
    missing = [cell for cell in cells if not _has_ended(cell, trees[cell], folder)]
    if missing:
        write_tokenizer(shared / "tokenizer")
        run_to_end(lambda: prepare(check(trees[missing[0]])), "prepare")
        _make(missing, trees, folder, jobs=jobs)
    return [outcome_of(cell, folder) for cell in cells]


class Running:
    """A run in a fork."""

    def __init__(self, tree: Tree) -> None:
        self._stack = ExitStack()
        self.process: Forked = self._stack.enter_context(forked(lambda: train(check(tree))))

    def close(self) -> tuple[int, str]:
        """Exit code and output; ends it if it has not ended."""
        with self._stack:
            return self.process.end() if self.process.has_ended() else (-1, "")


def _make(missing: Iterable[Cell], trees: dict[Cell, Tree], folder: Path, *, jobs: int) -> None:
    waiting, running = deque(missing), dict[Cell, Running]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.popleft()
                running[cell] = Running(trees[cell])
            for cell in [cell for cell, one in running.items() if one.process.has_ended()]:
                code, said = running.pop(cell).close()
                _record(cell, trees[cell], folder, code, said)
                print(f"{len(waiting) + len(running)} left; {cell.folder(folder)}: {outcome_of(cell, folder).loss:.4f}")
            time.sleep(0.02)
    finally:
        for one in running.values():
            one.close()


def _record(cell: Cell, tree: Tree, folder: Path, code: int, said: str) -> None:
    """Write down that a run has ended, and of which configuration; SystemExit if it failed for another reason."""
    if code and DIVERGED not in said:
        raise SystemExit(f"{cell.folder(folder)}: {said[-3000:]}")
    write_json(_account(cell, folder), {"settings": tree, "has_diverged": bool(code)})


def _account(cell: Cell, folder: Path) -> Path:
    path = cell.folder(folder)
    return path.with_name(f"{path.name}.json")


def _has_ended(cell: Cell, tree: Tree, folder: Path) -> bool:
    """Whether the run is there. SystemExit if its configuration was another."""
    path = _account(cell, folder)
    if not path.exists():
        return False
    if json.loads(path.read_text())["settings"] != json.loads(json.dumps(tree)):
        raise SystemExit(f"{cell.folder(folder)}: a run by other settings has this name; give another --folder")
    return True


def outcome_of(cell: Cell, folder: Path) -> Outcome:
    account = json.loads(_account(cell, folder).read_text())
    return Outcome(cell, read_metrics(cell.folder(folder) / "metrics.jsonl"), account["has_diverged"])
