"""Sharded parameters, gradients and moments: torch's own fully_shard, on GPUs and CPUs alike.

The launcher's options are read from accelerate's plugin and environment; accelerate itself does not enable FSDP on a
CPU.
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

from relora.config import Config
from relora.engines.base import Engine, TrainState, restrict_layers
from relora.engines.sharded_store import DistributedStore
from relora.engines.world import World
from relora.method.store import Shard
from relora.model.model import compile_in_place, recompute_activations
from relora.model.tasks import Task


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

    reshard_after_forward: bool = True
    cpu_offload: bool = False
    activation_checkpointing: bool = False
    block_names: tuple[str, ...] = ()
    min_num_params: int | None = None
    one_unit: bool = False

    @classmethod
    def launched(cls) -> "FSDPOptions":
        """The options that the launcher's environment sets, as accelerate's plugin understands them."""
        plugin: Any = FullyShardedDataParallelPlugin()
        policy = getattr(plugin.auto_wrap_policy, "__name__", None)
        return cls(
            reshard_after_forward=plugin.reshard_after_forward,
            cpu_offload=isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            activation_checkpointing=plugin.activation_checkpointing,
            block_names=tuple(plugin.transformer_cls_names_to_wrap or ()),
            min_num_params=plugin.min_num_params if policy == "size_based_auto_wrap_policy" else None,
            one_unit=policy is None,
        )

    def units(self, model: nn.Module) -> list[nn.Module]:
        """The modules of `model` that are gathered one at a time, the innermost first.

        Raises:
            ValueError: no module is of a named class, or one shares a parameter with others.
        """
        if self.one_unit:
            return []
        open_modules = _modules_with_shared_parameters(model)
        if self.min_num_params is not None:
            return _units_by_size(model, self.min_num_params, open_modules)
        names = self.block_names or tuple(getattr(model, "_no_split_modules", None) or ())
        units = [module for module in reversed([*model.modules()]) if type(module).__name__ in names]
        if not units:
            raise ValueError(
                f"FSDP: {type(model).__name__} has no module of class {', '.join(names) or '(it names none)'}; "
                "set fsdp_transformer_layer_cls_to_wrap in the accelerate config"
            )
        tied = sorted({type(unit).__name__ for unit in units if unit in open_modules})
        if tied:
            raise ValueError(
                f"FSDP: {', '.join(tied)} of {type(model).__name__} shares a parameter with a module outside of it, "
                "such as tied embeddings, so it cannot be a unit; leave it out of fsdp_transformer_layer_cls_to_wrap"
            )
        return units


class FSDP2Engine(Engine):
    """Each block, frozen weights and factors together, is one unit; everything outside of the blocks is another.

    Args:
        sync_each_batch: reduce gradients after every micro-batch; otherwise once per update, and every process holds
            them unsharded until then.
    """

    def __init__(
        self,
        world: World,
        task: Task,
        options: FSDPOptions,
        *,
        mixed_precision: str,
        max_grad_norm: float | None,
        sync_each_batch: bool,
    ) -> None:
        super().__init__(world, task, mixed_precision=mixed_precision, max_grad_norm=max_grad_norm)
        self.name = f"FSDP2 ({world.backend})"
        self.store = FSDP2Store(world.device)
        self._options, self._sync_each_batch = options, sync_each_batch
        self._units: list[nn.Module] = []
        self._mesh = init_device_mesh(world.device.type, (world.num_processes,))

    @classmethod
    def from_config(cls, config: Config, world: World, task: Task) -> "FSDP2Engine":
        """The engine with the launcher's options and the settings of `config`."""
        return cls(
            world,
            task,
            FSDPOptions.launched(),
            mixed_precision=config.training.mixed_precision,
            max_grad_norm=config.optim.max_grad_norm,
            sync_each_batch=config.training.sync_each_batch,
        )

    def prepare(self, model: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> TrainState:
        offload = CPUOffloadPolicy(pin_memory=self.world.device.type == "cuda")
        sharding: dict[str, Any] = {
            "mesh": self._mesh,
            "reshard_after_forward": self._options.reshard_after_forward,
            "offload_policy": offload if self._options.cpu_offload else OffloadPolicy(),
        }
        # A cached W + delta would outlive the gathered unit. Layers of one unit are whole together.
        restrict_layers(model, cache_span="none", can_group=True)
        if self._options.activation_checkpointing:
            recompute_activations(model)
        self._units = self._options.units(model)  # before fully_shard, which renames their classes
        for unit in self._units:
            fully_shard(unit, **sharding)
        fully_shard(model, **sharding | {"reshard_after_forward": None})
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.world.device)
        return TrainState(model=model, parallel_model=model, optimizer=build_optimizer(model))

    def gradient_sync(self, state: TrainState, *, is_last: bool) -> AbstractContextManager[None]:
        cast(FSDPModule, state.model).set_requires_gradient_sync(is_last or self._sync_each_batch)
        return nullcontext()

    def step(self, state: TrainState, skipped: Tensor) -> None:
        if self._options.cpu_offload:
            # The optimizer runs on the host. Its fused kernel would be handed a copy of the flag that the device has
            # not written yet: torch starts this copy without waiting for it.
            skipped = skipped.cpu()
        super().step(state, skipped)

    def total_norm(self, trained: Sequence[nn.Parameter]) -> Tensor:
        norm = super().total_norm(trained)
        return norm.full_tensor().to(self.world.device) if isinstance(norm, DTensor) else norm

    @contextmanager
    def inference(self, state: TrainState) -> Iterator[None]:
        try:
            with super().inference(state):
                yield
        finally:
            # Without a backward pass units would stay gathered, and their parameters plain tensors: the outermost one,
            # and all if they are not resharded after the forward pass.
            for module in state.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def sent_per_gradient_byte(self, num_micro_batches: int) -> float:
        n = self.world.num_processes
        return (n - 1) / n * (num_micro_batches if self._sync_each_batch else 1)  # reduce-scatters

    def compile(self, state: TrainState) -> None:
        """Compile each unit separately, because FSDP's gather hooks run between them; without units, the model."""
        self.counted_update = 3
        for unit in self._units or [state.model]:
            compile_in_place(unit)

    def release(self, state: TrainState) -> None:
        super().release(state)
        self._units = []


class FSDP2Store(DistributedStore):
    """DTensors: each process holds some rows of every parameter and of its moments."""

    def check(self, parameter: nn.Parameter) -> None:
        if not isinstance(parameter, DTensor):
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is not sharded by fully_shard")

    def local_copies(self, parameter: nn.Parameter) -> Mapping[str, Shard]:
        return {"shard": _shard_of(parameter.detach())}

    def _shard(self, optimizer: Optimizer, parameter: nn.Parameter, values: Tensor) -> tuple[torch.Size, Shard]:  # noqa: ARG002
        return values.shape, _shard_of(values) if isinstance(values, DTensor) else Shard(values, 0)


def _shard_of(tensor: Tensor) -> Shard:
    """The rows that this process holds: fully_shard cuts the first dimension as torch.chunk does.

    Of 5 rows on 2 processes the first holds 3 and the second 2; of 1 row the second holds none.
    """
    sharded = cast(DTensor, tensor)
    num_rows, mesh = sharded.shape[0], sharded.device_mesh
    first = min(mesh.get_local_rank() * -(-num_rows // mesh.size()), num_rows)
    row_size = sharded.numel() // max(num_rows, 1)
    return Shard(sharded.to_local(), first * row_size, is_partial=True)


def _modules_with_shared_parameters(model: nn.Module) -> set[nn.Module]:
    """The modules that hold a parameter which a module outside of them holds too, such as tied embeddings.

    As a unit of its own such a module would shard a copy of the parameter, and untie it.
    """
    holders: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(module)
    shared = [modules for modules in holders.values() if len(modules) > 1]
    inside = {module: set(module.modules()) for module in model.modules()} if shared else {}
    return {module for module, within in inside.items() if any(within & held and held - within for held in shared)}


def _units_by_size(model: nn.Module, min_num_params: int, open_modules: set[nn.Module]) -> list[nn.Module]:
    """From the innermost outwards: modules that hold enough parameters not yet in a unit.

    Args:
        open_modules: those that cannot be units; their parameters go to the unit around them.
    """
    units, taken = [], set[int]()
    for module in reversed([*model.modules()][1:]):
        own = {id(p): p.numel() for p in module.parameters() if id(p) not in taken}
        if sum(own.values()) >= min_num_params and not isinstance(module, nn.ModuleList) and module not in open_modules:
            units.append(module)
            taken |= own.keys()
    return units
