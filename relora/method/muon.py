"""Muon, by torch: an update of a hidden matrix is its momentum with all singular values brought to about 1.

    M <- 0.95 M + 0.05 G          W <- (1 - rate decay) W - rate sqrt(max(1, d_out / d_in)) msign(0.95 M + 0.05 G)

msign(U diag(S) V^T) = U V^T, by five iterations in bf16 (Jordan, https://kellerjordan.github.io/posts/muon). The state
is one momentum. Embeddings, heads, vectors and LoRA factors need another optimizer beside it.
"""

from typing import Any, cast

from torch import nn
from torch.optim import Muon, Optimizer

from relora.method.lora import LoRAConfig
from relora.method.optimizer_state import OptimizerKind
from relora.method.targets import find_targets

LEARNING_RATE = 0.02  # peak rate of its author's runs, for this scaling by the sides


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the plain layers that "all-linear" would wrap: no embeddings, no heads."""
    return [cast(nn.Parameter, model.get_submodule(name).weight) for name in find_targets(model, LoRAConfig(r=1)).names]


def _build(groups: list[dict[str, Any]], settings: dict[str, Any]) -> Optimizer:
    return Muon(groups, lr=settings["lr"], adjust_lr_fn="original")


MUON = OptimizerKind(_build, scalars=(), hidden_only=True)
