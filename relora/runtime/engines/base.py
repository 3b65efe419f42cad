"""What the rest of the program may ask of an engine."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora.method.outer import OuterOptimizer
from relora.method.restart import RestartReport
from relora.method.store import Store
from relora.runtime.engines.processes import Processes

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Update:
    """What one update measured.

    Attributes:
        loss: sum of the token losses over the global batch / its label tokens, in nats.
        grad_norm: norm of the whole gradient before clipping.
        applied: False when loss or gradient was not finite somewhere and no optimizer saw it.
    """

    loss: float
    grad_norm: float
    applied: bool


@dataclass(frozen=True)
class Queued:
    """An update that the device has been told to make.

    Attributes:
        measured: loss and gradient norm as in `Update`, float64, (2,); it may not have been computed yet.
        failed: whether the update is not made, since these, or those of an update it came after, are not finite.
        stop: whether some rank has been asked to stop.
    """

    measured: Tensor
    failed: Tensor
    stop: bool


def read(queued: Sequence[Queued]) -> list[Update]:
    """What updates queued one after the other measured, up to the first that was not made: the others were not either.

    The one time that the host waits for the device.
    """
    updates = []
    for loss, grad_norm in torch.stack([update.measured for update in queued]).tolist():
        applied = math.isfinite(loss) and math.isfinite(grad_norm)
        updates.append(Update(loss=loss, grad_norm=grad_norm, applied=applied))
        if not applied:
            break
    return updates


@dataclass
class Live:
    """A model in training. `model` is the plain module, `wrapped` what the engine made of it."""

    model: nn.Module
    wrapped: nn.Module
    optimizer: Optimizer


class Engine(Protocol):
    """One way to spread training over processes. All methods are collective: every rank calls them."""

    name: str
    processes: Processes
    is_apart: bool  # whether each rank now trains parameters of its own, that travel at restarts only
    stream: int  # which of several independent draws of the factors is this rank's
    outer: OuterOptimizer  # what becomes of the mean of the updates of ranks that train apart

    @property
    def store(self) -> Store:
        """How its parameters and their optimizer state are reached."""

    def prepare(self, model: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> Live:
        """Move a model to its device, spread it over the ranks, and give it its optimizer.

        The values of its parameters do not matter: they are written through `store` afterwards.
        """

    def begin(self, live: Live) -> None:
        """The weights of a stage that now begins are in place."""

    def restart(self, live: Live, **how: Any) -> RestartReport:
        """`relora.restart` with the engine's way to reach parameters and state; `how` is passed on."""

    def compile(self, live: Live) -> None:
        """Compile the model with torch.compile."""

    def queues(self, live: Live) -> bool:
        """Whether an update may be asked for before it is known what became of the one before."""

    def update(
        self, live: Live, batches: Sequence[Batch], *, seeds: Sequence[int], stop: bool, after: Queued | None = None
    ) -> Queued:
        """Forward and backward over this rank's micro-batches, clip, and one step of the optimizer.

        Args:
            seeds: of the random draws (dropout) of each micro-batch.
            stop: whether this rank has been asked to stop; all hear of it by what is returned.
            after: the update before, if it has not been read yet (`queues`). This one is not made if that one is not.
        """

    def sent_per_gradient_byte(self, num_micro_batches: int) -> float:
        """Bytes that a rank sends in an update for each byte of a trained parameter's gradient, in rings."""

    def inference(self, live: Live) -> AbstractContextManager[None]:
        """Forward passes beside training: no gradients, no dropout, the precision of training.

        Every rank makes the same number of them.
        """

    def token_losses(self, live: Live, batch: Batch) -> Tensor:
        """Sum of the token losses of this rank's batch, within `inference`."""

    def release(self, live: Live) -> None:
        """Let go of all that training alone needs; the weights can still be read."""


def on_device(batch: Batch, device: torch.device) -> Batch:
    return {key: values.to(device, non_blocking=True) for key, values in batch.items()}
