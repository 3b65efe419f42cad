"""Stores of several processes: full tensors are gathered from the shards of all."""

import torch
from torch import Tensor, distributed

from relora.method.store import Shard, Store, TorchStore


class DistributedStore(Store):
    """Some tensors are sharded over the processes: reading these is collective, writing is not."""

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
    """Whole parameters on every process, which all do the same (DDP). Masters may be sharded."""
