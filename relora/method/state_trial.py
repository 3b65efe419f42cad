"""How the state of an optimizer begins that nobody has described: found by trying it on a parameter of its own.

The trial trains a made-up parameter three times with the optimizer's own code: from no state at all, from used state
that has been dropped, and from used state whose every number has been set to 0. The first is the truth; the others show
what a reset may do. The optimizer, its parameters and their state are not touched.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora.method.optimizer_state import Slot

NUM_UPDATES = 3
# Attributes of every torch optimizer that a trial replaces.
_REPLACED = ("state", "param_groups", "defaults")


# What there is to know of an entry without its values: only the dtype of a tensor of the parameter's shape.
Entry = torch.dtype | Slot | type


@dataclass(frozen=True)
class Trial:
    """What has been found of the state of one parameter.

    Attributes:
        entries: the entries that the optimizer makes, as `layout_of` describes them.
        counters: numbers that it counts beside the state of a parameter; a problem as well.
        zeros: used state that is all 0 is as good as none.
        problem: why dropping the state does not make the parameter new to the optimizer; None if it does.
    """

    entries: Mapping[str, Entry] = field(default_factory=dict)
    zeros: bool = False
    counters: tuple[str, ...] = ()
    problem: str | None = None


@torch.no_grad()
def try_state(optimizer: Optimizer, options: Mapping[str, Any], like: Tensor) -> Trial:
    """Find out how the state of a parameter begins.

    Args:
        options: the parameter group, of which `params` is not used.
        like: a parameter, of which shape, dtype and device are used.
    """
    entangled = _entangled(optimizer)
    if entangled:
        return Trial(problem=f"it keeps {entangled} beside its state, so it cannot be tried on a parameter of its own")
    devices = [like.device] if like.is_cuda else []
    try:
        with torch.random.fork_rng(devices=devices):
            new, dropped, zeroed = (_Rehearsal(optimizer, options, like) for _ in range(3))
            begins = new.counters()
            expected = new.train()
            counters = [name for name, value in new.counters().items() if not _equal(begins.get(name), value)]
            if counters:
                problem = f"it counts updates beside the state of a parameter ({', '.join(counters)})"
                return Trial(counters=tuple(counters), problem=problem)
            dropped.train()
            dropped.state.clear()
            outcome = dropped.train()
            zeroed.train()
            _fill_with_zeros(zeroed.state)
            zeros = _equal(zeroed.train(), expected)
    except Exception as error:
        return Trial(problem=f"it cannot be tried on a parameter of its own ({type(error).__name__}: {error})")
    if not _equal(outcome, expected):
        return Trial(problem="a parameter whose state is dropped is not to it as a new one")
    return Trial(layout_of(expected[1], like.shape), zeros)


def layout_of(state: Mapping[str, Any], shape: torch.Size) -> dict[str, Entry]:
    """The entries of the state of a parameter of this shape."""
    layout: dict[str, Entry] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            layout[name] = value.dtype if value.shape == shape else Slot.of(value)
        elif value is not None:
            layout[name] = type(value)
    return layout


class _Rehearsal:
    """A copy of an optimizer over one made-up parameter.

    Attributes:
        state: its state of the parameter.
    """

    def __init__(self, optimizer: Optimizer, options: Mapping[str, Any], like: Tensor) -> None:
        self._start = torch.linspace(-1, 1.07, like.numel(), dtype=like.dtype, device=like.device).view(like.shape)
        self._parameter = nn.Parameter(self._start.clone())
        self._copy: Any = object.__new__(type(optimizer))
        for name, value in vars(optimizer).items():
            # A method that was hung on the instance, as schedulers do, would step the optimizer itself.
            if name not in _REPLACED and not callable(value):
                vars(self._copy)[name] = type(value)() if "_hooks" in name else _own(value)
        group = {name: copy.deepcopy(value) for name, value in options.items() if name != "params"}
        self._copy.state, self._copy.param_groups = defaultdict(dict), [group | {"params": [self._parameter]}]
        self._copy.defaults = copy.deepcopy(optimizer.defaults)

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._copy.state[self._parameter]
        return state

    def train(self) -> tuple[list[Tensor], dict[str, Any]]:
        """A few updates from the first values on: the values after each, and the state after the last."""
        self._parameter.copy_(self._start)
        torch.default_generator.manual_seed(0)  # an optimizer may round at random
        if self._start.is_cuda:
            torch.cuda.default_generators[self._start.device.index].manual_seed(0)
        values = []
        for number in range(1, NUM_UPDATES + 1):
            self._parameter.grad = (self._start * 37 * number).sin()  # of both signs, of different sizes, none zero
            type(self._copy).step(self._copy)
            values.append(self._parameter.detach().clone())
        return values, copy.deepcopy(dict(self.state))

    def counters(self) -> dict[str, Any]:
        """Numbers beside the state: of the group, and attributes of the optimizer."""
        attributes = {name: value for name, value in vars(self._copy).items() if name not in _REPLACED}
        [group] = self._copy.param_groups
        numbers = {name: value for name, value in (attributes | group).items() if name != "params"}
        return {name: _own(value) for name, value in numbers.items() if not isinstance(value, bool)}


def _entangled(optimizer: Optimizer) -> str:
    """What the optimizer holds that a copy of it would share and may change: parameters, modules, other optimizers."""
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}

    def is_shared(value: object) -> bool:
        return isinstance(value, Optimizer | nn.Module | nn.Parameter) or id(value) in parameters

    attributes = {name: value for name, value in vars(optimizer).items() if name not in _REPLACED}
    found = [name for name, value in attributes.items() if any(is_shared(leaf) for leaf in _leaves(value))]
    return ", ".join(found)


def _leaves(value: object) -> Iterable[object]:
    """The objects in nested containers."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if not isinstance(value, list | tuple | set | frozenset):
        return [value]
    return [leaf for item in value for leaf in _leaves(item)]


def _own(value: Any) -> Any:
    """A copy of tensors and containers; other objects, which may be the only ones of their kind, as they are."""
    return copy.deepcopy(value) if isinstance(value, Tensor | dict | list | set | tuple) else value


def _fill_with_zeros(state: dict[str, Any]) -> None:
    """Set every number to 0, tensors in place, as a reset would."""
    convert: Callable[[Any], Any]
    for name, value in state.items():
        if isinstance(value, Tensor):
            value.zero_()
        elif isinstance(value, int | float):
            convert = type(value)
            state[name] = convert(0)


def _equal(one: Any, other: Any) -> bool:
    """Whether nested containers of tensors and other values are the same, to the bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other)
