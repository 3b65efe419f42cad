"""Optimizers and policies as a user of the package would write them, named in a configuration by `module:attribute`."""

import importlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Muon, NAdam, Optimizer

from relora.method.optimizer_state import OptimizerKind
from relora.method.reinit import DrawKey, LayerView, Reinit
from relora.method.reset import Reset

Groups = list[dict[str, Any]]
X = "neither an optimizer nor a policy"


def muon(groups: Groups, settings: dict[str, Any]) -> Optimizer:
    """Matrices only. Its state is one momentum_buffer, without a step count."""
    return Muon(groups, lr=settings["lr"])


class Lion(Optimizer):
    """arXiv 2302.06675, algorithm 2: one moment, no step count."""

    def __init__(self, groups: Groups, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                moment = state.setdefault("exp_avg", torch.zeros_like(parameter))
                direction = (beta1 * moment + (1 - beta1) * parameter.grad).sign()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * direction)
                moment.lerp_(parameter.grad, 1 - beta2)
        return loss


def lion(groups: Groups, settings: dict[str, Any]) -> Optimizer:
    return Lion(groups, lr=settings["lr"], betas=settings["betas"])


class Prodigy(Optimizer):
    """After arXiv 2306.06101: one estimate d of the distance to the solution, for all parameters together."""

    def __init__(self, groups: Groups, lr: float) -> None:
        super().__init__(groups, {"lr": lr, "d": 1e-6, "d_numerator": 0.0, "d_denominator": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = closure() if closure is not None else None
        d = self.param_groups[0]["d"]
        numerator, denominator = (self.param_groups[0][name] for name in ("d_numerator", "d_denominator"))
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(p0=parameter.clone(), s=torch.zeros_like(parameter))
                numerator += d * float((parameter.grad * (state["p0"] - parameter)).sum())
                state["s"].add_(parameter.grad, alpha=d)
                denominator += float(state["s"].abs().sum())
                parameter.sub_(parameter.grad, alpha=group["lr"] * d)
        for group in self.param_groups:
            group.update(d=max(d, numerator / denominator), d_numerator=numerator, d_denominator=denominator)
        return loss


def nadam(groups: Groups, settings: dict[str, Any]) -> Optimizer:
    """Beside moments and a step count it keeps mu_product, which begins at 1."""
    return NAdam(groups, **settings)


nadam_kind = OptimizerKind(nadam, scalars={"step": 0, "mu_product": 1})


def adafactor(groups: Groups, settings: dict[str, Any]) -> Optimizer:
    """Its second moment is a row and a column, which cannot be pruned."""
    return torch.optim.Adafactor(groups, lr=settings["lr"])


def ademamix_8bit(groups: Groups, settings: dict[str, Any]) -> Optimizer:
    """bitsandbytes' AdEMAMix: two first moments in one tensor, whose zeros are not at index 0."""
    optimizer: Optimizer = importlib.import_module("bitsandbytes.optim").AdEMAMix8bit(groups, lr=settings["lr"])
    return optimizer


def averaged(groups: Groups, settings: dict[str, Any]) -> Optimizer:
    """Schedule-free AdamW: counts updates in its groups."""
    optimizer: Any = importlib.import_module("schedulefree").AdamWScheduleFree(groups, lr=settings["lr"])
    optimizer.train()
    return cast(Optimizer, optimizer)


def of_half(groups: Groups, settings: dict[str, Any]) -> Optimizer:
    """Forgets every second parameter."""
    return torch.optim.AdamW([p for group in groups for p in group["params"]][::2], lr=settings["lr"])


class TopDirections(Reinit):
    """A spans the top right singular vectors of W, B = 0."""

    def factors(self, layer: LayerView, key: DrawKey, residual: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        _, _, Vh = torch.linalg.svd(layer.read_weight(), full_matrices=False)
        return Vh[: layer.r], torch.zeros(layer.out_features, layer.r)


class Offset(Reinit):
    """Random A and B, both not zero."""

    def factors(self, layer: LayerView, key: DrawKey, residual: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        A = torch.randn(layer.r, layer.in_features, generator=key.generator("offset A"))
        B = torch.randn(layer.out_features, layer.r, generator=key.generator("offset B"))
        return A, 0.1 * B


class Nothing(Reinit):
    """A = B = 0, from which nothing is ever learned."""

    def factors(self, layer: LayerView, key: DrawKey, residual: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return torch.zeros(layer.r, layer.in_features), torch.zeros(layer.out_features, layer.r)


class Transposed(Reinit):
    """A and B the wrong way round."""

    def factors(self, layer: LayerView, key: DrawKey, residual: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return torch.ones(layer.in_features, layer.r), torch.zeros(layer.r, layer.out_features)


offset = Offset()


class FirstRow(Reset):
    """A mask that would be spread over all rows."""

    def mask(self, first_moment: Tensor, ratio: float, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        return torch.ones_like(first_moment[:1], dtype=torch.bool)


class EverySecond(Reset):
    """Clears every second entry, and the step count."""

    clears_step = True

    def mask(self, first_moment: Tensor, ratio: float, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        return (torch.arange(first_moment.numel()) % 2 == 0).view(first_moment.shape)


def no_optimizer(groups: Groups, settings: dict[str, Any]) -> nn.Module:  # noqa: ARG001
    return nn.Linear(1, 1)
