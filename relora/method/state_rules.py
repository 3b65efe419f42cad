"""Which rule holds for the optimizer's state of a parameter: a declared one, its class's, or one found by a trial."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from relora.method.adamw_8bit import ADAMW_8BIT
from relora.method.optimizer import declared_kind
from relora.method.optimizer_state import PARAMETER, STEP, Slot, StateRule, describe
from relora.method.state_trial import Trial, layout_of, try_state
from relora.method.store import Store

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
        problem: why it cannot be cleared; of the same words for all factors with the same problem.
        detail: what is special in this factor.
        is_missing: there is no state, and there should be.
    """

    rule: StateRule | None = None
    problem: str | None = None
    detail: str | None = None
    is_missing: bool = False


def declared_rule(optimizer: Optimizer) -> StateRule | None:
    """The rule of the optimizer's kind, or of its class; None if nobody has declared one."""
    kind = declared_kind(optimizer)
    if kind is not None and kind.declares_state:
        return kind
    return KNOWN.get(f"{type(optimizer).__module__}.{type(optimizer).__qualname__}")


def find_rules(optimizer: Optimizer, factors: Mapping[str, nn.Parameter], store: Store) -> dict[str, FactorRule]:
    """The rule of each factor. Changes nothing, and tries an optimizer of an undeclared class once for each layout."""
    trials: dict[object, Trial] = {}
    found = {}
    for name, factor in factors.items():
        stepped, state = store.stepped(optimizer, factor), store.state(optimizer, factor)
        rule = declared_rule(stepped.optimizer)
        if stepped.options is None or (rule is not None and not state):
            found[name] = FactorRule(is_missing=True)
        elif rule is not None:
            unknown = rule.unknown(store.slots(optimizer, factor), store.shape(factor))
            problem = "keeps state that a reset cannot clear" if unknown else None
            found[name] = FactorRule(rule, problem, ", ".join(unknown))
        else:
            layout = (id(stepped.options), stepped.tensor.ndim, *layout_of(state).items())
            if layout not in trials:
                trials[layout] = try_state(stepped.optimizer, stepped.options, stepped.tensor)
            found[name] = _tried(trials[layout], optimizer, factor, store)
    return found


def _tried(trial: Trial, optimizer: Optimizer, factor: nn.Parameter, store: Store) -> FactorRule:
    """What follows from a trial for a factor of the same layout."""
    if trial.problem is not None:
        return FactorRule(problem=f"keeps state that a reset cannot clear: {trial.problem}")
    state = store.state(optimizer, factor)
    if not state:
        return FactorRule(is_missing=bool(trial.entries), rule=StateRule())
    layout = layout_of(state)
    foreign = [name for name in layout if layout[name] != trial.entries.get(name)]
    if foreign:
        described = [describe(name, slot) if isinstance(slot := layout[name], Slot) else name for name in foreign]
        return FactorRule(problem="did not make all of its state itself", detail=", ".join(described))
    if not trial.zeros:
        return FactorRule()
    slots, shape = store.slots(optimizer, factor), store.shape(factor)
    scalars = [STEP, *(name for name, slot in slots.items() if slot.shape != shape and slot.shape.numel() == 1)]
    moments = StateRule(scalars=tuple(scalars)).moments(slots, shape)
    others = {name: 0.0 for name in slots if name not in (*scalars, *moments)}
    return FactorRule(StateRule(scalars=tuple(scalars), initial=others))
