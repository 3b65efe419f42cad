"""How well each way to train learns: arms x sizes x seeds x learning rates from one file, by whole runs on bytes.

    python -m benchmarks.quality benchmarks/quality/probe.yaml             # minutes on a core
    python -m benchmarks.quality benchmarks/quality/map.yaml --jobs 2      # days, or a GPU

Runs that have ended are not made again, so that a grid can be stopped and gone on with. Without seeds that repeat it a
difference says nothing: the page says which exceed the spread.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.grid import Grid
from benchmarks.quality.report import write_report
from benchmarks.quality.runs import make_all

PAGE = Path(__file__).parents[2] / "docs" / "results" / "quality.md"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a grid, such as benchmarks/quality/probe.yaml")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/quality"), help="of the runs, in one named as the file"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write, pictures beside it")
    options = parser.parse_args(arguments)
    grid, runs = Grid.read(options.file), options.folder / options.file.stem
    outcomes = make_all(grid, runs, jobs=options.jobs)
    print(write_report(grid, outcomes, runs, page=options.page, title=options.file.stem))


if __name__ == "__main__":
    main()
