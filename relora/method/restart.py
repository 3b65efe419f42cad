"""The restart of ReLoRA: merge -> reinit -> reset, one verb, written once, over a store.

arXiv 2307.05695, Algorithm 1. Layer by layer and in place: the storage of a parameter never changes, and
temporaries are those of one layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora.method.lora import FACTORS, LoRALinear, lora_layers
from relora.method.merge import Merge, Offset, merge_layer, take_out
from relora.method.registry import resolve_object
from relora.method.reinit import REINITS, DrawKey, LayerView, Reinit, Residual
from relora.method.reset import RESETS, Keep, Reset, reset_state, state_problems
from relora.method.store import Store, TorchStore


@dataclass(frozen=True)
class RestartReport:
    """The result of a restart, as measured after it.

    Attributes:
        merged_layers: layers whose update went into W.
        merge_error: |(W_new - W_old) - delta|_F / |delta|_F of the W that the model computes with, the largest over
            layers.
        master_error: the same of the exact W, which differs where W is stored in a coarser format.
        optimizer_zeroed_fraction: share of the moments of A and B that is zero, read back.
        update_effective_rank: exp(entropy of the normalised singular values) of delta, mean over layers.
    """

    merged_layers: int
    merge_error: float
    master_error: float
    optimizer_zeroed_fraction: float
    update_effective_rank: float


@torch.no_grad()
def restart(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    seed: int,
    index: int,
    reinit: str | Reinit = "kaiming",
    optimizer_reset: str | Reset = "zero",
    prune_ratio: float = 0.9,
    carry_residual: bool = False,
    store: Store | None = None,
    draw_index: int = 0,
    transform_delta: Callable[[str, Tensor], Tensor] | None = None,
) -> RestartReport:
    """Merge every update into its W, begin new factors, and reset their optimizer state.

    The function of the model is the same before and after, to the rounding of what W is stored in.

    Args:
        optimizer: any torch optimizer whose state `OptimizerKind` describes, AdamW and those like it among them.
        seed, index: the key of the draws; `index` counts restarts from 1 (0 is the draw at injection).
        reinit: kaiming, orthogonal, `module:attribute`, or a policy.
        optimizer_reset: zero, magnitude, random, keep, `module:attribute`, or a policy.
        prune_ratio: for `magnitude` and `random`, in (0, 1].
        carry_residual: where W is quantized, the new factors begin as the best rank-r approximation of the rounding
            error of W, instead of those of `reinit`.
        store: how to reach parameters and state; plain torch unless an engine brings its own.
        draw_index: which of several independent draws; processes that train separately take their process index.
        transform_delta: called with a layer's name and its delta (a shard of it, where W is sharded); what it returns
            is merged.

    Raises:
        ValueError: no LoRA layers, a bad option, a factor that is not finite, a factor whose optimizer state is missing
            or unknown (unless `keep`), a parameter that the store cannot reach. Nothing has been changed then.
        RuntimeError: something reads back otherwise than it was written, or a policy returned unusable factors.
    """
    store, layers = store or TorchStore(), lora_layers(model)
    store.register(layers.values())
    policy = _policy(reinit, carry_residual)
    reset = resolve_object("optimizer_reset", optimizer_reset, RESETS, Reset)  # type: ignore[type-abstract]
    factors = {f"{name}.{which}": getattr(layer, which) for name, layer in layers.items() for which in FACTORS}
    if index < 1:
        raise ValueError(f"index must be >= 1 (0 is the draw at injection), not {index}")
    if not 0 < prune_ratio <= 1:
        raise ValueError(f"prune_ratio must be in (0, 1], not {prune_ratio}")
    check_layers(layers, store)
    if not isinstance(reset, Keep):
        problems = state_problems(optimizer, factors, store)
        if problems:
            raise ValueError("\n".join(problems))
    _check_finite(factors, store)
    merges, zeroed = [], []
    for name, layer in layers.items():
        transform = partial(transform_delta, name) if transform_delta is not None else None
        start = partial(start_layer, layer, store, policy, DrawKey(seed, index, name, draw_index))
        merges.append(merge_layer(layer, store, transform_delta=transform, start=start))
    for name, factor in factors.items():
        key = DrawKey(seed, index, name)
        zeroed.append(reset_state(optimizer, name, factor, reset=reset, prune_ratio=prune_ratio, key=key, store=store))
    return _report(merges, zeroed)


@torch.no_grad()
def start_factors(
    model: nn.Module,
    *,
    seed: int,
    reinit: str | Reinit = "kaiming",
    carry_residual: bool = False,
    store: Store | None = None,
    draw_index: int = 0,
    index: int = 0,
) -> None:
    """Write the factors with which a low-rank stage begins, once W holds its values; B must still be zero.

    Args:
        index: number of the restart whose factors are written; 0 is the beginning.

    Raises:
        ValueError: an unknown policy, or B is not zero: an update that was not merged would be lost. Nothing has been
            changed then.
        RuntimeError: as in `restart`.
    """
    store, layers = store or TorchStore(), lora_layers(model)
    store.register(layers.values())
    policy = _policy(reinit, carry_residual)
    check_layers(layers, store)
    unmerged = _count(torch.count_nonzero, {name: layer.lora_B for name, layer in layers.items()}, store)
    if unmerged:
        raise ValueError(
            f"lora_B of {', '.join(unmerged[:4])} is not zero: an update that was not merged would be lost"
        )
    for name, layer in layers.items():
        start_layer(layer, store, policy, DrawKey(seed, index, name, draw_index))


def check_layers(layers: Mapping[str, LoRALinear], store: Store) -> None:
    """ValueError if there are no layers, or the store cannot reach the full values of one. Changes nothing."""
    if not layers:
        raise ValueError("the model has no LoRA layers: a restart would do nothing")
    for name, layer in layers.items():
        if layer.master is not None and layer.weight.requires_grad:
            raise ValueError(f"{name}.weight trains, but its master does not learn what it learns, and replaces it")
        stored = layer.weight_format
        W = (stored.num_bytes(layer.weight.dtype),) if stored.is_quantized else stored.shape
        full = {"weight": W, "lora_A": (layer.r, layer.in_features), "lora_B": (layer.out_features, layer.r)}
        for which, shape in full.items():
            parameter = getattr(layer, which)
            try:
                store.check(parameter)
            except ValueError as error:
                raise ValueError(f"{name}.{which}: {error}") from None
            found = tuple(store.raw_shape(parameter))
            if found != shape:
                raise ValueError(
                    f"{name}.{which}: has shape {found} here, {shape} in full: an engine has sharded it (such as "
                    "DeepSpeed ZeRO-3), and only that engine can reach the rest"
                )


def _policy(reinit: str | Reinit, carry_residual: bool) -> Reinit:
    policy = resolve_object("reinit", reinit, REINITS, Reinit)  # type: ignore[type-abstract]
    return Residual(policy) if carry_residual else policy


def _check_finite(factors: Mapping[str, nn.Parameter], store: Store) -> None:
    """ValueError that names the factors with NaN or infinity: merged, they would be in W."""
    bad = _count(lambda values: values.isfinite().logical_not().sum(), factors, store)
    if bad:
        raise ValueError(f"{len(bad)} of {len(factors)} LoRA factors are not finite: {', '.join(bad[:4])}")


def _count(count: Callable[[Tensor], Tensor], parameters: Mapping[str, nn.Parameter], store: Store) -> list[str]:
    """Names of the parameters of which `count` finds any entries, on whatever process. One reduction for all."""
    parts = [store.local(parameter) for parameter in parameters.values()]
    assert len({part.is_partial for part in parts}) == 1, (
        "one reduction serves parameters that are all sharded or all whole"
    )
    counts = store.reduce(parts[0], torch.stack([count(part.values) for part in parts])).tolist()
    return [name for name, found in zip(parameters, counts, strict=True) if found]


def start_layer(layer: LoRALinear, store: Store, policy: Reinit, key: DrawKey) -> Offset | None:
    """Write the policy's factors of one layer whose W holds all updates; those with B != 0 come out of W.

    Raises:
        RuntimeError: factors that are no use, or a copy that does not hold what was written.
    """

    def read_weight() -> Tensor:
        W = store.read(layer.weight)  # in the layout of the layer
        return (W.T if layer.transposed else W).to(torch.promote_types(W.dtype, torch.float32), copy=True)

    residual = None
    if policy.carries_residual and layer.weight_format.is_quantized:
        stored = store.dequantized(layer.weight)
        residual = store.read(layer.weight).to(stored) - stored
        residual = residual.T if layer.transposed else residual  # (d_out, d_in)
    view = LayerView(key.name, layer.r, layer.in_features, layer.out_features, layer.scale, read_weight)
    A, B = policy.factors(view, key, residual)
    _check_factors(layer, key.name, A, B)
    _write(store, f"{key.name}.lora_A", layer.lora_A, A)
    _write(store, f"{key.name}.lora_B", layer.lora_B, B)
    if not B.any():
        return None
    # As they were rounded; and of processes that train separately the mean product, so that W stays the same on all.
    offset = take_out(layer, store.read(layer.lora_A), store.read(layer.lora_B), store)
    if residual is None and layer.master is not None:
        store.write(layer.weight, store.read(layer.weight))
    return offset


def _check_factors(layer: LoRALinear, name: str, A: Tensor, B: Tensor) -> None:
    """RuntimeError for factors of another shape, that are not finite, or both zero, from which nothing is learned."""
    shapes = tuple(A.shape), tuple(B.shape)
    expected = (layer.r, layer.in_features), (layer.out_features, layer.r)
    if shapes != expected:
        raise RuntimeError(f"{name}: the reinit policy returned A, B of shapes {shapes}, which must be {expected}")
    if not (A.isfinite().all() and B.isfinite().all()):
        raise RuntimeError(f"{name}: the reinit policy returned factors that are not finite")
    if not (A.any() or B.any()):
        raise RuntimeError(f"{name}: the reinit policy returned A = B = 0, from which no gradient leads away")


def _write(store: Store, name: str, factor: nn.Parameter, values: Tensor) -> None:
    """Write a factor, and read back every copy: one that kept the old values would bring them back later."""
    store.write(factor, values)
    for copy, part in store.local_copies(factor).items():
        if not torch.equal(part.values, part.of(values).to(part.values)):
            raise RuntimeError(f"{name}: the {copy} does not hold what the restart has written")


def _report(merges: list[Merge], zeroed: list[tuple[int, int]]) -> RestartReport:
    num_zero, num_entries = (sum(counts) for counts in zip(*zeroed, strict=True))
    return RestartReport(
        merged_layers=len(merges),
        merge_error=max(merge.merge_error for merge in merges),
        master_error=max(merge.master_error for merge in merges),
        optimizer_zeroed_fraction=num_zero / num_entries if num_entries else 0.0,
        update_effective_rank=sum(merge.effective_rank for merge in merges) / len(merges),
    )
