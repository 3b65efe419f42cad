"""Pretrain, and continue to train, transformer language models with ReLoRA (arXiv 2307.05695)."""

from relora.method.inject import inject_lora, merge_lora
from relora.method.lora import LoRAConfig
from relora.method.optimizer import build_optimizer
from relora.method.restart import RestartReport, restart
from relora.method.schedule import lr_multiplier

__all__ = [
    "LoRAConfig",
    "RestartReport",
    "build_optimizer",
    "inject_lora",
    "lr_multiplier",
    "merge_lora",
    "restart",
]
__version__ = "0.2.0"
