"""Put the factors into a model, and take them out again."""

import re
from collections.abc import Iterable, Mapping
from typing import cast

from torch import Tensor, nn

from relora.method.lora import LoRAConfig, LoRALinear, is_linear, lora_layers
from relora.method.merge import merge_layer
from relora.method.merged_cache import attach_caches
from relora.method.names import canonical, named_parameters, tied_names
from relora.method.new_factors import start_layer
from relora.method.parameter_report import ParameterReport, parameter_report
from relora.method.registry import resolve_object
from relora.method.reinit import REINITS, DrawKey, Reinit
from relora.method.restart import check_finite, check_layers
from relora.method.routes import merge_problem
from relora.method.siblings import group_siblings
from relora.method.store import TorchStore

ALL_LINEAR = "all-linear"


def inject_lora(
    model: nn.Module,
    config: LoRAConfig,
    *,
    seed: int = 0,
    reinit: str | Reinit | None = "kaiming",
    draw_index: int = 0,
) -> ParameterReport:
    """Wrap the target layers of `model` in place, and freeze what `config` does not train.

    The function of the model does not change: B = 0, or scale * B @ A is taken out of W.

    Args:
        seed: of the draws, which are those of index 0.
        reinit: how the factors begin (`restart`). None: A as torch draws it and B = 0, for weights that have no values
            yet; `start_factors` writes them later. Nothing is written on the meta device.
        draw_index: which of several independent draws.

    Returns:
        A report of what is now wrapped, trained in full and frozen.

    Raises:
        ValueError: all `problems` of the model, a line each, or an unknown policy. The model is then as it was.
    """
    policy = None if reinit is None else resolve_object("reinit", reinit, REINITS, Reinit)  # type: ignore[type-abstract]
    found = problems(model, config)
    if found:
        raise ValueError("\n".join(found))
    targets = find_targets(model, config)
    saved = _saved_parameters(model, config, targets)
    for name, parameter in named_parameters(model).items():
        parameter.requires_grad_(name in saved)
    for name in targets:
        model.set_submodule(name, LoRALinear.from_linear(model.get_submodule(name), config))
    group_siblings(model)
    layers, store = lora_layers(model), TorchStore()
    if config.keep_merged:
        attach_caches(layers.values())
    store.register(layers.values())
    for name, layer in layers.items():
        # Tensors without values are on the meta device, or fake (a subclass).
        if policy is not None and type(layer.lora_A.data) is Tensor and not layer.lora_A.is_meta:
            start_layer(layer, store, policy, DrawKey(seed, 0, name, draw_index))
    return parameter_report(model)


def merge_lora(model: nn.Module) -> nn.Module:
    """W += delta() in every wrapped layer, and put the plain layers back, all in place.

    Returns:
        `model`, as it was before `inject_lora`, trained. Which parameters require gradients is left as it is.

    Raises:
        ValueError: the model has no LoRA layers, its parameters are sharded, or its factors are not finite. It is then
            as it was.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    if not layers:
        raise ValueError("the model has no LoRA layers to merge")
    store = TorchStore()
    store.register(layers.values())
    check_layers(layers, store)
    for parameter in model.parameters():
        store.check(parameter)
    check_finite(layers, store)
    for name, layer in layers.items():
        merge_layer(layer, store)
        model.set_submodule(name, layer.to_linear())
    return model


def problems(model: nn.Module, config: LoRAConfig) -> list[str]:
    """All reasons why `model` cannot be wrapped as `config` asks, a line each, with candidates for a wrong name."""
    if lora_layers(model):
        return ["the model has LoRA layers already; merge_lora(model) takes them out"]
    linear = _linear_layers(model)
    names = [name for name, _ in model.named_modules() if name]
    saved = _modules_to_save(config)
    unknown = [suffix for suffix in saved if not any(_ends_in(suffix, name) for name in names)]
    found = []
    if unknown:
        found.append(f"modules_to_save = {unknown} matches no module; candidates: {', '.join(last_parts(names))}")
    targets = find_targets(model, config)
    if not targets:
        where = " outside of modules_to_save" if len(saved) > len(unknown) else ""
        candidates = ", ".join(last_parts(linear)) or "none, the model has no nn.Linear or Conv1D"
        found.append(
            f"target_modules = {config.target_modules!r} matches no linear layer{where}; candidates: {candidates}"
        )
        return found
    return [*found, *_target_problems(model, config, targets)]


def _target_problems(model: nn.Module, config: LoRAConfig, targets: list[str]) -> list[str]:
    """Target names that stand for nothing, and targets that cannot be wrapped."""
    found, linear = [], _linear_layers(model)
    weights = {name: cast(nn.Parameter, linear[name].weight) for name in targets}
    wanted = () if isinstance(config.target_modules, str) else config.target_modules
    unused = [suffix for suffix in wanted if not any(_ends_in(suffix, name) for name in linear)]
    if unused:  # a typing error, or an architecture that has another name for it
        found.append(f"target_modules = {unused} matches no linear layer; candidates: {', '.join(last_parts(linear))}")
    small = [f"{name} {tuple(weight.shape)}" for name, weight in weights.items() if config.r > min(weight.shape)]
    if small:
        found.append(f"r = {config.r} exceeds the smaller side of {len(small)} layers, such as {small[0]}")
    tied = tied_names(model)
    for name, weight in weights.items():
        if len(tied[id(weight)]) > 1:
            found.append(
                f"target_modules: {name} is tied ({', '.join(tied[id(weight)])}), and wrapping it would break the tie"
            )
    if config.forward == "merged" and config.base_dtype is None:
        # Weights that come in a dtype in which the merged route would round updates away.
        reasons = {name: merge_problem(None, weight.dtype, dropout=0) for name, weight in weights.items()}
        found += [f"forward = merged: {name}: {reason}" for name, reason in reasons.items() if reason is not None][:1]
    return found


def find_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Names of the linear layers to wrap, in the model's order; those within modules_to_save are left out."""
    saved = find_modules(model, _modules_to_save(config))
    return [
        name
        for name in _linear_layers(model)
        if _matches(name, config.target_modules, model)
        and not any(name == parent or name.startswith(f"{parent}.") for parent in saved)
    ]


def _modules_to_save(config: LoRAConfig) -> tuple[str, ...]:
    """The names and suffixes in modules_to_save; none for "rest", which is no list of modules."""
    saved = config.modules_to_save
    return () if saved is None or isinstance(saved, str) else tuple(saved)


def find_modules(model: nn.Module, suffixes: Iterable[str]) -> list[str]:
    """Names of all modules that end in one of `suffixes`."""
    names = [name for name, _ in model.named_modules() if name]
    return [name for suffix in suffixes for name in names if _ends_in(suffix, name)]


def last_parts(names: Iterable[str]) -> list[str]:
    """The different last parts of `names`, sorted; the numbers of list entries are left out."""
    return sorted(last for last in {name.rsplit(".", 1)[-1] for name in names} if not last.isdigit())


def _linear_layers(model: nn.Module) -> Mapping[str, nn.Module]:
    """The layers that could be wrapped, by name."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def _matches(name: str, target_modules: str | Iterable[str], model: nn.Module) -> bool:
    """Whether `target_modules` stands for the linear layer `name`."""
    if target_modules == ALL_LINEAR:
        get_head = getattr(model, "get_output_embeddings", None)
        return get_head is None or model.get_submodule(name) is not get_head()
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(_ends_in(target, name) for target in target_modules)


def _ends_in(suffix: str, name: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _saved_parameters(model: nn.Module, config: LoRAConfig, targets: list[str]) -> set[str]:
    """Canonical names of the parameters that train in full beside the factors."""
    names = named_parameters(model)
    wrapped = {f"{canonical(target)}.weight" for target in targets}
    if config.modules_to_save == "rest":
        return names.keys() - wrapped
    saved: set[str] = set()
    for module in find_modules(model, _modules_to_save(config)):
        owned = {id(parameter) for parameter in model.get_submodule(module).parameters()}
        saved |= {name for name, known in names.items() if id(known) in owned}
    biases = {name for name in names if name.rsplit(".", 1)[-1] == "bias"}
    if config.bias == "all":
        saved |= biases
    elif config.bias == "lora_only":
        saved |= biases & {f"{canonical(target)}.bias" for target in targets}
    return saved
