"""How parameters and optimizer state are reached. Each engine has a store; this is plain torch's."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora.method.base_weights import WeightFormat
from relora.method.optimizer_state import Slot, coded_tensors, fresh_state, moments, set_step


@dataclass(frozen=True)
class Shard:
    """The entries of a full tensor that this process holds: start, start + 1, ... of its flattened entries.

    Attributes:
        values: of any shape; writing into it changes what the engine holds.
        start: place of the first of them in the flattened full tensor.
        is_shared: whether other processes hold the rest; else this is the whole.
    """

    values: Tensor
    start: int
    is_partial: bool = False

    def of(self, full: Tensor) -> Tensor:
        """The same entries of another full tensor, in the shape of `values`."""
        return full.flatten()[self.start : self.start + self.values.numel()].view(self.values.shape)


class FrozenLayer(Protocol):
    """A wrapped layer, as a store sees it: W as it is stored, how, and the exact W where what is stored is coarser."""

    weight: nn.Parameter
    weight_format: WeightFormat
    master: Shard | None


class Store(Protocol):
    """Full tensors in, full tensors out, whatever the engine has made of them. Collective where it is sharded."""

    def register(self, layers: Iterable[FrozenLayer]) -> None:
        """Learn how the frozen weights are stored, and where their masters are. Forgets what was adopted before."""

    def check(self, parameter: nn.Parameter) -> None:
        """ValueError if this store cannot reach the parameter. Costs nothing: asked before anything is changed."""

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Shape of the full values."""

    def dtype(self, parameter: nn.Parameter) -> torch.dtype:
        """Of the full values: float32 where there is a master."""

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The full values, of the master where there is one. May alias what is kept: copy before a write."""

    def write(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Set the full values, in every copy that the engine keeps, in place. Rounds to the grid of each."""

    def dequantized(self, parameter: nn.Parameter) -> Tensor:
        """The full values as the model computes with them. May alias what is kept."""

    def raw_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Shape of `stored`: another than `shape` where these are codes."""

    def raw(self, parameter: nn.Parameter) -> Tensor:
        """The full tensor that the model computes with, as it is stored. May alias what is kept."""

    def master(self, parameter: nn.Parameter) -> Shard:
        """This process's part of the most exact copy: of the master, or of what the model computes with."""

    def local_copies(self, parameter: nn.Parameter) -> Mapping[str, Shard]:
        """This process's part of every copy as it is stored, by name, masters of frozen weights left out.

        What the model computes with comes first.
        """

    def gather(self, shape: torch.Size, part: Shard) -> Tensor:
        """The full tensor of which this process holds `part`, and others the rest."""

    def reduce(self, part: Shard, values: Tensor) -> Tensor:
        """Sums over the parts of a tensor of what each process measured on its own part."""

    def has_state(self, optimizer: Optimizer, parameter: nn.Parameter) -> bool:
        """Whether the optimizer holds moments and a step count of the parameter. Costs nothing."""

    def slots(self, optimizer: Optimizer, parameter: nn.Parameter) -> Mapping[str, Slot]:
        """The moments of the parameter (exp_avg, exp_avg_sq, ...), where they are coded with their scales and tables.

        Empty if it has none yet. Costs nothing.
        """

    def read_slot(self, optimizer: Optimizer, parameter: nn.Parameter, slot: str) -> Tensor:
        """One full tensor of them. May alias the optimizer's state: copy before a write."""

    def write_slot(self, optimizer: Optimizer, parameter: nn.Parameter, slot: str, values: Tensor) -> None:
        """Set one full tensor of them, in place."""

    def step(self, optimizer: Optimizer, parameter: nn.Parameter) -> float:
        """The step count, from which Adam takes its bias correction; 0 without state."""

    def write_step(self, optimizer: Optimizer, parameter: nn.Parameter, step: float) -> None:
        """Set the step count."""

    def make_state(self, optimizer: Optimizer, parameter: nn.Parameter, slots: Mapping[str, Slot]) -> None:
        """Give the parameter slots of these names and a step count, all zero, before its first update."""


class PartStore(ABC):
    """What all stores have in common: full tensors out of parts, and frozen weights on their grids."""

    def __init__(self) -> None:
        # Weakly: a store outlives the stages whose models it reaches.
        self._frozen = WeakValueDictionary[int, FrozenLayer]()

    @abstractmethod
    def raw_shape(self, parameter: nn.Parameter) -> torch.Size:
        """As in Store."""

    @abstractmethod
    def local_copies(self, parameter: nn.Parameter) -> Mapping[str, Shard]:
        """As in Store."""

    @abstractmethod
    def gather(self, shape: torch.Size, part: Shard) -> Tensor:
        """As in Store."""

    @abstractmethod
    def reduce(self, part: Shard, values: Tensor) -> Tensor:
        """As in Store."""

    def register(self, layers: Iterable[FrozenLayer]) -> None:
        self._frozen = WeakValueDictionary({id(layer.weight): layer for layer in layers})

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        layer = self._frozen.get(id(parameter))
        return self.raw_shape(parameter) if layer is None else torch.Size(layer.weight_format.shape)

    def dtype(self, parameter: nn.Parameter) -> torch.dtype:
        return self.master(parameter).values.dtype

    def read(self, parameter: nn.Parameter) -> Tensor:
        part = self.master(parameter)
        shape = self.shape(parameter)
        return self.gather(shape, part) if part.is_partial else part.values.view(shape)

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, values: Tensor) -> None:
        layer = self._frozen.get(id(parameter))
        if layer is not None:
            if layer.master is not None:
                layer.master.values.copy_(layer.master.of(values))
            values = layer.weight_format.quantize(values.to(self.local(parameter).values.device))
        for part in self.local_copies(parameter).values():
            part.values.copy_(part.of(values))

    def dequantized(self, parameter: nn.Parameter) -> Tensor:
        stored, layer = self.raw(parameter), self._frozen.get(id(parameter))
        return stored if layer is None else layer.weight_format.dequantize(stored, self.dtype(parameter))

    def raw(self, parameter: nn.Parameter) -> Tensor:
        part, shape = self.local(parameter), self.raw_shape(parameter)
        return self.gather(shape, part) if part.is_partial else part.values.view(shape)

    def master(self, parameter: nn.Parameter) -> Shard:
        layer = self._frozen.get(id(parameter))
        if layer is not None and layer.master is not None:
            return layer.master
        return self.local(parameter)

    def local(self, parameter: nn.Parameter) -> Shard:
        """This process's part of what the model computes with, as it is stored."""
        return next(iter(self.local_copies(parameter).values()))


class TorchStore(PartStore):
    """Whole parameters in one process."""

    def check(self, parameter: nn.Parameter) -> None:
        refuse_sharded(parameter)

    def raw_shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.shape

    def local_copies(self, parameter: nn.Parameter) -> Mapping[str, Shard]:
        return {"parameter": Shard(parameter.detach(), 0)}

    def gather(self, shape: torch.Size, part: Shard) -> Tensor:  # noqa: ARG002
        raise AssertionError(f"a tensor of shape {tuple(shape)} is spread over processes that this store does not know")

    def reduce(self, part: Shard, values: Tensor) -> Tensor:  # noqa: ARG002 (the one part is the whole)
        return values

    def has_state(self, optimizer: Optimizer, parameter: nn.Parameter) -> bool:
        return "step" in optimizer.state.get(parameter, {}) and bool(self.slots(optimizer, parameter))

    def slots(self, optimizer: Optimizer, parameter: nn.Parameter) -> Mapping[str, Slot]:
        state = optimizer.state.get(parameter, {})
        found = coded_tensors(state) or moments(state, parameter.shape)
        return {slot: Slot.of(values) for slot, values in found.items()}

    def read_slot(self, optimizer: Optimizer, parameter: nn.Parameter, slot: str) -> Tensor:
        values: Tensor = optimizer.state[parameter][slot]
        return values

    def write_slot(self, optimizer: Optimizer, parameter: nn.Parameter, slot: str, values: Tensor) -> None:
        optimizer.state[parameter][slot].copy_(values)

    def step(self, optimizer: Optimizer, parameter: nn.Parameter) -> float:
        return float(optimizer.state.get(parameter, {}).get("step", 0))

    def write_step(self, optimizer: Optimizer, parameter: nn.Parameter, step: float) -> None:
        set_step(optimizer.state[parameter], step)

    def make_state(self, optimizer: Optimizer, parameter: nn.Parameter, slots: Mapping[str, Slot]) -> None:
        optimizer.state[parameter] = fresh_state(optimizer, parameter, slots)


def refuse_sharded(parameter: nn.Parameter) -> None:
    """ValueError for a DTensor or a DeepSpeed parameter: their full values are not in this object."""
    if hasattr(parameter, "placements") or hasattr(parameter, "device_mesh"):
        kind = "a DTensor (FSDP2 or tensor parallel)"
    elif hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        kind = "a DeepSpeed parameter"
    else:
        return
    raise ValueError(f"{kind} of shape {tuple(parameter.shape)}: restart() on plain torch cannot reach its full values")
