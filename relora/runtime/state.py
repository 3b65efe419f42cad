"""The canonical state of a run: engine-independent names and full shapes.

A resume, the switch between two stages, a change of engine and of the number of processes are one path:
state -> build -> go on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from relora.method.schedule import StageName


@dataclass(frozen=True)
class Clock:
    """The one clock. `step` counts applied updates, `samples_seen` also moves for a skipped batch."""

    step: int = 0
    samples_seen: int = 0

    def applied(self, samples: int) -> "Clock":
        return replace(self, step=self.step + 1, samples_seen=self.samples_seen + samples)

    def skipped(self, samples: int) -> "Clock":
        return replace(self, samples_seen=self.samples_seen + samples)


@dataclass(frozen=True)
class State:
    """Everything a run needs to go on.

    Attributes:
        stage: the stage that makes the next update; None before anything was built.
        cycle: restarts that the weights have behind them.
        weights: parameters and buffers by canonical name, full shapes.
        moments: for a parameter's name its optimizer moments by slot, full shapes; empty after a switch.
        steps: for a parameter's name Adam's step count.
    """

    clock: Clock = Clock()
    stage: StageName | None = None
    cycle: int = 0
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    steps: Mapping[str, float] = field(default_factory=dict)

    def free(self) -> None:
        """Let go of weights that are held in memory (those of a switch): a state is built from once."""
        if isinstance(self.weights, dict):
            self.weights.clear()
