"""One process, or several with replicated parameters (DDP over NCCL or gloo)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from relora.engines.base import TorchEngine, TrainState
from relora.engines.sharded_store import ReplicatedStore
from relora.engines.world import World


class DDPEngine(TorchEngine):
    """Parameters whole on every rank; only gradients of trainable parameters travel, once an update."""

    def __init__(self, world: World, *, mixed_precision: str, max_grad_norm: float | None) -> None:
        super().__init__(world, mixed_precision=mixed_precision, max_grad_norm=max_grad_norm)
        self.name = "one process" if world.num_processes == 1 else f"DDP ({world.backend})"
        self.store = ReplicatedStore(world.device)

    def prepare(self, model: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> TrainState:
        model.to(self.world.device)
        return TrainState(model=model, wrapped=self._wrapped(model), optimizer=build_optimizer(model))

    def _wrapped(self, model: nn.Module) -> nn.Module:
        if self.world.num_processes == 1:
            return model
        device = self.world.device
        return DistributedDataParallel(
            model,
            device_ids=None if device.type == "cpu" else [device],
            gradient_as_bucket_view=True,
            # Buffers (rotary tables) are the same everywhere; sending them at each forward would cost a collective.
            forward_sync_buffers=False,
            # Nor are the weights sent now: they are written afterwards, the same on every rank.
            init_sync=False,
        )

    def _reduce_gradients(self, live: TrainState, *, last: bool) -> AbstractContextManager[None]:
        """Gradients travel in the backward pass of the last micro-batch alone."""
        if last or not isinstance(live.wrapped, DistributedDataParallel):
            return nullcontext()
        return cast(AbstractContextManager[None], live.wrapped.no_sync())
