"""The restart of ReLoRA: merge -> reinit -> reset, one verb, written once, over a store.

arXiv 2307.05695, Algorithm 1. Layer by layer and in place: the storage of a parameter never changes, and
temporaries are those of one layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora.method.choices import ReinitName, ResetName
from relora.method.lora import FACTORS, LoRALinear, lora_layers
from relora.method.merge import Merge, carry_residual, merge_layer
from relora.method.optimizer import prune_generator, require_state, reset_state
from relora.method.reinit import draw_lora_A, keyed_generator, require_reinit, residual_factors
from relora.method.store import Store, TorchStore


@dataclass(frozen=True)
class RestartReport:
    """What a restart did, as measured after it.

    Attributes:
        merged_layers: layers whose update went into W.
        merge_error: |(W_new - W_old) - delta|_F / |delta|_F of the W that the model computes with, the largest over
            layers.
        master_error: the same of the exact W, which is another where W is stored on a coarser grid.
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
    reinit: ReinitName = "kaiming",
    optimizer_reset: ResetName = "zero",
    prune_ratio: float = 0.9,
    store: Store | None = None,
    draw_index: int = 0,
    outer: Callable[[str, Tensor], Tensor] | None = None,
    carries: bool = False,
) -> RestartReport:
    """Merge every update into its W, draw A afresh, zero B, and reset their optimizer state.

    The function of the model is the same before and after, to the rounding of what W is stored in.

    Args:
        optimizer: any torch optimizer with Adam-like state (moments of the parameter's shape, a step count).
        seed, index: the key of the draws; `index` counts restarts from 1 (0 is the draw at injection).
        prune_ratio: for `magnitude` and `random`, in (0, 1].
        store: how to reach parameters and state; plain torch unless an engine brings its own.
        stream: which of several independent draws; processes that train apart take their rank.
        outer: called with a layer's name and delta; what it returns is merged.
        carries: where W is stored as codes, the new factors begin as the best rank-r approximation of what
            the codes lack of the exact W, instead of a drawn A and B = 0.

    Raises:
        ValueError: no LoRA layers, a bad option, a factor without optimizer state (unless `keep`), a DTensor
            or a DeepSpeed parameter. Nothing has been changed then.
        RuntimeError: something reads back otherwise than it was written.
    """
    store, layers = store or TorchStore(), lora_layers(model)
    store.register(layers.values())
    factors = {f"{name}.{which}": getattr(layer, which) for name, layer in layers.items() for which in FACTORS}
    _check_options(layers, index, reinit, optimizer_reset, prune_ratio)
    for parameter in (*(layer.weight for layer in layers.values()), *factors.values()):
        store.check(parameter)
    if optimizer_reset != "keep":
        require_state(optimizer, factors, store)

    merged = []
    for name, layer in layers.items():
        carry = (
            partial(carried_factors, layer, seed, index, name) if carries and layer.weight_format.is_quantized else None
        )
        merge = merge_layer(layer, store, outer=partial(outer, name) if outer else None, carry=carry)
        merged.append(merge)
        A, B = merge.carried or (
            draw_lora_A(
                layer.r, layer.in_features, reinit=reinit, seed=seed, index=index, name=name, draw_index=draw_index
            ),
            torch.zeros(layer.out_features, layer.r),
        )
        _write(store, f"{name}.lora_A", layer.lora_A, A)
        _write(store, f"{name}.lora_B", layer.lora_B, B)
    zeroed = [
        reset_state(
            optimizer,
            factor,
            mode=optimizer_reset,
            prune_ratio=prune_ratio,
            generator=partial(prune_generator, seed, index, name),
            store=store,
        )
        for name, factor in factors.items()
    ]
    return _report(merged, zeroed)


def _write(store: Store, name: str, factor: nn.Parameter, values: Tensor) -> None:
    """Write a factor, and read back every copy: one that kept the old values would bring them back later."""
    store.write(factor, values)
    for copy, part in store.local_copies(factor).items():
        if not torch.equal(part.values, part.of(values).to(part.values)):
            raise RuntimeError(f"{name}: the {copy} does not hold what the restart has written")


def begin_carried(model: nn.Module, *, seed: int, store: Store) -> None:
    """Let the factors of a stage that begins carry what the codes lack, as `restart` does (index 0)."""
    for name, layer in lora_layers(model).items():
        A, B = carry_residual(layer, store, partial(carried_factors, layer, seed, 0, name))
        _write(store, f"{name}.lora_A", layer.lora_A, A)
        _write(store, f"{name}.lora_B", layer.lora_B, B)


def carried_factors(layer: LoRALinear, seed: int, index: int, name: str, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (A, B) of `residual`, in the layout of the layer's weight, drawn from the key of this restart."""
    generator = keyed_generator(seed, index, "residual", name)
    residual = residual.T if layer.transposed else residual
    return residual_factors(residual, layer.r, layer.scale, generator)


def _report(merged: list[Merge], zeroed: list[tuple[int, int]]) -> RestartReport:
    num_zero, num_entries = (sum(counts) for counts in zip(*zeroed, strict=True))
    return RestartReport(
        merged_layers=len(merged),
        merge_error=max(merge.merge_error for merge in merged),
        master_error=max(merge.master_error for merge in merged),
        optimizer_zeroed_fraction=num_zero / num_entries if num_entries else 0.0,
        update_effective_rank=sum(merge.effective_rank for merge in merged) / len(merged),
    )


def _check_options(
    layers: dict[str, LoRALinear], index: int, reinit: str, optimizer_reset: str, prune_ratio: float
) -> None:
    if not layers:
        raise ValueError("the model has no LoRA layers: a restart would do nothing")
    if index < 1:
        raise ValueError(f"index must be >= 1 (0 is the draw at injection), not {index}")
    require_reinit(reinit)
    if optimizer_reset not in get_args(ResetName):
        raise ValueError(f"optimizer_reset must be one of {get_args(ResetName)}, not {optimizer_reset!r}")
    if not 0 < prune_ratio <= 1:
        raise ValueError(f"prune_ratio must be in (0, 1], not {prune_ratio}")
