"""Canonical names: the same parameter has the same name whatever the model is wrapped in."""

from torch import nn

# DistributedDataParallel and DeepSpeed put "module." in front; the others may stand anywhere.
_LEADING = "module."
_ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def canonical(name: str) -> str:
    """`name` without the prefixes of torch.compile, DDP, FSDP, activation checkpointing and DeepSpeed.

    `module._orig_mod.layers.0._checkpoint_wrapped_module.q_proj.weight` becomes `layers.0.q_proj.weight`.
    """
    return ".".join(part for part in name.split(".") if part not in _ANYWHERE).removeprefix(_LEADING)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, by canonical name, in the model's order.

    A tied parameter stands under the first of its names.
    """
    return {canonical(name): parameter for name, parameter in model.named_parameters()}


def tied_names(model: nn.Module) -> dict[int, list[str]]:
    """For each parameter (by id) all the canonical names under which the model holds it."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(canonical(name))
    return names
