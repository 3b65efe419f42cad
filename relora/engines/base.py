"""The contract of an engine, and an update by torch's own autograd and optimizer."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora.data import Batch
from relora.engines.state_entry import Entry
from relora.engines.world import World
from relora.method.choices import CacheSpan
from relora.method.lora import lora_layers
from relora.method.names import named_parameters
from relora.method.reinit import Reinit
from relora.method.restart import RestartReport, restart
from relora.method.store import Store
from relora.model.model import compile_in_place
from relora.model.tasks import Task


@dataclass(frozen=True)
class Update:
    """The results of one update. The tensors are scalars; those on the device may not have been computed yet.

    Attributes:
        loss: sum of the losses over the global batch / its number of labels, in nats.
        grad_norm: norm of the whole gradient before clipping; where processes train separately, the mean of theirs.
        skipped: bool; whether no process wrote anything, as loss or gradient was not finite on some process, or the
            loss above `max_loss`.
        stop: whether some process has been asked to stop.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    stop: bool


@dataclass
class TrainState:
    """A model in training.

    Attributes:
        model: the plain module.
        parallel_model: the module that the engine wraps around it for training's forward passes.
    """

    model: nn.Module
    parallel_model: nn.Module
    optimizer: Optimizer

    @cached_property
    def skips_on_device(self) -> bool:
        """Whether a flag on the device, which the host never reads, can keep the optimizer from writing anything.

        Torch's fused optimizers can, where all parameters are on one device.
        """
        devices = {parameter.device for group in self.optimizer.param_groups for parameter in group["params"]}
        return len(devices) == 1 and bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))


class Engine(ABC):
    """One way to spread training over processes.

    Every process calls its methods in the same order, as some of them communicate.

    A subclass sets `name` and `store` and prepares models; the rest has defaults for whole parameters whose gradients
    are averaged in the backward pass.

    Attributes:
        store: access to the parameters and their optimizer state.
        draw_index: which of several independent draws of the factors this process trains.
        num_states: number of processes that train parameters of their own; 1 if all train the same.
        splits_masters: whether the exact masters of coarsely stored weights (bf16, int8, nf4) are sharded.
        reduces_gradients: whether processes exchange the gradients of an update.
        some_gradients_missing: whether a batch may leave some trained parameters without a gradient (experts). Set
            before `prepare`.
        counted_update: the first update of a process that sends as much as all later ones. Not the second under DDP,
            which then sends the order of its buckets.
    """

    name: str
    store: Store
    draw_index = 0
    num_states = 1
    splits_masters = True
    reduces_gradients = True
    some_gradients_missing = False
    counted_update = 1

    def __init__(self, world: World, task: Task, *, mixed_precision: str, max_grad_norm: float | None) -> None:
        self.world, self.task = world, task
        self._max_grad_norm = max_grad_norm
        # The precision of training, entered anew for each use. Accelerate's would copy the logits to fp32 and patch
        # model.forward.
        bf16 = mixed_precision == "bf16"
        self.autocast = partial(torch.autocast, world.device.type, dtype=torch.bfloat16, enabled=bf16)

    @abstractmethod
    def prepare(self, model: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> TrainState:
        """Move a model to its device, distribute it over the processes, and give it its optimizer.

        An engine whose parameters are not always whole, or are written outside of torch's optimizers, must also call
        `restrict_layers`. The values of the parameters do not matter: they are written through `store` afterwards.
        """

    def begin(  # noqa: B027 (an engine may have nothing to do)
        self, state: TrainState, extra: Mapping[str, Tensor], *, cycle: int, draw_index: int
    ) -> None:
        """Take over the rest of a saved state, once the weights are in place.

        Args:
            extra: what `extra_state` returned when the state was saved; empty for a stage that begins.
            cycle: number of restarts that the weights have behind them.
            draw_index: the draw that the loaded factors come from.
        """

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors beside weights and optimizer state that a checkpoint needs, by name."""
        return {}

    def trained_entries(self, entries: Sequence[Entry]) -> list[Entry]:
        """The entries of a checkpoint for `entries`; those of all processes where they train separately."""
        return list(entries)

    def update(
        self,
        state: TrainState,
        batches: Sequence[Batch],
        *,
        seeds: Sequence[int],
        stop: bool,
        max_loss: float = math.inf,
    ) -> Update:
        """Forward and backward over this process's micro-batches, clip, and one step of the optimizer.

        Args:
            seeds: one for the random draws (dropout) of each micro-batch.
            stop: whether this process has been asked to stop; all learn of it from the result.
            max_loss: with a larger loss the update is skipped. The same on all processes.
        """
        # 1. The divisor of the loss: labels of all processes. Counted on the host, so nothing waits for the device.
        num_labels, num_stops = self.world.sum([sum(map(self.task.num_labels, batches)), stop])
        num_labels = max(num_labels, 1)

        # 2. Gradients. Processes average them, and the loss is a sum over processes: hence the factor.
        losses = []
        for batch, seed in zip(batches, seeds, strict=True):
            torch.manual_seed(seed)
            with self.gradient_sync(state, is_last=batch is batches[-1]):
                with self.autocast():
                    loss = self.task.loss(state.parallel_model, self.to_device(batch))
                torch.autograd.backward(loss * (self.world.num_processes / num_labels))
            losses.append(loss.detach())
        trained = [p for p in state.parallel_model.parameters() if p.grad is not None]
        norm = self.total_norm(trained)

        # 3. The same loss, norm and verdict on every process. No tensor is created on the host here: copying it to the
        # device would block.
        sums = torch.stack([torch.stack(losses).sum(), norm]).double()
        self.world.all_reduce(sums)
        mean_loss, mean_norm = sums[0] / num_labels, sums[1] / self.world.num_processes
        skipped = ~(mean_loss + mean_norm).isfinite() | (mean_loss > max_loss)

        # 4. Clip and step.
        if self._max_grad_norm is not None:
            # foreach must be asked for: by itself torch takes DTensors one at a time.
            torch.nn.utils.clip_grads_with_norm_(trained, self._max_grad_norm, norm, foreach=True)
        self.step(state, skipped)
        state.optimizer.zero_grad(set_to_none=True)
        return Update(loss=mean_loss, grad_norm=mean_norm, skipped=skipped, stop=num_stops > 0)

    def step(self, state: TrainState, skipped: Tensor) -> None:
        """Step the optimizer unless `skipped`. A fused optimizer decides on the device, so the host need not wait."""
        optimizer: Any = state.optimizer
        if state.skips_on_device:
            # Torch's GradScaler sets this attribute to make a fused optimizer skip its step, step counts included.
            optimizer.found_inf = skipped.float()
            optimizer.step()
            optimizer.found_inf = None
        elif not skipped.item():
            optimizer.step()

    def gradient_sync(self, state: TrainState, *, is_last: bool) -> AbstractContextManager[None]:  # noqa: ARG002
        """Context of one micro-batch that controls whether its gradients are reduced; `is_last` of its update."""
        return nullcontext()

    def total_norm(self, trained: Sequence[nn.Parameter]) -> Tensor:
        """The norm of all gradients together; the same on every process wherever gradients are reduced."""
        return torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None], foreach=True)

    def to_device(self, batch: Batch) -> Batch:
        """The tensors of a batch on this process's device; does not wait for the copies."""
        return {key: values.to(self.world.device, non_blocking=True) for key, values in batch.items()}

    @contextmanager
    def inference(self, state: TrainState) -> Iterator[None]:
        """Forward passes beside training: no gradients, no dropout, the precision of training.

        Every process makes the same number of them.
        """
        was_training = state.model.training
        state.model.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield
        finally:
            state.model.train(was_training)

    def loss(self, state: TrainState, batch: Batch) -> Tensor:
        """Sum of the losses of this process's batch, within `inference`."""
        return self.task.loss(state.model, self.to_device(batch))

    def restart(
        self,
        state: TrainState,
        *,
        seed: int,
        index: int,
        reinit: str | Reinit = "kaiming",
        optimizer_reset: str = "zero",
        prune_ratio: float = 0.9,
        carry_residual: bool = False,
    ) -> RestartReport:
        """`relora.restart` with the engine's access to parameters and state; arguments and errors as there."""
        report = restart(
            state.model,
            state.optimizer,
            seed=seed,
            index=index,
            reinit=reinit,
            optimizer_reset=optimizer_reset,
            prune_ratio=prune_ratio,
            carry_residual=carry_residual,
            store=self.restart_store(state),
            draw_index=self.draw_index,
            transform_delta=self.transform_delta,
        )
        self.synchronize(state)
        return report

    def synchronize(self, state: TrainState) -> None:
        """Make the copies of parameters equal after a restart where processes compute on devices of different kinds.

        These round differently, so that the same merge comes out with other last bits. The first process's copies are
        taken; they differ from the others' by this rounding alone.
        """
        if self.world.is_mixed:
            for values in self.replicas(state).values():
                values.copy_(self.world.broadcast(values, 0))

    def replicas(self, state: TrainState) -> dict[str, Tensor]:
        """The parameters that every process holds a copy of, by name.

        A sharded parameter has no second copy that could differ.
        """
        found = {}
        for name, parameter in named_parameters(state.model).items():
            shard = self.store.local(parameter)
            if not shard.is_partial:
                found[name] = shard.values
        return found

    def restart_store(self, state: TrainState) -> Store:  # noqa: ARG002
        """The store that a restart works on."""
        return self.store

    def transform_delta(self, name: str, delta: Tensor) -> Tensor:  # noqa: ARG002
        """The update to merge into the weight of layer `name`, for the one that was learned."""
        return delta

    def checksum(self, state: TrainState) -> str:
        """Sums of all parameters that every process holds a copy of: equal on all after a restart.

        The bits are summed as integers. Sums of equal floating-point values may differ, as devices of different kinds
        add in different orders.
        """
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        sums = {}
        for name, values in self.replicas(state).items():
            bits = values.contiguous().view(-1).view(integers[values.element_size()])
            sums[name] = bits.sum(dtype=torch.int64).item()
        return str(sums)

    def sent_per_gradient_byte(self, num_micro_batches: int) -> float:  # noqa: ARG002
        """Bytes that a process sends in an update for each byte of a trained parameter's gradient, in rings."""
        n = self.world.num_processes
        return 2 * (n - 1) / n  # an all-reduce, once

    def compile(self, state: TrainState) -> None:
        """Compile the model with torch.compile."""
        self.counted_update = 3  # counting hinders the compilation, which the first updates bring
        compile_in_place(state.model)

    def release(self, state: TrainState) -> None:
        """Free all memory that training alone needs; the weights can still be read."""
        state.optimizer.zero_grad(set_to_none=True)
        state.optimizer.state.clear()


def restrict_layers(model: nn.Module, *, cache_span: CacheSpan, can_group: bool) -> None:
    """Tell the wrapped layers what the engine's handling of their parameters allows.

    Args:
        cache_span: how long W + delta may be cached (`LoRALinear`): "update" if W stays whole, and writes to the
            factors are counted.
        can_group: layers that read the same input may be computed together: all are whole at the same time.
    """
    for layer in lora_layers(model).values():
        layer.cache_span, layer.can_group = cache_span, can_group
