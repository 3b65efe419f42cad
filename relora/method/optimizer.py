"""Parameter groups, the optimizer, and the reset of its state at a restart."""

import importlib
import math
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from relora.method.base_weights import quantization_problem
from relora.method.choices import OptimizerName, ResetName
from relora.method.lora import lora_layers
from relora.method.names import named_parameters
from relora.method.optimizer_state import BESIDE, OF_CODES, cleared, decoded
from relora.method.reinit import keyed_generator
from relora.method.store import Store


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in groups named lora, full and full_no_decay; empty groups are left out.

    The factors have a group of their own because some engines keep one step count a group. Vectors (biases,
    norms) are not decayed, as in transformers.
    """
    factors = {id(p) for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)}
    groups: dict[str, dict[str, nn.Parameter]] = {"lora": {}, "full": {}, "full_no_decay": {}}
    for name, parameter in named_parameters(model).items():
        if parameter.requires_grad:
            full = "full" if parameter.ndim > 1 else "full_no_decay"
            groups["lora" if id(parameter) in factors else full][name] = parameter
    decay = {"lora": weight_decay, "full": weight_decay, "full_no_decay": 0.0}
    return [
        {"name": name, "params": list(members.values()), "weight_decay": decay[name]}
        for name, members in groups.items()
        if members
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
    """AdamW over the trainable parameters of `model`, the LoRA factors in a group of their own.

    Args:
        name: adamw is torch's, by its own choice of implementation; adamw_fused torch's with one kernel for many
            tensors; adamw_8bit bitsandbytes', with moments in 8-bit codes.

    Raises:
        ValueError: unknown name, bitsandbytes is missing, or nothing to train.
    """
    if name not in get_args(OptimizerName):
        raise ValueError(f"optimizer must be one of {get_args(OptimizerName)}, not {name!r}")
    problem = quantization_problem(name)
    if problem is not None:
        raise ValueError(problem)
    groups = parameter_groups(model, weight_decay=weight_decay)
    if not groups:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    settings: dict[str, Any] = {"lr": learning_rate, "betas": (adam_beta1, adam_beta2), "eps": adam_epsilon}
    if name == "adamw_8bit":
        made: Optimizer = importlib.import_module("bitsandbytes.optim").AdamW8bit(groups, **settings)
        return made
    return AdamW(groups, **settings, fused=True if name == "adamw_fused" else None)


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def require_state(optimizer: Optimizer, parameters: dict[str, nn.Parameter], store: Store) -> None:
    """ValueError that names every parameter without optimizer state: a reset would silently do nothing to it."""
    missing = [name for name, parameter in parameters.items() if not store.has_state(optimizer, parameter)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(parameters)} LoRA factors have no moments and step count in the optimizer, so it "
            f"cannot be reset: {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}. Either the optimizer has "
            "not made an update yet, or it trains other parameters"
        )


def reset_state(
    optimizer: Optimizer,
    parameter: nn.Parameter,
    *,
    mode: ResetName,
    prune_ratio: float,
    generator: Callable[[], torch.Generator],
    store: Store,
) -> tuple[int, int]:
    """Reset the moments of one LoRA factor.

    `zero` sets moments and step count to zero. `magnitude` sets floor(prune_ratio * n) entries of each moment
    to zero, those where the first moment is smallest, `random` as many drawn ones; both keep the step count.
    `keep` does nothing. The entries are the same in all moments: a first moment that outlives its second would
    be divided by epsilon, since the gradient of A is zero in the first update after a restart.

    Returns:
        (entries that are zero afterwards, entries), read back and summed over the moments.

    Raises:
        RuntimeError: `zero` reads back moments or a step count that are not, or a pruned entry is still there.
    """
    pruned = {
        "zero": lambda values: torch.ones_like(values, dtype=torch.bool),
        "magnitude": lambda values: smallest(values, prune_ratio),
        "random": lambda values: drawn(values, prune_ratio, generator()),
    }
    slots = [slot for slot in store.slots(optimizer, parameter) if slot not in OF_CODES]
    if mode != "keep":
        # By the first moment, in whatever order a checkpoint brought them back.
        mask = pruned[mode](read_moment(store, optimizer, parameter, min(slots)))
        for slot in slots:
            _clear(store, optimizer, parameter, slot, mask)
    if mode == "zero":
        store.write_step(optimizer, parameter, 0)
    after = [read_moment(store, optimizer, parameter, slot) for slot in slots]
    num_zero, num_entries = sum(int((values == 0).sum()) for values in after), sum(values.numel() for values in after)
    if mode == "zero" and (num_zero < num_entries or store.step(optimizer, parameter) != 0):
        raise RuntimeError(f"a reset of {num_entries} moments reads back with {num_entries - num_zero} that are not 0")
    if mode != "keep" and any(values[mask].any() for values in after):
        raise RuntimeError(f"pruned entries of {num_entries} moments read back as what they were")
    return num_zero, num_entries


def read_moment(store: Store, optimizer: Optimizer, parameter: nn.Parameter, slot: str) -> Tensor:
    """One full moment as numbers. May alias the optimizer's state."""
    values = store.read_slot(optimizer, parameter, slot)
    if values.is_floating_point():
        return values
    return decoded(values, *(store.read_slot(optimizer, parameter, beside) for beside in BESIDE[slot]))


def _clear(store: Store, optimizer: Optimizer, parameter: nn.Parameter, slot: str, mask: Tensor) -> None:
    """Set entries of one full moment to zero; the others keep their values, and their codes."""
    values = store.read_slot(optimizer, parameter, slot)
    if values.is_floating_point():
        store.write_slot(optimizer, parameter, slot, values.masked_fill(mask, 0))
        return
    scales, table = (store.read_slot(optimizer, parameter, beside) for beside in BESIDE[slot])
    for name, cleared_values in zip((slot, BESIDE[slot][0]), cleared(values, scales, table, mask), strict=True):
        store.write_slot(optimizer, parameter, name, cleared_values)


def smallest(values: Tensor, ratio: float) -> Tensor:
    """Mask of exactly floor(ratio * n) entries, those of the smallest magnitude; of equal ones the first.

    By the k-th smallest value: torch.quantile refuses tensors of more than 16 M entries.
    """
    magnitudes = values.abs().flatten()
    count = math.floor(ratio * values.numel())
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    limit = magnitudes.kthvalue(count).values
    mask = magnitudes < limit
    equal = (magnitudes == limit).nonzero().flatten()
    mask[equal[: count - int(mask.sum())]] = True
    return mask.view(values.shape)


def drawn(values: Tensor, ratio: float, generator: torch.Generator) -> Tensor:
    """Mask of exactly floor(ratio * n) entries drawn without replacement."""
    order = torch.randperm(values.numel(), generator=generator)
    return _mask(values, order[: math.floor(ratio * values.numel())].to(values.device))


def prune_generator(seed: int, index: int, name: str) -> torch.Generator:
    return keyed_generator(seed, index, "prune", name)


def _mask(values: Tensor, chosen: Tensor) -> Tensor:
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    mask[chosen] = True
    return mask.view(values.shape)
