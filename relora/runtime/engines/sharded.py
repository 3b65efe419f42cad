"""What the stores of sharded parameters have in common: full tensors put together from the parts of the ranks."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from relora.method.store import Part, Slot


class ShardedStore(ABC):
    """Each rank holds its own part of a tensor. Reading is collective, writing is not."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @abstractmethod
    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """As in Store."""

    @abstractmethod
    def copies(self, parameter: nn.Parameter) -> Mapping[str, Part]:
        """As in Store."""

    @abstractmethod
    def slot_parts(self, optimizer: Optimizer, parameter: nn.Parameter) -> Mapping[str, Part]:
        """This rank's part of each moment; empty without state."""

    @abstractmethod
    def is_sharded(self, parameter: nn.Parameter) -> bool:
        """Whether what the model computes with is spread over the ranks."""

    def read(self, parameter: nn.Parameter) -> Tensor:
        part = next(iter(self.copies(parameter).values()))
        return self._whole(self.shape(parameter), part) if self.is_sharded(parameter) else part.values

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, values: Tensor) -> None:
        for part in self.copies(parameter).values():
            part.values.copy_(part.of(values))

    def total(self, parameter: nn.Parameter, values: Tensor) -> Tensor:
        if not self.is_sharded(parameter):
            return values
        values = values.to(self._device)
        distributed.all_reduce(values)
        return values

    def slots(self, optimizer: Optimizer, parameter: nn.Parameter) -> Mapping[str, Slot]:
        shape = self.shape(parameter)
        return {name: Slot(shape, part.values.dtype) for name, part in self.slot_parts(optimizer, parameter).items()}

    def read_slot(self, optimizer: Optimizer, parameter: nn.Parameter, slot: str) -> Tensor:
        return self._whole(self.shape(parameter), self.slot_parts(optimizer, parameter)[slot])

    def write_slot(self, optimizer: Optimizer, parameter: nn.Parameter, slot: str, values: Tensor) -> None:
        part = self.slot_parts(optimizer, parameter)[slot]
        part.values.copy_(part.of(values))

    def _whole(self, shape: torch.Size, part: Part) -> Tensor:
        """The full tensor, on the device of the process group, of which this rank holds `part`."""
        whole = torch.zeros(shape, dtype=part.values.dtype, device=self._device)
        whole.view(-1)[part.start : part.start + part.values.numel()] = part.values.flatten().to(self._device)
        distributed.all_reduce(whole)
        return whole
