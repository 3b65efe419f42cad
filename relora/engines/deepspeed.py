"""DeepSpeed ZeRO-1, 2 and 3: moments, gradients and (3) parameters in flat partitions."""

import gc
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora.config import Config
from relora.data import Batch
from relora.engines.base import Engine, TrainState, Update, restrict_layers
from relora.engines.deepspeed_config import deepspeed_settings, wants_deepspeed_adamw
from relora.engines.world import World
from relora.engines.zero_store import ZeroStore
from relora.model.tasks import Task


class DeepSpeedEngine(Engine):
    """ZeRO around the configured optimizer, or around DeepSpeed's own AdamW.

    Args:
        settings: DeepSpeed's configuration.
        use_deepspeed_adamw: instead of the configured optimizer.
    """

    def __init__(
        self, world: World, task: Task, settings: Mapping[str, Any], *, mixed_precision: str, use_deepspeed_adamw: bool
    ) -> None:
        super().__init__(world, task, mixed_precision=mixed_precision, max_grad_norm=None)  # DeepSpeed clips itself
        if world.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("WARNING")
        self._deepspeed = deepspeed
        self._settings, self._use_deepspeed_adamw = settings, use_deepspeed_adamw
        self.zero_stage = int(settings["zero_optimization"]["stage"])
        self.name = f"DeepSpeed ZeRO-{self.zero_stage} ({world.backend})"
        self.store: ZeroStore = ZeroStore(world.device)
        if self.zero_stage == 3:
            self.counted_update = 3  # before, it learns the order of the modules, and gathers more often

    @classmethod
    def from_config(cls, config: Config, world: World, task: Task) -> "DeepSpeedEngine":
        """The engine with the launcher's settings, completed from `config`."""
        settings, precision = deepspeed_settings(config, world.num_processes), config.training.mixed_precision
        return cls(world, task, settings, mixed_precision=precision, use_deepspeed_adamw=wants_deepspeed_adamw())

    def prepare(self, model: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> TrainState:
        # ZeRO writes factors through flat buffers, which counts no versions; ZeRO-3 gathers one module at a time.
        restrict_layers(model, cache_span="none", can_group=self.zero_stage < 3)
        optimizer = build_optimizer(model)
        if self._use_deepspeed_adamw:
            optimizer = self._deepspeeds_adamw(optimizer)
        engine, zero, *_ = self._deepspeed.initialize(
            model=model, optimizer=optimizer, config=dict(self._settings), dist_init_required=False
        )
        self.store.zero = zero
        return TrainState(model=model, parallel_model=engine, optimizer=zero)

    def update(
        self,
        state: TrainState,
        batches: Sequence[Batch],
        *,
        seeds: Sequence[int],
        stop: bool,
        max_loss: float = math.inf,
    ) -> Update:
        """As in Engine, with DeepSpeed's backward pass and step, which wait for the device in each update."""
        engine: Any = state.parallel_model
        num_labels, num_stops = self.world.sum([sum(map(self.task.num_labels, batches)), stop])
        num_labels, losses = max(num_labels, 1), []
        # Processes average gradients, and the loss is a sum over processes.
        factor: float | Tensor = self.world.num_processes / num_labels
        for batch, seed in zip(batches, seeds, strict=True):
            torch.manual_seed(seed)
            is_last = batch is batches[-1]
            engine.set_gradient_accumulation_boundary(is_last)
            loss = self.task.loss(engine, self.to_device(batch))
            losses.append(loss.detach())
            if is_last:
                summed = torch.stack(losses).sum().double()
                self.world.all_reduce(summed)
                # DeepSpeed skips an update whose gradient norm, agreed by all processes, is not finite: a loss that is
                # not finite, or too large, turns the gradient into NaN on the device, and the host need not look at it
                # now.
                is_good = summed.isfinite() & ~(summed / num_labels > max_loss)
                factor = torch.where(is_good, factor, math.nan).to(loss.dtype)
            engine.backward(loss * factor)
        total = summed.item()
        engine.step()
        applied = bool(engine.was_step_applied())
        norm = float(engine.get_global_grad_norm()) if applied else math.nan
        mean_loss, grad_norm = torch.tensor([total / num_labels, norm], dtype=torch.float64)
        return Update(loss=mean_loss, grad_norm=grad_norm, skipped=torch.tensor(not applied), stop=num_stops > 0)

    def sent_per_gradient_byte(self, num_micro_batches: int) -> float:
        n = self.world.num_processes
        reduced = {1: 2, 2: 2 * num_micro_batches, 3: num_micro_batches}[self.zero_stage]
        # ZeRO-1 and 2 then gather the updated parameters; ZeRO-3 gathers all of them at their use, trained or not.
        return (n - 1) / n * (reduced + (self.zero_stage < 3))

    def release(self, state: TrainState) -> None:
        engine: Any = state.parallel_model
        engine.destroy()
        self.store.zero = None
        # Parameters that are still read hold ZeRO's optimizer, by closures that DeepSpeed has hung on them.
        zero: Any = state.optimizer
        zero.optimizer.state.clear()
        (zero.fp32_partitioned_groups_flat if self.zero_stage == 3 else zero.single_partition_of_fp32_groups).clear()
        for parameter in state.model.parameters():
            # Through these a parameter that is still read would keep masters and moments in memory.
            for attribute in ("_hp_mapping", "_z3_optimizer"):
                vars(parameter).pop(attribute, None)
        if self.zero_stage == 3:
            _forget(state.model)
        gc.collect()

    def _deepspeeds_adamw(self, optimizer: Optimizer) -> Optimizer:
        """DeepSpeed's AdamW with the groups and settings of torch's."""
        on_host = self._settings["zero_optimization"].get("offload_optimizer", {}).get("device") == "cpu"
        from deepspeed.ops import adam

        kind = adam.DeepSpeedCPUAdam if on_host or self.world.device.type == "cpu" else adam.FusedAdam
        chosen = {key: optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
        result: Optimizer = kind(optimizer.param_groups, **chosen)  # decoupled decay is its default
        return result


def _forget(model: nn.Module) -> None:
    """Take a ZeRO-3 model out of two places of DeepSpeed 0.19 that would hold it until the process ends.

    One is a list that every new engine appends its model to, the other the cache of a method, which holds `self`.
    """
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not model]
    cached = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()
