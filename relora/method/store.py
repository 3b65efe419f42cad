"""How a restart reaches parameters and optimizer state. Each engine has a store; this is plain torch's."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Store(Protocol):
    """Full tensors in, full tensors out, whatever the engine has made of them. Collective where it is sharded."""

    def check(self, parameter: nn.Parameter) -> None:
        """ValueError if this store cannot reach the parameter. Costs nothing: asked before anything is changed."""

    def has_state(self, optimizer: Optimizer, parameter: nn.Parameter) -> bool:
        """Whether the optimizer holds moments and a step count of the parameter. Costs nothing."""

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The full values as the model computes with them. May alias the parameter: copy before a write."""

    def write(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Set the full values, in every copy that the engine keeps, in place. Rounds to the parameter's dtype."""

    def slots(self, optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The full moments of the parameter by name (exp_avg, exp_avg_sq, ...); empty if it has none yet."""

    def write_slot(self, optimizer: Optimizer, parameter: nn.Parameter, slot: str, values: Tensor) -> None:
        """Set one full moment, in place."""

    def reset_step(self, optimizer: Optimizer, parameter: nn.Parameter) -> None:
        """Set the step count, from which Adam takes its bias correction, to zero."""


class TorchStore:
    """Whole parameters in one process, or replicated over processes that all do the same (DDP)."""

    def check(self, parameter: nn.Parameter) -> None:
        refuse_sharded(parameter)

    def has_state(self, optimizer: Optimizer, parameter: nn.Parameter) -> bool:
        return "step" in optimizer.state.get(parameter, {}) and bool(self.slots(optimizer, parameter))

    def read(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, values: Tensor) -> None:
        parameter.copy_(values)

    def slots(self, optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = optimizer.state.get(parameter, {})
        moments = {
            name: value
            for name, value in state.items()
            if isinstance(value, Tensor) and value.shape == parameter.shape and name != "step"
        }
        coded = [name for name, value in moments.items() if not value.is_floating_point()]
        if coded:
            raise ValueError(f"the optimizer keeps {', '.join(coded)} in codes: zero as a code is not zero as a value")
        return moments

    def write_slot(self, optimizer: Optimizer, parameter: nn.Parameter, slot: str, values: Tensor) -> None:
        optimizer.state[parameter][slot].copy_(values)

    def reset_step(self, optimizer: Optimizer, parameter: nn.Parameter) -> None:
        state = optimizer.state[parameter]
        if isinstance(state["step"], Tensor):
            state["step"].zero_()
        else:
            state["step"] = 0


def refuse_sharded(parameter: nn.Parameter) -> None:
    """ValueError for a DTensor or a DeepSpeed parameter: their full values are not in this object."""
    if hasattr(parameter, "placements") or hasattr(parameter, "device_mesh"):
        kind = "a DTensor (FSDP2 or tensor parallel)"
    elif hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        kind = "a DeepSpeed parameter"
    else:
        return
    raise ValueError(f"{kind} of shape {tuple(parameter.shape)}: restart() on plain torch cannot reach its full values")
