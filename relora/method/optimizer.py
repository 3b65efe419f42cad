"""The parameter groups, and the optimizer over them."""

import importlib.util
from collections import ChainMap
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from relora.method.adamw_8bit import ADAMW_8BIT
from relora.method.combined_optimizer import CombinedOptimizer
from relora.method.lora import lora_layers
from relora.method.muon import LEARNING_RATE, MUON, hidden_matrices
from relora.method.names import named_parameters
from relora.method.optimizer_state import OptimizerKind
from relora.method.product import PRODUCT
from relora.method.registry import resolve

# Keys of a parameter group, which stay when DeepSpeed rebuilds the optimizer: the name of the optimizer's kind, and the
# group's own peak learning rate, None for that of the run.
_KIND, PEAK = "kind", "peak_lr"
_FACTORS, _HIDDEN = "lora", "hidden"  # names of groups
_REST = "adamw_fused"  # trains what an optimizer of hidden matrices does not


def _adamw(groups: list[dict[str, Any]], settings: dict[str, Any], *, fused: bool | None = None) -> Optimizer:
    return AdamW(groups, **settings, fused=fused)


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(_adamw),  # foreach or one by one, as torch chooses
    "adamw_fused": OptimizerKind(partial(_adamw, fused=True)),  # one kernel for many tensors
    "adamw_8bit": ADAMW_8BIT,
    "muon": MUON,
}
_ALL: Mapping[str, OptimizerKind] = ChainMap({"product": PRODUCT}, OPTIMIZERS)
# Of the factors alone, where they have an optimizer of their own.
FACTOR_OPTIMIZERS: Mapping[str, OptimizerKind] = {name: kind for name, kind in _ALL.items() if not kind.hidden_only}


def parameter_groups(model: nn.Module, *, weight_decay: float, split_hidden: bool = False) -> list[dict[str, Any]]:
    """The trainable parameters in groups named lora, hidden, full and full_no_decay; empty groups are left out.

    The factors have a group of their own because some engines keep one step count a group. It holds A, B, A, B, ... of
    the layers, and their `scale`. Vectors (biases, norms) are not decayed, as in transformers.

    Args:
        split_hidden: whether hidden matrices have a group, and are not among `full`.
    """
    layers = list(lora_layers(model).values())
    factors = {id(p) for layer in layers for p in (layer.lora_A, layer.lora_B)}
    hidden = {id(p) for p in hidden_matrices(model)} if split_hidden else set()
    groups: dict[str, list[nn.Parameter]] = {_FACTORS: [], _HIDDEN: [], "full": [], "full_no_decay": []}
    for parameter in named_parameters(model).values():
        if parameter.requires_grad:
            full = "full" if parameter.ndim > 1 else "full_no_decay"
            own = _FACTORS if id(parameter) in factors else _HIDDEN if id(parameter) in hidden else full
            groups[own].append(parameter)
    found: list[dict[str, Any]] = [
        {"name": name, "params": members, "weight_decay": 0.0 if name == "full_no_decay" else weight_decay}
        for name, members in groups.items()
        if members
    ]
    return [group | {"scale": layers[0].scale} if group["name"] == _FACTORS else group for group in found]


def build_optimizer(
    model: nn.Module,
    *,
    name: str = "adamw",
    learning_rate: float = 1e-3,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.95,
    adam_epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    factors: str | None = None,
    factors_learning_rate: float | None = None,
    muon_learning_rate: float = LEARNING_RATE,
) -> Optimizer:
    """An optimizer over the trainable parameters of `model`, the LoRA factors in a group of their own.

    Args:
        name: adamw (torch's, by its own choice of implementation), adamw_fused (torch's, one kernel for many tensors),
            adamw_8bit (bitsandbytes', with 8-bit moments), muon (torch's, for the hidden matrices that train in full,
            with adamw_fused for the rest), or `module:attribute`: an OptimizerKind of your own, or a function (groups,
            settings) -> Optimizer.
        factors: the optimizer of the factors, where it is another: one of the same names, or product (steps in B @ A,
            with `adam_beta1` as its momentum).
        factors_learning_rate: peak rate of the factors, as `peak_lr` of their group, where it is another; that of other
            groups is None.
        muon_learning_rate: peak rate of the hidden matrices under muon, as `peak_lr` of their group.

    Raises:
        ValueError: unknown name, a library is missing, nothing to train, or a parameter that is trained is not in the
            optimizer, or not in a group where its rate can be set.
    """
    problems = [
        *optimizer_problems(name),
        *optimizer_problems(factors, setting="factors", known=FACTOR_OPTIMIZERS),
    ]
    if problems:
        raise ValueError("\n".join(problems))
    splits = optimizer_kind(name).hidden_only
    groups = parameter_groups(model, weight_decay=weight_decay, split_hidden=splits)
    if not groups:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    settings: dict[str, Any] = {"lr": learning_rate, "betas": (adam_beta1, adam_beta2), "eps": adam_epsilon}
    members: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        kind = _REST if splits and group["name"] != _HIDDEN else name
        members.setdefault(factors if factors is not None and group["name"] == _FACTORS else kind, []).append(group)
    parts = [_build(kind, of_kind, settings) for kind, of_kind in members.items()]
    optimizer = parts[0] if len(parts) == 1 else CombinedOptimizer(parts)
    _set_peaks(optimizer, model, factors_learning_rate, muon_learning_rate)
    return optimizer


def _build(name: str, groups: list[dict[str, Any]], settings: dict[str, Any]) -> Optimizer:
    """The optimizer of a kind's name over `groups`; ValueError if it is none, or leaves some parameters out."""
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    optimizer = optimizer_kind(name, known=_ALL).build(groups, settings)
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer = {name}: must build a torch.optim.Optimizer, not {type(optimizer).__name__}")
    left_out = trained - {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if left_out:
        raise ValueError(f"optimizer = {name}: leaves out {len(left_out)} of the {len(trained)} trained parameters")
    for group in optimizer.param_groups:
        group[_KIND] = name
    return optimizer


def _set_peaks(optimizer: Optimizer, model: nn.Module, of_factors: float | None, of_hidden: float) -> None:
    """Write down each group's own peak learning rate; ValueError if factors share a group with other parameters."""
    factors = {id(p) for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)}
    for group in optimizer.param_groups:
        are_factors = {id(parameter) in factors for parameter in group["params"]}
        if len(are_factors) > 1 and of_factors is not None:
            raise ValueError(
                f"factors_learning_rate = {of_factors}: {type(optimizer).__name__} puts factors and other parameters "
                "into one group, which has one rate"
            )
        splits = optimizer_kind(group[_KIND], known=_ALL).hidden_only
        group[PEAK] = of_factors if are_factors == {True} else of_hidden if splits else None
        if group[PEAK] is not None:
            group["lr"] = group[PEAK]


def optimizer_problems(
    name: str | None, *, setting: str = "optimizer", known: Mapping[str, OptimizerKind] = OPTIMIZERS
) -> list[str]:
    """Why no optimizer of this name can be built here: unknown, or its library is not installed.

    Args:
        name: None for none.
        setting: the key of the configuration that holds the name, for the messages.
    """
    if name is None:
        return []
    try:
        kind = optimizer_kind(name, setting=setting, known=known)
    except ValueError as error:
        return [str(error)]
    if kind.library is None or importlib.util.find_spec(kind.library) is not None:
        return []
    return [f"{setting} = {name}: needs {kind.library}: {kind.install}"]


def optimizer_kind(
    name: str, *, setting: str = "optimizer", known: Mapping[str, OptimizerKind] = OPTIMIZERS
) -> OptimizerKind:
    """The kind of this name; ValueError if it is neither in `known` nor a callable or kind that can be imported."""
    kind = resolve(setting, name, known)
    if isinstance(kind, OptimizerKind):
        return kind
    if not callable(kind):
        raise ValueError(f"{setting} = {name}: must be an OptimizerKind or a function, not {type(kind).__name__}")
    return OptimizerKind(build=kind)


def steps_matrices(name: str) -> bool:
    """Whether an optimizer of this name steps whole hidden matrices; False if there is none."""
    try:
        return optimizer_kind(name).hidden_only
    except ValueError:
        return False


def declared_kind(optimizer: Optimizer) -> OptimizerKind | None:
    """The kind of which `build_optimizer` built it; None for an optimizer that was built elsewhere."""
    group = next(iter(optimizer.param_groups), {})
    return optimizer_kind(group[_KIND], known=_ALL) if _KIND in group else None
