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

    Raises:
        ValueError: two parameters have one canonical name: one of them would neither be trained nor saved.
    """
    found = [(canonical(name), parameter) for name, parameter in model.named_parameters()]
    parameters = dict(found)
    if len(parameters) < len(found):
        [name, both], *_ = colliding_names(model).items()
        raise ValueError(f"two tensors have one name, {name}: {', '.join(both)}")
    return parameters


def colliding_names(model: nn.Module) -> dict[str, list[str]]:
    """Each canonical name that stands for more than one parameter or buffer, with their own names."""
    names: dict[str, list[str]] = {}
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        names.setdefault(canonical(name), []).append(name)
    return {name: several for name, several in names.items() if len(several) > 1}


def tied_names(model: nn.Module) -> dict[int, list[str]]:
    """For each parameter (by id) all the canonical names under which the model holds it."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(canonical(name))
    return names
