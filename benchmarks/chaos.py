"""SIGKILL at random moments of a run, every other one aimed at a save: it must end as if nobody had killed it.

    python -m benchmarks.chaos --kills 100                      # one process, about 4 minutes on two cores
    python -m benchmarks.chaos --kills 30 --engine ddp          # two processes; or fsdp2, zero2
    python -m benchmarks.chaos --kills 100 --write docs/results/reliability.md

A tiny run starts as a fork of this process, is killed while it prepares, trains, evaluates, saves or writes the final
model, and the same command goes on, until it is finished; then the next run begins. Of two processes, which
`accelerate launch` starts, either one, its launcher or all are killed. At the end the hash of the final weights, those
of the last checkpoint, and every metric but timings and memory must be those of a run that nobody disturbed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import relora.train.train  # noqa: F401  # loaded once, before the forks
from benchmarks import engines
from benchmarks.forks import PATIENCE_S, Forked, accelerate_launch, command, forked
from benchmarks.signals import left_after, result, write_config
from benchmarks.tables import Limit, Row, options_of, publish, write_section
from relora.checkpoint.format import MANIFEST, TEMPORARY_PREFIX

ALONE = "one process"
TITLE, TITLE_OF_SEVERAL = "Kills", "Kills of several processes"
POLL_S, SAVE_S, END_S = 0.0005, 0.02, 45.0
UPDATES = 16


@dataclass
class Storm:
    """The kills of one engine, and what came of them.

    Attributes:
        updates: of a run.
        folder: holds the run "calm", which nobody disturbs, and the run "killed".
        took_s: the time of the calm one.
        in_saves: kills that left a checkpoint half written.
        victims: kills by who was killed.
        finished: commands that had ended before their kill.
        longest_s: the longest time from a kill until no process was left.
        differing: a line for each run that ended otherwise than the calm one.
    """

    engine: str
    folder: Path
    rng: random.Random
    updates: int = UPDATES
    took_s: float = 0.0
    in_saves: int = 0
    victims: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    orphans: int = 0
    longest_s: float = 0.0
    runs: int = 0
    differing: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.victims.total()

    def row(self) -> Row:
        """The row of the table."""
        who = ", ".join(f"{name} {count}" for name, count in sorted(self.victims.items()))
        facts: dict[str, Any] = {"engine": self.engine, "kills": self.kills, "of them inside a save": self.in_saves}
        facts |= {"killed": who, "runs": self.runs, "commands that were done before": self.finished}
        return facts | {"longest end, s": self.longest_s, "runs that differ": len(self.differing)}

    def limits(self) -> list[Limit]:
        """What the results are held against."""
        third = self.kills // 3
        return [
            Limit(f"{self.engine}: runs that end otherwise than an undisturbed one", len(self.differing), at_most=0),
            Limit(f"{self.engine}: kills inside a save", self.in_saves, at_least=third),
            Limit(f"{self.engine}: processes left", self.orphans, at_most=0),
            Limit(f"{self.engine}: longest end, s", self.longest_s, at_most=END_S),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="number of kills for each engine")
    parser.add_argument("--engine", nargs="+", choices=(ALONE, "ddp", "fsdp2", "zero2"), default=[ALONE])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--write", type=Path, help="write the section there, such as docs/results/reliability.md")
    options = options_of(parser)
    torch.set_num_threads(1)
    storms = []
    for engine in options.engine:
        with tempfile.TemporaryDirectory() as folder:
            storms.append(rage(Storm(engine, Path(folder), random.Random(options.seed)), options.kills))
            print("".join(f"{line}\n" for line in storms[-1].differing), end="", flush=True)
    rows, limits = [storm.row() for storm in storms], [limit for storm in storms for limit in storm.limits()]
    title = TITLE if options.engine == [ALONE] else TITLE_OF_SEVERAL
    text = publish({title: rows}, limits, json_path=options.json)
    if options.write is not None:
        write_section(options.write, title, f"{(__doc__ or '').split(chr(10) * 2)[2]}\n\n{text}")


def rage(storm: Storm, num_kills: int) -> Storm:
    """Let runs begin, be killed and go on, until so many kills are done and the last run is finished."""
    folder, corpus = storm.folder, engines.write_corpus(storm.folder)
    if storm.engine == "zero2":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed  # noqa: F401  # loaded once, before the forks
    saves = {"save_steps": 1, "max_steps": storm.updates}
    calm, killed = (write_config(folder, corpus, name, **saves) for name in ("calm", "killed"))
    storm.took_s = undisturbed(storm.engine, calm)
    expected, run = everything(folder / "calm", storm.updates), folder / "killed"
    while storm.kills < num_kills:
        for path in (run, folder / "prepared"):
            shutil.rmtree(path, ignore_errors=True)
        before = storm.kills
        while not (run / "final" / "relora.json").exists():
            if storm.kills < num_kills:
                kill(storm, killed, run)
            else:
                undisturbed(storm.engine, killed)
        storm.runs += 1
        found = everything(run, storm.updates)
        differing = [name for name in expected if expected[name] != found[name]]
        if differing:
            storm.differing.append(f"{storm.engine}, after kills {before + 1} to {storm.kills}: {', '.join(differing)}")
            keep = Path(tempfile.mkdtemp(prefix="chaos-")) / "runs"
            shutil.copytree(folder, keep, symlinks=True)
            storm.differing.append(f"the runs are kept in {keep}")
    return storm


def kill(storm: Storm, config: str, run: Path) -> None:
    """Start the command and kill it, at a random moment of its time or in one of its next saves."""
    rng, old = storm.rng, drafts(run)
    aims_at_save, wait_s = rng.random() < 0.6, rng.uniform(0, storm.took_s)
    num_saves, seen = rng.randrange(1, 4), set[tuple[str, int]]()
    start_s = time.monotonic()

    def reached() -> bool:
        if not aims_at_save:
            return time.monotonic() - start_s >= wait_s
        seen.update(drafts(run) - old)
        return len(seen) >= num_saves

    with start(storm.engine, config) as process:
        if not lives_until(process, reached):
            storm.finished += 1
            code, said = process.end()
            assert code == 0, f"ended by itself with {code}:\n{said[-3000:]}"
            return
        if aims_at_save:
            time.sleep(rng.uniform(0, SAVE_S))
        killed_s = time.monotonic()
        storm.victims[strike(process, storm, writer=aims_at_save)] += 1
        process.end()
        storm.orphans += left_after(process, END_S)
        storm.longest_s = max(storm.longest_s, time.monotonic() - killed_s)
    storm.in_saves += bool(drafts(run) - old)


def strike(process: Forked, storm: Storm, *, writer: bool) -> str:
    """Send SIGKILL to all processes, or to one of two or their launcher; return to whom.

    Args:
        writer: kill at least the first process, which writes the checkpoints.
    """
    ranks = [] if storm.engine == ALONE else children(process.pid)
    victims: dict[str, Callable[[], None]] = {"all": partial(os.killpg, process.pid, signal.SIGKILL)}
    if len(ranks) == 2:
        single = {"first": ranks[0]} if writer else {"first": ranks[0], "second": ranks[1], "launcher": process.pid}
        victims |= {name: partial(os.kill, pid, signal.SIGKILL) for name, pid in single.items()}
    name = min(victims, key=lambda name: (storm.victims[name], storm.rng.random()))  # each as often as the others
    with suppress(ProcessLookupError):
        victims[name]()
    return name


def children(parent: int) -> list[int]:
    """The processes that `parent` has started, the oldest first."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            of_parent, start_time = (int(path.read_text().rpartition(")")[2].split()[at]) for at in (1, 19))
            if of_parent == parent:
                found.append((start_time, int(path.parent.name)))
    return [pid for _, pid in sorted(found)]


def drafts(run: Path) -> set[tuple[str, int]]:
    """The checkpoints that are being written, each as its name and the time of its beginning."""
    found = set()
    with suppress(OSError):
        for path in (run / "checkpoints").iterdir():
            if path.name.startswith(TEMPORARY_PREFIX):
                with suppress(OSError):
                    found.add((path.name, path.stat().st_ino))
    return found


def lives_until(process: Forked, reached: Callable[[], bool]) -> bool:
    """Wait until `reached`; False if the process ended before."""
    end_s = time.monotonic() + PATIENCE_S
    while not process.has_ended():
        if reached():
            return True
        assert time.monotonic() < end_s, process.log.read_text()[-3000:]
        time.sleep(POLL_S)
    return False


def start(engine: str, config: str) -> Forked:
    """`relora train CONFIG`, alone or as two processes by `accelerate launch`, whose torchrun forks them here."""
    if engine == ALONE:
        return command("train", config)
    file = f"{engines.ROOT}/launch/{engine}.yaml"
    program = str(engines.ROOT / "relora" / "__main__.py")
    return forked(partial(accelerate_launch, "--config_file", file, "--num_processes", "2", program, "train", config))


def undisturbed(engine: str, config: str) -> float:
    """Seconds that the command takes to its end."""
    start_s = time.monotonic()
    with start(engine, config) as process:
        code, said = process.end()
    assert code == 0, said[-5000:]
    return time.monotonic() - start_s


def everything(run: Path, updates: int = UPDATES) -> dict[str, Any]:
    """What must be equal: the final weights, the files of the last checkpoint, the metrics without timings."""
    weights, metrics = result(run)
    manifest = json.loads((run / "checkpoints" / f"step-{updates:08d}" / MANIFEST).read_text())
    hashes = {name: facts["sha256"] for name, facts in manifest["files"].items()}
    return {"final weights": weights, "last checkpoint": hashes, "metrics": metrics}


if __name__ == "__main__":
    main()
