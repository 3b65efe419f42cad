"""The wrapped layer: a frozen weight W and the trained factors A, B of its update.

Shapes, here and everywhere: W (d_out, d_in), or (d_in, d_out) for transformers' Conv1D; A (r, d_in);
B (d_out, r). The update is delta = scale * B @ A.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor, nn

from relora.method.base_weights import WeightFormat
from relora.method.choices import BaseDtype, Bias, Forward, Route
from relora.method.kernels import Fixed, Projection, compute_dtype, project, project_dropped
from relora.method.merged_cache import MergedWeightCache, can_cache, mark_written_in_place
from relora.method.names import canonical
from relora.method.routes import choose_route, form_cost, merge_problem
from relora.method.store import Shard


def lora_delta(A: Tensor, B: Tensor, scale: float, *, transposed: bool, rows: slice = slice(None)) -> Tensor:
    """scale * B @ A in the layout of the weight, in at least fp32 whatever surrounds the call.

    Args:
        A: (r, d_in).
        B: (d_out, r).
        rows: of the weight, for a process that holds only these.
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
    """Neither autocast nor TF32: either would round what is merged to 8 or 10 bits."""
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
    """What to wrap and how. Names and meaning are PEFT's.

    Attributes:
        r: rank of the update, at most the smaller side of every wrapped weight.
        lora_alpha: scale = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732).
        lora_dropout: dropout on the input of A, in [0, 1).
        bias: which biases train in full: none, all, or lora_only (those of wrapped layers).
        target_modules: "all-linear" (every linear layer but the output head), a regex that a module's whole
            name must match, or names and suffixes of names.
        modules_to_save: modules that train in full, by name or suffix; "rest" for every parameter that is
            not a wrapped weight; None for none.
        base_dtype: how the frozen weights are stored; None as they come. Beside a coarser grid than float32 an
            exact fp32 master of each is kept in host memory.
        forward: merged (one product with W + delta), factored (x A^T B^T beside x W^T), or auto: the cheaper.
        keep_merged: keep W + delta of the merged route until the factors change, instead of forming it twice.
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


class Siblings(Protocol):
    """Layers that read the same x, and are computed together (groups.py)."""

    def take(self, layer: "LoRALinear", x: Tensor) -> Tensor | None:
        """What `layer` makes of x, if it was or now is computed with the others; else the layer computes alone."""

    def leave(self) -> None:
        """Let each layer compute alone from now on."""


class LoRALinear(nn.Module):
    """y = x W^T + bias + scale * dropout(x) A^T B^T, around an `nn.Linear` or a Conv1D.

    `weight` and `bias` are the parameters of the wrapped layer and keep their names. A and B are float32
    (float64 around a float64 weight). B begins at zero, A as torch draws it; `inject_lora` and `restart`
    draw A from a key instead.

    Attributes:
        weight: W as it is stored: of its own shape, or codes.
        grid: how it is stored.
        master: the exact W in float32 in host memory, or this process's part of it, beside a stored W that is
            coarser; else None.
        instead: W in its own shape, to compute with in place of what is stored; None but for a moment.
        siblings: the layers that it is computed with, if there are any.
        kept: W + delta, as long as it is kept.
    """

    bias: nn.Parameter | None
    master: Shard | None
    instead: Tensor | None
    siblings: Siblings | None

    def __init__(self, plain: nn.Module, config: LoRAConfig) -> None:
        super().__init__()
        weight, bias = cast(nn.Parameter, plain.weight), cast(nn.Parameter | None, plain.bias)
        self.transposed = is_conv1d(plain)
        d_out, d_in = reversed(weight.shape) if self.transposed else weight.shape
        self.in_features, self.out_features, self.r = d_in, d_out, config.r
        self.scale = config.scale
        self.weight_format = WeightFormat(config.base_dtype, tuple(weight.shape))
        stored = self.weight_format.quantize(weight.detach())
        # The same parameter where nothing is rounded: others may hold it.
        is_same = (stored.dtype, stored.shape) == (weight.dtype, weight.shape)
        self.weight = weight if is_same else nn.Parameter(stored, requires_grad=False)
        self.master = Shard(_on_host(weight.detach().float()), 0) if self.weight_format.needs_master else None
        self.bias = bias
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(config.r, d_in, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_B = nn.Parameter(torch.zeros(d_out, config.r, dtype=dtype, device=weight.device))
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.how, self.siblings, self.instead = config.forward, None, None
        self.kept = MergedWeightCache() if config.keep_merged else None
        if config.keep_merged:
            mark_written_in_place(self.lora_A, self.lora_B)
        self.route(1, dtype)  # refuses a merged route that is impossible
        # The plain layer waits beside the module tree, without parameters: fully_shard replaces those of the
        # tree, and a second reference would keep the whole weight in memory.
        plain.register_parameter("weight", None)
        plain.register_parameter("bias", None)
        self.__dict__["_plain"] = plain
        self._plain_dtype = weight.dtype

    @classmethod
    def from_linear(cls, plain: nn.Module, config: LoRAConfig) -> "LoRALinear":
        """Wrap `plain`; its weight is frozen, and stays where it is unless it is to be stored otherwise."""
        layer = cls(plain, config)
        layer.weight.requires_grad_(False)
        return layer

    def to_linear(self) -> nn.Module:
        """The plain layer again, holding this layer's weight and bias as they now are; A and B are dropped."""
        plain = cast(nn.Module, self.__dict__["_plain"])
        weight = self.weight
        if weight.dtype != self._plain_dtype or self.master is not None:
            exact = self.weight if self.master is None else self.master.values.view(self.weight_format.shape)
            weight = nn.Parameter(exact.to(weight.device, self._plain_dtype, copy=True), requires_grad=False)
        plain.register_parameter("weight", weight)
        plain.register_parameter("bias", self.bias)
        return plain

    def forward(self, x: Tensor) -> Tensor:
        together = self.siblings.take(self, x) if self.siblings is not None else None
        if together is not None:
            return together
        projection = self.projection(x)
        if self.active_dropout:
            return project_dropped(x, self.dropout(x), projection)
        [y] = project(x, [projection])
        return y

    def projection(self, x: Tensor) -> Projection:
        """What the kernels need to know of this layer for a call with x, by the route that it takes."""
        dtype, grad = compute_dtype(x), torch.is_grad_enabled()
        route = self.route(x.numel() // self.in_features, dtype, with_gradients=grad)
        weight, weight_format = cast(Tensor, self.weight), self.weight_format
        if self.instead is not None:
            weight, weight_format = self.instead, WeightFormat(None, weight_format.shape)
        fixed = Fixed(weight_format, self.scale, self.transposed, route)
        projection = Projection(fixed, weight, self.bias, self.lora_A, self.lora_B)
        if self.kept is None or route == "factored" or not self.keeps_merged:
            return projection
        return replace(projection, kept=self.kept.of(projection, dtype))

    def route(self, num_tokens: int, dtype: torch.dtype, *, with_gradients: bool = True) -> Route:
        """How a call with so many tokens is computed.

        Raises:
            ValueError: the merged route is asked for, and W is no longer stored exactly.
        """
        problem = merge_problem(self.weight_format.name, self.weight.dtype, self.active_dropout)
        if problem is not None and self.how == "merged":
            raise ValueError(f"forward = merged: {problem}")
        num_forms = 1.0 + with_gradients
        if self.kept is not None and self.keeps_merged:
            num_forms = 1.0 - self.kept.is_fresh((self.weight, self.lora_A, self.lora_B), dtype)
        return choose_route(
            num_tokens,
            self.in_features,
            self.out_features,
            self.r,
            forward=self.how,
            can_merge=problem is None,
            num_forms=num_forms * form_cost(self.weight.device.type, dtype),
            with_gradients=with_gradients,
        )

    @property
    def keeps_merged(self) -> bool:
        """Whether W + delta of the merged route is kept: it is asked for, and possible here (`can_keep`)."""
        return self.kept is not None and can_cache(self.lora_A, self.lora_B)

    @property
    def active_dropout(self) -> float:
        return self.dropout.p if self.training and isinstance(self.dropout, nn.Dropout) else 0.0

    def delta(self) -> Tensor:
        """scale * B @ A in the layout of `weight`, formed in fp32 (float64 around a float64 weight)."""
        return lora_delta(self.lora_A.detach(), self.lora_B.detach(), self.scale, transposed=self.transposed)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, scale={self.scale:g}"


def _on_host(values: Tensor) -> Tensor:
    return values if values.is_meta else values.cpu()


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D (GPT-2), whose weight is (d_in, d_out). Told by name: no import."""
    return _is_class(module, "transformers.pytorch_utils", "Conv1D")


def is_linear(module: nn.Module) -> bool:
    """Whether this computes x W^T + bias and nothing else, so that LoRALinear can stand in its place.

    A subclass with a forward of its own (a router, a quantised layer) and a layer whose weight is computed
    anew at each access (a parametrization) are not: wrapped, they would compute something else.
    """
    if not isinstance(module.__dict__.get("_parameters", {}).get("weight"), nn.Parameter):
        return False
    # Falcon's own linear only spells the same product another way.
    same = is_conv1d(module) or _is_class(module, "transformers.models.falcon.modeling_falcon", "FalconLinear")
    return same or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)


def _is_class(module: nn.Module, home: str, name: str) -> bool:
    return (type(module).__module__, type(module).__name__) == (home, name)


def factor_names(model: nn.Module) -> set[str]:
    """Canonical names of the A and B of every wrapped layer."""
    return {f"{name}.{which}" for name in lora_layers(model) for which in FACTORS}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The wrapped layers of a model by canonical name, in the model's order."""
    found = [(canonical(name), layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear)]
    layers = dict(found)
    assert len(layers) == len(found), "two layers have one canonical name: one of them would never be merged"
    return layers
