"""Five ways to train the same model, as their users would set them up."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks import llama
from relora import inject_lora
from relora.method.lora import LoRAConfig, lora_layers
from relora.method.targets import find_targets

LEARNING_RATE = 1e-3
# GaLore and APOLLO choose a new subspace every so many updates, as their papers do.
PROJECTION_GAP = 200


@dataclass(frozen=True)
class Contender:
    """A model and what trains it. `wrapped` are the trained parameters that stand for the wrapped weights."""

    model: nn.Module
    optimizer: Optimizer
    wrapped: list[nn.Parameter]
    trains_factors: bool = False

    @property
    def others(self) -> list[nn.Parameter]:
        held = {id(parameter) for parameter in self.wrapped}
        return [parameter for parameter in llama.trained(self.optimizer) if id(parameter) not in held]


def full(options: argparse.Namespace) -> Contender:
    """Every weight, by AdamW."""
    model = llama.build(options)
    return Contender(model, llama.optimizer_for(model, options), _weights(model))


def peft(options: argparse.Namespace) -> Contender:
    """PEFT's LoRA on the layers that we wrap, the same weights in full as with us; our AdamW.

    Coarse weights are what PEFT's users have: cast to bf16, or bitsandbytes' own layers, as in QLoRA.
    """
    from peft import LoraConfig, get_peft_model

    rest = ["embed_tokens", "norm", "lm_head"] if options.train_rest else None
    config = LoraConfig(r=options.rank, lora_alpha=32, target_modules="all-linear", modules_to_save=rest)
    base = llama.build(options)
    store_coarsely(base, options.base_dtype)
    model = get_peft_model(base, config).get_base_model()
    factors = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    return Contender(model, llama.optimizer_for(model, options), factors, trains_factors=True)


def store_coarsely(model: nn.Module, base_dtype: str | None) -> None:
    """Store the weights that we wrap in `base_dtype`, one after the other, without an exact copy of them."""
    if base_dtype in (None, "float32"):
        return
    if base_dtype == "int8":
        raise ValueError("--base-dtype int8: PEFT's int8 layers compute otherwise (LLM.int8), and are not compared")
    for name in find_targets(model, LoRAConfig(r=1)).names:
        parent, _, last = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(parent), last, _in_nf4(linear) if base_dtype == "nf4" else linear.bfloat16())


def _in_nf4(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        layer = Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
    weight = linear.weight.detach()
    layer.weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", module=layer).to(weight.device)
    return layer


def ours(options: argparse.Namespace) -> Contender:
    model = llama.build(options)
    inject_lora(model, llama.lora_config(options))
    factors = [factor for layer in lora_layers(model).values() for factor in (layer.lora_A, layer.lora_B)]
    return Contender(model, llama.optimizer_for(model, options), factors, trains_factors=True)


def galore(options: argparse.Namespace) -> Contender:
    """galore-torch (arXiv 2403.03507), with the scale of its README."""
    from galore_torch import GaLoreAdamW

    model = llama.build(options)
    projection = {"rank": options.rank, "update_proj_gap": PROJECTION_GAP, "scale": 0.25, "proj_type": "std"}
    optimizer = GaLoreAdamW(_groups(model, projection), lr=LEARNING_RATE, no_deprecation_warning=True)
    return Contender(model, optimizer, _weights(model))


def apollo(options: argparse.Namespace) -> Contender:
    """apollo-torch (arXiv 2412.05270): random projection, scales of channels."""
    from apollo_torch import APOLLOAdamW

    model = llama.build(options)
    how = {"update_proj_gap": PROJECTION_GAP, "scale": 1, "scale_type": "channel", "proj": "random", "proj_type": "std"}
    optimizer = APOLLOAdamW(_groups(model, {"rank": options.rank} | how), lr=LEARNING_RATE)
    return Contender(model, optimizer, _weights(model))


CONTENDERS: dict[str, Callable[[argparse.Namespace], Contender]] = {
    "full": full,
    "peft": peft,
    "ours": ours,
    "galore": galore,
    "apollo": apollo,
}


def gradient_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)


def optimizer_bytes(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> int:
    """Memory behind the state of `parameters`, step counts left out; a view holds all of its storage."""
    storages = [
        tensor.untyped_storage()
        for parameter in parameters
        for value in optimizer.state[parameter].values()
        for tensor in _tensors(value)
        if tensor.ndim
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(value: Any) -> list[Tensor]:
    """A moment, or the matrices of a projector."""
    if isinstance(value, Tensor):
        return [value]
    return [held for held in getattr(value, "__dict__", {}).values() if isinstance(held, Tensor)]


def _groups(model: nn.Module, projection: dict[str, Any]) -> list[dict[str, Any]]:
    projected = _weights(model)
    held = {id(parameter) for parameter in projected}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in held]
    return [{"params": rest}, {"params": projected} | projection]


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights that we wrap."""
    targets = find_targets(model, LoRAConfig(r=1)).names
    return [module.weight for module in map(model.get_submodule, targets) if isinstance(module.weight, nn.Parameter)]


def require_gradients(contender: Contender) -> None:
    """A parameter that no gradient reaches would make an update look cheap."""
    without = [
        p.shape for p in llama.trained(contender.optimizer) if p.grad is None or not torch.isfinite(p.grad).all()
    ]
    assert not without, f"{len(without)} trained parameters have no finite gradient"
