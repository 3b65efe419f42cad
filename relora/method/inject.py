"""Put the factors into a model, and take them out again."""

import re
from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from relora.method.choices import ReinitName
from relora.method.lora import LoRAConfig, LoRALinear, is_linear, lora_layers
from relora.method.merge import merge_layer
from relora.method.merged_cache import attach_caches
from relora.method.names import canonical, named_parameters, tied_names
from relora.method.parameter_report import ParameterReport, parameter_report
from relora.method.reinit import draw_lora_A, require_reinit
from relora.method.routes import merge_problem
from relora.method.siblings import group_siblings
from relora.method.store import TorchStore

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


def inject_lora(
    model: nn.Module, config: LoRAConfig, *, seed: int = 0, reinit: ReinitName = "kaiming", draw_index: int = 0
) -> ParameterReport:
    """Wrap the target layers of `model` in place, and freeze what `config` does not train.

    The function of the model does not change: B = 0. A is drawn from (seed, index 0, name, stream) and is not 0.

    Returns:
        What is now wrapped, trained in full and frozen.

    Raises:
        ValueError: the model has LoRA layers already, a target matches nothing, the rank exceeds a layer, or
            a target's weight is tied to another parameter. The model is then as it was.
    """
    if lora_layers(model):
        raise ValueError("the model has LoRA layers already; merge_lora(model) takes them out")
    require_reinit(reinit)
    targets = find_targets(model, config)
    saved = _saved_parameters(model, config, targets)
    for name, parameter in named_parameters(model).items():
        parameter.requires_grad_(name in saved)
    for name in targets:
        model.set_submodule(name, LoRALinear.from_linear(model.get_submodule(name), config))
    group_siblings(model)
    if config.keep_merged:
        attach_caches(lora_layers(model).values())
    for name, layer in lora_layers(model).items():
        draw_into(layer, reinit=reinit, seed=seed, index=0, name=name, draw_index=draw_index)
    return parameter_report(model)


@torch.no_grad()
def draw_into(layer: LoRALinear, *, reinit: ReinitName, seed: int, index: int, name: str, draw_index: int) -> None:
    """Draw the layer's A for the given key; nothing to do on the meta device, where there are no values."""
    if not layer.lora_A.is_meta:
        r, d_in = layer.lora_A.shape
        layer.lora_A.copy_(
            draw_lora_A(r, d_in, reinit=reinit, seed=seed, index=index, name=name, draw_index=draw_index)
        )


def merge_lora(model: nn.Module) -> nn.Module:
    """W += delta() in every wrapped layer, and put the plain layers back, all in place.

    Returns:
        `model`, as it was before `inject_lora`, trained. Which parameters require gradients is left as it is.

    Raises:
        ValueError: the model has no LoRA layers, or its parameters are sharded. It is then as it was.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    if not layers:
        raise ValueError("the model has no LoRA layers to merge")
    store = TorchStore()
    store.register(layers.values())
    for parameter in model.parameters():
        store.check(parameter)
    for name, layer in layers.items():
        merge_layer(layer, store)
        model.set_submodule(name, layer.to_linear())
    return model


def _saved_parameters(model: nn.Module, config: LoRAConfig, targets: list[str]) -> set[str]:
    """Canonical names of the parameters that train in full beside the factors."""
    names = named_parameters(model)
    wrapped = {f"{canonical(target)}.weight" for target in targets}
    if config.modules_to_save == "rest":
        return names.keys() - wrapped
    saved: set[str] = set()
    for module in find_modules(model, config.modules_to_save or ()):
        owned = model.get_submodule(module).parameters()
        saved |= {name for parameter in owned for name, known in names.items() if known is parameter}
    biases = {name for name in names if name.rsplit(".", 1)[-1] == "bias"}
    if config.bias == "all":
        saved |= biases
    elif config.bias == "lora_only":
        saved |= biases & {f"{canonical(target)}.bias" for target in targets}
    return saved
