"""`relora report RUN [RUN ...]`: pictures and one HTML page, several runs side by side."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relora.checkpoint.run_folder import RunFolder
from relora.config import UserError, raise_if_any
from relora.files import folder_problems, write_text
from relora.tracking.metrics_file import read_metrics
from relora.tracking.plots import INSTALL, has_matplotlib

Lines = list[dict[str, Any]]


def report(runs: Sequence[str], output: str | None) -> None:
    """Draw the metrics of `runs` into `output` (default: report/ in the first run) and write index.html.

    Raises:
        UserError: a folder is no run or has no metrics yet, or matplotlib is missing.
    """
    if not has_matplotlib():
        raise UserError([f"report: needs matplotlib; {INSTALL}"])
    folder = Path(output) if output is not None else Path(runs[0]) / "report"
    found = {run: _lines(run) for run in runs}
    without = [f"{run}: is not a run folder with metrics" for run, held in found.items() if not held]
    raise_if_any([*without, *folder_problems(f"--output {folder}", str(folder))])
    names = [Path(run).resolve().name for run in found]
    lines = {name if names.count(name) == 1 else run: found[run] for run, name in zip(found, names, strict=True)}
    folder.mkdir(parents=True, exist_ok=True)
    draw(lines, folder / "overview.png")
    write_text(folder / "index.html", _page(lines))
    print(f"report: {folder / 'index.html'}")


def draw(runs: dict[str, Lines], path: Path) -> None:
    """Loss, learning rate, rank of the updates and throughput over the steps; restarts as dotted lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True)
    for number, (name, lines) in enumerate(runs.items()):
        color = f"C{number}"
        _curve(axes[0, 0], lines, "loss", color=color, alpha=0.35, label=f"{name}, training")
        _curve(axes[0, 0], lines, "eval_loss", color=color, marker="o", markersize=3, label=f"{name}, held-out")
        _curve(axes[0, 1], lines, "learning_rate", color=color, label=name)
        _curve(axes[1, 0], lines, "update_effective_rank", color=color, marker="s", markersize=4, label=name)
        _curve(axes[1, 1], lines, "tokens_per_second", color=color, label=name)
        for axis in axes.flat:
            for line in lines:
                if "restart" in line:
                    axis.axvline(line["step"], color=color, linestyle=":", linewidth=0.8, alpha=0.6)
    titles = ("loss (nats per token)", "learning rate", "effective rank of each cycle's update", "tokens per second")
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
    for axis in axes[1]:
        axis.set_xlabel("step (dotted: restarts)")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path)


def _curve(axis: Any, lines: Lines, key: str, **style: Any) -> None:
    points = [(line["step"], line[key]) for line in lines if key in line]
    if points:
        axis.plot(*zip(*points, strict=True), linewidth=1.2, **style)


def _lines(run: str) -> Lines:
    folder = RunFolder(Path(run))
    return read_metrics(folder.metrics) if folder.is_run else []


def _page(runs: dict[str, Lines]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{cell}</td>' for cell in _row(lines))}</tr>"
        for name, lines in runs.items()
    )
    head = "".join(
        f"<th>{title}</th>" for title in ("run", "step", "tokens", "held-out loss", "restarts", "merge error")
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>relora report</title>
<style>body{{font-family:sans-serif;margin:2em}}td,th{{padding:.2em 1em;text-align:left}}img{{max-width:100%}}</style>
<h1>relora report</h1>
<table><tr>{head}</tr>{rows}</table>
<img src="overview.png" alt="loss, learning rate, effective rank and throughput over the steps">
</html>
"""


def _row(lines: Lines) -> list[str]:
    updates = [line for line in lines if "loss" in line]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    errors = [line["merge_error"] for line in lines if "restart" in line]
    return [
        f"{updates[-1]['step']:,}" if updates else "0",
        f"{updates[-1]['tokens']:,}" if updates else "0",
        f"{losses[-1]:.4f}" if losses else "",
        str(len(errors)),
        f"{max(errors):.1e}" if errors else "",
    ]
