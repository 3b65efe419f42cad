"""The parameter groups, and the optimizer over them."""

import importlib.util
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from relora.method.adamw_8bit import ADAMW_8BIT
from relora.method.lora import lora_layers
from relora.method.names import named_parameters
from relora.method.optimizer_state import OptimizerKind
from relora.method.registry import resolve

_KIND = (
    "kind"  # key of a parameter group: the name of the optimizer's kind. It stays when DeepSpeed rebuilds the optimizer
)


def _adamw(groups: list[dict[str, Any]], settings: dict[str, Any], *, fused: bool | None = None) -> Optimizer:
    return AdamW(groups, **settings, fused=fused)


OPTIMIZERS: Mapping[str, OptimizerKind] = {
    "adamw": OptimizerKind(_adamw),  # foreach or one by one, as torch chooses
    "adamw_fused": OptimizerKind(partial(_adamw, fused=True)),  # one kernel for many tensors
    "adamw_8bit": ADAMW_8BIT,
}


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in groups named lora, full and full_no_decay; empty groups are left out.

    The factors have a group of their own because some engines keep one step count a group. Vectors (biases,
    norms) are not decayed, as in transformers.
    """
    factors = {id(p) for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)}
    groups: dict[str, list[nn.Parameter]] = {"lora": [], "full": [], "full_no_decay": []}
    for parameter in named_parameters(model).values():
        if parameter.requires_grad:
            full = "full" if parameter.ndim > 1 else "full_no_decay"
            groups["lora" if id(parameter) in factors else full].append(parameter)
    decay = {"lora": weight_decay, "full": weight_decay, "full_no_decay": 0.0}
    return [
        {"name": name, "params": members, "weight_decay": decay[name]} for name, members in groups.items() if members
    ]


def build_optimizer(
    model: nn.Module,
    *,
    name: str = "adamw",
    learning_rate: float = 1e-3,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.95,
    adam_epsilon: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """An optimizer over the trainable parameters of `model`, the LoRA factors in a group of their own.

    Args:
        name: adamw (torch's, by its own choice of implementation), adamw_fused (torch's, one kernel for many tensors),
            adamw_8bit (bitsandbytes', with 8-bit moments), or `module:attribute`: an OptimizerKind of your own, or a
            function (groups, settings) -> Optimizer.

    Raises:
        ValueError: unknown name, a library is missing, nothing to train, or a parameter that is trained is not in the
            optimizer.
    """
    problems = optimizer_problems(name)
    if problems:
        raise ValueError("\n".join(problems))
    groups = parameter_groups(model, weight_decay=weight_decay)
    if not groups:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    settings: dict[str, Any] = {"lr": learning_rate, "betas": (adam_beta1, adam_beta2), "eps": adam_epsilon}
    optimizer = optimizer_kind(name).build(groups, settings)
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer = {name}: must build a torch.optim.Optimizer, not {type(optimizer).__name__}")
    left_out = trained - {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if left_out:
        raise ValueError(f"optimizer = {name}: leaves out {len(left_out)} of the {len(trained)} trained parameters")
    for group in optimizer.param_groups:
        group[_KIND] = name
    return optimizer


def optimizer_problems(name: str, *, setting: str = "optimizer") -> list[str]:
    """Why no optimizer of this name can be built here: unknown, or its library is not installed.

    Args:
        setting: the key of the configuration that holds the name, for the messages.
    """
    try:
        kind = optimizer_kind(name, setting=setting)
    except ValueError as error:
        return [str(error)]
    if kind.library is None or importlib.util.find_spec(kind.library) is not None:
        return []
    return [f"{setting} = {name}: needs {kind.library}: {kind.install}"]


def optimizer_kind(name: str, *, setting: str = "optimizer") -> OptimizerKind:
    """The kind of this name; ValueError if it is neither in OPTIMIZERS nor a callable or kind that can be imported."""
    kind = resolve(setting, name, OPTIMIZERS)
    if isinstance(kind, OptimizerKind):
        return kind
    if not callable(kind):
        raise ValueError(f"{setting} = {name}: must be an OptimizerKind or a function, not {type(kind).__name__}")
    return OptimizerKind(build=kind)


def declared_kind(optimizer: Optimizer) -> OptimizerKind | None:
    """The kind of which `build_optimizer` built it; None for an optimizer that was built elsewhere."""
    group = next(iter(optimizer.param_groups), {})
    return optimizer_kind(group[_KIND]) if _KIND in group else None
