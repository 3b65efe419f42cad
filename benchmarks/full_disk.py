"""A disk that is full, at one size after the other: a command ends with one line, and goes on when there is room.

    sudo python -m benchmarks.full_disk                # 60 sizes, about 5 minutes on two cores
    sudo python -m benchmarks.full_disk --sizes 12 --write docs/results/reliability.md

A tmpfs is mounted, which takes the rights to do so, just too small for a command: prepare, train (metrics, TensorBoard,
checkpoints and the final model among it), export or report. The command must end with exit code 1 and one line, without
a traceback; what was complete before must be so after. Then the disk grows, and the same command must end as on a large
disk. A run whose disk takes no checkpoint any more goes on for two of them.
"""

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import relora.train.train  # noqa: F401  # loaded once, before the forks
from benchmarks import engines
from benchmarks.chaos import UPDATES, everything
from benchmarks.forks import command
from benchmarks.signals import timed, write_config
from benchmarks.tables import Limit, Row, options_of, publish, write_section
from relora.checkpoint.load import complete_checkpoints
from relora.checkpoint.verify import checkpoint_problems
from relora.errors import EXIT_FAILED
from relora.files import sha256_of

TITLE = "Full disks"
LARGE, PAGE = 2**28, 4096


@dataclass
class Command:
    """A command that writes to a disk.

    Attributes:
        arguments: of `relora`.
        num_bytes: that it writes.
        begin: lays out what it needs.
        is_intact: whether what was complete before it failed still is, and nothing else seems to be.
        result: what must be the same as on a large disk.
    """

    name: str
    arguments: tuple[str, ...]
    begin: Callable[[], None]
    is_intact: Callable[[], bool]
    result: Callable[[], Any]
    num_bytes: int = 0
    full: int = 0
    fitted: int = 0
    wrong: list[str] = field(default_factory=list)
    said: set[str] = field(default_factory=set)

    def row(self) -> Row:
        """The row of the table."""
        facts = {"command": self.name, "sizes": self.full + self.fitted, "full (1)": self.full}
        return facts | {"fitted (0)": self.fitted, "wrong": len(self.wrong)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, default=60, help="number of sizes for all commands together")
    parser.add_argument("--write", type=Path, help="write the section there, such as docs/results/reliability.md")
    options = options_of(parser)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        done = fill(Path(folder), options.sizes)
    for each in done:
        print("".join(f"{each.name}: {wrong}\n" for wrong in each.wrong), end="")
        print("".join(f"{each.name} said: {line}\n" for line in sorted(each.said)), end="")
    limits = [
        Limit(f"{each.name}: sizes with another end than documented", len(each.wrong), at_most=0) for each in done
    ]
    text = publish({TITLE: [each.row() for each in done]}, limits, json_path=options.json)
    if options.write is not None:
        write_section(options.write, TITLE, f"{(__doc__ or '').split(chr(10) * 2)[2]}\n\n{text}")


def fill(folder: Path, num_sizes: int) -> list[Command]:
    """Try every command, the training at half of the sizes."""
    large, disk = folder / "large", folder / "disk"
    large.mkdir()
    disk.mkdir()
    done = commands(large, disk)
    for each in done:
        share = num_sizes // 2 if each.name == "train" else num_sizes // 6
        with mounted(disk, LARGE):
            each.begin()
            before = used(disk)
            timed(*each.arguments)
            expected = each.result()
            each.num_bytes = max(used(disk) - before, 2**17)  # a report replaces the old one
        for number in range(share):
            with mounted(disk, LARGE):
                each.begin()
                free = (each.num_bytes * number // share) // PAGE * PAGE
                resize(disk, used(disk) + free)
                attempt(each, free, expected, disk)
    return done


def attempt(each: Command, free: int, expected: Any, disk: Path) -> None:
    """Give the command with so little room, then with enough."""
    with command(*each.arguments) as process:
        code, said = process.end()
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.startswith("relora: ")]
    last = [line for line in lines if not line.startswith("relora: warning: ")]
    place = f"{free / 2**10:,.0f} KiB"
    each.fitted, each.full = each.fitted + (code == 0), each.full + (code != 0)
    if code != 0:
        each.said.add(f"{code} {last[-1] if last else '-'}"[:300].replace(str(disk), "DISK"))
    if code not in (0, EXIT_FAILED) or "Traceback" in said or len(last) != (code != 0):
        each.wrong.append(f"{place}: exit code {code}\n{said[-3000:]}")
    if code != 0 and not each.is_intact():
        each.wrong.append(f"{place}: what was complete is damaged\n{said[-3000:]}")
    resize(disk, LARGE)
    with command(*each.arguments) as process:
        again, said = process.end()
    if code == 0 and each.name == "export":  # it refuses to overwrite
        return
    if again != 0:
        each.wrong.append(f"{place}: with room again exit code {again}\n{said[-3000:]}")
    elif each.result() != expected:
        each.wrong.append(f"{place}: with room again another result")


def commands(large: Path, disk: Path) -> list[Command]:
    """The commands; a finished run and its report, which they need, lie on a large disk."""
    corpus = engines.write_corpus(large)
    options = {"save_steps": 2, "max_steps": UPDATES, "report_to": ["tensorboard"]}
    timed("train", write_config(large, corpus, "finished", **options))
    run, exported, page = large / "finished", disk / "exported", disk / "report"
    timed("report", str(run), "--output", str(large / "report"))
    reported, config = hashes(large / "report"), str(disk / "run.json")

    def lay_out(copied: str | None) -> None:
        write_config(disk, corpus, "run", **options)
        if copied is not None:
            shutil.copytree(large / copied, disk / copied)

    def has_whole_checkpoints() -> bool:
        return all(checkpoint_problems(place) == [] for place in complete_checkpoints(disk / "run" / "checkpoints"))

    return [
        Command(
            name="prepare",
            arguments=("prepare", config),
            begin=partial(lay_out, None),
            is_intact=lambda: not (disk / "prepared" / "manifest.json").exists(),
            result=lambda: hashes(disk / "prepared" / "tokens"),
        ),
        Command(
            name="train",
            arguments=("train", config),
            begin=partial(lay_out, "prepared"),
            is_intact=has_whole_checkpoints,
            result=lambda: everything(disk / "run"),
        ),
        Command(
            name="export",
            arguments=("export", str(run), "--output", str(exported)),
            begin=partial(lay_out, None),
            is_intact=lambda: not exported.exists(),
            result=lambda: hashes(exported),
        ),
        Command(
            name="report",
            arguments=("report", str(run), "--output", str(page)),
            begin=partial(lay_out, "report"),
            is_intact=lambda: hashes(page) == reported,
            result=lambda: hashes(page),
        ),
    ]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}


@contextmanager
def mounted(place: Path, num_bytes: int) -> Iterator[None]:
    """A disk of so many bytes at `place`."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def resize(place: Path, num_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={max(num_bytes, PAGE)}", str(place)], check=True)


def used(place: Path) -> int:
    return shutil.disk_usage(place).used


if __name__ == "__main__":
    main()
