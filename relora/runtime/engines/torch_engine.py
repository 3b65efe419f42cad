"""Updates by torch's own autograd and optimizer: what one process, DDP and FSDP2 have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora.method.outer import OuterOptimizer
from relora.method.restart import RestartReport, restart
from relora.method.store import Store
from relora.model import compile_in_place, num_label_tokens, token_losses
from relora.runtime.engines.base import Batch, Live, Queued, on_device
from relora.runtime.engines.processes import Processes

# Devices that have computed when they are asked for the next thing: there is nothing to wait for.
IMMEDIATE = ("cpu",)


class TorchEngine(ABC):
    """An engine whose gradients are in `parameter.grad` after a backward pass, averaged over the ranks."""

    name: str
    store: Store

    def __init__(self, processes: Processes, *, mixed_precision: str, max_grad_norm: float | None) -> None:
        self.processes = processes
        self.is_apart, self.stream, self.outer = False, 0, OuterOptimizer()
        self._bf16 = mixed_precision == "bf16"
        self._max_grad_norm = max_grad_norm

    @abstractmethod
    def prepare(self, model: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> Live:
        """As in Engine."""

    def begin(self, live: Live) -> None:  # noqa: B027 (an engine may leave it so)
        """Nothing is due."""

    def restart(self, live: Live, **how: Any) -> RestartReport:
        return restart(live.model, live.optimizer, store=self.store, **how)

    def compile(self, live: Live) -> None:
        compile_in_place(live.model)

    def queues(self, live: Live) -> bool:
        """The fused AdamW alone can be told, on the device where its parameters are, to leave everything as it is."""
        device = self.processes.device.type
        can_be_told = getattr(live.optimizer, "_step_supports_amp_scaling", False) and device not in IMMEDIATE
        return can_be_told and all(p.device.type == device for p in live.model.parameters())

    def update(
        self, live: Live, batches: Sequence[Batch], *, seeds: Sequence[int], stop: bool, after: Queued | None = None
    ) -> Queued:
        labels_here = sum(num_label_tokens(batch) for batch in batches)
        [num_labels, num_stops] = self.processes.sum([labels_here, stop])
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
        n = self.processes.world_size
        return 2 * (n - 1) / n  # an all-reduce, once

    @contextmanager
    def inference(self, live: Live) -> Iterator[None]:
        was_training = live.model.training
        live.model.eval()
        try:
            with torch.no_grad(), self._autocast():
                yield
        finally:
            live.model.train(was_training)

    def token_losses(self, live: Live, batch: Batch) -> Tensor:
        return token_losses(live.model, on_device(batch, self.processes.device))

    def release(self, live: Live) -> None:
        live.optimizer.zero_grad(set_to_none=True)
        live.optimizer.state.clear()

    def _reduce_gradients(self, live: Live, *, last: bool) -> AbstractContextManager[None]:  # noqa: ARG002
        """Whether the gradients of this micro-batch travel."""
        return nullcontext()

    def _total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(gradients, foreach=True)

    def _backward(self, live: Live, batches: Sequence[Batch], seeds: Sequence[int], num_labels: float) -> Tensor:
        """Gradients of the mean loss over all ranks; returns the sum of this rank's token losses."""
        losses = []
        for batch, seed in zip(batches, seeds, strict=True):
            torch.manual_seed(seed)
            with self._reduce_gradients(live, last=batch is batches[-1]):
                loss = self._token_losses(live.wrapped, batch)
                # The mean over ranks is taken of gradients; the loss is a sum over ranks and tokens.
                torch.autograd.backward(loss * (self.processes.world_size / num_labels))
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _measured(self, loss: Tensor, norm: Tensor, num_labels: float) -> Tensor:
        """Mean loss and gradient norm of all ranks, on the device; not finite where they were not anywhere."""
        sums = torch.stack([loss, norm]).double()
        self.processes.add_up(sums)
        # The same norm on every rank, but where each trains parameters of its own. No tensor of divisors: to bring
        # it to the device the host would wait.
        return torch.stack([sums[0] / num_labels, sums[1] / self.processes.world_size])

    def _step(self, live: Live, trained: Sequence[nn.Parameter], norm: Tensor, *, unless: Tensor | None) -> None:
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
        return torch.autocast(self.processes.device.type, dtype=torch.bfloat16, enabled=self._bf16)

    def _token_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        with self._autocast():
            return token_losses(model, on_device(batch, self.processes.device))
