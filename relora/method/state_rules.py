"""Which rule holds for the optimizer's state of a parameter: a declared one, its class's, or one found by a trial."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from relora.method.adamw_8bit import ADAMW_8BIT
from relora.method.optimizer import declared_kind
from relora.method.optimizer_state import PARAMETER, STEP, Slot, StateRule
from relora.method.product import PRODUCT
from relora.method.state_trial import Entry, Trial, layout_of, try_state
from relora.method.store import Store

MAX_ENTRIES = 2**16  # of a trial on a vector: a flat partition may be as large as the model
_AVERAGED = StateRule(
    scalars=(), initial={"z": PARAMETER}, counters={"k": 0, "weight_sum": 0.0, "lr_max": -1.0, "scheduled_lr": 0.0}
)
# Classes whose state a trial cannot tell enough of: it does not show which number a scalar or a counter begins at, and
# kernels of DeepSpeed keep accounts of their own.
KNOWN: Mapping[str, StateRule] = {
    "torch.optim.adam.Adam": StateRule(),
    "torch.optim.adamw.AdamW": StateRule(),
    "torch.optim.nadam.NAdam": StateRule(scalars={STEP: 0, "mu_product": 1}),
    "deepspeed.ops.adam.fused_adam.FusedAdam": StateRule(),
    "deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam": StateRule(),
    "bitsandbytes.optim.adam.Adam8bit": ADAMW_8BIT,
    "bitsandbytes.optim.adamw.AdamW8bit": ADAMW_8BIT,
    "relora.method.product.Product": PRODUCT,
    "schedulefree.adamw_schedulefree.AdamWScheduleFree": _AVERAGED,
    "schedulefree.radam_schedulefree.RAdamScheduleFree": _AVERAGED,
    "schedulefree.sgd_schedulefree.SGDScheduleFree": _AVERAGED,
}


@dataclass(frozen=True)
class FactorRule:
    """How the state of one factor is cleared.

    Attributes:
        rule: how its entries begin; None if all that is known is that the optimizer makes them again by itself: the
            state is then dropped as a whole.
        entries: names of its entries.
        problem: why it cannot be cleared; of the same words for all factors with the same problem.
        detail: what is special in this factor.
        is_missing: there is no state, and there should be.
    """

    rule: StateRule | None = None
    entries: tuple[str, ...] = ()
    problem: str | None = None
    detail: str | None = None
    is_missing: bool = False


def declared_rule(optimizer: Optimizer) -> StateRule | None:
    """The rule of the optimizer's kind, or of its class; None if nobody has declared one."""
    kind = declared_kind(optimizer)
    if kind is not None and kind.declares_state:
        return kind
    return KNOWN.get(f"{type(optimizer).__module__}.{type(optimizer).__qualname__}")


class Trials:
    """Trials of an optimizer of an undeclared class: one for each layout of the state.

    Args:
        store: how to reach the state.
    """

    def __init__(self, optimizer: Optimizer, store: Store) -> None:
        self._optimizer, self._store = optimizer, store
        self._done: dict[object, Trial] = {}

    def of(self, parameter: nn.Parameter) -> Trial:
        """The trial for a parameter that the optimizer trains. Changes nothing."""
        stepped, state = self._store.stepped(self._optimizer, parameter), self._store.state(self._optimizer, parameter)
        tensor = stepped.tensor
        layout = layout_of(state, tensor.shape)
        key = (id(stepped.options), tensor.ndim, *layout.items())
        if key not in self._done:
            like = tensor.detach() if tensor.ndim > 1 else tensor.detach()[:MAX_ENTRIES]
            self._done[key] = try_state(stepped.optimizer, stepped.options or {}, like)
        return self._done[key]


def find_rules(optimizer: Optimizer, factors: Mapping[str, nn.Parameter], store: Store) -> dict[str, FactorRule]:
    """The rule of each factor. Changes nothing."""
    trials, found = Trials(optimizer, store), {}
    for name, factor in factors.items():
        stepped, state = store.stepped(optimizer, factor), store.state(optimizer, factor)
        rule = declared_rule(stepped.optimizer)
        if stepped.options is None or (rule is not None and not state):
            found[name] = FactorRule(rule or StateRule(), is_missing=True)
        elif rule is not None:
            slots = store.slots(optimizer, factor)
            unknown = rule.unknown(slots, store.shape(factor))
            problem = "keeps state that a reset cannot clear" if unknown else None
            found[name] = FactorRule(rule, tuple(slots), problem, ", ".join(unknown))
        else:
            found[name] = _tried(trials.of(factor), layout_of(state, stepped.tensor.shape))
    return found


def counters_beside_state(optimizer: Optimizer, parameters: Iterable[nn.Parameter], store: Store) -> list[str]:
    """Numbers that count updates, and belong to no parameter: no checkpoint of the parameters' state holds them."""
    trials, found = Trials(optimizer, store), dict[str, None]()
    smallest: dict[object, nn.Parameter] = {}
    for parameter in parameters:
        group = id(store.stepped(optimizer, parameter).options)
        if group not in smallest or parameter.numel() < smallest[group].numel():
            smallest[group] = parameter
    for parameter in smallest.values():
        rule = declared_rule(store.stepped(optimizer, parameter).optimizer)
        found |= dict.fromkeys(rule.counters if rule is not None else trials.of(parameter).counters)
    return list(found)


def _tried(trial: Trial, layout: Mapping[str, Entry]) -> FactorRule:
    """What follows from a trial for a factor whose state has this layout."""
    if trial.problem is not None:
        return FactorRule(problem=f"keeps state that a reset cannot clear: {trial.problem}")
    foreign = [name for name, entry in layout.items() if trial.entries.get(name) != entry]
    if foreign:
        return FactorRule(problem="did not make all of its state itself", detail=", ".join(foreign))
    numbers = [name for name, entry in trial.entries.items() if isinstance(entry, type) and name != STEP]
    rule = None
    if trial.zeros and not numbers:
        slots = {name: entry for name, entry in trial.entries.items() if isinstance(entry, Slot)}
        scalars = (STEP, *(name for name, slot in slots.items() if slot.shape.numel() == 1))
        integers = [
            n for n, entry in trial.entries.items() if isinstance(entry, torch.dtype) and not entry.is_floating_point
        ]
        rule = StateRule(scalars=scalars, initial=dict.fromkeys({*slots, *integers} - {*scalars}, 0.0))
    return FactorRule(rule, tuple(trial.entries), is_missing=bool(trial.entries) and not layout)
