"""One process, or several with replicated parameters (DDP over NCCL or gloo)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from relora.config import Config
from relora.engines.base import Engine, TrainState, restrict_layers
from relora.engines.sharded_store import ReplicatedStore
from relora.engines.world import World
from relora.model.tasks import Task


class OneProcessEngine(Engine):
    """Whole parameters on one device."""

    name = "one process"

    def __init__(self, world: World, task: Task, *, mixed_precision: str, max_grad_norm: float | None) -> None:
        super().__init__(world, task, mixed_precision=mixed_precision, max_grad_norm=max_grad_norm)
        self.store = ReplicatedStore(world.device)

    @classmethod
    def from_config(cls, config: Config, world: World, task: Task) -> "OneProcessEngine":
        """The engine with the settings of `config`."""
        precision, max_grad_norm = config.training.mixed_precision, config.optim.max_grad_norm
        return cls(world, task, mixed_precision=precision, max_grad_norm=max_grad_norm)

    def prepare(self, model: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> TrainState:
        model.to(self.world.device)
        restrict_layers(model, cache_span="update", can_group=True)
        return TrainState(model=model, parallel_model=self.parallelize(model), optimizer=build_optimizer(model))

    def parallelize(self, model: nn.Module) -> nn.Module:
        """The module for the forward passes of training."""
        return model


class DDPEngine(OneProcessEngine):
    """Whole parameters on every process; the gradients of trainable parameters travel, once an update."""

    def __init__(self, world: World, task: Task, *, mixed_precision: str, max_grad_norm: float | None) -> None:
        super().__init__(world, task, mixed_precision=mixed_precision, max_grad_norm=max_grad_norm)
        self.name = f"DDP ({world.backend})"

    def parallelize(self, model: nn.Module) -> nn.Module:
        if self.world.num_processes == 1:
            return model
        device = self.world.device
        return DistributedDataParallel(
            model,
            device_ids=None if device.type == "cpu" else [device],
            gradient_as_bucket_view=True,
            # Buffers (rotary tables) are the same everywhere; sending them at each forward would cost a collective.
            forward_sync_buffers=False,
            # Nor are the weights sent now: they are written afterwards, the same on every process.
            init_sync=False,
            find_unused_parameters=self.some_gradients_missing,
        )

    def gradient_sync(self, state: TrainState, *, is_last: bool) -> AbstractContextManager[None]:
        if is_last or state.parallel_model is state.model:
            return nullcontext()
        return cast(AbstractContextManager[None], cast(DistributedDataParallel, state.parallel_model).no_sync())
