"""Pretrain, and continue to train, transformer models with ReLoRA (arXiv 2307.05695).

The public names are imported when they are first used (PEP 562), so that `relora --help` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {
    "LoRAConfig": "relora.method.lora",
    "RestartReport": "relora.method.restart",
    "build_optimizer": "relora.method.optimizer",
    "inject_lora": "relora.method.inject",
    "lr_multiplier": "relora.method.schedule",
    "merge_lora": "relora.method.inject",
    "restart": "relora.method.restart",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use; later uses find it in this module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
