"""Pictures and files for TensorBoard. matplotlib is an extra: without it a run has no pictures."""

import importlib.util
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

INSTALL = "pip install 'relora[plots]'"


def spectrum_picture(spectra: Mapping[str, Tensor], *, title: str) -> Any:
    """Plot singular values over their index, one curve a layer.

    Returns:
        An array (height, width, 3) of uint8, or None without matplotlib.
    """
    if not has_matplotlib():
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, values in spectra.items():
        # Zeros (beyond the rank of the update) have no place on a logarithmic axis: the curve ends there.
        shown = np.where(values > 1e-7 * float(values.max()), values, np.nan)
        axes.semilogy(np.arange(1, len(shown) + 1), shown, label=name, linewidth=1.2)
    axes.set(title=title, xlabel="index", ylabel="singular value")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def wait_until_newest(folder: Path) -> None:
    """Wait until a file of events that is created now sorts behind those in `folder`: 1 s at most, as a rule no time.

    The names begin with the second of their creation, and TensorBoard reads the files in the order of their names: one
    that replaces the steps of another must come after it.
    """
    seconds = [re.match(r"events\.out\.tfevents\.(\d+)\.", path.name) for path in folder.glob("events.out.tfevents.*")]
    newest = max((int(found[1]) for found in seconds if found), default=0)
    time.sleep(min(1.0, max(0.0, newest + 1 - time.time())))
