"""Processes that each train factors of their own, and meet at restarts (relora.sync: restart).

Between restarts no gradient travels. At a restart W takes the mean of all processes' updates, of rank up to
world size x r, what trains in full is averaged too, and each process draws new factors under its own key, so
that the subspaces differ.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from relora.engines.base import TrainState
from relora.engines.ddp import DDPEngine
from relora.engines.outer import OuterOptimizer
from relora.engines.world import World
from relora.method.lora import factor_names, lora_layers
from relora.method.names import named_parameters
from relora.method.restart import RestartReport, restart
from relora.method.store import TorchStore


class LocalSGDEngine(DDPEngine):
    """DDP while every parameter is trained in full; no gradients travel once the model has factors."""

    def __init__(
        self, world: World, *, mixed_precision: str, max_grad_norm: float | None, outer: OuterOptimizer
    ) -> None:
        super().__init__(world, mixed_precision=mixed_precision, max_grad_norm=max_grad_norm)
        self.name += ", factors apart between restarts"
        self.draw_index, self.outer = world.process_index, outer

    def prepare(self, model: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> TrainState:
        self.is_apart = bool(lora_layers(model))
        return super().prepare(model, build_optimizer)

    def begin(self, live: TrainState) -> None:
        for name, parameter in _full_modules(live.model).items() if self.is_apart else ():
            self.outer.anchor(name, parameter)

    def restart(self, live: TrainState, **how: Any) -> RestartReport:
        meeting = GatheringStore(self.world, set(map(id, _of_kind(live.model, "lora_A"))))
        report = restart(
            live.model,
            live.optimizer,
            store=meeting,
            draw_index=self.draw_index,
            transform_delta=self.outer.step,
            **how,
        )
        for name, parameter in _full_modules(live.model).items():
            mean = parameter.detach() / self.world.num_processes
            self.world.all_reduce(mean)
            self.store.write(parameter, self.outer.settle(name, mean))
            self.outer.anchor(name, parameter)
        return report

    def _wrapped(self, model: nn.Module) -> nn.Module:
        return model if self.is_apart else super()._wrapped(model)


class GatheringStore(TorchStore):
    """Reads the factors of all processes side by side: B_all @ A_all is then the mean of their B @ A.

    Args:
        first_factors: ids of the A's. Those of shape (r, d_in) are stacked, the B's (d_out, r) put in a row.
    """

    def __init__(self, world: World, first_factors: set[int]) -> None:
        super().__init__()
        self._world, self._first_factors = world, first_factors

    def read(self, parameter: nn.Parameter) -> Tensor:
        n = self._world.num_processes
        if not parameter.requires_grad or n == 1:
            return super().read(parameter)
        mine = parameter.detach().contiguous()
        theirs = [torch.empty_like(mine) for _ in range(n)]
        distributed.all_gather(theirs, mine)
        return torch.cat(theirs) if id(parameter) in self._first_factors else torch.cat(theirs, dim=1) / n


def _of_kind(model: nn.Module, which: str) -> list[nn.Parameter]:
    return [getattr(layer, which) for layer in lora_layers(model).values()]


def _full_modules(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains in full beside the factors, by canonical name."""
    factors = factor_names(model)
    return {name: p for name, p in named_parameters(model).items() if p.requires_grad and name not in factors}
