"""The outer optimizer of processes that train apart: a step along the mean of what each has learned.

Each process goes its own way from common weights for a cycle; the mean of where they have come to, less where
they began, is taken for a gradient. DiLoCo, arXiv 2311.08105, Algorithm 1; for low-rank updates
LoRA-the-Explorer, arXiv 2402.16828.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class OuterOptimizer:
    """SGD with Nesterov momentum, as torch's, over named tensors.

    Attributes:
        velocity: by name; empty without momentum.
        anchors: by name the values from which the processes set out, of what trains in full; empty while the
            mean alone is the result.
    """

    learning_rate: float = 1.0
    momentum: float = 0.0
    velocity: dict[str, Tensor] = field(default_factory=dict)
    anchors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def takes_the_mean(self) -> bool:
        """Whether the result is simply the mean."""
        return self.learning_rate == 1 and self.momentum == 0

    def step(self, name: str, delta: Tensor) -> Tensor:
        """What is added for the mean update `delta` of the tensor `name`."""
        if self.takes_the_mean:
            return delta
        if self.momentum == 0:
            return delta * self.learning_rate
        velocity = self.velocity.setdefault(name, torch.zeros_like(delta)).mul_(self.momentum).add_(delta)
        return (delta + self.momentum * velocity) * self.learning_rate

    def anchor(self, name: str, values: Tensor) -> None:
        """Remember where the processes set out from, if that will be needed."""
        if not self.takes_the_mean:
            self.anchors[name] = values.detach().clone()

    def settle(self, name: str, mean: Tensor) -> Tensor:
        """The common values to go on from, for the mean of where the processes have come to."""
        if self.takes_the_mean:
            return mean
        return self.anchors[name] + self.step(name, mean - self.anchors[name])

    def tensors(self) -> dict[str, Tensor]:
        """The state, flat by name, for a checkpoint."""
        kinds = {"velocity": self.velocity, "anchor": self.anchors}
        return {f"{kind}/{name}": tensor for kind, tensors in kinds.items() for name, tensor in tensors.items()}

    def load(self, name: str, tensor: Tensor) -> None:
        """Put back one tensor of `tensors()`."""
        kind, _, of = name.partition("/")
        {"velocity": self.velocity, "anchor": self.anchors}[kind][of] = tensor
