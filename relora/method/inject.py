"""Put the factors into a model, and take them out again."""

import torch
from torch import nn

from relora.method.census import Census, census
from relora.method.groups import group_siblings
from relora.method.lora import LoRAConfig, LoRALinear, lora_layers
from relora.method.merge import merge_layer
from relora.method.names import canonical, named_parameters
from relora.method.reinit import Reinit, draw_lora_A, require_reinit
from relora.method.store import TorchStore
from relora.method.targets import find_modules, find_targets


def inject_lora(
    model: nn.Module, config: LoRAConfig, *, seed: int = 0, reinit: Reinit = "kaiming", stream: int = 0
) -> Census:
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
    for name, layer in lora_layers(model).items():
        draw_into(layer, reinit=reinit, seed=seed, index=0, name=name, stream=stream)
    return census(model)


@torch.no_grad()
def draw_into(layer: LoRALinear, *, reinit: Reinit, seed: int, index: int, name: str, stream: int) -> None:
    """Draw the layer's A for the given key; nothing to do on the meta device, where there are no values."""
    if not layer.lora_A.is_meta:
        r, d_in = layer.lora_A.shape
        layer.lora_A.copy_(draw_lora_A(r, d_in, reinit=reinit, seed=seed, index=index, name=name, stream=stream))


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
    store.adopt(layers.values())
    for parameter in model.parameters():
        store.check(parameter)
    for name, layer in layers.items():
        merge_layer(layer, store)
        if layer.siblings is not None:
            layer.siblings.leave()
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
