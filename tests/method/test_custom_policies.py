"""A user's own optimizer, reinit and reset, named by `module:attribute`, in plain torch."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relora import LoRAConfig, build_optimizer, inject_lora, merge_lora, restart
from relora.method.lora import lora_layers
from relora.method.optimizer import optimizer_problems
from relora.method.optimizer_state import Slot
from relora.method.reinit import REINITS, Reinit
from relora.method.reset import Reset
from relora.method.restart import BrokenModelError, start_factors
from relora.method.store import TorchStore
from tests.helpers.custom_policies import Offset, TopDirections
from tests.helpers.toy import CONFIG, R, Toy, factors, toy, update

HERE = "tests.helpers.custom_policies"
# Muon takes matrices only: without the norm and the biases that toy.CONFIG trains in full.
FACTORS_ONLY = replace(CONFIG, modules_to_save=None)
X = torch.randn(32, 12, generator=torch.Generator().manual_seed(3))


def trained(optimizer: str, config: LoRAConfig = FACTORS_ONLY, **how: Any) -> tuple[Toy, torch.optim.Optimizer]:
    model = toy()
    inject_lora(model, config, seed=0, **how)
    built = build_optimizer(model, name=f"{HERE}:{optimizer}", learning_rate=1e-2)
    update(model, built, 3)
    return model, built


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Mapping[str, Any]]:
    return {name: optimizer.state[p] for name, p in factors(model).items()}


def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """W + scale * B @ A of every layer, in float64."""
    found = {}
    for name, layer in lora_layers(model).items():
        delta = layer.scale * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        W = layer.weight_format.dequantize(layer.weight.detach(), torch.float32).double()
        found[name] = W + (delta.T if layer.transposed else delta)
    return found


def masters(model: nn.Module) -> dict[str, Tensor]:
    """The exact W of every layer, in float64."""
    store = TorchStore()
    store.register(lora_layers(model).values())
    return {name: store.read(layer.weight).detach().double() for name, layer in lora_layers(model).items()}


# --- optimizers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "moment"), [("muon", "momentum_buffer"), ("lion", "exp_avg")])
def test_an_optimizer_without_a_step_count_learns_and_is_reset(optimizer: str, moment: str) -> None:
    model, built = trained(optimizer)
    assert all(set(entries) == {moment} and entries[moment].any() for entries in state(model, built).values())
    assert all(layer.lora_B.abs().max() > 1e-3 for layer in lora_layers(model).values())
    assert {TorchStore().step(built, p) for p in factors(model).values()} == {None}
    before = model(X)
    report = restart(model, built, seed=0, index=1)
    torch.testing.assert_close(model(X), before, atol=1e-5, rtol=0)
    assert report.optimizer_zeroed_fraction == 1
    assert not any(entries[moment].any() for entries in state(model, built).values())
    update(model, built, 2)  # A has no gradient in the first, as B is zero
    assert all(entries[moment].any() for entries in state(model, built).values())


@pytest.mark.parametrize("reset", ["magnitude", "random"])
def test_its_moment_is_pruned_exactly(reset: str) -> None:
    model, built = trained("lion")
    restart(model, built, seed=0, index=1, optimizer_reset=reset, prune_ratio=0.5)
    for entries in state(model, built).values():
        assert (entries["exp_avg"] == 0).sum() == entries["exp_avg"].numel() // 2


@pytest.mark.parametrize("optimizer", ["muon", "lion", "nadam_kind"])
def test_state_is_made_again_slot_by_slot_and_training_is_the_same(optimizer: str) -> None:
    model, built = trained(optimizer)
    other, fresh = toy(), TorchStore()
    inject_lora(other, FACTORS_ONLY)
    other.load_state_dict(model.state_dict())
    again = build_optimizer(other, name=f"{HERE}:{optimizer}", learning_rate=1e-2)
    for p, q in zip(factors(model).values(), factors(other).values(), strict=True):
        slots = fresh.slots(built, p)
        fresh.make_state(
            again, q, {name: Slot(s.shape, s.dtype) for name, s in slots.items()}, step=fresh.step(built, p)
        )
        for name in slots:
            fresh.write_slot(again, q, name, fresh.read_slot(built, p, name))
        assert again.state[q].keys() == built.state[p].keys()
        for name, value in built.state[p].items():
            assert torch.equal(again.state[q][name], value)
            assert again.state[q][name].dtype == value.dtype
    update(model, built, 2)
    update(other, again, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_scalars_go_back_to_where_they_begin() -> None:
    model, built = trained("nadam_kind")
    assert all(entries["mu_product"] < 1 and entries["step"] == 3 for entries in state(model, built).values())
    restart(model, built, seed=0, index=1)
    assert all(entries["mu_product"] == 1 and entries["step"] == 0 for entries in state(model, built).values())
    update(model, built, 2)
    again = build_optimizer(model, name=f"{HERE}:nadam_kind", learning_rate=1e-2)
    restart(model, built, seed=0, index=2)
    copies = [p.detach().clone() for p in model.parameters()]
    update(model, built, 2)
    learned = [p.detach().clone() for p in model.parameters()]
    for p, value in zip(model.parameters(), copies, strict=True):
        p.data.copy_(value)
    update(model, again, 2)  # a new optimizer does the same
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), learned, strict=True))


def test_integer_moments_without_a_rule_are_named() -> None:
    model, built = trained("lion")
    parameter = model.conv.lora_A
    built.state[parameter]["exp_avg"] = built.state[parameter]["exp_avg"].to(torch.int8)
    with pytest.raises(ValueError, match=r"1 of 6 .* conv\.lora_A: exp_avg\. "):
        restart(model, built, seed=0, index=1)


def test_an_entry_that_is_no_tensor_is_named() -> None:
    model, built = trained("lion")
    built.state[model.conv.lora_A]["speed"] = 3.0
    with pytest.raises(
        ValueError, match=r"Lion did not make all of its state itself, for 1 of 6 .* conv\.lora_A: speed"
    ):
        restart(model, built, seed=0, index=1)
    with pytest.raises(ValueError, match=r"speed = 3\.0: only step may be a number"):
        restart(model, built, seed=0, index=1, optimizer_reset="keep")


class Raises(Reinit, Reset):
    """Fails at the second layer, or factor, that it is asked for."""

    clears_step = True

    def __init__(self) -> None:
        self.num_calls = 0

    def fail_at_the_second_call(self) -> None:
        self.num_calls += 1
        if self.num_calls == 2:
            raise ZeroDivisionError("a policy of ones own")

    def factors(self, layer: Any, key: Any, residual: Any) -> tuple[Tensor, Tensor]:
        self.fail_at_the_second_call()
        return TopDirections().factors(layer, key, residual)

    def mask(self, first_moment: Tensor, ratio: float, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        self.fail_at_the_second_call()
        return torch.ones_like(first_moment, dtype=torch.bool)


@pytest.mark.parametrize("how", ["reinit", "optimizer_reset"])
def test_a_policy_that_fails_leaves_everything_as_it_was(how: str) -> None:
    model, built = trained("lion")
    before = [p.detach().clone() for p in model.parameters()]
    kept = [value.clone() for of in state(model, built).values() for value in of.values()]
    with pytest.raises(ZeroDivisionError, match="a policy of ones own"):
        restart(model, built, seed=0, index=1, **{how: Raises()})
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))
    now = [value for of in state(model, built).values() for value in of.values()]
    assert all(torch.equal(one, other) for one, other in zip(now, kept, strict=True))


class NoMemory(TorchStore):
    """Has none left when the second factor is written."""

    num_writes = 0

    def write(self, parameter: nn.Parameter, values: Tensor) -> None:
        self.num_writes += 1
        if self.num_writes == 2:
            raise torch.OutOfMemoryError("out of memory")
        super().write(parameter, values)


def test_a_failure_in_the_middle_says_that_the_model_is_lost() -> None:
    model, built = trained("lion")
    with pytest.raises(
        BrokenModelError, match=r"out of memory\. .* not usable any more, go on from its last checkpoint"
    ):
        restart(model, built, seed=0, index=1, store=NoMemory())


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16", "int8", "nf4"])
def test_a_policy_sees_the_weight_that_is_written_afterwards_to_the_bit(base_dtype: Any) -> None:
    seen: dict[str, Tensor] = {}

    class Looks(Reinit):
        def factors(self, layer: Any, key: Any, residual: Any) -> tuple[Tensor, Tensor]:
            seen[layer.name] = layer.read_weight()
            return REINITS["kaiming"].factors(layer, key, residual)

    model, built = trained("lion", replace(FACTORS_ONLY, base_dtype=base_dtype))
    before = masters(model)
    restart(model, built, seed=0, index=1, reinit=Looks())
    for name, W in masters(model).items():
        assert torch.equal(seen[name].T if lora_layers(model)[name].transposed else seen[name], W.float())
        assert (W - before[name]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("of_half", "leaves out 5 of the 10 trained parameters"),
        ("no_optimizer", "must build a torch.optim.Optimizer, not Linear"),
        ("nothing", "cannot be imported"),
        ("X", "must be an OptimizerKind or a function, not str"),
    ],
)
def test_an_optimizer_that_is_no_use_is_refused(name: str, message: str) -> None:
    model = toy()
    inject_lora(model, CONFIG)
    with pytest.raises(ValueError, match=message):
        build_optimizer(model, name=f"{HERE}:{name}")


def test_problems_of_an_optimizer_name_the_setting() -> None:
    assert optimizer_problems("adamw") == []
    assert optimizer_problems(f"{HERE}:lion") == []
    [problem] = optimizer_problems("adam", setting="optim.name")
    assert problem.startswith("optim.name = adam: must be adamw, adamw_fused, adamw_8bit, muon, or module:attribute")
    [problem] = optimizer_problems(f"{HERE}:HERE", setting="optim.name")
    assert problem.startswith(f"optim.name = {HERE}:HERE: cannot be imported")


# --- reinit policies -----------------------------------------------------------------------------------------


def test_a_policy_that_looks_at_the_weight_sees_it_merged() -> None:
    model, built = trained("lion", reinit=f"{HERE}:TopDirections")
    for _ in range(2):
        expected = effective_weights(model)
        restart(model, built, seed=0, index=1, reinit=f"{HERE}:TopDirections")
        for name, layer in lora_layers(model).items():
            W = expected[name].T if layer.transposed else expected[name]
            top = torch.linalg.svd(W)[2][:R]
            # Up to signs.
            torch.testing.assert_close((layer.lora_A.double() @ top.T).abs(), torch.eye(R).double(), atol=1e-4, rtol=0)
            assert not layer.lora_B.any()
        update(model, built, 2)


def test_a_policy_gets_a_copy_of_the_weight() -> None:
    class Vandal(Reinit):
        def factors(self, layer: Any, key: Any, residual: Any) -> tuple[Tensor, Tensor]:
            layer.read_weight().zero_()
            return TopDirections().factors(layer, key, residual)

    model, built = trained("lion")
    before = model(X)
    restart(model, built, seed=0, index=1, reinit=Vandal())
    torch.testing.assert_close(model(X), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", ["offset", f"{HERE}:offset", f"{HERE}:Offset", Offset(), Offset])
def test_an_offset_keeps_the_function_and_the_next_merge_is_the_ordinary_one(how: Any) -> None:
    model = toy()
    plain = {name: model.get_submodule(name).weight.detach().double() for name in ("inner", "conv", "outer")}
    before = model(X)
    inject_lora(model, CONFIG, seed=0, reinit=how)
    optimizer = build_optimizer(model, learning_rate=1e-2)
    for index in range(1, 4):
        assert all(layer.lora_B.abs().max() > 0.05 for layer in lora_layers(model).values())
        torch.testing.assert_close(model(X), before, atol=1e-5, rtol=0)
        update(model, optimizer, 2)
        expected, before = effective_weights(model), model(X)
        report = restart(model, optimizer, seed=0, index=index, reinit=how)
        assert report.optimizer_zeroed_fraction == 1
        assert report.merge_error < 1e-5
        for name, W in effective_weights(model).items():
            # Two roundings of W to fp32; what has been learned is far larger.
            torch.testing.assert_close(W, expected[name], atol=1e-6, rtol=0)
            assert (W - plain[name]).abs().max() > 1e-3
    expected = effective_weights(model)
    merge_lora(model)
    for name, W in expected.items():
        torch.testing.assert_close(model.get_submodule(name).weight.double(), W, atol=1e-6, rtol=0)


@pytest.mark.parametrize("base_dtype", ["bfloat16", "int8", "nf4"])
def test_an_offset_comes_out_of_the_exact_weight_and_the_stored_one_is_rounded_again(base_dtype: Any) -> None:
    model = toy()
    inject_lora(model, replace(CONFIG, base_dtype=base_dtype), seed=0)
    optimizer = build_optimizer(model, learning_rate=1e-2)
    update(model, optimizer, 3)
    layers = lora_layers(model)
    exact = {name: W + _delta(layers[name]) for name, W in masters(model).items()}
    report = restart(model, optimizer, seed=0, index=1, reinit=f"{HERE}:offset")
    assert report.master_error < 1e-5
    for name, W in masters(model).items():
        torch.testing.assert_close(W + _delta(layers[name]), exact[name], atol=1e-6, rtol=0)
        layer = layers[name]
        assert torch.equal(layer.weight, layer.weight_format.quantize(W.float()))
    # What the model computes with is off by the rounding of W alone.
    off = max((W - exact[name]).norm() / exact[name].norm() for name, W in effective_weights(model).items())
    assert off < {"bfloat16": 0.005, "int8": 0.02, "nf4": 0.25}[base_dtype]


def _delta(layer: Any) -> Tensor:
    delta: Tensor = layer.scale * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    return delta.T if layer.transposed else delta


def test_merge_error_measures_the_function_whatever_the_new_factors() -> None:
    model = toy()
    inject_lora(model, replace(CONFIG, base_dtype="int8"), seed=0)
    optimizer = build_optimizer(model, learning_rate=1e-2)
    update(model, optimizer, 3)
    before, deltas = effective_weights(model), {name: _delta(layer) for name, layer in lora_layers(model).items()}
    report = restart(model, optimizer, seed=0, index=1, reinit=f"{HERE}:offset")
    after = effective_weights(model)
    expected = max(((after[name] - before[name]).norm() / deltas[name].norm()).item() for name in before)
    assert report.merge_error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("policy", "message"),
    [("Nothing", r"inner: the reinit policy returned A = B = 0"), ("Transposed", r"inner: .* shapes \(\(12, 3\)")],
)
def test_factors_that_are_no_use_are_refused_by_the_name_of_the_layer(policy: str, message: str) -> None:
    model, built = trained("lion")
    with pytest.raises(RuntimeError, match=message):
        restart(model, built, seed=0, index=1, reinit=f"{HERE}:{policy}")
    with pytest.raises(RuntimeError, match=message):
        inject_lora(toy(), CONFIG, reinit=f"{HERE}:{policy}")


@pytest.mark.parametrize("reinit", [f"{HERE}:no_optimizer", "torch.nn:Linear", "kaimin"])
def test_a_name_that_is_no_policy_is_refused_before_anything_is_changed(reinit: str) -> None:
    model = toy()
    with pytest.raises(ValueError, match=f"reinit = {reinit}: must be"):
        inject_lora(model, CONFIG, reinit=reinit)
    assert not lora_layers(model)


def test_factors_begin_once_the_weights_have_values() -> None:
    one, other = toy(), toy()
    inject_lora(one, CONFIG, seed=4, reinit=f"{HERE}:TopDirections")
    inject_lora(other, CONFIG, seed=4, reinit=None)
    assert not torch.equal(one.inner.lora_A, other.inner.lora_A)
    start_factors(other, seed=4, reinit=f"{HERE}:TopDirections")
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        other.conv.lora_B[0, 0] = 1
    with pytest.raises(ValueError, match="lora_B of conv is not zero"):
        start_factors(other, seed=4)


# --- resets --------------------------------------------------------------------------------------------------


def test_a_reset_of_ones_own() -> None:
    model, built = trained("nadam_kind")
    before = {name: {key: v.clone() for key, v in of.items()} for name, of in state(model, built).items()}
    report = restart(model, built, seed=0, index=1, optimizer_reset=f"{HERE}:EverySecond")
    for name, entries in state(model, built).items():
        assert (entries["step"], entries["mu_product"]) == (0, 1)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not entries[moment].flatten()[::2].any()
            assert torch.equal(entries[moment].flatten()[1::2], before[name][moment].flatten()[1::2])
    assert 0.5 <= report.optimizer_zeroed_fraction < 0.7


def test_a_mask_of_another_shape_is_refused() -> None:
    model, built = trained("lion")
    with pytest.raises(RuntimeError, match=r"inner\.lora_A: a mask must be bool \(3, 12\), not torch.bool \(1, 12\)"):
        restart(model, built, seed=0, index=1, optimizer_reset=f"{HERE}:FirstRow")
