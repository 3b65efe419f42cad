"""Wrapped layers on the device: products, gradients, stored weights and restarts against float64 on the host."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora import LoRAConfig, build_optimizer, inject_lora, restart
from relora.method.base_weights import BaseDtype, WeightFormat
from relora.method.lora import lora_layers

pytestmark = pytest.mark.gpu
R, ROWS, D_IN, D_OUT = 8, 96, 160, 200
# Of the largest entry: sums of 200 products in fp32, and one rounding to 16 bits of a sum and of what went into it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def model_of(**options: Any) -> nn.Module:
    """Two wrapped layers whose factors are alive, on the host."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Linear(D_OUT, D_IN, bias=False))
    inject_lora(model, LoRAConfig(r=R, lora_alpha=12, **options))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.05)
    return model


def results(model: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """y and all gradients, as float64 on the host."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != x.dtype):
        y = model(x)
    y.to(torch.promote_types(y.dtype, torch.float32)).pow(2).mean().backward()
    found = {"y": y, "x": x.grad} | {name: p.grad for name, p in model.named_parameters()}
    return {name: value.detach().double().cpu() for name, value in found.items() if value is not None}


OPTIONS: dict[str, dict[str, Any]] = {
    "merged": {"forward": "merged"},
    "merged, cached": {"forward": "merged", "keep_merged": True},
    "factored": {"forward": "factored"},
    "merged, triton": {"forward": "merged", "kernels": "triton"},
    "factored, triton": {"forward": "factored", "kernels": "triton"},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_products_and_gradients_are_those_of_float64(device: torch.device, dtype: torch.dtype, options: str) -> None:
    chosen = dict(OPTIONS[options])
    exact = model_of(forward=chosen["forward"])
    if "kernels" in chosen:
        pytest.importorskip("triton")
        if device.type == "cpu":
            pytest.skip("needs a GPU: Triton's interpreter runs in tests/method/test_triton_kernels.py")
    model, x = model_of(**chosen), torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(1))
    expected = results(exact.double(), x.double(), torch.float64)
    found = results(model.to(device), x.to(device), dtype)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= TOLERANCE[dtype] * value.abs().max(), name


@pytest.mark.parametrize("name", ["bfloat16", "int8", "nf4"])
def test_a_weight_is_stored_as_on_the_host(device: torch.device, name: BaseDtype) -> None:
    if name != "bfloat16":
        pytest.importorskip("bitsandbytes")
    W, weight_format = (
        torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(0)),
        WeightFormat(name, (D_OUT, D_IN)),
    )
    on_host, on_device = weight_format.quantize(W), weight_format.quantize(W.to(device))
    # A weight at the border of two codes may fall to either side: what is stored differs there by one step of the grid.
    differing = (on_device.cpu() != on_host).float().mean().item()
    assert differing <= (0 if name == "bfloat16" else 1e-3)
    # The same codes are the same weights, whoever decodes them.
    decoded = weight_format.dequantize(on_host.to(device), torch.float32).cpu()
    torch.testing.assert_close(decoded, weight_format.dequantize(on_host, torch.float32), rtol=1e-6, atol=0)


def steps(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    device = next(model.parameters()).device
    for index in range(number):
        x = torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(index)).to(device)
        model(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def factors_of(model: nn.Module) -> list[nn.Parameter]:
    return [factor for layer in lora_layers(model).values() for factor in (layer.lora_A, layer.lora_B)]


def test_a_restart_is_that_of_the_host(device: torch.device) -> None:
    models, drawn = [model_of(), model_of().to(device)], []
    start = [factor.detach().clone() for factor in factors_of(models[0])]
    for model in models:
        optimizer = build_optimizer(model, name="adamw_fused", learning_rate=1e-2)
        steps(model, optimizer, 3)
        x = torch.ones(4, D_IN, device=next(model.parameters()).device)
        before = model(x).detach()
        assert restart(model, optimizer, seed=5, index=2).merge_error < 1e-6
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
        assert all(not value.any() for p in factors_of(model) for value in optimizer.state[p].values())
        drawn.append([factor.detach().cpu().clone() for factor in factors_of(model)])
        steps(model, optimizer, 1)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*drawn, strict=True)), "all draws are the host's"
    assert not any(torch.equal(ours, old) for ours, old in zip(drawn[0], start, strict=True))
    ours, theirs = (dict(model.named_parameters()) for model in models)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name].cpu(), value, rtol=1e-4, atol=1e-5, msg=name)
