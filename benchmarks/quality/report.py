"""The page of a grid: the best learning rate of each arm and what it reached, the whole search, pictures."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.pictures import new_figure
from benchmarks.quality.grid import Cell, Grid
from benchmarks.quality.runs import Outcome
from benchmarks.tables import Row, machine, table, write_section
from relora.config import check
from relora.forecast.dry_run import dry_run_update
from relora.forecast.memory import stage_model
from relora.model.model import read_hf_config
from relora.model.tasks import CausalLM
from relora.train.stages import Stage

REFERENCE = "full_adamw"
MIB = 2**20


@dataclass(frozen=True)
class Searched:
    """An arm at one size, with all rates and seeds."""

    name: str
    outcomes: Sequence[Outcome]

    @cached_property
    def by_rate(self) -> dict[float, list[Outcome]]:
        """In ascending order."""
        rates = sorted({outcome.cell.rate for outcome in self.outcomes})
        return {rate: [one for one in self.outcomes if one.cell.rate == rate] for rate in rates}

    def mean(self, rate: float) -> float:
        """Of the losses over the seeds."""
        return statistics.fmean(one.loss for one in self.by_rate[rate])

    @cached_property
    def best_rate(self) -> float:
        return min(self.by_rate, key=self.mean)

    @property
    def best(self) -> list[Outcome]:
        return self.by_rate[self.best_rate]

    @property
    def loss(self) -> float:
        return self.mean(self.best_rate)

    @property
    def spread(self) -> float | None:
        """Largest less smallest loss over the seeds; None for one seed."""
        losses = [one.loss for one in self.best]
        return max(losses) - min(losses) if len(losses) > 1 else None

    @property
    def is_at_the_edge(self) -> bool:
        """Whether the best rate is the first or the last that was tried: a better one may lie outside."""
        return self.best_rate in (min(self.by_rate), max(self.by_rate))


def sizes_of(outcomes: Sequence[Outcome]) -> dict[tuple[int, float], list[Searched]]:
    """(width, tokens a parameter) -> the arms."""
    found: dict[tuple[int, float], dict[str, list[Outcome]]] = {}
    for one in outcomes:
        size = found.setdefault((one.cell.width, one.cell.tokens_per_parameter), {})
        size.setdefault(one.cell.name, []).append(one)
    return {size: [Searched(name, ones) for name, ones in arms.items()] for size, arms in found.items()}


def write_report(grid: Grid, outcomes: Sequence[Outcome], runs: Path, *, page: Path, title: str) -> str:
    """Write the section `title` of `page`, with pictures beside it, and return its text."""
    command = f"`python -m benchmarks.quality benchmarks/quality/{title}.yaml`, page of {date.today()}"
    parts = [command, machine(), grid.note, verdict(grid)]
    for (width, tokens), arms in sizes_of(outcomes).items():
        steps = arms[0].outcomes[0].cell.max_steps(grid)
        name = f"quality-{title}-w{width}-t{tokens:g}"
        size = f"Width {width}, {tokens:g} tokens a parameter: {steps:,} updates of {grid.tokens_per_update():,} bytes"
        reference = next((arm for arm in arms if arm.name == REFERENCE), None)
        parts += [
            f"## {size}",
            table([arm_row(arm, reference, grid, runs) for arm in arms]),
            "Held-out loss in nats a byte by learning rate, mean over the seeds:",
            table([rate_row(arm, rate) for arm in arms for rate in arm.by_rate]),
        ]
        for kind, picture in (("tokens", draw_curves(arms, grid)), ("rates", draw_rates(arms))):
            path = page.parent / f"{name}-{kind}.png"
            picture.savefig(path, dpi=110)
            parts.append(f"![loss against {kind}]({path.name})")
    text = "\n\n".join(part.strip() for part in parts if part.strip())
    write_section(page, f"Grid {title}", text)
    return text


def verdict(grid: Grid) -> str:
    """What may be concluded at all from so many seeds."""
    if len(grid.seeds) == 1:
        return "One seed: no spread is known, so no difference in these tables is a finding."
    return (
        f"{len(grid.seeds)} seeds. The spread is the largest less the smallest loss over them at the best rate; "
        "a difference counts where it exceeds both spreads."
    )


def arm_row(arm: Searched, reference: Searched | None, grid: Grid, runs: Path) -> Row:
    trained, state = memory_of(arm.best[0].cell, grid, runs)
    return {
        "arm": arm.name,
        "best rate": f"{arm.best_rate:g}" + (" (edge)" if arm.is_at_the_edge else ""),
        "loss, nats a byte": f"{arm.loss:.4f}",
        "spread": None if arm.spread is None else f"{arm.spread:.4f}",
        f"- {REFERENCE}": None if reference is None else f"{arm.loss - reference.loss:+.4f}",
        "differs": None if reference is None else differs(arm, reference),
        "trained parameters": trained,
        "gradients + state, MiB": (4 * trained + state) / MIB,
        "ms an update": 1000 * statistics.median(one.update_seconds for one in arm.best),
    }


def differs(arm: Searched, reference: Searched) -> str | None:
    """Whether the difference of two arms exceeds the spread of both."""
    if arm is reference or arm.spread is None or reference.spread is None:
        return None
    return "yes" if abs(arm.loss - reference.loss) > max(arm.spread, reference.spread) else "within the spread"


def rate_row(arm: Searched, rate: float) -> Row:
    mean = arm.mean(rate)
    return {
        "arm": arm.name,
        "rate": f"{rate:g}",
        "loss": f"{mean:.4f}" if math.isfinite(mean) else "diverged",
        "of each seed": ", ".join(f"{one.loss:.4f}" for one in arm.by_rate[rate]),
    }


def memory_of(cell: Cell, grid: Grid, runs: Path) -> tuple[int, int]:
    """(trained parameters, bytes of the optimizer's state), as `relora plan` counts them."""
    config = check(cell.settings(grid, runs, runs / "shared"))
    hf_config, problems = read_hf_config(config.model, CausalLM())
    assert hf_config is not None, problems
    stage = Stage("full_rank" if config.training.method == "full" else "low_rank", config.training.max_steps)
    report = stage_model(stage, config, hf_config).parameter_report
    state = dry_run_update(stage, config, hf_config, batch_size=1).optimizer_state
    return report.factors.num_parameters + report.full.num_parameters, state


def draw_curves(arms: Sequence[Searched], grid: Grid) -> Any:
    """Held-out loss against tokens, each arm at its best rate, every seed a line."""
    figure, axes = new_figure(8, 5)
    for number, arm in enumerate(arms):
        for one in arm.best:
            points = [(step * grid.tokens_per_update(), loss) for step, loss in one.curve if step]
            label = f"{arm.name}, {arm.best_rate:g}" if one is arm.best[0] else None
            axes.plot(*zip(*points, strict=True), marker=".", color=f"C{number % 10}", label=label)
    axes.set(xlabel="tokens (bytes)", ylabel="held-out loss, nats a byte")
    axes.legend()
    return figure


def draw_rates(arms: Sequence[Searched]) -> Any:
    """Loss at the end against the learning rate."""
    figure, axes = new_figure(8, 5)
    for arm in arms:
        points = [(rate, arm.mean(rate)) for rate in arm.by_rate if math.isfinite(arm.mean(rate))]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=arm.name)
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="held-out loss at the end, nats a byte")
    axes.legend()
    return figure
