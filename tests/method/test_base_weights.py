"""Frozen weights on coarser grids, and the exact masters beside them."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from relora import LoRAConfig, inject_lora, merge_lora, restart
from relora.method import base_weights
from relora.method.base_weights import WeightFormat
from relora.method.lora import LoRALinear, lora_layers
from relora.method.optimizer import build_optimizer
from relora.method.restart import start_factors
from relora.method.store import TorchStore
from tests.helpers.toy import CONFIG, toy, update

COARSE = ("bfloat16", "int8", "nf4")
# Relative to |W| of normal weights: half a step of bf16, of 1/127 of a block's largest, and of the normal-float grid.
ROUNDING = {"float32": 0.0, "bfloat16": 0.002, "int8": 0.007, "nf4": 0.1}


@pytest.mark.parametrize("shape", [(64, 96), (30, 50), (7, 9)])
@pytest.mark.parametrize("name", ROUNDING)
def test_a_grid_rounds_as_it_should(name: base_weights.BaseDtype, shape: tuple[int, int]) -> None:
    W, weight_format = torch.randn(shape, generator=torch.Generator().manual_seed(0)), WeightFormat(name, shape)
    stored = weight_format.quantize(W)
    decoded = weight_format.dequantize(stored, torch.float32)
    assert decoded.shape == W.shape
    assert (decoded - W).norm() <= ROUNDING[name] * W.norm()
    assert stored.nbytes == weight_format.num_bytes(stored.dtype)
    torch.testing.assert_close(weight_format.quantize(decoded), stored, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_quantized_weights_are_the_same_in_every_dtype(name: base_weights.BaseDtype) -> None:
    weight_format = WeightFormat(name, (32, 64))
    stored = weight_format.quantize(torch.randn(32, 64))
    in_float32 = weight_format.dequantize(stored, torch.float32)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(weight_format.dequantize(stored, dtype), in_float32.to(dtype))


def test_a_missing_library_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_weights.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"nf4 needs bitsandbytes: pip install 'relora\[quantization\]'"):
        WeightFormat("nf4", (8, 8))
    WeightFormat("bfloat16", (8, 8))


def merged_often(base_dtype: base_weights.BaseDtype | None, W: Tensor) -> tuple[LoRALinear, Tensor]:
    """A layer after 20 restarts, each with a delta of 0.3 % of |W|, and what it must hold, in float64."""
    plain = nn.Linear(W.shape[1], W.shape[0], bias=False)
    plain.weight = nn.Parameter(W.clone())
    model, expected = nn.Sequential(plain), W.double()
    inject_lora(model, LoRAConfig(r=8, lora_alpha=12, base_dtype=base_dtype))
    [layer] = lora_layers(model).values()
    optimizer, generator = build_optimizer(model), torch.Generator().manual_seed(1)
    for index in range(1, 21):
        with torch.no_grad():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
            layer.lora_B.mul_(0.003 * W.float().norm() / layer.delta().norm())
            expected += layer.scale * (layer.lora_B.double() @ layer.lora_A.double())
        restart(model, optimizer, seed=0, index=index, optimizer_reset="keep")
    return layer, expected


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("base_dtype", COARSE)
def test_twenty_small_merges_lose_nothing(base_dtype: base_weights.BaseDtype) -> None:
    W = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    layer, expected = merged_often(base_dtype, W)
    assert layer.master is not None
    assert relative(layer.master.values.view(W.shape), expected) < 1e-6
    assert relative(layer.to_linear().weight, expected) < 1e-6
    # What the model computes with is the same, rounded once.
    torch.testing.assert_close(
        layer.weight, layer.weight_format.quantize(layer.master.values.view(W.shape)), rtol=0, atol=0
    )


def test_without_a_master_they_would_be_lost() -> None:
    W = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    layer, expected = merged_often(None, W)
    assert layer.master is None
    learned = (expected - W.double()).norm()
    assert (layer.weight.double() - expected).norm() > 0.1 * learned


@pytest.mark.parametrize("base_dtype", COARSE)
def test_a_restart_tells_both_errors(base_dtype: base_weights.BaseDtype) -> None:
    model = toy()
    inject_lora(model, replace(CONFIG, base_dtype=base_dtype))
    optimizer = build_optimizer(model, learning_rate=1e-2)
    update(model, optimizer, 3)
    layer = lora_layers(model)["inner"]
    before, delta = layer.weight_format.dequantize(layer.weight, torch.float32).clone(), layer.delta()
    report = restart(model, optimizer, seed=0, index=1)
    after = layer.weight_format.dequantize(layer.weight, torch.float32)
    assert report.master_error < 1e-5
    assert report.merge_error >= relative(after - before, delta.double()) > 1e-3


@pytest.mark.parametrize("base_dtype", COARSE)
def test_merge_lora_gives_the_exact_weights_back(base_dtype: base_weights.BaseDtype) -> None:
    model = toy()
    W = model.conv.weight.detach().clone()
    inject_lora(model, replace(CONFIG, base_dtype=base_dtype))
    with torch.no_grad():
        lora_layers(model)["conv"].lora_B.fill_(0.1)
    expected = W + lora_layers(model)["conv"].delta()
    merge_lora(model)
    assert model.conv.weight.dtype == torch.float32
    torch.testing.assert_close(model.conv.weight, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("base_dtype", ["int8", "nf4"])
def test_carried_factors_keep_more_of_the_function(base_dtype: base_weights.BaseDtype) -> None:
    def lacking(carries: bool) -> float:
        """What the layer that a restart leaves lacks of the exact weight."""
        model = toy()
        inject_lora(model, replace(CONFIG, base_dtype=base_dtype))
        optimizer = build_optimizer(model, learning_rate=1e-2)
        update(model, optimizer, 3)
        layer = lora_layers(model)["conv"]
        assert layer.master is not None
        expected = layer.master.values.view(layer.weight_format.shape).double() + layer.delta()
        restart(model, optimizer, seed=0, index=1, carry_residual=carries)
        # Whatever the factors carry, the exact weight and they are together what they were.
        torch.testing.assert_close(
            layer.master.values.view(layer.weight_format.shape) + layer.delta(), expected.float()
        )
        assert bool(layer.lora_B.any()) == carries
        return relative(layer.weight_format.dequantize(layer.weight, torch.float32) + layer.delta(), expected)

    assert lacking(True) < 0.9 * lacking(False)


def test_a_store_keeps_no_model() -> None:
    model, store = toy(), TorchStore()
    inject_lora(model, replace(CONFIG, base_dtype="nf4"))
    layers = [weakref.ref(layer) for layer in lora_layers(model).values()]
    store.register(lora_layers(model).values())
    assert store.read(layers[0]().weight).shape == layers[0]().weight_format.shape
    del model
    gc.collect()
    assert [layer() for layer in layers] == [None] * len(layers)


def test_carried_factors_are_the_best_of_their_rank() -> None:
    model = toy()
    inject_lora(model, replace(CONFIG, base_dtype="nf4"))
    layer = lora_layers(model)["inner"]
    store = TorchStore()
    store.register(lora_layers(model).values())
    residual = store.read(layer.weight).clone() - store.dequantized(layer.weight)
    start_factors(model, seed=0, carry_residual=True, store=store)
    best = torch.linalg.svdvals(residual)[layer.r :].norm()
    assert (residual - layer.delta()).norm() < 1.05 * best
    # A is as after any other restart: orthogonal rows, of the length that kaiming's have on average.
    torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(layer.r) / 3, atol=1e-5, rtol=0)
