"""DeepSpeed ZeRO-1, 2 and 3: moments, gradients and (3) parameters in flat partitions.

What has to be written at a restart is kept in two places: the parameter that the model computes with, and an
fp32 master in the flat partition of some rank, which overwrites the first at the next step. Frozen weights
have no master. Adam's step count is one number a flat partition.
"""

import gc
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora.method.outer import OuterOptimizer
from relora.method.restart import RestartReport, restart
from relora.method.store import Part, fresh_state, moments, set_step
from relora.model import num_label_tokens, token_losses
from relora.runtime.engines.base import Batch, Live, Update, on_device
from relora.runtime.engines.processes import Processes
from relora.runtime.engines.sharded import ShardedStore


class DeepSpeedEngine:
    """ZeRO around torch's AdamW or DeepSpeed's own.

    Args:
        settings: DeepSpeed's configuration.
        own_optimizer: take DeepSpeed's AdamW instead of torch's.
    """

    def __init__(
        self, processes: Processes, settings: Mapping[str, Any], *, mixed_precision: str, own_optimizer: bool
    ) -> None:
        if processes.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("WARNING")
        self._deepspeed = deepspeed
        self.processes = processes
        self.is_apart, self.stream, self.outer = False, 0, OuterOptimizer()
        self.stage = int(settings["zero_optimization"]["stage"])
        self.name = f"DeepSpeed ZeRO-{self.stage} ({processes.backend})"
        self.store = ZeroStore(processes.device)
        self._settings, self._own_optimizer = settings, own_optimizer
        self._bf16 = mixed_precision == "bf16"

    def prepare(self, model: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> Live:
        optimizer = build_optimizer(model)
        if self._own_optimizer:
            optimizer = self._of_deepspeed(optimizer)
        wrapped, zero, *_ = self._deepspeed.initialize(
            model=model, optimizer=optimizer, config=dict(self._settings), dist_init_required=False
        )
        self.store.zero = zero
        return Live(model=model, wrapped=wrapped, optimizer=zero)

    def begin(self, live: Live) -> None:
        """Nothing is due."""

    def restart(self, live: Live, **how: Any) -> RestartReport:
        return restart(live.model, live.optimizer, store=self.store, **how)

    def compile(self, live: Live) -> None:
        live.model.compile()

    def update(self, live: Live, batches: Sequence[Batch], *, seeds: Sequence[int], stop: bool) -> Update:
        engine: Any = live.wrapped
        labels_here = sum(num_label_tokens(batch) for batch in batches)
        [num_labels, num_stops] = self.processes.sum([labels_here, stop])
        num_labels, losses, total = max(num_labels, 1), [], 0.0
        for batch, seed in zip(batches, seeds, strict=True):
            torch.manual_seed(seed)
            is_last = batch is batches[-1]
            engine.set_gradient_accumulation_boundary(is_last)
            loss = token_losses(engine, on_device(batch, self.processes.device))
            losses.append(loss.detach())
            if is_last:
                [total] = self.processes.sum([torch.stack(losses).sum().item()])
            # The mean over ranks is taken of gradients; the loss is a sum over ranks and tokens. DeepSpeed itself
            # skips an update whose gradient norm, agreed by all ranks, is not finite: a bad loss is made one.
            factor = self.processes.world_size / num_labels if math.isfinite(total) else math.nan
            engine.backward(loss * factor)
        engine.step()
        applied = bool(engine.was_step_applied())
        grad_norm = float(engine.get_global_grad_norm()) if applied else math.nan
        return Update(loss=total / num_labels, grad_norm=grad_norm, applied=applied, stop=num_stops > 0)

    def sent_per_gradient_byte(self, num_micro_batches: int) -> float:
        n = self.processes.world_size
        reduced = {1: 2, 2: 2 * num_micro_batches, 3: num_micro_batches}[self.stage]
        # ZeRO-1 and 2 then gather the updated parameters; ZeRO-3 gathers all of them at their use, trained or not.
        return (n - 1) / n * (reduced + (self.stage < 3))

    @contextmanager
    def inference(self, live: Live) -> Iterator[None]:
        was_training = live.model.training
        live.model.eval()
        try:
            with torch.no_grad(), torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self._bf16):
                yield
        finally:
            live.model.train(was_training)

    def token_losses(self, live: Live, batch: Batch) -> Tensor:
        return token_losses(live.model, on_device(batch, self.processes.device))

    def release(self, live: Live) -> None:
        engine: Any = live.wrapped
        engine.destroy()
        self.store.zero = None
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

        kind = adam.DeepSpeedCPUAdam if on_host or self.processes.device.type == "cpu" else adam.FusedAdam
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


@dataclass(frozen=True)
class Fragment:
    """Where a rank keeps its part of a trained parameter: flat[offset : offset + length], from `start` on.

    Attributes:
        flat: the flat fp32 partition, by which the inner optimizer knows its state.
    """

    flat: Tensor
    offset: int
    length: int
    start: int

    def part_of(self, flat: Tensor) -> Part:
        return Part(flat.detach()[self.offset : self.offset + self.length], self.start)


class ZeroStore(ShardedStore):
    """Parameters as ZeRO has them, with the masters and moments in its flat partitions.

    Attributes:
        zero: ZeRO's optimizer of the stage in training, by which a trained parameter's master is found.
    """

    zero: Any = None

    def check(self, parameter: nn.Parameter) -> None:
        if not (_is_partitioned(parameter) or not parameter.requires_grad or hasattr(parameter, "_hp_mapping")):
            raise ValueError(f"a trained parameter of shape {tuple(parameter.shape)} is not in DeepSpeed's hands")

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        shape: torch.Size = parameter.ds_shape if _is_partitioned(parameter) else parameter.shape  # type: ignore[attr-defined]
        return shape

    def is_sharded(self, parameter: nn.Parameter) -> bool:
        return _is_partitioned(parameter)

    def read(self, parameter: nn.Parameter) -> Tensor:
        part = _of_model(parameter)
        return self._whole(self.shape(parameter), part) if _is_partitioned(parameter) else part.values

    def copies(self, parameter: nn.Parameter) -> Mapping[str, Part]:
        copies = {"parameter": _of_model(parameter)}
        if parameter.requires_grad:
            fragment = _fragment(self.zero, parameter)
            copies["fp32 master"] = fragment.part_of(fragment.flat)
        return copies

    def has_state(self, optimizer: Optimizer, parameter: nn.Parameter) -> bool:
        state = self._state(optimizer, parameter)
        return "step" in state and bool(moments(state, _fragment(optimizer, parameter).flat.shape))

    def slot_parts(self, optimizer: Optimizer, parameter: nn.Parameter) -> Mapping[str, Part]:
        fragment = _fragment(optimizer, parameter)
        flat_moments = moments(self._state(optimizer, parameter), fragment.flat.shape)
        return {slot: fragment.part_of(flat) for slot, flat in flat_moments.items()}

    def step(self, optimizer: Optimizer, parameter: nn.Parameter) -> float:
        return float(self._state(optimizer, parameter).get("step", 0))

    def write_step(self, optimizer: Optimizer, parameter: nn.Parameter, step: float) -> None:
        set_step(self._state(optimizer, parameter), step)

    def make_state(self, optimizer: Optimizer, parameter: nn.Parameter, slots: Mapping[str, torch.dtype]) -> None:
        inner, flat = _inner(optimizer), _fragment(optimizer, parameter).flat
        if not inner.state.get(flat):
            inner.state[flat] = fresh_state(flat.detach(), slots)
            if not type(inner).__module__.startswith("torch."):
                inner.state[flat]["step"] = 0  # DeepSpeed's own optimizers count in Python

    def _state(self, optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = _inner(optimizer).state.get(_fragment(optimizer, parameter).flat, {})
        return state


def _inner(zero: Any) -> Optimizer:
    """The optimizer that ZeRO steps, over flat partitions."""
    inner: Optimizer = zero.optimizer
    return inner


def _is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether this is a ZeRO-3 parameter."""
    return hasattr(parameter, "ds_id")


def _of_model(parameter: Any) -> Part:
    """What the model computes with: the whole tensor under ZeRO-1 and 2, this rank's partition under ZeRO-3."""
    if not _is_partitioned(parameter):
        return Part(parameter.detach(), 0)
    if parameter.ds_status.name == "AVAILABLE":
        # Small parameters stay gathered between updates; the gathered copy would hide what is written.
        parameter.partition()
    partition = parameter.ds_tensor.detach()
    start = min(partition.numel() * _rank(parameter), parameter.ds_numel)
    return Part(partition[: parameter.ds_numel - start], start)


def _fragment(zero: Any, parameter: Any) -> Fragment:
    """Where `zero` keeps this rank's part of the master; of length 0 where it keeps none."""
    if _is_partitioned(parameter):
        part = _of_model(parameter)
        group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        return Fragment(zero.fp32_partitioned_groups_flat[group], offset, part.values.numel(), part.start)
    group = next(i for i, members in enumerate(zero.bit16_groups) if any(p is parameter for p in members))
    flat, mapping = zero.single_partition_of_fp32_groups[group], parameter._hp_mapping
    if mapping is None:
        return Fragment(flat, 0, 0, 0)
    there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Fragment(flat, there.start, there.numel, here.start)


def _rank(parameter: Any) -> int:
    return int(torch.distributed.get_rank(parameter.ds_process_group))
