"""Reset policies: how a restart changes the optimizer's state of the LoRA factors."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora.method.optimizer import kind_of
from relora.method.optimizer_state import STEP, OptimizerKind
from relora.method.reinit import DrawKey
from relora.method.store import Store


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


def state_problems(optimizer: Optimizer, factors: Mapping[str, nn.Parameter], store: Store) -> list[str]:
    """Why the state of these factors cannot be reset: there is none, or it has entries that no rule clears."""
    missing = [name for name, factor in factors.items() if not store.has_state(optimizer, factor)]
    if missing:
        return [
            f"{len(missing)} of {len(factors)} LoRA factors have no state in the optimizer, so it cannot be reset: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}. Either the optimizer has not made an "
            "update yet, or it trains other parameters"
        ]
    kind, unknown = kind_of(optimizer), {}
    for name, factor in factors.items():
        slots = store.slots(optimizer, factor)
        entries = kind.unknown(slots, store.shape(factor))
        if store.step(optimizer, factor) is not None and STEP not in kind.initial_scalars:
            entries.append(STEP)
        if entries:
            unknown[name] = entries
    if not unknown:
        return []
    name, entries = next(iter(unknown.items()))
    return [
        f"{type(optimizer).__name__} keeps state that a reset cannot clear, of {len(unknown)} of {len(factors)} LoRA "
        f"factors, such as {name}: {', '.join(entries)}. It clears floating-point tensors of the parameter's shape, "
        "the scalars that OptimizerKind.scalars names, and moments in the format of OptimizerKind.quantized; "
        "optimizer_reset = keep leaves all state as it is"
    ]


@dataclass(frozen=True)
class FactorState:
    """The optimizer's state of one factor, as a reset reads and writes it."""

    optimizer: Optimizer
    factor: nn.Parameter
    store: Store
    kind: OptimizerKind

    def read(self, moment: str) -> Tensor:
        """One full moment in floating point. May alias the optimizer's state."""
        values = self._slot(moment)
        if self.kind.quantized is None or values.is_floating_point():
            return values
        scales, table = (self._slot(name) for name in self.kind.quantized.companions[moment])
        return self.kind.quantized.dequantize(values, scales, table)

    def clear(self, moment: str, mask: Tensor) -> None:
        """Set entries of one moment to zero; the others stay as they are, to the bit."""
        values = self._slot(moment)
        if self.kind.quantized is None or values.is_floating_point():
            self.store.write_slot(self.optimizer, self.factor, moment, values.masked_fill(mask, 0))
            return
        scales, table = self.kind.quantized.companions[moment]
        integers, new_scales = self.kind.quantized.clear(values, self._slot(scales), self._slot(table), mask)
        self.store.write_slot(self.optimizer, self.factor, moment, integers)
        self.store.write_slot(self.optimizer, self.factor, scales, new_scales)

    def clear_scalars(self) -> None:
        """Set the step count and the kind's other scalars to their values before the first update."""
        optimizer, factor, store = self.optimizer, self.factor, self.store
        slots = store.slots(optimizer, factor)
        for name, value in self.kind.initial_scalars.items():
            if name == STEP and store.step(optimizer, factor) is not None:
                store.write_step(optimizer, factor, value)
            elif name in slots:
                store.write_slot(optimizer, factor, name, torch.full(slots[name].shape, value))

    def _slot(self, name: str) -> Tensor:
        return self.store.read_slot(self.optimizer, self.factor, name)


def reset_state(
    optimizer: Optimizer,
    name: str,
    factor: nn.Parameter,
    *,
    reset: Reset,
    prune_ratio: float,
    key: DrawKey,
    store: Store,
) -> tuple[int, int]:
    """Reset the state of the LoRA factor `name`; `state_problems` must have found none.

    Returns:
        (entries that are zero afterwards, entries), read back and summed over the moments.

    Raises:
        RuntimeError: an entry that was cleared, or the step count, reads back as something else.
    """
    state = FactorState(optimizer, factor, store, kind_of(optimizer))
    moments = state.kind.moments(store.slots(optimizer, factor), store.shape(factor))
    mask = reset.mask(state.read(moments[0]), prune_ratio, key.generator("prune")) if moments else None
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != store.shape(factor):
            expected = tuple(store.shape(factor))
            raise RuntimeError(f"{name}: a mask must be bool {expected}, not {mask.dtype} {tuple(mask.shape)}")
        for moment in moments:
            state.clear(moment, mask)
    if reset.clears_step:
        state.clear_scalars()
    after = [state.read(moment) for moment in moments]
    if mask is not None:
        num_left = sum(int(values[mask].count_nonzero()) for values in after)
        if num_left:
            raise RuntimeError(f"{name}: {num_left} cleared entries of {', '.join(moments)} read back as not 0")
    step = store.step(optimizer, factor)
    if reset.clears_step and step is not None and step != state.kind.initial_scalars[STEP]:
        raise RuntimeError(f"{name}: the step count was cleared, and reads back as {step:g}")
    return sum(int((values == 0).sum()) for values in after), sum(values.numel() for values in after)
