"""The optimizer's state of one parameter: which entries it has, what they mean, and how they begin.

Moments have the parameter's shape and begin at 0, in floating point or in a quantized format with tensors that belong
to it; scalars (the step count, and others) and all further entries are named by a `StateRule`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

STEP = "step"  # the name under which torch, bitsandbytes and DeepSpeed count the updates of a parameter
PARAMETER = "parameter"  # in StateRule.initial: an entry that holds values of the parameter


@dataclass(frozen=True)
class Slot:
    """A tensor of an optimizer's state as it is saved: full shape and dtype."""

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Slot":
        return cls(tensor.shape, tensor.dtype)


@dataclass(frozen=True)
class QuantizedMoments:
    """A format in which an optimizer stores its moments as integers.

    Attributes:
        companions: name of a quantized moment -> the names of its scales and of its lookup table.
        dequantize: (integers, scales, table) -> the moment in float32, of the integers' shape.
        clear: (integers, scales, table, mask) -> (integers, scales) that mean zero where `mask` is set, and what they
            meant elsewhere.
    """

    companions: Mapping[str, tuple[str, str]]
    dequantize: Callable[[Tensor, Tensor, Tensor], Tensor]
    clear: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class StateRule:
    """How the state of one parameter begins, entry by entry: what a reset has to know of an optimizer.

    Floating-point tensors of the parameter's shape are moments, which begin at 0, unless `initial` says otherwise.

    Attributes:
        scalars: names of the scalars in its state, or names with their values before the first update. A bare name
            begins at 0. Those that it does not use need not be there.
        initial: entries that are neither such moments nor scalars -> the number in all of their places before the
            first update, or PARAMETER where they hold values of the parameter (an average, an iterate): these follow
            the parameter at every restart.
        counters: entries of the parameter group that count its updates -> their values before the first.
        quantized: the format of moments that are stored as integers; None if all are floating point.
    """

    scalars: Mapping[str, float] | tuple[str, ...] = (STEP,)
    initial: Mapping[str, float | str] = field(default_factory=dict)
    counters: Mapping[str, float] = field(default_factory=dict)
    quantized: QuantizedMoments | None = None

    @property
    def initial_scalars(self) -> dict[str, float]:
        """Each scalar's value before the first update."""
        return dict(self.scalars) if isinstance(self.scalars, Mapping) else dict.fromkeys(self.scalars, 0.0)

    def moments(self, slots: Mapping[str, Slot], shape: torch.Size) -> list[str]:
        """The slots that are moments of a parameter of this shape, quantized or not, in alphabetical order.

        In this order the first moment comes first (exp_avg, state1), however a checkpoint brought them back.
        """
        quantized = self._quantized(slots)
        others = {companion for names in quantized.values() for companion in names}
        others |= self.initial_scalars.keys() | self.initial.keys()
        floats = {name for name, slot in slots.items() if slot.dtype.is_floating_point and slot.shape == shape}
        return sorted((floats - others) | quantized.keys())

    def unknown(self, slots: Mapping[str, Slot], shape: torch.Size) -> list[str]:
        """The slots whose beginning is not known: neither moments nor their companions nor named."""
        companions = [companion for names in self._quantized(slots).values() for companion in names]
        scalars = [name for name, slot in slots.items() if name in self.initial_scalars and slot.shape.numel() == 1]
        known = {*self.moments(slots, shape), *companions, *scalars, *self.initial}
        return [describe(name, slot) for name, slot in slots.items() if name not in known]

    def _quantized(self, slots: Mapping[str, Slot]) -> dict[str, tuple[str, str]]:
        """The moments that are integers here, with their companions.

        A quantized optimizer keeps those of small parameters in floating point, under the same names.
        """
        companions = self.quantized.companions if self.quantized is not None else {}
        return {
            moment: names
            for moment, names in companions.items()
            if moment in slots and not slots[moment].dtype.is_floating_point
        }


@dataclass(frozen=True)
class OptimizerKind(StateRule):
    """How an optimizer is built, and how its state begins.

    Attributes:
        build: (parameter groups, settings) -> the optimizer. The groups carry `params`, `name` and `weight_decay`, the
            settings `lr`, `betas` and `eps`, so that torch's AdamW is `AdamW(groups, **settings)`.
        library: the module that must be installed, and `install`, the command that installs it.
        hidden_only: whether it steps whole hidden matrices alone, at a peak rate of their own; adamw_fused trains the
            rest beside it.
    """

    build: Callable[[list[dict[str, Any]], dict[str, Any]], Optimizer]
    library: str | None = None
    install: str | None = None
    hidden_only: bool = False

    @property
    def declares_state(self) -> bool:
        """Whether it says anything of the state; if not, the optimizer's class decides, or a trial of it."""
        says_nothing = StateRule()
        named = ("scalars", "initial", "counters", "quantized")
        return any(getattr(self, name) != getattr(says_nothing, name) for name in named)


def describe(name: str, slot: Slot) -> str:
    return f"{name} {tuple(slot.shape)} {slot.dtype}"


def state_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """All entries of an optimizer's state of one parameter but the step count.

    Raises:
        ValueError: an entry is no tensor. It could be neither saved nor reset.
    """
    entries = {name: value for name, value in state.items() if name != STEP and value is not None}
    others = [f"{name} = {value!r}" for name, value in entries.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"the optimizer's state has {', '.join(others)}: only {STEP} may be a number, the rest must be tensors"
        )
    return entries


def set_step(state: dict[str, Any], step: float) -> None:
    """Set the step count, which torch keeps as a tensor and others as a number."""
    if isinstance(state[STEP], Tensor):
        state[STEP].fill_(step)
    else:
        state[STEP] = type(state[STEP])(step)


def fresh_state(
    optimizer: Optimizer, optimized: Tensor, slots: Mapping[str, Slot], *, shape: torch.Size, step: float | None
) -> dict[str, Any]:
    """State with exactly these slots, all zero, and a step count unless `step` is None.

    Args:
        optimized: what the optimizer itself updates: a parameter, or a flat partition of several.
        shape: full shape of the parameter. A slot of this shape is a moment, and lies as `optimized` does.
    """
    # Torch keeps scalars in host memory, except for updates that a fused or captured kernel makes on the device.
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    scalars_device = optimized.device if on_device else torch.device("cpu")
    state: dict[str, Any] = {}
    if step is not None:
        # Torch's optimizers, and what is derived from them, count in a float32 tensor; others in a Python int.
        bases = [base for base in type(optimizer).__mro__ if base not in (Optimizer, object)]
        is_torch = any(base.__module__.startswith("torch.optim") for base in bases)
        state[STEP] = torch.tensor(float(step), dtype=torch.float32, device=scalars_device) if is_torch else int(step)
    for name, slot in slots.items():
        if slot.shape == shape:
            state[name] = torch.zeros_like(optimized.detach(), dtype=slot.dtype)
        else:
            device = optimized.device if slot.shape else scalars_device
            state[name] = torch.zeros(slot.shape, dtype=slot.dtype, device=device)
    return state
