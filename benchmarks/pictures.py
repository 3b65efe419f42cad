"""Figures of the benchmarks; matplotlib is an extra, imported on use."""

from typing import Any


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches, which needs no screen, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")
