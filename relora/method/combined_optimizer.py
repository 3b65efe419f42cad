"""One optimizer made of several, so that engines, checkpoints and hooks see a single one."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch.optim import Optimizer

FLAGS = ("found_inf", "grad_scale")  # by which torch's GradScaler and `Engine.step` tell an optimizer what to do


def evaluated(closure: Callable[[], float] | None) -> float | None:
    """The loss of a closure that was given to `Optimizer.step`, with its gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class CombinedOptimizer(Optimizer):
    """Steps each of `parts`, which train different parameters.

    Its groups are theirs, one after another, and its state is that of all: what is written to either is seen by both.

    Attributes:
        parts: the optimizers, each with the groups that it was built with.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = list(parts)
        # Whether `found_inf` keeps it from writing anything, which the host never looks at.
        self._step_supports_amp_scaling = all(getattr(part, "_step_supports_amp_scaling", False) for part in parts)
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = list(islice(groups, len(part.param_groups)))
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each part."""
        loss = evaluated(closure)
        for part in self.parts:
            for flag in FLAGS:
                setattr(part, flag, getattr(self, flag, None))
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer; the parts go on with what has been loaded."""
        super().load_state_dict(state_dict)
        self._share()
