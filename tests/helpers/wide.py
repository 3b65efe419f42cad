"""A network of two wrapped layers, wide enough for 8-bit moments, and a task it can learn."""

import torch
from torch import nn
from torch.optim import Optimizer

from relora import LoRAConfig, inject_lora

# A of the first layer and B of the second have 4400 entries, 17 blocks and a part of bitsandbytes, which quantizes
# them; the other two have 120, which it does not.
WIDE, NARROW, R = 1100, 30, 4


def wrapped(middle: nn.Module, *, modules_to_save: str | None = None) -> nn.Sequential:
    """1100 -> 30 -> `middle` -> 1100, the two linear layers wrapped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDE, NARROW, bias=False), middle, nn.Linear(NARROW, WIDE, bias=False))
    inject_lora(model, LoRAConfig(r=R, lora_alpha=8, modules_to_save=modules_to_save), seed=0)
    return model


def update(model: nn.Module, optimizer: Optimizer, num_updates: int = 1) -> None:
    """Updates towards the input turned by one place, the first of them always on the same rows."""
    for number in range(num_updates):
        x = torch.randn(16, WIDE, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
