"""The parameters of a model by kind: wrapped, factors, trained in full, frozen."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from relora.method.lora import lora_layers
from relora.method.names import named_parameters

Shape = Callable[[nn.Parameter], torch.Size]
LEFT_OUT = "_relora_left_out"  # attribute of a wrapped model


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of one kind: how many tensors, how many entries in them, and the bytes that they take."""

    num_tensors: int
    num_parameters: int
    num_bytes: int

    @classmethod
    def of(cls, sizes: list[tuple[int, int]]) -> "ParameterCount":
        """The sum over parameters, each given by (number of entries, bytes)."""
        return cls(len(sizes), sum(numel for numel, _ in sizes), sum(num_bytes for _, num_bytes in sizes))


@dataclass(frozen=True)
class ParameterReport:
    """The parameters of a model by kind.

    Attributes:
        wrapped: frozen weights that restarts merge into.
        factors: the A and B of all wrapped layers.
        full: trained in full.
        frozen: neither trained nor merged into; `frozen_names` lists them.
        wrapped_layers: name of a wrapped layer -> (d_out, d_in).
        left_out: name of a linear layer that "all-linear" does not wrap -> the reason, a predicate.
    """

    wrapped: ParameterCount
    factors: ParameterCount
    full: ParameterCount
    frozen: ParameterCount
    wrapped_layers: dict[str, tuple[int, int]]
    frozen_names: list[str]
    left_out: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For `parameters_<stage>.json` in the run folder."""
        return asdict(self)

    def table(self) -> str:
        """One line a kind, then one for each reason to leave layers out, to be read by people."""
        rows = {
            "wrapped (frozen, merged into at restarts)": self.wrapped,
            "LoRA factors (trained)": self.factors,
            "trained in full": self.full,
            "frozen for good": self.frozen,
        }
        lines = [
            f"  {kind:<42}{count.num_tensors:>6} tensors {count.num_parameters:>14,} parameters "
            f"{count.num_bytes / 2**20:>10.1f} MiB"
            for kind, count in rows.items()
        ]
        return "\n".join([*lines, *(f"  not wrapped: {line}" for line in grouped(self.left_out))])


def grouped(reasons: Mapping[str, str]) -> list[str]:
    """One line for each reason, with the first of the layers that it holds for."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [
        f"{layers[0] or 'the model'} {reason}" + (f" (and {len(layers) - 1} more)" if len(layers) > 1 else "")
        for reason, layers in names.items()
    ]


def parameter_report(model: nn.Module, shape: Shape = lambda p: p.shape) -> ParameterReport:
    """Count the parameters of `model`, wrapped or plain, each once.

    Args:
        shape: gives the full shape of a parameter, where an engine leaves the model only a shard of it.
    """
    layers = lora_layers(model)
    wrapped = {id(layer.weight): layer for layer in layers.values()}
    factor_ids = {id(p) for layer in layers.values() for p in (layer.lora_A, layer.lora_B)}
    factors, full, frozen = dict[str, tuple[int, int]](), dict[str, tuple[int, int]](), dict[str, tuple[int, int]]()
    for name, parameter in named_parameters(model).items():
        if id(parameter) in wrapped:
            continue
        kind = factors if id(parameter) in factor_ids else full if parameter.requires_grad else frozen
        numel = shape(parameter).numel()
        kind[name] = numel, numel * parameter.element_size()
    # Quantized weights have another number of entries than W.
    weights = [
        (math.prod(layer.weight_format.shape), layer.weight_format.num_bytes(layer.weight.dtype))
        for layer in wrapped.values()
    ]
    return ParameterReport(
        wrapped=ParameterCount.of(weights),
        factors=ParameterCount.of([*factors.values()]),
        full=ParameterCount.of([*full.values()]),
        frozen=ParameterCount.of([*frozen.values()]),
        wrapped_layers={name: (layer.out_features, layer.in_features) for name, layer in layers.items()},
        frozen_names=list(frozen),
        # The injected module keeps it, whatever it has been put into since.
        left_out={name: why for module in model.modules() for name, why in vars(module).get(LEFT_OUT, {}).items()},
    )


def describe_routes(model: nn.Module, num_tokens: int, dtype: torch.dtype) -> str:
    """One line on how the wrapped layers compute a training pass over `num_tokens` tokens in `dtype`."""
    layers = lora_layers(model).values()
    chosen = Counter(layer.route(num_tokens, dtype) for layer in layers)
    words = [f"{route} in {count} layers" for route, count in chosen.most_common()]
    if any(layer.cache is not None for layer in layers):
        is_cached = all(layer.cache_span != "none" for layer in layers)
        words.append(f"W + delta is {'cached' if is_cached else 'not cached under this engine'}")
    return f"  forward: {', '.join(words)}"
