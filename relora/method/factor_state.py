"""The optimizer's state of one LoRA factor, as a reset reads, clears and checks it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora.method.optimizer_state import PARAMETER, STEP, StateRule
from relora.method.store import Store


@dataclass(frozen=True)
class FactorReset:
    """What a restart will do to the state of one factor: decided before anything is changed.

    Attributes:
        rule: how the state begins; None to drop it as a whole, so that the optimizer makes it again.
        mask: entries of every moment that become zero; None for none.
        clears_step: whether scalars, and counters of the group, go back to where they begin.
        clears_others: whether entries that are neither moments nor scalars do.
    """

    name: str
    factor: nn.Parameter
    rule: StateRule | None
    mask: Tensor | None = None
    clears_step: bool = False
    clears_others: bool = False


@dataclass(frozen=True)
class FactorState:
    """The optimizer's state of one factor, whose beginning is known."""

    optimizer: Optimizer
    factor: nn.Parameter
    store: Store
    rule: StateRule

    def moments(self) -> list[str]:
        """Names of the moments, the first moment first."""
        return self.rule.moments(self.store.slots(self.optimizer, self.factor), self.store.shape(self.factor))

    def read(self, moment: str) -> Tensor:
        """One full moment in floating point. May alias the optimizer's state."""
        values = self._slot(moment)
        if self.rule.quantized is None or values.is_floating_point():
            return values
        scales, table = (self._slot(name) for name in self.rule.quantized.companions[moment])
        return self.rule.quantized.dequantize(values, scales, table)

    def clear(self, moment: str, mask: Tensor) -> None:
        """Set entries of one moment to zero; the others stay as they are, to the bit."""
        values = self._slot(moment)
        if self.rule.quantized is None or values.is_floating_point():
            self.store.write_slot(self.optimizer, self.factor, moment, values.masked_fill(mask, 0))
            return
        scales, table = self.rule.quantized.companions[moment]
        integers, new_scales = self.rule.quantized.clear(values, self._slot(scales), self._slot(table), mask)
        self.store.write_slot(self.optimizer, self.factor, moment, integers)
        self.store.write_slot(self.optimizer, self.factor, scales, new_scales)

    def clear_scalars(self) -> None:
        """Set the step count, the rule's other scalars and its counters to their values before the first update."""
        optimizer, factor, store = self.optimizer, self.factor, self.store
        slots = store.slots(optimizer, factor)
        for name, value in self.rule.initial_scalars.items():
            if name == STEP and store.step(optimizer, factor) is not None:
                store.write_step(optimizer, factor, value)
            elif name in slots:
                store.write_slot(optimizer, factor, name, torch.full(slots[name].shape, value))
        options = store.stepped(optimizer, factor).options or {}
        options.update({name: value for name, value in self.rule.counters.items() if name in options})

    def clear_others(self) -> int:
        """Fill the entries that are neither moments nor scalars with the number they begin at.

        Returns:
            How many entries of tensors that is.

        Raises:
            RuntimeError: they read back as something else.
        """
        optimizer, factor, store = self.optimizer, self.factor, self.store
        slots = store.slots(optimizer, factor)
        numbers = {
            name: value for name, value in self.rule.initial.items() if name in slots and not isinstance(value, str)
        }
        for name, number in numbers.items():
            values = torch.full(slots[name].shape, number, dtype=slots[name].dtype)
            store.write_slot(optimizer, factor, name, values)
            if not torch.equal(self._slot(name).cpu(), values):
                raise RuntimeError(f"{name} was set to {number}, and reads back as something else")
        return sum(slots[name].shape.numel() for name in numbers)

    def _slot(self, name: str) -> Tensor:
        return self.store.read_slot(self.optimizer, self.factor, name)


def reset_state(optimizer: Optimizer, plan: FactorReset, store: Store) -> tuple[int, int]:
    """Reset the state of one factor, which has its new values already.

    Returns:
        (entries that are zero afterwards, entries), read back and summed over the moments and what else was cleared.

    Raises:
        RuntimeError: an entry that was cleared, or the step count, reads back as something else.
    """
    name, factor = plan.name, plan.factor
    if plan.rule is None:
        tensors = [value for value in store.state(optimizer, factor).values() if isinstance(value, Tensor)]
        store.state(optimizer, factor).clear()
        num_dropped = sum(tensor.numel() for tensor in tensors)
        return num_dropped, num_dropped
    state = FactorState(optimizer, factor, store, plan.rule)
    moments = state.moments()
    if plan.mask is not None:
        for moment in moments:
            state.clear(moment, plan.mask)
    if plan.clears_step:
        state.clear_scalars()
    num_others = state.clear_others() if plan.clears_others else 0
    for entry in store.slots(optimizer, factor).keys() & plan.rule.initial.keys():
        if plan.rule.initial[entry] == PARAMETER:
            store.follow(optimizer, factor, entry)
    after = [state.read(moment) for moment in moments]
    if plan.mask is not None:
        num_left = sum(int(values[plan.mask].count_nonzero()) for values in after)
        if num_left:
            raise RuntimeError(f"{name}: {num_left} cleared entries of {', '.join(moments)} read back as not 0")
    step = store.step(optimizer, factor)
    if plan.clears_step and step is not None and step != plan.rule.initial_scalars[STEP]:
        raise RuntimeError(f"{name}: the step count was cleared, and reads back as {step:g}")
    num_zero = sum(int((values == 0).sum()) for values in after)
    return num_zero + num_others, sum(values.numel() for values in after) + num_others
