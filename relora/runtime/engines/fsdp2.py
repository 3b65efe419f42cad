"""Sharded parameters, gradients and moments: torch's own fully_shard, on GPUs and CPUs alike.

accelerate's options are read from its plugin and environment; accelerate itself does not enable FSDP on a CPU.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from relora.method.slots import Slot, fresh_state, moments, set_step
from relora.method.store import Part
from relora.model import compile_in_place, recompute_activations
from relora.runtime.engines.base import Live
from relora.runtime.engines.options import FSDPOptions
from relora.runtime.engines.processes import Processes
from relora.runtime.engines.sharded import ShardedStore
from relora.runtime.engines.torch_engine import TorchEngine


class FSDP2Engine(TorchEngine):
    """Each block of the model is one unit, frozen weights and factors together; so is what is outside of them.

    Args:
        sync_each_batch: gradients are reduced after each micro-batch; otherwise once an update, until when
            every rank holds them whole.
    """

    def __init__(
        self,
        processes: Processes,
        options: FSDPOptions,
        *,
        mixed_precision: str,
        max_grad_norm: float | None,
        sync_each_batch: bool,
    ) -> None:
        super().__init__(processes, mixed_precision=mixed_precision, max_grad_norm=max_grad_norm)
        self.name = f"FSDP2 ({processes.backend})"
        self.store = FSDP2Store(processes.device)
        self._options, self._sync_each_batch = options, sync_each_batch
        self._units: list[nn.Module] = []
        self._mesh = init_device_mesh(processes.device.type, (processes.world_size,))

    def prepare(self, model: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> Live:
        offload = CPUOffloadPolicy(pin_memory=self.processes.device.type == "cuda")
        sharding: dict[str, Any] = {
            "mesh": self._mesh,
            "reshard_after_forward": self._options.reshard_after_forward,
            "offload_policy": offload if self._options.cpu_offload else OffloadPolicy(),
        }
        if self._options.activation_checkpointing:
            recompute_activations(model)
        self._units = self._options.units(model)  # fully_shard changes the names of their classes
        for unit in self._units:
            fully_shard(unit, **sharding)
        fully_shard(model, **sharding | {"reshard_after_forward": None})
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.processes.device)
        return Live(model=model, wrapped=model, optimizer=build_optimizer(model))

    def compile(self, live: Live) -> None:  # noqa: ARG002
        """Block by block: the hooks that gather a block stand between them."""
        for unit in self._units:
            compile_in_place(unit)

    def release(self, live: Live) -> None:
        super().release(live)
        self._units = []

    def sent_per_gradient_byte(self, num_micro_batches: int) -> float:
        n = self.processes.world_size
        return (n - 1) / n * (num_micro_batches if self._sync_each_batch else 1)  # reduce-scatters

    @contextmanager
    def inference(self, live: Live) -> Iterator[None]:
        try:
            with super().inference(live):
                yield
        finally:
            # Without a backward pass the outermost unit would stay gathered, and its parameters plain tensors.
            cast(FSDPModule, live.model).reshard()

    def _reduce_gradients(self, live: Live, *, last: bool) -> AbstractContextManager[None]:
        cast(FSDPModule, live.model).set_requires_gradient_sync(last or self._sync_each_batch)
        return nullcontext()

    def _total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        norm = super()._total_norm(gradients)
        return norm.full_tensor().to(self.processes.device) if isinstance(norm, DTensor) else norm


class FSDP2Store(ShardedStore):
    """DTensors, each rank with some rows of every parameter and of its moments."""

    def check(self, parameter: nn.Parameter) -> None:
        if not isinstance(parameter, DTensor):
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is not sharded by fully_shard")

    def stored_shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.shape

    def copies(self, parameter: nn.Parameter) -> Mapping[str, Part]:
        return {"shard": _part(parameter.detach())}

    def has_state(self, optimizer: Optimizer, parameter: nn.Parameter) -> bool:
        return "step" in optimizer.state.get(parameter, {}) and bool(self.slot_parts(optimizer, parameter))

    def slot_parts(self, optimizer: Optimizer, parameter: nn.Parameter) -> Mapping[str, Part]:
        state = moments(optimizer.state.get(parameter, {}), parameter.shape)
        return {slot: _part(values) for slot, values in state.items()}

    def step(self, optimizer: Optimizer, parameter: nn.Parameter) -> float:
        return float(optimizer.state.get(parameter, {}).get("step", 0))

    def write_step(self, optimizer: Optimizer, parameter: nn.Parameter, step: float) -> None:
        set_step(optimizer.state[parameter], step)

    def make_state(self, optimizer: Optimizer, parameter: nn.Parameter, slots: Mapping[str, Slot]) -> None:
        optimizer.state[parameter] = fresh_state(optimizer, parameter, slots)


def _part(tensor: Tensor) -> Part:
    """The rows that this rank holds: fully_shard cuts the first dimension as torch.chunk does."""
    sharded = cast(DTensor, tensor)
    num_rows, mesh = sharded.shape[0], sharded.device_mesh
    first = min(mesh.get_local_rank() * -(-num_rows // mesh.size()), num_rows)
    local = sharded.to_local()
    return Part(local, first * (sharded.numel() // max(num_rows, 1)), is_shared=True)
