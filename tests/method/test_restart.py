"""A restart: what it merges, draws, resets and reports, and what it leaves alone."""

import gc
import math
import weakref
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from relora import LoRAConfig, build_optimizer, inject_lora, merge_lora, restart
from relora.method.lora import lora_layers
from relora.method.merge import factor_singular_values
from relora.method.names import canonical
from relora.method.optimizer import parameter_groups
from relora.method.reinit import REINITS, DrawKey, LayerView, Offset
from tests.helpers import toy
from tests.helpers.toy import LEARNING_RATE, R, copies, factors, fill_moments, full_parameters, moments, trained, update

RESETS = ("zero", "magnitude", "random", "keep")
# A (2, 3) of kaiming for the key (3, 4, "x.y"), and of orthogonal for its draw 2.
KAIMING = [-0.00145883, -0.41930243, 0.31408069, 0.18781161, -0.19379297, 0.39782688]
ORTHOGONAL = [-0.28510839, -0.34356123, -0.36607680, 0.09361900, 0.37722216, -0.42693350]
every_reset = pytest.mark.parametrize("reset", RESETS)


def numerical_rank(matrix: Tensor, *, relative_to_largest: float = 1e-4) -> int:
    """Number of singular values above `relative_to_largest` times the largest, in float64."""
    values = torch.linalg.svdvals(matrix.double())
    return int((values > relative_to_largest * values[0]).sum())


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All numbers of a run."""
    state = [v for p in model.parameters() for v in optimizer.state[p].values()] if optimizer.state else []
    return [t.detach().clone() for t in [*model.parameters(), *state]]


def assert_unchanged(now: list[Tensor], before: list[Tensor]) -> None:
    assert len(now) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


# --- the optimizer's state ---------------------------------------------------------------------------------


def test_zero_clears_moments_and_step_count() -> None:
    model, optimizer = trained()
    assert all(v.any() for p in factors(model).values() for v in optimizer.state[p].values())
    report = restart(model, optimizer, seed=0, index=1, optimizer_reset="zero")
    state = [v for p in factors(model).values() for v in optimizer.state[p].values()]
    assert len(state) == 6 * 3
    assert not any(v.any() for v in state)
    assert report.optimizer_zeroed_fraction == 1


def test_zero_clears_a_step_count_that_is_a_plain_number() -> None:
    model, optimizer = trained()
    for p in factors(model).values():
        optimizer.state[p]["step"] = 3
    restart(model, optimizer, seed=0, index=1)
    assert [optimizer.state[p]["step"] for p in factors(model).values()] == [0] * 6


@pytest.mark.parametrize("ratio", [0.9, 0.999, 0.5, 1 / 3, 1.0, 1e-6])
@pytest.mark.parametrize("reset", ["magnitude", "random"])
def test_pruning_zeroes_exactly_the_ratio_and_keeps_the_rest_and_the_step(reset: Any, ratio: float) -> None:
    model, optimizer = trained()
    fill_moments(optimizer, factors(model))
    before = {name: copies(moments(optimizer, p)) for name, p in factors(model).items()}
    report = restart(model, optimizer, seed=0, index=1, optimizer_reset=reset, prune_ratio=ratio)
    pruned, total = 0, 0
    for name, p in factors(model).items():
        for slot, values in moments(optimizer, p).items():
            gone = values == 0
            assert gone.sum() == math.floor(ratio * p.numel())
            assert torch.equal(values, before[name][slot].masked_fill(gone, 0))
            pruned, total = pruned + int(gone.sum()), total + gone.numel()
        assert optimizer.state[p]["step"] == 3
    assert report.optimizer_zeroed_fraction == pytest.approx(pruned / total, abs=1e-12)


def test_magnitude_prunes_where_the_first_moment_is_smallest() -> None:
    model, optimizer = trained()
    fill_moments(optimizer, factors(model))
    before = {name: optimizer.state[p]["exp_avg"].abs() for name, p in factors(model).items()}
    restart(model, optimizer, seed=0, index=1, optimizer_reset="magnitude", prune_ratio=0.7)
    for name, p in factors(model).items():
        first, second = (values == 0 for values in moments(optimizer, p).values())
        assert before[name][first].max() < before[name][~first].min()
        assert torch.equal(first, second)


@every_reset
@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.99])
def test_no_update_after_a_restart_is_out_of_proportion(reset: Any, ratio: float) -> None:
    # A has no gradient in the first update: a first moment whose second is gone would be divided by epsilon.
    model, optimizer = trained()
    for index in range(1, 4):
        update(model, optimizer, 10)
        restart(model, optimizer, seed=0, index=index, optimizer_reset=reset, prune_ratio=ratio)
        for _ in range(3):
            before = copies(factors(model))
            update(model, optimizer)
            assert max((p - before[name]).abs().max() for name, p in factors(model).items()) < 5 * LEARNING_RATE


def test_magnitude_counts_exactly_among_equal_values() -> None:
    model, optimizer = trained()
    for p in factors(model).values():
        for values in moments(optimizer, p).values():
            values.fill_(0.5)
    restart(model, optimizer, seed=0, index=1, optimizer_reset="magnitude", prune_ratio=0.9)
    for p in factors(model).values():
        for values in moments(optimizer, p).values():
            assert (values == 0).sum() == math.floor(0.9 * p.numel())


def random_masks(index: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """What `random` prunes, after a check that it is the same in all moments of a factor."""
    torch.manual_seed(index)  # of no influence
    model, optimizer = trained()
    fill_moments(optimizer, factors(model))
    restart(model, optimizer, seed=seed, index=index, optimizer_reset="random", prune_ratio=0.5)
    masks = {}
    for name, p in factors(model).items():
        first, second = (values == 0 for values in moments(optimizer, p).values())
        assert torch.equal(first, second)
        masks[name] = first
    return masks


def test_random_prunes_the_same_in_both_moments_and_by_its_key_alone() -> None:
    one, again, later, other = random_masks(), random_masks(), random_masks(index=2), random_masks(seed=1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], later[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["inner.lora_B"].flatten()[:30], one["outer.lora_B"].flatten())


def test_keep_leaves_the_state() -> None:
    model, optimizer = trained()
    before = {name: copies(optimizer.state[p]) for name, p in factors(model).items()}
    report = restart(model, optimizer, seed=0, index=1, optimizer_reset="keep")
    for name, p in factors(model).items():
        assert all(torch.equal(v, before[name][key]) for key, v in optimizer.state[p].items())
    assert report.optimizer_zeroed_fraction < 0.5


@every_reset
def test_parameters_trained_in_full_and_their_state_are_left_alone(reset: Any) -> None:
    model, optimizer = trained()
    full = full_parameters(model)
    assert len(full) == 4
    values, state = copies(full), {name: copies(optimizer.state[p]) for name, p in full.items()}
    restart(model, optimizer, seed=0, index=1, optimizer_reset=reset)
    for name, p in full.items():
        assert torch.equal(p, values[name])
        assert all(torch.equal(v, state[name][key]) for key, v in optimizer.state[p].items())


@every_reset
def test_all_is_done_in_place(reset: Any) -> None:
    model, optimizer = trained()

    def places() -> list[tuple[int, int]]:
        state = [v for p in model.parameters() if p.requires_grad for v in optimizer.state[p].values()]
        return [(id(t), t.data_ptr()) for t in [*model.parameters(), *state]]

    before = places()
    flags = [p.requires_grad for p in model.parameters()]
    restart(model, optimizer, seed=0, index=1, optimizer_reset=reset)
    assert places() == before
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("reset", ["zero", "magnitude", "random"])
def test_every_moment_of_amsgrad_is_reset(reset: Any) -> None:
    model, optimizer = trained(amsgrad=True)
    fill_moments(optimizer, factors(model))
    restart(model, optimizer, seed=0, index=1, optimizer_reset=reset, prune_ratio=0.8)
    for p in factors(model).values():
        slots = moments(optimizer, p)
        assert set(slots) == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
        pruned = p.numel() if reset == "zero" else math.floor(0.8 * p.numel())
        assert {int((v == 0).sum()) for v in slots.values()} == {pruned}


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_training_after_a_zero_reset_is_training_with_a_new_optimizer(options: dict[str, bool]) -> None:
    results = []
    for fresh in (False, True):
        model, optimizer = trained(**options)
        for p in full_parameters(model).values():
            p.requires_grad_(False)
        restart(model, optimizer, seed=0, index=1)
        if fresh:
            groups = parameter_groups(model, weight_decay=0.0)
            optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), **options)
        update(model, optimizer, 3)
        results.append(copies(factors(model)))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_magnitude_is_exact_past_16_million_entries() -> None:
    d_in = 2**24 + 1000  # torch.quantile gives up at 2**24
    model = nn.Sequential(nn.Linear(d_in, 1, bias=False))
    inject_lora(model, LoRAConfig(r=1, target_modules=["0"]))
    A, B = factors(model).values()
    optimizer = torch.optim.AdamW([A, B])
    first = torch.rand(A.shape).add_(0.1)
    optimizer.state[A] = {"step": torch.tensor(1.0), "exp_avg": first}
    optimizer.state[B] = {"step": torch.tensor(1.0), "exp_avg": torch.ones_like(B)}
    restart(model, optimizer, seed=0, index=1, optimizer_reset="magnitude", prune_ratio=0.999)
    assert (first == 0).sum() == math.floor(0.999 * A.numel())
    assert first[first != 0].min() > 1.0


# --- what is refused, with nothing changed -----------------------------------------------------------------


@pytest.mark.parametrize("reset", ["zero", "magnitude", "random"])
def test_state_that_is_missing_is_an_error_that_names_it(reset: Any) -> None:
    model, optimizer = trained()
    del optimizer.state[model.conv.lora_B]
    before = [t.detach().clone() for t in model.parameters()]
    with pytest.raises(ValueError, match=r"1 of 6 .*conv\.lora_B"):
        restart(model, optimizer, seed=0, index=1, optimizer_reset=reset)
    assert_unchanged(list(model.parameters()), before)


def test_a_restart_before_the_first_update_is_an_error_unless_state_is_kept() -> None:
    model = toy.toy()
    inject_lora(model, toy.CONFIG)
    optimizer = build_optimizer(model)
    with pytest.raises(ValueError, match="6 of 6"):
        restart(model, optimizer, seed=0, index=1)
    restart(model, optimizer, seed=0, index=1, optimizer_reset="keep")


def test_an_optimizer_of_another_model_is_an_error() -> None:
    model, _ = trained()
    _, optimizer = trained()
    with pytest.raises(ValueError, match="6 of 6"):
        restart(model, optimizer, seed=0, index=1)


def test_a_model_without_lora_layers_is_an_error() -> None:
    model = toy.toy()
    with pytest.raises(ValueError, match="no LoRA layers"):
        restart(model, torch.optim.AdamW(model.parameters()), seed=0, index=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": 0}, "index must be >= 1.* not 0"),
        ({"index": -1}, "not -1"),
        ({"optimizer_reset": "prune"}, "optimizer_reset = prune: must be zero, magnitude, random, keep, or module:"),
        ({"reinit": "gaussian"}, "reinit = gaussian: must be kaiming, orthogonal, offset, or module:attribute"),
        ({"reinit": torch.nn.Linear}, "reinit = .*Linear.* must be a Reinit"),
        ({"optimizer_reset": REINITS["kaiming"]}, "optimizer_reset = .* must be a Reset, not Kaiming"),
        ({"optimizer_reset": "random", "prune_ratio": 0.0}, "prune_ratio .* not 0.0"),
        ({"optimizer_reset": "random", "prune_ratio": 1.5}, "prune_ratio .* not 1.5"),
        ({"prune_ratio": math.nan}, "prune_ratio .* not nan"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_changed(options: dict[str, Any], message: str) -> None:
    model, optimizer = trained()
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=message):
        restart(model, optimizer, **{"seed": 0, "index": 1, **options})
    assert_unchanged(everything(model, optimizer), before)


@every_reset
@pytest.mark.parametrize("which", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("placement", [Shard(0), Replicate()])
def test_a_dtensor_is_refused(mesh: DeviceMesh, placement: Any, which: str, reset: Any) -> None:
    model, optimizer = trained()
    plain = getattr(model.outer, which)
    sharded = nn.Parameter(distribute_tensor(plain.detach(), mesh, [placement]))
    setattr(model.outer, which, sharded)
    optimizer.state[sharded] = optimizer.state.pop(plain, {})
    before = model.inner.weight.clone()
    with pytest.raises(ValueError, match="DTensor"):
        restart(model, optimizer, seed=0, index=1, optimizer_reset=reset)
    assert torch.equal(model.inner.weight, before)


@pytest.mark.parametrize("which", ["weight", "lora_A", "lora_B"])
def test_a_partition_of_zero_3_is_refused(which: str) -> None:
    model, optimizer = trained()
    before = model.inner.weight.clone()
    # DeepSpeed leaves an empty tensor in the place of a parameter that it has partitioned.
    getattr(model.outer, which).data = torch.empty(0)
    with pytest.raises(ValueError, match=rf"outer\.{which}: has shape \(0,\) here, \(\d+, \d+\) in full: .*ZeRO-3"):
        restart(model, optimizer, seed=0, index=1, optimizer_reset="keep")
    assert torch.equal(model.inner.weight, before)


def test_factors_in_a_flat_partition_of_zero_1_are_refused() -> None:
    model, _ = trained()
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in factors(model).values()]))
    optimizer = torch.optim.AdamW([flat])
    flat.grad = torch.ones_like(flat)
    optimizer.step()
    before = weights(model)
    with pytest.raises(ValueError, match="6 of 6 LoRA factors have no state"):
        restart(model, optimizer, seed=0, index=1)
    assert all(torch.equal(W, before[name]) for name, W in weights(model).items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
def test_a_factor_that_is_not_finite_is_refused_before_anything_is_changed(which: str, value: float) -> None:
    model, optimizer = trained()
    with torch.no_grad():
        getattr(model.outer, which)[1, 2] = value
    before = weights(model)
    with pytest.raises(ValueError, match=rf"1 of 6 LoRA factors are not finite, .* outer\.{which}"):
        restart(model, optimizer, seed=0, index=1)
    assert all(torch.equal(W, before[name]) for name, W in weights(model).items())


def test_a_factor_too_large_to_be_multiplied_and_a_weight_that_is_not_finite_are_refused_as_well() -> None:
    model, optimizer = trained()
    with torch.no_grad():
        model.outer.lora_A[0, 0] = 1e30
    before = everything(model, optimizer)
    for verb in (lambda: restart(model, optimizer, seed=0, index=1), lambda: merge_lora(model)):
        with pytest.raises(ValueError, match=r"1 of 6 LoRA factors are not finite, or too large .* outer\.lora_A"):
            verb()
    assert_unchanged(everything(model, optimizer), before)
    with torch.no_grad():
        model.outer.lora_A[0, 0] = 0
        model.outer.weight[0, 0] = math.nan
    before = weights(model)
    with pytest.raises(ValueError, match=r"1 of 3 weights are not finite: outer\.weight"):
        restart(model, optimizer, seed=0, index=1)
    assert all(torch.equal(W.nan_to_num(), before[name].nan_to_num()) for name, W in weights(model).items())


def test_sharding_a_wrapped_model_does_not_leave_the_whole_weights_in_memory(mesh: DeviceMesh) -> None:
    model, _ = trained()
    whole = [weakref.ref(layer.weight) for layer in lora_layers(model).values()]
    assert all(weight() is not None for weight in whole)
    fully_shard(model, mesh=mesh)
    gc.collect()
    assert [weight() for weight in whole] == [None] * 3


# --- what is drawn -----------------------------------------------------------------------------------------


def drawn_A(model: nn.Module, *, seed: int = 0, index: int = 1) -> dict[str, Tensor]:
    optimizer = torch.optim.AdamW(factors(model).values())
    restart(model, optimizer, seed=seed, index=index, optimizer_reset="keep")
    return {name: layer.lora_A.detach().clone() for name, layer in lora_layers(model).items()}


def wrapped(*names: str) -> nn.Module:
    """Equal layers under the given names, registered in the given order."""
    model = nn.Module()
    for name in names:
        model.add_module(name, nn.Linear(8, 8))
    inject_lora(model, LoRAConfig(r=R, target_modules=list(names)))
    return model


def test_draws_depend_on_seed_index_and_name_alone() -> None:
    torch.manual_seed(1)
    one = drawn_A(wrapped("a", "b", "c"))
    torch.manual_seed(2)
    other = drawn_A(wrapped("c", "z", "a"))
    assert torch.equal(one["a"], other["a"])
    assert torch.equal(one["c"], other["c"])
    different = [
        *one.values(),
        *drawn_A(wrapped("a"), index=2).values(),
        *drawn_A(wrapped("a"), seed=1).values(),
    ]
    for i, A in enumerate(different):
        assert not any(torch.equal(A, B) for B in different[:i])


def test_a_restart_leaves_the_global_random_state_alone() -> None:
    model, optimizer = trained()
    before = torch.get_rng_state()
    for index, reset in enumerate(RESETS, start=1):
        restart(model, optimizer, seed=0, index=index, optimizer_reset=reset)
        update(model, optimizer)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_are_the_same_under_wrappers() -> None:
    plain = drawn_A(trained()[0])

    compiled = torch.compile(trained()[0], backend="eager")
    replicated = nn.ModuleDict({"module": trained()[0]})  # the names that DistributedDataParallel gives
    both = nn.ModuleDict({"module": torch.compile(trained()[0], backend="eager")})
    checkpointed = trained()[0]
    checkpointed.conv = checkpoint_wrapper(checkpointed.conv)
    assert "conv._checkpoint_wrapped_module.weight" in dict(checkpointed.named_parameters())

    for model in (compiled, replicated, both, checkpointed):
        A = drawn_A(model)
        assert A.keys() == plain.keys()
        assert all(torch.equal(A[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    "name",
    [
        "module.h.0.fc.weight",
        "_orig_mod.h.0.fc.weight",
        "module._orig_mod.h.0.fc.weight",
        "_orig_mod.module.h.0.fc.weight",
        "_fsdp_wrapped_module.h.0._fsdp_wrapped_module.fc.weight",
        "h.0._checkpoint_wrapped_module.fc.weight",
        "h.0._orig_mod.fc.weight",
        "h.0.fc.weight",
    ],
)
def test_canonical_names_carry_no_wrapper(name: str) -> None:
    assert canonical(name) == "h.0.fc.weight"


def test_canonical_leaves_the_models_own_names() -> None:
    assert canonical("encoder.module.fc.weight") == "encoder.module.fc.weight"


def test_injection_is_draw_zero_and_a_restart_draws_the_next() -> None:
    model, optimizer = trained(num_updates=0)
    draws = [draw("kaiming", R, 12, key=DrawKey(0, index, "inner")) for index in (0, 1)]
    assert torch.equal(model.inner.lora_A, draws[0])
    restart(model, optimizer, seed=0, index=1, optimizer_reset="keep")
    assert torch.equal(model.inner.lora_A, draws[1])
    assert not torch.equal(*draws)


def draw(reinit: str, r: int, d_in: int, key: DrawKey = DrawKey(0, 1, "x")) -> Tensor:  # noqa: B008
    """A (r, d_in) of a policy that does not look at W."""

    def no_weight() -> Tensor:
        raise AssertionError("this policy needs no weight")

    A, B = REINITS[reinit].factors(LayerView(key.name, r, d_in, 7, 0.5, no_weight), key, None)
    assert B.shape == (7, r)
    assert not B.any()
    return A


def test_draws_stay_what_they_have_always_been() -> None:
    # As drawn by version 0.1.0: a run that is resumed, or done again, must find the same.
    kaiming = draw("kaiming", 2, 3, DrawKey(3, 4, "x.y"))
    orthogonal = draw("orthogonal", 2, 3, DrawKey(3, 4, "x.y", draw_index=2))
    assert kaiming.flatten().tolist() == pytest.approx(KAIMING, abs=1e-7)
    assert orthogonal.flatten().tolist() == pytest.approx(ORTHOGONAL, abs=1e-6)


def test_kaiming_is_uniform_up_to_its_bound() -> None:
    A = draw("kaiming", 64, 400)
    bound = 1 / math.sqrt(400)
    assert 0.999 * bound < A.abs().max() <= bound
    assert A.mean().abs() < 0.02 * bound
    assert A.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("shape", [(8, 40), (16, 16), (1, 5)])
def test_orthogonal_rows_are_orthogonal_and_as_long_as_kaimings(shape: tuple[int, int]) -> None:
    A = draw("orthogonal", *shape).double()
    torch.testing.assert_close(A @ A.T, torch.eye(shape[0], dtype=torch.float64) / 3, atol=1e-6, rtol=0)
    kaiming = draw("kaiming", *shape)
    assert not torch.equal(A.float(), kaiming)


@pytest.mark.parametrize(("d_out", "d_in"), [(7, 40), (40, 9), (4, 4)])
def test_an_offset_is_orthogonal_balanced_and_as_large_as_asked(d_out: int, d_in: int) -> None:
    layer = LayerView("x", 4, d_in, d_out, 0.5, Mock(side_effect=AssertionError("this policy needs no weight")))
    A, B = (factor.double() for factor in Offset(0.3).factors(layer, DrawKey(0, 1, "x"), None))
    squared = 0.3 / 0.5 * torch.eye(4, dtype=torch.float64)  # of the length of a row of A and of a column of B
    torch.testing.assert_close(A @ A.T, squared, atol=1e-6, rtol=0)
    torch.testing.assert_close(B.T @ B, squared, atol=1e-6, rtol=0)
    largest = torch.linalg.svdvals(0.5 * B @ A)[:4]
    torch.testing.assert_close(largest, torch.full_like(largest, 0.3), atol=1e-6, rtol=0)
    for other in (DrawKey(1, 1, "x"), DrawKey(0, 2, "x"), DrawKey(0, 1, "y"), DrawKey(0, 1, "x", draw_index=1)):
        for factor, redrawn in zip((A, B), Offset(0.3).factors(layer, other, None), strict=True):
            assert (factor - redrawn).abs().max() > 0.05
    with pytest.raises(ValueError, match="norm must be > 0 and finite, not 0"):
        Offset(0)


def test_the_reinit_asked_for_is_the_one_that_is_drawn() -> None:
    model, optimizer = trained()
    restart(model, optimizer, seed=5, index=3, reinit="orthogonal")
    for name, layer in lora_layers(model).items():
        expected = draw("orthogonal", R, layer.in_features, key=DrawKey(5, 3, name))
        assert torch.equal(layer.lora_A, expected)


# --- what is merged ----------------------------------------------------------------------------------------


def float64_delta(layer: Any) -> Tensor:
    delta: Tensor = 3.7 / R * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    return delta.T if layer.transposed else delta


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in lora_layers(model).items()}


def bfloat16_base(model: nn.Module) -> None:
    for layer in lora_layers(model).values():
        layer.weight.data = layer.weight.data.bfloat16()


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_report_against_float64(base: str) -> None:
    model, optimizer = trained()
    if base == "bfloat16":
        bfloat16_base(model)
    old, delta = weights(model), {name: float64_delta(layer) for name, layer in lora_layers(model).items()}
    report = restart(model, optimizer, seed=0, index=1)
    errors, ranks = [], []
    for name, W in weights(model).items():
        assert W.dtype == getattr(torch, base)
        errors.append(((W.double() - old[name].double() - delta[name]).norm() / delta[name].norm()).item())
        p = torch.linalg.svdvals(delta[name])[:R]
        p = p / p.sum()
        ranks.append(math.exp(-(p * p.log()).sum().item()))
    assert report.merge_error == pytest.approx(max(errors), rel=0.05)
    assert report.update_effective_rank == pytest.approx(sum(ranks) / len(ranks), rel=1e-6)
    assert 1 < report.update_effective_rank < R
    assert report.merge_error < 1e-5 if base == "float32" else 1e-3 < report.merge_error < 1


def test_the_report_of_a_restart_without_an_update_is_finite() -> None:
    model, optimizer = trained(num_updates=0)
    report = restart(model, optimizer, seed=0, index=1, optimizer_reset="keep")
    assert (report.merge_error, report.update_effective_rank) == (0, 0)


@pytest.mark.parametrize("verb", ["restart", "merge_lora"])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_merging_under_autocast_is_exact(verb: str, factor_dtype: torch.dtype) -> None:
    model, optimizer = trained(num_updates=8)
    for p in factors(model).values():
        p.data = p.data.to(factor_dtype)
    layers = lora_layers(model)
    expected = {name: layer.weight.double() + float64_delta(layer) for name, layer in layers.items()}
    sizes = {name: float64_delta(layer).abs().max() for name, layer in layers.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if verb == "restart":
            restart(model, optimizer, seed=0, index=1, optimizer_reset="keep")
        else:
            merge_lora(model)
    for name in layers:
        W = model.get_submodule(name).weight.double()
        assert sizes[name] > 100 * 2e-7
        torch.testing.assert_close(W, expected[name], atol=2e-7, rtol=0)


@pytest.mark.parametrize("precision", ["tf32", "ieee", "none"])
def test_merging_leaves_the_users_matmul_precision_as_it_is(precision: str) -> None:
    model, _ = trained()
    matmul = torch.backends.cuda.matmul
    was = matmul.fp32_precision
    try:
        matmul.fp32_precision = precision
        lora_layers(model)["inner"].delta()
        assert matmul.fp32_precision == precision
    finally:
        matmul.fp32_precision = was


def test_merge_equals_restart() -> None:
    (one, optimizer), (other, _) = trained(), trained()
    restart(one, optimizer, seed=0, index=1)
    merge_lora(other)
    assert all(torch.equal(W, other.get_submodule(name).weight) for name, W in weights(one).items())


@pytest.mark.parametrize("reset", ["zero", "magnitude"])
def test_rank_grows_by_r_with_every_restart(reset: Any) -> None:
    model, optimizer = trained(num_updates=0)
    start = {name: W.double() for name, W in weights(model).items()}
    for index in range(5):
        if index:
            update(model, optimizer, 3)
            restart(model, optimizer, seed=0, index=index, optimizer_reset=reset)
        update(model, optimizer)
        for name, layer in lora_layers(model).items():
            learned = layer.weight.double() + float64_delta(layer) - start[name]
            assert numerical_rank(learned) == min((index + 1) * R, *learned.shape), (name, index)


def test_singular_values_of_the_update_without_forming_it() -> None:
    for layer in lora_layers(trained()[0]).values():
        values = factor_singular_values(layer.lora_A.detach(), layer.lora_B.detach(), layer.scale)
        torch.testing.assert_close(values, torch.linalg.svdvals(float64_delta(layer))[:R], rtol=1e-6, atol=1e-9)


def test_numerical_rank_and_its_threshold() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1e-2, 1.1e-4, 0.9e-4, 0.0]))
    assert numerical_rank(matrix) == 3
    assert numerical_rank(matrix, relative_to_largest=1e-3) == 2
    assert numerical_rank(torch.zeros(3, 2)) == 0


def test_a_restart_neither_recompiles_nor_breaks_the_graph() -> None:
    model, optimizer = trained()
    compilations = 0

    def counting(graph: Any, _: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    compiled = torch.compile(model, backend=counting, fullgraph=True)
    x = torch.randn(4, 12)
    before = compiled(x)
    restart(compiled, optimizer, seed=0, index=1)
    torch.testing.assert_close(compiled(x), before, atol=1e-5, rtol=0)
    assert compilations == 1
