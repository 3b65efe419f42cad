"""A small network with an nn.Linear, a Conv1D and a layer wider than it is long, and a task it can learn."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from relora import LoRAConfig, inject_lora
from relora.method.lora import lora_layers
from relora.method.optimizer import parameter_groups

R = 3
LEARNING_RATE = 1e-2
CONFIG = LoRAConfig(r=R, lora_alpha=3.7, target_modules=("inner", "conv", "outer"), modules_to_save="rest")


class Toy(nn.Module):
    """12 -> 20 (Linear) -> 16 (Conv1D) -> 10 (Linear), and a norm that trains in full."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 20)
        self.norm = nn.LayerNorm(20)
        self.conv = Conv1D(16, 20)
        self.outer = nn.Linear(16, 10, bias=False)
        nn.init.normal_(self.conv.weight, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.outer(torch.tanh(self.conv(self.norm(self.inner(x)))))
        return y


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def update(model: nn.Module, optimizer: Optimizer, num_updates: int = 1) -> None:
    """Updates towards a fixed non-linear map, each on rows of its own."""
    target = torch.randn(12, 10, generator=torch.Generator().manual_seed(9))
    for number in range(num_updates):
        x = torch.randn(64, 12, generator=torch.Generator().manual_seed(100 + number))
        optimizer.zero_grad()
        (model(x) - torch.sin(x @ target)).square().mean().backward()
        optimizer.step()


def trained(num_updates: int = 3, config: LoRAConfig = CONFIG, **options: Any) -> tuple[Toy, Optimizer]:
    """A wrapped network after a few updates, and its AdamW; `options` go to torch's AdamW."""
    model = toy()
    inject_lora(model, config, seed=0)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, weight_decay=0.0), lr=LEARNING_RATE, betas=(0.9, 0.95), **options
    )
    update(model, optimizer, num_updates)
    return model, optimizer


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    layers = lora_layers(model).items()
    return {f"{name}.{key}": getattr(layer, key) for name, layer in layers for key in ("lora_A", "lora_B")}


def full_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    of_factors = {id(p) for p in factors(model).values()}
    return {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in of_factors}


def moments(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's own tensors of the parameter's shape."""
    return {key: value for key, value in optimizer.state[parameter].items() if value.shape == parameter.shape}


def fill_moments(optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> None:
    """Moments without a zero and without two equal magnitudes, so that what is pruned can be counted."""
    for number, parameter in enumerate(parameters.values()):
        for slot, value in enumerate(moments(optimizer, parameter).values()):
            generator = torch.Generator().manual_seed(10 * number + slot)
            ranks = 1 + torch.randperm(value.numel(), generator=generator).view(value.shape)
            value.copy_(ranks / value.numel() * (-1) ** ranks if slot == 0 else ranks / value.numel())


def copies(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}
