"""What the routes cost, and which is chosen when."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from relora import LoRAConfig, inject_lora
from relora.method.lora import LoRALinear
from relora.method.merged_cache import attach_caches
from relora.method.routes import (
    FORM_COST,
    break_even_rank,
    choose_route,
    factored_flops,
    flop_limit,
    form_cost,
    full_rank_flops,
    merge_problem,
    merged_flops,
)

T, D_IN, D_OUT, R = 96, 40, 56, 8
SHAPE = (T, D_IN, D_OUT, R)


def counted(layer: nn.Module, *, with_gradients: bool = True) -> int:
    """The FLOPs of a layer's products, as torch counts them."""
    x = torch.randn(T, D_IN, requires_grad=True)
    # Torch counts addmm, but not in place.
    in_place = {torch.ops.aten.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1]}  # noqa: ARG005
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, torch.set_grad_enabled(with_gradients):
        y = layer(x)
        if with_gradients:
            y.sum().backward()
    return int(counter.get_total_flops())


def wrapped(**options: Any) -> LoRALinear:
    config = LoRAConfig(r=R, **options)
    layer = LoRALinear.from_linear(nn.Linear(D_IN, D_OUT, bias=False), config)
    if config.keep_merged:
        attach_caches([layer])
        layer.cache_span = "update"
    return layer


def test_full_rank_is_counted() -> None:
    assert counted(nn.Linear(D_IN, D_OUT, bias=False)) == full_rank_flops(T, D_IN, D_OUT)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_the_routes_do_what_their_formulas_say(with_gradients: bool) -> None:
    num_forms = 1 + with_gradients
    factored = counted(wrapped(forward="factored"), with_gradients=with_gradients)
    assert factored == factored_flops(*SHAPE, with_gradients=with_gradients)
    merged = counted(wrapped(forward="merged"), with_gradients=with_gradients)
    assert merged == merged_flops(*SHAPE, num_forms=num_forms, with_gradients=with_gradients)


def test_what_is_cached_is_formed_once_for_all_micro_batches() -> None:
    layer = wrapped(forward="merged", keep_merged=True)
    assert counted(layer) == merged_flops(*SHAPE, num_forms=1)
    assert counted(layer) == counted(layer) == merged_flops(*SHAPE, num_forms=0)
    with torch.no_grad():
        layer.lora_B.add_(1)
    assert counted(layer) == merged_flops(*SHAPE, num_forms=1)


@pytest.mark.parametrize(("d", "r", "num_tokens"), [(2048, 128, 4096), (1024, 128, 4096), (512, 16, 256)])
def test_the_limit_of_a_square_layer_is_the_papers_count(d: int, r: int, num_tokens: int) -> None:
    merged, factored = 2 / 3 + 4 / 3 * r / d + r / (3 * num_tokens), 2 / 3 + 2 * r / d
    assert flop_limit(num_tokens, d, d, r) == pytest.approx(min(merged, factored), rel=1e-12)


def test_the_limit_of_a_wide_layer() -> None:
    assert flop_limit(4096, 2048, 5461, 128) == pytest.approx(0.7344, abs=1e-4)


@pytest.mark.parametrize("shape", [(4096, 2048, 2048), (4096, 2048, 5461), (64, 1024, 1024)])
def test_at_the_break_even_rank_nothing_is_spared(shape: tuple[int, int, int]) -> None:
    rank = break_even_rank(*shape)
    assert flop_limit(*shape, round(0.9 * rank)) < 1 < flop_limit(*shape, round(1.1 * rank))


def test_the_break_even_rank_of_a_square_layer() -> None:
    assert break_even_rank(10**9, 1024, 1024) == pytest.approx(1024 / 4, rel=1e-3)
    assert break_even_rank(1, 1024, 1024) == pytest.approx(1024 / 6, rel=1e-3)


def test_auto_takes_the_cheaper_route_on_both_sides_of_the_break_even() -> None:
    d, r = 1024, 16
    assert choose_route(d + 1, d, d, r, num_forms=2) == "merged"
    assert choose_route(3 * d // 5, d, d, r, num_forms=2) == "factored"
    assert choose_route(3 * d // 5, d, d, r, num_forms=1) == "merged"
    assert choose_route(3 * d // 5, d, d, r, num_forms=2, can_merge=False) == "factored"
    assert choose_route(1, d, d, r, num_forms=1, with_gradients=False) == "factored"
    assert choose_route(1, d, d, r, num_forms=0, with_gradients=False) == "merged"


@pytest.mark.parametrize("forward", ["merged", "factored"])
def test_a_route_that_is_asked_for_is_taken(forward: Any) -> None:
    assert {choose_route(n, 64, 64, 4, forward=forward) for n in (1, 10**6)} == {forward}


def test_forming_in_fp32_beside_16_bit_costs_more() -> None:
    assert form_cost("cpu", torch.float32) == form_cost("cuda", torch.float64) == 1
    assert form_cost("cpu", torch.bfloat16) == FORM_COST["cpu"] > 1
    assert form_cost("cuda", torch.float16) == FORM_COST["cuda"] > FORM_COST["cpu"]


def test_a_layer_chooses_by_its_call() -> None:
    layer = LoRALinear.from_linear(nn.Linear(256, 256), LoRAConfig(r=8))
    few, many = 100, 2000
    assert [layer.route(n, torch.float32) for n in (few, many)] == ["factored", "merged"]
    between = 250  # worth it where forming is cheap only
    assert [layer.route(between, dtype) for dtype in (torch.float32, torch.bfloat16)] == ["merged", "factored"]
    layer.weight.data = layer.weight.data.bfloat16()
    assert layer.route(many, torch.float32) == "factored"


def test_active_dropout_is_factored_and_inactive_dropout_is_none() -> None:
    layer = LoRALinear.from_linear(nn.Linear(64, 64), LoRAConfig(r=4, lora_dropout=0.5))
    assert layer.route(10**6, torch.float32) == "factored"
    assert layer.eval().route(10**6, torch.float32) == "merged"


@pytest.mark.parametrize("weight_format", ["bfloat16", "int8", "nf4"])
def test_a_coarse_weight_cannot_be_merged(weight_format: str) -> None:
    assert (
        merge_problem(weight_format, torch.float32, 0)
        == f"a weight stored as {weight_format} rounds small updates away"
    )
    for exact in (None, "float32"):
        assert merge_problem(exact, torch.float32, 0) is merge_problem(exact, torch.float64, 0) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "forward must not be merged: lora_dropout = 0.1"),
        ({"base_dtype": "bfloat16"}, "forward must not be merged: a weight stored as bfloat16"),
        ({"base_dtype": "nf4"}, "forward must not be merged: a weight stored as nf4"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_the_config(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(forward="merged", **options)
    LoRAConfig(forward="auto", **options)


def test_an_unknown_route_is_refused() -> None:
    with pytest.raises(ValueError, match="forward must be auto, merged or factored, not 'fast'"):
        LoRAConfig(forward="fast")  # type: ignore[arg-type]


def test_a_16_bit_model_cannot_be_merged_and_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    with pytest.raises(ValueError, match="forward = merged: 0: a weight stored as bfloat16"):
        inject_lora(model, LoRAConfig(r=2, forward="merged"))
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
    inject_lora(model, LoRAConfig(r=2, forward="merged", base_dtype="float32"))


def test_a_weight_that_has_become_coarse_is_refused_at_the_call() -> None:
    layer = wrapped(forward="merged").bfloat16()
    with pytest.raises(ValueError, match="forward = merged: a weight stored as bfloat16"):
        layer(torch.randn(2, D_IN, dtype=torch.bfloat16))
