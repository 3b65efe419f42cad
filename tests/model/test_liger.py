"""model.liger_kernel: where it is refused, and what it is asked to change. The kernels themselves need a GPU."""

import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from relora import LoRAConfig, inject_lora
from relora.config import ModelSection
from relora.method.targets import find_targets
from relora.model.liger import liger_problems, use_liger_kernels
from tests.helpers.tiny import MODEL

ASKED = ModelSection(config=MODEL, liger_kernel=True)
LLAMA = LlamaConfig(**{key: value for key, value in MODEL.items() if key != "model_type"})


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for liger-kernel that knows Llama; returns the calls to its patch of a model."""
    calls: list[dict[str, Any]] = []

    def patch(model: nn.Module, **options: bool) -> None:
        calls.append(options)
        for module in model.modules():
            if type(module).__name__ == "LlamaMLP":
                # As liger-kernel does it: the linear layers of the block are called, not their weights read.
                module.forward = lambda x, m=module: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x))  # type: ignore[assignment]

    parts = {name: ModuleType(name) for name in ("liger_kernel", "liger_kernel.transformers")}
    patches = parts["liger_kernel.transformers.monkey_patch"] = ModuleType("liger_kernel.transformers.monkey_patch")
    parts["liger_kernel"].__spec__ = importlib.machinery.ModuleSpec("liger_kernel", None)
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": patch}  # type: ignore[attr-defined]
    parts["liger_kernel.transformers"]._apply_liger_kernel_to_instance = patch  # type: ignore[attr-defined]
    for name, module in parts.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_not_asked_for_nothing_is_looked_at() -> None:
    assert liger_problems(ModelSection(config=MODEL), LLAMA) == []


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    [problem] = liger_problems(ASKED, LLAMA)
    assert problem == "model.liger_kernel = true: needs liger-kernel: pip install 'relora[liger]'"


@pytest.mark.usefixtures("installed")
def test_no_gpu_and_unknown_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    [problem] = liger_problems(ASKED, LLAMA)
    assert problem == "model.liger_kernel = true: its kernels need a CUDA device, and there is none here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert liger_problems(ASKED, LLAMA) == []
    unknown = LlamaConfig()
    unknown.model_type = "opt"
    [problem] = liger_problems(ASKED, unknown)
    assert problem == "model.liger_kernel = true: liger-kernel has none for model_type opt"


def test_the_loss_stays_ours_and_linear_layers_are_still_wrapped(
    installed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    plain, model = LlamaForCausalLM(LLAMA), LlamaForCausalLM(LLAMA)
    use_liger_kernels(model)
    assert installed == [{"cross_entropy": False, "fused_linear_cross_entropy": False}]
    assert find_targets(model, LoRAConfig(r=4)) == find_targets(plain, LoRAConfig(r=4))
    inject_lora(model, LoRAConfig(r=4), seed=0)
    model(input_ids=torch.arange(6)[None]).logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith("lora_B"))
