"""Layers of one module that read the same x (q, k and v; gate and up): computed together while training.

The first of them that the model calls computes all, and the others take what is theirs when they are called with that
very tensor. Nothing is ever used for another x: a model that gives its layers different ones (cross-attention)
leaves its group behind.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relora.method.kernels import project
from relora.method.lora import LoRALinear

# The names that transformers' architectures use.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query_proj", "key_proj", "value_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q_proj", "kv_a_proj_with_mqa"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
    ("c_fc_0", "c_fc_1"),
)
# Attention to something else, where q reads another x than k and v. Told by name, so that none of it is computed in
# vain even once; what no name tells is found out.
_CROSS = re.compile(r"cross|encoder_attn|encdec|encoder_decoder", re.IGNORECASE)


class Group:
    """The layers of one group, and what waits for them between two calls of one forward pass."""

    def __init__(self, layers: Sequence[LoRALinear]) -> None:
        self._layers = list(layers)
        self._opener: LoRALinear | None = None  # the one that the model calls first
        self._fits = True
        self._waiting: _Waiting | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_waiting": None}

    def take(self, layer: LoRALinear, x: Tensor) -> Tensor | None:
        """As `Siblings.take`."""
        if torch.compiler.is_compiling() or not any(layer is own for own in self._layers):
            return None  # a compiler shares what is equal by itself; nn.DataParallel's copies are not ours
        waiting, self._waiting = self._waiting, None
        if waiting is not None and waiting.is_for(layer, x):
            y = waiting.outputs.pop(id(layer))
            self._waiting = waiting if waiting.outputs else None
            return y
        # A recomputation may have ended before it came to the others.
        self._fits = self._fits and (waiting is None or waiting.is_recomputed)
        return self._computed(layer, x) if self._may_compute(layer, x) else None

    def leave(self) -> None:
        """Every layer computes alone from now on."""
        self._waiting = None
        for layer in self._layers:
            layer.siblings = None

    def _may_compute(self, layer: LoRALinear, x: Tensor) -> bool:
        self._opener = self._opener or layer
        if not torch.is_grad_enabled() or layer is not self._opener:
            return False
        # A recomputation must save what its forward pass saved: only a forward pass may end what does not fit.
        if (self._fits or _in_backward()) and all(_is_whole(own, x) for own in self._layers):
            return True
        self.leave()
        return False

    def _computed(self, layer: LoRALinear, x: Tensor) -> Tensor:
        outputs = project(x, [own.projection(x) for own in self._layers])
        by_layer = {id(own): y for own, y in zip(self._layers, outputs, strict=True)}
        y = by_layer.pop(id(layer))
        self._waiting = _Waiting(x, x._version, by_layer, _in_backward())
        return y


@dataclass
class _Waiting:
    """What the layers that are still to be called make of x."""

    x: Tensor
    version: int
    outputs: dict[int, Tensor]
    is_recomputed: bool

    def is_for(self, layer: LoRALinear, x: Tensor) -> bool:
        return x is self.x and x._version == self.version and id(layer) in self.outputs


def group_siblings(model: nn.Module) -> None:
    """Let the wrapped layers of `model` that read the same x compute together."""
    for name, parent in model.named_modules():
        if not _CROSS.search(name):
            for layers in _groups_of(parent):
                group = Group(layers)
                for layer in layers:
                    layer.siblings = group


def _groups_of(parent: nn.Module) -> Iterator[list[LoRALinear]]:
    for names in SIBLINGS:
        found = [child for name in names if isinstance(child := parent._modules.get(name), LoRALinear)]
        alike = [layer for layer in found if _kind(layer) == _kind(found[0])]
        if len(alike) > 1 and isinstance(alike[0].dropout, nn.Identity):
            yield alike


def _kind(layer: LoRALinear) -> tuple[object, ...]:
    return layer.in_features, layer.r, layer.scale, layer.weight_format.name, layer.transposed


def _is_whole(layer: LoRALinear, x: Tensor) -> bool:
    """Whether the layer could compute now: ZeRO-3 gathers one module at a time, FSDP2 one unit."""
    return all(
        p.device == x.device and not hasattr(p, "ds_id") and not hasattr(p, "placements") for p in layer.parameters()
    )


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
