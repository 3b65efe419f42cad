"""Fused norms, rotary embeddings and gated units of liger-kernel (`model.liger_kernel`)."""

import importlib.util
from importlib import import_module

import torch
from transformers import PretrainedConfig, PreTrainedModel

from relora.config import ModelSection

INSTALL = "pip install 'relora[liger]'"


def liger_problems(section: ModelSection, hf_config: PretrainedConfig) -> list[str]:
    """Why the kernels that `model.liger_kernel` asks for cannot be used here; nothing is imported unless it does."""
    if not section.liger_kernel:
        return []
    setting = "model.liger_kernel = true"
    if importlib.util.find_spec("liger_kernel") is None:
        return [f"{setting}: needs liger-kernel: {INSTALL}"]
    if not torch.cuda.is_available():
        return [f"{setting}: its kernels need a CUDA device, and there is none here"]
    known = import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    if hf_config.model_type not in known:
        return [f"{setting}: liger-kernel has none for model_type {hf_config.model_type}"]
    return []


def use_liger_kernels(model: PreTrainedModel) -> None:
    """Replace forward functions of `model` in place; modules, names, parameters and calls of linear layers stay.

    liger-kernel changes the classes of the architecture too, for the rest of the process. Its fused losses stay off:
    the loss is `relora.model.loss`.
    """
    # Imported on use: it imports all of transformers' Trainer.
    apply = import_module("transformers.integrations.liger").apply_liger_kernel
    apply(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
