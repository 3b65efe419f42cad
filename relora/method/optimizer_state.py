"""The state that an Adam-like optimizer keeps of one parameter: moments, and a step count."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

BLOCK = 256
# The slot of the codes -> those of their scales and their table.
BESIDE = {"state1": ("absmax1", "qmap1"), "state2": ("absmax2", "qmap2")}
OF_CODES = frozenset(name for names in BESIDE.values() for name in names)


def coded_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of the coded moments in an optimizer's state of one parameter; empty if its moments are plain."""
    coded = [slot for slot in BESIDE if slot in state and state[slot].dtype == torch.uint8]
    return {name: state[name] for slot in coded for name in (slot, *BESIDE[slot])}


def decoded(codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """The float32 moment that the codes mean, in their shape."""
    values = table[codes.flatten().int()]
    return values.mul_(scales.repeat_interleave(BLOCK)[: values.numel()]).view(codes.shape)


def cleared(codes: Tensor, scales: Tensor, table: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) with zero where `mask` is set, and every other entry exactly as it was.

    The scale of a block that is cleared as a whole is zero too, as in a fresh state.
    """
    zero = int(table.abs().argmin())
    kept = F.pad(~mask.flatten(), (0, -mask.numel() % BLOCK)).view(-1, BLOCK).any(1)
    return codes.masked_fill(mask, zero), scales * kept


@dataclass(frozen=True)
class Slot:
    """A tensor of an optimizer's state as it is saved: full shape and dtype."""

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Slot":
        return cls(tensor.shape, tensor.dtype)


def moments(state: Mapping[str, Any], shape: torch.Size) -> dict[str, Tensor]:
    """The entries of an optimizer's state that are moments, of the shape of what is optimized.

    Raises:
        ValueError: they are codes of a quantised optimizer.
    """
    found = {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and value.shape == shape and name != "step"
    }
    coded = [name for name, value in found.items() if not value.is_floating_point()]
    if coded:
        raise ValueError(f"the optimizer keeps {', '.join(coded)} in codes: zero as a code is not zero as a value")
    return found


def set_step(state: dict[str, Any], step: float) -> None:
    """Set Adam's step count, which torch keeps as a tensor and others as a number."""
    if isinstance(state["step"], Tensor):
        state["step"].fill_(step)
    else:
        state["step"] = type(state["step"])(step)


def fresh_state(optimizer: Optimizer, optimized: Tensor, slots: Mapping[str, Slot]) -> dict[str, Any]:
    """State as the optimizer makes it before its first step, of what it optimizes itself (a parameter, a partition)."""
    made = {
        name: torch.zeros(slot.shape, dtype=slot.dtype, device=optimized.device)
        if name in OF_CODES
        else torch.zeros_like(optimized.detach(), dtype=slot.dtype)
        for name, slot in slots.items()
    }
    return {"step": _fresh_step(optimizer, optimized.device), **made}


def _fresh_step(optimizer: Optimizer, device: torch.device) -> Tensor | int:
    """Zero as torch counts, its fused and capturable updates on the device; others count in Python."""
    if not type(optimizer).__module__.startswith("torch."):
        return 0
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    return torch.zeros((), dtype=torch.float32, device=device if on_device else "cpu")
