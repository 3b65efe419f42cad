"""What a file asks for: the grid of runs, and the configuration of each."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from benchmarks.quality.arms import ARMS, Tree
from benchmarks.quality.bed import model_of, num_parameters


@dataclass(frozen=True)
class Grid:
    """The keys of a file; every combination is a run.

    Attributes:
        arms: name of an arm -> the learning rates to try, as many in each arm.
        ranks: divisors: r = width / divisor.
        tokens_per_parameter: lengths of the runs, by all parameters.
        cycles: number of cycles of the arms with restarts, which divide a run evenly.
        rest_learning_rate: of what an arm's own rate does not train.
        least_wrapped: smallest share of the parameters that must be hidden matrices.
        note: what a reader of the results must know.
    """

    arms: dict[str, list[float]]
    widths: list[int]
    tokens_per_parameter: list[float]
    ranks: list[int]
    seeds: list[int] = field(default_factory=lambda: [0])
    cycles: int = 6
    sequence_length: int = 256
    batch_size: int = 8
    evaluations: int = 10
    eval_tokens: int = 65536
    rest_learning_rate: float = 3e-3
    mixed_precision: str = "no"
    source: str = "python-stdlib"
    least_wrapped: float = 0.95
    note: str = ""

    def __post_init__(self) -> None:
        unknown = self.arms.keys() - ARMS.keys()
        if unknown:
            raise SystemExit(f"arms: {', '.join(sorted(unknown))}: must be of {', '.join(ARMS)}")
        if len({len(rates) for rates in self.arms.values()}) > 1:
            raise SystemExit(
                "arms: each must have as many learning rates as the others: a longer search wins by itself"
            )
        for width in self.widths:
            hidden, of_all = num_parameters(width)
            if hidden < self.least_wrapped * of_all:
                share = f"{hidden / of_all:.1%} of the parameters are hidden matrices"
                raise SystemExit(f"widths = {width}: {share}, less than least_wrapped = {self.least_wrapped:.1%}")

    @classmethod
    def read(cls, path: Path) -> "Grid":
        tree = yaml.safe_load(path.read_text())
        known = {one.name for one in fields(cls)}
        if unknown := tree.keys() - known:
            raise SystemExit(f"{path}: {', '.join(sorted(unknown))}: unknown; known are {', '.join(sorted(known))}")
        return cls(**tree)

    def cells(self) -> Iterator["Cell"]:
        """All combinations, seed by seed, so that a grid that is cut short has whole comparisons."""
        for seed in self.seeds:
            for width in self.widths:
                for tokens in self.tokens_per_parameter:
                    for arm, rates in self.arms.items():
                        for divisor in self.ranks if ARMS[arm].has_rank else [None]:
                            yield from (Cell(seed, width, tokens, arm, divisor, rate) for rate in rates)

    def tokens_per_update(self) -> int:
        return self.batch_size * self.sequence_length


@dataclass(frozen=True)
class Cell:
    """One run: a seed, a size, a length, an arm, r = width / divisor, a learning rate."""

    seed: int
    width: int
    tokens_per_parameter: float
    arm: str
    divisor: int | None
    rate: float

    @property
    def name(self) -> str:
        """Of the arm with its rank, such as `relora r=d/8`."""
        return self.arm if self.divisor is None else f"{self.arm} r=d/{self.divisor}"

    def folder(self, runs: Path) -> Path:
        rank = "" if self.divisor is None else f"-d{self.divisor}"
        size = f"w{self.width}-t{self.tokens_per_parameter:g}"
        return runs / size / f"{self.arm}{rank}" / f"lr{self.rate:g}-s{self.seed}"

    def max_steps(self, grid: Grid) -> int:
        _, parameters = num_parameters(self.width)
        updates = self.tokens_per_parameter * parameters / grid.tokens_per_update()
        return max(grid.cycles, round(updates / grid.cycles) * grid.cycles)

    def settings(self, grid: Grid, runs: Path, shared: Path) -> Tree:
        """The configuration. `shared` holds the tokenizer and the tokens."""
        steps = self.max_steps(grid)
        every = steps // grid.cycles
        tree: Tree = {
            "output_dir": str(self.folder(runs)),
            "seed": self.seed,
            "model": {"config": model_of(self.width, sequence_length=grid.sequence_length)},
            "data": data_of(grid, shared),
            "relora": {"restart_every": every, "warm_start_steps": 0},
            "optim": {"learning_rate": grid.rest_learning_rate},
            "schedule": {"warmup_steps": steps // 20, "restart_warmup_steps": max(1, every // 10)},
            "training": {
                "max_steps": steps,
                "global_batch_size": grid.batch_size,
                "per_device_batch_size": grid.batch_size,
                "mixed_precision": grid.mixed_precision,
                "eval_steps": max(1, steps // grid.evaluations),
                "save_steps": steps,
                "report_to": [],
            },
        }
        rank = max(1, self.width // (self.divisor or 1))
        for section, values in ARMS[self.arm].overrides(rank=rank, rate=self.rate).items():
            tree[section] = tree.get(section, {}) | values
        return tree


def data_of(grid: Grid, shared: Path) -> dict[str, Any]:
    """The section `data`, the same in all runs."""
    return {
        "sources": [{"path": grid.source}],
        "tokenizer": str(shared / "tokenizer"),
        "prepared_dir": str(shared / "prepared"),
        "sequence_length": grid.sequence_length,
        "eval_fraction": 0.05,
        "eval_tokens": grid.eval_tokens,
        "num_proc": 1,
        "num_workers": 0,
    }
