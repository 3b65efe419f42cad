"""The Triton kernels, run by Triton's interpreter, against float64; compiled for a GPU, of which none is needed."""

from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from relora import LoRAConfig, inject_lora
from relora.method import triton_extra
from relora.method.inject import problems
from relora.method.lora import LoRALinear, lora_layers
from relora.method.merged_cache import attach_caches
from relora.method.routes import Route
from relora.train.preflight import launch_problems
from tests.config.tree import BASE, merged
from tests.helpers.interpreter import fresh_kernels

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
Case = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[ModuleType]:
    with fresh_kernels(interpreted=True) as module:
        assert module.INTERPRETED
        yield module


def matrix(rows: int, columns: int, dtype: torch.dtype, *, transposed: bool = False) -> Tensor:
    values = torch.randn(columns, rows).T if transposed else torch.randn(rows, columns)
    return values.to(dtype)


def assert_rounded_once(ours: Tensor, exact: Tensor, sizes: Tensor, num_terms: int) -> None:
    """Each entry within the error of a sum of `num_terms` in fp32, plus half a step of the dtype of `ours`.

    Args:
        exact: in float64.
        sizes: the sum of the absolute values of the terms of each entry.
    """
    of_the_sum = num_terms * 2**-24 * sizes
    half_a_step = torch.finfo(ours.dtype).eps / 2 * (exact.abs() + of_the_sum)
    assert ((ours.double() - exact).abs() <= of_the_sum + half_a_step).all()


# --- the kernels by themselves ------------------------------------------------------------------------------

# Blocks of the interpreter are 16 x 32, with steps of 16; eight blocks of rows are a group.
ALIGNED, RAGGED, SMALL, TALL = (32, 32, 64, 16), (19, 45, 35, 3), (5, 7, 3, 1), (130, 3, 40, 24)
SHAPES = [*((shape, dtype) for shape in (ALIGNED, RAGGED, SMALL) for dtype in DTYPES), (TALL, BF16)]


@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_a_fused_product_is_rounded_once(kernels: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    m, k, n, r = shape
    left, right = matrix(m, k, dtype), matrix(k, n, dtype, transposed=shape != ALIGNED)
    low_left, low_right = matrix(m, r, dtype), matrix(r, n, dtype, transposed=shape == ALIGNED)
    bias = torch.randn(n)
    ours = kernels.fused_product(left, right, low_left, low_right, bias)
    wide = [matrix.double() for matrix in (left, right, low_left, low_right, bias)]
    exact, sizes = (a @ b + c @ d + e for a, b, c, d, e in (wide, [matrix.abs() for matrix in wide]))
    assert (ours.dtype, ours.is_contiguous()) == (dtype, True)
    assert_rounded_once(ours, exact, sizes, k + r + 1)


@pytest.mark.parametrize("added", [None, "matrix", "strided"])
def test_a_fused_product_adds_a_matrix_and_leaves_it_as_it_is(kernels: ModuleType, added: str | None) -> None:
    torch.manual_seed(0)
    left, right, low_left, low_right = (matrix(*shape, BF16) for shape in ((5, 7), (7, 9), (5, 2), (2, 9)))
    given = None if added is None else matrix(5, 18, BF16)[:, ::2] if added == "strided" else matrix(5, 9, BF16)
    before = None if given is None else given.clone()
    ours = kernels.fused_product(left, right, low_left, low_right, given)
    exact = left.double() @ right.double() + low_left.double() @ low_right.double()
    if given is not None:
        assert torch.equal(given, before)
        exact += given.double()
    torch.testing.assert_close(ours.double(), exact, rtol=BF16_HALF_STEP, atol=1e-5)


BF16_HALF_STEP = torch.finfo(BF16).eps / 2


@every_dtype
@pytest.mark.parametrize("shape", [ALIGNED, RAGGED, SMALL], ids=str)
def test_a_merged_weight_is_rounded_once(kernels: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    m, _, n, r = shape
    W, left, right = matrix(m, n, FP32), matrix(m, r, FP32, transposed=True), matrix(r, n, FP32)
    ours = kernels.form_merged(W, left, right, 0.7, dtype)
    wide = [matrix.double() for matrix in (W, left, right)]
    exact, sizes = (w + 0.7 * a @ b for w, a, b in (wide, [matrix.abs() for matrix in wide]))
    assert ours.dtype == dtype
    assert_rounded_once(ours, exact, sizes, r + 2)


def test_compilers_are_told_the_shapes_and_dtypes_of_the_results(kernels: ModuleType) -> None:
    operands = [matrix(*shape, BF16) for shape in ((3, 4), (4, 5), (3, 2), (2, 5))]
    torch.library.opcheck(kernels.fused_product, (*operands, torch.randn(5)))
    factors = [matrix(*shape, FP32) for shape in ((3, 5), (3, 2), (2, 5))]
    torch.library.opcheck(kernels.form_merged, (*factors, 0.5, BF16))


# --- in layers --------------------------------------------------------------------------------------------------

D_IN, D_OUT = 26, 37


def layer_of(kernels: str, kind: str, route: Route, r: int, stored: torch.dtype = FP32, **options: Any) -> LoRALinear:
    torch.manual_seed(0)
    plain = Conv1D(D_OUT, D_IN) if kind == "conv1d" else nn.Linear(D_IN, D_OUT, bias=kind == "linear")
    nn.init.normal_(plain.weight)
    settings = {"r": r, "lora_alpha": 2.3 * r, "forward": route, "kernels": kernels, **options}
    model = nn.Sequential(plain.to(stored))
    inject_lora(model, LoRAConfig(**settings, bias="all", target_modules=["0"]))
    [layer] = lora_layers(model).values()
    nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(1))
    return layer


def computed(layer: LoRALinear, x: Tensor, dtype: torch.dtype) -> Case:
    """y and all gradients, with products in `dtype`: that of x, or of an autocast."""
    x.requires_grad_()
    wanted = {name: p for name, p in layer.named_parameters() if p.requires_grad} | {"x": x}
    with nullcontext() if dtype == x.dtype else torch.autocast("cpu", dtype):
        y = layer(x)
    found = torch.autograd.grad((y * slopes(y)).sum(), list(wanted.values()))
    return {"y": y.detach(), **dict(zip(wanted, found, strict=True))}


def slopes(y: Tensor) -> Tensor:
    """dy."""
    return torch.linspace(-1, 2, y.numel()).view_as(y).to(y.dtype)


def exact(layer: LoRALinear, x: Tensor, dtype: torch.dtype) -> Case:
    """y and dx in float64, from the operands that the kernels are given: those of torch, rounded to `dtype`."""
    W = layer.weight_format.dequantize(layer.weight.detach(), FP32)
    W, x, A = W.T if layer.transposed else W, x.detach().to(dtype), layer.lora_A.detach().to(dtype)
    B = (layer.lora_B.detach() * layer.scale).to(dtype)
    if layer.forward_choice == "merged":
        W = W.double() + layer.scale * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        A = torch.zeros_like(A)
    W = W.to(dtype).double()
    y = x.double() @ W.T + (x @ A.T).double() @ B.double().T
    y += 0 if layer.bias is None else layer.bias.detach().double()
    dy = slopes(y.to(dtype))
    return {"y": y, "x": dy.double() @ W + (dy @ B).double() @ A.double()}


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def assert_no_worse_than_torch(dtype: torch.dtype, kind: str, route: Route, r: int, **options: Any) -> None:
    """y and dx as close to float64 as torch's or closer; the other gradients are torch's, to the bit."""
    x = torch.randn(2, 9, D_IN, generator=torch.Generator().manual_seed(2)).to(options.get("stored", FP32))
    by_torch, by_triton = (
        computed(layer_of(kernels, kind, route, r, **options), x.clone(), dtype) for kernels in ("torch", "triton")
    )
    assert by_triton.keys() == by_torch.keys()
    for name, expected in exact(layer_of("torch", kind, route, r, **options), x, dtype).items():
        ours, theirs = by_triton.pop(name), by_torch.pop(name)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert error(ours, expected) <= error(theirs, expected) + 1e-7, name  # a sum in fp32 has such an error
    for name, theirs in by_torch.items():
        assert torch.equal(by_triton[name], theirs), name


@every_dtype
@pytest.mark.parametrize("r", [1, 3, 16, 24])
def test_a_layer_is_no_worse_than_by_torch(r: int, dtype: torch.dtype) -> None:
    assert_no_worse_than_torch(dtype, "linear", "factored", r)


@pytest.mark.parametrize("route", ["merged", "factored"])
@pytest.mark.parametrize("kind", ["without bias", "conv1d"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_every_kind_of_layer_by_both_routes(kind: str, route: Route, dtype: torch.dtype) -> None:
    assert_no_worse_than_torch(dtype, kind, route, 3)


@pytest.mark.parametrize("options", [{"stored": BF16}, {"base_dtype": "bfloat16"}, {"base_dtype": "int8"}], ids=str)
def test_weights_in_16_and_8_bits(options: dict[str, Any]) -> None:
    assert_no_worse_than_torch(BF16, "linear", "factored", 3, **options)


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D_IN, d) for d in (D_OUT, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


def projections(kernels: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Projections()
    inject_lora(model, LoRAConfig(r=3, forward="factored", kernels=kernels))
    layers = list(lora_layers(model).values())
    layers[1].forward_choice = "merged"
    attach_caches(layers)
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    return model


def test_siblings_add_up_their_gradients_of_x_each_by_its_own_route() -> None:
    x = torch.randn(7, D_IN)
    gradients = []
    for model in (projections("torch").double(), projections("triton")):
        given = x.to(next(model.parameters()).dtype).requires_grad_()
        y = model(given)
        gradients.append((y.detach(), *torch.autograd.grad(y.sin().sum(), [given, *lora_parameters(model)])))
    for exact, ours in zip(*gradients, strict=True):
        assert error(ours, exact) <= 5e-6


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]


def test_a_compiled_model_calls_the_kernels_in_one_graph() -> None:
    model, x = projections("triton"), torch.randn(7, D_IN)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


# --- where they cannot run -------------------------------------------------------------------------------------


def test_settings_without_a_kernel_are_refused() -> None:
    with pytest.raises(ValueError, match="kernels must be torch or triton, not 'cuda'"):
        LoRAConfig(kernels="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kernels must not be triton with lora_dropout"):
        LoRAConfig(kernels="triton", lora_dropout=0.1)


def test_float64_is_refused_when_wrapping_and_when_computing() -> None:
    config = LoRAConfig(r=2, kernels="triton", target_modules=["0"])
    with pytest.raises(ValueError, match="kernels = triton would compute 0, which is float64, in float32"):
        inject_lora(nn.Sequential(nn.Linear(4, 4).double()), config)
    for route in ("factored", "merged"):
        layer = layer_of("triton", "linear", route, 2).double()  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="float32, bfloat16 or float16, not in float64"):
            layer(torch.randn(3, D_IN, dtype=torch.float64))


RUN = merged(BASE, {"lora": {"kernels": "triton"}})


def test_a_machine_without_a_gpu_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from relora.config import check
    from relora.config.derived import lora_config

    model, config = nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, kernels="triton", target_modules=["0"])
    run = check(RUN)
    assert lora_config(run).kernels == "triton"
    assert problems(model, config) == launch_problems(run) == []
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    [problem] = problems(model, config)
    assert problem.startswith("kernels = triton: needs a CUDA device, and there is none here")
    assert launch_problems(run) == [f"lora.{problem}"]
    assert launch_problems(check(merged(RUN, {"training": {"method": "full"}}))) == []
    assert problems(model.to("meta"), config) == [], "a model without values is that of a run elsewhere"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert problems(nn.Sequential(nn.Linear(4, 4)), config) == []


def test_a_missing_triton_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_extra.importlib.util, "find_spec", lambda _: None)
    problem = triton_extra.kernels_problem("triton")
    assert problem is not None
    assert problem.endswith("pip install 'relora[triton]'")
    assert triton_extra.kernels_problem("torch") is None


# --- compiled for a GPU ------------------------------------------------------------------------------------------


def machine_code(kernel: Any, dtype: str, **constants: Any) -> Any:
    """`kernel` compiled for an H100, its matrices aligned and with rows that are contiguous."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    config, signature, attributes = kernel.configs[-1], {}, {}
    constants |= config.kwargs
    values: dict[Any, Any] = dict(constants)
    for place, name in enumerate(kernel.fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_strides"):
            signature[name], values[place, 1], attributes[place, 0] = ("i32", "constexpr"), 1, [["tt.divisibility", 16]]
        elif name in ("num_rows", "num_columns", "size", "rank", "rows_log2", "scale"):
            signature[name] = "fp32" if name == "scale" else "i32"
        else:
            is_wide = name in ("W", "added") or (kernel.fn.__name__ == "_form_merged" and name != "out")
            signature[name], attributes[(place,)] = "*fp32" if is_wide else f"*{dtype}", [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel.fn, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def test_both_kernels_compile_for_a_gpu(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with fresh_kernels(interpreted=False) as module:
        assert len(module._fused_product.configs) > 1
        fused = machine_code(module._fused_product, "bf16", IS_ADDED=True, PRECISION="ieee", STEP=64)
        formed = machine_code(module._form_merged, "bf16", STEP=32)
    assert "wgmma" in fused.asm["ptx"], "bf16 products are the tensor cores'"
    assert not {"wgmma", "mma.sync", "tf32"} & set(formed.asm["ptx"].replace(".", " ").split()), "fp32 stays fp32"
    assert all(kernel.metadata.shared <= 99 * 1024 for kernel in (fused, formed)), "fits a consumer's GPU too"
