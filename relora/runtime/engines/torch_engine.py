"""Updates by torch's own autograd and optimizer: what one process, DDP and FSDP2 have in common."""

import math
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
from relora.model import num_label_tokens, token_losses
from relora.runtime.engines.base import Batch, Live, Update, on_device
from relora.runtime.engines.processes import Processes


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
        live.model.compile()

    def update(self, live: Live, batches: Sequence[Batch], *, seeds: Sequence[int], stop: bool) -> Update:
        labels_here = sum(num_label_tokens(batch) for batch in batches)
        [num_labels, num_stops] = self.processes.sum([labels_here, stop])
        num_labels = max(num_labels, 1)
        live.optimizer.zero_grad(set_to_none=True)
        losses = []
        for batch, seed in zip(batches, seeds, strict=True):
            torch.manual_seed(seed)
            with self._reduce_gradients(live, last=batch is batches[-1]):
                loss = self._token_losses(live.wrapped, batch)
                # The mean over ranks is taken of gradients; the loss is a sum over ranks and tokens.
                torch.autograd.backward(loss * (self.processes.world_size / num_labels))
            losses.append(loss.detach())
        trained = [p for p in live.wrapped.parameters() if p.grad is not None]
        norm = self._total_norm([p.grad for p in trained if p.grad is not None])
        total, norms = self._read_sums(torch.stack([torch.stack(losses).sum(), norm]))
        finite = math.isfinite(total) and math.isfinite(norms)
        if finite:
            if self._max_grad_norm is not None:
                # foreach must be asked for: by itself torch takes DTensors one at a time.
                torch.nn.utils.clip_grads_with_norm_(trained, self._max_grad_norm, norm, foreach=True)
            live.optimizer.step()
        live.optimizer.zero_grad(set_to_none=True)
        # The same norm on every rank, but where each trains parameters of its own.
        mean_norm = norms / self.processes.world_size
        return Update(loss=total / num_labels, grad_norm=mean_norm, applied=finite, stop=num_stops > 0)

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

    def _read_sums(self, measured: Tensor) -> list[float]:
        """Sums over all ranks, in float64, of what was measured on the device; what is not finite anywhere is not then.

        The one time in an update that the host waits for the device: the clock depends on it.
        """
        sums = measured.double()
        self.processes.add_up(sums)
        return list(sums.tolist())

    def _autocast(self) -> torch.autocast:
        # Our own: accelerate's would copy the logits to fp32 and patch model.forward.
        return torch.autocast(self.processes.device.type, dtype=torch.bfloat16, enabled=self._bf16)

    def _token_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        with self._autocast():
            return token_losses(model, on_device(batch, self.processes.device))
