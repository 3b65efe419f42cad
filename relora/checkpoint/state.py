"""The canonical state of a run: engine-independent names and full shapes.

A start, a resume, the switch between two stages, a change of engine or of the number of processes are one path:
state -> build -> train.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field

from torch import Tensor

from relora.checkpoint.format import History, MetricsFacts
from relora.method.choices import StageName


@dataclass(frozen=True)
class Weights:
    """Tensors by canonical name, in full shapes.

    Attributes:
        names: the names of all tensors.
        take: gives one tensor, once: it may be released when it has been taken. Collective where processes send tensors
            to each other: all take all of them, in the same order.
    """

    names: Set[str]
    take: Callable[[str], Tensor]


def weights_in_memory(tensors: dict[str, Tensor]) -> Weights:
    """Weights that are released from `tensors` as they are taken."""
    return Weights(tensors.keys(), tensors.pop)


@dataclass(frozen=True)
class State:
    """Everything that a run needs to resume.

    Attributes:
        step: batches consumed so far.
        history: what they have told.
        stage: the stage of the next update; None before anything was built.
        cycle: restarts that the weights have behind them.
        weights: parameters and buffers by canonical name, full shapes.
        quantized: by parameter name the int8 or nf4 values, as stored, of frozen weights.
        moments: by parameter name the optimizer moments by slot, full shapes; empty after a switch.
        steps: by parameter name the optimizer's step count; none for an optimizer without one.
        evaluated: whether the evaluation that was due at this step, if any, has been made.
        metrics: the metrics file at this step; None where nobody recorded it.
        state_index: the process whose weights these are, where processes train separately.
        extra: state of the engine by name, as of `Engine.extra_state`.
    """

    step: int = 0
    history: History = field(default_factory=History)
    stage: StageName | None = None
    cycle: int = 0
    weights: Weights = field(default_factory=lambda: weights_in_memory({}))
    quantized: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    steps: Mapping[str, float] = field(default_factory=dict)
    evaluated: bool = True
    metrics: MetricsFacts | None = None
    state_index: int = 0
    extra: Mapping[str, Tensor] = field(default_factory=dict)
