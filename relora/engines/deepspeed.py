"""DeepSpeed ZeRO-1, 2 and 3: moments, gradients and (3) parameters in flat partitions."""

import gc
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora.engines.base import Batch, Queued, TrainState, on_device
from relora.engines.entry import Entry
from relora.engines.outer import OuterOptimizer
from relora.engines.world import World
from relora.engines.zero_store import ZeroStore
from relora.method.restart import RestartReport, restart
from relora.model.model import compile_in_place, num_label_tokens, token_losses


class DeepSpeedEngine:
    """ZeRO around torch's AdamW or DeepSpeed's own.

    Args:
        settings: DeepSpeed's configuration.
        own_optimizer: take DeepSpeed's AdamW instead of torch's.
    """

    def __init__(self, world: World, settings: Mapping[str, Any], *, mixed_precision: str, own_optimizer: bool) -> None:
        if world.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("WARNING")
        self._deepspeed = deepspeed
        self.world = world
        self.splits_masters, self.num_states = True, 1
        self.is_apart, self.draw_index, self.outer = False, 0, OuterOptimizer()
        self.stage = int(settings["zero_optimization"]["stage"])
        self.name = f"DeepSpeed ZeRO-{self.stage} ({world.backend})"
        self.store = ZeroStore(world.device)
        self._settings, self._own_optimizer = settings, own_optimizer
        self._bf16 = mixed_precision == "bf16"

    def prepare(self, model: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> TrainState:
        optimizer = build_optimizer(model)
        if self._own_optimizer:
            optimizer = self._of_deepspeed(optimizer)
        wrapped, zero, *_ = self._deepspeed.initialize(
            model=model, optimizer=optimizer, config=dict(self._settings), dist_init_required=False
        )
        self.store.zero = zero
        return TrainState(model=model, wrapped=wrapped, optimizer=zero)

    def begin(self, live: TrainState) -> None:
        """Nothing is due."""

    def restart(self, live: TrainState, **how: Any) -> RestartReport:
        return restart(live.model, live.optimizer, store=self.store, **how)

    def compile(self, live: TrainState) -> None:
        compile_in_place(live.model)

    def queues(self, live: TrainState) -> bool:  # noqa: ARG002
        """DeepSpeed reads itself, in each update, whether it is to be made."""
        return False

    def update(
        self,
        live: TrainState,
        batches: Sequence[Batch],
        *,
        seeds: Sequence[int],
        stop: bool,
        after: Queued | None = None,  # noqa: ARG002
    ) -> Queued:
        engine: Any = live.wrapped
        labels_here = sum(num_label_tokens(batch) for batch in batches)
        [num_labels, num_stops] = self.world.sum([labels_here, stop])
        num_labels, losses = max(num_labels, 1), []
        # The mean over ranks is taken of gradients; the loss is a sum over ranks and tokens.
        factor: float | Tensor = self.world.num_processes / num_labels
        for batch, seed in zip(batches, seeds, strict=True):
            torch.manual_seed(seed)
            is_last = batch is batches[-1]
            engine.set_gradient_accumulation_boundary(is_last)
            loss = token_losses(engine, on_device(batch, self.world.device))
            losses.append(loss.detach())
            if is_last:
                summed = torch.stack(losses).sum().double()
                self.world.all_reduce(summed)
                # DeepSpeed itself skips an update whose gradient norm, agreed by all ranks, is not finite: a bad
                # loss is made one, on the device, which goes on to the backward pass without us.
                factor = torch.where(summed.isfinite(), factor, math.nan).to(loss.dtype)
            engine.backward(loss * factor)
        total = summed.item()
        engine.step()
        applied = bool(engine.was_step_applied())
        grad_norm = float(engine.get_global_grad_norm()) if applied else math.nan
        measured = torch.tensor([total / num_labels, grad_norm], dtype=torch.float64)
        return Queued(measured=measured, failed=torch.tensor(not applied), stop=num_stops > 0)

    def sent_per_gradient_byte(self, num_micro_batches: int) -> float:
        n = self.world.num_processes
        reduced = {1: 2, 2: 2 * num_micro_batches, 3: num_micro_batches}[self.stage]
        # ZeRO-1 and 2 then gather the updated parameters; ZeRO-3 gathers all of them at their use, trained or not.
        return (n - 1) / n * (reduced + (self.stage < 3))

    @contextmanager
    def inference(self, live: TrainState) -> Iterator[None]:
        was_training = live.model.training
        live.model.eval()
        try:
            with torch.no_grad(), torch.autocast(self.world.device.type, torch.bfloat16, enabled=self._bf16):
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
        engine: Any = live.wrapped
        engine.destroy()
        self.store.zero = None
        # Parameters that are still read hold ZeRO's optimizer, by closures that DeepSpeed has hung on them.
        zero: Any = live.optimizer
        zero.optimizer.state.clear()
        (zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups).clear()
        for parameter in live.model.parameters():
            # Through these a parameter that is still read would keep masters and moments in memory.
            for attribute in ("_hp_mapping", "_z3_optimizer"):
                vars(parameter).pop(attribute, None)
        if self.stage == 3:
            _forget(live.model)
        gc.collect()

    def _of_deepspeed(self, optimizer: Optimizer) -> Optimizer:
        """DeepSpeed's AdamW with the groups and settings of torch's."""
        on_host = self._settings["zero_optimization"].get("offload_optimizer", {}).get("device") == "cpu"
        from deepspeed.ops import adam

        kind = adam.DeepSpeedCPUAdam if on_host or self.world.device.type == "cpu" else adam.FusedAdam
        chosen = {key: optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
        made: Optimizer = kind(optimizer.param_groups, **chosen)  # decoupled decay is its default
        return made


def _forget(model: nn.Module) -> None:
    """Take a ZeRO-3 model out of two places of DeepSpeed 0.19 that would hold it until the process ends.

    One is a list that every new engine appends its model to, the other the cache of a method, which holds `self`.
    """
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not model]
    cached = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()
