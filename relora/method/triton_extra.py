"""Triton as an optional extra: whether its kernels can run here, and their module, imported on use."""

import importlib
import importlib.util
from types import ModuleType

import torch

from relora.method.choices import Kernels

INSTALL = "pip install 'relora[triton]'"


def kernels_problem(kernels: Kernels) -> str | None:
    """Why these kernels cannot run here, or None. Triton is imported only if it is asked for."""
    if kernels == "torch":
        return None
    if importlib.util.find_spec("triton") is None:
        return f"kernels = {kernels}: needs triton, which torch's builds for GPUs bring along: {INSTALL}"
    if torch.cuda.is_available() or importlib.import_module("triton").knobs.runtime.interpret:
        return None
    return f"kernels = {kernels}: needs a CUDA device, and there is none here (TRITON_INTERPRET=1 tries them on a CPU)"


def triton_kernels() -> ModuleType:
    """The kernels, whose module needs triton."""
    # A statement and not importlib, which torch.compile does not trace.
    from relora.method import triton_kernels as module

    return module
