"""`relora report RUN [RUN ...]`: plots and one HTML page, several runs side by side."""

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relora.checkpoint.run_folder import RunFolder
from relora.config import UserError, raise_if_any
from relora.files import folder_problems, write_bytes, write_text
from relora.tracking.metrics_file import has_number, read_metrics
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
    folders = {run: RunFolder(Path(run)) for run in runs}
    found = {run: read_metrics(place.metrics) if place.is_run else [] for run, place in folders.items()}
    missing = [f"{run}: is not a run folder with metrics" for run, lines in found.items() if not lines]
    raise_if_any([*missing, *folder_problems(f"--output {folder}", str(folder))])
    # A run is called by the name of its folder, or by its path if another has the same name.
    names = [Path(run).resolve().name for run in found]
    lines = {name if names.count(name) == 1 else run: found[run] for run, name in zip(found, names, strict=True)}
    folder.mkdir(parents=True, exist_ok=True)
    picture = draw(lines)
    write_bytes(folder / "overview.png", picture)
    write_text(folder / "index.html", page(lines))
    print(f"report: {folder / 'index.html'}")


def draw(runs: dict[str, Lines]) -> bytes:
    """Plot loss, learning rate, rank of the updates and throughput over the steps, as PNG; restarts as dotted lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True)
    for number, (name, lines) in enumerate(runs.items()):
        color, name = f"C{number}", name if not name.startswith("_") else f" {name}"  # matplotlib hides such labels
        plot(axes[0, 0], lines, "loss", color=color, alpha=0.35, label=f"{name}, training")
        plot(axes[0, 0], lines, "eval_loss", color=color, marker="o", markersize=3, label=f"{name}, held-out")
        plot(axes[0, 1], lines, "learning_rate", color=color, label=name)
        plot(axes[1, 0], lines, "update_effective_rank", color=color, marker="s", markersize=4, label=name)
        plot(axes[1, 1], lines, "tokens_per_second", color=color, label=name)
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
    for text in axes[0, 0].legend(fontsize=7).get_texts():
        text.set_parse_math(False)  # a dollar sign in the name of a run is one
    content = io.BytesIO()
    figure.savefig(content)
    return content.getvalue()


def plot(axis: Any, lines: Lines, key: str, **style: Any) -> None:
    """One curve: the field `key` over the steps of the lines that have it; nothing if there are none."""
    points = [(line["step"], line[key]) for line in lines if has_number(line, key)]
    if points:
        axis.plot(*zip(*points, strict=True), linewidth=1.2, **style)


def page(runs: dict[str, Lines]) -> str:
    """The HTML page: a table with one row a run, and the plot. All text from a run is escaped."""
    columns = ("run", "step", "tokens", "held-out loss", "restarts", "merge error")
    head = "".join(f"<th>{title}</th>" for title in columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in [name, *summary(lines)])}</tr>"
        for name, lines in runs.items()
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>relora report</title>
<style>body{{font-family:sans-serif;margin:2em}}td,th{{padding:.2em 1em;text-align:left}}img{{max-width:100%}}</style>
<h1>relora report</h1>
<table><tr>{head}</tr>{rows}</table>
<img src="overview.png" alt="loss, learning rate, effective rank and throughput over the steps">
</html>
"""


def summary(lines: Lines) -> list[str]:
    """The cells of a run: step, tokens, held-out loss, restarts, largest merge error."""
    updates = [line for line in lines if has_number(line, "loss") and has_number(line, "tokens")]
    losses = [line["eval_loss"] for line in lines if has_number(line, "eval_loss")]
    errors = [line["merge_error"] for line in lines if has_number(line, "merge_error")]
    return [
        f"{updates[-1]['step']:,}" if updates else "0",
        f"{updates[-1]['tokens']:,}" if updates else "0",
        f"{losses[-1]:.4f}" if losses else "",
        str(sum("restart" in line for line in lines)),
        f"{max(errors):.1e}" if errors else "",
    ]
