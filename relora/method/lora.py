"""The wrapped layer: a frozen weight W and the trained factors A, B of its update.

Shapes, here and everywhere: W (d_out, d_in), or (d_in, d_out) for transformers' Conv1D; A (r, d_in);
B (d_out, r). The update is delta = scale * B @ A.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from relora.method.base_weights import WeightFormat
from relora.method.choices import BaseDtype, Bias, CacheSpan, Forward, Kernels, Route
from relora.method.delta import lora_delta
from relora.method.kernels import Projection, compute_dtype, project, project_dropped
from relora.method.masters import add_master, take_master
from relora.method.names import canonical
from relora.method.plain_layers import is_conv1d, return_attributes, share_attributes
from relora.method.routes import layer_route, merge_problem
from relora.method.store import Shard

if TYPE_CHECKING:
    from relora.method.merged_cache import MergedWeightCache
    from relora.method.siblings import SiblingGroup


FACTORS = ("lora_A", "lora_B")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which modules to wrap, and how. Names and meaning are PEFT's.

    Attributes:
        r: rank of the update, at most the smaller side of every wrapped weight.
        lora_alpha: scale = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732).
        lora_dropout: dropout on the input of A, in [0, 1).
        bias: which biases train in full: none, all, or lora_only (those of wrapped layers).
        target_modules: "all-linear" (every linear layer but heads and those that cannot be wrapped, which are reported
            as left out), a regex that a module's whole name must match, or names and suffixes of names.
        modules_to_save: modules that train in full, by name or suffix; "rest" for every parameter that is
            not a wrapped weight; None for the head of a classifier alone; () for none.
        base_dtype: how the frozen weights are stored; None for their own dtype. If it is coarser than float32, an
            exact fp32 master of each weight is held in host memory.
        forward: merged (one product with W + delta), factored (x A^T B^T beside x W^T), or auto: the cheaper.
        keep_merged: cache W + delta of the merged route for the backward pass instead of forming it again; for longer
            where an engine sets `LoRALinear.cache_span`.
        kernels: triton: y and dx of the factored route, and W + delta, each by one fused kernel instead of torch's
            products. Needs a CUDA device, and no dropout.
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
    kernels: Kernels = "torch"

    def __post_init__(self) -> None:
        rules = {
            f"r must be >= 1, not {self.r}": self.r >= 1,
            f"lora_alpha must be > 0, not {self.lora_alpha}": self.lora_alpha > 0,
            f"lora_dropout must be in [0, 1), not {self.lora_dropout}": 0 <= self.lora_dropout < 1,
            f"bias must be none, all or lora_only, not {self.bias!r}": self.bias in ("none", "all", "lora_only"),
            "target_modules must not be empty": len(self.target_modules) > 0,
            f"forward must be auto, merged or factored, not {self.forward!r}": self.forward in get_args(Forward),
            f"kernels must be torch or triton, not {self.kernels!r}": self.kernels in get_args(Kernels),
            "kernels must not be triton with lora_dropout": self.kernels == "torch" or self.lora_dropout == 0,
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
    draw A from a key instead. `state_dict()` has the master beside them, as `master`.

    Attributes:
        weight: W as it is stored: of its own shape, or quantized and flat.
        weight_format: how W is stored.
        transposed: W is (d_in, d_out), as in a Conv1D.
        master: the exact W in float32 in host memory, or this process's shard of it, where the stored W is coarser;
            else None.
        forward_choice, kernels: `LoRAConfig.forward` and `.kernels`.
        override: full-precision W (of its own shape) to use instead of the stored one; set only inside
            `exact_weights`.
        siblings: the layers that it is computed together with, if there are any.
        cache: of W + delta, if the model keeps it (`attach_caches`).
        cache_span: how long the cache holds W + delta. "pass": from a forward pass to its own backward pass, so that
            no write between passes is ever missed. "update": until W, A or B changes, which an engine sets where all
            writes are seen by torch's version counters or end in a step of a torch optimizer. "none": not at all,
            where W is not whole between the passes.
        can_group: the parameters are whole while a sibling computes. An engine that gathers one layer at a time sets
            it to False.
    """

    bias: nn.Parameter | None

    def __init__(self, plain: nn.Module, config: LoRAConfig) -> None:
        nn.Module.__init__(self)  # also where nn.Linear is a base: it would make a weight
        weight, bias = cast(nn.Parameter, plain.weight), cast(nn.Parameter | None, plain.bias)
        self.transposed = is_conv1d(plain)
        d_out, d_in = reversed(weight.shape) if self.transposed else weight.shape
        self.in_features, self.out_features, self.r = d_in, d_out, config.r
        self.scale, self.forward_choice, self.kernels = config.scale, config.forward, config.kernels
        self.weight_format = WeightFormat(config.base_dtype, tuple(weight.shape))
        stored = self.weight_format.quantize(weight.detach())
        # The same parameter where nothing is rounded: other modules may hold it.
        is_same = (stored.dtype, stored.shape) == (weight.dtype, weight.shape)
        self.weight = weight if is_same else nn.Parameter(stored, requires_grad=False)
        vars(self.weight).update(vars(weight))  # what was set on it
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
        self.cache_span: CacheSpan = "pass"
        self.can_group = True
        self.route(1, dtype)  # raises if the merged route is asked for and impossible
        # The plain layer is kept outside of the module tree, without parameters: fully_shard replaces those of the
        # tree, and a second reference would keep the whole weight in memory.
        self.__dict__["_plain"] = plain
        self._plain_dtype = weight.dtype
        self._own = frozenset({"_own", *vars(self)})
        share_attributes(plain, self)
        plain.register_parameter("weight", None)
        plain.register_parameter("bias", None)

    @staticmethod
    def from_linear(plain: nn.Module, config: LoRAConfig) -> "LoRALinear":
        """Wrap `plain` and freeze its weight.

        `weight` is then the very parameter of `plain`, unless `config.base_dtype` stores it otherwise.
        """
        layer = (LoRALinear if is_conv1d(plain) else _LoRAnnLinear)(plain, config)
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
            vars(weight).update(vars(self.weight))
        plain.register_parameter("weight", weight)
        plain.register_parameter("bias", self.bias)
        return_attributes(self, plain, own=self._own)
        return plain

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRALinear":
        """`.to()`, `.half()` and the like, of W as of a plain layer, unless `base_dtype` says how it is stored.

        The master stays in host memory, and A and B stay float32, or are float64 around a float64 weight.
        """
        W = self.weight
        self._plain_dtype = fn(torch.empty(0, dtype=self._plain_dtype, device=W.device)).dtype
        of_factors = torch.promote_types(self._plain_dtype, torch.float32)
        wanted = {self.lora_A: of_factors, self.lora_B: of_factors}
        if self.weight_format.name is not None:
            wanted[W] = W.dtype
        # The tensors themselves stand in it too, so that no other one takes an id.
        by_id = {id(t): (t, dtype) for p, dtype in wanted.items() for t in (p, p.grad) if t is not None}

        def applied(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            _, dtype = by_id.get(id(tensor), (tensor, new.dtype))
            return new if new.dtype == dtype else tensor.to(new.device, dtype)

        super()._apply(applied, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        add_master(self, destination, prefix)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As in any module, and the master, from a state of whatever format."""
        assign = local_metadata.get("assign_to_params_buffers", False)
        rest = take_master(self, state_dict, prefix, assign=assign, missing=missing_keys, errors=error_msgs)
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

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
        dtype, cache, with_gradients = compute_dtype(x), self.active_cache, torch.is_grad_enabled()
        route, outlives = self.route(x.numel() // self.in_features, dtype), self.cache_span == "update"
        weight, weight_format = cast(Tensor, self.weight), self.weight_format
        if self.override is not None:
            weight, weight_format = self.override, WeightFormat(None, weight_format.shape)
        tensors = (weight, self.bias, self.lora_A, self.lora_B)
        projection = Projection(*tensors, None, weight_format, self.scale, self.transposed, route, self.kernels)
        if cache is None or route == "factored" or not (with_gradients or outlives):
            return projection
        parameters = weight, self.lora_A, self.lora_B
        return replace(projection, merged=cache.get(parameters, dtype, projection.form, keep=outlives))

    def route(self, num_tokens: int, dtype: torch.dtype, *, with_gradients: bool | None = None) -> Route:
        """The route of a call with `num_tokens` tokens that computes in `dtype`.

        Raises:
            ValueError: the merged route is asked for, and W is no longer stored exactly.
        """
        with_gradients = torch.is_grad_enabled() if with_gradients is None else with_gradients
        cache, num_forms = self.active_cache, 1.0 + with_gradients
        if cache is not None and self.cache_span == "pass":
            num_forms = 1.0
        elif cache is not None:
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
        return None if self.cache_span == "none" or torch.compiler.is_compiling() else self.cache

    def delta(self) -> Tensor:
        """scale * B @ A in the layout of `weight`, formed in fp32 (float64 around a float64 weight)."""
        return lora_delta(self.lora_A.detach(), self.lora_B.detach(), self.scale, transposed=self.transposed)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, scale={self.scale:g}"


class _LoRAnnLinear(LoRALinear, nn.Linear):  # type: ignore[misc]
    """Around an nn.Linear: still one to code that looks for linear layers, such as transformers' for a dtype."""


_cached_route = lru_cache(maxsize=1024)(layer_route)


def factor_names(model: nn.Module) -> set[str]:
    """Canonical names of the A and B of every wrapped layer."""
    return {f"{name}.{which}" for name in lora_layers(model) for which in FACTORS}


def wrapped_names(names: Iterable[str]) -> set[str]:
    """The wrapped layers of a model with parameters of these names, such as those of a checkpoint."""
    ending = f".{FACTORS[0]}"
    return {name.removesuffix(ending) for name in names if name.endswith(ending)}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The wrapped layers of a model by canonical name, in the model's order.

    Order and names are the same on every process, whatever the model is wrapped in.
    """
    found = [(canonical(name), layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear)]
    layers = dict(found)
    assert len(layers) == len(found), "two layers have one canonical name: one of them would never be merged"
    return layers
