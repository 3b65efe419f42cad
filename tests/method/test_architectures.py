"""Injection, restart and merge leave the function of real architectures as it was, and kill nothing."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from relora import LoRAConfig, build_optimizer, inject_lora, merge_lora, restart
from relora.method.lora import lora_layers
from relora.method.names import tied_names
from relora.method.parameter_report import parameter_report
from relora.method.plain_layers import is_linear
from relora.method.usage import ModelUsage
from tests.helpers.architectures import (
    ARCHITECTURES,
    CONFIG,
    MIXTURES,
    TIED,
    build,
    copies,
    injected,
    learned_by_factors,
    logits,
    names_where,
    trained,
    update,
    without_gradient,
)

TOLERANCE = 1e-4
MOVED = 100 * TOLERANCE

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@every_architecture
def test_injection_preserves_the_function(name: str) -> None:
    model = build(name)
    before = logits(model)
    inject_lora(model, CONFIG)
    assert torch.equal(logits(model), before)
    assert all(layer.lora_A.any() for layer in lora_layers(model).values())


@every_architecture
def test_restart_preserves_the_function(name: str) -> None:
    model, optimizer = trained(name)
    assert learned_by_factors(model) > MOVED
    before, layers = logits(model), lora_layers(model)
    A = copies(layers, "lora_A")
    report = restart(model, optimizer, seed=0, index=1)
    torch.testing.assert_close(logits(model), before, atol=TOLERANCE, rtol=0)
    assert report.merged_layers == len(layers) > 0
    assert not any(layer.lora_B.any() for layer in layers.values())
    assert all(layer.lora_A.any() and not torch.equal(layer.lora_A, A[key]) for key, layer in layers.items())


@every_architecture
def test_merge_preserves_the_function_and_leaves_the_plain_model(name: str) -> None:
    plain = build(name)
    modules = {key: type(module) for key, module in plain.named_modules()}
    model, _ = trained(name)
    assert learned_by_factors(model) > MOVED
    before = logits(model)
    assert merge_lora(model) is model
    torch.testing.assert_close(logits(model), before, atol=TOLERANCE, rtol=0)
    assert {key: type(module) for key, module in model.named_modules()} == modules
    assert list(model.state_dict()) == list(plain.state_dict())


@every_architecture
def test_every_B_then_every_A_moves_after_a_restart(name: str) -> None:
    model, optimizer = trained(name)
    restart(model, optimizer, seed=0, index=1)
    layers = lora_layers(model)
    A, B = copies(layers, "lora_A"), copies(layers, "lora_B")

    update(model, optimizer)
    assert without_gradient(model, "lora_B") == set()
    assert names_where(layers, lambda key, layer: torch.equal(layer.lora_B, B[key])) == set()
    assert names_where(layers, lambda key, layer: not torch.equal(layer.lora_A, A[key])) == set()

    update(model, optimizer)
    assert without_gradient(model, "lora_A") == set()
    assert names_where(layers, lambda key, layer: torch.equal(layer.lora_A, A[key])) == set()


def test_a_layer_that_the_model_bypasses_is_seen_as_dead() -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.bypassed = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(self.used(x), self.bypassed.weight, self.bypassed.bias)

    model = Bypass()
    inject_lora(model, LoRAConfig(r=2), usage=ModelUsage())  # as if nothing were known of the model
    model(torch.randn(4, 8)).square().sum().backward()
    assert without_gradient(model, "lora_B") == {"bypassed"}


@every_architecture
def test_all_linear_wraps_every_linear_layer_but_the_head(name: str) -> None:
    model = build(name)
    head = model.get_output_embeddings()
    linear = {key for key, module in model.named_modules() if is_linear(module) and module is not head}
    assert set(inject_lora(model, CONFIG).wrapped_layers) == linear
    assert linear


@every_architecture
def test_every_parameter_is_wrapped_or_trained_from_scratch(name: str) -> None:
    model = build(name)
    numbers = sum(p.numel() for p in model.parameters())
    report = inject_lora(model, CONFIG)
    assert report.frozen_names == []
    assert report.wrapped.num_parameters + report.full.num_parameters == numbers
    assert report == parameter_report(model)


@pytest.mark.parametrize("name", TIED)
def test_ties_are_kept(name: str) -> None:
    model = build(name)
    ties = {tuple(names) for names in tied_names(model).values() if len(names) > 1}
    assert ties

    def kept() -> bool:
        return all(len({id(model.get_parameter(key)) for key in names}) == 1 for names in ties)

    inject_lora(model, CONFIG)
    assert kept()
    optimizer = build_optimizer(model, learning_rate=1e-2)
    update(model, optimizer, 2)
    restart(model, optimizer, seed=0, index=1)
    assert kept()
    merge_lora(model)
    assert kept()


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_and_routers_train_in_full(name: str) -> None:
    model, optimizer = injected(name)
    full = {key: p for key, p in model.named_parameters() if "experts" in key or "mlp.gate" in key}
    assert {p.ndim for p in full.values()} == {2, 3}
    before = {key: p.detach().clone() for key, p in full.items()}
    update(model, optimizer)
    assert {key for key, p in full.items() if torch.equal(p, before[key])} == set()


def test_the_experts_of_a_mixture_stay_frozen_when_a_pretrained_model_goes_on() -> None:
    model = build("mixtral")
    report = inject_lora(model, LoRAConfig(r=4))
    assert report.full.num_tensors == 0
    assert any("experts" in key for key in report.frozen_names)
