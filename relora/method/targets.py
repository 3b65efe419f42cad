"""Which modules a name stands for: PEFT's rules for `target_modules` and `modules_to_save`."""

import re
from collections.abc import Iterable
from typing import cast

from torch import nn

from relora.method.lora import LoRAConfig, is_linear
from relora.method.names import tied_names
from relora.method.routes import merge_problem

ALL_LINEAR = "all-linear"


def find_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Names of the linear layers to wrap, in the model's order.

    Raises:
        ValueError: nothing matches (the candidates are listed), the rank exceeds a layer, a weight is tied
            to another parameter. All that is wrong is told at once, a line each.
    """
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    saved = config.modules_to_save
    kept = [] if saved is None or saved == "rest" else find_modules(model, saved)
    wanted = [
        name
        for name in linear
        if matches(name, config.target_modules, model) and not any(_inside(name, parent) for parent in kept)
    ]
    if not wanted:
        raise ValueError(
            f"target_modules = {config.target_modules!r} matches no linear layer"
            f"{' outside of modules_to_save' if kept else ''}; candidates: "
            f"{', '.join(last_parts(linear)) or 'none, the model has no nn.Linear or Conv1D'}"
        )
    problems = _idle(linear, config.target_modules) + _too_small(linear, wanted, config.r) + _tied(model, wanted)
    problems += _unmergeable(linear, wanted, config)
    if problems:
        raise ValueError("\n".join(problems))
    return wanted


def matches(name: str, target_modules: str | Iterable[str], model: nn.Module) -> bool:
    """Whether `target_modules` stands for the linear layer `name`."""
    if target_modules == ALL_LINEAR:
        return model.get_submodule(name) is not _output_head(model)
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(_is_suffix(target, name) for target in target_modules)


def find_modules(model: nn.Module, suffixes: Iterable[str]) -> list[str]:
    """Names of all modules that end in one of `suffixes`; ValueError names a suffix that stands for none."""
    names = [name for name, _ in model.named_modules() if name]
    found = {suffix: [name for name in names if _is_suffix(suffix, name)] for suffix in suffixes}
    missing = [suffix for suffix, hits in found.items() if not hits]
    if missing:
        raise ValueError(f"modules_to_save = {missing} matches no module; candidates: {', '.join(last_parts(names))}")
    return [name for hits in found.values() for name in hits]


def last_parts(names: Iterable[str]) -> list[str]:
    """The different last parts of `names`, sorted; the numbers of list entries are left out."""
    return sorted(last for last in {name.rsplit(".", 1)[-1] for name in names} if not last.isdigit())


def _is_suffix(suffix: str, name: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _inside(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def _output_head(model: nn.Module) -> object:
    get_head = getattr(model, "get_output_embeddings", None)
    return get_head() if get_head is not None else None


def _idle(linear: dict[str, nn.Module], target_modules: str | Iterable[str]) -> list[str]:
    """A list entry that stands for no linear layer: a typing error, or an architecture that names it otherwise."""
    targets = [] if isinstance(target_modules, str) else target_modules
    idle = [target for target in targets if not any(_is_suffix(target, name) for name in linear)]
    if not idle:
        return []
    return [f"target_modules = {idle} matches no linear layer; candidates: {', '.join(last_parts(linear))}"]


def _too_small(linear: dict[str, nn.Module], wanted: list[str], r: int) -> list[str]:
    shapes = {name: tuple(cast(nn.Parameter, linear[name].weight).shape) for name in wanted}
    small = [f"{name} {shape}" for name, shape in shapes.items() if r > min(shape)]
    return [f"r = {r} exceeds the smaller side of {len(small)} layers, such as {small[0]}"] if small else []


def _unmergeable(linear: dict[str, nn.Module], wanted: list[str], config: LoRAConfig) -> list[str]:
    """Weights that come in a dtype in which the route that is asked for would round updates away."""
    if config.forward != "merged" or config.base_dtype is not None:
        return []
    dtypes = {name: cast(nn.Parameter, linear[name].weight).dtype for name in wanted}
    problems = {name: merge_problem(None, dtype, dropout=0) for name, dtype in dtypes.items()}
    return [f"forward = merged: {name}: {problem}" for name, problem in problems.items() if problem][:1]


def _tied(model: nn.Module, wanted: list[str]) -> list[str]:
    names = tied_names(model)
    shared = {name: names[id(model.get_submodule(name).weight)] for name in wanted}
    return [
        f"target_modules: {name} is tied ({', '.join(ties)}), and wrapping it would break the tie"
        for name, ties in shared.items()
        if len(ties) > 1
    ]
