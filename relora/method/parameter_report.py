"""Who is who among the parameters of a model: wrapped, factors, trained in full, frozen."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from relora.method.lora import LoRALinear, lora_layers
from relora.method.names import named_parameters

Shape = Callable[[nn.Parameter], torch.Size]


@dataclass(frozen=True)
class Group:
    """Parameters of one kind: how many tensors, numbers in them, and bytes they take."""

    num_tensors: int
    num_parameters: int
    num_bytes: int

    @classmethod
    def of(cls, held: list[tuple[int, int]]) -> "Group":
        """Of parameters, each with its number of entries and the bytes that they take."""
        return cls(len(held), sum(numel for numel, _ in held), sum(num_bytes for _, num_bytes in held))


@dataclass(frozen=True)
class ParameterReport:
    """The parameters of a model by kind; `wrapped_layers` maps a layer's name to its (d_out, d_in).

    `frozen` are parameters that are neither trained nor merged into: `frozen_names` lists them.
    """

    wrapped: Group
    factors: Group
    full: Group
    frozen: Group
    wrapped_layers: dict[str, tuple[int, int]]
    frozen_names: list[str]

    @property
    def num_trainable(self) -> int:
        return self.factors.num_parameters + self.full.num_parameters

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """One line a kind, for people."""
        rows = {
            "wrapped (frozen, merged into at restarts)": self.wrapped,
            "LoRA factors (trained)": self.factors,
            "trained in full": self.full,
            "frozen for good": self.frozen,
        }
        return "\n".join(
            f"  {kind:<42}{group.num_tensors:>6} tensors {group.num_parameters:>14,} parameters "
            f"{group.num_bytes / 2**20:>10.1f} MiB"
            for kind, group in rows.items()
        )


def parameter_report(model: nn.Module, shape: Shape = lambda p: p.shape) -> ParameterReport:
    """Count the parameters of `model`, wrapped or plain, each once.

    Args:
        shape: the full shape of a parameter, where an engine leaves the model only a part of it.
    """
    layers = lora_layers(model)
    wrapped = {id(layer.weight): layer for layer in layers.values()}
    factors = {id(p) for layer in layers.values() for p in (layer.lora_A, layer.lora_B)}
    parameters = named_parameters(model)
    rest = {name: p for name, p in parameters.items() if id(p) not in wrapped.keys() | factors}
    frozen = {name: p for name, p in rest.items() if not p.requires_grad}

    def held(p: nn.Parameter) -> tuple[int, int]:
        numel = shape(p).numel()
        return numel, numel * p.element_size()

    return ParameterReport(
        wrapped=Group.of([_stored(layer) for layer in wrapped.values()]),
        factors=Group.of([held(p) for p in parameters.values() if id(p) in factors]),
        full=Group.of([held(p) for p in rest.values() if p.requires_grad]),
        frozen=Group.of([held(p) for p in frozen.values()]),
        wrapped_layers={name: _shape(layer) for name, layer in layers.items()},
        frozen_names=list(frozen),
    )


def describe_routes(model: nn.Module, num_tokens: int, dtype: torch.dtype) -> str:
    """Which way the wrapped layers compute a training pass over so many tokens in `dtype`, for people."""
    layers = lora_layers(model).values()
    chosen = Counter(layer.route(num_tokens, dtype) for layer in layers)
    words = [f"{route} in {count} layers" for route, count in chosen.most_common()]
    if any(layer.cache is not None for layer in layers):
        is_cached = all(layer.can_cache for layer in layers)
        words.append(f"W + delta is {'cached' if is_cached else 'not cached under this engine'}")
    return f"  forward: {', '.join(words)}"


def _stored(layer: LoRALinear) -> tuple[int, int]:
    return math.prod(layer.weight_format.shape), layer.weight_format.num_bytes(layer.weight.dtype)


def _shape(layer: LoRALinear) -> tuple[int, int]:
    return layer.out_features, layer.in_features
