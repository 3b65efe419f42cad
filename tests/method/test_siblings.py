"""Layers that share an x: the same losses and gradients as apart, in fewer calls, and nothing used for another x."""

import copy
import gc
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from relora import LoRAConfig, build_optimizer, inject_lora, merge_lora, restart
from relora.method.kernels import project
from relora.method.lora import LoRALinear, lora_layers
from tests.helpers.architectures import batch, build

LAYERS = 2  # of the tiny models
D = 8
CONFIG = LoRAConfig(r=4, lora_alpha=3.7)


def wrapped(name: str = "llama", *, apart: bool = False, **options: Any) -> nn.Module:
    """A model with B != 0 everywhere."""
    model = build(name)
    inject_lora(model, LoRAConfig(**{**vars(CONFIG), **options}))
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
        if apart:
            layer.siblings = None
    return model.train()


@contextmanager
def counted_calls() -> Iterator[Counter[int]]:
    """How often so many layers were computed by one call of the kernels."""
    calls: Counter[int] = Counter()

    def counting(x: Tensor, projections: Any) -> tuple[Tensor, ...]:
        calls[len(projections)] += 1
        return project(x, projections)

    with patch("relora.method.lora.project", counting), patch("relora.method.siblings.project", counting):
        yield calls


def loss_and_gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(ours[name], expected, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("route", ["merged", "factored"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_llama_is_computed_in_four_calls_a_block_instead_of_seven(route: Any, recompute: bool) -> None:
    found = []
    for apart in (False, True):
        model = wrapped(apart=apart, forward=route)
        if recompute:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        with counted_calls() as calls:
            found.append(loss_and_gradients(model))
        times = LAYERS * (1 + recompute)
        # Recomputation ends at the last tensor that is saved: each down_proj still saves its x.
        assert calls == ({1: 7 * times} if apart else {3: times, 2: times, 1: 2 * times})
    assert_same(*found)


def test_a_gpt2_has_no_group() -> None:
    model = wrapped("gpt2")
    assert {layer.siblings for layer in lora_layers(model).values()} == {None}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama", {3: 2, 2: 2}),
        ("opt", {3: 2}),
        ("gpt2", {}),
        ("mixtral", {3: 2}),
        ("qwen3", {3: 2, 2: 2}),
        ("t5", None),
    ],
)
def test_which_layers_of_an_architecture_are_grouped(name: str, sizes: dict[int, int] | None) -> None:
    layers = lora_layers(wrapped(name))
    found = {id(layer.siblings): layer.siblings for layer in layers.values() if layer.siblings is not None}
    counts = Counter(sum(layer.siblings is group for layer in layers.values()) for group in found.values())
    if sizes is not None:
        assert counts == sizes
    of_cross_attention = [layer.siblings for key, layer in layers.items() if "EncDecAttention" in key]
    assert bool(of_cross_attention) == (name == "t5") and not any(of_cross_attention)


@pytest.mark.parametrize("name", ["opt", "qwen3", "t5"])
def test_other_architectures_compute_the_same(name: str) -> None:
    with counted_calls() as calls:
        together = loss_and_gradients(wrapped(name))
    assert calls[3] > 0
    assert_same(together, loss_and_gradients(wrapped(name, apart=True)))


# --- whose x it is ------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """q reads x; k and v read `other`, or x."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        y: Tensor = self.q_proj(x).sin() * self.k_proj(other).cos() + self.v_proj(other)
        return y


def attention(*, apart: bool = False) -> Attention:
    torch.manual_seed(0)
    model = Attention()
    inject_lora(model, CONFIG)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
        layer.siblings = None if apart else layer.siblings
    return model


def waiting(model: Attention) -> Any:
    group: Any = model.q_proj.siblings
    return group._waiting


def grads(model: nn.Module, *inputs: Tensor, f: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    (f or model)(*inputs).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def recomputing(model: nn.Module) -> Callable[..., Tensor]:
    return lambda *inputs: checkpoint(model, *inputs, use_reentrant=False)


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_that_get_different_inputs_leave_their_group(recompute: bool) -> None:
    model, reference = attention(), attention(apart=True)
    f = recomputing(model) if recompute else None
    for turn in range(3):
        x, other = torch.randn(2, 3, D), torch.randn(2, 3, D)
        with counted_calls() as calls:
            assert_same(grads(model, x, other, f=f), grads(reference, x, other))
        assert calls[3] == (0 if turn else 1 + recompute)
    assert model.q_proj.siblings is model.v_proj.siblings is None


def test_an_equal_x_is_another_x() -> None:
    model = attention()
    x = torch.randn(2, D)
    model.q_proj(x)
    with counted_calls() as calls:
        model.k_proj(x.clone())
    assert calls == {1: 1} and waiting(model) is None


def test_an_x_that_was_written_is_another_x() -> None:
    model, reference = attention(), attention(apart=True)
    x = torch.randn(2, D)
    model.q_proj(x)
    x.mul_(2)
    torch.testing.assert_close(model.k_proj(x), reference.k_proj(x))


def test_nothing_waits_after_a_forward_pass_nor_keeps_x() -> None:
    model = attention()
    x = torch.randn(2, D)
    gone, y = weakref.ref(x), model(x)
    assert waiting(model) is None
    del x, y
    gc.collect()
    assert gone() is None


def test_without_gradients_each_computes_alone() -> None:
    model = attention()
    with counted_calls() as calls, torch.no_grad():
        model(torch.randn(2, D))
    assert calls == {1: 3}
    with counted_calls() as calls:
        model(torch.randn(2, D))
    assert calls == {3: 1}


def test_the_first_that_the_model_calls_computes_all() -> None:
    class Backwards(Attention):
        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:  # noqa: ARG002
            y: Tensor = self.v_proj(x) + self.k_proj(x) * self.q_proj(x)
            return y

    model = Backwards()
    inject_lora(model, CONFIG)
    with counted_calls() as calls:
        for _ in range(3):
            model(torch.randn(2, D))
    assert calls == {3: 3}


def test_an_engine_can_switch_grouping_off_and_on() -> None:
    model = attention()
    for can_group, expected in ((False, {1: 3}), (True, {3: 1})):
        model.k_proj.can_group = can_group
        with counted_calls() as calls:
            model(torch.randn(2, D))
        assert calls == expected


@pytest.mark.parametrize("which", ["weight", "bias", "lora_A", "lora_B"])
@pytest.mark.parametrize("change", ["an empty shard", "another device", "a DTensor"])
def test_parameters_that_are_not_here_are_left_to_their_own_layer(mesh: DeviceMesh, which: str, change: str) -> None:
    model, x = attention(), torch.randn(2, D)
    p = model.v_proj.get_parameter(which)
    if change == "an empty shard":  # as ZeRO-3 leaves a layer that has not been called
        p.data = torch.empty(0)
    else:
        other = p.detach().to("meta") if change == "another device" else distribute_tensor(p.detach(), mesh, [Shard(0)])
        setattr(model.v_proj, which, nn.Parameter(other))
    with counted_calls() as calls:
        model.q_proj(x), model.k_proj(x)
    assert calls == {1: 2}
    assert model.q_proj.siblings is model.v_proj.siblings is None


@pytest.mark.parametrize("unit", ["layer", "model"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("reshard", [False, True])
def test_a_model_that_the_user_shards_trains_as_one_that_is_whole(
    mesh: DeviceMesh, unit: str, fused: bool, reshard: bool
) -> None:
    ends = []
    for is_sharded in (False, True):
        torch.manual_seed(0)
        model = Attention()
        inject_lora(model, LoRAConfig(r=4, lora_alpha=3.7, forward="merged", keep_merged=True))
        for part in (*model.children(), model) if unit == "layer" else (model,):
            if is_sharded:
                fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=fused)
        losses = []
        for turn in range(4):
            for micro in range(2):
                x = torch.randn(4, D, generator=torch.Generator().manual_seed(2 * turn + micro))
                loss = model(x).square().mean()
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        ends.append(losses)
    assert ends[0][0] != ends[0][-1]
    assert ends[1] == pytest.approx(ends[0], rel=1e-6)


def test_only_layers_alike_are_grouped() -> None:
    model = Attention()
    model.v_proj = nn.Linear(D + 1, D)
    inject_lora(model, CONFIG)
    assert model.q_proj.siblings is model.k_proj.siblings is not None
    assert model.v_proj.siblings is None
    dropped = Attention()
    inject_lora(dropped, LoRAConfig(r=4, lora_dropout=0.1))
    assert dropped.q_proj.siblings is None
    partly = Attention()
    inject_lora(partly, LoRAConfig(r=4, target_modules=["v_proj"]))
    assert partly.v_proj.siblings is None


# --- copies, merges, restarts -------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_a_group_of_its_own(duplicate: Any) -> None:
    model = attention()
    model.q_proj(torch.randn(2, D))  # the others wait
    twin = duplicate(model)
    x = torch.randn(2, D)
    with counted_calls() as calls:
        twin(x)
    assert calls == {3: 1}
    group: Any = twin.q_proj.siblings
    assert group is twin.k_proj.siblings is not model.q_proj.siblings
    assert group._layers == [twin.q_proj, twin.k_proj, twin.v_proj]


def test_merging_dissolves_the_group() -> None:
    model = attention()
    layers = list(lora_layers(model).values())
    merge_lora(model)
    assert [layer.siblings for layer in layers] == [None] * 3
    assert {type(child) for child in model.children()} == {nn.Linear}


def test_training_with_restarts_and_accumulation_is_that_of_layers_apart() -> None:
    ends = []
    for apart in (False, True):
        model = attention(apart=apart)
        optimizer = build_optimizer(model, learning_rate=1e-2)
        torch.manual_seed(3)
        for index in range(1, 4):
            for _ in range(2):
                model(torch.randn(4, D)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            restart(model, optimizer, seed=0, index=index)
        ends.append({name: p.detach() for name, p in model.named_parameters()})
    assert_same(*ends)
    assert all(isinstance(layer, LoRALinear) for layer in model.children())


# --- torch.compile ------------------------------------------------------------------------------------------


def test_a_compiled_llama_has_eager_gradients_and_is_not_compiled_again_after_a_restart() -> None:
    torch.compiler.reset()
    model = wrapped()
    eager = loss_and_gradients(model)
    optimizer = build_optimizer(model)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert_same(loss_and_gradients(model), eager)
    optimizer.step()
    with torch._dynamo.config.patch(error_on_recompile=True):
        restart(model, optimizer, seed=0, index=1)
        loss_and_gradients(model)
