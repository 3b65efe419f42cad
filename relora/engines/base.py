"""What the rest of the program may ask of an engine."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora.engines.entry import Entry
from relora.engines.outer import OuterOptimizer
from relora.engines.world import World
from relora.method.restart import RestartReport, restart
from relora.method.store import Store
from relora.model.model import compile_in_place, num_label_tokens, token_losses

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
class TrainState:
    """A model in training. `model` is the plain module, `wrapped` what the engine made of it."""

    model: nn.Module
    wrapped: nn.Module
    optimizer: Optimizer


class Engine(Protocol):
    """One way to spread training over processes. All methods are collective: every rank calls them."""

    name: str
    world: World
    is_apart: bool  # whether each rank now trains parameters of its own, that travel at restarts only
    splits_masters: bool  # whether each process holds a shard of an exact master, or the whole of it
    num_states: int  # how many processes train parameters of their own; 1 if all train the same
    draw_index: int  # which of several independent draws of the factors is this rank's
    outer: OuterOptimizer  # what becomes of the mean of the updates of ranks that train apart

    @property
    def store(self) -> Store:
        """How its parameters and their optimizer state are reached."""

    def prepare(self, model: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> TrainState:
        """Move a model to its device, spread it over the ranks, and give it its optimizer.

        The values of its parameters do not matter: they are written through `store` afterwards.
        """

    def begin(self, live: TrainState) -> None:
        """The weights of a stage that now begins are in place."""

    def restart(self, live: TrainState, **how: Any) -> RestartReport:
        """`relora.restart` with the engine's way to reach parameters and state; `how` is passed on."""

    def compile(self, live: TrainState) -> None:
        """Compile the model with torch.compile."""

    def queues(self, live: TrainState) -> bool:
        """Whether an update may be asked for before it is known what became of the one before."""

    def update(
        self,
        live: TrainState,
        batches: Sequence[Batch],
        *,
        seeds: Sequence[int],
        stop: bool,
        after: Queued | None = None,
    ) -> Queued:
        """Forward and backward over this rank's micro-batches, clip, and one step of the optimizer.

        Args:
            seeds: of the random draws (dropout) of each micro-batch.
            stop: whether this rank has been asked to stop; all hear of it by what is returned.
            after: the update before, if it has not been read yet (`queues`). This one is not made if that one is not.
        """

    def sent_per_gradient_byte(self, num_micro_batches: int) -> float:
        """Bytes that a rank sends in an update for each byte of a trained parameter's gradient, in rings."""

    def inference(self, live: TrainState) -> AbstractContextManager[None]:
        """Forward passes beside training: no gradients, no dropout, the precision of training.

        Every rank makes the same number of them.
        """

    def token_losses(self, live: TrainState, batch: Batch) -> Tensor:
        """Sum of the token losses of this rank's batch, within `inference`."""

    def trained_entries(self, entries: Sequence[Entry]) -> list[Entry]:
        """`entries` of this process, for a checkpoint: where processes train apart, those of all of them."""

    def extra_state(self) -> dict[str, Tensor]:
        """State beside parameters and moments, by name, for a checkpoint."""

    def release(self, live: TrainState) -> None:
        """Let go of all that training alone needs; the weights can still be read."""


def on_device(batch: Batch, device: torch.device) -> Batch:
    return {key: values.to(device, non_blocking=True) for key, values in batch.items()}


# Devices that have computed when they are asked for the next thing: there is nothing to wait for.
IMMEDIATE = ("cpu",)


class TorchEngine(ABC):
    """An engine whose gradients are in `parameter.grad` after a backward pass, averaged over the ranks."""

    name: str
    store: Store
    splits_masters = True
    num_states = 1

    def __init__(self, world: World, *, mixed_precision: str, max_grad_norm: float | None) -> None:
        self.world = world
        self.is_apart, self.draw_index, self.outer = False, 0, OuterOptimizer()
        self._bf16 = mixed_precision == "bf16"
        self._max_grad_norm = max_grad_norm

    @abstractmethod
    def prepare(self, model: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> TrainState:
        """As in Engine."""

    def begin(self, live: TrainState) -> None:  # noqa: B027 (an engine may leave it so)
        """Nothing is due."""

    def restart(self, live: TrainState, **how: Any) -> RestartReport:
        return restart(live.model, live.optimizer, store=self.store, **how)

    def compile(self, live: TrainState) -> None:
        compile_in_place(live.model)

    def queues(self, live: TrainState) -> bool:
        """The fused AdamW alone can be told, on the device where its parameters are, to leave everything as it is."""
        device = self.world.device.type
        can_be_told = getattr(live.optimizer, "_step_supports_amp_scaling", False) and device not in IMMEDIATE
        return can_be_told and all(p.device.type == device for p in live.model.parameters())

    def update(
        self,
        live: TrainState,
        batches: Sequence[Batch],
        *,
        seeds: Sequence[int],
        stop: bool,
        after: Queued | None = None,
    ) -> Queued:
        labels_here = sum(num_label_tokens(batch) for batch in batches)
        [num_labels, num_stops] = self.world.sum([labels_here, stop])
        num_labels = max(num_labels, 1)
        live.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(live, batches, seeds, num_labels)
        trained = [p for p in live.wrapped.parameters() if p.grad is not None]
        norm = self._total_norm([p.grad for p in trained if p.grad is not None])
        measured = self._measured(loss, norm, num_labels)
        queues = self.queues(live)
        if not queues:
            measured = torch.tensor(measured.tolist(), dtype=torch.float64)
        failed = ~measured.isfinite().all()
        if after is not None:
            failed |= after.failed
        if queues or not failed:
            self._step(live, trained, norm, unless=failed if queues else None)
        live.optimizer.zero_grad(set_to_none=True)
        return Queued(measured=measured, failed=failed, stop=num_stops > 0)

    def sent_per_gradient_byte(self, num_micro_batches: int) -> float:  # noqa: ARG002
        n = self.world.num_processes
        return 2 * (n - 1) / n  # an all-reduce, once

    @contextmanager
    def inference(self, live: TrainState) -> Iterator[None]:
        was_training = live.model.training
        live.model.eval()
        try:
            with torch.no_grad(), self._autocast():
                yield
        finally:
            live.model.train(was_training)

    def token_losses(self, live: TrainState, batch: Batch) -> Tensor:
        return token_losses(live.model, on_device(batch, self.world.device))

    def trained_entries(self, entries: Sequence[Entry]) -> list[Entry]:
        return list(entries)

    def extra_state(self) -> dict[str, Tensor]:
        return {}

    def release(self, live: TrainState) -> None:
        live.optimizer.zero_grad(set_to_none=True)
        live.optimizer.state.clear()

    def _reduce_gradients(self, live: TrainState, *, last: bool) -> AbstractContextManager[None]:  # noqa: ARG002
        """Whether the gradients of this micro-batch travel."""
        return nullcontext()

    def _total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(gradients, foreach=True)

    def _backward(self, live: TrainState, batches: Sequence[Batch], seeds: Sequence[int], num_labels: float) -> Tensor:
        """Gradients of the mean loss over all ranks; returns the sum of this rank's token losses."""
        losses = []
        for batch, seed in zip(batches, seeds, strict=True):
            torch.manual_seed(seed)
            with self._reduce_gradients(live, last=batch is batches[-1]):
                loss = self._token_losses(live.wrapped, batch)
                # The mean over ranks is taken of gradients; the loss is a sum over ranks and tokens.
                torch.autograd.backward(loss * (self.world.num_processes / num_labels))
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _measured(self, loss: Tensor, norm: Tensor, num_labels: float) -> Tensor:
        """Mean loss and gradient norm of all ranks, on the device; not finite where they were not anywhere."""
        sums = torch.stack([loss, norm]).double()
        self.world.all_reduce(sums)
        # The same norm on every rank, but where each trains parameters of its own. No tensor of divisors: to bring
        # it to the device the host would wait.
        return torch.stack([sums[0] / num_labels, sums[1] / self.world.num_processes])

    def _step(self, live: TrainState, trained: Sequence[nn.Parameter], norm: Tensor, *, unless: Tensor | None) -> None:
        """Clip and step; with `unless`, a bool on the device, the optimizer sees there whether it is to do nothing."""
        if self._max_grad_norm is not None:
            # foreach must be asked for: by itself torch takes DTensors one at a time.
            torch.nn.utils.clip_grads_with_norm_(trained, self._max_grad_norm, norm, foreach=True)
        optimizer: Any = live.optimizer
        # The name by which torch's gradient scaler tells a fused optimizer.
        optimizer.found_inf = None if unless is None else unless.float()
        optimizer.step()
        optimizer.found_inf = None

    def _autocast(self) -> torch.autocast:
        # Our own: accelerate's would copy the logits to fp32 and patch model.forward.
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=self._bf16)

    def _token_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        with self._autocast():
            return token_losses(model, on_device(batch, self.world.device))
