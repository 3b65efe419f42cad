"""Access to parameters and optimizer state: full tensors in, full tensors out, however an engine keeps them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora.method.base_weights import WeightFormat
from relora.method.combined_optimizer import CombinedOptimizer
from relora.method.optimizer_state import STEP, Slot, fresh_state, set_step, state_tensors


@dataclass(frozen=True)
class Shard:
    """The entries of a full tensor that this process holds: start, start + 1, ... of its flattened entries.

    Attributes:
        values: of any shape; writing into it changes what the engine holds.
        start: place of the first of them in the flattened full tensor.
        is_partial: whether other processes hold the rest; else this is the full tensor.
    """

    values: Tensor
    start: int
    is_partial: bool = False

    def of(self, full: Tensor) -> Tensor:
        """The same entries of another full tensor, in the shape of `values`."""
        return full.flatten()[self.start : self.start + self.values.numel()].view(self.values.shape)


@dataclass(frozen=True)
class Stepped:
    """What an optimizer updates for a parameter.

    Attributes:
        optimizer: the one that holds the state, within its wrappers.
        options: the group of the parameter; None if the optimizer does not train it.
        tensor: the key of the state: the parameter, or a flat partition of several.
        sharers: the parameters with which it shares one state; itself among them.
    """

    optimizer: Optimizer
    options: dict[str, Any] | None
    tensor: Tensor
    sharers: Sequence[nn.Parameter]


class FrozenLayer(Protocol):
    """The part of a wrapped layer that a store uses: W as stored, its format, and the exact W if that is coarser."""

    weight: nn.Parameter
    weight_format: WeightFormat
    master: Shard | None


class Store(ABC):
    """Access to full tensors, over the shards that this process holds. Reading is collective where they are partial.

    The store of an engine overrides `check`, and what differs from whole tensors in one process: `local_copies`,
    `raw_shape`, `gather`, `reduce`, and for the optimizer's state `stepped`, `state`, `_shard` and `make_state`.
    """

    def __init__(self) -> None:
        # Weakly: a store outlives the stages whose models it reaches.
        self._frozen = WeakValueDictionary[int, FrozenLayer]()

    def register(self, layers: Iterable[FrozenLayer]) -> None:
        """Learn how the frozen weights are stored, and where their masters are. Forgets earlier layers."""
        self._frozen = WeakValueDictionary({id(layer.weight): layer for layer in layers})

    @abstractmethod
    def check(self, parameter: nn.Parameter) -> None:
        """ValueError if this store cannot reach the parameter. Local and cheap: asked before anything is changed."""

    def local_copies(self, parameter: nn.Parameter) -> Mapping[str, Shard]:
        """This process's shard of every copy of the parameter as it is stored, by name, frozen masters left out.

        The copy that the model computes with comes first.
        """
        return {"parameter": Shard(parameter.detach(), 0)}

    def gather(self, shape: torch.Size, part: Shard) -> Tensor:
        """The full tensor of which this process holds `part`, and others the rest."""
        raise AssertionError(f"{tuple(shape)}, from {part.start} on: this store knows one process, which holds all")

    def reduce(self, part: Shard, values: Tensor) -> Tensor:  # noqa: ARG002 (the one shard is the full tensor)
        """The sum over all shards of a tensor of `values`, which each process measured on its own `part`."""
        return values

    # --- parameters

    def raw_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Full shape of `raw`; differs from `shape` for quantized weights, which are one flat tensor of bytes."""
        return parameter.shape

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Shape of the full values."""
        layer = self._frozen.get(id(parameter))
        return self.raw_shape(parameter) if layer is None else torch.Size(layer.weight_format.shape)

    def dtype(self, parameter: nn.Parameter) -> torch.dtype:
        """Dtype of the full values: float32 where there is a master."""
        return self.master(parameter).values.dtype

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The full values, those of the master where there is one. May alias what is stored: copy before a write."""
        part = self.master(parameter)
        shape = self.shape(parameter)
        return self.gather(shape, part) if part.is_partial else part.values.view(shape)

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Set the full values in every copy that the engine keeps, in place, each rounded to its own format."""
        layer = self._frozen.get(id(parameter))
        if layer is not None:
            if layer.master is not None:
                layer.master.values.copy_(layer.master.of(values))
            values = layer.weight_format.quantize(values.to(self.local(parameter).values.device))
        for part in self.local_copies(parameter).values():
            part.values.copy_(part.of(values))

    def dequantized(self, parameter: nn.Parameter) -> Tensor:
        """The full values as the model computes with them. May alias what is stored."""
        stored, layer = self.raw(parameter), self._frozen.get(id(parameter))
        return stored if layer is None else layer.weight_format.dequantize(stored, self.dtype(parameter))

    def raw(self, parameter: nn.Parameter) -> Tensor:
        """The full tensor that the model computes with, in its stored format. May alias what is stored."""
        part, shape = self.local(parameter), self.raw_shape(parameter)
        return self.gather(shape, part) if part.is_partial else part.values.view(shape)

    def master(self, parameter: nn.Parameter) -> Shard:
        """This process's shard of the most exact copy: of the master, else of what the model computes with."""
        layer = self._frozen.get(id(parameter))
        if layer is not None and layer.master is not None:
            return layer.master
        return self.local(parameter)

    def local(self, parameter: nn.Parameter) -> Shard:
        """This process's shard of what the model computes with, in its stored format."""
        return next(iter(self.local_copies(parameter).values()))

    # --- optimizer state

    def stepped(self, optimizer: Optimizer, parameter: nn.Parameter) -> Stepped:
        """What the optimizer updates for the parameter, and with which options. Local and cheap."""
        inner: Any = getattr(optimizer, "optimizer", None)
        while isinstance(inner, Optimizer) and inner.state is optimizer.state:  # a wrapper that only passes on
            optimizer, inner = inner, getattr(inner, "optimizer", None)
        for part in optimizer.parts if isinstance(optimizer, CombinedOptimizer) else [optimizer]:
            for group in part.param_groups:
                if any(p is parameter for p in group["params"]):
                    return Stepped(part, group, parameter, [parameter])
        return Stepped(optimizer, None, parameter, [parameter])

    def state(self, optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
        """The optimizer's own dict of state that covers the parameter; empty before its first update."""
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        return state

    def _shard(self, optimizer: Optimizer, parameter: nn.Parameter, values: Tensor) -> tuple[torch.Size, Shard]:  # noqa: ARG002
        """Full shape of a tensor of `state`, and this process's shard of it."""
        return values.shape, Shard(values, 0)

    def has_state(self, optimizer: Optimizer, parameter: nn.Parameter) -> bool:
        """Whether the optimizer holds tensors of state for the parameter. Local and cheap."""
        return bool(state_tensors(self.state(optimizer, parameter)))

    def slots(self, optimizer: Optimizer, parameter: nn.Parameter) -> Mapping[str, Slot]:
        """All that the optimizer holds of the parameter but the step count: moments, scalars, tables. Local and cheap.

        Empty before the first update.

        Raises:
            ValueError: an entry is no tensor.
        """
        found = {}
        for name, values in state_tensors(self.state(optimizer, parameter)).items():
            shape, part = self._shard(optimizer, parameter, values)
            found[name] = Slot(shape, part.values.dtype)
        return found

    def read_slot(self, optimizer: Optimizer, parameter: nn.Parameter, slot: str) -> Tensor:
        """The full tensor of one slot. May alias the optimizer's state: copy before a write."""
        shape, part = self._shard(optimizer, parameter, self.state(optimizer, parameter)[slot])
        return self.gather(shape, part) if part.is_partial else part.values

    def write_slot(self, optimizer: Optimizer, parameter: nn.Parameter, slot: str, values: Tensor) -> None:
        """Set the full tensor of one slot, in place."""
        _, part = self._shard(optimizer, parameter, self.state(optimizer, parameter)[slot])
        part.values.copy_(part.of(values))

    def follow(self, optimizer: Optimizer, parameter: nn.Parameter, slot: str) -> None:
        """Set a slot of the parameter's shape to the values of the parameter, shard by shard."""
        _, part = self._shard(optimizer, parameter, self.state(optimizer, parameter)[slot])
        *_, exact = self.local_copies(parameter).values()
        part.values.copy_(exact.values)

    def step(self, optimizer: Optimizer, parameter: nn.Parameter) -> float | None:
        """The step count, from which Adam takes its bias correction; None if the optimizer keeps none."""
        state = self.state(optimizer, parameter)
        return float(state[STEP]) if STEP in state else None

    def write_step(self, optimizer: Optimizer, parameter: nn.Parameter, step: float) -> None:
        """Set the step count, which must be there."""
        set_step(self.state(optimizer, parameter), step)

    def make_state(
        self, optimizer: Optimizer, parameter: nn.Parameter, slots: Mapping[str, Slot], *, step: float | None
    ) -> None:
        """Give the parameter exactly these slots, all zero, and the step count unless it is None, as after a resume."""
        stepped = self.stepped(optimizer, parameter).optimizer
        optimizer.state[parameter] = fresh_state(stepped, parameter, slots, shape=parameter.shape, step=step)


class TorchStore(Store):
    """Whole parameters in one process."""

    def check(self, parameter: nn.Parameter) -> None:
        kind = type(parameter.data)
        if kind is not Tensor:
            raise ValueError(
                f"a {kind.__name__} of shape {tuple(parameter.shape)}: plain torch cannot reach its full values, "
                "only the engine that made it can"
            )
