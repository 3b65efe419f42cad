"""New factors of a layer: drawn by a policy, checked, and written, in this order."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relora.method.lora import LoRALinear
from relora.method.merge import Offset, take_out
from relora.method.reinit import DrawKey, LayerView, Reinit
from relora.method.store import Store


@dataclass(frozen=True)
class Draw:
    """New factors of one layer that have not been written yet.

    Attributes:
        A, B: (r, d_in), (d_out, r).
        carries_residual: they stand for the rounding error of a quantized W, which stays as it is.
        delta: the shard of the update that was shown to the policy, where it had to be transformed.
    """

    A: Tensor
    B: Tensor
    carries_residual: bool = False
    delta: Tensor | None = None


def draw_factors(
    layer: LoRALinear,
    store: Store,
    policy: Reinit,
    key: DrawKey,
    *,
    preview: Callable[[], tuple[Tensor, Tensor | None]] | None = None,
) -> Draw:
    """The policy's factors of one layer; writes nothing.

    Args:
        preview: gives W as it will be, and the transformed shard of delta if there is such a thing; without it W holds
            all updates already.

    Raises:
        RuntimeError: factors that are no use.
    """
    seen: list[tuple[Tensor, Tensor | None]] = []  # a preview is costly, and a policy may not look at W

    def merged() -> Tensor:
        if not seen:
            seen.append(preview() if preview is not None else (store.read(layer.weight), None))
        return seen[0][0]  # in the layout of the layer

    def read_weight() -> Tensor:
        W = merged()
        return (W.T if layer.transposed else W).to(torch.promote_types(W.dtype, torch.float32), copy=True)

    residual, stored = None, layer.weight_format
    if policy.carries_residual and stored.is_quantized:
        W, device = merged(), store.local(layer.weight).values.device
        if preview is None:
            rounded = store.dequantized(layer.weight)
        else:
            rounded = stored.dequantize(stored.quantize(W.to(device)), store.dtype(layer.weight))
        residual = W.to(rounded) - rounded
        residual = residual.T if layer.transposed else residual  # (d_out, d_in)
    view = LayerView(key.name, layer.r, layer.in_features, layer.out_features, layer.scale, read_weight)
    A, B = policy.factors(view, key, residual)
    _check_factors(layer, key.name, A, B)
    return Draw(A, B, carries_residual=residual is not None, delta=seen[0][1] if seen else None)


def start_layer(layer: LoRALinear, store: Store, policy: Reinit, key: DrawKey) -> Offset | None:
    """Draw and write the factors of one layer whose W holds all updates; those with B != 0 come out of W.

    Raises:
        RuntimeError: factors that are no use, which have not been written then, or a copy that does not hold what was.
    """
    draw = draw_factors(layer, store, policy, key)
    return write_factors(layer, store, key.name, draw)


def write_factors(layer: LoRALinear, store: Store, name: str, draw: Draw) -> Offset | None:
    """Write new factors of one layer whose W holds all updates; those with B != 0 come out of W.

    Raises:
        RuntimeError: a copy does not hold what was written.
    """
    _write(store, f"{name}.lora_A", layer.lora_A, draw.A)
    _write(store, f"{name}.lora_B", layer.lora_B, draw.B)
    if not draw.B.any():
        return None
    # As they were rounded; and of processes that train separately the mean product, so that W stays the same on all.
    offset = take_out(layer, store.read(layer.lora_A), store.read(layer.lora_B), store)
    if not draw.carries_residual and layer.master is not None:
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
