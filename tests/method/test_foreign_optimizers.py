"""Restarts of optimizers of torch, bitsandbytes, schedulefree and of ones own: all state of a factor begins anew."""

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import schedulefree
import torch
from torch import Tensor, nn, optim
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from relora import LoRAConfig, inject_lora, restart
from relora.engines.fsdp2 import FSDP2Store
from relora.method.lora import lora_layers
from relora.method.optimizer import parameter_groups
from tests.helpers.custom_policies import Lion, Prodigy
from tests.helpers.toy import factors, full_parameters
from tests.helpers.wide import NARROW, WIDE, R, update, wrapped

SIXTEEN = {"betas": (0.9, 0.95)}
Build = Callable[[list[dict[str, Any]]], Optimizer]


def averaged(kind: Any, **options: Any) -> Build:
    def build(groups: list[dict[str, Any]]) -> Optimizer:
        optimizer: Any = kind(groups, lr=1e-2, **options)
        optimizer.train()
        return optimizer  # type: ignore[no-any-return]

    return build


def of(kind: Any, **options: Any) -> Build:
    return lambda groups: kind(groups, **{"lr": 1e-2} | options)


NOT_BY_PARAMETER = {"Optimizer", "LBFGS", "SparseAdam"}  # the second is refused below, the third wants sparse gradients
TORCH = {name: kind for name, kind in vars(optim).items() if isinstance(kind, type) and issubclass(kind, Optimizer)}
CASES: dict[str, Build] = {
    **{name: of(kind) for name, kind in TORCH.items() if name not in NOT_BY_PARAMETER},
    "SGD with momentum": of(optim.SGD, momentum=0.9, nesterov=True),
    "SGD with dampening": of(optim.SGD, momentum=0.9, dampening=0.5),
    "AMSGrad": of(optim.AdamW, amsgrad=True),
    "fused": of(optim.AdamW, fused=True),
    "Adagrad from 0.1": of(optim.Adagrad, initial_accumulator_value=0.1),
    "centered RMSprop": of(optim.RMSprop, centered=True, momentum=0.9),
    "Lion": of(Lion, **SIXTEEN),
    "AdEMAMix": of(bitsandbytes.optim.AdEMAMix),
    "AdEMAMix8bit": of(bitsandbytes.optim.AdEMAMix8bit),
    "AdamW8bit": of(bitsandbytes.optim.AdamW8bit),
    "AdamW of bitsandbytes": of(bitsandbytes.optim.AdamW),
    "Lion8bit": of(bitsandbytes.optim.Lion8bit),
    "SGD8bit": of(bitsandbytes.optim.SGD8bit, momentum=0.9),
    "Adagrad8bit": of(bitsandbytes.optim.Adagrad8bit),
    "RMSprop8bit": of(bitsandbytes.optim.RMSprop8bit),
    "LAMB8bit": of(bitsandbytes.optim.LAMB8bit),
    "schedule-free AdamW": averaged(schedulefree.AdamWScheduleFree, warmup_steps=4),
    "schedule-free RAdam": averaged(schedulefree.RAdamScheduleFree),
    "schedule-free SGD": averaged(schedulefree.SGDScheduleFree),
}


def trained(build: Build, *, only_factors: bool = False, mixed: bool = False) -> tuple[nn.Module, Optimizer]:
    """A network of two wrapped layers, and a norm that is trained in full; three updates old."""
    model = wrapped(nn.LayerNorm(NARROW), modules_to_save=None if only_factors else "rest")
    groups = parameter_groups(model, weight_decay=0.01)
    if mixed:
        groups = [{"params": [p for group in groups for p in group["params"]]}]
    optimizer = build(groups)
    update(model, optimizer, 3)
    return model, optimizer


def everything(model: nn.Module, optimizer: Optimizer) -> Any:
    """All that a refused restart must leave alone."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    state = [optimizer.state.get(p) for p in model.parameters()]
    return copy.deepcopy([[p.detach() for p in model.parameters()], state, groups, torch.get_rng_state()])


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def with_new_factors(model: nn.Module, optimizer: Optimizer, build: Build) -> tuple[nn.Module, Optimizer]:
    """The same model, and a new optimizer that knows of the old one's state what is not of the factors."""
    twin = copy.deepcopy(model)
    fresh, of_factors = build(parameter_groups(twin, weight_decay=0.01)), {id(p) for p in factors(model).values()}
    for old, p in zip(model.parameters(), twin.parameters(), strict=True):
        if old.requires_grad and id(old) not in of_factors:
            fresh.state[p] = copy.deepcopy(optimizer.state[old])
    for old_group, group in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        if old_group["name"] != "lora":
            group |= {key: value for key, value in old_group.items() if key != "params"}
    return twin, fresh


@pytest.mark.parametrize("case", CASES)
def test_after_a_restart_the_factors_are_new_to_the_optimizer_and_nothing_else_is(case: str) -> None:
    model, optimizer = trained(CASES[case], only_factors=case == "Muon")
    full = {name: copy.deepcopy(optimizer.state[p]) for name, p in full_parameters(model).items()}
    report = restart(model, optimizer, seed=0, index=1)
    assert report.optimizer_zeroed_fraction == (case not in ("SGD", "schedule-free SGD"))  # without moments
    assert all(same(full[name], optimizer.state[p]) for name, p in full_parameters(model).items())
    twin, fresh = with_new_factors(model, optimizer, CASES[case])
    before = [p.detach().clone() for p in factors(model).values()]
    update(model, optimizer, 8)
    update(twin, fresh, 8)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    # RAdam's first updates are none, and LAMB moves no parameter that is zero.
    assert not all(torch.equal(p, old) for p, old in zip(factors(model).values(), before, strict=True))
    for p, q in zip(factors(model).values(), factors(twin).values(), strict=True):
        assert same(dict(optimizer.state[p]), dict(fresh.state[q]))


def test_scalars_and_sums_go_back_to_where_they_begin() -> None:
    model, optimizer = trained(CASES["NAdam"])
    restart(model, optimizer, seed=0, index=1)
    assert {optimizer.state[p]["mu_product"].item() for p in factors(model).values()} == {1}
    model, optimizer = trained(CASES["Adafactor"])
    restart(model, optimizer, seed=0, index=1)
    assert not any(optimizer.state[p][key].any() for p in factors(model).values() for key in ("row_var", "col_var"))


@pytest.mark.parametrize("reset", ["zero", "magnitude", "keep"])
def test_an_iterate_follows_its_factor_whatever_the_reset(reset: str) -> None:
    model, optimizer = trained(CASES["schedule-free AdamW"])
    restart(model, optimizer, seed=0, index=1, optimizer_reset=reset, prune_ratio=0.5)
    [counted] = [group["k"] for group in optimizer.param_groups if group["name"] == "lora"]
    assert counted == (0 if reset == "zero" else 3)
    for p in factors(model).values():
        assert torch.equal(optimizer.state[p]["z"], p)
        num_zero = (optimizer.state[p]["exp_avg_sq"] == 0).sum()
        assert num_zero == {"zero": p.numel(), "magnitude": p.numel() // 2, "keep": 0}[reset]


def test_momentum_without_a_step_count_is_pruned_exactly() -> None:
    model, optimizer = trained(CASES["SGD with momentum"])
    restart(model, optimizer, seed=0, index=1, optimizer_reset="magnitude", prune_ratio=0.75)
    for p in factors(model).values():
        assert (optimizer.state[p]["momentum_buffer"] == 0).sum() == 3 * p.numel() // 4


class Lookahead(Optimizer):
    """arXiv 1907.08610: slow weights beside those of the optimizer that it wraps."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr})
        self.fast = optim.AdamW(groups, lr=lr)
        self.slow = [p.detach().clone() for group in self.fast.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        self.fast.step()
        for p, slow in zip((p for group in self.param_groups for p in group["params"]), self.slow, strict=True):
            self.state[p]["moved"] = (p.detach() - slow).norm()


class Total(Optimizer):
    """Its attribute counts the updates of all parameters together."""

    num_updates = 0

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr})
        self.num_updates = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        self.num_updates += 1
        for p in (p for group in self.param_groups for p in group["params"]):
            p.sub_(p.grad, alpha=1e-2 / self.num_updates)
            self.state[p]["exp_avg"] = p.grad.clone()


@pytest.mark.parametrize(
    ("build", "reset", "reason"),
    [
        (
            of(Prodigy),
            "zero",
            r"Prodigy .* it counts updates beside the state of a parameter \(d_numerator, .*\), for 4 of 4",
        ),
        (of(Lookahead), "zero", r"Lookahead .* it keeps fast beside its state"),
        (of(Total), "zero", r"Total .* it counts updates beside the state of a parameter \(num_updates\)"),
        (
            of(optim.Adafactor),
            "magnitude",
            r"Adafactor .* pruned entries are no new ones \(col_var, row_var\), for 4 of 4 .* 0\.lora_A",
        ),
        (of(optim.ASGD), "random", r"ASGD .* pruned entries are no new ones \(ax, eta, mu, step\)"),
        (of(optim.Rprop), "magnitude", r"only optimizer_reset = zero can clear"),
    ],
)
def test_what_cannot_be_cleared_is_refused_with_its_reason_and_nothing_is_changed(
    build: Build, reset: str, reason: str
) -> None:
    model, optimizer = trained(build)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=reason):
        restart(model, optimizer, seed=0, index=1, optimizer_reset=reset)
    assert same(everything(model, optimizer), before)


def test_a_group_that_counts_updates_must_be_the_factors_own() -> None:
    model, optimizer = trained(CASES["schedule-free AdamW"], mixed=True)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=r"counts the updates of a group \(k, weight_sum, .*\) that has other"):
        restart(model, optimizer, seed=0, index=1)
    assert same(everything(model, optimizer), before)


def test_an_optimizer_with_one_state_for_all_parameters_is_refused_for_that() -> None:
    model, _ = trained(CASES["AdamW"], only_factors=True)
    optimizer = optim.LBFGS(list(factors(model).values()))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(torch.ones(1, WIDE)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(ValueError, match=r"LBFGS .* it keeps _params beside its state"):
        restart(model, optimizer, seed=0, index=1)


def test_a_trial_steps_neither_the_optimizer_nor_its_schedule() -> None:
    model, optimizer = trained(CASES["Lion"])
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # hangs a step of its own on the optimizer
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("the optimizer was stepped"))
    kept = copy.deepcopy([optimizer.state[p] for p in full_parameters(model).values()])
    values = [p.detach().clone() for p in full_parameters(model).values()]
    restart(model, optimizer, seed=0, index=1)
    assert same([optimizer.state[p] for p in full_parameters(model).values()], kept)
    assert same([p.detach() for p in full_parameters(model).values()], values)


class Delegating(Optimizer):
    """As accelerate wraps optimizers: state and groups are those of another one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups


class Noisy(Optimizer):
    """Adds noise to what it takes, as one that rounds at random does."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        for p in (p for group in self.param_groups for p in group["params"]):
            state = self.state[p]
            state["exp_avg"] = state.get("exp_avg", torch.zeros_like(p)).lerp(p.grad, 0.1)
            p.sub_(state["exp_avg"] + 1e-3 * torch.randn_like(p), alpha=1e-2)


def test_an_optimizer_that_draws_at_random_is_no_other_one_for_that() -> None:
    model, optimizer = trained(of(Noisy))
    before = torch.get_rng_state()
    assert restart(model, optimizer, seed=0, index=1).optimizer_zeroed_fraction == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(optimizer.state[p]["exp_avg"].any() for p in factors(model).values())


def test_an_optimizer_behind_a_wrapper_is_known_by_its_own_class() -> None:
    model, optimizer = trained(CASES["NAdam"])
    report = restart(model, Delegating(optimizer), seed=0, index=1)
    assert report.optimizer_zeroed_fraction == 1
    assert {optimizer.state[p]["mu_product"].item() for p in factors(model).values()} == {1}


@pytest.mark.parametrize("case", ["NAdam", "SGD with momentum", "ASGD", "schedule-free AdamW"])
def test_sharded_state_begins_anew_as_well(mesh: DeviceMesh, case: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDE, NARROW, bias=False), nn.Linear(NARROW, WIDE, bias=False))
    inject_lora(model, LoRAConfig(r=R, lora_alpha=8), seed=0)
    fully_shard(model, mesh=mesh)
    for layer in lora_layers(model).values():
        layer.cache_span = "none"
    optimizer = CASES[case](parameter_groups(model, weight_decay=0.0))
    update(model, optimizer, 3)
    restart(model, optimizer, seed=0, index=1, store=FSDP2Store(torch.device("cpu")))
    twin = trained(CASES["AdamW"], only_factors=True)[0]
    twin = nn.Sequential(twin[0], twin[2])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.data.copy_(p.full_tensor())  # type: ignore[attr-defined]
    fresh = CASES[case](parameter_groups(twin, weight_decay=0.0))
    update(model, optimizer, 3)
    update(twin, fresh, 3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q.data, atol=1e-7, rtol=0)  # type: ignore[attr-defined]
