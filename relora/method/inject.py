"""Put the factors into a model, and take them out again."""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from relora.method.lora import LoRAConfig, LoRALinear, lora_layers
from relora.method.merge import merge_layer
from relora.method.merged_cache import attach_caches
from relora.method.names import canonical, colliding_names, named_parameters
from relora.method.new_factors import start_layer
from relora.method.parameter_report import LEFT_OUT, ParameterReport, parameter_report
from relora.method.plain_layers import linear_layers
from relora.method.registry import resolve_object
from relora.method.reinit import REINITS, DrawKey, Reinit
from relora.method.restart import check_finite, check_layers
from relora.method.routes import merge_problem
from relora.method.siblings import group_siblings
from relora.method.store import TorchStore
from relora.method.targets import (
    Targets,
    ends_in,
    find_targets,
    last_parts,
    modules_in_full,
    modules_to_save,
    target_problems,
)
from relora.method.triton_extra import kernels_problem
from relora.method.usage import ModelUsage, usage_in_source, watch_usage
from relora.method.usage_watch import Pass


def inject_lora(
    model: nn.Module,
    config: LoRAConfig,
    *,
    seed: int = 0,
    reinit: str | Reinit | None = "kaiming",
    draw_index: int = 0,
    example_loss: Pass | None = None,
    usage: ModelUsage | None = None,
) -> ParameterReport:
    """Wrap the target layers of `model` in place, and freeze what `config` does not train.

    The function of the model does not change: B = 0, or scale * B @ A is taken out of W. A wrapped layer keeps its
    hooks, its mode and whatever was set on it.

    Args:
        seed: of the draws, which are those of index 0.
        reinit: how the factors begin (`restart`). None: A as torch draws it and B = 0, for weights that have no values
            yet; `start_factors` writes them later. Nothing is written on the meta device.
        draw_index: which of several independent draws.
        example_loss: computes the loss of an example batch: `lambda model: model(**batch).loss`. The model is run once,
            and is then as before. Layers that it bypasses, never calls or writes to are left out by "all-linear", and
            refused if asked for; parameters without a gradient do not train. Without it only the source of the model's
            classes is looked at.
        usage: what is known of the model instead (`watch_usage`).

    Returns:
        A report of what is now wrapped, trained in full, frozen, and left out.

    Raises:
        TypeError: `config` is no LoRAConfig.
        ValueError: all `problems` of the model, a line each, or an unknown policy. The model is then as it was, as it
            is after any other error.
    """
    if example_loss is not None and not problems(model, config, ModelUsage()):
        usage = watch_usage(model, example_loss)
    usage = usage_in_source(model) if usage is None else usage
    found = problems(model, config, usage)
    policy = None if reinit is None else resolve_object("reinit", reinit, REINITS, Reinit)  # type: ignore[type-abstract]
    if found:
        raise ValueError("\n".join(found))
    targets = find_targets(model, config, unfit=usage.unfit)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    store, started = TorchStore(), list[LoRALinear]()
    try:
        _wrap(model, config, targets, usage)
        layers = lora_layers(model)
        store.register(layers.values())
        for name, layer in layers.items():
            # Tensors without values are on the meta device, or fake (a subclass).
            if policy is not None and type(layer.lora_A.data) is Tensor and not layer.lora_A.is_meta:
                start_layer(layer, store, policy, DrawKey(seed, 0, name, draw_index))
                started.append(layer)
    except BaseException:
        _unwrap(model, [layer for layer in started if layer.lora_B.any()])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        raise
    vars(model)[LEFT_OUT] = targets.left_out
    return parameter_report(model)


def _wrap(model: nn.Module, config: LoRAConfig, targets: Targets, usage: ModelUsage) -> None:
    """Put wrapped layers in the place of the plain ones, and freeze what does not train."""
    saved = _saved_parameters(model, config, targets.names) - usage.idle
    if config.modules_to_save == "rest":
        saved -= usage.frozen
    for name, parameter in named_parameters(model).items():
        parameter.requires_grad_(name in saved)
    for name in targets.names:
        # Code that asks for the dtype of a weight, to cast activations to it, must see that of the plain layer.
        settings = replace(config, base_dtype=None) if name in usage.examined else config
        model.set_submodule(name, LoRALinear.from_linear(model.get_submodule(name), settings))
    group_siblings(model)
    if config.keep_merged:
        attach_caches(lora_layers(model).values())


def merge_lora(model: nn.Module) -> nn.Module:
    """W += delta() in every wrapped layer, and put the plain layers back, all in place.

    Returns:
        `model`, as it was before `inject_lora`, trained. Which parameters require gradients is left as it is.

    Raises:
        ValueError: the model has no LoRA layers, its parameters are sharded, or its factors are not finite. It is then
            as it was.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA layers to merge")
    store = TorchStore()
    store.register(layers.values())
    check_layers(layers, store)
    for parameter in model.parameters():
        store.check(parameter)
    check_finite(layers, store)
    _unwrap(model, list(layers.values()))
    return model


def _unwrap(model: nn.Module, merged: list[LoRALinear]) -> None:
    """Put the plain layers back, those of `merged` with their update."""
    store = TorchStore()
    store.register(merged)
    for layer in merged:
        merge_layer(layer, store)
    for name, layer in [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear)]:
        model.set_submodule(name, layer.to_linear())
    vars(model).pop(LEFT_OUT, None)


def problems(model: nn.Module, config: LoRAConfig, usage: ModelUsage | None = None) -> list[str]:
    """All reasons why `model` cannot be wrapped as `config` asks, a line each, with candidates for a wrong name.

    Raises:
        TypeError: `config` is no LoRAConfig.
    """
    if not isinstance(config, LoRAConfig):
        given = f"{type(config).__module__}.{type(config).__qualname__}"
        raise TypeError(f"config must be a relora.LoRAConfig, which has PEFT's names, not a {given}")
    if lora_layers(model):
        return ["the model has LoRA layers already; merge_lora(model) takes them out"]
    of_peft = [name for name, module in model.named_modules() if type(module).__module__.split(".")[0] == "peft"]
    if of_peft:
        where = of_peft[0] or type(model).__name__
        return [f"the model has adapters of PEFT ({where}): its merge_and_unload() gives the plain model to wrap"]
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        return ["the model is wrapped, or was made, under torch.inference_mode: such tensors can never train"]
    colliding = colliding_names(model)
    found = [f"two tensors have one name, {name}: {', '.join(both)}" for name, both in colliding.items()]
    names = [name for name, _ in model.named_modules() if name]
    unknown = [suffix for suffix in modules_to_save(config) if not any(ends_in(suffix, name) for name in names)]
    if unknown:
        candidates = last_parts(name for name in names if not name.rpartition(".")[2].isdigit())
        found.append(f"modules_to_save = {unknown} matches no module; candidates: {', '.join(candidates)}")
    usage = usage or usage_in_source(model)
    found += usage.problems()
    targets = find_targets(model, config, unfit=usage.unfit)
    found += target_problems(config, linear_layers(model), targets)
    weights = {name: cast(nn.Parameter, model.get_submodule(name).weight) for name in targets.names}
    doubles = [name for name, weight in weights.items() if weight.dtype == torch.float64]
    if doubles and config.base_dtype is not None:
        found.append(f"base_dtype = {config.base_dtype} would round {doubles[0]}, which is float64, for good")
    if doubles and config.kernels != "torch":
        found.append(f"kernels = {config.kernels} would compute {doubles[0]}, which is float64, in float32")
    # Weights on the meta device compute nothing here; they may be those of a run elsewhere.
    missing = None if any(weight.is_meta for weight in weights.values()) else kernels_problem(config.kernels)
    found += [] if missing is None else [missing]
    if config.forward == "merged" and config.base_dtype is None:
        # Weights that come in a dtype in which the merged route would round updates away.
        reasons = {name: merge_problem(None, weight.dtype, dropout=0) for name, weight in weights.items()}
        found += [f"forward = merged: {name}: {reason}" for name, reason in reasons.items() if reason is not None][:1]
    return found


def _saved_parameters(model: nn.Module, config: LoRAConfig, targets: list[str]) -> set[str]:
    """Canonical names of the parameters that train in full beside the factors."""
    names = named_parameters(model)
    wrapped = {f"{canonical(target)}.weight" for target in targets}
    if config.modules_to_save == "rest":
        return names.keys() - wrapped
    saved: set[str] = set()
    for module in modules_in_full(model, config):
        owned = {id(parameter) for parameter in model.get_submodule(module).parameters()}
        saved |= {name for name, known in names.items() if id(known) in owned} - wrapped
    biases = {name for name in names if name.rsplit(".", 1)[-1] == "bias"}
    if config.bias == "all":
        saved |= biases
    elif config.bias == "lora_only":
        saved |= biases & {f"{canonical(target)}.bias" for target in targets}
    return saved
