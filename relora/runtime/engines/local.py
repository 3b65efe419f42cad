"""One process, or several with replicated parameters (DDP over NCCL or gloo), through accelerate."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from relora.method.store import Store, TorchStore
from relora.model import num_label_tokens, token_losses
from relora.runtime.engines.base import Batch, Live, Update, check_world


class LocalEngine:
    """Parameters whole on every rank; only gradients of trainable parameters travel, once an update."""

    def __init__(self, *, mixed_precision: str, num_processes: int | None) -> None:
        # cpu=True also makes a true world of an `accelerate launch` that would start independent copies.
        # bf16 is our own autocast: accelerate's would copy the logits to fp32 and patch model.forward.
        # Rank 0 writes checkpoints and the final model alone; the others wait longer than NCCL's ten minutes.
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=[patience]
        )
        self.world_size: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        device: torch.device = self.accelerator.device
        self.device = torch.device("cpu") if device.type == "cpu" else device
        self.name = "one process" if self.world_size == 1 else f"DDP ({torch.distributed.get_backend()})"
        self.store: Store = TorchStore()
        self._bf16 = mixed_precision == "bf16"
        check_world(self.world_size, num_processes)

    def prepare(self, model: nn.Module, *, compiled: bool) -> nn.Module:
        model.to(self.device)
        if self.device.type == "cuda":
            # The peak that is logged is that of the stage: the warm start's would hide the low-rank one's.
            torch.cuda.reset_peak_memory_stats(self.device)
        if compiled:
            model.compile()
        if self.world_size == 1:
            return model
        return DistributedDataParallel(
            model,
            device_ids=None if self.device.type == "cpu" else [self.device],
            gradient_as_bucket_view=True,
            # Buffers (rotary tables) are the same everywhere; sending them at each forward would cost a collective.
            forward_sync_buffers=False,
        )

    def update(
        self, live: Live, batches: Sequence[Batch], *, seeds: Sequence[int], max_grad_norm: float | None
    ) -> Update:
        [num_labels] = self.sum([sum(num_label_tokens(batch) for batch in batches)])
        num_labels = max(num_labels, 1)
        live.optimizer.zero_grad(set_to_none=True)
        losses = []
        for batch, seed in zip(batches, seeds, strict=True):
            torch.manual_seed(seed)
            with self._reduce_gradients(live, last=batch is batches[-1]):
                loss = self._token_losses(live.wrapped, batch)
                # DDP takes the mean over ranks; the loss is a sum over ranks and tokens.
                torch.autograd.backward(loss * (self.world_size / num_labels))
            losses.append(loss.detach())
        trained = [p for p in live.wrapped.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        # One transfer from the device for both.
        loss_here, grad_norm = torch.stack([torch.stack(losses).sum(), norm]).double().tolist()
        [total, num_bad] = self.sum([loss_here, float(not math.isfinite(grad_norm))])
        finite = num_bad == 0 and math.isfinite(total)
        if finite:
            if max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(trained, max_grad_norm, norm)
            live.optimizer.step()
        live.optimizer.zero_grad(set_to_none=True)
        return Update(loss=total / num_labels, grad_norm=grad_norm, applied=finite)

    @torch.no_grad()
    def token_losses(self, live: Live, batch: Batch) -> Tensor:
        return self._token_losses(live.model, batch)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16)

    def read_state(self, optimizer: Optimizer, parameter: nn.Parameter) -> tuple[dict[str, Tensor], float]:
        state = optimizer.state.get(parameter, {})
        return self.store.slots(optimizer, parameter), float(state.get("step", 0))

    def write_state(
        self, optimizer: Optimizer, parameter: nn.Parameter, moments: Mapping[str, Tensor], step: float
    ) -> None:
        slots = {slot: values.to(parameter, copy=True) for slot, values in moments.items()}
        optimizer.state[parameter] = {"step": torch.tensor(step, dtype=torch.float32), **slots}

    def sum(self, values: Sequence[float]) -> list[float]:
        if self.world_size == 1:
            return list(values)
        return cast(list[float], self.accelerator.reduce(self._tensor(values), reduction="sum").tolist())

    def same_everywhere(self, text: str) -> bool:
        return len(set(gather_object([text]))) == 1

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        # Without the barrier gloo processes now and then abort after correct results.
        self.barrier()
        self.accelerator.end_training()

    def _reduce_gradients(self, live: Live, *, last: bool) -> AbstractContextManager[None]:
        """Gradients travel in the backward pass of the last micro-batch alone."""
        if last or not isinstance(live.wrapped, DistributedDataParallel):
            return nullcontext()
        return cast(AbstractContextManager[None], live.wrapped.no_sync())

    def _token_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        on_device = {key: values.to(self.device, non_blocking=True) for key, values in batch.items()}
        with self.autocast():
            return token_losses(model, on_device)

    def _tensor(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.device)
