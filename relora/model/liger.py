"""The fused norms, rotary embeddings and gated units of liger-kernel (`model.liger_kernel`), where it has them."""

import importlib.util
from importlib import import_module

import torch
from transformers import PretrainedConfig, PreTrainedModel

from relora.config import ModelSection

INSTALL = "pip install 'relora[liger]'"


def liger_problems(section: ModelSection, hf_config: PretrainedConfig) -> list[str]:
    """Why the kernels that were asked for cannot be used here."""
    if not section.liger_kernel:
        return []
    said = "model.liger_kernel = true"
    if importlib.util.find_spec("liger_kernel") is None:
        return [f"{said}: needs liger-kernel: {INSTALL}"]
    if not torch.cuda.is_available():
        return [f"{said}: its kernels need a CUDA device, and there is none here"]
    known = import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    if hf_config.model_type not in known:
        return [f"{said}: liger-kernel has none for model_type {hf_config.model_type}"]
    return []


def use_liger_kernels(model: PreTrainedModel) -> None:
    """Let `model` compute with them: its modules, their names and parameters stay, linear layers are called as before.

    liger-kernel changes the classes of the architecture too, for the rest of the process. The loss stays ours.
    """
    # Imported when it is used: it brings the whole Trainer with it.
    apply = import_module("transformers.integrations.liger").apply_liger_kernel
    apply(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
