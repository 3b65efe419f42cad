"""The kernels against autograd in float64: gradients, dtypes, what is saved, and how much of a small update is left."""

import copy
import gc
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from relora import LoRAConfig, inject_lora, merge_lora, restart
from relora.method import kernels
from relora.method.kernels import project
from relora.method.lora import LoRALinear, lora_layers
from relora.method.merged_cache import attach_caches
from relora.method.routes import Route
from tests.helpers.toy import CONFIG, factors, toy, trained, update

D_IN, D_OUT, R = 6, 5, 2
ROUTES: tuple[Route, ...] = ("merged", "factored")
every_route = pytest.mark.parametrize("route", ROUTES)
every_kind = pytest.mark.parametrize("kind", ["linear", "without bias", "conv1d"])


def layer_of(route: Any, kind: str = "linear", *, d_in: int = D_IN, d_out: int = D_OUT, **options: Any) -> LoRALinear:
    torch.manual_seed(0)
    plain = Conv1D(d_out, d_in) if kind == "conv1d" else nn.Linear(d_in, d_out, bias=kind == "linear")
    nn.init.normal_(plain.weight)
    config = LoRAConfig(**{"r": R, "lora_alpha": 3.7, "forward": route, **options})
    layer = LoRALinear.from_linear(plain, config)
    if config.keep_merged:
        attach_caches([layer])
        layer.cache_span = "update"
    nn.init.normal_(layer.lora_B)
    return layer


def reference(layer: LoRALinear, x: Tensor) -> Tensor:
    """The same by torch's own autograd."""
    W = layer.weight.T if layer.transposed else layer.weight
    return F.linear(x, W, layer.bias) + F.linear(F.linear(x, layer.lora_A), layer.lora_B) * layer.scale


def gradients(f: Callable[[Tensor], Tensor], x: Tensor, layer: nn.Module) -> dict[str, Tensor]:
    """y, and the gradients of whatever requires one."""
    wanted = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    wanted |= {"x": x} if x.requires_grad else {}
    y = f(x)
    loss = (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()
    found = torch.autograd.grad(loss, list(wanted.values()))
    return {"y": y.detach(), **dict(zip(wanted, found, strict=True))}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


# --- gradients ---------------------------------------------------------------------------------------------


@every_route
@every_kind
@pytest.mark.parametrize("trains_bias", [True, False])
@pytest.mark.parametrize("x_requires_grad", [True, False])
def test_gradients_are_those_of_finite_differences(
    route: Any, kind: str, trains_bias: bool, x_requires_grad: bool
) -> None:
    layer = layer_of(route, kind).double()
    if layer.bias is not None:
        layer.bias.requires_grad_(trains_bias)
    trained_ones = [p for p in layer.parameters() if p.requires_grad]
    x = torch.randn(3, D_IN, dtype=torch.float64, requires_grad=x_requires_grad)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *trained_ones))


@every_route
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("asked", ["x", "lora_A", "lora_B", "bias", "weight"])
def test_any_gradient_can_be_asked_for_alone(route: Any, kind: str, asked: str) -> None:
    layer, x = layer_of(route, kind).double(), torch.randn(3, D_IN, dtype=torch.float64)
    layer.requires_grad_(False)
    (x if asked == "x" else layer.get_parameter(asked)).requires_grad_(True)
    ours, theirs = (gradients(f, x, layer) for f in (layer, lambda x: reference(layer, x)))
    assert asked in ours
    assert_close(ours, theirs)


@pytest.mark.parametrize("routes", [("merged",) * 3, ("factored",) * 3, ("factored", "merged", "factored")])
def test_layers_with_one_x_have_the_gradients_of_layers_apart(routes: tuple[Route, ...]) -> None:
    layers = [layer_of(route, d_out=D_OUT + i).double() for i, route in enumerate(routes)]
    layers[1].lora_A.requires_grad_(False)
    x = torch.randn(4, D_IN, dtype=torch.float64, requires_grad=True)

    def grads(outputs: Any) -> list[Tensor | None]:
        inputs = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]
        return list(torch.autograd.grad(sum(y.sin().sum() for y in outputs), inputs))

    together = grads(project(x, [layer.projection(x) for layer in layers]))
    for ours, theirs in zip(together, grads([reference(layer, x) for layer in layers]), strict=True):
        torch.testing.assert_close(ours, theirs)


@every_route
def test_a_member_without_a_gradient_gets_none(route: Any) -> None:
    layers = [layer_of(route), layer_of(route)]
    x = torch.randn(4, D_IN, requires_grad=True)
    first, _ = project(x, [layer.projection(x) for layer in layers])
    first.sum().backward()
    assert layers[0].lora_A.grad is not None and x.grad is not None
    assert [p.grad for p in layers[1].parameters()] == [None] * 4


@every_route
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_any_number_of_dimensions(route: Any, shape: tuple[int, ...]) -> None:
    layer, x = layer_of(route), torch.randn(*shape, D_IN, requires_grad=True)
    ours, theirs = (gradients(f, x, layer) for f in (layer, lambda x: reference(layer, x)))
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@every_route
def test_an_input_and_a_gradient_with_strides(route: Any) -> None:
    layer, x = layer_of(route), torch.randn(D_IN, 4, 3).permute(2, 1, 0).requires_grad_()
    ours, theirs = (gradients(lambda x, f=f: f(x).mT, x, layer) for f in (layer, lambda x: reference(layer, x)))
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    layer(x).sum().backward()  # its gradient has no strides at all


@every_route
def test_rows_in_fp32_begin_at_cache_lines_and_may_be_written_to(route: Any) -> None:
    layer, x = layer_of(route, d_in=20, d_out=37), torch.randn(2, 3, 20, requires_grad=True)
    y = layer(x)
    assert [stride % 16 for stride in y.stride()] == [0, 0, 1]
    before = y.detach().clone()
    torch.testing.assert_close(y.add_(1).detach(), before + 1)
    y.view(-1, 37).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((37,), 6.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).is_contiguous()


@every_route
def test_two_calls_add_up(route: Any) -> None:
    layer, x = layer_of(route), torch.randn(2, 4, D_IN)
    (layer(x[0]).sum() + layer(layer(x[1]) @ torch.randn(D_OUT, D_IN)).sum()).backward()
    torch.manual_seed(1)
    assert layer.lora_A.grad is not None and layer.lora_A.grad.abs().min() > 0


@every_route
def test_a_second_derivative_is_refused(route: Any) -> None:
    layer, x = layer_of(route), torch.randn(2, D_IN, requires_grad=True)
    [dx] = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@every_route
def test_recomputed_activations_give_the_same_gradients(route: Any) -> None:
    layer, x = layer_of(route), torch.randn(4, D_IN, requires_grad=True)
    plainly = gradients(lambda x: layer(x).sin(), x, layer)
    recomputed = gradients(lambda x: checkpoint(lambda x: layer(x).sin(), x, use_reentrant=False), x, layer)
    assert_close(recomputed, plainly, atol=0, rtol=0)


def test_dropout_is_on_the_input_of_A_alone_with_one_mask_for_both_passes() -> None:
    layer = layer_of("factored", lora_dropout=0.5).double()
    x = torch.randn(64, D_IN, dtype=torch.float64, requires_grad=True)

    def composed(x: Tensor) -> Tensor:
        low = F.linear(F.linear(layer.dropout(x), layer.lora_A), layer.lora_B) * layer.scale
        return F.linear(x, layer.weight, layer.bias) + low

    found = []
    for f in (layer, composed):
        torch.manual_seed(1)
        found.append(gradients(f, x, layer))
    assert_close(*found)
    assert not torch.allclose(found[0]["y"], reference(layer, x))


# --- dtypes ------------------------------------------------------------------------------------------------


@every_route
@every_kind
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_bfloat16_and_trains_in_float32(route: Any, kind: str, x_dtype: torch.dtype) -> None:
    layer, x = layer_of(route, kind), torch.randn(8, D_IN).to(x_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(lambda x: layer(x), x, layer)
    exact = gradients(lambda x: reference(layer, x.float()), x, layer)
    assert ours["y"].dtype == torch.bfloat16
    assert ours["x"].dtype == x_dtype
    assert {ours[name].dtype for name in ours.keys() - {"x", "y"}} == {torch.float32}
    for name, expected in exact.items():
        assert (ours[name].float() - expected.float()).norm() < 0.02 * expected.float().norm(), name


@every_route
def test_a_backward_pass_within_autocast_is_the_same(route: Any) -> None:
    layer, x = layer_of(route), torch.randn(8, D_IN, requires_grad=True)
    outside = gradients(layer, x, layer)
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        loss = (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum()
        dA, dx = torch.autograd.grad(loss, [layer.lora_A, x])
    assert torch.equal(dA, outside["lora_A"]) and torch.equal(dx, outside["x"])


@every_route
def test_float64_stays_float64_within_autocast(route: Any) -> None:
    layer, x = layer_of(route).double(), torch.randn(8, D_IN, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), reference_outside_autocast(layer, x))


def reference_outside_autocast(layer: LoRALinear, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return reference(layer, x)


# --- how much of a small update is left in y ----------------------------------------------------------------

GAINS = (0.0003, 0.001, 0.003)  # |delta| / |W|
STORAGES: list[tuple[Any, Any]] = [
    *[(base, route) for base in (None, "float32") for route in ROUTES],
    *[(base, "factored") for base in ("bfloat16", "int8", "nf4")],
]


@torch.no_grad()
def gain(layer: LoRALinear, size: float, *, autocast: bool) -> float:
    """<y(W + delta) - y(W), x delta^T> / |x delta^T|^2 with |delta| = size |W|: 1 if nothing of delta is lost."""
    d_in = layer.in_features
    W = layer.weight_format.dequantize(layer.weight, torch.float32)
    layer.lora_B.mul_(size * W.norm() / layer.delta().norm())
    x, delta = torch.randn(1024, d_in), layer.delta().double()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with_delta = layer(x).double()
        layer.lora_B.zero_()
        without = layer(x).double()
    expected = x.double() @ (delta if layer.transposed else delta.T)
    return float(((with_delta - without) * expected).sum() / expected.square().sum())


def wide_layer(route: Any, kind: str = "linear", **options: Any) -> LoRALinear:
    """Wide enough that the rounding of its 16-bit outputs averages out: 0.5 % are left of it."""
    return layer_of(route, kind, d_in=640, d_out=768, r=8, **options)


@pytest.mark.parametrize(("base", "route"), STORAGES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("size", GAINS)
def test_small_updates_are_not_lost(base: Any, route: Any, autocast: bool, size: float) -> None:
    assert gain(wide_layer(route, base_dtype=base), size, autocast=autocast) == pytest.approx(1, abs=0.02)


@every_route
@pytest.mark.parametrize("kind", ["conv1d", "without bias"])
def test_nor_are_they_in_other_layers(route: Any, kind: str) -> None:
    assert gain(wide_layer(route, kind), GAINS[0], autocast=True) == pytest.approx(1, abs=0.02)


def test_merged_into_a_bfloat16_weight_they_are_lost() -> None:
    layer = wide_layer("factored")
    with torch.no_grad():
        layer.weight.copy_(layer.weight.bfloat16())  # on the grid that W + delta is rounded to
    layer.forward_choice = "merged"
    assert gain(layer, GAINS[0], autocast=True) < 0.5


@torch.no_grad()
def test_added_to_a_rounded_output_they_are_lost() -> None:
    layer = wide_layer("factored")
    layer.forward = lambda x: reference(layer, x)  # type: ignore[method-assign]
    assert gain(layer, GAINS[0], autocast=True) < 0.8


# --- what is saved for the backward pass --------------------------------------------------------------------


@contextmanager
def saved_for_backward(module: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that is saved within, but for the module's parameters."""
    saved: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def saved_bytes(module: nn.Module, *, autocast: bool, dtype: torch.dtype = torch.float32) -> int:
    x = torch.randn(128, 64, dtype=dtype, requires_grad=True)
    with saved_for_backward(module) as saved, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        module(x)
    return sum(saved.values())


@pytest.mark.parametrize("base", [None, "float32", "bfloat16", "int8", "nf4"])
@pytest.mark.parametrize("autocast", [False, True])
def test_x_alone_is_saved(base: Any, autocast: bool) -> None:
    layer = layer_of("factored", d_in=64, d_out=96, r=8, base_dtype=base)
    plain = nn.Linear(64, 96)
    config = peft.LoraConfig(r=8, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(64, 96)))[0]
    ours = saved_bytes(layer, autocast=autocast)
    assert ours == 128 * 64 * (2 if autocast else 4)
    assert ours <= 1.01 * saved_bytes(plain, autocast=autocast)
    assert ours < saved_bytes(theirs, autocast=autocast)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_merged_route_saves_no_merged_weight(autocast: bool) -> None:
    layer = layer_of("merged", d_in=64, d_out=96, r=8)
    assert saved_bytes(layer, autocast=autocast) == 128 * 64 * (2 if autocast else 4)


def test_dropout_saves_no_decoded_weight() -> None:
    layer = layer_of("factored", d_in=64, d_out=96, r=8, base_dtype="nf4", lora_dropout=0.1)
    # Two masks of x's size at most, x A^T and B; no W.
    assert saved_bytes(layer, autocast=True) < 64 * 96 * 2 + 2 * 128 * 64 * 4


# --- the cache of W + delta ----------------------------------------------------------------------------------------


def cached(model: nn.Module) -> nn.Module:
    """The model as an engine prepares it whose writes are all counted: W + delta outlives a pass."""
    for layer in lora_layers(model).values():
        layer.cache_span = "update"
    return model


def cached_bytes(layer: LoRALinear) -> int:
    assert layer.cache is not None
    return sum(t.nbytes for t in vars(layer.cache).values() if isinstance(t, Tensor))


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_a_cached_weight_follows_the_optimizer(options: dict[str, bool]) -> None:
    results = []
    for keep in (True, False):
        config = LoRAConfig(**{**vars(CONFIG), "forward": "merged", "keep_merged": keep})
        model, optimizer = trained(0, config, **options)
        update(cached(model), optimizer, 4)
        restart(model, optimizer, seed=0, index=1)
        update(model, optimizer, 2)
        results.append(factors(model))
    for name, factor in results[0].items():
        torch.testing.assert_close(factor, results[1][name], atol=0, rtol=0)


def test_a_cached_weight_follows_its_dtype_and_every_parameter() -> None:
    layer, x = layer_of("merged", keep_merged=True), torch.randn(4, D_IN)
    for write in (None, layer.weight, layer.lora_A, layer.lora_B):
        if write is not None:
            with torch.no_grad():
                write.mul_(1.5)
        torch.testing.assert_close(layer(x), reference(layer, x))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x), reference(layer, x))


def test_a_cached_weight_follows_parameters_that_are_replaced() -> None:
    layer, x = layer_of("merged", keep_merged=True), torch.randn(3, D_IN)
    for _ in range(4):
        layer(x)
        for _ in range(2):  # the second one takes the place in memory that the first has left
            layer.lora_B.data = torch.randn(D_OUT, R)
        torch.testing.assert_close(layer(x), reference(layer, x))


def test_the_cache_is_no_part_of_the_model_and_is_dropped_at_updates_and_restarts() -> None:
    model = toy()
    inject_lora(model, LoRAConfig(**{**vars(CONFIG), "forward": "merged", "keep_merged": True}))
    layers = list(lora_layers(cached(model)).values())
    before = set(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    update(model, optimizer)
    assert [cached_bytes(layer) for layer in layers] == [0] * 3
    model(torch.randn(4, 12))
    assert all(cached_bytes(layer) == layer.weight.nbytes for layer in layers)
    assert set(model.state_dict()) == before and not list(model.buffers())
    twins = copy.deepcopy(layers[0]), pickle.loads(pickle.dumps(layers[0]))
    restart(model, optimizer, seed=0, index=1)
    assert [cached_bytes(layer) for layer in (*layers, *twins)] == [0] * 5


def test_an_engine_can_switch_the_cache_off() -> None:
    layer, x = layer_of("merged", keep_merged=True), torch.randn(4, D_IN)
    layer(x)
    assert layer.active_cache is not None and cached_bytes(layer) > 0
    layer.cache_span = "none"
    assert layer.active_cache is None
    layer.lora_B.data.mul_(2)  # no version counter sees it
    torch.testing.assert_close(layer(x), reference(layer, x))
    assert layer_of("merged").active_cache is None


def num_step_hooks() -> int:
    gc.collect()  # sibling layers and their group refer to one another
    return len(_global_optimizer_post_hooks)


def test_a_model_has_one_optimizer_hook_which_goes_with_it() -> None:
    before = num_step_hooks()
    model, config = toy(), LoRAConfig(**{**vars(CONFIG), "forward": "merged", "keep_merged": True})
    inject_lora(model, config)
    assert num_step_hooks() == before + 1
    twin = copy.deepcopy(model)
    assert num_step_hooks() == before + 2
    del twin
    assert num_step_hooks() == before + 1
    layers = list(lora_layers(model).values())
    merge_lora(model)
    assert num_step_hooks() == before and layers[0].cache is None
    inject_lora(model, config)
    assert num_step_hooks() == before + 1
    del model
    assert num_step_hooks() == before
    inject_lora(other := toy(), CONFIG)
    assert num_step_hooks() == before, other


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_follows_its_own_optimizer(duplicate: Any) -> None:
    model = toy()
    inject_lora(model, LoRAConfig(**{**vars(CONFIG), "forward": "merged", "keep_merged": True}))
    twin, x = duplicate(cached(model)), torch.randn(4, 12)
    del model
    gc.collect()
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=0.1, fused=True)
    update(twin, optimizer)
    ours = twin(x)
    for layer in lora_layers(twin).values():
        assert cached_bytes(layer) > 0
        layer.cache = None
    torch.testing.assert_close(twin(x), ours, atol=0, rtol=0)


@contextmanager
def counted_operations() -> Iterator[Counter[str]]:
    """How often each operation of torch runs within."""
    calls: Counter[str] = Counter()

    class Counting(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls[function.name()] += 1
            return function(*args, **(kwargs or {}))

    with Counting():
        yield calls


# --- the layout of results -----------------------------------------------------------------------------------


def test_a_layout_can_be_set_for_the_cpu() -> None:
    layer, x = layer_of("merged", d_in=20, d_out=300), torch.randn(2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        formed_in_blocks = layer(x)
    with kernels.layout(kernels.GPU_LAYOUT):
        assert layer_of("merged", d_in=20, d_out=37)(x).is_contiguous()
        with torch.autocast("cpu", torch.bfloat16), counted_operations() as calls:
            torch.testing.assert_close(layer(x), formed_in_blocks)
    with torch.autocast("cpu", torch.bfloat16), counted_operations() as calls_in_blocks:
        layer(x)
    assert calls_in_blocks["aten::addmm.out"] + calls_in_blocks["aten::addmm"] == 1 + 2  # 300 rows: two blocks
    assert calls["aten::addmm.out"] + calls["aten::addmm"] == 1 + 1
    assert not layer_of("merged", d_in=20, d_out=37)(x).is_contiguous()


# --- torch.compile ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error:.*lru_cache")  # Dynamo warns of each that it meets
@pytest.mark.parametrize(("route", "autocast"), [("merged", False), ("factored", False), ("factored", True)])
def test_a_compiled_layer_is_one_graph_with_the_same_gradients(route: Any, autocast: bool) -> None:
    torch.compiler.reset()
    layer, x = layer_of(route), torch.randn(4, D_IN, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = (gradients(lambda x, f=f: f(x), x, layer) for f in (compiled, layer))
    assert_close(ours, theirs, atol=1e-2 if autocast else 1e-5, rtol=1e-2 if autocast else 1e-5)


@every_route
def test_neither_an_update_nor_a_restart_compiles_again(route: Any) -> None:
    torch.compiler.reset()
    model = toy()
    inject_lora(model, LoRAConfig(**{**vars(CONFIG), "forward": route, "keep_merged": route == "merged"}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    update(compiled, optimizer)
    with torch._dynamo.config.patch(error_on_recompile=True):
        update(compiled, optimizer)
        restart(model, optimizer, seed=0, index=1)
        update(compiled, optimizer)
        with pytest.raises(torch._dynamo.exc.RecompileError):
            compiled(torch.randn(1, 2, 12))
