"""Sharded parameters, gradients and moments: torch's own fully_shard, on GPUs and CPUs alike.

accelerate's options are read from its plugin and environment; accelerate itself does not enable FSDP on a CPU.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from relora.engines.base import TorchEngine, TrainState
from relora.engines.sharded_store import DistributedStore
from relora.engines.world import World
from relora.method.store import Shard
from relora.model.model import compile_in_place, recompute_activations


@dataclass(frozen=True)
class FSDPOptions:
    """Options of `fully_shard`.

    Attributes:
        reshard_after_forward: free a gathered block after its forward pass, and gather it again for the backward.
        cpu_offload: parameters, gradients and moments rest in host memory.
        activation_checkpointing: recompute the activations of each block in the backward pass.
        block_names: classes of the modules that become units; empty: those that the model names itself.
        min_num_params: instead of classes, modules of at least so many parameters.
        one_unit: the whole model is one unit.
    """

    reshard_after_forward: bool
    cpu_offload: bool
    activation_checkpointing: bool
    block_names: tuple[str, ...]
    min_num_params: int | None
    one_unit: bool

    def units(self, model: nn.Module) -> list[nn.Module]:
        """The modules of `model` that are gathered one at a time, without units within them, the innermost first.

        Raises:
            ValueError: there are none.
        """
        if self.one_unit:
            return []
        if self.min_num_params is not None:
            return _of_size(model, self.min_num_params)
        names = self.block_names or tuple(getattr(model, "_no_split_modules", None) or ())
        units = [module for module in model.modules() if type(module).__name__ in names]
        if not units:
            raise ValueError(
                f"FSDP: {type(model).__name__} has no module of class {', '.join(names) or '(it names none)'}; "
                "set fsdp_transformer_layer_cls_to_wrap in the accelerate config"
            )
        return units


def fsdp_options() -> FSDPOptions:
    """The options of accelerate's FSDP plugin, as the launcher's environment sets them."""
    plugin: Any = FullyShardedDataParallelPlugin()
    policy = getattr(plugin.auto_wrap_policy, "__name__", None)
    return FSDPOptions(
        reshard_after_forward=plugin.reshard_after_forward,
        cpu_offload=isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        activation_checkpointing=plugin.activation_checkpointing,
        block_names=tuple(plugin.transformer_cls_names_to_wrap or ()),
        min_num_params=plugin.min_num_params if policy == "size_based_auto_wrap_policy" else None,
        one_unit=policy is None,
    )


def _of_size(model: nn.Module, min_num_params: int) -> list[nn.Module]:
    """From the innermost outwards: modules that hold enough parameters not yet in a unit."""
    units, taken = [], set[int]()
    for module in reversed([*model.modules()][1:]):
        mine = {id(p): p.numel() for p in module.parameters() if id(p) not in taken}
        if sum(mine.values()) >= min_num_params and not isinstance(module, nn.ModuleList):
            units.append(module)
            taken |= mine.keys()
    return units


class FSDP2Engine(TorchEngine):
    """Each block of the model is one unit, frozen weights and factors together; so is what is outside of them.

    Args:
        sync_each_batch: gradients are reduced after each micro-batch; otherwise once an update, until when
            every rank holds them whole.
    """

    def __init__(
        self,
        world: World,
        options: FSDPOptions,
        *,
        mixed_precision: str,
        max_grad_norm: float | None,
        sync_each_batch: bool,
    ) -> None:
        super().__init__(world, mixed_precision=mixed_precision, max_grad_norm=max_grad_norm)
        self.name = f"FSDP2 ({world.backend})"
        self.store = FSDP2Store(world.device)
        self._options, self._sync_each_batch = options, sync_each_batch
        self._units: list[nn.Module] = []
        self._mesh = init_device_mesh(world.device.type, (world.num_processes,))

    def prepare(self, model: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> TrainState:
        offload = CPUOffloadPolicy(pin_memory=self.world.device.type == "cuda")
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
            buffer.data = buffer.data.to(self.world.device)
        return TrainState(model=model, wrapped=model, optimizer=build_optimizer(model))

    def compile(self, live: TrainState) -> None:  # noqa: ARG002
        """Block by block: the hooks that gather a block stand between them."""
        for unit in self._units:
            compile_in_place(unit)

    def release(self, live: TrainState) -> None:
        super().release(live)
        self._units = []

    def sent_per_gradient_byte(self, num_micro_batches: int) -> float:
        n = self.world.num_processes
        return (n - 1) / n * (num_micro_batches if self._sync_each_batch else 1)  # reduce-scatters

    @contextmanager
    def inference(self, live: TrainState) -> Iterator[None]:
        try:
            with super().inference(live):
                yield
        finally:
            # Without a backward pass the outermost unit would stay gathered, and its parameters plain tensors.
            cast(FSDPModule, live.model).reshard()

    def _reduce_gradients(self, live: TrainState, *, last: bool) -> AbstractContextManager[None]:
        cast(FSDPModule, live.model).set_requires_gradient_sync(last or self._sync_each_batch)
        return nullcontext()

    def _total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        norm = super()._total_norm(gradients)
        return norm.full_tensor().to(self.world.device) if isinstance(norm, DTensor) else norm


class FSDP2Store(DistributedStore):
    """DTensors, each rank with some rows of every parameter and of its moments."""

    def check(self, parameter: nn.Parameter) -> None:
        if not isinstance(parameter, DTensor):
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is not sharded by fully_shard")

    def local_copies(self, parameter: nn.Parameter) -> Mapping[str, Shard]:
        return {"shard": _part(parameter.detach())}

    def _shard(self, optimizer: Optimizer, parameter: nn.Parameter, values: Tensor) -> tuple[torch.Size, Shard]:  # noqa: ARG002
        return values.shape, _part(values) if isinstance(values, DTensor) else Shard(values, 0)


def _part(tensor: Tensor) -> Shard:
    """The rows that this rank holds: fully_shard cuts the first dimension as torch.chunk does."""
    sharded = cast(DTensor, tensor)
    num_rows, mesh = sharded.shape[0], sharded.device_mesh
    first = min(mesh.get_local_rank() * -(-num_rows // mesh.size()), num_rows)
    local = sharded.to_local()
    return Shard(local, first * (sharded.numel() // max(num_rows, 1)), is_partial=True)
