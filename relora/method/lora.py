"""The wrapped layer: a frozen weight W and the trained factors A, B of its update.

Shapes, here and everywhere: W (d_out, d_in), or (d_in, d_out) for transformers' Conv1D; A (r, d_in);
B (d_out, r). The update is delta = scale * B @ A.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
from torch import Tensor, nn

from relora.method.base_weights import WeightFormat
from relora.method.choices import BaseDtype, Bias, Forward, Route
from relora.method.kernels import Projection, compute_dtype, project, project_dropped
from relora.method.names import canonical
from relora.method.routes import layer_route, merge_problem
from relora.method.store import Shard

if TYPE_CHECKING:
    from relora.method.merged_cache import MergedWeightCache
    from relora.method.siblings import SiblingGroup


def lora_delta(A: Tensor, B: Tensor, scale: float, *, transposed: bool, rows: slice = slice(None)) -> Tensor:
    """scale * B @ A in the layout of the weight, in at least fp32 whatever surrounds the call.

    Args:
        A: (r, d_in).
        B: (d_out, r).
        rows: of the weight, for a process that holds only these.

    Returns:
        (d_out, d_in), or (d_in, d_out) if `transposed`; fewer rows with `rows`.
    """
    if transposed:
        A = A[:, rows]
    else:
        B = B[rows]
    dtype = torch.promote_types(A.dtype, torch.float32)
    with _full_precision(A.device.type):
        delta = (B.to(dtype) @ A.to(dtype)).mul_(scale)
    return delta.T if transposed else delta


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Disable autocast and TF32: either would round an update to 8 or 10 bits."""
    # Not allow_tf32: reading it raises once anyone has set fp32_precision, and writing it back undoes "medium".
    matmul = torch.backends.cuda.matmul
    precision = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = precision


FACTORS = ("lora_A", "lora_B")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which modules to wrap, and how. Names and meaning are PEFT's.

    Attributes:
        r: rank of the update, at most the smaller side of every wrapped weight.
        lora_alpha: scale = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732).
        lora_dropout: dropout on the input of A, in [0, 1).
        bias: which biases train in full: none, all, or lora_only (those of wrapped layers).
        target_modules: "all-linear" (every linear layer but the output head), a regex that a module's whole
            name must match, or names and suffixes of names.
        modules_to_save: modules that train in full, by name or suffix; "rest" for every parameter that is
            not a wrapped weight; None for none.
        base_dtype: how the frozen weights are stored; None for their own dtype. If it is coarser than float32, an
            exact fp32 master of each weight is held in host memory.
        forward: merged (one product with W + delta), factored (x A^T B^T beside x W^T), or auto: the cheaper.
        keep_merged: cache W + delta of the merged route until W or the factors change, instead of forming it in
            both passes. For models whose parameters torch's optimizers write (`LoRALinear.can_cache`).
    """

    r: int = 128
    lora_alpha: float = 32
    use_rslora: bool = False
    lora_dropout: float = 0.0
    bias: Bias = "none"
    target_modules: str | tuple[str, ...] | list[str] = "all-linear"
    modules_to_save: Literal["rest"] | tuple[str, ...] | list[str] | None = None
    base_dtype: BaseDtype | None = None
    forward: Forward = "auto"
    keep_merged: bool = False

    def __post_init__(self) -> None:
        rules = {
            f"r must be >= 1, not {self.r}": self.r >= 1,
            f"lora_alpha must be > 0, not {self.lora_alpha}": self.lora_alpha > 0,
            f"lora_dropout must be in [0, 1), not {self.lora_dropout}": 0 <= self.lora_dropout < 1,
            f"bias must be none, all or lora_only, not {self.bias!r}": self.bias in ("none", "all", "lora_only"),
            "target_modules must not be empty": len(self.target_modules) > 0,
            f"forward must be auto, merged or factored, not {self.forward!r}": self.forward in get_args(Forward),
        }
        if self.forward == "merged":
            problem = merge_problem(self.base_dtype, torch.float32, self.lora_dropout)
            rules[f"forward must not be merged: {problem}"] = problem is None
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise ValueError("; ".join(broken))

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoRALinear(nn.Module):
    """y = x W^T + bias + scale * dropout(x) A^T B^T, around an `nn.Linear` or a Conv1D.

    `weight` and `bias` are the parameters of the wrapped layer and keep their names. A and B are float32
    (float64 around a float64 weight). B begins at zero, A as torch draws it; `inject_lora` and `restart`
    draw A from a key instead.

    Attributes:
        weight: W as it is stored: of its own shape, or quantized and flat.
        weight_format: how W is stored.
        transposed: W is (d_in, d_out), as in a Conv1D.
        master: the exact W in float32 in host memory, or this process's shard of it, where the stored W is coarser;
            else None.
        forward_choice: `LoRAConfig.forward`.
        override: full-precision W (of its own shape) to use instead of the stored one; set only inside
            `exact_weights`.
        siblings: the layers that it is computed together with, if there are any.
        cache: of W + delta, if the model keeps it (`attach_caches`).
        can_cache: writes to W, A and B are seen by torch's version counters or end in a step of a torch optimizer, and
            W stays whole between passes. An engine for which this does not hold sets it to False.
        can_group: the parameters are whole while a sibling computes. An engine that gathers one layer at a time sets
            it to False.
    """

    bias: nn.Parameter | None

    def __init__(self, plain: nn.Module, config: LoRAConfig) -> None:
        super().__init__()
        weight, bias = cast(nn.Parameter, plain.weight), cast(nn.Parameter | None, plain.bias)
        self.transposed = is_conv1d(plain)
        d_out, d_in = reversed(weight.shape) if self.transposed else weight.shape
        self.in_features, self.out_features, self.r = d_in, d_out, config.r
        self.scale, self.forward_choice = config.scale, config.forward
        self.weight_format = WeightFormat(config.base_dtype, tuple(weight.shape))
        stored = self.weight_format.quantize(weight.detach())
        # The same parameter where nothing is rounded: other modules may hold it.
        is_same = (stored.dtype, stored.shape) == (weight.dtype, weight.shape)
        self.weight = weight if is_same else nn.Parameter(stored, requires_grad=False)
        self.master: Shard | None = None
        if self.weight_format.needs_master:
            exact = weight.detach().float()
            self.master = Shard(exact if exact.is_meta else exact.cpu(), 0)
        self.bias = bias
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(config.r, d_in, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_B = nn.Parameter(torch.zeros(d_out, config.r, dtype=dtype, device=weight.device))
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.override: Tensor | None = None
        self.siblings: SiblingGroup | None = None
        self.cache: MergedWeightCache | None = None
        self.can_cache = self.can_group = True
        self.route(1, dtype)  # raises if the merged route is asked for and impossible
        # The plain layer is kept outside of the module tree, without parameters: fully_shard replaces those of the
        # tree, and a second reference would keep the whole weight in memory.
        plain.register_parameter("weight", None)
        plain.register_parameter("bias", None)
        self.__dict__["_plain"] = plain
        self._plain_dtype = weight.dtype

    @classmethod
    def from_linear(cls, plain: nn.Module, config: LoRAConfig) -> "LoRALinear":
        """Wrap `plain` and freeze its weight.

        `weight` is then the very parameter of `plain`, unless `config.base_dtype` stores it otherwise.
        """
        layer = cls(plain, config)
        layer.weight.requires_grad_(False)
        return layer

    def to_linear(self) -> nn.Module:
        """The plain layer again, holding this layer's current weight and bias; A and B are dropped."""
        if self.siblings is not None:
            self.siblings.dissolve()
        self.cache = None
        plain = cast(nn.Module, self.__dict__["_plain"])
        weight = self.weight
        if weight.dtype != self._plain_dtype or self.master is not None:
            exact = self.weight if self.master is None else self.master.values.view(self.weight_format.shape)
            weight = nn.Parameter(exact.to(weight.device, self._plain_dtype, copy=True), requires_grad=False)
        plain.register_parameter("weight", weight)
        plain.register_parameter("bias", self.bias)
        return plain

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        shared = self.siblings.take(self, x) if self.siblings is not None else None
        if shared is not None:
            return shared
        projection = self.projection(x)
        if self.training and isinstance(self.dropout, nn.Dropout):
            return project_dropped(x, self.dropout(x), projection)
        [y] = project(x, [projection])
        return y

    def projection(self, x: Tensor) -> Projection:
        """This layer's product with x (..., d_in), for the kernels, by the route that such a call takes."""
        dtype, cache = compute_dtype(x), self.active_cache
        route = self.route(x.numel() // self.in_features, dtype, with_gradients=torch.is_grad_enabled())
        weight, weight_format = cast(Tensor, self.weight), self.weight_format
        if self.override is not None:
            weight, weight_format = self.override, WeightFormat(None, weight_format.shape)
        tensors = (weight, self.bias, self.lora_A, self.lora_B)
        projection = Projection(*tensors, None, weight_format, self.scale, self.transposed, route)
        if cache is None or route == "factored":
            return projection
        return replace(projection, merged=cache.get((weight, self.lora_A, self.lora_B), dtype, projection.form))

    def route(self, num_tokens: int, dtype: torch.dtype, *, with_gradients: bool = True) -> Route:
        """The route of a call with `num_tokens` tokens that computes in `dtype`.

        Raises:
            ValueError: the merged route is asked for, and W is no longer stored exactly.
        """
        cache, num_forms = self.active_cache, 1.0 + with_gradients
        if cache is not None:
            is_fresh = cache.get((self.weight, self.lora_A, self.lora_B), dtype) is not None
            num_forms = 1.0 - is_fresh
        # Dynamo warns of lru_cache, and traces what it wraps.
        choose = layer_route if torch.compiler.is_compiling() else _cached_route
        return choose(
            num_tokens,
            self.in_features,
            self.out_features,
            self.r,
            forward=self.forward_choice,
            weight_format=self.weight_format.name,
            weight_dtype=self.weight.dtype,
            dropout=self.dropout.p if self.training and isinstance(self.dropout, nn.Dropout) else 0.0,
            device_type=self.weight.device.type,
            dtype=dtype,
            num_forms=num_forms,
            with_gradients=with_gradients,
        )

    @property
    def active_cache(self) -> "MergedWeightCache | None":
        """The cache of W + delta, where it may be used; a compiled graph cannot hold one."""
        return self.cache if self.can_cache and not torch.compiler.is_compiling() else None

    def delta(self) -> Tensor:
        """scale * B @ A in the layout of `weight`, formed in fp32 (float64 around a float64 weight)."""
        return lora_delta(self.lora_A.detach(), self.lora_B.detach(), self.scale, transposed=self.transposed)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, scale={self.scale:g}"


_cached_route = lru_cache(maxsize=1024)(layer_route)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D (GPT-2), whose weight is (d_in, d_out). Known by name, not imported."""
    return (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D")


def is_linear(module: nn.Module) -> bool:
    """Whether this computes x W^T + bias and nothing else, so that LoRALinear can stand in its place.

    Not so for a subclass with a forward of its own (a router, a quantized layer), nor for a layer whose weight is
    computed at each access (a parametrization): wrapped, they would compute something else.
    """
    if not isinstance(module.__dict__.get("_parameters", {}).get("weight"), nn.Parameter):
        return False
    if type(module).__module__ == "transformers.models.falcon.modeling_falcon":
        return type(module).__name__ == "FalconLinear"  # its own forward computes the same product
    return is_conv1d(module) or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)


def factor_names(model: nn.Module) -> set[str]:
    """Canonical names of the A and B of every wrapped layer."""
    return {f"{name}.{which}" for name in lora_layers(model) for which in FACTORS}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The wrapped layers of a model by canonical name, in the model's order.

    Order and names are the same on every process, whatever the model is wrapped in.
    """
    found = [(canonical(name), layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear)]
    layers = dict(found)
    assert len(layers) == len(found), "two layers have one canonical name: one of them would never be merged"
    return layers
