"""What the stores of sharded parameters have in common: full tensors put together from the parts of the ranks."""

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from relora.method.optimizer_state import Slot
from relora.method.store import PartStore, Shard, TorchStore


class DistributedStore(PartStore):
    """Some tensors are spread over the processes: what a process reads of them is put together from all."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def gather(self, shape: torch.Size, part: Shard) -> Tensor:
        full = torch.zeros(shape, dtype=part.values.dtype, device=self._device)
        full.view(-1)[part.start : part.start + part.values.numel()] = part.values.flatten().to(self._device)
        distributed.all_reduce(full)
        return full

    def reduce(self, part: Shard, values: Tensor) -> Tensor:
        if not part.is_partial:
            return values
        values = values.to(self._device)
        distributed.all_reduce(values)
        return values


class ReplicatedStore(DistributedStore, TorchStore):
    """Whole parameters on every process, which all do the same (DDP). Masters may be spread."""


class ShardedStore(DistributedStore):
    """Each rank holds its own part of a moment, and maybe of a parameter. Reading is collective, writing is not."""

    @abstractmethod
    def slot_parts(self, optimizer: Optimizer, parameter: nn.Parameter) -> Mapping[str, Shard]:
        """This rank's part of each moment; empty without state."""

    def slots(self, optimizer: Optimizer, parameter: nn.Parameter) -> Mapping[str, Slot]:
        shape = self.shape(parameter)
        return {name: Slot(shape, part.values.dtype) for name, part in self.slot_parts(optimizer, parameter).items()}

    def read_slot(self, optimizer: Optimizer, parameter: nn.Parameter, slot: str) -> Tensor:
        return self.gather(self.shape(parameter), self.slot_parts(optimizer, parameter)[slot])

    def write_slot(self, optimizer: Optimizer, parameter: nn.Parameter, slot: str, values: Tensor) -> None:
        part = self.slot_parts(optimizer, parameter)[slot]
        part.values.copy_(part.of(values))
