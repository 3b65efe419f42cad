"""The optimizer that steps in the product of the factors: its step against float64, its state, what it refuses."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora import LoRAConfig, build_optimizer, inject_lora, restart
from relora.method import product
from relora.method.combined_optimizer import CombinedOptimizer
from relora.method.lora import lora_layers
from relora.method.product import MOMENTUM, Product, product_step
from relora.method.reinit import Offset
from relora.method.store import TorchStore
from tests.helpers.toy import CONFIG, Toy, copies, factors, full_parameters, toy, update

R, D_IN, D_OUT = 4, 24, 15
X = torch.randn(32, 12, generator=torch.Generator().manual_seed(3))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))


def pair(size_A: float = 1.0, size_B: float = 1.0) -> tuple[Tensor, Tensor]:
    return size_A * random(R, D_IN, seed=1), size_B * random(D_OUT, R, seed=2)


G = random(D_OUT, D_IN, seed=3)  # the gradient of W


def momenta(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return B.mT @ G, G @ A.mT


def spectral(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix, 2)


def expected_step(A: Tensor, B: Tensor, m_A: Tensor, m_B: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """The equations in the module's docstring, by eigenvalues and singular values in float64."""

    def root(S: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(S)
        return vectors * values.rsqrt()[:, None] @ vectors.mT

    def sign(M: Tensor) -> Tensor:
        U, _, Vh = torch.linalg.svd(M, full_matrices=False)
        return U @ Vh

    A, B, m_A, m_B = (tensor.double() for tensor in (A, B, m_A, m_B))
    D_A = root(B.mT @ B) @ sign(root(B.mT @ B) @ m_A)
    D_B = sign(m_B @ root(A @ A.mT)) @ root(A @ A.mT)
    size = spectral(A) + spectral(B)
    rho = ((-size + (size**2 + 4 * rate).sqrt()) / 2)[:, None, None]
    return rho * D_A / spectral(D_A)[:, None, None], rho * D_B / spectral(D_B)[:, None, None]


@pytest.mark.parametrize("sizes", [(1.0, 1.0), (0.01, 3.0)])
@pytest.mark.parametrize("rate", [1e-3, 0.3])
def test_the_step_is_that_of_the_equations(sizes: tuple[float, float], rate: float) -> None:
    A, B = pair(*sizes)
    steps = product_step(A, B, *momenta(A, B), rate=rate)
    for found, expected in zip(steps, expected_step(A, B, *momenta(A, B), rate), strict=True):
        off = (found.double() - expected).norm() / expected.norm()
        assert off < 0.05, "the bounds of the norms are a little too large"
        cosine = torch.nn.functional.cosine_similarity(found.double().flatten(), expected.flatten(), dim=0)
        assert cosine > 1 - 1e-6, "the direction has nothing to do with them"


def degenerate(kind: str) -> tuple[Tensor, Tensor]:
    A, B = pair()
    scales = torch.logspace(0, -6, R)
    return {
        "random": (A, B),
        "ill-conditioned": (scales[:, None] * A, B * scales),
        "of low rank": (A[:, :1].expand_as(A), B),
        "B = 0": (A, torch.zeros_like(B)),
        "A = 0": (torch.zeros_like(A), B),
        "A = B = 0": (torch.zeros_like(A), torch.zeros_like(B)),
        "tiny": (1e-18 * A, 1e-18 * B),
    }[kind]


@pytest.mark.parametrize("kind", ["random", "ill-conditioned", "of low rank", "B = 0", "A = 0", "A = B = 0", "tiny"])
@pytest.mark.parametrize("rate", [0.0, 1e-6, 0.1, 10.0])
def test_no_step_of_the_product_is_larger_than_the_rate(kind: str, rate: float) -> None:
    A, B = degenerate(kind)
    step_A, step_B = product_step(A, B, *momenta(A, B), rate=rate)
    A, B, step_A, step_B = (tensor.double() for tensor in (A, B, step_A, step_B))
    size = spectral((B - step_B) @ (A - step_A) - B @ A)
    assert (size <= rate * (1 + 1e-4)).all()
    assert all(torch.isfinite(step).all() for step in (step_A, step_B))
    if kind == "B = 0" and rate > 0:
        assert not step_A.any() and size.min() > 0.02 * rate


def test_a_balanced_pair_makes_nearly_the_whole_step() -> None:
    A, B = (torch.linalg.qr(tensor.mT).Q.mT if tensor.shape[1] == R else torch.linalg.qr(tensor).Q for tensor in pair())
    A, B = 0.5 * A, 0.5 * B
    step_A, step_B = product_step(A, B, *momenta(A, B), rate=0.01)
    assert spectral((B - step_B) @ (A - step_A) - B @ A).min() > 0.7 * 0.01


def test_the_direction_depends_on_the_product_alone() -> None:
    A, B = pair()
    first, second = (torch.linalg.qr(random(R, R, seed=seed)).Q for seed in (7, 8))
    change = first * torch.tensor([1.0, 2.0, 0.5, 4.0]) @ second
    other_A, other_B = change @ A, B @ torch.linalg.inv(change)

    def directions(A: Tensor, B: Tensor) -> list[Tensor]:
        step_A, step_B = product_step(A.double(), B.double(), *(m.double() for m in momenta(A, B)), rate=1e-2)
        return [part / spectral(part)[:, None, None] for part in (B.double() @ step_A, step_B @ A.double())]

    for one, other in zip(directions(A, B), directions(other_A, other_B), strict=True):
        assert (one - other).norm() < 0.02 * one.norm()


# --- the optimizer -------------------------------------------------------------------------------------------


def trained(num_updates: int = 3, **how: Any) -> tuple[Toy, Optimizer]:
    model = toy()
    inject_lora(model, CONFIG, seed=0, reinit=Offset(0.5))
    options = {"learning_rate": 1e-2, "factors": "product", "factors_learning_rate": 0.1, "name": "adamw_fused"}
    optimizer = build_optimizer(model, **options | how)
    update(model, optimizer, num_updates)
    return model, optimizer


def loss_of(model: nn.Module) -> float:
    target = torch.randn(12, 10, generator=torch.Generator().manual_seed(9))
    return (model(X) - torch.sin(X @ target)).square().mean().item()


def test_it_learns_and_holds_one_momentum_a_factor() -> None:
    model, optimizer = trained(0)
    before = loss_of(model)
    update(model, optimizer, 20)
    assert loss_of(model) < before - 0.04
    assert all([*optimizer.state[p]] == [MOMENTUM] for p in factors(model).values())
    assert all({"exp_avg", "exp_avg_sq", "step"} == set(optimizer.state[p]) for p in full_parameters(model).values())


@pytest.mark.parametrize("alpha", [0.1, 100.0])
def test_the_rate_is_that_of_the_change_of_w_whatever_the_scale(alpha: float) -> None:
    model = toy()
    inject_lora(model, replace(CONFIG, lora_alpha=alpha), seed=0, reinit=Offset(0.5))
    optimizer = build_optimizer(model, factors="product", factors_learning_rate=0.1)
    before = {name: layer.delta().double() for name, layer in lora_layers(model).items()}
    update(model, optimizer)
    for name, layer in lora_layers(model).items():
        assert 0.03 < spectral(layer.delta().double() - before[name]) <= 0.1 * (1 + 1e-4)


def test_the_groups_have_their_rates_and_are_those_of_the_parts() -> None:
    _, optimizer = trained(0)
    assert isinstance(optimizer, CombinedOptimizer)
    assert [type(part).__name__ for part in optimizer.parts] == ["Product", "AdamW"]
    found = {group["name"]: (group["lr"], group["peak_lr"]) for group in optimizer.param_groups}
    assert found == {"lora": (0.1, 0.1), "full_no_decay": (0.01, None)}
    [same] = [group for part in optimizer.parts for group in part.param_groups if group["name"] == "lora"]
    assert same is optimizer.param_groups[0]


def test_a_restart_resets_it_and_each_part_by_its_own_rule() -> None:
    model, optimizer = trained()
    before, kept = model(X), {name: optimizer.state[p]["exp_avg"].clone() for name, p in full_parameters(model).items()}
    report = restart(model, optimizer, seed=0, index=1, reinit=Offset(0.5))
    assert report.optimizer_zeroed_fraction == 1
    torch.testing.assert_close(model(X), before, atol=1e-5, rtol=0)
    assert not any(optimizer.state[p][MOMENTUM].any() for p in factors(model).values())
    assert all(torch.equal(optimizer.state[p]["exp_avg"], kept[n]) for n, p in full_parameters(model).items())
    assert all(optimizer.state[p]["step"] == 3 for p in full_parameters(model).values())
    report = restart(model, optimizer, seed=0, index=2, reinit=Offset(0.5), optimizer_reset="keep")
    update(model, optimizer)
    assert TorchStore().step(optimizer, model.conv.lora_A) is None


def test_without_other_parameters_it_stands_alone_and_decay_is_that_of_the_product() -> None:
    model = toy()
    inject_lora(model, LoRAConfig(r=3, lora_alpha=3.7, target_modules=("inner", "conv")), seed=0)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    optimizer = build_optimizer(model, factors="product", learning_rate=0.1, weight_decay=2.0)
    assert isinstance(optimizer, Product)
    before = {name: layer.delta() for name, layer in lora_layers(model).items()}
    for p in factors(model).values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, layer in lora_layers(model).items():
        torch.testing.assert_close(layer.delta(), (1 - 0.1 * 2.0) * before[name])


@pytest.mark.parametrize("is_bad", [False, True])
def test_what_is_not_to_be_written_is_not(is_bad: bool) -> None:
    model, optimizer = trained()
    twin, other = trained()
    update(twin, other)
    before = copies(dict(model.named_parameters())) | momenta_of(model, optimizer)
    flagged: Any = optimizer
    flagged.found_inf = torch.tensor(float(is_bad))
    if is_bad:
        model.conv.register_forward_hook(lambda *args: args[2] * math.nan)
    update(model, optimizer)
    after = copies(dict(model.named_parameters())) | momenta_of(model, optimizer)
    if is_bad:
        assert all(torch.equal(after[name], before[name]) for name in before)
    else:
        expected = copies(dict(twin.named_parameters())) | momenta_of(twin, other)
        assert all(torch.equal(after[name], expected[name]) for name in after)


def momenta_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {f"{name}:{MOMENTUM}": optimizer.state[p][MOMENTUM].clone() for name, p in factors(model).items()}


def test_gradients_of_a_scaled_loss_are_unscaled() -> None:
    (model, optimizer), (twin, other) = trained(), trained()
    flagged: Any = optimizer
    for p in (*model.parameters(), *twin.parameters()):
        p.grad = torch.ones_like(p) if p.requires_grad else None
    for p in factors(model).values():
        assert p.grad is not None
        p.grad *= 8.0
    flagged.parts[0].grad_scale = torch.tensor(8.0)
    flagged.parts[0].step()
    other.parts[0].step()  # type: ignore[attr-defined]
    assert all(torch.equal(p, factors(twin)[name]) for name, p in factors(model).items())


def test_a_state_dict_brings_back_the_parts() -> None:
    (model, optimizer), (twin, other) = trained(), trained(0)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    update(model, optimizer, 2)
    update(twin, other, 2)
    assert all(torch.equal(*both) for both in zip(model.parameters(), twin.parameters(), strict=True))
    for group in other.param_groups:
        group["lr"] = 0.0
    before = copies(dict(twin.named_parameters()))
    update(twin, other)
    assert all(torch.equal(p, before[name]) for name, p in twin.named_parameters())


def test_how_many_layers_are_computed_at_once_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    for most in (1, 2**23):
        monkeypatch.setattr(product, "MAX_ENTRIES", most)
        model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3)))
        for seed, linear in enumerate(model):
            nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
        inject_lora(model, LoRAConfig(r=3, lora_alpha=3), seed=0, reinit=Offset(0.5))
        optimizer = build_optimizer(model, factors="product", learning_rate=0.1)
        for _ in range(3):
            model(X).square().mean().backward()
            optimizer.step()
        models.append(model)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_a_layer_without_gradients_rests() -> None:
    model, optimizer = trained()
    before = copies(factors(model))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.conv.lora_A.grad = model.conv.lora_B.grad = None
    optimizer.step()
    moved = {name for name, p in factors(model).items() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not name.startswith("conv")}


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(2, 5), (7, 2)], {}),  # no scale
        ([(7, 2), (2, 5)], {"scale": 1.0}),
        ([(2, 5), (7, 2), (2, 5)], {"scale": 1.0}),
        ([(2, 5), (2, 5)], {"scale": 1.0}),
        ([(2,), (2,)], {"scale": 1.0}),
    ],
)
def test_what_are_no_pairs_of_factors_is_refused(shapes: list[tuple[int, ...]], options: dict[str, float]) -> None:
    parameters = [nn.Parameter(torch.zeros(*shape)) for shape in shapes]
    with pytest.raises(ValueError, match=r"steps LoRA factors A \(r, d_in\), B \(d_out, r\) in turn"):
        Product([{"params": parameters} | options], lr=0.1, momentum=0.9)


def test_product_is_an_optimizer_of_factors_alone() -> None:
    model, _ = trained(0)
    with pytest.raises(
        ValueError, match=r"optimizer = product: must be adamw, adamw_fused, adamw_8bit, muon, or module"
    ):
        build_optimizer(model, name="product")
    with pytest.raises(ValueError, match=r"factors = produkt: must be .*; the nearest is product"):
        build_optimizer(model, factors="produkt")


def test_a_rate_of_the_factors_needs_a_group_of_theirs() -> None:
    model, _ = trained(0)
    with pytest.raises(ValueError, match=r"factors_learning_rate = 0\.1: AdamW puts factors and other parameters"):
        build_optimizer(model, name="tests.method.test_product:in_one_group", factors_learning_rate=0.1)


def in_one_group(groups: list[dict[str, Any]], settings: dict[str, Any]) -> Optimizer:
    return torch.optim.AdamW([p for group in groups for p in group["params"]], **settings)
