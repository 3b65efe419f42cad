"""Reset policies: how a restart changes the optimizer's state of the LoRA factors."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora.method.factor_state import FactorReset, FactorState
from relora.method.optimizer_state import PARAMETER, StateRule
from relora.method.reinit import DrawKey
from relora.method.state_rules import FactorRule, declared_rule, find_rules
from relora.method.store import Store

MISSING = (
    "have no state in the optimizer, so it cannot be reset (either it has not made an update yet, or it trains other "
    "parameters)"
)


class Reset(ABC):
    """Which entries of the moments of one factor are set to zero.

    Attributes:
        clears_step: whether the step count, and other scalars of the optimizer, go back to where they begin.
    """

    clears_step: bool = False

    @abstractmethod
    def mask(self, first_moment: Tensor, ratio: float, generator: torch.Generator) -> Tensor | None:
        """True where every moment of the factor becomes zero; None to leave them all.

        The entries are the same in all moments: a first moment that outlives its second would be divided by epsilon,
        since the gradient of A is zero in the first update after a restart.

        Args:
            first_moment: in the factor's shape; not to be written to.
            ratio: the share of the entries to prune, in (0, 1].
            generator: on the CPU, keyed by the seed, the number of the restart and the name of the factor.
        """


class Zero(Reset):
    """All moments, and the step count: as a new optimizer."""

    clears_step = True

    def mask(self, first_moment: Tensor, ratio: float, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        return torch.ones_like(first_moment, dtype=torch.bool)


class Magnitude(Reset):
    """Exactly floor(ratio * n) entries, those where the first moment is smallest; of equal ones the first."""

    def mask(self, first_moment: Tensor, ratio: float, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        # By the k-th smallest value: torch.quantile refuses tensors of more than 16 M entries.
        magnitudes = first_moment.abs().flatten()  # (n,)
        count = math.floor(ratio * magnitudes.numel())
        if count == 0:
            return torch.zeros_like(first_moment, dtype=torch.bool)
        limit = magnitudes.kthvalue(count).values
        mask = magnitudes < limit  # at most count - 1 entries
        equal = (magnitudes == limit).nonzero().flatten()
        mask[equal[: count - int(mask.sum())]] = True  # now exactly count
        return mask.view(first_moment.shape)


class Random(Reset):
    """Exactly floor(ratio * n) entries, drawn without replacement."""

    def mask(self, first_moment: Tensor, ratio: float, generator: torch.Generator) -> Tensor:
        order = torch.randperm(first_moment.numel(), generator=generator)
        mask = torch.zeros(first_moment.numel(), dtype=torch.bool, device=first_moment.device)
        mask[order[: math.floor(ratio * first_moment.numel())].to(mask.device)] = True
        return mask.view(first_moment.shape)


class Keep(Reset):
    """Nothing."""

    def mask(self, first_moment: Tensor, ratio: float, generator: torch.Generator) -> None:  # noqa: ARG002
        return None


RESETS: Mapping[str, Reset] = {"zero": Zero(), "magnitude": Magnitude(), "random": Random(), "keep": Keep()}


def plan_resets(
    optimizer: Optimizer,
    factors: Mapping[str, nn.Parameter],
    *,
    reset: Reset,
    prune_ratio: float,
    seed: int,
    index: int,
    store: Store,
) -> list[FactorReset]:
    """What the reset will do to each factor. Changes nothing.

    Raises:
        ValueError: state is missing, or cannot be cleared by this reset.
        RuntimeError: a mask of the policy is no use.
    """
    if isinstance(reset, Keep):
        # Averages and iterates of the old factors would bring back what has been merged: they follow in any case.
        rules = {name: declared_rule(store.stepped(optimizer, factor).optimizer) for name, factor in factors.items()}
        for factor in factors.values():
            store.slots(optimizer, factor)  # which refuses entries that are no tensors
        return [FactorReset(name, factor, rules[name] or StateRule()) for name, factor in factors.items()]
    found = find_rules(optimizer, factors, store)
    problems = state_problems(optimizer, factors, found, reset, store)
    if problems:
        raise ValueError("\n".join(problems))
    plans = []
    for name, factor in factors.items():
        rule, mask = found[name].rule, None
        if rule is not None:
            key = DrawKey(seed, index, name)
            mask = _mask(FactorState(optimizer, factor, store, rule), reset, prune_ratio, key)
        plans.append(FactorReset(name, factor, rule, mask, reset.clears_step, isinstance(reset, Zero)))
    return plans


def problems_before_training(
    optimizer: Optimizer, factors: Mapping[str, nn.Parameter], reset: Reset, store: Store
) -> list[str]:
    """As `state_problems`, as far as they can be known before there is any state."""
    if isinstance(reset, Keep):
        return []
    rules = {name: replace(rule, is_missing=False) for name, rule in find_rules(optimizer, factors, store).items()}
    return state_problems(optimizer, factors, rules, reset, store)


def state_problems(
    optimizer: Optimizer,
    factors: Mapping[str, nn.Parameter],
    rules: Mapping[str, FactorRule],
    reset: Reset,
    store: Store,
) -> list[str]:
    """Why the state of these factors cannot be reset so: one line for each reason, however many factors have it."""
    reasons: dict[str, list[str]] = {}
    for name, factor in factors.items():
        reason = _reason(optimizer, factor, factors, rules[name], reset, store)
        if reason is not None:
            detail = f": {rules[name].detail}" if rules[name].detail else ""
            reasons.setdefault(reason, []).append(name + detail)
    kind = type(store.stepped(optimizer, next(iter(factors.values()))).optimizer).__name__
    lines = []
    for reason, names in reasons.items():
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        if reason == MISSING:
            lines.append(f"{len(names)} of {len(factors)} LoRA factors {reason}: {shown}")
        else:
            lines.append(
                f"{kind} {reason}, for {len(names)} of {len(factors)} LoRA factors, such as {shown}. An OptimizerKind "
                "can say how state begins (docs/extending.md); optimizer_reset = keep leaves it as it is"
            )
    return lines


def _reason(
    optimizer: Optimizer,
    factor: nn.Parameter,
    factors: Mapping[str, nn.Parameter],
    found: FactorRule,
    reset: Reset,
    store: Store,
) -> str | None:
    """Why the state of one factor cannot be reset so; None if it can."""
    if found.is_missing:
        return MISSING
    if found.problem is not None:
        return found.problem
    if not isinstance(reset, Zero):
        initial = found.rule.initial if found.rule is not None else dict.fromkeys(found.entries, 0.0)
        others = sorted(name for name in found.entries if initial.get(name, PARAMETER) != PARAMETER)
        if others:
            listed = ", ".join(others)
            return (
                f"keeps state that only optimizer_reset = zero can clear, as pruned entries are no new ones ({listed})"
            )
    if not reset.clears_step:
        return None
    members, stepped = {id(member) for member in factors.values()}, store.stepped(optimizer, factor)
    if not {id(sharer) for sharer in stepped.sharers} <= members:
        return "keeps one step count for the factors and other parameters together"
    counters = ", ".join(found.rule.counters) if found.rule is not None else ""
    trained = (stepped.options or {}).get("params", [])
    if counters and (stepped.tensor is not factor or not {id(parameter) for parameter in trained} <= members):
        return f"counts the updates of a group ({counters}) that has other parameters than factors"
    return None


def _mask(state: FactorState, reset: Reset, ratio: float, key: DrawKey) -> Tensor | None:
    """The policy's mask of one factor; RuntimeError if it is no mask."""
    moments = state.moments()
    mask = reset.mask(state.read(moments[0]), ratio, key.generator("prune")) if moments else None
    shape = state.store.shape(state.factor)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
        raise RuntimeError(f"{key.name}: a mask must be bool {tuple(shape)}, not {mask.dtype} {tuple(mask.shape)}")
    return mask
