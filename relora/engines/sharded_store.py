"""Stores of sharded parameters: full tensors gathered from the shards of all processes."""

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from relora.method.optimizer_state import Slot
from relora.method.store import Shard, Store, TorchStore


class DistributedStore(Store):
    """A store that gathers tensors of which each process holds a shard. Reading is collective, writing is not."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def gather(self, shape: torch.Size, shard: Shard) -> Tensor:
        full = torch.zeros(shape, dtype=shard.values.dtype, device=self._device)
        full.view(-1)[shard.start : shard.start + shard.values.numel()] = shard.values.flatten().to(self._device)
        distributed.all_reduce(full)
        return full

    def reduce(self, shard: Shard, values: Tensor) -> Tensor:
        if not shard.is_partial:
            return values
        values = values.to(self._device)
        distributed.all_reduce(values)
        return values


class ReplicatedStore(DistributedStore, TorchStore):
    """Whole parameters on every process, which all do the same (DDP). Masters may be sharded."""


class ShardedStore(DistributedStore):
    """Each process holds a shard of every moment, and maybe of every parameter."""

    @abstractmethod
    def slot_shards(self, optimizer: Optimizer, parameter: nn.Parameter) -> Mapping[str, Shard]:
        """This process's shard of each moment; empty without state."""

    def slots(self, optimizer: Optimizer, parameter: nn.Parameter) -> Mapping[str, Slot]:
        shape = self.shape(parameter)
        return {name: Slot(shape, shard.values.dtype) for name, shard in self.slot_shards(optimizer, parameter).items()}

    def read_slot(self, optimizer: Optimizer, parameter: nn.Parameter, slot: str) -> Tensor:
        return self.gather(self.shape(parameter), self.slot_shards(optimizer, parameter)[slot])

    def write_slot(self, optimizer: Optimizer, parameter: nn.Parameter, slot: str, values: Tensor) -> None:
        shard = self.slot_shards(optimizer, parameter)[slot]
        shard.values.copy_(shard.of(values))
