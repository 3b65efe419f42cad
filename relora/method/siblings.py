"""Layers of one module that read the same x (q, k and v; gate and up), computed together while training.

One call of the kernels for all of them saves x once and stacks their small products.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

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
# Cross-attention, where q reads another x than k and v. Such modules are skipped by their name, so that nothing is
# computed in vain even once; where the name does not tell, the group finds out at its first pass.
_CROSS = re.compile(r"cross|encoder_attn|encdec|encoder_decoder", re.IGNORECASE)


@dataclass
class _Waiting:
    """Outputs computed from x for siblings that the model has not called yet.

    Attributes:
        version: of x, which a write in place raises.
        outputs: (..., d_out) by the id of the layer.
        is_recomputed: computed while activation checkpointing repeats a forward pass.
    """

    x: Tensor
    version: int
    outputs: dict[int, Tensor]
    is_recomputed: bool


class SiblingGroup:
    """Lets the first sibling that the model calls compute for all; the others take their outputs.

    Self-attention, which calls q(x), k(x), v(x):

        q(x)  nothing waits, and q opens every pass: one call of the kernels for q, k and v. Returns q's output; those
              of k and v wait.
        k(x)  the same tensor, not written since: takes its output.
        v(x)  likewise. Nothing waits any more, and the group holds no reference to x.

    Cross-attention, which calls q(x), k(y), v(y):

        q(x)  computes all three; k's and v's outputs wait.
        k(y)  y is not x: both are dropped, never used for another tensor. k computes alone.
        v(y)  nothing waits, and v is not the opener: computes alone.
        q(x') the next pass. Outputs were dropped before, so the group does not fit this model, and dissolves: from
              now on each layer computes alone.
    """

    def __init__(self, layers: Sequence[LoRALinear]) -> None:
        self._layers = list(layers)
        self._shapes = [p.shape for layer in layers for p in layer.parameters()]
        self._opener: LoRALinear | None = None  # the sibling that the model calls first
        self._fits = True  # no output has been dropped so far
        self._waiting: _Waiting | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_waiting": None}

    def take(self, layer: LoRALinear, x: Tensor) -> Tensor | None:
        """The output of `layer` for x (..., d_in), computed together with its siblings; None: it must compute alone."""
        # A compiler shares equal work by itself. Replicas of nn.DataParallel hold this group, but are not members.
        if torch.compiler.is_compiling() or not any(layer is sibling for sibling in self._layers):
            return None
        in_backward = torch._C._current_graph_task_id() != -1  # activation checkpointing recomputes
        # 1. A sibling has computed this output, from this very tensor.
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            if waiting.x is x and waiting.version == x._version and id(layer) in waiting.outputs:
                y = waiting.outputs.pop(id(layer))
                self._waiting = waiting if waiting.outputs else None
                return y
            # 2. Dropped: the siblings read different tensors. Not so in a recomputation, which may stop early.
            self._fits = self._fits and waiting.is_recomputed
        # 3. Only the opener computes for all; without gradients there is nothing to gain.
        self._opener = self._opener or layer
        if not torch.is_grad_enabled() or layer is not self._opener or not all(own.can_group for own in self._layers):
            return None
        # A recomputation must save the same tensors as its forward pass: only a forward pass ends a group that does
        # not fit.
        # Nor can layers compute that are not here: with full shapes, on x's device, no DTensors. So for a model that a
        # user shards himself; an engine that shards says so by `can_group`.
        parameters = [p for own in self._layers for p in own.parameters()]
        types = (nn.Parameter, type(x))  # the latter for fake tensors
        is_here = all(p.device == x.device and type(p) in types for p in parameters)
        is_whole = is_here and [p.shape for p in parameters] == self._shapes
        if not (self._fits or in_backward) or not is_whole:
            self.dissolve()
            return None
        # 4. All outputs by one call.
        outputs = project(x, [own.projection(x) for own in self._layers])
        by_layer = {id(own): y for own, y in zip(self._layers, outputs, strict=True)}
        y = by_layer.pop(id(layer))
        self._waiting = _Waiting(x, x._version, by_layer, in_backward)
        return y

    def dissolve(self) -> None:
        """Every layer computes alone from now on."""
        self._waiting = None
        for layer in self._layers:
            layer.siblings = None


def group_siblings(model: nn.Module) -> None:
    """Let the wrapped layers of `model` that read the same x compute together.

    Cross-attention is left out by its name; a group that its name does not tell dissolves at its second pass.
    """
    for name, parent in model.named_modules():
        if not _CROSS.search(name):
            for layers in _find_siblings(parent):
                group = SiblingGroup(layers)
                for layer in layers:
                    layer.siblings = group


def _find_siblings(parent: nn.Module) -> Iterator[list[LoRALinear]]:
    """Wrapped children of `parent` that are named like siblings, and can be computed by one call of the kernels."""
    kind = attrgetter("in_features", "r", "scale", "weight_format.name", "transposed")
    for names in SIBLINGS:
        found = [child for name in names if isinstance(child := parent._modules.get(name), LoRALinear)]
        alike = [layer for layer in found if kind(layer) == kind(found[0])]
        if len(alike) > 1 and isinstance(alike[0].dropout, nn.Identity):
            yield alike
