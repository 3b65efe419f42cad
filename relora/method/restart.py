"""The restart of ReLoRA: merge -> reinit -> reset, one verb, written once, over a store.

arXiv 2307.05695, Algorithm 1. First everything is checked and decided: the new factors of all layers, which entries of
the optimizer's state are cleared. Then it is written, layer by layer and in place: the storage of a parameter never
changes. Beside the new factors temporaries are those of one layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora.method.factor_state import reset_state
from relora.method.lora import FACTORS, LoRALinear, lora_layers
from relora.method.merge import Merge, merge_layer, preview_merge
from relora.method.new_factors import Draw, draw_factors, write_factors
from relora.method.registry import resolve_object
from relora.method.reinit import REINITS, DrawKey, Reinit, Residual
from relora.method.reset import RESETS, Reset, plan_resets
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


Transform = Callable[[Tensor], Tensor]
WEIGHT = 2**40  # of check_finite


class BrokenModelError(RuntimeError):
    """A restart failed while it wrote: the model is merged in part, and the last checkpoint is the way back."""


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
        optimizer: any of torch's kind; an `OptimizerKind` can declare how its state begins, else a trial shows it.
        seed, index: the key of the draws; `index` counts restarts from 1 (0 is the draw at injection).
        reinit: kaiming, orthogonal, offset, `module:attribute`, or a policy (`Offset(norm)` has a size).
        optimizer_reset: zero, magnitude, random, keep, `module:attribute`, or a policy.
        prune_ratio: for `magnitude` and `random`, in (0, 1].
        carry_residual: where W is quantized, the new factors begin as the best rank-r approximation of the rounding
            error of W, instead of those of `reinit`.
        store: how to reach parameters and state; plain torch unless an engine brings its own.
        draw_index: which of several independent draws; processes that train separately take their process index.
        transform_delta: called with a layer's name and its delta (a shard of it, where W is sharded); what it returns
            is merged. Called once for each layer, for some before anything is written.

    Raises:
        ValueError: no LoRA layers, a bad option, a factor that is not finite, or whose optimizer state is missing or
            cannot be cleared so, a parameter that the store cannot reach. Nothing has been changed then.
        RuntimeError: a policy returned factors or a mask that are no use. Nothing has been changed then either.
        BrokenModelError: something reads back otherwise than it was written, or there was no memory for it.
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
    plans = plan_resets(optimizer, factors, reset=reset, prune_ratio=prune_ratio, seed=seed, index=index, store=store)
    check_finite(layers, store)
    transforms = {name: transform_delta and partial(transform_delta, name) for name in layers}
    draws = dict[str, Draw]()
    for name, layer in layers.items():
        preview = partial(preview_merge, layer, store, transforms[name])
        draws[name] = draw_factors(layer, store, policy, DrawKey(seed, index, name, draw_index), preview=preview)
    try:
        merges = _merge_and_write(layers, draws, transforms, store)
        return _report(merges, [reset_state(optimizer, plan, store) for plan in plans])
    except Exception as error:
        lost = "The restart had begun to write: the model is not usable any more, go on from its last checkpoint"
        raise BrokenModelError(f"{error}. {lost}") from error


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
    keys = {name: DrawKey(seed, index, name, draw_index) for name in layers}
    draws = {name: draw_factors(layer, store, policy, keys[name]) for name, layer in layers.items()}
    for name, layer in layers.items():
        write_factors(layer, store, name, draws[name])


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


def check_finite(layers: Mapping[str, LoRALinear], store: Store) -> None:
    """ValueError that names the factors and weights that cannot be merged; on whatever process they are seen.

    NaN and infinity would spread over W, and so would factors whose product overflows in float32.
    """
    counts, names = list[Tensor](), list[str]()
    for name, layer in layers.items():
        limit = (torch.finfo(torch.float32).max / max(layer.r * abs(layer.scale), 1)) ** 0.5
        bad = [~(store.local(getattr(layer, which)).values.abs() <= limit) for which in FACTORS]
        counts += [entries.sum() for entries in bad]
        names += [f"{name}.{which}" for which in FACTORS]
        if not layer.weight_format.is_quantized:
            # In the upper half of the number: the reduction stays as small as for the factors alone.
            counts[-1] = counts[-1] + (~store.local(layer.weight).values.isfinite()).sum() * WEIGHT
    found = store.reduce(store.local(next(iter(layers.values())).lora_A), torch.stack(counts)).tolist()
    factors = [name for name, count in zip(names, found, strict=True) if count % WEIGHT]
    weights = [
        name.removesuffix("lora_B") + "weight" for name, count in zip(names, found, strict=True) if count // WEIGHT
    ]
    if factors:
        raise ValueError(
            f"{len(factors)} of {len(names)} LoRA factors are not finite, or too large to be multiplied: "
            f"{', '.join(factors[:4])}"
        )
    if weights:
        raise ValueError(f"{len(weights)} of {len(layers)} weights are not finite: {', '.join(weights[:4])}")


def _count(count: Callable[[Tensor], Tensor], parameters: Mapping[str, nn.Parameter], store: Store) -> list[str]:
    """Names of the parameters of which `count` finds any entries, on whatever process. One reduction for all."""
    parts = [store.local(parameter) for parameter in parameters.values()]
    assert len({part.is_partial for part in parts}) == 1, (
        "one reduction serves parameters that are all sharded or all whole"
    )
    counts = store.reduce(parts[0], torch.stack([count(part.values) for part in parts])).tolist()
    return [name for name, found in zip(parameters, counts, strict=True) if found]


def _merge_and_write(
    layers: Mapping[str, LoRALinear],
    draws: dict[str, Draw],
    transforms: Mapping[str, Transform | None],
    store: Store,
) -> list[Merge]:
    """Merge each layer and write its new factors, which leave `draws` one by one."""
    merges = []
    for name, layer in layers.items():
        draw = draws.pop(name)
        start, transform = partial(write_factors, layer, store, name, draw), transforms[name]
        if draw.delta is not None:  # has been transformed already: an outer optimizer makes one step, not two
            transform = lambda _, transformed=draw.delta: transformed  # noqa: E731
        merges.append(merge_layer(layer, store, transform_delta=transform, start=start))
    return merges


def _report(merges: list[Merge], zeroed: list[tuple[int, int]]) -> RestartReport:
    num_zero, num_entries = (sum(counts) for counts in zip(*zeroed, strict=True))
    return RestartReport(
        merged_layers=len(merges),
        merge_error=max(merge.merge_error for merge in merges),
        master_error=max(merge.master_error for merge in merges),
        optimizer_zeroed_fraction=num_zero / num_entries if num_entries else 0.0,
        update_effective_rank=sum(merge.effective_rank for merge in merges) / len(merges),
    )
