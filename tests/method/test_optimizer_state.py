"""Restarts of an optimizer with 8-bit moments: zero is the value 0, not the index 0."""

import importlib.util
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora import build_optimizer, restart
from relora.method.adamw_8bit import ADAMW_8BIT, COMPANIONS, dequantize
from relora.method.optimizer import OPTIMIZERS
from relora.method.store import TorchStore
from tests.helpers.wide import update, wrapped


def trained(num_updates: int = 3) -> tuple[nn.Module, Optimizer]:
    model = wrapped(nn.Tanh())
    optimizer = build_optimizer(model, name="adamw_8bit", learning_rate=1e-2)
    update(model, optimizer, num_updates)
    return model, optimizer


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def values(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The two moments as numbers."""
    state = optimizer.state[parameter]
    if state["state1"].dtype != torch.uint8:
        return {slot: state[slot] for slot in COMPANIONS}
    return {slot: dequantize(*(state[name] for name in (slot, *COMPANIONS[slot]))) for slot in COMPANIONS}


def fill(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Moments none of whose entries is zero."""
    generator = torch.Generator().manual_seed(1)
    for slot in COMPANIONS:
        state = optimizer.state[parameter]
        if state[slot].dtype == torch.uint8:
            state[slot].random_(1, 100, generator=generator)
            state[COMPANIONS[slot][0]].uniform_(0.5, 2, generator=generator)
        else:
            state[slot].uniform_(0.5, 2, generator=generator)


def test_wide_factors_are_quantized_and_narrow_ones_are_not() -> None:
    model, optimizer = trained()
    kinds = [optimizer.state[p]["state1"].dtype for p in factors(model)]
    assert kinds == [torch.uint8, torch.float32, torch.float32, torch.uint8]
    assert set(TorchStore().slots(optimizer, factors(model)[0])) == {
        *COMPANIONS,
        *COMPANIONS["state1"],
        *COMPANIONS["state2"],
    }
    assert set(TorchStore().slots(optimizer, factors(model)[1])) == set(COMPANIONS)


def test_dequantized_is_what_bitsandbytes_computes_with() -> None:
    model, optimizer = trained()
    for parameter in (factors(model)[0], factors(model)[3]):
        state = optimizer.state[parameter]
        for slot, (scales, table) in COMPANIONS.items():
            theirs = torch.ops.bitsandbytes.dequantize_blockwise(
                state[slot].flatten(), state[scales], state[table], 256, torch.float32
            )
            assert theirs.any()
            assert torch.equal(values(optimizer, parameter)[slot].flatten(), theirs)


def test_zero_is_zero_as_a_value_and_training_goes_on_as_with_a_new_optimizer() -> None:
    results = []
    for fresh in (False, True):
        model, optimizer = trained()
        assert all(moment.any() for p in factors(model) for moment in values(optimizer, p).values())
        report = restart(model, optimizer, seed=0, index=1)
        assert report.optimizer_zeroed_fraction == 1
        assert not any(moment.any() for p in factors(model) for moment in values(optimizer, p).values())
        assert [optimizer.state[p]["step"] for p in factors(model)] == [0] * 4
        if fresh:
            optimizer = build_optimizer(model, name="adamw_8bit", learning_rate=1e-2)
        update(model, optimizer, 3)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("reset", ["magnitude", "random"])
@pytest.mark.parametrize("ratio", [0.9, 0.3, 1.0])
def test_pruning_clears_exactly_the_ratio_and_leaves_the_rest_to_the_bit(reset: Any, ratio: float) -> None:
    model, optimizer = trained()
    before = {}
    for number, p in enumerate(factors(model)):
        fill(optimizer, p)
        before[number] = {slot: moment.clone() for slot, moment in values(optimizer, p).items()}
        assert all(moment.all() for moment in before[number].values())
    restart(model, optimizer, seed=0, index=1, optimizer_reset=reset, prune_ratio=ratio)
    for number, p in enumerate(factors(model)):
        first, second = values(optimizer, p).values()
        assert torch.equal(first == 0, second == 0)
        assert (first == 0).sum() == math.floor(ratio * p.numel())
        for slot, moment in values(optimizer, p).items():
            assert torch.equal(moment, before[number][slot].masked_fill(moment == 0, 0))
        if reset == "magnitude" and ratio < 1:
            size = before[number]["state1"].abs()
            assert size[first == 0].max() <= size[first != 0].min()
        assert optimizer.state[p]["step"] == 3


def test_an_index_of_zero_is_not_the_value_zero_and_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()

    def fill_only(integers: Tensor, scales: Tensor, table: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
        return integers.masked_fill(mask, 0), scales

    wrong = replace(ADAMW_8BIT, quantized=replace(ADAMW_8BIT.quantized, clear=fill_only))
    monkeypatch.setitem(OPTIMIZERS, "adamw_8bit", wrong)
    with pytest.raises(RuntimeError, match="4400 cleared entries of state1, state2 read back as not 0"):
        restart(model, optimizer, seed=0, index=1)
    state = optimizer.state[factors(model)[0]]
    assert not state["state1"].any()
    assert values(optimizer, factors(model)[0])["state1"].abs().max() > 0


def test_without_bitsandbytes_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = trained(0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"adamw_8bit: needs bitsandbytes: pip install 'relora\[quantization\]'"):
        build_optimizer(model, name="adamw_8bit")


def test_unknown_optimizer() -> None:
    with pytest.raises(
        ValueError, match=r"optimizer = sgd: must be adamw, adamw_fused, adamw_8bit, muon, or module:attribute"
    ):
        build_optimizer(trained(0)[0], name="sgd")
