"""The canonical state of a run: engine-independent names and full shapes.

A resume, the switch between two stages, a change of engine and of the number of processes are one path:
state -> build -> go on.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from relora.method.choices import StageName


@dataclass(frozen=True)
class Clock:
    """The one clock. `step` counts applied updates, `samples_seen` also moves for a skipped batch."""

    step: int = 0
    samples_seen: int = 0

    def applied(self, samples: int) -> "Clock":
        return replace(self, step=self.step + 1, samples_seen=self.samples_seen + samples)

    def skipped(self, samples: int) -> "Clock":
        return replace(self, samples_seen=self.samples_seen + samples)


class Weights(Protocol):
    """Tensors by canonical name, full shapes. Where ranks pass them on to each other taking one is collective."""

    @property
    def names(self) -> Set[str]:
        """What there is."""

    def take(self, name: str) -> Tensor:
        """One tensor. Every rank takes each once, all in the same order: what was taken may be let go of."""


class Held:
    """Weights in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    @property
    def names(self) -> Set[str]:
        return self.tensors.keys()

    def take(self, name: str) -> Tensor:
        return self.tensors.pop(name)


@dataclass(frozen=True)
class State:
    """Everything a run needs to go on.

    Attributes:
        stage: the stage that makes the next update; None before anything was built.
        cycle: restarts that the weights have behind them.
        weights: parameters and buffers by canonical name, full shapes.
        codes: for the name of a frozen weight that is stored as codes, these codes as they are stored.
        moments: for a parameter's name its optimizer moments by slot, full shapes; empty after a switch.
        steps: for a parameter's name Adam's step count.
        evaluated: whether the evaluation that was due at this step, if any, has been made.
        share: the rank whose weights these are, where processes train apart.
        outer: state of the outer optimizer of processes that train apart.
    """

    clock: Clock = Clock()
    stage: StageName | None = None
    cycle: int = 0
    weights: Weights = field(default_factory=lambda: Held({}))
    codes: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    steps: Mapping[str, float] = field(default_factory=dict)
    evaluated: bool = True
    share: int = 0
    outer: Mapping[str, Tensor] = field(default_factory=dict)
